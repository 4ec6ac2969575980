"""Can this model be run over token trees, and how? Decided by trying, not by its name.

One small forward at load compares a tree, run over the slots, with plain forwards of its paths. A model that does
not obey the mask or the positions (recurrent state, ALiBi counted by slot) shows itself there and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.engine.runner import Adapter, Runner, embedding
from specbeam.engine.tree import Tips, TokenTree, branches, chain, leaves
from specbeam.errors import InputError
from specbeam.runners.choose import alone, runner_of

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What was found of each model, without the model itself: a value that held its key would keep it in memory for ever.
_found: WeakKeyDictionary[PreTrainedModel, tuple[tuple, dict[str, Any]]] = WeakKeyDictionary()
# By id, of models that a method of this thread runs now: to look whether a weight changed is a walk through all.
_in_use: ContextVar[dict[int, Adapter]] = ContextVar("in_use", default={})  # noqa: B039 (never changed in place)

# The probe: two ragged prompts, and below each one two siblings with two equal children each. The children have the
# same tokens and differ only in what they may see and in nothing else.
_PROMPTS = ([5, 9, 3, 12, 7], [11, 4, 8])
_TREE = ([6, 10, 13, 14, 13, 14], [-1, -1, 0, 0, 1, 1])
_GAP = 600  # slots between prompt and tree: what counts slots instead of positions (ALiBi, a local layer) shows there


def adapt(model: PreTrainedModel) -> Adapter:
    """The adapter for `model`, probed once. Raises InputError, naming the model, if it cannot be run exactly."""
    if id(model) in _in_use.get():
        return _in_use.get()[id(model)]
    key = (model.dtype, model.device, getattr(_text_config(model), "_attn_implementation", None))
    if model not in _found or _found[model][0] != key:
        adapter = _probe(model)
        _found[model] = (key, {f.name: getattr(adapter, f.name) for f in fields(adapter)
                               if f.name not in ("model", "runner")})
    adapter = Adapter(model=model, **_found[model][1])
    return replace(adapter, runner=runner_of(adapter))


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """While a method runs: models in eval mode, and torch on one thread if a runner brings its own, which torch's
    idle ones would hold up (a quarter of the speed of plain decoding, two threads each on two cores)."""
    with eval_mode(*models):
        adapters = [adapt(model) for model in models]
        before = _in_use.set(_in_use.get() | {id(adapter.model): adapter for adapter in adapters})
        try:
            with alone() if any(adapter.runner.own_threads for adapter in adapters) else nullcontext():
                yield
        finally:
            _in_use.reset(before)


@contextmanager
def eval_mode(*models: PreTrainedModel) -> Iterator[None]:
    """Models in eval mode, and afterwards as they were: dropout would make every forward another model."""
    training = [part for model in models for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_lengths(adapter: Adapter, prompt_tokens: list[int], max_new_tokens: list[int], role: str = "target") -> None:
    """Prompts and answers against the model's context, before anything runs.

    Raises InputError where positions do not exist (learned positions) or where rotary scaling would make the rows of
    the batch depend on each other; warns where a rotary model is only taken beyond what it was made for.
    """
    longest = max(p + n for p, n in zip(prompt_tokens, max_new_tokens, strict=True))
    context, limit = adapter.context, adapter.rope_limit
    # The last new token is never read, so that one position more fits.
    if context is not None and longest - 1 > context:
        prompt = max(prompt_tokens)
        sentence = (f"The longest prompt has {prompt} tokens and max_new_tokens is {max(max_new_tokens)}, together "
                    f"{longest}, but the {role} {adapter.name} has a context of {context} positions")
        if adapter.absolute:
            raise InputError(f"{sentence}: shorten the prompt or lower max_new_tokens.")
        logging.getLogger("specbeam").warning("%s; beyond it the answers may be poor.", sentence)
    if limit is not None and longest - 1 > limit and not (adapter.rope_restarts and min(prompt_tokens) > limit):
        raise InputError(
            f"Prompt and answer reach {longest} tokens, but beyond {limit} the rotary scaling of the {role} "
            f"{adapter.name} changes with the longest row of the batch, so that results would depend on how tokens "
            f"are grouped: keep prompt plus max_new_tokens within {limit} tokens.")


def runner_error(adapter: Adapter, runner: Runner, dtype: torch.dtype, itself: bool) -> str | None:
    """What is wrong with this runner's logits on the probe; None: nothing, it may be used.

    dtype: what it computes in. itself: it runs another model on purpose (rounded weights); then its tree is held
    against its own chains.
    """
    model, adapter = adapter.model, replace(adapter, runner=runner)
    with eval_mode(model), torch.no_grad():
        wanted, gap = _plain_logits(model, partial(_chain_logits, adapter) if itself else None)
        # Twice, with other inputs: what is recorded the first time is replayed the second.
        both = [(_PROMPTS, wanted), (_PROMPTS[::-1], wanted.flip(0))]
        error = max((_tree_logits(adapter, prompts) - right).abs().max().item() for prompts, right in both)
    return None if error <= _tolerance(dtype, wanted, gap) else f"its logits are off by {error:.2g}"


def _text_config(model: PreTrainedModel):
    return model.config.get_text_config(decoder=True)


def _probe(model: PreTrainedModel) -> Adapter:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder model; specbeam runs decoder-only (causal) models.")
    config = _text_config(model)
    layer_types = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    if unknown := set(layer_types) - _KNOWN_LAYERS:
        raise InputError(f"{name} has layers of type {', '.join(sorted(unknown))}, whose state cannot be kept as a "
                         "tree of tokens; specbeam runs models with full or sliding-window attention only.")
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if any(kind in attention for kind in ("flex", "flash", "paged")):  # flex crashes the process on a dense mask
        raise InputError(f"{name} was loaded with attn_implementation={attention!r}, which takes no mask of a tree: "
                         "load it with attn_implementation=\"sdpa\" or \"eager\".")
    eager = attention != "sdpa"
    with eval_mode(model), torch.no_grad():
        wanted, gap = _plain_logits(model)
        tried = []
        # Cheapest first: a boolean mask where sdpa takes it, one index per row for the last logits.
        for additive, keeps, strict in product([eager, True], ["row", "position", ""], [True, False]):
            adapter = _describe(model, config, layer_types, additive, keeps, strict)
            try:
                error = (_tree_logits(adapter) - wanted).abs().max().item()
            except Exception as failure:  # whatever a model says when it is run in a way it does not know
                tried.append(f"{type(failure).__name__}: {failure}".splitlines()[0][:160])
                continue
            if error <= _tolerance(model.dtype, wanted, gap):
                return adapter
            tried.append(f"its logits are off by {error:.2g}")
    why = next((reason for reason in tried if reason.startswith("its logits")), tried[0])
    raise InputError(f"{name} cannot be run exactly over a tree of tokens ({why}): it does not obey the "
                     "attention mask or the positions it is given, or keeps a state of its own; use the "
                     "transformers_* methods for it.")


def _describe(model: PreTrainedModel, config, layer_types: tuple[str, ...], additive: bool, keeps: str,
              strict: bool) -> Adapter:
    slides = not layer_types or "sliding_attention" in layer_types
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    types = {kind.get("rope_type", "default") for kind in kinds}
    context = getattr(config, "max_position_embeddings", None)
    limit = None
    if "longrope" in types or "dynamic" in types:
        limits = [kind.get("original_max_position_embeddings") for kind in kinds]
        limit = next((n for n in limits if n), None) or getattr(
            config, "original_max_position_embeddings", None) or context
    rotary = bool(kinds) or any("rotary" in part.lower() for part, _ in model.named_modules())
    return Adapter(
        model=model, layer_types=layer_types, window=getattr(config, "sliding_window", None) if slides else None,
        additive=additive, keeps=keeps, strict=strict, context=context, absolute=not rotary,
        rope_limit=limit, rope_restarts="longrope" in types)


def _paths() -> list[list[int]]:
    tokens, parents = _TREE
    return [[tokens[parents[leaf]], tokens[leaf]] for leaf in range(2, len(tokens))]


def _chain_logits(adapter: Adapter, ids: Tensor) -> Tensor:
    tree = TokenTree(adapter, len(ids), ids.shape[1])
    return tree.extend(tree.tips([0] * len(ids)), chain(ids, tree.device), last_only=True)[0][:, -1].float()


def _plain_logits(model: PreTrainedModel, run: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, float]:
    """Logits [prompts, leaves, vocabulary] of each path alone, in the order of `_tree_logits`, and how much the other
    parent changes a leaf. run: what gives the last token's logits, in place of the model."""
    run = run or (lambda ids: model(input_ids=ids, use_cache=False).logits[:, -1].float())
    device = embedding(model).device
    rows = []
    for prompt in _PROMPTS:
        ids = torch.tensor([_within(prompt + path, model) for path in _paths()], device=device)
        rows.append(run(ids))
    wanted = torch.stack(rows)
    if not torch.isfinite(wanted).all():
        raise InputError(f"{type(model).__name__} gives logits that are not finite (NaN or infinite) on a first "
                         "trial: the checkpoint is broken, or its dtype overflows; try dtype=float32.")
    gap = (wanted[:, :2] - wanted[:, 2:]).abs().max().item()
    return torch.cat([wanted, wanted, wanted[:, -1:]], dim=1), gap


def _within(tokens: list[int], model: PreTrainedModel) -> list[int]:
    size = embedding(model).shape[0]
    return [token % size for token in tokens]


def _tree_logits(adapter: Adapter, given: Sequence[list[int]] = _PROMPTS) -> Tensor:
    """The same leaves' logits, as a tree over the slots: all of them twice, the last one by `last_only` too."""
    tree = TokenTree(adapter, len(given), capacity=_GAP + len(_TREE[0]))
    prompts = [_within(prompt, adapter.model) for prompt in given]
    tree.extend(tree.tips([0] * len(prompts)), chain(prompts, tree.device), last_only=True)
    tips, tree.high = _far(tree.tips([len(prompt) for prompt in prompts])), _GAP
    tokens, parents = _within(_TREE[0], adapter.model), _TREE[1]
    block = branches([(tokens, parents)] * len(prompts), tree.device)
    last, _ = tree.extend(tips, block, last_only=True)
    whole, nodes = tree.extend(tips, block)
    # Again below the two siblings, now in the free slots before them, as when beams reuse what dead ones left.
    siblings = nodes.pick(torch.tensor([[0, 1]] * len(prompts), device=tree.device))
    below = torch.tensor([[1, 1, 0, 0, 1, 1]] * len(prompts), device=tree.device)
    again, _ = tree.extend(siblings, leaves(block.tokens[:, [2, 3, 2, 3, 2, 3]], below))
    return torch.cat([whole[:, 2:], again[:, [2, 3, 0, 1]], last], dim=1).float()


def _far(tips: Tips) -> Tips:
    """The same tips, each beside one that occupies the rest of the first `_GAP` slots: the tree gets those behind."""
    taken = ~tips.visible & (torch.arange(tips.visible.shape[2], device=tips.visible.device) < _GAP)
    return Tips(torch.cat([tips.visible, taken], dim=1), tips.depth.expand(-1, 2))


def _tolerance(dtype: torch.dtype, wanted: Tensor, gap: float) -> float:
    """Rounding of the dtype, or a small part of what a wrong parent would change, whichever is larger."""
    size = wanted.abs().max().item()
    if dtype == torch.float32:
        return max(1e-4 * size, 1e-3 * gap)
    return max(2e-2 * size, 0.3 * gap)
