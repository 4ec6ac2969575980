"""Whether two outputs are the same tokens; if not, where they part and how near a tie the target was there.

In float32 on a CPU different tokens are a fault. In bf16 a near-tie may flip with the number of tokens scored at
once: the logit gap tells one from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Position of the first token that differs (one list may just be shorter); None when they are the same."""
    for position, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            return position
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def logit_gap(target: PreTrainedModel, context: Sequence[int], ours: Sequence[int],
              theirs: Sequence[int]) -> float | None:
    """How much the target prefers its top token over the other one, where the outputs part.

    The target's logit of its most probable token minus the lower logit of the two that were chosen, after the
    context and the tokens in common, from one plain forward (raw logits, without processors). Near 0: a tie.
    None when the outputs are the same, or one of them ends there.
    """
    position = first_difference(ours, theirs)
    if position is None or position >= min(len(ours), len(theirs)):
        return None
    from specbeam.metrics.likelihood import next_token_logits

    logits = next_token_logits(target, [*context, *ours[:position]])
    return float(logits.max() - min(logits[ours[position]], logits[theirs[position]]))
