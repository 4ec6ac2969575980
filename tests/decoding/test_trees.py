"""Draft models that propose trees, and chains of any length: the target's own tokens, or its own distribution."""

from __future__ import annotations

import functools
import json
from functools import partial

import pytest
import torch
from law import draws, law, same_law, small_target
from options import HONOURED, ROWS
from reference import good_draft, letters, model
from tiny import EOS, NAMES, left_padded, prompts, tiny_draft
from transformers.generation import logits_process as hf

from specbeam import InputError, greedy_generate, speculative_generate
from specbeam.decoding import speculative
from specbeam.drafting import draft_model, length
from specbeam.sampling import process

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic")

SHAPES = {
    "branching 3 2 1 1": {"branching": [3, 2, 1, 1]},
    "branching 2 2": {"branching": [2, 2]},
    "grown, ten nodes": {"tree_nodes": 10},
    "confidence": {"draft_length": 6, "confidence_threshold": 0.1},
    "auto": {"draft_length": "auto"},
}
FIXED = ("branching 3 2 1 1", "branching 2 2", "grown, ten nodes")
every_shape = pytest.mark.parametrize("shape", SHAPES)


@functools.cache
def plain(name: str, option: str = "nothing", rows: int = 4) -> list[list[int]]:
    return greedy_generate(model(name), ROWS[:rows], **{"max_new_tokens": 24} | HONOURED[option]).tokens


@pytest.mark.parametrize("name", NAMES)
@every_shape
def test_greedy_tokens_are_those_of_plain_greedy_alone_and_in_a_ragged_batch(shape, name):
    for rows in (1, 4):
        out = speculative_generate(model(name), good_draft(name), ROWS[:rows], max_new_tokens=24, **SHAPES[shape])
        assert out.tokens == plain(name, rows=rows)
        assert shape not in FIXED or sum(one.accepted for row in out.trace for one in row.rounds)


@pytest.mark.parametrize("option", [
    "repetition_penalty", "no_repeat_ngram_size", "several EOS ids", "min_new_tokens", "bad_words_ids",
    "prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria", "max_length", "max_new_tokens 2"])
@pytest.mark.parametrize("shape", FIXED)
def test_every_node_is_processed_with_its_own_path(shape, option):
    target, options = model("llama"), {"max_new_tokens": 24} | HONOURED[option]
    assert speculative_generate(target, good_draft("llama"), ROWS, **SHAPES[shape], **options).tokens == plain(
        "llama", option)


@pytest.mark.parametrize("shape", FIXED)
def test_a_draft_that_knows_nothing_costs_no_exactness(shape):
    ids, mask = left_padded(ROWS, pad=5)
    out = speculative_generate(model("gpt2"), model("gpt2", seed=9), ids, mask, max_new_tokens=24, **SHAPES[shape])
    assert out.tokens == plain("gpt2")


@pytest.mark.parametrize("shape", FIXED)
def test_a_stop_string_inside_a_tree_ends_the_answer_there(shape):
    whole, tokenizer = plain("llama")[0], letters()
    options = {"max_new_tokens": 24, "tokenizer": tokenizer, "stop_strings": [tokenizer.decode(whole[5:7])]}
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, **SHAPES[shape], **options)
    assert out.tokens == greedy_generate(model("llama"), ROWS, **options).tokens
    assert out.hypotheses[0][0].finish_reason == "stop"


@pytest.mark.parametrize("shape, nodes", [("branching 3 2 1 1", 21), ("branching 2 2", 6), ("grown, ten nodes", 10)])
def test_a_tree_has_the_nodes_that_were_asked_for_and_distinct_siblings(shape, nodes):
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, max_new_tokens=24, eos_token_id=None,
                               **SHAPES[shape])
    for row in out.trace:
        assert row.rounds[0].drafted == nodes
        for one in row.rounds:
            assert all(parent < node for node, parent in enumerate(one.parents))
            siblings = list(zip(one.parents, one.proposed, strict=True))
            assert len(set(siblings)) == len(siblings)


@pytest.mark.parametrize("nodes, width, why", [(10, 4, "node budget"), (3, 1, "length"), (90, 4, "length")])
def test_a_grown_tree_ends_at_its_budget_only_where_there_was_more_and_the_trace_says_so(nodes, width, why):
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, max_new_tokens=24, eos_token_id=None,
                               draft_length=3, tree_nodes=nodes, tree_width=width)
    for row in out.trace:
        assert row.rounds[0].why == why
        assert {one.why for one in row.rounds[:-1]} <= {why, "node budget", "end of answer"}


def test_a_target_that_drafts_for_itself_accepts_the_whole_depth_of_its_tree():
    out = speculative_generate(model("llama"), model("llama"), ROWS, branching=[2, 2, 1, 1], max_new_tokens=21,
                               eos_token_id=None)
    assert [[one.accepted for one in row.rounds] for row in out.trace] == [[4] * 4] * 4


def test_a_wider_tree_is_accepted_more_often():
    def mean(**shape):
        out = speculative_generate(model("llama"), good_draft("llama"), prompts((9,) * 8), max_new_tokens=32,
                                   eos_token_id=None, **shape)
        return sum(len(row.rounds) for row in out.trace)

    assert mean(branching=[3, 2, 1]) < mean(draft_length=3)


def test_a_threshold_ends_a_proposal_and_the_trace_says_so():
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, draft_length=3, confidence_threshold=0.15,
                               max_new_tokens=24, eos_token_id=None)
    rounds = [one for row in out.trace for one in row.rounds]
    assert {"confidence", "length"} <= {one.why for one in rounds}
    assert all(one.drafted < 3 for one in rounds if one.why == "confidence")


# Sampling.

STEPS = 3
LAWS = {"temperature": ({"temperature": 0.8, "top_k": 0}, [hf.TemperatureLogitsWarper(0.8)])}
SAMPLED = {
    "branching tree": {"branching": [3, 2, 1]},
    "grown tree": {"tree_nodes": 8, "draft_length": 3},
    "block": {"acceptance": "block", "draft_length": 3},
    "confidence": {"confidence_threshold": 0.25, "draft_length": 3},
}
PROMPT = torch.tensor([3, 4, 5, 1])


@functools.cache
def small() -> tuple:
    target = small_target()
    return target, tiny_draft(target, noise=0.2)


@functools.cache
def exact(kind: str) -> dict[tuple[int, ...], float]:
    def processed(ids, logits):
        for one in LAWS[kind][1]:
            logits = one(ids, logits)
        return logits

    return law(small()[0], PROMPT, STEPS + 1, processed)


def sampled_well(kind: str, count: int, **shape) -> bool:
    """Four tokens: the first comes from prefill, the others from a round or more."""
    generate = partial(speculative_generate, *small(), **shape)
    return same_law(draws(generate, PROMPT, STEPS + 1, count, **LAWS[kind][0]), exact(kind))


def test_typical_acceptance_does_not_sample_from_the_target():
    assert not sampled_well("temperature", 3000, acceptance="typical", draft_length=3)


def test_typical_acceptance_makes_no_sense_without_a_temperature():
    with pytest.raises(InputError, match="acceptance=typical changes what is sampled, but temperature is 0"):
        speculative_generate(*small(), [PROMPT], acceptance="typical")


@pytest.mark.parametrize("shape", [{"branching": [2, 1]}, {"tree_nodes": 4}])
def test_block_verification_makes_no_sense_for_trees(shape):
    with pytest.raises(InputError, match="acceptance=block judges chains"):
        speculative_generate(*small(), [PROMPT], acceptance="block", temperature=1.0, **shape)


@pytest.mark.parametrize("shape", SAMPLED)
def test_a_sampled_row_is_the_same_in_any_batch(shape):
    rows, options = prompts((5, 2, 9)), {"temperature": 0.7, "max_new_tokens": 16, **SAMPLED[shape]}
    pair = model("llama"), good_draft("llama")
    together = speculative_generate(*pair, rows, seed=[3, 4, 5], **options).tokens
    assert [speculative_generate(*pair, [row], seed=[seed], **options).tokens[0]
            for row, seed in zip(rows, (3, 4, 5), strict=True)] == together


# `costs` freezes what auto decides by.

PAYS = {"prices": {"draft": 0.1, "token": 0.1, "rate": 1.33}, "tried": [0] * 10, "kept": [0] * 10, "usual": 0.5}


def test_with_costs_a_sampled_run_of_auto_is_repeatable_token_for_token_in_any_batch(tmp_path):
    target, draft, file = model("qwen2", seed=3), good_draft("qwen2", seed=3), tmp_path / "costs.json"
    kept = [9, 11, 13, 15, 17, 18, 18, 19, 19, 20]
    file.write_text(json.dumps(PAYS | {"tried": [20] * 10, "kept": kept, "usual": 0.8}))
    options = {"draft_length": "auto", "temperature": 0.6, "max_new_tokens": 40, "costs": str(file)}
    first = speculative_generate(target, draft, ROWS, seed=[1, 2, 3, 4], **options)
    again = speculative_generate(target, draft, ROWS, seed=[1, 2, 3, 4], **options)
    assert again.tokens == first.tokens
    assert len({one.drafted for row in first.trace for one in row.rounds}) > 2, "auto is to have stopped early at times"
    for few in ([1], [3, 0]):
        some = speculative_generate(target, draft, [ROWS[row] for row in few], seed=[row + 1 for row in few], **options)
        assert some.tokens == [first.tokens[row] for row in few]
        assert [[one.proposed for one in row.rounds] for row in some.trace] == [
            [one.proposed for one in first.trace[row].rounds] for row in few]


def test_what_auto_learned_can_be_frozen(tmp_path):
    target, draft, file = model("qwen2", seed=3), good_draft("qwen2", seed=3), str(tmp_path / "costs.json")
    options = {"draft_length": "auto", "temperature": 0.6, "max_new_tokens": 40, "eos_token_id": None}
    speculative_generate(target, draft, ROWS[:2], **options)
    length.write_costs(file, target, draft, rows=2, temperature=0.6)
    assert speculative_generate(target, draft, ROWS[:2], costs=file, **options).tokens
    with pytest.raises(InputError, match="nothing was learned yet for drafter=draft_model with 64 rows"):
        length.write_costs(file, target, draft, rows=64, temperature=0.6)


def test_auto_samples_from_the_target(tmp_path):
    """Costs under which it sometimes stops early: by the draft's confidence before a token is drawn."""
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(PAYS))
    out = speculative_generate(*small(), [PROMPT] * 50, draft_length="auto", costs=str(file), max_new_tokens=STEPS + 1,
                               **LAWS["temperature"][0])
    assert {0, 1, 2} <= {one.drafted for row in out.trace for one in row.rounds}
    assert sampled_well("temperature", 3000, draft_length="auto", costs=str(file))


@pytest.mark.parametrize("options, sentence", [
    ({"branching": [2, 0]}, r"branching is \[2, 0\]"), ({"branching": [2, 1.5]}, "branching is"),
    ({"tree_nodes": -1}, "tree_nodes is -1"), ({"tree_nodes": 4, "branching": [2]}, "both given"),
    ({"branching": [20, 20, 20]}, "8420 nodes, but the target"),
    ({"confidence_threshold": 1.0}, "confidence_threshold"),
    ({"confidence_threshold": 0.5, "branching": [2]}, "adapt chains"), ({"costs": "x.json"}, "costs='x.json' belongs"),
    ({"draft_length": "auto", "tree_nodes": 4}, "adapt chains"), ({"draft_length": "auto", "costs": "none"}, "none"),
    ({"draft_length": "auto", "confidence_threshold": 0.3}, "both say when a proposal ends"),
    ({"tree_width": 2}, "tree_width=2 does nothing without tree_nodes"), ({"tree_nodes": 2.5}, "tree_nodes is 2.5"),
    ({"tree_nodes": True}, "tree_nodes is True"), ({"tree_nodes": 4, "tree_width": "3"}, "tree_width is '3'"),
    ({"drafter": "early_exit", "exit_layer": 1.5}, "exit_layer is 1.5"),
    ({"confidence_threshold": "half"}, "confidence_threshold is 'half'"),
    ({"acceptance": "greedy"}, "acceptance is 'greedy'"), ({"drafter": "oracle"}, "drafter is 'oracle'"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        speculative_generate(model("llama"), good_draft("llama"), ROWS, **options)
    assert "\n" not in str(error.value)


# Planted faults.

@pytest.mark.parametrize("shape", FIXED)
@pytest.mark.parametrize("option", ["repetition_penalty", "no_repeat_ngram_size", "logits_processor"])
def test_control_a_processor_that_sees_another_nodes_path_is_caught(monkeypatch, shape, option):
    """The target's processors see the path of the node before."""
    monkeypatch.setattr(speculative, "process", lambda logits, processors, path: process(
        logits, processors, lambda row, node: path(row, max(node - 1, 0))))
    out = speculative_generate(model("llama"), good_draft("llama"), ROWS, **SHAPES[shape],
                               **{"max_new_tokens": 24} | HONOURED[option])
    assert out.tokens != plain("llama", option)


def test_control_a_draft_that_sees_another_nodes_path_costs_acceptance_only(monkeypatch):
    options = {"max_new_tokens": 24, "repetition_penalty": 1.7, "branching": [2, 2, 1]}
    honest = speculative_generate(model("llama"), good_draft("llama"), ROWS, **options)
    monkeypatch.setattr(draft_model, "process", lambda logits, processors, path: process(
        logits, processors, lambda row, _: path(row, 0)[:1]))
    blind = speculative_generate(model("llama"), good_draft("llama"), ROWS, **options)
    assert blind.tokens == honest.tokens
    assert sum(len(row.rounds) for row in blind.trace) > sum(len(row.rounds) for row in honest.trace)


@pytest.mark.parametrize("keep", [lambda q, token: q > 0.3, lambda q, token: token < 5],
                         ids=["by its own probability", "by its id"])
def test_control_a_drawn_token_dropped_for_what_it_is_is_caught(monkeypatch, keep):
    honest = draft_model.DraftModel.propose

    def choosy(self, sequences, limits, length):
        proposal = honest(self, sequences, limits, length)
        for row, ids in enumerate(proposal.tokens):
            kept = 0
            while kept < len(ids) and keep(float(proposal.q[row, kept, ids[kept]]), ids[kept]):
                kept += 1
            del ids[kept:], proposal.parents[row][kept:], self.numbers[row][kept:]
        return proposal

    monkeypatch.setattr(draft_model.DraftModel, "propose", choosy)
    assert not sampled_well("temperature", 3000, draft_length=3)


def test_control_siblings_in_another_order_than_drawn_are_caught(monkeypatch):
    """The rule tries them as they were drawn; sorted by the target's taste they are no draws any more."""
    honest = draft_model.DraftModel._children

    def sorted_children(self, scores, count, wanted):
        children, q = honest(self, scores, count, wanted)
        return children.sort(-1).values, q

    monkeypatch.setattr(draft_model.DraftModel, "_children", sorted_children)
    assert not sampled_well("temperature", 3000, branching=[3, 2, 1])


def test_ends_are_honoured_in_a_tree_that_goes_on_behind_them():
    free = greedy_generate(model("llama"), ROWS, max_new_tokens=24, eos_token_id=None).tokens
    ends = [EOS, *(row[7] for row in free)]
    out = speculative_generate(model("llama"), model("llama"), ROWS, branching=[2, 1, 1, 1, 1], max_new_tokens=24,
                               eos_token_id=ends)
    assert out.tokens == greedy_generate(model("llama"), ROWS, max_new_tokens=24, eos_token_id=ends).tokens
    assert all(row[-1] in ends for row in out.tokens)
