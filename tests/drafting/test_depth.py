"""How many beam steps the draft goes ahead: decided from seconds and survival, given here by hand."""

from __future__ import annotations

from specbeam.drafting.depth import LONGEST, Depth


class Model:
    """Something that costs can be remembered for."""


def played(survival: list[float], step: float, per_depth: float, rounds: int = 400) -> tuple[Depth, list[int]]:
    """Rounds in which the k-th step survives in `survival[k]` of the cases, at these seconds."""
    depths, chosen, clock = Depth(Model(), Model(), "auto", (4, 6), 1), [], 0
    for _ in range(rounds):
        depth = depths.choose()
        chosen.append(depth)
        count = 1
        while count <= depth and (clock := clock + 37) % 100 < 100 * survival[count - 1]:
            count += 1
        depths.learn(depth, [count], step + per_depth * depth)
    return depths, chosen


def test_a_fixed_depth_is_that_depth():
    depths = Depth(Model(), Model(), 3, (4, 6), 1)
    assert [depths.choose() for _ in range(5)] == [3] * 5 and not depths.auto


def test_the_yardsticks_are_measured_first():
    _, chosen = played([1.0] * LONGEST, 1.0, 0.1, rounds=6)
    assert chosen == [0, 0, 0, 1, 1, 1]


def test_where_every_step_survives_and_drafting_is_cheap_it_goes_as_deep_as_it_may():
    _, chosen = played([1.0] * LONGEST, 1.0, 0.05)
    assert chosen[-20:].count(LONGEST) >= 18


def test_where_no_step_survives_it_decodes_plainly_and_tries_ever_more_rarely():
    depths, chosen = played([0.0] * LONGEST, 1.0, 0.5, rounds=1000)
    assert chosen[-200:].count(0) >= 198
    assert sum(depth > 0 for depth in chosen) < 20
    assert depths.costs.pause > 100


def test_a_gain_within_the_noise_is_no_reason_to_speculate():
    # 1.4 steps for 1.38 times the seconds: 1 % is not worth a try that may fail
    _, chosen = played([0.4, 0.0, 0.0, 0.0, 0.0, 0.0], 1.0, 0.38)
    assert chosen[-100:].count(0) >= 95


def test_what_was_learned_stays_with_the_pair_and_the_width():
    target, draft = Model(), Model()
    first = Depth(target, draft, "auto", (4, 6), 1)
    first.learn(0, [], 1.0)
    assert Depth(target, draft, "auto", (4, 6), 1).costs is first.costs
    assert Depth(target, draft, "auto", (8, 10), 1).costs is not first.costs
