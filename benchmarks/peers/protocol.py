"""How the driver talks to a peer: one JSON line in, one JSON line out, on standard input and output.

in:  {"method": label, "prompts": [[token ids], …], "new_tokens": n}      out: {"seconds": …, "tokens": [[…], …]}
First out: {"peer", "version", "methods"}. The clock runs around the peer's own generate call, prefill included; what
the process writes to standard output otherwise goes to standard error. Needs the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens → new tokens of each prompt
EOS = 1  # of the bundled pair
PAD = 2


def serve(peer: str, version: str, methods: dict[str, Generate]) -> None:
    """Answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def say(message: dict) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    say({"peer": peer, "version": version, "methods": list(methods)})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            start = time.perf_counter()
            tokens = methods[asked["method"]](asked["prompts"], asked["new_tokens"])
            seconds = time.perf_counter() - start
            say({"seconds": seconds, "tokens": [[int(token) for token in row] for row in tokens]})
        except Exception as error:  # a peer that cannot is a line in the table, not the end of the run
            say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def one_by_one(generate: Callable[[list[int], int], list[int]]) -> Generate:
    """For an engine without batches."""
    return lambda prompts, new: [generate(prompt, new) for prompt in prompts]
