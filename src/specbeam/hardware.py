"""What a round would cost on a machine one does not have: bandwidth, compute, launches. docs/forecast.md says what is
assumed (a roofline: Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specbeam.errors import InputError
from specbeam.forecast import Costs


@dataclass(frozen=True)
class Hardware:
    """bandwidth: bytes/s and compute: FLOP/s, both as the data sheet says; launch: seconds of host time that a layer of
    one forward costs. Of bandwidth and compute the parts in REACHED are taken."""

    name: str
    bandwidth: float
    compute: float
    launch: float


REACHED = (0.8, 0.6)  # of the data sheet's bandwidth and compute
# Dense bf16 (the CPU: fp32), launches as with CUDA graphs; data sheets of NVIDIA.
PRESETS = {
    "h100": Hardware("H100 SXM 80 GB", 3.35e12, 989e12, 10e-6),
    "h200": Hardware("H200 SXM 141 GB", 4.8e12, 989e12, 10e-6),
    "a100": Hardware("A100 SXM 80 GB", 2.04e12, 312e12, 10e-6),
    "rtx4090": Hardware("RTX 4090 24 GB", 1.01e12, 165e12, 10e-6),
    "laptop-cpu": Hardware("laptop CPU, two channels of DDR5", 70e9, 0.8e12, 50e-6),
}


@dataclass(frozen=True)
class Size:
    """What a forward reads and computes. read: parameters read by every forward (all but the table of input embeddings,
    of which a few rows are); cached: keys and values per token."""

    read: int
    layers: int
    cached: int


def read_hardware(given: Any) -> Hardware:
    """A preset's name, or {bandwidth: GB/s, compute: TFLOP/s, launch: µs per layer}."""
    if isinstance(given, str):
        if given.lower() not in PRESETS:
            raise InputError(f"hardware is {given!r}: use one of {', '.join(PRESETS)}, or numbers as in "
                             "'{bandwidth: 1000, compute: 100, launch: 10}' (GB/s, TFLOP/s, µs per layer).")
        return PRESETS[given.lower()]
    names = ("bandwidth", "compute", "launch")
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise InputError(f"hardware is {given!r}: give a preset ({', '.join(PRESETS)}) or the numbers bandwidth "
                         "(GB/s), compute (TFLOP/s) and launch (µs per layer), all three.")
    for name in names:
        number = isinstance(given[name], int | float) and not isinstance(given[name], bool)
        if not number or given[name] < 0 or (name != "launch" and given[name] == 0):
            raise InputError(f"hardware.{name} is {given[name]!r}: give a number above 0.")
    units = zip(names, ("GB/s", "TFLOP/s", "µs a layer"), strict=True)
    text = ", ".join(f"{given[name]:g} {unit}" for name, unit in units)
    return Hardware(text, given["bandwidth"] * 1e9, given["compute"] * 1e12, given["launch"] * 1e-6)


def size_of(config: Any) -> Size:
    """From a model's config, without its weights. Mixtures of experts count all experts, which is too much."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    tied = (output is not None and output.weight is embedding.weight) or getattr(text, "tie_word_embeddings", False)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Size(parameters - (0 if tied else embedding.weight.numel()), text.num_hidden_layers,
                2 * text.num_hidden_layers * heads * width)


def forward_seconds(hardware: Hardware, size: Size, rows: int, new: int, context: float, weight_bytes: float) -> float:
    """One forward of `new` tokens in each of `rows` rows that have `context` tokens behind them."""
    read = weight_bytes * (size.read + size.cached * rows * context)
    computed = 2.0 * size.read * rows * new
    return (max(read / (REACHED[0] * hardware.bandwidth), computed / (REACHED[1] * hardware.compute))
            + hardware.launch * size.layers)


def costs_on(hardware: Hardware, target: Size, draft: Size | None, lengths: Sequence[int], rows: int, context: float,
             weight_bytes: float = 2.0) -> Costs:
    """Seconds of a round of every number of rows and of 0 … longest proposals; looking a prompt up costs nothing."""
    table: dict[int, dict[int, float]] = {}
    parts: dict[int, dict[int, tuple[float, float]]] = {}
    for count in range(1, rows + 1):
        step = 0.0 if draft is None else forward_seconds(hardware, draft, count, 1, context, weight_bytes)
        parts[count] = {k: (k * step, forward_seconds(hardware, target, count, k + 1, context, weight_bytes))
                        for k in range(max(lengths) + 1)}
        table[count] = {k: sum(both) for k, both in parts[count].items()}
    return Costs(table, parts)
