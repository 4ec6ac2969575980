"""The comparison on a target and a draft that do not share a vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from specbeam import cli, load_pair
from specbeam.errors import InputError
from specbeam.experiment import records
from specbeam.models import load_pair_with_tokenizers

METHODS = ("methods.tli={kind: speculative, vocabulary: tli}", "methods.slem={kind: speculative, vocabulary: slem}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A byte-level target (learned positions) and a SentencePiece-like draft."""
    folder = tmp_path_factory.mktemp("pair")
    return make_checkpoint("gpt2", folder / "target"), make_checkpoint("tinyllama-1.1b-chat", folder / "draft")


def compare(folders: tuple[Path, Path], output: Path, *overrides: str) -> int:
    return cli.main([
        "compare", f"target.path={folders[0]}", f"draft.path={folders[1]}", "device=cpu", "max_new_tokens=6",
        "wandb.mode=disabled", "repeats=1", "prompts=['Why is the sky blue?','A fox']", f"output_dir={output}",
        *METHODS, *overrides,
    ])  # fmt: skip


def test_methods_that_name_a_way_across_run_and_give_the_targets_tokens(folders, tmp_path):
    assert compare(folders, tmp_path / "run", "only=[greedy,tli,slem]", "methods.greedy.min_new_tokens=6",
                   "methods.tli.min_new_tokens=6", "methods.slem.min_new_tokens=6") == 0
    summary = records.read_json(tmp_path / "run" / "summary.json")
    for label in ("tli", "slem"):
        same = summary["methods"][label]["identical_to"]["greedy"]
        assert same["same"] == same["of"] == 2
    rows = records.read_lines(tmp_path / "run" / "rows.jsonl")
    assert all(row["drafted"] > 0 for row in rows if row["method"] == "tli")
    traces = records.read_lines(tmp_path / "run" / "trace.jsonl")
    assert all(trace["target_probability"] and not trace.get("draft_probability") for trace in traces)


def test_a_method_that_needs_the_same_vocabulary_refuses_the_pair_for_all(folders, tmp_path, capsys):
    assert compare(folders, tmp_path / "run", "only=[greedy,tli,speculative]") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "do not share a vocabulary" in said and "vocabulary: auto" in said
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_none_is_refused_before_anything_is_loaded(folders, tmp_path, capsys):
    assert compare(folders, tmp_path / "run", "methods.slem.vocabulary=sleem") == 2
    assert "one of same, tli, slem, auto" in " ".join(capsys.readouterr().err.split())


def test_one_answer_can_be_generated_across_vocabularies(folders, capsys):
    done = cli.main(["generate", "A fox", f"target.path={folders[0]}", f"draft.path={folders[1]}", "device=cpu",
                     "method=speculative", "vocabulary=slem", "max_new_tokens=6", "min_new_tokens=6"])  # fmt: skip
    assert done == 0 and "6 new tokens" in capsys.readouterr().out


def test_a_pair_is_loaded_with_both_tokenizers_only_when_asked(folders):
    _, _, mine, its = load_pair_with_tokenizers(*folders, device="cpu")
    assert mine.get_vocab() != its.get_vocab()
    with pytest.raises(InputError, match="do not share a vocabulary"):
        load_pair(*folders, device="cpu")
