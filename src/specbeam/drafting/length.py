"""How long a proposal is: fixed, until the draft loses confidence, or as long as it pays.

`auto` compares seconds with tokens. With r the tokens per second and row that this batch reaches now, one more token
of every row is proposed if, summed over the rows,

    P(all before it accepted) · P(it is accepted | the draft's confidence) ≥ rows · r · (seconds that it adds)

where the probabilities come from what was accepted at that confidence of late, and the seconds are measured: a token
more in one row is a column more in everybody's forward. Whether to propose at all is a matter of credit, in plain
rounds: each round with proposals adds the tokens it brought and takes what it cost. At 0 the batch decodes plainly for
4 rounds and tries again; each try that fails doubles the pause, up to 128 rounds, each that pays begins anew with 4.
What was learned stays with the pair of models, from prompt to prompt; `costs` freezes it in a file.

The confidence is the draft's largest probability *before* anything is drawn: to stop or not is a function of the
prefix, and a drawn token is never dropped for what it is. (Dropping it would bias the output.)
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from specbeam.drafting import Proposal, Settings
from specbeam.errors import InputError
from specbeam.placement import agreed

_BUCKETS = 10
_MEMORY = 0.99  # of what was accepted, per round: texts change
_MOST_CREDIT = 4.0  # plain rounds: what a text that has begun to go badly may cost
_TRY = 0.25  # credit of a try
_LONGEST_WAIT = 128
_ENOUGH = 3  # measurements of longer forwards: the first may be slow
_CHECK = 64  # rounds with proposals until a plain one is measured again
UNKNOWN = 0.5  # the confidence of drafters that have none: they are judged by what was accepted so far


def _recent() -> deque[float]:
    return deque(maxlen=15)


@dataclass
class Learned:
    """Of one pair of models and one drafter, however many rows."""

    tried: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)  # by confidence
    kept: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)
    credit: float = _MOST_CREDIT
    wait: int = 4  # plain rounds before the next try
    left: int = 0  # of them

    def acceptance(self, confidence: float) -> float:
        """P(accepted), from what was seen at this confidence; with nothing seen, the confidence itself."""
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        return (self.kept[place] + 2 * confidence) / (self.tried[place] + 2)

    def learn(self, confidence: float, accepted: bool) -> None:
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        self.tried[place] += 1
        self.kept[place] += accepted

    def paid(self, net: float) -> None:
        """A round with proposals brought `net` plain rounds more than it cost."""
        self.credit = min(self.credit + net, _MOST_CREDIT)
        if self.credit < 0:
            self.left, self.credit = self.wait, _TRY
            self.wait = min(2 * self.wait, _LONGEST_WAIT)
        elif self.credit >= _MOST_CREDIT / 2:
            self.wait = 4


@dataclass
class Costs:
    """Measured seconds of one pair of models, one drafter and one number of rows."""

    plain: deque[float] = field(default_factory=_recent)  # seconds of a round without proposals
    round: deque[float] = field(default_factory=_recent)  # of one with
    tokens: deque[float] = field(default_factory=_recent)  # committed per row in one with
    draft: deque[float] = field(default_factory=_recent)  # seconds per draft forward, or of looking up
    verify: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(_recent))  # by new tokens
    learned: Learned = field(default_factory=Learned)
    unchecked: int = 0  # rounds with proposals since the last without

    @property
    def plain_rate(self) -> float:
        return 1 / median(self.plain)

    @property
    def rate(self) -> float:
        """Tokens per second and row with proposals."""
        return sum(self.tokens) / len(self.tokens) / median(self.round) if self.tokens else self.plain_rate

    @property
    def per_token(self) -> float:
        """Seconds that one more token of every row adds to the target's forward; 0 until that is known."""
        few = min(self.verify)
        first = median(self.verify[few])
        each = [(s - first) / (new - few) for new, some in self.verify.items() if new > few for s in some]
        return max(0.0, median(each)) if len(each) >= _ENOUGH else 0.0

    def forget(self) -> None:
        """The oldest measurements of drafting and of longer forwards: what no longer seems to pay is measured again."""
        for some in (self.draft, *(self.verify[new] for new in sorted(self.verify)[1:])):
            for _ in range(min(len(some), 2)):
                some.popleft()
        for new in [new for new, some in self.verify.items() if not some]:
            del self.verify[new]

    def usual(self, steps: int, new: int) -> float:
        """Seconds of a round with so many draft steps and new tokens, as they mostly are."""
        draft = steps * median(self.draft) if steps else 0.0
        return median(self.plain) + draft + median(self.verify[new]) - median(self.verify[min(self.verify)])


_known: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple, Costs]]] = WeakKeyDictionary()


def _of_pair(settings: Settings, target: Any, draft: Any) -> tuple[dict[tuple, Costs], tuple]:
    """What is known of these models, and this drafter's key in it, to which the number of rows is added."""
    known = _known.setdefault(target, WeakKeyDictionary()).setdefault(target if draft is None else draft, {})
    return known, (settings.drafter, settings.vocabulary, settings.exit_layer, settings.branches, settings.corpus,
                   settings.temperature > 0)


class Length:
    """Decides for one batch. All methods number rows among the live ones."""

    def __init__(self, settings: Settings, target: Any, draft: Any, rows: int):
        self.auto = settings.draft_length == "auto"
        self.threshold = settings.confidence_threshold
        self.fixed = not self.auto and not self.threshold
        self.settings, self.models = settings, (target, draft)
        self.frozen = read_costs(settings.costs) if settings.costs else None
        self.reach = [1.0] * rows  # P(all proposed so far accepted), of the running round
        self.why = [""] * rows
        self.costs = self._costs(rows)

    def _costs(self, rows: int) -> Costs:
        """What is known for so many rows; for a new number, what the nearest one's longer forwards took."""
        if self.frozen is not None:
            return self.frozen
        known, key = _of_pair(self.settings, *self.models)
        if (*key, rows) not in known:
            near = min((other for other in known if other[:-1] == key), key=lambda other: abs(other[-1] - rows),
                       default=None)
            costs = Costs() if near is None else deepcopy(known[near])
            costs.plain.clear()  # the yardstick
            costs.verify.pop(1, None)
            known[(*key, rows)] = costs if near is None else replace(costs, learned=known[near].learned)
        return known[(*key, rows)]

    def limits(self, most: Sequence[int]) -> list[int]:
        """How deep each row may propose in this round; 0: decode plainly."""
        self.reach, self.why = [1.0] * len(most), ["length" if n == self.settings.depth else "end of answer"
                                                  for n in most]
        if not self.auto:
            return list(most)
        costs, learned = self.costs, self.costs.learned
        if self.frozen is None and (len(costs.plain) < 2 or costs.unchecked >= _CHECK):
            self.why = ["measuring plain"] * len(most)
            costs.forget()
        elif learned.left or (self.frozen is not None and costs.rate < costs.plain_rate):
            self.why = ["does not pay"] * len(most)
            learned.left = max(learned.left - 1, 0)
            if self.frozen is None and not learned.left:
                costs.forget()
        else:
            return list(most)
        return [0] * len(most)

    def proposes(self, wanted: Sequence[bool], confidence: Sequence[float]) -> list[bool]:
        """Which of the `wanted` rows propose the token after their prefix, given the draft's largest probability
        there."""
        rows = [row for row, here in enumerate(wanted) if here]
        if self.threshold:
            kept = {row for row in rows if confidence[row] >= self.threshold}
            self._stop(set(rows) - kept, "confidence")
        elif self.auto:
            for row in rows:
                self.reach[row] *= self.costs.learned.acceptance(confidence[row])
            kept = self._worth({row: self.reach[row] for row in rows}, self.costs.per_token)
        else:
            return list(wanted)
        return [row in kept for row in range(len(wanted))]

    def reads_on(self, wanted: Sequence[bool]) -> list[bool]:
        """Which of the `wanted` rows another draft forward is worth its time for, before its outcome is known."""
        if not self.auto or not self.costs.draft:
            return list(wanted)
        learned = self.costs.learned
        usual = (sum(learned.kept) + 1) / (sum(learned.tried) + 2)
        kept = self._worth({row: self.reach[row] * usual for row, here in enumerate(wanted) if here},
                           self.costs.per_token + median(self.costs.draft))
        return [row in kept for row in range(len(wanted))]

    def _worth(self, gains: dict[int, float], seconds: float) -> set[int]:
        """The rows for which one more token, of which gains[row] will be accepted, is worth these seconds of all."""
        least = max(self.costs.plain_rate, self.costs.rate) * seconds
        if self.frozen is not None:  # every row by itself: the same in any batch
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
        if not self.auto or proposal.q is not None:
            return proposal
        chances: list[list[float]] = []
        for row, above in enumerate(proposal.parents):
            sure = proposal.confidence[row] if proposal.confidence else [UNKNOWN] * len(above)
            chances.append([])
            for confidence, parent in zip(sure, above, strict=True):
                before = chances[row][parent] if parent >= 0 else 1.0
                chances[row].append(before * self.costs.learned.acceptance(confidence))
        # Best first: never above its parent's, so that the first few are always a tree.
        best = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in chances]
        kept: list[list[int]] = [[] for _ in best]
        rows = set(range(len(best)))
        for column in range(max(map(len, best))):
            rows = self._worth({row: chances[row][best[row][column]] for row in rows if column < len(best[row])},
                               self.costs.per_token)
            for row in rows:
                kept[row].append(best[row][column])
        tokens, parents = [], []
        for ids, above, nodes in zip(proposal.tokens, proposal.parents, map(sorted, kept), strict=True):
            place = {-1: -1} | {node: new for new, node in enumerate(nodes)}
            tokens.append([ids[node] for node in nodes])
            parents.append([place[above[node]] for node in nodes])
        return replace(proposal, tokens=tokens, parents=parents, why=list(self.why))

    def round_done(self, proposal: Proposal | None, paths: Sequence[Sequence[int]], committed: Sequence[int],
                   seconds: Sequence[float], new: int) -> None:
        """Learn from a round. seconds: of drafting, of the target's forward, of the whole round; new: the longest
        row's tokens in the target's forward."""
        costs, learned = self.costs, self.costs.learned
        if not self.auto or self.frozen is not None:
            return
        draft, verify, whole = agreed(seconds, self.models[0])
        costs.verify[new].append(verify)
        learned.tried, learned.kept = ([_MEMORY * n for n in counts] for counts in (learned.tried, learned.kept))
        if proposal is None:
            costs.plain.append(whole)
            costs.unchecked = 0
            return
        costs.unchecked += 1
        steps = proposal.forwards or int(self.models[1] is None)  # looking something up is a step too
        if steps:
            costs.draft.append(draft / steps)
        tokens = sum(committed) / len(committed)
        if any(proposal.tokens):
            costs.round.append(whole)
            costs.tokens.append(tokens)
        for row, ids in enumerate(proposal.tokens):
            sure = proposal.confidence[row] if proposal.confidence else [UNKNOWN] * len(ids)
            for depth, confidence in enumerate(sure[: len(paths[row]) + 1]):
                learned.learn(confidence, depth < len(paths[row]))
        if costs.plain:
            learned.paid(tokens - costs.usual(steps, new) * costs.plain_rate)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.costs = self._costs(len(rows))


_LISTS = ("plain", "round", "tokens", "draft")


def read_costs(path: str) -> Costs:
    """Costs frozen by `write_costs`: with them, the same seed gives the same tokens, whatever the clock says and in
    whatever batch."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        costs = Costs(learned=Learned(data["tried"], data["kept"]))
        for name in _LISTS:
            getattr(costs, name).extend(float(x) for x in data[name])
        for new, values in data["verify"].items():
            costs.verify[int(new)].extend(float(x) for x in values)
        measured = [*costs.plain, *costs.round, *costs.tokens, *costs.draft, *chain(*costs.verify.values())]
        # Whatever is divided by or compared later is there, and is a number.
        assert len(data["tried"]) == len(data["kept"]) == _BUCKETS and costs.plain and all(costs.verify.values())
        assert costs.verify and bool(costs.round) == bool(costs.tokens)
        assert all(0 < x < float("inf") for x in measured)
        assert all(0 <= x < float("inf") for x in [*data["tried"], *data["kept"]])
    except OSError as error:
        raise InputError(f"costs file {path!r} cannot be read ({error.strerror}): give one written by "
                         "specbeam.drafting.length.write_costs.") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"costs file {path!r} is not one that specbeam.drafting.length.write_costs wrote.") from None
    return costs


def write_costs(path: str, target: Any, draft: Any = None, rows: int = 1, **options: Any) -> None:
    """Freeze what `draft_length="auto"` has learned so far about this pair, at this batch size. options: those of
    `speculative_generate` that it learned with (drafter, temperature, …)."""
    settings = Settings(draft_length="auto", **options)
    known, key = _of_pair(settings, target, draft)
    costs = known.get((*key, rows))
    if costs is None or not costs.plain:
        raise InputError(f"nothing was learned yet for drafter={settings.drafter} with {rows} rows and these options: "
                         "generate with draft_length=\"auto\" first.")
    Path(path).write_text(json.dumps({
        **{name: list(getattr(costs, name)) for name in _LISTS}, "tried": costs.learned.tried,
        "kept": costs.learned.kept, "verify": {str(new): list(values) for new, values in costs.verify.items()}},
        indent=1), encoding="utf-8")
