"""`specbeam audit`: does a speculative method give the target's own output, on a user's own pair?

Greedy and beams: token for token against the plain method in the same dtype, greedy also as one ragged batch. Where
they first differ, the target says why: two tokens whose logits, as the processors left them, lie closer than rounding
are a near-tie (the kernels for one token and for several round differently, in bf16 visibly), anything else is a real
difference. Of beams that is the first step after which other beams run on, and the scores of the two that took each
other's place, by a plain forward of each. Sampling: draws of the first four new tokens against their exact
distribution, computed by plain forwards over all that can be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specbeam.decoding import METHODS, method_family
from specbeam.decoding.request import Request, settle
from specbeam.sampling import process
from specbeam.trace import SearchTree

# A false alarm of the sampling test: one in a hundred thousand audits.
FALSE_ALARM = 1e-5
_KEPT = 4  # tokens that sampling may choose from at each step (top_k), so that all outcomes can be counted
_STEPS = 4  # the first comes from prefill, then two proposals and what follows them
_MOST_DRAWS = 5  # times `draws`, where the draft is rarely right and acceptance would hardly be tried
_PILOT = 100  # draws that only count what is accepted
_PROMPTS = 3  # to draw after
_BATCH = 8  # rows of the greedy batch that run at once
_OF_DRAFTS = ("draft_tokenizer", "temperature")  # no options of the plain greedy and beam methods
# Logits closer than this part of the largest one are equal up to rounding of the dtype.
_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@dataclass(frozen=True)
class Finding:
    """One method in one dtype. verdict: same | near-ties | different; detail: one sentence."""

    method: str
    dtype: str
    verdict: str
    detail: str


def audit_tokens(label: str, settings: dict[str, Any], target: Any, draft: Any, prompts: Sequence[Tensor]) -> Finding:
    """Greedy or beams: the method's tokens against the plain method's, prompt by prompt; greedy also in one batch."""
    settings = dict(settings)
    kind = settings.pop("kind")
    plain_kind = "beam" if METHODS[kind].family == "beam" else "greedy"
    own = (*METHODS[kind].options, *_OF_DRAFTS)
    shared = {name: value for name, value in settings.items() if name not in own}
    watched = {"trace": True} if plain_kind == "beam" and settings.get("num_beams", 2) > 1 else {}
    plain: list[list[int]] = []
    ties: list[str] = []

    def differ(number: int, mine: list[int], where: str = "") -> tuple[str, bool]:
        """Where an answer leaves the plain one, and whether that is more than rounding."""
        theirs, prompt = plain[number], prompts[number]
        place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                     min(len(mine), len(theirs)))
        gap, size = _gap(target, prompt, theirs[:place], _at(theirs, place), _at(mine, place), shared)
        return (f"prompt {number}{where}, new token {place}: the target's logits differ by {gap:.3g} there",
                not gap <= _ROUNDING[target.dtype] * size)  # NaN is no near-tie

    for number, prompt in enumerate(prompts):
        theirs = METHODS[plain_kind].load()(target, [prompt], **shared, **watched)
        ours = METHODS[kind].load()(target, draft, [prompt], **settings, **watched)
        plain.append(theirs.tokens[0])
        mine = ours.tokens[0]
        if mine == plain[-1]:
            continue
        if theirs.search is None:
            sentence, wrong = differ(number, mine)
        else:
            place, paths = _parting(theirs.search[0], ours.search[0])
            gap, size = _beam_gap(target, prompt, paths or ([plain[-1]], [mine]), shared)
            where = f"step {place}: the scores of the beams that run on" if paths else "the scores of the best answers"
            sentence, wrong = f"prompt {number}, {where} differ by {gap:.3g}", not gap <= _ROUNDING[target.dtype] * size
        if wrong:
            return Finding(label, _name(target), "different", sentence)
        ties.append(sentence)
    checked, how = len(prompts), "token for token"
    if plain_kind == "greedy" and len(prompts) > 1:
        checked, how = 2 * len(prompts), "token for token, each alone and all as a batch"
        batch = METHODS[kind].load()(target, draft, list(prompts), **settings, batch_size=min(_BATCH, len(prompts)))
        for number, mine in enumerate(batch.tokens):
            if mine != plain[number]:
                sentence, wrong = differ(number, mine, " in a batch")
                if wrong:
                    return Finding(label, _name(target), "different", sentence)
                ties.append(sentence)
    if ties:
        return Finding(label, _name(target), "near-ties", f"{len(ties)} of {checked} answers; {ties[0]}")
    return Finding(label, _name(target), "same", f"all {len(prompts)} answers {how}")


Paths = list[list[int]]


def _parting(plain: SearchTree, mine: SearchTree) -> tuple[int, tuple[Paths, Paths] | None]:
    """The first step after which other beams run on: what only the plain search kept, and what only the other one
    did; None where there is no such step."""
    def kept(tree: SearchTree, step: int) -> set[tuple[int, ...]]:
        return {tuple(tree.steps[s].candidates[n].token for s, n in tree.path_to(step, number))
                for number, one in enumerate(tree.steps[step].candidates)
                if one.survived_as is not None or one.finished_score is not None}

    for step in range(min(len(plain.steps), len(mine.steps))):
        a, b = kept(plain, step), kept(mine, step)
        if a != b:
            return step, (sorted(map(list, a - b)), sorted(map(list, b - a)))
    return len(plain.steps), None


def _beam_gap(target: Any, prompt: Tensor, paths: tuple[Paths, Paths], options: dict[str, Any]) -> tuple[float, float]:
    """How far the best of the one lies above the worst of the other in summed log-probability (of answers that ended:
    under the length penalty), and the target's largest logit in size times the square root of the steps."""
    if not all(paths):
        return float("inf"), 1.0
    request = _settled(target, prompt, options)
    scores: list[list[float]] = [[], []]
    size, penalty = 0.0, float(request.config.length_penalty or 0.0)
    ended = len({len(tokens) for side in paths for tokens in side}) > 1
    for side, found in zip(paths, scores, strict=True):
        for tokens in side:
            text = [*prompt.tolist(), *tokens]
            with torch.inference_mode():
                logits = target(input_ids=torch.tensor([text], device=target.device), use_cache=False).logits
            logits = logits[:, len(prompt) - 1: -1].float()
            logs = process(logits.log_softmax(-1), [request.rows[0].processors],
                           partial(_before, text, len(prompt)))[0]
            score = sum(float(logs[place, token]) for place, token in enumerate(tokens))
            found.append(score / len(tokens) ** penalty if ended else score)
            size = max(size, float(logits.abs().max()) * len(tokens) ** 0.5)
    return max(max(scores[0]) - min(scores[1]), max(scores[1]) - min(scores[0])), size


def audit_sampling(label: str, settings: dict[str, Any], target: Any, draft: Any, prompts: Sequence[Tensor], draws: int,
                   seed: int) -> Finding:
    """Sampling: the first tokens of `draws` answers or more against their exact distribution (chi-square).

    A few prompts share them. A fault shows where proposals are judged: if the draft is rarely right, there are up to
    five times as many (a pilot, which does not count, says how many).
    """
    settings = {**settings, "top_k": _KEPT, "eos_token_id": [], "max_new_tokens": _STEPS}
    kind = settings.pop("kind")
    own = (*METHODS[kind].options, "draft_tokenizer")
    prompts = prompts[:_PROMPTS]
    exact = {(number, *outcome): chance / len(prompts) for number, prompt in enumerate(prompts)
             for outcome, chance in exact_distribution(target, prompt, {
                 name: value for name, value in settings.items() if name not in own}).items()}

    def draw(first: int, count: int) -> tuple[list[tuple[int, ...]], int, int]:
        """Outcomes, and how many proposals were accepted and made."""
        numbers = [n % len(prompts) for n in range(first, first + count)]
        out = METHODS[kind].load()(target, draft, [prompts[n] for n in numbers], seed=seed + first, **settings)
        rounds = [one for row in out.trace for one in row.rounds]
        return ([(n, *tokens) for n, tokens in zip(numbers, out.tokens, strict=True)],
                sum(one.accepted for one in rounds), sum(one.drafted for one in rounds))

    _, right, made = draw(draws * _MOST_DRAWS + len(prompts), _PILOT)
    more = min(max(1.0, 0.4 * made / max(right, 1)), _MOST_DRAWS)
    count = -int(-draws * more // len(prompts)) * len(prompts)  # as many of each prompt
    counts: dict[tuple[int, ...], int] = dict.fromkeys(exact, 0)
    outside = accepted = proposed = 0
    for first in range(0, count, 48):
        outcomes, right, made = draw(first, min(48, count - first))
        accepted, proposed = accepted + right, proposed + made
        for outcome in outcomes:
            if outcome in counts:
                counts[outcome] += 1
            else:
                outside += 1
    if outside:
        return Finding(label, _name(target), "different", f"{outside} of {count} answers have probability 0")
    p_value, distance = chi_square([counts[o] for o in exact], list(exact.values()))
    chance = sum((2 / torch.pi * p * (1 - p) / count) ** 0.5 for p in exact.values()) / 2
    sentence = (f"{count} draws of {_STEPS} tokens after {len(prompts)} prompt{'s' * (len(prompts) > 1)}, "
                f"{accepted} of {proposed} proposals accepted: total variation {distance:.3f} (by chance alone about "
                f"{chance:.3f}), p = {p_value:.2g}")
    if count < 1000 or accepted < 200:
        sentence += "; a weak test, give more draws" + " or a better draft" * (count >= 1000)
    return Finding(label, _name(target), "same" if p_value > FALSE_ALARM else "different", sentence)


def exact_distribution(target: Any, prompt: Tensor, options: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Probability of every outcome of the first tokens, from plain forwards of the target and its processors."""
    request = settle(target, [prompt], None, sampled=True, **options)
    outcomes: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.inference_mode():
        for _ in range(request.rows[0].max_new_tokens):
            paths = [[*prompt.tolist(), *outcome] for outcome in outcomes]
            logits = target(input_ids=torch.tensor(paths, device=target.device), use_cache=False).logits[:, -1:]
            scores = process(logits.transpose(0, 1), [request.rows[0].processors], partial(_of, paths))
            grown = {}
            for (outcome, chance), row in zip(outcomes.items(), scores[0].softmax(-1), strict=True):
                for token in row.nonzero().flatten().tolist():
                    grown[(*outcome, token)] = chance * float(row[token])
            outcomes = grown
    return outcomes


def _before(text: list[int], first: int, _: int, node: int) -> list[int]:
    return text[: first + node]


def _of(paths: list[list[int]], _: int, node: int) -> list[int]:
    return paths[node]


def chi_square(counts: Sequence[int], expected: Sequence[float]) -> tuple[float, float]:
    """p-value of Pearson's test, outcomes expected less than five times pooled; and the total variation distance."""
    total = sum(counts)
    distance = sum(abs(n / total - p) for n, p in zip(counts, expected, strict=True)) / 2
    pooled: list[list[float]] = [[0.0, 0.0]]
    for n, p in sorted(zip(counts, expected, strict=True), key=lambda pair: pair[1]):
        pooled[-1] = [pooled[-1][0] + n, pooled[-1][1] + p * total]
        if pooled[-1][1] >= 5:
            pooled.append([0.0, 0.0])
    if pooled[-1][1] < 5 and len(pooled) > 1:
        rest = pooled.pop()
        pooled[-1] = [pooled[-1][0] + rest[0], pooled[-1][1] + rest[1]]
    if len(pooled) < 2:
        return 1.0, distance
    statistic = sum((n - e) ** 2 / e for n, e in pooled)
    half = torch.tensor((len(pooled) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64))), distance


def audit(methods: dict[str, dict[str, Any]], dtypes: Sequence[str], load: Callable[[str], Any],
          conversations: Sequence[Any], config: dict[str, Any], say: Callable[[Finding], None]) -> list[Finding]:
    """All methods in all dtypes. load(dtype): the models (specbeam.experiment.loaded.Models); conversations: what
    `render_prompt` takes; config: max_new_tokens, draws, seed, system_prompt; say: called with each finding as it
    comes."""
    findings = []
    for dtype in dtypes:
        models = load(dtype)
        prompts = [models.render([one], config["system_prompt"]).input_ids[0] for one in conversations]
        for label, settings in methods.items():
            settings = {**settings, "tokenizer": models.tokenizer}
            if settings.get("vocabulary", "same") != "same":
                settings["draft_tokenizer"] = models.draft_tokenizer
            if method_family(settings["kind"], settings) != "sample":
                findings.append(audit_tokens(label, settings, models.target, models.draft, prompts))
            elif models.target.dtype == torch.float32:  # the rounding of others is no property of the method
                findings.append(audit_sampling(label, settings, models.target, models.draft, prompts,
                                               config["draws"], config["seed"]))
            else:
                continue
            say(findings[-1])
    return findings


def _settled(target: Any, prompt: Tensor, options: dict[str, Any]) -> Request:
    """This prompt with its processors, which are those of one answer however many beams there are."""
    single = {name: value for name, value in options.items() if name not in ("num_beams", "num_return_sequences")}
    return settle(target, [prompt], None, sampled=False, **single)


def _gap(target: Any, prompt: Tensor, answer: list[int], plain: int | None, mine: int | None, options: dict[str, Any]
         ) -> tuple[float, float]:
    """Difference of the target's logits of two tokens after prompt and answer, as the processors leave them (that is
    what decoding chooses by), and its largest logit in size."""
    if plain is None or mine is None:
        return float("inf"), 1.0
    text = [*prompt.tolist(), *answer]
    with torch.inference_mode():
        logits = target(input_ids=torch.tensor([text], device=target.device), use_cache=False).logits[:, -1:].float()
    scores = process(logits, [_settled(target, prompt, options).rows[0].processors], lambda *_: text)[0, 0]
    return abs(float(scores[plain] - scores[mine])), float(logits.abs().max())


def _at(tokens: list[int], place: int) -> int | None:
    return tokens[place] if place < len(tokens) else None


def _name(target: Any) -> str:
    return str(target.dtype).removeprefix("torch.")
