"""The graph runner gives the tokens of the eager one, and records what it should: here with a recording that runs
again instead of replaying kernels, and on a GPU with CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import good_draft, model, plain_logits
from tiny import NAMES, prompts, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import specbeam
from specbeam.engine.support import adapt, runner_error
from specbeam.engine.tree import TokenTree, chain
from specbeam.runners import choose, graph

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
CALLS = {
    "greedy": lambda target, draft, rows: specbeam.greedy_generate(target, rows, max_new_tokens=24),
    "sample": lambda target, draft, rows: specbeam.sample_generate(target, rows, max_new_tokens=12, seed=3),
    "speculative": lambda target, draft, rows: specbeam.speculative_generate(target, draft, rows, max_new_tokens=24),
    "speculative, sampled": lambda target, draft, rows: specbeam.speculative_generate(
        target, draft, rows, max_new_tokens=12, temperature=0.8),
    "tree": lambda target, draft, rows: specbeam.speculative_generate(
        target, draft, rows, max_new_tokens=12, branching=[2, 2, 1]),
    "beam": lambda target, draft, rows: specbeam.beam_generate(target, rows, num_beams=3, max_new_tokens=12),
    "speculative beam": lambda target, draft, rows: specbeam.speculative_beam_generate(
        target, draft, rows, num_beams=3, max_new_tokens=12, draft_length=2),
}


class Hurried(TorchDispatchMode):
    """No operation whose result's shape or value the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if name.startswith(("_local_scalar_dense", "nonzero", "_unique", "unique", "masked_select", "is_nonzero")):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class Recorder:
    """Records as the GPU does, as far as a CPU can: what is not in the static inputs when it replays is not seen."""

    def __init__(self, watch=Hurried):
        self.recorded, self.replayed, self.watch = 0, 0, watch

    def warm(self, function):
        return function()

    def __call__(self, function):
        with self.watch():
            outputs = function()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        for output in outputs:
            output.fill_(-1)
        return replay, outputs


@pytest.fixture
def on(request, monkeypatch):
    """Moves models to a device and runs them through the graph runner; what was recorded."""
    record = Recorder()
    if request.param == "cpu":
        monkeypatch.setattr(graph, "make", lambda adapter, precision: graph.runner("graph", record))

    def use(*models):
        moved = [one.to(request.param) for one in models]
        for one in moved:
            choose._made.pop(one, None)  # another test's recording
            assert specbeam.use_runner(one, "graph") == "graph"
        return moved

    made: list = []
    yield lambda *models: made.extend(use(*models)) or (models if len(models) > 1 else models[0]), record
    for one in made:
        choose.want_runner(one.to("cpu"), "eager")


@pytest.mark.parametrize("on", DEVICES, indirect=True)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral-window"])
def test_every_method_gives_the_tokens_of_the_eager_runner(name, call, on, caplog):
    use, _ = on
    target, draft = model(name), good_draft(name)
    rows = prompts((5, 19, 12))
    wanted = CALLS[call](target, draft, rows).tokens
    use(target, draft)
    for _ in range(2):  # the second time the graphs of the first are replayed
        assert CALLS[call](target, draft, [row.to(target.device) for row in rows]).tokens == wanted
    assert not caplog.records  # nothing fell back


@pytest.mark.parametrize("on", DEVICES, indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_decodes_greedily_and_speculatively(name, on, caplog):
    use, _ = on
    target, draft, rows = model(name), good_draft(name), prompts((7,))
    wanted = [CALLS[call](target, draft, rows).tokens for call in ("greedy", "speculative")]
    use(target, draft)
    rows = [row.to(target.device) for row in rows]
    assert [CALLS[call](target, draft, rows).tokens for call in ("greedy", "speculative")] == wanted
    assert not caplog.records  # nothing fell back


@pytest.mark.parametrize("keeps", ["row", "position", ""])
def test_nothing_that_is_recorded_waits_for_the_device(keeps, caplog):
    """Older versions of transformers take positions that are common to all rows, which only the host can find."""
    target = model("llama")
    if keeps == "row" and adapt(target).keeps != "row":
        pytest.skip("the installed transformers is an older one: it takes no index of each row")
    tree = TokenTree(replace(adapt(target), runner=graph.runner("graph", Recorder()), keeps=keeps), 2, 64)
    with torch.inference_mode():
        tree.extend(tree.tips([0, 0]), chain([[5, 6, 7], [8, 9]], tree.device))
        found = [tree.extend(tree.tips([3, 2]), chain([[11, 12], [13]], tree.device), last_only=True)[0]
                 for _ in range(4)]
    wanted = torch.stack([one[-1] for one in plain_logits(target, [[5, 6, 7, 11, 12], [8, 9, 13]])])
    assert all((one[:, 0] - wanted).abs().max() < 1e-4 for one in found)
    assert not caplog.records


@pytest.mark.parametrize("on", ["cpu"], indirect=True)
def test_a_shape_is_recorded_once_and_the_next_batch_replays_it(on):
    use, record = on
    target, row = use(model("llama")), prompts((5,))
    specbeam.greedy_generate(target, row, max_new_tokens=20, min_new_tokens=20)
    recorded, replayed = record.recorded, record.replayed
    specbeam.greedy_generate(target, row, max_new_tokens=20, min_new_tokens=20)
    assert record.recorded == recorded
    assert record.replayed == replayed + 19  # all but the prompt: each is forward, choice and what comes next


@pytest.mark.parametrize("on", ["cpu"], indirect=True)
def test_slots_that_grow_are_recorded_anew(on):
    use, _ = on
    target = use(model("llama"))
    tree = TokenTree(adapt(target), 1, 8)
    with torch.inference_mode():
        for end in range(0, 250, 50):
            tree.extend(tree.tips([end]), chain([[5 + end % 7] * 50], tree.device))
        for end in range(250, 300):
            tree.extend(tree.tips([end]), chain([[9]], tree.device))
    assert tree.cache.capacity == 384


def test_widths_are_few_and_hold_what_they_must():
    assert [graph.width(n) for n in (1, 256, 257, 385, 513, 769, 1025)] == [256, 256, 384, 512, 768, 1024, 1536]


@pytest.mark.parametrize("on", ["cpu"], indirect=True)
def test_rows_that_leave_do_not_change_the_others(on):
    use, _ = on
    target, rows = use(model("qwen2")), prompts((5, 9, 12, 7))
    alone = [specbeam.greedy_generate(target, [row], max_new_tokens=30).tokens[0] for row in rows]
    out = specbeam.greedy_generate(target, rows, max_new_tokens=30)
    assert out.tokens == alone


def test_a_replay_that_does_not_see_its_inputs_fails_the_probe():
    """The planted fault of recording: what was true when it was recorded is taken to be true for ever."""
    target = model("stablelm")

    class Stale(Recorder):
        def __call__(self, function):
            output = function()
            return (lambda: None), output

    assert "off by" in runner_error(adapt(target), graph.runner("graph", Stale()), torch.float32, False)
    assert runner_error(adapt(target), graph.runner("graph", Recorder()), torch.float32, False) is None


@pytest.mark.parametrize("on", ["cpu"], indirect=True)
@pytest.mark.parametrize("call", ["greedy", "speculative"])
def test_rows_that_join_a_running_batch_give_their_own_tokens(on, call):
    use, _ = on
    target, draft, rows = model("llama"), good_draft("llama"), prompts((5, 9, 12, 7, 6))
    wanted = [CALLS[call](target, draft, [row]).tokens[0] for row in rows]
    use(target, draft)
    run = {"greedy": partial(specbeam.greedy_generate, target),
           "speculative": partial(specbeam.speculative_generate, target, draft)}[call]
    assert run(rows, max_new_tokens=24, batch_size=2).tokens == wanted


def test_a_recording_that_fails_leaves_a_working_model_and_one_warning(monkeypatch, caplog):
    class Refuses(Recorder):
        def __call__(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "make", lambda adapter, precision: graph.runner("graph", Refuses()))
    target, rows = model("phi3"), prompts((5, 9))
    wanted = specbeam.greedy_generate(target, rows, max_new_tokens=10).tokens
    choose._made.pop(target, None)
    try:
        specbeam.use_runner(target, "graph")
        assert specbeam.greedy_generate(target, rows, max_new_tokens=10).tokens == wanted
        assert [r.message for r in caplog.records if "runs with runner eager" in r.message] != []
        assert sum("capturing" in r.message for r in caplog.records) == 1
    finally:
        choose.want_runner(target, "eager")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_that_waits_for_the_host_falls_back_and_leaves_the_gpu_as_it_was(caplog):
    target, rows = tiny_model("llama", seed=5).cuda(), [row.cuda() for row in prompts((5, 9))]
    wanted = specbeam.greedy_generate(target, rows, max_new_tokens=10).tokens
    target.model.norm.register_forward_hook(lambda _, given, output: output if float(output.sum()) < 1e9 else None)
    specbeam.use_runner(target, "graph")
    assert specbeam.greedy_generate(target, rows, max_new_tokens=10).tokens == wanted
    assert sum("runs with runner eager" in r.message for r in caplog.records) == 1
    assert 0 <= float(torch.rand(1, device="cuda")) < 1  # a failed recording spoils the generator, if nobody helps
    other = tiny_model("qwen2", seed=6).cuda()
    wanted = specbeam.greedy_generate(other, rows, max_new_tokens=10).tokens
    assert specbeam.use_runner(other, "graph") == "graph"
    assert specbeam.greedy_generate(other, rows, max_new_tokens=10).tokens == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_that_is_thrown_away_meanwhile_ends_no_recording():
    record, x = graph.OnCuda(), torch.zeros(2, device="cuda")
    record.warm(lambda: (x + 1,))
    old: list = [*record(lambda: (x + 1,))]
    old.append(old)  # as a model and its slots: only a collection finds it
    del old

    def function():
        assert len([[] for _ in range(100_000)])  # so much that the collector would come by
        return (x + 2,)

    replay, [found] = record(function)
    replay()
    assert found.tolist() == [2, 2]
    assert gc.isenabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_graph_falls_back_to_eager_and_says_why(caplog):
    assert specbeam.use_runner(tiny_model("qwen3", seed=8), "graph") == "eager"
    assert "CUDA graphs need a GPU" in caplog.text


def test_models_are_freed_with_their_slots(monkeypatch):
    class Forgets(Recorder):  # as a CUDA graph, which knows addresses and holds no model
        def __call__(self, function):
            return (lambda: None), function()

    monkeypatch.setattr(graph, "make", lambda adapter, precision: graph.runner("graph", Forgets()))
    target: PreTrainedModel | None = tiny_model("llama", seed=7)
    specbeam.use_runner(target, "graph")
    specbeam.greedy_generate(target, prompts((5,)), max_new_tokens=2)
    seen = weakref.ref(target)
    target = None
    gc.collect()
    assert seen() is None
