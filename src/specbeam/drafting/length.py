"""How long a proposal is: fixed, until the draft loses confidence, or as long as it pays.

`auto` counts in plain rounds. With r the tokens per plain round and row that this batch reaches now, one more token of
every row is proposed if

    Σ_rows w · P(all before it accepted) · P(it is accepted | the draft's confidence) ≥ r · (plain rounds that it costs)

where the probabilities come from what was accepted of late (at that confidence, once the draft has read so far; of all
tokens, before it has), the costs are measured (costs.py: a token more in one row is a column more in everybody's
forward), and the weights w, 1 in all, say which row will end last: a batch takes as long as that one.

Whether to draft at all is a matter of credit: each round with proposals adds the tokens that it brought and takes what
it cost. At 0 the batch decodes plainly for 12 rounds and tries again; each try that fails makes the next pause three
times as long, up to 64 rounds (256 after 24 pauses in a row), each that pays begins anew with 12. A pause that would
end within an answer ends at its beginning, where the draft reads the prompt outside decoding; in an answer that begins
within a pause, it reads nothing until it is needed.
Too little credit stops by bad luck what gains a tenth; too much is lost where texts change (docs/log.md, 2026-11-30).
What was learned stays with the pair of models, from prompt to prompt; `costs` freezes it in a file.

Where one round is like the next, it may not ask for confidences at all (asking.py), and some follow without a thought.
The confidence is the draft's largest probability *before* anything is drawn: to stop or not is a function of the
prefix, and a drawn token is never dropped for what it is. (Dropping it would bias the output.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import chain
from math import ceil, isfinite
from pathlib import Path
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from specbeam.drafting import Proposal, Settings
from specbeam.drafting.costs import Costs, Prices
from specbeam.drafting.last import ALONE, Last
from specbeam.errors import InputError
from specbeam.placement import agreed, is_split

UNKNOWN = 0.5  # the confidence of drafters that have none: they are judged by what was accepted so far
_BUCKETS = 10
_MEMORY = 0.995  # of what was accepted, per round that asked: texts change
_LATELY = 1 / 12  # weight of the newest token in the usual acceptance
_MOST_CREDIT, _ALONE = 4.0, 7.0  # plain rounds of a row, among several or alone: what may be lost where texts change
_STEADY = 2.0  # credit, from which on one round is like the next
_MOST_LOSS = 1.0  # that one round is charged with: it may have been slow for other reasons
_TRY = 0.3  # credit of a try
_SHORTEST_WAIT, _LONGER, _LONG_WAIT = 12, 3, 64  # plain rounds; by how much the next pause is longer
_PATIENT, _LONGEST_WAIT = 24, 256  # pauses in a row; plain rounds that the next ones may have
_CAUTIOUS = 2  # tokens that are proposed until it is known what longer forwards cost
_LASTS = 2  # rounds that share what a change of width costs
_STAYS = 1.2  # another depth must promise to be so much faster: what is accepted of late is a matter of luck, too
_DOUBTS = 4  # tries in a row that are declined until what they would cost is measured anew
_STEP = 0.05  # plain rounds that a step in the target's costs is worth looking at
_TOGETHER = 4  # rounds whose proposals are learned from together; at first an eighth of all
_MEASURED = 3  # plain rounds that are measured one after the other


@dataclass
class Learned:
    """Of one pair of models, one drafter and one size of context (drafts that learnt from short texts are worse on
    long ones), however many rows."""

    tried: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)  # by confidence
    kept: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)
    usual: float = UNKNOWN  # of late, of all tokens that the target judged
    credit: float = _ALONE
    wait: int = _SHORTEST_WAIT  # plain rounds before the next try, of one row
    left: int = 0  # of them
    failed: int = 0  # pauses since a try paid
    depth: int = 0  # how deep chains went the last time; 0: nothing to choose from
    blind: int = 0  # rounds of one row that will be of this depth, whatever comes
    trying: bool = False  # nothing was proposed since the last pause
    declined: int = 0  # tries in a row
    heard: int = 0  # rounds that were learned from
    # Tokens, confidences (none: unknown), what was kept of them, and whether the draft was asked how sure it is.
    unheard: list[tuple[list[list[int]], Any, Sequence[Sequence[int]], bool]] = field(default_factory=list)

    def copy(self) -> Learned:
        """A first guess for another size of context. Whether to pause there is not known."""
        tried, kept = ([count / 4 for count in counts] for counts in (self.tried, self.kept))
        return replace(self, tried=tried, kept=kept, wait=_SHORTEST_WAIT, left=0, failed=0, trying=False, blind=0,
                       unheard=[])

    def judged(self, proposal: Proposal, paths: Sequence[Sequence[int]], asked: bool = True) -> None:
        """The target kept these of each row's proposals. Learned from later: between forwards, caches are cold."""
        self.unheard.append((proposal.tokens, proposal.confidence, paths, asked))
        if len(self.unheard) >= min(_TOGETHER, 1 + self.heard // 8):
            self.hear()

    def hear(self) -> None:
        """Learn from what was judged since the last time."""
        fades = _MEMORY ** sum(asked for *_, asked in self.unheard)
        self.tried, self.kept = ([fades * n for n in counts] for counts in (self.tried, self.kept))
        for tokens, confidences, paths, asked in self.unheard:
            for row, (ids, path) in enumerate(zip(tokens, paths, strict=True)):
                sure = confidences[row] if asked and confidences else [UNKNOWN] * len(ids)
                for depth, confidence in enumerate(sure[: min(len(ids), len(path) + 1)]):  # not what was cut
                    self.learn(confidence if asked else None, depth < len(path))
        self.heard += len(self.unheard)
        self.unheard.clear()

    def acceptance(self, confidence: float) -> float:
        """P(accepted), from what was seen at this confidence; with nothing seen, the confidence itself."""
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        return (self.kept[place] + 2 * confidence) / (self.tried[place] + 2)

    def learn(self, confidence: float | None, accepted: bool) -> None:
        if confidence is not None:
            place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
            self.tried[place] += 1
            self.kept[place] += accepted
        self.usual += _LATELY * (accepted - self.usual)

    def paid(self, net: float, rows: int) -> None:
        """A round with proposals brought `net` plain rounds more than it cost. Of many rows, less is luck."""
        most = _ALONE if rows == 1 else _MOST_CREDIT / rows**0.5
        self.credit = min(self.credit + max(net, -_MOST_LOSS), most)
        if self.credit <= 0:
            # A try begins with reading every row's prompt.
            self.failed += 1
            longest = _LONG_WAIT if self.failed <= _PATIENT else _LONGEST_WAIT
            self.left, self.credit = min(int(self.wait * rows**0.5), longest), _TRY / rows**0.5
            self.wait, self.trying = min(_LONGER * self.wait, longest), True
        elif self.credit >= most / 2:
            self.wait, self.failed = _SHORTEST_WAIT, 0


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple, Any]]] = WeakKeyDictionary()


def _of_pair(settings: Settings, target: Any, draft: Any) -> tuple[dict[int, Learned], dict[int, Costs]]:
    """What is known of these models with this drafter, by size of context: of acceptance, and of costs."""
    known = _known.setdefault(target, WeakKeyDictionary()).setdefault(target if draft is None else draft, {})
    return known.setdefault((settings.drafter, settings.vocabulary, settings.exit_layer, settings.branches,
                             settings.corpus, settings.temperature > 0), ({}, {}))


def _at_size(size: int, known: dict[int, Any], new: Any) -> Any:
    """What is known at this size of context; at first a copy of what is known of the nearest."""
    if size not in known:
        some = [other for other, its in known.items() if its != new()]
        near = min(some, key=lambda other: abs(other - size), default=None)
        known[size] = new() if near is None else known[near].copy()
    return known[size]


@dataclass(frozen=True)
class _Round:
    """What `round_done` was told, and what the round was meant to be."""

    proposal: Proposal | None
    paths: Sequence[Sequence[int]]
    committed: Sequence[int]
    seconds: Sequence[float]
    new: int
    changed: bool
    charged: bool
    full: int
    asked: bool
    spared: float
    last: Last


class Length:
    """Decides for one batch. All methods number rows among the live ones."""

    def __init__(self, settings: Settings, target: Any, draft: Any, rows: int, room: int = 0, context: int = 0):
        """room: how many tokens an answer may have; 0: other prompts take the places of rows that end. context: of the
        longest prompt; seconds that were measured at half of it, or twice, say little."""
        self.room, self.size, self.target = room, (context // 256).bit_length(), target
        self.auto = settings.draft_length == "auto"
        self.threshold = settings.confidence_threshold
        self.fixed = not self.auto and not self.threshold
        self.asks = not self.fixed  # in this round, how sure the draft is
        self.settings, self.looks_up = settings, draft is None
        self.chains = settings.recordable(draft)
        self.last = Last.of([1] * rows, 1.0)
        self.reach = [1.0] * rows  # P(all proposed so far accepted), of the running round
        self.why = [""] * rows
        self.prices, self.frozen, self.split = Prices(), bool(settings.costs), is_split(target)
        self.depths: tuple[Prices, list[tuple[int, float]]] | None = None  # where to end, and what that costs
        self.rest = 0  # plain rounds from here on that need no more thought
        self.full, self.spared = 0, 0.0  # if a round is like the last one: its depth; plain rounds that asking spared
        self.began = self.alike = False  # there was a round; one of the usual depth
        self.rounds: list[_Round] = []  # not learned from yet
        self.wide = self.column = 0  # tokens of the target's last forward (0: any is as good), and proposed in this one
        self.fresh = False  # that forward read prompts: nobody keeps its width
        if settings.costs:
            self.learned, self.prices = read_costs(settings.costs)
        elif self.auto:
            learned, costs = _of_pair(settings, target, draft)
            self.learned, self.costs = _at_size(self.size, learned, Learned), _at_size(self.size, costs, Costs)
            if self.learned.left <= room:
                self.learned.left = 0

    @property
    def idle(self) -> bool:
        """Whether nothing will be drafted for a while."""
        return self.auto and (self.prices.rate < 1 if self.frozen else self.learned.left > 0)

    @property
    def _kept(self) -> int:
        """Tokens that the target's coming forward has anyway; 0: as many as it must."""
        return 0 if self.frozen or self.fresh else self.wide

    def limits(self, most: Sequence[int], left: Sequence[int] = ()) -> list[int]:
        """How deep each row may propose in this round; 0: decode plainly. left: tokens that each row may still have,
        where the batch ends with the last of them; else none."""
        if self.auto and self.learned.blind and self.chains and len(most) == 1 and most[0] >= self.learned.depth and (
                not self.began or self.learned.depth == self.wide - 1):
            self.learned.blind -= 1
            self.full, self.asks, self.alike, self.why = self.learned.depth, False, True, ["not worth its time"]
            return [self.full]
        if self.auto:
            self.learned.blind = 0
        self.rest, self.column, self.full, self.spared, self.asks = 0, 0, 0, 0.0, not self.fixed
        self.reach, self.why = [1.0] * len(most), ["length" if n == self.settings.depth else "end of answer"
                                                  for n in most]
        if not self.auto:
            return list(most)
        if not self.frozen and (not self.costs.knows(len(most)) or self.costs.unchecked >= self.costs.check):
            self.why, self.rest = ["measuring plain"] * len(most), _MEASURED
            self.costs.check_later()
        elif self.idle:
            self.why = ["does not pay"] * len(most)
            self.rest = _LONG_WAIT if self.frozen else self.learned.left
            self.learned.left -= not self.frozen
        else:
            if not self.frozen:
                self.prices = self.costs.prices(len(most))
                self.last = ALONE if len(most) == 1 else Last.of(left or most, self.prices.token if left else 1.0)
                if self.costs.few:
                    return [min(_CAUTIOUS, n) for n in most]
            deepest = self._deepest()
            if len(most) == 1 and self.wide and most[0] >= deepest and self._steady(deepest):
                self.full, self.asks, self.alike = deepest, self.costs.asking.next(deepest), True
                if not self.asks:
                    self._go_on()
            self._stop([True] * len(most), [n <= deepest for n in most], "not worth its time")
            return [min(deepest, n) for n in most]
        return [0] * len(most)

    def _steady(self, deepest: int) -> bool:
        """Whether a draft model's proposals pay up to a step in the target's costs, so that one round is like the next.
        """
        return (deepest < self.settings.depth and not self.frozen and self.settings.drafter == "draft_model"
                and self.learned.credit >= _STEADY)

    def _deepest(self) -> int:
        """How deep proposals go: up to where the target's next tokens cost a step more, unless it pays to go on. Of
        trees, and of tokens that will be spelled anew, depth says nothing of that."""
        prices, chance, depth = self.prices, min(self.learned.usual, 0.999), self.settings.depth
        if not self.chains or self.settings.vocabulary != "same":
            return depth
        if self.depths is None or self.depths[0] is not prices:
            ends = [place - 1 for place, price in prices.steps if 1 < place <= depth and price > _STEP]
            self.depths = prices, [(n, 1 + prices.first + n * (prices.token + prices.draft) + n * n * prices.bend
                                    + sum(price for place, price in prices.steps if place <= n))
                                   for n in [*ends, depth]]
        grows = 2 * prices.change / _LASTS

        def rate(end: tuple[int, float]) -> float:
            n, cost = end
            stays = _STAYS if n == self.learned.depth else 1.0
            return stays * (1 - chance ** (n + 1)) / (1 - chance) / (cost + grows * (n >= self._kept > 0))

        if len(self.depths[1]) > 1:
            depth = self.learned.depth = max(self.depths[1], key=rate)[0]
        return depth

    def rested(self, steps: Sequence[float], seconds: float) -> None:
        """Some of the `rest` were taken, as plain steps: seconds of each one's forward, and of them all."""
        if self.frozen:
            return
        if self.why[0] == "does not pay":
            self.learned.left -= len(steps) - 1  # `limits` counted one
        beside = (seconds - sum(steps)) / len(steps)
        # The first may be of another width than the one before. The others tell of one moment together.
        usual = self._agreed(steps[1:] or steps)
        for some in (usual[::2], usual[1::2]):
            if some:
                self.costs.forward(len(self.why), 1, False, median(some))
        self.costs.waited(False, self._agreed([beside])[0])
        self.costs.unchecked = 0

    def _agreed(self, seconds: Sequence[float]) -> Sequence[float]:
        return agreed(seconds, self.target) if self.split else seconds

    def proposes(self, wanted: Sequence[bool], confidence: Sequence[float]) -> list[bool]:
        """Which of the `wanted` rows propose the token after their prefix, given the draft's largest probability
        there."""
        if self.threshold:
            kept = [here and sure >= self.threshold for here, sure in zip(wanted, confidence, strict=True)]
            return self._stop(wanted, kept, "confidence")
        if self.auto:
            for row, here in enumerate(wanted):
                if here:
                    self.reach[row] *= self.learned.acceptance(confidence[row])
            self.column += 1
            return self._worth(wanted, self.reach, self._price(self.column))
        return list(wanted)

    def _price(self, column: int) -> float:
        """Of the target's reading a proposal's token at this place, the first is 1."""
        prices, kept = self.prices, self._kept
        if column < kept:  # the runner will keep that width (the last token is read, too)
            return 0.0
        grows = column == kept
        return (prices.token + prices.bend * (2 * column - 1) + prices.first * (column == 1)
                + prices.change / _LASTS * grows + sum(price for place, price in prices.steps if place == column))

    def reads_on(self, wanted: Sequence[bool]) -> list[bool]:
        """Which of the `wanted` rows another draft forward is worth its time for, before its outcome is known."""
        if not self.auto or not self.asks:
            return list(wanted)
        usual, cost = self.learned.usual, self._price(self.column + 1) + self.prices.draft
        kept = self._worth(wanted, [reach * usual for reach in self.reach], cost)
        if self.full > self.column and not kept[0]:
            brings = self.reach[0] / max(1.0, self.prices.rate)
            self.spared = sum(cost - brings * usual**n for n in range(1, self.full - self.column + 1))
        return kept

    def _worth(self, wanted: Sequence[bool], gains: Sequence[float], cost: float) -> list[bool]:
        """The `wanted` rows for which one more token, of which gains[row] will be accepted, is worth what it costs
        all."""
        if not cost:
            return list(wanted)
        least = max(1.0, self.prices.rate) * cost
        if self.frozen:  # every row by itself: the same in any batch
            kept = [here and gain >= least for here, gain in zip(wanted, gains, strict=True)]
        else:
            gain = sum([self.last.worth(row) * gains[row] for row, here in enumerate(wanted) if here])
            kept = [here and gain >= least for here in wanted]
        return self._stop(wanted, kept, "not worth its time")

    def _stop(self, wanted: Sequence[bool], kept: list[bool], why: str) -> list[bool]:
        if wanted != kept:
            for row, (before, after) in enumerate(zip(wanted, kept, strict=True)):
                if before and not after:
                    self.why[row] = why
        return kept

    def trim(self, proposal: Proposal) -> Proposal:
        """Cut proposals that were not drawn to what pays: each of their tokens is a function of its prefix."""
        if not self.auto or not self.asks or proposal.q is not None or not any(proposal.tokens):
            return proposal
        if self.column and self.settings.drafter != "combined" and self.settings.vocabulary == "same" and (
                proposal.chained):  # `proposes` was asked for each of them
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
        rows = [True] * len(best)
        for column in range(max(map(len, best))):
            rows = [here and column < len(nodes) for here, nodes in zip(rows, best, strict=True)]
            gains = [chances[row][best[row][column]] if here else 0.0 for row, here in enumerate(rows)]
            rows = self._worth(rows, gains, self._price(column + 1))
            for row, here in enumerate(rows):
                if here:
                    kept[row].append(best[row][column])
        tokens, parents = [], []
        for ids, above, nodes in zip(proposal.tokens, proposal.parents, map(sorted, kept), strict=True):
            place = {-1: -1} | {node: new for new, node in enumerate(nodes)}
            tokens.append([ids[node] for node in nodes])
            parents.append([place[above[node]] for node in nodes])
        return replace(proposal, tokens=tokens, parents=parents, why=list(self.why))

    def round_done(self, proposal: Proposal | None, paths: Sequence[Sequence[int]], committed: Sequence[int],
                   seconds: Sequence[float], new: int, changed: bool = False) -> None:
        """Learn from a round, now or later. seconds: of drafting, of the target's forward, of the whole round; new:
        tokens of a row in the target's forward; changed: they were not as many in the one before."""
        if not self.auto or self.frozen:
            return
        # Neither a try nor an answer is charged for the change that it begins with.
        charged, self.began = changed and self.wide > 1 and self.began, True
        self.rounds.append(_Round(proposal, paths, committed, seconds, new, changed, charged, self.full, self.asks,
                                  self.spared, self.last))
        nothing = proposal is not None and not any(proposal.tokens)
        most = min(_TOGETHER, self.learned.credit / _MOST_LOSS) if nothing and len(committed) == 1 else 1
        if not self.learned.blind and len(self.rounds) >= most:
            self._hear()

    def ends(self) -> None:
        """The batch has ended: what is learned and decided now takes no answer's time."""
        if not self.auto:
            return
        self._hear()
        self.learned.blind = 0
        if self.alike:
            self.prices = self.costs.prices(1)
            if self._steady(self._deepest()):
                self._go_on()

    def _go_on(self) -> None:
        """The next rounds are like this one whatever comes, as many as cannot use up the credit: a thought between two
        forwards takes 4 % of a small model's round."""
        if self.costs.asking.settled:
            self.learned.blind = max(0, ceil(self.learned.credit / _MOST_LOSS) - 1 - len(self.rounds))

    def _hear(self) -> None:
        """Learn from the rounds there were. Between forwards caches are cold: of those that proposed nothing, and of
        those that are alike, some are learned from together."""
        for one in self.rounds:
            self._learn(one)
        self.rounds.clear()

    def _learn(self, one: _Round) -> None:
        proposal, new = one.proposal, one.new
        costs, learned, rows = self.costs, self.learned, len(one.committed)
        draft, verify, whole = self._agreed(one.seconds)
        costs.forward(rows, new, one.changed, verify)
        if one.asked:
            costs.waited(proposal is not None, whole - draft - verify)
        if proposal is None:
            if new == 1 and not one.changed:  # a runner may have kept another width
                costs.unchecked = 0
            return
        costs.unchecked += 1
        steps = proposal.forwards or int(self.looks_up)  # looking something up is a step too
        if steps and one.asked:
            costs.drafted(rows, steps, draft)
        learned.judged(proposal, one.paths, one.asked)
        if one.full and new == one.full + 1 and not one.changed:
            costs.asking.took(one.asked, whole, len(proposal.tokens[0]) == one.full, one.spared * costs.plain(rows))
        tokens = sum(one.committed) / rows
        took = costs.usual(rows, steps, new, one.charged)
        if any(proposal.tokens):
            costs.gained.append((tokens, took))
            learned.declined, learned.trying = 0, False
        elif learned.trying:  # a try that was declined
            learned.declined, learned.trying = learned.declined + 1, False
            if learned.declined % _DOUBTS == 0:
                costs.forget(rows)
        learned.paid(one.last.gain(one.committed) - took, rows)


def read_costs(path: str) -> tuple[Learned, Prices]:
    """Costs frozen by `write_costs`: with them, the same seed gives the same tokens, whatever the clock says and in
    whatever batch."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        learned, prices = Learned(data["tried"], data["kept"], data["usual"]), Prices(**data["prices"])
        prices = replace(prices, steps=tuple((place, price) for place, price in prices.steps))
        # Whatever is divided by or compared later is there, and is a number.
        assert len(learned.tried) == len(learned.kept) == _BUCKETS
        assert all(type(place) is int and place > 0 for place, _ in prices.steps)
        *others, steps = astuple(prices)
        assert all(x >= 0 and isfinite(x) for x in [*learned.tried, *learned.kept, learned.usual, *others,
                                                    *chain.from_iterable(steps)])
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
    learned, known = _of_pair(settings, target, draft)
    size = max((size for size, costs in known.items() if costs.knows(rows)), default=None,
               key=lambda size: sum(map(len, known[size].target.values())))
    if size is None:
        raise InputError(f"nothing was learned yet for drafter={settings.drafter} with {rows} rows and these options: "
                         "generate with draft_length=\"auto\" first.")
    its = learned[size]
    its.hear()
    known[size].hear()
    Path(path).write_text(json.dumps({"prices": asdict(known[size].prices(rows)), "tried": its.tried,
                                      "kept": its.kept, "usual": its.usual}, indent=1), encoding="utf-8")
