"""Small tokenizers of every kind, and small models trained on a text that both read in their own tokens."""

from __future__ import annotations

import json

import torch
import transformers as hf
from tiny import build
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on.",
    "A naïve café in Zürich: “crème brûlée” for 3 €!",
    "Größe, Übermut und Ärger — the fox says 🦊🦊, the dog says 🐶.",
    "def add(a, b):\n    return a + b\n",
]
OTHER = [
    "Der schnelle Fuchs springt über den faulen Hund; the fox jumps over it.",
    "日本語のテキスト and some English, 🐶🦊 and a café.",
    "return the quick dog\n\n    and a fox, a + b",
]


def byte_level(text: list[str], size: int, end: str = "<|end|>", extra: tuple[str, ...] = ()
               ) -> PreTrainedTokenizerFast:
    """GPT-2's kind: no BOS, every byte has a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end, *extra], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, extra_special_tokens=list(extra))


def sentencepiece(text: list[str], size: int, legacy: bool = False) -> PreTrainedTokenizerFast:
    """Llama's kind: ▁ for a space and before the first word, <0x00> … <0xFF> for what has no token, a BOS."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size - 256, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        limit_alphabet=40))
    said = json.loads(trained.to_str())["model"]
    learned = [token for token in sorted(said["vocab"], key=said["vocab"].get) if token[0] != "<"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    numbers = {token: id for id, token in enumerate(tokens)}
    merges = [pair for pair in map(tuple, said["merges"]) if {*pair, "".join(pair)} <= numbers.keys()]
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", numbers["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def characters(vocabulary: list[str], merges: list[tuple[str, str]], end: str | None = None) -> PreTrainedTokenizerFast:
    """A handful of tokens with these ids."""
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(vocabulary)}, merges))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def llama(size: int, seed: int = 0, **options) -> PreTrainedModel:
    """A random llama, without EOS unless it is given."""
    base = {"vocab_size": size, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
            "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return build(hf.LlamaConfig(**base | options), seed=seed)


def trained(tokenizer: PreTrainedTokenizerFast, text: list[str], steps: int = 120) -> PreTrainedModel:
    """A llama that has half learned the text by heart."""
    model = llama(len(tokenizer), initializer_range=0.05, eos_token_id=tokenizer.eos_token_id).train()
    rows = [[*tokenizer(part).input_ids, tokenizer.eos_token_id] for part in text]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    labels = torch.tensor([[*row, *[-100] * (width - len(row))] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()
