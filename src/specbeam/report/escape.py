"""Text of models and users, made harmless: nothing in it is markup, and nothing in it is invisible."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

# Joiners between letters of Latin, Greek, Cyrillic, or at the start; emoji and Persian need them, and keep them.
_NEEDLESS = re.compile("(?:(?<=[\x00-\u058f])|^)[\u200c\u200d]")
_BLANKS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks without a glyph
_UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")


def visible(value: Any) -> str:
    """The text with what a browser would hide, or obey, written out: control characters as ␛, text direction marks,
    zero-width and other format characters as ⟨U+202E⟩, halves of a surrogate pair as �. New lines and tabs stay."""
    text = _NEEDLESS.sub(lambda found: f"⟨U+{ord(found.group()):04X}⟩", str(value))
    return _UNUSUAL.sub(lambda found: _visible(found.group()), text)


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
    if character in _BLANKS or (category in ("Cc", "Cf", "Zl", "Zp") and character not in "\u200c\u200d"):
        return f"⟨U+{code:04X}⟩"
    return character
