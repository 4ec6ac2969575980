"""Beam search: ours against transformers', and speculative beams against ours. Ratios inside one run, interleaved.

    python benchmarks/beams.py [--repeats 5] [--dtypes float32,bfloat16] [--out beams.json]

Bundled pair, translation and short-answer prompts. Also the memory of keys and values for a 1,500-token prompt and 8
beams. Every timed output is checked: fp32 hypotheses must be the same.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import torch

import specbeam
from specbeam.decoding import METHODS
from specbeam.experiment.prompts import BUNDLED, read_prompts

CATEGORIES = ("translation", "arithmetic", "instruction")


def methods(width: int) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        f"beam {width}": ("beam", {"num_beams": width}),
        f"transformers_beam {width}": ("transformers_beam", {"num_beams": width}),
        f"speculative_beam {width}, auto": ("speculative_beam", {"num_beams": width, "draft_length": "auto"}),
        f"speculative_beam {width}, 2 steps": ("speculative_beam", {"num_beams": width, "draft_length": 2}),
    }


def measure(dtype: str, repeats: int, widths: tuple[int, ...] = (2, 4, 8)) -> list[dict[str, Any]]:
    target, draft, tokenizer = specbeam.load_pair(dtype=dtype)
    asked = [p.conversation(0) for p in read_prompts(BUNDLED) if p.category in CATEGORIES][::3]
    prompts = [specbeam.render_prompt(tokenizer, [one]).input_ids for one in asked]
    found = []
    for width in widths:
        seconds: dict[str, list[list[float]]] = {label: [[] for _ in prompts] for label in methods(width)}
        tokens: dict[str, dict[int, Any]] = {label: {} for label in seconds}
        steps: dict[str, list[int]] = {label: [0, 0] for label in seconds}
        for repeat in range(-1, repeats):  # the first is a warm-up
            for number, prompt in enumerate(prompts):
                for label, (kind, options) in methods(width).items():
                    models = (target, draft) if METHODS[kind].speculates else (target,)
                    out = METHODS[kind].load()(*models, prompt, torch.ones_like(prompt), max_new_tokens=40, **options)
                    tokens[label][number] = out.tokens[0]
                    if repeat >= 0:
                        trace = out.trace[0]
                        seconds[label][number].append(trace.decode_seconds)
                        steps[label][0] += sum(r.committed for r in trace.rounds)
                        steps[label][1] += len(trace.rounds)
        base = [median(times) for times in seconds[f"beam {width}"]]
        for label, times in seconds.items():
            ratios = sorted(ours / median(theirs) for ours, theirs in zip(base, times, strict=True))
            found.append({
                "dtype": dtype, "method": label, "times_beam": median(ratios), "lowest": ratios[0],
                "highest": ratios[-1], "steps_per_round": steps[label][0] / max(steps[label][1], 1),
                "same_tokens": sum(tokens[label][n] == tokens[f"beam {width}"][n] for n in range(len(prompts))),
                "prompts": len(prompts)})
    return found


def memory(prompt_tokens: int = 1500, num_beams: int = 8, new: int = 32) -> dict[str, float]:
    """MiB of keys and values that each search holds at its end."""
    from specbeam.engine import cache

    target, _ = specbeam.load_model("bundled", runner="eager")  # whose slots can be counted
    prompt = torch.randint(10, 8000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    slots: list[Any] = []
    create = cache.SlotCache.__init__

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        slots.append(self)

    cache.SlotCache.__init__ = remember  # type: ignore[method-assign]
    try:
        specbeam.beam_generate(target, prompt, num_beams=num_beams, max_new_tokens=new, min_new_tokens=new)
    finally:
        cache.SlotCache.__init__ = create  # type: ignore[method-assign]
    ours = sum(t.numel() * t.element_size() for layer in slots[-1].layers for t in (layer.keys, layer.values))
    out = target.generate(prompt, attention_mask=torch.ones_like(prompt), num_beams=num_beams, max_new_tokens=new,
                          min_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    theirs = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers
                 for t in (layer.keys, layer.values))
    return {"specbeam": ours / 2**20, "transformers": theirs / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out")
    chosen = parser.parse_args()
    rows = [row for dtype in chosen.dtypes.split(",") for row in measure(dtype, chosen.repeats)]
    held = memory()
    for row in rows:
        print(f"{row['dtype']:9} {row['method']:28} {row['times_beam']:.2f} × beam "
              f"({row['lowest']:.2f}–{row['highest']:.2f} over prompts)  {row['steps_per_round']:.2f} steps a round  "
              f"{row['same_tokens']}/{row['prompts']} same")
    print(f"keys and values, 1,500-token prompt, 8 beams: specbeam {held['specbeam']:.0f} MiB, "
          f"transformers {held['transformers']:.0f} MiB")
    if chosen.out:
        with open(chosen.out, "w", encoding="utf-8") as file:
            json.dump({"rows": rows, "memory": held}, file, indent=1)


if __name__ == "__main__":
    main()
