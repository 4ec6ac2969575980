"""Beam search gives transformers' hypotheses: their tokens, their order, their scores and their ancestry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import HONOURED, ROWS
from planted import mutated
from reference import changed, letters, model
from tiny import EOS, NAMES, VOCABULARY, left_padded, prompts
from transformers import LogitsProcessor, LogitsProcessorList

from specbeam import InputError, beam_generate, greedy_generate
from specbeam.decoding import beam as beam_module
from specbeam.engine.support import adapt
from specbeam.engine.tree import TokenTree
from specbeam.trace import Hypothesis

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:Unfeasible length")
MANY_ENDS = list(range(40, 60))  # so that hypotheses end at many places


def transformers_beams(target, prompt, num_beams, returned, **options):
    """(tokens, score, beam of origin of each token) of each hypothesis of `generate`, one prompt alone."""
    options = {"do_sample": False, "pad_token_id": 0} | options
    out = target.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), num_beams=num_beams,
                          num_return_sequences=returned, return_dict_in_generate=True, output_scores=True, **options)
    found = []
    for sequence, score, origins in zip(out.sequences, out.sequences_scores, out.beam_indices, strict=True):
        length = int((origins >= 0).sum())
        found.append((sequence[len(prompt): len(prompt) + length].tolist(), float(score),
                      tuple(origins[:length].tolist())))
    return found


def assert_same(ours: list[Hypothesis], theirs) -> None:
    assert [one.tokens for one in ours] == [tokens for tokens, _, _ in theirs]
    assert [one.beams for one in ours] == [origins for _, _, origins in theirs]
    for one, (_, score, _) in zip(ours, theirs, strict=True):
        assert one.score == pytest.approx(score, rel=1e-4)


def compare(target, rows, num_beams, returned, **options):
    out = beam_generate(target, rows, num_beams=num_beams, num_return_sequences=returned, **options)
    for row, ours in zip(rows, out.hypotheses, strict=True):
        assert_same(ours, transformers_beams(target, row, num_beams, returned, **options))
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_gives_the_hypotheses_of_each_prompt_alone(name, attention):
    compare(model(name, attention), ROWS, 4, 4, max_new_tokens=12, eos_token_id=MANY_ENDS)


@pytest.mark.parametrize("num_beams", [2, 8])
@pytest.mark.parametrize("name", NAMES)
def test_any_width_gives_the_hypotheses_of_generate(name, num_beams):
    compare(model(name, seed=1), ROWS[:2], num_beams, num_beams, max_new_tokens=12, eos_token_id=[EOS, 40, 50])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0, 2.0])
def test_length_penalty_and_early_stopping_are_those_of_transformers(length_penalty, early_stopping):
    for ends in (MANY_ENDS, [EOS], None):
        compare(model("llama"), ROWS, 4, 3, max_new_tokens=14, eos_token_id=ends, length_penalty=length_penalty,
                early_stopping=early_stopping)


@pytest.mark.parametrize("option", [name for name, given in HONOURED.items() if "eos_token_id" not in given])
def test_a_processor_or_criterion_means_what_it_means_in_generate(option):
    options = {"max_new_tokens": 10, "eos_token_id": MANY_ENDS} | HONOURED[option]
    if options["max_new_tokens"] == 1:
        options["eos_token_id"] = EOS
    compare(model("llama"), ROWS[:3], 3, 2, **options)


def test_a_stop_string_ends_a_hypothesis():
    tokenizer = letters()
    best = beam_generate(model("llama"), ROWS[:1], num_beams=4, max_new_tokens=12, eos_token_id=None).tokens[0]
    stop = tokenizer.decode(best[5:6])
    out = compare(model("llama"), ROWS[:2], 4, 4, max_new_tokens=12, eos_token_id=None, stop_strings=[stop, "A"],
                  tokenizer=tokenizer)
    assert "stop" in {one.finish_reason for one in out.hypotheses[0]}


class Rounded(LogitsProcessor):
    """Log-probabilities in quarters: scores tie at every step, exactly."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (scores * 4).round() / 4


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_ties_among_the_running_and_the_finished_end_as_in_generate(length_penalty):
    for seed in range(40):
        compare(model("llama"), prompts((5, 9), seed), 4, 4, max_new_tokens=20, eos_token_id=[EOS, 40, 50],
                length_penalty=length_penalty, logits_processor=LogitsProcessorList([Rounded()]))


@settings(derandomize=True, max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), width=st.integers(2, 6), data=st.data(),
       new=st.integers(1, 12), penalty=st.sampled_from([0.0, 0.7, 1.0, -1.0, 2.0]),
       early=st.sampled_from([False, True, "never"]), ends=st.lists(st.integers(3, 99), max_size=12, unique=True),
       name=st.sampled_from(["llama", "gpt2", "mistral-window", "gemma3"]))
def test_any_search_gives_the_hypotheses_of_generate(lengths, width, data, new, penalty, early, ends, name):
    returned = data.draw(st.integers(1, width))
    compare(model(name), prompts(tuple(lengths), seed=new), width, returned, max_new_tokens=new,
            eos_token_id=ends or None, length_penalty=penalty, early_stopping=early)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), width=st.integers(2, 5), seed=st.integers(0, 999),
       new=st.integers(1, 14), penalty=st.sampled_from([0.0, 1.0, -1.5, 3.0]),
       early=st.sampled_from([False, True, "never"]), ends=st.lists(st.integers(3, 99), max_size=20, unique=True),
       stops=st.lists(st.integers(5, 90), max_size=6, unique=True), quarters=st.booleans(),
       repetition=st.sampled_from([None, 0.7, 1.4]))
def test_any_ends_stops_ties_and_histories_together_give_the_hypotheses_of_generate(
        lengths, width, seed, new, penalty, early, ends, stops, quarters, repetition):
    """With a search tree or without."""
    tokenizer, rows = letters(), prompts(tuple(lengths), seed)
    options = {"max_new_tokens": new, "eos_token_id": ends or None, "length_penalty": penalty, "early_stopping": early,
               "repetition_penalty": repetition}
    if stops:
        options |= {"stop_strings": [tokenizer.decode([token]) for token in stops], "tokenizer": tokenizer}
    if quarters:
        options["logits_processor"] = LogitsProcessorList([Rounded()])
    out = compare(model("llama", seed=seed % 3), rows, width, width, **options)
    watched = beam_generate(model("llama", seed=seed % 3), rows, num_beams=width, num_return_sequences=width,
                            trace=True, **options)
    assert watched.hypotheses == out.hypotheses
    for found, tree in zip(watched.hypotheses, watched.search, strict=True):
        for number, one in enumerate(one for one in found if one.tokens):
            path = [tree.steps[step].candidates[place] for step, place in tree.path(number)]
            assert [candidate.token for candidate in path] == one.tokens
            assert path[-1].finished_score == one.score


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_width_1_is_greedy_decoding(name):
    one = beam_generate(model(name), ROWS, num_beams=1, max_new_tokens=16)
    assert one.tokens == greedy_generate(model(name), ROWS, max_new_tokens=16).tokens


def test_width_1_is_greedy_decoding_where_the_checkpoint_asks_for_beams_too():
    target = changed("llama", num_beams=4, length_penalty=2.0)
    one = beam_generate(target, ROWS, num_beams=1, max_new_tokens=16)
    assert one.tokens == greedy_generate(model("llama"), ROWS, max_new_tokens=16).tokens


def test_what_the_checkpoint_says_is_honoured():
    target = changed("llama", length_penalty=-1.0, early_stopping=True, eos_token_id=MANY_ENDS, max_new_tokens=11,
                     repetition_penalty=1.3)
    compare(target, ROWS, 3, 3)


def test_padding_on_the_left_is_no_part_of_a_prompt():
    ids, mask = left_padded(ROWS, pad=9)
    padded = beam_generate(model("llama"), ids, mask, num_beams=3, max_new_tokens=8)
    assert padded.hypotheses == beam_generate(model("llama"), ROWS, num_beams=3, max_new_tokens=8).hypotheses


def test_hypotheses_come_best_first_and_fewer_are_a_prefix_of_more():
    options = {"num_beams": 6, "max_new_tokens": 10, "eos_token_id": MANY_ENDS}
    all_six = beam_generate(model("llama"), ROWS, num_return_sequences=6, **options)
    two = beam_generate(model("llama"), ROWS, num_return_sequences=2, **options)
    for six, first in zip(all_six.hypotheses, two.hypotheses, strict=True):
        scores = [one.score for one in six]
        assert scores == sorted(scores, reverse=True)
        assert first == six[:2]
    assert all_six.tokens == [row[0].tokens for row in all_six.hypotheses]


def test_a_score_is_the_sum_of_log_probabilities_with_its_penalty():
    """Against the model alone, not against another search."""
    target = model("llama")
    out = beam_generate(target, ROWS, num_beams=4, num_return_sequences=4, max_new_tokens=9, eos_token_id=MANY_ENDS,
                        length_penalty=0.5)
    for row, found in zip(ROWS, out.hypotheses, strict=True):
        for one in found:
            ids = torch.tensor([[*row.tolist(), *one.tokens]])
            with torch.no_grad():
                logs = target(ids).logits[0].log_softmax(-1)
            total = sum(float(logs[len(row) - 1 + i, token]) for i, token in enumerate(one.tokens))
            assert one.score == pytest.approx(total / len(one.tokens) ** 0.5, rel=1e-4)


def test_a_finish_reason_says_what_ended_the_hypothesis():
    out = beam_generate(model("llama"), ROWS, num_beams=4, num_return_sequences=4, max_new_tokens=9,
                        eos_token_id=MANY_ENDS)
    for one in (one for row in out.hypotheses for one in row):
        assert (one.finish_reason == "eos") == (one.tokens[-1] in MANY_ENDS)
        assert not set(one.tokens[:-1]) & set(MANY_ENDS)
        if one.finish_reason == "length":
            assert len(one.tokens) == 9


def test_the_trace_has_one_round_per_step():
    out = beam_generate(model("llama"), ROWS, num_beams=4, max_new_tokens=9, eos_token_id=None)
    for row, tokens in zip(out.trace, out.tokens, strict=True):
        assert len(tokens) == 9
        assert row.first_tokens == 1
        assert row.first_tokens + sum(one.committed for one in row.rounds) == 9
        assert row.sources == ("plain",) * 9
        assert row.token_rounds == tuple(range(9))
        assert row.verify_seconds <= row.decode_seconds


def test_a_prompt_is_stored_once_for_all_its_beams(monkeypatch):
    """Eight beams of eight steps below a prompt of 40: far fewer slots than eight copies of it."""
    seen = []
    original = TokenTree.__init__
    monkeypatch.setattr(TokenTree, "__init__",
                        lambda self, *args, **named: (seen.append(self), original(self, *args, **named))[1])
    beam_generate(model("llama"), prompts((40,)), num_beams=8, max_new_tokens=8, eos_token_id=None)
    assert seen[0].high <= 40 + 8 * 8
    assert len(seen[0].cache.rows) == 1


def test_many_more_beams_than_the_first_step_can_fill():
    """Width 40 of 101 tokens."""
    compare(model("llama"), ROWS[:1], 40, 40, max_new_tokens=4, eos_token_id=None)


@pytest.mark.parametrize("options, sentence", [
    ({"num_beams": 0}, "num_beams is 0"), ({"num_beams": 2.0}, "num_beams is 2.0"), ({"num_beams": True}, "num_beams"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3 and num_beams 2"),
    ({"num_beams": 2, "num_return_sequences": 0}, "num_return_sequences is 0"),
    ({"num_return_sequences": "2"}, "num_return_sequences is '2' .* give a whole number"),
    ({"num_return_sequences": None}, "num_return_sequences is None"),
    ({"num_return_sequences": 2.5}, "num_return_sequences is 2.5"),
    ({"num_return_sequences": True}, "num_return_sequences is True"),
    ({"length_penalty": "x"}, "length_penalty is 'x': give a number from -100 to 100"),
    ({"length_penalty": 2000}, "length_penalty is 2000"), ({"length_penalty": -1000.0}, "length_penalty is -1000.0"),
    ({"length_penalty": float("nan")}, "length_penalty is nan"), ({"length_penalty": True}, "length_penalty is True"),
    ({"length_penalty": 95.0, "max_new_tokens": 2000}, "length_penalty is 95.0: give a number from -92 to 92"),
    ({"early_stopping": "sometimes"}, "early_stopping"), ({"streamer": "any"}, "streamer was given to beam search"),
    ({"do_sample": True}, "do_sample is not an option"), ({"num_beam_groups": 2}, "num_beam_groups"),
    ({"force_words_ids": [[5]]}, "force_words_ids"), ({"lenght_penalty": 1.0}, "did you mean 'length_penalty'"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        beam_generate(model("llama"), ROWS, **{"max_new_tokens": 4} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length_penalty", [-100, 100, 2])
def test_the_largest_length_penalties_run(length_penalty):
    out = beam_generate(model("llama"), ROWS, num_beams=3, max_new_tokens=12, length_penalty=length_penalty)
    assert len(out.tokens) == len(ROWS)


# Negative controls: the comparison sees a search that is nearly right.

def _worse(monkeypatch: pytest.MonkeyPatch, **options) -> None:
    with pytest.raises(AssertionError):
        compare(model("llama"), ROWS, 4, 4, max_new_tokens=12, eos_token_id=MANY_ENDS, **options)


def test_control_beams_that_follow_the_wrong_parent_are_seen(monkeypatch):
    adapt(model("llama"))  # whose own probe would see it first
    original = TokenTree.extend

    def crossed(self, tips, block, last_only=False):
        if not last_only:
            block = beam_module.leaves(block.tokens, block.tip.flip(1))
        return original(self, tips, block, last_only)

    monkeypatch.setattr(TokenTree, "extend", crossed)
    _worse(monkeypatch)


def test_control_a_pool_that_takes_spare_candidates_is_seen(monkeypatch):
    """Only the first `num_beams` of a step's candidates may end."""
    monkeypatch.setattr(beam_module, "_pools", mutated(beam_module, "_pools", "enters[:, width:] = False", "pass"))
    _worse(monkeypatch)


def test_control_another_length_penalty_is_seen(monkeypatch):
    original = beam_module.ranking
    monkeypatch.setattr(beam_module, "ranking", lambda request: replace(
        original(request), length_penalty=0.9))
    _worse(monkeypatch)


@pytest.mark.heavy
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_grid(name, num_beams, length_penalty, early_stopping):
    for seed, ends in enumerate((MANY_ENDS, [EOS, *range(3, VOCABULARY, 9)])):
        compare(model(name, seed=seed), prompts((5, 9, 2), seed), num_beams, num_beams, max_new_tokens=12,
                eos_token_id=ends, length_penalty=length_penalty, early_stopping=early_stopping)
