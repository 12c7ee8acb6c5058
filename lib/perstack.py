"""Which stack statements are about, and the rows of each model on a stack.

Statements are about the study's stack wherever anything was measured on it; what others change is
said beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lib.analysis import series as rules
from lib.analysis.setups import ORDER
from lib.records.record import Record, environments

Base = dict[str, rules.Series]  # of each model, by its title

STATED = ("latency", "memory-paper", "energy")  # kinds of rows that a statement may be about


def study_stack(records: Sequence[Record], published: dict[str, Any], paper: bool) -> str:
    """The study's stack; without its models (`paper`) and without a row on it, the commonest."""
    counts = Counter(
        str(r.key.get("stack"))
        for r in records
        if r.kind in STATED and r.key.get("model") and not r.error
    )
    if paper or not counts or published["stack"] in counts:
        return published["stack"]
    return counts.most_common(1)[0][0]


def others(records: Sequence[Record], stack: str) -> list[str]:
    """The further stacks on which calls were timed, or failed."""
    known = ORDER["stack"]
    found = {str(r.key.get("stack")) for r in records if r.kind == "latency"} - {stack}
    return sorted(found, key=lambda s: (known.index(s) if s in known else len(known), s))


def on_stack(records: Sequence[Record], published: dict[str, Any], paper: bool, stack: str) -> Base:
    """The rows of each model on a stack, those that failed included; models without any left out.

    With `paper`, the study's models under its titles and in its number format; otherwise every
    model in the format in which it has most rows.
    """
    envs = environments(records)
    base = {}
    for title, rows in _by_title(records, published, paper).items():
        dtypes = Counter(
            str(r.key.get("dtype"))
            for r in rows
            if r.kind in STATED and r.key.get("stack") == stack
        )
        if not dtypes:
            continue
        commonest = max(dtypes.items(), key=lambda item: (item[1], item[0]))[0]
        wanted = {"dtype": published["dtype"] if paper else commonest, "stack": stack}
        series = rules.configuration(rows, envs, wanted, rules.BASE_KINDS)
        if series.rows:
            base[title] = series
    return base


def _by_title(
    records: Sequence[Record], published: dict[str, Any], paper: bool
) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {title: [] for title in published["models"]} if paper else {}
    for row in records:
        name = row.key.get("model")
        title = rules.paper_name(name, published) if paper else name
        if title:
            found.setdefault(title, []).append(row)
    return found if paper else dict(sorted(found.items()))
