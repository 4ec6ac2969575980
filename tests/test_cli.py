"""The command line: instant help, one sentence and status 2 for bad input, answers that stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import make_checkpoint

from specbeam import __version__, cli
from specbeam.experiment.compose import compose, expand_sweeps


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = make_checkpoint("gpt2", folder / "target")
    draft = make_checkpoint("distilgpt2", folder / "draft")
    return [f"target.path={target}", f"draft.path={draft}", "device=cpu", "max_new_tokens=6"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on standard error of a command that must end with status 2 and leave nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("specbeam: ") and err.count("\n") == 1, (out, err)
    assert "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compare", "--help"], ["generate", "--help"], ["report", "--help"]]
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from specbeam import cli; status = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'wandb', 'hydra', 'sacrebleu', 'numpy', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_lists_every_key_and_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for key in compose("config", []):
        assert f"{key}:" in text
    assert "target=bundled |" in text and "qwen2.5-3b-instruct" in text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"specbeam {__version__}\n"


def test_the_defaults_are_the_designs() -> None:
    config = compose("config", [])
    assert config["methods"] == {
        "greedy": {"kind": "greedy"},
        "speculative": {"kind": "speculative", "draft_length": 4},
        "beam": {"kind": "beam", "num_beams": 4},
        "speculative_beam": {"kind": "speculative_beam", "num_beams": 4, "draft_length": "auto"},
        "transformers_greedy": {"kind": "transformers_greedy"},
        "transformers_assisted": {"kind": "transformers_assisted", "draft_length": 4},
        "transformers_beam": {"kind": "transformers_beam", "num_beams": 4},
    }
    assert config["target"] == {"path": "bundled"} and config["draft"]["path"] == "bundled"
    assert config["prompt_set"] == {"path": "bundled", "limit": 8, "per_category": 1}
    assert config["wandb"] == {"mode": "offline", "project": "specbeam"}
    assert {key: config[key] for key in ("batch_size", "repeats", "max_new_tokens", "seed", "device", "dtype")} == {
        "batch_size": 1, "repeats": 2, "max_new_tokens": 64, "seed": 0, "device": "auto", "dtype": "auto",
    }  # fmt: skip


def test_a_new_label_needs_no_plus() -> None:
    config = compose("config", ["methods.s8={kind: speculative, draft_length: 8}", "methods.greedy.min_p=0.1"])
    assert config["methods"]["s8"] == {"kind": "speculative", "draft_length": 8}
    assert config["methods"]["greedy"] == {"kind": "greedy", "min_p": 0.1}


def test_a_whole_methods_value_is_exactly_those_methods() -> None:
    config = compose("config", ["methods={a: {kind: greedy}}", "methods.b={kind: beam}"])
    assert config["methods"] == {"a": {"kind": "greedy"}, "b": {"kind": "beam"}}
    without = ["~methods.beam", "~methods.speculative_beam", "~methods.transformers_beam"]
    assert list(compose("config", without)["methods"]) == [
        "greedy", "speculative", "transformers_greedy", "transformers_assisted",
    ]  # fmt: skip


def test_a_target_preset_brings_its_draft_and_the_command_line_wins() -> None:
    assert compose("config", ["target=gpt2"])["draft"]["path"] == "distilbert/distilgpt2"
    assert compose("config", ["target=tinyllama-1.1b-chat"])["draft"]["path"] is None
    assert compose("config", ["target=gpt2", "draft.path=mine"])["draft"]["path"] == "mine"


@pytest.mark.parametrize("preset", [path.stem for path in (cli.CONF / "experiment").glob("*.yaml")])
def test_every_experiment_preset_is_a_plan(preset: str) -> None:
    from specbeam.experiment.plan import make_plan

    assert make_plan(compose("config", [f"experiment={preset}", "prompts=[one]"])).methods


@pytest.mark.parametrize("path", ["mit Leerzeichen/äöü (1).jsonl", "a=b,c.jsonl", "~tilde.jsonl"])
def test_paths_with_odd_characters_are_taken_as_they_are(path: str) -> None:
    assert compose("config", [f"prompt_set.path={path}"])["prompt_set"]["path"] == path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compair"], "There is no command 'compair'"),
        (["compare", "--verbose"], "There is no flag '--verbose'"),
        (["compare", "max_new_token=3"], "did you mean max_new_tokens?"),
        (["compare", "+max_new_token=3"], "did you mean max_new_tokens?"),
        (["compare", "prompt_set.limt=3"], "did you mean prompt_set.limit?"),
        (["compare", "draft_length=8"], "did you mean methods.speculative.draft_length?"),
        (["compare", "target=qwen2.5-3b-instrct"], "did you mean target=qwen2.5-3b-instruct?"),
        (["compare", "target=Qwen/Qwen2.5-3B"], "a folder or hub id is given with target.path=Qwen/Qwen2.5-3B."),
        (["compare", "prompt_set=/tmp/questions.jsonl"], "a file is given with prompt_set.path=/tmp/questions.jsonl."),
        (["compare", "prompt_set=nope"], "There is no prompt_set named 'nope'"),
        (["compare", "hello"], "'hello' is no override"),
        (["compare", "=3"], "'=3' is no override"),
        (["compare", "~methods.bam"], "did you mean methods.beam?"),
        (["compare", "methods=null"], "methods is empty"),
        (["compare", "wandb=disabled"], "wandb is 'disabled'"),
        (["compare", "prompts=[one"], "'prompts=[one' cannot be read"),
        (["compare", "seed=1,2"], "use --multirun"),
        (["compare", "methods={}"], "methods is empty"),
        (["compare", "methods=greedy"], "'only=[greedy]' runs some"),
        (["compare", "methods=[greedy,beam]"], "'only=[greedy,beam]' runs some"),
        (["compare", "prompts=[]"], "prompts is an empty list"),
        (["compare", "methods.s={kind: speculativ}"], "did you mean speculative?"),
        (["compare", "methods.speculative.draft_length=0"], "draft_length is 0"),
        (["compare", "methods.speculative.draft_lenght=8"], "did you mean draft_length?"),
        (["compare", "prompt_set.path=nowhere.jsonl"], "There is no prompt file 'nowhere.jsonl'"),
        (["compare", "prompts=[one]", "device=cuda:99"], "cuda:99"),
        (["compare", "prompts=[one]", "dtype=float23"], "float23"),
        (["compare", "prompts=[one]", "draft=none"], "need a draft model"),
        (["compare", "prompts=[one]", "target.path=./nowhere"], "./nowhere"),
        (["compare", "--cfg", "hydra"], "--cfg hydra"),
        (["generate"], "needs a prompt"),
        (["generate", " "], "The prompt is empty"),
        (["generate", "Hi", "method=speculativ"], "did you mean speculative?"),
        (["generate", "Hi", "draft_lenght=3"], "did you mean draft_length?"),
        (["generate", "Hi", "method=greedy", "draft_length=3"], "greedy does not draft"),
        (["generate", "Hi", "max_new_tokens=0"], "max_new_tokens is 0"),
        (["report"], "needs a run folder"),
        (["report", "nowhere"], "There is no folder 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert sentence in refusal(capsys, *arguments)


def test_a_malformed_prompt_file_names_its_line(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    (empty_folder / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": }\n')
    assert "p.jsonl, line 2 is not JSON" in refusal(capsys, "compare", "prompt_set.path=p.jsonl")


def test_bad_input_ends_the_process_with_status_2(empty_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specbeam", "compare", "methods.speculative.draft_length=0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "draft_length is 0" in done.stderr
    assert list(empty_folder.iterdir()) == []


def test_the_composed_config_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--cfg", "job", "seed=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3


def test_a_sweep_is_every_combination() -> None:
    assert expand_sweeps(["batch_size=1,4", "seed=3", "dtype=float32,bfloat16"]) == [
        ["batch_size=1", "seed=3", "dtype=float32"],
        ["batch_size=1", "seed=3", "dtype=bfloat16"],
        ["batch_size=4", "seed=3", "dtype=float32"],
        ["batch_size=4", "seed=3", "dtype=bfloat16"],
    ]


def test_each_job_of_a_sweep_has_its_own_folder(pair: list[str], empty_folder: Path) -> None:
    settings = [*pair, "prompts=[one,two]", "only=[greedy]", "repeats=1", "wandb.mode=disabled"]
    assert cli.main(["compare", "--multirun", *settings, "batch_size=1,2"]) == 0
    (sweep,) = (empty_folder / "outputs" / "compare").iterdir()
    sizes = {path.name: yaml.safe_load((path / "config.yaml").read_text())["batch_size"] for path in sweep.iterdir()}
    assert sizes == {"0": 1, "1": 2}


def test_a_run_leaves_the_working_directory_alone_but_for_its_folder(pair: list[str], empty_folder: Path) -> None:
    assert cli.main(["compare", *pair, "prompts=[one]", "only=[greedy]", "repeats=1"]) == 0
    assert [path.name for path in empty_folder.iterdir()] == ["outputs"]
    (run,) = (empty_folder / "outputs" / "compare").iterdir()
    assert list((run / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("kind", ["greedy", "speculative", "sample", "transformers_greedy", "transformers_assisted"])
def test_an_answer_streams_and_ends_with_one_line_of_figures(
    pair: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "Why is the sky blue?", *pair, f"method={kind}", "repetition_penalty=1.0"]) == 0
    out, err = capsys.readouterr()
    figures = out.rstrip("\n").split("\n")[-1]
    assert figures.startswith(f"{kind} · ") and "new tokens" in figures
    assert ("acceptance rate" in figures) == (kind in ("speculative", "transformers_assisted"))
    assert "Traceback" not in err


def test_beams_do_not_stream_and_it_says_so(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "Why?", *pair, "method=beam", "num_beams=2"]) == 0
    assert "beams do not stream" in capsys.readouterr().out


def test_the_tree_of_a_beam_search_names_its_winner(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "Why?", *pair, "method=beam", "num_beams=3", "trace=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("■" in line and "#1  score" in line and "◀ winner" in line for line in lines) == 1
    assert " ahead of the second" in lines[-1]


@pytest.mark.parametrize("kind", ["speculative_beam", "speculative"])
def test_a_drafter_without_a_model_answers_without_a_draft(
    pair: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, _, *rest = pair
    assert cli.main(["generate", "Why is it?", target, *rest, "draft=none", "drafter=token_recycling",
                     f"method={kind}"]) == 0
    assert f"{kind} (token_recycling) · " in capsys.readouterr().out.splitlines()[-1]


def test_the_answer_is_in_utf_8_whatever_the_terminal_says(pair: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specbeam", "generate", "Grüße", *pair, "method=greedy"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert "·" in done.stdout.decode("utf-8")


def test_what_slips_through_hydra_is_one_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a string or a list" in refusal(capsys, "compare", "draft=null")
