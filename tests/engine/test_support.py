"""Which models run is found by trying them: families nobody listed run exactly, and what cannot is refused by name."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
import transformers as hf
from families import MORE, REFUSED, RUNS, random_model
from reference import generated_all, model
from tiny import _BASE, build, prompts, tiny_model

from specbeam import beam_generate, greedy_generate, speculative_generate
from specbeam.engine import support
from specbeam.engine.support import adapt, check_lengths, evaluating
from specbeam.errors import InputError

ROWS = prompts((5, 19, 12))


def check_family(config, attention):
    target = random_model(config(), attention)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    wanted = generated_all(target, ROWS, **options)
    assert greedy_generate(target, ROWS, **options).tokens == wanted
    assert speculative_generate(target, target, ROWS, draft_length=3, **options).tokens == wanted
    options["max_new_tokens"] = 10
    assert beam_generate(target, ROWS, num_beams=3, **options).tokens == generated_all(
        target, ROWS, num_beams=3, **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_decoder_that_nobody_listed_runs_and_equals_generate(name):
    check_family(*RUNS[name])


@pytest.mark.heavy
@pytest.mark.parametrize("name", MORE)
def test_many_more_decoders_run_and_equal_generate(name):
    check_family(*MORE[name])


def one_sentence(error: InputError) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 500
    return text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_run_exactly_is_refused_by_name_before_generation(name, dtype, monkeypatch):
    config, reason = REFUSED[name]
    target = random_model(config()).to(dtype)
    monkeypatch.setattr("specbeam.engine.tree.TokenTree", None)  # nothing may be started
    with pytest.raises(InputError, match=reason) as refusal:
        greedy_generate(target, ROWS, max_new_tokens=2)
    assert type(target).__name__ in one_sentence(refusal.value)


def test_an_encoder_decoder_model_is_refused_by_name():
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=101, d_model=32, num_layers=1, num_heads=2, d_kv=16,
                                                   d_ff=32, decoder_start_token_id=0))
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        greedy_generate(t5, ROWS, max_new_tokens=2)


@pytest.mark.parametrize("method", [greedy_generate, beam_generate])
def test_a_checkpoint_with_nan_weights_is_refused(method):
    target = tiny_model("llama")
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"LlamaForCausalLM gives logits that are not finite"):
        method(target, ROWS, max_new_tokens=2)


def test_a_draft_that_cannot_be_run_is_refused_as_well():
    with pytest.raises(InputError, match="MambaForCausalLM"):
        speculative_generate(model("llama"), random_model(REFUSED["mamba"][0]()), ROWS, max_new_tokens=4)


def test_an_attention_that_takes_no_mask_is_refused_before_it_crashes_the_process():
    target = tiny_model("llama", "flex_attention")
    with pytest.raises(InputError, match=r"attn_implementation='flex_attention'.*load it with") as refusal:
        greedy_generate(target, ROWS, max_new_tokens=2)
    one_sentence(refusal.value)


# What is found is kept, and nothing else.

def test_a_model_is_probed_once(monkeypatch):
    target, calls = tiny_model("qwen2"), []
    real = support._probe
    monkeypatch.setattr(support, "_probe", lambda one: calls.append(one) or real(one))
    for _ in range(3):
        greedy_generate(target, ROWS, max_new_tokens=2)
    assert len(calls) == 1


def test_a_model_is_probed_again_when_its_attention_or_dtype_changes():
    target = tiny_model("llama")
    assert not adapt(target).additive
    target.set_attn_implementation("eager")
    assert adapt(target).additive, "eager attention adds its mask: a boolean one would be silently wrong"
    before = adapt(target)
    assert adapt(target.to(torch.bfloat16)) == before


def test_a_model_that_is_no_longer_used_is_freed():
    target = tiny_model("llama")
    greedy_generate(target, ROWS, max_new_tokens=2)
    seen = weakref.ref(target)
    del target
    gc.collect()
    assert seen() is None


def test_a_model_in_train_mode_gives_its_eval_answer_and_stays_in_train_mode():
    """gpt2 has dropout: with it, no two forwards are the same model."""
    target = tiny_model("gpt2").train()
    target.transformer.h[0].eval()  # frozen by its user
    options = {"max_new_tokens": 20, "eos_token_id": None}
    wanted = greedy_generate(model("gpt2"), ROWS, **options).tokens
    assert greedy_generate(target, ROWS, **options).tokens == wanted
    assert speculative_generate(target, target, ROWS, **options).tokens == wanted
    assert beam_generate(target, ROWS, num_beams=2, **options).tokens == beam_generate(
        model("gpt2"), ROWS, num_beams=2, **options).tokens
    assert target.training
    assert target.transformer.h[1].training
    assert not target.transformer.h[0].training


def test_train_mode_comes_back_after_an_error():
    target = tiny_model("gpt2").train()
    with pytest.raises(RuntimeError), evaluating(target):
        assert not target.training
        raise RuntimeError
    assert target.training


def test_parameters_that_require_gradients_stay_as_they_are():
    target = tiny_model("llama").requires_grad_(True)
    greedy_generate(target, ROWS, max_new_tokens=2)
    assert all(weight.requires_grad and weight.grad is None for weight in target.parameters())


def test_two_calls_at_once_do_not_disturb_each_other():
    target, found = model("llama"), {}

    def call(number: int) -> None:
        found[number] = speculative_generate(target, target, prompts((4, 9), seed=number), max_new_tokens=20,
                                             eos_token_id=None).tokens

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert found[number] == generated_all(target, prompts((4, 9), seed=number), max_new_tokens=20,
                                              eos_token_id=None)


# How far a model reaches.

def test_learned_positions_are_used_to_the_last_one():
    """gpt2 has 256: the last new token is chosen, but never read, so that 257 fit."""
    target, row = model("gpt2"), prompts((7,))
    options = {"max_new_tokens": 250, "eos_token_id": None}
    wanted = generated_all(target, row, **options)
    assert greedy_generate(target, row, **options).tokens == wanted
    assert speculative_generate(target, target, row, draft_length=50, **options).tokens == wanted


@pytest.mark.parametrize("lengths, new", [((300,), 5), ((7, 250), 9), ((256,), 2)])
def test_a_prompt_and_answer_beyond_learned_positions_are_an_error_before_anything_runs(lengths, new):
    with pytest.raises(InputError, match=r"target GPT2LMHeadModel has a context of 256 positions") as error:
        greedy_generate(model("gpt2"), prompts(lengths), max_new_tokens=new)
    assert str(max(lengths) + new) in one_sentence(error.value)


def test_a_draft_with_too_short_a_context_is_named_as_the_draft():
    small = build(hf.GPT2Config(vocab_size=101, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="draft GPT2LMHeadModel has a context of 16"):
        speculative_generate(model("llama"), small, prompts((7,)), max_new_tokens=20)


def test_a_rotary_model_beyond_its_context_runs_with_a_warning(caplog):
    target, row = model("llama"), prompts((250,))
    with caplog.at_level(logging.WARNING, logger="specbeam"):
        out = greedy_generate(target, row, max_new_tokens=20, eos_token_id=None)
    assert out.tokens == generated_all(target, row, max_new_tokens=20, eos_token_id=None)
    assert sum("context of 256 positions" in one.message for one in caplog.records) == 1


def test_within_the_context_nothing_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="specbeam"):
        greedy_generate(model("llama"), ROWS, max_new_tokens=20)
    assert not caplog.records


def _longrope():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32}
    return build(hf.Phi3Config(**_BASE | {"max_position_embeddings": 128}, original_max_position_embeddings=32,
                               rope_parameters=rope))


def _dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return build(hf.LlamaConfig(**_BASE | {"max_position_embeddings": 32}, rope_parameters=rope))


@pytest.mark.parametrize("make", [_longrope, _dynamic])
def test_rotary_scaling_that_couples_the_rows_is_refused_beyond_its_limit_and_runs_within(make):
    target = make()
    rows = prompts((5, 12))
    options = {"max_new_tokens": 21, "eos_token_id": None}  # the last token read lies at position 32
    assert greedy_generate(target, rows, **options).tokens == generated_all(target, rows, **options)
    with pytest.raises(InputError, match="beyond 32 the rotary scaling"):
        greedy_generate(target, rows, max_new_tokens=22)
    with pytest.raises(InputError, match="beyond 32 the rotary scaling"):
        speculative_generate(model("llama"), target, rows, max_new_tokens=22)


def test_longrope_runs_where_every_row_starts_beyond_its_limit():
    target, rows = _longrope(), prompts((40, 33, 51))
    options = {"max_new_tokens": 12, "eos_token_id": None}
    assert greedy_generate(target, rows, **options).tokens == generated_all(target, rows, **options)


def test_lengths_are_checked_row_by_row():
    """A long prompt with little room beside a short one with much: neither goes beyond the context."""
    check_lengths(adapt(model("gpt2")), [250, 7], [7, 250])


def test_an_untied_copy_of_a_probed_model_is_a_model_of_its_own():
    first = tiny_model("llama")
    adapt(first)
    second = copy.deepcopy(first)
    assert adapt(second).model is second


def test_what_one_thread_runs_is_not_kept_when_another_ends_later():
    """Else a weight that is written afterwards would not be seen."""
    mine, its = tiny_model("llama"), tiny_model("gpt2")
    ready, go = threading.Event(), threading.Event()

    def other():
        with evaluating(its):
            ready.set()
            go.wait(10)

    thread = threading.Thread(target=other)
    with evaluating(mine):
        held = adapt(mine)
        assert adapt(mine) is held
        thread.start()
        ready.wait(10)
    go.set()
    thread.join()
    assert adapt(mine) is not held
