"""Speed-ups by category of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from specbeam.decoding import PEERS
from specbeam.experiment.statistics import speedup_by_prompt
from specbeam.report.escape import escape

Methods = Mapping[str, Mapping[str, Any]]


def speedups_by_category(rows: Sequence[Mapping[str, Any]], methods: Methods) -> dict[str, dict[str, list[float]]]:
    """label → category → decode rate over that of our plain method, one number a prompt and turn: that of its unit,
    since prompts of one batch share its seconds (experiment/statistics.py).

    Labels without a plain method of ours are left out.
    """
    own_rows: dict[str, list[dict[str, Any]]] = {}
    category: dict[tuple[str, int], str] = {}
    for row in rows:
        if row["status"] == "ok":
            own_rows.setdefault(row["method"], []).append(dict(row))
            category[row["prompt_id"], row["turn"]] = str(row.get("category") or "other")
    found: dict[str, dict[str, list[float]]] = {}
    for label, figures in methods.items():
        plain = next((name for name in figures.get("speedup", {})
                      if not str(methods.get(name, {}).get("kind", name)).startswith(PEERS)), None)
        speedups = speedup_by_prompt(own_rows.get(label, []), own_rows.get(plain, [])) if plain else {}
        for prompt, speedup in speedups.items():
            found.setdefault(label, {}).setdefault(category[prompt], []).append(speedup)
    return found


def category_table(rows: Sequence[Mapping[str, Any]], methods: Methods) -> str:
    """One row a method, one column a category: the geometric mean, shaded; every prompt's on hover. '' for one
    category."""
    found = speedups_by_category(rows, methods)
    names = sorted({name for own in found.values() for name in own})
    if len(names) < 2:
        return ""
    counts = {name: max(len(own.get(name, [])) for own in found.values()) for name in names}
    head = "".join(f'<th scope="col">{escape(name)}<br><small>{count} prompt{"s" * (count > 1)}</small></th>'
                   for name, count in counts.items())
    body = ""
    for label, own in found.items():
        cells = ""
        for name in names:
            ratios = sorted(own.get(name, []))
            if not ratios:
                cells += "<td>–</td>"
                continue
            middle = geometric_mean(ratios)
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios[:40])
            tint = "up" if middle > 1 else "down"
            share = min(1.0, abs(middle - 1) / (1.0 if middle > 1 else 0.5))
            cells += f'<td class="{tint}" style="--share:{share:.0%}" title="{each}">{middle:.2f}</td>'
        body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    answered = [row for row in rows if row["status"] == "ok"]
    note = ""
    if len({row["batch_id"] for row in answered}) < len(answered):
        note = '<p class="notes">Prompts decoded in one batch share its speed-up, whatever their categories.</p>'
    return ('<div class="wide"><table class="heat"><thead><tr><th>× plain, geometric mean over prompts</th>'
            f"{head}</tr></thead><tbody>{body}</tbody></table></div>{note}")
