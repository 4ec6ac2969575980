"""transformers' generate as a peer: its own tokens, an honest clock, and nothing left changed behind it."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import EOS, left_padded, prompts, tiny_draft, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specbeam.baselines.transformers_generate import (
    transformers_assisted,
    transformers_beam,
    transformers_greedy,
    transformers_sample,
)
from specbeam.errors import InputError

ROWS = prompts((9, 5, 12))
IDS, MASK = left_padded(ROWS)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> PreTrainedModel:
    return tiny_draft(target)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny vocabulary: one character a token."""
    names = [f"<{i}>" for i in range(10)] + [chr(35 + i) for i in range(91)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<0>")


def generated(target: PreTrainedModel, row: torch.Tensor, **options) -> list[int]:
    """One prompt alone, straight through transformers."""
    out = target.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)
    return out[0, len(row):].tolist()


def pick_eos(tokens: list[int], earliest: int) -> int:
    """A token that this answer has at `earliest` or later but not before, to be declared an EOS."""
    return next(token for i, token in enumerate(tokens) if i >= earliest and token not in tokens[:i])


def test_greedy_gives_each_prompt_the_tokens_that_generate_gives_it_alone(target):
    out = transformers_greedy(target, IDS, MASK, max_new_tokens=10)
    assert out.tokens == [generated(target, row, do_sample=False, max_new_tokens=10) for row in ROWS]
    assert [t.prompt_tokens for t in out.trace] == [9, 5, 12]


def test_left_padding_right_padding_and_a_list_of_tensors_are_the_same_input(target):
    right_ids = torch.stack([torch.nn.functional.pad(row, (0, 12 - len(row))) for row in ROWS])
    right_mask = torch.stack([(torch.arange(12) < len(row)).long() for row in ROWS])
    left = transformers_greedy(target, IDS, MASK, max_new_tokens=6).tokens
    assert transformers_greedy(target, right_ids, right_mask, max_new_tokens=6).tokens == left
    assert transformers_greedy(target, ROWS, max_new_tokens=6).tokens == left


def test_tokens_end_with_the_first_of_several_eos_ids_and_without_padding(target):
    plain = transformers_greedy(target, IDS, MASK, max_new_tokens=10).tokens
    eos = [pick_eos(plain[0], 3), plain[1][0]]
    out = transformers_greedy(target, IDS, MASK, max_new_tokens=10, eos_token_id=eos, pad_token_id=eos[0])
    ends = [next((i for i, token in enumerate(row) if token in eos), 9) for row in plain]
    assert out.tokens == [row[:end + 1] for row, end in zip(plain, ends, strict=True)]
    assert [row[0].finish_reason for row in out.hypotheses] == [
        "eos" if row[-1] in eos else "length" for row in out.tokens]
    assert len(out.tokens[1]) == 1 and out.trace[1].rounds == ()


def test_every_plain_token_but_the_first_is_a_round_and_prefill_is_none(target):
    out = transformers_greedy(target, IDS, MASK, max_new_tokens=7)
    for tokens, trace in zip(out.tokens, out.trace, strict=True):
        assert trace.first_tokens == 1 and len(trace.rounds) == len(tokens) - 1
        assert trace.token_rounds == tuple(range(len(tokens))) and set(trace.sources) == {"plain"}
        assert all(one.drafted == 0 and one.committed == 1 and one.seconds > 0 for one in trace.rounds)
        assert trace.prefill_seconds > 0
        assert sum(one.seconds for one in trace.rounds) <= trace.decode_seconds


def test_assisted_greedy_gives_the_greedy_tokens_row_by_row(target, draft):
    plain = transformers_greedy(target, IDS, MASK, max_new_tokens=20).tokens
    out = transformers_assisted(target, draft, IDS, MASK, max_new_tokens=20, draft_length=3)
    assert out.tokens == plain
    assert len({t.prefill_seconds for t in out.trace}) == 3, "each row has seconds of its own"


def test_assisted_rounds_account_for_every_token(target, draft):
    out = transformers_assisted(target, draft, IDS, MASK, max_new_tokens=24, draft_length=4)
    assert any(one.accepted < one.drafted for t in out.trace for one in t.rounds), "the draft must also be wrong"
    assert any(one.accepted > 0 for t in out.trace for one in t.rounds), "and also be right"
    for tokens, trace in zip(out.tokens, out.trace, strict=True):
        assert trace.first_tokens + sum(one.committed for one in trace.rounds) == len(tokens)
        done = trace.first_tokens
        for one in trace.rounds:
            ended = tokens[done + one.committed - 1] == EOS and one.committed == one.accepted
            assert one.drafted == len(one.proposed) <= 4 and (ended or one.committed == one.accepted + 1)
            assert list(one.proposed[:one.accepted]) == tokens[done:done + one.accepted]
            if one.accepted < one.drafted:
                assert one.proposed[one.accepted] != tokens[done + one.accepted]
            done += one.committed
        assert len(trace.sources) == len(trace.token_rounds) == len(tokens)
        assert trace.sources.count("draft") >= sum(one.accepted for one in trace.rounds)
        assert 0 < trace.draft_seconds + trace.verify_seconds <= trace.decode_seconds


def test_the_draft_length_is_kept_and_the_draft_is_left_as_it_was(target):
    draft = tiny_draft(target, noise=0.0)
    before = draft.generation_config.to_dict()
    out = transformers_assisted(target, draft, ROWS[:1], max_new_tokens=19, draft_length=2)
    assert [one.drafted for one in out.trace[0].rounds] == [2] * 5 + [0]  # 3 + 5 × 3 + 1 tokens
    assert out.trace[0].first_tokens == 3 and out.trace[0].sources[-1] == "plain"
    assert draft.generation_config.to_dict() == before


def test_a_model_that_drafts_for_itself_is_accepted_throughout(target):
    out = transformers_assisted(target, target, ROWS[:1], max_new_tokens=16, draft_length=4)
    assert out.tokens[0] == generated(target, ROWS[0], do_sample=False, max_new_tokens=16)
    assert all(one.accepted == one.drafted for one in out.trace[0].rounds)


def test_an_accepted_eos_ends_an_assisted_answer_without_a_bonus_token(target):
    draft = tiny_draft(target, noise=0.0)
    plain = generated(target, ROWS[0], do_sample=False, max_new_tokens=10)
    out = transformers_assisted(target, draft, ROWS[:1], max_new_tokens=10, draft_length=3,
                                eos_token_id=(eos := pick_eos(plain, 4)))
    assert out.tokens[0] == plain[:plain.index(eos) + 1] and out.hypotheses[0][0].finish_reason == "eos"
    last = out.trace[0].rounds[-1]
    ended_by_draft = (len(out.tokens[0]) % 4) != 0  # each round brings 3 drafted tokens and a bonus
    assert last.committed == last.accepted + (not ended_by_draft)
    assert out.trace[0].sources[-1] == ("draft" if ended_by_draft else "bonus")


def test_assisted_sampling_is_repeatable_and_changes_with_the_seed(target, draft):
    def tokens(seed):
        return transformers_assisted(target, draft, ROWS, max_new_tokens=12, temperature=1.0, seed=seed).tokens
    assert tokens(3) == tokens(3) != tokens(4)


def test_beams_are_generates_hypotheses_with_scores_and_ancestry(target):
    out = transformers_beam(target, IDS, MASK, num_beams=3, num_return_sequences=2, max_new_tokens=8)
    for row, hypotheses, trace in zip(ROWS, out.hypotheses, out.trace, strict=True):
        alone = target.generate(row[None], attention_mask=torch.ones_like(row[None]), num_beams=3, do_sample=False,
                                num_return_sequences=2, max_new_tokens=8, output_scores=True,
                                return_dict_in_generate=True)
        for i, hypothesis in enumerate(hypotheses):
            expected = alone.sequences[i, len(row):].tolist()
            assert hypothesis.tokens == expected[:len(hypothesis.tokens)]
            assert hypothesis.score == pytest.approx(alone.sequences_scores[i].item(), abs=1e-4)
            assert hypothesis.beams is not None and len(hypothesis.beams) == len(hypothesis.tokens)
            assert set(hypothesis.beams) <= {0, 1, 2} and hypothesis.beams[0] == 0
        assert len(trace.sources) == len(hypotheses[0].tokens)


def test_beams_that_end_early_carry_no_padding(target):
    plain = transformers_beam(target, IDS, MASK, num_beams=2, max_new_tokens=8).tokens
    eos = [row[4] for row in plain]
    out = transformers_beam(target, IDS, MASK, num_beams=2, max_new_tokens=8, eos_token_id=eos, pad_token_id=eos[0],
                            num_return_sequences=2)
    for hypothesis in (one for row in out.hypotheses for one in row):
        assert not set(hypothesis.tokens[:-1]) & set(eos)
        assert hypothesis.finish_reason == ("eos" if hypothesis.tokens[-1] in eos else "length")


def test_one_beam_is_greedy_decoding(target):
    greedy = transformers_greedy(target, IDS, MASK, max_new_tokens=6).tokens
    assert transformers_beam(target, IDS, MASK, num_beams=1, max_new_tokens=6).tokens == greedy


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(target):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    out = transformers_sample(target, IDS, MASK, max_new_tokens=8, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert out.tokens == transformers_sample(target, IDS, MASK, max_new_tokens=8, seed=[5, 6, 7]).tokens
    assert out.tokens != transformers_sample(target, IDS, MASK, max_new_tokens=8, seed=6).tokens
    assert out.tokens != transformers_greedy(target, IDS, MASK, max_new_tokens=8).tokens


def test_several_samples_of_a_prompt_are_its_hypotheses(target):
    out = transformers_sample(target, IDS, MASK, max_new_tokens=5, num_return_sequences=2)
    assert [len(row) for row in out.hypotheses] == [2, 2, 2]
    assert out.hypotheses[0][0].tokens != out.hypotheses[0][1].tokens


@pytest.mark.parametrize("method", ["greedy", "assisted"])
def test_a_stop_string_ends_the_row_and_says_so(method, target, letters):
    plain = transformers_greedy(target, IDS, MASK, max_new_tokens=10).tokens
    stop = letters.convert_ids_to_tokens(plain[0][4])
    options = {"max_new_tokens": 10, "stop_strings": [stop], "tokenizer": letters, "eos_token_id": None}
    if method == "greedy":
        out = transformers_greedy(target, IDS, MASK, **options)
    else:
        out = transformers_assisted(target, tiny_draft(target, 0.5), IDS, MASK, draft_length=1, **options)
    assert stop in letters.decode(out.tokens[0])
    assert out.tokens[0] == plain[0][:len(out.tokens[0])] and len(out.tokens[0]) < 10
    assert out.hypotheses[0][0].finish_reason == "stop"


def test_unset_options_are_the_checkpoints_and_set_ones_win(target):
    kept = target.generation_config.to_dict()
    try:
        target.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=0.3, max_length=999)
        own = transformers_greedy(target, ROWS[:1], max_new_tokens=12).tokens[0]
        assert own == generated(target, ROWS[0], do_sample=False, max_new_tokens=12)
        given = transformers_greedy(target, ROWS[:1], max_new_tokens=12, repetition_penalty=1.0).tokens[0]
        assert given == generated(target, ROWS[0], do_sample=False, max_new_tokens=12, repetition_penalty=1.0)
        assert own != given
    finally:
        target.generation_config.update(**{k: kept.get(k) for k in (
            "repetition_penalty", "do_sample", "temperature", "max_length")})


def test_transformers_says_nothing(target, draft, caplog, recwarn):
    logging.getLogger("transformers").addHandler(caplog.handler)
    target.generation_config.max_length = 99
    try:
        transformers_greedy(target, IDS, None, max_new_tokens=3, temperature=0.5, pad_token_id=EOS)
        transformers_assisted(target, draft, IDS, MASK, max_new_tokens=3)
        transformers_beam(target, IDS, MASK, max_new_tokens=3)
        transformers_sample(target, IDS, MASK, max_new_tokens=3)
    finally:
        target.generation_config.max_length = None
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == "" and not recwarn.list


@pytest.mark.parametrize(("options", "sentence"), [
    ({"max_new_tokns": 3}, "did you mean 'max_new_tokens'"),
    ({"do_sample": True}, "the method says it"),
    ({"stop_strings": ["x"]}, "needs tokenizer"),
])
def test_bad_options_get_one_sentence(options, sentence, target):
    with pytest.raises(InputError, match=sentence):
        transformers_greedy(target, IDS, MASK, **options)


def test_assisted_refuses_draft_length_zero_and_logits_of_another_width(target):
    with pytest.raises(InputError, match="at least 1"):
        transformers_assisted(target, target, IDS, MASK, draft_length=0)
    other = tiny_draft(target)
    other.config.vocab_size = 64
    with pytest.raises(InputError, match="101 logits and the draft 64"):
        transformers_assisted(target, other, IDS, MASK)
