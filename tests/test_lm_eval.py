"""The lm-evaluation-harness gets the same answers and scores from our methods as from its own `--model hf`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import specbeam

pytestmark = pytest.mark.heavy
pytest.importorskip("lm_eval", reason="pip install 'specbeam[lm-eval]'")
TARGET = Path(specbeam.__file__).parent / "bundled" / "target"
DOCS = [
    {"question": "What is 17 + 25?", "answer": "42", "choices": ["42", "7 apples", "blue"], "label": 0},
    {"question": "Translate English to German: Good morning.", "answer": "Guten Morgen.", "choices": [
        "Guten Morgen.", "Bonjour.", "No."], "label": 0},
    {"question": "Name a colour.", "answer": "Red", "choices": ["Twelve", "Red"], "label": 1},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}\\n"
"""
TASKS = {
    "local_generate": COMMON + """
task: local_generate
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
    "local_choice": COMMON + """
task: local_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
""",
    "local_rolling": COMMON.replace("doc_to_text: \"{{{{question}}}}\\n\"", "doc_to_text: \"\"") + """
task: local_rolling
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}} {{{{answer}}}}"
metric_list: [{{metric: word_perplexity}}]
""",
}


def evaluate(folder: Path, name: str, model: str, arguments: str) -> dict[str, list]:
    """What the harness recorded of each document: task → its answers or log-likelihoods."""
    command = ["lm-eval", "run", "--model", model, "--model_args", arguments, "--tasks", *TASKS, "--include_path",
               str(folder), "--device", "cpu", "--batch_size", "2", "--log_samples", "--output_path",
               str(folder / name)]
    code = "import sys; from specbeam.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                                            "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in (folder / name).rglob("samples_*.jsonl"):
        rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[next(task for task in TASKS if task in path.name)] = [row["resps"] for row in rows]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.json"
    data.write_text(json.dumps(DOCS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    found = evaluate(folder, "hf", "hf", f"pretrained={TARGET},dtype=float32")
    assert set(found) == set(TASKS) and any(text.strip() for rows in found["local_generate"] for text in rows[0])
    return found


def numbers(resps: list) -> list[float]:
    return [float(value) if value not in ("True", "False") else float(value == "True")
            for doc in resps for choice in doc for value in (choice[0] if isinstance(choice[0], list) else choice)]


@pytest.mark.parametrize("arguments", ["method=greedy", "method=speculative,draft_length=3"])
def test_a_local_task_has_the_answers_and_scores_of_hf(folder, theirs, arguments):
    ours = evaluate(folder, arguments.replace(",", " "), "specbeam", f"target=bundled,{arguments}")
    assert ours["local_generate"] == theirs["local_generate"]
    for task in ("local_choice", "local_rolling"):
        assert numbers(ours[task]) == pytest.approx(numbers(theirs[task]), abs=1e-3)


def test_arguments_that_make_no_sense_are_refused():
    from refusals import refusal

    from specbeam.lm_eval import SpecbeamLM

    assert "method is 'magic'" in refusal(SpecbeamLM, method="magic")
    assert "draft_lenght is no model argument" in refusal(SpecbeamLM, draft_lenght=3)
    assert "trace is no model argument of method beam" in refusal(SpecbeamLM, method="beam", trace=True)
    assert "needs a draft" in refusal(SpecbeamLM, target="some/folder")
