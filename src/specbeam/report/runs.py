"""A run folder as far as it is whole, and what is missing from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specbeam.errors import InputError
from specbeam.experiment.records import BUSY_CORES, busiest_start
from specbeam.paths import from_user

LINES = ("rows.jsonl", "trace.jsonl", "beams.jsonl", "prompts.jsonl")


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
    folder = from_user(folder)
    what = str(folder)
    if not folder.exists():
        raise InputError(f"There is no folder {what!r}: give one that `specbeam compare` wrote.")
    if not folder.is_dir():
        raise InputError(f"{what!r} is a file: give the run's folder.")
    broken: dict[str, int] = {}
    rows, traces, searches, asked = (_lines(folder / name, broken) for name in LINES)
    rows = [row for row in rows if "method" in row and "prompt_id" in row]
    config, summary = _document(folder / "config.yaml"), _document(folder / "summary.json")
    if not rows and not (summary or {}).get("methods"):
        if (folder / "forecast.json").is_file():
            raise InputError(f"{what!r} holds a forecast and no run: forecast.json and forecast.svg in it are its "
                             "report; give a folder that `specbeam compare` wrote.")
        if config is None:
            raise InputError(f"{what!r} holds no run (no rows.jsonl, no summary.json): give a folder that "
                             "`specbeam compare` wrote.")
        raise InputError(f"{what!r} holds a run without a single row: finish it with the same command and "
                         f"output_dir={what}.")
    config = config or {}
    missing = []
    if not rows:
        missing.append("rows.jsonl is missing: there is only the summary, no outputs.")
    missing += [f"{count} line{'s' * (count > 1)} of {name} could not be read." for name, count in broken.items()]
    prompts = {prompt["id"]: prompt for prompt in asked if "id" in prompt}
    environment = _document(folder / "environment.json")
    if summary is None or not isinstance(summary.get("methods"), dict):
        summary = _unfinished(rows, config, prompts)
        if (busy := busiest_start(environment or {})) >= BUSY_CORES:
            summary["notes"].append(f"Other programs were using {busy:.1f} cores when the run started: its timings are "
                                    "not to be trusted.")
    if rows and not traces and "trace.jsonl" not in broken:
        missing.append("trace.jsonl is missing: tokens cannot be coloured by their source.")
    if rows and not searches and "beams.jsonl" not in broken and _kept_trees(rows, config):
        missing.append("beams.jsonl is missing: the search trees cannot be drawn.")
    if rows and not prompts and "prompts.jsonl" not in broken:
        missing.append("prompts.jsonl is missing: what was asked cannot be shown beside the outputs.")
    if not config or environment is None:
        files = [name for name, there in (("config.yaml", config), ("environment.json", environment)) if not there]
        missing.append(f"{' and '.join(files)} {'are' if len(files) > 1 else 'is'} missing: what is needed to run it "
                       "again is not all here.")
    return Run(folder, rows, [trace for trace in traces if trace.get("tokens") and "rounds" in trace],
               [search for search in searches if search.get("steps")], prompts, summary, config, environment or {},
               missing)


def _kept_trees(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> bool:
    """Whether a method that answered was to keep its search trees (those of the first repeat are kept)."""
    methods = (config.get("resolved") or {}).get("methods") or {}
    return any((methods.get(row["method"]) or {}).get("trace") and row["status"] == "ok" and row["repeat"] == 0
               for row in rows)


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


def _lines(path: Path, broken: dict[str, int]) -> list[dict[str, Any]]:
    """The JSON lines of a file that can be read, none without the file; those that cannot are counted in `broken`."""
    found = []
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
            broken[path.name] = broken.get(path.name, 0) + 1
    return found


def _document(path: Path) -> dict[str, Any] | None:
    """A YAML or JSON file as a dict; None when it is absent or broken."""
    try:
        text = path.read_text("utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None
