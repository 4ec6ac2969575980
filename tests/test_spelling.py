"""Tokens as bytes: the same text in two tokenizers' tokens."""

from __future__ import annotations

import copy

import pytest
from vocabularies import ENGLISH, OTHER, byte_level, characters, sentencepiece

from specbeam.spelling import Spelling, Text, pair

KINDS = {
    "byte-level": byte_level(ENGLISH, 340),
    "byte-level, other text": byte_level(OTHER, 300, "<eos>", ("<|user|>",)),
    "sentencepiece": sentencepiece(ENGLISH, 420),
    "sentencepiece, legacy": sentencepiece(OTHER, 400, legacy=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_pair = pytest.mark.parametrize(("mine", "its"), [(a, b) for a in KINDS for b in KINDS if a != b])
TEXTS = [*ENGLISH, *OTHER, "two  spaces", "no end <eos> of <|end|> it </s>", "\n\n", "x"]


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text_that_they_were_made_from(kind, text):
    words = Spelling(KINDS[kind])
    wanted = text.encode()
    assert words.spell(words.encode(wanted)).removeprefix(b" " * words.prefix) == wanted


@every_kind
def test_special_tokens_spell_nothing(kind):
    words = Spelling(KINDS[kind])
    assert set(KINDS[kind].all_special_ids) == set(words.special)
    assert not set(words.special) & set(words.bytes_of)


@every_kind
def test_text_goes_on_in_exactly_its_own_bytes_wherever_it_is_cut_even_inside_a_character(kind):
    words = Spelling(KINDS[kind])
    for data in (text.encode() for text in (ENGLISH[1], OTHER[1], TEXTS[-1])):
        for cut in range(len(data)):
            assert words.spell(words.go_on(data[max(0, cut - 12) : cut], data[cut:])) == data[cut:]


@every_kind
@pytest.mark.parametrize("text", [*ENGLISH[1:3], *OTHER[:2]])
def test_text_behind_whole_tokens_goes_on_as_the_tokenizer_itself_would_write_it(kind, text):
    words = Spelling(KINDS[kind])
    ids = words.encode(text.encode())
    for count in range(1, len(ids)):
        assert words.go_on(words.spell(ids[:count]).removeprefix(b" " * words.prefix), words.spell(ids[count:])
                           ) == ids[count:]


@every_kind
def test_bytes_that_are_no_text_are_spelled_too(kind):
    words = Spelling(KINDS[kind])
    broken = b"a\xff\xf0\x9f b"
    assert words.spell(words.go_on(b"x", broken)) == broken


def test_of_two_tokens_for_one_byte_the_one_that_is_no_fallback_is_written():
    words = Spelling(KINDS["sentencepiece"])
    tokens = KINDS["sentencepiece"].get_vocab()
    assert words.bytes_of[tokens["<0x61>"]] == words.bytes_of[tokens["a"]] == b"a"
    assert words.id_of[b"a"] == tokens["a"]


@every_pair
def test_shared_tokens_stand_for_the_same_bytes(mine, its):
    both = pair(KINDS[mine], KINDS[its])
    plain = {a: b for a, b in both.shared.items() if a not in both.target.special}
    assert len(plain) > 200 and len(set(plain.values())) == len(plain)
    assert all(both.target.bytes_of[a] == both.draft.bytes_of[b] for a, b in plain.items())


@every_pair
def test_of_special_tokens_only_the_same_ones_and_the_end_are_shared(mine, its):
    both = pair(KINDS[mine], KINDS[its])
    special = {(both.target.special[a], both.draft.special[b]) for a, b in both.shared.items()
               if a in both.target.special}
    assert special == ({(name, name) for name in ("<unk>", "<s>", "</s>")} if {*KINDS} & {mine, its} == {
        "sentencepiece", "sentencepiece, legacy"} else {(KINDS[mine].eos_token, KINDS[its].eos_token)})


@every_pair
def test_a_growing_text_is_always_spelled_whole_in_the_other_tokens(mine, its):
    """Token by token, characters cut between tokens included; the prompt begins with a BOS where there is one."""
    both = pair(KINDS[mine], KINDS[its])
    said = " ".join([*ENGLISH, *OTHER] * 2)
    tokens = KINDS[mine](said).input_ids
    text, before = Text(both, tokens[0]), both.draft.begin
    for count in range(3, len(tokens) + 1):
        ids, same = text.write(tokens[:count])
        assert ids[: len(both.draft.begin)] == both.draft.begin
        wanted = both.target.spell(tokens[:count]).removeprefix(b" " * both.target.prefix)
        assert both.draft.spell(ids).removeprefix(b" " * both.draft.prefix) == wanted
        assert ids[:same] == before[:same] and ids[: same + 1] != before[: same + 1]
        before = ids
    assert text.at > len(tokens) - 100  # old text is left alone
    assert len(before) < 1.05 * len(KINDS[its](said).input_ids)  # and written about as well as all at once


@every_pair
def test_a_special_token_that_only_the_target_has_is_read_as_its_name(mine, its):
    both = pair(KINDS[mine], KINDS[its])
    plain = KINDS[mine]("a fox", add_special_tokens=False).input_ids
    for id, name in both.target.special.items():
        if id not in both.shared and id != KINDS[mine].bos_token_id:
            ids, _ = Text(both, plain[0]).write([*plain, id, *both.target.go_on(b"", b" a dog")])
            assert both.draft.spell(ids).strip() == f"a fox{name} a dog".encode()
            return
    assert both.target.special.keys() - both.shared.keys() <= {KINDS[mine].bos_token_id}


def test_a_text_of_nothing_but_a_bos_still_gives_the_draft_something_to_read():
    both = pair(KINDS["sentencepiece"], KINDS["byte-level"])
    assert len(Text(both, 1).write([1])[0]) == 1


def test_a_tokenizer_that_lacks_a_byte_leaves_it_out():
    words = Spelling(characters(["a", "b", "ab"], [("a", "b")]))
    assert words.spell(words.go_on(b"a", b"b?ab")) == b"bab"


@every_kind
def test_added_tokens_stand_for_their_text(kind):
    tokenizer = copy.deepcopy(KINDS[kind])
    tokenizer.add_tokens(["    ", "\n\n\n"])
    words = Spelling(tokenizer)
    assert [words.bytes_of[tokenizer.convert_tokens_to_ids(token)] for token in ("    ", "\n\n\n")] == [
        b"    ", b"\n\n\n"]
