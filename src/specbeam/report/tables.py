"""The tables of the page: figures of every method, time by phase, and what is needed to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from specbeam.report.answer import interval, no_difference, rate, shown
from specbeam.report.escape import escape
from specbeam.report.terminal import phase_shares, same_output, speedup_over

Methods = Mapping[str, Mapping[str, Any]]
_PHASES = (("d", "drafting"), ("v", "target forwards"), ("a", "accepting"), ("r", "the rest"))  # css class, name


def summary_table(methods: Methods) -> str:
    """One row a method, the columns of the terminal table and a few more."""
    def beams(figures: Mapping[str, Any]) -> str:
        gap, pairs = (figures.get(name) for name in ("beam_gap", "beam_distinct_2"))
        return "–" if gap is None else f"{gap:.3f}" + (f" ({pairs:.0%} distinct)" if pairs is not None else "")

    columns = [
        ("decode tokens/s", lambda f: rate(f) if f.get("decode_tokens_per_second") else "–"),
        ("× plain", lambda f: interval(speedup_over(f, False, methods))),
        ("× transformers", lambda f: interval(speedup_over(f, True, methods))),
        ("mean accepted length", lambda f: _number(f.get("mean_accepted_length"), ".2f")),
        ("acceptance rate", lambda f: _number(f.get("acceptance_rate"), ".1%")),
        ("same output", same_output),
        ("BLEU", lambda f: _number(f.get("bleu"), ".1f")),
        ("exact match, %", lambda f: _number(f.get("exact_match"), ".0f")),
        ("perplexity", lambda f: _number(f.get("perplexity"), ",.2f")),
        ("2nd beam behind by", beams),
        ("first token, ms", lambda f: _number(f.get("prefill_seconds"), ",.1f", 1000)),
        ("peak memory, GiB", lambda f: _number(f.get("peak_memory_bytes"), ".2f", 2**-30)),
        ("failed rows", lambda f: _number(f.get("failed"), "d")),
    ]
    columns = [column for column in columns if any(column[1](f) not in ("–", "0") for f in methods.values())]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in columns)
    body = ""
    for label, figures in methods.items():
        cells = "".join(f'<td class="{_css(name, figures, methods)}">{with_interval(escape(cell(figures)))}</td>'
                        for name, cell in columns)
        kind = "" if figures["kind"] == label else f' <small>{escape(figures["kind"])}</small>'
        body += f'<tr><th scope="row">{escape(label)}{kind}</th>{cells}</tr>'
    return ('<div class="wide"><table class="figures"><thead><tr><th></th>'
            f"{head}</tr></thead><tbody>{body}</tbody></table></div>")


def with_interval(text: str) -> str:
    """`1.62 (1.41–1.80)` with the interval below, so that the table stays narrow."""
    value, bracket, rest = text.partition(" (")
    return f"{value}<br><small>{rest.rstrip(')')}</small>" if bracket else text


def phases(methods: Methods) -> str:
    """Parts of decode time spent drafting, verifying, accepting, and on the rest, as bars."""
    rows = ""
    for label, figures in methods.items():
        shares = phase_shares(figures)
        if shares is None:
            continue
        bars = "".join(f'<span class="{css}" style="width:{share:.2%}" title="{name} {share:.1%}"></span>'
                       for (css, name), share in zip(_PHASES, shares, strict=True) if share)
        rows += (f'<tr><th scope="row">{escape(label)}</th><td class="bar">{bars}</td>'
                 + "".join(f"<td>{share:.0%}</td>" for share in shares) + "</tr>")
    if not rows:
        return ""
    names = "".join(f'<th scope="col"><i class="{css}"></i>{name}</th>' for css, name in _PHASES)
    return ('<div class="wide"><table class="phases"><thead><tr><th></th><th></th>'
            f"{names}</tr></thead><tbody>{rows}</tbody></table></div>")


def environment_section(config: Mapping[str, Any], environment: Mapping[str, Any],
                        summary: Mapping[str, Any]) -> str:
    """Command, machine and versions, and the whole config."""
    command = environment.get("command")
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    known = {name: value for name, value in environment.items() if name != "command" and value not in (None, [], "")}
    for name in ("device", "dtype", "batch_size"):
        if summary.get(name) is not None:
            known.setdefault(name, summary[name])
    signature = next((f["bleu_signature"] for f in summary["methods"].values() if f.get("bleu_signature")), None)
    if signature:
        known["BLEU signature"] = signature
    body = f"<h3>Command</h3><pre>{escape(command)}</pre>" if command else ""
    if known:
        rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(_flat(value))}</td></tr>'
                       for name, value in known.items())
        body += f'<h3>Machine and versions</h3><table class="facts">{rows}</table>'
    if config:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110)
        body += f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
    return body


def _css(column: str, figures: Mapping[str, Any], methods: Methods) -> str:
    if column in ("× plain", "× transformers"):
        speedup = speedup_over(figures, column == "× transformers", methods)
        _, low, _ = shown(speedup)
        if low is not None and not no_difference(speedup):
            return "good" if low > 1 else "bad"
    if column == "same output":
        return "" if all(one["same"] == one["of"] for one in figures.get("identical_to", {}).values()) else "bad"
    return "bad" if column == "failed rows" and figures.get("failed") else ""


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "–" if value is None else format(value if scale == 1 else value * scale, form)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items())
    return ", ".join(_flat(part) for part in value) if isinstance(value, list) else str(value)
