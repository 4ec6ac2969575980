"""The roofline: sizes from configs, seconds by hand."""

from __future__ import annotations

import pytest
from refusals import refusal
from tiny import tiny_model

from specbeam.hardware import PRESETS, REACHED, Hardware, Size, costs_on, forward_seconds, read_hardware, size_of


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_size_is_the_models_own(name):
    model = tiny_model(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    read = sum(weight.numel() for weight in model.parameters()) - (
        0 if tied else model.get_input_embeddings().weight.numel())
    size = size_of(model.config)
    assert size.read == read and size.layers == model.config.num_hidden_layers
    out = model(model.dummy_inputs["input_ids"][:1, :1] * 0 + 5, use_cache=True).past_key_values
    assert size.cached == sum(layer.keys.numel() + layer.values.numel() for layer in out.layers)


def test_one_token_is_bound_by_memory_and_many_by_compute():
    machine, size = Hardware("m", 1e12, 100e12, 0.0), Size(read=1_000_000_000, layers=10, cached=1000)
    one = forward_seconds(machine, size, 1, 1, 0, 2)
    assert one == pytest.approx(2e9 / (REACHED[0] * 1e12)) == pytest.approx(forward_seconds(machine, size, 1, 5, 0, 2))
    many = forward_seconds(machine, size, 64, 64, 0, 2)
    assert many == pytest.approx(2e9 * 64 * 64 / (REACHED[1] * 100e12))
    assert forward_seconds(machine, size, 8, 1, 1e6, 2) > one, "keys and values are read too"
    launched = forward_seconds(Hardware("m", 1e12, 100e12, 1e-5), size, 1, 1, 0, 2)
    assert launched == pytest.approx(one + 1e-4)


def test_a_round_is_its_draft_steps_and_one_target_forward():
    machine, target, draft = PRESETS["h100"], Size(10**10, 40, 10**5), Size(10**9, 10, 10**4)
    costs = costs_on(machine, target, draft, [4], 2, 500)
    step, verify = (forward_seconds(machine, size, 2, new, 500, 2) for size, new in ((draft, 1), (target, 5)))
    assert costs.seconds(2, 4) == pytest.approx(4 * step + verify)
    assert costs_on(machine, target, None, [4], 1, 500).seconds(1, 4) == pytest.approx(
        forward_seconds(machine, target, 1, 5, 500, 2))


def test_hardware_is_a_preset_or_three_numbers():
    assert read_hardware("H100") is PRESETS["h100"]
    own = read_hardware({"bandwidth": 100, "compute": 2, "launch": 20})
    assert (own.bandwidth, own.compute, own.launch) == (1e11, 2e12, pytest.approx(2e-5))
    assert "h100, h200, a100, rtx4090, laptop-cpu" in refusal(read_hardware, "b200")
    assert "all three" in refusal(read_hardware, {"bandwidth": 100})
    assert "above 0" in refusal(read_hardware, {"bandwidth": 0, "compute": 2, "launch": 20})
