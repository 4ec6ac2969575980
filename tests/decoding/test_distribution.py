"""Sampling draws from the exact distribution, found by brute force; so does sampled speculation, whatever its draft.

A tiny Llama with ten tokens. The exact joint probabilities of every answer come from plain forwards of every prefix and
transformers' own processors. Compared are three tokens: of plain sampling the first three; of speculation those
behind the first, which are proposals, corrections and a bonus.

False alarms: seeds are fixed, so that the tests cannot flicker. With fresh seeds a correct sampler would fail each
chi-square check with probability 1e-4, and each check of the total variation with less than that (McDiarmid: it
exceeds its expectation by more than sqrt(ln(1e4) / 2N) that rarely). A control has to fail by far more.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers as hf
from reference import acceptance_rate
from scipy import stats
from tiny import build
from transformers import LogitsProcessorList
from transformers.generation import logits_process as warp

from specbeam import sample_generate, speculative_generate
from specbeam.acceptance import rejection_sample
from specbeam.drafting.draft_model import DraftModel
from specbeam.sampling import draw

TOKENS, EOS, ROWS, CALLS = 10, 9, 2500, 8
TARGET, DRAFT = 5, 3  # seeds of the two models
FALSE_ALARM = 1e-4
PROMPT = [3, 1, 4, 1]

# name → (options of the method, transformers' processors in the order of generate)
SHAPES = {
    "temperature 1": ({"temperature": 1.0, "top_k": 0}, []),
    "temperature 0.6": ({"temperature": 0.6, "top_k": 0}, [warp.TemperatureLogitsWarper(0.6)]),
    "top-k": ({"temperature": 1.5, "top_k": 4}, [warp.TemperatureLogitsWarper(1.5), warp.TopKLogitsWarper(4)]),
    "top-p": ({"temperature": 1.2, "top_k": 0, "top_p": 0.8},
              [warp.TemperatureLogitsWarper(1.2), warp.TopPLogitsWarper(0.8)]),
    "min-p": ({"temperature": 1.0, "top_k": 0, "min_p": 0.1}, [warp.MinPLogitsWarper(0.1)]),
    "all at once": ({"temperature": 1.3, "top_k": 6, "top_p": 0.9},
                    [warp.TemperatureLogitsWarper(1.3), warp.TopKLogitsWarper(6), warp.TopPLogitsWarper(0.9)]),
    "repetition penalty": ({"temperature": 1.2, "top_k": 0, "repetition_penalty": 1.8},
                           [warp.RepetitionPenaltyLogitsProcessor(1.8), warp.TemperatureLogitsWarper(1.2)]),
}
# Of speculation; the others are heavy.
FAST = [("temperature 1", 2), ("temperature 1", 3), ("top-k", 2), ("top-p", 3),
        ("all at once", 2), ("repetition penalty", 2)]


@functools.cache
def small(seed: int) -> hf.PreTrainedModel:
    config = hf.LlamaConfig(vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                            num_attention_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=EOS,
                            pad_token_id=None)
    return build(config, seed=seed)


@functools.cache
def exact(shape: str, steps: int) -> dict[tuple[int, ...], float]:
    """The probability of every answer of at most `steps` tokens."""
    processors = LogitsProcessorList(SHAPES[shape][1])
    running, done = {(): 1.0}, {}
    for _ in range(steps):
        prefixes = list(running)
        ids = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
        with torch.no_grad():
            logits = small(TARGET)(input_ids=ids, use_cache=False).logits[:, -1].float()
        after = processors(ids, logits).double().softmax(-1).tolist()
        following: dict[tuple[int, ...], float] = {}
        for prefix, row in zip(prefixes, after, strict=True):
            for token, probability in enumerate(row):
                if probability > 0:
                    (done if token == EOS else following)[(*prefix, token)] = running[prefix] * probability
        running = following
    return running | done


def part(probabilities: dict[tuple[int, ...], float], first: int, last: int) -> dict[tuple[int, ...], float]:
    """The distribution of tokens [first, last) of the answers."""
    found: dict[tuple[int, ...], float] = {}
    for answer, probability in probabilities.items():
        found[answer[first:last]] = found.get(answer[first:last], 0.0) + probability
    return found


def disagreement(counts: Counter, wanted: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """The chi-square p-value, and how far the total variation exceeds what chance allows (0 or less: it does not)."""
    draws = sum(counts.values())
    assert sum(wanted.values()) == pytest.approx(1.0)
    if set(counts) - set(wanted):
        return 0.0, math.inf  # something was drawn that cannot be
    common = [cell for cell, probability in wanted.items() if probability * draws >= 5]
    rest = 1.0 - sum(wanted[cell] for cell in common)
    observed = [counts[cell] for cell in common]
    expected = [wanted[cell] * draws for cell in common]
    if rest * draws >= 5:
        observed, expected = [*observed, draws - sum(observed)], [*expected, rest * draws]
    scale = sum(observed) / sum(expected)
    p_value = float(stats.chisquare(observed, [cell * scale for cell in expected]).pvalue)
    variation = sum(abs(counts[cell] / draws - probability) for cell, probability in wanted.items()) / 2
    chance = sum(math.sqrt(p * (1 - p) / draws) for p in wanted.values()) / 2
    return p_value, variation - chance - math.sqrt(math.log(1 / FALSE_ALARM) / (2 * draws))


def assert_agrees(counts: Counter, wanted: dict[tuple[int, ...], float]) -> None:
    assert sum(counts.values()) >= 20_000
    p_value, excess = disagreement(counts, wanted)
    assert p_value > FALSE_ALARM
    assert excess <= 0


def sampled(shape: str, calls: int = CALLS) -> Counter:
    counts: Counter = Counter()
    for call in range(calls):
        out = sample_generate(small(TARGET), torch.tensor([PROMPT] * ROWS), max_new_tokens=3,
                              seed=list(range(call * ROWS, (call + 1) * ROWS)), **SHAPES[shape][0])
        counts.update(tuple(tokens) for tokens in out.tokens)
    return counts


def speculated(shape: str, draft_length: int, draft: int = DRAFT, calls: int = CALLS) -> Counter:
    counts: Counter = Counter()
    for call in range(calls):
        out = speculative_generate(small(TARGET), small(draft), torch.tensor([PROMPT] * ROWS), max_new_tokens=5,
                                   draft_length=draft_length, seed=list(range(call * ROWS, (call + 1) * ROWS)),
                                   **SHAPES[shape][0])
        counts.update(tuple(tokens[1:4]) for tokens in out.tokens)
        if draft == TARGET:
            assert acceptance_rate(out) > 0.9
    return counts


@pytest.mark.parametrize("shape", [
    pytest.param(shape, marks=pytest.mark.heavy if shape in ("temperature 0.6", "min-p") else ()) for shape in SHAPES])
def test_sampling_draws_from_the_exact_distribution(shape):
    assert_agrees(sampled(shape), exact(shape, 3))


@pytest.mark.parametrize("shape, draft_length", [
    pytest.param(shape, length, marks=() if (shape, length) in FAST else pytest.mark.heavy)
    for shape in SHAPES for length in (1, 2, 3)])
def test_sampled_speculation_draws_from_the_exact_distribution(shape, draft_length):
    """Draft length 2: two proposals and a bonus (or corrections); 3: three proposals."""
    assert_agrees(speculated(shape, draft_length), part(exact(shape, 4), 1, 4))


def test_a_target_that_drafts_for_itself_draws_from_its_own_distribution():
    assert_agrees(speculated("temperature 1", 2, draft=TARGET), part(exact("temperature 1", 4), 1, 4))


def test_the_first_token_of_speculation_is_drawn_from_the_target_too():
    counts: Counter = Counter()
    for call in range(CALLS):
        out = speculative_generate(small(TARGET), small(DRAFT), torch.tensor([PROMPT] * ROWS), max_new_tokens=2,
                                   temperature=1.0, top_k=0, seed=list(range(call * ROWS, (call + 1) * ROWS)))
        counts.update(tuple(tokens) for tokens in out.tokens)
    assert_agrees(counts, exact("temperature 1", 2))


def test_the_draft_is_neither_hopeless_nor_perfect():
    """Else acceptance or residual would hardly be exercised."""
    out = speculative_generate(small(TARGET), small(DRAFT), torch.tensor([PROMPT] * 500), max_new_tokens=5,
                               draft_length=2, temperature=1.0, top_k=0)
    assert 0.3 < acceptance_rate(out) < 0.8


# Negative controls: each is a mistake that has been made, and the check above sees it.

def _without_residual(proposed, p, q, lengths, uniform):
    """After a rejection draw from p instead of max(0, p - q)."""
    accepted, _ = rejection_sample(proposed, p, q, lengths, uniform)
    rows = torch.arange(len(p))
    return accepted, draw(p[rows, accepted], uniform.gather(1, lengths[:, None]).squeeze(1))


def _bonus_from_the_draft(proposed, p, q, lengths, uniform):
    """All accepted: one more token from the draft's last distribution."""
    accepted, following = rejection_sample(proposed, p, q, lengths, uniform)
    if q is None:  # prefill: nothing was proposed
        return accepted, following
    wrong = draw(q[torch.arange(len(q)), (lengths - 1).clamp(min=0)],
                 uniform.gather(1, lengths[:, None]).squeeze(1))
    return accepted, torch.where(accepted == lengths, wrong, following)


def _reused_uniform(proposed, p, q, lengths, uniform):
    """The number that rejected a proposal also draws its correction."""
    accepted, _ = rejection_sample(proposed, p, q, lengths, uniform)
    return rejection_sample(proposed, p, q, lengths, uniform.scatter(1, lengths[:, None],
                                                                   uniform.gather(1, accepted[:, None])))


@pytest.mark.parametrize("mistake", [_without_residual, _bonus_from_the_draft, _reused_uniform])
def test_control_a_wrong_rule_is_caught(mistake, monkeypatch):
    monkeypatch.setattr("specbeam.acceptance.rejection_sample", mistake)
    p_value, excess = disagreement(speculated("temperature 1", 2, calls=3), part(exact("temperature 1", 4), 1, 4))
    assert p_value < FALSE_ALARM**2
    assert excess > 0 or mistake is _reused_uniform  # a small mistake, which only chi-square sees


def test_control_a_draft_that_reports_other_probabilities_than_it_drew_from_is_caught(monkeypatch):
    original = DraftModel.propose

    def lies(self, sequences, limits, length):
        proposal = original(self, sequences, limits, length)
        return replace(proposal, q=(proposal.q**2).div((proposal.q**2).sum(-1, keepdim=True)))

    monkeypatch.setattr(DraftModel, "propose", lies)
    p_value, _ = disagreement(speculated("temperature 1", 2, calls=3), part(exact("temperature 1", 4), 1, 4))
    assert p_value < FALSE_ALARM**2


@pytest.mark.parametrize("shape", ["temperature 1", "top-k"])
def test_control_another_temperature_is_caught(shape):
    p_value, excess = disagreement(sampled(shape, calls=3), exact("temperature 0.6", 3))
    assert p_value < FALSE_ALARM**2
    assert excess > 0
