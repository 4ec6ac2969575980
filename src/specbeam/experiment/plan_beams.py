"""What the options of beam searches must satisfy, checked before any model is loaded."""

from __future__ import annotations

from typing import Any

from specbeam.decoding import BEAM_FAMILIES, Method
from specbeam.drafting.beam_settings import BeamSettings
from specbeam.errors import InputError

DEFAULT_BEAMS = 4  # of beam_generate and all others
DEFAULT_GROUPS = 2  # of diverse_beam_generate
BEAM_OPTIONS = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")


def check_beam_options(place: str, kind: str, method: Method, options: dict[str, Any]) -> None:
    """Raises InputError, one sentence. place: what an option's name begins with."""
    if method.family not in BEAM_FAMILIES:
        return
    beams = options.get("num_beams") or DEFAULT_BEAMS
    returned = options.get("num_return_sequences") or 1
    if returned > beams:
        raise InputError(f"{place}num_return_sequences is {returned}, but num_beams is {beams}: there are only as many "
                         "hypotheses as beams.")
    if options.get("trace") and beams == 1:
        raise InputError(f"{place}trace keeps the search tree of beam search, and num_beams is 1: leave it out.")
    groups = options.get("num_beam_groups") or DEFAULT_GROUPS
    if kind == "diverse_beam" and beams % groups:
        raise InputError(f"{place}num_beam_groups is {groups}, but num_beams is {beams}: groups are of one size, so "
                         "num_beams must be a multiple of num_beam_groups.")
    for name in ("length_penalty", "early_stopping"):
        if kind == "stochastic_beam" and options.get(name) is not None:
            raise InputError(f"{place}{name} has no effect: {kind} draws by probability; use kind beam.")
    if kind == "speculative_beam":
        check_text(f"{place}corpus", options.get("corpus"))
        names = [name for name in BeamSettings.__dataclass_fields__ if options.get(name) is not None]
        try:
            BeamSettings(**{name: options[name] for name in names}, tokenizer=place).check(place)
            if options.get("corpus") is not None:
                check_corpus(options["corpus"])
        except InputError as error:
            raise InputError(f"{place}{error}") from None


def check_corpus(path: str) -> None:
    """Raises InputError for a corpus that cannot be read; ids and spelling are checked when the target is there."""
    from specbeam.corpus import read_corpus

    class AnyTokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0] if text else []

    read_corpus(path, AnyTokenizer(), 1 << 31)


def check_text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {value!r}: give a string or null.")
