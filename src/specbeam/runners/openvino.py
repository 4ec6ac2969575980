"""OpenVINO on a CPU: the same token-tree forward, by kernels that use every core and the whole memory bandwidth.

The model's state is append-only, while a tree's slots are written again and again. So slots stay logical: each
position of the state remembers which slot was written there, a position whose slot was written again is dead, and the
mask that the model gets is the tree's, gathered by owner. When too much of the state is dead it is compacted.
One compiled model serves any number of trees: each has an infer request, whose state is its keys and values.
In numpy: the model's weights pass through the caches in every forward, so that what runs between two of them runs
cold, and there a call of torch costs ten of numpy's (docs/log.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from specbeam.engine.runner import Adapter, Runner
from specbeam.runners.choose import threads
from specbeam.runners.openvino_cache import compute_type, load
from specbeam.runners.openvino_export import keep_narrow

_HIDDEN = -1e38  # added to a score; finite (in bfloat16 too), as NaN comes of inf - inf
_ADDED = np.array([_HIDDEN, 0.0], dtype=np.float32)  # by whether a token is seen
_FEW, _WIDENS = 4, 5  # more tokens than this cost as much as that many more, if weights must be widened for them
_ROOM, _MOST_KEPT = 2**16, 2**22  # numbers that an input may grow by where it lies, and beyond which it is given back
_MOST_NEW = 64  # tokens of a chain whose mask is worth keeping
_SLACK = 64  # dead positions that are left to lie, and beside them a quarter of what lives


def make(adapter: Adapter, precision: str | None) -> Runner:
    """Raises what OpenVINO says of a model that it cannot convert."""
    if adapter.device.type != "cpu":
        raise RuntimeError(f"it runs on a CPU, and the model is on {adapter.device}")
    requests = _Requests(load(adapter, precision), compute_type(adapter, precision))

    def open_slots(adapter: Adapter, rows: int, capacity: int) -> StateSlots:
        return StateSlots(requests, rows, capacity)

    name = "openvino" if precision is None else f"openvino {precision}"
    return Runner(name, open_slots, _forward, own_threads=True, reads=True)


class _Requests:
    """Infer requests of one model, lent to trees and used again when a tree is gone."""

    def __init__(self, model: ov.Model, kind: str):
        self.model, self.kind, self.threads = model, kind, threads()
        self.shape, self.wasted = (0, 0), 0.0  # rows and tokens of the last forward; those in vain since it was chosen
        for unread in [one for one in model.get_parameters() if not one.output(0).get_target_inputs()]:
            model.remove_parameter(unread)  # `near` of a model without a window
        self.widens = _WIDENS * keep_narrow(model)
        self.vocabulary = model.output(0).get_partial_shape()[2].get_length()
        self.forget()

    def forget(self) -> None:
        """Compile again: a forward that failed half-way leaves all requests, which share one graph, in a bad state."""
        self.free: list[Any] = []
        self.compiled = ov.Core().compile_model(self.model, "CPU", {
            "INFERENCE_PRECISION_HINT": self.kind, "KV_CACHE_PRECISION": self.kind, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
        weights = sum(np.prod(shape) for shape in (
            node.get_output_shape(0) for node in self.model.get_ops() if node.get_type_name() == "Constant")
            if len(shape) == 2)
        # What a change of shape and the way back cost, 2.5 µs a node each, in tokens at 100 GFLOP/s a thread (both as
        # measured on two machines with AVX-512).
        nodes = len(self.compiled.get_runtime_model().get_ops())
        self.patience = 2 * 2.5e-6 * nodes * 1e11 * self.threads / (2 * weights)

    def width(self, rows: int, new: int, exact: bool = False) -> int:
        """How many tokens a row the coming forward takes: as many as the last one, if it was little wider.

        Another shape costs: every node prepares itself anew, which is a third of a small model's forward. Tokens in
        vain are rented for as long as they cost less than that."""
        wide = self.shape[1] if self.shape[0] == rows else 0
        self.wasted += rows * (wide - new) + self.widens * ((rows * wide > _FEW) - (rows * new > _FEW))
        if wide <= new or exact or self.wasted > self.patience:
            wide, self.wasted = new, 0.0
        self.shape = (rows, wide)
        return wide

    def lend(self, borrower: StateSlots) -> Any:
        request = self.free.pop() if self.free else self.compiled.create_infer_request()
        request.reset_state()
        weakref.finalize(borrower, self.free.append, request)
        return request


def _forward(adapter: Adapter, slots: StateSlots, tokens: Tensor, positions: Tensor, visible: Tensor,
             near: Tensor | None, keep: Tensor | None) -> Tensor:
    return slots.forward(tokens, positions, visible, near, keep)


class StateSlots:
    """A tree's slots in the state of one infer request; to TokenTree it is what SlotCache is."""

    def __init__(self, requests: _Requests, rows: int, capacity: int):
        self.requests, self.capacity = requests, capacity
        self.request = requests.lend(self)
        self.slots = torch.empty(rows, 0, dtype=torch.long)
        self.span: slice | None = None
        self.view = self.length = 0  # length: positions of the state
        self.order: np.ndarray
        self.chosen = self.reordered = False
        self.inputs = {port.get_any_name() for port in self.request.model_inputs}
        self.owner = np.zeros((rows, 0), dtype=np.int64)  # the slot that was written at each position
        self.alive = np.ones((rows, 0), dtype=bool)  # and was not written again; True beyond `length`
        self.plain = True  # position p holds slot p in every row, and nothing is dead
        self.row: Row | None = None  # while one row is read as a chain, this is kept up to date in place of these three
        self.held: dict[tuple[int, int, int], dict[str, tuple[np.ndarray, ov.Tensor]]] = {}  # inputs, by their sizes
        self.set: tuple[int, int, int] | None = None  # which of them the request has
        self.masks = [name for name in ("mask", "near") if name in self.inputs]
        self.added = {name: _Sized(partial(self.request.set_tensor, name)) for name in self.masks}
        self.output = _Sized(self.request.set_output_tensor)
        self.rows = self.wide = 0  # of the last forward, and its tokens of a row
        self.changed = False  # whether the one before was of another size
        self._in_order(rows)

    @property
    def kept(self) -> int:
        """Tokens of a row in the last forward, which the next one may have, too; 0: it had more rows."""
        return self.wide if self.rows == len(self.order) else 0

    def forget_width(self) -> None:
        """The coming forward is as wide as it must be."""
        self.requests.shape = 0, 0

    def resize(self, capacity: int) -> None:
        self.capacity = capacity

    def keep_rows(self, index: Tensor) -> None:
        rows = index.numpy()
        self._end_row()
        self.owner, self.alive = self.owner[rows], self.alive[rows]
        if self.length:
            self._in_order(len(rows), self.order[rows])
        else:
            self._in_order(len(rows))

    def join(self, more: StateSlots) -> None:
        """Go on with another batch's rows too, behind these; both have the same capacity."""
        for slots in (self, more):
            slots._compact()
        longest = max(self.length, more.length)
        its = {state.name: state for state in more.request.query_state()}
        for state in self.request.query_state():
            rows = [torch.from_numpy(one.state.data)[torch.from_numpy(slots.order).long()]
                    for one, slots in ((state, self), (its[state.name], more))]
            both = [torch.nn.functional.pad(kept, (0, 0, 0, longest - kept.shape[2])) for kept in rows]
            state.state = _tensor(torch.cat(both), state.state.element_type)
        for slots in (self, more):
            slots._room(longest)
            slots.alive[:, slots.length : longest] = False
        self.owner, self.alive = (np.concatenate([mine[:, :longest], theirs[:, :longest]]) for mine, theirs in (
            (self.owner, more.owner), (self.alive, more.alive)))
        self.length, self.plain = longest, False
        self._in_order(len(self.owner))

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, near: Tensor | None, keep: Tensor | None
                ) -> Tensor:
        rows, new = tokens.shape
        self._end_row()
        if self.length + new - self.view > _SLACK + self.view // 4:
            self._compact()
        self._append(self.slots.numpy(), self._width(rows, new))
        wanted = {"mask": visible, "near": visible if near is None else near}
        masks = {name: self._seen(wanted[name].numpy()) for name in self.masks}
        kept = None if keep is None else keep.numpy()[:, None]
        logits = self._infer(tokens.numpy(), positions.numpy(), masks, kept)
        return torch.from_numpy(logits.copy())  # its memory is the next forward's too

    def read(self, tokens: Sequence[Sequence[int]], depth: Sequence[int], highest: int | None, window: int | None,
             keep: Sequence[int] | None, exact: bool) -> np.ndarray:
        """A chain in each row, where slot i is position i: tokens [rows, new] behind the row's first `depth` [rows];
        what it held beyond them is dead. highest: of the positions that exist; keep: [rows], the one token of each row
        whose logits are wanted; exact: not wider than that. Logits [rows, new or 1, vocabulary], until the next
        forward."""
        start, new, view = self.length, len(tokens[0]), max(depth) + len(tokens[0])
        if len(depth) == 1 and (window is None or view <= window):
            logits = self._read_row(tokens[0], depth[0], highest, None if keep is None else keep[0], exact)
            if logits is not None:
                return logits
        self._end_row()
        if not (self.plain and view == start + new and min(depth) == start):
            self.plain = False
            self.alive[:, :start] &= self.owner[:, :start] < np.array(depth)[:, None]
            if start + new - view > _SLACK + view // 4:
                self._compact()
                start = self.length
        positions: Any = [[*range(first, first + new)] for first in depth]
        self._grow(positions, self._width(len(depth), new, exact))
        masks = dict.fromkeys(("mask", "near"), self.alive[:, None, : self.length])
        if window is not None and view > window:
            masks["near"] = masks["mask"] & (
                self.owner[:, None, : self.length] > np.array(positions)[..., None] - window)
        if highest is not None:
            positions = np.minimum(positions, highest)
        return self._infer(tokens, positions, masks, None if keep is None else [[place] for place in keep], start)

    def _read_row(self, tokens: Sequence[int], depth: int, highest: int | None, keep: int | None, exact: bool
                  ) -> np.ndarray | None:
        """`read` of one row, in a third of the time; None: its slots do not lie in their order."""
        start, new = self.length, len(tokens)
        row = self.row
        if row is None:
            alive = self.alive[0, :start]
            living = int(alive.sum())
            if not np.array_equal(self.owner[0, :start][alive], _count(living)):
                return None
            row = self.row = Row(_ADDED.take(alive.view(np.uint8)), living)
        if row.living < depth:
            return None
        row.end(depth, start)
        if start - depth > _SLACK + (depth + new) // 4:
            self._compact()
            return self._read_row(tokens, depth, highest, keep, exact)
        wide = self._width(1, new, exact)
        self.length = end = start + wide
        row.grow(new, start, end)
        positions: Any = range(depth, depth + new)
        if highest is not None and depth + new > highest:
            positions = [min(place, highest) for place in positions]
        self._give([tokens], [positions], keep)
        for name in self.masks:
            lines = self.added[name].shaped(1, 1, wide, end)
            lines[:] = row.added[:end]
            if wide > 1:
                lines[0, 0, :, start:] = _below(wide)
        return self._run()

    def _end_row(self) -> None:
        """Whoever comes next wants to know what lies where."""
        if self.row is not None:
            self._room(self.length)
            alive = self.row.added[: self.length] == 0
            self.alive[0, : self.length], self.owner[0, : self.length] = alive, alive.cumsum() - 1
            self.plain, self.row = bool(alive.all()), None

    def make_room(self, alive: np.ndarray, new: int) -> np.ndarray | None:
        """Drop dead positions if there are too many; alive: [rows, state and what comes next, `new` tokens]. Returns
        what is left of all these, [rows, …], None: everything."""
        self._end_row()
        start = self.length
        most = int(alive.sum(1).max()) if start > _SLACK else start
        if start + new - most <= _SLACK + most // 4:
            return None
        self.alive[:, :start], self.owner[:, :start], self.plain = alive[:, :start], _count(start), False
        order = self._compact()
        return np.concatenate([order, np.broadcast_to(_count(start + new)[start:], (len(order), new))], 1)

    def read_seen(self, tokens: np.ndarray, positions: np.ndarray, seen: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Tokens [rows, new] at these positions [rows, new], behind the state; what each of them sees [rows, new, state
        and new] is told, and within a window. Logits [rows, new, vocabulary], until the next forward."""
        self.plain = False
        rows, new = tokens.shape
        self._grow(positions, self._width(rows, new, exact=True))  # `make_room` counts them when it must
        return self._infer(tokens, positions, {"mask": seen, "near": near}, None)

    def _infer(self, tokens: Any, positions: Any, masks: dict[str, np.ndarray], keep: Any,
               chains: int | None = None) -> np.ndarray:
        """tokens, positions: [rows, new]; masks: [rows, new or 1, positions of the state] bool; keep: [rows, kept],
        None: all. chains: where the new tokens begin, if none of them sees a later one whatever the masks say."""
        new = len(tokens[0])
        self._give(tokens, positions, keep)
        for name in self.masks:
            added = self.added[name].shaped(len(tokens), 1, self.wide, self.length)
            added[:, :, :new] = _ADDED.take(masks[name].view(np.uint8))[:, None]
            added[:, :, new:] = _HIDDEN
            if chains is not None and new > 1:
                both = added[:, :, :new, chains : chains + new]
                np.minimum(both, _below(new), out=both)
        return self._run()

    def _give(self, tokens: Any, positions: Any, keep: Any) -> None:
        """To the coming forward, beside its masks: tokens, positions: [rows, new]; keep: [rows, kept], None: all."""
        rows, new = len(tokens), len(tokens[0])
        key = (rows, self.wide, new if keep is None else 1)
        if key not in self.held:
            arrays = {name: np.zeros(key[:2], dtype=np.int64) for name in ("tokens", "positions")}
            arrays["keep"] = np.tile(_count(key[2]), (rows, 1))
            self.held[key] = {name: (array, ov.Tensor(array, shared_memory=True)) for name, array in arrays.items()}
        held = self.held[key]
        held["tokens"][0][:, :new], held["positions"][0][:, :new] = tokens, positions
        if key[2] == 1:
            held["keep"][0][:] = 0 if keep is None else keep
        if self.set != key:
            for name, (_, tensor) in held.items():
                self.request.set_tensor(name, tensor)
            self.logits = self.output.shaped(rows, key[2], self.requests.vocabulary)
            self.set = key

    def _run(self) -> np.ndarray:
        """Logits [rows, kept, vocabulary]."""
        if self.reordered:
            self.request.set_tensor("beam_idx", ov.Tensor(self.order, shared_memory=True))
        self.reordered = False
        try:
            self.request.infer(share_outputs=True)
        except BaseException:
            self.requests.forget()
            raise
        if self.chosen:
            self._in_order(len(self.order))
        return self.logits

    def _width(self, rows: int, new: int, exact: bool = False) -> int:
        wide = self.requests.width(rows, new, exact)
        self.changed, self.wide = (rows, wide) != (self.rows, self.wide), wide
        self.rows = rows
        return wide

    def _in_order(self, rows: int, order: np.ndarray | None = None) -> None:
        """The coming forward goes on with these rows of the state (beam_idx); None: all, as they are."""
        self.chosen = order is not None
        self.order, self.reordered = np.arange(rows, dtype=np.int32) if order is None else order, True

    def _seen(self, visible: np.ndarray) -> np.ndarray:
        """[rows, new, positions]: the tree's mask [rows, new, slots], by position."""
        if not self.plain:
            visible = np.take_along_axis(visible, self.owner[:, None, : self.length], 2)
            visible &= self.alive[:, None, : self.length]
        visible = visible[..., : self.length]  # `read` may have dropped what lay in the last slots
        if visible.shape[2] != self.length:  # OpenVINO would read beyond it
            raise RuntimeError(f"the mask is {visible.shape[2]} positions wide and the state has {self.length}")
        return visible

    def _append(self, slots: np.ndarray, wide: int) -> None:
        """The coming forward appends these slots [rows, new], and is `wide`: remember where, and that what they held is
        dead."""
        start = self.length
        if not (self.plain and self.span is not None and self.span.start == start):
            self.plain = False
            for column in slots.T if start else ():
                self.alive[:, :start] &= self.owner[:, :start] != column[:, None]
        self._grow(slots, wide)

    def _grow(self, slots: Any, wide: int) -> None:
        """`wide` positions more, of which the first hold these slots [rows, new], and the others nothing."""
        start, new = self.length, len(slots[0])
        self.length = start + wide
        self._room(self.length)
        self.owner[:, start : start + new] = slots
        if wide > new:
            self.alive[:, start + new : self.length], self.plain = False, False

    def _room(self, length: int) -> None:
        if length > self.owner.shape[1]:
            more = ((0, 0), (0, length - self.owner.shape[1] + length // 2 + 64))
            self.owner, self.alive = np.pad(self.owner, more), np.pad(self.alive, more, constant_values=True)

    def _compact(self) -> np.ndarray:
        """Drop dead positions, and put the others in the order of their slots: which they were, [rows, state]."""
        self._end_row()
        if self.plain:
            return np.broadcast_to(_count(self.length), (len(self.owner), self.length))
        owner, hidden = self.owner[:, : self.length], ~self.alive[:, : self.length]
        last = max(self.capacity, self.length)  # beams have positions in place of slots
        order = np.where(hidden, last + owner, owner).argsort(1)[:, : int((~hidden).sum(1).max())]
        places = torch.from_numpy(order)[:, None, :, None]
        for state in self.request.query_state():
            kept = torch.from_numpy(state.state.data)[torch.from_numpy(self.order).long()]
            state.state = _tensor(kept.gather(2, places.expand(-1, kept.shape[1], -1, kept.shape[3])),
                                  state.state.element_type)
        self._in_order(len(order))
        self.length = order.shape[1]
        self.owner, self.alive = np.take_along_axis(owner, order, 1), ~np.take_along_axis(hidden, order, 1)
        self.plain = bool(self.alive.all() and (self.owner == _count(self.length)).all())
        return order


@dataclass
class Row:
    """A chain of tokens, which lie in the state in their order; between them, what was given up."""

    added: np.ndarray  # [at least the state] fp32, to the scores
    living: int

    def end(self, depth: int, state: int) -> None:
        """Behind so many tokens; the state has so many positions."""
        while self.living > depth:
            state -= 1
            if self.added[state] == 0:
                self.added[state] = _HIDDEN
                self.living -= 1

    def grow(self, new: int, start: int, end: int) -> None:
        """By so many tokens, in the first of these positions."""
        if end > len(self.added):
            self.added = np.pad(self.added, (0, end + 64))
        self.added[start : start + new] = 0.0
        if end > start + new:
            self.added[start + new : end] = _HIDDEN
        self.living += new


class _Sized:
    """An fp32 input of a request, or its output, whose memory stays while its size changes: to make a tensor, and to
    tell the request of it, takes ten times as long as to size one."""

    def __init__(self, tell: Callable[[ov.Tensor], None]):
        self.tell, self.room = tell, 0

    def shaped(self, *shape: int) -> np.ndarray:
        """Its numbers in this shape; they are what they happen to be."""
        size = prod(shape)
        made = size > self.room
        if made:
            self.room = size + _ROOM
            self.tensor = ov.Tensor(ov.Type.f32, [self.room])
            self.flat = self.tensor.data
        self.tensor.shape = shape
        if made:
            self.tell(self.tensor)
        if self.room > _MOST_KEPT:
            self.room = 0  # a prompt's mask: the next one is small again
        return self.flat[:size].reshape(shape)


@lru_cache(64)
def _count(numbers: int) -> np.ndarray:
    return np.arange(numbers)


def _below(new: int) -> np.ndarray:
    """What is added to the scores of a chain's tokens: each one sees itself and those before it."""
    return (_short_below if new <= _MOST_NEW else _short_below.__wrapped__)(new)


@lru_cache(_MOST_NEW)
def _short_below(new: int) -> np.ndarray:
    return _ADDED[np.tri(new, dtype=np.int8)]


def _tensor(bits: Tensor, kind: ov.Type) -> ov.Tensor:
    """Numbers as OpenVINO showed them: bfloat16 as float16 of the same bits, and it would take them for float16's."""
    tensor = ov.Tensor(kind, list(bits.shape))
    tensor.data[...] = bits.numpy()
    return tensor
