"""The audit of a published study: what it prints against what follows from its own data.

Nothing is measured and no number is typed: each rule computes from the study's file, whose `read`
adds what was found by reading the study's scripts. With a folder of the study's released CSVs, the
facts that the file took from them are compared first.
"""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from lib.studies.schema import Claim
from lib.studies.study import SEVERITIES, Absent, Finding, Published, agrees, each, percent

Rule = Callable[[Published], Finding | None]
READ = "Read, not computed: the text beside the scripts and files that the study names."


def rules(study: Published) -> dict[str, tuple[Rule, ...]]:
    """The rules of a study's own module, by topic; none where its file names no module."""
    return study.rules.AUDIT if study.rules else {}


def findings(study: Published) -> list[Finding]:
    """Every rule that the study breaks and what was read beside its text, the gravest first; a rule
    that holds is left out."""
    every = [
        Finding(
            x["severity"],
            x["where"],
            x["printed"],
            x["follows"],
            tuple(x.get("claims", ())),
            (x["source"],),
            name,
            x["topic"],
            READ,
        )
        for name, x in study.data.get("read", {}).items()
    ]
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


def claims_follow(p: Published) -> Finding | None:
    """A claim's number is that of the printed cells or counts that it is made of, to one unit of
    its last digit, and its order is theirs. Off by less than a point or a percent is a note."""
    off, near = {}, []
    claims = {n: c for n, c in p.data.get("claims", {}).items() if "cells" in c}
    for name, claim in claims.items():
        exact, value = _exact(p, claim), claim["value"]
        texts = [value] if isinstance(value, str) else list(value or ())
        if value is None:
            wrong = [x for x in exact if (x > 1) != (claim["direction"] == "higher")]
            exact = wrong or exact
        else:
            ends = zip(texts, (exact[0], exact[-1]), strict=False)
            wrong = [x for text, x in ends if not agrees(text, x)]
            room = 1 if claim["unit"] == "%" else 0.01 * exact[0]
            near += [abs(float(texts[0]) - exact[0]) < room] if wrong else []
        if wrong:
            off[name] = " to ".join(f"{x:.4g}" for x in dict.fromkeys((exact[0], exact[-1])))
    if not off:
        return None
    severity = "note" if near and all(near) and len(near) == len(off) else "error"
    printed = "; ".join(p.claim(name)["text"] for name in off)
    follows = f"{each(off)}; the other {len(claims) - len(off)} claims of this kind follow"
    return Finding(severity, "the text", printed, follows, tuple(off))


def _exact(p: Published, claim: Claim) -> list[float]:
    """What a claim's cells give, a number a model, in order."""
    cells, form = claim["cells"], claim["cells"]["form"]
    models = claim.get("models") or [claim[k] for k in ("model",) if k in claim] or p.others

    def of(model: str, column: str = "column") -> float:
        if "counted" in cells:
            n = p.counted(model, cells["counted"])
            return 100 * n / p.counted(model, cells["of"]) if "of" in cells else n / 1e9
        value = p.value(cells["table"], cells.get("row", model), cells[column])
        return 1 / value if cells.get("inverse") else value * cells.get("factor", 1)

    if form == "value":
        return sorted(map(of, models))
    pairs = [
        (of(m), of(m, "before")) if "before" in cells else (of(p.reference), of(m)) for m in models
    ]
    sign = {"gain": 1, "saving": -1}
    return sorted(sign[form] * percent(a, b) if form in sign else a / b for a, b in pairs)


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
    holds, total = holding(study, findings), sum(map(len, rules(study).values()))
    computed, read = (
        _counts([f for f in findings if (f.rule == READ) == x]) for x in (False, True)
    )
    more = f"; the others gave {computed}" if computed else ""
    lines = [f"Rules checked: {total}, of which {len(holds)} hold{more}."]
    if read:
        lines.append(f"Reading the study's scripts beside its text gave {read}.")
    for severity in ("error", "caution"):
        names = dict.fromkeys(c for f in findings if f.severity == severity for c in f.claims)
        if names:
            lines.append(
                f"{len(names)} of {len(study.data.get('claims', {}))} claims are touched by "
                f"{_plural(severity, 2)}: {', '.join(names)}."
            )
    if holds:
        lines.append(f"Rules that hold: {', '.join(holds)}.")
    lines += [f"Done well: {text}" for text in study.data.get("does_well", ())]
    return "\n".join(f"- {line}" for line in lines)


def _counts(findings: Sequence[Finding]) -> str:
    n = Counter(f.severity for f in findings)
    return ", ".join(f"{n[s]} {_plural(s, n[s])}" for s in (*SEVERITIES, "unchecked") if n[s])


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
