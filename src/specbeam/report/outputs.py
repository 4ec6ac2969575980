"""Outputs side by side with their first difference, and the data that the token view is drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from specbeam.decoding import SAMPLED_FAMILIES
from specbeam.report.escape import escape, visible

T = TypeVar("T")
# The page stays below 1 MB: what does not fit is left out, and the page says so.
PAGE_BYTES = 960_000
OUTPUT_SHARE, TOKEN_SHARE, BEAM_SHARE = 0.36, 0.38, 0.15
_ENDINGS = {"eos": "an end token", "stop": "a stop string", "length": "the length limit"}
_SOURCE = {"plain": "p", "correction": "c", "bonus": "b", "draft": "d"}
_MORE_SOURCES = "efghijk"  # drafters by other names, in order of appearance; report.css has a colour for each


def outputs_section(rows: Iterable[Mapping[str, Any]], prompts: Mapping[str, Mapping[str, Any]],
                    methods: Mapping[str, Mapping[str, Any]], most_bytes: int) -> str:
    """The verdict, then every prompt with its answers; methods that gave the same tokens share one cell, the others
    show where they part from the family's first method."""
    by_prompt: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        own = by_prompt.setdefault((row["prompt_id"], row["turn"]), {})
        if row["method"] not in own or (own[row["method"]]["status"] != "ok" and row["status"] == "ok"):
            own[row["method"]] = row
    parts: list[str] = [_verdict(methods)]
    size = 0
    for number, ((prompt_id, turn), answers) in enumerate(_turns_together(by_prompt)):
        block = _prompt_block(prompt_id, turn, answers, prompts.get(prompt_id) or {}, methods, number == 0)
        size += len(block.encode())  # `visible` has replaced lone surrogates, so this cannot fail
        if size > most_bytes and number:
            parts.append(f"<p>{len(by_prompt) - number} more of the {len(by_prompt)} prompts are left out here, to "
                         "keep this page small; their answers are in rows.jsonl.</p>")
            break
        parts.append(block)
    return "".join(parts)


def _verdict(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether each method gave its baselines' tokens, as a list; where not, by how little the target preferred its
    own."""
    lines = ""
    for label, figures in methods.items():
        compared = {baseline: one for baseline, one in figures.get("identical_to", {}).items() if one["of"]}
        if not compared:
            continue
        parts = []
        for baseline, one in compared.items():
            gap = (figures.get("logit_gaps") or {}).get(baseline)
            first = one.get("first_difference")
            where = f", first on {first['prompt_id']} at token {first['position'] + 1}" if first else ""
            near = f", logits at most {gap['largest']:.3g} apart there" if gap else ""
            parts.append(f"{baseline} in {one['same']} of {one['of']} answers{where}{near}")
        same = all(one["same"] == one["of"] for one in compared.values())
        lines += (f'<li class="{"good" if same else "bad"}"><b>{"✓" if same else "✗"} {escape(label)}</b> '
                  f'{"gave the tokens of" if same else "has the tokens of"} {escape("; ".join(parts))}</li>')
    return lines and f'<ul class="verdict">{lines}</ul>'


def _prompt_block(prompt_id: str, turn: int, answers: Mapping[str, Mapping[str, Any]], prompt: Mapping[str, Any],
                  methods: Mapping[str, Mapping[str, Any]], opened: bool) -> str:
    asked = asked_of(prompt, turn)
    references = prompt.get("references") or []
    expected = references[turn] if turn < len(references) else []
    groups = _groups(answers, methods)
    families = list(dict.fromkeys(group[0]["family"] for group in groups))
    groups.sort(key=lambda group: families.index(group[0]["family"]))
    verdict = "".join(f'<span class="{"bad" if count > 1 else "good"}">{escape(family)}: '
                      f'{"same tokens" if count == 1 else f"{count} different outputs"}</span> '
                      for family in families if family not in SAMPLED_FAMILIES
                      and (count := sum(group[0]["family"] == family for group in groups))
                      and sum(len(g) for g in groups if g[0]["family"] == family) > 1)
    cells = "".join(_cell(group, groups) for group in groups)
    turn_text = f", turn {turn + 1}" if turn else ""
    head = " ".join(visible(asked).split())
    head = head if len(head) <= 80 else head[:79] + "…"
    shown = f'<p class="prompt" dir="auto">{escape(asked)}</p>' if len(str(asked)) > 80 or "\n" in str(asked) else ""
    wanted = "".join(f'<p class="reference"><small>reference</small> <span dir="auto">{escape(one)}</span></p>'
                     for one in expected)
    return (f'<details class="prompt-block"{" open" if opened else ""}><summary><small>{escape(prompt_id)}{turn_text}'
            f'</small> <bdi>{escape(head)}</bdi> {verdict}</summary>{shown}{wanted}'
            f'<div class="cells">{cells}</div></details>')


def _groups(answers: Mapping[str, Mapping[str, Any]],
            methods: Mapping[str, Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Answers in table order; those of one family with the same tokens are together."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for label in [*methods, *(label for label in answers if label not in methods)]:
        if label not in answers:
            continue
        row = answers[label]
        family = methods.get(label, {}).get("family", row["kind"])
        ok = row["status"] == "ok"
        key = (family, tuple(row["tokens"]) if ok else f"failed {row['error']}")
        groups.setdefault(key, []).append({"label": label, "family": family, "ok": ok, "text": row["text"] or "",
                                           "error": row["error"], "tokens": row["tokens"] or [],
                                           "finish": row["finish_reason"]})
    return list(groups.values())


def _cell(group: Sequence[dict[str, Any]], groups: Sequence[Sequence[dict[str, Any]]]) -> str:
    one = group[0]
    names = ", ".join(escape(answer["label"]) for answer in group)
    if not one["ok"]:
        return f'<div class="cell failed"><h4>{names}</h4><p>failed: {escape(one["error"])}</p></div>'
    model = next(other[0] for other in groups if other[0]["family"] == one["family"] and other[0]["ok"])
    text = _marked(one, model) if model is not one and one["family"] not in SAMPLED_FAMILIES else escape(one["text"])
    return (f'<div class="cell"><h4>{names}</h4><p dir="auto">{text}</p>'
            f'<small>{len(one["tokens"])} tokens, ended by {escape(_ENDINGS.get(one["finish"], one["finish"]))}</small>'
            "</div>")


def _marked(one: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The text with the word marked where it parts from the model's."""
    ours, theirs = one["text"], model["text"]
    if ours == theirs:
        return f'{escape(ours)} <mark>other tokens, same text as {escape(model["label"])}</mark>'
    common = _common(ours, theirs)
    start = common - len(ours[:common].split(" ")[-1]) if common else 0  # from the start of that word
    end = next((i for i in range(max(common, start + 1), len(ours)) if ours[i].isspace()), len(ours))
    word = escape(ours[start:end]) or "∅"
    return (f'{escape(ours[:start])}<mark title="first difference from {escape(model["label"])}">{word}</mark>'
            f"{escape(ours[end:])}")


def asked_of(prompt: Mapping[str, Any], turn: int) -> str:
    """What was asked at this turn; of a prompt made of messages, all of them."""
    turns = prompt.get("turns") or []
    if turn < len(turns):
        return str(turns[turn])
    messages = prompt.get("messages") or []
    lines = [f"{message.get('role')}: {message.get('content')}" for message in messages]
    return "\n".join(lines) or str(prompt.get("id", ""))


def _turns_together(by_prompt: Mapping[tuple[str, int], T]) -> list[tuple[tuple[str, int], T]]:
    """Prompts in the order they were run, each with its later turns right behind it."""
    order = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(key[0] for key in by_prompt))}
    return sorted(by_prompt.items(), key=lambda item: (order[item[0][0]], item[0][1]))


def _common(ours: str, theirs: str) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(ours), len(theirs)))


def tokens_data(traces: Sequence[Mapping[str, Any]], prompts: Mapping[str, Mapping[str, Any]],
                most_bytes: int = PAGE_BYTES) -> dict[str, Any]:
    """What the token view draws: for each prompt its answers' pieces, sources, rounds and probabilities.

    Only prompts that some method speculated on; as many as fit, `left_out` counts the others. `sources` says which
    letter stands for which source.
    """
    letters = source_letters(traces)
    by_prompt: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for trace in traces:
        by_prompt.setdefault((trace["prompt_id"], trace["turn"]), []).append(trace)
    wanted = {key: own for key, own in _turns_together(by_prompt)
              if any(map(speculated, own))}
    shown: list[dict[str, Any]] = []
    size = 0
    for (prompt_id, turn), own in wanted.items():
        asked = visible(asked_of(prompts.get(prompt_id) or {}, turn))[:400]
        answers = [_answer(trace, letters) for trace in own if "beam" not in trace["kind"]]
        size += sum(map(_cost, answers)) + len(asked.encode())
        if size > most_bytes and shown:
            break
        shown.append({"name": visible(prompt_id) + (f", turn {turn + 1}" if turn else ""), "prompt": asked,
                      "answers": answers})
    names = {letter: visible(source) for source, letter in letters.items()}
    return {"prompts": shown, "left_out": len(wanted) - len(shown), "sources": names}


def speculated(trace: Mapping[str, Any]) -> bool:
    """Whether anything was proposed to this answer (beams propose steps, not tokens of one text)."""
    return "beam" not in trace["kind"] and any(one["drafted"] for one in trace["rounds"])


def source_letters(traces: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Source of a token → the letter (and css class) that stands for it: d the draft model, further drafters e, f, …"""
    seen = dict.fromkeys(source for trace in traces if speculated(trace) for source in trace.get("sources", ()))
    others = [source for source in seen if source not in _SOURCE]
    last = len(_MORE_SOURCES) - 1
    return _SOURCE | {source: _MORE_SOURCES[min(i, last)] for i, source in enumerate(others)}


def _answer(trace: Mapping[str, Any], letters: Mapping[str, str]) -> dict[str, Any]:
    def percent(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [round(100 * value, 1) if value < 0.1 else round(100 * value)
                                            for value in values]

    answer: dict[str, Any] = {
        "method": visible(trace["method"]),
        "pieces": [visible(piece) for piece in trace["pieces"]],
        "sources": "".join(letters.get(source, "p") for source in trace["sources"]),
        "rounds": list(trace["token_rounds"]),
        "target": percent(trace.get("target_probability")),
    }
    if speculated(trace):
        answer["draft"] = percent(trace.get("draft_probability"))
        answer["steps"] = _steps(trace)
    else:
        answer["milliseconds"] = [round(1000 * one["seconds"], 2) for one in trace["rounds"]]
    return answer


def _steps(trace: Mapping[str, Any]) -> list[list[Any]]:
    """Of each round: drafted, accepted, milliseconds, what stood in the place of the correction (of a chain: all that
    was rejected), whether it was a tree, and why it was as long as it was."""
    tokens: dict[int, list[int]] = {}
    for token, number in zip(trace["tokens"], trace["token_rounds"], strict=True):
        tokens.setdefault(number, []).append(token)
    steps = []
    for number, one in enumerate(trace["rounds"], start=1):
        proposed, pieces = one.get("proposed") or [], one.get("proposed_pieces") or []
        chain = list(range(-1, len(proposed) - 1))
        parents = one.get("parents") or chain
        if tree := parents != chain:
            end = -1
            for token in tokens.get(number, [])[:one["accepted"]]:
                end = next((i for i, parent in enumerate(parents) if parent == end and proposed[i] == token), end)
            rejected = [piece for piece, parent in zip(pieces, parents, strict=True) if parent == end]
        else:
            rejected = pieces[one["accepted"]:]
        shown = [visible(piece).replace("\n", "↵") for piece in rejected]
        steps.append([one["drafted"], one["accepted"], round(1000 * one["seconds"], 2), shown, int(tree),
                      visible(one.get("why") or "")])
    return steps


def _cost(answer: Mapping[str, Any]) -> int:
    """About its bytes as JSON."""
    pieces = sum(len(piece.encode()) + 4 for piece in answer["pieces"])
    steps = sum(28 + len(step[5]) + sum(len(piece.encode()) + 4 for piece in step[3])
                for step in answer.get("steps", ()))
    return 120 + pieces + steps + len(answer["pieces"]) * 12 + 6 * len(answer.get("milliseconds", ()))
