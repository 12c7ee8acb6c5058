"""The audit of a published study: what it prints against what follows from its own data.

Nothing is measured and no number is typed: each rule computes from the study's file. With a
folder of the study's released CSVs, the facts that the file took from them are compared first.
"""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib.studies.arxiv_2508_16700 import audit
from lib.studies.study import SEVERITIES, Absent, Published, Verdict

RULES: dict[str, tuple[Callable[[Published], Verdict | None], ...]] = {
    "latency": audit.LATENCY,
    "memory": audit.MEMORY,
    "energy": audit.ENERGY,
    "efficiency": audit.EFFICIENCY,
    "ablations": audit.ABLATIONS,
    "governance": audit.GOVERNANCE,
    "arithmetic": audit.ARITHMETIC,
}
Curve = tuple[str, str, str, list[float], list[float]]  # label, model, line style, x, y


@dataclass(frozen=True)
class Finding:
    """One rule that does not hold, or that could not be checked (severity "unchecked").

    `printed` is what the study prints, `follows` what its own data say instead; `claims` are the
    names of the claims it touches, `sources` addresses of what was taken from elsewhere.
    """

    id: str
    topic: str
    severity: str
    where: str
    printed: str
    follows: str
    rule: str
    claims: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def findings(study: Published) -> list[Finding]:
    """Every rule that the study breaks, the gravest first; a rule that holds is left out."""
    every = []
    for topic, rules in RULES.items():
        for rule in rules:
            try:
                verdict = rule(study)
            except Absent as reason:
                verdict = Verdict("unchecked", "", "", f"not checked: {reason.args[0]}")
            if verdict is not None:
                every.append(_finding(topic, rule, verdict))
    order = (*SEVERITIES, "unchecked")
    return sorted(every, key=lambda f: order.index(f.severity))


def _finding(topic: str, rule: Callable, verdict: Verdict) -> Finding:
    return Finding(
        id=name_of(rule),
        topic=topic,
        severity=verdict.severity,
        where=verdict.where,
        printed=verdict.printed,
        follows=verdict.follows,
        rule=" ".join((inspect.getdoc(rule) or "").split()),
        claims=verdict.claims,
        sources=verdict.sources,
    )


def name_of(rule: Callable) -> str:
    """The id of a rule's finding: peak_row is peak-row."""
    return rule.__name__.replace("_", "-")


def holding(findings: Sequence[Finding]) -> list[str]:
    """Ids of the rules that the study keeps."""
    broken = {f.id for f in findings}
    return [name for rules in RULES.values() for name in map(name_of, rules) if name not in broken]


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
    counts, holds = Counter(f.severity for f in findings), holding(findings)
    parts = [
        f"{counts[s]} {_plural(s, counts[s])}" for s in (*SEVERITIES, "unchecked") if counts[s]
    ]
    more = f"; the others gave {', '.join(parts)}" if parts else ""
    total = sum(map(len, RULES.values()))
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
