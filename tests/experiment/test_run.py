"""The comparison on a tiny pair: every row is recorded, failures stay rows, interruptions lose nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from rich.console import Console

from specbeam import cli
from specbeam.decoding import METHODS, Method
from specbeam.experiment import records
from specbeam.experiment.run import note_load, record_environment

METHOD_LABELS = ("greedy", "speculative", "beam", "speculative_beam", "transformers_greedy", "transformers_assisted",
                 "transformers_beam")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tiny target and draft (gpt2's class: learned positions, a context of 256)."""
    folder = tmp_path_factory.mktemp("pair")
    target = make_checkpoint("gpt2", folder / "target")
    draft = make_checkpoint("distilgpt2", folder / "draft")
    return [f"target.path={target}", f"draft.path={draft}", "device=cpu", "max_new_tokens=6", "wandb.mode=disabled"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Of the shape of Spec-Bench's question.jsonl."""
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["Tell me of a fox.", "And of an owl."]},
        {"question_id": 161, "category": "qa", "turns": ["Why is the sky blue?"], "reference": ["Light is scattered."]},
        {"question_id": 241, "category": "math", "turns": ["What is two plus three?"], "reference": ["5"]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compare(folder: Path, *overrides: str) -> int:
    return cli.main(["compare", *overrides, f"output_dir={folder}"])


def rows_of(folder: Path) -> list[Row]:
    return records.read_lines(folder / "rows.jsonl")


def tokens_of(folder: Path) -> dict[tuple[str, str, int, int], list[int]]:
    return {records.row_key(row): row["tokens"] for row in rows_of(folder)}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[int], None]], None]:
    """failing(kind, before): run `before(number of the call)` before each call of that kind."""

    def install(kind: str, before: Callable[[int], None]) -> None:
        calls = Counter[str]()

        class Observed(Method):
            def load(self) -> Callable[..., Any]:
                generate = Method.load(self)

                def observed(*arguments: Any, **options: Any) -> Any:
                    calls[kind] += 1
                    before(calls[kind])
                    return generate(*arguments, **options)

                return observed

        monkeypatch.setitem(METHODS, kind, Observed(**vars(METHODS[kind])))

    return install


def test_what_auto_has_learned_is_in_the_run_folder_and_repeats_a_sampled_run(pair: list[str], tmp_path: Path) -> None:
    settings = "kind: speculative, draft_length: auto, temperature: 1.0, max_new_tokens: 24, min_new_tokens: 24"
    common = [*pair, "prompts=['A fox.', 'Why is the sky blue?']", "repeats=1"]
    assert compare(tmp_path / "first", *common, f"methods={{a/b: {{{settings}}}, fixed: {{kind: speculative}}}}") == 0
    assert [path.name for path in (tmp_path / "first").glob("costs*")] == ["costs-a_b.json"]
    again = f"methods={{mine: {{{settings}, costs: {tmp_path / 'first' / 'costs-a_b.json'}}}}}"
    assert compare(tmp_path / "alone", *common, again) == 0
    assert compare(tmp_path / "both", *common, again, "batch_size=2") == 0
    assert tokens_of(tmp_path / "alone") == tokens_of(tmp_path / "both")
    assert not list((tmp_path / "alone").glob("costs*"))


def test_a_run_folder_has_every_file_and_one_row_for_each_answer(
    pair: list[str], prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert compare(folder, *pair, f"prompt_set.path={prompt_file}", "prompt_set.limit=null") == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "prompts.jsonl", "rows.jsonl", "trace.jsonl", "beams.jsonl", "summary.json",
        "report.html",
    }  # fmt: skip

    rows = rows_of(folder)
    expected = {(m, p, t, r) for m in METHOD_LABELS for p, t in (("81", 0), ("81", 1), ("161", 0), ("241", 0))
                for r in range(2)}  # fmt: skip
    assert Counter(map(records.row_key, rows)) == Counter(expected)
    for row in rows:
        assert row["status"] == "ok" and row["error"] is None
        assert row["new_tokens"] == len(row["tokens"]) >= row["first_tokens"] >= 1
        assert row["prefill_seconds"] > 0 and row["decode_seconds"] >= 0
        assert row["accepted"] == sum(accepted for _, accepted in row["accepted_by_position"]) <= row["drafted"]
        if row["kind"] != "speculative_beam":  # with draft_length auto it may find that proposing does not pay
            assert (row["drafted"] > 0) == (METHODS[row["kind"]].speculates and row["rounds"] > 0)

    traces = records.read_lines(folder / "trace.jsonl")
    assert Counter(map(records.trace_key, traces)) == Counter(key[:3] for key in expected if key[3] == 0)
    for trace in traces:
        assert len(trace["tokens"]) == len(trace["sources"]) == len(trace["token_rounds"]) == len(trace["pieces"])
        assert len(trace["target_probability"]) == len(trace["tokens"])
        assert all(0 <= probability <= 1 for probability in trace["target_probability"])

    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["methods"]) == list(METHOD_LABELS)
    speculative = summary["methods"]["speculative"]
    assert speculative["perplexity"] > 1 and speculative["quality"]["overall"]["tokens"]["count"] == 4
    for name in ("rounds", "drafted", "accepted"):  # the forecast beside what was measured
        assert speculative["forecast"][name] == speculative["forecast"][f"measured_{name}"]
    assert "forecast" not in summary["methods"]["greedy"]
    assert all(row["peak_memory_bytes"] > 0 for row in rows) or not Path("/proc/self/clear_refs").exists()
    config = records.read_yaml(folder / "config.yaml")
    assert config["resolved"]["methods"]["speculative"]["draft_length"] == 4
    assert str(folder / "report.html") in capsys.readouterr().out


def test_losslessness_shows_in_the_rows(pair: list[str], tmp_path: Path) -> None:
    assert compare(tmp_path / "run", *pair, "prompts=[one fox,an owl]", "repeats=1") == 0
    tokens = tokens_of(tmp_path / "run")
    for prompt in "12":
        greedy = tokens["greedy", prompt, 0, 0]
        assert all(tokens[label, prompt, 0, 0] == greedy for label in ("speculative", "transformers_greedy"))
        assert tokens["beam", prompt, 0, 0] == tokens["transformers_beam", prompt, 0, 0]


def test_a_batch_gives_the_same_tokens_and_names_its_rows(
    pair: list[str], prompt_file: Path, tmp_path: Path
) -> None:
    same = [*pair, f"prompt_set.path={prompt_file}", "prompt_set.limit=null", "repeats=1",
            "methods.sampled={kind: sample, temperature: 1.0}",
            "methods.assisted={kind: speculative, temperature: 1.0}"]  # fmt: skip
    assert compare(tmp_path / "one", *same) == 0
    assert compare(tmp_path / "many", *same, "batch_size=3") == 0
    assert tokens_of(tmp_path / "one") == tokens_of(tmp_path / "many")
    sizes = Counter(row["batch_id"] for row in rows_of(tmp_path / "many") if row["turn"] == 0)
    for batch_id, size in sizes.items():
        assert size == (1 if batch_id.startswith("transformers_assisted") else 3)
    notes = json.loads((tmp_path / "many" / "summary.json").read_text())["notes"]
    assert any("transformers_assisted ran one prompt at a time" in note for note in notes)


def test_later_turns_carry_on_with_the_methods_own_answer(
    pair: list[str], prompt_file: Path, tmp_path: Path
) -> None:
    assert compare(tmp_path / "run", *pair, f"prompt_set.path={prompt_file}", "only=[greedy,beam]") == 0
    lengths = {records.row_key(row): row["prompt_tokens"] for row in rows_of(tmp_path / "run")}
    for label in ("greedy", "beam"):
        assert lengths[label, "81", 1, 0] > lengths[label, "81", 0, 0]
        assert lengths[label, "81", 1, 0] == lengths[label, "81", 1, 1]


def test_a_failing_cell_is_a_failed_row_and_the_others_go_on(
    pair: list[str], tmp_path: Path, failing: Any
) -> None:
    def before(call: int) -> None:
        if call == 2:  # the first is the warm-up
            raise RuntimeError("out of\nmemory")

    failing("beam", before)
    settings = [*pair, "prompts=[one,two]", "repeats=1", "only=[greedy,beam]"]
    assert compare(tmp_path / "run", *settings) == 1
    by_key = {records.row_key(row): row for row in rows_of(tmp_path / "run")}
    assert by_key["beam", "1", 0, 0]["status"] == "failed"
    assert by_key["beam", "1", 0, 0]["error"] == "RuntimeError: out of memory"
    assert by_key["beam", "1", 0, 0]["tokens"] is None
    assert [by_key[label, "2", 0, 0]["status"] for label in ("greedy", "beam")] == ["ok", "ok"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]["beam"]["failed"] == 1

    assert compare(tmp_path / "run", *settings) == 0, "the same command tries the failed cell again"
    assert all(row["status"] == "ok" for row in rows_of(tmp_path / "run"))


def test_a_prompt_beyond_the_context_fails_alone_in_its_batch(pair: list[str], tmp_path: Path) -> None:
    long = "owl " * 300
    settings = [*pair, f"prompts=[one,'{long}',two]", "batch_size=3", "repeats=1"]
    assert compare(tmp_path / "run", *settings) == 1
    for row in rows_of(tmp_path / "run"):
        assert row["status"] == ("failed" if row["prompt_id"] == "2" else "ok"), row
        if row["status"] == "failed":
            assert "context of 256" in row["error"]


def test_a_turn_after_a_failed_one_fails_too(
    pair: list[str], prompt_file: Path, tmp_path: Path, failing: Any
) -> None:
    def before(call: int) -> None:
        if call == 2:
            raise RuntimeError("no")

    failing("greedy", before)
    assert compare(tmp_path / "run", *pair, f"prompt_set.path={prompt_file}", "repeats=1", "only=[greedy]") == 1
    errors = {records.row_key(row): row["error"] for row in rows_of(tmp_path / "run")}
    assert errors["greedy", "81", 0, 0] == "RuntimeError: no"
    assert "turn 1 of the prompt failed" in errors["greedy", "81", 1, 0]
    assert errors["greedy", "161", 0, 0] is None


def test_ctrl_c_keeps_finished_rows_and_the_same_command_does_only_the_rest(
    pair: list[str], tmp_path: Path, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def before(call: int) -> None:
        calls.append(call)
        if call == 3:
            raise KeyboardInterrupt

    failing("greedy", before)
    settings = [*pair, "prompts=[one,two,three]", "only=[greedy,speculative]"]
    assert compare(tmp_path / "run", *settings) == 130
    said = " ".join(capsys.readouterr().out.split())
    finished = rows_of(tmp_path / "run")
    assert f"Stopped: {len(finished)} rows" in said and f"output_dir={tmp_path / 'run'}" in said

    calls.clear()
    failing("greedy", calls.append)
    assert compare(tmp_path / "run", *settings) == 0
    rows = rows_of(tmp_path / "run")
    assert rows[: len(finished)] == finished
    assert len(rows) == len({records.row_key(row) for row in rows}) == 12
    done = sum(row["method"] == "greedy" for row in finished)
    assert len(calls) == 6 - done + 1, "the rest, and one warm-up"


def test_a_killed_run_goes_on_where_it_was(pair: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*pair, "prompts=[one,two,three]", "repeats=40", "only=[greedy,beam]", f"output_dir={folder}"]
    process = subprocess.Popen([sys.executable, "-m", "specbeam", "compare", *settings], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not (folder / "rows.jsonl").exists() or (folder / "rows.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = records.read_rows(folder / "rows.jsonl")
    assert 3 <= len(before) < 240
    with open(folder / "rows.jsonl", "ab") as file:
        file.write(b'{"method": "greedy", "prompt')  # what a kill inside a write leaves
    assert cli.main(["compare", *settings]) == 0
    rows = rows_of(folder)
    assert rows[: len(before)] == before
    assert len(rows) == len({records.row_key(row) for row in rows}) == 240


def test_a_finished_run_is_shown_again_without_running(
    pair: list[str], tmp_path: Path, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*pair, "prompts=[one]", "only=[greedy]"]
    assert compare(tmp_path / "run", *settings) == 0
    calls: list[int] = []
    failing("greedy", calls.append)
    assert compare(tmp_path / "run", *settings) == 0
    assert calls == []
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("report.html") == 3


def test_a_run_with_another_config_is_refused(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*pair, "prompts=[one]", "only=[greedy]", "repeats=1"]
    assert compare(tmp_path / "run", *settings) == 0
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    assert compare(tmp_path / "run", *settings, "max_new_tokens=7") == 2
    assert "max_new_tokens was 6 and is 7 now" in capsys.readouterr().err
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == before


def test_what_the_model_reads_is_shown_once_for_each_prompt(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*pair, "prompts=[one fox]", "only=[greedy,beam]", "debug.render_input_text=true"]
    assert compare(tmp_path / "run", *settings) == 0
    out = capsys.readouterr().out
    assert out.count("what every method reads") == 1 and "one fox" in out


def test_quality_figures_that_cannot_be_had_do_not_lose_the_run(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("specbeam.experiment.quality.add_quality", broken)
    assert compare(tmp_path / "run", *pair, "prompts=[one]", "only=[greedy]") == 0
    notes = json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]
    assert any("Quality figures are missing: memory ran out" in note and "too large" in note for note in notes)


def test_search_trees_are_kept_for_the_first_repeat_and_hold_the_answers(pair, tmp_path):
    assert compare(tmp_path / "run", *pair, "only=[beam,speculative_beam,transformers_beam]",
                   "methods.speculative_beam.trace=true", "prompts=['Tell me of a fox.','Why?']", "batch_size=2") == 0
    lines = records.read_lines(tmp_path / "run" / "beams.jsonl")
    assert Counter(line["method"] for line in lines) == {"beam": 2, "speculative_beam": 2}
    rows = {(row["method"], row["prompt_id"]): row for row in rows_of(tmp_path / "run") if row["repeat"] == 0}
    for line in lines:
        row, best = rows[line["method"], line["prompt_id"]], line["hypotheses"][0]
        for name in ("tokens", "text", "finish_reason"):
            assert best[name] == row[name]
        assert best["score"] == pytest.approx(row["score"])
        assert row["beam_gap"] == pytest.approx(best["score"] - line["hypotheses"][1]["score"])
        for step in line["steps"]:
            assert len({len(column) for name, column in step.items() if name != "round"}) == 1
    summary = records.read_json(tmp_path / "run" / "summary.json")["methods"]
    assert summary["beam"]["beam_gap"] == pytest.approx(summary["speculative_beam"]["beam_gap"], abs=1e-4)
    assert 0 < summary["beam"]["beam_distinct_2"] <= 1 and summary["transformers_beam"]["beam_gap"] is None


def test_speculative_beams_keep_no_tree_unless_asked(pair, tmp_path):
    assert compare(tmp_path / "run", *pair, "only=[beam,speculative_beam]", "prompts=['Why?']", "repeats=1") == 0
    assert [line["method"] for line in records.read_lines(tmp_path / "run" / "beams.jsonl")] == ["beam"]


def test_the_other_searches_run_and_their_trees_are_kept(pair, tmp_path):
    kinds = ("beam_sample", "diverse_beam", "stochastic_beam", "transformers_beam_sample")
    methods = ", ".join(f"{kind}: {{kind: {kind}, num_beams: 4, num_return_sequences: 2}}" for kind in kinds)
    assert compare(tmp_path / "run", *pair, f"methods={{{methods}}}", "prompts=['Tell me of a fox.','Why?']") == 0
    rows = rows_of(tmp_path / "run")
    assert Counter((row["method"], row["status"]) for row in rows) == {(kind, "ok"): 4 for kind in kinds}
    lines = records.read_lines(tmp_path / "run" / "beams.jsonl")
    assert Counter(line["method"] for line in lines) == dict.fromkeys(kinds[:3], 2)
    first = {(row["method"], row["prompt_id"]): row["tokens"] for row in rows if row["repeat"] == 0}
    for line in lines:
        assert line["hypotheses"][0]["tokens"] == first[line["method"], line["prompt_id"]]
        assert line["kind"] == line["method"] and line["returned"] == 2
    summary = records.read_json(tmp_path / "run" / "summary.json")["methods"]
    assert summary["diverse_beam"]["beam_gap"] is not None and summary["stochastic_beam"]["beam_gap"] is None


def test_without_trace_there_is_no_beams_file(pair, tmp_path):
    assert compare(tmp_path / "run", *pair, "only=[beam]", "prompts=['Why?']", "trace=false", "repeats=1") == 0
    assert not (tmp_path / "run" / "beams.jsonl").exists()


def test_a_cell_may_hold_more_prompts_than_run_at_once(pair: list[str], tmp_path: Path) -> None:
    """Ours replace a row that ends by the next prompt; the others answer batch after batch. The tokens are the same,
    and every method's seconds are counted once for each of its batches."""
    labels = "only=[greedy,speculative,beam,transformers_greedy,transformers_assisted]"
    asked = "prompts=" + json.dumps([f"Fox {'and owl ' * n}" for n in range(5)])
    assert compare(tmp_path / "one", *pair, labels, asked, "repeats=1") == 0
    assert compare(tmp_path / "many", *pair, labels, asked, "repeats=1", "batch_size=2", "prompts_per_cell=5") == 0
    assert tokens_of(tmp_path / "many") == tokens_of(tmp_path / "one")
    batches = {label: {row["batch_id"] for row in rows_of(tmp_path / "many") if row["method"] == label}
               for label in ("greedy", "speculative", "beam", "transformers_greedy", "transformers_assisted")}
    assert [len(ids) for ids in batches.values()] == [1, 1, 3, 3, 5]
    for row in rows_of(tmp_path / "many"):
        same = [r for r in rows_of(tmp_path / "many") if r["batch_id"] == row["batch_id"]]
        assert {r["decode_seconds"] for r in same} == {row["decode_seconds"]}
    summary = records.read_json(tmp_path / "many" / "summary.json")
    assert "forecast" not in summary["methods"]["speculative"]
    assert any("prompts_per_cell above batch_size" in note for note in summary["notes"])


def test_an_evaluator_of_another_vocabulary_scores_the_answers(pair: list[str], tmp_path: Path) -> None:
    evaluator = make_checkpoint("tinyllama-1.1b-chat", tmp_path / "evaluator")
    assert compare(tmp_path / "run", *pair, "prompts=[one,two]", "only=[greedy]", f"evaluator={evaluator}") == 0
    summary = records.read_json(tmp_path / "run" / "summary.json")
    quality = summary["methods"]["greedy"]["quality"]["overall"]
    assert quality["evaluator_bits_per_byte"]["value"] > 0 and summary["evaluator"] == str(evaluator)
    assert quality["evaluator_perplexity"]["value"] != pytest.approx(quality["perplexity"]["value"])


@pytest.mark.parametrize(("lost", "said"), [("tokenizer*", "has no tokenizer"), ("*.safetensors", "no *.safetensors")])
def test_a_bad_evaluator_is_refused_before_the_run(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str, said: str
) -> None:
    evaluator = make_checkpoint("gpt2", tmp_path / "evaluator")
    for file in evaluator.glob(lost):
        file.unlink()
    assert compare(tmp_path / "run", *pair, "prompts=[one]", "only=[greedy]", f"evaluator={evaluator}") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_evaluator_that_fails_takes_no_other_figure_with_it(
    pair: list[str], prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_checkpoint("gpt2", tmp_path / "evaluator")

    def broken(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("specbeam.experiment.quality.evaluator_of", broken)
    assert compare(tmp_path / "run", *pair, f"prompt_set.path={prompt_file}", "only=[greedy]",
                   f"evaluator={evaluator}") == 0
    summary = records.read_json(tmp_path / "run" / "summary.json")
    assert summary["methods"]["greedy"]["bleu"] is not None and summary["methods"]["greedy"]["perplexity"] > 1
    assert all(trace["target_probability"] for trace in records.read_lines(tmp_path / "run" / "trace.jsonl"))
    assert any(f"Figures under the evaluator {evaluator} are missing" in note for note in summary["notes"])


def test_a_resumed_run_remembers_that_its_first_part_ran_on_a_loaded_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "busy_cores", lambda: 0.1)
    monkeypatch.setattr(records, "environment", lambda *_: dict.fromkeys(
        ("started", "load_average", "command", "git_commit", "specbeam")))
    resolved, console = {"device": "cpu", "dtype": "float32", "runner": {}}, Console(file=io.StringIO())
    first = {"others_busy_cores": 1.2, "others_busy_cores_at_start": 0.0}
    records.write_json(tmp_path / "environment.json", first)
    assert record_environment(tmp_path, resolved, (), [], True, console) == []
    [note] = note_load(tmp_path, 0.05, [])
    assert "used 1.2 of" in note and records.read_json(tmp_path / "environment.json")["others_busy_cores"] == 1.2
    for loaded in ({"others_busy_cores_at_start": 1.4},
                   {"others_busy_cores_at_start": 0.0, "resumed": [{"others_busy_cores_at_start": 1.4}]}):
        records.write_json(tmp_path / "environment.json", loaded)
        [note] = record_environment(tmp_path, resolved, (), [], True, console)
        assert "were using 1.4 of" in note and "went on" in note
