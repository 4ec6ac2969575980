"""What will run: methods × prompts × repeats, checked before any model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from specbeam.baselines.openai_server import check_server
from specbeam.decoding import BEAM_FAMILIES, METHODS, SAMPLED_FAMILIES, Method, method_family
from specbeam.drafting import DRAFTERS, NEEDS_DRAFT, Settings
from specbeam.errors import InputError
from specbeam.experiment.compose import nearest
from specbeam.experiment.plan_beams import BEAM_OPTIONS, DEFAULT_BEAMS, check_beam_options, check_corpus
from specbeam.experiment.prompts import Prompt, prompts_from_config
from specbeam.models import check_path
from specbeam.placement import check_placement
from specbeam.runners import check_runner

TOP_KEYS = (
    "target", "draft", "methods", "only", "prompts", "prompt_set", "system_prompt", "batch_size", "prompts_per_cell",
    "repeats", "max_new_tokens", "metrics", "evaluator", "forecast", "seed", "device", "device_map", "dtype", "runner",
    "precision", "executor", "ray", "debug", "trace", "wandb", "output_dir", "experiment",
)  # fmt: skip
INNER_KEYS = {
    "target": ("path",),
    "draft": ("path", "precision"),
    "prompt_set": ("path", "limit", "per_category", "template", "where"),
    "debug": ("render_input_text",),
    "wandb": ("mode", "project"),
    "ray": ("address", "actors", "cpus_per_actor", "timeout_seconds"),
}
WANDB_MODES = ("disabled", "offline", "online")

SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
# GenerationConfig names that a method sets itself, or that make no sense here, and what to do instead.
RESERVED = {
    "do_sample": "the kind decides whether it samples (beam_sample: beams that do)",
    "max_length": "use max_new_tokens",
    "num_assistant_tokens": "use draft_length",
    "num_assistant_tokens_schedule": "use draft_length, a number or auto",
    "assistant_confidence_threshold": "use confidence_threshold (of kind speculative)",
    "num_beam_groups": "use kind diverse_beam",
    "diversity_penalty": "use kind diverse_beam",
    "constraints": "constrained beam search is not among the methods",
    "force_words_ids": "constrained beam search is not among the methods",
    "penalty_alpha": "contrastive search is not among the methods",
    "dola_layers": "DoLa decoding is not among the methods",
    "prompt_lookup_num_tokens": "use kind speculative with drafter: prompt_lookup",
    "is_assistant": "the draft has its own config",
    "use_cache": "every method uses a cache",
    "low_memory": "beams already share one cache",
    "return_dict_in_generate": "the run records everything",
    "output_scores": "the run records everything",
    "output_logits": "the run records everything",
    "output_attentions": "the run records everything",
    "output_hidden_states": "the run records everything",
    "transformers_version": "it is no option of a method",
}
# option → (type, smallest, whether the smallest itself is allowed, largest)
RANGES: dict[str, tuple[type, float, bool, float]] = {
    "draft_length": (int, 1, True, float("inf")),
    "confidence_threshold": (float, 0, True, 1),
    "tree_nodes": (int, 1, True, float("inf")),
    "tree_width": (int, 1, True, float("inf")),
    "ngram": (int, 1, True, float("inf")),
    "branches": (int, 1, True, float("inf")),
    "min_match": (int, 1, True, float("inf")),
    "exit_layer": (int, 1, True, float("inf")),
    "draft_beams": (int, 1, True, float("inf")),
    "max_new_tokens": (int, 1, True, float("inf")),
    "min_new_tokens": (int, 0, True, float("inf")),
    "num_beams": (int, 1, True, float("inf")),
    "num_return_sequences": (int, 1, True, float("inf")),
    "num_beam_groups": (int, 1, True, float("inf")),
    "diversity_penalty": (float, 0, True, float("inf")),
    "no_repeat_ngram_size": (int, 0, True, float("inf")),
    "top_k": (int, 0, True, float("inf")),
    "temperature": (float, 0, True, float("inf")),
    "repetition_penalty": (float, 0, False, float("inf")),
    "length_penalty": (float, -100, True, 100),
    "top_p": (float, 0, False, 1),
    "typical_p": (float, 0, False, 1),
    "min_p": (float, 0, True, 1),
}


@dataclass(frozen=True)
class PlannedMethod:
    """One label of the table: a kind and its options."""

    label: str
    kind: str
    options: dict[str, Any]  # keyword arguments of the method's function, max_new_tokens among them
    method: Method

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options}

    @property
    def samples(self) -> bool:
        return method_family(self.kind, self.options) in SAMPLED_FAMILIES

    @property
    def needs_draft(self) -> bool:
        """Whether it cannot run without a draft model."""
        return self.method.speculates and self.options.get("drafter", "draft_model") in NEEDS_DRAFT

    @property
    def same_vocabulary(self) -> bool:
        """Whether its draft must share the target's vocabulary."""
        drafter = self.options.get("drafter", "draft_model")
        return (
            self.method.speculates
            and drafter in ("draft_model", "combined")
            and self.options.get("vocabulary", "same") == "same"
        )


def in_turn(methods: Sequence[Any], number: int) -> list[Any]:
    """The methods as they answer the number-th batch. What ran just before changes a method's speed by a few per cent
    (caches, the clock): over as many batches, twice as many where their number is odd, each has every place equally
    often and, within them, follows every other equally often (Williams 1949, doi:10.1071/CH9490149)."""
    count = len(methods)
    zigzag = [count - place // 2 if place % 2 == 0 else place // 2 + 1 for place in range(count)]
    row = [methods[(place + number) % count] for place in zigzag]
    return row[::-1] if count % 2 and number // count % 2 else row


@dataclass(frozen=True)
class Cell:
    """One method on one batch of prompts, once. Its rows are flushed together."""

    method: PlannedMethod
    prompts: tuple[Prompt, ...]  # all of them have this turn
    turn: int
    repeat: int
    batch_id: str

    def row_keys(self) -> list[tuple[str, str, int, int]]:
        return [(self.method.label, prompt.id, self.turn, self.repeat) for prompt in self.prompts]


@dataclass(frozen=True)
class Plan:
    """A checked config."""

    methods: tuple[PlannedMethod, ...]
    prompts: tuple[Prompt, ...]
    batch_size: int
    repeats: int
    seed: int
    target: str
    draft: str | None  # None when no method speculates
    metrics: tuple[str, ...] | None = None  # None: all that apply
    evaluator: str | None = None  # a further model that answers are scored by
    forecast: bool = True  # say what `specbeam forecast` would have predicted
    prompts_per_cell: int | None = None  # None: batch_size

    def cells(self) -> Iterator[Cell]:
        """Repeats outermost; each batch is answered by every method before the next, `in_turn`."""
        size = self.prompts_per_cell or self.batch_size
        position = 0
        for repeat in range(self.repeats):
            began = position
            for turn in range(max(prompt.answers for prompt in self.prompts)):
                asked = [prompt for prompt in self.prompts if turn < prompt.answers]
                for start in range(0, len(asked), size):
                    batch = tuple(asked[start : start + size])
                    for method in in_turn(self.methods, position):
                        yield Cell(method, batch, turn, repeat, f"{method.label}/{repeat}/{turn}/{batch[0].id}")
                    position += 1
            position += (position - began) % len(self.methods) == 0  # or a batch would keep its order

    def seed_of(self, prompt: Prompt, turn: int, repeat: int) -> int:
        """A row's own seed: it depends neither on the batch nor on the other prompts."""
        text = f"{self.seed}\n{prompt.id}\n{turn}\n{repeat}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def make_plan(config: dict[str, Any]) -> Plan:
    """Check the composed config of `specbeam compare`. Raises InputError, one sentence, for what makes no sense."""
    check_keys(config)
    for name in ("batch_size", "repeats", "max_new_tokens"):
        check_whole(name, config.get(name), 1)
    for name in ("limit", "per_category"):
        if config["prompt_set"].get(name) is not None:
            check_whole(f"prompt_set.{name}", config["prompt_set"][name], 1, "null for all")
    together = config.get("prompts_per_cell")
    if together is not None:
        check_whole("prompts_per_cell", together, config["batch_size"], "null for batch_size")
    check_whole("seed", config.get("seed"), 0)
    check_text("system_prompt", config.get("system_prompt"))
    check_text("output_dir", config.get("output_dir"))
    mode = config["wandb"].get("mode")
    if mode not in WANDB_MODES:
        raise InputError(
            f"wandb.mode is {mode!r}{nearest(str(mode), list(WANDB_MODES))}: use one of {', '.join(WANDB_MODES)}."
        )
    check_debug(config["debug"])
    methods = plan_methods(config.get("methods"), config.get("only"), config["max_new_tokens"])
    for name in ("trace", "forecast"):
        check_switch(name, config.get(name, False))
    if config.get("trace"):
        methods = tuple(traced(method) for method in methods)
    target = model_path(config, "target")
    if target is None:
        raise InputError("target.path is null: give the bundled target (bundled), a folder or a hub id.")
    draft = check_draft(methods, target, model_path(config, "draft"))
    prompts = prompts_from_config(config)
    from specbeam.experiment.ray_executor import check_executor

    check_executor(config)
    check_device_and_dtype("auto" if config["executor"] == "ray" else config.get("device"), config.get("dtype"))
    check_runner(config.get("runner") or "auto", config.get("precision"), config["draft"].get("precision"))
    check_placement(config.get("device_map"), None, config.get("runner") or "auto")
    from specbeam.experiment.quality import check_evaluator, check_metrics

    metrics = check_metrics(config.get("metrics"), prompts)
    evaluator = check_evaluator(config.get("evaluator"))
    return Plan(methods, tuple(prompts), config["batch_size"], config["repeats"], config["seed"], target, draft,
                metrics, evaluator, config.get("forecast", True), together)


def traced(method: PlannedMethod) -> PlannedMethod:
    """The method with its search tree kept, if it searches one and its settings do not say otherwise. The tree of
    speculative_beam is beam's, and keeping it costs steps: the losers need the target's scores too."""
    several = (method.options.get("num_beams") or DEFAULT_BEAMS) > 1
    if method.kind != "speculative_beam" and "trace" in method.method.options and several:
        return replace(method, options={"trace": True, **method.options})
    return method


def check_keys(config: dict[str, Any]) -> None:
    """Keys that `+` brought in and nothing reads; sections that are no sections."""
    for key in config:
        if key not in TOP_KEYS:
            raise InputError(
                f"There is no config key {key!r}{nearest(key, list(TOP_KEYS))}: specbeam compare --help lists them all."
            )
    for section, known in INNER_KEYS.items():
        value = config.get(section)
        if not isinstance(value, dict):
            raise InputError(f"{section} is {value!r}, but it has keys: {', '.join(f'{section}.{k}' for k in known)}.")
        for key in value:
            if key not in known:
                raise InputError(
                    f"There is no config key '{section}.{key}'"
                    f"{nearest(str(key), list(known))}: {section} has {', '.join(known)}."
                )


def plan_methods(methods: Any, only: Any, max_new_tokens: int) -> tuple[PlannedMethod, ...]:
    """The methods to run, in the order of `only`, else of the config. Every method is checked, also one that `only`
    leaves out."""
    if not isinstance(methods, dict) or not methods:
        raise InputError("methods is empty: name at least one, for example 'methods.greedy={kind: greedy}'.")
    planned = [plan_method(str(label), settings, max_new_tokens) for label, settings in methods.items()]
    if only is None:
        return tuple(planned)
    wanted = [only] if isinstance(only, str) else only
    if not isinstance(wanted, list) or not wanted:
        raise InputError(f"only is {only!r}: give a list of labels, or null to run them all.")
    labels = [method.label for method in planned]
    for label in wanted:
        if label not in labels:
            raise InputError(
                f"only names {label!r}, which is no label of methods{nearest(str(label), labels)}: "
                f"there are {', '.join(labels)}."
            )
    return tuple(planned[labels.index(label)] for label in dict.fromkeys(wanted))


def plan_method(label: str, settings: Any, max_new_tokens: int) -> PlannedMethod:
    """One entry of `methods`, or (label "") what `specbeam generate` was given."""
    place = f"methods.{label}." if label else ""  # what an option's name begins with
    if not isinstance(settings, dict):
        raise InputError(f"methods.{label} is {settings!r}, but settings are wanted, for example {{kind: greedy}}.")
    kind = settings.get("kind")
    if kind is None:
        raise InputError(f"methods.{label} has no kind: use one of {', '.join(METHODS)}.")
    if not isinstance(kind, str) or kind not in METHODS:
        raise InputError(
            f"{f'{place}kind' if label else 'method'} is {kind!r}{nearest(str(kind), list(METHODS))}: "
            f"use one of {', '.join(METHODS)}."
        )
    method = METHODS[kind]
    options = {
        "max_new_tokens": max_new_tokens,
        **{str(key): value for key, value in settings.items() if key != "kind"},
    }
    for name, value in options.items():
        check_option_name(place, kind, method, name)
        check_option_value(place, kind, name, value)
    if kind == "openai_server":
        check_server(place, options)
    if method.family in SAMPLED_FAMILIES and options.get("temperature") == 0:
        raise InputError(f"{place}temperature is 0, but {kind} samples: give a number above 0, or use a greedy kind.")
    check_beam_options(place, kind, method, options)
    if kind == "speculative":
        check_speculation(place, options)
    if method.speculates and method_family(kind, options) == "greedy":
        check_greedy(place, options)
    # null says "as the target's own generation_config": the same as leaving it out
    return PlannedMethod(label, kind, {name: value for name, value in options.items() if value is not None}, method)


def check_speculation(place: str, options: dict[str, Any]) -> None:
    """Drafter, tree and acceptance rule fit together; the draft itself is checked by `check_draft`."""
    branching = options.get("branching")
    if branching is not None and not (isinstance(branching, list) and branching):
        raise InputError(f"{place}branching is {branching!r}: give children per depth, as in [3,2,1,1].")
    for name in ("acceptance", "corpus", "costs"):
        check_text(f"{place}{name}", options.get(name))
    if options.get("drafter", "draft_model") not in DRAFTERS:
        near = nearest(str(options["drafter"]), list(DRAFTERS))
        raise InputError(f"{place}drafter is {options['drafter']!r}{near}: use one of {', '.join(DRAFTERS)}.")
    here = object()  # tokenizers and draft come with the models
    settings = speculation_settings(options, tokenizer=here, draft_tokenizer=here)
    try:
        settings.check(here)
    except InputError as error:
        raise InputError(f"{place}{error}") from None
    try:
        if settings.corpus is not None:
            check_corpus(settings.corpus)
        if settings.costs is not None:
            from specbeam.drafting.length import read_costs

            read_costs(settings.costs)
    except InputError as error:
        raise InputError(f"{place}{error}") from None


def speculation_settings(options: dict[str, Any], **more: Any) -> Settings:
    """The options of a method of kind speculative, as its drafters take them."""
    names = [name for name in Settings.__dataclass_fields__ if options.get(name) is not None]
    chosen: dict[str, Any] = {name: options[name] for name in names}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    return Settings(**(chosen | more))


def check_greedy(place: str, options: dict[str, Any]) -> None:
    """Options that only matter when a speculative method samples."""
    for name in SAMPLING_OPTIONS:
        value = options.get(name)
        if name != "temperature" and value is not None:
            raise InputError(
                f"{place}{name} is {value!r}, which has no effect at temperature 0 (greedy): leave it out, or give a "
                "temperature above 0."
            )


def check_option_name(place: str, kind: str, method: Method, name: str) -> None:
    if name in method.options or name == "max_new_tokens":
        return
    if name in RESERVED:
        raise InputError(f"{place}{name} cannot be set: {RESERVED[name]}.")
    if name == "draft_length":
        raise InputError(f"{place}draft_length has no effect: {kind} does not draft.")
    if name in SAMPLING_OPTIONS and method.family not in SAMPLED_FAMILIES and not (
        method.speculates and method.family == "greedy"
    ):
        sampling = ", ".join(other for other, row in METHODS.items() if row.family in SAMPLED_FAMILIES)
        raise InputError(f"{place}{name} has no effect: {kind} does not sample; the kinds {sampling} do.")
    if name in BEAM_OPTIONS and method.family not in BEAM_FAMILIES:
        beams = ", ".join(other for other, row in METHODS.items() if row.family in BEAM_FAMILIES)
        raise InputError(f"{place}{name} has no effect: {kind} keeps one hypothesis; the kinds {beams} keep more.")
    if name == "trace":
        traceable = ", ".join(other for other, row in METHODS.items() if "trace" in row.options)
        raise InputError(f"{place}trace has no effect: it keeps the search tree of the kinds {traceable}.")
    known = [*method.options, *(option for option in generation_options() if option not in RESERVED)]
    if name not in known:
        raise InputError(
            f"{place}{name} is no option of {kind}{nearest(name, known)}: options are "
            f"{', '.join(method.options) + ' and ' if method.options else ''}"
            "the names of transformers' GenerationConfig."
        )


def check_option_value(place: str, kind: str, name: str, value: Any) -> None:
    if value is None:
        return
    if name == "stop_strings":
        strings = [value] if isinstance(value, str) else value
        if not (isinstance(strings, list) and strings and all(isinstance(one, str) and one for one in strings)):
            raise InputError(f"{place}stop_strings is {value!r}: give a string or a list of strings, none empty.")
    if name == "trace":
        check_switch(f"{place}trace", value)
    if name == "early_stopping" and not (isinstance(value, bool) or value == "never"):
        raise InputError(f"{place}early_stopping is {value!r}: use true, false or never.")
    adapts = name == "draft_length" and kind in ("speculative", "speculative_beam")
    if name not in RANGES or (adapts and value == "auto"):
        return
    number_type, low, closed, high = RANGES[name]
    number = isinstance(value, int if number_type is int else (int, float)) and not isinstance(value, bool)
    if number and (low < value <= high or (closed and value == low)):
        return
    what = f"{'auto or ' * adapts}{'a whole number' if number_type is int else 'a number'}"
    above = "" if low == float("-inf") else f" {'of at least' if closed else 'above'} {low:g}"
    below = "" if high == float("inf") else f" and at most {high:g}"
    raise InputError(f"{place}{name} is {value!r}: give {what}{above}{below}.")


def check_whole(name: str, value: Any, least: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(
            f"{name} is {value!r}: give a whole number of at least {least}{f', or {otherwise}' if otherwise else ''}."
        )


def check_text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {value!r}: give a string or null.")


def model_path(config: dict[str, Any], role: str) -> str | None:
    section = config.get(role)
    if section is not None and not isinstance(section, dict):
        raise InputError(f"{role} is {section!r}: give {role}.path=<folder or hub id>, or {role}=<preset>.")
    path = (section or {}).get("path")
    if path is None:
        return None
    if not isinstance(path, str) or not path.strip():
        raise InputError(f"{role}.path is {path!r}: give bundled, a folder or a hub id.")
    check_path(path)
    return path


def check_draft(methods: tuple[PlannedMethod, ...], target: str, draft: str | None) -> str | None:
    """The draft to load: None when no method speculates. Raises InputError when one does and there is none."""
    speculative = [method.label for method in methods if method.needs_draft]
    if not speculative and not any(method.options.get("drafter") == "combined" for method in methods):
        return None
    if draft is None and speculative:
        plain = [method.label for method in methods if not method.needs_draft]
        without = (
            f"leave the speculative methods out with 'only=[{','.join(plain)}]'" if plain else "choose another method"
        )
        they = f"{in_words([label or 'this method' for label in speculative])} need{'s' * (len(speculative) == 1)}"
        raise InputError(
            f"{they} a draft model, and {target} has none: give one of the same vocabulary with draft.path=<folder or "
            f"hub id>, use another drafter (drafter: prompt_lookup), or {without}."
        )
    return draft


def in_words(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def check_debug(debug: Any) -> None:
    check_switch("debug.render_input_text", debug.get("render_input_text") if isinstance(debug, dict) else debug)


def check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: use true or false.")


def check_device_and_dtype(device: Any, dtype: Any) -> None:
    """Raises InputError for a device this machine lacks and for a dtype that is none (needs torch)."""
    from specbeam.models import resolve_device, resolve_dtype

    check_text("device", device)
    check_text("dtype", dtype)
    resolve_dtype(dtype or "auto", resolve_device(device or "auto"))


@cache
def generation_options() -> tuple[str, ...]:
    """The names of transformers' GenerationConfig."""
    from transformers import GenerationConfig

    return tuple(name for name in vars(GenerationConfig()) if not name.startswith("_"))
