"""Faults planted in a function's source, to show that a test would see them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType


def mutated(module: ModuleType, name: str, right: str, wrong: str) -> Callable:
    """The module's function with one mistake in it: `wrong` for `right`."""
    source = inspect.getsource(getattr(module, name))
    assert right in source, f"the fault is not planted: {name} is written otherwise now"
    names = dict(vars(module))
    exec(source.replace(right, wrong), names)
    return names[name]
