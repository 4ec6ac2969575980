"""Earlier answers as token ids, from a .jsonl file (what drafter=suffix looks matches up in)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specbeam.errors import InputError

_FORMAT = 'each line is one {"text": "…"} or {"tokens": […]}'


def read_corpus(path: str | Path, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Token ids of each line: its "tokens" where it has them, else its "text" by `tokenizer` (without special tokens).

    So the rows.jsonl of an earlier run of the same target is a corpus as it is. Raises InputError, naming the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus {path} cannot be read ({getattr(error, 'strerror', error)}): give a .jsonl file; "
                         f"{_FORMAT}.") from None
    texts = [_tokens(line, f"corpus {path}, line {number}", tokenizer, vocabulary)
             for number, line in enumerate(lines, 1) if line.strip()]
    if not any(texts):
        raise InputError(f"corpus {path} is empty: leave corpus out, or give a file with earlier answers.")
    return texts


def _tokens(line: str, where: str, tokenizer: Any, vocabulary: int) -> list[int]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}): {_FORMAT}.") from None
    tokens, text = (record.get("tokens"), record.get("text")) if isinstance(record, dict) else (None, None)
    if isinstance(tokens, list):
        if any(type(token) is not int or not 0 <= token < vocabulary for token in tokens):
            raise InputError(f"{where} has tokens that the target does not know: they are whole numbers from 0 to "
                             f"{vocabulary - 1}, from the target's own tokenizer.")
        return tokens
    if not isinstance(text, str):
        raise InputError(f"{where} has neither text nor tokens: {_FORMAT}.")
    if tokenizer is None:
        raise InputError(f"{where} is text, which needs tokenizer=… to become tokens: give it, or a corpus of tokens.")
    return tokenizer.encode(text, add_special_tokens=False)
