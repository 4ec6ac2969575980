"""BLEU of outputs that have references (Papineni et al. 2002), by sacrebleu (Post 2018), with its signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU, 0 … 100. `signature` says how it was computed; a BLEU without one cannot be compared."""

    score: float
    signature: str
    sentences: int  # outputs that had references


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Bleu | None:
    """Corpus BLEU over the outputs with at least one reference; None when no output has any.

    references: for each output its own list, of any length, empty where there are none.
    """
    pairs = [(output, list(own)) for output, own in zip(outputs, references, strict=True) if own]
    if not pairs:
        return None
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    most = max(len(own) for _, own in pairs)
    # sacrebleu wants one stream per reference number, None where an output has fewer.
    streams = [[own[i] if i < len(own) else None for _, own in pairs] for i in range(most)]
    score = metric.corpus_score([output for output, _ in pairs], streams)  # type: ignore[arg-type]
    return Bleu(score.score, str(metric.get_signature()), len(pairs))
