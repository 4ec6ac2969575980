"""OpenVINO's forward over token trees gives eager's logits, whatever was rejected, reused, compacted or dropped."""

from __future__ import annotations

import functools
import gc
import logging
import os
import weakref
from collections.abc import Iterator

import pytest
import torch
from families import MORE, RUNS, random_model
from tiny import NAMES, prompts, tiny_draft, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import specbeam
from specbeam.engine.support import adapt
from specbeam.engine.tree import TokenTree, branches, chain, leaves, read_prompts
from specbeam.runners.choose import use_runner

pytest.importorskip("openvino", reason="openvino is not installed")
from specbeam.runners import openvino as backend
from specbeam.runners import openvino_cache

# Their experts are run by an operation that OpenVINO does not know, or the graph is traced with the example's routing.
FALL_BACK = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"}
# Full and sliding layers, a window in the one mask, grouped queries.
QUICK = ("llama", "mistral-window", "gemma3")


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@functools.cache
def model(name: str) -> PreTrainedModel:
    if name in NAMES:
        return tiny_model(name)
    config, attention = (RUNS | MORE)[name]
    return random_model(config(), attention)


@functools.cache
def draft() -> PreTrainedModel:
    return tiny_draft(model("llama"), noise=0.1)


def walk(target: PreTrainedModel, seed: int = 0) -> Iterator[Tensor]:
    """Logits of real nodes only: a ragged prefill, then rounds in which trees, chains and beams reuse the slots of
    what was rejected, and a row that leaves."""
    generator = torch.Generator().manual_seed(seed)
    tree = TokenTree(adapt(target), 3, 16)
    device, rows = tree.device, prompts((5, 19, 12))
    logits, _ = tree.extend(tree.tips([0] * 3), chain([row.tolist() for row in rows], device), last_only=True)
    yield logits
    tips, live = tree.tips([len(row) for row in rows]), 3
    for turn in range(36):
        ids = torch.randint(3, 90, (live, 5), generator=generator)
        if turn == 20:
            kept = tree.keep_rows([2, 0])
            tips, ids, live = tips.rows(kept), ids[kept], 2
        if turn % 3 == 0:  # a ragged tree, of which one leaf is kept
            block = branches([(row[: 5 - i].tolist(), [-1, 0, 0, 1, 1][: 5 - i]) for i, row in enumerate(ids)], device)
        elif turn % 3 == 1:  # a chain, of which a part is kept
            block = chain(ids, device)
        else:  # two beams below each other's parents
            pair, _ = tree.extend(tips, branches([([7, 9], [-1, -1])] * live, device))
            yield pair
            tips = _.pick(torch.tensor([[0, 1]] * live))
            block = leaves(ids[:, :2], torch.tensor([[1, 0]] * live))
        logits, nodes = tree.extend(tips, block)
        for row, length in enumerate(block.lengths.tolist()):
            yield logits[row, :length]
        tips = nodes.pick((block.lengths - 1 - torch.randint(0, 2, (live,), generator=generator))[:, None])


def errors(target: PreTrainedModel) -> Iterator[float]:
    """How far each logit of a walk is from eager's, in parts of the largest one."""
    use_runner(target, "eager")
    wanted = [logits.clone() for logits in walk(target)]
    assert use_runner(target, "openvino") == "openvino"
    for ours, theirs in zip(walk(target), wanted, strict=True):
        yield ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", QUICK)
def test_logits_are_eagers(name):
    assert max(errors(model(name))) < 1e-4


@pytest.mark.heavy
@pytest.mark.parametrize("name", [n for n in (*NAMES, *RUNS, *MORE) if n not in FALL_BACK and n not in QUICK])
def test_logits_are_eagers_for_every_family(name):
    assert max(errors(model(name))) < 1e-4


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.heavy) if name != "mixtral" else name
                                  for name in sorted(FALL_BACK)])
def test_what_openvino_cannot_run_falls_back_by_name(name, caplog):
    root = logging.getLogger()
    before = root.level, [*root.filters], [*root.handlers]
    with caplog.at_level(logging.WARNING, "specbeam"):
        assert use_runner(model(name), "openvino") == "eager"
    assert type(model(name)).__name__ in caplog.text and "openvino: " in caplog.text
    assert before == (root.level, root.filters, root.handlers)  # the warnings after this one are heard


def planted(monkeypatch, name, fault):
    monkeypatch.setattr(backend.StateSlots, name, fault)


def forgotten_owner(slots, places, wide):
    slots.length += wide


def nothing_dies(slots, places, wide, right=backend.StateSlots._append):
    right(slots, places, wide)
    slots.alive[:, : slots.length] = True


def unordered(slots):
    """Compaction that leaves keys and values where they were."""
    plain = slots.plain
    backend_compact(slots, move=False) if not plain else None


def backend_compact(slots, move):
    class Unmoved:
        def __init__(self, state):
            self.held = state

        @property
        def state(self):
            return self.held.state

        @state.setter
        def state(self, new):
            import openvino

            self.held.state = openvino.Tensor(self.held.state.data[:, :, : new.shape[2]].copy())

    request, slots.request = slots.request, type("Held", (), {
        "query_state": lambda self: [Unmoved(state) for state in request.query_state()]})()
    try:
        RIGHT_COMPACT(slots)
    finally:
        slots.request = request


RIGHT_COMPACT = backend.StateSlots._compact


@pytest.mark.parametrize(("name", "fault"), [
    ("_append", forgotten_owner), ("_append", nothing_dies), ("_compact", unordered)],
    ids=["owners forgotten", "nothing dies", "compaction moves nothing"])
def test_a_broken_map_of_owners_is_seen(monkeypatch, name, fault):
    target = model("llama")
    use_runner(target, "eager")
    wanted = [logits.clone() for logits in walk(target)]
    use_runner(target, "openvino")
    monkeypatch.setattr(backend, "_SLACK", 2)
    planted(monkeypatch, name, fault)
    try:
        worst = max((a - b).abs().max().item() for a, b in zip(walk(target), wanted, strict=True))
    except (RuntimeError, AssertionError):
        return  # the shapes do not fit any more
    assert worst > 0.1


def test_the_walk_compacts(monkeypatch):
    """Else the tests above prove nothing of it."""
    monkeypatch.setattr(backend, "_SLACK", 2)
    calls = []
    planted(monkeypatch, "_compact", lambda slots: calls.append(slots.length) or RIGHT_COMPACT(slots))
    assert max(errors(model("llama"))) < 1e-4
    assert len(calls) >= 2


def joined(target: PreTrainedModel, rows: list[int]) -> torch.Tensor:
    """Logits behind prompts that were read one after the other, and joined."""
    ids = [prompts((9, 14))[row].tolist() for row in rows]
    tree, tips, _ = read_prompts(adapt(target), ids[:1], 32)
    for prompt in ids[1:]:
        more, its, _ = read_prompts(adapt(target), [prompt], 32)
        tips = tree.join(tips, more, its)
    tokens = torch.full((len(rows), 1), 5)
    return tree.extend(tips, leaves(tokens, torch.zeros_like(tokens)))[0]


def test_bfloat16_keys_and_values_stay_what_they_are_when_they_move(monkeypatch):
    """OpenVINO shows their bits as float16."""
    target = tiny_model("llama", seed=5).to(torch.bfloat16)
    assert use_runner(target, "openvino") == "openvino"
    still, alone = list(walk(target)), torch.cat([joined(target, [row]) for row in (0, 1)])
    monkeypatch.setattr(backend, "_SLACK", 2)

    def moved():
        pairs = [*zip(walk(target), still, strict=True), (joined(target, [0, 1]), alone)]
        return [((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]

    assert max(moved()) < 0.05
    monkeypatch.setattr(backend, "_tensor", lambda bits, kind: backend.ov.Tensor(bits.numpy()))
    *walked, together = moved()
    assert max(walked) > 0.5 and together > 0.5


METHODS = {
    "greedy": lambda t, d, **o: specbeam.greedy_generate(t, **o),
    "sample": lambda t, d, **o: specbeam.sample_generate(t, temperature=0.7, seed=3, **o),
    "chain": lambda t, d, **o: specbeam.speculative_generate(t, d, **o),
    "auto length": lambda t, d, **o: specbeam.speculative_generate(t, d, draft_length="auto", **o),
    "tree": lambda t, d, **o: specbeam.speculative_generate(t, d, branching=[3, 2, 1], **o),
    "grown tree": lambda t, d, **o: specbeam.speculative_generate(t, d, tree_nodes=8, **o),
    "sampled": lambda t, d, **o: specbeam.speculative_generate(t, d, temperature=0.7, seed=3, **o),
    "prompt lookup": lambda t, d, **o: specbeam.speculative_generate(t, None, drafter="prompt_lookup", **o),
    "token recycling": lambda t, d, **o: specbeam.speculative_generate(t, None, drafter="token_recycling", **o),
    "early exit": lambda t, d, **o: specbeam.speculative_generate(t, None, drafter="early_exit", **o),
    "beam": lambda t, d, **o: specbeam.beam_generate(t, num_beams=3, num_return_sequences=3, **o),
    "speculative beam": lambda t, d, **o: specbeam.speculative_beam_generate(t, d, num_beams=3, **o),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [(9,), (5, 19, 12)], ids=["one row", "a ragged batch"])
def test_every_method_gives_eagers_tokens(method, lengths):
    target, options = model("llama"), {"input_ids": prompts(lengths), "max_new_tokens": 40, "eos_token_id": [2, 60]}

    def run(runner):
        assert use_runner(target, runner) == use_runner(draft(), runner) == runner
        return METHODS[method](target, draft(), **options)

    ours, wanted = run("openvino"), run("eager")
    for row, same in zip(ours.hypotheses, wanted.hypotheses, strict=True):
        assert [one.tokens for one in row] == [one.tokens for one in same]


def test_trees_of_one_model_do_not_disturb_each_other():
    target, ids = model("llama"), torch.tensor([[5, 9, 3, 12]])
    use_runner(target, "openvino")
    first, second = (TokenTree(adapt(target), 1, 8) for _ in range(2))
    apart = first.extend(first.tips([0]), chain(ids, first.device))[0]
    second.extend(second.tips([0]), chain(ids + 20, second.device))
    again, _ = first.extend(first.tips([4]), chain(ids, first.device))
    fresh = TokenTree(adapt(target), 1, 8)
    whole, _ = fresh.extend(fresh.tips([0]), chain(torch.cat([ids, ids], 1), first.device))
    assert torch.allclose(torch.cat([apart, again], 1), whole, atol=1e-4)


def test_after_a_failed_forward_the_next_ones_are_right():
    target, ids = model("llama"), torch.tensor([[5, 9, 3, 12]])
    use_runner(target, "openvino")
    wanted = specbeam.greedy_generate(target, ids, max_new_tokens=5).tokens
    tree = TokenTree(adapt(target), 1, 8)
    before, request = tree.cache.requests.compiled, tree.cache.request

    class Fails:
        def __getattr__(self, name):
            return getattr(request, name)

        def infer(self, **options):
            raise RuntimeError("half-way")

    tree.cache.request = Fails()
    with pytest.raises(RuntimeError, match="half-way"):
        tree.extend(tree.tips([0]), chain(ids, tree.device))
    assert tree.cache.requests.compiled is not before, "all requests share what is now in a bad state"
    assert specbeam.greedy_generate(target, ids, max_new_tokens=5).tokens == wanted


def test_a_tree_that_is_gone_leaves_its_request_to_the_next():
    target = model("llama")
    use_runner(target, "openvino")
    tree = TokenTree(adapt(target), 1, 8)
    tree.extend(tree.tips([0]), chain([[5, 9]], tree.device))
    request = tree.cache.request
    del tree
    gc.collect()
    trees = [TokenTree(adapt(target), 1, 8) for _ in range(8)]
    assert any(tree.cache.request is request for tree in trees)


def test_bfloat16_differs_at_near_ties_only(caplog):
    target, ids = model("llama"), prompts((9, 14))
    use_runner(target, "eager")
    wanted = specbeam.greedy_generate(target, ids, max_new_tokens=30).tokens
    assert use_runner(target, "openvino", "bf16") == "openvino bf16"
    ours = specbeam.greedy_generate(target, ids, max_new_tokens=30).tokens
    for prompt, a, b in zip(ids, ours, wanted, strict=True):
        place = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
        if place is not None:
            logits = target(torch.cat([prompt, torch.tensor(b[:place], dtype=torch.long)])[None]).logits[0, -1]
            assert logits[b[place]] - logits[a[place]] < 0.1 * logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_nearly_the_models_own(dtype):
    target, ids = tiny_model("llama", seed=5).to(dtype), prompts((9,))
    assert use_runner(target, "openvino", "int8") == "openvino int8"
    tree = TokenTree(adapt(target), 1, 16)
    rounded = tree.extend(tree.tips([0]), chain([ids[0].tolist()], tree.device))[0]
    error = (rounded - target(ids[0][None]).logits).abs().max()
    assert 1e-3 < error < 0.1 * rounded.abs().max()


def test_int8_is_another_target_whose_methods_agree_with_each_other():
    target, ids = model("llama"), prompts((9, 14))
    assert use_runner(target, "openvino", "int8") == "openvino int8"
    wanted = specbeam.greedy_generate(target, ids, max_new_tokens=30).tokens
    assert specbeam.speculative_generate(target, draft(), ids, max_new_tokens=30).tokens == wanted


def test_a_model_is_converted_once_and_then_read_from_the_cache(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SPECBEAM_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO, "specbeam"):
        assert use_runner(tiny_model("gpt2", seed=5), "openvino") == "openvino"
    assert "converted for OpenVINO in" in caplog.text
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(openvino_cache, "export", None)
    assert use_runner(tiny_model("gpt2", seed=5), "openvino") == "openvino"
    assert use_runner(tiny_model("gpt2", seed=6), "openvino") == "eager", "other weights are another model"
    (kept / "model.xml").write_text("cut short")
    monkeypatch.undo()
    monkeypatch.setenv("SPECBEAM_CACHE", str(tmp_path))
    assert use_runner(tiny_model("gpt2", seed=5), "openvino") == "openvino", "a broken file is made again"


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECBEAM_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.INFO, "specbeam"):
        assert use_runner(tiny_model("gpt2", seed=5), "openvino") == "openvino"
    assert "not kept" in caplog.text and os.listdir(tmp_path) == ["file"]


def test_the_model_is_freed_with_its_runner(monkeypatch):
    target = tiny_model("gpt2", seed=5)
    assert use_runner(target, "openvino") == "openvino"
    specbeam.greedy_generate(target, prompts((5,)), max_new_tokens=3)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None
