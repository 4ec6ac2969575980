"""What breaks around a run: broken checkpoints, full disks, read-only folders, odd names, prompts of any length, memory
that runs out. Each is one clear sentence, and what was finished stays."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import make_checkpoint

from specbeam import cli
from specbeam.engine.cache import SlotLayer
from specbeam.experiment import records

OURS = "only=[greedy,speculative]"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny target and draft with a learned context of 256."""
    folder = tmp_path_factory.mktemp("pair")
    make_checkpoint("gpt2", folder / "target")
    make_checkpoint("distilgpt2", folder / "draft")
    return settings(folder)


def settings(folder: Path) -> list[str]:
    return [f"target.path={folder / 'target'}", f"draft.path={folder / 'draft'}", "device=cpu", "max_new_tokens=6",
            "repeats=1", "wandb.mode=disabled"]


def compare(folder: Path, *overrides: str) -> int:
    return cli.main(["compare", *overrides, f"output_dir={folder}"])


def rows_of(folder: Path) -> dict[records.RowKey, dict[str, Any]]:
    return {records.row_key(row): row for row in records.read_lines(folder / "rows.jsonl")}


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line]
    assert sum("specbeam: " in line for line in lines) == 1 and not any("Traceback" in line for line in lines), lines
    assert lines[-1].startswith("specbeam: ")
    return lines[-1]


def broken(folder: Path, where: str) -> list[str]:
    """A pair whose target has NaN in its last layer, or in what it knows of the token Q alone."""
    make_checkpoint("tinyllama-1.1b-chat", folder / "draft", seed=1)
    target = make_checkpoint("tinyllama-1.1b-chat", folder / "target")
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    with torch.no_grad():
        if where == "head":
            model.lm_head.weight.fill_(torch.nan)
        else:
            model.model.embed_tokens.weight[tokenizer("Q")["input_ids"][-1]] = torch.nan
    model.save_pretrained(target)
    return settings(folder)


def test_a_checkpoint_of_nan_is_refused_or_all_its_rows_fail(tmp_path: Path, capsys: Any) -> None:
    pair = broken(tmp_path, "head")
    assert compare(tmp_path / "run", *pair, "prompts=[one]") == 2
    assert "LlamaForCausalLM gives logits that are not finite" in sentence(capsys)
    assert compare(tmp_path / "plain", *pair, "prompts=[one]", "only=[greedy,beam,transformers_greedy]") == 1
    for row in rows_of(tmp_path / "plain").values():
        assert row["status"] == "failed" and row["tokens"] is None
        assert "LlamaForCausalLM gives" in row["error"] and "NaN" in row["error"]


def test_nan_that_only_some_prompts_meet_fails_their_rows_alone(tmp_path: Path) -> None:
    pair = broken(tmp_path, "token")
    sampled = "methods.sampled={kind: sample, temperature: 1.0}"
    assert compare(tmp_path / "run", *pair, "prompts=[one Q,two foxes]", sampled) == 1
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 16
    for (_, prompt, _, _), row in rows.items():
        assert row["status"] == ("failed" if prompt == "1" else "ok"), row
        assert prompt == "2" or ("NaN" in row["error"] and row["tokens"] is None)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_prompt_file_that_is_not_utf8_is_one_sentence_with_file_and_line(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "fragen.jsonl"
    file.write_bytes(b'{"prompt": "Why?"}\n{"prompt": "Stra\xdfe"}\n')
    assert compare(tmp_path / "run", f"prompt_set.path={file}") == 2
    assert f"{file}, line 2: byte 17 is not UTF-8" in sentence(capsys)
    table = tmp_path / "fragen.csv"
    table.write_bytes(b'prompt\nWhy?\nStra\xdfe\n')
    assert compare(tmp_path / "run", f"prompt_set.path={table}") == 2
    assert f"{table}, line 3: byte 5 is not UTF-8" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_no_text_is_a_failed_row_and_an_argument_that_is_none_one_sentence(
    pair: list[str], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "surrogate.jsonl"
    file.write_text('{"prompt": "Stra\\udcdfe"}\n{"prompt": "Why?"}\n')  # legal JSON
    assert compare(tmp_path / "run", *pair, f"prompt_set.path={file}", OURS, "runner=eager") == 1
    for (_, prompt, _, _), row in rows_of(tmp_path / "run").items():
        assert row["status"] == ("failed" if prompt == "1" else "ok")
        assert prompt == "2" or "is no text at character" in row["error"]
    capsys.readouterr()
    for command in (["generate", "Stra\udcdfe"], ["compare", "system_prompt=\udcff"], ["report", "\udcff"]):
        assert cli.main(command) == 2
        assert "is not UTF-8, where ? stands in it" in sentence(capsys)


def test_a_full_disk_is_one_sentence_and_the_finished_rows_stay(
    pair: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk does it: part of the line is written, the rest is refused."""
    asked = [*pair, "prompts=[one,two,three]", OURS]
    full = open  # of the module; negative control below: without truncation half a line would stay

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            if self.file.tell() > 2000:
                self.file.write(bytes(data[:20]))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    def opened(path: Any, *arguments: Any, **options: Any) -> Any:
        file = full(path, *arguments, **options)
        return Full(file) if str(path).endswith("rows.jsonl") else file

    monkeypatch.setattr(records, "open", opened, raising=False)
    assert compare(tmp_path / "run", *asked) == 2
    said = sentence(capsys)
    assert "rows.jsonl' cannot be written (No space left on device)" in said and f"output_dir='{tmp_path}" in said
    finished = rows_of(tmp_path / "run")  # every line is whole
    assert 1 <= len(finished) < 6 and all(row["status"] == "ok" for row in finished.values())

    monkeypatch.undo()
    assert compare(tmp_path / "run", *asked) == 0
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 6 and all(rows[key] == row for key, row in finished.items())


def test_a_file_size_limit_is_one_sentence_too(pair: list[str], tmp_path: Path, capsys: Any) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    asked = [*pair, "prompts=[one,two,three,four]", OURS]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        status = compare(tmp_path / "run", *asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "cannot be written (File too large)" in sentence(capsys)
    finished = rows_of(tmp_path / "run") if (tmp_path / "run" / "rows.jsonl").exists() else {}
    assert not list((tmp_path / "run").glob("*.new"))
    assert compare(tmp_path / "run", *asked) == 0
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 8 and all(rows[key] == row for key, row in finished.items())


def test_a_read_only_folder_is_one_sentence_before_a_model_is_loaded(
    pair: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere
        may = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and may(path, mode))
    monkeypatch.setattr("specbeam.experiment.run.load_models", lambda *_: pytest.fail("a model was loaded"))
    for folder in (locked, locked / "deep" / "run"):
        assert compare(folder, *pair, "prompts=[one]", OURS) == 2
        said = sentence(capsys)
        assert repr(str(folder)) in said and f"{str(locked)!r} is read-only" in said


def test_a_draft_whose_cache_outgrows_memory_fails_its_rows_alone(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft, the model of one layer (the target has two), asks for more than there is."""
    forward = transformers.GPT2LMHeadModel.forward

    def short_of_memory(model: Any, *arguments: Any, **options: Any) -> Any:
        inside.append(model.config.n_layer)
        try:
            return forward(model, *arguments, **options)
        finally:
            inside.pop()

    inside: list[int] = []
    allocate = SlotLayer.lazy_initialization

    def refused(layer: Any, *states: Any) -> None:
        if inside and inside[-1] == 1 and states[0].shape[0] == 1:
            torch.empty(99 * 2**40, dtype=torch.uint8)
        allocate(layer, *states)

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", short_of_memory)
    monkeypatch.setattr(SlotLayer, "lazy_initialization", refused)
    labels = "only=[greedy,speculative,beam,transformers_greedy]"
    assert compare(tmp_path / "run", *pair, "prompts=[one,two]", labels, "runner=eager") == 1
    rows = rows_of(tmp_path / "run")
    assert Counter((row["method"], row["status"]) for row in rows.values()) == {
        ("greedy", "ok"): 2, ("speculative", "failed"): 2, ("beam", "ok"): 2, ("transformers_greedy", "ok"): 2}
    [error] = {row["error"] for row in rows.values() if row["status"] == "failed"}
    assert error.startswith("memory ran out: lower batch_size or max_new_tokens") and str(99 * 2**40) in error
    assert "memory ran out" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_prompt_of_0_characters_is_refused_and_one_of_100_000_fails_alone(
    pair: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert compare(tmp_path / "empty", *pair, "prompts=[one,'']", OURS) == 2
    assert "prompts[1]: prompt is empty" in sentence(capsys)
    long = "owl " * 25_000
    assert compare(tmp_path / "run", *pair, f"prompts=[one,'{long}',two]") == 1
    for (method, prompt, _, _), row in rows_of(tmp_path / "run").items():
        assert row["status"] == ("failed" if prompt == "2" else "ok"), (method, row["error"])
        assert prompt != "2" or ("context of 256" in row["error"] and len(row["error"]) < 400)


def test_a_thousand_prompts_are_one_run(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"Fox {n}", "category": "ab"[n % 2]}) + "\n"
                            for n in range(1000)), "utf-8")
    asked = [*pair, f"prompt_set.path={file}", "prompt_set.limit=null", "prompt_set.per_category=null", OURS,
             "batch_size=100", "max_new_tokens=2", "runner=eager"]  # fmt: skip
    assert compare(tmp_path / "run", *asked) == 0
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2000 and all(row["status"] == "ok" for row in rows.values())
    assert all(rows["greedy", *key]["tokens"] == row["tokens"] for (method, *key), row in rows.items()
               if method == "speculative")
    summary = records.read_json(tmp_path / "run" / "summary.json")["methods"]
    assert {label: figures["prompts"] for label, figures in summary.items()} == {"greedy": 1000, "speculative": 1000}
    assert (tmp_path / "run" / "report.html").stat().st_size < 16e6  # says itself what it leaves out
    monkeypatch.setattr("specbeam.experiment.run.load_models", lambda *_: pytest.fail("a model was loaded"))
    assert compare(tmp_path / "run", *asked) == 0  # shown, not run again


def test_a_run_folder_and_prompt_file_with_spaces_and_non_ascii_names(pair: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "Läufe für 世界 'eins'" / "ein Lauf"
    file = tmp_path / "Fragen für alle ✓.jsonl"
    file.write_text('{"prompt": "Wozu Straßen?"}\n', "utf-8")
    asked = [*pair, f"prompt_set.path='{file}'", OURS]
    quoted = str(folder).replace("'", "\\'")
    for _ in range(2):  # the second shows the finished run
        assert cli.main(["compare", *asked, f"output_dir='{quoted}'"]) == 0
    assert len(rows_of(folder)) == 2 and (folder / "report.html").exists()
    assert cli.main(["report", str(folder)]) == 0


def start(folder: Path, asked: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "specbeam", "compare", *asked, f"output_dir={folder}"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.heavy
def test_a_run_killed_at_ten_random_moments_ends_as_an_undisturbed_one(pair: list[str], tmp_path: Path) -> None:
    """Most moments lie among new rows, some where a resumed run has just rewritten its file."""
    # a fixed draft length: `auto` weighs the machine's costs
    asked = [*pair, "prompts=[one,two,three]", "repeats=60", "only=[greedy,speculative,beam]",
             "methods.speculative.draft_length=3", "runner=eager"]  # fmt: skip
    assert compare(tmp_path / "whole", *asked) == 0
    folder, chance = tmp_path / "run", random.Random(0)
    file = folder / "rows.jsonl"
    kept: dict[records.RowKey, dict[str, Any]] = {}
    for kill in range(10):
        rewritten = file.stat().st_mtime_ns if file.exists() else 0
        process = start(folder, asked)
        try:
            until = time.monotonic() + 120
            while (not file.exists() or file.stat().st_mtime_ns == rewritten if kill % 4 == 3  # while it resumes
                   else len(records.read_rows(file)) <= len(kept)):  # or among new rows
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.4))
            assert process.poll() is None, "it ended before the kill: ask for more repeats"
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        now = {records.row_key(row): row for row in records.read_rows(file)}
        assert all(now[key] == row for key, row in kept.items()), "a finished row is lost"
        kept = now
    assert compare(folder, *asked) == 0
    rows, whole = rows_of(folder), rows_of(tmp_path / "whole")
    assert all(rows[key] == row for key, row in kept.items())
    assert len(records.read_lines(file)) == len(rows) == 540
    assert {key: row["tokens"] for key, row in rows.items()} == {key: row["tokens"] for key, row in whole.items()}
