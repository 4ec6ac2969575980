"""Progress: the time left in words, a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from specbeam.experiment import progress


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (0.4, "0 s"), (12.6, "13 s"), (59.6, "1:00 min"), (185, "3:05 min"), (7800, "2:10 h")],
)
def test_the_time_left_is_short_words(seconds: float, words: str) -> None:
    assert progress.time_left(seconds) == words


def run(console: Console, every: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", every)
    with progress.Progress(3, console) as bar:
        for cell in ("one", "two", "three"):
            bar.say(cell)
            bar.advance()


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    often, seldom = io.StringIO(), io.StringIO()
    run(Console(file=often), 0, monkeypatch)
    run(Console(file=seldom), 1000, monkeypatch)
    assert [line.split(",")[0] for line in often.getvalue().splitlines()] == ["1 of 3 cells done", "2 of 3 cells done"]
    assert seldom.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    run(Console(file=shown, force_terminal=True, width=100), 0, monkeypatch)
    text = shown.getvalue()
    assert "3/3" in text and "three" in text and "cells done" not in text
