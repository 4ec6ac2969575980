"""Public prompt sets with the field names of their files."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from refusals import refusal

from specbeam import cli
from specbeam.experiment.compose import compose
from specbeam.experiment.prompt_files import check_template
from specbeam.experiment.prompts import prompts_from_config, read_prompts
from specbeam.metrics.text import final_number


def written(path: Path, *records: dict) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_humaneval(tmp_path: Path) -> None:
    line = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
            "entry_point": "f", "test": "assert f(1) == 1"}
    [prompt] = read_prompts(written(tmp_path / "HumanEval.jsonl.gz", line))
    assert prompt.id == "HumanEval-0" and prompt.turns == ("def f(x):\n",) and prompt.category == "code"
    assert prompt.references_of(0) == ["    return x\n"]


def test_gsm8k(tmp_path: Path) -> None:
    [prompt] = read_prompts(written(tmp_path / "test.jsonl", {"question": "9 × 2?", "answer": "<<9*2=18>>18\n#### 18"}))
    assert prompt.turns == ("9 × 2?",) and prompt.category == "math"
    assert final_number(prompt.references_of(0)[0]) == 18


def test_mt_bench_and_spec_bench_have_turns(tmp_path: Path) -> None:
    line = {"question_id": 101, "category": "reasoning", "turns": ["Who is second?", "And last?"],
            "reference": ["You are second.", "Uncertain."]}
    [prompt] = read_prompts(written(tmp_path / "question.jsonl", line))
    assert prompt.id == "101" and prompt.answers == 2 and prompt.references_of(1) == ["Uncertain."]


@pytest.mark.parametrize("fields", [{"references": ["Ja.", "Doch."]}, {"target": "Ja."}, {"reference": "Ja."}],
                         ids=["references", "target", "reference"])
def test_translation_pairs(tmp_path: Path, fields: dict) -> None:
    path = written(tmp_path / "pairs.jsonl", {"source": "Yes.", **fields})
    [prompt] = read_prompts(path, "Translate English to German: {source}")
    assert prompt.turns == ("Translate English to German: Yes.",) and prompt.category == "translation"
    assert prompt.references_of(0) == (["Ja.", "Doch."] if "references" in fields else ["Ja."])
    assert read_prompts(path)[0].turns == ("Yes.",)


def test_a_source_beside_messages_is_where_they_come_from(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    [prompt] = read_prompts(written(tmp_path / "a.jsonl", {"messages": messages, "source": "tatoeba"}))
    assert prompt.messages[0]["content"] == "Hello" and prompt.category is None


def test_csv_with_quotes_lists_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('\ufeffprompt,reference,category\n"Say ""a, b""\nplease","[""x"", ""y""]",chat\nHow?,,\n', "utf-8")
    first, second = read_prompts(path)
    assert first.turns == ('Say "a, b"\nplease',) and first.references_of(0) == ["x", "y"] and first.category == "chat"
    assert second.turns == ("How?",) and second.references_of(0) == []
    tabs = tmp_path / "pairs.tsv"
    tabs.write_text("source\ttarget\nYes.\tJa.\n", "utf-8")
    assert read_prompts(tabs)[0].references_of(0) == ["Ja."]


def test_what_makes_no_sense_is_said_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\nHello, you\n", "utf-8")
    assert "line 2 has more cells than the header" in refusal(read_prompts, path)
    path.write_text("name\nHello\n", "utf-8")
    assert "line 2 has only name" in refusal(read_prompts, path)
    path.write_bytes(b"prompt\n\xff\n")
    assert "not UTF-8" in refusal(read_prompts, path)
    assert "{source}" in refusal(check_template, "Translate:")


def test_a_long_cell_is_a_prompt_and_what_csv_cannot_read_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt\nHello\n{'owl ' * 50_000}\n", "utf-8")
    before = csv.field_size_limit()
    try:
        assert len(read_prompts(path)[1].turns[0]) == 200_000
        csv.field_size_limit(1000)
        monkeypatch.setattr(csv, "field_size_limit", lambda *_: 0)
        assert f"{path}, line 3 cannot be read as CSV (field larger" in refusal(read_prompts, path)
    finally:
        monkeypatch.undo()
        csv.field_size_limit(before)


@pytest.mark.parametrize("name", ["spec_bench", "mt_bench", "humaneval", "gsm8k", "translation"])
def test_a_set_that_is_not_on_disk_says_where_to_get_it(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", f"prompt_set={name}"]) == 2
    error = capsys.readouterr().err
    assert "get it from" in error and "prompt_set.path=" in error and error.count("\n") == 1


def test_metrics_without_references_are_refused_by_the_command(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, said in ((["metrics=[bleu]"], "has a reference"), (["metrics=[blue]"], "did you mean bleu"),
                            (["metrics=7"], "give a list"), (["evaluator=./nowhere"], "No such folder"),
                            (["forecast=7"], "use true or false")):
        assert cli.main(["compare", "prompts=[Hello]", *arguments]) == 2
        out, error = capsys.readouterr()
        assert out == "" and said in error and error.count("\n") == 1


def test_a_preset_takes_its_file_from_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path / "my.jsonl", {"source": "Yes.", "references": ["Oui."]})
    config = compose("config", ["prompt_set=translation", f"prompt_set.path={path}",
                                "prompt_set.template='To French: {source}'"])
    assert [prompt.turns for prompt in prompts_from_config(config)] == [("To French: Yes.",)]
