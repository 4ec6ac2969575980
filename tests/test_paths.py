"""A path that a user wrote is taken as a shell would take it."""

from pathlib import Path

from specbeam.paths import from_user


def test_a_home_is_filled_in_and_an_unknown_user_is_no_error(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert from_user("~/models") == Path("/home/me/models")
    assert from_user("~nobody-of-that-name/models") == Path("~nobody-of-that-name/models")
    assert from_user("models") == Path("models")
