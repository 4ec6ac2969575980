"""Beam search: the `num_beams` most probable continuations, extended together.

Graves 2012 (arXiv 1211.3711) for the search; the finished pool, length penalty and stopping are transformers'.
Idea: all beams of a prompt live in one row's tree. A step writes one node below each beam and ranks
`num_beams` × vocabulary continuations; surviving is gathering visibility, so nothing is copied and the prompt's keys
and values are stored once. A beam whose continuation ends joins the finished pool, ranked by
score / length^length_penalty.
Exact: the hypotheses of `transformers.generate(num_beams=…)`, in order, with their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch, stops
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import TokenTree, chain, leaves
from specbeam.errors import InputError
from specbeam.sampling import process
from specbeam.trace import REASONS, GenerationOutput, Hypothesis

_NEVER = -1.0e9  # transformers' "no hypothesis here"; finite, so that it can be added and ranked


@dataclass(frozen=True)
class Beams:
    """The search's state for some rows: running beams and the finished pool, both ranked best first.

    length: [rows] long, tokens of each running beam. tokens, finished_tokens: [rows, beams, most] long. origins,
    finished_origins: the same shape, the beam each token was continued from. scores: [rows, beams] fp32, summed
    log-probabilities; finished_scores: with the length penalty. finished_by: [rows, beams] long, index into REASONS.
    ended: [rows, beams] bool, pool places that are taken. open: [rows] bool, the pool may still improve.
    """

    length: Tensor
    tokens: Tensor
    origins: Tensor
    scores: Tensor
    finished_tokens: Tensor
    finished_origins: Tensor
    finished_lengths: Tensor
    finished_scores: Tensor
    finished_by: Tensor
    ended: Tensor
    open: Tensor

    def rows(self, index: Tensor) -> Beams:
        """These rows only."""
        return Beams(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def where(self, chosen: Tensor, other: Beams) -> Beams:
        """These for the chosen rows ([rows] bool), `other` for the rest."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__]
        return Beams(*(torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))

    def last(self, values: Tensor) -> Tensor:
        """values [rows, beams, most] at each row's last step: [rows, beams]."""
        return values.gather(2, (self.length - 1).view(-1, 1, 1).expand(-1, values.shape[1], 1)).squeeze(2)


@dataclass(frozen=True)
class Ranking:
    """How continuations are ranked: the caller's options."""

    num_beams: int
    keep: int  # candidates per step, enough that num_beams of them do not end
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True)
class Ranked:
    """What one step ranked, best first, for the search tree that `trace=True` asks for.

    tokens, origins (running beams), reasons (index into REASONS; -1: runs on): [rows, candidates] long. scores: the
    same shape, fp32, summed log-probabilities. chosen: [rows, beams] long, the candidates that run on. pool: [rows,
    beams] long, the finished pool after the step: a place in the pool before it, or num_beams + a candidate.
    pool_scores: [rows, beams] fp32.
    """

    tokens: Tensor
    origins: Tensor
    scores: Tensor
    reasons: Tensor
    chosen: Tensor
    pool: Tensor
    pool_scores: Tensor


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
        return _search(target, request, num_return_sequences)


def check_beams(num_beams: int, num_return_sequences: int, options: dict[str, Any]) -> None:
    """Raises InputError for what no beam search can do."""
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise InputError(f"num_beams is {num_beams!r}: it must be a whole number of at least 1.")
    if not 1 <= num_return_sequences <= num_beams:
        raise InputError(f"num_return_sequences is {num_return_sequences} and num_beams {num_beams}: at least one and "
                         "at most num_beams hypotheses can be returned.")
    if options.get("streamer") is not None:
        raise InputError("streamer was given to beam search, whose answer is only known at its end: leave it out, or "
                         "stream greedy_generate.")


def ranking(request: Request) -> Ranking:
    """The ranking that a request asks for, with transformers' defaults."""
    config = request.config
    early = config.early_stopping if config.early_stopping is not None else False
    if early not in (True, False, "never"):
        raise InputError(f"early_stopping is {early!r}: give true, false or \"never\".")
    penalty = 1.0 if config.length_penalty is None else float(config.length_penalty)
    return Ranking(config.num_beams, max(2, 1 + len(request.eos)) * config.num_beams, penalty, early)


def start_beams(rows: int, num_beams: int, most: int, device: torch.device) -> Beams:
    """One empty beam per row that counts, and no finished hypothesis. most: tokens that a hypothesis may have."""
    # One place more: rows that ended are stepped along with the others, and the result is thrown away.
    none = torch.zeros(rows, num_beams, most + 1, dtype=torch.long, device=device)
    zeros = torch.zeros(rows, num_beams, device=device)
    scores = zeros.clone()
    scores[:, 1:] = _NEVER  # else all beams would start with the same continuations
    whole = zeros.long()
    return Beams(whole[:, 0], none, none, scores, none, none, whole, zeros + _NEVER, whole, zeros.bool(),
                 torch.ones(rows, dtype=torch.bool, device=device))


def step(beams: Beams, log_probs: Tensor, rule: Ranking, request: Request, live: Sequence[int]
         ) -> tuple[Beams, Tensor, Ranked]:
    """One beam step. Returns the new state, [rows] bool: whether each row's search is over, and what was ranked.

    log_probs: [rows, beams, vocabulary] fp32, processed. live: the request's row behind each row.
    """
    width, vocabulary = log_probs.shape[1:]
    length = beams.length + 1  # of the candidates
    total = (log_probs + beams.scores[..., None]).flatten(1)
    best, index = total.topk(rule.keep)
    origin, token = index // vocabulary, index % vocabulary
    end = beams.length.view(-1, 1, 1).expand(-1, rule.keep, 1)
    tokens = _gather(beams.tokens, origin).scatter(2, end, token[..., None])
    origins = _gather(beams.origins, origin).scatter(2, end, origin[..., None])
    reason = _endings(tokens, token, length, request, live)
    ends = reason >= 0

    # The best candidates that do not end run on.
    running = best + ends * _NEVER
    chosen = running.topk(width).indices
    # Of the first `num_beams` candidates, those that end may enter the pool; the others are only spare.
    enters = ends.clone()
    enters[:, width:] = False
    score = best / length[:, None].float() ** rule.length_penalty
    full = beams.ended.all(1, keepdim=True) & (rule.early_stopping is True)
    score = score + (full | ~beams.open[:, None]) * _NEVER + ~enters * _NEVER

    pool_scores = torch.cat([beams.finished_scores, score], 1)
    kept = pool_scores.topk(width).indices

    def pool(old: Tensor, new: Tensor) -> Tensor:
        return _gather(torch.cat([old, new], 1), kept)

    after = Beams(
        length=length, tokens=_gather(tokens, chosen), origins=_gather(origins, chosen),
        scores=running.gather(1, chosen),
        finished_tokens=pool(beams.finished_tokens, tokens),
        finished_origins=pool(beams.finished_origins, origins),
        finished_lengths=pool(beams.finished_lengths, length[:, None].expand_as(token)),
        finished_scores=pool_scores.gather(1, kept),
        finished_by=pool(beams.finished_by, reason),
        ended=pool(beams.ended, enters), open=beams.open)

    # Can a running beam still beat the worst of the pool? (transformers' heuristics for the length it may reach)
    limit = torch.tensor([request.rows[row].max_new_tokens for row in live], device=token.device)
    reach = limit if rule.early_stopping == "never" and rule.length_penalty > 0 else length
    hope = after.scores[:, :1] / reach[:, None].float() ** rule.length_penalty
    worst = torch.where(after.ended, after.finished_scores.min(1, keepdim=True).values, _NEVER)
    still = after.open & (hope > worst).any(1)
    after = replace(after, open=still)
    over = ~still | ends.all(1)
    if rule.early_stopping is True:
        over = over | after.ended.all(1)
    return after, over, Ranked(token, origin, best, reason, chosen, kept, after.finished_scores)


def _endings(tokens: Tensor, last: Tensor, length: Tensor, request: Request, live: Sequence[int]) -> Tensor:
    """[rows, candidates] long: -1 runs on, else what ends the candidate (index into REASONS)."""
    reason = torch.full_like(last, -1)
    limits = torch.tensor([request.rows[row].max_new_tokens for row in live], device=last.device)
    reason[length >= limits] = 0
    if request.stopping:
        for i, (row, reached) in enumerate(zip(live, length.tolist(), strict=True)):
            for j, ids in enumerate(tokens[i, :, :reached].tolist()):
                if stops(request.stopping, request.rows[row].prompt + ids, last.device):
                    reason[i, j] = 2
    for token in request.eos:
        reason[last == token] = 1
    return reason


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values [rows, beams, …] by index [rows, k]."""
    while index.dim() < values.dim():
        index = index[..., None]
    return torch.take_along_dim(values, index, 1)


def log_probabilities(logits: Tensor, beams: Beams, request: Request, live: Sequence[int]) -> Tensor:
    """[rows, beams, vocabulary] fp32: normalised first, then processed, as transformers does for beams."""
    running, length = beams.tokens, beams.length
    return process(logits.float().log_softmax(-1), [request.rows[row].processors for row in live],
                   lambda i, beam: request.rows[live[i]].prompt + running[i, beam, : int(length[i])].tolist())


def hypotheses(beams: Beams, row: int, count: int) -> list[Hypothesis]:
    """The best `count` of a row's finished pool."""
    found = []
    for place in range(count):
        length = int(beams.finished_lengths[row, place])
        found.append(Hypothesis(
            tokens=beams.finished_tokens[row, place, :length].tolist(),
            score=float(beams.finished_scores[row, place]),
            finish_reason=REASONS[int(beams.finished_by[row, place])],
            beams=tuple(beams.finished_origins[row, place, :length].tolist())))
    return found


@torch.inference_mode()
def _search(target: PreTrainedModel, request: Request, num_return_sequences: int) -> GenerationOutput:
    adapter, rule = adapt(target), ranking(request)
    prompts = [row.prompt for row in request.rows]
    lengths, room = [len(prompt) for prompt in prompts], [row.max_new_tokens for row in request.rows]
    check_lengths(adapter, lengths, room)
    batch = Batch(request, target)
    # Beams share most of their past: what they need beyond one answer each is made when it is needed.
    tree = TokenTree(adapter, len(lengths), max(lengths) + max(room) + 4 * rule.num_beams)
    beams = start_beams(len(lengths), rule.num_beams, max(room), tree.device)
    found: list[list[Hypothesis]] = [[] for _ in lengths]

    logits, tips = tree.extend(tree.tips([0] * len(lengths)), chain(prompts, tree.device), last_only=True)
    tips = tips.pick(torch.tensor(lengths, device=tree.device)[:, None] - 1)
    logits = logits.expand(-1, rule.num_beams, -1)
    start = None
    while True:
        beams, over, ranked = step(beams, log_probabilities(logits, beams, request, batch.live), rule, request,
                                   batch.live)
        batch.watch(ranked)
        done = over.tolist()
        for i, row in enumerate(batch.live):
            if start is not None:
                batch.round_done(row, start, [], 0, 1)
            if done[i]:
                found[row] = hypotheses(beams, i, num_return_sequences)
                batch.finish(row, found[row][0], list(range(len(found[row][0].tokens))))
        if start is None:
            batch.prefill_done()
            for state in batch.rows:
                state.first_tokens = 1
        stay = batch.retire()
        if not batch.live:
            return batch.output(hypotheses=found)
        if stay:
            kept = tree.keep_rows(stay)
            beams, tips = beams.rows(kept), tips.rows(kept)
        start = batch.clock.mark()
        # Surviving is gathering: each beam's new node hangs below the beam that it was continued from.
        tips = tips.pick(beams.last(beams.origins).clamp(max=tips.depth.shape[1] - 1))
        own = torch.arange(rule.num_beams, device=tree.device).expand(len(batch.live), -1)
        logits, tips = tree.extend(tips, leaves(beams.last(beams.tokens), own))
        batch.phases["verify"].append((start, batch.clock.mark()))
