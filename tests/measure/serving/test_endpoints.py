"""Bad endpoints end in a clear reason within their timeout, and what was finished stays."""

from __future__ import annotations

import asyncio
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

pytestmark = pytest.mark.usefixtures("a_processor_is_free")

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
