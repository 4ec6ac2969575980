"""ONNX Runtime GenAI: plain, beams, batches.

Convert (in its own environment, requirements-onnxruntime.txt):
    python -m onnxruntime_genai.models.builder -i WORK/target -o WORK/onnxruntime/target -p fp32 -e cpu
Ragged batches are padded on the right.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import onnxruntime_genai as genai
from protocol import EOS, PAD, serve


def generate(model: genai.Model, beams: int, prompts: list[list[int]], new: int) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=width + new, batch_size=len(prompts), num_beams=beams, do_sample=False,
                              num_return_sequences=1, early_stopping=False)  # fmt: skip
    generator = genai.Generator(model, params)
    ids = np.array([prompt + [PAD] * (width - len(prompt)) for prompt in prompts], dtype=np.int32)
    generator.append_tokens(ids if len(prompts) > 1 else ids[0])
    while not generator.is_done():
        generator.generate_next_token()
    return [answer(generator.get_sequence(row)[width:]) for row in range(len(prompts))]


def answer(tokens: np.ndarray) -> list[int]:
    """Up to the end of the text: finished rows of a batch are filled up."""
    found = list(map(int, tokens))
    return found[: found.index(EOS) + 1] if EOS in found else found


def main(work: str) -> None:
    model = genai.Model(f"{work}/onnxruntime/target")
    plain = partial(generate, model, 1)
    serve("ONNX Runtime GenAI", genai.__version__,
          {"plain": plain, "beams 4": partial(generate, model, 4), "plain, batch": plain})  # fmt: skip


main(sys.argv[1])
