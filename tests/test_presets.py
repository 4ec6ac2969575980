"""Every preset's family end to end: loaded from disk, chat rendered, decoded by our methods and by transformers."""

from __future__ import annotations

import checkpoints
import pytest
import torch

import specbeam

PROMPTS = ["Why is the sky blue?", "Hello"]
LIMITS = {"max_new_tokens": 12, "repetition_penalty": 1.0}


@pytest.fixture(scope="module", params=checkpoints.TARGETS)
def preset(request, tmp_path_factory):
    """(target, draft or None, batch) of one preset, as the command line would load it."""
    folder = tmp_path_factory.mktemp(request.param)
    target = checkpoints.make_checkpoint(request.param, folder / "target")
    name = checkpoints.PAIRS.get(request.param)
    if name is None:
        model, tokenizer = specbeam.load_model(target, device="cpu")
        return model, None, specbeam.render_prompt(tokenizer, PROMPTS)
    draft = checkpoints.make_checkpoint(name, folder / "draft", seed=1)
    model, assistant, tokenizer = specbeam.load_pair(target, draft, device="cpu")
    return model, assistant, specbeam.render_prompt(tokenizer, PROMPTS)


def by_transformers(target, batch, **options):
    """New tokens of each row, up to and including the first EOS."""
    out = target.generate(batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, **LIMITS, **options)
    end = target.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    rows = []
    for row in out[:, batch.input_ids.shape[1] :].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:stop])
    return rows


def test_greedy_gives_transformers_tokens(preset):
    target, _, batch = preset
    out = specbeam.greedy_generate(target, batch.input_ids, batch.attention_mask, **LIMITS)
    assert out.tokens == by_transformers(target, batch)


def test_beams_give_transformers_tokens(preset):
    target, _, batch = preset
    out = specbeam.beam_generate(target, batch.input_ids, batch.attention_mask, num_beams=3, **LIMITS)
    assert out.tokens == by_transformers(target, batch, num_beams=3)


def test_speculation_with_the_presets_draft_gives_the_same_tokens(preset):
    target, draft, batch = preset
    if draft is None:
        pytest.skip("this preset has no draft")
    out = specbeam.speculative_generate(target, draft, batch.input_ids, batch.attention_mask, draft_length=3, **LIMITS)
    assert out.tokens == by_transformers(target, batch)


def test_nothing_is_compiled(preset, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("torch.compile was called"))
    target, _, batch = preset
    by_transformers(target, batch)
    specbeam.greedy_generate(target, batch.input_ids, batch.attention_mask, **LIMITS)
