"""The forecast against real runs: accepted tokens exactly, sampled rounds in expectation, seconds by hand."""

from __future__ import annotations

import pytest
import torch
from planted import mutated
from tiny import EOS, prompts, tiny_draft, tiny_model

from specbeam import forecast, greedy_generate, sample_generate, speculative_generate
from specbeam.forecast import (
    Answer,
    Costs,
    costs_of,
    expected_rounds,
    forced_chances,
    greedy_rounds,
    measure_costs,
    plain_seconds,
    speculative_seconds,
)

ROOM = 24


def answered(target, rows, **options):
    out = greedy_generate(target, rows, max_new_tokens=ROOM, **options)
    return [Answer(tuple(row.tolist()), tuple(tokens), ROOM) for row, tokens in zip(rows, out.tokens, strict=True)]


def real(out):
    return [(len(trace.rounds), sum(one.drafted for one in trace.rounds), sum(one.accepted for one in trace.rounds))
            for trace in out.trace]


def foretold(rows):
    return [(row.rounds, row.drafted, row.accepted) for row in rows]


@pytest.fixture(scope="module")
def pair():
    target = tiny_model("llama")
    return target, tiny_draft(target, 0.12)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["plain", "repetition penalty"])
def test_rounds_drafted_and_accepted_tokens_of_greedy_chains_are_exact(pair, length, options):
    target, draft = pair
    rows = prompts((5, 9, 3), seed=4)
    answers = answered(target, rows, **options)
    chances = forced_chances(target, draft, answers, 8, max_new_tokens=ROOM, **options)
    out = speculative_generate(target, draft, rows, draft_length=length, max_new_tokens=ROOM, **options)
    outlook, batch = greedy_rounds(answers, chances, length)
    assert foretold(outlook) == real(out)
    assert 0 < sum(row.accepted for row in outlook) < sum(row.drafted for row in outlook), "a test with content"
    assert len(batch) == max(row.rounds for row in outlook) and batch[0] == (3, length)


def test_answers_that_end_by_eos_are_exact_too():
    target = tiny_model("gpt2")
    draft, rows = tiny_draft(target, 0.1), prompts((6, 4), seed=2)
    free = greedy_generate(target, rows, max_new_tokens=ROOM, eos_token_id=EOS)
    ends = free.tokens[0][9]  # a token that comes up, as the end
    answers = answered(target, rows, eos_token_id=ends)
    assert len(answers[0].tokens) < ROOM
    chances = forced_chances(target, draft, answers, 6, max_new_tokens=ROOM, eos_token_id=ends)
    for length in (1, 4, 6):
        out = speculative_generate(target, draft, rows, draft_length=length, max_new_tokens=ROOM, eos_token_id=ends)
        assert foretold(greedy_rounds(answers, chances, length)[0]) == real(out)


def test_prompt_lookup_is_exact_without_a_model(pair):
    target, _ = pair
    row = torch.cat([prompts((6,), seed=1)[0]] * 3)
    answers = answered(target, [row])
    chances = forced_chances(target, None, answers, 5, ngram=2, max_new_tokens=ROOM)
    for length in (1, 3, 5):
        out = speculative_generate(target, None, [row], drafter="prompt_lookup", ngram=2, draft_length=length,
                                   max_new_tokens=ROOM)
        assert foretold(greedy_rounds(answers, chances, length)[0]) == real(out)


def test_a_pass_that_is_off_by_one_token_would_be_noticed(pair, monkeypatch):
    target, draft = pair
    answers = answered(target, prompts((7,), seed=3))
    honest = forced_chances(target, draft, answers, 4, max_new_tokens=ROOM)
    wrong = mutated(forecast, "_agreement", "_forced_logits(model, ids, len(answer.tokens))",
                    "_forced_logits(model, [*ids, 3], len(answer.tokens))")
    monkeypatch.setattr(forecast, "_agreement", wrong)
    shifted = forced_chances(target, draft, answers, 4, max_new_tokens=ROOM)
    assert greedy_rounds(answers, honest, 4)[0] != greedy_rounds(answers, shifted, 4)[0]


def test_the_recursion_is_what_brute_force_over_all_outcomes_gives():
    chances = [[], [.9, .5, .2], [.5, .2, .7], [.2, .7], [.7]]
    answer = Answer((1,), (1, 2, 3, 4, 5), 9)

    def walk(start, length):  # (rounds, accepted), every outcome by its probability
        if start >= 5:
            return 0.0, 0.0
        rounds, accepted, reach = 1.0, 0.0, 1.0
        proposed = chances[start][:length]
        for i, chance in enumerate([*proposed, 0.0]):
            after = walk(min(start + i + 1, 5), length)
            stop = reach * (1 - chance)
            rounds, accepted = rounds + stop * after[0], accepted + stop * (i + after[1])
            reach *= chance
        return rounds, accepted
    for length in (1, 2, 3):
        outlook, _ = expected_rounds(answer, chances, length)
        assert (outlook.rounds, outlook.accepted) == pytest.approx(walk(1, length))


def test_sure_chances_make_the_recursion_the_walk(pair):
    target, draft = pair
    answers = answered(target, prompts((5, 9), seed=6))
    chances = forced_chances(target, draft, answers, 5, max_new_tokens=ROOM)
    for answer, own in zip(answers, chances, strict=True):
        for length in (1, 3, 5):
            [walked], _ = greedy_rounds([answer], [own], length)
            assert expected_rounds(answer, own, length)[0] == walked


def test_expected_rounds_of_sampled_answers_are_those_of_sampled_speculation(pair):
    target, draft = pair
    [row], options = prompts((5,), seed=8), {"temperature": 0.9, "top_k": 20, "max_new_tokens": 8}
    runs = 250
    plain = sample_generate(target, [row] * runs, seed=list(range(runs)), **options)
    answers = [Answer(tuple(row.tolist()), tuple(tokens), 8) for tokens in plain.tokens]
    chances = forced_chances(target, draft, answers, 3, top_k=20, temperature=0.9, max_new_tokens=8)
    expected = [expected_rounds(answer, own, 3)[0] for answer, own in zip(answers, chances, strict=True)]
    seeds = list(range(900, 900 + runs))
    out = speculative_generate(target, draft, [row] * runs, draft_length=3, seed=seeds, **options)
    rounds = [len(trace.rounds) for trace in out.trace]
    spread = torch.tensor(rounds, dtype=torch.float64).std().item() / runs ** 0.5
    mean = sum(one.rounds for one in expected) / runs
    assert abs(mean - sum(rounds) / runs) < 4 * spread
    accepted = sum(sum(one.accepted for one in trace.rounds) for trace in out.trace) / runs
    assert sum(one.accepted for one in expected) / runs == pytest.approx(accepted, rel=0.12)
    greedy_view = [[[float(chance == 1) for chance in place] for place in own] for own in chances]
    wrong = sum(expected_rounds(a, own, 3)[0].rounds for a, own in zip(answers, greedy_view, strict=True)) / runs
    assert abs(wrong - sum(rounds) / runs) > 4 * spread, "chances below 1 matter here"


def test_seconds_are_rounds_times_what_they_cost():
    costs = Costs({1: {0: 1.0, 4: 2.0}, 3: {0: 1.5, 4: 4.0}})
    assert costs.seconds(1, 2) == pytest.approx(1.5) and costs.seconds(2, 4) == pytest.approx(3.0)
    assert costs.seconds(3, 9) == pytest.approx(4.0)
    short, long = Answer((1,), (1, 2, 3), 9), Answer((1,), (1, 2, 3, 4, 5), 9)
    assert plain_seconds([short, long], costs) == pytest.approx(2 * 1.25 + 2 * 1.0)
    sure = [[[1.0] * 4] * 3, [[1.0] * 4] * 5]
    rows, seconds = speculative_seconds([long], [sure[1]], 4, costs, sampled=False)
    assert (rows[0].rounds, rows[0].accepted) == (1, 4) and seconds == pytest.approx(2.0)
    _, seconds = speculative_seconds([short, long], sure, 4, costs, sampled=False)
    assert seconds == pytest.approx(3.0)


def test_costs_are_measured_for_every_length_and_number_of_rows(pair):
    target, draft = pair
    answers = answered(target, prompts((5, 9, 3), seed=4))
    costs = measure_costs(target, draft, answers, [1, 3], rows=2, repeats=1, max_new_tokens=12)
    assert set(costs.table) == {1, 2} and {0, 1, 3} <= set(costs.table[2])
    assert all(seconds > 0 for own in costs.table.values() for seconds in own.values())
    drafting, verifying = costs.parts[1][3]
    assert drafting > 0 and verifying > 0 and drafting + verifying <= 3 * costs.table[1][3]
    lookup = measure_costs(target, None, answers, [7], rows=1, repeats=1, max_new_tokens=12, drafter="prompt_lookup")
    assert 7 in lookup.table[1], "a length that nothing was looked up for is measured by forwards"


def test_a_machine_that_is_slow_for_a_while_does_not_change_what_a_round_costs_in_plain_steps(pair):
    turn = {(1, 0): [(1.0, 0.0, .9)] * 20, (1, 2): [(1.5, .5, .9)] * 9 + [(30.0, .5, .9)]}
    slow = {key: [tuple(2 * one for one in seconds) for seconds in found] for key, found in turn.items()}
    target, draft = pair
    costs = costs_of([turn, slow, turn], target, draft, [], [2])
    assert costs.table[1] == pytest.approx({0: 1.0, 2: 1.5}), "one accident in ten rounds is left out as well"
    assert costs.doubt == pytest.approx(0.0)
    pooled = {key: turn[key] + slow[key][:1] for key in turn}  # what the same rounds would say without their turn
    assert costs_of([pooled], target, draft, [], [2]).table[1][2] != pytest.approx(1.5)
    dear = {**turn, (1, 2): [(1.8, .5, .9)] * 10}
    assert 0.05 < costs_of([turn, dear, turn], target, draft, [], [2]).doubt < 0.2
    assert costs_of([turn], target, draft, [], [2]).doubt == float("inf"), "one turn says nothing about itself"


@pytest.mark.parametrize(("restless", "turns"), [(0.0, 1 + 3), (0.7, 1 + 12)])
def test_restless_costs_are_measured_more_often_up_to_four_times(pair, monkeypatch, restless, turns):
    taken = []

    def timed(*_, **__):
        taken.append(1)
        return {(1, 0): [(1.0, 0.0, .9)] * 9, (1, 2): [(1.5 + restless * (len(taken) % 3), .5, .9)] * 9}

    monkeypatch.setattr(forecast, "time_rounds", timed)
    measure_costs(*pair, [], [2], repeats=3)
    assert len(taken) == turns
