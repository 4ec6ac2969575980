"""specbeam, transformers and native engines on one checkpoint pair, side by side: one table, one JSON file.

    python benchmarks/peers/prepare.py WORK        # once: environments, conversions
    python benchmarks/peers/compare.py WORK [--section plain|speculation|beams|batch] [--rounds 5] [--out FILE.json]

Each engine is a process of its own that stays; only one computes at a time. A round is every method of every engine
once, none always after the same other; tokens a second are new tokens ÷ seconds of a call, prefill included, and the
table gives medians over the rounds after one warm-up. Tokens are held against transformers' plain greedy (or beams).
Prompts are the bundled ones whose greedy answer is at least as long as asked for: every engine does the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from specbeam.experiment.plan import in_turn

HERE = Path(__file__).resolve().parent
SETTLE = 0.2  # seconds between calls: threads of the engine before stop spinning
ENGINES = {  # name → (environment; None: this one, script, arguments)
    "transformers": (None, "peer_transformers.py", []),
    "specbeam": (None, "peer_specbeam.py", ["auto"]),
    "specbeam eager": (None, "peer_specbeam.py", ["eager"]),
    "openvino": ("openvino", "peer_openvino.py", []),
    "onnxruntime": ("onnxruntime", "peer_onnxruntime.py", []),
    "ctranslate2": ("ctranslate2", "peer_ctranslate2.py", []),
    "llamacpp": ("llamacpp", "peer_llamacpp.py", []),
}
SECTIONS = {
    "plain": ("plain",),
    "speculation": ("plain", "draft model 4", "draft model 3", "draft model auto", "prompt lookup",
                    "prompt lookup auto", "combined auto"),
    "beams": ("beams 4", "speculative beams 4"),
    "batch": ("plain, batch", "draft model 4, batch"),
}


class Engine:
    """A peer's process, and what it said when it started."""

    def __init__(self, name: str, work: Path):
        place, script, more = ENGINES[name]
        python = sys.executable if place is None else str(work / "venv" / place / "bin" / "python")
        with open(work / f"{name}.err", "w") as said:
            self.process = subprocess.Popen(
                [python, str(HERE / script), str(work), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=said, text=True,
            )  # fmt: skip
        self.hello = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with status {self.process.wait()}")
        return json.loads(line)

    def generate(self, method: str, prompts: list[list[int]], new: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "prompts": prompts, "new_tokens": new}) + "\n")
        self.process.stdin.flush()
        return self._answer()


def start(names: list[str], work: Path) -> tuple[dict[str, Engine], dict[str, str]]:
    engines, absent = {}, {}
    for name in names:
        try:
            engines[name] = Engine(name, work)
        except (OSError, RuntimeError, ValueError) as error:
            absent[name] = f"{error} (see {work / f'{name}.err'})"
    return engines, absent


def long_prompts(work: Path, new: int, count: int) -> list[list[int]]:
    """Bundled prompts, of as many categories as there are, whose greedy answer does not end before `new` tokens.
    Looked for once, and kept in WORK."""
    kept = work / f"prompts-{new}.json"
    if not kept.exists():
        import specbeam
        from specbeam.experiment.prompts import BUNDLED, read_prompts

        target, tokenizer = specbeam.load_model(work / "target", dtype="float32", device="cpu")
        found: dict[str, list[list[int]]] = {}
        for prompt in read_prompts(BUNDLED):
            ids = specbeam.render_prompt(tokenizer, [prompt.conversation(0)]).input_ids
            if len(specbeam.greedy_generate(target, ids, max_new_tokens=new).tokens[0]) == new:
                found.setdefault(prompt.category, []).append(ids[0].tolist())
        kept.write_text(json.dumps([group[place] for place in range(40) for group in found.values()
                                    if place < len(group)]))  # fmt: skip
    return json.loads(kept.read_text())[:count]


def measure(engines: dict[str, Engine], section: str, prompts: list[list[int]], new: int, rounds: int
            ) -> list[dict[str, Any]]:  # fmt: skip
    jobs = [(name, method) for method in SECTIONS[section] for name, engine in engines.items()
            if method in engine.hello["methods"]]  # fmt: skip
    batches = [prompts] if section == "batch" else [[prompt] for prompt in prompts]
    rates: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    tokens: dict[tuple[str, str], list[list[int]]] = {}
    errors: dict[tuple[str, str], str] = {}
    for number in range(-1, rounds):  # the first is a warm-up
        for job in in_turn(jobs, max(number, 0)):
            if job in errors:
                continue
            seconds, rows = 0.0, []
            for batch in batches:
                time.sleep(SETTLE)
                answer = engines[job[0]].generate(job[1], batch, new)
                if "error" in answer:
                    errors[job] = answer["error"]
                    break
                seconds += answer["seconds"]
                rows += answer["tokens"]
            else:
                tokens[job] = rows
                if number >= 0:
                    rates[job].append(sum(map(len, rows)) / seconds)
    reference = tokens.get(("transformers", "beams 4" if section == "beams" else jobs[0][1]), [])
    return [{
        "section": section, "engine": engines[name].hello["peer"], "version": engines[name].hello["version"],
        "method": method, "error": errors.get((name, method)),
        "tokens_per_second": median(rates[name, method]) if rates[name, method] else None,
        "rounds": rates[name, method],
        "same_tokens": sum(a == b for a, b in zip(tokens.get((name, method), []), reference, strict=False)),
        "of": len(reference),
    } for name, method in jobs]  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| section | engine | method | tokens/s | slowest to fastest round | same tokens |",
             "|---|---|---|--:|--:|--:|"]  # fmt: skip
    for row in found:
        if row["error"]:
            lines.append(f"| {row['section']} | {row['engine']} | {row['method']} | failed: {row['error']} | | |")
            continue
        span = f"{min(row['rounds']):.0f}–{max(row['rounds']):.0f}"
        lines.append(f"| {row['section']} | {row['engine']} | {row['method']} | {row['tokens_per_second']:.1f} "
                     f"| {span} | {row['same_tokens']}/{row['of']} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--section", default=",".join(SECTIONS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    prompts = long_prompts(work, chosen.new_tokens, chosen.prompts)
    if not prompts:
        raise SystemExit(f"No bundled prompt has an answer of {chosen.new_tokens} tokens: lower --new-tokens.")
    engines, absent = start(chosen.engines.split(","), work)
    found: list[dict[str, Any]] = []
    for section in chosen.section.split(","):
        found += measure(engines, section, prompts, chosen.new_tokens, chosen.rounds)
    print(f"{len(prompts)} prompts of {', '.join(str(len(p)) for p in prompts)} tokens, {chosen.new_tokens} new "
          f"tokens, fp32, {os.environ['OMP_NUM_THREADS']} threads, medians of {chosen.rounds} rounds\n")  # fmt: skip
    print(table(found))
    for name, reason in absent.items():
        print(f"\nnot here: {name}: {reason}")
    if chosen.out:
        chosen.out.write_text(json.dumps({"rows": found, "absent": absent}, indent=1))
    for engine in engines.values():
        engine.process.terminate()


main()
