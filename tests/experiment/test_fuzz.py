"""Any override either makes a plan or is refused in one sentence with exit status 2: never a traceback."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbeam import cli
from specbeam.completion import words
from specbeam.errors import InputError

LOADED = "everything was accepted, and the models would be loaded."
VALUES = st.one_of(
    st.sampled_from(["", "null", "true", "-1", "0", "1e9", "nan", "inf", "[]", "{}", "[1,", "{a", "'", '"', "${seed}",
                     "${x", "1,2", "a b", "\\", "ü", "\x00", "{kind: speculative}", "{kind: [greedy]}", "[greedy]",
                     "???", "{kind: beam, num_beams: -1}", "{kind: greedy, eos_token_id: x}", "{1: 2}", "range(1,3)",
                     "~nobody/x", "/dev/null/x", "[[]]", "[null]", "{a: {b: 1}}", "ray"]),
    st.text(max_size=12), st.integers().map(str), st.floats().map(str))


def overrides(command: str) -> st.SearchStrategy[list[str]]:
    keys = st.sampled_from([word.partition("=")[0] for word in words(command) if not word.startswith("-")])
    sign = st.sampled_from(["", "", "", "+", "++", "~"])
    return st.lists(st.one_of(
        st.builds("{}{}={}".format, sign, keys, VALUES),
        st.builds("methods.{}={}".format, st.sampled_from(["x", "greedy", "x.kind", "a.b.c", ""]), VALUES),
        st.text(max_size=20)), min_size=1, max_size=2)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a sweep makes its folder before its first job


def refuse(*_: Any, **__: Any) -> None:
    raise InputError(LOADED)


def answer(command: str, given: list[str]) -> tuple[int, str]:
    """Exit status and standard error, up to where the models would be loaded."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("specbeam.experiment.loaded.Models.__init__", refuse)
        patch.setattr("specbeam.models.load_model", refuse)
        patch.setattr("specbeam.experiment.ray_executor.crew_of", refuse)
        patch.setattr("specbeam.experiment.launch.launch", refuse)
        return cli.main([command, *given]), err.getvalue()


def holds(command: str, given: list[str]) -> None:
    status, said = answer(command, given)
    lines = said.strip().splitlines()
    assert (status, lines) == (0, []) or (status == 2 and len(lines) == 1), (status, said)
    assert status == 0 or (lines[0].startswith("specbeam: ") and len(lines[0]) < 1500)


quickly = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(quickly, max_examples=25)
@given(st.booleans(), overrides("compare"))
def test_any_override_of_compare(sweep: bool, given: list[str]) -> None:
    holds("compare", ["--multirun"] * sweep + given)


@settings(quickly, max_examples=8)
@given(overrides("generate"))
def test_any_override_of_generate(given: list[str]) -> None:
    holds("generate", ["Hello.", *given])


@settings(quickly, max_examples=8)
@given(overrides("forecast"))
def test_any_override_of_forecast(given: list[str]) -> None:
    holds("forecast", given)


@settings(quickly, max_examples=8)
@given(overrides("audit"))
def test_any_override_of_audit(given: list[str]) -> None:
    holds("audit", given)


@pytest.mark.parametrize("command", ["compare", "forecast", "audit"])
def test_defaults_are_accepted(command: str) -> None:
    assert answer(command, []) == (2, f"specbeam: {LOADED}\n")


@pytest.mark.parametrize(("command", "given"), [
    ("compare", ["output_dir=~nobody/x"]), ("compare", ["--multirun", "seed=1,2", "output_dir=[1]"]),
    ("compare", ["target.path=~nobody/x"]), ("audit", ["methods.x.kind=[greedy]"]),
    ("generate", ["Hello.", "~target=bundled"]), ("forecast", ["prompt_set.per_category=x"]),
    ("forecast", ["output_dir=/dev/null/x"])])
def test_what_once_ended_in_a_traceback(command: str, given: list[str]) -> None:
    holds(command, given)
