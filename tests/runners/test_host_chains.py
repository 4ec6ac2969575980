"""Chains that are read on the host give the tokens and the rounds of the ordinary loops, whatever leaves or joins."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from openvino_runs import on_openvino
from reference import good_draft, model
from test_chains import (
    ROWS,
    SHAPING,
    check_a_way_to_propose,
    check_rounds,
    check_rows_that_end_and_join,
    plain,
    speculative,
)
from tiny import prompts
from transformers import EncoderRepetitionPenaltyLogitsProcessor, LogitsProcessorList

import specbeam
from specbeam.drafting.length import Length
from specbeam.engine.support import adapt
from specbeam.runners.chains import Shape
from specbeam.runners.host_chains import HostChains

backend = pytest.importorskip("specbeam.runners.openvino", reason="openvino is not installed")


@pytest.fixture
def on_host(monkeypatch):
    """Runs models on OpenVINO, after what was run eagerly; how often a chain was read."""
    reads, right = [], backend.StateSlots.read

    def read(slots, tokens, *others):
        reads.append(len(tokens[0]))
        return right(slots, tokens, *others)

    monkeypatch.setattr(backend.StateSlots, "read", read)

    with on_openvino() as use:
        yield lambda *models: use(*models) or reads


def fell_back(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "specbeam"]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("method", [plain, speculative])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_tokens_are_those_of_the_eager_loops(name, method, shaping, rows, on_host, caplog):
    target, draft, given = model(name), good_draft(name), prompts(ROWS[rows])
    call = partial(method, target, draft, given, max_new_tokens=14, seed=5, **SHAPING[shaping])
    wanted = call()
    reads = on_host(target, draft)
    found = call()
    assert reads
    check_rounds(found, wanted)
    assert not fell_back(caplog)


@pytest.mark.parametrize("method", [plain, speculative])
@pytest.mark.parametrize("shaping", ["greedy", "greedy, penalty", "drawn, shaped"])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "gemma3"])
def test_rows_that_end_and_join_change_nothing(name, shaping, method, on_host, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_SLACK", 2)  # the state is compacted again and again
    check_rows_that_end_and_join(name, shaping, method, on_host)
    assert not fell_back(caplog)


REMEMBER = {
    "n-grams": {"no_repeat_ngram_size": 2}, "bad words": {"bad_words_ids": [[7, 3], [9]]},
    "of its own text": {"logits_processor": [lambda ids, scores: scores + ids.sum(1, keepdim=True) % 7 * scores]},
    "a grammar": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(int(ids[-1]) % 5, 90, 2))}}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("remember", REMEMBER)
@pytest.mark.parametrize("method", [plain, speculative])
@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.9}], ids=["greedy", "drawn"])
def test_processors_that_remember_see_each_tokens_own_text(method, drawn, remember, rows, on_host, caplog):
    target, draft, given = model("llama"), good_draft("llama"), prompts(ROWS[rows])
    call = partial(method, target, draft, given, max_new_tokens=14, seed=5, **drawn, **REMEMBER[remember])
    wanted = call()
    reads = on_host(target, draft)
    before = len(reads)
    check_rounds(call(), wanted)
    own = remember in ("n-grams", "bad words")
    assert (len(reads) > before) == (own or len(given) == 1), "others may know their row"
    assert not fell_back(caplog)


def test_processors_of_the_callers_see_one_row_at_a_time(on_host):
    """A function knows nothing of rows that others could see: each has its own."""
    target, draft, given = model("llama"), good_draft("llama"), prompts((9, 9, 9))

    def one_row(ids, scores):
        assert len({tuple(row[:9].tolist()) for row in ids}) == 1
        return scores + ids[:, :1] % 5 * scores

    wanted = plain(target, draft, given, max_new_tokens=10, logits_processor=[one_row]).tokens
    on_host(target, draft)
    for method in (plain, speculative):
        assert method(target, draft, given, max_new_tokens=10, logits_processor=[one_row]).tokens == wanted


def test_scores_that_transformers_asks_for_are_each_rows_own(on_host):
    from specbeam.transformers import greedy

    target, given = model("llama"), torch.stack(prompts((9, 9)))
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "do_sample": False}
    wanted = target.generate(given, custom_generate=greedy(), **asked).scores
    on_host(target)
    found = target.generate(given, custom_generate=greedy(), **asked).scores
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_processors_of_two_rows_are_told_apart_by_all_of_their_numbers():
    prompts = [torch.zeros(1, 2000, dtype=torch.long) for _ in range(2)]
    prompts[1][0, 1000] = 1
    lists = [LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1.5, one)]) for one in prompts]
    assert Shape.of(lists, samples=False, recorded=False) is None
    assert Shape.of([lists[0]] * 2, samples=False, recorded=False) is not None


@pytest.mark.parametrize("options", [
    {"drafter": "prompt_lookup"}, {"drafter": "early_exit"}, {"drafter": "combined"}, {"draft_length": "auto"},
    {"acceptance": "block", "temperature": 1.0}, {"confidence_threshold": 0.3}], ids=str)
def test_every_way_to_propose_a_chain(options, on_host):
    check_a_way_to_propose(options, on_host)


def test_where_drafting_does_not_pay_steps_are_plain_ones_without_a_round_each(on_host, monkeypatch):
    target, draft, given = model("llama"), good_draft("llama"), prompts((5, 9))
    wanted = specbeam.greedy_generate(target, given, max_new_tokens=60).tokens
    on_host(target, draft)
    monkeypatch.setattr("specbeam.drafting.length._LATELY", 0.0)
    monkeypatch.setattr("specbeam.drafting.length.Learned.paid", lambda self, net, rows: setattr(self, "left", 8))
    steps, right = [], HostChains.step
    monkeypatch.setattr(HostChains, "step", lambda self, *args: steps.append(1) or right(self, *args))
    out = specbeam.speculative_generate(target, draft, given, draft_length="auto", max_new_tokens=60)
    assert out.tokens == wanted
    resting = [sum(one.why in ("does not pay", "measuring plain") for one in row.rounds) for row in out.trace]
    assert len(steps) == max(resting) >= 8


@pytest.mark.parametrize("fault", ["nothing dies", "everybody sees all"])
def test_a_broken_mask_is_seen(fault, on_host, monkeypatch):
    target, draft, given = model("llama"), good_draft("llama"), prompts(ROWS["ragged"])
    wanted = speculative(target, draft, given, max_new_tokens=24).tokens
    on_host(target, draft)
    if fault == "nothing dies":
        right = backend.StateSlots.read

        def read(slots, *args):
            slots.alive = np.ones_like(slots.alive)
            slots.owner[:, : slots.length] = -1
            return right(slots, *args)

        monkeypatch.setattr(backend.StateSlots, "read", read)
    else:
        monkeypatch.setattr(backend, "_below", lambda new: np.ones((new, new), dtype=bool))
    assert speculative(target, draft, given, max_new_tokens=24).tokens != wanted


def test_auto_learns_from_forwards_as_wide_as_they_were_outside_of_chains_too(on_host, monkeypatch):
    target, draft, given = model("llama"), good_draft("llama"), prompts((9,))
    on_host(target, draft)
    requests = adapt(target).runner.open(adapt(target), 1, 8).requests
    requests.patience = 1e9  # a width is kept for ever
    wide, told, forward, learn = [], [], backend.StateSlots.forward, Length.round_done

    def forwards(slots, *args):
        found = forward(slots, *args)
        if slots.requests is requests:
            wide.append((slots.wide, slots.changed))
        return found

    def learns(length, proposal, paths, became, seconds, new, changed):
        told.append((new, changed, length.why[0]))
        learn(length, proposal, paths, became, seconds, new, changed)

    monkeypatch.setattr(backend.StateSlots, "forward", forwards)
    monkeypatch.setattr(Length, "round_done", learns)
    out = specbeam.speculative_generate(target, draft, given, draft_length="auto", max_new_tokens=40,
                                        drafter="token_recycling")
    assert [(new, changed) for new, changed, _ in told] == wide[-len(out.trace[0].rounds):]
    assert {new for new, _, why in told if why == "measuring plain"} == {1}
    assert any(new > 1 for new, _, _ in told)
