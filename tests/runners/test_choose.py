"""Which runner a model gets, and what happens when a backend cannot run it."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from refusals import refusal
from tiny import prompts, tiny_model

import specbeam
from specbeam.engine.runner import EAGER
from specbeam.engine.support import adapt
from specbeam.runners.choose import use_runner


def backend(monkeypatch, make, name="openvino"):
    """Plants a backend."""
    module = ModuleType(f"specbeam.runners.{name}")
    module.make = make
    monkeypatch.setitem(sys.modules, f"specbeam.runners.{name}", module)


def works(adapter, precision):
    return replace(EAGER, name="planted", lends=False)


def test_a_model_runs_eagerly_until_someone_asks_for_more():
    assert adapt(tiny_model("llama")).runner is EAGER


def test_a_runner_is_made_once_and_again_after_the_weights_changed(monkeypatch):
    made = []
    backend(monkeypatch, lambda adapter, precision: made.append(precision) or works(adapter, precision))
    model = tiny_model("llama")
    assert use_runner(model, "openvino") == "planted"
    specbeam.greedy_generate(model, prompts((5,)), max_new_tokens=2)
    assert made == [None]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert adapt(model).runner.name == "planted" and made == [None, None]
    assert use_runner(model, "eager") == "eager" and adapt(model).runner is EAGER


def fails(adapter, precision):
    raise RuntimeError("no kernel for this\nand a long trace")


def wrong(adapter, precision):
    """A runner that ignores what a token may see."""
    def forward(adapter, cache, tokens, positions, visible, near, keep):
        return EAGER.forward(adapter, cache, tokens, positions, torch.ones_like(visible), near, keep)
    return replace(EAGER, name="wrong", forward=forward)


@pytest.mark.parametrize(("make", "why"), [(fails, "no kernel for this"), (wrong, "logits are off by")])
def test_a_backend_that_fails_or_is_wrong_is_replaced_with_one_warning(monkeypatch, caplog, make, why):
    backend(monkeypatch, make)
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, "specbeam"):
        assert use_runner(model, "openvino") == "eager"
        adapt(model)
    assert len(caplog.records) == 1 and why in caplog.text and "trace" not in caplog.text


def test_compile_falls_back_to_graph(monkeypatch, caplog):
    backend(monkeypatch, fails, "compile")
    backend(monkeypatch, works, "graph")
    with caplog.at_level(logging.WARNING, "specbeam"):
        assert use_runner(tiny_model("llama"), "compile") == "planted"
    assert "runner graph instead" in caplog.text


def test_a_freed_model_takes_its_runner_along(monkeypatch):
    import gc
    import weakref

    backend(monkeypatch, works)
    model = tiny_model("llama")
    use_runner(model, "openvino")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("options", "why"), [
    ({"runner": "fast"}, "use one of auto"), ({"runner": "graph", "precision": "int8"}, "openvino runner"),
    ({"runner": "openvino", "precision": "fp4"}, "use one of f32")])
def test_wrong_names_are_refused_in_one_sentence(options, why):
    assert why in refusal(use_runner, tiny_model("llama"), **options)


def test_early_exit_runs_through_the_targets_runner(monkeypatch):
    from specbeam.drafting.early_exit import exit_early

    backend(monkeypatch, works)
    model = tiny_model("llama")
    use_runner(model, "openvino")
    assert adapt(exit_early(model, 1)).runner.name == "planted"


def test_torch_leaves_its_threads_to_a_runner_that_has_its_own(monkeypatch):
    seen = []

    def forward(*args):
        seen.append(torch.get_num_threads())
        return EAGER.forward(*args)

    made = []
    backend(monkeypatch, lambda adapter, precision: made.append(1) or replace(EAGER, name="planted", forward=forward,
                                                                              own_threads=True))
    model, before = tiny_model("llama"), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        use_runner(model, "openvino")
        seen.clear()
        specbeam.greedy_generate(model, prompts((5,)), max_new_tokens=3)
        assert set(seen) == {1} and torch.get_num_threads() == 3 and len(made) == 1
    finally:
        torch.set_num_threads(before)
