"""The slots: where a model's keys and values lie.

One buffer per layer, [rows, heads, slots, head_dim], written in place and never moved: which slot a token may see
is said by a mask, so a rejected token is simply one that nobody sees any more, and its slot is free again.

transformers' attention layers call `past_key_values.update(keys, values, layer_idx)` and nothing else. The slots of
the coming forward therefore lie on the cache; `TokenTree` sets them (tree.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer. A sliding layer has the full length too: its window lies in the mask."""

    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, never uninitialised memory: a masked slot is multiplied by 0, and 0 * NaN is NaN.
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.cache.capacity, key_states.shape[3])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.cache.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, keys, values = self.cache, self.keys, self.values
        assert keys is not None and values is not None
        if cache.span is not None:  # every row writes the same run of slots: a plain copy
            keys[:, :, cache.span] = key_states
            values[:, :, cache.span] = value_states
        else:  # indexing rows and slots at once gives [rows, new, heads, head_dim]
            rows, slots = cache.rows.to(keys.device), cache.slots.to(keys.device)
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        return keys[:, :, : cache.view], values[:, :, : cache.view]

    def resize(self, capacity: int) -> None:
        if self.keys is None or self.values is None:
            return
        more = (0, 0, 0, capacity - self.keys.shape[2])
        self.keys = torch.nn.functional.pad(self.keys, more)
        self.values = torch.nn.functional.pad(self.values, more)

    def keep_rows(self, index: Tensor) -> None:
        if self.keys is None or self.values is None:
            return
        self.keys = self.keys[index.to(self.keys.device)]
        self.values = self.values[index.to(self.values.device)]

    def join(self, more: SlotLayer) -> None:
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([self.keys, more.keys])  # type: ignore[list-item]
        self.values = torch.cat([self.values, more.values])  # type: ignore[list-item]

    def get_seq_length(self) -> int:
        return self.cache.length_when_asked()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.view, 0

    def get_max_length(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """All layers' slots, and where the coming forward writes.

    slots: [rows, new] long, where each new token goes; span: the same as a slice, when all rows write the same run;
    view: the model sees slots [0, view) only.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device, strict: bool = True):
        super().__init__(layers=[])
        self.capacity = capacity
        self.layers: list[SlotLayer] = []  # type: ignore[assignment]
        self.rows = torch.arange(rows, device=device)[:, None]
        self.slots = torch.empty(rows, 0, dtype=torch.long, device=device)
        self.span: slice | None = None
        self.view = 0
        self.strict = strict

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length_when_asked()

    def length_when_asked(self) -> int:
        """A model asks only when it was given no positions or no finished mask: then its answer would be wrong.

        Some ask and do not use it (falcon); for them `strict` is off and support.py's probe is the judge.
        """
        if self.strict:
            raise RuntimeError("the slot cache has no length: pass position_ids and a finished 4D mask")
        return self.view - self.slots.shape[1]

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` slots; what is there stays."""
        self.capacity = capacity
        for layer in self.layers:
            layer.resize(capacity)

    def keep_rows(self, index: Tensor) -> None:
        """Forget all rows but these."""
        self.rows = self.rows[: len(index)]
        for layer in self.layers:
            layer.keep_rows(index)

    def join(self, more: SlotCache) -> None:
        """Go on with another batch's rows too, behind these; both have the same capacity."""
        self.rows = torch.arange(len(self.rows) + len(more.rows), device=self.rows.device)[:, None]
        for mine, its in zip(self.layers, more.layers, strict=True):
            mine.join(its)
