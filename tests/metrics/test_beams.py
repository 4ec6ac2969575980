"""Diversity and lead of a beam search's hypotheses, by hand."""

from __future__ import annotations

import pytest

from specbeam.metrics.beams import beam_figures, beam_summary, distinct
from specbeam.trace import Candidate, Hypothesis, SearchStep, SearchTree


def hypothesis(tokens: list[int], score: float | None) -> Hypothesis:
    return Hypothesis(tokens, score, "eos")


def test_distinct_counts_n_grams_of_all_hypotheses_together():
    assert distinct([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct([[1, 2], [3, 4]], 2) == 1.0
    assert distinct([[5, 6, 7]] * 4, 2) == 1 / 4
    assert distinct([[1], [2]], 2) is None


def test_the_gap_is_between_the_first_two():
    found = beam_figures([hypothesis([1, 2], -0.5), hypothesis([1, 3], -0.75), hypothesis([1, 4], -3.0)])
    assert found == {"beam_gap": 0.25, "beam_distinct": [pytest.approx(4 / 6), 1.0]}


def test_one_hypothesis_has_neither():
    assert beam_figures([hypothesis([1, 2], -0.5)]) == {"beam_gap": None, "beam_distinct": None}


def test_the_search_tree_knows_the_hypotheses_that_were_not_returned():
    first = SearchStep(0, (Candidate(7, 0, -0.1, 0), Candidate(8, 0, -0.4, 1)))
    second = SearchStep(1, (Candidate(2, 0, -0.2, None, "eos", -0.1), Candidate(2, 1, -0.6, None, "eos", -0.3)))
    tree = SearchTree((first, second), ((1, 0), (1, 1)))
    assert tree.tokens(0) == [7, 2] and tree.tokens(1) == [8, 2]
    found = beam_figures([hypothesis([7, 2], -0.1)], tree)
    assert found == {"beam_gap": pytest.approx(0.2), "beam_distinct": [0.75, 1.0]}


def test_the_summary_takes_each_prompt_once_and_rows_without_figures_not_at_all():
    rows = [{"repeat": 0, "beam_gap": 0.1, "beam_distinct": [0.5, 1.0]},
            {"repeat": 1, "beam_gap": 9.0, "beam_distinct": [0.0, 0.0]},
            {"repeat": 0, "beam_gap": 0.3, "beam_distinct": [0.7, None]}, {"repeat": 0}]
    assert beam_summary(rows) == {"beam_gap": pytest.approx(0.2), "beam_distinct_1": pytest.approx(0.6),
                                  "beam_distinct_2": 1.0}
    assert beam_summary([]) == {"beam_gap": None, "beam_distinct_1": None, "beam_distinct_2": None}
