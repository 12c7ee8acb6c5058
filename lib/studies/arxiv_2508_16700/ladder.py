"""The ratio ladder: one model against another in throughput, from a study's print to the bytes.

Each rung is a ratio of throughputs (tok/s of the study's model over tok/s of a dense one) under
another definition, implementation or stack. A rung that was not measured says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from lib import stats
from lib.analysis import bounds
from lib.analysis.engines import ENGINES
from lib.analysis.metrics import METRICS
from lib.analysis.rows import Rows
from lib.analysis.series import Series
from lib.records.kinds import WEIGHTS
from lib.records.record import Record, select
from lib.show.figure import PALETTE, axes, labelled
from lib.show.table import Column, Table
from lib.show.wording import Statement, interval, short
from lib.stats import Estimate
from lib.studies import evidence, forms, verdict
from lib.studies.arxiv_2508_16700 import audit
from lib.studies.evidence import ALL_EXPERTS, Evidence, Map
from lib.studies.study import Absent, Published, each

DEPLOYED = ("mxfp4", "fp8")  # number formats that people run an engine with, where it has them
KINDS = ("environment", "card", "latency", "ablation-experts", "trace")  # of rows that are read


@dataclass(frozen=True)
class Rung:
    """One ratio: `name` says of what, `cause` what moves it from the rung before."""

    name: str
    ratio: Estimate
    cause: str
    origin: str  # "paper", "measured" or "bytes"


def reads(records: Sequence[Record], study: Published) -> list[Record]:
    """The rows that rungs are made of, for a caption."""
    stacks = (None, study.data["stack"], *evidence.DEVICE_BOUND, *ENGINES)
    return [r for r in records if r.kind in KINDS and r.key.get("stack") in stacks]


def rungs(records: Sequence[Record], study: Published, other: str | None = None) -> list[Rung]:
    """The ladder of the study's model against `other`, by default the first of the others."""
    e = evidence.gather(records, study)
    other = other or study.others[0]
    steps = [*_paper(study, other), *_measured(e, other)]
    for stack, cause in (
        ("graph", "the decode step is captured and replayed, so that the host launches nothing"),
        ("graph-compiled", "and the step's kernels are fused by the compiler"),
    ):
        m = e.stacks[stack]
        name = f"decode only, {'captured' if stack == 'graph' else 'captured and compiled'} step"
        steps.append(Rung(name, forms.DECODE.against(e, m, other), cause, "measured"))
    return [*steps, *_deployed(records, e, other), *_bytes(e, other)]


def _deployed(records: Sequence[Record], e: Evidence, other: str) -> list[Rung]:
    """Whole calls on an engine: both models in the study's number format, then as people run them,
    each in the smallest one that was measured. None where no engine was."""
    context, tokens = e.arm
    titles = Rows.of(records).by_title(e.published.data["models"])
    arms = {
        title: {
            str(r.key["dtype"]): r
            for r in titles[title]
            if r.kind == "latency"
            and r.key.get("engine")
            and r.key["weights"] in WEIGHTS  # no stand-in weights of the engine's own
            and (r.key["context"], r.key["new_tokens"]) == (context, tokens)
            and r.samples.get("e2e_s")
        }
        for title in (e.reference, other)
    }
    if not any(arms.values()):
        return []
    plain = e.published.data["dtype"]
    small = {m: next((f for f in DEPLOYED if f in arms[m]), plain) for m in arms}
    rungs = []
    for name, held in (
        (f"whole call, vLLM, both in {plain}", dict.fromkeys(arms, plain)),
        ("whole call, vLLM, as people deploy it", small),
    ):
        rows = [arms[m].get(held[m]) for m in (e.reference, other)]
        lacking = [m for m, row in zip((e.reference, other), rows, strict=True) if row is None]
        ratio = (
            stats.missing(f"not measured: no row of vLLM of {lacking[0]} in {held[lacking[0]]}")
            if lacking
            else METRICS["output"].ratio([rows[0]], [rows[1]])
        )
        cause = f"an engine's own kernels and prefill; {each(held)}"
        rungs.append(Rung(name, ratio, cause, "measured"))
    return rungs if small != dict.fromkeys(arms, plain) else rungs[:1]


def _paper(p: Published, other: str) -> list[Rung]:
    """The ratio as printed, and that of the decode-only slopes of the released call times."""
    context = p.data["context"]

    def printed() -> float:
        return p.value(1, p.reference, audit.RATE) / p.value(1, other, audit.RATE)

    def slopes() -> float:
        rates = [audit.decode_tok_per_s(p, m, context) for m in (p.reference, other)]
        return rates[0] / rates[1]

    try:
        ttft = [p.fact("ttft_median_ms", m, context) for m in (p.reference, other)]
        prefill = f", which took {ttft[0]:.0f} against {ttft[1]:.0f} ms by the released medians"
        source = p.source("all-experts")
        software = f"; {source['text']} ({source['dated']})"
    except Absent:
        prefill = software = ""
    return [
        Rung(
            "the paper, as printed",
            _read(printed, "printed"),
            f"whole calls, prefill included{software}",
            "paper",
        ),
        Rung(
            "the paper's data, decode only",
            _read(slopes, "slope of released call times"),
            f"without the prefill{prefill}",
            "paper",
        ),
    ]


def _read(of: Callable[[], float], method: str) -> Estimate:
    try:
        return Estimate(of(), n=1, method=method, reason="the paper prints no interval")
    except Absent as reason:
        return stats.missing(f"the paper's data lack it: {reason.args[0]}")


def _measured(e: Evidence, other: str) -> list[Rung]:
    """On the study's stack: every expert computed, then the library's grouped experts."""
    arm = _shared_arm(e, other)
    all_experts = forms.OUTPUT.against(e, e.like_paper, other, arm[0])
    where = "" if arm == e.arm else f", at {arm[0]:,} tokens of context"
    used = _experts(e.base[e.reference])
    stack = e.published.data["stack"]
    shares = {m: evidence.decode_share(e, e.base, m) for m in (e.reference, other)}
    shares = {m: share for m, share in shares.items() if share is not None}
    reach = (
        f"; decoding reaches {each(shares, '.0%')} of what its bytes allow a copy" if shares else ""
    )

    def apart(m: Map, arm: evidence.Arm) -> str:
        text = evidence.machines(e, [(m, e.reference), (e.base, other)], arm)
        return f"; {text}" if text else ""

    return [
        Rung(
            f"whole call, {stack}, every expert computed{where}",
            all_experts,
            f"the paper's protocol and implementation on this card{apart(e.like_paper, arm)}",
            "measured",
        ),
        Rung(
            f"whole call, {stack}, experts {used}",
            forms.OUTPUT.against(e, e.base, other),
            f"only the chosen experts are computed; the host launches every kernel{reach}"
            f"{apart(e.base, e.arm)}",
            "measured",
        ),
        Rung(
            f"decode only, {stack}, experts {used}",
            forms.DECODE.against(e, e.base, other),
            "without the prefill",
            "measured",
        ),
    ]


def _shared_arm(e: Evidence, other: str) -> tuple[int, int]:
    """The headline arm, or the nearest that both models have with every expert computed."""
    shapes = [
        {
            (r.key["context"], r.key["new_tokens"])
            for r in select(m.rows, "latency")
            if r.samples.get("e2e_s") and r.key["new_tokens"] == e.arm[1]
        }
        for m in (e.like_paper[e.reference], e.base[other])
    ]
    return max(set.intersection(*shapes), default=e.arm)


def _experts(series: Series) -> str:
    names = {str(r.key["experts"]) for r in series.rows if r.kind != "card"}
    return next(iter(names - {"none", "None", ALL_EXPERTS}), "as the library chooses")


def _bytes(e: Evidence, other: str) -> list[Rung]:
    """What the bytes of a decode step allow: as traced in each implementation, and at least."""

    def bound(m: Map, realised: bool) -> Estimate:
        return forms.Metric(partial(_steps_per_byte, realised=realised)).against(e, m, other)

    return [
        Rung(
            "bytes of a step, every expert computed",
            bound(e.like_paper, True),
            "nothing but reading the weights takes time, and every expert is read",
            "bytes",
        ),
        Rung(
            "bytes of a step, as traced",
            bound(e.base, True),
            "nothing but moving the weights that a step uses, and copies, takes time",
            "bytes",
        ),
        Rung(
            "bytes of a step, by architecture",
            bound(e.base, False),
            "nothing but reading the active weights and the cache takes time",
            "bytes",
        ),
    ]


def _steps_per_byte(e: Evidence, m: Map, model: str, context: int, *, realised: bool) -> Estimate:
    """1 / bytes that a decode step reads at the headline arm: steps a second at one byte a second.

    By architecture the bytes lie with the timed row; as traced, they are these and what a step was
    traced to read beyond its architecture.
    """
    if not m[model].rows:
        return stats.missing(m[model].reason)
    row, name = e.base[model].one("latency", context=context, new_tokens=e.arm[1]), "decode_bytes"
    size = row.value(name) if row else None
    if not size:
        return evidence.untold(row, name, f"no {name} at {context} tokens")
    if realised:
        row, name = evidence.traced(e, m[model]), "decode_bytes_realised"
        if row is None or None in (row.value(name), row.value("decode_bytes")):
            return evidence.untold(row, name, "no trace of a decode step")
        beyond, why = bounds.moved_beyond(row, m[model].rows)
        if beyond is None:
            return stats.missing(f"not measured: {why}")
        size += beyond
    return stats.inverse(stats.exact(size, verdict.COUNTED))


def table(rungs: Sequence[Rung], study: Published, other: str | None = None) -> Table:
    """The ladder as a table."""
    columns = (
        Column("rung", numeric=False),
        Column("throughput ratio"),
        Column("what it shows", numeric=False),
    )
    rows = tuple((r.name, r.ratio, r.cause) for r in rungs)
    title = f"{study.reference} against {other or study.others[0]} in throughput"
    return Table("ladder", title, columns, rows)


def finding(rungs: Sequence[Rung], study: Published, other: str | None = None) -> list[Statement]:
    """The ladder in a sentence: the rungs that have a value."""
    values = [r for r in rungs if r.ratio.value is not None]
    if not any(r.origin == "measured" for r in values):
        return []
    texts = (f"{r.name} {short(r.ratio.value)}× {interval(r.ratio)}".strip() for r in values)
    text, missing = "; ".join(texts), len(rungs) - len(values)
    more = f" Not measured: {missing} of {len(rungs)} rungs." if missing else ""
    lead = f"{study.reference} against {other or study.others[0]} in throughput"
    return [Statement(lead, f"{text[:1].upper()}{text[1:]}.{more}")]


def ladder(rungs: Sequence[Any], title: str, ax: Axes | None = None) -> Axes:
    """The rungs as a figure: a ratio with its interval each; one not measured says why."""
    ax = axes(ax, figsize=(9.5, 1.1 + 0.42 * len(rungs)))
    colors = {"paper": "0.35", "measured": PALETTE[0], "bytes": PALETTE[2]}
    values = []
    for place, rung in enumerate(rungs):
        ratio, shade = rung.ratio, colors[rung.origin]
        if ratio.value is None:
            ax.text(
                0.02,
                place,
                ratio.reason,
                va="center",
                fontsize=8,
                color="0.35",
                bbox={"fc": "white", "ec": "none", "pad": 1},
                transform=ax.get_yaxis_transform(),
            )
            values.append("")
            continue
        if ratio.low is not None and ratio.high is not None:
            ax.plot([ratio.low, ratio.high], [place, place], color=shade, lw=2, alpha=0.6)
        ax.plot(ratio.value, place, "o", ms=7, color=shade, label=rung.name)
        values.append(f"{ratio.value:.2f}×")
    labelled(ax, title, "ratio of throughputs", "", legend=False)
    ax.axvline(1, color="0.6", lw=1, ls=":")
    ax.set_yticks(range(len(rungs)), [rung.name for rung in rungs])
    ax.set_ylim(max(len(rungs), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(rungs)), values)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    return ax
