"""A server that follows a script and stamps what it writes: the truth that clients are scored by.

`python -m lib.measure.serving.nullserver script.json stamps.jsonl` prints its port on the first
line and serves 127.0.0.1 until its input closes. The script holds `behaviours`; request number n
(those of the warm-up too) gets number n modulo their count. Instants are CLOCK_MONOTONIC in s; the
first row of the stamps has the wall clock beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lib.files import ROOT
from lib.measure.serving import kinds

clock: Callable[[], float] = time.perf_counter
TEXT, REASON, TOOL = "text", "reasoning", "tool"
MOST_BODY = 64 * 2**20


@dataclass(frozen=True)
class Behaviour:
    """How one request is answered.

    Token k of the answer (from 0) is due `ttft_s` + k `gap_s` after the request was read; a chunk
    of `bundle` tokens is written when its last token is due, and `join` chunks go out in one write.
    The first `reasoning_tokens` and the next `tool_tokens` go to those channels. `output_tokens`
    None gives as many as were asked for. `role_event` sends the empty first chunk of chat servers.
    `usage`: "asked" as the request wants it, "final" always at the end, "none" never.
    After so many tokens `reset_after` ends the connection with a reset, `close_after` without one,
    and `hang_after` sends nothing more. `malformed`: "http", "json" or "line". A `status` other
    than 200 answers with an error; `model` answers in another model's name; `dialect`
    "transformers" refuses token ids and forced lengths as that server does.
    """

    ttft_s: float = 0.05
    gap_s: float = 0.01
    output_tokens: int | None = None
    bundle: int = 1
    join: int = 1
    reasoning_tokens: int = 0
    tool_tokens: int = 0
    cached_tokens: int = 0
    role_event: bool = True
    usage: str = "asked"
    reset_after: int | None = None
    close_after: int | None = None
    hang_after: int | None = None
    malformed: str = ""
    status: int = 200
    stream: bool = True
    model: str | None = None
    dialect: str = ""
    close_connection: bool = False


@dataclass
class Server:
    """A running null server. `accept_delay_s` passes before each connection is taken."""

    behaviours: list[Behaviour]
    stamp: Callable[[dict[str, Any]], None]
    model: str = "null"
    accept_delay_s: float = 0.0
    count: int = 0
    counters: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("requests", "prompt_tokens", "generation_tokens", "cached_tokens"), 0
        )
    )


@dataclass
class Exchange:
    """One request being answered: its connection, how to answer, what it asked, its row."""

    server: Server
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    behaviour: Behaviour
    body: dict[str, Any]
    row: dict[str, Any]


async def serve(server: Server, listener: socket.socket) -> None:
    """Take connections one by one until cancelled; a failed one ends alone."""
    loop, tasks = asyncio.get_running_loop(), set()
    try:
        while True:
            connection, _ = await loop.sock_accept(listener)
            if server.accept_delay_s:
                await asyncio.sleep(server.accept_delay_s)
            task = asyncio.create_task(converse(server, connection))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        for task in (*tasks,):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def converse(server: Server, connection: socket.socket) -> None:
    """Answer the requests of one connection, one after another."""
    accepted_s = clock()
    reader, writer = await asyncio.open_connection(sock=connection, limit=MOST_BODY)
    try:
        while (request := await read_request(reader)) is not None:
            if not await answer(server, reader, writer, request, accepted_s):
                break
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the client went away
    finally:
        writer.close()


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Method, path, headers and body of the next request; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    return {"method": method, "path": path, "headers": headers, "data": data, "read_s": clock()}


async def answer(
    server: Server,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    request: dict[str, Any],
    accepted_s: float,
) -> bool:
    """Answer one request; whether the connection stays open."""
    path = request["path"].partition("?")[0].rstrip("/")
    if request["method"] == "GET":
        status, kind, text = page(server, path)
        writer.write(plain(status, text, kind))
        return True
    if path not in kinds.APIS.values():
        writer.write(plain(404, error("no such path")))
        return True
    behaviour = server.behaviours[server.count % len(server.behaviours)]
    row = {
        "row": "request",
        "n": server.count,
        "behaviour": server.count % len(server.behaviours),
        "request_id": request["headers"].get("x-request-id"),
        "path": path,
        "accepted_s": accepted_s,
        "received_s": request["read_s"],
        "writes": [],
        "outcome": "ok",
    }
    server.count += 1
    try:
        body = json.loads(request["data"])
        stays = await reply(Exchange(server, reader, writer, behaviour, body, row))
    except ConnectionError as gone:
        row["outcome"], stays = f"client closed: {gone}", False
    except (ValueError, KeyError, TypeError) as wrong:
        row["outcome"], stays = f"bad request: {wrong}", False
        writer.write(plain(400, error(str(wrong))))
    finally:
        row["ended_s"] = clock()
        server.stamp(row)
    return stays


def page(server: Server, path: str) -> tuple[int, str, str]:
    """Status, content type and text of a GET."""
    if path == "/health":
        return 200, "application/json", json.dumps({"status": "ok"})
    if path == "/v1/models":
        models = [
            {"id": server.model, "object": "model", "owned_by": "null", "max_model_len": 8192}
        ]
        return 200, "application/json", json.dumps({"object": "list", "data": models})
    if path == "/metrics":
        lines = []
        for name, value in server.counters.items():
            lines += [f"# TYPE null:{name} counter", f'null:{name}_total{{model="null"}} {value}']
        return 200, "text/plain", "\n".join(lines) + "\n"
    return 404, "application/json", error("no such path")


def error(text: str) -> str:
    """An error object."""
    return json.dumps({"error": {"message": text, "type": "invalid_request_error"}})


def plain(status: int, text: str, kind: str = "application/json") -> bytes:
    """A whole HTTP answer."""
    data = text.encode()
    head = f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def prompt_tokens(body: dict[str, Any]) -> int:
    """Tokens of a prompt: ids one by one, or the words of a text."""
    if "messages" in body:
        return sum(len(_words(message.get("content"))) for message in body["messages"])
    prompt = body["prompt"]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    return len(prompt) if isinstance(prompt, list) else len(prompt.split())


def prompt_key(body: dict[str, Any]) -> str:
    """A name of a request by its prompt, for clients that send no request id."""
    prompt = body.get("prompt")
    if "messages" in body:
        prompt = " ".join(w for m in body["messages"] for w in _words(m.get("content")))
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]


def _words(content: Any) -> list[str]:
    if isinstance(content, list):
        return [w for part in content for w in _words(part.get("text"))]
    return (content or "").split()


def refusal(server: Server, behaviour: Behaviour, body: dict[str, Any]) -> tuple[int, str] | None:
    """The status and the words with which a request is refused, or None."""
    if behaviour.status != 200:
        return behaviour.status, f"the script answers {behaviour.status}"
    if body.get("model") not in (None, server.model):
        return 404, f"the model {body['model']!r} does not exist"
    if behaviour.dialect == "transformers":
        if "prompt" in body and not isinstance(body["prompt"], str):
            return 400, "prompt must be a string."
        if unknown := {"ignore_eos", "min_tokens", "return_token_ids"} & body.keys():
            return 422, f"Unexpected fields in the request: {unknown}"
    return None


async def reply(exchange: Exchange) -> bool:
    """Follow the behaviour; whether the connection stays open."""
    behaviour, body, row = exchange.behaviour, exchange.body, exchange.row
    writer = exchange.writer
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or 16
    tokens = limit if behaviour.output_tokens is None else behaviour.output_tokens
    count = prompt_tokens(body)
    row |= {"prompt_tokens": count, "asked_tokens": limit, "tokens": tokens}
    row |= {"cached_tokens": behaviour.cached_tokens, "prompt_key": prompt_key(body)}
    if answer := refusal(exchange.server, behaviour, body):
        row |= {"outcome": f"refused {answer[0]}", "tokens": 0}
        writer.write(plain(answer[0], error(answer[1])))
        return True
    if behaviour.malformed == "http":
        row |= {"outcome": "malformed", "tokens": 0}
        writer.write(b"this is no answer\r\n\r\n")
        return False
    if not behaviour.stream or not body.get("stream"):
        row["outcome"] = "not streamed"
        await until(row["received_s"] + behaviour.ttft_s)
        name = behaviour.model or body.get("model")
        text = {"text": "w " * tokens, "index": 0, "finish_reason": "length"}
        usage = usage_of(count, tokens, behaviour)
        writer.write(plain(200, json.dumps({"model": name, "choices": [text], "usage": usage})))
        return True
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    close = behaviour.close_connection
    writer.write((head + ("Connection: close\r\n" if close else "") + "\r\n").encode())
    return await stream(exchange) and not close


async def until(at_s: float) -> None:
    """Wait for an instant of the clock."""
    await asyncio.sleep(max(0.0, at_s - clock()))


async def stream(exchange: Exchange) -> bool:
    """Write the events of one answer and stamp those with tokens; whether it came to its end."""
    behaviour, row, writer = exchange.behaviour, exchange.row, exchange.writer
    tokens, count = row["tokens"], 0
    is_chat = row["path"] == kinds.APIS["chat"]
    say = Speaker(behaviour, exchange.body, is_chat, row["prompt_tokens"])
    if is_chat and behaviour.role_event:
        writer.write(chunked(say.role()))
    for group in writes(behaviour, tokens):
        if ending(behaviour, count) is not None:
            break
        last = sum(size for _, size in group) + count - 1
        await until(row["received_s"] + behaviour.ttft_s + last * behaviour.gap_s)
        data = b"".join(chunked(say.tokens(first, size)) for first, size in group)
        now_s = clock()
        writer.write(data)
        row["writes"] += [[now_s, size, say.channel(first)] for first, size in group]
        count = last + 1
    if (end := ending(behaviour, count)) is not None:
        row |= {"outcome": end, "tokens": count}
        await finish_early(exchange, end)
        return False
    if behaviour.malformed:
        line = b"data: {not json\n\n" if behaviour.malformed == "json" else b"what is this\n\n"
        row["outcome"] = "malformed"
        writer.write(chunked(line) + b"0\r\n\r\n")
        return False
    writer.write(chunked(say.end(tokens)) + b"0\r\n\r\n")
    totals = {"requests": 1, "prompt_tokens": row["prompt_tokens"], "generation_tokens": tokens}
    for name, value in {**totals, "cached_tokens": behaviour.cached_tokens}.items():
        exchange.server.counters[name] += value
    return True


def writes(behaviour: Behaviour, tokens: int) -> list[list[tuple[int, int]]]:
    """The chunks, as (first token, tokens), of each write of an answer."""
    size = behaviour.bundle
    chunks = [(first, min(size, tokens - first)) for first in range(0, tokens, size)]
    return [chunks[n : n + behaviour.join] for n in range(0, len(chunks), behaviour.join)]


def ending(behaviour: Behaviour, count: int) -> str | None:
    """How the answer ends after `count` tokens, or None."""
    for name in ("reset", "close", "hang"):
        after = getattr(behaviour, f"{name}_after")
        if after is not None and count >= after:
            return name
    return None


async def finish_early(exchange: Exchange, end: str) -> None:
    """Reset or close, or say nothing more until the client has gone away."""
    if end == "hang":
        await exchange.reader.read(1)
    if end == "reset":
        connection = exchange.writer.get_extra_info("socket")
        # Closing with a linger of zero sends a reset.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.writer.transport.abort()


def chunked(data: bytes) -> bytes:
    """One chunk of an HTTP answer."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def usage_of(count: int, tokens: int, behaviour: Behaviour) -> dict[str, Any]:
    """A usage object as servers send it."""
    return {
        "prompt_tokens": count,
        "completion_tokens": tokens,
        "total_tokens": count + tokens,
        "prompt_tokens_details": {"cached_tokens": behaviour.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": behaviour.reasoning_tokens},
    }


class Speaker:
    """The events of one answer as bytes."""

    def __init__(
        self, behaviour: Behaviour, body: dict[str, Any], is_chat: bool, count: int
    ) -> None:
        options = body.get("stream_options") or {}
        self.behaviour, self.is_chat, self.count = behaviour, is_chat, count
        self.model = behaviour.model or body.get("model") or "null"
        on_request = behaviour.usage == "asked"
        self.each = on_request and bool(options.get("continuous_usage_stats"))
        self.final = behaviour.usage == "final" or (
            on_request and bool(options.get("include_usage"))
        )
        self.ids = bool(body.get("return_token_ids")) and not is_chat

    def channel(self, token: int) -> str:
        """The channel that token number `token` goes to."""
        before = self.behaviour.reasoning_tokens
        if not self.is_chat or token >= before + self.behaviour.tool_tokens:
            return TEXT
        return REASON if token < before else TOOL

    def role(self) -> bytes:
        """The first chunk of a chat: a role and no token."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._event([choice], 0 if self.each else None)

    def tokens(self, first: int, size: int) -> bytes:
        """A chunk with `size` tokens from number `first` on."""
        text = "".join(f"w{n} " for n in range(first, first + size))
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if not self.is_chat:
            choice |= {"text": text, "logprobs": None}
            choice |= {"token_ids": list(range(first, first + size))} if self.ids else {}
        elif (channel := self.channel(first)) == TEXT:
            choice["delta"] = {"content": text}
        elif channel == REASON:
            choice["delta"] = {"reasoning_content": text}
        else:
            call = {"index": 0, "id": "call-0", "type": "function"}
            call["function"] = {"name": "look", "arguments": text}
            choice["delta"] = {"tool_calls": [call]}
        return self._event([choice], first + size if self.each else None)

    def end(self, tokens: int) -> bytes:
        """The finish reason, the usage and the end mark."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if tokens else "stop"}
        choice |= {"delta": {}} if self.is_chat else {"text": ""}
        data = self._event([choice], tokens if self.each else None)
        if self.final:
            data += self._event([], tokens)
        return data + b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], tokens: int | None) -> bytes:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        event = {"id": "null-0", "object": kind, "created": 0, "model": self.model}
        event["choices"] = choices
        if tokens is not None:
            event["usage"] = usage_of(self.count, tokens, self.behaviour)
        return b"data: " + json.dumps(event).encode() + b"\n\n"


def script(
    behaviours: list[Behaviour], *, model: str = "null", accept_delay_s: float = 0.0
) -> dict[str, Any]:
    """The script file's content."""
    rows = [asdict(behaviour) for behaviour in behaviours]
    return {"behaviours": rows, "model": model, "accept_delay_s": accept_delay_s}


def load(data: dict[str, Any]) -> tuple[list[Behaviour], str, float]:
    """Behaviours, model and accept delay of a script; raises on what it does not know."""
    names = {f.name for f in fields(Behaviour)}
    for row in data["behaviours"]:
        if unknown := row.keys() - names:
            raise ValueError(f"unknown behaviour {sorted(unknown)}; known: {sorted(names)}")
    behaviours = [Behaviour(**row) for row in data["behaviours"]]
    if not behaviours:
        raise ValueError("the script has no behaviours; give at least one")
    return behaviours, data.get("model", "null"), float(data.get("accept_delay_s", 0.0))


async def run(script_path: Path, stamps_path: Path) -> None:
    """Serve a script on a free port of 127.0.0.1 until the standard input closes."""
    behaviours, model, delay_s = load(json.loads(script_path.read_text(encoding="utf-8")))
    with stamps_path.open("w", encoding="utf-8") as file:

        def stamp(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        stamp({"row": "header", "clock_s": clock(), "unix_s": time.time()})
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setblocking(False)
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        server = Server(behaviours, stamp, model, delay_s)
        task = asyncio.create_task(serve(server, listener))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def start(
    folder: Path,
    behaviours: list[Behaviour],
    *,
    model: str = "null",
    accept_delay_s: float = 0.0,
) -> Iterator[tuple[str, Path]]:
    """A null server in a process of its own until the block ends: its url, and its stamps' file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "script.json", folder / "stamps.jsonl"
    data = script(behaviours, model=model, accept_delay_s=accept_delay_s)
    paths[0].write_text(json.dumps(data), encoding="utf-8")
    command = [sys.executable, "-m", "lib.measure.serving.nullserver", *map(str, paths)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the null server did not start (exit {process.wait(10)})")
        yield f"http://127.0.0.1:{port}", paths[1]
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def read_stamps(path: Path) -> list[dict[str, Any]]:
    """The rows that a null server wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: list[str]) -> int:
    """The command line; 2 where the script cannot be read."""
    if len(argv) != 2:
        sys.stderr.write(
            "usage: python -m lib.measure.serving.nullserver script.json stamps.jsonl\n"
        )
        return 2
    try:
        asyncio.run(run(Path(argv[0]), Path(argv[1])))
    except (OSError, ValueError) as wrong:
        sys.stderr.write(f"error: {wrong}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
