"""What a method is compared with: plain transformers, one prompt at a time, and the facts about its output."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from tiny import VOCABULARY, tiny_draft, tiny_model
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specbeam.trace import GenerationOutput

# How much each family's draft is disturbed, so that it is accepted often, but not always.
NOISE = {"gpt2": 0.02, "llama": 0.01, "mistral": 0.01, "mistral-window": 0.015, "stablelm": 0.015, "qwen2": 0.01,
         "qwen3": 0.02, "gemma3": 0.02, "gemma3-conditional": 0.02, "phi3": 0.01}


@functools.cache
def model(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A tiny model, built once. Nobody may change it; see `changed`."""
    return tiny_model(name, attention, seed)


@functools.cache
def good_draft(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A draft that the target accepts in part."""
    return tiny_draft(model(name, attention, seed), NOISE[name], seed + 1)


def changed(name: str, **generation: object) -> PreTrainedModel:
    """A copy whose generation_config says something, as a checkpoint's may."""
    copied = copy.deepcopy(model(name))
    for key, value in generation.items():
        setattr(copied.generation_config, key, value)
    return copied


def generated(target: PreTrainedModel, prompt: Tensor, **options: object) -> list[int]:
    """New tokens of `transformers.generate` for one prompt alone."""
    options = {"do_sample": False, "pad_token_id": 0} | options
    out = target.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
    return out[0, len(prompt):].tolist()


def generated_all(target: PreTrainedModel, rows: Sequence[Tensor], **options: object) -> list[list[int]]:
    return [generated(target, row, **options) for row in rows]


@torch.no_grad()
def plain_logits(target: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [length, vocabulary] of each text by the model alone: no cache and no mask of ours. Shorter texts have
    tokens behind them, which a causal model cannot see."""
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    logits = target(input_ids=ids, use_cache=False).logits
    return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


def acceptance_rate(out: GenerationOutput) -> float:
    rounds = [one for row in out.trace for one in row.rounds]
    return sum(one.accepted for one in rounds) / sum(one.drafted for one in rounds)


def late_token(tokens: Sequence[int], earliest: int) -> int:
    """A token that this answer has at `earliest` or later and not before, to be declared an end."""
    return next(token for place, token in enumerate(tokens) if place >= earliest and token not in tokens[:place])


def right_padded(rows: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [rows, longest], padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=pad) for row in rows])
    return ids, torch.stack([torch.arange(width) < len(row) for row in rows]).long()


@functools.cache
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny vocabulary: one character a token."""
    names = [f"<{i}>" for i in range(10)] + [chr(35 + i) for i in range(VOCABULARY - 10)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<0>")
