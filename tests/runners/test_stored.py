"""Weights that wait in shared memory, on a CPU (test_cuda.py) and compiled: on a card test_matvec.py runs them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cuda import code, emulated
from test_small import multiplied

from specbeam.runners import cuda, fuse, small


@pytest.fixture
def stored(monkeypatch):
    """`multiplied` by stored.cu, as for a card of so many multiprocessors."""
    def by(folder, columns, rows, gated, plus=False, biased=True, programs=5, late=None, fault=None):
        layout = small.layout(rows, columns, gated, programs)
        if late is not None:
            layout["LATE"] = late

        def its(folder, name, fault, **given):
            shared = {key: value for key, value in given.items() if key not in ("WARPS", "PARTS", "ROWS", "WEIGHTS")}
            library = emulated(folder, "stored", fault, **shared, **layout)
            threads = 32 * (layout["ACROSS"] * layout["BANDS"] + 1)
            return SimpleNamespace(run=lambda given, *_: library.run(given, programs, threads))

        monkeypatch.setattr("test_small.emulated", its)
        return multiplied(folder, columns, [rows, rows] if gated else [rows], gated, plus, "silu" if gated else "",
                          not gated, biased, 16, 1, fault)
    return by


@pytest.mark.parametrize(("columns", "rows", "gated", "plus", "late"), [
    (896, 150, True, False, None), (896, 100, True, True, 3), (1024, 90, True, False, 0), (96, 40, True, False, None),
    (4864, 33, False, False, None), (2560, 35, False, False, 2), (32, 40, False, False, None)])
def test_one_row_times_stored_weights(columns, rows, gated, plus, late, stored, tmp_path):
    found, wanted = stored(tmp_path, columns, rows, gated, plus, late=late)
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("fault", [
    ("(long long)(row + its)", "(long long)row"), ("a.weights[piece / COPIES]", "a.weights[0]"),
    ("(two && odd)", "0"), ("swapped ? d[1][0]", "swapped ? d[0][0]"), ("finished(sum, up,", "finished(up, sum,")],
    ids=["pieces alike", "gate twice", "same step", "other sum", "gate and up"])
def test_a_fault_in_it_shows(fault, stored, tmp_path):
    found, wanted = stored(tmp_path, 896, 150, True, fault=fault)
    assert not (found - wanted).norm() < 2e-2 * wanted.norm()


def test_a_layout_has_a_program_for_each_multiprocessor():
    for columns, rows, gated in ((896, 4864, True), (4864, 896, False)):
        layout = small.layout(rows, columns, gated, 132)
        share = layout["ROWS"] // 2 if gated else layout["ROWS"]
        assert 132 * share >= rows > 132 * (share - 1)
        code("stored", COLUMNS=columns, NORM=int(gated), PLUS=0, ACT=int(gated), ADDED=int(not gated), **layout)


@pytest.mark.parametrize(("hidden", "inner", "fits"), [
    (896, 4864, True), (960, 2560, False), (1024, 3072, False), (1536, 8960, False), (2048, 5632, False)])
def test_only_layers_that_neither_registers_nor_several_turns_are_for(hidden, inner, fits, monkeypatch):
    monkeypatch.setattr(small, "_processors", lambda device: 132)
    monkeypatch.setitem(sys.modules, "specbeam.runners.matvec", SimpleNamespace(early=lambda device: True))
    gate: Any = SimpleNamespace(shape=(inner, hidden), is_cuda=True, dtype=torch.bfloat16, device="cuda")
    assert small.stores(gate) is fits
    gate.dtype = torch.float16
    assert not small.stores(gate)
    assert not small.stores(torch.empty(inner, hidden, dtype=torch.bfloat16))  # on a CPU


def test_what_a_layer_is_told_when_its_weights_are_stored(monkeypatch):
    monkeypatch.setattr(small, "stores", lambda gate: tuple(gate.shape) == (64, 32))
    assert fuse.STORED not in (0, 1)
    graph = torch.fx.Graph()
    x, gate, up, down = (graph.placeholder(name) for name in ("x", "gate", "up", "down"))
    for node, shape in ((x, (1, 1, 32)), (gate, (64, 32)), (up, (64, 32)), (down, (32, 64))):
        node.meta["example_value"] = torch.empty(shape)
    hidden = graph.call_function(fuse.ops.product.default, (
        x, None, None, None, 0.0, False, [gate, up], [None, None], "silu", None, 0))
    graph.output(graph.call_function(fuse.ops.product.default, (
        hidden, None, None, None, 0.0, False, [down], [None], "", x, 0)))
    fuse.fuse(graph)
    assert [node.args[-1] for node in graph.nodes if node.op == "call_function"] == [fuse.STORED] * 2


def test_a_forwards_first_kernel_waits_for_all_before_it(monkeypatch):
    seen = []
    driver: Any = SimpleNamespace(
        CUlaunchConfig=SimpleNamespace, CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace()),
        CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6),
        cuLaunchKernelEx=lambda config, *_: seen.append(
            config.attrs[0].value.programmaticStreamSerializationAllowed) or (0,))
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(driver=driver)))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    for begins in (True, False, False, True):
        if begins:
            cuda.begin()
        cuda.launch(None, torch.device("cpu"), 1, 32, cuda.Product())
    assert seen == [0, 1, 1, 0]
