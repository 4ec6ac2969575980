"""`model.generate(custom_generate=…)` returns what `model.generate` returns, for every option or a refusal by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from decoding.options import HONOURED, EvenSum, NotTwiceInARow
from reference import changed, good_draft, late_token, letters, model
from refusals import refusal
from tiny import EOS, left_padded, prompts

import specbeam
from specbeam import transformers as ours

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic", "ignore:Unfeasible length")
HUB = Path(__file__).parents[1] / "examples" / "hub"
FAMILIES = ("gpt2", "llama", "mistral-window", "gemma3")
IDS, MASK = left_padded(prompts((5, 19, 1)))
ALONE = prompts((9,))[0][None]
GREEDY = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
BEAMS = GREEDY | {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}


class LastTokenOut(hf.LogitsProcessor):
    """A caller's own processor: it looks at the history, each row for itself."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def plain(name="llama"):
    return {"greedy": ours.greedy(), "speculative": ours.speculative(good_draft(name)),
            "prompt_lookup": ours.speculative(drafter="prompt_lookup", draft_length=3)}


def beamed(name="llama"):
    return {"beam": ours.beam(), "speculative_beam": ours.speculative_beam(good_draft(name))}


def both(target, method, *inputs, **options):
    """What `generate` gives, and what it gives with our method."""
    return target.generate(*inputs, **options), target.generate(*inputs, custom_generate=method, **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ids, mask", [(ALONE, None), (IDS, MASK)], ids=["one prompt", "ragged batch"])
def test_every_family_gives_the_tensor_of_generate(name, ids, mask):
    for method in plain(name).values():
        theirs, mine = both(model(name), method, ids, attention_mask=mask, **GREEDY)
        assert torch.equal(theirs, mine)
    for method in beamed(name).values():
        theirs, mine = both(model(name), method, ids, attention_mask=mask, **BEAMS)
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("option", [
    *(option for option in HONOURED if option != "logits_processor"), "logits_processor", "stop on EOS of a pad"])
def test_every_option_means_what_it_means_in_generate(option):
    settings = {"logits_processor": {"logits_processor": hf.LogitsProcessorList([LastTokenOut()])},
                "stop on EOS of a pad": {"pad_token_id": EOS}}.get(option) or dict(HONOURED.get(option, {}))
    if option == "several at once":
        del settings["repetition_penalty"]  # has a test of its own
    for method in list(plain().values())[:2]:
        theirs, mine = both(model("llama"), method, IDS, attention_mask=MASK, **GREEDY | settings)
        assert torch.equal(theirs, mine)


def test_a_trie_that_proposals_leave_is_what_it_is_in_generate():
    trie = [[10, 11, 12, EOS], [10, 11, 50, 51, EOS], [60, 61, EOS]]
    told = [10, 11, 20, 21, 10, 11, 20, 60, 61, 40, 30]
    rows, mask = left_padded([torch.tensor(told), torch.tensor(told[7:])])

    def allowed(_, ids):
        said = ids[rows.shape[1]:].tolist()
        return sorted({answer[len(said)] for answer in trie
                       if answer[: len(said)] == said and len(answer) > len(said)}) or (
            [EOS] if EOS in said else [])  # rows of `generate` go on behind their end

    for method in plain().values():
        theirs, mine = both(model("llama"), method, rows, attention_mask=mask, **GREEDY,
                            prefix_allowed_tokens_fn=allowed)
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("settings", [
    {"max_new_tokens": 12} | HONOURED["several at once"], HONOURED["forced_eos_token_id"],
    HONOURED["prefix_allowed_tokens_fn"],
    {"length_penalty": -1.0}, {"length_penalty": 2.0, "early_stopping": True}, {"early_stopping": "never"},
    {"num_beams": 5, "num_return_sequences": 5}, {"renormalize_logits": True, "repetition_penalty": 1.3}],
    ids=lambda settings: ",".join(settings))
def test_options_of_beams_too(settings):
    options = BEAMS | {"eos_token_id": list(range(2, 12))} | settings
    for method in beamed().values():
        theirs, mine = both(model("llama"), method, IDS, attention_mask=MASK, **options)
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("drafter", ["prompt_lookup", "suffix", "token_recycling"])
def test_beams_with_a_drafter_that_needs_no_model(drafter):
    method = ours.speculative_beam(drafter=drafter, draft_length=3)
    theirs, mine = both(model("llama"), method, IDS, attention_mask=MASK, **BEAMS)
    assert torch.equal(theirs, mine)
    again = ours.generate(model("llama"), method="speculative_beam", drafter=drafter, draft_length="auto",
                          input_ids=IDS, attention_mask=MASK, **BEAMS)
    assert torch.equal(theirs, again)


def test_settings_that_speculative_beams_do_not_have_are_refused_and_so_is_a_search_tree():
    assert "trace is no setting of speculative_beam" in refusal(ours.speculative_beam, good_draft("llama"), trace=True)
    assert "branching is no setting of speculative_beam" in refusal(ours.speculative_beam, branching=[2])
    for method in ("beam", "speculative_beam", "greedy"):
        assert "trace was given" in refusal(ours.generate, model("llama"), method=method, input_ids=ALONE, trace=True)
    assert "needs a draft model" in refusal(model("llama").generate, ALONE, custom_generate=ours.speculative_beam(),
                                            **BEAMS)


def test_planted_processors_that_do_not_see_the_padding_are_found_out(monkeypatch):
    monkeypatch.setattr(ours._Padded, "__call__", lambda self, ids, scores: self.inner(ids, scores))
    theirs, mine = both(model("llama"), ours.greedy(), IDS, attention_mask=MASK,
                        **GREEDY | HONOURED["min_length"] | HONOURED["forced_eos_token_id"])
    assert not torch.equal(theirs, mine)


def test_a_checkpoints_own_generation_config_is_honoured():
    target = changed("llama", repetition_penalty=1.4, eos_token_id=[EOS, 19, 94], max_new_tokens=9, pad_token_id=0)
    for method in list(plain().values())[:2]:
        theirs, mine = both(target, method, IDS, attention_mask=MASK)
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("ids, mask", [(ALONE, None), (IDS, MASK)], ids=["one prompt", "ragged batch"])
def test_the_output_class_holds_scores_and_logits(ids, mask):
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True,
                        "suppress_tokens": [60, 61]}
    for method in plain().values():
        theirs, mine = both(model("llama"), method, ids, attention_mask=mask, **options)
        assert type(mine) is hf.generation.GenerateDecoderOnlyOutput and torch.equal(theirs.sequences, mine.sequences)
        new = mine.sequences[:, ids.shape[1]:]
        for kind in ("scores", "logits"):
            assert len(mine[kind]) == len(theirs[kind]) == new.shape[1]
            for step, (their, our) in enumerate(zip(theirs[kind], mine[kind], strict=True)):
                running = (new[:, :step] != EOS).all(1)  # behind its end a row has nothing to say
                torch.testing.assert_close(our[running], their[running], atol=2e-4, rtol=0)
        their, our = (model("llama").compute_transition_scores(one.sequences, one.scores) for one in (theirs, mine))
        kept = new != 0
        torch.testing.assert_close(our[kept], their[kept], atol=2e-4, rtol=0)


def test_the_beam_output_class_holds_scores_and_ancestry():
    options = BEAMS | {"return_dict_in_generate": True, "output_scores": True}
    for method in beamed().values():
        theirs, mine = both(model("llama"), method, IDS, attention_mask=MASK, **options)
        assert type(mine) is hf.generation.GenerateBeamDecoderOnlyOutput
        assert torch.equal(theirs.sequences, mine.sequences) and torch.equal(theirs.beam_indices, mine.beam_indices)
        torch.testing.assert_close(theirs.sequences_scores, mine.sequences_scores, atol=1e-5, rtol=0)
        assert len(theirs.scores) == len(mine.scores) and theirs.scores[0].shape == mine.scores[0].shape
        their, our = (model("llama").compute_transition_scores(one.sequences, one.scores, one.beam_indices)
                      for one in (theirs, mine))
        torch.testing.assert_close(our, their, atol=2e-4, rtol=0)
    without = model("llama").generate(IDS, attention_mask=MASK, custom_generate=ours.beam(),
                                      **BEAMS | {"return_dict_in_generate": True})
    assert without.sequences_scores is None and without.scores is None, "as in generate"


def test_sampling_draws_what_our_own_functions_draw_whose_law_is_proven():
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
    asked = options | {"do_sample": True, "pad_token_id": 0, "attention_mask": MASK}
    target, draft = model("llama"), good_draft("llama")
    for method, wanted in (
            (ours.sample(seed=5), specbeam.sample_generate(target, IDS, MASK, seed=5, **options)),
            (ours.speculative(draft, seed=5), specbeam.speculative_generate(target, draft, IDS, MASK, seed=5,
                                                                           **options))):
        drawn = target.generate(IDS, custom_generate=method, **asked)[:, IDS.shape[1]:].tolist()
        assert [row[:len(tokens)] for row, tokens in zip(drawn, wanted.tokens, strict=True)] == wanted.tokens


def test_torchs_seed_decides_and_return_sequences_differ():
    def drawn(seed):
        torch.manual_seed(seed)
        return model("llama").generate(ALONE, custom_generate=ours.sample(), do_sample=True, num_return_sequences=4,
                                       max_new_tokens=8, pad_token_id=0).tolist()

    assert drawn(1) == drawn(1) != drawn(2) and len(set(map(tuple, drawn(1)))) == 4


class Told:
    """A streamer that writes down what it is told."""

    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.values.append("end")


@pytest.mark.parametrize("which", ["greedy", "speculative"])
def test_a_streamer_is_told_what_generate_tells_it(which):
    theirs, mine = Told(), Told()
    model("llama").generate(ALONE, streamer=theirs, **GREEDY)
    model("llama").generate(ALONE, streamer=mine, custom_generate=plain()[which], **GREEDY)
    assert mine.values == theirs.values and len(mine.values) == 16


def test_the_callers_processors_and_criteria_work_in_beams_too():
    options = BEAMS | {"logits_processor": hf.LogitsProcessorList([LastTokenOut()]), "max_new_tokens": 14,
                       "stopping_criteria": hf.StoppingCriteriaList([EvenSum()]), "return_dict_in_generate": True,
                       "output_scores": True}
    for method in beamed().values():
        theirs, mine = both(model("llama"), method, IDS, attention_mask=MASK, **options)
        assert torch.equal(theirs.sequences, mine.sequences) and torch.equal(theirs.beam_indices, mine.beam_indices)
        torch.testing.assert_close(theirs.sequences_scores, mine.sequences_scores, atol=1e-5, rtol=0)


def test_the_callers_stopping_criteria_and_time_limit_work():
    criteria = hf.StoppingCriteriaList([EvenSum()])
    for method in list(plain().values())[:2]:
        theirs, mine = both(model("llama"), method, IDS, attention_mask=MASK, stopping_criteria=criteria, **GREEDY)
        assert torch.equal(theirs, mine)
        short = model("llama").generate(ALONE, custom_generate=method, max_time=0.0, **GREEDY)
        assert short.shape[1] == ALONE.shape[1] + 1


def test_stop_strings_are_given_with_their_tokenizer():
    tokens = model("llama").generate(ALONE, **GREEDY)[0, ALONE.shape[1]:].tolist()
    text = letters().decode([late_token(tokens, 4)])
    theirs = model("llama").generate(ALONE, stop_strings=text, tokenizer=letters(), **GREEDY)
    mine = model("llama").generate(ALONE, custom_generate=ours.greedy(stop_strings=text, tokenizer=letters()), **GREEDY)
    assert torch.equal(theirs, mine) and mine.shape[1] < ALONE.shape[1] + 14
    assert "needs tokenizer" in refusal(ours.greedy, stop_strings="x")


SAY_NOTHING = {  # a value for every option that is refused; a new option of transformers must come here or be honoured
    "use_mtp": True, "use_cache": False, "cache_implementation": "static", "cache_config": {"a": 1},
    "max_cache_len": 64, "encoder_repetition_penalty": 2.0, "token_healing": True, "guidance_scale": 2.0,
    "watermarking_config": hf.WatermarkingConfig(), "output_attentions": True, "output_hidden_states": True,
    "encoder_no_repeat_ngram_size": 2, "is_assistant": True, "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 3, "assistant_early_exit": 1, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "speculation_type": "dflash",
    "compile_config": hf.CompileConfig(), "continuous_batching_config": None, "prefill_chunk_size": 8,
    "low_memory": True, "num_beam_groups": 2, "diversity_penalty": 0.5, "force_words_ids": [[3]], "constraints": [1],
    "penalty_alpha": 0.6, "dola_layers": "high", "transformers_version": None}


def test_every_option_of_transformers_is_honoured_or_refused_by_name():
    names = {name for name in vars(hf.GenerationConfig()) if not name.startswith("_")}
    assert names <= ours.HONOURED | ours.WITHOUT_EFFECT | set(SAY_NOTHING)
    target = model("llama")
    for name in sorted(names & set(SAY_NOTHING)):
        if SAY_NOTHING[name] is None:
            continue
        config = hf.GenerationConfig(**GREEDY)
        setattr(config, name, SAY_NOTHING[name])
        with pytest.raises(specbeam.InputError, match=name):
            ours._check_config("greedy", target, config, False, False)


def test_an_option_that_no_one_has_heard_of_is_refused_too():
    config = hf.GenerationConfig(**GREEDY)
    config.new_in_version_9 = 3
    with pytest.raises(specbeam.InputError, match="new_in_version_9=3"):
        model("llama").generate(ALONE, custom_generate=ours.greedy(), generation_config=config)


@pytest.mark.parametrize("which, options, said", [
    ("greedy", {"do_sample": True}, "never samples"),
    ("sample", {}, "only samples"),
    ("greedy", {"num_beams": 3}, "use beam()"),
    ("beam", {}, "num_beams=4"),
    ("beam", {"num_beams": 3, "do_sample": True}, "never samples"),
    ("beam", {"num_beams": 3, "return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    ("greedy", {"guidance_scale": 2.0}, "guidance_scale"),
    ("greedy", {"position_ids": torch.arange(3, 12)[None]}, "position_ids"),
    ("greedy", {"past_key_values": hf.DynamicCache()}, "past_key_values"),
    ("greedy", {"negative_prompt_ids": ALONE}, "negative_prompt_ids"),
    ("greedy", {"attention_mask": torch.tensor([[1] * 8 + [0]])}, "padding_side"),
    ("speculative", {"assistant_model": "draft"}, "assistant_model"),
    ("beam", {"num_beams": 3, "streamer": Told()}, "streamer"),
    ("greedy", {"synced_gpus": True}, "synced_gpus"),
], ids=lambda value: None if isinstance(value, dict) else str(value))
def test_what_cannot_be_honoured_is_refused_in_one_sentence(which, options, said):
    method = {"greedy": ours.greedy, "sample": ours.sample, "beam": ours.beam,
              "speculative": lambda: ours.speculative(good_draft("llama"))}[which]()
    if "assistant_model" in options:
        options = {"assistant_model": good_draft("llama")}
    options = {"max_new_tokens": 4, "pad_token_id": 0} | options
    assert said in refusal(model("llama").generate, ALONE, custom_generate=method, **options)


def test_a_batch_has_no_one_stream_and_needs_a_padding_token():
    target = model("llama")
    assert "one prompt at a time" in refusal(target.generate, IDS, attention_mask=MASK, streamer=Told(),
                                             custom_generate=ours.greedy(), **GREEDY)
    target = changed("llama", pad_token_id=None, eos_token_id=None)
    stop = hf.StoppingCriteriaList([EvenSum()])
    assert "pad_token_id" in refusal(target.generate, IDS, attention_mask=MASK, stopping_criteria=stop,
                                     custom_generate=ours.greedy(), max_new_tokens=4)


@pytest.mark.parametrize("method, options", [
    ("speculative", {"draft_length": 3}), ("greedy", {}), ("beam", {"num_beams": 3}),
    ("speculative_beam", {"num_beams": 3, "draft_length": "auto"})], ids=lambda value: str(value))
def test_a_repository_folder_does_the_same(method, options):
    theirs = model("llama").generate(IDS, attention_mask=MASK, **GREEDY | {"num_beams": options.get("num_beams", 1)})
    if method.startswith("speculative"):
        options = options | {"draft": good_draft("llama")}
    mine = model("llama").generate(IDS, attention_mask=MASK, custom_generate=str(HUB), trust_remote_code=True,
                                   method=method, **GREEDY | options)
    assert torch.equal(theirs, mine)


def test_a_repository_folder_passes_streamer_stop_strings_and_assistant_on():
    told, target = Told(), model("llama")
    text = letters().decode([late_token(target.generate(ALONE, **GREEDY)[0, ALONE.shape[1]:].tolist(), 4)])
    options = GREEDY | {"stop_strings": text, "tokenizer": letters()}
    theirs = target.generate(ALONE, **options)
    mine = target.generate(ALONE, custom_generate=str(HUB), trust_remote_code=True, streamer=told,
                           assistant_model=good_draft("llama"), **options)
    assert torch.equal(theirs, mine) and told.values[-1] == "end"
    assert "one of greedy" in refusal(ours.generate, target, method="magic")
    assert "leave it out" in refusal(ours.generate, target, method="greedy", draft=target)


def test_a_repository_folder_runs_only_when_it_is_trusted():
    with pytest.raises(ValueError, match="trust_remote_code"):
        model("llama").generate(ALONE, custom_generate=str(HUB), trust_remote_code=False, **GREEDY)


def test_processors_that_count_the_rows_of_a_batch_get_one_row():
    """NotTwiceInARow looks at the first row of what it is given: alone, it is right."""
    settings = {"logits_processor": hf.LogitsProcessorList([NotTwiceInARow()])}
    theirs, mine = both(model("llama"), ours.greedy(), ALONE, **GREEDY | settings)
    assert torch.equal(theirs, mine)
