"""What a null server says: the script of its behaviours, and the events of one answer as bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

TEXT, REASON, TOOL = "text", "reasoning", "tool"


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
