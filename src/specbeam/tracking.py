"""Weights & Biases: the config, a table of samples with coloured tokens, charts, the summary and the report as an
artifact, logged when the timed part is over.

The run folder is the record; this is a copy for those who look there, and nothing here may break or delay a run.
"""

from __future__ import annotations

import netrc
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from specbeam.experiment.records import read_traces, trace_key
from specbeam.paths import from_user
from specbeam.report.coloured import coloured_answer

REACH_SECONDS = 3.0  # to answer at all
INIT_SECONDS = 10.0  # to open a run
FINISH_SECONDS = 30.0  # to upload; what is left then lies in the folder for `wandb sync`
SAMPLE_COLUMNS = ("method", "prompt_id", "turn", "category", "new_tokens", "finish_reason", "text")
MOST_COLOURED = 200  # answers, each a file of its own


def track(folder: Path, config: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """Log a finished run as `config["wandb"]["mode"]` says; files go to `folder`/wandb.

    Returns sentences for the user: none when all went well. Never raises (but KeyboardInterrupt), and an unreachable
    server costs seconds: the run is then logged offline.
    """
    mode = config["wandb"]["mode"]
    if mode == "disabled":
        return []
    notes = []
    if mode == "online":
        reason = why_not_online()
        if reason is None:
            try:
                _log("online", folder, config, rows, summary)
                return []
            except Exception as error:  # whatever the client or the server says
                reason = " ".join(str(error).split())[:200] or type(error).__name__
        notes.append(
            f"W&B could not be reached ({reason}): the run was logged offline; "
            f"send it later with: wandb sync {folder / 'wandb'}/offline-run-*"
        )
    try:
        _log("offline", folder, config, rows, summary)
    except Exception as error:
        notes = [
            f"W&B logging failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
            f"the run folder {folder} has everything."
        ]
    return notes


def why_not_online() -> str | None:
    """A reason not to try (no key, no answer from the server), found within seconds; None: try."""
    server = _server()
    if not _has_key(server):
        return "no API key: run `wandb login` or set WANDB_API_KEY"
    try:
        urllib.request.urlopen(server, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError, HTTPException) as error:
        return f"{server} does not answer: {getattr(error, 'reason', error)}"
    return None


def _server() -> str:
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def _has_key(server: str) -> bool:
    """Whether there is a key, so that the client need not ask for one: in the environment or left by `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = from_user(os.environ.get("NETRC") or "~/.netrc")
    try:
        saved = netrc.netrc(str(path))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(saved.authenticators(host) for host in (urlparse(server).hostname or "", "api.wandb.ai"))


def _log(
    mode: Literal["offline", "online"],
    folder: Path,
    config: dict[str, Any],
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    (folder / "wandb").mkdir(exist_ok=True)
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    home = {name: str(folder / "wandb" / "cache") for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    before = {name: os.environ.get(name) for name in (*quiet, *home)}
    os.environ.update(quiet)
    for name, value in home.items():
        os.environ.setdefault(name, value)
    try:
        import wandb

        wanted: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "login_timeout": REACH_SECONDS,  # should the client want to ask for a key after all
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_save_requirements": False,
            "disable_git": True,
            "disable_code": True,
        }
        if mode == "online":
            wanted["base_url"] = _server()
        # an older client lacks some of them
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        run = wandb.init(
            project=config["wandb"]["project"],
            name=folder.name,
            dir=str(folder),
            mode=mode,
            config=config,
            settings=wandb.Settings(**known),
        )
        try:
            run.log({"samples": samples(wandb, rows, read_traces(folder)), **charts(wandb, summary["methods"])})
            run.summary.update(_plain(summary["methods"]))
            if (folder / "report.html").exists():
                artifact = wandb.Artifact(f"report-{run.id}", type="report")
                artifact.add_file(str(folder / "report.html"))
                run.log_artifact(artifact)
        finally:
            run.finish()
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def samples(wandb: Any, rows: list[dict[str, Any]], traces: list[dict[str, Any]]) -> Any:
    """A table of every answer of the first repeat; the first answers with their tokens coloured by source."""
    coloured = {trace_key(trace): coloured_answer(trace) for trace in traces[:MOST_COLOURED]}
    table = wandb.Table(columns=[*SAMPLE_COLUMNS, *(["tokens"] if coloured else [])])
    for row in rows:
        if row["status"] == "ok" and row["repeat"] == 0:
            html = coloured.get(trace_key(row))
            cell = [wandb.Html(html, inject=False) if html else None] if coloured else []
            table.add_data(*(row[column] for column in SAMPLE_COLUMNS), *cell)
    return table


def charts(wandb: Any, methods: dict[str, Any]) -> dict[str, Any]:
    """Decode rates, speed against perplexity and acceptance by position, where there are figures for them."""
    found = {}
    rates = [[label, one["decode_tokens_per_second"], one.get("perplexity")] for label, one in methods.items()
             if one.get("decode_tokens_per_second")]
    if rates:
        table = wandb.Table(columns=["method", "tokens a second"], data=[row[:2] for row in rates])
        found["charts/decode rate"] = wandb.plot.bar(table, "method", "tokens a second", title="Decode rate")
    if scored := [row for row in rates if row[2] is not None]:
        table = wandb.Table(columns=["method", "tokens a second", "perplexity"], data=scored)
        found["charts/speed and quality"] = wandb.plot.scatter(table, "tokens a second", "perplexity",
                                                               title="Speed and quality")
    if lines := {label: one["acceptance_by_position"] for label, one in methods.items()
                 if one.get("acceptance_by_position")}:
        found["charts/acceptance"] = wandb.plot.line_series(
            xs=[list(range(1, len(line) + 1)) for line in lines.values()], ys=list(lines.values()),
            keys=list(lines), title="Accepted, by position of the proposal", xname="position")
    return found


def _plain(figures: Any) -> Any:
    """Without None, which a W&B summary shows as text."""
    if isinstance(figures, dict):
        return {str(key): _plain(value) for key, value in figures.items() if value is not None}
    return figures
