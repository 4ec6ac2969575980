"""The table of successors, the tree that follows it, and how long it lives."""

from __future__ import annotations

import gc
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import prompts, tiny_model

from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting import token_recycling
from specbeam.drafting.token_recycling import _COSTS, SUCCESSORS, TokenRecycling, grow

tables = st.dictionaries(st.integers(0, 5), st.permutations(range(6)).map(lambda row: row[:4]))


def naive(table: dict[int, list[int]], token: int, limit: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every path in the table, as ranks, with its cost."""
    found = []
    for depth in range(1, limit + 1):
        for ranks in itertools.product(range(4), repeat=depth):
            at = token
            for rank in ranks:
                at = table[at][rank] if at in table else -1
            if at >= 0:
                found.append((sum(_COSTS[rank] for rank in ranks), ranks))
    return sorted(found)


@given(tables, st.integers(0, 5), st.integers(0, 3), st.integers(1, 20))
def test_the_tree_has_the_cheapest_paths_within_its_budget_and_depth(table, token, limit, nodes):
    tokens, parents = grow(table, [(0.0, token)], limit, nodes)
    every = naive(table, token, limit)
    assert len(tokens) == min(nodes, len(every))
    costs = []
    for node in range(len(tokens)):
        cost, at = 0.0, node
        while at >= 0:
            assert parents[at] < at
            above = tokens[parents[at]] if parents[at] >= 0 else token
            cost += _COSTS[table[above].index(tokens[at])]
            at = parents[at]
        costs.append(cost)
    assert torch.allclose(torch.tensor(costs), torch.tensor([cost for cost, _ in every[: len(costs)]]))


def test_the_table_holds_the_best_successors_of_every_token_read_rejected_ones_too():
    table: dict[int, list[int]] = {}
    drafter = TokenRecycling([table, table], 4)
    logits = torch.randn(2, 3, 50)
    drafter.observe([[7, 8, 9], [3]], logits)
    assert set(table) == {7, 8, 9, 3}
    assert table[8] == logits[0, 1].sort(descending=True).indices[:SUCCESSORS].tolist()
    assert table[3] == logits[1, 0].sort(descending=True).indices[:SUCCESSORS].tolist()


def test_greedy_calls_share_what_they_learn_about_a_target_and_sampled_ones_do_not():
    target, other = tiny_model("llama"), tiny_model("llama")
    options = {"drafter": "token_recycling", "max_new_tokens": 30}
    rounds = [len(speculative_generate(target, None, prompts((6,)), **options).trace[0].rounds) for _ in range(2)]
    assert rounds[1] < rounds[0]
    assert len(speculative_generate(other, None, prompts((6,)), **options).trace[0].rounds) == rounds[0]
    sampled = [speculative_generate(target, None, prompts((6,)), temperature=0.3, **options).trace[0].rounds
               for _ in range(2)]
    assert [r.proposed for r in sampled[0]] == [r.proposed for r in sampled[1]]


def test_a_table_lives_as_long_as_its_target():
    target = tiny_model("llama")
    speculative_generate(target, None, prompts((6,)), drafter="token_recycling", max_new_tokens=5)
    before = len(token_recycling._tables)
    del target
    gc.collect()
    assert len(token_recycling._tables) < before


def test_the_node_budget_is_kept_and_an_unknown_token_proposes_nothing():
    rounds = speculative_generate(tiny_model("llama"), None, prompts((6,)), drafter="token_recycling", tree_nodes=5,
                                  max_new_tokens=30).trace[0].rounds
    assert max(r.drafted for r in rounds) == 5
    assert rounds[0].drafted == 0 and rounds[0].why == "unknown token"
    assert {r.why for r in rounds if r.drafted == 5} == {"node budget"}
