"""What an arm waits for, by its rows: bandwidth, compute, kernels or the host; and how far two sets
differ in that.

A step whose device works 70 % of the time or less by the profiler waits for the host. One that
waits for the device is put down to the larger of its floors, bytes / bandwidth and operations /
peak of the datasheet, where that makes a third of its time; else to its kernels. Without a profile
the host is excluded where a floor alone makes more than 70 %, or where the step was captured; of a
captured one a profile says host from 70 % down alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import stats
from lib.analysis import bounds, host_bound
from lib.analysis.estimators import decode_share, prefill_share
from lib.analysis.machine import Limits, limits
from lib.analysis.metrics import Metric
from lib.analysis.rows import SETUP, Rows
from lib.records.record import Record, select
from lib.stacks.registry import STACKS
from lib.stats import Estimate

BANDWIDTH, COMPUTE, KERNELS, HOST = "bandwidth", "compute", "kernels", "host"
UNTOLD = "not told: no profiled call"
LEAST = 1 / 3  # of the time, for a floor to be the cause
HOST_LIMIT = 0.1  # a host faster by more than this share changes every number that it limits
STEADY = 1.25  # how far the speeds of a set's hosts may lie apart to explain a ratio
STEP, FIRST, CALL = "step", "first token", "call"
PARTS = {"decode": STEP, "itl": STEP, "ttft": FIRST, "p50": CALL, "call_j": CALL}
FIXED = {  # whatever the arm
    "read_rate": BANDWIDTH, "copy_rate": BANDWIDTH, "matvec_rate": BANDWIDTH,
    "matmul_rate": COMPUTE, "launch": HOST, "host_score": HOST,
}  # fmt: skip
DEVICE = {"decode_busy": STEP, "prefill_busy": FIRST}  # times of the device alone
NOT_OF_CARD = "not the card"  # tensors and launches are the model's and the library's
PLACE = ("model", "weights", "dtype", "stack", "experts", "devices", "context", "batch")
Place = tuple[Any, ...]


@dataclass(frozen=True)
class Cause:
    """What a ratio is put down to, and the B / A that it would have if only that differed."""

    text: str
    expected: Estimate


class Waits:
    """What each arm of one result set waits for."""

    def __init__(self, rows: Sequence[Record]) -> None:
        rows = Rows.of(rows)
        self.rows = rows
        self.arms = {
            _place({**dict(zip(SETUP, a.setup, strict=True)), **vars(a)}): a
            for kind in reversed(bounds.KINDS)  # calls of one sequence last: they win
            for a in bounds.arms(rows, kind)
        }
        self.profiles: dict[Place, dict[int, Sequence[Record]]] = {}
        for (model, *setup, context), group in host_bound.arms(rows).items():
            place = _place({"model": model, **dict(zip(SETUP, setup, strict=True))})
            self.profiles.setdefault(place[:-2], {})[context] = group
        self.active = {r.key["model"]: r.value("active_params") for r in select(rows, "card")}
        self.limits: list[Limits] = list(limits(rows).values())
        self.scores: dict[Place, list[float]] = {}
        for row in rows:
            if score := rows.environment(row).get("host_score_per_s"):
                self.scores.setdefault(_place(row.key), []).append(score)
        self.every_score = sorted(x for own in self.scores.values() for x in own)

    def step(self, place: Place, *, device: bool = False) -> str:
        """What a decode step waits for; with `device` of its device time alone."""
        *setup, context, batch = place
        near = self.profiles.get(tuple(setup), {})
        group = near.get(min(near, key=lambda c: abs(c - context))) if near and batch == 1 else ()
        word = "" if device or not group else host_bound.verdict(decode_share(group))
        arm, active = self.arms.get(place), self.active.get(place[0])
        operations = 2.0 * active * batch if active else None
        wall_s = _inverse(arm.steps_per_s) if arm else None
        time_s = _busy_s(near.get(context, ()), "decode_busy_s") if device else wall_s
        stack = STACKS.get(setup[3])
        captured = stack is not None and stack.captured
        if captured and word != "host-bound":
            word = ""  # what is idle for less lies between its kernels: the host launches none
        sure = device or captured
        return self._told(word, arm, arm and arm.step_bytes, operations, time_s, sure)

    def first(self, place: Place, *, device: bool = False) -> str:
        """What the first token waits for: a prefill of its own context."""
        *setup, context, batch = place
        group = self.profiles.get(tuple(setup), {}).get(context, ()) if batch == 1 else ()
        word = "" if device or not group else host_bound.verdict(prefill_share(group))
        arm = self.arms.get(place)
        wall_s = arm.ttft_s.value if arm else None
        time_s = _busy_s(group, "prefill_busy_s") if device else wall_s
        return self._told(
            word, arm, arm and arm.step_bytes, arm and arm.prefill_flop, time_s, device
        )

    def call(self, place: Place, new_tokens: int | None) -> str:
        """What a whole call waits for: what its longer part does, the first token or the steps."""
        arm = self.arms.get(place)
        step_s = _inverse(arm.steps_per_s) if arm else None
        first_s = arm.ttft_s.value if arm else None
        if first_s and step_s and first_s > ((new_tokens or 1) - 1) * step_s:
            return self.first(place)
        return self.step(place)

    def _told(
        self,
        word: str,
        arm: bounds.Arm | None,
        size: float | None,
        operations: float | None,
        time_s: float | None,
        sure: bool,
    ) -> str:
        if word.startswith("host-bound"):
            return HOST
        if word.startswith("mixed") or word.endswith("not resolved"):
            return "host and device"
        sheet = arm.limits.sheet if arm else None
        rate = sheet and (sheet.memory_bytes_per_s or arm.limits.read_bytes_per_s)
        peak = sheet and (sheet.bf16_flop_per_s or arm.limits.matmul_flop_per_s)
        floors = {
            BANDWIDTH: size / rate if size and rate else 0.0,
            COMPUTE: operations / peak if operations and peak else 0.0,
        }
        name = max(floors, key=floors.get)
        share = floors[name] / time_s if time_s else 0.0
        sure = sure or word.startswith("device-bound") or share > host_bound.HOST_BOUND
        return (name if share >= LEAST else KERNELS) if time_s and sure else UNTOLD

    @property
    def host_moved(self) -> bool:
        """Whether one thread of the hosts was clearly faster for some rows than for others."""
        return bool(self.every_score) and self.every_score[-1] > STEADY * self.every_score[0]

    def has(self, cause: str, place: Place) -> float | None:
        """How much of a cause this set has: bytes/s, operations/s, or loops/s of one thread."""
        if cause == HOST:
            scores = self.scores.get(place) or self.every_score
            return statistics.median(scores) if scores else None
        names = {
            BANDWIDTH: ("memory_bytes_per_s", "read_bytes_per_s"),
            COMPUTE: ("bf16_flop_per_s", "matmul_flop_per_s"),
        }
        stated, best = names[cause]
        limits = [self.arms[place].limits] if place in self.arms else self.limits
        sheets = [getattr(x.sheet, stated) for x in limits]
        rates = [getattr(x, best) for x in limits]
        return next((x for x in (*sheets, *rates) if x), None)


def _place(key: Mapping[str, Any]) -> Place:
    """The place of a key, without which of several engines it was."""
    model, *words, devices, context, batch = (key.get(name) for name in PLACE)
    weights, dtype, stack, experts = map(str, words)
    engine = stack.partition(" ")[0]
    return (model, weights, dtype, engine, experts, devices or 1, context, batch or 1)


def _busy_s(group: Sequence[Record], name: str) -> float | None:
    return next((value for row in select(group, "busy") if (value := row.value(name))), None)


def _inverse(per_s: Estimate) -> float | None:
    return 1 / per_s.value if per_s.value else None


def cause(metric: Metric, key: Mapping[str, Any], a: Waits, b: Waits) -> Cause:
    """What the ratio of a metric of one arm is put down to, from the rows of both sets."""
    place = _place(key)
    ours, theirs = (_of(metric, key, place, side) for side in (a, b))
    if not ours:
        return Cause(NOT_OF_CARD, stats.missing("not the card's"))
    if ours != theirs:
        return Cause(f"{ours} in A, {theirs} in B", stats.missing("it changes from A to B"))
    if ours not in (BANDWIDTH, COMPUTE, HOST):
        return Cause(ours, stats.missing(f"no value of a card or host tells it ({ours})"))
    if PARTS.get(metric.name) == CALL and metric.unit == "J":
        return Cause(ours, stats.missing("a faster card draws another power: no ratio of joules"))
    has = [side.has(ours, place) for side in (a, b)]
    if None in has:
        return Cause(ours, stats.missing(f"the {ours} of {'AB'[has.index(None)]} is not known"))
    moved = [f"of {x}" for x, side in zip("AB", (a, b), strict=True) if side.host_moved]
    if ours == HOST and moved:
        why = f"the speed of the hosts {' and '.join(moved)} moved between rows"
        return Cause(ours, stats.missing(f"{why}: it explains no ratio"))
    more = has[1] / has[0]
    rate = metric.higher_is_better
    method = "one thread of the hosts" if ours == HOST else "datasheets"
    return Cause(ours, stats.exact(more if rate else 1 / more, method))


def _of(metric: Metric, key: Mapping[str, Any], place: Place, side: Waits) -> str:
    if metric.name in FIXED:
        return FIXED[metric.name]
    if part := DEVICE.get(metric.name):
        return (side.step if part == STEP else side.first)(place, device=True)
    part = PARTS.get(metric.name)
    if part == CALL:
        return side.call(place, key.get("new_tokens"))
    return {STEP: side.step, FIRST: side.first}[part](place) if part else ""
