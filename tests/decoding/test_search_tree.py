"""The recorded search tree is the search: every hypothesis can be read off it, and nothing in it is made up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from options import ROWS
from reference import good_draft, model
from tiny import EOS, prompts

from specbeam import InputError, beam_generate, greedy_generate, speculative_beam_generate
from specbeam.decoding import beam as beam_module
from specbeam.decoding.beam_sample import beam_sample_generate
from specbeam.decoding.diverse_beam import diverse_beam_generate
from specbeam.decoding.stochastic_beam import stochastic_beam_generate
from specbeam.trace import Candidate, GenerationOutput, SearchTree

MANY_ENDS = list(range(40, 60))
OPTIONS = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "eos_token_id": MANY_ENDS}


OTHERS = {"beam_sample": beam_sample_generate, "diverse_beam": diverse_beam_generate,
          "stochastic_beam": stochastic_beam_generate}


def searched(kind: str, rows=ROWS, name: str = "llama", **options) -> GenerationOutput:
    options = OPTIONS | {"trace": True} | options
    if kind in OTHERS:
        if kind == "stochastic_beam":
            options.pop("length_penalty", None)
        return OTHERS[kind](model(name), rows, **options)
    if kind == "beam":
        return beam_generate(model(name), rows, **options)
    return speculative_beam_generate(model(name), good_draft(name), rows, draft_length=3, **options)


def picked(tree: SearchTree, path) -> list[Candidate]:
    return [tree.steps[step].candidates[number] for step, number in path]


def assert_reproduced(out: GenerationOutput) -> None:
    """Tokens, ancestry, score and end of each hypothesis stand in the tree."""
    for found, tree in zip(out.hypotheses, out.search, strict=True):
        for number, one in enumerate(found):
            path = picked(tree, tree.path(number))
            assert [candidate.token for candidate in path] == one.tokens
            assert tuple(candidate.beam for candidate in path) == one.beams
            assert path[-1].finished_score == one.score and path[-1].finish_reason == one.finish_reason
            assert all(candidate.finish_reason is None for candidate in path[:-1])


def brute_force(target, prompt: list[int], width: int, most: int, ends: set[int], penalty: float) -> dict:
    """Beam search by lists, one text at a time, without cache or batch: what was ranked, and the pool."""
    @torch.no_grad()
    def logs(text: list[int]) -> list[float]:
        return target(torch.tensor([text])).logits[0, -1].log_softmax(-1).tolist()

    running, pool, steps = [(0.0, [])], [], []
    for length in range(1, most + 1):
        every = [(score + log, number, token) for number, (score, text) in enumerate(running)
                 for token, log in enumerate(logs(prompt + text))]
        every.sort(key=lambda one: -one[0])
        kept = every[: max(2, 1 + len(ends)) * width]
        steps.append(kept)
        finishing = [one for one in kept[:width] if one[2] in ends or length == most]
        pool += [(score / length**penalty, [*running[number][1], token]) for score, number, token in finishing]
        pool = sorted(pool, key=lambda one: -one[0])[:width]
        running = [(score, [*running[number][1], token]) for score, number, token in kept
                   if token not in ends and length < most][:width]
        if not running or (len(pool) == width and running[0][0] / length**penalty <= pool[-1][0]):
            break
    return {"steps": steps, "pool": pool}


@pytest.mark.parametrize("kind", ["beam", "speculative_beam"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_the_tree_is_that_of_a_search_by_lists(kind, penalty):
    rows = prompts((5, 9, 3))
    out = searched(kind, rows, length_penalty=penalty, eos_token_id=[EOS, 40, 50], max_new_tokens=7)
    for row, found, tree in zip(rows, out.hypotheses, out.search, strict=True):
        expected = brute_force(model("llama"), row.tolist(), 4, 7, {EOS, 40, 50}, penalty)
        assert len(tree.steps) == len(expected["steps"])
        for step, ranked in zip(tree.steps, expected["steps"], strict=True):
            real = [one for one in step.candidates if one.score > -1e8]  # the first step has one beam only
            assert [(one.beam, one.token) for one in real] == [(beam, token) for _, beam, token in ranked]
            assert [one.score for one in real] == pytest.approx([score for score, _, _ in ranked], abs=1e-4)
        assert [one.tokens for one in found] == [tokens for _, tokens in expected["pool"]]


@pytest.mark.parametrize("kind", ["beam", "speculative_beam", *OTHERS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_hypothesis_can_be_read_off_the_tree(kind, name):
    for ends in (MANY_ENDS, [EOS], None):
        assert_reproduced(searched(kind, name=name, eos_token_id=ends))


@pytest.mark.parametrize("kind", ["beam", "speculative_beam"])
def test_the_path_of_the_best_is_transformers_beam_indices(kind):
    out = searched(kind)
    for row, tree in zip(ROWS, out.search, strict=True):
        theirs = model("llama").generate(
            row[None], attention_mask=torch.ones_like(row[None]), do_sample=False, pad_token_id=0, num_beams=4,
            max_new_tokens=10, eos_token_id=MANY_ENDS, return_dict_in_generate=True, output_scores=True)
        origins = theirs.beam_indices[0]
        assert [one.beam for one in picked(tree, tree.path())] == origins[origins >= 0].tolist()


@pytest.mark.parametrize("kind", ["beam", "speculative_beam"])
def test_each_step_has_one_survivor_a_beam_and_ranks_best_first(kind):
    for tree in searched(kind).search:
        for number, step in enumerate(tree.steps):
            scores = [one.score for one in step.candidates]
            assert scores == sorted(scores, reverse=True)
            survivors = [one.survived_as for one in step.candidates if one.survived_as is not None]
            assert survivors == list(range(len(survivors)))
            if number < len(tree.steps) - 1:
                assert len(survivors) == 4
            assert all(one.finish_reason for one in step.candidates if one.finished_score is not None)


def test_speculation_leaves_the_tree_as_it_is_but_for_its_rounds():
    plain, fast = searched("beam"), searched("speculative_beam")
    for ours, theirs, trace in zip(plain.search, fast.search, fast.trace, strict=True):
        assert [step.round for step in ours.steps] == list(range(len(ours.steps)))
        rounds = [step.round for step in theirs.steps]
        assert rounds == sorted(rounds) and rounds[0] == 0 and rounds[-1] == len(trace.rounds)
        assert len(set(rounds)) < len(rounds), "some round took several steps"
        assert [[one.token for one in step.candidates] for step in ours.steps] == [
            [one.token for one in step.candidates] for step in theirs.steps]
        assert ours.ends == theirs.ends
        for one, other in zip(ours.steps, theirs.steps, strict=True):
            for a, b in zip(one.candidates, other.candidates, strict=True):
                assert a.score == b.score or math.isclose(a.score, b.score, abs_tol=1e-4)
                assert replace(a, score=0, finished_score=None) == replace(b, score=0, finished_score=None)


def test_without_trace_nothing_is_kept():
    out = searched("beam", trace=False)
    assert out.search is None
    assert out.hypotheses == searched("beam").hypotheses


@pytest.mark.parametrize("call", [lambda **o: greedy_generate(model("llama"), ROWS, **o),
                                  lambda **o: beam_generate(model("llama"), ROWS, num_beams=1, **o)],
                         ids=["greedy", "one beam"])
def test_a_method_without_a_tree_refuses_to_trace_one(call):
    with pytest.raises(InputError, match="trace is True: true keeps the search tree of beam search"):
        call(trace=True, max_new_tokens=2)


@pytest.mark.parametrize("options", [{"num_beams": 6, "num_beam_groups": 3}, {"num_beams": 4, "num_beam_groups": 4},
                                     {"num_beams": 4, "num_beam_groups": 1}], ids=str)
def test_groups_of_any_size_are_one_tree(options):
    out = searched("diverse_beam", **{"num_return_sequences": 3, "diversity_penalty": 1.5} | options)
    assert_reproduced(out)
    for tree in out.search:
        scores = [tree.finished(place).finished_score for place in range(len(tree.ends))]
        assert scores == sorted(scores, reverse=True)
        survivors = [one.survived_as for one in tree.steps[1].candidates if one.survived_as is not None]
        assert len(set(survivors)) == len(survivors) > 0 and set(survivors) <= set(range(options["num_beams"]))


@pytest.mark.parametrize("seed", range(4))
def test_what_was_drawn_without_replacement_is_in_the_tree_in_the_order_drawn(seed):
    out = searched("stochastic_beam", seed=seed, top_k=0, eos_token_id=list(range(20, 60)))
    assert_reproduced(out)
    for found, tree in zip(out.hypotheses, out.search, strict=True):
        assert [tree.tokens(place) for place in range(len(tree.ends))] == [one.tokens for one in found]


def test_control_a_wrong_origin_is_seen(monkeypatch):
    original = beam_module.step

    def shifted(*args):
        beams, over, ranked = original(*args)
        return beams, over, ranked._replace(origins=[row[1:] + row[:1] for row in ranked.origins])

    monkeypatch.setattr(beam_module, "step", shifted)
    with pytest.raises((AssertionError, StopIteration)):
        assert_reproduced(searched("beam"))
