"""What stands around a recorded forward: the kernels give what their plain twins in chains.py give."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from specbeam.runners import chains, ends  # noqa: E402

if DEVICE == "cpu" and not ends._best.__class__.__name__.startswith("Interpreted"):
    pytest.skip("triton is not interpreted", allow_module_level=True)


def numbers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("size", [50, 4096, 9000])
def test_the_first_of_the_largest(size):
    scores = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size)).to(DEVICE)
    assert torch.equal(ends.largest(scores), scores.argmax(-1))
    scores[..., size // 2 :] = 9.0
    assert (ends.largest(scores) == size // 2).all()


def test_the_largest_become_the_next_tokens_and_rows_are_one_deeper():
    scores, last, depth = torch.randn(3, 70).to(DEVICE), numbers(9, 3, 1), numbers(9, 3)
    before = depth.clone()
    told = numbers(9, 4, 8)  # of a row more
    wanted = told.clone()
    ends.largest(scores, last[:, 0], depth, told)
    assert torch.equal(last[:, 0], scores.argmax(-1)) and torch.equal(depth, before + 1)
    wanted[range(3), (depth % 8).tolist()] = last[:, 0]
    assert torch.equal(told, wanted)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("rows", "new", "view"), [(1, 1, 256), (3, 5, 300), (2, 9, 1536)])
def test_where_tokens_stand_and_what_they_see(rows, new, view, window):
    unread = numbers(view, rows, 4)  # depths that lie apart in memory, some near the end
    for plus in (0, 2):
        found = ends.frame(unread[:, -1], plus, new, view, window)
        for mine, plain in zip(found, chains._frame(unread[:, -1], plus, new, view, window), strict=True):
            assert mine is plain is None or torch.equal(mine, plain)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_what_is_accepted(count):
    best, last, depth = numbers(2, 40, count + 1), numbers(9, 40, 1), numbers(9, 40)
    asked = torch.cat([numbers(2, 40, count), numbers(count + 2, 40, 1)], 1)
    mine, plain = (last.clone(), depth.clone()), (last.clone(), depth.clone())
    told = numbers(9, 41, 11)
    before, wanted = told.clone(), chains._accept(best, *plain, asked)
    assert torch.equal(ends.accept(best, *mine, asked, told), wanted)
    assert torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1])
    if wanted.shape[1] <= told.shape[1]:
        before[:40, : wanted.shape[1]] = wanted
    assert torch.equal(told, before)
