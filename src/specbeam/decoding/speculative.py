"""Speculative decoding: a drafter proposes a tree (mostly a chain), the target checks it in one forward.

Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318); trees: SpecInfer (arXiv 2305.09781).
Idea: (1) the drafter proposes tokens below the committed text; (2) one target forward scores them all; (3) the
longest path that the target agrees with is kept, and one token of its own follows: a correction, or a bonus if
nothing was left to check.
Greedy (temperature 0): the tokens of plain greedy decoding. Sampled: its distribution (acceptance.py).
Every row of a batch accepts by itself; nobody waits for the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam import acceptance as rules
from specbeam.decoding.greedy import step_ahead
from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.drafting import Drafter, Proposal, Settings, make_drafter
from specbeam.drafting.length import Length
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import Block, branches, chain, read_prompts
from specbeam.errors import InputError
from specbeam.runners.chains import chains_of, shape_of
from specbeam.sampling import process, refuse_nothing, uniforms
from specbeam.trace import GenerationOutput


def speculative_generate(target: PreTrainedModel, draft: PreTrainedModel | None, input_ids: Tensor | Sequence[Tensor],
                         attention_mask: Tensor | None = None, *, draft_length: int | str = 4,
                         confidence_threshold: float = 0.0, costs: str | None = None, temperature: float = 0.0,
                         drafter: str = "draft_model", acceptance: str = "rejection",
                         branching: Sequence[int] | None = None, tree_nodes: int | None = None,
                         tree_width: int = 4, ngram: int = 3, branches: int = 1, corpus: str | None = None,
                         exit_layer: int | None = None, min_match: int = 4, vocabulary: str = "same",
                         draft_tokenizer: Any = None, seed: int | Sequence[int] = 0, **options) -> GenerationOutput:
    """Speculative decoding; other arguments as in `greedy_generate` and `sample_generate`.

    draft: a model of the target's vocabulary (or see `vocabulary`); None for drafters without one. draft_length: how
    deep a proposal goes (γ ≥ 1), or "auto": as deep as it pays (drafting/length.py). costs: a file by
    `drafting.length.write_costs` that freezes what auto learned: a seed then gives the same tokens in any batch.
    confidence_threshold: stop a proposal where the draft's largest probability is below it. temperature: 0 is greedy,
    above 0 samples (`top_k`, `top_p`, … are then honoured, for draft and target alike). drafter: a name in
    specbeam.drafting.DRAFTERS. branching: children per node at each depth, as [3, 2, 1, 1], in place of a chain.
    tree_nodes: grow a tree of so many nodes, `tree_width` of them continued at each depth. acceptance: when sampling,
    "rejection", (chains only) "block", or, LOSSY, "typical".

    prompt_lookup: ngram, the longest n-gram looked up, and branches, how many different continuations become a tree.
    suffix, combined: corpus, a .jsonl file of earlier answers, {"tokens"} or (with `tokenizer`) {"text"} a line; suffix
    with tree_nodes: a match there becomes a tree of its most frequent continuations.
    combined: min_match, the shortest match that is proposed in place of the draft's tokens. early_exit: exit_layer,
    how many layers draft (default: a third). token_recycling: tree_nodes, its tree's budget (default 16).

    vocabulary: "same", or with `tokenizer` (the target's) and `draft_tokenizer`, which may then differ, "tli", "slem"
    or "auto" (drafting/cross_vocabulary.py).
    """
    shape: Any = branching if isinstance(branching, int) else tuple(branching or ())
    settings = Settings(drafter, draft_length, shape, tree_nodes or 0, tree_width, confidence_threshold, costs, ngram,
                        branches, corpus, exit_layer, min_match, options.get("tokenizer"), vocabulary, draft_tokenizer,
                        acceptance, temperature)
    settings.check(draft)
    if temperature > 0:
        options["temperature"] = temperature
    request = settle(target, input_ids, attention_mask, sampled=temperature > 0, seed=seed, **options)
    with evaluating(target, *([] if draft is None else [draft])):
        return _decode(target, draft, request, settings)


@torch.inference_mode()
def _decode(target: PreTrainedModel, draft: PreTrainedModel | None, request: Request, settings: Settings
            ) -> GenerationOutput:
    adapter = adapt(target)
    if adapter.context is not None and settings.most_nodes >= adapter.context:
        raise InputError(f"a proposal may have {settings.most_nodes} nodes, but the target {adapter.name} has a "
                         f"context of {adapter.context} positions: give smaller branching, tree_nodes or draft_length.")
    lengths = [len(row.prompt) for row in request.rows]
    room = [row.max_new_tokens for row in request.rows]
    check_lengths(adapter, lengths, room)
    batch, capacity = Batch(request, target), max(lengths) + max(room) + settings.most_nodes
    length = Length(settings, target, draft, len(batch.live), 0 if batch.waiting else min(room), max(lengths))
    drafter: Drafter | None = None  # as long as it does not pay: then nothing is read for it

    def drafter_of(rows: Sequence[int]) -> Drafter:
        """One that has read these rows so far, in the middle of an answer all but its last token."""
        states = [batch.rows[row] for row in rows]
        part = [replace(request.rows[row], prompt=state.prompt + state.tokens[:-1],
                        max_new_tokens=state.remaining + bool(state.tokens))
                for row, state in zip(rows, states, strict=True)]
        return make_drafter(settings, target, draft, replace(request, rows=part), vocabulary)

    shape = None
    if settings.recordable(draft):
        shape = shape_of(adapter, [row.processors for row in request.rows], bool(request.config.do_sample))
    new, start = list(batch.live), None  # rows whose prompts are unread
    ended: Any = None  # of the round before, if this one follows it
    ahead: Any = None  # behind its proposal, if that is on its way
    while True:
        length.fresh = bool(new)
        if new:
            fresh, its, logits = read_prompts(adapter, [request.rows[row].prompt for row in new], capacity)
            vocabulary, theirs = logits.shape[-1], None
            if drafter is not None or (len(new) == len(batch.live) and not length.idle):
                theirs = drafter_of(new)
                theirs.observe([request.rows[row].prompt[-1:] for row in new], logits)
            _, first = _choose(request, batch, new, logits, None, settings.acceptance)
            for row, token in zip(new, first, strict=True):
                batch.commit(row, [token], ["plain"])
            batch.prefill_done(new, start)
            if len(new) == len(batch.live):
                tree, tips, drafter = fresh, its, theirs
                chains = chains_of(tree, shape)
            else:
                if chains is not None:
                    tips = tree.tips([len(batch.rows[row].sequence) - 1 for row in batch.live[: -len(new)]])
                    chains.forget()
                tips = tree.join(tips, fresh, its)
                if drafter is not None:
                    drafter.join(theirs)
        start = ended if ended is not None and length.fixed and ahead is None else batch.clock.mark()
        stay, since, ended = batch.retire(), ended or start, None
        new = batch.admit()
        if not batch.live:
            output = batch.output(drafts=True)
            length.ends()
            return output
        if stay:
            kept = tree.keep_rows(stay)
            if chains is None:
                tips = tips.rows(kept)
            else:
                chains.forget()
            if drafter is not None:
                drafter.keep_rows(stay)
        if new:
            continue
        states = [batch.rows[row] for row in batch.live]
        shaped = tree.cache if tree.adapter.runner.reads else None  # its forwards may be wider than they must
        length.wide = 0 if shaped is None else shaped.kept
        # The last token of an answer is never worth a proposal behind it.
        left = [state.remaining for state in states]
        limits = length.limits([min(settings.depth, n - 1) for n in left], [] if batch.waiting else left)
        if chains is not None and length.rest:
            steps = step_ahead(batch, chains, length.rest, length.why[0])
            length.rested([batch.clock.seconds(*span) for span in batch.phases["verify"][-steps:]],
                          batch.clock.seconds(start, batch.clock.mark()))
            continue
        if max(limits):
            drafter = drafter or drafter_of(batch.live)
            if chains is None and hasattr(drafter, "stand"):
                drafter.stand(tree, tips)
        if chains is None:
            proposal = None
            if drafter is not None and max(limits):
                proposal = drafter.propose([state.sequence for state in states], limits, length)
                proposal = length.trim(proposal)
            drafted = batch.clock.mark()
            if shaped is not None and length.rest:
                shaped.forget_width()
            last = [state.tokens[-1] for state in states]
            asked = proposal if proposal is not None and any(proposal.tokens) else None
            block = _block(last, asked, tree.device)
            logits, nodes = tree.extend(tips, block)
            verified, width = batch.clock.mark(), block.tokens.shape[1]
            paths, following = _choose(request, batch, batch.live, logits, asked, settings.acceptance)
            tips = nodes if asked is None else nodes.pick(
                torch.tensor([[path[-1] + 1 if path else 0] for path in paths], device=tree.device))
        else:
            drafted, verified, ahead, width, proposal, paths, following = _recorded(
                batch, chains, drafter, limits, length, settings.acceptance)
        batch.phases["draft"].append((start, drafted))
        batch.phases["verify"].append((drafted, verified))
        became, done = [], []
        for i, (row, path) in enumerate(zip(batch.live, paths, strict=True)):
            ids: list[int] = [] if proposal is None else proposal.tokens[i]
            parents: list[int] = [] if proposal is None else proposal.parents[i]
            name = "plain" if proposal is None else proposal.source[i]
            # Below the path's end nothing was proposed: what follows was no correction.
            last_source = "plain" if not ids else "correction" if (path[-1] if path else -1) in parents else "bonus"
            count = batch.commit(row, [*(ids[node] for node in path), following[i]],
                                 ["draft" if name == "draft_model" else name] * len(path) + [last_source])
            became.append(count)
            done.append((row, since if length.fixed else start, ids, min(len(path), count), count, parents, name,
                         length.why[i]))
        end = batch.clock.mark()
        if length.fixed:  # where its proposal is on its way, the next round has begun
            ended = end if ahead is None else verified
        if ahead is not None:
            batch.phases["draft"].append((verified, ahead))
        for facts in done:
            batch.round_done(*facts, end=ended or end)
        batch.phases["accept"].append((ahead or verified, end))
        if length.auto:
            # What a drafter does behind a round (it learns, say) is time that plain rounds do not take.
            spans, ended = [(since, drafted), (drafted, verified), (since, end)], end
            length.round_done(proposal, paths, became, [batch.clock.seconds(*span) for span in spans],
                              *((width, False) if shaped is None else (shaped.wide, shaped.changed)))
        if drafter is None:
            continue
        if proposal is not None:
            drafter.accept(paths)
        if chains is None:
            tokens = [[] for _ in last] if proposal is None else proposal.tokens
            drafter.observe([[token, *ids] for token, ids in zip(last, tokens, strict=True)], logits)


def _recorded(batch: Batch, chains: Any, drafter: Any, limits: list[int], length: Length, acceptance: str) -> tuple[
        Any, Any, Any, int, Proposal | None, list[list[int]], list[int]]:
    """A round of recorded functions: the host waits once, for what was accepted, while the next proposal is on its way.
    Returns the marks behind drafting, verifying and that proposal (None: there is none), the tokens of a row that the
    target read, the proposal, and what `_choose` gives."""
    rows, device = [batch.request.rows[row] for row in batch.live], chains.tree.device
    texts = [batch.rows[row].sequence for row in batch.live]
    counts, q, begun, proposal = limits, None, None, None
    if max(limits):
        if length.fixed and hasattr(drafter, "begin"):
            begun = drafter.begin(texts, limits)
        if begun is None:
            proposal = length.trim(drafter.propose(texts, limits, length))
            counts, q = [len(ids) for ids in proposal.tokens], proposal.q
    ids: Any
    if begun is None:
        given = [[]] * len(texts) if proposal is None else proposal.tokens
        longest = max(map(len, given))
        if length.fixed and q is None and longest == max(limits) and not chains.tree.adapter.runner.reads:
            longest = length.settings.depth  # the end of an answer cut it: no new shape to record for that
        ids = [[*row, *[0] * (longest - len(row))] for row in given]
    else:
        ids, q = begun[0].to(device), begun[1] if len(begun) > 1 else None
        longest = ids.shape[1]
    drafted, uniform, rule = batch.clock.mark(), None, None
    if chains.shape.samples:
        rule = rules.block_verification if acceptance == "block" else rules.rejection_sample
        uniform = uniforms([row.generator for row in rows], [n + 1 for n in counts], torch.device("cpu"))
        uniform = torch.nn.functional.pad(uniform, (0, longest + 1 - uniform.shape[1]))
    read = chains.verify(ids, counts, texts, rule, uniform, None if q is None else q.to(device))
    verified, ahead = batch.clock.mark(), None
    if begun is not None and min(batch.rows[row].remaining for row in batch.live) > 2 * longest + 1:
        drafter.follow(chains.unread, max(map(len, texts)) + longest + 1)
        ahead = batch.clock.mark()
    answers = read()
    if chains.shape.samples:
        refuse_nothing(any(token < 0 for row, n in zip(answers, counts, strict=True) for token in row[1 : 2 + n]))
    if begun is not None:
        proposal = Proposal([row[2 : 2 + n] for row, n in zip(answers, counts, strict=True)],
                            [list(range(-1, n - 1)) for n in counts], None, [drafter.name] * len(texts),
                            list(length.why), forwards=longest)
    return (drafted, verified, ahead, longest + 1, proposal, [list(range(row[0])) for row in answers],
            [row[1] for row in answers])


def _block(last: Sequence[int], proposal: Proposal | None, device: torch.device) -> Block:
    """What the target reads: each row's last token, and the proposals below it."""
    if proposal is None:
        return chain([[token] for token in last], device)
    ids = [[token, *tokens] for token, tokens in zip(last, proposal.tokens, strict=True)]
    if proposal.chained:
        return chain(ids, device)
    return branches([(row, [-1, *(parent + 1 for parent in parents)])
                     for row, parents in zip(ids, proposal.parents, strict=True)], device)


def _choose(request: Request, batch: Batch, live: Sequence[int], logits: Tensor, proposal: Proposal | None,
            acceptance: str) -> tuple[list[list[int]], list[int]]:
    """The proposals that each of these rows keeps, and the target's token that follows them.

    logits: [live, 1 + longest, vocabulary], after the committed text and after each proposal.
    """
    rows = [request.rows[row] for row in live]
    none: list[list[int]] = [[] for _ in rows]
    tokens, parents = (none, none) if proposal is None else (proposal.tokens, proposal.parents)

    def path(row: int, node: int) -> list[int]:
        steps, at = [], node - 1
        while 0 <= at < len(tokens[row]):
            steps.append(tokens[row][at])
            at = parents[row][at]
        return [*batch.rows[live[row]].sequence, *reversed(steps)]

    p = process(logits, [row.processors for row in rows], path)
    if not request.config.do_sample:
        kept = [rules.follow(*row) for row in zip(tokens, parents, p.argmax(-1).tolist(), strict=True)]
        return [path for path, _ in kept], [token for _, token in kept]
    counts = [len(ids) for ids in tokens]
    uniform = uniforms([row.generator for row in rows], [n + 1 for n in counts], logits.device)
    p, q = p.softmax(-1), None if proposal is None else proposal.q
    q = None if q is None else q.to(p.device)
    if acceptance == "typical":
        kept = [rules.typical(tokens[i], parents[i], p[i], uniform[i, : n + 1]) for i, n in enumerate(counts)]
        return [path for path, _ in kept], [token for _, token in kept]
    if proposal is not None and not proposal.chained:
        kept = [rules.sample_tree(tokens[i], parents[i], p[i], None if q is None else q[i], uniform[i, : n + 1])
                for i, n in enumerate(counts)]
        return [path for path, _ in kept], [token for _, token in kept]
    longest = max(counts)
    proposed = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens], dtype=torch.long,
                            device=p.device)
    rule = rules.block_verification if acceptance == "block" else rules.rejection_sample
    accepted, following = rule(proposed, p, q, torch.tensor(counts, device=p.device), uniform)
    return [list(range(n)) for n in accepted.tolist()], following.tolist()
