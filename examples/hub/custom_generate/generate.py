"""specbeam's decoding methods as a `custom_generate` repository."""

from specbeam.transformers import generate as specbeam_generate


def generate(model, **arguments):
    """`model.generate(**inputs, custom_generate="<this repository>", trust_remote_code=True, draft=draft)`.

    method: greedy, sample, speculative (default), beam or speculative_beam. draft: the draft model of the speculative
    ones. Their settings (draft_length, drafter, …) and all of generate's arguments go beside them.
    """
    return specbeam_generate(model, **arguments)
