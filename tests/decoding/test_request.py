"""What the caller asks for is settled once: prompts in any form, options by name, one sentence for what cannot be."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from options import ROWS
from reference import changed, generated, letters, model, right_padded
from refusals import refusal
from tiny import EOS, left_padded, prompts

from specbeam import (
    InputError,
    beam_generate,
    greedy_generate,
    sample_generate,
    speculative_beam_generate,
    speculative_generate,
    stochastic_beam_generate,
)
from specbeam.decoding.request import prompt_rows, settle

WANTED = [row.tolist() for row in ROWS]


def speculated(target, rows, mask=None, **options):
    return speculative_generate(target, target, rows, mask, **options)


METHODS = pytest.mark.parametrize("method", [greedy_generate, sample_generate, speculated, beam_generate],
                                  ids=["greedy", "sample", "speculative", "beam"])


# Prompts.

@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("padded", [left_padded, right_padded], ids=["left", "right"])
def test_padded_rows_lose_their_padding(padded, dtype, mask_dtype):
    ids, mask = padded(ROWS, pad=77)
    assert prompt_rows(ids.to(dtype), mask.to(mask_dtype)) == WANTED


@pytest.mark.parametrize("given", [
    ROWS, tuple(ROWS), WANTED, [row[None] for row in ROWS], [row.numpy() for row in ROWS],
    [row.int() for row in ROWS],
], ids=["tensors", "tuple", "lists", "rows of shape [1, n]", "arrays", "int32"])
def test_a_list_of_prompts_needs_no_mask(given):
    assert prompt_rows(given, None) == WANTED


def test_without_a_mask_every_token_counts():
    assert prompt_rows(torch.tensor([[0, 0, 5]]), None) == [[0, 0, 5]]


@pytest.mark.parametrize("ids, mask, sentence", [
    (torch.zeros(0, 5).long(), None, "no rows"), ([], None, "no rows"),
    (torch.tensor([5, 6, 7]), None, r"shape \(3,\)"), (torch.zeros(1, 1, 3).long(), None, r"shape \(1, 1, 3\)"),
    (torch.ones(2, 3).long(), torch.ones(2, 4), r"attention_mask has shape \(2, 4\)"),
    (torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]), "prompt 1 of 2 has no tokens"),
    ([[5, 6], []], None, "prompt 1 of 2 has no tokens"), ([torch.tensor([]).long()], None, "prompt 0 of 1"),
    ([5, 6, 7], None, "one sequence of token ids per prompt"), (["hello"], None, "text goes through the tokenizer"),
    ([[5, 6], [7]], torch.ones(2, 2), "attention_mask was given with a list"),
    (torch.tensor([[5, 101]]), None, "token id 101"), (torch.tensor([[5, -1]]), None, "token id -1"),
    (torch.tensor([[5.0, 6.0]]), None, "token id 5.0"),
])
@METHODS
def test_prompts_that_make_no_sense_are_refused_in_one_sentence(method, ids, mask, sentence):
    options = {"temperature": 1.0} if method is sample_generate else {}
    with pytest.raises(InputError, match=sentence) as error:
        method(model("llama"), ids, mask, max_new_tokens=2, **options)
    assert "\n" not in str(error.value)


@METHODS
def test_a_prompt_of_one_token_is_enough(method):
    assert len(method(model("llama"), prompts((1,)), max_new_tokens=3, eos_token_id=None).tokens[0]) == 3


# Options.

@pytest.mark.parametrize("options, sentence", [
    ({"max_new_token": 5}, "'max_new_token'; did you mean 'max_new_tokens'"),
    ({"repitition_penalty": 1.1}, "did you mean 'repetition_penalty'"),
    ({"eos_token": 2}, "did you mean 'eos_token_id'"), ({"zzz": 1}, "options are those of transformers"),
    ({"do_sample": True}, "do_sample is not an option"), ({"do_sample": False}, "do_sample is not an option"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": -3}, "max_new_tokens"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"), ({"max_new_tokens": "8"}, "transformers does not take"),
    ({"max_new_tokens": None, "max_length": 12}, "max_length is 12, but the prompt alone has 19 tokens"),
    ({"eos_token_id": 101}, "eos_token_id=101 is not a token"), ({"eos_token_id": [2, -1]}, "eos_token_id=-1"),
    ({"repetition_penalty": 0.0}, "penalty"), ({"stop_strings": ["a"]}, "needs tokenizer"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported"), ({"penalty_alpha": 0.6}, "penalty_alpha"),
    ({"use_cache": False}, "use_cache"), ({"cache_implementation": "static"}, "cache_implementation"),
    ({"output_scores": True}, "output_scores"), ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ({"num_assistant_tokens": 5}, "num_assistant_tokens"), ({"dola_layers": "low"}, "dola_layers"),
    ({"token_healing": True}, "token_healing"), ({"constraints": [1]}, "constraints"),
], ids=lambda one: str(one)[:40])
def test_an_option_that_cannot_be_honoured_is_refused_never_ignored(options, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        greedy_generate(model("llama"), ROWS, **{"max_new_tokens": 2} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [greedy_generate, sample_generate, speculated])
@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_beams_belong_to_beam_search(method, name):
    with pytest.raises(InputError, match=f"{name}=4 belongs to beam search"):
        method(model("llama"), ROWS, max_new_tokens=2, **{name: 4})
    method(model("llama"), ROWS, max_new_tokens=2, **{name: 1})


@pytest.mark.parametrize("setting", [{"guidance_scale": 1.5}, {"penalty_alpha": 0.6}, {"token_healing": True}], ids=str)
def test_what_a_checkpoint_asks_for_and_would_change_the_output_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        greedy_generate(changed("llama", **setting), ROWS, max_new_tokens=2)


def test_what_would_not_change_the_output_is_taken():
    out = greedy_generate(model("llama"), ROWS, max_new_tokens=3, guidance_scale=1.0, use_cache=True, low_memory=False,
                          return_dict_in_generate=True, output_scores=False)
    assert out.tokens == greedy_generate(model("llama"), ROWS, max_new_tokens=3).tokens


@METHODS
def test_a_streamer_takes_one_prompt(method):
    with pytest.raises(InputError, match="streamer was given"):
        method(model("llama"), ROWS, max_new_tokens=2, streamer=hf.TextStreamer(letters()))


@pytest.mark.parametrize("seed, sentence", [
    ([1, 2], "seed has 2 entries for 4 prompts"), (None, "seed is None"), (1.5, "seed is 1.5"), ("1", "seed is '1'"),
    (2**64, "whole number of 64 bits"), ([1, 2, 3, None], "seed is None"),
])
def test_a_seed_is_a_number_or_one_per_row(seed, sentence):
    with pytest.raises(InputError, match=sentence):
        sample_generate(model("llama"), ROWS, max_new_tokens=2, seed=seed)


# What a request holds.

def test_each_row_has_its_own_room():
    request = settle(model("llama"), ROWS, None, sampled=False, max_length=22)
    assert [row.max_new_tokens for row in request.rows] == [17, 3, 10, 21]
    assert [row.prompt for row in request.rows] == WANTED


def test_without_any_length_twenty_new_tokens_or_what_the_context_leaves():
    request = settle(model("gpt2"), prompts((7, 40, 250)), None, sampled=False)
    assert [row.max_new_tokens for row in request.rows] == [20, 20, 6]


@pytest.mark.parametrize("given, ends", [(None, set()), (7, {7}), ([7, 8], {7, 8})])
def test_the_ends_are_the_callers(given, ends):
    assert settle(model("llama"), ROWS, None, sampled=False, eos_token_id=given).eos == ends


def test_the_ends_are_the_checkpoints_when_the_caller_says_nothing():
    assert settle(changed("llama", eos_token_id=[EOS, 9]), ROWS, None, sampled=False).eos == {EOS, 9}


def test_sampling_processors_are_there_only_where_it_samples():
    target = changed("llama", temperature=0.5, top_k=7, repetition_penalty=1.2)
    greedy = settle(target, ROWS, None, sampled=False).rows[0].processors
    sampled = settle(target, ROWS, None, sampled=True).rows[0].processors
    assert [type(one).__name__ for one in greedy] == ["RepetitionPenaltyLogitsProcessor"]
    assert [type(one).__name__ for one in sampled] == ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper",
                                                      "TopKLogitsWarper"]


def test_rows_of_one_length_share_their_processors_unless_the_caller_brought_some():
    rows = prompts((5, 5, 6))
    shared = settle(model("llama"), rows, None, sampled=False, min_new_tokens=3).rows
    assert shared[0].processors is shared[1].processors
    assert shared[0].processors is not shared[2].processors
    own = settle(model("llama"), rows, None, sampled=False, prefix_allowed_tokens_fn=lambda row, ids: [3]).rows
    assert own[0].processors is not own[1].processors


# A trie of answers allows nothing behind a text that left it or ended. Proposals go there; answers do not.

TOLD = torch.tensor([10, 11, 12, 13, 14, 20, 21, 10, 11, 12, 13, 14, 30])
TRIE = [[10, 11, 12, 13, EOS], [10, 11, 12, 50, 51, 52, EOS], [60, 61, EOS]]
DRAFTED = {
    "looked up": {"drafter": "prompt_lookup"}, "a chain": {}, "a tree": {"branching": [3, 2, 2, 1]},
    "a grown tree": {"tree_nodes": 12}, "recycled": {"drafter": "token_recycling"}, "auto": {"draft_length": "auto"},
    "in part early": {"drafter": "early_exit"},
}


def within(answers: list[list[int]]):
    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        said = ids[len(TOLD):].tolist()
        return sorted({answer[len(said)] for answer in answers
                       if answer[: len(said)] == said and len(answer) > len(said)})

    return allowed


@pytest.mark.parametrize("drafted", DRAFTED)
@pytest.mark.parametrize("seed", range(3))
def test_a_proposal_that_a_trie_does_not_allow_is_only_rejected(drafted, seed):
    target = model("llama", seed=seed)
    options = {"max_new_tokens": 12, "prefix_allowed_tokens_fn": within(TRIE)}
    wanted = generated(target, TOLD, **options)
    assert wanted in TRIE
    assert greedy_generate(target, [TOLD] * 2, **options).tokens == [wanted] * 2
    out = speculative_generate(target, target, [TOLD] * 2, **DRAFTED[drafted], **options)
    assert out.tokens == [wanted] * 2
    drawn = speculative_generate(target, target, [TOLD] * 20, temperature=3.0, **DRAFTED[drafted], **options).tokens
    assert all(answer in TRIE for answer in drawn) and len({tuple(answer) for answer in drawn}) > 1


def test_chains_are_judged_as_a_block_there_too():
    drawn = speculative_generate(model("llama"), model("llama", seed=1), [TOLD] * 50, temperature=3.0,
                                 acceptance="block", max_new_tokens=12, prefix_allowed_tokens_fn=within(TRIE)).tokens
    assert all(answer in TRIE for answer in drawn)


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_that_a_trie_has_no_room_for_do_not_count(num_beams):
    options = {"max_new_tokens": 12, "prefix_allowed_tokens_fn": within(TRIE), "num_beams": num_beams}
    target = model("llama")
    wanted = beam_generate(target, [TOLD], **options)
    assert wanted.tokens[0] in TRIE
    out = speculative_beam_generate(target, target, [TOLD], **options)
    assert out.tokens == wanted.tokens
    assert out.hypotheses[0][0].score == pytest.approx(wanted.hypotheses[0][0].score, rel=1e-5)


@pytest.mark.parametrize("generate", [
    greedy_generate, sample_generate, speculated, beam_generate, stochastic_beam_generate],
    ids=["greedy", "sample", "speculative", "beam", "stochastic"])
def test_an_answer_that_gets_where_nothing_is_allowed_is_refused_in_one_sentence(generate):
    dead = [[10, 11, 12, 13]] * 2
    sentence = refusal(generate, model("llama"), [TOLD], max_new_tokens=12, prefix_allowed_tokens_fn=within(dead))
    assert "allows nothing after 4 new tokens (the last are [11, 12, 13])" in sentence


def test_settling_leaves_the_checkpoints_defaults_alone():
    target = changed("llama", repetition_penalty=1.3)
    before = target.generation_config.to_dict()
    given = hf.GenerationConfig(max_new_tokens=4, num_beams=3)
    settle(target, ROWS, None, sampled=True, generation_config=given)
    assert target.generation_config.to_dict() == before
    assert (given.num_beams, given.do_sample) == (3, None)
