"""Sweeps through Hydra's launcher plugins: several jobs at once, each with a run folder and a log of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_checkpoint

from specbeam import cli
from specbeam.experiment import records
from specbeam.experiment.launch import run_job


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert cli.main(["compare", *overrides]) == 2
    return capsys.readouterr().err.strip()


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "add --multirun" in refused(capsys, "hydra/launcher=joblib", "seed=1,2")
    assert "is no setting of specbeam" in refused(capsys, "--multirun", "hydra.job.chdir=true", "seed=1,2")
    assert "not named" in refused(capsys, "--multirun", "hydra.launcher.n_jobs=2", "seed=1,2")
    folder = f"output_dir={tmp_path / 'sweep'}"
    assert "There is no launcher 'rocket'" in refused(capsys, "--multirun", "hydra/launcher=rocket", "seed=1,2", folder)


def test_what_breaks_a_job_is_in_its_own_log_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("specbeam.experiment.run.compare", broken)
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: SimpleNamespace(job=SimpleNamespace(num=1)))
    assert run_job([{"output_dir": str(tmp_path / name)} for name in "01"], [], None) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1.log"]
    log = (tmp_path / "1.log").read_text()
    assert "Traceback" in log and log.endswith("RuntimeError: no such luck\n")


@pytest.mark.heavy
@pytest.mark.parametrize(("launcher", "module"), [
    ("joblib", "hydra_plugins.hydra_joblib_launcher"), ("submitit_local", "hydra_plugins.hydra_submitit_launcher"),
    ("ray", "hydra_plugins.hydra_ray_launcher")])  # fmt: skip
def test_jobs_run_elsewhere_and_their_runs_are_joined(launcher: str, module: str, tmp_path: Path) -> None:
    if find_spec("hydra_plugins") is None or find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'specbeam[sweep]'")
    target = make_checkpoint("gpt2", tmp_path / "target")
    sweep = tmp_path / "sweep"
    done = subprocess.run(
        [sys.executable, "-m", "specbeam", "compare", "--multirun", f"hydra/launcher={launcher}", "seed=1,2",
         f"target.path={target}", "only=[greedy]", "repeats=1", "runner=eager", "wandb.mode=disabled",
         "max_new_tokens=4", 'prompts=["Fox","Owl"]', f"output_dir={sweep}"],
        text=True, capture_output=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for job in (0, 1):
        assert len(records.read_lines(sweep / str(job) / "rows.jsonl")) == 2
        assert records.read_yaml(sweep / str(job) / "config.yaml")["seed"] == job + 1
        assert "tokens" in (sweep / f"{job}.log").read_text()
    report = tmp_path / "all.html"
    assert cli.main(["report", str(sweep / "0"), str(sweep / "1"), "--output", str(report)]) == 0
    assert report.exists()


@pytest.mark.heavy
def test_a_failed_job_says_why_in_its_own_log_and_the_others_go_on(tmp_path: Path) -> None:
    if find_spec("hydra_plugins") is None or find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("hydra-joblib-launcher is not installed: pip install 'specbeam[sweep]'")
    good, bad = make_checkpoint("gpt2", tmp_path / "good"), make_checkpoint("gpt2", tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(b"no weights")
    sweep = tmp_path / "sweep"
    done = subprocess.run(
        [sys.executable, "-m", "specbeam", "compare", "--multirun", "hydra/launcher=joblib",
         f"target.path={bad},{good}", "only=[greedy]", "repeats=1", "runner=eager", "wandb.mode=disabled",
         "max_new_tokens=4", 'prompts=["Fox"]', f"output_dir={sweep}"],
        text=True, capture_output=True, timeout=400)  # fmt: skip
    assert done.returncode == 2
    assert (sweep / "0.log").read_text().startswith(f"specbeam: '{bad}' is damaged")
    assert (sweep / "1" / "summary.json").exists()
