"""Beams that are read on the host are those of the token tree, hypothesis by hypothesis, whatever dies or leaves."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from openvino_runs import on_openvino
from reference import model
from tiny import prompts

import specbeam
from specbeam.runners.host_beams import HostBeams

backend = pytest.importorskip("specbeam.runners.openvino", reason="openvino is not installed")

SEARCHES = {
    "beams": specbeam.beam_generate,
    "groups": partial(specbeam.diverse_beam_generate, num_beam_groups=2, diversity_penalty=0.7),
    "stochastic": partial(specbeam.stochastic_beam_generate, seed=5)}
ROWS = {"one row": (9,), "ragged": (5, 19, 12)}


@pytest.fixture
def on_host(monkeypatch):
    """Runs a model on OpenVINO, after it was run eagerly; the fronts that were read."""
    fronts, right = [], HostBeams.read

    def read(beams, front):
        fronts.append(front)
        return right(beams, front)

    monkeypatch.setattr(HostBeams, "read", read)

    with on_openvino() as use:
        yield lambda *models: use(*models) or fronts


def answers(out) -> list[list[tuple]]:
    return [[(one.tokens, one.beams, pytest.approx(one.score, abs=1e-4)) for one in row] for row in out.hypotheses]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_hypotheses_and_scores_are_the_trees(name, search, rows, on_host, monkeypatch):
    monkeypatch.setattr(backend, "_SLACK", 3)  # the state is compacted again and again
    target = model(name)
    call = partial(SEARCHES[search], target, prompts(ROWS[rows]), num_beams=4, max_new_tokens=30, eos_token_id=[2, 60])
    wanted = answers(call())
    fronts = on_host(target)
    found = call()
    assert answers(found) == wanted
    assert len(fronts) == max(len(row.rounds) for row in found.trace)


@pytest.mark.parametrize("slack", [0, 3, 20, 64])
def test_the_state_may_grow_beyond_what_an_answer_needs(slack, on_host, monkeypatch):
    """A search of 60 steps writes 240 tokens, of which 60 and the prompt live at most."""
    monkeypatch.setattr(backend, "_SLACK", slack)
    target = model("llama")
    call = partial(specbeam.beam_generate, target, prompts((9, 17)), num_beams=4, max_new_tokens=60)
    wanted = answers(call())
    on_host(target)
    assert answers(call()) == wanted


def test_rows_leave_at_different_times(on_host):
    target, given = model("llama"), prompts((5, 19, 12))
    call = partial(specbeam.beam_generate, target, given, num_beams=3, max_new_tokens=40, early_stopping=True,
                   eos_token_id=[2, 3, 4, 5, 6, 7, 8])
    wanted = answers(call())
    fronts = on_host(target)
    assert answers(call()) == wanted
    assert len({len(front) for front in fronts}) > 1


@pytest.mark.parametrize("fault", ["beams see their siblings", "nothing dies", "wrong order"])
def test_a_broken_map_of_positions_is_seen(fault, on_host, monkeypatch):
    monkeypatch.setattr(backend, "_SLACK", 3)
    target, given = model("llama"), prompts((5, 19, 12))
    call = partial(specbeam.beam_generate, target, given, num_beams=4, max_new_tokens=30)
    wanted = answers(call())
    on_host(target)
    room, seen = backend.StateSlots.make_room, backend.StateSlots.read_seen
    if fault == "beams see their siblings":
        monkeypatch.setattr(np, "eye", lambda width, dtype: np.ones((width, width), dtype=dtype))
    elif fault == "nothing dies":
        monkeypatch.setattr(backend.StateSlots, "read_seen", lambda slots, tokens, at, visible, near: seen(
            slots, tokens, at, np.ones_like(visible), near))
    else:
        monkeypatch.setattr(backend.StateSlots, "make_room", lambda slots, alive, new: (
            None if (order := room(slots, alive, new)) is None else np.roll(order, 1, 1)))
    assert answers(call()) != wanted
