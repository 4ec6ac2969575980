"""Figures of quality on the page."""

from __future__ import annotations

from specbeam.report.quality import quality_tables


def score(value, low=None, high=None, count=4):
    return {"value": value, "low": low, "high": high, "count": count}


METHODS = {
    "greedy": {"quality": {
        "overall": {"bleu": score(21.94, 18.2, 25.0), "perplexity": score(3.071, 2.9, 3.2), "new_thing": score(0.123)},
        "categories": {"qa": {"bleu": score(20.0)}, "<math>": {"perplexity": score(2.0)}}}},
    "beam": {"quality": {"overall": {"bleu": score(24.1)}, "categories": {"qa": {"bleu": score(24.1)}}}},
    "sample": {},
}


def test_each_figure_has_its_interval_and_unknown_ones_their_own_name():
    html = quality_tables(METHODS)
    assert '21.9<br><small>18.2–25.0</small>' in html and "3.07" in html and ">new thing</th>" in html
    assert html.count('<th scope="row">greedy</th>') == 2 and "sample" not in html


def test_categories_are_of_the_figures_with_references():
    html = quality_tables(METHODS)
    assert "BLEU by category" in html and "perplexity by category" not in html and "&lt;math&gt;" not in html
    only = {"greedy": {"quality": {"overall": {"perplexity": score(3.0)}, "categories": {
        "qa": {"perplexity": score(2.0)}, "<math>": {"perplexity": score(4.0)}}}}}
    assert "perplexity by category" in quality_tables(only) and "&lt;math&gt;" in quality_tables(only)


def test_a_run_without_them_has_no_table():
    assert quality_tables({"greedy": {"bleu": 3.0}}) == ""
