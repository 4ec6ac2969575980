"""A forecast as one SVG that stands by itself: predicted speed-up by draft length, a line per draft and batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specbeam.report.escape import escape

_COLOURS = ("#1766c2", "#b3261e", "#1a7f37", "#8a5a00", "#6b3fa0", "#00727a")
_DASHES = ("", "6 4", "2 3", "9 3 2 3")


def chart(lines: Sequence[Mapping[str, Any]], where: str) -> str:
    """lines: as forecasting.Line, as dicts."""
    width, height, left, right, top, bottom = 720, 400, 56, 210, 46, 46
    lengths = sorted({line["draft_length"] for line in lines})
    highest = max(1.2, *(line["speedup"] for line in lines)) * 1.08
    drafts, sizes = ([*dict.fromkeys(line[name] for line in lines)] for name in ("draft", "batch_size"))

    def x(length: float) -> float:
        return left + 12 + (length - lengths[0]) / max(1, lengths[-1] - lengths[0]) * (width - left - right - 24)

    def y(speedup: float) -> float:
        return height - bottom - speedup / highest * (height - top - bottom)

    def text(at: float, down: float, content: object, anchor: str = "middle", size: int = 12) -> str:
        place = f'x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}" font-size="{size}"'
        return f"<text {place}>{escape(str(content))}</text>"

    step = 0.5 if highest > 1.6 else 0.25
    ticks = [step * i for i in range(int(highest / step) + 1)]
    parts = [text(left, 22, f"Predicted speed-up over plain decoding: {where}", "start", 13)]
    for tick in ticks:
        ink = "#1b1f24" if tick == 1 else "#d9dee4"
        parts.append(f'<line x1="{left}" y1="{y(tick):.1f}" x2="{width - right}" y2="{y(tick):.1f}" stroke="{ink}"/>'
                     + text(left - 8, y(tick) + 4, f"{tick:g} ×", "end"))
    parts += [text(x(length), height - bottom + 18, length) for length in lengths]
    parts.append(text((left + width - right) / 2, height - 8, "draft length"))
    entry = 0
    for i, draft in enumerate(drafts):
        for j, size in enumerate(sizes):
            own = [line for line in lines if line["draft"] == draft and line["batch_size"] == size]
            if not own:
                continue
            colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[j % len(_DASHES)]
            points = " ".join(f"{x(line['draft_length']):.1f},{y(line['speedup']):.1f}" for line in own)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" '
                         f'stroke-dasharray="{dash}"/>')
            for line in own:
                at = f"{x(line['draft_length']):.1f}"
                bar = "" if line["low"] is None else (
                    f'<line x1="{at}" y1="{y(line["low"]):.1f}" x2="{at}" y2="{y(min(line["high"], highest)):.1f}" '
                    f'stroke="{colour}" stroke-opacity=".35"/>')
                title = f"{draft}, draft length {line['draft_length']}, batch size {size}: {line['speedup']:.2f} ×"
                parts.append(f'<g><title>{escape(title)}</title>{bar}<circle cx="{at}" '
                             f'cy="{y(line["speedup"]):.1f}" r="4" fill="{colour}"/></g>')
            down = top + 10 + 20 * entry
            entry += 1
            parts.append(f'<line x1="{width - right + 14}" y1="{down - 4}" x2="{width - right + 40}" y2="{down - 4}" '
                         f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
            name = draft if len(draft) < 22 else "…" + draft[-20:]
            parts.append(text(width - right + 46, down, name + (f", batch {size}" if len(sizes) > 1 else ""), "start"))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="system-ui, sans-serif" fill="#1b1f24"><rect width="{width}" height="{height}" fill="#fff"/>'
            f'{"".join(parts)}</svg>\n')
