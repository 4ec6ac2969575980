"""The draft's own beam search, as proposals for the target's: every beam that survived at any depth, also those that
died later, is a node.

Idea: start from the target's beams and their cumulative scores, rank as the target will (processors, EOS), keep
`draft_beams` beams per depth. Wider than the target's search, so that a beam which the target ranks a little higher
than the draft does is still among the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request
from specbeam.drafting import Proposal
from specbeam.drafting.draft_model import align
from specbeam.engine.runner import embedding
from specbeam.engine.support import adapt, check_lengths
from specbeam.engine.tree import Block, TokenTree, chain, leaves
from specbeam.sampling import process

if TYPE_CHECKING:
    from specbeam.decoding.beam import Beams


class DraftBeams:
    """Drafts beams for one batch."""

    name = "draft_beams"

    def __init__(self, draft: PreTrainedModel, request: Request, num_beams: int, draft_beams: int, depth: int,
                 vocabulary: int):
        """Reads the prompts. vocabulary: width of the target's logits."""
        lengths = [len(row.prompt) for row in request.rows]
        room = [row.max_new_tokens for row in request.rows]
        check_lengths(adapt(draft), lengths, room, role="draft")
        self.rows, self.width, self.vocabulary = list(request.rows), draft_beams, vocabulary
        self.num_beams = num_beams
        self.tree = TokenTree(adapt(draft), len(lengths), max(lengths) + max(room) + draft_beams * (depth + 2))
        self.eos = torch.tensor(sorted(request.eos), dtype=torch.long, device=self.tree.device)
        self.known = embedding(draft).shape[0] - 1
        prompts = chain([[min(token, self.known) for token in row.prompt] for row in request.rows], self.tree.device)
        _, nodes = self.tree.extend(self.tree.tips([0] * len(lengths)), prompts, last_only=True)
        beams = torch.zeros(len(lengths), num_beams, dtype=torch.long, device=self.tree.device)
        self.tips = self.nodes = nodes.pick(beams + prompts.lengths[:, None] - 1)  # of each beam
        self.read = [0] * len(lengths)  # of each beam's tokens

    def propose(self, beams: Sequence[Beams], limits: Sequence[int]) -> Proposal:
        """Nodes below each row's running beams, level by level, at most limits[b] deep."""
        rows, deepest = len(beams), max(limits)
        logits = self._catch_up(beams)
        scores = torch.tensor([row.scores for row in beams], device=logits.device)
        paths = [[row.prompt + ids for ids in state.tokens] if row.processors else []
                 for row, state in zip(self.rows, beams, strict=True)]
        first = 0  # number of the frontier's first node among `nodes`
        tokens: list[list[int]] = [[] for _ in beams]
        parents: list[list[int]] = [[] for _ in beams]
        for level in range(deepest):
            log_probs = self._processed(align(logits, self.vocabulary).float().log_softmax(-1), paths)
            log_probs = log_probs.index_fill(2, self.eos, -torch.inf)  # an ended beam needs no continuation
            scores, index = (log_probs + scores[..., None]).flatten(1).topk(self.width)
            parent, token = index // log_probs.shape[-1], index % log_probs.shape[-1]
            for row, (above, ids) in enumerate(zip(parent.tolist(), token.tolist(), strict=True)):
                if level < limits[row]:
                    tokens[row] += ids
                    parents[row] += [place + first - self.num_beams if level else -1 - place for place in above]
                if paths[row]:
                    paths[row] = [[*paths[row][place], one] for place, one in zip(above, ids, strict=True)]
            if level + 1 < deepest:
                logits, more = self.tree.extend(self.nodes, leaves(token.clamp(max=self.known), parent + first))
                first = self.nodes.depth.shape[1]
                self.nodes = self.nodes.join(more)
        return Proposal(tokens, parents, None, [self.name] * rows, [""] * rows)

    def accept(self, behind: Sequence[Sequence[int]], steps: Sequence[int], parents: Sequence[Sequence[int]]) -> None:
        """behind: the node of the target's block (running beams first, then the proposal) that each new beam's last
        token hangs below; parents: of every node of the block; steps: of each row, committed."""
        have = self.nodes.depth.shape[1]
        kept = []
        for row, nodes in enumerate(behind):
            unread = any(node >= have for node in nodes)  # the draft never read its deepest level
            kept.append([parents[row][node] for node in nodes] if unread else nodes)
            self.read[row] += steps[row] - 1 - unread  # the last token is never read yet
        self.tips = self.nodes.pick(torch.tensor(kept, device=self.tree.device))

    def follow(self, origin: Sequence[Sequence[int]]) -> None:
        """The beams of a step that was not drafted: each goes on from `origin` [rows, beams]."""
        self.tips = self.tips.pick(torch.tensor(origin, device=self.tree.device))

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Nothing to learn from the target."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.tips = self.tips.rows(self.tree.keep_rows(rows))
        self.rows, self.read = [self.rows[i] for i in rows], [self.read[i] for i in rows]

    def _catch_up(self, beams: Sequence[Beams]) -> Tensor:
        """Read what each beam has that the draft has not, step by step below its tip. Logits [rows, beams, …] after
        each beam's last token; `nodes` become these last tokens."""
        width = len(beams[0].tokens)
        unread = [[ids[read:] for ids in row.tokens] for row, read in zip(beams, self.read, strict=True)]
        deep = max(len(row[0]) for row in unread)
        tokens = torch.tensor([[min(ids[at], self.known) if at < len(ids) else 0 for at in range(deep) for ids in row]
                               for row in unread], device=self.tree.device)
        self.read = [len(row.tokens[0]) for row in beams]
        own = torch.arange(width, device=self.tree.device)
        if deep == 1:
            logits, self.nodes = self.tree.extend(self.tips, leaves(tokens, own.expand(len(beams), -1)))
            return logits
        lengths = torch.tensor([width * len(row[0]) for row in unread], device=self.tree.device)
        own, depth = own.repeat(deep), torch.arange(deep, device=self.tree.device).repeat_interleave(width)
        block = Block(tokens, own.expand(len(beams), -1), depth.expand(len(beams), -1),
                      ((own[:, None] == own) & (depth[:, None] >= depth))[None], lengths)
        logits, nodes = self.tree.extend(self.tips, block)
        last = lengths[:, None] - width + own[:width]
        self.nodes = nodes.pick(last)
        return logits.gather(1, last[..., None].expand(-1, -1, logits.shape[-1]))

    def _processed(self, log_probs: Tensor, paths: list[list[list[int]]]) -> Tensor:
        """log_probs [rows, width, vocabulary] after each row's processors; paths[row][place]: what lies before."""
        processors, width = [row.processors for row in self.rows], log_probs.shape[1]
        if not any(processors):
            return log_probs
        # Some of transformers' processors count on a multiple of num_beams: the last beam is repeated.
        places = [min(place, width - 1) for place in range(width + -width % self.num_beams)]
        return process(log_probs[:, places], processors, lambda row, place: paths[row][places[place]])[:, :width]
