"""One decoder layer, traced once for a shape, serves all layers of every family and gives their tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from reference import good_draft, model
from test_graph import DEVICES, Recorder
from tiny import prompts, tiny_model

import specbeam
from specbeam.runners import choose, graph
from specbeam.runners import compile as compiling

FAMILIES = ["gpt2", "llama", "mistral-window", "qwen2", "gemma3-conditional", "phi3"]


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "specbeam" and record.levelname == "WARNING"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """compile without a compiler: traced by dynamo, run as it is, recorded as test_graph.py does."""
    made: list = []
    monkeypatch.setattr(compiling, "make", lambda adapter, precision: compiling.by_layer(
        adapter, "aot_eager", None, Recorder(nullcontext)))
    monkeypatch.setattr(graph, "own_attention", graph.nothing_around)

    def use(one):
        made.append(one)
        choose._made.pop(one, None)  # another test's
        return specbeam.use_runner(one, "compile")

    yield use
    for one in made:
        choose.want_runner(one, "eager")


@pytest.mark.parametrize("rows", [(5,), (5, 9)], ids=["one row", "two ragged rows"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_tokens_of_the_eager_runner(name, rows, traced, caplog):
    target, given = model(name), prompts(rows)
    wanted = specbeam.greedy_generate(target, given, max_new_tokens=12).tokens
    assert traced(target) == "compile"
    assert specbeam.greedy_generate(target, given, max_new_tokens=12).tokens == wanted
    assert not warnings(caplog)


def test_speculation_too(traced, caplog):
    target, draft, given = model("llama"), good_draft("llama"), prompts((5,))
    wanted = specbeam.speculative_generate(target, draft, given, max_new_tokens=20).tokens
    assert (traced(target), traced(draft)) == ("compile", "compile")
    assert specbeam.speculative_generate(target, draft, given, max_new_tokens=20).tokens == wanted
    assert not warnings(caplog)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3-conditional", "phi3"])
def test_trees_and_chains_of_several_tokens_too(name, traced, caplog):
    target, draft, given = model(name), good_draft(name), prompts((5,))
    calls = [lambda: specbeam.speculative_generate(target, draft, given, draft_length=6, max_new_tokens=20),
             lambda: specbeam.beam_generate(target, given, num_beams=4, max_new_tokens=12)]
    wanted = [call().tokens for call in calls]
    traced(target)
    assert [call().tokens for call in calls] == wanted
    assert not warnings(caplog)


def test_all_layers_share_what_was_traced(traced):
    target = model("llama")
    traced(target)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    specbeam.greedy_generate(target, prompts((5,)), max_new_tokens=12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 4  # a layer, embeddings, norm


def test_the_model_is_left_as_it_was(traced):
    target = model("qwen2")
    numbers = [layer.self_attn.layer_idx for layer in target.model.layers]
    traced(target)
    specbeam.greedy_generate(target, prompts((5,)), max_new_tokens=12)
    assert [layer.self_attn.layer_idx for layer in target.model.layers] == numbers
    assert all("forward" not in part.__dict__ for part in target.modules())
    assert {type(part) for part in target.modules() if isinstance(part, torch.nn.Linear)} == {torch.nn.Linear}


def test_what_cannot_be_compiled_is_recorded_instead_with_one_warning(monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("the compiler does not know this layer")

    target, given = tiny_model("stablelm", seed=3), prompts((5,))
    wanted = specbeam.greedy_generate(target, given, max_new_tokens=12).tokens
    monkeypatch.setattr(compiling, "make", lambda adapter, precision: graph.runner(
        "compile", Recorder(), compiling.Layers(fails, fails, fails)))
    specbeam.use_runner(target, "compile")
    assert specbeam.greedy_generate(target, given, max_new_tokens=12).tokens == wanted
    assert warnings(caplog) == [
        "StableLmForCausalLM runs with runner graph from now on (RuntimeError: the compiler does not know this layer)."]


def test_attention_that_depends_on_the_number_of_its_layer_is_not_shared():
    target = tiny_model("gpt2", seed=3)
    target.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(RuntimeError, match="number of the layer"):
        compiling._layers(target)


@pytest.mark.heavy
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_itself_gives_the_same_tokens(device, caplog):
    target, given = tiny_model("llama", seed=4).to(device), [row.to(device) for row in prompts((5,))]
    wanted = specbeam.greedy_generate(target, given, max_new_tokens=8).tokens
    assert specbeam.use_runner(target, "compile") == "compile"
    assert specbeam.greedy_generate(target, given, max_new_tokens=8).tokens == wanted
    assert not warnings(caplog)
