"""What the data of arXiv:2508.16700 cannot say, where the study's modules look for it.

AUDIT are the rules of its audit by topic, CLAIMS those of the claims that no form fits, `part` its
own pieces of a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from lib.records.record import Record
from lib.show import figure
from lib.show.table import Table
from lib.show.wording import Statement
from lib.studies.arxiv_2508_16700 import audit, claims, ladder, rankings
from lib.studies.study import Published, load

AUDIT = {
    "latency": audit.LATENCY,
    "memory": audit.MEMORY,
    "energy": audit.ENERGY,
    "efficiency": audit.EFFICIENCY,
    "ablations": audit.ABLATIONS,
    "governance": audit.GOVERNANCE,
    "arithmetic": audit.ARITHMETIC,
}
CLAIMS = claims.RULES
Curve = tuple[str, str, str, list[float], list[float]]  # label, model, line style, x, y


def part(
    records: Sequence[Record], study: Published
) -> tuple[dict[str, Any], list[Table], list[Statement]]:
    """Ladder and rankings: pieces for the page, tables for CSVs, and a sentence."""
    rungs, orders = ladder.rungs(records, study), rankings.rankings(records, study)
    steps, order = ladder.table(rungs, study), rankings.table(orders)
    drawn = ladder.ladder(rungs, steps.title)
    pieces = {
        "figure": figure.html(drawn, ladder.reads(records, study)),
        "ladder": replace(steps, title="The rungs of the ladder"),
        "rankings": order,
    }
    return pieces, [steps, order], ladder.finding(rungs, study)


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


def throughput_curves(study: Published) -> list[Curve]:
    """Per model the printed throughput and the decode-only slope of its released call times."""
    curves: list[Curve] = []
    for title in study.models:
        at, model = study.contexts, study.entry(title)[0]
        printed = [study.value(2, c, title) for c in at]
        decode = [audit.decode_tok_per_s(study, title, c) for c in at]
        curves.append((f"{title}, printed", model, "-", at, printed))
        curves.append((f"{title}, decode only", model, "--", at, decode))
    return curves


def ttft_curves(study: Published) -> list[Curve]:
    """Per model the printed TTFT and the released median (ms)."""
    curves: list[Curve] = []
    for title in study.models:
        at, model = study.contexts, study.entry(title)[0]
        printed = [study.value(3, c, title) for c in at]
        median = [study.fact("ttft_median_ms", title, c) for c in at]
        curves.append((f"{title}, printed", model, "-", at, printed))
        curves.append((f"{title}, released median", model, "--", at, median))
    return curves
