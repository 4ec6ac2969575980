"""A step, a proposal, a verification as one recording each: the eager loops' tokens, the host told once a round."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from reference import good_draft, model
from refusals import refusal
from test_graph import Recorder
from tiny import prompts, tiny_model

import specbeam
from specbeam.decoding import greedy
from specbeam.runners import chains, choose, graph
from specbeam.sampling import draw, invert

ROWS = {"one": (7,), "ragged": (5, 19, 12)}
SHAPING = {
    "greedy": {}, "greedy, penalty": {"repetition_penalty": 1.7},
    "drawn": {"temperature": 0.9, "top_k": 0}, "drawn, shaped": {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
    "drawn, penalty": {"temperature": 1.0, "repetition_penalty": 1.4},
}


def plain(target, draft, rows, **options):
    drawn = "temperature" in options
    return (specbeam.sample_generate if drawn else specbeam.greedy_generate)(target, rows, **options)


def speculative(target, draft, rows, **options):
    return specbeam.speculative_generate(target, draft, rows, draft_length=3, **options)


def check_rounds(found, wanted):
    """The same tokens, found in the same rounds."""
    assert found.tokens == wanted.tokens
    for mine, eager in zip(found.trace, wanted.trace, strict=True):
        assert [(one.drafted, one.accepted, one.committed, one.proposed) for one in mine.rounds] == [
            (one.drafted, one.accepted, one.committed, one.proposed) for one in eager.rounds]
        assert mine.sources == eager.sources


def check_rows_that_end_and_join(name, shaping, method, use):
    """use: makes the models run another way than before."""
    target, draft, given = model(name), good_draft(name), prompts((5, 9, 12, 7, 6))
    call = partial(method, target, draft, max_new_tokens=18, **SHAPING[shaping])
    longest = max(call(given, seed=3).tokens, key=len)
    end = longest[len(longest) // 2]
    wanted = [call([row], eos_token_id=end, seed=3 + place).tokens[0] for place, row in enumerate(given)]
    use(target, draft)
    assert call(given, eos_token_id=end, seed=3, batch_size=2).tokens == wanted
    assert call(given, eos_token_id=end, seed=3).tokens == wanted


def check_a_way_to_propose(options, use):
    target, draft, given = model("llama"), good_draft("llama"), prompts((5, 19))
    options = {"draft_length": 3, "max_new_tokens": 20, "seed": 2, **options}
    if options["draft_length"] == "auto":  # what it learns decides how long its proposals are, not what is said
        wanted = specbeam.greedy_generate(target, given, max_new_tokens=20).tokens
    else:
        wanted = specbeam.speculative_generate(target, draft, given, **options).tokens
    use(target, draft)
    for _ in range(2):
        assert specbeam.speculative_generate(target, draft, given, **options).tokens == wanted


@pytest.fixture
def recorded(monkeypatch):
    """Runs models through recorded functions; what was recorded."""
    record, made = Recorder(), []
    monkeypatch.setattr(graph, "make", lambda adapter, precision: graph.runner("graph", record))

    def use(*models):
        for one in models:
            made.append(one)
            choose._made.pop(one, None)  # another test's recordings
            assert specbeam.use_runner(one, "graph") == "graph"
        return record

    yield use
    for one in made:
        choose.want_runner(one, "eager")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("method", [plain, speculative])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_tokens_are_those_of_the_eager_loops(name, method, shaping, rows, recorded, caplog):
    target, draft, given = model(name), good_draft(name), prompts(ROWS[rows])
    call = partial(method, target, draft, given, max_new_tokens=14, seed=5, **SHAPING[shaping])
    wanted = call()
    recorded(target, draft)
    for _ in range(3):  # as it is, recorded in between, replayed
        found = call()
        check_rounds(found, wanted)
    assert not caplog.records  # nothing fell back


@pytest.mark.parametrize("method", [plain, speculative])
@pytest.mark.parametrize("shaping", ["greedy, penalty", "drawn, shaped"])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "gemma3"])
def test_rows_that_end_and_join_change_nothing(name, shaping, method, recorded, caplog):
    check_rows_that_end_and_join(name, shaping, method, recorded)
    assert not caplog.records


@pytest.mark.parametrize("options", [{"drafter": "prompt_lookup"}, {"draft_length": "auto"},
                                     {"acceptance": "block", "temperature": 1.0}, {"confidence_threshold": 0.3}])
def test_every_way_to_propose_a_chain(options, recorded):
    check_a_way_to_propose(options, recorded)


def test_a_round_is_two_replays(recorded):
    target, draft, given = model("llama"), good_draft("llama"), prompts((7,))
    record = recorded(target, draft)
    with graph.warming():
        speculative(target, draft, given, max_new_tokens=24)
    before = record.replayed
    out = speculative(target, draft, given, max_new_tokens=24)
    rounds = out.trace[0].rounds
    assert record.replayed - before == 2 * len(rounds) - (rounds[-1].drafted == 0)


def test_the_next_step_begins_before_the_host_has_the_token(recorded, monkeypatch):
    target, given, order = model("llama"), prompts((7,)), []
    recorded(target)
    step = chains.Chains.step

    def watched(self, *args):
        number, read = sum(kind == "begun" for kind, _ in order), step(self, *args)
        order.append(("begun", number))
        return lambda: (order.append(("seen", number)), read())[1]

    monkeypatch.setattr(chains.Chains, "step", watched)
    greedy.greedy_generate(target, given, max_new_tokens=6)  # the prompt's forward gives the first
    assert order == [("begun", 0), ("begun", 1), ("seen", 0), ("begun", 2), ("seen", 1), ("begun", 3), ("seen", 2),
                     ("begun", 4), ("seen", 3), ("seen", 4)]


def test_the_next_proposal_begins_before_the_host_has_what_was_accepted(recorded, monkeypatch):
    target, draft, given, order = model("llama"), good_draft("llama"), prompts((7, 5)), []
    wanted = speculative(target, draft, given, max_new_tokens=24)
    recorded(target, draft)

    def watched(name, of):
        call = getattr(of, name)

        def instead(self, *args):
            order.append(name)
            found = call(self, *args)
            return (lambda: (order.append("seen"), found())[1]) if name == "verify" else found

        monkeypatch.setattr(of, name, instead)

    for name in ("propose", "follow", "verify"):
        watched(name, chains.Chains)
    check_rounds(speculative(target, draft, given, max_new_tokens=24), wanted)
    assert order[:7] == ["propose", "verify", "follow", "seen", "verify", "follow", "seen"]
    assert order[-1] == "seen" and order.count("follow") > order.count("propose")  # which the ends of answers ask for


def test_after_warming_up_nothing_is_recorded(recorded):
    """Other prompts, other lengths of the class, other acceptance, ends of answers: no new shape."""
    target, draft = model("llama"), good_draft("llama")
    record = recorded(target, draft)
    with graph.warming():
        plain(target, draft, prompts((5,)), max_new_tokens=40)
        speculative(target, draft, prompts((5,)), max_new_tokens=40)
    before = record.recorded
    for length in (6, 11, 30):
        for new in (9, 40):
            plain(target, draft, prompts((length,)), max_new_tokens=new)
            speculative(target, draft, prompts((length,)), max_new_tokens=new)
    assert record.recorded == before


def test_without_warming_a_shape_is_recorded_the_third_time(recorded):
    target = model("llama")
    record = recorded(target)
    before = record.recorded  # by the probe
    greedy.greedy_generate(target, prompts((5,)), max_new_tokens=3)  # two steps behind the prompt
    assert record.recorded == before
    greedy.greedy_generate(target, prompts((5,)), max_new_tokens=2)
    assert record.recorded == before + 1


@pytest.mark.parametrize("drafter", ["prompt_lookup", "draft_model"])
def test_the_end_of_an_answer_is_no_new_shape(drafter, recorded):
    """What is left of it would cut the last proposals, which lookups make shorter."""
    target, draft = model("llama"), good_draft("llama")
    [given] = prompts((9,))
    text = torch.cat([given, torch.tensor(specbeam.greedy_generate(target, [given], max_new_tokens=40).tokens[0])])
    call = partial(specbeam.speculative_generate, target, draft, [torch.cat([text, given])], drafter=drafter,
                   draft_length=6)  # the answer stands in its prompt
    wanted = [call(max_new_tokens=new).tokens for new in range(8, 22)]
    record = recorded(target, draft)
    with graph.warming():
        call(max_new_tokens=40)
    before = record.recorded
    assert [call(max_new_tokens=new).tokens for new in range(8, 22) for _ in range(3)][::3] == wanted
    assert record.recorded == before


@pytest.mark.parametrize("options", [{"min_new_tokens": 5}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[7]]}])
def test_processors_that_count_or_remember_keep_the_ordinary_loop(options, recorded, monkeypatch):
    target, given = model("llama"), prompts((5, 9))
    wanted = specbeam.greedy_generate(target, given, max_new_tokens=12, **options).tokens
    recorded(target)
    monkeypatch.setattr(chains.Chains, "run", None)
    assert specbeam.greedy_generate(target, given, max_new_tokens=12, **options).tokens == wanted


def test_nothing_to_draw_is_said_in_the_same_sentence(recorded):
    target, given = tiny_model("llama", seed=9), prompts((5,))
    recorded(target)
    specbeam.sample_generate(target, given, max_new_tokens=4)
    target.lm_head.weight.data.view(-1)[0] = math.nan  # writing in place is not seen before the next call
    assert "no token to draw" in refusal(specbeam.sample_generate, target, given, max_new_tokens=4)


def test_inverting_without_a_check_marks_rows_that_have_nothing():
    weights = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 1.0]])
    uniform = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    assert invert(weights, uniform).tolist() == [1, -1, -1]
    assert draw(weights[:1], uniform[:1]).tolist() == [1]
    assert "no token to draw" in refusal(draw, weights, uniform)
