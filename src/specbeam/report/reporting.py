"""`specbeam report`: tables in the terminal, the page, and figures for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specbeam.errors import InputError
from specbeam.report.build import page
from specbeam.report.runs import read_run
from specbeam.report.side_by_side import names_of, not_comparable
from specbeam.report.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console


def report(folders: Sequence[Path], console: Console, figures: str | None = None, output: Path | None = None) -> int:
    """Print each run's table and write the page (and figures, in this format). The exit status.

    Raises InputError for a folder without a run, an unknown format and a place that cannot be written.
    """
    if figures is not None:
        from specbeam.report.figures import check_format

        check_format(figures)
    runs = [read_run(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise InputError("The same run folder was given twice: name each once.")
    names = names_of(runs)
    for run, name in zip(runs, names, strict=True):
        if len(runs) > 1:
            console.rule(name)
        print_table(run.summary, console)
        for sentence in run.missing:
            console.print(f"· {sentence}", style="yellow", highlight=False, markup=False)
    if len(runs) > 1:
        for sentence in not_comparable(runs, names):
            console.print(sentence, style="bold yellow", highlight=False, markup=False)
    path = output or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    try:
        path.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{str(path)!r} cannot be written ({why}): give another --output.") from None
    console.print(f"report: {path}", highlight=False, markup=False, soft_wrap=True)
    if figures is not None:
        from specbeam.report.figures import write_figures

        for run in runs:
            for written in write_figures(run, figures):
                console.print(f"figure: {written}", highlight=False, markup=False, soft_wrap=True)
    return 0
