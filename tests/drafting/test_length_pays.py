"""Does `draft_length=auto` pay? Whole answers in a simulated world: seconds are given, nothing is timed.

A plain round of one row takes a second, of each row more 0.05; a draft forward 0.22, of each row more 0.01; a token
more in the target's forward 0.05. The draft is right as often as its confidence says, and that is the text's.
"""

from __future__ import annotations

from random import Random

import pytest

from specbeam.drafting import Proposal, Settings
from specbeam.drafting.length import Length

NEW = 27  # tokens of an answer behind the first


class Pair:
    """Stands for a model; costs are remembered per object."""


def answer(length: Length | int, rows: int, sure: list[float], random: Random, slow: float = 1.0) -> float:
    """Seconds of a batch. sure: the confidences of this text, of which each token has one. slow: by how much everything
    is slower than it should be."""
    left, seconds = [NEW] * rows, 0.0
    auto = isinstance(length, Length)
    while left:
        count = len(left)
        target, draft = 0.95 + 0.05 * count, 0.21 + 0.01 * count
        limits = [min(8 if auto else length, one - 1) for one in left]
        limits = length.limits(limits, left) if auto else limits
        drafting, proposal, right, width = 0.0, None, [0] * count, 0
        if max(limits):
            wanted, failed = [limit > 0 for limit in limits], [False] * count
            confidence: list[list[float]] = [[] for _ in left]
            for depth in range(max(limits)):
                drafting += draft
                drawn = [random.choice(sure) for _ in left]
                wanted = length.proposes(wanted, drawn) if auto else wanted
                if not any(wanted):
                    break
                width = depth + 1
                for row in range(count):
                    if wanted[row]:
                        confidence[row].append(drawn[row])
                        failed[row] |= random.random() >= drawn[row]
                        right[row] += not failed[row]
                wanted = [here and depth + 1 < limit for here, limit in zip(wanted, limits, strict=True)]
                wanted = length.reads_on(wanted) if auto else wanted
                if not any(wanted):
                    break
            tokens = [[7] * len(some) for some in confidence]
            parents = [list(range(-1, len(ids) - 1)) for ids in tokens]
            proposal = Proposal(tokens, parents, None, ["draft_model"] * count, [""] * count, confidence,
                                round(drafting / draft))
        verify = target + 0.05 * count * width
        times = [slow * one * random.uniform(0.95, 1.05) for one in (drafting, verify)]
        seconds += sum(times)
        after = [one - kept - 1 for one, kept in zip(left, right, strict=True)]
        if auto:
            length.round_done(proposal, [range(kept) for kept in right], [kept + 1 for kept in right],
                              [*times, sum(times)], 1 + width)
        left = [one for one in after if one > 0]
    if auto:
        length.ends()
    return seconds


TEXTS = {"easy": [0.99, 0.95, 0.9, 0.7], "mixed": [0.95, 0.8, 0.5, 0.3], "hard": [0.6, 0.4, 0.3, 0.2],
         "hopeless": [0.01, 0.001]}


def seconds(rows: int, texts: list[str], length: int | str, seed: int = 0, slow: float = 1.0) -> float:
    """Of one answer after the other, by one pair; the first six are the warm-up, and may be slower."""
    random, pair, total = Random(seed), (Pair(), Pair()), 0.0
    for number, text in enumerate([*texts[:6], *texts]):
        chosen = Length(Settings(draft_length="auto"), *pair, rows, NEW + 1) if length == "auto" else length
        took = answer(chosen, rows, TEXTS[text], random, slow if number < 6 else 1.0)
        total += took if number >= 6 else 0.0
    return total


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("text", TEXTS)
def test_auto_is_not_slower_than_plain_rounds_nor_than_the_best_fixed_length(text, rows):
    texts = [text] * 30
    plain, auto = seconds(rows, texts, 0), seconds(rows, texts, "auto")
    fixed = {length: seconds(rows, texts, length) for length in (1, 2, 4, 8)}
    assert auto < plain / 0.98
    assert auto < min(fixed.values()) / (0.98 if rows == 1 else 0.93), (plain, auto, fixed)


def test_texts_that_change_cost_little_and_bring_most_of_what_they_can():
    texts = ["easy", "hopeless", "mixed", "hard", "hopeless", "easy"] * 8
    plain, auto = seconds(1, texts, 0), seconds(1, texts, "auto")
    assert auto < 0.9 * plain and auto < min(seconds(1, texts, length) for length in (1, 2, 4, 8))


def test_a_slow_warm_up_is_forgotten():
    """As when another program runs beside the first prompts."""
    slow, usual = (sum(seconds(1, ["easy"] * 30, "auto", seed, one) for seed in range(4)) for one in (3.0, 1.0))
    assert slow < 1.04 * usual


def test_the_harness_sees_an_auto_that_never_stops(monkeypatch):
    """The negative control."""
    monkeypatch.setattr(Length, "_worth", lambda self, wanted, gains, cost: list(wanted))
    monkeypatch.setattr(Length, "idle", False)
    assert seconds(1, ["hard"] * 30, "auto") > seconds(1, ["hard"] * 30, 0) / 0.98
