"""One token's attention and the product behind it, of heads of 64 in bf16: attend.cu, then product.cu.

A program has a query head and a part of the slots, and what the parts say is put together by the product that comes
next, each program for itself: a kernel more, or programs that wait for each other, would take longer than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specbeam.runners import cuda, small
from specbeam.runners.fuse import ops

_DIM = 64


def shares(view: int) -> tuple[int, int] | None:
    """Slots that a program has, and its warps; None: more than is measured."""
    if view <= 1024:
        return 128, 8
    return (256, 8) if view <= 2048 else None


def attended(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor,
             view: int, mask: Tensor, scale: float, weight: Tensor, bias: Tensor | None, added: Tensor | None,
             ahead: bool) -> Tensor:
    """What fuse.py's `attended` says, on a GPU."""
    given = (q, k, v, cos, sin, keys, values, slot, mask)
    out = _by_cuda(given, view, scale, weight, bias, added) if ahead and slot.numel() == 1 else None
    if out is not None:
        return out
    x = ops.attend.default(q, k, v, None, None, 0.0, False, cos, sin, keys, values, slot, view, mask, scale, ahead)
    return ops.product.default(x.flatten(2), None, None, None, 0.0, False, [weight], [bias], "", added, ahead)


def _by_cuda(given: tuple[Tensor, ...], view: int, scale: float, weight: Tensor, bias: Tensor | None,
             added: Tensor | None) -> Tensor | None:
    """None: not for these kernels."""
    from specbeam.runners.matvec import early

    q, k, v, cos, sin, keys, values, slot, mask = given
    [rows, columns], share, strides = weight.shape, shares(view), (*keys.stride()[1:3], *values.stride()[1:3])
    tile = small.tiling(rows, columns, False, False, 4)
    wide = [one for one in (q, k, v, cos, sin, keys, values, weight, bias, added) if one is not None]
    if not (early(q.device) and share and tile and rows >= tile[0] and keys.shape[3] == _DIM
            and keys.stride(3) == values.stride(3) == mask.stride(3) == 1 and q.numel() == columns
            and all(one.dtype == torch.bfloat16 for one in wide) and not any(stride % 8 for stride in strides)
            and all(one.is_contiguous() for one in (q, k, v, cos, sin, weight))
            and not any(one.data_ptr() % 16 for one in (*given[:7], weight))):
        return None
    [slots, warps], heads = share, columns // _DIM
    parts = -(-view // slots)
    attention = cuda.found("attend", q.device, VIEW=view, SLOTS=slots, HEADS=heads, GROUP=heads // keys.shape[1],
                           WARPS=warps)
    product = cuda.found("product", q.device, COLUMNS=columns, ROWS=tile[0], WARPS=tile[1], WEIGHTS=1, NORM=0, PLUS=0,
                         ACT=0, ADDED=int(added is not None), PARTS=parts)
    if attention is None or product is None:
        return None
    said, out = q.new_empty(parts * heads * (_DIM + 2), dtype=torch.float32), q.new_empty(1, 1, rows)
    cuda.launch(attention, q.device, heads * parts, 32 * warps, cuda.attention(
        q, k, v, cos, sin, keys, values, slot, mask, said, scale))
    cuda.launch(product, q.device, -(-rows // tile[0]), 32 * tile[1], cuda.product(
        said, None, added, out, [weight], [bias], 0.0))
    return out
