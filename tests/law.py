"""What a sampled method's answers must be distributed like: the target's own law of the next tokens, by brute force.

False alarms: of the chi-square check 1e-4 per comparison, and of the total variation less than that (McDiarmid: it
exceeds its expectation by more than sqrt(ln(1e4) / 2N) that rarely). Seeds are fixed, so that a test that passed stays
so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from math import log, sqrt

import torch
import transformers as hf
from scipy.stats import chi2
from tiny import build
from torch import Tensor

from specbeam.trace import GenerationOutput

VOCABULARY = 10
FALSE_ALARM = 1e-4


def small_target(seed: int = 0) -> hf.PreTrainedModel:
    """A random llama of ten tokens, none of which ends an answer."""
    return build(hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        pad_token_id=0), seed=seed)


@torch.inference_mode()
def law(target: hf.PreTrainedModel, prompt: Tensor, steps: int, process: Callable[[Tensor, Tensor], Tensor]
        ) -> dict[tuple[int, ...], float]:
    """Probability of every answer of `steps` tokens. process(ids, logits): as a logits processor."""
    answers: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(steps):
        ids = torch.stack([torch.cat([prompt, torch.tensor(answer, dtype=torch.long)]) for answer in answers])
        p = process(ids, target(ids).logits[:, -1].float()).double().softmax(-1).tolist()
        answers = {(*answer, token): before * row[token]
                   for (answer, before), row in zip(answers.items(), p, strict=True) for token in range(VOCABULARY)}
    return answers


def draws(generate: Callable[..., GenerationOutput], prompt: Tensor, steps: int, count: int, **options
          ) -> Counter[tuple[int, ...]]:
    """Answers to one prompt, `count` of them, in batches of 250 rows with a seed for each."""
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(0, count, 250):
        out = generate([prompt] * 250, max_new_tokens=steps, seed=list(range(start, start + 250)), **options)
        seen.update(tuple(answer) for answer in out.tokens)
    return seen


def same_law(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> bool:
    """Chi-square test at FALSE_ALARM, answers expected less than five times in one class; and total variation."""
    count = sum(seen.values())
    distance = sum(abs(seen[answer] / count - p) for answer, p in expected.items()) / 2
    chance = sum(sqrt(p * (1 - p) / count) for p in expected.values()) / 2
    if distance > chance + sqrt(log(1 / FALSE_ALARM) / (2 * count)):
        return False
    if any(expected.get(answer, 0.0) < 1e-12 for answer in seen):
        return False
    often = [answer for answer, p in expected.items() if p * count >= 5]
    pairs = [(seen[answer], expected[answer] * count) for answer in often]
    rest = (count - sum(n for n, _ in pairs), count - sum(e for _, e in pairs))
    pairs += [rest] if rest[1] >= 1 else []
    statistic = sum((n - e) ** 2 / e for n, e in pairs)
    return bool(chi2.sf(statistic, len(pairs) - 1) > FALSE_ALARM)


def part(answers: dict[tuple[int, ...], float], first: int) -> dict[tuple[int, ...], float]:
    """The law of the tokens from number `first` on."""
    found: dict[tuple[int, ...], float] = {}
    for answer, p in answers.items():
        found[answer[first:]] = found.get(answer[first:], 0.0) + p
    return found


def all_answers(steps: int) -> list[tuple[int, ...]]:
    return list(product(range(VOCABULARY), repeat=steps))
