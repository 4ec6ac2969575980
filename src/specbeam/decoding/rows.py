"""The rows of a running batch: tokens so far, where each ended, and its trace. Shared by all methods."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from specbeam.decoding.request import Request, refuse_impossible
from specbeam.trace import GenerationOutput, Hypothesis, Round, RowTrace, search_trees


class Clock:
    """Marks in time on one device. On a GPU a mark is an event in its stream: taking one waits for nothing."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.current_stream(device) if self.cuda else None  # asking for it takes as long as a mark

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the later one."""
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


@dataclass
class RowState:
    """One row while it runs."""

    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    token_rounds: list[int] = field(default_factory=list)
    rounds: list[tuple[Any, Any, Round]] = field(default_factory=list)  # begin, end, and the rest
    finish_reason: str | None = None
    first_tokens: int = 0

    @property
    def sequence(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt + self.tokens

    @property
    def remaining(self) -> int:
        return self.max_new_tokens - len(self.tokens)


class Batch:
    """All rows, and which of them run. A method asks `live` and calls `commit`; `output` is its result.

    With `batch_size`, so many run at once; the others wait, and `admit` gives them the places of those that ended.
    """

    def __init__(self, request: Request, target: PreTrainedModel):
        self.request = request
        self.rows = [RowState(row.prompt, row.max_new_tokens) for row in request.rows]
        self.live: list[int] = []
        self.waiting = list(range(len(self.rows)))
        self.admit()
        self.clock = Clock(target.device)
        self.device = target.device
        self.phases: dict[str, list[tuple[Any, Any]]] = {
            name: [] for name in ("prefill", "draft", "verify", "accept")}
        self.watched: list[tuple[dict[int, int], Any]] = []  # beam steps, for the search tree
        self.started = self.clock.mark()
        if request.streamer is not None:
            request.streamer.put(torch.tensor([request.rows[0].prompt]))

    def commit(self, row: int, tokens: Sequence[int], sources: Sequence[str]) -> int:
        """Append tokens to a row until one ends it, exactly as plain decoding would; how many became output."""
        state = self.rows[row]
        before = len(state.tokens)
        for token, source in zip(tokens, sources, strict=True):
            refuse_impossible(self.request.rows[row], state.tokens)
            state.tokens.append(token)
            state.sources.append(source)
            state.token_rounds.append(len(state.rounds) + (state.first_tokens > 0))
            state.finish_reason = self._ending(row, state, token)
            if state.finish_reason is not None:
                break
        self.request.rows[row].impossible.clear()  # the next round asks anew
        if self.request.streamer is not None:
            if hasattr(self.request.streamer, "sources"):  # it wants to know where the tokens come from
                self.request.streamer.sources(state.sources[before:])
            self.request.streamer.put(torch.tensor(state.tokens[before:]))
        return len(state.tokens) - before

    def _ending(self, row: int, state: RowState, token: int) -> str | None:
        if token in self.request.eos:
            return "eos"
        if self.request.stopping and stops(self.request, row, state.tokens, self.device):
            return "stop"
        return "length" if state.remaining == 0 else None

    def finish(self, row: int, best: Hypothesis, rounds: Sequence[int]) -> None:
        """A beam search ended a row: its best hypothesis, and the round in which each of its tokens was found."""
        state = self.rows[row]
        state.tokens, state.finish_reason = best.tokens, best.finish_reason
        state.sources, state.token_rounds = ["plain"] * len(best.tokens), list(rounds)

    def watch(self, ranked: Any, live: Sequence[int]) -> None:
        """Keep what a beam step of these rows ranked (beam.Ranked), if the caller wants the search tree; it is read
        when the clock has stopped."""
        if self.request.trace:
            rounds = {row: len(self.rows[row].rounds) + (self.rows[row].first_tokens > 0) for row in live}
            self.watched.append((rounds, ranked))

    def admit(self) -> list[int]:
        """The waiting rows that have a place now. They are live, behind the others, and their prompts unread."""
        room = (self.request.batch_size or len(self.rows)) - len(self.live)
        new, self.waiting = self.waiting[:room], self.waiting[room:]
        self.live += new
        return new

    def prefill_done(self, rows: Sequence[int], start: Any = None) -> None:
        """The first new tokens of these rows are known (and on the host): from here on they decode. start: when their
        turn came (None: when the batch began)."""
        self.phases["prefill"].append((start or self.started, self.clock.mark()))
        for row in rows:
            self.rows[row].first_tokens = len(self.rows[row].tokens)

    def round_done(self, row: int, start: Any, proposed: Sequence[int], accepted: int, committed: int,
                   parents: Sequence[int] = (), drafter: str = "plain", why: str = "", end: Any = None) -> None:
        tokens = () if isinstance(proposed, range) else tuple(proposed)  # of beams: how many steps, no tokens
        done = Round(len(proposed), accepted, committed, 0.0, tokens, tuple(parents), drafter, why)
        self.rows[row].rounds.append((start, end or self.clock.mark(), done))

    def retire(self) -> list[int] | None:
        """Take ended rows out of `live`. The numbers, among the old live rows, of those that stay; None: all."""
        stay = [i for i, row in enumerate(self.live) if self.rows[row].finish_reason is None]
        if len(stay) == len(self.live):
            return None
        self.live = [self.live[i] for i in stay]
        return stay

    def output(self, drafts: bool = False, hypotheses: list[list[Hypothesis]] | None = None) -> GenerationOutput:
        ended = self.clock.mark()
        if self.request.streamer is not None:
            self.request.streamer.end()
        if hypotheses is None:
            hypotheses = [[Hypothesis(row.tokens, None, row.finish_reason or "length")] for row in self.rows]
        seconds = {name: sum(self.clock.seconds(*span) for span in spans) for name, spans in self.phases.items()}
        return GenerationOutput(hypotheses, [
            RowTrace(
                prompt_tokens=len(row.prompt), first_tokens=row.first_tokens,
                rounds=tuple(replace(done, seconds=self.clock.seconds(start, end)) for start, end, done in row.rounds),
                sources=tuple(row.sources), token_rounds=tuple(row.token_rounds),
                prefill_seconds=seconds["prefill"],
                decode_seconds=self.clock.seconds(self.started, ended) - seconds["prefill"],
                draft_seconds=seconds["draft"] if drafts else None, verify_seconds=seconds["verify"],
                accept_seconds=seconds["accept"] if self.phases["accept"] else None)
            for row in self.rows], search_trees(self.watched, len(self.rows)) if self.watched else None)


def stops(request: Request, row: int, tokens: Sequence[int], device: torch.device) -> bool:
    """Whether transformers' criteria end this answer to a row's prompt."""
    ids = torch.tensor([[*request.rows[row].padding, *request.rows[row].prompt, *tokens]], device=device)
    return bool(torch.as_tensor(request.stopping(ids, None)).any())
