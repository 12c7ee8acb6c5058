"""The report's part on a published study: ladder, rankings, claims ledger and table 13, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lib import governance, judge, ladder, plots, rankings, verdicts
from lib.findings import Finding
from lib.grid import Table, frame, interval
from lib.judge import TIE, TOLERANCES, WORDS, Ruling
from lib.markup import Footnotes, figure, grid_html, verdict_mark
from lib.paperrules import paper_name
from lib.published import Published
from lib.records import Record
from lib.stats import Estimate
from lib.verdicts import Entry

HEAD = ("Claim", "The paper", "Measured, by its protocol", "Corrected definition", "Device-bound",
        "Verdict", "Cause")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """HTML of each piece, the files that were written, and sentences for the abstract."""

    ladder: str
    rankings: str
    ledger: str
    governance: str
    files: list[Path]
    findings: list[Finding]


def part(records: Sequence[Record], study: Published, out_dir: str | Path) -> Part | None:
    """Everything of the study beside the rows; None where none of its models was measured."""
    mine = [r for r in records if r.kind == "environment"
            or paper_name(r.key.get("model"), study.data)]  # fmt: skip
    entries = verdicts.ledger(mine, study)
    if not entries:
        return None
    rungs, orders = ladder.rungs(mine, study), rankings.rankings(mine, study)
    tables = [ladder.table(rungs, study), rankings.table(orders)]
    files = [*verdicts.write_csv(entries, out_dir), *governance.write_csv(study, out_dir),
             *(_write(table, out_dir) for table in tables)]  # fmt: skip
    picture = plots.html(plots.ladder(rungs, tables[0].title), mine)
    return Part(
        ladder=picture + grid_html(tables[0], "ladder-rungs", "The rungs of the ladder"),
        rankings=grid_html(tables[1], "rankings"),
        ledger=ledger_html(entries),
        governance=governance_html(study),
        files=files,
        findings=[*ladder.finding(rungs, study), *verdicts.finding(entries)],
    )


def _write(table: Table, out_dir: str | Path) -> Path:
    path = Path(out_dir) / "tables" / f"{table.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(frame(table, digits=8).to_csv(index=False), encoding="utf-8")
    return path


def ledger_html(entries: Sequence[Entry]) -> str:
    """The claims ledger: one claim a row, in the order of the paper."""
    notes = Footnotes("ledger")
    head = "".join(f'<th scope="col" class="text" data-col="{i}">{t}</th>'
                   for i, t in enumerate(HEAD))  # fmt: skip
    body = "".join(_entry(entry, notes) for entry in entries)
    counts = verdicts.counts(entries)
    said = ", ".join(f"{counts[word]} {word}" for word in WORDS)
    caption = (f"<b>Claims ledger.</b> {len(entries)} claims: {said}. "
               f'<span class="where">{escape(tolerances())}</span>')  # fmt: skip
    html = figure("ledger", caption, f"<tr>{head}</tr>", body, notes.html())
    return html.replace('class="data sortable"', 'class="data sortable prose"', 1)


def tolerances() -> str:
    """The rules of the verdicts in words, from the constants that they use."""
    t, m = TOLERANCES["time"], TOLERANCES["memory"]
    few = TOLERANCES["effect"]
    return (
        f"A value is reproduced if its 95 % interval lies within {t.share:.0%} of the printed one "
        f"({t.points:g} percentage points where it is a percentage) for time, throughput and "
        f"energy, {m.share:.0%} ({m.points:g} points) for memory, {few.points:g} point for effects "
        "of a few percent, or one unit of the last printed digit. An order is reproduced if every "
        f"ratio is resolved and differs from 1 by more than {TIE:.0%}. Without an interval nothing "
        "is decided, except for counts and readings of the allocator."
    )


def _entry(entry: Entry, notes: Footnotes) -> str:
    claim, m = entry.claim, entry.measured
    meant = f"meant: {claim['meant']}" if claim.get("meant") else ""
    as_said = m.corrected_as if any(x.value is not None for x in m.corrected.values()) else ""
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in entry.causes)
    differs = f"<li>differs: {escape(entry.differs)}</li>" if entry.differs else ""
    return (
        f'<tr id="claim-{escape(entry.name)}"><th scope="row">{escape(claim["text"])}'
        f'<span class="ci">{escape(claim["where"])}</span></th>'
        f"<td>{escape(entry.printed)}{_small(meant)}</td>"
        f"{_column(m.protocol, entry.unit, notes)}"
        f"{_column(m.corrected, entry.unit, notes, entry.rulings['corrected'], as_said)}"
        f"{_column(m.bound, entry.unit, notes, entry.rulings['bound'])}"
        f'<td data-value="{WORDS.index(entry.verdict.word)}">{verdict_mark(entry.verdict)} '
        f"<b>{entry.verdict.word}</b>{_small(entry.verdict.why)}</td>"
        f'<td class="cause"><ul>{causes}{differs}</ul></td></tr>'
    )


def _small(text: str) -> str:
    return f'<span class="ci">{escape(text)}</span>' if text else ""


def _column(
    found: dict[str, Estimate], unit: str, notes: Footnotes, ruling: Ruling | None = None,
    as_said: str = "",
) -> str:  # fmt: skip
    """Each value with interval, n and what it is of; or the reasons, each once under the table."""
    first = next((x.value for x in found.values() if x.value is not None), None)
    if first is None:
        marks = "".join(notes.mark(why) for why in dict.fromkeys(x.reason for x in found.values()))
        return f'<td class="missing" data-value="">–{marks}</td>'
    lines = []
    for label, x in found.items():
        if x.value is None:
            lines.append(f'–{notes.mark(x.reason)} <span class="ci">{escape(label)}</span>')
            continue
        details = ", ".join(filter(None, (interval(x), f"n = {x.n}" if x.n > 1 else "", label)))
        value = f"{verdicts.shown(x)} {unit}".strip()
        lines.append(f'<span class="v" title="{escape(x.method)}">{escape(value)}</span>'
                     f"{_small(details)}")  # fmt: skip
    mark = "" if ruling is None or ruling.word == judge.UNTESTABLE else verdict_mark(ruling)
    items = "".join(f"<div>{line}</div>" for line in lines)
    return f'<td data-value="{first:.8g}">{mark}{items}{_small(as_said)}</td>'


def governance_html(study: Published) -> str:
    """Table 13 with its sources as links."""
    table = governance.table(study)
    head = "".join(f'<th scope="col" class="text" data-col="{i}">{escape(c.title)}</th>'
                   for i, c in enumerate(table.columns))  # fmt: skip
    body = "".join(_governance_row(row) for row in table.rows)
    caption = f"<b>Table 13.</b> {escape(table.title)}."
    below = "".join(f'<p class="note">{escape(note)}.</p>' for note in table.notes)
    html = figure("table-13", caption, f"<tr>{head}</tr>", body, below)
    return html.replace('class="data sortable"', 'class="data sortable prose"', 1)


def _governance_row(row: tuple[Any, ...]) -> str:
    model, field, paper, publisher, verdict, sources, date = row
    links = " ".join(_link(url, f"[{n}]") for n, url in enumerate(sources.split(), start=1))
    shown = _link(publisher, "link") if publisher.startswith("https://") else escape(publisher)
    cells = (escape(field), escape(paper), shown, escape(verdict), links, escape(date))
    return (f'<tr><th scope="row">{escape(model)}</th>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")  # fmt: skip


def _link(url: str, text: str) -> str:
    return f'<a href="{escape(url)}" rel="noreferrer" title="{escape(url)}">{text}</a>'
