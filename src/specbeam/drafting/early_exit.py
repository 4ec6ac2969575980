"""The target's own first layers propose, with its own final norm and head.

LayerSkip's self-speculation: Elhoushi et al. 2024 (arXiv 2404.16710); Zhang et al. 2023 (arXiv 2309.08168).
Idea: a model that leaves early is a draft that needs no memory for weights. It is made by cutting the list of layers
in a shallow copy of the target: every weight is the target's own tensor, and any decoder-only model can be cut.
The draft writes into the target's own slots, behind the committed text, and the verifying forward writes over them: it
sees the committed text and its own tokens only. So there is no prompt to read, and nothing to catch up with.
Where it differs: the verifying forward computes the first layers again (a part of it could be saved). Runners that
hold keys and values in the state of one model (openvino), or record its steps (graph, compile), cannot lend slots:
there the draft keeps its own.
Checkpoints trained for it (facebook/layerskip-*) exit well; others are rarely understood half-way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbeam.drafting import Settings
from specbeam.drafting.draft_model import DraftModel, Shape
from specbeam.drafting.draft_model import make as make_draft_model
from specbeam.engine.runner import Adapter
from specbeam.engine.support import adapt
from specbeam.engine.tree import Block, Tips, TokenTree, chain
from specbeam.errors import InputError
from specbeam.runners.choose import want_runner, wanted_runner

_cut: WeakKeyDictionary[PreTrainedModel, dict[int, PreTrainedModel]] = WeakKeyDictionary()


def make(settings: Settings, target: PreTrainedModel, draft: Any, request: Any, vocabulary: int) -> DraftModel:
    short, runner = exit_early(target, settings.exit_layer), adapt(target).runner
    if runner.lends:
        return EarlyExit(replace(adapt(short), runner=runner), request, Shape.of(settings), vocabulary)
    drafter = make_draft_model(settings, target, short, request, vocabulary)
    drafter.name = "early_exit"
    return drafter


@dataclass(frozen=True)
class FirstLayers:
    """The target's tree, as its first layers extend it."""

    tree: TokenTree
    adapter: Adapter

    @property
    def device(self) -> torch.device:
        return self.tree.device

    def extend(self, tips: Tips, block: Block, last_only: bool = False) -> tuple[Tensor, Tips]:
        return self.tree.extend(tips, block, last_only, self.adapter)


class EarlyExit(DraftModel):
    """Drafts in the target's slots, from where the target stands."""

    name = "early_exit"

    def __init__(self, short: Adapter, request: Any, shape: Shape, vocabulary: int):
        self.short, self.rows, self.shape, self.vocabulary = short, list(request.rows), shape, vocabulary
        self.draws, self.chains, self.ahead = request.config.do_sample and not shape.nodes, None, None

    def stand(self, tree: TokenTree, tips: Tips) -> None:
        """Where the target stands: it has read all of the committed text but the last token."""
        self.tree, self.tips = FirstLayers(tree, self.short), tips  # type: ignore[assignment]

    def _read(self, texts: Sequence[list[int]]) -> Tensor:
        assert self.tips is not None
        unread = chain([text[-1:] for text in texts], self.tree.device)
        logits, self.nodes = self.tree.extend(self.tips, unread)
        return logits

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """The target's tips say it too."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def join(self, more: EarlyExit) -> None:  # type: ignore[override]
        self.rows = self.rows + more.rows


def exit_early(target: PreTrainedModel, layers: int | None = None) -> PreTrainedModel:
    """The target with its first `layers` layers only (None: a third of them), every weight shared; made once.

    Raises InputError when there are not so many, or where the layers cannot be found.
    """
    total = target.config.get_text_config(decoder=True).num_hidden_layers
    name = type(target).__name__
    layers = max(1, total // 3) if layers is None else layers
    if not 1 <= layers < total:
        raise InputError(f"exit_layer is {layers}, but {name} has {total} layers: exit after layer 1 to {total - 1}.")
    made = _cut.setdefault(target, {})
    if layers not in made:
        decoder = target.get_decoder()
        paths = [path for path, module in target.named_modules() if isinstance(module, nn.ModuleList)
                 and len(module) == total and any(part is module for part in decoder.modules())]
        if len(paths) != 1:
            raise InputError(f"drafter=early_exit needs one list of {total} layers, and {name} has {len(paths)}: "
                             "use another drafter.")
        made[layers] = _shallow(target, paths[0].split("."), layers)
    want_runner(made[layers], *(("eager",) if adapt(target).runner.lends else wanted_runner(target)))
    return made[layers]


def _shallow(module: Any, path: Sequence[str], layers: int) -> Any:
    """A copy that shares everything but the list at `path`, of which it has the first `layers` only."""
    if not path:
        return module[:layers]
    copied = copy.copy(module)
    copied.__dict__.pop("forward", None)  # accelerate's hook there would call the whole model
    copied._modules = dict(module._modules)
    copied._modules[path[0]] = _shallow(module._modules[path[0]], path[1:], layers)
    return copied
