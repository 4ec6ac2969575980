"""Texts against references: BLEU, chrF, ROUGE, and the number that an answer ends with.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's (Post 2018), of the whole corpus, with their
signatures; ROUGE-1/2/L (Lin 2004) is the rouge-score package's, a mean of sentences. Outputs without a reference do
not count. Intervals: 95 %, bootstrap over outputs, none for a single output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from typing import Any

import numpy as np

from specbeam.errors import InputError
from specbeam.metrics.score import RESAMPLES, SEED, Score, mean

ROUGE = ("rouge1", "rouge2", "rougeL")
_NUMBER = re.compile(r"(?:(?<!\w)[-−+])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Score | None:
    """Corpus BLEU, 0 … 100, with sacrebleu's defaults; None when no output has a reference.

    references: for each output its own list, of any length, empty where there are none.
    """
    from sacrebleu.metrics.bleu import BLEU

    return _corpus(BLEU, outputs, references)


def chrf(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Score | None:
    """Corpus chrF (chrF2: character 6-grams, recall twice as heavy), 0 … 100; arguments as in `bleu`."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus(CHRF, outputs, references)


def _corpus(kind: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Score | None:
    pairs = _with_references(outputs, references)
    if not pairs:
        return None
    most = max(len(own) for _, own in pairs)
    # sacrebleu wants one stream per reference number, None where an output has fewer.
    streams = [[own[i] if i < len(own) else None for _, own in pairs] for i in range(most)]
    texts = [output for output, _ in pairs]
    metric = kind()
    value = metric.corpus_score(texts, streams).score
    signature = f"{metric.get_signature()}"
    if len(pairs) < 2:
        return Score(value, None, None, 1, signature)
    # The steps of corpus_score(n_bootstrap=…), which in 2.6 stops at a resample that scores 0.
    counts = np.array(metric._extract_corpus_statistics(texts, streams))
    drawn = np.random.default_rng(SEED).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    resampled = [metric._compute_score_from_stats(counts[own].sum(0).tolist()).score for own in drawn]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(value, float(low), float(high), len(pairs), signature)


def rouge_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("rouge_score") is not None


def rouge(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Score]:
    """F-measures 0 … 100 of ROUGE-1, -2 and -L, the best of an output's references, mean over outputs; {} without any.

    rouge-score's own tokens (ASCII letters and digits, lower case), no stemming. Raises InputError where the package
    is missing.
    """
    pairs = _with_references(outputs, references)
    if not pairs:
        return {}
    if not rouge_installed():
        raise InputError("ROUGE needs the package rouge-score: pip install 'specbeam[rouge]'.")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    scored = [scorer.score_multi(own, output) for output, own in pairs]
    signature = f"F1|best of references|no stemming|rouge-score:{version('rouge-score')}"
    found = {name: mean([100 * one[name].fmeasure for one in scored], signature) for name in ROUGE}
    return {name: score for name, score in found.items() if score is not None}


def final_number(text: str) -> Decimal | None:
    """The number that a text ends with, or the one behind its last `####` (Cobbe et al. 2021, GSM8K); None: there is
    none. Thousands separators and dollar signs do not count: `$1,200.00` is 1200."""
    marked = text.rpartition("####")
    found = _NUMBER.search(marked[2]) if marked[1] else None
    if found is None:
        *_, found = [None, *_NUMBER.finditer(text)]
    if found is None:
        return None
    try:
        return Decimal(found[0].replace("−", "-").replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def is_numeric(reference: str) -> bool:
    """Whether a reference gives a number to match: nothing but a number, or a solution that ends in `#### 42`."""
    bare = _NUMBER.fullmatch(reference.strip().rstrip("."))
    return final_number(reference) is not None and (bare is not None or "####" in reference)


def exact_match(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Score | None:
    """Per cent of the outputs whose final number is that of one of their references, over those with a numeric one."""
    hits = []
    for output, own in zip(outputs, references, strict=True):
        wanted = {final_number(one) for one in own if is_numeric(one)}
        if wanted:
            hits.append(100.0 * (final_number(output) in wanted))
    return mean(hits, "final number, or the one behind ####")


def _with_references(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    return [(output, list(own)) for output, own in zip(outputs, references, strict=True) if own]
