"""Which proposals survive. Pure functions; n is the number of proposed nodes, parents come before children.

Greedy: follow the target's own choice. Sampling: rules that leave the target's distribution as it is, whatever the
draft proposed, as long as q is what the proposals were drawn from. A token that is a function of its prefix
(`q` None) is a point of probability one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specbeam.sampling import draw

Draw = Callable[[Tensor, Tensor], Tensor]


def follow(tokens: Sequence[int], parents: Sequence[int], best: Sequence[int]) -> tuple[list[int], int]:
    """Greedy: the path of proposals that equal the target's choices, and the choice after it.

    best: [n + 1], the target's arg-max after the committed text (first) and after each node.
    """
    path: list[int] = []
    at = -1
    while True:
        wanted = best[at + 1]
        at = next((node for node in range(at + 1, len(tokens)) if parents[node] == at and tokens[node] == wanted), -2)
        if at == -2:
            return path, wanted
        path.append(at)


def rejection_sample(proposed: Tensor, p: Tensor, q: Tensor | None, lengths: Tensor, uniform: Tensor,
                     draw: Draw = draw) -> tuple[Tensor, Tensor]:
    """Chains: accepted [rows] and the token [rows] that follows the accepted ones.

    Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318): accept x ~ q with
    probability min(1, p(x) / q(x)); at the first rejection draw from the residual max(0, p - q), normalised; if all
    are accepted draw one more from p.

    proposed: [rows, γ] long; row b's first lengths[b] count. p: [rows, γ + 1, vocabulary], the target's probabilities
    after each prefix. q: [rows, ≥ γ, vocabulary], the draft's, or None. uniform: [rows, γ + 1] fp64: one per proposal,
    and in column lengths[b] the final draw. draw: how (sampling.py; within a recorded function `invert`).
    """
    rows, gamma = proposed.shape
    p_token, q_token = _of_tokens(proposed, p, q)
    within = torch.arange(gamma, device=proposed.device) < lengths[:, None]
    # u < p/q without the division: q(x) > 0 for a token that was drawn from q.
    kept = (uniform[:, :gamma] * q_token < p_token) & within
    accepted = kept.long().cumprod(1).sum(1)
    scale = torch.ones(rows, dtype=torch.float64, device=p.device)
    return accepted, _after(proposed, p, q, lengths, accepted, scale, uniform, draw)


def block_verification(proposed: Tensor, p: Tensor, q: Tensor | None, lengths: Tensor, uniform: Tensor,
                       draw: Draw = draw) -> tuple[Tensor, Tensor]:
    """Chains, judged as a whole: never accepts fewer tokens in expectation than `rejection_sample`.

    Sun et al. 2024 (arXiv 2403.10444, algorithm 2). With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)), prefix i
    is accepted with probability h_i = S_i / (S_i + 1 - w_i), S_i = Σ_x max(0, w_i p(x) - q(x)) after prefix i, and
    h_γ = w_γ; the longest accepted prefix counts, and the token after it is drawn from max(0, w p - q), normalised.
    Arguments as in `rejection_sample`.
    """
    rows, gamma = proposed.shape
    p_token, q_token = _of_tokens(proposed, p, q)
    weight = torch.ones(rows, dtype=torch.float64, device=p.device)
    weights, accepted = [weight], torch.zeros(rows, dtype=torch.long, device=p.device)
    for i in range(gamma):
        weight = (weight * p_token[:, i] / q_token[:, i]).nan_to_num(0.0).clamp(max=1.0)
        weights.append(weight)
        chance = weight  # of the last one
        if i + 1 < gamma:
            left = _residual(p[:, i + 1], None if q is None else q[:, i + 1], proposed[:, i + 1], weight).sum(1)
            chance = (left / (left + 1 - weight)).nan_to_num(1.0)
        chance = torch.where(lengths == i + 1, weight, chance)
        accepted = torch.where((uniform[:, i] < chance) & (i < lengths), i + 1, accepted)
    scale = torch.stack(weights, 1).gather(1, accepted[:, None]).squeeze(1)
    return accepted, _after(proposed, p, q, lengths, accepted, scale, uniform, draw)


def sample_tree(tokens: Sequence[int], parents: Sequence[int], p: Tensor, q: Tensor | None, uniform: Tensor
                ) -> tuple[list[int], int]:
    """One row's tree: the accepted path, and the token that follows it.

    Recursive rejection over siblings drawn without replacement (Sequoia, arXiv 2402.12374, algorithm 2; for siblings
    drawn independently SpecInfer, arXiv 2305.09781): try them in the order they were drawn; after a rejected x, p
    becomes its residual max(0, p - q), normalised, and q loses x and is normalised again.

    p, q: [n + 1, vocabulary] after the committed text and after each node. uniform: [n + 1] fp64, one per node and
    one for the final draw.
    """
    path: list[int] = []
    at = -1
    while True:
        left = p[at + 1].double()
        mine = q[at + 1].double().clone() if q is not None and at + 1 < len(q) else None  # leaves drew nothing
        taken = None
        for node in range(at + 1, len(tokens)):
            if parents[node] != at:
                continue
            x = tokens[node]
            # A node of which q has nothing left was never drawn (fewer tokens than siblings): it cannot be accepted.
            chance = float(left[x]) if mine is None else float(left[x] / mine[x]) if float(mine[x]) > 0 else 0.0
            if float(uniform[node]) < chance:
                taken = node
                break
            if mine is None:
                left = left.clone()
                left[x] = 0.0
            elif float(mine[x]) > 0:
                residual = (left - mine).clamp(min=0)
                left = residual if float(residual.sum()) > 0 else left
                mine[x] = 0.0
                mine = mine / mine.sum().clamp(min=1e-300)
            left = left / left.sum().clamp(min=1e-300)
        if taken is None:
            return path, int(draw(left[None], uniform[-1:]))
        path.append(taken)
        at = taken


def typical(tokens: Sequence[int], parents: Sequence[int], p: Tensor, uniform: Tensor) -> tuple[list[int], int]:
    """LOSSY: keep a proposal that the target finds probable enough; the output is not distributed as p.

    Medusa (Cai et al. 2024, arXiv 2401.10774, section 3.3.1): x is kept if p(x) > min(0.09, 0.3 exp(-H(p))), H the
    entropy in nats. Arguments as in `sample_tree`; the token behind the path is drawn from p.
    """
    path: list[int] = []
    at = -1
    while True:
        here = p[at + 1].double()
        enough = min(0.09, 0.3 * float(torch.exp(torch.special.entr(here).sum().neg())))
        following = (node for node in range(at + 1, len(tokens)) if parents[node] == at)
        at = next((node for node in following if float(here[tokens[node]]) > enough), -2)
        if at == -2:
            return path, int(draw(here[None], uniform[-1:]))
        path.append(at)


def _of_tokens(proposed: Tensor, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and q [rows, γ] fp64 of the proposed tokens."""
    gamma = proposed.shape[1]
    p_token = p[:, :gamma].gather(2, proposed[..., None]).squeeze(2).double()
    if q is None:
        return p_token, torch.ones_like(p_token)
    return p_token, q[:, :gamma].gather(2, proposed[..., None]).squeeze(2).double()


def _residual(p: Tensor, q: Tensor | None, token: Tensor, scale: Tensor) -> Tensor:
    """max(0, scale p - q) [rows, vocabulary] fp64; where nothing was drawn, q is 1 at `token`."""
    scaled = p.double() * scale[:, None]
    if q is not None:
        return (scaled - q.double()).clamp(min=0)
    return scaled.scatter(1, token[:, None], 0.0)


def _after(proposed: Tensor, p: Tensor, q: Tensor | None, lengths: Tensor, accepted: Tensor, scale: Tensor,
           uniform: Tensor, draw: Draw) -> Tensor:
    """The token [rows] behind the accepted ones: from p if all were accepted, else from the residual."""
    everyone, gamma = torch.arange(len(p), device=p.device), proposed.shape[1]
    weights = p_next = p[everyone, accepted].double()
    if gamma:
        place = accepted.clamp(max=gamma - 1)
        residual = _residual(p_next, None if q is None else q[everyone, place], proposed[everyone, place], scale)
        weights = torch.where((accepted < lengths)[:, None], residual, p_next)
    # p = q up to rounding leaves nothing of the residual; a rejection there has probability ~ 0.
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, p_next)
    return draw(weights, uniform.gather(1, lengths[:, None]).squeeze(1))
