"""What a traced layer becomes: few operations that give the same numbers, and what is unknown stays as it was."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from reference import model
from test_graph import Recorder
from tiny import prompts
from torch import nn

import specbeam
from specbeam.runners import choose, fuse
from specbeam.runners import compile as compiling

OPS = fuse.ops
# Products, attention and what joins a norm to the residual, of one layer of one new token.
BECOMES = {"llama": (4, 1, 0), "qwen2": (4, 1, 0), "qwen3": (4, 1, 0), "mistral-window": (4, 1, 0),
           "gemma3-conditional": (4, 1, 1), "phi3": (4, 0, 0), "stablelm": (4, 0, 0), "gpt2": (0, 0, 0)}


@pytest.fixture
def layer(monkeypatch):
    """The fused graph of a layer of a family."""
    seen: list[torch.fx.Graph] = []
    real = fuse.fuse

    def keep(traced):
        real(traced)
        seen.append(traced)

    torch._dynamo.reset()
    monkeypatch.setattr(fuse, "fuse", keep)
    monkeypatch.setattr(compiling, "make", lambda adapter, precision: compiling.by_layer(
        adapter, "aot_eager", None, Recorder(nullcontext)))

    def trace(name):
        target = model(name)
        choose._made.pop(target, None)
        specbeam.use_runner(target, "compile")
        specbeam.greedy_generate(target, prompts((5,)), max_new_tokens=4)
        choose.want_runner(target, "eager")
        return max(seen, key=lambda one: len(one.find_nodes(op="placeholder")))

    return trace


@pytest.mark.parametrize("name", BECOMES)
def test_a_layer_becomes_few_operations(name, layer):
    found = Counter(node.target for node in layer(name).nodes)
    assert (found[OPS.product.default], found[OPS.attend.default], found[OPS.join.default]) == BECOMES[name]


@pytest.mark.parametrize(("name", "whole"), [("llama", True), ("gemma3-conditional", True), ("stablelm", False)])
def test_only_where_all_is_ours_may_the_next_begin_at_once(name, whole, layer):
    ahead = [node.args[-1] for node in layer(name).nodes if node.target in (OPS.product.default, OPS.attend.default)]
    assert ahead == [whole] * len(ahead)


def test_norms_are_known_by_what_they_do():
    class OtherRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(32)), 1e-6

        def forward(self, x):
            return fuse._norm(x, self.weight, self.eps, False) * 2

    known = fuse.norms([*model("llama").model.layers, *model("gemma3").model.layers, nn.ModuleList([OtherRMSNorm()])])
    assert {kind.__name__: same for kind, same in known.items()} == {
        "LlamaRMSNorm": fuse.Norm, "Gemma3RMSNorm": fuse.PlusNorm}


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_are_torchs(act):
    named = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}[act]
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(fuse.activate(act, x), named(x))


def test_attention_that_is_not_known_goes_where_it_went():
    asked = []
    query, key = torch.rand(1, 4, 1, 8), torch.rand(1, 2, 16, 8)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    attend = fuse.attend(lambda *args, **options: asked.append(options) or (None, None))
    attend(nn.Identity(), query, key, key, mask)
    assert not asked
    attend(nn.Identity(), query, key, key, mask, softcap=30.0)
    attend(nn.Identity(), query, key, key, mask.float())
    attend(nn.Identity(), *(one.expand(17, -1, -1, -1) for one in (query, key, key)), mask)
    assert len(asked) == 3


def test_what_follows_the_layers_is_one_product_and_the_class_is_given_back(layer, monkeypatch):
    rows = []
    forward = fuse.Head.forward
    monkeypatch.setattr(fuse.Head, "forward", lambda self, x: rows.append(x.numel() // x.shape[-1]) or forward(self, x))
    layer("llama")
    assert 1 in rows and type(model("llama").lm_head) is nn.Linear
