"""The bundled pair: small enough to ship, loads as any checkpoint, and does what its card says."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BUNDLED = Path(str(files("specbeam"))) / "bundled"
PROMPTS = [json.loads(line) for line in (BUNDLED / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED / "target")


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32) for name in MODELS}


MODELS = ("target", "draft")


def test_every_file_is_under_16_megabytes_and_the_pair_under_64():
    sizes = [path.stat().st_size for name in MODELS for path in (BUNDLED / name).rglob("*")]
    assert max(sizes) < 16e6
    assert sum(sizes) < 64e6


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_stored_in_bf16_and_stop_at_the_end_token(name, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / name)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer) == 8192


def test_draft_and_target_have_the_same_tokenizer_and_the_draft_is_a_quarter_of_the_size(models):
    read = [json.loads((BUNDLED / name / "tokenizer.json").read_text(encoding="utf-8")) for name in MODELS]
    assert read[0] == read[1]
    sizes = {name: model.num_parameters() for name, model in models.items()}
    assert 4 * sizes["draft"] < sizes["target"] < 25e6


def test_the_chat_template_has_a_system_role_several_turns_and_a_generation_prompt(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello. "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "How are you?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello.<|end|><|assistant|>Hi!<|end|>"
        "<|user|>How are you?<|end|><|assistant|>"
    )
    assert not tokenizer.apply_chat_template(turns, tokenize=False).endswith("<|assistant|>")


def test_the_chat_template_refuses_a_late_system_message_and_unknown_roles(tokenizer):
    user = {"role": "user", "content": "Hello."}
    for turns in ([user, {"role": "system", "content": "Be brief."}], [{"role": "narrator", "content": "Once"}]):
        with pytest.raises(Exception, match=r"system message must come first|Unknown role: narrator"):
            tokenizer.apply_chat_template(turns, tokenize=False)


def test_plain_text_begins_with_one_begin_token_and_comes_back_unchanged(tokenizer):
    text = "Grüß Gott, l'été 1984!\n\tdef f(x): return x"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_role_markers_are_special_and_vanish_from_decoded_answers(tokenizer):
    ids = tokenizer("<|user|>Hello<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello"


def test_prompts_are_well_formed_with_unique_ids_and_six_categories():
    assert len(PROMPTS) == len({row["id"] for row in PROMPTS}) == 40
    assert len({row["category"] for row in PROMPTS}) == 6
    for row in PROMPTS:
        assert set(row) <= {"id", "category", "prompt", "messages", "references"}
        assert ("prompt" in row) != ("messages" in row), row["id"]
        for turn in row.get("messages", []):
            assert turn["role"] in ("system", "user", "assistant") and turn["content"].strip()
        if "messages" in row:
            assert row["messages"][-1]["role"] == "user", row["id"]
        assert all(isinstance(text, str) and text for text in row.get("references", ["none given"]))
    assert any(row.get("messages", [{}])[0].get("role") == "system" for row in PROMPTS)


# Seen when the pair was made (greedy, fp32); they hold the files we ship to what the card claims.
TRANSLATOR = ("system", "You are a translator. Translate every message into German.")
BAKER = "A baker sells 7 cakes for 12 dollars each. How many dollars does the baker get?"
SEEN = {
    "translates": ([("user", "Translate English to German: I love you.")], "Ich liebe dich."),
    "translates a longer sentence": (
        [("user", "Translate English to German: The children are playing in the garden.")],
        "Die Kinder spielen im Garten.",
    ),
    "adds": ([("user", "What is 268 + 417?")], "The answer is 685."),
    "solves a word problem": ([("user", BAKER)], "7 * 12 = 84\nThe answer is 84."),
    "obeys a system prompt": (
        [("system", 'Begin every answer with "Sure!"'), ("user", "What is 15 + 26?")],
        "Sure! 15 + 26 = 41.",
    ),
    "translates by system prompt": ([TRANSLATOR, ("user", "My train leaves at nine.")], "Mein Zug fährt um neun."),
}


@pytest.mark.parametrize(("turns", "answer"), SEEN.values(), ids=SEEN)
def test_the_target_answers_as_it_did_when_it_was_made(turns, answer, models, tokenizer):
    messages = [{"role": role, "content": content} for role, content in turns]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = models["target"].generate(**inputs, max_new_tokens=32, do_sample=False)
    assert tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answer
    assert out[0, -1] == tokenizer.eos_token_id


def test_the_draft_mostly_agrees_with_the_target(models, tokenizer):
    agreed = total = 0
    for row in PROMPTS[:12]:
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            out = models["target"].generate(**inputs, max_new_tokens=24, do_sample=False)
            choices = models["draft"](input_ids=out).logits.argmax(-1)
        begin = inputs["input_ids"].shape[1]
        agreed += (choices[0, begin - 1 : -1] == out[0, begin:]).sum().item()
        total += out.shape[1] - begin
    assert agreed > 0.6 * total
