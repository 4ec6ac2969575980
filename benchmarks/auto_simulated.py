"""Does `draft_length=auto` decide well? Real texts and confidences, seconds by a formula: no noise but what is put in.

    python benchmarks/auto_simulated.py --record chains.json [--spec-bench question.jsonl] [--rows 1,8] [--seeds 24]

Where speculation gains a tenth, a busy machine's noise hides what a decision costs; here two rules can be told apart in
seconds. First (once; kept in --record) the draft's proposal behind every prefix of the target's answers is recorded,
with its confidences. Then answers are decoded in a world whose forwards take the seconds of two CPU cores with the
bundled pair (2026-11-30), with noise, drift and a price for another width, by the very `Length` that decodes.
The table: over plain decoding, of auto and of fixed lengths, and auto over the best of them all.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from auto import workloads

import specbeam
from specbeam.drafting import Proposal, Settings
from specbeam.drafting.length import Length

NEW, DEEP = 32, 8
Chain = tuple[list[float], int]  # confidences of a proposal, and how many of its tokens are right


@dataclass(frozen=True)
class Answer:
    prompt: int  # tokens
    tokens: int
    chains: list[Chain]  # behind the answer's first, second, … token


@torch.inference_mode()
def recorded(target: Any, draft: Any, prompt: torch.Tensor) -> Answer:
    tokens = list(specbeam.greedy_generate(target, [prompt], max_new_tokens=NEW).tokens[0])
    prefixes = [torch.cat([prompt, torch.tensor(tokens[:n], dtype=torch.long)]) for n in range(1, len(tokens))]
    chains: list[Chain] = []
    if prefixes:
        out = specbeam.greedy_generate(draft, prefixes, max_new_tokens=DEEP, eos_token_id=None)
        for prefix, proposed in zip(prefixes, out.tokens, strict=True):
            logits = draft(torch.cat([prefix, torch.tensor(proposed)])[None]).logits[0, len(prefix) - 1 : -1]
            after = tokens[len(prefix) - len(prompt):]
            right = 0
            while right < min(DEEP, len(after)) and proposed[right] == after[right]:
                right += 1
            chains.append((logits.float().softmax(-1).amax(-1).tolist(), right))
    return Answer(len(prompt), len(tokens), chains)


class World:
    """Seconds of forwards on a machine that is busy now and then, and a runner that keeps widths (openvino.py)."""

    PATIENCE = 8.6  # tokens in vain, of all rows

    def __init__(self, seed: int):
        self.random, self.drift, self.wide, self.rows, self.wasted, self.changed = Random(seed), 1.0, 0, 0, 0.0, False

    def noisy(self, milliseconds: float) -> float:
        self.drift += self.random.gauss(0, 0.008) - 0.005 * (self.drift - 1)
        slow = self.random.uniform(1.2, 2.2) if self.random.random() < 0.04 else 1.0
        return milliseconds / 1e3 * self.drift * self.random.lognormvariate(0, 0.08) * slow

    def target(self, rows: int, new: int, exact: bool = False) -> float:
        kept = self.wide if self.rows == rows else 0
        self.wasted += rows * (kept - new) + 5 * ((rows * kept > 4) - (rows * new > 4))
        if kept <= new or exact or self.wasted > self.PATIENCE:
            kept, self.wasted = new, 0.0
        self.changed = (rows, kept) != (self.rows, self.wide)
        self.rows, self.wide = rows, kept
        tokens = rows * kept
        return self.noisy(2.35 + 0.07 * min(tokens, 4) + 0.28 * max(0, min(tokens, 9) - 4) + 0.25 * max(0, tokens - 9)
                          + 1.3 * (tokens > 4) + 0.15 * (kept > 1) + 1.8 * self.changed)

    def draft(self, rows: int, first: bool) -> float:
        return self.noisy(0.68 + 0.17 * (rows - 1) if first else 0.45 + 0.1 * (rows - 1))


class Model:
    """Stands for one: what was learned is remembered by object."""


def decode(world: World, answers: list[Answer], gamma: int | str, pair: tuple[Model, Model]) -> float:
    """Seconds of decoding these prompts as one batch; gamma 0: plainly."""
    live, clock = [(answer, 1) for answer in answers if answer.tokens > 1], 0.0
    world.wide = world.rows = 0  # prompts were read
    settings = Settings(draft_length=gamma or 1)
    longest = max(answer.prompt for answer in answers)
    length = Length(settings, *pair, len(live), NEW, longest)
    while live:
        left = [NEW - at for _, at in live]
        length.fresh = not world.rows
        length.wide = longest if length.fresh else world.wide if world.rows == len(live) else 0
        limits = length.limits([min(settings.depth, n - 1) for n in left], left) if gamma else [0] * len(live)
        if not gamma or length.rest:
            ends = min(answer.tokens - at for answer, at in live)  # which nobody knows before
            steps = [world.target(len(live), 1, exact=True) for _ in range(min(length.rest or 1, ends))]
            clock += sum(steps)
            if gamma:
                length.rested(steps, sum(steps))
            live = [(answer, at + len(steps)) for answer, at in live]
        else:
            drafting, counts, proposal = 0.0, [0] * len(live), None
            if max(limits):
                drafting, proposal = propose(world, live, limits, length)
                counts = [len(ids) for ids in proposal.tokens]
            verify = world.target(len(live), max(counts) + 1)
            thinks = length.auto and not length.learned.blind
            beside = world.noisy(0.05 + 0.06 * thinks + 0.03 * (length.auto and length.asks))
            right = [min(n, answer.chains[at - 1][1]) for n, (answer, at) in zip(counts, live, strict=True)]
            seconds = [drafting, verify, drafting + verify + beside]
            clock += seconds[2]
            length.round_done(proposal, [range(n) for n in right],
                              [min(n + 1, most) for n, most in zip(right, left, strict=True)], seconds, world.wide,
                              world.changed)
            live = [(answer, at + n + 1) for n, (answer, at) in zip(right, live, strict=True)]
        live = [(answer, at) for answer, at in live if at < answer.tokens]
    length.ends()
    return clock


def propose(world: World, live: list[tuple[Answer, int]], limits: list[int], length: Length) -> tuple[float, Proposal]:
    """As drafting/draft_model.py does."""
    counts, sure, wanted, forwards = [0] * len(live), [[] for _ in live], [n > 0 for n in limits], 1
    seconds = world.draft(len(live), first=True)
    for step in range(max(limits)):
        if length.asks:
            seconds += world.noisy(0.06)
            largest = [answer.chains[at - 1][0][step] for answer, at in live]
            wanted = length.proposes(wanted, largest)
            for row, confidence in enumerate(largest):
                sure[row] += [confidence] * wanted[row]
        counts = [n + here for n, here in zip(counts, wanted, strict=True)]
        wanted = length.reads_on([here and step + 1 < most for here, most in zip(wanted, limits, strict=True)])
        if not any(wanted):
            break
        seconds, forwards = seconds + world.draft(len(live), first=False), forwards + 1
    return seconds, Proposal([[0] * n for n in counts], [list(range(-1, n - 1)) for n in counts], None,
                             ["draft_model"] * len(live), list(length.why), sure, forwards)


def simulate(texts: dict[str, list[Answer]], rows: int, seeds: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Seconds by workload and length. All workloads one after the other, as in one run; auto is warm."""
    found: dict[str, Any] = {name: defaultdict(float) for name in texts}
    for seed in range(seeds):
        world, pair = World(seed), (Model(), Model())
        first = next(iter(texts.values()))[:rows]
        for _ in range(2):
            decode(world, first, "auto", pair)
        for name, answers in texts.items():
            for start in range(0, len(answers), rows):
                for gamma in (0, "auto", *lengths):
                    found[name][gamma] += decode(world, answers[start : start + rows], gamma, pair)
    return found


def table(found: dict[str, Any], rows: int, lengths: tuple[int, ...]) -> str:
    lines = [f"| {rows} rows | auto | {' | '.join(f'fixed {n}' for n in lengths)} | auto over the best, plain too |",
             "|---|" + "--:|" * (len(lengths) + 2)]
    shares = []
    for name, seconds in found.items():
        over = {gamma: f"{seconds[0] / its:.2f}" for gamma, its in seconds.items()}
        shares.append(min(seconds[n] for n in (0, *lengths)) / seconds["auto"])
        lines.append(f"| {name} | {over['auto']} | {' | '.join(over[n] for n in lengths)} | {shares[-1]:.3f} |")
    return "\n".join([*lines, f"| mean, least | | {' | '.join('' for _ in lengths)} | {mean(shares):.3f}, "
                              f"{min(shares):.3f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--spec-bench")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--seeds", type=int, default=24)
    chosen = parser.parse_args()
    if not chosen.record.exists():
        target, draft, tokenizer = specbeam.load_pair()
        texts = {name: [vars(recorded(target, draft, specbeam.render_prompt(tokenizer, [one.conversation(0)])
                                      .input_ids[0])) for one in prompts]
                 for name, (prompts, _, options) in workloads(chosen.spec_bench).items()
                 if not options and name != "random draft"}
        chosen.record.write_text(json.dumps(texts), encoding="utf-8")
    texts = {name: [Answer(**one) for one in answers]
             for name, answers in json.loads(chosen.record.read_text(encoding="utf-8")).items()}
    for rows in map(int, chosen.rows.split(",")):
        lengths = (1, 2, 3, 4, 8)
        print(table(simulate(texts, rows, chosen.seeds, lengths), rows, lengths), end="\n\n")


if __name__ == "__main__":
    main()
