"""The draft's own beam search, as proposals for the target's: every beam that survived at any depth, also those that
died later, is a node.

Idea: start from the target's beams and their cumulative scores, rank as the target will (processors, EOS), keep
`draft_beams` beams per depth. Wider than the target's search, so that a beam which the target ranks a little higher
than the draft does is still among the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request
from specbeam.drafting.draft_model import align
from specbeam.engine.runner import embedding
from specbeam.engine.support import adapt, check_lengths
from specbeam.engine.tree import Block, TokenTree, chain, leaves
from specbeam.sampling import process


@dataclass(frozen=True)
class Levels:
    """Proposed continuations of all beams of every row, level by level.

    tokens: [rows, depth, width] long. parents: the same shape; in the first level a running beam, then a node of the
    level above.
    """

    tokens: Tensor
    parents: Tensor


def _of(paths: list[list[list[int]]], row: int, place: int) -> list[int]:
    return paths[row][place]


class DraftBeams:
    """Drafts beams for one batch."""

    def __init__(self, draft: PreTrainedModel, request: Request, num_beams: int, draft_beams: int, depth: int,
                 vocabulary: int):
        """Reads the prompts. vocabulary: width of the target's logits."""
        lengths = [len(row.prompt) for row in request.rows]
        room = [row.max_new_tokens for row in request.rows]
        check_lengths(adapt(draft), lengths, room, role="draft")
        self.rows, self.width, self.vocabulary = list(request.rows), draft_beams, vocabulary
        self.num_beams = num_beams
        self.eos = sorted(request.eos)
        self.tree = TokenTree(adapt(draft), len(lengths), max(lengths) + max(room) + draft_beams * (depth + 2))
        self.known = embedding(draft).shape[0] - 1
        prompts = chain([[min(token, self.known) for token in row.prompt] for row in request.rows], self.tree.device)
        _, nodes = self.tree.extend(self.tree.tips([0] * len(lengths)), prompts, last_only=True)
        beams = torch.zeros(len(lengths), num_beams, dtype=torch.long, device=self.tree.device)
        self.tips = nodes.pick(beams + prompts.lengths[:, None] - 1)  # of each beam
        self.read = torch.zeros(len(lengths), dtype=torch.long, device=self.tree.device)  # of each beam's tokens
        self.nodes = self.tips

    def propose(self, tokens: Tensor, length: Tensor, scores: Tensor, depth: int) -> Levels:
        """tokens: [rows, beams, most], of which length [rows] are there. scores: [rows, beams], as the target has
        them."""
        rows, beams, _ = tokens.shape
        logits = self._catch_up(tokens, length)
        written = [row[:, :n].tolist() for row, n in zip(tokens, length.tolist(), strict=True)]
        found: list[Tensor] = []
        above: list[Tensor] = []
        numbers = torch.arange(beams, device=logits.device).expand(rows, -1)  # of the frontier among `nodes`
        for level in range(depth):
            paths = [[self.rows[row].prompt + self._path(written[row], found, above, row, place)
                      for place in range(logits.shape[1])] if self.rows[row].processors else [] for row in range(rows)]
            log_probs = self._processed(align(logits, self.vocabulary).float().log_softmax(-1), paths)
            log_probs[..., self.eos] = -torch.inf  # an ended beam needs no continuation
            best, index = (log_probs + scores[..., None]).flatten(1).topk(self.width)
            parent, token = index // log_probs.shape[-1], index % log_probs.shape[-1]
            found.append(token)
            above.append(parent)
            scores = best
            if level + 1 < depth:
                first = self.nodes.depth.shape[1]
                logits, more = self.tree.extend(self.nodes, leaves(token.clamp(max=self.known),
                                                                   numbers.gather(1, parent)))
                self.nodes = self.nodes.join(more)
                numbers = torch.arange(first, first + self.width, device=token.device).expand(rows, -1)
        return Levels(torch.stack(found, 1), torch.stack(above, 1))

    def follow(self, origin: Tensor) -> None:
        """The beams of a step that was not drafted: each goes on from `origin` [rows, beams]."""
        self.tips = self.tips.pick(origin)

    def accept(self, behind: Tensor, steps: Tensor, above: Tensor) -> None:
        """behind: [rows, beams], the node of the target's block (running beams first, then level by level) that each
        new beam's last token hangs below; above: that node's parent, for nodes of the deepest level, which the draft
        never read; steps: [rows], committed."""
        have = self.nodes.depth.shape[1]
        unread = behind >= have
        self.tips = self.nodes.pick(torch.where(unread, above, behind))
        self.read = self.read + steps - 1 - unread.any(1).long()  # the last token is never read yet

    def keep_rows(self, rows: Sequence[int]) -> None:
        kept = self.tree.keep_rows(rows)
        self.rows, self.tips, self.read = [self.rows[i] for i in rows], self.tips.rows(kept), self.read[kept]

    def _catch_up(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Read what each beam has that the draft has not, step by step below its tip. Logits [rows, beams, …] after
        each beam's last token; `nodes` become these last tokens."""
        rows, beams, most = tokens.shape
        missing = length - self.read
        deep = int(missing.max())
        step = torch.arange(deep, device=tokens.device)
        places = (self.read[:, None] + step).clamp(max=most - 1)  # [rows, deep]
        unread = tokens.gather(2, places[:, None].expand(-1, beams, -1)).transpose(1, 2).flatten(1)
        own = torch.arange(beams, device=tokens.device).repeat(deep)
        depth = step.repeat_interleave(beams)
        block = Block(unread.clamp(max=self.known), own.expand(rows, -1), depth.expand(rows, -1),
                      ((own[:, None] == own) & (depth[:, None] >= depth))[None], missing * beams)
        logits, nodes = self.tree.extend(self.tips, block)
        last = (missing[:, None] - 1) * beams + torch.arange(beams, device=tokens.device)
        self.nodes, self.read = nodes.pick(last), length.clone()
        return logits.gather(1, last[..., None].expand(-1, -1, logits.shape[-1]))

    def _processed(self, log_probs: Tensor, paths: list[list[list[int]]]) -> Tensor:
        """log_probs [rows, width, vocabulary] after each row's processors; paths[row][place]: what lies before."""
        processors, width = [row.processors for row in self.rows], log_probs.shape[1]
        if not any(processors):
            return log_probs
        # Some of transformers' processors count on a multiple of num_beams: the last beam is repeated.
        places = [min(place, width - 1) for place in range(width + -width % self.num_beams)]
        paths = [[row[place] for place in places] if row else row for row in paths]
        return process(log_probs[:, places], processors, partial(_of, paths))[:, :width]

    def _path(self, written: list[list[int]], found: Sequence[Tensor], above: Sequence[Tensor], row: int, place: int
              ) -> list[int]:
        steps: list[int] = []
        for token, parent in zip(reversed(found), reversed(above), strict=True):
            steps.append(int(token[row, place]))
            place = int(parent[row, place])
        return written[place] + steps[::-1]
