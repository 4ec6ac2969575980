"""The run folder: config.yaml, environment.json, prompts.jsonl, rows.jsonl, trace.jsonl, beams.jsonl, summary.json.

`rows.jsonl` is the record of truth: a row is there once it is flushed, whatever happens next.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specbeam.errors import InputError
from specbeam.experiment.compose import flatten

# Keys that change nothing about the rows: a resumed run may differ in them.
FREE_KEYS = ("output_dir", "wandb", "debug", "trace", "ray")
BUSY_CORES = 0.3  # used by others: timings suffer

RowKey = tuple[str, str, int, int]


def row_key(row: dict[str, Any]) -> RowKey:
    """(method, prompt id, turn, repeat): unique in a run."""
    return row["method"], row["prompt_id"], row["turn"], row["repeat"]


def new_folder(root: Path) -> Path:
    """`root/<date-time>`, made; with a number behind it when two runs start in one second."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = root / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(_unusable(folder, error)) from None
        return folder
    raise InputError(f"{str(root / stamp)!r} exists a thousand times over: give output_dir=<folder>.")


def holds_run(folder: Path, config: dict[str, Any], prompts: list[dict[str, Any]]) -> bool:
    """Whether `folder` holds an interrupted or finished run of this config and these prompts. Writes nothing.

    Raises InputError when it holds something else: other files, a run with another config or other prompts.
    """
    try:
        if (folder / "config.yaml").exists():
            _refuse_other_run(folder, config, prompts)
            return True
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"output_dir {str(folder)!r} holds other files and no run: give a new or an empty folder.")
        check_writable(folder)
    except OSError as error:
        raise InputError(_unusable(folder, error)) from None
    return False


def check_writable(folder: Path) -> None:
    """Raises InputError for an output_dir that cannot be made or written: to be asked before a model is loaded."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"output_dir {str(folder)!r} cannot be used ({str(there)!r} is read-only): give another "
                             "folder.")
        if not there.is_dir():
            raise InputError(f"output_dir {str(folder)!r} cannot be used ({str(there)!r} is a file): give another "
                             "folder.")
    except OSError as error:
        raise InputError(_unusable(folder, error)) from None


def start_run(folder: Path, config: dict[str, Any], resolved: dict[str, Any], prompts: list[dict[str, Any]]) -> None:
    """Write what is known before the first row: prompts.jsonl, and config.yaml with what the loaded models told."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / "prompts.jsonl", prompts)
        # last: with it the folder is a run
        write_yaml(folder / "config.yaml", {**config, "resolved": resolved})
    except OSError as error:
        raise InputError(_unusable(folder, error)) from None


def refuse_other_models(folder: Path, resolved: dict[str, Any]) -> None:
    """Raise InputError when the run in `folder` was made with other models or on another device."""
    before = flatten({"resolved": read_yaml(folder / "config.yaml").get("resolved") or {}})
    now = json.loads(json.dumps(flatten({"resolved": resolved}), default=str))
    for key in {**before, **now}:
        if before.get(key, ...) != now.get(key, ...):
            raise InputError(
                f"output_dir {str(folder)!r} holds a run on other models or another machine: {key} was "
                f"{_shown(before.get(key))} and is {_shown(now.get(key))} now: give another output_dir."
            )


def _unusable(folder: Path, error: OSError) -> str:
    return f"output_dir {str(folder)!r} cannot be used ({error.strerror or error}): give another folder."


def _refuse_other_run(folder: Path, config: dict[str, Any], prompts: list[dict[str, Any]]) -> None:
    before, now = _binding(read_yaml(folder / "config.yaml")), _binding(config)
    differing = [key for key in {**before, **now} if before.get(key, ...) != now.get(key, ...)]
    advice = "give another output_dir, or the same command as before to finish that run."
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:4])})" if differing[1:] else ""
        raise InputError(
            f"output_dir {str(folder)!r} holds a run with another config: {key} was "
            f"{_shown(before.get(key, '(not set)'))} and is {_shown(now.get(key, '(not set)'))} now{more}: "
            f"{advice}"
        )
    if (folder / "prompts.jsonl").exists() and read_lines(folder / "prompts.jsonl") != prompts:
        raise InputError(
            f"output_dir {str(folder)!r} holds a run with other prompts (the prompt file has changed): {advice}"
        )


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in (*FREE_KEYS, "resolved")}
    # as the YAML file would give them back
    return json.loads(json.dumps(flatten(kept), default=str))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "…"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row; a last line that the interruption cut in half is dropped."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row_key(row)
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InputError(
                f"{path}, line {number} is no row of a run: remove the line, or give another output_dir."
            ) from None
        rows.append(row)
    return rows


def keep_finished(folder: Path, cells: Iterable[list[RowKey]]) -> list[dict[str, Any]]:
    """Rewrite rows.jsonl and trace.jsonl to the rows of cells that are whole and did not fail; return those rows.

    The seconds of a batch belong to all its rows, so a batch with a row missing is run again as a whole.
    """
    rows = {row_key(row): row for row in read_rows(folder / "rows.jsonl") if row.get("status") == "ok"}
    whole = {key for keys in cells if all(key in rows for key in keys) for key in keys}
    kept = [row for key, row in rows.items() if key in whole]
    write_lines(folder / "rows.jsonl", kept)
    for name in ("trace.jsonl", "beams.jsonl"):
        traces = [trace for trace in read_traces(folder, name) if (*trace_key(trace), 0) in whole]
        if traces or (folder / name).exists():
            write_lines(folder / name, traces)
    return kept


def trace_key(trace: dict[str, Any]) -> tuple[str, str, int]:
    return trace["method"], trace["prompt_id"], trace["turn"]


def read_traces(folder: Path, name: str = "trace.jsonl") -> list[dict[str, Any]]:
    """The whole lines of trace.jsonl (or beams.jsonl), the last of each answer; a line that cannot be read is left out
    (the rows are the record)."""
    path = folder / name
    traces: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            trace = json.loads(line)
            traces[trace_key(trace)] = trace
        except (ValueError, KeyError, TypeError):
            continue
    return list(traces.values())


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append in one write and wait for the disk."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    before = None
    try:
        with open(path, "ab", buffering=0) as file:
            before, left = file.tell(), memoryview(text.encode("utf-8", errors="replace"))
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
    except OSError as error:
        if before is not None:
            with suppress(OSError):
                os.truncate(path, before)  # no half line stays
        raise InputError(unwritten(path, error)) from None


def append_cells(folder: Path, rows: list[dict], traces: list[dict], searches: list[dict]) -> None:
    """What finished cells gave; the rows last, since with them a cell counts as done."""
    for name, lines in (("trace.jsonl", traces), ("beams.jsonl", searches), ("rows.jsonl", rows)):
        if lines:
            append_lines(folder / name, lines)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    _replace(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text("utf-8"))
    assert isinstance(value, dict)
    return value


def write_json(path: Path, value: Any) -> None:
    _replace(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    import yaml

    plain = json.loads(json.dumps(value, default=str))
    _replace(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110))


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} is no config of a run: give another output_dir.")
    return value


def _replace(path: Path, text: str) -> None:
    """The old content or the new, never half of it. Raises InputError when the disk does not take it."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(unwritten(path, error)) from None


def unwritten(path: Path, error: OSError) -> str:
    return (f"{str(path)!r} cannot be written ({error.strerror or error}): the rows finished so far are kept; mend "
            f"that and give the same command with output_dir={str(path.parent)!r} to finish the run.")


def environment(device: str, dtype: str, runner: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Where the numbers come from: versions, commit, processor, load, accelerator."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **{name: _version(name) for name in ("specbeam", "torch", "transformers", "tokenizers")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "gpu": gpus,
        "cuda": torch.version.cuda,
        "device": device,
        "dtype": dtype,
        "runner": runner,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def reset_peak_memory(device: Any) -> None:
    """From now on `peak_memory` counts anew."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Any) -> int | None:
    """Most bytes in use since the reset, weights included: on a GPU what torch allocated there; on a CPU the whole
    process (Linux; elsewhere None). Waits for nothing."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return None


class OthersLoad:
    """How many cores other programs used on average since this was made: the machine's busy time less our own."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = self._now()

    def cores(self) -> float:
        now, busy, own = self._now()
        return max(0.0, (busy - self.busy) - (own - self.own)) / max(now - self.started, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        import psutil

        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # already in user and nice
        mine = os.times()
        return time.perf_counter(), sum(times) - idle - guests, sum(mine[:4])


def busy_cores() -> float:
    """How many cores others are using just now. Blocks for half a second, in which this process idles."""
    import psutil

    return psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)


def busiest_start(environment: dict[str, Any]) -> float:
    """Of environment.json: the most cores that others were using when the run started or went on."""
    parts = (environment, *environment.get("resumed", []))
    return max(part.get("others_busy_cores_at_start") or 0.0 for part in parts)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of specbeam's own checkout, with -dirty; None for an installed package."""
    package = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments],
            check=True,
            timeout=10,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ).stdout.strip()

    try:
        if not git("ls-files", "errors.py"):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or sys.platform
