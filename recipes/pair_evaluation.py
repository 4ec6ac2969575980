"""What the bundled pair can do: held-out perplexity, BLEU, sums, greedy acceptance, samples."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pair_answers import answer_prompts
from pair_data import ASSISTANT_ID, PAD_ID, Corpus, prompt_length
from pair_training import loss_weights

SAMPLE_PROMPTS = (
    "Translate English to German: The children are playing in the garden.",
    "Translate English to French: I would like a glass of water, please.",
    "Translate to English: Der Zug nach Berlin fährt um acht Uhr ab.",
    "What is 47 + 38?",
    "Anna has 12 apples. She gives 5 apples to Tom. How many apples does she have left?",
    'What does "courage" mean?',
    "Name three things you can find in a kitchen.",
    "What are the symptoms of the flu?",
    "Do you like watching movies?",
    "Write a Python function that adds two numbers.",
)


def encode_chat(tokenizer, *turns: str, system: str | None = None) -> np.ndarray:
    """Token ids of a chat that ends with the generation prompt; turns alternate, the user first."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_texts(model, tokenizer, prompts: list[np.ndarray], new_tokens: int, batch: int, **options) -> list[str]:
    """Greedy (or by `options`) answers as text, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    answers = [""] * len(prompts)
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        whole = answer_prompts(model, [prompts[at] for at in part], new_tokens, **options)
        for at, tokens in zip(part, whole, strict=True):
            answers[at] = tokenizer.decode(tokens[len(prompts[at]) :], skip_special_tokens=True).strip()
    return answers


def right_padded(documents: list[np.ndarray], device) -> torch.Tensor:
    rows = np.full((len(documents), max(map(len, documents))), PAD_ID, np.int64)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = document
    return torch.from_numpy(rows).to(device)


@torch.no_grad()
def perplexity_by_source(model, corpus: Corpus, batch: int, most: int) -> dict[str, dict]:
    """Perplexity per token of assistant turns and prose, for every held-out source (at most `most` documents)."""
    found = {}
    for name in corpus.names:
        loss, count = 0.0, 0.0
        documents = sorted((corpus.document(i) for i in corpus.of_source(name)[:most]), key=len)
        for at in range(0, len(documents), batch):
            rows = right_padded(documents[at : at + batch], model.device)
            labels, weights = loss_weights(rows, 0.0)
            logits = model(input_ids=rows, attention_mask=(rows != PAD_ID).long()).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            loss += (losses * weights.flatten()).sum().item()
            count += weights.sum().item()
        if count:
            found[name] = {"perplexity": math.exp(loss / count), "tokens": int(count)}
    return found


def accepted_and_drafted(matches: np.ndarray, draft_length: int) -> tuple[int, int, int]:
    """(accepted, drafted, rounds) of chain speculation on one answer.

    matches[i]: the draft's argmax after the target's first i tokens is the target's next token. The first
    token comes from prefill; a round commits what was accepted and one token more.
    """
    accepted = drafted = rounds = 0
    at = 1
    while at < len(matches):
        window = matches[at : at + draft_length]
        run = int(np.argmin(window)) if not window.all() else len(window)
        accepted += run
        # A draft that has proposed the end of the answer stops there; a wrong one goes on to its full length.
        drafted += len(window) if run == len(window) else draft_length
        rounds += 1
        at += run + 1
    return accepted, drafted, rounds


@torch.no_grad()
def acceptance_by_source(
    target,
    draft,
    corpus: Corpus,
    prompts_each: int,
    new_tokens: int,
    draft_length: int,
    batch: int,
    seed: int,
) -> dict[str, dict]:
    """Greedy acceptance rate on held-out prompts of every source, and over all of them.

    Counted without running speculation: the draft's choices at every prefix of the target's own greedy
    answer decide what every round accepts.
    """
    rng = np.random.default_rng(seed)
    cases: list[tuple[str, np.ndarray]] = []
    for name in corpus.names:
        documents = [corpus.document(i) for i in rng.permutation(corpus.of_source(name))[:prompts_each]]
        cases += [(name, document[: prompt_length(document, rng)]) for document in documents]
    # Together, not source by source: the longest answer of a batch decides how many forwards it needs.
    cases = sorted((case for case in cases if len(case[1]) <= 1024), key=lambda case: len(case[1]))
    keys = ("accepted", "drafted", "rounds", "prompts", "new_tokens")
    counts = {name: dict.fromkeys(keys, 0) for name in corpus.names}
    for at in range(0, len(cases), batch):
        part = cases[at : at + batch]
        whole = answer_prompts(target, [prompt for _, prompt in part], new_tokens)
        rows = right_padded(whole, draft.device)
        choices = draft(input_ids=rows, attention_mask=(rows != PAD_ID).long()).logits.argmax(-1).cpu().numpy()
        for (name, prompt), sequence, choice in zip(part, whole, choices, strict=True):
            first, last = len(prompt), len(sequence)
            one = accepted_and_drafted(choice[first - 1 : last - 1] == sequence[first:last], draft_length)
            for key, value in zip(keys, (*one, 1, last - first), strict=True):
                counts[name][key] += value
    found = {
        name: {
            "acceptance": row["accepted"] / row["drafted"],
            **row,
            "mean_accepted_length": 1 + row["accepted"] / row["rounds"],
        }
        for name, row in counts.items()
        if row["drafted"]
    }
    total = {key: sum(row[key] for row in found.values()) for key in keys}
    if not found:
        return {}
    found["all"] = {
        **total,
        "acceptance": total["accepted"] / total["drafted"],
        "mean_accepted_length": 1 + total["accepted"] / total["rounds"],
        "mean_of_sources": float(np.mean([row["acceptance"] for row in found.values()])),
    }
    return found


def translation_scores(model, tokenizer, folder: Path, sentences: int, batch: int) -> dict[str, dict]:
    """BLEU and chrF of both directions of every `tatoeba_heldout_en-*.jsonl`, greedy and with 4 beams."""
    import sacrebleu

    names = {"en": "English", "de": "German", "fr": "French"}
    cases: list[tuple[str, str, list[str]]] = []  # direction, prompt, references
    for path in sorted(folder.glob("tatoeba_heldout_en-*.jsonl")):
        other = path.stem[-2:]
        for line in path.read_text(encoding="utf-8").splitlines()[:sentences]:
            pair = json.loads(line)
            cases.append((f"en-{other}", f"Translate English to {names[other]}: {pair['en']}", pair[other]))
            cases.append((f"{other}-en", f"Translate {names[other]} to English: {pair[other][0]}", [pair["en"]]))
    prompts = [encode_chat(tokenizer, prompt) for _, prompt, _ in cases]
    found: dict[str, dict] = {}
    for label, options in (("greedy", {}), ("4 beams", {"num_beams": 4})):
        answers = answer_texts(model, tokenizer, prompts, 96, batch, **options)
        for direction in sorted({case[0] for case in cases}):
            own = [(answer, case) for answer, case in zip(answers, cases, strict=True) if case[0] == direction]
            hypotheses = [answer for answer, _ in own]
            most = max(len(case[2]) for _, case in own)
            # None where a sentence has fewer references than others, as sacrebleu wants it
            references: list = [[case[2][at] if at < len(case[2]) else None for _, case in own] for at in range(most)]
            bleu, chrf = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
            found[f"{direction} {label}"] = {
                "bleu": bleu.corpus_score(hypotheses, references).score,
                "chrf": chrf.corpus_score(hypotheses, references).score,
                "sentences": len(own),
                "signature": str(bleu.get_signature()),
                "first": [{"prompt": case[1], "answer": answer} for answer, case in own[:3]],
            }
    return found


def last_number(text: str) -> str:
    """The last number of a text without thousands separators and trailing zeros; empty if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    number = numbers[-1].replace(",", "") if numbers else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


def sum_accuracy(model, tokenizer, held_out: Corpus, gsm8k: Path, batch: int, each: int, seed: int) -> dict[str, dict]:
    """How often the last number of a greedy answer is right: fresh sums, held-out MAWPS, GSM8K's test set."""
    rng = random.Random(seed)
    kinds: dict[str, Callable[[], tuple[str, int]]] = {}

    def ask(sign: str, low: int, high: int) -> Callable[[], tuple[str, int]]:
        def one() -> tuple[str, int]:
            first, second = rng.randint(low, high), rng.randint(low, high)
            if sign == "-" and second > first:
                first, second = second, first
            right = {"+": first + second, "-": first - second, "x": first * second}[sign]
            return f"What is {first} {sign} {second}?", right

        return one

    kinds["a + b, two digits"] = ask("+", 10, 99)
    kinds["a + b, three digits"] = ask("+", 100, 999)
    kinds["a - b, two digits"] = ask("-", 10, 99)
    kinds["a x b, one digit"] = ask("x", 2, 9)
    questions = {kind: [make() for _ in range(each)] for kind, make in kinds.items()}
    cases = {kind: [(encode_chat(tokenizer, q), str(right)) for q, right in some] for kind, some in questions.items()}
    for name in ("mawps", "gsm8k_train"):
        if name not in held_out.names:
            continue
        cases[f"{name}, held out"] = []
        for index in held_out.of_source(name)[:each]:
            document = held_out.document(index)
            cut = int(np.flatnonzero(document == ASSISTANT_ID)[0]) + 1
            answer = tokenizer.decode(document[cut:], skip_special_tokens=True)
            cases[f"{name}, held out"].append((document[:cut].astype(np.int64), last_number(answer)))
    if gsm8k.exists():
        problems = [json.loads(line) for line in gsm8k.read_text(encoding="utf-8").splitlines()[:each]]
        cases["GSM8K test"] = [(encode_chat(tokenizer, p["question"]), last_number(p["answer"])) for p in problems]
    every = [(kind, prompt, number) for kind, some in cases.items() for prompt, number in some]
    answers = answer_texts(model, tokenizer, [prompt for _, prompt, _ in every], 200, batch)
    found = {kind: {"right": 0, "of": len(some)} for kind, some in cases.items()}
    for answer, (kind, _, number) in zip(answers, every, strict=True):
        found[kind]["right"] += last_number(answer) == number
    return found


def evaluate_pair(
    target,
    draft,
    tokenizer,
    held_out: Corpus,
    folder: Path,
    seed: int,
    batch: int,
    most: int,
    say: Callable[[str], None],
) -> dict:
    """Every figure of the model card. most: sentences, prompts or documents per set."""
    report: dict = {"parameters": {"target": target.num_parameters(), "draft": draft.num_parameters()}}
    report["perplexity"] = {
        "target": perplexity_by_source(target, held_out, min(batch, 32), most),
        "draft": perplexity_by_source(draft, held_out, min(batch, 32), most),
    }
    say("perplexity done")
    report["acceptance"] = acceptance_by_source(target, draft, held_out, min(most, 40), 64, 4, batch, seed)
    if report["acceptance"]:
        say(f"greedy acceptance at draft length 4: {report['acceptance']['all']}")
    report["translation"] = translation_scores(target, tokenizer, folder, min(most, 200), batch)
    say("BLEU " + ", ".join(f"{name} {row['bleu']:.1f}" for name, row in report["translation"].items()))
    report["sums"] = sum_accuracy(target, tokenizer, held_out, folder / "gsm8k_test.jsonl", batch, min(most, 200), seed)
    say("sums " + ", ".join(f"{name} {row['right']}/{row['of']}" for name, row in report["sums"].items()))
    prompts = [encode_chat(tokenizer, prompt) for prompt in SAMPLE_PROMPTS]
    answers = answer_texts(target, tokenizer, prompts, 96, batch)
    report["samples"] = [{"prompt": p, "answer": a} for p, a in zip(SAMPLE_PROMPTS, answers, strict=True)]
    return report


def report_tables(report: dict) -> str:
    """The report as Markdown, for docs/log.md."""
    lines = [
        "| held-out source | tokens | target perplexity | draft perplexity | acceptance (4) | mean accepted length |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["perplexity"]["target"].items():
        own = report["acceptance"].get(name)
        tail = f"{own['acceptance']:.2f} | {own['mean_accepted_length']:.2f}" if own else "– | –"
        lines.append(
            f"| {name} | {row['tokens']} | {row['perplexity']:.2f} "
            f"| {report['perplexity']['draft'][name]['perplexity']:.2f} | {tail} |"
        )
    everything = report["acceptance"].get("all")
    if everything:
        lines.append(
            f"| **all** | | | | **{everything['acceptance']:.3f}** (mean of sources "
            f"{everything['mean_of_sources']:.3f}) | {everything['mean_accepted_length']:.2f} |"
        )
    lines += ["", "| translation | sentences | BLEU | chrF |", "|---|--:|--:|--:|"]
    for name, row in report["translation"].items():
        lines.append(f"| {name} | {row['sentences']} | {row['bleu']:.1f} | {row['chrf']:.1f} |")
    lines += ["", "| sums | right |", "|---|--:|"]
    lines += [f"| {name} | {row['right']} of {row['of']} |" for name, row in report["sums"].items()]
    lines += ["", "| prompt | greedy answer |", "|---|---|"]
    for sample in report["samples"]:
        cells = [sample[key].replace("|", "\\|").replace("\n", "<br>") for key in ("prompt", "answer")]
        lines.append(f"| {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"
