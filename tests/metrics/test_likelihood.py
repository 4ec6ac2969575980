"""Perplexity by hand, and the ways of getting it wrong."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import prompts, tiny_model

from specbeam.errors import InputError
from specbeam.metrics.likelihood import answer_log_probabilities, next_token_logits, perplexity

CONTEXTS = [row.tolist() for row in prompts((7, 3, 12), seed=1)]
ANSWERS = [row.tolist() for row in prompts((5, 9, 1), seed=2)]


def by_hand(model, context, answer):
    """One token at a time, each with a forward of its own over everything before it."""
    values = []
    for i, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([context + answer[:i]])).logits[0, -1].double()
        values.append((logits - logits.logsumexp(0))[token].item())
    return values


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3", "gemma3-conditional"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_probabilities_are_those_of_plain_forwards_token_by_token(name, batch_size):
    model = tiny_model(name)
    scored = answer_log_probabilities(model, CONTEXTS, ANSWERS, batch_size)
    for context, answer, values in zip(CONTEXTS, ANSWERS, scored, strict=True):
        assert values == pytest.approx(by_hand(model, context, answer), abs=2e-4)


def test_perplexity_counts_every_answer_token_once():
    assert perplexity([[math.log(0.5), math.log(0.125)], [math.log(0.25)]]) == pytest.approx(4.0)
    assert perplexity([[math.log(0.5)] * 9, [math.log(0.125)]]) == pytest.approx(0.5 ** -0.9 * 0.125 ** -0.1)


def test_perplexity_of_the_models_own_greedy_answer_is_below_that_of_random_tokens():
    model, context, own = tiny_model("llama"), CONTEXTS[0], []
    for _ in range(8):
        own.append(int(next_token_logits(model, context + own).argmax()))
    scored = answer_log_probabilities(model, [context, context], [own, ANSWERS[1][:8]])
    assert perplexity(scored[:1]) < perplexity(scored[1:])


def test_the_context_is_not_scored_but_matters():
    model = tiny_model("llama")
    [values] = answer_log_probabilities(model, CONTEXTS[:1], ANSWERS[:1])
    [other] = answer_log_probabilities(model, [CONTEXTS[0][::-1]], ANSWERS[:1])
    assert len(values) == len(ANSWERS[0])
    assert values != pytest.approx(other, abs=1e-2)


def test_a_shift_by_one_token_would_be_noticed():
    model = tiny_model("llama")
    [values] = answer_log_probabilities(model, CONTEXTS[:1], ANSWERS[:1])
    shifted = by_hand(model, CONTEXTS[0][:-1], [CONTEXTS[0][-1], *ANSWERS[0][:-1]])
    assert values != pytest.approx(shifted, abs=1e-2)


def test_memory_is_bounded_by_splitting_and_the_result_is_the_same(monkeypatch):
    model = tiny_model("gpt2")
    whole = answer_log_probabilities(model, CONTEXTS, ANSWERS)
    monkeypatch.setattr("specbeam.metrics.likelihood._LOGITS_AT_ONCE", 1)
    for split, own in zip(answer_log_probabilities(model, CONTEXTS, ANSWERS), whole, strict=True):
        assert split == pytest.approx(own, abs=1e-4)


def test_empty_answers_score_nothing_and_empty_contexts_are_refused():
    model = tiny_model("llama")
    assert answer_log_probabilities(model, CONTEXTS[:1], [[]]) == [[]]
    assert perplexity([[]]) is None and perplexity([[float("-inf")]]) is None
    with pytest.raises(InputError, match="no tokens"):
        answer_log_probabilities(model, [[]], [[5]])
