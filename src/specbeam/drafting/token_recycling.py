"""What the target would have said next, remembered for every token it ever read.

Token Recycling: Luo et al. 2024 (arXiv 2408.08696).
Idea: each target forward ranks the successors of every token it reads, of rejected proposals too, and all but one
of them are thrown away. Keep the best eight of each token in a table; a proposal is a tree that follows the table from
the last committed token. No second model, no training, and the table is warm for the next prompt.
Where it differs: the tree takes a node budget best first, by the usual acceptance of each rank, in place of the
paper's fixed list of 80 nodes; prompts teach their last token only (an answer to every prompt token is dear).
Greedy decoding shares one table per target. When sampling, where what is proposed decides which random numbers are
used up, each row begins with an empty one, so that a seed gives the same tokens in any batch, at any time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import log, log2
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel

from specbeam.drafting import Proposal, Settings
from specbeam.drafting.length import Length

SUCCESSORS = 8
NODES = 16  # of a tree, unless tree_nodes says otherwise; on the bundled pair 80 accept little more
# Bits that a step to the successor of each rank costs: rank r is right about (r + 1)^-1.7 as often as rank 0.
_COSTS = [1 + 1.7 * log2(rank + 1) for rank in range(SUCCESSORS)]

Table = dict[int, list[int]]
_tables: WeakKeyDictionary[PreTrainedModel, Table] = WeakKeyDictionary()


def make(settings: Settings, target: PreTrainedModel, draft: Any, request: Any, vocabulary: int) -> TokenRecycling:
    if request.config.do_sample:
        tables: list[Table] = [{} for _ in request.rows]
    else:
        tables = [_tables.setdefault(target, {})] * len(request.rows)
    return TokenRecycling(tables, settings.tree_nodes or NODES)


def forget(target: PreTrainedModel) -> None:
    """Empty the table of this target."""
    _tables.pop(target, None)


class TokenRecycling:
    """The table that each row of a batch follows."""

    name = "token_recycling"

    def __init__(self, tables: list[Table], nodes: int):
        self.tables, self.nodes = tables, nodes

    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Length) -> Proposal:
        trees = [grow(table, [(0.0, text[-1])], limit, self.nodes)
                 for table, text, limit in zip(self.tables, sequences, limits, strict=True)]
        for row, (limit, (tokens, _)) in enumerate(zip(limits, trees, strict=True)):
            if limit and len(tokens) in (0, self.nodes):
                length.why[row] = "node budget" if tokens else "unknown token"
        return Proposal([t for t, _ in trees], [p for _, p in trees], None, [self.name] * len(trees),
                        list(length.why))

    def branch(self, row: int, known: Sequence[int], texts: Sequence[list[int]], scores: Sequence[float], limit: int
               ) -> tuple[list[int], list[int]]:
        """As in prompt_lookup.py; a less probable text costs the bits by which it is so."""
        costs = [(max(scores) - score) / log(2) for score in scores]
        return grow(self.tables[row], [(cost, text[-1]) for cost, text in zip(costs, texts, strict=True)], limit,
                    self.nodes)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """The coming text says it too."""

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
        """tokens[b]: what the target read; logits [rows, ≥ tokens, vocabulary]: what it answered behind each."""
        best = logits.topk(min(SUCCESSORS, logits.shape[-1])).indices.tolist()
        for table, read, successors in zip(self.tables, tokens, best, strict=True):
            table.update(zip(read, successors, strict=False))  # short rows are padded on the right

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.tables = [self.tables[row] for row in rows]

    def join(self, more: TokenRecycling) -> None:
        self.tables = self.tables + more.tables


def grow(table: Table, roots: Sequence[tuple[float, int]], limit: int, nodes: int) -> tuple[list[int], list[int]]:
    """The `nodes` cheapest nodes below the roots (cost, token), at most `limit` deep: tokens and parents (-1 - i: the
    i-th root), parents first.

    A node costs its own step and all steps above it. Taking one offers its next sibling and its first child."""
    tokens: list[int] = []
    parents: list[int] = []
    offered: list[tuple[float, int, int, int, int]] = []  # cost, parent, depth, rank, token before it

    def offer(above: float, parent: int, depth: int, rank: int, before: int) -> None:
        if depth <= limit and rank < len(table.get(before, ())):
            heapq.heappush(offered, (above + _COSTS[rank], parent, depth, rank, before))

    for number, (above, token) in enumerate(roots):
        offer(above, -1 - number, 1, 0, token)
    while offered and len(tokens) < nodes:
        cost, parent, depth, rank, before = heapq.heappop(offered)
        tokens.append(table[before][rank])
        parents.append(parent)
        offer(cost - _COSTS[rank], parent, depth, rank + 1, before)
        offer(cost, len(tokens) - 1, depth + 1, 0, tokens[-1])
    return tokens, parents
