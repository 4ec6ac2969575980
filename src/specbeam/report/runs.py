"""A run folder as far as it is whole, and what is missing from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specbeam.errors import InputError
from specbeam.experiment.records import BUSY_CORES


@dataclass(frozen=True)
class Run:
    """What a run folder holds. rows, traces, searches: the lines of rows.jsonl, trace.jsonl and beams.jsonl."""

    folder: Path
    rows: list[dict[str, Any]]
    traces: list[dict[str, Any]]
    searches: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]
    summary: dict[str, Any]  # of summary.json, or computed from the rows that are there
    config: dict[str, Any]
    environment: dict[str, Any]
    missing: list[str]  # sentences

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def pair(self) -> str:
        """`target with draft draft`."""
        if self.target == self.draft == "bundled":
            return "bundled pair"
        return f"{self.target} with draft {self.draft}" if self.target and self.draft else self.target

    @property
    def target(self) -> str:
        return _name(self.summary.get("target") or self.config.get("target"))

    @property
    def draft(self) -> str:
        return _name(self.summary.get("draft") or self.config.get("draft"))


def read_run(folder: Path) -> Run:
    """Raises InputError for what is no run folder, or one without a single row."""
    folder = Path(os.path.expanduser(folder))
    what = str(folder)
    if not folder.exists():
        raise InputError(f"There is no folder {what!r}: give one that `specbeam compare` wrote.")
    if not folder.is_dir():
        raise InputError(f"{what!r} is a file: give the run's folder.")
    rows, broken = _lines(folder / "rows.jsonl")
    rows = [row for row in rows if "method" in row and "prompt_id" in row]
    config, summary = _document(folder / "config.yaml"), _document(folder / "summary.json")
    if not rows and not (summary or {}).get("methods"):
        if config is None:
            raise InputError(f"{what!r} holds no run (no rows.jsonl, no summary.json): give a folder that "
                             "`specbeam compare` wrote.")
        raise InputError(f"{what!r} holds a run without a single row: finish it with the same command and "
                         f"output_dir={what}.")
    config = config or {}
    missing = []
    if not rows:
        missing.append("rows.jsonl is missing: there is only the summary, no outputs.")
    if broken:
        missing.append(f"{broken} line{'s' * (broken > 1)} of rows.jsonl could not be read.")
    traces, searches = (_lines(folder / name)[0] for name in ("trace.jsonl", "beams.jsonl"))
    prompts = {prompt["id"]: prompt for prompt in _lines(folder / "prompts.jsonl")[0] if "id" in prompt}
    environment = _document(folder / "environment.json")
    if summary is None or not isinstance(summary.get("methods"), dict):
        summary = _unfinished(rows, config, prompts)
        if (busy := (environment or {}).get("others_busy_cores_at_start") or 0.0) >= BUSY_CORES:
            summary["notes"].append(f"Other programs were using {busy:.1f} cores when the run started: its timings are "
                                    "not to be trusted.")
    if rows and not traces:
        missing.append("trace.jsonl is missing: tokens cannot be coloured by their source.")
    if not config or environment is None:
        files = [name for name, there in (("config.yaml", config), ("environment.json", environment)) if not there]
        missing.append(f"{' and '.join(files)} {'are' if len(files) > 1 else 'is'} missing: what is needed to run it "
                       "again is not all here.")
    return Run(folder, rows, [trace for trace in traces if trace.get("tokens") and "rounds" in trace],
               [search for search in searches if search.get("steps")], prompts, summary, config, environment or {},
               missing)


def _name(model: Any) -> str:
    """A model is a path, a hub id, or its settings with a path."""
    if isinstance(model, dict):
        model = model.get("path")
    return "" if model is None else str(model)


def _unfinished(rows: Sequence[dict[str, Any]], config: dict[str, Any], prompts: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that has not written one: speed figures of the rows that are there."""
    from specbeam.experiment.statistics import summarise

    planned = config.get("methods") or {}
    only = config.get("only")
    wanted = [only] if isinstance(only, str) else only or list(planned)
    seen = {row["method"]: {"kind": row["kind"]} for row in rows}
    methods = {label: settings for label, settings in planned.items() if label in seen} or seen
    summary = {**summarise(rows, methods), "finished": False}
    resolved = config.get("resolved") or {}
    for name in ("target", "draft", "device", "dtype", "runner", "batch_size"):
        summary[name] = resolved.get(name) or (None if name == "runner" else config.get(name))
    if wanted and prompts and isinstance(config.get("repeats"), int):
        turns = sum(max(1, len(prompt.get("turns") or [])) for prompt in prompts.values())
        of = f" of {len(wanted) * turns * config['repeats']}"
    else:
        of = ""
    absent = [label for label in wanted if label not in seen]
    summary["notes"] = [
        f"This run was not finished: it has {len(rows)}{of} rows and no summary, so figures of quality are missing"
        + (f", and methods {', '.join(absent)} have no row" if absent else "")
        + ". The same command with its output_dir finishes it."]
    return summary


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON lines of a file that can be read, and how many cannot; ([], 0) without the file."""
    found, broken = [], 0
    for line in path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            broken += 1
    return found, broken


def _document(path: Path) -> dict[str, Any] | None:
    """A YAML or JSON file as a dict; None when it is absent or broken."""
    try:
        text = path.read_text("utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None
