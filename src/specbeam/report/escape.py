"""Text of models and users, made harmless: nothing in it is markup, and nothing in it is invisible."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # emoji and Persian need them; they cannot turn the text around


_UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")


def visible(value: Any) -> str:
    """The text with what a browser would hide, or obey, written out: control characters as ␛, text direction marks,
    zero-width and other format characters as ⟨U+202E⟩, halves of a surrogate pair as �. New lines and tabs stay."""
    return _UNUSUAL.sub(lambda found: _visible(found.group()), str(value))


def escape(value: Any) -> str:
    """`visible`, as HTML text or a quoted attribute."""
    return html.escape(visible(value), quote=True)


def script_json(value: Any) -> str:
    """JSON that cannot end the `<script>` element it stands in. Its strings must have been through `visible`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    category = unicodedata.category(character)
    if category == "Cs":
        return "�"
    if category in ("Cc", "Cf", "Zl", "Zp") and character not in _JOINERS:
        return f"⟨U+{code:04X}⟩"
    return character
