"""One row's products in CUDA C++, on a CPU (test_cuda.py) and compiled: on a card test_matvec.py runs them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_cuda import code, emulated, some

from specbeam.runners import cuda, fuse, small


def multiplied(folder, columns, sizes, normed, plus, act, added, biased, rows, warps, fault=None):
    """What product.cu gives, and the same by fuse.py's twin in fp64."""
    x, norm = 3 * some(1, 1, columns, seed=1), 1 + some(columns, seed=2) / 9 if normed else None
    weights = [some(size, columns, seed=3 + n) * columns**-0.5 for n, size in enumerate(sizes)]
    biases = [some(size, seed=7 + n) if biased and n != 1 else None for n, size in enumerate(sizes)]
    out = torch.full((1, 1, sizes[0] if act else sum(sizes)), torch.nan).bfloat16()
    last = some(*out.shape, seed=11) if added else None

    def wide(one):
        return None if one is None else one.double()

    wanted = fuse._product(wide(x), None, None, wide(norm), 1e-6, plus, [wide(one) for one in weights],
                           [wide(one) for one in biases], act, wide(last), True)
    library = emulated(folder, "product", fault, COLUMNS=columns, WARPS=warps, ROWS=rows, WEIGHTS=len(sizes),
                       NORM=int(normed), PLUS=int(plus), ACT=small.ACTIVATIONS.index(act), ADDED=int(added), PARTS=0)
    share = rows // 2 if act else rows
    programs = sum(-(-size // share) for size in (sizes[:1] if act else sizes))
    library.run(ctypes.byref(cuda.product(x, norm, last, out, weights, biases, 1e-6)), programs, 32 * warps)
    return out.double(), wanted


@pytest.mark.parametrize(("columns", "sizes", "normed", "plus", "act", "added", "biased", "rows", "warps"), [
    (896, [56, 24, 16], True, False, "", False, True, 8, 4), (896, [64, 20, 24], True, True, "", False, False, 16, 4),
    (896, [40], False, False, "", True, False, 8, 7), (256, [40], False, False, "", True, True, 8, 2),
    (512, [24, 24], True, False, "silu", False, False, 16, 4), (32, [24, 9], True, False, "", False, False, 8, 1),
    (512, [24, 24], True, True, "gelu_tanh", False, True, 8, 4), (96, [20, 20], True, False, "gelu", False, True, 8, 1),
    (1024, [28], False, False, "", True, False, 16, 8), (576, [40, 40], True, False, "relu", False, True, 32, 3)])
def test_one_row_times_weights(columns, sizes, normed, plus, act, added, biased, rows, warps, tmp_path):
    found, wanted = multiplied(tmp_path, columns, sizes, normed, plus, act, added, biased, rows, warps)
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("fault", [
    ("first_of(s) + pair >= 4 * s && ", ""), ("d[t][i][0] + d[t][i][3]", "d[t][i][0] + d[t][i][2]"),
    ("pair == j - first_of(s)", "pair == j % 4"), ("    __syncthreads();\n    if", "    if"),
    ("second = gained(second,", "second = gained(first,"), ("sum * scale + later(bias))", "sum * scale)")],
    ids=["steps twice", "other half", "steps mixed", "no barrier", "gains mixed", "no bias"])
def test_a_fault_in_a_product_shows(fault, tmp_path):
    found, wanted = multiplied(tmp_path, 896, [56, 24, 16], True, False, "", False, True, 8, 4, fault)
    assert not (found - wanted).norm() < 2e-2 * wanted.norm()


# Rows and columns of a layer's four products, and those of their results that are a gate's or come after a norm.
LAYERS = [(896, 1152, 896, 4864), (576, 960, 576, 1536), (960, 1600, 960, 2560), (2048, 2560, 2048, 5632),
          (1536, 2048, 1536, 8960), (2048, 3072, 2048, 8192), (4096, 6144, 4096, 14336), (2560, 4096, 2048, 10240)]


@pytest.mark.parametrize(("hidden", "qkv", "heads", "inner"), LAYERS)
def test_products_of_known_layers_compile_and_fit(hidden, qkv, heads, inner):
    """Of registers a Hopper has 65,536 for a program's threads, and 255 for each."""
    found = 0
    for rows, columns, gated, normed in [(qkv, hidden, False, True), (hidden, heads, False, False),
                                         (inner, hidden, True, True), (hidden, inner, False, False)]:
        shape = small.tiling(rows, columns, gated, normed)
        if shape is not None:
            numbers = 4 * (columns // 32 // shape[1]) * (shape[0] // 8)
            assert numbers + 40 <= 255 and (numbers + 40) * 32 * shape[1] <= 65536
            code("product", COLUMNS=columns, ROWS=shape[0], WARPS=shape[1], WEIGHTS=1 + gated, NORM=int(normed), PLUS=0,
                 ACT=int(gated), ADDED=int(not normed), PARTS=0)
            found += 1
    assert found >= 1


def test_large_or_odd_products_stay_with_triton():
    assert small.tiling(151936, 896, False, True) is None  # an output layer
    assert small.tiling(896, 904, False, False) is None and small.tiling(64, 16, False, False) is None
    assert small.tiling(4096, 14336, False, False) is None and small.tiling(8192, 2048, True, True) is None
