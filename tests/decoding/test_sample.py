"""Sampling: seeded, each row by itself, shaped by transformers' processors. The distribution itself is proved in
test_distribution.py."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from options import ROWS
from reference import changed, good_draft, letters, model
from tiny import _BASE, EOS, build, prompts

from specbeam import InputError, greedy_generate, sample_generate, speculative_generate

OPTIONS = {"max_new_tokens": 15, "temperature": 0.8, "top_k": 20, "top_p": 0.9}


def speculated(target, rows, **options):
    return speculative_generate(target, good_draft("llama"), rows, draft_length=3, **options)


BOTH = pytest.mark.parametrize("method", [sample_generate, speculated], ids=["sample", "speculative"])


@BOTH
def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(method):
    first = method(model("llama"), ROWS, seed=5, **OPTIONS).tokens
    assert method(model("llama"), ROWS, seed=5, **OPTIONS).tokens == first
    assert method(model("llama"), ROWS, seed=6, **OPTIONS).tokens != first


@BOTH
def test_a_row_draws_the_same_tokens_whatever_batch_it_is_in(method):
    together = method(model("llama"), ROWS, seed=[40, 41, 42, 43], **OPTIONS).tokens
    for number, row in enumerate(ROWS):
        assert method(model("llama"), [row], seed=40 + number, **OPTIONS).tokens == [together[number]]
    backwards = method(model("llama"), ROWS[::-1], seed=[43, 42, 41, 40], **OPTIONS).tokens
    assert backwards == together[::-1]


@BOTH
def test_one_seed_counts_up_over_the_rows(method):
    assert method(model("llama"), ROWS, seed=7, **OPTIONS).tokens == method(
        model("llama"), ROWS, seed=[7, 8, 9, 10], **OPTIONS).tokens
    equal = method(model("llama"), [ROWS[0]] * 4, seed=7, **OPTIONS).tokens
    assert len(set(map(tuple, equal))) > 1, "equal prompts of a batch draw different answers"


@BOTH
def test_the_global_generator_is_neither_used_nor_moved(method):
    torch.manual_seed(0)
    first, state = method(model("llama"), ROWS, seed=1, **OPTIONS).tokens, torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert method(model("llama"), ROWS, seed=1, **OPTIONS).tokens == first


@BOTH
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_one_candidate_is_greedy_decoding(method, name):
    greedy = greedy_generate(model(name), ROWS, max_new_tokens=15).tokens
    assert method(model(name), ROWS, max_new_tokens=15, temperature=1.0, top_k=1).tokens == greedy


@BOTH
def test_only_what_the_processors_leave_is_drawn(method):
    out = method(model("llama"), ROWS, max_new_tokens=40, temperature=3.0, top_k=0, eos_token_id=None,
                 suppress_tokens=list(range(30)), no_repeat_ngram_size=1)
    for prompt, tokens in zip(ROWS, out.tokens, strict=True):
        assert min(tokens) >= 30
        assert not set(tokens) & set(prompt.tolist())
        assert len(set(tokens)) == 40


@BOTH
def test_what_is_left_unset_comes_from_the_checkpoint_and_then_from_transformers(method):
    asked = {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.2, "max_new_tokens": 15}
    target = changed("llama", do_sample=True, **asked)
    # speculative_generate has a temperature of its own: 0, greedy, unless the caller says otherwise
    said = {"temperature": 0.7} if method is speculated else {}
    assert method(target, ROWS, seed=3, **said).tokens == method(model("llama"), ROWS, seed=3, **asked).tokens
    plain = {"max_new_tokens": 15, "temperature": 1.0}
    assert method(model("llama"), ROWS, seed=3, **plain).tokens == method(
        model("llama"), ROWS, seed=3, top_k=50, **plain).tokens


@BOTH
def test_an_answer_ends_at_an_eos_a_stop_string_or_its_length(method):
    out = method(model("llama"), prompts((4,) * 12), max_new_tokens=12, temperature=2.0, top_k=0,
                 eos_token_id=[EOS, 60], stop_strings=["K", "T", "e"], tokenizer=letters())
    seen = set()
    for row in out.hypotheses:
        tokens, reason = row[0].tokens, row[0].finish_reason
        seen.add(reason)
        text = letters().decode(tokens)
        assert (reason == "eos") == (tokens[-1] in (EOS, 60))
        assert (reason == "stop") == (text[-1:] in ("K", "T", "e") and reason != "eos")
        assert not {EOS, 60} & set(tokens[:-1])
        assert (reason == "length") == (len(tokens) == 12 and reason not in ("eos", "stop"))
    assert len(seen) > 1


def test_speculation_of_the_target_by_itself_accepts_nearly_everything():
    out = speculative_generate(model("llama"), model("llama"), ROWS, max_new_tokens=31, temperature=1.0, top_k=0,
                               eos_token_id=None, draft_length=5)
    rounds = [one for row in out.trace for one in row.rounds]
    assert sum(one.accepted for one in rounds) >= 0.98 * sum(one.drafted for one in rounds)
    for tokens, row in zip(out.tokens, out.trace, strict=True):
        assert row.first_tokens + sum(one.committed for one in row.rounds) == len(tokens) == 31


def test_the_trace_of_sampled_speculation_is_consistent():
    out = speculated(model("llama"), ROWS, max_new_tokens=20, temperature=1.0)
    for tokens, row in zip(out.tokens, out.trace, strict=True):
        assert row.first_tokens + sum(one.committed for one in row.rounds) == len(tokens) == len(row.sources)
        assert row.sources.count("draft") == sum(one.accepted for one in row.rounds)


@pytest.mark.parametrize("width", [70, 130])
@pytest.mark.parametrize("top_k", [0, 5])
def test_drafts_of_another_width_sample_too(width, top_k):
    draft = build(hf.LlamaConfig(**_BASE | {"vocab_size": width}), seed=3)
    out = speculative_generate(model("llama"), draft, ROWS, max_new_tokens=20, temperature=1.0, top_k=top_k,
                               eos_token_id=None)
    assert all(0 <= token < 101 for tokens in out.tokens for token in tokens)
    if not top_k:
        assert max(token for tokens in out.tokens for token in tokens) >= 70, "ids that the draft lacks are drawn too"


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_of_zero_is_said_to_be_greedy_decoding(temperature):
    with pytest.raises(InputError, match="temperature is"):
        sample_generate(model("llama"), ROWS, temperature=temperature)


@BOTH
def test_options_that_leave_no_token_are_an_error_not_a_token(method):
    with pytest.raises(InputError, match="no token to draw"):
        method(model("llama"), ROWS, max_new_tokens=3, temperature=1.0, suppress_tokens=list(range(101)))
