# Tuples of tiles grow in the kernels.
# mypy: disable-error-code="assignment,attr-defined"
"""Up to sixteen rows times weights, as fast as the weights can be read: matvec.py for the tokens of a draft or a batch.

The rows are one side of the tensor cores' smallest product, so that sixteen cost the reading that one does. What a
thread reads of the weights at once, sixteen bytes, is also what it multiplies: a sum does not ask in which order its
columns come, and in the order of `_sorted` no weight changes its thread between memory and product. Each warp has
columns of its own; their sums are added up at the end, and so are the squares that a norm before the product asks
for: weights do not wait for a norm, its scale is applied to the sums. (In fp16, what was not scaled yet may overflow:
there the norm is a kernel.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners.fuse import MOST_WEIGHTS
from specbeam.runners.matvec import ACTIVATIONS, _activate, _begin, _chosen, _normed, early


@dataclass(frozen=True)
class Tiling:
    """groups of eight rows of weights that a program has, steps of these that it reads ahead (32 columns a warp each),
    steps of the rows, and warps."""

    groups: int
    ahead: int
    near: int
    warps: int


def tiling(size: int, columns: int, gated: bool, halves: int) -> Tiling:
    """As measured on an H200, for products of 1 to 600 MB: small programs, and much of their weights ahead; but not so
    small that a row takes many steps, each of which is code of its own (64 compile for 16 s, of a gate for 50). Gates
    of more than 4,096 columns were not timed. size: rows of weights; halves: of the sixteen rows, that are there."""
    if gated and columns <= 1024:
        return Tiling(1, 7, 7, 2)
    if gated:
        near, warps = (6, 2) if columns <= 2048 else (4, 4 if columns <= 4096 else 8)
        return Tiling(2, 6, near, warps) if halves == 1 else Tiling(1, 8, near + 2 if warps == 2 else near, warps)
    if columns > 4096:
        return Tiling(1, 16, 8, 8)
    if size >= 16384:
        return Tiling(2, 16, 16, 2)
    return Tiling(1 if size <= 1024 or (halves > 1 and size <= 2048) else 2, 16, 8, 4)


def product(x: Tensor, post: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float, plus: bool,
            weights: Sequence[Tensor], biases: Sequence[Tensor | None], act: str, added: Tensor | None, ahead: int,
            tile: Tiling | None = None, late: bool | None = None) -> Tensor:
    """What fuse.py's `product` says, for two to sixteen rows of bf16 or fp16 on a GPU. x: [..., columns]; late: whether
    a norm's scale is applied to the sums."""
    columns, gated, rows = weights[0].shape[1], bool(act), x.numel() // x.shape[-1]
    sizes = [len(weight) for weight in weights]
    total = sizes[0] if gated else sum(sizes)
    first, hidden = weights[0], flat(x, rows)
    out = first.new_empty(*x.shape[:-1], total + (columns if post is not None else 0))
    if post is not None and residual is not None:
        hidden = _joined(hidden, post, flat(residual, rows), out.view(rows, -1)[:, total:], eps, plus, ahead)
    if norm is not None and not (x.dtype == torch.bfloat16 if late is None else late):
        hidden, norm = _joined(hidden, norm, None, first.new_empty(rows, columns), eps, plus, ahead), None
    halves = 1 if rows <= 8 else 2
    tile = tile or tiling(total, columns, gated, halves)
    groups = tile.groups if 8 * tile.groups <= min(sizes) else 1
    share = 8 * groups
    programs = [triton.cdiv(size, share) for size in (sizes[:1] if gated else sizes)]
    w = [*weights, *[first] * (MOST_WEIGHTS - len(weights))]
    b = [first if one is None else one for one in [*biases, *[None] * (MOST_WEIGHTS - len(biases))]]
    starts = [sum(programs[:n]) for n in range(1, MOST_WEIGHTS)]
    more = hidden if added is None else flat(added, rows)
    options = {"launch_pdl": True} if early(x.device) else {}
    _product[(sum(programs),)](
        hidden, first if norm is None else norm, more, out, *w, *b, *starts,
        *(sizes + [0] * MOST_WEIGHTS)[:MOST_WEIGHTS], eps, rows, X_ROW=hidden.stride(0), ADDED_ROW=more.stride(0),
        OUT_ROW=out.shape[-1], COLUMNS=columns, GROUPS=groups, AHEAD=tile.ahead, NEAR=tile.near, WARPS=tile.warps,
        HALVES=halves, WEIGHTS=len(weights), NORM=norm is not None, PLUS=plus,
        BIASES=sum(2**n for n, one in enumerate(biases) if one is not None), ACT=ACTIVATIONS.index(act),
        ADDED=added is not None, EARLY=bool(ahead), PDL=bool(options), num_warps=tile.warps, **options)
    return out


def join(x: Tensor, weight: Tensor, residual: Tensor, eps: float, plus: bool, ahead: int) -> Tensor:
    """What fuse.py's `join` says, for several rows."""
    out, columns = torch.empty_like(residual, memory_format=torch.contiguous_format), len(weight)
    rows = x.numel() // columns
    _joined(flat(x, rows), weight, flat(residual, rows), out.view(rows, columns), eps, plus, ahead)
    return out


def flat(x: Tensor, rows: int) -> Tensor:
    """[rows, columns], its columns side by side."""
    x = x.reshape(rows, -1)
    return x if x.stride(1) == 1 else x.contiguous()


def _joined(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, eps: float, plus: bool, ahead: int
            ) -> Tensor:
    """norm(x), added to the residual if there is one. out: [rows, columns], and what it becomes."""
    columns, pdl, more = len(weight), early(x.device), x if residual is None else residual
    _join[(len(x),)](x, weight, more, out, x.stride(0), more.stride(0), out.stride(0), eps, COLUMNS=columns,
                     BLOCK=triton.next_power_of_2(columns), ADDED=residual is not None, PLUS=plus, EARLY=bool(ahead),
                     PDL=pdl, num_warps=8, **({"launch_pdl": True} if pdl else {}))
    return out


@triton.jit
def _tile(x, block, first, rows, ROW: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Eight rows from `first` on, of the `rows` there are, and 32 columns a warp: [8, WARPS, 32]."""
    row = first + tl.arange(0, 8)[:, None, None]
    column = block * 32 * WARPS + tl.arange(0, WARPS)[None, :, None] * 32 + tl.arange(0, 32)[None, None]
    inside = row < rows if COLUMNS % (32 * WARPS) == 0 else (column < COLUMNS) & (row < rows)
    return tl.load(x + row * ROW + column, mask=inside, other=0.0)


@triton.jit
def _halves(x, block, rows, ROW: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, HALVES: tl.constexpr):
    halves = (_tile(x, block, 0, rows, ROW, COLUMNS, WARPS),)
    if HALVES > 1:
        halves = halves + (_tile(x, block, 8, rows, ROW, COLUMNS, WARPS),)  # noqa: RUF005
    return halves


@triton.jit
def _weights(w, block, group, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    row = group * 8 + tl.arange(0, 8)[:, None, None]
    column = block * 32 * WARPS + tl.arange(0, WARPS)[None, :, None] * 32 + tl.arange(0, 32)[None, None]
    place = w + row * COLUMNS + column
    if COLUMNS % (32 * WARPS) == 0:
        return tl.load(place, eviction_policy="evict_first")
    return tl.load(place, mask=(column < COLUMNS) & (row >= 0), other=0.0, eviction_policy="evict_first")


@triton.jit
def _step(w, block, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    tiles = (_weights(w, block, 0, COLUMNS, WARPS),)
    for group in tl.static_range(1, GROUPS):
        tiles = tiles + (_weights(w, block, group, COLUMNS, WARPS),)  # noqa: RUF005
    return tiles


@triton.jit
def _sorted(tile, WARPS: tl.constexpr):
    """[8, WARPS, 32] as [WARPS, 8, 32]: the eight neighbours that a thread has read become two times four of those
    that it multiplies."""
    parts = tl.permute(tl.reshape(tile, [8, WARPS, 4, 2, 4]), 1, 0, 3, 2, 4)
    return tl.reshape(parts, [WARPS, 8, 32])


@triton.jit
def _operand(tile, weight, NORM: tl.constexpr, PLUS: tl.constexpr, WARPS: tl.constexpr):
    if NORM:
        gain = weight.to(tl.float32)
        if PLUS:
            gain += 1.0
        tile = (tile.to(tl.float32) * gain).to(tile.dtype)
    return _sorted(tile, WARPS)


@triton.jit
def _squared(tile):
    return tile.to(tl.float32) * tile.to(tl.float32)


@triton.jit
def _both(low, high, WARPS: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(low, high), 0, 3, 1, 2), [WARPS, 16, 32])


@triton.jit(do_not_specialize=["rows"])
def _product(x, norm, added, out, w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, eps, rows,
             X_ROW: tl.constexpr, ADDED_ROW: tl.constexpr, OUT_ROW: tl.constexpr, COLUMNS: tl.constexpr,
             GROUPS: tl.constexpr, AHEAD: tl.constexpr, NEAR: tl.constexpr, WARPS: tl.constexpr, HALVES: tl.constexpr,
             WEIGHTS: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr, BIASES: tl.constexpr, ACT: tl.constexpr,
             ADDED: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    BLOCKS: tl.constexpr = (COLUMNS + 32 * WARPS - 1) // (32 * WARPS)
    GATE: tl.constexpr = ACT > 0
    w, b, size, base, has, number = _chosen(w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, WEIGHTS,
                                            BIASES, ACT)
    # The last program of a weight begins so early that it has all its rows: some are then computed twice.
    row = tl.maximum(tl.minimum(number * GROUPS * 8, size - GROUPS * 8), 0)
    w += row.to(tl.int64) * COLUMNS
    other = w1 + row.to(tl.int64) * COLUMNS
    tiles = (_step(w, 0, GROUPS, COLUMNS, WARPS),)
    others = tiles
    if GATE:
        others = (_step(other, 0, GROUPS, COLUMNS, WARPS),)
    for block in tl.static_range(1, AHEAD):
        if block < BLOCKS:
            tiles = tiles + (_step(w, block, GROUPS, COLUMNS, WARPS),)  # noqa: RUF005
            if GATE:
                others = others + (_step(other, block, GROUPS, COLUMNS, WARPS),)  # noqa: RUF005
    gains, squares, squares2 = (0,), 0.0, 0.0
    if NORM:
        gains = (_tile(norm, 0, 0, 8, 0, COLUMNS, WARPS),)
        for block in tl.static_range(1, NEAR):
            if block < BLOCKS:
                gains = gains + (_tile(norm, block, 0, 8, 0, COLUMNS, WARPS),)  # noqa: RUF005
        squares = tl.zeros([8, WARPS, 32], tl.float32)
        squares2 = tl.zeros([8, WARPS, 32], tl.float32)
    _begin(EARLY, PDL)
    near = (_halves(x, 0, rows, X_ROW, COLUMNS, WARPS, HALVES),)
    for block in tl.static_range(1, NEAR):
        if block < BLOCKS:
            near = near + (_halves(x, block, rows, X_ROW, COLUMNS, WARPS, HALVES),)  # noqa: RUF005
    sums = (tl.zeros([WARPS, 16, 8], tl.float32),)
    for _ in tl.static_range(1, GROUPS):
        sums = sums + (tl.zeros([WARPS, 16, 8], tl.float32),)  # noqa: RUF005
    sums2 = sums
    for block in tl.static_range(0, BLOCKS):
        if block + AHEAD < BLOCKS:
            tiles = tiles + (_step(w, block + AHEAD, GROUPS, COLUMNS, WARPS),)  # noqa: RUF005
            if GATE:
                others = others + (_step(other, block + AHEAD, GROUPS, COLUMNS, WARPS),)  # noqa: RUF005
        if block + NEAR < BLOCKS:
            near = near + (_halves(x, block + NEAR, rows, X_ROW, COLUMNS, WARPS, HALVES),)  # noqa: RUF005
            if NORM:
                gains = gains + (_tile(norm, block + NEAR, 0, 8, 0, COLUMNS, WARPS),)  # noqa: RUF005
        gain = 0
        if NORM:
            gain = gains[block]
            squares += _squared(near[block][0])
        first = _operand(near[block][0], gain, NORM, PLUS, WARPS)
        if HALVES > 1:
            if NORM:
                squares2 += _squared(near[block][1])
            both = _both(first, _operand(near[block][1], gain, NORM, PLUS, WARPS), WARPS)
        else:
            both = _both(first, tl.zeros_like(first), WARPS)
        sums = _added(sums, both, tiles[block], GROUPS, WARPS)
        if GATE:
            sums2 = _added(sums2, both, others[block], GROUPS, WARPS)
    token = tl.arange(0, 16)[:, None]
    dtype = out.dtype.element_ty
    scale = 1.0
    if NORM:
        square = tl.join(tl.sum(tl.sum(squares, 2), 1), tl.sum(tl.sum(squares2, 2), 1))
        scale = tl.rsqrt(tl.reshape(tl.permute(square, 1, 0), [16, 1]) / COLUMNS + eps)
    for group in tl.static_range(0, GROUPS):
        where = row + group * 8 + tl.arange(0, 8)[None]
        inside = where < size
        result = tl.sum(sums[group], 0) * scale
        if BIASES:
            result += tl.load(b + where, mask=inside & (where < size * has), other=0.0).to(tl.float32)
        result = result.to(dtype).to(tl.float32)
        if GATE:
            second = tl.sum(sums2[group], 0) * scale
            if BIASES > 1:
                second += tl.load(b1 + where, mask=inside, other=0.0).to(tl.float32)
            result = _activate(result, ACT).to(dtype).to(tl.float32) * second.to(dtype).to(tl.float32)
        live = inside & (token < rows)
        if ADDED:
            result += tl.load(added + token * ADDED_ROW + where, mask=live, other=0.0).to(tl.float32)
        tl.store(out + token * OUT_ROW + base + where, result.to(dtype), mask=live)


@triton.jit
def _added(sums, x, tiles, GROUPS: tl.constexpr, WARPS: tl.constexpr):
    more = (tl.dot(x, tl.permute(_sorted(tiles[0], WARPS), 0, 2, 1), sums[0]),)
    for group in tl.static_range(1, GROUPS):
        more = more + (tl.dot(x, tl.permute(_sorted(tiles[group], WARPS), 0, 2, 1), sums[group]),)  # noqa: RUF005
    return more


@triton.jit
def _join(x, weight, residual, out, x_row, residual_row, out_row, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
          ADDED: tl.constexpr, PLUS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    column, row = tl.arange(0, BLOCK), tl.program_id(0)
    there = column < COLUMNS
    its = tl.load(weight + column, mask=there, other=0.0)
    _begin(EARLY, PDL)
    part = tl.load(x + row * x_row + column, mask=there, other=0.0)
    scale = tl.rsqrt(tl.sum(part.to(tl.float32) * part.to(tl.float32), 0) / COLUMNS + eps)
    sum = _normed(part, scale, its, PLUS)
    if ADDED:
        sum += tl.load(residual + row * residual_row + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, sum.to(part.dtype), mask=there)
