"""Beams on the host: what host_chains.py is for chains, for searches that extend all beams of a row together.

A beam's node hangs below the one that it continues, at the end of the state: what a beam sees is a row of booleans over
the positions of the state, and surviving is choosing among these rows. No slots are looked for, and no tips are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specbeam.engine.tree import TokenTree


def beams_of(tree: TokenTree, lengths: Sequence[int], width: int) -> HostBeams | None:
    """The beams of a tree that has read prompts of these lengths and nothing else; None: not with its runner."""
    adapter = tree.adapter
    return HostBeams(tree, lengths, width) if adapter.runner.reads and adapter.rope_limit is None else None


class HostBeams:
    """`width` beams in each row."""

    def __init__(self, tree: TokenTree, lengths: Sequence[int], width: int):
        self.cache, self.window, self.width = tree.cache, tree.adapter.window, width
        self.depth = np.array(lengths)  # [rows], the position of what is read next
        self.at = self.cache.owner[:, : self.cache.length].copy()  # [rows, state], the position of each token
        prompt = self.cache.alive[:, : self.cache.length] & (self.at < self.depth[:, None])
        self.seen = np.repeat(prompt[:, None], width, 1)  # [rows, width, state], by the beams' last tokens

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.cache.keep_rows(torch.tensor(rows))
        self.depth, self.at, self.seen = self.depth[rows], self.at[rows], self.seen[rows]

    def read(self, front: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """Logits [rows, width, vocabulary], until the next forward, behind each row's (tokens, origins): what its beams
        go on with, and the beams that they continue."""
        tokens, origins = np.array(front).swapaxes(0, 1)
        own = np.broadcast_to(np.eye(self.width, dtype=bool), (len(tokens), self.width, self.width))
        self.seen = np.concatenate([np.take_along_axis(self.seen, origins[..., None], 1), own], 2)
        positions = np.repeat(self.depth[:, None], self.width, 1)
        self.at, self.depth = np.concatenate([self.at, positions], 1), self.depth + 1
        order = self.cache.make_room(self.seen.any(1), self.width)
        if order is not None:
            self.seen, self.at = np.take_along_axis(self.seen, order[:, None], 2), np.take_along_axis(self.at, order, 1)
        near = self.seen
        if self.window is not None:
            near = self.seen & (self.at[:, None] > positions[..., None] - self.window)
        return torch.from_numpy(self.cache.read_seen(tokens, positions, self.seen, near))
