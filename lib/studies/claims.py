"""The claims ledger: each claim of a study, what was measured for it, and the verdict.

Three measurements stand beside a claim: by the study's protocol, which the verdict is about; by the
corrected definition; and by that on a stack that the device bounds. A claim without a test is an
error.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import stats
from lib.records.record import Record
from lib.show.table import Column, Table
from lib.show.wording import Finding, interval, number_text, short
from lib.stats import Estimate
from lib.studies import causes, evidence, forms, verdict
from lib.studies.evidence import STANDS, Evidence, Measured, gather
from lib.studies.schema import Claim
from lib.studies.study import Absent, Published, load, paper_name
from lib.studies.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, WORDS, Verdict

COLUMNS = ("protocol", "corrected", "bound")
CSV_COLUMNS = (
    "claim", "where", "text", "of", "unit", "meant", "paper", "direction",
    *(f"{c}{end}" for c in COLUMNS for end in ("", "_low", "_high", "_n")),
    "corrected_as", "verdict", "why", "verdict_corrected", "verdict_bound", "cause", "differs",
    "missing",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One claim with its verdict. `verdicts` are by column: verdict, corrected, bound, like_paper.

    `causes` are sentences; `differs` says for card, host, software and weights how they differ.
    """

    name: str
    claim: Claim
    measured: Measured
    verdicts: dict[str, Verdict]
    causes: tuple[str, ...]
    differs: dict[str, str]

    @property
    def verdict(self) -> Verdict:
        """The verdict by the study's own protocol."""
        return self.verdicts["verdict"]

    @property
    def cause(self) -> str:
        """The causes in one line, with the names of what differs."""
        differs = f"differs in {', '.join(self.differs)}" if self.differs else ""
        return "; ".join(filter(None, (*self.causes, differs)))

    @property
    def printed(self) -> str:
        """The claim's value as printed, or its direction."""
        value, unit = self.claim["value"], self.claim["unit"]
        if value is None:
            return str(self.claim["direction"])
        texts = [value] if isinstance(value, str) else list(value)
        sign = f"{self.claim['direction']} by " if unit == "%" and "direction" in self.claim else ""
        return f"{sign}{' to '.join(texts)} {unit if unit != '1' else '×'}"

    @property
    def unit(self) -> str:
        """Unit of the measured values: that of the claim, or × for the ratio behind an order."""
        plain = self.claim["value"] is None or self.claim["unit"] == "1"
        return "×" if plain else self.claim["unit"]


def ledger(records: Sequence[Record], study: Published | None = None) -> list[Entry]:
    """Every claim of the study with its verdict; empty where none of its models was measured."""
    study = study or load()
    if not any(paper_name(r.key.get("model"), study.data) for r in records):
        return []
    evidence, audited = gather(records, study), causes.touched(study)
    return [_entry(evidence, name, audited.get(name, [])) for name in study.data["claims"]]


def measure(e: Evidence, name: str) -> Measured:
    """What was measured for a claim, by its entry or by a rule of its study."""
    claim = e.published.claim(name)
    card = e.published.data.get("gpus", {}).get(claim.get("gpu", ""), {})
    if reason := claim.get("reason") or card.get("reason"):
        raise Absent(reason)
    if "test" in claim:
        return forms.measure(e, claim)
    rules = getattr(e.published.rules, "CLAIMS", {})
    if name not in rules:
        raise LookupError(f"claim {name!r} has no test in its entry and no rule in its study")
    return rules[name](e, name)


def _entry(e: Evidence, name: str, audited: list[str]) -> Entry:
    claim = e.published.claim(name)
    try:
        measured = measure(e, name)
    except Absent as reason:
        missing = {"": stats.missing(str(reason.args[0]))}
        measured = Measured("count", missing, missing, "", missing)
    verdicts = {
        "verdict": rule_on(claim, measured, measured.protocol),
        "corrected": rule_on(claim, measured, measured.corrected),
        "bound": rule_on(claim, measured, measured.bound),
        "like_paper": rule_on(claim, measured, measured.like_paper),
    }
    if measured.corrected is STANDS:
        verdicts["corrected"] = verdicts["verdict"]
    models = _models(e, measured)
    sessions = evidence.sessions(e, models)
    verdicts = {
        column: verdict.of_sessions(x, sessions, claim.get("sessions", 1))
        for column, x in verdicts.items()
    }
    sentences = causes.sentences(e, measured, models, verdicts, audited)
    differs = causes.conditions(e, measured, models)
    return Entry(name, claim, measured, verdicts, tuple(sentences), differs)


def rule_on(claim: Claim, measured: Measured, column: dict[str, Estimate]) -> Verdict:
    """The verdict on a claim by one column of what was measured."""
    if claim["value"] is None:
        return verdict.together(
            {k: verdict.of_order(x, claim["direction"]) for k, x in column.items()}
        )
    allowed = verdict.band(claim["value"], claim["unit"], measured.quantity)
    return verdict.together(
        {k: verdict.of_value(x, allowed, measured.neutral) for k, x in column.items()}
    )


def _models(e: Evidence, measured: Measured) -> list[str]:
    """The models that a claim is about: those it is measured on, and the study's own."""
    named = [
        m for m in e.published.models if any(label.startswith(m) for label in measured.protocol)
    ]
    if named and measured.alone:
        return named
    return [e.reference, *(m for m in named if m != e.reference)]


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """How many claims have each verdict."""
    words = Counter(entry.verdict.word for entry in entries)
    return {word: words[word] for word in WORDS}


def finding(entries: Sequence[Entry]) -> list[Finding]:
    """The sentence of the abstract: how many claims hold."""
    if not entries:
        return []
    n = counts(entries)
    sentence = (
        f"Of {len(entries)} claims {n[REPRODUCED]} are reproduced, {n[DIRECTION]} in direction "
        f"only, {n[NOT]} not reproduced and {n[UNTESTABLE]} not testable with these rows."
    )
    turned = [
        x.claim["text"]
        for x in entries
        if x.verdicts["corrected"].word == NOT and x.verdict.word != NOT
    ]
    if turned:
        sentence += f" By the corrected definition {len(turned)} more fail: {'; '.join(turned)}."
    return [Finding("The paper's claims", sentence)]


def text(column: dict[str, Estimate], unit: str) -> str:
    """A column in words: each value with interval and n, or once the reason for its absence."""
    if all(x.value is None for x in column.values()):
        return "; ".join(dict.fromkeys(x.reason for x in column.values()))
    parts = []
    for label, x in column.items():
        value = f"{value_text(x)} {unit} {interval(x)}".strip() if x.value is not None else "–"
        n = f", n = {x.n}" if x.n > 1 else ""
        parts.append(f"{value}{n}" + (f" ({label})" if label else ""))
    return "; ".join(parts)


def value_text(x: Estimate) -> str:
    """A value for reading; whole numbers that were counted without decimals."""
    whole = x.method in verdict.EXACT and x.value is not None and x.value == round(x.value)
    return f"{x.value:,.0f}" if whole else short(x.value)


def table(entries: Sequence[Entry]) -> Table:
    """The ledger for reading in a notebook: one claim a row."""
    titles = (
        "claim",
        "the paper",
        "measured, by its protocol",
        "corrected definition",
        "device-bound",
        "verdict",
        "cause",
    )
    rows = tuple(
        (
            x.claim["text"],
            x.printed,
            text(x.measured.protocol, x.unit),
            text(x.measured.corrected, x.unit),
            text(x.measured.bound, x.unit),
            str(x.verdict),
            x.cause,
        )
        for x in entries
    )
    notes = () if entries else ("none of the paper's models is among the rows",)
    return Table(
        "claims", "Claims ledger", tuple(Column(t, numeric=False) for t in titles), rows, notes
    )


def csv_rows(entry: Entry) -> list[dict[str, Any]]:
    """Lines of claims.csv: one for each model or step that the claim is compared on."""
    columns = {c: getattr(entry.measured, c) for c in COLUMNS}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    value = entry.claim["value"]
    lines = []
    for label in [label for label in labels if label] or [""]:
        line = {
            "claim": entry.name,
            "where": entry.claim["where"],
            "text": entry.claim["text"],
            "of": label,
            "unit": entry.unit,
            "meant": entry.claim.get("meant", ""),
            "paper": value if isinstance(value, str) else " to ".join(value or []),
            "direction": entry.claim.get("direction", ""),
            "corrected_as": entry.measured.corrected_as,
            "verdict": entry.verdict.word,
            "why": entry.verdict.why,
            "verdict_corrected": entry.verdicts["corrected"].word,
            "verdict_bound": entry.verdicts["bound"].word,
            "cause": "; ".join(entry.causes),
            "differs": "; ".join(f"{what}: {how}" for what, how in entry.differs.items()),
        }
        missing = []
        for name, column in columns.items():
            x = column.get(label, column.get("", stats.missing("not compared")))
            line |= {
                name: number_text(x.value),
                f"{name}_low": number_text(x.low),
                f"{name}_high": number_text(x.high),
                f"{name}_n": x.n or "",
            }
            if x.value is None:
                missing.append(f"{name}: {x.reason}")
        lines.append(line | {"missing": "; ".join(missing)})
    return lines


def write_csv(entries: Sequence[Entry], out_dir: str | Path) -> list[Path]:
    """claims.csv below `out_dir`; the paths, none without entries."""
    if not entries:
        return []
    path = Path(out_dir) / "claims.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for entry in entries for line in csv_rows(entry))
    return [path]
