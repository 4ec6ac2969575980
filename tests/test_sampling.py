"""Processed distributions and seeded draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LogitsProcessorList
from transformers.generation import logits_process as warp

from specbeam import InputError
from specbeam.sampling import draw, process, uniforms


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# draw

def test_a_draw_inverts_the_distribution_function():
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0]]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53, 1.0])
@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.0, 0.0, 1e-30], [1e-45, 0.0, 0.0], [0.0, 3e38, 3e38, 0.0]])
def test_a_token_without_weight_is_never_drawn(weights, uniform):
    token = draw(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64))
    assert weights[int(token)] > 0


@settings(derandomize=True, max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30).filter(any),
       uniform=st.floats(0, 1, exclude_max=True))
def test_any_draw_is_a_token_with_weight(weights, uniform):
    token = int(draw(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64)))
    assert weights[token] > 0
    assert sum(weights[:token]) <= uniform * sum(weights) * (1 + 1e-9)


def test_a_million_draws_have_the_frequencies_of_the_weights():
    weights = torch.tensor([5.0, 0.0, 1.0, 3.0, 0.01])
    uniform = uniforms(generators(0), [10**6], torch.device("cpu"))[0]
    counts = torch.bincount(draw(weights.expand(10**6, -1), uniform), minlength=5)
    kept = weights > 0
    assert counts[1] == 0
    assert stats.chisquare(counts[kept], (weights[kept].double() / weights.double().sum() * 10**6)).pvalue > 1e-4


def test_a_vocabulary_of_real_size_is_drawn_exactly_at_its_ends():
    weights = torch.full((2, 152_064), 1 / 152_064)
    assert draw(weights, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [0, 152_063]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0]])
def test_where_no_token_can_be_drawn_it_is_said(weights):
    with pytest.raises(InputError, match="no token to draw"):
        draw(torch.tensor([weights]), torch.tensor([0.5], dtype=torch.float64))


# uniforms

def test_each_row_takes_from_its_own_generator_what_it_needs():
    numbers = uniforms(generators(3, 4, 5), [2, 0, 3], torch.device("cpu"))
    assert numbers.shape == (3, 3)
    assert numbers.dtype == torch.float64
    assert numbers[0, 2] == numbers[1].sum() == 0
    assert torch.equal(numbers[2], uniforms(generators(5), [3], torch.device("cpu"))[0])


def test_what_a_row_takes_does_not_depend_on_its_batch_or_on_how_often_it_asks():
    together = uniforms(generators(7, 8), [4, 4], torch.device("cpu"))[0]
    alone = generators(7)
    pieces = [uniforms(alone, [n], torch.device("cpu"))[0] for n in (1, 2, 1)]
    assert torch.equal(torch.cat(pieces), together)


def test_rows_of_neighbouring_seeds_are_uniform_and_independent():
    """Rows of a batch have seeds s, s + 1, …: their numbers must not hang together."""
    numbers = uniforms(generators(*range(20_000)), [2] * 20_000, torch.device("cpu"))
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    for first, second in ((numbers[:, 0], numbers[:, 1]), (numbers[:-1, 0], numbers[1:, 0])):
        cells = torch.bincount((first * 8).long() * 8 + (second * 8).long(), minlength=64)
        assert stats.chisquare(cells).pvalue > 1e-4


# process

LOGITS = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)) * 3
PATHS = {(row, node): [1 + row, 4, 5 + node][: 2 + (node > 0)] for row in range(2) for node in range(3)}


def lists(*processors) -> list[LogitsProcessorList]:
    return [LogitsProcessorList(processors) for _ in range(2)]


def never(row: int, node: int) -> list[int]:
    raise AssertionError("the history is not needed here")


def test_without_processors_the_logits_are_the_scores_in_fp32():
    scores = process(LOGITS.bfloat16(), lists(), never)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, LOGITS.bfloat16().float())


@pytest.mark.parametrize("processor", [
    warp.TemperatureLogitsWarper(0.7), warp.TopKLogitsWarper(4), warp.TopPLogitsWarper(0.6), warp.MinPLogitsWarper(0.2),
    warp.TypicalLogitsWarper(0.5), warp.EpsilonLogitsWarper(0.05), warp.EtaLogitsWarper(0.05),
    warp.SuppressTokensLogitsProcessor([3, 4]), warp.LogitNormalization(),
], ids=lambda one: type(one).__name__)
def test_what_looks_at_scores_only_needs_no_history_and_equals_transformers(processor):
    scores = process(LOGITS, lists(processor), never)
    for row in range(2):
        for node in range(3):
            assert torch.equal(scores[row, node], processor(torch.zeros(1, 0).long(), LOGITS[row, node][None])[0])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("processors", [
    [warp.RepetitionPenaltyLogitsProcessor(1.7)], [warp.NoRepeatNGramLogitsProcessor(1)],
    [warp.RepetitionPenaltyLogitsProcessor(1.7), warp.TemperatureLogitsWarper(0.5), warp.TopKLogitsWarper(3)],
], ids=["repetition", "n-gram", "three"])
def test_what_looks_at_the_history_sees_each_nodes_own_path(processors, shared):
    chosen = [LogitsProcessorList(processors)] * 2 if shared else lists(*processors)
    scores = process(LOGITS, chosen, lambda row, node: PATHS[row, node])
    for (row, node), path in PATHS.items():
        assert torch.equal(scores[row, node], chosen[row](torch.tensor([path]), LOGITS[row, node][None])[0])


def test_rows_with_lists_of_their_own_are_processed_by_these():
    own = [LogitsProcessorList([warp.RepetitionPenaltyLogitsProcessor(penalty)]) for penalty in (1.5, 3.0)]
    scores = process(LOGITS, own, lambda row, node: [4])
    assert torch.equal(scores[0, 0], own[0](torch.tensor([[4]]), LOGITS[0, 0][None])[0])
    assert torch.equal(scores[1, 2], own[1](torch.tensor([[4]]), LOGITS[1, 2][None])[0])


def test_the_given_logits_stay_as_they_are():
    before = LOGITS.clone()
    process(LOGITS, lists(warp.RepetitionPenaltyLogitsProcessor(2.0)), lambda row, node: PATHS[row, node])
    process(LOGITS, lists(warp.TopKLogitsWarper(2)), never)
    assert torch.equal(LOGITS, before)
