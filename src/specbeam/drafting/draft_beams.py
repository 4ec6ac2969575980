"""The draft's own beam search, as proposals for the target's: every beam that survived at any depth, also those that
died later, is a node.

Idea: start from the target's beams and their cumulative scores, rank as the target will (processors, EOS), keep
`draft_beams` beams per depth. Wider than the target's search, so that a beam which the target ranks a little higher
than the draft does is still among the nodes. Where the target has answered already, its scores are taken for the
draft's. A candidate that cannot survive by them, or is far behind the last beam, is no node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request
from specbeam.drafting import Proposal
from specbeam.drafting.answered import Answered
from specbeam.drafting.draft_model import align
from specbeam.engine.runner import embedding
from specbeam.engine.support import adapt, check_lengths
from specbeam.engine.tree import TokenTree, branches, chain, leaves
from specbeam.sampling import process

if TYPE_CHECKING:
    from specbeam.decoding.beam import Beams

UNLIKELY = 1.0  # a candidate so far behind the last beam (in log-probability) is not worth a node


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
        self.nodes = nodes.pick(prompts.lengths[:, None] - 1)
        self.ends = [[0] * num_beams for _ in lengths]  # of each beam's last token when it was last drafted for,
        self.seen = [0] * len(lengths)  # how many it had then,
        self.children: list[dict[tuple[int, int], int]] = [{} for _ in lengths]  # and the nodes read below

    def propose(self, beams: Sequence[Beams], limits: Sequence[int], known: Sequence[Answered]) -> Proposal:
        """Nodes below each row's running beams, level by level, at most limits[b] deep."""
        rows, deepest = len(beams), max(limits)
        logits = self._catch_up(beams)
        scores = torch.tensor([row.scores for row in beams], device=logits.device)
        paths = [[row.prompt + ids for ids in state.tokens] if row.processors else []
                 for row, state in zip(self.rows, beams, strict=True)]
        # Of the frontier: the target's nodes, and, in `place`, the proposal's (None: left out).
        at = [row.at for row in known]
        place: list[list[int | None]] = [[-1 - beam for beam in range(self.num_beams)] for _ in beams]
        first = 0  # number of the frontier's first node among `nodes`
        tokens: list[list[int]] = [[] for _ in beams]
        parents: list[list[int]] = [[] for _ in beams]
        for level in range(deepest):
            logits = align(logits, self.vocabulary).float()
            for row, nodes in enumerate(at):
                for beam, node in enumerate(nodes):
                    if node in known[row].logits:
                        logits[row, beam] = known[row].logits[node]
            log_probs = self._processed(logits.log_softmax(-1), paths)
            log_probs = log_probs.index_fill(2, self.eos, -torch.inf)  # an ended beam needs no continuation
            scores, index = (log_probs + scores[..., None]).flatten(1).topk(self.width)
            parent, token = index // log_probs.shape[-1], index % log_probs.shape[-1]
            made = [list(zip(*both, strict=True)) for both in zip(parent.tolist(), token.tolist(), strict=True)]
            for row, (found, values) in enumerate(zip(made, scores.tolist(), strict=True)):
                exact = 0
                places: list[int | None] = []
                for (above, one), score in zip(found, values, strict=True):
                    sure = at[row][above] >= 0  # scored by the target: behind num_beams of these nothing survives
                    node = place[row][above]
                    if (node is not None and level < limits[row] and exact < self.num_beams and score > -torch.inf
                            and score >= values[self.num_beams - 1] - UNLIKELY):
                        places.append(len(tokens[row]))
                        tokens[row].append(one)
                        parents[row].append(node)
                    else:
                        places.append(None)
                    exact += sure
                place[row] = places
                at[row] = [known[row].children.get((at[row][above], one), -1) for above, one in found]
                if paths[row]:
                    grow = level + 1 < limits[row]
                    texts = [[*paths[row][above], one] if grow and score > -torch.inf else paths[row][above]
                             for (above, one), score in zip(found, values, strict=True)]
                    longest = max(texts, key=len)
                    # The caller's code is not asked about impossible texts: another of that length stands for them.
                    paths[row] = [text if len(text) == len(longest) else longest for text in texts]
            if level + 1 < deepest:
                # A row near its end goes no deeper: there are no positions for it.
                goes = [level + 1 < limit for limit in limits]
                lengths = torch.tensor([self.width * deep for deep in goes], device=self.tree.device)
                block = leaves(token.clamp(max=self.known), parent + first)
                logits, more = self.tree.extend(self.nodes, replace(block, lengths=lengths, even=all(goes)))
                have = self.nodes.depth.shape[1]
                for row in [row for row, deep in enumerate(goes) if deep]:
                    found = made[row]
                    self.children[row] |= {(above + first, one): have + n for n, (above, one) in enumerate(found)}
                first, self.nodes = have, self.nodes.join(more)
        return Proposal(tokens, parents, None, [self.name] * rows, [""] * rows)

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Nothing to learn from the target."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.nodes = self.nodes.rows(self.tree.keep_rows(rows))
        self.rows, self.ends = [self.rows[i] for i in rows], [self.ends[i] for i in rows]
        self.seen, self.children = [self.seen[i] for i in rows], [self.children[i] for i in rows]

    def _catch_up(self, beams: Sequence[Beams]) -> Tensor:
        """Read what each beam has that the draft has not, what beams share once. Logits [rows, beams, …] after each
        beam's last token; `nodes` become these last tokens."""
        trees, last, have = [], [], self.nodes.depth.shape[1]
        for row, state in enumerate(beams):
            tokens: list[int] = []
            parents: list[int] = []
            children = self.children[row]
            for beam in range(self.num_beams):
                path, origins = state.past.last(beam, state.length - self.seen[row])
                node = self.ends[row][origins[0]]
                for token in path:
                    above, node = node, children.get((node, token), -1)
                    if node < 0:
                        node = children[above, token] = have + len(tokens)
                        tokens.append(min(token, self.known))
                        parents.append(above - have if above >= have else -1 - above)
                if node < have:  # read, but what the draft answered is forgotten
                    node = have + len(tokens)
                    tokens.append(min(path[-1], self.known))
                    parents.append(above - have if above >= have else -1 - above)
                last.append(node - have)
            trees.append((tokens, parents))
            self.ends[row], self.seen[row], self.children[row] = list(range(self.num_beams)), state.length, {}
        logits, nodes = self.tree.extend(self.nodes, branches(trees, self.tree.device))
        index = torch.tensor(last, device=self.tree.device).view(len(beams), -1)
        self.nodes = nodes.pick(index)
        return logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))

    def _processed(self, log_probs: Tensor, paths: list[list[list[int]]]) -> Tensor:
        """log_probs [rows, width, vocabulary] after each row's processors; paths[row][place]: what lies before."""
        processors, width = [row.processors for row in self.rows], log_probs.shape[1]
        if not any(processors):
            return log_probs
        # Some of transformers' processors count on a multiple of num_beams: the last beam is repeated.
        places = [min(place, width - 1) for place in range(width + -width % self.num_beams)]
        return process(log_probs[:, places], processors, lambda row, place: paths[row][places[place]])[:, :width]
