"""What the caller asked for, settled once: prompts, options, processors, stopping.

Options are transformers' GenerationConfig names. What the caller leaves unset comes from the target's own
generation_config, as in `generate`; the settling itself is transformers' code. Only the method decides whether it
samples.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from specbeam.engine.runner import embedding
from specbeam.errors import InputError

# What `generate` would do with these, our methods do not: set by the caller they are refused, never ignored.
REFUSED = {
    "guidance_scale": (None, 1), "watermarking_config": (None,), "penalty_alpha": (None, 0), "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,), "num_beam_groups": (None, 1), "diversity_penalty": (None, 0),
    "constraints": (None,), "force_words_ids": (None,), "token_healing": (None, False), "use_cache": (None, True),
    "cache_implementation": (None,), "low_memory": (None, False), "output_scores": (None, False),
    "output_logits": (None, False), "output_attentions": (None, False), "output_hidden_states": (None, False),
    "encoder_repetition_penalty": (None, 1), "encoder_no_repeat_ngram_size": (None, 0),
    "assistant_early_exit": (None,), "return_dict_in_generate": (None, False, True),
    "num_assistant_tokens": (None,), "num_assistant_tokens_schedule": (None,),
    "assistant_confidence_threshold": (None,), "max_matching_ngram_size": (None,),
}
# Also in force when they come from the checkpoint's generation_config, where they would change the output.
REFUSED_FROM_CHECKPOINT = ("guidance_scale", "watermarking_config", "penalty_alpha", "dola_layers", "token_healing",
                           "diversity_penalty", "constraints", "force_words_ids")


@dataclass(frozen=True)
class Row:
    """One prompt of the batch."""

    prompt: list[int]
    max_new_tokens: int
    processors: LogitsProcessorList
    generator: torch.Generator
    padding: tuple[int, ...] = ()  # before the prompt, for the caller's own code alone
    impossible: set[tuple[int, ...]] = field(default_factory=set)  # texts that nothing may follow, of this round

    @cached_property
    def ids(self) -> np.ndarray:
        return np.array(self.prompt)

    def then(self, answer: np.ndarray) -> np.ndarray:
        """The prompt and an answer to it."""
        return np.concatenate([self.ids, answer])


@dataclass(frozen=True)
class Request:
    """A batch, ready to run."""

    rows: list[Row]
    config: GenerationConfig
    eos: frozenset[int]
    stopping: StoppingCriteriaList  # beside EOS and length
    streamer: Any
    trace: bool  # keep the tree of a beam search
    batch_size: int | None = None  # rows that run at once; None: all


def settle(
    target: Any, input_ids: Tensor | Sequence[Tensor] | Request, attention_mask: Tensor | None, *,
    sampled: bool, beams: tuple[int, int] = (1, 1), seed: int | Sequence[int] = 0, tokenizer: Any = None,
    streamer: Any = None, trace: bool = False, searches: bool = False, batch_size: int | None = None,
    logits_processor: LogitsProcessorList | None = None, stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    generation_config: GenerationConfig | None = None, **options: Any,
) -> Request:
    """beams: num_beams and num_return_sequences. searches: there is a search tree, whatever num_beams. A batch that is
    settled already (transformers.py) stays as it is. Raises InputError, in one sentence, for anything that cannot be
    honoured."""
    if isinstance(input_ids, Request):
        return input_ids
    _check_names(options)
    prompts = prompt_rows(input_ids, attention_mask)
    _check_tokens(prompts, embedding(target).shape[0])
    if trace not in (True, False) or (trace and beams[0] == 1 and not searches):
        raise InputError(f"trace is {trace!r}: true keeps the search tree of beam search with two beams or more; other "
                         "methods have none.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1 or beams[0] > 1 or searches):
        raise InputError(f"batch_size is {batch_size!r}: give how many rows run at once, at least 1; beam search runs "
                         "all of its rows together.")
    if streamer is not None and len(prompts) > 1:
        raise InputError(f"streamer was given with a batch of {len(prompts)} prompts, whose rows grow at different "
                         "speeds: stream one prompt at a time.")
    no_length = not any((options.get("max_length"), generation_config and generation_config.max_length,
                         target.generation_config.max_length))
    fixed = {"do_sample": sampled, "num_beams": beams[0], "num_return_sequences": beams[1]}
    if generation_config is not None:  # transformers warns when an option comes beside a whole configuration
        generation_config = copy.deepcopy(generation_config)
        _said(partial(generation_config.update, **fixed))
    else:
        options |= fixed
    config, _ = _said(partial(target._prepare_generation_config, generation_config, **options))
    if no_length:
        config.max_length = None  # transformers' default of 20 is of new tokens, not of the whole
    _check_values(config, options, target)
    target._prepare_special_tokens(config, True, device=target.device, batch_size=len(prompts))
    eos = frozenset() if config._eos_token_tensor is None else frozenset(config._eos_token_tensor.tolist())
    seeds = _seeds(seed, len(prompts))
    context = getattr(target.config, "max_position_embeddings", None)

    rows: list[Row] = []
    shared: dict[int, LogitsProcessorList] = {}  # prompts of one length, unless the caller's own code is among them
    for number, prompt in enumerate(prompts):
        own = copy.copy(config)
        own.max_length = len(prompt) + _room(config, len(prompt), context)
        if own.min_new_tokens is not None:
            own.min_length = len(prompt) + own.min_new_tokens
        impossible: set[tuple[int, ...]] = set()
        processors = _said(partial(
            target._get_logits_processor, generation_config=own, input_ids_seq_length=len(prompt),
            logits_processor=logits_processor or LogitsProcessorList(),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn and allowing(
                prefix_allowed_tokens_fn, number, embedding(target).shape[0], impossible),
            device=target.device))
        if not logits_processor and prefix_allowed_tokens_fn is None:
            processors = shared.setdefault(len(prompt), processors)
        generator = torch.Generator().manual_seed(seeds[number])
        rows.append(Row(prompt, own.max_length - len(prompt), processors, generator, impossible=impossible))

    stopping = copy.copy(config)
    stopping.max_length, stopping._eos_token_tensor = None, None  # these two are ours (rows.py)
    if stopping.stop_strings is not None and tokenizer is None:
        raise InputError(f"stop_strings={stopping.stop_strings!r} needs tokenizer=…, to know how tokens spell them.")
    criteria = target._get_stopping_criteria(stopping, stopping_criteria or StoppingCriteriaList(), tokenizer)
    return Request(rows, config, eos, criteria, streamer, trace, batch_size)


def allowing(asked: Callable[[int, Tensor], list[int]], row: int, vocabulary: int, impossible: set[tuple[int, ...]]
             ) -> Callable[[int, Tensor], Any]:
    """prefix_allowed_tokens_fn for one row: rows are processed one by one, so that transformers would call every row
    number 0.

    Where it allows nothing, transformers raises. But that may be behind a proposal that is never kept (or behind EOS):
    anything may follow there, and whoever gets there asks `refuse_impossible`."""
    def allowed(_: int, ids: Tensor) -> Any:
        found = asked(row, ids)
        if len(found):
            return found
        impossible.add(tuple(ids.tolist()))
        return torch.arange(vocabulary, device=ids.device)

    return allowed


def refuse_impossible(row: Row, answer: Sequence[int]) -> None:
    """Raises InputError where prefix_allowed_tokens_fn lets nothing follow this answer."""
    if row.impossible and (*row.padding, *row.prompt, *answer) in row.impossible:
        raise InputError(f"prefix_allowed_tokens_fn allows nothing after {len(answer)} new tokens (the last are "
                         f"{list(answer[-3:])}): let it allow at least one, such as the EOS id.")


def prompt_rows(input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None) -> list[list[int]]:
    """Token ids of each prompt without padding: from [rows, length] with a mask (padding on either side), or from a
    list of 1-D tensors."""
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise InputError("attention_mask was given with a list of prompts, which has no padding: leave it out.")
        if any(isinstance(row, str | int) for row in input_ids):
            raise InputError("input_ids is a list, but not of one sequence of token ids per prompt: give [rows, "
                             "length] or a list of 1-D tensors (text goes through the tokenizer first).")
        rows = [torch.as_tensor(row).flatten().tolist() for row in input_ids]
    elif input_ids.dim() != 2:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}: give [rows, length], or a list of 1-D "
                         "tensors.")
    elif attention_mask is None:
        rows = input_ids.tolist()
    elif attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids "
                         f"{tuple(input_ids.shape)}: they must be equal.")
    else:
        rows = [ids[seen].tolist() for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)]
    if not rows:
        raise InputError("input_ids has no rows: give at least one prompt.")
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise InputError(f"prompt {empty[0]} of {len(rows)} has no tokens: a model needs at least one to start from.")
    return rows


def _check_tokens(prompts: list[list[int]], size: int) -> None:
    for number, prompt in enumerate(prompts):
        if wrong := [token for token in prompt if not isinstance(token, int) or not 0 <= token < size]:
            raise InputError(f"prompt {number} of {len(prompts)} has the token id {wrong[0]}, but the target's ids are "
                             f"the whole numbers from 0 to {size - 1}.")


def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if wrong := [one for one in seeds if not isinstance(one, int) or not -2**63 <= one < 2**63 - rows]:
        raise InputError(f"seed is {wrong[0]!r}: give a whole number of 64 bits, or a list with one per row.")
    if not isinstance(seed, Sequence):
        return [seed + row for row in range(rows)]
    if len(seeds) != rows:
        raise InputError(f"seed has {len(seeds)} entries for {rows} prompts: give one number, or one per row.")
    return seeds


def _said(ask: Callable[[], Any]) -> Any:
    """What transformers answers; its complaint about an option becomes ours."""
    try:
        return ask()
    except (ValueError, TypeError) as error:
        raise InputError(f"transformers does not take these options: {str(error).splitlines()[0]}") from error


def _room(config: GenerationConfig, prompt_tokens: int, context: int | None) -> int:
    """How many new tokens a prompt of this length may have: `max_new_tokens`, else `max_length`, else 20 (or what is
    left of the context)."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return min(20, context - prompt_tokens) if context is not None and prompt_tokens < context else 20
    if config.max_length <= prompt_tokens:
        raise InputError(f"max_length is {config.max_length}, but the prompt alone has {prompt_tokens} tokens: set "
                         "max_new_tokens instead.")
    return config.max_length - prompt_tokens


def check_name(name: str) -> None:
    """Raises InputError, with the nearest real name, for what is no option of transformers' GenerationConfig."""
    known = [known for known in vars(GenerationConfig()) if not known.startswith("_")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise InputError(f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else
                         "; options are those of transformers' GenerationConfig."))


def _check_names(options: dict[str, Any]) -> None:
    for name in options:
        if name == "do_sample":
            raise InputError("do_sample is not an option here: the method says it (greedy_generate, sample_generate, "
                             "beam_sample_generate, speculative_generate with temperature > 0).")
        if name in ("num_beams", "num_return_sequences"):  # beam_generate takes them by name
            if options[name] in (None, 1):
                continue
            raise InputError(f"{name}={options[name]!r} belongs to beam search: use beam_generate, or leave it out.")
        check_name(name)


def _check_values(config: GenerationConfig, options: dict[str, Any], target: Any) -> None:
    for name, harmless in REFUSED.items():
        value = getattr(config, name, None)
        if value not in harmless and (name in options or name in REFUSED_FROM_CHECKPOINT):
            raise InputError(f"{name}={value!r} is not supported by specbeam's methods: leave it out, or use a "
                             "transformers_* method.")
    for name in ("max_new_tokens", "max_length"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {value!r}: it must be a whole number of at least 1.")
    if config.do_sample and config.temperature is not None and config.temperature <= 0:
        raise InputError(f"temperature is {config.temperature}: sampling needs one above 0 (greedy decoding is the "
                         "limit of 0: use greedy_generate).")
    size = embedding(target).shape[0]
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for token in ids:
        if token is not None and "eos_token_id" in options and not 0 <= token < size:
            raise InputError(f"eos_token_id={token} is not a token of the target, which has {size}.")
