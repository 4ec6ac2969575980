"""Run folders as they are found: whole, half written, of other targets, or none at all."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from fake_run import METHODS, write_run
from rich.console import Console

from specbeam import cli
from specbeam.errors import InputError
from specbeam.report.build import page
from specbeam.report.categories import category_table, speedups_by_category
from specbeam.report.figures import write_figures
from specbeam.report.prediction import predicted, prediction_section
from specbeam.report.reporting import report
from specbeam.report.runs import read_run
from specbeam.report.side_by_side import names_of, not_comparable


def change(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def printed(*folders: Path, **options) -> str:
    console = Console(width=200, file=io.StringIO())
    assert report(list(folders), console, **options) == 0
    return console.file.getvalue()


def test_a_whole_run_misses_nothing(tmp_path):
    assert read_run(write_run(tmp_path)).missing == []


def test_a_run_that_was_killed_says_how_far_it_came(tmp_path):
    folder = write_run(tmp_path)
    for name in ("summary.json", "trace.jsonl", "environment.json", "beams.jsonl"):
        (folder / name).unlink()
    config = {"methods": METHODS, "repeats": 2, "only": None, "target": {"path": "bundled"}}
    (folder / "config.yaml").write_text(json.dumps(config), "utf-8")
    rows = (folder / "rows.jsonl").read_bytes()
    (folder / "rows.jsonl").write_bytes(rows[: len(rows) // 8])  # the last line is cut in half
    text = printed(folder)
    assert "This run was not finished: it has 6 of 48 rows" in text
    assert "methods transformers_greedy, transformers_assisted, transformers_beam have no row" in text
    for sentence in ("1 line of rows.jsonl could not be read", "trace.jsonl is missing", "environment.json is missing"):
        assert sentence in text and sentence in (folder / "report.html").read_text("utf-8")
    (folder / "environment.json").write_text(json.dumps({"others_busy_cores_at_start": 1.4}), "utf-8")
    assert "Other programs were using 1.4 cores when the run started" in printed(folder)
    whole = write_run(tmp_path / "whole")
    assert any("Not finished: half" in one for one in not_comparable([read_run(whole), read_run(folder)],
                                                                    ["whole", "half"]))


def test_what_a_half_written_folder_lacks_is_named(tmp_path):
    folder = write_run(tmp_path)
    resolved = {"methods": {"beam": {"kind": "beam", "trace": True}}}
    (folder / "config.yaml").write_text(json.dumps({"methods": METHODS, "resolved": resolved}), "utf-8")
    assert read_run(folder).missing == []
    for name in ("trace.jsonl", "beams.jsonl", "prompts.jsonl"):
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write('{"cut in ha')
    assert read_run(folder).missing == [f"1 line of {name} could not be read." for name in (
        "trace.jsonl", "beams.jsonl", "prompts.jsonl")]
    for name in ("beams.jsonl", "prompts.jsonl"):
        (folder / name).unlink()
        assert any(one.startswith(f"{name} is missing") for one in read_run(folder).missing)


def test_int8_weights_are_another_target_and_other_words_other_prompts(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    change(other, "summary.json", runner={"target": "openvino int8", "draft": "openvino"})
    [warning] = not_comparable([read_run(one), read_run(other)], ["one", "other"])
    assert "different targets (one: bundled, other: bundled with int8 weights)" in warning
    third = write_run(tmp_path / "third")
    prompts = (third / "prompts.jsonl").read_text("utf-8").replace("Why is the sky blue?", "Why is the sea blue?")
    (third / "prompts.jsonl").write_text(prompts, "utf-8")
    [warning] = not_comparable([read_run(one), read_run(third)], ["one", "third"])
    assert warning.startswith("Other prompts"), "their ids are the same"


def test_runs_of_different_targets_are_marked_as_not_comparable(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    change(other, "summary.json", target={"path": "gpt2"}, dtype="bfloat16")
    runs = [read_run(one), read_run(other)]
    assert "Not comparable: the runs have different targets (one: bundled, other: gpt2)" in not_comparable(runs, [
        "one", "other"])[0]
    text = printed(one, other, output=tmp_path / "both.html")
    assert "Not comparable" in text
    html = (tmp_path / "both.html").read_text("utf-8")
    assert html.count("<small>not comparable</small>") == 2 and len(html.encode()) < 1_000_000


def test_runs_of_one_target_are_compared_and_told_apart(tmp_path):
    one, other = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    (other / "config.yaml").write_text(json.dumps({"methods": METHODS, "batch_size": 4}), "utf-8")
    runs = [read_run(one), read_run(other)]
    assert names_of(runs) == ["x/run", "y/run"] and not_comparable(runs, names_of(runs)) == []
    html = page(runs)
    assert "not comparable" not in html.lower()
    assert '<tr><th scope="row">batch_size</th><td>1</td><td>4</td></tr>' in html


def test_many_runs_stay_below_a_megabyte(tmp_path):
    run = read_run(write_run(tmp_path, prompts=42, tokens=200))
    assert len(page([run] * 4).encode()) < 1_000_000


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, capsys):
    file, empty, started = tmp_path / "file", tmp_path / "empty", tmp_path / "started"
    file.write_text("x")
    empty.mkdir()
    started.mkdir()
    (started / "config.yaml").write_text("methods: {greedy: {kind: greedy}}")
    run = write_run(tmp_path / "run")
    for arguments, sentence in [
        ([], "needs a run folder"), ([str(tmp_path / "none")], "There is no folder"), ([str(file)], "is a file"),
        ([str(empty)], "holds no run"), ([str(started)], "a run without a single row"),
        ([str(run), str(run)], "given twice"), ([str(run), "--figures", "gif"], "use pdf, svg, png"),
        ([str(run), "--figures"], "--figures wants a value"), ([str(run), "--fast"], "There is no flag"),
        ([str(run), f"--output={tmp_path}"], "cannot be written"),
    ]:
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


FAST = {"greedy": {"kind": "greedy", "speedup": {}}, "fast": {"kind": "speculative", "speedup": {"greedy": {}}}}


def category_row(method, prompt, category, seconds, batch=None):
    return {"method": method, "prompt_id": prompt, "turn": 0, "category": category, "status": "ok", "repeat": 0,
            "new_tokens": 11, "first_tokens": 1, "decode_seconds": seconds, "batch_id": batch or f"{method}-{prompt}"}


def test_speedups_by_category_are_geometric_means_over_its_prompts():
    methods = FAST
    row = category_row
    rows = [row("greedy", "1", "qa", 1.0), row("greedy", "2", "math", 1.0), row("greedy", "3", "math", 3.0),
            row("fast", "1", "qa", 0.5), row("fast", "2", "math", 2.0), row("fast", "3", "math", 2.0)]
    found = speedups_by_category(rows, methods)
    assert found == {"fast": {"qa": [2.0], "math": [0.5, 1.5]}}
    assert ">0.87<" in category_table(rows, methods) and "0.50, 1.50" in category_table(rows, methods)
    assert category_table(rows[:1], methods) == ""
    assert "share its speed-up" not in category_table(rows, methods)


def test_a_batch_gives_each_category_its_own_speedup_over_the_same_prompts_decoded_alone():
    rows = [category_row("greedy", "1", "qa", 1.0), category_row("greedy", "2", "math", 3.0),
            category_row("greedy", "3", "math", 1.0), category_row("fast", "3", "math", 0.5),
            *(category_row("fast", prompt, name, 2.0, "both") for prompt, name in (("1", "qa"), ("2", "math")))]
    assert speedups_by_category(rows, FAST) == {"fast": {"qa": [2.0], "math": [2.0, 2.0]}}, "4 seconds against 2"
    assert "share its speed-up" in category_table(rows, FAST)


def test_the_prediction_is_leviathans_formula():
    def row(method, **figures):
        return {"method": method, "status": "ok", "batch_id": method, "draft_seconds": None, "verify_seconds": None,
                "drafted": 0, "rounds": 10, "accepted_by_position": [], **figures}

    rows = [row("greedy"), row("fast", drafted=40, draft_seconds=0.4, verify_seconds=1.2,
                               accepted_by_position=[[10, 8], [10, 6], [10, 5], [10, 4]])]
    methods = {"greedy": {"kind": "greedy", "speedup": {}, "decode_tokens": 100, "decode_seconds": 10.0},
               "fast": {"kind": "speculative", "family": "greedy", "speedup": {"greedy": {}}, "trees": False,
                        "acceptance_by_position": [0.8, 0.6, 0.5, 0.4], "mean_accepted_length": 3.3,
                        "decode_tokens": 33, "decode_seconds": 1.65}}
    one = predicted(rows, methods)["fast"]
    length = (1 - 0.8**5) / (1 - 0.8)
    assert one["length_predicted"] == pytest.approx(length)
    assert (one["c"], one["v"]) == (pytest.approx(0.1), pytest.approx(1.2))
    assert one["speedup_predicted"] == pytest.approx(length / (4 * 0.1 + 1.2))
    assert one["speedup_measured"] == pytest.approx(2.0)


def test_the_forecast_stands_beside_the_measurement_and_a_wrong_count_is_marked():
    forecast = {"over": "greedy", "draft_length": 4, "speedup": 1.5, "measured_speedup": 1.6, "rounds": 10,
                "drafted": 40, "accepted": 26, "measured_rounds": 10, "measured_drafted": 40, "measured_accepted": 26,
                "mean_accepted_length": 3.6, "measured_mean_accepted_length": 3.6}
    methods = {"greedy": {"kind": "greedy"}, "fast": {"kind": "speculative", "forecast": forecast}}
    html = prediction_section([], methods)
    assert '<td>26 of 40</td><td class="good">26 of 40</td>' in html and "<td>-6.2%</td>" in html
    forecast["measured_accepted"] = 25
    assert '<td class="bad">25 of 40</td>' in prediction_section([], methods)
    assert prediction_section([], {"greedy": {"kind": "greedy"}}) == ""


def test_figures_for_a_paper_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'specbeam[figures]')")
    run = read_run(write_run(tmp_path))
    paths = write_figures(run, "pdf")
    assert [path.name for path in paths] == ["speedups.pdf", "quality.pdf", "acceptance.pdf", "phases.pdf"]
    assert all(path.read_bytes().startswith(b"%PDF") for path in paths)
    assert (paths[0].parent).name == "figures"


def test_without_matplotlib_figures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("specbeam.report.figures.find_spec", lambda _: None)
    with pytest.raises(InputError, match="needs matplotlib"):
        report([write_run(tmp_path)], Console(file=io.StringIO()), figures="pdf")
