"""Which proposals survive: the target's own choices; and rejection sampling, distributed as the target's text."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specbeam.acceptance import follow, rejection_sample
from specbeam.sampling import draw

N = 200_000


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# follow

@pytest.mark.parametrize("proposed, best, accepted", [
    ([5, 6, 7], [5, 6, 7, 8], 3), ([5, 6, 7], [5, 6, 9, 8], 2), ([5, 6, 7], [4, 6, 7, 8], 0),
    ([5, 6, 7], [5, 9, 7, 8], 1), ([5, 6], [5, 6, 7], 2), ([], [5], 0),
])
def test_the_longest_prefix_that_the_target_chose_itself_is_accepted(proposed, best, accepted):
    path, following = follow(proposed, range(-1, len(proposed) - 1), best)
    assert (path, following) == (list(range(accepted)), best[accepted])


def test_of_a_tree_the_branch_that_the_target_chose_is_accepted():
    tokens, parents = [5, 6, 7, 8, 9], [-1, -1, 0, 1, 3]
    assert follow(tokens, parents, [6, 0, 8, 0, 9, 3]) == ([1, 3, 4], 3)
    assert follow(tokens, parents, [5, 8, 8, 0, 9, 3]) == ([0], 8), "8 is there, but below the other branch"
    assert follow(tokens, parents, [4, 7, 8, 0, 9, 3]) == ([], 4)


@st.composite
def trees(draw):
    parents = [draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, 12)))]
    tokens = [draw(st.integers(0, 2)) for _ in parents]
    return tokens, parents, [draw(st.integers(0, 2)) for _ in range(len(parents) + 1)]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(trees())
def test_of_any_tree_a_path_is_accepted_whose_every_token_the_target_chose_and_which_goes_no_further(tree):
    tokens, parents, best = tree
    path, following = follow(tokens, parents, best)
    above = [-1, *path]
    assert [parents[node] for node in path] == above[:-1]
    assert [tokens[node] for node in path] == [best[node + 1] for node in above[:-1]]
    assert following == best[above[-1] + 1]
    assert not [node for node, parent in enumerate(parents) if parent == above[-1] and tokens[node] == following]


# rejection_sample

def distribution(*weights: float) -> torch.Tensor:
    return torch.tensor(weights) / sum(weights)


P = torch.stack([distribution(4, 3, 2, 1), distribution(1, 1, 6, 2), distribution(0, 5, 0, 5)])  # after 0, 1, 2 tokens
Q = torch.stack([distribution(1, 2, 3, 4), distribution(2, 0, 1, 7)])


def one_round(p: torch.Tensor, q: torch.Tensor, lengths: torch.Tensor, seed: int = 0):
    """N independent rounds with drafts drawn from q: accepted, following and the proposals."""
    uniform = numbers(N, 2 * len(q) + 1, seed=seed)
    proposed = torch.stack([draw(q[i].expand(N, -1), uniform[:, i]) for i in range(len(q))], 1)
    accepted, following = rejection_sample(proposed, p.expand(N, -1, -1), q.expand(N, -1, -1), lengths,
                                           uniform[:, len(q):])
    return accepted, following, proposed


def agrees(tokens: torch.Tensor, wanted: torch.Tensor) -> bool:
    counts = torch.bincount(tokens, minlength=len(wanted))
    possible = wanted > 0
    if counts[~possible].any():
        return False
    expected = wanted[possible].double()
    return bool(stats.chisquare(counts[possible], expected / expected.sum() * counts.sum().item()).pvalue > 1e-4)


def test_every_token_of_a_round_is_distributed_as_the_targets():
    """Joint over all that a round can commit: three tokens, each from its own p whatever was proposed."""
    accepted, following, proposed = one_round(P, Q, torch.full((N,), 2))
    committed = torch.cat([proposed, following[:, None]], 1)
    committed[torch.arange(N), accepted] = following
    assert agrees(committed[:, 0], P[0])
    went_on = accepted >= 1
    assert agrees(committed[went_on, 1], P[1])
    assert agrees(committed[accepted >= 2, 2], P[2])
    pairs = committed[went_on, 0] * 4 + committed[went_on, 1]
    first = torch.minimum(P[0], Q[0])  # what was accepted first, and independent of it the second
    assert agrees(pairs, torch.outer(first, P[1]).flatten())


def test_the_acceptance_rate_is_the_overlap_of_the_two_distributions():
    """Leviathan et al. 2023, corollary 3.6: the sum of min(p, q)."""
    accepted, _, _ = one_round(P, Q, torch.full((N,), 2))
    for step in range(2):
        overlap = torch.minimum(P[step], Q[step]).sum().item()
        reached = accepted >= step
        test = stats.binomtest(int((accepted[reached] > step).sum()), int(reached.sum()), overlap)
        assert test.pvalue > 1e-4


def test_equal_distributions_accept_everything():
    accepted, following, _ = one_round(torch.cat([Q, P[2:]]), Q, torch.full((N,), 2))
    assert accepted.tolist() == [2] * N
    assert agrees(following, P[2])


def test_distributions_without_overlap_accept_nothing_and_correct_from_p():
    p, q = torch.stack([distribution(0, 0, 1, 3)] * 2), distribution(2, 1, 0, 0)[None]
    accepted, following, _ = one_round(p, q, torch.full((N,), 1))
    assert accepted.sum() == 0
    assert agrees(following, p[0])


def test_a_correction_is_drawn_from_the_residual_and_never_what_the_draft_overrates():
    accepted, following, _ = one_round(P, Q, torch.full((N,), 2))
    assert agrees(following[accepted == 0], (P[0] - Q[0]).clamp(min=0))
    assert agrees(following[accepted == 1], (P[1] - Q[1]).clamp(min=0))


def test_rows_that_drafted_less_end_with_a_bonus_of_their_own():
    lengths = torch.arange(N) % 3
    accepted, following, _ = one_round(P, Q, lengths)
    assert bool((accepted <= lengths).all())
    for length in range(3):
        full = (lengths == length) & (accepted == length)
        assert agrees(following[full], P[length])


def test_without_proposals_the_token_is_drawn_from_the_target():
    nothing, uniform = torch.zeros(N, 0).long(), numbers(N, 1)
    accepted, following = rejection_sample(nothing, P[:1].expand(N, -1, -1), torch.zeros(N, 0, 4),
                                           torch.zeros(N).long(), uniform)
    assert accepted.sum() == 0
    assert agrees(following, P[0])


def test_a_row_does_not_depend_on_the_others():
    uniform = numbers(16, 3)
    proposed = torch.tensor([[a, b] for a, b in product(range(4), repeat=2)])
    lengths = torch.tensor([0, 1, 2, 2] * 4)
    p, q = P.expand(16, -1, -1), Q.expand(16, -1, -1)
    together = rejection_sample(proposed, p, q, lengths, uniform)
    for row in range(16):
        alone = rejection_sample(proposed[row, None], p[:1], q[:1], lengths[row, None], uniform[row, None])
        assert (alone[0].item(), alone[1].item()) == (together[0][row].item(), together[1][row].item())


def test_a_rejection_that_leaves_no_residual_still_gives_a_token_of_the_target():
    """Rounding can make p a little smaller than q everywhere."""
    q = distribution(1, 1, 0, 0)[None]
    p = torch.stack([q[0] * (1 - 1e-6), distribution(0, 0, 1, 1)])
    accepted, following = rejection_sample(torch.tensor([[0]]), p[None], q[None], torch.tensor([1]),
                                           torch.tensor([[1 - 1e-9, 0.7]], dtype=torch.float64))
    assert (accepted.item(), following.item()) == (0, 1)


# Negative controls.

def test_control_the_check_sees_a_correction_drawn_from_p():
    accepted, _, proposed = one_round(P, Q, torch.full((N,), 2))
    rejected = accepted == 0
    wrong = proposed[:, 0].clone()
    wrong[rejected] = draw(P[0].expand(N, -1), numbers(N, seed=5))[rejected]
    assert not agrees(wrong, P[0])


def test_control_the_check_sees_a_draft_drawn_from_something_else():
    uniform = numbers(N, 3, seed=1)
    proposed = draw(distribution(1, 1, 1, 1).expand(N, -1), uniform[:, 0])[:, None]
    accepted, following = rejection_sample(proposed, P[:2].expand(N, -1, -1), Q[:1].expand(N, -1, -1),
                                           torch.ones(N).long(), uniform[:, 1:])
    assert not agrees(torch.where(accepted > 0, proposed[:, 0], following), P[0])
