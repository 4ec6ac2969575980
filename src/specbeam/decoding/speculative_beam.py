"""Exact speculative beam search: a draft's beams, checked by the target in one forward.

New here; speculation after Leviathan et al. 2023 (arXiv 2211.17192), beams as in beam.py.
Idea: (1) the draft continues the running beams by its own search, `draft_length` steps deep; (2) one target forward
scores the beams' last tokens and all of the draft's nodes; (3) the beam steps are replayed with the target's own
log-probabilities, by the same function as in plain beam search; as long as every surviving beam is a node, its scores
are at hand and the next step needs no forward. At the first step that leaves the tree, the beams are simply the new
state: every round commits at least one step, and costs no more forwards than plain search.
Exact: the draft decides what is scored early, never what survives. Hypotheses, order and scores are those of beam.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.beam import (
    Beams,
    Ranking,
    check_beams,
    hypotheses,
    log_probabilities,
    ranking,
    start_beams,
    step,
)
from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.drafting.depth import LONGEST, Depth
from specbeam.drafting.draft_beams import DraftBeams, Levels
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import Block, TokenTree, chain
from specbeam.errors import InputError
from specbeam.trace import GenerationOutput, Hypothesis


def speculative_beam_generate(
    target: PreTrainedModel, draft: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None, *, num_beams: int = 4, num_return_sequences: int = 1,
    draft_length: int | str = 4, draft_beams: int | None = None, **options,
) -> GenerationOutput:
    """Beam search by speculation; other arguments and the result as in `beam_generate`.

    draft_length: beam steps that the draft goes ahead per round, or "auto": as many as pay, by measured seconds and
    survival, down to plain steps. draft_beams: width of the draft's search, at least num_beams
    (default: num_beams + 2).
    """
    check_beams(num_beams, num_return_sequences, options)
    wide = num_beams + 2 if draft_beams is None else draft_beams
    if isinstance(wide, bool) or not isinstance(wide, int) or wide < num_beams:
        raise InputError(f"draft_beams is {draft_beams!r} and num_beams {num_beams}: the draft's search must be at "
                         "least as wide as the target's.")
    number = isinstance(draft_length, int) and not isinstance(draft_length, bool) and draft_length >= 1
    if draft_length != "auto" and not number:
        raise InputError(f"draft_length is {draft_length!r}: it is the number of beam steps drafted per round, at "
                         "least 1 (beam_generate runs without a draft), or \"auto\".")
    if num_beams == 1:
        return greedy_generate(target, input_ids, attention_mask, **options)
    request = settle(target, input_ids, attention_mask, sampled=False, beams=(num_beams, num_return_sequences),
                     **options)
    with evaluating(target, draft):
        return _search(target, draft, request, num_return_sequences, draft_length, wide)


@dataclass(frozen=True)
class Checked:
    """A target forward over running beams and proposed nodes, numbered beams first, then level by level.

    logits: [rows, nodes, vocabulary]. tokens, parents: [rows, nodes] long (of a running beam: -1). real: [rows, nodes]
    bool.
    """

    logits: Tensor
    tokens: Tensor
    parents: Tensor
    real: Tensor


@torch.inference_mode()
def _search(target: PreTrainedModel, draft: PreTrainedModel, request: Request, num_return_sequences: int,
            draft_length: int | str, draft_beams: int) -> GenerationOutput:
    adapter, rule = adapt(target), ranking(request)
    prompts = [row.prompt for row in request.rows]
    lengths, room = [len(prompt) for prompt in prompts], [row.max_new_tokens for row in request.rows]
    check_lengths(adapter, lengths, room)
    adapt(draft)  # a first probe is not part of anyone's prefill
    batch = Batch(request, target)
    deepest = LONGEST if isinstance(draft_length, str) else draft_length
    tree = TokenTree(adapter, len(lengths), max(lengths) + max(room) + (draft_beams + 1) * (deepest + 1))
    beams = start_beams(len(lengths), rule.num_beams, max(room), tree.device)
    found: list[list[Hypothesis]] = [[] for _ in lengths]

    unread = chain(prompts, tree.device)
    logits, nodes = tree.extend(tree.tips([0] * len(lengths)), unread, last_only=True)
    drafter = DraftBeams(draft, request, rule.num_beams, draft_beams, deepest, logits.shape[-1])
    depths = Depth(target, draft, draft_length, rule.num_beams, draft_beams, len(lengths))
    everyone = torch.zeros(len(lengths), rule.num_beams, dtype=torch.long, device=tree.device)
    tips = nodes.pick(everyone + unread.lengths[:, None] - 1)  # the node that each beam's last token hangs below
    logits = logits.expand(-1, rule.num_beams, -1)
    beams, over, ranked = step(beams, log_probabilities(logits, beams, request, batch.live), rule, request, batch.live)
    batch.watch(ranked)
    rounds: list[list[int]] = [[] for _ in lengths]  # of each row, the round of each step
    for i, row in enumerate(batch.live):
        rounds[row].append(0)
        _finish(batch, beams, i, row, bool(over[i]), found, rounds, num_return_sequences)
    batch.prefill_done()
    for state in batch.rows:
        state.first_tokens = 1

    while True:
        stay = batch.retire()
        if not batch.live:
            return batch.output(drafts=True, hypotheses=found)
        if stay:
            kept = tree.keep_rows(stay)
            beams, tips = beams.rows(kept), tips.rows(kept)
            drafter.keep_rows(stay)
            depths.rows(len(stay))

        start = batch.clock.mark()
        remaining = [request.rows[row].max_new_tokens - n for row, n in
                     zip(batch.live, beams.length.tolist(), strict=True)]
        depth = min(depths.choose(), max(remaining) - 1)
        levels = drafter.propose(beams.tokens, beams.length, beams.scores, depth) if depth > 0 else None
        drafted = batch.clock.mark()
        block, parents = _block(beams, levels, remaining)
        logits, nodes = tree.extend(tips, block)
        verified = batch.clock.mark()
        batch.phases["draft"].append((start, drafted))
        batch.phases["verify"].append((drafted, verified))

        real = torch.arange(block.tokens.shape[1], device=tree.device) < block.lengths[:, None]
        checked = Checked(logits, block.tokens, parents, real)
        beams, behind, steps, over = _replay(beams, checked, rule, batch)
        tips = nodes.pick(behind)
        if levels is None:
            drafter.follow(behind)
        else:
            drafter.accept(behind, steps, parents.gather(1, behind).clamp(min=0))
        for i, (row, count) in enumerate(zip(batch.live, steps.tolist(), strict=True)):
            rounds[row] += [len(batch.rows[row].rounds) + 1] * count
            proposed = min(depth, remaining[i] - 1)
            batch.round_done(row, start, range(proposed), min(count - 1, proposed), count,
                             drafter="draft_beams" if proposed else "plain", why=depths.why)
            _finish(batch, beams, i, row, bool(over[i]), found, rounds, num_return_sequences)
        if depths.auto:
            end = batch.clock.mark()
            spans = [(start, drafted), (drafted, verified), (start, end)]
            depths.learn(depth, [n for n, done in zip(steps.tolist(), over.tolist(), strict=True) if not done],
                         [batch.clock.seconds(*span) for span in spans])


def _finish(batch: Batch, beams: Beams, i: int, row: int, over: bool, found: list[list[Hypothesis]],
            rounds: list[list[int]], count: int) -> None:
    if over:
        found[row] = hypotheses(beams, i, count)
        batch.finish(row, found[row][0], rounds[row][: len(found[row][0].tokens)])


def _block(beams: Beams, levels: Levels | None, remaining: Sequence[int]) -> tuple[Block, Tensor]:
    """The running beams' last tokens and, below them, the proposed nodes; and each node's parent ([rows, nodes])."""
    last = beams.last(beams.tokens)
    rows, width = last.shape
    own = torch.arange(width, device=last.device).expand(rows, -1)
    tokens, tip, depth, parents = last, own, torch.zeros_like(last), torch.full_like(last, -1)
    sees = torch.eye(width, dtype=torch.bool, device=last.device).expand(rows, -1, -1)
    lengths = torch.full((rows,), width, device=last.device)
    first = 0  # number of the first node of the level above
    for level in range(0 if levels is None else levels.tokens.shape[1]):
        assert levels is not None
        parent = levels.parents[:, level] + first
        first, count = tokens.shape[1], parent.shape[1]
        tokens = torch.cat([tokens, levels.tokens[:, level]], 1)
        tip = torch.cat([tip, tip.gather(1, parent)], 1)
        depth = torch.cat([depth, torch.full_like(parent, level + 1)], 1)
        parents = torch.cat([parents, parent], 1)
        above = sees.gather(1, parent[..., None].expand(-1, -1, sees.shape[2]))  # [rows, count, nodes so far]
        alone = torch.eye(count, dtype=torch.bool, device=last.device).expand(rows, -1, -1)
        sees = torch.cat([torch.nn.functional.pad(sees, (0, count)), torch.cat([above, alone], 2)], 1)
        # Behind the last token of an answer nothing is ever read: those nodes are pads.
        lengths = lengths + count * torch.tensor([n - 1 > level for n in remaining], device=last.device)
    return Block(tokens, tip, depth, sees, lengths), parents


def _replay(beams: Beams, checked: Checked, rule: Ranking, batch: Batch) -> tuple[Beams, Tensor, Tensor, Tensor]:
    """Beam steps for as long as all survivors' logits are at hand. Returns the new state; [rows, beams] the node that
    each beam's last token hangs below; [rows] steps; [rows] bool, whether the search is over."""
    rows, width = beams.scores.shape
    request, live = batch.request, batch.live
    place = torch.arange(width, device=beams.scores.device).expand(rows, -1)  # each beam's own node
    behind, steps = place, torch.zeros_like(beams.length)
    active = torch.ones_like(beams.open)
    over = ~active
    while bool(active.any()):
        logits = checked.logits.gather(1, place[..., None].expand(-1, -1, checked.logits.shape[-1]))
        after, ended, ranked = step(beams, log_probabilities(logits, beams, request, live), rule, request, live)
        batch.watch(ranked, active)
        node = place.gather(1, after.last(after.origins))
        beams = after.where(active, beams)
        behind = torch.where(active[:, None], node, behind)
        steps, over = steps + active.long(), over | (active & ended)
        child = ((checked.parents[:, None] == node[..., None]) & checked.real[:, None]
                 & (checked.tokens[:, None] == after.last(after.tokens)[..., None]))
        active = active & ~ended & child.any(2).all(1)
        place = child.long().argmax(2)
    return beams, behind, steps, over
