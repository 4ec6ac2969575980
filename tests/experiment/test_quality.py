"""Figures of quality, from rows made by hand and tiny models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from refusals import refusal
from test_statistics import METHODS, failed, row
from tiny import prompts as token_rows
from tiny import tiny_model

from specbeam.experiment.prompts import Prompt
from specbeam.experiment.quality import (
    METRICS,
    Answer,
    add_quality,
    check_evaluator,
    check_metrics,
    evaluator_of,
    measure,
)
from specbeam.models import load_model


def answer(text="a b c", tokens=(1, 2, 3), references=(), category=None, logs=(-1.0, -2.0), evaluated=None):
    return Answer(text, tuple(tokens), tuple(references), category, tuple(logs), evaluated)


def test_quality_is_that_of_the_first_repeat_that_succeeded_and_equal_answers_are_scored_once(monkeypatch):
    target, [context, answer, other] = tiny_model("llama"), [r.tolist() for r in token_rows((5, 4, 4))]
    rows = [failed("greedy", "a"), row("greedy", "a", repeat=1, tokens=answer, text="The cat sat on the mat."),
            row("speculative", "a", tokens=answer, text="The cat sat on the mat."),
            row("transformers_greedy", "a", tokens=other, text="No.")]
    read = {(m, "a", 0): {"input_ids": context, "text": "", "references": ["The cat sat on the mat."]} for m in METHODS}
    from specbeam.metrics import likelihood
    scored = []
    honest = likelihood.answer_log_probabilities
    monkeypatch.setattr(likelihood, "answer_log_probabilities", lambda model, contexts, answers: (
        scored.append(len(answers)), honest(model, contexts, answers))[1])
    quality = add_quality(rows, read, target, METHODS)
    assert scored == [2]
    assert quality["greedy"]["perplexity"] == quality["speculative"]["perplexity"]
    [logs] = honest(target, [context], [answer])
    assert quality["greedy"]["perplexity"] == pytest.approx(math.exp(-sum(logs) / 4))
    assert quality["greedy"]["bleu"] == pytest.approx(100) and quality["greedy"]["bleu_signature"]
    assert quality["transformers_greedy"]["bleu"] < 10
    gap = quality["transformers_greedy"]["logit_gaps"]["greedy"]
    assert gap["differences"] == 1 and gap["largest"] > 0
    assert quality["speculative"]["logit_gaps"] == {"transformers_greedy": gap}


def test_quality_without_references_or_rows_is_none():
    read = {("greedy", "a", 0): {"input_ids": [5, 6], "text": "", "references": []}}
    quality = add_quality([row("greedy", "a"), failed("speculative", "a")], read, tiny_model("llama"), METHODS)
    assert quality["greedy"]["bleu"] is None and quality["greedy"]["perplexity"] > 0
    assert quality["speculative"]["perplexity"] is None


def test_every_turn_and_every_category_counts():
    read = {("greedy", prompt, turn): {"input_ids": [5, 6], "references": [], "category": category}
            for prompt, turn, category in (("a", 0, "chat"), ("a", 1, "chat"), ("b", 0, "maths"))}
    rows = [row("greedy", prompt, turn=turn, tokens=[7] * (turn + 2)) for _, prompt, turn in read]
    quality = add_quality(rows, read, tiny_model("llama"), METHODS)["greedy"]["quality"]
    assert quality["overall"]["tokens"]["count"] == 3 and quality["overall"]["tokens"]["value"] == pytest.approx(7 / 3)
    assert quality["categories"]["chat"]["tokens"]["value"] == pytest.approx(2.5)
    assert quality["categories"]["maths"]["tokens"] == {"value": 2.0, "low": None, "high": None, "count": 1}
    assert quality["overall"]["tokens"]["low"] <= 7 / 3 <= quality["overall"]["tokens"]["high"]


def test_perplexity_is_per_token_and_its_interval_that_of_answers():
    found = measure([answer(logs=[math.log(0.5)] * 3), answer(logs=[math.log(0.25)])], ["perplexity"])
    assert found["perplexity"].value == pytest.approx(0.5 ** -0.75 * 0.25 ** -0.25)
    assert found["perplexity"].low == pytest.approx(2) and found["perplexity"].high == pytest.approx(4)
    assert found["mean_log_probability"].value == pytest.approx(-math.log(found["perplexity"].value))


def test_null_measures_what_applies_and_a_list_just_that():
    plain = measure([answer()])
    assert "bleu" not in plain and "exact_match" not in plain and "evaluator_perplexity" not in plain
    assert {"perplexity", "distinct_1", "longest_repeated_span", "tokens", "words"} <= set(plain)
    assert set(measure([answer(references=["a b c"])], ["chrf"])) == {"chrf"}
    assert measure([answer(evaluated=(-8 * math.log(2),), text="eight b.")])["evaluator_bits_per_byte"].value == 1.0


def test_an_evaluator_scores_the_answers_tokens_only_by_its_own_template_and_tokens(tmp_path: Path):
    model, tokenizer = load_model(make_checkpoint("gpt2", tmp_path / "judge"), device="cpu")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    [logs] = evaluator_of(model, tokenizer, None)([("Say a word.", " a fox")])
    context = tokenizer("user: Say a word.\nanswer:", add_special_tokens=False)["input_ids"]
    own = tokenizer(" a fox", add_special_tokens=False)["input_ids"]
    by_hand = []
    for i, token in enumerate(own):
        with torch.no_grad():
            scores = model(torch.tensor([context + own[:i]])).logits[0, -1].double().log_softmax(-1)
        by_hand.append(scores[token].item())
    assert logs == pytest.approx(by_hand, abs=1e-4)
    [with_system] = evaluator_of(model, tokenizer, "Be brief.")([("Say a word.", " a fox")])
    assert with_system != pytest.approx(logs, abs=1e-4), "the system prompt is part of what is read"
    assert evaluator_of(model, tokenizer, None)([("Say a word.", "")]) == [[]]


def test_metrics_that_cannot_be_worked_out_are_refused():
    without, words = [Prompt("a", ("Hello",))], [Prompt("a", ("Hello",), references=(("Hi",),))]
    solved = [Prompt("a", ("6 × 7?",), references=(("6 × 7 = 42 #### 42",),))]
    for name in ("bleu", "chrf", "rouge", "exact_match"):
        assert "none of the 1 prompts has a reference" in refusal(check_metrics, [name], without)
    assert "number as its reference" in refusal(check_metrics, ["exact_match"], words)
    assert "did you mean bleu" in refusal(check_metrics, ["blue"], words)
    assert "give a list" in refusal(check_metrics, 5, words)
    assert check_metrics(None, without) is None and check_metrics("chrf", words) == ("chrf",)
    assert check_metrics(["exact_match", "length"], solved) == ("exact_match", "length")
    assert set(METRICS) >= set(check_metrics(["perplexity", "repetition"], without))
    assert "evaluator is 3" in refusal(check_evaluator, 3)
