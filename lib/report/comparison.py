"""A report of ratios between two result sets, such as two GPUs or two versions of the software."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import files
from lib.analysis import glossary
from lib.analysis.result_sets import COMPARED, NOT_JUDGED, Pair, Refused, Side, compare, load
from lib.analysis.setups import arm_text
from lib.analysis.waits import HOST_LIMIT, NOT_OF_CARD, UNTOLD, Cause, Waits, cause
from lib.files import ParamsError, write_text
from lib.records import jobs, store
from lib.records.record import KEY_FIELDS
from lib.show.page import data_link, document
from lib.show.table import Column, Table, write_csv
from lib.show.wording import interval, short

HARDWARE = ("gpu", "gpu_total_bytes", "power_limit_w", "sm_clock_max_hz", "memory_clock_max_hz")
HOST = ("cpu", "cpu_count", "host_score_per_s", "launch_s")
OF_ONE_RUN = ("gpu_uuid", "device", "visit")


def causes(pairs: Sequence[Pair], a: Side, b: Side) -> list[Cause]:
    """What the ratio of each pair is put down to."""
    ours, theirs = Waits(a.rows), Waits(b.rows)
    return [cause(pair.metric, pair.key, ours, theirs) for pair in pairs]


def tables(pairs: Sequence[Pair], whys: Sequence[Cause]) -> list[Table]:
    """One table for each quantity, with the key fields that differ between its rows."""
    why = {id(pair): one for pair, one in zip(pairs, whys, strict=True)}
    ratios = []
    for metric in COMPARED:
        mine = [pair for pair in pairs if pair.metric is metric]
        if not mine:
            continue
        fields = ("kind", *(f for f in KEY_FIELDS if f != "model"))
        values = {f: [p.kind if f == "kind" else p.key.get(f) for p in mine] for f in fields}
        differing = [f for f in fields if len({*map(str, values[f])}) > 1]
        same = [
            f"{f.replace('_', ' ')} {values[f][0]}"
            for f in fields
            if f not in differing and values[f][0] not in (None, "none")
        ]
        columns = (
            Column("model", numeric=False),
            *(Column(f.replace("_", " "), numeric=False) for f in differing),
            Column("A", metric.unit),
            Column("B", metric.unit),
            Column("B / A"),
            Column("verdict", numeric=False),
            Column("cause", numeric=False),
            Column("B / A of the cause"),
        )
        rows = tuple(
            (
                pair.key.get("model") or "–",
                *(values[f][i] for f in differing),
                pair.a,
                pair.b,
                pair.ratio,
                pair.verdict,
                why[id(pair)].text,
                why[id(pair)].expected,
            )
            for i, pair in enumerate(mine)
        )
        name = "ratio-" + jobs.slug(metric.title)
        ratios.append(Table(name, metric.title, columns, rows, ("all rows: " + ", ".join(same),)))
    return ratios


def refused_table(refused: Sequence[Refused]) -> Table:
    """The arms that are not compared."""
    names = ("model", "kind", "arm", "in", "reason")
    rows = tuple(
        (item.key.get("model") or "–", item.kind, arm_text(item.key), item.where, item.reason)
        for item in refused
    )
    return Table("refused", "Not compared", tuple(Column(n, numeric=False) for n in names), rows)


def findings(pairs: Sequence[Pair], refused: Sequence[Refused]) -> list[tuple[str, str]]:
    """For each quantity how many arms are higher, lower or not told apart, and the ratios."""
    sentences = []
    for metric in COMPARED:
        mine = [pair for pair in pairs if pair.metric is metric]
        if not mine:
            continue
        count = {
            v: sum(p.verdict == v for p in mine)
            for v in ("B lower", "B higher", "no difference resolved", "equal readings")
        }
        warned = sum(p.verdict.startswith(NOT_JUDGED) for p in mine)
        other = len(mine) - warned - sum(count.values())
        counts = [f"{v} in {n}" for v, n in count.items() if n]
        counts += [f"not judged in {warned} (rows warn)"] if warned else []
        counts += [f"without an interval {other}"] if other else []
        ratios = [p.ratio.value for p in mine if p.ratio.value is not None]
        ends = dict.fromkeys(short(end(ratios)) for end in (min, max)) if ratios else ()
        span = f"B / A {'from ' if len(ends) > 1 else ''}{' to '.join(ends)}"
        one = mine[0].ratio
        if len(mine) == 1 and one.value is not None:
            span = " ".join(filter(None, (f"B / A {short(one.value)}", interval(one))))
        arms = f"{len(mine)} arm" + ("s" if len(mine) > 1 else "")
        text = f"{arms} compared: {', '.join(counts)}; {span}."
        sentences.append((metric.title, text))
    if refused:
        text = f"{len(refused)} arms or quantities, each with its reason."
        sentences.append(("Not compared", text))
    if not pairs:
        sentences.insert(0, ("Nothing is comparable", "No arm of A has a partner in B."))
    return sentences


def by_cause(pairs: Sequence[Pair], whys: Sequence[Cause]) -> Table:
    """What the ratios of each quantity, model and stack are put down to: a line for each cause with
    its arms, their median B / A, the lowest and the highest, and the median of the cause alone."""
    groups: dict[tuple[str, ...], list[tuple[float, Cause]]] = {}
    several = sorted(zip(pairs, whys, strict=True), key=lambda one: COMPARED.index(one[0].metric))
    for pair, why in several:
        if why.text not in (NOT_OF_CARD, UNTOLD) and pair.ratio.value is not None:
            names = (str(pair.key.get(field) or "–") for field in ("model", "stack"))
            groups.setdefault((pair.metric.title, *names, why.text), []).append(
                (pair.ratio.value, why)
            )
    rows = []
    for names, members in groups.items():
        ratios = [ratio for ratio, _ in members]
        alone = [why.expected.value for _, why in members if why.expected.value is not None]
        own = statistics.median(alone) if alone else members[0][1].expected  # has the reason
        middle = statistics.median(ratios)
        rows.append((*names, len(members), middle, own, min(ratios), max(ratios)))
    columns = (
        *(Column(name, numeric=False) for name in ("quantity", "model", "stack", "cause")),
        Column("arms"), Column("B / A"), Column("of the cause"), Column("lowest"),
        Column("highest"),
    )  # fmt: skip
    note = (
        "B / A is the median of the arms; that of the cause is what the datasheets or the hosts' "
        "speeds give by themselves; rows that warn are among them"
    )
    return Table("causes", "What the ratios are put down to", columns, tuple(rows), (note,))


def facts(side: Side) -> dict[str, list[Any]]:
    """What each environment of a set says, by name, each value once; and the code of its runs."""
    values: dict[str, list[Any]] = {}
    for env in side.environments.values():
        flat = {k: v for k, v in env.items() if k not in (*OF_ONE_RUN, "packages")}
        flat |= env.get("packages") or {}
        for name, value in flat.items():
            if not isinstance(value, dict | list):
                values.setdefault(name, []).append(value)
    for run in side.runs:
        git = run.get("git")
        commit = git.get("commit") if isinstance(git, dict) else git
        values.setdefault("commit", []).append(commit and str(commit)[:12])
    return {name: list(dict.fromkeys(several)) for name, several in values.items()}


def values_text(values: Sequence[Any]) -> str:
    """Values as text; several numbers as their range."""
    values = [v for v in values if v is not None]
    numbers = [v for v in values if isinstance(v, float)]
    if len(numbers) > 1 and len(numbers) == len(values):
        return f"{short(min(numbers))} to {short(max(numbers))}"
    return ", ".join(short(v) if isinstance(v, float) else str(v) for v in values) or "–"


def environment_table(a: Side, b: Side) -> Table:
    """What the two sets were measured on and with, where it differs; the rest is a note."""
    ours, theirs = facts(a), facts(b)
    names = [*HARDWARE, *HOST, *(n for n in (*ours, *theirs) if n not in (*HARDWARE, *HOST))]
    texts = {n: tuple(values_text(s.get(n, [])) for s in (ours, theirs)) for n in names}
    rows = [(n.replace("_", " "), *text) for n, text in texts.items() if text[0] != text[1]]
    same = [f"{n.replace('_', ' ')} {x}" for n, (x, y) in texts.items() if x == y != "–"]
    columns = (
        Column("fact", numeric=False),
        Column("A", numeric=False),
        Column("B", numeric=False),
    )
    notes = ("the same in both: " + ", ".join(same),) if same else ()
    return Table("environments", "What differs in the environments", columns, tuple(rows), notes)


def cautions(a: Side, b: Side) -> list[str]:
    """What a reader of the ratios must know about the environments."""
    ours, theirs = facts(a), facts(b)
    sides = [{n: values_text(values) for n, values in side.items()} for side in (ours, theirs)]
    differ = {n for n in {*ours, *theirs} if sides[0].get(n, "–") != sides[1].get(n, "–")}
    groups = {"hardware": {*HARDWARE} & differ, "host CPU": {"cpu", "cpu_count"} & differ}
    software = differ - {*HARDWARE, *HOST, "copy_bytes_per_s"}
    groups["software"] = {
        name
        for name in software
        if name in ("driver", "cuda", "commit")
        or any(
            name in (env.get("packages") or {})
            for side in (a, b)
            for env in side.environments.values()
        )
    }
    causes = [name for name, members in groups.items() if members]
    sentences = []
    if len(causes) > 1:
        names = f"{', '.join(causes[:-1])} and {causes[-1]}"
        sentences.append(
            f"{names[0].upper()}{names[1:]} differ: a ratio alone does not tell which of them it "
            "is due to."
        )
    scores = [[v for v in side.get("host_score_per_s", []) if v] for side in (ours, theirs)]
    if all(scores):
        times = max(scores[1]) / max(scores[0])
        if abs(times - 1) > HOST_LIMIT:
            sentences.append(
                f"One thread of B's host is {times:.2f} times as fast as one of A's; what "
                "the host limits follows it, whatever the GPU."
            )
    beside = [name for name, side in (("A", ours), ("B", theirs)) if side.get("neighbours")]
    if len(beside) == 1:
        sentences.append(
            f"{beside[0]} was measured while other GPUs of its host had jobs of their own: what "
            "the host limits can be slower by them."
        )
    sentences.append(
        "An interval covers the repetitions of one run on each side. What changes from run "
        "to run on one machine is not in it: repeat both before a small ratio is believed."
    )
    return sentences


def text(pairs: Sequence[Pair], lines: int = 40) -> str:
    """The ratios for a console, those that differ for sure first, the largest change at the top."""
    rows = [_console_row(pair) for pair in sorted(pairs, key=_by_change)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows[:lines]]
    more = [f"and {len(rows) - lines} more in the report"] if len(rows) > lines else []
    if rows and not any(pair.key.get("model") for pair in pairs):
        more.append("of the machines alone: no number of a model is in both; the report says why")
    return "".join(f"{line}\n" for line in (*(["B / A"] if rows else []), *shown, *more))


def _by_change(pair: Pair) -> tuple[bool, float]:
    ratio = pair.ratio
    size = abs(math.log(ratio.value)) if ratio.value else 0.0
    return not ratio.resolved_from(1.0), -size


def _console_row(pair: Pair) -> tuple[str, ...]:
    ratio = pair.ratio
    value = "–" if ratio.value is None else f"{short(ratio.value)} {interval(ratio)}".strip()
    model = str(pair.key.get("model") or "–")
    return (value, pair.metric.title, model, arm_text(pair.key), pair.verdict)


def write(source_a: Path, source_b: Path, out: Path) -> tuple[Path, list[Pair]]:
    """report.html and CSV files into `out`; returns the page and the compared pairs."""
    store.refuse_released(out)
    for source in (source_a, source_b):
        if not source.is_dir() or not jobs.find(source):
            raise ParamsError(
                f"no results in {files.short(source)}; A and B take folders of run.json files"
            )
    files.require_room(out)
    a, b = load(source_a), load(source_b)
    pairs, refused = compare(a, b)
    whys = causes(pairs, a, b)
    places = environment_table(a, b)
    csvs = _csvs(pairs, whys, refused, places, out)
    text = document(
        "compare.html",
        terms=glossary.terms(),
        title=f"B against A: {b.name} against {a.name}",
        kicker="Deployment workbook · comparison",
        subtitle=f"A is {a.name} ({values_text(facts(a).get('gpu', []))}), "
        f"B is {b.name} ({values_text(facts(b).get('gpu', []))})",
        findings=findings(pairs, refused),
        cautions=cautions(a, b),
        causes=by_cause(pairs, whys),
        places=places,
        grids=tables(pairs, whys),
        refused=refused_table(refused),
        downloads=[(path.name, data_link(path.read_bytes())) for path in csvs],
        footer="Ratios are B / A. Nothing was measured here.",
    )
    write_text(out / "report.html", text)
    return out / "report.html", list(pairs)


def _csvs(
    pairs: Sequence[Pair],
    whys: Sequence[Cause],
    refused: Sequence[Refused],
    places: Table,
    out: Path,
) -> list[Path]:
    """ratios.csv, refused.csv and environments.csv in full precision."""
    ratios = (
        {
            "quantity": p.metric.title,
            "unit": p.metric.unit,
            "kind": p.kind,
            **_fields(p.key),
            "a": p.a,
            "b": p.b,
            "ratio": p.ratio,
            "verdict": p.verdict,
            "cause": why.text,
            "ratio of the cause": why.expected,
        }
        for p, why in zip(pairs, whys, strict=True)
    )
    left_out = (
        {"kind": r.kind, **_fields(r.key), "in": r.where, "reason": r.reason} for r in refused
    )
    return [
        write_csv(out / "ratios.csv", ratios),
        write_csv(out / "refused.csv", left_out),
        write_csv(out / "environments.csv", places.lines()),
    ]


def _fields(key: dict[str, Any]) -> dict[str, Any]:
    return {name: key.get(name) for name in KEY_FIELDS}
