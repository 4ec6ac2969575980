"""What a run writes down: a row for each answer, a trace for each answer of the first repeat."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError, out_of_memory
from specbeam.experiment.prompts import Conversation, Prompt
from specbeam.metrics.beams import beam_figures

if TYPE_CHECKING:
    from specbeam.experiment.plan import Cell
    from specbeam.trace import GenerationOutput, RowTrace

MAX_ERROR = 400  # characters of a row's error
IMPOSSIBLE = -1e8  # scores below stand for continuations that cannot be

Answers = dict[tuple[str, str, int], str]  # (method, prompt id, turn) → text of repeat 0


def remember(answers: Answers, row: dict[str, Any]) -> None:
    if row["repeat"] == 0 and row["status"] == "ok":
        answers[row["method"], row["prompt_id"], row["turn"]] = row["text"]


def conversation_of(label: str, prompt: Prompt, turn: int, answers: Answers) -> Conversation:
    """What `label` reads at this turn. Later turns hold its own answers of repeat 0, so repeats read the same."""
    return prompt.conversation(turn, [answers[label, prompt.id, earlier] for earlier in range(turn)])


def row_of(
    cell: Cell, prompt: Prompt, batch_id: str, output: GenerationOutput, index: int, tokenizer: Any,
    peak: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    trace, best = output.trace[index], output.hypotheses[index][0]
    return {
        **identity(cell, prompt, batch_id),
        "status": "ok",
        "error": None,
        "prompt_tokens": trace.prompt_tokens,
        "new_tokens": len(best.tokens) if trace.counted is None else trace.counted,
        "first_tokens": trace.first_tokens,
        "prefill_seconds": trace.prefill_seconds,
        "decode_seconds": trace.decode_seconds,
        "draft_seconds": trace.draft_seconds,
        "verify_seconds": trace.verify_seconds,
        "accept_seconds": trace.accept_seconds,
        "rounds": len(trace.rounds),
        "drafted": sum(r.drafted for r in trace.rounds),
        "accepted": sum(r.accepted for r in trace.rounds),
        "accepted_by_position": accepted_by_position(trace),
        "finish_reason": best.finish_reason,
        "tokens": list(best.tokens),
        "text": tokenizer.decode(best.tokens, skip_special_tokens=True),
        "score": best.score,
        "peak_memory_bytes": peak,
        "committed": sum(r.committed for r in trace.rounds),
        **beam_figures(output.hypotheses[index], output.search[index] if output.search else None),
    }


ROW_FIGURES = (
    "prompt_tokens",
    "new_tokens",
    "first_tokens",
    "prefill_seconds",
    "decode_seconds",
    "draft_seconds",
    "verify_seconds",
    "accept_seconds",
    "rounds",
    "drafted",
    "accepted",
    "accepted_by_position",
    "finish_reason",
    "tokens",
    "text",
    "score",
    "peak_memory_bytes",  # of the batch (records.peak_memory)
    "committed",  # tokens of all rounds; of beam search: steps
    "beam_gap",  # score of the best hypothesis less that of the second
    "beam_distinct",  # parts of the hypotheses' single tokens and of their pairs that are distinct
)


def failed_row(cell: Cell, prompt: Prompt, batch_id: str, error: str) -> dict[str, Any]:
    return {
        **identity(cell, prompt, batch_id),
        "status": "failed",
        "error": error,
        **dict.fromkeys(ROW_FIGURES),
    }


def identity(cell: Cell, prompt: Prompt, batch_id: str) -> dict[str, Any]:
    return {
        "method": cell.method.label,
        "kind": cell.method.kind,
        "prompt_id": prompt.id,
        "turn": cell.turn,
        "category": prompt.category,
        "repeat": cell.repeat,
        "batch_id": batch_id,
    }


def accepted_by_position(trace: RowTrace) -> list[list[int]]:
    """[times drafted, times accepted] of the first, second, … proposal of a round; of a tree: of its depths."""
    deep = [_depth(r.parents) if r.parents else r.drafted for r in trace.rounds]
    return [
        [sum(depth > i for depth in deep), sum(r.accepted > i for r in trace.rounds)]
        for i in range(max(deep, default=0))
    ]


def _depth(parents: Sequence[int]) -> int:
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths)


def trace_of(
    cell: Cell, prompt: Prompt, batch_id: str, output: GenerationOutput, index: int, tokenizer: Any
) -> dict[str, Any]:
    """A line of trace.jsonl; the probabilities are filled in when the timed part is over."""
    trace, hypotheses = output.trace[index], output.hypotheses[index]
    one_text = hypotheses[0].beams is None  # the proposals of a beam search are steps of all its beams, not tokens

    def pieces(tokens: Iterable[int]) -> list[str]:
        return [tokenizer.decode([token]) for token in tokens]

    who = identity(cell, prompt, batch_id)
    del who["repeat"]
    return {
        **who,
        "tokens": list(hypotheses[0].tokens),
        "pieces": pieces(hypotheses[0].tokens),
        "sources": list(trace.sources),
        "token_rounds": list(trace.token_rounds),
        "target_probability": None,
        "draft_probability": None,
        "rounds": [
            {
                "drafted": r.drafted,
                "accepted": r.accepted,
                "committed": r.committed,
                "seconds": r.seconds,
                "proposed": list(r.proposed) if one_text else [],
                "proposed_pieces": pieces(r.proposed) if one_text else [],
                "parents": list(r.parents) if one_text else [],
                "drafter": r.drafter,
                "why": r.why,
            }
            for r in trace.rounds
        ],
        "hypotheses": [
            {
                "tokens": list(h.tokens),
                "text": tokenizer.decode(h.tokens, skip_special_tokens=True),
                "score": h.score,
                "finish_reason": h.finish_reason,
                "beams": None if h.beams is None else list(h.beams),
            }
            for h in hypotheses
        ],
    }


def search_of(
    cell: Cell, prompt: Prompt, batch_id: str, output: GenerationOutput, index: int, tokenizer: Any
) -> dict[str, Any]:
    """A line of beams.jsonl: the search tree of an answer, one list a column (docs/beams.md)."""
    assert output.search is not None
    tree, pieces = output.search[index], functools.cache(lambda token: tokenizer.decode([token]))
    who = identity(cell, prompt, batch_id)
    del who["repeat"]
    steps = []
    for number, step in enumerate(tree.steps):
        last = max(j for j, one in enumerate(step.candidates) if j == 0 or one.survived_as is not None
                   or (number, j) in tree.ends or one.score > IMPOSSIBLE)
        kept = step.candidates[: last + 1]
        steps.append({
            "round": step.round,
            "tokens": [one.token for one in kept],
            "pieces": [pieces(one.token) for one in kept],
            "beams": [one.beam for one in kept],
            "scores": [_rounded(one.score) for one in kept],
            "survived_as": [one.survived_as for one in kept],
            "finish_reasons": [one.finish_reason for one in kept],
            "finished_scores": [_rounded(one.finished_score) for one in kept],
        })
    hypotheses = [{"step": end[0], "candidate": end[1], "tokens": tree.tokens(place),
                   "text": tokenizer.decode(tree.tokens(place), skip_special_tokens=True),
                   "score": tree.finished(place).finished_score, "finish_reason": tree.finished(place).finish_reason}
                  for place, end in enumerate(tree.ends)]
    return {**who, "returned": len(output.hypotheses[index]), "steps": steps, "hypotheses": hypotheses}


def _rounded(score: float | None) -> float | None:
    """To be written as JSON, which knows neither infinity nor NaN."""
    return None if score is None or not score >= IMPOSSIBLE else round(score, 5)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
    if out_of_memory(error):
        text = f"memory ran out: lower batch_size or max_new_tokens, or take smaller models ({text})."
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 1] + "…"
