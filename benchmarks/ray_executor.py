"""What Ray costs and brings: rows a minute with 1 and 2 actors against the local executor, and the driver's capacity.

    python benchmarks/ray_executor.py [--prompts 16] [--rounds 2] [--no-op-cells 10000] [--out FILE.jsonl]

Needs Ray (pip install 'specbeam[ray]'). The runs are whole `specbeam compare` commands on the bundled pair, eager, one
core an actor; of the local executor with one thread (what one actor has) and with two. Rounds are interleaved. The
capacity is that of the driver's own loop, with two actors whose cells do nothing: dealing out, collecting, writing.
A measurement that FILE holds is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from specbeam.experiment.compose import compose
from specbeam.experiment.plan import Cell, make_plan
from specbeam.experiment.prompts import Prompt
from specbeam.experiment.ray_executor import Crew, Unit, run_units, units_of

ON_RAY = ("executor=ray", "ray.address=local", "ray.cpus_per_actor=1")
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {  # threads, overrides
    "local, 1 thread": (1, ()), "local, 2 threads": (2, ()),
    "1 actor": (1, (*ON_RAY, "ray.actors=1")), "2 actors": (1, (*ON_RAY, "ray.actors=2"))}  # fmt: skip
TURN = 0.05  # seconds between two looks at rows.jsonl


class Idle:
    """An actor whose cells do nothing but fill a row."""

    def run(self, cells: list[Cell], answers: Any) -> Any:
        return [([{"method": cell.method.label, "prompt_id": cell.prompts[0].id, "turn": 0, "repeat": 0, "status": "ok",
                   "text": "", "tokens": list(range(64))}], [], []) for cell in cells]  # fmt: skip


def whole_run(prompts: int, threads: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Seconds of a run, of its start (until its first row) and rows a minute from then on."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "run"
        command = [sys.executable, "-m", "specbeam", "compare", "only=[greedy,speculative]", "prompt_set=all",
                   f"prompt_set.limit={prompts}", "repeats=1", "runner=eager", "wandb.mode=disabled", "device=cpu",
                   "forecast=false", f"output_dir={folder}", *overrides]  # fmt: skip
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        times: list[tuple[float, int]] = []
        while process.poll() is None:
            time.sleep(TURN)
            rows = folder / "rows.jsonl"
            count = rows.read_bytes().count(b"\n") if rows.exists() else 0
            if count and (not times or count > times[-1][1]):
                times.append((time.monotonic() - start, count))
        seconds = time.monotonic() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    (first, few), (last, all_) = times[0], times[-1]
    return {"seconds": seconds, "until_first_row": first, "rows": all_, "until_last_row": last,
            "rows_per_minute": 60 * (all_ - few) / (last - first)}  # fmt: skip


def capacity(cells: int, actors: int = 2) -> Iterator[tuple[str, dict[str, float]]]:
    """Cells a second that the driver takes: dealt out and collected only, and written to the disk as well."""
    import ray

    ray.init(address="local", num_cpus=actors, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    template = next(make_plan(compose("config", ['prompts=["-"]', "only=[greedy]"])).cells())
    made = [Cell(template.method, (Prompt(f"prompt {n}", "chat", ("-",)),), 0, 0, f"greedy/{n}") for n in range(cells)]
    crew = Crew(ray.remote(num_cpus=1, max_restarts=0)(Idle).remote, (), 60.0)
    crew.actors = {slot: crew.start() for slot in range(actors)}
    ray.get([actor.run.remote([], {}) for actor in crew.actors.values()])
    units: list[Unit] = units_of(made)
    start = time.monotonic()
    run_units(crew, units, {}, lambda outcomes: None)
    dealt = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        rows = crew.run(Path(folder), made, [], Console(quiet=True))
        written = time.monotonic() - start
    ray.shutdown()
    assert len(rows) == cells
    for name, seconds in (("driver, dealing out", dealt), ("driver, writing too", written)):
        yield name, {"cells": cells, "seconds": seconds, "cells_per_second": cells / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-op-cells", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    lines = chosen.out.read_text().splitlines() if chosen.out and chosen.out.exists() else []
    found = {(line["what"], line["round"]) for line in map(json.loads, lines)}

    def say(name: str, number: int, figures: dict[str, float]) -> None:
        print(name, {key: round(value, 2) for key, value in figures.items()}, flush=True)
        if chosen.out:
            with chosen.out.open("a") as file:
                file.write(json.dumps({"what": name, "round": number, **figures}) + "\n")

    for number in range(chosen.rounds):
        for name, (threads, overrides) in RUNS.items():
            if (name, number) not in found:
                say(name, number, whole_run(chosen.prompts, threads, overrides))
        if ("driver, writing too", number) not in found:
            for name, figures in capacity(chosen.no_op_cells):
                say(name, number, figures)


main()
