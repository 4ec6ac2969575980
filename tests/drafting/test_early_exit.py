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
from specbeam.drafting.early_exit import exit_early
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
