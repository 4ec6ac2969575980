"""How long a proposal is: fixed, until the draft loses confidence, or as long as it pays.

`auto` counts in plain rounds. With r the tokens per plain round and row that this batch reaches now, one more token of
every row is proposed if, summed over the rows,

    P(all before it accepted) · P(it is accepted | the draft's confidence) ≥ rows · r · (plain rounds that it costs)

where the probabilities come from what was accepted of late (at that confidence, once the draft has read so far; of all
tokens, before it has), and the costs are measured: a token more in one row is a column more in everybody's forward. A
draft's first step in a round, whose weights the target has pushed out of the caches, is dearer than the next ones.

Whether to draft at all is a matter of credit: each round with proposals adds the tokens that it brought and takes what
it cost. At 0 the batch decodes plainly for 4 rounds and tries again; each try that fails doubles the pause, up to
64 rounds, each that pays begins anew with 4. A pause that would end within an answer ends at its beginning, where the
draft reads the prompt outside decoding; in an answer that begins within a pause, it reads nothing until it is needed.
What was learned stays with the pair of models, from prompt to prompt; `costs` freezes it in a file.

The confidence is the draft's largest probability *before* anything is drawn: to stop or not is a function of the
prefix, and a drawn token is never dropped for what it is. (Dropping it would bias the output.)
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, log, sqrt
from pathlib import Path
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from specbeam.drafting import Proposal, Settings
from specbeam.errors import InputError
from specbeam.placement import agreed

UNKNOWN = 0.5  # the confidence of drafters that have none: they are judged by what was accepted so far
_BUCKETS = 10
_MEMORY = 0.995  # of what was accepted, per round: texts change
_LATELY = 1 / 12  # weight of the newest token in the usual acceptance
_MOST_CREDIT = 2.0  # plain rounds of one row: what a text that has begun to go badly may cost
_MOST_LOSS = 1.0  # that one round is charged with: it may have been slow for other reasons
_TRY = 0.5  # credit of a try
_SHORTEST_WAIT, _LONGEST_WAIT = 4, 64
_ENOUGH = 3  # measurements of longer forwards: the first may be slow
_CAUTIOUS = 2  # tokens that are proposed until then
_LASTS = 3  # rounds that share what a change of width costs
_MEASURED = 3  # plain rounds that are then measured
_CHECK, _LATEST_CHECK = 32, 256  # rounds with proposals until plain ones are measured again, at first and at last


def _recent() -> deque[float]:
    return deque(maxlen=15)


@dataclass(frozen=True)
class Prices:
    """In plain rounds: of one more draft forward (or of looking up), and of x more tokens of every row in the target's
    forward, token · x + bend · x². rate: tokens per plain round and row, with proposals. change: of a target's forward
    of another width than the last one's, where the runner keeps it (openvino.py). What nobody knows is neither free nor
    dear."""

    draft: float = 0.1
    token: float = 0.05
    rate: float = 1.0
    change: float = 0.0
    bend: float = 0.0


@dataclass
class Learned:
    """Of one pair of models, one drafter and one size of context (drafts that learnt from short texts are worse on
    long ones), however many rows."""

    tried: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)  # by confidence
    kept: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)
    usual: float = UNKNOWN  # of late, of all tokens that the target judged
    credit: float = _MOST_CREDIT
    wait: int = _SHORTEST_WAIT  # plain rounds before the next try, of one row
    left: int = 0  # of them

    def acceptance(self, confidence: float) -> float:
        """P(accepted), from what was seen at this confidence; with nothing seen, the confidence itself."""
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        return (self.kept[place] + 2 * confidence) / (self.tried[place] + 2)

    def learn(self, confidence: float, accepted: bool) -> None:
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        self.tried[place] += 1
        self.kept[place] += accepted
        self.usual += _LATELY * (accepted - self.usual)

    def paid(self, net: float, rows: int) -> None:
        """A round with proposals brought `net` plain rounds more than it cost. Of many rows, less is luck."""
        most = _MOST_CREDIT / rows**0.5
        self.credit = min(self.credit + max(net, -_MOST_LOSS), most)
        if self.credit <= 0:
            # A try begins with reading every row's prompt.
            self.left, self.credit = self.wait * rows, _TRY / rows**0.5
            self.wait = min(2 * self.wait, _LONGEST_WAIT)
        elif self.credit >= most / 2:
            self.wait = _SHORTEST_WAIT


@dataclass
class Costs:
    """Measured seconds of one pair of models, one drafter, one number of rows and one size of context."""

    plain: deque[float] = field(default_factory=_recent)  # seconds of a round without proposals
    round: deque[float] = field(default_factory=_recent)  # of one with
    tokens: deque[float] = field(default_factory=_recent)  # committed per row in one with
    # Forwards of the draft and their seconds, of a round; looking something up is one.
    draft: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=32))
    verify: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(_recent))  # by new tokens
    change: deque[float] = field(default_factory=_recent)  # what a forward took longer whose width was new
    unchecked: int = 0  # rounds with proposals since the last without
    check: int = _CHECK  # when they are that many
    guess: Prices = Prices()  # where nothing was measured: at first the prices of the nearest number of rows

    @property
    def longer(self) -> list[tuple[int, int, float]]:
        """Of target forwards with proposals: more tokens than a plain one, how many were measured, more seconds."""
        return [(new - 1, len(some), median(some) - median(self.verify[1])) for new, some in self.verify.items()
                if new > 1]

    @property
    def few(self) -> bool:
        """Whether what a longer forward costs is not known yet."""
        return sum(len(some) for new, some in self.verify.items() if new > 1) < _ENOUGH

    def prices(self) -> Prices:
        """What was measured, and the guess where nothing was."""
        plain, draft, token, rate = median(self.plain), self.guess.draft, self.guess.token, self.guess.rate
        change = max(0.0, median(self.change)) / plain if self.change else self.guess.change
        if self.draft:
            draft = self.drafting()[1] / plain
        bend = self.guess.bend
        if not self.few:
            token, bend = (price / plain for price in curve(self.longer))
        if self.round:
            rate = sum(self.tokens) / sum(self.round) * plain
        return Prices(draft, token, rate, change, bend)

    def drafting(self) -> tuple[float, float]:
        """Seconds of a round's first draft forward, and of each more. The first is the dearer one: the target's weights
        went through the caches before it. As a line through what was measured at several numbers of them."""
        found: dict[int, list[float]] = defaultdict(list)
        for steps, seconds in self.draft:
            found[steps].append(seconds)
        points = [(steps, len(some), median(some)) for steps, some in found.items()]
        count = sum(n for _, n, _ in points)
        x, y = (sum(n * one[place] for n, one in ((point[1], point) for point in points)) / count for place in (0, 2))
        spread = sum(n * (steps - x) ** 2 for steps, n, _ in points)
        if not spread:
            return y / x, y / x
        each = sum(n * (steps - x) * (seconds - y) for steps, n, seconds in points) / spread
        each = min(max(each, 0.0), y / x)
        return y - (x - 1) * each, each

    def usual(self, steps: int, new: int) -> float:
        """Plain rounds that one with so many draft steps and new tokens takes, as they mostly do."""
        first, more_each = self.drafting() if steps else (0.0, 0.0)
        draft = first + (steps - 1) * more_each
        more = median(self.verify[new]) - median(self.verify[1]) if new > 1 and self.verify.get(new) else 0.0
        return 1 + (draft + more) / median(self.plain)

    def forget(self) -> None:
        """The oldest measurements of longer forwards: what seems to be too dear is measured again some day."""
        for new, some in list(self.verify.items()):
            if new > 1:
                some.popleft()
                if not some:
                    del self.verify[new]


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple, Any]]] = WeakKeyDictionary()


def _of_pair(settings: Settings, target: Any, draft: Any
             ) -> tuple[defaultdict[int, Learned], dict[tuple[int, int], Costs]]:
    """What is known of these models with this drafter: of acceptance by size of context, of costs by rows and it."""
    known = _known.setdefault(target, WeakKeyDictionary()).setdefault(target if draft is None else draft, {})
    return known.setdefault((settings.drafter, settings.vocabulary, settings.exit_layer, settings.branches,
                             settings.corpus, settings.temperature > 0), (defaultdict(Learned), {}))


class Length:
    """Decides for one batch. All methods number rows among the live ones."""

    def __init__(self, settings: Settings, target: Any, draft: Any, rows: int, room: int = 0, context: int = 0):
        """room: how many tokens an answer may have; 0: other prompts take the places of rows that end. context: of the
        longest prompt; seconds that were measured at half of it, or twice, say little."""
        self.room, self.size, self.target = room, (context // 256).bit_length(), target
        self.auto = settings.draft_length == "auto"
        self.threshold = settings.confidence_threshold
        self.fixed = not self.auto and not self.threshold
        self.settings, self.looks_up = settings, draft is None
        self.reach = [1.0] * rows  # P(all proposed so far accepted), of the running round
        self.why = [""] * rows
        self.prices, self.stale, self.frozen = Prices(), False, bool(settings.costs)
        self.rest = 0  # plain rounds from here on that need no more thought
        self.wide = self.column = 0  # tokens of the target's last forward (0: any is as good), and proposed in this one
        if settings.costs:
            self.learned, self.prices = read_costs(settings.costs)
        elif self.auto:
            learned, self.known = _of_pair(settings, target, draft)
            self.learned = learned[self.size]
            self.keep_rows(range(rows))
            if self.learned.left <= room:
                self.learned.left = 0

    @property
    def idle(self) -> bool:
        """Whether nothing will be drafted for a while."""
        return self.auto and (self.prices.rate < 1 if self.frozen else self.learned.left > 0)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with so many rows. For a new number, the nearest one's prices are a first guess."""
        if not self.auto or self.frozen:
            return
        key = (len(rows), self.size)
        if key not in self.known:
            near = min((other for other, costs in self.known.items() if costs.plain), default=None,
                       key=lambda other: (abs(other[0] - key[0]), abs(other[1] - key[1])))
            self.known[key] = Costs(guess=self.known[near].prices() if near else Prices())
        self.costs = self.known[key]

    def limits(self, most: Sequence[int]) -> list[int]:
        """How deep each row may propose in this round; 0: decode plainly."""
        self.rest = self.column = 0
        self.reach, self.why = [1.0] * len(most), ["length" if n == self.settings.depth else "end of answer"
                                                  for n in most]
        if not self.auto:
            return list(most)
        if not self.frozen and (len(self.costs.plain) < 2 or self.costs.unchecked >= self.costs.check):
            self.why, self.rest = ["measuring plain"] * len(most), _MEASURED
            if self.costs.plain:
                self.costs.check = min(2 * self.costs.check, _LATEST_CHECK)
        elif self.idle:
            self.why = ["does not pay"] * len(most)
            self.rest = _LONGEST_WAIT if self.frozen else self.learned.left
            self.learned.left -= not self.frozen
        else:
            self.stale = not self.frozen
            if self.stale and self.costs.few:
                return [min(_CAUTIOUS, n) for n in most]
            return list(most)
        return [0] * len(most)

    def rested(self, steps: Sequence[float], seconds: float) -> None:
        """Some of the `rest` were taken, as plain steps: seconds of each one's forward, and of them all."""
        if self.frozen:
            return
        if self.why[0] == "does not pay":
            self.learned.left -= len(steps) - 1  # `limits` counted one
        beside = (seconds - sum(steps)) / len(steps)
        for step in agreed(steps[1:] or steps, self.target):  # the first may be of another width than the one before
            self.costs.verify[1].append(step)
            self.costs.plain.append(step + beside)
        self.costs.unchecked = 0

    def proposes(self, wanted: Sequence[bool], confidence: Sequence[float]) -> list[bool]:
        """Which of the `wanted` rows propose the token after their prefix, given the draft's largest probability
        there."""
        rows = [row for row, here in enumerate(wanted) if here]
        if self.threshold:
            kept = {row for row in rows if confidence[row] >= self.threshold}
            self._stop(set(rows) - kept, "confidence")
        elif self.auto:
            for row in rows:
                self.reach[row] *= self.learned.acceptance(confidence[row])
            self.column += 1
            kept = self._worth({row: self.reach[row] for row in rows}, self._price(self.column))
        else:
            return list(wanted)
        return [row in kept for row in range(len(wanted))]

    def _price(self, column: int) -> float:
        """Of the target's reading a proposal's token at this place, the first is 1. Prices are worked out once a round,
        and only where something may be proposed: it takes a tenth of a millisecond."""
        if self.stale:
            self.prices, self.stale = self.costs.prices(), False
        grows = column == self.wide and not self.frozen  # the forward reads the last text's token too
        return self.prices.token + self.prices.bend * (2 * column - 1) + self.prices.change / _LASTS * grows

    def reads_on(self, wanted: Sequence[bool]) -> list[bool]:
        """Which of the `wanted` rows another draft forward is worth its time for, before its outcome is known."""
        if not self.auto:
            return list(wanted)
        gains = {row: self.reach[row] * self.learned.usual for row, here in enumerate(wanted) if here}
        kept = self._worth(gains, self._price(self.column + 1) + self.prices.draft)
        return [row in kept for row in range(len(wanted))]

    def _worth(self, gains: dict[int, float], cost: float) -> set[int]:
        """The rows for which one more token, of which gains[row] will be accepted, is worth what it costs all."""
        least = max(1.0, self.prices.rate) * cost
        if self.frozen:  # every row by itself: the same in any batch
            kept = {row for row, gain in gains.items() if gain >= least}
        else:
            kept = set(gains) if sum(gains.values()) >= least * len(self.why) else set()
        self._stop(set(gains) - kept, "not worth its time")
        return kept

    def _stop(self, rows: set[int], why: str) -> None:
        for row in rows:
            self.why[row] = why

    def trim(self, proposal: Proposal) -> Proposal:
        """Cut proposals that were not drawn to what pays: each of their tokens is a function of its prefix."""
        if not self.auto or proposal.q is not None or not any(proposal.tokens):
            return proposal
        chances: list[list[float]] = []
        for row, above in enumerate(proposal.parents):
            sure = proposal.confidence[row] if proposal.confidence else [UNKNOWN] * len(above)
            chances.append([])
            for confidence, parent in zip(sure, above, strict=True):
                before = chances[row][parent] if parent >= 0 else 1.0
                chances[row].append(before * self.learned.acceptance(confidence))
        # Best first: never above its parent's, so that the first few are always a tree.
        best = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in chances]
        kept: list[list[int]] = [[] for _ in best]
        rows = set(range(len(best)))
        for column in range(max(map(len, best))):
            rows = self._worth({row: chances[row][best[row][column]] for row in rows if column < len(best[row])},
                               self._price(column + 1))
            for row in rows:
                kept[row].append(best[row][column])
        tokens, parents = [], []
        for ids, above, nodes in zip(proposal.tokens, proposal.parents, map(sorted, kept), strict=True):
            place = {-1: -1} | {node: new for new, node in enumerate(nodes)}
            tokens.append([ids[node] for node in nodes])
            parents.append([place[above[node]] for node in nodes])
        return replace(proposal, tokens=tokens, parents=parents, why=list(self.why))

    def round_done(self, proposal: Proposal | None, paths: Sequence[Sequence[int]], committed: Sequence[int],
                   seconds: Sequence[float], new: int, changed: bool = False) -> None:
        """Learn from a round. seconds: of drafting, of the target's forward, of the whole round; new: tokens of a row
        in the target's forward; changed: they were not as many in the one before."""
        if not self.auto or self.frozen:
            return
        costs, learned = self.costs, self.learned
        draft, verify, whole = agreed(seconds, self.target)
        if changed and len(costs.verify[new]) >= _ENOUGH:
            costs.change.append(verify - median(costs.verify[new]))
        if not changed or len(costs.verify[new]) < _ENOUGH:
            costs.verify[new].append(verify)
        if proposal is None:
            if new == 1 and (not changed or len(costs.plain) < 2):  # a runner may have kept another width
                costs.plain.append(whole)
                costs.unchecked = 0
            return
        costs.unchecked += 1
        steps = proposal.forwards or int(self.looks_up)  # looking something up is a step too
        if steps:
            costs.draft.append((steps, draft))
        learned.tried, learned.kept = ([_MEMORY * n for n in counts] for counts in (learned.tried, learned.kept))
        for row, ids in enumerate(proposal.tokens):
            sure = proposal.confidence[row] if proposal.confidence else [UNKNOWN] * len(ids)
            for depth, confidence in enumerate(sure[: min(len(ids), len(paths[row]) + 1)]):  # not what was cut
                learned.learn(confidence, depth < len(paths[row]))
        tokens = sum(committed) / len(committed)
        if any(proposal.tokens):
            costs.round.append(whole)
            costs.tokens.append(tokens)
        elif learned.credit == _TRY / len(committed) ** 0.5:  # a try that was declined
            costs.forget()
        if not costs.plain:
            return
        if self.room:
            # A batch ends with its last row, which is behind the others by luck: of n sums of as many terms as there
            # are rounds, the least is some √(2 log n · rounds) deviations of a term below the mean. A row that ends
            # before it saves its own share of a forward only.
            spread = sqrt(sum((count - tokens) ** 2 for count in committed) / len(committed))
            behind = spread * sqrt(2 * log(len(committed)) * tokens / self.room)
            tokens -= (1 - min(1.0, self.prices.token)) * behind
        learned.paid(tokens - costs.usual(steps, new), len(committed))


def curve(points: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """a and b of a x + b x², least squares over (x, how often measured, y), neither below 0: the first tokens more are
    nearly free where a forward waits for memory, the later ones are not."""
    xx, xxx, xxxx, xy, xxy = (sum(n * x**p * y**q for x, n, y in points) for p, q in (
        (2, 0), (3, 0), (4, 0), (1, 1), (2, 1)))
    whole = xx * xxxx - xxx * xxx
    a, b = xy / xx, 0.0
    if whole > 1e-9 * xx * xxxx and xxy * xx > xy * xxx:  # else it does not bend upwards, or was seen at one x only
        a, b = (xy * xxxx - xxy * xxx) / whole, (xxy * xx - xy * xxx) / whole
        if a < 0:
            a, b = 0.0, xxy / xxxx
    return max(0.0, a), max(0.0, b)


def read_costs(path: str) -> tuple[Learned, Prices]:
    """Costs frozen by `write_costs`: with them, the same seed gives the same tokens, whatever the clock says and in
    whatever batch."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        learned, prices = Learned(data["tried"], data["kept"], data["usual"]), Prices(**data["prices"])
        # Whatever is divided by or compared later is there, and is a number.
        assert len(learned.tried) == len(learned.kept) == _BUCKETS
        assert all(x >= 0 and isfinite(x) for x in [*learned.tried, *learned.kept, learned.usual,
                                                    *asdict(prices).values()])
    except OSError as error:
        raise InputError(f"costs file {path!r} cannot be read ({error.strerror}): give one written by "
                         "specbeam.drafting.length.write_costs.") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"costs file {path!r} is not one that specbeam.drafting.length.write_costs wrote.") from None
    return learned, prices


def write_costs(path: str, target: Any, draft: Any = None, rows: int = 1, **options: Any) -> None:
    """Freeze what `draft_length="auto"` has learned so far about this pair, at this batch size. options: those of
    `speculative_generate` that it learned with (drafter, temperature, …)."""
    settings = Settings(draft_length="auto", **options)
    learned_of, known = _of_pair(settings, target, draft)
    size, costs = max(((size, costs) for (count, size), costs in known.items() if count == rows),
                      key=lambda one: len(one[1].plain), default=(0, Costs()))
    learned = learned_of[size]
    if not costs.plain:
        raise InputError(f"nothing was learned yet for drafter={settings.drafter} with {rows} rows and these options: "
                         "generate with draft_length=\"auto\" first.")
    Path(path).write_text(json.dumps({"prices": asdict(costs.prices()), "tried": learned.tried,
                                      "kept": learned.kept, "usual": learned.usual}, indent=1), encoding="utf-8")
