"""A tree of tokens scored over the slots gives the logits of plain forwards of its paths.

The reference never sees our cache, our masks or our positions: it is the model alone on each path.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import model, plain_logits
from tiny import NAMES, VOCABULARY, build, prompts
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from specbeam.engine import tree as tree_module
from specbeam.engine.support import adapt
from specbeam.engine.tree import Block, Tips, TokenTree, branches, chain, leaves

TOLERANCE = 1e-4
ALL = [pytest.param(name, attention, id=f"{name}-{attention}") for name in NAMES for attention in ("sdpa", "eager")]
EVERY_MODEL = pytest.mark.parametrize("name, attention", ALL)
BATCHES = pytest.mark.parametrize("lengths", [(7,), (5, 19, 12)], ids=["one row", "three ragged rows"])

Paths = list[list[list[int]]]  # [row][tip or node]: the tokens that it stands for


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


class Checked:
    """A TokenTree beside the texts that it should stand for. Every forward is compared with plain ones."""

    def __init__(self, target: PreTrainedModel, rows: Sequence[Tensor], capacity: int = 8):
        self.target = target
        self.tree = TokenTree(adapt(target), len(rows), capacity)
        self.paths: Paths = [[[]] for _ in rows]
        self.tips = self.tree.tips([0] * len(rows))
        self.worst = 0.0
        self.prompts = [row.tolist() for row in rows]

    def prefill(self) -> Checked:
        """Read the prompts, and go on from their ends."""
        logits, _ = self.tree.extend(self.tips, chain(self.prompts, self.tree.device), last_only=True)
        self.paths = [[prompt] for prompt in self.prompts]
        wanted = torch.stack([one[-1] for one in plain_logits(self.target, self.prompts)])
        self.worst = max(self.worst, (logits[:, 0] - wanted).abs().max().item())
        self.tips = self.tree.tips([len(prompt) for prompt in self.prompts])
        return self

    def extend(self, block: Block) -> tuple[Tips, Paths]:
        """Run a block below the present tips and compare the logits of every real node."""
        logits, tips = self.tree.extend(self.tips, block)
        texts: Paths = []
        ancestors = block.ancestors.expand(len(self.paths), -1, -1)
        for row, below in enumerate(self.paths):
            texts.append([below[int(block.tip[row, node])]
                          + block.tokens[row][ancestors[row, node]].tolist()
                          for node in range(int(block.lengths[row]))])
        wanted = plain_logits(self.target, [text for row in texts for text in row])
        ours = [logits[row, node] for row, nodes in enumerate(texts) for node in range(len(nodes))]
        errors = [(a - b[-1]).abs().max().item() for a, b in zip(ours, wanted, strict=True)]
        self.worst = max(self.worst, *errors)
        return tips, texts

    def go_on_from(self, tips: Tips, texts: Paths, nodes: list[list[int]]) -> None:
        """Keep these nodes of the last block as tips; everything else is rejected."""
        self.tips = tips.pick(torch.tensor(nodes))
        self.paths = [[texts[row][node] for node in chosen] for row, chosen in enumerate(nodes)]

    def keep_rows(self, rows: list[int]) -> None:
        self.tree.keep_rows(rows)
        self.tips = replace(self.tips, visible=self.tips.visible[rows], depth=self.tips.depth[rows])
        self.paths = [self.paths[row] for row in rows]


def some_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY - 4) for _ in range(count)]


def some_trees(rng: random.Random, rows: int, least: int = 5, most: int = 12) -> list[tuple[list[int], list[int]]]:
    """Two roots, and nodes below any of the four before them: narrow and deep enough to leave a window of 8."""
    trees = []
    for _ in range(rows):
        size = rng.randint(least, most)
        parents = [-1, -1] + [rng.randrange(max(-1, node - 4), node) for node in range(2, size)]
        trees.append((some_tokens(rng, size), parents[:size]))
    return trees


@EVERY_MODEL
@BATCHES
def test_a_tree_scored_in_one_forward_equals_each_of_its_paths_run_alone(name, attention, lengths):
    run = Checked(model(name, attention), prompts(lengths)).prefill()
    run.extend(branches(some_trees(random.Random(1), len(lengths)), run.tree.device))
    assert run.worst < TOLERANCE


@EVERY_MODEL
def test_a_tree_deeper_than_the_sliding_window_still_equals_its_paths(name, attention):
    """Two interleaved chains of depth 12, window 8: slots and positions have nothing to do with each other."""
    tokens = some_tokens(random.Random(2), 24)
    run = Checked(model(name, attention), prompts((3, 11))).prefill()
    tips, texts = run.extend(branches([(tokens, [-1, -1, *range(22)])] * 2, run.tree.device))
    run.go_on_from(tips, texts, [[22], [23]])  # and on from its ends, with the other chain's slots free
    run.extend(branches([(tokens[:6], [-1, -1, 0, 0, 1, 1])] * 2, run.tree.device))
    assert run.worst < TOLERANCE


@EVERY_MODEL
@BATCHES
def test_chains_that_are_rejected_in_part_leave_decoding_as_it_was(name, attention, lengths):
    """Speculation: each row keeps a random part of what it wrote, and the rest of its slots is written again."""
    rng, rows = random.Random(3), len(lengths)
    run = Checked(model(name, attention), prompts(lengths)).prefill()
    for _ in range(5):
        _, texts = run.extend(chain([some_tokens(rng, rng.randint(1, 5)) for _ in range(rows)], run.tree.device))
        run.paths = [[rng.choice(row)] for row in texts]
        run.tips = run.tree.tips([len(row[0]) for row in run.paths])
    assert run.worst < TOLERANCE
    assert run.tree.high <= max(lengths) + 5 * 5 + 5


@EVERY_MODEL
def test_beams_share_their_prompt_and_reuse_the_slots_of_dead_branches(name, attention):
    """Beam search: one node below each of four tips, which are chosen anew after every step."""
    rng, width, steps = random.Random(4), 4, 12
    run = Checked(model(name, attention), prompts((5, 9))).prefill()
    tips, texts = run.extend(leaves(torch.tensor([some_tokens(rng, width) for _ in range(2)]),
                                    torch.zeros(2, width, dtype=torch.long)))
    for _ in range(steps):
        chosen = [sorted(rng.choices(range(2), k=width)) for _ in range(2)]  # two branches live, two die
        run.go_on_from(tips, texts, chosen)
        tips, texts = run.extend(leaves(torch.tensor([some_tokens(rng, width) for _ in range(2)]),
                                        torch.arange(width).expand(2, -1)))
    assert run.worst < TOLERANCE
    assert run.tree.high < 9 + steps * width  # without reuse every step would have taken `width` new slots


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
@settings(derandomize=True, max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4))
def test_any_history_of_growing_choosing_and_dropping_rows_gives_plain_logits(name, seed, lengths):
    rng = random.Random(seed)
    run = Checked(model(name), prompts(tuple(lengths), seed), capacity=rng.randint(1, 40)).prefill()
    for _ in range(4):
        count, width = len(run.paths), run.tips.depth.shape[1]
        trees = some_trees(rng, count, least=2, most=7)
        block = branches(trees, run.tree.device)
        # Each root hangs below some tip, and what is below a root below that one.
        below = torch.zeros_like(block.tip)
        for row, (_, parents) in enumerate(trees):
            for node, parent in enumerate(parents):
                below[row, node] = below[row, parent] if parent >= 0 else rng.randrange(width)
        tips, texts = run.extend(replace(block, tip=below))
        keep = rng.randint(1, 3)
        run.go_on_from(tips, texts, [[rng.randrange(len(nodes)) for _ in range(keep)] for nodes in texts])
        if count > 1 and rng.random() < 0.4:
            run.keep_rows(sorted(rng.sample(range(count), count - 1)))
    assert run.worst < TOLERANCE


@EVERY_MODEL
def test_a_tree_that_outgrows_its_slots_gets_more_and_loses_nothing(name, attention):
    rng = random.Random(5)
    run = Checked(model(name, attention), prompts((4, 6)), capacity=1).prefill()
    before = run.tree.cache.capacity
    for _ in range(3):
        tips, texts = run.extend(branches(some_trees(rng, 2, 6, 6), run.tree.device))
        run.go_on_from(tips, texts, [[5], [4]])
    assert run.tree.cache.capacity > before
    assert run.worst < TOLERANCE


@pytest.mark.parametrize("rows", [[1], [0, 2], [2, 1]], ids=str)
def test_rows_that_stay_are_not_changed_by_those_that_leave(rows):
    run = Checked(model("mistral-window"), prompts((5, 12, 9))).prefill()
    run.keep_rows(rows)
    run.extend(branches(some_trees(random.Random(6), len(rows)), run.tree.device))
    assert run.worst < TOLERANCE


@EVERY_MODEL
def test_prefill_computes_logits_for_the_last_position_only(name, attention):
    target = model(name, attention)
    tree, seen = TokenTree(adapt(target), 3, 32), []
    hook = target.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    try:
        logits, _ = tree.extend(tree.tips([0, 0, 0]), chain([row.tolist() for row in prompts((5, 19, 12))],
                                                            tree.device), last_only=True)
    finally:
        hook.remove()
    assert logits.shape == (3, 1, VOCABULARY)
    assert [shape[:-1].numel() for shape in seen] == [3], "one position per row goes through the vocabulary"


# Negative controls: the comparison above sees a wrong mask, wrong positions and a window that counts slots.

def _chain_mask(adapter, cache, tokens, positions, visible, near, keep, *, forward):
    """Every node sees all nodes before it in the block, whatever branch they are on."""
    visible = visible | visible.any(1, keepdim=True) & (torch.arange(visible.shape[-1]) <= cache.slots[..., None])
    return forward(adapter, cache, tokens, positions, visible, None if near is None else visible, keep)


def _slot_positions(adapter, cache, tokens, positions, visible, near, keep, *, forward):
    """A node's position is its slot, as in a cache without trees."""
    return forward(adapter, cache, tokens, cache.slots.clone(), visible, near, keep)


def _slot_window(adapter, cache, tokens, positions, visible, near, keep, *, forward):
    """The window counts slots."""
    slots = torch.arange(visible.shape[-1])
    near = visible & (slots > cache.slots[..., None] - adapter.window)
    return forward(adapter, cache, tokens, positions, visible, near, keep)


def _break(monkeypatch: pytest.MonkeyPatch, how) -> None:
    monkeypatch.setattr(tree_module, "forward", partial(how, forward=tree_module.forward))


@pytest.mark.parametrize("how", [_chain_mask, _slot_positions])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in NAMES if "window" not in name])
def test_control_a_wrong_mask_or_wrong_positions_are_seen(name, attention, how, monkeypatch):
    run = Checked(model(name, attention), prompts((5, 12))).prefill()
    assert run.worst < TOLERANCE
    _break(monkeypatch, how)
    run.extend(branches(some_trees(random.Random(1), 2), run.tree.device))
    assert run.worst > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["mistral-window", "gemma3", "gemma3-conditional"])
def test_control_a_window_that_counts_slots_is_seen(name, monkeypatch):
    run = Checked(model(name), prompts((5, 12))).prefill()
    _break(monkeypatch, _slot_window)
    run.extend(branches([(some_tokens(random.Random(2), 24), [-1, -1, *range(22)])] * 2, run.tree.device))
    assert run.worst > 100 * TOLERANCE


def test_control_a_forgotten_rejection_is_seen():
    """A tip that still sees a rejected token is not the text that it should stand for."""
    run = Checked(model("llama"), prompts((5,))).prefill()
    tips, texts = run.extend(chain([[7, 8, 9]], run.tree.device))
    run.go_on_from(tips, texts, [[2]])
    run.paths = [[texts[0][0]]]
    run.extend(chain([[10]], run.tree.device))
    assert run.worst > 100 * TOLERANCE


# The parts.

def test_a_chain_pads_short_rows_on_the_right():
    block = chain([[5, 6, 7], [8]], torch.device("cpu"))
    assert block.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert block.lengths.tolist() == [3, 1]
    assert block.depth.tolist() == [[0, 1, 2]] * 2
    assert block.ancestors[0].tolist() == torch.tril(torch.ones(3, 3)).bool().tolist()


def test_branches_know_their_ancestors_and_their_depth():
    block = branches([([5, 6, 7, 8], [-1, 0, 0, 2])], torch.device("cpu"))
    assert block.depth.tolist() == [[0, 1, 1, 2]]
    assert block.ancestors[0, 3].tolist() == [True, False, True, True]
    assert block.ancestors[0, 1].tolist() == [True, True, False, False]


def test_a_new_tip_sees_its_path_and_lies_one_deeper():
    target = build(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_attention_heads=2))
    tree = TokenTree(adapt(target), 1, 16)
    tree.extend(tree.tips([0]), chain([[3, 4, 5]], tree.device))
    _, tips = tree.extend(tree.tips([3]), branches([([6, 7, 8], [-1, 0, 0])], tree.device))
    assert tips.depth.tolist() == [[4, 5, 5]]
    assert [row.nonzero().flatten().tolist() for row in tips.visible[0]] == [[0, 1, 2, 3], [0, 1, 2, 3, 4],
                                                                            [0, 1, 2, 3, 5]]


def test_keys_and_values_never_move():
    """What was written stays where it is until its slot is free: the same numbers at the same place."""
    run = Checked(model("llama"), prompts((6,)), capacity=40).prefill()
    before = [layer.keys[:, :, :6].clone() for layer in run.tree.cache.layers]
    tips, texts = run.extend(branches([([5, 6, 7, 8], [-1, -1, 0, 1])], run.tree.device))
    run.go_on_from(tips, texts, [[3, 2]])
    run.extend(leaves(torch.tensor([[9, 10]]), torch.tensor([[0, 1]])))
    for layer, kept in zip(run.tree.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :6], kept)


def test_the_cache_fails_loudly_when_a_model_asks_for_its_length():
    tree = TokenTree(adapt(model("llama")), 1, 8)
    with pytest.raises(RuntimeError, match="has no length"):
        tree.cache.get_seq_length()
