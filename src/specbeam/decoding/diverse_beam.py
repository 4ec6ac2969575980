"""Diverse beam search: groups of beams, each told what the earlier groups have just said.

Vijayakumar et al. 2018 (arXiv 1610.02424); transformers had it as group beam search until version 5.
Idea: within a step the groups go one after the other. A token that running beams of earlier groups took n times at this
step costs `diversity_penalty` × n (Hamming diversity, the paper's equation 5), and each group is otherwise a beam
search of its own, with its own finished pool. All share one tree and one forward.
Exact: the groups' hypotheses are those of a plain implementation with full forwards, in order, with their scores. As in
transformers, a score includes the penalties, which come before the other processors. Where it differs: a group that
has finished says nothing any more (there, its padding was penalised).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.beam import Beams, Finished, Ranked, check_beams, ranking, search, start_beams, step
from specbeam.decoding.request import settle
from specbeam.engine.support import evaluating
from specbeam.errors import InputError
from specbeam.sampling import process
from specbeam.trace import GenerationOutput, Hypothesis


@dataclass(frozen=True)
class Groups:
    """One row's groups, each a beam search, and which of them are over."""

    groups: list[Beams]
    over: list[bool]

    def front(self) -> tuple[list[int], list[int]]:
        fronts = [(group * len(one.scores), one.front()) for group, one in enumerate(self.groups)]
        return ([token for _, (tokens, _) in fronts for token in tokens],
                [first + origin for first, (_, origins) in fronts for origin in origins])

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best of all groups' pools; `beams` counts through the groups."""
        size = len(self.groups[0].scores)
        found = [one.hypothesis(group * size)
                 for group, beams in enumerate(self.groups) for one in beams.finished if one.reason]
        found = sorted(found, key=lambda one: -(one.score or 0.0))[:count]
        return found + [Finished().hypothesis()] * (count - len(found))  # as beam search, where nothing may follow


def diverse_beam_generate(
    target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None, *,
    num_beams: int = 4, num_beam_groups: int = 2, diversity_penalty: float = 0.5, num_return_sequences: int = 1,
    **options,
) -> GenerationOutput:
    """Diverse beam search: `num_beam_groups` groups of num_beams / num_beam_groups beams; other arguments and the
    result as in `beam_generate`. diversity_penalty: in log-probability, at least 0."""
    check_beams(num_beams, num_return_sequences, options)
    check_groups(num_beams, num_beam_groups, diversity_penalty)
    size = num_beams // num_beam_groups
    # Processors that count on num_beams rows at once see one group.
    request = settle(target, input_ids, attention_mask, sampled=False, beams=(size, 1), searches=True, **options)
    rule = ranking(request)

    def advance(states: list[Groups], logits: Tensor, live: list[int]
                ) -> tuple[list[Groups], list[bool], Ranked | None]:
        plain = logits.float().log_softmax(-1)
        taken = torch.zeros_like(plain[:, 0])  # [rows, vocabulary], how often at this step
        after, seen = [Groups([], []) for _ in states], []
        for group in range(num_beam_groups):
            own = [state.groups[group] for state in states]
            penalised = plain[:, group * size : (group + 1) * size] - diversity_penalty * taken[:, None]
            log_probs = process(penalised, [request.rows[row].processors for row in live],
                                lambda i, beam: request.rows[live[i]].then(own[i].past.texts()[beam]))  # noqa: B023
            stepped, over, ranked = step(own, log_probs, rule, request, live)
            seen.append(ranked)
            for i, state in enumerate(states):
                done = state.over[group]
                after[i].groups.append(own[i] if done else stepped[i])
                after[i].over.append(done or over[i])
                if not done:  # what its beams go on with, or would but for their length
                    tokens = [token for token, why in zip(ranked.tokens[i], ranked.reasons[i], strict=True)
                              if why in (None, "length")][:size]
                    said = torch.tensor(tokens, dtype=torch.long, device=taken.device)
                    taken[i].index_add_(0, said, taken.new_ones(len(tokens)))
        together = _together(seen, [state.over for state in states], size) if request.trace else None
        return after, [all(state.over) for state in after], together

    start = Groups([start_beams(size)] * num_beam_groups, [False] * num_beam_groups)
    with evaluating(target):
        out = search(target, request, [start] * len(request.rows), num_beams, advance, num_return_sequences)
    return out if out.search is None else replace(out, search=[tree.by_score() for tree in out.search])


def _together(groups: Sequence[Ranked], over: Sequence[Sequence[bool]], size: int) -> Ranked:
    """What all groups of each row have ranked, as of one search; over: [rows][groups], nothing new of these."""
    whole = Ranked([], [], [], [], [], [], [])
    for i, done in enumerate(over):
        for column in whole:
            column.append([])
        for group, ranked in enumerate(groups):
            first, known, width = len(whole.tokens[i]), group * size, len(groups) * size
            if done[group]:
                whole.chosen[i] += [-1] * size
                whole.pool[i] += range(known, known + size)
            else:
                whole.tokens[i] += ranked.tokens[i]
                whole.origins[i] += [known + origin for origin in ranked.origins[i]]
                whole.scores[i] += ranked.scores[i]
                whole.reasons[i] += ranked.reasons[i]
                whole.chosen[i] += [first + j for j in ranked.chosen[i]]
                whole.pool[i] += [known + j if j < size else width + first + j - size for j in ranked.pool[i]]
            whole.pool_scores[i] += ranked.pool_scores[i]
    return whole


def check_groups(num_beams: int, num_beam_groups: int, diversity_penalty: float) -> None:
    """Raises InputError for groups that cannot be."""
    if isinstance(num_beam_groups, bool) or not isinstance(num_beam_groups, int) or num_beam_groups < 1:
        raise InputError(f"num_beam_groups is {num_beam_groups!r}: it must be a whole number of at least 1.")
    if num_beams % num_beam_groups:
        raise InputError(f"num_beam_groups is {num_beam_groups} and num_beams {num_beams}: groups are of one size, so "
                         "num_beams must be a multiple of num_beam_groups.")
    number = isinstance(diversity_penalty, int | float) and not isinstance(diversity_penalty, bool)
    if not number or not 0 <= diversity_penalty < float("inf"):
        raise InputError(f"diversity_penalty is {diversity_penalty!r}: give a number of at least 0 (0: the groups do "
                         "not see each other).")
