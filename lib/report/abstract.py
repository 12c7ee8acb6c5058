"""Sentences computed from rows. Each can say that no difference is resolved, or that nothing was
measured and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from lib.analysis import bounds, metrics
from lib.analysis.estimators import MIB
from lib.analysis.rows import Rows, objections
from lib.analysis.series import BASE_KINDS, Series, configuration, pair_ratio
from lib.analysis.setups import ORDER
from lib.records.record import Record, environments, machines_differ, require_comparable
from lib.show import wording
from lib.show.wording import Statement, interval, short
from lib.stats import Estimate
from lib.studies import section
from lib.studies.paper_tables import PaperTable
from lib.studies.schema import StudyFile

Arm = tuple[int, int]
Base = dict[str, Series]  # of each model, by its title
STATED = ("latency", "memory-paper", "energy")  # kinds of rows that a statement may be about


def findings(
    records: Sequence[Record], published: StudyFile, tables: Sequence[PaperTable]
) -> list[Statement]:
    """The abstract: throughput, TTFT, memory and energy with their ratios on the study's stack,
    then what other stacks change, then the paper."""
    base_of = partial(on_stack, records, published, bool(tables))
    stack = study_stack(records, published, bool(tables))
    base = base_of(stack)
    arm, reference = _arm(base, published), published["ablation_model"]
    envs = environments(records)
    if not base or arm is None:
        sentences = [
            Statement(
                "Nothing to conclude",
                f"Not measured on {stack}: there is no latency row with more than one new token.",
            )
        ]
    else:
        if reference not in base:
            reference = _fastest(base, arm)
        where = "" if stack == published["stack"] else f", on {stack}"
        sentences = [
            _throughput(base, arm, reference, envs, where),
            _ttft(base, arm, reference, envs, where),
            _memory(base, arm, envs, reference),
            _energy(base, arm, envs, reference),
        ]
        bound, meaning = _bound(base, arm, records)
        sentences += [Statement("Against the bound", f"{bound}: {meaning}")] if bound else []
    for other in others(records, stack):
        sentences += _other_stack(base_of(other), other, base, stack, arm, published, records)
    every = [*sentences, *section.against_paper(tables)]
    return [statement._replace(text=wording.once(statement.text)) for statement in every]


def _arm(base: Base, published: StudyFile) -> Arm | None:
    """The paper's context and tokens where any model has them, else the longest common context."""
    arms = [
        {
            (r.key["context"], r.key["new_tokens"])
            for r in s.rows
            if r.kind == "latency" and (r.key.get("new_tokens") or 1) > 1 and not r.error
        }
        for s in base.values()
    ]
    arms = list(filter(None, arms))
    if not arms:
        return None
    paper = (published["context"], published["new_tokens"])
    if paper in set.union(*arms):
        return paper
    common = set.intersection(*arms) or set.union(*arms)
    return max(common, key=lambda arm: (arm[0], -arm[1]))


def _fastest(base: Base, arm: Arm) -> str:
    return max(base, key=lambda m: (metrics.at("output", base[m], *arm).value or 0, m))


def _throughput(base: Base, arm: Arm, reference: str, envs: dict, where: str = "") -> Statement:
    rates = {m: metrics.at("output", s, *arm) for m, s in base.items()}
    # Throughput is tokens over time: its ratio is the inverse ratio of the times.
    others = {
        m: pair_ratio((base[m], base[reference]), envs, "latency", "e2e_s", arm)
        for m in base
        if m != reference
    }
    lead = f"Output throughput at {arm[0]:,} tokens of context and {arm[1]} new tokens{where}"
    return Statement(
        lead,
        f"{wording.levels(rates, 'tok/s')} {wording.compared(reference, others)}".strip()
        + _cautions({m: (base[m], base[reference]) for m in others}, envs, "latency", arm),
    )


def _ttft(base: Base, arm: Arm, reference: str, envs: dict, where: str = "") -> Statement:
    times = {m: metrics.at("ttft", s, *arm) for m, s in base.items()}
    one = (arm[0], 1)
    others = {
        m: pair_ratio((base[reference], base[m]), envs, "latency", "ttft_s", one)
        for m in base
        if m != reference
    }
    lead = f"Time to first token at {arm[0]:,} tokens of context{where}"
    return Statement(
        lead,
        f"{wording.levels(times, 'ms')} {wording.compared(reference, others)}".strip()
        + _cautions({m: (base[m], base[reference]) for m in others}, envs, "latency", one),
    )


def _memory(base: Base, arm: Arm, envs: dict, reference: str) -> Statement:
    lead = "Peak memory with the logits of the prompt held, as the paper's script does"
    peaks = {m: metrics.at("peak_mib", s, *arm) for m, s in base.items()}
    if all(p.value is None for p in peaks.values()):
        return Statement(lead, f"{_common_reason(peaks)}.")
    parts = [
        f"{m} {wording.size(p.value * MIB)}" if p.value is not None else f"{m} ({p.reason})"
        for m, p in peaks.items()
    ]
    least = peaks[reference].value
    rows = {m: base[m].one("memory-paper", context=arm[0], new_tokens=arm[1]) for m in base}
    less = []
    for model, peak in peaks.items():
        if model == reference or peak.value is None or least is None:
            continue
        try:
            require_comparable([rows[model], rows[reference]], envs)
        except ValueError as error:
            less.append(f"not compared with {model} ({error})")
            continue
        change = 100 * (1 - least / peak.value)
        if abs(change) < 0.05:
            less.append(f"as much as {model}")
        else:
            less.append(f"{abs(change):.1f} % {'less' if change > 0 else 'more'} than {model}")
    more = f" {reference}: {wording.listed(less)}." if less else ""
    return Statement(lead, f"{wording.listed(parts)} (single readings).{more}")


def _energy(base: Base, arm: Arm, envs: dict, reference: str) -> Statement:
    lead = "Gross energy per 1,000 generated tokens"
    joules = {m: metrics.at("j_per_1k", s, *arm) for m, s in base.items()}
    if all(e.value is None for e in joules.values()):
        return Statement(lead, f"{_common_reason(joules)}.")
    others = {
        m: pair_ratio((base[reference], base[m]), envs, "energy", "energy_j", arm)
        for m in base
        if m != reference
    }
    return Statement(
        lead,
        f"{wording.levels(joules, 'J')} {wording.compared(reference, others)}".strip()
        + _cautions({m: (base[m], base[reference]) for m in others}, envs, "energy", arm),
    )


def _bound(base: Base, arm: Arm, records: Sequence[Record]) -> tuple[str, str]:
    """Decoding against the bytes that a step must read, for steps that no cache can hold, and what
    that means; twice '' where nothing of it was measured."""
    around = [r for r in records if r.kind in ("environment", "ceilings", "trace")]
    parts, shares, sources = [], [], set()
    for model, series in base.items():
        for point in bounds.arms([*around, *series.rows]):
            share = point.mbu(realised=False, datasheet=False).value
            if (point.context, point.batch) != (arm[0], 1) or not point.from_memory or not share:
                continue
            shares.append(share)
            sources.add(point.limits.read_from)
            stated = point.mbu(realised=False, datasheet=True).value
            more = f", {stated:.0%} by the datasheet" if stated else ""
            if share > 1 and point.limits.read_from == "copy":
                more += "; a copy, which writes too, is slower than a read"
            rate = f"{short(point.steps_per_s.value)} {interval(point.steps_per_s)}".strip()
            parts.append(
                f"{model} decodes {rate} of {short(point.bound_per_s)} tok/s ({share:.0%}{more})"
            )
    if not parts:
        return "", ""
    bandwidth = "copy bandwidth" if sources == {"copy"} else "best read stream"
    meaning = f"what reading a step's bytes at this device's {bandwidth} allows."
    if max(shares) < 0.5:
        meaning += (
            " None reaches half of it, so that something other than memory limits decoding "
            "here, such as the host that drives it, and a comparison of models compares "
            "that."
        )
    return wording.listed(parts), meaning


def _other_stack(
    there: Base,
    other: str,
    base: Base,
    stack: str,
    arm: Arm | None,
    published: StudyFile,
    records: Sequence[Record],
) -> list[Statement]:
    """What a further stack changes: throughput and energy there, against the study's stack, and
    how near decoding comes to its bound."""
    envs = environments(records)
    arm = arm if _has(there, arm) else _arm(there, published)
    if arm is None:
        failed = [f"{m} ({r.error})" for m, s in there.items() for r in s.rows if r.error][:1]
        return (
            [Statement(f"On {other}", f"Nothing was timed: {wording.listed(failed)}.")]
            if failed
            else []
        )
    reference = published["ablation_model"]
    reference = reference if reference in there else _fastest(there, arm)
    parts = [(_throughput(there, arm, reference, envs, f", on {other}"), "latency", "e2e_s")]
    spent = {m: s for m, s in there.items() if any(r.kind == "energy" for r in s.rows)}
    if any(metrics.at("j_per_1k", s, *arm).value is not None for s in spent.values()):
        energy = _energy(spent, arm, envs, reference if reference in spent else min(spent))
        parts.append((Statement(f"{energy.lead}, on {other}", energy.text), "energy", "energy_j"))
    texts = [
        finding.text + _against(there, base, stack, arm, envs, kind, sample)
        for finding, kind, sample in parts
    ]
    if bound := _bound(there, arm, records)[0]:
        texts[0] += f" Without the prefill, {bound}."
    return [Statement(finding.lead, text) for (finding, *_), text in zip(parts, texts, strict=True)]


def _against(
    there: Base, base: Base, stack: str, arm: Arm, envs: dict, kind: str, sample: str
) -> str:
    """Each model's quantity on a stack over that on the study's; throughput is inverse time."""
    ratios = []
    for model in (m for m in there if m in base):
        pair = (there[model], base[model])
        ratio = pair_ratio(
            pair[::-1] if kind == "latency" else pair, envs, kind, sample, arm, ("stack",)
        )
        if ratio.value is not None:
            ratios.append(f"{model} {wording.than('', ratio)}")
    pairs = {m: (there[m], base[m]) for m in there if m in base}
    cautions = _cautions(pairs, envs, kind, arm)
    return f" Against {stack}: {wording.listed(ratios)}.{cautions}" if ratios else ""


def _cautions(pairs: Mapping[str, tuple[Series, Series]], envs: dict, kind: str, arm: Arm) -> str:
    """Of which models a ratio is one between machines, since no visit has both sides, and of which
    a row warns, in any visit."""
    apart, warned = [], []
    for model, pair in pairs.items():
        rows = [series.one(kind, context=arm[0], new_tokens=arm[1]) for series in pair]
        if all(row is not None and row.samples and not row.error for row in rows):
            apart += [model] if machines_differ(rows, envs) else []
            codes = objections(one for row in rows for one in (row, *row.others))
            warned += [f"{model} ({codes})"] if codes else []
    text = f" The ratio is one between machines: {wording.listed(apart)}." if apart else ""
    return text + (f" Rows warn, and decide nothing: {wording.listed(warned)}." if warned else "")


def _has(base: Base, arm: Arm | None) -> bool:
    return arm is not None and any(
        metrics.at("output", series, *arm).value is not None for series in base.values()
    )


def _common_reason(estimates: dict[str, Estimate]) -> str:
    text = wording.listed(sorted({e.reason for e in estimates.values()}))
    return text[:1].upper() + text[1:]


def study_stack(records: Sequence[Record], published: StudyFile, paper: bool) -> str:
    """The study's stack; without its models (`paper`) and without a row on it, the commonest."""
    counts = Counter(
        str(r.key.get("stack"))
        for r in records
        if r.kind in STATED and r.key.get("model") and not r.error
    )
    if paper or not counts or published["stack"] in counts:
        return published["stack"]
    return counts.most_common(1)[0][0]


def others(records: Sequence[Record], stack: str) -> list[str]:
    """The further stacks on which calls were timed, or failed."""
    order = ORDER["stack"]
    stacks = {str(r.key.get("stack")) for r in records if r.kind == "latency"} - {stack}
    return sorted(stacks, key=lambda s: (order.index(s) if s in order else len(order), s))


def on_stack(records: Sequence[Record], published: StudyFile, paper: bool, stack: str) -> Base:
    """The rows of each model on a stack, those that failed included; models without any left out.

    With `paper`, the study's models under its titles and in its number format; otherwise every
    model in the format in which it has most rows.
    """
    envs = environments(records)
    base = {}
    for title, rows in _by_title(records, published, paper).items():
        dtypes = Counter(
            str(r.key.get("dtype"))
            for r in rows
            if r.kind in STATED and r.key.get("stack") == stack
        )
        if not dtypes:
            continue
        commonest = max(dtypes.items(), key=lambda item: (item[1], item[0]))[0]
        setup = {"dtype": published["dtype"] if paper else commonest, "stack": stack}
        series = configuration(rows, envs, setup, BASE_KINDS)
        if series.rows:
            base[title] = series
    return base


def _by_title(
    records: Sequence[Record], published: StudyFile, paper: bool
) -> Mapping[str, Sequence[Record]]:
    if paper:
        return Rows.of(records).by_title(published["models"])
    rows: dict[str, list[Record]] = {}
    for row in records:
        if name := row.key.get("model"):
            rows.setdefault(name, []).append(row)
    return dict(sorted(rows.items()))
