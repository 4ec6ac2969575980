"""Figures of quality with their intervals, overall and by category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specbeam.report.escape import escape

Methods = Mapping[str, Mapping[str, Any]]
# Figure → heading and form, in the order of the table; what is not here is shown by its own name.
NAMES = {
    "bleu": ("BLEU", ".1f"), "chrf": ("chrF", ".1f"), "rouge1": ("ROUGE-1", ".1f"), "rouge2": ("ROUGE-2", ".1f"),
    "rougeL": ("ROUGE-L", ".1f"), "exact_match": ("exact match, %", ".0f"), "perplexity": ("perplexity", ",.2f"),
    "mean_log_probability": ("mean log-probability", ".3f"),
    "evaluator_perplexity": ("evaluator’s perplexity", ",.2f"),
    "evaluator_mean_log_probability": ("evaluator’s mean log-probability", ".3f"),
    "evaluator_bits_per_byte": ("evaluator’s bits a byte", ".3f"),
    "distinct_1": ("distinct-1", ".2f"), "distinct_2": ("distinct-2", ".2f"),
    "longest_repeated_span": ("longest repeated span", ".1f"), "tokens": ("tokens", ".1f"), "words": ("words", ".1f"),
}


def quality_tables(methods: Methods) -> str:
    """All figures of every method; by category, those that need references, else the perplexity. '' without any."""
    scored = {label: figures["quality"] for label, figures in methods.items()
              if isinstance(figures.get("quality"), dict) and figures["quality"].get("overall")}
    if not scored:
        return ""
    found = {name for own in scored.values() for name in own["overall"]}
    names = [name for name in NAMES if name in found] + sorted(found - set(NAMES))
    whole = _table({label: own["overall"] for label, own in scored.items()}, names, _heading)
    parts = ""
    wanted = [name for name in names if name in ("bleu", "chrf", "rougeL", "exact_match")] or [
        name for name in names if name == "perplexity"]
    categories = sorted({category for own in scored.values() for category in own.get("categories") or {}})
    for name in wanted if len(categories) > 1 else ():
        turned = {label: {category: figures[name] for category, figures in (own.get("categories") or {}).items()
                          if name in figures} for label, own in scored.items()}
        there = [category for category in categories if any(category in own for own in turned.values())]
        if there:
            parts += (f"<details><summary>{escape(_heading(name))} by category</summary>"
                      f"{_table(turned, there, str, name)}</details>")
    return f'<h3>All figures, with 95 % intervals over answers</h3>{whole}{parts}'


def _heading(name: str) -> str:
    return NAMES.get(name, (name.replace("_", " "), ""))[0]


def _table(rows: Mapping[str, Mapping[str, Any]], columns: list[str], heading: Any, form_of: str | None = None) -> str:
    head = "".join(f'<th scope="col">{escape(heading(column))}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(_cell(own.get(column), NAMES.get(form_of or column, ("", ".3g"))[1]) for column in columns) + "</tr>"
        for label, own in rows.items())
    return (f'<div class="wide"><table class="figures scores"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _cell(score: Mapping[str, Any] | None, form: str) -> str:
    if not score or score.get("value") is None:
        return "<td>–</td>"
    within = ""
    if score.get("low") is not None and score.get("high") is not None:
        to = " to " if score["low"] < 0 else "–"
        within = f'<br><small>{format(score["low"], form)}{to}{format(score["high"], form)}</small>'
    count = score.get("count")
    return f'<td title="{count} answers">{format(score["value"], form)}{within}</td>'
