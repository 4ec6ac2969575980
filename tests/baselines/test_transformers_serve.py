"""A real OpenAI-compatible server, started here, is a row of a run like any other method."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import specbeam
from specbeam import cli

pytestmark = pytest.mark.heavy
for package in ("fastapi", "uvicorn", "openai", "pydantic"):
    pytest.importorskip(package, reason="pip install 'transformers[serving]'")
TARGET = Path(specbeam.__file__).parent / "bundled" / "target"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", "--host",
               "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


def test_a_real_server_gives_the_greedy_tokens_by_the_same_clock(url, tmp_path):
    server = f'{{kind: openai_server, base_url: "{url}", model: "{TARGET}", send: text, timeout: 120}}'
    nobody = '{kind: openai_server, base_url: "http://127.0.0.1:9/v1", model: x}'
    status = cli.main([
        "compare", f"methods={{greedy: {{kind: greedy}}, server: {server}, nobody: {nobody}}}",
        'prompts=["What is 17 + 25?", "Name three colours."]', "repeats=1", "max_new_tokens=12", "dtype=float32",
        "wandb.mode=disabled", f"output_dir={tmp_path / 'run'}"])
    assert status == 1, "one method has failed rows"
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    by_method = {name: [row for row in rows if row["method"] == name] for name in ("greedy", "server", "nobody")}
    assert all("nothing answers at http://127.0.0.1:9/v1" in row["error"] for row in by_method["nobody"])
    for ours, theirs in zip(by_method["greedy"], by_method["server"], strict=True):
        assert theirs["status"] == "ok", theirs["error"]
        assert theirs["text"].strip() == ours["text"].strip() and theirs["prompt_tokens"] == ours["prompt_tokens"]
        assert theirs["prefill_seconds"] > 0 and theirs["new_tokens"] in (ours["new_tokens"], ours["new_tokens"] - 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]["server"]
    assert summary["speedup"]["greedy"]["median"] > 0 and summary["mean_accepted_length"] is None
