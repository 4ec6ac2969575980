"""What a round of speculative decoding costs, learned from the seconds of its forwards.

A target's forward of rows · new = N tokens is taken to need

    a + b N + c N² + s [new > 1] + δ [shaped otherwise than the one before] + e [N > 4] + f [N > 16]

seconds: reading the weights, arithmetic, what a forward with proposals needs more whatever their number (a draft has
pushed its weights out of the caches, or a runner is faster with one token), what a runner loses by a new shape
(openvino.py), and what it does otherwise for more tokens than a few. A draft's chain of n steps of so many rows needs
n (u + v · rows) + p + q · rows: its first step is the dearer one. Least squares of relative errors over the medians at
each shape, no coefficient below 0, drawn to a guess where little was measured; old measurements weigh less. So what
some numbers of rows taught is known of others.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from specbeam.drafting.asking import Asking

_HALF_LIFE = 128  # measurements (of any shape) after which one counts half; at twice that age a new one replaces it
_OTHER = 1.4  # times the usual seconds is another machine, if it lasts
_TRUST = 3  # measurements of one shape that count as much as the fit
_TOGETHER = 64  # measurements that are heard together; at first an eighth of all
_FEW = 4, 16  # tokens up to which runners have kernels of their own
_CHECK, _LATEST_CHECK = 32, 128  # rounds with proposals until plain ones are measured again, at first and at last


@dataclass(frozen=True)
class Prices:
    """In plain rounds. draft: one more draft forward (or looking up); token, bend: x more tokens of every row in the
    target's forward are token · x + bend · x²; first: proposing anything at all; change: a target's forward of another
    width than the last one's. rate: tokens per plain round and row, with proposals. steps: (x, what the x-th of these
    tokens costs more, since a runner does otherwise from there on)."""

    draft: float = 0.1
    token: float = 0.05
    rate: float = 1.0
    change: float = 0.0
    bend: float = 0.0
    first: float = 0.0
    steps: tuple[tuple[int, float], ...] = ()


class Seconds(deque[float]):
    """The latest measurements of one shape. at, before: how many of any shape there were when the last of them came,
    when the one before it did, and when they were scaled."""

    at = before = scaled = 0


def _recent() -> deque[Any]:
    return deque(maxlen=15)


def _shapes() -> defaultdict[tuple[int, ...], Seconds]:
    return defaultdict(partial(Seconds, maxlen=15))


@dataclass
class Costs:
    """Measured seconds of one pair of models, one drafter and one size of context."""

    target: defaultdict[tuple[int, ...], Seconds] = field(default_factory=_shapes)  # rows, new, changed: of a forward
    draft: defaultdict[tuple[int, ...], Seconds] = field(default_factory=_shapes)  # rows, steps: of a round
    # Of a round, what is neither drafting nor the target's forward: of plain ones, and with proposals.
    beside: dict[bool, deque[float]] = field(default_factory=lambda: {False: _recent(), True: _recent()})
    gained: deque[tuple[float, float]] = field(default_factory=_recent)  # tokens per row, plain rounds it took
    unchecked: int = 0  # rounds with proposals since the last plain one
    check: int = _CHECK  # when they are that many
    asking: Asking = field(default_factory=Asking)
    count: int = 0  # of all measurements that were heard
    unheard: list[tuple[bool, tuple[int, ...], float]] = field(default_factory=list)  # of the target, shape, seconds
    worked_out: dict[tuple, Any] = field(default_factory=dict)  # it takes half a millisecond, in caches that are cold

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
        self._later(True, (rows, new, int(changed)), seconds)

    def drafted(self, rows: int, steps: int, seconds: float) -> None:
        """A draft's forwards of one round took so long; looking something up is one."""
        self._later(False, (rows, steps), seconds)

    def waited(self, proposed: bool, seconds: float) -> None:
        """A round took so much longer than its forwards."""
        self.beside[proposed].append(seconds)

    def _later(self, targets: bool, shape: tuple[int, ...], seconds: float) -> None:
        self.unheard.append((targets, shape, seconds))
        if len(self.unheard) >= min(_TOGETHER, 1 + self.count // 8):
            self.hear()

    def hear(self) -> None:
        """What was measured since the last time; all is worked out anew when it is asked for, and what is very old is
        forgotten."""
        for targets, shape, seconds in self.unheard:
            some = (self.target if targets else self.draft)[shape]
            since, factor = some.before, self._measured(some, seconds)
            if factor and targets and not shape[2]:
                self._scale(factor, since)
        self.unheard.clear()
        self.worked_out.clear()
        for shapes in (self.target, self.draft):
            for old in [shape for shape, some in shapes.items() if self._weight(some) < 0.05]:
                del shapes[old]

    def _measured(self, some: Seconds, seconds: float) -> float:
        """If it is the third time in a row that a shape took otherwise than ever: how many times longer; else 0."""
        factor = 0.0
        if self.count - some.at > 2 * _HALF_LIFE:
            some.clear()
        elif len(some) > _TRUST + 1:
            late, before = [some[-2], some[-1], seconds], median(some)
            if max(late) < before / _OTHER or min(late) > before * _OTHER:
                factor = median(late) / max(before, 1e-9)
                some.clear()
                some.extend(late[:-1])
        some.append(seconds)
        self.count += 1
        some.at, some.before = self.count, some.at
        return factor

    def _scale(self, factor: float, since: int) -> None:
        """The machine has another speed: what was not measured meanwhile will have it, too."""
        for some in chain(self.target.values(), self.draft.values()):
            if max(some.at, some.scaled) < since:
                some.scaled = self.count
                for place, seconds in enumerate(some):
                    some[place] = seconds * factor

    def _weight(self, some: Seconds) -> float:
        """How many measurements these count as."""
        return len(some) * 0.5 ** ((self.count - some.at) / _HALF_LIFE)

    def check_later(self) -> None:
        """Plain rounds are measured now; the next time it is after more rounds."""
        if self.unchecked >= self.check:
            self.check = min(2 * self.check, _LATEST_CHECK)

    def knows(self, rows: int) -> bool:
        """Whether plain rounds of about so many rows were measured: one is by itself, 8 stands for 5 to 15."""
        return self._heard(("knows", rows), lambda: any(
            new == 1 and not changed and (n == rows or (n > 1 and n < 2 * rows < 4 * n)) and self._weight(some) > 1
            for (n, new, changed), some in self.target.items()))

    @property
    def few(self) -> bool:
        """Whether what a longer forward costs is hardly known yet."""
        return not self._heard(("many",), lambda: sum(
            len(some) for (_, new, _), some in self.target.items() if new > 1) >= _TRUST)

    def _heard(self, key: tuple, enough: Callable[[], bool]) -> bool:
        if key not in self.worked_out:
            self.worked_out[key] = enough()
        if not self.worked_out[key] and self.unheard:
            self.hear()
            self.worked_out[key] = enough()
        return self.worked_out[key]

    def _of_target(self) -> np.ndarray:
        """a, b, c, s, δ, e, f."""
        if ("target",) not in self.worked_out:
            plain = [shape for shape in self.target if shape[1:] == (1, 0)]
            least = min(plain or self.target)
            one, tokens = median(self.target[least]), least[0] * least[1]
            drawn = [(0.0, 0.0), (0.5, 0.05 * one / tokens), (20.0, 0.0), (2.0, 0.0), (0.7, 0.0)]
            drawn += [(0.3, 0.0) for _ in _FEW]  # chains that end before a step are rarely longer
            unit = [1.0, tokens, 8.0 * tokens * tokens, 1.0, 1.0, *(1.0 for _ in _FEW)]
            points = [(_features(*shape), self._weight(some), median(some)) for shape, some in self.target.items()]
            self.worked_out["target",] = fit(points, drawn, unit, one)
        return self.worked_out["target",]

    def _of_draft(self) -> np.ndarray:
        """u, v, p, q."""
        if ("draft",) not in self.worked_out:
            one = min(median(some) for some in self.draft.values())
            points = [(_steps(*shape), self._weight(some), median(some)) for shape, some in self.draft.items()]
            self.worked_out["draft",] = fit(points, [(0.0, 0.0), (0.3, 0.0), (0.3, 0.0), (0.3, 0.0)], [1.0] * 4, one)
        return self.worked_out["draft",]

    def seconds(self, rows: int, new: int) -> float:
        """Of a target's forward, as they mostly are: the fit, and what was measured at this shape."""
        key = "seconds", rows, new
        if key not in self.worked_out:
            fitted = float(self._of_target() @ _features(rows, new, 0))
            own = self.target.get((rows, new, 0))
            weight = self._weight(own) if own else 0.0
            more = weight / (weight + _TRUST) * (median(own) - fitted) if own else 0.0
            self.worked_out[key] = fitted + more
        return self.worked_out[key]

    def plain(self, rows: int) -> float:
        """Seconds of a plain round."""
        beside = self.beside[False]
        return max(self.seconds(rows, 1) + (median(beside) if beside else 0.0), 1e-9)

    def drafting(self, rows: int) -> tuple[float, float]:
        """Seconds of a round's first draft forward, and of each more."""
        if not self.draft:
            return 0.0, 0.0
        each, each_row, more, more_row = self._of_draft().tolist()
        each += each_row * rows
        return each + more + more_row * rows, each

    def prices(self, rows: int) -> Prices:
        """Rounded: processes that share a model must decide alike."""
        key = "prices", rows
        if key not in self.worked_out:
            plain = self.plain(rows)
            _, b, c, s, change, *steps = (self._of_target() / plain).tolist()
            rate = sum(n for n, _ in self.gained) / sum(n for _, n in self.gained) if self.gained else 1.0
            draft = self.drafting(rows)[1] / plain if self.draft else Prices.draft
            found = draft, b * rows + 2 * c * rows * rows, rate, change, c * rows * rows, s
            draft, token, rate, change, bend, first = (round(price, 6) for price in found)
            self.worked_out[key] = Prices(draft, token, rate, change, bend, first, tuple(
                (few // rows, round(step, 6)) for few, step in zip(_FEW, steps, strict=True) if few >= rows))
        return self.worked_out[key]

    def usual(self, rows: int, steps: int, new: int, changed: bool = False) -> float:
        """Plain rounds that a round with so many draft steps and new tokens takes, as they mostly do. changed: half of
        that is counted; a pause would begin and end with a change, too."""
        key = "usual", rows, steps, new, changed
        if key not in self.worked_out:
            first, more = self.drafting(rows) if steps else (0.0, 0.0)
            longer = max(0.0, self.seconds(rows, new) - self.seconds(rows, 1))
            if self.beside[False] and self.beside[True]:
                longer += max(0.0, median(self.beside[True]) - median(self.beside[False]))
            whole = 1 + (first + (steps - 1) * more + longer) / self.plain(rows)
            self.worked_out[key] = round(whole + changed * self.prices(rows).change / 2, 6)
        return self.worked_out[key]

    def forget(self, rows: int) -> None:
        """The oldest measurements of longer forwards of so many rows: what seems to be too dear is measured again."""
        for shape, some in list(self.target.items()):
            if shape[1] > 1 and rows < 2 * shape[0] < 4 * rows:
                some.popleft()
                if not some:
                    del self.target[shape]
        self.worked_out.clear()


def _features(rows: int, new: int, changed: int) -> tuple[float, ...]:
    tokens = rows * new
    return 1.0, tokens, tokens * tokens, new > 1, changed, *(tokens > few for few in _FEW)


def _steps(rows: int, steps: int) -> tuple[float, ...]:
    return steps, steps * rows, 1.0, rows


def fit(points: Sequence[tuple[Sequence[float], float, float]], drawn: Sequence[tuple[float, float]],
        unit: Sequence[float], one: float) -> np.ndarray:
    """Coefficients ≥ 0 of (features, weight, seconds) that make the relative errors small. drawn: how strongly each is
    drawn to which value; 1 counts as one measurement that is off by `one` seconds at `unit`."""
    x = np.array([features for features, _, _ in points], dtype=float)
    y, weight = np.array([y for _, _, y in points]), np.sqrt([n for _, n, _ in points])
    y = np.maximum(y, max(0.1 * float(np.median(y)), 1e-9))  # one that took no time says nothing of the others
    pull = np.array([strength for strength, _ in drawn]) ** 0.5 * unit / max(one, 1e-9)
    a = np.concatenate([x * (weight / y)[:, None], np.diag(pull)])
    b = np.concatenate([weight, pull * [value for _, value in drawn]])
    return _not_negative(a.T @ a, a.T @ b)


def _not_negative(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The x ≥ 0 of least xᵀ matrix x / 2 - xᵀ right (Lawson and Hanson 1974, chapter 23): coefficients are let in where
    they help most, and leave where they would fall below 0. A handful of solutions of a few equations."""
    found, inside = np.zeros(len(right)), np.zeros(len(right), dtype=bool)
    size = np.sqrt(np.diag(matrix))  # features differ by their units
    for _ in range(3 * len(right)):
        help = np.where(inside, 0.0, (right - matrix @ found) / size)
        if help.max() <= 1e-10 * np.abs(right / size).max():
            break
        inside[help.argmax()] = True
        while True:
            some = np.zeros(len(right))
            some[inside] = np.linalg.solve(matrix[np.ix_(inside, inside)], right[inside])
            below = inside & (some <= 0)
            if not below.any():
                break
            step = (found[below] / (found[below] - some[below])).min()
            found += step * (some - found)
            inside &= found > 1e-12 * np.abs(found).max()
            found[~inside] = 0.0
        found = some
    return found
