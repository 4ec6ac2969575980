"""Rows become `summary.json`: figures of every method, and its speed-up over the baselines with an interval.

A speed-up is paired: the method's decode rate ÷ the baseline's on the same prompts, then the geometric mean over
prompts (and the median) with a 95 % bootstrap interval (Efron & Tibshirani 1993). Prompts that were decoded in one
batch share its seconds and are one unit. Units are resampled, and within each its repeats, so the interval holds both
how prompts differ and how the clock wobbles. Failed rows give no number.

Noise (A/A): a method against itself in another repeat, in the same way. docs/measuring.md says which figure is what.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from specbeam.decoding import BEAM_FAMILIES, METHODS, SAMPLED_FAMILIES, method_family
from specbeam.metrics.beams import beam_summary
from specbeam.metrics.exactness import first_difference
from specbeam.metrics.speed import (
    acceptance_by_position,
    acceptance_rate,
    batch_seconds,
    decode_rate,
    decode_tokens,
    drafts_trees,
    mean_accepted_length,
    proposed_by_position,
)

Row = dict[str, Any]
Prompt = tuple[str, int]  # prompt id and turn

# Of each family: our plain method, then transformers'.
BASELINES = {
    "greedy": ("greedy", "transformers_greedy"),
    "beam": ("beam", "transformers_beam"),
    "sample": ("sample", "transformers_sample"),
    "beam_sample": ("beam_sample", "transformers_beam_sample"),
    "diverse_beam": ("beam", "transformers_beam"),
    "stochastic_beam": ("beam", "transformers_beam"),
}
# Settings that may differ between two methods which must still give the same tokens.
_SAME_OUTPUT_ANYWAY = {"kind", "num_return_sequences", "temperature", *METHODS["speculative"].options,
                       *METHODS["speculative_beam"].options}
_RESAMPLES = 2000


def summarise(rows: Sequence[Row], methods: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """`{"methods": {label: figures}}` as DESIGN §5 fixes it; every label is there, also one without a single row.

    rows: dicts of `rows.jsonl`. methods: label → settings with a `kind`, in table order. A figure without data is
    None (never NaN, so the dict is JSON).
    """
    by_label: dict[str, list[Row]] = {label: [] for label in methods}
    failed: Counter[str] = Counter()
    for row in rows:
        if row["method"] not in by_label:
            continue
        if row["status"] == "ok":
            by_label[row["method"]].append(row)
        else:
            failed[row["method"]] += 1
    return {"methods": {label: _figures(label, by_label, methods, failed[label], seed) for label in methods}}


def baselines(label: str, methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Labels that `label` is compared with: of each kind in BASELINES the label of that name, else the first label
    of that kind; never itself."""
    found = []
    for kind in BASELINES[method_family(methods[label]["kind"], dict(methods[label]))]:
        own_kind = [other for other in methods if methods[other]["kind"] == kind]
        baseline = kind if kind in own_kind else next(iter(own_kind), None)
        if baseline is not None and baseline != label:
            found.append(baseline)
    return found


def _figures(
    label: str, by_label: Mapping[str, list[Row]], methods: Mapping[str, Mapping[str, Any]], failed: int, seed: int
) -> dict[str, Any]:
    rows, settings = by_label[label], methods[label]
    kind = settings["kind"]
    family = method_family(kind, dict(settings))
    compared = baselines(label, methods)
    seconds = batch_seconds(rows) if rows else None
    prefill = [row["prefill_seconds"] for row in rows]
    # Beam search may go on after its best hypothesis has ended: without speculation a round is a step all the same.
    accepted_length = mean_accepted_length(rows) if METHODS[kind].speculates or not rows else 1.0
    if kind == "openai_server":  # how it decodes is its own affair, unless it exposes what it drafted
        accepted_length = mean_accepted_length(rows) if any(row["drafted"] for row in rows) else None
    figures: dict[str, Any] = {
        "kind": kind,
        "family": family,
        "batched": METHODS[kind].batched,
        "prompts": len({_prompt(row) for row in rows}),
        "failed": failed,
        "new_tokens": sum(row["new_tokens"] for row in rows),
        "decode_tokens": decode_tokens(rows),
        "decode_seconds": _finite(seconds),
        "decode_tokens_per_second": _finite(decode_rate(rows)),
        "speedup": {},
        "noise": _finite(_noise(rows, seed)),
        "mean_accepted_length": _finite(accepted_length),
        "acceptance_rate": _finite(acceptance_rate(rows)),
        "acceptance_by_position": acceptance_by_position(rows),
        "proposed_by_position": proposed_by_position(rows),
        "trees": drafts_trees(rows),
        "lossy": settings.get("acceptance") == "typical",
        "identical_to": {},
        "prefill_seconds": _finite(float(np.median(prefill)) if prefill else None),
        "first_token_seconds": _first_token(rows, seed),
        "draft_share": _share(rows, "draft_seconds", seconds),
        "verify_share": _share(rows, "verify_seconds", seconds),
        "accept_share": _share(rows, "accept_seconds", seconds),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")),
                                 default=None),
        "finish_reasons": dict(sorted(Counter(row["finish_reason"] for row in rows).items())),
        "bleu": None,
        "perplexity": None,
    }
    if family in BEAM_FAMILIES:
        figures |= beam_summary(rows)
    if family == "stochastic_beam":
        figures["beam_gap"] = None  # its answers stand in the order drawn: the second may score more
    for baseline in compared:
        figures["speedup"][baseline] = {
            **_speedup(rows, by_label[baseline], seed), "noise": _finite(_noise(by_label[baseline], seed))}
    answers = {name: _answers(by_label[name]) for name in (label, *compared)}
    for baseline in compared:
        if same_output_expected(settings, methods[baseline]):
            figures["identical_to"][baseline] = _identity(answers, label, baseline)
    return figures


def _speedup(ours: Sequence[Row], theirs: Sequence[Row], seed: int) -> dict[str, Any]:
    """median, low, high; geometric_mean, geometric_low, geometric_high; `pairs` prompts counted in `units` (batches),
    `left_out` had no pair of rates."""
    rates = _paired_rates(ours, theirs)
    every = {_prompt(row) for row in (*ours, *theirs)}
    pairs = sum(len(prompts) for prompts, _ in rates)
    names = ("median", "low", "high", "geometric_mean", "geometric_low", "geometric_high")
    result: dict[str, Any] = {
        **dict.fromkeys(names),
        "pairs": pairs,
        "units": len(rates),
        "left_out": len(every) - pairs,
    }
    if not rates:
        return result
    ratios = np.array([np.median(mine) / np.median(base) for _, (mine, base) in rates])
    result["median"] = _finite(float(np.median(ratios)))
    result["geometric_mean"] = _finite(float(np.exp(np.mean(np.log(ratios)))))
    if len(rates) > 1 or len(rates[0][1][0]) > 1:
        ends = _bootstrap([pair for _, pair in rates], np.random.default_rng(seed))
        result |= {name: _finite(end) for name, end in zip(("low", "high", *names[4:]), ends, strict=True)}
    return result


def _noise(rows: Sequence[Row], seed: int) -> float | None:
    """A/A: 95 times in 100 the method's speed-up over itself, in another repeat, lies within 1/noise … noise.

    Of every unit two repeats are drawn, then the geometric mean over resampled units; None with a single repeat."""
    unit_of = _units(rows)
    cells: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((unit_of[_prompt(row)], row["repeat"]), []).append(row)
    size, rates = Counter(unit_of.values()), dict[int, list[float]]()
    for (unit, _), decoded in cells.items():
        rate = decode_rate(decoded)
        if rate is not None and len(decoded) == size[unit]:  # without a row that failed
            rates.setdefault(unit, []).append(math.log(rate))
    repeated = [own for own in rates.values() if len(own) > 1]
    if not repeated:
        return None
    random = np.random.default_rng(seed)
    apart = np.empty((_RESAMPLES, len(repeated)))
    for unit, own in enumerate(repeated):
        first = random.integers(len(own), size=_RESAMPLES)
        other = (first + random.integers(1, len(own), size=_RESAMPLES)) % len(own)
        apart[:, unit] = np.array(own)[first] - np.array(own)[other]
    units = random.integers(len(repeated), size=apart.shape)
    return float(np.exp(np.percentile(np.abs(np.take_along_axis(apart, units, 1).mean(1)), 95)))


def _first_token(rows: Sequence[Row], seed: int) -> dict[str, float | None]:
    """Seconds until a first new token is known: median over prompts (and of each over repeats), 95 % interval."""
    by_prompt: dict[Prompt, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(_prompt(row), []).append(row["prefill_seconds"])
    values = np.array([np.median(own) for own in by_prompt.values()])
    if not len(values):
        return dict.fromkeys(("median", "low", "high"))
    result: dict[str, float | None] = {"median": _finite(float(np.median(values))), "low": None, "high": None}
    if len(values) > 1:
        drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
        low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
        result |= {"low": _finite(float(low)), "high": _finite(float(high))}
    return result


def speedup_by_prompt(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[Prompt, float]:
    """Of each prompt that has one, its unit's speed-up; rows with status "ok"."""
    return {prompt: float(np.median(mine) / np.median(base)) for prompts, (mine, base) in _paired_rates(ours, theirs)
            for prompt in prompts}


def _paired_rates(ours: Sequence[Row], theirs: Sequence[Row]
                  ) -> list[tuple[list[Prompt], tuple[np.ndarray, np.ndarray]]]:  # fmt: skip
    """For each unit: its prompts, and both decode rates in every repeat where both have one."""
    unit_of = _units([*ours, *theirs])
    cells: dict[tuple[int, int], tuple[list[Row], list[Row]]] = {}
    for side, rows in enumerate((ours, theirs)):
        for row in rows:
            cells.setdefault((unit_of[_prompt(row)], row["repeat"]), ([], []))[side].append(row)
    prompts: dict[int, list[Prompt]] = {}
    for prompt, unit in unit_of.items():
        prompts.setdefault(unit, []).append(prompt)
    rates: dict[int, list[tuple[float, float]]] = {}
    for (unit, _), (mine, base) in cells.items():
        if {_prompt(row) for row in mine} != {_prompt(row) for row in base} or len(mine) != len(prompts[unit]):
            continue  # a row failed on one side: the two would be rates of different prompts
        pair = decode_rate(mine), decode_rate(base)
        if pair[0] is not None and pair[1] is not None:
            rates.setdefault(unit, []).append((pair[0], pair[1]))
    return [
        (prompts[unit], (np.array([p[0] for p in own]), np.array([p[1] for p in own])))
        for unit, own in sorted(rates.items())
    ]


def _units(rows: Iterable[Row]) -> dict[Prompt, int]:
    """Prompts that share a batch, in either method and any repeat, share a unit."""
    parent: dict[Prompt, Prompt] = {}

    def root(prompt: Prompt) -> Prompt:
        while parent.setdefault(prompt, prompt) != prompt:
            prompt = parent[prompt]
        return prompt

    first_of_batch: dict[str, Prompt] = {}
    for row in rows:
        prompt = _prompt(row)
        parent[root(prompt)] = root(first_of_batch.setdefault(row["batch_id"], prompt))
    numbers: dict[Prompt, int] = {}
    return {prompt: numbers.setdefault(root(prompt), len(numbers)) for prompt in parent}


def _bootstrap(pairs: Sequence[tuple[np.ndarray, np.ndarray]], random: np.random.Generator) -> list[float]:
    """95 % percentile intervals of the median ratio over units, then of their geometric mean; units are resampled, and
    the repeats within each."""
    count, most = len(pairs), max(len(mine) for mine, _ in pairs)
    repeats = np.array([len(mine) for mine, _ in pairs])
    table = np.zeros((2, count, most))
    for unit, pair in enumerate(pairs):
        for side in (0, 1):
            table[side, unit, : repeats[unit]] = pair[side]
    found = np.empty((2, _RESAMPLES))
    step = max(1, 1_000_000 // (count * most))  # bounds memory
    for start in range(0, _RESAMPLES, step):
        size = min(step, _RESAMPLES - start)
        units = random.integers(count, size=(size, count))
        drawn = []
        for side in (0, 1):
            which = (random.random((size, count, most)) * repeats[units][..., None]).astype(int)
            # a unit with fewer repeats draws among its own only
            drawn.append(np.median(table[side][units[..., None], which], axis=2))
        ratios = drawn[0] / drawn[1]
        found[0, start : start + size] = np.median(ratios, axis=1)
        found[1, start : start + size] = np.exp(np.log(ratios).mean(axis=1))
    return [float(end) for row in found for end in np.percentile(row, [2.5, 97.5])]


def _identity(answers: Mapping[str, Mapping[Prompt, list[Row]]], label: str, baseline: str) -> dict[str, Any]:
    """How many prompts have the same tokens in every repeat; where the first other one parts."""
    firsts = {name: {prompt: own[0] for prompt, own in answers[name].items()} for name in (label, baseline)}
    compared = comparable(firsts, label, baseline)
    same, first = 0, None
    for prompt in compared:
        theirs = firsts[baseline][prompt]["tokens"]
        different = [row for row in answers[label][prompt] if row["tokens"] != theirs]
        same += not different
        if different and first is None:
            first = {
                "prompt_id": prompt[0],
                "turn": prompt[1],
                "repeat": different[0]["repeat"],
                "position": first_difference(different[0]["tokens"], theirs),
            }
    return {"same": same, "of": len(compared), "first_difference": first}


def comparable(firsts: Mapping[str, Mapping[Prompt, Row]], label: str, baseline: str) -> list[Prompt]:
    """Prompts that both answered, after the same conversation: a later turn follows one's own earlier answers, so
    it counts only where those were the same."""
    ours, theirs = firsts.get(label, {}), firsts.get(baseline, {})

    def same_before(prompt_id: str, turn: int) -> bool:
        return all(
            (prompt_id, t) in ours
            and (prompt_id, t) in theirs
            and ours[prompt_id, t]["tokens"] == theirs[prompt_id, t]["tokens"]
            for t in range(turn)
        )

    return [prompt for prompt in ours if prompt in theirs and same_before(*prompt)]


def _answers(rows: Iterable[Row]) -> dict[Prompt, list[Row]]:
    """Rows of each prompt and turn, by repeat."""
    found: dict[Prompt, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        found.setdefault(_prompt(row), []).append(row)
    return found


def first_answers(rows: Iterable[Row]) -> dict[str, dict[Prompt, Row]]:
    """label → prompt and turn → its first row that succeeded."""
    found: dict[str, dict[Prompt, Row]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        own = found.setdefault(row["method"], {})
        if row["status"] == "ok":
            own.setdefault(_prompt(row), row)
    return found


def same_output_expected(settings: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Samples differ, and a label with another beam width or penalty does something else: nothing to verify."""
    family = method_family(settings["kind"], dict(settings))
    if family in SAMPLED_FAMILIES or family != method_family(other["kind"], dict(other)):
        return False

    def relevant(one: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in one.items() if name not in _SAME_OUTPUT_ANYWAY and value is not None}

    return relevant(settings) == relevant(other)


def _prompt(row: Row) -> Prompt:
    return row["prompt_id"], row["turn"]


def _share(rows: Sequence[Row], field: str, seconds: float | None) -> float | None:
    part = batch_seconds(rows, field) if rows else None
    return _finite(part / seconds) if part is not None and seconds else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
