"""OpenVINO on a CPU: the same token-tree forward, by kernels that use every core and the whole memory bandwidth.

The model's state is append-only, while a tree's slots are written again and again. So slots stay logical: each
position of the state remembers which slot was written there, a position whose slot was written again is dead, and the
mask that the model gets is the tree's, gathered by owner. When too much of the state is dead it is compacted.
One compiled model serves any number of trees: each has an infer request, whose state is its keys and values.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from specbeam.engine.runner import Adapter, Runner
from specbeam.runners.choose import threads
from specbeam.runners.openvino_cache import compute_type, load

_HIDDEN = -1e38  # added to a score; finite (in bfloat16 too), as NaN comes of inf - inf
_ADDED = np.array([_HIDDEN, 0.0], dtype=np.float32)  # by whether a token is seen
_SLACK = 64  # dead positions that are left to lie, and beside them a quarter of what lives


def make(adapter: Adapter, precision: str | None) -> Runner:
    """Raises what OpenVINO says of a model that it cannot convert."""
    if adapter.device.type != "cpu":
        raise RuntimeError(f"it runs on a CPU, and the model is on {adapter.device}")
    requests = _Requests(load(adapter, precision), compute_type(adapter, precision))

    def open_slots(adapter: Adapter, rows: int, capacity: int) -> StateSlots:
        return StateSlots(requests, rows, capacity)

    return Runner("openvino" if precision is None else f"openvino {precision}", open_slots, _forward, own_threads=True)


class _Requests:
    """Infer requests of one model, lent to trees and used again when a tree is gone."""

    def __init__(self, model: ov.Model, kind: str):
        self.model, self.kind, self.threads = model, kind, threads()
        for unread in [one for one in model.get_parameters() if not one.output(0).get_target_inputs()]:
            model.remove_parameter(unread)  # `near` of a model without a window
        self.forget()

    def forget(self) -> None:
        """Compile again: a forward that failed half-way leaves all requests, which share one graph, in a bad state."""
        self.free: list[Any] = []
        self.compiled = ov.Core().compile_model(self.model, "CPU", {
            "INFERENCE_PRECISION_HINT": self.kind, "KV_CACHE_PRECISION": self.kind, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})

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
        self.inputs = {port.get_any_name() for port in self.request.model_inputs}
        self._in_order(rows)
        self.everything: dict[tuple[int, int], Tensor] = {}
        # Position p holds slot p in every row: nothing has been written twice, and there is nothing to look up.
        self.plain = True
        self.owner = self.alive = self.place = torch.empty(0)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        if not self.plain:
            self.place = torch.nn.functional.pad(self.place, (0, capacity - self.place.shape[1]))

    def keep_rows(self, index: Tensor) -> None:
        if self.length:
            self.order, self.chosen = self.order[index.numpy()], True
        else:
            self._in_order(len(index))
        if not self.plain:
            self.owner, self.alive, self.place = self.owner[index], self.alive[index], self.place[index]

    def join(self, more: StateSlots) -> None:
        """Go on with another batch's rows too, behind these; both have the same capacity."""
        for slots in (self, more):
            slots._compact()
            slots._look_up()
        longest = max(self.length, more.length)
        its = {state.name: state for state in more.request.query_state()}
        for state in self.request.query_state():
            rows = [torch.from_numpy(one.state.data)[torch.from_numpy(slots.order).long()]
                    for one, slots in ((state, self), (its[state.name], more))]
            both = [torch.nn.functional.pad(kept, (0, 0, 0, longest - kept.shape[2])) for kept in rows]
            state.state = _tensor(torch.cat(both), state.state.element_type)
        for slots in (self, more):
            slots.owner = torch.nn.functional.pad(slots.owner[:, : slots.length], (0, longest - slots.length))
            slots.alive = torch.nn.functional.pad(slots.alive[:, : slots.length + 1], (0, longest - slots.length))
        self.owner, self.alive, self.place = (
            torch.cat(pair) for pair in ((self.owner, more.owner), (self.alive, more.alive), (self.place, more.place)))
        self.length = longest
        self._in_order(len(self.owner))

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, near: Tensor | None, keep: Tensor | None
                ) -> Tensor:
        rows, new = tokens.shape
        if self.length + new - self.view > _SLACK + self.view // 4:
            self._compact()
        self._append(rows, new)
        if keep is None:
            if (rows, new) not in self.everything:
                self.everything[rows, new] = torch.arange(new).expand(rows, -1).contiguous()
            keep = self.everything[rows, new]
        else:
            keep = keep[:, None]
        given = {"tokens": tokens.contiguous().numpy(), "positions": positions.contiguous().numpy(),
                 "keep": keep.numpy(), "beam_idx": self.order}
        if "mask" in self.inputs:
            given["mask"] = self._bias(visible)
        if "near" in self.inputs:
            given["near"] = given["mask"] if near is None and "mask" in given else self._bias(
                visible if near is None else near)
        # As tensors: of arrays OpenVINO's Python would look up, compare and wrap each one again.
        tensors = {name: ov.Tensor(array, shared_memory=True) for name, array in given.items()}
        try:
            result = self.request.infer(tensors, share_inputs=True, share_outputs=True)
        except BaseException:
            self.requests.forget()
            raise
        if self.chosen:
            self._in_order(rows)
        return torch.from_numpy(result[0]).clone()  # its memory is the next forward's too

    def _in_order(self, rows: int) -> None:
        """The coming forward goes on with these rows of the state (beam_idx): all, as they are."""
        self.order, self.chosen = np.arange(rows, dtype=np.int32), False

    def _bias(self, visible: Tensor) -> np.ndarray:
        """[rows, 1, new, positions]: what to add to the scores."""
        if not self.plain:
            owner = self.owner[:, None, : self.length].expand(-1, visible.shape[1], -1)
            visible = visible.gather(2, owner).logical_and_(self.alive[:, None, 1 : self.length + 1])
        if visible.shape[2] != self.length:  # OpenVINO would read beyond it
            raise RuntimeError(f"the mask is {visible.shape[2]} positions wide and the state has {self.length}")
        return _ADDED.take(visible.numpy().view(np.uint8))[:, None]

    def _append(self, rows: int, new: int) -> None:
        """The coming forward appends `self.slots`: remember where, and that what they held is dead."""
        start, self.length = self.length, self.length + new
        if self.plain:
            if self.span is not None and self.span.start == start:
                return
            self.length = start
            self._look_up()
            self.length = start + new
        if self.length > self.owner.shape[1]:
            more = self.length // 2 + 64
            self.owner = torch.nn.functional.pad(self.owner, (0, more))
            self.alive = torch.nn.functional.pad(self.alive, (0, more), value=True)
        self.alive.scatter_(1, self.place.gather(1, self.slots), False)
        self.owner[:, start : self.length] = self.slots
        self.place.scatter_(1, self.slots, torch.arange(start + 1, self.length + 1).expand(rows, -1))

    def _look_up(self) -> None:
        """From here on positions and slots differ."""
        if self.plain:
            rows, self.plain = len(self.order), False
            self.owner = torch.arange(self.length).repeat(rows, 1)
            # Column 0 is for slots that were never written.
            self.alive = torch.ones(rows, 1 + self.length, dtype=torch.bool)
            self.place = torch.zeros(rows, self.capacity, dtype=torch.long)  # 1 + position of each slot
            self.place[:, : self.length] = torch.arange(1, 1 + self.length)

    def _compact(self) -> None:
        """Drop dead positions, and put the others in the order of their slots."""
        if self.plain:
            return
        owner, hidden = self.owner[:, : self.length], ~self.alive[:, 1 : self.length + 1]
        order = torch.where(hidden, self.capacity + owner, owner).argsort(1)[:, : int((~hidden).sum(1).max())]
        for state in self.request.query_state():
            kept = torch.from_numpy(state.state.data)[torch.from_numpy(self.order).long()]
            index = order[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
            state.state = _tensor(kept.gather(2, index), state.state.element_type)
        self._in_order(len(order))
        self.length = order.shape[1]
        owner, hidden = owner.gather(1, order), hidden.gather(1, order)
        places = torch.arange(self.length)
        if not hidden.any() and bool((owner == places).all()):
            self.plain = True
            return
        self.owner, self.alive = owner, torch.nn.functional.pad(~hidden, (1, 0), value=True)
        place = torch.zeros(len(owner), self.capacity + 1, dtype=torch.long)  # one column for the dead
        place.scatter_(1, torch.where(hidden, self.capacity, owner), (places + 1).expand_as(owner))
        self.place = place[:, : self.capacity]


def _tensor(bits: Tensor, kind: ov.Type) -> ov.Tensor:
    """Numbers as OpenVINO showed them: bfloat16 as float16 of the same bits, and it would take them for float16's."""
    tensor = ov.Tensor(kind, list(bits.shape))
    tensor.data[...] = bits.numpy()
    return tensor
