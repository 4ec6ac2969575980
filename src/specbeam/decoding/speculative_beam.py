"""Exact speculative beam search: a draft's beams, checked by the target in one forward.

New here; speculation after Leviathan et al. 2023 (arXiv 2211.17192), beams as in beam.py.
Idea: (1) the draft continues the running beams by its own search, `draft_length` steps deep (or a drafter without a
model looks up what may follow them); (2) one target forward scores the beams' last tokens and all proposed nodes; (3)
the beam steps are replayed with the target's own log-probabilities, by the same function as in plain beam search; as
long as every surviving beam is a node, its scores are at hand and the next step needs no forward. At the first step
that leaves the tree, the beams are simply the new state: every round commits at least one step, and costs no more
forwards than plain search.
Exact: the draft decides what is scored early, never what survives. Hypotheses, order and scores are those of beam.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.beam import Beams, Ranking, check_beams, log_probabilities, ranking, start_beams, step
from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.drafting import Proposal
from specbeam.drafting.beam_settings import BeamSettings
from specbeam.drafting.depth import Depth
from specbeam.drafting.draft_beams import DraftBeams
from specbeam.drafting.lookup_beams import LookupBeams
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import branches, leaves, read_prompts
from specbeam.trace import GenerationOutput, Hypothesis


def speculative_beam_generate(
    target: PreTrainedModel, draft: PreTrainedModel | None, input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None, *, num_beams: int = 4, num_return_sequences: int = 1,
    draft_length: int | str = 4, draft_beams: int | None = None, drafter: str = "draft_model", ngram: int = 3,
    branches: int | None = None, corpus: str | None = None, tree_nodes: int | None = None, **options,
) -> GenerationOutput:
    """Beam search by speculation; other arguments and the result as in `beam_generate`.

    draft: None for drafters without a model. draft_length: beam steps that the draft goes ahead per round, or "auto":
    as many as pay, by measured seconds and survival, down to plain steps. draft_beams: width of the draft's search, at
    least num_beams (default: num_beams + 2). drafter: draft_model, prompt_lookup (`ngram`, `branches`: continuations
    below each beam, default num_beams), suffix (`corpus`) or token_recycling (`tree_nodes` below all beams of a row,
    default 8 × num_beams); these options as in `speculative_generate`.
    """
    check_beams(num_beams, num_return_sequences, options)
    settings = BeamSettings(num_beams, draft_length, draft_beams, drafter, ngram, branches, corpus, tree_nodes,
                            options.get("tokenizer"))
    settings.check(draft)
    if num_beams == 1:
        return greedy_generate(target, input_ids, attention_mask, **options)
    request = settle(target, input_ids, attention_mask, sampled=False, beams=(num_beams, num_return_sequences),
                     **options)
    with evaluating(target, *([] if draft is None else [draft])):
        return _search(target, draft, request, num_return_sequences, settings)


@torch.inference_mode()
def _search(target: PreTrainedModel, draft: PreTrainedModel | None, request: Request, num_return_sequences: int,
            settings: BeamSettings) -> GenerationOutput:
    adapter, rule = adapt(target), ranking(request)
    prompts = [row.prompt for row in request.rows]
    lengths, room = [len(prompt) for prompt in prompts], [row.max_new_tokens for row in request.rows]
    check_lengths(adapter, lengths, room)
    if draft is not None:
        adapt(draft)  # a first probe is not part of anyone's prefill
    batch = Batch(request, target)
    found: list[list[Hypothesis]] = [[] for _ in lengths]

    tree, tips, logits = read_prompts(adapter, prompts,
                                      max(lengths) + max(room) + settings.most_nodes + 2 * rule.num_beams)
    drafter: DraftBeams | LookupBeams
    if settings.drafter == "draft_model" and draft is not None:
        drafter = DraftBeams(draft, request, rule.num_beams, settings.width, settings.deepest, logits.shape[-1])
    else:
        drafter = LookupBeams(settings, target, request, logits.shape[-1])
    drafter.observe([prompt[-1:] for prompt in prompts], logits)
    depths = Depth(target, draft, settings.draft_length, (drafter.name, rule.num_beams, settings.most_nodes),
                   len(lengths))
    # The node that each beam's last token hangs below.
    tips = tips.pick(torch.zeros(len(lengths), rule.num_beams, dtype=torch.long, device=tree.device))
    logits = logits.expand(-1, rule.num_beams, -1)
    beams = [start_beams(rule.num_beams) for _ in lengths]
    beams, over, ranked = step(beams, log_probabilities(logits, beams, request, batch.live), rule, request, batch.live)
    batch.watch(ranked, batch.live)
    rounds: list[list[int]] = [[] for _ in lengths]  # of each row, the round of each step
    for i, row in enumerate(batch.live):
        rounds[row].append(0)
        _finish(batch, beams[i], row, over[i], found, rounds, num_return_sequences)
    batch.prefill_done(batch.live)
    for state in batch.rows:
        state.first_tokens = 1

    while True:
        stay = batch.retire()
        if not batch.live:
            return batch.output(drafts=True, hypotheses=found)
        if stay:
            tips, beams = tips.rows(tree.keep_rows(stay)), [beams[i] for i in stay]
            drafter.keep_rows(stay)
            depths.rows(len(stay))

        start = batch.clock.mark()
        # Behind the last token of an answer nothing is ever read.
        room = [request.rows[row].max_new_tokens - len(state.tokens[0]) - 1
                for row, state in zip(batch.live, beams, strict=True)]
        depth = min(depths.choose(), max(room))
        limits = [min(depth, most) for most in room]
        proposal = drafter.propose(beams, limits) if depth > 0 else None
        drafted = batch.clock.mark()
        trees = _trees(beams, proposal)
        if proposal is None:  # a plain beam step, at a plain beam step's price
            last = torch.tensor([tokens for tokens, _ in trees], device=tree.device)
            block = leaves(last, torch.arange(rule.num_beams, device=tree.device).expand_as(last))
        else:
            block = branches(trees, tree.device)
        logits, nodes = tree.extend(tips, block)
        verified = batch.clock.mark()
        batch.phases["draft"].append((start, drafted))
        batch.phases["verify"].append((drafted, verified))

        beams, behind, steps, over = _replay(beams, logits, trees, rule, batch)
        tips = nodes.pick(torch.tensor(behind, device=tree.device))
        if proposal is None:
            drafter.follow(behind)
        else:
            drafter.accept(behind, steps, [parents for _, parents in trees])
            # While speculation is off, nothing is learnt for it either.
            drafter.observe([tokens for tokens, _ in trees], logits)
        for i, (row, count) in enumerate(zip(batch.live, steps, strict=True)):
            rounds[row] += [len(batch.rows[row].rounds) + 1] * count
            deep = 0 if proposal is None else _depth(proposal.parents[i])
            batch.round_done(row, start, range(deep), min(count - 1, deep), count,
                             drafter=drafter.name if deep else "plain", why=depths.why)
            _finish(batch, beams[i], row, over[i], found, rounds, num_return_sequences)
        if depths.auto:
            end = batch.clock.mark()
            spans = [(start, drafted), (drafted, verified), (start, end)]
            depths.learn(depth, [n for n, done in zip(steps, over, strict=True) if not done],
                         [batch.clock.seconds(*span) for span in spans])


def _depth(parents: Sequence[int]) -> int:
    """Levels of a proposal."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


def _finish(batch: Batch, beams: Beams, row: int, over: bool, found: list[list[Hypothesis]],
            rounds: list[list[int]], count: int) -> None:
    if over:
        found[row] = beams.hypotheses(count)
        batch.finish(row, found[row][0], rounds[row][: len(found[row][0].tokens)])


def _trees(beams: Sequence[Beams], proposal: Proposal | None) -> list[tuple[list[int], list[int]]]:
    """What the target reads of each row: the running beams' last tokens, each below its tip, and then the proposed
    nodes; as tokens and parents for `branches`."""
    trees = []
    for i, row in enumerate(beams):
        last, width = [ids[-1] for ids in row.tokens], len(row.tokens)
        tokens, parents = ([], []) if proposal is None else (proposal.tokens[i], proposal.parents[i])
        below = [parent + width if parent >= 0 else -1 - parent for parent in parents]
        trees.append(([*last, *tokens], [*range(-1, -1 - width, -1), *below]))
    return trees


def _replay(beams: Sequence[Beams], logits: Tensor, trees: Sequence[tuple[list[int], list[int]]], rule: Ranking,
            batch: Batch) -> tuple[list[Beams], list[list[int]], list[int], list[bool]]:
    """Beam steps for as long as all survivors' logits are at hand. Returns the new states and, of each row, the node
    that each beam's last token hangs below, the steps taken, and whether the search is over.

    logits: [rows, nodes, vocabulary], behind every node of `trees`.
    """
    now, active = list(beams), list(range(len(beams)))
    place = [list(range(rule.num_beams)) for _ in beams]  # each beam's own node
    children = [{(parent, token): node for node, (token, parent) in enumerate(zip(*tree, strict=True))}
                for tree in trees]
    behind, steps, over = [row[:] for row in place], [0] * len(beams), [False] * len(beams)
    while active:
        here = logits  # nothing was proposed: one step, behind the beams as they stand
        if logits.shape[1] > rule.num_beams:
            at = torch.tensor([place[i] for i in active], device=logits.device)
            here = logits[torch.tensor(active, device=logits.device)[:, None], at]
        live, states = [batch.live[i] for i in active], [now[i] for i in active]
        after, ended, ranked = step(states, log_probabilities(here, states, batch.request, live), rule,
                                    batch.request, live)
        batch.watch(ranked, live)
        still = []
        for i, state, done in zip(active, after, ended, strict=True):
            tokens, origins = state.front()
            behind[i] = [place[i][origin] for origin in origins]
            now[i], steps[i], over[i] = state, steps[i] + 1, done
            below = [children[i].get(key, -1) for key in zip(behind[i], tokens, strict=True)]
            if not done and min(below) >= 0:
                place[i] = below
                still.append(i)
        active = still
    return now, behind, steps, over
