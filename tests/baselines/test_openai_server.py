"""A server's answers become rows by the same clock; whatever it does wrong is said in one sentence."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from checkpoints import make_checkpoint
from reference import letters
from refusals import refusal

from specbeam import cli
from specbeam.baselines.openai_server import check_server, openai_server
from specbeam.experiment import records
from specbeam.experiment.plan import plan_method

PROMPT = [40, 41, 42]
TARGET = SimpleNamespace(generation_config=SimpleNamespace(repetition_penalty=None))
METRICS = """# HELP vllm:spec_decode_num_drafts_total …
vllm:spec_decode_num_drafts_total{{engine="0"}} {drafts}
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {drafted}
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {first}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} {second}
vllm:other 3
"""


def event(line):
    if isinstance(line, str) and line.startswith(":"):  # a comment
        return f"{line}\n\n".encode()
    return f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n".encode()


@contextmanager
def server(lines=(), *, status=200, silent=0.0, pause=0.0, metrics=(), cut=False):
    """An OpenAI-compatible server on the loopback; its base_url and the bodies that it was sent. lines: the chunks
    (dicts) or raw data lines of each answer. metrics: what /metrics says, each time one more."""
    asked, told = [], iter(metrics)

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def do_GET(self):
            text = json.dumps({"data": [{"id": "tiny"}]}) if self.path.endswith("/models") else next(told, None)
            body = (text or "").encode()
            self.send_response(200 if text else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(silent)
            body = b"" if status == 200 else b'{"error": "too  much"}'
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in [body] if body else [event(one) for one in lines]:
                try:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                except BrokenPipeError:  # who asked has given up
                    return
                time.sleep(pause)
            if cut:  # the connection goes away without the end of the stream
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def piece(text, reason=None):
    return {"choices": [{"text": text, "finish_reason": reason}]}


def ask(url, *, timeout=5, **options):
    return openai_server(TARGET, [PROMPT], base_url=url, tokenizer=letters(), timeout=timeout, **options)


WHOLE = [piece("ab"), piece("c"), piece("", "length"), {"choices": [], "usage": {"completion_tokens": 3}}, "[DONE]"]


def test_an_answer_is_a_row_whose_pieces_are_rounds():
    with server(WHOLE, pause=0.02) as (url, asked):
        out = ask(url, max_new_tokens=3, stop_strings="zz")
    row = out.trace[0]
    assert out.tokens == [letters()("abc").input_ids] and out.hypotheses[0][0].finish_reason == "length"
    assert (row.prompt_tokens, row.first_tokens, row.counted, row.token_rounds) == (3, 2, 3, (0, 0, 1))
    assert [one.committed for one in row.rounds] == [1] and row.rounds[0].drafted == 0
    assert row.prefill_seconds > 0 and row.decode_seconds >= 0.01, "two pauses lie between the pieces"
    assert asked == [{"temperature": 0, "max_tokens": 3, "stream": True, "stop": "zz", "model": "tiny",
                      "prompt": PROMPT, "stream_options": {"include_usage": True}}]


def test_tokens_are_counted_by_usage_else_by_the_targets_tokenizer():
    with server([piece("abc", "length")]) as (url, _):
        assert ask(url).trace[0].counted == 3
    with server([piece("abc", "length"), {"choices": [], "usage": {"completion_tokens": 7}}]) as (url, _):
        assert ask(url).trace[0].counted == 7, "the server cut the text otherwise than the tokenizer does"


def test_a_prompt_goes_as_text_where_it_can():
    with server(WHOLE) as (url, asked):
        ask(url, send="text", model="mine")
        assert asked[0]["prompt"] == letters().decode(PROMPT) and asked[0]["model"] == "mine"
        broken = lambda text, **_: SimpleNamespace(input_ids=[1])  # noqa: E731 (a tokenizer that reads it otherwise)
        broken.decode = letters().decode
        assert "send: tokens" in refusal(openai_server, TARGET, [PROMPT], base_url=url, tokenizer=broken, send="text")


def test_the_checkpoints_repetition_penalty_is_sent_too():
    penalised = SimpleNamespace(generation_config=SimpleNamespace(repetition_penalty=1.05))
    with server(WHOLE) as (url, asked):
        openai_server(penalised, [PROMPT, PROMPT], base_url=url, tokenizer=letters())
    assert [body["repetition_penalty"] for body in asked] == [1.05, 1.05]


def test_vllms_counters_become_rounds():
    counts = [METRICS.format(drafts=d, drafted=3 * d, accepted=a, first=f, second=s)
              for d, a, f, s in ((10, 12, 8, 4), (14, 17, 11, 6))]
    with server(WHOLE, metrics=counts) as (url, _):
        rounds = ask(url).trace[0].rounds
    assert [(one.drafted, one.accepted, one.committed, one.drafter) for one in rounds] == [
        (3, 2, 3, "server"), (3, 2, 3, "server"), (3, 1, 2, "server"), (3, 0, 1, "server")]
    with server(WHOLE, metrics=[counts[0]] * 2) as (url, _):
        assert ask(url).trace[0].rounds[0].drafted == 0, "counters that stand still tell of no speculation"


@pytest.mark.parametrize("lines, options, said", [
    ([piece("ab")], {}, "half an answer: after 1 pieces of text the stream stops"),
    ([piece("ab"), "[DONE]"], {}, "says that it is over without a finish_reason"),
    ([piece("ab")], {"cut": True}, "broke off in the middle"),
    ([piece("ab"), '{"error": "out of memory"}'], {}, "failed in the middle of its answer: out of memory"),
    (["<html>"], {}, "sent what is no completion: '<html>'"),
    (["[1, 2]"], {}, "sent what is no completion"),
    ([piece("", "stop")], {}, "without a single token"),
    ([], {"status": 503}, 'status 503: {"error": "too much"}'),
    (WHOLE, {"silent": 0.6}, "said nothing for too long"),
    (WHOLE, {"pause": 0.6}, "said nothing for too long"),
], ids=lambda value: str(value) if isinstance(value, str) else None)
def test_what_goes_wrong_is_one_sentence(lines, options, said):
    with server(lines, **options) as (url, _):
        assert said in refusal(ask, url, timeout=0.3 if said.startswith("said nothing") else 5)


def test_a_refused_connection_and_a_server_without_models_are_said():
    with server() as (url, _):
        pass
    assert "nothing answers at http://127.0.0.1" in refusal(ask, url, model="x")
    assert "nothing answers" in refusal(ask, url)


def test_comments_that_keep_a_connection_alive_are_silence():
    with server([": still here"] * 8 + WHOLE, pause=0.1) as (url, _):
        assert "said nothing for too long" in refusal(ask, url, timeout=0.3)
        assert ask(url, timeout=5).trace[0].counted == 3


def test_in_a_run_each_of_these_is_a_failed_row_and_the_others_go_on(tmp_path):
    target = make_checkpoint("gpt2", tmp_path / "target")
    with (server(WHOLE) as (good, _), server([piece("ab")]) as (half, _), server(WHOLE, silent=1.5) as (silent, _),
          server([], status=500) as (broken, _)):
        urls = {"good": good, "half": half, "silent": silent, "broken": broken, "gone": "http://127.0.0.1:9/v1"}
        methods = ", ".join(f'{name}: {{kind: openai_server, base_url: "{url}", timeout: 1}}'
                            for name, url in urls.items())
        status = cli.main(["compare", f"target.path={target}", "draft=none", 'prompts=["ab", "ba"]', "repeats=1",
                           f"methods={{greedy: {{kind: greedy}}, {methods}}}", "max_new_tokens=3", "runner=eager",
                           "device=cpu", "wandb.mode=disabled", f"output_dir={tmp_path / 'run'}"])
    assert status == 1
    rows = records.read_lines(tmp_path / "run" / "rows.jsonl")
    errors = {name: {row["error"] for row in rows if row["method"] == name} for name in ("greedy", *urls)}
    assert errors["greedy"] == errors["good"] == {None} and len(rows) == 12
    for name, said in (("half", "gave half an answer"), ("silent", "said nothing for too long"),
                       ("broken", "status 500"), ("gone", "nothing answers at http://127.0.0.1:9/v1")):
        [error] = errors[name]
        assert said in error and "\n" not in error


@pytest.mark.parametrize("settings, said", [
    ({}, "base_url is None"),
    ({"base_url": "localhost:8000"}, "base_url is 'localhost:8000'"),
    ({"base_url": "http://localhost:1/v1", "send": "letters"}, "use tokens"),
    ({"base_url": "http://localhost:1/v1", "timeout": 0}, "timeout is 0"),
    ({"base_url": "http://localhost:1/v1", "model": 3}, "model is 3"),
    ({"base_url": "http://localhost:1/v1", "no_repeat_ngram_size": 2}, "cannot be asked of an openai_server"),
], ids=str)
def test_settings_that_make_no_sense_are_refused_before_anything_is_loaded(settings, said):
    sentence = refusal(plan_method, "vllm", {"kind": "openai_server", **settings}, 8)
    assert said in sentence and "methods.vllm." in sentence


def test_settings_that_do_are_kept():
    settings = {"base_url": "http://localhost:8000/v1", "model": "m", "timeout": 5, "send": "text"}
    assert plan_method("vllm", {"kind": "openai_server", **settings}, 8).options == settings | {"max_new_tokens": 8}
    check_server("", settings)
