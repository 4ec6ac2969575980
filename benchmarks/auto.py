"""Is `draft_length=auto` never slower than plain decoding, and as fast as the best fixed length? Ratios in one run.

    python benchmarks/auto.py --out auto.jsonl [--spec-bench question.jsonl] [--repeats 2] [--new 32] [--seconds 220]

Workloads: the bundled prompts; Spec-Bench's six categories, five prompts each; deliberately bad drafts (a randomly
initialised one; a text in which nothing can be looked up: no pair of tokens may come twice). Each batch of prompts is
answered by plain greedy decoding, auto and the fixed lengths, none of them mostly after the same other. Every answer's
tokens are checked against plain greedy decoding's. Rows go to --out as they come, and the same command goes on
where it stopped (after --seconds); what auto has learned is then learned anew in a warm-up that is not counted. A batch
during which other processes used a twentieth of the processors (as Linux counts it) is measured again.

The bar: the 95 % interval of auto over plain decoding does not lie below 0.98, and that of auto over the best fixed
length (by its own median, which flatters it) does not lie below 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import specbeam
from specbeam.decoding import METHODS
from specbeam.experiment.plan import in_turn
from specbeam.experiment.prompts import BUNDLED, Prompt, read_prompts
from specbeam.experiment.rows import accepted_by_position
from specbeam.experiment.statistics import summarise

CATEGORIES = {"translation": "translation", "summarization": "summary", "qa": "qa", "math_reasoning": "math",
              "rag": "rag"}  # of Spec-Bench; its other eight are mt-bench
FIXED = {1: (2, 3, 4, 8), 8: (1, 2, 4)}  # draft lengths that auto is held against, by batch size
NO_PAIR_TWICE = {"no_repeat_ngram_size": 2}
Row = dict[str, Any]


def workloads(spec_bench: str | None) -> dict[str, tuple[list[Prompt], dict[str, dict[str, Any]], dict[str, Any]]]:
    """name → prompts, {method: settings} beside plain greedy, and options of them all."""
    def adapting(sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        return {"auto": {"draft_length": "auto"}, **{f"fixed {n}": {"draft_length": n} for n in sizes}}

    bundled = read_prompts(BUNDLED)
    found: dict[str, Any] = {"bundled": (bundled, adapting, {})}
    if spec_bench:
        groups: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in read_prompts(Path(spec_bench)):
            group = CATEGORIES.get(str(prompt.category), "mt-bench")
            if len(groups[group]) < 5:
                groups[group].append(prompt)
        found |= {group: (prompts, adapting, {}) for group, prompts in groups.items()}
    some = bundled[::5]
    found["random draft"] = (some, lambda _: {"auto": {"draft_length": "auto", "draft": "random"}}, {})
    found["nothing to look up"] = (some, lambda _: {
        "auto": {"draft_length": "auto", "drafter": "suffix"},
        "auto, prompt_lookup": {"draft_length": "auto", "drafter": "prompt_lookup"}}, NO_PAIR_TWICE)
    return found


def batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start: start + size]


def measure(out: Path, spec_bench: str | None, sizes: list[int], repeats: int, new: int, seconds: float,
            only: list[str] | None) -> int:
    """Rows of all cells that `out` does not have yet; how many cells are left when the time is over."""
    began = time.monotonic()
    target, draft, tokenizer = specbeam.load_pair()
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(draft.config).eval()
    drafts = {None: draft, "random": random}
    done = {(row["workload"], row["batch"], row["repeat"], row["batch_id"]) for row in read(out)}
    plans = workloads(spec_bench)
    left, warm, disturbed = 0, set(), 0
    for repeat in range(repeats):
        for size in sizes:
            for name, (prompts, methods_of, options) in plans.items():
                if only and name not in only:
                    continue
                methods = {"greedy": None, **methods_of(FIXED.get(size, (2, 4, 8)))}
                for number, batch in enumerate(batches(prompts, size)):
                    cell = (name, size, repeat, f"{name}/{size}/{number}")
                    if cell in done:
                        continue
                    if time.monotonic() - began > seconds:
                        left += 1
                        continue
                    asked = specbeam.render_prompt(tokenizer, [prompt.conversation(0) for prompt in batch])
                    turns = [repeat + number]
                    if (size, options == {}, *methods) not in warm:  # a batch that does not count, twice
                        warm.add((size, options == {}, *methods))
                        turns = [-1, -1, *turns]
                    while turns:
                        rows, began_at = [], (time.perf_counter(), others())
                        for method in in_turn(list(methods), max(turns[0], 0)):
                            settings = dict(methods[method] or {})
                            model = drafts[settings.pop("draft", None)]
                            kind = "greedy" if methods[method] is None else "speculative"
                            models = (target,) if kind == "greedy" else (target, model)
                            answer = METHODS[kind].load()(*models, asked.input_ids, asked.attention_mask,
                                                          max_new_tokens=new, **settings, **options)
                            rows += rows_of(answer, cell, batch, method, kind)
                        check(rows)
                        wall, theirs = time.perf_counter() - began_at[0], others() - began_at[1]
                        most = max(0.03, 0.05 * wall * (os.cpu_count() or 1))  # it counts in hundredths of a second
                        disturbed = 0 if turns[0] < 0 or theirs < most else disturbed + 1
                        if not 0 < disturbed < 4:
                            del turns[0]
                    with out.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(row) + "\n" for row in rows)
    return left


def others() -> float:
    """Seconds that processors have worked for other processes (0: not known here)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def rows_of(answer: Any, cell: tuple[str, int, int, str], batch: list[Prompt], method: str, kind: str) -> list[Row]:
    name, size, repeat, batch_id = cell
    return [{
        "workload": name, "batch": size, "method": method, "kind": kind, "prompt_id": prompt.id, "turn": 0,
        "category": prompt.category, "repeat": repeat, "batch_id": batch_id, "status": "ok",
        "new_tokens": len(tokens), "first_tokens": trace.first_tokens, "prefill_seconds": trace.prefill_seconds,
        "decode_seconds": trace.decode_seconds, "draft_seconds": trace.draft_seconds,
        "verify_seconds": trace.verify_seconds, "rounds": len(trace.rounds),
        "drafted": sum(r.drafted for r in trace.rounds), "accepted": sum(r.accepted for r in trace.rounds),
        "accepted_by_position": accepted_by_position(trace), "finish_reason": "", "tokens": tokens,
    } for prompt, tokens, trace in zip(batch, answer.tokens, answer.trace, strict=True)]


def check(rows: list[Row]) -> None:
    plain = {row["prompt_id"]: row["tokens"] for row in rows if row["method"] == "greedy"}
    for row in rows:
        if row["tokens"] != plain[row["prompt_id"]]:
            sys.exit(f"{row['method']} gave other tokens than plain greedy decoding on {row['prompt_id']}.")


def read(out: Path) -> list[Row]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def compare(rows: list[Row], method: str, base: str) -> dict[str, Any]:
    """Speed-up of a method over another as in `specbeam compare`: median over batches, 95 % bootstrap interval."""
    both = [{**row, "method": "greedy" if row["method"] == base else "auto"}
            for row in rows if row["method"] in (method, base)]
    kinds = {"greedy": {"kind": "greedy"}, "auto": {"kind": "speculative"}}
    return summarise(both, kinds)["methods"]["auto"]["speedup"]["greedy"]


def table(rows: list[Row]) -> str:
    lines = ["| workload | batch | method | × plain (95 %) | best fixed | × plain | auto ÷ best fixed (95 %) | rounds "
             "with proposals | bar |", "|---|--:|---|--:|---|--:|--:|--:|---|"]
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["workload"], row["batch"]].append(row)
    for (name, size), own in sorted(groups.items(), key=lambda item: item[0][1]):
        fixed = {method: compare(own, method, "greedy") for method in dict.fromkeys(row["method"] for row in own)
                 if method.startswith("fixed")}
        best = max(fixed, key=lambda method: fixed[method]["median"], default=None)
        for method in dict.fromkeys(row["method"] for row in own if row["method"].startswith("auto")):
            over_plain = compare(own, method, "greedy")
            if over_plain["low"] is None:  # one batch, once: no interval
                continue
            over_best = compare(own, method, best) if best else None
            mine = [row for row in own if row["method"] == method]
            holds = over_plain["high"] >= 0.98 and (over_best is None or over_best["high"] >= 1)
            lines.append(
                f"| {name} | {size} | {method} | {show(over_plain)} | {best or '–'} | "
                f"{format(fixed[best]['median'], '.2f') if best else '–'} | {show(over_best) if over_best else '–'} | "
                f"{sum(row['drafted'] > 0 for row in mine)}/{len(mine)} answers, "
                f"{sum(row['drafted'] for row in mine) / sum(row['rounds'] for row in mine):.2f} a round | "
                f"{'holds' if holds else 'MISSED'} |")
    return "\n".join(lines)


def show(speedup: dict[str, Any]) -> str:
    return f"{speedup['median']:.2f} ({speedup['low']:.2f}–{speedup['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spec-bench")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of workloads, separated by commas")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    sizes = [int(size) for size in chosen.batches.split(",")]
    left = measure(chosen.out, chosen.spec_bench, sizes, chosen.repeats, chosen.new, chosen.seconds,
                   chosen.only.split(",") if chosen.only else None)
    print(table(read(chosen.out)))
    if left:
        print(f"{left} batches are left: run the same command again.")


if __name__ == "__main__":
    main()
