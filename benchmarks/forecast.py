"""Forecast against measurement, on the bundled pair: accepted tokens and speed-ups of every draft length.

    python benchmarks/forecast.py --dtype float32 --output forecast.json

Of each batch size: one greedy answer per prompt, one pass of the draft over them; then the real runs, plain and every
draft length taking turns, and between them, `--turns` times, the short runs that the forecast's costs come from: what
is held against each other has seen the same machine. Written as JSON: predicted and measured speed-up (geometric mean
over prompts, or batches; measured: of each the median over repeats, with a 95 % interval over repeats) and accepted
tokens; where a row's accepted tokens differ, the smallest gap of the target's and of the draft's two best logits along
its answer, which says how near a tie it was; and what the short runs took beside the real ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median, stdev

import torch

import specbeam
from specbeam.engine.support import adapt
from specbeam.experiment import records
from specbeam.experiment.prompts import BUNDLED, read_prompts
from specbeam.forecast import (
    Answer,
    costs_of,
    forced_chances,
    greedy_rounds,
    plain_seconds,
    speculative_seconds,
    time_rounds,
)
from specbeam.metrics.likelihood import answer_logits


def smallest_gap(model, answer) -> float:
    """Between the two best logits, over the answer's tokens."""
    best = answer_logits(model, [*answer.prompt, *answer.tokens], len(answer.tokens)).float().topk(2).values
    return round(float((best[:, 0] - best[:, 1]).min()), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--draft", default="bundled")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--turns", type=int, default=12, help="of the short runs, spread over the real ones")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    target, draft, tokenizer = specbeam.load_pair(options.target, options.draft, dtype=options.dtype,
                                                  runner=options.runner)
    asked = [prompt.conversation(0) for prompt in read_prompts(BUNDLED)]
    asked = asked[:: max(1, len(asked) // options.prompts)][: options.prompts]
    ids = [specbeam.render_prompt(tokenizer, [one], device=target.device).input_ids[0] for one in asked]
    load, room, lines = records.OthersLoad(), options.tokens, []

    def decode(batch, length):
        gc.collect()
        if length:
            return specbeam.speculative_generate(target, draft, batch, draft_length=length, max_new_tokens=room)
        return specbeam.greedy_generate(target, batch, max_new_tokens=room)

    for size in options.batch_sizes:
        batches = [ids[start:start + size] for start in range(0, len(ids), size)]
        answers = [[Answer(tuple(one.tolist()), tuple(tokens), room)
                    for one, tokens in zip(batch, decode(batch, 0).tokens, strict=True)] for batch in batches]
        everyone = [answer for batch in answers for answer in batch]
        forced = iter(forced_chances(target, draft, everyone, max(options.lengths), max_new_tokens=room))
        chances = [[next(forced) for _ in batch] for batch in answers]
        seconds, traces, turns, short = defaultdict(list), {}, [], 0.0
        jobs = [(repeat, number) for repeat in range(options.repeats) for number in range(len(batches))]
        time_rounds(target, draft, everyone, options.lengths, size, max_new_tokens=room)  # warms up
        for done, (repeat, number) in enumerate(jobs):
            while len(turns) * len(jobs) <= done * options.turns and len(turns) < options.turns:
                began = time.perf_counter()
                turns.append(time_rounds(target, draft, everyone, options.lengths, size, len(turns) + 1,
                                         max_new_tokens=room))
                short += time.perf_counter() - began
            methods = (0, *options.lengths)
            for length in methods[repeat % len(methods):] + methods[: repeat % len(methods)]:
                out = decode(batches[number], length)
                seconds[number, length].append(out.trace[0].decode_seconds)
                traces.setdefault((number, length), out)
        costs = costs_of(turns, target, draft, everyone, options.lengths, size)
        whole = sum(map(sum, seconds.values()))
        for length in options.lengths:
            predicted, measured, differences = [], [], []
            accepted = drafted = rounds = foretold = 0
            for number, batch in enumerate(answers):
                rows, _ = greedy_rounds(batch, chances[number], length)
                _, took = speculative_seconds(batch, chances[number], length, costs, sampled=False)
                plain = median(seconds[number, 0])
                if took and plain:
                    predicted.append(math.log(plain_seconds(batch, costs) / took))
                    measured.append(math.log(plain / median(seconds[number, length])))
                out = traces[number, length]
                for row, (answer, trace, tokens, outlook) in enumerate(
                        zip(batch, out.trace, out.tokens, rows, strict=True)):
                    real = (len(trace.rounds), sum(one.drafted for one in trace.rounds),
                            sum(one.accepted for one in trace.rounds))
                    rounds, drafted, accepted = rounds + real[0], drafted + real[1], accepted + real[2]
                    foretold += int(outlook.accepted)
                    if real != (outlook.rounds, outlook.drafted, outlook.accepted):
                        differences.append({
                            "prompt": number * size + row, "measured": real,
                            "predicted": (outlook.rounds, outlook.drafted, outlook.accepted),
                            "same_tokens": list(answer.tokens) == tokens,
                            "smallest_gap_of_target": smallest_gap(target, answer),
                            "smallest_gap_of_draft": smallest_gap(draft, answer)})
            gain, real_gain = math.exp(fmean(predicted)), math.exp(fmean(measured))
            timed = [number for number in range(len(batches)) if all(seconds[number, 0])]
            each = [fmean(math.log(seconds[number, 0][repeat] / seconds[number, length][repeat]) for number in timed)
                    for repeat in range(options.repeats)]
            within = 1.96 * stdev(each) / len(each) ** 0.5 if len(each) > 1 else math.nan
            lines.append({"dtype": options.dtype, "batch_size": size, "draft_length": length,
                          "predicted_speedup": round(gain, 4), "measured_speedup": round(real_gain, 4),
                          "measured_within": round(within, 4), "error": round(gain / real_gain - 1, 4),
                          "costs_within": round(costs.doubt, 4), "predicted_accepted": foretold,
                          "measured_accepted": accepted, "measured_drafted": drafted, "measured_rounds": rounds,
                          "short_runs_seconds": round(short, 1), "real_runs_seconds": round(whole, 1),
                          "differences": differences})
            print(json.dumps({name: value for name, value in lines[-1].items() if name != "differences"}), flush=True)
    result = {
        "benchmark": "forecast", "runner": adapt(target).runner.name, "threads": torch.get_num_threads(),
        "others_busy_cores": round(load.cores(), 2), "prompts": len(ids), "tokens": room, "repeats": options.repeats,
        "median_error": round(median(abs(line["error"]) for line in lines), 4),
        "largest_error": round(max(abs(line["error"]) for line in lines), 4),
        "accepted": {name: sum(line[f"{name}_accepted"] for line in lines) for name in ("predicted", "measured")},
        "rows_that_differ": sum(len(line["differences"]) for line in lines), "lines": lines}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "lines"}))


if __name__ == "__main__":
    main()
