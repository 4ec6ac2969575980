"""BLEU is sacrebleu's, over exactly the outputs that have references."""

from __future__ import annotations

import pytest

from specbeam.metrics.text import bleu

# sacrebleu's own README example: two reference streams, BLEU = 48.53.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
STREAMS = [["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
           ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]]
REFERENCES = [list(own) for own in zip(*STREAMS, strict=True)]


def test_sacrebleus_own_example_gives_its_own_score_and_a_signature():
    result = bleu(SYSTEM, REFERENCES)
    assert result is not None and result.score == pytest.approx(48.53, abs=0.005)
    assert result.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result.sentences == 3


def test_outputs_without_references_do_not_count():
    with_extra = bleu([*SYSTEM, "Anything at all."], [*REFERENCES, []])
    assert with_extra is not None and with_extra.score == pytest.approx(48.53, abs=0.005)
    assert with_extra.sentences == 3
    assert bleu(["Anything."], [[]]) is None


def test_the_number_of_references_may_vary():
    varied = bleu(SYSTEM, [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2]])
    assert varied is not None and 0 < varied.score <= 100


def test_a_wrong_answer_scores_lower_and_the_right_one_a_hundred():
    perfect = bleu(STREAMS[0], REFERENCES)
    shuffled = bleu([STREAMS[0][1], STREAMS[0][2], STREAMS[0][0]], REFERENCES)
    assert perfect is not None and perfect.score == pytest.approx(100)
    assert shuffled is not None and shuffled.score < 10
