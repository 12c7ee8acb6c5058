"""What rows of several decode stacks say: the gate, what preparing took, how flat decoding is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lib import stats
from lib.analysis.estimators import decode_tok_per_s
from lib.analysis.gates import in_part
from lib.analysis.metrics import BETWEEN_MODELS, METRICS, longest
from lib.analysis.setups import build, by_setup, failures
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, select
from lib.show.table import Column, Table
from lib.show.wording import bullets, cautions, number, short, than
from lib.stats import Estimate

SLACK = 0.05  # what decoding may lose beyond what its bytes explain before it is worth a remark
HARNESS = 0.005  # what the harness may add to a call
FREE = {
    "free_mean_error": "mean error, routers free",
    "free_floor_error": "reference against itself, routers free",
    "free_allowed_error": "allowed, routers free",
}
LAYER = {
    "layer_max_error": "largest error of a layer",
    "layer_allowed_error": "allowed of a layer",
}
GATE = {
    "floor_error": "reference against itself",
    "allowed_error": "allowed",
    "same_choice": "same choice",
    **LAYER,
    **FREE,
}


def gates(rows: Sequence[Record]) -> Table:
    """The correctness gate of every stack and context; shares of the logits' norm."""

    def cells(group: list[Record]) -> Sequence[Estimate]:
        row = group[-1]
        why = f"failed: {row.error}" if row.error else "not measured: no reading"
        errors = row.samples.get("relative_error")
        values = {**row.values, "mean_error": errors and fmean(errors)}  # older rows hold no mean
        lone = not row.error and values.get("pinned_experts") == 0
        once = "no router is pinned, so that one look is all"
        part = f", first {n} layers" if (n := values.get("first_layers")) else ""
        absent = dict.fromkeys(FREE, once if lone else why)
        absent |= dict.fromkeys(LAYER, why if row.error else "not looked at layer by layer")
        return [
            stats.missing(absent.get(name, why))
            if values.get(name) is None
            else Estimate(values[name], n=1, method=f"one continuation{part}", reason="no interval")
            for name in ("mean_error", *GATE)
        ]

    columns = [Column(title, "share") for title in ("mean error", *GATE.values())]
    grid = build(
        "gate", "Logits against generate()", rows, ("gate",), ("context", "batch"), columns, cells
    )
    return replace(grid, notes=(*grid.notes, *in_part(rows)))


def conclusion(rows: Sequence[Record]) -> str:
    """Decode throughput of each stack, its ratio to `generate()`, its cost and its flatness."""
    lines, groups = [], by_setup(rows, "latency")
    several = len({g.of("stack") for g in groups}) > 1
    for group in groups:
        mine = [g for g in groups if (g.model, g.but("stack")) == (group.model, group.but("stack"))]
        context = max(r.key["context"] for g in mine for r in g.rows)
        base = next(
            (
                decode_tok_per_s(select(g.rows, context=context))
                for g in mine
                if g.of("stack") == STUDY_STACK and g is not group
            ),
            None,
        )
        name = group.label if several else f"{group.label} on {group.of('stack')}"
        lines.append(
            f"{name}: {_rate(group.rows, context, base)}"
            f"{_spread(group.rows)}{_prepared(group.rows)}."
        )
        if flat := flatness(group.rows):
            lines.append(f"{name}: {flat}")
    lines += [harness(row) for row in select(rows, "harness") if row.samples]
    return bullets([*lines, *failures(rows, "latency"), *cautions(rows)])


def _rate(arms: Sequence[Record], context: int, base: Estimate | None) -> str:
    here = select(arms, context=context)
    rate, marked = (METRICS[name].of(here) for name in ("decode", "decode_marked"))
    text = f"decode at {context:,} tokens of context {number(rate, 'tok/s')}"
    if marked.value is not None:
        text += f" by slope, {number(marked, 'tok/s')} by the device's clock"
    if base is None or rate.value is None or base.value is None:
        return text
    return f"{text}, {short(rate.value / base.value)} times {STUDY_STACK}"


def _spread(arms: Sequence[Record]) -> str:
    text = ""
    for name, what in (("e2e_s", "calls of one length"), ("decode_s", "their decode steps")):
        spreads = [stats.spread(r.samples[name]) for r in arms if len(r.samples.get(name, ())) > 1]
        text += f"; {what} spread by at most {max(spreads):.1%}" if spreads else ""
    return text


def _prepared(arms: Sequence[Record]) -> str:
    seconds = [r.values.get("prepare_s") or 0.0 for r in arms]
    if not any(seconds):
        return ""
    return f"; the first capture took {short(max(seconds))} s, later ones {short(min(seconds))} s"


def harness(row: Record) -> str:
    """What timing through the workbook adds to a bare loop around the same call."""
    ratio = stats.paired_ratio(row.samples["e2e_s"], row.samples["bare_s"])
    if ratio.value is None:
        return f"The harness was not compared with a bare loop ({ratio.reason})."
    text = (
        f"{row.key['model']} on {row.key['stack']}: a call takes {stats.change(ratio, 2)} "
        "against a bare loop in the same process"
    )
    if ratio.low is None:
        return f"{text}; not judged, {ratio.reason}."
    inside = max(abs(ratio.low - 1), abs(ratio.high - 1)) <= HARNESS
    outside = ratio.low - 1 > HARNESS or ratio.high - 1 < -HARNESS
    verdict = "within" if inside else "more than" if outside else "not resolved from"
    return f"{text}, {verdict} {HARNESS:.1%}."


def flatness(arms: Sequence[Record]) -> str:
    """How much decoding slows down with the context, beside what the bytes of a step explain."""
    contexts = sorted({r.key["context"] for r in arms})
    if len(contexts) < 2:
        return ""
    rates, sizes = [], []
    for context in (contexts[0], contexts[-1]):
        here = select(arms, context=context)
        rates.append(decode_tok_per_s(here).value)
        sizes.append(next((r.value("decode_bytes") for r in here if r.value("decode_bytes")), None))
    if None in (*rates, *sizes):
        return ""
    lost, explained = 1 - rates[1] / rates[0], 1 - sizes[0] / sizes[1]
    verdict = "the bytes explain it" if lost <= explained + SLACK else "more than the bytes explain"
    return (
        f"from {contexts[0]:,} to {contexts[-1]:,} tokens of context decoding loses "
        f"{lost:.1%}, and what a step reads would cost {explained:.1%}: {verdict}."
    )


def between_stacks(rows: Sequence[Record]) -> list[str]:
    """Each model on each further stack against itself on the study's, all else being equal."""
    by_group: dict[str, list[str]] = {}
    for metric in BETWEEN_MODELS:
        groups = metric.groups(rows)
        study = {(g.model, g.but("stack")): g for g in groups if g.of("stack") == STUDY_STACK}
        for group in groups:
            base = study.get((group.model, group.but("stack")))
            common = metric.shapes(group) & metric.shapes(base) if base else set()
            if common and base is not group:
                shape = longest(common)
                ratio = metric.ratio(*(metric.arm(g, shape) for g in (group, base)))
                sentence = f"{metric.title} at {shape[0]} tokens {than(STUDY_STACK, ratio)}"
                by_group.setdefault(group.label, []).append(sentence)
    return [f"{name}: {'; '.join(parts)}." for name, parts in by_group.items()]
