"""Which runner a model's forwards go through: eager, or one of the backends beside this file.

A backend is a module with `make(adapter, precision) -> Runner`, imported only when it is asked for; it raises, with
the reason, when it cannot run the model. What it made is used only if a tree of tokens gets the plain forward's logits
from it (the probe of engine/support.py). Else the next one in `_ORDER` is tried, and one warning says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from specbeam.engine.runner import EAGER
from specbeam.errors import InputError
from specbeam.runners import check_runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specbeam.engine.runner import Adapter, Runner

# What is tried, in this order; eager is always left.
_ORDER = {"openvino": ("openvino",), "compile": ("compile", "graph"), "graph": ("graph",), "eager": ()}
_AUTO: dict[str, tuple[str, ...]] = {"cpu": ("openvino",), "cuda": ("graph",)}  # silent where a package is missing

_outside: int | None = None  # torch's threads before it was left one

_wanted: WeakKeyDictionary[PreTrainedModel, tuple[str, str | None]] = WeakKeyDictionary()
# A runner must not hold its model, or neither would ever be freed.
_made: WeakKeyDictionary[PreTrainedModel, tuple[tuple, Runner]] = WeakKeyDictionary()


def use_runner(model: PreTrainedModel, runner: str = "auto", precision: str | None = None) -> str:
    """Run this model's forwards through `runner` from now on; the name of the one that does, after falling back.

    runner: auto | eager | compile | graph | openvino. precision: what the runner computes in (openvino: "f32", "bf16"
    or "int8" weights); None: the model's own dtype. Raises InputError for other names, and for a model that specbeam
    cannot run at all.
    """
    from specbeam.engine.support import adapt

    want_runner(model, runner, precision)
    return adapt(model).runner.name


def want_runner(model: PreTrainedModel, runner: str, precision: str | None = None) -> None:
    """The same, but made only when the model is first used."""
    check_runner(runner, precision)
    _wanted[model] = (runner, precision)


def wanted_runner(model: PreTrainedModel) -> tuple[str, str | None]:
    """What was asked for: eager, for a model that nobody said anything of."""
    return _wanted.get(model, ("eager", None))


def runner_of(adapter: Adapter) -> Runner:
    """The runner of an adapter whose model was probed eagerly; made once, and again when the weights changed."""
    model = adapter.model
    name, precision = wanted_runner(model)
    order = _AUTO.get(adapter.device.type, ()) if name == "auto" else _ORDER[name]
    if not order:
        return EAGER
    key = (name, precision, threads(), _state(model))
    if model not in _made or _made[model][0] != key:
        _made.pop(model, None)
        _made[model] = (key, _make(adapter, order, precision, quiet=name == "auto"))
    return _made[model][1]


def threads() -> int:
    """How many a runner may have: torch's."""
    return _outside or torch.get_num_threads()


@contextmanager
def alone() -> Iterator[None]:
    """Torch on one thread: a runner has the others."""
    global _outside
    before, _outside = _outside, threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_outside if before is None else 1)
        _outside = before


def _make(adapter: Adapter, order: tuple[str, ...], precision: str | None, quiet: bool) -> Runner:
    from specbeam.engine.support import eval_mode, runner_error

    reasons: list[str] = []
    for name in order:
        try:
            with eval_mode(adapter.model), torch.no_grad():
                runner = import_module(f"specbeam.runners.{name}").make(adapter, precision)
            dtype = torch.bfloat16 if precision == "bf16" else adapter.model.dtype
            error = runner_error(adapter, runner, dtype, itself=precision == "int8")
        except InputError:
            raise
        except ImportError as failure:
            error = "" if quiet else str(failure)
        except Exception as failure:  # whatever a compiler says of a model it does not know
            error = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        if error is None:
            _warn(adapter, reasons, name)
            return runner
        if error:
            reasons.append(f"{name}: {error}")
    _warn(adapter, reasons, "eager")
    return EAGER


def _warn(adapter: Adapter, reasons: list[str], instead: str) -> None:
    if reasons:
        logging.getLogger("specbeam").warning("%s runs with runner %s instead (%s).", adapter.name, instead,
                                              "; ".join(reasons))


def _state(model: Any) -> int:
    """Changes when a weight is replaced or written to: what was captured or converted is then of another model."""
    return hash((model.dtype, model.device, tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        for weight in (*model.parameters(), *model.buffers()))))
