"""Rounds that do not ask the draft how sure it is: when, and what they are."""

from __future__ import annotations

import pytest

from specbeam.drafting import Proposal
from specbeam.drafting.asking import Asking
from specbeam.drafting.length import Learned
from tests.drafting.test_length import Pair, auto, plain_rounds


def rounds(asking: Asking, count: int, costs: float, spares: float) -> list[bool]:
    """Which of so many rounds asked; a round takes a second, and another `costs` if it asks."""
    found = []
    for _ in range(count):
        found.append(asking.next(3))
        asking.took(found[-1], 1.0 + costs * found[-1], True, spares)
    return found


def test_both_kinds_of_rounds_are_measured_first():
    assert rounds(Asking(), 10, costs=0.1, spares=0.0) == [True, False] * 5


@pytest.mark.parametrize(("costs", "spares", "most"), [(0.1, 0.0, 0.3), (0.1, 0.5, 1.0), (-0.1, 0.0, 1.0)])
def test_most_rounds_are_of_the_kind_that_is_cheaper(costs, spares, most):
    asking = Asking()
    rounds(asking, 40, costs, spares)
    asked = sum(rounds(asking, 80, costs, spares)) / 80
    assert most - 0.1 < asked <= most


def test_where_asking_always_stops_early_it_goes_on():
    asking, asked = Asking(), 0
    for _ in range(160):
        asks = asking.next(3)
        asking.took(asks, 1.0, not asks, 0.1 * asks)
        asked += asks
    assert asked > 140


def test_another_depth_is_measured_anew():
    asking = Asking()
    rounds(asking, 40, 0.1, 0.0)
    assert not asking.pays
    asking.next(4)
    assert asking.pays and not any(asking.seconds.values())


def test_rounds_that_stopped_early_say_nothing_of_the_seconds():
    asking = Asking()
    asking.took(True, 0.1, False, 0.2)
    assert not asking.seconds[True] and asking.spared > 0


@pytest.fixture
def chosen():
    """Three tokens are proposed in each round: a forward of more than four tokens takes a plain round more."""
    chosen = auto(Pair(), Pair())
    chosen.chains = True
    plain_rounds(chosen)
    for _ in range(15):
        for new in (1, 2, 4, 5, 9):
            chosen.costs.forward(1, new, False, 1 + 0.05 * (new - 1) + (new > 4))
        chosen.costs.drafted(1, 3, 0.3)
    chosen.costs.hear()
    chosen.learned.usual, chosen.wide = 0.9, 4
    return chosen


def test_a_round_that_does_not_ask_proposes_the_usual_depth(chosen):
    asks = []
    for _ in range(6):
        assert chosen.limits([8]) == [3], "up to the fourth token in all"
        asks.append(chosen.asks)
        if not chosen.asks:
            assert chosen.reads_on([True]) == [True]
            proposal = Proposal([[7] * 3], [[-1, 0, 1]], None, ["draft_model"], [""], [[]], forwards=3)
            assert chosen.trim(proposal) is proposal
    assert asks == [True, False] * 3


@pytest.mark.parametrize("change", [
    lambda chosen: setattr(chosen, "wide", 3), lambda chosen: setattr(chosen, "wide", 9),
    lambda chosen: setattr(chosen.learned, "credit", 1.0), lambda chosen: setattr(chosen, "chains", False),
    lambda chosen: setattr(chosen, "frozen", True)])
def test_it_asks_where_one_round_is_not_like_the_next(chosen, change):
    chosen.limits([8])
    change(chosen)
    for _ in range(6):
        chosen.limits([8])
        assert chosen.asks


def test_a_row_among_others_is_always_asked(chosen):
    for _ in range(6):
        chosen.limits([8, 8])
        assert chosen.asks


def test_what_was_not_asked_teaches_only_how_often_the_target_agrees():
    learned = Learned()
    learned.judged(Proposal([[7, 7]], [[-1, 0]], None, ["draft_model"], [""], [[]]), [[0]], asked=False)
    learned.hear()
    assert learned.tried == learned.kept == [0.0] * 10
    assert learned.usual != 0.5


def test_what_asking_spared_is_the_price_of_steps_less_what_they_would_have_brought(chosen):
    chosen.limits([8])
    assert chosen.full == 3 and chosen.asks
    chosen.learned.usual = 0.5
    assert chosen.proposes([True], [0.0]) == [True], "within the width that is kept"
    chance = chosen.reach[0]
    assert chosen.reads_on([True]) == [chance * 0.5 >= chosen.prices.draft]
    if chance * 0.5 < chosen.prices.draft:
        rate = max(1.0, chosen.prices.rate)
        assert chosen.spared == pytest.approx(2 * chosen.prices.draft - chance * (0.5 + 0.25) / rate)


def test_rounds_that_are_not_alike_are_not_measured(chosen):
    chosen.limits([8, 8])
    assert chosen.full == 0
    nothing = Proposal([[]], [[]], None, ["draft_model"], [""], [[]], forwards=1)
    chosen.round_done(nothing, [[]], [1], [0.1, 1.0, 1.1], 1)
    assert not any(chosen.costs.asking.seconds.values())
