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
SSE_FIELDS = (b"event", b"data", b"id", b"retry", b"")  # the last is a comment's
BOM = b"\xef\xbb\xbf"
MOST_LINE = 2**22  # bytes; to look for its end with every read would stop the client's clock
ABORTED = ("abort", "error")  # finish reasons of an answer that the server gave up


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
        self._left, self._kind, self._data = b"", b"", b""  # of a line and of an event
        self._end_s: float | None = None
        self._counted: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer said that it is finished."""
        return self.done or self.finish is not None

    def feed(self, data: bytes, read_s: float) -> None:
        """Add bytes; an event counts from the read that brought the end of its line."""
        *lines, self._left = (self._left + data).split(b"\n")
        if len(self._left) > MOST_LINE:
            raise StreamError("malformed", f"a line of over {MOST_LINE:,} bytes")
        for line in lines:
            self._line(line.strip(), read_s)

    def end(self) -> None:
        """The stream has ended; raises where it stopped inside an event."""
        if rest := self._left.strip() or self._data:
            if rest != b"data: [DONE]":  # some servers do not end this line
                raise StreamError("malformed", f"the stream stops inside a line: {_shown(rest)}")
            self.done = True
        count = usage_of(self.usage)["output_tokens"]
        if count and not self.event_s and self._end_s is not None:  # none was shown, all had come
            self._credit(HIDDEN, count, self._end_s)

    def _line(self, line: bytes, read_s: float) -> None:
        """Take a line; an event is read as soon as its lines of data are whole."""
        name, _, text = line.removeprefix(BOM).partition(b":")
        if not line:
            if self._data:
                raise StreamError("malformed", f"an event that is no JSON: {_shown(self._data)}")
            self._kind = b""
        elif name not in SSE_FIELDS:
            raise StreamError("malformed", f"a line that is no server-sent event: {_shown(line)}")
        elif name == b"event":
            self._kind = text.strip()
        elif name == b"data":
            self._data = (self._data + b"\n" + text).strip()
            self._read(self._data, read_s)

    def _read(self, text: bytes, read_s: float) -> None:
        if text == b"[DONE]":
            self.done, self._data = True, b""
            self._ends(read_s)
            return
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            if self._kind != b"error":
                return  # its other lines come, or the blank one that ends it
            event = text.decode("utf-8", "replace")
        self._data = b""
        if self._kind == b"error" or is_error(event):
            raise StreamError("error_event", f"the server says: {error_text(event)}")
        if not isinstance(event, dict):
            raise StreamError("malformed", f"an event that is no object: {_shown(text)}")
        try:
            self._event(event, read_s)
        except (AttributeError, TypeError, KeyError):
            raise StreamError("malformed", f"an event of another form: {_shown(text)}") from None
        except ValueError as wrong:
            raise StreamError("malformed", f"{wrong}: {_shown(text)}") from None

    def _ends(self, read_s: float) -> None:
        self._end_s = read_s if self._end_s is None else self._end_s

    def _credit(self, channel: str, count: int | None, read_s: float) -> None:
        self.event_s.append(read_s)
        self.channels.append(channel)
        self.tokens.append(count)

    def _event(self, event: dict[str, Any], read_s: float) -> None:
        self.chunks += 1
        self._names(event.get("model"))
        usage = event.get("usage")
        usage_of(usage)  # raises where its counts cannot be
        choice = (event.get("choices") or [None])[0]
        channel, ids, finish = _channel(choice) if choice else ("", None, None)
        if channel and self.complete:
            raise ValueError("text after the end of the answer")
        if finish:
            self.finish = _text(finish)
            self._ends(read_s)
        count = self._count(usage, choice is not None and finish is None)
        if usage:
            self.usage = usage
        if ids:
            count = len(ids)
        if not channel and (ids or (count and choice)):
            channel = IDS if ids else HIDDEN
        if channel:
            self._credit(channel, count, read_s)

    def _names(self, model: str | None) -> None:
        if model and self.model and model != self.model:
            text = f"the answer is by model {self.model!r}, and then by {model!r}"
            raise StreamError("wrong_model", text)
        self.model = _text(model) if model else self.model

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
        return new if new >= 0 else None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


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
    """Prompt, output, cached and reasoning tokens of a usage object; None where it has none.

    Raises AttributeError where it is no such object, and ValueError where its counts cannot be.
    """
    usage = usage or {}
    prompt = usage.get("prompt_tokens_details") or {}
    output = usage.get("completion_tokens_details") or {}
    counts = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "output_tokens": usage.get("completion_tokens"),
        "cached_tokens": prompt.get("cached_tokens"),
        "reasoning_tokens": output.get("reasoning_tokens"),
    }
    for name, count in counts.items():
        if count is not None and (type(count) is not int or count < 0):
            raise ValueError(f"usage whose {name} are {count!r}")
    prompt_tokens, cached_tokens = counts["prompt_tokens"], counts["cached_tokens"] or 0
    if prompt_tokens is not None and cached_tokens > prompt_tokens:
        raise ValueError(f"usage of {prompt_tokens} prompt_tokens with {cached_tokens} cached ones")
    return counts


def is_error(answer: Any) -> bool:
    """Whether an answer says that the server failed."""
    return isinstance(answer, dict) and bool(answer.get("error") or answer.get("object") == "error")


def error_text(answer: Any) -> str:
    """The message of an error object, on one line of at most 300 characters."""
    text = answer
    for name in ("error", "message", "detail"):
        if isinstance(text, dict) and text.get(name):
            text = text[name]
    return " ".join(str(text).split())[:300]


def _shown(data: bytes) -> str:
    return repr(data[:80].decode("utf-8", "replace"))
