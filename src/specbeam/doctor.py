"""What works on this machine (`specbeam doctor`) and which models are a word away (`specbeam models`).

Nothing here fails: what does not work is a line that says so.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parent / "conf"
SECONDS = 3.0  # how long a server may take to answer
PACKAGES = ("torch", "transformers", "accelerate", "openvino", "hydra-core", "wandb", "ray", "lm-eval", "nbclient",
            "matplotlib", "playwright")
# Of each repository that a preset names: parameters, context, chat template. As their cards say; nothing is downloaded.
KNOWN: dict[str, tuple[str, int | None, bool | None]] = {
    "bundled": ("24 M", 2048, True), "bundled-draft": ("5.9 M", 2048, True),
    "openai-community/gpt2": ("124 M", 1024, False), "distilbert/distilgpt2": ("82 M", 1024, False),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("1.1 B", 2048, True),
    "google/gemma-3-4b-it": ("4.3 B", 131072, True), "google/gemma-3-270m-it": ("0.27 B", 32768, True),
    "stabilityai/stablelm-2-zephyr-1_6b": ("1.6 B", 4096, True),
    "stabilityai/stablelm-zephyr-3b": ("2.8 B", 4096, True),
    "HuggingFaceH4/zephyr-7b-beta": ("7.2 B", 32768, True),
    "Qwen/Qwen2.5-3B-Instruct": ("3.1 B", 32768, True), "Qwen/Qwen2.5-0.5B-Instruct": ("0.49 B", 32768, True),
}
UNKNOWN = ("?", None, None)


def doctor() -> Iterator[str]:
    """The lines of `specbeam doctor`."""
    from specbeam import __version__

    yield f"specbeam      {__version__}, Python {platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        yield _line(package, lambda package=package: metadata.version(package))  # type: ignore[misc]
    yield _line("CPU", _cpu)
    for name in _tried(_devices, ["cpu"]):
        yield _line(name, lambda name=name: _dtypes(name))  # type: ignore[misc]
    yield from _runners()
    yield _line("hub", _hub)
    yield _line("W&B", _wandb)


def models() -> list[tuple[str, ...]]:
    """Rows of `specbeam models`: preset, target, its size, context, chat template, draft, its size, in the cache."""
    import yaml

    rows: list[tuple[str, ...]] = []
    for preset in sorted((CONF / "target").glob("*.yaml")):
        tree = yaml.safe_load(preset.read_text("utf-8"))
        target = tree.get("target", tree)["path"]
        drafts = [entry["override /draft"] for entry in tree.get("defaults", []) if "override /draft" in entry]
        draft = _draft_path(drafts[0] if drafts else "bundled")
        size, context, chat = KNOWN.get(target, UNKNOWN)
        cached = [_cached(path) for path in (target, draft) if path]
        rows.append((preset.stem, target, size, f"{context:,}" if context else "?",
                     "?" if chat is None else "yes" if chat else "no", draft or "none",
                     KNOWN.get(draft, UNKNOWN)[0] if draft else "",
                     "yes" if all(cached) else "in part" if any(cached) else "no"))
    return rows


def _draft_path(name: str) -> str | None:
    import yaml

    path = yaml.safe_load((CONF / "draft" / f"{name}.yaml").read_text("utf-8"))["path"]
    return "bundled-draft" if path == "bundled" else path


def _cached(repo: str) -> bool:
    """Whether a whole copy lies in the hub's cache: configuration and weights."""
    if repo.startswith("bundled"):
        return True
    from huggingface_hub import try_to_load_from_cache

    config = _tried(lambda: try_to_load_from_cache(repo, "config.json"), None)
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))


def _line(name: str, ask: Callable[[], Any]) -> str:
    try:
        answer = str(ask())
    except metadata.PackageNotFoundError:
        answer = "not installed"
    except Exception as error:
        answer = f"no ({type(error).__name__}: {error})"
    return f"{name:<13} {' '.join(answer.split())[:200]}"


def _tried(ask: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return ask()
    except Exception:
        return otherwise


def _cpu() -> str:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    return (f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {memory.available / 2**30:.1f} of "
            f"{memory.total / 2**30:.1f} GiB free")


def _devices() -> list[str]:
    import torch

    found = ["cpu"] + [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return found + ["mps"] * torch.backends.mps.is_available()


def _dtypes(device: str) -> str:
    """What the device computes a product in; of a GPU, its name and memory too."""
    import torch

    works = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ones = _tried(lambda dtype=dtype: float((torch.ones(8, 8, dtype=dtype, device=device)  # type: ignore[misc]
                                                 @ torch.ones(8, 8, dtype=dtype, device=device))[0, 0]), None)
        works += [str(dtype).removeprefix("torch.")] * (ones == 8.0)
    text = f"computes in {', '.join(works) or 'nothing'}"
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        text = f"{torch.cuda.get_device_name(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {text}"
    return text


def _runners() -> Iterator[str]:
    """Each runner is tried on the bundled draft model; what it says when it falls back is the reason."""
    from specbeam.runners import RUNNERS

    for runner in RUNNERS:
        yield _line(runner, lambda runner=runner: _runner(runner))  # type: ignore[misc]


def _runner(name: str) -> str:
    from transformers.utils import logging as transformers_logging

    from specbeam.models import load_model
    from specbeam.runners.choose import use_runner

    transformers_logging.disable_progress_bar()
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().partition("(")[2].rpartition(")")[0])

    logger, listener = logging.getLogger("specbeam"), Listen()
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        model, _ = load_model("bundled-draft")
        used = use_runner(model, name)
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagates
    if name == "auto":
        return f"runner: {used} is chosen here"
    return "runner: works" if used == name else f"runner: no ({said[-1] if said else used + ' instead'})"


def _hub() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    return _reach(constants.ENDPOINT)


def _wandb() -> str:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"not asked: WANDB_MODE is {os.environ['WANDB_MODE']}"
    import wandb

    return _reach(str(wandb.Settings().base_url))


def _reach(url: str) -> str:
    """Any answer at all is one: only the way there is tried."""
    import httpx

    try:
        httpx.get(url, timeout=SECONDS)
    except httpx.HTTPError as error:
        return f"{url} cannot be reached ({type(error).__name__})"
    return f"{url} answers"


def show_models() -> None:
    """Print the table of `specbeam models`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("preset", "target", "size", "context", "chat template", "draft", "size", "cached"):
        table.add_column(column, overflow="fold", no_wrap=column == "preset")
    for row in models():
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table, highlight=False)
