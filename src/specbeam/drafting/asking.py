"""Whether `auto` asks a draft, in each round, how sure it is of its tokens.

Asking takes a pass over the draft's logits on the host before each next step (of a small model's step a tenth), and
spares steps that would most likely be in vain. Both are measured: by how much a round with asking is longer than those
beside it without (machines change their speed), and what was spared. Where asking costs more than it spares, most
rounds go without, as long as usual.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

_ENOUGH = 5  # comparisons
_OFTEN, _SELDOM = 16, 4  # every so many thoughts one of the other kind: without asking, and, to go on learning, with
_LATELY = 1 / 16  # weight of the newest round in what was spared


@dataclass
class Asking:
    lately: dict[bool, float] = field(default_factory=dict)  # asked: seconds of rounds that proposed all they might
    longer: deque[float] = field(default_factory=lambda: deque(maxlen=15))  # by so many seconds was a round that asked
    depth: int = 0  # that these rounds had
    spared: float = 0.0  # seconds a round, of late
    pays: bool = True
    rounds: int = 0  # since the last one of the other kind
    others: int = 0  # rounds of the other kind

    @property
    def settled(self) -> bool:
        """Whether it is known that asking does not pay."""
        return not self.pays and len(self.longer) >= _ENOUGH

    def next(self, depth: int) -> bool:
        """Whether the coming round asks; depth: what it proposes at most."""
        if depth != self.depth:
            self.depth, self.pays, self.others = depth, True, 0
            self.lately.clear()
            self.longer.clear()
        self.rounds += 1
        turn = 2 if self.others < _ENOUGH else _OFTEN if self.pays else _SELDOM
        if self.rounds < turn:
            return self.pays
        self.rounds, self.others = 0, self.others + 1
        return not self.pays

    def took(self, asked: bool, seconds: float, whole: bool, spared: float) -> None:
        """A round took so long; whole: it proposed all it might; else, asked, it spared so many seconds, less what the
        tokens that were not proposed would have brought."""
        if whole:
            other = self.lately.get(not asked)
            if other is not None and asked != self.pays:
                self.longer.append(seconds - other if asked else other - seconds)
            self.lately[asked] = (self.lately.get(asked, seconds) + seconds) / 2
        if asked:
            self.spared += _LATELY * (spared - self.spared)
            if len(self.longer) >= _ENOUGH:
                self.pays = median(self.longer) <= self.spared
