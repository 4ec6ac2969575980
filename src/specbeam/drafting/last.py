"""A batch ends with its last row: what a token of each row is worth.

Rows whose answers are longest decide; which they are is known only by chance, since answers end by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

_HEAT = 0.2  # by how many √tokens rows of one text come to differ
_BY_ITSELF = 16  # and by which part of what is left, as answers end by themselves


@dataclass(frozen=True)
class Last:
    """What the other rows are ahead of the last saves only their own share of a forward. chance: of each row to be the
    last, softmax(tokens left / heat); rows of one text come to differ by about that, and the more is left, the likelier
    an answer ends by itself. share: of a plain round, that is the rows' own; 1: all count alike."""

    chance: list[float]
    heat: float
    share: float

    @classmethod
    def of(cls, left: Sequence[int], share: float) -> Last:
        most, mean = max(left), max(1.0, sum(left) / len(left))
        heat = _HEAT * sqrt(mean) + mean / _BY_ITSELF
        weights = [exp((one - most) / heat) for one in left]
        return cls([weight / sum(weights) for weight in weights], heat, min(share, 1.0))

    def worth(self, row: int) -> float:
        """A token of this row, in tokens of every row."""
        return (1 - self.share) * self.chance[row] + self.share / len(self.chance)

    def gain(self, committed: Sequence[int]) -> float:
        """What these tokens of each row are worth, in tokens of every row: how much sooner the last one ends, by
        heat · log Σ exp(tokens left / heat) before and after."""
        alike = sum(committed) / len(committed)
        if self.share == 1:
            return alike
        late = [n / self.heat - log(one) for one, n in zip(self.chance, committed, strict=True) if one > 0]
        least = min(late)
        sooner = self.heat * (least - log(sum(exp(least - one) for one in late)))
        return (1 - self.share) * sooner + self.share * alike


ALONE = Last([1.0], 1.0, 1.0)
