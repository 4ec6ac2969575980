"""How probable a model finds answers: perplexity, and the log-probability of every token.

Only the answer is scored, EOS included; the prompt is context. The model's raw softmax in float32 is used, without
the processors (temperature, penalties) that the answer may have been decoded under.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.errors import InputError

# Logits of one forward, in float32 elements (256 MiB): bounds memory for large vocabularies.
_LOGITS_AT_ONCE = 64 * 1024 * 1024


@torch.inference_mode()
def answer_log_probabilities(model: PreTrainedModel, contexts: Sequence[Sequence[int]],
                             answers: Sequence[Sequence[int]], batch_size: int = 8) -> list[list[float]]:
    """Natural log-probability of each answer token, given the context and the answer's tokens before it.

    contexts, answers: token ids without padding, one pair an answer. Returns one list per answer, as long as it.
    Answers are scored together where they fit, each padded on the right, where a causal model does not look.
    Raises InputError for a context without tokens: its answer's first token would have nothing to follow.
    """
    for number, context in enumerate(contexts):
        if not len(context):
            raise InputError(f"context {number} has no tokens: the first answer token needs one to follow.")
    if _rows_are_coupled(model):
        batch_size = 1
    result: list[list[float]] = [[] for _ in answers]
    waiting = [n for n in range(len(answers)) if len(answers[n])]
    waiting.sort(key=lambda n: (len(contexts[n]), len(answers[n])))
    while waiting:
        size = batch_size
        while size > 1 and _logits(model, contexts, answers, waiting[:size]) > _LOGITS_AT_ONCE:
            size -= 1
        for number, scores in zip(waiting[:size], _score(model, contexts, answers, waiting[:size]), strict=True):
            result[number] = scores
        waiting = waiting[size:]
    return result


def perplexity(log_probabilities: Sequence[Sequence[float]]) -> float | None:
    """exp(−mean log-probability) over all tokens of all answers; None without tokens or beyond a float."""
    values = [value for answer in log_probabilities for value in answer]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return math.exp(-mean) if -700.0 < mean <= 0.0 else None


@torch.inference_mode()
def next_token_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The model's logits after these tokens: float32 [vocabulary], on the CPU."""
    ids = torch.tensor([list(tokens)], device=model.device)
    keep = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits
    return logits[0, -1].float().cpu()


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, tokens: Sequence[int], count: int) -> Tensor:
    """The logits that predict the last `count` of these tokens, from one plain forward: [count, vocabulary]."""
    ids = torch.tensor([list(tokens)], device=model.device)
    keep = {"logits_to_keep": count + 1} if _keeps_logits(model) else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[0, -count - 1:-1]


def _span(contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]) -> tuple[int, int]:
    """First position whose logits are wanted (it predicts an answer's first token), and the padded length."""
    return (min(len(contexts[n]) for n in rows) - 1, max(len(contexts[n]) + len(answers[n]) for n in rows))


def _logits(model: PreTrainedModel, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
            rows: Sequence[int]) -> int:
    start, end = _span(contexts, answers, rows)
    return len(rows) * (end - 1 - start) * int(model.config.get_text_config().vocab_size)


def _score(model: PreTrainedModel, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
           rows: Sequence[int]) -> list[list[float]]:
    start, end = _span(contexts, answers, rows)
    ids = torch.zeros(len(rows), end, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(rows):
        whole = torch.tensor([*contexts[n], *answers[n]])
        ids[i, :len(whole)], mask[i, :len(whole)] = whole, 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    keep = {"logits_to_keep": torch.arange(start, end - 1, device=model.device)} if _keeps_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    logits = logits[:, -(end - 1 - start):] if keep else logits[:, start:end - 1]
    scored = []
    for i, n in enumerate(rows):
        first = len(contexts[n]) - 1 - start
        own = logits[i, first:first + len(answers[n])].float()  # row by row: the float32 copy stays small
        chosen = torch.tensor(list(answers[n]), device=own.device)
        scored.append((own.gather(1, chosen[:, None])[:, 0] - own.logsumexp(-1)).clamp(max=0).tolist())
    return scored


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _rows_are_coupled(model: PreTrainedModel) -> bool:
    """With these rotary embeddings one long row changes the others' positions."""
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    return "longrope" in rope or "dynamic" in rope
