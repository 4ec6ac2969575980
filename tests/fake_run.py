"""A run folder as `specbeam compare` writes it, without running anything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from specbeam.experiment.statistics import summarise

METHODS = {
    "greedy": {"kind": "greedy"},
    "speculative": {"kind": "speculative", "draft_length": 4},
    "beam": {"kind": "beam", "num_beams": 4},
    "transformers_greedy": {"kind": "transformers_greedy"},
    "transformers_assisted": {"kind": "transformers_assisted", "draft_length": 4},
    "transformers_beam": {"kind": "transformers_beam", "num_beams": 4},
}
RATES = {"greedy": 118, "speculative": 190, "beam": 61, "transformers_greedy": 96, "transformers_assisted": 121,
         "transformers_beam": 48}
WORDS = [
    "the", "a", "small", "of", "light", "moves", "into", "water", "slowly", "because", "it", "sky", "is", "blue",
    "and", "we", "see", "that", "for", "each", "long", "word", "there", "are", "two", "ways", "to", "say", "what",
    "happens", "when", "rain", "falls", "on", "mountains",
]
QUESTIONS = ("Why is the sky blue?", "Translate into German: “The dog sleeps under the old table.”",
             "Add 17 and 25.", "Write two sentences about rain in the mountains, for a child of six.")


def _rounds(chance: random.Random, count: int, speculates: bool) -> tuple[list[dict[str, Any]], list[str], list[int]]:
    """Rounds that bring `count` tokens after the first; sources and rounds of all tokens."""
    rounds: list[dict[str, Any]] = []
    sources, numbers = ["plain"], [0]
    while len(sources) < count:
        accepted = min(chance.choice((0, 1, 2, 3, 4, 4)), count - len(sources) - 1) if speculates else 0
        last = ("bonus" if accepted == 4 else "correction") if speculates else "plain"
        new = ["draft"] * accepted + [last]
        drafted = 4 if speculates else 0
        rounds.append({"drafted": drafted, "accepted": accepted, "committed": len(new),
                       "seconds": chance.uniform(.018, .024) if speculates else chance.uniform(.008, .011),
                       "proposed": list(range(drafted)), "proposed_pieces": [" " + chance.choice(WORDS)] * drafted})
        sources += new
        numbers += [len(rounds)] * len(new)
    return rounds, sources, numbers


def _search(chance: random.Random, tokens: int, word: str | None, width: int = 4) -> dict[str, Any]:
    """A search tree: beams that change places, losers, and hypotheses that end in the last two steps."""
    steps = []
    for number in range(tokens):
        last = number == tokens - 1
        origins = [0] * 8 if number == 0 else [chance.randrange(width) for _ in range(8)]
        if number:
            origins[:4] = [0, 1, 2, 3] if chance.random() < .7 else [0, 0, 1, 2]
        ends = [last and j < width for j in range(8)]
        if tokens > 2 and number == tokens - 2:
            ends[2] = True
        living = iter(range(width))
        survived = [None if end or last else next(living, None) for end in ends]
        scores = [-.3 * number - .2 * j for j in range(8)]
        steps.append({"round": number, "tokens": list(range(8)),
                      "pieces": [" " + (word if word and j == 1 else chance.choice(WORDS)) for j in range(8)],
                      "beams": origins, "scores": scores, "survived_as": survived,
                      "finish_reasons": ["eos" if end else None for end in ends],
                      "finished_scores": [score / (number + 1) if end else None
                                          for score, end in zip(scores, ends, strict=True)]})
    hypotheses = [{"step": tokens - 1, "candidate": j, "tokens": list(range(tokens)), "text": word or f"Answer {j}.",
                   "score": -.3 - .1 * j, "finish_reason": "eos"} for j in range(2)]
    return {"returned": 1, "steps": steps, "hypotheses": hypotheses}


def write_run(folder: Path, prompts: int = 4, repeats: int = 2, tokens: int = 48, hostile: str | None = None,
              fail: bool = False) -> Path:
    """Rows, traces, summary and all. `hostile` is put into every text that a user or a model could have written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, traces, asked, searches = [], [], [], []
    for number in range(prompts):
        question = hostile or QUESTIONS[number % len(QUESTIONS)]
        name = f"{hostile or 'prompt'}-{number}"
        asked.append({"id": name, "category": hostile or "chat", "turns": [question], "messages": None,
                      "references": [[hostile or "A reference."]]})
        for label, settings in METHODS.items():
            chance = random.Random(f"{number} {label}")
            text_chance = random.Random(f"{number} {'beam' in label}")
            pieces = [" " + text_chance.choice(WORDS) for _ in range(tokens)]
            if label == "transformers_assisted" and number == 1:
                pieces[tokens // 2] = " elsewhere"  # a difference to be found
            if hostile:
                pieces[1] = hostile
            ids = [abs(hash(piece)) % 9000 for piece in pieces]
            speculates = label in ("speculative", "transformers_assisted")
            rounds, sources, numbers = _rounds(chance, tokens, speculates)
            text = "".join(pieces).strip()
            for repeat in range(repeats):
                row = {"method": label, "kind": settings["kind"], "prompt_id": name, "turn": 0,
                       "category": hostile or "chat", "repeat": repeat, "batch_id": f"{label}-{number}-{repeat}",
                       "status": "ok", "error": None}
                figures = {"prompt_tokens": 21, "new_tokens": tokens, "first_tokens": 1, "prefill_seconds": .021,
                           "decode_seconds": (tokens - 1) / (RATES[label] * chance.uniform(.85, 1.15)),
                           "draft_seconds": .05 if speculates else None, "verify_seconds": .12, "rounds": len(rounds),
                           "drafted": sum(one["drafted"] for one in rounds),
                           "accepted": sum(one["accepted"] for one in rounds),
                           "accepted_by_position": [[len(rounds), sum(one["accepted"] > i for one in rounds)]
                                                    for i in range(4)] if speculates else [],
                           "finish_reason": "length", "tokens": ids, "text": text,
                           "score": -.4 if "beam" in label else None}
                if fail and label == "transformers_beam" and number == 0:
                    row.update(status="failed", error=hostile or "RuntimeError: out of memory")
                    figures = dict.fromkeys(figures)
                rows.append({**row, **figures})
            if not (fail and label == "transformers_beam" and number == 0):
                if label == "beam":
                    searches.append({"method": label, "kind": label, "prompt_id": name, "turn": 0, "category": "chat",
                                     "batch_id": f"{label}-{number}-0", **_search(chance, min(tokens, 20), hostile)})
                traces.append({
                    "method": label, "kind": settings["kind"], "prompt_id": name, "turn": 0, "category": "chat",
                    "batch_id": f"{label}-{number}-0", "tokens": ids, "pieces": pieces, "sources": sources,
                    "token_rounds": numbers, "target_probability": [chance.random() for _ in ids],
                    "draft_probability": [chance.random() for _ in ids] if speculates else None, "rounds": rounds,
                    "hypotheses": [{"tokens": ids, "text": text, "score": None, "finish_reason": "length",
                                    "beams": None}]})
    summary = summarise(rows, METHODS)
    for label, figures in summary["methods"].items():
        beams = "beam" in label
        figures.update(bleu=24.1 if beams else 21.9, perplexity=2.61 if beams else 3.07,
                       bleu_signature="nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0", logit_gaps={})
    summary.update(target={"path": hostile or "bundled"}, draft={"path": "bundled"}, device="cpu", dtype="float32",
                   batch_size=1, notes=[hostile] if hostile else [])
    environment = {"specbeam": "0.1", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11",
                   "cpu": "A processor", "cores": 2, "load_average": [0.4, 0.2, 0.1], "gpu": [],
                   "command": ["specbeam", "compare", hostile or "batch_size=1"]}
    config = {"methods": METHODS, "batch_size": 1, "note": hostile or "none"}
    (folder / "config.yaml").write_text(json.dumps(config), "utf-8")
    for file, value in (("summary.json", summary), ("environment.json", environment)):
        (folder / file).write_text(json.dumps(value, allow_nan=False), "utf-8")
    for file, lines in (("rows.jsonl", rows), ("trace.jsonl", traces), ("prompts.jsonl", asked),
                        ("beams.jsonl", searches)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder
