"""Bad endpoints end in a clear reason within their timeout, and what was finished stays."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import subprocess
import sys
import time

import httpx
import pytest

from lib.measure.serving import client, nullserver, plan, server
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.script import Behaviour
from lib.measure.serving.server import EndpointError

timed = pytest.mark.usefixtures("a_processor_is_free")

# How the server misbehaves, the class of the failure, and words of its reason.
BAD = [
    (Behaviour(), None, ""),
    (Behaviour(hang_after=0), "timeout", "not finished within 0.6 s, stopped before any chunk"),
    (Behaviour(hang_after=3), "timeout", "stopped after 3 chunks"),
    (Behaviour(close_after=2), "closed", "closed the connection after 2 chunks"),
    (Behaviour(reset_after=0), "closed", "closed the connection before any chunk"),
    (Behaviour(malformed="http"), "malformed", "the answer is no HTTP"),
    (Behaviour(malformed="json"), "malformed", "an event that is no JSON"),
    (Behaviour(malformed="line"), "malformed", "a line that is no server-sent event: 'what is"),
    (Behaviour(stream=False), "not_streaming", "application/json, no event stream"),
    (Behaviour(status=503), "status", "HTTP 503: the script answers 503"),
    (Behaviour(model="other"), "wrong_model", "asked for model 'null', answered by 'other'"),
    (Behaviour(output_tokens=3), "wrong_length", "asked for 5 output_tokens, usage says 3"),
    (Behaviour(output_tokens=0), "wrong_length", "asked for 5 output_tokens, usage says 0"),
    (Behaviour(usage="none"), "no_usage", "the answer has no usage"),
    (Behaviour(dialect="transformers"), "status", "HTTP 400: prompt must be a string."),
    (Behaviour(), None, ""),
]


def in_process(data: dict) -> list[dict]:
    """Rows of a plan that this process runs: no start of another one."""
    rows: list[dict] = []
    asyncio.run(client.run_plan(data, rows.append))
    return plan.requests_of(rows)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """One request to each bad behaviour, one after another."""
    behaviours = [behaviour for behaviour, *_ in BAD]
    with nullserver.start(tmp_path_factory.mktemp("bad"), behaviours) as (url, _):
        endpoint = Endpoint(url, "null", "vllm", vocab_size=100)
        cell = Cell(Load("closed", 1), Lengths(8), Lengths(5), 0.0, 30.0)
        data = plan.build(endpoint, cell, seed=0, shortest_s=1.0, timeout_s=0.6)
        data["requests"] = data["requests"][: len(BAD)]
        return in_process(data | {"pause_after_failure_s": 0.0})


@timed
@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_answer_has_a_class_and_a_reason(answers, number):
    row, (_, failure_class, words) = answers[number], BAD[number]
    assert row["id"] == number
    if failure_class is None:
        assert row["failure"] is None  # the run goes on after each failure
    else:
        assert row["failure"]["class"] == failure_class in client.CLASSES
        assert words in row["failure"]["text"]
    assert row["end_s"] - row["scheduled_s"] < 0.6 + 0.5


def http(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = (f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode() + body


STREAM = "Content-Type: text/event-stream"
SAID = (
    b'data: {"choices": [{"text": "a b", "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
)
# An answer byte by byte, the class of its failure, and words of the reason.
ANSWERS = {
    "a type in capitals": (http("200 OK", STREAM.title(), body=SAID), None, ""),
    "hints first": (b"HTTP/1.1 103 H\r\n\r\n" + http("200 OK", STREAM, body=SAID), None, ""),
    "moved": (http("307 Moved", "Location: /v2"), "status", "HTTP 307: no text; it points to /v2"),
    "too many": (
        http("429 Busy", "Retry-After: 7", body=b'{"error": {"message": "slow down"}}'),
        "status",
        "HTTP 429: slow down; it asks to come again after 7",
    ),
    "not up yet": (http("503 No", "Retry-After: 3"), "status", "HTTP 503: no text; it asks"),
    "an error as JSON": (
        http("200 OK", "Content-Type: application/json", body=b'{"error": "it is loading"}'),
        "error_event",
        "the server says: it is loading",
    ),
    "a refusal too deep": (http("500 No", body=b"[" * 4000), "status", "HTTP 500: [["),
    "compressed": (
        http("200 OK", STREAM, "Content-Encoding: gzip", body=gzip.compress(SAID)),
        "not_streaming",
        "text/event-stream, gzip",
    ),
    "no type": (http("200 OK", body=SAID), "not_streaming", "of no content type"),
    "a body that is short": (
        http("200 OK", STREAM, body=SAID).replace(b"Length: ", b"Length: 9"),
        "closed",
        "closed the connection after 2 chunks",
    ),
    "a refusal without an end": (http("500 No", body=b"wait")[:-1], "timeout", "of HTTP 500"),
    "a head without an end": (b"HTTP/1.1 200 OK\r\nX-", "timeout", "before any chunk"),
    "no HTTP but TLS": (b"\x15\x03\x01\x00\x02\x02\x46", "malformed", "the answer is no HTTP"),
    "given up": (
        http("200 OK", STREAM, body=SAID.replace(b"length", b"abort")),
        "error_event",
        "ended the answer with 'abort'",
    ),
    "no Unicode": (
        http("200 OK", STREAM, body=b'data: {"error": "bad \\ud83d"}\n\n'),
        "error_event",
        "the server says: bad ?",
    ),
    "no usage that can be": (
        http("200 OK", STREAM, body=SAID.replace(b": 2", b": NaN")),
        "malformed",
        "usage whose output_tokens are nan",
    ),
}


async def answered(names: list[str], host: str = "127.0.0.1") -> list[dict]:
    """Rows of one user who gets these answers in turn, each on a connection of its own."""
    left = iter(names)

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWERS[name := next(left)][0])
        if ANSWERS[name][1] == "timeout":
            await reader.read()  # until the client has gone
        writer.close()

    async with await asyncio.start_server(answer, host, 0) as listener:
        place = f"[{host}]" if ":" in host else host
        url = f"http://{place}:{listener.sockets[0].getsockname()[1]}"
        cell = Cell(Load("closed", 1), Lengths(8), Lengths(2), 0.0, 30.0)
        data = plan.build(Endpoint(url, "m"), cell, seed=0, shortest_s=1.0, timeout_s=1.0)
        data["requests"] = data["requests"][: len(names)]
        rows: list[dict] = []
        await client.run_plan(data | {"pause_after_failure_s": 0.0}, rows.append)
    return plan.requests_of(json.loads(json.dumps(rows, allow_nan=False)))


@pytest.fixture(scope="module")
def raw_answers():
    return dict(zip(ANSWERS, asyncio.run(answered([*ANSWERS])), strict=True))


@pytest.mark.parametrize("name", ANSWERS)
def test_whatever_is_answered_has_a_class_and_a_reason(raw_answers, name):
    row, (_, failure_class, words) = raw_answers[name], ANSWERS[name]
    failure = row["failure"] or {"class": None, "text": ""}
    assert failure["class"] == failure_class and words in failure["text"]
    assert row["end_s"] - row["scheduled_s"] < 1.0 + 0.5
    failure["text"].encode()  # a record can be written of it


def test_a_user_s_next_request_counts_from_its_last_answer(raw_answers):
    first, second = list(raw_answers.values())[:2]
    assert first["failure"] is None and second["scheduled_s"] == first["end_s"]


def test_an_address_of_the_new_protocol_is_an_address():
    try:
        (row,) = asyncio.run(answered(["a type in capitals"], host="::1"))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    assert row["failure"] is None


def test_an_endpoint_that_nobody_listens_to_is_told_at_once():
    endpoint = Endpoint(f"http://127.0.0.1:{server.free_port()}", "null", "vllm", vocab_size=100)
    begin_s = time.monotonic()
    with pytest.raises(EndpointError, match="is the server started, and are host") as caught:
        server.check(endpoint, timeout_s=5.0)
    assert caught.value.failure_class == "unreachable" and time.monotonic() - begin_s < 10
    assert endpoint.url in str(caught.value)


def test_a_wrong_model_is_refused_with_the_servers_words_and_a_fix(tmp_path):
    with nullserver.start(tmp_path, [Behaviour()]) as (url, _):
        row = server.check(Endpoint(url, "null", "vllm", vocab_size=100))
        assert row["usage"]["output_tokens"] == server.CHECK_TOKENS
        with pytest.raises(EndpointError, match="HTTP 404: the model 'x' does not exist; .*kind"):
            server.check(Endpoint(url, "x", "vllm", vocab_size=100))


def test_every_class_of_failure_has_a_fix():
    assert set(client.CLASSES) == {*server.FIXES, "cancelled"}


def slow_plan(url: str, count: int, limit_s: float) -> dict:
    endpoint = Endpoint(url, "null", "vllm", vocab_size=100)
    cell = Cell(Load("fixed", 10), Lengths(8), Lengths(3), 0.0, count / 10)
    return plan.build(endpoint, cell, seed=0) | {"limit_s": limit_s}


@timed
def test_the_limit_of_a_run_ends_it_and_finished_rows_stay(tmp_path):
    """Every third request hangs: the limit cancels those, and says so."""
    behaviours = [Behaviour(), Behaviour(), Behaviour(hang_after=1)]
    with nullserver.start(tmp_path, behaviours) as (url, _):
        rows: list[dict] = []
        asyncio.run(client.run_plan(slow_plan(url, 6, 1.0), rows.append))
    requests = plan.requests_of(rows)
    failures = [row["failure"] and row["failure"]["class"] for row in requests]
    assert failures[:3] == [None, None, "cancelled"] and "cancelled" in failures[3:]
    assert rows[-1]["row"] == "footer" and "limit of 1 s" in rows[-1]["stopped"]


def test_a_client_that_is_killed_leaves_what_was_finished(tmp_path):
    with nullserver.start(tmp_path / "server", [Behaviour()]) as (url, _):
        path = plan.write(tmp_path / "plan.json", slow_plan(url, 100, 60.0))
        out = tmp_path / "out.jsonl"
        command = [sys.executable, "-m", "lib.measure.serving.client", str(path), str(out)]
        process = subprocess.Popen(command, cwd=plan.ROOT)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if out.exists() and out.read_text().count("\n") >= 4:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows = plan.read(out)
    assert rows[0]["row"] == "header" and len(plan.requests_of(rows)) >= 3


def test_a_key_is_sent_and_stays_out_of_plan_and_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", "a-secret")
    with nullserver.start(tmp_path, [Behaviour()]) as (url, _):
        data = slow_plan(url, 2, 5.0)
        run = client.Run(data, httpx.AsyncClient, print)
        assert run.built[0].headers["Authorization"] == "Bearer a-secret"
        rows: list[dict] = []
        asyncio.run(client.run_plan(data, rows.append))
    assert "a-secret" not in json.dumps([data, rows]) and not plan.requests_of(rows)[0]["failure"]
    monkeypatch.delenv("SERVER_API_KEY")
    assert client.authorization() == {}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": "header"}\n{"row": "requ')
    assert plan.read(path) == [{"row": "header"}]


def test_a_plan_that_is_none_is_told(tmp_path, capsys):
    (tmp_path / "plan.json").write_text("{")
    assert client.main([str(tmp_path / "plan.json"), str(tmp_path / "out")]) == 2
    assert "is no plan" in capsys.readouterr().err
    with pytest.raises(ValueError, match="schema 9, this client reads 1"):
        asyncio.run(client.run_plan({"schema": 9}, print))


class Words:
    """A tokenizer whose every word is a token, and that starts each text with one more."""

    chat_template = "not used for completions"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [1] * len(text.split())}


def test_text_has_the_exact_length_with_the_special_tokens_that_the_server_adds():
    endpoint = Endpoint("http://x", "m", "transformers", tokenizer=Words())
    text, checked = plan.prompt(endpoint, 40, "a")
    assert checked == 40 and len(text.split()) == 39
    assert text != plan.prompt(endpoint, 40, "b")[0]


def test_prompts_are_new_in_every_cell_and_the_same_for_the_same_seed():
    endpoint = Endpoint("http://x", "m", "vllm", vocab_size=1000, special_ids=(0, 1))
    cells = [Cell(Load("poisson", rate), Lengths(16), Lengths(4), 1.0, 2.0) for rate in (5, 6)]
    one, other = (plan.build(endpoint, cell, seed=3) for cell in cells)
    assert one == plan.build(endpoint, cells[0], seed=3)
    prompts = [tuple(r["body"]["prompt"]) for r in (*one["requests"], *other["requests"])]
    assert len(set(prompts)) == len(prompts) and not {0, 1} & {i for p in prompts for i in p}
    assert {len(p) for p in prompts} == {16}


def test_a_closed_loop_cannot_run_out_of_requests():
    """Two users, at least half a second each, 4 s: sixteen at most, and two for each user more."""
    endpoint = Endpoint("http://x", "m", "vllm", vocab_size=1000)
    cell = Cell(Load("closed", 2), Lengths(4), Lengths(4), warmup_s=1.0, window_s=2.0)
    data = plan.build(endpoint, cell, seed=0, shortest_s=0.5)
    assert len(data["requests"]) == 2 * (8 + 2) and data["user_starts_s"] == [0.0, 0.25]
    with pytest.raises(ValueError, match="needs shortest_s"):
        plan.build(endpoint, cell, seed=0)


def test_a_rate_that_asks_for_too_much_is_refused():
    endpoint = Endpoint("http://x", "m", "vllm", vocab_size=1000)
    with pytest.raises(ValueError, match="lower the rate or the window"):
        plan.build(endpoint, Cell(Load("fixed", 9000), Lengths(4), Lengths(4)), seed=0)


def test_a_script_with_an_unknown_behaviour_is_refused(tmp_path, capsys):
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"behaviours": [{"ttft": 1}]}))
    assert nullserver.main([str(path), str(tmp_path / "stamps")]) == 2
    assert "unknown behaviour ['ttft']" in capsys.readouterr().err
