"""Fetching from the hub, without a network: the cache serves, and every failure is one sentence that names the id."""

from __future__ import annotations

import errno
import time
from types import SimpleNamespace

import checkpoints
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from refusals import refusal

from specbeam.hub import fetch
from specbeam.models import load_model, load_pair


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty cache and a hub at a port where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")


@pytest.fixture
def cached(tmp_path):
    """(repository, family) -> put a small checkpoint into the cache under this id."""

    def put(repo, family):
        root = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        return checkpoints.make_checkpoint(family, root / "snapshots" / ("0" * 40))

    return put


def http(kind, status):
    return kind(f"{status} for the request", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_an_unreachable_hub_is_said_quickly_and_names_the_id():
    began = time.monotonic()
    sentence = refusal(load_model, "Qwen/Qwen2.5-3B-Instruct")
    assert time.monotonic() - began < 20, "seconds, not the minutes of every file's own time-out"
    assert "'Qwen/Qwen2.5-3B-Instruct'" in sentence and "could not be reached (ConnectError" in sentence
    assert "refused" in sentence, "it asked the port where nobody listens, not the network"
    assert "a local folder works too" in sentence


def test_a_model_in_the_cache_loads_while_the_hub_is_unreachable(cached):
    cached("owner/target", "qwen2.5-3b-instruct")
    cached("owner/draft", "qwen2.5-0.5b-instruct")
    target, draft, tokenizer = load_pair("owner/target", "owner/draft", device="cpu")
    assert tokenizer.name_or_path == target.config._name_or_path == "owner/target"
    assert draft.num_parameters() < target.num_parameters()


def test_offline_mode_asks_nobody(cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert "HF_HUB_OFFLINE" in refusal(load_model, "owner/name")
    cached("owner/name", "gpt2")
    load_model("owner/name", device="cpu")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: http(RepositoryNotFoundError, 404), "neither a folder here nor a model on the hub"),
        (lambda: http(RepositoryNotFoundError, 401), "private"),
        (
            lambda: http(GatedRepoError, 401),
            "gated repository: accept its licence at https://huggingface.co/owner/name",
        ),
        (lambda: http(HfHubHTTPError, 403), "gated"),
        (lambda: http(HfHubHTTPError, 503), "The hub refused 'owner/name' (503 for the request): try again later"),
        (lambda: TimeoutError("timed out"), "could not be reached (TimeoutError: timed out)"),
        (lambda: ConnectionError(), "could not be reached (ConnectionError: no message)"),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    sentence = refusal(fetch, "owner/name", weights=False)
    assert words in sentence and "'owner/name'" in sentence and "local folder" in sentence


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: http(GatedRepoError, 403), "gated repository"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
    ],
)
def test_a_download_that_fails_becomes_one_sentence(monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert words in refusal(fetch, "owner/name", weights=True)


def test_weights_are_downloaded_only_after_the_pair_was_found_to_fit(cached, monkeypatch):
    folders = {"owner/target": cached("owner/target", "gpt2"), "owner/draft": cached("owner/draft", "zephyr-7b-beta")}
    asked = []

    def download(repo, allow_patterns, **options):
        asked.append((repo, "*.safetensors" in allow_patterns, "*.py" in allow_patterns))
        return str(folders[repo])

    monkeypatch.setattr(huggingface_hub, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "do not share a vocabulary" in refusal(load_pair, "owner/target", "owner/draft", device="cpu")
    assert asked == [("owner/target", False, False), ("owner/draft", False, False)]
    load_model("owner/target", device="cpu")
    assert asked[-1] == ("owner/target", True, False)
