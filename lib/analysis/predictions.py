"""What `make fit` predicts from the model card alone, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib import stats
from lib.analysis import bounds
from lib.analysis.setups import build, grouped
from lib.files import ROOT
from lib.models.card import ModelCard, bound_tok_per_s
from lib.records.record import Record, select
from lib.records.store import load_tree
from lib.show.table import Column, Table
from lib.show.wording import short
from lib.stats import Estimate

RELEASED = ROOT / "outputs" / "released"
KINDS = ("memory", "latency")
COLUMNS = (
    Column("weights, predicted", "GB"), Column("weights, measured", "GB"),
    Column("cache, predicted", "MB"), Column("cache, measured", "MB"),
    Column("decode limit, predicted", "tok/s"), Column("decode, measured", "tok/s"),
)  # fmt: skip
NOTES = (
    "weights: bytes of all parameters, beside what the allocator holds before a call",
    "cache: the tokens of a call of generate(), each sliding layer full to its window",
    "decode limit: datasheet bandwidth (without one, the best measured) / bytes that a step must "
    "read; a limit, not a forecast",
)


def table(rows: Sequence[Record]) -> Table:
    """Per model, setup and context: weights, cache and decode limit, predicted and measured.

    The memory row is that of `generate()` with the most new tokens.
    """
    cards = {
        (r.key.get("model"), r.key.get("dtype")): ModelCard.from_dict(r.values)
        for r in rows
        if r.kind == "card" and "kv_layers" in r.values
    }
    arms = {(a.model, a.setup, a.context): a for a in bounds.arms(rows) if a.batch == 1}
    groups = grouped([r for r in rows if not r.error], KINDS, ("context",))
    by_group = {
        id(group[0]): (setup, group)
        for (_, setup, _), group in groups.items()
        if (group[0].key["model"], group[0].key.get("dtype")) in cards
    }
    covered = [r for _, group in by_group.values() for r in group]

    def cells(group: list[Record]) -> Sequence[Any]:
        key, setup = group[0].key, by_group[id(group[0])][0]
        card = cards[key["model"], key.get("dtype")]
        memory = [r for r in group if r.kind == "memory"]
        held = max(memory, key=lambda r: r.key["new_tokens"]) if memory else None
        arm = arms.get((key["model"], setup, key["context"]))
        return (*_weights(card, held), *_cache(card, held), *_decode(card, key["context"], arm))

    envs = [r for r in rows if r.kind == "environment"]
    grid = build(
        "predictions",
        "Predicted from the model card, and measured",
        [*envs, *covered],
        KINDS,
        ("context",),
        COLUMNS,
        cells,
    )
    return replace(grid, notes=(*grid.notes, *NOTES) if grid.rows else ())


def _weights(card: ModelCard, held: Record | None) -> tuple[Estimate, Estimate]:
    if held is not None and held.value("memory_source") == "torch CPU allocator":
        measured = stats.missing("on a CPU the baseline is the card's own count")
    else:
        measured = _reading(held, "baseline_bytes", 1e9)
    return _predicted(card.weight_bytes / 1e9), measured


def _cache(card: ModelCard, held: Record | None) -> tuple[Estimate, Estimate]:
    if card.kv_layers is None:
        return stats.missing(f"unknown: {card.kv_reason}"), _reading(held, "kv_tensor_bytes", 1e6)
    if held is None:
        return stats.missing("no memory row tells how many tokens"), _reading(None, "", 1)
    tokens = held.key["context"] + held.key["new_tokens"] - 1  # the last one is never cached
    return (
        _predicted(card.kv_bytes(tokens, cache="static") / 1e6),
        _reading(held, "kv_tensor_bytes", 1e6),
    )


def _decode(card: ModelCard, context: int, arm: bounds.Arm | None) -> tuple[Estimate, Estimate]:
    if arm is None or card.kv_layers is None:
        why = stats.missing("not measured: no latency row with the bytes of a step")
        return why, why
    rate = arm.limits.sheet.memory_bytes_per_s or arm.limits.read_bytes_per_s
    bound = (
        stats.missing("no bandwidth is known")
        if rate is None
        else _predicted(bound_tok_per_s(card.decode_bytes(context), rate))
    )
    return bound, arm.steps_per_s


def _predicted(value: float) -> Estimate:
    return Estimate(value, n=1, method="counted on the model card", reason="no measurement")


def _reading(row: Record | None, name: str, scale: float) -> Estimate:
    value = row.value(name) if row else None
    if value is None:
        return stats.missing("not measured: no memory row of generate()")
    return stats.exact(value / scale)


def released_lines(model: str, folder: str | Path = RELEASED) -> list[str]:
    """For `make fit`: a line for each released set and setup that measured the model.

    The line is of the longest context there.
    """
    lines = []
    for root in sorted(p for p in Path(folder).glob("*") if p.is_dir()):
        rows = [r for r in load_tree(root) if r.key.get("model") in (model, None)]
        grid = table(rows)
        last = {row[1 : -len(COLUMNS) - 1]: row for row in grid.rows}  # contexts are in order
        for setup, row in last.items():
            start = "all rows: "
            shared = [n.removeprefix(start) for n in grid.notes if n.startswith(start)]
            where = ", ".join([*map(str, setup), *shared, f"{row[-len(COLUMNS) - 1]:,} tokens"])
            cells = row[-len(COLUMNS) :]
            pairs = zip(("weights", "cache", "decode"), cells[::2], cells[1::2], strict=True)
            parts = [
                f"{what} {short(cell.value)} {column.unit} ("
                + ("a limit of " if what == "decode" else "predicted ")
                + f"{short(guess.value)})"
                for (what, guess, cell), column in zip(pairs, COLUMNS[1::2], strict=True)
                if cell.value is not None
            ]
            if parts:
                about = f"measured in the released set {root.name} ({where})"
                lines.append(f"{about}: {', '.join(parts)}")
        lines += [f"measured in the released set {root.name}: {text}" for text in batches(rows)]
    return lines


def batches(rows: Sequence[Record]) -> list[str]:
    """How many sequences ran together on each stack and context, and how many first failed."""
    arms: dict[tuple, list[Record]] = {}
    for row in select(rows, "batch"):
        place = tuple(str(row.key.get(name)) for name in ("dtype", "stack", "experts"))
        arms.setdefault((*place, row.key["context"]), []).append(row)
    lines = []
    for (dtype, stack, _, context), arm in arms.items():
        ran = [r for r in arm if not r.error]
        failed = [r for r in arm if r.error]
        parts = []
        if ran:
            most = max(ran, key=lambda r: (r.key["batch"], r.key["new_tokens"]))
            parts.append(f"{most.key['batch']} with {most.key['new_tokens']} new ones ran")
        if failed:
            first = min(failed, key=lambda r: r.key["batch"])
            parts.append(f"{first.key['batch']} failed ({first.error.split('. ')[0]})")
        lines.append(f"sequences of {context:,} tokens on {stack}, {dtype}: {', '.join(parts)}")
    return lines
