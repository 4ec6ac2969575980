"""Speed-ups by category of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any

from specbeam.decoding import PEERS
from specbeam.report.escape import escape

Methods = Mapping[str, Mapping[str, Any]]


def speedups_by_category(rows: Sequence[Mapping[str, Any]], methods: Methods) -> dict[str, dict[str, list[float]]]:
    """label → category → decode rate over that of our plain method, one number a prompt and turn.

    Of each prompt the medians over repeats. Labels without a plain method of ours are left out.
    """
    rates: dict[tuple[str, str, int], list[float]] = {}
    category: dict[tuple[str, int], str] = {}
    for row in rows:
        if row["status"] != "ok" or not row["decode_seconds"] or row["new_tokens"] <= row["first_tokens"]:
            continue
        rate = (row["new_tokens"] - row["first_tokens"]) / row["decode_seconds"]
        rates.setdefault((row["method"], row["prompt_id"], row["turn"]), []).append(rate)
        category[row["prompt_id"], row["turn"]] = str(row.get("category") or "other")
    found: dict[str, dict[str, list[float]]] = {}
    for label, figures in methods.items():
        plain = next((name for name in figures.get("speedup", {})
                      if not str(methods.get(name, {}).get("kind", name)).startswith(PEERS)), None)
        for (prompt, turn), name in category.items() if plain else ():
            ours, base = rates.get((label, prompt, turn)), rates.get((plain or "", prompt, turn))
            if ours and base:
                found.setdefault(label, {}).setdefault(name, []).append(median(ours) / median(base))
    return found


def category_table(rows: Sequence[Mapping[str, Any]], methods: Methods) -> str:
    """One row a method, one column a category: the geometric mean, shaded; every prompt's own on hover. '' for one
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
    return ('<div class="wide"><table class="heat"><thead><tr><th>× plain, geometric mean over prompts</th>'
            f"{head}</tr></thead><tbody>{body}</tbody></table></div>")
