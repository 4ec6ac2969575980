"""Fetch a checkpoint from the Hugging Face hub into its cache, and say in one sentence why that failed.

One short probe decides whether the hub can be reached at all; without it every file would wait for its own time-out.
The cache is used when the hub cannot be reached, so a model that was loaded once loads offline too.
"""

from __future__ import annotations

import errno
from pathlib import Path

from specbeam.errors import InputError

PROBE_SECONDS = 5.0
_DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_CODE = ["*.py"]
_WEIGHTS = ["*.safetensors"]
# Folders hold other formats of the same weights (onnx/, original/); "consolidated" is Mistral's own second copy.
_IGNORED = ["*/*", "consolidated*"]
_LOCAL = "a local folder works too"


def fetch(repo: str, *, weights: bool, code: bool = False) -> Path:
    """The local snapshot folder of a hub repository.

    Downloads what is missing: configuration and tokenizer, with `weights` the safetensors files too, with `code` the
    repository's Python files. Respects HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME. Raises InputError in one sentence when
    the repository is unknown, gated, not cached while offline, or the hub cannot be reached.
    """
    from huggingface_hub import constants, model_info, snapshot_download

    unreachable: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            model_info(repo, timeout=PROBE_SECONDS)
        except Exception as error:  # whatever it was, a cached copy is as good
            unreachable = error
    patterns = _DESCRIPTION + (_WEIGHTS if weights else []) + (_CODE if code else [])
    try:
        folder = snapshot_download(
            repo,
            allow_patterns=patterns,
            ignore_patterns=_IGNORED,
            local_files_only=unreachable is not None or constants.HF_HUB_OFFLINE,
        )
    except Exception as error:
        raise InputError(_reason(repo, unreachable or error, constants.HF_HUB_OFFLINE)) from error
    return Path(folder)


def _reason(repo: str, error: Exception, offline: bool) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if offline:
        return (
            f"'{repo}' is neither a folder here nor in the hub cache, and HF_HUB_OFFLINE keeps the hub out of reach: "
            f"unset it, or fetch the model once while online; {_LOCAL}."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"'{repo}' is a gated repository: accept its licence at https://huggingface.co/{repo} and run "
            f"`hf auth login`; {_LOCAL}."
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"'{repo}' is neither a folder here nor a model on the hub (or it is private and needs `hf auth login`): "
            f"check the spelling; {_LOCAL}."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full: '{repo}' could not be downloaded; free some space or point HF_HOME elsewhere."
    if isinstance(error, HfHubHTTPError):
        return f"The hub refused '{repo}' ({_first_line(error)}): try again later; {_LOCAL}."
    return (
        f"'{repo}' is not a folder here and the hub could not be reached ({type(error).__name__}: "
        f"{_first_line(error)}): check the network, or the spelling of a folder's path; {_LOCAL}."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
