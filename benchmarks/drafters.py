"""Which drafter wins on which kind of text? Tables for docs/drafters.md from finished runs.

    specbeam compare experiment=speculation prompt_set.path=question.jsonl prompt_set.per_category=5 output_dir=RUN
    python benchmarks/drafters.py RUN [RUN …]

Speed-up: decode seconds a token of plain greedy decoding over the method's, in the same run. In brackets, predicted:
the tokens a round that acceptance α (each depth accepted with the same probability, given those before it) gives at
draft length γ, (1 - α^(γ+1)) / (1 - α), over what drafting and verifying cost in plain steps, by the run's own seconds
(DESIGN §7). For chains of one length at batch 1 that is the formula as it stands. ≈ marks an estimate: γ is then the
mean depth of what was proposed (trees, adaptive lengths, look-ups), and in a batch, which runs until its longest answer
ends, all rows are taken to accept alike.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

GROUPS = {"translation": "translation", "summarization": "summary", "qa": "qa", "math_reasoning": "math", "rag": "rag"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["status"] == "ok" and row["decode_seconds"]]


def seconds_per_token(rows: list[dict[str, Any]]) -> float:
    """The seconds of a batch count once."""
    batches = {row["batch_id"]: row["decode_seconds"] for row in rows}
    tokens = sum(row["new_tokens"] - row["first_tokens"] for row in rows)
    return sum(batches.values()) / tokens if tokens else float("nan")


def predicted(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> float | None:
    """Speed-up by the formula; α from the acceptance by depth, costs from the run's seconds."""
    offered = accepted = depth = 0
    for row in rows:
        reached = row["rounds"]
        for tried, kept in row["accepted_by_position"]:
            offered, accepted, depth = offered + min(tried, reached), accepted + kept, depth + tried
            reached = kept
    rounds = sum(row["rounds"] for row in rows)
    if not rounds:
        return None
    alpha, gamma = accepted / offered if offered else 0.0, depth / rounds
    tokens = 1 + gamma if alpha >= 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
    return tokens * seconds_a_round(plain) / seconds_a_round(rows)


def seconds_a_round(rows: list[dict[str, Any]]) -> float:
    """Of drafting and of the target's forward, where they are known apart from the rest; a batch has as many rounds as
    its longest row."""
    seconds: dict[str, float] = {}
    rounds: dict[str, int] = defaultdict(int)
    for row in rows:
        forwards = row["verify_seconds"]
        seconds[row["batch_id"]] = row["decode_seconds"] if forwards is None else forwards + (row["draft_seconds"] or 0)
        rounds[row["batch_id"]] = max(rounds[row["batch_id"]], row["rounds"])
    return sum(seconds.values()) / sum(rounds.values())


def table(folder: Path) -> str:
    rows = rows_of(folder)
    config = (folder / "summary.json").read_text(encoding="utf-8")
    batch = json.loads(config).get("batch_size")
    by: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        group = GROUPS.get(row["category"], "mt-bench")
        by[row["method"]][group].append(row)
        by[row["method"]]["all"].append(row)
    of_batch: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        of_batch[row["batch_id"]].add(GROUPS.get(row["category"], "mt-bench"))
    apart = all(len(groups) == 1 for groups in of_batch.values())  # else a batch's seconds belong to several groups
    groups = [g for g in (("mt-bench", *GROUPS.values(), "all") if apart else ("all",)) if by["greedy"].get(g)]
    lines = [f"### Batch {batch}", "", "| method | " + " | ".join(groups) + " | mean accepted length |",
             "|---" + "|--:" * (len(groups) + 1) + "|"]
    measured = {method: {g: seconds_per_token(by["greedy"][g]) / seconds_per_token(found[g])
                         for g in groups if found.get(g)} for method, found in by.items()}
    best = {g: max(measured[method].get(g, 0) for method in measured if not method.startswith("transformers"))
            for g in groups}
    for method, found in by.items():
        if method == "greedy":
            continue
        as_it_stands = batch == 1 and (method.removeprefix("draft_").isdigit() or method == "transformers_assisted")
        cells = []
        for g in groups:
            if g not in measured[method]:
                cells.append("–")
                continue
            cell = f"{measured[method][g]:.2f}"
            cell = f"**{cell}**" if measured[method][g] == best[g] else cell
            guess = None if method == "transformers_greedy" else predicted(found[g], by["greedy"][g])
            cells.append(cell + ("" if guess is None else f" ({'' if as_it_stands else '≈'}{guess:.2f})"))
        rounds = sum(row["rounds"] for row in found["all"])
        length = sum(row["new_tokens"] - row["first_tokens"] for row in found["all"]) / max(rounds, 1)
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {length:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("benchmarks/drafters.py takes at least one run folder.")
    print("\n".join(table(Path(folder)) for folder in sys.argv[1:]))
