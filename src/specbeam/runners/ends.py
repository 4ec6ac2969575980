# mypy: disable-error-code="assignment,attr-defined"
"""What stands before and behind a recorded forward, in one kernel each.

A recording pays about 1.3 µs for every small kernel, and torch makes many of where tokens stand and what they see, of
the choice of a token, and of what was accepted of a proposal. The plain twins are in chains.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specbeam.runners.matvec import early


def frame(depth: Tensor, plus: int, new: int, view: int, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What chains.py's `_frame` says, on a GPU."""
    rows, block = len(depth), min(1024, triton.next_power_of_2(view))
    positions = depth.new_empty(rows, new)
    visible = torch.empty(rows, new, view, dtype=torch.bool, device=depth.device)
    near = None if window is None else torch.empty_like(visible)
    seen = [(visible if one is None else one).view(torch.uint8) for one in (visible, near)]
    _frame[(rows * new, triton.cdiv(view, block))](
        depth, positions, *seen, plus, window or 0, view, depth.stride(0), NEW=new, BLOCK=block, NEAR=near is not None,
        PDL=early(depth.device), num_warps=4)
    return positions, visible, near


@triton.jit(do_not_specialize=["plus"])
def _frame(depth, positions, visible, near, plus, window, view, step, NEW: tl.constexpr,
           BLOCK: tl.constexpr, NEAR: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    which, part = tl.program_id(0), tl.program_id(1)
    here = tl.minimum(tl.load(depth + which // NEW * step) + plus + which % NEW, view - 1)
    if part == 0:
        tl.store(positions + which, here)
    place = part * BLOCK + tl.arange(0, BLOCK)
    out = which.to(tl.int64) * view + place
    tl.store(visible + out, (place <= here).to(tl.uint8), mask=place < view)
    if NEAR:
        tl.store(near + out, ((place <= here) & (place > here - window)).to(tl.uint8), mask=place < view)


def accept(best: Tensor, last: Tensor, depth: Tensor, asked: Tensor, told: Tensor | None = None) -> Tensor:
    """What chains.py's `_accept` says, on a GPU. told: where the host reads it, too, if it is wide enough."""
    rows, new = best.shape
    answer = best.new_empty(rows, new + 5)
    host = told if told is not None and told.shape[1] >= new + 5 else answer
    _accept[(rows,)](best, last, depth, asked, answer, host, host.stride(0), NEW=new,
                     BLOCK=triton.next_power_of_2(new + 5), TELL=host is told, num_warps=1)
    return answer


@triton.jit
def _accept(best, last, depth, asked, answer, told, wide, NEW: tl.constexpr, BLOCK: tl.constexpr, TELL: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, BLOCK)
    best, asked, answer = best + row * NEW, asked + row * NEW, answer + row * (NEW + 5)
    proposed = tl.load(asked + place, mask=place < NEW - 1, other=-1)
    wrong = (proposed != tl.load(best + place, mask=place < NEW - 1, other=-2)) | (place >= tl.load(asked + NEW - 1))
    accepted = tl.min(tl.where(wrong, place, NEW - 1), 0)
    following, whole = tl.load(best + accepted), (accepted == NEW - 1).to(tl.int64)
    read = tl.load(depth + row) + 1 + accepted
    end = tl.load(asked + NEW - 2) if NEW > 1 else tl.load(last + row)
    tl.store(last + row, following)
    tl.store(depth + row, read)
    found = tl.load(asked - 2 + place, mask=(place > 1) & (place <= NEW), other=0)
    found = tl.where(place == 0, accepted.to(tl.int64), found)
    found = tl.where(place == 1, following, found)
    found = tl.where(place == NEW + 1, tl.where(whole > 0, end, following), found)
    found = tl.where(place == NEW + 2, following, found)
    found = tl.where(place == NEW + 3, 1 + whole, found)
    found = tl.where(place == NEW + 4, read - whole, found)
    tl.store(answer + place, found, mask=place < NEW + 5)
    if TELL:
        tl.store(told + row.to(tl.int64) * wide + place, found, mask=place < NEW + 5)


def largest(scores: Tensor, out: Tensor | None = None, depth: Tensor | None = None, told: Tensor | None = None
            ) -> Tensor:
    """What chains.py's `largest` says, on a GPU: torch's takes 10 µs for 32,000. told: where the host reads it, too, at
    `depth` from then on (as a ring)."""
    rows, size = scores.numel() // scores.shape[-1], scores.shape[-1]
    parts = triton.cdiv(size, 4096)
    best = scores.new_empty(rows, parts, dtype=torch.float32)
    which = torch.empty_like(best, dtype=torch.int64)
    out = scores.new_empty(scores.shape[:-1], dtype=torch.int64) if out is None else out
    options = {"launch_pdl": True} if early(scores.device) else {}
    _best[(rows, parts)](scores.contiguous(), best, which, size, BLOCK=4096, PDL=bool(options), num_warps=8, **options)
    _best_of_all[(rows,)](best, which, out, out if depth is None else depth, out if told is None else told, parts,
                          BLOCK=triton.next_power_of_2(parts), COUNT=depth is not None,
                          RING=0 if told is None else told.shape[1], PDL=bool(options), num_warps=1, **options)
    return out


@triton.jit
def _best(scores, best, which, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row.to(tl.int64) * size + place, mask=place < size, other=-float("inf")).to(tl.float32)
    most, at = tl.max(score, 0, return_indices=True)
    tl.store(best + row * tl.num_programs(1) + part, most)
    tl.store(which + row * tl.num_programs(1) + part, (part * BLOCK + at).to(tl.int64))


@triton.jit
def _best_of_all(best, which, out, depth, told, parts, BLOCK: tl.constexpr, COUNT: tl.constexpr, RING: tl.constexpr,
                 PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.arange(0, BLOCK)
    score = tl.load(best + row * parts + part, mask=part < parts, other=-float("inf"))
    _, at = tl.max(score, 0, return_indices=True)
    token = tl.load(which + row * parts + at)
    tl.store(out + row, token)
    if COUNT:
        deep = tl.load(depth + row) + 1
        tl.store(depth + row, deep)
        if RING:
            tl.store(told + row * RING + deep % RING, token)
