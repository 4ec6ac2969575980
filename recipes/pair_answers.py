"""The target's own answers: what the draft learns from, and what the figures are counted on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pair_data import ASSISTANT_ID, BEGIN_ID, END_ID, PAD_ID, Corpus, corpus_of, prompt_length
from pair_sampler import Sampler

LONGEST_PROMPT = 192
# What a prompt is answered at, one answer each: most of the time the first three, all of them where prompts are few.
TEMPERATURES = (0.0, 0.7, 1.0, 1.0, 0.7, 1.0, 0.7, 1.0)


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


def cut_prompts(document: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Prompts of one document: a chat up to one of its assistant turns, or windows of prose, the first at its start."""
    if (document == ASSISTANT_ID).any():
        ends = np.flatnonzero(document == ASSISTANT_ID) + 1
        ends = ends[ends <= LONGEST_PROMPT]
        return [document[: rng.choice(ends)]] if len(ends) else []
    prompts = [document[: prompt_length(document, rng)]]
    for _ in range(1, min(4, len(document) // 150)):
        length = int(rng.integers(16, 97))
        begin = int(rng.integers(1, max(2, len(document) - length - 1)))
        prompts.append(np.concatenate([[BEGIN_ID], document[begin : begin + length]]))
    return prompts


def choose_prompts(corpora: list[Corpus], most_tokens: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Different prompts of every source, from its documents in random order, until they are `most_tokens` together."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray]] = {}
    for corpus in corpora:
        for name in corpus.names:
            seen, tokens = {}, 0
            for index in rng.permutation(corpus.of_source(name)):
                for prompt in cut_prompts(corpus.document(index), rng):
                    tokens += len(prompt) if seen.setdefault(prompt.tobytes(), prompt) is prompt else 0
                if tokens > most_tokens:
                    break
            chosen[name] = list(seen.values())
    return chosen


def plan_answers(prompts: dict[str, list[np.ndarray]], enough: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Every prompt three times or, where a source has fewer than `enough` answers by that, up to eight times; and the
    temperature of each answer."""
    whole: list[np.ndarray] = []
    temperatures: list[float] = []
    for some in prompts.values():
        times = min(max(-(-enough // max(len(some), 1)), 3), len(TEMPERATURES))
        for temperature in TEMPERATURES[:times]:
            whole += some
            temperatures += [temperature] * len(some)
    return whole, np.array(temperatures, np.float32)


def answer_corpus(
    model,
    prompts: list[np.ndarray],
    temperatures: np.ndarray,
    new_tokens: int,
    batch: int,
    folder: Path,
    seed: int,
    say: Callable[[str], None],
    max_seconds: float | None = None,
) -> Corpus:
    """Let the target answer these prompts, `batch` of like length at a time.

    Batches come in random order, so that stopping after `max_seconds` leaves a fair mix. Finished batches lie in
    `folder` and are not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(model, batch, max(map(len, prompts)) + new_tokens)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    batches = [order[at : at + batch] for at in range(0, len(order), batch)]
    begun, made = time.monotonic(), []
    for done, at in enumerate(np.random.default_rng(seed).permutation(len(batches))):
        path = folder / f"{at:05d}.npz"
        if not path.exists():
            if max_seconds and time.monotonic() - begun > max_seconds:
                say(f"time is up after {done} of {len(batches)} batches")
                break
            torch.manual_seed(seed + int(at))
            some = [prompts[i] for i in batches[at]]
            whole = sampler.answer(some, temperatures[batches[at]], new_tokens)
            corpus_of(("answers", document) for document in whole).save(path)
            if done % 20 == 0:
                say(f"answers: batch {done} of {len(batches)}, {time.monotonic() - begun:.0f} s")
        made.append(path)
    parts = [Corpus.load(path) for path in sorted(made)]
    return corpus_of(("answers", part.document(i)) for part in parts for i in range(len(part)))
