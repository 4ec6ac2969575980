"""Kernels in CUDA C++: each file compiles for the cards that it is for, without one at hand."""

from __future__ import annotations

import pytest

from specbeam.runners import cuda

pytest.importorskip("cuda.bindings.nvrtc")


def code(name: str, **given: int) -> bytes:
    try:
        return cuda.compiled(name, 9, 0, **given)
    except RuntimeError as failure:
        if "libnvrtc" not in str(failure):
            raise
        pytest.skip("the bindings find no compiler")


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("view", [256, 300, 512])
def test_attention_compiles(view, warps):
    assert b"attend" in code("attend", DIM=64, VIEW=view, GROUP=7, WARPS=warps)


def test_what_the_compiler_says_is_said():
    code("attend", DIM=64, VIEW=256, GROUP=1, WARPS=4)
    with pytest.raises(RuntimeError, match="DIM"):
        cuda.compiled("attend", 9, 0, VIEW=256, GROUP=1, WARPS=4)
