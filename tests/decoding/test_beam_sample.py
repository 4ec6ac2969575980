"""Beam sampling draws from the distribution of `generate(num_beams=…, do_sample=True)`, worked out by brute force."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import exp

import pytest
import torch
import transformers as hf
from law import same_law
from options import ROWS
from planted import mutated
from reference import model
from tiny import EOS, build, prompts

from specbeam import InputError, beam_sample_generate, sample_generate
from specbeam.decoding import beam_sample
from specbeam.decoding.beam import Hypothesis

END, STEPS, WIDTH, DRAWS = 3, 3, 2, 2000
PROMPT = torch.tensor([1, 2, 0])
Answer = tuple[int, ...]


@pytest.fixture(scope="module")
def four() -> hf.PreTrainedModel:
    """A target of four tokens, of which 3 ends an answer."""
    return build(hf.LlamaConfig(
        vocab_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=END,
        pad_token_id=0))


def orders(weights: list[float], count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every way to draw `count` items one after the other without replacement, and its probability."""
    def draw(drawn: tuple[int, ...], p: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(drawn) == count:
            yield drawn, p
            return
        left = sum(w for i, w in enumerate(weights) if i not in drawn)
        for i, w in enumerate(weights):
            if i not in drawn and w > 0:
                yield from draw((*drawn, i), p * w / left)

    yield from draw((), 1.0)


@functools.cache
@torch.no_grad()
def law_of_best(target: hf.PreTrainedModel, temperature: float) -> dict[Answer, float]:
    """Probability that each answer is the best hypothesis. State: running beams and pool, as (answer, score)."""
    @functools.cache
    def log_probs(answer: Answer) -> list[float]:
        logits = target(torch.cat([PROMPT, torch.tensor(answer, dtype=torch.long)])[None]).logits[0, -1].double()
        return (logits.log_softmax(-1) / temperature).tolist()

    law: defaultdict[Answer, float] = defaultdict(float)
    states = {((((), 0.0),), ()): 1.0}
    for length in range(1, STEPS + 1):
        after: defaultdict = defaultdict(float)
        for (running, pool), p in states.items():
            found = [((*answer, token), score + log_p) for answer, score in running
                     for token, log_p in enumerate(log_probs(answer))]
            for drawn, chance in orders([exp(score) for _, score in found], min(2 * WIDTH, len(found))):
                taken = [found[i] for i in drawn]
                ends = [answer[-1] == END or length == STEPS for answer, _ in taken]
                entering = [(a, s / length) for (a, s), end in zip(taken[:WIDTH], ends[:WIDTH], strict=True) if end]
                best = sorted([*pool, *entering], key=lambda one: -one[1])[:WIDTH]
                going = sorted((one for one, end in zip(taken, ends, strict=True) if not end),
                               key=lambda one: -one[1])[:WIDTH]
                if not going or (len(best) == WIDTH and going[0][1] / length <= best[-1][1]):
                    law[best[0][0]] += p * chance
                else:
                    after[tuple(going), tuple(best)] += p * chance
        states = after
    return dict(law)


def options(temperature: float) -> dict:
    return {"num_beams": WIDTH, "max_new_tokens": STEPS, "top_k": 0, "temperature": temperature}


def ours(target, temperature) -> Counter[Answer]:
    seen: Counter[Answer] = Counter()
    for start in range(0, DRAWS, 250):
        out = beam_sample_generate(target, [PROMPT] * 250, seed=list(range(start, start + 250)), **options(temperature))
        seen.update(tuple(answer) for answer in out.tokens)
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_best_hypothesis_has_the_law_of_brute_force_and_so_has_that_of_generate(four, temperature):
    expected = law_of_best(four, temperature)
    assert sum(expected.values()) == pytest.approx(1.0)
    assert same_law(ours(four, temperature), expected)
    theirs: Counter[Answer] = Counter()
    torch.manual_seed(0)
    for _ in range(DRAWS // 250):
        out = four.generate(PROMPT.expand(250, -1), attention_mask=torch.ones(250, 3, dtype=torch.long), do_sample=True,
                            return_dict_in_generate=True, output_scores=True, **options(temperature))
        for ids, origins in zip(out.sequences[:, 3:].tolist(), out.beam_indices.tolist(), strict=True):
            theirs[tuple(ids[: sum(origin >= 0 for origin in origins)])] += 1
    assert same_law(theirs, expected)


def test_control_candidates_that_are_ranked_are_seen(four, monkeypatch):
    monkeypatch.setattr(beam_sample, "gumbels", lambda generators, count, device: torch.zeros(1, count))
    assert not same_law(ours(four, 1.0), law_of_best(four, 1.0))


def test_control_candidates_in_the_order_of_their_scores_are_seen(four, monkeypatch):
    """The first two drawn may end, not the best two of the drawn."""
    monkeypatch.setattr(beam_sample, "beam_sample_generate", mutated(
        beam_sample, "beam_sample_generate", "return total.gather(1, index), index",
        "index = index.gather(1, total.gather(1, index).argsort(1, descending=True)); "
        "return total.gather(1, index), index"))
    seen: Counter[Answer] = Counter()
    for start in range(0, DRAWS, 250):
        seen.update(map(tuple, beam_sample.beam_sample_generate(
            four, [PROMPT] * 250, seed=list(range(start, start + 250)), **options(1.0)).tokens))
    assert not same_law(seen, law_of_best(four, 1.0))


@pytest.mark.parametrize("shaped", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}],
                         ids=str)
def test_a_score_is_the_sum_of_processed_log_probabilities_with_its_penalty(shaped):
    target, ends = model("llama"), list(range(40, 60))
    out = beam_sample_generate(target, ROWS, num_beams=4, num_return_sequences=4, max_new_tokens=8, eos_token_id=ends,
                               length_penalty=0.5, **{"top_k": 0} | shaped)
    for row, found in zip(ROWS, out.hypotheses, strict=True):
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert len({tuple(one.tokens) for one in found}) == 4
        for one in found:
            assert one.score == pytest.approx(score_of(target, row, one, len(ends), 0.5, **shaped), rel=1e-4)
            assert one.finish_reason == ("eos" if one.tokens[-1] in ends else "length")


@torch.no_grad()
def score_of(target, row, one: Hypothesis, ends, penalty, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    keep = {"min_tokens_to_keep": ends + 1}
    shape = hf.LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(repetition_penalty)]
                                   + [hf.TemperatureLogitsWarper(temperature)] * (temperature != 1)
                                   + ([hf.TopKLogitsWarper(top_k, **keep)] if top_k else [])
                                   + ([hf.TopPLogitsWarper(top_p, **keep)] if top_p < 1 else []))
    total = 0.0
    for length, token in enumerate(one.tokens):
        ids = torch.tensor([[*row.tolist(), *one.tokens[:length]]])
        total += float(shape(ids, target(ids).logits[:, -1].log_softmax(-1))[0, token])
    return total / len(one.tokens) ** penalty


def test_a_row_depends_on_its_seed_and_not_on_its_batch():
    shaped = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": [EOS, *range(40, 50)], "num_return_sequences": 3}
    together = beam_sample_generate(model("qwen2"), ROWS, seed=7, **shaped)
    for number, row in enumerate(ROWS):
        alone = beam_sample_generate(model("qwen2"), [row], seed=7 + number, **shaped)
        assert [(one.tokens, one.beams) for one in alone.hypotheses[0]] == [
            (one.tokens, one.beams) for one in together.hypotheses[number]]
    assert beam_sample_generate(model("qwen2"), ROWS, seed=8, **shaped).tokens != together.tokens


def test_one_beam_is_plain_sampling():
    one = beam_sample_generate(model("llama"), ROWS, num_beams=1, max_new_tokens=8, seed=3)
    assert one.tokens == sample_generate(model("llama"), ROWS, max_new_tokens=8, seed=3).tokens


def test_the_search_tree_holds_what_was_drawn():
    out = beam_sample_generate(model("llama"), prompts((5,)), num_beams=3, max_new_tokens=6, trace=True)
    tree, best = out.search[0], out.hypotheses[0][0]
    assert [tree.steps[step].candidates[number].token for step, number in tree.path()] == best.tokens


@pytest.mark.parametrize("wrong, sentence", [
    ({"num_beams": 0}, "num_beams is 0"), ({"num_return_sequences": 9}, "num_return_sequences is 9 and num_beams 4"),
    ({"temperature": 0.0}, "temperature"), ({"streamer": "any"}, "streamer was given to beam search"),
], ids=str)
def test_what_makes_no_sense_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        beam_sample_generate(model("llama"), ROWS, max_new_tokens=4, **wrong)
    assert "\n" not in str(error.value)
