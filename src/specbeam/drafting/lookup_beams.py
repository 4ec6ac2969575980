"""Drafters without a model below beams: prompt lookup, suffix and token recycling as trees of all beams of a row.

Idea: what the running beams of a prompt all have in common is text that will stay, and is what a drafter looks things
up in; each beam's own end is what it looks up. What it finds below every beam becomes one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specbeam.decoding.request import Request
from specbeam.drafting import Proposal, make_drafter
from specbeam.drafting.answered import Answered
from specbeam.drafting.beam_settings import BeamSettings

if TYPE_CHECKING:
    from specbeam.decoding.beam import Beams


class LookupBeams:
    """Drafts below the beams of one batch; the same calls as DraftBeams."""

    def __init__(self, settings: BeamSettings, target: Any, request: Request, vocabulary: int):
        self.name = settings.drafter
        self.drafter: Any = make_drafter(settings.lookup, target, None, request, vocabulary)
        self.prompts = [row.prompt for row in request.rows]

    def propose(self, beams: Sequence[Beams], limits: Sequence[int], known: Sequence[Answered]) -> Proposal:
        trees = []
        for number, (prompt, row, limit) in enumerate(zip(self.prompts, beams, limits, strict=True)):
            shared = prompt + common(row.tokens)
            trees.append(self.drafter.branch(number, shared, [prompt + ids for ids in row.tokens], row.scores, limit))
        return Proposal([t for t, _ in trees], [p for _, p in trees], None, [self.name] * len(trees), [""] * len(trees))

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
        self.drafter.observe(tokens, logits)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.drafter.keep_rows(rows)
        self.prompts = [self.prompts[row] for row in rows]


def common(texts: Sequence[list[int]]) -> list[int]:
    """What all texts begin with."""
    low, high = min(texts), max(texts)
    return low[: next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
