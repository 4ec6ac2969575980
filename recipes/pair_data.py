"""Text to rows of tokens for the bundled pair: records, tokenizer, encoding, packing.

A *document* is one training record as tokens: `<|begin|>` + turns or prose + `<|end|>`. A *row* is a fixed
length of whole documents, padded at the end. Everything else (which document a token belongs to, its
position, whether it counts in the loss) follows from the special tokens in the row, so rows are all we keep.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BEGIN, END, PAD, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|begin|>",
    "<|end|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
# Special tokens are the first ids, in this order; everything below relies on it.
BEGIN_ID, END_ID, PAD_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(6)
ROLE_IDS = {"system": SYSTEM_ID, "user": USER_ID, "assistant": ASSISTANT_ID}
VOCABULARY_SIZE = 8192
CONTEXT_LENGTH = 2048

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}
{{- raise_exception('A system message must come first.') -}}
{%- elif message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('Unknown role: ' + message.role) -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + message.content | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# How often one pass over the data takes each record of a source; 1 where nothing is said. Open-ended
# instructions are scarce and count more, film small talk and old novels less.
PASSES_PER_SOURCE = {
    "self_instruct_seed": 4.0,
    "llms_from_scratch": 4.0,
    "small_talk": 12.0,
    "mawps": 3.0,
    "recipes": 2.5,
    "gsm8k_train": 2.0,
    "synthetic_tasks": 2.0,
    "children_stories": 2.0,
    "system_prompts": 2.0,
    "reactjs_interview": 2.0,
    "javascript_questions": 2.0,
    "exercism_python": 2.0,
    "30_seconds_python": 2.0,
    "medquad": 1.5,
    "wordnet": 1.5,
    "factbook": 1.5,
    "instruction_induction": 1.5,
    "synthetic_persona_chat": 1.5,
    "self_dialogue": 0.6,
    "conversations": 0.6,
    "english_novels": 0.6,
    "tldr_pages": 0.8,
    "wikisql": 0.8,
    "18f_blog": 0.8,
}


@dataclass(frozen=True)
class Corpus:
    """Documents back to back. tokens: uint16 [n]; starts: int64 [documents + 1]; source: uint8 [documents]."""

    tokens: np.ndarray
    starts: np.ndarray
    source: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def of_source(self, name: str) -> np.ndarray:
        """Indices of the documents of one source."""
        return np.flatnonzero(self.source == self.names.index(name))

    def save(self, path: Path) -> None:
        """Write through a second file, so that a kill leaves no half one."""
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial, tokens=self.tokens, starts=self.starts, source=self.source, names=np.array(self.names)
        )
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Corpus:
        with np.load(path) as arrays:
            names = tuple(str(name) for name in arrays["names"])
            return Corpus(arrays["tokens"], arrays["starts"], arrays["source"], names)


def corpus_of(documents: Iterable[tuple[str, list[int] | np.ndarray]]) -> Corpus:
    """Collect `(source name, token ids)` pairs."""
    names: dict[str, int] = {}
    sources, ids = [], []
    for name, document in documents:
        sources.append(names.setdefault(name, len(names)))
        ids.append(np.asarray(document, np.uint16))
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(document) for document in ids], out=starts[1:])
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.uint16)
    return Corpus(tokens, starts, np.asarray(sources, np.uint8), tuple(names))


def read_records(folder: Path) -> Iterator[dict]:
    """Records of every `*.jsonl.gz` in a folder, in the order of the file names.

    Each is `{"messages": [{"role", "content"}, …], "source"}` or `{"text", "source"}`.
    """
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def texts_of(record: dict) -> list[str]:
    return [record["text"]] if "text" in record else [turn["content"] for turn in record["messages"]]


def train_tokenizer(texts: Iterable[str], folder: Path):
    """Byte-level BPE of `VOCABULARY_SIZE` pieces with our special tokens and chat template, saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Single digits: a sum is then learnt column by column, not for every pair of numbers anew.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode_records(tokenizer, records: Iterable[dict], chunk: int = 20_000) -> Iterator[tuple[str, list[int]]]:
    """Records to `(source, document)`; the same ids that the chat template gives (a test holds us to it)."""
    waiting: list[dict] = []

    def encoded() -> Iterator[tuple[str, list[int]]]:
        texts = [text.strip() for record in waiting for text in texts_of(record)]
        pieces = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for record in waiting:
            document = [BEGIN_ID]
            for turn in record.get("messages", [None]):
                if turn is not None:
                    document.append(ROLE_IDS[turn["role"]])
                document += next(pieces).ids
                if turn is None or turn.get("open") is None:
                    document.append(END_ID)
            yield record["source"], document

    for record in records:
        waiting.append(record)
        if len(waiting) == chunk:
            yield from encoded()
            waiting.clear()
    yield from encoded()


def join_prose(documents: Iterable[tuple[str, list[int]]], seed: int) -> Iterator[tuple[str, list[int]]]:
    """Join about half of the neighbouring prose documents, so that late positions are seen too.

    The records of a book follow each other in the files, so a joined document mostly reads on.
    """
    chance = np.random.default_rng(seed)
    held: tuple[str, list[int]] | None = None
    for source, document in documents:
        prose = document[1] not in ROLE_IDS.values()
        joins = held is not None and prose and held[0] == source and chance.random() < 0.5
        if held is not None and joins and len(held[1]) + len(document) <= CONTEXT_LENGTH:
            held = (source, held[1][:-1] + document[1:])
            continue
        if held is not None:
            yield held
            held = None
        if prose:
            held = (source, document)
        else:
            yield source, document
    if held is not None:
        yield held


def draw_documents(corpus: Corpus, passes: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """Document indices of one weighted pass in random order; a fraction takes a random part of the source."""
    chosen = []
    for name in corpus.names:
        of_source = corpus.of_source(name)
        whole, part = divmod(passes.get(name, 1.0), 1.0)
        chosen += [of_source] * int(whole)
        chosen.append(rng.permutation(of_source)[: round(part * len(of_source))])
    return rng.permutation(np.concatenate(chosen))


def pack_rows(corpus: Corpus, indices: np.ndarray, row_length: int, rng: np.random.Generator) -> np.ndarray:
    """Whole documents into rows: uint16 [rows, row_length], padded, in random order.

    Best fit, longest first, within chunks of 8,192 documents. Documents longer than a row lose their end.
    """
    lengths = np.minimum(corpus.lengths(), row_length)
    rows: list[list[int]] = []
    for begin in range(0, len(indices), 8192):
        chunk = indices[begin : begin + 8192]
        room: list[tuple[int, int]] = []  # (free tokens, row), sorted
        for index in chunk[np.argsort(-lengths[chunk], kind="stable")]:
            length = int(lengths[index])
            at = bisect.bisect_left(room, (length, -1))
            if at == len(room):
                rows.append([])
                free, row = row_length, len(rows) - 1
            else:
                free, row = room.pop(at)
            rows[row].append(index)
            if free > length:
                bisect.insort(room, (free - length, row))
    packed = np.full((len(rows), row_length), PAD_ID, np.uint16)
    for target, members in zip(rng.permutation(len(rows)), rows, strict=True):
        at = 0
        for index in rng.permutation(members):
            length = int(lengths[index])
            packed[target, at : at + length] = corpus.tokens[corpus.starts[index] :][:length]
            at += length
    return packed


def prompt_length(document: np.ndarray, rng: np.random.Generator) -> int:
    """Where a model should take over: after a random assistant marker, or after 16 to 96 tokens of prose."""
    markers = np.flatnonzero(document == ASSISTANT_ID)
    if len(markers):
        return int(rng.choice(markers)) + 1
    return min(int(rng.integers(16, 97)), max(len(document) - 1, 1))
