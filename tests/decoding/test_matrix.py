"""Every drafter × every acceptance rule that fits it × every kind of processor × one row and a ragged batch.

Greedy: the tokens of plain greedy decoding, in fp32. Sampled: three tokens behind the first, which are proposals,
corrections and a bonus, against their exact law (law.py: brute force, chi-square and total variation with stated false
alarms); two prompts of different lengths share the batch, each with its own law. One row: the same seed gives it the
tokens that it has in the batch, so that the law of the batch is its law too.

`make test` runs a diagonal, `make test-all` every cell.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from law import VOCABULARY, law, part, same_law, small_target
from planted import mutated
from tiny import tiny_draft
from transformers.generation import logits_process as hf
from vocabularies import characters, llama

from specbeam import acceptance, greedy_generate, speculative_generate
from specbeam.decoding import speculative
from specbeam.drafting import draft_model, length, token_recycling
from specbeam.drafting.draft_model import DraftModel
from specbeam.sampling import draw, process

# Ten tokens of the target's, nine of another draft's; some strings are in both, under other numbers.
MINE = characters(["a", "b", "c", "ab", "ca", "d", "dd", "e", "bc", "f"],
                  [("a", "b"), ("c", "a"), ("d", "d"), ("b", "c")])
ITS = characters(["e", "c", "a", "b", "cab", "ab", "dd", "d", "be"],
                 [("a", "b"), ("d", "d"), ("c", "ab"), ("b", "e")])

DRAFTERS: dict[str, dict[str, Any]] = {
    "chain": {"draft_length": 3},
    "chain, threshold": {"draft_length": 3, "confidence_threshold": 0.25},
    "fixed tree": {"branching": [3, 2, 1]},
    "grown tree": {"draft_length": 3, "tree_nodes": 8},
    "prompt_lookup": {"drafter": "prompt_lookup"},
    "prompt_lookup, branches": {"drafter": "prompt_lookup", "branches": 3},
    "suffix": {"drafter": "suffix"},
    "suffix, corpus": {"drafter": "suffix", "corpus": "corpus"},
    "suffix, corpus tree": {"drafter": "suffix", "corpus": "corpus", "tree_nodes": 7},
    "token_recycling": {"drafter": "token_recycling"},
    "early_exit": {"drafter": "early_exit", "exit_layer": 2},
    "early_exit, tree": {"drafter": "early_exit", "exit_layer": 2, "branching": [2, 2, 1]},
    "combined": {"drafter": "combined", "min_match": 2, "draft": None},
    "combined, draft": {"drafter": "combined", "min_match": 2},
    "combined, tree": {"drafter": "combined", "min_match": 2, "branching": [2, 2, 1]},
    "tli": {"vocabulary": "tli"},
    "tli, tree": {"vocabulary": "tli", "branching": [3, 2, 1]},
    "slem": {"vocabulary": "slem"},
    "auto": {"draft_length": "auto"},
    "auto, suffix": {"drafter": "suffix", "draft_length": "auto"},
    "auto, early_exit": {"drafter": "early_exit", "exit_layer": 2, "draft_length": "auto"},
    "auto, combined": {"drafter": "combined", "min_match": 2, "draft_length": "auto"},
}
# Under these, auto stops early at times, and the same rows do in any batch.
COSTS = {"prices": {"draft": 0.12, "token": 0.12, "rate": 1.0}, "tried": [20] * 10,
         "kept": [2, 4, 6, 8, 10, 12, 14, 16, 18, 19], "usual": 0.5}
TREES = {"fixed tree", "grown tree", "prompt_lookup, branches", "suffix, corpus tree", "token_recycling",
         "early_exit, tree", "combined", "combined, tree", "tli, tree"}
RULES = [(name, "rejection") for name in DRAFTERS] + [(name, "block") for name in DRAFTERS if name not in TREES]
KINDS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.8, "top_k": 0}, [hf.TemperatureLogitsWarper(0.8)]),
    "top-k": ({"temperature": 1.3, "top_k": 4}, [hf.TemperatureLogitsWarper(1.3), hf.TopKLogitsWarper(4)]),
    "top-p": ({"temperature": 1.2, "top_k": 0, "top_p": 0.8},
              [hf.TemperatureLogitsWarper(1.2), hf.TopPLogitsWarper(0.8)]),
    "repetition penalty": ({"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.7},
                           [hf.RepetitionPenaltyLogitsProcessor(1.7)]),
    "no repeated n-gram": ({"temperature": 1.0, "top_k": 0, "no_repeat_ngram_size": 2},
                           [hf.NoRepeatNGramLogitsProcessor(2)]),
}
GREEDY: dict[str, dict[str, Any]] = {
    "nothing": {}, "repetition penalty": {"repetition_penalty": 1.3}, "no repeated n-gram": {"no_repeat_ngram_size": 3}}
PROMPTS = [[3, 4, 5, 1, 3, 4], [7, 2, 7, 2, 9, 0, 4, 4, 1, 7, 2]]
SAMPLED = [(name, rule, kind) for name, rule in RULES for kind in KINDS]


def fast(cells: list[tuple], every: int) -> list[Any]:
    """One cell in so many is for `make test`."""
    return [pytest.param(*cell, marks=() if (i + i // every) % every == 0 else pytest.mark.heavy, id="-".join(cell))
            for i, cell in enumerate(cells)]


@functools.cache
def target() -> Any:
    return small_target()


@functools.cache
def corpus(folder: str) -> str:
    """Earlier answers of the target."""
    from specbeam import sample_generate

    said = sample_generate(target(), [torch.tensor(p) for p in PROMPTS] * 6, max_new_tokens=12, temperature=0.7).tokens
    with open(f"{folder}/corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"tokens": tokens}) + "\n" for tokens in said)
    return file.name


@functools.cache
def other_draft() -> Any:
    return llama(9, seed=1, initializer_range=0.15)


@pytest.fixture
def speculate(tmp_path_factory: pytest.TempPathFactory):
    """The target, speculated on by the named drafter."""
    def run(name: str, rows: list[torch.Tensor], **options: Any) -> Any:
        own = dict(DRAFTERS[name])
        if "corpus" in own:
            own["corpus"] = corpus(str(tmp_path_factory.getbasetemp()))
        if own.get("draft_length") == "auto":
            costs = tmp_path_factory.getbasetemp() / "costs.json"
            costs.write_text(json.dumps(COSTS))
            own["costs"] = str(costs)
        if "vocabulary" in own:
            own |= {"draft": other_draft(), "tokenizer": MINE, "draft_tokenizer": ITS}
        alone = own.get("drafter") in ("prompt_lookup", "suffix", "token_recycling", "early_exit")
        draft = own.pop("draft", None if alone else tiny_draft(target(), 0.2))
        return speculative_generate(target(), draft, rows, **own, **options)

    return run


@functools.cache
def exact(prompt: int, kind: str) -> dict[tuple[int, ...], float]:
    def processed(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for one in KINDS[kind][1]:
            logits = one(ids, logits)
        return logits

    return part(law(target(), torch.tensor(PROMPTS[prompt]), 4, processed), 1)


def drawn(run: Any, name: str, kind: str, count: int, together: int = 125, **options: Any) -> list[Counter]:
    """What follows the first token, of each prompt's `count` answers, so many of them in one batch."""
    seen: list[Counter] = [Counter() for _ in PROMPTS]
    for start in range(0, count, together):
        rows, first = [torch.tensor(prompt) for prompt in PROMPTS] * together, 2 * together * start
        out = run(name, rows, max_new_tokens=4, seed=list(range(first, first + len(rows))), **KINDS[kind][0], **options)
        for number, tokens in enumerate(out.tokens):
            seen[number % 2][tuple(tokens[1:4])] += 1
    return seen


def as_the_target(run: Any, name: str, kind: str, count: int, **options: Any) -> bool:
    return all(same_law(seen, exact(prompt, kind))
               for prompt, seen in enumerate(drawn(run, name, kind, count, **options)))


@pytest.mark.parametrize("name, rule, kind", fast(SAMPLED, 5))
def test_sampled_answers_are_distributed_like_the_targets(name, rule, kind, speculate):
    """False alarms: 2e-4 a cell for each of the two checks."""
    assert as_the_target(speculate, name, kind, 750, acceptance=rule)


@pytest.fixture
def unfrozen(monkeypatch: pytest.MonkeyPatch):
    """Auto without `costs`: it decides for the batch as a whole, and by what earlier calls have taught it. Prices are
    given, that a run can be repeated. `drafted`: how often it proposed how much."""
    learned: tuple[dict, dict] = ({}, {})
    draft = tiny_draft(target(), 0.2)
    monkeypatch.setattr(length, "_of_pair", lambda *_: learned)
    monkeypatch.setattr(length.Costs, "knows", lambda *_: True)
    monkeypatch.setattr(length.Costs, "few", False)
    monkeypatch.setattr(length.Costs, "prices", lambda *_: length.Prices(0.12, 0.12, 1.0))
    monkeypatch.setattr(length.Costs, "usual", lambda *_: 0.5)  # a round with proposals pays

    def run(name: str, rows: list[torch.Tensor], **options: Any) -> Any:
        out = speculative_generate(target(), draft, rows, **DRAFTERS[name], **options)
        run.drafted.update(one.drafted for row in out.trace for one in row.rounds)  # type: ignore[attr-defined]
        return out

    run.drafted = Counter()  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("kind", ["temperature", "top-k"])
@pytest.mark.parametrize("name", ["auto", "auto, combined"])
def test_auto_that_goes_on_learning_samples_from_the_target(name, kind, unfrozen):
    assert as_the_target(unfrozen, name, kind, 750, together=5)
    assert all(unfrozen.drafted[n] > 50 for n in range(3)), unfrozen.drafted


@pytest.mark.parametrize("name", ["auto", "auto, combined"])
def test_control_a_token_that_auto_drops_for_what_it_is_is_caught(name, unfrozen, monkeypatch):
    dropped(monkeypatch)
    assert not as_the_target(unfrozen, name, "temperature", 1500, together=5)


@pytest.mark.parametrize("name, rule, kind", fast(SAMPLED, 5))
def test_a_row_alone_is_given_what_the_ragged_batch_gives_it(name, rule, kind, speculate):
    options = {"max_new_tokens": 12, "acceptance": rule, **KINDS[kind][0]}
    rows = [torch.tensor(PROMPTS[i % 2][: 4 + i]) for i in range(6)]
    together = speculate(name, rows, seed=list(range(6)), **options).tokens
    assert [speculate(name, [row], seed=[i], **options).tokens[0] for i, row in enumerate(rows)] == together


@pytest.mark.parametrize("name, kind", fast([(name, kind) for name in DRAFTERS for kind in GREEDY], 3))
def test_greedy_tokens_are_those_of_plain_greedy_alone_and_in_a_ragged_batch(name, kind, speculate):
    rows = [torch.tensor((PROMPTS[i % 2] * 2)[: 5 + 3 * i]) for i in range(4)]
    options = {"max_new_tokens": 36, "eos_token_id": [8], **GREEDY[kind]}
    token_recycling.forget(target())
    wanted = greedy_generate(target(), rows, **options).tokens
    out = speculate(name, rows, **options)
    assert out.tokens == wanted
    assert sum(one.accepted for row in out.trace for one in row.rounds) > 0
    assert [speculate(name, [row], **options).tokens[0] for row in rows] == wanted


# Planted faults: the check above sees each of them.

def lying(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DraftModel.propose

    def lies(self, sequences, limits, length):
        proposal = honest(self, sequences, limits, length)
        proposal.q.pow_(2).div_(proposal.q.sum(-1, keepdim=True))
        return proposal

    monkeypatch.setattr(DraftModel, "propose", lies)


def without_normalising(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "sample_tree", mutated(
        acceptance, "sample_tree", "left = left / left.sum().clamp(min=1e-300)", "pass"))


def with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated sibling alone does no harm, since the rule passes it over; one that is tried again does."""
    monkeypatch.setattr(acceptance, "sample_tree", mutated(
        acceptance, "sample_tree", "if float(mine[x]) > 0 else 0.0", "if float(mine[x]) > 0 else 1.0"))

    def children(self, scores, count, wanted):
        q = scores.softmax(-1)
        uniform = torch.rand(*q.shape[:2], count, generator=self.rows[0].generator, dtype=torch.float64)
        columns = [draw(q.flatten(0, 1), uniform[..., i].flatten()).view(q.shape[:2]) for i in range(count)]
        return torch.stack(columns, -1), q

    monkeypatch.setattr(DraftModel, "_children", children)


def wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "process", lambda logits, processors, path: process(
        logits, processors, lambda row, node: path(row, max(node - 1, 0))))


def bonus_from_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = acceptance.rejection_sample

    def wrong(proposed, p, q, lengths, uniform):
        accepted, following = honest(proposed, p, q, lengths, uniform)
        if q is None:
            return accepted, following
        place = (lengths - 1).clamp(min=0)
        bonus = draw(q[torch.arange(len(q)), place], uniform.gather(1, lengths[:, None]).squeeze(1))
        return accepted, torch.where((accepted == lengths) & (lengths > 0), bonus, following)

    monkeypatch.setattr(acceptance, "rejection_sample", wrong)


def dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DraftModel.propose

    def choosy(self, sequences, limits, length):
        proposal = honest(self, sequences, limits, length)
        for row, ids in enumerate(proposal.tokens):
            if ids and ids[0] < 5:
                del ids[:], proposal.parents[row][:], self.numbers[row][:]
        return proposal

    monkeypatch.setattr(DraftModel, "propose", choosy)


@pytest.mark.parametrize("plant, name, kind", [
    (lying, "chain", "temperature"), (lying, "fixed tree", "top-p"), (without_normalising, "tli, tree", "temperature"),
    (with_replacement, "fixed tree", "top-k"), (wrong_path, "chain", "no repeated n-gram"),
    (wrong_path, "fixed tree", "no repeated n-gram"), (bonus_from_the_draft, "chain", "temperature"),
    (dropped, "chain", "temperature"),
])
def test_control_a_planted_fault_is_caught(plant, name, kind, speculate, monkeypatch):
    plant(monkeypatch)
    assert not as_the_target(speculate, name, kind, 1500)


def test_control_the_drafts_are_neither_hopeless_nor_perfect(speculate):
    for name in DRAFTERS:
        out = speculate(name, [torch.tensor(prompt) for prompt in PROMPTS] * 20, max_new_tokens=5, temperature=0.8,
                        top_k=0)
        rounds = [one for row in out.trace for one in row.rounds]
        accepted, proposed = sum(one.accepted for one in rounds), sum(one.drafted > 0 for one in rounds)
        assert accepted > 0, name
        assert any(one.accepted < one.drafted for one in rounds), name
        assert proposed > 10, name


def test_every_drafter_is_in_the_matrix():
    from specbeam.drafting import ACCEPTANCE
    from specbeam.drafting import DRAFTERS as KNOWN

    assert {own.get("drafter", "draft_model") for own in DRAFTERS.values()} == set(KNOWN)
    assert {rule for _, rule in RULES} == set(ACCEPTANCE) - {"typical"}, "typical is lossy, and says so"
    assert VOCABULARY == 10 and draft_model.DraftModel is DraftModel
