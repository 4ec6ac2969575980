"""Progress with the time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_SECONDS = 15.0  # where there is no terminal


class Progress:
    """Cells done of `total`. The bar is only drawn between cells, so that no thread runs beside a timed one."""

    def __init__(self, total: int, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.total, self.done, self.console = total, 0, console
        self.started = self.last_line = time.monotonic()
        self.counted_from = self.started  # the warm-up says nothing about the time left
        self.bar = Bar(
            TextColumn("{task.fields[left]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, left="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, what: str) -> None:
        if self.done == 0 and what != "warming up":
            self.counted_from = time.monotonic()
        self.bar.update(self.task, description=what, refresh=True)

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        seconds = (now - self.counted_from) / self.done * (self.total - self.done)
        left = f"{time_left(seconds)} left"
        self.bar.update(self.task, completed=self.done, left=left, refresh=True)
        if not self.console.is_terminal and now - self.last_line >= LINE_EVERY_SECONDS and self.done < self.total:
            self.last_line = now
            self.console.print(f"{self.done} of {self.total} cells done, {left}", highlight=False)


def time_left(seconds: float) -> str:
    """'12 s', '3:05 min' or '2:10 h'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
