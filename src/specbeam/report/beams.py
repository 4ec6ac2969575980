"""The data that the beam view is drawn from: search trees, as many as fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specbeam.report.escape import visible
from specbeam.report.outputs import asked_of


def beams_data(searches: Sequence[Mapping[str, Any]], prompts: Mapping[str, Mapping[str, Any]], most_bytes: int
               ) -> dict[str, Any]:
    """`answers`: search trees, and `left_out`: how many more there are. Methods that searched the same tree share one,
    each with its own rounds.

    A step is [pieces, beams, scores, survived_as, finish_reasons, finished_scores], candidates best first.
    """
    groups: dict[str, dict[str, Any]] = {}
    for search in searches:
        key = json.dumps([search["prompt_id"], search["turn"],
                          [[step["tokens"], step["beams"], step["survived_as"]] for step in search["steps"]]])
        rounds = [step["round"] for step in search["steps"]]
        if key in groups:
            groups[key]["methods"].append([visible(search["method"]), rounds])
            continue
        turn = f", turn {search['turn'] + 1}" if search["turn"] else ""
        groups[key] = {
            "name": visible(search["prompt_id"]) + turn,
            "prompt": visible(asked_of(prompts.get(search["prompt_id"]) or {}, search["turn"]))[:400],
            "methods": [[visible(search["method"]), rounds]],
            "returned": search.get("returned", 1),
            "steps": [[[visible(piece).replace("\n", "↵") for piece in step["pieces"]], step["beams"],
                       [_short(score) for score in step["scores"]], step["survived_as"], step["finish_reasons"],
                       [_short(score, 4) for score in step["finished_scores"]]] for step in search["steps"]],
            "ends": [[one["step"], one["candidate"], _short(one["score"], 4), one["finish_reason"],
                      visible(one["text"])[:400]] for one in search["hypotheses"]],
        }
    shown: list[dict[str, Any]] = []
    size = 0
    for group in groups.values():
        size += len(json.dumps(group, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"))
        if size > most_bytes and shown:
            break
        shown.append(group)
    return {"answers": shown, "left_out": len(groups) - len(shown)}


def _short(score: float | None, digits: int = 2) -> float | None:
    return None if score is None else round(score, digits)
