"""What Ray costs and brings: rows a minute with 1 and 2 actors against the local executor, and the driver's capacity.

    python benchmarks/ray_executor.py [--prompts 40] [--rounds 2] [--no-op-cells 10000] [--out FILE.jsonl]
                                      [--figure FILE.svg]

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
from statistics import linear_regression, mean
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
COLOURS = (("#c9d1d9", 110, "start, until the first row"), ("#1766c2", 290, "rows"), ("#5fb3ab", 350, "judging"))
TURN = 0.05  # seconds between two looks at rows.jsonl


class Idle:
    """An actor whose cells do nothing but fill a row."""

    def run(self, cells: list[Cell], answers: Any) -> Any:
        return [([{"method": cell.method.label, "prompt_id": cell.prompts[0].id, "turn": 0, "repeat": 0, "status": "ok",
                   "text": "", "tokens": list(range(64))}], [], []) for cell in cells]  # fmt: skip


def whole_run(prompts: int, threads: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Seconds of a run, of its start (until its first row), and rows a minute (the slope of their count)."""
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
    slope = linear_regression(*zip(*times, strict=True)).slope  # from end to end would count one actor's first unit
    return {"seconds": seconds, "until_first_row": times[0][0], "rows": times[-1][1], "until_last_row": times[-1][0],
            "rows_per_minute": 60 * slope}  # fmt: skip


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
    # As many units on their way as 1,000 actors would have: each of these slots is one of the two.
    many = Crew(crew.start, (), 60.0, {slot: crew.actors[slot % actors] for slot in range(1000)})
    start = time.monotonic()
    run_units(many, units_of(made), {}, lambda outcomes: None)
    crowded = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        rows = crew.run(Path(folder), made, [], Console(quiet=True))
        written = time.monotonic() - start
    ray.shutdown()
    assert len(rows) == cells
    for name, seconds in (("driver, dealing out", dealt), ("driver, 1,000 units on their way", crowded),
                          ("driver, writing too", written)):
        yield name, {"cells": cells, "seconds": seconds, "cells_per_second": cells / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-op-cells", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="where the bars of what --out holds are drawn")
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
    if chosen.figure and chosen.out:
        chosen.figure.write_text(figure([json.loads(line) for line in chosen.out.read_text().splitlines()]), "utf-8")


def figure(lines: list[dict[str, Any]]) -> str:
    """Bars of seconds, means over rounds: until the first row, until the last, judging and reporting."""
    runs = {name: [line for line in lines if line["what"] == name] for name in RUNS}
    scale = 380 / max(line["seconds"] for some in runs.values() for line in some)
    parts = []
    for place, (name, some) in enumerate(runs.items()):
        first, last, end, rate = (mean(line[key] for line in some) for key in (
            "until_first_row", "until_last_row", "seconds", "rows_per_minute"))  # fmt: skip
        y = 34 + 26 * place
        for begin, stop, (colour, _, _) in zip((0.0, first, last), (first, last, end), COLOURS, strict=True):
            parts.append(f'<rect x="{110 + begin * scale:.1f}" y="{y}" width="{(stop - begin) * scale:.1f}" '
                         f'height="16" fill="{colour}"/>')
        parts.append(f'<text x="104" y="{y + 12}" text-anchor="end">{name}</text>'
                     f'<text x="{116 + end * scale:.1f}" y="{y + 12}">{end:.0f} s, {rate:.0f} rows a minute</text>')
    legend = "".join(f'<rect x="{x}" y="8" width="10" height="10" fill="{colour}"/>'
                     f'<text x="{x + 14}" y="17">{what}</text>' for colour, x, what in COLOURS)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {44 + 26 * len(runs)}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{legend}{"".join(parts)}</svg>\n')


if __name__ == "__main__":
    main()
