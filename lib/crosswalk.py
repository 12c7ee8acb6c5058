"""One set of raw token times under the formula of each tool, so that any tool's number lines up.

The same word means different things: GuideLLM's TPOT includes the prefill, vLLM's does not, and the
paper's TPOT is a throughput. Formulas were read in the tools' sources.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib import stats
from lib.records.record import Record
from lib.show.table import Column, Shown, build, frame


@dataclass(frozen=True)
class Definition:
    """How a tool turns a call's token stamps (s since its start) and duration into a number."""

    name: str
    formula: str
    unit: str
    of: Callable[[Sequence[float], float], float]


DEFINITIONS = (
    Definition("paper TPOT", "g / T", "tok/s", lambda stamps, end_s: len(stamps) / end_s),
    Definition("GuideLLM TPOT", "T / g", "ms", lambda stamps, end_s: 1e3 * end_s / len(stamps)),
    Definition("vLLM TPOT, AIPerf ITL", "(T - t1) / (g - 1)", "ms",
               lambda stamps, end_s: 1e3 * (end_s - stamps[0]) / (len(stamps) - 1)),
    Definition("vLLM ITL", "median of t[i+1] - t[i]", "ms",
               lambda stamps, end_s: 1e3 * statistics.median(stats.gaps(stamps))),
    Definition("nearest to llama-bench tg", "(g - 1) / (T - t1)", "tok/s",
               lambda stamps, end_s: (len(stamps) - 1) / (end_s - stamps[0])),
)  # fmt: skip


def formulas() -> Shown:
    """Which formula stands behind which name; T is the call's time, t1 its first token's."""
    return Shown(
        {
            "name": [d.name for d in DEFINITIONS],
            "formula": [d.formula for d in DEFINITIONS],
            "unit": [d.unit for d in DEFINITIONS],
        }
    ).set_index("name")


def table(rows: Sequence[Record]) -> Shown:
    """Every definition on the stamped calls of each model and context: the median over calls."""

    def cells(group: list[Record]) -> list[stats.Estimate]:
        row = group[-1]
        stamps, ends_s = (row.samples.get(name) or [] for name in ("token_s", "e2e_s"))
        if row.error or not stamps or len(stamps) != len(ends_s):
            why = f"failed: {row.error}" if row.error else "not measured: no time of the call"
            return [stats.missing(why)] * len(DEFINITIONS)
        calls = list(zip(stamps, ends_s, strict=True))
        return [stats.median([d.of(stamps, end_s) for stamps, end_s in calls]) for d in DEFINITIONS]

    stamped = [r for r in rows if r.kind == "environment" or r.error or len(_first_call(r)) > 1]
    columns = [Column(d.name, d.unit) for d in DEFINITIONS]
    return frame(
        build(
            "crosswalk", "Definitions", stamped, ("itl",), ("context", "new_tokens"), columns, cells
        )
    )


def _first_call(row: Record) -> Sequence[float]:
    return (row.samples.get("token_s") or [[]])[0]
