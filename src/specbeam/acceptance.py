"""Which proposals survive. Pure functions on tensors; γ is the longest draft of the batch.

Rows may have drafted less than γ: `lengths` [rows] says how much; what lies behind is ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specbeam.sampling import draw


def greedy_match(proposed: Tensor, best: Tensor, lengths: Tensor) -> Tensor:
    """Accepted [rows]: how many proposals equal the target's own choice before the first that does not.

    proposed: [rows, γ] long. best: [rows, γ + 1] long, the target's arg-max after each prefix.
    """
    within = torch.arange(proposed.shape[1], device=proposed.device) < lengths[:, None]
    return ((proposed == best[:, :-1]) & within).long().cumprod(1).sum(1)


def rejection_sample(proposed: Tensor, p: Tensor, q: Tensor, lengths: Tensor, uniform: Tensor
                     ) -> tuple[Tensor, Tensor]:
    """Accepted [rows] and the token [rows] that follows the accepted ones.

    Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318): accept x ~ q with
    probability min(1, p(x) / q(x)); at the first rejection draw from the residual max(0, p - q), normalised; if all
    are accepted draw one more from p. The output is distributed as p, whatever q is, if x was drawn from this q.

    proposed: [rows, γ] long. p: [rows, γ + 1, vocabulary], the target's probabilities after each prefix. q: [rows, γ,
    vocabulary], the draft's. uniform: [rows, γ + 1] fp64: one per proposal, and in column `lengths` the final draw.
    """
    rows, gamma = proposed.shape
    token = proposed[..., None]
    p_token = p[:, :gamma].gather(2, token).squeeze(2).double()
    q_token = q.gather(2, token).squeeze(2).double()
    within = torch.arange(gamma, device=proposed.device) < lengths[:, None]
    # u < p/q without the division: q(x) > 0 for a token that was drawn from q.
    kept = (uniform[:, :gamma] * q_token < p_token) & within
    accepted = kept.long().cumprod(1).sum(1)

    everyone = torch.arange(rows, device=proposed.device)
    p_next = p[everyone, accepted].double()
    rejected = accepted < lengths
    q_next = q[everyone, accepted.clamp(max=gamma - 1)].double() if gamma else torch.zeros_like(p_next)
    weights = torch.where(rejected[:, None], (p_next - q_next).clamp(min=0), p_next)
    # p = q up to rounding leaves nothing of the residual; a rejection there has probability ~ 0.
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, p_next)
    return accepted, draw(weights, uniform.gather(1, lengths[:, None]).squeeze(1))
