"""Options that every greedy method must honour as `generate` does, and the processors and criteria for them."""

from __future__ import annotations

import functools

import torch
from reference import generated_all, model
from tiny import EOS, VOCABULARY, prompts
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

ROWS = prompts((5, 19, 12, 1))


class NotTwiceInARow(LogitsProcessor):
    """A processor of the caller's own, which looks at the history."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        scores[:, int(input_ids[0, 0]) % 50:][:, :3] += 3.0  # and on the prompt
        return scores


class EvenSum(StoppingCriteria):
    """Stops where at least 8 tokens add up to a multiple of 7, the prompt included."""

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return (input_ids.sum(1) % 7 == 0) & torch.tensor(input_ids.shape[1] >= 24)


def every_third(row: int, ids: torch.Tensor) -> list[int]:
    """Allowed after this prefix; depends on how long it is."""
    return list(range(3 + len(ids) % 3, VOCABULARY, 3))


HONOURED: dict[str, dict] = {
    "nothing": {},
    "max_new_tokens 1": {"max_new_tokens": 1},
    "max_new_tokens 2": {"max_new_tokens": 2},
    "max_length": {"max_new_tokens": None, "max_length": 28},
    "the default length": {"max_new_tokens": None},
    "several EOS ids": {"eos_token_id": [EOS, 94, 60, 19, 37]},
    "no EOS": {"eos_token_id": None},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(3, 60))},
    "min_length": {"min_length": 25, "eos_token_id": list(range(3, 60))},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[t] for t in range(3, 40)] + [[50, 51], [70, 60]]},
    "suppress_tokens": {"suppress_tokens": list(range(40, 95))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 95))},
    "sequence_bias": {"sequence_bias": [[[t], 6.0] for t in range(20, 30)]},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (5, 1.5)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": every_third},
    "logits_processor": {"logits_processor": LogitsProcessorList([NotTwiceInARow()])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([EvenSum()])},
    "several at once": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4,
                        "suppress_tokens": [94, 28], "eos_token_id": list(range(60, 99))},
}
EVERY_OPTION = tuple(HONOURED)


def settings_of(option: str) -> dict:
    return {"max_new_tokens": 20} | HONOURED[option]


@functools.cache
def wanted(name: str, option: str) -> list[list[int]]:
    """What `generate` gives for each of ROWS with this option."""
    return generated_all(model(name), ROWS, **settings_of(option))
