"""Many short answers at once: the target's decoding step for thousands of rows, one CUDA graph per shape.

Prompts lie left-padded in one static cache; rows that have ended make room (the rest moves to fewer rows). A graph
serves one number of rows and one width of the cache, so that a step reads little more than what is there. On a CPU
the same step runs as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pair_data import END_ID, PAD_ID
from torch import Tensor

LOOK_EVERY = 8  # steps between two looks at which rows have ended: each waits for the GPU


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Sampler:
    """A Llama's weights, and the buffers of one batch. rows: the most at once; width: prompt and answer, the most."""

    def __init__(self, model, rows: int, width: int):
        config = model.config
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.epsilon, self.embedding, self.norm = config.rms_norm_eps, model.lm_head.weight, model.model.norm.weight
        self.layers = [
            Layer(
                one.input_layernorm.weight,
                torch.cat([one.self_attn.q_proj.weight, one.self_attn.k_proj.weight, one.self_attn.v_proj.weight]),
                one.self_attn.o_proj.weight,
                one.post_attention_layernorm.weight,
                torch.cat([one.mlp.gate_proj.weight, one.mlp.up_proj.weight]),
                one.mlp.down_proj.weight,
            )
            for one in model.model.layers
        ]
        self.head = self.embedding.float()
        self.rows, self.width = rows, width
        device, dtype = model.device, model.dtype
        self.device = device
        places = torch.arange(width, device=device)[None]
        # Left-padded rows count their positions from the first slot: rotary embeddings know distances only.
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1, dtype=torch.float32, device=device), places)
        self.cos, self.sin = cos[0].to(dtype), sin[0].to(dtype)
        self.cache = torch.zeros(len(self.layers), 2, rows, self.groups, width, self.size, dtype=dtype, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.temperatures = torch.zeros(rows, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # the slot that the coming step writes
        self.answers = torch.zeros(rows, width, dtype=torch.long, device=device)  # by slot
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.no_grad()
    def answer(self, prompts: list[np.ndarray], temperatures: np.ndarray, new_tokens: int) -> list[np.ndarray]:
        """Each prompt with its answer, END included. temperatures: [prompts], 0 is greedy."""
        count, prompt_width = len(prompts), max(map(len, prompts))
        if count > self.rows or prompt_width + new_tokens > self.width:
            raise ValueError(f"{count} prompts of {prompt_width} tokens do not fit {self.rows} rows of {self.width}")
        ids = np.full((count, prompt_width), PAD_ID, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[prompt_width - len(prompt) :] = prompt
        rows = min(self.rows, _above(count))
        self.starts[:count] = torch.tensor([prompt_width - len(prompt) for prompt in prompts], device=self.device)
        self.temperatures[:count] = torch.from_numpy(temperatures.astype(np.float32)).to(self.device)
        self.starts[count:rows], self.temperatures[count:rows] = 0, 0.0
        self.done[:rows] = torch.arange(rows, device=self.device) >= count
        self.tokens[count:rows] = PAD_ID
        self._read(torch.from_numpy(ids).to(self.device))
        self.place.fill_(prompt_width)
        found = torch.full((count, new_tokens), END_ID, dtype=torch.long, device=self.device)
        owner = torch.arange(rows, device=self.device)
        for step in range(1, new_tokens):
            if step % LOOK_EVERY == 0:
                alive = int((~self.done[:rows]).sum())
                if not alive:
                    break
                if (fewer := _above(alive)) < rows:
                    self._keep(found, owner[:rows], prompt_width, prompt_width + step)
                    index = torch.argsort(self.done[:rows].int(), stable=True)[:fewer]
                    self._move(index, prompt_width + step)
                    owner, rows = owner[index], fewer
            self._step(rows, prompt_width + step)
        self._keep(found, owner[:rows], prompt_width, prompt_width + new_tokens)
        whole = []
        for prompt, answer in zip(prompts, found.cpu().numpy(), strict=True):
            end = np.flatnonzero(answer == END_ID)
            whole.append(np.concatenate([prompt, answer[: end[0] + 1] if len(end) else answer]))
        return whole

    def _keep(self, found: Tensor, owner: Tensor, begin: int, end: int) -> None:
        real = owner < len(found)
        found[owner[real], : end - begin] = self.answers[: len(owner), begin:end][real]

    def _move(self, index: Tensor, filled: int) -> None:
        """Go on with these rows only, in this order."""
        count = len(index)
        for layer in self.cache:
            for half in layer:
                half[:count, :, :filled] = half[index, :, :filled]
        for state in (self.tokens, self.starts, self.temperatures, self.done, self.answers):
            state[:count] = state[index]

    def _read(self, ids: Tensor) -> None:
        """Fill the cache with prompts [rows, tokens], left-padded, and choose each row's first token."""
        rows, width = ids.shape
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        own = torch.eye(width, dtype=torch.bool, device=self.device)
        places = torch.arange(width, device=self.device)
        part = max(1, 131_072 // width)
        for at in range(0, rows, part):
            some = slice(at, min(at + part, rows))
            real = places >= self.starts[some, None]
            mask = (causal & real[:, None] | own)[:, None]  # a pad sees itself: a row without keys would be NaN
            hidden = F.embedding(ids[some], self.embedding)
            for number, layer in enumerate(self.layers):
                q, k, v = self._qkv(layer, hidden, self.cos[:width], self.sin[:width])
                self.cache[number, 0, some, :, :width], self.cache[number, 1, some, :, :width] = k, v
                heads = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
                hidden = self._after(layer, hidden, heads.transpose(1, 2).flatten(2))
            self._choose(some, hidden[:, -1])
        self.answers[:rows, width] = self.tokens[:rows]

    def _step(self, rows: int, filled: int) -> None:
        """One token for each of the first rows; `filled` slots are read or written."""
        width = min(self.width, -(-filled // 32) * 32)
        if self.device.type != "cuda":
            self._forward(rows, width)
            return
        if (rows, width) not in self.graphs:
            # What is recorded is also run once before, on the side: both times into buffers that the replay fills anew.
            saved = [state.clone() for state in (self.tokens, self.done, self.place)]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._forward(rows, width)
            torch.cuda.current_stream().wait_stream(side)
            for state, before in zip((self.tokens, self.done, self.place), saved, strict=True):
                state.copy_(before)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._forward(rows, width)
            self.graphs[rows, width] = graph
        self.graphs[rows, width].replay()

    def _forward(self, rows: int, width: int) -> None:
        places = torch.arange(width, device=self.device)
        seen = (places >= self.starts[:rows, None]) & (places <= self.place)
        bias = torch.where(seen, 0.0, -1e30).repeat_interleave(self.groups, 0)[:, None]
        cos, sin = self.cos[self.place], self.sin[self.place]
        hidden = F.embedding(self.tokens[:rows], self.embedding)[:, None]
        for number, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, hidden, cos, sin)
            keys, values = self.cache[number, 0, :rows], self.cache[number, 1, :rows]
            keys.index_copy_(2, self.place, k)
            values.index_copy_(2, self.place, v)
            # Queries of one group as rows of one product with its keys.
            q = q.reshape(rows * self.groups, self.heads // self.groups, self.size)
            scores = torch.bmm(q, keys.flatten(0, 1)[:, :width].transpose(1, 2)).float() * self.size**-0.5 + bias
            heads = torch.bmm(scores.softmax(-1).to(q.dtype), values.flatten(0, 1)[:, :width])
            hidden = self._after(layer, hidden, heads.view(rows, 1, -1))
        self._choose(slice(0, rows), hidden[:, 0])
        self.place += 1
        self.answers[:rows].index_copy_(1, self.place, self.tokens[:rows, None])

    def _choose(self, some: slice, hidden: Tensor) -> None:
        """The arg-max of logits with Gumbel noise of each row's temperature: a draw from the softmax at it."""
        # Not in bf16, whose steps at a logit of 20 are an eighth: many arg-maxes would be ties.
        logits = F.linear(self._normal(hidden, self.norm).float(), self.head)
        noise = -torch.empty_like(logits).exponential_().clamp_(min=1e-20).log_()
        self.tokens[some] = (logits + self.temperatures[some, None] * noise).argmax(-1)
        self.done[some] |= self.tokens[some] == END_ID

    def _qkv(self, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [rows, heads, tokens, size], keys and values [rows, groups, tokens, size], rotated."""
        whole = F.linear(self._normal(hidden, layer.attention_norm), layer.qkv)
        whole = whole.unflatten(-1, (self.heads + 2 * self.groups, self.size)).transpose(1, 2)
        turned, values = whole.split((self.heads + self.groups, self.groups), 1)
        low, high = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-high, low], -1) * sin
        queries, keys = turned.split((self.heads, self.groups), 1)
        return queries, keys, values

    def _after(self, layer: Layer, hidden: Tensor, heads: Tensor) -> Tensor:
        hidden = hidden + F.linear(heads, layer.out)
        gate, up = F.linear(self._normal(hidden, layer.mlp_norm), layer.gate_up).chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, layer.down)

    def _normal(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], weight, self.epsilon)


def _above(count: int) -> int:
    """The next power of two, or one and a half times one: so many rows a graph is made for."""
    power = 1 << max(count - 1, 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power
