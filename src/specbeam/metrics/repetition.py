"""How much an answer repeats itself, in tokens.

Distinct-n: Li et al. 2016 (arXiv 1510.03055, section 5.1), here within one answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from specbeam.metrics.beams import distinct

__all__ = ["distinct", "longest_repeated_span"]


def longest_repeated_span(tokens: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands in the answer twice; the two may overlap (`a a a a`: 3)."""

    def repeats(length: int) -> bool:
        seen = set()
        for start in range(len(tokens) - length + 1):
            span = tuple(tokens[start:start + length])
            if span in seen:
                return True
            seen.add(span)
        return False

    low, high = 0, max(0, len(tokens) - 1)  # what repeats at one length repeats at all shorter ones
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repeats(middle) else (low, middle - 1)
    return low
