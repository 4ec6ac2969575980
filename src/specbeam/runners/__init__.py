"""Who runs a model's forwards: the names, checked without torch. choose.py picks one, the other files are backends."""

from __future__ import annotations

from typing import Any

from specbeam.errors import InputError

RUNNERS = ("auto", "eager", "compile", "graph", "openvino")
PRECISIONS = ("f32", "bf16", "int8")  # of openvino


def check_runner(runner: Any, *precisions: Any) -> None:
    """Raises InputError for what is no runner, and for a precision (of target, of draft) that it does not have."""
    if runner not in RUNNERS:
        raise InputError(f"runner is {runner!r}: use one of {', '.join(RUNNERS)}.")
    for precision in precisions:
        if precision is None:
            continue
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}: use one of {', '.join(PRECISIONS)}.")
        if runner not in ("auto", "openvino"):
            raise InputError(f"precision={precision!r} is an option of the openvino runner, and runner is {runner!r}.")
