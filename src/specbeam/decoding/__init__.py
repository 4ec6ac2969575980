"""The table of methods. A new method is one new file and one line here.

Importing this costs nothing: a method's module (and torch) is imported when it first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Method:
    """`run` is `module:function`; the function takes (target[, draft], input_ids, attention_mask, **options)."""

    run: str
    family: str  # what it may be compared with: greedy | sample | beam | beam_sample | diverse_beam | stochastic_beam
    speculates: bool = False  # wants a draft model
    batched: bool = True  # False: rows of a batch run one after the other
    refills: bool = False  # takes `batch_size`: a row that ends makes room for the next prompt
    options: tuple[str, ...] = ()  # own options, beside transformers' GenerationConfig names

    def load(self) -> Callable:
        module, function = self.run.split(":")
        return getattr(import_module(module), function)


_PEER = "specbeam.baselines.transformers_generate"

METHODS: dict[str, Method] = {
    "greedy": Method("specbeam.decoding.greedy:greedy_generate", "greedy", refills=True),
    "sample": Method("specbeam.decoding.sample:sample_generate", "sample", refills=True),
    "speculative": Method("specbeam.decoding.speculative:speculative_generate", "greedy", speculates=True, refills=True,
                          options=("draft_length", "confidence_threshold", "costs", "drafter", "acceptance",
                                   "branching", "tree_nodes", "tree_width", "ngram", "branches", "corpus", "exit_layer",
                                   "min_match", "vocabulary")),
    "beam": Method("specbeam.decoding.beam:beam_generate", "beam", options=("trace",)),
    "beam_sample": Method("specbeam.decoding.beam_sample:beam_sample_generate", "beam_sample", options=("trace",)),
    "diverse_beam": Method("specbeam.decoding.diverse_beam:diverse_beam_generate", "diverse_beam",
                           options=("num_beam_groups", "diversity_penalty", "trace")),
    "stochastic_beam": Method("specbeam.decoding.stochastic_beam:stochastic_beam_generate", "stochastic_beam",
                              options=("trace",)),
    "speculative_beam": Method("specbeam.decoding.speculative_beam:speculative_beam_generate", "beam",
                               speculates=True, options=("draft_length", "draft_beams", "drafter", "ngram", "branches",
                                                         "corpus", "tree_nodes", "trace")),
    "transformers_greedy": Method(f"{_PEER}:transformers_greedy", "greedy"),
    "transformers_sample": Method(f"{_PEER}:transformers_sample", "sample"),
    "transformers_assisted": Method(f"{_PEER}:transformers_assisted", "greedy", speculates=True, batched=False,
                                    options=("draft_length",)),
    "transformers_beam": Method(f"{_PEER}:transformers_beam", "beam"),
    "transformers_beam_sample": Method(f"{_PEER}:transformers_beam_sample", "beam_sample"),
    "openai_server": Method("specbeam.baselines.openai_server:openai_server", "greedy", batched=False,
                            options=("base_url", "model", "timeout", "send", "api_key_variable")),
}
BEAM_FAMILIES = ("beam", "beam_sample", "diverse_beam", "stochastic_beam")
SAMPLED_FAMILIES = ("sample", "beam_sample", "stochastic_beam")  # outputs of two runs differ by chance


PEERS = ("transformers_", "openai_")  # how the kinds begin that are not ours


def at_once(method: Method, prompts: int, batch_size: int) -> int:
    """How many prompts one call of a method takes, when `batch_size` of them may run together."""
    return prompts if method.refills else batch_size if method.batched else 1


def method_family(kind: str, settings: dict) -> str:
    """A method's family; a speculative kind samples when its temperature is above 0."""
    method = METHODS[kind]
    if method.speculates and method.family == "greedy" and float(settings.get("temperature") or 0.0) > 0.0:
        return "sample"
    return method.family
