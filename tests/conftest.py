"""Converted models go to this session's own folder, never to the user's cache."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports it: for the GPU's kernels


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory, worker_id="master"):
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECBEAM_CACHE", str((base.parent if base.name.startswith("popen") else base) / "specbeam"))
        yield
