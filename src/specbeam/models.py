"""Load a model, or a target and its draft: the bundled pair, a local folder, or a hub id.

What can go wrong is found in the order of its cost: the path, the configuration, the tokenizers and whether they
agree, the memory; only then are weights downloaded and read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specbeam.errors import InputError, out_of_memory
from specbeam.paths import from_user
from specbeam.placement import check_placed, check_placement, placing
from specbeam.runners import check_runner
from specbeam.weights import free_memory, weight_bytes, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_BUNDLED = {"bundled": "target", "bundled-draft": "draft"}
_DTYPES = {
    "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "float64": "float64",
}  # fmt: skip
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "vocab.*", "*.model", "*.tiktoken")
_CHOOSE_DRAFT = (
    "give another with draft.path=<folder or hub id>, draft across vocabularies with kind: speculative and vocabulary: "
    "auto, or leave the speculative methods out with only=[…]"
)


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    runner: str = "auto",
    precision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    tp_plan: str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, without gradients, and its tokenizer.

    `path` is "bundled", "bundled-draft", a folder written by `save_pretrained`, or a hub id; only safetensors weights
    are read. dtype "auto" is float32 on a CPU and the checkpoint's own on a GPU; device "auto" is cuda, else mps, else
    cpu. `runner` and `precision` are those of `use_runner`. The tokenizer pads on the left and always has a pad token;
    the embeddings are never resized. The model's generation_config is the checkpoint's, except that nothing in it makes
    `generate` compile. `device_map` (accelerate's) spreads the layers over devices, the CPU and `offload_folder`;
    `tp_plan="auto"` splits them over the processes of torchrun; with either, `device` is only what dtype "auto" asks.
    Raises InputError, in one sentence.
    """
    check_runner(runner, precision)
    check_placement(device_map, tp_plan, runner)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    checkpoint = replace(_open(path, trust_remote_code), placing=placing(device_map, tp_plan, offload_folder))
    return _load([checkpoint], kind, place, runner, precision, trust_remote_code)[0], checkpoint.tokenizer


def load_pair(
    target: str | os.PathLike[str] = "bundled",
    draft: str | os.PathLike[str] | None = "bundled",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    runner: str = "auto",
    precision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    tp_plan: str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    draft_precision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Target, draft and the target's tokenizer, loaded as `load_model` does; "bundled" as draft is the bundled draft.

    `device_map`, `tp_plan` and `offload_folder` place the target; the draft lies whole on `device`.
    `draft_precision` is the draft's `precision`: see `precision_of_draft`.

    Raises InputError, before any weight is read, when the two do not share a vocabulary.
    """
    target_model, draft_model, tokenizer, _ = load_pair_with_tokenizers(
        target, draft, same_vocabulary=True, dtype=dtype, device=device, runner=runner, precision=precision,
        trust_remote_code=trust_remote_code, device_map=device_map, tp_plan=tp_plan, offload_folder=offload_folder,
        draft_precision=draft_precision,
    )  # fmt: skip
    return target_model, draft_model, tokenizer


def load_pair_with_tokenizers(
    target: str | os.PathLike[str] = "bundled",
    draft: str | os.PathLike[str] | None = "bundled",
    *,
    same_vocabulary: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    runner: str = "auto",
    precision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    tp_plan: str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    draft_precision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Target, draft and the tokenizer of each, for `speculative_generate(vocabulary=…)`: they may differ unless
    `same_vocabulary`. Otherwise as `load_pair`."""
    from specbeam.runners.choose import want_runner

    require_draft(target, draft, ["load_pair"])
    assert draft is not None
    check_runner(runner, precision, draft_precision)
    check_placement(device_map, tp_plan, runner)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    ours = replace(_open(target, trust_remote_code), placing=placing(device_map, tp_plan, offload_folder))
    theirs = _open("bundled-draft" if draft == "bundled" else draft, trust_remote_code)
    if same_vocabulary:
        check_same_vocabulary(ours.tokenizer, theirs.tokenizer, ours.config, theirs.config)
    target_model, draft_model = _load([ours, theirs], kind, place, runner, precision, trust_remote_code)
    want_runner(draft_model, runner, precision_of_draft(draft_precision, runner, place, precision))
    return target_model, draft_model, ours.tokenizer, theirs.tokenizer


def check_drafts(target: str | os.PathLike[str], drafts: Iterable[str | os.PathLike[str]]) -> None:
    """Raise InputError, before any weight is read, for a draft that is not there or of another vocabulary."""
    ours = _open(target, False)
    for draft in drafts:
        theirs = _open("bundled-draft" if draft == "bundled" else draft, False)
        check_same_vocabulary(ours.tokenizer, theirs.tokenizer, ours.config, theirs.config)


def check_model(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a model that cannot be loaded, as far as its config, its tokenizer and, where they are here,
    its weights' headers tell."""
    checkpoint = _open(path, False)
    if checkpoint.repo is None:
        weight_files(checkpoint.name, checkpoint.folder)
        weight_bytes(checkpoint.name, checkpoint.folder, None, None)


def open_config(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """A model's config, without its tokenizer and weights. Raises InputError."""
    name, folder, _ = _locate(path, False)
    return _read_config(name, folder, False)


def precision_of_draft(own: str | None, runner: str, device: str, precision: str | None) -> str | None:
    """The draft's `precision`, where its `own` was left open and the target's is `precision`.

    Under runner "auto" on a CPU it is "int8": a draft step is the reading of its weights, a quarter as many then. What
    a draft says decides how much is accepted and never what comes out, and one runner gives both its proposals and the
    probabilities they are judged by, so that this is lossless.
    """
    return own or ("int8" if runner == "auto" and device == "cpu" else precision)


def require_draft(target: str | os.PathLike[str], draft: str | os.PathLike[str] | None, methods: Sequence[str]) -> None:
    """Raise InputError when `methods`, the labels of those that speculate, is not empty and there is no draft."""
    if draft is None and methods:
        raise InputError(
            f"No draft model for {', '.join(methods)}: draft.path is null, as in the preset of a target for which no "
            f"draft of the same vocabulary is known ('{target}'); give one with draft.path=<folder or hub id>, or "
            "leave the speculative methods out with only=[…]."
        )


def check_path(path: object) -> None:
    """Raise InputError for a path that cannot be a model, without asking the network or importing torch."""
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip():
        raise InputError(f"A model's path is {path!r}: give 'bundled', a folder or a hub id such as 'Qwen/Qwen3-0.6B'.")
    if path in _BUNDLED:
        return
    folder = from_user(path)
    if folder.is_file():
        raise InputError(f"'{path}' is a file: give the folder it lies in, with config.json and *.safetensors.")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"The folder '{path}' has no config.json: give a folder written by save_pretrained.")
    elif not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", str(path)):
        raise InputError(f"No such folder: '{path}' (and it is no hub id, which reads 'owner/name').")


def resolve_device(device: str | torch.device) -> str:
    """The device's name, with "auto" resolved. Raises InputError for one that is unknown or not there."""
    import torch

    if str(device) == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    hint = "use auto, cpu, cuda, cuda:<index> or mps"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"Unknown device '{device}': {hint}.") from None
    if parsed.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"Device '{device}' is not supported: {hint}.")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"Device '{device}' is not available on this machine: {hint}.")
    if parsed.type == "cuda" and (parsed.index or 0) >= (count := torch.cuda.device_count()):
        found = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device"
        raise InputError(f"Device '{device}' is not available: this machine has {found}; {hint}.")
    return str(parsed)


def resolve_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype | Literal["auto"]:
    """The torch dtype for this (resolved) device; "auto" (the checkpoint's own) is left only on a GPU."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.float32 if device == "cpu" else "auto"
    if name not in _DTYPES:
        raise InputError(f"Unknown or unsupported dtype '{name}': use auto, float32, bfloat16 or float16.")
    if name == "float64" and device.startswith("mps"):
        raise InputError("Device 'mps' has no float64: use dtype=auto, float32, bfloat16 or float16.")
    return getattr(torch, _DTYPES[name])


def check_same_vocabulary(
    target_tokenizer: PreTrainedTokenizerBase,
    draft_tokenizer: PreTrainedTokenizerBase,
    target_config: PreTrainedConfig,
    draft_config: PreTrainedConfig,
) -> None:
    """Raise InputError, saying how they differ, unless a token id means the same to both models.

    Tokenizers are compared, not logit widths, which differ within a family by padding (Qwen2.5: 151,936 and 152,064).
    Added tokens that only one of them has are allowed: ordinary text never produces them (Gemma 3's image token lies
    outside its smallest models' embeddings). The draft must be able to read every other token of the target.
    """
    names = (f"Target '{target_tokenizer.name_or_path}'", f"draft '{draft_tokenizer.name_or_path}'")
    ours = {id: token for token, id in target_tokenizer.get_vocab().items()}
    theirs = {id: token for token, id in draft_tokenizer.get_vocab().items()}
    if ours != theirs:
        added = (set(target_tokenizer.get_added_vocab().values()), set(draft_tokenizer.get_added_vocab().values()))
        for id in sorted(ours.keys() | theirs.keys()):
            one_sided = (id not in theirs and id in added[0]) or (id not in ours and id in added[1])
            if ours.get(id) != theirs.get(id) and not one_sided:
                raise InputError(
                    f"{names[0]} and {names[1]} do not share a vocabulary: {len(ours):,} against {len(theirs):,} "
                    f"tokens, and id {id} is {_spell(ours.get(id))} to the target and {_spell(theirs.get(id))} to the "
                    f"draft; {_CHOOSE_DRAFT}."
                )
    rows = draft_config.get_text_config().vocab_size
    highest = _highest_plain_id(target_tokenizer)
    if highest >= rows:
        raise InputError(
            f"{names[0]} and {names[1]} do not share a vocabulary: the target's tokens go up to id {highest:,} and the "
            f"draft has embeddings for {rows:,} (the target for {target_config.get_text_config().vocab_size:,}); "
            f"{_CHOOSE_DRAFT}."
        )


def _spell(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _highest_plain_id(tokenizer: PreTrainedTokenizerBase) -> int:
    added = set(tokenizer.get_added_vocab())
    return max((id for token, id in tokenizer.get_vocab().items() if token not in added), default=-1)


@dataclass(frozen=True)
class _Checkpoint:
    """A model before its weights: everything that is cheap to read. `repo` is its hub id, when it came from there."""

    name: str
    folder: Path
    repo: str | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    placing: dict[str, Any] = field(default_factory=dict)  # on several devices; empty: whole on one


def _open(path: str | os.PathLike[str], trust_remote_code: bool) -> _Checkpoint:
    name, folder, repo = _locate(path, trust_remote_code)
    config = _read_config(name, folder, trust_remote_code)
    tokenizer = _read_tokenizer(name, folder, config, trust_remote_code)
    return _Checkpoint(name, folder, repo, config, tokenizer)


def _locate(path: str | os.PathLike[str], trust_remote_code: bool) -> tuple[str, Path, str | None]:
    """Name, folder and hub id (None for a folder) of a checkpoint; from the hub all but its weights."""
    check_path(path)
    name, repo = str(path), None
    if name in _BUNDLED:
        folder = Path(str(resources.files("specbeam"))) / "bundled" / _BUNDLED[name]
        if not (folder / "config.json").is_file():
            raise InputError(f"The {name} model is missing from this installation ({folder}): reinstall specbeam.")
    elif (folder := from_user(path)).is_dir():
        pass
    else:
        from specbeam.hub import fetch

        repo = name
        folder = fetch(name, weights=False, code=trust_remote_code)
    return name, folder, repo


def _read_config(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise _unreadable("configuration", name, error) from error
    architectures = getattr(config, "architectures", None) or []
    kind = f"'{name}' is a {config.model_type} model ({', '.join(architectures) or type(config).__name__})"
    if config.is_encoder_decoder:
        raise InputError(f"{kind}, an encoder-decoder: specbeam decodes decoder-only (causal) language models.")
    custom = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # An encoder such as BERT has a class for decoding too; what its checkpoint was trained as tells.
    encoder = getattr(config, "is_decoder", True) is False and architectures and not any(
        architecture.endswith(_DECODERS) for architecture in architectures
    )  # fmt: skip
    if not custom and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder):
        raise InputError(f"{kind}, not a causal language model: specbeam decodes decoder-only language models.")
    return config


def _read_tokenizer(
    name: str, folder: Path, config: PreTrainedConfig, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    missing = InputError(
        f"'{name}' has no tokenizer: put its files (tokenizer.json, tokenizer_config.json) beside config.json, as "
        "tokenizer.save_pretrained writes them."
    )
    if not trust_remote_code and not any(next(folder.glob(file), None) for file in _TOKENIZER_FILES):
        raise missing  # transformers would make an empty one up
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise _unreadable("tokenizer", name, error) from error
    highest, rows = _highest_plain_id(tokenizer), config.get_text_config().vocab_size
    if highest < 0:
        raise missing
    if highest >= rows:
        raise InputError(
            f"The tokenizer of '{name}' is not this model's: its tokens go up to id {highest:,} and the model has "
            f"embeddings for {rows:,}."
        )
    tokenizer.name_or_path = name
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        # Never a new token: that would need another embedding row. Pads are masked, any legal id does.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _load(
    checkpoints: Sequence[_Checkpoint], dtype: torch.dtype | Literal["auto"], device: str, runner: str,
    precision: str | None, trust_remote_code: bool,
) -> list[PreTrainedModel]:  # fmt: skip
    """The models, after their memory was checked together: first by the shard index, then by the weights' headers."""
    from specbeam.hub import fetch
    from specbeam.runners.choose import want_runner

    _check_memory(checkpoints, dtype, device)
    checkpoints = [
        replace(checkpoint, folder=fetch(checkpoint.repo, weights=True, code=trust_remote_code))
        if checkpoint.repo
        else checkpoint
        for checkpoint in checkpoints
    ]
    for checkpoint in checkpoints:
        weight_files(checkpoint.name, checkpoint.folder)
    _check_memory(checkpoints, dtype, device)
    loaded = [_load_weights(checkpoint, dtype, device, trust_remote_code) for checkpoint in checkpoints]
    for checkpoint, model in zip(checkpoints, loaded, strict=True):
        want_runner(model, "eager" if checkpoint.placing else runner, None if checkpoint.placing else precision)
    return loaded


def _load_weights(
    checkpoint: _Checkpoint, dtype: torch.dtype | Literal["auto"], device: str, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if getattr(checkpoint.config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # sdpa has no soft cap on attention logits (Gemma 2)
    try:
        # Not the class the architecture's name suggests: Gemma3ForCausalLM on a multimodal Gemma 3 checkpoint
        # quietly leaves the weights random; the Auto class knows.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
            **checkpoint.placing,
        )
        model, report = loaded
        if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
            raise InputError(
                f"'{checkpoint.name}' has no weights for {absent[0]}"
                f"{f' and {len(absent) - 1} more' if absent[1:] else ''} of {type(model).__name__}, so it is not a "
                "complete causal language model: give a checkpoint that is."
            )
        if checkpoint.placing:
            check_placed(checkpoint.name, model)
        else:
            model = model.to(device)
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise InputError(_too_large([checkpoint.name], None, None, device)) from error
        raise _unreadable("weights", checkpoint.name, error) from error
    model.config._name_or_path = checkpoint.name
    generation = model.generation_config
    # A static cache (Gemma 3's checkpoints ask for one) makes `generate` compile, and refuse an assistant.
    generation.cache_implementation = None
    generation.disable_compile = True
    if generation.pad_token_id is None:
        generation.pad_token_id = checkpoint.tokenizer.pad_token_id
    return model.eval().requires_grad_(False)


def _unreadable(what: str, name: str, error: Exception) -> InputError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"The {what} of '{name}' cannot be read: {lines[0].strip()[:300].rstrip('.')}.")


def _check_memory(checkpoints: Sequence[_Checkpoint], dtype: torch.dtype | Literal["auto"], device: str) -> None:
    checkpoints = [checkpoint for checkpoint in checkpoints if not checkpoint.placing]
    itemsize = None if isinstance(dtype, str) else dtype.itemsize
    sizes = [
        weight_bytes(checkpoint.name, checkpoint.folder, itemsize, getattr(checkpoint.config, "dtype", None))
        for checkpoint in checkpoints
    ]
    needed, free = sum(size or 0 for size in sizes), free_memory(device)
    if free is not None and needed > free:
        raise InputError(_too_large([checkpoint.name for checkpoint in checkpoints], needed, free, device))


def _too_large(names: Sequence[str], needed: int | None, free: int | None, device: str) -> str:
    what = " and ".join(f"'{name}'" for name in dict.fromkeys(names))
    numbers = f" ({needed / 1e9:.1f} GB for the weights alone, {free / 1e9:.1f} GB free)" if needed and free else ""
    return f"Not enough memory on {device} for {what}{numbers}: try dtype=bfloat16, a smaller model or another device."
