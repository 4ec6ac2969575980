"""Kernels in CUDA C++: each compiles for the cards that it is for, without one at hand; and does on a CPU, whose
compiler is given CUDA's words by emulated.h, what its plain twin does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from specbeam.runners import attended, cuda, fuse

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


@pytest.mark.parametrize(("view", "dim"), [(256, 64), (300, 64), (1536, 64), (256, 128), (700, 128)])
def test_attention_compiles(view, dim):
    shares = attended.shares(view, dim)
    assert shares is not None
    assert b"attend" in code("attend", VIEW=view, HEADS=14, GROUP=7, SLOTS=shares[0], WARPS=shares[1], DIM=dim,
                             NORM=int(dim > 64), PLUS=0)


def test_what_the_compiler_says_is_said():
    code("attend", VIEW=256, HEADS=1, GROUP=1, SLOTS=128, WARPS=4, DIM=64, NORM=0, PLUS=0)
    with pytest.raises(RuntimeError, match="VIEW"):
        cuda.compiled("attend", 9, 0, HEADS=1, GROUP=1, SLOTS=128, WARPS=4, DIM=64, NORM=0, PLUS=0)


def emulated(folder: Path, name: str, fault: tuple[str, str] | None = None, **given: int) -> ctypes.CDLL:
    """The kernel as a library with run(arguments, programs, threads). fault: a line of it or of what it
    includes, and what stands there instead."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    texts = {one.name: one.read_text(encoding="utf-8") for one in (*SOURCES.glob("*.cuh"), SOURCES / f"{name}.cu")}
    if fault is not None:
        [its] = [its for its, text in texts.items() if fault[0] in text]
        assert texts[its].count(fault[0]) == 1
        texts[its] = texts[its].replace(*fault)
    for its, text in texts.items():
        (folder / its).write_text(text, encoding="utf-8")
    text = (f'#include "emulated.h"\n#include "{name}.cu"\nextern "C" void run(const Args *a, u32 programs, '
            f'u32 count) {{ emulate(programs, count, [=] {{ {name}(*a); }}); }}\n')
    (folder / f"{name}.cpp").write_text(text, encoding="utf-8")
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-I.", f"-I{HERE}",
                    *(f"-D{key}={value}" for key, value in given.items()), f"{name}.cpp", "-o", f"{name}.so"],
                   cwd=folder, check=True)
    return ctypes.CDLL(str(folder / f"{name}.so"))


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def answered(folder, here, heads, key_heads, view, slots, warps, dim=64, norm="", fault=None, behind=None):
    """What attend.cu and then product.cu give, the slots after it, and the same by fuse.py's twin in fp64. fault: in
    attention; behind: in the product."""
    q, k, v = (some(1, 1, count * dim, seed=n) for n, count in enumerate((heads, key_heads, key_heads)))
    q_norm, k_norm = [some(dim, seed=n) / 9 + (norm == "llama") for n in (8, 9)] if norm else (None, None)
    keys, values = (some(1, key_heads, view + 9, dim, seed=n) for n in (4, 5))
    angle = torch.rand(dim // 2, generator=torch.Generator().manual_seed(here)).repeat(2)[None, None]
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    mask = torch.rand(1, 1, 1, view, generator=torch.Generator().manual_seed(here)) < 0.05
    mask[..., here], slot = True, torch.tensor([[here]])
    weight, last = some(40, heads * dim, seed=6) * (heads * dim) ** -0.5, some(1, 1, 40, seed=7)
    wide = [None if one is None else one.double() for one in (q, k, v, q_norm, k_norm, cos, sin, keys, values)]
    wanted = fuse._attended(*wide[:5], 1e-6, norm == "gemma", *wide[5:], slot, view, mask, dim**-0.5, weight.double(),
                            None, last.double(), True)
    parts = -(-view // slots)
    said, out = torch.full((parts * heads * (dim + 2),), torch.nan), torch.full((1, 1, 40), torch.nan).bfloat16()
    library = emulated(folder, "attend", fault, VIEW=view, HEADS=heads, GROUP=heads // key_heads, SLOTS=slots,
                       WARPS=warps, DIM=dim, NORM=int(bool(norm)), PLUS=int(norm == "gemma"))
    library.run(ctypes.byref(cuda.attention(q, k, v, q_norm, k_norm, cos, sin, keys, values, slot, mask, said,
                                            dim**-0.5, 1e-6)), heads * parts, 32 * warps)
    library = emulated(folder, "product", behind, COLUMNS=heads * dim, WARPS=heads, ROWS=8, WEIGHTS=1, NORM=0,
                       PLUS=0, ACT=0, ADDED=1, PARTS=parts, DIM=dim)
    library.run(ctypes.byref(cuda.product(said, None, last, out, [weight], [None], 0.0)), 5, 32 * heads)
    return out.double(), (keys, values), wanted, wide[7:]


@pytest.mark.parametrize(("here", "heads", "key_heads", "view", "slots", "warps", "dim", "norm"), [
    (200, 14, 2, 256, 128, 8, 64, ""), (255, 4, 2, 256, 64, 2, 64, "llama"), (0, 2, 2, 300, 128, 4, 64, "gemma"),
    (299, 3, 1, 300, 256, 8, 64, ""), (511, 8, 1, 512, 128, 4, 64, ""), (767, 2, 1, 768, 128, 8, 64, ""),
    (130, 4, 2, 256, 128, 8, 128, ""), (299, 2, 1, 300, 128, 4, 128, "llama"), (77, 2, 2, 128, 64, 8, 128, "gemma")])
def test_one_tokens_attention_and_the_product_behind_it(here, heads, key_heads, view, slots, warps, dim, norm,
                                                        tmp_path):
    found, kept, wanted, its = answered(tmp_path, here, heads, key_heads, view, slots, warps, dim, norm)
    assert (found - wanted).norm() < 1e-2 * wanted.norm() and (found - wanted).abs().max() < 0.03
    for mine, other in zip(kept, its, strict=True):
        assert (mine - other).abs().max() < 5e-2  # the new slot is turned in bf16
        others = [slot for slot in range(view + 9) if slot != here]
        assert torch.equal(mine[:, :, others], other[:, :, others].bfloat16())


@pytest.mark.parametrize("fault", [
    ("&& a.mask[slot]", ""), ("== here) key[j] = new_key, value[j] = new_value;", "== here) value[j] = new_value;"),
    ("(place(i) < DIM / 2 ? -other : other)", "other"),
    ("    __syncthreads();\n    const uint4 query", "    const uint4 query"),
    ("norm += weight * total[", "norm += total["), ("said[0] = high, said[1] = norm", "said[0] = 0, said[1] = norm")],
    ids=["mask", "new key", "rotation", "no barrier", "no weights", "parts alike"])
def test_a_fault_in_it_shows(fault, tmp_path):
    found, _, wanted, _ = answered(tmp_path, 100, 4, 2, 256, 128, 4, norm="llama", fault=fault)
    assert not (found - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("fault", [
    ("sum += weight * __uint_as_float(said[s][p].y);", "sum += weight;"), ("at + 2 * (line % 2);", "at;"),
    ("(p * COLUMNS + at) / DIM * 2", "p * COLUMNS / DIM * 2")],
    ids=["no sums", "one half twice", "first head's"])
def test_a_fault_in_what_puts_it_together_shows(fault, tmp_path):
    found, _, wanted, _ = answered(tmp_path, 200, 4, 2, 256, 128, 4, behind=fault)
    assert not (found - wanted).norm() < 2e-2 * wanted.norm()
