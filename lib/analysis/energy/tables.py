"""Tables of energy: calls, prefill and tokens, uncertainty, and what was checked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lib import stats
from lib.analysis.energy import quantities
from lib.analysis.metrics import shown_in
from lib.analysis.setups import Group, build, by_setup
from lib.records.record import Record
from lib.show.table import Column, Number, Table, of_lines, or_why

READOUTS = {"counter": "energy counter", "instant": "instant power", "average": "average power"}
LEVELS = ("ok", "unknown", "warn", "invalid")


def table(rows: Sequence[Record]) -> Table:
    """Energy of whole calls on the GPU board, per model and context; on a CPU the reasons.

    Gross and net of what the idle board draws, by the counter; beside it what the one-second mean
    and the paper's estimator give for the same calls.
    """

    fields = ("context", "new_tokens")
    table = build("energy", "Energy", rows, ("energy",), fields, shown_in("energy"))
    notes = (quantities.BOUNDARY, *quantities.slow_starts(rows))
    return replace(table, notes=(*table.notes, *notes))


def parts(rows: Sequence[Record]) -> Table:
    """Energy of the prefill and of each further token, with intervals, per context."""

    def cells(group: list[Record]) -> Sequence[Any]:
        prefill, token = quantities.split(group)
        lengths = sorted({r.key["new_tokens"] for r in group})
        return (", ".join(map(str, lengths)), prefill, token)

    columns = [
        Column("new tokens", numeric=False),
        Column("prefill and first token", "J"),
        Column("each further token", "J"),
    ]
    table = build(
        "energy-parts",
        "Prefill and tokens",
        rows,
        quantities.LENGTHS,
        ("context",),
        columns,
        cells,
        having="energy-slope",
    )
    return or_why(table, "no lengths to draw a line through")


def passes(rows: Sequence[Record]) -> Table:
    """Cells that a second pass measured again, beside the first."""
    return or_why(quantities.table(rows), "no second pass was measured")


def uncertainty(rows: Sequence[Record]) -> Table:
    """Statistical and systematic uncertainty of each row, in percent, apart from each other."""
    lines = []
    for of, group, row in of_groups(by_setup(rows, "energy")):
        if not row.samples.get("energy_j"):
            continue
        half_widths = quantities.uncertainty(row, quantities.spread_beside(rows, group))
        lines.append(
            {
                **of,
                "context": row.key["context"],
                "blocks": len(row.samples["energy_j"]),
                "spread of blocks, CV (%)": percent(quantities.variation(row)),
                "statistical ± (%)": percent(half_widths.statistical),
                "readouts ± (%)": percent(half_widths.readouts),
                "idle, of net ± (%)": percent(half_widths.idle),
                "weight values ± (%)": percent(half_widths.weights),
                "sensor gain, assumed ± (%)": percent(half_widths.gain),
                "halves against whole (%)": percent(worst(row.samples.get("additivity"))),
            }
        )
    return of_lines("energy-uncertainty", "Uncertainty", lines, reason_of(rows, "energy"))


def gates(rows: Sequence[Record]) -> Table:
    """Each gate at its worst over all windows, and on how many rows it was not just ok."""
    by_code: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for code, gate in (row.value("gates") or {}).items():
            by_code.setdefault(code, []).append(gate)
    lines = []
    for code, results in by_code.items():
        worst = max(results, key=lambda g: (LEVELS.index(g["level"]), abs(g["value"] or 0.0)))
        lines.append(
            {
                "gate": code,
                "worst": worst["level"],
                "rows": len(results),
                "rows not ok": sum(g["level"] != "ok" for g in results),
                "worst value": worst["text"],
            }
        )
    return of_lines("energy-gates", "Gates", lines, reason_of(rows, "energy"))


def instrument(rows: Sequence[Record]) -> Table:
    """Each readout: how often it refreshes, how it follows a step, and how it sees a square wave.

    Agreement is that with the counter on the constant load.
    """
    lines = []
    for of, _, row in of_groups(by_setup(rows, "instrument")):
        if row.value("readings") is None:
            continue
        off = {"average": "constant_average_off", "instant": "constant_instant_off"}
        for name, title in READOUTS.items():
            lines.append(
                {
                    **of,
                    "readout": title,
                    "refresh (ms)": milli(row.value(f"{name}_refresh_s")),
                    "half of a step after (ms)": milli(row.value(f"{name}_step_s")),
                    "spread over phases (%)": percent(row.value(f"{name}_phase_spread")),
                    "against counter (%)": percent(row.value(off.get(name, ""))),
                    "mean of (s)": row.value("average_window_s") if name == "average" else None,
                }
            )
    return of_lines("energy-instrument", "Readouts", lines, reason_of(rows, "instrument"))


def weights(rows: Sequence[Record]) -> Table:
    """Energy with other weight values over that with normal ones."""
    lines, labelled = [], []
    for group in by_setup(rows, quantities.WEIGHTS, without=("weights",)):
        effects, real = quantities.weight_effects(group.rows), quantities.real_effect(group.rows)
        if real is not None:
            effects["real against random"] = real
        labelled += [(group.label, effects)] if effects else []
    for label, effects in labelled:
        of = {"of": label} if len(labelled) > 1 else {}
        lines += [
            {
                **of,
                "weights": value,
                "energy / normal": Number(ratio, 4),
            }
            for value, ratio in effects.items()
        ]
    return of_lines(
        "energy-weights",
        "Energy with other weight values",
        lines,
        reason_of(rows, "energy-weights"),
    )


def peer(rows: Sequence[Record]) -> Table:
    """Zeus against this workbook on the same windows: median and worst difference."""
    lines = []
    for of, _, row in of_groups(by_setup(rows, "energy-peer")):
        for name, off in quantities.peer_differences(row).items():
            if off:
                lines.append(
                    {
                        **of,
                        "windows": name,
                        "count": len(off),
                        "seconds": stats.median(row.samples[f"{name}_s"]).value,
                        "median difference (%)": percent(stats.median(off).value),
                        "worst difference (%)": percent(worst(off)),
                    }
                )
    return of_lines(
        "energy-peer", "Zeus beside this workbook", lines, reason_of(rows, "energy-peer")
    )


def of_groups(groups: Sequence[Group]) -> list[tuple[dict[str, str], Group, Record]]:
    """Every row with its group, and a first cell that names the group where there are several."""
    return [
        ({"of": group.label} if len(groups) > 1 else {}, group, row)
        for group in groups
        for row in group.rows
    ]


def reason_of(rows: Sequence[Record], kind: str) -> str:
    """Why rows of a kind have no numbers."""
    reasons = [
        why
        for row in rows
        if row.kind == kind
        for why in ((f"failed: {row.error}",) if row.error else row.missing.values())
    ]
    return reasons[0] if reasons else "not measured"


def worst(values: Sequence[float] | None) -> float | None:
    """The value farthest from zero."""
    return max(values, key=abs) if values else None


def percent(value: float | None) -> float | None:
    """In hundredths."""
    return None if value is None else 100 * value


def milli(value: float | None) -> float | None:
    """In thousandths."""
    return None if value is None else 1e3 * value
