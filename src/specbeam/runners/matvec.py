# Tuples of tiles grow in the kernels.
# mypy: disable-error-code="assignment,attr-defined"
"""One row times weights, as fast as they can be read.

At batch 1 a decoder layer is a handful of products of one row, each of which reads its weights once. What such a kernel
loses is its beginning and its end: nothing is read while the one before it ends, its results become visible and its
input is fetched. Here a kernel begins while those before it still run (programmatic dependent launch, Hopper and later)
and reads its first weights before it waits for them; weights depend on no kernel. Several weights that have the same
input are one kernel, which chooses among them by program; the norm before and the sum after it are done in it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners.fuse import MOST_WEIGHTS

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class Tiling:
    """rows of weights a program has, columns that it reads at a time, how many such blocks it has in flight."""

    rows: int
    block: int
    ahead: int
    warps: int = 4


def tiling(rows: int, columns: int, gated: bool) -> Tiling:
    """As measured on an H100, for products of 1 to 200 MB."""
    block = min(1024, triton.next_power_of_2(columns))
    if gated:
        return Tiling(2, block, 1, 2) if columns <= block else Tiling(4, block, 2)
    if columns > 4 * block:
        return Tiling(4, block, 3)
    return Tiling(8 if rows >= 1024 else 4, block, 2)


def early(device: torch.device) -> bool:
    """Whether kernels can begin before the one before them has ended."""
    return (device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (9, 0))


def product(x: Tensor, post: Tensor | None, residual: Tensor | None, norm: Tensor | None, eps: float, plus: bool,
            weights: Sequence[Tensor], biases: Sequence[Tensor | None], act: str, added: Tensor | None, ahead: bool,
            tile: Tiling | None = None) -> Tensor:
    """What fuse.py's `product` says, for one row on a GPU."""
    columns, gated = weights[0].shape[1], bool(act)
    sizes = [len(weight) for weight in weights]
    total = sizes[0] if gated else sum(sizes)
    first = weights[0]
    out = first.new_empty(1, 1, total + (columns if post is not None else 0))
    tile = tile or tiling(total, columns, gated)
    programs = [triton.cdiv(size, tile.rows) for size in (sizes[:1] if gated else sizes)]
    w = [*weights, *[first] * (MOST_WEIGHTS - len(weights))]
    b = [first if one is None else one for one in [*biases, *[None] * (MOST_WEIGHTS - len(biases))]]
    starts = [sum(programs[:n]) for n in range(1, MOST_WEIGHTS)]
    options = {"launch_pdl": True} if early(x.device) else {}
    _product[(sum(programs),)](
        x, first if post is None else post, first if residual is None else residual, first if norm is None else norm,
        first if added is None else added, out, *w, *b, *starts, *(sizes + [0] * MOST_WEIGHTS)[:MOST_WEIGHTS], eps,
        COLUMNS=columns, ROWS=tile.rows, BLOCK=tile.block, AHEAD=tile.ahead, WEIGHTS=len(weights),
        POST=post is not None, NORM=norm is not None, PLUS=plus,
        BIASES=sum(2**n for n, one in enumerate(biases) if one is not None), ACT=ACTIVATIONS.index(act),
        ADDED=added is not None, EARLY=ahead, PDL=bool(options), num_warps=tile.warps, **options)
    return out


def join(x: Tensor, weight: Tensor, residual: Tensor, eps: float, plus: bool, ahead: bool) -> Tensor:
    """What fuse.py's `join` says, on a GPU."""
    out, columns, pdl = torch.empty_like(x), len(weight), early(x.device)
    _join[(1,)](x, weight, residual, out, eps, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns), PLUS=plus,
                EARLY=ahead, PDL=pdl, num_warps=8, **({"launch_pdl": True} if pdl else {}))
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
def _normed(x, scale, weight, PLUS: tl.constexpr):
    """As transformers rounds it: Llama's norm rounds before the weight, Gemma's (PLUS) after it."""
    if PLUS:
        return (x.to(tl.float32) * scale * (1.0 + weight.to(tl.float32))).to(x.dtype).to(tl.float32)
    return ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def _scale(parts, eps, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    squares = parts[0].to(tl.float32) * parts[0].to(tl.float32)
    for block in tl.static_range(1, BLOCKS):
        squares += parts[block].to(tl.float32) * parts[block].to(tl.float32)
    return tl.rsqrt(tl.sum(squares) / COLUMNS + eps)


@triton.jit
def _tile(w, block, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)
    place = w + tl.arange(0, ROWS)[:, None] * COLUMNS + column[None]
    if COLUMNS % BLOCK == 0:
        return tl.load(place, eviction_policy="evict_first")
    return tl.load(place, mask=column[None] < COLUMNS, other=0.0, eviction_policy="evict_first")


@triton.jit
def _part(x, block, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)[None]
    if COLUMNS % BLOCK == 0:
        return tl.load(x + column)
    return tl.load(x + column, mask=column < COLUMNS, other=0.0)


@triton.jit
def _parts(x, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    parts = (_part(x, 0, COLUMNS, BLOCK),)  # Triton knows + of tuples, not unpacking
    for block in tl.static_range(1, BLOCKS):
        parts = parts + (_part(x, block, COLUMNS, BLOCK),)  # noqa: RUF005
    return parts


@triton.jit
def _sums(w, x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each thread's own eight columns are added up: the others are left for the end."""
    return tl.sum(tl.reshape(w.to(tl.float32) * x, [ROWS, BLOCK // 8, 8]), 2)


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
def _product(x, post, residual, norm, added, out, w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, eps,
             COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
             WEIGHTS: tl.constexpr, POST: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr, BIASES: tl.constexpr,
             ACT: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    GATE: tl.constexpr = ACT > 0
    w, b, size, base, has, number = _chosen(w0, w1, w2, b0, b1, b2, start1, start2, size0, size1, size2, WEIGHTS,
                                            BIASES, ACT)
    # The last program of a weight begins so early that it has all its rows: some are then computed twice.
    row = tl.minimum(number * ROWS, size - ROWS)
    w += row.to(tl.int64) * COLUMNS
    other = w1 + row.to(tl.int64) * COLUMNS
    where = row + tl.arange(0, ROWS)
    tiles = (_tile(w, 0, COLUMNS, ROWS, BLOCK),)
    others = tiles
    if GATE:
        others = (_tile(other, 0, COLUMNS, ROWS, BLOCK),)
    for block in tl.static_range(1, AHEAD):
        if block < BLOCKS:
            tiles = tiles + (_tile(w, block, COLUMNS, ROWS, BLOCK),)  # noqa: RUF005
            if GATE:
                others = others + (_tile(other, block, COLUMNS, ROWS, BLOCK),)  # noqa: RUF005
    bias, bias2 = 0.0, 0.0
    if BIASES:
        bias = tl.load(b + where, mask=where < size * has, other=0.0).to(tl.float32)
    if GATE and BIASES > 1:
        bias2 = tl.load(b1 + where).to(tl.float32)
    norms, posts = (0,), (0,)
    if NORM:
        norms = _parts(norm, COLUMNS, BLOCK, BLOCKS)
    if POST:
        posts = _parts(post, COLUMNS, BLOCK, BLOCKS)
    _begin(EARLY, PDL)
    plus = 0.0
    if ADDED:
        plus = tl.load(added + where).to(tl.float32)
    parts, scale = (0,), 1.0
    if NORM or POST:
        parts = _parts(x, COLUMNS, BLOCK, BLOCKS)
    if POST:
        residuals = _parts(residual, COLUMNS, BLOCK, BLOCKS)
        before, joined = _scale(parts, eps, COLUMNS, BLOCKS), ()
        for block in tl.static_range(0, BLOCKS):
            sum = _normed(parts[block], before, posts[block], PLUS) + residuals[block].to(tl.float32)
            joined = joined + (sum.to(x.dtype.element_ty),)  # noqa: RUF005
            if tl.program_id(0) == 0:
                column = block * BLOCK + tl.arange(0, BLOCK)[None]
                start = size0 if GATE else size0 + size1 + size2
                tl.store(out + start + column, joined[block], mask=column < COLUMNS)
        parts = joined
    if NORM:
        scale = _scale(parts, eps, COLUMNS, BLOCKS)
    total = tl.zeros([ROWS, BLOCK // 8], tl.float32)
    total2 = tl.zeros([ROWS, BLOCK // 8], tl.float32)
    for block in tl.static_range(0, BLOCKS):
        if block + AHEAD < BLOCKS:
            tiles = tiles + (_tile(w, block + AHEAD, COLUMNS, ROWS, BLOCK),)  # noqa: RUF005
            if GATE:
                others = others + (_tile(other, block + AHEAD, COLUMNS, ROWS, BLOCK),)  # noqa: RUF005
        if NORM:
            part = _normed(parts[block], scale, norms[block], PLUS)
        elif POST:
            part = parts[block].to(tl.float32)
        else:
            part = _part(x, block, COLUMNS, BLOCK).to(tl.float32)
        total += _sums(tiles[block], part, ROWS, BLOCK)
        if GATE:
            total2 += _sums(others[block], part, ROWS, BLOCK)
    dtype = out.dtype.element_ty
    result = (tl.sum(total, 1) + bias).to(dtype).to(tl.float32)
    if GATE:
        second = (tl.sum(total2, 1) + bias2).to(dtype).to(tl.float32)
        result = _activate(result, ACT).to(dtype).to(tl.float32) * second
    tl.store(out + base + where, (result + plus).to(dtype))


@triton.jit
def _join(x, weight, residual, out, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PLUS: tl.constexpr,
          EARLY: tl.constexpr, PDL: tl.constexpr):
    its = _part(weight, 0, COLUMNS, BLOCK)
    _begin(EARLY, PDL)
    before, part = _part(residual, 0, COLUMNS, BLOCK), _part(x, 0, COLUMNS, BLOCK)
    sum = before.to(tl.float32) + _normed(part, _scale((part,), eps, COLUMNS, 1), its, PLUS)
    column = tl.arange(0, BLOCK)[None]
    tl.store(out + column, sum.to(part.dtype), mask=column < COLUMNS)


def argmax(scores: Tensor) -> Tensor:
    """The first of the largest scores [..., vocabulary], on a GPU: torch's takes 10 µs for 32,000."""
    rows, size = scores.numel() // scores.shape[-1], scores.shape[-1]
    parts = triton.cdiv(size, 4096)
    best = scores.new_empty(rows, parts, dtype=torch.float32)
    which, out = torch.empty_like(best, dtype=torch.int64), scores.new_empty(scores.shape[:-1], dtype=torch.int64)
    options = {"launch_pdl": True} if early(scores.device) else {}
    _best[(rows, parts)](scores.contiguous(), best, which, size, BLOCK=4096, PDL=bool(options), num_warps=8, **options)
    _best_of_all[(rows,)](best, which, out, parts, BLOCK=triton.next_power_of_2(parts), PDL=bool(options), num_warps=1,
                          **options)
    return out


@triton.jit
def _best(scores, best, which, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row.to(tl.int64) * size + place, mask=place < size, other=-float("inf")).to(tl.float32)
    most, at = tl.max(score, 0, return_indices=True)
    tl.store(best + row * tl.num_programs(1) + part, most)
    tl.store(which + row * tl.num_programs(1) + part, (part * BLOCK + at).to(tl.int64))


@triton.jit
def _best_of_all(best, which, out, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.arange(0, BLOCK)
    score = tl.load(best + row * parts + part, mask=part < parts, other=-float("inf"))
    _, at = tl.max(score, 0, return_indices=True)
    tl.store(out + row, tl.load(which + row * parts + at))
