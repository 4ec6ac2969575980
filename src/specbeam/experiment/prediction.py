"""What a forecast would have said of a run's own methods, beside what the run measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specbeam.decoding import METHODS
from specbeam.forecast import Answer, forced_chances, measure_costs, plain_seconds, speculative_seconds

if TYPE_CHECKING:
    from specbeam.experiment.loaded import Models
    from specbeam.experiment.plan import PlannedMethod

# Settings under which a forecast is exact: a chain of fixed length, by a draft of the same vocabulary or by lookup.
_FORECAST = {"draft_length", "drafter", "temperature", "ngram"}


def foreseen(method: PlannedMethod) -> bool:
    """Whether the forecast holds for this method: greedy, a chain of fixed length."""
    own = {name for name in method.options if name in METHODS["speculative"].options}
    return (method.kind == "speculative" and not method.samples and own <= _FORECAST
            and isinstance(method.options.get("draft_length", 4), int)
            and method.options.get("drafter", "draft_model") in ("draft_model", "prompt_lookup"))


def predict(methods: Sequence[PlannedMethod], rows: Sequence[Mapping[str, Any]],
            contexts: Mapping[tuple[str, str, int], Mapping[str, Any]], models: Models, summary: Mapping[str, Any]
            ) -> dict[str, dict[str, Any]]:
    """label → `speedup` (over our plain method), `accepted`, `drafted`, `rounds` and `mean_accepted_length`, each with
    `measured_…` beside it: of the first repeat, from its answers, a teacher-forced pass and costs measured anew."""
    found = {}
    for method in methods:
        label = method.label
        own = [row for row in rows if row["method"] == label and row["repeat"] == 0 and row["status"] == "ok"]
        speedups = summary["methods"][label]["speedup"]
        plain = next((name for name in speedups if summary["methods"][name]["kind"] == "greedy"), None)
        if not foreseen(method) or plain is None or not any(row["rounds"] for row in own):
            continue
        length = method.options.get("draft_length", 4)
        lookup = method.options.get("drafter") == "prompt_lookup"
        options = {name: value for name, value in method.options.items()
                   if name not in METHODS["speculative"].options and name != "temperature"}
        options["tokenizer"] = models.tokenizer
        draft = None if lookup else models.draft
        answers = [Answer(tuple(contexts[label, row["prompt_id"], row["turn"]]["input_ids"]), tuple(row["tokens"]),
                          method.options["max_new_tokens"]) for row in own]
        chances = forced_chances(models.target, draft, answers, length, ngram=method.options.get("ngram", 3), **options)
        batches: dict[str, list[int]] = {}
        for number, row in enumerate(own):
            batches.setdefault(row["batch_id"], []).append(number)
        drafter = {"drafter": "prompt_lookup", "ngram": method.options.get("ngram", 3)} if lookup else {}
        costs = measure_costs(models.target, draft, answers, [length], max(map(len, batches.values())), 2, **drafter,
                              **options)
        logs, outlooks = [], []
        for batch in batches.values():
            given = [answers[i] for i in batch]
            outlook, seconds = speculative_seconds(given, [chances[i] for i in batch], length, costs, sampled=False)
            outlooks += outlook
            if seconds:
                logs.append(math.log(plain_seconds(given, costs) / seconds))
        rounds, tokens = sum(one.rounds for one in outlooks), sum(len(one.tokens) - 1 for one in answers)
        found[label] = {
            "over": plain, "draft_length": length,
            "speedup": math.exp(math.fsum(logs) / len(logs)), "measured_speedup": speedups[plain]["geometric_mean"],
            "mean_accepted_length": tokens / rounds,
            "measured_mean_accepted_length": tokens / sum(row["rounds"] for row in own),
            **{name: sum(getattr(one, name) for one in outlooks) for name in ("rounds", "drafted", "accepted")},
            **{f"measured_{name}": sum(row[name] for row in own) for name in ("rounds", "drafted", "accepted")},
        }  # fmt: skip
    return found
