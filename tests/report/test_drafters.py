"""Proposals by other drafters than a model, and trees: named, coloured, and counted for what they are."""

from __future__ import annotations

import io
import json

import pytest
from fake_run import write_run
from rich.console import Console

from specbeam.report.build import write_report
from specbeam.report.outputs import tokens_data
from specbeam.report.terminal import footnotes, print_table


def trace(**changes):
    """Prefill, a round of a chain that was rejected after its first token, and a round of a tree."""
    chain = {"drafted": 2, "accepted": 1, "committed": 2, "seconds": .01, "proposed": [11, 98], "drafter": "suffix",
             "proposed_pieces": [" b", " no\n"], "parents": [-1, 0], "why": "match length"}
    tree = {"drafted": 4, "accepted": 1, "committed": 2, "seconds": .02, "proposed": [13, 97, 96, 95],
            "proposed_pieces": [" d", " x", " y", " z"], "parents": [-1, -1, 0, 0], "drafter": "suffix", "why": ""}
    return {"method": "suffix", "kind": "speculative", "prompt_id": "1", "turn": 0, "tokens": [10, 11, 12, 13, 14],
            "pieces": [" a", " b", " c", " d", " e"], "token_rounds": [0, 1, 1, 2, 2], "rounds": [chain, tree],
            "sources": ["plain", "suffix", "correction", "suffix", "correction"], **changes}


def test_another_drafters_tokens_have_a_letter_and_a_name_of_their_own():
    other = trace(method="lookup", sources=["plain", "prompt_lookup", "correction", "draft", "bonus"])
    data = tokens_data([trace(), other], {})
    suffix, lookup = (answer["sources"] for answer in data["prompts"][0]["answers"])
    assert suffix == "pecec" and lookup == "pfcdb"
    assert (data["sources"]["e"], data["sources"]["f"]) == ("suffix", "prompt_lookup")


def test_what_was_rejected_is_the_rest_of_a_chain_and_of_a_tree_what_stood_in_the_corrections_place():
    steps = tokens_data([trace()], {})["prompts"][0]["answers"][0]["steps"]
    assert steps == [[2, 1, 10.0, [" no↵"], 0, "match length"], [4, 1, 20.0, [" y", " z"], 1, ""]]


def test_a_method_of_which_nothing_was_accepted_has_speculated_all_the_same():
    rejected = trace(sources=["plain", *["correction"] * 4])
    assert "steps" in tokens_data([rejected], {})["prompts"][0]["answers"][0]


def test_more_drafters_than_colours_share_the_last_one():
    traces = [trace(sources=["plain", f"drafter_{n}", "bonus", "plain", "plain"]) for n in range(9)]
    assert set("".join(answer["sources"] for answer in tokens_data(traces, {})["prompts"][0]["answers"])) == set(
        "pbefghijk")


def test_the_legend_names_every_drafter_of_the_run(tmp_path):
    folder = write_run(tmp_path)
    with (folder / "trace.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(trace(prompt_id="prompt-0", sources=["plain", *["a <new> one"] * 4])) + "\n")
    text = write_report(folder).read_text("utf-8")
    assert '<span class="t d">drafted and accepted</span>' in text
    assert '<span class="t e">proposed by a &lt;new&gt; one</span>' in text


@pytest.fixture
def summary(tmp_path):
    return json.loads((write_run(tmp_path) / "summary.json").read_text("utf-8"))


def printed(summary, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    print_table(summary, console)
    return console.file.getvalue()


def test_the_table_says_where_the_time_went_where_there_is_room(summary):
    figures = summary["methods"]["speculative"]
    figures.update(draft_share=.31, verify_share=.6, accept_share=.01)
    assert "31/60/1/8 %" in printed(summary, 150) and "31/60/1/8 %" not in printed(summary, 100)


def test_trees_lossy_acceptance_and_few_prompts_are_noted(summary):
    assert not any("tree" in note or "lossy" in note for note in footnotes(summary))
    assert any("rest on 4 prompts only" in note for note in footnotes(summary))
    summary["methods"]["speculative"].update(trees=True, lossy=True)
    assert any("trees (speculative): per drafted node" in note for note in footnotes(summary))
    assert any(note.startswith("speculative: typical acceptance is lossy") for note in footnotes(summary))


def test_many_methods_have_their_acceptance_in_a_table(tmp_path, summary):
    from specbeam.report.charts import acceptance

    figures = summary["methods"]["speculative"]
    assert "<svg" in acceptance({f"m{n}": figures for n in range(6)})
    table = acceptance({f"m{n}": figures for n in range(7)})
    assert "<svg" not in table and table.count("<tr>") == 8


def test_a_chart_of_equal_qualities_is_left_out(summary):
    from specbeam.report.charts import speed_against_quality

    assert speed_against_quality(summary["methods"], "bleu", "BLEU", "higher is better")
    for figures in summary["methods"].values():
        figures["bleu"] = 20.0
    assert not speed_against_quality(summary["methods"], "bleu", "BLEU", "higher is better")
