# Tuples of tiles grow in the kernels.
# mypy: disable-error-code="assignment,attr-defined"
"""One row times weights, as fast as they can be read.

At batch 1 a decoder layer is a handful of products of one row, each of which reads its weights once. What such a kernel
loses is its beginning and its end: nothing is read while the one before it ends, its results become visible and its
input is fetched. Here a kernel begins while those before it still run (programmatic dependent launch, Hopper and later)
and reads its first weights before it waits for them; weights depend on no kernel. Several weights that have the same
input are one kernel, which chooses among them by program; the norm before and the sum after it are done in it too.
Of small layers in bf16 small.py does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners import small
from specbeam.runners.fuse import MOST_WEIGHTS
from specbeam.runners.small import ACTIVATIONS


@dataclass(frozen=True)
class Tiling:
    """rows of weights a program has, columns that it reads at a time, how many such blocks it has in flight. With
    less than 256 columns a warp, several rows are read at a time. spread: by so many nanoseconds the last program
    begins to read later than the first, where they read ahead."""

    rows: int
    block: int
    ahead: int
    warps: int = 4
    spread: int = 0


def tiling(rows: int, columns: int, gated: bool) -> Tiling:
    """As measured on an H200 within layers of five models, for products of 1 to 240 MB. What the next kernel has in
    flight must fit beside this one's: programs are small, and of small weights (nearly) all is in flight at once."""
    block = min(1024, triton.next_power_of_2(columns))
    if gated and columns <= 1024:
        return Tiling(16, 128, 5)
    if gated:
        return Tiling(8, 512, 2) if columns <= 2048 else Tiling(2, 512, 4, 2)
    if columns > 4 * block:
        return Tiling(4, 1024, 3) if columns > 10240 else Tiling(2, 512, 10 if rows <= 1024 else 5, 2)
    if columns > 1024 and columns % 1024 == 512:
        return Tiling(8, 512, 2, 2)
    if 512 < columns <= 1024 <= rows <= 8192:  # not of an output layer
        return Tiling(8, 512, 2)
    spread = 1536 if columns == 2048 <= rows <= 2560 else 0  # 8B loses 3 %, and 0.5B 2 %, by it
    return Tiling(8 if rows >= 1024 else 4, block, 2, spread=spread)


def early(device: torch.device) -> bool:
    """Whether kernels can begin before the one before them has ended."""
    return (device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (9, 0))


def product(x: Tensor, post: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float, plus: bool,
            weights: Sequence[Tensor], biases: Sequence[Tensor | None], act: str, added: Tensor | None, ahead: int,
            tile: Tiling | None = None) -> Tensor:
    """What fuse.py's `product` says, for one row on a GPU."""
    columns, gated = weights[0].shape[1], bool(act)
    sizes = [len(weight) for weight in weights]
    total = sizes[0] if gated else sum(sizes)
    first = weights[0]
    out = first.new_empty(1, 1, total + (columns if post is not None else 0))
    if post is not None and residual is not None:  # a kernel of its own: in each of many programs it takes longer
        x = join(x, post, residual, eps, plus, ahead, out[..., total:])
    if ahead and tile is None and early(x.device) and small.product(
            x, norm, eps, plus, weights, biases, act, added, ahead, out):
        return out
    tile = tile or tiling(total, columns, gated)
    programs = [triton.cdiv(size, tile.rows) for size in (sizes[:1] if gated else sizes)]
    w = [*weights, *[first] * (MOST_WEIGHTS - len(weights))]
    b = [first if one is None else one for one in [*biases, *[None] * (MOST_WEIGHTS - len(biases))]]
    starts = [sum(programs[:n]) for n in range(1, MOST_WEIGHTS)]
    options = {"launch_pdl": True} if early(x.device) else {}
    _product[(sum(programs),)](
        x, first if norm is None else norm, first if added is None else added, out, *w, *b, *starts,
        *(sizes + [0] * MOST_WEIGHTS)[:MOST_WEIGHTS], eps,
        COLUMNS=columns, ROWS=tile.rows, LINES=min(tile.rows, max(1, 256 * tile.warps // tile.block)),
        BLOCK=tile.block, AHEAD=tile.ahead, WEIGHTS=len(weights), NORM=norm is not None, PLUS=plus,
        BIASES=sum(2**n for n, one in enumerate(biases) if one is not None), ACT=ACTIVATIONS.index(act),
        ADDED=added is not None, SPREAD=tile.spread // sum(programs) if ahead and options else 0, EARLY=bool(ahead),
        PDL=bool(options), num_warps=tile.warps, **options)
    return out


def join(x: Tensor, weight: Tensor, residual: Tensor, eps: float, plus: bool, ahead: int, out: Tensor | None = None
         ) -> Tensor:
    """What fuse.py's `join` says, on a GPU."""
    out, columns, pdl = torch.empty_like(x) if out is None else out, len(weight), early(x.device)
    _join[(1,)](x, weight, residual, out, eps, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns), PLUS=plus,
                EARLY=bool(ahead), PDL=pdl, num_warps=8, **({"launch_pdl": True} if pdl else {}))
    return out


@triton.jit
def _begin(EARLY: tl.constexpr, PDL: tl.constexpr):
    """Wait for the kernel before this one, and let the next begin: before that (EARLY), or after."""
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL and not EARLY:  # what comes next may read what was written long before, without waiting
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _pause(time):
    """So many nanoseconds: all that is read ahead at once holds up what the kernel before still has to read."""
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < time:
        now = tl.extra.cuda.globaltimer()
    tl.debug_barrier()


@triton.jit
def _normed(x, scale, weight, PLUS: tl.constexpr):
    """As transformers rounds it: Llama's norm rounds before the weight, Gemma's (PLUS) after it."""
    if PLUS:
        return (x.to(tl.float32) * scale * (1.0 + weight.to(tl.float32))).to(x.dtype).to(tl.float32)
    return ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def _tile(w, block, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """[GROUPS, LINES, BLOCK]: a thread has eight columns of one line, in every group."""
    column = block * BLOCK + tl.arange(0, BLOCK)[None]
    row = tl.arange(0, GROUPS * LINES)[:, None]
    place = w + row * COLUMNS + column
    if COLUMNS % BLOCK == 0:
        tile = tl.load(place, eviction_policy="evict_first")
    else:
        tile = tl.load(place, mask=(column < COLUMNS) & (row >= 0), other=0.0, eviction_policy="evict_first")
    return tl.reshape(tile, [GROUPS, LINES, BLOCK])


@triton.jit
def _part(x, block, COLUMNS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """[1, LINES, BLOCK], each line the same: as the weights lie among the threads, so that nothing moves."""
    column = block * BLOCK + tl.arange(0, BLOCK)[None] + tl.arange(0, LINES)[:, None] * 0
    part = tl.load(x + column) if COLUMNS % BLOCK == 0 else tl.load(x + column, mask=column < COLUMNS, other=0.0)
    return tl.reshape(part, [1, LINES, BLOCK])


@triton.jit
def _parts(x, COUNT: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    parts = (_part(x, 0, COLUMNS, LINES, BLOCK),)  # Triton knows + of tuples, not unpacking
    for block in tl.static_range(1, COUNT):
        parts = parts + (_part(x, block, COLUMNS, LINES, BLOCK),)  # noqa: RUF005
    return parts


@triton.jit
def _sums(x, GROUPS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Each thread's own eight columns are added up: the others are left for the end."""
    return tl.sum(tl.reshape(x, [GROUPS, LINES, BLOCK // 8, 8]), 3)


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == 1:
        return x / (1.0 + tl.exp(-x))
    elif ACT == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 3:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _chosen(w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, WEIGHTS: tl.constexpr, BIASES: tl.constexpr,
            ACT: tl.constexpr):
    """Which of up to three weights is this program's (of a gate's two both are): it, its bias, its rows, where they
    begin in the result, whether there is a bias, and the program's number among its own."""
    number = tl.program_id(0)
    w, b, size, base, has = w0, b0, size0, 0, BIASES % 2 > 0
    if ACT == 0:
        if WEIGHTS > 2:
            if number >= start2:
                w, b, size, base, has = w2, b2, size2, size0 + size1, BIASES // 4 > 0
                number -= start2
            elif number >= start1:
                w, b, size, base, has = w1, b1, size1, size0, BIASES // 2 % 2 > 0
                number -= start1
        elif WEIGHTS > 1:  # noqa: SIM102 (that is asked when compiling)
            if number >= start1:
                w, b, size, base, has = w1, b1, size1, size0, BIASES // 2 % 2 > 0
                number -= start1
    return w, b, size, base, has, number


@triton.jit
def _product(x, norm, added, out, w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, eps,
             COLUMNS: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
             WEIGHTS: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr, BIASES: tl.constexpr,
             ACT: tl.constexpr, ADDED: tl.constexpr, SPREAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    NEAR: tl.constexpr = min(BLOCKS, 8)  # blocks of the row that are fetched at once
    GROUPS: tl.constexpr = ROWS // LINES
    GATE: tl.constexpr = ACT > 0
    w, b, size, base, has, number = _chosen(w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, WEIGHTS,
                                            BIASES, ACT)
    # The last program of a weight begins so early that it has all its rows: some are then computed twice.
    row = tl.minimum(number * ROWS, size - ROWS)
    w += row.to(tl.int64) * COLUMNS
    other = w1 + row.to(tl.int64) * COLUMNS
    where = row + tl.arange(0, GROUPS)[:, None] * LINES + tl.arange(0, LINES)[None]
    if SPREAD:
        if not ADDED:  # mostly attention comes next, which has little to read
            tl.extra.cuda.gdc_launch_dependents()
        _pause(tl.program_id(0) * SPREAD)
    tiles = (_tile(w, 0, COLUMNS, GROUPS, LINES, BLOCK),)
    others = tiles
    if GATE:
        others = (_tile(other, 0, COLUMNS, GROUPS, LINES, BLOCK),)
    for block in tl.static_range(1, AHEAD):
        if block < BLOCKS:
            tiles = tiles + (_tile(w, block, COLUMNS, GROUPS, LINES, BLOCK),)  # noqa: RUF005
            if GATE:
                others = others + (_tile(other, block, COLUMNS, GROUPS, LINES, BLOCK),)  # noqa: RUF005
    bias, bias2 = 0.0, 0.0
    if BIASES:
        bias = tl.load(b + where, mask=where < size * has, other=0.0).to(tl.float32)
    if GATE and BIASES > 1:
        bias2 = tl.load(b1 + where).to(tl.float32)
    gains = (0,)
    if NORM:
        gains = _parts(norm, BLOCKS, COLUMNS, LINES, BLOCK)
    _begin(EARLY, PDL)
    plus = 0.0
    parts = _parts(x, NEAR, COLUMNS, LINES, BLOCK)
    if ADDED:
        plus = tl.load(added + where).to(tl.float32)
    total = tl.zeros([GROUPS, LINES, BLOCK // 8], tl.float32)
    total2 = tl.zeros([GROUPS, LINES, BLOCK // 8], tl.float32)
    squares = tl.zeros([1, LINES, BLOCK // 8], tl.float32)
    for block in tl.static_range(0, BLOCKS):
        if block + AHEAD < BLOCKS:
            tiles = tiles + (_tile(w, block + AHEAD, COLUMNS, GROUPS, LINES, BLOCK),)  # noqa: RUF005
            if GATE:
                others = others + (_tile(other, block + AHEAD, COLUMNS, GROUPS, LINES, BLOCK),)  # noqa: RUF005
        if block + NEAR < BLOCKS:
            parts = parts + (_part(x, block + NEAR, COLUMNS, LINES, BLOCK),)  # noqa: RUF005
        part = parts[block].to(tl.float32)
        if NORM:  # its scale is applied to the sums: nothing waits for the squares
            squares += _sums(part * part, 1, LINES, BLOCK)
            gain = gains[block].to(tl.float32)
            if PLUS:
                gain += 1.0
            part *= gain
        total += _sums(tiles[block].to(tl.float32) * part, GROUPS, LINES, BLOCK)
        if GATE:
            total2 += _sums(others[block].to(tl.float32) * part, GROUPS, LINES, BLOCK)
    dtype = out.dtype.element_ty
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 2) / COLUMNS + eps)
    result = (tl.sum(total, 2) * scale + bias).to(dtype).to(tl.float32)
    if GATE:
        second = (tl.sum(total2, 2) * scale + bias2).to(dtype).to(tl.float32)
        result = _activate(result, ACT).to(dtype).to(tl.float32) * second
    tl.store(out + base + where, (result + plus).to(dtype))


@triton.jit
def _join(x, weight, residual, out, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PLUS: tl.constexpr,
          EARLY: tl.constexpr, PDL: tl.constexpr):
    its = _part(weight, 0, COLUMNS, 1, BLOCK)
    _begin(EARLY, PDL)
    before, part = _part(residual, 0, COLUMNS, 1, BLOCK), _part(x, 0, COLUMNS, 1, BLOCK)
    scale = tl.rsqrt(tl.sum(part.to(tl.float32) * part.to(tl.float32), 2, keep_dims=True) / COLUMNS + eps)
    sum = before.to(tl.float32) + _normed(part, scale, its, PLUS)
    column = tl.arange(0, BLOCK)[None, None]
    tl.store(out + column, sum.to(part.dtype), mask=column < COLUMNS)
