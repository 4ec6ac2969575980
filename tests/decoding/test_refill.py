"""Batches that keep full: a row that ends makes room for the next prompt, and nobody's tokens know of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refusal
from tiny import prompts, tiny_draft, tiny_model

import specbeam
from specbeam.decoding import METHODS
from specbeam.drafting import Settings
from specbeam.drafting.length import Learned, _of_pair
from specbeam.engine.support import adapt
from specbeam.engine.tree import TokenTree, chain, read_prompts

LENGTHS = (5, 19, 3, 11, 7, 26)
ROOM = 24
FAMILIES = ("llama", "gpt2", "mistral-window", "gemma3")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", {}),
    "sample": ("sample", {"temperature": 1.0, "top_k": 0}),
    "speculative": ("speculative", {"draft_length": 3}),
    "speculative, drawn": ("speculative", {"draft_length": 3, "temperature": 1.0}),
    "trees": ("speculative", {"branching": [2, 1, 1]}),
    "prompt lookup": ("speculative", {"drafter": "prompt_lookup", "draft_length": 3}),
    "suffix": ("speculative", {"drafter": "suffix", "draft_length": 3}),
    "token recycling": ("speculative", {"drafter": "token_recycling", "draft_length": 3}),
    "combined": ("speculative", {"drafter": "combined", "draft_length": 3}),
    "auto": ("speculative", {"draft_length": "auto"}),
}


def generate(kind: str, target: Any, rows: list[torch.Tensor], **options: Any) -> specbeam.GenerationOutput:
    pair = (target, tiny_draft(target)) if METHODS[kind].speculates else (target,)
    return METHODS[kind].load()(*pair, rows, max_new_tokens=ROOM, **options)


def ended_apart(target: Any, rows: list[torch.Tensor]) -> list[int]:
    """A token that ends the answers at different lengths: the one that does so for most of them."""
    answers = generate("greedy", target, rows, eos_token_id=-1 % target.config.get_text_config().vocab_size).tokens
    return [max({t for answer in answers for t in answer[:12]}, key=lambda t: sum(t in answer for answer in answers))]


@pytest.mark.parametrize("name", KINDS)
def test_every_row_answers_as_if_it_were_alone(name: str) -> None:
    kind, options = KINDS[name]
    target, rows = tiny_model("llama"), prompts(LENGTHS)
    options = {**options, "eos_token_id": ended_apart(target, rows)}
    alone = [generate(kind, target, [row], **options, seed=place).tokens[0] for place, row in enumerate(rows)]
    for size in (2, 5):
        together = generate(kind, target, rows, **options, seed=0, batch_size=size)
        assert together.tokens == alone
        assert all(len(trace.sources) == len(row) for trace, row in zip(together.trace, alone, strict=True))


@pytest.mark.parametrize("drafter", ["draft_model", "combined", "prompt_lookup", "token_recycling"])
def test_a_pause_from_an_earlier_call_may_end_in_the_middle_of_answers(drafter: str) -> None:
    target, rows = tiny_model("llama"), prompts(LENGTHS)
    draft = tiny_draft(target) if drafter in ("draft_model", "combined") else None
    learned, _ = _of_pair(Settings(drafter, "auto"), target, draft)
    learned[0] = Learned(left=5)
    out = specbeam.speculative_generate(target, draft, rows, drafter=drafter, draft_length="auto", max_new_tokens=ROOM,
                                        batch_size=2)
    assert out.tokens == specbeam.greedy_generate(target, rows, max_new_tokens=ROOM).tokens
    rounds = [one for trace in out.trace for one in trace.rounds]
    assert rounds[0].why != "length" and any(one.drafted for one in rounds)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str) -> None:
    target, rows = tiny_model(family), prompts(LENGTHS)
    stop = ended_apart(target, rows)
    for kind in ("greedy", "speculative"):
        alone = [generate(kind, target, [row], eos_token_id=stop).tokens[0] for row in rows]
        assert len({len(answer) for answer in alone}) > 1  # else nothing is replaced at different times
        assert generate(kind, target, rows, eos_token_id=stop, batch_size=3).tokens == alone


def test_no_more_than_batch_size_rows_ever_run_and_the_batch_keeps_full(monkeypatch: pytest.MonkeyPatch) -> None:
    target, rows = tiny_model("llama"), prompts(LENGTHS)
    stop = ended_apart(target, rows)
    widths: list[int] = []
    extend = TokenTree.extend

    def watched(self: TokenTree, tips: Any, block: Any, last_only: bool = False) -> Any:
        if block.tokens.shape[1] == 1:
            widths.append(len(block.tokens))
        return extend(self, tips, block, last_only)

    monkeypatch.setattr(TokenTree, "extend", watched)
    answers = generate("greedy", target, rows, eos_token_id=stop, batch_size=3).tokens
    steps = sum(len(answer) - 1 for answer in answers)
    assert sum(widths) == steps and max(widths) == 3
    least = max(-(-steps // 3), max(map(len, answers)) - 1)
    assert len(widths) <= least + max(map(len, answers))  # only the last answers run in a batch that is not full


def test_time_is_the_batch_s_and_counted_once() -> None:
    target, rows = tiny_model("llama"), prompts(LENGTHS)
    out = generate("greedy", target, rows, eos_token_id=ended_apart(target, rows), batch_size=3)
    assert len({(trace.prefill_seconds, trace.decode_seconds) for trace in out.trace}) == 1
    assert all(trace.first_tokens == 1 and trace.prefill_seconds > 0 for trace in out.trace)
    assert all(trace.token_rounds == tuple(range(len(trace.sources))) for trace in out.trace)


def test_a_joined_row_that_could_see_its_neighbours_would_be_noticed() -> None:
    """Negative control: the joined tips are given one slot too many."""
    target, rows = tiny_model("llama"), prompts((6, 9))
    adapter = adapt(target)

    def logits(fault: bool) -> torch.Tensor:
        with torch.inference_mode():
            tree, tips, _ = read_prompts(adapter, [rows[0].tolist()], 32)
            more, its, _ = read_prompts(adapter, [rows[1].tolist()], 64)
            both = tree.join(tips, more, its)
            if fault:
                both.visible[0, 0, 8] = True  # empty in this row, written in the other
                both = replace(both, contiguous=False)  # else nobody looks: a depth says it all
            return tree.extend(both, chain([[7], [7]], tree.device))[0][:, 0]

    with torch.inference_mode():
        wanted = [target(torch.tensor([[*row.tolist(), 7]])).logits[0, -1] for row in rows]
    good, bad = logits(False), logits(True)
    for place in range(2):
        assert torch.allclose(good[place], wanted[place], atol=1e-4)
    assert not torch.allclose(bad[0], wanted[0], atol=1e-3)


def test_bad_sizes_are_one_sentence() -> None:
    target, rows = tiny_model("llama"), prompts((4, 5))
    assert "batch_size is 0" in refusal(generate, "greedy", target, rows, batch_size=0)
    assert "beam search runs all" in refusal(generate, "beam", target, rows, num_beams=2, batch_size=1)


@pytest.mark.parametrize("method", ["greedy", "beam", "transformers_assisted"])
def test_generate_many_answers_in_order_whatever_the_method(method: str) -> None:
    target, rows = tiny_model("llama"), prompts(LENGTHS)
    draft = tiny_draft(target)
    out = specbeam.generate_many(target, rows, method=method, draft=draft, batch_size=2, max_new_tokens=8)
    pair = (target, draft) if METHODS[method].speculates else (target,)
    alone = [METHODS[method].load()(*pair, row[None], torch.ones_like(row[None]), max_new_tokens=8).tokens[0]
             for row in rows]
    assert out.tokens == alone
    assert len(out.trace) == len(rows)


def test_generate_many_reads_texts_with_a_tokenizer() -> None:
    target, tokenizer = specbeam.load_model("bundled", runner="eager")
    texts = ["Add 2 and 3.", "Name a colour.", "Translate English to German: The dog sleeps."]
    out = specbeam.generate_many(target, texts, tokenizer=tokenizer, batch_size=2, max_new_tokens=6)
    for text, tokens in zip(texts, out.tokens, strict=True):
        batch = specbeam.render_prompt(tokenizer, [text])
        assert specbeam.greedy_generate(target, batch.input_ids, batch.attention_mask, max_new_tokens=6
                                        ).tokens == [tokens]
    assert "no tokenizer" in refusal(specbeam.generate_many, target, texts)
    assert "method is 'gready'" in refusal(specbeam.generate_many, target, texts, method="gready")
