"""The recipe of the bundled pair, on a made-up corpus: data, packing, figures, and one small run with a kill."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import pair_data as data  # noqa: E402
import pair_training as training  # noqa: E402
import pair_variants as variants  # noqa: E402
from pair_evaluation import accepted_and_drafted, encode_chat, last_number  # noqa: E402

WORDS = ["river", "stone", "lamp", "green", "quiet", "seven", "walks", "under", "bridge", "morning", "bread"]


def made_up_records(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    records: list[dict] = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        first, second = rng.randint(1, 99), rng.randint(1, 99)
        ask = {"role": "user", "content": f"Turn round: {' '.join(words)}"}
        answer = {"role": "assistant", "content": " ".join(reversed(words))}
        records.append({"messages": [ask, answer], "source": "llms_from_scratch"})
        ask = {"role": "user", "content": f"What is {first} + {second}?"}
        answer = {"role": "assistant", "content": f"The answer is {first + second}."}
        records.append({"messages": [ask, answer], "source": "mawps"})
        records.append({"text": " ".join(rng.choices(WORDS, k=60)) + ".", "source": "english_novels"})
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder as the recipe wants it, with a made-up corpus."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("train", 30), ("heldout", 4)):
        (root / part).mkdir()
        by_source: dict[str, list[str]] = {}
        for record in made_up_records(count, seed=len(part)):
            by_source.setdefault(record["source"], []).append(json.dumps(record))
        for source, lines in by_source.items():
            with gzip.open(root / part / f"{source}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.write("\n".join(lines))
    (root / "eval").mkdir()
    pair = {"id": 0, "en": "A green lamp.", "de": ["Eine grüne Lampe.", "Eine Lampe, grün."]}
    (root / "eval" / "tatoeba_heldout_en-de.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer(folder, tmp_path_factory):
    texts = [text for record in data.read_records(folder / "train") for text in data.texts_of(record)]
    return data.train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"))


def recipe(folder: Path, work: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPES / "train_pair.py"), "--data", str(folder), "--work", str(work), *options]
    # Without a GPU: the tiny preset needs none, and a test must not compile kernels.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_documents_are_what_the_chat_template_renders(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is 12 + 30? "},
        {"role": "assistant", "content": "42"},
    ]
    ((_, document),) = data.encode_records(tokenizer, [{"messages": turns, "source": "any"}])
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert document == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    prompt = encode_chat(tokenizer, "What is 12 + 30?", system="Be brief.")
    assert document[: len(prompt)] == prompt.tolist()


def test_plain_text_gets_one_begin_token_and_digits_stand_alone(tokenizer):
    ids = tokenizer("river 2047")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert [tokenizer.decode([token]) for token in ids[-4:]] == list("2047")


def test_rows_hold_every_document_whole_and_once():
    rng = np.random.default_rng(0)
    documents = [[data.BEGIN_ID, *rng.integers(6, 99, n).tolist(), data.END_ID] for n in rng.integers(1, 40, 200)]
    corpus = data.corpus_of(("any", document) for document in documents)
    rows = data.pack_rows(corpus, np.arange(200), 64, rng)
    found = [
        (data.BEGIN_ID, *map(int, part[: list(part).index(data.END_ID) + 1]))
        for row in rows
        for part in np.split(row, np.flatnonzero(row == data.BEGIN_ID))
        for part in [part[1:]]
        if data.END_ID in part
    ]
    assert sorted(found) == sorted(map(tuple, documents))
    assert (rows == data.PAD_ID).mean() < 0.15


def test_loss_counts_assistant_turns_and_prose_but_no_prompt_and_no_padding():
    chat = [data.BEGIN_ID, data.USER_ID, 50, 51, data.END_ID, data.ASSISTANT_ID, 60, data.END_ID]
    prose = [data.BEGIN_ID, 70, 71, data.END_ID]
    rows = torch.tensor([chat + prose + [data.PAD_ID] * 2])
    labels, weights = training.loss_weights(rows, user_weight=0.0)
    assert labels[weights == 1].tolist() == [60, data.END_ID, 70, 71, data.END_ID]
    _, weights = training.loss_weights(rows, user_weight=0.2)
    assert weights.sum().item() == pytest.approx(5 + 3 * 0.2)


@pytest.mark.parametrize("masked", [True, False], ids=["with the mask", "without the mask they differ"])
def test_a_document_in_a_packed_row_is_read_as_if_alone(masked):
    torch.manual_seed(0)
    machine = training.Machine.of("cpu")
    model = training.new_model(training.Shape(2, 64, 1, 1, 64), seed=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first, second = torch.randint(6, 99, (9,)), torch.randint(6, 99, (7,))
    first[0] = second[0] = data.BEGIN_ID
    together = torch.cat([first, second])[None]

    def read(rows):
        documents, positions = training.unpack_rows(rows)
        return machine.hidden_states(
            model, rows, machine.mask(documents if masked else torch.zeros_like(documents)), positions
        )

    with torch.no_grad():
        difference = (read(together)[:, 9:] - read(second[None])).float().abs().max().item()
    assert (difference < 0.05) == masked


def test_made_records_show_system_prompts_and_never_an_empty_answer(folder):
    records = list(data.read_records(folder / "train"))
    made = list(variants.made_records(records, seed=0))
    assert {record["source"] for record in made} == {"system_prompts", "small_talk", "conversations"}
    assert any(record["messages"][0]["role"] == "system" for record in made)
    assert all(turn["content"].strip() for record in made for turn in record["messages"])


def test_a_translation_becomes_a_translator_with_a_system_prompt():
    record = variants.chat("Translate the following sentence to French.\nGood night.", "Bonne nuit.", source="tatoeba")
    made = variants.with_system_prompt(record, random.Random(0))
    assert "French" in made["messages"][0]["content"]
    assert [turn["content"] for turn in made["messages"][1:]] == ["Good night.", "Bonne nuit."]


@pytest.mark.parametrize(
    ("matches", "counts"),
    [
        ([1, 1, 1, 1, 1, 1], (4, 4, 1)),  # prefill gives one token, one round the other five
        ([1, 0, 0, 1], (1, 9, 3)),  # a wrong first proposal wastes four; the end of the answer stops the draft
        ([0], (0, 0, 0)),
        ([1, 1, 1, 0, 1], (3, 5, 2)),
    ],
)
def test_acceptance_is_counted_round_by_round(matches, counts):
    assert accepted_and_drafted(np.array(matches, bool), 4) == counts


def test_the_last_number_of_an_answer_is_read():
    assert [last_number(text) for text in ("The answer is 1,240.", "so 7.50", "none")] == ["1240", "7.5", ""]


def test_a_run_cut_off_goes_on_and_ends_with_a_pair_that_loads(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work, out = tmp_path / "work", tmp_path / "out"
    tiny = ("--preset", "tiny", "--out", str(out))
    first = recipe(folder, work, *tiny, "--until", "tokens")
    assert first.returncode == 0, first.stderr
    (work / "target.partial").mkdir()  # what a kill in the middle of saving leaves
    rest = recipe(folder, work, *tiny)
    assert rest.returncode == 0, rest.stderr
    figures = json.loads((work / "figures.json").read_text(encoding="utf-8"))
    assert 0 <= figures["acceptance"]["all"]["acceptance"] <= 1
    assert set(figures["translation"]) == {
        f"{way} {how}" for way in ("en-de", "de-en") for how in ("greedy", "4 beams")
    }
    for name in ("target", "draft"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    again = recipe(folder, work, *tiny)
    assert again.returncode == 0 and "step " not in again.stdout
    other = recipe(folder, work, *tiny, "--seed", "1")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and str(work) in other.stderr


def test_a_missing_data_folder_is_one_sentence_and_status_2(tmp_path):
    run = recipe(tmp_path / "nothing", tmp_path / "work")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "nothing" in run.stderr and "--data" in run.stderr


def test_training_goes_on_from_its_checkpoint(tokenizer, folder, tmp_path):
    corpus = data.corpus_of(data.encode_records(tokenizer, data.read_records(folder / "train")))
    corpus.save(tmp_path / "train.npz")
    held_out = data.corpus_of(data.encode_records(tokenizer, data.read_records(folder / "heldout")))
    machine = training.Machine.of("cpu")
    said: list[str] = []

    def run(passes: float) -> dict:
        how = training.Training(
            passes=passes, rows_per_step=4, row_length=128, learning_rate=3e-3, dropout=0.0, evaluate_every=5
        )
        model = training.new_model(training.Shape(1, 64, 1, 1, 64), seed=0)
        step_loss = training.target_loss(model, machine, how, user_weight=0.2)
        files = ((tmp_path / "train.npz", 1.0),)
        return training.train(model, step_loss, files, held_out, how, machine, tmp_path / "c", 0, said.append)

    first = run(passes=0.25)
    more = run(passes=0.6)
    assert f"goes on from step {first['steps']}" in said
    assert more["steps"] > first["steps"]
    assert more["held_out"] < first["history"][0]["held_out"][0]
