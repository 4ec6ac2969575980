"""What a round of speculative decoding costs, learned from the seconds of its forwards.

A target's forward of rows · new = N tokens is taken to need

    a + b N + c N² + s [new > 1] + δ [shaped otherwise than the one before]

seconds: reading the weights, arithmetic, what a forward with proposals needs more whatever their number (a draft has
pushed its weights out of the caches, or runners have better kernels for one token), and what a runner loses by a new
shape (openvino.py). A draft's chain of n steps of so many rows needs n (u + v · rows) + p + q · rows: its first step is
the dearer one. Least squares of relative errors over the medians at each shape, no coefficient below 0, drawn to a
guess where little was measured, and to what was measured of late. So what one number of rows taught is known of others.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np

_TRUST = 3  # measurements of one shape that count as much as the fit
_HALF_LIFE = 256  # measurements after which one counts half
_LEVEL_LASTS = 3  # forwards that a machine's speed is taken from
_MOST_OTHER = 1.7  # how much faster or slower than usual a forward counts as
_TOGETHER = 16  # that are heard together
_CHECK, _LATEST_CHECK = 32, 256  # rounds with proposals until plain ones are measured again, at first and at last


@dataclass(frozen=True)
class Prices:
    """In plain rounds. draft: one more draft forward (or looking up); token, bend: x more tokens of every row in the
    target's forward are token · x + bend · x²; first: proposing anything at all; change: a target's forward of another
    width than the last one's. rate: tokens per plain round and row, with proposals."""

    draft: float = 0.1
    token: float = 0.05
    rate: float = 1.0
    change: float = 0.0
    bend: float = 0.0
    first: float = 0.0


class Seconds(deque[float]):
    """The latest measurements of one shape. at: how many of any shape there were when the last of them came."""

    at = 0


def _recent() -> deque[Any]:
    return deque(maxlen=15)


def _cells() -> defaultdict[tuple[int, ...], Seconds]:
    return defaultdict(partial(Seconds, maxlen=15))


@dataclass
class Costs:
    """Measured seconds of one pair of models, one drafter and one size of context."""

    target: defaultdict[tuple[int, ...], Seconds] = field(default_factory=_cells)  # rows, new, changed: forwards
    draft: defaultdict[tuple[int, ...], Seconds] = field(default_factory=_cells)  # rows, steps: of a round
    beside: deque[float] = field(default_factory=_recent)  # of a round, neither drafting nor the target's forward
    gained: deque[tuple[float, float]] = field(default_factory=_recent)  # tokens per row, plain rounds it took
    unchecked: int = 0  # rounds with proposals since the last plain one
    check: int = _CHECK  # when they are that many
    level: float = 1.0  # how slow the machine is now: what is kept are seconds by this
    count: int = 0  # of all measurements
    since: int = 0  # of them, since what follows was worked out
    known: dict[tuple, Any] = field(default_factory=dict)  # what was worked out: it takes a tenth of a millisecond

    def copy(self) -> Costs:
        """A first guess for another size of context: one measurement of each shape."""
        new = Costs()
        for mine, its in ((self.target, new.target), (self.draft, new.draft)):
            for shape, seconds in mine.items():
                its[shape].append(median(seconds))
        new.gained.extend(list(self.gained)[-1:])
        return new

    def forward(self, rows: int, new: int, changed: bool, seconds: float) -> None:
        """A target's forward took so long."""
        own = self.target[rows, new, int(changed)]
        if not changed and own:  # the better the shape is known, the more this tells of the machine
            weight = self._weight(own)
            other = seconds / max(self.level * self.seconds(rows, new), 1e-9)
            self.level *= min(max(other, 1 / _MOST_OTHER), _MOST_OTHER) ** (weight / (weight + _TRUST) / _LEVEL_LASTS)
        self._measured(own, seconds / self.level)

    def drafted(self, rows: int, steps: int, seconds: float) -> None:
        """A draft's forwards of one round took so long; looking something up is one."""
        self._measured(self.draft[rows, steps], seconds / self.level)

    def waited(self, seconds: float) -> None:
        """A round took so much longer than its forwards."""
        self.beside.append(seconds / self.level)

    def _measured(self, some: Seconds, seconds: float) -> None:
        """A shape's first measurements are heard at once, later ones several together."""
        some.append(seconds)
        self.count, self.since = self.count + 1, self.since + 1
        some.at = self.count
        if len(some) <= _TRUST or self.since >= _TOGETHER:
            self.known.clear()
            self.since = 0

    def checks(self) -> None:
        """Plain rounds are measured again, ever more rarely."""
        if self.unchecked >= self.check:
            self.check = min(2 * self.check, _LATEST_CHECK)

    def knows(self, rows: int) -> bool:
        """Whether plain rounds of about so many rows were measured: one is by itself, 8 stands for 5 to 15."""
        if ("knows", rows) not in self.known:
            near = [other for (other, new, changed), some in self.target.items()
                    if new == 1 and not changed and len(some) > 1]
            self.known["knows", rows] = any(n == rows or (n > 1 and n < 2 * rows < 4 * n) for n in near)
        return self.known["knows", rows]

    @property
    def few(self) -> bool:
        """Whether what a longer forward costs is hardly known yet."""
        return sum(len(seconds) for (_, new, _), seconds in self.target.items() if new > 1) < _TRUST

    def _weight(self, some: Seconds) -> float:
        """How many measurements these count as: a machine's speed changes."""
        return len(some) * 0.5 ** ((self.count - some.at) / _HALF_LIFE)

    def _of_target(self) -> np.ndarray:
        if ("target",) not in self.known:
            least = min(self.target)
            one, tokens = median(self.target[least]), least[0] * least[1]
            guess = [(0.0, one), (2.0, 0.05 * one / tokens), (20.0, 0.0), (2.0, 0.0), (0.7, 0.0)]
            scale = [1.0, tokens, 8.0 * tokens * tokens, 1.0, 1.0]
            points = [(_features(*shape), self._weight(some), median(some)) for shape, some in self.target.items()]
            self.known["target",] = fit(points, guess, scale, one)
        return self.known["target",]

    def _of_draft(self) -> np.ndarray:
        if ("draft",) not in self.known:
            one = min(median(some) for some in self.draft.values())
            guess = [(0.0, one), (0.3, 0.0), (0.3, 0.0), (0.3, 0.0)]
            points = [(_steps(*shape), self._weight(some), median(some)) for shape, some in self.draft.items()]
            self.known["draft",] = fit(points, guess, [1.0, 1.0, 1.0, 1.0], one)
        return self.known["draft",]

    def seconds(self, rows: int, new: int) -> float:
        """Of a target's forward, as they mostly are: the fit, and what was measured at this shape."""
        fitted = float(self._of_target() @ _features(rows, new, 0))
        own = self.target.get((rows, new, 0))
        if not own:
            return fitted
        weight = self._weight(own)
        return fitted + weight / (weight + _TRUST) * (median(own) - fitted)

    def plain(self, rows: int) -> float:
        """Seconds of a plain round."""
        return self.seconds(rows, 1) + (median(self.beside) if self.beside else 0.0)

    def drafting(self, rows: int) -> tuple[float, float]:
        """Seconds of a round's first draft forward, and of each more."""
        if not self.draft:
            return 0.0, 0.0
        each, each_row, more, more_row = self._of_draft().tolist()
        each += each_row * rows
        return each + more + more_row * rows, each

    def prices(self, rows: int) -> Prices:
        if ("prices", rows) not in self.known:
            plain = self.plain(rows)
            _, b, c, s, change = (self._of_target() / plain).tolist()
            rate = sum(n for n, _ in self.gained) / sum(n for _, n in self.gained) if self.gained else 1.0
            draft = self.drafting(rows)[1] / plain if self.draft else Prices.draft
            self.known["prices", rows] = Prices(draft, b * rows + 2 * c * rows * rows, rate, change, c * rows * rows, s)
        return self.known["prices", rows]

    def usual(self, rows: int, steps: int, new: int) -> float:
        """Plain rounds that one with so many draft steps and new tokens takes, as they mostly do."""
        shape = "usual", rows, steps, new
        if shape not in self.known:
            first, more = self.drafting(rows) if steps else (0.0, 0.0)
            longer = self.seconds(rows, new) - self.seconds(rows, 1)
            self.known[shape] = 1 + (first + (steps - 1) * more + longer) / self.plain(rows)
        return self.known[shape]

    def forget(self) -> None:
        """The oldest measurements of longer forwards: what seems to be too dear is measured again some day."""
        for shape, some in list(self.target.items()):
            if shape[1] > 1:
                some.popleft()
                if not some:
                    del self.target[shape]
        self.known.clear()


def _features(rows: int, new: int, changed: int) -> tuple[float, ...]:
    tokens = rows * new
    return 1.0, tokens, tokens * tokens, new > 1, changed


def _steps(rows: int, steps: int) -> tuple[float, ...]:
    return steps, steps * rows, 1.0, rows


def fit(points: Sequence[tuple[Sequence[float], float, float]], guess: Sequence[tuple[float, float]],
        scale: Sequence[float], one: float) -> np.ndarray:
    """Coefficients ≥ 0 of (features, weight, seconds) that make the relative errors small. guess: how
    strongly each is drawn to which value, in units of `one` seconds at `scale`."""
    x = np.array([features for features, _, _ in points], dtype=float)
    y, weight = np.array([y for _, _, y in points]), np.sqrt([n for _, n, _ in points])
    one = max(one, 1e-9)
    y = np.maximum(y, max(0.01 * y.max(), 1e-9))  # one that took no time says nothing of the others
    pull = np.array([strength for strength, _ in guess]) ** 0.5 * scale / one
    a = np.concatenate([x * (weight / y)[:, None], np.diag(pull)])
    b = np.concatenate([weight, pull * [value for _, value in guess]])
    kept = np.arange(x.shape[1])
    found = np.zeros(x.shape[1])
    while True:
        some = np.linalg.lstsq(a[:, kept], b, rcond=None)[0]
        if some.min() >= 0 or len(kept) == 1:
            found[kept] = np.maximum(some, 0.0)
            return found
        kept = np.delete(kept, some.argmin())
