"""What speculation would bring, without generating once per setting.

Greedy, a chain of any length γ: the draft always continues accepted text, and that is the target's own. So one
teacher-forced pass of the draft over the target's answers says which of its proposals would have been accepted, at
every place, for every γ at once. Walking over the answer gives the rounds, exactly.

Sampled, with rejection sampling (Leviathan et al. 2023, arXiv 2211.17192): of an answer drawn by the target, token x
was an accepted proposal with probability q(x) · min(1, p(x) / q(x)) ÷ p(x) = min(1, q(x) / p(x)); the expected number
of rounds is a recursion over the places where a round starts.

Seconds: rounds × what a round of so many proposals and rows costs, measured in short runs (`measure_costs`) or worked
out for another machine (hardware.py).
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Chances = list[list[float]]  # at [tokens committed so far][i]: P(proposal i is accepted | those before it were)
Samples = dict[tuple[int, int], list[tuple[float, float, float]]]  # (rows, proposals) → seconds: whole, draft, target
PLAIN_TOKENS, ROUNDS = 12, 5  # of one run that measures costs: plain steps, and at least so many rounds
SURE = 0.02  # costs known to within it are known well enough


@dataclass(frozen=True)
class Answer:
    """One answer of the target. room: the most tokens it might have had (max_new_tokens)."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    room: int


@dataclass(frozen=True)
class Outlook:
    """What one answer would take; expectations where answers are sampled."""

    rounds: float
    drafted: float
    accepted: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a round. table[rows][proposals], 0 proposals: a plain step; in between it is interpolated. parts: per
    rows and proposals the seconds spent drafting and in the target's forward. doubt: how far a round in plain steps may
    be off, as the turns that measured it differ (half a 95 % interval; 0: not measured)."""

    table: Mapping[int, Mapping[int, float]]
    parts: Mapping[int, Mapping[int, tuple[float, float]]] = field(default_factory=dict)
    doubt: float = 0.0

    def seconds(self, rows: float, proposals: float) -> float:
        counts = sorted(self.table)
        at = [float(np.interp(proposals, sorted(self.table[n]), [self.table[n][k] for k in sorted(self.table[n])]))
              for n in counts]
        return float(np.interp(rows, counts, at))


def forced_chances(target: PreTrainedModel, draft: PreTrainedModel | None, answers: Sequence[Answer], longest: int,
                   temperature: float = 0.0, ngram: int = 3, **options: Any) -> list[Chances]:
    """Of each answer, how probable it is that the draft's proposals are accepted, wherever a round may start.

    draft: None looks the prompt up (drafting/prompt_lookup.py, n-grams up to `ngram`). longest: the largest draft
    length asked for. temperature 0: chances are 0 or 1. options: as the target's answers were made
    with. One forward of the draft an answer, and, sampled, one of the target.
    """
    import torch

    from specbeam.decoding.request import settle
    from specbeam.engine.support import evaluating

    if temperature:
        options["temperature"] = temperature
    prompts = [torch.tensor(answer.prompt) for answer in answers]
    request = settle(target, prompts, None, sampled=temperature > 0, **options)
    if draft is None:
        width = int(target.config.get_text_config(decoder=True).vocab_size)
        return [_looked_up(answer, longest, ngram, width) for answer in answers]
    found = []
    with torch.inference_mode(), evaluating(target, draft):
        for answer, row in zip(answers, request.rows, strict=True):
            agreed = _agreement(target, draft, answer, row.processors, sampled=temperature > 0)
            found.append([agreed[start:start + longest] for start in range(len(answer.tokens))])
    return found


def _agreement(target: PreTrainedModel, draft: PreTrainedModel, answer: Answer, processors: Any, sampled: bool
               ) -> list[float]:
    """For each token of the answer: P(accepted | proposed there)."""
    import torch

    from specbeam.drafting.draft_model import align
    from specbeam.engine.runner import embedding
    from specbeam.sampling import process

    width = int(target.config.get_text_config(decoder=True).vocab_size)
    known = embedding(draft).shape[0]
    text = [*answer.prompt, *answer.tokens]

    def scores(model: PreTrainedModel, ids: list[int]) -> Tensor:
        logits = _forced_logits(model, ids, len(answer.tokens))
        return process(align(logits[None], width), [processors], lambda _, node: text[: len(answer.prompt) + node])[0]

    drafts = scores(draft, [min(token, known - 1) for token in text])
    tokens = torch.tensor(answer.tokens, device=drafts.device)
    if not sampled:
        return (drafts.argmax(-1) == tokens).double().tolist()
    p = scores(target, text).softmax(-1).to(drafts.device).gather(1, tokens[:, None])[:, 0].double()
    q = drafts.softmax(-1).gather(1, tokens[:, None])[:, 0].double()
    return torch.where(p > 0, (q / p).clamp(max=1.0), (q > 0).double()).tolist()


def _forced_logits(model: PreTrainedModel, text: Sequence[int], count: int) -> Tensor:
    """The logits [count, vocabulary] that predict the last `count` tokens of a text, by the runner that decodes with
    this model: another one would round otherwise."""
    import torch

    from specbeam.engine.support import adapt
    from specbeam.engine.tree import chain, read_prompts

    tree, tips, logits = read_prompts(adapt(model), [text[:-count]], len(text))
    if count == 1:
        return logits[0]
    return torch.cat([logits[0], tree.extend(tips, chain([text[-count:-1]], tree.device))[0][0]])


def _looked_up(answer: Answer, longest: int, ngram: int, vocabulary: int) -> Chances:
    """Nothing is drawn: a proposal that is the answer's next token is accepted (q = 1), another one is not."""
    from specbeam.drafting.prompt_lookup import PromptLookup

    lookup = PromptLookup(1, vocabulary, ngram, 1)
    found: Chances = [[]]
    for start in range(1, len(answer.tokens)):
        text = [*answer.prompt, *answer.tokens[:start]]
        length: Any = SimpleNamespace(why=[""])
        [proposed] = lookup.propose([text], [longest], length).tokens
        following = answer.tokens[start:start + len(proposed)]
        found.append([float(i < len(following) and following[i] == token) for i, token in enumerate(proposed)])
    return found


def greedy_rounds(answers: Sequence[Answer], chances: Sequence[Chances], length: int
                  ) -> tuple[list[Outlook], list[tuple[int, int]]]:
    """One batch, exactly: what each row takes, and of each round of the batch (live rows, longest proposal)."""
    at = [1] * len(answers)  # prefill gives the first token
    rounds, drafted, accepted = ([0] * len(answers) for _ in range(3))
    batch = []
    while live := [row for row, answer in enumerate(answers) if at[row] < len(answer.tokens)]:
        longest = 0
        for row in live:
            answer, proposed = answers[row], chances[row][at[row]]
            # the last token of an answer is never worth a proposal behind it
            limit = min(length, answer.room - at[row] - 1)
            left = len(answer.tokens) - at[row]
            # at the end of an answer a draft goes on proposing, whatever it would be
            count = limit if len(proposed) >= min(left, limit) else min(limit, len(proposed))
            kept = next((i for i, chance in enumerate(proposed[:count]) if not chance), min(len(proposed), count))
            rounds[row] += 1
            drafted[row] += count
            accepted[row] += min(kept, left)
            at[row] += min(kept + 1, left)
            longest = max(longest, count)
        batch.append((len(live), longest))
    return [Outlook(*one) for one in zip(rounds, drafted, accepted, strict=True)], batch


def expected_rounds(answer: Answer, chances: Chances, length: int,
                    cost: Callable[[int], float] = lambda proposals: 0.0) -> tuple[Outlook, float]:
    """One sampled answer: expected rounds, proposals and accepted tokens, and the expected sum of `cost(proposals)`.

    E(s) = 1 + Σ_j P(j accepted from s) · E(s + j + 1), from the end of the answer backwards.
    """
    n = len(answer.tokens)
    expected = np.zeros((n + length + 2, 4))
    for start in range(n - 1, 0, -1):
        proposed = chances[start][: max(0, min(length, answer.room - start - 1))]
        count = min(length, answer.room - start - 1) if len(proposed) >= n - start else len(proposed)
        total, reach = np.array([1.0, count, 0.0, cost(count)]), 1.0
        for i, chance in enumerate(proposed[: n - start]):
            total += reach * (1 - chance) * expected[start + i + 1]
            reach *= chance
            total[2] += reach
        kept = min(len(proposed), n - start)
        total += reach * expected[min(n, start + kept + 1)]
        expected[start] = total
    rounds, drafted, accepted, seconds = expected[1] if n > 1 else np.zeros(4)
    return Outlook(float(rounds), float(drafted), float(accepted)), float(seconds)


def speculative_seconds(answers: Sequence[Answer], chances: Sequence[Chances], length: int, costs: Costs, sampled: bool
                        ) -> tuple[list[Outlook], float]:
    """What each row of one batch takes, and the decode seconds of the batch.

    Sampled batches of several rows: as if every row took its expected number of rounds (an estimate)."""
    if not sampled:
        rows, batch = greedy_rounds(answers, chances, length)
        return rows, sum(costs.seconds(live, proposals) for live, proposals in batch)
    found = [expected_rounds(answer, own, length, lambda proposals: costs.seconds(1, proposals))
             for answer, own in zip(answers, chances, strict=True)]
    rows = [one for one, _ in found]
    if len(answers) == 1:
        return rows, found[0][1]
    ends = sorted(one.rounds for one in rows)
    share = sum(one.drafted for one in rows) / max(sum(one.rounds for one in rows), 1e-9)
    pieces = zip([0.0, *ends], ends, range(len(ends), 0, -1), strict=False)
    return rows, sum((end - start) * costs.seconds(live, share) for start, end, live in pieces)


def plain_seconds(answers: Sequence[Answer], costs: Costs) -> float:
    """Decode seconds of plain decoding of one batch."""
    steps = sorted(len(answer.tokens) - 1 for answer in answers)
    return sum((end - start) * costs.seconds(live, 0)
               for start, end, live in zip([0, *steps], steps, range(len(steps), 0, -1), strict=False))


def measure_costs(target: PreTrainedModel, draft: PreTrainedModel | None, answers: Sequence[Answer],
                  lengths: Sequence[int], rows: int = 1, repeats: int = 3, **options: Any) -> Costs:
    """What a round costs, by the runner in use: for 1 … `rows` rows and each draft length, from short runs.

    The first turn warms up, `repeats` are counted, and as many again up to four times where the machine is so restless
    that the costs are not known to within 2 %. options: of the methods; `drafter`, `temperature` among them.
    """
    turns: list[Samples] = []
    for turn in range(4 * repeats + 1):
        found = time_rounds(target, draft, answers, lengths, rows, turn, **options)
        if turn:
            turns.append(found)
        if turn >= repeats and _doubt(turns, rows) <= SURE:
            break
    return costs_of(turns, target, draft, answers, lengths, rows)


def time_rounds(target: PreTrainedModel, draft: PreTrainedModel | None, answers: Sequence[Answer],
                lengths: Sequence[int], rows: int = 1, turn: int = 0, **options: Any) -> Samples:
    """One turn of measuring: a few rounds of every draft length, and before each of them a few plain steps. Turn 0
    warms up: it records shapes, where the runner does.

    Rounds are timed whole and in their place: a draft's step between two forwards of the target is dearer than one in
    a loop of its own, since the target's weights push the draft's out of the processor's cache. Plain steps close by
    are what they are measured in: whatever slows the machine for a second slows both. Every run carries on from some
    way into answers of the target, so that the cache is as full as it would be.
    """
    import torch

    from specbeam.decoding.greedy import greedy_generate
    from specbeam.decoding.sample import sample_generate
    from specbeam.decoding.speculative import speculative_generate
    from specbeam.runners.graph import warming

    by_length = sorted(answers, key=lambda answer: -len(answer.tokens))
    speculation = {name: options.pop(name) for name in ("drafter", "ngram") if name in options}
    temperature = options.get("temperature") or 0.0
    plainly = {name: value for name, value in options.items() if temperature or name != "temperature"}
    most, seen = options.get("max_new_tokens", PLAIN_TOKENS), defaultdict(list)
    for count in _counts(rows):
        chosen = [by_length[(i + turn) % min(len(by_length), max(rows, 4))] for i in range(count)]
        texts = [torch.tensor([*one.prompt, *one.tokens[: len(one.tokens) // 4]], device=target.device)
                 for one in chosen]
        for length in lengths:
            gc.collect()
            plain: Any = {**plainly, "max_new_tokens": min(most, PLAIN_TOKENS)}
            with nullcontext() if turn else warming():
                steps = (sample_generate if temperature else greedy_generate)(target, texts, **plain)
                plain["max_new_tokens"] = min(most, ROUNDS * (length + 1))
                out = speculative_generate(target, draft, texts, draft_length=length, **speculation, **plain)
            # what follows a prefill is slower, and would weigh too much in runs as short as these
            for live, proposals, seconds in [*_rounds_of(steps.trace)[1:],
                                             *(one for one in _rounds_of(out.trace)[1:] if one[1])]:
                if live == count:
                    seen[live, proposals].append(seconds)
    return dict(seen)


def costs_of(turns: Sequence[Samples], target: PreTrainedModel, draft: PreTrainedModel | None,
             answers: Sequence[Answer], lengths: Sequence[int], rows: int = 1) -> Costs:
    """Costs from turns of `time_rounds`: a round in units of its turn's plain steps, times what a plain step takes."""
    units = {count: [_typical([whole for whole, _, _ in turn[count, 0]]) if (count, 0) in turn else None
                     for turn in turns] for count in _counts(rows)}
    table: dict[int, dict[int, float]] = {}
    parts: dict[int, dict[int, tuple[float, float]]] = {}
    for count, own in units.items():
        first = [(a, b) for a, b in zip(own, units[1], strict=True) if a and b]
        table[count] = {0: median(b for _, b in first) * median(a / b for a, b in first)} if first else {}
        parts[count] = {}
        for proposals in sorted({k for turn in turns for n, k in turn if n == count}):
            found = [(unit, seconds) for turn, unit in zip(turns, own, strict=True) if unit
                     for seconds in turn.get((count, proposals), ())]
            if proposals and found:
                table[count][proposals] = table[count][0] * _typical([whole / unit for unit, (whole, _, _) in found])
            if found:
                parts[count][proposals] = (fmean(one[1] for _, one in found), fmean(one[2] for _, one in found))
        missing = [length for length in lengths if length not in table[count]]
        if missing or 0 not in table[count]:  # looked up too rarely, or ended too soon: from forwards alone
            longest = max(answers, key=lambda answer: len(answer.tokens))
            text = [*longest.prompt, *longest.tokens[: len(longest.tokens) // 4]]
            forward = _forward_seconds(target, [text] * count, [0, *missing], 5 * len(turns))
            step = 0.0 if draft is None else _forward_seconds(draft, [text] * count, [0], 5 * len(turns))[0]
            table[count].setdefault(0, forward[0])
            table[count] |= {length: table[count][0] + forward[length] - forward[0] + length * step
                             for length in missing}
    return Costs(table, parts, _doubt(turns, rows))


def _counts(rows: int) -> list[int]:
    """Of how many rows rounds are timed; those in between are interpolated."""
    return sorted({1, rows, *([(rows + 1) // 2] if rows > 3 else [])})


def _typical(seconds: Sequence[float]) -> float:
    """The mean without the highest and lowest tenth: rounds differ by nature, and now and then by an accident."""
    cut = len(seconds) // 10
    return fmean(sorted(seconds)[cut:len(seconds) - cut])


def _doubt(turns: Sequence[Samples], rows: int) -> float:
    """How far the costs of rounds, in plain steps, may be off: half the 95 % interval, of the median draft length."""
    found = []
    for key in {key for turn in turns for key in turn if key[0] == rows and key[1]}:
        logs = [math.log(_typical([one[0] for one in turn[key]]) / _typical([one[0] for one in turn[rows, 0]]))
                for turn in turns if key in turn and (rows, 0) in turn]
        if len(logs) > len(turns) / 2 and len(logs) > 1:
            found.append(1.96 * stdev(logs) / len(logs) ** 0.5)
    return median(found) if found else math.inf


def _forward_seconds(target: PreTrainedModel, texts: list[list[int]], lengths: Sequence[int], repeats: int
                     ) -> dict[int, float]:
    """Median seconds of a target forward of 1 + each length tokens a row, behind these texts."""
    import torch

    from specbeam.decoding.rows import Clock
    from specbeam.engine.support import adapt, evaluating
    from specbeam.engine.tree import TokenTree, chain

    clock, seen = Clock(target.device), defaultdict[int, list[float]](list)
    with torch.inference_mode(), evaluating(target):
        tree = TokenTree(adapt(target), len(texts), len(texts[0]) + max(lengths) + 1)
        unread = chain(texts, tree.device)
        _, nodes = tree.extend(tree.tips([0] * len(texts)), unread, last_only=True)
        tips = nodes.pick(unread.lengths[:, None] - 1)
        for repeat in range(repeats + 1):
            for length in lengths:
                block = chain([text[-1:] * (length + 1) for text in texts], tree.device)
                start = clock.mark()
                tree.extend(tips, block)[0].argmax(-1).tolist()
                if repeat:
                    seen[length].append(clock.seconds(start, clock.mark()))
    return {length: median(found) for length, found in seen.items()}


def _rounds_of(traces: Sequence[Any]) -> list[tuple[int, int, tuple[float, float, float]]]:
    """Of each round of a batch: live rows, longest proposal, and seconds: whole, drafting, target forward.

    What lies between the rounds, and the shares of drafting and verifying, are the run's own averages."""
    most = max(len(trace.rounds) for trace in traces)
    if not most:
        return []
    rounds = [[trace.rounds[i] for trace in traces if i < len(trace.rounds)] for i in range(most)]
    own = [max(one.seconds for one in batch) for batch in rounds]
    between = (traces[0].decode_seconds - sum(own)) / most
    draft, verify = (traces[0].draft_seconds or 0.0) / most, (traces[0].verify_seconds or 0.0) / most
    return [(len(batch), max(one.drafted for one in batch), (seconds + between, draft, verify))
            for batch, seconds in zip(rounds, own, strict=True)]
