"""Target and draft with different tokenizers: greedy gives the target's own tokens, sampling its own distribution."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from law import draws, law, same_law
from tiny import build, left_padded
from transformers import GPT2Config
from vocabularies import ENGLISH, OTHER, byte_level, characters, llama, sentencepiece, trained

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting.cross_vocabulary import ExactMatch, Intersection, rewrite
from specbeam.drafting.draft_model import DraftModel
from specbeam.errors import InputError
from specbeam.spelling import pair

KINDS = {
    "byte-level": byte_level(ENGLISH, 340),
    "byte-level, other text": byte_level([*OTHER, *ENGLISH[:2]], 300, "<eos>", ("<|user|>",)),
    "sentencepiece": sentencepiece([*ENGLISH, *OTHER[:1]], 420),
}
PAIRS = [("byte-level", "byte-level, other text"), ("byte-level", "sentencepiece"), ("sentencepiece", "byte-level"),
         ("byte-level, other text", "sentencepiece")]
HOW = {
    "tli": {"vocabulary": "tli"}, "slem": {"vocabulary": "slem"}, "auto": {"vocabulary": "auto"},
    "tli tree": {"vocabulary": "tli", "branching": [3, 2, 1]}, "tli grown": {"vocabulary": "tli", "tree_nodes": 7},
    "tli adapting": {"vocabulary": "tli", "draft_length": "auto"},
    "slem adapting": {"vocabulary": "slem", "draft_length": "auto"},
    "slem until unsure": {"vocabulary": "slem", "confidence_threshold": 0.4, "draft_length": 8},
    "tli combined": {"vocabulary": "tli", "drafter": "combined"},
    "slem combined": {"vocabulary": "slem", "drafter": "combined"},
}
every_pair = pytest.mark.parametrize(("mine", "its"), PAIRS)


@pytest.fixture(scope="module")
def models():
    """Each tokenizer's model has half learned the same text; not to the last bit the same in every run."""
    torch.set_num_threads(1)
    return {name: trained(tokenizer, [*ENGLISH, OTHER[1]]) for name, tokenizer in KINDS.items()}


def prompts(mine: str) -> list[torch.Tensor]:
    """Ragged; one ends inside a character, one has a special token in the middle."""
    tokenizer = KINDS[mine]
    texts = ["The quick brown", "A naïve café in Z", "Größe, Übermut und Ärger — the fox says", "def add(a"]
    rows = [tokenizer(text).input_ids for text in texts]
    rows.append([*tokenizer("the fox says 🦊").input_ids[:-2]])
    rows.append([*tokenizer("x y").input_ids, tokenizer.eos_token_id, *tokenizer(" 日").input_ids])
    return [torch.tensor(row) for row in rows]


def speculate(models, mine, its, rows, mask=None, **options):
    return speculative_generate(models[mine], models[its], rows, mask, tokenizer=KINDS[mine],
                                draft_tokenizer=KINDS[its], **options)


@pytest.mark.parametrize(("how", "mine", "its"), [
    *((how, *two) for how in ("tli", "slem") for two in PAIRS),
    *((how, *PAIRS[1]) for how in HOW if how not in ("tli", "slem"))])
def test_greedy_tokens_are_those_of_plain_greedy(how, mine, its, models):
    rows = prompts(mine)
    options = {"max_new_tokens": 40, "eos_token_id": []}
    wanted = greedy_generate(models[mine], rows, **options).tokens
    out = speculate(models, mine, its, rows, **options, **HOW[how])
    assert out.tokens == wanted
    if HOW[how].get("draft_length") != "auto":  # which looks at the clock
        assert sum(r.accepted for row in out.trace for r in row.rounds) > 10
    if how in ("tli", "slem"):
        alone = [speculate(models, mine, its, [row], **options, **HOW[how]).tokens[0] for row in rows[2:5]]
        assert alone == wanted[2:5]


@pytest.mark.parametrize("how", ["tli", "slem", "tli tree"])
@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3},
                                     {"suppress_tokens": [32, 33, 40]}], ids=str)
def test_greedy_tokens_stay_the_same_under_processors_and_as_rows_end(how, options, models):
    mine, its = PAIRS[1]
    ids, mask = left_padded(prompts(mine))
    wanted = greedy_generate(models[mine], ids, mask, max_new_tokens=60, **options).tokens
    assert len({len(row) for row in wanted}) > 1
    assert speculate(models, mine, its, ids, mask, max_new_tokens=60, **options, **HOW[how]).tokens == wanted


@pytest.mark.parametrize("how", ["tli", "slem"])
def test_processors_that_forbid_all_shared_tokens_leave_the_target_alone(how, models):
    mine, its = PAIRS[0]
    both = pair(KINDS[mine], KINDS[its])
    own = [id for id in range(len(KINDS[mine])) if id not in both.shared]
    options = {"max_new_tokens": 12, "prefix_allowed_tokens_fn": lambda row, ids: own, "eos_token_id": []}
    wanted = greedy_generate(models[mine], prompts(mine), **options).tokens
    assert speculate(models, mine, its, prompts(mine), **options, **HOW[how]).tokens == wanted
    speculate(models, mine, its, prompts(mine), **options, temperature=1.0, **HOW[how])


@every_pair
def test_the_draft_keeps_what_it_has_read_and_reads_only_the_rest(mine, its, models, monkeypatch):
    new = []

    def spy(self, texts, original=DraftModel._read):
        new.append(max(len(text) - read for text, read in zip(texts, self.read, strict=True)))
        logits = original(self, texts)
        plain = [models[its](torch.tensor([text])).logits[0, -1] for text in texts]
        torch.testing.assert_close(logits[:, 0], torch.stack(plain), atol=2e-3, rtol=1e-3)
        return logits

    monkeypatch.setattr(DraftModel, "_read", spy)
    for how in ("tli", "slem"):
        new.clear()
        speculate(models, mine, its, prompts(mine), max_new_tokens=40, vocabulary=how, eos_token_id=[])
        assert len(new) > 5 and max(new[1:]) < 24


class TestWholeCharacters:
    """SLEM proposes no part of a character, and no replacement for one."""

    both = pair(KINDS["byte-level"], KINDS["sentencepiece"])

    def proposed(self, before: str, drafted: bytes) -> bytes:
        committed = self.both.target.encode(before.encode())
        ids = self.both.draft.piece_together(drafted)
        return self.both.target.spell(rewrite(self.both, committed, ids, [1.0] * len(ids))[0])

    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_a_character_cut_at_the_end_is_left_out(self, cut):
        assert self.proposed("the dog", " says 🐶".encode()[:-cut]) == b" says "
        assert self.proposed("the dog says ", "🐶".encode()[:-cut]) == b""

    def test_a_character_that_the_committed_text_began_is_finished(self):
        fox = KINDS["byte-level"]("🦊", add_special_tokens=False).input_ids
        for count in range(1, len(fox)):
            rest = self.both.draft.piece_together("🦊".encode()[len(self.both.target.spell(fox[:count])) :])
            assert rewrite(self.both, fox[:count], rest, [1.0] * len(rest))[0] == fox[count:]

    def test_no_proposal_of_a_run_ends_inside_a_character(self, models):
        mine, its = PAIRS[2]
        out = speculate(models, mine, its, prompts(mine), max_new_tokens=40, vocabulary="slem", eos_token_id=[],
                        draft_length=3)
        words = pair(KINDS[mine], KINDS[its]).target
        for row, tokens, prompt in zip(out.trace, out.tokens, prompts(mine), strict=True):
            count = 1
            for done in row.rounds:
                text = words.spell([*prompt.tolist(), *tokens[:count], *done.proposed]).decode(
                    "utf-8", "surrogateescape")
                assert "\ufffd" not in text
                # Three tokens, or as many as the answer may still have: the rest of a character was too long.
                if done.drafted < 3 and done.why == "length" and words.spell(done.proposed[-1:]):
                    assert not "\udc80" <= text[-1] <= "\udcff"
                count += done.committed


def test_the_end_of_one_vocabulary_is_proposed_as_the_end_of_the_other():
    both = pair(KINDS["byte-level"], KINDS["sentencepiece"])
    ids = [*both.draft.go_on(b"", b" fox"), KINDS["sentencepiece"].eos_token_id]
    assert rewrite(both, [40], ids, [0.5] * len(ids))[0][-1] == KINDS["byte-level"].eos_token_id


@pytest.mark.parametrize("how", ["tli", "slem"])
def test_answers_end_where_the_target_ends_them(how, models):
    mine, its = PAIRS[2]
    rows = prompts(mine)[:4]
    wanted = greedy_generate(models[mine], rows, max_new_tokens=120)
    got = speculate(models, mine, its, rows, max_new_tokens=120, **HOW[how])
    assert got.hypotheses == wanted.hypotheses
    assert any(row[0].finish_reason == "eos" for row in got.hypotheses)


def test_a_special_token_that_the_draft_alone_has_is_never_proposed(models):
    mine, its = PAIRS[0]
    user = KINDS[its].convert_tokens_to_ids("<|user|>")
    both = pair(KINDS[mine], KINDS[its])
    assert user not in both.shared.values()
    assert rewrite(both, [40], [user], [1.0]) == ([], [])


@pytest.mark.parametrize("how", ["tli", "slem"])
def test_a_draft_whose_context_is_full_goes_on_guessing(how):
    """The answer is in tokens of several bytes; the draft has bytes only, and 64 positions."""
    target = llama(340, initializer_range=0.2)
    draft = build(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=None))
    options = {"max_new_tokens": 40, "prefix_allowed_tokens_fn": lambda row, ids: range(300, 340)}
    rows = [torch.tensor([40, 41, 42])]
    out = speculative_generate(target, draft, rows, vocabulary=how, tokenizer=KINDS["byte-level"],
                               draft_tokenizer=byte_level([], 257), **options)
    assert out.tokens == greedy_generate(target, rows, **options).tokens
    assert len(KINDS["byte-level"].decode(out.tokens[0])) > 64


# Ten tokens of the target's, eight of the draft's; six strings are in both, under other numbers.
TARGET = characters(["a", "b", "c", "ab", "ca", "d", "dd", "e", "bc", "f"],
                    [("a", "b"), ("c", "a"), ("d", "d"), ("b", "c")])
DRAFT = characters(["e", "c", "a", "b", "cab", "ab", "dd", "d", "be"],
                   [("a", "b"), ("d", "d"), ("c", "ab"), ("b", "e")])

def seen_and_expected(vocabulary):
    target, draft = llama(10, initializer_range=0.15), llama(9, seed=1, initializer_range=0.15)
    prompt = torch.tensor([3, 0, 8, 5])
    generate = partial(speculative_generate, target, draft, vocabulary=vocabulary, tokenizer=TARGET,
                       draft_tokenizer=DRAFT)
    expected = law(target, prompt, 3, lambda ids, logits: logits)
    return draws(generate, prompt, 3, 4000, temperature=1.0, top_k=0), expected


@pytest.mark.parametrize("vocabulary", ["tli", "slem"])
def test_sampled_answers_are_distributed_like_the_targets(vocabulary):
    """False alarm: 1e-4 each (law.py). With processors and trees: tests/decoding/test_matrix.py."""
    assert same_law(*seen_and_expected(vocabulary))


def planted(monkeypatch, drafter, change):
    original = drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda self, *args: change(original(self, *args)))


def test_the_sampling_test_would_notice_a_q_that_is_not_normalised_again(monkeypatch):
    planted(monkeypatch, Intersection, lambda proposal: replace(proposal, q=proposal.q * 0.6))
    assert not same_law(*seen_and_expected("tli"))


def test_the_sampling_test_would_notice_a_q_of_the_wrong_ids(monkeypatch):
    planted(monkeypatch, Intersection, lambda proposal: replace(proposal, q=proposal.q.roll(1, -1).clamp(min=1e-3)))
    assert not same_law(*seen_and_expected("tli"))


def test_the_sampling_test_would_notice_text_taken_for_drawn_tokens(monkeypatch):
    """A point of probability one that is handed over as if it had been drawn evenly."""
    def evenly(proposal):
        longest = max(map(len, proposal.tokens))
        return replace(proposal, q=torch.full((len(proposal.tokens), max(longest, 1), 10), 0.1))

    planted(monkeypatch, ExactMatch, evenly)
    assert not same_law(*seen_and_expected("slem"))


def test_auto_takes_the_draft_as_it_is_when_both_read_alike_and_else_by_what_is_shared(models, monkeypatch):
    used = []
    for drafter in (Intersection, ExactMatch):
        monkeypatch.setattr(drafter, "__init__", lambda self, *args, original=drafter.__init__, drafter=drafter:
                            used.append(drafter) or original(self, *args))
    mine, its = PAIRS[0]
    rows = prompts(mine)[:1]
    speculate(models, mine, mine, rows, max_new_tokens=4, vocabulary="auto")
    assert used == []
    speculate(models, mine, its, rows, max_new_tokens=4, vocabulary="auto")
    assert used == [Intersection]
    few = characters(["a", "q", "x", "y"], [])
    speculative_generate(models[mine], llama(4), rows, max_new_tokens=4, vocabulary="auto", tokenizer=KINDS[mine],
                         draft_tokenizer=few)
    assert used == [Intersection, ExactMatch]


def test_bad_input_is_refused_in_one_sentence(models):
    mine, its = PAIRS[0]
    rows = prompts(mine)[:1]
    for options, words in [
        ({"vocabulary": "tli", "draft_tokenizer": None}, "needs a draft model and both tokenizers"),
        ({"vocabulary": "tli", "tokenizer": None}, "needs a draft model and both tokenizers"),
        ({"vocabulary": "other"}, "one of same, tli, slem, auto"),
        ({"vocabulary": "slem", "branching": [2, 1]}, "use vocabulary=tli"),
        ({"vocabulary": "tli", "drafter": "prompt_lookup"}, "does nothing with drafter=prompt_lookup"),
        ({"vocabulary": "tli", "tokenizer": characters(["#"], [])}, "have none: use vocabulary=slem"),
    ]:
        options = {"tokenizer": characters(["a"], []), "draft_tokenizer": characters(["x", "y"], []), **options}
        with pytest.raises(InputError, match=words) as error:
            speculative_generate(models[mine], models[its], rows, max_new_tokens=3, **options)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
