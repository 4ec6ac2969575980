"""One row times weights in layers so small that little of their time is reading: product.cu and stored.cu, compiled and
launched.

All weights of a program are on their way before its row is there, and the next kernel begins at once: a small layer's
weights fit into the card's registers together, or into its registers and its shared memory, and all of its products
read while one of them computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from specbeam.runners import cuda
from specbeam.runners.fuse import STORED

# Bytes a multiprocessor, gate and what comes behind it. Less fit into registers, which is faster (Qwen3's 0.6B 147 KB:
# 0.41 ms a step for 0.45, SmolLM's 360M 0.34 for 0.42); more not beside what all programs share. Qwen2.5's 0.5B: 196.
_STORED = 160 * 1024, 204 * 1024
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu")


def tiling(rows: int, columns: int, gated: bool, normed: bool, most: int = 0) -> tuple[int, int] | None:
    """Rows that a program of product.cu has, and its warps. most: steps of a warp, where stored weights or attention
    (attended.py) decide. As measured on an H200 within layers of ten models, in which it takes 2 to 35 % less time than
    Triton's; None where Triton's is the faster one, or may be."""
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


def stores(gate: Tensor) -> bool:
    """Whether a layer's gate (its weights [inner, hidden]) and the product behind it wait in shared memory."""
    [inner, hidden] = gate.shape
    if not gate.is_cuda or gate.dtype != torch.bfloat16 or hidden % 32 or inner % 32:
        return False
    from specbeam.runners.matvec import early

    programs = _processors(gate.device)
    both = ((inner, hidden, True), (hidden, inner, False))
    numbers = sum(layout(rows, columns, gated, programs)["ROWS"] * columns for rows, columns, gated in both)
    return early(gate.device) and _STORED[0] < 2 * numbers <= _STORED[1]


def split(ahead: int) -> int:
    """Of an SM's memory, for all kernels of a layer."""
    return cuda.ALL if ahead == STORED else cuda.SOME


def layout(rows: int, columns: int, gated: bool, programs: int) -> dict[str, int]:
    """What stored.cu is compiled for: one program for each of a card's multiprocessors, so that each has as much to
    read, by pieces of about 8 KB. As measured on an H200, where it matters most how much is under way."""
    steps, share = columns // 32, -(-rows // programs)
    across = max(count for count in range(1, 9) if steps % count == 0)
    bands = max(2 if gated else 1, -(-share // (8 * across)))
    lines = max(1, 8192 // (2 * columns), -(-share // (16 if gated else 32)))
    depth, pieces = (28 if gated else 20) * 1024 // (2 * columns * lines), (2 if gated else 1) * -(-share // lines)
    return {"ROWS": 2 * share if gated else share, "ACROSS": across, "BANDS": bands, "AT_ONCE": lines,
            "DEPTH": max(1, depth), "LATE": pieces // 3 if gated else 0, "LEAST": 4 if gated else 5}


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(x: Tensor, norm: Tensor | None, eps: float, plus: bool, weights: Sequence[Tensor],
            biases: Sequence[Tensor | None], act: str, added: Tensor | None, ahead: int, out: Tensor) -> bool:
    """Whether product.cu or stored.cu did it."""
    sizes = [len(weight) for weight in weights][:1 if act else None]
    columns, given = weights[0].shape[1], {"WEIGHTS": len(weights), "PARTS": 0}
    stored = ahead == STORED and (bool(act) or norm is None)
    if stored:
        given = layout(sizes[0], columns, bool(act), _processors(x.device))
    elif shape := tiling(sum(sizes), columns, bool(act), norm is not None, 4 if ahead == STORED else 0):
        given["ROWS"], given["WARPS"] = shape
    else:
        return False
    rows, warps = given["ROWS"], given["ACROSS"] * given["BANDS"] + 1 if stored else given["WARPS"]
    share, memory = rows // 2 if act else rows, 2 * rows * columns if stored else 0
    every = [one for one in (x, norm, added, *weights, *biases) if one is not None]
    if min(sizes) < share or any(one.dtype != torch.bfloat16 for one in every) or any(
            one.data_ptr() % 16 for one in (x, *([] if norm is None else [norm]), *weights)):
        return False
    function = cuda.found("stored" if stored else "product", x.device, split(ahead), memory, COLUMNS=columns,
                          NORM=int(norm is not None), PLUS=int(plus and norm is not None),
                          ACT=ACTIVATIONS.index(act), ADDED=int(added is not None), **given)
    if function is None:
        return False
    cuda.launch(function, x.device, sum(-(-size // share) for size in sizes), 32 * warps,
                cuda.product(x, norm, added, out, weights, biases, eps), memory)
    return True
