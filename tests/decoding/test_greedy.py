"""Greedy decoding gives each row of a batch the tokens that `transformers.generate` gives its prompt alone."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from options import EVERY_OPTION, ROWS, settings_of, wanted
from reference import changed, generated, generated_all, late_token, letters, model, right_padded
from tiny import EOS, NAMES, left_padded, prompts

from specbeam import greedy_generate
from specbeam.sampling import process

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:Unfeasible length")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_gives_the_tokens_of_each_prompt_alone(name, attention):
    theirs = generated_all(model(name, attention), ROWS, max_new_tokens=24)
    assert len(set(map(tuple, theirs))) == 4, "answers that all look alike prove little"
    assert greedy_generate(model(name, attention), ROWS, max_new_tokens=24).tokens == theirs


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_other_weights_and_prompts_give_the_tokens_of_generate_too(name, seed):
    rows = prompts((9, 4), seed)
    assert greedy_generate(model(name, seed=seed), rows, max_new_tokens=24).tokens == generated_all(
        model(name, seed=seed), rows, max_new_tokens=24)


@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "gemma3"])
def test_padding_on_the_left_on_the_right_or_none_is_the_same_batch(name):
    from_list = greedy_generate(model(name), ROWS, max_new_tokens=12).tokens
    for ids, mask in (left_padded(ROWS, pad=7), right_padded(ROWS, pad=7)):
        for given in (mask, mask.bool(), mask.float()):
            assert greedy_generate(model(name), ids.int(), given, max_new_tokens=12).tokens == from_list


@pytest.mark.parametrize("option", EVERY_OPTION)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_option_means_what_it_means_in_generate(name, option):
    assert greedy_generate(model(name), ROWS, **settings_of(option)).tokens == wanted(name, option)


@pytest.mark.parametrize("defaults", [
    {"repetition_penalty": 1.4}, {"eos_token_id": [EOS, 19, 94, 7]}, {"max_length": 26}, {"max_new_tokens": 7},
    {"suppress_tokens": list(range(30, 99))}, {"do_sample": True, "temperature": 3.0, "top_k": 3},
    {"cache_implementation": "hybrid"},
], ids=str)
def test_what_the_checkpoint_says_is_honoured_and_the_caller_overrules_it(defaults):
    target = changed("llama", **defaults)
    assert greedy_generate(target, ROWS).tokens == generated_all(target, ROWS)
    over = {"repetition_penalty": 1.1, "eos_token_id": 5, "max_new_tokens": 9}
    assert greedy_generate(target, ROWS, **over).tokens == generated_all(target, ROWS, **over)


def test_beams_that_the_checkpoint_asks_for_are_not_used_here():
    target = changed("llama", num_beams=4, num_return_sequences=2)
    options = {"max_new_tokens": 8, "prefix_allowed_tokens_fn": lambda row, ids: list(range(10, 60))}
    assert greedy_generate(target, ROWS, **options).tokens == generated_all(model("llama"), ROWS, **options)


def test_a_whole_generation_config_is_taken_too():
    config = hf.GenerationConfig(max_new_tokens=9, repetition_penalty=1.5, eos_token_id=[19, 94])
    theirs = generated_all(model("llama"), ROWS, generation_config=config, pad_token_id=0)
    assert greedy_generate(model("llama"), ROWS, generation_config=config).tokens == theirs


def test_prefix_allowed_tokens_fn_is_told_the_row_of_the_batch():
    out = greedy_generate(model("llama"), ROWS, max_new_tokens=4, eos_token_id=None,
                          prefix_allowed_tokens_fn=lambda row, ids: [10 + row])
    assert out.tokens == [[10 + row] * 4 for row in range(4)]


def test_a_row_that_ends_early_does_not_change_the_others():
    whole = generated_all(model("mistral-window"), ROWS, max_new_tokens=24, eos_token_id=None)
    eos = late_token(whole[1], 6)
    out = greedy_generate(model("mistral-window"), ROWS, max_new_tokens=24, eos_token_id=eos)
    assert out.tokens == generated_all(model("mistral-window"), ROWS, max_new_tokens=24, eos_token_id=eos)
    assert out.tokens[1][-1] == eos, "the end-of-text token belongs to the answer"
    reasons = [row[0].finish_reason for row in out.hypotheses]
    assert reasons[1] == "eos"
    assert "length" in reasons


def test_a_stop_string_ends_the_answer_where_generate_ends_it():
    tokenizer = letters()
    whole = generated(model("llama"), ROWS[0], max_new_tokens=24, eos_token_id=None)
    stop = tokenizer.decode(whole[8:11])
    options = {"max_new_tokens": 24, "eos_token_id": None, "stop_strings": [stop, "no such text"],
               "tokenizer": tokenizer}
    out = greedy_generate(model("llama"), ROWS, **options)
    assert out.tokens == generated_all(model("llama"), ROWS, **options)
    assert out.tokens[0] == whole[:11]
    assert [row[0].finish_reason for row in out.hypotheses] == ["stop", "length", "length", "length"]


def test_an_eos_that_is_also_the_last_token_is_an_eos():
    first = generated(model("llama"), ROWS[0], max_new_tokens=1)[0]
    out = greedy_generate(model("llama"), ROWS[:1], max_new_tokens=1, eos_token_id=first)
    assert out.hypotheses[0][0].finish_reason == "eos"


class Collected:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.given, self.ended = [], 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_what_generate_would_give_it():
    ours, theirs = Collected(), Collected()
    greedy_generate(model("llama"), ROWS[:1], max_new_tokens=8, streamer=ours)
    generated(model("llama"), ROWS[0], max_new_tokens=8, streamer=theirs)
    assert ours.given == theirs.given
    assert ours.ended == theirs.ended == 1


def test_the_trace_says_what_happened():
    eos = late_token(generated(model("llama"), ROWS[2], max_new_tokens=12, eos_token_id=None), 4)
    out = greedy_generate(model("llama"), ROWS, max_new_tokens=12, eos_token_id=eos)
    for prompt, tokens, row in zip(ROWS, out.tokens, out.trace, strict=True):
        assert row.prompt_tokens == len(prompt)
        assert row.first_tokens == 1
        assert len(row.rounds) == len(tokens) - 1
        assert row.first_tokens + sum(one.committed for one in row.rounds) == len(tokens)
        assert all((one.drafted, one.accepted, one.proposed) == (0, 0, ()) for one in row.rounds)
        assert row.sources == ("plain",) * len(tokens)
        assert row.token_rounds == tuple(range(len(tokens)))
        assert row.prefill_seconds > 0
        assert 0 < row.verify_seconds <= row.decode_seconds
        assert row.draft_seconds is None
        assert sum(one.seconds for one in row.rounds) <= row.decode_seconds
    assert len({row.decode_seconds for row in out.trace}) == 1, "the batch's, the same in each row"


def test_nothing_of_the_model_is_changed():
    target = changed("llama", repetition_penalty=1.2, eos_token_id=[EOS, 94])
    before = target.generation_config.to_dict()
    greedy_generate(target, ROWS, max_new_tokens=5, no_repeat_ngram_size=2)
    assert target.generation_config.to_dict() == before
    assert not [name for name in vars(target.generation_config) if name.startswith("_") and "tensor" in name]


def test_a_subclass_of_a_known_processor_is_given_the_history():
    """It may look at it, although its parent does not."""
    class Avoids(hf.TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
            return scores

    chosen = [hf.LogitsProcessorList([Avoids(1.0)])]
    scores = process(torch.zeros(1, 2, 5), chosen, lambda row, node: [[1, 3], [1, 4]][node])
    assert scores[0].isinf().nonzero().tolist() == [[0, 3], [1, 4]]


def test_control_the_comparison_sees_a_batch_that_is_padded_without_its_mask():
    """Left padding that a method takes for text changes the answers."""
    ids, mask = left_padded(ROWS, pad=7)
    right = greedy_generate(model("llama"), ids, mask, max_new_tokens=12).tokens
    assert greedy_generate(model("llama"), ids, max_new_tokens=12).tokens != right


def test_control_each_of_the_options_changes_an_answer():
    """Else equality with generate would be no proof that it was honoured."""
    same = {option for option in EVERY_OPTION if wanted("llama", option) == wanted("llama", "nothing")}
    assert same <= {"nothing", "the default length", "no EOS"}


@pytest.mark.heavy
@pytest.mark.parametrize("option", EVERY_OPTION)
@pytest.mark.parametrize("name", NAMES)
def test_every_option_with_every_model(name, option):
    assert greedy_generate(model(name), ROWS, **settings_of(option)).tokens == wanted(name, option)
