"""Speculation that makes no sense: one sentence and status 2, for `compare`, `generate` and `audit` alike, and nothing
is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from vocabularies import characters, llama

from specbeam import cli

BLOCK = "acceptance=block judges chains"
WRONG = {
    "zero children": ("branching: [3,0]", "branching is [3, 0]"),
    "no branching at all": ("branching: []", "branching is []"),
    "more nodes than the context has": ("branching: [9,9,9,9]", "a proposal may have 7380 nodes, but the target has"),
    "a grown tree beyond the context": ("tree_nodes: 5000", "a proposal may have 5000 nodes"),
    "a chain beyond the context": ("draft_length: 5000", "a proposal may have 5000 nodes"),
    "no corpus there": ("drafter: suffix, corpus: nowhere.jsonl", "corpus nowhere.jsonl cannot be read (No such file"),
    "a corpus that is a folder": ("drafter: suffix, corpus: .", "corpus . cannot be read"),
    "a corpus that is no JSON": ("drafter: suffix, corpus: bad.jsonl", "corpus bad.jsonl, line 1 is not JSON"),
    "a corpus of foreign tokens": ("drafter: suffix, corpus: foreign.jsonl", "tokens that the target does not know"),
    "a corpus without answers": ("drafter: suffix, corpus: empty.jsonl", "corpus empty.jsonl is empty"),
    "an exit behind the last layer": ("drafter: early_exit, exit_layer: 40", "exit_layer is 40, but"),
    "an exit before the first": ("drafter: early_exit, exit_layer: 0", "exit_layer is 0"),
    "block for a fixed tree": ("acceptance: block, temperature: 1.0, branching: [2,1]", BLOCK),
    "block for a grown tree": ("acceptance: block, temperature: 1.0, tree_nodes: 6", BLOCK),
    "block for branches": ("acceptance: block, temperature: 1.0, drafter: prompt_lookup, branches: 2", BLOCK),
    "block for recycled trees": ("acceptance: block, temperature: 1.0, drafter: token_recycling", BLOCK),
    "block for greedy": ("acceptance: block", "acceptance=block is a rule of sampling"),
    "typical for greedy": ("acceptance: typical", "acceptance=typical changes what is sampled"),
    "a rule that is none": ("acceptance: greedy", "acceptance is 'greedy'"),
    "costs that are not there": ("draft_length: auto, costs: nowhere.json", "costs file 'nowhere.json' cannot be read"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: make_checkpoint(name, folder / name) for name in ("gpt2", "distilgpt2")}
    for name, tokens in (("one", "ab"), ("other", "xy")):
        llama(2).save_pretrained(folder / name)
        characters(list(tokens), []).save_pretrained(folder / name)
        found[name] = folder / name
    return found


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad", "not json"), ("empty", "\n"), ("foreign", '{"tokens": [999999]}')):
        Path(f"{name}.jsonl").write_text(text)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path.cwd().rglob("*"))
    assert cli.main(list(arguments)) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert err.startswith("specbeam: ") and err.endswith(".") and "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


def models(folders: dict[str, Path], target: str = "gpt2", draft: str = "distilgpt2") -> list[str]:
    return [f"target.path={folders[target]}", f"draft.path={folders[draft]}", "device=cpu"]


@pytest.mark.parametrize("what", WRONG)
def test_a_comparison_ends_with_status_2_and_a_sentence(what, folders, capsys):
    settings, sentence = WRONG[what]
    assert sentence in said(capsys, "compare", *models(folders), "prompts=[Hi]",
                            f"methods={{mine: {{kind: speculative, {settings}}}}}")


@pytest.mark.parametrize("what", [
    "zero children", "more nodes than the context has", "no corpus there", "an exit behind the last layer",
    "block for a fixed tree"])
def test_so_do_one_answer_and_an_audit(what, folders, capsys):
    settings, sentence = WRONG[what]
    options = [one.replace(": ", "=") for one in settings.split(", ")]
    assert sentence in said(capsys, "generate", "Hi", *models(folders), "method=speculative", *options)
    assert sentence in said(capsys, "audit", *models(folders), "prompts=[Hi]", "dtypes=[float32]",
                            f"methods={{mine: {{kind: speculative, {settings}}}}}")


@pytest.mark.parametrize("what", [what for what in WRONG if "corpus" in what])
def test_a_corpus_for_beams_is_read_as_early(what, folders, capsys):
    settings, sentence = WRONG[what]
    options = [one.replace(": ", "=") for one in settings.split(", ")]
    assert sentence in said(capsys, "compare", *models(folders), "prompts=[Hi]",
                            f"methods={{mine: {{kind: speculative_beam, {settings}}}}}")
    assert sentence in said(capsys, "generate", "Hi", *models(folders), "method=speculative_beam", *options)


@pytest.mark.parametrize("command", ["compare", "audit"])
@pytest.mark.parametrize("across", ["vocabulary: tli", "vocabulary: auto, branching: [2,1]",
                                    "vocabulary: auto, tree_nodes: 4"])
def test_two_vocabularies_without_a_common_token_have_no_intersection(across, command, folders, capsys):
    assert "the target's and the draft's have none: use vocabulary=slem" in said(
        capsys, command, *models(folders, "one", "other"), "prompts=[ab]",
        f"methods={{mine: {{kind: speculative, {across}}}}}")


def test_trees_of_recycled_tokens_in_place_of_a_draft_do_not_fit_block_verification(folders, capsys):
    assert BLOCK in said(
        capsys, "compare", f"target.path={folders['gpt2']}", "draft=none", "device=cpu", "prompts=[Hi]",
        "methods={mine: {kind: speculative, drafter: combined, acceptance: block, temperature: 1.0}}")
