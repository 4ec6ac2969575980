"""A forecast's choice in the words of three programs: specbeam, transformers, vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbeam.experiment import records

if TYPE_CHECKING:
    from specbeam.experiment.forecasting import Line

LOOKUP = "prompt_lookup"
WITH = ("device", "dtype", "runner", "precision")  # what was chosen holds for these


def choice(config: Mapping[str, Any], target: str, best: Line | None, drafts: Mapping[str, str | None], batch_size: int
           ) -> dict[str, Any]:
    """specbeam: keys of `specbeam compare`; transformers: a fragment of generation_config.json (for a draft model that
    of the *draft*, where `generate` reads it); vllm: the value of --speculative-config. The last two are None when it
    is best not to speculate."""
    sampled = bool(config["temperature"])
    plain = {"kind": "sample", "temperature": config["temperature"]} if sampled else {"kind": "greedy"}
    chosen: dict[str, Any] = {
        "target": {"path": target},
        "methods": {plain["kind"]: {**plain, **config["options"]}},
        "batch_size": batch_size,
        "max_new_tokens": config["max_new_tokens"],
        **{name: config[name] for name in WITH if config.get(name) not in (None, "auto")},
    }
    if best is None:
        return {"specbeam": chosen, "transformers": None, "vllm": None}
    temperature = {"temperature": config["temperature"]} if sampled else {}
    method = {"kind": "speculative", "draft_length": best.draft_length, **temperature, **config["options"]}
    if best.draft == LOOKUP:
        ngram = config["ngram"]
        method |= {"drafter": LOOKUP, "ngram": ngram}
        transformers = {"prompt_lookup_num_tokens": best.draft_length, "max_matching_ngram_size": ngram}
        vllm = {"method": "ngram", "num_speculative_tokens": best.draft_length, "prompt_lookup_max": ngram,
                "prompt_lookup_min": 1}
    else:
        path = drafts[best.draft]
        precision = (config.get("draft") or {}).get("precision")
        chosen["draft"] = {"path": path} | ({} if precision is None else {"precision": precision})
        transformers = {"num_assistant_tokens": best.draft_length, "num_assistant_tokens_schedule": "constant",
                        "assistant_confidence_threshold": 0.0}
        folder = str(Path(__file__).resolve().parent.parent / "bundled" / "draft") if path == "bundled" else path
        vllm = {"method": "draft_model", "model": folder, "num_speculative_tokens": best.draft_length}
    chosen["methods"]["speculative"] = method
    return {"specbeam": chosen, "transformers": transformers, "vllm": vllm}


def command_of(chosen: Mapping[str, Any]) -> str:
    """The same as a command line."""
    import json
    import shlex

    def value(given: Any) -> str:
        if isinstance(given, Mapping):
            return "{" + ", ".join(f"{name}: {value(one)}" for name, one in given.items()) + "}"
        return given if isinstance(given, str) else json.dumps(given)

    methods = "{" + ", ".join(f"{label}: {value(one)}" for label, one in chosen["methods"].items()) + "}"
    names = ("batch_size", "max_new_tokens", *(name for name in WITH if name in chosen))
    rest = " ".join(f"{name}={value(chosen[name])}" for name in names)
    models = " ".join(shlex.quote(f"{role}.{name}={given}") for role in ("target", "draft")
                      for name, given in chosen.get(role, {}).items())
    return f"specbeam compare {models} 'methods={methods}' {rest}"


def write_choice(folder: Path, config: Mapping[str, Any], target: str, best: Line | None,
                 drafts: Mapping[str, str | None], batch_size: int) -> None:
    """specbeam.yaml, and where it is best to speculate generation_config.json and vllm.json."""
    folder.mkdir(exist_ok=True)
    written = choice(config, target, best, drafts, batch_size)
    records.write_yaml(folder / "specbeam.yaml", {**written["specbeam"], "command": command_of(written["specbeam"])})
    for name, file in (("transformers", "generation_config.json"), ("vllm", "vllm.json")):
        if written[name] is not None:
            records.write_json(folder / file, written[name])
        else:
            (folder / file).unlink(missing_ok=True)
