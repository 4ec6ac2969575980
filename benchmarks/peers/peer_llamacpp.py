"""llama.cpp through llama-cpp-python: plain and prompt lookup, one prompt at a time (its high-level API has no
batches and no beams).

Convert (to_gguf.py, in its own environment, requirements-llamacpp.txt): python to_gguf.py WORK
Exact only without flash attention and with caches in f32.
"""

from __future__ import annotations

import os
import sys

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from protocol import EOS, Generate, one_by_one, serve


def method(work: str, **options: object) -> Generate:
    threads = int(os.environ["OMP_NUM_THREADS"])
    model = llama_cpp.Llama(f"{work}/llamacpp/target.gguf", n_ctx=2048, n_threads=threads, n_threads_batch=threads,
                            flash_attn=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
                            verbose=False, **options)  # fmt: skip

    def generate(prompt: list[int], new: int) -> list[int]:
        model.reset()
        tokens: list[int] = []
        for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True):
            tokens.append(token)
            if token == EOS or len(tokens) == new:
                break
        return tokens

    return one_by_one(generate)


def main(work: str) -> None:
    lookup = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=4)
    serve("llama.cpp", f"llama-cpp-python {llama_cpp.__version__}",
          {"plain": method(work), "prompt lookup": method(work, draft_model=lookup)})  # fmt: skip


main(sys.argv[1])
