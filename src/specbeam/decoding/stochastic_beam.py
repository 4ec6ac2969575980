"""Stochastic beam search: answers drawn without replacement, with probabilities exact enough to estimate by.

Kool et al. 2019 (arXiv 1903.06059).
Idea: give every possible answer its log-probability plus Gumbel noise; the `num_beams` largest are a draw without
replacement. The largest of a prefix's answers can be drawn before them, and those of its continuations given it (the
paper's equations 23 and 24), so a beam search over perturbed log-probabilities finds them without listing all answers.
Exact: draws and their order are distributed as sampling without replacement from `sample_generate`'s distribution.
The `threshold` is the largest perturbed log-probability that was left out, so that the sum of weight × f over a row's
answers is an unbiased estimate of the mean of f. Where it differs: the root's noise is drawn too (the paper's algorithm
1 sets it to 0, where the threshold's law is another), and the threshold comes from what was dropped, not from one beam
more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.beam import Ranked, check_beams, endings, search
from specbeam.decoding.request import refuse_impossible, settle
from specbeam.engine.support import evaluating
from specbeam.errors import InputError
from specbeam.sampling import gumbels, process
from specbeam.trace import GenerationOutput, Hypothesis


@dataclass(frozen=True)
class Draw(Hypothesis):
    """One of several answers drawn without replacement. score: its log-probability; perturbed: with its noise, what the
    draws are ordered by; threshold: the largest that was not drawn, the same for all answers of a row (-inf: all of
    the distribution was drawn)."""

    perturbed: float = 0.0
    threshold: float = -math.inf

    @property
    def inclusion(self) -> float:
        """Probability that this answer is among the drawn, given the threshold."""
        return -math.expm1(-math.exp(min((self.score or 0.0) - self.threshold, 700.0)))

    @property
    def weight(self) -> float:
        """Its probability ÷ its inclusion probability: the importance weight (section 4.2)."""
        score = self.score or 0.0
        rare = score - self.threshold < -20  # both are nearly 0, their ratio is not
        return math.exp(self.threshold) if rare else math.exp(score) / self.inclusion


@dataclass(frozen=True)
class Draws:
    """The search's state for one row: places, best first, of which some have ended.

    log_probs: of each place's prefix; -inf: an empty place. perturbed: the largest among its answers. reasons: what
    ended it; None: it runs on. threshold: the largest of what was dropped so far.
    """

    tokens: list[list[int]]
    origins: list[list[int]]
    log_probs: list[float]
    perturbed: list[float]
    reasons: list[str | None]
    threshold: float

    def runs(self) -> list[bool]:
        """Which places run on."""
        return [not why and score > -math.inf for why, score in zip(self.reasons, self.log_probs, strict=True)]

    def front(self) -> tuple[list[int], list[int]]:
        """An ended or empty place reads something harmless, so that all rows are of one width."""
        return [ids[-1] for ids in self.tokens], [path[-1] for path in self.origins]

    def hypotheses(self, count: int) -> list[Hypothesis]:
        threshold = max([self.threshold, *self.perturbed[count:]])
        found: list[Hypothesis] = [
            Draw(ids, score, reason or "length", tuple(path), noisy, threshold) for ids, path, score, noisy, reason
            in zip(self.tokens, self.origins, self.log_probs, self.perturbed, self.reasons, strict=True)
            if score > -math.inf]
        return found[:count]


def stochastic_beam_generate(
    target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None, *,
    num_beams: int = 4, num_return_sequences: int | None = None, seed: int | Sequence[int] = 0, **options,
) -> GenerationOutput:
    """Each row's `hypotheses` are `num_return_sequences` (default: num_beams) different answers in the order drawn,
    fewer where the distribution has fewer; each is a `Draw`. An answer cut off at max_new_tokens counts as one.

    Options as in `sample_generate`, whose distribution this is: top_k is 50 unless the checkpoint or the caller says
    otherwise (0 estimates under the model itself). length_penalty and early_stopping have no meaning here.
    """
    returned = num_beams if num_return_sequences is None else num_return_sequences
    check_beams(num_beams, returned, options)
    for name in ("length_penalty", "early_stopping"):
        if options.get(name) is not None:
            raise InputError(f"{name} has no effect on stochastic beam search, which draws by probability: leave it "
                             "out, or use beam_generate.")
    request = settle(target, input_ids, attention_mask, sampled=True, seed=seed, searches=True, **options)

    def advance(states: list[Draws], logits: Tensor, live: list[int]) -> tuple[list[Draws], list[bool], Ranked | None]:
        scores = process(logits, [request.rows[row].processors for row in live],
                         lambda i, place: request.rows[live[i]].prompt + states[i].tokens[place])
        before = [torch.tensor([getattr(state, name) for state in states], dtype=torch.float64, device=scores.device)
                  for name in ("log_probs", "perturbed")]
        log_probs = scores.double().log_softmax(-1) + before[0][..., None]
        noise = gumbels([request.rows[row].generator for row in live], log_probs[0].numel(), scores.device)
        perturbed = conditioned(log_probs + noise.view(log_probs.shape), before[1][..., None])
        runs = torch.tensor([state.runs() for state in states], device=scores.device)
        for state, row in zip(states, live, strict=True):
            for tokens, on in zip(state.tokens, state.runs(), strict=True):
                if on:
                    refuse_impossible(request.rows[row], tokens)
            request.rows[row].impossible.clear()
        if bool(perturbed[runs].isnan().any()):
            raise InputError("there is no token to draw: the options exclude all of them, or the model's logits are "
                             "NaN.")
        perturbed[~runs] = -torch.inf
        perturbed[..., 0] = torch.where(runs, perturbed[..., 0], before[1])  # an ended answer stays
        values, index = perturbed.flatten(1).topk(min(num_beams + 1, perturbed[0].numel()))
        found = log_probs.flatten(1).gather(1, index).tolist()
        places = index.tolist()
        pairs = [[divmod(place, scores.shape[-1]) for place in row[:num_beams]] for row in places]  # (origin, token)
        ends = endings([[token for _, token in row] for row in pairs],
                       lambda i: [states[i].tokens[origin] for origin, _ in pairs[i]],
                       [1 + max(map(len, state.tokens)) for state in states], request, live, scores.device)
        after = [_kept(*row) for row in zip(states, pairs, ends, values.tolist(), found, strict=True)]
        ranked = Ranked(*map(list, zip(*(_ranked(*row, scores.shape[-1]) for row in zip(
            states, after, places, found, strict=True)), strict=True))) if request.trace else None
        return after, [not any(state.runs()) for state in after], ranked

    starts = []
    for row in request.rows:
        [[noise]] = gumbels([row.generator], 1, torch.device("cpu")).tolist()
        empty = [-math.inf] * (num_beams - 1)
        nothing: list[list[int]] = [[]] * num_beams
        starts.append(Draws(nothing, nothing, [0.0, *empty], [noise, *empty], [None] * num_beams, -math.inf))
    with evaluating(target):
        return search(target, request, starts, num_beams, advance, returned)


def conditioned(noisy: Tensor, largest: Tensor) -> Tensor:
    """Gumbel variables [..., n] as if drawn given that their maximum is `largest` [..., 1] (appendix B.3)."""
    below = noisy - noisy.amax(-1, keepdim=True)
    v = largest - noisy + torch.where(below > -0.693, (-below.expm1()).log(), (-below.exp()).log1p())
    return largest - v.clamp(min=0) - (-v.abs()).exp().log1p()


def _ranked(state: Draws, after: Draws, index: list[int], log_probs: list[float], vocabulary: int) -> tuple[list, ...]:
    """A row's step for the search tree (beam.Ranked): what ran on before, and where it went. A pool place is a place of
    the search whose answer has ended."""
    most = len(after.tokens)
    candidates: list[tuple[int, int, float, str | None]] = []
    chosen, pool = [-1] * most, [-1] * most
    for place, (origin, token, score) in enumerate(
            (*divmod(one, vocabulary), score) for one, score in zip(index, log_probs, strict=True)):
        why = after.reasons[place] if place < most else None
        if state.reasons[origin] is None and score > -math.inf:
            if place < most and why is None:
                chosen[place] = len(candidates)
            elif place < most:
                pool[place] = most + len(candidates)
            candidates.append((token, origin, score, why))
        elif place < most and why is not None:
            pool[place] = origin
    columns = zip(*candidates, strict=True) if candidates else ((),) * 4
    return (*map(list, columns), chosen, pool, after.log_probs)


def _kept(state: Draws, found: Sequence[tuple[int, int]], ends: Sequence[str | None], perturbed: list[float],
          log_probs: list[float]) -> Draws:
    """The places after a step, of the best candidates: the place each continues and its token, what ends it, noisy and
    plain value."""
    most = len(state.tokens)
    after = Draws([], [], [], perturbed[:most], [], max([state.threshold, *perturbed[most:]]))
    for (origin, token), why, score, noisy in zip(found, ends, log_probs, perturbed, strict=False):
        if state.reasons[origin] is not None:
            tokens, path, score, why = (state.tokens[origin], state.origins[origin], state.log_probs[origin],
                                        state.reasons[origin])
        elif noisy == -math.inf:
            tokens, path, score, why = [0], [0], -math.inf, None
        else:
            tokens, path = [*state.tokens[origin], token], [*state.origins[origin], origin]
        after.tokens.append(tokens)
        after.origins.append(path)
        after.log_probs.append(score)
        after.reasons.append(why)
    return after
