"""A server's own counters before and after a run, from its /metrics page (Prometheus text).

Counters are differences over the run; a server's rolling log lines are means over its own spans
and are not used.
"""

from __future__ import annotations

import http.client
import math
import re
from typing import Any

from lib.measure.serving import server

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
COUNTING = ("_total", "_count", "_sum", "_bucket")
# What servers call the counters that can be checked against the client's usage.
NAMES = {
    "prompt_tokens": ("vllm:prompt_tokens_total", "null:prompt_tokens_total"),
    "output_tokens": ("vllm:generation_tokens_total", "null:generation_tokens_total"),
    "cached_tokens": ("vllm:prefix_cache_hits_total", "null:cached_tokens_total"),
    "preemptions": ("vllm:num_preemptions_total",),
}
Counters = dict[str, float]


def parse(text: str) -> Counters:
    """Values of counters, histograms' sums and counts by "name{label=value,...}".

    Only what a TYPE line calls a counter, a histogram or a summary; gauges are readings of one
    instant. Buckets are left out: they are many, and what they tell the client measures itself.
    """
    kinds: dict[str, str] = {}
    counters: Counters = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(None, 3)
            kinds[name] = kind.strip()
        elif line and not line.startswith("#") and (match := SAMPLE.match(line.strip())):
            name, labels, value = match.groups()
            if _counts(name, kinds) and math.isfinite(number := float(value)):
                inside = ",".join(f"{k}={v}" for k, v in sorted(LABEL.findall(labels or "")))
                counters[f"{name}{{{inside}}}" if inside else name] = number
    return counters


def _counts(name: str, kinds: dict[str, str]) -> bool:
    """Whether a sample belongs to a counter, or is the sum or count of a distribution."""
    base = next((name.removesuffix(end) for end in COUNTING if name.endswith(end)), name)
    kind = kinds.get(name) or kinds.get(base)
    if name.endswith(("_bucket", "_created")):
        return False
    return kind == "counter" or (kind in ("histogram", "summary") and name != base)


def read(url: str, path: str | None, timeout_s: float = 5.0) -> tuple[Counters | None, str]:
    """The counters of a server now, or None and why there are none."""
    if path is None:
        return None, "this kind of server has no page of counters"
    try:
        return parse(server.get(url.rstrip("/") + path, timeout_s).decode("utf-8", "replace")), ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, f"{path} could not be read: {error}"


def difference(before: Counters, after: Counters) -> tuple[Counters | None, str]:
    """What was counted in between, or None where a counter fell: the server was restarted.

    A counter that is new counts from zero; those that did not move are left out.
    """
    resets = [name for name, value in before.items() if after.get(name, value) < value]
    if resets:
        ends = f"from {before[resets[0]]:g} to {after[resets[0]]:g}"
        return None, f"counter_reset: {resets[0]} fell {ends}"
    changes = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: value for name, value in sorted(changes.items()) if value}, ""


def totals(counters: Counters) -> dict[str, float]:
    """The counters that have a common name, summed over their labels; those that did not move are
    absent."""
    sums = {}
    for name, aliases in NAMES.items():
        values = [v for key, v in counters.items() if key.partition("{")[0] in aliases]
        if values:
            sums[name] = sum(values)
    return sums


def compare(counters: Counters, rows: list[dict[str, Any]]) -> list[str]:
    """Sentences where the server's totals and the usage of the answers differ, for warnings.

    Only where no request failed: a failed one is counted by the server and has no usage.
    """
    if not rows or any(row["failure"] for row in rows):
        return []
    sums, sentences = totals(counters), []
    for name in ("prompt_tokens", "output_tokens"):
        usage = sum(row["usage"][name] or 0 for row in rows)
        if name in sums and sums[name] != usage:
            sentences.append(
                f"the server counted {sums[name]:g} {name}, the answers' usage says {usage}; "
                "look for another client"
            )
    return sentences
