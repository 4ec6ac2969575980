"""Beam search: the `num_beams` most probable continuations, extended together.

Graves 2012 (arXiv 1211.3711) for the search; the finished pool, length penalty and stopping are transformers'.
Idea: all beams of a prompt live in one row's tree. A step writes one node below each beam and ranks
`num_beams` × vocabulary continuations; surviving is gathering visibility, so nothing is copied and the prompt's keys
and values are stored once. A beam whose continuation ends joins the finished pool, ranked by
score / length^length_penalty.
Exact: the hypotheses of `transformers.generate(num_beams=…)`, in order, with their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.request import Request, refuse_impossible, settle
from specbeam.decoding.rows import Batch, stops
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import leaves, read_prompts
from specbeam.errors import InputError
from specbeam.runners.host_beams import beams_of
from specbeam.sampling import process
from specbeam.trace import GenerationOutput, Hypothesis

MOST_PENALTY = 100  # length_penalty, either way
_NEVER = -1.0e9  # transformers' "no hypothesis here"; finite, so that it can be added and ranked


class Finished(NamedTuple):
    """A place of the finished pool; reason None: nobody's yet. score: with the length penalty."""

    score: float = _NEVER
    tokens: list[int] = []  # noqa: RUF012 (never changed)
    origins: list[int] = []  # noqa: RUF012
    reason: str | None = None


@dataclass(frozen=True)
class Beams:
    """The search's state for one row: running beams and the finished pool, both ranked best first.

    tokens: of each running beam. origins: the beam that each of these tokens was continued from. scores: summed
    log-probabilities, each an fp32 number.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    scores: list[float]
    finished: list[Finished]

    def front(self) -> tuple[list[int], list[int]]:
        """The last step: each running beam's token, and the beam of the step before that it continues."""
        return [ids[-1] for ids in self.tokens], [path[-1] for path in self.origins]

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best `count` of the finished pool."""
        return [Hypothesis(one.tokens, one.score, one.reason or "length", tuple(one.origins))
                for one in self.finished[:count]]


class State(Protocol):
    """What `search` needs to know of a row."""

    def front(self) -> tuple[list[int], list[int]]: ...

    def hypotheses(self, count: int) -> list[Hypothesis]: ...


Candidates = Callable[[Tensor, int, Sequence[int]], tuple[Tensor, Tensor]]


def most_probable(total: Tensor, keep: int, live: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The `keep` best continuations of each row, best first: their scores and places in total [rows, …]."""
    return total.topk(keep)


class Ranked(NamedTuple):
    """What one step ranked, a list per row: what the search tree of `trace=True` is made of.

    Of each candidate, best first: its token, the running beam it continues (origins), its summed log-probability, and
    what ends it (None: nothing). chosen: the candidates that run on, by beam (-1: none). pool: the finished pool after
    the step, as places in the pool before it, or num_beams + a candidate (-1: empty); pool_scores: its scores.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    scores: list[list[float]]
    reasons: list[list[str | None]]
    chosen: list[list[int]]
    pool: list[list[int]]
    pool_scores: list[list[float]]


@dataclass(frozen=True)
class Ranking:
    """How continuations are ranked: the caller's options."""

    num_beams: int
    keep: int  # candidates per step, enough that num_beams of them do not end
    length_penalty: float
    early_stopping: bool | str
    candidates: Candidates = most_probable


def beam_generate(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None,
                  *, num_beams: int = 4, num_return_sequences: int = 1, **options) -> GenerationOutput:
    """Beam search; other arguments as in `greedy_generate`, also `length_penalty` (1.0), `early_stopping` (False,
    True or "never") and `trace` (True: `search` holds each row's search tree).

    Each row's `hypotheses` holds `num_return_sequences` answers, best first; `score` is transformers'
    `sequences_scores`; `beams` names, for each token, the beam that it was continued from.
    """
    check_beams(num_beams, num_return_sequences, options)
    if num_beams == 1:
        return greedy_generate(target, input_ids, attention_mask, **options)
    request = settle(target, input_ids, attention_mask, sampled=False,
                     beams=(num_beams, num_return_sequences), **options)
    with evaluating(target):
        return search_beams(target, request, ranking(request), num_return_sequences)


def check_beams(num_beams: int, num_return_sequences: int, options: dict[str, Any]) -> None:
    """Raises InputError for what no beam search can do."""
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise InputError(f"num_beams is {num_beams!r}: it must be a whole number of at least 1.")
    whole = isinstance(num_return_sequences, int) and not isinstance(num_return_sequences, bool)
    if not whole or not 1 <= num_return_sequences <= num_beams:
        raise InputError(f"num_return_sequences is {num_return_sequences!r} and num_beams {num_beams}: give a whole "
                         "number; at least one and at most num_beams hypotheses can be returned.")
    if options.get("streamer") is not None:
        raise InputError("streamer was given to beam search, whose answer is only known at its end: leave it out, or "
                         "stream greedy_generate.")


def ranking(request: Request) -> Ranking:
    """The ranking that a request asks for, with transformers' defaults."""
    config = request.config
    early = config.early_stopping if config.early_stopping is not None else False
    if early not in (True, False, "never"):
        raise InputError(f"early_stopping is {early!r}: give true, false or \"never\".")
    penalty = 1.0 if config.length_penalty is None else config.length_penalty
    # Beyond this the longest answer's length to that power is no number.
    most = min(MOST_PENALTY, int(700 / math.log(max(2, *(row.max_new_tokens for row in request.rows)))))
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not -most <= penalty <= most:
        raise InputError(f"length_penalty is {penalty!r}: give a number from -{most} to {most}.")
    return Ranking(config.num_beams, max(2, 1 + len(request.eos)) * config.num_beams, float(penalty), early)


def start_beams(num_beams: int) -> Beams:
    """One empty beam that counts (else all would start with the same continuations), no finished hypothesis."""
    none: list[list[int]] = [[] for _ in range(num_beams)]
    return Beams(none, none, [0.0] + [_NEVER] * (num_beams - 1), [Finished()] * num_beams)


def step(beams: Sequence[Beams], log_probs: Tensor, rule: Ranking, request: Request, live: Sequence[int]
         ) -> tuple[list[Beams], list[bool], Ranked]:
    """One beam step. Returns the new states, whether each row's search is over, and what was ranked.

    log_probs: [rows, beams, vocabulary] fp32, processed; overwritten. live: the request's row behind each row. Ranking
    is left to torch.topk on the same numbers as in transformers, so that ties end alike; the rest is a few numbers per
    row.
    """
    width, vocabulary = log_probs.shape[1:]
    for row, number in zip(beams, live, strict=True):
        if request.rows[number].impossible:
            for tokens, score in zip(row.tokens, row.scores, strict=True):
                if score > _NEVER / 2:  # what ended, or was not allowed, fills places that nobody else takes
                    refuse_impossible(request.rows[number], tokens)
            request.rows[number].impossible.clear()
    before = torch.tensor([row.scores for row in beams], device=log_probs.device)
    best, index = rule.candidates(log_probs.add_(before[..., None]).flatten(1), rule.keep, live)
    best = best.cpu()
    found = [[divmod(place, vocabulary) for place in row] for row in index.tolist()]  # (origin, token)
    reasons = [endings(row.tokens, candidates, request, number, log_probs.device)
               for row, candidates, number in zip(beams, found, live, strict=True)]
    # The best candidates that do not end run on.
    ended = [[reason is not None for reason in row] for row in reasons]
    scores, chosen = (best + torch.tensor(ended) * _NEVER if any(map(any, ended)) else best).topk(width)
    pools = [_pool(row, best[i], why, rule) for i, (row, why) in enumerate(zip(beams, reasons, strict=True))]
    after = [
        Beams([[*row.tokens[candidates[j][0]], candidates[j][1]] for j in runs],
              [[*row.origins[candidates[j][0]], candidates[j][0]] for j in runs], values,
              [_finished(row, value, place, candidates, why) for value, place in zip(*pool, strict=True)] if pool
              else row.finished)
        for row, candidates, why, runs, values, pool in zip(
            beams, found, reasons, chosen.tolist(), scores.tolist(), pools, strict=True)]
    over = [all(why) or not _hopeful(row, rule, request.rows[number].max_new_tokens)
            for row, why, number in zip(after, reasons, live, strict=True)]
    ranked = Ranked(
        [[token for _, token in row] for row in found], [[origin for origin, _ in row] for row in found],
        best.tolist(), reasons, chosen.tolist(), [pool[1] if pool else list(range(width)) for pool in pools],
        [[one.score for one in row.finished] for row in after])
    return after, over, ranked


def endings(tokens: Sequence[list[int]], candidates: Sequence[tuple[int, int]], request: Request, number: int,
            device: torch.device) -> list[str | None]:
    """What ends each candidate (the beam it continues, its token) of the request's row `number`; None: it runs on.
    tokens: of the beams."""
    most = request.rows[number].max_new_tokens
    reasons: list[str | None] = ["length" if len(tokens[origin]) + 1 >= most else None for origin, _ in candidates]
    if request.stopping:
        reasons = ["stop" if stops(request, number, [*tokens[origin], token], device) else reason
                   for (origin, token), reason in zip(candidates, reasons, strict=True)]
    return ["eos" if token in request.eos else reason for (_, token), reason in zip(candidates, reasons, strict=True)]


def _pool(row: Beams, best: Tensor, reasons: Sequence[str | None], rule: Ranking
          ) -> tuple[list[float], list[int]] | None:
    """Scores and places (in the pool before, or num_beams + candidate) of the finished pool, now that candidates of
    these scores ended for these reasons. None: it stays as it is."""
    ends = [reason is not None for reason in reasons[: rule.num_beams]]  # the candidates behind are only spare
    if not any(ends):
        # transformers ranks the pool in every step, and topk does not leave equal scores in their order.
        pooled = [one.score for one in row.finished if one.reason]
        if len(set(pooled)) == len(pooled):
            return None
    enters = torch.tensor(ends + [False] * (len(reasons) - len(ends)))
    score = best / (len(row.tokens[0]) + 1) ** rule.length_penalty + ~enters * _NEVER
    values, places = torch.cat([torch.tensor([one.score for one in row.finished]), score]).topk(rule.num_beams)
    return values.tolist(), places.tolist()


def _finished(row: Beams, score: float, place: int, candidates: Sequence[tuple[int, int]],
              reasons: Sequence[str | None]) -> Finished:
    """What stands in the new pool at this place of the old one and the candidates."""
    width = len(row.finished)
    if place < width:
        return row.finished[place]
    if score < _NEVER / 2:
        return Finished()
    origin, token = candidates[place - width]
    return Finished(score, [*row.tokens[origin], token], [*row.origins[origin], origin], reasons[place - width])


def _hopeful(row: Beams, rule: Ranking, limit: int) -> bool:
    """Whether a running beam may still beat the worst of the pool (transformers' heuristic for the length it may
    reach)."""
    full = all(one.reason for one in row.finished)
    if full and rule.early_stopping is True:
        return False
    reach = limit if rule.early_stopping == "never" and rule.length_penalty > 0 else len(row.tokens[0])
    worst = min(one.score for one in row.finished)
    with np.errstate(all="ignore"):  # a penalty may be beyond fp32, in which the pool's scores are
        return float(np.float32(row.scores[0]) / np.float32(reach ** rule.length_penalty)) > worst


def log_probabilities(logits: Tensor, beams: Sequence[Beams], request: Request, live: Sequence[int]) -> Tensor:
    """[rows, beams, vocabulary] fp32: normalised first, then processed, as transformers does for beams."""
    return process(logits.float().log_softmax(-1), [request.rows[row].processors for row in live],
                   lambda i, beam: request.rows[live[i]].prompt + beams[i].tokens[beam])


def search_beams(target: PreTrainedModel, request: Request, rule: Ranking, count: int) -> GenerationOutput:
    """Beam search under this ranking; `count` hypotheses per row."""
    def advance(beams: list[Beams], logits: Tensor, live: list[int]) -> tuple[list[Beams], list[bool], Ranked]:
        return step(beams, log_probabilities(logits, beams, request, live), rule, request, live)

    return search(target, request, [start_beams(rule.num_beams) for _ in request.rows], rule.num_beams, advance, count)


@torch.inference_mode()
def search(target: PreTrainedModel, request: Request, states: Sequence[State], width: int, advance: Callable[..., Any],
           count: int) -> GenerationOutput:
    """Any search that extends `width` beams per row together.

    advance(states, logits [rows, width, vocabulary], live) → the new states, whether each row's search is over, and
    what was ranked.
    """
    adapter = adapt(target)
    prompts = [row.prompt for row in request.rows]
    lengths, room = [len(prompt) for prompt in prompts], [row.max_new_tokens for row in request.rows]
    check_lengths(adapter, lengths, room)
    batch = Batch(request, target)
    # Beams share most of their past: what they need beyond one answer each is made when it is needed.
    tree, tips, logits = read_prompts(adapter, prompts, max(lengths) + max(room) + 4 * width)
    found: list[list[Hypothesis]] = [[] for _ in lengths]
    beams = beams_of(tree, lengths, width)

    logits = logits.expand(-1, width, -1)
    start = None
    while True:
        states, over, ranked = advance(states, logits, batch.live)
        batch.watch(ranked, batch.live)
        for i, row in enumerate(batch.live):
            if start is not None:
                batch.round_done(row, start, [], 0, 1)
            if over[i]:
                found[row] = states[i].hypotheses(count)
                batch.finish(row, found[row][0], list(range(len(found[row][0].tokens))))
        if start is None:
            batch.prefill_done(batch.live)
            for state in batch.rows:
                state.first_tokens = 1
        stay = batch.retire()
        if not batch.live:
            return batch.output(hypotheses=found)
        if stay:
            states = [states[i] for i in stay]
            if beams is not None:
                beams.keep_rows(stay)
            else:
                tips = tips.rows(tree.keep_rows(stay))
        start = batch.clock.mark()
        front = [state.front() for state in states]
        if beams is not None:
            logits = beams.read(front)
        else:
            # Surviving is gathering: each beam's new node hangs below the beam that it was continued from.
            tokens, origins = torch.tensor(front, device=tree.device).unbind(1)
            tips = tips.pick(origins.clamp(max=tips.depth.shape[1] - 1))
            own = torch.arange(width, device=tree.device).expand(len(batch.live), -1)
            logits, tips = tree.extend(tips, leaves(tokens, own))
        batch.phases["verify"].append((start, batch.clock.mark()))
