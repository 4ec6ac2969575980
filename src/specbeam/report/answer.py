"""The answer first: which method to use here, in one sentence with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAMILIES = {"greedy": "greedy decoding", "sample": "sampling", "beam": "beam search", "beam_sample": "beam sampling",
            "diverse_beam": "diverse beam search", "stochastic_beam": "stochastic beam search"}


def answers(summary: Mapping[str, Any]) -> list[str]:
    """One sentence for each family that has something to compare, greedy first; never empty."""
    methods = summary.get("methods") or {}
    sentences: list[str] = []
    for family, name in FAMILIES.items():
        own = {label: figures for label, figures in methods.items()
               if figures.get("family") == family and figures.get("decode_tokens_per_second")}
        if len(own) > 1:
            sentences.append(_sentence(name, own, "Use" if not sentences else f"For {name} use"))
            sentences += _why_not(own)
        elif own:
            [(label, figures)] = own.items()
            sentences.append(f"{label} decodes {rate(figures)} tokens a second; there is no other {name} method in "
                             "this run to compare it with.")
    return sentences or ["This run has no figures: no method decoded anything."]


def rounded(summary: Mapping[str, Any]) -> bool:
    """Whether specbeam's methods ran a target rounded to int8."""
    return "int8" in (summary.get("runner") or {}).get("target", "")


def rate(figures: Mapping[str, Any]) -> str:
    """Decode rate with about three digits."""
    value = figures["decode_tokens_per_second"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def shown(speedup: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """The geometric mean over prompts and its 95 % interval (of older runs: the median and its)."""
    if speedup.get("geometric_low") is not None or speedup.get("low") is None:
        value = speedup.get("geometric_mean") or speedup.get("median")
        return value, speedup.get("geometric_low"), speedup.get("geometric_high")
    return speedup.get("median"), speedup["low"], speedup["high"]


def interval(speedup: Mapping[str, Any]) -> str:
    """`1.62 (1.41–1.80)`, without the bracket where there is no interval, a dash where there is no figure; inside the
    machine's noise `no difference (0.98–1.03)`."""
    value, low, high = shown(speedup)
    if value is None:
        return "–"
    text = "no difference" if within_noise(speedup) else f"{value:.2f}"
    return text if low is None else f"{text} ({low:.2f}–{high:.2f})"


def within_noise(speedup: Mapping[str, Any]) -> bool:
    """The baseline against itself (A/A) comes out as far from 1."""
    value, noise = shown(speedup)[0], speedup.get("noise")
    return bool(value and noise) and 1 / noise <= value <= noise  # type: ignore[operator]


def no_difference(speedup: Mapping[str, Any]) -> bool:
    """The interval holds 1, or the machine's noise is as large."""
    _, low, high = shown(speedup)
    return within_noise(speedup) or (low is not None and high is not None and low <= 1.0 <= high)


def _sentence(name: str, own: Mapping[str, Mapping[str, Any]], use: str) -> str:
    best = max(own, key=lambda label: own[label]["decode_tokens_per_second"])
    figures = own[best]
    speedups = {baseline: one for baseline, one in figures["speedup"].items() if one.get("median") is not None}
    if not speedups:
        others = [label for label in own if label != best]
        second = max(others, key=lambda label: own[label]["decode_tokens_per_second"])
        against = own[second]["speedup"].get(best) or {}
        behind = _against(against, best) if against.get("median") else f"{rate(own[second])} tokens a second"
        return (f"{use} {best}: at {rate(figures)} tokens a second it is the fastest of the {name} methods; next is "
                f"{second} with {behind}.")
    if all(no_difference(one) for one in speedups.values()):
        found = " and ".join(_against(one, baseline) for baseline, one in speedups.items())
        return (f"{best} is fastest of the {name} methods, at {rate(figures)} tokens a second, but not beyond doubt: "
                f"{found}.")
    over = " and ".join(_times(one, baseline, first=not number)
                        for number, (baseline, one) in enumerate(speedups.items()))
    return f"{use} {best}: it decodes {rate(figures)} tokens a second, {over}{_tokens(figures)}."


def _why_not(own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where no speculation is surely faster than plain decoding: what a round of the fastest brings, and takes."""
    drafted = {label: figures for label, figures in own.items()
               if figures.get("kind") == "speculative" and (figures.get("mean_accepted_length") or 1) > 1}
    plain = next((baseline for figures in drafted.values() for baseline in figures["speedup"]
                  if own.get(baseline, {}).get("kind") in ("greedy", "sample")), "")
    over = {label: figures["speedup"].get(plain) or {} for label, figures in drafted.items()}
    times = {label: shown(one)[0] or 0.0 for label, one in over.items()}
    if not any(times.values()) or any(times[label] > 1 and not no_difference(one) for label, one in over.items()):
        return []
    label = max(times, key=times.__getitem__)
    figures, shares = drafted[label], ""
    length = figures["mean_accepted_length"]
    if figures.get("draft_share") is not None and figures.get("verify_share") is not None:
        shares = f" ({figures['draft_share']:.0%} drafting, {figures['verify_share']:.0%} verifying)"
    return [f"{label} is not surely faster than {plain}: a round brings {length:.2f} tokens and takes "
            f"{length / times[label]:.2f} plain steps{shares}. specbeam forecast says which draft and length would "
            "pay, docs/slower.md what to do."]


def _against(speedup: Mapping[str, Any], baseline: str) -> str:
    text = interval(speedup)
    if within_noise(speedup):
        return text.replace("no difference", f"no difference to {baseline}")
    return f"{text} × {baseline}"


def _times(speedup: Mapping[str, Any], baseline: str, first: bool) -> str:
    value, low, high = shown(speedup)
    text = f"no difference to {baseline}" if within_noise(speedup) else f"{value:.2f} × {baseline}"
    if low is None:
        return text
    doubt = ", no sure difference" if no_difference(speedup) and not within_noise(speedup) else ""
    return f"{text} ({'95 % interval ' if first else ''}{low:.2f}–{high:.2f}{doubt})"


def _tokens(figures: Mapping[str, Any]) -> str:
    identity = next((one for one in figures.get("identical_to", {}).values() if one["of"]), None)
    if identity is None:
        return ""
    if identity["same"] == identity["of"]:
        return ", with the same tokens" + (f" in all {identity['of']} answers" if identity["of"] > 1 else "")
    return f", but with other tokens in {identity['of'] - identity['same']} of {identity['of']} answers"


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The answer in figures, for the eye: (figure, what it is, good | bad | "") of the fastest method of the first
    family that has something to compare."""
    methods = summary.get("methods") or {}
    for family in FAMILIES:
        own = {label: figures for label, figures in methods.items()
               if figures.get("family") == family and figures.get("decode_tokens_per_second")}
        if len(own) < 2:
            continue
        best = max(own, key=lambda label: own[label]["decode_tokens_per_second"])
        figures = own[best]
        found = [(best, "the fastest here", "")]
        for baseline, one in figures["speedup"].items():
            if one.get("median") is not None:
                value, low, high = shown(one)
                within = "" if low is None else f", {low:.2f}–{high:.2f}"
                sure = low is not None and not no_difference(one)
                found.append((f"{value:.2f} ×", baseline + (", no difference" if within_noise(one) else within),
                              "" if not sure else "good" if (value or 0) > 1 else "bad"))
        found.append((rate(figures), "tokens a second", ""))
        if (figures.get("mean_accepted_length") or 1) > 1:
            found.append((f"{figures['mean_accepted_length']:.2f}", "tokens a round", ""))
        identity = next((one for one in figures.get("identical_to", {}).values() if one["of"]), None)
        if identity:
            same = identity["same"] == identity["of"]
            found.append((f"{identity['same']}/{identity['of']}", "answers, same tokens", "good" if same else "bad"))
        return found
    return []
