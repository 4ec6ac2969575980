"""Rounds that do not ask the draft how sure it is: when, and what they are."""

from __future__ import annotations

from math import ceil

import pytest

from specbeam.drafting import Proposal
from specbeam.drafting.asking import Asking
from specbeam.drafting.length import Learned, Length, Prices
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
    assert asking.pays and not asking.longer and not asking.lately


def test_rounds_that_stopped_early_say_nothing_of_the_seconds():
    asking = Asking()
    asking.took(True, 0.1, False, 0.2)
    assert not asking.lately and asking.spared > 0


def test_a_machine_that_becomes_faster_does_not_change_what_asking_costs():
    asking = Asking()
    for turn in range(400):
        asks = asking.next(3)
        asking.took(asks, (1.0 + 0.1 * asks) * 0.99**turn, True, 0.0)
    assert not asking.pays, "rounds are compared with those beside them: the last that asked were long ago, and slower"


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
    lambda chosen: setattr(chosen, "wide", 0),  # what asking spares is known by a padded forward
    lambda chosen: setattr(chosen.learned, "credit", 1.0), lambda chosen: setattr(chosen, "chains", False),
    lambda chosen: setattr(chosen, "frozen", True)])
def test_it_asks_where_one_round_is_not_like_the_next(chosen, change):
    chosen.limits([8])
    change(chosen)
    for _ in range(6):
        chosen.limits([8])
        assert chosen.asks and not chosen.full


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
    assert not chosen.costs.asking.lately


@pytest.fixture
def alike(chosen):
    """It is known that asking does not pay."""
    rounds(chosen.costs.asking, 40, costs=0.1, spares=0.0)
    chosen.costs.asking.rounds, chosen.learned.heard = 0, 24
    return chosen


def went(chosen, kept: int, changed: bool = False) -> None:
    """A round in which so many of three were accepted."""
    three = Proposal([[7] * 3], [[-1, 0, 1]], None, ["draft_model"], [""], [[]], forwards=3)
    chosen.round_done(three, [list(range(kept))], [kept + 1], [0.3, 1.15, 1.5], 4, changed)


def learned_from(chosen) -> int:
    return chosen.learned.heard - 24 + len(chosen.learned.unheard)


def test_rounds_that_are_alike_are_learned_from_together(alike):
    """With a credit of 4, four rounds can be lost: it is looked at again before the fifth."""
    alike.learned.credit = 4.0
    heard = []
    for _ in range(5):
        assert alike.limits([8]) == [3] and not alike.asks
        went(alike, 3)
        heard.append(learned_from(alike))
    assert heard == [0, 0, 0, 4, 4]


@pytest.mark.parametrize("credit", [2.0, 2.5, 3.0, 4.0])
def test_whatever_comes_the_credit_lasts_as_long_as_nobody_looks(alike, credit):
    """Every round is lost: only the last one may use it up."""
    alike.learned.credit = credit
    alike.limits([8])
    assert 0 < alike.learned.blind < credit
    while alike.learned.blind:
        went(alike, 0)
        alike.limits([8])
    assert not alike.idle and learned_from(alike) == 0
    went(alike, 0)
    assert learned_from(alike) == ceil(credit)


@pytest.mark.parametrize("most, wide", [(2, 4), (8, 9), (8, 1)])
def test_at_the_end_of_an_answer_or_at_another_width_it_is_thought_again(alike, most, wide):
    alike.limits([8])
    went(alike, 3)
    assert alike.learned.blind == 6, "of a credit of seven"
    alike.wide = wide
    alike.limits([most])
    assert alike.asks or alike.learned.blind < 6, "the round before counts"


def test_the_next_answer_begins_as_this_one_went(alike):
    alike.limits([8])
    went(alike, 3)
    assert learned_from(alike) == 0
    alike.ends()
    assert learned_from(alike) == 1
    following = Length(alike.settings, alike.target, Pair(), 1)
    following.learned, following.costs, following.chains = alike.learned, alike.costs, True
    assert following.limits([8]) == [3] and following.why == ["not worth its time"]
    assert following.prices == Prices(), "nothing was worked out"


def test_nobody_goes_on_unseeing_where_the_next_round_may_be_another(alike):
    alike.learned.credit = 1.5
    alike.limits([8])
    alike.ends()
    assert not alike.learned.blind


def test_rounds_without_a_proposal_are_learned_from_together(alike):
    nothing = Proposal([[]], [[]], None, ["suffix"], ["no match"], [[]])
    counts = []
    for _ in range(5):
        alike.learned.blind = 0
        alike.round_done(nothing, [[]], [1], [0.0, 1.0, 1.1], 1)
        counts.append(learned_from(alike))
    assert counts == [0, 0, 0, 4, 4]
    alike.learned.credit = 0.5
    alike.round_done(nothing, [[]], [1], [0.0, 1.0, 1.1], 1)
    assert learned_from(alike) == 6, "a pause may begin"


def test_rounds_that_are_not_learned_from_yet_are_counted_among_those_that_may_be_lost(alike):
    nothing = Proposal([[]], [[]], None, ["draft_model"], [""], [[]], forwards=1)
    for _ in range(3):
        alike.round_done(nothing, [[]], [1], [0.0, 1.0, 1.1], 1)
    assert learned_from(alike) == 0
    alike.learned.credit = 2.0
    assert alike.limits([8]) == [3] and alike.learned.blind == 0


def test_an_answer_is_not_charged_for_the_width_that_it_begins_with(alike, monkeypatch):
    nets: list[float] = []
    monkeypatch.setattr(Learned, "paid", lambda self, net, rows: nets.append(net))
    for _ in range(5):
        alike.costs.forward(1, 4, True, 2.0)
    alike.costs.hear()
    alike.began = False
    for _ in range(2):
        alike.limits([8])
        went(alike, 2, changed=True)
    alike.ends()
    assert nets[0] > nets[1]


@pytest.mark.parametrize("credit", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_a_pause_does_not_come_later_for_rounds_that_are_learned_from_together(alike, credit):
    """A draft forward for nothing takes a plain round."""
    dear = Proposal([[]], [[]], None, ["draft_model"], [""], [[]], forwards=1)
    for _ in range(15):
        alike.costs.drafted(1, 1, 1.0)
    alike.costs.hear()
    alike.learned.credit, rounds = credit, 0
    loss = alike.costs.usual(1, 1, 1) - 1
    while not alike.idle:
        alike.round_done(dear, [[]], [1], [1.0, 1.0, 2.0], 1)
        rounds += 1
    assert rounds == ceil(credit / min(1.0, loss))


def test_an_answer_that_ends_by_length_decides_the_next_one_too(alike):
    alike.limits([8])
    went(alike, 3)
    alike.limits([2])
    went(alike, 2)
    alike.ends()
    assert alike.learned.blind > 0
