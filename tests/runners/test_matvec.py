"""The kernels give what their plain twins in fuse.py give: on a GPU, or in Triton's interpreter, if there is one."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from specbeam.runners import attend_few, attend_one, attended, cuda, few_rows, fuse, matvec  # noqa: E402

if DEVICE == "cpu" and not matvec._product.__class__.__name__.startswith("Interpreted"):
    pytest.skip("triton is not interpreted", allow_module_level=True)


hopper = pytest.mark.skipif(not matvec.early(torch.device(DEVICE)), reason="no GPU of Hopper's generation or later")


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


@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_programs_that_begin_one_after_the_other(added):
    """Hopper's; elsewhere none reads ahead, and the pause is left out."""
    given = (some(1, 1, 520), None, None, None, 0.0, False, [some(56, 520) * 520**-0.5], [None], "",
             some(1, 1, 56) if added else None, True)
    late = matvec.product(*given, tile=matvec.Tiling(8, 512, 2, spread=20000))
    torch.testing.assert_close(late, fuse._product(*given), rtol=1e-4, atol=1e-4)
    assert matvec.tiling(2048, 2048, False).spread and not matvec.tiling(4096, 4096, False).spread


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


def halves(*shape: int, seed: int = 0) -> torch.Tensor:
    return some(*shape, seed=seed).half()  # the interpreter knows no bf16 products


def of_few(given: tuple, **options) -> None:
    """few_rows.product gives what the plain one gives in fp64."""
    wide = [one.double() if isinstance(one, torch.Tensor) else one for one in given]
    wide[6], wide[7] = ([None if one is None else one.double() for one in given[at]] for at in (6, 7))
    found, wanted = few_rows.product(*given, **options).double(), fuse._product(*wide)
    assert found.shape == wanted.shape and (found - wanted).norm() < 2e-3 * wanted.norm()
    for row in range(found.shape[1]):  # none of them is another's
        assert (found[:, row] - wanted[:, row]).norm() < 2e-3 * wanted[:, row].norm()


@pytest.mark.parametrize("plus", [False, True], ids=["weight", "one plus weight"])
@pytest.mark.parametrize("late", [False, True], ids=["norm first", "norm's scale last"])
@pytest.mark.parametrize(("rows", "columns"), [(2, 64), (6, 520), (9, 2056), (16, 96)])
def test_several_rows_norm_and_three_weights_with_biases(rows, columns, late, plus):
    weights = [halves(size, columns) * columns**-0.5 for size in (40, 8, 24)]
    of_few((halves(1, rows, columns), None, None, halves(columns, seed=1), 1e-6, plus, weights,
            [halves(40), None, halves(24)], "", None, False), late=late, tile=few_rows.Tiling(2, 3, 2, 4))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [3, 11])
def test_several_rows_a_gate_behind_a_norm_of_a_sum_with_a_norm(rows, act):
    weights = [halves(48, 520, seed=n) * 520**-0.5 for n in (1, 2)]
    of_few((halves(1, rows, 520), halves(520, seed=3), halves(1, rows, 520, seed=4), halves(520, seed=5), 1e-6, True,
            weights, [None, halves(48)], act, None, False))


@pytest.mark.parametrize("columns", [72, 5000])
def test_several_rows_of_a_wider_tensor_and_a_product_that_is_added(columns):
    wider = halves(4, 2, columns + 64)  # rows of a batch, and a part of what an earlier product gave
    of_few((wider[..., :columns], None, None, None, 0.0, False, [halves(56, columns) * columns**-0.5], [None], "",
            halves(4, 2, 56).flatten(0, 1)[None].view(4, 2, 56), False))


def test_several_norms_that_are_added():
    given = (halves(1, 5, 96), halves(96), halves(1, 5, 96, seed=1), 1e-6, True, False)
    torch.testing.assert_close(few_rows.join(*given), fuse._join(*given), rtol=1e-2, atol=1e-2)


def several(new_slots, heads, key_heads, dim, view, normed, seed=0):
    """What `attend` is given for a tree: each new token sees itself, an older one of its branch, and some slots."""
    slot = torch.tensor(new_slots, device=DEVICE)
    [rows, new] = slot.shape
    together = some(rows, new, (heads + 2 * key_heads) * dim)
    q, k, v = together.split([heads * dim, key_heads * dim, key_heads * dim], -1)
    buffers = [some(rows, key_heads, view + 9, dim, seed=n) for n in (3, 4)]
    angle = torch.rand(rows, new, dim // 2, generator=torch.Generator().manual_seed(seed)).repeat(1, 1, 2).to(DEVICE)
    mask = (torch.rand(rows, 1, new, view, generator=torch.Generator().manual_seed(seed)) < 0.3).to(DEVICE)
    mask.scatter_(3, slot[:, None, None].expand(-1, -1, new, -1), False)  # of the new ones only its own branch
    mask.scatter_(3, slot[:, None, :, None], True)
    for token in range(2, new):
        mask[:, 0, token].scatter_(1, slot[:, token - 2, None], True)
    norms = (some(dim, seed=5), some(dim, seed=6)) if normed else (None, None)
    return [q, k, v, *norms, 1e-6, True, angle.cos(), angle.sin()], buffers, [slot, view, mask, dim**-0.5, False]


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed heads"])
@pytest.mark.parametrize(("new_slots", "heads", "key_heads", "dim", "view"), [
    ([[100, 101, 102, 103, 104]], 4, 2, 16, 256), ([[254, 7, 255, 256, 300, 20, 5, 383, 0]], 16, 2, 32, 384),
    ([[*range(120, 136)]], 7, 1, 128, 300), ([[1, 2, 3], [200, 9, 255], [0, 255, 7]], 4, 2, 80, 256),
    ([[9 * row] for row in range(16)], 4, 4, 64, 256)], ids=["chain", "scattered", "sixteen", "ragged rows", "batch"])
def test_attention_of_several_tokens_under_a_trees_mask(new_slots, heads, key_heads, dim, view, normed):
    given, buffers, rest = several(new_slots, heads, key_heads, dim, view, normed)
    mine, its = [one.clone() for one in buffers], [one.clone() for one in buffers]
    found, wanted = attend_few.attend(*given, *mine, *rest), fuse._attend(*given, *its, *rest)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    broken = rest[2].clone()  # a token that sees its sibling, or misses an ancestor, shows
    broken[:, 0, -1, new_slots[0][-1] - 1 if new_slots[0][-1] else 1] ^= True
    other = attend_few.attend(*given, *[one.clone() for one in buffers], *rest[:2], broken, *rest[3:])
    assert (other - wanted).abs().amax() > 1e-3
    torch.testing.assert_close(other[:, :-1], wanted[:, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed heads"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("here", "heads", "key_heads", "dim", "view"), [
    (200, 14, 2, 64, 256), (511, 8, 8, 64, 512), (0, 4, 2, 48, 300), (377, 4, 1, 32, 384), (2, 2, 1, 8, 3)])
def test_attention_of_one_token_is_as_good_as_its_numbers(here, heads, key_heads, dim, view, dtype, normed):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter knows no PTX")
    given, buffers, rest = several([[here]], heads, key_heads, dim, view, normed, seed=here)
    given, buffers = ([one.to(dtype) if isinstance(one, torch.Tensor) else one for one in both]
                      for both in (given, buffers))
    assert attend_one.suits(buffers[0], view)
    wide = [[one.double() if isinstance(one, torch.Tensor) else one for one in both] for both in (given, buffers)]
    found, wanted = attend_few.attend(*given, *buffers, *rest).double(), fuse._attend(*wide[0], *wide[1], *rest)
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    for mine, its in zip(buffers, wide[1], strict=True):
        assert (mine - its).abs().max() < 5e-2  # of 3 or so, in the new slot
        assert torch.equal(mine[:, :, :here], its[:, :, :here].to(dtype))


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("new_slots", [[[577]], [[40, 300, 599, 7, 256]], [[5, 260], [599, 0]]], ids=str)
def test_attention_where_a_program_has_more_slots_than_one_tile(new_slots, programs, monkeypatch):
    monkeypatch.setattr(attend_few, "_PROGRAMS", programs)
    given, buffers, rest = several(new_slots, 4, 2, 16, 600, True)
    mine, its = [one.clone() for one in buffers], [one.clone() for one in buffers]
    torch.testing.assert_close(attend_few.attend(*given, *mine, *rest), fuse._attend(*given, *its, *rest), rtol=1e-4,
                               atol=1e-4)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def test_what_lies_otherwise_in_memory_is_read_right():
    x, added = halves(1, 520, 5).transpose(1, 2), halves(1, 56, 5, seed=1).transpose(1, 2)
    of_few((x, None, None, None, 0.0, False, [halves(56, 520) * 520**-0.5], [None], "", added, False))


def cast(given, dtype):
    """Of what is in it numbers only: no masks, no slots."""
    if isinstance(given, list):
        return [cast(one, dtype) for one in given]
    return given.to(dtype) if isinstance(given, torch.Tensor) and given.is_floating_point() else given


@pytest.fixture
def launched(monkeypatch):
    """What CUDA's kernels were launched with."""
    seen, launch = [], cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *given: seen.append(given) or launch(*given))
    return seen


@hopper
@pytest.mark.parametrize(("columns", "sizes", "post", "normed", "plus", "act", "added", "biased"), [
    (896, [896, 128, 128], False, True, False, "", False, True), (896, [896], False, False, False, "", True, False),
    (896, [4864, 4864], False, True, False, "silu", False, False), (4864, [896], False, False, False, "", True, False),
    (576, [100, 60, 20], False, True, False, "", False, False), (96, [40], False, False, False, "", True, True),
    (1024, [328, 328], True, True, True, "gelu_tanh", False, True),
    (2560, [2048, 1024, 1024], True, True, True, "", False, False),
    (5632, [2048], False, False, False, "", True, False), (4096, [4096], False, False, False, "", True, False)])
def test_one_row_in_cuda(columns, sizes, post, normed, plus, act, added, biased, launched):
    total = sizes[0] if act else sum(sizes)
    given = [some(1, 1, columns), *([some(columns, seed=1), some(1, 1, columns, seed=2)] if post else [None, None]),
             some(columns, seed=3) if normed else None, 1e-6, plus,
             [some(size, columns, seed=4 + n) * columns**-0.5 for n, size in enumerate(sizes)],
             [some(size, seed=7 + n) if biased else None for n, size in enumerate(sizes)], act,
             some(1, 1, total, seed=9) if added else None, True]
    given = cast(given, torch.bfloat16)
    found, wanted = matvec.product(*given).double(), fuse._product(*cast(given, torch.float64))
    assert launched and found.shape == wanted.shape and (found - wanted).norm() < 1e-2 * wanted.norm()
    given[6][0][-1, -8:] += 0.5  # the last of its numbers counts
    assert (matvec.product(*given).double() - found).abs().max() > 1e-3


@hopper
@pytest.mark.parametrize(("columns", "rows", "gated"), [
    (896, 4864, True), (4864, 896, False), (896, 1000, True), (1024, 3072, True), (3072, 1024, False)])
def test_one_row_times_stored_weights_in_cuda(columns, rows, gated, launched):
    given = [some(1, 1, columns), None, None, some(columns, seed=3) if gated else None, 1e-6, False,
             [some(rows, columns, seed=4 + n) * columns**-0.5 for n in range(2 if gated else 1)],
             [some(rows, seed=7 + n) for n in range(2 if gated else 1)], "silu" if gated else "",
             None if gated else some(1, 1, rows, seed=9), fuse.STORED]
    given = cast(given, torch.bfloat16)
    found, wanted = matvec.product(*given).double(), fuse._product(*cast(given, torch.float64))
    assert launched[0][-1] > 0 and (found - wanted).norm() < 1e-2 * wanted.norm()
    given[6][0][-1, -8:] += 0.5
    assert (matvec.product(*given).double() - found).abs().max() > 1e-3


@hopper
@pytest.mark.parametrize(("here", "heads", "key_heads", "view", "dim", "normed"), [
    (200, 14, 2, 256, 64, False), (255, 32, 4, 256, 64, False), (0, 2, 2, 300, 64, True), (299, 14, 7, 300, 64, False),
    (377, 4, 1, 384, 64, False), (511, 32, 4, 512, 64, True), (1000, 14, 2, 1024, 64, False),
    (1500, 16, 2, 1536, 64, False), (511, 16, 8, 512, 128, True), (700, 16, 2, 768, 128, False)])
def test_one_tokens_attention_and_the_product_behind_it_in_cuda(here, heads, key_heads, view, dim, normed, launched):
    given, buffers, rest = several([[here]], heads, key_heads, dim, view, normed, seed=here)
    given, buffers = cast(given, torch.bfloat16), cast(buffers, torch.bfloat16)
    weight, last = cast([some(328, heads * dim) * (heads * dim) ** -0.5, some(1, 1, 328)], torch.bfloat16)
    behind = [weight, None, last, True]
    wide = [cast(one, torch.float64) for one in (given, buffers, behind)]
    found = attended.attended(*given, *buffers, *rest[:-1], *behind).double()
    wanted = fuse._attended(*wide[0], *wide[1], *rest[:-1], *wide[2])
    assert len(launched) == 2 and (found - wanted).norm() < 1e-2 * wanted.norm()
    for mine, its in zip(buffers, wide[1], strict=True):
        assert (mine - its).abs().max() < (8e-2 if normed else 5e-2)  # norms make larger numbers
        others = [slot for slot in range(view + 9) if slot != here]
        assert torch.equal(mine[:, :, others], its[:, :, others].to(mine.dtype))
    broken = rest[2].clone()  # one slot more or less shows
    broken[..., (here + 1) % view] ^= True
    assert (attended.attended(*given, *buffers, *rest[:2], broken, rest[3], *behind) - found).abs().max() > 1e-3
