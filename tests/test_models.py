"""Loading: every preset's family from disk, what `auto` means, which pairs are accepted, and errors in one sentence."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers as hf
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from refusals import refusal
from safetensors.torch import save_file

from specbeam import models
from specbeam.models import (
    check_path,
    check_same_vocabulary,
    load_model,
    load_pair,
    require_draft,
    resolve_device,
    resolve_dtype,
)

CONF = Path(str(resources.files("specbeam"))) / "conf"
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "distilgpt2": "GPT2LMHeadModel",
    "tinyllama-1.1b-chat": "LlamaForCausalLM",
    "zephyr-7b-beta": "MistralForCausalLM",
    "stablelm-2-zephyr-1.6b": "StableLmForCausalLM",
    "stablelm-zephyr-3b": "StableLmForCausalLM",
    "qwen2.5-3b-instruct": "Qwen2ForCausalLM",
    "qwen2.5-0.5b-instruct": "Qwen2ForCausalLM",
    "gemma-3-4b-it": "Gemma3ForConditionalGeneration",
    "gemma-3-270m-it": "Gemma3ForCausalLM",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """family -> its checkpoint's folder, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = checkpoints.make_checkpoint(name, tmp_path_factory.mktemp("family") / name)
        return made[name]

    return make


@pytest.fixture
def copy(family, tmp_path):
    """family -> a copy of its folder that the test may break."""
    return lambda name: Path(shutil.copytree(family(name), tmp_path / name))


def edit(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_every_presets_family_loads_and_scores_text(family, name):
    model, tokenizer = load_model(family(name), device="cpu")
    assert type(model).__name__ == CLASSES[name]
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gemma-3-4b-it", "qwen2.5-3b-instruct"])
def test_the_weights_are_the_checkpoints(family, name):
    """Gemma3ForCausalLM would load the multimodal checkpoint with random weights and no error."""
    model, _ = load_model(family(name), device="cpu")
    stored = hf.AutoModelForCausalLM.from_pretrained(family(name)).state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


def test_the_generation_config_is_the_checkpoints_except_that_nothing_compiles(family):
    model, _ = load_model(family("gemma-3-4b-it"), device="cpu")
    config = model.generation_config
    assert (config.top_k, config.top_p, config.eos_token_id) == (64, 0.95, [1, 5])
    assert config.cache_implementation is None and config.disable_compile
    stored = json.loads((family("gemma-3-4b-it") / "generation_config.json").read_text())
    assert stored["cache_implementation"] == "hybrid", "the checkpoint does ask for a cache that compiles"
    qwen, _ = load_model(family("qwen2.5-3b-instruct"), device="cpu")
    assert qwen.generation_config.repetition_penalty == 1.05


def test_a_pad_token_is_added_without_touching_the_embeddings(family):
    model, tokenizer = load_model(family("gpt2"), device="cpu")
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_pad_token_outside_the_embeddings_is_replaced(copy):
    folder = copy("gpt2")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model, loaded = load_model(folder, device="cpu")
    assert loaded.pad_token_id == loaded.eos_token_id
    assert model.get_input_embeddings().num_embeddings == 340


def test_a_soft_cap_on_attention_gets_eager_attention(family, tmp_path):
    config = hf.Gemma2Config(
        vocab_size=340, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(family("gpt2")).save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu")[0].config._attn_implementation == "eager"
    assert load_model(family("gpt2"), device="cpu")[0].config._attn_implementation == "sdpa"


# dtype and device


def test_dtype_auto_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu(tmp_path):
    folder = checkpoints.make_checkpoint("gpt2", tmp_path, dtype=torch.bfloat16)
    assert load_model(folder, device="cpu")[0].dtype == torch.float32
    assert load_model(folder, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(folder, device="cpu", dtype=torch.float16)[0].dtype == torch.float16
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda") == resolve_dtype("auto", "mps") == "auto"


def test_device_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bf17", "", None, torch.int64])
def test_an_impossible_dtype_is_named(dtype):
    assert f"dtype '{str(dtype).removeprefix('torch.')}'" in refusal(resolve_dtype, dtype, "cpu")


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "Unknown device 'gpu'"), ("meta", "not supported"), ("cuda:x", "Unknown device"), ("", "Unknown device")],
)
def test_an_impossible_device_is_named(device, words):
    assert words in refusal(resolve_device, device)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "has no CUDA device" in refusal(resolve_device, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda") == "cuda"
    assert "has 1 CUDA device;" in refusal(resolve_device, "cuda:1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "not available" in refusal(resolve_device, "mps")


# pairs


@pytest.mark.parametrize(("target", "draft"), checkpoints.PAIRS.items())
def test_the_presets_pairs_load_though_their_paddings_differ(family, target, draft):
    target_model, draft_model, tokenizer = load_pair(family(target), family(draft), device="cpu")
    assert tokenizer.name_or_path == str(family(target))
    widths = [model.config.get_text_config().vocab_size for model in (target_model, draft_model)]
    assert (widths[0] == widths[1]) == (target == "gpt2"), "padded differently, except for GPT-2"


def test_models_of_different_vocabularies_are_refused_before_weights_are_read(family, copy):
    draft = copy("gpt2")
    (draft / "model.safetensors").unlink()
    sentence = refusal(load_pair, family("tinyllama-1.1b-chat"), draft, device="cpu")
    assert "do not share a vocabulary: 420 against 340 tokens, and id 0 is '<unk>' to the target" in sentence
    assert "'<|endoftext|>' to the draft" in sentence and "draft.path=" in sentence


def differing(family, change):
    """Check GPT-2's tokenizer against a copy of itself with another vocabulary."""
    tokenizer = hf.AutoTokenizer.from_pretrained(family("gpt2"))
    other = hf.AutoTokenizer.from_pretrained(family("gpt2"))
    vocabulary = tokenizer.get_vocab()
    change(vocabulary)
    other.get_vocab = lambda: vocabulary
    config = hf.GPT2Config(vocab_size=340)
    return check_same_vocabulary(tokenizer, other, config, config)


def test_two_tokens_that_changed_places_are_found(family):
    def swap(vocabulary):
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    sentence = refusal(differing, family, swap)
    assert "id 65 is 'a' to the target and 'b' to the draft" in sentence, sentence
    differing(family, lambda vocabulary: None)


def test_a_token_that_the_draft_lacks_is_found(family):
    last = max((id, token) for token, id in hf.AutoTokenizer.from_pretrained(family("gpt2")).get_vocab().items())
    sentence = refusal(differing, family, lambda vocabulary: vocabulary.pop(last[1]))
    assert "340 against 339 tokens, and id 339" in sentence and "missing to the draft" in sentence


def test_an_added_token_that_only_one_model_has_is_allowed(family):
    tokenizer = hf.AutoTokenizer.from_pretrained(family("gpt2"))
    longer = hf.AutoTokenizer.from_pretrained(family("gpt2"))
    longer.add_special_tokens({"pad_token": "[PAD]"})
    config = hf.GPT2Config(vocab_size=340)
    check_same_vocabulary(tokenizer, longer, config, config)
    check_same_vocabulary(longer, tokenizer, config, config)


def test_a_draft_with_too_few_embeddings_for_the_targets_tokens_is_refused(family):
    tokenizer = hf.AutoTokenizer.from_pretrained(family("gpt2"))
    sentence = refusal(
        check_same_vocabulary, tokenizer, tokenizer, hf.GPT2Config(vocab_size=340), hf.GPT2Config(vocab_size=300)
    )
    assert "up to id 339 and the draft has embeddings for 300" in sentence


def test_a_speculative_method_without_a_draft_is_told_so():
    sentence = refusal(require_draft, "TinyLlama/TinyLlama-1.1B-Chat-v1.0", None, ["speculative", "quick"])
    assert "speculative, quick" in sentence and "draft.path=" in sentence and "only=" in sentence
    assert "TinyLlama" in sentence and "same vocabulary" in sentence
    require_draft("anything", None, [])
    require_draft("anything", "a/draft", ["speculative"])
    assert "No draft model" in refusal(load_pair, "bundled", None)


# errors of folders


def test_a_path_that_is_no_model_gets_one_sentence(tmp_path):
    assert "No such folder: '/no/such/folder'" in refusal(load_model, "/no/such/folder")
    assert "No such folder: './missing'" in refusal(check_path, "./missing")
    assert "No such folder: 'a/b/c'" in refusal(check_path, "a/b/c")
    assert "no config.json" in refusal(load_model, tmp_path)
    (tmp_path / "model.gguf").write_text("")
    assert "is a file" in refusal(load_model, tmp_path / "model.gguf")
    assert "path is None" in refusal(check_path, None)
    assert "path is ''" in refusal(check_path, "")
    check_path("bundled")
    check_path("gpt2")
    check_path("owner/name-1.5_b")


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "unheard-of"}'])
def test_a_configuration_that_says_nothing_known_is_named(copy, text):
    folder = copy("gpt2")
    (folder / "config.json").write_text(text)
    assert f"The configuration of '{folder}' cannot be read" in refusal(load_model, folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (hf.T5Config(), "t5 model (T5Config), an encoder-decoder"),
        (hf.BartConfig(), "an encoder-decoder"),
        (hf.ViTConfig(), "not a causal language model"),
        (hf.BertConfig(architectures=["BertForMaskedLM"]), "bert model (BertForMaskedLM), not a causal"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(copy, config, words):
    folder = copy("gpt2")
    config.save_pretrained(folder)
    assert words in refusal(load_model, folder)


def test_a_decoder_whose_configuration_says_it_is_none_is_not_mistaken_for_an_encoder(family, tmp_path):
    config = hf.GPTNeoXConfig(
        vocab_size=340, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assert config.is_decoder is False
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(family("gpt2")).save_pretrained(tmp_path)
    assert type(load_model(tmp_path, device="cpu")[0]).__name__ == "GPTNeoXForCausalLM"


def test_a_folder_without_a_tokenizer_is_refused(copy):
    folder = copy("gpt2")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert len(hf.AutoTokenizer.from_pretrained(folder)) <= 1, "transformers makes an empty one up"
    assert "has no tokenizer" in refusal(load_model, folder)


def test_a_tokenizer_of_another_model_is_refused(copy, family):
    folder = copy("gpt2")
    for file in family("tinyllama-1.1b-chat").glob("tokenizer*"):
        shutil.copy(file, folder)
    assert "is not this model's: its tokens go up to id 419" in refusal(load_model, folder)


def test_weights_that_are_missing_damaged_or_pickled_are_refused(copy):
    folder = copy("gpt2")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "shorter than its header says" in refusal(load_model, folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    assert "git-lfs pointer" in refusal(load_model, folder)
    weights.write_text("<html>not found</html>")
    assert "is damaged" in refusal(load_model, folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "no *.safetensors weights" in refusal(load_model, folder)


def test_a_missing_shard_is_named(copy):
    folder = copy("gpt2")
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    load_model(folder, device="cpu")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name}, which model.safetensors.index.json names, is missing" in refusal(load_model, folder)


def test_weights_that_would_be_left_random_are_refused(copy):
    folder = copy("tinyllama-1.1b-chat")
    state = hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "no weights for lm_head.weight of LlamaForCausalLM" in refusal(load_model, folder)


def test_too_little_memory_is_noticed_before_loading(family, monkeypatch):
    monkeypatch.setattr(models, "free_memory", lambda device: 10_000)
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    for load in (load_model, lambda path, **options: load_pair(path, path, **options)):
        sentence = refusal(load, family("gpt2"), device="cpu")
        assert "Not enough memory on cpu" in sentence and "free" in sentence and "bfloat16" in sentence


def test_the_memory_estimate_follows_the_dtype(family, monkeypatch):
    parameters = sum(weight.numel() for weight in load_model(family("gpt2"), device="cpu")[0].parameters())
    monkeypatch.setattr(models, "free_memory", lambda device: 3 * parameters)
    assert "Not enough memory" in refusal(load_model, family("gpt2"), device="cpu")
    load_model(family("gpt2"), device="cpu", dtype="bfloat16")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("not enough memory: you tried")]
)
def test_memory_that_runs_out_while_loading_is_the_same_sentence(family, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", fail)
    assert "Not enough memory on cpu" in refusal(load_model, family("gpt2"), device="cpu")


# the bundled pair


def test_the_bundled_pair_shares_a_vocabulary_and_has_a_chat_template():
    target, draft, tokenizer = load_pair()
    assert tokenizer.chat_template and target.num_parameters() > draft.num_parameters()
    alone, _ = load_model("bundled-draft")
    assert alone.num_parameters() == draft.num_parameters()


def test_a_missing_bundled_pair_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(models.resources, "files", lambda package: tmp_path)
    assert "bundled model is missing from this installation" in refusal(load_model, "bundled")


# presets


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """overrides -> the composed configuration, from the package's own target and draft groups."""
    folder = tmp_path_factory.mktemp("conf")
    for group in ("target", "draft"):
        shutil.copytree(CONF / group, folder / group)
    (folder / "compare.yaml").write_text("defaults: [{draft: bundled}, {target: bundled}, _self_]")

    def resolve(*overrides):
        with initialize_config_dir(str(folder), version_base=None):
            return OmegaConf.to_container(compose("compare", list(overrides)))

    return resolve


PRESETS = {
    "bundled": ("bundled", "bundled"),
    "gpt2": ("openai-community/gpt2", "distilbert/distilgpt2"),
    "tinyllama-1.1b-chat": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", None),
    "gemma-3-4b-it": ("google/gemma-3-4b-it", "google/gemma-3-270m-it"),
    "stablelm-2-zephyr-1.6b": ("stabilityai/stablelm-2-zephyr-1_6b", None),
    "stablelm-zephyr-3b": ("stabilityai/stablelm-zephyr-3b", None),
    "zephyr-7b-beta": ("HuggingFaceH4/zephyr-7b-beta", None),
    "qwen2.5-3b-instruct": ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
}


@pytest.mark.parametrize(("preset", "paths"), PRESETS.items())
def test_a_preset_names_its_target_and_its_draft(config, preset, paths):
    assert config(f"target={preset}") == {"target": {"path": paths[0]}, "draft": {"path": paths[1]}}


def test_every_preset_is_tested_and_every_path_could_be_loaded():
    assert {file.stem for file in (CONF / "target").glob("*.yaml")} == set(PRESETS)
    assert set(checkpoints.TARGETS) == set(PRESETS) - {"bundled"}
    for path in (path for pair in PRESETS.values() for path in pair if path):
        check_path(path)


def test_paths_and_drafts_on_the_command_line_win_over_the_preset(config):
    assert config() == {"target": {"path": "bundled"}, "draft": {"path": "bundled"}}
    assert config("target.path=/my/model", "draft.path=x/y") == {
        "target": {"path": "/my/model"},
        "draft": {"path": "x/y"},
    }
    assert config("target=tinyllama-1.1b-chat", "draft.path=x/y")["draft"] == {"path": "x/y"}
    assert config("target=gpt2", "draft=none")["draft"] == {"path": None}
    assert config("draft=distilgpt2", "target=gpt2", "target.path=z") == {
        "target": {"path": "z"},
        "draft": {"path": "distilbert/distilgpt2"},
    }
