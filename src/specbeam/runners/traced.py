"""What a layer is made of while it is traced, so that fuse.py finds it again: products, norms, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specbeam.runners.fuse import _DTYPES, MOST_TOKENS, _norm, few, ops


class Product(nn.Linear):
    """nn.Linear, to be found again."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() != self.in_features and (input.dim() != 3 or not few(input)):  # a library's product
            return super().forward(input)
        return ops.linear.default(input, self.weight, self.bias)


class Head(Product):
    """The output layer, outside of any trace."""

    def forward(self, input: Tensor) -> Tensor:
        if (input.dim() != 3 or not few(input) or self.in_features % 8 or self.out_features % 8
                or input.dtype != self.weight.dtype or input.dtype not in _DTYPES):
            return nn.Linear.forward(self, input)
        return ops.product.default(input, None, None, None, 0.0, False, [self.weight], [self.bias], "", None, 0)


class Norm(nn.Module):
    """An RMSNorm, to be found again."""

    plus = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.norm.default(hidden_states, self.weight, eps_of(self), self.plus)


class PlusNorm(Norm):
    plus = True


def eps_of(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@torch.no_grad()
def norms(layers: list[Any]) -> dict[type, type]:
    """Which classes of these layers are an RMSNorm, by what they do."""
    found: dict[type, type] = {}
    parts = [part for layer in layers for part in layer.modules() if "RMSNorm" in type(part).__name__]
    for part in parts:
        kind, weight = type(part), dict(part.named_parameters()).get("weight")
        if found.get(kind, Norm) is nn.Module:
            continue
        same: type = nn.Module
        if (weight is not None and weight.dim() == 1 and len([*part.parameters()]) == 1
                and isinstance(getattr(part, "variance_epsilon", getattr(part, "eps", None)), float)):
            x = torch.linspace(-3, 2, len(weight), device=weight.device).to(weight.dtype)[None]
            for known in (Norm, PlusNorm):
                if torch.allclose(part(x).float(), _norm(x, weight, eps_of(part), known.plus).float(), 1e-2, 1e-3):
                    same = known
        found[kind] = same if found.get(kind, same) is same else nn.Module
    return {kind: known for kind, known in found.items() if known is not nn.Module}


def attend(before: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' attention interface: of few tokens, to be found again; else what was there before."""
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               dropout: float = 0.0, scaling: float | None = None, **options: Any) -> Any:
        unknown = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        if (query.shape[0] * query.shape[2] > MOST_TOKENS or attention_mask is None
                or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1 or unknown or dropout
                or value.shape != key.shape):
            return before(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        return ops.attention.default(query, key, value, attention_mask, scale), None
    return attend
