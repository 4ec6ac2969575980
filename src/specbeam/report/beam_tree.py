"""A beam search's tree in the terminal: main line first, what branched off and died below it.

A line is a stretch of tokens without a branching. What it runs on to stands under it at the same depth, so that a long
answer does not wander off to the right; only side branches are indented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from specbeam.report.escape import visible
from specbeam.trace import Candidate, SearchTree

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

Place = tuple[int, int]  # step, number of the candidate
MOST_TEXT = 48  # characters of a line's tokens
ENDINGS = {"eos": "end token", "stop": "stop string", "length": "length limit"}


def beam_tree(tree: SearchTree, piece: Callable[[int], str], returned: int = 1) -> Tree:
    """A rich tree of one row's search. piece: token id → its text. returned: hypotheses that became answers."""
    from rich.text import Text
    from rich.tree import Tree as RichTree

    children, lost, ranks = _below(tree)
    root = RichTree(Text.assemble(("prompt", "bold"), (_legend(tree), "dim")), guide_style="dim")

    def grow(branch: Tree, place: Place) -> None:
        """The stretch that begins at `place`, its side branches below it, then what it runs on to."""
        while True:
            stretch = [place]
            while len(below := children.get(stretch[-1], [])) == 1:
                stretch.append(below[0])
            line = branch.add(_line(tree, stretch, piece, ranks, lost, returned))
            if not below:
                return
            for side in below[1:]:
                grow(line, side)
            place = below[0]

    for number, first in enumerate(children.get((-1, 0), [])):
        grow(root if number == 0 else root.add(Text("another beginning", style="dim")), first)
    return root


def _below(tree: SearchTree) -> tuple[dict[Place, list[Place]], dict[Place, list[Candidate]], dict[Place, int]]:
    """What is below each node (nodes: candidates that ran on or finished), the way to the best hypothesis first; what
    was lost there; and the rank of each hypothesis. The prompt is (-1, 0)."""
    ranks = {end: rank for rank, end in enumerate(tree.ends)}
    children: dict[Place, list[Place]] = {}
    lost: dict[Place, list[Candidate]] = {}
    running: dict[int, Place] = {}
    for number, step in enumerate(tree.steps):
        now: dict[int, Place] = {}
        for j, one in enumerate(step.candidates):
            parent = running.get(one.beam) if number else (-1, 0)
            if parent is None or one.score < -1e8:  # no text stands behind it
                continue
            if one.survived_as is None and one.finished_score is None:
                lost.setdefault(parent, []).append(one)
                continue
            children.setdefault(parent, []).append((number, j))
            if one.survived_as is not None:
                now[one.survived_as] = (number, j)
        running = now
    best: dict[Place, tuple[int, int]] = {}  # of each node: rank of the best hypothesis behind it, steps it lasts
    for place in sorted((child for own in children.values() for child in own), reverse=True):
        behind = [best[child] for child in children.get(place, [])]
        own = (ranks.get(place, len(ranks)), -place[0])
        best[place] = min([own, *behind])
    for below in children.values():
        below.sort(key=lambda place: (best[place], place))
    return children, lost, ranks


def _line(tree: SearchTree, stretch: list[Place], piece: Callable[[int], str], ranks: dict[Place, int],
          lost: dict[Place, list[Candidate]], returned: int) -> Text:
    from rich.text import Text

    candidates = [tree.steps[step].candidates[number] for step, number in stretch]
    text = visible("".join(piece(one.token) for one in candidates)).replace("\n", "↵")
    if len(text) > MOST_TEXT:
        text = f"{text[: MOST_TEXT // 2]}…{text[-MOST_TEXT // 2 + 1:]}"
    (first, _), (last, _) = stretch[0], stretch[-1]
    end, rank = candidates[-1], ranks.get(stretch[-1])
    leads = next((other for other in range(len(tree.ends)) if stretch[-1] in tree.path(other)), None)  # to which answer
    steps = f"step {first + 1}" if first == last else f"steps {first + 1}–{last + 1}"
    line = Text(f"“{text}”", style="bold green" if leads == 0 else "dim" if leads is None else "", no_wrap=True,
                overflow="ellipsis")
    line.append(f"  {steps}  {end.score:.2f}", style="dim")
    if rank is not None:
        reason = ENDINGS.get(end.finish_reason or "", end.finish_reason)
        line.append(f"  ■ {reason}  #{rank + 1}  score {end.finished_score:.4f}",
                    style="bold" if rank < returned else "dim")
        if rank == 0:
            line.append("  ◀ winner", style="bold green")
    elif end.finished_score is not None:
        line.append(f"  ■ finished, score {end.finished_score:.4f}, overtaken", style="dim")
    losers = [one for place in stretch for one in lost.get(place, [])]
    if losers:
        runner_up = max(losers, key=lambda one: one.score)
        word = visible(piece(runner_up.token)).replace("\n", "↵")
        ended = " ended" if runner_up.finish_reason else ""
        line.append(f"  ✗ {len(losers)} lost: “{word}”{ended} {runner_up.score:.2f}", style="dim")
    return line


def _legend(tree: SearchTree) -> str:
    return f"  {len(tree.steps)} steps; numbers: summed log-probability; ■ finished; ✗ lost, with the best of them"
