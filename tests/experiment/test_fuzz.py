"""Any override either makes a plan or is refused in one sentence: never a traceback."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbeam.completion import words
from specbeam.errors import InputError
from specbeam.experiment.compose import compose, expand_sweeps
from specbeam.experiment.plan import make_plan

KEYS = [word for word in words("compare") if not word.startswith("-")]
VALUES = st.one_of(
    st.sampled_from(["", "null", "true", "-1", "0", "1e9", "nan", "inf", "[]", "{}", "[1,", "{a", "'", '"', "${seed}",
                     "${x", "1,2", "a b", "\\", "ü", "\x00", "{kind: speculative}", "{kind: [greedy]}", "[greedy]",
                     "???", "{kind: beam, num_beams: -1}", "{kind: greedy, eos_token_id: x}", "{1: 2}", "range(1,3)"]),
    st.text(max_size=12), st.integers().map(str), st.floats().map(str))
OVERRIDES = st.one_of(
    st.builds(lambda key, value: key.partition("=")[0] + "=" + value, st.sampled_from(KEYS), VALUES),
    st.builds(lambda sign, key, value: f"{sign}{key.partition('=')[0]}={value}", st.sampled_from(["+", "++", "~", ""]),
              st.sampled_from(KEYS), VALUES),
    st.builds(lambda name, value: f"methods.{name}={value}", st.sampled_from(["x", "greedy", "x.kind", "a.b.c", ""]),
              VALUES),
    st.text(max_size=20))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_any_override_makes_a_plan_or_is_refused_in_one_sentence(overrides):
    try:
        for job in expand_sweeps(overrides):
            make_plan(compose("config", job))
    except InputError as error:
        assert str(error).strip() and len(" ".join(str(error).split())) < 1500
