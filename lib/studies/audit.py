"""The audit of a published study: what it prints against what follows from its own data.

Nothing is measured and no number is typed: each rule computes from the study's file. With a
folder of the study's released CSVs, the facts that the file took from them are compared first.
"""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from lib.studies.study import SEVERITIES, Absent, Finding, Published

Rule = Callable[[Published], Finding | None]


def rules(study: Published) -> dict[str, tuple[Rule, ...]]:
    """The rules of a study's own module, by topic; none where its file names no module."""
    return study.rules.AUDIT if study.rules else {}


def findings(study: Published) -> list[Finding]:
    """Every rule that the study breaks, the gravest first; a rule that holds is left out."""
    every = []
    for topic, group in rules(study).items():
        for rule in group:
            try:
                finding = rule(study)
            except Absent as reason:
                finding = Finding("unchecked", "", "", f"not checked: {reason.args[0]}")
            if finding is not None:
                text = " ".join((inspect.getdoc(rule) or "").split())
                every.append(replace(finding, id=name_of(rule), topic=topic, rule=text))
    order = (*SEVERITIES, "unchecked")
    return sorted(every, key=lambda f: order.index(f.severity))


def name_of(rule: Callable) -> str:
    """The id of a rule's finding: peak_row is peak-row."""
    return rule.__name__.replace("_", "-")


def holding(study: Published, findings: Sequence[Finding]) -> list[str]:
    """Ids of the rules that the study keeps."""
    names = [name_of(rule) for group in rules(study).values() for rule in group]
    return [name for name in names if name not in {f.id for f in findings}]


def markdown(findings: Sequence[Finding], topic: str | None = None) -> str:
    """Findings, of one topic or all, as a Markdown table."""
    rows = [f for f in findings if topic in (None, f.topic)]
    if not rows:
        return "No finding: every rule of this section holds."
    lines = [
        "| finding | the study prints | what follows from its data | rule |",
        "|:--|:--|:--|:--|",
    ]
    for f in rows:
        name = f"**{f.id}** ({f.severity}{', ' if f.where else ''}{f.where})"
        links = "".join(f" [[{n}]]({url})" for n, url in enumerate(f.sources, start=1))
        cells = (name, f.printed, f.follows + links, f.rule)
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines)


def conclusion(study: Published, findings: Sequence[Finding]) -> str:
    """What the audit shows, in sentences: counts, what holds, and the claims that are touched."""
    counts, holds = Counter(f.severity for f in findings), holding(study, findings)
    parts = [
        f"{counts[s]} {_plural(s, counts[s])}" for s in (*SEVERITIES, "unchecked") if counts[s]
    ]
    more = f"; the others gave {', '.join(parts)}" if parts else ""
    total = sum(map(len, rules(study).values()))
    lines = [f"Rules checked: {total}, of which {len(holds)} hold{more}."]
    for severity in ("error", "caution"):
        names = dict.fromkeys(c for f in findings if f.severity == severity for c in f.claims)
        if names:
            lines.append(
                f"{len(names)} of {len(study.data.get('claims', {}))} claims are touched by "
                f"{_plural(severity, 2)}: {', '.join(names)}."
            )
    if holds:
        lines.append(f"Rules that hold: {', '.join(holds)}.")
    return "\n".join(f"- {line}" for line in lines)


def _plural(severity: str, count: int) -> str:
    return severity if count == 1 or severity == "unchecked" else f"{severity}s"


def caption(study: Published) -> str:
    """What the numbers of a figure are: the study, its card and stack."""
    data = study.data
    return (
        f"Printed values and released facts of {data['source']}; {data['gpu']}, "
        f"{data['dtype']}, {data['stack']}"
    )


def text(findings: Sequence[Finding], width: int = 100) -> str:
    """Findings for a terminal."""
    blocks = []
    for f in findings:
        lines = [f"{f.severity:<9} {f.id}" + (f"  ({f.where})" if f.where else "")]
        parts = [("printed", f.printed), ("follows", f.follows), ("rule", f.rule)]
        parts += [("source", url) for url in f.sources]
        lines += [
            textwrap.fill(
                part,
                max(width, 40),
                initial_indent=f"  {label:<8} ",
                subsequent_indent=" " * 11,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for label, part in parts
            if part
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
