"""Attention of one new token of one row over the slots: norms of the heads, rotary embedding and the new slot included.

What an earlier step wrote is fetched before the kernel before this one has ended (see matvec.py); the new key and value
come from that kernel, count apart from the others, and are written to their slot beside. An earlier step has ended
then, since what stands between two steps (the choice of a token) begins and ends as ordinary kernels do.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners import attention as of_many
from specbeam.runners.matvec import early

_PROGRAMS, _MOST_SLOTS = 128, 256


def attend(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
           cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor, scale: float,
           ahead: bool) -> Tensor:
    """What fuse.py's `attend` says, on a GPU."""
    dim, key_heads = keys.shape[3], keys.shape[1]
    heads = q.numel() // dim
    wide = triton.next_power_of_2(dim)
    # Slots that a program looks at at a time: 32 KiB of keys. The slots are shared out among the programs.
    block = min(_MOST_SLOTS, max(16, 32768 // (wide * keys.element_size())))
    blocks = triton.cdiv(view, block)
    share = triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // key_heads))) * block
    parts = triton.cdiv(view, share)
    output = q.new_empty(1, 1, heads, dim)
    found = q.new_empty(parts, 2, heads, dim, dtype=torch.float32) if parts > 1 else output
    pdl = {"launch_pdl": True} if early(q.device) else {}
    _attend_one[(key_heads, parts)](
        q, k, v, q if q_norm is None else q_norm, q if k_norm is None else k_norm, cos, sin, keys, values, slot, mask,
        found, output, keys.stride(1), keys.stride(2), values.stride(1), values.stride(2), eps, PARTS=parts,
        SCALE=scale, SLOTS=view, SHARE=share, GROUP=heads // key_heads, DIM=dim, WIDE=wide,
        ROWS=max(16, triton.next_power_of_2(heads // key_heads)), BLOCK=block, NORM=q_norm is not None, PLUS=plus,
        EARLY=ahead, PDL=bool(pdl), num_warps=8 if block * wide >= 8192 else 4, num_stages=2, **pdl)
    if parts > 1:
        _join_parts[(heads,)](found, output, PARTS=parts, MOST=triton.next_power_of_2(parts), HEADS=heads, DIM=dim,
                              WIDE=wide, EARLY=ahead, PDL=bool(pdl), num_warps=1, **pdl)
    return output


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What fuse.py's `attention` says, on a GPU."""
    return of_many.attend(cast(Any, None), query, key, value, mask, scaling=scale)[0]


@triton.jit
def _turned(x, place, dim, weight, cos, sin, eps, live, DIM: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr):
    """Heads at x + place, normed and turned by their position, each step rounded as transformers rounds it."""
    across = tl.where(dim < DIM // 2, dim + DIM // 2, dim - DIM // 2)
    a = tl.load(x + place + dim, mask=live, other=0.0)
    b = tl.load(x + place + across, mask=live, other=0.0)
    c = tl.load(cos + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    s = tl.load(sin + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    if NORM:
        wa = tl.load(weight + dim, mask=dim < DIM, other=0.0)
        wb = tl.load(weight + across, mask=dim < DIM, other=0.0)
        scale = tl.rsqrt(tl.sum(a.to(tl.float32) * a.to(tl.float32), 1, keep_dims=True) / DIM + eps)
        a, b = _weighed(a, scale, wa, PLUS), _weighed(b, scale, wb, PLUS)
    b = tl.where(dim < DIM // 2, -b.to(tl.float32), b.to(tl.float32))
    left, right = (a.to(tl.float32) * c).to(a.dtype), (b * s).to(a.dtype)
    return (left.to(tl.float32) + right.to(tl.float32)).to(a.dtype)


@triton.jit
def _weighed(x, scale, weight, PLUS: tl.constexpr):
    if PLUS:
        return (x.to(tl.float32) * scale * (1.0 + weight.to(tl.float32))).to(x.dtype)
    return ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _attend_one(q, k, v, q_norm, k_norm, cos, sin, keys, values, slot, mask, found, output, k_head, k_slot, v_head,
                v_slot, eps, PARTS: tl.constexpr, SCALE: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr,
                GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                NORM: tl.constexpr, PLUS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    head, part = tl.program_id(0), tl.program_id(1)
    lane, dim, member = tl.arange(0, BLOCK), tl.arange(0, WIDE)[None], tl.arange(0, ROWS)[:, None]
    first = part * SHARE
    inside = ((first + lane)[:, None] < SLOTS) & (dim < DIM)
    key = keys + head * k_head + dim
    value = values + head * v_head + dim
    old_k = tl.load(key + (first + lane)[:, None] * k_slot, mask=inside, other=0.0)
    old_v = tl.load(value + (first + lane)[:, None] * v_slot, mask=inside, other=0.0)
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    here = tl.load(slot)
    visible = tl.load(mask + first + lane, mask=first + lane < SLOTS, other=0) != 0
    new_v = tl.load(v + head * DIM + dim, mask=dim < DIM, other=0.0)
    new_k = _turned(k, head * DIM, dim, k_norm, cos, sin, eps, dim < DIM, DIM, NORM, PLUS)
    queries = _turned(q, (head * GROUP + member) * DIM, dim, q_norm, cos, sin, eps, (member < GROUP) & (dim < DIM), DIM,
                      NORM, PLUS)
    row = tl.arange(0, ROWS)
    mine = (here >= first) & (here < first + SHARE)
    if mine:
        tl.store(key + here * k_slot, new_k, mask=dim < DIM)
        tl.store(value + here * v_slot, new_v, mask=dim < DIM)
    # The new slot, which sees itself, goes first; the tiles then leave it out.
    score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32), 1) * SCALE
    best = tl.where(mine & (row < ROWS), score, -1e30)
    total = tl.where(mine & (row < ROWS), 1.0, 0.0)
    mean = tl.where(mine, new_v.to(tl.float32), 0.0) + tl.zeros([ROWS, WIDE], tl.float32)
    for begin in tl.static_range(0, SHARE, BLOCK):
        place = first + begin + lane
        if begin > 0:
            inside = (place[:, None] < SLOTS) & (dim < DIM)
            old_k = tl.load(key + place[:, None] * k_slot, mask=inside, other=0.0)
            old_v = tl.load(value + place[:, None] * v_slot, mask=inside, other=0.0)
            visible = tl.load(mask + place, mask=place < SLOTS, other=0) != 0
        there = (visible & (place != here))[None]
        scores = tl.where(there, tl.dot(queries, tl.trans(old_k), input_precision="ieee") * SCALE, -1e30)
        better = tl.maximum(best, tl.max(scores, 1))
        weight = tl.where(there, tl.exp(scores - better[:, None]), 0.0)
        shrink = tl.exp(best - better)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.dot(weight.to(old_v.dtype), old_v, input_precision="ieee")
        best = better
    total = tl.maximum(total, 1e-30)
    if PARTS == 1:
        out = output + (head * GROUP + row)[:, None] * DIM + dim
        tl.store(out, (mean / total[:, None]).to(output.dtype.element_ty), mask=(row < GROUP)[:, None] & (dim < DIM))
        return
    out = found + (part * 2 * tl.num_programs(0) * GROUP + head * GROUP + row)[:, None] * DIM + dim
    real = (row < GROUP)[:, None] & (dim < DIM)
    tl.store(out, mean / total[:, None], mask=real)
    # As wide as the means: what joins the parts then reads both alike.
    weight = (best + tl.log(total))[:, None] + tl.zeros([ROWS, WIDE], tl.float32)
    tl.store(out + tl.num_programs(0) * GROUP * DIM, weight, mask=real)


@triton.jit
def _join_parts(found, output, PARTS: tl.constexpr, MOST: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                WIDE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head, part, dim = tl.program_id(0), tl.arange(0, MOST)[:, None], tl.arange(0, WIDE)[None]
    place, there = found + (part * 2 * HEADS + head) * DIM + dim, (part < PARTS) & (dim < DIM)
    mean = tl.load(place, mask=there, other=0.0)
    weight = tl.load(place + HEADS * DIM, mask=there, other=-1e30)
    weight = tl.exp(weight - tl.max(weight, 0, keep_dims=True))
    result = tl.sum(mean * weight, 0, keep_dims=True) / tl.sum(weight, 0, keep_dims=True)
    tl.store(output + head * DIM + dim, result.to(output.dtype.element_ty), mask=dim < DIM)
