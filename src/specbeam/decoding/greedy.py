"""Greedy decoding: the most probable token, every time. The plain method that speculation is measured against.

Idea: prefill the prompt, then one token a forward. Rows of a batch are ragged and leave when they end; with
`batch_size` the next prompt takes the place of a row that left (as in Orca's iteration-level scheduling, OSDI 2022).
Exact: the tokens of `transformers.generate(do_sample=False)`; in a batch, those of each prompt alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request, settle
from specbeam.decoding.rows import Batch
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.engine.tree import chain, read_prompts
from specbeam.runners.chains import chains_of, shape_of
from specbeam.sampling import process, refuse_nothing, uniforms
from specbeam.trace import GenerationOutput

Choose = Callable[[Tensor, list[int]], Tensor]  # scores [live, vocabulary] and the live rows → tokens [live]


def greedy_generate(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                    attention_mask: Tensor | None = None, **options) -> GenerationOutput:
    """Plain greedy decoding.

    input_ids: [rows, length] long, padded on either side as `attention_mask` says, or a list of 1-D tensors.
    options: any GenerationConfig name (`max_new_tokens`, `eos_token_id`, `repetition_penalty`, …); also `tokenizer`
    (for `stop_strings`), `streamer`, `logits_processor`, `stopping_criteria`, `generation_config`, and
    `batch_size`, how many rows run at once (None: all).
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
    batch, capacity = Batch(request, target), max(lengths) + max(row.max_new_tokens for row in request.rows)

    def answer(logits: Tensor, rows: list[int]) -> Tensor:
        scores = process(logits, [request.rows[row].processors for row in rows],
                         lambda i, _: batch.rows[rows[i]].sequence)[:, 0]
        tokens = choose(scores, rows)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            batch.commit(row, [token], ["plain"])
        return tokens

    shape = shape_of(adapter, [row.processors for row in request.rows], bool(request.config.do_sample))
    new, start = list(batch.live), None  # rows whose prompts are unread
    while True:
        if new:
            fresh, its, logits = read_prompts(adapter, [request.rows[row].prompt for row in new], capacity)
            first = answer(logits, new)
            batch.prefill_done(new, start)
            if len(new) == len(batch.live):
                tree, tips, last = fresh, its, first
            else:
                tips, last = tree.join(tips, fresh, its), torch.cat([last, first])
        start, stay = batch.clock.mark(), batch.retire()
        new = batch.admit()
        if not batch.live:
            return batch.output()
        if stay:
            kept = tree.keep_rows(stay)
            tips, last = tips.rows(kept), last[kept]
        if new:
            continue
        if shape is not None:
            step_ahead(batch, chains_of(tree, shape))
            tips = tree.tips([len(batch.rows[row].sequence) - 1 for row in batch.live])
            last = torch.tensor([batch.rows[row].tokens[-1] for row in batch.live], device=tree.device)
            continue
        logits, tips = tree.extend(tips, chain(last[:, None], tree.device), last_only=True)
        verified = batch.clock.mark()
        batch.phases["verify"].append((start, verified))
        last = answer(logits, batch.live)
        for row in batch.live:
            batch.round_done(row, start, [], 0, 1)
        batch.phases["accept"].append((verified, batch.clock.mark()))


def step_ahead(batch: Batch, chains: Any, most: float = float("inf"), why: str = "") -> int:
    """Plain steps until a row ends, at most so many, begun before the host has seen the tokens before them; how many
    were taken. why: for the trace."""
    live, begun, steps, ended = list(batch.live), deque[tuple[Any, Any, Callable[[], list[int]]]](), 0, False
    texts = [batch.rows[row].sequence for row in live]
    left = min(most, *(batch.rows[row].remaining for row in live))
    while begun or not ended:
        while not ended and len(begun) < chains.ahead and steps < left:
            start, steps, uniform = begun[-1][1] if begun else batch.clock.mark(), steps + 1, None
            if chains.shape.samples:
                generators = [batch.request.rows[row].generator for row in live]
                uniform = uniforms(generators, [1] * len(live), torch.device("cpu"))[:, 0]
            tokens = chains.step(max(map(len, texts)) - 1 + steps, texts, uniform)
            begun.append((start, batch.clock.mark(), tokens))
        if not begun:
            break
        start, end, tokens = begun.popleft()
        batch.phases["verify"].append((start, end))
        for row, token in zip(live, tokens(), strict=True):
            if batch.rows[row].finish_reason is None:
                refuse_nothing(token < 0)
                batch.commit(row, [token], ["plain"])
                batch.round_done(row, start, [], 0, 1, why=why, end=end)
                ended |= batch.rows[row].finish_reason is not None
    chains.forget()  # a step more than was seen may have been taken
    return steps
