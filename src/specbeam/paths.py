"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def from_user(path: str | os.PathLike[str]) -> Path:
    """With ~ and ~name filled in where they mean somebody (pathlib's own raises where they do not)."""
    return Path(os.path.expanduser(path))
