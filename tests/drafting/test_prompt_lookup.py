"""The index of n-grams against a naive search, and what becomes of the places it finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting import Settings
from specbeam.drafting.length import Length
from specbeam.drafting.prompt_lookup import Index, PromptLookup, carry_on, merge
from specbeam.errors import InputError

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def rescan(text: list[int], longest: int) -> list[int]:
    for n in range(min(longest, len(text)), 0, -1):
        if places := [end for end in range(n, len(text)) if text[end - n: end] == text[-n:]]:
            return places
    return []


def propose(text: list[int], limit: int, ngram: int = 3, branches: int = 1):
    settings = Settings("prompt_lookup", limit, ngram=ngram, branches=branches)
    length = Length(settings, object, None, 1)
    return PromptLookup(1, 100, ngram, branches).propose([text], length.limits([limit]), length)


@given(texts, st.lists(st.integers(1, 6), max_size=10), st.integers(1, 4))
def test_the_growing_index_finds_what_a_rescan_finds(text, steps, longest):
    index, end = Index(longest), 0
    for step in [*steps, len(text)]:
        end = min(end + step, len(text))
        index.extend(text[:end])
        assert index.find(text[:end]) == rescan(text[:end], longest)


@given(texts, st.integers(1, 6), st.integers(1, 4))
def test_a_proposal_stands_in_the_text_behind_an_equal_n_gram(text, limit, longest):
    proposal = propose(text, limit, longest)
    if places := rescan(text, longest):
        assert proposal.tokens[0] == carry_on(text, places[-1], limit, 100) and len(proposal.tokens[0]) == limit
        assert proposal.why == ["length"] and proposal.chained
    else:
        assert proposal.tokens == [[]] and proposal.why == ["no match"]


def test_the_longest_n_gram_wins_then_the_most_recent():
    assert propose([1, 2, 3, 9, 2, 3, 8, 7, 3, 6, 1, 2, 3], 1).tokens == [[9]]
    assert propose([1, 2, 3, 9, 2, 3, 8, 7, 3, 6, 1, 2, 3], 1, ngram=2).tokens == [[8]]
    assert propose([1, 2, 3, 9, 2, 3, 8, 7, 3, 6, 1, 2, 3], 1, ngram=1).tokens == [[6]]


def test_a_period_is_continued_beyond_the_end_of_the_text():
    assert propose([1, 2, 3, 1, 2, 3], 7).tokens == [[1, 2, 3, 1, 2, 3, 1]]


def test_several_continuations_are_one_tree_with_common_beginnings_once():
    text = [1, 5, 6, 7, 1, 5, 8, 9, 1, 4, 4, 4, 1, 5, 6, 7, 1]
    proposal = propose(text, 3, ngram=1, branches=3)
    assert proposal.tokens == [[5, 6, 7, 4, 4, 4, 8, 9]]
    assert proposal.parents == [[-1, 0, 1, -1, 3, 4, 0, 6]]
    assert merge([(1, 2), (1, 2)]) == ([1, 2], [-1, 0])
    assert merge([]) == ([], [])


def test_ids_that_the_target_cannot_give_end_a_proposal():
    assert carry_on([1, 2, 100, 3], 1, 3, 100) == [2]
    assert carry_on([1, 2, -1, 3], 2, 3, 100) == []


def test_repetition_is_found_and_a_text_without_any_proposes_nothing():
    target = tiny_model("llama")
    torch.manual_seed(0)
    unlike = torch.randperm(90)[:30] + 3
    said = torch.tensor(greedy_generate(target, [unlike], max_new_tokens=20, eos_token_id=None).tokens[0])
    again = torch.cat([unlike, said, unlike])  # near enough to be looked up
    options = {"drafter": "prompt_lookup", "max_new_tokens": 12, "eos_token_id": None}
    rounds = speculative_generate(target, None, [again], **options).trace[0].rounds
    assert sum(r.drafted for r in rounds) > 0
    assert speculative_generate(target, None, [unlike], **options).trace[0].rounds[0].why in ("no match", "length")


@pytest.mark.parametrize(("options", "words"), [
    ({"ngram": 0}, "ngram is 0"), ({"branches": 0}, "branches is 0"), ({"ngram": 2.5}, "ngram is 2.5"),
    ({"branching": [2, 1]}, "branching=.2, 1. does nothing|branching=.*does nothing"),
    ({"tree_nodes": 8}, "tree_nodes=8 does nothing"), ({"corpus": "x.jsonl"}, "corpus='x.jsonl' does nothing"),
    ({"confidence_threshold": 0.4}, "confidence_threshold=0.4 does nothing with drafter=prompt_lookup"),
    ({"exit_layer": 1}, "exit_layer=1 does nothing"), ({"min_match": 2}, "min_match=2 does nothing")])
def test_options_that_make_no_sense_are_one_sentence(options, words):
    with pytest.raises(InputError, match=words):
        speculative_generate(tiny_model("llama"), None, torch.tensor([[5, 6]]), drafter="prompt_lookup", **options)
