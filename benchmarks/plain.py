"""Plain decoding: how close to transformers' best loop, to the machine's limit, and what batches give.

    python benchmarks/plain.py [--rounds 5] [--new 64] [--batches 1,2,4,8,16] [--large] [--dtype float32]

Ratios inside one run, interleaved, medians over rounds; every timed answer is checked against eager's. Speculation
(length 4) runs on the last of the runners. Prints tables and writes outputs/benchmarks/plain.json. --large: instead
of the bundled pair, a random Llama of 1.1 B parameters in bfloat16 (memory-bound, as users' models are; 10 GB of
memory).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import specbeam
from specbeam.experiment.plan import in_turn
from specbeam.experiment.prompts import BUNDLED, read_prompts
from specbeam.runners.choose import use_runner

OUT = Path("outputs/benchmarks/plain.json")
Run = Callable[[], tuple[list[list[int]], float, float, float]]  # tokens, tokens a second, all / decode seconds


def large() -> Any:
    """TinyLlama's shape, random."""
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                         num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def bandwidth() -> float:
    """Bytes a second that all threads together can read (best of 10 sums over 1 GiB)."""
    values = torch.ones(2**28)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        values.sum()
        best = max(best, values.nbytes / (time.perf_counter() - start))
    return best


def read_per_token(model: Any, positions: int, narrow: bool) -> int:
    """Bytes of weights (embedding rows apart, unless they are the head too) and of keys and values. narrow: matrices of
    16-bit numbers are kept as such (runners/openvino_export.py)."""
    config, head = model.config, model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight

    def held(weight: torch.Tensor) -> int:
        halved = narrow and weight.dtype == torch.float32 and torch.equal(weight.bfloat16().float(), weight)
        return weight.nbytes // (2 if halved else 1)

    weights = sum(held(weight) for weight in model.parameters() if weight is head or weight is not table)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * width * positions * model.dtype.itemsize
    return weights + cached


def bare(model: Any, prompt: torch.Tensor, new: int) -> Run:
    """The least that a loop over transformers' forward can do."""

    @torch.inference_mode()
    def run() -> tuple[list[list[int]], float, float, float]:
        began, cache = time.perf_counter(), DynamicCache()
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens, start = [int(token)], time.perf_counter()
        for _ in range(new - 1):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(int(token))
        ended = time.perf_counter()
        return [tokens], ended - began, ended - start, 0.0

    return run


def ours(model: Any, runner: str, ids: Any, new: int, draft: Any = None) -> Run:
    """Plain, or with a draft speculative decoding (length 4)."""

    def run() -> tuple[list[list[int]], float, float, float]:
        use_runner(model, runner)
        start = time.perf_counter()
        if draft is None:
            out = specbeam.greedy_generate(model, ids, max_new_tokens=new)
        else:
            out = specbeam.speculative_generate(model, draft, ids, draft_length=4, max_new_tokens=new)
        whole, trace = time.perf_counter() - start, out.trace[0]
        forwards = ((trace.verify_seconds or 0.0) + (trace.draft_seconds or 0.0)) / trace.decode_seconds
        return out.tokens, whole, trace.decode_seconds, 1 - forwards

    return run


def generate(model: Any, ids: list[torch.Tensor], new: int) -> Run:
    width = max(len(row) for row in ids)
    padded = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in ids])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in ids]).long()

    def run() -> tuple[list[list[int]], float, float, float]:
        start = time.perf_counter()
        out = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
        seconds = time.perf_counter() - start
        return out[:, width:].tolist(), seconds, seconds, 0.0

    return run


def interleaved(runs: dict[str, Run], rounds: int, per_round: int) -> dict[str, dict[str, Any]]:
    """Medians of each, and of its ratio to the others within a round."""
    seen: dict[str, list[Any]] = {label: [] for label in runs}
    for turn in range(-1, rounds):  # the first is a warm-up
        for label in in_turn(list(runs), max(turn, 0)):
            result = runs[label]()
            if turn >= 0:
                seen[label].append(result)
    found = {}
    for label, results in seen.items():
        found[label] = {
            "tokens_per_second": per_round / median(r[1] for r in results),
            "decode_ms": 1e3 * median(r[2] for r in results), "outside": median(r[3] for r in results),
            "tokens": results[-1][0],
            "times": {other: median(theirs[1] / mine[1] for mine, theirs in zip(results, seen[other], strict=True))
                      for other in seen},
            "decode_times": {other: median(theirs[2] / mine[2]
                             for mine, theirs in zip(results, seen[other], strict=True)) for other in seen}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runners", default="eager,auto")
    chosen = parser.parse_args()
    prompts: list[torch.Tensor]
    if chosen.large:
        model, draft, name = large(), None, "1.1 B random, bfloat16"
        prompts = [torch.randint(5, 31000, (24,), generator=torch.Generator().manual_seed(n)) for n in range(16)]
    else:
        model, draft, tokenizer = specbeam.load_pair(dtype=chosen.dtype)
        name = f"bundled, {chosen.dtype}"
        asked = [p.conversation(0) for p in read_prompts(BUNDLED)][:16]
        prompts = [specbeam.render_prompt(tokenizer, [one]).input_ids[0] for one in asked]
    model.generation_config.eos_token_id = None  # all answers have the same length, without a processor that sees to it
    runners = chosen.runners.split(",")
    names = {runner: use_runner(model, runner) for runner in runners}
    copied, positions = bandwidth(), len(prompts[0]) + chosen.new // 2
    limits = {narrow: copied / read_per_token(model, positions, narrow) for narrow in (False, True)}
    print(f"{name}: {torch.get_num_threads()} threads, {limits[False]:.0f} tokens a second would be the memory's limit "
          f"({limits[True]:.0f} with 16-bit numbers kept as such: openvino); auto is {names.get('auto')}")
    report: dict[str, Any] = {"model": name, "threads": torch.get_num_threads(), "limit": limits[False],
                              "limit_narrow": limits[True], "runners": names, "rounds": chosen.rounds,
                              "new": chosen.new, "batches": {}}
    for size in [int(text) for text in chosen.batches.split(",")]:
        ids = prompts[:size]
        runs = {runner: ours(model, runner, ids, chosen.new) for runner in runners}
        if draft is not None:
            runs["speculative 4"] = ours(model, runners[-1], ids, chosen.new, draft)
        runs["transformers.generate"] = generate(model, ids, chosen.new)
        if size == 1:
            runs["bare loop"] = bare(model, ids[0][None], chosen.new)
        found = interleaved(runs, chosen.rounds, size * chosen.new)
        wanted = found["eager"]["tokens"] if "eager" in found else found["transformers.generate"]["tokens"]
        print(f"\nbatch {size:<20} tokens/s  × generate  × bare loop  outside forwards  of the limit  same tokens")
        for label, row in found.items():
            same = sum(a == b for a, b in zip(row.pop("tokens"), wanted, strict=True))
            row["same"] = [same, size]
            decoding = size * (chosen.new - 1) / row["decode_ms"] * 1e3
            used = names.get(label, names[runners[-1]] if label == "speculative 4" else "")
            row["of_limit"] = decoding / size / limits[used.startswith("openvino")]
            loop = f"{row['decode_times']['bare loop']:.2f}" if "bare loop" in row["decode_times"] else ""
            mine = label in names or label == "speculative 4"
            outside = f"{100 * row['outside']:.1f} %" if mine else ""
            part = f"{100 * row['of_limit']:.0f} %" if mine else ""
            print(f"{label:<26} {row['tokens_per_second']:9.1f} {row['times']['transformers.generate']:11.2f} "
                  f"{loop:>12} {outside:>17} {part:>13} {same:>8} of {size}")
        report["batches"][size] = found
    OUT.parent.mkdir(parents=True, exist_ok=True)
    suffix = "-large" if chosen.large else "" if chosen.dtype == "float32" else f"-{chosen.dtype}"
    path = OUT.with_stem(OUT.stem + suffix)
    path.write_text(json.dumps(report, indent=1))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
