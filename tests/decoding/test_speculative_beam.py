"""Speculative beam search gives the hypotheses of beam search: their tokens, order, scores and ends, for any draft.

Every case is held against our own `beam_generate` (exactly) and `transformers.generate(num_beams=…)` (scores to 1e-4).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from options import HONOURED, ROWS, every_third
from planted import mutated
from reference import changed, good_draft, letters, model
from test_beam import MANY_ENDS, Rounded, assert_same, transformers_beams
from tiny import _BASE, EOS, VOCABULARY, build, left_padded, prompts, tiny_draft
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from specbeam import InputError, beam_generate, greedy_generate
from specbeam.decoding import speculative_beam as spec
from specbeam.decoding.beam import Ranked, Ranking
from specbeam.decoding.speculative_beam import speculative_beam_generate
from specbeam.drafting import answered, depth
from specbeam.drafting.draft_beams import DraftBeams
from specbeam.engine.support import adapt
from specbeam.engine.tree import TokenTree

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:Unfeasible length")
FAMILIES = ("llama", "qwen2", "gemma3", "gpt2", "stablelm")
EIGHT = [*ROWS, *prompts((3, 8, 14, 6), seed=5)]


def draft_of(kind: str, name: str):
    return {"good": good_draft, "itself": model}[kind](name) if kind != "random" else model(name, seed=9)


def facts(out):
    """Everything about the hypotheses but the last digits of their scores."""
    return [[(one.tokens, one.beams, one.finish_reason) for one in row] for row in out.hypotheses]


def compare(target, draft, rows, num_beams, returned=None, peer=True, draft_length=4, draft_beams=None, drafting=None,
            **options):
    returned = num_beams if returned is None else returned
    common = {"num_beams": num_beams, "num_return_sequences": returned} | options
    out = speculative_beam_generate(target, draft, rows, draft_length=draft_length, draft_beams=draft_beams,
                                    **(drafting or {}), **common)
    plain = beam_generate(target, rows, **common)
    assert facts(out) == facts(plain)
    for ours, theirs in zip(out.hypotheses, plain.hypotheses, strict=True):
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], rel=1e-4)
    for row, ours in zip(rows, out.hypotheses, strict=True):
        if peer:
            assert_same(ours, transformers_beams(target, row, num_beams, returned, **options))
    consistent(out, rows)
    return out


def consistent(out, rows):
    for prompt, answer, row in zip(rows, out.hypotheses, out.trace, strict=True):
        best = answer[0].tokens
        assert (row.prompt_tokens, row.first_tokens) == (len(prompt), 1)
        assert len(row.sources) == len(row.token_rounds) == len(best)
        assert list(row.token_rounds) == sorted(row.token_rounds) and row.token_rounds[0] == 0
        assert row.token_rounds[-1] <= len(row.rounds)
        for one in row.rounds:
            assert 0 <= one.accepted <= one.drafted
            assert 1 <= one.committed <= one.accepted + 1
        assert 1 + sum(one.committed for one in row.rounds) >= len(best)
        assert row.draft_seconds + row.verify_seconds <= row.decode_seconds


def steps_per_round(out) -> float:
    rounds = [one for row in out.trace for one in row.rounds]
    return sum(one.committed for one in rounds) / len(rounds)


@pytest.mark.parametrize("kind", ["good", "random", "itself"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_ragged_batch_gives_the_hypotheses_of_each_prompt_alone(name, kind):
    compare(model(name), draft_of(kind, name), ROWS, 4, max_new_tokens=12, eos_token_id=MANY_ENDS)


@pytest.mark.parametrize("num_beams", range(2, 9))
def test_any_width_in_a_batch_of_eight(num_beams):
    name = FAMILIES[num_beams % len(FAMILIES)]
    compare(model(name), good_draft(name), EIGHT, num_beams, peer=num_beams in (3, 8), max_new_tokens=12,
            eos_token_id=[EOS, 40, 50, 60])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_length_penalty_and_early_stopping_are_those_of_transformers(length_penalty, early_stopping):
    for ends in (MANY_ENDS, [EOS], None):
        compare(model("llama"), good_draft("llama"), ROWS[:3], 4, 3, max_new_tokens=14, eos_token_id=ends,
                length_penalty=length_penalty, early_stopping=early_stopping)


@pytest.mark.parametrize("option", [name for name, given in HONOURED.items() if "eos_token_id" not in given])
def test_a_processor_or_criterion_means_what_it_means_in_generate(option):
    options = {"max_new_tokens": 10, "eos_token_id": MANY_ENDS} | HONOURED[option]
    if options["max_new_tokens"] == 1:
        options["eos_token_id"] = EOS
    compare(model("llama"), good_draft("llama"), ROWS[:3], 3, 2, **options)


@pytest.mark.parametrize("option", [name for name, given in HONOURED.items() if given.get("eos_token_id")])
def test_several_ends_and_the_least_number_of_tokens_mean_what_they_mean_in_generate(option):
    compare(model("gpt2"), good_draft("gpt2"), ROWS[:3], 3, 3, **{"max_new_tokens": 16} | HONOURED[option])


def test_a_stop_string_ends_a_hypothesis():
    tokenizer, target = letters(), model("llama")
    best = beam_generate(target, ROWS[:1], num_beams=4, max_new_tokens=12, eos_token_id=None).tokens[0]
    out = compare(target, good_draft("llama"), ROWS[:2], 4, 4, max_new_tokens=12, eos_token_id=None,
                  stop_strings=[tokenizer.decode(best[5:6]), "A"], tokenizer=tokenizer)
    assert "stop" in {one.finish_reason for one in out.hypotheses[0]}


@pytest.mark.parametrize("draft_length, draft_beams", [(1, None), (2, 4), (7, 4), (3, 9), (12, 16)])
def test_any_depth_and_width_of_the_drafts_search(draft_length, draft_beams):
    compare(model("qwen2"), good_draft("qwen2"), ROWS, 4, peer=False, draft_length=draft_length,
            draft_beams=draft_beams, max_new_tokens=16, eos_token_id=MANY_ENDS)


@pytest.mark.parametrize("kind", ["good", "random", "itself"])
def test_a_depth_that_adapts_changes_nothing(kind):
    depth._known.clear()
    for _ in range(3):  # what was measured is remembered
        compare(model("llama"), draft_of(kind, "llama"), ROWS, 3, peer=False, draft_length="auto", max_new_tokens=24,
                eos_token_id=[EOS, 50])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_target_that_drafts_for_itself_commits_every_step(name):
    out = compare(model(name), model(name), ROWS, 4, draft_beams=4, draft_length=4, max_new_tokens=21,
                  eos_token_id=None)
    assert [[one.committed for one in row.rounds] for row in out.trace] == [[5] * 4] * 4


def test_a_good_draft_saves_rounds_and_a_random_one_costs_none():
    options = {"max_new_tokens": 16, "eos_token_id": None}
    good = compare(model("llama"), good_draft("llama"), ROWS, 2, peer=False, draft_beams=6, **options)
    random = compare(model("llama"), model("llama", seed=9), ROWS, 2, peer=False, draft_beams=6, **options)
    assert steps_per_round(good) > 1.3
    assert all(len(row.rounds) <= 15 for row in random.trace)
    assert steps_per_round(good) > steps_per_round(random)


@pytest.mark.parametrize("name", FAMILIES)
def test_width_1_is_greedy_decoding(name):
    one = speculative_beam_generate(model(name), good_draft(name), ROWS, num_beams=1, max_new_tokens=16)
    assert one.tokens == greedy_generate(model(name), ROWS, max_new_tokens=16).tokens


def test_what_the_checkpoint_says_is_honoured_and_the_draft_is_not_asked():
    target = changed("llama", length_penalty=-1.0, early_stopping=True, eos_token_id=MANY_ENDS, max_new_tokens=11,
                     repetition_penalty=1.3)
    compare(target, changed("llama", eos_token_id=[5], repetition_penalty=9.0, max_new_tokens=2), ROWS, 3, 3)


def test_padding_on_the_left_is_no_part_of_a_prompt():
    ids, mask = left_padded(ROWS, pad=9)
    options = {"num_beams": 3, "max_new_tokens": 8}
    padded = speculative_beam_generate(model("llama"), good_draft("llama"), ids, mask, **options)
    assert facts(padded) == facts(beam_generate(model("llama"), ROWS, **options))


@pytest.mark.parametrize("width", [70, 130])
def test_vocabularies_padded_to_another_width_are_no_trouble(width):
    draft = build(hf.LlamaConfig(**_BASE | {"vocab_size": width}), seed=3)
    compare(model("llama"), draft, ROWS, 3, peer=False, max_new_tokens=10, eos_token_id=MANY_ENDS)


@pytest.mark.parametrize("draft", ["gpt2", "gemma3", "mistral-window"])
def test_the_draft_may_be_of_another_family(draft):
    compare(model("qwen2"), model(draft), ROWS, 3, peer=False, max_new_tokens=10, eos_token_id=MANY_ENDS)


def test_more_beams_than_the_first_step_can_fill():
    compare(model("llama"), good_draft("llama"), ROWS[:1], 40, max_new_tokens=4, eos_token_id=None)


@pytest.mark.parametrize("room", [{"max_length": 24}, {"max_new_tokens": 2}, {"max_new_tokens": 3}])
def test_rows_with_different_room_end_where_they_must(room):
    rows = ROWS if "max_new_tokens" in room else [ROWS[0], ROWS[2], ROWS[3]]
    compare(model("llama"), model("llama"), rows, 3, eos_token_id=None, **room)


def test_a_prompt_is_stored_once_for_all_its_beams(monkeypatch):
    """Eight beams, forty steps, a prompt of 150 tokens: far fewer slots than eight copies of it, in both models."""
    seen: list[TokenTree] = []
    original = TokenTree.__init__
    monkeypatch.setattr(TokenTree, "__init__",
                        lambda self, *args, **named: (seen.append(self), original(self, *args, **named))[1])
    speculative_beam_generate(model("llama"), good_draft("llama"), prompts((150,)), num_beams=8, max_new_tokens=40,
                              draft_length=3, draft_beams=10, eos_token_id=None)
    wave = 10 * 4  # what one round adds
    target, draft = seen[-2:]
    for tree in (target, draft):
        assert len(tree.cache.rows) == 1
        assert tree.high <= 150 + 8 * 40 + 2 * wave
        assert tree.high < 8 * 150 / 2
        assert tree.cache.capacity <= 1.5 * (150 + 8 * 40 + 2 * wave)


@pytest.mark.parametrize("kind", ["good", "itself"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ties_end_as_in_generate(name, kind):
    for num_beams, ends in ((4, MANY_ENDS), (3, None), (5, [EOS, 44])):
        compare(model(name), draft_of(kind, name), ROWS, num_beams, max_new_tokens=8, eos_token_id=ends,
                logits_processor=LogitsProcessorList([Rounded()]))


@pytest.mark.parametrize("kind", ["good", "random"])
def test_ties_in_the_pool_end_as_in_generate(kind):
    for seed in range(12):
        compare(model("llama"), draft_of(kind, "llama"), prompts((5, 9), seed), 4, max_new_tokens=20,
                eos_token_id=[EOS, 40, 50], logits_processor=LogitsProcessorList([Rounded()]))


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("kind", ["good", "random"])
def test_what_was_scored_once_is_not_scored_again(monkeypatch, kind, ahead):
    """No two nodes that the target reads stand for the same text."""
    target, extend, held, texts = model("llama"), TokenTree.extend, {}, []

    def watched(self, tips, block, last_only=False):
        logits, nodes = extend(self, tips, block, last_only)
        if self.adapter.model is target:
            given = (self.cache.slots[0].tolist(), nodes.depth[0].tolist(), block.tokens[0].tolist())
            held.update({slot: (depth, token) for slot, depth, token in zip(*given, strict=True)})
            seen = [] if last_only else nodes.visible[0, : int(block.lengths[0])]
            texts.extend(tuple(sorted(held[slot] for slot in row.nonzero()[:, 0].tolist())) for row in seen)
        return logits, nodes

    adapt(target)  # its probe reads trees too
    monkeypatch.setattr(TokenTree, "extend", watched)
    speculative_beam_generate(target, draft_of(kind, "llama"), ROWS[:1], num_beams=4, draft_length=ahead,
                              max_new_tokens=20, eos_token_id=None)
    assert len(texts) > 60 and len(set(texts)) == len(texts)


def test_a_beam_that_nobody_will_go_on_from_needs_no_logits():
    rule = Ranking(2, 4, 1.0, False)
    ranked = Ranked([[7, 8, 9, 6]], [[0, 0, 0, 0]], [[-1.0, -2.0, -3.0, -4.0]], [[None] * 4], [[0, 1]], [], [])
    assert spec._certain(ranked, 0, -2.5, rule, False) and not spec._certain(ranked, 0, -2.0, rule, False)
    assert spec._certain(ranked, 0, None, rule, True)  # nothing is missing
    assert not spec._certain(ranked, 0, -2.5, rule, True)  # the search tree wants the spare candidates too
    ended = ranked._replace(chosen=[[1, 2]])
    assert spec._certain(ended, 0, -3.5, rule, False) and not spec._certain(ended, 0, -2.5, rule, False)
    for scores in ([-1.0, -1.0, -3.0, -4.0], [-1.0, -2.0, -2.0, -4.0]):
        assert not spec._certain(ranked._replace(scores=[scores]), 0, -2.5, rule, False)


def test_where_stops_leave_too_few_that_run_on_an_unknown_candidate_may_be_one_of_them():
    rule = Ranking(2, 4, 1.0, False)
    ranked = Ranked([[7, 8, 9, 6]], [[0, 0, 0, 0]], [[-1.5, -2.0, -2.5, -5.2]], [[None, "stop", "stop", "stop"]],
                    [[0, 2]], [], [])
    assert not spec._certain(ranked, 0, -5.0, rule, False) and spec._certain(ranked, 0, None, rule, False)
    assert spec._certain(ranked._replace(reasons=[[None, "stop", None, "stop"]]), 0, -5.0, rule, False)


class EndsMost(StoppingCriteria):
    """Three of four tokens end a hypothesis: often fewer than num_beams run on, and the others are ended ones."""

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return input_ids[:, -1] % 4 != 0


@pytest.mark.parametrize("num_beams", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["good", "random"])
def test_a_criterion_that_ends_most_tokens_leaves_the_hypotheses_of_generate(kind, num_beams):
    for seed in range(8):
        for ahead in (1, 4):
            compare(model("llama"), draft_of(kind, "llama"), prompts((5, 9, 3), seed), num_beams, draft_length=ahead,
                    max_new_tokens=10, eos_token_id=[EOS] if seed % 2 else None,
                    stopping_criteria=StoppingCriteriaList([EndsMost()]))


def test_a_row_near_the_last_position_is_drafted_no_further():
    """gpt2 has a table of positions: reading one behind its end would crash."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 4}
    target = build(hf.GPT2Config(**sizes, initializer_range=0.25, bos_token_id=1, eos_token_id=EOS, pad_token_id=0))
    for lengths in ((29, 12, 24), (31, 8), (26, 27, 28, 29)):
        for draft in (target, tiny_draft(target)):
            compare(target, draft, prompts(lengths), 3, draft_length=6, max_length=32, eos_token_id=None)


def trie(rows, first: int, last: int | None = None, otherwise: list[int] | None = None):
    """Allows `first` tokens at the beginning, then one or two each, and after `last` tokens only EOS; a text that it
    does not allow is an error, as in tries of entities or SQL, unless there is something to go on with `otherwise`."""
    def children(prefix: list[int]) -> list[int]:
        if len(prefix) == last:
            return [EOS]
        wide = first if not prefix else 1 + sum(prefix) % 2
        return [3 + (sum(prefix) * 7 + 11 * n) % 90 for n in range(wide)]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        text = ids.tolist()
        prompt = max((row.tolist() for row in rows if text[: len(row)] == row.tolist()), key=len)
        prefix: list[int] = []
        for token in text[len(prompt):]:
            if token not in children(prefix):
                if otherwise:
                    return otherwise
                raise KeyError(f"{token} after {prefix}")
            prefix.append(token)
        return children(prefix)

    return allowed


@pytest.mark.parametrize("kind", ["good", "random", "itself"])
@pytest.mark.parametrize("num_beams", [2, 3, 4])
def test_a_constraint_is_not_asked_about_texts_that_it_excludes(num_beams, kind):
    for first in {1, 2, num_beams}:
        compare(model("llama"), draft_of(kind, "llama"), ROWS, num_beams, max_new_tokens=9, eos_token_id=None,
                prefix_allowed_tokens_fn=trie(ROWS, first))


@pytest.mark.parametrize("kind", ["good", "random"])
@pytest.mark.parametrize("last", [2, 4])
def test_fewer_possible_continuations_than_beams(last, kind):
    for num_beams in (2, 3, 4):
        compare(model("llama"), draft_of(kind, "llama"), ROWS, num_beams, max_new_tokens=7,
                prefix_allowed_tokens_fn=trie(ROWS, num_beams - 1, last, [50]))


# Any search.

cases = given(
    lengths=st.one_of(st.lists(st.integers(1, 14), min_size=1, max_size=3), st.just([5, 14, 1, 8, 3, 11, 2, 7])),
    width=st.integers(1, 8), data=st.data(),
    new=st.integers(1, 14), penalty=st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]),
    early=st.sampled_from([False, True, "never"]), ends=st.lists(st.integers(3, 99), max_size=14, unique=True),
    name=st.sampled_from(FAMILIES), kind=st.sampled_from(["good", "good", "random", "itself"]),
    depths=st.integers(1, 6), wider=st.integers(0, 5), seed=st.integers(0, 99), shaped=st.sampled_from([
        {}, {}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4},
        {"bad_words_ids": [[t] for t in range(3, 30)] + [[50, 51]]}, {"suppress_tokens": list(range(40, 80))},
        {"prefix_allowed_tokens_fn": every_third}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
                                                    "bad_words_ids": [[60, 61], [7]]}]))


def any_search(lengths, width, data, new, penalty, early, ends, name, kind, depths, wider, seed, shaped):
    rows = prompts(tuple(lengths), seed)
    options = {"max_new_tokens": new, "eos_token_id": ends or None, **shaped}
    if "min_new_tokens" in shaped:
        options["max_new_tokens"] += 4
    if width == 1:
        out = speculative_beam_generate(model(name), draft_of(kind, name), rows, num_beams=1, **options)
        assert out.tokens == greedy_generate(model(name), rows, **options).tokens
        return
    compare(model(name), draft_of(kind, name), rows, width, data.draw(st.integers(1, width)), draft_length=depths,
            draft_beams=width + wider, length_penalty=penalty, early_stopping=early, **options)


@settings(derandomize=True, max_examples=100, deadline=None)
@cases
def test_any_search_gives_the_hypotheses_of_generate(**case):
    any_search(**case)


@pytest.mark.heavy
@settings(derandomize=True, max_examples=600, deadline=None)
@cases
def test_six_hundred_more_searches_give_the_hypotheses_of_generate(**case):
    any_search(**case)


@pytest.mark.heavy
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 5, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_grid(name, num_beams, length_penalty, early_stopping):
    for kind, ends in (("good", MANY_ENDS), ("random", [EOS, *range(3, VOCABULARY, 9)]), ("itself", None)):
        compare(model(name), draft_of(kind, name), EIGHT, num_beams, max_new_tokens=12, eos_token_id=ends,
                length_penalty=length_penalty, early_stopping=early_stopping)


@pytest.mark.parametrize("options, sentence", [
    ({"num_beams": 4, "draft_beams": 3}, "draft_beams is 3 and num_beams 4"),
    ({"draft_beams": 5.0}, "draft_beams is 5.0"), ({"draft_beams": True}, "draft_beams is True"),
    ({"draft_length": 0}, "draft_length is 0: .* at least 1"), ({"draft_length": "long"}, "draft_length is 'long'"),
    ({"draft_length": True}, "draft_length is True"), ({"draft_length": 2.5}, "draft_length is 2.5"),
    ({"num_beams": 0}, "num_beams is 0"), ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3"),
    ({"streamer": "one"}, "streamer was given to beam search"), ({"do_sample": True}, "do_sample is not an option"),
    ({"early_stopping": "sometimes"}, "early_stopping"), ({"lenght_penalty": 1.0}, "did you mean 'length_penalty'"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        speculative_beam_generate(model("llama"), model("llama"), ROWS, **{"max_new_tokens": 4} | options)
    assert "\n" not in str(error.value)


# Negative controls: the comparison sees a search that is nearly right.

def _worse(kind: str = "good") -> None:
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        compare(model("llama"), draft_of(kind, "llama"), ROWS, 4, 4, peer=False, max_new_tokens=12,
                eos_token_id=MANY_ENDS)


@pytest.mark.parametrize("module, name, right, wrong", [
    (spec, "_certain", "scores[last] > bound and", ""), (spec, "_certain", "scores[last] > bound", "scores[0] > bound"),
    (answered, "Answered", "self.children.get(step, -1)",
     "{token: node for (_, token), node in self.children.items()}.get(step[1], -1)"),
    (answered, "Answered", "[self.at[origin] for origin in origins]", "self.at[:]"),
    (answered, "Answered", "self.logits.get(node, some)", "some"),
    (answered, "Answered", "if parent in alive}", "if parent in new}"),
], ids=["missing logits are taken for unimportant", "only the best survivor is asked",
        "the same token below another node",
        "a survivor's node is not its origin's", "all beams are scored by one's logits",
        "a node that only its child needs has children"])
def test_control_a_mistake_in_the_replay_is_seen(monkeypatch, module, name, right, wrong):
    monkeypatch.setattr(spec, name, mutated(module, name, right, wrong))
    with pytest.raises((AssertionError, IndexError, KeyError, RuntimeError)):
        for ends in (MANY_ENDS, None, [EOS, 40, 50, 60]):
            for kind in ("good", "random"):
                for width in (2, 4, 6):
                    compare(model("llama"), draft_of(kind, "llama"), EIGHT, width, peer=False, max_new_tokens=14,
                            eos_token_id=ends)


def test_control_beams_that_hang_below_the_wrong_node_are_seen(monkeypatch):
    original = spec._replay

    def crossed(beams, known, *args):
        found = original(beams, known, *args)
        for row in known:
            row.at, row.below = row.at[::-1], row.below[::-1]
        return found

    monkeypatch.setattr(spec, "_replay", crossed)
    _worse()


def test_control_nodes_that_see_their_siblings_are_seen(monkeypatch):
    original = spec.branches

    def leaky(*args):
        block = original(*args)
        return replace(block, ancestors=block.ancestors | (block.depth[:, :, None] == block.depth[:, None]))

    monkeypatch.setattr(spec, "branches", leaky)
    _worse()


def test_control_a_draft_that_proposes_nonsense_costs_rounds_only(monkeypatch):
    original = DraftBeams.propose

    def nonsense(self, *args):
        made = original(self, *args)
        return replace(made, tokens=[[(token + 1) % VOCABULARY for token in row] for row in made.tokens])

    options = {"peer": False, "max_new_tokens": 12, "eos_token_id": None}
    honest = compare(model("llama"), model("llama"), ROWS, 4, **options)
    monkeypatch.setattr(DraftBeams, "propose", nonsense)
    assert steps_per_round(compare(model("llama"), model("llama"), ROWS, 4, **options)) < steps_per_round(honest) / 2
