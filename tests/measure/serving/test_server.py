"""A server is started, waited for and ended whatever happens; `transformers serve` is tried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lib.analysis.serving import reading
from lib.measure.serving import guard, kinds, plan, server, sweep, target, timing, window
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.kinds import Kind
from lib.measure.serving.plan import Cell
from lib.measure.serving.server import EndpointError

# A process with a child that does not listen to SIGTERM, as an engine's worker may not.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
worker = subprocess.Popen([sys.executable, "-c", child])
print(worker.pid, flush=True)
time.sleep(60)
"""


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state == "Z"  # its parent has ended too, and nobody has collected it yet


def wait_for(condition, limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def worker_of(log: Path) -> int:
    assert wait_for(lambda: log.exists() and log.read_text().strip())
    return int(log.read_text().split()[0])


def started(log: Path, code: str) -> subprocess.Popen:
    command = [sys.executable, str(server.GUARD), str(log), "0.3", sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def test_the_guard_ends_the_whole_group_when_its_input_closes(tmp_path):
    log = tmp_path / "log"
    process = started(log, STUBBORN)
    worker = worker_of(log)
    process.stdin.close()  # which is also what the death of the parent does
    assert process.wait(10) == 0
    assert wait_for(lambda: is_gone(worker))


def test_the_guard_ends_the_group_on_a_signal(tmp_path):
    log = tmp_path / "log"
    process = started(log, STUBBORN)
    worker = worker_of(log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0 and wait_for(lambda: is_gone(worker))
    process.stdin.close()


def test_the_guard_gives_the_commands_status_and_ends_what_it_left(tmp_path):
    log = tmp_path / "log"
    process = started(log, STUBBORN.replace("time.sleep(60)\n", "sys.exit(3)\n"))
    worker = worker_of(log)
    assert process.wait(10) == 3 and wait_for(lambda: is_gone(worker))
    process.stdin.close()


def test_a_group_that_is_gone_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    process.wait()
    assert not guard.alive(process.pid)


@pytest.fixture
def kind(monkeypatch):
    """Put an entry for a made-up server among the kinds."""

    def add(code: str, **fields) -> None:
        entry = Kind(command=lambda python, model, port: [python, "-c", code, str(port)], **fields)
        monkeypatch.setitem(kinds.KINDS, "made-up", entry)

    return add


HTTP = "import sys, http.server as h; h.test(h.SimpleHTTPRequestHandler, port=int(sys.argv[1]))"


def test_a_server_is_ready_when_it_answers_and_gone_after_the_block(kind, tmp_path):
    kind(HTTP, health="/")
    log = tmp_path / "logs" / "server.log"
    with server.start("made-up", "m", log=log, vocab_size=9) as served:
        endpoint, url = served.endpoint, served.endpoint.url
        assert (endpoint.model, endpoint.kind, endpoint.vocab_size) == ("m", "made-up", 9)
        assert served.values["server"] == "made-up" and served.values["ready_s"] > 0
        assert "GET / HTTP" in log.read_text()
    with pytest.raises(OSError):
        server.urllib.request.urlopen(url, timeout=1.0)


def test_a_server_is_ended_when_the_block_fails(kind):
    kind(HTTP, health="/")
    with pytest.raises(ZeroDivisionError), server.start("made-up", "m") as served:
        url = served.endpoint.url
        raise ZeroDivisionError
    with pytest.raises(OSError):
        server.urllib.request.urlopen(url, timeout=1.0)


def test_a_server_that_does_not_come_up_says_what_its_log_says(kind, tmp_path):
    kind("import sys; sys.exit('CUDA out of memory')", health="/health")
    words = "ended with status 1 before it was ready; its log ends: CUDA out of memory"
    with pytest.raises(EndpointError, match=words), server.start("made-up", "m"):
        pytest.fail("it is not up")
    kind("import time; time.sleep(60)", health="/health")
    words = "did not answer http.*/health within 0.5 s; its log ends: it is empty"
    with (
        pytest.raises(EndpointError, match=words),
        server.start("made-up", "m", ready_limit_s=0.5, grace_s=0.5),
    ):
        pytest.fail("it is not up")


def test_what_cannot_be_started_says_why(kind, monkeypatch):
    assert "start it and give its url" in server.lacking("openai")
    kind("pass", needs=("no_such_package", "json"), python="MADE_UP_PYTHON")
    assert server.lacking("made-up").endswith(
        "has no no_such_package; install them, or set MADE_UP_PYTHON"
    )
    monkeypatch.setenv("MADE_UP_PYTHON", "/no/python")
    assert "set MADE_UP_PYTHON to the server's Python" in server.lacking("made-up")


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    source = target.random_checkpoint("tiny-qwen3", folder / "model", "float32", 0)
    assert source["model_source"] == "random weights, seed 0"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with server.start(
        "transformers",
        str(folder / "model"),
        options=("--device", "cpu"),
        log=folder / "server.log",
        ready_limit_s=120.0,
        tokenizer=tokenizer,
    ) as served:
        yield served, folder


def test_transformers_serve_keeps_the_lengths(transformers_serve):
    served, _ = transformers_serve
    row = server.check(served.endpoint, prompt_tokens=40, output_tokens=12)
    assert row["usage"]["prompt_tokens"] == 40 and row["usage"]["output_tokens"] == 12
    fact = timing.fact(row)
    assert timing.tokens_of_events(row) == [1] * 12  # every token is a word, so none is held back
    assert window.tpot_s(fact) > 0 and window.visible_s(fact) == window.ttft_s(fact)
    assert served.values["continuous_batching"] is False
    assert served.values["server_version"]


def test_transformers_serve_refuses_what_it_does_not_take(transformers_serve):
    served, _ = transformers_serve
    as_vllm = plan.Endpoint(served.endpoint.url, served.endpoint.model, "vllm", vocab_size=256)
    with pytest.raises(
        EndpointError, match="HTTP 422: .*; the server refuses .* is its kind right"
    ):
        server.check(as_vllm)


def test_transformers_serve_is_measured_like_any_server(transformers_serve):
    served, folder = transformers_serve
    device = type("Cpu", (), {"missing": {"energy": "the device is a CPU"}})()
    device.power_trace = lambda uuids=(): __import__("contextlib").nullcontext([])
    result = sweep.Session(
        served.endpoint, folder / "records.jsonl", device, 1, None, values=served.values
    )
    cell = Cell(Load("fixed", 4), Lengths(32), Lengths(8), warmup_s=0.5, window_s=2.0)
    sweep.begin(result, 0.0)
    row = sweep.sweep(result, [cell])[0]
    assert row.error is None and row.values["server"] == "transformers"
    ttft = reading.percentile(row, "ttft_s", 50)
    assert reading.failed(row) == 0 and ttft.n == 8 and ttft.value > 0
    assert reading.tokens_per_s(row).value == pytest.approx(32, rel=0.5)
    assert set(row.samples["prompt_tokens"]) == {32}
    assert row.missing["energy_j"] == "the device is a CPU"
