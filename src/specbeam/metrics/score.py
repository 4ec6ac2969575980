"""A figure with its 95 % interval: percentiles of the bootstrap over answers (Efron & Tibshirani 1993)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
SEED = 12345  # sacrebleu's


@dataclass(frozen=True)
class Score:
    """value: over `count` answers. low, high: None with fewer than two answers."""

    value: float
    low: float | None
    high: float | None
    count: int
    signature: str | None = None  # how it was computed, where that can differ

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "signature" or value}


def ratio(above: Sequence[float], below: Sequence[float], signature: str | None = None) -> Score | None:
    """Σ above ÷ Σ below over answers, of which whole answers are resampled; None where nothing is below."""
    if not len(above) or not math.fsum(below):
        return None
    value = math.fsum(above) / math.fsum(below)
    if len(above) < 2:
        return Score(value, None, None, len(above), signature)
    drawn = np.random.default_rng(SEED).integers(len(above), size=(RESAMPLES, len(above)))
    sums = np.asarray(above, float)[drawn].sum(1), np.asarray(below, float)[drawn].sum(1)
    resampled = sums[0][sums[1] != 0] / sums[1][sums[1] != 0]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(value, float(low), float(high), len(above), signature)


def mean(values: Sequence[float], signature: str | None = None) -> Score | None:
    """Mean over answers; None without any."""
    return ratio(values, [1.0] * len(values), signature)
