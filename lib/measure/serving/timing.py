"""A client's row as facts and as tokens at their own time; tokens are counted by usage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from lib.measure.serving.stream import VISIBLE
from lib.measure.serving.window import FACTS, Fact, Window

Row = dict[str, Any]


def is_ok(row: Row) -> bool:
    """Whether the request was answered as it was asked."""
    return row["failure"] is None


def tokens_of_events(row: Row) -> list[int] | None:
    """Tokens that each event carried; None where the server does not tell them apart.

    Counts that come with the chunks must add up to the usage. Without counts, as many events as
    tokens are one token each.
    """
    total, counts = row["usage"]["output_tokens"], row["event_tokens"]
    if total is None:
        return None
    if None not in counts:
        return list(counts) if sum(counts) == total else None
    return [1] * len(counts) if len(counts) == total else None


def reads_of_tokens(row: Row) -> list[tuple[float, int]] | None:
    """(instant, tokens) of each read that brought tokens; None where `tokens_of_events` is.

    Events that one read brought have one instant.
    """
    counts = tokens_of_events(row)
    if counts is None:
        return None
    reads: list[tuple[float, int]] = []
    for t, count in zip(row["event_s"], counts, strict=True):
        if reads and reads[-1][0] == t:
            reads[-1] = (t, reads[-1][1] + count)
        else:
            reads.append((t, count))
    return reads


def gaps_s(row: Row) -> list[float]:
    """The gaps that were seen: before each token that came alone. Those inside a chunk are missing.

    Empty where the tokens of the chunks are not known.
    """
    return [b - a for (a, _), (b, count) in pairwise(reads_of_tokens(row) or []) if count == 1]


def credits(row: Row) -> list[tuple[float, float]]:
    """(instant, tokens): each token at its own time; empty where no token came.

    Where the tokens of the chunks are not known, the total is spread evenly over them.
    """
    reads = reads_of_tokens(row)
    if reads is not None:
        return [(t, float(count)) for t, count in reads]
    total = row["usage"]["output_tokens"]
    if total is None:  # it failed before its usage came: what was counted, or one an event
        counts = [1 if count is None else count for count in row["event_tokens"]]
    else:
        counts = [total / len(row["event_s"])] * len(row["event_s"]) if row["event_s"] else []
    return [(t, float(count)) for t, count in zip(row["event_s"], counts, strict=True)]


def silence_s(rows: Sequence[Row], window: Window) -> float:
    """The longest time within the window in which a request waited and none got a byte."""
    reads = sorted(t for row in rows for t in row["read_s"] if window.holds(t))
    gaps = list(pairwise([window.start_s, *reads, window.stop_s]))
    longest = 0.0
    for a, b in sorted(gaps, key=lambda gap: gap[0] - gap[1]):
        if b - a <= longest:
            break
        waits = (min(b, row["end_s"]) - max(a, row["scheduled_s"]) for row in rows)
        longest = max(longest, *waits, 0.0)
    return longest


def computed_prompt_tokens(row: Row) -> int | None:
    """Prompt tokens that the server had to compute: all, less those from its prefix cache."""
    prompt = row["usage"]["prompt_tokens"]
    return None if prompt is None else prompt - (row["usage"]["cached_tokens"] or 0)


def tokens_by_second(rows: Iterable[Row], window: Window) -> dict[str, list[float]]:
    """Tokens credited to each whole second of the window, by kind.

    An output token counts when it came. The prompt tokens that were computed (without those from
    the prefix cache) count when the first token came, which is when the prompt had been read.
    Failed requests count for what they brought: the server has worked for it.
    """
    seconds = window.whole_seconds
    output, prompt = [0.0] * seconds, [0.0] * seconds

    def credit(column: list[float], t: float, count: float) -> None:
        if t >= window.start_s and (second := int(t - window.start_s)) < seconds:
            column[second] += count

    for row in rows:
        for t, count in credits(row):
            credit(output, t, count)
        if row["event_s"]:
            credit(prompt, row["event_s"][0], computed_prompt_tokens(row) or 0)
    return {"output_tokens_by_s": output, "prompt_tokens_by_s": prompt}


def fact(row: Row) -> Fact:
    """The facts of a request."""
    reads, events_s = reads_of_tokens(row), row["event_s"]
    place = row["event_channels"].find(VISIBLE)
    values = {
        **{name: row[name] for name in ("scheduled_s", "sent_s", "end_s", "chunks")},
        "first_s": events_s[0] if events_s else None,
        "visible_s": events_s[place] if place >= 0 else None,
        "last_s": events_s[-1] if events_s else None,
        "first_tokens": reads[0][1] if reads else None,
        **{name: row["usage"][name] for name in FACTS if name in row["usage"]},
        "asked_tokens": row["asked"]["output_tokens"],
        "failure": row["failure"]["class"] if row["failure"] else "",
    }
    return {name: values[name] for name in FACTS}
