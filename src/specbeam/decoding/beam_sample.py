"""Beam sampling: beam search whose candidates are drawn, not ranked.

transformers' `generate(num_beams=…, do_sample=True)`.
Idea: a step draws its candidates without replacement, in proportion to the exponentials of the cumulative scores
(temperature, top-k, … applied), and goes on with the best of the drawn. The rest is beam.py: of the first `num_beams`
drawn, those that end join the finished pool.
Exact: the distribution of `generate`; scores are those of beam search under the processed log-probabilities. A draw
without replacement is the top-k of scores with Gumbel noise (Vieira 2014; Kool et al. 2019, arXiv 1903.06059).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.beam import check_beams, ranking, search_beams
from specbeam.decoding.request import settle
from specbeam.decoding.sample import sample_generate
from specbeam.engine.support import evaluating
from specbeam.sampling import gumbels
from specbeam.trace import GenerationOutput


def beam_sample_generate(
    target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None, *,
    num_beams: int = 4, num_return_sequences: int = 1, seed: int | Sequence[int] = 0, **options,
) -> GenerationOutput:
    """Beam sampling; `temperature`, `top_k`, `seed`, … as in `sample_generate`, the rest and the result as in
    `beam_generate`. One beam is plain sampling, as in `generate`."""
    check_beams(num_beams, num_return_sequences, options)
    if num_beams == 1:
        return sample_generate(target, input_ids, attention_mask, seed=seed, **options)
    request = settle(target, input_ids, attention_mask, sampled=True, beams=(num_beams, num_return_sequences),
                     seed=seed, **options)

    def draw(total: Tensor, keep: int, live: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise = gumbels([request.rows[row].generator for row in live], total.shape[1], total.device)
        index = (total.double() + noise).topk(keep).indices
        return total.gather(1, index), index

    with evaluating(target):
        return search_beams(target, request, replace(ranking(request), candidates=draw), num_return_sequences)
