"""Which times stand: those of a stack whose check of logits could have failed.

A row of a check says how far a stack's logits were from those of `generate()`. What it allowed at
the time does not matter, what it found does: rows from before tolerances were small are read by
today's limit. Where none of a place's checks shows enough, its times are withheld with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from lib.records.kinds import ABLATIONS
from lib.records.record import Record, of_visits
from lib.stacks.registry import STACKS
from lib.stacks.stack import MOST_ERROR, MOST_ERROR_DENSE, MOST_ERROR_FP8

PLACE = (
    "model",
    "weights",
    "dtype",
    "experts",
    "attention",
    "stack",
    "context",
    "batch",
    "devices",
)
TIMED = (
    "latency", "itl", "aa", "busy", "harness", "batch", "batch-energy", "energy", "energy-slope",
    "energy-again", "energy-weights", *(f"ablation-{name}" for name in ABLATIONS),
)  # fmt: skip
OF_TIMES = ("_s", "_j", "_w")  # how the names of values end that a timed call gave
WITHHELD = "times withheld"
WITHIN = "gate_"  # before the values of a check that stand in a timed row


def withheld(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records; those without a check that shows enough have an error in place of times.

    Of several visits each is judged by its own checks, or by all where it has none.
    """
    records = tuple(records)
    reasons: dict[tuple, dict[str, list[str]]] = {}
    for check in (one for row in records if row.kind == "gate" for one in (row, *row.others)):
        if not check.error:
            errors = check.samples.get("relative_error") or ()
            of_place = reasons.setdefault(_place(check), {})
            told = of_place.setdefault(check.visit, [])
            told.append(doubt(check.key, check.values, errors))
    return tuple(_of_sound_visits(row, reasons) for row in records)


def in_part(records: Iterable[Record]) -> list[str]:
    """For each model of whose first layers alone the logits were compared, how many these were."""
    checks = (
        (row.key["model"], row.value("first_layers")) for row in records if row.kind == "gate"
    )
    parts = sorted({(model, layers) for model, layers in checks if layers})
    return [f"{m}: the logits of its first {n} layers alone were compared" for m, n in parts]


def _of_sound_visits(row: Record, reasons: Mapping[tuple, Mapping[str, Sequence[str]]]) -> Record:
    """A row with those of its visits whose times stand; the last of them leads."""
    whys = [_doubt_of(one, reasons) for one in (*row.others, row)]
    if not any(whys):
        return row
    sound = [one for one, why in zip((*row.others, row), whys, strict=True) if not why]
    if not sound:
        return _without_times(row, whys[-1])
    return of_visits(sound)


def waiting(records: Iterable[Record]) -> list[str]:
    """Models whose times of several sequences at once are withheld."""
    names = [
        row.key["model"] for row in records if is_withheld(row) and (row.key.get("batch") or 1) > 1
    ]
    return list(dict.fromkeys(names))


def is_withheld(row: Record) -> bool:
    """Whether the times of a row were withheld; it did not fail."""
    return (row.error or "").startswith(WITHHELD)


def _place(row: Record) -> tuple:
    return tuple(row.key.get(name) for name in PLACE)


def _doubt_of(row: Record, reasons: Mapping[tuple, Mapping[str, Sequence[str]]]) -> str:
    """Why the times of a row do not stand; one check that shows enough is enough."""
    if row.kind not in TIMED or row.error:
        return ""
    own = {n.removeprefix(WITHIN): v for n, v in row.values.items() if n.startswith(WITHIN)}
    of_place = reasons.get(_place(row), {})
    told = of_place.get(row.visit) or [why for whys in of_place.values() for why in whys] or [""]
    told = [doubt(row.key, own)] if own else told
    return "" if "" in told else told[-1]


def doubt(key: Mapping[str, Any], values: Mapping[str, Any], errors: Sequence[float] = ()) -> str:
    """Why a check does not show that a stack computes what `generate()` does; empty if it does."""
    mean = fmean(errors) if errors else values.get("mean_error")
    if mean is None:
        return f"{WITHHELD}: the check of its logits holds no error; measure it again"
    mixture = key.get("experts") not in (None, "none")
    most = MOST_ERROR if mixture else MOST_ERROR_DENSE
    if key.get("dtype") == "fp8" and not mixture and values.get("layers_at_once"):
        most = MOST_ERROR_FP8
    if not mean <= most:
        return (
            f"{WITHHELD}: its logits differ by {mean:.1%} of their norm from those of "
            f"generate(), and above {most:.0%} {'turned experts' if mixture else 'rounding'} "
            "cannot be told from a fault; measure it again"
        )
    stack = STACKS.get(key.get("stack"))
    ours = stack and not stack.apart  # an engine's experts are not of this project's making
    one_set = ours and values.get("pinned_experts") and values.get("pinned_sets", 1) < 2
    free = values.get("free_mean_error")
    if mixture and (key.get("batch") or 1) > 1 and one_set and not (free or 1) <= MOST_ERROR:
        return (
            f"{WITHHELD}: all sequences were pinned to the same experts, so that the experts of "
            "one given to all would not have shown; measure it again"
        )
    return ""


def _without_times(row: Record, why: str) -> Record:
    values = {name: v for name, v in row.values.items() if not name.endswith(OF_TIMES)}
    return replace(row, samples={}, values=values, error=why, others=())
