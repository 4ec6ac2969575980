"""Attention of a few new tokens over the slots, in two kernels.

With a mask and grouped queries, scaled_dot_product_attention first makes a mask of floats and copies keys and values
for every query head of a group: at batch 1 that costs more than the attention. Here the query heads of a group and the
new tokens are the rows of one product, so that a key is read once; the softmax runs along with it (Dao et al. 2022,
arXiv 2205.14135), and at small batches the slots are shared out and the parts put together (Flash-Decoding, Dao et al.
2023). Used within functions that are recorded; what it does not know goes to transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PROGRAMS = 128
_MOST = 16384  # query heads of a group × new tokens × dim: what the registers hold
_plain = ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def own() -> Iterator[None]:
    """Within it, models with attn_implementation="sdpa" use `attend`."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           dropout: float = 0.0, scaling: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [rows, heads, new, dim]; key, value: [rows, key heads, slots, dim];
    attention_mask: [rows, 1, new, slots] bool. Returns [rows, new, heads, dim]."""
    rows, heads, new, dim = query.shape
    group, slots = heads // key.shape[1], key.shape[2]
    unknown = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if (attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1 or unknown
            or dropout or value.shape != key.shape or group * new * dim > _MOST or query.stride(3) != 1
            or attention_mask.stride(3) != 1):
        return _plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    output, wide = query.new_empty(rows, new, heads, dim), triton.next_power_of_2(dim)
    block = min(64, max(16, 16384 // (wide * query.element_size())))
    # Few rows leave most of the chip idle: then every program takes a part of the slots.
    parts = min(triton.cdiv(slots, block), max(1, _PROGRAMS // (rows * key.shape[1])))
    share = triton.cdiv(triton.cdiv(slots, block), parts) * block
    found = query.new_empty(parts, rows, new, heads, wide, dtype=torch.float32)
    sums = query.new_empty(parts, rows, new, heads, 2, dtype=torch.float32)
    _attend[(rows, key.shape[1], parts)](
        query, key, value, attention_mask, found, sums, new,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2), attention_mask.stride(0), attention_mask.stride(2),
        SCALE=dim**-0.5 if scaling is None else float(scaling), SLOTS=slots, SHARE=share, GROUP=group, DIM=dim,
        WIDE=wide, ROWS=max(16, triton.next_power_of_2(group * new)), BLOCK=block, num_warps=4, num_stages=2)
    _combine[(rows * new * heads,)](found, sums, output, rows * new * heads, PARTS=parts,
                                    MOST=triton.next_power_of_2(parts), DIM=dim, WIDE=wide, num_warps=1)
    return output, None


@triton.jit
def _more(best, total, mean, q, k, v, seen, SCALE: tl.constexpr):
    """The running softmax of rows q, with some more keys and values; seen: [rows, keys]."""
    score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE, -1e30)
    better = tl.maximum(best, tl.max(score, 1))
    weight = tl.where(seen, tl.exp(score - better[:, None]), 0.0)
    shrink = tl.exp(best - better)
    mean = mean * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return better, total * shrink + tl.sum(weight, 1), mean


@triton.jit
def _attend(query, key, value, mask, found, sums, new, q_row, q_head, q_new, k_row, k_head, k_slot, v_row, v_head,
            v_slot, m_row, m_new, SCALE: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr,
            DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    which, lane, dim = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, WIDE)
    token, member = which // GROUP, which % GROUP
    real, inside = which < new * GROUP, dim < DIM
    place = row * q_row + (head * GROUP + member) * q_head + token * q_new
    q = tl.load(query + place[:, None] + dim[None], mask=real[:, None] & inside[None], other=0.0)
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDE], tl.float32)
    for begin in range(0, SHARE, BLOCK):
        slot = part * SHARE + begin + lane
        there = slot < SLOTS
        seen = tl.load(mask + row * m_row + token[:, None] * m_new + slot[None],
                       mask=real[:, None] & there[None], other=0) != 0
        within = there[:, None] & inside[None]
        k = tl.load(key + row * k_row + head * k_head + slot[:, None] * k_slot + dim[None], mask=within, other=0.0)
        v = tl.load(value + row * v_row + head * v_head + slot[:, None] * v_slot + dim[None], mask=within, other=0.0)
        best, total, mean = _more(best, total, mean, q, k, v, seen, SCALE)
    out = ((part * tl.num_programs(0) + row) * new + token) * (tl.num_programs(1) * GROUP) + head * GROUP + member
    tl.store(found + out[:, None] * WIDE + dim[None], mean, mask=real[:, None])
    tl.store(sums + out * 2, best, mask=real)
    tl.store(sums + out * 2 + 1, total, mask=real)


@triton.jit
def _combine(found, sums, output, heads, PARTS: tl.constexpr, MOST: tl.constexpr, DIM: tl.constexpr,
             WIDE: tl.constexpr):
    head, part, dim = tl.program_id(0), tl.arange(0, MOST), tl.arange(0, WIDE)
    there = part < PARTS
    best = tl.load(sums + (part * heads + head) * 2, mask=there, other=-1e30)
    total = tl.load(sums + (part * heads + head) * 2 + 1, mask=there, other=0.0)
    mean = tl.load(found + (part * heads + head)[:, None] * WIDE + dim[None], mask=there[:, None], other=0.0)
    weight = tl.exp(best - tl.max(best, 0))
    result = tl.sum(mean * weight[:, None], 0) / tl.maximum(tl.sum(total * weight, 0), 1e-30)
    tl.store(output + head * DIM + dim, result.to(output.dtype.element_ty), mask=dim < DIM)
