"""Where a runner records shapes, all that a comparison needs is recorded before its clock runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

sys.path.append(str(Path(__file__).parent.parent / "runners"))
from test_graph import Recorder

from specbeam import cli
from specbeam.experiment import records, run
from specbeam.runners import graph


@pytest.mark.parametrize("overrides", [[], ["batch_size=2"], ["batch_size=2", "prompts_per_cell=3"]],
                         ids=["one by one", "batches", "batches that keep full"])
def test_nothing_is_recorded_in_a_timed_round(overrides: list[str], tmp_path: Path, monkeypatch) -> None:
    record, counts = Recorder(), []
    monkeypatch.setattr(graph, "make", lambda adapter, precision: graph.runner("graph", record))
    answer = run.run_cell

    def watched(*args):
        before = record.recorded
        result = answer(*args)
        counts.append(record.recorded - before)
        return result

    monkeypatch.setattr(run, "run_cell", watched)
    target = make_checkpoint("gpt2", tmp_path / "target")
    draft = make_checkpoint("distilgpt2", tmp_path / "draft")
    texts = [f"Tell me of a fox{' and an owl' * more}." for more in (0, 1, 3)]
    code = cli.main(["compare", f"target.path={target}", f"draft.path={draft}", "device=cpu", "runner=graph",
                     "max_new_tokens=12", "wandb.mode=disabled", "repeats=1", f"prompts={json.dumps(texts)}",
                     "only=[greedy,speculative,beam]", *overrides, f"output_dir={tmp_path / 'run'}"])
    rows = records.read_lines(tmp_path / "run" / "rows.jsonl")
    assert code == 0 and len(rows) == 9
    assert record.replayed > 0 and not any(counts)
