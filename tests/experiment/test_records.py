"""The run folder: what is there survives an interruption, and two runs never mix."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from specbeam.errors import InputError
from specbeam.experiment import records

CONFIG: dict[str, Any] = {
    "target": {"path": "bundled"},
    "methods": {"greedy": {"kind": "greedy"}},
    "repeats": 2,
    "prompts": None,
    "output_dir": "somewhere",
    "wandb": {"mode": "offline", "project": "specbeam"},
    "debug": {"render_input_text": False},
}
PROMPTS = [{"id": "1", "turns": ["Why?"]}]


def row(prompt: str, repeat: int = 0, method: str = "greedy", status: str = "ok") -> dict[str, Any]:
    return {"method": method, "prompt_id": prompt, "turn": 0, "repeat": repeat, "status": status, "text": "ä"}


def started(folder: Path, **resolved: Any) -> Path:
    records.start_run(folder, CONFIG, resolved, PROMPTS)
    return folder


def test_an_empty_or_missing_folder_becomes_a_run_that_the_same_config_goes_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "mit Leerzeichen äöü" / "run"
    assert records.holds_run(folder, CONFIG, PROMPTS) is False
    assert not folder.exists()
    started(folder)
    assert records.holds_run(folder, CONFIG, PROMPTS) is True


def test_where_it_writes_and_what_it_shows_may_differ(tmp_path: Path) -> None:
    changed = {**CONFIG, "output_dir": "elsewhere", "wandb": {"mode": "disabled"}, "debug": {"render_input_text": True}}
    assert records.holds_run(started(tmp_path), changed, PROMPTS) is True


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"repeats": 3}, "repeats was 2 and is 3 now"),
        ({"methods": {"greedy": {"kind": "greedy"}, "beam": {"kind": "beam"}}}, "methods.beam.kind was (not set)"),
        ({"prompts": ["Why?"]}, "prompts was null"),
    ],
)
def test_another_config_is_refused_naming_the_key(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        records.holds_run(started(tmp_path), {**copy.deepcopy(CONFIG), **change}, PROMPTS)
    assert sentence in str(caught.value)


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="other prompts"):
        records.holds_run(started(tmp_path), CONFIG, [{"id": "1", "turns": ["Why not?"]}])


def test_other_models_or_another_machine_are_refused(tmp_path: Path) -> None:
    resolved = {"device": "cpu", "methods": {"greedy": {"top_p": 1.0, "eos_token_id": [1, 2]}}}
    records.refuse_other_models(started(tmp_path, **resolved), resolved)
    with pytest.raises(InputError, match=r"resolved\.device was cpu and is cuda now"):
        records.refuse_other_models(tmp_path, {**resolved, "device": "cuda"})


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds other files"):
        records.holds_run(tmp_path, CONFIG, PROMPTS)


def test_a_file_in_the_folders_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for act in (lambda: records.holds_run(tmp_path / "file", CONFIG, PROMPTS), lambda: started(tmp_path / "file")):
        with pytest.raises(InputError, match="cannot be used"):
            act()


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    assert len({records.new_folder(tmp_path) for _ in range(3)}) == 3


def test_a_last_line_cut_in_half_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    records.append_lines(path, [row("1"), row("2")])
    path.write_bytes(path.read_bytes()[:-20])
    assert records.read_rows(path) == [row("1")]


def test_a_broken_line_further_up_is_no_interruption(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{half\n" + json.dumps(row("1")) + "\n")
    with pytest.raises(InputError, match="line 1 is no row"):
        records.read_rows(path)


def test_only_whole_cells_without_failures_are_kept(tmp_path: Path) -> None:
    records.append_lines(tmp_path / "rows.jsonl", [row("1"), row("2"), row("3"), row("5", status="failed")])
    cells = [[("greedy", "1", 0, 0), ("greedy", "2", 0, 0)], [("greedy", "3", 0, 0), ("greedy", "4", 0, 0)]]
    cells.append([("greedy", "5", 0, 0)])
    assert records.keep_finished(tmp_path, cells) == [row("1"), row("2")]
    assert records.read_rows(tmp_path / "rows.jsonl") == [row("1"), row("2")]


def test_a_trace_without_its_row_is_dropped(tmp_path: Path) -> None:
    traces = [{"method": "greedy", "prompt_id": prompt, "turn": 0} for prompt in "12"]
    records.append_lines(tmp_path / "trace.jsonl", traces)
    records.append_lines(tmp_path / "rows.jsonl", [row("1")])
    records.keep_finished(tmp_path, [[("greedy", "1", 0, 0)], [("greedy", "2", 0, 0)]])
    assert records.read_traces(tmp_path) == traces[:1]


def test_the_environment_names_versions_processor_and_load() -> None:
    found = records.environment("cpu", "float32", {"target": "eager"}, ["specbeam", "compare"])
    assert found["torch"] and found["transformers"] and found["cores"] >= 1 and found["cpu"]
    assert found["command"] == ["specbeam", "compare"]
    json.dumps(found)
