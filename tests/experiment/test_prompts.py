"""Prompts from the config and from files: what is read, and the one sentence for what is not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from specbeam.errors import InputError
from specbeam.experiment.prompts import prompts_from_config, prompts_from_list, read_prompts, select


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_prompt_a_text_messages_and_turns_are_read(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    plain, text, messages, turns = read_prompts(
        write(
            tmp_path / "p.jsonl",
            {"prompt": "Why?", "id": "why", "category": "qa"},
            {"text": "Once upon a time"},
            {"messages": chat},
            {"turns": ["Who?", "And then?"]},
        )
    )
    assert (plain.id, plain.category, plain.conversation(0)) == ("why", "qa", "Why?")
    assert (text.id, text.conversation(0)) == ("2", "Once upon a time")
    assert messages.conversation(0) == chat
    assert turns.answers == 2


def test_a_later_turn_carries_on_with_the_models_own_answers(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {"turns": ["Who?", "And then?"]}))
    assert prompt.conversation(0) == "Who?"
    assert prompt.conversation(1, ["A fox."]) == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": "And then?"},
    ]


def test_spec_bench_references_belong_to_their_turns(tmp_path: Path) -> None:
    two, one = read_prompts(
        write(
            tmp_path / "question.jsonl",
            {"question_id": 81, "category": "math", "turns": ["1+1?", "2+2?"], "reference": ["2", "4"]},
            {"question_id": 82, "category": "qa", "turns": ["Who?"], "reference": ["a fox", "the fox"]},
        )
    )
    assert (two.id, two.references_of(0), two.references_of(1)) == ("81", ["2"], ["4"])
    assert one.references_of(0) == ["a fox", "the fox"]


def test_a_closing_assistant_message_is_the_reference_and_is_not_shown_to_the_model(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {"messages": chat}))
    assert prompt.conversation(0) == chat[:1]
    assert prompt.references_of(0) == ["Hello!"]


def test_blank_lines_a_byte_order_mark_non_ascii_names_and_gzip_are_read(tmp_path: Path) -> None:
    line = b'\xef\xbb\xbf\n{"prompt": "Gr\xc3\xbc\xc3\x9fe"}\r\n\n'
    plain, packed = tmp_path / "mit Leerzeichen äöü.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_bytes(line)
    packed.write_bytes(gzip.compress(line))
    for path in (plain, packed):
        assert [prompt.conversation(0) for prompt in read_prompts(path)] == ["Grüße"]


def test_a_relative_path_starts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "p.jsonl", {"prompt": "Why?"})
    monkeypatch.chdir(tmp_path)
    assert len(read_prompts(Path("p.jsonl"))) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"prompt": "Why?"', "line 2 is not JSON"),
        (b'["Why?"]', "line 2 is list"),
        (b'{"question": "Why?"}', "line 2 has only question"),
        (b"{}", "line 2 has only nothing"),
        (b'{"prompt": "a", "turns": ["b"]}', "line 2 has both prompt and turns"),
        (b'{"prompt": ""}', "line 2: prompt is empty"),
        (b'{"prompt": "  "}', "line 2: prompt is empty"),
        (b'{"prompt": 3}', "line 2: prompt must be a string, not int"),
        (b'{"turns": []}', "line 2: turns must be"),
        (b'{"turns": ["a", ""]}', "line 2: turn 2 is empty"),
        (b'{"messages": []}', "line 2: messages must be"),
        (b'{"messages": [{"role": "user"}]}', "line 2: message 1 must be"),
        (b'{"messages": [{"role": "usr", "content": "a"}]}', "line 2: message 1 has the role 'usr'"),
        (b'{"messages": [{"role": "system", "content": "a"}]}', "line 2: the messages must end with a user's"),
        (b'{"prompt": "a", "id": "first"}', "line 2 has the id 'first', which"),
        (b'{"prompt": "a", "id": 1.5}', "line 2: the id must be"),
        (b'{"prompt": "a", "category": 3}', "line 2: the category must be"),
        (b'{"prompt": "a", "reference": 3}', "line 2: the references must be"),
        (b'{"prompt": "\xff"}', "line 2: byte 13 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, sentence: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "Why?", "id": "first"}\n' + line + b"\n")
    assert f"{path}, {sentence}" in refusal(path)


def test_a_file_without_prompts_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no prompt" in refusal(tmp_path / "empty.jsonl")
    assert "is a folder" in refusal(tmp_path)
    assert "There is no prompt file" in refusal(tmp_path / "none.jsonl")


def test_a_list_in_the_config_wins_over_the_prompt_set() -> None:
    config = {"prompts": ["Why?", [{"role": "user", "content": "Hi"}]], "prompt_set": {"path": "/nowhere"}}
    assert [prompt.id for prompt in prompts_from_config(config)] == ["1", "2"]


@pytest.mark.parametrize("given", [[], "Why?", [""], [3], [[]], [["Why?"]], {"prompt": "Why?"}])
def test_a_prompts_value_that_is_no_list_of_prompts_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="prompts"):
        prompts_from_list(given)


def test_per_category_comes_before_limit(tmp_path: Path) -> None:
    categories = ["a", "a", "b", "b", "c"]
    prompts = read_prompts(write(tmp_path / "p.jsonl", *({"prompt": "x", "category": c} for c in categories)))
    assert [prompt.id for prompt in select(prompts, None, 1)] == ["1", "3", "5"]
    assert [prompt.id for prompt in select(prompts, 2, 1)] == ["1", "3"]
    assert [prompt.id for prompt in select(prompts, 3, None)] == ["1", "2", "3"]
