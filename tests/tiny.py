"""Tiny random models of every family the tests prove things on. Weights are large enough that context matters."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 101
EOS = 2

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.25,
    "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
_SLIDES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = dict(_BASE, num_hidden_layers=4, head_dim=32, sliding_window=8, layer_types=_SLIDES,
              query_pre_attn_scalar=32, tie_word_embeddings=False)  # tied, the last token outshouts its context


def _gemma3_conditional() -> hf.PretrainedConfig:
    vision = hf.SiglipVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   image_size=28, patch_size=14)
    return hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**_GEMMA).to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1, boi_token_index=VOCABULARY - 2, eoi_token_index=VOCABULARY - 3,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=0, tie_word_embeddings=False)


def _configs() -> dict[str, hf.PretrainedConfig]:
    return {
        "gpt2": hf.GPT2Config(vocab_size=VOCABULARY, n_positions=256, n_embd=64, n_layer=3, n_head=4,
                              initializer_range=0.25, bos_token_id=1, eos_token_id=EOS, pad_token_id=0),
        "llama": hf.LlamaConfig(**_BASE),
        "mistral": hf.MistralConfig(**_BASE, sliding_window=None),
        "mistral-window": hf.MistralConfig(**_BASE, sliding_window=8),
        "stablelm": hf.StableLmConfig(**_BASE, partial_rotary_factor=0.25),
        "qwen2": hf.Qwen2Config(**_BASE),
        "qwen3": hf.Qwen3Config(**_BASE, head_dim=32),
        "gemma3": hf.Gemma3TextConfig(**_GEMMA),
        "gemma3-conditional": _gemma3_conditional(),
        "phi3": hf.Phi3Config(**_BASE),
    }


NAMES = tuple(_configs())


def build(config: hf.PretrainedConfig, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random model of this configuration, in fp32 on the CPU, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tiny_model(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random model of the named family."""
    return build(_configs()[name], attention, seed)


def tiny_draft(target: PreTrainedModel, noise: float = 0.02, seed: int = 1) -> PreTrainedModel:
    """A draft that agrees with the target often but not always: the same weights, disturbed."""
    import copy

    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * noise * weight.std().nan_to_num(0.0))
    return draft


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY - 4, (n,), generator=generator) for n in lengths]


def left_padded(rows: list[torch.Tensor], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [rows, longest], padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return ids, mask
