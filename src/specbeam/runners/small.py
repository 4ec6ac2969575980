"""One row times weights in layers so small that little of their time is reading: product.cu, compiled and launched.

All weights of a program are on their way before its row is there, and the next kernel begins at once: a small layer's
weights fit into the card's registers together, and all of its products read while one of them computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specbeam.runners import cuda

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu")


def tiling(rows: int, columns: int, gated: bool, normed: bool, most: int = 0) -> tuple[int, int] | None:
    """Rows that a program of product.cu has, and its warps. most: steps of a warp, for attended.py. As
    measured on an H200 within layers of ten models, in which it takes 2 to 35 % less time than Triton's; None where
    Triton's is the faster one, or may be."""
    steps, rest = divmod(columns, 32)

    def warps(most: int) -> int:
        """The fewest that have at most so many steps each."""
        return next(count for count in range(1, steps + 1) if steps % count == 0 and steps <= most * count)

    if rest or not steps or rows > 16384:
        return None
    shape: tuple[int, int] | None
    if most:
        shape = 8, warps(most)
    elif gated:
        shape = (32, warps(8)) if columns <= 1024 else None
    elif normed:
        shape = (8, warps(8)) if columns <= 2560 else None
    elif columns <= 1024:
        shape = 8, warps(5)
    elif warps(8) <= 16:
        shape = 8, warps(8)
    elif rows < 2048:
        shape = 8, warps(28)
    else:
        shape = (16, warps(16)) if warps(16) <= 12 else None
    return shape if shape and shape[1] <= 16 else None


def product(x: Tensor, norm: Tensor | None, eps: float, plus: bool, weights: Sequence[Tensor],
            biases: Sequence[Tensor | None], act: str, added: Tensor | None, out: Tensor) -> bool:
    """Whether product.cu did it."""
    sizes = [len(weight) for weight in weights][:1 if act else None]
    shape = tiling(sum(sizes), weights[0].shape[1], bool(act), norm is not None)
    if shape is None:
        return False
    share = shape[0] // 2 if act else shape[0]
    given = [one for one in (x, norm, added, *weights, *biases) if one is not None]
    if min(sizes) < share or any(one.dtype != torch.bfloat16 for one in given) or any(
            one.data_ptr() % 16 for one in (x, *([] if norm is None else [norm]), *weights)):
        return False
    function = cuda.found("product", x.device, COLUMNS=weights[0].shape[1], ROWS=shape[0], WARPS=shape[1],
                          WEIGHTS=len(weights), NORM=int(norm is not None), PLUS=int(plus and norm is not None),
                          ACT=ACTIVATIONS.index(act), ADDED=int(added is not None), PARTS=0)
    if function is None:
        return False
    cuda.launch(function, x.device, sum(-(-size // share) for size in sizes), 32 * shape[1],
                cuda.product(x, norm, added, out, weights, biases, eps))
    return True
