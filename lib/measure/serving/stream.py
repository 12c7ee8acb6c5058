"""A streamed answer as it comes in: server-sent events, and in which of them tokens came.

A chunk is not a token. How many tokens an event carries is known from its token ids, or from a
usage count that comes with every chunk; otherwise only the total is known, at the end.
"""

from __future__ import annotations

import json
from typing import Any

# Channels of an event, one letter each, as a client's row has them: visible text, reasoning, a tool
# call, token ids without text, tokens that are counted while their text is held back.
VISIBLE, REASONING, TOOL, IDS, HIDDEN = "c", "r", "t", "i", "h"
SSE_FIELDS = (b"event:", b"id:", b"retry:", b":")


class StreamError(Exception):
    """A stream that is none, or that says it failed. `failure_class` is one of client.CLASSES."""

    def __init__(self, failure_class: str, text: str) -> None:
        super().__init__(text)
        self.failure_class = failure_class


class Stream:
    """Events of one answer. `feed` takes bytes as they were read and the instant of the read.

    `event_s`, `channels` and `tokens` have one entry for each event that carried tokens; a count is
    None where the server does not tell it.
    """

    def __init__(self) -> None:
        self.event_s: list[float] = []
        self.channels: list[str] = []
        self.tokens: list[int | None] = []
        self.usage: dict[str, Any] | None = None
        self.model: str | None = None
        self.finish: str | None = None
        self.done = False
        self.chunks = 0
        self._left = b""
        self._counted: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer said that it is finished."""
        return self.done or self.finish is not None

    def feed(self, data: bytes, read_s: float) -> None:
        """Add bytes; an event counts from the read that brought the end of its line."""
        *lines, self._left = (self._left + data).split(b"\n")
        for line in lines:
            if line := line.strip():
                self._line(line, read_s)

    def end(self) -> None:
        """The stream has ended; raises where it stopped inside a line."""
        if rest := self._left.strip():
            raise StreamError("malformed", f"the stream stops inside a line: {_shown(rest)}")

    def _line(self, line: bytes, read_s: float) -> None:
        if not line.startswith(b"data:"):
            if line.startswith(SSE_FIELDS):
                return
            raise StreamError("malformed", f"a line that is no server-sent event: {_shown(line)}")
        text = line[5:].strip()
        if text == b"[DONE]":
            self.done = True
            return
        try:
            event = json.loads(text)
        except ValueError:
            raise StreamError("malformed", f"an event that is no JSON: {_shown(text)}") from None
        if not isinstance(event, dict):
            raise StreamError("malformed", f"an event that is no object: {_shown(text)}")
        if event.get("error"):
            raise StreamError("error_event", f"the server says: {error_text(event)}")
        try:
            self._event(event, read_s)
        except (AttributeError, TypeError, KeyError):
            raise StreamError("malformed", f"an event of another form: {_shown(text)}") from None

    def _event(self, event: dict[str, Any], read_s: float) -> None:
        self.chunks += 1
        self.model = event.get("model") or self.model
        usage = event.get("usage")
        choice = (event.get("choices") or [None])[0]
        channel, ids, finish = _channel(choice) if choice else ("", None, None)
        self.finish = finish or self.finish
        count = self._count(usage, choice is not None and finish is None)
        if usage:
            self.usage = usage
        if ids:
            count = len(ids)
        if finish and not channel and not self.event_s and not count:
            count = (usage or {}).get("completion_tokens")  # all came by now, none was shown
        if not channel and (ids or (count and choice)):
            channel = IDS if ids else HIDDEN
        if channel:
            self.event_s.append(read_s)
            self.channels.append(channel)
            self.tokens.append(count)

    def _count(self, usage: dict[str, Any] | None, before_the_end: bool) -> int | None:
        """Tokens since the last count, where the server counts with every chunk.

        A usage that first comes with the end of the answer is the total, and tells of no chunk.
        """
        if not usage or usage.get("completion_tokens") is None:
            return None
        if self._counted is None and not before_the_end:
            return None
        total = usage["completion_tokens"]
        new, self._counted = total - (self._counted or 0), total
        return new


def _channel(choice: dict[str, Any]) -> tuple[str, list[int] | None, str | None]:
    """The channel that got text ("" if none did), token ids, and why the answer is finished."""
    delta = choice.get("delta") or {}
    if choice.get("text") or delta.get("content"):
        channel = VISIBLE
    elif delta.get("reasoning_content") or delta.get("reasoning"):
        channel = REASONING
    elif delta.get("tool_calls"):
        channel = TOOL
    else:
        channel = ""
    return channel, choice.get("token_ids"), choice.get("finish_reason")


def usage_of(usage: dict[str, Any] | None) -> dict[str, int | None]:
    """Prompt, output, cached and reasoning tokens of a usage object; None where it has none."""
    usage = usage or {}
    prompt = usage.get("prompt_tokens_details") or {}
    output = usage.get("completion_tokens_details") or {}
    return {
        "prompt_tokens": usage.get("prompt_tokens"),
        "output_tokens": usage.get("completion_tokens"),
        "cached_tokens": prompt.get("cached_tokens"),
        "reasoning_tokens": output.get("reasoning_tokens"),
    }


def error_text(answer: Any) -> str:
    """The message of an error object, on one line of at most 300 characters."""
    text = answer
    for name in ("error", "message", "detail"):
        if isinstance(text, dict) and text.get(name):
            text = text[name]
    return " ".join(str(text).split())[:300]


def _shown(data: bytes) -> str:
    return repr(data[:80].decode("utf-8", "replace"))
