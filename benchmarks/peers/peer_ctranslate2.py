"""CTranslate2: plain, beams, batches.

Convert (in its own environment, requirements-ctranslate2.txt):
    ct2-transformers-converter --model WORK/target --output_dir WORK/ctranslate2/target
It reads and writes tokens by their spelling.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import ctranslate2
from protocol import EOS, serve


def generate(model: ctranslate2.Generator, spell: list[str], beams: int, prompts: list[list[int]], new: int
             ) -> list[list[int]]:  # fmt: skip
    results = model.generate_batch(
        [[spell[token] for token in prompt] for prompt in prompts], max_length=new, beam_size=beams, sampling_topk=1,
        include_prompt_in_result=False, end_token=[EOS], return_end_token=True,
    )  # fmt: skip
    return [result.sequences_ids[0] for result in results]


def main(work: str) -> None:
    with open(f"{work}/ctranslate2/target/vocabulary.json", encoding="utf-8") as file:
        spell = json.load(file)
    model = ctranslate2.Generator(f"{work}/ctranslate2/target", compute_type="float32", inter_threads=1,
                                  intra_threads=int(os.environ["OMP_NUM_THREADS"]))  # fmt: skip
    plain = partial(generate, model, spell, 1)
    serve("CTranslate2", ctranslate2.__version__,
          {"plain": plain, "beams 4": partial(generate, model, spell, 4), "plain, batch": plain})  # fmt: skip


main(sys.argv[1])
