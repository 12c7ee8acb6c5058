"""A thin load generator: `python -m lib.measure.serving.client plan.json out.jsonl`, a process.

The plan holds every request with its body and its instant (see `plan`); the client
sends, stamps and writes, and derives nothing. Rows (JSON lines, times in s from the run's zero):
first a `header` (`zero_s` on CLOCK_MONOTONIC, which processes of a host share), then a `request`
at each end, so that what is finished stays, then a `footer`.
A request's row: `scheduled_s` (the plan's instant; in a closed loop when its user became free),
`sent_s` (its last byte was handed over), `read_s` and `read_bytes` of every read, `event_s`,
`event_channels` and `event_tokens` of every event that carried tokens, `end_s`, `usage`, `failure`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx

from lib.measure.serving.stream import (
    ABORTED,
    Stream,
    StreamError,
    error_text,
    is_error,
    usage_of,
)

SCHEMA = 1
KEY = "SERVER_API_KEY"
AHEAD = 32  # clients that are opened before requests arrive by a law; more where they are needed
LEAD_S = 0.3  # between the client's start and the run's zero
# Why a request failed; `cancelled` was ended by the client itself, at the limit of the run.
CLASSES = (
    "unreachable", "timeout", "closed", "malformed", "status", "not_streaming", "error_event",
    "wrong_model", "no_usage", "wrong_length", "cancelled",
)  # fmt: skip
# Headers of a refusal that say what to do.
HINTS = {"location": "it points to {}", "retry-after": "it asks to come again after {}"}
clock: Callable[[], float] = time.perf_counter
Row = dict[str, Any]


def authorization() -> dict[str, str]:
    """The header with the key of a server that wants one; the key is in no plan and no row."""
    key = os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


class StampedStream(httpcore.AsyncNetworkStream):
    """A connection that stamps its reads: bytes wait in the HTTP parser, and events of one read
    must have one instant."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self.stream, self.read_s = stream, 0.0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self.stream.read(max_bytes, timeout)
        self.read_s = clock()
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self.stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def start_tls(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return StampedStream(await self.stream.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


class StampedBackend(httpcore.AnyIOBackend):
    """Opens stamped connections."""

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return StampedStream(await super().connect_tcp(*args, **options))


def transport(connections: int, context: ssl.SSLContext) -> httpx.AsyncHTTPTransport:
    """A transport of httpx over at most so many stamped connections."""
    over = httpx.AsyncHTTPTransport(verify=context, trust_env=False)
    over._pool = httpcore.AsyncConnectionPool(
        ssl_context=context,
        max_connections=connections,
        max_keepalive_connections=None,
        network_backend=StampedBackend(),
    )
    return over


class Run:
    """What the requests of one run share."""

    def __init__(
        self, plan: Row, opened: Callable[[], httpx.AsyncClient], write: Callable[[Row], None]
    ) -> None:
        self.plan, self.opened, self.write = plan, opened, write
        self.zero_s = 0.0
        count = len(plan.get("user_starts_s") or ()) or min(AHEAD, len(plan["requests"]))
        self.free = [opened() for _ in range(count)]
        self.built = [self._build(request) for request in plan["requests"]]

    def _build(self, request: Row) -> httpx.Request:
        # Built before the run: a long prompt takes milliseconds to write as JSON.
        headers = {"Content-Type": "application/json", "X-Request-Id": str(request["id"])}
        headers |= {"Accept-Encoding": "identity"} | authorization()
        content = json.dumps(request["body"]).encode()
        return httpx.Request("POST", self.plan["url"], content=content, headers=headers)

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.AsyncClient]:
        """A client that is free, or another one.

        Each has a connection of its own: a shared pool looks through all of them whenever it gets a
        request, so that those of many users who were answered together left late.
        """
        http = self.free.pop() if self.free else self.opened()
        try:
            yield http
        finally:
            self.free.append(http)

    def now(self) -> float:
        """Seconds since the run's zero."""
        return clock() - self.zero_s

    async def until(self, at_s: float) -> None:
        """Wait for an instant of the run."""
        if (rest_s := at_s - self.now()) > 0:
            await asyncio.sleep(rest_s)


async def open_loop(run: Run) -> None:
    """Send each request at its instant, whatever became of those before."""
    async with asyncio.TaskGroup() as tasks:
        for number, request in enumerate(run.plan["requests"]):
            await run.until(request["at_s"])
            tasks.create_task(one(run, number, request["at_s"]))


async def closed_loop(run: Run) -> None:
    """Each user sends its next request when it has the answer to the one before.

    A user starts no request after `duration_s`; the requests are shared, in the plan's order.
    """
    numbers = iter(range(len(run.plan["requests"])))
    async with asyncio.TaskGroup() as tasks:
        for user, start_s in enumerate(run.plan["user_starts_s"]):
            tasks.create_task(_user(run, user, start_s, numbers))


async def _user(run: Run, user: int, start_s: float, numbers: Iterator[int]) -> None:
    await run.until(start_s)
    free_s = start_s
    while free_s < run.plan["duration_s"] and (number := next(numbers, None)) is not None:
        row = await one(run, number, free_s, user=user)
        free_s = row["end_s"]
        if row["failure"]:  # a server that refuses at once must not be asked in a busy loop
            await asyncio.sleep(run.plan.get("pause_after_failure_s", 0.1))
            free_s = run.now()


async def one(run: Run, number: int, scheduled_s: float, user: int | None = None) -> Row:
    """Send one request, read its answer to the end, write its row and return it."""
    request, stream = run.plan["requests"][number], Stream()
    lengths = {name: request.get(name) for name in ("prompt_tokens", "output_tokens")}
    row: Row = {"row": "request", "id": request["id"], "user": user, "asked": lengths}
    row |= {"scheduled_s": scheduled_s, "sent_s": None, "status": None}
    row |= {"read_s": [], "read_bytes": [], "failure": None}
    try:
        async with asyncio.timeout(run.plan["timeout_s"]):
            with run.client() as http:
                await _exchange(run, http, run.built[number], stream, row)
        failure = _wrong(run.plan, request, stream)
    except asyncio.CancelledError:
        row |= {"end_s": run.now(), "failure": _failure("cancelled", "the run's limit was reached")}
        run.write(_finished(row, stream))
        raise
    except Exception as error:  # every failure is a row with its class, and the run goes on
        failure = _named(error, run.plan, stream, row["status"])
    row |= {"end_s": run.now() if failure else row["read_s"][-1], "failure": failure}
    run.write(_finished(row, stream))
    return row


async def _exchange(
    run: Run, http: httpx.AsyncClient, request: httpx.Request, stream: Stream, row: Row
) -> None:
    async def trace(name: str, info: Any) -> None:
        if name == "http11.send_request_body.complete":
            row["sent_s"] = run.now()

    request.extensions["trace"] = trace
    response = await http.send(request, stream=True)
    try:
        row["status"] = response.status_code
        if not _is_stream(response):
            raise _refusal(response, await _body(response))
        read_s, read_bytes = row["read_s"], row["read_bytes"]
        connection = response.extensions["network_stream"]
        async for data in response.aiter_raw():
            at_s = connection.read_s - run.zero_s
            if not read_s or read_s[-1] != at_s:
                read_s.append(at_s)
                read_bytes.append(0)
            read_bytes[-1] += len(data)
            stream.feed(data, at_s)
        stream.end()
    finally:
        await response.aclose()


async def _body(response: httpx.Response) -> bytes:
    text = b""
    async for data in response.aiter_raw():
        text += data
        if len(text) > 4000:
            break
    return text


def _is_stream(response: httpx.Response) -> bool:
    plain = response.headers.get("content-encoding", "identity") == "identity"
    content = response.headers.get("content-type", "").lower()
    return response.status_code == 200 and plain and "text/event-stream" in content


def _refusal(response: httpx.Response, body: bytes) -> StreamError:
    """What an answer says that is no stream of events."""
    headers, status = response.headers, response.status_code
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = body.decode("utf-8", "replace")
    if status != 200:
        hints = [
            words.format(headers[name][:100]) for name, words in HINTS.items() if name in headers
        ]
        text = "; ".join((error_text(answer) or "no text", *hints))
        return StreamError("status", f"HTTP {status}: {text}")
    if is_error(answer):
        return StreamError("error_event", f"the server says: {error_text(answer)}")
    names = ("content-type", "content-encoding")
    content = ", ".join(headers[name] for name in names if name in headers) or "of no content type"
    return StreamError("not_streaming", f"the answer is {content}, no event stream")


def _failure(failure_class: str, text: str) -> dict[str, str]:
    # A server may say what is no Unicode, which no file takes.
    return {"class": failure_class, "text": text.encode("utf-8", "replace").decode()}


def _wrong(plan: Row, request: Row, stream: Stream) -> dict[str, str] | None:
    """What is wrong with an answer that came to its end, or None."""
    if not stream.complete:
        return _failure("closed", "the answer ended without a finish reason or [DONE]")
    model, usage = plan["model"], usage_of(stream.usage)
    # transformers serve adds the revision.
    if stream.model and stream.model != model and not stream.model.startswith(f"{model}@"):
        text = f"asked for model {model!r}, answered by {stream.model!r}"
        return _failure("wrong_model", text)
    if stream.finish in ABORTED:
        return _failure("error_event", f"the server ended the answer with {stream.finish!r}")
    if usage["output_tokens"] is None:
        return _failure("no_usage", "the answer has no usage, so that its tokens are not known")
    for name in ("prompt_tokens", "output_tokens"):
        target, count = request.get(name), usage[name]
        if plan.get("check_lengths", True) and target is not None and count != target:
            return _failure("wrong_length", f"asked for {target} {name}, usage says {count}")
    return None


def _named(error: Exception, plan: Row, stream: Stream, status: int | None) -> dict[str, str]:
    """The class of an exception, and a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    after = f" after {stream.chunks} chunks" if stream.chunks else " before any chunk"
    after += f" of HTTP {status}" if status not in (None, 200) else ""
    if isinstance(error, StreamError):
        return _failure(error.failure_class, text)
    if isinstance(error, httpx.ConnectTimeout):
        return _failure("unreachable", f"no connection within {plan['connect_timeout_s']:g} s")
    if isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol | httpx.InvalidURL):
        return _failure("unreachable", text)
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return _failure("timeout", f"not finished within {plan['timeout_s']:g} s, stopped{after}")
    if isinstance(error, httpx.RemoteProtocolError) and not _is_closing(text):
        return _failure("malformed", f"the answer is no HTTP: {text}")
    if isinstance(error, httpx.HTTPError | OSError):
        return _failure("closed", f"the server closed the connection{after} ({text})")
    return _failure("malformed", f"{type(error).__name__}: {text}")


def _is_closing(text: str) -> bool:
    return "disconnected" in text or "closed connection" in text


def _finished(row: Row, stream: Stream) -> Row:
    """The row as it is written: times to the microsecond, the stream's events beside its reads."""
    times = ("scheduled_s", "sent_s", "end_s")
    row |= {name: None if row[name] is None else round(row[name], 6) for name in times}
    return row | {
        "read_s": [round(t, 6) for t in row["read_s"]],
        "event_s": [round(t, 6) for t in stream.event_s],
        "event_channels": "".join(stream.channels),
        "event_tokens": stream.tokens,
        "chunks": stream.chunks,
        "usage": usage_of(stream.usage),
        "finish": stream.finish,
        "model": stream.model,
    }


async def warm(http: httpx.AsyncClient) -> None:
    """One exchange with a server of this process, so that no request of the run waits for imports.

    The first request of httpx takes some 20 ms longer than the next ones.
    """

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(hello, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await http.get(f"http://127.0.0.1:{port}/")


async def run_plan(plan: Row, write: Callable[[Row], None]) -> None:
    """Run a plan; `write` gets each row. Ends at the plan's `limit_s` at the latest."""
    if plan.get("schema") != SCHEMA:
        raise ValueError(f"the plan has schema {plan.get('schema')}, this client reads {SCHEMA}")
    timeout = httpx.Timeout(None, connect=plan["connect_timeout_s"])
    context = httpx.create_ssl_context(trust_env=False)
    async with contextlib.AsyncExitStack() as open_clients:

        def client_of(connections: int) -> httpx.AsyncClient:
            # No proxy and no .netrc of the machine: the endpoint is spoken to directly.
            over = transport(connections, context)
            http = httpx.AsyncClient(transport=over, timeout=timeout, trust_env=False)
            open_clients.push_async_callback(http.aclose)
            return http

        shared = client_of(plan.get("connections") or 1)
        run = Run(plan, lambda: shared if plan.get("connections") else client_of(1), write)
        reason = None
        await warm(shared)
        busy_s = time.process_time()
        run.zero_s = clock() + LEAD_S
        header = {"row": "header", "schema": SCHEMA, "zero_s": run.zero_s}
        header |= {"zero_unix_s": time.time() + LEAD_S, "requests": len(plan["requests"])}
        write(header | {"load": plan.get("load")})
        try:
            async with asyncio.timeout(LEAD_S + plan["limit_s"]):
                await (closed_loop if plan.get("user_starts_s") else open_loop)(run)
        except TimeoutError:
            reason = f"the run's limit of {plan['limit_s']:g} s was reached"
        wall_s = run.now() + LEAD_S
        busy_s = time.process_time() - busy_s
        write({"row": "footer", "wall_s": wall_s, "cpu_s": busy_s, "stopped": reason})


def main(argv: list[str]) -> int:
    """The command line; 2 where the plan cannot be read."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m lib.measure.serving.client plan.json out.jsonl\n")
        return 2
    try:
        plan = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {argv[0]} is no plan: {error}\n")
        return 2
    with Path(argv[1]).open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()

        gc.freeze()
        gc.disable()  # a collection would stop the clock for milliseconds
        asyncio.run(run_plan(plan, write))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
