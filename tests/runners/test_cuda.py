"""Kernels in CUDA C++: each compiles for the cards that it is for, without one at hand; and does on a CPU, whose
compiler is given CUDA's words by emulated.h, what its plain twin does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from specbeam.runners import cuda, fuse

HERE = Path(__file__).parent
SOURCES = Path(cuda.__file__).parent


def code(name: str, **given: int) -> bytes:
    pytest.importorskip("cuda.bindings.nvrtc", reason="pip install 'specbeam[kernels]'")
    try:
        return cuda.compiled(name, 9, 0, **given)
    except RuntimeError as failure:
        if "libnvrtc" not in str(failure):
            raise
        pytest.skip("no NVRTC: pip install 'specbeam[kernels]'")


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("view", [256, 300, 512])
def test_attention_compiles(view, warps):
    assert b"attend" in code("attend", VIEW=view, GROUP=7, WARPS=warps)


def test_what_the_compiler_says_is_said():
    code("attend", VIEW=256, GROUP=1, WARPS=4)
    with pytest.raises(RuntimeError, match="VIEW"):
        cuda.compiled("attend", 9, 0, GROUP=1, WARPS=4)


def emulated(folder: Path, name: str, fault: tuple[str, str] | None = None, **given: int) -> ctypes.CDLL:
    """The kernel as a library with run(arguments, programs, threads). fault: a line, and what stands there instead."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    text = (SOURCES / f"{name}.cu").read_text(encoding="utf-8")
    if fault is not None:
        assert text.count(fault[0]) == 1
        text = text.replace(*fault)
    text = f'#include "emulated.h"\n{text}\nextern "C" void run(const Args *a, u32 programs, u32 count) ' \
           f'{{ emulate(programs, count, [=] {{ {name}(*a); }}); }}\n'
    (folder / "kernel.cpp").write_text(text, encoding="utf-8")
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", f"-I{SOURCES}",
                    *(f"-D{key}={value}" for key, value in given.items()), "kernel.cpp", "-o", "kernel.so"],
                   cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def attended(folder, here, heads, key_heads, view, warps, fault=None):
    """What attend.cu gives, the slots after it, and the same by fuse.py's twin in fp64."""
    q, k, v = some(1, 1, heads * 64, seed=1), some(1, 1, key_heads * 64, seed=2), some(1, 1, key_heads * 64, seed=3)
    keys, values = (some(1, key_heads, view + 9, 64, seed=n) for n in (4, 5))
    angle = torch.rand(32, generator=torch.Generator().manual_seed(here)).repeat(2)[None, None]
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    mask = torch.rand(1, 1, 1, view, generator=torch.Generator().manual_seed(here)) < 0.05
    mask[..., here], slot = True, torch.tensor([[here]])
    wide = [one.double() for one in (q, k, v, cos, sin, keys, values)]
    wanted = fuse._attend(*wide[:3], None, None, 0.0, False, *wide[3:], slot, view, mask, 0.125, True)
    output = torch.full((1, 1, heads, 64), torch.nan).bfloat16()
    arguments = cuda.attention(q, k, v, cos, sin, keys, values, slot, mask, output, 0.125)
    library = emulated(folder, "attend", fault, VIEW=view, GROUP=heads // key_heads, WARPS=warps)
    library.run(ctypes.byref(arguments), heads, 32 * warps)
    return output.double(), (keys, values), wanted, wide[5:]


@pytest.mark.parametrize(("here", "heads", "key_heads", "view", "warps"), [
    (200, 14, 2, 256, 4), (255, 4, 2, 256, 8), (0, 2, 2, 300, 8), (299, 3, 1, 300, 4), (511, 8, 1, 512, 8)])
def test_one_tokens_attention(here, heads, key_heads, view, warps, tmp_path):
    found, slots, wanted, its = attended(tmp_path, here, heads, key_heads, view, warps)
    assert (found - wanted).norm() < 1e-2 * wanted.norm() and (found - wanted).abs().max() < 0.02
    for mine, other in zip(slots, its, strict=True):
        assert (mine - other).abs().max() < 5e-2  # the new slot is turned in bf16
        others = [slot for slot in range(view + 9) if slot != here]
        assert torch.equal(mine[:, :, others], other[:, :, others].bfloat16())


@pytest.mark.parametrize("fault", [
    ("&& a.mask[slot]", ""), ("== here) key[j] = new_key, value[j] = new_value;", "== here) value[j] = new_value;"),
    ("(place < DIM / 2 ? -other : other)", "other"), ("    __syncthreads();\n    const uint4 q", "    const uint4 q"),
    ("norm += weight * total[", "norm += total[")], ids=["mask", "new key", "rotation", "no barrier", "no weights"])
def test_a_fault_in_it_shows(fault, tmp_path):
    found, _, wanted, _ = attended(tmp_path, 200, 4, 2, 256, 4, fault)
    assert not (found - wanted).abs().max() < 0.02
