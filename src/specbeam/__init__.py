"""specbeam: run, compare and prove LLM decoding methods on Hugging Face models.

Names are imported when they are first used, so that `import specbeam` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "beam_generate": "specbeam.decoding.beam",
    "beam_sample_generate": "specbeam.decoding.beam_sample",
    "diverse_beam_generate": "specbeam.decoding.diverse_beam",
    "generate_many": "specbeam.decoding.many",
    "greedy_generate": "specbeam.decoding.greedy",
    "sample_generate": "specbeam.decoding.sample",
    "speculative_beam_generate": "specbeam.decoding.speculative_beam",
    "speculative_generate": "specbeam.decoding.speculative",
    "stochastic_beam_generate": "specbeam.decoding.stochastic_beam",
    "load_model": "specbeam.models",
    "load_pair": "specbeam.models",
    "use_runner": "specbeam.runners.choose",
    "render_prompt": "specbeam.chat",
    "GenerationOutput": "specbeam.trace",
    "Hypothesis": "specbeam.trace",
    "InputError": "specbeam.errors",
}
__all__ = ["__version__", "transformers", *_HOME]

if TYPE_CHECKING:
    from specbeam.chat import render_prompt as render_prompt
    from specbeam.decoding.beam import beam_generate as beam_generate
    from specbeam.decoding.beam_sample import beam_sample_generate as beam_sample_generate
    from specbeam.decoding.diverse_beam import diverse_beam_generate as diverse_beam_generate
    from specbeam.decoding.greedy import greedy_generate as greedy_generate
    from specbeam.decoding.many import generate_many as generate_many
    from specbeam.decoding.sample import sample_generate as sample_generate
    from specbeam.decoding.speculative import speculative_generate as speculative_generate
    from specbeam.decoding.speculative_beam import speculative_beam_generate as speculative_beam_generate
    from specbeam.decoding.stochastic_beam import stochastic_beam_generate as stochastic_beam_generate
    from specbeam.errors import InputError as InputError
    from specbeam.models import load_model as load_model
    from specbeam.models import load_pair as load_pair
    from specbeam.runners.choose import use_runner as use_runner
    from specbeam.trace import GenerationOutput as GenerationOutput
    from specbeam.trace import Hypothesis as Hypothesis

    from . import transformers as transformers


def __getattr__(name: str):
    if name == "transformers":
        return import_module("specbeam.transformers")
    if name not in _HOME:
        raise AttributeError(f"module 'specbeam' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
