"""A small model proposes, from its own tree and slots: one forward per depth.

Chains: Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318). Fixed trees: SpecInfer (Miao et
al. 2023, arXiv 2305.09781). Grown trees: EAGLE-2 (Li et al. 2024, arXiv 2406.16858), Sequoia (arXiv 2402.12374).
Idea: the draft runs ahead of the committed text. What the target rejected is simply no tip any more; the next round
first reads what the draft has not seen (one token, or two after a fully accepted chain).
Fixed shapes: with sampling, children are drawn without replacement. Grown trees keep the nodes of highest joint
probability: nothing is drawn, so that each is a function of its prefix.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specbeam.decoding.request import Request
from specbeam.drafting import Proposal, Settings
from specbeam.drafting.length import Length
from specbeam.engine.runner import embedding
from specbeam.engine.support import adapt, check_lengths
from specbeam.engine.tree import Block, Tips, TokenTree, chain, leaves
from specbeam.runners.chains import Chains, chains_of, shape_of
from specbeam.runners.graph import MOST_NEW
from specbeam.runners.host_chains import HostChains
from specbeam.sampling import Path, draw, process, uniforms


@dataclass(frozen=True)
class Shape:
    """What a draft model's proposals look like. branching: children per node at each depth ((1, 1, 1): a chain of
    three). nodes, when set: grow a tree of so many instead, as deep, `width` of them continued at each depth."""

    branching: tuple[int, ...]
    width: int = 4
    nodes: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Shape:
        return cls(settings.branching or (1,) * settings.depth, settings.tree_width, settings.tree_nodes)

    @property
    def depth(self) -> int:
        return len(self.branching)


def make(settings: Settings, target: PreTrainedModel, draft: PreTrainedModel, request: Request, vocabulary: int
         ) -> DraftModel:
    if settings.vocabulary != "same":
        from specbeam.drafting import cross_vocabulary

        return cross_vocabulary.make(settings, draft, request, vocabulary)
    return DraftModel(draft, request, Shape.of(settings), vocabulary)


class DraftModel:
    """Drafts for one batch."""

    name = "draft_model"

    def __init__(self, draft: PreTrainedModel, request: Request, shape: Shape, vocabulary: int):
        """Reads the prompts. vocabulary: width of the target's logits."""
        prompts = self._texts([row.prompt for row in request.rows])
        lengths, room = [len(prompt) for prompt in prompts], [row.max_new_tokens for row in request.rows]
        check_lengths(adapt(draft), lengths, room, role="draft")
        self.rows, self.shape, self.vocabulary = list(request.rows), shape, vocabulary
        self.draws = request.config.do_sample and not shape.nodes
        self.tree = TokenTree(adapt(draft), len(lengths), max(lengths) + max(room) + 2 * shape.depth)
        self.known = embedding(draft).shape[0]
        self.read = [0] * len(lengths)  # committed tokens behind each tip
        self.tips: Tips | None = None  # None: each at the end of a chain of so many
        self.chains: Chains | HostChains | None = None  # when the whole proposal is one recording, or numbers only
        self.ahead: list[int] | None = None  # how many tokens of the last proposal each row read, when it was
        self.followed: list[Tensor] | None = None  # a proposal that `follow` began
        self.drawn: list[Tensor] = []  # the generators' states before it
        self._read(prompts)  # makes `nodes`: of the last proposal, the committed text, then the nodes that were read
        self.tips = self.nodes
        if shape.branching == (1,) * shape.depth and not shape.nodes and type(self) is DraftModel:
            recorded = shape_of(self.tree.adapter, [row.processors for row in self.rows], self.draws)
            self.chains = chains_of(self.tree, recorded, reads=True)
            if isinstance(self.chains, HostChains) and not self.chains.numbers:
                self.chains = None
        self.numbers: list[list[int]] = []  # of each proposed token among `nodes`

    def propose(self, sequences: Sequence[list[int]], limits: Sequence[int], length: Length) -> Proposal:
        deepest = min(max(limits), self.shape.depth)
        if isinstance(self.chains, HostChains):
            return self._chain(self.chains, sequences, limits, deepest, length)
        logits = self._read(self._texts(sequences))
        if self.shape.nodes:
            return self._grow(sequences, limits, deepest, logits, length)

        rows = len(sequences)
        tokens: list[Tensor] = []  # per depth [rows, width]
        parents: list[int] = []
        q: list[Tensor] = []
        above = [-1]  # the frontier: numbers of the nodes whose children come next
        sure: list[list[float]] = [[] for _ in sequences]
        processed = any(row.processors for row in self.rows)
        wanted, counts, seen, forwards = [limit > 0 for limit in limits], [0] * rows, [0] * rows, 1
        for depth in range(deepest):
            # Only processors ask for it: else the next step need not wait for these tokens.
            drawn = torch.cat(tokens, 1).tolist() if tokens and processed else [[] for _ in sequences]
            paths = self._paths(sequences, drawn, [parents] * rows, [above] * rows)
            scores = self._scores(logits, paths)
            if length.asks:  # to stop is decided before a token is drawn, by its prefix alone
                largest = scores[:, 0].softmax(-1).amax(-1).tolist()
                wanted = length.proposes(wanted, largest)
                for row, confidence in enumerate(largest):
                    sure[row] += [confidence] * wanted[row]
            if not any(wanted):
                break
            children, weights = self._children(scores, self.shape.branching[depth], wanted)
            q.append(weights)
            first = len(parents)
            parents += [node for node in above for _ in range(self.shape.branching[depth])]
            tokens.append(children.flatten(1))
            above = list(range(first, len(parents)))
            counts = [len(parents) if here else n for here, n in zip(wanted, counts, strict=True)]
            wanted = length.reads_on([here and depth + 1 < limit for here, limit in zip(wanted, limits, strict=True)])
            if not any(wanted):
                break
            if depth + 1 < deepest:
                hang = [parents[node] + 1 for node in above]
                logits, forwards = self._extend(tokens[-1], hang, wanted), forwards + 1
                seen = [len(parents) if here else n for here, n in zip(wanted, seen, strict=True)]
        flat = torch.cat(tokens, 1).tolist() if tokens else [[]] * rows
        self.numbers = [[i + 1 if i < read else sys.maxsize for i in range(n)]
                        for n, read in zip(counts, seen, strict=True)]
        return Proposal(
            [ids[:n] for ids, n in zip(flat, counts, strict=True)], [parents[:n] for n in counts],
            torch.cat(q, 1) if self.draws and q else None, [self.name] * rows, list(length.why), sure, forwards)

    def _chain(self, chains: HostChains, sequences: Sequence[list[int]], limits: Sequence[int], deepest: int,
               length: Length) -> Proposal:
        """The same for chains of most probable tokens, in numpy."""
        last = self.known - 1
        new = [[min(token, last) for token in text[n:]] for text, n in zip(sequences, self.read, strict=True)]
        longest = max(map(len, new))
        logits = chains.read([[*ids, *[0] * (longest - len(ids))] for ids in new], self.read,
                             [len(ids) - 1 for ids in new])[:, 0, : self.vocabulary]
        self.read, self.ahead, self.tips = [len(text) for text in sequences], [0] * len(new), None
        proposed: list[list[int]] = [[] for _ in new]
        sure: list[list[float]] = [[] for _ in new]
        wanted, forwards = [limit > 0 for limit in limits], 1
        for step in range(deepest):
            best = logits.argmax(-1)
            if length.asks:
                logits -= np.maximum.reduce(logits, -1, keepdims=True)  # in place: nobody looks at them again
                largest = [1 / total for total in np.add.reduce(np.exp(logits, out=logits), -1).tolist()]
                wanted = length.proposes(wanted, largest)
                for row, confidence in enumerate(largest):
                    sure[row] += [confidence] * wanted[row]
            tokens = best.tolist()
            for row, token in enumerate(tokens):
                proposed[row] += [token] * wanted[row]
            wanted = length.reads_on([here and step + 1 < limit for here, limit in zip(wanted, limits, strict=True)])
            if not any(wanted):
                break
            forwards += 1
            logits = chains.read([[min(token, last)] for token in tokens], [n + step for n in self.read])[
                :, 0, : self.vocabulary]
            self.ahead = [step + 1 if here else n for here, n in zip(wanted, self.ahead, strict=True)]
        return Proposal(proposed, [list(range(-1, len(ids) - 1)) for ids in proposed], None, [self.name] * len(new),
                        list(length.why), sure, forwards)

    def _grow(self, sequences: Sequence[list[int]], limits: Sequence[int], deepest: int, logits: Tensor,
              length: Length) -> Proposal:
        """The `nodes` most probable nodes of a tree of which `width` nodes are continued at each depth.

        A node's worth is the draft's probability of its whole path: never above its parent's, so that the best nodes
        with their parents are always a tree.
        """
        rows, device, width = len(sequences), self.tree.device, self.shape.width
        tokens = torch.empty(rows, 0, dtype=torch.long, device=device)
        parents, numbers, depths = tokens, tokens, tokens  # of all candidates: parent, number among `nodes`, depth
        worth = torch.empty(rows, 0, device=device)
        above = torch.full((rows, 1), -1, device=device)
        for depth in range(deepest):
            paths = self._paths(sequences, tokens.tolist(), parents.tolist(), above.tolist())
            scores = self._scores(logits, paths).log_softmax(-1)
            best = scores.topk(min(width, scores.shape[-1]))
            so_far = worth.gather(1, above) if depth else torch.zeros_like(best.values[..., 0])
            joint = (best.values + so_far[..., None]).flatten(1)
            first = tokens.shape[1]
            tokens = torch.cat([tokens, best.indices.flatten(1)], 1)
            parents = torch.cat([parents, above[..., None].expand_as(best.indices).flatten(1)], 1)
            numbers = torch.cat([numbers, torch.full_like(joint, -1, dtype=torch.long)], 1)
            depths = torch.cat([depths, torch.full_like(joint, depth, dtype=torch.long)], 1)
            worth = torch.cat([worth, joint], 1)
            if depth + 1 < deepest:
                above = joint.topk(min(width, joint.shape[1])).indices + first
                at = numbers.gather(1, parents.gather(1, above).clamp(min=0)) * (depth > 0)
                numbers.scatter_(1, above, torch.arange(above.shape[1], device=device).expand(rows, -1)
                                 + self.nodes.depth.shape[1])
                logits = self._extend(tokens.gather(1, above), at, [depth + 1 < limit for limit in limits])
        allowed = depths < torch.tensor(limits, device=device)[:, None]
        order = worth.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        proposed: tuple[list[list[int]], list[list[int]]] = ([], [])
        self.numbers = []
        for row, (ids, above_of, number) in enumerate(zip(tokens.tolist(), parents.tolist(), numbers.tolist(),
                                                          strict=True)):
            found = int(allowed[row].sum())
            count = min(self.shape.nodes, found)
            if found > count:
                length.why[row] = "node budget"
            chosen = sorted(order[row, :count].tolist())
            place = {-1: -1} | {node: i for i, node in enumerate(chosen)}
            proposed[0].append([ids[node] for node in chosen])
            proposed[1].append([place[above_of[node]] for node in chosen])
            self.numbers.append([number[node] if number[node] > 0 else sys.maxsize for node in chosen])
        return Proposal(*proposed, None, [self.name] * rows, list(length.why), forwards=deepest)

    def begin(self, sequences: Sequence[list[int]], limits: Sequence[int]) -> list[Tensor] | None:
        """In place of `propose`, where the runner records it: chains of full length [rows, depth] on their way, and
        what they were drawn from; None: not here."""
        if not isinstance(self.chains, Chains):
            return None
        depth, found = self.shape.depth, self.followed
        if found is None:
            new = [text[n:] for text, n in zip(sequences, self.read, strict=True)]
            if max(map(len, new)) > MOST_NEW:
                return None
            found = self.chains.propose(new, self.read, sequences, depth, self.vocabulary, self.known,
                                        self._uniforms([min(limit, depth) for limit in limits]))
        self.followed = None
        self.read, self.ahead = [len(text) for text in sequences], [depth - 1] * len(sequences)
        return found

    def follow(self, unread: Tensor, longest: int) -> None:
        """Begin what `begin` will give next, for rows that will all propose their whole length, from what a
        verification left (Chains.unread), behind texts of at most so many tokens. It is dropped when rows leave or
        join."""
        assert isinstance(self.chains, Chains)
        depth = self.shape.depth
        self.drawn = [row.generator.get_state() for row in self.rows] if self.draws else []
        self.followed = self.chains.follow(unread, longest + depth + 1, depth, self.vocabulary, self.known,
                                           self._uniforms([depth] * len(self.rows)))

    def _uniforms(self, counts: Sequence[int]) -> Tensor | None:
        """What a whole proposal draws with, if it draws; each row takes as many numbers as it may propose."""
        if not self.draws:
            return None
        uniform = uniforms([row.generator for row in self.rows], counts, torch.device("cpu"))
        return torch.nn.functional.pad(uniform, (0, self.shape.depth - uniform.shape[1]))

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        if self.ahead is not None:
            self.read = [n + min(len(path), ahead) for n, path, ahead in zip(self.read, paths, self.ahead, strict=True)]
            self.tips, self.ahead = None, None
            return
        read = self.nodes.depth.shape[1]
        tip = []
        for row, path in enumerate(paths):
            known = [self.numbers[row][node] for node in path if self.numbers[row][node] < read] if path else []
            tip.append(known[-1] if known else 0)
            self.read[row] += len(known)
        self.tips = self.nodes.pick(torch.tensor(tip, device=self.tree.device)[:, None])

    def observe(self, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Nothing to learn from the target."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._forget()
        kept = self.tree.keep_rows(rows)
        self.tips = self.tips and self.tips.rows(kept)
        self.rows, self.read = [self.rows[i] for i in rows], [self.read[i] for i in rows]

    def join(self, more: DraftModel) -> None:
        self._forget()
        self.tips = self.tree.join(self.tips or self.tree.tips(self.read), more.tree,
                                   more.tips or more.tree.tips(more.read))
        self.rows, self.read = self.rows + more.rows, self.read + more.read

    def _forget(self) -> None:
        if self.chains is not None:
            self.chains.forget()
        if self.followed is not None:  # as if it had not drawn
            for row, state in zip(self.rows, self.drawn, strict=False):
                row.generator.set_state(state)
            self.followed = None

    def _texts(self, sequences: Sequence[list[int]]) -> Sequence[list[int]]:
        """Committed texts in the draft's tokens."""
        return sequences

    def _read(self, texts: Sequence[list[int]]) -> Tensor:
        """The draft's logits [rows, 1, its vocabulary] after each committed text, of which it reads what is new.

        An id it has no embedding for (Gemma 3 4B's image token, which its 270M draft lacks) becomes another; that
        costs acceptance there and nothing else."""
        new = [[min(token, self.known - 1) for token in text[n:]] for text, n in zip(texts, self.read, strict=True)]
        unread = chain(new, self.tree.device)
        logits, nodes = self.tree.extend(self.tips or self.tree.tips(self.read), unread, last_only=True)
        self._forget()
        self.nodes = nodes.pick(unread.lengths[:, None] - 1)
        self.read = [len(text) for text in texts]
        return logits

    def _extend(self, tokens: Tensor, hang: Tensor | list[int], wanted: Sequence[bool]) -> Tensor:
        """Read new nodes [rows, width] below `nodes` number hang [rows, width] (a list: the same of every row); they
        join `nodes`."""
        rows, width = tokens.shape
        chained = False
        if isinstance(hang, list):
            chained = hang == [self.nodes.depth.shape[1] - 1]
            hang = torch.tensor(hang, device=self.tree.device).expand(rows, -1)
        lengths = None if all(wanted) else torch.tensor(wanted, device=self.tree.device).long() * width
        block: Block
        if chained:
            block = replace(chain(tokens, self.tree.device, lengths), tip=hang)
        else:
            block = leaves(tokens, hang)
            block = block if lengths is None else replace(block, lengths=lengths, even=False)
        logits, more = self.tree.extend(self.nodes, block)
        self.nodes = self.nodes.join(more)
        return logits

    def _paths(self, sequences: Sequence[list[int]], tokens: list[list[int]], parents: list[list[int]],
               above: list[list[int]]) -> Path:
        """What lies before each frontier node's children: the committed text and the node's own path."""

        def path(row: int, place: int) -> list[int]:
            steps, node = [], above[row][place]
            while node >= 0:
                steps.append(tokens[row][node])
                node = parents[row][node]
            return [*sequences[row], *reversed(steps)]

        return path

    def _children(self, scores: Tensor, count: int, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Tokens [rows, frontier, count] below each frontier node, and what they were drawn from."""
        if not self.draws:
            best = scores.argmax(-1, keepdim=True) if count == 1 else scores.topk(count).indices
            return best, scores
        q = scores.softmax(-1)
        rows, width, _ = q.shape
        numbers = uniforms([row.generator for row in self.rows], [width * count * int(w) for w in wanted], q.device)
        if not numbers.shape[1]:
            numbers = numbers.new_zeros(rows, width * count)
        left, children = q.flatten(0, 1).clone(), []
        for turn in range(count):
            # Fewer tokens than children: the rest repeat, which no acceptance rule will take for a new one.
            none = left.sum(1, keepdim=True) <= 0
            weights = torch.where(none, q.flatten(0, 1), left)
            token = draw(weights, numbers.view(rows, width, count)[..., turn].flatten())
            children.append(token.view(rows, width))
            left.scatter_(1, token[:, None], 0.0)  # without replacement
        return torch.stack(children, -1), q

    def _scores(self, logits: Tensor, paths: Path) -> Tensor:
        """Scores [rows, frontier, target vocabulary] after the target's own processors."""
        return process(align(logits, self.vocabulary), [row.processors for row in self.rows], paths)


def align(logits: Tensor, vocabulary: int) -> Tensor:
    """Draft logits at the target's width: ids the draft lacks have probability 0, ids the target lacks are never
    proposed. Widths of one family differ by padding (Qwen2.5: 151,936 and 152,064)."""
    missing = vocabulary - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits[..., :vocabulary]
