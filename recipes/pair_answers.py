"""The target's own answers: what the draft learns from, and what the figures are counted on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pair_data import CONTEXT_LENGTH, END_ID, PAD_ID, PASSES_PER_SOURCE, Corpus, corpus_of, prompt_length


@torch.no_grad()
def answer_prompts(model, prompts: list[np.ndarray], new_tokens: int, sample: bool = False, **options) -> list:
    """Each prompt (token ids) with the model's greedy or sampled (temperature 1) answer, END included.

    One batch; options go to `generate`.
    """
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), PAD_ID, np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    tokens = torch.from_numpy(ids).to(device)
    options = {"do_sample": True, "top_k": 0, **options} if sample else {"do_sample": False, **options}
    mask = (tokens != PAD_ID).long()
    answers = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=new_tokens, **options)
    answers = answers[:, width:].cpu()
    whole = []
    for prompt, answer in zip(prompts, answers.numpy(), strict=True):
        end = np.flatnonzero(answer == END_ID)
        answer = answer[: end[0] + 1] if len(end) else answer
        whole.append(np.concatenate([prompt, answer]))
    return whole


def even_batches(prompts: list[np.ndarray], batch: int) -> Iterator[list[np.ndarray]]:
    """Prompts of like length together: at most `batch`, fewer where they are long, so that memory holds."""
    part: list[np.ndarray] = []
    for prompt in sorted(prompts, key=len):
        if part and (len(part) == batch or (len(part) + 1) * (len(prompt) + 128) > 256 * batch):
            yield part
            part = []
        part.append(prompt)
    if part:
        yield part


def answer_corpus(
    model,
    corpora: list[Corpus],
    count: int,
    batch: int,
    folder: Path,
    seed: int,
    say: Callable[[str], None],
    sampled_share: float = 0.25,
    together: bool = False,
    max_seconds: float | None = None,
) -> Corpus:
    """Let the target answer prompts cut from documents; a share of the batches is sampled, the rest greedy.

    Batches hold prompts of like length, of one source unless `together`, and come in random order, so that
    stopping after `max_seconds` leaves a fair mix. Finished batches lie in `folder` and are not made again.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[np.ndarray]] = {}
    total = sum(len(corpus) for corpus in corpora)
    for corpus in corpora:
        for name in corpus.names:
            of_source = corpus.of_source(name)
            wanted = round(count * len(of_source) / total * min(PASSES_PER_SOURCE.get(name, 1.0), 2.0))
            # Open answers are long and varied: give the prose-like sources at least a hundredth each.
            wanted = min(max(wanted, count // 100), 3 * len(of_source))
            prompts = []
            for index in rng.choice(of_source, wanted, replace=wanted > len(of_source)):
                document = corpus.document(index)
                prompts.append(document[: prompt_length(document, rng)])
            groups.setdefault("all" if together else name, []).extend(
                prompt for prompt in prompts if len(prompt) <= CONTEXT_LENGTH // 2
            )
    batches = [(name, part) for name, prompts in groups.items() for part in even_batches(prompts, batch)]
    begun, made = time.monotonic(), []
    for done, at in enumerate(rng.permutation(len(batches))):
        name, prompts = batches[at]
        path = folder / f"{at:05d}.npz"
        if not path.exists():
            if max_seconds and time.monotonic() - begun > max_seconds:
                say(f"time is up after {done} of {len(batches)} batches")
                break
            torch.manual_seed(seed + int(at))
            new_tokens = 64 if max(map(len, prompts)) > 256 else 128
            whole = answer_prompts(model, prompts, new_tokens, sample=bool((at * 37 % 100) < 100 * sampled_share))
            corpus_of(("answers", document.tolist()) for document in whole).save(path)
            if done % 20 == 0:
                say(f"answers: batch {done} of {len(batches)} ({name}), {time.monotonic() - begun:.0f} s")
        made.append(path)
    parts = [Corpus.load(path) for path in sorted(made)]
    return corpus_of(("answers", part.document(i).tolist()) for part in parts for i in range(len(part)))
