"""What the answers are worth: figures of text and likelihood, per category and overall, outside the timed region.

Of each prompt and turn the first repeat that succeeded counts; every turn is an answer of its own. Equal outputs are
scored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError
from specbeam.experiment.compose import nearest
from specbeam.experiment.statistics import Prompt, Row, baselines, comparable, first_answers, same_output_expected
from specbeam.metrics import text as texts
from specbeam.metrics.score import Score, mean, ratio
from specbeam.models import check_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specbeam.experiment.prompts import Conversation
    from specbeam.experiment.prompts import Prompt as Asked

METRICS = ("bleu", "chrf", "rouge", "exact_match", "perplexity", "repetition", "length")
WITH_REFERENCES = ("bleu", "chrf", "rouge", "exact_match")

Context = Mapping[str, Any]  # what was read before an answer: judge.contexts_of
# (conversation, answer) pairs → log-probabilities of the answers' tokens under another model; None: it failed
Evaluate = Callable[[Sequence[tuple["Conversation", str]]], list[list[float]] | None]


@dataclass(frozen=True)
class Answer:
    """One answer, and what is known of it. log_probabilities: under the target, of each token; evaluated: under the
    evaluator, of each of its own tokens (None: there is no evaluator)."""

    text: str
    tokens: tuple[int, ...]
    references: tuple[str, ...]
    category: str | None
    log_probabilities: tuple[float, ...]
    evaluated: tuple[float, ...] | None = None


def check_metrics(metrics: Any, prompts: Sequence[Asked]) -> tuple[str, ...] | None:
    """The figures of quality to work out. Raises InputError for one that does not exist or has no references."""
    if metrics is None:
        return None
    wanted = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(wanted, list):
        raise InputError(f"metrics is {metrics!r}: give a list of names, or null for all that apply.")
    references = [text for prompt in prompts for turn in range(prompt.answers) for text in prompt.references_of(turn)]
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"metrics names {name!r}{nearest(str(name), list(METRICS))}: use {', '.join(METRICS)}.")
        if name in WITH_REFERENCES and not references:
            raise InputError(f"metrics asks for {name}, but none of the {len(prompts)} prompts has a reference: add a "
                             "`reference` to the prompts, or leave it out of metrics.")
        if name == "exact_match" and not any(map(texts.is_numeric, references)):
            raise InputError("metrics asks for exact_match, but no prompt has a number as its reference ('42', or a "
                             "solution that ends in '#### 42'): leave it out of metrics.")
        if name == "rouge" and not texts.rouge_installed():
            raise InputError("metrics asks for rouge, which needs the package rouge-score: pip install "
                             "'specbeam[rouge]', or leave it out of metrics.")
    return tuple(dict.fromkeys(wanted))


def check_evaluator(path: Any) -> str | None:
    """A model's name that may be loaded, or None."""
    if path is None:
        return None
    if not isinstance(path, str) or not path.strip():
        raise InputError(f"evaluator is {path!r}: give bundled, a folder or a hub id, or null for none.")
    check_path(path)
    return path


def add_quality(
    rows: Sequence[Row],
    contexts: Mapping[tuple[str, str, int], Context],
    target: PreTrainedModel,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    metrics: Sequence[str] | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, dict[str, Any]]:
    """label → `quality` (`overall` and `categories`: metric → value, low, high, count), the figures that the table
    shows, and the target's logit gap where outputs that should be equal part.

    contexts: (label, prompt id, turn) → what that method read (`input_ids` without padding, `conversation`) and the
    turn's `references` and `category`. methods: as for `summarise`; without it the rows' kinds stand for them.
    metrics: names in METRICS; None: all that apply. evaluate: another model (`evaluator`).
    """
    answers = first_answers(rows)
    methods = methods or {row["method"]: {"kind": row["kind"]} for row in rows}
    known = _answers(answers, contexts, target, evaluate)
    quality: dict[str, dict[str, Any]] = {}
    done: dict[tuple[Answer, ...], dict[str, Score]] = {}

    def figures(own: Iterable[Answer]) -> dict[str, Score]:
        key = tuple(own)
        if key not in done:
            done[key] = measure(key, metrics)
        return done[key]

    for label, own in answers.items():
        given = [known[label, *prompt] for prompt in own]
        overall = figures(given)
        categories = sorted({one.category for one in given if one.category is not None})
        bleu = overall.get("bleu")
        quality[label] = {
            "quality": {
                "overall": {name: score.as_dict() for name, score in overall.items()},
                "categories": {
                    category: {name: score.as_dict() for name, score in
                               figures(one for one in given if one.category == category).items()}
                    for category in categories
                },
                "signatures": {name: score.signature for name, score in overall.items() if score.signature},
            },
            **{name: overall[name].value if name in overall else None
               for name in ("perplexity", "mean_log_probability", "bleu", "chrf", "rougeL", "exact_match",
                            "evaluator_perplexity")},
            "bleu_signature": bleu.signature if bleu else None,
            "bleu_prompts": bleu.count if bleu else 0,
            "logit_gaps": _logit_gaps(label, answers, contexts, methods, target),
        }  # fmt: skip
    return quality


def measure(answers: Sequence[Answer], metrics: Sequence[str] | None = None) -> dict[str, Score]:
    """Every figure that these answers have; metrics None: all that apply."""
    from specbeam.metrics.repetition import distinct, longest_repeated_span

    outputs, references = [one.text for one in answers], [one.references for one in answers]
    wanted = METRICS if metrics is None else metrics
    found: dict[str, Score | None] = {}
    if "bleu" in wanted:
        found["bleu"] = texts.bleu(outputs, references)
    if "chrf" in wanted:
        found["chrf"] = texts.chrf(outputs, references)
    if "rouge" in wanted and (metrics is not None or texts.rouge_installed()):
        found |= texts.rouge(outputs, references)
    if "exact_match" in wanted:
        found["exact_match"] = texts.exact_match(outputs, references)
    if "perplexity" in wanted:
        found |= _likelihood("", [one.log_probabilities for one in answers])
        evaluated = [(one.evaluated, one.text) for one in answers if one.evaluated]
        found |= _likelihood("evaluator_", [logs for logs, _ in evaluated])
        # models of other vocabularies cannot be compared by the token, but by the byte
        found["evaluator_bits_per_byte"] = ratio([-math.fsum(logs) / math.log(2) for logs, _ in evaluated],
                                                 [len(text.encode()) for _, text in evaluated])
    if "repetition" in wanted:
        for n in (1, 2):
            parts = [distinct([one.tokens], n) for one in answers]
            found[f"distinct_{n}"] = mean([part for part in parts if part is not None])
        found["longest_repeated_span"] = mean([longest_repeated_span(one.tokens) for one in answers])
    if "length" in wanted:
        found["tokens"] = mean([len(one.tokens) for one in answers])
        found["words"] = mean([len(one.text.split()) for one in answers])
    return {name: score for name, score in found.items() if score is not None and math.isfinite(score.value)}


def _likelihood(prefix: str, logs: Sequence[Sequence[float]]) -> dict[str, Score | None]:
    """Mean log-probability of a token, and perplexity: e to the minus of it."""
    average = ratio([math.fsum(own) for own in logs], [len(own) for own in logs])
    if average is None or not -700.0 < average.value <= 0.0:
        return {}

    def e(value: float | None) -> float | None:
        return None if value is None or value < -700.0 else math.exp(-value)

    perplexity = Score(math.exp(-average.value), e(average.high), e(average.low), average.count)
    return {f"{prefix}perplexity": perplexity, f"{prefix}mean_log_probability": average}


def evaluator_of(model: PreTrainedModel, tokenizer: Any, system_prompt: str | None
                 ) -> Callable[[Sequence[tuple[Conversation, str]]], list[list[float]]]:
    """How probable another model finds answers, by its own chat template and its own tokens.

    The prompt is rendered as this model reads it and is context; the answer's text, without special tokens (so
    without EOS), is tokenised by itself behind it. Natural log-probabilities of each of its tokens.
    """
    from specbeam.chat import render_prompt
    from specbeam.metrics.likelihood import answer_log_probabilities

    def evaluate(pairs: Sequence[tuple[Conversation, str]]) -> list[list[float]]:
        contexts = [render_prompt(tokenizer, [conversation], system_prompt=system_prompt).input_ids[0].tolist()
                    for conversation, _ in pairs]
        own = [tokenizer.encode(text, add_special_tokens=False) if text else [] for _, text in pairs]
        return answer_log_probabilities(model, contexts, own)

    return evaluate


def _answers(answers: Mapping[str, Mapping[Prompt, Row]], contexts: Mapping[tuple[str, str, int], Context],
             target: PreTrainedModel, evaluate: Evaluate | None) -> dict[tuple[str, str, int], Answer]:
    """(label, prompt id, turn) → its answer with the log-probabilities."""
    from specbeam.metrics.likelihood import answer_log_probabilities

    keys = [(label, *prompt) for label, own in answers.items() for prompt in own]
    rows = {(label, *prompt): row for label, own in answers.items() for prompt, row in own.items()}
    pairs = {key: (tuple(contexts[key]["input_ids"]), tuple(rows[key]["tokens"])) for key in keys}
    unique = sorted(set(pairs.values()))
    scored = dict(zip(unique, answer_log_probabilities(target, [context for context, _ in unique],
                                                       [answer for _, answer in unique]), strict=True))
    evaluated: dict[tuple, list[float]] | None = None
    if evaluate is not None:
        asked = {pairs[key]: (contexts[key]["conversation"], rows[key]["text"]) for key in keys}
        logs = evaluate(list(asked.values()))
        evaluated = None if logs is None else dict(zip(asked, logs, strict=True))
    return {
        key: Answer(rows[key]["text"], tuple(rows[key]["tokens"]), tuple(contexts[key]["references"] or ()),
                    contexts[key].get("category"), tuple(scored[pairs[key]]),
                    None if evaluated is None else tuple(evaluated[pairs[key]]))
        for key in keys
    }  # fmt: skip


def _logit_gaps(label: str, answers: Mapping[str, Mapping[Prompt, Row]],
                contexts: Mapping[tuple[str, str, int], Context], methods: Mapping[str, Mapping[str, Any]],
                target: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """baseline → how near a tie the target was where outputs that should be equal part."""
    from specbeam.metrics.exactness import logit_gap

    found: dict[str, dict[str, Any]] = {}
    for baseline in baselines(label, methods):
        if not same_output_expected(methods[label], methods[baseline]):
            continue
        gaps = [logit_gap(target, contexts[label, *prompt]["input_ids"], answers[label][prompt]["tokens"],
                          answers[baseline][prompt]["tokens"]) for prompt in comparable(answers, label, baseline)]
        real = [round(gap, 6) for gap in gaps if gap is not None]
        if real:
            found[baseline] = {"differences": len(real), "largest": max(real), "smallest": min(real)}
    return found
