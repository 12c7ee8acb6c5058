"""Generic tables of any models: rows -> a table of estimates -> a DataFrame, a CSV or HTML.

The paper's own tables are in `lib.papertables`. Every number keeps its interval, its n and its
method; what was not measured is there with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from lib import energypasses, energystats, stats
from lib.groups import SETUP, by_setup
from lib.papertables import write_csvs
from lib.records.record import Record, environments, record_id, select
from lib.show.table import Column, Table, build, frame, sampled, setups
from lib.stats import Estimate

__all__ = [
    "Column",
    "Table",
    "ablation_table",
    "ablations",
    "energy",
    "energy_table",
    "frame",
    "latency",
    "latency_table",
    "memory",
    "memory_table",
    "trace",
    "trace_table",
    "write_csvs",
    "write_generic_csvs",
]

BASE_ARMS = {"decoding": "greedy", "precision": "bfloat16", "stack": "hf-eager"}
CHANGED = {
    "decoding": "decoding",
    "context": "context",
    "precision": "dtype",
    "experts": "experts",
    "stack": "stack",
}


def _reading(row: Record, name: str, factor: float = 1, *, like: str = "") -> Estimate:
    """A single reading, or why there is none: the reason of `like` where it has none of its own."""
    if row.value(name) is not None:
        return replace(stats.exact(row.values[name] * factor), records=(record_id(row),))
    if row.error:
        return stats.missing(f"failed: {row.error}")
    reason = row.missing.get(name) or row.missing.get(like) or "no reading"
    return stats.missing(f"not measured: {reason}")


def latency(rows: Sequence[Record]) -> Table:
    """TTFT, end-to-end time, output and decode throughput, ITL: per model and context."""
    greedy = [r for r in rows if r.key.get("decoding") in ("greedy", None)]
    marked = any(r.kind == "latency" and r.samples.get("decode_s") for r in greedy)

    def cells(group: list[Record]) -> Sequence[Any]:
        calls = [r for r in group if r.kind == "latency"]
        failed = [r for r in calls if r.error]
        main = min((n for r in calls if (n := r.key.get("new_tokens") or 1) > 1), default=1)
        ones = select(calls, new_tokens=1) or failed
        whole = select(calls, new_tokens=main) or failed
        e2e = sampled(whole, "e2e_s", factor=1e3)
        gaps = [
            gap
            for r in group
            if r.kind == "itl"
            for call in r.samples.get("token_s", ())
            for gap in stats.gaps(call)
        ]
        return (
            sampled(ones, "ttft_s", factor=1e3),
            main,
            e2e,
            sampled(whole, "e2e_s", 95, 1e3),
            stats.inverse(e2e, main * 1e3),
            decode_tok_per_s(group),
            *([marked_tok_per_s(group)] if marked else []),
            _itl_ms(group, gaps),
        )

    columns = [
        Column("TTFT", "ms"),
        Column("new tokens", numeric=False),
        Column("p50", "ms"),
        Column("p95 or max of n", "ms"),
        Column("output throughput", "tok/s"),
        Column("decode throughput", "tok/s"),
        *([Column("decode by device clock", "tok/s")] if marked else []),
        Column("ITL", "ms"),
    ]
    made = build(
        "latency",
        "Latency and throughput",
        greedy,
        ("latency", "itl"),
        ("context",),
        columns,
        cells,
    )
    return replace(made, notes=(*made.notes, *_slower_when_longer(made)))


def _slower_when_longer(table: Table) -> list[str]:
    """What no prefill can cause: a token takes more time in long calls than in short ones."""
    titles = [column.title for column in table.columns]
    whole, decode = (titles.index(f"{what} throughput") for what in ("output", "decode"))
    rates = [(row[whole].value, row[decode].value) for row in table.rows]
    slower = sum(None not in pair and pair[1] < pair[0] for pair in rates)
    said = (
        f"decode throughput below output throughput in {slower} of {len(rates)} rows: long "
        "calls took more for a token, which no prefill causes; the host did not keep its speed"
    )
    return [said] if slower else []


def decode_tok_per_s(rows: Sequence[Record]) -> Estimate:
    """Decode throughput: the inverse slope of end-to-end time over new tokens (tok/s).

    Prefill is the intercept and so is left out. Needs calls of two different lengths; a lone call
    that was the first of its length is none.
    """
    timed = [
        r
        for r in rows
        if r.kind in ("latency", "batch")
        and (r.key.get("new_tokens") or 1) > 1
        and r.samples.get("e2e_s")
    ]
    calls = [r for r in timed if not _lone_and_cold(r)]
    pairs = [(r.key["new_tokens"], t) for r in calls for t in r.samples["e2e_s"]]
    if len({g for g, _ in pairs}) < 2:
        cold = len(timed) - len(calls)
        why = (
            f"; {cold} arm(s) hold one call, the first of its length, which waits for the allocator"
            if cold
            else ""
        )
        return stats.missing(f"not measured: a slope needs calls of two lengths{why}")
    slope = stats.slope([g for g, _ in pairs], [t for _, t in pairs])
    if slope.value is not None and slope.value <= 0:
        return stats.missing("not resolved: noise hides how time grows with the number of tokens")
    return replace(stats.inverse(slope), records=tuple(map(record_id, calls)))


def _lone_and_cold(row: Record) -> bool:
    """Whether the one call of an arm with a growing cache had only short calls before it."""
    before, calls = row.samples.get("warmup_s") or [], row.samples["e2e_s"]
    grows = row.key.get("cache") == "dynamic"
    return bool(grows and before and len(calls) == 1 and max(before) < calls[0] / 2)


def marked_tok_per_s(rows: Sequence[Record]) -> Estimate:
    """Decode throughput a second way: steps over their time by the device's clock (tok/s).

    No slope and no prefill in it, so that noise of the host's does not reach it; what the host
    adds between steps it does see.
    """
    calls = [r for r in rows if r.samples.get("decode_s")]
    if not calls:
        return stats.missing("not measured: only captured steps are marked on the device")
    steps = [t / (r.key["new_tokens"] - 1) for r in calls for t in r.samples["decode_s"]]
    return replace(stats.inverse(stats.median(steps)), records=tuple(map(record_id, calls)))


def _itl_ms(rows: Sequence[Record], gaps: Sequence[float]) -> Estimate:
    """Median gap between tokens (ms). Steps of one call are correlated: no interval is given."""
    if not gaps:
        return sampled([r for r in rows if r.kind == "itl"], "token_s")
    middle = stats.median(gaps)
    return Estimate(
        middle.value * 1e3,
        n=middle.n,
        method="median of all gaps",
        reason="steps of one call are correlated: no interval",
    )


def memory(rows: Sequence[Record]) -> Table:
    """Peak memory and what it consists of, per model, protocol and context.

    In GB (10^9 bytes), or in MB (10^6 bytes) where no peak reaches one GB.
    """
    names = {
        "peak_bytes": "peak",
        "baseline_bytes": "baseline",
        "kv_tensor_bytes": "KV, tensors",
        "kv_card_bytes": "KV, card",
        "logits_bytes": "logits held",
        "workspace_bytes": "workspace",
        "reserved_bytes": "reserved",
    }

    peaks = [r.value("peak_bytes") or 0 for r in rows if r.kind.startswith("memory")]
    unit, size = ("GB", 1e9) if max(peaks, default=0) >= 1e9 else ("MB", 1e6)

    def cells(group: list[Record]) -> Sequence[Any]:
        row = group[-1]
        above = _reading(row, "peak_bytes", 1 / size)
        if above.value is not None and row.value("baseline_bytes") is not None:
            above = Estimate(
                (row.value("peak_bytes") - row.value("baseline_bytes")) / size,
                n=1,
                method="difference of readings",
                reason=above.reason,
            )
        readings = [_reading(row, name, 1 / size) for name in names]
        return (readings[0], above, *readings[1:], row.value("memory_source") or "")

    columns = [
        Column("peak", unit),
        Column("above baseline", unit),
        *(Column(title, unit) for title in list(names.values())[1:]),
        Column("source", numeric=False),
    ]
    return build(
        "memory",
        "Memory",
        rows,
        ("memory-paper", "memory"),
        ("context", "new_tokens", "protocol"),
        columns,
        cells,
    )


def energy(rows: Sequence[Record]) -> Table:
    """Energy of whole calls on the GPU board, per model and context; on a CPU the reasons.

    Gross and net of what the idle board draws, by the counter; beside it what the one-second mean
    and the paper's estimator give for the same calls.
    """

    def cells(group: list[Record]) -> Sequence[Any]:
        row = group[-1]
        tokens = row.key.get("new_tokens") or 1
        scale = 1e3 / tokens
        per_1k = sampled(group, "energy_j", factor=scale)
        return (
            per_1k,
            energystats.net(row, scale),
            stats.inverse(per_1k, 1e3),
            sampled(group, "average_energy_j", factor=scale),
            sampled(group, "paper_energy_j", factor=scale),
            energystats.power_w(row),
            _reading(row, "idle_w", like="energy_j"),
            stats.inverse(sampled(group, "e2e_s"), tokens),
        )

    columns = [
        Column("J/1K tokens", "J"),
        Column("J/1K, net of idle", "J"),
        Column("tokens per joule", "1/J"),
        Column("J/1K, average power", "J"),
        Column("J/1K, before/after estimator", "J"),
        Column("mean power", "W"),
        Column("idle", "W"),
        Column("output throughput", "tok/s"),
    ]
    table = build("energy", "Energy", rows, ("energy",), ("context", "new_tokens"), columns, cells)
    notes = (energystats.BOUNDARY, *energystats.slow_starts(rows))
    return replace(table, notes=(*table.notes, *notes))


def trace(rows: Sequence[Record]) -> Table:
    """What a decode step really uses: active parameters, experts and bytes, per arm and batch.

    In 10^9 parameters and GB, or 10^6 and MB where no model has 10^8 active parameters.
    """
    largest = max(
        (r.value("active_params_nominal") or 0 for r in rows if r.kind == "trace"), default=0
    )
    count, size, scale = ("10^9", "GB", 1e-9) if largest >= 1e8 else ("10^6", "MB", 1e-6)
    shown = {
        "active_params_nominal": ("active, nominal", count, scale),
        "active_params_realised": ("active, realised", count, scale),
        "experts_chosen_decode": ("experts chosen in a step", "", 1),
        "experts_touched_decode": ("experts touched in a step", "", 1),
        "experts_touched_prefill": ("experts touched in the prefill", "", 1),
        "routing_entropy_bits": ("routing entropy", "bits", 1),
        "decode_bytes": ("a step must read", size, scale),
        "decode_bytes_realised": ("a step reads", size, scale),
    }

    def cells(group: list[Record]) -> Sequence[Any]:
        row = group[-1]
        note = row.value("note")
        found = [_reading(row, name, factor) for name, (_, _, factor) in shown.items()]
        if note:
            found = [e if e.value is not None else stats.missing(note) for e in found]
        return (row.value("decode_experts") or "-", *found)

    columns = [
        Column("decode runs", numeric=False),
        *(Column(title, unit) for title, unit, _ in shown.values()),
    ]
    made = build(
        "trace", "What a step really reads", rows, ("trace",), ("context", "batch"), columns, cells
    )
    note = (
        "touched: set to NaN, the expert's weights make the output NaN; parameters are those "
        "of one decode token, experts are means over layers"
    )
    return replace(made, notes=(*made.notes, note))


def ablations(rows: Sequence[Record], name: str) -> Table:
    """One-change arms against their base arm: time, throughput, ratio of throughput, verdict.

    `name` is decoding, context, precision, experts or stack. The base arm is greedy, bfloat16 or
    hf-eager, the shortest context, or the first arm where none of these is among the rows.
    """
    kind, changed = f"ablation-{name}", CHANGED[name]
    groups = by_setup(rows, kind, without=(changed,), failed=True)
    differ = [f for f in SETUP if len({g.of(f) for g in groups}) > 1]
    built = []
    for group in groups:
        arms = list(group.rows)
        if name == "context":
            arms.sort(key=lambda r: r.key.get("context") or 0)
        base = next((r for r in arms if r.key.get(changed) == BASE_ARMS.get(name)), arms[0])
        setup = [group.of(f) for f in differ]
        built += [_ablation_row(row, base, changed, setup) for row in arms]
    columns = (
        Column("model", numeric=False),
        *(Column(f, numeric=False) for f in differ),
        Column(changed, numeric=False),
        Column("p50", "s"),
        Column("output throughput", "tok/s"),
        Column("throughput / base arm"),
        Column("verdict", numeric=False),
    )
    arms = [r for r in rows if r.kind == kind]
    _, notes = setups(arms, environments(rows))
    fixed = _fixed(arms, [f for f in ("context", "new_tokens", "decoding") if f != changed])
    return Table(kind, f"Ablation: {name}", columns, tuple(built), (*fixed, *notes))


def _fixed(rows: Sequence[Record], fields: Sequence[str]) -> list[str]:
    shared = {f: {r.key.get(f) for r in rows} for f in fields}
    text = [f"{f.replace('_', ' ')} {next(iter(v))}" for f, v in shared.items() if len(v) == 1]
    return [", ".join(text)] if text else []


def _ablation_row(row: Record, base: Record, changed: str, setup: Sequence[str]) -> tuple[Any, ...]:
    arm, time_s = row.key.get(changed), sampled([row], "e2e_s")
    rate = stats.inverse(time_s, row.key.get("new_tokens") or 1)
    start = (row.key.get("model"), *setup, arm, time_s, rate)
    if time_s.value is None:
        return (*start, stats.missing(time_s.reason), time_s.reason)
    if row is base:
        return (*start, Estimate(1.0, n=rate.n, method="the base arm"), "base arm")
    ratio = replace(
        stats.ratio(base.samples.get("e2e_s") or [], row.samples["e2e_s"]),
        records=(record_id(row), record_id(base)),
    )
    resolved = ratio.resolved_from(1.0)
    if resolved is None:
        verdict = ratio.reason or "no interval"
    elif not resolved:
        verdict = "no difference resolved"
    else:
        verdict = "faster" if ratio.value > 1 else "slower"
    return (*start, ratio, verdict)


def latency_table(rows: Sequence[Record]) -> pd.DataFrame:
    """`latency` as a DataFrame."""
    return frame(latency(rows))


def memory_table(rows: Sequence[Record]) -> pd.DataFrame:
    """`memory` as a DataFrame."""
    return frame(memory(rows))


def energy_table(rows: Sequence[Record]) -> pd.DataFrame:
    """`energy` as a DataFrame."""
    return frame(energy(rows))


def trace_table(rows: Sequence[Record]) -> pd.DataFrame:
    """`trace` as a DataFrame."""
    return frame(trace(rows))


def ablation_table(rows: Sequence[Record], name: str) -> pd.DataFrame:
    """`ablations` as a DataFrame; `name` is decoding, context, precision, experts or stack."""
    return frame(ablations(rows, name))


def generic_tables(rows: Sequence[Record]) -> list[Table]:
    """Every generic table that has rows."""
    made = [
        latency(rows),
        memory(rows),
        energy(rows),
        energypasses.table(rows),
        trace(rows),
        *(ablations(rows, n) for n in CHANGED),
    ]
    return [table for table in made if table.rows]


def write_generic_csvs(
    rows: Sequence[Record], out_dir: str | Path, more: Sequence[Table] = ()
) -> list[Path]:
    """tables/latency.csv, memory.csv, energy.csv, trace.csv ..., `more`: those that have rows."""
    paths = []
    for table in [*generic_tables(rows), *more]:
        path = Path(out_dir) / "tables" / f"{table.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(frame(table, digits=8).to_csv(index=False), encoding="utf-8")
        paths.append(path)
    return paths
