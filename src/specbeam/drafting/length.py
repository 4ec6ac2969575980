"""How long a proposal is: fixed, until the draft loses confidence, or as long as it pays.

`auto` compares seconds with tokens. With r the tokens per second that this batch reaches now, one more token is
proposed if

    P(all before it accepted) · P(it is accepted | the draft's confidence) ≥ r · (its share of the forwards' seconds)

where the probabilities come from what was accepted before at that confidence, and the seconds are measured. When
rounds with proposals give fewer tokens per second than plain ones, the batch decodes plainly and tries again after 4,
8, …, 128 rounds. What was learned stays with the pair of models, from prompt to prompt; `costs` freezes it in a file.

The confidence is the draft's largest probability *before* anything is drawn: to stop or not is a function of the
prefix, and a drawn token is never dropped for what it is. (Dropping it would bias the output.)
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from specbeam.drafting import Proposal, Settings
from specbeam.errors import InputError

_BUCKETS = 10
_LONGEST_WAIT = 128
_UNKNOWN = 0.5  # the confidence of drafters that have none: they are judged by what was accepted so far


def _recent() -> deque[float]:
    return deque(maxlen=15)


@dataclass
class Costs:
    """Measured seconds and acceptance of one pair of models, one drafter and one number of rows."""

    plain: deque[float] = field(default_factory=_recent)  # seconds of a round without proposals
    round: deque[float] = field(default_factory=_recent)  # of one with
    tokens: deque[float] = field(default_factory=_recent)  # committed per row in one with
    draft: deque[float] = field(default_factory=_recent)  # seconds per draft forward
    verify: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(_recent))  # by new tokens
    tried: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)  # by confidence
    kept: list[float] = field(default_factory=lambda: [0.0] * _BUCKETS)
    wait: int = 4  # plain rounds before the next try, doubled by every one that fails
    left: int = 0  # of them, when the last batch ended
    frozen: bool = False

    def acceptance(self, confidence: float) -> float:
        """P(accepted), from what was seen at this confidence; with nothing seen, the confidence itself."""
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        return (self.kept[place] + 2 * confidence) / (self.tried[place] + 2)

    def learn(self, confidence: float, accepted: bool) -> None:
        place = min(int(confidence * _BUCKETS), _BUCKETS - 1)
        if self.tried[place] > 500:  # old evidence fades, texts change
            self.tried[place], self.kept[place] = self.tried[place] / 2, self.kept[place] / 2
        self.tried[place] += 1
        self.kept[place] += accepted

    @property
    def plain_rate(self) -> float:
        return 1 / median(self.plain)

    @property
    def rate(self) -> float:
        """Tokens per second and row with proposals."""
        return sum(self.tokens) / len(self.tokens) / median(self.round)

    @property
    def per_token(self) -> float:
        """Seconds that one more token adds to the target's forward."""
        few, many = min(self.verify), max(self.verify)
        if few == many:
            return 0.0
        return max(0.0, (median(self.verify[many]) - median(self.verify[few])) / (many - few))


_known: WeakKeyDictionary[Any, dict[tuple, Costs]] = WeakKeyDictionary()


class Length:
    """Decides for one batch. All methods number rows among the live ones."""

    def __init__(self, settings: Settings, target: Any, draft: Any, rows: int):
        self.auto = settings.draft_length == "auto"
        self.threshold = settings.confidence_threshold
        self.fixed = not self.auto and not self.threshold
        self.settings, self.target = settings, target
        self.partner = (settings.drafter, settings.vocabulary, id(draft) if draft is not None else None)
        self.frozen = read_costs(settings.costs) if settings.costs else None
        self.reach = [1.0] * rows  # P(all proposed so far accepted), of the running round
        self.why = [""] * rows
        self.costs = self._costs(rows, Costs())
        self.left = self.costs.left  # plain rounds until the next try, of all rows: a try costs the whole batch

    def _costs(self, rows: int, first: Costs) -> Costs:
        """What is known for so many rows; for a new number, what `first` knows, until it is measured."""
        if self.frozen is not None:
            return self.frozen
        known = _known.setdefault(self.target, {})
        if (*self.partner, rows) not in known:
            known[(*self.partner, rows)] = deepcopy(first)
        return known[(*self.partner, rows)]

    def limits(self, most: Sequence[int]) -> list[int]:
        """How deep each row may propose in this round; 0: decode plainly."""
        self.reach, self.why = [1.0] * len(most), ["length" if n == self.settings.depth else "end of answer"
                                                  for n in most]
        if not self.auto:
            return list(most)
        costs = self.costs
        if not costs.frozen and len(costs.plain) < 2:  # the yardstick first
            self.why = ["measuring plain"] * len(most)
            return [0] * len(most)
        pays = len(costs.tokens) < 3 or costs.rate >= costs.plain_rate
        waits = self.left > 0
        if waits:
            self.left -= 1
            self.why = ["does not pay"] * len(most)
        elif not pays:  # this round is the try; the next ones are plain unless it changes the picture
            self.left = costs.wait
        if not costs.frozen:
            costs.left = self.left
        return [0] * len(most) if waits else list(most)

    def proposes(self, row: int, confidence: float) -> bool:
        """Whether the row proposes the token after its prefix, given the draft's largest probability there."""
        if self.threshold:
            if confidence < self.threshold:
                self.why[row] = "confidence"
            return confidence >= self.threshold
        if not self.auto:
            return True
        self.reach[row] *= self.costs.acceptance(confidence)
        return self._worth(row, self.reach[row], self.costs.per_token)

    def reads_on(self, row: int, rows: int) -> bool:
        """Whether another draft forward is worth its time, before its outcome is known."""
        if not self.auto or not self.costs.draft:
            return True
        costs = self.costs
        usual = (sum(costs.kept) + 1) / (sum(costs.tried) + 2)
        return self._worth(row, self.reach[row] * usual, costs.per_token + median(costs.draft) / rows)

    def _worth(self, row: int, gain: float, seconds: float) -> bool:
        costs = self.costs
        rate = max(costs.plain_rate, costs.rate if costs.tokens else 0.0)
        if gain >= rate * seconds:
            return True
        self.why[row] = "not worth its time"
        return False

    def trim(self, proposal: Proposal) -> Proposal:
        """Cut proposals of drafters without a model to what pays; each token is a function of its prefix."""
        if not self.auto or proposal.q is not None or proposal.confidence:
            return proposal
        tokens, parents = [], []
        for row, (ids, above) in enumerate(zip(proposal.tokens, proposal.parents, strict=True)):
            chance: list[float] = []
            worthy: dict[int, int] = {-1: -1}
            for node, parent in enumerate(above):
                chance.append((chance[parent] if parent >= 0 else 1.0) * self.costs.acceptance(_UNKNOWN))
                if parent in worthy and self._worth(row, chance[node], self.costs.per_token):
                    worthy[node] = len(worthy) - 1
            nodes = [node for node in worthy if node >= 0]
            tokens.append([ids[node] for node in nodes])
            parents.append([worthy[above[node]] for node in nodes])
        return Proposal(tokens, parents, None, proposal.source, list(self.why))

    def round_done(self, proposal: Proposal | None, paths: Sequence[Sequence[int]], committed: Sequence[int],
                   seconds: Sequence[float], new: int) -> None:
        """Learn from a round. seconds: of drafting, of the target's forward, of the whole round; new: the longest
        row's tokens in the target's forward."""
        costs = self.costs
        if not self.auto or costs.frozen:
            return
        draft, verify, whole = seconds
        costs.verify[new].append(verify)
        if proposal is None:
            costs.plain.append(whole)
            return
        if proposal.forwards:
            costs.draft.append(draft / proposal.forwards)
        spoke = [row for row, ids in enumerate(proposal.tokens) if ids]
        if not spoke:
            return
        costs.round.append(whole)
        costs.tokens.append(sum(committed[row] for row in spoke) / len(spoke))
        for row in spoke:
            kept = len(paths[row])
            sure = proposal.confidence[row] if proposal.confidence else [_UNKNOWN] * len(proposal.tokens[row])
            for depth, confidence in enumerate(sure[: kept + 1]):
                costs.learn(confidence, depth < kept)
        if len(costs.tokens) >= 3:
            costs.wait = 4 if costs.rate >= costs.plain_rate else min(2 * costs.wait, _LONGEST_WAIT)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.costs = self._costs(len(rows), self.costs)


def read_costs(path: str) -> Costs:
    """Costs frozen by `write_costs`: with them, the same seed gives the same tokens, whatever the clock says."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        costs = Costs(tried=data["tried"], kept=data["kept"], wait=int(data["wait"]), frozen=True)
        for name in ("plain", "round", "tokens", "draft"):
            getattr(costs, name).extend(float(x) for x in data[name])
        for new, values in data["verify"].items():
            costs.verify[int(new)].extend(float(x) for x in values)
        measured = [*costs.plain, *costs.round, *costs.tokens, *costs.draft, *chain(*costs.verify.values())]
        counts = [*costs.tried, *costs.kept, costs.wait]
        # Whatever is divided by or compared later is there, and is a number.
        assert len(costs.tried) == len(costs.kept) == _BUCKETS and costs.plain and all(costs.verify.values())
        assert costs.verify and bool(costs.round) == bool(costs.tokens)
        assert all(0 < x < float("inf") for x in measured) and all(0 <= x < float("inf") for x in counts)
    except OSError as error:
        raise InputError(f"costs file {path!r} cannot be read ({error.strerror}): give one written by "
                         "specbeam.drafting.length.write_costs.") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"costs file {path!r} is not one that specbeam.drafting.length.write_costs wrote.") from None
    return costs


def write_costs(path: str, target: Any, draft: Any = None, drafter: str = "draft_model", vocabulary: str = "same",
                rows: int = 1) -> None:
    """Freeze what `draft_length="auto"` has learned so far about this pair, at this batch size."""
    partner = (drafter, vocabulary, id(draft) if draft is not None else None, rows)
    costs = _known.get(target, {}).get(partner)
    if costs is None or not costs.plain:
        raise InputError(f"nothing was learned yet for drafter={drafter} with {rows} rows: generate with "
                         "draft_length=\"auto\" first.")
    Path(path).write_text(json.dumps({
        **{name: list(getattr(costs, name)) for name in ("plain", "round", "tokens", "draft", "tried", "kept")},
        "verify": {str(new): list(values) for new, values in costs.verify.items()}, "wait": costs.wait}, indent=1),
        encoding="utf-8")
