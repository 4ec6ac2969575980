"""Every drafter on every family of models: the target's own tokens, however an answer ends, in any batch.

Processors and distributions: tests/decoding/test_matrix.py.
"""

from __future__ import annotations

from functools import partial
from itertools import zip_longest

import pytest
import torch
from law import all_answers, draws, law, same_law, small_target
from tiny import EOS, prompts, tiny_draft, tiny_model

from specbeam import acceptance as rules
from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.sample import sample_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting import combined, token_recycling

# name → (with a draft model, options)
DRAFTERS = {
    "prompt_lookup": (False, {"drafter": "prompt_lookup", "draft_length": 6}),
    "prompt_lookup tree": (False, {"drafter": "prompt_lookup", "branches": 3}),
    "suffix": (False, {"drafter": "suffix", "draft_length": 10}),
    "token_recycling": (False, {"drafter": "token_recycling"}),
    "early_exit": (False, {"drafter": "early_exit", "exit_layer": 2}),
    "early_exit tree": (False, {"drafter": "early_exit", "branching": [2, 2, 1]}),
    "combined with recycling": (False, {"drafter": "combined", "min_match": 2}),
    "combined with a draft": (True, {"drafter": "combined", "min_match": 2}),
    "combined with a drafted tree": (True, {"drafter": "combined", "min_match": 2, "branching": [2, 1, 1]}),
    "combined with a grown tree": (True, {"drafter": "combined", "min_match": 2, "tree_nodes": 6}),
}
FAMILIES = ("llama", "gpt2", "gemma3-conditional", "mistral-window")

every_drafter = pytest.mark.parametrize("name", DRAFTERS)


def speculate(name, target, *args, noise=0.02, **options):
    with_draft, own = DRAFTERS[name]
    return speculative_generate(target, tiny_draft(target, noise) if with_draft else None, *args, **own, **options)


def repetitive(lengths=(4, 7, 3, 10)) -> list[torch.Tensor]:
    """Ragged prompts that say everything three times."""
    return [row.repeat(3) for row in prompts(lengths)]


@every_drafter
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_plain_greedy_in_a_ragged_batch_that_rows_leave(name, family):
    target = tiny_model(family)
    wanted = greedy_generate(target, repetitive(), max_new_tokens=50)
    got = speculate(name, target, repetitive(), max_new_tokens=50)
    assert got.tokens == wanted.tokens
    assert sum(r.accepted for row in got.trace for r in row.rounds) > 0


@every_drafter
def test_an_end_inside_a_proposal_ends_the_answer_there(name):
    target = tiny_model("llama")
    free = greedy_generate(target, repetitive(), max_new_tokens=40, eos_token_id=None).tokens
    ends = [row[9] for row in free]  # tokens that are said on the way
    prompt = [torch.cat([row, torch.tensor(answer), row]) for row, answer in zip(repetitive(), free, strict=True)]
    wanted = greedy_generate(target, prompt, max_new_tokens=40, eos_token_id=[EOS, *ends])
    got = speculate(name, target, prompt, max_new_tokens=40, eos_token_id=[EOS, *ends])
    assert [row[0].tokens for row in got.hypotheses] == [row[0].tokens for row in wanted.hypotheses]
    assert [row[0].finish_reason for row in got.hypotheses] == [row[0].finish_reason for row in wanted.hypotheses]


def test_the_greedy_test_would_notice_a_proposal_accepted_unseen(monkeypatch):
    target = tiny_model("llama")
    monkeypatch.setattr(rules, "follow", lambda tokens, parents, best: (list(range(len(tokens))), best[-1]))
    assert speculate("suffix", target, repetitive(), max_new_tokens=40).tokens != greedy_generate(
        target, repetitive(), max_new_tokens=40).tokens


@every_drafter
def test_the_trace_says_who_proposed_what(name):
    own = DRAFTERS[name][1]["drafter"]
    known = {"combined": {"suffix", "token_recycling", "draft_model"}}.get(own, {own}) | {"plain"}
    for row in speculate(name, tiny_model("llama"), repetitive(), max_new_tokens=30).trace:
        assert {r.drafter for r in row.rounds} <= known
        assert all(r.drafted == len(r.proposed) == len(r.parents) for r in row.rounds)
        assert all(r.why for r in row.rounds)


def test_rows_of_one_batch_ask_different_drafters_in_the_same_round():
    target = tiny_model("llama")
    out = speculative_generate(target, tiny_draft(target), repetitive(), drafter="combined", min_match=1,
                               max_new_tokens=30)
    rounds = zip_longest(*([r.drafter for r in row.rounds] for row in out.trace))
    assert any({"suffix", "draft_model"} <= set(together) for together in rounds)


@every_drafter
def test_a_sampled_row_is_the_same_in_any_batch_and_at_any_time(name):
    target, rows = tiny_model("llama"), repetitive()
    options = {"temperature": 0.3, "max_new_tokens": 20}
    together = speculate(name, target, rows, seed=[5, 6, 7, 8], **options)
    alone = [speculate(name, target, [row], seed=[seed], **options).tokens[0]
             for row, seed in reversed(list(zip(rows, [5, 6, 7, 8], strict=True)))]
    assert together.tokens == alone[::-1]


@pytest.fixture(scope="module")
def small():
    """A target, and a prompt in its own words: what is looked up in it is often right."""
    target = small_target()
    said = sample_generate(target, [torch.tensor([3, 4, 5])], max_new_tokens=20, temperature=0.4, seed=0).tokens[0]
    return target, torch.tensor([3, 4, 5, *said])


def sampled_combination(small):
    target, prompt = small
    expected = law(target, prompt, 3, lambda ids, logits: logits)
    generate = partial(speculate, "combined with a draft", target, noise=0.3)
    return same_law(draws(generate, prompt, 3, 3000, temperature=1.0, top_k=0), expected)


def test_a_match_beside_drawn_rows_must_be_a_point_in_q(small, monkeypatch):
    """Planted: the row keeps the q of the draft, from which its tokens were not drawn."""
    assert sampled_combination(small)
    monkeypatch.setattr(combined, "points", lambda q, chains, drawn: torch.nn.functional.pad(
        q, (0, 0, 0, max(0, max(map(len, chains)) - q.shape[1]))) + 0.1)
    assert not sampled_combination(small)


def test_a_drawn_token_must_not_be_dropped_for_what_it_is(small, monkeypatch):
    """Planted: the draft's chain is replaced by nothing when its first token is below 5."""
    honest = combined.Combined.propose

    def choosy(self, sequences, limits, length):
        proposal = honest(self, sequences, limits, length)
        if proposal.q is None:
            return proposal
        for row, tokens in enumerate(proposal.tokens):
            if tokens and tokens[0] < 5:
                del tokens[:], proposal.parents[row][:]
        return proposal

    monkeypatch.setattr(combined.Combined, "propose", choosy)
    assert not sampled_combination(small)


def test_the_law_covers_every_answer_and_sums_to_one(small):
    expected = law(*small, 2, lambda ids, logits: logits)
    assert set(expected) == set(all_answers(2)) and sum(expected.values()) == pytest.approx(1)


def test_forgetting_makes_token_recycling_start_anew():
    target = tiny_model("llama")
    token_recycling.forget(target)
    first = [speculate("token_recycling", target, repetitive((4,)), max_new_tokens=30).trace[0] for _ in range(2)]
    assert len(first[1].rounds) < len(first[0].rounds)
    token_recycling.forget(target)
    again = speculate("token_recycling", target, repetitive((4,)), max_new_tokens=30).trace[0]
    assert [r.proposed for r in again.rounds] == [r.proposed for r in first[0].rounds]
