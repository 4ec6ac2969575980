"""How much an answer repeats itself."""

from __future__ import annotations

import pytest

from specbeam.metrics.repetition import distinct, longest_repeated_span


def by_brute_force(tokens):
    spans = [tuple(tokens[i:j]) for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1)]
    return max((len(span) for span in spans if spans.count(span) > 1), default=0)


@pytest.mark.parametrize(("tokens", "longest"), [
    ([], 0), ([1], 0), ([1, 2, 3], 0), ([1, 2, 1], 1), ([1, 1, 1, 1], 3), ([1, 2, 3, 9, 1, 2, 3], 3)], ids=str)
def test_the_longest_span_that_stands_there_twice(tokens, longest):
    assert longest_repeated_span(tokens) == longest


def test_it_is_what_brute_force_finds():
    for seed in range(200):
        tokens = [(seed * (i + 3) ** 2 + i * seed // 3) % 4 for i in range(12)]
        assert longest_repeated_span(tokens) == by_brute_force(tokens), tokens


def test_distinct_n_of_one_answer():
    assert distinct([[1, 1, 1, 2]], 1) == 0.5 and distinct([[1, 1, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[1]], 2) is None
