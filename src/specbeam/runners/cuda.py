"""Kernels in CUDA C++, for what Triton has no words for: compiled by NVRTC when first needed, launched early.

NVIDIA's own bindings do both; torch's own wheels for such GPUs bring them along.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HERE = Path(__file__).parent
# Percent of an SM's memory that is shared: kernels that ask for other splits cannot run side by side on an SM, and the
# rest, L1, is what reads ahead go through. 64 of 228 KB; of an H200 with a 0.5B model 32, 100 and 228 cost 8 to 20 %
# where no weights wait in it.
SOME, ALL = 25, 100
_failed: set[torch.device] = set()  # where Triton's kernels stay
_forward = threading.local()


class Attention(ctypes.Structure):
    """What attend.cu is given."""

    _fields_ = (*((name, ctypes.c_void_p) for name in (
        "q", "k", "v", "q_norm", "k_norm", "cos", "sin", "keys", "values", "slot", "mask", "out")),
        *((name, ctypes.c_longlong) for name in ("key_head", "key_slot", "value_head", "value_slot")),
        ("scale", ctypes.c_float), ("eps", ctypes.c_float))


class Product(ctypes.Structure):
    """What product.cu is given."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "norm", "added", "out")), ("weights", ctypes.c_void_p * 3),
                ("biases", ctypes.c_void_p * 3), ("sizes", ctypes.c_int * 3), ("eps", ctypes.c_float))


def attention(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
              keys: Tensor, values: Tensor, slot: Tensor, mask: Tensor, out: Tensor, scale: float, eps: float
              ) -> Attention:
    """Where these lie; they must stay alive until the kernel has run."""
    return Attention(*map(_place, (q, k, v, q_norm, k_norm, cos, sin, keys, values, slot, mask, out)),
                     *keys.stride()[1:3], *values.stride()[1:3], scale, eps)


def product(x: Tensor, norm: Tensor | None, added: Tensor | None, out: Tensor, weights: Sequence[Tensor],
            biases: Sequence[Tensor | None], eps: float) -> Product:
    """Likewise."""
    three = ctypes.c_void_p * 3
    return Product(*map(_place, (x, norm, added, out)), three(*map(_place, weights)), three(*map(_place, biases)),
                   (ctypes.c_int * 3)(*map(len, weights)), eps)


def _place(one: Tensor | None) -> int | None:
    return None if one is None else one.data_ptr()


def found(name: str, device: torch.device, shared: int = SOME, memory: int = 0, **given: int) -> Any | None:
    """`kernel`; None without the bindings or with a compiler that does not know the card, which is said once."""
    if device in _failed:
        return None
    try:
        return kernel(name, device, shared, memory, **given)
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        logging.getLogger("specbeam").info("one row's kernels stay Triton's (%s)", reason)
        _failed.add(device)
        return None


@cache
def kernel(name: str, device: torch.device, shared: int, memory: int, **given: int) -> Any:
    """The function of that name in the file of that name. shared: SOME or ALL, as the kernels around it; memory: what
    `launch` will be given; given: what it is compiled for.

    Raises ImportError without the bindings, RuntimeError with what the compiler or the driver says."""
    from cuda.bindings import driver

    code = compiled(name, *torch.cuda.get_device_capability(device), **given)
    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(code))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        attributes = driver.CUfunction_attribute
        for attribute, value in ((attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, shared),
                                 (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, memory)):
            _checked(driver.cuFuncSetAttribute(function, attribute, value))
        return function


def compiled(name: str, major: int, minor: int, **given: int) -> bytes:
    """Machine code of that file for a card of this capability."""
    from cuda.bindings import nvrtc

    options = [b"-arch=sm_%d%d" % (major, minor), b"-std=c++17", b"-default-device",
               *(b"-D%s=%d" % (key.encode(), value) for key, value in given.items())]
    headers = sorted(_HERE.glob("*.cuh"))
    program = _checked(nvrtc.nvrtcCreateProgram(
        (_HERE / f"{name}.cu").read_bytes(), f"{name}.cu".encode(), len(headers),
        [one.read_bytes() for one in headers], [one.name.encode() for one in headers]))
    try:
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    except RuntimeError as failure:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{failure}: {log.decode(errors='replace')}") from None
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code


def begin() -> None:
    """Of a forward: its first kernel here waits for all before it, so that all of them may read what those made."""
    _forward.begins = True


def launch(function: Any, device: torch.device, programs: int, threads: int, given: ctypes.Structure, memory: int = 0
           ) -> None:
    """Its one argument is `given`. It may begin before the kernel before it has ended, but for a forward's first.
    memory: bytes that its programs share beside their own variables."""
    from cuda.bindings import driver

    config, early = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
    config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = memory
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 0 if getattr(_forward, "begins", False) else 1
    config.attrs, config.numAttrs = [early], 1
    _forward.begins = False
    place = (ctypes.c_void_p * 1)(ctypes.addressof(given))
    with torch.cuda.device(device):
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(place), 0))


def _checked(result: Any) -> Any:
    error, *found = result
    if int(error):
        raise RuntimeError(f"CUDA says {error.name}")
    return found[0] if len(found) == 1 else found
