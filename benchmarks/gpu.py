"""Speed on one GPU: plain decoding against the memory's limit, speculation against its formula, batches and beams.

    python benchmarks/gpu.py [--parts limit,formula,batches] [--runners eager,graph,compile] [--out gpu.json]

Randomly initialised models with the exact shapes of known ones, bf16. Every timed output is compared with the eager
runner's; where tokens differ, the eager logits' gap at that place is shown (bf16 rounds differently from kernel to
kernel, and a random model has many near-ties).
Proposals of `formula` and `batches` are right with a set probability. Target and draft model each follow a permutation
of the vocabulary written into their output layer, and the two permutations agree on that share of the tokens: both
models run in full, and what is accepted is counted, not assumed. The oracle is a drafter without a model that knows
the target's permutation: what verification alone would give.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
import transformers as hf

import specbeam
from specbeam.drafting import DRAFTERS, Proposal
from specbeam.runners.graph import warming

_SETTLE = 3.0  # seconds
_QWEN = {"vocab_size": 151936, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
         "max_position_embeddings": 32768, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
SHAPES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen2.5-3b": lambda: hf.Qwen2Config(**_QWEN, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                                         num_attention_heads=16),
    "qwen2.5-0.5b": lambda: hf.Qwen2Config(**_QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                           num_attention_heads=14),
    "gemma-3-4b": lambda: hf.Gemma3TextConfig(vocab_size=262208, hidden_size=2560, intermediate_size=10240,
                                              num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
                                              head_dim=256, sliding_window=1024, tie_word_embeddings=True),
    "tinyllama-1.1b": lambda: hf.LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632,
                                             num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
    "llama-8b": lambda: hf.LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                                       max_position_embeddings=8192),
}


def build(name: str, seed: int = 0, shares: torch.Tensor | None = None) -> hf.PreTrainedModel:
    """A random model of that shape, on the GPU in bf16, that never ends by itself.

    shares: a permutation of the vocabulary that its output follows (what the layers add is made small)."""
    torch.manual_seed(seed)
    config = SHAPES[name]()
    config.eos_token_id = config.bos_token_id = None
    if shares is not None:
        config.tie_word_embeddings = False
    with torch.device("cuda"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    if shares is not None:
        for path, weight in model.named_parameters():
            if path.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.01)
        follow(model, shares)
    return model


def follow(model: hf.PreTrainedModel, after: torch.Tensor) -> None:
    """The model's next token becomes after[token]. Not seen by the runner: what was recorded stays."""
    model.lm_head.weight.data[after] = model.get_input_embeddings().weight.data


def agreeing(after: torch.Tensor, share: float, seed: int = 1) -> torch.Tensor:
    """A permutation that agrees with `after` on this share of the tokens: the rest is rotated among itself."""
    chosen = torch.randperm(len(after), generator=torch.Generator().manual_seed(seed)).to(after.device)
    wrong = chosen[round(share * len(after)):]
    other = after.clone()
    other[wrong] = after[wrong.roll(1)]
    return other


def read_bytes(model: hf.PreTrainedModel) -> int:
    """Bytes of weights that one decoding step reads: all but an input embedding that is not the output layer too."""
    weights = {weight.data_ptr(): weight.numel() * weight.element_size() for weight in model.parameters()}
    table = model.get_input_embeddings().weight
    tied = table.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    return sum(weights.values()) - (0 if tied else table.numel() * table.element_size())


def bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes per second of a large copy on the device, read and written."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median(timed(lambda: target.copy_(source)) for _ in range(12))


def timed(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def prompt(model: hf.PreTrainedModel, rows: int = 1, tokens: int = 64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(10, model.config.vocab_size - 10, (rows, tokens), generator=generator).cuda())


def decode_rate(call: Callable[[], Any], repeats: int, warm: int = 1) -> tuple[float, Any]:
    """Tokens per second of decoding (median of `repeats`, after the shapes were recorded), and the last output.

    A card that idled, as during compilation, first has to be busy for a while: an H200 takes 6 % longer until then."""
    for _ in range(warm):
        with warming():
            call()
    began, rates = time.perf_counter(), []
    while warm and time.perf_counter() - began < _SETTLE:
        call()
    for _ in range(repeats):
        out = call()
        tokens = sum(len(row) - trace.first_tokens for row, trace in zip(out.tokens, out.trace, strict=True))
        rates.append(tokens / out.trace[0].decode_seconds)
    return median(rates), out


def agreement(model: hf.PreTrainedModel, given: torch.Tensor, ours: list[int], eager: list[int]) -> dict[str, Any]:
    """Where two answers part, and how near the tie was: gap of the two tokens' logits as the model alone gives them."""
    same = next((i for i, pair in enumerate(zip(ours, eager, strict=True)) if pair[0] != pair[1]), None)
    if same is None:
        return {"same": True}
    with torch.inference_mode():
        text = torch.cat([given, torch.tensor(eager[:same], device=given.device, dtype=given.dtype)])
        logits = model(input_ids=text[None], use_cache=False).logits[0, -1].float()
    gap = float((logits[eager[same]] - logits[ours[same]]).abs())
    return {"same": False, "first_difference": same, "logit_gap": gap, "largest_logit": float(logits.abs().max())}


def transformers_rate(model: hf.PreTrainedModel, given: torch.Tensor, new: int) -> float:
    """Tokens per second of `generate` without its prompt: a long answer less a short one."""
    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(given[None], attention_mask=torch.ones_like(given[None]), max_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(4)
    return (new - 1) / (median(seconds(new) for _ in range(2)) - median(seconds(1) for _ in range(3)))


def limit(runners: list[str], repeats: int, names: list[str], save: Callable[[Any], None]) -> None:
    """Plain decoding at batch 1: share of the memory's limit, and times transformers' generate."""
    copy = bandwidth()
    found: dict[str, Any] = {"copy_bytes_per_second": copy, "models": {}}
    print(f"copy {copy / 1e12:.2f} TB/s", flush=True)
    for name in names:
        model = build(name)
        given, least = prompt(model)[0], read_bytes(model) / copy
        theirs = transformers_rate(model, given, 33)
        row: dict[str, Any] = {"bytes": read_bytes(model), "limit_ms": 1000 * least, "transformers_per_second": theirs}
        reference = None
        def plain(new: int, model: Any = model, given: torch.Tensor = given) -> Any:
            return specbeam.greedy_generate(model, [given], max_new_tokens=new)

        for runner in dict.fromkeys(["eager", *runners]):
            began = time.perf_counter()
            used = specbeam.use_runner(model, runner)
            new = 33 if runner == "eager" else 160
            rate, out = decode_rate(partial(plain, new), *((1, 1) if runner == "eager" else (repeats, 1)))
            reference = reference or out.tokens[0]
            row[runner] = {
                "used": used, "per_second": rate, "ms": 1000 / rate, "of_limit": least * rate,
                "times_transformers": rate / theirs, "set_up_and_run_seconds": time.perf_counter() - began,
                "tokens": agreement(model, given, out.tokens[0][: len(reference)], reference)}
            print(f"{name:15} {runner:8} {1000 / rate:7.3f} ms, limit {1000 * least:.3f} ms = {least * rate:4.0%}, "
                  f"{rate / theirs:5.2f} × transformers  {row[runner]['tokens']}", flush=True)
            found["models"][name] = row
            save(found)
        del model, plain
        free()


def pair(share: float) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel, torch.Tensor]:
    """The Qwen pair's shapes; the draft is right on this share of the tokens."""
    after = torch.randperm(151936, generator=torch.Generator().manual_seed(5)).cuda()
    return build("qwen2.5-3b", 0, after), build("qwen2.5-0.5b", 1, agreeing(after, share)), after


class Oracle:
    """A drafter that knows the target's permutation, and is right as often as `draft` is."""

    after: ClassVar[list[int]] = []
    drafts: ClassVar[list[int]] = []

    def __init__(self, depth: int):
        self.depth = depth

    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Any) -> Proposal:
        tokens = []
        for text, limit in zip(sequences, limits, strict=True):
            at, chain = text[-1], []
            for _ in range(min(limit, self.depth)):
                chain.append(self.drafts[at])
                at = self.after[at]
            tokens.append(chain)
        return Proposal(tokens, [list(range(-1, len(chain) - 1)) for chain in tokens], None, ["oracle"] * len(tokens),
                        list(length.why))

    def accept(self, paths: Sequence[Sequence[int]]) -> None: ...

    def observe(self, tokens: Sequence[Sequence[int]], logits: torch.Tensor) -> None: ...

    def keep_rows(self, rows: Sequence[int]) -> None: ...


def make(settings: Any, target: Any, draft: Any, request: Any, vocabulary: int) -> Oracle:
    return Oracle(settings.depth)


def formula(runner: str, repeats: int, lengths: list[int], shares: list[float], drafters: list[str], new: int,
            save: Callable[[Any], None]) -> None:
    """Measured speed-up of speculation beside (1 - α^(γ+1)) / (1 - α) ÷ (γ c + v), with measured α, c and v."""
    target, draft, after = pair(0.8)
    given = prompt(target)
    eager = specbeam.greedy_generate(target, given, max_new_tokens=64).tokens[0]
    used = [specbeam.use_runner(model, runner) for model in (target, draft)]
    plain, out, costs = steps(target, draft, given, max(repeats, 9), new)
    found: dict[str, Any] = {"runner": used, **costs, "plain_same_as_eager": out.tokens[0][:64] == eager, "rows": []}
    save(found)
    for gamma in lengths:
        for share, drafter in product(shares, drafters):
            row = speculated(target, draft, given, after, gamma, share, drafter, 1 / plain, out.tokens[0], repeats,
                             warm=int(share == shares[0]))
            found["rows"].append(row)
            save(found)
    free()


def steps(target: hf.PreTrainedModel, draft: hf.PreTrainedModel, given: torch.Tensor, repeats: int, new: int
          ) -> tuple[float, Any, dict[str, Any]]:
    """The target's plain tokens per second, its output, and both models' steps in turns: what a card gives changes by
    5 % within minutes."""
    def plain(model: hf.PreTrainedModel) -> Any:
        return specbeam.greedy_generate(model, given, max_new_tokens=new)

    _, out = decode_rate(partial(plain, target), 1)
    decode_rate(partial(plain, draft), 1)
    rates = [[decode_rate(partial(plain, model), 1, 0)[0] for model in (target, draft)] for _ in range(repeats)]
    ratios, of_bytes = sorted(one / other for one, other in rates), read_bytes(draft) / read_bytes(target)
    per_second, alone = (median(side) for side in zip(*rates, strict=True))
    found = {"plain_ms": 1000 / per_second, "draft_step_ms": 1000 / alone, "bytes_ratio": of_bytes,
             "step_ratio": median(ratios), "step_ratios": ratios}
    middle, low, high = (one / of_bytes for one in (median(ratios), ratios[0], ratios[-1]))
    print(f"plain {1000 / per_second:.4f} ms, draft step {1000 / alone:.4f} ms: {middle:.3f} ({low:.3f} to {high:.3f}) "
          f"times its share of the bytes, {of_bytes:.4f}", flush=True)
    return per_second, out, found


def speculated(target: hf.PreTrainedModel, draft: hf.PreTrainedModel, given: torch.Tensor, after: torch.Tensor,
               gamma: int, share: float, drafter: str, step: float, plain: list[int], repeats: int, warm: int
               ) -> dict[str, Any]:
    """One row of `formula`. step: seconds of a plain step; plain: the tokens that plain decoding gave."""
    wrong = agreeing(after, share)
    follow(draft, wrong)
    DRAFTERS["oracle"], Oracle.after, Oracle.drafts = __name__, after.tolist(), wrong.tolist()
    call = partial(specbeam.speculative_generate, target, draft, given, draft_length=gamma, drafter=drafter,
                   max_new_tokens=len(plain))
    rate, spoken = decode_rate(call, repeats, warm)
    trace = spoken.trace[0]
    whole = [one for one in trace.rounds if one.drafted == gamma]
    accepted = sum(one.accepted for one in whole)
    alpha = accepted / (accepted + sum(one.accepted < gamma for one in whole))
    expected = (1 - alpha ** (gamma + 1)) / (1 - alpha) if alpha < 1 else gamma + 1
    draft_cost = trace.draft_seconds / len(trace.rounds) / step
    verify_cost = trace.verify_seconds / len(trace.rounds) / step
    predicted = expected / (draft_cost + verify_cost)
    row = {"draft_length": gamma, "share": share, "drafter": drafter, "acceptance": alpha, "speedup": rate * step,
           "predicted": predicted, "draft_cost": draft_cost / gamma, "verify_cost": verify_cost,
           "mean_accepted_length": sum(one.committed for one in trace.rounds) / len(trace.rounds),
           "expected_length": expected, "same_as_plain": spoken.tokens[0] == plain}
    print(f"{drafter:11} γ {gamma:2} right {share:.1f} (α {alpha:.2f}): {row['speedup']:.2f} × plain, formula "
          f"{predicted:.2f} ({row['speedup'] / predicted:.3f}), c {row['draft_cost']:.3f}, verify {verify_cost:.3f}, "
          f"same {row['same_as_plain']}", flush=True)
    return row


def batches(runner: str, repeats: int, rows: list[int], beams: list[int], save: Callable[[Any], None]) -> None:
    """Tokens per second of all rows together, and the peak of memory beyond the weights."""
    target, draft, _ = pair(0.8)
    weights = torch.cuda.memory_allocated()
    for model in (target, draft):
        specbeam.use_runner(model, runner)
    found: list[dict[str, Any]] = []
    for count in rows:
        for row in of_batch(target, draft, count, beams, repeats if count < 16 else 2, weights):
            found.append(row)
            save({"runner": runner, "weights_gib": weights / 2**30, "rows": found})


def of_batch(target: hf.PreTrainedModel, draft: hf.PreTrainedModel, count: int, beams: list[int], repeats: int,
             weights: int) -> Iterator[dict[str, Any]]:
    """The rows of `batches` for that many prompts. weights: bytes of memory that are not its own."""
    given, greedy = prompt(target, count), []
    calls: dict[str, Callable[[], Any]] = {
        "greedy": lambda: specbeam.greedy_generate(target, given, max_new_tokens=96),
        "speculative 4": lambda: specbeam.speculative_generate(target, draft, given, draft_length=4, max_new_tokens=96)}
    for width in beams:
        if count * width <= 256:
            calls[f"beam {width}"] = partial(specbeam.beam_generate, target, given, num_beams=width, max_new_tokens=32)
    for label, call in calls.items():
        free()
        torch.cuda.reset_peak_memory_stats()
        rate, out = decode_rate(call, repeats)
        peak = torch.cuda.max_memory_allocated() - weights
        row = {"batch": count, "method": label, "per_second": rate, "peak_gib": peak / 2**30}
        greedy = greedy or out.tokens
        if label == "speculative 4":
            row["same_as_greedy"] = sum(a == b for a, b in zip(out.tokens, greedy, strict=True))
        print(f"batch {count:3} {label:14} {rate:9.0f} tokens/s, {peak / 2**30:6.2f} GiB beyond the weights "
              f"{row.get('same_as_greedy', '')}", flush=True)
        yield row


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="limit,formula,batches")
    parser.add_argument("--runners", default="graph,compile", help="of limit; formula uses the last, batches the first")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", default="1,2,3,4,5,6,7,8,9,10", help="of formula; '': only both models' steps")
    parser.add_argument("--shares", default="0.5,0.6,0.7,0.8,0.9")
    parser.add_argument("--drafters", default="oracle,draft_model")
    parser.add_argument("--new", type=int, default=480, help="tokens that formula asks for: fewer are fewer shapes")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--beams", default="4,8")
    parser.add_argument("--out")
    asked = parser.parse_args()
    runners, parts = asked.runners.split(","), asked.parts.split(",")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                             "transformers": hf.__version__, "dtype": "bfloat16"}

    def save(part: str, rows: Any) -> None:
        found[part] = rows
        if asked.out:
            Path(asked.out).write_text(json.dumps(found, indent=1), encoding="utf-8")

    if "limit" in parts:
        limit(runners, asked.repeats, asked.models.split(","), partial(save, "limit"))
    if "formula" in parts:
        formula(runners[-1], asked.repeats, [int(n) for n in asked.lengths.split(",") if n],
                [float(n) for n in asked.shares.split(",")], asked.drafters.split(","), asked.new,
                partial(save, "formula"))
    if "batches" in parts:
        batches(runners[0], asked.repeats, [int(n) for n in asked.batches.split(",")],
                [int(n) for n in asked.beams.split(",")], partial(save, "batches"))


if __name__ == "__main__":
    main()
