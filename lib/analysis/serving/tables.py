"""What servers under load show, as tables and in sentences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis.metrics import METRICS, shown_in
from lib.analysis.rows import Rows
from lib.analysis.serving import attribution, reading
from lib.analysis.serving.reading import KIND, KINDS, MIX
from lib.analysis.setups import Name, build, grouped, named
from lib.measure.serving.arrivals import LAWS
from lib.records.record import Record
from lib.show.table import Column, Table, without_empty
from lib.show.wording import bullets, cautions, number, short
from lib.stats import Estimate

SERVER = ("server", "context", "new_tokens")  # what loads of one curve share, beside the setup
FIELDS = (*SERVER, "load")
GOOD_SHARE = 0.95  # of the requests that must keep the limits, for a load to be called bearable
SATURATED = 1.10  # twice the users must give this much more throughput
# What a load was not, or a client could not: its row is shown and decides nothing.
DOUBTS = {
    "unsteady", "few_requests", "client_busy", "client_late", "cached", "stopped",
    "metrics_differ", "arrivals", "ran_out", "stalled",
}  # fmt: skip
NOTES = (
    "closed: so many users, each with one request in flight; poisson: requests arrive at that rate",
    "a latency counts from the scheduled instant, and is of the requests scheduled in the window "
    "that were answered as asked; failures stand beside it",
    "tokens count when they came, prompts when their first token did; goodput counts failures as "
    "misses",
    "energy is of the GPU board over the same window, gross: idle time, prompts and answers",
)


def table(rows: Sequence[Record]) -> Table:
    """Each load of each server: throughput, goodput, joules."""
    texts = [text for row in reading.measured(rows) for text in (_served(row), _limits(row))]
    notes = (*NOTES[:1], *NOTES[2:], *dict.fromkeys(filter(None, texts)))
    return _grid("serving", "Servers under load", rows, shown_in("serving"), notes)


def latencies(rows: Sequence[Record]) -> Table:
    """Each load of each server: percentiles of its latencies, with the failures beside them."""
    columns = [(Column("requests"), _asked), (Column("failed"), _failed)]
    columns += shown_in("serving-latency")
    return _grid("serving-latency", "Latency under load", rows, columns, NOTES[:2])


def _grid(
    name: str, title: str, rows: Sequence[Record], columns: Sequence[Any], notes: Sequence[str]
) -> Table:
    grid = build(name, title, rows, (KIND,), FIELDS, columns)
    at = next(place for place, column in enumerate(grid.columns) if column.title == "load")
    groups = itertools.groupby(grid.rows, key=lambda line: line[:at])
    lines = [sorted(group, key=lambda line: load_order(line[at])) for _, group in groups]
    every = tuple(line for group in lines for line in group)
    return without_empty(replace(grid, rows=every, notes=(*grid.notes, *notes) * bool(every)))


def load_order(load: str) -> tuple[int, float]:
    """Sorts loads as they are called: users first, then rates, each ascending."""
    law, value = load.split(",")[0].split(" ")
    return -LAWS.index(law), float(value.removesuffix("/s"))


def _asked(group: Sequence[Record]) -> int | None:
    return None if group[-1].error else len(reading.in_window(group[-1]))


def _failed(group: Sequence[Record]) -> int | None:
    return None if group[-1].error else reading.failed(group[-1])


def _served(row: Record) -> str:
    """What a server is, as far as it was told: version, how it batches, how it was asked."""
    batching = {True: "continuous batching", False: "no continuous batching"}
    api = row.value("api")
    facts = (
        row.value("server_version"),
        batching.get(row.value("continuous_batching")),
        api and f"asked by {api} with {'token ids' if row.value('token_id_prompts') else 'text'}",
    )
    return f"{row.key['server']}: {', '.join(filter(None, facts))}" if any(facts) else ""


def _limits(row: Record) -> str:
    names = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("latency_s", "whole answer"))
    parts = [
        f"{title} at most {short(1e3 * value)} ms"
        for name, title in names
        if (value := row.value(f"limit_{name}")) is not None
    ]
    return f"limits: {', '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class Line:
    """Loads of one model in one setup on one server at one shape, users first, then rates."""

    model: str
    name: Name
    rows: tuple[Record, ...]

    def loads(self, law: str, *, sure: bool = False) -> list[Record]:
        """Those of a law that were measured; `sure` ones have no doubt about them."""
        return [
            row
            for row in self.rows
            if not row.error
            and row.value("law") == law
            and not (sure and DOUBTS & {warning["code"] for warning in row.warnings})
        ]


def lines(rows: Sequence[Record], kind: str = KIND) -> list[Line]:
    """Every curve, with what it is called beside the others."""
    fields = SERVER if kind == KIND else SERVER[:1]
    groups = grouped(rows, (kind,), fields)
    keys = {where: (where[0], *where[1], *where[2:]) for where in groups}
    names = named(list(keys.values()), fields)
    order: Callable[[Record], Any] = lambda row: load_order(row.key["load"])  # noqa: E731
    return [
        Line(
            where[0], names[keys[where]], tuple(sorted(group, key=order) if kind == KIND else group)
        )
        for where, group in groups.items()
    ]


def costs(rows: Sequence[Record]) -> Table:
    """What prompt tokens, output tokens and time cost, by a fit over mixes, and how far the mixes
    that were held out are from what it predicts."""
    names = ("model", "idle (W)", "busy (W more)", "prompt (J/1K)", "output (J/1K)")
    names += ("held out, median error (%)", "held out, worst error (%)", "remark")
    columns = tuple(Column(name, numeric=name not in ("model", "remark")) for name in names)
    fits = [(line, attribution.of_rows(line.rows)) for line in lines(rows, MIX)]
    cells = tuple(_costs(line, fit) for line, fit in fits)
    limits = f"{attribution.MEDIAN_LIMIT:.0%} in the median and {attribution.WORST_LIMIT:.0%}"
    notes = (
        "joules of a window = idle power x its seconds + busy power x the seconds with a request "
        "in flight + a cost for each computed prompt token and each output token, none below zero",
        f"{attribution.HELD_OUT} mixes were held out before anything was measured; a fit is "
        f"believed where they are predicted within {limits} at worst",
    )
    table = Table("serving-costs", "Energy by prompt, answer and time", columns, cells, notes)
    return without_empty(table) if cells else replace(table, notes=())


def _costs(line: Line, fit: attribution.Fit | str) -> tuple[Any, ...]:
    if isinstance(fit, str):
        return (line.name.label, *(stats.missing(fit) for _ in range(6)), fit)
    none = stats.missing("not in the model: all mixes were busy all the time")
    tokens = (stats.scaled(fit.costs[f"{name}_token_j"], 1e3) for name in ("prompt", "output"))
    errors = (fit.median_error, fit.worst_error)
    return (
        line.name.label,
        fit.costs["idle_w"],
        fit.costs.get("busy_w", none),
        *tokens,
        *(stats.exact(100 * error, "of four mixes held out") for error in errors),
        "within the limits" if fit.ok else "not believed: the held-out mixes are off",
    )


def tables(rows: Sequence[Record]) -> list[Table]:
    """Those that have rows."""
    grids = (table(rows), latencies(rows), costs(rows))
    return [grid for grid in grids if grid.rows]


def conclusion(rows: Sequence[Record]) -> str:
    """Each curve from one user to the most: throughput, latency, the load that keeps the limits,
    joules, and what a fit of energy says."""
    rows = Rows.of(rows)
    sentences = [text for line in lines(rows) for text in _curve(line)]
    sentences += [text for line in lines(rows, MIX) for text in _fit(line)]
    mine = [row for row in rows if row.kind in KINDS]
    return bullets([*sentences, *cautions(mine)])


def _curve(line: Line) -> list[str]:
    name = line.name.label
    failures = [f"{name}, {row.key['load']}: {row.error}." for row in line.rows if row.error]
    loads = line.loads("closed", sure=True)
    doubtful = len(line.loads("closed")) - len(loads)
    if not loads:
        why = f"each of {doubtful} has a warning" if doubtful else "none was measured"
        return [f"{name}: no load of users decides anything, since {why}.", *failures]
    first, best = loads[0], max(loads, key=lambda row: _value("served_output", row) or 0)
    texts = [f"{name}: {_at(first)}" + (f"; {_at(best)}" if best is not first else "")]
    texts += [_saturation(name, loads), *_bearable(name, loads), *_joules(name, first, best)]
    if doubtful:
        texts.append(f"{name}: {doubtful} load(s) with warnings decide nothing of this")
    return [f"{text}." for text in texts] + failures


def _estimate(metric: str, row: Record) -> Estimate:
    return METRICS[metric].of([row])


def _value(metric: str, row: Record) -> float | None:
    return _estimate(metric, row).value


def _users(row: Record) -> str:
    return "1 user" if row.key["batch"] == 1 else f"{row.key['batch']} users"


def _at(row: Record) -> str:
    ttft, tpot = _estimate("served_ttft", row), _estimate("served_tpot", row)
    return (
        f"at {_users(row)} {number(_estimate('served_output', row), 'tok/s')}, median TTFT "
        f"{number(ttft, 'ms')}, median TPOT {number(tpot, 'ms')}"
    )


def _saturation(name: str, loads: Sequence[Record]) -> str:
    for before, after in itertools.pairwise(loads):
        if after.key["batch"] != 2 * before.key["batch"]:
            continue
        gain = stats.quotient(*(_estimate("served_output", row) for row in (after, before)))
        if gain.value is not None and gain.value < SATURATED:
            return (
                f"{name} is saturated at {_users(before)}: twice as many give {short(gain.value)} "
                f"times the throughput, less than {SATURATED:g}"
            )
    return f"{name} is not saturated at {_users(loads[-1])}, the most that decide anything"


def _bearable(name: str, loads: Sequence[Record]) -> list[str]:
    limits = _limits(loads[0]).removeprefix("limits: ")
    if not limits:
        return []
    shares = [(row, reading.goodput(row).share or 0.0) for row in loads]
    good = [row for row, share in itertools.takewhile(lambda x: x[1] >= GOOD_SHARE, shares)]
    most = f"up to {_users(good[-1])}" if good else f"not even with {_users(loads[0])}"
    return [f"{name} keeps its limits ({limits}) in {GOOD_SHARE:.0%} of the requests {most}"]


def _joules(name: str, first: Record, best: Record) -> list[str]:
    rows = [first] if first is best else [first, best]
    if _value("served_j_per_1k", first) is None:
        reason = _estimate("served_j_per_1k", first).reason
        return [f"{name}: energy not measured ({reason})"]
    parts = []
    for row in rows:
        idle = _value("served_idle_share", row)
        parts.append(
            f"at {_users(row)} {number(_estimate('served_j_per_1k', row), 'J')}"
            + (f", {idle:.0f}% of it idle power" if idle is not None else "")
        )
    return [f"{name}, 1,000 output tokens: {'; '.join(parts)} (GPU board, gross)"]


def _fit(line: Line) -> list[str]:
    fit, name = attribution.of_rows(line.rows), line.name.label
    if isinstance(fit, str):
        return [f"{name}: energy is not attributed ({fit})."]
    errors = f"median {fit.median_error:.1%}, worst {fit.worst_error:.1%}"
    if not fit.ok:
        return [f"{name}: the fit of energy is not believed: held-out mixes are off by {errors}."]
    prompt, output = (
        number(stats.scaled(fit.costs[f"{kind}_token_j"], 1e3), "J")
        for kind in ("prompt", "output")
    )
    return [f"{name}: 1,000 prompt tokens cost {prompt}, 1,000 output tokens {output}, beside the "
            f"time; mixes that were held out are predicted with errors of {errors}."]  # fmt: skip
