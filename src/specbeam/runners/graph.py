"""CUDA graphs: the forward is recorded once for a shape and then replayed, so that no kernel waits for Python.

Decoding at batch 1 is bound by kernel launches, not by memory: a 24-layer draft then costs nearly what its 36-layer
target does. Nothing is traced, so that any model runs whose forward does not wait for the host.
Idea: slots, inputs and outputs stay at one address; a forward runs as it is the first time its shape is seen, once more
on the recording's stream, is recorded the third time, and replayed from then on. Slots are looked at in a few widths
only, and go back to a pool when a batch ends, so that the next batch finds the graphs of the last one. Rows that end
stay as rows whose result nobody reads. Prompts run eagerly. What is recorded is a forward, or more (chains.py).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol
from weakref import finalize

import torch
from torch import Tensor

from specbeam.engine.cache import SlotCache, SlotLayer
from specbeam.engine.runner import EAGER, Adapter, Runner

RECORD = ("graph", "compile")  # runners that do
MOST_NEW = 64  # tokens a row of a function that is recorded; more are a prompt
TOKENS, _ANSWER = 8, 32  # the host can read so many tokens of a row, and an answer of that size, without a copy
_NARROWEST = 256
_MOST_GRAPHS = 128  # of one set of slots
_IDLE, _IDLE_BYTES = 8, 2**33  # sets of slots that a runner keeps for the next batch, and what they may hold
_warming = False

Replay = Callable[[], None]
Outputs = tuple[Tensor, ...]
Around = Callable[[Adapter, "Slots"], AbstractContextManager]


def make(adapter: Adapter, precision: str | None = None) -> Runner:
    """Raises RuntimeError, with the reason, for a model that is not on one GPU."""
    check_device(adapter)
    return runner("graph", OnCuda(), own_attention)


def check_device(adapter: Adapter) -> None:
    places = {weight.device for weight in adapter.model.parameters()}
    if {place.type for place in places} != {"cuda"}:
        raise RuntimeError("CUDA graphs need a GPU")
    if len(places) > 1:
        raise RuntimeError(f"CUDA graphs need the whole model on one GPU, and it is on {len(places)}")


class Record(Protocol):
    """How a function is recorded: `warm` runs it as it is, a call records it and gives what replays it."""

    def warm(self, function: Callable[[], Outputs]) -> Outputs: ...

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]: ...


@contextmanager
def warming() -> Iterator[None]:
    """Within it, a shape is recorded the first time it is seen: what follows finds all that came up here."""
    global _warming
    before, _warming = _warming, True
    try:
        yield
    finally:
        _warming = before


def is_warming() -> bool:
    return _warming


def nothing_around(adapter: Adapter, slots: Slots) -> AbstractContextManager:
    return nullcontext()


def runner(name: str, record: Record | None, *ways: Around) -> Runner:
    """record: how a function is recorded (None: it is not, and runs from its static inputs each time). ways: what the
    forward runs within; when one fails, the next is taken, and at last the forward as it is."""
    graphs = Graphs(record, *ways)
    return Runner(name, graphs.open, graphs.forward, width, fuse=graphs.fuse)


def own_attention(adapter: Adapter, slots: Slots) -> AbstractContextManager:
    if find_spec("triton") is None:
        return nullcontext()
    from specbeam.runners.attention import own

    return own()


def width(slots: int) -> int:
    """The narrowest of 256, 384, 512, 768, 1024, 1536, … that holds so many slots."""
    wide = _NARROWEST
    while wide < slots:
        wide = wide * 3 // 2 if wide & (wide - 1) == 0 else wide * 4 // 3
    return wide


class OnCuda:
    """Records functions as CUDA graphs, on a stream of their own; what they do first (a compiler looks at the stream
    too) is done there as well. All graphs share their working memory: one is replayed at a time."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], Outputs]) -> Outputs:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        """The function's kernels as a graph, and the tensors that each replay fills."""
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        gc.disable()  # a graph of a model that is gone ends the recording in which it is thrown away
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = function()
        except Exception:  # a recording that fails leaves its stream, its pool and its random numbers behind
            torch.cuda.set_stream(stream)
            self.pool, numbers = torch.cuda.graph_pool_handle(), torch.Generator(device="cuda")
            numbers.seed()
            torch.cuda.default_generators[stream.device_index].graphsafe_set_state(numbers.graphsafe_get_state())
            raise
        finally:
            if collects:
                gc.enable()
        return graph.replay, output


@dataclass
class Kept:
    """A function over some slots: where its inputs are, how often it ran, and, when it is recorded, its graph."""

    inputs: list[Tensor]
    runs: int = 0
    replay: Replay | None = None
    outputs: Outputs = ()


class Slots(SlotCache):
    """Slots that stay where they are. A row that leaves makes room among the living; the last rows idle."""

    def __init__(self, rows: int, capacity: int, device: torch.device, strict: bool):
        super().__init__(rows, capacity, device, strict)
        self.count, self.number = rows, 0  # the eldest are taken first: batches alike then find the same ones
        self.graphs: dict[tuple, Kept] = {}
        # Written by kernels (ends.py) on a GPU: each row's last tokens, as a ring; what the last verification said.
        self.tokens, self.answers = (torch.zeros(rows, wide, dtype=torch.long, pin_memory=True) if device.type == "cuda"
                                     else None for wide in (TOKENS, _ANSWER))

    def size(self) -> int:
        """Bytes of keys and values."""
        return sum(kept.nbytes for layer in self.layers for kept in (layer.keys, layer.values) if kept is not None)

    def resize(self, capacity: int) -> None:
        super().resize(capacity)
        self.graphs.clear()

    def keep_rows(self, index: Tensor) -> None:
        for layer in self.layers:
            for kept in (layer.keys, layer.values):
                assert kept is not None
                kept[: len(index)] = kept[index]


class Lease:
    """Slots while a batch uses them."""

    def __init__(self, graphs: Graphs, of: Slots):
        self.graphs, self.held, self.count = graphs, [of], of.count
        self.view, self.slots = 0, torch.empty(0)
        self.span: slice | None = None
        self.empty = True  # nothing was read yet: what comes is a prompt

    @property
    def of(self) -> Slots:
        return self.held[0]

    @property
    def capacity(self) -> int:
        return self.of.capacity

    def resize(self, capacity: int) -> None:
        self.of.resize(width(capacity))

    def keep_rows(self, index: Tensor) -> None:
        self.count = len(index)
        with torch.inference_mode():
            self.of.keep_rows(index)

    @torch.inference_mode()
    def join(self, more: Lease) -> None:
        """Go on with another batch's rows too, behind these; both have the same capacity."""
        mine, its = self.of, more.of
        both = self.graphs.take(self.count + more.count, mine.capacity, mine, most=mine.capacity)
        for number, layer in enumerate(mine.layers):
            if number == len(both.layers):
                both.layers.append(SlotLayer(both))
            to, other = both.layers[number], its.layers[number]
            assert layer.keys is not None and layer.values is not None
            if not to.is_initialized:
                like = [kept[:1].expand(both.count, -1, -1, -1) for kept in (layer.keys, layer.values)]
                to.lazy_initialization(like[0], like[1])
            for new, old, behind in ((to.keys, layer.keys, other.keys), (to.values, layer.values, other.values)):
                assert new is not None and behind is not None
                new[: self.count], new[self.count :] = old[: self.count], behind[: more.count]
        self.graphs.give_back(self.held)
        self.held[0], self.count = both, both.count


class Graphs:
    """The slots and the recorded functions of one model."""

    def __init__(self, record: Record | None, *ways: Around):
        self.record, self.ways = record, [*ways, nothing_around]
        self.idle: list[Slots] = []
        self.made = 0

    def open(self, adapter: Adapter, rows: int, capacity: int) -> Lease:
        lease = Lease(self, self.take(rows, width(capacity), SlotCache(0, 0, adapter.device, adapter.strict)))
        finalize(lease, self.give_back, lease.held)
        return lease

    def take(self, rows: int, capacity: int, like: SlotCache, most: float = float("inf")) -> Slots:
        """The smallest idle slots that hold so much (and no more than `most`), or new ones."""
        slots = min((one for one in self.idle if one.count == rows and capacity <= one.capacity <= most),
                    key=lambda one: (one.capacity, one.number), default=None)
        self.idle = [one for one in self.idle if one is not slots]
        if slots is None:
            slots, self.made = Slots(rows, capacity, like.rows.device, like.strict), self.made + 1
            slots.number = self.made
        return slots

    def give_back(self, held: list[Slots]) -> None:
        self.idle = [*self.idle, held[0]][-_IDLE:]
        while len(self.idle) > 1 and sum(slots.size() for slots in self.idle) > _IDLE_BYTES:
            self.idle.pop(0)

    def forward(self, adapter: Adapter, lease: Lease, tokens: Tensor, positions: Tensor, visible: Tensor,
                near: Tensor | None, keep: Tensor | None) -> Tensor:
        given = [tokens, positions, visible, lease.slots, *(one for one in (near, keep) if one is not None)]
        prompt, lease.empty = lease.empty or tokens.shape[1] > MOST_NEW, False
        return self.fuse(adapter, lease, _forward, (lease.view, near is not None, keep is not None), 0, *given,
                         prompt=prompt)[0]

    def fuse(self, adapter: Adapter, lease: Lease, function: Callable[..., Outputs], static: tuple, carried: int,
             *given: Tensor, prompt: bool = False) -> list[Tensor]:
        """function(adapter, slots, *static, *given), recorded. given: [rows, …] each, on the device or pinned.

        The first `carried` outputs become the first inputs of the next time (or are these, changed in place): they come
        back as they lie there, and given again they need no copy. The others are copies of one's own."""
        if not torch.is_inference_mode_enabled():  # to enter it takes its time
            with torch.inference_mode():
                return self.fuse(adapter, lease, function, static, carried, *given, prompt=prompt)
        slots, rows = lease.of, len(given[0])
        key = (function, static, carried, *(tuple(one.shape[1:]) for one in given))
        # Ones: a row that is never filled then attends to something, and what it writes is finite.
        kept = slots.graphs.pop(key, None) or Kept([
            torch.ones(slots.count, *one.shape[1:], dtype=one.dtype, device=slots.rows.device) for one in given])
        if kept.replay is None:  # a compiler or a recording may run what it is given
            given = tuple(one.clone() for one in given)

        def fill() -> None:
            for mine, one in zip(kept.inputs, given, strict=True):
                if mine.data_ptr() != one.data_ptr():
                    (mine if rows == slots.count else mine[:rows]).copy_(one, non_blocking=True)

        def run() -> Outputs:
            # "position": which ones they are only the host can say.
            mine = replace(adapter, keeps="") if adapter.keeps == "position" and not prompt else adapter
            outputs = function(mine, slots, *static, *kept.inputs)
            for old, new in zip(kept.inputs, outputs[:carried], strict=False):
                if new is not old:
                    old.copy_(new)
            return outputs[carried:]

        found: Outputs = ()
        if prompt:
            fill()
            return [one[:rows] for one in run()]
        slots.graphs[key] = kept
        if len(slots.graphs) > _MOST_GRAPHS:  # the one that was not used for longest
            slots.graphs.pop(next(iter(slots.graphs)))
        for _ in range(3 if _warming else 1):
            if kept.replay is None:
                found = self._advance(adapter, slots, kept, fill, run)
        if kept.replay is not None:
            fill()
            kept.replay()
            found = kept.outputs
        return [*(one[:rows] for one in kept.inputs[:carried]), *(one[:rows].clone() for one in found)]

    def _advance(self, adapter: Adapter, slots: Slots, kept: Kept, fill: Callable[[], None],
                 run: Callable[[], Outputs]) -> Outputs:
        """As it is, then within what is around it (which may compile), then recorded: a rare shape costs nothing."""
        kept.runs += 1
        fill()
        if kept.runs == 1:
            return run()
        try:
            with self.ways[0](adapter, slots):
                if self.record is None:
                    return run()
                if kept.runs == 2:
                    return self.record.warm(run)
                kept.replay, kept.outputs = self.record(run)
                return kept.outputs
        except Exception as failure:  # whatever a compiler or a driver says of a model it does not know
            self._give_up(adapter, failure)
            kept.runs = 1
            fill()
            return run()

    def _give_up(self, adapter: Adapter, failure: BaseException) -> None:
        """One step back for good: from compiled to recorded, at last to eager."""
        if len(self.ways) > 1:
            self.ways.pop(0)
        else:
            self.record = None
        while failure.__context__ is not None:  # the first one, of those that it led to
            failure = failure.__context__
        logging.getLogger("specbeam").warning(
            "%s runs with runner %s from now on (%s).", adapter.name, "graph" if self.record else "eager",
            f"{type(failure).__name__}: {failure}".splitlines()[0][:200])


def _forward(adapter: Adapter, slots: Slots, view: int, slides: bool, last_only: bool, tokens: Tensor,
             positions: Tensor, visible: Tensor, places: Tensor, *more: Tensor) -> Outputs:
    slots.slots, slots.span, slots.view = places, None, view
    near, keep = more[0] if slides else None, more[-1] if last_only else None
    return (EAGER.forward(adapter, slots, tokens, positions, visible, near, keep),)
