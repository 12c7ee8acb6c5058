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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.files import ROOT
from lib.measure.serving import kinds
from lib.measure.serving.script import Behaviour, Speaker, load, script, usage_of

clock: Callable[[], float] = time.perf_counter
MOST_BODY = 64 * 2**20


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
