"""Beam search: ours against transformers', and speculative beams against ours. Ratios inside one run, interleaved.

    python benchmarks/beams.py [--repeats 3] [--dtypes float32,bfloat16] [--widths 2,4,8] [--runner auto] [--out f.json]

Bundled pair, translation and short-answer prompts. Every output is checked: in fp32 the tokens must be those of our
beam search. Beside speed: the time outside forwards, how often the target's next beams were all among the draft's
(steps a round with a free draft and free verification), what that could be worth at most with this machine's forwards,
and for a 1,500-token prompt and 8 beams the memory of keys and values, and the most that a process needs to search.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

import specbeam
from specbeam.decoding import METHODS
from specbeam.engine import tree
from specbeam.engine.support import adapt, evaluating
from specbeam.experiment.plan import in_turn
from specbeam.experiment.prompts import BUNDLED, read_prompts
from specbeam.experiment.records import peak_memory, reset_peak_memory

CATEGORIES = ("translation", "arithmetic", "instruction")
CEILING = 6  # steps ahead
PEAKS = ("beam", "speculative_beam", "transformers_beam")


def methods(width: int, leave_out: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    found = {"beam": ("beam", {}), "transformers_beam": ("transformers_beam", {}),
             "speculative_beam, auto": ("speculative_beam", {"draft_length": "auto"})}
    for ahead in (1, 2, 3):
        found[f"speculative_beam, {ahead} ahead"] = ("speculative_beam", {"draft_length": ahead})
    for drafter in ("token_recycling", "prompt_lookup"):
        found[f"speculative_beam, {drafter}, auto"] = (
            "speculative_beam", {"drafter": drafter, "draft_length": "auto"})
    return {f"{label}, width {width}": (kind, {"num_beams": width, **options})
            for label, (kind, options) in found.items() if not any(part in label for part in leave_out)}


def interval(logs: list[float]) -> tuple[float, float, float]:
    """Geometric mean over prompts, and its 95 % bootstrap interval."""
    each = np.array(logs)
    draws = np.random.default_rng(0).choice(each, (4000, len(each))).mean(1)
    return tuple(float(np.exp(value)) for value in (each.mean(), *np.percentile(draws, [2.5, 97.5])))  # type: ignore


def measure(dtype: str, runner: str, repeats: int, widths: list[int], count: int,
            leave_out: list[str]) -> list[dict[str, Any]]:
    target, draft, tokenizer = specbeam.load_pair(dtype=dtype, runner=runner)
    asked = [p.conversation(0) for p in read_prompts(BUNDLED) if p.category in CATEGORIES]
    prompts = [specbeam.render_prompt(tokenizer, [one]).input_ids for one in asked[:: max(len(asked) // count, 1)]]
    forwards = [0.0]
    plain = tree.TokenTree.extend.__globals__["forward"]

    def timed(*arguments: Any) -> Any:
        start = perf_counter()
        logits = plain(*arguments)
        forwards[0] += perf_counter() - start
        return logits

    tree.TokenTree.extend.__globals__["forward"] = timed
    found = []
    for width in widths:
        chosen = methods(width, leave_out)
        seconds: dict[str, list[list[float]]] = {label: [[] for _ in prompts] for label in chosen}
        outside: dict[str, list[float]] = {label: [] for label in chosen}
        tokens: dict[str, dict[int, Any]] = {label: {} for label in chosen}
        rounds: dict[str, list[Any]] = {label: [] for label in chosen}
        for repeat in range(-1, repeats):  # the first is a warm-up
            for number, prompt in enumerate(prompts):
                for label in in_turn(list(chosen), max(repeat, 0) * len(prompts) + number):
                    kind, options = chosen[label]
                    models = (target, draft) if METHODS[kind].speculates else (target,)
                    forwards[0], start = 0.0, perf_counter()
                    out = METHODS[kind].load()(*models, prompt, torch.ones_like(prompt), max_new_tokens=40, **options)
                    whole = perf_counter() - start
                    tokens[label][number] = out.tokens[0]
                    if repeat >= 0:
                        seconds[label][number].append(out.trace[0].decode_seconds)
                        outside[label].append(1 - forwards[0] / whole)
                        rounds[label] += out.trace[0].rounds
        base = {name: [median(times) for times in seconds[f"{name}, width {width}"]]
                for name in ("beam", "transformers_beam") if f"{name}, width {width}" in chosen}
        for label, times in seconds.items():
            ratios = {name: interval([float(np.log(theirs / median(ours))) for theirs, ours
                                      in zip(base[name], times, strict=True)]) for name in base}
            steps = sum(one.committed for one in rounds[label]) / max(len(rounds[label]), 1)
            found.append({
                "dtype": dtype, "runner": runner, "method": label, "times_beam": ratios["beam"],
                "times_transformers": ratios.get("transformers_beam"), "steps_per_round": steps,
                "milliseconds_per_round": 1e3 * sum(map(sum, times)) / max(len(rounds[label]), 1),
                "outside_forwards": None if label.startswith("transformers") else median(outside[label]),
                "same_tokens": sum(tokens[label][n] == tokens[f"beam, width {width}"][n] for n in range(len(prompts))),
                "prompts": len(prompts)})
            show(found[-1])
        if "ceiling" in leave_out:
            continue
        steps, most = ceiling(target, draft, prompts, width), bound(target, draft, prompts, width)
        found.append({"dtype": dtype, "width": width, "ceiling": steps, "bound": most})
        print(f"  steps a round that {CEILING} steps ahead reach, by draft beams: {steps}\n"
              f"  times beam at most, by steps ahead: {most}", flush=True)
    tree.TokenTree.extend.__globals__["forward"] = plain
    return found


def ceiling(target: Any, draft: Any, prompts: list[Any], width: int) -> dict[int, float]:
    """Steps a round when the draft goes far ahead, by the width of its search: agreement alone, whatever it costs."""
    found = {}
    for wide in (width, width + 2, 2 * width + 2):
        rounds = [one for prompt in prompts for one in specbeam.speculative_beam_generate(
            target, draft, prompt, num_beams=width, draft_beams=wide, draft_length=CEILING, max_new_tokens=40
        ).trace[0].rounds]
        found[wide] = round(sum(one.committed for one in rounds) / max(len(rounds), 1), 2)
    return found


def bound(target: Any, draft: Any, prompts: list[Any], width: int) -> dict[int, float]:
    """What any draft that agrees as often could reach, by steps ahead: steps a round ÷ what a round costs in plain
    steps if the draft is free, no node is proposed in vain (`width` at each depth) and nothing but forwards takes time.
    """
    adapter = adapt(target)
    taken: dict[int, list[float]] = {ahead: [] for ahead in range(CEILING + 1)}
    with torch.inference_mode(), evaluating(target):
        for prompt in prompts * 3:
            for ahead, seconds in taken.items():
                grown, tips, _ = tree.read_prompts(adapter, prompt.tolist(), 256)
                tokens = torch.full((1, width * (ahead + 1)), 9)
                for _ in range(2):  # the first after a prompt is slower
                    start = perf_counter()
                    grown.extend(tips, tree.leaves(tokens, torch.zeros_like(tokens)))
                    last = perf_counter() - start
                seconds.append(last)
    found = {}
    for ahead in range(1, CEILING + 1):
        rounds = [one for prompt in prompts for one in specbeam.speculative_beam_generate(
            target, draft, prompt, num_beams=width, draft_beams=2 * width + 2, draft_length=ahead, max_new_tokens=40
        ).trace[0].rounds]
        steps = sum(one.committed for one in rounds) / max(len(rounds), 1)
        found[ahead] = round(steps * median(taken[0]) / median(taken[ahead]), 2)
    return found


def show(row: dict[str, Any]) -> None:
    ours, theirs = ("{:.2f} ({:.2f}–{:.2f})".format(*(row[name] or [float("nan")] * 3))
                    for name in ("times_beam", "times_transformers"))
    apart = "" if row["outside_forwards"] is None else f"  {row['outside_forwards']:.0%} outside forwards"
    print(f"{row['dtype']:9} {row['method']:48} × beam {ours}  × transformers {theirs}  {row['steps_per_round']:.2f} "
          f"steps a round of {row['milliseconds_per_round']:.1f} ms{apart}  {row['same_tokens']}/{row['prompts']} same",
          flush=True)


def memory(prompt_tokens: int = 1500, num_beams: int = 8, new: int = 32) -> dict[str, float]:
    """MiB of keys and values that each search holds at its end (eager, fp32)."""
    from specbeam.engine import cache

    target, _ = specbeam.load_model("bundled", runner="eager", dtype="float32")
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


def peak(kind: str, prompt_tokens: int = 1500, num_beams: int = 8, new: int = 32) -> float:
    """MiB that a search takes at most in this process, beside what is there before it (the models; eager, fp32)."""
    target, draft, _ = specbeam.load_pair(runner="eager", dtype="float32")
    prompt = torch.randint(10, 8000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    run, speculates = METHODS[kind].load(), METHODS[kind].speculates
    models, options = ((target, draft), {"draft_length": 3}) if speculates else ((target,), {})
    for length in (8, prompt_tokens):  # the first imports and probes what it needs
        reset_peak_memory(target.device)
        before = peak_memory(target.device)
        run(*models, prompt[:, :length], torch.ones_like(prompt[:, :length]), num_beams=num_beams, max_new_tokens=new,
            min_new_tokens=new, **options)
    after = peak_memory(target.device)
    if before is None or after is None:
        raise SystemExit("the most memory that a process has had is only known on Linux: give --no-memory.")
    return (after - before) / 2**20


def peaks() -> dict[str, float]:
    """`peak` of each search, each in a process of its own: what one has freed may stay with the process."""
    return {kind: json.loads(subprocess.run([sys.executable, __file__, "--peak", kind], check=True, text=True,
                                            stdout=subprocess.PIPE).stdout.splitlines()[-1]) for kind in PEAKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--widths", default="2,4,8")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--leave-out", default="", help="parts of labels, and ceiling")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", choices=PEAKS, help="only the memory of this search, as a number")
    parser.add_argument("--out")
    chosen = parser.parse_args()
    if chosen.peak:
        print(peak(chosen.peak))
        return
    rows = [row for dtype in chosen.dtypes.split(",") for row in measure(
        dtype, chosen.runner, chosen.repeats, [int(width) for width in chosen.widths.split(",")], chosen.prompts,
        [part for part in chosen.leave_out.split(";") if part])]
    held = most = None
    if not chosen.no_memory:
        held, most = memory(), peaks()
        print(f"keys and values, 1,500-token prompt, 8 beams: specbeam {held['specbeam']:.0f} MiB, "
              f"transformers {held['transformers']:.0f} MiB")
        print("most memory beside the models: " + ", ".join(f"{kind} {size:.0f} MiB" for kind, size in most.items()))
    if chosen.out:
        with open(chosen.out, "w", encoding="utf-8") as file:
            json.dump({"rows": rows, "memory": held, "peak_memory": most}, file, indent=1)


if __name__ == "__main__":
    main()
