"""OpenVINO GenAI: plain, with a draft model, prompt lookup, beams, batches.

Convert (in a virtual environment of its own, requirements-openvino-convert.txt, torchvision removed afterwards):
    optimum-cli export openvino -m WORK/target --task text-generation-with-past --weight-format fp32 \\
        WORK/openvino/target
Exact only with both precision hints: without them it computes in bf16 and keeps its cache in 8 bits.
"""

from __future__ import annotations

import sys

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import PAD, Generate, serve

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def inputs(prompts: list[list[int]]) -> genai.TokenizedInputs:
    width = max(len(prompt) for prompt in prompts)
    ids = [[PAD] * (width - len(prompt)) + prompt for prompt in prompts]
    seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return genai.TokenizedInputs(*(ov.Tensor(np.array(rows, dtype=np.int64)) for rows in (ids, seen)))


def method(work: str, load: dict, settings: dict) -> Generate:
    pipeline = genai.LLMPipeline(f"{work}/openvino/target", "CPU", **EXACT, **load)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        config = pipeline.get_generation_config()
        config.max_new_tokens = new
        for name, value in settings.items():
            setattr(config, name, value)
        return pipeline.generate(inputs(prompts), config).tokens

    return generate


def main(work: str) -> None:
    draft = genai.draft_model(f"{work}/openvino/draft", "CPU", **EXACT)
    plain = method(work, {}, {})
    serve("OpenVINO GenAI", genai.__version__, {
        "plain": plain,
        "draft model 4": method(work, {"draft_model": draft}, {"num_assistant_tokens": 4}),
        "prompt lookup": method(work, {"prompt_lookup": True}, {"num_assistant_tokens": 4, "max_ngram_size": 3}),
        "beams 4": method(work, {}, {"num_beams": 4}),
        "plain, batch": plain,
    })  # fmt: skip


main(sys.argv[1])
