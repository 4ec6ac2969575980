"""A small model proposes: one chain per row, token by token, from its own tree and slots.

Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318).
Idea: the draft runs ahead of the committed text. What the target rejected is simply not counted as cached any more;
the next round first reads what the draft has not seen (one token, or two after a fully accepted round).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request
from specbeam.engine.runner import embedding
from specbeam.engine.support import adapt, check_lengths
from specbeam.engine.tree import Block, Tips, TokenTree, chain
from specbeam.sampling import draw, process, uniforms


@dataclass(frozen=True)
class Proposal:
    """tokens: [rows, γ] long, of which row b's first lengths[b] count. probabilities: [rows, γ, target vocabulary]
    fp32, the distributions they were drawn from; None when each token is the drafter's arg-max (greedy)."""

    tokens: Tensor
    lengths: list[int]
    probabilities: Tensor | None


class DraftModel:
    """Drafts for one batch."""

    def __init__(self, draft: PreTrainedModel, request: Request, vocabulary: int, device: torch.device):
        """vocabulary: width of the target's logits; device: where proposals are wanted (the target's)."""
        self.adapter = adapt(draft)
        lengths = [len(row.prompt) for row in request.rows]
        room = [row.max_new_tokens for row in request.rows]
        check_lengths(self.adapter, lengths, room, role="draft")
        self.rows, self.vocabulary, self.target_device = list(request.rows), vocabulary, device
        self.sampled = request.config.do_sample
        self.tree = TokenTree(self.adapter, len(lengths), max(lengths) + max(room))
        self.cached = [0] * len(lengths)  # tokens of each row's committed text that lie in the slots

    def prefill(self) -> None:
        """Read the prompts."""
        prompts = [row.prompt for row in self.rows]
        self._read(self.tree.tips(self.cached), chain(prompts, self.tree.device))
        self.cached = [len(prompt) for prompt in prompts]

    def propose(self, sequences: Sequence[list[int]], lengths: list[int]) -> Proposal:
        """Draft lengths[b] tokens after each committed sequence (prompt and answer; it only ever grew)."""
        device, longest = self.tree.device, max(lengths)
        probabilities = []
        block = chain([s[n:] for s, n in zip(sequences, self.cached, strict=True)], device)
        reached = [len(s) for s in sequences]
        self.cached = list(reached)
        tips = self.tree.tips([n - k for n, k in zip(reached, block.lengths.tolist(), strict=True)])
        tokens = torch.empty(len(sequences), 0, dtype=torch.long, device=device)
        for step in range(longest):
            logits = self._read(tips, block)

            def path(row: int, _: int, drafted: Tensor = tokens) -> list[int]:
                return [*sequences[row], *drafted[row].tolist()]

            scores = process(self._align(logits), [row.processors for row in self.rows], path)[:, 0]
            runs = [step < length for length in lengths]
            if self.sampled:
                q = scores.softmax(-1)
                uniform = uniforms([row.generator for row in self.rows], [int(run) for run in runs], device)
                token = draw(q, uniform[:, 0])
                probabilities.append(q)
            else:
                token = scores.argmax(-1)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            if step + 1 < longest:
                tips = self.tree.tips([n + step for n in reached])
                # A row that needs no more goes on as a pad: what it writes is never counted as cached.
                more = torch.tensor([step + 1 < length for length in lengths], device=device)
                block = chain(token[:, None], device, more.long())
        q_all = torch.stack(probabilities, dim=1).to(self.target_device) if probabilities else None
        return Proposal(tokens.to(self.target_device), lengths, q_all)

    def accept(self, accepted: Sequence[int], lengths: Sequence[int]) -> None:
        """How many of the last proposals became text: those that were also read stay cached."""
        self.cached = [n + min(kept, max(length - 1, 0))
                       for n, kept, length in zip(self.cached, accepted, lengths, strict=True)]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.tree.keep_rows(rows)
        self.rows, self.cached = [self.rows[i] for i in rows], [self.cached[i] for i in rows]

    def _read(self, tips: Tips, block: Block) -> Tensor:
        """Logits [rows, 1, draft vocabulary] after each row's last node. A token that the draft lacks is read as its
        last one: a worse guess, nothing more."""
        last = embedding(self.adapter.model).shape[0] - 1
        return self.tree.extend(tips, replace(block, tokens=block.tokens.clamp(max=last)), last_only=True)[0]

    def _align(self, logits: Tensor) -> Tensor:
        """To the target's width: ids the draft lacks have probability 0, ids the target lacks are never proposed.

        Widths of one family differ by padding (Qwen2.5: 151,936 and 152,064)."""
        missing = self.vocabulary - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[..., : self.vocabulary]
