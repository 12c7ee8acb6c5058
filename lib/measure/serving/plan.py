"""What a run will send, and when, written down before it starts.

A cell is a load and the lengths of prompts and answers. Its prompts are its own: no other cell of
the sweep has sent them, so that a prefix cache has nothing to reuse.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.files import ROOT
from lib.measure.serving import kinds
from lib.measure.serving.arrivals import Lengths, Load, offsets_s, ramp_s
from lib.measure.serving.client import LEAD_S, SCHEMA
from lib.models.prompts import exact_prompt

MOST_REQUESTS = 20_000
TAIL_S = 1.0  # of arrivals after the window, so that its end is as loaded as the rest


@dataclass(frozen=True)
class Endpoint:
    """A server to measure: where it is, what it serves, and what its prompts are made from.

    Token-id prompts need `vocab_size`; text needs `tokenizer`. Without either, prompts are words,
    and their length in tokens is what the server says. Prompts of the chat api have that length
    before the template, so that it is not checked.
    """

    url: str
    model: str
    kind: str = "openai"
    api: str = "completions"
    tokenizer: Any = None
    vocab_size: int | None = None
    special_ids: tuple[int, ...] = ()

    @property
    def uses_ids(self) -> bool:
        """Whether prompts are sent as token ids."""
        entry = kinds.kind(self.kind)
        return entry.token_ids and self.api == "completions" and self.vocab_size is not None

    @property
    def address(self) -> str:
        """The address that requests go to."""
        return self.url.rstrip("/") + kinds.APIS[self.api]


@dataclass(frozen=True)
class Cell:
    """A load with its lengths; loaded for `warmup_s`, then measured for `window_s`."""

    load: Load
    prompt: Lengths
    output: Lengths
    warmup_s: float = 5.0
    window_s: float = 22.0

    @property
    def label(self) -> str:
        """Load and lengths, such as "closed 8, 512 in, 128 out"."""
        return f"{self.load.label}, {self.prompt.label} in, {self.output.label} out"

    @property
    def duration_s(self) -> float:
        """Seconds in which requests start."""
        return self.warmup_s + self.window_s + TAIL_S


class _WithoutTemplate:
    """A tokenizer as the completions api uses it: text as it is, no chat template."""

    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, **options)


def seed_number(text: str) -> int:
    """A number from a seed in words; the same words give the same number everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def token_ids(endpoint: Endpoint, tokens: int, number: int) -> tuple[int, ...]:
    """Ids drawn evenly from the vocabulary, special ones left out."""
    rng, special = random.Random(number), set(endpoint.special_ids)
    if len(special & set(range(endpoint.vocab_size))) >= endpoint.vocab_size:
        raise ValueError(f"all {endpoint.vocab_size} ids of the vocabulary are special")
    ids: list[int] = []
    while len(ids) < tokens:
        if (token := rng.randrange(endpoint.vocab_size)) not in special:
            ids.append(token)
    return tuple(ids)


def prompt(endpoint: Endpoint, tokens: int, seed: str) -> tuple[str | tuple[int, ...], int | None]:
    """A prompt of exactly `tokens` tokens and that length; None where it cannot be counted here."""
    number = seed_number(seed)
    if endpoint.uses_ids:
        return token_ids(endpoint, tokens, number), tokens
    if endpoint.tokenizer is None:
        return " ".join(f"{seed_number(f'{seed} {n}') % 1000}" for n in range(tokens)), None
    exact = exact_prompt(_WithoutTemplate(endpoint.tokenizer), tokens, seed=number)
    return exact.text, (tokens if endpoint.api == "completions" else None)


def build(
    endpoint: Endpoint,
    cell: Cell,
    *,
    seed: int,
    shortest_s: float | None = None,
    timeout_s: float = 60.0,
    connect_timeout_s: float = 5.0,
) -> dict[str, Any]:
    """The plan of a cell (see `client`).

    A closed loop gets as many requests as its users could finish if each took `shortest_s`, the
    time of a request on an idle server: it cannot run out.
    """
    name = f"{seed} {endpoint.model} {cell.label}"
    load, plan_times = cell.load, {}
    if load.users is None:
        at_s = offsets_s(load, cell.duration_s, f"{name} arrivals")
    else:
        if not shortest_s or shortest_s <= 0:
            raise ValueError(f"a closed loop needs shortest_s, the least time of one: {shortest_s}")
        count = load.users * (int(cell.duration_s / shortest_s) + 2)
        at_s = [None] * min(count, MOST_REQUESTS)
        starts_s = ramp_s(load.users, min(cell.warmup_s / 2, shortest_s))
        plan_times = {"user_starts_s": starts_s, "duration_s": cell.duration_s}
    if len(at_s) > MOST_REQUESTS:
        raise ValueError(
            f"{cell.label} asks for {len(at_s)} requests in {cell.duration_s:g} s, "
            f"more than {MOST_REQUESTS}; lower the rate or the window"
        )
    lengths = zip(
        cell.prompt.draw(len(at_s), f"{name} prompts"),
        cell.output.draw(len(at_s), f"{name} outputs"),
        strict=True,
    )
    requests = []
    for number, (prompt_tokens, output_tokens) in enumerate(lengths):
        text, length = prompt(endpoint, prompt_tokens, f"{name} {number}")
        body = kinds.body(endpoint.kind, endpoint.api, endpoint.model, text, output_tokens)
        requests.append(
            {
                "id": number,
                "at_s": at_s[number],
                "prompt_tokens": length,
                "output_tokens": output_tokens,
                "body": body,
            }
        )
    return {
        "schema": SCHEMA,
        "url": endpoint.address,
        "model": endpoint.model,
        "load": {"law": load.law, "value": load.value},
        "check_lengths": True,
        "timeout_s": timeout_s,
        "connect_timeout_s": connect_timeout_s,
        "limit_s": cell.duration_s + timeout_s,
        **plan_times,
        "requests": requests,
    }


def write(path: Path, data: dict[str, Any]) -> Path:
    """Write a plan; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
    return path


def run(data: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run a plan in a client process and return the rows it wrote.

    The plan and the rows stay in `folder` as plan.json and client.jsonl. Raises RuntimeError with
    the client's message where it did not start; a client that dies leaves the rows up to then.
    """
    path, out = write(folder / "plan.json", data), folder / "client.jsonl"
    command = [sys.executable, "-m", "lib.measure.serving.client", str(path), str(out)]
    limit_s = LEAD_S + data["limit_s"] + 60.0
    with (folder / "client.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):  # what it wrote is read below
                process.wait(limit_s)
        finally:
            process.kill()
            process.wait()
    rows = read(out) if out.exists() else []
    if not rows:
        message = (folder / "client.log").read_text(encoding="utf-8").strip()[-500:]
        raise RuntimeError(f"the client wrote nothing (exit {process.returncode}): {message}")
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a client's file; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def requests_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are requests, in the order in which they were scheduled."""
    requests = [row for row in rows if row["row"] == "request"]
    return sorted(requests, key=lambda row: (row["scheduled_s"], row["id"]))
