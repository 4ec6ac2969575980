"""W&B gets a copy of the run, in the run folder, and can neither break nor delay it."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_run import write_run

from specbeam import tracking
from specbeam.experiment import records
from specbeam.report.build import write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202eabc"

ROWS = [
    {"method": "greedy", "prompt_id": "1", "turn": 0, "category": "qa", "repeat": 0, "status": "ok", "new_tokens": 2,
     "finish_reason": "eos", "text": "Because."},
    {"method": "greedy", "prompt_id": "1", "turn": 0, "category": "qa", "repeat": 1, "status": "ok", "new_tokens": 2,
     "finish_reason": "eos", "text": "Because."},
    {"method": "beam", "prompt_id": "1", "turn": 0, "category": "qa", "repeat": 0, "status": "failed",
     "new_tokens": None, "finish_reason": None, "text": None},
]  # fmt: skip
SUMMARY = {"methods": {"greedy": {"decode_tokens_per_second": 100.0, "bleu": None, "speedup": {}}}}


def config(mode: str) -> dict[str, Any]:
    return {"methods": {"greedy": {"kind": "greedy"}}, "wandb": {"mode": mode, "project": "specbeam-tests"}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory and home, no key; afterwards the environment must be as it was."""
    empty = tmp_path / "cwd"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "NETRC", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = set(os.environ)
    yield empty
    assert set(os.environ) - {"WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_SERVICE"} == before - {"WANDB_SERVICE"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def offline_runs(folder: Path) -> list[Path]:
    return list((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def test_disabled_writes_nothing(folder: Path) -> None:
    assert tracking.track(folder, config("disabled"), ROWS, SUMMARY) == []
    assert list(folder.iterdir()) == []


def test_offline_writes_into_the_run_folder_and_says_nothing(
    folder: Path, elsewhere: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tracking.track(folder, config("offline"), ROWS, SUMMARY) == []
    assert len(offline_runs(folder)) == 1
    assert list(elsewhere.iterdir()) == []
    (table,) = (folder / "wandb").glob("offline-run-*/files/media/table/*.json")
    text = table.read_text()
    assert text.count("Because.") == 1, "one sample a prompt and method, none for a failed row"
    assert capfd.readouterr() == ("", "")


def inspected(folder: Path, *flags: str) -> str:
    (run,) = offline_runs(folder)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(run)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_samples_with_coloured_tokens_charts_and_the_report_can_be_read_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", prompts=2, tokens=12, hostile=HOSTILE)
    report = write_report(folder)
    rows, summary = records.read_rows(folder / "rows.jsonl"), records.read_json(folder / "summary.json")
    assert tracking.track(folder, config("offline"), rows, summary) == []
    logged = json.loads(inspected(folder, "--summary"))["summary"]
    rate = summary["methods"]["speculative"]["decode_tokens_per_second"]
    assert logged["speculative"]["decode_tokens_per_second"] == pytest.approx(rate)
    assert (logged["samples"]["nrows"], logged["samples"]["ncols"]) == (12, 8)
    for chart in ("decode rate", "speed and quality", "acceptance"):
        assert logged[f"charts/{chart}_table"]["nrows"] > 0
    lines = [json.loads(line) for line in inspected(folder).splitlines()]
    artifacts = {line["artifact"]["type"]: line["artifact"] for line in lines if line["type"] == "artifact"}
    (file,) = artifacts["report"]["manifest"]["contents"]
    assert (file["path"], int(file["size"])) == ("report.html", report.stat().st_size)
    pieces = [Path(entry["local_path"]).read_text("utf-8") for line in lines if line["type"] == "artifact"
              for entry in line["artifact"]["manifest"]["contents"] if entry["path"].endswith(".html")
              and entry["path"] != "report.html"]
    assert pieces and all("<script" not in piece and "<img" not in piece for piece in pieces)
    assert any("#cfe3fb" in piece and "draft, round 1" in piece and "⟨U+202E⟩" in piece for piece in pieces)


def test_online_without_a_key_goes_on_offline_with_one_sentence(folder: Path) -> None:
    (note,) = tracking.track(folder, config("online"), ROWS, SUMMARY)
    assert "no API key" in note and "wandb sync" in note and "\n" not in note
    assert len(offline_runs(folder)) == 1


def test_a_server_that_never_answers_costs_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        started = time.monotonic()
        (note,) = tracking.track(folder, config("online"), ROWS, SUMMARY)
        assert time.monotonic() - started < 20
    assert "does not answer" in note
    assert len(offline_runs(folder)) == 1


def test_a_server_that_refuses_the_key_costs_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = refuse

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    try:
        started = time.monotonic()
        (note,) = tracking.track(folder, config("online"), ROWS, SUMMARY)
        assert time.monotonic() - started < 20
    finally:
        server.shutdown()
        server.server_close()
    assert "could not be reached" in note
    assert len(offline_runs(folder)) == 1


def test_a_client_that_breaks_does_not_break_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("wandb.init", broken)
    (note,) = tracking.track(folder, config("offline"), ROWS, SUMMARY)
    assert "boom" in note and str(folder) in note
