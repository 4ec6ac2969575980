"""A model on several devices gives the tokens of the whole one. Here: CPU and disk, and two CPU processes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from refusals import refusal
from tiny import prompts

import specbeam
from specbeam import cli

LENGTHS = (5, 9, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tinyllama-1.1b-chat", tmp_path_factory.mktemp("placed") / "target")


needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None,
                                      reason="accelerate is not installed: pip install 'specbeam[parallel]'")
SPREAD = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
          "model.norm": "disk", "lm_head": "disk"}  # fmt: skip


@needs_accelerate
def test_layers_on_cpu_and_disk(checkpoint: Path, tmp_path: Path) -> None:
    whole, _ = specbeam.load_model(checkpoint, device="cpu", runner="eager")
    spread, draft, _ = specbeam.load_pair(checkpoint, checkpoint, device="cpu", device_map=SPREAD,
                                          offload_folder=tmp_path / "offload")  # fmt: skip
    assert {weight.device.type for weight in spread.parameters()} == {"cpu", "meta"}
    assert {weight.device.type for weight in draft.parameters()} == {"cpu"}  # apart
    rows = prompts(LENGTHS)
    for run, pair, options in ((specbeam.greedy_generate, (), {}), (specbeam.beam_generate, (), {"num_beams": 3}),
                               (specbeam.speculative_generate, (draft,), {"draft_length": 3})):
        wanted = run(whole, *pair, rows, max_new_tokens=12, **options).tokens
        assert run(spread, *pair, rows, max_new_tokens=12, **options).tokens == wanted


@needs_accelerate
def test_compare_with_a_device_map(checkpoint: Path, tmp_path: Path) -> None:
    assert cli.main(["compare", f"target.path={checkpoint}", "device_map=auto", "device=cpu", "only=[greedy]",
                     "repeats=1", "max_new_tokens=4", 'prompts=["Fox"]', "wandb.mode=disabled",
                     f"output_dir={tmp_path / 'run'}"]) == 0  # fmt: skip


@needs_accelerate
def test_an_embedding_on_disk_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    everything = dict.fromkeys(SPREAD, "disk")
    assert "input embedding" in refusal(specbeam.load_model, checkpoint, device="cpu", device_map=everything,
                                        offload_folder=tmp_path)  # fmt: skip


def test_bad_input_is_one_sentence(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = specbeam.load_model
    assert "both given" in refusal(load, checkpoint, device_map="auto", tp_plan="auto")
    assert "device_map is 'everywhere'" in refusal(load, checkpoint, device_map="everywhere")
    assert "torchrun" in refusal(load, checkpoint, tp_plan="auto")
    assert "runs eagerly" in refusal(load, checkpoint, device_map="auto", runner="compile")
    monkeypatch.setattr("specbeam.placement.find_spec", lambda name: None)
    assert "pip install 'specbeam[parallel]'" in refusal(load, checkpoint, device_map="auto")


PARALLEL = """
import itertools, json, random, sys, time
sys.path.insert(0, {tests!r})
import specbeam, torch.distributed
from tiny import prompts
target, draft, _ = specbeam.load_pair({path!r}, {path!r}, device="cpu", tp_plan="auto")
split = [any("DTensor" in type(weight).__name__ for weight in model.parameters()) for model in (target, draft)]
rows = prompts({lengths!r})
found = [specbeam.greedy_generate(target, rows, max_new_tokens=12).tokens,
         specbeam.speculative_generate(target, draft, rows, max_new_tokens=12).tokens,
         specbeam.beam_generate(target, rows, max_new_tokens=12, num_beams=3).tokens]
# Each process has a clock of its own, here a wild one: a decision that they do not share is waiting for ever.
chance = random.Random(torch.distributed.get_rank())
clock = itertools.accumulate(chance.uniform(0.001, 0.1) for _ in itertools.count())
time.perf_counter = lambda: next(clock)
found += [specbeam.speculative_generate(target, draft, rows, max_new_tokens=40, draft_length="auto").tokens,
          specbeam.speculative_beam_generate(target, draft, rows, max_new_tokens=24, num_beams=3,
                                             draft_length="auto").tokens]
with open(sys.argv[1] + str(torch.distributed.get_rank()), "w") as file:  # output of two processes mixes
    json.dump([split, found], file)
torch.distributed.destroy_process_group()
"""


@needs_accelerate
@pytest.mark.heavy
def test_tensor_parallelism_over_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL.format(tests=str(Path(__file__).parent), path=str(checkpoint), lengths=LENGTHS))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(script), str(tmp_path / "rank")], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    whole, draft, _ = specbeam.load_pair(checkpoint, checkpoint, device="cpu", runner="eager")
    rows = prompts(LENGTHS)
    wanted = [specbeam.greedy_generate(whole, rows, max_new_tokens=12).tokens,
              specbeam.speculative_generate(whole, draft, rows, max_new_tokens=12).tokens,
              specbeam.beam_generate(whole, rows, max_new_tokens=12, num_beams=3).tokens,
              specbeam.greedy_generate(whole, rows, max_new_tokens=40).tokens,
              specbeam.beam_generate(whole, rows, max_new_tokens=24, num_beams=3).tokens]  # fmt: skip
    assert found == [[[True, False], wanted]] * 2  # the draft is whole
