"""What rounds cost: a machine with known seconds is measured, and the fit has to say what was not measured."""

from __future__ import annotations

from dataclasses import astuple
from itertools import chain
from math import isfinite
from random import Random

import numpy as np
import pytest

from specbeam.drafting.costs import Costs, Prices, fit


def target_seconds(rows: int, new: int, changed: bool = False) -> float:
    return 3.0 + 0.2 * rows * new + 0.4 * (new > 1) + 1.2 * changed


def draft_seconds(rows: int, steps: int) -> float:
    return 0.5 + steps * (0.4 + 0.05 * rows)


def measured(shapes, times: int = 15, noise: float = 0.03, slow: float = 1.0, costs: Costs | None = None) -> Costs:
    """Costs that have seen these (rows, new) so often, each second time behind a forward of another shape."""
    costs, random = costs or Costs(), Random(0)
    for turn in range(times):
        for rows, new in shapes:
            some = random.lognormvariate(0, noise) * slow
            changed = turn % 2 == 1
            costs.forward(rows, new, changed, target_seconds(rows, new, changed) * some)
            if new > 1:
                costs.drafted(rows, new - 1, draft_seconds(rows, new - 1) * some)
    costs.hear()
    return costs


SHAPES = [(8, 1), (8, 2), (8, 3), (8, 5), (2, 3), (1, 1), (1, 4)]


@pytest.mark.parametrize("rows, new", [(8, 4), (8, 9), (5, 1), (5, 2), (4, 4), (2, 1), (1, 6)])
def test_shapes_that_were_never_seen_are_known_from_others(rows, new):
    assert measured(SHAPES).seconds(rows, new) == pytest.approx(target_seconds(rows, new), rel=0.08)


@pytest.mark.parametrize("rows, new", SHAPES)
def test_shapes_that_were_seen_are_known_better(rows, new):
    assert measured(SHAPES).seconds(rows, new) == pytest.approx(target_seconds(rows, new), rel=0.04)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_prices_are_in_plain_rounds(rows):
    prices, plain = measured(SHAPES).prices(rows), target_seconds(rows, 1)
    assert prices.token + prices.bend == pytest.approx(0.2 * rows / plain, rel=0.3)
    assert prices.draft == pytest.approx((0.4 + 0.05 * rows) / plain, rel=0.15)
    assert prices.change == pytest.approx(1.2 / plain, rel=0.25)


def test_a_round_costs_its_draft_steps_and_the_longer_forward():
    costs = measured(SHAPES)
    plain = target_seconds(8, 1)
    assert costs.usual(8, 4, 5) == pytest.approx((target_seconds(8, 5) + draft_seconds(8, 4)) / plain, rel=0.06)
    assert costs.usual(8, 0, 1) == pytest.approx(1.0)


def test_a_drafts_first_step_is_told_from_the_next_ones():
    first, more = measured([(2, 2), (2, 3), (2, 5)]).drafting(2)
    assert (first, more) == pytest.approx((1.0, 0.5), rel=0.1)


def test_with_one_length_only_all_steps_are_alike():
    costs = Costs()
    costs.drafted(1, 4, 0.4)
    assert costs.drafting(1) == pytest.approx((0.1, 0.1))


def test_before_anything_longer_was_measured_a_token_has_its_usual_price():
    costs = measured([(8, 1)])
    assert costs.few and costs.prices(8).token == pytest.approx(Prices().token, rel=0.2)
    assert costs.prices(8).draft == Prices().draft


def test_nothing_is_ever_cheaper_than_free():
    costs = Costs()
    for _ in range(15):
        costs.forward(1, 1, False, 2.0)
        costs.forward(1, 5, False, 1.0)  # slower when it was asked for less: noise
        costs.drafted(1, 1, 1.0)
        costs.drafted(1, 5, 0.5)
    prices = costs.prices(1)
    assert min(prices.token, prices.bend, prices.first, prices.change, prices.draft) >= 0
    first, more = costs.drafting(1)
    assert first >= more >= 0


@pytest.mark.parametrize("rows, known", [(8, True), (5, True), (15, True), (4, False), (16, False), (1, False)])
def test_plain_rounds_of_half_as_many_rows_or_twice_are_measured(rows, known):
    costs = Costs()
    costs.forward(8, 1, False, 1.0)
    assert not costs.knows(8), "once may have been by bad luck"
    costs.forward(8, 1, False, 1.0)
    assert costs.knows(rows) == known


def test_one_row_is_known_by_itself_only():
    """Runners have kernels of their own for it."""
    costs = measured([(2, 1)])
    assert costs.knows(2) and costs.knows(3) and not costs.knows(1)


@pytest.mark.parametrize("slow", [2.0, 0.5])
def test_a_machine_that_became_slower_or_faster_is_so_for_shapes_not_seen_since(slow):
    """Else proposals would be compared with plain rounds of another time."""
    costs = measured(SHAPES)
    before = costs.seconds(8, 5) / costs.seconds(8, 1)
    measured([(8, 1)], 40, slow=slow, costs=costs)
    assert costs.seconds(8, 1) == pytest.approx(slow * target_seconds(8, 1), rel=0.05)
    assert costs.seconds(8, 5) / costs.seconds(8, 1) == pytest.approx(before, rel=0.12), "else twice or half that"


def test_one_slow_forward_is_not_a_slow_machine():
    costs = measured(SHAPES)
    for _ in range(2):
        costs.forward(8, 1, False, 100.0)
    assert costs.seconds(8, 5) == pytest.approx(target_seconds(8, 5), rel=0.04)


def test_another_size_of_context_begins_with_one_measurement_of_each_shape():
    first = measured(SHAPES)
    copy = first.copy()
    assert copy.seconds(8, 3) == pytest.approx(first.seconds(8, 3), rel=0.1) and not copy.knows(8)
    measured([(8, 1), (8, 3)], slow=3.0, costs=copy)
    assert copy.plain(8) == pytest.approx(3 * target_seconds(8, 1), rel=0.15)
    assert first.plain(8) == pytest.approx(target_seconds(8, 1), rel=0.05)


@pytest.mark.parametrize("shape", [(8, 9), (8, 1)])
def test_a_first_forward_that_compiled_something_ruins_no_price(shape):
    costs, before = measured(SHAPES), measured(SHAPES).prices(8)
    costs.forward(*shape, False, 3000.0)
    costs.drafted(8, 8, 3000.0)
    assert costs.prices(8).token == pytest.approx(before.token, rel=0.15)
    assert costs.prices(8).draft == pytest.approx(before.draft, rel=0.15)
    assert costs.seconds(8, 1) == pytest.approx(target_seconds(8, 1), rel=0.05)


def test_ten_thousand_rounds_of_skewed_noise_lead_nowhere():
    costs, random = Costs(), Random(1)
    for _ in range(3000):
        for rows, new in SHAPES:
            slow = 3.0 if random.random() < 0.05 else 1.0
            costs.forward(rows, new, False, target_seconds(rows, new) * random.lognormvariate(0, 0.06) * slow)
    for rows, new in SHAPES:
        assert costs.seconds(rows, new) == pytest.approx(target_seconds(rows, new), rel=0.06)


def test_plain_rounds_that_were_measured_long_ago_are_not_known():
    costs = measured([(1, 1), (1, 3)])
    assert costs.knows(1)
    measured([(8, 1), (8, 2), (8, 3)], 300, costs=costs)
    assert costs.knows(8) and not costs.knows(1)


def test_a_measurement_after_a_long_time_takes_the_place_of_the_old_ones():
    costs = measured([(8, 9)])
    measured([(8, 1), (8, 2), (8, 3)], 80, costs=costs)
    costs.forward(8, 9, False, 1.0)
    costs.hear()
    assert list(costs.target[8, 9, 0]) == [1.0]


def test_measurements_are_heard_together_and_at_once_where_nothing_is_known():
    costs = measured([(8, 1), (8, 3)])
    before = costs.seconds(8, 3)
    costs.forward(8, 3, False, 100.0)
    assert costs.seconds(8, 3) == before and costs.unheard
    costs.forward(1, 1, False, 1.0)
    costs.forward(1, 1, False, 1.0)
    assert costs.knows(8) and costs.unheard, "eight rows are known"
    assert costs.knows(1) and not costs.unheard


@pytest.mark.parametrize("rows, place", [(1, 4), (2, 2), (3, 1)])
def test_where_a_runner_does_otherwise_for_more_tokens_a_token_costs_more(rows, place):
    """Up to four tokens in all by a kernel of their own, as openvino.py of 16-bit weights."""
    costs, random = Costs(), Random(0)
    for _ in range(15):
        for new in (1, 2, 3, 4, 5, 6, 9):
            some = random.lognormvariate(0, 0.03)
            costs.forward(rows, new, False, (3.0 + 0.1 * rows * new + 1.5 * (rows * new > 4)) * some)
    costs.hear()
    prices = costs.prices(rows)
    assert prices.steps[0][0] == place
    found = prices.token + prices.bend * (2 * place - 1) + prices.first * (place == 1) + prices.steps[0][1]
    assert found == pytest.approx((0.1 * rows + 1.5) / costs.plain(rows), rel=0.3)
    assert measured(SHAPES).prices(rows).steps[0][1] < 0.1, "and nothing where there is no such step"


def test_more_rows_than_a_few_have_passed_the_step():
    assert [place for place, _ in measured(SHAPES).prices(8).steps] == [2]


def test_shapes_do_not_pile_up():
    costs = Costs()
    for new in range(1, 3000):
        costs.forward(8, new % 977 + 1, False, 1.0)
    assert len(costs.target) < 700


def test_what_was_too_dear_is_forgotten_for_about_so_many_rows():
    costs = measured(SHAPES, 2)
    for _ in range(2):
        costs.forget(8)
    assert {shape for shape in costs.target if shape[1] > 1} == {(2, 3, 0), (2, 3, 1), (1, 4, 0), (1, 4, 1)}
    dear = measured(SHAPES, slow=1.0)
    before = dear.prices(8)
    for _ in range(15):
        dear.forget(8)
    assert dear.prices(8) != before, "what was worked out of it is forgotten, too"


def test_what_a_round_with_proposals_takes_beside_its_forwards_is_its_own_cost():
    """Plain steps are begun before the host has seen the last; it has nothing to do between them."""
    costs = measured(SHAPES)
    before, plain = costs.usual(8, 2, 3), costs.plain(8)
    for _ in range(15):
        costs.waited(False, 0.0)
        costs.waited(True, 0.5)
    costs.worked_out.clear()
    assert costs.plain(8) == pytest.approx(plain) and costs.usual(8, 2, 3) == pytest.approx(before + 0.5 / plain)


def test_no_choice_of_coefficients_fits_better():
    nnls = pytest.importorskip("scipy.optimize").nnls
    random = np.random.default_rng(0)
    for _ in range(100):
        x, y = random.uniform(0, 9, (6, 4)), random.uniform(1, 9, 6)
        points = [(tuple(row), 1.0, seconds) for row, seconds in zip(x, y, strict=True)]
        found = fit(points, [(0.0, 0.0)] * 4, [1.0] * 4, 1.0)
        assert np.linalg.norm(x @ found / y - 1) <= nnls(x / y[:, None], np.ones(6))[1] + 1e-9
        assert found.min() >= 0


def test_what_took_no_time_is_no_error():
    costs = Costs()
    for _ in range(5):
        costs.forward(1, 1, False, 0.0)
        costs.forward(1, 3, False, 0.0)
        costs.drafted(1, 1, 0.0)
        costs.waited(True, 0.0)
    assert costs.seconds(1, 1) >= 0 and costs.drafting(1)[1] >= 0
    *alone, steps = astuple(costs.prices(1))
    assert all(map(isfinite, [costs.usual(1, 1, 3), *alone, *chain.from_iterable(steps)]))


def test_the_fit_is_not_worked_out_anew_for_every_round():
    costs = measured(SHAPES)
    costs.prices(8)
    costs.forward(8, 1, False, target_seconds(8, 1))
    assert ("prices", 8) in costs.worked_out, "it takes a tenth of a millisecond"
    for _ in range(32):
        costs.forward(8, 1, False, target_seconds(8, 1))
    assert ("prices", 8) not in costs.worked_out
