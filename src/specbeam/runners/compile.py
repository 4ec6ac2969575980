"""torch.compile of the forward: norms, rotary embedding, mask, slots and MLP become few kernels.

On a GPU one decoder layer is compiled and serves all layers (their weights and slots are its inputs), so that
compiling takes the time of one layer; what is compiled is then recorded by graph.py. On a CPU the whole forward is
compiled with its weights frozen in, by inductor. Each number of new tokens and each width of slots is compiled the
first time it runs, and what was compiled is kept on disk (inductor's cache) for the next process.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specbeam.engine.runner import Adapter, Runner
from specbeam.runners import cuda, fuse, graph, traced
from specbeam.runners.graph import Slots

# One row's product is a sum over rows of weights: with this, inductor writes it as such, and tunes how.
# Tuning takes most of the time of compiling (20 s a shape and more): it is for plain steps alone.
_TUNED: dict[str, Any] = {"coordinate_descent_tuning": True}
_CPU: dict[str, Any] = {"freezing": True}


def make(adapter: Adapter, precision: str | None = None) -> Runner:
    """Raises RuntimeError, with the reason, for a model whose layers cannot be found."""
    if adapter.device.type == "cuda":
        graph.check_device(adapter)
        return by_layer(adapter, "inductor", _early(adapter.device), graph.OnCuda(), _TUNED)
    return graph.runner("compile", None, Whole(torch.compile(_forward, fullgraph=True, dynamic=False, options=_CPU)))


def _early(device: torch.device) -> dict[str, Any]:
    """Hopper and later: a kernel begins while the one before it ends (programmatic dependent launch)."""
    import torch._inductor.config as inductor

    able = torch.cuda.get_device_capability(device) >= (9, 0) and hasattr(inductor.triton, "enable_pdl")
    return {"triton.enable_pdl": True} if able else {}


def by_layer(adapter: Adapter, backend: str, options: dict[str, Any] | None, record: graph.Record | None,
             tuned: dict[str, Any] | None = None) -> Runner:
    """The runner that compiles one decoder layer for all. options: of few tokens; tuned: also for one alone."""
    norms = traced.norms(_layers(adapter.model))
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    one = compiled(_run, backend=_fusing(backend), options=options if tuned is None else {**(options or {}), **tuned})
    few = compiled(_run_few, backend=_fusing(backend), options=options)
    ways = Layers(one, few, compiled(_run_more, backend=backend), norms)
    return graph.runner("compile", record, ways, *([graph.own_attention] if record else []))


@cache
def _fusing(backend: str) -> Callable[..., Any]:
    """That backend, given what fuse.py makes of a layer."""
    def compiler(module: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, Any] | None = None) -> Any:
        fuse.fuse(module.graph)
        module.recompile()
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(module, inputs, config_patches=options)
        return torch._dynamo.lookup_backend(backend)(module, inputs)
    return compiler


class Layers:
    """Within it, every decoder layer of the model is the compiled one."""

    def __init__(self, one: Callable[..., Any], few: Callable[..., Any], more: Callable[..., Any],
                 norms: dict[type, type] | None = None):
        """Compiled: for one token of one row, for what fuse.py calls few, and for more. norms: classes that are its
        Norm or PlusNorm."""
        self.one, self.few, self.more, self.known = one, few, more, {nn.Linear: traced.Product, **(norms or {})}

    @contextmanager
    def __call__(self, adapter: Adapter, slots: Slots) -> Iterator[None]:
        layers, others = _layers(adapter.model), _beside(adapter.model)
        # A layer's number is all that tells it from the next: the slots that it is given say which one it is.
        numbered: list[tuple[Any, int]] = [(part, part.layer_idx) for layer in layers for part in layer.modules()
                    if isinstance(getattr(part, "layer_idx", None), int)]
        forwards = [(part, part.__dict__.get("forward")) for part in (*layers, *others)]
        known: list[tuple[Any, type]] = [(part, type(part)) for layer in layers for part in layer.modules()
                                         if type(part) in self.known]
        head = adapter.model.get_output_embeddings()
        try:
            for part, kind in known:
                part.__class__ = self.known[kind]
            if type(head) is nn.Linear:
                known.append((head, nn.Linear))
                head.__class__ = traced.Head
            for part, _ in numbered:
                part.layer_idx = 0
            for layer, place in zip(layers, slots.layers, strict=True):
                layer.forward = partial(self._layer, layer, layer is layers[0], slots, place)
            for part in others:
                part.forward = partial(self._other, part)
            own = graph.own_attention(adapter, slots) if adapter.device.type == "cuda" else nullcontext()
            with own, _attention(), _compiling(adapter):
                yield
        finally:
            for part, kind in known:
                part.__class__ = kind
            for part, number in numbered:
                part.layer_idx = number
            for part, forward in forwards:
                part.__dict__.pop("forward", None)
                if forward is not None:
                    part.forward = forward

    def _other(self, part: nn.Module, *args: Any, **options: Any) -> Any:
        return self._compiled(args, options)(part, list(args), options)

    def _layer(self, layer: nn.Module, first: bool, slots: Slots, place: Any, *args: Any, **options: Any) -> Any:
        if first:
            cuda.begin()
        mine = Place(place.keys, place.values, slots.rows, slots.slots, slots.view)
        return self._compiled(args, options)(layer, [mine if one is slots else one for one in args],
                             {name: mine if one is slots else one for name, one in options.items()})

    def _compiled(self, args: Any, options: dict[str, Any]) -> Callable[..., Any]:
        hidden = next((one for one in (*args, *options.values()) if isinstance(one, Tensor)), None)
        if hidden is not None and not hidden.is_floating_point():  # an embedding's tokens: nothing worth tuning
            return self.more if hidden.numel() > fuse.MOST_TOKENS else self.few
        if hidden is None or hidden.numel() > fuse.MOST_TOKENS * hidden.shape[-1]:
            return self.more
        return self.one if hidden.numel() == hidden.shape[-1] else self.few


@contextmanager
def _attention() -> Iterator[None]:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = traced.attend(before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


class Place:
    """One layer's slots, as a compiled layer sees them: the same for every layer but for its buffers."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, view: int):
        self.keys, self.values, self.rows, self.slots, self.view = keys, values, rows, slots, view

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.slots] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.view], self.values[:, :, : self.view]


def _run(part: nn.Module, args: list[Any], options: dict[str, Any]) -> Any:
    return type(part).forward(part, *args, **options)


# Each its own code: what dynamo keeps of the others is not looked at.
def _run_few(part: nn.Module, args: list[Any], options: dict[str, Any]) -> Any:
    return type(part).forward(part, *args, **options)


def _run_more(part: nn.Module, args: list[Any], options: dict[str, Any]) -> Any:
    return type(part).forward(part, *args, **options)


class Whole:
    """Within it, the model's forward is compiled as one."""

    def __init__(self, compiled: Callable[..., Any]):
        self.compiled = compiled

    @contextmanager
    def __call__(self, adapter: Adapter, slots: Slots) -> Iterator[None]:
        model: Any = adapter.model
        model.forward = partial(self.compiled, model)
        try:
            with _compiling(adapter):
                yield
        finally:
            del model.forward


def _forward(model: nn.Module, **options: Any) -> Any:
    return type(model).forward(model, **options)


@contextmanager
def _compiling(adapter: Adapter) -> Iterator[None]:
    """As many shapes as there are; says how long it took when something was compiled."""
    from torch._dynamo.utils import counters

    before, began = counters["stats"]["unique_graphs"], time.perf_counter()
    with (torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000),
          warnings.catch_warnings()):
        warnings.filterwarnings("ignore", message="TensorFloat32")  # fp32 means fp32
        yield
    made = counters["stats"]["unique_graphs"] - before
    if made:
        logging.getLogger("specbeam").info("%s: compiled %d new shape%s in %.1f s", adapter.name, made,
                                           "s" * (made > 1), time.perf_counter() - began)


def _beside(model: Any) -> list[Any]:
    """What stands beside the layers and is worth compiling: embeddings (what comes behind them then begins earlier),
    also the rotary one, and the last norm."""
    home = next(part for part in model.get_decoder().modules()
                if any(isinstance(child, nn.ModuleList) and child[0] is _layers(model)[0] for child in part.children()))
    return [part for part in home.children() if type(part) is nn.Embedding or hasattr(part, "embed_scale")
            or not isinstance(part, nn.ModuleList | nn.Embedding | nn.Linear | nn.Dropout)]


def _layers(model: Any) -> list[Any]:
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [part for part in model.get_decoder().modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(found) != 1:
        raise RuntimeError(f"it has {len(found)} lists of {total} layers, and one is needed")
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise RuntimeError("its attention depends on the number of the layer")
    return list(found[0])
