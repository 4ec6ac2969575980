"""`specbeam doctor` never fails, `specbeam models` knows every preset, completion knows every key."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from refusals import refusal

from specbeam import cli, doctor
from specbeam.completion import CONF, completion, words


def test_every_preset_is_listed_with_its_facts(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_cached", lambda repo: repo.startswith("bundled"))
    rows = {row[0]: row for row in doctor.models()}
    assert set(rows) == {path.stem for path in (CONF / "target").glob("*.yaml")}
    assert rows["bundled"][1:] == ("bundled", "24 M", "2,048", "yes", "bundled-draft", "5.9 M", "yes")
    assert rows["gpt2"][1:] == ("openai-community/gpt2", "124 M", "1,024", "no", "distilbert/distilgpt2", "82 M", "no")
    assert not any("?" in row for row in rows.values()), "a preset that doctor.KNOWN does not know"
    assert cli.main(["models"]) == 0 and "zephyr-7b-beta" in capsys.readouterr().out


def test_what_does_not_work_is_a_line_and_no_failure(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("it is\nbroken")

    for name in ("_cpu", "_devices", "_runner", "_hub", "_wandb", "_dtypes"):
        monkeypatch.setattr(doctor, name, broken)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "CPU           no (RuntimeError: it is broken)" in out
    assert [line.split()[0] for line in out[-2:]] == ["hub", "W&B"]
    assert sum("not installed" in line for line in out) < len(doctor.PACKAGES)


def test_runners_and_number_formats_are_tried():
    assert "float32" in doctor._dtypes("cpu") and doctor._runner("eager") == "runner: works"
    assert "is chosen here" in doctor._runner("auto")


def test_a_server_that_cannot_be_reached_is_said_soon():
    assert doctor._reach("http://127.0.0.1:9") == "http://127.0.0.1:9 cannot be reached (ConnectError)"


@pytest.mark.parametrize("line, expected", [
    ("specbeam comp", ["compare", "completion"]),
    ("specbeam compare max", ["max_new_tokens="]),
    ("specbeam compare target=qwen", ["qwen2.5-3b-instruct"]),  # bash completes what stands behind =
    ("specbeam compare prompt_set.l", ["prompt_set.limit="]),
    ("specbeam compare --multirun hydra/launcher=j", ["joblib"]),
    ("specbeam report --f", ["--figures"]),
    ("specbeam completion ", ["bash", "zsh"]),
])
def test_bash_completes(line, expected):
    script = completion("bash", tuple(cli.COMMANDS)) + """
COMP_LINE="$1"; COMP_POINT=${#1}; read -ra COMP_WORDS <<< "$1"
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); [[ "$1" == *" " ]] && COMP_CWORD=$(( COMP_CWORD + 1 ))
_specbeam; printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(["bash", "-c", script, "bash", line], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected, done.stderr


def test_completion_holds_every_key_and_other_shells_are_refused(capsys):
    config = yaml.safe_load((CONF / "config.yaml").read_text("utf-8"))
    del config["defaults"]
    known = words("compare")
    assert all(any(word.startswith((f"{key}=", f"{key}.")) for word in known) for key in config)
    assert cli.main(["completion", "zsh"]) == 0 and "compdef _specbeam specbeam" in capsys.readouterr().out
    assert "bash or zsh" in refusal(completion, "fish", ())
    assert cli.main(["completion"]) == 2 and cli.main(["doctor", "x"]) == 2
