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
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Chances = list[list[float]]  # at [tokens committed so far][i]: P(proposal i is accepted | those before it were)
COST_TOKENS = 32  # of one run that measures costs


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
    rows and proposals the seconds spent drafting and in the target's forward."""

    table: Mapping[int, Mapping[int, float]]
    parts: Mapping[int, Mapping[int, tuple[float, float]]] = field(default_factory=dict)

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
    from specbeam.metrics.likelihood import answer_logits
    from specbeam.sampling import process

    width = int(target.config.get_text_config(decoder=True).vocab_size)
    known = embedding(draft).shape[0]
    text = [*answer.prompt, *answer.tokens]

    def scores(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
        logits = answer_logits(model, ids, len(answer.tokens))
        return process(align(logits[None], width), [processors], lambda _, node: text[: len(answer.prompt) + node])[0]

    drafts = scores(draft, [min(token, known - 1) for token in text])
    tokens = torch.tensor(answer.tokens, device=drafts.device)
    if not sampled:
        return (drafts.argmax(-1) == tokens).double().tolist()
    p = scores(target, text).softmax(-1).to(drafts.device).gather(1, tokens[:, None])[:, 0].double()
    q = drafts.softmax(-1).gather(1, tokens[:, None])[:, 0].double()
    return torch.where(p > 0, (q / p).clamp(max=1.0), (q > 0).double()).tolist()


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

    Every run carries on from some way into answers of the target, so that the cache is as full as it would be; a
    round's seconds are of its drafting, its target forward and all the rest. Settings take turns, `repeats` times over.
    options: of the methods; `drafter`, `temperature` among them.
    """
    import torch

    from specbeam.decoding.greedy import greedy_generate
    from specbeam.decoding.sample import sample_generate
    from specbeam.decoding.speculative import speculative_generate
    from specbeam.runners.graph import warming

    counts = sorted({1, rows, *([(rows + 1) // 2] if rows > 3 else [])})
    by_length = sorted(answers, key=lambda answer: -len(answer.tokens))
    speculation = {name: options.pop(name) for name in ("drafter", "ngram") if name in options}
    temperature = options.get("temperature") or 0.0
    plainly = {name: value for name, value in options.items() if temperature or name != "temperature"}
    options = {**plainly, "max_new_tokens": min(options.get("max_new_tokens", COST_TOKENS), COST_TOKENS)}
    seen: dict[tuple[int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for repeat in range(repeats + 1):  # the first time around warms up
        for count in counts:
            for length in (0, *lengths):
                chosen = [by_length[(i + repeat) % min(len(by_length), max(rows, 4))] for i in range(count)]
                texts = [torch.tensor([*one.prompt, *one.tokens[: len(one.tokens) // 4]], device=target.device)
                         for one in chosen]
                gc.collect()
                with nullcontext() if repeat else warming():
                    if length:
                        out = speculative_generate(target, draft, texts, draft_length=length, **speculation, **options)
                    else:
                        out = (sample_generate if temperature else greedy_generate)(target, texts, **options)
                if repeat:
                    for live, proposals, seconds in _rounds_of(out.trace):
                        if live == count:
                            seen[live, proposals].append(seconds)
    table: dict[int, dict[int, float]] = {count: {} for count in counts}
    parts: dict[int, dict[int, tuple[float, float]]] = {count: {} for count in counts}
    for (live, proposals), found in seen.items():
        table[live][proposals] = median(whole for whole, _, _ in found)
        parts[live][proposals] = (fmean(draft for _, draft, _ in found), fmean(verify for _, _, verify in found))
    for count, own in table.items():
        missing = [length for length in lengths if length not in own]
        if missing or 0 not in own:  # looked up too rarely, or ended too soon: from forwards alone
            text = [*by_length[0].prompt, *by_length[0].tokens[: len(by_length[0].tokens) // 4]]
            forward = _forward_seconds(target, [text] * count, [0, *missing], 5 * repeats)
            step = 0.0 if draft is None else _forward_seconds(draft, [text] * count, [0], 5 * repeats)[0]
            own.setdefault(0, forward[0])
            own |= {length: own[0] + forward[length] - forward[0] + length * step for length in missing}
    return Costs(table, parts)


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
