"""What a method returns: hypotheses with their ancestry, and what happened in every round.

Plain numbers only (no tensors), so that a trace can be written to a file as it is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One target forward that verified `drafted` proposals and committed at least one token of one row."""

    drafted: int
    accepted: int  # proposals that became output; those behind an EOS or a stop are not counted
    committed: int  # tokens (beam search: steps) that became output
    seconds: float  # of the whole batch's round: drafting, verifying, accepting
    proposed: tuple[int, ...] = ()  # the drafted token ids, parents before children
    parents: tuple[int, ...] = ()  # of each proposed token, its parent among them; -1: the committed text
    drafter: str = "plain"  # who proposed
    why: str = ""  # why the proposal was as long as it was


@dataclass(frozen=True)
class RowTrace:
    """What happened to one row of a batch. Seconds are the batch's, the same in each of its rows."""

    prompt_tokens: int
    first_tokens: int  # tokens known when prefill ended
    rounds: tuple[Round, ...]  # after prefill; prefill is none
    sources: tuple[str, ...]  # of each new token: plain | draft (or another drafter's name) | correction | bonus
    token_rounds: tuple[int, ...]  # of each new token: 0 = prefill, then 1, 2, …
    prefill_seconds: float  # target and draft
    decode_seconds: float  # from the first new token to the last of the batch
    draft_seconds: float | None = None  # part of decode_seconds spent drafting
    verify_seconds: float | None = None  # part of decode_seconds spent in target forwards


@dataclass(frozen=True)
class Hypothesis:
    """One answer. `score` is transformers' `sequences_scores` for beam search, None elsewhere."""

    tokens: list[int]  # EOS included, no padding
    score: float | None
    finish_reason: str  # eos | stop | length
    beams: tuple[int, ...] | None = None  # the beam (0 … num_beams-1) each token was continued from


@dataclass(frozen=True)
class GenerationOutput:
    """Hypotheses of each row, best first, and each row's trace."""

    hypotheses: list[list[Hypothesis]]
    trace: list[RowTrace]

    @property
    def tokens(self) -> list[list[int]]:
        """New tokens of each row's best hypothesis, EOS included, no padding."""
        return [row[0].tokens for row in self.hypotheses]
