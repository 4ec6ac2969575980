"""Speculative decoding: a draft proposes a chain, the target checks it in one forward.

Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
Idea: (1) the draft proposes γ tokens; (2) one target forward scores all γ + 1 prefixes; (3) the longest prefix that
the target agrees with is kept, and one token of its own follows: a correction, or a bonus if all were accepted.
Greedy (temperature 0): the tokens of plain greedy decoding. Sampled: its distribution (rejection sampling).
Every row of a batch accepts by itself; nobody waits for the slowest prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.acceptance import greedy_match, rejection_sample
from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.drafting.draft_model import DraftModel, Proposal
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import TokenTree, chain
from specbeam.errors import InputError
from specbeam.sampling import draw, process, uniforms
from specbeam.trace import GenerationOutput


def speculative_generate(target: PreTrainedModel, draft: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                         attention_mask: Tensor | None = None, *, draft_length: int = 4, temperature: float = 0.0,
                         seed: int | Sequence[int] = 0, **options) -> GenerationOutput:
    """Speculative decoding with a draft model of the same vocabulary.

    draft_length: tokens proposed per round (γ ≥ 1). temperature: 0 is greedy, above 0 samples (`top_k`, `top_p`, …
    are then honoured, for draft and target alike). Other arguments as in `greedy_generate` and `sample_generate`.
    """
    if isinstance(draft_length, bool) or not isinstance(draft_length, int) or draft_length < 1:
        raise InputError(f"draft_length is {draft_length!r}: it is the number of tokens proposed per round, at least "
                         "1 (greedy_generate runs without a draft).")
    if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature!r}: give 0 for greedy, or a number above 0 to sample.")
    if temperature > 0:
        options["temperature"] = temperature
    request = settle(target, input_ids, attention_mask, sampled=temperature > 0, seed=seed, **options)
    with evaluating(target, draft):
        return _decode(target, draft, request, draft_length)


@torch.inference_mode()
def _decode(target: PreTrainedModel, draft: PreTrainedModel, request: Request, draft_length: int
            ) -> GenerationOutput:
    adapter = adapt(target)
    lengths = [len(row.prompt) for row in request.rows]
    room = [row.max_new_tokens for row in request.rows]
    check_lengths(adapter, lengths, room)
    adapt(draft)  # a first probe of the draft is not part of anyone's prefill
    batch = Batch(request, target)
    tree = TokenTree(adapter, len(lengths), max(lengths) + max(room) + draft_length)

    logits, _ = tree.extend(tree.tips([0] * len(lengths)), chain([row.prompt for row in request.rows], tree.device),
                            last_only=True)
    drafter = DraftModel(draft, request, logits.shape[-1], tree.device)
    drafter.prefill()
    cached = lengths  # the last committed token is always still to be read
    _, first = _choose(request, batch, logits, None)
    for row, token in zip(batch.live, first, strict=True):
        batch.commit(row, [token], ["plain"])
    batch.prefill_done()

    while True:
        stay = batch.retire()
        if not batch.live:
            return batch.output(drafts=True)
        if stay:
            tree.keep_rows(stay)
            drafter.keep_rows(stay)
            cached = [cached[i] for i in stay]
        states = [batch.rows[row] for row in batch.live]

        start = batch.clock.mark()
        # The last token of an answer is never worth a proposal behind it.
        wanted = [min(draft_length, state.remaining - 1) for state in states]
        proposal = drafter.propose([state.sequence for state in states], wanted) if max(wanted) else None
        drafted = batch.clock.mark()
        last = torch.tensor([[state.tokens[-1]] for state in states], device=tree.device)
        tokens = last if proposal is None else torch.cat([last, proposal.tokens], dim=1)
        counts = torch.tensor(wanted, device=tree.device)
        logits, _ = tree.extend(tree.tips(cached), chain(tokens, tree.device, counts + 1))
        batch.phases["draft"].append((start, drafted))
        batch.phases["verify"].append((drafted, batch.clock.mark()))

        accepted, following = _choose(request, batch, logits, proposal)
        chains = [[] for _ in states] if proposal is None else proposal.tokens.tolist()
        for i, (row, kept) in enumerate(zip(batch.live, accepted, strict=True)):
            source = "plain" if not wanted[i] else "bonus" if kept == wanted[i] else "correction"
            became = batch.commit(row, [*chains[i][:kept], following[i]], ["draft"] * kept + [source])
            batch.round_done(row, start, chains[i][: wanted[i]], min(kept, became), became)
        if proposal is not None:
            drafter.accept(accepted, wanted)
        cached = [n + kept + 1 for n, kept in zip(cached, accepted, strict=True)]


def _choose(request: Request, batch: Batch, logits: Tensor, proposal: Proposal | None
            ) -> tuple[list[int], list[int]]:
    """How many proposals each live row keeps, and the target's token that follows them.

    logits: [live, γ + 1, vocabulary], after the committed text and after each proposal.
    """
    proposed = torch.empty(len(logits), 0, dtype=torch.long) if proposal is None else proposal.tokens
    counts = [0] * len(logits) if proposal is None else proposal.lengths
    proposed, lengths = proposed.to(logits.device), torch.tensor(counts, device=logits.device)
    rows = [request.rows[row] for row in batch.live]
    chains = proposed.tolist()
    p = process(logits, [row.processors for row in rows],
                lambda i, node: [*batch.rows[batch.live[i]].sequence, *chains[i][:node]])
    if not request.config.do_sample:
        best = p.argmax(-1)
        accepted = greedy_match(proposed, best, lengths)
        return accepted.tolist(), best.gather(1, accepted[:, None]).squeeze(1).tolist()
    uniform = uniforms([row.generator for row in rows], [n + 1 for n in counts], logits.device)
    p = p.softmax(-1)
    if proposal is None:
        return [0] * len(logits), draw(p[:, 0], uniform[:, 0]).tolist()
    assert proposal.probabilities is not None
    accepted, following = rejection_sample(proposed, p, proposal.probabilities, lengths, uniform)
    return accepted.tolist(), following.tolist()
