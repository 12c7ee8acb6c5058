"""The claims ledger: each claim of a study, what was measured for it, and the verdict.

Four measurements stand beside a claim: by the study's protocol and implementation, which the
verdict is about; by the protocol with the experts that the library of today computes; by the
corrected definition; and by that on a stack that the device bounds. A claim without a test is an
error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import stats
from lib.records.record import Record
from lib.show import table as tables
from lib.show.table import Column, Table, Text
from lib.show.wording import Statement, listed
from lib.studies import causes, evidence, forms, verdict
from lib.studies.evidence import STANDS, Evidence, Measured, gather
from lib.studies.grids import estimates, sign, tolerances
from lib.studies.schema import Claim
from lib.studies.study import Absent, Published, load, paper_name
from lib.studies.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, WORDS, Verdict

WARNED = "because a row warns"
ABSENT = "for want of a row with every expert computed, as the paper's software did"
SAME = {"": stats.missing("no other experts than in the column before")}
COLUMNS = ("protocol", "today", "corrected", "bound")


@dataclass(frozen=True)
class Entry:
    """One claim with its verdict. `verdicts` are by column: verdict, today, corrected, bound.

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
        "verdict" if name == "protocol" else name: rule_on(e, claim, measured, name)
        for name in COLUMNS
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


def rule_on(e: Evidence, claim: Claim, measured: Measured, name: str) -> Verdict:
    """The verdict on a claim by one column of what was measured."""
    column = {k: verdict.settled(x, e.doubts) for k, x in getattr(measured, name).items()}
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


def verdicts(entries: Sequence[Entry]) -> str:
    """How many claims there are and how many have each verdict, in words."""
    words = ", ".join(f"{n} {word}" for word, n in counts(entries).items() if n)
    return f"{len(entries)} claims: {words}"


def finding(entries: Sequence[Entry]) -> list[Statement]:
    """The sentence of the abstract: how many claims hold."""
    if not entries:
        return []
    n = counts(entries)
    open_ = [x.verdict.why for x in entries if x.verdict.word == UNTESTABLE]
    other = sum(evidence.OTHER_EXPERTS in why for why in open_)
    warned = sum(verdict.WARNS in why for why in open_ if evidence.OTHER_EXPERTS not in why)
    causes = [f"{k} {what}" for k, what in ((warned, WARNED), (other, ABSENT)) if k]
    sentence = (
        f"Of {len(entries)} claims {n[REPRODUCED]} are reproduced, {n[DIRECTION]} in direction "
        f"only, {n[NOT]} not reproduced and {n[UNTESTABLE]} not testable with these rows"
        f"{f' ({listed(causes)})' if causes else ''}."
    )
    turned = [
        x.claim["text"]
        for x in entries
        if x.verdicts["corrected"].word == NOT and x.verdict.word != NOT
    ]
    if turned:
        sentence += f" By the corrected definition {len(turned)} more fail: {'; '.join(turned)}."
    return [Statement("The paper's claims", sentence)]


def table(entries: Sequence[Entry]) -> Table:
    """The ledger: one claim a row, in the order of the paper."""
    columns = (
        Column("Claim", numeric=False),
        Column("The paper", numeric=False, sortable=False),
        Column("Measured, by its protocol", numeric=False, sortable=False),
        Column("Experts as of today", numeric=False, sortable=False),
        Column("Corrected definition, as of today", numeric=False, sortable=False),
        Column("Device-bound, as of today", numeric=False, sortable=False),
        Column("Verdict", numeric=False),
        Column("Cause", numeric=False, sortable=False, css="cause"),
    )
    if not entries:
        why = "none of the paper's models is among the rows"
        return Table("ledger", "Claims ledger", columns, (), (why,))
    return Table(
        "ledger",
        "Claims ledger",
        columns,
        tuple(map(_cells, entries)),
        (verdicts(entries), tolerances()),
        row_ids=tuple(f"claim-{entry.name}" for entry in entries),
        prose=True,
    )


def _cells(entry: Entry) -> tuple[Any, ...]:
    claim, m, verdicts = entry.claim, entry.measured, entry.verdicts
    exact = tuple(verdict.EXACT)
    meant = f"meant: {claim['meant']}" if claim.get("meant") else ""
    corrected_as = m.corrected_as if any(x.value is not None for x in m.corrected.values()) else ""
    causes = [Text(cause) for cause in entry.causes]
    if entry.differs:
        full = "; ".join(f"{what}: {how}" for what, how in entry.differs.items())
        causes.append(Text(f"differs in {', '.join(entry.differs)}", reasons=(full,)))
    return (
        Text(claim["text"], claim["where"]),
        Text(entry.printed.replace(" %", "\xa0%"), meant),
        estimates(m.protocol, entry.unit, exact=exact),
        estimates(m.today or SAME, entry.unit, verdicts["today"], exact=exact),
        estimates(m.corrected, entry.unit, verdicts["corrected"], corrected_as, exact),
        estimates(m.bound, entry.unit, verdicts["bound"], exact=exact),
        sign(entry.verdict),
        tuple(causes),
    )


def csv_rows(entry: Entry) -> list[dict[str, Any]]:
    """Lines of claims.csv: one for each model or step that the claim is compared on."""
    columns = {c: getattr(entry.measured, c) for c in COLUMNS}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    value, none = entry.claim["value"], stats.missing("not compared")
    columns["today"] = columns["today"] or {"": stats.missing("")}
    lines = []
    for label in [label for label in labels if label] or [""]:
        measured = {c: column.get(label, column.get("", none)) for c, column in columns.items()}
        lines.append(
            {
                "claim": entry.name,
                "where": entry.claim["where"],
                "text": entry.claim["text"],
                "of": label,
                "unit": entry.unit,
                "meant": entry.claim.get("meant", ""),
                "paper": value if isinstance(value, str) else " to ".join(value or []),
                "direction": entry.claim.get("direction", ""),
                **measured,
                "corrected_as": entry.measured.corrected_as,
                "verdict": entry.verdict.word,
                "why": entry.verdict.why,
                "verdict_today": entry.verdicts["today"].word if entry.measured.today else "",
                "verdict_corrected": entry.verdicts["corrected"].word,
                "verdict_bound": entry.verdicts["bound"].word,
                "cause": "; ".join(entry.causes),
                "differs": "; ".join(f"{what}: {how}" for what, how in entry.differs.items()),
                "missing": "; ".join(
                    f"{c}: {x.reason}" for c, x in measured.items() if x.value is None and x.reason
                ),
            }
        )
    return lines


def write_csv(entries: Sequence[Entry], out_dir: str | Path) -> list[Path]:
    """claims.csv below `out_dir`; the paths, none without entries."""
    lines = [line for entry in entries for line in csv_rows(entry)]
    return [tables.write_csv(Path(out_dir) / "claims.csv", lines)] if lines else []
