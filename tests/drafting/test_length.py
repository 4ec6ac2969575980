"""How long a proposal is: decisions from given seconds and acceptances, and the file that freezes them."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import torch

from specbeam.drafting import Proposal, Settings, length
from specbeam.drafting.length import Length, Prices, read_costs, write_costs
from specbeam.errors import InputError


class Pair:
    """Stands for a model; costs are remembered per object."""


@pytest.fixture
def target():
    return Pair()


@pytest.fixture
def draft():
    return Pair()


def auto(target, draft, rows=1, **settings):
    return Length(Settings(draft_length="auto", **settings), target, draft, rows)


def proposal(tokens: int, rows: int = 1, confidence: float = 0.9) -> Proposal:
    return Proposal([[7] * tokens] * rows, [list(range(-1, tokens - 1))] * rows, None, ["draft_model"] * rows,
                    [""] * rows, [[confidence] * tokens] * rows, forwards=tokens)


def plain_rounds(chosen: Length, count: int = 3, seconds: float = 1.0) -> None:
    for _ in range(count):
        chosen.round_done(None, [[]], [1], [0.0, seconds, seconds], 1)


def drafted_rounds(chosen: Length, kept: int, of: int, seconds: float, count: int = 6, draft_seconds: float = 0.1,
                   confidence: float = 0.9) -> None:
    for _ in range(count):
        chosen.round_done(proposal(of, confidence=confidence), [list(range(kept))], [kept + 1],
                          [draft_seconds * of, seconds - draft_seconds * of, seconds], of + 1)


def columns(chosen: Length, seconds: float, rows: int = 1) -> None:
    """The target's forwards are known: a token of every row takes so many plain rounds more."""
    for _ in range(15):
        for new in (1, 2, 3, 5):
            chosen.costs.forward(rows, new, False, 1 + (new - 1) * seconds)


def test_a_fixed_length_is_always_proposed(target, draft):
    fixed = Length(Settings(draft_length=5), target, draft, 3)
    assert fixed.fixed
    assert fixed.limits([5, 2, 0]) == [5, 2, 0]
    assert fixed.why == ["length", "end of answer", "end of answer"]
    assert fixed.proposes([True] * 3, [0.0] * 3) == fixed.reads_on([True] * 3) == [True] * 3


def test_a_threshold_stops_where_the_draft_is_less_sure(target, draft):
    sure = Length(Settings(draft_length=5, confidence_threshold=0.4), target, draft, 2)
    sure.limits([5, 5])
    assert sure.proposes([True, True], [0.4, 0.39]) == [True, False]
    assert sure.why == ["length", "confidence"]


def test_auto_measures_plain_rounds_first(target, draft):
    chosen = auto(target, draft)
    for _ in range(2):
        assert chosen.limits([8]) == [0] and chosen.why == ["measuring plain"]
        plain_rounds(chosen, 1)
    assert chosen.limits([8]) == [2], "what a longer forward costs is not known yet"
    drafted_rounds(chosen, kept=2, of=2, seconds=1.1, count=3)
    assert chosen.limits([8]) == [8]


def test_auto_goes_on_where_rounds_with_proposals_are_faster(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    drafted_rounds(chosen, kept=3, of=4, seconds=1.5)
    assert [chosen.limits([8]) for _ in range(20)] == [[8]] * 20


def tries(chosen: Length, rounds: int, kept: int, of: int, seconds: float) -> list[int]:
    """How many plain rounds stood before each one with proposals."""
    waits, wait = [], 0
    for _ in range(rounds):
        if chosen.limits([8])[0]:
            waits.append(wait)
            wait = 0
            drafted_rounds(chosen, kept, of, seconds, count=1)
        else:
            wait += 1
            plain_rounds(chosen, 1)
    return waits


def test_auto_falls_back_to_plain_rounds_and_tries_again_ever_later(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    waits = tries(chosen, 4000, kept=0, of=4, seconds=1.5)
    assert waits[:18] == [0] * 14 + [12, 36, 64, 64], "a round loses half a plain one: fourteen use the credit up"
    assert waits[18:40] == [64] * 21 + [192], "and one that of a try: after 24 it is hardly worth another"
    assert set(waits[40:]) == {256}


@pytest.mark.parametrize("seconds", [1.2, 1.5, 2.0])
def test_what_never_pays_costs_a_few_rounds_and_then_at_most_two_in_a_hundred(target, draft, seconds):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    lost = [len(tries(chosen, rounds, kept=0, of=4, seconds=seconds)) * (seconds - 1) for rounds in (300, 3000)]
    assert lost[0] < 20 and lost[1] < 0.02 * 3000


def test_looking_up_in_vain_is_given_up_too(target):
    chosen = Length(Settings(drafter="suffix", draft_length="auto"), target, None, 1)
    plain_rounds(chosen)
    nothing = Proposal([[]], [[]], None, ["suffix"], [""], [[]])
    rounds = 0
    while chosen.limits([8])[0] or chosen.why == ["measuring plain"]:
        rounds += 1
        chosen.round_done(None if chosen.why == ["measuring plain"] else nothing, [[]], [1], [0.02, 1.0, 1.0], 1)
    assert chosen.why == ["does not pay"] and 300 < rounds < 400, "two hundredths a round, of a credit of seven"


def test_a_single_slow_round_is_not_held_against_proposals(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    drafted_rounds(chosen, kept=2, of=4, seconds=1.5)
    drafted_rounds(chosen, kept=2, of=4, seconds=90.0, count=1)
    assert chosen.limits([8]) == [8]


def test_a_forward_that_was_slow_once_is_no_yardstick(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    columns(chosen, 0.1)
    chosen.round_done(proposal(8), [[0, 1, 2]], [4], [0.4, 90.0, 90.4], 9)
    assert chosen.costs.prices(1).token == pytest.approx(0.1, rel=0.1)


def test_what_seemed_too_dear_is_measured_again_some_day(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    for _ in range(15):
        chosen.costs.forward(1, 9, False, 90.0)
    for _ in range(3000):
        if chosen.limits([8])[0] and chosen.proposes([True], [0.9])[0]:
            return
        declined = proposal(0) if chosen.why == ["not worth its time"] else None
        chosen.round_done(replace(declined, forwards=1) if declined else None, [[]], [1], [0.1, 1.0, 1.0], 1)
    raise AssertionError("never again")


def test_drafting_that_was_slow_for_a_while_comes_back(target, draft):
    """As when another program ran beside the first prompts."""
    chosen = auto(target, draft)
    plain_rounds(chosen)
    tries(chosen, 30, kept=3, of=4, seconds=40.0)
    assert chosen.limits([8]) == [0]
    waits = tries(chosen, 3000, kept=3, of=4, seconds=1.5)
    assert len(waits) > 2500


def test_plain_rounds_are_measured_again_now_and_then(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    waits = tries(chosen, 400, kept=4, of=4, seconds=1.5)
    assert [place for place, wait in enumerate(waits) if wait] == [32, 96, 224, 352]


def test_auto_comes_back_when_a_try_succeeds(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    drafted_rounds(chosen, kept=0, of=4, seconds=1.5, count=3)
    chosen.limits([8])
    drafted_rounds(chosen, kept=4, of=4, seconds=1.5, count=15)
    while chosen.limits([8]) == [0]:
        pass
    assert [chosen.limits([8]) for _ in range(20)] == [[8]] * 20


def test_auto_stops_where_the_chance_of_the_whole_prefix_is_below_its_cost(target, draft):
    """A token in the target's forward costs 0.25 plain rounds: worth it as long as P(all accepted) is above that."""
    chosen = auto(target, draft)
    plain_rounds(chosen)
    columns(chosen, 0.25)
    chosen.limits([8])
    assert [chosen.proposes([True], [0.6])[0] for _ in range(4)] == [True, True, False, False]  # 0.6, 0.36, 0.216
    assert chosen.why == ["not worth its time"]


def test_auto_asks_more_of_a_token_that_takes_the_target_past_a_step(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    chosen.limits([8])
    chosen.prices = Prices(token=0.05, steps=((2, 0.4),))
    assert [chosen.proposes([True], [0.9])[0] for _ in range(4)] == [True] * 4
    chosen.limits([8])
    chosen.prices = Prices(token=0.05, steps=((2, 0.4),))
    assert [chosen.proposes([True], [0.6])[0] for _ in range(2)] == [True, False]


def test_a_token_within_the_width_that_the_runner_keeps_costs_nothing(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    chosen.limits([8])
    chosen.prices, chosen.wide = Prices(token=0.5, change=1.0), 3
    assert [chosen.proposes([True], [0.7])[0] for _ in range(3)] == [True, True, False], "the last text's token is read"


def test_the_width_of_a_prompt_is_not_kept(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    chosen.limits([8])
    chosen.prices, chosen.wide, chosen.fresh = Prices(token=0.5, change=1.0), 1055, True
    assert [chosen.proposes([True], [0.7])[0] for _ in range(2)] == [True, False]
    chosen.fresh = False
    chosen.limits([8])
    assert all(chosen.proposes([True], [0.7])[0] for _ in range(8))


@pytest.mark.parametrize("usual, deepest", [(0.5, 3), (0.9, 3), (0.99, 8)])
def test_proposals_end_before_a_step_unless_nearly_all_is_right(target, draft, usual, deepest):
    """Three tokens take 1 + 3 · 0.2 plain rounds, eight 1 + 8 · 0.2 + 0.8."""
    chosen = auto(target, draft)
    plain_rounds(chosen)
    chosen.prices, chosen.learned.usual = Prices(draft=0.1, token=0.1, steps=((4, 0.8), (16, 0.0))), usual
    assert chosen._deepest() == deepest
    chosen.prices = Prices(draft=0.2, token=0.1, steps=((4, 0.0),))
    assert chosen._deepest() == 8, "there is no step"


def test_another_depth_must_promise_more_than_luck(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    chosen.prices = Prices(draft=0.05, token=0.05, steps=((4, 0.4), (16, 0.0)))
    # Eight in place of three would be 0.87, 1.18, 1.33, 1.18, and 0.67 times as fast.
    for usual, deepest in [(0.8, 3), (0.95, 3), (0.999, 8), (0.95, 8), (0.6, 3)]:
        chosen.learned.usual = usual
        assert chosen._deepest() == deepest


def test_auto_believes_what_was_accepted_more_than_what_the_draft_thinks(target, draft):
    chosen = auto(target, draft)
    for _ in range(100):
        chosen.learned.learn(0.95, False)
    assert chosen.learned.acceptance(0.95) < 0.05
    assert chosen.learned.acceptance(0.55) == pytest.approx(0.55), "nothing is known of other confidences"


def test_what_was_accepted_long_ago_is_forgotten(target, draft):
    chosen = auto(target, draft)
    for _ in range(50):
        chosen.learned.learn(0.95, False)
    plain_rounds(chosen)
    drafted_rounds(chosen, kept=0, of=0, seconds=1.0, count=1200)
    assert chosen.learned.acceptance(0.95) > 0.8


def test_auto_reads_on_only_when_a_draft_forward_is_worth_its_time(target, draft):
    chosen = auto(target, draft, rows=4)
    columns(chosen, 0.0, rows=4)
    chosen.costs.drafted(4, 1, 0.8)
    chosen.costs.hear()
    for _ in range(40):
        chosen.learned.learn(0.95, True)
    chosen.limits([8] * 4)
    chosen.proposes([True] * 4, [1.0] * 4)
    assert not any(chosen.reads_on([True, False, True, True])), "all four rows wait for it"
    assert all(chosen.reads_on([True] * 4))


def test_a_column_that_all_rows_pay_for_must_be_worth_it_for_all_together(target, draft):
    chosen = auto(target, draft, rows=4)
    columns(chosen, 0.25, rows=4)
    chosen.limits([8] * 4)
    assert chosen.proposes([True] * 4, [0.9, 0.0, 0.1, 0.1]) == [True] * 4, "1.1 tokens for one"
    chosen.limits([8] * 4)
    assert chosen.proposes([True, False, False, False], [0.9] * 4) == [False] * 4, "0.9 tokens for one"
    assert chosen.why == ["not worth its time", "length", "length", "length"]


def test_what_a_round_taught_is_by_confidence_and_ends_at_the_first_rejection(target, draft):
    chosen = auto(target, draft)
    chosen.round_done(proposal(4, confidence=0.85), [[0, 1]], [3], [0.4, 1.0, 1.5], 5)
    assert (chosen.learned.tried[8], chosen.learned.kept[8]) == (3, 2)
    assert chosen.costs.drafting(1) == pytest.approx((0.1, 0.1))
    assert [tokens for tokens, _ in chosen.costs.gained] == [3]


@pytest.mark.parametrize("left", [2, 0])
def test_what_was_cut_from_a_proposal_teaches_nothing(target, draft, left):
    chosen = auto(target, draft)
    cut = replace(proposal(8, confidence=0.85), tokens=[[7] * left], parents=[list(range(-1, left - 1))])
    chosen.round_done(cut, [list(range(left))], [left + 1], [0.4, 1.0, 1.5], left + 1)
    assert (chosen.learned.tried[8], chosen.learned.kept[8]) == (left, left)


def test_what_was_learned_stays_with_the_pair_from_prompt_to_prompt(target, draft):
    learned(target, draft)
    assert auto(target, draft).limits([8]) == [8]
    assert auto(target, Pair()).limits([8]) == [0], "another draft is another pair"
    assert auto(target, draft, rows=2).limits([8, 8]) == [0, 0], "of twice as many rows plain rounds are measured"


def test_what_is_accepted_is_the_same_in_every_batch_size(target, draft):
    learned(target, draft)
    assert auto(target, draft, rows=5).learned is auto(target, draft).learned


def test_what_was_seen_at_a_short_context_is_a_first_guess_at_a_long_one(target, draft):
    learned(target, draft)
    short, long = (Length(Settings(draft_length="auto"), target, draft, 1, context=n) for n in (200, 900))
    assert short.limits([8]) == [8] and short.why == ["length"]
    assert long.limits([8]) == [0] and long.why == ["measuring plain"]
    assert long.costs.seconds(1, 5) == pytest.approx(short.costs.seconds(1, 5), rel=0.1)
    assert long.learned.acceptance(0.9) > 0.55 and long.learned.tried[9] == short.learned.tried[9] / 4
    plain_rounds(long, 20, seconds=3.0)
    assert long.costs.plain(1) > 2 > short.costs.plain(1)


def test_a_pause_that_would_end_within_an_answer_ends_at_its_beginning(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    tries(chosen, 200, kept=0, of=4, seconds=1.5)
    chosen.learned.left = 40
    assert Length(Settings(draft_length="auto"), target, draft, 1, room=39).idle
    assert not Length(Settings(draft_length="auto"), target, draft, 1, room=40).idle


def test_rows_that_gain_unequally_end_later_than_their_mean(target, draft):
    """All rows are in a forward until the last one ends; not where others take their places."""
    gains = {}
    for name, left in (("alike", [8] * 4), ("last is behind", [4, 4, 4, 8]), ("replaced", [])):
        chosen = Length(Settings(draft_length="auto"), target, Pair(), 4, 8)
        columns(chosen, 0.0, rows=4)
        before = chosen.learned.credit = 0.5
        chosen.limits([1] * 4, left)
        chosen.round_done(proposal(1, rows=4), [[0], [0], [0], []], [2, 2, 2, 1], [0.0, 1.0, 1.0], 2)
        gains[name] = chosen.learned.credit - before
    assert gains["replaced"] == pytest.approx(0.75, abs=0.05), "tokens of the mean row"
    assert gains["last is behind"] == pytest.approx(0.0, abs=0.1), "those of the last one"
    assert gains["last is behind"] + 0.2 < gains["alike"] < gains["replaced"] - 0.1


def test_a_token_of_a_row_that_will_end_before_the_others_is_worth_little(target, draft):
    chosen = Length(Settings(draft_length="auto"), target, draft, 2, 32)
    columns(chosen, 0.25, rows=2)
    for wanted in ([True, False], [False, True]):
        chosen.limits([8, 8], [9, 20])
        assert chosen.proposes(wanted, [0.9, 0.9]) == [False, wanted[1]]


def test_what_was_learned_goes_with_the_draft(target):
    """Another one may come to lie where the first one lay."""
    for _ in range(20):
        plain_rounds(auto(target, Pair()))
        assert auto(target, Pair()).limits([8]) == [0]
    gc.collect()
    assert not length._known[target]


def test_proposals_without_a_model_are_cut_to_what_pays_and_stay_trees(target):
    chosen = Length(Settings(drafter="suffix", draft_length="auto"), target, None, 1)
    columns(chosen, 0.24)
    chosen.limits([8])
    tree = Proposal([[5, 6, 7, 8]], [[-1, 0, 1, 0]], None, ["suffix"], [""])
    cut = chosen.trim(tree)
    assert (cut.tokens, cut.parents) == ([[5, 6, 8]], [[-1, 0, 0]]), "0.5, then 0.25 twice; 0.125 is too little"


def test_a_drawn_proposal_is_never_cut(target, draft):
    chosen = auto(target, draft)
    columns(chosen, 2.0)
    chosen.limits([8])
    drawn = Proposal([[5, 6]], [[-1, 0]], torch.ones(1, 2, 9), ["draft_model"], [""])
    assert chosen.trim(drawn) is drawn


# The file.

def learned(target, draft):
    chosen = auto(target, draft)
    plain_rounds(chosen)
    drafted_rounds(chosen, kept=2, of=4, seconds=1.3)
    return chosen


def test_costs_come_back_as_they_were_written_and_learn_no_more(target, draft, tmp_path):
    file = str(tmp_path / "costs.json")
    before = learned(target, draft)
    write_costs(file, target, draft)
    now, prices = read_costs(file)
    assert prices == before.costs.prices(1)
    chosen = auto(target, draft, costs=file)
    drafted_rounds(chosen, kept=0, of=4, seconds=9.0)
    assert (chosen.prices, chosen.learned) == (prices, now)
    assert (now.tried, now.kept, now.usual) == (before.learned.tried, before.learned.kept, before.learned.usual)


def test_frozen_costs_decide_the_same_every_time(target, draft, tmp_path):
    file = str(tmp_path / "costs.json")
    learned(target, draft)
    write_costs(file, target, draft)

    def decisions():
        chosen = auto(Pair(), Pair(), costs=file, rows=2)
        found = []
        for turn in range(30):
            found.append(chosen.limits([8, 3]))
            found.append(chosen.proposes([True, True], [0.1 * (turn % 9), 0.9]))
            found.append(chosen.reads_on([True, True]))
        return found

    assert decisions() == decisions()


def test_with_frozen_costs_a_row_decides_as_it_would_alone(target, draft, tmp_path):
    file = str(tmp_path / "costs.json")
    columns(learned(target, draft), 0.1)
    write_costs(file, target, draft)

    def decisions(confidences):
        chosen = auto(Pair(), Pair(), costs=file, rows=len(confidences))
        rows = [True] * len(confidences)
        chosen.limits([8] * len(rows))
        return list(zip(chosen.proposes(rows, confidences), chosen.reads_on(rows), strict=True))

    alone = [decisions([confidence])[0] for confidence in (0.05, 0.4, 0.95)]
    assert decisions([0.05, 0.4, 0.95]) == alone
    assert len(set(alone)) > 1


def test_there_is_nothing_to_freeze_before_anything_was_learned(target, draft, tmp_path):
    auto(target, draft)  # chosen for, but no round was run
    with pytest.raises(InputError, match=r"nothing was learned yet for drafter=draft_model with 1 rows"):
        write_costs(str(tmp_path / "x.json"), target, draft)


GOOD = {"prices": {"draft": 0.2, "token": 0.1, "rate": 1.2}, "tried": [0] * 10, "kept": [0] * 10, "usual": 0.5}


@pytest.mark.parametrize("text", [
    "not json", "[]", "{}", "\udcff", *(json.dumps(GOOD | wrong) for wrong in (
        {"tried": [0] * 9}, {"tried": ["x"] * 10}, {"kept": None}, {"kept": [-1] * 10}, {"usual": "x"},
        {"usual": None}, {"prices": []}, {"prices": {"draft": 0.2, "cost": 1}}, {"prices": {"draft": float("nan")}},
        {"prices": {"draft": -1.0}}, {"prices": {"token": "x"}},
        {"prices": {"steps": 4}}, {"prices": {"steps": [[4]]}},
        {"prices": {"steps": [[2.5, 0.5]]}}, {"prices": {"steps": [[4, -0.1]]}}))])
def test_a_file_that_is_no_costs_file_is_refused_in_one_sentence(tmp_path, text):
    file = tmp_path / "costs.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"is not one that specbeam\.drafting\.length\.write_costs wrote") as error:
        read_costs(str(file))
    assert "\n" not in str(error.value)


def test_a_good_file_is_read(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(GOOD))
    assert read_costs(str(file))[1] == Prices(0.2, 0.1, 1.2)
    file.write_text(json.dumps(GOOD | {"prices": {"draft": 0.2, "steps": [[4, 0.3]]}}))
    assert read_costs(str(file))[1] == Prices(0.2, steps=((4, 0.3),))


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, name):
    with pytest.raises(InputError, match=r"costs file .* cannot be read \("):
        read_costs(str(tmp_path / name))


def test_a_padded_forward_is_no_measure_of_a_plain_round(target, draft):
    """A runner may keep the last width where nothing is proposed, as behind the last token of an answer."""
    chosen = auto(target, draft)
    plain_rounds(chosen)
    before, chosen.costs.unchecked = chosen.costs.plain(1), 10
    for _ in range(5):
        chosen.round_done(None, [[]], [1], [0.0, 1.5, 1.5], 9)
    assert chosen.costs.plain(1) == pytest.approx(before, rel=0.05) and chosen.costs.unchecked == 10
