"""What theory says beside what was measured.

Leviathan et al. 2023 (arXiv 2211.17192, equation 1 and theorem 3.8): with acceptance α, the same at every position, a
chain of γ proposals brings (1 − α^(γ+1)) ÷ (1 − α) tokens a round, and the speed-up is that ÷ (γ·c + v), where c and v
are the seconds of a draft step and of a verifying forward in units of a plain step (v is 1 in the paper). α here is how
often the first proposal of a round was accepted; c and v are this run's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specbeam.decoding import PEERS
from specbeam.report.escape import escape

Methods = Mapping[str, Mapping[str, Any]]


def predicted(rows: Sequence[Mapping[str, Any]], methods: Methods) -> dict[str, dict[str, float]]:
    """label → draft_length, alpha, c, v, and length and speedup, each predicted and measured. Only chains of fixed
    length, one prompt at a time, that have a plain method of ours to be compared with."""
    found: dict[str, dict[str, float]] = {}
    for label, figures in methods.items():
        rates = figures.get("acceptance_by_position") or []
        own = [row for row in rows if row["method"] == label and row["status"] == "ok" and row["rounds"]]
        plain = next((methods[name] for name in figures.get("speedup", {})
                      if name in methods and not str(methods[name]["kind"]).startswith(PEERS)), None)
        if not rates or figures.get("trees") or figures.get("family") != "greedy" or plain is None or not own:
            continue
        drafted, rounds = sum(row["drafted"] for row in own), sum(row["rounds"] for row in own)
        lengths = {len(row["accepted_by_position"]) for row in own if row["accepted_by_position"]}
        times = [(row["draft_seconds"], row["verify_seconds"]) for row in own]
        alone = len({row["batch_id"] for row in own}) == len(own)
        # a chain is shorter than γ only where the answer's end is near
        if not alone or len(lengths) != 1 or drafted < 0.75 * max(lengths) * rounds or None in sum(times, ()):
            continue
        if not plain.get("decode_tokens") or not plain.get("decode_seconds") or not figures.get("decode_tokens"):
            continue
        step = plain["decode_seconds"] / plain["decode_tokens"]
        gamma, alpha = max(lengths), min(rates[0], 1 - 1e-9)
        c = sum(draft for draft, _ in times) / drafted / step
        v = sum(verify for _, verify in times) / rounds / step
        length = (1 - alpha ** (gamma + 1)) / (1 - alpha)
        found[label] = {"draft_length": gamma, "alpha": alpha, "c": c, "v": v,
                        "length_predicted": length, "length_measured": figures["mean_accepted_length"],
                        "speedup_predicted": length / (gamma * c + v),
                        "speedup_measured": step * figures["decode_tokens"] / figures["decode_seconds"]}
    return found


def prediction_section(rows: Sequence[Mapping[str, Any]], methods: Methods) -> str:
    """What was predicted beside what was measured: the run's forecast where there is one, and the formula."""
    forecast, formula = _forecast_table(methods), _formula_table(rows, methods)
    if forecast and formula:
        formula = f"<details><summary>What the formula for equal acceptance says</summary>{formula}</details>"
    return f"<h3>Prediction and measurement</h3>{forecast}{formula}" if forecast or formula else ""


def _forecast_table(methods: Methods) -> str:
    """`forecast` of summary.json: as `specbeam forecast` predicts, from one teacher-forced pass and step costs."""
    body = ""
    for label, figures in methods.items():
        one = figures.get("forecast")
        if not isinstance(one, Mapping) or not one.get("speedup"):
            continue
        accepted = f"{one['accepted']:,d} of {one['drafted']:,d}"
        measured = f"{one['measured_accepted']:,d} of {one['measured_drafted']:,d}"
        body += (f'<tr><th scope="row">{escape(label)}</th><td>{one["draft_length"]}</td>'
                 f'<td>{accepted}</td><td class="{"good" if accepted == measured else "bad"}">{measured}</td>'
                 + _pair(one["mean_accepted_length"], one["measured_mean_accepted_length"])
                 + _pair(one["speedup"], one.get("measured_speedup")) + "</tr>")
    return body and (_head(("draft length", "accepted tokens: forecast", "measured", "tokens a round: forecast",
                            "measured", "off by", "× plain: forecast", "measured", "off by"))
                     + body + "</tbody></table></div>"
                     '<p class="notes">Forecast: what <code>specbeam forecast</code> says without running the method: '
                     "accepted tokens by one teacher-forced pass of the draft over the answers, seconds by step costs "
                     "measured apart.</p>")


def _formula_table(rows: Sequence[Mapping[str, Any]], methods: Methods) -> str:
    body = ""
    for label, one in predicted(rows, methods).items():
        body += (f'<tr><th scope="row">{escape(label)}</th><td>{one["draft_length"]:.0f}</td>'
                 f'<td>{one["alpha"]:.0%}</td><td>{one["c"]:.2f}</td><td>{one["v"]:.2f}</td>'
                 + "".join(_pair(one[f"{name}_predicted"], one[f"{name}_measured"]) for name in ("length", "speedup"))
                 + "</tr>")
    return body and (_head(("draft length γ", "first proposal accepted, α", "draft step, c", "verifying, v",
                            "tokens a round: predicted", "measured", "off by", "× plain: predicted", "measured",
                            "off by")) + body + "</tbody></table></div>"
                     '<p class="notes">Predicted: (1 − α^(γ+1)) ÷ (1 − α) tokens a round, and that ÷ (γ·c + v); c and '
                     "v in plain steps, measured in this run (Leviathan et al. 2023). It takes every proposal to be as "
                     "good as the first. Measured × plain: of all tokens together.</p>")


def _head(columns: Sequence[str]) -> str:
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    return f'<div class="wide"><table class="figures"><thead><tr><th></th>{names}</tr></thead><tbody>'


def _pair(predicted: float, measured: float | None) -> str:
    """Cells: predicted, measured, off by."""
    if not measured:
        return f"<td>{predicted:.2f}</td><td>–</td><td>–</td>"
    return f"<td>{predicted:.2f}</td><td>{measured:.2f}</td><td>{predicted / measured - 1:+.1%}</td>"
