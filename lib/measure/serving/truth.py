"""Score what a client says against what the null server stamped.

A claim is what one client says of one request: a dict with `id` (or `prompt_key` for clients that
send none) and, where the client tells them, `ttft_s`, `visible_s`, `itl_s` (mean gap),
`output_tokens`, `cached_tokens`, `delay_s` (its own delay) and `failed`. The truth of a request is
the server's row: when it had read the request, and when it wrote which tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lib.measure.serving import timing, window
from lib.measure.serving.arrivals import Load, check_law
from lib.measure.serving.script import TEXT

Row = dict[str, Any]
TTFT_LIMIT_S = 0.001  # median, at 20 requests a second; tests allow 5 ms on a busy machine
SCHEDULE_LIMIT_S = 0.05  # of the promptest request: a client's zero that is off shifts them all
ITL_LIMIT = 0.01  # median, relative: stamps are read some 0.2 ms after they are written


@dataclass(frozen=True)
class Check:
    """One figure of a client beside the truth; `ok` is None where it was not judged, and why."""

    name: str
    ok: bool | None
    value: float | None = None
    unit: str = ""
    text: str = ""


def truth(row: Row) -> Row:
    """What really happened to one request, from the server's row."""
    writes = [
        (t, [(size, channel) for _, size, channel in group])
        for t, group in groupby(row["writes"], key=lambda write: write[0])
    ]
    tokens = [sum(size for size, _ in parts) for _, parts in writes]
    visible = [t for t, parts in writes if any(channel == TEXT for _, channel in parts)]
    after = sum(tokens[1:])
    return {
        "id": row["request_id"],
        "prompt_key": row.get("prompt_key"),
        "behaviour": row["behaviour"],
        "received_s": row["received_s"],
        "first_s": writes[0][0] if writes else None,
        "visible_s": visible[0] if visible else None,
        "itl_s": (writes[-1][0] - writes[0][0]) / after if after else None,
        "output_tokens": sum(tokens),
        "cached_tokens": row.get("cached_tokens"),
        "failed": row["outcome"] != "ok",
    }


def truths(stamps: Sequence[Row]) -> list[Row]:
    """The truth of every request, in the order in which the server had read them."""
    rows = [truth(row) for row in stamps if row["row"] == "request"]
    return sorted(rows, key=lambda row: row["received_s"])


def claims_of(rows: Sequence[Row]) -> list[Row]:
    """What our client says, derived from its rows as everywhere else."""
    return [claim_of(row) for row in rows if row["row"] == "request"]


def claim_of(row: Row) -> Row:
    """What our client says of one request."""
    fact = timing.fact(row)
    return {
        "id": str(row["id"]),
        "ttft_s": window.ttft_s(fact),
        "visible_s": window.visible_s(fact),
        "itl_s": window.tpot_s(fact),
        "output_tokens": fact["output_tokens"],
        "cached_tokens": fact["cached_tokens"],
        "delay_s": window.delay_s(fact),
        "failed": bool(fact["failure"]),
    }


def pair(claims: Sequence[Row], real: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each claim with its truth, by request id or by prompt; a claim with neither has none."""
    pairs = []
    by_name = {name: {row[name]: row for row in real} for name in ("id", "prompt_key")}
    for claim in claims:
        name = "id" if claim.get("id") is not None else "prompt_key"
        row = by_name[name].get(claim.get(name)) if claim.get(name) is not None else None
        if row is not None:
            pairs.append((claim, row))
    return pairs


def score(
    claims: Sequence[Row],
    stamps: Sequence[Row],
    *,
    load: Load | None = None,
    scheduled_s: dict[str, float] | None = None,
    ttft_limit_s: float = TTFT_LIMIT_S,
) -> list[Check]:
    """Every check of a client. `scheduled_s` are the plan's instants by request id, on the server's
    clock: latency then counts from them, else from when the server had read the request."""
    real = truths(stamps)
    pairs = pair(claims, real)
    good = [(claim, row) for claim, row in pairs if not row["failed"]]
    checks = [_counted(claims, real), _failures(claims, real)]

    def begin_s(row: Row) -> float:
        return row["received_s"] if scheduled_s is None else scheduled_s[row["id"]]

    def real_ttft(row: Row) -> float | None:
        return None if row["first_s"] is None else row["first_s"] - begin_s(row)

    def real_visible(row: Row) -> float | None:
        return None if row["visible_s"] is None else row["visible_s"] - begin_s(row)

    checks += [
        _times("ttft_s", good, real_ttft, ttft_limit_s),
        _times("visible_s", good, real_visible, ttft_limit_s),
        _shares("itl_s", good, lambda row: row["itl_s"]),
        _equal("output_tokens", good),
        _equal("cached_tokens", good),
        _no_token(good),
        _delay(claims),
    ]
    if load is not None:
        checks.append(_arrivals(real, load))
    if scheduled_s is not None:
        checks.append(_schedule(real, scheduled_s))
    return checks


def _counted(claims: Sequence[Row], real: Sequence[Row]) -> Check:
    text = f"{len(claims)} told of, {len(real)} seen by the server"
    return Check("requests", len(claims) == len(real), len(claims) - len(real), "requests", text)


def _failures(claims: Sequence[Row], real: Sequence[Row]) -> Check:
    """Answers that ended badly must be failures; an empty one may be called so or not."""
    count, true = sum(bool(c.get("failed")) for c in claims), sum(r["failed"] for r in real)
    empty = sum(not r["failed"] and r["output_tokens"] == 0 for r in real)
    text = f"{count} told of, {true} true" + (f", and {empty} empty answers" if empty else "")
    off = count - true if count < true else max(0, count - true - empty)
    return Check("failures", off == 0, off, "requests", text)


Real = Callable[[Row], float | None]


def _both(
    name: str, pairs: Sequence[tuple[Row, Row]], real: Real
) -> tuple[dict[int, list[tuple[float, float]]], str]:
    """(claimed, true) where both exist, by the behaviour of the server, or why there are none."""
    if not pairs:
        return {}, "claims and requests cannot be paired"
    if all(claim.get(name) is None for claim, _ in pairs):
        return {}, "not told by this client"
    both: dict[int, list[tuple[float, float]]] = {}
    for claim, row in pairs:
        value, true = claim.get(name), real(row)
        if value is not None and true is not None:
            both.setdefault(row["behaviour"], []).append((value, true))
    return both, "no true value"


def _worst(errors: dict[int, list[float]]) -> tuple[int, float]:
    """The behaviour whose median error is farthest from zero, and that median.

    By behaviour, since what one of them shows, such as chunks of several tokens, a median over all
    requests would hide.
    """
    medians = {number: statistics.median(values) for number, values in errors.items()}
    number = max(medians, key=lambda n: abs(medians[n]))
    return number, medians[number]


def _times(name: str, pairs: Sequence[tuple[Row, Row]], real: Real, limit_s: float) -> Check:
    """Median error against a limit, in seconds, of the behaviour where it is largest."""
    both, reason = _both(name, pairs, real)
    if not both:
        return Check(name, None, text=reason)
    number, off = _worst({n: [a - b for a, b in values] for n, values in both.items()})
    count = sum(map(len, both.values()))
    text = f"median error at most {off * 1e3:+.2f} ms (behaviour {number}) of {count} requests"
    return Check(name, abs(off) <= limit_s, off, "s", text)


def _shares(name: str, pairs: Sequence[tuple[Row, Row]], real: Real) -> Check:
    """Median relative error against ITL_LIMIT, of the behaviour where it is largest."""
    both, reason = _both(name, pairs, real)
    if not both:
        return Check(name, None, text=reason)
    number, off = _worst({n: [a / b - 1 for a, b in values] for n, values in both.items()})
    count = sum(map(len, both.values()))
    text = f"median error at most {off:+.2%} (behaviour {number}) of {count} requests"
    return Check(name, abs(off) <= ITL_LIMIT, off, "", text)


def _equal(name: str, pairs: Sequence[tuple[Row, Row]]) -> Check:
    """Requests whose count is not the true one."""
    both, reason = _both(name, pairs, lambda row: row[name])
    if not both:
        return Check(name, None, text=reason)
    every = [pair for values in both.values() for pair in values]
    wrong = sum(value != true for value, true in every)
    return Check(name, wrong == 0, wrong, "requests", f"{wrong} of {len(every)} wrong")


def _no_token(pairs: Sequence[tuple[Row, Row]]) -> Check:
    """An answer without tokens has no TTFT: a number there, also 0, would enter the percentiles."""
    empty = [claim for claim, row in pairs if row["output_tokens"] == 0]
    if not empty:
        return Check("no_token", None, text="no answer was empty")
    count = sum(claim.get("ttft_s") is not None for claim in empty)
    text = f"{count} of {len(empty)} empty answers have a TTFT"
    return Check("no_token", count == 0, count, "requests", text)


def _delay(claims: Sequence[Row]) -> Check:
    """The client's own delay as it tells it, for the reader; it is not judged."""
    delays = [claim["delay_s"] for claim in claims if claim.get("delay_s") is not None]
    if not delays:
        return Check("delay_s", None, text="not told by this client")
    middle = statistics.median(delays)
    text = f"median {middle * 1e3:.2f} ms, most {max(delays) * 1e3:.2f} ms, by its own word"
    return Check("delay_s", None, middle, "s", text)


def _arrivals(real: Sequence[Row], load: Load) -> Check:
    """The law of the arrivals as the server saw them."""
    law = check_law([row["received_s"] for row in real], load)
    p = ", ".join(f"{name} p = {value:.2g}" for name, value in law.p.items())
    text = f"{law.rate_per_s:.2f}/s for {law.asked_per_s:g}/s; {p}"
    return Check("arrivals", law.ok, law.rate_per_s, "1/s", text)


def _schedule(real: Sequence[Row], scheduled_s: dict[str, float]) -> Check:
    """Whether the first request that arrived on time did so when the plan said.

    A client's zero is its own word; requests that came before it, or all late, belie it.
    """
    off = min(row["received_s"] - scheduled_s[row["id"]] for row in real)
    text = f"the promptest request was read {off * 1e3:+.2f} ms after its instant"
    return Check("schedule", -1e-4 <= off <= SCHEDULE_LIMIT_S, off, "s", text)


def failing(checks: Sequence[Check]) -> list[str]:
    """Names of the checks that a client does not pass."""
    return [check.name for check in checks if check.ok is False]
