"""The page: whole, small, closed to the network, and harmless whatever a model or a user wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import METHODS, write_run

from specbeam.errors import InputError
from specbeam.report.build import write_report
from specbeam.report.escape import visible

HOSTILE = ('</script><script>alert(1)</script><img src=x onerror=alert(2)> "quoted" \'&amp; $title ${data} '
           '\x00\x07\x1b[31m \u202egnihtemos\u202c \u200b\u2028 \ud800 ]]> <!-- &#x3c; \x7f\x85')
VOID = {"meta", "link", "br", "input", "img", "line", "circle", "path"}


class Page(HTMLParser):
    """Collects what matters and checks that every element is closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text += data


def page_of(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text("utf-8")
    return text, Page(text)


def test_the_page_is_well_formed_and_says_the_answer_first(tmp_path):
    _, page = page_of(write_run(tmp_path))
    assert page.open == []
    answer = page.text.index("Use speculative: it decodes")
    assert answer < page.text.index("Figures", answer) < page.text.index("Tokens", answer)
    for label in METHODS:
        assert label in page.text


def test_nothing_is_fetched_from_anywhere(tmp_path):
    text, page = page_of(write_run(tmp_path))
    assert not re.search(r"https?://|//[a-z]|@import|url\(",
                         text.replace("// Draws", "").replace('"http://www.w3.org/2000/svg"', "a namespace"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not attributes.get("src") and (attributes.get("href") or "#").startswith("#")
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in page.tags if tag == "meta")


def test_hostile_text_stays_text(tmp_path):
    _, page = page_of(write_run(tmp_path, hostile=HOSTILE, fail=True))
    assert page.open == []
    assert [tag for tag, _ in page.tags if tag in ("img", "iframe")] == []
    assert len(page.scripts) == 2, "the data and our own script"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "alert(1)" in page.text and "alert(1)" not in page.scripts[1]
    assert "$title ${data}" in page.text, "a template's placeholders in a prompt stay what they are"


def test_what_a_browser_would_hide_or_obey_is_written_out(tmp_path):
    text, page = page_of(write_run(tmp_path, hostile=HOSTILE))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)
    for sign in ("␀", "␛[31m", "⟨U+202E⟩", "⟨U+200B⟩", "⟨U+2028⟩", "⟨U+0085⟩", "␡", "�"):
        assert sign in page.text


def test_the_data_for_the_token_view_is_json_with_the_right_counts(tmp_path):
    _, page = page_of(write_run(tmp_path, hostile=HOSTILE))
    data = json.loads(page.scripts[0])["runs"][0]["tokens"]
    assert data["left_out"] == 0 and len(data["prompts"]) == 4
    for prompt in data["prompts"]:
        assert [answer["method"] for answer in prompt["answers"]] == [
            "greedy", "speculative", "transformers_greedy", "transformers_assisted"]
        for answer in prompt["answers"]:
            assert len(answer["pieces"]) == len(answer["sources"]) == len(answer["rounds"]) == len(answer["target"])
            assert max(answer["rounds"]) == len(answer.get("steps") or answer["milliseconds"])
        speculative = prompt["answers"][1]
        assert set(speculative["sources"]) <= set("pdcb")
        assert sum(step[1] for step in speculative["steps"]) == speculative["sources"].count("d")


@pytest.mark.parametrize(("prompts", "tokens"), [(42, 64), (42, 1200)])
def test_five_hundred_rows_stay_below_a_megabyte_and_what_is_left_out_is_said(tmp_path, prompts, tokens):
    text, page = page_of(write_run(tmp_path, prompts=prompts, repeats=2, tokens=tokens))
    assert len(text.encode()) < 1_000_000
    assert ("left out here" in page.text) == (tokens == 1200)
    views = json.loads(page.scripts[0])["runs"][0]
    assert (views["tokens"]["left_out"] > 0) == (tokens == 1200)
    assert views["beams"]["answers"] and views["beams"]["left_out"] > 0


def test_without_scripts_the_figures_and_outputs_are_there(tmp_path):
    _, page = page_of(write_run(tmp_path))
    assert sum(tag == "svg" for tag, _ in page.tags) >= 3
    assert "same tokens" in page.text and "Why is the sky blue?" in page.text
    assert any(tag == "table" and a.get("class") == "figures" for tag, a in page.tags)


def test_the_first_difference_is_marked_with_the_method_it_differs_from(tmp_path):
    text, page = page_of(write_run(tmp_path))
    assert text.count("<mark") == 1
    assert '<mark title="first difference from greedy">elsewhere</mark>' in text
    assert "greedy: 2 different outputs" in page.text


def test_a_failed_cell_is_shown_with_its_error_and_counted(tmp_path):
    _, page = page_of(write_run(tmp_path, fail=True))
    assert "failed: RuntimeError: out of memory" in page.text


def test_command_config_and_versions_are_on_the_page(tmp_path):
    _, page = page_of(write_run(tmp_path))
    for text in ("specbeam compare batch_size=1", "draft_length: 4", "2.13.0", "load_average", "tok:13a"):
        assert text in page.text


def test_a_run_cut_off_in_the_middle_is_reported_as_far_as_it_goes(tmp_path):
    folder = write_run(tmp_path)
    (folder / "summary.json").unlink()
    (folder / "trace.jsonl").unlink()
    rows = (folder / "rows.jsonl").read_text("utf-8")
    (folder / "rows.jsonl").write_text(rows[:len(rows) * 2 // 3], "utf-8")
    _, page = page_of(folder)
    assert "This run was not finished" in page.text and "Use speculative" in page.text


def test_a_run_of_one_plain_method_has_no_speculation_to_show(tmp_path):
    folder = write_run(tmp_path)
    for file in ("rows.jsonl", "trace.jsonl"):
        lines = (folder / file).read_text("utf-8").splitlines(keepends=True)
        (folder / file).write_text("".join(line for line in lines if json.loads(line)["method"] == "greedy"), "utf-8")
    (folder / "summary.json").unlink()
    _, page = page_of(folder)
    assert "there is no other greedy decoding method" in page.text and "Acceptance" not in page.text


def test_a_folder_without_a_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)


@pytest.mark.parametrize(("text", "shown"), [
    ("ab\u200dc", "ab⟨U+200D⟩c"), ("\u200cab", "⟨U+200C⟩ab"), ("👩\u200d💻", "👩\u200d💻"),
    ("می\u200cخواهم", "می\u200cخواهم"),
    ("a\u3164b", "a⟨U+3164⟩b"), ("a\u2066b\ufeff", "a⟨U+2066⟩b⟨U+FEFF⟩"), ("naïve – “ok”\n\t", "naïve – “ok”\n\t"),
    ("\x9b31m", "⟨U+009B⟩31m"), ("a\U000e0041", "a⟨U+E0041⟩")], ids=ascii)
def test_invisible_characters_are_written_out_unless_a_script_needs_them(text, shown):
    assert visible(text) == shown


def test_a_position_proposed_a_few_times_is_not_drawn():
    from specbeam.report.charts import acceptance, by_position

    often = {"acceptance_by_position": [.7, .5], "proposed_by_position": [30, 30]}
    seldom = {"acceptance_by_position": [.5, 1.0], "proposed_by_position": [12, 2]}
    assert by_position(often) == [.7, .5] and by_position(seldom) == [.5]
    assert by_position({"acceptance_by_position": [.7, .5]}) == [.7, .5], "of older runs the counts are not known"
    assert "proposal 2: 100.0%" not in acceptance({"a": often, "b": seldom})
    assert acceptance({"b": {"acceptance_by_position": [1.0], "proposed_by_position": [3]}}) == ""


def test_a_speed_up_inside_the_noise_is_drawn_as_no_difference():
    from specbeam.report.charts import speedups

    one = {"median": 1.01, "geometric_mean": 1.01, "low": 0.98, "high": 1.04, "geometric_low": 0.98,
           "geometric_high": 1.04}
    drawn = [speedups({"greedy": {"kind": "greedy"}, "fast": {"kind": "speculative", "speedup": {
        "greedy": {**one, "noise": noise}}}}, ["greedy"]) for noise in (1.02, 1.005)]
    assert "no difference (0.98–1.04)" in drawn[0] and "1.01 × (0.98–1.04)" in drawn[1]
