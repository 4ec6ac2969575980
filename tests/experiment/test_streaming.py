"""Streamed tokens: the same text as without colours, each token in the colour of its source."""

from __future__ import annotations

import io
import re

import torch
from reference import good_draft, letters, model
from rich.console import Console
from tiny import prompts

from specbeam import speculative_generate
from specbeam.experiment.streaming import TokenStream, colour, legend


def terminal() -> Console:
    return Console(width=100, file=io.StringIO(), force_terminal=True, color_system="standard")


def streamed(console: Console):
    stream = TokenStream(letters(), console)
    return speculative_generate(model("llama"), good_draft("llama"), prompts((5,)), draft_length=3, max_new_tokens=30,
                                streamer=stream), stream


def test_to_a_file_the_answer_is_plain_text(capsys):
    out, _ = streamed(Console(file=io.StringIO()))
    assert capsys.readouterr().out == letters().decode(out.tokens[0], skip_special_tokens=True) + "\n"


def test_in_a_terminal_each_source_has_its_colour():
    console = terminal()
    out, stream = streamed(console)
    assert stream.seen == list(out.trace[0].sources) and {"draft", "correction"} <= set(stream.seen)
    text = console.file.getvalue()
    assert "\x1b[94m" in text and "\x1b[33m" in text
    assert re.sub("\x1b\\[[0-9;]*m", "", text) == letters().decode(out.tokens[0], skip_special_tokens=True) + "\n"


def test_a_character_of_several_tokens_is_written_once_it_is_whole():
    class Halves:
        def decode(self, tokens, **_):
            return {0: "", 1: "\ufffd", 2: "é"}[len(tokens)]

    console = terminal()
    stream = TokenStream(Halves(), console)
    stream.put(torch.tensor([[9, 9]]))  # the prompt
    stream.sources(["draft"])
    stream.put(torch.tensor([1]))
    assert console.file.getvalue() == ""
    stream.sources(["correction"])
    stream.put(torch.tensor([2]))
    stream.end()
    assert console.file.getvalue() == "\x1b[33mé\x1b[0m\n"


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    class Evil:
        def decode(self, tokens, **_):
            return "\x1b[2J\u202e"

    console = terminal()
    stream = TokenStream(Evil(), console)
    stream.put(torch.tensor([[1]]))
    stream.put(torch.tensor([1]))
    assert "\x1b[2J" not in console.file.getvalue() and "␛[2J⟨U+202E⟩" in console.file.getvalue()


def test_drafters_without_a_colour_of_their_own_are_told_apart():
    seen = ["plain", "suffix", "token_recycling", "suffix"]
    assert colour("suffix", seen) != colour("token_recycling", seen) != colour("draft", seen)
    assert legend(seen).plain == " · 1 plain, 2 suffix, 1 token_recycling"
    assert legend(["plain", "plain"]).plain == ""
