"""Make the bundled pair: tokenizer, target, the target's own answers, distilled draft, figures, export.

    python recipes/train_pair.py --data ../shared/data --work .work/pair --out src/specbeam/bundled --seed 0

Every stage leaves its result in the work folder and is skipped when that is there; a killed training goes on
from its last checkpoint. A GPU trains the bundled size in minutes; a CPU a smaller pair in about two hours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pair_data import (
    Corpus,
    corpus_of,
    encode_records,
    join_prose,
    load_tokenizer,
    read_records,
    texts_of,
    train_tokenizer,
)
from pair_variants import made_records, open_prompts

LARGEST_SHARD = "15MB"
NEW_TOKENS = 128  # of an answer, the most


@dataclass(frozen=True)
class Preset:
    """One size of the recipe. Shapes are (layers, hidden, heads, key-value heads, intermediate)."""

    target: tuple[int, int, int, int, int]
    draft: tuple[int, int, int, int, int]
    row_length: int
    rows_per_step: int
    target_passes: float
    draft_passes: float
    learning_rate: float
    dropout: float
    evaluate_every: int
    open_prompts: int
    prompt_tokens: int  # of each source, the most
    enough_answers: int  # of a source, before its prompts are answered more than three times
    held_out_answers: int
    answer_batch: int
    figures: int  # documents, prompts or sentences per set in the final figures


PRESETS = {
    "gpu": Preset(
        target=(14, 384, 6, 2, 960),
        draft=(3, 384, 6, 2, 448),
        row_length=2048,
        rows_per_step=64,
        target_passes=12,
        draft_passes=8,
        learning_rate=4e-3,
        dropout=0.1,
        evaluate_every=200,
        open_prompts=80_000,
        prompt_tokens=1_000_000,
        enough_answers=8_000,
        held_out_answers=4_000,
        answer_batch=8192,
        figures=400,
    ),
    "cpu": Preset(
        target=(12, 256, 4, 2, 704),
        draft=(2, 192, 3, 3, 512),
        row_length=512,
        rows_per_step=8,
        target_passes=0.6,
        draft_passes=1,
        learning_rate=3e-3,
        dropout=0.0,
        evaluate_every=1000,
        open_prompts=2_000,
        prompt_tokens=10_000,
        enough_answers=60,
        held_out_answers=600,
        answer_batch=64,
        figures=100,
    ),
    # For the recipe's own tests: runs in a minute on made-up text and learns next to nothing.
    "tiny": Preset(
        target=(2, 64, 1, 1, 128),
        draft=(1, 64, 1, 1, 64),
        row_length=128,
        rows_per_step=4,
        target_passes=0.15,
        draft_passes=0.5,
        learning_rate=3e-3,
        dropout=0.1,
        evaluate_every=20,
        open_prompts=8,
        prompt_tokens=100,
        enough_answers=8,
        held_out_answers=4,
        answer_batch=8,
        figures=4,
    ),
}


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_products(fast: bool) -> None:
    """Products of fp32 in TF32: exact where both factors are bf16, as logits from bf16 states are."""
    import torch

    torch.set_float32_matmul_precision("high" if fast else "highest")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def make_tokenizer(data: Path, work: Path) -> None:
    if not (work / "tokenizer" / "tokenizer.json").exists():
        say("tokenizer: training 8,192 pieces on the training text")
        texts = (text for record in read_records(data / "train") for text in texts_of(record))
        train_tokenizer(texts, work / "tokenizer.partial")
        (work / "tokenizer.partial").replace(work / "tokenizer")


def make_tokens(data: Path, work: Path, preset: Preset, seed: int) -> None:
    """train.npz, open_prompts.npz and held_out.npz."""
    if (work / "held_out.npz").exists():
        return
    tokenizer = load_tokenizer(work / "tokenizer")
    records = list(read_records(data / "train"))
    say(f"tokens: encoding {len(records):,} training records")
    documents = join_prose(encode_records(tokenizer, records), seed)
    made = encode_records(tokenizer, made_records(records, seed))
    train = corpus_of(pair for stream in (documents, made) for pair in stream)
    train.save(work / "train.npz")
    prompts = open_prompts(records, preset.open_prompts, seed)
    corpus_of(encode_records(tokenizer, prompts)).save(work / "open_prompts.npz")
    held_out = corpus_of(encode_records(tokenizer, read_records(data / "heldout")))
    held_out.save(work / "held_out.npz")
    for name in train.names:
        of_source = train.of_source(name)
        say(f"  {name}: {len(of_source):,} documents, {train.lengths()[of_source].sum():,} tokens")
    say(f"tokens: {len(train.tokens):,} for training, {len(held_out.tokens):,} held out")


def finish_model(model, tokenizer, folder: Path) -> None:
    """Save in bf16, in shards under 16 MB, with the tokenizer and a generation config that stops at the end token."""
    import torch
    from transformers import GenerationConfig

    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(partial, max_shard_size=LARGEST_SHARD)
    tokenizer.save_pretrained(partial)
    plain_tokenizer_config(partial / "tokenizer_config.json")
    for path in partial.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def plain_tokenizer_config(path: Path) -> None:
    """Keep what every transformers version understands; tokenizer.json marks the role tokens as special."""
    config = json.loads(path.read_text())
    for key in ("backend", "extra_special_tokens", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_finished(folder: Path, device: str, dtype: str, attention: str = "sdpa"):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    torch.nn.Module.to(model, device)
    return model


def make_target(work: Path, preset: Preset, seed: int, max_seconds: float | None) -> None:
    if (work / "target" / "config.json").exists():
        return
    from pair_training import Machine, Shape, Training, new_model, target_loss, train

    how = Training(
        passes=preset.target_passes,
        rows_per_step=preset.rows_per_step,
        row_length=preset.row_length,
        learning_rate=preset.learning_rate,
        dropout=preset.dropout,
        evaluate_every=preset.evaluate_every,
        max_seconds=max_seconds,
    )
    machine = Machine.of(best_device())
    model = new_model(Shape(*preset.target), seed)
    say(f"target: {model.num_parameters():,} parameters, {how}")
    record = train(
        model,
        target_loss(model, machine, how, user_weight=0.2),
        ((work / "train.npz", 1.0),),
        Corpus.load(work / "held_out.npz"),
        how,
        machine,
        work / "target.checkpoint",
        seed,
        say,
    )
    (work / "target_training.json").write_text(json.dumps(record))
    finish_model(model, load_tokenizer(work / "tokenizer"), work / "target")
    (work / "target.checkpoint").unlink(missing_ok=True)


def make_answers(work: Path, preset: Preset, seed: int, max_seconds: float | None) -> None:
    """answers.npz (greedy and sampled, on training prompts and open prompts) and held_out_answers.npz (greedy)."""
    if (work / "answers.npz").exists():
        return
    from pair_answers import answer_corpus, choose_prompts, plan_answers

    fast_products(True)
    device = best_device()
    target = load_finished(work / "target", device, "bfloat16" if device == "cuda" else "float32")
    batch = preset.answer_batch
    chosen = choose_prompts([Corpus.load(work / "held_out.npz")], preset.prompt_tokens, seed)
    each = -(-preset.held_out_answers // len(chosen))
    prompts = [prompt for some in chosen.values() for prompt in some[:each]]
    held_out = answer_corpus(
        target, prompts, np.zeros(len(prompts)), NEW_TOKENS, batch, work / "held_out_answers", seed, say
    )
    held_out.save(work / "held_out_answers.npz")
    corpora = [Corpus.load(work / "train.npz"), Corpus.load(work / "open_prompts.npz")]
    chosen = choose_prompts(corpora, preset.prompt_tokens, seed + 1)
    prompts, temperatures = plan_answers(chosen, preset.enough_answers)
    say(f"answers: {sum(map(len, chosen.values())):,} prompts, {len(prompts):,} answers wanted")
    answers = answer_corpus(
        target, prompts, temperatures, NEW_TOKENS, batch, work / "answers", seed + 1, say, max_seconds
    )
    say(f"answers: {len(answers):,} documents, {len(answers.tokens):,} tokens")
    answers.save(work / "answers.npz")
    shutil.rmtree(work / "answers")
    shutil.rmtree(work / "held_out_answers")


def make_draft(work: Path, preset: Preset, seed: int, max_seconds: float | None) -> None:
    if (work / "draft" / "config.json").exists():
        return
    from pair_training import Machine, Shape, Training, draft_loss, new_draft, train

    how = Training(
        passes=preset.draft_passes,
        rows_per_step=preset.rows_per_step,
        row_length=preset.row_length,
        learning_rate=preset.learning_rate,
        dropout=0.0,
        evaluate_every=preset.evaluate_every,
        weight_decay=0.01,
        max_seconds=max_seconds,
    )
    fast_products(True)
    machine = Machine.of(best_device())
    target = load_finished(work / "target", machine.device.type, "float32", attention="packed").requires_grad_(False)
    draft = new_draft(Shape(*preset.draft), target, seed + 1)
    say(f"draft: {draft.num_parameters():,} parameters, {how}")
    record = train(
        draft,
        draft_loss(draft, target, machine, counted=0.75),
        ((work / "answers.npz", 1.0),),
        Corpus.load(work / "held_out_answers.npz"),
        how,
        machine,
        work / "draft.checkpoint",
        seed,
        say,
    )
    (work / "draft_training.json").write_text(json.dumps(record))
    finish_model(draft, load_tokenizer(work / "tokenizer"), work / "draft")
    (work / "draft.checkpoint").unlink(missing_ok=True)


def make_figures(data: Path, work: Path, preset: Preset, seed: int) -> None:
    if (work / "figures.json").exists():
        return
    from pair_evaluation import evaluate_pair, report_tables

    fast_products(False)
    device = best_device()
    target = load_finished(work / "target", device, "float32")
    draft = load_finished(work / "draft", device, "float32")
    held_out = Corpus.load(work / "held_out.npz")
    batch = 1024 if device == "cuda" else 8
    report = evaluate_pair(
        target,
        draft,
        load_tokenizer(work / "tokenizer"),
        held_out,
        data / "eval",
        seed,
        batch,
        preset.figures,
        say,
    )
    (work / "figures.md").write_text(report_tables(report), encoding="utf-8")
    (work / "figures.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def export(work: Path, out: Path) -> None:
    for name in ("target", "draft"):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(work / name, out / name)
    size = sum(path.stat().st_size for name in ("target", "draft") for path in (out / name).rglob("*"))
    say(f"export: {out} holds the pair, {size / 1e6:.1f} MB")


STAGES = ("tokenizer", "tokens", "target", "answers", "draft", "figures", "export")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with train/, heldout/, eval/")
    parser.add_argument("--work", type=Path, default=Path(".work/pair"), help="where stages leave their results")
    parser.add_argument("--out", type=Path, default=Path("src/specbeam/bundled"), help="where target/ and draft/ go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: gpu where there is one, else cpu")
    parser.add_argument("--until", choices=STAGES, default="export", help="last stage to do")
    for stage in ("target", "answers", "draft"):
        parser.add_argument(f"--{stage}-seconds", type=float, help=f"time limit of the stage {stage}")
    options = parser.parse_args()

    needs_text = not (options.work / "held_out.npz").exists()
    if needs_text and not (options.data / "train").is_dir():
        print(
            f"{options.data} has no folder train/: give --data the folder that holds train/, heldout/ and eval/.",
            file=sys.stderr,
        )
        return 2
    name = options.preset or ("gpu" if best_device() == "cuda" else "cpu")
    preset = PRESETS[name]
    options.work.mkdir(parents=True, exist_ok=True)
    settings = {"preset": name, "seed": options.seed, **dataclasses.asdict(preset)}
    kept = options.work / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != json.loads(json.dumps(settings)):
        print(
            f"{options.work} holds a run with another preset or seed: give another --work folder.",
            file=sys.stderr,
        )
        return 2
    kept.write_text(json.dumps(settings))
    steps = {
        "tokenizer": lambda: make_tokenizer(options.data, options.work),
        "tokens": lambda: make_tokens(options.data, options.work, preset, options.seed),
        "target": lambda: make_target(options.work, preset, options.seed, options.target_seconds),
        "answers": lambda: make_answers(options.work, preset, options.seed, options.answers_seconds),
        "draft": lambda: make_draft(options.work, preset, options.seed, options.draft_seconds),
        "figures": lambda: make_figures(options.data, options.work, preset, options.seed),
        "export": lambda: export(options.work, options.out),
    }
    for stage in STAGES:
        begun = time.monotonic()
        steps[stage]()
        say(f"stage {stage}: {time.monotonic() - begun:.0f} s")
        if stage == options.until:
            break
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
