"""The quick-start notebook runs from top to bottom; a GenerationOutput shows itself in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbeam.trace import Candidate, GenerationOutput, Hypothesis, Round, RowTrace, SearchStep, SearchTree

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


class Words:
    """A tokenizer whose tokens try to be markup."""

    def decode(self, tokens):
        return "".join(f"<b{token}>" for token in tokens)


def output(search=None):
    row = RowTrace(3, 1, (Round(2, 1, 2, 0.1),), ("plain", "draft", "correction"), (0, 1, 1), 0.1, 0.2)
    return GenerationOutput([[Hypothesis([7, 8, 9], -0.5 if search else None, "eos")]], [row], search)


def test_tokens_are_coloured_by_source_and_never_markup():
    html = output().show(Words())._repr_html_()
    assert "50% of 2 drafted accepted" in html and 'title="correction, round 1"' in html
    assert "&lt;b7&gt;" in html and "<b7>" not in html
    assert "7 " in output()._repr_html_(), "without a tokenizer, ids"


def test_the_tree_of_a_beam_search_is_drawn_and_never_markup():
    tree = SearchTree((SearchStep(0, (Candidate(7, 0, -0.1, 0), Candidate(5, 0, -0.4, 1))),
                       SearchStep(1, (Candidate(8, 0, -0.2, None, "eos", -0.5), Candidate(6, 1, -0.9)))), ((1, 0),))
    html = output([tree]).show(Words())._repr_html_()
    assert "<pre" in html and "&lt;b8&gt;" in html and "<b8>" not in html


@pytest.mark.heavy
def test_the_quickstart_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 10 for cell in code) and not any(cell.outputs for cell in code)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    html = ["".join(out.get("data", {}).get("text/html", "") for out in cell.outputs) for cell in code]
    assert "drafted accepted" in html[2] and "<pre" in html[3]
    assert (tmp_path / "quickstart-run" / "report.html").is_file()
