"""The table in the terminal: complete, and never wider than it."""

from __future__ import annotations

import io
import json

import pytest
from fake_run import write_run
from rich.console import Console

from specbeam.report.answer import answers
from specbeam.report.terminal import print_table


@pytest.fixture
def summary(tmp_path):
    return json.loads((write_run(tmp_path) / "summary.json").read_text("utf-8"))


def printed(summary, width=120, terminal=True):
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, color_system=None)
    print_table(summary, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [120, 101])
def test_every_figure_is_shown_and_no_line_is_too_long(summary, width):
    text = printed(summary, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    line = next(line for line in text.splitlines() if line.startswith("speculative"))
    for figure in ("21.9", "3.07", "4/4", f"{summary['methods']['speculative']['acceptance_rate']:.0%}"):
        assert figure in line
    assert ("–" in line.replace(" – ", "")) == (width == 120), "intervals are shown where there is room"


def test_a_pipe_has_no_edge(summary):
    assert "…" not in printed(summary, width=80, terminal=False)


def test_a_method_that_differs_says_where(summary):
    assert "transformers_assisted differs from greedy and transformers_greedy in 1 of 4 answers" in " ".join(
        printed(summary).split())


def test_notes_of_the_run_are_printed_and_markup_in_labels_is_text(summary):
    summary["notes"] = ["load average was 3.1 on 2 cores: [bold]timings[/] are not to be trusted"]
    summary["methods"]["[red]x[/nope]"] = summary["methods"]["greedy"]
    text = printed(summary, 140)
    assert "[bold]timings[/] are not to be trusted" in text and "[red]x[/nope]" in text


def test_columns_without_a_figure_are_left_out(summary):
    for figures in summary["methods"].values():
        figures["bleu"] = None
    assert "BLEU" not in printed(summary)


@pytest.mark.parametrize("width", [120, 101])
def test_several_speculative_methods_are_compared_in_a_table_of_their_own(summary, width):
    """Acceptance by position and where time goes; the table of all methods is no wider for it."""
    once = printed(summary, width)
    assert "accepted by position" not in once
    figures = summary["methods"]["speculative"]
    summary["methods"]["other"] = figures | {"acceptance_by_position": [0.5, 0.25, *[0.1] * 20]}
    text = printed(summary, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if "accepted by position, %" in line)
    ours, other = (next(line for line in lines[start:] if line.startswith(name)) for name in ("speculative", "other"))
    assert ours.split()[1] == f"{100 * figures['acceptance_by_position'][0]:.0f}"
    assert other.split()[1:9] == ["50", "25", *["10"] * 6], "eight positions at most"
    shares = [figures["draft_share"], figures["verify_share"], figures["accept_share"]]
    assert ours.split()[-4:-1] == [f"{100 * (share or 0):.0f}" for share in shares]
    assert not any(line.startswith("greedy") for line in lines[start:])


def test_the_answer_is_a_use_a_tie_or_nothing(summary):
    methods = summary["methods"]
    assert answers(summary)[0].startswith("Use speculative: ")
    for speedup in methods["speculative"]["speedup"].values():
        speedup.update(geometric_low=0.9, geometric_high=1.9)
    assert "fastest of the greedy decoding methods, at 179 tokens a second, but not beyond doubt" in answers(summary)[0]
    assert answers({"methods": {}}) == ["This run has no figures: no method decoded anything."]


def test_a_difference_inside_the_machines_noise_is_printed_as_none(summary):
    speedup = summary["methods"]["speculative"]["speedup"]["greedy"]
    line = next(line for line in printed(summary).splitlines() if line.startswith("speculative"))
    assert "no difference" not in line and speedup["noise"] > 1
    speedup.update(noise=speedup["geometric_mean"] * 1.01)
    line = next(line for line in printed(summary).splitlines() if line.startswith("speculative"))
    assert f"no difference ({speedup['geometric_low']:.2f}–" in line
    assert "no difference to greedy" in answers(summary)[0]
    assert "a baseline against itself in another repeat" in printed(summary)


def test_noise_that_was_not_measured_is_said(summary):
    for figures in summary["methods"].values():
        figures["noise"] = None
    assert "noise was not measured" in printed(summary)


def test_the_answer_admits_other_tokens(summary):
    summary["methods"]["speculative"]["identical_to"]["greedy"]["same"] = 3
    assert "but with other tokens in 1 of 4 answers" in answers(summary)[0]


def test_a_plain_method_that_wins_is_recommended(summary):
    greedy = summary["methods"]["greedy"]
    greedy["decode_tokens_per_second"] = 500.0
    assert answers(summary)[0].startswith("Use greedy: it decodes 500 tokens a second")


def test_where_speculation_does_not_pay_it_is_said_what_a_round_brings_and_takes(summary):
    figures = summary["methods"]["speculative"]
    assert not any("plain steps" in sentence for sentence in answers(summary)), "it pays"
    figures["speedup"]["greedy"].update(geometric_mean=0.8, geometric_low=0.7, geometric_high=0.9)
    length = figures["mean_accepted_length"]
    assert answers(summary)[1].startswith(
        f"speculative is not surely faster than greedy: a round brings {length:.2f} tokens and takes "
        f"{length / 0.8:.2f} plain steps (")
    figures.update(draft_share=None)
    assert f"takes {length / 0.8:.2f} plain steps. specbeam forecast says" in answers(summary)[1]
    summary["methods"] = {"capped": summary["methods"]["greedy"] | {"speedup": {}}} | summary["methods"]
    assert "speculative is not surely faster than greedy" in " ".join(answers(summary)), "the baseline, not the first"
    summary["methods"]["shorter"] = figures | {"speedup": {"greedy": {
        "median": 1.5, "geometric_mean": 1.5, "geometric_low": 1.4, "geometric_high": 1.6}}}
    assert not any("plain steps" in sentence for sentence in answers(summary)), "another one pays"


def test_an_empty_summary_prints_without_a_table(summary):
    for figures in summary["methods"].values():
        figures.update(decode_tokens_per_second=None, speedup={}, identical_to={})
    assert "no figures" in printed(summary)
