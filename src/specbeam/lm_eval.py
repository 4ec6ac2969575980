"""specbeam as a model of EleutherAI's lm-evaluation-harness: `specbeam lm-eval run --model specbeam --model_args …`.

The harness asks three things of a model. `generate_until` is answered by one of our methods; `loglikelihood` and
`loglikelihood_rolling` do not depend on the method and are the harness's own (HFLM) on the very same target.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from specbeam import transformers as ours
from specbeam.decoding import METHODS
from specbeam.errors import InputError
from specbeam.models import load_model, load_pair

# What the harness hands to a model of its own accord, and what HFLM makes of a model that is loaded already.
_OF_HFLM = ("batch_size", "max_batch_size", "max_length", "add_bos_token", "prefix_token_id", "logits_cache",
            "truncation", "softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args")


@register_model("specbeam")
class SpecbeamLM(HFLM):
    """`--model_args target=<path>,draft=<path>,method=speculative,draft_length=4,…`: paths as everywhere in specbeam.

    method: greedy, sample, speculative (default), beam, speculative_beam; further arguments are its settings
    (`num_beams=4` too). device, dtype, runner: as in `load_model`. Raises InputError for what makes no sense.
    """

    def __init__(self, target: str = "bundled", draft: str | None = None, method: str = "speculative",
                 device: str | None = None, dtype: str = "auto", runner: str = "auto", num_beams: int = 1,
                 seed: int | None = None, **arguments: Any):
        kinds = ("greedy", "sample", "speculative", "beam", "speculative_beam")
        if method not in kinds:
            raise InputError(f"method is {method!r}: it is one of {', '.join(kinds)}.")
        known = {name: arguments.pop(name) for name in _OF_HFLM if name in arguments}
        own = ours.settings_of(method)
        if wrong := sorted(set(arguments) - set(own)):
            raise InputError(f"{wrong[0]} is no model argument of method {method}: it takes target, draft, method, "
                             f"device, dtype, runner, seed, {', '.join((*own, *_OF_HFLM))}.")
        draft_model: Any
        where: dict[str, Any] = {"device": device or "auto", "dtype": dtype, "runner": runner}
        if METHODS[method].speculates and arguments.get("drafter", "draft_model") in ("draft_model", "combined"):
            pair = (target, draft) if draft else (target,) if target == "bundled" else None
            if pair is None:
                raise InputError(f"method {method} needs a draft: give draft=<folder or hub id> beside target.")
            model, draft_model, tokenizer = load_pair(*pair, **where)
        else:
            draft_model = None
            model, tokenizer = load_model(target, **where)
        self.draft = draft_model
        self.method, self.num_beams, self.seed, self.settings = method, num_beams, seed, arguments
        if "beam" in method and num_beams < 2:
            self.num_beams = 4
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **known)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        """What HFLM asks of its model, answered by our method; stop strings end each row by itself."""
        sampled = options.pop("do_sample", None)
        temperature = options.pop("temperature", 0.0) or 0.0
        sampled = temperature > 0 if sampled is None else bool(sampled)  # as the harness: temperature 0 is greedy
        if sampled and temperature > 0:
            options["temperature"] = temperature
        if "beam" in self.method:
            options.setdefault("num_beams", self.num_beams)
        settings = dict(self.settings)
        if self.seed is not None and self.method in ("sample", "speculative"):
            settings["seed"] = self.seed
        return ours.generate(
            self.model, method=self.method, draft=self.draft, input_ids=context, max_length=max_length,
            stop_strings=[text for text in stop if text] or None, tokenizer=self.tokenizer, do_sample=sampled,
            pad_token_id=self.tokenizer.pad_token_id, **settings, **options)


def main(arguments: list[str]) -> int:
    """The harness's own command line, with this model known to it."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
    return 0
