"""The one definition of each speed figure, worked by hand."""

from __future__ import annotations

import pytest

from specbeam.metrics.speed import (
    acceptance_by_position,
    acceptance_rate,
    batch_seconds,
    decode_rate,
    mean_accepted_length,
    proposed_by_position,
)


def row(batch_id="a", new_tokens=11, first_tokens=1, decode_seconds=2.0, rounds=10, drafted=0, accepted=0, **other):
    return {"batch_id": batch_id, "new_tokens": new_tokens, "first_tokens": first_tokens,
            "decode_seconds": decode_seconds, "rounds": rounds, "drafted": drafted, "accepted": accepted, **other}


def test_the_first_tokens_are_prefills_and_do_not_count():
    assert decode_rate([row(new_tokens=11, first_tokens=1, decode_seconds=2.0)]) == 5.0
    assert decode_rate([row(new_tokens=11, first_tokens=5, decode_seconds=2.0)]) == 3.0


def test_the_seconds_of_a_batch_count_once_for_all_its_rows():
    batch = [row("a"), row("a"), row("b", decode_seconds=3.0)]
    assert batch_seconds(batch) == 5.0
    assert decode_rate(batch) == 30 / 5.0
    assert decode_rate([row("a"), row("c"), row("b", decode_seconds=3.0)]) == pytest.approx(30 / 7.0)


def test_rates_add_tokens_and_seconds_and_do_not_average_rates():
    slow, fast = row("a", new_tokens=11, decode_seconds=10.0), row("b", new_tokens=101, decode_seconds=1.0)
    assert decode_rate([slow, fast]) == 110 / 11


def test_an_answer_that_ends_in_prefill_has_no_decode_rate():
    assert decode_rate([row(new_tokens=1, first_tokens=1, decode_seconds=0.0)]) is None
    assert decode_rate([]) is None


def test_mean_accepted_length_is_committed_tokens_over_rounds():
    assert mean_accepted_length([row(new_tokens=11, rounds=10)]) == 1.0
    assert mean_accepted_length([row(new_tokens=11, rounds=3), row(new_tokens=9, rounds=5)]) == 18 / 8
    assert mean_accepted_length([row(new_tokens=4, rounds=6, committed=6)]) == 1.0
    assert mean_accepted_length([row(new_tokens=1, rounds=0)]) is None


def test_acceptance_rate_is_accepted_over_drafted_and_none_without_a_draft():
    assert acceptance_rate([row(drafted=8, accepted=6), row(drafted=4, accepted=0)]) == 0.5
    assert acceptance_rate([row()]) is None


def test_acceptance_by_position_adds_rows_of_different_draft_lengths():
    rows = [row(accepted_by_position=[[4, 4], [4, 2]]), row(accepted_by_position=[[4, 2], [4, 1], [2, 1]]), row()]
    assert acceptance_by_position(rows) == [6 / 8, 3 / 8, 1 / 2]
    assert proposed_by_position(rows) == [8, 8, 2]
    assert acceptance_by_position([row()]) == []
