"""Tokens as the bytes they stand for: what two tokenizers have in common, and one's text in the other's tokens.

`Ġthe` (byte-level BPE), `▁the` (SentencePiece) and ` the` (an added token) are the same four bytes, `<0xC3>` and `Ã`
the same one. Special tokens stand for no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_UNDECODED = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as errors="surrogateescape" leaves them
_TAIL = 16  # committed tokens that are written anew for the draft in every round, at least


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are counted up from 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


class Spelling:
    """One tokenizer's tokens as bytes, and text written in its tokens.

    bytes_of: id → bytes, ordinary tokens only. id_of: the other way (of two tokens for the same bytes, the one that is
    no byte fallback). special: id → name. begin: what the tokenizer puts before any text. prefix: whether it puts a
    space before a text's first word.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        vocabulary = {id: token for token, id in tokenizer.get_vocab().items()}
        named = set(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}
        self.special = {id: vocabulary[id] for id in sorted(named) if id in vocabulary}
        read = _reader(tokenizer, vocabulary.values())
        ordinary = {id: token for id, token in vocabulary.items() if token and id not in self.special}
        self.bytes_of = {id: read(token) for id, token in ordinary.items()}
        self.id_of: dict[bytes, int] = {}
        for id in sorted(self.bytes_of, key=lambda id: (bool(_BYTE_TOKEN.fullmatch(vocabulary[id])), id)):
            self.id_of.setdefault(self.bytes_of[id], id)
        self.longest = max(map(len, self.id_of), default=0)
        whole, plain = tokenizer("a").input_ids, self.encode(b"a")
        self.begin = whole[: next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)]
        self.prefix = self.spell(plain) == b" a"

    def spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes_of.get(id, b"") for id in ids)

    def encode(self, data: bytes) -> list[int]:
        """As the tokenizer writes it when nothing stands before it; bytes that are no UTF-8 piece by piece."""
        ids: list[int] = []
        for number, part in enumerate(_UNDECODED.split(data.decode("utf-8", "surrogateescape"))):
            if number % 2:
                ids += self.piece_together(part.encode("utf-8", "surrogateescape"))
            elif part:  # text that looks like a special token is still text
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True,
                                      verbose=False).input_ids
        return ids

    def go_on(self, before: bytes, data: bytes) -> list[int]:
        """`data` as the tokenizer writes it behind `before`: exactly these bytes, no space of its own before them."""
        if not data:
            return []
        for context in dict.fromkeys((before, b"\n", b"")):
            ids = self.encode(context + data)
            ends = list(accumulate(len(self.bytes_of.get(id, b"")) for id in reversed(ids)))
            count = ends.index(len(data)) + 1 if len(data) in ends else 0
            if count and self.spell(ids[-count:]) == data:
                return ids[-count:]
        return self.piece_together(data)

    def piece_together(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again; a byte that no token begins with is left out."""
        ids, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self.longest), at, -1):
                if data[at:end] in self.id_of:
                    ids.append(self.id_of[data[at:end]])
                    break
            at = end
        return ids


def _reader(tokenizer: Any, tokens: Any) -> Any:
    """token → bytes, by the kind of the tokenizer's decoder, or else by what its tokens look like."""
    decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    if decoder == "None":
        decoder = "ByteLevel(" if any("Ġ" in token for token in tokens) else "▁"
    if "ByteLevel(" in decoder:
        table = _byte_level()
        return lambda token: b"".join(
            bytes([table[char]]) if char in table else char.encode() for char in token)
    fallback = "ByteFallback(" in decoder or "<0x00>" in tokens

    def read(token: str) -> bytes:
        if fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode() if "▁" in decoder else token.encode()

    return read


@dataclass(frozen=True)
class Pair:
    """Two vocabularies. shared: target id → draft id of the same bytes (or the same special token). reads: what the
    draft reads for a special token of the target."""

    target: Spelling
    draft: Spelling
    shared: dict[int, int]
    reads: dict[int, list[int]]

    @property
    def share(self) -> float:
        """How many of the target's most frequent tokens (tokenizers number them first) the draft has too: 0 to 1."""
        first = sorted(self.target.bytes_of)[:10_000]
        return sum(id in self.shared for id in first) / max(1, len(first))

    def before(self, tokens: Sequence[int]) -> bytes:
        """The last few target tokens as bytes, back to a special one."""
        plain = takewhile(lambda id: id in self.target.bytes_of, reversed(tokens[-8:]))
        return self.target.spell([*plain][::-1])


@lru_cache(maxsize=4)
def pair(target_tokenizer: Any, draft_tokenizer: Any) -> Pair:
    """Worked out once for two tokenizers."""
    target, draft = Spelling(target_tokenizer), Spelling(draft_tokenizer)
    shared = {id: draft.id_of[data] for data, id in target.id_of.items() if data in draft.id_of}
    names = {name: id for id, name in draft.special.items()}
    shared |= {id: names[name] for id, name in target.special.items() if name in names}
    ends = target_tokenizer.eos_token_id, draft_tokenizer.eos_token_id
    if None not in ends and ends[0] not in shared and ends[1] not in shared.values():
        shared[ends[0]] = ends[1]
    reads = {id: [shared[id]] if id in shared else [] if id == target_tokenizer.bos_token_id
             else draft.go_on(b"", name.encode()) for id, name in target.special.items()}
    return Pair(target, draft, shared, reads)


class Text:
    """One row's text, which grows in the target's tokens, in the draft's. Its tail is written anew every time; what
    lies before it stays (from where a token of both ends), so that the work does not grow with the text."""

    def __init__(self, both: Pair, first: int):
        """first: the token that the text begins with. The target's BOS gives way to what the draft begins with."""
        self.both = both
        self.start = self.at = int(first == both.target.tokenizer.bos_token_id)
        self.ids = [*both.draft.begin]
        self.kept = len(self.ids)  # the first `at` tokens are ids[:kept] for good

    def write(self, tokens: list[int]) -> tuple[list[int], int]:
        """All of the text in the draft's tokens, and how many of them are the same as last time."""
        old, ids, same, begin, target = self.ids, self.ids[: self.kept], self.kept, self.at, self.both.target
        for place in range(self.at, len(tokens)):
            if tokens[place] in target.special:
                ids += self._segment(tokens, begin, place) + self.both.reads[tokens[place]]
                self.at, self.kept, begin = place + 1, len(ids), place + 1
        tail = self._segment(tokens, begin, len(tokens))
        self.ids = (ids + tail) or [0]  # a model needs something to read
        while same < min(len(old), len(self.ids)) and old[same] == self.ids[same]:
            same += 1
        if len(tokens) - begin > 2 * _TAIL:
            ends = {left: count for count, left in self._ends(self.both.draft, tail)}
            agreed = [(count, ends[left]) for count, left in self._ends(target, tokens[begin:-_TAIL], tokens[-_TAIL:])
                      if left in ends]
            if agreed:
                self.at, self.kept = begin + agreed[0][0], len(ids) + agreed[0][1]
        return self.ids, same

    def _segment(self, tokens: list[int], begin: int, end: int) -> list[int]:
        """Target tokens [begin, end), none of them special, in the draft's tokens."""
        data = self.both.target.spell(tokens[begin:end])
        if begin > self.start:
            return self.both.draft.go_on(self.both.before(tokens[max(0, begin - 8) : begin]), data)
        return self.both.draft.encode(data.removeprefix(b" ") if self.both.target.prefix else data)

    @staticmethod
    def _ends(words: Spelling, ids: list[int], behind: Sequence[int] = ()) -> list[tuple[int, int]]:
        """(number of tokens, bytes that follow them), the latest first, as far as all tokens behind are plain."""
        left, found = len(words.spell(behind)), []
        for count in range(len(ids), 0, -1):
            found.append((count, left))
            if ids[count - 1] not in words.bytes_of:
                break
            left += len(words.bytes_of[ids[count - 1]])
        return found
