"""The suffix automaton against a naive search, corpora of earlier answers, and what is wrong with some of them."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, prompts, tiny_model

from specbeam.decoding.greedy import greedy_generate
from specbeam.decoding.speculative import speculative_generate
from specbeam.drafting import Settings, suffix
from specbeam.drafting.automaton import BORDER, Automaton
from specbeam.drafting.length import Length
from specbeam.drafting.suffix import Row, Suffix
from specbeam.errors import InputError

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def places(text: list[int], part: list[int]) -> list[int]:
    """Behind each occurrence of `part` that something follows."""
    return [end for end in range(len(part), len(text)) if text[end - len(part): end] == part]


def longest_earlier(text: list[int]) -> int:
    return max(n for n in range(len(text)) if n == 0 or places(text, text[-n:]))


def automaton(*texts: list[int]) -> Automaton:
    made = Automaton()
    for text in texts:
        for token in [*text, BORDER]:
            made.append(token)
    return made


def propose(text: list[int], limit: int, corpus: Automaton | None = None, **settings):
    length = Length(Settings("suffix", limit, **settings), object, None, 1)
    return Suffix(1, 100, corpus).propose([text], length.limits([limit]), length)


@given(texts)
def test_after_every_token_the_longest_earlier_occurrence_is_known(text):
    row = Row(None)
    for end in range(1, len(text) + 1):
        row.extend(text[:end])
        length, source, place = row.match()
        assert length == longest_earlier(text[:end])
        assert source == text[:end]
        if length:
            assert place in places(text[:end], text[end - length: end])


@given(st.lists(texts, min_size=1, max_size=3))
def test_a_state_occurs_as_often_as_it_is_counted(corpus):
    made = automaton(*corpus)
    counts = made.counts()
    for state in range(1, len(counts)):
        part = made.text[made.place[state] - made.length[state]: made.place[state]]
        assert counts[state] == sum(made.text[at: at + len(part)] == part for at in range(len(made.text)))


@given(st.lists(texts, min_size=1, max_size=3), texts, st.integers(1, 6), st.integers(1, 4))
def test_a_tree_holds_the_most_frequent_continuations_of_the_match_in_the_corpus(corpus, text, nodes, limit):
    made, row = automaton(*corpus), Row(automaton(*corpus))
    row.extend(text)
    tokens, parents = suffix.grow(made, made.counts(), row.state, limit, nodes, 100)
    match = text[len(text) - row.matched:]

    def often(path: tuple[int, ...]) -> int:
        whole = [*match, *path]
        return sum(made.text[at: at + len(whole)] == whole for at in range(len(made.text)))

    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    every = [path for length in range(1, limit + 1) for path in product(range(4), repeat=length) if often(path)]
    assert len(set(paths)) == len(paths) == min(nodes, len(every))
    assert sorted(map(often, paths)) == sorted(sorted(map(often, every), reverse=True)[: len(paths)])


def test_a_tree_of_the_corpus_is_asked_for_with_a_corpus_only():
    with pytest.raises(InputError, match="makes a tree of what followed in a corpus, but there is none"):
        Settings("suffix", tree_nodes=4).check(None)


@given(st.lists(texts, min_size=1, max_size=3), texts)
def test_a_corpus_is_followed_to_the_longest_match_in_it(corpus, text):
    made = automaton(*corpus)
    state = length = 0
    for end, token in enumerate(text, 1):
        state, length = made.follow(state, length, token)
        known = [n for n in range(end + 1) if n == 0 or places(made.text, text[end - n: end])]
        assert length == max(known)
        if length:
            assert made.place[state] in places(made.text, text[end - length: end])


@given(st.lists(texts, min_size=1, max_size=3), texts, st.integers(1, 12))
def test_the_longer_match_wins_and_twice_its_length_bounds_the_proposal(corpus, text, limit):
    proposal = propose(text, limit, automaton(*corpus))
    match = max(longest_earlier(text), *(n for n in range(len(text) + 1) for one in corpus
                                         if n == 0 or places(one, text[-n:])))
    assert len(proposal.tokens[0]) <= min(limit, 2 * match)
    assert BORDER not in proposal.tokens[0] and proposal.chained


def test_what_repeats_for_long_is_continued_for_long():
    assert propose([1, 2, 3, 4, 5, 6, 9, 3], 8).tokens == [[4, 5]]
    assert propose([1, 2, 3, 4, 5, 6, 9, 2, 3], 8).tokens == [[4, 5, 6, 9]]
    assert propose([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 2).tokens == [[4, 5]]
    assert propose([1, 2, 3], 8).why == ["no match"]
    assert propose([1, 2, 3, 4, 2], 8).why == ["match length"]
    assert propose([1, 2, 1, 2, 1, 2, 1, 2], 4).why == ["length"]


def test_a_budget_of_nodes_that_cuts_a_tree_or_a_chain_is_why_it_ends():
    made = automaton([1, 2, 3, 7], [1, 2, 3, 8], [1, 2, 3, 9])

    def why(text: list[int], limit: int, nodes: int) -> tuple[int, str]:
        length = Length(Settings("suffix", limit, tree_nodes=nodes), object, None, 1)
        proposal = Suffix(1, 100, made, nodes, made.counts()).propose([text], length.limits([limit]), length)
        return len(proposal.tokens[0]), length.why[0]

    assert why([4, 1, 2, 3], 1, 2) == (2, "node budget")
    assert why([4, 1, 2, 3], 1, 3) == (3, "length")
    assert why([5, 6] * 8, 8, 4) == (4, "node budget")
    assert why([5, 6] * 8, 8, 8) == (8, "length")


def test_a_threshold_of_confidence_asks_for_long_matches():
    assert propose([1, 2, 3, 4, 5, 6, 9, 2, 3], 8, confidence_threshold=0.3).tokens == [[4, 5, 6, 9]]
    assert propose([1, 2, 3, 4, 5, 6, 9, 2, 3], 8, confidence_threshold=0.4).tokens == [[]]


def test_an_answer_that_was_given_before_is_accepted_in_few_rounds(tmp_path):
    target, rows = tiny_model("gemma3"), prompts((5, 8))
    options = {"max_new_tokens": 40, "eos_token_id": None}
    drafted = {**options, "drafter": "suffix", "draft_length": 10}
    answers = greedy_generate(target, rows, **options).tokens
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"tokens": [*row.tolist(), *answer], "text": "…"}) + "\n"
                            for row, answer in zip(rows, answers, strict=True)))
    with_corpus = speculative_generate(target, None, rows, corpus=str(path), **drafted)
    without = speculative_generate(target, None, rows, **drafted)
    assert with_corpus.tokens == without.tokens == answers
    assert len(with_corpus.trace[0].rounds) <= 6 < len(without.trace[0].rounds)


class Letters:
    """A tokenizer: every letter is its place in the alphabet."""

    calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        return [99, *map(ord, text)] if add_special_tokens else [ord(letter) - 90 for letter in text]

    def __call__(self, text, **_):
        raise AssertionError("not asked for")


def test_a_corpus_of_text_is_read_once_per_file_and_tokenizer_and_again_when_it_changed(tmp_path):
    path, tokenizer = tmp_path / "corpus.jsonl", Letters()
    path.write_text('{"text": "abcd"}\n\n{"text": "abc"}\n')
    request = type("Request", (), {"rows": [None]})
    for _ in range(2):
        drafter = suffix.make(Settings("suffix", corpus=str(path), tokenizer=tokenizer), None, None, request, 101)
    assert tokenizer.calls == 2
    assert drafter.rows[0].corpus.text == [7, 8, 9, 10, BORDER, 7, 8, 9, BORDER]
    path.write_text('{"text": "zz"}')
    drafter = suffix.make(Settings("suffix", corpus=str(path), tokenizer=tokenizer), None, None, request, 101)
    assert drafter.rows[0].corpus.text == [32, 32, BORDER]


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot be read .No such file"), ('{"tokens": [5]}\n{"tokens"', "line 2 is not JSON"),
    ('{"tokens": [5]}\n\n{"answer": "x"}', "line 3 has neither text nor tokens"), ("[1]", "line 1 has neither"),
    ('{"tokens": [5, 4000]}', "line 1 has tokens that the target does not know"),
    ('{"tokens": [true]}', "line 1 has tokens"), ('{"tokens": [-1]}', "line 1 has tokens"),
    ('{"text": "x"}', "line 1 is text, which needs tokenizer"), ("", "is empty"), ('{"tokens": []}', "is empty"),
    (b"\xff\xfe", "cannot be read")])
def test_a_corpus_that_makes_no_sense_is_one_sentence_with_its_line(tmp_path, content, words):
    path = tmp_path / "corpus.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words) as error:
        speculative_generate(tiny_model("llama"), None, torch.tensor([[5, 6]]), drafter="suffix", corpus=str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_largest_id_of_the_target_is_allowed(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"tokens": [VOCABULARY - 1, 0]}))
    speculative_generate(tiny_model("llama"), None, torch.tensor([[5, 6]]), drafter="suffix", corpus=str(path),
                         max_new_tokens=3)
