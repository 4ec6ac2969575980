"""After the timed part: the summary, figures of quality, and the probabilities of trace.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specbeam.experiment import records
from specbeam.experiment.loaded import Models
from specbeam.experiment.plan import Plan
from specbeam.experiment.rows import Answers, conversation_of, one_line, remember

if TYPE_CHECKING:
    from specbeam.experiment.prompts import Conversation
    from specbeam.experiment.quality import Evaluate


def judge(
    plan: Plan,
    rows: list[dict[str, Any]],
    traces: list[dict[str, Any]],
    models: Models,
    config: dict[str, Any],
    facts: dict[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """After the timed part: summary.json's content, and the traces with their probabilities."""
    from specbeam.experiment.prediction import foreseen, predict
    from specbeam.experiment.quality import add_quality
    from specbeam.experiment.statistics import summarise

    notes: list[str] = list(facts["notes"])
    methods = {method.label: method.settings for method in plan.methods}
    summary = summarise(rows, methods)
    contexts: dict[tuple[str, str, int], dict[str, Any]] = {}
    try:
        contexts = contexts_of(plan, rows, models, config)
        evaluate = None if plan.evaluator is None else evaluator(plan.evaluator, config, notes)
        quality = add_quality(rows, contexts, models.target, methods, plan.metrics, evaluate)
        for label, figures in quality.items():
            summary["methods"][label].update(figures)
    except Exception as error:  # the figures of speed must not be lost for those of quality
        notes.append(f"Quality figures are missing: {one_line(error)}")
    try:
        traces = fill_probabilities(traces, contexts, models) if contexts else traces
    except Exception as error:
        notes.append(f"Probabilities of tokens are missing from trace.jsonl: {one_line(error)}")
    refills = (plan.prompts_per_cell or plan.batch_size) > plan.batch_size
    if plan.forecast and refills and any(map(foreseen, plan.methods)):
        notes.append("There is no forecast beside the measurement: it knows batches that end together, and with "
                     "prompts_per_cell above batch_size the next prompt takes an ended one's place.")  # fmt: skip
    try:
        foretold = {}
        if plan.forecast and not refills:
            foretold = predict(plan.methods, rows, contexts, models, summary)
        for label, figures in foretold.items():
            summary["methods"][label]["forecast"] = figures
    except Exception as error:
        notes.append(f"The forecast beside the measurement is missing: {one_line(error)}")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        notes.append(
            f"{len(failed)} of {len(rows)} rows failed; the first, {failed[0]['method']} on prompt "
            f"{failed[0]['prompt_id']}: {failed[0]['error']}"
        )
    alone = [method.label for method in plan.methods if not method.method.batched]
    if alone and plan.batch_size > 1:
        notes.append(f"{' and '.join(alone)} ran one prompt at a time: it takes no batches.")
    summary = {
        **summary,
        "target": plan.target,
        "draft": plan.draft,
        "device": facts["device"],
        "dtype": facts["dtype"],
        "runner": facts["runner"],
        "batch_size": plan.batch_size,
        "prompts_per_cell": plan.prompts_per_cell,
        "evaluator": plan.evaluator,
        "notes": notes,
    }
    return summary, traces


def evaluator(path: str, config: dict[str, Any], notes: list[str]) -> Evaluate:
    """As quality.evaluator_of, of the model that `evaluator` names; where it fails it says so in `notes` and gives
    None: the other figures of quality must not be lost for its own."""
    from specbeam.experiment.quality import evaluator_of
    from specbeam.models import load_model

    def evaluate(pairs: Sequence[tuple[Conversation, str]]) -> list[list[float]] | None:
        device, dtype = config["device"] or "auto", config["dtype"] or "auto"
        try:
            model, tokenizer = load_model(path, device=device, dtype=dtype, runner="eager")
            return evaluator_of(model, tokenizer, config["system_prompt"])(pairs)
        except Exception as error:
            notes.append(f"Figures under the evaluator {path} are missing: {one_line(error)}")
            return None

    return evaluate


def contexts_of(
    plan: Plan, rows: list[dict[str, Any]], models: Models, config: dict[str, Any]
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(method, prompt id, turn) → input_ids, text, references, category: what was read before each answer."""
    answers: Answers = {}
    for row in rows:
        remember(answers, row)
    prompts = {prompt.id: prompt for prompt in plan.prompts}
    first_turns: dict[str, dict[str, Any]] = {}
    contexts = {}
    for row in rows:
        key = (row["method"], row["prompt_id"], row["turn"])
        if row["status"] != "ok" or key in contexts:
            continue
        prompt = prompts[row["prompt_id"]]
        if row["turn"] == 0 and prompt.id in first_turns:
            contexts[key] = first_turns[prompt.id]
            continue
        conversation = conversation_of(row["method"], prompt, row["turn"], answers)
        rendered = models.render([conversation], config["system_prompt"])
        contexts[key] = {
            "conversation": conversation,
            "input_ids": rendered.input_ids[0].tolist(),
            "text": rendered.text[0],
            "references": prompt.references_of(row["turn"]),
            "category": prompt.category,
        }
        if row["turn"] == 0:
            first_turns[prompt.id] = contexts[key]
    return contexts


def fill_probabilities(
    traces: list[dict[str, Any]], contexts: dict[tuple[str, str, int], dict[str, Any]], models: Models
) -> list[dict[str, Any]]:
    """Target and draft probability (of the raw softmax) of each token of the traces, by teacher forcing."""
    from specbeam.metrics.likelihood import answer_log_probabilities

    traces = [trace for trace in traces if records.trace_key(trace) in contexts]
    passes = [("target_probability", models.target, traces)]
    if models.draft is not None and models.same_vocabulary:  # else its tokens are others
        # a draft with a narrower vocabulary cannot read every text of the target
        embeddings: Any = models.draft.get_input_embeddings()
        size = embeddings.weight.shape[0]
        readable = [
            trace
            for trace in traces
            if "draft" in trace["sources"]
            and max(*contexts[records.trace_key(trace)]["input_ids"], *trace["tokens"]) < size
        ]
        passes.append(("draft_probability", models.draft, readable))
    for name, model, wanted in passes:
        pairs: dict[tuple[tuple[int, ...], tuple[int, ...]], list[dict[str, Any]]] = {}
        for trace in wanted:
            context = contexts[records.trace_key(trace)]["input_ids"]
            pairs.setdefault((tuple(context), tuple(trace["tokens"])), []).append(trace)
        logs = (
            answer_log_probabilities(model, [list(c) for c, _ in pairs], [list(a) for _, a in pairs]) if pairs else []
        )
        for same, values in zip(pairs.values(), logs, strict=True):
            for trace in same:
                trace[name] = [round(math.exp(value), 6) for value in values]
    return traces
