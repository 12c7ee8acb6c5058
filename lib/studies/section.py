"""The report's part on a published study: ladder, rankings, claims ledger and table 13."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes

from lib.records.record import Record
from lib.show import figure
from lib.show.table import Table
from lib.show.wording import Finding, listed
from lib.studies import claims
from lib.studies.arxiv_2508_16700 import governance, ladder, rankings
from lib.studies.paper_tables import PaperTable
from lib.studies.study import Published, load, paper_name


@dataclass(frozen=True)
class Part:
    """Each piece for the page, the files that were written, and sentences for the abstract."""

    figure: Markup
    ladder: Table
    rankings: Table
    ledger: Table
    governance: Table
    files: list[Path]
    findings: list[Finding]


def part(records: Sequence[Record], study: Published, out_dir: str | Path) -> Part | None:
    """Everything of the study beside the rows; None where none of its models was measured."""
    mine = [
        r for r in records if r.kind == "environment" or paper_name(r.key.get("model"), study.data)
    ]
    entries = claims.ledger(mine, study)
    if not entries:
        return None
    rungs = ladder.rungs(mine, study)
    steps, orders = ladder.table(rungs, study), rankings.table(rankings.rankings(mine, study))
    drawn = ladder.ladder(rungs, steps.title)
    return Part(
        figure=figure.html(drawn, ladder.reads(mine, study)),
        ladder=replace(steps, title="The rungs of the ladder"),
        rankings=orders,
        ledger=claims.table(entries),
        governance=governance.table(study),
        files=[
            *claims.write_csv(entries, out_dir),
            governance.write_csv(study, out_dir),
            steps.write_csv(out_dir),
            orders.write_csv(out_dir),
        ],
        findings=[*ladder.finding(rungs, study), *claims.finding(entries)],
    )


def ledger_table(records: Sequence[Record]) -> Table:
    """The claims ledger."""
    return claims.table(claims.ledger(records, load()))


def ladder_figure(records: Sequence[Record]) -> Axes:
    """The ratio ladder as a figure."""
    return ladder.ladder(ladder.rungs(records, load()), ladder_table(records).title)


def show_ladder(records: Sequence[Record]) -> None:
    """The ratio ladder with its caption, in a notebook."""
    figure.show(ladder_figure(records), ladder.reads(records, load()))


def ladder_table(records: Sequence[Record]) -> Table:
    """The rungs of the ladder with their causes."""
    study = load()
    return ladder.table(ladder.rungs(records, study), study)


def rankings_table(records: Sequence[Record]) -> Table:
    """The order of the models in each metric."""
    return rankings.table(rankings.rankings(records, load()))


def against_paper(tables: Sequence[PaperTable]) -> list[Finding]:
    """How far the measured values lie from the printed ones, by quantity."""
    if not tables:
        return []
    groups = {
        "peak memory (table 5)": (5,),
        "times and throughput (tables 1 to 3)": (1, 2, 3),
        "energy per token (table 7)": (7,),
    }
    texts = []
    for name, numbers in groups.items():
        ratios = [
            c.ratio.value
            for t in tables
            if t.number in numbers
            for c in t.cells
            if c.ratio.value is not None and not c.column.startswith("Δ")
        ]
        if ratios:
            low, high = min(ratios), max(ratios)
            texts.append(
                f"{name} {statistics.median(ratios):.2f}× the paper's in the median of "
                f"{len(ratios)} cells, from {low:.2f}× to {high:.2f}×"
            )
    lead = "Against the paper"
    if not texts:
        return [Finding(lead, "No cell of the paper's tables was measured.")]
    text = listed(texts)
    return [Finding(lead, f"{text[:1].upper()}{text[1:]}.")]
