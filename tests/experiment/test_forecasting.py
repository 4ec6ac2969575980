"""`specbeam forecast` on a tiny pair: table, plot, files; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from checkpoints import make_checkpoint

from specbeam import cli
from specbeam.experiment.choice import choice, command_of
from specbeam.experiment.compose import compose
from specbeam.experiment.forecasting import Line, doubts, recommended, sentence
from specbeam.experiment.plan import make_plan
from specbeam.forecast import Costs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target, draft = make_checkpoint("gpt2", folder / "target"), make_checkpoint("distilgpt2", folder / "draft")
    return [f"target.path={target}", f"draft=[{draft},prompt_lookup]", "prompts=[Say it again again, Why?]",
            "max_new_tokens=12", "draft_lengths=[1,3]", "batch_sizes=[1,2]", "repeats=1", "device=cpu", "runner=eager"]


@pytest.fixture(scope="module")
def forecast(pair: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast") / "one"
    assert cli.main(["forecast", *pair, f"output_dir={folder}"]) == 0
    return folder


def line(speedup: float, draft: str = "d", length: int = 4) -> Line:
    return Line(draft, length, 1, speedup, speedup - .1, speedup + .1, 50.0, 2.0, .5, 10.0, 10.0)


def test_every_draft_length_and_batch_size_is_in_the_table_and_the_files(forecast: Path, capsys) -> None:
    found = json.loads((forecast / "forecast.json").read_text())
    names = {one["draft"] for one in found["lines"]}
    assert len(names) == 2 and "prompt_lookup" in names
    assert {(one["draft_length"], one["batch_size"]) for one in found["lines"]} == {(1, 1), (3, 1), (1, 2), (3, 2)}
    assert all(one["speedup"] > 0 and one["mean_accepted_length"] >= 1 for one in found["lines"])
    assert found["sampled"] is False and set(found["recommendation"]) == {"1", "2"}
    svg = ElementTree.parse(forecast / "forecast.svg").getroot()
    assert len(svg.findall(".//{http://www.w3.org/2000/svg}circle")) == len(found["lines"])


def test_how_well_the_costs_are_known_is_said(forecast: Path) -> None:
    assert [one["known_within"] for one in json.loads((forecast / "forecast.json").read_text())["costs"]] != []
    quiet, busy = ({"others_busy_cores": cores} for cores in (0.1, 1.2))
    assert doubts({("d", 1): Costs({}, {}, 0.031), ("e", 1): Costs({}, {}, 0.01)}, quiet) == [
        "What a round costs in plain steps is known to within 3%, and so are the speed-ups."]
    [unknown, others] = doubts({("d", 1): Costs({}, {}, float("inf"))}, busy)
    assert "repeats=2" in unknown and "1.2 cores" in others


def test_the_traces_are_replayed_on_other_hardware_without_a_model(forecast: Path, tmp_path: Path, monkeypatch,
                                                                   capsys) -> None:
    monkeypatch.setattr("specbeam.models.load_model", None)
    arguments = ["forecast", f"traces={forecast}", "draft_lengths=[1,3]", f"output_dir={tmp_path / 'h100'}"]
    assert cli.main([*arguments, "hardware=h100"]) == 0
    assert "H100" in capsys.readouterr().out
    before, after = (json.loads((folder / "forecast.json").read_text())["lines"] for folder in
                     (forecast, tmp_path / "h100"))
    assert [one["accepted"] for one in before if one["batch_size"] == 1] == [one["accepted"] for one in after]
    assert cli.main([*arguments[:-1], f"output_dir={tmp_path / 'own'}",
                     "hardware={bandwidth: 50, compute: 1, launch: 100}"]) == 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["draft_lengths=[]"], "draft_lengths is []"), (["draft_lengths=[0]"], "whole number of at least 1"),
    (["batch_sizes=4"], "batch_sizes is 4"), (["hardware=b200"], "use one of h100"), (["draft=[]"], "drafts is []"),
    (["draft=[none]"], "'none' is no draft"), (["draft=[./nowhere]"], "No such folder"),
    (["options={top_q: 1}"], "top_q is no option"), (["options=5"], "options is 5"),
    (["traces=nowhere"], "hardware is null"), (["traces=nowhere", "hardware=h100"], "no folder of a forecast"),
    (["temperature=-1"], "temperature is -1"), (["target.path=null"], "target.path is null"),
    (["precision=int3"], "use one of f32, bf16, int8"),
    (["sizes=null"], "sizes is None"), (["sizes=5"], "sizes is 5"),
    (["+sizes.drafts=x"], "no config key 'sizes.drafts'"),
    (["sizes.target=bundled"], "hardware is null"), (["sizes.bytes_per_weight=4"], "hardware is null"),
    (["sizes.bytes_per_weight=0", "hardware=h100"], "sizes.bytes_per_weight is 0"),
    (["sizes.target=./nowhere", "hardware=h100"], "No such folder"),
    (["sizes.draft=7", "hardware=h100"], "sizes.draft is 7"),
    (["draft_lenghts=[1]"], "did you mean draft_lengths"), (["repeats=0"], "repeats is 0")],
    ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_sentence_and_status_2(arguments: list[str], said: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["forecast", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err, err
    assert not list(tmp_path.iterdir())


def replay(forecast: Path, folder: Path, *arguments: str) -> int:
    return cli.main(["forecast", f"traces={forecast}", "hardware=h100", f"output_dir={folder}", *arguments])


def test_a_replay_knows_what_its_traces_were_made_with(forecast: Path, pair: list[str], tmp_path: Path, capsys) -> None:
    draft = pair[1].removeprefix("draft=[").split(",")[0]
    traces = json.loads((forecast / "traces.json").read_text())
    assert traces["longest"] == 3 and traces["paths"] == {draft: draft, "prompt_lookup": None}
    assert replay(forecast, tmp_path / "run", "draft_lengths=[1,3]") == 0
    assert yaml.safe_load((tmp_path / "run" / "batch-1" / "specbeam.yaml").read_text())["max_new_tokens"] == 12
    assert replay(forecast, tmp_path / "other", "draft_lengths=[1]", "max_new_tokens=64") == 2
    assert "max_new_tokens is 64, but the traces were made with 12" in capsys.readouterr().err
    assert replay(forecast, tmp_path / "other", "draft_lengths=[1,4]") == 2
    assert "goes up to 4" in capsys.readouterr().err
    old = tmp_path / "old"
    old.mkdir()
    (old / "traces.json").write_text(json.dumps({name: value for name, value in traces.items()
                                                 if name not in ("longest", "settings", "paths")}))
    assert replay(old, tmp_path / "from-old", "draft_lengths=[1,3]") == 0


def test_other_sizes_are_said_to_be_an_estimate(forecast: Path, tmp_path: Path, capsys) -> None:
    assert replay(forecast, tmp_path / "run", "draft_lengths=[1]", "sizes.target=bundled") == 0
    assert "an estimate for the sizes of bundled" in " ".join(capsys.readouterr().out.split())
    assert "target as large as bundled" in json.loads((tmp_path / "run" / "forecast.json").read_text())["where"]


def test_the_folder_of_a_comparison_is_left_alone(tmp_path: Path, capsys) -> None:
    for name in ("rows.jsonl", "prompts.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        assert cli.main(["forecast", f"output_dir={folder}"]) == 2
        assert "holds a run of specbeam compare" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [name]


def test_the_report_of_a_forecast_says_what_it_is(forecast: Path, capsys) -> None:
    assert cli.main(["report", str(forecast)]) == 2
    assert "holds a forecast" in capsys.readouterr().err


def test_a_draft_of_another_vocabulary_is_refused_before_any_weight_is_read(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("specbeam.models.load_model", None)
    draft = make_checkpoint("gpt2", tmp_path / "draft")
    assert cli.main(["forecast", f"draft=[{draft}]", f"output_dir={tmp_path / 'run'}"]) == 2
    assert "vocabular" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_below_five_per_cent_the_advice_is_not_to_speculate() -> None:
    slow = [line(1.02), line(0.7, length=8)]
    assert recommended(slow, 1) is None
    assert "do not speculate; the best of these, d with draft length 4" in sentence(slow, 1)
    best = line(1.6, length=8)
    assert recommended([line(1.3), best], 1) is best and "use d with draft length 8" in sentence([line(1.3), best], 1)


CONFIG = {"temperature": 0.0, "options": {"repetition_penalty": 1.2}, "max_new_tokens": 32, "ngram": 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_choice_runs_as_a_comparison(temperature: float) -> None:
    config = {**CONFIG, "temperature": temperature, "dtype": "bfloat16", "runner": "auto",
              "draft": {"path": "other", "precision": "int8"}}
    written = choice(config, "bundled", line(1.6, "mine", 5), {"mine": "bundled"}, 4)
    words = command_of(written["specbeam"]).split("'")
    overrides = [*words[0].split()[2:], words[1], *words[2].split()]
    composed = compose("config", overrides)
    assert composed["methods"] == written["specbeam"]["methods"] and composed["batch_size"] == 4
    assert composed["dtype"] == "bfloat16" and "runner" not in written["specbeam"]
    assert composed["draft"] == {"path": "bundled", "precision": "int8"}
    [_, speculative] = make_plan(composed).methods
    assert speculative.options["draft_length"] == 5 and speculative.samples == (temperature > 0)
    assert written["vllm"]["method"] == "draft_model" and written["vllm"]["num_speculative_tokens"] == 5


def test_the_transformers_fragment_is_a_generation_config() -> None:
    from transformers import GenerationConfig

    for draft in ("mine", "prompt_lookup"):
        fragment = choice(CONFIG, "t", line(1.6, draft, 5), {"mine": "m"}, 1)["transformers"]
        config = GenerationConfig(**fragment)
        assert {name: getattr(config, name) for name in fragment} == fragment
    assert choice(CONFIG, "t", line(1.6, "prompt_lookup", 5), {}, 1)["vllm"] == {
        "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def test_without_speculation_only_the_plain_method_is_written() -> None:
    written = choice(CONFIG, "t", None, {}, 1)
    assert written["transformers"] is None and written["vllm"] is None
    assert written["specbeam"]["methods"] == {"greedy": {"kind": "greedy", "repetition_penalty": 1.2}}


def test_the_choice_of_a_run_is_on_disk_where_it_pays(forecast: Path) -> None:
    found = json.loads((forecast / "forecast.json").read_text())["recommendation"]
    for size, one in found.items():
        folder = forecast / f"batch-{size}"
        assert "greedy" in yaml.safe_load((folder / "specbeam.yaml").read_text())["methods"]
        assert (folder / "vllm.json").exists() == (one["choice"] is not None)
