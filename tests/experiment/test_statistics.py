"""What summary.json claims, from rows made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tiny import prompts as token_rows
from tiny import tiny_model

from specbeam.experiment.statistics import add_quality, baselines, summarise

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


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty():
    random, covered = np.random.default_rng(0), 0
    for _ in range(60):
        noise = np.exp(random.normal(0, 0.3, (2, 25)))
        ours = [row("speculative", str(i), 15 * noise[0, i]) for i in range(25)]
        theirs = [row("greedy", str(i), 10 * noise[1, i]) for i in range(25)]
        speedup = compare(ours, theirs)
        covered += speedup["low"] <= 1.5 <= speedup["high"]
    assert 52 <= covered <= 60


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
        "median": 2.0, "low": None, "high": None, "geometric_mean": pytest.approx(2.0), "pairs": 1, "units": 1,
        "left_out": 0}
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


def test_every_label_is_there_and_nothing_is_nan():
    rows = [failed("speculative", "a"), row("greedy", "a", tokens=[2], decode_seconds=0.0)]
    summary = summarise(rows, METHODS)
    assert list(summary["methods"]) == list(METHODS)
    json.dumps(summary, allow_nan=False)
    empty = summary["methods"]["transformers_greedy"]
    assert empty["prompts"] == 0 and empty["decode_tokens_per_second"] is None and empty["mean_accepted_length"] is None
    assert summary["methods"]["speculative"]["failed"] == 1


def test_quality_is_that_of_the_first_repeat_that_succeeded_and_equal_answers_are_scored_once(monkeypatch):
    target, [context, answer, other] = tiny_model("llama"), [r.tolist() for r in token_rows((5, 4, 4))]
    rows = [failed("greedy", "a"), row("greedy", "a", repeat=1, tokens=answer, text="The cat sat on the mat."),
            row("speculative", "a", tokens=answer, text="The cat sat on the mat."),
            row("transformers_greedy", "a", tokens=other, text="No.")]
    read = {(m, "a", 0): {"input_ids": context, "text": "", "references": ["The cat sat on the mat."]} for m in METHODS}
    from specbeam.metrics import likelihood
    scored = []
    honest = likelihood.answer_log_probabilities
    monkeypatch.setattr(likelihood, "answer_log_probabilities", lambda model, contexts, answers: (
        scored.append(len(answers)), honest(model, contexts, answers))[1])
    quality = add_quality(rows, read, target, None, METHODS)
    assert scored == [2]
    assert quality["greedy"]["perplexity"] == quality["speculative"]["perplexity"]
    [logs] = honest(target, [context], [answer])
    assert quality["greedy"]["perplexity"] == pytest.approx(math.exp(-sum(logs) / 4))
    assert quality["greedy"]["bleu"] == pytest.approx(100) and quality["greedy"]["bleu_signature"]
    assert quality["transformers_greedy"]["bleu"] < 10
    gap = quality["transformers_greedy"]["logit_gaps"]["greedy"]
    assert gap["differences"] == 1 and gap["largest"] > 0
    assert quality["speculative"]["logit_gaps"] == {"transformers_greedy": gap}


def test_quality_without_references_or_rows_is_none():
    read = {("greedy", "a", 0): {"input_ids": [5, 6], "text": "", "references": []}}
    quality = add_quality([row("greedy", "a"), failed("speculative", "a")], read, tiny_model("llama"), None, METHODS)
    assert quality["greedy"]["bleu"] is None and quality["greedy"]["perplexity"] > 0
    assert quality["speculative"]["perplexity"] is None
