"""Chains on the host: what chains.py records for a GPU, for a runner whose slots are read in numpy (openvino.py).

A forward of a small model takes a few milliseconds, and it sweeps the caches: what the host does between two of them
runs cold, and a general step of a tree (masks, tips, slots) takes a tenth of it. In a chain a row's length says it all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from specbeam.engine.tree import TokenTree
from specbeam.runners.chains import Shape
from specbeam.sampling import invert, process


class HostChains:
    """The rows of one tree, each a chain. Methods as those of `chains.Chains`."""

    ahead = 1  # steps that are begun before the first is seen

    def __init__(self, tree: TokenTree, shape: Shape):
        self.tree, self.shape = tree, shape
        self.numbers = not shape.samples and not shape.processors  # nothing but the largest logit is asked for
        self.forget()

    def forget(self) -> None:
        """Rows left or joined, or something else read into the tree."""
        self.texts: list[list[int]] | None = None

    def read(self, tokens: Sequence[Sequence[int]], depth: Sequence[int], keep: Sequence[int] | None = None,
             exact: bool = False) -> np.ndarray:
        """Logits [rows, new, vocabulary] ([rows, 1, …] of the tokens `keep` [rows]) of tokens [rows, new] behind each
        row's first `depth` [rows]; until the next forward. exact: never wider than that."""
        adapter = self.tree.adapter
        self.tree.reach(max(depth) + len(tokens[0]))
        highest = adapter.context - 1 if adapter.absolute and adapter.context is not None else None
        return self.tree.cache.read(tokens, depth, highest, adapter.window, keep, exact)

    def step(self, high: int, texts: Sequence[list[int]], uniform: Tensor | None) -> Callable[[], list[int]]:
        """A plain step; texts are looked at after `forget`. uniform: [rows] fp64, when it draws."""
        if self.texts is None:
            self.texts = [list(text) for text in texts]
        mine = self.texts
        logits = self.read([text[-1:] for text in mine], [len(text) - 1 for text in mine], exact=True)
        if self.numbers:
            tokens = logits[:, 0].argmax(-1).tolist()
        else:
            scores = self._scores(logits, lambda row, _: mine[row])[:, 0]
            tokens = (scores.argmax(-1) if uniform is None else invert(scores.softmax(-1), uniform)).tolist()
        for text, token in zip(mine, tokens, strict=True):
            text.append(token)
        return lambda: tokens

    def verify(self, proposed: Sequence[Sequence[int]], lengths: Sequence[int], texts: Sequence[list[int]],
               rule: Callable | None, uniform: Tensor | None, q: Tensor | None) -> Callable[[], list[list[int]]]:
        self.forget()
        count = len(proposed[0])
        logits = self.read([[text[-1], *row] for text, row in zip(texts, proposed, strict=True)],
                           [len(text) - 1 for text in texts])
        if self.numbers:
            best = logits.argmax(-1).tolist()
        else:
            # Behind what is meant nothing is asked: a row's own text will do, which its processors know.
            scores = self._scores(logits, lambda row, node: [
                *texts[row], *(proposed[row][:node] if node <= lengths[row] else ())])
            if rule is not None:
                q = q[:, :count] if q is not None and count else None
                drawn = torch.tensor(proposed, dtype=torch.long).view(len(texts), count)
                found = rule(drawn, scores.softmax(-1), q, torch.tensor(lengths), uniform, invert)
                return torch.cat([torch.stack(found, 1), drawn], 1).tolist
            best = scores.argmax(-1).tolist()
        answers = []
        for ids, tokens, most in zip(proposed, best, lengths, strict=True):  # in numpy it would take 90 µs
            right = 0
            while right < most and ids[right] == tokens[right]:
                right += 1
            answers.append([right, tokens[right], *ids])
        return lambda: answers

    def _scores(self, logits: np.ndarray, path: Callable[[int, int], list[int]]) -> Tensor:
        return process(torch.from_numpy(logits.copy()), [self.shape.processors] * len(logits), path)
