"""What the caller asked of speculative beam search, and what makes no sense. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specbeam.drafting import Settings
from specbeam.errors import InputError

DRAFTERS_OF_BEAMS = ("draft_model", "prompt_lookup", "suffix", "token_recycling")
LONGEST = 6  # steps that draft_length=auto goes ahead at most
MOST_NODES = 512  # of a round: a forward over more costs more than any steps that it may save


@dataclass(frozen=True)
class BeamSettings:
    """Options of `speculative_beam_generate`."""

    num_beams: int = 4
    draft_length: int | str = 4
    draft_beams: int | None = None
    drafter: str = "draft_model"
    ngram: int = 3
    branches: int | None = None
    corpus: str | None = None
    tree_nodes: int | None = None
    tokenizer: Any = None

    @property
    def width(self) -> int:
        """Of the draft's own search."""
        return self.num_beams + 2 if self.draft_beams is None else self.draft_beams

    @property
    def deepest(self) -> int:
        return LONGEST if isinstance(self.draft_length, str) else self.draft_length

    @property
    def most_nodes(self) -> int:
        """Nodes that a round may propose."""
        if self.drafter == "token_recycling":
            return self.tree_nodes or 8 * self.num_beams
        wide = {"draft_model": self.width, "suffix": self.num_beams}
        return self.deepest * wide.get(self.drafter, self.num_beams * self.lookup.branches)

    @property
    def lookup(self) -> Settings:
        """The settings of a drafter without a model."""
        usual = self.num_beams if self.drafter == "prompt_lookup" else 1
        return Settings(self.drafter, self.deepest, ngram=self.ngram, corpus=self.corpus, tokenizer=self.tokenizer,
                        branches=usual if self.branches is None else self.branches,
                        tree_nodes=self.most_nodes if self.drafter == "token_recycling" else 0)

    def check(self, draft: object) -> None:
        """Raises InputError, in one sentence. num_beams is checked elsewhere."""
        if self.drafter not in DRAFTERS_OF_BEAMS:
            raise InputError(f"drafter is {self.drafter!r}: speculative beam search takes one of "
                             f"{', '.join(DRAFTERS_OF_BEAMS)}.")
        number = isinstance(self.draft_length, int) and not isinstance(self.draft_length, bool)
        if self.draft_length != "auto" and not (number and self.deepest >= 1):
            raise InputError(f"draft_length is {self.draft_length!r}: it is the number of beam steps drafted per "
                             "round, at least 1 (beam_generate runs without a draft), or \"auto\".")
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < self.num_beams:
            raise InputError(f"draft_beams is {self.draft_beams!r} and num_beams {self.num_beams}: the draft's search "
                             "must be at least as wide as the target's.")
        if self.tree_nodes is not None and (not isinstance(self.tree_nodes, int) or self.tree_nodes < 1):
            raise InputError(f"tree_nodes is {self.tree_nodes!r}: give a whole number of at least 1.")
        if self.draft_beams is not None and self.drafter != "draft_model":
            raise InputError(f"draft_beams={self.draft_beams} does nothing with drafter={self.drafter}, which runs no "
                             "search of its own: leave it out, or use drafter=draft_model.")
        if self.tree_nodes is not None and self.drafter != "token_recycling":
            raise InputError(f"tree_nodes={self.tree_nodes} does nothing with drafter={self.drafter}: leave it out, or "
                             "use drafter=token_recycling.")
        self.lookup.check(draft)
        if self.most_nodes > MOST_NODES:
            raise InputError(f"draft_length is {self.draft_length!r}: a round may propose {self.most_nodes} nodes "
                             f"(width × depth), but at most {MOST_NODES} are worth a forward; give a smaller "
                             "draft_length, draft_beams, branches or tree_nodes.")
