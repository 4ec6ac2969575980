"""Greedy decoding: the most probable token, every time. The plain method that speculation is measured against.

Idea: prefill the prompt, then one token a forward. Rows of a batch are ragged and leave when they end.
Exact: the tokens of `transformers.generate(do_sample=False)`; in a batch, those of each prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import TokenTree, chain
from specbeam.sampling import process
from specbeam.trace import GenerationOutput

Choose = Callable[[Tensor, list[int]], Tensor]  # scores [live, vocabulary] and the live rows → tokens [live]


def greedy_generate(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                    attention_mask: Tensor | None = None, **options) -> GenerationOutput:
    """Plain greedy decoding.

    input_ids: [rows, length] long, padded on either side as `attention_mask` says, or a list of 1-D tensors.
    options: any GenerationConfig name (`max_new_tokens`, `eos_token_id`, `repetition_penalty`, …); also `tokenizer`
    (for `stop_strings`), `streamer`, `logits_processor`, `stopping_criteria`, `generation_config`.
    Raises InputError for options that cannot be honoured and for prompts beyond the context.
    """
    request = settle(target, input_ids, attention_mask, sampled=False, **options)
    with evaluating(target):
        return decode_plainly(target, request, lambda scores, _: scores.argmax(-1))


@torch.inference_mode()
def decode_plainly(target: PreTrainedModel, request: Request, choose: Choose) -> GenerationOutput:
    """One token a forward, `choose`n from its processed scores."""
    adapter = adapt(target)
    lengths = [len(row.prompt) for row in request.rows]
    check_lengths(adapter, lengths, [row.max_new_tokens for row in request.rows])
    batch = Batch(request, target)
    tree = TokenTree(adapter, len(lengths), max(lengths) + max(row.max_new_tokens for row in request.rows))

    # What every live row has not read: at first the prompt, then the last token.
    unread, tips = chain([row.prompt for row in request.rows], tree.device), tree.tips([0] * len(lengths))
    while batch.live:
        start = batch.clock.mark()
        logits, nodes = tree.extend(tips, unread, last_only=True)
        verified = batch.clock.mark()
        batch.phases["verify"].append((start, verified))
        scores = process(logits, [request.rows[row].processors for row in batch.live],
                         lambda i, _: batch.rows[batch.live[i]].sequence)[:, 0]
        chosen = choose(scores, batch.live)
        tokens = chosen.tolist()

        prefill = not batch.rows[batch.live[0]].tokens
        for row, token in zip(batch.live, tokens, strict=True):
            batch.commit(row, [token], ["plain"])
            if not prefill:
                batch.round_done(row, start, [], 0, 1)
        batch.phases["accept"].append((verified, batch.clock.mark()))
        if prefill:
            batch.prefill_done()
            batch.phases = {name: [] for name in batch.phases}
        tips = nodes.pick(unread.lengths[:, None] - 1)
        stay = batch.retire()
        if stay:
            kept = tree.keep_rows(stay)
            tips, chosen = tips.rows(kept), chosen[kept]
        unread = chain(chosen[:, None], tree.device)
    return batch.output()
