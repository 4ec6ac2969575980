"""The kernels give what their plain twins in fuse.py give: on a GPU, or in Triton's interpreter, if there is one."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from specbeam.runners import attend_few, fuse, matvec  # noqa: E402

if DEVICE == "cpu" and not matvec._product.__class__.__name__.startswith("Interpreted"):
    pytest.skip("triton was imported before, for a GPU", allow_module_level=True)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


@pytest.mark.parametrize("plus", [False, True], ids=["weight", "one plus weight"])
@pytest.mark.parametrize("columns", [64, 96, 2056])
def test_norm_and_three_weights_with_biases(columns, plus):
    weights = [some(size, columns) * columns**-0.5 for size in (40, 8, 24)]
    given = (some(1, 1, columns), None, None, some(columns, seed=1), 1e-6, plus, weights,
             [some(40), None, some(24)], "", None, False)
    torch.testing.assert_close(matvec.product(*given), fuse._product(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("columns", [96, 2056])
def test_a_gate_behind_a_norm_of_a_sum_with_a_norm(columns, act):
    weights = [some(48, columns, seed=n) * columns**-0.5 for n in (1, 2)]
    given = (some(1, 1, columns), some(columns, seed=3), some(1, 1, columns, seed=4), some(columns, seed=5), 1e-6, True,
             weights, [None, some(48)], act, None, False)
    found = matvec.product(*given)
    torch.testing.assert_close(found, fuse._product(*given), rtol=1e-4, atol=1e-4)
    assert found.shape[-1] == 48 + columns  # the sum, too


@pytest.mark.parametrize("columns", [72, 5000])
def test_a_product_that_is_added(columns):
    given = (some(1, 1, columns), None, None, None, 0.0, False, [some(56, columns) * columns**-0.5], [None], "",
             some(1, 1, 56), False)
    torch.testing.assert_close(matvec.product(*given), fuse._product(*given), rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_added():
    given = (some(1, 1, 96), some(96), some(1, 1, 96, seed=1), 1e-6, True, False)
    torch.testing.assert_close(matvec.join(*given), fuse._join(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed heads"])
@pytest.mark.parametrize(("heads", "key_heads", "dim", "view", "here"),
                         [(4, 2, 16, 256, 100), (6, 2, 80, 256, 0), (4, 4, 64, 384, 383), (8, 2, 128, 384, 130)])
def test_attention_with_the_new_slot(heads, key_heads, dim, view, here, normed):
    q, k, v = some(1, 1, heads * dim), some(1, 1, key_heads * dim, seed=1), some(1, 1, key_heads * dim, seed=2)
    keys, values = some(1, key_heads, 400, dim, seed=3), some(1, key_heads, 400, dim, seed=4)
    angle = torch.rand(dim // 2).repeat(2).to(DEVICE)
    mask = (torch.arange(view, device=DEVICE) <= here)[None, None, None]
    q_norm, k_norm = (some(dim, seed=5), some(dim, seed=6)) if normed else (None, None)
    given = (q, k, v, q_norm, k_norm, 1e-6, True, angle.cos()[None, None], angle.sin()[None, None])
    rest = (torch.tensor([[here]], device=DEVICE), view, mask, dim**-0.5, False)
    mine, its = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    found, wanted = attend_few.attend(*given, *mine, *rest), fuse._attend(*given, *its, *rest)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    assert not torch.equal(mine[0], keys)


@pytest.mark.parametrize("size", [50, 4096, 9000])
def test_the_first_of_the_largest(size):
    scores = some(2, 3, size)
    assert torch.equal(matvec.argmax(scores), scores.argmax(-1))
    scores[..., size // 2 :] = 9.0
    assert (matvec.argmax(scores) == size // 2).all()
