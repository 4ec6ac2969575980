"""The recipe's own decoding of thousands of rows gives generate's answers, and draws from the model's softmax."""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import pair_answers as answers
import pair_data as data
from pair_evaluation import encode_chat
from pair_sampler import Sampler

BUNDLED = Path(str(files("specbeam"))) / "bundled" / "target"
TEXTS = ["What is 47 + 38?", "Translate English to German: I like tea.", "Do you like movies?", "What is 2 x 3?",
         "Translate to English: Der Zug nach Berlin ist heute sehr voll und kommt zu spät an."]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    return [encode_chat(tokenizer, text) for text in TEXTS]


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "with pads in sight they differ"])
def test_greedy_answers_are_generates_also_when_rows_make_room_for_others(model, prompts, planted, monkeypatch):
    moves = []
    move = Sampler._move
    monkeypatch.setattr(Sampler, "_move", lambda *given: moves.append(len(given[1])) or move(*given))
    if planted:
        read = Sampler._read
        monkeypatch.setattr(Sampler, "_read", lambda self, ids: (self.starts.zero_(), read(self, ids)))
    wanted = answers.answer_prompts(model, prompts, 32)
    found = Sampler(model, 8, 96).answer(prompts, np.zeros(len(prompts)), 32)
    same = [ours.tolist() == theirs.tolist() for ours, theirs in zip(found, wanted, strict=True)]
    assert all(same) != planted
    assert planted or moves


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_answers_are_draws_from_the_softmax_at_their_temperature(model, prompts, temperature):
    torch.manual_seed(0)
    prompt, draws = prompts[2], 400
    whole = Sampler(model, 512, 64).answer([prompt] * draws, np.full(draws, temperature), 2)
    with torch.no_grad():
        p = (model(torch.from_numpy(prompt)[None]).logits[0, -1] / temperature).softmax(-1)
    counts = np.bincount([row[len(prompt)] for row in whole], minlength=len(p)) / draws
    assert 0.5 * np.abs(counts - p.numpy()).sum() < 0.5 * np.sqrt(p.numpy() * (1 - p.numpy()) / draws).sum() + 0.05


def test_prompts_of_a_source_differ_and_end_where_the_model_takes_over():
    chat = [data.BEGIN_ID, data.USER_ID, 50, data.END_ID, data.ASSISTANT_ID, 60, data.END_ID]
    corpus = data.corpus_of([("chat", chat), ("chat", chat), ("prose", [data.BEGIN_ID, *range(10, 1200), data.END_ID])])
    chosen = answers.choose_prompts([corpus], 1000, seed=0)
    assert [prompt.tolist() for prompt in chosen["chat"]] == [chat[:5]]
    assert len(chosen["prose"]) > 1 and all(prompt[0] == data.BEGIN_ID for prompt in chosen["prose"])
    assert all(16 <= len(prompt) <= 97 for prompt in chosen["prose"])
    asked, temperatures = answers.plan_answers(chosen, enough=5)
    assert len(asked) == len(temperatures) == 5 + 3 * len(chosen["prose"])
    assert (temperatures == 0).sum() == sum(map(len, chosen.values()))
