"""Where proposals come from: one file per drafter.

A drafter serves one batch and knows neither the target nor how its proposals are accepted:

    propose(sequences, limits, length) → Proposal   below each committed text, at most limits[b] tokens deep, and
                                                    no longer than `length` (length.py) finds worth it
    accept(paths)                                   which of the last proposals became text
    observe(tokens, logits)                         what the target read and answered (token recycling learns from it)
    keep_rows(rows)                                 go on with these rows only
    stand(tree, tips)                               before `propose`, if it has this: the target's slots, to draft in
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from specbeam.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from specbeam.drafting.length import Length


@dataclass(frozen=True)
class Proposal:
    """One tree of proposed tokens per row, parents before children.

    tokens[b]: ids. parents[b]: each token's parent in this list, -1 for the committed text (of beams: -1 - i for the
    i-th beam). q: [rows, 1 + longest,
    vocabulary] fp32, in row 0 the distribution that the children of the committed text were drawn from, in row i + 1
    that of node i's children, siblings drawn one after the other without replacement; None: nothing was drawn, each
    token is a function of the text before it (a point of probability one). source[b]: the drafter's name. why[b]:
    why this row's proposal is as long as it is. confidence[b]: of chains by a draft model whose length adapts, its
    largest probability before each token. forwards: how often the drafter ran a model.
    """

    tokens: list[list[int]]
    parents: list[list[int]]
    q: Tensor | None
    source: list[str]
    why: list[str]
    confidence: list[list[float]] = field(default_factory=list)
    forwards: int = 0

    @property
    def chained(self) -> bool:
        """Whether every row is one chain."""
        return all(parents == list(range(-1, len(parents) - 1)) for parents in self.parents)


class Drafter(Protocol):
    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Length) -> Proposal: ...

    def accept(self, paths: Sequence[Sequence[int]]) -> None: ...

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None: ...

    def keep_rows(self, rows: Sequence[int]) -> None: ...

    def join(self, more: Any) -> None:
        """Go on with the rows of another of its kind too, behind these."""


DRAFTERS = {  # name → module; each module has make(settings, target, draft, request, vocabulary) → Drafter
    "draft_model": "specbeam.drafting.draft_model",
    "prompt_lookup": "specbeam.drafting.prompt_lookup",
    "suffix": "specbeam.drafting.suffix",
    "token_recycling": "specbeam.drafting.token_recycling",
    "early_exit": "specbeam.drafting.early_exit",
    "combined": "specbeam.drafting.combined",
}
LONGEST_AUTO = 8  # tokens that draft_length=auto proposes at most
ACCEPTANCE = ("rejection", "block", "typical")  # rules when sampling; typical is LOSSY
NEEDS_DRAFT = ("draft_model",)
VOCABULARIES = ("same", "tli", "slem", "auto")  # of target and draft (cross_vocabulary.py)
OPTIONS_OF = {  # options that only some drafters know: with another one they are refused, never ignored
    "branching": ("draft_model", "early_exit", "combined"),
    "tree_nodes": ("draft_model", "early_exit", "combined", "token_recycling", "suffix"),
    "tree_width": ("draft_model", "early_exit", "combined"),
    "confidence_threshold": ("draft_model", "early_exit", "combined", "suffix"),
    "ngram": ("prompt_lookup",), "branches": ("prompt_lookup",), "corpus": ("suffix", "combined"),
    "exit_layer": ("early_exit",), "min_match": ("combined",), "vocabulary": ("draft_model", "combined"),
}


@dataclass(frozen=True)
class Settings:
    """What the caller asked of speculation."""

    drafter: str = "draft_model"
    draft_length: int | str = 4
    branching: tuple[int, ...] = ()
    tree_nodes: int = 0
    tree_width: int = 4
    confidence_threshold: float = 0.0
    costs: str | None = None
    ngram: int = 3
    branches: int = 1
    corpus: str | None = None
    exit_layer: int | None = None
    min_match: int = 4
    tokenizer: Any = None  # the target's: spells the corpus
    vocabulary: str = "same"
    draft_tokenizer: Any = None
    acceptance: str = "rejection"
    temperature: float = 0.0

    @property
    def depth(self) -> int:
        """How deep a proposal may go."""
        return len(self.branching) or (LONGEST_AUTO if isinstance(self.draft_length, str) else self.draft_length)

    @property
    def most_nodes(self) -> int:
        """How many nodes a proposal may have."""
        if self.tree_nodes:
            return self.tree_nodes
        total, width = 0, 1
        for children in self.branching or (1,) * self.depth:
            width *= children
            total += width
        return total

    @property
    def trees(self) -> bool:
        """Whether a proposal may be more than a chain."""
        return bool(self.tree_nodes) or self.branches > 1 or self.drafter == "token_recycling" or any(
            n > 1 for n in self.branching)

    def recordable(self, draft: object) -> bool:
        """Whether proposals are chains, and nobody asks for the target's logits (without a draft model, combined does:
        it has a table of the target's successors)."""
        return not self.trees and self.acceptance != "typical" and (self.drafter != "combined" or draft is not None)

    def check(self, draft: object) -> None:
        """Raises InputError for settings that make no sense, in one sentence."""
        if self.drafter not in DRAFTERS:
            raise InputError(f"drafter is {self.drafter!r}: it is one of {', '.join(DRAFTERS)}.")
        self._check_types()
        number = isinstance(self.draft_length, int) and not isinstance(self.draft_length, bool)
        if self.draft_length != "auto" and not (number and self.depth >= 1):
            raise InputError(f"draft_length is {self.draft_length!r}: it is the number of tokens proposed per round, "
                             "at least 1 (greedy runs without a draft), or \"auto\".")
        number = isinstance(self.confidence_threshold, int | float) and not isinstance(self.confidence_threshold, bool)
        if not number or not 0 <= self.confidence_threshold < 1:
            raise InputError(f"confidence_threshold is {self.confidence_threshold!r}: it is a probability below 1 (0: "
                             "propose draft_length tokens whatever the draft thinks).")
        if (self.draft_length == "auto" or self.confidence_threshold) and (self.branching or self.tree_nodes):
            raise InputError("draft_length=auto and confidence_threshold adapt chains, but a tree was asked for "
                             "(branching or tree_nodes): choose one.")
        if self.draft_length == "auto" and self.confidence_threshold:
            raise InputError(f"draft_length=auto and confidence_threshold={self.confidence_threshold} both say when a "
                             "proposal ends: leave confidence_threshold out, or give draft_length a number.")
        if self.costs and self.draft_length != "auto":
            raise InputError(f"costs={self.costs!r} belongs to draft_length=auto, but draft_length is "
                             f"{self.draft_length}.")
        if self.branching and self.tree_nodes:
            raise InputError("branching and tree_nodes were both given: a tree is either of a fixed shape or grown.")
        for name, drafters in OPTIONS_OF.items():
            if getattr(self, name) != getattr(Settings, name) and self.drafter not in drafters:
                raise InputError(f"{name}={getattr(self, name)!r} does nothing with drafter={self.drafter}: leave it "
                                 f"out, or use drafter={' or '.join(drafters)}.")
        if self.tree_width != Settings.tree_width and not self.tree_nodes:
            raise InputError(f"tree_width={self.tree_width} does nothing without tree_nodes, the size of a grown tree: "
                             "give tree_nodes=…, or leave tree_width out.")
        if self.drafter == "combined" and draft is None and self.branching:
            raise InputError(f"branching={list(self.branching)} shapes a draft model's tree, but drafter=combined has "
                             "no draft here: leave it out, or give a draft.")
        if self.drafter == "suffix" and self.tree_nodes and self.corpus is None:
            raise InputError("tree_nodes with drafter=suffix makes a tree of what followed in a corpus, but there is "
                             "none: give corpus=<file.jsonl>, or leave tree_nodes out.")
        if self.vocabulary not in VOCABULARIES:
            raise InputError(f"vocabulary is {self.vocabulary!r}: it is one of {', '.join(VOCABULARIES)}.")
        if self.vocabulary != "same" and (draft is None or self.tokenizer is None or self.draft_tokenizer is None):
            raise InputError(f"vocabulary={self.vocabulary} needs a draft model and both tokenizers: give draft, "
                             "tokenizer=… (the target's) and draft_tokenizer=….")
        if self.vocabulary == "slem" and (self.branching or self.tree_nodes):
            raise InputError("vocabulary=slem proposes chains, but a tree was asked for (branching or tree_nodes): "
                             "use vocabulary=tli.")
        if self.acceptance not in ACCEPTANCE:
            raise InputError(f"acceptance is {self.acceptance!r}: it is one of {', '.join(ACCEPTANCE)}.")
        if self.acceptance == "block" and (self.trees or (self.drafter == "combined" and draft is None)):
            raise InputError("acceptance=block judges chains, but this drafter proposes trees: use "
                             "acceptance=rejection.")
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature!r}: give 0 for greedy, or a number above 0 to sample.")
        if self.acceptance != "rejection" and not self.temperature:
            does = "changes what is sampled" if self.acceptance == "typical" else "is a rule of sampling"
            raise InputError(f"acceptance={self.acceptance} {does}, but temperature is 0 (greedy): give a "
                             "temperature above 0.")
        if self.drafter in NEEDS_DRAFT and draft is None:
            raise InputError(f"drafter={self.drafter} needs a draft model and none was given: give one, or choose "
                             "another drafter.")

    def _check_types(self) -> None:
        """What is no number is refused before anything is computed with it."""
        children = self.branching
        if not isinstance(children, tuple) or any(type(n) is not int or n < 1 for n in children):
            said = list(children) if isinstance(children, tuple) else children
            raise InputError(f"branching is {said!r}: it says how many children a node has at each depth, as in "
                             "[3, 2, 1], each at least 1.")
        for name in ("ngram", "branches", "min_match", "tree_width", "tree_nodes"):
            value = getattr(self, name)
            if type(value) is not int or value < (name != "tree_nodes"):  # 0 nodes: no tree was asked for
                raise InputError(f"{name} is {value!r}: it must be a whole number, at least 1.")
        if self.exit_layer is not None and type(self.exit_layer) is not int:
            raise InputError(f"exit_layer is {self.exit_layer!r}: it must be a whole number, how many layers draft.")


def make_drafter(settings: Settings, target: Any, draft: Any, request: Any, vocabulary: int) -> Drafter:
    """A drafter for one batch; its module is imported when it is first asked for."""
    return import_module(DRAFTERS[settings.drafter]).make(settings, target, draft, request, vocabulary)
