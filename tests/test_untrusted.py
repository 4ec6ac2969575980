"""What others wrote is data: no code of theirs runs unless asked for, no pickle is read, none of our files is one."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

import specbeam
from specbeam import InputError, load_model

SOURCES = sorted(Path(specbeam.__file__).parent.rglob("*.py"))


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def folder(tmp_path):
    return Path(make_checkpoint("gpt2", tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_code(folder: Path, mark: Path) -> None:
    """Give the checkpoint a configuration class, a model class and a tokenizer of its own that leave a mark."""
    code = (f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
            "from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n"
            "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
            "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
            "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n")
    (folder / "own.py").write_text(code)
    edit(folder / "config.json", model_type="own", auto_map={
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})


def test_code_in_a_checkpoint_runs_only_when_it_is_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever would be asked
    mark = tmp_path / "ran"
    with_code(folder, mark)
    with pytest.raises(InputError):
        load_model(folder)
    assert not mark.exists()


def test_code_in_a_tokenizer_does_not_run_either(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
                                   "from transformers import PreTrainedTokenizerFast as OwnTokenizer\n")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    try:
        load_model(folder)
    except InputError as error:
        assert "\n" not in str(error)
    assert not mark.exists()


def test_a_generate_of_the_checkpoints_own_does_not_run(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef generate(model, **_):\n    return None\n")
    target, tokenizer = load_model(folder)
    batch = specbeam.render_prompt(tokenizer, ["Hello"])
    specbeam.greedy_generate(target, batch.input_ids, max_new_tokens=2)
    assert not mark.exists()


def test_pickled_weights_are_not_read_even_beside_good_ones(folder, tmp_path):
    mark = tmp_path / "ran"
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    load_model(folder)
    assert not mark.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_model(folder)
    assert not mark.exists()
    pickle.loads((folder / "model.pkl").read_bytes())
    assert mark.exists(), "the payload works: nothing above unpickled it"


def test_our_sources_neither_read_nor_write_pickles():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.split(".")[0] in forbidden]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found += [(path.name, node.attr)] * ((node.value.id, node.attr) in calls)
    assert not found
