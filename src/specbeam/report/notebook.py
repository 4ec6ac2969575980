"""What a notebook shows of a GenerationOutput: each answer with its tokens coloured by where they came from, and the
tree of a beam search."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specbeam.report.beam_tree import beam_tree
from specbeam.report.coloured import coloured_answer
from specbeam.report.escape import escape

if TYPE_CHECKING:
    from specbeam.trace import GenerationOutput, SearchTree


@dataclass(frozen=True)
class Shown:
    """A piece of HTML, for the notebook that it is the value of."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def show(output: GenerationOutput, tokenizer: Any = None) -> Shown:
    """Every row: a line of figures, the coloured answer, further hypotheses, the search tree if there is one.

    tokenizer: None: token ids stand for the tokens.
    """
    def piece(token: int) -> str:
        return f"{token} " if tokenizer is None else str(tokenizer.decode([token]))

    parts = []
    for number, (found, trace) in enumerate(zip(output.hypotheses, output.trace, strict=True)):
        best, drafted = found[0], sum(one.drafted for one in trace.rounds)
        figures = [f"row {number}", f"{len(best.tokens)} new tokens", f"{len(trace.rounds)} rounds",
                   f"{trace.decode_seconds:.2f} s"]
        if drafted:
            figures.append(f"{sum(one.accepted for one in trace.rounds) / drafted:.0%} of {drafted} drafted accepted")
        parts.append(f'<p style="font:13px system-ui,sans-serif">{escape(" · ".join(figures))}</p>')
        parts.append(coloured_answer({"pieces": [piece(token) for token in best.tokens], "sources": trace.sources,
                                      "token_rounds": trace.token_rounds}))
        if len(found) > 1:
            items = "".join(f"<li>{one.score:.3f} {escape(''.join(map(piece, one.tokens)))}</li>" for one in found)
            parts.append(f'<ol style="font:13px system-ui,sans-serif">{items}</ol>')
        if output.search is not None:
            parts.append(_tree(output.search[number], piece, len(found)))
    return Shown("".join(parts))


def _tree(tree: SearchTree, piece: Callable[[int], str], returned: int) -> str:
    """The terminal's tree as a picture of text."""
    from rich.console import Console

    console = Console(record=True, width=140, file=io.StringIO(), force_jupyter=False)
    console.print(beam_tree(tree, piece, returned))
    return console.export_html(inline_styles=True, code_format=(
        '<pre style="font:12px monospace;background:#fff;color:#1b1f24;overflow-x:auto">{code}</pre>'))
