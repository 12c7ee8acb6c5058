"""What people deploy beside this workbook's own stacks: an engine's rows against the best of ours.

Every number is by the same definition on both sides. A batch whose logits were not checked at its
size is a lead, and every sentence about one says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from lib import stats
from lib.analysis import boards, bounds, routers
from lib.analysis.batch import points
from lib.analysis.estimators import Reading
from lib.analysis.metrics import METRICS
from lib.analysis.routers import COUNTED, ENGINES, LEAD, WEIGHTS, is_drawn, is_engine, of_drawn
from lib.analysis.rows import SETUP, Rows, objections
from lib.analysis.setups import Group, build, by_setup
from lib.records.record import Record, machines_differ, select
from lib.show.figure import html
from lib.show.table import Column, Table, of_lines, without_empty
from lib.show.wording import bullets, interval, short, verdict
from lib.stacks.registry import STACKS
from lib.stats import Estimate

CAPTURED = tuple(name for name, stack in STACKS.items() if stack.captured)
QUANTITIES = ("ttft", "output", "decode", "j_per_1k")
OURS, THEIRS, EVEN = "ours", "vLLM", "not told apart"
SECTION = Markup("""<section>
<h2 id="engines">As people deploy it</h2>
<p>vLLM runs the same weights, drawn by name, on the same kind of card, by the same definitions of
time, throughput and energy. It is set beside the best of this workbook's own stacks. Its number
formats are those that its memory holds; a fallback to bfloat16 is not called MXFP4.</p>
""")


def of_engines(rows: Sequence[Record]) -> Rows:
    """The rows of engines, with the index of all."""
    return Rows.of(rows).where(lambda r: r.key.get("stack") in ENGINES)


# --- side by side ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """One quantity of one model at one place: the best of our stacks, and the engine's.

    `ratio` is the engine's over ours; `faster` is OURS, THEIRS, EVEN, or empty without an interval
    or where a row warns.
    """

    model: str
    what: str
    unit: str
    batch: int
    context: int
    stack: str
    ours: Estimate
    engine: str
    theirs: Estimate
    ratio: Estimate
    higher_is_better: bool
    lead: bool = False
    warned: str = ""  # of what its rows warn, so that they do not say who is faster

    @property
    def faster(self) -> str:
        resolved = self.ratio.resolved_from(1.0)
        if resolved is None or self.warned:
            return ""
        better = (self.ratio.value > 1) is self.higher_is_better
        return EVEN if not resolved else THEIRS if better else OURS


def beside(rows: Sequence[Record]) -> list[Beside]:
    """Every place that an engine and a stack of ours measured in the same number format.

    Decoding and whole calls of ours are those of captured steps: `generate()` stands for none.
    """
    rows = Rows.of(rows)
    return [*_one_user(rows), *_many_users(rows)]


def _one_user(rows: Rows) -> Iterator[Beside]:
    for name in QUANTITIES:
        metric = METRICS[name]
        groups = metric.groups(rows)
        for theirs in filter(of_drawn, groups):
            ours = [
                g
                for g in groups
                if (name == "ttft" or g.of("stack") in CAPTURED)
                and not is_engine(g.of("stack"))
                and _like(g.model, g.setup, theirs.model, theirs.setup)
            ]
            for shape in _shortest(metric.shapes(theirs)):
                arms = [(g, metric.arm(g, shape)) for g in ours if shape in metric.shapes(g)]
                valued = [(g, a, e) for g, a in arms if (e := metric.of(a)).value is not None]
                mine = metric.arm(theirs, shape)
                value = metric.of(mine)
                if not valued or value.value is None or not _greedy(mine):
                    continue
                pick = max if metric.higher_is_better else min
                group, arm, best = pick(valued, key=lambda one: one[2].value)
                yield Beside(
                    theirs.model, metric.title, metric.unit, 1, shape[0], group.of("stack"), best,
                    theirs.of("stack"), value, metric.ratio(mine, arm),
                    bool(metric.higher_is_better), warned=_warned([*mine, *arm]),
                )  # fmt: skip


def _shortest(shapes: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of each context the calls with the fewest new tokens: those of the headline."""
    shortest: dict[int, int] = {}
    for context, length in sorted(shapes):
        shortest.setdefault(context, length)
    return list(shortest.items())


def _many_users(rows: Rows) -> Iterator[Beside]:
    every = [p for p in points.points(rows) if p.total.value is not None]
    stack = SETUP.index("stack")
    for theirs in every:
        if not is_engine(theirs.setup[stack]) or not is_drawn(theirs.setup[WEIGHTS]):
            continue
        ours = [
            p
            for p in every
            if not is_engine(p.setup[stack])
            and _like(p.model, p.setup, theirs.model, theirs.setup)
            and (p.context, p.batch) == (theirs.context, theirs.batch)
        ]
        if ours:
            best = max(ours, key=lambda p: p.total.value)
            yield Beside(
                theirs.model, "throughput of all", "tok/s", theirs.batch, theirs.context,
                best.setup[stack], best.total, theirs.setup[stack], theirs.total,
                stats.quotient(theirs.total, best.total), True, not theirs.gated,
                _warned(r for p in (theirs, best) for r in _rows_of(p, rows)),
            )  # fmt: skip


def _warned(rows: Iterable[Record]) -> str:
    return objections(one for row in rows for one in (row, *row.others))


def _rows_of(point: points.Point, rows: Rows) -> Iterator[Record]:
    place = (point.model, point.setup, point.context, point.batch)
    for row in rows.of_kinds("batch"):
        if (row.key["model"], rows.setup(row), row.key["context"], row.key["batch"]) == place:
            yield row


def _greedy(rows: Sequence[Record]) -> bool:
    return all(r.key.get("decoding") in ("greedy", None) for r in rows)


def _like(model: str, setup: tuple, other: str, other_setup: tuple) -> bool:
    """Whether two setups are of one model in one number format, weights and card."""
    same = [SETUP.index(name) for name in ("weights", "dtype", "gpu")]
    return model == other and all(setup[at] == other_setup[at] for at in same)


def table(rows: Sequence[Record]) -> Table:
    """The best of ours and the engine's, side by side, and which is faster by the interval."""
    lines = [
        {
            "model": one.model,
            "quantity": f"{one.what} ({one.unit})",
            "users": one.batch,
            "context": one.context,
            "best of ours": one.stack,
            "ours": one.ours,
            "vLLM": one.theirs,
            "vLLM / ours": one.ratio,
            "better": one.faster
            or (f"a row warns of {one.warned}" if one.warned else one.ratio.reason)
            or "no interval",
            "remark": LEAD if one.lead else "",
        }
        for one in beside(rows)
    ]
    grid = of_lines("beside-engine", "vLLM beside the best of ours", lines)
    note = "the same weights, number format and kind of card; better: by the ratio's 95 % interval"
    return replace(grid, notes=(note, *_visits(rows))) if lines else grid


def _visits(rows: Sequence[Record]) -> list[str]:
    rows = Rows.of(rows)
    timed = [r for r in rows.of_kinds(("latency", "batch")) if not r.error]
    if not machines_differ(timed, rows.environments):
        return []
    return ["rows are of several boards and hosts, so that a ratio has their difference in it"]


# --- how an engine was started -----------------------------------------------------------------


def started(rows: Sequence[Record]) -> Table:
    """Seconds of an engine's start by its parts, and its memory in four columns."""
    seconds = {
        "start_s": "whole start", "import_s": "imports", "load_s": "weights",
        "compile_s": "compilation", "capture_s": "captures",
    }  # fmt: skip
    sizes = {
        "weights_bytes": "weights", "cache_reserved_bytes": "cache reserved",
        "cache_used_bytes": "cache used", "used_bytes": "board, all processes",
    }  # fmt: skip
    columns = [
        *((Column(t, "s"), Reading(n, ("engine",))) for n, t in seconds.items()),
        *((Column(f"memory: {t}", "GB"), Reading(n, ("engine",), 1e-9)) for n, t in sizes.items()),
    ]
    grid = build("engine", "How the engine was started", rows, ("engine",), ("engine",), columns)
    note = (
        "cache used: by the fullest call of this engine; board: NVML, less what was in use before"
    )
    return replace(grid, notes=(*grid.notes, note)) if grid.rows else grid


# --- the prefill -------------------------------------------------------------------------------


def prefill(rows: Sequence[Record]) -> Table:
    """TTFT, the device's part of it, the rest, and what the operations of the prefill allow.

    At the contexts of the engine's rows; without any, at the longest one.
    """
    rows = Rows.of(rows)
    mine = rows.where(
        lambda r: (
            r.kind == "environment"
            or (r.kind in ("latency", "busy") and not r.error and r.key.get("decoding") == "greedy")
        )
    )
    engines = {(r.key["model"], r.key["context"]) for r in of_engines(mine) if r.kind == "latency"}
    firsts = [r for r in mine if r.samples.get("ttft_s")]
    models = {model for model, _ in engines}
    longest = {}
    for row in firsts:
        model = row.key["model"]
        longest[model] = max(longest.get(model, 0), row.key["context"])
    places = engines | {place for place in longest.items() if place[0] not in models}
    arms = {(a.model, a.setup, a.context): a for a in bounds.arms(rows) if a.batch == 1}
    shown = mine.where(
        lambda r: r.kind == "environment" or (r.key["model"], r.key["context"]) in places
    )

    def flop_bound(group: Sequence[Record]) -> Estimate:
        row = group[0]
        arm = arms.get((row.key["model"], rows.setup(row), row.key["context"]))
        if arm is None or not arm.prefill_flop:
            return stats.missing("the operations of a prefill are not known: no full model card")
        rate = arm.limits.matmul("bfloat16")
        if not rate:
            return stats.missing("no matrix product measured in bfloat16")
        return Estimate(1e3 * arm.prefill_flop / rate, **COUNTED)

    def rest(group: Sequence[Record]) -> Estimate:
        whole, device = (METRICS[name].of(group) for name in ("ttft", "prefill_busy"))
        for part in (whole, device):
            if part.value is None:
                return part
        ends = (None if e is None else e - device.value for e in (whole.low, whole.high))
        low, high = ends
        return replace(whole, value=whole.value - device.value, low=low, high=high)

    columns = [
        METRICS["ttft"],
        METRICS["prefill_busy"],
        (Column("TTFT less the device's time", "ms"), rest),
        (Column("bound of its operations", "ms"), flop_bound),
        METRICS["prefill_share"],
    ]
    grid = build(
        "prefill", "What the first token waits for", shown, ("latency", "busy"), ("context",),
        columns, having="latency",
    )  # fmt: skip
    lines = tuple(row for row in grid.rows if _value(row[-5]) is not None)
    note = (
        "the device's time is a profiler's; what is left of TTFT is the host's, where the device "
        "waits for it; bound: operations / best measured matrix product in bfloat16"
    )
    return without_empty(replace(grid, rows=lines, notes=(*grid.notes, note) if lines else ()))


def _value(cell: Any) -> float | None:
    return cell.value if isinstance(cell, Estimate) else None


# --- in words ----------------------------------------------------------------------------------


def conclusion(rows: Sequence[Record]) -> str:
    """Where ours is faster, where the engine is, what its formats and its router change, and what
    further GPUs."""
    pairs = beside(rows)
    lines = [text for which in (OURS, THEIRS, EVEN, "") if (text := _where(which, pairs))]
    more = (*_formats(rows), *_prefills(rows), *routers.sentences(rows)) if pairs else ()
    return bullets([*lines, *more, *boards.sentences(rows)])


def _where(which: str, pairs: Sequence[Beside]) -> str:
    mine = [p for p in pairs if p.faster == which]
    if not mine:
        return ""
    lead = {
        OURS: "Ours is faster, or needs less energy",
        THEIRS: "vLLM is faster, or needs less energy",
        EVEN: "Not told apart",
        "": "Not judged, too few repetitions for an interval, or rows that warn",
    }[which]
    by_what: dict[tuple[str, str], list[Beside]] = {}
    for one in mine:
        who = _who(one)
        by_what.setdefault((one.model, f"{one.what}, {who}"), []).append(one)
    parts = []
    for (model, what), several in by_what.items():
        one = max(several, key=lambda p: (p.context, p.batch))
        place = f"{one.context:,} tokens" + (f", {one.batch} users" if one.batch > 1 else "")
        times = f"{short(one.ratio.value)} times {interval(one.ratio)}".strip()
        text = (
            f"{model}, {what}: at {place} vLLM {short(one.theirs.value)} against "
            f"{short(one.ours.value)} {one.unit} of {one.stack} ({times})"
        )
        like = [p for p in pairs if (p.model, p.what, _who(p)) == (model, one.what, _who(one))]
        text += f"; so at {len(several)} of {len(like)} places" if len(like) > 1 else ""
        parts.append(text + (f"; {LEAD}" if any(p.lead for p in several) else ""))
    return f"{lead}. {'. '.join(parts)}."


def _who(one: Beside) -> str:
    return "one user" if one.batch == 1 else "batches"


def _formats(rows: Sequence[Record]) -> list[str]:
    """What each further number format of the engine changes for one user."""
    texts = []
    for name in ("output", "decode", "j_per_1k"):
        metric = METRICS[name]
        groups = [g for g in metric.groups(rows) if of_drawn(g)]
        for group in groups:
            like = [g for g in groups if (g.model, g.of("gpu")) == (group.model, group.of("gpu"))]
            base = next((g for g in like if _plain(g)), None)
            common = metric.shapes(group) & metric.shapes(base) if base else set()
            if base is None or base is group or not common:
                continue
            shape = max(common, key=lambda s: (s[0], -s[1]))
            ratio = metric.ratio(metric.arm(group, shape), metric.arm(base, shape))
            if ratio.value is not None:
                texts.append(
                    f"vLLM, {group.model} in {group.of('dtype')} against {base.of('dtype')}, "
                    f"{metric.title} at {shape[0]:,} tokens: {short(ratio.value)} times "
                    f"{interval(ratio)} ({verdict(ratio)})."
                )
    return texts


def _prefills(rows: Sequence[Record]) -> list[str]:
    """What capturing the prefill of ours could save: what the device does not work of TTFT."""
    texts = []
    ttft, device = METRICS["ttft"], METRICS["prefill_busy"]
    for group in by_setup(rows, ("latency", "busy")):
        parts = []
        for context in sorted({r.key["context"] for r in group.rows if r.kind == "busy"}):
            here = select(group.rows, context=context)
            whole, works = ttft.of(here).value, device.of(here).value
            if whole and works:
                parts.append(f"{short(whole - works)} of {short(whole)} ms at {context:,} tokens")
        if parts:
            texts.append(
                f"{group.model} on {group.of('stack')}: without the host the first token could "
                f"come sooner by {', '.join(parts)}; the rest is the device's."
            )
    return texts


def _plain(group: Group) -> bool:
    return group.of("dtype") == "bfloat16"


def tables(rows: Sequence[Record]) -> list[Table]:
    """Those that have rows, where an engine was measured."""
    if not of_engines(rows):
        return []
    every = (
        table(rows),
        boards.table(rows),
        prefill(rows),
        routers.routed_table(rows),
        started(rows),
    )
    return [grid for grid in every if grid.rows]


def section(rows: Sequence[Record]) -> Markup:
    """The report's section; empty where no engine was measured."""
    grids = tables(rows)
    if not grids:
        return Markup("")
    text = Markup("<ul>{}</ul>").format(
        Markup("").join(Markup("<li>{}</li>").format(x[2:]) for x in conclusion(rows).splitlines())
    )
    routed = any(grid.name == "routed" for grid in grids)
    kinds = ("batch", "engine-trace")
    pictures = [html(routers.routed_figure(rows), rows, kinds)] if routed else []
    folded = Markup('<details class="more"><summary>{}, {} rows</summary>{}</details>\n')
    parts = [folded.format(grid.title, len(grid.rows), grid.html()) for grid in grids]
    return Markup("").join([SECTION, text, *pictures, *parts, Markup("</section>\n")])
