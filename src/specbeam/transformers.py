"""Our methods inside transformers: `model.generate(**inputs, custom_generate=speculative(draft), max_new_tokens=64)`.

transformers reads the arguments, prepares inputs, generation config, logits processors and stopping criteria, and calls
what these functions return in place of its own loop; what comes back is what its loop would return: a tensor of
sequences, padded as there, or with `return_dict_in_generate=True` its own output classes.
Exact: greedy, speculative (do_sample=False), beam and speculative_beam return what `generate` returns without
`custom_generate`; with do_sample=True the distribution is the same.
Every option of the generation config is honoured or refused by name (InputError).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from specbeam.decoding import METHODS
from specbeam.decoding.beam import beam_generate
from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.request import REFUSED, REFUSED_FROM_CHECKPOINT, Request, Row, allowing
from specbeam.decoding.sample import sample_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.decoding.speculative_beam import speculative_beam_generate
from specbeam.engine.runner import embedding
from specbeam.errors import InputError
from specbeam.trace import GenerationOutput, SearchTree

Decode = Callable[..., Any]  # what `generate` takes as custom_generate

HONOURED = frozenset((
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings",
    "do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "output_scores",
    "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id"))
# `generate` itself does not read these for a decoder, or only asks how to run (we compile nothing behind its back).
WITHOUT_EFFECT = frozenset(("decoder_start_token_id", "disable_compile", "transformers_version"))


def greedy(*, stop_strings: str | list[str] | None = None, tokenizer: Any = None) -> Decode:
    """Greedy decoding. Like all functions here, for `model.generate(…, custom_generate=greedy())`.

    stop_strings, with the tokenizer that spells them: here and not in `generate`, which would drop the tokenizer on the
    way. Raises InputError, from `generate`, for options that cannot be honoured.
    """
    def run(target: PreTrainedModel, request: Request) -> GenerationOutput:
        return greedy_generate(target, cast(Any, request))

    return _decode("greedy", run, samples=False, stop=(stop_strings, tokenizer))


def sample(*, seed: int | None = None, stop_strings: str | list[str] | None = None, tokenizer: Any = None) -> Decode:
    """Sampling with `do_sample=True`, its temperature, top_k, …; with `num_return_sequences`, that many a prompt.

    seed: row b draws with seed + b; None: from torch's generator, so that `torch.manual_seed` decides.
    """
    def run(target: PreTrainedModel, request: Request) -> GenerationOutput:
        return sample_generate(target, cast(Any, request))

    return _decode("sample", run, samples=True, stop=(stop_strings, tokenizer), seed=seed)


def speculative(draft: PreTrainedModel | None = None, *, seed: int | None = None,
                stop_strings: str | list[str] | None = None, tokenizer: Any = None, **settings: Any) -> Decode:
    """Speculative decoding: greedy, or with `do_sample=True` (which may be the checkpoint's own) sampling.

    settings: `draft_length`, `drafter`, `branching`, … of `specbeam.speculative_generate`; draft is None for drafters
    without a model. In batches too; with `num_return_sequences` if it samples.
    """
    def run(target: PreTrainedModel, request: Request) -> GenerationOutput:
        temperature = float(request.config.temperature or 1.0) if request.config.do_sample else 0.0
        return speculative_generate(target, draft, cast(Any, request), temperature=temperature, tokenizer=tokenizer,
                                    **settings)

    return _decode("speculative", run, samples=None, stop=(stop_strings, tokenizer), seed=seed)


def beam(*, stop_strings: str | list[str] | None = None, tokenizer: Any = None) -> Decode:
    """Beam search; `num_beams` (at least 2), `length_penalty`, `early_stopping`, … are `generate`'s."""
    def run(target: PreTrainedModel, request: Request) -> GenerationOutput:
        return beam_generate(target, cast(Any, request), **_widths(request))

    return _decode("beam", run, samples=False, stop=(stop_strings, tokenizer), beams=True)


def speculative_beam(draft: PreTrainedModel | None = None, *, stop_strings: str | list[str] | None = None,
                     tokenizer: Any = None, **settings: Any) -> Decode:
    """Speculative beam search: `beam`'s hypotheses, order and scores, with the draft looking ahead.

    settings: `draft_length`, `draft_beams`, `drafter`, … of `specbeam.speculative_beam_generate`; draft is None for
    drafters without a model.
    """
    own = settings_of("speculative_beam")
    if wrong := sorted(set(settings) - set(own)):
        raise InputError(f"{wrong[0]} is no setting of speculative_beam: it takes {', '.join(own)}.")

    def run(target: PreTrainedModel, request: Request) -> GenerationOutput:
        return speculative_beam_generate(target, draft, cast(Any, request), tokenizer=tokenizer, **settings,
                                         **_widths(request))

    return _decode("speculative_beam", run, samples=False, stop=(stop_strings, tokenizer), beams=True)


def settings_of(method: str) -> tuple[str, ...]:
    """A method's own options that mean something here; what `generate` returns has no place for a search tree."""
    return tuple(name for name in METHODS[method].options if name != "trace")


def generate(model: PreTrainedModel, *, method: str = "speculative", draft: PreTrainedModel | None = None,
             assistant_model: PreTrainedModel | None = None, stop_strings: str | list[str] | None = None,
             tokenizer: Any = None, **arguments: Any) -> Any:
    """`model.generate` by one of our methods: what a `custom_generate/generate.py` in a repository calls.

    method: greedy, sample, speculative, beam or speculative_beam. draft (or assistant_model): for the speculative ones.
    arguments: theirs (`draft_length`, `seed`, …) and `generate`'s.
    """
    methods: dict[str, Callable[..., Decode]] = {
        "greedy": greedy, "sample": sample, "speculative": speculative, "beam": beam,
        "speculative_beam": speculative_beam}
    if method not in methods:
        raise InputError(f"method is {method!r}: it is one of {', '.join(methods)}.")
    if draft is not None and assistant_model is not None:
        raise InputError("draft and assistant_model were both given: they are two names of one model.")
    if "trace" in arguments:
        raise InputError("trace was given, but what generate returns has no place for a search tree: leave it out, or "
                         "call specbeam.beam_generate(…, trace=True).")
    own = settings_of(method) + (("seed",) if method in ("sample", "speculative") else ())
    settings = {name: arguments.pop(name) for name in own if name in arguments}
    draft = draft if draft is not None else assistant_model
    if method.startswith("speculative"):
        settings["draft"] = draft
    elif draft is not None:
        raise InputError(f"a draft was given, but {method} runs the target alone: leave it out.")
    chosen = methods[method](stop_strings=stop_strings, tokenizer=tokenizer, **settings)
    return cast(Any, model).generate(custom_generate=chosen, **arguments)


def _widths(request: Request) -> dict[str, Any]:
    return {"num_beams": request.config.num_beams, "num_return_sequences": request.config.num_return_sequences}


def _decode(name: str, run: Callable[[PreTrainedModel, Request], GenerationOutput], *, samples: bool | None,
            stop: tuple[str | list[str] | None, Any], beams: bool = False, seed: int | None = None) -> Decode:
    """The callable for `generate`. samples: must do_sample be true, must it be false, or may it be either (None)."""
    if stop[0] is not None and stop[1] is None:
        raise InputError(f"stop_strings={stop[0]!r} needs tokenizer=…, to know how tokens spell them.")

    # The parameters' names are those of transformers' own loops: others would be taken out of generate's arguments.
    def decode(model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
               stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, synced_gpus: bool = False,
               streamer: Any = None, **model_kwargs: Any) -> Any:
        lost = _dropped()
        streamer = streamer if streamer is not None else lost.get("streamer")
        for argument in ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask"):
            if lost.get(argument) is not None:
                raise InputError(f"{argument} was given to generate, beside custom_generate={name}(…) which does not "
                                 "read it: leave it out (a draft goes into speculative(draft)).")
        if synced_gpus or lost.get("synced_gpus"):
            raise InputError(f"synced_gpus is set (FSDP or DeepSpeed), which {name} does not support.")
        _check_config(name, model, generation_config, beams, samples)
        width = generation_config.num_beams if beams else 1
        if beams and streamer is not None:
            raise InputError("streamer was given to beam search, whose answer is only known at its end: leave it out.")
        if streamer is not None and len(input_ids) > 1:
            raise InputError(f"streamer was given with {len(input_ids)} rows, which grow at different speeds: stream "
                             "one prompt at a time.")
        _check_inputs(name, model, input_ids, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        keeper = _Keeper(len(input_ids) // width) if _keeps(generation_config) else None
        criteria = StoppingCriteriaList(
            one for one in stopping_criteria if not isinstance(one, MaxLengthCriteria | EosTokenCriteria))
        if stop[0] is not None:
            criteria.append(StopStringCriteria(stop[1], stop[0]))
        rows = _rows(input_ids[::width], mask[::width], width, logits_processor, generation_config, keeper, seed,
                     embedding(model).shape[0])
        eos = generation_config._eos_token_tensor
        pad = generation_config._pad_token_tensor
        if pad is None and len(rows) > 1 and (criteria or eos is not None):
            raise InputError("there is no pad_token_id, and rows of a batch may end at different lengths: give "
                             "pad_token_id=… to generate.")
        request = Request(rows, generation_config, frozenset() if eos is None else frozenset(eos.tolist()), criteria,
                          None if streamer is None else _AfterPrompt(streamer), trace=beams and keeper is not None)
        out = run(model, request)
        filler = -1 if pad is None else int(pad)
        if beams:  # as there, where padding of 0 counts as none
            filler = -1 if eos is None else filler if filler > 0 else int(eos[0])
        return (_beam_output if beams else _output)(out, input_ids[::width], generation_config, filler, keeper, request)

    return decode


def _dropped() -> dict[str, Any]:
    """Arguments of the `generate` call that is running: transformers (5.17 and 5.23) drops some of them, the streamer
    too, on the way to a callable. They are only to be found in its frame; {} where it is not the caller."""
    frame = sys._getframe(2)
    own = {getattr(GenerationMixin.generate, "__wrapped__", GenerationMixin.generate).__code__}
    return dict(frame.f_locals) if frame.f_code in own else {}


def _keeps(config: GenerationConfig) -> bool:
    return bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))


def _check_config(name: str, model: PreTrainedModel, config: GenerationConfig, beams: bool, samples: bool | None
                  ) -> None:
    """Raises InputError for an option that this method cannot honour. What the checkpoint's own generation_config says
    is refused only where it would change the output."""
    defaults = config._get_default_generation_params()
    for option, value in vars(config).items():
        if option.startswith("_") or option in HONOURED or option in WITHOUT_EFFECT or value is None:
            continue
        own = getattr(model.generation_config, option, None)
        harmless = value in (*REFUSED.get(option, ()), defaults.get(option)) or value is False
        if option == "use_cache":
            harmless = bool(value)
        if not harmless and (value != own or option in REFUSED_FROM_CHECKPOINT):
            raise InputError(f"{option}={value!r} is not supported by specbeam's {name}: leave it out, or call "
                             "generate without custom_generate.")
    if samples is not None and bool(config.do_sample) != samples:
        wanted = "pass do_sample=True" if samples else "pass do_sample=False, or use sample() or speculative(draft)"
        raise InputError(f"do_sample is {config.do_sample} (if you did not say so, the checkpoint's generation_config "
                         f"does), but {name} {'only' if samples else 'never'} samples: {wanted}.")
    if beams and config.num_beams < 2:
        raise InputError(f"num_beams is {config.num_beams}, but {name} needs at least 2: pass num_beams=4, or use "
                         "greedy() or speculative(draft).")
    if not beams and config.num_beams > 1:
        raise InputError(f"num_beams={config.num_beams} belongs to beam search, but {name} has no beams: use beam() or "
                         "speculative_beam(draft).")
    if beams and config.output_logits and config.return_dict_in_generate:
        raise InputError(f"output_logits is not supported by {name}, which keeps processed log-probabilities only: ask "
                         "for output_scores.")


def _check_inputs(name: str, model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raises InputError for model inputs that our engine would not read."""
    if model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__} is an encoder-decoder, and specbeam's methods are for decoders.")
    mask = model_kwargs.get("attention_mask")
    if input_ids.shape[1] == 0 or (mask is not None and not bool(mask.any(1).all())):
        raise InputError("a row of input_ids has no tokens: a model needs at least one to start from.")
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("input_ids are padded on the right, where a decoder would continue from padding: set the "
                         "tokenizer's padding_side to \"left\".")
    for key, value in model_kwargs.items():
        if value is None or key in ("attention_mask", "use_cache", "logits_to_keep", "output_attentions",
                                    "output_hidden_states", "cache_position"):
            continue
        if key == "position_ids":
            seen = torch.ones_like(input_ids) if mask is None else mask.long()
            expected = (seen.cumsum(-1) - 1)[seen.bool()]
            if torch.equal(value.expand_as(seen)[seen.bool()].to(expected), expected):
                continue
        elif key == "past_key_values":
            if not getattr(value, "_is_user_defined", False) and value.get_seq_length() == 0:
                continue  # made by `generate`, and empty: we have slots of our own
        elif key == "token_type_ids" and "gemma3" in model.config.model_type and not bool(value.any()):
            continue  # text only, which is what they are read for
        raise InputError(f"{key} was given to generate, but specbeam's {name} reads input_ids and attention_mask only: "
                         "leave it out, or call generate without custom_generate.")


def _rows(input_ids: Tensor, mask: Tensor, width: int, processors: LogitsProcessorList, config: GenerationConfig,
          keeper: _Keeper | None, seed: int | None, vocabulary: int) -> list[Row]:
    """The batch as our methods want it. The caller's code sees what it sees in `generate`: padding and all."""
    if seed is None:
        seeds = torch.randint(2**62, (len(input_ids),)).tolist() if config.do_sample else [0] * len(input_ids)
    else:
        seeds = [seed + row for row in range(len(input_ids))]
    apart = keeper is not None or any(isinstance(one, PrefixConstrainedLogitsProcessor) for one in processors)
    shared: dict[int, LogitsProcessorList] = {}  # rows with as much padding go through one list together
    rows = []
    for number, (ids, seen) in enumerate(zip(input_ids.tolist(), mask.bool().tolist(), strict=True)):
        prompt = [token for token, real in zip(ids, seen, strict=True) if real]
        padding = tuple(token for token, real in zip(ids, seen, strict=True) if not real)
        impossible: set[tuple[int, ...]] = set()
        own = LogitsProcessorList(_for_row(one, number, number * width, vocabulary, impossible) for one in processors)
        if padding and own:
            own = LogitsProcessorList([_Padded(padding, own)])
        own = shared.setdefault(number if apart else len(padding), own)
        if keeper is not None:
            own = keeper.around(number, own)
        rows.append(Row(prompt, config.max_length - len(ids), own, torch.Generator().manual_seed(seeds[number]),
                        padding, impossible))
    return rows


def _for_row(processor: LogitsProcessor, row: int, place: int, vocabulary: int, impossible: set[tuple[int, ...]]
             ) -> LogitsProcessor:
    """What a processor is for one row alone: transformers' own that count the rows of a batch would miscount ours,
    which leave it. place: of the row among those that `generate` made of the batch (num_beams times as many)."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        asked = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(allowing(asked, row, vocabulary, impossible), 1)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        skipped = processor.prompt_ignore_length  # of each row, its padding (since 5.2x; before: none)
        if isinstance(skipped, Tensor):
            return RepetitionPenaltyLogitsProcessor(processor.penalty, int(skipped[place]))
    return processor


class _Padded(LogitsProcessor):
    """Processors that are to see the padding before a row's prompt, as they do in `generate`."""

    def __init__(self, padding: Sequence[int], inner: LogitsProcessorList):
        self.padding, self.inner = padding, inner

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        padding = torch.tensor(self.padding, device=input_ids.device).expand(len(input_ids), -1)
        return self.inner(cast(Any, torch.cat([padding, input_ids], 1)), scores)


class _Keeper:
    """Scores of every text that was looked at: afterwards those of the text that became output are picked out. Drafts
    go through the same processors, but the target scores a text last."""

    def __init__(self, rows: int):
        self.raw: list[dict[tuple[int, ...], Tensor]] = [{} for _ in range(rows)]
        self.processed: list[dict[tuple[int, ...], Tensor]] = [{} for _ in range(rows)]

    def around(self, row: int, inner: LogitsProcessorList) -> LogitsProcessorList:
        return LogitsProcessorList([partial(_keep, self.raw[row]), *inner, partial(_keep, self.processed[row])])

    def steps(self, kept: list[dict[tuple[int, ...], Tensor]], paths: list[list[list[tuple[int, ...]]]]
              ) -> tuple[Tensor, ...]:
        """paths[row][step]: the texts whose scores are wanted. [rows × texts, vocabulary] a step; a row that has
        ended has zeros."""
        width = max(len(row[0]) for row in paths)
        none = torch.zeros_like(next(iter(kept[0].values())))
        return tuple(torch.stack([kept[number][row[step][place]] if step < len(row) else none
                                  for number, row in enumerate(paths) for place in range(width)])
                     for step in range(max(map(len, paths))))


def _keep(kept: dict[tuple[int, ...], Tensor], input_ids: Tensor, scores: Tensor) -> Tensor:
    # Of one text's places in a call the first counts: behind shorter proposals lie pads, which repeat the text.
    texts = [tuple(ids) for ids in input_ids.tolist()]
    kept |= {text: scores[place].clone() for place, text in reversed(list(enumerate(texts)))}
    return scores


class _AfterPrompt:
    """A streamer that `generate` has already given the prompt; it gets one token at a time, as there."""

    def __init__(self, inner: Any):
        self.inner, self.prompt = inner, True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            for token in value:
                self.inner.put(token[None])
        self.prompt = False

    def end(self) -> None:
        self.inner.end()


def _sequences(input_ids: Tensor, answers: list[list[int]], filler: int) -> Tensor:
    """[answers, length] long: prompts and answers, as many answers to each prompt, padded on the right."""
    longest = max(map(len, answers))
    new = torch.tensor([[*tokens, *[filler] * (longest - len(tokens))] for tokens in answers], dtype=torch.long,
                       device=input_ids.device)
    return torch.cat([input_ids.repeat_interleave(len(answers) // len(input_ids), 0), new], 1)


def _output(out: GenerationOutput, input_ids: Tensor, config: GenerationConfig, filler: int, keeper: _Keeper | None,
            request: Request) -> Tensor | GenerateDecoderOnlyOutput:
    sequences = _sequences(input_ids, out.tokens, filler)
    if not config.return_dict_in_generate:
        return sequences
    scores = logits = None
    if keeper is not None:
        paths = [[[tuple(row.prompt + tokens[:step])] for step in range(len(tokens))]
                 for row, tokens in zip(request.rows, out.tokens, strict=True)]
        scores = keeper.steps(keeper.processed, paths) if config.output_scores else None
        logits = keeper.steps(keeper.raw, paths) if config.output_logits else None
    return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences), scores=cast(Any, scores),
                                     logits=cast(Any, logits))


def _beam_output(out: GenerationOutput, input_ids: Tensor, config: GenerationConfig, filler: int,
                 keeper: _Keeper | None, request: Request) -> Tensor | GenerateBeamDecoderOnlyOutput:
    best = [(row, one) for row, found in enumerate(out.hypotheses) for one in found]
    sequences = _sequences(input_ids, [one.tokens for _, one in best], filler)
    if not config.return_dict_in_generate:
        return sequences
    longest = max(len(one.tokens) for _, one in best)
    # As there: -1 behind the end, and beams numbered through the whole batch.
    indices = torch.tensor([[row * config.num_beams + origin for origin in one.beams or ()]
                            + [-1] * (longest - len(one.tokens)) for row, one in best], dtype=torch.int32,
                           device=input_ids.device)
    scores = None
    if keeper is not None:
        assert out.search is not None
        paths = [_running(tree, tuple(row.prompt), config.num_beams)
                 for row, tree in zip(request.rows, out.search, strict=True)]
        scores = keeper.steps(keeper.processed, paths)
    found = torch.tensor([one.score for _, one in best], device=input_ids.device) if config.output_scores else None
    return GenerateBeamDecoderOnlyOutput(sequences=cast(Any, sequences), sequences_scores=cast(Any, found),
                                         scores=cast(Any, scores), beam_indices=cast(Any, indices))


def _running(tree: SearchTree, prompt: tuple[int, ...], num_beams: int) -> list[list[tuple[int, ...]]]:
    """The texts of the running beams before each step of a search."""
    texts, steps = [prompt] * num_beams, []
    for step in tree.steps:
        steps.append(texts)
        survivors = {one.survived_as: texts[one.beam] + (one.token,) for one in step.candidates
                     if one.survived_as is not None}
        texts = [survivors.get(beam, prompt) for beam in range(num_beams)]
    return steps
