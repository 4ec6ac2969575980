"""Several runs on one page: their figures side by side, and whether they may be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from specbeam.experiment.compose import flatten
from specbeam.report.answer import answers, interval, rate, rounded
from specbeam.report.escape import escape
from specbeam.report.runs import Run
from specbeam.report.tables import with_interval
from specbeam.report.terminal import same_output, speedup_over

# Keys of a config that say nothing about what was run.
UNTOLD = ("output_dir", "wandb", "debug", "methods", "experiment", "resolved")
VERSIONS = ("specbeam", "git_commit", "torch", "transformers", "cpu", "gpu")
MOST_DIFFERENCES = 24


def names_of(runs: Sequence[Run]) -> list[str]:
    """Folder names, with their parents' where two are the same."""
    names = [run.name for run in runs]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{run.folder.resolve().parent.name}/{name}" if name in twice else name
            for run, name in zip(runs, names, strict=True)]


def not_comparable(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Sentences: what forbids to compare these runs' figures with one another, the weightiest first."""
    def differ(values: Sequence[Any]) -> bool:
        return len({str(value) for value in values}) > 1

    found = []
    # int8 weights are another model than the one they were rounded from
    targets = [f"{run.target} with int8 weights" if rounded(run.summary) else run.target for run in runs]
    if differ(targets):
        each = ", ".join(f"{name}: {target or 'unknown'}" for name, target in zip(names, targets, strict=True))
        found.append(f"Not comparable: the runs have different targets ({each}). Neither speeds nor outputs say which "
                     "setting is better.")
    if differ([sorted((name, str((asked.get("turns"), asked.get("messages")))) for name, asked in run.prompts.items())
               for run in runs]):
        found.append("Other prompts: tokens a second of different texts are not comparable, speed-ups only roughly.")
    if unfinished := [name for name, run in zip(names, runs, strict=True) if not run.summary.get("finished", True)]:
        found.append(f"Not finished: {', '.join(unfinished)}; its figures are of fewer rows.")
    machines = [(run.environment.get("cpu"), run.environment.get("gpu"), run.summary.get("device"),
                 run.environment.get("cores")) for run in runs]
    if differ(machines):
        found.append("Other machines: compare speed-ups, not tokens a second.")
    if differ([run.summary.get("dtype") for run in runs]):
        each = ", ".join(f"{name}: {run.summary.get('dtype')}" for name, run in zip(names, runs, strict=True))
        found.append(f"Other number formats ({each}): outputs may differ by rounding.")
    return found


def overview(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(id, heading, HTML) of the sections above the runs."""
    warnings = not_comparable(runs, names)
    sentences = "".join(f"<p><b>{escape(name)}</b>: {escape(answers(run.summary)[0])}</p>"
                        for name, run in zip(names, runs, strict=True))
    apart = bool(warnings) and warnings[0].startswith("Not comparable")
    marked = "".join(f'<li class="{"bad" if apart and not i else ""}">{escape(one)}</li>'
                     for i, one in enumerate(warnings))
    return [("answer", "", sentences + (f'<ul class="missing">{marked}</ul>' if marked else "")),
            ("side-by-side", "Side by side", _table(runs, names, apart)),
            ("differences", "What differs", _differences(runs, names))]


def _table(runs: Sequence[Run], names: Sequence[str], apart: bool) -> str:
    columns = [("tokens/s", lambda f, m: rate(f) if f.get("decode_tokens_per_second") else "–"),
               ("× plain", lambda f, m: interval(speedup_over(f, False, m))),
               ("accepted length", lambda f, m: _number(f.get("mean_accepted_length"), ".2f")),
               ("same output", lambda f, m: same_output(f)),
               ("BLEU", lambda f, m: _number(f.get("bleu"), ".1f"))]
    shown = [[(name, cell) for name, cell in columns
              if any(cell(f, run.summary["methods"]) != "–" for f in run.summary["methods"].values())] for run in runs]
    head = "".join(f'<th scope="colgroup" colspan="{len(own)}" class="edge">{escape(name)}'
                   f'{" <small>not comparable</small>" if apart else ""}</th>'
                   for name, own in zip(names, shown, strict=True))
    second = "".join(f'<th scope="col"{_edge(i)}>{escape(name)}</th>'
                     for own in shown for i, (name, _) in enumerate(own))
    body = ""
    for label in dict.fromkeys(label for run in runs for label in run.summary["methods"]):
        cells = ""
        for run, own in zip(runs, shown, strict=True):
            methods = run.summary["methods"]
            texts = [escape(cell(methods[label], methods)) if label in methods else "" for _, cell in own]
            cells += "".join(f"<td{_edge(i)}>{with_interval(text)}</td>" for i, text in enumerate(texts))
        body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    return (f'<div class="wide"><table class="figures runs"><thead><tr><th></th>{head}</tr>'
            f"<tr><th></th>{second}</tr></thead><tbody>{body}</tbody></table></div>")


def _edge(column: int) -> str:
    return ' class="edge"' if column == 0 else ""


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Keys of config and environment in which the runs differ."""
    facts = []
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in UNTOLD}
        own = {name: run.environment.get(name) for name in VERSIONS}
        methods = flatten({"methods": run.config.get("methods") or {}})
        drafted = {"target": run.target, "draft": run.draft}
        config = {key: value for key, value in config.items() if key not in drafted}
        facts.append({**drafted, **flatten(config), **methods, **own})
    keys = [key for key in dict.fromkeys(key for own in facts for key in own)
            if len({str(own.get(key)) for own in facts}) > 1]
    if not keys:
        return "<p>Nothing: the same config, machine and versions.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(f'<tr><th scope="row">{escape(key)}</th>'
                   + "".join(f"<td>{escape(_shown(own.get(key)))}</td>" for own in facts) + "</tr>"
                   for key in keys[:MOST_DIFFERENCES])
    more = len(keys) - MOST_DIFFERENCES
    rest = f'<p class="notes">{more} more keys differ.</p>' if more > 0 else ""
    return (f'<div class="wide"><table class="facts"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{rest}")


def _shown(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
