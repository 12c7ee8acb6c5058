"""Quantities of energy rows: net of idle, prefill and token, uncertainty, carbon, a second pass.

Statistical and systematic uncertainty stay apart; what a row lacks is missing with its reason.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis.metrics import METRICS
from lib.analysis.setups import Group, build, by_setup, sampled
from lib.hardware import joules
from lib.records.record import Record, environments, record_id, select
from lib.show.table import Column, Table
from lib.stats import Estimate

J_PER_KWH = 3.6e6
LENGTHS = ("energy", "energy-slope")  # kinds of rows that share a line over new tokens
WEIGHTS = ("energy-weights", "energy-real")  # kinds whose arms differ in their weights alone
AGAIN = "energy-again"  # kind of the rows of the second pass
PASSES = ("energy", AGAIN)
# No comparison of an H100's sensor with a meter was found; +-5 % is what NVIDIA once stated for
# much older cards. It is an assumption, and cancels in ratios on one card.
SENSOR_GAIN = 0.05
SLOW_START = 1.15  # times the other calls, from which a first call is worth a word
BOUNDARY = "GPU board only: no CPU, DRAM, network, fans, power supply or cooling"
ERRORS = {"two_j": ("counter, two readings", joules.two_readings_j),
          "instant_j": ("integral of instant", joules.instant_j),
          "average_j": ("integral of average, lag corrected", joules.average_j),
          "paper_j": ("the paper's before/after mean", joules.paper_j)}  # fmt: skip


def split(rows: Sequence[Record], kinds: Sequence[str] = LENGTHS) -> tuple[Estimate, Estimate]:
    """Joules of the prefill (with the first token) and of each further token.

    The line E = prefill + token x (new tokens - 1) through all blocks of all lengths at one
    context, not the difference of two totals.
    """
    points = [
        (row.key["new_tokens"] - 1, call_j)
        for row in rows
        if row.kind in kinds
        for call_j in row.samples.get("energy_j") or ()
    ]
    if len({x for x, _ in points}) < 2:
        reasons = ["blocks of one length only"] if points else []
        reasons += [row.missing["energy_j"] for row in rows if "energy_j" in row.missing][:1]
        why = f": {'; '.join(reasons)}" if reasons else ""
        none = stats.missing(f"not measured{why}")
        return none, none
    return stats.line([x for x, _ in points], [y for _, y in points])


def variation(row: Record) -> float | None:
    """Standard deviation over blocks / mean: how well one window repeats another."""
    values = row.samples.get("energy_j") or []
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Uncertainty:
    """Relative, half-widths. `statistical` is the 95 % t interval over blocks; the others are
    systematic: `readouts` the disagreement of the board's readouts (rectangular), `idle` the drift
    of idle power in the net energy, `weights` the spread over values of weights, `gain` assumed.
    """

    statistical: float | None
    readouts: float | None
    idle: float | None
    weights: float | None
    gain: float = SENSOR_GAIN


def uncertainty(row: Record, weights: float | None = None) -> Uncertainty:
    """The uncertainty of a row; `weights` is `weight_spread` where it was measured."""
    mean = stats.mean(row.samples.get("energy_j") or [])
    half = None if mean.low is None else (mean.high - mean.low) / 2 / mean.value
    off = [gate(row, code).get("value") for code in ("agreement", "instant_agreement")]
    disagreements = [abs(value) for value in off if value is not None]
    idle_w, seconds = row.value("idle_error_w"), row.value("window_s")
    net = None
    if idle_w is not None and seconds:
        base = row.values["window_energy_j"] - row.values["idle_w"] * seconds
        net = idle_w * seconds / base if base > 0 else None
    return Uncertainty(half, max(disagreements) / 3**0.5 if disagreements else None, net, weights)


def gate(row: Record, code: str) -> dict[str, Any]:
    """The worst of a gate over the blocks of a row; empty where it has none."""
    return (row.value("gates") or {}).get(code) or {}


def weight_effects(rows: Sequence[Record]) -> dict[str, Estimate]:
    """Energy with each set of weight values over that with normal ones, block by block.

    The rows are those of one model in one setup, but for its weights; so in `real_effect`.
    """
    arms = {
        row.key["weights"].removeprefix("random-"): row.samples["energy_j"]
        for row in rows
        if row.kind == "energy-weights" and row.samples.get("energy_j")
    }
    base = arms.get("normal")
    if not base:
        return {}
    return {value: stats.paired_ratio(*_shortest(arm, base)) for value, arm in arms.items()}


def real_effect(rows: Sequence[Record]) -> Estimate | None:
    """Energy with real weights over that with random ones, block by block."""
    arms = [r for r in rows if r.kind == "energy-real" and r.samples.get("energy_j")]
    random = [r for r in arms if r.key["weights"] == "random"]
    real = [r for r in arms if r.key["weights"] != "random"]
    if not random or not real:
        return None
    return stats.paired_ratio(
        *_shortest(real[-1].samples["energy_j"], random[-1].samples["energy_j"])
    )


def _shortest(*arms: Sequence[float]) -> list[Sequence[float]]:
    count = min(map(len, arms))
    return [arm[:count] for arm in arms]


def weight_spread(rows: Sequence[Record]) -> float | None:
    """The largest difference from normal values: the bound for random against real weights."""
    effects = [e.value for e in weight_effects(rows).values() if e.value is not None]
    return max(abs(value - 1) for value in effects) if len(effects) > 1 else None


def spread_beside(rows: Sequence[Record], group: Group) -> float | None:
    """`weight_spread` of a group's model in its setup, whatever its own weights are."""
    beside = (
        g
        for g in by_setup(rows, "energy-weights", without=("weights",))
        if (g.model, g.but("weights")) == (group.model, group.but("weights"))
    )
    return next((weight_spread(g.rows) for g in beside), None)


@dataclass(frozen=True)
class Carbon:
    """kWh x PUE x grams per kWh, each of them kept beside the product."""

    kwh: float
    pue: float
    g_per_kwh: float

    @property
    def grams(self) -> float:
        """Grams of CO2 equivalent."""
        return self.kwh * self.pue * self.g_per_kwh


def carbon(energy_j: float, pue: float, g_per_kwh: float | None) -> Carbon | None:
    """The conversion of an energy; None unless the user gives the grid's intensity."""
    return None if g_per_kwh is None else Carbon(energy_j / J_PER_KWH, pue, g_per_kwh)


def table(rows: Sequence[Record]) -> Table:
    """Each cell of the second pass beside the first; no rows where there was no second."""
    columns = [
        *(Column(f"{METRICS['j_per_1k'].title}, {name} pass", "J") for name in ("first", "second")),
        Column("second / first"),
        Column("board", numeric=False),
    ]
    envs = environments(rows)
    return build(
        "energy-passes",
        "Energy, two passes",
        rows,
        PASSES,
        ("context", "new_tokens"),
        columns,
        lambda group: (*compared(group), boards(group, envs)),
        having=AGAIN,
    )


def compared(rows: Sequence[Record]) -> tuple[Estimate, Estimate, Estimate]:
    """The first pass, the second, and the second over the first, of the rows of one cell."""
    first, second = (per_1k(rows, kind) for kind in PASSES)
    return first, second, stats.quotient(second, first)


def per_1k(rows: Sequence[Record], kind: str) -> Estimate:
    """Joules per 1,000 generated tokens in one pass: mean over blocks."""
    row = next(reversed(select(rows, kind)), None)
    if row is None:
        return stats.missing(f"not measured: no {'second' if kind == AGAIN else 'first'} pass")
    if not row.samples.get("energy_j"):
        return stats.missing(sampled([row], "energy_j").reason)
    mean = stats.mean(METRICS["j_per_1k"].of.each(row))
    return replace(mean, records=(record_id(row),))


def boards(rows: Sequence[Record], envs: dict[str, dict[str, Any]]) -> str:
    """Whether both passes of one cell were on the same GPU, as far as its number is known."""
    passes = [select(rows, kind) for kind in PASSES]
    if not all(passes):
        return ""
    numbers = [envs.get(mine[-1].env_id or "", {}).get("gpu_uuid") for mine in passes]
    if None in numbers:
        return "unknown"
    return "the same" if numbers[0] == numbers[1] else "another"


def estimator_errors(
    trace: joules.Trace, lengths_s: Sequence[float], starts: int = 40
) -> dict[str, dict[float, list[float]]]:
    """Relative errors of four estimators on windows of one trace: estimator -> length -> errors.

    The windows of a length begin at `starts` times spread evenly over the trace, so at as many
    phases of the refresh. The reference is the counter interpolated between its ticks.
    """
    errors: dict[str, dict[float, list[float]]] = {name: {} for name in ERRORS}
    good = [row["t_s"] for row in trace if "error" not in row]
    for length_s in lengths_s if good else ():
        first_s, last_s = good[0] + 1.5, good[-1] - length_s - 1.0
        for number in range(starts if last_s > first_s else 0):
            start_s = first_s + (last_s - first_s) * (number + 0.5) / starts
            span = (start_s, start_s + length_s)
            near = joules.cut(trace, *span, 2.0)
            truth, _ = joules.counter_j(near, *span)
            for name, (_, estimator) in ERRORS.items():
                value, _ = estimator(near, *span)
                if truth and value is not None:
                    errors[name].setdefault(length_s, []).append(value / truth - 1)
    return errors


def peer_differences(row: Record) -> dict[str, list[float]]:
    """Zeus over this workbook less one, for each long and each short window."""
    return {
        name: [
            theirs / ours - 1
            for ours, theirs in zip(
                row.samples.get(f"ours_{name}_j") or [],
                row.samples.get(f"zeus_{name}_j") or [],
                strict=True,
            )
        ]
        for name in ("long", "short")
    }


def slow_starts(rows: Sequence[Record]) -> list[str]:
    """Rows whose very first call took much longer than their others."""
    several = [r for r in rows if r.kind == "energy" and len(r.samples.get("e2e_s") or ()) > 1]
    slow = sorted(
        (r.key["model"], r.key["context"])
        for r in several
        if r.samples["e2e_s"][0] > SLOW_START * statistics.median(r.samples["e2e_s"][1:])
    )
    where = "; ".join(
        f"{model} at " + ", ".join(f"{c:,}" for _, c in cells)
        for model, cells in itertools.groupby(slow, lambda pair: pair[0])
    )
    note = (
        f"the first call took over {SLOW_START - 1:.0%} longer than the others in {len(slow)} "
        f"of {len(several)} rows ({where}): it waited for the allocator or the host; "
        "a row of one block holds it in its joules, a median of six does not"
    )
    return [note] if slow else []
