"""The target's own first layers propose, with its own final norm and head.

LayerSkip's self-speculation: Elhoushi et al. 2024 (arXiv 2404.16710); Zhang et al. 2023 (arXiv 2309.08168).
Idea: a model that leaves early is a draft that needs no memory for weights. It is made by cutting the list of layers
in a shallow copy of the target: every weight is the target's own tensor, and any decoder-only model can be cut.
Where it differs: the draft keeps its own keys and values of those layers (and reads the prompt by itself), so that
the target's are never touched; sharing them would save that, and a part of each verifying forward.
Checkpoints trained for it (facebook/layerskip-*) exit well; others are rarely understood half-way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from specbeam.drafting import Settings
from specbeam.drafting.draft_model import DraftModel
from specbeam.drafting.draft_model import make as make_draft_model
from specbeam.errors import InputError
from specbeam.runners.choose import want_runner, wanted_runner

_cut: WeakKeyDictionary[PreTrainedModel, dict[int, PreTrainedModel]] = WeakKeyDictionary()


def make(settings: Settings, target: PreTrainedModel, draft: Any, request: Any, vocabulary: int) -> DraftModel:
    drafter = make_draft_model(settings, target, exit_early(target, settings.exit_layer), request, vocabulary)
    drafter.name = "early_exit"
    return drafter


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
    want_runner(made[layers], *wanted_runner(target))
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
