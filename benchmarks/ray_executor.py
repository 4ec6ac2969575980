"""What Ray costs and brings: rows a minute with 1 and 2 actors against the local executor, and the driver's capacity.

    python benchmarks/ray_executor.py [--prompts 24] [--no-op-cells 10000] [--out FILE.json]

Needs Ray (pip install 'specbeam[ray]'). The runs are whole `specbeam compare` commands on the bundled pair; the
capacity is that of the driver's own loop, with two actors whose cells do nothing: dealing out, collecting, writing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from specbeam.experiment.compose import compose
from specbeam.experiment.plan import Cell, make_plan
from specbeam.experiment.prompts import Prompt
from specbeam.experiment.ray_executor import Crew

CORES = "ray.cpus_per_actor=1"


class Idle:
    """An actor whose cells do nothing but fill a row."""

    def run(self, cells: list[Cell], answers: Any) -> Any:
        return [([{"method": cell.method.label, "prompt_id": cell.prompts[0].id, "turn": 0, "repeat": 0, "status": "ok",
                   "text": "", "tokens": list(range(64))}], [], []) for cell in cells]  # fmt: skip


def whole_run(prompts: int, *overrides: str) -> dict[str, float]:
    """Seconds of a run, of its start (until its first row) and rows a minute from then on."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "run"
        command = [sys.executable, "-m", "specbeam", "compare", "only=[greedy,speculative]", "prompt_set=all",
                   f"prompt_set.limit={prompts}", "repeats=1", "runner=eager", "wandb.mode=disabled", "device=cpu",
                   f"output_dir={folder}", *overrides]  # fmt: skip
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        times: list[tuple[float, int]] = []
        while process.poll() is None:
            time.sleep(0.05)
            rows = folder / "rows.jsonl"
            count = rows.read_bytes().count(b"\n") if rows.exists() else 0
            if count and (not times or count > times[-1][1]):
                times.append((time.monotonic() - start, count))
        seconds = time.monotonic() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    (first, few), (last, all_) = times[0], times[-1]
    return {"seconds": seconds, "until_first_row": first, "rows": all_,
            "rows_per_minute": 60 * (all_ - few) / (last - first)}  # fmt: skip


def capacity(cells: int, actors: int = 2) -> dict[str, float]:
    import ray

    ray.init(address="local", num_cpus=actors, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    template = next(make_plan(compose("config", ['prompts=["-"]', "only=[greedy]"])).cells())
    made = [Cell(template.method, (Prompt(f"prompt {n}", "chat", ("-",)),), 0, 0, f"greedy/{n}") for n in range(cells)]
    crew = Crew(ray.remote(num_cpus=1, max_restarts=0)(Idle).remote, (), 60.0)
    crew.actors = {slot: crew.start() for slot in range(actors)}
    ray.get([actor.run.remote([], {}) for actor in crew.actors.values()])
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        rows = crew.run(Path(folder), made, [], Console(quiet=True))
        seconds = time.monotonic() - start
    ray.shutdown()
    return {"cells": len(rows), "seconds": seconds, "cells_per_second": len(rows) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--no-op-cells", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    found: dict[str, dict[str, float]] = {"driver": capacity(chosen.no_op_cells)}
    found["local"] = whole_run(chosen.prompts)
    for actors in (1, 2):
        found[f"{actors} actor{'s' * (actors > 1)}"] = whole_run(
            chosen.prompts, "executor=ray", "ray.address=local", f"ray.actors={actors}", CORES)  # fmt: skip
    for name, figures in found.items():
        print(name, {key: round(value, 2) for key, value in figures.items()})
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1))


main()
