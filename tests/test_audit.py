"""The audit finds nothing on a good pair, names a near-tie as one, and sees faults that were planted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_checkpoint
from law import small_target
from reference import good_draft, model
from scipy import stats
from tiny import EOS, prompts, tiny_draft
from transformers import PreTrainedModel

from specbeam import acceptance, cli
from specbeam.audit import FALSE_ALARM, audit, audit_sampling, audit_tokens, chi_square, exact_distribution
from specbeam.drafting.draft_model import DraftModel
from specbeam.sampling import draw

ROWS = prompts((5, 12, 3))
KINDS = {
    "chain": {"kind": "speculative", "draft_length": 4},
    "temperature 0": {"kind": "speculative", "temperature": 0.0},
    "tree": {"kind": "speculative", "branching": [3, 2, 1]},
    "auto": {"kind": "speculative", "draft_length": "auto"},
    "looked up": {"kind": "speculative", "drafter": "prompt_lookup"},
    "beam": {"kind": "speculative_beam", "num_beams": 3},
}
SAMPLED = {
    "chain": {"kind": "speculative", "temperature": 1.0},
    "tree": {"kind": "speculative", "temperature": 0.8, "branching": [2, 2]},
    "block": {"kind": "speculative", "temperature": 1.2, "acceptance": "block"},
    "penalty": {"kind": "speculative", "temperature": 1.0, "repetition_penalty": 1.4},
}


PROMPTS = [torch.tensor([3, 4, 5]), torch.tensor([1, 7])]


def tokens_of(settings, target: PreTrainedModel | None = None, draft: PreTrainedModel | None = None):
    return audit_tokens("it", settings | {"max_new_tokens": 20}, target or model("llama"), draft or good_draft("llama"),
                        ROWS)


def draws_of(settings, draws: int = 2000):
    """With a draft that is accepted about half of the time."""
    target = small_target()
    return audit_sampling("it", settings, target, tiny_draft(target, 0.1), PROMPTS, draws, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_on_a_good_pair(kind):
    found = tokens_of(KINDS[kind])
    assert (found.method, found.dtype, found.verdict) == ("it", "float32", "same")
    alone = kind == "beam"
    assert found.detail == "all 3 answers token for token" + ("" if alone else ", each alone and all as a batch")


@pytest.mark.parametrize("kind", SAMPLED)
def test_nothing_is_found_in_honest_draws(kind):
    found = draws_of(SAMPLED[kind])
    assert found.verdict == "same", found.detail
    assert " draws of 4 tokens after 2 prompts, " in found.detail
    distance, chance = (float(found.detail.split(said)[1][:5]) for said in ("variation ", "alone about "))
    assert distance < 1.2 * chance and "weak" not in found.detail


# Greedy and beams: planted faults.

def one_too_many(honest):
    def follow(tokens, parents, best):
        path, following = honest(tokens, parents, best)
        return (path, following) if path or not tokens else ([0], best[1])

    return follow


@pytest.mark.parametrize("kind", ["chain", "tree", "looked up"])
def test_a_proposal_that_is_kept_against_the_targets_will_is_a_real_difference(monkeypatch, kind):
    monkeypatch.setattr(acceptance, "follow", one_too_many(acceptance.follow))
    target = model("llama", seed=9) if kind == "looked up" else model("llama")
    settings = KINDS[kind] | ({"ngram": 1} if kind == "looked up" else {})
    rows = [row.repeat(3) for row in ROWS]
    found = audit_tokens("it", settings | {"max_new_tokens": 20}, target, good_draft("llama"), rows)
    assert found.verdict == "different"
    assert "new token" in found.detail and "logits differ by" in found.detail


def test_an_answer_that_ends_too_early_is_a_real_difference(monkeypatch):
    honest = acceptance.follow
    monkeypatch.setattr(acceptance, "follow", lambda *args: (honest(*args)[0], EOS))
    assert tokens_of(KINDS["chain"]).verdict == "different"


def test_a_beam_that_hangs_below_the_wrong_node_is_a_real_difference(monkeypatch):
    from specbeam.decoding import speculative_beam

    honest = speculative_beam._replay

    def crossed(beams, known, *args):
        found = honest(beams, known, *args)
        for row in known:
            row.at, row.below = row.at[::-1], row.below[::-1]
        return found

    monkeypatch.setattr(speculative_beam, "_replay", crossed)
    assert tokens_of(KINDS["beam"]).verdict == "different"


@pytest.fixture
def twins() -> PreTrainedModel:
    """A target whose tokens 50 to 94 have exactly the logits of 5 to 49."""
    target = copy.deepcopy(model("llama"))
    with torch.no_grad():
        target.get_output_embeddings().weight[50:95] = target.get_output_embeddings().weight[5:50]
    return target


@pytest.mark.parametrize("noise, verdict", [(0.0, "near-ties"), (1e-6, "near-ties"), (0.3, "different")])
def test_the_other_of_two_tokens_with_equal_logits_is_a_near_tie_and_called_so(monkeypatch, twins, noise, verdict):
    honest = acceptance.follow
    with torch.no_grad():
        twins.get_output_embeddings().weight[50:95] *= 1 + noise  # how far apart the twins are

    def other(tokens, parents, best):
        path, following = honest(tokens, parents, best)
        return path, following + 45 if 5 <= following < 50 else following - 45 if 50 <= following < 95 else following

    monkeypatch.setattr(acceptance, "follow", other)
    found = tokens_of(KINDS["chain"] | {"eos_token_id": None}, twins, twins)
    assert found.verdict == verdict
    assert "the target's logits differ by" in found.detail
    if noise == 0.0:
        assert "differ by 0 there" in found.detail and found.detail.startswith("6 of 6 answers; prompt 0, new token ")


@pytest.mark.parametrize("apart, verdict", [(1.7, "near-ties"), (1.0, "different")])
def test_a_near_tie_is_one_of_the_scores_that_decoding_chooses_by(monkeypatch, twins, apart, verdict):
    """The prompt has one of each pair of twins, which repetition_penalty=1.7 lowers: those whose logits are equal are
    no near-tie then, and those whose logits are that far apart are one."""
    honest = acceptance.follow
    with torch.no_grad():
        twins.get_output_embeddings().weight[50:95] *= apart
    monkeypatch.setattr(acceptance, "follow", lambda *args: (
        [], (token := honest(*args)[1]) + (45 if token < 50 else -45)))
    settings = KINDS["chain"] | {"repetition_penalty": 1.7, "max_new_tokens": 1, "suppress_tokens": [*range(5), *range(
        95, 101)]}
    found = audit_tokens("it", settings, twins, twins, [torch.arange(50, 95)])
    assert (found.verdict, "new token 0: the target's logits differ by" in found.detail) == (verdict, True)


def test_a_fault_that_only_a_batch_shows_is_a_real_difference(monkeypatch):
    from specbeam.decoding import speculative

    honest = speculative._choose

    def crossed(request, batch, live, *args):
        paths, following = honest(request, batch, live, *args)
        return (paths, following) if len(live) < 3 else ([[] for _ in live], following[::-1])

    monkeypatch.setattr(speculative, "_choose", crossed)
    found = tokens_of(KINDS["chain"])
    assert found.verdict == "different" and " in a batch, new token " in found.detail


@pytest.mark.parametrize("preferred, verdict", [(1e-6, "near-ties"), (0.5, "different")])
def test_beams_that_took_another_of_two_equal_ways_are_a_near_tie_and_called_so(monkeypatch, twins, preferred, verdict):
    """Every token of 50 to 94 is scored so much above its twin; the plain search takes the twin."""
    from specbeam.decoding import speculative_beam

    honest = speculative_beam.log_probabilities

    def biased(logits, *args):
        scores = honest(logits, *args)
        scores[..., 50:95] += preferred
        return scores

    monkeypatch.setattr(speculative_beam, "log_probabilities", biased)
    found = tokens_of(KINDS["beam"] | {"eos_token_id": None}, twins, twins)
    assert found.verdict == verdict
    assert "the scores of the beams that run on differ by " in found.detail
    if verdict == "near-ties":
        assert float(found.detail.rpartition(" ")[2]) < 1e-4


def test_in_bf16_real_beams_part_at_near_ties_at_most():
    target = copy.deepcopy(model("llama")).to(torch.bfloat16)
    found = tokens_of(KINDS["beam"], target, copy.deepcopy(good_draft("llama")).to(torch.bfloat16))
    assert found.verdict in ("same", "near-ties") and found.dtype == "bfloat16"


# Sampling: planted faults.

def test_a_draft_that_misreports_what_it_drew_from_is_a_real_difference(monkeypatch):
    honest = DraftModel.propose

    def lies(self, sequences, limits, length):
        proposal = honest(self, sequences, limits, length)
        return proposal if proposal.q is None else replace(
            proposal, q=proposal.q**2 / (proposal.q**2).sum(-1, keepdim=True))

    monkeypatch.setattr(DraftModel, "propose", lies)
    for kind in ("chain", "tree", "block"):
        found = draws_of(SAMPLED[kind])
        assert found.verdict == "different", (kind, found.detail)


def test_a_draft_that_is_rarely_right_is_given_more_draws():
    """And its faults are seen: a correction from the target's distribution in place of the residual."""
    target = small_target()
    far = small_target(seed=7)

    def found(draws):
        return audit_sampling("it", SAMPLED["chain"], target, far, PROMPTS, draws, seed=0)

    honest = found(1000)
    assert honest.verdict == "same" and int(honest.detail.split()[0]) > 1200, honest.detail
    assert found(20).detail.endswith("a weak test, give more draws")


def test_a_correction_from_the_target_in_place_of_the_residual_is_a_real_difference(monkeypatch):
    honest = acceptance.rejection_sample

    def wrong(proposed, p, q, lengths, uniform):
        accepted, _ = honest(proposed, p, q, lengths, uniform)
        return accepted, draw(p[torch.arange(len(p)), accepted], uniform.gather(1, lengths[:, None]).squeeze(1))

    monkeypatch.setattr(acceptance, "rejection_sample", wrong)
    target = small_target()
    found = audit_sampling("it", SAMPLED["chain"], target, small_target(seed=7), PROMPTS, 1000, seed=0)
    assert found.verdict == "different", found.detail


def test_typical_acceptance_is_a_real_difference():
    assert draws_of({"kind": "speculative", "temperature": 1.5, "acceptance": "typical"}, 3000).verdict == "different"


def test_a_token_that_cannot_be_drawn_is_a_real_difference(monkeypatch):
    honest = acceptance.rejection_sample

    def mistaken(proposed, p, q, lengths, uniform):
        accepted, _ = honest(proposed, p, q, lengths, uniform)
        return accepted, p[torch.arange(len(p)), accepted].argmin(-1)

    monkeypatch.setattr(acceptance, "rejection_sample", mistaken)
    found = draws_of(SAMPLED["chain"], 100)
    assert found.verdict == "different" and found.detail.endswith(" answers have probability 0")


def test_the_exact_distribution_is_that_of_plain_forwards():
    target, prompt = small_target(), torch.tensor([3, 4, 5])
    exact = exact_distribution(target, prompt, {"temperature": 0.7, "top_k": 4, "max_new_tokens": 2})
    assert len(exact) == 16 and sum(exact.values()) == pytest.approx(1)
    with torch.no_grad():
        first = (target(prompt[None]).logits[0, -1] / 0.7).softmax(-1)
        token = int(first.argmax())
        second = (target(torch.tensor([[*prompt.tolist(), token]])).logits[0, -1] / 0.7).softmax(-1)
    best = first.topk(4).values.sum(), second.topk(4).values.sum()
    assert exact[token, int(second.argmax())] == pytest.approx(float(
        first.max() / best[0] * second.max() / best[1]), rel=1e-5)


def test_the_chi_square_is_that_of_scipy_and_pools_what_is_rare():
    counts, chances = [30, 50, 20], [0.25, 0.5, 0.25]
    p_value, distance = chi_square(counts, chances)
    assert p_value == pytest.approx(stats.chisquare(counts, [25, 50, 25]).pvalue, rel=1e-9)
    assert distance == pytest.approx(0.05)
    pooled, _ = chi_square([30, 50, 17, 1, 2], [0.25, 0.5, 0.2, 0.02, 0.03])
    assert pooled == pytest.approx(stats.chisquare([30, 50, 17, 3], [25, 50, 20, 5]).pvalue, rel=1e-9)
    assert chi_square([3], [1.0])[0] == 1.0


def test_false_alarms_are_as_rare_as_the_audit_says():
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(40, generator=generator).softmax(0)
    values = []
    for _ in range(400):
        seen = torch.multinomial(chances, 1000, replacement=True, generator=generator).bincount(minlength=40)
        values.append(chi_square(seen.tolist(), chances.tolist())[0])
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert FALSE_ALARM == 1e-5


def test_every_method_is_audited_in_every_dtype_but_sampling_in_fp32_only():
    target = small_target()
    said = []

    def load(dtype):
        kept = copy.deepcopy(target).to(getattr(torch, dtype))
        return SimpleNamespace(target=kept, draft=kept, tokenizer=None, draft_tokenizer=None, render=lambda *_: (
            SimpleNamespace(input_ids=torch.tensor([[3, 4, 5]]))))

    methods = {"greedy": KINDS["chain"] | {"max_new_tokens": 6}, "sampled": SAMPLED["chain"]}
    config = {"system_prompt": None, "draws": 200, "seed": 0}
    found = audit(methods, ["float32", "bfloat16"], load, ["a prompt"], config, said.append)
    assert found == said
    assert [(one.method, one.dtype) for one in found] == [("greedy", "float32"), ("sampled", "float32"),
                                                          ("greedy", "bfloat16")]


# The command.

@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(name, folder / name) for name in ("gpt2", "distilgpt2", "tinyllama-1.1b-chat")}


def command(folders, *overrides: str, draft: str = "distilgpt2") -> int:
    return cli.main(["audit", f"target.path={folders['gpt2']}", f"draft.path={folders[draft]}", "device=cpu",
                     "max_new_tokens=8", "dtypes=[float32]", "draws=200", "prompts=['Why is the sky blue?', 'A fox']",
                     *overrides])


def test_the_command_ends_with_0_when_nothing_is_found(folders, capsys):
    assert command(folders) == 0
    out = capsys.readouterr().out
    assert out.count("same ") == 5 and "Verdict: the output is the target's own in all 5 checks." in out


def test_the_command_ends_with_1_and_says_where_when_there_is_a_real_difference(folders, capsys, monkeypatch):
    monkeypatch.setattr(acceptance, "follow", one_too_many(acceptance.follow))
    assert command(folders, "only=[speculative,speculative_beam]", "runner=eager") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "different float32 speculative: prompt 0, new token" in out
    assert "same float32 speculative_beam" in out
    assert "Verdict: 1 of 2 checks found a real difference." in out


def test_a_pair_with_two_vocabularies_is_audited_across_them(folders, capsys):
    assert command(folders, "only=[tli,slem,sampled]", "methods.tli={kind: speculative, vocabulary: tli}",
                   "methods.slem={kind: speculative, vocabulary: slem}",
                   "methods.sampled={kind: speculative, vocabulary: tli, temperature: 1.0}",
                   draft="tinyllama-1.1b-chat") == 0
    assert "in all 3 checks" in capsys.readouterr().out


def test_what_no_dtype_lets_check_is_said(folders, capsys):
    assert command(folders, "dtypes=[bfloat16]", "methods={chain: {kind: speculative}, drawn: {kind: speculative, "
                   "temperature: 1.0}}") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Not checked: drawn (sampled methods are audited in float32 only" in out
    assert "the target's own in 1 check." in out


@pytest.mark.parametrize("override, sentence", [
    ("draws=0", "draws"), ("dtypes=float32", "dtypes is 'float32'"), ("dtypes=[]", "dtypes is []"),
    ("methods={plain: {kind: greedy}}", "an audit is of speculative kinds"), ("only=[nobody]", "nobody"),
    ("only=[speculative_sampled]; dtypes=[bfloat16]", "speculative_sampled samples, which is audited in float32 only"),
    ("dtypes=[float16]; methods={it: {kind: speculative, temperature: 0.5}}",
     "it samples, which is audited in float32"),
    ("target.path=null", "target.path is null"), ("max_new_tokens=-1", "max_new_tokens"),
])
def test_what_makes_no_sense_ends_with_2_and_one_sentence(folders, capsys, override, sentence):
    assert command(folders, *override.split("; ")) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
