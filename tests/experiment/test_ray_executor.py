"""Cells on Ray's actors: the rows of a local run, whatever dies on the way. The driver's rules need no Ray to be read:
`run_units` is driven here with actors that do nothing but answer, or die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

import specbeam
from specbeam import cli
from specbeam.drafting.length import write_costs
from specbeam.experiment import records
from specbeam.experiment.compose import compose
from specbeam.experiment.plan import Cell, make_plan
from specbeam.experiment.prompts import Prompt
from specbeam.experiment.ray_executor import Crew, Unit, devices, run_units, units_of

PROMPTS = 'prompts=["Tell me of a fox.","Why is the sky blue?","What is two plus three?"]'


def cells_of(*overrides: str) -> list[Cell]:
    return list(make_plan(compose("config", [PROMPTS, *overrides])).cells())


# ---- what needs no Ray


def test_a_unit_is_one_prompt_batch_with_all_its_methods() -> None:
    cells = cells_of("batch_size=2", "repeats=2", "only=[greedy,speculative]")
    units = units_of(cells)
    assert [len(unit.cells) for unit in units] == [2] * 4  # two batches, two repeats
    for unit in units:
        assert {cell.method.label for cell in unit.cells} == {"greedy", "speculative"}
        assert len({(cell.prompts, cell.repeat) for cell in unit.cells}) == 1
    assert [cell for unit in units for cell in unit.cells] == cells


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert cli.main(["compare", *overrides]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "use one of local, ray" in refused(capsys, "executor=rya")
    assert "ray.actors is 0" in refused(capsys, "ray.actors=0")
    assert "ray.timeout_seconds" in refused(capsys, "ray.timeout_seconds=-1")
    assert "did you mean ray.actors" in refused(capsys, "ray.actor=2")
    monkeypatch.setattr("specbeam.experiment.ray_executor.find_spec", lambda name: None)
    assert "pip install 'specbeam[ray]'" in refused(capsys, "executor=ray")


def test_one_actor_takes_one_device() -> None:
    def config(**settings: Any) -> dict[str, Any]:
        return {"device": settings.pop("device", "auto"), "ray": {"actors": None, "cpus_per_actor": 1, **settings}}

    assert devices({"CPU": 64.0, "GPU": 8.0}, config())[0] == 8
    assert devices({"CPU": 64.0, "GPU": 8.0}, config(actors=3))[1]["num_gpus"] == 1
    assert devices({"CPU": 64.0, "GPU": 8.0}, config(device="cpu", cpus_per_actor=16))[0] == 4
    assert devices({"CPU": 2.0}, config())[0] == 2
    for settings, said in (({"actors": 9}, "has 8 GPUs"), ({"device": "cpu", "actors": 65}, "has 64 times 1"),
                           ({"device": "cpu", "cpus_per_actor": 65}, "has 0")):
        with pytest.raises(cli.InputError, match=said):
            devices({"CPU": 64.0, "GPU": 8.0}, config(**settings))


# ---- the driver's rules, with real actors that load nothing

heavy = pytest.mark.heavy


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'specbeam[ray]'")
    folders = [str(folder) for folder in Path(__file__).parents[:2]]  # where actors find this file and its helpers
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


class Actor:
    """Answers at once; dies on prompts whose name says so."""

    def where(self) -> int:
        return os.getpid()

    def load(self) -> None:
        pass

    def run(self, cells: list[Cell], answers: Any) -> Any:
        name = cells[0].prompts[0].id
        if name == "kills" or (name.startswith("once") and not Path(name.split(" ")[1]).exists()):
            if name != "kills":
                Path(name.split(" ")[1]).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return [([{"method": cell.method.label, "prompt_id": name, "turn": cell.turn, "repeat": cell.repeat,
                   "status": "ok", "text": f"{name} {cell.turn}", "worker": os.getpid(), "read": len(answers)}], [], [])
                for cell in cells]


def run(ray: Any, units: list[Unit], actors: int = 2) -> list[dict[str, Any]]:
    crew = Crew(ray.remote(num_cpus=1, max_restarts=0)(Actor).remote, (), 300.0)
    crew.actors = {slot: crew.start() for slot in range(actors)}
    rows: list[dict[str, Any]] = []
    answers: dict[Any, str] = {}

    def written(outcomes: Any) -> None:
        for new, _, _ in outcomes:
            rows.extend(new)
            answers.update({(row["method"], row["prompt_id"], row["turn"]): row["text"] for row in new
                            if row["status"] == "ok"})

    run_units(crew, units, answers, written)
    for actor in crew.actors.values():
        ray.kill(actor)
    return rows


def units(*names: str, turns: int = 1) -> list[Unit]:
    template = cells_of("only=[greedy,beam]")[:2]
    return units_of([Cell(cell.method, (Prompt(name, "chat", ("Hello.",)),), turn, 0, f"{cell.method.label}/{name}")
                     for turn in range(turns) for name in names for cell in template])


@heavy
@pytest.mark.parametrize("actors", [1, 2, 3])
def test_every_unit_runs_once_and_on_one_actor(ray: Any, actors: int) -> None:
    rows = run(ray, units(*(f"prompt {n}" for n in range(40))), actors)
    assert len(rows) == 80
    for name in {row["prompt_id"] for row in rows}:
        both = [row for row in rows if row["prompt_id"] == name]
        assert [row["method"] for row in both] == ["greedy", "beam"] and both[0]["worker"] == both[1]["worker"]
    assert len({row["worker"] for row in rows}) <= actors


@heavy
def test_a_later_turn_waits_for_the_answers_it_reads(ray: Any) -> None:
    rows = run(ray, units("a", "b", "c", turns=3), 3)
    assert len(rows) == 18
    assert all(row["read"] == 2 * row["turn"] for row in rows)  # of both methods, of its own prompt


@heavy
@pytest.mark.parametrize("actors", [1, 2])
def test_a_unit_whose_actor_died_runs_again_elsewhere(ray: Any, tmp_path: Path, actors: int) -> None:
    once = f"once {tmp_path / f'died{actors}'}"
    rows = run(ray, units("a", once, "b"), actors)
    assert sorted(row["prompt_id"] for row in rows) == sorted(["a", "b", once] * 2)
    again = next(row for row in rows if row["prompt_id"] == once)
    assert again["status"] == "ok" and str(again["worker"]) != Path(once.split(" ")[1]).read_text()


@heavy
@pytest.mark.parametrize("actors", [1, 2])
def test_a_unit_that_kills_two_actors_fails_and_the_others_do_not(ray: Any, actors: int) -> None:
    rows = run(ray, units("a", "kills", "b", "c", "d"), actors)
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(rows) == 10 and {row["prompt_id"] for row in failed} == {"kills"} and len(failed) == 2
    assert "died again elsewhere" in failed[0]["error"] and "\n" not in failed[0]["error"]


# ---- whole runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target, draft = make_checkpoint("gpt2", folder / "target"), make_checkpoint("distilgpt2", folder / "draft")
    return [f"target.path={target}", f"draft.path={draft}", "device=cpu", "wandb.mode=disabled", "max_new_tokens=24",
            'only=[greedy,speculative,drawn]', "methods.drawn={kind: speculative, temperature: 1.0, top_k: 0}",
            "prompts=" + json.dumps([f"Fox {n}" for n in range(8)])]


def command(folder: Path, pair: list[str], *overrides: str) -> list[str]:
    return [sys.executable, "-m", "specbeam", "compare", *pair, *overrides, f"output_dir={folder}"]


def compare(folder: Path, pair: list[str], *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, pair, *overrides), text=True, capture_output=True, timeout=300, env=clean())


def clean() -> dict[str, str]:
    """The environment without what the `ray` fixture's own instance has put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def tokens_of(folder: Path) -> dict[records.RowKey, list[int]]:
    rows = records.read_lines(folder / "rows.jsonl")
    assert len({records.row_key(row) for row in rows}) == len(rows)
    return {records.row_key(row): row["tokens"] for row in rows}


ON_RAY = ("executor=ray", "ray.address=local")


@heavy
def test_the_same_seed_gives_the_same_tokens_whatever_the_number_of_actors(pair: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pair = [*pair, f"methods.frozen={{kind: speculative, temperature: 1.0, top_k: 0, draft_length: auto, costs: "
            f"'{frozen_costs(pair, tmp_path / 'costs.json')}'}}", "only=[greedy,speculative,drawn,frozen]"]  # fmt: skip
    assert compare(tmp_path / "local", pair).returncode == 0
    wanted = tokens_of(tmp_path / "local")
    for actors in (1, 2):
        folder = tmp_path / f"ray{actors}"
        done = compare(folder, pair, *ON_RAY, f"ray.actors={actors}")
        assert done.returncode == 0, done.stderr
        assert tokens_of(folder) == wanted
        rows = records.read_lines(folder / "rows.jsonl")
        for row in rows:  # paired: a prompt's methods ran on one device
            same = [r for r in rows if (r["prompt_id"], r["repeat"]) == (row["prompt_id"], row["repeat"])]
            assert {r["worker"] for r in same} == {row["worker"]}
        assert len({row["worker"] for row in rows}) == actors
        assert len(records.read_json(folder / "environment.json")["workers"]) == actors
        summary = records.read_json(folder / "summary.json")
        assert list(summary["methods"]) == ["greedy", "speculative", "drawn", "frozen"]
        assert summary["methods"]["greedy"]["perplexity"] > 1
        assert all(trace["target_probability"] for trace in records.read_lines(folder / "trace.jsonl"))
        assert (folder / "report.html").exists()


def frozen_costs(pair: list[str], file: Path) -> Path:
    """What draft_length=auto has learned of the pair, in a file."""
    target, draft, tokenizer = specbeam.load_pair(*(setting.partition("=")[2] for setting in pair[:2]), device="cpu")
    batch = specbeam.render_prompt(tokenizer, ["Fox 1"])
    specbeam.speculative_generate(target, draft, batch.input_ids, draft_length="auto", temperature=1.0, top_k=0,
                                  max_new_tokens=40)  # fmt: skip
    write_costs(str(file), target, draft, temperature=1.0)
    return file


@heavy
def test_a_prompt_that_cannot_be_answered_is_the_failed_row_of_a_local_run(pair: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    asked = [*pair[:-1], "prompts=" + json.dumps(["Fox", "owl " * 400])]
    assert compare(tmp_path / "local", asked).returncode == 1
    assert compare(tmp_path / "ray", asked, *ON_RAY, "ray.actors=1").returncode == 1
    there, here = ({records.row_key(row): (row["status"], row["error"], row["tokens"])
                    for row in records.read_lines(tmp_path / name / "rows.jsonl")} for name in ("local", "ray"))
    assert there == here and {status for status, *_ in here.values()} == {"ok", "failed"}


# ---- a cluster that others started

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
print("address", cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Two nodes of one core each that want a token; a line on the process's input kills the second."""
    pytest.importorskip("ray")
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=clean() | TOKEN)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("address "))
        yield line.split()[1], process
    finally:
        process.stdin.close()
        process.wait(60)


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}


@heavy
def test_a_cluster_is_joined_by_its_address_and_token_and_may_lose_a_node(
    cluster: tuple[str, subprocess.Popen[str]], pair: list[str], tmp_path: Path
) -> None:
    address, nodes = cluster
    asked = [*pair[:-1], "prompts=" + json.dumps([f"Fox {n}" for n in range(60)]), "max_new_tokens=100",
             "executor=ray", f"ray.address={address}", "ray.timeout_seconds=20"]  # fmt: skip
    done = compare(tmp_path / "run", asked)
    assert done.returncode == 2 and "No Ray cluster" in done.stderr and not (tmp_path / "run").exists()
    driver = subprocess.Popen(command(tmp_path / "run", asked), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              text=True, env=clean() | TOKEN)  # fmt: skip
    until = time.monotonic() + 120
    while len(records.read_rows(tmp_path / "run" / "rows.jsonl")) < 12:
        assert time.monotonic() < until and driver.poll() is None
        time.sleep(0.02)
    assert nodes.stdin is not None
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    assert driver.wait(240) == 0, driver.stderr and driver.stderr.read()
    rows = records.read_lines(tmp_path / "run" / "rows.jsonl")
    assert len(rows) == 360 and all(row["status"] == "ok" for row in rows)
    assert len({row["worker"] for row in rows}) >= 2  # both nodes worked until one was gone


@heavy
def test_killed_actors_and_a_killed_driver_lose_nothing(pair: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    longer = [*pair[:-1], "prompts=" + json.dumps([f"Fox {n}" for n in range(40)])]
    folder, options = tmp_path / "run", (*ON_RAY, "ray.actors=2", "max_new_tokens=100")
    driver = subprocess.Popen(command(folder, longer, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def rows() -> int:
        return len(records.read_rows(folder / "rows.jsonl"))

    def wait_for(count: int) -> None:
        until = time.monotonic() + 120
        while rows() < count:
            assert time.monotonic() < until and driver.poll() is None
            time.sleep(0.02)

    wait_for(6)
    os.kill(records.read_json(folder / "environment.json")["workers"][0]["pid"], signal.SIGKILL)
    wait_for(30)
    driver.kill()
    driver.wait()
    before = rows()
    assert 0 < before < 240
    done = compare(folder, longer, *options)
    assert done.returncode == 0, done.stderr
    assert f" of {240} cells" in done.stdout
    assert compare(tmp_path / "local", longer, "max_new_tokens=100").returncode == 0
    assert tokens_of(folder) == tokens_of(tmp_path / "local")
    assert all(row["status"] == "ok" for row in records.read_lines(folder / "rows.jsonl"))


@heavy
def test_refusals_that_need_ray(pair: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")

    def sentence(*overrides: str) -> str:
        done = compare(tmp_path / "none", pair, "executor=ray", *overrides)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not (tmp_path / "none").exists()
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith("specbeam: ")]
        assert len(lines) == 1
        return lines[0]

    assert "but the cluster has" in sentence("ray.address=local", "ray.actors=4096")
    with socket.socket() as deaf:  # takes connections and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        assert "within 5 seconds" in sentence(f"ray.address=127.0.0.1:{deaf.getsockname()[1]}", "ray.timeout_seconds=5")
