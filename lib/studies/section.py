"""The report's part on a published study: claims ledger, governance and the study's own pieces."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.records.record import Record
from lib.show.table import Table
from lib.show.wording import Statement, listed
from lib.studies import claims, governance
from lib.studies.paper_tables import PaperTable
from lib.studies.study import Published, load, paper_name


@dataclass(frozen=True)
class Part:
    """Each piece for the page, the files that were written, and sentences for the abstract.

    `verdicts` say in words how many claims got which; `own` are the pieces of the study's own
    rules, by name: tables and figures.
    """

    ledger: Table
    verdicts: str
    governance: Table | None
    files: list[Path]
    findings: list[Statement]
    own: dict[str, Any]


def part(records: Sequence[Record], study: Published, out_dir: str | Path) -> Part | None:
    """Everything of the study beside the rows; None where none of its models was measured."""
    mine = [
        r for r in records if r.kind == "environment" or paper_name(r.key.get("model"), study.data)
    ]
    entries = claims.ledger(mine, study)
    if not entries:
        return None
    own_part = getattr(study.rules, "part", None)
    own, grids, findings = own_part(mine, study) if own_part else ({}, [], [])
    stated = "governance" in study.data
    return Part(
        ledger=claims.table(entries),
        verdicts=claims.verdicts(entries),
        governance=governance.table(study) if stated else None,
        files=[
            *claims.write_csv(entries, out_dir),
            *([governance.write_csv(study, out_dir)] if stated else []),
            *(grid.write_csv(out_dir) for grid in grids),
        ],
        findings=[*findings, *claims.finding(entries)],
        own=own,
    )


def ledger_table(records: Sequence[Record]) -> Table:
    """The claims ledger."""
    return claims.table(claims.ledger(records, load()))


def numbers(tables: Sequence[PaperTable]) -> str:
    """Which tables: "table 5", "tables 1 to 3", "tables 1, 5, 6 and 8"."""
    every = [t.number for t in tables]
    if len(every) == 1:
        return f"table {every[0]}"
    if len(every) > 2 and every == list(range(every[0], every[-1] + 1)):
        return f"tables {every[0]} to {every[-1]}"
    return f"tables {', '.join(map(str, every[:-1]))} and {every[-1]}"


def against_paper(tables: Sequence[PaperTable]) -> list[Statement]:
    """How far the measured values lie from the printed ones, by quantity."""
    if not tables:
        return []
    texts = []
    for topic in dict.fromkeys(t.spec["topic"] for t in tables if "topic" in t.spec):
        about = [t for t in tables if t.spec.get("topic") == topic]
        name = f"{topic} ({numbers(about)})"
        ratios = [
            c.ratio.value
            for t in about
            for c in t.cells
            if c.ratio.value is not None and t.spec["columns"][c.column].get("form") != "difference"
        ]
        if ratios:
            low, high = min(ratios), max(ratios)
            texts.append(
                f"{name} {statistics.median(ratios):.2f}× the paper's in the median of "
                f"{len(ratios)} cells, from {low:.2f}× to {high:.2f}×"
            )
    lead = "Against the paper"
    if not texts:
        return [Statement(lead, "No cell of the paper's tables was measured.")]
    text = listed(texts)
    return [Statement(lead, f"{text[:1].upper()}{text[1:]}.")]
