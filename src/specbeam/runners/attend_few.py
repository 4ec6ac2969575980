# mypy: disable-error-code="assignment"
"""Attention of up to sixteen new tokens over the slots, with norms of the heads, rotary embedding and the new slots.

What an earlier step wrote is fetched before the kernel before this one has ended (see matvec.py); new keys and values
come from that kernel, count apart from the others, and are written to their slots beside. An earlier step has ended
then, since between two steps the output layer lets nothing begin early, and the choice of a token waits.
The query heads of a key head and all new tokens are rows of one product, sixteen of which (of one token all) are a
program's. Where the slots are shared out among programs, a second kernel puts the parts together. One token of one row
has a kernel of its own where heads are small (attend_one.py).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners import attention as of_many
from specbeam.runners.attention import _more
from specbeam.runners.few_rows import flat
from specbeam.runners.fuse import _attention
from specbeam.runners.matvec import _begin, early

_PROGRAMS, _MOST_SLOTS, _KEY_BYTES = 128, 256, 32768
_MOST_STEPS = 8  # of a program: each is code of its own, and 32 compile for 20 s


def attend(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
           cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor, scale: float,
           ahead: int) -> Tensor:
    """What fuse.py's `attend` says, on a GPU."""
    from specbeam.runners import attend_one

    [rows, new], key_heads, dim = slot.shape, keys.shape[1], keys.shape[3]
    if rows * new == 1 and attend_one.suits(keys, view):
        return attend_one.attend(q, k, v, q_norm, k_norm, eps, plus, cos, sin, keys, values, slot, view, mask, scale,
                                 ahead)
    q, k, v = (flat(one, rows * new) for one in (q, k, v))
    heads, wide = q.shape[1] // dim, triton.next_power_of_2(dim)
    group = heads // key_heads
    lines = 16 if new > 1 else max(16, triton.next_power_of_2(group))
    tiles = triton.cdiv(new * group, lines)
    # Slots that a program looks at at a time: 32 KiB of keys. The slots are shared out among the programs.
    block = min(_MOST_SLOTS, max(16, _KEY_BYTES // (wide * keys.element_size())))
    blocks = triton.cdiv(view, block)
    share = min(_MOST_STEPS, triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // (rows * key_heads * tiles))))) * block
    parts = triton.cdiv(view, share)
    output = q.new_empty(rows, new, heads, dim)
    found = q.new_empty(parts, 2, rows * new * heads, dim, dtype=torch.float32) if parts > 1 else output
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    pdl = {"launch_pdl": True} if early(q.device) else {}
    _attend[(rows * key_heads, tiles, parts)](
        q, k, v, q if q_norm is None else q_norm, q if k_norm is None else k_norm, cos.contiguous(), sin.contiguous(),
        keys, values, slot.contiguous(), mask, found, output, q.stride(0), k.stride(0), v.stride(0),
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        mask.stride(0), mask.stride(2), eps, ALL=rows * new * heads, NEW=new, PARTS=parts, SCALE=scale, SLOTS=view,
        SHARE=share, KEY_HEADS=key_heads, GROUP=group, DIM=dim, WIDE=wide, ROWS=lines, BLOCK=block,
        NORM=q_norm is not None, PLUS=plus, EARLY=bool(ahead), PDL=bool(pdl),
        num_warps=_warps(block * wide), num_stages=2, **pdl)
    if parts > 1:
        _join_parts[(rows * new * heads,)](
            found, output, PARTS=parts, MOST=triton.next_power_of_2(parts), HEADS=rows * new * heads, DIM=dim,
            WIDE=wide, EARLY=bool(ahead), PDL=bool(pdl),
            num_warps=min(8, max(1, triton.next_power_of_2(parts) * wide // 2048)), **pdl)
    return output


def _warps(tile: int) -> int:
    return 8 if tile >= 8192 else 4


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What fuse.py's `attention` says, on a GPU."""
    group = query.shape[1] // key.shape[1]
    if group * query.shape[2] * query.shape[3] > of_many._MOST or query.stride(3) != 1 or mask.stride(3) != 1:
        return _attention(query, key, value, mask, scale)
    return of_many.attend(cast(Any, None), query, key, value, mask, scaling=scale)[0]


@triton.jit
def _turned(x, place, angle, dim, weight, cos, sin, eps, live, DIM: tl.constexpr, NORM: tl.constexpr,
            PLUS: tl.constexpr):
    """Heads at x + place, normed and turned by their position's cos and sin, each step rounded as transformers
    rounds it."""
    across = tl.where(dim < DIM // 2, dim + DIM // 2, dim - DIM // 2)
    a = tl.load(x + place + dim, mask=live, other=0.0)
    b = tl.load(x + place + across, mask=live, other=0.0)
    c = tl.load(cos + angle + dim, mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + dim, mask=live, other=0.0).to(tl.float32)
    if NORM:
        wa = tl.load(weight + dim, mask=dim < DIM, other=0.0)
        wb = tl.load(weight + across, mask=dim < DIM, other=0.0)
        scale = tl.rsqrt(tl.sum(a.to(tl.float32) * a.to(tl.float32), -1, keep_dims=True) / DIM + eps)
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
def _attend(q, k, v, q_norm, k_norm, cos, sin, keys, values, slot, mask, found, output, q_step, k_step, v_step,
            k_row, k_head, k_slot, v_row, v_head, v_slot, m_row, m_new, eps, ALL: tl.constexpr, NEW: tl.constexpr,
            PARTS: tl.constexpr, SCALE: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr,
            KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    row, head = tl.program_id(0) // KEY_HEADS, tl.program_id(0) % KEY_HEADS
    tile, part = tl.program_id(1), tl.program_id(2)
    lane, dim = tl.arange(0, BLOCK), tl.arange(0, WIDE)[None]
    first = part * SHARE
    inside = ((first + lane)[:, None] < SLOTS) & (dim < DIM)
    key = keys + row.to(tl.int64) * k_row + head * k_head + dim
    value = values + row.to(tl.int64) * v_row + head * v_head + dim
    old_k = tl.load(key + (first + lane)[:, None] * k_slot, mask=inside, other=0.0)
    old_v = tl.load(value + (first + lane)[:, None] * v_slot, mask=inside, other=0.0)
    _begin(EARLY, PDL)
    # A row of the product: one query head of one token.
    which = tile * ROWS + tl.arange(0, ROWS)
    token, member = which // GROUP, which % GROUP
    real = which < NEW * GROUP
    at = row * NEW + token
    sight = mask + row * m_row + token[:, None] * m_new
    # What others wait for is fetched first.
    if NEW == 1:
        here = tl.load(slot + row)
        visible = tl.load(mask + row * m_row + first + lane, mask=first + lane < SLOTS, other=0)
    else:
        fresh = tl.arange(0, 16)
        here = tl.load(slot + row * NEW + fresh, mask=fresh < NEW, other=-1)
        visible = tl.load(sight + (first + lane)[None], mask=real[:, None] & (first + lane < SLOTS)[None], other=0)
    queries = _turned(q, (at * q_step + (head * GROUP + member) * DIM)[:, None], (at * DIM)[:, None], dim, q_norm, cos,
                      sin, eps, real[:, None] & (dim < DIM), DIM, NORM, PLUS)
    # The new slots go first; the tiles then leave them out.
    if NEW == 1:
        new_v = tl.load(v + row * v_step + head * DIM + dim, mask=dim < DIM, other=0.0)
        new_k = _turned(k, row * k_step + head * DIM, row * DIM, dim, k_norm, cos, sin, eps, dim < DIM, DIM, NORM, PLUS)
        mine = (here >= first) & (here < first + SHARE)
        if mine:
            tl.store(key + here * k_slot, new_k, mask=dim < DIM)
            tl.store(value + here * v_slot, new_v, mask=dim < DIM)
        score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32), 1) * SCALE  # it sees itself
        best = tl.where(mine & (which < ROWS), score, -1e30)
        total = tl.where(mine & (which < ROWS), 1.0, 0.0)
        mean = tl.where(mine, new_v.to(tl.float32), 0.0) + tl.zeros([ROWS, WIDE], tl.float32)
    else:
        its = row * NEW + fresh[:, None]
        live = (fresh[:, None] < NEW) & (dim < DIM)
        new_v = tl.load(v + its * v_step + head * DIM + dim, mask=live, other=0.0)
        new_k = _turned(k, its * k_step + head * DIM, its * DIM, dim, k_norm, cos, sin, eps, live, DIM, NORM, PLUS)
        mine = (here >= first) & (here < first + SHARE)
        if tile == 0:
            tl.store(key + here[:, None] * k_slot, new_k, mask=live & mine[:, None])
            tl.store(value + here[:, None] * v_slot, new_v, mask=live & mine[:, None])
        seen = tl.load(sight + here[None], mask=real[:, None] & mine[None], other=0) != 0
        best = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, WIDE], tl.float32)
        best, total, mean = _more(best, total, mean, queries, new_k, new_v, seen, SCALE)
    for begin in tl.static_range(0, SHARE, BLOCK):
        place = first + begin + lane
        if begin > 0:
            inside = (place[:, None] < SLOTS) & (dim < DIM)
            old_k = tl.load(key + place[:, None] * k_slot, mask=inside, other=0.0)
            old_v = tl.load(value + place[:, None] * v_slot, mask=inside, other=0.0)
            if NEW == 1:
                visible = tl.load(mask + row * m_row + place, mask=place < SLOTS, other=0)
            else:
                visible = tl.load(sight + place[None], mask=real[:, None] & (place < SLOTS)[None], other=0)
        if NEW == 1:
            seen = ((visible != 0) & (place != here))[None] & (which[:, None] >= 0)
        else:
            seen = (visible != 0) & (tl.max((place[:, None] == here[None]).to(tl.int32), 1) == 0)[None]
        best, total, mean = _more(best, total, mean, queries, old_k, old_v, seen, SCALE)
    total = tl.maximum(total, 1e-30)
    live = real[:, None] & (dim < DIM)
    out = (at * (KEY_HEADS * GROUP) + head * GROUP + member)[:, None] * DIM + dim
    if PARTS == 1:
        tl.store(output + out, (mean / total[:, None]).to(output.dtype.element_ty), mask=live)
        return
    there = found + part * 2 * ALL * DIM + out
    tl.store(there, mean / total[:, None], mask=live)
    # As wide as the means: what joins the parts then reads both alike.
    weight = (best + tl.log(total))[:, None] + tl.zeros([ROWS, WIDE], tl.float32)
    tl.store(there + ALL * DIM, weight, mask=live)


@triton.jit
def _join_parts(found, output, PARTS: tl.constexpr, MOST: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                WIDE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    _begin(EARLY, PDL)
    head, part, dim = tl.program_id(0), tl.arange(0, MOST)[:, None], tl.arange(0, WIDE)[None]
    place, there = found + (part * 2 * HEADS + head) * DIM + dim, (part < PARTS) & (dim < DIM)
    mean = tl.load(place, mask=there, other=0.0)
    weight = tl.load(place + HEADS * DIM, mask=there, other=-1e30)
    weight = tl.exp(weight - tl.max(weight, 0, keep_dims=True))
    result = tl.sum(mean * weight, 0, keep_dims=True) / tl.sum(weight, 0, keep_dims=True)
    tl.store(output + head * DIM + dim, result.to(output.dtype.element_ty), mask=dim < DIM)
