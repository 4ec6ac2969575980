"""What summary.json claims, from rows made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specbeam.experiment.statistics import baselines, summarise

METHODS = {
    "greedy": {"kind": "greedy"},
    "speculative": {"kind": "speculative", "draft_length": 4},
    "transformers_greedy": {"kind": "transformers_greedy"},
}


def row(method, prompt, rate=10.0, repeat=0, tokens=(5, 6, 7, 8, 9), batch=None, kind=None, turn=0, **other):
    """An answer whose decoding ran at `rate` tokens a second."""
    tokens = list(tokens)
    return {"method": method, "kind": kind or METHODS[method]["kind"], "prompt_id": prompt, "turn": turn,
            "category": None, "repeat": repeat, "batch_id": batch or f"{method}-{prompt}-{turn}-{repeat}",
            "status": "ok", "error": None, "prompt_tokens": 3, "new_tokens": len(tokens), "first_tokens": 1,
            "prefill_seconds": 0.1, "decode_seconds": (len(tokens) - 1) / rate, "draft_seconds": None,
            "verify_seconds": None, "rounds": len(tokens) - 1, "drafted": 0, "accepted": 0,
            "accepted_by_position": [], "finish_reason": "length", "tokens": tokens, "text": "a b", "score": None,
            **other}


def failed(method, prompt, repeat=0, **other):
    blank = dict.fromkeys(row(method, prompt))
    return {**blank, "method": method, "kind": METHODS[method]["kind"], "prompt_id": prompt, "turn": 0,
            "repeat": repeat, "batch_id": f"{method}-{prompt}-{repeat}", "status": "failed", "error": "boom", **other}


def compare(ours, theirs, methods=METHODS):
    """The speed-up of `speculative` over `greedy`."""
    return summarise([*ours, *theirs], methods)["methods"]["speculative"]["speedup"]["greedy"]


def test_a_speed_up_is_the_median_of_ratios_on_the_same_prompts_and_not_a_ratio_of_medians():
    pairs = {"a": (10, 30), "b": (100, 200), "c": (1000, 1000)}
    speedup = compare([row("speculative", p, r[1]) for p, r in pairs.items()],
                      [row("greedy", p, r[0]) for p, r in pairs.items()])
    assert speedup["median"] == pytest.approx(2.0)
    assert speedup["geometric_mean"] == pytest.approx(6 ** (1 / 3))
    assert speedup["low"] == pytest.approx(1.0) and speedup["high"] == pytest.approx(3.0)
    assert speedup["pairs"] == 3 and speedup["left_out"] == 0


def test_repeats_are_aggregated_by_their_median_so_that_one_hiccup_does_not_count():
    ours = [row("speculative", p, rate, repeat) for p in "ab" for repeat, rate in enumerate((20, 20, 0.5))]
    theirs = [row("greedy", p, 10, repeat) for p in "ab" for repeat in range(3)]
    assert compare(ours, theirs)["median"] == pytest.approx(2.0)


def test_the_geometric_mean_has_an_interval_of_its_own():
    pairs = {"a": (10, 30), "b": (100, 200), "c": (1000, 1000), "d": (10, 40)}
    speedup = compare([row("speculative", p, r[1]) for p, r in pairs.items()],
                      [row("greedy", p, r[0]) for p, r in pairs.items()])
    assert speedup["geometric_mean"] == pytest.approx(24 ** 0.25)
    assert 1 <= speedup["geometric_low"] < 24 ** 0.25 < speedup["geometric_high"] <= 4
    assert (speedup["geometric_low"], speedup["geometric_high"]) != (speedup["low"], speedup["high"])


def test_noise_is_the_baseline_against_itself():
    random = np.random.default_rng(0)

    def noise(spread, prompts=30, repeats=3):
        theirs = [row("greedy", str(p), 10 * np.exp(random.normal(0, spread)), repeat)
                  for p in range(prompts) for repeat in range(repeats)]
        ours = [row("speculative", str(p), 20, repeat) for p in range(prompts) for repeat in range(repeats)]
        return compare(ours, theirs)["noise"]
    # of n prompts, the mean of n differences of two normal numbers: 1.96 · spread · √(2 ÷ n)
    assert np.log(noise(0.1)) == pytest.approx(1.96 * 0.1 * (2 / 30) ** 0.5, rel=0.4)
    assert noise(0.0) == pytest.approx(1.0) and noise(0.1, repeats=1) is None


def test_noise_does_not_see_how_prompts_differ():
    theirs = [row("greedy", p, rate, repeat) for p, rate in (("a", 1), ("b", 1000)) for repeat in range(2)]
    assert compare([row("speculative", "a", 2)], theirs)["noise"] == pytest.approx(1.0)


def test_the_first_token_is_timed_apart_from_decoding():
    rows = [row("greedy", p, 10, prefill_seconds=seconds) for p, seconds in (("a", 0.1), ("b", 0.2), ("c", 0.6))]
    figures = summarise(rows, METHODS)["methods"]["greedy"]
    assert figures["first_token_seconds"]["median"] == pytest.approx(0.2)
    assert figures["first_token_seconds"]["low"] == pytest.approx(0.1)
    assert figures["decode_tokens_per_second"] == pytest.approx(10)


def test_phases_are_parts_of_decode_time_and_memory_is_the_most_of_any_row():
    rows = [row("greedy", p, 4 / 2.0, verify_seconds=1.0, accept_seconds=0.5, peak_memory_bytes=size)
            for p, size in (("a", 5), ("b", 9))]
    figures = summarise(rows, METHODS)["methods"]["greedy"]
    assert figures["verify_share"] == pytest.approx(0.5) and figures["accept_share"] == pytest.approx(0.25)
    assert figures["draft_share"] is None and figures["peak_memory_bytes"] == 9


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty():
    random, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(60):
        noise = np.exp(random.normal(0, 0.3, (2, 25)))
        ours = [row("speculative", str(i), 15 * noise[0, i]) for i in range(25)]
        theirs = [row("greedy", str(i), 10 * noise[1, i]) for i in range(25)]
        speedup = compare(ours, theirs)
        covered += np.array([speedup["low"] <= 1.5 <= speedup["high"],
                             speedup["geometric_low"] <= 1.5 <= speedup["geometric_high"]])
    assert np.all(covered >= 52), covered


def test_the_interval_shrinks_with_prompts_and_is_repeatable():
    random = np.random.default_rng(1)

    def width(count):
        noise = np.exp(random.normal(0, 0.3, count))
        ours = [row("speculative", str(i), 15 * noise[i]) for i in range(count)]
        theirs = [row("greedy", str(i), 10) for i in range(count)]
        first = compare(ours, theirs)
        assert first == compare(ours, theirs)
        return first["high"] - first["low"]
    assert width(200) < width(8) / 2


def test_one_prompt_once_has_no_interval_and_one_prompt_repeated_has_the_clocks():
    assert compare([row("speculative", "a", 20)], [row("greedy", "a", 10)]) == {
        "median": 2.0, "low": None, "high": None, "geometric_mean": pytest.approx(2.0), "geometric_low": None,
        "geometric_high": None, "pairs": 1, "units": 1, "left_out": 0, "noise": None}
    ours = [row("speculative", "a", rate, repeat) for repeat, rate in enumerate((18, 22))]
    repeated = compare(ours, [row("greedy", "a", 10, repeat) for repeat in range(2)])
    assert repeated["low"] == pytest.approx(1.8) and repeated["high"] == pytest.approx(2.2)


def test_prompts_of_one_batch_are_one_unit():
    ours = [row("speculative", p, 10, batch="s") for p in "abcd"]
    theirs = [row("greedy", p, 10, batch="g") for p in "abcd"]
    speedup = compare(ours, theirs)
    assert speedup["median"] == 1.0 and speedup["low"] is None and speedup["pairs"] == 4
    assert speedup["units"] == 1


def test_a_batch_is_compared_with_the_same_prompts_run_one_by_one():
    ours = [row("speculative", p, 10, batch="s") for p in "ab"]  # 8 tokens in 0.4 s
    theirs = [row("greedy", "a", 10), row("greedy", "b", 10)]  # 8 tokens in 0.8 s
    assert compare(ours, theirs)["median"] == pytest.approx(2.0)


@pytest.mark.parametrize("side", ["speculative", "greedy"])
def test_a_prompt_that_failed_on_either_side_is_left_out_and_counted(side):
    other = "greedy" if side == "speculative" else "speculative"
    rows = [row("speculative", "a", 20), row("greedy", "a", 10), failed(side, "b"), row(other, "b", 10_000)]
    figures = summarise(rows, METHODS)["methods"]
    speedup = figures["speculative"]["speedup"]["greedy"]
    assert speedup["median"] == 2.0 and speedup["pairs"] == 1 and speedup["left_out"] == 1
    assert figures[side]["failed"] == 1 and figures[side]["prompts"] == 1
    assert figures["speculative"]["identical_to"]["greedy"]["of"] == 1


def test_an_answer_without_decoding_gives_no_pair():
    ours = [row("speculative", "a", 20), row("speculative", "b", 20, tokens=[2], decode_seconds=0.0)]
    theirs = [row("greedy", "a", 10), row("greedy", "b", 10, tokens=[2], decode_seconds=0.0)]
    assert compare(ours, theirs)["pairs"] == 1


def test_a_method_is_never_its_own_baseline_and_absent_labels_are_left_out():
    assert baselines("greedy", METHODS) == ["transformers_greedy"]
    assert baselines("transformers_greedy", METHODS) == ["greedy"]
    assert baselines("speculative", {"speculative": METHODS["speculative"]}) == []
    beams = {"beam": {"kind": "beam"}, "transformers_beam": {"kind": "transformers_beam"}, **METHODS}
    assert baselines("beam", beams) == ["transformers_beam"]
    renamed = {"plain": {"kind": "greedy"}, "speculative": METHODS["speculative"]}
    assert baselines("speculative", renamed) == ["plain"]


def test_sampling_methods_have_speed_ups_only():
    methods = {"sample": {"kind": "sample"}, "warm": {"kind": "speculative", "temperature": 0.8},
               "greedy": {"kind": "greedy"}}
    rows = [row(label, "a", kind=methods[label]["kind"]) for label in methods]
    warm = summarise(rows, methods)["methods"]["warm"]
    assert list(warm["speedup"]) == ["sample"] and warm["identical_to"] == {}


def test_same_tokens_are_counted_prompt_by_prompt_over_all_repeats():
    ours = [row("speculative", p, repeat=r) for p in "abc" for r in range(2)]
    ours[3]["tokens"] = [5, 6, 1, 8, 9]
    rows = ours + [row("greedy", p, repeat=r) for p in "abc" for r in range(2)]
    identity = summarise(rows, METHODS)["methods"]["speculative"]["identical_to"]["greedy"]
    assert (identity["same"], identity["of"]) == (2, 3)
    assert identity["first_difference"] == {"prompt_id": "b", "turn": 0, "repeat": 1, "position": 2}


def test_a_later_turn_counts_only_after_the_same_conversation():
    rows = [row("speculative", "a", tokens=[1]), row("speculative", "a", turn=1, tokens=[7]),
            row("greedy", "a", tokens=[2]), row("greedy", "a", turn=1, tokens=[8])]
    assert summarise(rows, METHODS)["methods"]["speculative"]["identical_to"]["greedy"]["of"] == 1


def test_a_label_with_other_options_is_timed_but_not_expected_to_be_identical():
    methods = {"beam": {"kind": "beam", "num_beams": 4}, "wide": {"kind": "beam", "num_beams": 8}}
    rows = [row(label, "a", kind="beam") for label in methods]
    wide = summarise(rows, methods)["methods"]["wide"]
    assert "beam" in wide["speedup"] and wide["identical_to"] == {}


def test_a_plain_beam_search_commits_one_step_a_round_even_when_it_outlives_its_best_hypothesis():
    rows = [row("beam", "a", kind="beam", rounds=40)]
    assert summarise(rows, {"beam": {"kind": "beam"}})["methods"]["beam"]["mean_accepted_length"] == 1.0


def test_draws_have_no_gap_since_the_second_may_score_more():
    methods = {kind: {"kind": kind} for kind in ("beam", "stochastic_beam")}
    rows = [row(kind, "a", kind=kind, beam_gap=0.5, beam_distinct=[1.0, 0.5]) for kind in methods]
    found = summarise(rows, methods)["methods"]
    assert found["beam"]["beam_gap"] == 0.5 and found["stochastic_beam"]["beam_gap"] is None
    assert found["stochastic_beam"]["beam_distinct_2"] == 0.5


def test_every_label_is_there_and_nothing_is_nan():
    rows = [failed("speculative", "a"), row("greedy", "a", tokens=[2], decode_seconds=0.0)]
    summary = summarise(rows, METHODS)
    assert list(summary["methods"]) == list(METHODS)
    json.dumps(summary, allow_nan=False)
    empty = summary["methods"]["transformers_greedy"]
    assert empty["prompts"] == 0 and empty["decode_tokens_per_second"] is None and empty["mean_accepted_length"] is None
    assert summary["methods"]["speculative"]["failed"] == 1
