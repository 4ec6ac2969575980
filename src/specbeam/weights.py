"""What a checkpoint's safetensors files say before they are loaded: are they all there, and will they fit?"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbeam.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `folder`. Raises InputError when there are none or one is missing."""
    index = folder / INDEX
    if not (folder / "model.safetensors").is_file() and index.is_file():
        files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise InputError(f"'{name}' is incomplete: {absent[0]}, which {INDEX} names, is missing.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"'{name}' has no *.safetensors weights, the only kind specbeam reads (others can run code): save it again "
            "with save_pretrained, or give another folder."
        )
    return files


def weight_bytes(name: str, folder: Path, itemsize: int | None, stored: torch.dtype | None) -> int | None:
    """Bytes the weights take with `itemsize` bytes a floating point number (None: as stored).

    Before the download only the index of a sharded checkpoint tells, given the dtype it is stored in; None when that
    is not known. Raises InputError for damaged files.
    """
    if not any(folder.glob("*.safetensors")):
        index = folder / INDEX
        total = json.loads(index.read_text()).get("metadata", {}).get("total_size") if index.is_file() else None
        return int(total * (itemsize or stored.itemsize) / stored.itemsize) if total and stored else None
    total = 0
    for file in weight_files(name, folder):
        for tensor in _header(name, file).values():
            first, last = tensor["data_offsets"]
            floating = re.fullmatch(r"(BF|F)(16|32|64)", tensor["dtype"])
            total += math.prod(tensor["shape"]) * itemsize if itemsize and floating else last - first
    return total


def _header(name: str, file: Path) -> dict[str, Any]:
    """The tensors that a safetensors file declares: 8 bytes with the length of a JSON header, then the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise InputError(f"'{name}' holds a git-lfs pointer instead of {file.name}: run `git lfs pull` there.")
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(stream.read(length)) if length <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise InputError(f"'{name}' is damaged: {file.name} is not a safetensors file; fetch it again.")
    header.pop("__metadata__", None)
    if size < 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0):
        raise InputError(f"'{name}' is damaged: {file.name} is shorter than its header says; fetch it again.")
    return header


def free_memory(device: str) -> int | None:
    """Free bytes on the device, within a container's limit; None where that cannot be told."""
    import torch

    if device.startswith("cuda"):
        place = torch.device(device)
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return torch.cuda.mem_get_info(place)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = [int(available[1]) * 1024] if available else []
    group = Path("/sys/fs/cgroup")
    try:  # cgroup v2; its file cache counts as used but is given back on demand
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        free.append(max(limit - used + (int(cached[1]) if cached else 0), 0))
    except (OSError, ValueError):
        pass  # no limit ("max") or no cgroup
    return min(free, default=None)
