"""Diverse beam search against a plain implementation: lists, one group after the other, a whole forward per text."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from options import ROWS
from planted import mutated
from reference import model
from tiny import EOS, prompts

from specbeam import InputError, beam_generate, diverse_beam_generate
from specbeam.decoding import diverse_beam

ENDS = list(range(40, 60))


@torch.no_grad()
def plainly(target, prompt, num_beams, num_beam_groups, diversity_penalty, max_new_tokens, eos_token_id=(),
            length_penalty=1.0, early_stopping=False, processors=()):
    """[(tokens, score)] of all groups' pools, best first."""
    size, most = num_beams // num_beam_groups, max(2, 1 + len(eos_token_id)) * (num_beams // num_beam_groups)
    running = [[((), 0.0)] for _ in range(num_beam_groups)]
    pools: list[list] = [[] for _ in running]
    for length in range(1, max_new_tokens + 1):
        said: Counter[int] = Counter()
        for group, beams in enumerate(running):
            found = []
            for answer, score in beams:
                ids = torch.tensor([[*prompt.tolist(), *answer]])
                logs = target(ids).logits[:, -1].log_softmax(-1)
                for token, times in said.items():
                    logs[0, token] -= diversity_penalty * times
                for shape in processors:
                    logs = shape(ids, logs)
                found += [((*answer, token), score + log) for token, log in enumerate(logs[0].tolist())]
            found = sorted(found, key=lambda one: -one[1])[:most]
            going, last = [], [answer[-1] for answer, _ in found if answer[-1] not in eos_token_id]
            for place, (answer, score) in enumerate(found):
                if answer[-1] in eos_token_id or length == max_new_tokens:
                    pools[group] += [(answer, score / length**length_penalty)] * (place < size)
                elif len(going) < size:
                    going.append((answer, score))
            pools[group] = sorted(pools[group], key=lambda one: -one[1])[:size]
            said.update(last[:size])  # on the last step too, as in transformers' group beam search
            reach = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
            full = len(pools[group]) == size
            hopeless = full and (early_stopping is True or not going
                                 or going[0][1] / reach**length_penalty <= pools[group][-1][1])
            running[group] = [] if hopeless else going
    return [(list(answer), score) for answer, score in sorted((one for pool in pools for one in pool),
                                                              key=lambda one: -one[1])]


def compare(target, rows, num_beams, groups, penalty, processors=(), shaped=None, **options):
    out = diverse_beam_generate(target, rows, num_beams=num_beams, num_beam_groups=groups, diversity_penalty=penalty,
                                num_return_sequences=num_beams, **options, **(shaped or {}))
    for row, ours in zip(rows, out.hypotheses, strict=True):
        theirs = plainly(target, row, num_beams, groups, penalty, processors=processors, **options)
        assert [one.tokens for one in ours] == [tokens for tokens, _ in theirs]
        assert [one.score for one in ours] == pytest.approx([score for _, score in theirs], rel=1e-4)
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "stablelm"])
def test_a_ragged_batch_gives_the_hypotheses_of_the_plain_search(name):
    compare(model(name), ROWS, 4, 2, 0.7, max_new_tokens=8, eos_token_id=ENDS)


@pytest.mark.parametrize("num_beams, groups", [(2, 2), (6, 3), (6, 2), (4, 4), (3, 1)])
def test_any_number_of_groups(num_beams, groups):
    compare(model("llama"), ROWS[:2], num_beams, groups, 1.5, max_new_tokens=7, eos_token_id=[EOS, 40, 50])


@settings(derandomize=True, max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=3), groups=st.integers(1, 4), size=st.integers(1, 3),
       new=st.integers(1, 8), penalty=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
       length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]), early=st.sampled_from([False, True, "never"]),
       ends=st.lists(st.integers(3, 99), min_size=1, max_size=20, unique=True), name=st.sampled_from(["llama", "gpt2"]))
def test_any_search_gives_the_hypotheses_of_the_plain_one(lengths, groups, size, new, penalty, length_penalty, early,
                                                          ends, name):
    compare(model(name), prompts(tuple(lengths), seed=new), groups * size, groups, penalty, max_new_tokens=new,
            eos_token_id=ends, length_penalty=length_penalty, early_stopping=early)


def test_processors_see_the_penalised_scores_as_in_transformers():
    shapes = [hf.RepetitionPenaltyLogitsProcessor(1.4), hf.NoRepeatNGramLogitsProcessor(2)]
    compare(model("llama"), ROWS[:2], 4, 2, 0.9, processors=shapes, max_new_tokens=8, eos_token_id=[EOS],
            shaped={"repetition_penalty": 1.4, "no_repeat_ngram_size": 2})


def test_a_constrained_start_reaches_every_group():
    shape = hf.PrefixConstrainedLogitsProcessor(lambda _, ids: list(range(3 + len(ids) % 3, 101, 3)), 1)
    compare(model("llama"), ROWS[:2], 4, 2, 0.9, processors=[shape], max_new_tokens=6, eos_token_id=[EOS],
            shaped={"prefix_allowed_tokens_fn": lambda _, ids: list(range(3 + len(ids) % 3, 101, 3))})


def test_without_a_penalty_every_group_is_a_beam_search_of_its_size():
    options = {"max_new_tokens": 9, "eos_token_id": ENDS}
    out = diverse_beam_generate(model("llama"), ROWS, num_beams=6, num_beam_groups=3, diversity_penalty=0.0,
                                num_return_sequences=6, **options)
    plain = beam_generate(model("llama"), ROWS, num_beams=2, num_return_sequences=2, **options)
    for ours, theirs in zip(out.hypotheses, plain.hypotheses, strict=True):
        assert sorted(one.tokens for one in ours) == sorted(3 * [one.tokens for one in theirs])


def test_a_penalty_makes_the_groups_differ():
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "eos_token_id": None}
    alike = beam_generate(model("llama"), ROWS, **options)
    diverse = diverse_beam_generate(model("llama"), ROWS, num_beam_groups=4, diversity_penalty=5.0, **options)
    for one, other in zip(alike.hypotheses, diverse.hypotheses, strict=True):
        assert len({h.tokens[0] for h in other}) == 4 >= len({h.tokens[0] for h in one})
        assert {h.beams[-1] for h in other} == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong, sentence", [
    ({"num_beam_groups": 3}, "num_beam_groups is 3 and num_beams 4: groups are of one size"),
    ({"num_beam_groups": 0}, "num_beam_groups is 0"), ({"num_beam_groups": 2.0}, "num_beam_groups is 2.0"),
    ({"diversity_penalty": -1}, "diversity_penalty is -1"), ({"diversity_penalty": "much"}, "diversity_penalty"),
    ({"num_return_sequences": 5}, "num_return_sequences is 5 and num_beams 4"), ({"trace": 2}, "trace is 2"),
    ({"streamer": "any"}, "streamer was given to beam search"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        diverse_beam_generate(model("llama"), ROWS, **{"max_new_tokens": 4} | wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("right, wrong", [
    ("- diversity_penalty * taken[:, None]", "- diversity_penalty * (taken[:, None] > 0)"),
    ("after[i].groups.append(own[i] if done else stepped[i])", "after[i].groups.append(stepped[i])"),
    ("plain[:, group * size : (group + 1) * size] - diversity_penalty * taken[:, None]",
     "plain[:, group * size : (group + 1) * size]"),
], ids=["a token said twice costs once", "a group that is over goes on", "no penalty"])
def test_control_a_mistake_is_seen(monkeypatch, right, wrong):
    monkeypatch.setitem(globals(), "diverse_beam_generate", mutated(
        diverse_beam, "diverse_beam_generate", right, wrong))
    with pytest.raises(AssertionError):
        for early in (True, False):
            compare(model("llama"), ROWS, 6, 3, 1.5, max_new_tokens=12, eos_token_id=ENDS, early_stopping=early)
