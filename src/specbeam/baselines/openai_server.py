"""A server that speaks OpenAI's completions API (vLLM, SGLang, llama.cpp, `transformers serve`), by the same clock.

One streamed request a prompt, at temperature 0. Prefill ends when the first text arrives (the way there and back is
in it), decoding when the last does; each piece of text that the server sends is a round. Tokens are counted as the
server counts them (`usage`), else by the target's tokenizer, which also says which tokens the text is. The prompt is
the very one that the other methods read. Where the server exposes vLLM's counters of speculation at `/metrics`, a
row's rounds are those that the counters moved by meanwhile: nobody else may use the server then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from specbeam.errors import InputError
from specbeam.trace import GenerationOutput, Hypothesis, Round, RowTrace

if TYPE_CHECKING:
    import httpx

OPTIONS = ("base_url", "model", "timeout", "send", "api_key_variable")
_ALSO = ("max_new_tokens", "stop_strings", "repetition_penalty")  # what a request can say
_COUNTERS = "vllm:spec_decode_num_"
_CONNECT_SECONDS = 5.0


def check_server(place: str, options: dict[str, Any]) -> None:
    """Raises InputError for settings that no server can serve. place: what an option's name begins with."""
    url = options.get("base_url")
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{place}base_url is {url!r}: give the address of your server, for example "
                         "http://localhost:8000/v1.")
    if options.get("send", "tokens") not in ("tokens", "text"):
        raise InputError(f"{place}send is {options['send']!r}: use tokens (vLLM, SGLang, llama.cpp) or text "
                         "(transformers serve).")
    timeout = options.get("timeout", 60)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise InputError(f"{place}timeout is {timeout!r}: give seconds above 0: how long the server may be silent.")
    for name in ("model", "api_key_variable"):
        if options.get(name) is not None and not isinstance(options[name], str):
            raise InputError(f"{place}{name} is {options[name]!r}: give a string.")
    for name, value in options.items():
        if name not in (*OPTIONS, *_ALSO) and value is not None:
            raise InputError(f"{place}{name} cannot be asked of an openai_server: it takes "
                             f"{', '.join((*OPTIONS, *_ALSO))}.")


@dataclass(frozen=True)
class Answer:
    """What came back. pieces: each text with the seconds since the request was sent."""

    pieces: list[tuple[str, float]]
    finish_reason: str
    counted: int | None  # new tokens, by the server's usage
    seconds: float

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def openai_server(target: Any, input_ids: Any, attention_mask: Any = None, *, base_url: str, model: str | None = None,
                  timeout: float = 60.0, send: str = "tokens", api_key_variable: str | None = None, tokenizer: Any,
                  seed: Any = 0, max_new_tokens: int = 64, stop_strings: str | list[str] | None = None,
                  repetition_penalty: float | None = None) -> GenerationOutput:
    """One request for each row, one after the other; input_ids and attention_mask as for our methods.

    base_url: with its /v1. model: what the server calls it; None: the first that it lists. timeout: seconds of
    silence. send: the prompt as token ids, or as text for servers that take no ids. api_key_variable: the environment
    variable that holds a key. repetition_penalty: the target's own generation_config's, if None; sent when it is not 1.
    Raises InputError, in one sentence, for a refused connection, silence, an error status or half an answer.
    """
    import httpx

    from specbeam.decoding.request import prompt_rows

    base = base_url.rstrip("/")
    key = os.environ.get(api_key_variable, "") if api_key_variable else ""
    penalty = repetition_penalty or getattr(target.generation_config, "repetition_penalty", None) or 1.0
    body: dict[str, Any] = {"temperature": 0, "max_tokens": max_new_tokens, "stream": True}
    if stop_strings:
        body["stop"] = stop_strings
    if penalty != 1.0:
        body["repetition_penalty"] = penalty
    outputs = []
    with httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)), trust_env=False,
                      headers={"Authorization": f"Bearer {key}"} if key else {}) as client:
        body["model"] = model or _first_model(client, base)
        for prompt in prompt_rows(input_ids, attention_mask):
            asked = body | {"prompt": prompt if send == "tokens" else _as_text(prompt, tokenizer)}
            before = _counters(client, base)
            answer = _ask(client, base, asked)
            outputs.append(_output(prompt, answer, _moved(before, _counters(client, base)), tokenizer))
    return GenerationOutput([hypotheses for hypotheses, _ in outputs], [trace for _, trace in outputs])


@contextmanager
def _explained(base: str) -> Iterator[None]:
    """httpx's errors, as one sentence about this server."""
    import httpx

    try:
        yield
    except httpx.ConnectError as error:
        raise InputError(f"nothing answers at {base} ({error}): start the server, or mend base_url.") from None
    except httpx.TimeoutException as error:
        raise InputError(f"the server at {base} said nothing for too long ({type(error).__name__}): raise timeout, or "
                         "see what it is doing.") from None
    except httpx.RemoteProtocolError as error:
        raise InputError(f"the server at {base} broke off in the middle of its answer ({error}).") from None
    except httpx.HTTPError as error:
        raise InputError(f"the connection to {base} failed ({type(error).__name__}: {error}).") from None


def _first_model(client: httpx.Client, base: str) -> str:
    with _explained(base):
        response = client.get(f"{base}/models")
        _check_status(response, base)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise InputError(f"the server at {base} does not list its models: give model=….") from None


def _check_status(response: httpx.Response, base: str) -> None:
    if response.is_success:
        return
    response.read()
    text = " ".join(response.text.split())[:200]
    raise InputError(f"the server at {base} answered with status {response.status_code}: {text or 'no reason given'}.")


def _ask(client: httpx.Client, base: str, body: dict[str, Any]) -> Answer:
    """The streamed answer to one request."""
    import httpx

    pieces: list[tuple[str, float]] = []
    reason = counted = None
    over = False
    started = last = time.perf_counter()
    patience = client.timeout.read or float("inf")
    with _explained(base), client.stream("POST", f"{base}/completions",
                                         json=body | {"stream_options": {"include_usage": True}}) as response:
        _check_status(response, base)
        for line in response.iter_lines():
            heard = time.perf_counter()
            if not line.startswith("data:"):  # comments keep a connection alive, but they say nothing
                if heard - last > patience:
                    raise httpx.ReadTimeout("only comments")
                continue
            last, now = heard, heard - started
            data = line[len("data:"):].strip()
            if data == "[DONE]":
                over = True
                break
            try:
                chunk = json.loads(data)
                failure = chunk.get("error")
                usage = chunk.get("usage") or {}
                counted = usage.get("completion_tokens", counted)
                for choice in chunk.get("choices", [])[:1]:
                    if choice.get("text"):
                        pieces.append((choice["text"], now))
                    reason = choice.get("finish_reason") or reason
            except (ValueError, AttributeError, TypeError):
                raise InputError(f"the server at {base} sent what is no completion: {data[:100]!r}.") from None
            if failure:
                raise InputError(f"the server at {base} failed in the middle of its answer: {failure}.")
    if reason is None:
        end = "says that it is over" if over else "stops"
        raise InputError(f"the server at {base} gave half an answer: after {len(pieces)} pieces of text the stream "
                         f"{end} without a finish_reason.")
    if not pieces and not counted:
        raise InputError(f"the server at {base} answered without a single token (finish_reason {reason}).")
    return Answer(pieces, str(reason), counted, time.perf_counter() - started)


def _as_text(prompt: list[int], tokenizer: Any) -> str:
    """The text that a server with the target's tokenizer reads as these ids, special tokens and all."""
    for first in (0, 1):  # it may add the BOS itself
        text = tokenizer.decode(prompt[first:], skip_special_tokens=False)
        if tokenizer(text).input_ids == prompt:
            return text
    raise InputError("this prompt cannot be sent as text: the tokenizer would read it as other tokens; use "
                     "send: tokens, if the server takes token ids.")


def _output(prompt: list[int], answer: Answer, counters: dict[str, float], tokenizer: Any
            ) -> tuple[list[Hypothesis], RowTrace]:
    tokens = tokenizer(answer.text, add_special_tokens=False).input_ids
    reason = {"length": "length", "stop": "eos"}.get(answer.finish_reason, "stop")
    eos = tokenizer.eos_token_id
    if reason == "eos" and eos is not None and answer.counted == len(tokens) + 1:
        tokens = [*tokens, eos]  # it is in the count, but not in the text
    sizes = [max(1, len(tokenizer(text, add_special_tokens=False).input_ids)) for text, _ in answer.pieces] or [1]
    times = [seconds for _, seconds in answer.pieces] or [answer.seconds]
    rounds = [Round(0, 0, size, later - earlier)
              for size, earlier, later in zip(sizes[1:], times, times[1:], strict=False)]
    seconds = times[-1] - times[0]
    speculated = _rounds(counters, seconds)
    owners = [0] * sizes[0] + [number for number, size in enumerate(sizes[1:], start=1) for _ in range(size)]
    owners = (owners + [len(rounds)] * len(tokens))[:len(tokens)]
    counted = answer.counted if answer.counted is not None else len(tokens)
    trace = RowTrace(len(prompt), min(sizes[0], counted), tuple(speculated or rounds), ("plain",) * len(tokens),
                     tuple(owners), times[0], seconds, counted=counted)
    return [Hypothesis(list(tokens), None, reason)], trace


def _counters(client: httpx.Client, base: str) -> dict[str, float]:
    """vLLM's counters of speculation, summed over engines; {} where there are none."""
    import httpx

    root = base.removesuffix("/v1")
    try:
        response = client.get(f"{root}/metrics")
    except httpx.HTTPError:
        return {}
    values: dict[str, float] = {}
    for line in response.text.splitlines() if response.is_success else ():
        if not line.startswith(_COUNTERS):
            continue
        name, _, number = line.rpartition(" ")
        key, _, labels = name.removeprefix(_COUNTERS).partition("{")
        place = labels.partition('position="')[2].partition('"')[0]
        try:
            values[key + place] = values.get(key + place, 0.0) + float(number)
        except ValueError:
            continue
    return values


def _moved(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def _rounds(moved: dict[str, float], seconds: float) -> list[Round]:
    """Rounds that tell what the counters tell: as many drafts, drafted and accepted tokens, accepted by position."""
    count = int(moved.get("drafts_total", 0))
    if count <= 0:
        return []
    drafted, accepted = int(moved.get("draft_tokens_total", 0)), int(moved.get("accepted_tokens_total", 0))
    by_position: list[int] = []
    while f"accepted_tokens_per_pos_total{len(by_position)}" in moved:
        by_position.append(int(moved[f"accepted_tokens_per_pos_total{len(by_position)}"]))
    if sum(by_position) == accepted:
        kept = [sum(times > number for times in by_position) for number in range(count)]
    else:
        kept = [accepted // count + (number < accepted % count) for number in range(count)]
    return [Round(drafted // count + (number < drafted % count), one, one + 1, seconds / count, drafter="server")
            for number, one in enumerate(kept)]
