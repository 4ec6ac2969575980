"""The loaded pair, and what it reads and answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from specbeam.errors import InputError

if TYPE_CHECKING:
    from specbeam.chat import RenderedBatch
    from specbeam.experiment.plan import PlannedMethod
    from specbeam.experiment.prompts import Conversation
    from specbeam.trace import GenerationOutput


class Models:
    """The loaded pair; `draft` is None when no method speculates. `same_vocabulary` asks for a pair that shares one,
    and then says whether this one does."""

    def __init__(
        self, target: str, draft: str | None, device: str | None, dtype: str | None, same_vocabulary: bool = True,
        runner: str | None = None, precision: str | None = None, device_map: Any = None,
        draft_precision: str | None = None,
    ):  # fmt: skip
        from transformers.utils import logging

        from specbeam import models

        # the run has its own progress, and says what matters itself
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        options: dict[str, Any] = {"device": device or "auto", "dtype": dtype or "auto", "runner": runner or "auto",
                                   "precision": precision, "device_map": device_map}
        self.draft = self.draft_tokenizer = None
        if draft is None:
            self.target, self.tokenizer = models.load_model(target, **options)
        else:
            self.target, self.draft, self.tokenizer, self.draft_tokenizer = models.load_pair_with_tokenizers(
                target, draft, same_vocabulary=same_vocabulary, draft_precision=draft_precision, **options
            )
            same_vocabulary = same_vocabulary or self.tokenizer.get_vocab() == self.draft_tokenizer.get_vocab()
        self.same_vocabulary = same_vocabulary
        self._broken: dict[tuple[int, ...], bool] = {}

    def check(self, methods: Sequence[PlannedMethod]) -> None:
        """Raises InputError for settings that this target cannot serve, whatever the prompt."""
        from specbeam.engine.runner import embedding
        from specbeam.engine.support import adapt
        from specbeam.experiment.plan import speculation_settings

        for method in methods:
            if method.kind not in ("speculative", "speculative_beam"):
                continue
            place, vocabulary = f"methods.{method.label}: " if method.label else "", embedding(self.target).shape[0]
            try:
                if (corpus := method.options.get("corpus")) is not None:
                    from specbeam.corpus import read_corpus

                    read_corpus(corpus, self.tokenizer, vocabulary)
                if method.kind == "speculative_beam":
                    continue
                settings = speculation_settings(
                    method.options, tokenizer=self.tokenizer, draft_tokenizer=self.draft_tokenizer
                )
                settings.check(self.draft)
                if settings.vocabulary in ("tli", "auto"):
                    from specbeam.drafting.cross_vocabulary import chosen, intersection
                    from specbeam.spelling import pair

                    both = pair(self.tokenizer, self.draft_tokenizer)
                    if chosen(settings, both) == "tli":
                        intersection(both, cast(Any, self.draft), vocabulary)
                if settings.drafter == "early_exit":
                    from specbeam.drafting.early_exit import exit_early

                    exit_early(self.target, settings.exit_layer)
                context = adapt(self.target).context
            except InputError as error:
                raise InputError(f"{place}{error}") from None
            if context is not None and settings.most_nodes >= context:
                raise InputError(
                    f"{place}a proposal may have {settings.most_nodes} nodes, but the target has a context of "
                    f"{context} positions: give smaller branching, tree_nodes or draft_length."
                )

    def runners(self) -> dict[str, str]:
        """Who runs target and draft; a model that only the baselines can run has none of ours."""
        from specbeam.engine.support import adapt

        used = {}
        for role, model in (("target", self.target), ("draft", self.draft)):
            with suppress(InputError):
                used[role] = "" if model is None else adapt(model).runner.name
        return {role: name for role, name in used.items() if name}

    def generate(
        self, method: PlannedMethod, batch: RenderedBatch, seeds: list[int], **changes: Any
    ) -> GenerationOutput:
        pair = (self.target, self.draft) if method.method.speculates else (self.target,)
        if method.options.get("vocabulary", "same") != "same":
            changes["draft_tokenizer"] = self.draft_tokenizer
        return method.method.load()(
            *pair,
            batch.input_ids,
            batch.attention_mask,
            tokenizer=self.tokenizer,
            seed=seeds,
            **{**method.options, **changes},
        )

    def refuse_nan(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Raises InputError where the target's logits for the answer's last token are NaN: a NaN anywhere before it
        reaches them by attention. One forward for each text, outside every timed region."""
        import inspect

        import torch

        text = (*prompt, *answer[:-1])
        if text not in self._broken:
            self._broken[text] = False
            with suppress(Exception), torch.inference_mode():  # too large to read at once: then nothing is known
                ids = torch.tensor([text], device=self.target.device)
                last = "logits_to_keep" in inspect.signature(self.target.forward).parameters
                wanted = {"logits_to_keep": 1} if last else {}
                logits = self.target(input_ids=ids, use_cache=False, **wanted).logits[:, -1]
                self._broken[text] = bool(logits.isnan().any())
        if self._broken[text]:
            raise InputError(f"{type(self.target).__name__} gives NaN for logits on this prompt or its answer: the "
                             "checkpoint is broken, or its dtype overflows; try dtype=float32.")

    def render(self, conversations: Sequence[Conversation], system_prompt: str | None) -> RenderedBatch:
        from specbeam.chat import render_prompt

        return render_prompt(self.tokenizer, conversations, system_prompt=system_prompt, device=self.target.device)
