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
from specbeam.runners.chains import sent
from specbeam.runners.host_beams import beams_of
from specbeam.sampling import process
from specbeam.trace import GenerationOutput, Hypothesis

MOST_PENALTY = 100  # length_penalty, either way
_NEVER = -1.0e9  # transformers' "no hypothesis here"; finite, so that it can be added and ranked


class Past:
    """What the beams of a row have said: the last step, and the past that it continues."""

    __slots__ = ("before", "known", "origins", "tokens")

    def __init__(self, before: Past | None, tokens: list[int], origins: list[int]):
        """tokens: of each beam; origins: the beam of `before` that it continues. before None: nothing was said yet."""
        self.before, self.tokens, self.origins = before, tokens, origins
        self.known = None if before else np.empty((len(tokens), 0), dtype=np.int64)

    def last(self, beam: int, steps: int) -> tuple[list[int], list[int]]:
        """The last tokens of a beam, and the beams that these were continued from."""
        tokens, origins, past = [0] * steps, [0] * steps, self
        for step in reversed(range(steps)):
            tokens[step], origins[step] = past.tokens[beam], past.origins[beam]
            assert past.before is not None
            beam, past = origins[step], past.before
        return tokens, origins

    def texts(self) -> np.ndarray:
        """All tokens [beams, length], put together when they are asked for, from what was asked for last."""
        steps, past = [], self
        while past.known is None:
            steps.append(past)
            assert past.before is not None
            past = past.before
        known = past.known
        for step in reversed(steps):
            known = np.concatenate([known[step.origins], np.array(step.tokens)[:, None]], 1)
        if past.before is not None:
            past.known = None
        self.known = known
        return known


class Finished(NamedTuple):
    """A place of the finished pool; reason None: nobody's yet. score: with the length penalty. past: of one beam, of
    this length."""

    score: float = _NEVER
    reason: str | None = None
    past: Past = Past(None, [0], [0])
    length: int = 0

    def hypothesis(self, first: int = 0) -> Hypothesis:
        """first: the number of the search's beam 0."""
        tokens, origins = self.past.last(0, self.length)
        return Hypothesis(tokens, self.score, self.reason or "length", tuple([first + origin for origin in origins]))


class Beams(NamedTuple):
    """The search's state for one row: running beams and the finished pool, both ranked best first.

    length: tokens that each beam has. scores: summed log-probabilities, each an fp32 number. tied: finished ones have
    equal scores.
    """

    length: int
    past: Past
    scores: list[float]
    finished: list[Finished]
    tied: bool = False

    @property
    def tokens(self) -> list[list[int]]:
        """Of each running beam."""
        return self.past.texts().tolist()

    def front(self) -> tuple[list[int], list[int]]:
        """The last step: each running beam's token, and the beam of the step before that it continues."""
        return self.past.tokens, self.past.origins

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best `count` of the finished pool."""
        return [one.hypothesis() for one in self.finished[:count]]


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
    the step, as places in the pool before it, or num_beams + a candidate (-1: empty); pool_scores: its scores. Nobody
    but the tree asks for origins, pool and pool_scores: without `trace` they are empty.
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
    none = [0] * num_beams
    return Beams(0, Past(None, none, none), [0.0] + [_NEVER] * (num_beams - 1), [Finished()] * num_beams)


def step(beams: Sequence[Beams], log_probs: Tensor, rule: Ranking, request: Request, live: Sequence[int]
         ) -> tuple[list[Beams], list[bool], Ranked]:
    """One beam step. Returns the new states, whether each row's search is over, and what was ranked.

    log_probs: [rows, beams, vocabulary] fp32, processed; overwritten. live: the request's row behind each row. Ranking
    is left to torch.topk on the same numbers as in transformers, so that ties end alike. A GPU waits for what happens
    between its candidates and its next forward: all rows are looked at together.
    """
    width, vocabulary = log_probs.shape[1:]
    for row, number in zip(beams, live, strict=True):
        if request.rows[number].impossible:
            for text, score in zip(row.tokens, row.scores, strict=True):
                if score > _NEVER / 2:  # what ended, or was not allowed, fills places that nobody else takes
                    refuse_impossible(request.rows[number], text)
            request.rows[number].impossible.clear()
    before = sent(torch.from_numpy(np.array([row.scores for row in beams], dtype=np.float32)), log_probs.device)
    best, index = rule.candidates(log_probs.add_(before[..., None]).flatten(1), rule.keep, live)
    best, index = best.to("cpu", non_blocking=True), index.cpu()  # both are here when the second is
    found = index.tolist()
    tokens = [[place % vocabulary for place in row] for row in found]
    reasons = endings(tokens, lambda i: [beams[i].tokens[place // vocabulary] for place in found[i]],
                      [row.length + 1 for row in beams], request, live, log_probs.device)
    ends = [any(row) for row in reasons]
    # The best candidates that do not end run on.
    ended = torch.tensor([[reason is not None for reason in row] for row in reasons]) if any(ends) else None
    scores, chosen = (best if ended is None else best + ended * _NEVER).topk(width)
    ranked = Ranked(tokens, [], best.tolist(), reasons, chosen.tolist(), [], [])
    # transformers ranks the pool in every step, and topk does not leave equal scores in their order.
    turned = [i for i, row in enumerate(beams) if ends[i] or row.tied]
    pools = _pools(turned, beams, ranked, found, rule, vocabulary) if turned else {}
    after = []
    for i, (row, said, places, runs, values) in enumerate(zip(
            beams, tokens, found, ranked.chosen, scores.tolist(), strict=True)):
        past = Past(row.past, [said[j] for j in runs], [places[j] // vocabulary for j in runs])
        after.append(Beams(row.length + 1, past, values, *(pools[i][1:] if i in pools else row[3:])))
    over = [all(why) or not more for why, more in zip(reasons, _hopeful(after, rule, request, live), strict=True)]
    if request.trace:
        ranked = ranked._replace(
            origins=[[place // vocabulary for place in row] for row in found],
            pool=[pools[i][0] if i in pools else list(range(width)) for i in range(len(beams))],
            pool_scores=[[one.score for one in row.finished] for row in after])
    return after, over, ranked


def endings(tokens: Sequence[list[int]], continued: Callable[[int], list[list[int]]], lengths: Sequence[int],
            request: Request, live: Sequence[int], device: torch.device) -> list[list[str | None]]:
    """What ends each row's candidates; None: they run on. tokens: of the candidates; continued(row): the answers that
    they continue; lengths: of each row's answers with a candidate."""
    reasons: list[list[str | None]] = []
    for i, (row, length, number) in enumerate(zip(tokens, lengths, live, strict=True)):
        why: list[str | None] = ["length" if length >= request.rows[number].max_new_tokens else None] * len(row)
        if request.stopping:
            why = ["stop" if stops(request, number, [*text, token], device) else reason
                   for text, token, reason in zip(continued(i), row, why, strict=True)]
        if not request.eos.isdisjoint(row):
            why = ["eos" if token in request.eos else reason for token, reason in zip(row, why, strict=True)]
        reasons.append(why)
    return reasons


def _pools(turned: Sequence[int], beams: Sequence[Beams], ranked: Ranked, found: Sequence[list[int]], rule: Ranking,
           vocabulary: int) -> dict[int, tuple[list[int], list[Finished], bool]]:
    """The finished pools of some rows: their places (in the pool before, or num_beams + candidate), the hypotheses
    there, and whether some of these have equal scores. found: the candidates' places in [beams × vocabulary]."""
    width, pools = rule.num_beams, {}
    enters = np.array([[reason is not None for reason in ranked.reasons[i]] for i in turned])
    enters[:, width:] = False  # these are only spare
    with np.errstate(all="ignore"):  # a penalty may be beyond fp32, in which scores are
        by = np.array([[(beams[i].length + 1) ** rule.length_penalty] for i in turned], dtype=np.float32)
        entering = np.array([ranked.scores[i] for i in turned], dtype=np.float32) / by + ~enters * np.float32(_NEVER)
    standing = np.array([[one.score for one in beams[i].finished] for i in turned], dtype=np.float32)
    values, places = torch.from_numpy(np.concatenate([standing, entering], 1)).topk(width)
    for i, scores, row in zip(turned, values.tolist(), places.tolist(), strict=True):
        pool = []
        for score, place in zip(scores, row, strict=True):
            if place < width:
                pool.append(beams[i].finished[place])
            elif score < _NEVER / 2:
                pool.append(Finished())
            else:
                origin, token = divmod(found[i][place - width], vocabulary)
                pool.append(Finished(score, ranked.reasons[i][place - width], Past(beams[i].past, [token], [origin]),
                                     beams[i].length + 1))
        pooled = [one.score for one in pool if one.reason]
        pools[i] = row, pool, len(set(pooled)) < len(pooled)
    return pools


def _hopeful(beams: Sequence[Beams], rule: Ranking, request: Request, live: Sequence[int]) -> list[bool]:
    """Whether a running beam of each row may still beat the worst of the pool (transformers' heuristic for the length
    it may reach)."""
    far = rule.early_stopping == "never" and rule.length_penalty > 0
    reach = [request.rows[number].max_new_tokens for number in live] if far else [row.length for row in beams]
    with np.errstate(all="ignore"):
        by = np.array([length ** rule.length_penalty for length in reach], dtype=np.float32)
        worst = np.array([[one.score for one in row.finished] for row in beams], dtype=np.float32).min(1)  # NaN wins
        hopeful = np.array([row.scores[0] for row in beams], dtype=np.float32) / by > worst
    if rule.early_stopping is True:
        hopeful &= [row.finished[-1].reason is None for row in beams]
    return hopeful.tolist()


def log_probabilities(logits: Tensor, beams: Sequence[Beams], request: Request, live: Sequence[int]) -> Tensor:
    """[rows, beams, vocabulary] fp32: normalised first, then processed, as transformers does for beams."""
    return process(logits.float().log_softmax(-1), [request.rows[row].processors for row in live],
                   lambda i, beam: request.rows[live[i]].then(beams[i].past.texts()[beam]))


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
        end = batch.clock.mark()
        for i, row in enumerate(batch.live):
            if start is not None:
                batch.round_done(row, start, [], 0, 1, end=end)
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
            tokens, origins = sent(torch.from_numpy(np.array(front)), tree.device).unbind(1)
            tips = tips.pick(origins.clamp(max=tips.depth.shape[1] - 1))
            own = torch.arange(width, device=tree.device).expand(len(batch.live), -1)
            logits, tips = tree.extend(tips, leaves(tokens, own))
        batch.phases["verify"].append((start, batch.clock.mark()))
