"""Greedy speculative decoding gives the tokens of plain greedy decoding, whatever the draft proposes."""

from __future__ import annotations

import time

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from options import EVERY_OPTION, ROWS, settings_of, wanted
from reference import acceptance_rate, changed, generated, generated_all, good_draft, late_token, letters, model
from tiny import _BASE, EOS, NAMES, VOCABULARY, build, left_padded, prompts, tiny_model

from specbeam import InputError, acceptance, greedy_generate, speculative_generate
from specbeam.drafting.draft_model import DraftModel
from specbeam.drafting.length import Length

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:Unfeasible length")


def consistent(out, rows, draft_length):
    """What must hold of every trace; returns the proposals that became output."""
    accepted = 0
    for prompt, answer, row in zip(rows, out.hypotheses, out.trace, strict=True):
        tokens = answer[0].tokens
        assert row.prompt_tokens == len(prompt)
        assert row.first_tokens + sum(one.committed for one in row.rounds) == len(tokens)
        assert len(row.sources) == len(row.token_rounds) == len(tokens)
        assert row.sources[0] == "plain"
        assert row.token_rounds[0] == 0
        place = 1
        for number, one in enumerate(row.rounds, 1):
            new, sources = tokens[place: place + one.committed], row.sources[place: place + one.committed]
            assert row.token_rounds[place: place + one.committed] == (number,) * one.committed
            assert 0 <= one.accepted <= one.drafted == len(one.proposed) <= draft_length
            assert 1 <= one.committed <= one.accepted + 1
            assert sources[: one.accepted] == ("draft",) * one.accepted
            assert tuple(new[: one.accepted]) == one.proposed[: one.accepted]
            if one.committed > one.accepted:  # else it ended on a proposal
                assert sources[-1] == ("plain" if not one.drafted else
                                       "bonus" if one.accepted == one.drafted else "correction")
            if one is not row.rounds[-1]:
                assert one.committed == one.accepted + 1
            accepted += one.accepted
            place += one.committed
        assert place == len(tokens)
        assert row.sources.count("draft") == sum(one.accepted for one in row.rounds)
        assert row.draft_seconds is not None
        assert row.draft_seconds + row.verify_seconds <= row.decode_seconds
    return accepted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_draft_that_is_right_in_part_gives_the_tokens_of_generate(name, attention):
    target, draft = model(name, attention), good_draft(name, attention)
    options = {"max_new_tokens": 24}
    out = speculative_generate(target, draft, ROWS, **options)
    assert out.tokens == generated_all(target, ROWS, **options)
    consistent(out, ROWS, 4)
    assert 0.3 < acceptance_rate(out) < 0.95, "the draft is to be accepted in part"
    assert {source for row in out.trace for source in row.sources} == {"plain", "draft", "correction", "bonus"}


@pytest.mark.parametrize("draft_length", [1, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_any_draft_length_gives_the_tokens_of_generate(name, draft_length):
    out = speculative_generate(model(name), good_draft(name), ROWS, draft_length=draft_length, max_new_tokens=20)
    assert out.tokens == wanted(name, "nothing")
    consistent(out, ROWS, draft_length)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_other_weights_and_a_single_prompt_give_the_tokens_of_generate(name, seed):
    rows = prompts((9,), seed)
    out = speculative_generate(model(name, seed=seed), good_draft(name, seed=seed), rows, max_new_tokens=24)
    assert out.tokens == generated_all(model(name, seed=seed), rows, max_new_tokens=24)


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_that_knows_nothing_gives_the_tokens_of_generate(name):
    out = speculative_generate(model(name), model(name, seed=9), ROWS, max_new_tokens=20)
    assert out.tokens == wanted(name, "nothing")
    assert acceptance_rate(out) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_drafts_for_itself_accepts_every_proposal(name):
    out = speculative_generate(model(name), model(name), ROWS, max_new_tokens=21, eos_token_id=None)
    assert out.tokens == generated_all(model(name), ROWS, max_new_tokens=21, eos_token_id=None)
    assert acceptance_rate(out) == 1.0
    assert [len(row.rounds) for row in out.trace] == [4] * 4, "20 tokens after the first, five a round"


@pytest.mark.parametrize("draft", ["gpt2", "llama", "mistral-window", "gemma3"])
def test_the_draft_may_be_of_another_family(draft):
    out = speculative_generate(model("qwen2"), model(draft), ROWS, max_new_tokens=20)
    assert out.tokens == generated_all(model("qwen2"), ROWS, max_new_tokens=20)


@pytest.mark.parametrize("option", EVERY_OPTION)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_option_means_what_it_means_in_generate(name, option):
    out = speculative_generate(model(name), good_draft(name), ROWS, **settings_of(option))
    assert out.tokens == wanted(name, option)
    consistent(out, ROWS, 4)


def test_what_the_checkpoint_says_is_honoured_and_the_draft_is_not_asked():
    target = changed("llama", repetition_penalty=1.4, eos_token_id=[EOS, 19, 94], max_new_tokens=25)
    draft = changed("llama", repetition_penalty=9.0, eos_token_id=[5], max_new_tokens=1)
    out = speculative_generate(target, draft, ROWS)
    assert out.tokens == generated_all(target, ROWS)
    rounds = [one for row in out.trace for one in row.rounds[:-1]]  # the last may end on an EOS
    assert all(one.accepted == one.drafted for one in rounds), "the same processors shape draft and target"


@pytest.mark.parametrize("end", range(1, 12))
def test_an_eos_anywhere_in_a_round_ends_the_answer_there(end):
    """The draft is the target: the EOS is proposed, accepted, and has accepted proposals behind it."""
    target, row = model("llama"), ROWS[:1]
    whole = generated(target, row[0], max_new_tokens=20, eos_token_id=None)
    end = whole.index(whole[end])  # where the answer has this token first
    out = speculative_generate(target, target, row, max_new_tokens=20, eos_token_id=whole[end])
    assert out.tokens == [whole[: end + 1]]
    assert out.hypotheses[0][0].finish_reason == "eos"
    last = out.trace[0].rounds[-1]
    assert last.accepted == (end - 1) % 5 + (end % 5 != 0), "what lies behind the EOS was not accepted"
    consistent(out, row, 4)


@pytest.mark.parametrize("end", range(1, 12))
def test_a_stop_string_in_the_middle_of_a_round_ends_the_answer_there(end):
    target, tokenizer = model("llama"), letters()
    whole = generated(target, ROWS[0], max_new_tokens=20, eos_token_id=None)
    options = {"max_new_tokens": 20, "eos_token_id": None, "tokenizer": tokenizer,
               "stop_strings": [tokenizer.decode(whole[end - 1: end + 1])]}
    theirs = generated_all(target, ROWS, **options)
    assert len(theirs[0]) <= end + 1
    for draft in (target, good_draft("llama")):
        out = speculative_generate(target, draft, ROWS, **options)
        assert out.tokens == theirs
        assert out.hypotheses[0][0].finish_reason == "stop"
        consistent(out, ROWS, 4)


def test_rows_that_end_early_leave_and_the_others_go_on():
    target, draft = model("gemma3"), good_draft("gemma3")
    whole = generated_all(target, ROWS, max_new_tokens=24, eos_token_id=None)
    eos = [late_token(whole[0], 3), late_token(whole[2], 12)]
    out = speculative_generate(target, draft, ROWS, max_new_tokens=24, eos_token_id=eos)
    assert out.tokens == generated_all(target, ROWS, max_new_tokens=24, eos_token_id=eos)
    assert len({len(tokens) for tokens in out.tokens}) > 1
    consistent(out, ROWS, 4)


def test_a_row_accepts_by_itself_whatever_batch_it_is_in():
    together = speculative_generate(model("llama"), good_draft("llama"), ROWS, max_new_tokens=24)
    for number, row in enumerate(ROWS):
        alone = speculative_generate(model("llama"), good_draft("llama"), [row], max_new_tokens=24)
        assert alone.tokens[0] == together.tokens[number]
        assert [(one.proposed, one.accepted) for one in alone.trace[0].rounds] == [
            (one.proposed, one.accepted) for one in together.trace[number].rounds]


def test_max_length_gives_each_row_its_own_room():
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, max_length=22, eos_token_id=None)
    assert [len(tokens) for tokens in out.tokens] == [17, 3, 10, 21]
    assert out.tokens == generated_all(model("llama"), ROWS, max_length=22, eos_token_id=None)
    consistent(out, ROWS, 4)


def test_nothing_is_drafted_behind_the_last_token():
    out = speculative_generate(model("llama"), model("llama"), ROWS, max_new_tokens=4, draft_length=50,
                               eos_token_id=None)
    assert [[one.drafted for one in row.rounds] for row in out.trace] == [[2]] * 4


@pytest.mark.parametrize("width", [70, 97, 130])
def test_vocabularies_padded_to_another_width_are_no_trouble(width):
    """A draft with fewer ids never proposes the others, and reads them when the target chose them; one with more
    never proposes what the target lacks."""
    draft = build(hf.LlamaConfig(**_BASE | {"vocab_size": width}), seed=3)
    rows = [row % 60 + 3 for row in ROWS]
    out = speculative_generate(model("llama"), draft, rows, max_new_tokens=30, eos_token_id=None)
    assert out.tokens == generated_all(model("llama"), rows, max_new_tokens=30, eos_token_id=None)
    assert max(token for tokens in out.tokens for token in tokens) > 70
    proposed = [token for row in out.trace for one in row.rounds for token in one.proposed]
    assert max(proposed) < min(width, VOCABULARY)


def test_a_prompt_may_hold_ids_that_the_draft_lacks():
    draft = build(hf.LlamaConfig(**_BASE | {"vocab_size": 40}), seed=3)
    assert max(row.max() for row in ROWS) > 40
    out = speculative_generate(model("llama"), draft, ROWS, max_new_tokens=12)
    assert out.tokens == generated_all(model("llama"), ROWS, max_new_tokens=12)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), draft_length=st.integers(1, 9),
       new=st.integers(1, 25), ends=st.lists(st.integers(3, 99), max_size=4), seed=st.integers(0, 999),
       name=st.sampled_from(["llama", "gpt2", "mistral-window", "gemma3"]))
def test_any_ragged_batch_gives_what_plain_greedy_decoding_gives(lengths, draft_length, new, ends, seed, name):
    rows = prompts(tuple(lengths), seed)
    options = {"max_new_tokens": new, "eos_token_id": ends or None}
    out = speculative_generate(model(name), good_draft(name), rows, draft_length=draft_length, **options)
    assert out.tokens == greedy_generate(model(name), rows, **options).tokens
    consistent(out, rows, draft_length)


def test_a_streamer_gets_every_token_once():
    given_out: list[int] = []

    class Streamer:
        def put(self, value):
            given_out.extend(value.flatten().tolist())

        def end(self):
            given_out.append(-1)

    out = speculative_generate(model("llama"), good_draft("llama"), ROWS[:1], max_new_tokens=15, streamer=Streamer())
    assert given_out == [*ROWS[0].tolist(), *out.tokens[0], -1]


def test_both_models_are_left_padded_alike():
    ids, mask = left_padded(ROWS, pad=7)
    out = speculative_generate(model("llama"), good_draft("llama"), ids, mask, max_new_tokens=12)
    assert out.tokens == generated_all(model("llama"), ROWS, max_new_tokens=12)


@pytest.mark.parametrize("length", [0, -1, 2.0, "4", True, None])
def test_a_draft_length_that_makes_no_sense_is_refused(length):
    with pytest.raises(InputError, match=r"draft_length is .*at least 1"):
        speculative_generate(model("llama"), model("llama"), ROWS, draft_length=length)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), "1", None])
def test_a_temperature_that_makes_no_sense_is_refused(temperature):
    with pytest.raises(InputError, match="temperature is"):
        speculative_generate(model("llama"), model("llama"), ROWS, temperature=temperature)


# Negative controls.

def test_control_a_draft_whose_rejected_tokens_stay_cached_is_seen(monkeypatch):
    """It would go on from text that is not there: still exact, but hardly ever accepted."""
    options = {"max_new_tokens": 30, "eos_token_id": None}
    honest = acceptance_rate(speculative_generate(model("llama"), good_draft("llama"), ROWS, **options))
    original = DraftModel.accept
    monkeypatch.setattr(DraftModel, "accept", lambda self, paths: original(
        self, [list(range(len(numbers))) for numbers in self.numbers]))
    with pytest.raises(Exception):  # noqa: B017 - or a row has nothing left to read
        broken = speculative_generate(model("llama"), good_draft("llama"), ROWS, **options)
        assert acceptance_rate(broken) > 0.9 * honest


def test_control_a_target_that_keeps_a_wrong_proposal_is_seen(monkeypatch):
    honest = acceptance.follow

    def one_too_many(tokens, parents, best):
        path, following = honest(tokens, parents, best)
        return (path, following) if len(path) == len(tokens) else ([*path, len(path)], best[len(path) + 1])

    monkeypatch.setattr(acceptance, "follow", one_too_many)
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, max_new_tokens=20)
    assert out.tokens != generated_all(model("llama"), ROWS, max_new_tokens=20)


@pytest.mark.heavy
@pytest.mark.parametrize("option", EVERY_OPTION)
@pytest.mark.parametrize("draft_length", [1, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_every_option_with_every_model_and_draft_length(name, draft_length, option):
    out = speculative_generate(model(name), good_draft(name), ROWS, draft_length=draft_length, **settings_of(option))
    assert out.tokens == wanted(name, option)


@pytest.mark.heavy
def test_bf16_differs_only_where_the_two_best_logits_are_nearly_equal():
    target = tiny_model("llama").to(torch.bfloat16)
    rows = prompts((9, 5, 14), seed=4)
    plain = greedy_generate(target, rows, max_new_tokens=60, eos_token_id=None).tokens
    fast = speculative_generate(target, target, rows, max_new_tokens=60, eos_token_id=None).tokens
    for row, ours, theirs in zip(rows, fast, plain, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if place is not None:
            ids = torch.tensor([[*row.tolist(), *ours[:place]]])
            logits = target(ids).logits[0, -1].float()
            assert logits.topk(2).values.diff().abs() < 0.02 * logits.abs().max()


def test_what_auto_decides_when_an_answer_ends_is_not_its_time(monkeypatch):
    monkeypatch.setattr(Length, "ends", lambda self: time.sleep(1.0))
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS[:1], draft_length="auto", max_new_tokens=2)
    assert out.trace[0].decode_seconds < 1.0
