"""Texts against references: the libraries' own published examples, and numbers by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from specbeam.metrics.text import bleu, chrf, exact_match, final_number, rouge

# sacrebleu's own README example: two reference streams, BLEU = 48.53.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
STREAMS = [["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
           ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]]
REFERENCES = [list(own) for own in zip(*STREAMS, strict=True)]


def test_sacrebleus_own_example_gives_its_own_score_and_a_signature():
    result = bleu(SYSTEM, REFERENCES)
    assert result is not None and result.value == pytest.approx(48.53, abs=0.005)
    assert result.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result.count == 3


def test_outputs_without_references_do_not_count():
    with_extra = bleu([*SYSTEM, "Anything at all."], [*REFERENCES, []])
    assert with_extra is not None and with_extra.value == pytest.approx(48.53, abs=0.005)
    assert with_extra.count == 3
    assert bleu(["Anything."], [[]]) is None


def test_the_number_of_references_may_vary():
    varied = bleu(SYSTEM, [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2]])
    assert varied is not None and 0 < varied.value <= 100


def test_a_wrong_answer_scores_lower_and_the_right_one_a_hundred():
    perfect = bleu(STREAMS[0], REFERENCES)
    shuffled = bleu([STREAMS[0][1], STREAMS[0][2], STREAMS[0][0]], REFERENCES)
    assert perfect is not None and perfect.value == pytest.approx(100)
    assert shuffled is not None and shuffled.value < 10


def test_chrf_is_sacrebleus_and_takes_several_references():
    result = chrf(SYSTEM, REFERENCES)
    assert result is not None and result.value == pytest.approx(59.73, abs=0.005), "sacrebleu's README"
    assert result.signature.startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert result.low < result.value < result.high
    assert chrf(["Anything."], [[]]) is None


def test_rouge_is_that_of_lins_own_example():
    pytest.importorskip("rouge_score", reason="pip install 'specbeam[rouge]'")
    # Lin 2004, section 3.1: S1 police killed the gunman; S2 3/4, S3 2/4
    texts = "police kill the gunman", "the gunman kill police"
    found = [rouge([text], [["police killed the gunman"]]) for text in texts]
    assert [one["rougeL"].value for one in found] == pytest.approx([75, 50])
    assert [one["rouge2"].value for one in found] == pytest.approx([100 / 3, 100 / 3])
    assert rouge(["a"], [[]]) == {}


def test_rouge_takes_the_best_reference_and_the_mean_of_answers():
    pytest.importorskip("rouge_score", reason="pip install 'specbeam[rouge]'")
    found = rouge(["one two", "three"], [["two", "one two"], ["four"]])
    assert found["rouge1"].value == pytest.approx(50) and found["rouge1"].count == 2


@pytest.mark.parametrize(("text", "number"), [
    ("He pays $1,200.50 in all.", "1200.50"), ("6 × 7 = 42 #### 42", "42"), ("#### -3", "-3"), ("It is −5.", "-5"),
    ("10-20", "20"), ("3.", "3"), ("0.5", ".5"), ("#### 18\n\nQuestion: 7", "18")], ids=str)
def test_the_final_number_is_read_as_gsm8k_writes_it(text, number):
    assert final_number(text) == Decimal(number)


def test_exact_match_compares_numbers_and_not_their_spelling():
    references = [["9 * 2 = $<<9*2=18>>18\n#### 18"], ["1,000"], ["no number, 5 words"], ["7"]]
    found = exact_match(["So she makes $18.00 a day.", "It is 1000", "5", "8"], references)
    assert found.value == pytest.approx(200 / 3) and found.count == 3
    assert final_number("none") is None and exact_match(["5"], [["five"]]) is None


def test_intervals_are_those_of_sacrebleus_own_bootstrap():
    from sacrebleu.metrics.bleu import BLEU

    outputs, references = SYSTEM * 10, REFERENCES * 10
    streams = [list(stream) for stream in zip(*references, strict=True)]
    theirs = BLEU().corpus_score(outputs, streams, n_bootstrap=1000)
    ours = bleu(outputs, references)
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert ours.low < theirs._mean < ours.high


def test_answers_that_share_nothing_with_their_references_have_an_interval_all_the_same():
    for metric in (bleu, chrf):
        found = metric(["x", "y", "The dog."], [["The dog bit."], ["It was."], ["The dog."]])
        assert found.low <= found.value <= found.high
