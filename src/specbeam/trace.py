"""What a method returns: hypotheses with their ancestry, what happened in every round, and a beam search's tree.

Plain numbers only (no tensors), so that a trace can be written to a file as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


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
    # Part of decode_seconds from logits to committed tokens; of chains that the runner reads or records as one function
    # (runners/chains.py) the choice of the tokens lies in verify_seconds, and None says that nothing was timed apart.
    accept_seconds: float | None = None
    counted: int | None = None  # new tokens as another program counts them; None: those of the answer


@dataclass(frozen=True)
class Hypothesis:
    """One answer. `score` is transformers' `sequences_scores` for beam search, None elsewhere."""

    tokens: list[int]  # EOS included, no padding
    score: float | None
    finish_reason: str  # eos | stop | length
    beams: tuple[int, ...] | None = None  # the beam (0 … num_beams-1) each token was continued from


@dataclass(frozen=True)
class Candidate:
    """A continuation that a beam step ranked."""

    token: int
    beam: int  # the running beam that it continues (0 … num_beams-1)
    score: float  # summed log-probability up to here, processed, without length penalty
    survived_as: int | None = None  # the running beam it became; None: it does not run on
    finish_reason: str | None = None  # it ends here: eos | stop | length
    finished_score: float | None = None  # it entered the finished pool with this score (length penalty and all)


@dataclass(frozen=True)
class SearchStep:
    """One step of a beam search: its candidates, best first; drawn ones as drawn, those of groups group by group."""

    round: int  # in which it was taken: 0 = prefill, then 1, 2, … (speculation takes several steps in one round)
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class SearchTree:
    """All that a row's beam search looked at. ends: of each hypothesis in the finished pool at the end, best first (the
    first are the returned ones), its step and the number of the candidate that ended it."""

    steps: tuple[SearchStep, ...]
    ends: tuple[tuple[int, int], ...]

    def path(self, hypothesis: int = 0) -> list[tuple[int, int]]:
        """(step, candidate) of each of a hypothesis' tokens, from the first to the last."""
        return self.path_to(*self.ends[hypothesis])

    def finished(self, hypothesis: int = 0) -> Candidate:
        """The candidate that ended a hypothesis."""
        step, number = self.ends[hypothesis]
        return self.steps[step].candidates[number]

    def tokens(self, hypothesis: int = 0) -> list[int]:
        """A hypothesis, read off the tree."""
        return [self.steps[step].candidates[number].token for step, number in self.path(hypothesis)]

    def by_score(self) -> SearchTree:
        """The same tree with its hypotheses by score, best first."""
        return replace(self, ends=tuple(sorted(
            self.ends, key=lambda end: -(self.steps[end[0]].candidates[end[1]].finished_score or 0.0))))

    def path_to(self, step: int, number: int) -> list[tuple[int, int]]:
        """(step, candidate) of a candidate and of all that it continues."""
        found = [(step, number)]
        while step > 0:
            beam, step = self.steps[step].candidates[number].beam, step - 1
            number = next(i for i, one in enumerate(self.steps[step].candidates) if one.survived_as == beam)
            found.append((step, number))
        return found[::-1]


@dataclass(frozen=True)
class GenerationOutput:
    """Hypotheses of each row, best first, each row's trace and, for beam search with `trace=True`, its search tree."""

    hypotheses: list[list[Hypothesis]]
    trace: list[RowTrace]
    search: list[SearchTree] | None = None

    @property
    def tokens(self) -> list[list[int]]:
        """New tokens of each row's best hypothesis, EOS included, no padding."""
        return [row[0].tokens for row in self.hypotheses]

    def show(self, tokenizer: Any = None) -> Any:
        """For a notebook: the answers with coloured tokens, and the tree of a beam search with `trace=True`."""
        from specbeam.report.notebook import show

        return show(self, tokenizer)

    def _repr_html_(self) -> str:
        return str(self.show()._repr_html_())


_NOTHING = -5.0e8  # a score below: no hypothesis stands there


def search_trees(watched: Sequence[tuple[dict[int, int], Any]], rows: int) -> list[SearchTree]:
    """The tree of each row of a batch. watched: of each beam step the round of each row that it stepped, and what was
    ranked (beam.Ranked)."""
    steps: list[list[SearchStep]] = [[] for _ in range(rows)]
    pools: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for rounds, ranked in watched:
        for (row, number), tokens, origins, scores, reasons, chosen, pool, pool_scores in zip(
                rounds.items(), *ranked, strict=True):
            width, now = len(chosen), len(steps[row])
            before = pools[row] or [(-1, -1)] * width
            pools[row] = [(-1, -1) if place < 0 else before[place] if place < width else (now, place - width)
                          for place in pool]
            finished = {j: score for (step, j), score in zip(pools[row], pool_scores, strict=True)
                        if step == now and score > _NOTHING}
            steps[row].append(SearchStep(number, tuple(
                Candidate(token, origin, score, chosen.index(j) if j in chosen and reason is None else None, reason,
                          finished.get(j))
                for j, (token, origin, score, reason) in enumerate(zip(
                    tokens, origins, scores, reasons, strict=True)))))
    return [SearchTree(tuple(own), tuple((step, j) for step, j in pool if step >= 0
                                         and own[step].candidates[j].finished_score is not None))
            for own, pool in zip(steps, pools, strict=True)]
