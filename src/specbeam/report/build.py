"""`report.html`: one self-contained page of a run. No network, light and dark, printable; without scripts the
answer, the tables, the charts and the outputs are all there, and only the coloured tokens are not."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from specbeam.errors import InputError
from specbeam.report import charts
from specbeam.report.answer import answers
from specbeam.report.escape import escape, script_json
from specbeam.report.outputs import outputs_section, source_letters, speculated, tokens_data
from specbeam.report.tables import environment_section, phases, summary_table
from specbeam.report.terminal import footnotes


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    A run that was interrupted is reported as far as its rows go. Raises InputError for a folder without a run.
    """
    run_folder = Path(run_folder)
    rows = _lines(run_folder / "rows.jsonl")
    config = _document(run_folder / "config.yaml") or {}
    summary = _document(run_folder / "summary.json") or _unfinished(rows, config)
    if not rows and not summary.get("methods"):
        raise InputError(f"{str(run_folder)!r} holds no run (no rows.jsonl, no summary.json): give the folder that "
                         "`specbeam compare` wrote.")
    traces = [trace for trace in _lines(run_folder / "trace.jsonl") if trace.get("tokens")]
    prompts = {prompt["id"]: prompt for prompt in _lines(run_folder / "prompts.jsonl")}
    environment = _document(run_folder / "environment.json") or {}
    page = _page(summary, rows, traces, prompts, config, environment, run_folder.name)
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(summary: dict[str, Any], rows: list[dict[str, Any]], traces: list[dict[str, Any]],
          prompts: dict[str, dict[str, Any]], config: dict[str, Any], environment: dict[str, Any],
          name: str) -> str:
    methods = summary["methods"]
    first, *more = answers(summary)
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(summary))
    scatters = "".join((charts.speed_against_quality(methods, "bleu", "BLEU", "higher is better"),
                        charts.speed_against_quality(methods, "perplexity", "perplexity under the target",
                                                     "lower is better")))
    over = {baseline for figures in methods.values() for baseline in figures["speedup"]}
    baselines = [label for label in methods if label in over]
    sections = [
        ("answer", "", f'<p class="answer">{escape(first)}</p>' + "".join(f"<p>{escape(line)}</p>" for line in more)),
        ("figures", "Figures", summary_table(methods) + (f'<ul class="notes">{notes}</ul>' if notes else "")),
        ("speedups", "Speed-ups", charts.speedups(methods, baselines)),
        ("quality", "Speed and quality", scatters and f'<div class="pair">{scatters}</div>'
         '<p class="notes">Dots: specbeam’s methods; rings: transformers’.</p>'),
        ("acceptance", "Acceptance", charts.acceptance(methods)),
        ("phases", "Time by phase", phases(methods)),
        ("tokens", "Tokens", _tokens(traces)),
        ("outputs", "Outputs", outputs_section(rows, prompts, methods)),
        ("rerun", "To run it again", environment_section(config, environment, summary)),
    ]
    there = [(key, title, body) for key, title, body in sections if body]
    style, script = (files("specbeam.report").joinpath(file).read_text("utf-8") for file in ("report.css", "report.js"))
    return Template(files("specbeam.report").joinpath("report.html").read_text("utf-8")).substitute(
        title=escape(_title(summary, name)), style=style, script=script,
        pair=escape(_pair(summary)),
        links="".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in there if title),
        sections="\n".join(f'<section id="{key}">{title and f"<h2>{escape(title)}</h2>"}{body}</section>'
                           for key, title, body in there),
        data=script_json(tokens_data(traces, prompts)))


def _tokens(traces: list[dict[str, Any]]) -> str:
    if not any(map(speculated, traces)):
        return ""
    seen = {source for trace in traces for source in trace.get("sources", ())}
    drafters = {source: letter for source, letter in source_letters(traces).items()
                if letter not in "pcb" and source in seen}
    names = {source: "drafted" if source == "draft" else f"proposed by {source}" for source in drafters}
    drafted = ", ".join(f'<span class="t {letter}">{escape(names[source])}{"" if number else " and accepted"}</span>'
                        for number, (source, letter) in enumerate(drafters.items()))
    return (f'<p class="legend">A token of the answer was {drafted}{", " if drafted else ""}'
            '<span class="t c">the target’s correction</span>, '
            '<span class="t b">a bonus token behind an accepted proposal</span>, or '
            '<span class="t p">decoded plainly</span>. <span class="t x">Struck out</span>: proposed and rejected. '
            'Hover for round and probabilities; below each answer, its rounds by time, deep blue where '
            'everything down one path was accepted, orange where nothing was.</p><div id="token-view"></div>'
            '<noscript><p>The coloured tokens are drawn by a script; the outputs below are not.</p></noscript>')


def _title(summary: dict[str, Any], name: str) -> str:
    return f"specbeam: {_pair(summary) or name}"


def _pair(summary: dict[str, Any]) -> str:
    target, draft = (_name(summary.get(key)) for key in ("target", "draft"))
    if target == draft == "bundled":
        return "bundled pair"
    return f"{target} with draft {draft}" if target and draft else target


def _name(model: Any) -> str:
    """A model is a path, a hub id, or its settings with a path."""
    if isinstance(model, dict):
        model = model.get("path")
    return "" if model is None else str(model)


def _unfinished(rows: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that has not written one: speed figures of the rows that are there."""
    from specbeam.experiment.statistics import summarise

    methods = {label: settings for label, settings in (config.get("methods") or {}).items()
               if any(row["method"] == label for row in rows)}
    summary = summarise(rows, methods or {row["method"]: {"kind": row["kind"]} for row in rows})
    summary["notes"] = [f"This run was not finished: it has {len(rows)} rows and no summary, so figures of quality "
                        "are missing. The same command with its output_dir finishes it."]
    return summary


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, without a last one that was cut off in the middle; [] without the file."""
    found = []
    for line in path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in found if isinstance(entry, dict)]


def _document(path: Path) -> dict[str, Any] | None:
    """A YAML or JSON file as a dict; None when it is absent or broken."""
    try:
        text = path.read_text("utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None
