"""Whether the hub answers is asked once and briefly, before its client tries for half a minute."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lib.models import fetch, origin, reach
from lib.models.card import ModelError

REPO = "some/model"


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path) -> None:
    """The hub's client may ask, and its cache is empty."""
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    reach.hub_answers.cache_clear()
    yield
    reach.hub_answers.cache_clear()


class Hub:
    """A server that says one thing to each request, after a while; it counts them."""

    def __init__(self, answer: bytes, wait_s: float, over: threading.Event) -> None:
        self.answer, self.wait_s, self.over, self.requests = answer, wait_s, over, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.reply, args=(connection,), daemon=True).start()

    def reply(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(4096)
            self.requests += 1
            if not self.over.wait(self.wait_s):
                connection.sendall(self.answer)


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set when the test is over, so that no thread of it goes on."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def serve(monkeypatch, over) -> Iterator:
    hubs = []

    def start(answer: bytes = b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n", wait_s=0.0) -> Hub:
        hubs.append(Hub(answer, wait_s, over))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hubs[-1].address)
        return hubs[-1]

    yield start
    for one in hubs:
        one.socket.close()


def nowhere(monkeypatch) -> None:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def test_any_answer_is_one_and_it_is_asked_once(serve):
    one = serve()
    assert reach.hub_answers() and reach.hub_answers()
    assert one.requests == 1


def test_a_slow_hub_answers(serve):
    serve(wait_s=0.5)
    assert reach.hub_answers()


def names_hang(monkeypatch, over: threading.Event) -> None:
    def resolve(*_: object, **__: object) -> None:
        over.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def address(monkeypatch, text: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", text)


UNREACHABLE = {
    "nobody listens": lambda serve, patch, over: nowhere(patch),
    "it accepts and says nothing": lambda serve, patch, over: serve(wait_s=60),
    "it says no HTTP": lambda serve, patch, over: serve(b"x"),
    "names are not resolved": lambda serve, patch, over: names_hang(patch, over),
    "no such name": lambda serve, patch, over: address(patch, "http://no-such-name.invalid"),
    "no address": lambda serve, patch, over: address(patch, "http://[::1"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_hub_out_of_reach_is_known_soon(case, serve, over, monkeypatch):
    monkeypatch.setattr(reach, "LONGEST_S", 0.5)
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    UNREACHABLE[case](serve, monkeypatch, over)
    start_s = time.monotonic()
    assert not reach.hub_answers()
    assert time.monotonic() - start_s < 3
    over.set()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "Thread-" in thread.name:
            thread.join(1)
    assert not failures


def test_it_is_said_within_seconds():
    assert 3 <= reach.LONGEST_S <= 10


def no_sleep(seconds: float) -> None:
    raise AssertionError("the client waits before it tries again")


@pytest.mark.parametrize("ask", ["a configuration", "a checkpoint"])
def test_out_of_reach_is_said_without_trying_again(ask, monkeypatch):
    nowhere(monkeypatch)
    monkeypatch.setattr(time, "sleep", no_sleep)
    with pytest.raises(ModelError, match=f"the hub cannot be reached, and {REPO} .*; connect"):
        if ask == "a configuration":
            origin.config_of(origin.Origin(REPO, hub=REPO))
        else:
            fetch.from_hub(REPO, None)


def test_what_the_cache_holds_needs_no_hub(monkeypatch, tmp_path):
    nowhere(monkeypatch)
    monkeypatch.setattr(time, "sleep", no_sleep)
    home = tmp_path / "hub" / "models--some--model"
    snapshot = home / "snapshots" / ("a" * 40)
    for path, text in (
        (home / "refs" / "main", "a" * 40),
        (snapshot / "config.json", json.dumps({"model_type": "llama", "hidden_size": 32})),
        (snapshot / "model.safetensors", "x"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert origin.config_of(origin.Origin(REPO, hub=REPO)).hidden_size == 32
    assert fetch.from_hub(REPO, None) == (Path(snapshot), "a" * 40)


def test_offline_mode_asks_nobody(serve, monkeypatch):
    one = serve()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not reach.hub_answers() and one.requests == 0
