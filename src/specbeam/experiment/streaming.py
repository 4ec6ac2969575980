"""Tokens as they come, in the terminal: each in the colour of where it came from."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from specbeam.report.escape import visible

if TYPE_CHECKING:
    from rich.console import Console

# As in the report: the draft blue, the target's correction orange, its bonus green; plain tokens as they are.
COLOURS = {"draft": "bright_blue", "prompt_lookup": "bright_magenta", "correction": "yellow", "bonus": "green"}
OTHER_DRAFTERS = ("bright_cyan", "cyan", "magenta", "blue")


def colour(source: str, seen: Sequence[str] = ()) -> str:
    """A rich style; drafters without a colour of their own get one by their order in `seen`."""
    if source == "plain":
        return ""
    others = [one for one in dict.fromkeys(seen) if one not in COLOURS and one != "plain"]
    place = others.index(source) if source in others else 0
    return COLOURS.get(source) or OTHER_DRAFTERS[place % len(OTHER_DRAFTERS)]


def legend(sources: Sequence[str]) -> Text:
    """` · 20 draft, 9 correction`, each in its colour; empty when all tokens are plain."""
    counts = Counter(sources)
    line = Text(" · ")
    for number, (source, count) in enumerate(counts.items()):
        line.append(", " * bool(number)).append(f"{count} {source}", style=colour(source, sources))
    return line if set(counts) - {"plain"} else Text()


class TokenStream:
    """A transformers streamer that is also told the tokens' sources. Writes plain text to what is no terminal."""

    def __init__(self, tokenizer: Any, console: Console):
        self.tokenizer, self.console = tokenizer, console
        self.tokens: list[int] = []
        self.seen: list[str] = []
        self.waiting: list[str] = []  # of tokens that are about to come
        self.written = 0  # characters
        self.prompt = True

    def sources(self, names: Sequence[str]) -> None:
        """Where the tokens of the next `put` come from."""
        self.waiting = list(names)
        self.seen += names

    def put(self, value: Any) -> None:
        if self.prompt:
            self.prompt = False
            return
        ids = value.flatten().tolist()
        for token, source in zip(ids, [*self.waiting, *["plain"] * len(ids)], strict=False):
            self.tokens.append(token)
            text = self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not text.endswith("\ufffd"):  # else a character whose last bytes are still to come
                self._write(text, source)
        self.waiting = []

    def end(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._write(text, "plain")
        self._write(text + "\n", "plain")

    def _write(self, text: str, source: str) -> None:
        new, self.written = text[self.written:], max(self.written, len(text))
        if not self.console.is_terminal:
            sys.stdout.write(new)
            sys.stdout.flush()
        elif new:
            self.console.print(Text(visible(new), style=colour(source, self.seen)), end="", soft_wrap=True)
