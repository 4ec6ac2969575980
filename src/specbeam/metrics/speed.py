"""Decode rate, mean accepted length and acceptance, each by its one definition (DESIGN §1).

All functions take rows of `rows.jsonl` with status "ok", of one method. A figure without any data is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def batch_seconds(rows: Iterable[Row], field: str = "decode_seconds") -> float | None:
    """Seconds of all batches. Rows of one batch carry the same figure, which counts once; None if one lacks it."""
    by_batch: dict[str, float | None] = {}
    for row in rows:
        by_batch[row["batch_id"]] = row.get(field)
    values = list(by_batch.values())
    return None if not values or None in values else sum(v for v in values if v is not None)


def decode_tokens(rows: Iterable[Row]) -> int:
    """Tokens that decoding brought: all new tokens but those known when prefill ended."""
    return sum(row["new_tokens"] - row["first_tokens"] for row in rows)


def decode_rate(rows: Sequence[Row]) -> float | None:
    """Tokens per second of decoding: (Σ new − Σ first) ÷ decode seconds, the seconds of a batch once for all its
    rows. None where nothing was decoded (every answer ended in prefill)."""
    seconds, tokens = batch_seconds(rows), decode_tokens(rows)
    return tokens / seconds if seconds and tokens > 0 else None


def mean_accepted_length(rows: Sequence[Row]) -> float | None:
    """Committed tokens ÷ rounds. `committed` is taken from the row where it has one (beam search commits steps, and
    a hypothesis may end before the search does); otherwise it is the tokens that decoding brought."""
    rounds = sum(row["rounds"] for row in rows)
    committed = sum(row["new_tokens"] - row["first_tokens"] if row.get("committed") is None else row["committed"]
                    for row in rows)
    return committed / rounds if rounds else None


def acceptance_rate(rows: Sequence[Row]) -> float | None:
    """Accepted draft tokens ÷ drafted tokens."""
    drafted = sum(row["drafted"] for row in rows)
    return sum(row["accepted"] for row in rows) / drafted if drafted else None


def drafts_trees(rows: Iterable[Row]) -> bool:
    """Whether a round proposed more tokens than its path is long, so that they cannot all be accepted."""
    return any((row["drafted"] or 0) > sum(proposed for proposed, _ in row.get("accepted_by_position") or [])
               for row in rows)


def acceptance_by_position(rows: Sequence[Row]) -> list[float]:
    """Of the i-th proposals of all rounds, the part that was accepted; as long as the longest draft."""
    return [kept / proposed if proposed else 0.0 for proposed, kept in _by_position(rows)]


def proposed_by_position(rows: Sequence[Row]) -> list[int]:
    """How many i-th proposals there were."""
    return [proposed for proposed, _ in _by_position(rows)]


def _by_position(rows: Sequence[Row]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for row in rows:
        for position, (proposed, kept) in enumerate(row.get("accepted_by_position") or []):
            before = found[position] if position < len(found) else (0, 0)
            found[position: position + 1] = [(before[0] + proposed, before[1] + kept)]
    return found
