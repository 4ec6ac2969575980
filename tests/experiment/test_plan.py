"""The plan: which cells run in which order, and the one sentence for a config that makes no sense."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from specbeam.errors import InputError
from specbeam.experiment.plan import Plan, in_turn, make_plan

CONFIG: dict[str, Any] = {
    "target": {"path": "bundled"},
    "draft": {"path": "bundled"},
    "methods": {
        "greedy": {"kind": "greedy"},
        "speculative": {"kind": "speculative", "draft_length": 4},
        "beam": {"kind": "beam", "num_beams": 4},
        "transformers_assisted": {"kind": "transformers_assisted", "draft_length": 4},
    },
    "only": None,
    "prompts": ["one", "two", "three"],
    "prompt_set": {"path": "bundled", "limit": 8, "per_category": 1},
    "system_prompt": None,
    "batch_size": 1,
    "repeats": 2,
    "max_new_tokens": 16,
    "seed": 0,
    "device": "cpu",
    "dtype": "auto",
    "executor": "local",
    "ray": {"address": None, "actors": None, "cpus_per_actor": 1, "timeout_seconds": 60},
    "debug": {"render_input_text": False},
    "wandb": {"mode": "offline", "project": "specbeam"},
    "output_dir": None,
}


def config(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONFIG), **changes}


def only(**settings: Any) -> dict[str, Any]:
    return config(methods={"mine": settings})


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(given)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def keys(plan: Plan) -> list[tuple[str, str, int, int]]:
    return [key for cell in plan.cells() for key in cell.row_keys()]


def test_every_method_answers_every_prompt_in_every_repeat_exactly_once() -> None:
    plan = make_plan(config(batch_size=2))
    expected = Counter((label, prompt, 0, r) for label in CONFIG["methods"] for prompt in "123" for r in range(2))
    assert Counter(keys(plan)) == expected


def test_methods_are_interleaved_prompt_by_prompt_and_none_is_always_first() -> None:
    cells = list(make_plan(config()).cells())
    groups = [cells[start : start + 4] for start in range(0, len(cells), 4)]
    for group in groups:
        assert len({cell.prompts[0].id for cell in group}) == 1
        assert {cell.method.label for cell in group} == set(CONFIG["methods"])
    assert len({group[0].method.label for group in groups}) == 4


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_each_method_has_every_place_and_follows_every_other_equally_often(count: int) -> None:
    orders = [in_turn(range(count), number) for number in range(count * (1 + count % 2))]
    places = Counter(place for order in orders for place in enumerate(order))
    following = Counter(pair for order in orders for pair in pairwise(order))
    assert len(places) == count**2 and len(set(places.values())) == 1
    assert len(following) == count * (count - 1) and len(set(following.values())) <= 1


def test_a_batch_holds_prompts_of_one_turn() -> None:
    prompts = [{"turns": ["a", "b"]}, {"prompt": "c"}, {"turns": ["d", "e"]}]
    plan = make_plan(config(prompts=prompts, batch_size=2, repeats=1, only=["greedy"]))
    assert [(cell.turn, [prompt.id for prompt in cell.prompts]) for cell in plan.cells()] == [
        (0, ["1", "2"]),
        (0, ["3"]),
        (1, ["1", "3"]),
    ]


def test_batch_ids_differ() -> None:
    ids = [cell.batch_id for cell in make_plan(config()).cells()]
    assert len(set(ids)) == len(ids)


def test_a_rows_seed_depends_neither_on_the_batch_nor_on_the_other_prompts() -> None:
    alone, together = make_plan(config(prompts=["one"])), make_plan(config(batch_size=3))
    assert alone.seed_of(alone.prompts[0], 0, 1) == together.seed_of(together.prompts[0], 0, 1)
    seeds = {together.seed_of(prompt, 0, repeat) for prompt in together.prompts for repeat in range(2)}
    assert len(seeds) == 6


def test_three_draft_lengths_can_share_a_kind() -> None:
    methods = {f"s{n}": {"kind": "speculative", "draft_length": n} for n in (2, 4, 8)}
    assert [method.options["draft_length"] for method in make_plan(config(methods=methods)).methods] == [2, 4, 8]


def test_only_says_the_order() -> None:
    plan = make_plan(config(only=["beam", "greedy", "beam"]))
    assert [method.label for method in plan.methods] == ["beam", "greedy"]


def test_a_method_may_have_its_own_max_new_tokens_and_null_means_unset() -> None:
    (method,) = make_plan(only(kind="greedy", max_new_tokens=5, repetition_penalty=None)).methods
    assert method.options == {"max_new_tokens": 5}


def test_no_draft_is_loaded_when_no_method_speculates() -> None:
    assert make_plan(config(only=["greedy", "beam"], draft={"path": None})).draft is None


def test_a_speculative_method_without_a_draft_says_what_can_be_run() -> None:
    sentence = refusal(config(draft={"path": None}))
    assert "speculative and transformers_assisted need a draft" in sentence
    assert "only=[greedy,beam]" in sentence and "draft.path=" in sentence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "has no kind"),
        ({"kind": "speculativ"}, "did you mean speculative?"),
        ({"kind": 3}, "methods.mine.kind is 3"),
        ({"kind": "speculative", "draft_lenght": 4}, "did you mean draft_length?"),
        ({"kind": "greedy", "repetition_penalti": 1.1}, "did you mean repetition_penalty?"),
        ({"kind": "greedy", "colour": "blue"}, "methods.mine.colour is no option of greedy"),
        ({"kind": "greedy", "draft_length": 4}, "greedy does not draft"),
        ({"kind": "greedy", "num_beams": 4}, "keeps one hypothesis"),
        ({"kind": "greedy", "temperature": 0.7}, "greedy does not sample"),
        ({"kind": "greedy", "do_sample": True}, "the kind decides"),
        ({"kind": "speculative", "num_assistant_tokens": 4}, "use draft_length"),
        ({"kind": "speculative", "draft_length": 0}, "draft_length is 0: give auto or a whole number of at least 1"),
        ({"kind": "speculative", "draft_length": -2}, "draft_length is -2"),
        ({"kind": "speculative", "draft_length": 2.5}, "draft_length is 2.5"),
        ({"kind": "speculative", "draft_length": 4.0}, "draft_length is 4.0"),
        ({"kind": "speculative", "draft_length": True}, "draft_length is True"),
        ({"kind": "speculative", "draft_length": "four"}, "draft_length is 'four'"),
        ({"kind": "transformers_assisted", "draft_length": 0}, "draft_length is 0"),
        ({"kind": "transformers_assisted", "draft_length": "auto"}, "draft_length is 'auto': give a whole number"),
        ({"kind": "speculative", "drafter": "promptlookup"}, "did you mean prompt_lookup?"),
        ({"kind": "speculative", "branching": 3}, "branching is 3: give children per depth"),
        ({"kind": "speculative", "branching": []}, "branching is []"),
        ({"kind": "speculative", "branching": [3, 0]}, "branching is [3, 0]"),
        ({"kind": "speculative", "tree_nodes": "many"}, "tree_nodes is 'many'"),
        ({"kind": "speculative", "tree_nodes": 0}, "tree_nodes is 0: give a whole number of at least 1"),
        ({"kind": "speculative", "drafter": "token_recycling", "confidence_threshold": 0.4}, "does nothing with"),
        ({"kind": "speculative", "draft_length": "auto", "confidence_threshold": 0.4}, "both say when a proposal ends"),
        ({"kind": "speculative", "tree_width": 2}, "tree_width=2 does nothing without tree_nodes"),
        ({"kind": "speculative", "drafter": "early_exit", "exit_layer": 0}, "exit_layer is 0"),
        ({"kind": "speculative", "drafter": "early_exit", "exit_layer": "two"}, "exit_layer is 'two'"),
        ({"kind": "speculative", "drafter": "suffix", "corpus": 5}, "corpus is 5"),
        ({"kind": "speculative", "drafter": "suffix", "corpus": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ({"kind": "speculative", "draft_length": "auto", "costs": "nowhere.json"}, "'nowhere.json' cannot be read"),
        ({"kind": "speculative", "acceptance": "blok"}, "acceptance is 'blok'"),
        ({"kind": "speculative", "acceptance": "block"}, "acceptance=block is a rule of sampling"),
        ({"kind": "speculative", "top_k": 5}, "top_k is 5, which has no effect at temperature 0"),
        ({"kind": "speculative_beam", "draft_beams": 2}, "draft_beams is 2 and num_beams 4"),
        ({"kind": "speculative_beam", "draft_beams": 40, "draft_length": 20}, "a round may propose 800 nodes"),
        ({"kind": "speculative_beam", "drafter": "oracle"}, "drafter is 'oracle': speculative beam search takes one"),
        ({"kind": "speculative_beam", "drafter": "suffix", "tree_nodes": 9}, "tree_nodes=9 does nothing"),
        ({"kind": "diverse_beam", "num_beams": 6, "num_beam_groups": 4}, "num_beam_groups is 4, but num_beams is 6"),
        ({"kind": "diverse_beam", "num_beams": 5}, "num_beam_groups is 2, but num_beams is 5: groups are of one size"),
        ({"kind": "diverse_beam", "diversity_penalty": -1}, "diversity_penalty is -1"),
        ({"kind": "beam", "num_beam_groups": 2}, "num_beam_groups cannot be set: use kind diverse_beam"),
        ({"kind": "beam", "temperature": 0.5}, "temperature has no effect: beam does not sample; the kinds sample"),
        ({"kind": "beam", "do_sample": True}, "do_sample cannot be set: the kind decides whether it samples"),
        ({"kind": "beam_sample", "temperature": 0}, "temperature is 0, but beam_sample samples"),
        ({"kind": "beam_sample", "num_return_sequences": 9}, "num_return_sequences is 9, but num_beams is 4"),
        ({"kind": "stochastic_beam", "length_penalty": 2.0}, "length_penalty has no effect: stochastic_beam draws"),
        ({"kind": "sample", "trace": True}, "trace has no effect"),
        ({"kind": "speculative_beam", "draft_beams": "wide"}, "draft_beams is 'wide'"),
        ({"kind": "speculative_beam", "temperature": 1.0}, "speculative_beam does not sample"),
        ({"kind": "greedy", "stop_strings": 5}, "stop_strings is 5"),
        ({"kind": "speculative", "temperature": -1}, "temperature is -1"),
        ({"kind": "sample", "temperature": 0}, "temperature is 0"),
        ({"kind": "sample", "top_p": 1.5}, "top_p is 1.5: give a number above 0 and at most 1"),
        ({"kind": "sample", "top_p": float("nan")}, "top_p is nan"),
        ({"kind": "sample", "top_k": -1}, "top_k is -1"),
        ({"kind": "beam", "num_beams": 0}, "num_beams is 0"),
        ({"kind": "beam", "num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, but num_beams is 2"),
        ({"kind": "beam", "num_return_sequences": 5}, "num_return_sequences is 5, but num_beams is 4"),
        ({"kind": "beam", "early_stopping": "sometimes"}, "early_stopping is 'sometimes'"),
        ({"kind": "beam", "num_return_sequences": "2"}, "num_return_sequences is '2'"),
        ({"kind": "beam", "length_penalty": 2000}, "length_penalty is 2000: give a number of at least -100"),
        ({"kind": "speculative_beam", "drafter": "suffix", "corpus": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ({"kind": "greedy", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"kind": "greedy", "repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(only(**settings))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"methods": None}, "methods is empty"),
        ({"methods": {"mine": "greedy"}}, "methods.mine is 'greedy'"),
        ({"only": ["gredy"]}, "did you mean greedy?"),
        ({"only": []}, "only is []"),
        ({"prompts": []}, "prompts is an empty list"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"seed": None}, "seed is None"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "gpu"),
        ({"dtype": "float23"}, "float23"),
        ({"wandb": {"mode": "of", "project": "x"}}, "wandb.mode is 'of'"),
        ({"wandb": {"mode": "offline", "projekt": "x"}}, "did you mean project?"),
        ({"debug": {"render_input_text": "maybe"}}, "debug.render_input_text is 'maybe'"),
        ({"prompt_set": {"path": "bundled", "limit": 0}}, "prompt_set.limit is 0"),
        ({"prompt_set": "mine.jsonl"}, "prompt_set is 'mine.jsonl'"),
        ({"prompt_set": {"path": "nowhere.jsonl"}, "prompts": None}, "There is no prompt file 'nowhere.jsonl'"),
        ({"target": {"path": None}}, "target.path is null"),
        ({"batchsize": 2}, "did you mean batch_size?"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(config(**changes))
