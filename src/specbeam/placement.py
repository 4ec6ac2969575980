"""One model on several devices: layers spread by accelerate (`device_map`), or split by tensor parallelism (`tp_plan`).

The engine follows by itself: keys and values lie where their layer computes them, and accelerate moves masks and
positions to each layer. With tensor parallelism every process runs the same calls and gets the same tokens; what is
decided by the clock is decided by that of the first process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from specbeam.errors import InputError

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(device_map: Any, tp_plan: Any, runner: str) -> None:
    """Raises InputError for what names no placement, or none that can be had here."""
    if device_map is None and tp_plan is None:
        return
    if device_map is not None and tp_plan is not None:
        raise InputError("device_map and tp_plan are both given: give the one that spreads layers, or the one that "
                         "splits them.")
    if runner not in ("auto", "eager"):
        raise InputError(f"runner is {runner!r}, but a model on several devices runs eagerly: leave runner out.")
    if device_map is not None:
        if not isinstance(device_map, dict) and device_map not in MAPS:
            raise InputError(f"device_map is {device_map!r}: use {', '.join(MAPS)}, or a dict from module to device, "
                             "cpu or disk.")
        if find_spec("accelerate") is None:
            raise InputError("device_map needs accelerate, which is not installed: pip install 'specbeam[parallel]'.")
    elif tp_plan != "auto":
        raise InputError(f"tp_plan is {tp_plan!r}: use auto.")
    elif "RANK" not in os.environ:
        raise InputError("tp_plan splits a model over the processes of torchrun, and this is none of them: torchrun "
                         "--nproc-per-node <devices> script.py.")


def placing(device_map: Any, tp_plan: Any, offload_folder: Any) -> dict[str, Any]:
    """What `from_pretrained` is told; empty: one device."""
    if tp_plan is not None:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}
    if device_map is None:
        return {}
    return {"device_map": device_map, "offload_folder": offload_folder or tempfile.mkdtemp(prefix="specbeam-offload-")}


def check_placed(name: str, model: Any) -> None:
    """Raises InputError for a model whose tokens would have no device to go to."""
    if model.get_input_embeddings().weight.device.type == "meta":
        raise InputError(f"device_map puts the input embedding of '{name}' on disk: keep it on a device or the cpu.")


def is_split(model: Any) -> bool:
    """Whether several processes hold a part of this model each."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in model.parameters())


def agreed(seconds: Sequence[float], model: Any) -> list[float]:
    """The seconds that the first process measured, for a model that is split over several: each would decide by its
    own clock, and then wait for the others for ever."""
    if not is_split(model):
        return list(seconds)
    import torch
    from torch import distributed

    told = torch.tensor(seconds, dtype=torch.float64, device=model.device)
    distributed.broadcast(told, 0)
    return [float(value) for value in told]
