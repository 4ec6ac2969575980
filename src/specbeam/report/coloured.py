"""An answer as a piece of HTML with its tokens coloured by where they came from, for pages that are not ours (W&B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specbeam.report.escape import escape

# As in report.css; the ink is set too, since the page around may be dark.
COLOURS = {"draft": "#cfe3fb", "prompt_lookup": "#e3d3f7", "correction": "#ffd9b3", "bonus": "#cdeccf",
           "plain": "#ffffff"}
OTHER_DRAFTERS = "#bfe8e4"


def coloured_answer(trace: Mapping[str, Any]) -> str:
    """One `<div>`; hovering a token shows its source, round and probabilities. Nothing of the text is markup."""
    spans = []
    target, draft = (trace.get(name) or [] for name in ("target_probability", "draft_probability"))
    for place, (piece, source, number) in enumerate(zip(
            trace["pieces"], trace["sources"], trace["token_rounds"], strict=True)):
        told = [source, "prefill" if number == 0 else f"round {number}"]
        told += [f"{name} {values[place]:.2f}" for name, values in (("target", target), ("draft", draft))
                 if place < len(values)]
        spans.append(f'<span style="background:{COLOURS.get(source, OTHER_DRAFTERS)};color:#1b1f24;border-radius:3px" '
                     f'title="{escape(", ".join(told))}">{escape(piece)}</span>')
    return ('<div style="font:14px/1.8 system-ui,sans-serif;white-space:pre-wrap;background:#fff;padding:6px">'
            + "".join(spans) + "</div>")
