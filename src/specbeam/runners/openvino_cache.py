"""Converted models, kept on disk: one folder per model, configuration, versions and weights.

They lie in $SPECBEAM_CACHE, else $XDG_CACHE_HOME/specbeam, else ~/.cache/specbeam; deleting them costs the next
conversion and nothing else. A folder that cannot be written means a conversion in every process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import openvino as ov
import torch
import transformers

from specbeam.engine.runner import Adapter
from specbeam.paths import from_user
from specbeam.runners.openvino_export import compress, export, narrow

_FORMAT = 3  # of what export makes: raise it when that changes


def compute_type(adapter: Adapter, precision: str | None) -> str:
    """OpenVINO's name for what products are computed in: the model's own dtype, unless bf16 is asked for."""
    return "bf16" if precision == "bf16" or adapter.model.dtype == torch.bfloat16 else "f32"


def load(adapter: Adapter, precision: str | None = None) -> ov.Model:
    """The model from the cache, or converted and, where the folder can be written, put there."""
    weights = "int8" if precision == "int8" else ""
    folder = cache_folder() / f"openvino-{fingerprint(adapter, weights)}"
    if (folder / "model.xml").exists():
        try:
            return ov.Core().read_model(folder / "model.xml")
        except RuntimeError:  # half a disk, or another version's file: convert again
            shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    model = export(adapter)
    if weights == "int8":
        compress(model)
    else:
        narrow(model)
    kept = _keep(model, folder)
    name = adapter.model.config._name_or_path or adapter.name
    logging.getLogger("specbeam").info(
        "%s converted for OpenVINO in %.0f s%s.", name, time.perf_counter() - started,
        f"; it is kept in {folder.parent}" if kept else " (not kept: the cache folder cannot be written)")
    return ov.Core().read_model(folder / "model.xml") if kept else model


def cache_folder() -> Path:
    if own := os.environ.get("SPECBEAM_CACHE"):
        return from_user(own)
    return from_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "specbeam"


def fingerprint(adapter: Adapter, weights: str = "") -> str:
    """Of everything that the converted model depends on."""
    model: Any = adapter.model
    digest = hashlib.sha256()
    told = (_FORMAT, weights, ov.__version__, torch.__version__, transformers.__version__, adapter.name, model.dtype,
            adapter.layer_types, adapter.window, adapter.keeps, getattr(model.config, "_attn_implementation", None),
            model.config.to_json_string(use_diff=False))
    digest.update(repr(told).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _keep(model: ov.Model, folder: Path) -> bool:
    """Saved whole or not at all: another process may look at any moment."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=".openvino-", dir=folder.parent))
    except OSError:
        return False
    try:
        ov.save_model(model, half / "model.xml", compress_to_fp16=False)
        half.rename(folder)
    except (OSError, RuntimeError):
        return (folder / "model.xml").exists()  # another process was faster
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return True
