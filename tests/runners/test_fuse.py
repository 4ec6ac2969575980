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
from specbeam.runners import choose, fuse, traced
from specbeam.runners import compile as compiling
from specbeam.runners.graph import warming

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

    def trace(name, new=1):
        """Of so many new tokens of one row; rows of a batch, where it is a tuple."""
        target = model(name)
        choose._made.pop(target, None)
        specbeam.use_runner(target, "compile")
        if new == 1 or isinstance(new, tuple):
            specbeam.greedy_generate(target, prompts((5,) if new == 1 else new), max_new_tokens=4)
        else:
            with warming():
                specbeam.speculative_generate(target, target, prompts((5,)), draft_length=new - 1, max_new_tokens=20)
        choose.want_runner(target, "eager")
        tokens = (1, new) if isinstance(new, int) else (len(new), 1)
        return max((one for one in seen if any(
            fuse._value(node) is not None and fuse._value(node).shape[:2] == tokens
            for node in one.find_nodes(op="placeholder"))), key=lambda one: len(one.find_nodes(op="placeholder")))

    return trace


@pytest.mark.parametrize("new", [1, 5, (5, 9, 7)], ids=["one token", "five tokens", "three rows"])
@pytest.mark.parametrize("name", BECOMES)
def test_a_layer_becomes_few_operations(name, new, layer):
    found = Counter(node.target for node in layer(name, new).nodes)
    both = found[OPS.attended.default]  # attention with the product behind it
    assert both == (BECOMES[name][1] if new == 1 else 0)
    assert (found[OPS.product.default] + both, found[OPS.attend.default] + both, found[OPS.join.default]
            ) == BECOMES[name]


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize(("name", "whole"), [("llama", True), ("gemma3-conditional", True), ("stablelm", False)])
def test_only_where_all_is_ours_may_the_next_begin_at_once(name, whole, new, layer):
    ahead = [node.args[-1] for node in layer(name, new).nodes
             if node.target in (OPS.product.default, OPS.attend.default, OPS.attended.default)]
    assert ahead and ahead == [whole] * len(ahead)


def test_views_that_move_something_else_are_no_attention():
    """With several tokens heads that were never transposed have the same shape, and mean something else."""
    graph = torch.fx.Graph()
    base = graph.placeholder("base")
    base.meta["example_value"] = torch.empty(1, 4, 4 * 8)
    right = graph.call_method("transpose", (graph.call_method("view", (base, (1, 4, 4, 8))), 1, 2))
    wrong = graph.call_method("view", (base, (1, 4, 4, 8)))
    assert fuse._moves(base, right, (1, 4, -1, 8), (0, 2, 1, 3))
    assert not fuse._moves(base, wrong, (1, 4, -1, 8), (0, 2, 1, 3))


def test_norms_are_known_by_what_they_do():
    class OtherRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(32)), 1e-6

        def forward(self, x):
            return fuse._norm(x, self.weight, self.eps, False) * 2

    known = traced.norms([*model("llama").model.layers, *model("gemma3").model.layers, nn.ModuleList([OtherRMSNorm()])])
    assert {kind.__name__: same for kind, same in known.items()} == {
        "LlamaRMSNorm": traced.Norm, "Gemma3RMSNorm": traced.PlusNorm}


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_are_torchs(act):
    named = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}[act]
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(fuse.activate(act, x), named(x))


def test_attention_that_is_not_known_goes_where_it_went():
    asked = []
    query, key = torch.rand(1, 4, 1, 8), torch.rand(1, 2, 16, 8)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    attend = traced.attend(lambda *args, **options: asked.append(options) or (None, None))
    attend(nn.Identity(), query, key, key, mask)
    assert not asked
    attend(nn.Identity(), query, key, key, mask, softcap=30.0)
    attend(nn.Identity(), query, key, key, mask.float())
    attend(nn.Identity(), *(one.expand(17, -1, -1, -1) for one in (query, key, key)), mask)
    assert len(asked) == 3


def test_what_follows_the_layers_is_one_product_and_the_class_is_given_back(layer, monkeypatch):
    rows = []
    forward = traced.Head.forward
    monkeypatch.setattr(traced.Head, "forward",
                        lambda self, x: rows.append(x.numel() // x.shape[-1]) or forward(self, x))
    layer("llama")
    assert 1 in rows and type(model("llama").lm_head) is nn.Linear


@pytest.mark.parametrize(("tokens", "what", "copies"), [
    (4, "part", True), (1, "part", False), (4, "transpose", True), (1, "transpose", False), (4, "view", False)])
def test_a_view_of_several_tokens_may_be_a_copy_which_is_no_kernel_of_ours(tokens, what, copies):
    """Behind it nothing of ours may begin early: what moves it may not wait."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(1, tokens, 64)
    if what == "part":
        x = graph.call_function(fuse.operator.getitem, (x, (..., slice(0, 32))))
        x.meta["example_value"] = torch.empty(1, tokens, 32)
    seen = graph.call_method("transpose", (x, 1, 2)) if what == "transpose" else graph.call_method("view", (x, -1))
    assert fuse._copies(seen) == copies
