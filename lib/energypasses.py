"""A second pass over the models, the last one first: does the energy of a call repeat?

Blocks of one pass share the card, its temperature and the model's place in the queue; a second pass
shares none of these. What it finds over what the first found is the reproducibility of the whole
measurement, which the spread of blocks cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lib import stats
from lib.records.record import Record, environments, record_id, select
from lib.show.table import Column, Table, build, sampled
from lib.stats import Estimate

AGAIN = "energy-again"  # kind of the rows of the second pass
PASSES = ("energy", AGAIN)


def per_1k(rows: Sequence[Record], kind: str) -> Estimate:
    """Joules per 1,000 generated tokens in one pass: mean over blocks."""
    found = select(rows, kind)
    if not found:
        return stats.missing(f"not measured: no {'second' if kind == AGAIN else 'first'} pass")
    row = found[-1]
    if not row.samples.get("energy_j"):
        return stats.missing(sampled([row], "energy_j").reason)
    scale = 1e3 / row.key["new_tokens"]
    mean = stats.mean([joules * scale for joules in row.samples["energy_j"]])
    return replace(mean, records=(record_id(row),))


def compared(rows: Sequence[Record]) -> tuple[Estimate, Estimate, Estimate]:
    """The first pass, the second, and the second over the first, of the rows of one cell."""
    first, second = (per_1k(rows, kind) for kind in PASSES)
    return first, second, stats.quotient(second, first)


def boards(rows: Sequence[Record], envs: dict[str, dict[str, Any]]) -> str:
    """Whether both passes of one cell were on the same GPU, as far as its number is known."""
    found = [select(rows, kind) for kind in PASSES]
    if not all(found):
        return ""
    numbers = [envs.get(of[-1].env_id or "", {}).get("gpu_uuid") for of in found]
    if None in numbers:
        return "unknown"
    return "the same" if numbers[0] == numbers[1] else "another"


def table(rows: Sequence[Record]) -> Table:
    """Each cell of the second pass beside the first; no rows where there was no second."""
    columns = [
        Column("J/1K tokens, first pass", "J"),
        Column("J/1K tokens, second pass", "J"),
        Column("second / first"),
        Column("board", numeric=False),
    ]
    envs = environments(rows)
    return build(
        "energy-passes",
        "Energy, two passes",
        rows,
        PASSES,
        ("context", "new_tokens"),
        columns,
        lambda group: (*compared(group), boards(group, envs)),
        having=AGAIN,
    )
