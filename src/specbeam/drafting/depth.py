"""How many beam steps the draft goes ahead: fixed, or as many as pay.

`auto` knows from earlier rounds s_k, how often the k-th step was still in the tree when the one before it was, and
seconds per round at each depth. Expected steps at depth d: 1 + s_1 + s_1 s_2 + … + s_1 … s_d; it takes the depth with
the most expected steps per second, 0 (plain steps) included, and now and then tries its neighbours. Where plain steps
are best it tries ever more rarely, and choosing costs nothing in between; what it knows stays with the pair of models.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from specbeam.drafting.beam_settings import LONGEST
from specbeam.placement import agreed

_CLEARLY = 1.03  # a gain below this is noise, and trying is not free
_NEIGHBOUR = 16  # rounds until a neighbour is tried
_TRIES = 3  # rounds of a try from plain steps: the draft has to catch up, which the others then share


@dataclass
class Costs:
    """Measured at one pair, width and number of rows."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)  # of a round, by depth
    reached: list[float] = field(default_factory=lambda: [1.0] * LONGEST)  # prior: half of them survive
    survived: list[float] = field(default_factory=lambda: [0.5] * LONGEST)
    rounds: int = 0
    pause: int = 32  # plain steps until speculation is tried again
    rest: int = 0  # how many of them are left
    tries: int = 0  # rounds of a try that are left


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple, Costs]]] = WeakKeyDictionary()


class Depth:
    """Chooses for one batch."""

    def __init__(self, target: Any, draft: Any, length: int | str, key: tuple, rows: int):
        """key: what seconds and survival depend on, beside the models and the number of rows."""
        self.auto, self.fixed, self.why = length == "auto", length, "length"
        self.models, self.key = (target, target if draft is None else draft), key
        self.costs = Costs()
        self.rows(rows)

    def rows(self, rows: int) -> None:
        """Go on with so many rows: a forward's cost depends on them, and what is known so far is a first guess."""
        known = _known.setdefault(self.models[0], WeakKeyDictionary()).setdefault(self.models[1], {})
        if (*self.key, rows) not in known:
            known[(*self.key, rows)] = deepcopy(self.costs)
        self.costs = known[(*self.key, rows)]

    def choose(self) -> int:
        if not self.auto:
            assert isinstance(self.fixed, int)
            return self.fixed
        costs = self.costs
        if costs.rest:
            costs.rest -= 1
            return 0
        costs.rounds += 1
        for depth in (0, 1):  # two yardsticks, then the rest by interpolation
            if len(costs.seconds.get(depth, ())) < 3:  # the first of a kind pays for kernels being made
                self.why = "measuring"
                return depth
        best = max(range(LONGEST + 1), key=self.rate)
        if best and self.rate(best) >= _CLEARLY * self.rate(0):
            self.why, costs.pause, costs.tries = "best rate", 32, 0
            if costs.rounds % _NEIGHBOUR:
                return best
            self.why = "trying"
            return min(best + 1 if (costs.rounds // _NEIGHBOUR) % 2 else best - 1, LONGEST)
        if costs.tries:
            costs.tries -= 1
            self.why = "trying"
            return max(best, 1)
        self.why, costs.rest, costs.tries = "does not pay", costs.pause, _TRIES
        costs.pause = min(2 * costs.pause, 2048)
        return 0

    def rate(self, depth: int) -> float:
        """Expected steps per second."""
        steps = chance = 1.0
        for reached, survived in zip(self.costs.reached[:depth], self.costs.survived[:depth], strict=True):
            chance *= survived / reached
            steps += chance
        return steps / self._seconds(depth)

    def _seconds(self, depth: int) -> float:
        """Measured, or on the line through the nearest two depths that were."""
        known = {d: min(s) for d, s in self.costs.seconds.items()}  # what disturbs only ever adds
        if depth in known:
            return known[depth]
        near = sorted(sorted(known, key=lambda d: abs(d - depth))[:2])
        a, b = near[0], near[-1]
        slope = max((known[b] - known[a]) / (b - a), 0.0)
        return max(known[a] + slope * (depth - a), known[0])

    def learn(self, depth: int, steps: list[int], seconds: float) -> None:
        """steps: committed by each row that goes on (one that ended says nothing about survival)."""
        costs = self.costs
        costs.seconds.setdefault(depth, deque(maxlen=9)).append(agreed([seconds], self.models[0])[0])
        for count in steps:
            for k in range(min(depth, count)):
                costs.reached[k] = 0.97 * costs.reached[k] + 1
                costs.survived[k] = 0.97 * costs.survived[k] + (count > k + 1)
