"""What followed the same words before: the text is its own draft.

Prompt lookup: Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding), `prompt_lookup_num_tokens` of transformers.
Idea: find the last few tokens earlier in prompt and answer, the longest n-gram first, and propose what came next
there, the most recent place first. A dictionary from n-gram to places grows with the text: nothing is searched twice.
Where it differs: several places (`branches`) become one tree of their different continuations, and a continuation
that reaches the end of the text goes on with what it has just proposed, as LZ77 does, so that a period is continued.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from specbeam.drafting import Proposal, Settings
from specbeam.drafting.length import Length

_PLACES = 16  # of one n-gram that are looked at per branch: a bound for words that are everywhere


def make(settings: Settings, target: Any, draft: Any, request: Any, vocabulary: int) -> PromptLookup:
    return PromptLookup(len(request.rows), vocabulary, settings.ngram, settings.branches)


class Index:
    """Where each n-gram (n = 1 … longest) of a growing text was followed by something."""

    def __init__(self, longest: int):
        self.longest, self.read = longest, 0
        self.places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def extend(self, text: Sequence[int]) -> None:
        """`text` is the earlier text and more of it. Its last n-grams, which nothing follows yet, come next time."""
        for end in range(max(self.read, 1), len(text)):
            for n in range(1, min(self.longest, end) + 1):
                self.places[tuple(text[end - n: end])].append(end)
        self.read = len(text)

    def find(self, text: Sequence[int]) -> list[int]:
        """The places, in order, behind the longest n-gram at the end of `text` that occurred before."""
        for n in range(min(self.longest, len(text)), 0, -1):
            if found := self.places.get(tuple(text[-n:])):
                return found
        return []


class PromptLookup:
    """One index per row."""

    name = "prompt_lookup"

    def __init__(self, rows: int, vocabulary: int, ngram: int, branches: int):
        self.indices = [Index(ngram) for _ in range(rows)]
        self.vocabulary, self.branches = vocabulary, branches

    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Length) -> Proposal:
        trees = []
        for row, (text, index, limit) in enumerate(zip(sequences, self.indices, limits, strict=True)):
            index.extend(text)
            trees.append(self._below(index, text, limit))
            if limit and not index.find(text):
                length.why[row] = "no match"
        return Proposal([t for t, _ in trees], [p for _, p in trees], None, [self.name] * len(trees),
                        list(length.why))

    def branch(self, row: int, known: Sequence[int], texts: Sequence[list[int]], scores: Sequence[float], limit: int
               ) -> tuple[list[int], list[int]]:
        """One tree below several texts (beams) that all begin with `known`, which is looked up in: tokens and parents,
        -1 - i for the i-th text."""
        self.indices[row].extend(known)
        return side_by_side([self._below(self.indices[row], text, limit) for text in texts])

    def _below(self, index: Index, text: list[int], limit: int) -> tuple[list[int], list[int]]:
        recent = reversed(index.find(text)[-self.branches * _PLACES:])
        found = dict.fromkeys(tuple(carry_on(text, place, limit, self.vocabulary)) for place in recent)
        return merge(list(found)[: self.branches])

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """The coming text says it too."""

    def observe(self, tokens: Sequence[Sequence[int]], logits: Any) -> None:
        """Nothing to learn from the target."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.indices = [self.indices[row] for row in rows]

    def join(self, more: PromptLookup) -> None:
        self.indices = self.indices + more.indices


def carry_on(text: Sequence[int], place: int, limit: int, vocabulary: int) -> list[int]:
    """What stands from `place` on, at most `limit` tokens; past the end of the text, what was copied goes round.

    Ends before an id that the target cannot give (an image token of the prompt, a border between texts)."""
    copied: list[int] = []
    for at in range(place, place + limit):
        token = text[at] if at < len(text) else copied[at - len(text)]
        if not 0 <= token < vocabulary:
            break
        copied.append(token)
    return copied


def merge(paths: Iterable[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Paths as one tree of tokens and parents: common beginnings once."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) → node
    for path in paths:
        at = -1
        for token in path:
            at = nodes.setdefault((at, token), len(nodes))
    return [token for _, token in nodes], [parent for parent, _ in nodes]


def side_by_side(trees: Iterable[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Trees below several texts as one: tokens and parents, -1 - i for the i-th text."""
    tokens: list[int] = []
    parents: list[int] = []
    for number, (ids, above) in enumerate(trees):
        first = len(tokens)
        tokens += ids
        parents += [parent + first if parent >= 0 else -1 - number for parent in above]
    return tokens, parents
