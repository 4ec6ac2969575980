"""How different a beam search's hypotheses are, and how far ahead the first one is.

Distinct-n: Li et al. 2016 (arXiv 1510.03055, section 5.1), here over the hypotheses of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from specbeam.trace import Hypothesis, SearchTree


def distinct(hypotheses: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams ÷ all n-grams of the hypotheses together, 0 … 1; None when there is no n-gram.

    `k` equal hypotheses give at most 1 ÷ k, hypotheses that share nothing (and repeat nothing) give 1.
    """
    grams = [tuple(one[i: i + n]) for one in hypotheses for i in range(len(one) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def beam_figures(hypotheses: Sequence[Hypothesis], tree: SearchTree | None = None) -> dict[str, Any]:
    """`beam_gap`: score of the first hypothesis less the second's; `beam_distinct`: distinct-1 and distinct-2.

    Over the finished pool where the search tree was kept, else over the returned hypotheses; None with fewer than two.
    """
    answers = [(one.tokens, one.score) for one in hypotheses]
    if tree is not None:
        answers = [(tree.tokens(place), tree.finished(place).finished_score) for place in range(len(tree.ends))]
    scores = [score for _, score in answers[:2] if score is not None]
    if len(scores) < 2:
        return {"beam_gap": None, "beam_distinct": None}
    texts = [tokens for tokens, _ in answers]
    return {"beam_gap": scores[0] - scores[1], "beam_distinct": [distinct(texts, 1), distinct(texts, 2)]}


def beam_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over prompts (first repeat): the median gap, and mean distinct-1 and distinct-2."""
    first = [row for row in rows if row["repeat"] == 0]
    gaps = [row["beam_gap"] for row in first if row.get("beam_gap") is not None]
    pairs = [row["beam_distinct"] for row in first if row.get("beam_distinct")]
    means = [[pair[place] for pair in pairs if pair[place] is not None] for place in (0, 1)]
    return {"beam_gap": median(gaps) if gaps else None,
            "beam_distinct_1": fmean(means[0]) if means[0] else None,
            "beam_distinct_2": fmean(means[1]) if means[1] else None}
