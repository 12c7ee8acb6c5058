"""What energy rows say in sentences: joules, uncertainty, a second pass, and the two checks."""

from __future__ import annotations

from collections.abc import Sequence

from lib import stats
from lib.analysis.energy import quantities
from lib.analysis.metrics import METRICS
from lib.analysis.setups import Group, by_setup
from lib.records.record import Record, select
from lib.show import wording
from lib.show.wording import short


def conclusion(rows: Sequence[Record], pue: float = 1.0, g_per_kwh: float | None = None) -> str:
    """Joules per 1,000 tokens by the counter, what of it is idle, prefill and token, uncertainty,
    and how far the paper's estimator is from it; grams of CO2e where an intensity is given."""
    lines = []
    for group in by_setup(rows, "energy"):
        model, row = group.label, max(group.rows, key=lambda r: r.key["context"])
        if not row.samples.get("energy_j"):
            reason = row.missing.get("energy_j", "no reading")
            lines.append(f"{model}: energy not measured ({reason}).")
            continue
        per_1k = METRICS["j_per_1k"].of([row])
        against = stats.ratio(row.samples.get("paper_energy_j") or (), row.samples["energy_j"])
        idle = row.value("idle_w")
        share = idle * row.values["window_s"] / row.values["window_energy_j"] if idle else None
        lines.append(
            f"{model} at {row.key['context']} tokens: "
            f"{wording.number(per_1k, 'J per 1,000 generated tokens')} (GPU board, gross)"
            + (f", of which {share:.0%} is what the idle board draws in that time" if share else "")
            + (
                f"; the paper's before/after estimator gives {stats.change(against)}."
                if against.value is not None
                else "."
            )
        )
        lines += details(group, row, rows)
        if footprint := quantities.carbon(1e3 * per_1k.value, pue, g_per_kwh):
            lines.append(
                f"{model}, one million tokens: {footprint.kwh:.3g} kWh x PUE {pue:g} x "
                f"{g_per_kwh:g} g/kWh = {footprint.grams:.3g} gCO2e."
            )
    # What the instrument does not show stands in its own table.
    return wording.bullets([*lines, *wording.cautions(r for r in rows if r.kind != "instrument")])


def details(group: Group, row: Record, rows: Sequence[Record]) -> list[str]:
    """Prefill and token, uncertainty, and the blocks of a row that are not believed."""
    lines, model, context = [], group.label, row.key["context"]
    lengths = next(
        (
            g.rows
            for g in by_setup(rows, quantities.LENGTHS)
            if (g.model, g.setup) == (group.model, group.setup)
        ),
        (),
    )
    arms = select(lengths, context=context)
    if any(r.kind == "energy-slope" for r in arms):
        prefill, token = quantities.split(arms)
        lines.append(
            f"{model} at {context} tokens: prefill and first token {wording.number(prefill, 'J')}; "
            f"each further token {wording.number(token, 'J')}."
        )
    half_widths = quantities.uncertainty(row, quantities.spread_beside(rows, group))
    parts = {
        "95 % over blocks": half_widths.statistical,
        "readouts": half_widths.readouts,
        "weight values": half_widths.weights,
    }
    terms = [f"{name} ±{value:.1%}" for name, value in parts.items() if value is not None]
    terms.append(f"gain of the sensor, assumed and not measured, ±{half_widths.gain:.0%}")
    lines.append(
        f"{model}, uncertainty: {', '.join(terms)} (the gain cancels in ratios on one card)."
    )
    if bad := row.value("invalid_blocks"):
        lines.append(
            f"{model}: {len(bad)} of {row.values['blocks']} blocks are not believed, {bad[0]}."
        )
    return lines


def again(rows: Sequence[Record]) -> str:
    """What the second pass found of each cell, and over the first where that is among the rows."""
    lines = []
    for group in by_setup(rows, quantities.PASSES):
        for row in select(group.rows, quantities.AGAIN):
            cell = {name: row.key[name] for name in ("context", "new_tokens")}
            _, second, over = quantities.compared(select(group.rows, **cell))
            spread = quantities.variation(row)
            lines.append(
                f"{group.label} at {row.key['context']} tokens, second pass: "
                f"{wording.number(second, 'J per 1,000 generated tokens')}"
                + (f", blocks spread by {spread:.2%}" if spread is not None else "")
                + (
                    f"; over the first pass {wording.number(over, '×')}"
                    if over.value is not None
                    else ""
                )
                + "."
            )
    return wording.bullets([*lines, *wording.cautions(rows)])


def checks(rows: Sequence[Record]) -> str:
    """What values of weights change, and how far a peer is on the same windows."""
    lines = []
    for group in by_setup(rows, quantities.WEIGHTS, without=("weights",)):
        name = group.label
        for value, ratio in quantities.weight_effects(group.rows).items():
            if value != "normal":
                lines.append(
                    wording.compared(
                        f"Energy of {name} with {value} weights", {"normal ones": ratio}
                    )
                )
        if (real := quantities.real_effect(group.rows)) is not None:
            lines.append(
                wording.compared(f"Energy of {name} with real weights", {"random ones": real})
            )
    peers = by_setup(rows, "energy-peer")
    for label, row in ((peer.label, row) for peer in peers for row in peer.rows):
        of = f" of {label}" if len(peers) > 1 else ""
        for name, off in quantities.peer_differences(row).items():
            if off:
                seconds = stats.median(row.samples[f"{name}_s"]).value
                lines.append(
                    f"Zeus on {len(off)} windows{of} of {short(seconds)} s: median "
                    f"{stats.median(off).value:+.2%}, at most {max(off, key=abs):+.2%} "
                    "from this workbook."
                )
    return wording.bullets([*lines, *wording.cautions(rows)])
