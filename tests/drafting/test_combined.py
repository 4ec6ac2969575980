"""Who is asked, row by row: a long match, else the draft model, else the table of successors."""

from __future__ import annotations

import pytest
import torch
from refusals import refusal
from tiny import prompts, tiny_draft, tiny_model

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting.combined import points
from specbeam.drafting.draft_model import DraftModel


def rounds(draft: bool = True, **options):
    target = tiny_model("gemma3")
    rows = [row.repeat(3) for row in prompts((4, 6))]
    options = {"max_new_tokens": 40, "eos_token_id": None, **options}
    out = speculative_generate(target, tiny_draft(target) if draft else None, rows, drafter="combined", **options)
    assert out.tokens == greedy_generate(target, rows, max_new_tokens=40, eos_token_id=None).tokens
    return [r for row in out.trace for r in row.rounds]


def test_without_a_long_enough_match_only_the_draft_speaks():
    assert {r.drafter for r in rounds(min_match=1000) if r.drafted} == {"draft_model"}


def test_without_a_draft_model_the_table_of_successors_speaks():
    assert {r.drafter for r in rounds(draft=False, min_match=1000) if r.drafted} == {"token_recycling"}


def test_a_shorter_match_suffices_when_it_is_allowed_to():
    by = [sum(r.drafter == "suffix" for r in rounds(min_match=n)) for n in (1, 3, 1000)]
    assert by[0] > by[1] > 0 == by[2]


def test_where_every_row_has_a_match_the_draft_model_is_not_run(monkeypatch):
    asked: list[list[int]] = []
    propose = DraftModel.propose

    def counted(self, sequences, limits, length):
        asked.append(list(limits))
        return propose(self, sequences, limits, length)

    monkeypatch.setattr(DraftModel, "propose", counted)
    done = rounds(min_match=2)
    assert all(max(limits) > 0 for limits in asked)
    drafted = sum(r.drafter == "draft_model" for r in done)
    assert sum(limit > 0 for limits in asked for limit in limits) == drafted


def test_a_corpus_is_asked_too(tmp_path):
    target, row = tiny_model("gemma3"), prompts((6,))
    options = {"max_new_tokens": 40, "eos_token_id": None}
    answer = greedy_generate(target, row, **options).tokens[0]
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"tokens": {answer}}}\n')
    out = speculative_generate(target, tiny_draft(target), row, drafter="combined", corpus=str(path), min_match=2,
                               **options)
    assert out.tokens == [answer]
    assert {r.drafter for r in out.trace[0].rounds[3:]} == {"suffix"}


def test_a_row_without_a_match_is_not_said_to_lack_confidence():
    """With a threshold that no draft falls below, only the matches can."""
    done = rounds(min_match=1000, confidence_threshold=1e-9)
    assert {r.why for r in done if r.drafter == "draft_model"} <= {"length", "end of answer"}


def test_q_of_a_row_that_was_not_drawn_is_one_at_its_tokens():
    q = torch.rand(2, 2, 5)
    mixed = points(q.clone(), [[], [4, 0, 2]], [True, False])
    assert mixed.shape == (2, 3, 5)
    assert torch.equal(mixed[0, :2], q[0]) and not mixed[0, 2].any()
    assert mixed[1].nonzero().tolist() == [[0, 4], [1, 0], [2, 2]] and mixed[1].sum() == 3


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_sampling_at_almost_no_temperature_is_greedy(acceptance):
    """With lookups longer than the draft's proposals, in one batch."""
    rounds(temperature=1e-4, top_k=0, min_match=2, acceptance=acceptance, draft_length=7)


def test_the_shape_of_a_tree_that_no_draft_grows_is_refused():
    said = refusal(speculative_generate, tiny_model("llama"), None, prompts((6,)), drafter="combined", branching=[2, 1])
    assert "drafter=combined has no draft" in said
