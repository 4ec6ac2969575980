"""Many prompts by one method, so many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding import METHODS, at_once
from specbeam.errors import InputError
from specbeam.trace import GenerationOutput


def generate_many(target: PreTrainedModel, prompts: Sequence[Any], *, method: str = "greedy",
                  draft: PreTrainedModel | None = None, tokenizer: Any = None, system_prompt: str | None = None,
                  batch_size: int = 8, seed: int | Sequence[int] = 0, **options: Any) -> GenerationOutput:
    """Answers to any number of prompts, in their order.

    prompts: 1-D tensors (or lists) of token ids; or, with `tokenizer`, strings and chat message lists, rendered as
    `render_prompt` does. method: a name in specbeam.decoding.METHODS; options: those of its function. batch_size: how
    many run at once. With greedy, sample and speculative a prompt takes the place of one whose answer ended, so that a
    long answer does not hold the others back; other methods run one batch after the other. The tokens are those of
    each prompt alone; prompt number b draws with seed + b. Raises InputError.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}: use one of {', '.join(METHODS)}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}: give a whole number of at least 1.")
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise InputError("prompts is no list of prompts, or an empty one: give at least one.")
    chosen = METHODS[method]
    pair = (target, draft) if chosen.speculates else (target,)
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + place for place in range(len(prompts))]
    sized = {"batch_size": batch_size} if chosen.refills else {}
    outputs = [
        chosen.load()(*pair, *_rows(prompts[start : start + size], tokenizer, system_prompt, target.device),
                      seed=seeds[start : start + size], **sized, **options)
        for size in [at_once(chosen, len(prompts), batch_size)] for start in range(0, len(prompts), size)]
    searches = [tree for out in outputs for tree in out.search or ()]
    return GenerationOutput([row for out in outputs for row in out.hypotheses],
                            [row for out in outputs for row in out.trace], searches or None)


def _rows(prompts: Sequence[Any], tokenizer: Any, system_prompt: str | None, device: torch.device
          ) -> tuple[Any, Tensor | None]:
    """input_ids and attention_mask of a method's function."""
    if isinstance(prompts[0], Tensor) or (isinstance(prompts[0], Sequence) and prompts[0]
                                          and isinstance(prompts[0][0], int)):
        width = max(len(prompt) for prompt in prompts)
        rows = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in prompts]
        pad = [width - len(row) for row in rows]
        ids = torch.stack([torch.nn.functional.pad(row, (more, 0)) for row, more in zip(rows, pad, strict=True)])
        return ids, (torch.arange(width, device=device) >= torch.tensor(pad, device=device)[:, None]).long()
    if tokenizer is None:
        raise InputError("prompts are texts, and there is no tokenizer to read them with: give tokenizer=….")
    from specbeam.chat import render_prompt

    batch = render_prompt(tokenizer, prompts, system_prompt=system_prompt, device=device)
    return batch.input_ids, batch.attention_mask
