"""transformers' own generate: plain, assisted (its draft length fixed at 4), prompt lookup, beams, batches."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import transformers
from protocol import EOS, PAD, serve
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def generate(model: Any, settings: dict[str, Any], prompts: list[list[int]], new: int) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=new, do_sample=False, **settings)
    rows = out[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def main(work: str) -> None:
    target, draft = (AutoModelForCausalLM.from_pretrained(f"{work}/{role}", dtype=torch.float32).eval()
                     for role in ("target", "draft"))  # fmt: skip
    fixed = draft.generation_config
    fixed.num_assistant_tokens, fixed.num_assistant_tokens_schedule = 4, "constant"
    fixed.assistant_confidence_threshold = 0.0
    run = partial(partial, generate, target)
    serve("transformers", transformers.__version__, {
        "plain": run({}),
        "draft model 4": run({"assistant_model": draft}),
        "prompt lookup": run({"prompt_lookup_num_tokens": 4}),
        "beams 4": run({"num_beams": 4}),
        "plain, batch": run({}),
    })  # fmt: skip


main(sys.argv[1])
