"""Sampling: each token drawn from the target's processed distribution.

Idea: as greedy decoding, with a draw in place of the arg-max; transformers' processors (temperature, top-k, top-p,
min-p, penalties, …) shape the distribution. Each row has its own seed and does not depend on its batch.
Exact: the distribution of `transformers.generate(do_sample=True)`, including its default of top_k=50.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.greedy import decode_plainly
from specbeam.decoding.request import settle
from specbeam.engine.support import evaluating
from specbeam.sampling import draw, uniforms
from specbeam.trace import GenerationOutput


def sample_generate(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                    attention_mask: Tensor | None = None, *, seed: int | Sequence[int] = 0,
                    **options) -> GenerationOutput:
    """Plain sampling; arguments as in `greedy_generate`.

    seed: row b draws with seed + b; or one seed per row. `temperature`, `top_k`, … left unset come from the target's
    generation_config and transformers' defaults (top_k = 50; switch it off with top_k=0).
    """
    request = settle(target, input_ids, attention_mask, sampled=True, seed=seed, **options)

    def choose(scores: Tensor, live: list[int]) -> Tensor:
        uniform = uniforms([request.rows[row].generator for row in live], [1] * len(live), scores.device)
        return draw(scores.softmax(-1), uniform[:, 0])

    with evaluating(target):
        return decode_plainly(target, request, choose)
