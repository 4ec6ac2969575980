"""Training of the bundled pair: the target on text, its own answers, the draft on the target's distributions.

The models are transformers' Llama. Training runs its layers over packed rows, with one attention function
registered for that: FlexAttention with a block mask on a GPU, sdpa with a dense mask on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pair_data import (
    ASSISTANT_ID,
    BEGIN_ID,
    CONTEXT_LENGTH,
    END_ID,
    PAD_ID,
    PASSES_PER_SOURCE,
    SYSTEM_ID,
    USER_ID,
    VOCABULARY_SIZE,
    Corpus,
    draw_documents,
    pack_rows,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch._dynamo.config.recompile_limit = 64


@dataclass(frozen=True)
class Shape:
    """Size of one Llama; head dimension 64."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    intermediate: int


@dataclass(frozen=True)
class Training:
    """How one model is trained. dropout acts on what each layer adds to the residual stream."""

    passes: float
    rows_per_step: int
    row_length: int
    learning_rate: float
    dropout: float
    weight_decay: float = 0.1
    evaluate_every: int = 200
    patience: int = 10
    max_seconds: float | None = None


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Attention over packed rows; attention_mask is a BlockMask (GPU) or a bool tensor [batch, 1, row, row]."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, Tensor):
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    else:
        out = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", packed_attention)


def new_model(shape: Shape, seed: int, attention: str = "packed") -> LlamaForCausalLM:
    """A fresh fp32 Llama with tied embeddings; what a layer adds starts at zero."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=64,
        intermediate_size=shape.intermediate,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def new_draft(shape: Shape, target, seed: int) -> LlamaForCausalLM:
    """A fresh draft; where it is as wide as the target it begins with the target's embeddings."""
    draft = new_model(shape, seed)
    if shape.hidden == target.config.hidden_size:
        draft.lm_head.weight.data.copy_(target.lm_head.weight.data)
    return draft


def layer_step(layer, hidden: Tensor, mask, cos: Tensor, sin: Tensor, dropout: float) -> Tensor:
    out = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
    return hidden + F.dropout(out - hidden, dropout) if dropout else out


def weighted_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight x -log p(label). hidden [rows, row, width], head [vocabulary, width]."""
    logits = F.linear(hidden, head).flatten(0, 1).float()
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def distillation_loss(hidden: Tensor, head: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of the loss, of KL(target || draft), and of "the two argmaxes agree".

    hidden [tokens, width], head [vocabulary, width], teacher: logits [tokens, vocabulary], weights [tokens].

    The loss is half forward KL (Hinton et al. 2015; DistillSpec, Zhou et al. 2023) and half cross entropy of
    the target's argmax, the token that greedy verification asks for.
    """
    logits, teacher = F.linear(hidden, head).float(), teacher.float()
    draft_log, target_log = F.log_softmax(logits, -1), F.log_softmax(teacher, -1)
    divergence = (target_log.exp() * (target_log - draft_log)).sum(-1)
    best = teacher.argmax(-1)
    greedy = -draft_log.gather(-1, best[:, None])[:, 0]
    agreed = (logits.argmax(-1) == best).float()
    loss = 0.5 * divergence + 0.5 * greedy
    return (loss * weights).sum(), (divergence * weights).sum(), (agreed * weights).sum()


@dataclass(frozen=True)
class Machine:
    """Where we train and which functions are compiled for it (on a GPU; a CPU runs them as they are)."""

    device: torch.device
    layer_step: Callable
    cross_entropy: Callable
    distillation: Callable

    @staticmethod
    def of(device: str) -> Machine:
        cuda = device == "cuda"
        compiled = (lambda f: torch.compile(f, dynamic=False)) if cuda else (lambda f: f)
        return Machine(
            torch.device(device),
            compiled(layer_step),
            compiled(weighted_cross_entropy),
            compiled(distillation_loss),
        )

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def mask(self, documents: Tensor):
        """Causal within each document. documents: [rows, row], the number of the document of every token."""
        rows, length = documents.shape
        if self.device.type == "cuda":

            def visible(row, head, query, key):
                return (query >= key) & (documents[row, query] == documents[row, key])

            return create_block_mask(visible, rows, None, length, length, device=self.device)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]

    def hidden_states(self, model, tokens: Tensor, mask, positions: Tensor, dropout: float = 0.0) -> Tensor:
        """Final hidden states of packed rows, [rows, row, width] in bf16."""
        body = model.model
        hidden = body.embed_tokens(tokens).to(torch.bfloat16)
        cos, sin = body.rotary_emb(hidden, position_ids=positions)
        for layer in body.layers:
            hidden = self.layer_step(layer, hidden, mask, cos, sin, dropout)
        return body.norm(hidden).to(torch.bfloat16)


def unpack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Document numbers and positions of every token, both [rows, row], from where documents begin."""
    begins = rows == BEGIN_ID
    index = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return begins.cumsum(1), index - torch.where(begins, index, 0).cummax(1).values


def loss_weights(rows: Tensor, user_weight: float) -> tuple[Tensor, Tensor]:
    """Labels (the next token) and their weights, both [rows, row].

    Assistant turns with their end, and prose, count 1; user turns `user_weight`; system prompts, role
    markers, padding and the step into the next document 0.
    """
    marker = (rows == BEGIN_ID) | (rows == SYSTEM_ID) | (rows == USER_ID) | (rows == ASSISTANT_ID)
    index = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    role = rows.gather(1, torch.where(marker, index, 0).cummax(1).values)
    weights = (role == ASSISTANT_ID).float() + (role == BEGIN_ID).float() + user_weight * (role == USER_ID).float()
    weights = weights * ~marker * (rows != PAD_ID)
    last = torch.full_like(rows[:, :1], PAD_ID)
    return torch.cat([rows[:, 1:], last], 1), torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], 1)


def pass_rows(files: tuple[tuple[Path, float], ...], row_length: int, seed: int, number: int) -> np.ndarray:
    """Rows of one weighted pass over several corpora (file, share of it), the same for the same arguments."""
    rng = np.random.default_rng((seed, number))
    packed = []
    for path, share in files:
        corpus = Corpus.load(path)
        passes = {name: share * PASSES_PER_SOURCE.get(name, 1.0) for name in corpus.names}
        packed.append(pack_rows(corpus, draw_documents(corpus, passes, rng), row_length, rng))
    return rng.permutation(np.concatenate(packed))


def steps_from(
    files: tuple[tuple[Path, float], ...], how: Training, seed: int, number: int, offset: int
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """`(pass, offset after this step, rows in the pass, rows of the step)` without end.

    The next pass is packed by a second process meanwhile.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        coming = worker.submit(pass_rows, files, how.row_length, seed, number)
        while True:
            rows = coming.result()
            coming = worker.submit(pass_rows, files, how.row_length, seed, number + 1)
            if len(rows) < how.rows_per_step:
                rows = np.resize(rows, (how.rows_per_step, how.row_length))
            while offset + how.rows_per_step <= len(rows):
                step = rows[offset : offset + how.rows_per_step]
                offset += how.rows_per_step
                yield number, offset, len(rows), step
            number, offset = number + 1, 0


def optimisers_of(model, how: Training, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms, one learning rate for both."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(matrices, lr=how.learning_rate, weight_decay=how.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            others, lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        ),
    ]


def learning_rate_factor(progress: float) -> float:
    """Warm-up over 2 %, constant to 50 %, then linearly down to zero."""
    return min(1.0, progress / 0.02 + 1e-3, max(0.0, (1.0 - progress) / 0.5))


def held_out_rows(corpus: Corpus, row_length: int, multiple: int) -> np.ndarray:
    """All documents of a corpus once, the number of rows filled up to a multiple."""
    rows = pack_rows(corpus, np.arange(len(corpus)), row_length, np.random.default_rng(0))
    padding = np.full((-len(rows) % multiple, row_length), PAD_ID, np.uint16)
    return np.concatenate([rows, padding])


def on_device(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.astype(np.int32)).to(device, non_blocking=True).long()


def save_checkpoint(path: Path, state: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    model,
    step_loss: Callable[[Tensor, bool], tuple[Tensor, ...]],
    files: tuple[tuple[Path, float], ...],
    held_out: Corpus,
    how: Training,
    machine: Machine,
    checkpoint: Path,
    seed: int,
    say: Callable[[str], None],
) -> dict:
    """Train until the passes, the seconds or the patience are over; leave the best weights in `model`.

    step_loss(rows [rows_per_step, row], training) gives (sum of losses, sum of weights, further sums to
    report over the weights). Held-out loss decides what is best. Returns a record of the run.
    """
    model.to(machine.device).train()
    optimisers = optimisers_of(model, how, machine.device)
    history: list[dict] = []
    step, number, offset, elapsed, best, worse = 0, 0, 0, 0.0, math.inf, 0
    best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=machine.device, weights_only=False)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, number, offset, elapsed = state["step"], state["pass"], state["offset"], state["elapsed"]
        best, worse, best_weights, history = (
            state["best"],
            state["worse"],
            state["best_weights"],
            state["history"],
        )
        say(f"goes on from step {step}")
    torch.manual_seed(seed + step)
    held_rows = held_out_rows(held_out, how.row_length, how.rows_per_step)

    def evaluate() -> list[float]:
        totals = None
        with torch.no_grad():
            for at in range(0, len(held_rows), how.rows_per_step):
                part = on_device(held_rows[at : at + how.rows_per_step], machine.device)
                sums = torch.stack([value.double() for value in step_loss(part, False)])
                totals = sums if totals is None else totals + sums
        assert totals is not None
        return (totals / totals[1]).tolist()

    begun, spoken, saved_at = time.monotonic() - elapsed, step, time.monotonic()
    spoken_time, recent = time.monotonic(), []
    for now_pass, now_offset, rows_in_pass, rows in steps_from(files, how, seed, number, offset):
        if step == 0:
            begun = time.monotonic()  # packing the first pass is not training
        planned = math.ceil(how.passes * (rows_in_pass // how.rows_per_step))
        progress = step / planned
        if how.max_seconds:
            progress = max(progress, (time.monotonic() - begun) / how.max_seconds)
        if progress >= 1:
            break
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = how.learning_rate * learning_rate_factor(progress)
        sums = step_loss(on_device(rows, machine.device), True)
        loss = sums[0] / sums[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        step += 1
        due = step % how.evaluate_every == 0 or step == planned or step == 10
        if due:
            figures = evaluate()
            seconds = time.monotonic() - begun
            rate = (step - spoken) * rows.size / (time.monotonic() - spoken_time)
            mean = torch.stack(recent).mean().item()
            history.append({"step": step, "pass": now_pass, "train": mean, "held_out": figures, "seconds": seconds})
            others = " ".join(f"{figure:.4f}" for figure in figures[2:])
            say(
                f"step {step}/{planned} pass {now_pass} progress {progress:.3f} train {mean:.4f} "
                f"held-out {figures[0]:.4f} {others} | {rate:,.0f} tokens/s {seconds:.0f} s"
            )
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is not a number at step {step}; lower the learning rate")
            spoken, spoken_time, recent = step, time.monotonic(), []
            worse = 0 if figures[0] < best else worse + 1
            if figures[0] < best:
                best = figures[0]
                best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if time.monotonic() - saved_at > 60 or step == planned:
            number, offset = now_pass, now_offset
            save_checkpoint(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimisers": [o.state_dict() for o in optimisers],
                    "step": step,
                    "pass": number,
                    "offset": offset,
                    "elapsed": time.monotonic() - begun,
                    "best": best,
                    "worse": worse,
                    "best_weights": best_weights,
                    "history": history,
                },
            )
            saved_at = time.monotonic()
        if worse > how.patience:
            say(f"held-out loss has not fallen for {worse} evaluations: stopping")
            break
    figures = evaluate()
    if figures[0] < best:
        best, best_weights = figures[0], model.state_dict()
    model.load_state_dict(best_weights)
    return {
        "steps": step,
        "seconds": time.monotonic() - begun,
        "held_out": best,
        "last": figures,
        "history": history,
    }


def target_loss(model, machine: Machine, how: Training, user_weight: float):
    """`step_loss` for plain language modelling; held-out loss counts assistant turns and prose only."""

    def step_loss(rows: Tensor, training: bool) -> tuple[Tensor, ...]:
        documents, positions = unpack_rows(rows)
        labels, weights = loss_weights(rows, user_weight if training else 0.0)
        with machine.autocast():
            hidden = machine.hidden_states(
                model, rows, machine.mask(documents), positions, how.dropout if training else 0.0
            )
            return machine.cross_entropy(hidden, model.lm_head.weight, labels, weights), weights.sum()

    return step_loss


def draft_loss(draft, target, machine: Machine, counted: float):
    """`step_loss` for distillation; reports KL and how often the argmaxes agree beside the loss.

    Only answers and prose count, and only there are logits computed: `counted` is the largest share of a step's tokens
    that can be (more would be left out).
    """

    def step_loss(rows: Tensor, training: bool) -> tuple[Tensor, ...]:
        documents, positions = unpack_rows(rows)
        _, weights = loss_weights(rows, 0.0)
        places = torch.argsort(weights.flatten() == 0, stable=True)[: math.ceil(counted * rows.numel())]
        weights = weights.flatten()[places]
        mask = machine.mask(documents)
        with machine.autocast():
            with torch.no_grad():
                hidden = machine.hidden_states(target, rows, mask, positions)
                hidden = hidden.flatten(0, 1)[places].float()
                with torch.autocast(machine.device.type, enabled=False):  # in bf16 many of its arg-maxes are ties
                    teacher = F.linear(hidden, target.lm_head.weight)
            hidden = machine.hidden_states(draft, rows, mask, positions).flatten(0, 1)[places]
            loss, divergence, agreed = machine.distillation(hidden, draft.lm_head.weight, teacher, weights)
        return loss, weights.sum(), divergence.detach(), agreed

    return step_loss
