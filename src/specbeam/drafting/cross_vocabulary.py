"""A draft model with another tokenizer than the target's.

Timor et al. 2025 (arXiv 2502.05202): token-level intersection (TLI, algorithm 4) and string-level exact match (SLEM,
algorithm 2). Idea: the draft reads the committed text in its own tokens, and
    tli    its distribution, restricted to tokens that stand for the same bytes in both vocabularies and normalised
           again, is an ordinary q over the target's ids: greedy, sampling, trees, everything works as with one
           vocabulary. Lossless for any q; a token outside the intersection is never proposed.
    slem   it writes on in its own tokens, and the target's tokenizer writes that text anew: a chain of points of
           probability one, accepted where it is what the target says.
Where we differ: the text under SLEM is the draft's arg-max also when the target samples (a proposal that is compared
with the target's own draw is best the likeliest one); the draft's tokens stay read up to the first that the committed
text spells otherwise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request
from specbeam.drafting import Proposal, Settings
from specbeam.drafting.draft_model import DraftModel, Shape
from specbeam.drafting.length import Length
from specbeam.engine.runner import embedding
from specbeam.engine.support import adapt
from specbeam.errors import InputError
from specbeam.sampling import Path, process
from specbeam.spelling import Pair, Text, pair

_LARGE = 0.5  # vocabulary=auto: TLI when the draft has so many of the target's frequent tokens
_UNDECODED = "".join(map(chr, range(0xDC80, 0xDD00)))


def make(settings: Settings, draft: PreTrainedModel, request: Request, vocabulary: int) -> DraftModel:
    """The drafter that settings.vocabulary names; vocabulary: width of the target's logits."""
    both, shape = pair(settings.tokenizer, settings.draft_tokenizer), Shape.of(settings)
    how = chosen(settings, both)
    if how == "same":
        return DraftModel(draft, request, shape, vocabulary)
    drafter = Intersection if how == "tli" else ExactMatch
    return drafter(both, draft, request, shape, vocabulary)


def chosen(settings: Settings, both: Pair) -> str:
    """What vocabulary=auto means for this pair; anything else is what it says."""
    if settings.vocabulary != "auto":
        return settings.vocabulary
    if both.target.tokenizer.get_vocab() == both.draft.tokenizer.get_vocab():
        return "same"
    return "tli" if both.share >= _LARGE or settings.branching or settings.tree_nodes else "slem"


def intersection(both: Pair, draft: PreTrainedModel, vocabulary: int) -> dict[int, int]:
    """The target's id → the draft's, of tokens that both models have. Raises InputError where there are none."""
    known = embedding(draft).shape[0]
    shared = {mine: its for mine, its in both.shared.items() if mine < vocabulary and its < known}
    if not shared:
        raise InputError("vocabulary=tli (auto, for a tree) needs tokens that stand for the same text in both "
                         "vocabularies, and the target's and the draft's have none: use vocabulary=slem with chains, "
                         "or another draft.")
    return shared


class OtherVocabulary(DraftModel):
    """A draft model that reads the committed text in its own tokens."""

    def __init__(self, both: Pair, draft: PreTrainedModel, request: Request, shape: Shape, vocabulary: int):
        self.both = both
        context = adapt(draft).context if adapt(draft).absolute else None
        self.most = None if context is None else context - shape.depth  # beyond it, it goes on from what it has read
        self.written = [Text(both, row.prompt[0]) for row in request.rows]
        self.same: list[int] = []
        super().__init__(draft, request, shape, vocabulary)

    def _texts(self, sequences: Sequence[list[int]]) -> list[list[int]]:
        both = [text.write(tokens) for text, tokens in zip(self.written, sequences, strict=True)]
        self.same = [same for _, same in both]
        return [ids[: self.most] for ids, _ in both]

    def _read(self, texts: Sequence[list[int]]) -> Tensor:
        """Goes back to where the text is still what the draft read: committed text lies in slots 0, 1, 2, …"""
        self.read = [min(same, read, len(ids) - 1)
                     for same, read, ids in zip(self.same, self.read, texts, strict=True)]
        self.tips = self.tree.tips(self.read)
        return super()._read(texts)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """The committed text says it all."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        self.written = [self.written[row] for row in rows]

    def join(self, more: OtherVocabulary) -> None:  # type: ignore[override]
        super().join(more)
        self.written = self.written + more.written


class Intersection(OtherVocabulary):
    """TLI. Proposals, q and what the processors see are in the target's ids."""

    def __init__(self, both: Pair, draft: PreTrainedModel, request: Request, shape: Shape, vocabulary: int):
        shared, device = intersection(both, draft, vocabulary), embedding(draft).device
        self.mine = torch.tensor(list(shared), device=device)
        self.its = torch.tensor(list(shared.values()), device=device)
        self.reading = torch.zeros(vocabulary, dtype=torch.long, device=device).scatter(0, self.mine, self.its)
        super().__init__(both, draft, request, shape, vocabulary)

    def _scores(self, logits: Tensor, paths: Path) -> Tensor:
        """Where the processors leave nothing of the intersection, the draft proposes as if there were none."""
        aligned = logits.new_full((*logits.shape[:-1], self.vocabulary), -torch.inf)
        aligned = aligned.index_copy(-1, self.mine, logits[..., self.its])
        scores = process(aligned, [row.processors for row in self.rows], paths)
        return torch.where(scores.amax(-1, keepdim=True) == -torch.inf, aligned.float(), scores)

    def _extend(self, tokens: Tensor, hang: Tensor | list[int], wanted: Sequence[bool]) -> Tensor:
        return super()._extend(self.reading[tokens], hang, wanted)


class ExactMatch(OtherVocabulary):
    """SLEM. The draft writes in its own tokens; proposals are the target's tokens for that text."""

    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Length) -> Proposal:
        logits, rows = self._read(self._texts(sequences)), len(sequences)
        drafted: list[list[int]] = [[] for _ in sequences]
        sure: list[list[float]] = [[] for _ in sequences]
        wanted = [limit > 0 for limit in limits]
        for depth in range(self.shape.depth):
            confidence, best = logits[:, 0].float().softmax(-1).max(-1)
            wanted = length.proposes(wanted, confidence.tolist())
            for row, (token, p) in enumerate(zip(best.tolist(), confidence.tolist(), strict=True)):
                if wanted[row]:
                    drafted[row].append(token)
                    sure[row].append(p)
                    wanted[row] = token in self.both.draft.bytes_of
            wanted = length.reads_on(wanted)
            if depth + 1 == self.shape.depth or not any(wanted):
                break
            logits = self._extend(best[:, None], [depth], wanted)
        tokens, sureness = [], []
        for row, limit in enumerate(limits):
            ids, chances = rewrite(self.both, sequences[row], drafted[row], sure[row])
            tokens.append(ids[:limit])
            sureness.append(chances[:limit])
        return Proposal(tokens, [list(range(-1, len(ids) - 1)) for ids in tokens], None, [self.name] * rows,
                        list(length.why), [] if length.fixed else sureness, depth + 1)


def rewrite(both: Pair, committed: list[int], drafted: list[int], sure: list[float]) -> tuple[list[int], list[float]]:
    """Drafted text in the target's tokens, as they follow the committed ones, and how sure the draft was of each.

    drafted: draft ids, of which only the last may be special; sure: its probability of each. Whole characters only: of
    one that is cut at the end, nothing is proposed.
    """
    data, before = both.draft.spell(drafted), both.before(committed)
    text = (before + data).decode("utf-8", "surrogateescape")
    cut = min(len(data), len(text) - len(text.rstrip(_UNDECODED)))  # one surrogate is one byte
    ids = both.target.go_on(before, data[: len(data) - cut])
    if drafted and not cut and drafted[-1] not in both.draft.bytes_of:
        ids += [mine for mine, its in both.shared.items() if its == drafted[-1]][:1]
    ends = list(accumulate(len(both.draft.bytes_of.get(id, b"")) for id in drafted))
    sums = accumulate(len(both.target.bytes_of.get(id, b"")) for id in ids)
    return ids, [sure[min(bisect_left(ends, end), len(sure) - 1)] for end in sums]
