"""Charts as inline SVG: speed against quality, speed-ups with intervals, acceptance by position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specbeam.decoding import PEERS
from specbeam.report.answer import shown, within_noise
from specbeam.report.escape import escape

Methods = Mapping[str, Mapping[str, Any]]
MOST_LINES = 6  # of one chart
FEW = 10  # proposals at a position: below it their acceptance is an accident


def speed_against_quality(methods: Methods, quality: str, title: str, better: str) -> str:
    """Scatter of decode rate (x) and a figure of quality (y): filled dots ours, rings transformers'."""
    points = [(figures["decode_tokens_per_second"], figures[quality], label, figures["kind"])
              for label, figures in methods.items()
              if figures.get("decode_tokens_per_second") and figures.get(quality) is not None]
    if len(points) < 2 or len({round(point[1], 2) for point in points}) == 1:  # then the table says it all
        return ""
    width, height, left, bottom = 520, 300, 52, 40
    xs, ys = _ticks(0, max(p[0] for p in points)), _ticks(min(p[1] for p in points), max(p[1] for p in points))

    def x(value: float) -> float:
        return left + (value - xs[0]) / (xs[-1] - xs[0]) * (width - left - 16)

    def y(value: float) -> float:
        return height - bottom - (value - ys[0]) / (ys[-1] - ys[0]) * (height - bottom - 22)

    parts = [_line(x(tick), y(ys[0]), x(tick), y(ys[-1]), "grid") + _text(x(tick), height - bottom + 16, _short(tick),
                                                                         "tick middle") for tick in xs]
    parts += [_line(x(xs[0]), y(tick), x(xs[-1]), y(tick), "grid") + _text(left - 7, y(tick) + 4, _short(tick),
                                                                         "tick end") for tick in ys]
    parts.append(_text((left + width) / 2, height - 6, "decode rate, tokens per second →", "axis middle"))
    parts.append(_text(left, 12, f"{title} ({better})", "axis"))
    points.sort(key=lambda point: not point[3].startswith(PEERS))  # ours on top
    for (px, py, label, kind), (tx, ty) in zip(points, _label_places(
            [(x(p[0]), y(p[1]), p[2]) for p in points], (left, 18, width, height - bottom)), strict=True):
        css = "peer" if kind.startswith(PEERS) else "ours"
        away = abs(ty - 4 - y(py)) > 12  # a label that is not beside its dot gets a line to it
        nearest = min(max(x(px), tx), tx + 6.6 * len(_cut(label)))
        leader = _line(x(px), y(py), nearest, ty - (10 if ty > y(py) else -2), "leader") if away else ""
        parts.append(f'<g><title>{escape(label)}: {px:,.1f} tokens/s, {escape(title)} {py:,.2f}</title>{leader}'
                     f'<circle class="{css}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="{6 if css == "peer" else 4}"/>'
                     f'{_text(tx, ty, _cut(label), "label")}</g>')
    return _svg(width, height, f"{title} against decode rate", parts)


def speedups(methods: Methods, baselines: Sequence[str]) -> str:
    """One line a method and baseline: the geometric mean and its 95 % interval, on a logarithmic scale around 1 ×."""
    lines = [(label, baseline, one) for baseline in baselines for label, figures in methods.items()
             if (one := figures.get("speedup", {}).get(baseline)) and one.get("median")]
    if not lines:
        return ""
    reach = [value for _, _, one in lines for value in shown(one) if value]
    low, high = min(0.8, *reach) * 0.95, max(1.25, *reach) * 1.05
    width, left, right, row = 830, 330, 190, 26  # the widest text is of no difference
    height = 40 + row * len(lines)

    def x(value: float) -> float:
        return left + math.log(value / low) / math.log(high / low) * (width - left - right)

    steps = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    marks = [1.0]  # ticks with room for their labels: powers of two first, from 1 × outward
    for tick in sorted((tick for tick in steps if low <= tick <= high),
                       key=lambda tick: (not math.log2(tick).is_integer(), abs(math.log(tick)))):
        if all(abs(x(tick) - x(other)) >= 38 for other in marks):
            marks.append(tick)
    parts = [_line(x(tick), 8, x(tick), height - 24, "one" if tick == 1 else "grid")
             + _text(x(tick), height - 8, f"{tick:g} ×", "tick middle") for tick in marks]
    for number, (label, baseline, one) in enumerate(lines):
        y = 22 + row * number
        css = "peer" if methods[label]["kind"].startswith(PEERS) else "ours"
        value, least, most = shown(one)
        text = "no difference" if within_noise(one) else f"{value:.2f} ×"
        bar = ""
        if least is not None and most is not None:
            text += f" ({least:.2f}–{most:.2f})"
            bar = _line(x(least), y, x(most), y, f"interval {css}")
        parts.append(f'<g>{_text(left - 12, y + 4, f"{_cut(label)} over {_cut(baseline)}", "label end")}{bar}'
                     f'<circle class="{css}" cx="{x(value or 1):.1f}" cy="{y}" r="5"/>'
                     f'{_text(width - right + 12, y + 4, text, "label")}</g>')
    return _svg(width, height, "Speed-ups with 95 % intervals", parts)


def by_position(figures: Mapping[str, Any]) -> list[float]:
    """Acceptance by position, as far as a position was proposed often enough to say something: adaptive lengths seldom
    go deep, and then where they are sure."""
    rates, counts = figures.get("acceptance_by_position") or [], figures.get("proposed_by_position") or []
    return [rate for i, rate in enumerate(rates) if i >= len(counts) or min(counts[: i + 1]) >= FEW]


def acceptance(methods: Methods) -> str:
    """How often the i-th proposal of a round was accepted: one line a speculating method."""
    lines = [(label, rates) for label, figures in methods.items() if (rates := by_position(figures))]
    if not lines:
        return ""
    if len(lines) > MOST_LINES:
        return _acceptance_table(lines)
    width, height, left, bottom, right = 520, 260, 52, 40, 150
    longest = max(len(rates) for _, rates in lines)

    def x(position: int) -> float:
        return left + 14 + position / max(1, longest - 1) * (width - left - right - 28)

    def y(value: float) -> float:
        return height - bottom - value * (height - bottom - 24)

    parts = [_line(left, y(tick), width - right, y(tick), "grid") + _text(left - 7, y(tick) + 4, f"{tick:.0%}",
                                                                         "tick end") for tick in (0, .25, .5, .75, 1)]
    parts += [_text(x(i), height - bottom + 16, str(i + 1), "tick middle") for i in range(longest)]
    parts.append(_text((left + width - right) / 2, height - 6, "position of the proposal in its round →",
                       "axis middle"))
    parts.append(_text(left, 12, "accepted", "axis"))
    ends = _spread([y(rates[-1]) + 4 for _, rates in lines], 15)
    for number, ((label, rates), end) in enumerate(zip(lines, ends, strict=True)):
        path = " ".join(f"{'L' if i else 'M'}{x(i):.1f} {y(value):.1f}" for i, value in enumerate(rates))
        dots = "".join(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="4"><title>{escape(label)}, proposal {i + 1}: '
                       f'{value:.1%}</title></circle>' for i, value in enumerate(rates))
        parts.append(f'<g class="series s{number % 6}"><path d="{path}"/>{dots}'
                     f'{_line(x(len(rates) - 1) + 6, y(rates[-1]), width - right + 6, end - 4, "leader")}'
                     f'{_text(width - right + 10, end, _cut(label), "label")}</g>')
    return _svg(width, height, "Acceptance by position", parts)


def _acceptance_table(lines: Sequence[tuple[str, Sequence[float]]]) -> str:
    """More methods than lines can be told apart: a table, shaded by the rate."""
    longest = max(len(rates) for _, rates in lines)
    head = "".join(f'<th scope="col">{i + 1}</th>' for i in range(longest))
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f'<td style="--share:{rate:.0%}">{rate:.0%}</td>' for rate in rates)
        + "<td></td>" * (longest - len(rates)) + "</tr>" for label, rates in lines)
    return ('<div class="wide"><table class="heat"><thead><tr><th>accepted, by position of the proposal</th>'
            f"{head}</tr></thead><tbody>{body}</tbody></table></div>")


def _label_places(points: Sequence[tuple[float, float, str]], frame: tuple[float, float, float, float]
                  ) -> list[tuple[float, float]]:
    """Where each dot's label starts (x, baseline y): near its dot, covering no other label and no dot."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y, _ in points]
    places = []
    for x, y, label in points:
        size = 6.6 * len(_cut(label))
        found = None
        for distance in range(12):  # outward: beside the dot, then above and below, ever further
            shift = 14 * ((distance + 1) // 2) * (1 if distance % 2 else -1)
            for start in (x + 13, x - 13 - size, x - size / 2, x - size * .8, x - size * .2):
                box = (start - 4, y + shift - 8, start + size + 4, y + shift + 7)
                inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
                if inside and not any(_overlap(box, other) for other in taken):
                    found = (start, y + shift + 4, box)
                    break
            if found:
                break
        start, baseline, box = found or (min(x + 13, frame[2] - size), y + 4, (x, y, x, y))
        taken.append(box)
        places.append((start, baseline))
    return places


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Heights near the wanted ones, at least `apart` from one another."""
    placed = [0.0] * len(wanted)
    last = -math.inf
    for number in sorted(range(len(wanted)), key=lambda n: wanted[n]):
        last = placed[number] = max(wanted[number], last + apart)
    return placed


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    step = next(m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 2.5, 5, 10)
                if m * 10 ** math.floor(math.log10(raw)) >= raw)
    first, last = math.floor((low - 0.06 * span) / step), math.ceil((high + 0.02 * span) / step)
    if low >= 0:
        first = max(first, 0)
    return [round(step * i, 10) for i in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 and value == int(value) else f"{value:g}"


def _cut(label: str) -> str:
    return label if len(label) <= 28 else label[:27] + "…"


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: int, height: int, name: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(name)}">'
            + "".join(parts) + "</svg>")
