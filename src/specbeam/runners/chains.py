"""Chains as recorded functions: the host gives them what the last call left behind, and is told once a round.

With a runner that records (graph.py) one recording is: a plain step with its choice of the next token; a draft's whole
proposal; a verification with the acceptance of what was proposed. Tokens, depths and, for a repetition penalty, the
texts stay on the device from call to call. A draft's next proposal begins from the verification's answer there, before
the host has seen it (`follow`).
In a chain slot i holds position i: a row's length alone says which slots it sees, where it writes and at which
positions, so that no mask is made outside. A proposal always has its full length, whatever a row may still use of it,
so that the end of an answer is no new shape.
Only processors that look at the scores, and the repetition penalty, can be recorded; others leave their method in its
ordinary loop. On a CPU host_chains.py does the same without recording, and with more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from specbeam.engine.runner import EAGER, Adapter
from specbeam.engine.tree import TokenTree
from specbeam.runners.graph import TOKENS, Slots, is_warming
from specbeam.sampling import invert

if TYPE_CHECKING:
    from specbeam.runners.host_chains import HostChains

_OF_SCORES = (hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper,
              hf.InfNanRemoveLogitsProcessor, hf.LogitNormalization)

_own = find_spec("triton") is not None  # whether the GPU's arg-max is ours


@dataclass(frozen=True)
class Shape:
    """How scores become a token: what a recording depends on beside the sizes of its tensors."""

    key: tuple  # the processors' types and values
    samples: bool
    history: bool  # a processor asks which tokens are in the text
    processors: LogitsProcessorList = field(compare=False)

    @classmethod
    def of(cls, processors: Sequence[LogitsProcessorList], samples: bool, recorded: bool = True) -> Shape | None:
        """None: these cannot be recorded, or differ from row to row. recorded: False for a host, which can call any; of
        several rows only transformers' own, which know no row but by what they hold."""
        if not recorded and len(processors) == 1:
            return cls((), samples, False, processors[0])
        keys = {tuple((type(one), *sorted(
            (name, _shown(value)) for name, value in getattr(one, "__dict__", {}).items())) for one in row)
            for row in processors}
        history = False
        if not recorded:
            own = all(type(one).__module__ == hf.__name__ for row in processors for one in row)
            return cls(keys.pop(), samples, history, processors[0]) if own and len(keys) == 1 else None
        for one in processors[0]:
            if type(one) is hf.RepetitionPenaltyLogitsProcessor and getattr(one, "prompt_ignore_length", None) is None:
                history = True
            elif type(one) not in _OF_SCORES:
                return None
        return cls(keys.pop(), samples, history, processors[0]) if len(keys) == 1 else None

    def scores(self, logits: Tensor, texts: Tensor | None, positions: Tensor) -> Tensor:
        """[rows, new, vocabulary], fp32 unless only the largest is asked for. texts: [rows, view], by position; a
        node's text ends at its own."""
        scores = logits.float() if self.samples or self.processors else logits
        if not self.processors:
            return scores
        ids = positions.new_empty(positions.numel(), 0)
        if texts is not None:  # that a token is there twice changes nothing
            within = torch.arange(texts.shape[1], device=texts.device) <= positions[..., None]
            ids = torch.where(within, texts[:, None], texts[:, None, :1]).flatten(0, 1)
        flat = self.processors(cast(LongTensor, ids), cast(FloatTensor, scores.flatten(0, 1)))
        return flat.view(scores.shape)


def _shown(value: Any) -> str:
    """A long tensor's own text leaves most of it out."""
    return str(value.tolist() if isinstance(value, Tensor) else value)


def shape_of(adapter: Adapter, processors: Sequence[LogitsProcessorList], samples: bool) -> Shape | None:
    """None: this model, or what shapes its scores, is not for recorded functions."""
    # Rotary scaling that looks at the longest row must not see tokens that nobody will use.
    if not (adapter.runner.fuse or adapter.runner.reads) or adapter.rope_limit is not None:
        return None
    return Shape.of(processors, samples, recorded=not adapter.runner.reads)


def chains_of(tree: TokenTree, shape: Shape | None, reads: bool = False) -> Chains | HostChains | None:
    """For what `shape_of` found, in the way of the tree's runner. reads: see Chains."""
    if shape is None:
        return None
    if not tree.adapter.runner.reads:
        return Chains(tree, shape, reads)
    from specbeam.runners.host_chains import HostChains

    return HostChains(tree, shape)


class Chains:
    """The rows of one tree, each a chain, and what recorded functions carry from call to call."""

    ahead = 2  # steps that are begun before the first is seen

    def __init__(self, tree: TokenTree, shape: Shape, reads: bool = False):
        """reads: the functions are told each time what is new in the texts (a draft's); else they know the last token
        and the depth."""
        self.tree, self.shape, self.reads = tree, shape, reads
        self.state: list[Tensor] | None = None  # None: made anew from the texts
        self.asked: list[Tensor] = []  # two pinned places of what the host proposed, in turn
        self.unread: Tensor | None = None  # by a draft, behind the last verification: see _answer

    def forget(self) -> None:
        """Rows left or joined, or something else read into the tree."""
        self.state = None

    def run(self, function: Callable[..., tuple], static: tuple, texts: Sequence[list[int]], high: int,
            *given: Tensor | None) -> list[Tensor]:
        """What the function gives beyond what it carries. texts: the committed ones (looked at after `forget`); high:
        slots that are needed."""
        tree, view = self.tree, self.tree.reach(high)
        if self.state is None:
            self.state = [] if self.reads else [
                pinned(torch.tensor([text[-1:] for text in texts]), tree.device),
                pinned(torch.tensor([len(text) - 1 for text in texts]), tree.device)]
            if self.shape.history:
                self.state.append(pinned(torch.tensor([[*text, *[0] * (view - len(text))] for text in texts]),
                                         tree.device))
        if self.shape.history and self.state[-1].shape[1] < view:
            self.state[-1] = pad(self.state[-1], (0, view - self.state[-1].shape[1]))
        assert tree.adapter.runner.fuse is not None
        carried = len(self.state)
        out = tree.adapter.runner.fuse(tree.adapter, tree.cache, function, (view, self.shape, *static), carried,
                                       *self.state, *(one for one in given if one is not None))
        self.state = out[:carried]
        return out[carried:]

    def step(self, high: int, texts: Sequence[list[int]], uniform: Tensor | None) -> Callable[[], list[int]]:
        """Begin a plain step; what it gives waits for its tokens. texts: without those of steps before that nobody has
        seen (high: with them). uniform: [rows] fp64, when it draws."""
        self.run(_step, (), texts, high, None if uniform is None else pinned(uniform, self.tree.device))
        assert self.state is not None
        slots: Slots = self.tree.cache.of
        if not self._tells(slots) or self.tree.adapter.model.dtype == torch.float64:
            read = seen(self.state[0])
            return lambda: [token for [token] in read()]
        read, steps = seen(self.state[0], slots.tokens), high + 1 - max(map(len, texts))
        places = [(len(text) - 1 + steps) % TOKENS for text in texts]
        return lambda: [row[place] for row, place in zip(read(), places, strict=False)]

    def propose(self, new: Sequence[Sequence[int]], read: Sequence[int], texts: Sequence[list[int]], count: int,
                vocabulary: int, known: int, uniform: Tensor | None) -> list[Tensor]:
        """`count` tokens [rows, count] below each text, of which `read` tokens were read and `new` were not, and, when
        it draws, what they were drawn from [rows, count, vocabulary]."""
        wide = max(map(len, new))
        wide = max(wide, 2) if len(new) > 1 else wide
        uniform = None if uniform is None else pinned(uniform, self.tree.device)

        def ask(wide: int) -> list[Tensor]:
            unread = torch.tensor([[*ids, *[0] * (wide - len(ids)), len(ids), before]
                                   for ids, before in zip(new, read, strict=True)])
            return self.run(_propose, (count, vocabulary, known), texts, max(read) + wide + count,
                            pinned(unread, self.tree.device), uniform)

        if is_warming() and wide == 1:  # as after a proposal that was accepted whole
            ask(2)
        return ask(wide)

    def follow(self, unread: Tensor, high: int, count: int, vocabulary: int, known: int, uniform: Tensor | None
               ) -> list[Tensor]:
        """`propose`, of what a target's verification left in its `unread`: nobody has seen it yet."""
        return self.run(_propose, (count, vocabulary, known), (), high, unread.to(self.tree.device),
                        None if uniform is None else pinned(uniform, self.tree.device))

    def verify(self, proposed: Tensor | Sequence[Sequence[int]], lengths: Sequence[int], texts: Sequence[list[int]],
               rule: Callable | None, uniform: Tensor | None, q: Tensor | None) -> Callable[[], list[list[int]]]:
        """Begin to check proposals [rows, count] (still on the host, or not), of which lengths[b] are meant; what it
        gives waits for, per row: how many are accepted, the token that follows them, and the proposed ones. rule: of
        acceptance.py, when sampling; uniform: [rows, count + 1], q: [rows, ≥ count, vocabulary], as it wants them."""
        if not isinstance(proposed, Tensor):
            proposed = torch.tensor(proposed, dtype=torch.long)
        device, count = self.tree.device, proposed.shape[1]
        q = q[:, :count] if q is not None and count else None
        if proposed.is_cuda:
            meant = sent(torch.tensor(lengths)[:, None], device)
            asked = torch.cat([proposed, meant], 1)
        else:
            asked = self._asked(proposed, lengths)
        [answer] = self.run(_verify, (rule,), texts, max(map(len, texts)) + count, asked,
                            None if uniform is None else pinned(uniform, device), q)
        self.unread, slots = answer[:, -4:], self.tree.cache.of
        if self._tells(slots) and answer.shape[1] <= slots.answers.shape[1]:
            return seen(answer, slots.answers[: len(answer), : answer.shape[1]])
        return seen(answer)

    def _tells(self, slots: Slots) -> bool:
        """Whether what is new was written to the host's memory by the function itself: a copy behind it takes 10 µs."""
        return slots.tokens is not None and not self.shape.samples and _own

    def _asked(self, proposed: Tensor, lengths: Sequence[int]) -> Tensor:
        """Proposals and their lengths behind them, where a copy to the device begins at once: no verification begins
        before the last but one was waited for."""
        rows, count = proposed.shape
        if not self.asked or self.asked[0].shape != (rows, count + 1):
            self.asked = [pinned(proposed.new_empty(rows, count + 1), self.tree.device) for _ in range(2)]
        self.asked.reverse()
        place = self.asked[0].numpy()
        place[:, :count], place[:, count] = proposed.numpy(), lengths
        return self.asked[0]


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """What a recording on that device is given without anyone waiting."""
    return values.pin_memory() if device.type == "cuda" and not values.is_cuda else values


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on the device, without anyone waiting."""
    return pinned(values, device).to(device, non_blocking=True)


def seen(values: Tensor, told: Tensor | None = None) -> Callable[[], list[Any]]:
    """Begin to copy to the host; what it gives waits for that, and for nothing that is begun later. told: where they
    will be then without a copy."""
    copied = values.to("cpu", non_blocking=True, copy=True) if told is None else told
    if not values.is_cuda:
        return copied.tolist
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))

    def read() -> list[Any]:
        event.synchronize()
        return copied.tolist()

    return read


def _by_ours(name: str, plain: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """`plain(x, *args)`, on a GPU by the kernel of that name, if it can run there."""
    global _own
    if _own and x.is_cuda:
        try:
            from specbeam.runners import ends

            return getattr(ends, name)(x, *args)
        except Exception:  # no C compiler, a card that Triton does not know: seen before anything is recorded
            _own = False
    return plain(x, *args)


def largest(scores: Tensor, out: Tensor | None = None, depth: Tensor | None = None, told: Tensor | None = None
            ) -> Tensor:
    """The first of the largest, along the last dimension. out: where they go; depth: what grows by one then; told: of
    ends.py."""
    if scores.dtype == torch.float64:
        return _largest(scores, out, depth)
    return _by_ours("largest", _largest, scores, out, depth, told)


def _largest(scores: Tensor, out: Tensor | None, depth: Tensor | None, told: Tensor | None = None) -> Tensor:
    found = scores.argmax(-1)
    if depth is not None:
        depth.add_(1)
    return found if out is None else out.copy_(found)


def _frame(depth: Tensor, plus: int, new: int, view: int, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions [rows, new] of tokens behind `depth` + `plus` others, the slots [rows, new, view] that each sees, and
    those within the window, if there is one."""
    positions = (depth + plus)[:, None] + torch.arange(new, device=depth.device)
    positions = positions.clamp(max=view - 1)  # of rows that idle along and count on
    places = torch.arange(view, device=depth.device)
    visible = places <= positions[..., None]
    return positions, visible, None if window is None else visible & (places > positions[..., None] - window)


def _accept(best: Tensor, last: Tensor, depth: Tensor, asked: Tensor, told: Tensor | None = None) -> Tensor:
    """What of the proposals `asked` [rows, count + 1] (their lengths at the end) are the tokens `best` [rows,
    count + 1]: the answer of a verification; last and depth become the next ones."""
    proposed, count = asked[:, :-1], asked.shape[1] - 1
    within = torch.arange(count, device=best.device) < asked[:, -1:]
    accepted = ((best[:, :count] == proposed) & within).long().cumprod(1).sum(1)
    return _answer(accepted, best.gather(1, accepted[:, None])[:, 0], last, depth, proposed)


def _answer(accepted: Tensor, following: Tensor, last: Tensor, depth: Tensor, proposed: Tensor) -> Tensor:
    """[rows, count + 6]: what `verify` says; and what a draft, which read all it proposed but the last, has not read
    of the text now: two tokens, how many of them it is, how many were read before."""
    whole, end = (accepted == proposed.shape[1]).long(), torch.cat([last, proposed], 1)[:, -1]
    last.copy_(following[:, None])
    depth.add_(1 + accepted)
    first = torch.where(whole > 0, end, following)
    return torch.cat([torch.stack([accepted, following], 1), proposed,
                      torch.stack([first, following, 1 + whole, depth - whole], 1)], 1)


def _read(adapter: Adapter, slots: Any, view: int, tokens: Tensor, depth: Tensor, plus: int = 0,
          lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of tokens [rows, new] behind `depth` [rows] + `plus` others, and their positions; with `lengths`, of each
    row's last token only."""
    positions, visible, near = _by_ours("frame", _frame, depth, plus, tokens.shape[1], view, adapter.window)
    slots.slots, slots.span, slots.view = positions, None, view
    legal = positions
    if adapter.absolute and adapter.context is not None:  # behind the end of an answer
        legal = positions.clamp(max=adapter.context - 1)
    keep = None if lengths is None else lengths - 1
    if tokens.shape[1] > 1:  # what is proposed may be nothing
        tokens = tokens.clamp(min=0)
    logits = EAGER.forward(adapter, slots, tokens, legal, visible, near, keep)
    if keep is not None:
        positions = positions.gather(1, keep[:, None])
    return logits, positions


def _step(adapter: Adapter, slots: Any, view: int, shape: Shape, last: Tensor, depth: Tensor, *more: Tensor
          ) -> tuple[Tensor, ...]:
    logits, positions = _read(adapter, slots, view, last, depth)
    texts = [one.scatter(1, positions, last) for one in more[: shape.history]]
    scores = shape.scores(logits, texts[0] if texts else None, positions)[:, 0]
    if shape.samples:
        last.copy_(invert(scores.softmax(-1), more[-1])[:, None])
        depth.add_(1)
    else:
        largest(scores, last[:, 0], depth, slots.tokens)
    return last, depth, *texts


def _propose(adapter: Adapter, slots: Any, view: int, shape: Shape, count: int, vocabulary: int, known: int,
             *given: Tensor) -> tuple[Tensor, ...]:
    """given: texts (of a history), what is unread [rows, new + 2]: tokens, how many, how many were read before."""
    texts, (unread, *uniform) = [*given[: shape.history]], given[shape.history :]
    tokens, lengths, depth = unread[:, :-2], unread[:, -2], unread[:, -1]
    ids: list[Tensor] = []
    q: list[Tensor] = []
    for place in range(count):
        if known < vocabulary:
            tokens = tokens.clamp(max=known - 1)
        logits, positions = _read(adapter, slots, view, tokens, depth, max(0, place - 1), None if place else lengths)
        if texts:
            order = depth[:, None] + max(0, place - 1) + torch.arange(tokens.shape[1], device=tokens.device)
            texts = [one.scatter(1, order, tokens) for one in texts]
        missing = vocabulary - logits.shape[-1]
        logits = pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[..., :vocabulary]
        scores = shape.scores(logits, texts[0] if texts else None, positions)[:, 0]
        if shape.samples:
            q.append(scores.softmax(-1))
            ids.append(invert(q[-1], uniform[0][:, place]))
        else:
            ids.append(largest(scores))
        tokens, depth = ids[-1][:, None], depth if place else depth + lengths
    return *texts, torch.stack(ids, 1), *([torch.stack(q, 1)] if q else [])


def _verify(adapter: Adapter, slots: Any, view: int, shape: Shape, rule: Any, last: Tensor, depth: Tensor,
            *more: Tensor) -> tuple[Tensor, ...]:
    """more: texts (of a history), proposals and their lengths [rows, count + 1], and uniform numbers and q (of a
    rule)."""
    asked, *drawn = more[shape.history :]
    proposed, count = asked[:, :-1], asked.shape[1] - 1
    tokens = torch.cat([last, proposed], 1)
    logits, positions = _read(adapter, slots, view, tokens, depth)
    texts = [one.scatter(1, positions, tokens) for one in more[: shape.history]]
    scores = shape.scores(logits, texts[0] if texts else None, positions)
    if shape.samples:
        uniform, q = drawn[0], drawn[1] if len(drawn) > 1 else None
        lengths = asked[:, -1].clamp(max=count)  # of rows that idle along
        accepted, following = rule(proposed.clamp(min=0), scores.softmax(-1), q, lengths, uniform, invert)
        answer = _answer(accepted, following, last, depth, proposed)
    else:
        answer = _by_ours("accept", _accept, largest(scores), last, depth, asked, slots.answers)
    return last, depth, *texts, answer
