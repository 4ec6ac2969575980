"""From logits to the next token: transformers' own processors, and seeded draws.

All arithmetic is on fp32 scores, as in `generate`; a draw inverts the distribution function in fp64 with a uniform
number from the row's own generator, so that a row's tokens depend on its seed and not on its batch or its device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specbeam.errors import InputError

# These look at the scores only (a subclass may do otherwise). With nothing else in the list, all rows and nodes go
# through in one call.
_IGNORES_HISTORY = (
    hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper, hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor, hf.LogitNormalization,
)

# These make log-probabilities smaller, never larger.
_LOWERS = (
    hf.RepetitionPenaltyLogitsProcessor, hf.NoRepeatNGramLogitsProcessor, hf.NoBadWordsLogitsProcessor,
    hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor, hf.SuppressTokensLogitsProcessor,
    hf.PrefixConstrainedLogitsProcessor,
)

Path = Callable[[int, int], Sequence[int] | np.ndarray]


def process(logits: Tensor, processors: Sequence[LogitsProcessorList], path: Path) -> Tensor:
    """Scores [rows, nodes, vocabulary] fp32 after each row's processors.

    logits: [rows, nodes, vocabulary], any float dtype (beam search hands over log-probabilities, as `generate`
    does). path(row, node): every token before the one that these logits predict, the prompt included. Each node is
    processed with its own path, so that a repetition penalty in a tree sees what plain decoding would see. Rows that
    share one list of processors go through it together.
    """
    scores = logits.float()
    if not any(processors):
        return scores
    if all(type(one) in _IGNORES_HISTORY for row in processors for one in row):
        none = torch.empty(scores.shape[0] * scores.shape[1], 0, dtype=torch.long, device=scores.device)
        return processors[0](cast(LongTensor, none), cast(FloatTensor, scores.flatten(0, 1))).view(scores.shape)
    done = torch.empty_like(scores)
    together: dict[tuple[int, int], list[tuple[int, int, Any]]] = {}  # one call each
    for row, chosen in enumerate(processors):
        for node in range(scores.shape[1]):
            ids = path(row, node)
            together.setdefault((id(chosen), len(ids)), []).append((row, node, ids))
    for group in together.values():
        rows, nodes, paths = (list(column) for column in zip(*group, strict=True))
        history = torch.from_numpy(np.array(paths)).to(scores.device)
        if len(together) == 1:
            same = scores.flatten(0, 1).clone()  # a processor may write into what it is given
            return processors[0](cast(LongTensor, history), cast(FloatTensor, same)).view(scores.shape)
        done[rows, nodes] = processors[rows[0]](cast(LongTensor, history), cast(FloatTensor, scores[rows, nodes]))
    return done


def lowers(processors: LogitsProcessorList) -> bool:
    """Whether no log-probability is above 0 behind them. (A repetition penalty below 1 lifts them, but only to 0.)"""
    return all(type(one) in _LOWERS for one in processors)


def uniforms(generators: Sequence[torch.Generator], counts: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers [rows, max(counts)] fp64 in [0, 1): row b takes counts[b] from its own generator, rest 0."""
    numbers = torch.zeros(len(generators), max(counts, default=0), dtype=torch.float64)
    for row, (generator, count) in enumerate(zip(generators, counts, strict=True)):
        numbers[row, :count] = torch.rand(count, generator=generator, dtype=torch.float64)
    return numbers.to(device)


def gumbels(generators: Sequence[torch.Generator], count: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [rows, count] fp64, each row from its own generator."""
    return -(-uniforms(generators, [count] * len(generators), device).log()).log()


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [rows] drawn in proportion to non-negative weights [rows, vocabulary] by uniform numbers [rows].

    The smallest token whose cumulative weight exceeds `uniform` × total: one of weight 0 is never drawn.
    Raises InputError where no token has a weight (all are excluded by processors, or the logits are NaN).
    """
    tokens = invert(weights, uniform)
    refuse_nothing(bool((tokens < 0).any()))
    return tokens


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The same without waiting for the device: -1 where there is nothing to draw."""
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1]
    below = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, below[:, None], right=True).squeeze(1)
    return torch.where(total > 0, tokens, -1)


def refuse_nothing(nothing: bool) -> None:
    if nothing:
        raise InputError("there is no token to draw: the options exclude all of them, or the model's logits are NaN.")
