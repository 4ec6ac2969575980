"""Stochastic beam search draws answers without replacement, and its weights make unbiased estimates.

Against brute force: the law of all answers of a tiny vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict

import pytest
import torch
import transformers as hf
from law import same_law
from options import ROWS
from planted import mutated
from reference import model
from tiny import EOS, build

from specbeam import InputError, sample_generate, stochastic_beam_generate
from specbeam.decoding import stochastic_beam

END, STEPS, DRAWS = 4, 3, 2000
PROMPT = torch.tensor([1, 2, 0, 3])
Answer = tuple[int, ...]


@pytest.fixture(scope="module")
def five() -> hf.PreTrainedModel:
    """A target of five tokens, of which 4 ends an answer."""
    return build(hf.LlamaConfig(
        vocab_size=5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=END,
        pad_token_id=0))


@torch.no_grad()
def law_of(target, steps: int = STEPS, temperature: float = 1.0) -> dict[Answer, float]:
    """Probability of every answer: ended by END, or cut off after `steps` tokens."""
    running, ended = {(): 1.0}, {}
    for _ in range(steps):
        after = {}
        for answer, before in running.items():
            ids = torch.cat([PROMPT, torch.tensor(answer, dtype=torch.long)])[None]
            p = (target(ids).logits[0, -1].double() / temperature).softmax(-1).tolist()
            for token, one in enumerate(p):
                (ended if token == END else after)[(*answer, token)] = before * one
        running = after
    return ended | running


@functools.cache
def drawn(target, width: int, count: int = DRAWS, generate=stochastic_beam_generate, **options):
    """The answers of `count` rows, each with its own seed."""
    rows = []
    for start in range(0, count, 250):
        out = generate(target, [PROMPT] * 250, num_beams=width, max_new_tokens=STEPS,
                       seed=list(range(start, start + 250)), **{"top_k": 0} | options)
        rows += out.hypotheses
    return rows


def without_replacement(law: dict[Answer, float]) -> dict[tuple[Answer, Answer], float]:
    """The law of the first two drawn, in order."""
    return {(a, b): p * q / (1 - p) for a, p in law.items() for b, q in law.items() if a != b}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_law_of_sampling_without_replacement(five, temperature):
    law = law_of(five, temperature=temperature)
    rows = drawn(five, 3, temperature=temperature)
    pairs = Counter((tuple(row[0].tokens), tuple(row[1].tokens)) for row in rows)
    assert same_law(pairs, without_replacement(law))
    assert all(len({tuple(one.tokens) for one in row}) == 3 for row in rows)
    for one in (one for row in rows[:300] for one in row):
        assert math.exp(one.score) == pytest.approx(law[tuple(one.tokens)], rel=1e-4)


def test_how_often_an_answer_is_among_the_drawn(five):
    """Inclusion probabilities for three draws, worked out over all ordered triples."""
    law = law_of(five)
    expected: defaultdict[Answer, float] = defaultdict(float)
    for a, p in law.items():
        for b, q in law.items():
            if b != a:
                for c, r in law.items():
                    if c not in (a, b):
                        chance = p * q / (1 - p) * r / (1 - p - q)
                        for one in (a, b, c):
                            expected[one] += chance
    rows = drawn(five, 3)
    seen = Counter(tuple(one.tokens) for row in rows for one in row)
    for answer, p in expected.items():
        if p * len(rows) >= 5:
            assert abs(seen[answer] / len(rows) - p) < 4.5 * math.sqrt(p * (1 - p) / len(rows)), answer


def estimates(rows, value) -> tuple[float, float]:
    """Mean of the estimates and its standard error."""
    each = torch.tensor([sum(one.weight * value(one.tokens) for one in row) for row in rows], dtype=torch.float64)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


VALUES = [lambda ids: 1.0, len, lambda ids: float(ids[0] == 0), lambda ids: (sum(ids) - 3) ** 2]


@pytest.mark.parametrize("value", VALUES, ids=["one", "length", "first token", "a square"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_weighted_sum_is_an_unbiased_estimate(five, width, value):
    expected = sum(p * value(answer) for answer, p in law_of(five).items())
    mean, error = estimates(drawn(five, width), value)
    assert abs(mean - expected) < 4 * error


def test_fewer_returned_answers_have_their_own_threshold_and_weigh_as_much(five):
    expected = sum(p * len(answer) for answer, p in law_of(five).items())
    mean, error = estimates(drawn(five, 4, num_return_sequences=2), len)
    assert abs(mean - expected) < 4 * error


def test_a_distribution_with_fewer_answers_than_beams_is_drawn_whole(five):
    row = stochastic_beam_generate(
        five, [PROMPT], num_beams=40, max_new_tokens=2, top_k=0).hypotheses[0]
    law = law_of(five, steps=2)
    assert {tuple(one.tokens) for one in row} == set(law)
    assert all(one.threshold == -math.inf and one.inclusion == 1 for one in row)
    assert sum(one.weight for one in row) == pytest.approx(1.0)


@pytest.mark.parametrize("right, wrong", [
    ("torch.where(below > -0.693, (-below.expm1()).log(), (-below.exp()).log1p())", "0.0"),
    ("return largest - v.clamp(min=0) - (-v.abs()).exp().log1p()", "return noisy"),
], ids=["half of the condition", "children do not know their parent's noise"])
def test_control_a_wrong_condition_is_seen(five, monkeypatch, right, wrong):
    monkeypatch.setattr(stochastic_beam, "conditioned", mutated(stochastic_beam, "conditioned", right, wrong))
    law = law_of(five)
    rows = drawn.__wrapped__(five, 3)
    pairs = Counter((tuple(row[0].tokens), tuple(row[1].tokens)) for row in rows)
    mean, error = estimates(rows, lambda ids: 1.0)
    assert not same_law(pairs, without_replacement(law)) or abs(mean - 1) > 4 * error


def test_control_a_root_without_noise_makes_biased_estimates(five, monkeypatch):
    """The paper's algorithm 1: right for the draws, not for the threshold."""
    monkeypatch.setattr(stochastic_beam, "stochastic_beam_generate", mutated(
        stochastic_beam, "stochastic_beam_generate", "[0.0, *empty], [noise, *empty]", "[0.0, *empty], [0.0, *empty]"))
    rows = drawn(five, 2, generate=stochastic_beam.stochastic_beam_generate)
    assert same_law(Counter((tuple(row[0].tokens), tuple(row[1].tokens)) for row in rows),
                    without_replacement(law_of(five)))
    mean, error = estimates(rows, lambda ids: 1.0)
    assert abs(mean - 1) > 4 * error


def test_a_row_depends_on_its_seed_and_not_on_its_batch():
    options = {"num_beams": 5, "max_new_tokens": 8, "eos_token_id": [EOS, *range(40, 60)], "repetition_penalty": 1.2}
    together = stochastic_beam_generate(model("gemma3"), ROWS, seed=7, **options)
    for number, row in enumerate(ROWS):
        alone = stochastic_beam_generate(model("gemma3"), [row], seed=7 + number, **options)
        assert [one.tokens for one in alone.hypotheses[0]] == [one.tokens for one in together.hypotheses[number]]
        assert [one.score for one in alone.hypotheses[0]] == pytest.approx(
            [one.score for one in together.hypotheses[number]], rel=1e-4)


def test_the_law_is_that_of_plain_sampling_with_the_same_options(five):
    options = {"temperature": 0.8, "top_k": 3, "repetition_penalty": 1.5}
    rows = drawn(five, 1, **options)
    plain = Counter(tuple(tokens) for start in range(0, DRAWS, 250) for tokens in sample_generate(
        five, [PROMPT] * 250, max_new_tokens=STEPS, seed=list(range(start, start + 250)), **options).tokens)
    one_of = {tuple(row[0].tokens): math.exp(row[0].score) for row in rows}
    assert same_law(plain, one_of) and same_law(Counter(tuple(row[0].tokens) for row in rows), one_of)


def test_rare_answers_weigh_what_they_should():
    one = stochastic_beam.Draw([1], -900.0, "eos", (0,), 2.0, -1.0)
    assert one.weight == pytest.approx(math.exp(-1.0))
    assert stochastic_beam.Draw([1], -0.1, "eos", (0,), 2.0, -900.0).weight == pytest.approx(math.exp(-0.1))


@pytest.mark.parametrize("wrong, sentence", [
    ({"length_penalty": 1.0}, "length_penalty has no effect"), ({"early_stopping": True}, "early_stopping has no eff"),
    ({"num_return_sequences": 9}, "num_return_sequences is 9 and num_beams 4"), ({"num_beams": 0}, "num_beams is 0"),
    ({"trace": 2}, "trace is 2"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        stochastic_beam_generate(model("llama"), ROWS, **{"max_new_tokens": 4} | wrong)
    assert "\n" not in str(error.value)
