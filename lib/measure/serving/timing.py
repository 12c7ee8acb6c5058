"""What a client's row says of its request: latencies from the scheduled instant, tokens by usage.

A value that does not exist is None, with the reason where one is asked for. Times are seconds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lib.measure.serving.stream import VISIBLE

Row = dict[str, Any]
NO_TOKEN = "no token came"
ONE_TIME = "all tokens came at one time, so that there is no gap"
CHUNKS_UNKNOWN = "the server does not say how many tokens a chunk carries"


def is_ok(row: Row) -> bool:
    """Whether the request was answered as it was asked."""
    return row["failure"] is None


def delay_s(row: Row) -> float | None:
    """The client's own delay: from the scheduled instant until the request was handed over."""
    return None if row["sent_s"] is None else row["sent_s"] - row["scheduled_s"]


def ttft_s(row: Row) -> float | None:
    """From the scheduled instant to the first token of any channel; None where no token came."""
    return row["event_s"][0] - row["scheduled_s"] if row["event_s"] else None


def visible_s(row: Row) -> float | None:
    """From the scheduled instant to the first visible text; None where there was none."""
    place = row["event_channels"].find(VISIBLE)
    return None if place < 0 else row["event_s"][place] - row["scheduled_s"]


def latency_s(row: Row) -> float:
    """From the scheduled instant to the end of the answer, or to the failure."""
    return row["end_s"] - row["scheduled_s"]


def output_tokens(row: Row) -> int | None:
    """Tokens of the answer by usage."""
    return row["usage"]["output_tokens"]


def tokens_of_events(row: Row) -> list[int] | None:
    """Tokens that each event carried; None where the server does not tell them apart.

    Counts that come with the chunks must add up to the usage. Without counts, as many events as
    tokens are one token each.
    """
    total, counts = output_tokens(row), row["event_tokens"]
    if total is None:
        return None
    if None not in counts:
        return list(counts) if sum(counts) == total else None
    return [1] * len(counts) if len(counts) == total else None


def arrivals_of_tokens(row: Row) -> tuple[list[tuple[float, int]] | None, str]:
    """(instant, tokens) of each read that brought tokens, or None and why.

    Events that one read brought have one instant.
    """
    counts = tokens_of_events(row)
    if counts is None:
        return None, CHUNKS_UNKNOWN
    reads: list[tuple[float, int]] = []
    for t, count in zip(row["event_s"], counts, strict=True):
        if reads and reads[-1][0] == t:
            reads[-1] = (t, reads[-1][1] + count)
        else:
            reads.append((t, count))
    return reads, ""


def mean_itl_s(row: Row) -> tuple[float | None, str]:
    """Mean gap between tokens, the TPOT of the request; or None and why.

    From the first instant that brought tokens to the last, over the tokens that came after the
    first: those inside the first chunk span no time that was seen.
    """
    reads, reason = arrivals_of_tokens(row)
    if reads is None:
        return None, reason
    after = sum(count for _, count in reads[1:])
    if not after:
        return None, ONE_TIME if reads else NO_TOKEN
    return (reads[-1][0] - reads[0][0]) / after, ""


def gaps_s(row: Row) -> list[float]:
    """The gaps that were seen: before each token that came alone. Those inside a chunk are missing.

    Empty where the tokens of the chunks are not known.
    """
    reads, _ = arrivals_of_tokens(row)
    return [b - a for (a, _), (b, count) in pairwise(reads or []) if count == 1]


def credits(row: Row) -> list[tuple[float, float]]:
    """(instant, tokens): each token at its own time; empty where no token came.

    Where the tokens of the chunks are not known, the total is spread evenly over them.
    """
    reads, _ = arrivals_of_tokens(row)
    if reads is not None:
        return [(t, float(count)) for t, count in reads]
    total = output_tokens(row)
    if total is None:  # it failed before its usage came: what was counted, or one an event
        counts = [1 if count is None else count for count in row["event_tokens"]]
    else:
        counts = [total / len(row["event_s"])] * len(row["event_s"]) if row["event_s"] else []
    return [(t, float(count)) for t, count in zip(row["event_s"], counts, strict=True)]


def computed_prompt_tokens(row: Row) -> int | None:
    """Prompt tokens that the server had to compute: all, less those from its prefix cache."""
    prompt = row["usage"]["prompt_tokens"]
    return None if prompt is None else prompt - (row["usage"]["cached_tokens"] or 0)


FACTS = (
    "scheduled_s", "sent_s", "first_s", "visible_s", "last_s", "end_s", "first_tokens",
    "prompt_tokens", "cached_tokens", "output_tokens", "asked_tokens", "chunks", "failure",
)  # fmt: skip


def fact(row: Row) -> Row:
    """The instants and counts of a request that a record keeps; every latency follows from them.

    `first_s` and `last_s` are when the first and the last tokens came, `first_tokens` how many came
    at `first_s` (None where that is not known), `failure` a class or "". Instants are of the run.
    """
    reads, _ = arrivals_of_tokens(row)
    place = row["event_channels"].find(VISIBLE)
    return {
        "scheduled_s": row["scheduled_s"],
        "sent_s": row["sent_s"],
        "first_s": row["event_s"][0] if row["event_s"] else None,
        "visible_s": row["event_s"][place] if place >= 0 else None,
        "last_s": row["event_s"][-1] if row["event_s"] else None,
        "end_s": row["end_s"],
        "first_tokens": reads[0][1] if reads else None,
        "prompt_tokens": row["usage"]["prompt_tokens"],
        "cached_tokens": row["usage"]["cached_tokens"],
        "output_tokens": row["usage"]["output_tokens"],
        "asked_tokens": row["asked"]["output_tokens"],
        "chunks": row["chunks"],
        "failure": row["failure"]["class"] if row["failure"] else "",
    }
