# mypy: disable-error-code="assignment"
"""Attention of one new token of one row over up to 512 slots: a program for each query head.

A token's attention has little to compute, and everything waits for it: what counts is how often threads wait for each
other. Here keys and values stay in the registers that they were read into, each warp has slots of its own, and the
warps' softmaxes are joined once, at the end. A group's keys are read once for each of its heads, out of L2.
Of heads of 64 in bf16 attended.py does it in fewer instructions than Triton has a way to ask for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners.attend_few import _turned
from specbeam.runners.few_rows import flat
from specbeam.runners.matvec import _begin, early

_MOST_SLOTS, _MOST_BYTES = 512, 65536  # that a program has, of keys: as many values lie beside them
_STEPS = 16
_PTX = tl.constexpr(torch.version.hip is None)


def suits(keys: Tensor, view: int) -> bool:
    """Heads of 128 and more are attend_few.py's: so many registers are room that the next products read ahead into."""
    dim, size = keys.shape[3], keys.element_size()
    return dim <= 64 and view <= _MOST_SLOTS and triton.next_power_of_2(view) * triton.next_power_of_2(
        dim) * size <= _MOST_BYTES


def attend(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
           cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor, scale: float,
           ahead: int) -> Tensor:
    """What fuse.py's `attend` says, for one token on a GPU."""
    dim, every = keys.shape[3], triton.next_power_of_2(view)
    q, k, v = (flat(one, 1) for one in (q, k, v))
    heads, wide = q.numel() // dim, triton.next_power_of_2(dim)
    lines = max(1, 256 // wide)  # of a warp, whose threads have eight numbers each
    steps = min(_STEPS, max(1, every // lines))
    warps = max(1, every // (lines * steps))
    output = q.new_empty(1, 1, heads, dim)
    cos, sin, mask = cos.contiguous(), sin.contiguous(), mask if mask.stride(3) == 1 else mask.contiguous()
    pdl = {"launch_pdl": True} if early(q.device) else {}
    _attend_one[(heads,)](
        q, k, v, q if q_norm is None else q_norm, q if k_norm is None else k_norm, cos, sin,
        keys, values, slot, mask, output, keys.stride(1), keys.stride(2),
        values.stride(1), values.stride(2), eps, SCALE=scale, SLOTS=view, GROUP=heads // keys.shape[1], DIM=dim,
        WIDE=wide, STEPS=steps, WARPS=warps, LINES=lines, NORM=q_norm is not None, PLUS=plus, EARLY=bool(ahead),
        PDL=bool(pdl), num_warps=warps, **pdl)
    return output


@triton.jit
def _wide(x):
    """In fp32. Bf16 by one instruction each: as Triton does it, every other one takes two."""
    if _PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
                                         dtype=tl.float32, is_pure=True, pack=2)
    return x.to(tl.float32)


@triton.jit
def _either(best, total, mean, best2, total2, mean2):
    """Two softmaxes over different slots as one."""
    most = tl.maximum(best, best2)
    one, two = tl.exp(best - most), tl.exp(best2 - most)
    return most, total * one + total2 * two, mean * one + mean2 * two


@triton.jit
def _attend_one(q, k, v, q_norm, k_norm, cos, sin, keys, values, slot, mask, output, k_head, k_slot, v_head, v_slot,
                eps, SCALE: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
                WIDE: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, LINES: tl.constexpr, NORM: tl.constexpr,
                PLUS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    head = tl.program_id(0)
    # [lines, warps, steps, dimensions]: a thread has some dimensions of one line, in every step.
    line, warp = tl.arange(0, LINES)[:, None, None, None], tl.arange(0, WARPS)[None, :, None, None]
    dim = tl.arange(0, WIDE)[None, None, None]
    place = tl.arange(0, STEPS)[None, None, :, None] * (WARPS * LINES) + warp * LINES + line
    there = (place < SLOTS) & (dim < DIM)
    key, value = keys + head // GROUP * k_head, values + head // GROUP * v_head
    old_k = tl.load(key + place * k_slot + dim, mask=there, other=0.0)
    old_v = tl.load(value + place * v_slot + dim, mask=there, other=0.0)
    _begin(EARLY, PDL)
    # The new ones lie among the threads as keys do, so that nothing moves.
    across = dim + (warp + line) * 0
    live = across < DIM
    here = tl.load(slot).to(tl.int32)
    slots = tl.arange(0, STEPS)[None, None] * (WARPS * LINES) + (
        tl.arange(0, WARPS)[None, :, None] * LINES + tl.arange(0, LINES)[:, None, None])
    visible = tl.load(mask + slots, mask=slots < SLOTS, other=0)
    new_v = tl.load(v + head // GROUP * DIM + across, mask=live, other=0.0)
    query = _turned(q, head * DIM, 0, across, q_norm, cos, sin, eps, live, DIM, NORM, PLUS).to(tl.float32)
    new_k = _turned(k, head // GROUP * DIM, 0, across, k_norm, cos, sin, eps, live, DIM, NORM, PLUS)
    if head % GROUP == 0:  # of a group's programs one
        alone = live & (warp == 0) & (line == 0)
        tl.store(key + here.to(tl.int64) * k_slot + across, new_k, mask=alone)
        tl.store(value + here.to(tl.int64) * v_slot + across, new_v, mask=alone)
    score = tl.sum(_wide(old_k) * query, 3) * SCALE
    score = tl.where((visible != 0) & (slots != here), score, -1e30)
    # It sees itself: one more score, of the first line of the first warp.
    own = tl.max(tl.sum(new_k.to(tl.float32) * query, 3), 2) * SCALE
    own = tl.where(tl.arange(0, WARPS)[None] + tl.arange(0, LINES)[:, None] == 0, own, -1e30)
    best = tl.max(tl.maximum(tl.max(score, 2), own), 0)  # [warps]
    weight = tl.where(score > -1e30, tl.exp(score - best[None, :, None]), 0.0)
    its = tl.where(own > -1e30, tl.exp(own - best[None]), 0.0)
    total = tl.sum(tl.sum(weight, 2) + its, 0)
    mean = tl.sum(_wide(old_v) * weight[:, :, :, None], 2) + tl.max(new_v.to(tl.float32), 2) * its[:, :, None]
    mean = tl.sum(mean, 0)  # [warps, dimensions]
    wide = tl.zeros([WARPS, WIDE], tl.float32)
    best, total, mean = tl.reduce((best[:, None] + wide, total[:, None] + wide, mean), 0, _either)
    dim = tl.arange(0, WIDE)
    tl.store(output + head * DIM + dim, (mean / total).to(output.dtype.element_ty), mask=dim < DIM)
