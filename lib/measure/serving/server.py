"""Start a server, wait until it answers, and end it whatever happens; ask one that runs.

A started server logs to a file and runs under `guard`: its whole process group ends
when the block ends, and also when this process is killed.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lib.files import ROOT
from lib.measure.serving import kinds, plan, timing, window
from lib.measure.serving.client import KEY, SCHEMA, authorization
from lib.measure.serving.plan import Endpoint

GUARD = Path(__file__).with_name("guard.py")
GRACE_S = 10.0
CHECK_TOKENS = 4
CONNECT_S = 5.0
MOST_PAGE = 2**24  # bytes
# What to do about each class of failure (lib.measure.serving.client.CLASSES).
FIXES = {
    "unreachable": "is the server started, and are host and port right?",
    "timeout": "the server is too slow or hangs; look at its log, or raise timeout_s",
    "closed": "the server ended the answer; look at its log",
    "malformed": "does this address speak the OpenAI protocol?",
    "status": "the server refuses the request; is it up and not full, is its kind right, does it "
    f"serve this model, and does it want a key ({KEY}=...)?",
    "not_streaming": "the server must stream server-sent events; turn streaming on",
    "error_event": "the server failed while it answered; look at its log",
    "wrong_model": "name the model that the server serves",
    "no_usage": "the server must send usage, which stream_options.include_usage asks for",
    "wrong_length": "the server does not keep the length; is its kind right? (Lengths are counted "
    "by its usage; a chat template or a start token adds to them.)",
}


class EndpointError(RuntimeError):
    """An endpoint that cannot be measured. `failure_class` says which way, the message why."""

    def __init__(self, failure_class: str, text: str) -> None:
        super().__init__(text)
        self.failure_class = failure_class


@dataclass(frozen=True)
class Served:
    """A server that was started: its endpoint, its log, and what a row should say of it."""

    endpoint: Endpoint
    log: Path
    values: dict[str, Any]


def interpreter(kind: str) -> str:
    """The Python that runs a kind of server: its variable's, its own environment's, or this one."""
    entry = kinds.kind(kind)
    own = ROOT / entry.venv / "bin" / "python" if entry.venv else None
    variable = os.environ.get(entry.python, "") if entry.python else ""
    return variable or (str(own) if own and own.exists() else sys.executable)


def lacking(kind: str, environment: Mapping[str, str] | None = None) -> str:
    """Why this kind of server cannot be started here, or ""."""
    entry = kinds.kind(kind)
    if entry.command is None:
        return f"a server of kind {kind!r} cannot be started from here; start it and give its url"
    python = interpreter(kind)
    code = (
        "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if not u.find_spec(n)])"
    )
    try:
        names = _output([python, "-c", code, *entry.needs], environment).split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{python} does not run: {error}; set {entry.python} to the server's Python"
    if names:
        return f"{python} has no {', '.join(names)}; install them, or set {entry.python}"
    return ""


def _output(command: Sequence[str], environment: Mapping[str, str] | None) -> str:
    options = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    return subprocess.run(command, env=environment, **options).stdout.strip()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def start(
    kind: str,
    model: str,
    *,
    options: Sequence[str] = (),
    log: Path | None = None,
    ready_limit_s: float = 600.0,
    grace_s: float = GRACE_S,
    continuous_batching: bool | None = None,
    environment: Mapping[str, str] | None = None,
    served_as: str | None = None,
    **endpoint: Any,
) -> Iterator[Served]:
    """A server of this kind on a free port of 127.0.0.1, until the block ends.

    `options` are added to its command; `environment` replaces this process's; `served_as` is the
    model's name in requests where it is another one; `endpoint` are fields of the Endpoint, such as
    tokenizer. Raises EndpointError with the log's last lines where it does not come up.
    """
    entry = kinds.kind(kind)
    environment = dict(os.environ if environment is None else environment)
    if reason := lacking(kind, environment):
        raise EndpointError("unreachable", reason)
    if continuous_batching and entry.batching_options:
        options = (*options, *entry.batching_options)
    python, port = interpreter(kind), free_port()
    command = [*entry.command(python, model, port), *options]
    log = log or Path(tempfile.mkdtemp()) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    guard = subprocess.Popen(
        [sys.executable, str(GUARD), str(log), str(grace_s), *command],
        stdin=subprocess.PIPE,
        env={**environment, **(entry.environment or {})},
        start_new_session=True,
    )
    begin_s = time.monotonic()
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url + (entry.health or "/v1/models"), guard, log, ready_limit_s)
        values = {
            "server": kind,
            "server_version": version(python, entry.version_of, environment),
            "server_options": list(options),
            "continuous_batching": bool(continuous_batching) if entry.batching_options else True,
            "ready_s": time.monotonic() - begin_s,
        }
        yield Served(Endpoint(url, served_as or model, kind, **endpoint), log, values)
    finally:
        stop(guard, grace_s)


def stop(guard: subprocess.Popen, grace_s: float) -> None:
    """Tell the guard to end the server's group, and wait until it has."""
    with contextlib.suppress(OSError):
        guard.stdin.close()
    try:
        guard.wait(grace_s + 10)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()


def version(python: str, package: str | None, environment: Mapping[str, str]) -> str | None:
    """Version of a package in another interpreter, or None."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    with contextlib.suppress(subprocess.SubprocessError):
        return _output([python, "-c", code, package], environment) if package else None
    return None


def wait_until_ready(url: str, process: subprocess.Popen, log: Path, limit_s: float) -> None:
    """Ask until the server answers 200; raises where it ends before, or after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = f"the server ended with status {process.returncode} before it was ready"
            raise EndpointError("unreachable", f"{text}; its log ends: {log_end(log)}")
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            get(url, timeout_s=2.0)
            return
        time.sleep(0.2)
    text = f"the server did not answer {url} within {limit_s:g} s"
    raise EndpointError("timeout", f"{text}; its log ends: {log_end(log)}")


def get(url: str, timeout_s: float = 5.0) -> bytes:
    """A page, without any proxy of the machine. Raises OSError, HTTPException or ValueError where
    there is none, it is not answered by 200, or it is not whole within the time or MOST_PAGE."""
    deadline = time.monotonic() + timeout_s
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(
        urllib.request.Request(url, headers=authorization()), timeout=timeout_s
    ) as page:
        body = bytearray()
        while piece := page.read1(2**16):  # the timeout of a socket is that of each read
            body += piece
            if len(body) > MOST_PAGE or time.monotonic() > deadline:
                raise TimeoutError(f"no end of the page after {len(body):,} bytes")
        if page.length:
            raise http.client.IncompleteRead(bytes(body), page.length)
        return bytes(body)


def base(url: str) -> str:
    """An address as users give it, such as localhost:8000 or one that ends in /v1, in one form.

    Raises EndpointError where it is none.
    """
    one = url.strip() if "://" in url else f"http://{url.strip()}"
    one = one.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = httpx.URL(one)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise httpx.InvalidURL("http or https and a host are needed")
        _ = urllib.parse.urlsplit(one).port  # raises where it is out of range
    except (httpx.InvalidURL, ValueError) as error:
        text = f"{url!r} is no address: {error}; give one such as http://127.0.0.1:8000"
        raise EndpointError("unreachable", text) from None
    return one


def models(url: str) -> list[dict[str, Any]]:
    """What a running server says that it serves: `id` and, where it tells, `owned_by`.

    Raises EndpointError where nobody listens, or nothing is listed.
    """
    page = f"{base(url)}/v1/models"
    fix = "name the model that it serves with MODELS="
    try:
        rows = json.loads(get(page))["data"]
        names = [row["id"] for row in rows]
    except urllib.error.HTTPError as error:
        raise EndpointError("status", f"{page}: HTTP {error.code}; {fix}") from None
    except (OSError, http.client.HTTPException) as error:
        why = " ".join(str(getattr(error, "reason", error) or type(error).__name__).split())
        text = f"{page}: {why}; {FIXES['unreachable']}"
        raise EndpointError("unreachable", text) from None
    except (ValueError, KeyError, TypeError):
        text = f"{page} is no list of models; {FIXES['malformed']}"
        raise EndpointError("malformed", text) from None
    if not names:
        raise EndpointError("wrong_model", f"{page} lists no model; {fix}")
    return rows


def kind_of(url: str) -> str:
    """The kind of a running server: by whom it says that its models are owned, or by a page that
    only this kind has; "openai" where neither tells."""
    pages: dict[str, dict[str, Any]] = {}
    for page in ("/v1/models", "/openapi.json"):
        try:
            data = json.loads(get(base(url) + page, timeout_s=2.0))
        except (urllib.error.HTTPError, ValueError):
            data = None
        except (OSError, http.client.HTTPException):  # nobody answers; what is wrong is told later
            return "openai"
        pages[page] = data if isinstance(data, dict) else {}
    rows = pages["/v1/models"].get("data") or ()
    owners = {row.get("owned_by") for row in rows if isinstance(row, dict)}
    for name, entry in kinds.KINDS.items():
        if name in owners or (entry.own_page and entry.own_page in pages[page].get("paths", ())):
            return name
    return "openai"


def is_local(url: str) -> bool:
    """Whether a server runs on this machine, so that its joules are those of the board here."""
    host = urllib.parse.urlsplit(base(url)).hostname or ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified  # 0.0.0.0 is what servers print
    return host in ("localhost", socket.gethostname().lower())


def log_end(log: Path, lines: int = 5) -> str:
    """The last lines of a log on one line."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return " | ".join(text.strip().splitlines()[-lines:]) or "it is empty"


def check(
    endpoint: Endpoint,
    *,
    prompt_tokens: int = 16,
    output_tokens: int = CHECK_TOKENS,
    timeout_s: float = 30.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Ask for one short streamed answer of forced length; returns its row.

    Raises EndpointError, whose message says what is wrong and what to do, within `timeout_s` of
    the request. Lengths are checked as in any run.
    """
    lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    (row,) = ask(endpoint, 1, **lengths, seed=f"check {seed}", timeout_s=timeout_s)
    if row["failure"]:
        raise refusal(row["failure"], f"{endpoint.url}: ")
    return row


def refusal(failure: dict[str, str], where: str = "") -> EndpointError:
    """A failed request as an error, with what to do about its class."""
    fix = FIXES.get(failure["class"], "look at the server's log")
    return EndpointError(failure["class"], f"{where}{failure['text']}; {fix}")


def ask(
    endpoint: Endpoint,
    count: int,
    *,
    prompt_tokens: int,
    output_tokens: int,
    seed: str,
    timeout_s: float = 60.0,
    at_once: bool = False,
) -> list[dict[str, Any]]:
    """Rows of `count` requests of these lengths, one after another or all at one time."""
    requests = []
    for number in range(count):
        text, length = plan.prompt(endpoint, prompt_tokens, f"{seed} {number}")
        body = kinds.body(endpoint.kind, endpoint.api, endpoint.model, text, output_tokens)
        lengths = {"prompt_tokens": length, "output_tokens": output_tokens}
        requests.append({"id": number, "at_s": 0.0, **lengths, "body": body})
    data = {
        "schema": SCHEMA,
        "url": endpoint.address,
        "model": endpoint.model,
        "timeout_s": timeout_s,
        "connect_timeout_s": CONNECT_S,
        "limit_s": (1 if at_once else count) * timeout_s + CONNECT_S,
        "requests": requests,
        **({} if at_once else {"user_starts_s": [0.0], "duration_s": count * timeout_s}),
    }
    with tempfile.TemporaryDirectory() as folder:
        return plan.requests_of(plan.run(data, Path(folder)))


def idle_request_s(rows: Sequence[dict[str, Any]]) -> float:
    """The least latency of rows that were answered; raises where none was."""
    good = [window.latency_s(row) for row in rows if timing.is_ok(row)]
    if not good:
        failure = rows[0]["failure"] if rows else {"class": "unreachable", "text": "no rows"}
        raise refusal(failure)
    return min(good)
