"""Registered predictions against what was measured since: the error of every cell, and coverage.

A cell is matched with rows by GPU, model, number format, stack, context and batch; its measured
value is the estimate that the tables use. A cell whose rows started before the registration is
named and left out of the coverage. What was not measured has no value, and its reason.

    make score [FROM="outputs/a outputs/b"] [OUT=folder]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files, stats
from lib.analysis import choice, gates
from lib.analysis.batch import points
from lib.analysis.capacity import registry
from lib.analysis.energy import quantities
from lib.analysis.metrics import METRICS
from lib.analysis.routers import LEAD
from lib.analysis.rows import SETUP, Rows, load
from lib.analysis.setups import grouped
from lib.files import ROOT, ParamsError, read_yaml
from lib.records import jobs
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, visit_of
from lib.records.store import RELEASED, instant
from lib.stacks.registry import STACKS
from lib.stats import Estimate

PLACE = ("gpu", "model", "form", "stack", "context", "batch")
DECODE, TTFT, DECODE_J, CALL_J = "decode_tok_per_s", "ttft_s", "decode_j_per_1k", "call_j_per_1k"
CALL_TOKENS = 64  # of the whole call whose joules were predicted
OWN_EXPERTS = ("none", "None", "grouped_mm")  # the library's own choice, which was predicted
FULL = "OutOfMemory"  # in the error of what the card did not hold
SHARED = "not measured on this stack: its prefill is that of hf-eager, and is scored there"
# What was fixed at registration: of `figures`, of the target, and whether more is better.
TARGETS = {
    "coverage": ("coverage", "coverage_at_least", True),
    "median half-width": ("median_half_width", "median_half_width_at_most", False),
    "median decode error": ("median_decode_error", "median_decode_error_at_most", False),
}
APART = ("gpu", "model", "context")  # cells of one are not independent
Place = tuple[Any, ...]


@dataclass(frozen=True)
class Arm:
    """What was measured at one place: an estimate for each metric, when its first row started, and
    whether the card held it (None where another error ended it)."""

    estimates: Mapping[str, Estimate]
    start: datetime
    held: bool | None


def measured(rows: Sequence[Record], starts: Mapping[str, str] | None = None) -> dict[Place, Arm]:
    """What rows say at each place; `starts` are the times of runs by the ids of environments.

    A place that was measured in several setups (weights, engines) has no value, and says so.
    """
    rows, leads = points.results(rows)
    arms = {
        place: _one([_arm(*place[-2:], group, rows, starts or {}) for group in several])
        for place, several in _places(rows).items()
    }
    for place, several in _places(leads).items():
        began = min(_begun(group, leads, starts or {}) for group in several)
        none = dict.fromkeys((DECODE, TTFT, DECODE_J, CALL_J), stats.missing(LEAD))
        arms.setdefault(place, Arm(none, began, True))
    return arms


def _places(rows: Rows) -> dict[Place, list[Sequence[Record]]]:
    """The groups of rows at each place, one for each setup."""
    places: dict[Place, list[Sequence[Record]]] = {}
    groups = grouped(rows, (*choice.TIMED, *choice.JOULES), ("context", "batch"))
    for (model, setup, context, users), group in groups.items():
        key, gpu = group[0].key, setup[SETUP.index("gpu")]
        engine = (stack := STACKS.get(key.get("stack"))) is not None and stack.apart
        if context and (engine or str(key.get("experts")) in OWN_EXPERTS):
            place = (gpu, model, key.get("dtype"), key.get("stack"), context, users or 1)
            places.setdefault(place, []).append(group)
    return places


def _arm(
    context: int, users: int, group: Sequence[Record], rows: Rows, starts: Mapping[str, str]
) -> Arm:
    cell = choice.cell_of(context, users, group)
    failed = cell.error or next((r.error for r in group if r.error), "")
    total = cell.total if cell.per_user.value is not None or not cell.error else _failed(cell.error)
    estimates = {
        DECODE: total,
        TTFT: cell.ttft_s,
        DECODE_J: stats.scaled(cell.token_j, 1e3),
        CALL_J: _call_j(group, users),
    }
    values = any(estimate.value is not None for estimate in estimates.values())
    began = _begun(group, rows, starts)
    return Arm(estimates, began, True if values else False if FULL in failed else None)


def _failed(error: str) -> Estimate:
    return stats.missing(error if error.startswith(gates.WITHHELD) else f"failed: {error}")


def _call_j(group: Sequence[Record], users: int) -> Estimate:
    """Joules for 1,000 tokens of whole calls of CALL_TOKENS tokens: measured, or read off the line
    of the tables through calls of other lengths."""
    kinds = ("energy", "batch-energy")
    mine = [r for r in group if r.kind in kinds]
    calls = [r for r in mine if r.key.get("new_tokens") == CALL_TOKENS]
    first_j, step_j = quantities.split(mine, kinds)
    if calls or None in (first_j.value, step_j.value):
        return replace(METRICS["j_per_1k"].of, kinds=kinds)(calls) if calls else first_j
    value = 1e3 * (first_j.value + (CALL_TOKENS - 1) * step_j.value) / (users * CALL_TOKENS)
    method = f"line through calls of other lengths, at {CALL_TOKENS} tokens"
    return Estimate(value, n=first_j.n, method=method, reason="of a line, no interval")


def _begun(group: Sequence[Record], rows: Rows, starts: Mapping[str, str]) -> datetime:
    return min(_start(one, rows, starts) for row in group for one in (row, *row.others))


def _start(row: Record, rows: Rows, starts: Mapping[str, str]) -> datetime:
    """When a row's run began: as its run or its visit says; of a day alone its midnight (UTC)."""
    env = rows.environment(row)
    texts = (starts.get(row.env_id or "") or "", visit_of(env).rpartition(", ")[2])
    for text in sorted(texts, key=len, reverse=True):
        try:
            return instant(text)
        except ValueError:
            continue
    return datetime.min.replace(tzinfo=UTC)


def _one(several: Sequence[Arm]) -> Arm:
    """The arm of a place; of several setups what each says is not one number."""
    if len(several) == 1:
        return several[0]
    why = stats.missing(f"measured in {len(several)} setups, whose rows do not go together")
    estimates = {
        name: mine[0] if len(mine) == 1 else why if mine else several[0].estimates[name]
        for name in (DECODE, TTFT, DECODE_J, CALL_J)
        for mine in [[a.estimates[name] for a in several if a.estimates[name].value is not None]]
    }
    held = next((a.held for a in several if a.held is not None), None)
    return Arm(estimates, min(a.start for a in several), held)


# --- lines: one for each registered number


def score(
    registered: Mapping[str, Any],
    arms: Mapping[Place, Arm],
    *,
    at: datetime,
    first: Sequence[Mapping[str, Any]] = (),
    learned: str = "",
) -> list[dict[str, Any]]:
    """A line for each registered number, as JSON data: what was predicted, what was measured, the
    error (predicted / measured - 1) and whether the interval covers it.

    `outside` says why a measured cell does not count; `missing` why it has no error; `learned` is
    what the card that the model learned from, named so, does at the place of a cell of another
    card. `at` is the instant of the registration, `first` are places that were measured before
    without a row.
    """
    lines = []
    for cell in registered["cells"]:
        place = tuple(cell[name] for name in PLACE)
        line = _line(cell, arms.get(place), at, first)
        there = arms.get((learned, *place[1:])) if place[0] != learned else None
        if there and counts(line) and (value := there.estimates[cell["metric"]].value):
            line["learned"] = _digits(value, 5)
        lines.append(line)
    return lines


def _line(
    cell: Mapping[str, Any], arm: Arm | None, at: datetime, first: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    line = {name: cell[name] for name in ("set", *PLACE, "metric", "unit", "holds")}
    estimate = arm.estimates[cell["metric"]] if arm else stats.missing("not measured")
    line |= {"held": arm.held if arm else None, "predicted": cell.get("value"), "measured": None}
    if estimate.value is None:
        shared = arm and cell["metric"] == TTFT and STACKS[cell["stack"]].captured
        return line | {"missing": SHARED if shared else estimate.reason or "not measured"}
    line |= {name: cell[name] for name in ("low", "high", "half_width", "bound") if name in cell}
    line["beyond"] = bool(cell.get("notes"))  # the registration flagged an extrapolation
    line |= {"n": estimate.n, "method": estimate.method, "level": estimate.level}
    ends = {"measured": "value", "measured_low": "low", "measured_high": "high"}
    line |= {name: _digits(getattr(estimate, end), 5) for name, end in ends.items()}
    if why := _before(cell, arm, at, first):
        line["outside"] = why
    if line["predicted"] is None:
        return line | {"missing": f"not predicted: {cell['missing']}"}
    return line | {
        "error": _digits(line["predicted"] / line["measured"] - 1),
        "covered": line["low"] <= line["measured"] <= line["high"],
    }


def _digits(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def _before(
    cell: Mapping[str, Any], arm: Arm, at: datetime, first: Sequence[Mapping[str, Any]]
) -> str:
    """Why a cell counts as measured before the registration; empty where it does not."""
    for place in first:
        if all(cell[name] == place[name] for name in PLACE if name in place):
            return f"measured first: {place['reason']}"
    if arm.start >= at:
        return ""
    if arm.start.year == 1:
        return "measured first, as far as is known: its rows tell no time"
    return f"measured first: its rows started at {arm.start:%Y-%m-%d %H:%M}"


def counts(line: Mapping[str, Any]) -> bool:
    """Whether a line enters the coverage."""
    return "error" in line and "outside" not in line


# --- what the lines say together


def figures(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the lines that count: how many, how many are covered, and medians (None without any)."""
    mine = [line for line in lines if counts(line)]

    def median(values: Iterable[float]) -> float | None:
        values = list(values)
        return _digits(statistics.median(values)) if values else None

    covered = sum(line["covered"] for line in mine)
    return {
        "cells": len(mine),
        "covered": covered,
        "coverage": _digits(covered / len(mine)) if mine else None,
        "median_half_width": median(line["half_width"] for line in mine),
        "median_error": median(abs(line["error"]) for line in mine),
        "median_signed_error": median(line["error"] for line in mine),
        "median_decode_error": median(abs(x["error"]) for x in mine if x["metric"] == DECODE),
    }


def by(lines: Sequence[Mapping[str, Any]], *names: str) -> dict[tuple, dict[str, Any]]:
    """The figures of each group of lines that count, in the order of the lines."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in filter(counts, lines):
        groups.setdefault(tuple(line.get(name) for name in names), []).append(line)
    return {group: figures(mine) for group, mine in groups.items()}


def summary(lines: Sequence[Mapping[str, Any]], registered: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of all cells, of hf-eager apart, by model, context, stack and metric, against
    the target; what was measured first, what was not measured, and what the card held."""
    width, target = registered["summary"]["all"]["median_half_width"], registered["target"]
    apart = {
        "all": lines,
        "without hf-eager": [x for x in lines if x["stack"] != STUDY_STACK],
        "hf-eager": [x for x in lines if x["stack"] == STUDY_STACK],
    }
    places = by(lines, *APART)
    shares = [one["coverage"] for one in places.values()]
    return {
        **{name: figures(mine) for name, mine in apart.items()},
        "mean_coverage_of_models_and_contexts": (
            _digits(statistics.fmean(shares)) if shares else None
        ),
        "target": [
            {"of": "registered", **_verdict("median half-width", width, target)},
            *(
                {"of": name, **verdict}
                for name, mine in apart.items()
                for verdict in _against(mine, target)
            ),
        ],
        **{
            f"by {' and '.join(names)}": [
                {**dict(zip(names, group, strict=True)), **one}
                for group, one in by(lines, *names).items()
            ]
            for names in (APART, ("set",), ("stack",), ("metric",))
        },
        "not_known": not_known(lines),
        "gains": gains(lines),
        "measured_first": sum("outside" in line for line in lines),
        "not_measured": sum(line["measured"] is None for line in lines),
        "memory": _memory(lines),
    }


def _against(lines: Sequence[Mapping[str, Any]], target: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three numbers that were fixed at registration; `met` is None where nothing counts."""
    one = figures(lines)
    return [_verdict(what, one[name], target) for what, (name, *_) in TARGETS.items()]


def _verdict(what: str, value: float | None, target: Mapping[str, Any]) -> dict[str, Any]:
    _, limit, more = TARGETS[what]
    wanted = target[limit]
    met = None if value is None else value >= wanted if more else value <= wanted
    return {"what": what, "value": value, "target": wanted, "met": met}


def not_known(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the model was wrong: its figures by metric, stack, what it said the cell waits for, and
    whether it lay beyond the rows that it learned from; the largest error first."""
    names = ("metric", "stack", "bound", "beyond")
    groups = [
        {**dict(zip(names, group, strict=True)), **one} for group, one in by(lines, *names).items()
    ]
    return sorted(groups, key=lambda one: -one["median_error"])


def gains(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What cells of another card were said to be, over what was measured on the card that the model
    learned from, and what they are: medians by metric, stack, model and what the cell waits for."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    names = ("gpu", "metric", "stack", "model", "bound")
    for line in (one for one in lines if "learned" in one):
        groups.setdefault(tuple(line[name] for name in names), []).append(line)
    return [
        {
            **dict(zip(names, group, strict=True)),
            "cells": len(mine),
            **{
                name: _digits(statistics.median(one[name] / one["learned"] for one in mine))
                for name in ("predicted", "measured")
            },
        }
        for group, mine in groups.items()
    ]


def _memory(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was said to hold, and what did: cells of each pair."""
    places = {tuple(x[n] for n in PLACE): x for x in lines if x["held"] is not None}
    pairs: dict[tuple[str, bool], int] = {}
    for line in places.values():
        pair = (line["holds"], line["held"])
        pairs[pair] = pairs.get(pair, 0) + 1
    return [{"said": said, "held": held, "cells": n} for (said, held), n in pairs.items()]


# --- files


@dataclass(frozen=True)
class Question:
    """How a registered file is scored: its path, when it was registered and by which commit, the
    places that were measured first without a row, and the card that the model learned from."""

    file: Path
    at: datetime
    commit: str
    first: tuple[Mapping[str, Any], ...]
    learned: str


def question(root: Path = ROOT) -> Question:
    """The newest registered file, with its entry in params/predictions."""
    if (file := registry.newest(root)) is None:
        raise ParamsError(
            f"{registry.FOLDER} holds no registered predictions; take them from the history: "
            f"git checkout -- {registry.FOLDER}"
        )
    data = read_yaml(root / registry.QUESTIONS / f"{file.stem}-scored.yaml")
    for place in data["measured_first"]:
        if odd := sorted(place.keys() - {*PLACE, "reason"}):
            raise ParamsError(f"measured_first of {file.stem} has {odd[0]!r}; known: {PLACE}")
    at = datetime.fromisoformat(data["registered"])
    learned = read_yaml(root / registry.QUESTIONS / f"{file.stem}.yaml")["gpu"]
    return Question(file, at, data["commit"], tuple(data["measured_first"]), learned)


def lines_of(rows: Sequence[Record], entries: Iterable[jobs.Job] = ()) -> list[dict[str, Any]]:
    """The newest registered predictions against rows; `entries` are the jobs that they are of."""
    return _lines(measured(rows, _starts(entries)))


def _starts(entries: Iterable[jobs.Job]) -> dict[str, str]:
    """When the run of each environment began."""
    return {
        row.env_id: str(job.run_of(row.env_id).get("start") or "")
        for job in entries
        for row in job.records
        if row.env_id
    }


def _lines(arms: Mapping[Place, Arm]) -> list[dict[str, Any]]:
    asked = question()
    data = registry.sealed(asked.file)
    return score(data, arms, at=asked.at, first=asked.first, learned=asked.learned)


def together(sets: Iterable[Mapping[Place, Arm]]) -> dict[Place, Arm]:
    """The arms of several result sets; one of several is the median over them, as of visits."""
    places: dict[Place, list[Arm]] = {}
    for arms in sets:
        for place, arm in arms.items():
            places.setdefault(place, []).append(arm)
    return {place: _over_sets(several) for place, several in places.items()}


def _over_sets(several: Sequence[Arm]) -> Arm:
    estimates = {}
    for name, first in several[0].estimates.items():
        mine = [e for a in several if (e := a.estimates[name]).value is not None]
        over = stats.over_visits([e.value for e in mine]) if len(mine) > 1 else None
        estimates[name] = over or (mine[0] if mine else first)
    held = [arm.held for arm in several if arm.held is not None]
    return Arm(estimates, min(a.start for a in several), any(held) if held else None)


def released() -> list[Path]:
    """Folders of the released sets."""
    return sorted(p for p in RELEASED.glob("*") if next(p.rglob("run.json"), None))


def build(folders: Sequence[Path], root: Path = ROOT) -> dict[str, Any]:
    """All that the scored page says, as JSON data."""
    asked = question(root)
    entries = {folder: jobs.find(folder) for folder in folders}
    lines = _lines(
        together(measured(load(folder), _starts(several)) for folder, several in entries.items())
    )
    data = registry.sealed(asked.file)
    return {
        "schema": 1,
        "registered": {
            "file": asked.file.name,
            "sha256": files.file_sha(asked.file),
            "at": asked.at.isoformat(),
            "commit": asked.commit,
        },
        "level": data["level"],
        "sets": [
            {"folder": files.short(folder), "rows": sum(len(job.records) for job in several)}
            for folder, several in entries.items()
        ],
        "summary": summary(lines, data),
        "cells": lines,
    }
