"""The verdict on a printed value or order: rules in code, with stated tolerances.

A printed value is reproduced where the measured interval lies within its tolerance, or the value
itself where it is exact (a count, or one reading of the allocator). Where it does not, and the
claim has a direction, the direction may still hold. A sampled value without an interval decides
nothing, and neither does an interval that reaches into the tolerance and beyond it, nor a row that
warns. Of two to five visits the range has no level, and decides as an interval would: it excludes
what no visit said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from lib import stats
from lib.analysis.rows import HARMLESS
from lib.records.record import Record, record_id
from lib.show.wording import short
from lib.stats import Estimate

REPRODUCED, DIRECTION = "reproduced", "direction only"
NOT, UNTESTABLE = "not reproduced", "not testable"
WORDS = (REPRODUCED, DIRECTION, NOT, UNTESTABLE)
# Estimates by these methods have no sampling error, so that they need no interval.
COUNTED, READING = "counted", "single reading"  # the latter is what `stats.exact` says
DIFFERENCE, QUOTIENT = "difference of readings", "ratio of single readings"
FILES = "read in the study's files"
EXACT = frozenset({COUNTED, READING, DIFFERENCE, QUOTIENT, FILES})
MOST = 3  # reasons that a verdict spells out
TIE = 0.02  # a ratio whose whole interval lies this near to 1 is neither higher nor lower
ARM = ("context", "new_tokens", "experts", "decoding")  # of the key, to name a row
PLAIN = (None, "none", "greedy")
REPETITIONS = ("ttft_s", "e2e_s", "energy_j")
WARNS = " warns of "  # between a row and its warnings
WIDE = 0.10 * (1 + 1e-9)  # (largest - smallest) / median of repetitions that agree


@dataclass(frozen=True)
class Tolerance:
    """How far a value may lie from the printed one: a share of it, or percentage points.

    One unit of the last printed digit is allowed too, unless whole things are counted.
    """

    share: float
    points: float
    digit: bool = True


TOLERANCES = {
    "whole": Tolerance(0.0, 0.0, digit=False),  # runs, devices, number formats
    "count": Tolerance(0.005, 0.1),  # parameters
    "memory": Tolerance(0.02, 1.0),  # the allocator repeats itself; card and host hardly matter
    "time": Tolerance(0.10, 5.0),  # time, throughput, energy: another card, host and library
    "effect": Tolerance(0.10, 1.0),  # effects of a few percent, which 5 points would swallow
}


@dataclass(frozen=True)
class Verdict:
    """One of WORDS, and why it is no better ("" where it is reproduced)."""

    word: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


def band(printed: str | Sequence[str], unit: str, quantity: str) -> tuple[float, float]:
    """What counts as the printed value, or as the printed range of two values."""
    texts = [printed] if isinstance(printed, str) else list(printed)
    allowed = TOLERANCES[quantity]
    edges = []
    for text in (texts[0], texts[-1]):
        exponent = Decimal(text).as_tuple().exponent
        digit = float(Decimal(1).scaleb(exponent)) if allowed.digit and exponent <= 0 else 0.0
        room = allowed.points if unit == "%" else allowed.share * abs(float(text))
        edges.append((float(text), max(digit, room) * (1 + 1e-9)))
    ordered = sorted(edges)
    return ordered[0][0] - ordered[0][1], ordered[-1][0] + ordered[-1][1]


def ends(estimate: Estimate) -> tuple[float, float] | None:
    """The interval of an estimate; of an exact one the value twice; None without one."""
    if estimate.method in EXACT and estimate.value is not None:
        return estimate.value, estimate.value
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high


def doubts(rows: Iterable[Record], where: str = "") -> dict[str, str]:
    """By record id, why a row, or one of its other visits, cannot decide: its warnings, and
    repetitions that spread widely, as they do where one was the first call of its length."""
    texts = {}
    for row in rows:
        texts |= doubts(row.others, " in another visit")
        reasons = {w["code"]: _finding(w["text"]) for w in row.warnings}
        spreads = [stats.spread(row.samples.get(name) or ()) or 0.0 for name in REPETITIONS]
        if max(spreads) > WIDE:
            text = f"repetitions spread over {max(spreads):.0%} of their median"
            reasons.setdefault("spread", text)
        codes = [code for code in reasons if code not in HARMLESS]
        if codes:
            own = {k: row.key.get(k) for k in ARM}
            arm = [f"{k.replace('_', ' ')} {v}" for k, v in own.items() if v not in PLAIN]
            why = ", ".join(code if where else f"{code} ({reasons[code]})" for code in codes)
            of = ", ".join([str(row.key.get("model")), *arm]) + where
            texts[record_id(row)] = f"the {row.kind} row of {of}{WARNS}{why}"
    return texts


def _finding(text: str) -> str:
    """What a warning found, without what it advises whoever measures: that has no figure."""
    found, _, more = text.partition(";")[0].partition(": ")
    return f"{found}: {more}" if any(letter.isdigit() for letter in more) else found


def settled(estimate: Estimate, doubts: Mapping[str, str]) -> Estimate:
    """The estimate, without its interval where a row that it comes from cannot decide."""
    reasons = list(dict.fromkeys(doubts[id] for id in estimate.records if id in doubts))
    if estimate.value is None or not reasons:
        return estimate
    return replace(estimate, low=None, high=None, method="", reason="; ".join(reasons))


def of_value(
    estimate: Estimate, allowed: tuple[float, float], neutral: float | None = None
) -> Verdict:
    """One estimate against the band of a printed value.

    `neutral` is the value of no effect (0 for a change, 1 for a ratio); without it the claim has
    no direction.
    """
    interval = ends(estimate)
    if interval is None:
        return Verdict(UNTESTABLE, estimate.reason or "no interval")
    low, high = interval
    if allowed[0] <= low and high <= allowed[1]:
        return Verdict(REPRODUCED)
    reaches = low <= allowed[1] and high >= allowed[0]
    where = "reaches beyond the tolerance" if reaches else "is outside the tolerance"
    where = ", not" if allowed[0] == allowed[1] else f" {where}"
    why = f"{_span(low, high)}{where} {_span(*allowed)}"
    if neutral is not None:
        up = sum(allowed) / 2 > neutral
        if low > neutral if up else high < neutral:
            return Verdict(DIRECTION, why)
    return Verdict(UNTESTABLE if reaches else NOT, why)


def of_order(ratio: Estimate, direction: str) -> Verdict:
    """One ratio against the claim that it is higher, or lower, than 1."""
    interval = ends(ratio)
    if interval is None:
        return Verdict(UNTESTABLE, ratio.reason or "no interval")
    low, high = interval
    if low >= 1 - TIE and high <= 1 + TIE:
        return Verdict(NOT, f"{_span(low, high)}: equal within {TIE:.0%}")
    if low <= 1 <= high:
        return Verdict(UNTESTABLE, f"no difference resolved: {_span(low, high)}")
    if (low > 1) == (direction == "higher"):
        return Verdict(REPRODUCED)
    return Verdict(NOT, f"{_span(low, high)}: the other way round")


def of_sessions(verdict: Verdict, ours: int, theirs: int) -> Verdict:
    """What fewer fresh sessions than the study's can decide: the direction, and no more."""
    if ours >= theirs or verdict.word not in (REPRODUCED, DIRECTION):
        return verdict
    few = f"{ours} session{'s' if ours > 1 else ''} decides the direction only, not the interval "
    few += f"that the paper has over {theirs}"
    return Verdict(DIRECTION, "; ".join(filter(None, (verdict.why, few))))


def together(verdicts: Mapping[str, Verdict]) -> Verdict:
    """One verdict of several: it fails where one fails, and is untested where one is untested."""
    for word in (NOT, UNTESTABLE, DIRECTION):
        reasons: dict[str, list[str]] = {}
        for label, verdict in verdicts.items():
            if verdict.word == word:
                reasons.setdefault(verdict.why, []).append(label)
        if reasons:
            texts = [
                f"{' and '.join(filter(None, who))}: {why}" if any(who) else why
                for why, who in reasons.items()
            ]
            more = [f"and {len(texts) - MOST} more"] if len(texts) > MOST else []
            return Verdict(word, "; ".join(texts[:MOST] + more))
    return Verdict(REPRODUCED) if verdicts else Verdict(UNTESTABLE, "nothing to compare")


def _span(low: float, high: float) -> str:
    if low != high:
        return f"[{short(low)}, {short(high)}]"
    return f"{low:.0f}" if low == round(low) else short(low)
