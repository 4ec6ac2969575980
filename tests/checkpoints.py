"""Small checkpoints on disk, one for every preset: its config class, tokenizer class and template quirks, no network.

The templates are written here in the spirit of the real ones; the tokenizers are trained on a few sentences.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "Once upon a time a fox asked the owl why the sky is blue, and the owl answered: because light is scattered.",
    "Translate the sentence into German. What is two plus three? Be brief. You are a helpful assistant.",
    "user assistant system model The quick brown fox jumps over the lazy dog. Hello, how are you today?",
)

# Every message is closed by the end-of-text token; no beginning-of-text token is written.
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}"""

# Writes the BOS itself, folds a leading system message, refuses roles that do not alternate, calls the assistant model.
GEMMA = """{{ bos_token }}
{%- set turns = messages -%}
{%- set prefix = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set prefix = messages[0]['content'] + '\\n\\n' -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- (prefix if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

# As Gemma 1 and 2: no system role at all.
GEMMA_WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}" + (
    "{% endif %}" + GEMMA
)

# Writes a system prompt of its own when there is none.
QWEN = """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are Qwen, a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

_SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
_QWEN_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
# Hugging Face's Gemma 3 checkpoints ask for a static cache, which would make `generate` compile on a GPU.
_GEMMA_SAMPLING = {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"}
_GEMMA_SIZE = dict(
    _SIZE, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=1024,
    sliding_window=16, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip


def _trained(tokenizer: Tokenizer, special: Sequence[str], alphabet: Sequence[str], size: int) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def _byte_level(special: tuple[str, ...]) -> Tokenizer:
    """GPT-2's kind: a byte-level BPE that adds nothing to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, special, pre_tokenizers.ByteLevel.alphabet(), 340)


@functools.cache
def _sentencepiece(special: tuple[str, ...], bos: str, prefix: bool) -> Tokenizer:
    """Llama's kind: a BPE over "▁"-marked words that falls back to bytes and puts a BOS before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fuse = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*fuse, decoders.Strip(" ", 1, 0)] if prefix else fuse)
    bytes_ = tuple(f"<0x{byte:02X}>" for byte in range(256))
    tokenizer = _trained(tokenizer, special + bytes_, (), 420)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def _gpt2_tokenizer() -> hf.PreTrainedTokenizerBase:
    """No template, no pad token, one token for beginning and end."""
    end = "<|endoftext|>"
    return hf.PreTrainedTokenizerFast(tokenizer_object=_byte_level((end,)), bos_token=end, eos_token=end, unk_token=end)


def _llama_tokenizer() -> hf.PreTrainedTokenizerBase:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece(("<unk>", "<s>", "</s>"), "<s>", True),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=ZEPHYR,
    )  # fmt: skip


def _stablelm_tokenizer() -> hf.PreTrainedTokenizerBase:
    end = "<|endoftext|>"
    special = (end, "<|padding|>", "<|system|>", "<|user|>", "<|assistant|>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special), bos_token=end, eos_token=end, unk_token=end, chat_template=ZEPHYR
    )


def _gemma_tokenizer() -> hf.PreTrainedTokenizerBase:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece(special, "<bos>", False),
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", chat_template=GEMMA,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return tokenizer


def _qwen_tokenizer() -> hf.PreTrainedTokenizerBase:
    """No BOS; padding and the end of a turn are different tokens."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN
    )


def _gpt2(tokens: int, layers: int) -> hf.PreTrainedConfig:
    return hf.GPT2Config(
        vocab_size=tokens, n_positions=256, n_embd=32, n_layer=layers, n_head=4, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip


def _gemma_4b(tokens: int) -> hf.PreTrainedConfig:
    """The multimodal configuration: its text model lies one level down."""
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = hf.Gemma3TextConfig(**_GEMMA_SIZE, vocab_size=tokens + 63, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    return hf.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4,
        image_token_index=tokens - 1, bos_token_id=2, eos_token_id=[1, 5], pad_token_id=0,
    )  # fmt: skip


def _family(family: str) -> tuple[hf.PreTrainedTokenizerBase, hf.PreTrainedConfig, dict[str, Any]]:
    """Tokenizer, configuration and what its generation_config.json says beyond that."""
    if family in ("gpt2", "distilgpt2"):
        tokenizer = _gpt2_tokenizer()
        return tokenizer, _gpt2(len(tokenizer), 2 if family == "gpt2" else 1), {}
    if family in ("tinyllama-1.1b-chat", "zephyr-7b-beta"):
        tokenizer = _llama_tokenizer()
        settings: dict[str, Any] = dict(
            _SIZE, num_key_value_heads=2, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2
        )
        if family == "zephyr-7b-beta":
            settings.update(max_position_embeddings=1024, sliding_window=32)
            return tokenizer, hf.MistralConfig(**settings), {}
        return tokenizer, hf.LlamaConfig(**settings, max_position_embeddings=256), {}
    if family in ("stablelm-2-zephyr-1.6b", "stablelm-zephyr-3b"):
        tokenizer = _stablelm_tokenizer()
        settings = dict(
            _SIZE, num_key_value_heads=4, vocab_size=len(tokenizer) + 12, max_position_embeddings=256,
            partial_rotary_factor=0.25, use_qkv_bias=family == "stablelm-2-zephyr-1.6b", bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return tokenizer, hf.StableLmConfig(**settings), {}
    if family in ("qwen2.5-3b-instruct", "qwen2.5-0.5b-instruct"):
        tokenizer = _qwen_tokenizer()
        large = family == "qwen2.5-3b-instruct"
        settings = dict(
            _SIZE, num_key_value_heads=2, vocab_size=len(tokenizer) + (40 if large else 20), tie_word_embeddings=True,
            max_position_embeddings=1024, bos_token_id=0, eos_token_id=2,
        )  # fmt: skip
        settings["num_hidden_layers"] = 2 if large else 1
        return tokenizer, hf.Qwen2Config(**settings), dict(_QWEN_SAMPLING, eos_token_id=[2, 0], pad_token_id=0)
    if family in ("gemma-3-4b-it", "gemma-3-270m-it"):
        tokenizer = _gemma_tokenizer()
        defaults = dict(_GEMMA_SAMPLING, eos_token_id=[1, 5])
        if family == "gemma-3-4b-it":
            return tokenizer, _gemma_4b(len(tokenizer)), defaults
        # One row short of the tokenizer: its image token has no embedding here.
        plain = dict(_GEMMA_SIZE, vocab_size=len(tokenizer) - 1, bos_token_id=2, eos_token_id=1, pad_token_id=0)
        return tokenizer, hf.Gemma3TextConfig(**plain), defaults
    raise ValueError(f"no such family: {family}; there are {', '.join(FAMILIES)}")


TARGETS = (
    "gpt2", "tinyllama-1.1b-chat", "gemma-3-4b-it", "stablelm-2-zephyr-1.6b", "stablelm-zephyr-3b", "zephyr-7b-beta",
    "qwen2.5-3b-instruct",
)  # fmt: skip
PAIRS = {"gpt2": "distilgpt2", "gemma-3-4b-it": "gemma-3-270m-it", "qwen2.5-3b-instruct": "qwen2.5-0.5b-instruct"}
FAMILIES = (*TARGETS, *PAIRS.values())


def make_checkpoint(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of one of FAMILIES with its tokenizer, by `save_pretrained`; returns the folder."""
    tokenizer, config, generation = _family(family)
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
