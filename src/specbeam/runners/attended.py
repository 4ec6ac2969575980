"""One token's attention and the product behind it, in bf16: attend.cu, then product.cu.

A program has a query head and a part of the slots, and what the parts say is put together by the product that comes
next, each program for itself: a kernel more, or programs that wait for each other, would take longer than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specbeam.runners import cuda, small
from specbeam.runners.fuse import ops


def shares(view: int, dim: int) -> tuple[int, int] | None:
    """Slots that a program has, and its warps, as measured on an H200; None: Triton's is faster, or may be."""
    if dim not in (64, 128) or view > (2048 if dim == 64 else 768):
        return None
    return (128, 8) if view <= 1024 else (256, 8)


def attended(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
             cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor,
             scale: float, weight: Tensor, bias: Tensor | None, added: Tensor | None, ahead: int) -> Tensor:
    """What fuse.py's `attended` says, on a GPU."""
    if ahead and slot.numel() == 1:
        out = _by_cuda(
            q, k, v, q_norm, k_norm, eps, plus, cos, sin, keys, values, slot, view, mask, scale, weight, bias, added,
            small.split(ahead))
        if out is not None:
            return out
    x = ops.attend.default(q, k, v, q_norm, k_norm, eps, plus, cos, sin, keys, values, slot, view, mask, scale, ahead)
    return ops.product.default(x.flatten(2), None, None, None, 0.0, False, [weight], [bias], "", added, ahead)


def _by_cuda(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, plus: bool,
             cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, view: int, mask: Tensor,
             scale: float, weight: Tensor, bias: Tensor | None, added: Tensor | None, split: int) -> Tensor | None:
    """None: not for these kernels."""
    from specbeam.runners.matvec import early

    [rows, columns], dim = weight.shape, keys.shape[3]
    share = shares(view, dim)
    tile = small.tiling(rows, columns, False, False, 4)
    whole = [one for one in (q, k, v, q_norm, k_norm, cos, sin, weight, bias, added) if one is not None]
    if not (early(q.device) and share and tile and rows >= tile[0] and q.numel() == columns
            and keys.stride(3) == values.stride(3) == mask.stride(3) == 1
            and not any(stride % 8 for one in (keys, values) for stride in one.stride()[1:3])
            and all(one.dtype == torch.bfloat16 for one in (*whole, keys, values))
            and all(one.is_contiguous() for one in whole)
            and not any(one.data_ptr() % 16 for one in (q, k, v, keys, values, weight))):
        return None
    [slots, warps], heads = share, columns // dim
    parts = -(-view // slots)
    attention = cuda.found("attend", q.device, split, VIEW=view, SLOTS=slots, HEADS=heads, DIM=dim, WARPS=warps,
                           GROUP=heads // keys.shape[1], NORM=int(q_norm is not None), PLUS=int(plus))
    product = cuda.found("product", q.device, split, COLUMNS=columns, ROWS=tile[0], WARPS=tile[1], WEIGHTS=1, NORM=0,
                         PLUS=0, ACT=0, ADDED=int(added is not None), PARTS=parts, DIM=dim)
    if attention is None or product is None:
        return None
    said, out = q.new_empty(parts * heads * (dim + 2), dtype=torch.float32), q.new_empty(1, 1, rows)
    cuda.launch(attention, q.device, heads * parts, 32 * warps, cuda.attention(
        q, k, v, q_norm, k_norm, cos, sin, keys, values, slot, mask, said, scale, eps))
    cuda.launch(product, q.device, -(-rows // tile[0]), 32 * tile[1], cuda.product(
        said, None, added, out, [weight], [bias], 0.0))
    return out
