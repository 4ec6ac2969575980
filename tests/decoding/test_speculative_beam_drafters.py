"""Speculative beam search with drafters that need no model gives the hypotheses of beam search all the same."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import ROWS
from reference import model
from test_beam import MANY_ENDS
from test_speculative_beam import FAMILIES, compare, steps_per_round
from tiny import EOS, prompts
from transformers import LogitsProcessor, LogitsProcessorList

from specbeam import InputError, speculative_beam_generate
from specbeam.drafting import token_recycling
from specbeam.drafting.automaton import Automaton
from specbeam.drafting.lookup_beams import common
from specbeam.drafting.prompt_lookup import PromptLookup
from specbeam.drafting.suffix import Row
from specbeam.drafting.token_recycling import grow

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:Unfeasible length")
DRAFTERS = ("prompt_lookup", "suffix", "token_recycling")


class Round(LogitsProcessor):
    """Goes round in ten tokens; leaving one out is possible, and dearer the later."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        following = torch.stack([10 + (input_ids[:, -1] - 9 + skip) % 10 for skip in (0, 1)], 1)
        costs = torch.tensor([0.0, -5.0 - input_ids.shape[1]]).expand(len(scores), 2)
        return torch.full_like(scores, -1e4).scatter(1, following, costs)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_ragged_batch_gives_the_hypotheses_of_beam_search_and_generate(name, drafter):
    for _ in range(2):  # token recycling remembers
        compare(model(name), None, ROWS, 4, drafting={"drafter": drafter}, max_new_tokens=10, eos_token_id=MANY_ENDS)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), width=st.integers(2, 6), new=st.integers(1, 12),
       penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]), early=st.sampled_from([False, True, "never"]),
       ends=st.lists(st.integers(3, 99), max_size=12, unique=True), name=st.sampled_from(FAMILIES),
       drafter=st.sampled_from(DRAFTERS), deep=st.sampled_from([1, 2, 5, "auto"]), repeats=st.integers(1, 3),
       shaped=st.sampled_from([{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 3}]))
def test_any_search_gives_the_hypotheses_of_generate(lengths, width, new, penalty, early, ends, name, drafter, deep,
                                                     repeats, shaped):
    rows = [torch.cat([row] * repeats) for row in prompts(tuple(lengths), seed=new)]
    compare(model(name), None, rows, width, drafting={"drafter": drafter}, draft_length=deep, max_new_tokens=new,
            length_penalty=penalty, early_stopping=early, eos_token_id=ends or None, **shaped)


@pytest.mark.parametrize("drafter", ["prompt_lookup", "suffix"])
def test_what_was_said_before_saves_rounds(drafter):
    rows = [torch.arange(10, 20).repeat(3), torch.arange(10, 20).repeat(2)[:14]]
    out = compare(model("llama"), None, rows, 3, drafting={"drafter": drafter}, draft_length=4, max_new_tokens=16,
                  eos_token_id=None, logits_processor=LogitsProcessorList([Round()]))
    assert steps_per_round(out) > 2
    assert drafter in {one.drafter for row in out.trace for one in row.rounds} <= {drafter, "plain"}


def test_what_the_target_ranked_before_saves_rounds():
    token_recycling.forget(model("llama"))
    options = {"drafting": {"drafter": "token_recycling", "tree_nodes": 60}, "draft_length": 3, "peer": False,
               "max_new_tokens": 16, "eos_token_id": None}
    first = compare(model("llama"), None, ROWS, 2, **options)
    again = compare(model("llama"), None, ROWS, 2, **options)
    assert steps_per_round(again) > max(steps_per_round(first), 1.05)


def test_a_corpus_of_earlier_answers_serves_beams(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"tokens": list(range(10, 20)) * 2}) + "\n")
    options = {"draft_length": 4, "max_new_tokens": 12, "eos_token_id": None,
               "logits_processor": LogitsProcessorList([Round()])}
    rows = [torch.tensor([50, 12, 13])]
    with_it = compare(model("llama"), None, rows, 2, drafting={"drafter": "suffix", "corpus": str(path)}, **options)
    without = compare(model("llama"), None, rows, 2, drafting={"drafter": "suffix"}, **options)
    assert steps_per_round(with_it) > steps_per_round(without)


def test_the_roots_of_a_tree_are_the_beams_and_a_better_beam_gets_more_of_it():
    table = {1: [2, 3], 2: [1, 4], 9: [8, 7]}
    tokens, parents = grow(table, [(0.0, 1), (30.0, 9)], limit=3, nodes=4)
    assert {-1} == {parent for parent in parents if parent < 0}
    tokens, parents = grow(table, [(0.0, 1), (0.0, 9)], limit=1, nodes=4)
    assert sorted(zip(parents, tokens, strict=True)) == [(-2, 7), (-2, 8), (-1, 2), (-1, 3)]


def test_a_lookup_is_in_what_all_beams_share_and_of_each_beams_own_end():
    known = [5, 6, 7, 8, 5, 6]
    assert common([[*known, 7], [*known, 9, 1], [*known, 9]]) == known
    drafter = PromptLookup(1, 100, ngram=2, branches=1)
    assert drafter.branch(0, known, [[*known, 7], [*known, 9]], [0.0, -1.0], limit=2) == ([8, 5], [-1, 0])
    row = Row(None)
    row.extend(known)
    length, _, place = row.match([7])
    assert (length, place) == (3, 3)
    whole = Automaton()
    for token in [*known, 7]:
        whole.append(token)
    assert whole.length[whole.link[whole.last]] == length


@pytest.mark.parametrize("options, sentence", [
    ({"drafter": "oracle"}, "drafter is 'oracle': speculative beam search takes one of draft_model, prompt_lookup"),
    ({"drafter": "early_exit"}, "drafter is 'early_exit'"), ({}, "drafter=draft_model needs a draft model"),
    ({"drafter": "suffix", "draft_beams": 6}, "draft_beams=6 does nothing with drafter=suffix"),
    ({"drafter": "suffix", "tree_nodes": 6}, "tree_nodes=6 does nothing with drafter=suffix"),
    ({"drafter": "suffix", "ngram": 2}, "ngram=2 does nothing with drafter=suffix"),
    ({"drafter": "prompt_lookup", "branches": 0}, "branches is 0"),
    ({"drafter": "prompt_lookup", "draft_length": 40}, "a round may propose 640 nodes"),
    ({"drafter": "token_recycling", "tree_nodes": 600}, "a round may propose 600 nodes"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        speculative_beam_generate(model("llama"), None, ROWS, max_new_tokens=4, eos_token_id=EOS, **options)
    assert "\n" not in str(error.value)
