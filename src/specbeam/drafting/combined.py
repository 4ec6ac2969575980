"""Ask what costs nothing first, the draft model only where that has nothing good.

SAM-Decoding (arXiv 2411.10666) and SuffixDecoding (arXiv 2411.04975) fall back to a draft model in the same way.
Idea: per row and round, a match of at least `min_match` tokens in prompt, answer or corpus (suffix.py) is proposed as
it is. Where there is none, the draft model drafts; without a draft model, the table of token_recycling.py does. A round
in which every row has a match costs no draft forward: the draft reads later what it has not seen.
Sampling stays exact: which drafter a row asks depends on the text so far only, and a match, being a function of that
text, stands in q as a point of probability one beside the rows that were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from specbeam.drafting import Drafter, Proposal, Settings, draft_model, suffix, token_recycling
from specbeam.drafting.length import UNKNOWN, Length


def make(settings: Settings, target: Any, draft: Any, request: Any, vocabulary: int) -> Combined:
    second = (token_recycling if draft is None else draft_model).make(settings, target, draft, request, vocabulary)
    return Combined(suffix.make(settings, target, draft, request, vocabulary), second, settings.min_match)


class Combined:
    """The matches of a batch, and the drafter of the rows without a good one."""

    def __init__(self, matches: suffix.Suffix, second: Drafter, min_match: int):
        self.matches, self.second, self.min_match = matches, second, min_match
        self.asked: list[bool] = []  # in the last round: the rows that the second drafter proposed for

    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Length) -> Proposal:
        good = [match >= self.min_match for match in self.matches.match_lengths(sequences)]
        first = self.matches.propose(sequences, [limit * ok for limit, ok in zip(limits, good, strict=True)], length)
        left = [0 if ok else limit for limit, ok in zip(limits, good, strict=True)]
        self.asked = [limit > 0 for limit in left]
        if not any(self.asked):
            return first
        second = self.second.propose(sequences, left, length)
        first = first if second.q is None else length.trim(first)
        of_row = [second if asked else first for asked in self.asked]
        return Proposal(
            tokens=[one.tokens[row] for row, one in enumerate(of_row)],
            parents=[one.parents[row] for row, one in enumerate(of_row)],
            q=None if second.q is None else points(second.q, first.tokens, self.asked),
            source=[one.source[row] for row, one in enumerate(of_row)],
            why=list(length.why),
            confidence=[one.confidence[row] if one.confidence else [UNKNOWN] * len(one.tokens[row])
                        for row, one in enumerate(of_row)],
            forwards=second.forwards)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        if any(self.asked):
            self.second.accept([path if asked else [] for path, asked in zip(paths, self.asked, strict=True)])

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
        self.second.observe(tokens, logits)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.matches.keep_rows(rows)
        self.second.keep_rows(rows)

    def join(self, more: Combined) -> None:
        self.matches.join(more.matches)
        self.second.join(more.second)


def points(q: Tensor, chains: Sequence[Sequence[int]], drawn: Sequence[bool]) -> Tensor:
    """q [rows, ≥ longest, vocabulary]: as it is for rows that were drawn, probability one for the tokens of chains
    that were not."""
    q = pad(q, (0, 0, 0, max(0, *(len(chain) - q.shape[1] for chain in chains), 0)))
    for row, chain in enumerate(chains):
        if not drawn[row]:
            q[row] = 0.0
            q[row, list(range(len(chain))), list(chain)] = 1.0
    return q
