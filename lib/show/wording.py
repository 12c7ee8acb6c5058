"""How a number, its interval, a comparison and a list read, in a sentence and in a cell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lib.records.record import Record
from lib.stats import CONFIDENCE, Estimate

REASON = 40  # characters of one in brackets that is not repeated


def short(value: float | None) -> str:
    """A number for reading: four significant digits, thousands separated."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(float(f"{value:.4g}"))  # 99.999 is written as 100.0
    if size >= 1000:
        return f"{value:,.0f}"
    for limit, digits in ((100, 1), (10, 2), (1, 3)):
        if size >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.3g}"


def number_text(value: float | None) -> str:
    """A number as the CSVs and the report's `data-value` carry it: 8 significant digits."""
    return "" if value is None else f"{value:.8g}"


def size(value_bytes: float) -> str:
    """Bytes in GB (10^9), or in MB (10^6) below one GB."""
    big = value_bytes >= 1e9
    return f"{short(value_bytes / (1e9 if big else 1e6))} {'GB' if big else 'MB'}"


def interval(estimate: Estimate) -> str:
    """The interval as text, with its level where that is not 95 %, and the visits that it is over
    where that is not one; an open end is "…"; empty without an interval."""
    if estimate.low is None and estimate.high is None:
        return ""
    low, high = (("…" if x is None else short(x)) for x in (estimate.low, estimate.high))
    if estimate.level is None:
        over = f"range of {estimate.visits} visits" if estimate.visits else "from ranges of visits"
        return f"[{low}, {high}], {over}"
    over = f" over {estimate.visits} visits" if estimate.visits else ""
    at = "" if estimate.level == CONFIDENCE else f" at {level(estimate)}"
    return f"[{low}, {high}]{over}{at}"


def level(estimate: Estimate) -> str:
    """How often such an interval covers: "95 %"; of a range that it has none."""
    return "no level" if estimate.level is None else f"{100 * estimate.level:.3g} %"


def number(est: Estimate, unit: str) -> str:
    """A value with its interval and n, or that it was not measured and why."""
    if est.value is None:
        why = est.reason.removeprefix("not measured").removeprefix(": ")
        return f"not measured ({why})" if why else "not measured"
    ends = f" {interval(est)}" if est.low is not None else ""
    return f"{short(est.value)} {unit}{ends}, n = {est.n}"


def text(estimate: Estimate, unit: str = "") -> str:
    """A value with its unit and interval, or the reason why there is none."""
    if estimate.value is None:
        return f"({estimate.reason})"
    number = f"{short(estimate.value)} {unit}".strip()
    return f"{number} {interval(estimate)}".strip()


def _named(est: Estimate, unit: str) -> str:
    """A value that its unit names, also where it is missing."""
    return number(est, unit) if est.value is not None else f"{unit} {number(est, unit)}"


def levels(estimates: dict[str, Estimate], unit: str) -> str:
    """Each model's value with its interval; n once where all have the same."""
    counts = {e.n for e in estimates.values() if e.value is not None}
    parts = []
    for model, estimate in estimates.items():
        n = f" (n = {estimate.n})" if estimate.n and len(counts) > 1 else ""
        parts.append(f"{model} {text(estimate, unit)}{n}")
    n = f" (n = {counts.pop()})" if len(counts) == 1 else ""
    return f"{listed(parts)}{n}."


def verdict(ratio: Estimate, higher: str = "higher", lower: str = "lower") -> str:
    """Which way a ratio goes, by its interval; without one the reason."""
    resolved = ratio.resolved_from(1.0)
    if resolved is None:
        return ratio.reason or "no interval"
    return (higher if ratio.value > 1 else lower) if resolved else "no difference resolved"


def than(other: str, ratio: Estimate) -> str:
    """A ratio to another one: higher, lower, or no difference resolved, by its interval.

    Where the sentence has named the `other`, it is empty.
    """
    if ratio.value is None:
        return f"not compared{other and f' with {other}'} ({ratio.reason})"
    times, word = f"{short(ratio.value)} times", verdict(ratio)
    if ratio.resolved_from(1.0) is False:
        return f"{word}{other and f' from {other}'} ({times} {interval(ratio)})"
    times += other and f" that of {other}"
    if ratio.resolved_from(1.0) is None:
        return f"{times}, without an interval ({word})"
    return f"{times} {interval(ratio)}, {word}"


def compared(name: str, others: dict[str, Estimate]) -> str:
    """A sentence on what one has against each other one; empty without others."""
    parts = [than(other, ratio) for other, ratio in others.items()]
    return f"{name}: {listed(parts)}." if parts else ""


def once(text: str) -> str:
    """A text with each long reason in brackets said once; where it comes again it is left out."""
    reasons: set[str] = set()

    def first(match: re.Match) -> str:
        reason = match[0]
        if len(reason) > REASON and reason in reasons:
            return ""
        reasons.add(reason)
        return reason

    return re.sub(r" \((?:[^()]|\([^()]*\))*\)", first, text)


def listed(parts: Sequence[str]) -> str:
    """Parts as a list in a sentence."""
    return "; ".join(parts)


def sentence(text: str) -> str:
    """A text with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def cautions(rows: Iterable[Record]) -> list[str]:
    """Active warnings with counts, random weights, and what is missing with its reason."""
    rows = list(rows)
    lines = []
    texts = {w["code"]: w["text"] for r in rows for w in r.warnings}
    for code, count in Counter(w["code"] for r in rows for w in r.warnings).items():
        lines.append(f"Warning on {count} arm(s), {code}: for example, {texts[code]}.")
    if any(r.key.get("weights") == "random" for r in rows):
        lines.append(
            "Random weights: valid for memory and dense latency; prefill of a mixture of "
            "experts depends on its router."
        )
    missing = Counter(f"{name}: {why}" for r in rows for name, why in r.missing.items())
    lines += [f"Not measured on {count} arm(s), {text}." for text, count in missing.items()]
    return lines


class Statement(NamedTuple):
    """A sentence or two of the abstract under a short lead."""

    lead: str
    text: str
