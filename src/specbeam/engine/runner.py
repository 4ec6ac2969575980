"""One forward of a model over the slots, as a function of tensors, and who runs it: the transformers model itself
("eager", here), or a backend of specbeam/runners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.engine.cache import SlotCache


@dataclass(frozen=True)
class Runner:
    """Who runs an adapter's forwards.

    open(adapter, rows, capacity): slots with SlotCache's `capacity`, `view`, `slots`, `span`, `resize`, `keep_rows`,
    `join`; forward: as `forward` below.
    """

    name: str
    open: Callable[[Adapter, int, int], Any]
    forward: Callable[..., Tensor]
    width: Callable[[int], int] = lambda slots: slots  # how many slots a forward looks at when it needs so many
    own_threads: bool = False  # beside torch's
    lends: bool = False  # its slots also serve a model of the target's own first layers (drafting/early_exit.py)
    fuse: Callable[..., list[Tensor]] | None = None  # of one that records whole functions (runners/chains.py)
    reads: bool = False  # its slots have `read`, for chains on the host (runners/host_chains.py)


@dataclass(frozen=True)
class Adapter:
    """What one model wants to be given. Found by trying, not by its name (support.py)."""

    model: PreTrainedModel
    layer_types: tuple[str, ...]  # non-empty: the mask is a dict with one entry per type
    window: int | None  # sliding window in positions, where some layer has one
    additive: bool  # the mask is added to the scores (0 / lowest) instead of a boolean
    keeps: str  # `logits_to_keep` takes an index per "row", or "position"s common to all rows, or nothing ("")
    strict: bool  # never asks the cache for its length
    context: int | None  # positions it was made for
    absolute: bool  # positions beyond `context` do not exist (learned table)
    rope_limit: int | None  # rotary scaling that changes for the whole batch beyond this length
    rope_restarts: bool  # beyond rope_limit all is well again if every row lies there from the start (longrope)
    runner: Runner = field(default_factory=lambda: EAGER)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        return embedding(self.model).device


def embedding(model: Any) -> Tensor:
    """The input embedding's weights [vocabulary, hidden]: they say where tokens go, and how many there are."""
    return model.get_input_embeddings().weight


def forward(adapter: Adapter, cache: Any, tokens: Tensor, positions: Tensor, visible: Tensor,
            near: Tensor | None, keep: Tensor | None) -> Tensor:
    """Logits [rows, new or 1, vocabulary] of new tokens; their keys and values go to `cache.slots`.

    tokens, positions: [rows, new] long. visible: [rows, new, view] bool, the slots each token attends to; near: the
    same within the sliding window. keep: [rows] long, the one token of each row whose logits are wanted; None: all.
    """
    return adapter.runner.forward(adapter, cache, tokens, positions, visible, near, keep)


def _open(adapter: Adapter, rows: int, capacity: int) -> SlotCache:
    return SlotCache(rows, capacity, adapter.device, adapter.strict)


def _eager(adapter: Adapter, cache: SlotCache, tokens: Tensor, positions: Tensor, visible: Tensor,
           near: Tensor | None, keep: Tensor | None) -> Tensor:
    wanted, place = {}, keep
    if tokens.shape[1] == 1:
        keep = place = None
    if keep is not None and adapter.keeps == "row":
        wanted, place = {"logits_to_keep": keep[:, None]}, None
    elif keep is not None and adapter.keeps == "position":  # older transformers
        among, place = keep.unique(return_inverse=True)
        wanted = {"logits_to_keep": among}
    logits = adapter.model(
        input_ids=tokens, position_ids=positions, attention_mask=_mask(adapter, visible, near),
        past_key_values=cache, use_cache=True, **wanted,
    ).logits
    if place is not None:
        logits = logits.gather(1, place[:, None, None].expand(-1, 1, logits.shape[-1]))
    return logits


EAGER: Runner = Runner("eager", _open, _eager, lends=True)


def _mask(adapter: Adapter, visible: Tensor, near: Tensor | None) -> Tensor | dict[str, Tensor]:
    if not adapter.layer_types:  # a window without layer types means that every layer slides (mistral, phi3)
        return _finish(adapter, visible if near is None else near)
    masks = {"full_attention": visible, "sliding_attention": visible if near is None else near}
    return {kind: _finish(adapter, masks[kind]) for kind in adapter.layer_types}


def _finish(adapter: Adapter, visible: Tensor) -> Tensor:
    visible = visible[:, None]  # the same for every head
    if not adapter.additive:
        return visible
    dtype = adapter.model.dtype
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min)
