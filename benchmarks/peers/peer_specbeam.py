"""specbeam on the runner named on the command line (WORK auto | eager | …): the methods that peers have, and ours."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from protocol import serve

import specbeam
from specbeam.decoding import METHODS


def generate(models: tuple, kind: str, settings: dict[str, Any], prompts: list[list[int]], new: int) -> list[list[int]]:
    pair = models if METHODS[kind].speculates else models[:1]
    rows = [torch.tensor(prompt) for prompt in prompts]
    return METHODS[kind].load()(*pair, rows, max_new_tokens=new, **settings).tokens


def main(work: str, runner: str = "auto") -> None:
    target, draft, _ = specbeam.load_pair(f"{work}/target", f"{work}/draft", dtype="float32", runner=runner)
    used = specbeam.use_runner(target, runner)
    run = partial(partial, generate, (target, draft))
    serve(f"specbeam ({used})", specbeam.__version__, {
        "plain": run("greedy", {}),
        "draft model 4": run("speculative", {"draft_length": 4}),
        "draft model auto": run("speculative", {"draft_length": "auto"}),
        "draft model 3": run("speculative", {"draft_length": 3}),
        "prompt lookup": run("speculative", {"drafter": "prompt_lookup", "draft_length": 4}),
        "prompt lookup auto": run("speculative", {"drafter": "prompt_lookup", "draft_length": "auto"}),
        "combined auto": run("speculative", {"drafter": "combined", "draft_length": "auto"}),
        "beams 4": run("beam", {"num_beams": 4}),
        "speculative beams 4": run("speculative_beam", {"num_beams": 4, "draft_length": "auto"}),
        "plain, batch": run("greedy", {}),
        "draft model 4, batch": run("speculative", {"draft_length": 4}),
    })  # fmt: skip


main(*sys.argv[1:])
