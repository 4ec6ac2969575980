"""Rules that judge a whole block or a tree: what is committed is distributed as the target's text, whatever the draft.

A world of four tokens whose probabilities depend on the whole prefix. A round proposes up to two tokens deep; what it
leaves open of three tokens is drawn from the target. The joint law of the three is held against the exact one by
chi-square; with fresh seeds a correct rule would fail each comparison with probability 1e-4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product

import pytest
import torch
from planted import mutated
from scipy import stats
from torch import Tensor

from specbeam import acceptance
from specbeam.acceptance import block_verification, rejection_sample, sample_tree, typical
from specbeam.sampling import draw

N, M = 200_000, 6_000  # rounds of chains, which are judged together, and of trees
V, FALSE_ALARM = 4, 1e-4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(seed: int) -> list[Tensor]:
    """Next-token probabilities after every prefix: [4], [4, 4], [4, 4, 4], the last index the next token's."""
    return [0.9 * (5 * numbers(*[V] * (depth + 1), seed=seed + depth)).softmax(-1) + 0.1 / V for depth in range(3)]


P, Q = world(0), world(50)
EXACT = (P[0][:, None, None] * P[1][:, :, None] * P[2]).flatten()


def after(model: list[Tensor], *tokens: Tensor) -> Tensor:
    """Probabilities [rows, 4] after these tokens, each [rows]."""
    return model[len(tokens)][tokens] if tokens else model[0]


def law_of(committed: Tensor, counts: Tensor, seed: int = 7) -> float:
    """The p-value of what was committed: [rows, 3], of which counts [rows] are there; the rest is drawn from P."""
    uniform, tokens = numbers(len(committed), V, seed=seed), []
    for place in range(3):
        own = draw(after(P, *tokens).expand(len(committed), -1), uniform[:, place])
        tokens.append(torch.where(counts > place, committed[:, place], own))
    seen = torch.bincount((tokens[0] * V + tokens[1]) * V + tokens[2], minlength=V**3).double()
    wanted = EXACT * len(committed)
    rare = wanted < 5
    seen, wanted = (torch.cat([one[~rare], one[rare].sum()[None]]) for one in (seen, wanted))
    often = wanted > 0
    return float(stats.chisquare(seen[often], wanted[often]).pvalue)


# Chains.

def chains(drawn: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """N proposals of two tokens [N, 2], p [N, 3, V] and q [N, 2, V], drawn from Q or functions of the prefix."""
    uniform = numbers(N, 2, seed=3)
    if drawn:
        first = draw(Q[0].expand(N, -1), uniform[:, 0])
        second = draw(after(Q, first), uniform[:, 1])
        q = torch.stack([Q[0].expand(N, -1), after(Q, first)], 1)
    else:
        first, q = torch.full((N,), 2), None
        second = torch.full((N,), 1)
    p = torch.stack([P[0].expand(N, -1), after(P, first), after(P, first, second)], 1)
    return torch.stack([first, second], 1), p, q


def committed_by(rule: Callable, drawn: bool, lengths: Tensor, lie: float = 1.0) -> tuple[Tensor, Tensor]:
    """What N rounds commit [N, 3], and how many tokens."""
    proposed, p, q = chains(drawn)
    if lie != 1.0 and q is not None:
        q = (q**lie) / (q**lie).sum(-1, keepdim=True)
    accepted, following = rule(proposed, p, q, lengths, numbers(N, 3, seed=5))
    tokens = torch.cat([proposed, following[:, None]], 1)
    tokens[torch.arange(N), accepted] = following
    return tokens, accepted + 1


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "points of probability one"])
@pytest.mark.parametrize("rule", [rejection_sample, block_verification])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_rule_for_chains_is_lossless(rule, drawn, length):
    assert law_of(*committed_by(rule, drawn, torch.full((N,), length))) > FALSE_ALARM


@pytest.mark.parametrize("drawn", [True, False])
def test_block_verification_is_lossless_in_every_row_of_a_ragged_batch(drawn):
    lengths = torch.arange(N) % 3
    tokens, counts = committed_by(block_verification, drawn, lengths)
    assert bool((counts <= lengths + 1).all())
    for length in range(3):
        mine = lengths == length
        assert law_of(tokens[mine], counts[mine]) > FALSE_ALARM


def test_block_verification_never_looks_behind_the_end_of_a_row():
    proposed, p, q = (one[:100] for one in chains(True))
    uniform, lengths = numbers(100, 3), torch.ones(100).long()
    other = proposed.clone()
    other[:, 1] = (other[:, 1] + 1) % V
    noise = torch.cat([q[:, :1], torch.full_like(q[:, 1:], 1 / V)], 1)
    a = block_verification(proposed, p, q, lengths, uniform)
    b = block_verification(other, p, noise, lengths, uniform)
    alone = block_verification(proposed[:, :1], p[:, :2], q[:, :1], lengths, uniform[:, :2])
    assert a[0].tolist() == b[0].tolist() == alone[0].tolist()
    assert a[1].tolist() == b[1].tolist() == alone[1].tolist()


@pytest.mark.parametrize("rule, wanted", [(rejection_sample, 10 / 9), (block_verification, 11 / 9)])
def test_the_example_of_sun_et_al_accepts_ten_ninths_by_token_and_eleven_ninths_by_block(rule, wanted):
    """arXiv 2403.10444, section 3: accepted draft tokens in expectation, the bonus not counted."""
    target, draft = torch.tensor([1 / 3, 2 / 3]).double(), torch.tensor([2 / 3, 1 / 3]).double()
    uniform = numbers(N, 5, seed=2)
    proposed = torch.stack([draw(draft.expand(N, -1), uniform[:, i]) for i in range(2)], 1)
    accepted, _ = rule(proposed, target.expand(N, 3, -1), draft.expand(N, 2, -1), torch.full((N,), 2), uniform[:, 2:])
    error = 4 * accepted.double().std() / N**0.5
    assert abs(accepted.double().mean() - wanted) < error < 0.01


def test_block_verification_accepts_more_than_rejection_sampling_in_any_world():
    lengths = torch.full((N,), 2)
    by_token, by_block = (committed_by(rule, True, lengths)[1].double().mean()
                          for rule in (rejection_sample, block_verification))
    assert by_block > by_token


def test_a_sure_token_is_accepted_with_the_targets_probability_for_it():
    _, counts = committed_by(block_verification, False, torch.ones(N).long())
    assert stats.binomtest(int((counts == 2).sum()), N, float(P[0][2])).pvalue > FALSE_ALARM


# Trees: three children of the committed text, two of each of the first two; q after each of these places.

PARENTS = [-1, -1, -1, 0, 0, 1, 1]


def siblings(q: Tensor, uniform: Tensor, replaced: bool) -> list[Tensor]:
    """Tokens [rows] one after the other from q [rows, V], without replacement unless `replaced`."""
    left, found = q.clone(), []
    for turn in range(uniform.shape[1]):
        found.append(draw(left, uniform[:, turn]))
        left = left if replaced else left.scatter(1, found[-1][:, None], 0.0)
    return found


@functools.cache
def trees(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """M trees: tokens [M, 7], p [M, 8, V], q [M, 3, V]."""
    uniform = numbers(M, 7, seed=3)
    root = Q[0].expand(M, -1)
    if kind == "points":
        tops = [torch.full((M,), token) for token in (2, 0, 3)]
        below = [torch.full((M,), token) for token in (1, 0, 0, 2)]
        q = None
    else:
        tops = siblings(root, uniform[:, :3], kind == "replaced")
        below = [token for i, top in enumerate(tops[:2])
                 for token in siblings(after(Q, top), uniform[:, 3 + 2 * i: 5 + 2 * i], kind == "replaced")]
        q = torch.stack([root, *(after(Q, top) for top in tops[:2])], 1)
    places = [(), *((top,) for top in tops), *((tops[i // 2], token) for i, token in enumerate(below))]
    p = torch.stack([after(P, *tokens).expand(M, -1) for tokens in places], 1)
    return torch.stack([*tops, *below], 1), p, q


def law_of_trees(rule: Callable, kind: str, lie: float = 1.0) -> float:
    tokens, p, q = trees(kind)
    if q is not None:
        q = (q**lie) / (q**lie).sum(-1, keepdim=True)
    uniform, committed = numbers(M, 8, seed=5), []
    for row, ids in enumerate(tokens.tolist()):
        path, following = rule(ids, PARENTS, p[row], None if q is None else q[row], uniform[row])
        committed.append([*(ids[node] for node in path), following])
    counts = torch.tensor([len(done) for done in committed])
    return law_of(torch.tensor([[*done, 0, 0][:3] for done in committed]), counts)


@pytest.mark.parametrize("kind", ["without replacement", "points"])
def test_a_tree_is_sampled_without_loss(kind):
    assert law_of_trees(sample_tree, kind) > FALSE_ALARM


def test_a_point_in_q_is_the_same_as_no_q():
    """Rows that drew nothing, beside rows that did."""
    tokens, p, _ = trees("points")
    ones = torch.zeros(M, 8, V)
    for node, parent in enumerate(PARENTS):
        if PARENTS.index(parent) == node:  # one child each: the first
            ones[torch.arange(M), parent + 1, tokens[:, node]] = 1.0
    chain, parents = [0, 3], [-1, 0]
    for row in range(500):
        ids, at = tokens[row, chain].tolist(), [0, 1, 4]
        args = (ids, parents, p[row, at])
        uniform = numbers(3, seed=row)
        assert sample_tree(*args, ones[row, at], uniform) == sample_tree(*args, None, uniform)


def test_a_chain_is_a_tree_of_one_branch():
    """Token for token what `rejection_sample` gives with the same uniform numbers."""
    proposed, p, q = (one[:500] for one in chains(True))
    uniform = numbers(500, 3, seed=9)
    accepted, following = rejection_sample(proposed, p, q, torch.full((500,), 2), uniform)
    for row in range(500):
        path, token = sample_tree(proposed[row].tolist(), [-1, 0], p[row], q[row], uniform[row])
        assert (len(path), token) == (accepted[row].item(), following[row].item())


def test_siblings_beyond_what_the_draft_can_draw_are_never_accepted():
    """The draft knows two tokens; its third child repeats one of them."""
    p, q = torch.tensor([0.2, 0.2, 0.6]).expand(4, -1), torch.tensor([[0.5, 0.5, 0.0]])
    for first, repeated in product((0, 1), (0, 1)):
        for seed in range(200):
            path, token = sample_tree([first, 1 - first, repeated], [-1, -1, -1], p, q, numbers(4, seed=seed))
            assert path != [2]
            assert path or token == 2, "p - q leaves nothing but token 2"


# Planted faults.

@pytest.mark.parametrize("right, wrong, kind", [
    ("left = left / left.sum().clamp(min=1e-300)", "pass", "without replacement"),
    ("left = left / left.sum().clamp(min=1e-300)", "pass", "points"),
    ("mine[x] = 0.0", "pass", "without replacement"),
    ("mine = mine / mine.sum().clamp(min=1e-300)", "pass", "without replacement"),
    ("residual = (left - mine).clamp(min=0)", "residual = left", "without replacement"),
    ("left[x] = 0.0", "pass", "points"),
], ids=["residual not renormalised", "points not renormalised", "treated as drawn with replacement",
        "draft not renormalised", "correction from p", "a rejected point stays"])
def test_a_mistake_in_the_rule_for_trees_is_caught(right, wrong, kind):
    assert law_of_trees(mutated(acceptance, "sample_tree", right, wrong), kind) < FALSE_ALARM**2


@pytest.mark.parametrize("right, wrong", [
    (".clamp(max=1.0)", ""),
    ("lengths == i + 1, weight,", "lengths == i + 1, p_token[:, i] / q_token[:, i],"),
    ("left / (left + 1 - weight)", "weight"),
    ("accepted, scale, uniform, draw)", "accepted, scale * 0 + 1, uniform, draw)"),
], ids=["weight above one", "last token alone", "prefix by its weight", "residual of p, not of w p"])
def test_a_mistake_in_block_verification_is_caught(right, wrong):
    rule = mutated(acceptance, "block_verification", right, wrong)
    assert law_of(*committed_by(rule, True, torch.full((N,), 2))) < FALSE_ALARM**2


def test_siblings_drawn_with_replacement_cost_a_try_but_no_exactness():
    """A token drawn twice has nothing left in q the second time, and is passed over; a rule that tries it is caught."""
    assert law_of_trees(sample_tree, "replaced") > FALSE_ALARM
    tries_again = mutated(acceptance, "sample_tree", "if float(mine[x]) > 0 else 0.0", "if float(mine[x]) > 0 else 1.0")
    assert law_of_trees(tries_again, "replaced") < FALSE_ALARM**2


@pytest.mark.parametrize("rule", [rejection_sample, block_verification])
def test_a_draft_that_hands_over_other_probabilities_than_it_drew_from_is_caught(rule):
    assert law_of(*committed_by(rule, True, torch.full((N,), 2), lie=2.0)) < FALSE_ALARM**2
    assert law_of_trees(sample_tree, "without replacement", lie=2.0) < FALSE_ALARM**2


def test_a_bonus_drawn_from_the_draft_is_caught():
    def rule(tokens, parents, p, q, uniform):
        path, following = sample_tree(tokens, parents, p, q, uniform)
        if len(path) == 2:
            following = int(draw(Q[2][tokens[path[0]], tokens[path[1]]][None], uniform[-1:]))
        return path, following

    assert law_of_trees(rule, "without replacement") < FALSE_ALARM**2


# Typical acceptance is LOSSY, and says so.

def test_typical_acceptance_changes_the_distribution():
    assert law_of_trees(lambda tokens, parents, p, _, uniform: typical(tokens, parents, p, uniform),
                        "without replacement") < FALSE_ALARM**2
    assert "LOSSY" in typical.__doc__


def test_typical_acceptance_keeps_what_is_probable_enough_and_goes_on_behind_it():
    p = torch.tensor([[0.5, 0.45, 0.05], [0.02, 0.08, 0.9], [1 / 3, 1 / 3, 1 / 3]])
    always = torch.zeros(3).double()
    assert typical([1, 2], [-1, 0], p, always)[0] == [0, 1]
    assert typical([2, 2], [-1, 0], p, always)[0] == [], "0.05 is below 0.09"
    assert typical([2, 1], [-1, -1], p, always)[0] == [1], "a later sibling may do"
