"""The table that `specbeam compare` ends with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from specbeam.report.answer import answers, interval, no_difference, rate, rounded, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Kinds of the second baseline; those without it are our own engine's.
PEER = "transformers_"
FEW = 6  # units: the range of fewer holds the median less often than 95 times in 100
POSITIONS = 8  # of a proposal
Cell = Callable[[Mapping[str, Any]], str]


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """One line a method; the answer and footnotes under it. Where there is room (a file or a pipe has no edge) also
    intervals, the time to the first token, where time goes, memory. Columns that no method has a figure for are left
    out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    methods: Mapping[str, Mapping[str, Any]] = summary.get("methods") or {}
    for intervals, level in ((True, 3), (True, 2), (True, 1), (True, 0), (False, 2), (False, 1), (False, 0)):
        columns = _columns(methods, intervals, level)
        cells = {label: [cell(figures) for _, cell in columns] for label, figures in methods.items()}
        needed = _width(columns, cells)
        if needed <= console.width or not console.is_terminal:
            break
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True, vertical="bottom")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for label, figures in methods.items():
        styled = [Text(text, style=_style(heading, figures))
                  for (heading, _), text in zip(columns, cells[label], strict=True)]
        table.add_row(Text(label), *styled)
    if needed > console.width and not console.is_terminal:
        console.width = needed
    console.print(table)
    if _several(methods):
        console.print(_speculation_table(methods))
    for sentence in answers(summary):
        console.print(Text(sentence, style="bold"))
    for note in footnotes(summary):
        console.print(Text(f"· {note}", style="dim"))


def _several(methods: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a table of its own compares how they speculate."""
    return sum(figures.get("kind") == "speculative" for figures in methods.values()) > 1


def _speculation_table(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    """Of each method that drafts: how often the first, second, … proposal of a round was accepted (of a tree: of each
    depth), and where decode time goes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drafting = {label: figures for label, figures in methods.items() if figures.get("acceptance_by_position")}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True, vertical="bottom")
    table.add_column("accepted by position, %", no_wrap=True, vertical="bottom")
    for heading in ("draft\n%", "verify\n%", "accept\n%", "rest\n%"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for label, figures in drafting.items():
        rates = " ".join(f"{100 * rate:3.0f}" for rate in figures["acceptance_by_position"][:POSITIONS])
        shares = phase_shares(figures) or (None,) * 4
        table.add_row(Text(label), rates, *("–" if share is None else f"{100 * share:.0f}" for share in shares))
    return table


def speedup_over(figures: Mapping[str, Any], peer: bool, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The speed-up over our plain method, or over transformers' (`peer`); {} where there is none."""
    for baseline, speedup in figures.get("speedup", {}).items():
        if str(methods.get(baseline, {}).get("kind", baseline)).startswith(PEER) == peer:
            return speedup
    return {}


def same_output(figures: Mapping[str, Any]) -> str:
    """`8/8`: prompts with the tokens of the baseline; both figures where the two baselines disagree."""
    counts = [f"{one['same']}/{one['of']}" for one in figures.get("identical_to", {}).values() if one["of"]]
    return " ".join(dict.fromkeys(counts)) or "–"


def phase_shares(figures: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Parts of decode time spent drafting, in target forwards, accepting (0 where only the rest was measured), and on
    the rest; None where they were not measured."""
    if figures.get("verify_share") is None:
        return None
    draft, verify, accept = (figures.get(f"{name}_share") or 0.0 for name in ("draft", "verify", "accept"))
    return draft, verify, accept, max(0.0, 1 - draft - verify - accept)


def _runners(summary: Mapping[str, Any]) -> str:
    """`runner openvino, `, or both where target and draft differ (runs of older versions have none)."""
    used = summary.get("runner") or {}
    names = sorted(set(used.values()))
    shown = names[0] if len(names) == 1 else " and ".join(f"{name} ({model})" for model, name in used.items())
    return f"runner {shown}, " if names else ""


def footnotes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    methods = summary.get("methods") or {}
    notes = []
    if summary.get("device"):
        batch = summary.get("batch_size") or 1
        notes.append(f"{summary['device']}, {str(summary.get('dtype')).removeprefix('torch.')}, "
                     f"{_runners(summary)}{'one prompt at a time' if batch == 1 else f'batches of {batch}'}. "
                     "tokens/s: decoding alone, without prefill; speed-ups: geometric mean over prompts, 95 % "
                     "bootstrap interval.")
    noise = {label: figures["noise"] for label, figures in methods.items()
             if figures.get("noise") and any(label in other.get("speedup", {}) for other in methods.values())}
    if noise:
        against = ", ".join(f"{label} ±{100 * (factor - 1):.1f} %" for label, factor in noise.items())
        notes.append(f"Noise of this machine (a baseline against itself in another repeat): {against}; what lies "
                     "inside is printed as no difference.")
    elif summary.get("device") and any(figures.get("speedup") for figures in methods.values()):
        notes.append("The machine's noise was not measured: it takes repeats of 2 or more.")
    if rounded(summary):
        notes.append("int8 weights: specbeam's methods ran another target, rounded from the one that transformers ran.")
    few = min((one["units"] for figures in methods.values() for one in figures.get("speedup", {}).values()
               if one.get("units")), default=FEW)
    if few < FEW:
        what = ("prompt", "prompts") if (summary.get("batch_size") or 1) == 1 else ("batch", "batches")
        notes.append(f"Some speed-ups rest on {few} {what[few > 1]} only: an interval over fewer than {FEW} is "
                     "narrower than a 95 % one.")
    trees = [label for label, figures in methods.items() if figures.get("trees")]
    if trees:
        notes.append(f"Acceptance rate of trees ({', '.join(trees)}): per drafted node, of which a round can keep one "
                     "path only; compare accepted lengths.")
    lossy = [label for label, figures in methods.items() if figures.get("lossy")]
    if lossy:
        notes.append(f"{', '.join(lossy)}: typical acceptance is lossy: answers are not distributed as the target's.")
    beams = [label for label, figures in methods.items()
             if figures.get("family") == "beam" and figures.get("acceptance_rate") is not None]
    if beams:
        notes.append(f"{', '.join(beams)}: accepted length and rate count steps of the whole beam, not tokens.")
    for label, figures in methods.items():
        notes += _differences(label, figures)
    left_out = {label: max((one["left_out"] for one in figures.get("speedup", {}).values()), default=0)
                for label, figures in methods.items()}
    if any(left_out.values()):
        worst = max(left_out, key=lambda label: left_out[label])
        notes.append(f"Some prompts give no pair of decode rates (a failed row, or an answer that ended in prefill) "
                     f"and are left out of speed-ups: up to {left_out[worst]} ({worst}).")
    return notes + [str(note) for note in summary.get("notes") or []]


def _differences(label: str, figures: Mapping[str, Any]) -> list[str]:
    """Where the outputs are other than the baselines'; baselines that differ alike share a sentence."""
    found: dict[str, list[str]] = {}
    for baseline, identity in figures.get("identical_to", {}).items():
        first = identity.get("first_difference")
        if first is None:
            continue
        gap = (figures.get("logit_gaps") or {}).get(baseline)
        near = "" if gap is None else f"; the target's logits were at most {gap['largest']:.3g} apart there"
        found.setdefault(f"in {identity['of'] - identity['same']} of {identity['of']} answers, first on "
                         f"{first['prompt_id']} at token {first['position'] + 1}{near}.", []).append(baseline)
    return [f"{label} differs from {' and '.join(others)} {rest}" for rest, others in found.items()]


def _columns(methods: Mapping[str, Mapping[str, Any]], intervals: bool, level: int) -> list[tuple[str, Cell]]:
    """Heading and cell of each column that has a figure; the higher the level (0 … 3) the more."""
    def speedup(peer: bool) -> Cell:
        def cell(figures: Mapping[str, Any]) -> str:
            found = speedup_over(figures, peer, methods)
            return interval(found if intervals else dict(found, low=None, geometric_low=None))
        return cell

    def number(name: str, form: str) -> Cell:
        return lambda figures: "–" if figures.get(name) is None else format(figures[name], form)

    def first_token(figures: Mapping[str, Any]) -> str:
        seconds = (figures.get("first_token_seconds") or {}).get("median")
        return "–" if seconds is None else f"{1000 * seconds:.3g}"

    def memory(figures: Mapping[str, Any]) -> str:
        used = figures.get("peak_memory_bytes")
        return "–" if used is None else f"{used / 2**30:.2f}"

    def split(figures: Mapping[str, Any]) -> str:
        shares = phase_shares(figures)
        return "–" if shares is None else "/".join(f"{100 * share:.0f}" for share in shares) + " %"

    def beams(figures: Mapping[str, Any]) -> str:
        gap, distinct = figures.get("beam_gap"), figures.get("beam_distinct_2")
        return "–" if gap is None else f"{gap:.3f}" + (f"/{distinct:.0%}" if distinct is not None else "")

    drafts = level > 1 and not _several(methods) and any(figures.get("draft_share") for figures in methods.values())
    failures = any(figures.get("failed") for figures in methods.values())
    columns: list[tuple[str, Cell]] = [
        ("tokens\nper s", lambda figures: rate(figures) if figures.get("decode_tokens_per_second") else "–"),
        ("× plain", speedup(peer=False)),
        ("× trans-\nformers", speedup(peer=True)),
        *([("first\ntoken ms", first_token)] if level else []),
        ("accepted\nlength", number("mean_accepted_length", ".2f")),
        ("accept.\nrate", number("acceptance_rate", ".0%")),
        *([("draft/verify/\naccept/rest", split)] if drafts else []),
        *([("2nd beam’s gap\n/distinct pairs", beams)] if level > 2 else []),
        ("same\noutput", same_output),
        ("BLEU", number("bleu", ".1f")),
        ("exact\nmatch", number("exact_match", ".0f")),
        ("perplexity", number("perplexity", ",.2f")),
        *([("peak\nGiB", memory)] if level > 2 else []),
        *([("failed", number("failed", "d"))] if failures else []),
    ]
    return [column for column in columns if any(column[1](figures) != "–" for figures in methods.values())]


def _width(columns: list[tuple[str, Cell]], cells: Mapping[str, list[str]]) -> int:
    """Columns of the terminal that the table takes."""
    widths = [max((len(label) for label in cells), default=6)]
    for number, (heading, _) in enumerate(columns):
        widths.append(max(map(len, [*heading.split("\n"), *(row[number] for row in cells.values())])))
    return sum(widths) + 2 * len(columns)


def _style(heading: str, figures: Mapping[str, Any]) -> str:
    if heading == "failed":
        return "red" if figures.get("failed") else ""
    if heading == "same\noutput":
        return "" if all(one["same"] == one["of"] for one in figures.get("identical_to", {}).values()) else "yellow"
    if heading == "tokens\nper s":
        ours: Mapping[str, Any] = next(iter(figures.get("speedup", {}).values()), {})
        _, low, _ = shown(ours)
        if low is not None and not no_difference(ours):
            return "green" if low > 1 else "red"
    return ""
