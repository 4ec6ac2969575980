"""Bad input must be answered by one sentence."""

from __future__ import annotations

import pytest

from specbeam.errors import InputError


def refusal(function, *args, **options):
    """The one sentence of the InputError that the call must raise."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence
