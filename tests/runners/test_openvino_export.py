"""What is changed in a converted model leaves its numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import prompts, tiny_model

import specbeam
from specbeam.engine.support import adapt
from specbeam.runners.choose import use_runner

pytest.importorskip("openvino", reason="openvino is not installed")
import openvino as ov
from openvino import opset13 as ops

from specbeam.runners import openvino_cache
from specbeam.runners.openvino_export import _merge, export, keep_narrow, narrow


def rounded(kind, seed: int = 3):
    """A model in fp32 whose matrices were once numbers of this type."""
    target = tiny_model("llama", seed=seed)
    for weight in target.parameters():
        weight.data = weight.data.to(kind).float()
    return target


def of_products(model) -> list[str]:
    """The types that products read their matrices in."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            source = node.input(1).get_source_output().get_node()
            source = source.input(0).get_source_output().get_node() if source.get_type_name() == "Convert" else source
            if source.get_type_name() == "Constant" and len(source.get_output_shape(0)) == 2:
                found.append(source.get_output_element_type(0).get_type_name())
    return found


def logits(model, target) -> np.ndarray:
    keep_narrow(model)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})
    ids = torch.stack(prompts((9, 9))).numpy()
    mask = np.where(np.tri(9, dtype=bool), 0.0, -1e38).astype(np.float32)[None, None].repeat(2, 0)
    given = {"tokens": ids, "positions": np.arange(9)[None].repeat(2, 0), "mask": mask,
             "keep": np.arange(9)[None].repeat(2, 0), "beam_idx": np.arange(2, dtype=np.int32)}
    names = {port.get_any_name() for port in compiled.inputs}
    return compiled.create_infer_request().infer({name: one for name, one in given.items() if name in names})[0].copy()


@pytest.mark.parametrize("kind, kept", [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")])
@torch.no_grad()
def test_matrices_that_are_16_bit_numbers_stay_so_and_give_the_same_logits(kind, kept):
    target = rounded(kind)
    model = export(adapt(target))
    wanted = logits(model, target)
    narrow(model)
    assert set(of_products(model)) == {kept}
    assert np.abs(logits(model, target) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(wanted - target(torch.stack(prompts((9, 9)))).logits.numpy()).max() < 1e-4 * np.abs(wanted).max()


@torch.no_grad()
def test_one_number_that_is_none_leaves_its_matrix_wide():
    target = rounded(torch.bfloat16)
    target.model.layers[0].mlp.down_proj.weight.data[3, 5] = 1 + 2**-20
    model = export(adapt(target))
    narrow(model)
    assert sorted(of_products(model)).count("f32") == 1


@torch.no_grad()
def test_a_model_from_the_cache_is_as_narrow_as_when_it_was_kept(monkeypatch, tmp_path):
    """The plugin widens what is not marked, and files do not keep the mark."""
    monkeypatch.setenv("SPECBEAM_CACHE", str(tmp_path))
    target, ids = rounded(torch.bfloat16), prompts((9, 14))
    wanted = specbeam.greedy_generate(target, ids, max_new_tokens=12).tokens
    for _ in range(2):
        assert use_runner(rounded(torch.bfloat16), "openvino") == "openvino"
        model = openvino_cache.load(adapt(target))
        assert set(of_products(model)) == {"bf16"} and keep_narrow(model)
        runtime = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
        read = [node.input(1).get_source_output().get_element_type().get_type_name() for node in
                runtime.get_ordered_ops() if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
        assert read and set(read) <= {"bf16", "f32"}
    assert use_runner(target, "openvino") == "openvino"
    assert specbeam.greedy_generate(target, ids, max_new_tokens=12).tokens == wanted


def test_a_product_whose_scalar_is_added_is_left_with_its_sum():
    """Asking for the last dimension of a number without any ends the process."""
    given = ops.parameter([1, 1, 4], np.float32)
    wide, narrow = (ops.matmul(given, ops.constant(np.ones((rows, 4), np.float32)), False, True) for rows in (3, 2))
    model = ov.Model([ops.add(wide, ops.constant(np.float32(1))), ops.add(narrow, ops.constant(
        np.ones(1, np.float32)))], [given])
    _merge(model)
    assert [node.get_type_name() for node in model.get_ordered_ops()].count("MatMul") == 1
    found = ov.Core().compile_model(model, "CPU")(np.ones((1, 1, 4), np.float32))
    assert [part.tolist() for part in found.values()] == [[[[5.0] * 3]], [[[5.0] * 2]]]
