"""The same tokens or not, where they part, and how near a tie it was."""

from __future__ import annotations

import pytest
import torch
from tiny import prompts, tiny_model

from specbeam.metrics.exactness import first_difference, logit_gap


@pytest.mark.parametrize(("ours", "theirs", "position"), [
    ([1, 2, 3], [1, 2, 3], None), ([], [], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [4], 0),
])
def test_first_difference_is_a_position_or_none(ours, theirs, position):
    assert first_difference(ours, theirs) == position


def test_the_gap_is_the_targets_top_logit_minus_the_other_tokens():
    target, context = tiny_model("llama"), prompts((6,))[0].tolist()
    shared = [5, 9]
    with torch.no_grad():
        logits = target(torch.tensor([context + shared])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    gap = logit_gap(target, context, [*shared, order[0], 7], [*shared, order[3]])
    assert gap == pytest.approx((logits[order[0]] - logits[order[3]]).item(), abs=1e-4)
    assert gap == logit_gap(target, context, [*shared, order[3]], [*shared, order[0], 7])
    neither = logit_gap(target, context, [*shared, order[2]], [*shared, order[5]])
    assert neither == pytest.approx((logits[order[0]] - logits[order[5]]).item(), abs=1e-4)


def test_there_is_no_gap_where_one_output_just_ends():
    target = tiny_model("llama")
    assert logit_gap(target, [5], [6, 7], [6]) is None
    assert logit_gap(target, [5], [6], [6]) is None
