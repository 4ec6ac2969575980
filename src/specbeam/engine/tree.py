"""The one idea: what a model has read is a tree of tokens, of which some branches live.

Every row of the batch has its own tree. A *tip* is the end of a living branch: a boolean over the slots (the tokens
on its path) and a depth (how many they are, which is the position of the next token). A forward takes a *block* of
new nodes, each below a tip or below another new node, and

    visible(node) = visible(tip) ∪ {slots of its ancestors in the block} ∪ {own slot}
    position(node) = depth(tip) + number of its ancestors in the block.

New nodes go to the first slots that no tip sees. Rejecting a branch is not keeping it as a tip; choosing beams is
gathering tips. Keys and values are never moved, and a prompt is stored once, however many branches share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from specbeam.engine.runner import Adapter, forward

_MOST = 4096  # slots to begin with: max_new_tokens may be far more than an answer needs


@dataclass(frozen=True)
class Tips:
    """Living branches. visible: [rows, tips, slots] bool; depth: [rows, tips] long."""

    visible: Tensor
    depth: Tensor
    contiguous: bool = False  # every tip sees exactly slots 0 … depth-1: free slots need no search

    def pick(self, index: Tensor) -> Tips:
        """Tips [rows, k] by their number in this set (index: [rows, k] long)."""
        if index.shape[1] == self.depth.shape[1] == 1:
            return self
        slots = self.visible.shape[2]
        visible = self.visible.gather(1, index[..., None].expand(-1, -1, slots))
        return Tips(visible, self.depth.gather(1, index), self.contiguous)

    def rows(self, index: Tensor) -> Tips:
        """The tips of these rows only."""
        return Tips(self.visible[index], self.depth[index], self.contiguous)

    def join(self, more: Tips) -> Tips:
        """These tips and, numbered behind them, `more` (of the same rows)."""
        both = [self.visible, more.visible]
        if self.visible.shape[2] != more.visible.shape[2]:
            wide = max(self.visible.shape[2], more.visible.shape[2])
            both = [torch.nn.functional.pad(seen, (0, wide - seen.shape[2])) for seen in both]
        return Tips(torch.cat(both, 1), torch.cat([self.depth, more.depth], 1), self.contiguous and more.contiguous)


@dataclass(frozen=True)
class Block:
    """New nodes of every row, short rows padded on the right.

    tokens: [rows, new] long. tip: [rows, new] long, the tip each hangs below. depth: [rows, new] long, ancestors
    within the block. ancestors: [rows or 1, new, new] bool, [b, i, j]: j is i or an ancestor of i. lengths: [rows]
    long, real nodes of each row.
    """

    tokens: Tensor
    tip: Tensor
    depth: Tensor
    ancestors: Tensor
    lengths: Tensor
    chained: bool = False  # one below the other, the first below the deepest tip
    even: bool = False  # every row has all of them


def chain(tokens: Sequence[Sequence[int]] | Tensor, device: torch.device, lengths: Tensor | None = None) -> Block:
    """Each row's tokens one below the other, the first below the row's only tip."""
    if not isinstance(tokens, Tensor):
        counts = [len(row) for row in tokens]
        width = max(counts)
        if min(counts) < width:
            lengths = torch.tensor(counts, device=device)
            tokens = [[*row, *[0] * (width - len(row))] for row in tokens]
        tokens = torch.tensor(tokens, device=device)
    rows, new = tokens.shape
    shape = _chain_shape if new <= 16 else _chain_shape.__wrapped__  # those of long prompts are not worth their memory
    tip, order, ancestors, full = shape(rows, new, device)
    even = lengths is None
    return Block(tokens, tip, order, ancestors, full if lengths is None else lengths, chained=True, even=even)


@lru_cache(64)
def _chain_shape(rows: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tip, depth, ancestors and lengths of a chain: the same ones in every step."""
    order = torch.arange(new, device=device)
    zero = torch.zeros(rows, new, dtype=torch.long, device=device)
    return zero, order.expand(rows, -1), (order[:, None] >= order)[None], torch.full((rows,), new, device=device)


@lru_cache(16)
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def leaves(tokens: Tensor, tip: Tensor) -> Block:
    """One new node below each named tip; tokens, tip: [rows, new] long."""
    depth, own, lengths = _leaf_shape(*tokens.shape, tokens.device)
    return Block(tokens, tip, depth, own, lengths, even=True)


@lru_cache(64)
def _leaf_shape(rows: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """depth, ancestors and lengths of leaves: the same ones in every step."""
    own = torch.eye(new, dtype=torch.bool, device=device)[None]
    return torch.zeros(rows, new, dtype=torch.long, device=device), own, torch.full((rows,), new, device=device)


def branches(trees: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> Block:
    """Any trees below the row's tips: per row (tokens, parents), parents[i] < i, or -1 - t for the t-th tip itself."""
    new = max(len(tokens) for tokens, _ in trees)
    tokens = np.zeros((len(trees), new), dtype=np.int64)  # numpy: one element at a time is dear in torch
    tip, depth = np.zeros_like(tokens), np.zeros_like(tokens)
    ancestors = np.tile(np.eye(new, dtype=bool), (len(trees), 1, 1))
    for row, (ids, parents) in enumerate(trees):
        for node, (token, parent) in enumerate(zip(ids, parents, strict=True)):
            tokens[row, node] = token
            if parent >= 0:
                tip[row, node], depth[row, node] = tip[row, parent], depth[row, parent] + 1
                ancestors[row, node] |= ancestors[row, parent]
            else:
                tip[row, node] = -1 - parent
    lengths = np.array([len(ids) for ids, _ in trees])
    arrays = (tokens, tip, depth, ancestors, lengths)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return Block(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4])


class TokenTree:
    """One model's slots for a batch, and the forwards over them."""

    def __init__(self, adapter: Adapter, rows: int, capacity: int):
        """`capacity` slots per row to begin with (at most _MOST of them); more are made when they are needed."""
        self.adapter, self.device = adapter, adapter.device
        self.cache = adapter.runner.open(adapter, rows, min(max(capacity, 1), _MOST))
        # A chain's slot i holds position i, whoever wrote it.
        self.position_of = torch.arange(self.cache.capacity, device=self.device).repeat(rows, 1)
        self.high = 0  # no slot at or above it was ever written

    def tips(self, lengths: Sequence[int]) -> Tips:
        """One tip per row, at the end of the chain that lies in slots 0 … length-1 (0: where a prompt begins)."""
        depth = torch.tensor(lengths, device=self.device)[:, None]
        slots = torch.arange(self.cache.capacity, device=self.device)
        return Tips((slots < depth)[:, None], depth, contiguous=True)

    def extend(self, tips: Tips, block: Block, last_only: bool = False, adapter: Adapter | None = None
               ) -> tuple[Tensor, Tips]:
        """Run the block. Logits [rows, new, vocabulary] ([rows, 1, …] of each row's last node with `last_only`),
        and the new nodes as tips [rows, new]. Slots that no tip in `tips` sees may be overwritten. adapter: of a model
        of this one's first layers, which then runs over their slots."""
        new = block.tokens.shape[1]
        slots, contiguous = self._free_slots(tips, new), tips.contiguous and block.chained
        if contiguous:  # a slot is its position, and a node sees all up to its own
            positions = slots
            visible = _numbers(self.cache.capacity, self.device) <= positions[..., None]
        else:
            seen, more = tips.visible, self.cache.capacity - tips.visible.shape[2]
            if more:
                seen = torch.nn.functional.pad(seen, (0, more))
            visible = seen.gather(1, block.tip[..., None].expand(-1, -1, seen.shape[2]))
            visible.scatter_(2, slots[:, None].expand(-1, new, -1), block.ancestors.expand(len(slots), -1, -1))
            positions = tips.depth.gather(1, block.tip) + block.depth
        legal = positions
        if not block.even:  # pads too need a position that exists (gpt2)
            legal = positions * (_numbers(new, self.device) < block.lengths[:, None])

        view, near = self.cache.view, None
        if self.adapter.window is not None:  # the window counts positions, not slots
            self.position_of.scatter_(1, slots, positions)
            near = visible[..., :view] & (self.position_of[:, None, :view]
                                          > positions[..., None] - self.adapter.window)
        keep = (block.lengths - 1).clamp(min=0) if last_only and new > 1 else None
        logits = forward(adapter or self.adapter, self.cache, block.tokens, legal, visible[..., :view], near, keep)
        return logits, Tips(visible, positions + 1, contiguous)

    def keep_rows(self, rows: Sequence[int]) -> Tensor:
        """Go on with these rows only (their numbers among the present ones); returns them as an index."""
        index = torch.tensor(rows, device=self.device)
        self.cache.keep_rows(index)
        self.position_of = self.position_of[index]
        return index

    def join(self, tips: Tips, more: TokenTree, its: Tips) -> Tips:
        """Take in the rows of another tree of this model, behind these; all their tips."""
        capacity = max(self.cache.capacity, more.cache.capacity)
        for tree in (self, more):
            if tree.cache.capacity < capacity:
                tree._resize(capacity)
        self.cache.join(more.cache)
        self.position_of = torch.cat([self.position_of, more.position_of])
        self.high = max(self.high, more.high)
        seen = [torch.nn.functional.pad(t.visible, (0, capacity - t.visible.shape[2])) for t in (tips, its)]
        return Tips(torch.cat(seen), torch.cat([tips.depth, its.depth]), tips.contiguous and its.contiguous)

    def _free_slots(self, tips: Tips, new: int) -> Tensor:
        """[rows, new] long: the first slots that no tip sees; tells the cache where the forward writes."""
        if tips.contiguous:
            slots = tips.depth if tips.depth.shape[1] == 1 else tips.depth.amax(1, keepdim=True)
            slots = slots if new == 1 else slots + _numbers(new, self.device)
        else:
            reach = min(self.high + new, tips.visible.shape[2])
            free = ~tips.visible[..., :reach].any(1)
            if reach < self.high + new:
                free = torch.nn.functional.pad(free, (0, self.high + new - reach), value=True)
            order = torch.arange(free.shape[1], 0, -1, device=self.device)
            slots = (free * order).topk(new, dim=1).indices
        written = slots.tolist()
        self.cache.view = self.reach(1 + max(max(row) for row in written))
        first = written[0]
        runs = first == list(range(first[0], first[0] + new)) and all(row == first for row in written)
        self.cache.span = slice(first[0], first[0] + new) if runs else None
        self.cache.slots = slots
        return slots

    def reach(self, high: int) -> int:
        """Make room for slots below `high`; how many a forward over all that were ever written looks at."""
        self.high = max(self.high, high)
        if self.high > self.cache.capacity:
            self._resize(max(self.high, self.cache.capacity * 3 // 2))
        return self.adapter.runner.width(self.high)

    def _resize(self, capacity: int) -> None:
        self.cache.resize(capacity)  # to at least so much
        rows, known = self.position_of.shape
        more = torch.arange(known, self.cache.capacity, device=self.device).expand(rows, -1)
        self.position_of = torch.cat([self.position_of, more], 1)


def read_prompts(adapter: Adapter, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[TokenTree, Tips, Tensor]:
    """A tree that has read a prompt in each row, its tips, and the logits [rows, 1, vocabulary] behind each."""
    tree = TokenTree(adapter, len(prompts), capacity)
    block = chain(prompts, tree.device)
    logits, nodes = tree.extend(tree.tips([0] * len(prompts)), block, last_only=True)
    return tree, nodes.pick(block.lengths[:, None] - 1), logits
