"""transformers' own `generate` as a peer: the same models, options and clock, the same trace.

`generate` runs as its users call it; three light observers see where time and tokens went. Its stopping criteria
are asked once a step, so one of ours marks the clock there: the first mark ends prefill, every later one a round. A
forward hook on the target sees which tokens were put up for verification. On a GPU a mark is an event in the
stream, so nothing waits for it. Tokens are read, and seconds worked out, after `generate` has returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging as transformers_logging

from specbeam.decoding.request import check_name, prompt_rows
from specbeam.decoding.rows import Clock
from specbeam.errors import InputError
from specbeam.trace import GenerationOutput, Hypothesis, Round, RowTrace

# A checkpoint's generation_config may switch `generate` to another method; only the caller's method decides.
_ONE_METHOD = {"num_beams": 1, "num_return_sequences": 1, "penalty_alpha": None, "dola_layers": None,
               "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "num_beam_groups": None}
# Handed to `generate` as they are; everything else must be a GenerationConfig name.
_GENERATE_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "negative_prompt_ids",
                       "negative_prompt_attention_mask")


def transformers_greedy(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                        attention_mask: Tensor | None = None, **options: Any) -> GenerationOutput:
    """`generate(do_sample=False)`: input_ids long [rows, length], padded on either side as `attention_mask` says, or
    a list of 1-D tensors. Options as for our methods. Raises InputError for an unknown one."""
    return _plain(target, input_ids, attention_mask, options, do_sample=False)


def transformers_sample(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                        attention_mask: Tensor | None = None, **options: Any) -> GenerationOutput:
    """`generate(do_sample=True)`. As there, an unset top_k is the checkpoint's, else 50.

    `generate` draws all rows from one global generator, which is seeded here and put back afterwards: with `seed`
    the batch is reproducible, a row by itself is not (of a list of seeds, the first counts).
    """
    return _plain(target, input_ids, attention_mask, options, do_sample=True)


def transformers_beam(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                      attention_mask: Tensor | None = None, *, num_beams: int = 4,
                      **options: Any) -> GenerationOutput:
    """`generate(num_beams=…)`: hypotheses best first, `score` its `sequences_scores`. One beam is greedy decoding."""
    if num_beams == 1:
        return transformers_greedy(target, input_ids, attention_mask, **options)
    return _beams(target, input_ids, attention_mask, num_beams, options, do_sample=False)


def transformers_beam_sample(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                             attention_mask: Tensor | None = None, *, num_beams: int = 4,
                             **options: Any) -> GenerationOutput:
    """`generate(num_beams=…, do_sample=True)`; `seed` as in `transformers_sample`, which one beam is."""
    if num_beams == 1:
        return transformers_sample(target, input_ids, attention_mask, **options)
    return _beams(target, input_ids, attention_mask, num_beams, options, do_sample=True)


def _beams(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None,
           num_beams: int, options: dict[str, Any], *, do_sample: bool) -> GenerationOutput:
    call = _Call(target, prompt_rows(input_ids, attention_mask), options)
    observer = _Observer(call.clock, forget_scores=True)
    seconds, result = call.run(observer, do_sample=do_sample, num_beams=num_beams, return_dict_in_generate=True,
                               output_scores=True)
    per_row = len(result.sequences) // len(call.prompts)
    hypotheses: list[list[Hypothesis]] = [[] for _ in call.prompts]
    for number, (tokens, score, ancestry) in enumerate(zip(
            result.sequences[:, call.width:].tolist(), result.sequences_scores.tolist(),
            result.beam_indices.tolist(), strict=True)):
        length = sum(beam >= 0 for beam in ancestry)  # -1 where the sequence is padding
        tokens = tokens[:length]
        hypotheses[number // per_row].append(Hypothesis(
            tokens, score, call.finish_reason(tokens, number // per_row),
            tuple(beam % num_beams for beam in ancestry[:length])))
    steps = observer.rounds(call.width, [])[1:]
    traces = [RowTrace(len(prompt), 1, tuple(Round(0, 0, 1, step.seconds) for step in steps),
                       ("plain",) * len(best[0].tokens), tuple(range(len(best[0].tokens))), *seconds)
              for prompt, best in zip(call.prompts, hypotheses, strict=True)]
    return GenerationOutput(hypotheses, traces)


def transformers_assisted(target: PreTrainedModel, draft: PreTrainedModel, input_ids: Tensor | Sequence[Tensor],
                          attention_mask: Tensor | None = None, *, draft_length: int = 4, temperature: float = 0.0,
                          seed: int | Sequence[int] = 0, **options: Any) -> GenerationOutput:
    """`generate(assistant_model=draft)` with a fixed draft length; samples when `temperature` > 0.

    It refuses batches, so rows run one after the other, each with seconds of its own. Prefill ends with its first
    round, whose committed tokens are the row's first tokens. It looks for a stop string at the end of a round only:
    text behind one inside a round stays, as `generate` leaves it.
    Raises InputError where target and draft logits differ in width, which it refuses too.
    """
    if draft_length < 1:
        raise InputError(f"draft_length is {draft_length}: it must be at least 1.")
    widths = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if widths[0] != widths[1]:
        raise InputError(f"the target has {widths[0]} logits and the draft {widths[1]}: transformers' assisted "
                         "generation refuses that, leave transformers_assisted out.")
    prompts = prompt_rows(input_ids, attention_mask)
    seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    outputs = []
    with _fixed_draft_length(draft, draft_length):
        for prompt, row_seed in zip(prompts, seeds, strict=True):
            call = _Call(target, [prompt], dict(options, seed=row_seed))
            outputs.append(_assisted_row(call, draft, sampling))
    return GenerationOutput([row.hypotheses[0] for row in outputs], [row.trace[0] for row in outputs])


def _plain(target: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None,
           options: dict[str, Any], *, do_sample: bool) -> GenerationOutput:
    call = _Call(target, prompt_rows(input_ids, attention_mask), options)
    observer = _Observer(call.clock)
    seconds, sequences = call.run(observer, do_sample=do_sample)
    per_row = len(sequences) // len(call.prompts)  # num_return_sequences
    answers = [call.trim(tokens, number) for number, tokens in enumerate(sequences[:, call.width:].tolist())]
    hypotheses = [[Hypothesis(tokens, None, call.finish_reason(tokens, row))
                   for tokens in answers[row * per_row:(row + 1) * per_row]] for row in range(len(call.prompts))]
    steps = observer.rounds(call.width, [])[1:]
    traces = []
    for prompt, row in zip(call.prompts, hypotheses, strict=True):
        count = len(row[0].tokens)
        traces.append(RowTrace(len(prompt), 1, tuple(Round(0, 0, 1, step.seconds) for step in steps[:count - 1]),
                               ("plain",) * count, tuple(range(count)), *seconds))
    return GenerationOutput(hypotheses, traces)


def _assisted_row(call: _Call, draft: PreTrainedModel, sampling: dict[str, Any]) -> GenerationOutput:
    observer = _Observer(call.clock)
    with observer.watching(call.target):
        (prefill, decode), sequences = call.run(observer, assistant_model=draft, **sampling)
    tokens = sequences[0, call.width:].tolist()
    rounds = observer.rounds(call.width, tokens)
    sources: list[str] = []
    for one in rounds:
        rest = one.committed - one.accepted  # 1, or 0 where an accepted token ended the answer
        last = "plain" if not one.drafted else "bonus" if one.accepted == one.drafted else "correction"
        sources += ["draft"] * one.accepted + [last] * rest
    token_rounds = [number for number, one in enumerate(rounds) for _ in range(one.committed)]
    drafting, verifying = observer.phases()
    trace = RowTrace(len(call.prompts[0]), rounds[0].committed, tuple(rounds[1:]), tuple(sources),
                     tuple(token_rounds), prefill, decode, drafting, verifying)
    return GenerationOutput([[Hypothesis(tokens, None, call.finish_reason(tokens, 0))]], [trace])


class _Call:
    """One call of `generate`: its inputs, left-padded, and what its tokens mean."""

    def __init__(self, target: PreTrainedModel, prompts: list[list[int]], options: dict[str, Any]):
        self.target, self.prompts, self.clock = target, prompts, Clock(target.device)
        self.options = dict(options)
        self.seed = self.options.pop("seed", 0)
        self.streamer = self.options.pop("streamer", None)
        tokenizer = self.options.pop("tokenizer", None)
        self.criteria = list(self.options.pop("stopping_criteria", None) or [])
        _check_names(self.options)
        own = target.generation_config
        stop_strings = self.options.pop("stop_strings", own.stop_strings)
        self.stops: _Stops | None = None
        if stop_strings:
            if tokenizer is None:
                raise InputError(f"stop_strings={stop_strings!r} needs tokenizer=…, to know how tokens spell them.")
            # Made here, not by `generate`: a draft would inherit the strings without the tokenizer.
            self.stops = _Stops(tokenizer, stop_strings)
            self.criteria.append(self.stops)
        eos = self.options.get("eos_token_id", own.eos_token_id)
        self.eos = frozenset(torch.as_tensor([] if eos is None else eos).flatten().tolist())
        pad = self.options.get("pad_token_id", own.pad_token_id)
        self.width = max(map(len, prompts))
        filler = pad if pad is not None and pad >= 0 else 0
        self.input_ids = torch.tensor([[filler] * (self.width - len(row)) + row for row in prompts],
                                      device=target.device)
        self.mask = torch.tensor([[0] * (self.width - len(row)) + [1] * len(row) for row in prompts],
                                 device=target.device)

    def run(self, observer: _Observer, **method: Any) -> tuple[tuple[float, float], Any]:
        """(prefill seconds, decode seconds) and what `generate` returned."""
        known = vars(GenerationConfig())
        arguments = {name: value for name, value in _ONE_METHOD.items() if name in known}
        arguments.update(self.options, stop_strings=None, **method)
        criteria = StoppingCriteriaList([*self.criteria, observer])
        seed = self.seed if isinstance(self.seed, int) else next(iter(self.seed))
        gpus = [self.target.device] if self.clock.cuda else []
        with _quiet(), torch.random.fork_rng(gpus):
            torch.manual_seed(seed)
            observer.start()
            result = cast(Any, self.target).generate(self.input_ids, attention_mask=self.mask, streamer=self.streamer,
                                          stopping_criteria=criteria, **arguments)
            end = self.clock.mark()
        first = observer.marks[0][0]
        return (self.clock.seconds(observer.started, first), self.clock.seconds(first, end)), result

    def trim(self, tokens: list[int], number: int) -> list[int]:
        """Without what `generate` wrote behind the answer's end (padding, which may itself be an EOS id)."""
        length = len(tokens)
        if self.stops is not None and self.stops.hits:
            hits = torch.stack(self.stops.hits)[:, number].tolist()
            length = hits.index(True) + 1 if True in hits else length
        for position, token in enumerate(tokens[:length]):
            if token in self.eos:
                return tokens[:position + 1]
        return tokens[:length]

    def finish_reason(self, tokens: list[int], row: int) -> str:
        if tokens and tokens[-1] in self.eos:
            return "eos"
        sequence = torch.tensor([self.prompts[row] + tokens], device=self.target.device)
        stopped = self.stops is not None and bool(StopStringCriteria.__call__(self.stops, sequence, None).any())
        return "stop" if stopped else "length"


@dataclass(eq=False)
class _Observer(StoppingCriteria):
    """Never stops anything: marks the clock when `generate` asks, once a step."""

    clock: Clock
    forget_scores: bool = False  # beam search keeps every step's scores only to return a hypothesis's own
    started: Any = None
    marks: list[tuple[Any, int]] = field(default_factory=list)  # (mark, length so far) of each step
    verified: list[tuple[Any, Any, Tensor]] = field(default_factory=list)  # (start, end, ids) of each step's forward
    seen: list[Any] = field(default_factory=list)  # start, ids and end of the target's latest forward
    watched: bool = False
    no: Tensor | None = None

    def start(self) -> None:
        self.started = self.clock.mark()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.seen or not self.watched:  # in older transformers the draft's own steps ask too: they are none
            self.marks.append((self.clock.mark(), input_ids.shape[1]))
        if self.seen:  # of several forwards since the last step (target and draft may be one model), the last verified
            start, ids, end = self.seen
            self.verified.append((start, end, ids))
            self.seen.clear()
        if self.forget_scores and scores:
            scores[-1].set_()  # a clone that nothing reads: without this, [beams, vocabulary] floats a step pile up
        if self.no is None or len(self.no) != len(input_ids):
            self.no = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.no

    @contextmanager
    def watching(self, target: nn.Module) -> Iterator[None]:
        """While open, the target's forwards are seen: their input ids and when they start and end."""
        def before(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
            self.seen[:] = [self.clock.mark(), arguments["input_ids"], None]

        def after(_: nn.Module, __: Any, ___: Any) -> None:
            self.seen[2] = self.clock.mark()

        self.watched = True
        handles = [target.register_forward_pre_hook(before, with_kwargs=True), target.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rounds(self, prompt_tokens: int, tokens: list[int]) -> list[Round]:
        """Every step, that of prefill first. `tokens` are the answer's, to be compared with what was proposed."""
        result, start, done = [], self.started, 0
        for number, (mark, length) in enumerate(self.marks):
            proposed: list[int] = []
            if self.verified:
                ids = self.verified[number][2][0].tolist()
                proposed = ids[prompt_tokens:] if number == 0 else ids[1:]
            committed = tokens[done:length - prompt_tokens]
            pairs = zip(committed, proposed, strict=False)
            accepted = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs),
                            min(len(committed), len(proposed)))
            result.append(Round(len(proposed), accepted, length - prompt_tokens - done,
                                self.clock.seconds(start, mark), tuple(proposed)))
            start, done = mark, length - prompt_tokens
        return result

    def phases(self) -> tuple[float, float]:
        """Seconds of decoding spent before the target's forwards (drafting), and in them."""
        drafting = sum(self.clock.seconds(mark, start) for (mark, _), (start, _, _)
                       in zip(self.marks, self.verified[1:], strict=False))
        return drafting, sum(self.clock.seconds(start, end) for start, end, _ in self.verified[1:])


class _Stops(StopStringCriteria):
    """transformers' stop strings, and which rows hit one at each step (left on the device)."""

    def __init__(self, tokenizer: Any, stop_strings: str | list[str]):
        super().__init__(tokenizer, stop_strings)
        self.hits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        hit = super().__call__(input_ids, scores)
        self.hits.append(hit)
        return hit


@contextmanager
def _fixed_draft_length(draft: PreTrainedModel, draft_length: int) -> Iterator[None]:
    """`generate` reads these from the draft's generation_config only; as keywords they are silently ignored."""
    wanted = {"num_assistant_tokens": draft_length, "num_assistant_tokens_schedule": "constant",
              "assistant_confidence_threshold": 0.0}
    config = draft.generation_config
    before = {name: getattr(config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """`generate` warns of options that the checkpoint, not the user, set; nothing there is the user's to mend."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_names(options: dict[str, Any]) -> None:
    for name in options:
        if name == "do_sample":
            raise InputError("do_sample is not an option here: the method says it (transformers_greedy, "
                             "transformers_sample, transformers_assisted with temperature > 0).")
        if name not in _GENERATE_ARGUMENTS:
            check_name(name)
