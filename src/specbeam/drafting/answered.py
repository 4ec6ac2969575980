"""What the target has answered already at and below the running beams of one row.

A node is numbered by its place among the row's tips. Nodes stay for as long as they are a beam's last token or lie
below one: what was scored once is never scored again, and the draft's search goes by the target's own scores there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specbeam.drafting import Proposal


@dataclass
class Answered:
    """at: the node of each beam's last token, -1: the target has not read it. below: the node that this token hangs
    below. children: (node, token) → node, parents before children. logits: [vocabulary] behind each node."""

    at: list[int]
    below: list[int]
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def behind(self) -> Tensor:
        """Logits [beams, vocabulary] behind each beam; where they are not known, another's."""
        some = next(self.logits[node] for node in self.at if node >= 0)
        return torch.stack([self.logits.get(node, some) for node in self.at])

    def follow(self, tokens: Sequence[int], origins: Sequence[int]) -> None:
        """The beams took a step: each goes on from the beam `origins` by `tokens`."""
        self.below = [self.at[origin] for origin in origins]
        self.at = [self.children.get(step, -1) for step in zip(self.below, tokens, strict=True)]

    def add(self, last: Sequence[int], proposal: Proposal | None, row: int, first: int
            ) -> tuple[list[int], list[int]]:
        """The nodes that the target has to read: of each beam that it has not read the last token, and what is proposed
        and not there; as tokens and parents (`engine.tree.branches`). They are numbered from `first` on."""
        tokens: list[int] = []
        parents: list[int] = []

        def node(parent: int, token: int) -> int:
            if (parent, token) not in self.children:
                self.children[parent, token] = first + len(tokens)
                tokens.append(token)
                parents.append(parent - first if parent >= first else -1 - parent)
            return self.children[parent, token]

        self.at = [at if at >= 0 else node(below, token)
                   for at, below, token in zip(self.at, self.below, last, strict=True)]
        if proposal is not None:
            made: list[int] = []
            for token, parent in zip(proposal.tokens[row], proposal.parents[row], strict=True):
                made.append(node(made[parent] if parent >= 0 else self.at[-1 - parent], token))
        return tokens, parents

    def prune(self) -> list[int]:
        """Keep what a search from the present beams can still come by; returns the old numbers of the nodes kept."""
        keep = [node for node in self.at if node >= 0]
        alive = set(keep)
        for (parent, _), node in self.children.items():
            if parent in alive and node not in alive:
                alive.add(node)
                keep.append(node)
        keep += {node for node, at in zip(self.below, self.at, strict=True) if at < 0} - alive
        new = {node: number for number, node in enumerate(keep)}
        self.children = {(new[parent], token): new[node] for (parent, token), node in self.children.items()
                         if parent in alive}
        self.logits = {new[node]: self.logits[node] for node in keep if node in alive}
        self.below = [-1 if at >= 0 else new[node] for node, at in zip(self.below, self.at, strict=True)]
        self.at = [new.get(node, -1) for node in self.at]
        return keep
