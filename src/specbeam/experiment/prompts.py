"""Prompts: from the config, from JSON lines or CSV, from public sets as their files come (prompt_files.py).

A record has exactly one of `prompt` (or `text`: a string), `messages` (a chat up to the model's turn; a closing
assistant message is taken as the reference) and `turns` (user turns, carried on with the model's own answers);
and, if it likes, `reference` or `references`, `category`, `id` (or `question_id`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbeam.errors import InputError
from specbeam.experiment.prompt_files import check_template, csv_records, our_fields
from specbeam.paths import from_user

BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "prompts.jsonl"
ROLES = ("system", "user", "assistant", "tool", "developer")

Message = dict[str, str]
Conversation = str | list[Message]  # what a model reads, before a template makes text of it


@dataclass(frozen=True)
class Prompt:
    """One prompt: the user's `turns`, after the given `messages` if there are any."""

    id: str
    turns: tuple[str, ...]  # what the user says; empty when `messages` already end with the user's turn
    messages: tuple[Message, ...] = ()
    references: tuple[tuple[str, ...], ...] = ()  # of each turn; may be shorter than the turns
    category: str | None = None

    @property
    def answers(self) -> int:
        """How many answers the model gives."""
        return max(1, len(self.turns))

    def references_of(self, turn: int) -> list[str]:
        return list(self.references[turn]) if turn < len(self.references) else []

    def conversation(self, turn: int, earlier: Sequence[str] = ()) -> Conversation:
        """What the model reads at `turn`, after its own `earlier` answers: a string, or chat messages."""
        if self.messages:
            return [dict(message) for message in self.messages]
        if turn == 0:
            return self.turns[0]
        chat: list[Message] = []
        for said, answer in zip(self.turns[:turn], earlier, strict=True):
            chat += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        return [*chat, {"role": "user", "content": self.turns[turn]}]

    def as_record(self) -> dict[str, Any]:
        """The line of prompts.jsonl."""
        return {
            "id": self.id,
            "category": self.category,
            "turns": list(self.turns),
            "messages": [dict(message) for message in self.messages] or None,
            "references": [self.references_of(turn) for turn in range(self.answers)],
        }


def prompts_from_config(config: dict[str, Any]) -> list[Prompt]:
    """`prompts` when given, else `prompt_set`. Raises InputError for anything that is no prompt."""
    given = config.get("prompts")
    if given is not None:
        return prompts_from_list(given)
    prompt_set = config.get("prompt_set") or {}
    if not isinstance(prompt_set, dict):
        raise InputError(f"prompt_set is {prompt_set!r}: give prompt_set.path=<file.jsonl>, or prompt_set=<preset>.")
    for name in ("limit", "per_category"):
        number = prompt_set.get(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise InputError(f"prompt_set.{name} is {number!r}: give a whole number of at least 1, or null for all.")
    path = prompt_set.get("path")
    if not isinstance(path, str) or not path:
        raise InputError("There are no prompts: give prompts=[…] or prompt_set.path=<file.jsonl>.")
    check_template(prompt_set.get("template"))
    file = BUNDLED if path == "bundled" else from_user(path)
    if prompt_set.get("where") and not file.exists():
        raise InputError(f"There is no prompt file {str(file)!r} in {str(Path.cwd())!r}: get it from "
                         f"{prompt_set['where']} and give its place with prompt_set.path=….")
    prompts = read_prompts(file, prompt_set.get("template"))
    chosen = select(prompts, prompt_set.get("limit"), prompt_set.get("per_category"))
    if not chosen:
        raise InputError("prompt_set.limit leaves no prompt: give 1 or more, or null for all.")
    return chosen


def prompts_from_list(given: Any) -> list[Prompt]:
    """Strings, chat message lists, or records as in a prompt file."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InputError(f"prompts is {given!r}, but a list is wanted: prompts='[\"Why is the sky blue?\"]'.")
    if not given:
        raise InputError("prompts is an empty list: give at least one prompt, or leave it null to use prompt_set.")
    prompts = []
    for index, item in enumerate(given):
        record = {"prompt": item} if isinstance(item, str) else item
        record = {"messages": record} if isinstance(record, list) else record
        prompts.append(_prompt(record, f"prompts[{index}]", str(index + 1)))
    return _unique(prompts, [f"prompts[{index}]" for index in range(len(prompts))])


def read_prompts(path: Path, template: str | None = None) -> list[Prompt]:
    """Every prompt of a JSON-lines file (also gzipped) or a CSV file (.csv, .tsv), in its order. Errors name the line.

    template: of translation pairs (prompt_files.our_fields).
    """
    if not path.exists():
        raise InputError(
            f"There is no prompt file {str(path)!r}: give prompt_set.path a JSON-lines file "
            f"(relative paths start from {str(Path.cwd())!r})."
        )
    if path.is_dir():
        raise InputError(f"The prompt file {str(path)!r} is a folder: give prompt_set.path a JSON-lines file.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"The prompt file {str(path)!r} cannot be read: {error}.") from None
    prompts, places = [], []
    if path.suffix in (".csv", ".tsv"):
        try:
            table = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = content[: error.start].split(b"\n")
            place = f"{path}, line {len(before)}: byte {len(before[-1]) + 1}"
            raise InputError(f"{place} is not UTF-8: save the file as UTF-8.") from None
        for number, record in csv_records(table, str(path), "," if path.suffix == ".csv" else "\t"):
            places.append(f"{path}, line {number}")
            prompts.append(_prompt(our_fields(record, template), places[-1], str(number)))
        content = b""
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: byte {error.start + 1} is not UTF-8: save the file as UTF-8.") from None
        if not line:
            continue
        prompts.append(_prompt(our_fields(_json(line, place), template), place, str(number)))
        places.append(place)
    if not prompts:
        raise InputError(
            f"The prompt file {str(path)!r} holds no prompt: write one JSON object a line, "
            'for example {"prompt": "Why is the sky blue?"}.'
        )
    return _unique(prompts, places)


def select(prompts: Iterable[Prompt], limit: int | None, per_category: int | None) -> list[Prompt]:
    """The first `per_category` of each category, then the first `limit` of those; None: all."""
    chosen, seen = [], Counter[str | None]()
    for prompt in prompts:
        seen[prompt.category] += 1
        if per_category is None or seen[prompt.category] <= per_category:
            chosen.append(prompt)
    return chosen[:limit]


def _json(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = (
            "the file wants one JSON object a line, not one array"
            if line.startswith("[")
            else 'one JSON object a line is wanted, for example {"prompt": "Why is the sky blue?"}'
        )
        raise InputError(f"{place} is not JSON ({what}): {hint}.") from None


def _prompt(record: Any, place: str, number: str) -> Prompt:
    if not isinstance(record, dict):
        raise InputError(
            f"{place} is {type(record).__name__}, but a JSON object is wanted, for example "
            '{"prompt": "Why is the sky blue?"}.'
        )
    given = [field for field in ("prompt", "text", "messages", "turns") if record.get(field) is not None]
    if len(given) != 1:
        found = f"both {' and '.join(given)}" if given else f"only {', '.join(map(str, record)) or 'nothing'}"
        raise InputError(f"{place} has {found}: it needs one of prompt, messages and turns.")
    content = record[given[0]]
    references = _references(record, place)
    turns: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    if given[0] == "messages":
        messages = _messages(content, place)
        if messages[-1]["role"] == "assistant":
            # what the model is to say is not shown to it
            references = references or ((messages[-1]["content"],),)
            messages = messages[:-1]
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise InputError(f"{place}: the messages must end with a user's message to answer.")
    elif given[0] == "turns":
        if not isinstance(content, list) or not content:
            raise InputError(f"{place}: turns must be a list of at least one string.")
        turns = tuple(_text(turn, f"{place}: turn {index + 1}") for index, turn in enumerate(content))
    else:
        turns = (_text(content, f"{place}: {given[0]}"),)
    if len(turns) <= 1:
        # one answer: every reference is another wording of it
        references = (tuple(text for turn in references for text in turn),) if references else ()
    identity = record.get("id", record.get("question_id"))
    category = record.get("category")
    if identity is not None and not isinstance(identity, (str, int)):
        raise InputError(f"{place}: the id must be a string or a whole number, not {identity!r}.")
    if category is not None and not isinstance(category, str):
        raise InputError(f"{place}: the category must be a string, not {category!r}.")
    return Prompt(number if identity is None else str(identity), turns, messages, references, category)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place} must be a string, not {type(value).__name__}.")
    if not value.strip():
        raise InputError(f"{place} is empty: there is nothing to answer.")
    return value


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{place}: messages must be a list of at least one {{role, content}}.")
    messages = []
    for index, message in enumerate(value, start=1):
        where = f"{place}: message {index}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f"{where} must be an object with role and content.")
        if message["role"] not in ROLES:
            raise InputError(f"{where} has the role {message['role']!r}: use one of {', '.join(ROLES[:3])}.")
        messages.append({"role": message["role"], "content": _text(message["content"], where)})
    return tuple(messages)


def _references(record: dict[str, Any], place: str) -> tuple[tuple[str, ...], ...]:
    """Per turn. A list of strings is one a turn; a list of lists is several a turn."""
    value = record.get("references", record.get("reference"))
    if value is None:
        return ()
    value = [value] if isinstance(value, str) else value
    turns = [[turn] if isinstance(turn, str) else turn for turn in value] if isinstance(value, list) else [None]
    if not all(isinstance(turn, list) and all(isinstance(text, str) for text in turn) for turn in turns):
        raise InputError(f"{place}: the references must be a string or a list of strings.")
    return tuple(tuple(text for text in turn if text.strip()) for turn in turns if turn is not None)


def _unique(prompts: list[Prompt], places: list[str]) -> list[Prompt]:
    first: dict[str, str] = {}
    for prompt, place in zip(prompts, places, strict=True):
        if prompt.id in first:
            raise InputError(
                f"{place} has the id {prompt.id!r}, which {first[prompt.id]} already has: ids must differ."
            )
        first[prompt.id] = place
    return prompts
