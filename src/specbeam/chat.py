"""Prompts as a model reads them: one function for chat models and for plain ones, and one that shows the result.

A chat template is rendered to text and the text is tokenised here, without adding special tokens, since templates
write their own. That is what `apply_chat_template(tokenize=True)` does inside, but it returns a tensor, a list or a
`BatchEncoding` depending on the version of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

_FOLDED = "The chat template takes no system role, so the system prompt was put before the first user message."
_MERGED = "The chat template wants user and assistant to alternate, so consecutive messages of one role were joined."
_PLAIN_SYSTEM = "The model has no chat template, so the system prompt was put before the text."
_PLAIN_TURNS = "The model has no chat template, so the messages were joined by blank lines, without their roles."


@dataclass(frozen=True)
class RenderedBatch:
    """A batch as the model reads it.

    text: the rendered prompts; a BOS that the tokenizer itself adds to a plain prompt is in `input_ids` only
    input_ids: LongTensor [batch, length], padded on the left
    attention_mask: LongTensor [batch, length], 0 on padding
    """

    text: list[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    system_prompt: str | None = None,
    device: str | torch.device | None = None,
) -> RenderedBatch:
    """Render and tokenise a batch of prompts: each a string, or chat messages `{"role": …, "content": …}`.

    With a chat template: a string becomes one user message, the generation prompt is added, and a conversation that
    ends with an assistant message is continued inside that message. Where the template refuses or drops a system
    message, it is folded into the first user message; where it demands alternating roles, consecutive messages of one
    role are joined by a blank line. Without a template: the text as it is, messages joined by blank lines.
    `system_prompt` goes to the prompts that have no system message of their own. What was changed is said in a
    UserWarning, once a call. Raises InputError for input that makes no sense.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts is of type {type(prompts).__name__}: give a list, even of one prompt.")
    if not prompts:
        raise InputError("There are no prompts: the list is empty.")
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise InputError(f"system_prompt is of type {type(system_prompt).__name__}: give a string or null.")
    conversations = [_messages(prompt, f"Prompt {i}") for i, prompt in enumerate(prompts, 1)]
    if system_prompt is not None:
        system = {"role": "system", "content": system_prompt}
        conversations = [chat if chat[0]["role"] == "system" else [system, *chat] for chat in conversations]

    template = _template(tokenizer)
    notes: set[str] = set()
    texts, rows = [], []
    for i, messages in enumerate(conversations, 1):
        if template is None:
            text = _plain_text(messages, notes)
        else:
            text = _chat_text(tokenizer, template, messages, f"Prompt {i}", notes)
        ids = _token_ids(tokenizer, text, plain=template is None)
        if not ids:
            raise InputError(f"Prompt {i} is empty: it has no tokens, so there is nothing to continue.")
        texts.append(text)
        rows.append(ids)
    for note in sorted(notes):
        warnings.warn(note, UserWarning, stacklevel=2)
    return _left_padded(texts, rows, _pad_id(tokenizer), device)


def show_rendered(
    tokenizer: PreTrainedTokenizerBase, batch: RenderedBatch, title: str, console: Console | None = None
) -> None:
    """Print what the model reads: every prompt decoded from its ids, special tokens marked, and its token count."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}, key=len, reverse=True)
    count = len(batch.text)
    for i, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True), 1):
        kept = ids[mask.bool()].tolist()
        console.rule(Text(f"{title} · prompt {i} of {count} · {len(kept)} tokens"), align="left")
        read = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = Text(str(read))  # a Text object: brackets in a prompt are not markup
        text.highlight_words(special, style="bold magenta")
        console.print(text, soft_wrap=True)


def _messages(prompt: object, name: str) -> list[dict[str, Any]]:
    """The prompt as a list of messages, checked."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence):
        raise InputError(f"{name} is of type {type(prompt).__name__}: give a string or a list of chat messages.")
    if not prompt:
        raise InputError(f"{name} is an empty list of messages: give at least one user message.")
    messages = []
    for j, message in enumerate(prompt, 1):
        where = f"Message {j} of {name[0].lower()}{name[1:]}"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} is of type {type(message).__name__}: give {{'role': …, 'content': …}}.")
        if absent := [key for key in ("role", "content") if key not in message]:
            raise InputError(f"{where} has no {' and no '.join(absent)}: give {{'role': …, 'content': …}}.")
        if message["role"] not in ROLES:
            raise InputError(f"{where} has the unknown role {message['role']!r}: use {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            place = where[0].lower() + where[1:]
            raise InputError(f"The content of {place} is of type {kind}: give its text, a string.")
        messages.append(dict(message))
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
        del messages[-1]  # an empty answer to continue is an answer to begin
    if all(message["role"] == "system" for message in messages):
        raise InputError(f"{name} holds only a system message: give at least one user message.")
    return messages


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template for chatting, or None for a plain model; templates may be a dict, or a list, of names."""
    templates = getattr(tokenizer, "chat_template", None)
    if not templates or isinstance(templates, str):
        return templates or None
    named = templates if isinstance(templates, Mapping) else {item["name"]: item["template"] for item in templates}
    if "default" in named:
        return named["default"]
    if len(named) == 1:
        return next(iter(named.values()))
    raise InputError(
        f"The tokenizer has chat templates named {', '.join(named)} and none named default: set "
        "tokenizer.chat_template to the one to use."
    )


def _plain_text(messages: list[dict[str, Any]], notes: set[str]) -> str:
    system = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
    turns = [message["content"] for message in messages if message["role"] != "system"]
    if system:
        notes.add(_PLAIN_SYSTEM)
    if len(turns) > 1:
        notes.add(_PLAIN_TURNS)
    return "\n\n".join([*system, *turns])


def _chat_text(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    name: str,
    notes: set[str],
) -> str:
    """The rendered conversation: as given where the template takes it, else with the least change that it takes."""
    folded = _fold_system(messages)
    fold = {_FOLDED} if any(message["role"] == "system" and message["content"] for message in messages) else set()
    attempts = [(messages, set()), (_merge(messages), {_MERGED}), (folded, fold), (_merge(folded), fold | {_MERGED})]
    refusal: Exception | None = None
    for i, (attempt, changes) in enumerate(attempts):
        if any(attempt == earlier for earlier, _ in attempts[:i]):
            continue  # nothing to change
        try:
            text = _apply(tokenizer, template, attempt)
        except Exception as error:  # jinja2's TemplateError, or whatever the template's own code raises
            refusal = refusal or error
            continue
        if all(_appears(message["content"], text) for message in attempt if message["role"] == "system"):
            notes.update(changes)
            return text
    reason = str(refusal).strip().splitlines() if refusal else ["it leaves the system prompt out"]
    raise InputError(
        f"{name} does not fit the model's chat template: {(reason or ['no reason given'])[0].rstrip('.')}."
    )


def _apply(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> str:
    last = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=not last,
        continue_final_message=last,
    )
    return str(text)


def _appears(content: str, text: str) -> bool:
    """Whether the text holds the content, spaces aside: some templates silently drop a role they do not know."""
    return "".join(content.split()) in "".join(text.split())


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the leading system messages put before the first user message's text."""
    leading = next(i for i, message in enumerate(messages) if message["role"] != "system")
    system = [message["content"] for message in messages[:leading] if message["content"]]
    rest = [dict(message) for message in messages[leading:]]
    if leading and rest[0]["role"] == "user":
        rest[0]["content"] = "\n\n".join([*system, rest[0]["content"]])
        return rest
    return messages if leading else rest


def _merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with neighbours of one role joined by a blank line."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(dict(message))
    return merged


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a tokenizer would raise a TypeError
        raise InputError(f"what the model would read is no text at character {error.start + 1}: a lone surrogate, "
                         "which bytes that are not UTF-8 become; mend the prompt.") from None
    ids = list(tokenizer(text, add_special_tokens=plain, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]  # one written in the text, one added by the tokenizer
    if plain and len(ids) > 1 and ids[-1] == eos and not text.rstrip().endswith(tokenizer.eos_token):
        del ids[-1]  # some tokenizers close every text, and a closed text has no continuation
    return ids


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A legal id to put under the mask: some models look pads up too (GPT-2)."""
    for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if id is not None:
            return id
    return 0


def _left_padded(texts: list[str], rows: list[list[int]], pad: int, device: str | torch.device | None) -> RenderedBatch:
    import torch

    length = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device)
    return RenderedBatch(texts, input_ids, mask)
