"""What a device can do at best: ceilings as measured, beside what its datasheet states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from lib import stats
from lib.analysis.metrics import shown_in
from lib.hardware.datasheets import Datasheet, datasheet
from lib.records.record import Record, board, environments, select
from lib.show.figure import PALETTE, axes, labelled
from lib.show.table import Column, Table, without_empty
from lib.show.wording import bullets, cautions, short
from lib.stats import Estimate

KERNELS = 1000  # for a sentence on what launching so many costs
ROUNDING = 1.01  # datasheets give two to four digits
DATASHEET = {
    "read_bytes_per_s": "memory_bytes_per_s", "copy_bytes_per_s": "memory_bytes_per_s",
    "matvec_bytes_per_s": "memory_bytes_per_s", "matmul_flop_per_s": "bf16_flop_per_s",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What bounds every row of one environment; None where it is not known.

    `read_bytes_per_s` is the best measured read stream. Records from before ceilings were measured
    have only the bandwidth of a copy, and `read_from` says so.
    """

    device: str
    sheet: Datasheet
    read_bytes_per_s: float | None = None
    read_from: str = "best read stream"
    matmul_flop_per_s: float | None = None
    matmul_float32_flop_per_s: float | None = None
    cache_bytes: int | None = None

    def matmul(self, dtype: str | None) -> float | None:
        """Best measured matrix product in a row's dtype (flop/s)."""
        by_dtype = {"bfloat16": self.matmul_flop_per_s, "float32": self.matmul_float32_flop_per_s}
        return by_dtype.get(str(dtype))


def limits(rows: Sequence[Record]) -> dict[str, Limits]:
    """Limits by environment: the ceilings measured on the same card, else that environment's copy;
    of several boards the sums.

    Two environments are of one card if they name the same GPU, or without one the same processor.
    """
    envs = environments(rows)
    measured = {_device(envs.get(r.env_id or "", {})): r for r in select(rows, "ceilings")}
    kinds = {env_id: board(env)[0] or _device(env) for env_id, env in envs.items()}
    return {env_id: _limits(env, measured.get(kinds[env_id])) for env_id, env in envs.items()}


def _limits(env: dict[str, Any], ceilings: Record | None) -> Limits:
    gpu, count = board(env)
    sheet = datasheet(gpu).times(count)
    cache = count * (env.get("cache_bytes") or 0) or sheet.cache_bytes
    if ceilings is None:
        return Limits(_device(env), sheet, env.get("copy_bytes_per_s"), "copy", cache_bytes=cache)
    names = ("read_bytes_per_s", "matmul_flop_per_s", "matmul_float32_flop_per_s")
    values = {name: ceilings.value(name) for name in names}
    rates = {name: None if v is None else count * v for name, v in values.items()}
    return Limits(_device(env), sheet, **rates, cache_bytes=cache)


def bandwidth_notes(used: Iterable[Limits]) -> list[str]:
    """For each device which bandwidths its rows are compared with, and where they come from."""
    by_device: dict[str, list[Limits]] = {}
    for one in used:
        by_device.setdefault(one.device, []).append(one)
    notes = []
    for device, entries in by_device.items():
        stated = entries[0].sheet.memory_bytes_per_s
        why = entries[0].sheet.missing.get("memory_bytes_per_s", "")
        rates = sorted({x.read_bytes_per_s for x in entries if x.read_bytes_per_s})
        ends = " to ".join(
            dict.fromkeys(short(x / 1e9) for x in (rates[0], rates[-1])) if rates else ["unknown"]
        )
        copied = any(x.read_from == "copy" for x in entries)
        what = "copy (no ceilings were measured with these records)" if copied else "read stream"
        notes.append(
            f"{device}: datasheet "
            + (f"{short(stated / 1e9)} GB/s" if stated else f"unknown ({why})")
            + f"; measured {what} {ends} GB/s"
        )
    return notes


def _device(env: dict[str, Any]) -> str:
    return str(env.get("gpu") or env.get("cpu") or "unknown device")


def table(rows: Sequence[Record]) -> Table:
    """Each ceiling: the best of its repetitions, the datasheet's value, and their ratio."""
    envs, built, notes = environments(rows), [], []
    ceilings = select(rows, "ceilings")
    several = len(ceilings) > 1
    for row in ceilings:
        env = envs.get(row.env_id or "", {})
        sheet = datasheet(env.get("gpu"))
        device = (_device(env),) if several else ()
        built += [(*device, *cells) for cells in _rows_of(row, sheet)]
        notes.append(_device(env) + _read_note(row) + _source_note(sheet))
    leading = [Column("device", numeric=False)] if several else []
    columns = (
        *leading,
        Column("ceiling", numeric=False),
        Column("unit", numeric=False),
        Column("best measured"),
        Column("worst of them"),
        Column("datasheet"),
        Column("measured / datasheet"),
    )
    return without_empty(
        Table("machine", "Ceilings of the machine", columns, tuple(built), tuple(notes))
    )


def _rows_of(row: Record, sheet: Datasheet) -> list[tuple[Any, ...]]:
    lines = []
    for metric in shown_in("machine"):
        title, unit, name, scale = metric.title, metric.unit, metric.of.name, 1 / metric.of.factor
        best = row.value(name)
        stated = _stated(sheet, name, scale)
        if best is None:
            why = stats.missing(f"not measured: {row.missing.get(name, 'no reading')}")
            lines.append((title, unit, why, why, stated, why))
            continue
        samples = _samples(row, name, best)
        worst = max(samples) if name == "launch_s" else min(samples)
        ratio = stats.missing("no value in a datasheet")
        if stated.value is not None:
            ratio = _single(best / scale / stated.value, "quotient")
        lines.append(
            (title, unit, _best(best / scale, len(samples)), _best(worst / scale), stated, ratio)
        )
    return lines


def _samples(row: Record, name: str, best: float) -> list[float]:
    """The repetitions of the shape that gave the best value."""
    ours = [s for key, s in row.samples.items() if key.split(", ")[0] == name]
    return next((s for s in ours if best in s), [best])


def _best(value: float, n: int = 1) -> Estimate:
    return Estimate(
        value,
        n=n,
        method=f"best of {n}" if n > 1 else "worst repetition",
        reason="a ceiling is an extreme: no interval",
    )


def _single(value: float, method: str) -> Estimate:
    return Estimate(value, n=1, method=method, reason="one value, no interval")


def _stated(sheet: Datasheet, name: str, scale: float) -> Estimate:
    if name not in DATASHEET:
        return stats.missing("no datasheet states it")
    value = getattr(sheet, DATASHEET[name])
    if value is None:
        return stats.missing(sheet.missing[DATASHEET[name]])
    return _single(value / scale, "datasheet")


def _read_note(row: Record) -> str:
    shape = row.value("read_shape")
    return f": the best reading shape is {shape}" if shape else ""


def _source_note(sheet: Datasheet) -> str:
    source = f"; datasheet: {'; '.join(sheet.source)}; looked up {sheet.date}"
    return source if sheet.source else f"; no datasheet: {sheet.missing['memory_bytes_per_s']}"


def streams(row: Record) -> dict[str, list[float]]:
    """Bytes per second of each shape that moves memory, every repetition, by its name."""
    rates = {}
    for key, samples in row.samples.items():
        name, _, shape = key.partition(", ")
        if name in ("copy_bytes_per_s", "read_bytes_per_s", "matvec_bytes_per_s"):
            rates[f"{name.partition('_')[0]}: {shape}"] = samples
    return rates


def violations(rows: Sequence[Record]) -> list[str]:
    """Ceilings above the datasheet: a stream that a cache served, or a wrong entry."""
    envs, sentences = environments(rows), []
    for row in select(rows, "ceilings"):
        sheet = datasheet(envs.get(row.env_id or "", {}).get("gpu"))
        for name, stated_as in DATASHEET.items():
            best, stated = row.value(name), getattr(sheet, stated_as)
            if best and stated and best > ROUNDING * stated:
                sentences.append(f"{name} {best:.4g} is above the datasheet's {stated:.4g}")
    return sentences


def conclusion(rows: Sequence[Record]) -> str:
    """The ceilings in sentences, each with its share of the datasheet."""
    envs, lines = environments(rows), []
    for row in select(rows, "ceilings"):
        env = envs.get(row.env_id or "", {})
        sheet, device = datasheet(env.get("gpu")), _device(env)
        read_per_s = row.value("read_bytes_per_s")
        lines.append(
            f"{device}: memory is read at {short(read_per_s / 1e9)} GB/s at best"
            f"{_share(read_per_s, sheet.memory_bytes_per_s)} ({row.value('read_shape')})."
        )
        flops = row.value("matmul_flop_per_s")
        lines.append(
            f"{device}: a bfloat16 matrix product runs at {short(flops / 1e12)} TFLOP/s"
            f"{_share(flops, sheet.bf16_flop_per_s)}."
        )
        launch = row.value("launch_s")
        if launch:
            lines.append(
                f"Queueing and finishing {KERNELS:,} tiny kernels takes "
                f"{short(1e3 * launch * KERNELS)} ms: a step of so many "
                "cannot be faster unless they are captured together."
            )
        if sheet.memory_bytes_per_s is None:
            lines.append(f"No datasheet beside it: {sheet.missing['memory_bytes_per_s']}.")
    return bullets([*lines, *cautions(select(rows, "ceilings"))])


def _share(value: float, stated: float | None) -> str:
    return f", {value / stated:.0%} of the datasheet's value" if stated else ""


def figure(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Bandwidth of every shape that moves memory, all repetitions, beside the datasheet's."""
    ceilings = select(rows, "ceilings")
    shapes = streams(ceilings[-1]) if ceilings else {}
    ax = axes(ax, figsize=(7.2, 1.2 + 0.3 * len(shapes)))
    for place, (name, samples) in enumerate(shapes.items()):
        rates = [rate / 1e9 for rate in samples]
        ax.plot(rates, [place] * len(rates), "o", ms=4, alpha=0.35, color=PALETTE[0])
        ax.plot(max(rates), place, "|", ms=14, mew=2, color=PALETTE[0], label=name)
    stated = limits(rows)[ceilings[-1].env_id].sheet.memory_bytes_per_s if ceilings else None
    if stated:
        ax.axvline(stated / 1e9, ls=":", color="0.3", label="datasheet")
    ax.set_yticks(range(len(shapes)), list(shapes))
    labelled(ax, "Bandwidth by shape", "GB/s (10^9 bytes a second)", "", legend=False)
    ax.set_ylim(max(len(shapes), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    return ax
