"""Models that run on OpenVINO for one test, with one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

import specbeam
from specbeam.runners import choose


@contextmanager
def on_openvino() -> Iterator[Callable[..., None]]:
    """What it gives makes models run there from now on; in the end they are eager again."""
    made: list[PreTrainedModel] = []

    def use(*models: PreTrainedModel) -> None:
        made.extend(models)
        assert [specbeam.use_runner(one, "openvino") for one in models] == ["openvino"] * len(models)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield use
    torch.set_num_threads(before)
    for one in made:
        choose.want_runner(one, "eager")
