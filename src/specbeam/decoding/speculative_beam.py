"""Exact speculative beam search: a draft's beams, checked by the target in one forward.

New here; speculation after Leviathan et al. 2023 (arXiv 2211.17192), beams as in beam.py.
Idea: (1) the draft continues the running beams by its own search, `draft_length` steps deep (or a drafter without a
model looks up what may follow them); (2) one target forward scores the beams' last tokens and all proposed nodes; (3)
the beam steps are replayed with the target's own log-probabilities, by the same function as in plain beam search; as
long as every surviving beam that matters is a node, its scores are at hand and the next step needs no forward. (A beam
matters if it scores more than the last survivor of the next step as far as that is known: a continuation never scores
more than what it continues.) (4) Where a beam is missing, the others keep their nodes: the next round reads what is
missing and goes on below all of them, and the draft searches by the target's scores wherever there are some.
Every round commits at least one step, and no node is scored twice.
Exact: the draft decides what is scored early, never what survives. Hypotheses, order and scores are those of beam.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.beam import Beams, Ranked, Ranking, check_beams, log_probabilities, ranking, start_beams, step
from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.drafting.answered import Answered
from specbeam.drafting.beam_settings import BeamSettings
from specbeam.drafting.depth import Depth
from specbeam.drafting.draft_beams import DraftBeams
from specbeam.drafting.lookup_beams import LookupBeams
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import branches, leaves, read_prompts
from specbeam.sampling import lowers
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
    logits = logits.expand(-1, rule.num_beams, -1)
    beams = [start_beams(rule.num_beams) for _ in lengths]
    beams, over, ranked = step(beams, log_probabilities(logits, beams, request, batch.live), rule, request, batch.live)
    batch.watch(ranked, batch.live)
    known = [Answered([-1] * rule.num_beams, [0] * rule.num_beams) for _ in beams]
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
            tips, beams, known = tips.rows(tree.keep_rows(stay)), [beams[i] for i in stay], [known[i] for i in stay]
            drafter.keep_rows(stay)
            depths.rows(len(stay))

        start = batch.clock.mark()
        # Behind the last token of an answer nothing is ever read.
        room = [request.rows[row].max_new_tokens - state.length - 1
                for row, state in zip(batch.live, beams, strict=True)]
        depth = min(depths.choose(), max(room))
        limits = [min(depth, most) for most in room]
        proposal = drafter.propose(beams, limits, known) if depth > 0 else None
        if proposal is not None and not any(proposal.tokens):
            proposal = None
        drafted = batch.clock.mark()
        plain = proposal is None and not any(row.logits for row in known)
        first = tips.depth.shape[1]
        if plain:  # a beam step of beam.py, at its price
            last = [[state.front()[0], row.below] for row, state in zip(known, beams, strict=True)]
            logits, tips = tree.extend(tips, leaves(*torch.tensor(last, device=tree.device).unbind(1)))
        else:
            trees = [row.add(state.front()[0], proposal, i, first)
                     for i, (row, state) in enumerate(zip(known, beams, strict=True))]
            logits, nodes = tree.extend(tips, branches(trees, tree.device))
        verified = batch.clock.mark()
        batch.phases["draft"].append((start, drafted))
        batch.phases["verify"].append((drafted, verified))
        if plain:
            beams, over, ranked = step(beams, log_probabilities(logits, beams, request, batch.live), rule, request,
                                       batch.live)
            batch.watch(ranked, batch.live)
            for i, row in enumerate(batch.live):
                known[i].below = beams[i].front()[1]
                rounds[row].append(len(batch.rows[row].rounds) + 1)
                batch.round_done(row, start, [], 0, 1, why=depths.why)
                _finish(batch, beams[i], row, over[i], found, rounds, num_return_sequences)
            if depths.auto:
                depths.learn(0, [], batch.clock.seconds(start, batch.clock.mark()))
            continue
        for answered, new, (tokens, _) in zip(known, logits, trees, strict=True):
            answered.logits |= {first + n: new[n] for n in range(len(tokens))}
        if proposal is not None:  # while speculation is off, nothing is learnt for it either
            drafter.observe([tokens for tokens, _ in trees], logits)

        beams, steps, over = _replay(beams, known, rule, batch)
        kept = [row.prune() for row in known]
        most = max(map(len, kept))
        tips = tips.join(nodes).pick(torch.tensor([row + [0] * (most - len(row)) for row in kept], device=tree.device))
        for i, (row, count) in enumerate(zip(batch.live, steps, strict=True)):
            rounds[row] += [len(batch.rows[row].rounds) + 1] * count
            deep = max(0 if proposal is None else _depth(proposal.parents[i]), count - 1)
            batch.round_done(row, start, range(deep), count - 1, count,
                             drafter=drafter.name if deep else "plain", why=depths.why)
            _finish(batch, beams[i], row, over[i], found, rounds, num_return_sequences)
        if depths.auto and depth:
            depths.learn(depth, [n for n, done in zip(steps, over, strict=True) if not done],
                         batch.clock.seconds(start, batch.clock.mark()))


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


def _replay(beams: Sequence[Beams], known: Sequence[Answered], rule: Ranking, batch: Batch
            ) -> tuple[list[Beams], list[int], list[bool]]:
    """Beam steps for as long as the logits that matter are at hand. Returns the new states and, of each row, the steps
    taken, and whether the search is over."""
    now, active = list(beams), list(range(len(beams)))
    steps, over = [0] * len(beams), [False] * len(beams)
    while active:
        live, states = [batch.live[i] for i in active], [now[i] for i in active]
        log_probs = log_probabilities(torch.stack([known[i].behind() for i in active]), states, batch.request, live)
        bounds = [max((score for score, node in zip(now[i].scores, known[i].at, strict=True) if node < 0),
                      default=None) for i in active]
        after, ended, ranked = step(states, log_probs, rule, batch.request, live)
        taken = [n for n, bound in enumerate(bounds) if _certain(ranked, n, bound, rule, batch.request.trace)]
        if batch.request.trace:
            batch.watch(Ranked._make([column[n] for n in taken] for column in ranked), [live[n] for n in taken])
        still = []
        for n in taken:
            i = active[n]
            now[i], steps[i], over[i] = after[n], steps[i] + 1, ended[n]
            known[i].follow(*after[n].front())
            if not ended[n] and (min(known[i].at) >= 0 or (max(known[i].at) >= 0 and lowers(
                    batch.request.rows[live[n]].processors))):
                still.append(i)
        active = still
    return now, steps, over


def _certain(ranked: Ranked, row: int, bound: float | None, rule: Ranking, everything: bool) -> bool:
    """Whether beams whose logits are missing change nothing. A continuation scores at most what its beam does (bound:
    the best of theirs; None: nothing is missing), so all that matters must score more; and it must not tie, since ties
    end by what else was ranked. everything: for a search tree the spare candidates matter too."""
    if bound is None:
        return True
    reasons, chosen = ranked.reasons[row], ranked.chosen[row]
    # EOS leaves enough that run on, stops may not: then ended ones fill up, in whose place unknown ones may run on.
    if "stop" in reasons and any(reasons[place] for place in chosen):
        return False
    last = max(chosen)
    scores = ranked.scores[row][: last + 2]  # with the first that does not matter
    return not everything and last < rule.keep - 1 and scores[last] > bound and len(set(scores)) == len(scores)
