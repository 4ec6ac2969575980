"""The commands and the code of docs/ run as they are written, offline, on the bundled pair."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import prompts, tiny_model

from specbeam import cli
from specbeam.decoding import METHODS, Method

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("which-draft", "good-enough", "slower", "same-output", "add-a-method")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text("utf-8"), re.S)


COMMANDS = [(page, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]


def test_every_page_has_a_command() -> None:
    assert {page for page, _ in COMMANDS} == set(PAGES)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_its_keys_are_known(page: str, command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "specbeam" and cli.main([*arguments, "--cfg", "job"]) == 0


@pytest.mark.heavy
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_it_runs_as_it_is_written(page: str, command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


def test_the_new_method_of_the_page_is_a_method(monkeypatch) -> None:
    source, line = blocks("add-a-method", "python")
    module = ModuleType("specbeam.decoding.second_best")
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, "second_best", None)
    exec(line, {"METHODS": METHODS, "Method": Method})
    target, [row] = tiny_model("llama"), prompts((5,))
    [tokens] = METHODS["second_best"].load()(target, [row], max_new_tokens=4, eos_token_id=None).tokens
    [best] = METHODS["greedy"].load()(target, [row], max_new_tokens=1).tokens
    assert len(tokens) == 4 and tokens[0] != best[0]
