"""`report.html`: one self-contained page of a run, or of several side by side. No network, light and dark, printable;
without scripts the answer, the tables, the charts and the outputs are all there, and only what is drawn of tokens and
beams is not."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from specbeam.errors import InputError
from specbeam.experiment.records import unwritten
from specbeam.report import charts
from specbeam.report.answer import answers, tiles
from specbeam.report.beams import beams_data
from specbeam.report.categories import category_table
from specbeam.report.escape import escape, script_json
from specbeam.report.outputs import (
    BEAM_SHARE,
    OUTPUT_SHARE,
    PAGE_BYTES,
    TOKEN_SHARE,
    outputs_section,
    source_letters,
    speculated,
    tokens_data,
)
from specbeam.report.prediction import prediction_section
from specbeam.report.quality import quality_tables
from specbeam.report.runs import Run, read_run
from specbeam.report.side_by_side import names_of, overview
from specbeam.report.tables import environment_section, phases, summary_table
from specbeam.report.terminal import footnotes


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    A run that was interrupted is reported as far as its rows go. Raises InputError for a folder without a run.
    """
    run = read_run(Path(run_folder))
    path = run.folder / "report.html"
    text = page([run])
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(unwritten(path, error)) from None
    return path


def page(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several: an overview, then each in a tab of its own."""
    shared = PAGE_BYTES // len(runs)
    views = [{"tokens": tokens_data(run.traces, run.prompts, int(shared * TOKEN_SHARE)),
              "beams": beams_data(run.searches, run.prompts, int(shared * BEAM_SHARE))} for run in runs]
    if len(runs) == 1:
        [run] = runs
        sections = [*_answer(run), *_sections(run, 0, views[0], int(shared * OUTPUT_SHARE))]
        title, subtitle, body = f"specbeam: {run.pair or run.name}", run.pair, _html(sections, "")
    else:
        names = names_of(runs)
        sections = overview(runs, names)
        title, subtitle = f"specbeam: {len(runs)} runs", ", ".join(names)
        tabs = "".join(f'<a href="#run-{i}">{escape(name)}</a>' for i, name in enumerate(names))
        parts = "".join(
            f'<article class="run" id="run-{i}">'
            f'<h2 class="run-name">{escape(name)} <small>{escape(run.pair)}</small></h2>'
            + _html([*_answer(run), *_sections(run, i, views[i], int(shared * OUTPUT_SHARE))], f"-{i}") + "</article>"
            for i, (run, name) in enumerate(zip(runs, names, strict=True)))
        body = _html(sections, "") + f'<nav class="tabs">{tabs}</nav>{parts}'
        sections = sections[1:]
    style, script = (files("specbeam.report").joinpath(file).read_text("utf-8") for file in ("report.css", "report.js"))
    return Template(files("specbeam.report").joinpath("report.html").read_text("utf-8")).substitute(
        title=escape(title), style=style, script=script, pair=escape(subtitle), sections=body,
        links="".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, content in sections if name and content),
        data=script_json({"runs": views}))


def _html(sections: Sequence[tuple[str, str, str]], suffix: str) -> str:
    return "\n".join(
        f'<section id="{key}{suffix}" class="s-{key}">{name and f"<h2>{escape(name)}</h2>"}{body}</section>'
        for key, name, body in sections if body)


def _answer(run: Run) -> list[tuple[str, str, str]]:
    first, *more = answers(run.summary)
    figures = "".join(f'<div class="tile {css}"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
                      for value, what, css in tiles(run.summary))
    missing = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.missing)
    body = (f'<p class="answer">{escape(first)}</p>' + (f'<div class="tiles">{figures}</div>' if figures else "")
            + "".join(f"<p>{escape(line)}</p>" for line in more)
            + (f'<ul class="missing">{missing}</ul>' if missing else ""))
    return [("answer", "", body)]


def _sections(run: Run, number: int, views: dict[str, Any], output_bytes: int) -> list[tuple[str, str, str]]:
    summary, methods = run.summary, run.summary["methods"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(summary))
    scatters = "".join((charts.speed_against_quality(methods, "bleu", "BLEU", "higher is better"),
                        charts.speed_against_quality(methods, "chrf", "chrF", "higher is better"),
                        charts.speed_against_quality(methods, "exact_match", "exact match", "higher is better"),
                        charts.speed_against_quality(methods, "perplexity", "perplexity under the target",
                                                     "lower is better")))
    over = {baseline for figures in methods.values() for baseline in figures["speedup"]}
    baselines = [label for label in methods if label in over]
    speedups = charts.speedups(methods, baselines)
    return [
        ("figures", "Figures", summary_table(methods) + (f'<ul class="notes">{notes}</ul>' if notes else "")),
        ("speedups", "Speed-ups", speedups and f'<div class="wide">{speedups}</div>'),
        ("categories", "Speed-up by category", category_table(run.rows, methods)),
        ("quality", "Speed and quality", (scatters and f'<div class="pair">{scatters}</div>'
         '<p class="notes">Dots: specbeam’s methods; rings: others’.</p>') + quality_tables(methods)),
        ("acceptance", "Acceptance", charts.acceptance(methods) + prediction_section(run.rows, methods)),
        ("phases", "Time by phase", phases(methods)),
        ("tokens", "Tokens", _tokens(run.traces, number)),
        ("beams", "Beams", _beams(number) if views["beams"]["answers"] else ""),
        ("outputs", "Outputs", outputs_section(run.rows, run.prompts, methods, output_bytes)),
        ("rerun", "To run it again", environment_section(run.config, run.environment, summary)),
    ]


def _tokens(traces: list[dict[str, Any]], number: int) -> str:
    if not any(map(speculated, traces)):
        return ""
    seen = {source for trace in traces for source in trace.get("sources", ())}
    drafters = {source: letter for source, letter in source_letters(traces).items()
                if letter not in "pcb" and source in seen}
    names = {source: "drafted" if source == "draft" else f"proposed by {source}" for source in drafters}
    drafted = ", ".join(f'<span class="t {letter}">{escape(names[source])}{"" if place else " and accepted"}</span>'
                        for place, (source, letter) in enumerate(drafters.items()))
    return (f'<p class="legend">A token of the answer was {drafted}{", " if drafted else ""}'
            '<span class="t c">the target’s correction</span>, '
            '<span class="t b">a bonus token behind an accepted proposal</span>, or '
            '<span class="t p">decoded plainly</span>. <span class="t x">Struck out</span>: proposed and rejected. '
            'Hover for round and probabilities. Time lines: one piece a round, deep blue where '
            'everything down one path was accepted, orange where nothing was, grey without a proposal.</p>'
            f'<div class="token-view" data-run="{number}"></div>'
            '<noscript><p>The coloured tokens are drawn by a script; the outputs below are not.</p></noscript>')


def _beams(number: int) -> str:
    return ('<p class="legend">The search tree, one column a step: <span class="k win">the winner’s path</span>, '
            '<span class="k alive">led to another finished hypothesis</span>, <span class="k dead">survived and was '
            'dropped later</span>, <span class="k lost">ranked and lost</span>; <span class="k end">■</span> a '
            'hypothesis finished. Hover for scores.</p>'
            f'<div class="beam-view" data-run="{number}"></div>'
            '<noscript><p>The trees are drawn by a script; beams.jsonl has them.</p></noscript>')
