"""Speculation: measured against the formula, against our own plain decoding and against transformers' assistant.

    python benchmarks/speculation.py [--rounds 5] [--new 64] [--prompts 8] [--dtype float32] [--runner auto]

Bundled pair and prompts. Speed-ups are medians over prompts of ratios inside one round, interleaved; decode time only
(transformers' prefill is left out too); every timed answer is checked against eager's. The formula is that of
docs: (1 - α^(γ+1)) / (1 - α) tokens a round ÷ (γ · draft step + verifying γ + 1) in units of one plain step, with the
acceptance α of the run and the steps' costs measured beside it. Prints a table, writes
outputs/benchmarks/speculation.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LogitsProcessorList

import specbeam
from specbeam.decoding import METHODS
from specbeam.engine.support import adapt, evaluating
from specbeam.engine.tree import TokenTree, chain
from specbeam.experiment.plan import in_turn
from specbeam.experiment.prompts import BUNDLED, read_prompts
from specbeam.runners.chains import Shape
from specbeam.runners.choose import use_runner
from specbeam.runners.host_chains import HostChains

OUT = Path("outputs/benchmarks/speculation.json")
PLAIN, LENGTHS = "plain", (1, 2, 3, 4, 6)


def methods(length: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """label → kind and options."""
    return {
        PLAIN: ("greedy", {}),
        **{f"draft {n}": ("speculative", {"draft_length": n}) for n in LENGTHS},
        "draft auto": ("speculative", {"draft_length": "auto"}),
        "tree 2·1·1": ("speculative", {"branching": [2, 1, 1]}),
        "prompt lookup": ("speculative", {"drafter": "prompt_lookup"}),
        "combined, auto": ("speculative", {"drafter": "combined", "draft_length": "auto"}),
        "transformers plain": ("transformers_greedy", {}),
        f"transformers assisted {length}": ("transformers_assisted", {"draft_length": length}),
        "transformers assisted, its defaults": ("defaults", {}),
    }


def defaults(target: Any, draft: Any, ids: torch.Tensor, new: int) -> tuple[list[int], float]:
    """`generate` as a user calls it: an assistant whose draft length and threshold nobody set."""
    times: list[float] = []

    class Clock:
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            times.append(time.perf_counter())

    out = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                          assistant_model=draft, streamer=Clock())
    return out[0, ids.shape[1]:].tolist(), times[-1] - times[1]  # [0]: the prompt


class Chain:
    """A model that reads tokens one below the other, and how long each forward with its arg-max took."""

    def __init__(self, model: Any, depth: int = 96, room: int = 1000):
        self.tree, self.seconds = TokenTree(adapt(model), 1, depth + room), []
        _, nodes = self.tree.extend(self.tree.tips([0]), chain([[5] * depth], self.tree.device), last_only=True)
        self.tips, self.depth = nodes.pick(torch.tensor([[depth - 1]])), depth
        shape = Shape.of([LogitsProcessorList()], samples=False)
        self.host = HostChains(self.tree, shape) if shape and self.tree.adapter.runner.reads else None

    def read(self, count: int) -> None:
        start = time.perf_counter()
        if self.host is not None:  # as the decoding methods do
            self.host.read([[7] * count], [self.depth]).argmax(-1).tolist()
            self.seconds.append(time.perf_counter() - start)
            self.depth += 1
            return
        logits, nodes = self.tree.extend(self.tips, chain([[7] * count], self.tree.device))
        logits.argmax(-1).tolist()
        self.seconds.append(time.perf_counter() - start)
        self.tips = nodes.pick(torch.tensor([[0]]))


def costs(target: Any, draft: Any, lengths: tuple[int, ...], times: int = 30) -> dict[str, float]:
    """Medians of a plain step of the target, and of a draft step and a verifying one in turn: each finds the
    processor's caches full of the other's weights."""
    found: dict[str, float] = {}
    with evaluating(target, draft), torch.inference_mode():
        plain = Chain(target)
        for _ in range(times):
            plain.read(1)
        found["step"] = median(plain.seconds)
        for length in lengths:
            drafting, verifying = Chain(draft), Chain(target)
            for _ in range(times):
                for _ in range(length):
                    drafting.read(1)
                verifying.read(length + 1)
            found[f"draft {length}"], found[f"verify {length}"] = (sum(drafting.seconds) / len(drafting.seconds),
                                                                   median(verifying.seconds))
    return found


def formula(acceptance: float, length: int, step: float, draft: float, verify: float) -> float:
    tokens = length + 1.0 if acceptance == 1 else (1 - acceptance ** (length + 1)) / (1 - acceptance)
    return tokens * step / (length * draft + verify)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runner", default="auto")
    chosen = parser.parse_args()
    target, draft, tokenizer = specbeam.load_pair(dtype=chosen.dtype, runner=chosen.runner)
    plain_target, _ = specbeam.load_model("bundled", dtype=chosen.dtype, runner="eager")
    runner = use_runner(target, chosen.runner)
    asked, seen = [], set()
    for prompt in read_prompts(BUNDLED):  # one of each category first
        if prompt.category not in seen and len(asked) < chosen.prompts:
            seen.add(prompt.category)
            asked.append(prompt.conversation(0))
    prompts = [specbeam.render_prompt(tokenizer, [one]).input_ids for one in asked]
    options = {"max_new_tokens": chosen.new}
    for model in (target, plain_target, draft):
        model.generation_config.eos_token_id = None  # all answers have the same length

    wanted = [specbeam.greedy_generate(plain_target, prompt, **options).tokens[0] for prompt in prompts]
    labels = methods(chosen.length)
    seconds: dict[str, list[list[float]]] = {label: [[] for _ in prompts] for label in labels}
    same = {label: [True] * len(prompts) for label in labels}
    traces: dict[str, list[Any]] = {label: [] for label in labels}
    steps: dict[str, list[float]] = {}
    for turn in range(-1, chosen.rounds):  # the first is a warm-up
        for number, prompt in enumerate(prompts):
            for label, (kind, own) in in_turn(list(labels.items()), max(turn, 0) * len(prompts) + number):
                if kind == "defaults":
                    tokens, took = defaults(target, draft, prompt, chosen.new)
                else:
                    pair = (target, draft) if METHODS[kind].speculates else (target,)
                    out = METHODS[kind].load()(*pair, prompt, torch.ones_like(prompt), **options, **own)
                    tokens, took = out.tokens[0], out.trace[0].decode_seconds
                    if turn >= 0:
                        traces[label].append(out.trace[0])
                same[label][number] = same[label][number] and tokens == wanted[number]
                if turn >= 0:
                    seconds[label][number].append(took)
        if turn >= 0:
            for name, value in costs(target, draft, LENGTHS).items():
                steps.setdefault(name, []).append(value)
    cost = {name: median(values) for name, values in steps.items()}

    def times(label: str, base: str) -> float:
        return median(median(b / a for a, b in zip(ours, theirs, strict=True))
                      for ours, theirs in zip(seconds[label], seconds[base], strict=True))

    rows = []
    for label, (kind, own) in labels.items():
        row: dict[str, Any] = {
            "method": label, "tokens_per_second": (chosen.new - 1) / median(median(one) for one in seconds[label]),
            "times_plain": times(label, PLAIN),
            "times_assisted": times(label, f"transformers assisted {chosen.length}"),
            "times_assisted_defaults": times(label, "transformers assisted, its defaults"), "same": sum(same[label])}
        rounds = [one for trace in traces[label] for one in trace.rounds]
        if kind == "speculative":
            row["tokens_per_round"] = sum(one.committed for one in rounds) / len(rounds)
            row["outside"] = 1 - sum((t.draft_seconds or 0) + (t.verify_seconds or 0) for t in traces[label]) / sum(
                t.decode_seconds for t in traces[label])
            if label.startswith("draft ") and isinstance(own["draft_length"], int):
                kept = sum(one.accepted for one in rounds)
                tried = kept + sum(one.accepted < one.drafted for one in rounds)
                length = own["draft_length"]
                row["acceptance"] = kept / max(tried, 1)
                row["formula"] = formula(row["acceptance"], length, cost["step"], cost[f"draft {length}"],
                                         cost[f"verify {length}"])
                row["of_formula"] = row["times_plain"] / row["formula"]
        rows.append(row)

    verifying = ", ".join(f"{int(name.split()[1]) + 1}: {1e3 * value:.2f}" for name, value in cost.items()
                          if name.startswith("verify"))
    print(f"{chosen.dtype}, runner {runner}, {len(prompts)} prompts; milliseconds: a plain step "
          f"{1e3 * cost['step']:.2f}, a draft step {1e3 * cost['draft 4']:.2f}, verifying {verifying}")
    print(f"{'':<36} tokens/s  × plain  × assisted  × its defaults  tokens/round  formula  of it  same")
    for row in rows:
        extra = "".join(f"{row[name]:{width}.2f}" if name in row else " " * width
                        for name, width in (("tokens_per_round", 14), ("formula", 9), ("of_formula", 7)))
        print(f"{row['method']:<36} {row['tokens_per_second']:8.1f} {row['times_plain']:8.2f} "
              f"{row['times_assisted']:11.2f} {row['times_assisted_defaults']:15.2f}{extra} "
              f"{row['same']:5}/{len(prompts)}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    path = OUT if chosen.dtype == "float32" else OUT.with_stem(f"{OUT.stem}-{chosen.dtype}")
    path.write_text(json.dumps({"runner": runner, "dtype": chosen.dtype, "steps": cost, "rows": rows}, indent=1))
    print(path)


if __name__ == "__main__":
    main()
