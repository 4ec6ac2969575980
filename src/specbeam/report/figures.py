"""The charts as files for a paper, by matplotlib (extra `figures`): one column wide, fonts embedded as text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from specbeam.decoding import PEERS
from specbeam.errors import InputError
from specbeam.report.answer import shown
from specbeam.report.categories import speedups_by_category
from specbeam.report.charts import by_position
from specbeam.report.runs import Run
from specbeam.report.terminal import phase_shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")
WIDTH = 3.5  # inches: a column of a two-column paper
OURS, PEER, INK = "#1766c2", "#7a8794", "#1b1f24"
COLOURS = ("#1766c2", "#c8641a", "#2f9e5b", "#9b59d0", "#c0392b", "#7a8794")
PHASES = {"drafting": OURS, "target forwards": "#9aa5b1", "accepting": "#5fb3ab", "the rest": "#e1e5ea"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1)), (0, (1, 1)))


def check_format(name: str) -> None:
    """Raises InputError for another format, or where matplotlib is missing."""
    if name not in FORMATS:
        raise InputError(f"--figures is {name!r}: use {', '.join(FORMATS)}.")
    if find_spec("matplotlib") is None:
        raise InputError("--figures needs matplotlib: pip install 'specbeam[figures]'.")


def write_figures(run: Run, form: str) -> list[Path]:
    """Write every chart that the run has figures for into its folder `figures`; the paths."""
    import matplotlib
    from matplotlib.figure import Figure

    folder = run.folder / "figures"
    style: Any = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
             "pdf.fonttype": 42, "svg.fonttype": "none", "figure.dpi": 200, "axes.edgecolor": INK,
             "text.parse_math": False}
    written = []
    with matplotlib.rc_context(style):
        for name, draw in (("speedups", _speedups), ("quality", _quality), ("acceptance", _acceptance),
                           ("phases", _phases), ("categories", _categories)):
            figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
            if not draw(figure, run):
                continue
            folder.mkdir(exist_ok=True)
            path = folder / f"{name}.{form}"
            # without a date the same run gives the same file
            figure.savefig(path, metadata={"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(form))
            written.append(path)
    return written


def _methods(run: Run) -> dict[str, dict[str, Any]]:
    return run.summary["methods"]


def _colour(figures: dict[str, Any]) -> str:
    return PEER if str(figures["kind"]).startswith(PEERS) else OURS


def _speedups(figure: Figure, run: Run) -> bool:
    """The geometric mean and its 95 % interval over our plain method, else over the first baseline there is."""
    lines = []
    for label, figures in _methods(run).items():
        for baseline, one in list(figures["speedup"].items())[:1]:
            if one.get("median") is not None:
                lines.append((f"{label} / {baseline}", one, _colour(figures)))
    if not lines:
        return False
    figure.set_figheight(0.7 + 0.22 * len(lines))
    axes = figure.subplots()
    for place, (_, one, colour) in enumerate(lines):
        value, low, high = shown(one)
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, alpha=0.5, linewidth=2)
        axes.plot([value or 0.0], [place], "o", color=colour, markersize=4)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    axes.invert_yaxis()
    axes.set_xlabel("speed-up, 95 % interval")
    return True


def _quality(figure: Figure, run: Run) -> bool:
    """Decode rate and quality: BLEU where there are references, else perplexity."""
    for field in ("bleu", "perplexity"):
        points = [(figures["decode_tokens_per_second"], figures[field], label, _colour(figures))
                  for label, figures in _methods(run).items()
                  if figures.get("decode_tokens_per_second") and figures.get(field) is not None]
        if len({round(point[1], 2) for point in points}) > 1:
            break
    else:
        return False
    axes = figure.subplots()
    for place, (x, y, label, colour) in enumerate(points):
        axes.plot(x, y, MARKERS[place % len(MARKERS)], color=colour, markersize=5, label=label, linestyle="none",
                  fillstyle="none" if colour == PEER else "full")
    figure.legend(fontsize=6, frameon=False, loc="outside upper center", ncols=2)
    axes.set_xlabel("decode rate, tokens per second")
    axes.set_ylabel("BLEU" if field == "bleu" else "perplexity under the target")
    axes.margins(0.15)
    return True


def _acceptance(figure: Figure, run: Run) -> bool:
    lines = [(label, rates) for label, figures in _methods(run).items() if (rates := by_position(figures))]
    if not lines:
        return False
    axes = figure.subplots()
    for place, (label, rates) in enumerate(lines):
        axes.plot(range(1, len(rates) + 1), rates, marker="o", markersize=3, label=label,
                  color=COLOURS[place % len(COLOURS)], linestyle=STYLES[place % len(STYLES)])
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, max(len(rates) for _, rates in lines) + 1))
    axes.set_xlabel("position of the proposal in its round")
    axes.set_ylabel("accepted")
    axes.legend(fontsize=6, frameon=False)
    return True


def _phases(figure: Figure, run: Run) -> bool:
    bars = [(label, shares) for label, figures in _methods(run).items() if (shares := phase_shares(figures))]
    if not bars:
        return False
    figure.set_figheight(0.9 + 0.22 * len(bars))
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for place, (name, colour) in enumerate(PHASES.items()):
        widths = [shares[place] for _, shares in bars]
        axes.barh(range(len(bars)), widths, left=left, color=colour, label=name, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("part of decode time")
    figure.legend(fontsize=6, frameon=False, loc="outside upper center", ncols=4)
    return True


def _categories(figure: Figure, run: Run) -> bool:
    """Of the methods that speculate: every prompt's speed-up over our plain method (of a batch: the batch's), and the
    geometric mean."""
    found = {label: own for label, own in speedups_by_category(run.rows, _methods(run)).items()
             if _methods(run)[label].get("acceptance_rate") is not None}
    names = sorted({name for own in found.values() for name in own})
    if len(names) < 2:
        return False
    axes = figure.subplots()
    apart = 0.6 / len(found)
    for place, (label, own) in enumerate(found.items()):
        colour = COLOURS[place % len(COLOURS)]
        for column, name in enumerate(names):
            x = column + (place - (len(found) - 1) / 2) * apart
            ratios = sorted(own.get(name, []))
            if ratios:
                axes.plot([x] * len(ratios), ratios, "o", color=colour, alpha=0.5, markersize=3,
                          label=label if column == 0 else None)
                middle = geometric_mean(ratios)
                axes.plot([x - apart / 3, x + apart / 3], [middle, middle], color=colour, linewidth=1.5)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("speed-up over plain decoding")
    figure.legend(fontsize=6, frameon=False, loc="outside upper center", ncols=2)
    return True
