"""The search tree in the terminal: the winner's line, what died, what finished, in 100 columns."""

from __future__ import annotations

import io
import re

import pytest
from reference import model
from rich.console import Console
from tiny import prompts

from specbeam import beam_generate
from specbeam.report.beam_tree import beam_tree
from specbeam.trace import Candidate, SearchStep, SearchTree

WORDS = {1: " cat", 2: "<end>", 3: " dog", 4: " sat", 5: " ran\n", 6: "\x1b[31m\u202e"}


def printed(tree: SearchTree, piece=WORDS.__getitem__, width: int = 100, colour: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=colour,
                      color_system="truecolor" if colour else None)
    console.print(beam_tree(tree, piece))
    return console.file.getvalue()


@pytest.fixture
def small() -> SearchTree:
    """`cat sat` wins over `dog`; `dog ran` ran on to the last step and was lost there."""
    return SearchTree((
        SearchStep(0, (Candidate(1, 0, -.1, 0), Candidate(3, 0, -.5, 1), Candidate(4, 0, -2., None))),
        SearchStep(1, (Candidate(4, 0, -.2, 0), Candidate(2, 1, -.6, None, "eos", -.3), Candidate(5, 1, -.9, 1))),
        SearchStep(2, (Candidate(2, 0, -.3, None, "eos", -.1), Candidate(6, 1, -4., None))),
    ), ((2, 0), (1, 1)))


def test_survivors_losers_ends_and_the_winner_are_told_apart(small):
    text = printed(small)
    assert "“ cat sat<end>”  steps 1–3  -0.30  ■ end token  #1  score -0.1000  ◀ winner" in text
    assert "“ dog”  step 1  -0.50" in text
    assert "“<end>”  step 2  -0.60  ■ end token  #2  score -0.3000" in text
    assert "“ ran↵”  step 2  -0.90  ✗ 1 lost: “␛[31m⟨U+202E⟩” -4.00" in text, "control characters are written out"
    assert text.count("◀") == 1


def test_losers_are_dim_and_the_winner_is_bold(small):
    lines = printed(small, colour=True).splitlines()
    assert "\x1b[1;32m“ cat sat<end>”" in next(line for line in lines if "cat" in line)
    assert "\x1b[2m“ ran↵”" in next(line for line in lines if "ran" in line)


def test_every_survivor_of_a_real_search_is_on_a_line_and_no_line_is_too_long():
    out = beam_generate(model("llama"), prompts((5, 19, 12)), num_beams=4, max_new_tokens=24, trace=True,
                        eos_token_id=list(range(40, 60)))
    for tree in out.search:
        text = printed(tree, lambda token: f"{token} ")
        assert max(map(len, text.splitlines())) <= 100
        survivors = sum(one.survived_as is not None or one.finished_score is not None
                        for step in tree.steps for one in step.candidates if one.score > -1e8)
        spans = [found.split("–") for found in re.findall(r"”  steps? ([\d–]+)", text)]
        assert sum(int(span[-1]) - int(span[0]) + 1 for span in spans) == survivors
        assert text.count("#1 ") == 1 and f"#{len(tree.ends)} " in text
