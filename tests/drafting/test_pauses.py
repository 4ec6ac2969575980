"""Pauses of `auto`: how much may be lost before one, and how long they are."""

from __future__ import annotations

import pytest

from specbeam.drafting.length import Learned, Length
from tests.drafting.test_length import Pair, auto, drafted_rounds, plain_rounds, tries


def test_a_try_that_pays_makes_pauses_short_again():
    chosen = auto(Pair(), Pair())
    plain_rounds(chosen)
    tries(chosen, 4000, kept=0, of=4, seconds=1.5)
    assert chosen.learned.wait == 256
    while not chosen.limits([8])[0]:
        plain_rounds(chosen, 1)
    drafted_rounds(chosen, kept=4, of=4, seconds=1.5, count=3)
    pauses = [wait for wait in tries(chosen, 600, kept=0, of=4, seconds=1.5) if wait]
    assert pauses[:4] == [12, 36, 64, 64]


def test_at_another_size_of_context_no_pause_is_inherited():
    target, draft = Pair(), Pair()
    chosen = auto(target, draft)
    plain_rounds(chosen)
    tries(chosen, 4000, kept=0, of=4, seconds=1.5)
    other = Length(chosen.settings, target, draft, 1, context=4000)
    assert other.learned.failed == other.learned.left == 0 and other.learned.wait == 12


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_the_more_rows_the_less_a_text_may_lose(rows):
    learned, rounds = Learned(), 0
    learned.paid(0.0, rows)
    while not learned.left:
        learned.paid(-0.1 / rows**0.5, rows)
        rounds += 1
    assert rounds == pytest.approx(70 if rows == 1 else 40, abs=1), "4 / √rows, and their mean varies as 1 / √rows"
