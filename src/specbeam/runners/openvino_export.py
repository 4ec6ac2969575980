"""A loaded PyTorch model as a stateful OpenVINO model over token trees.

The transformers forward is traced once, with its masks and the keys and values of the past as plain inputs; the past
then becomes the model's own state. The CPU plugin is fast where it finds

    ReadValue (with an initialiser) → Gather by `beam_idx` → Concat with the new keys → ScaledDotProductAttention,

which it fuses into one node that appends in place; with the past as inputs and outputs it is no faster than eager.
Inputs: tokens, positions [rows, new] i64, mask (and near, within the window) [rows, 1, new, past + new] f32, added to
the scores, keep [rows, kept] i64, beam_idx [rows] i32. Output: logits [rows, kept, vocabulary] f32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.op import Constant
from openvino.op.util import Variable, VariableInfo
from torch import Tensor
from transformers.cache_utils import Cache

from specbeam.engine.runner import Adapter

_PAST, _NEW, _ROWS = 4, 3, 2  # of the example that is traced: all different from each other


class _Past(Cache):
    """Given keys and values of the past, and what they become: appended to, as a function of tensors."""

    def __init__(self, past: Sequence[Tensor]):
        super().__init__(layers=[])
        self.past = list(past)
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if self.past:
            key_states = torch.cat([self.past[2 * layer_idx], key_states], 2)
            value_states = torch.cat([self.past[2 * layer_idx + 1], value_states], 2)
        self.present[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _PAST  # some ask and do not use it (falcon); the probe is the judge

    def flat(self) -> list[Tensor]:
        return [tensor for layer in sorted(self.present) for tensor in self.present[layer]]


class _Forward(torch.nn.Module):
    """The model's forward as a function of tensors only."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.model, self.adapter = adapter.model, adapter

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, near: Tensor, keep: Tensor, *past: Tensor):
        adapter, cache = self.adapter, _Past(past)
        masks: Any = near if adapter.window is not None else mask
        if adapter.layer_types:
            kinds = {"full_attention": mask, "sliding_attention": near}
            masks = {kind: kinds[kind].to(self.model.dtype) for kind in adapter.layer_types}
        else:
            masks = masks.to(self.model.dtype)
        wanted = {"logits_to_keep": keep} if adapter.keeps == "row" else {}
        logits = self.model(input_ids=tokens, position_ids=positions, attention_mask=masks, past_key_values=cache,
                            use_cache=True, **wanted).logits
        if not wanted:
            logits = logits.gather(1, keep[..., None].expand(-1, -1, logits.shape[-1]))
        return logits.float(), *cache.flat()


def export(adapter: Adapter) -> ov.Model:
    """The stateful model. Raises whatever tracing or conversion says of a model that they cannot follow."""
    traced = _Forward(adapter)
    tokens = torch.ones(_ROWS, _NEW, dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_ROWS, -1).contiguous()
    keep = torch.tensor([[0, 1], [1, 2]])
    _, *present = traced(tokens, positions, *_masks(_NEW), keep)
    past = [tensor.new_zeros(_ROWS, tensor.shape[1], _PAST, tensor.shape[3]) for tensor in present]
    example = (tokens, positions, *_masks(_PAST + _NEW), keep, *past)
    with warnings.catch_warnings(), _same_logger():
        warnings.simplefilter("ignore")  # the tracer's doubts about Python branches: the probe settles them
        model = ov.convert_model(traced, example_input=example)
    _make_stateful(model, [(tensor.shape[1], tensor.shape[3]) for tensor in past])
    _merge(model)
    return model


@contextmanager
def _same_logger() -> Iterator[None]:
    """What cannot be converted leaves everybody's logger at errors only."""
    root = logging.getLogger()
    level, filters, handlers = root.level, [*root.filters], [*root.handlers]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _masks(width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(_ROWS, 1, _NEW, width), torch.zeros(_ROWS, 1, _NEW, width)


def _whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def _make_stateful(model: ov.Model, shapes: Sequence[tuple[int, int]]) -> None:
    """Each pair of past input and present output becomes a variable, empty at first."""
    inputs = list(model.get_parameters())
    results = model.get_results()
    past, given = inputs[-len(shapes):], inputs[: -len(shapes)]
    for parameter, name in zip(given, ("tokens", "positions", "mask", "near", "keep"), strict=True):
        parameter.output(0).get_tensor().set_names({name})
    beam_idx = ops.parameter(ov.PartialShape([-1]), np.int32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    rows = ops.gather(ops.shape_of(given[0], output_type="i64"), _whole(0), np.int64(0))
    kind = past[0].get_element_type()
    zero, sinks = ops.constant(0, dtype=kind), []
    for number, ((heads, width), parameter, result) in enumerate(zip(shapes, past, results[1:], strict=True)):
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, heads, -1, width]), kind
        info.variable_id = f"past.{number}"
        variable = Variable(info)
        model.add_variables([variable])
        empty = ops.broadcast(zero, ops.concat([rows, _whole(heads, 0, width)], 0))
        chosen = ops.gather(ops.read_value(empty, variable), beam_idx, np.int64(0))
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(chosen.output(0))
        sinks.append(ops.assign(result.input(0).get_source_output().get_node(), variable))
    for parameter in past:
        model.remove_parameter(parameter)
    for result in results[1:]:
        model.remove_result(result)
    model.add_parameters([beam_idx])
    model.add_sinks(sinks)
    model.validate_nodes_and_infer_types()


def _merge(model: ov.Model) -> None:
    """Products of the same input as one: q, k and v; gate and up. The same numbers, a third fewer calls, and a gate's
    activation is no longer computed within its product, whose kernel for that is the slower one (docs/log.md)."""
    alike: dict[Any, list[tuple[Any, Any]]] = {}
    for node in model.get_ordered_ops():
        weight = node.input(1).get_source_output().get_node() if node.get_type_name() == "MatMul" else None
        if weight is None or weight.get_type_name() != "Constant" or len(weight.get_output_shape(0)) != 2:
            continue
        given, how = node.input(0).get_source_output(), node.get_attributes()
        if how["transpose_b"] and not how["transpose_a"]:
            alike.setdefault((given.get_node().get_name(), given.get_index()), []).append((node, weight))
    for group in [group for group in alike.values() if len(group) > 1]:
        products: list[Any] = [node for node, _ in group]
        weights = _joined([weight for _, weight in group])
        merged: Any = ops.matmul(products[0].input(0).get_source_output(), weights, False, True)
        sums = [_bias(node) for node in products]
        if all(sums):
            products, biases = [[pair[side] for pair in sums if pair] for side in (0, 1)]
            merged = ops.add(merged, _joined(biases, -1))
        parts = ops.variadic_split(merged, np.int64(-1), _whole(*(
            node.get_output_partial_shape(0)[-1].get_length() for node in products)))
        for number, node in enumerate(products):
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(parts.output(number))
    model.validate_nodes_and_infer_types()


def _bias(product: Any) -> tuple[Any, Any] | None:
    """The sum with a constant that is all that becomes of a product, and the constant."""
    [*targets] = product.output(0).get_target_inputs()
    if len(targets) != 1 or targets[0].get_node().get_type_name() != "Add":
        return None
    for port in targets[0].get_node().inputs():
        bias = port.get_source_output().get_node()
        if bias.get_type_name() == "Constant":
            shape, width = list(bias.get_output_shape(0)), product.get_output_partial_shape(0)[-1].get_length()
            if shape and shape[-1] == np.prod(shape) == width:  # of no dimension, asking for the last one kills
                return targets[0].get_node(), bias
    return None


def _joined(constants: Sequence[Any], axis: int = 0) -> Any:
    """Of any type: `data` shows bfloat16 as float16 of the same bits, and so it goes back."""
    bits = np.concatenate([one.data for one in constants], axis)
    tensor = ov.Tensor(constants[0].get_output_element_type(0), list(bits.shape))
    tensor.data[...] = bits
    return Constant(tensor)


def _factors(model: ov.Model) -> Iterator[tuple[Any, Any, Any]]:
    """Of each product and what it multiplies: the product, where that enters it, and the node that it comes from."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            for port in node.inputs():
                yield node, port, port.get_source_output().get_node()


def _weights(model: ov.Model) -> list[tuple[Any, Any, Any]]:
    """Those that are constant matrices."""
    return [one for one in _factors(model) if one[2].get_type_name() == "Constant"
            and len(one[2].get_output_shape(0)) == 2]


def narrow(model: ov.Model) -> None:
    """fp32 weights of products that are 16-bit numbers, as those of most checkpoints are, in that type: half of the
    memory traffic, and what is computed is the same (products widen them as they read)."""
    known: dict[str, Any] = {}
    for _, port, weight in _weights(model):
        name = weight.get_name()
        if name not in known:
            known[name] = _narrowed(weight)
        if known[name] is not None:
            port.replace_source_output(known[name].output(0))
    model.validate_nodes_and_infer_types()


def _narrowed(weight: Any) -> Any:
    if weight.get_output_element_type(0) != ov.Type.f32:
        return None
    values = torch.from_numpy(weight.get_data().copy())
    for kind, own in ((ov.Type.bf16, torch.bfloat16), (ov.Type.f16, torch.float16)):
        half = values.to(own)
        if torch.equal(half.float(), values):
            tensor = ov.Tensor(kind, list(half.shape))
            tensor.data[...] = half.view(torch.float16).numpy()
            return ops.convert(Constant(tensor), ov.Type.f32)
    return None


def keep_narrow(model: ov.Model) -> bool:
    """Before a model is compiled: the CPU plugin would widen these weights once and for all, but for a mark that files
    do not keep. Returns whether there are any."""
    widened = [node for _, _, node in _factors(model) if node.get_type_name() == "Convert"
               and node.get_output_element_type(0) == ov.Type.f32
               and node.input(0).get_source_output().get_node().get_type_name() == "Constant"]
    for node in widened:
        node.get_rt_info()["decompression_0"] = ""
    return bool(widened)


def compress(model: ov.Model) -> None:
    """Weights of products as int8 with one scale per output (symmetric): a quarter of the memory traffic, and another
    model than the one that was given."""
    for node, port, source in _weights(model):
        weight, kind = source.get_data(dtype=np.float32), source.get_output_element_type(0)
        axis = 1 if node.get_attributes()["transpose_b"] else 0
        scale = np.maximum(np.abs(weight).max(axis, keepdims=True), 1e-12) / 127
        whole = ops.convert(ops.constant(np.round(weight / scale).astype(np.int8)), kind)
        port.replace_source_output(ops.multiply(whole, ops.convert(ops.constant(scale), kind)).output(0))
    model.validate_nodes_and_infer_types()
