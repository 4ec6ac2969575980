"""A model cut after some layers: it is what it says, shares every weight, and leaves the whole one alone."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from tiny import NAMES, prompts, tiny_draft, tiny_model

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting.early_exit import EarlyExit, FirstLayers, exit_early
from specbeam.errors import InputError

IDS = torch.tensor([[5, 9, 3, 12, 7]])


def exited_by_hand(target, layers: int) -> torch.Tensor:
    """Logits with every layer behind the exit made the identity."""
    decoder = target.get_decoder()
    stack = decoder.h if hasattr(decoder, "h") else decoder.layers
    hooks = [layer.register_forward_hook(lambda layer, args, kwargs, output: args[0] if args else
             kwargs["hidden_states"], with_kwargs=True) for layer in stack[layers:]]
    try:
        return target(IDS, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
@pytest.mark.parametrize("family", NAMES)
def test_the_logits_are_those_after_the_first_layers_and_the_target_is_untouched(family):
    target = tiny_model(family)
    whole = target(IDS, use_cache=False).logits
    short = exit_early(target, 2)
    torch.testing.assert_close(short(IDS, use_cache=False).logits, exited_by_hand(target, 2))
    torch.testing.assert_close(target(IDS, use_cache=False).logits, whole, rtol=0, atol=0)
    assert not torch.allclose(short(IDS, use_cache=False).logits, whole)


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3-conditional"))
def test_every_weight_is_the_targets_own_tensor(family):
    target = tiny_model(family)
    own = {id(weight) for weight in target.parameters()}
    assert all(id(weight) in own for weight in exit_early(target, 1).parameters())


def test_a_third_of_the_layers_is_the_default_and_a_copy_is_made_once():
    target = tiny_model("llama")
    assert len(exit_early(target).model.layers) == 1
    assert exit_early(target, 2) is exit_early(target, 2) is not exit_early(target, 1)


def test_the_copy_does_not_keep_the_target_alive():
    target = tiny_model("llama")
    exit_early(target, 1)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


def test_a_forward_replaced_on_the_model_as_accelerate_does_is_not_the_copys():
    target = tiny_model("llama")
    wanted = exit_early(tiny_model("llama"), 1)(IDS).logits
    target.forward = functools.partial(type(target).forward, target)
    target.model.forward = functools.partial(type(target.model).forward, target.model)
    torch.testing.assert_close(exit_early(target, 1)(IDS).logits, wanted)


def test_layers_that_do_little_are_skipped_at_no_loss():
    target = tiny_model("llama")
    with torch.no_grad():
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
    options = {"max_new_tokens": 40, "eos_token_id": None}
    out = speculative_generate(target, None, prompts((5, 8)), drafter="early_exit", exit_layer=1, **options)
    assert out.tokens == greedy_generate(target, prompts((5, 8)), **options).tokens
    assert all(len(row.rounds) < 25 for row in out.trace)
    assert {r.drafter for row in out.trace for r in row.rounds} <= {"early_exit", "plain"}


SHAPES: dict[str, dict] = {"chain": {"draft_length": 3}, "auto": {"draft_length": "auto"},
                           "fixed tree": {"branching": [2, 2, 1]}, "grown tree": {"draft_length": 3, "tree_nodes": 6}}


def soiled(monkeypatch, dirt: float) -> list[int]:
    """What the draft writes is overwritten with dirt before the target verifies; how many slots, proposal by
    proposal."""
    wrote: list[int] = []
    propose = EarlyExit.propose

    def soiling(self, sequences, limits, length):
        before = self.tips.visible.clone()
        proposal = propose(self, sequences, limits, length)
        wide = self.nodes.visible.shape[2]
        mine = self.nodes.visible.any(1) & ~torch.nn.functional.pad(before, (0, wide - before.shape[2])).any(1)
        cache = self.tree.tree.cache
        for layer in cache.layers[: len(self.short.model.get_decoder().layers)]:
            for kept in (layer.keys, layer.values):
                kept[:, :, :wide].masked_fill_(mine[:, None, :, None], dirt)
        wrote.append(int(mine.sum()))
        return proposal

    monkeypatch.setattr(EarlyExit, "propose", soiling)
    return wrote


@pytest.mark.parametrize("family", ("llama", "gemma3", "mistral-window"))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_verifying_forward_writes_over_what_the_draft_wrote_and_never_reads_it(family, shape, monkeypatch):
    """A chain is overwritten whole, so that even NaN does no harm; of a tree more is read than verified, and what is
    left lies where nobody looks."""
    target, options = tiny_model(family), {"max_new_tokens": 30, "eos_token_id": None}
    plain = greedy_generate(target, prompts((5, 8, 13)), **options).tokens
    wrote = soiled(monkeypatch, 1e4 if "tree" in shape else float("nan"))
    out = speculative_generate(target, None, prompts((5, 8, 13)), drafter="early_exit", exit_layer=2, **SHAPES[shape],
                               **options)
    assert out.tokens == plain and sum(wrote) > 5


def test_the_dirt_is_seen_where_it_lies_before_the_tip(monkeypatch):
    """The negative control of the test above."""
    target, options = tiny_model("llama"), {"max_new_tokens": 30, "eos_token_id": None}
    plain = greedy_generate(target, prompts((5, 8)), **options).tokens
    propose = EarlyExit.propose

    def soiling(self, sequences, limits, length):
        proposal = propose(self, sequences, limits, length)
        self.tree.tree.cache.layers[0].keys[:, :, 2] = 1e4
        return proposal

    monkeypatch.setattr(EarlyExit, "propose", soiling)
    assert speculative_generate(target, None, prompts((5, 8)), drafter="early_exit", **options).tokens != plain


def test_the_draft_reads_no_prompt_and_no_token_twice(monkeypatch):
    target, read = tiny_model("llama"), []
    extend = FirstLayers.extend
    monkeypatch.setattr(FirstLayers, "extend", lambda self, tips, block, last_only=False: (
        read.append(block.tokens.shape[1]), extend(self, tips, block, last_only))[1])
    speculative_generate(target, None, prompts((40, 60)), drafter="early_exit", max_new_tokens=20, eos_token_id=None)
    assert set(read) == {1}


def test_rows_that_join_a_running_batch_draft_in_its_slots_too():
    target, options = tiny_model("llama"), {"max_new_tokens": 12, "eos_token_id": None}
    out = speculative_generate(target, None, prompts((5, 8, 6, 11)), drafter="early_exit", batch_size=2, **options)
    assert out.tokens == greedy_generate(target, prompts((5, 8, 6, 11)), **options).tokens


@pytest.mark.parametrize(("layer", "words"), [
    (0, "exit_layer is 0, but LlamaForCausalLM has 3 layers: exit after layer 1 to 2"), (3, "exit_layer is 3"),
    (-1, "exit_layer is -1"), (40, "exit_layer is 40")])
def test_an_exit_that_is_not_within_the_model_is_one_sentence(layer, words):
    with pytest.raises(InputError, match=words):
        speculative_generate(tiny_model("llama"), None, IDS, drafter="early_exit", exit_layer=layer)


def test_the_exit_belongs_to_early_exit_only():
    target = tiny_model("llama")
    with pytest.raises(InputError, match="exit_layer=1 does nothing with drafter=draft_model"):
        speculative_generate(target, tiny_draft(target), IDS, exit_layer=1)
