"""What changes if it is measured right: the order of the models, metric by metric.

As printed and by the study's protocol, models are ordered by their values alone, as the study does.
By the corrected definition two models whose intervals overlap are tied, and a model without an
interval is not placed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from lib import stats
from lib.records.record import Record
from lib.show.table import Column, Table, Text
from lib.show.wording import short
from lib.stats import Estimate
from lib.studies import evidence, forms, verdict
from lib.studies.arxiv_2508_16700.audit import JOULES, PEAK, RATE, TTFT
from lib.studies.evidence import Evidence, Map, gather
from lib.studies.study import Absent, Published

Values = Mapping[str, Estimate]


@dataclass(frozen=True)
class Metric:
    """One quantity: where the study prints it, by its protocol, by ours, and on a bound stack.

    The last three are names of `forms.METRICS`.
    """

    name: str
    higher: bool
    unit: str
    printed: Callable[[Published, str], float]
    protocol: str
    ours: str
    ours_as: str
    bound: str = ""


def _kv_printed(p: Published, model: str) -> float:
    return p.fact("kv_reported_mib", model, p.data["context"])


METRICS = (
    Metric("throughput", True, "tok/s", lambda p, m: p.value(1, m, RATE), "output_tok_per_s",
           "decode_tok_per_s", "decode throughput", "decode_tok_per_s"),
    Metric("time to first token", False, "ms", lambda p, m: p.value(1, m, TTFT),
           "ttft_ms", "ttft_ms", "medians with intervals", "ttft_ms"),
    Metric("energy per 1,000 tokens", False, "J", lambda p, m: p.value(6, m, JOULES),
           "paper_joules_per_1k", "joules_per_1k", "the board's counter", "joules_per_1k"),
    Metric("peak memory", False, "MiB", lambda p, m: p.value(5, m, PEAK),
           "peak_mib", "generate_peak_mib", "the peak of generate()"),
    Metric("KV cache", False, "MiB", _kv_printed, "above_baseline_mib", "kv_mib",
           "the bytes of its tensors"),
    Metric("throughput per billion active parameters", True, "tok/s",
           lambda p, m: p.value(8, m, "APE-TPOT"), "ape_tpot", "ape_tpot_traced",
           "the parameters that a step was traced to use", "ape_decode_traced"),
)  # fmt: skip


@dataclass(frozen=True)
class Ranking:
    """One metric's orders, best first: each a sentence, and what changes from print to ours."""

    metric: str
    printed: str
    protocol: str
    ours: str
    ours_as: str
    bound: str
    change: str


def rankings(records: Sequence[Record], study: Published) -> list[Ranking]:
    """Every metric of METRICS for the study's models."""
    e = gather(records, study)
    return [_ranking(e, metric) for metric in METRICS]


def _ranking(e: Evidence, metric: Metric) -> Ranking:
    models = e.published.models
    try:
        printed = {m: as_printed(metric.printed(e.published, m)) for m in models}
    except Absent as reason:
        printed = {m: stats.missing(str(reason.args[0])) for m in models}
    columns = {
        "protocol": _comparable(e, e.like_paper, metric.protocol),
        "ours": _comparable(e, e.base, metric.ours),
    }
    bound = "does not depend on the stack"
    if metric.bound:
        bound = order(_comparable(e, e.bound, metric.bound), metric)
    return Ranking(
        f"{metric.name} ({metric.unit})",
        by_value(printed, metric),
        by_value(columns["protocol"], metric),
        order(columns["ours"], metric),
        metric.ours_as,
        bound,
        changes(printed, columns["ours"], metric),
    )


def as_printed(value: float) -> Estimate:
    """A printed value, which is ranked as it stands."""
    return Estimate(value, n=1, method=verdict.READING)


def _comparable(e: Evidence, m: Map, name: str) -> Values:
    """The values of a metric, without an interval where a row warns, or why their models must not
    be compared."""
    values = {
        x: verdict.settled(forms.METRICS[name].at(e, m, x), e.doubts) for x in e.published.models
    }
    models = [x for x in values if values[x].value is not None and m[x].rows]
    rows = [next(r for r in m[x].rows if r.kind != "card") for x in models]
    reason = evidence.refused(e, rows)
    return dict.fromkeys(values, reason) if reason else values


def by_value(values: Values, metric: Metric) -> str:
    """Models by value alone, best first; a model without one is named at the end."""
    models = _sorted(values, metric)
    places = [f"{i}. {m} {short(values[m].value)}" for i, m in enumerate(models, start=1)]
    return "; ".join(places + _unplaced(values, models))


def order(values: Values, metric: Metric) -> str:
    """Models best first; neighbours whose intervals overlap share a place, marked "="."""
    models = _sorted({m: x for m, x in values.items() if verdict.ends(x) is not None}, metric)
    groups: list[list[str]] = []
    for model in models:
        if groups and _tied(values[groups[-1][-1]], values[model]):
            groups[-1].append(model)
        else:
            groups.append([model])
    places, place = [], 1
    for group in groups:
        sign = f"{place}." if len(group) == 1 else f"{place}=."
        places += [f"{sign} {m} {short(values[m].value)}" for m in group]
        place += len(group)
    return "; ".join(places + _unplaced(values, models))


def _sorted(values: Values, metric: Metric) -> list[str]:
    models = [m for m in values if values[m].value is not None]
    return sorted(models, key=lambda m: values[m].value, reverse=metric.higher)


def _unplaced(values: Values, ranks: Sequence[str]) -> list[str]:
    """The models without a place, by reason; the reason alone where it is that of all."""
    reasons: dict[str, list[str]] = {}
    for model in (m for m in values if m not in ranks):
        reasons.setdefault(values[model].reason or "no interval", []).append(model)
    if not ranks and len(reasons) == 1:
        return list(reasons)
    return [f"{' and '.join(names)}: {why}" for why, names in reasons.items()]


def _tied(a: Estimate, b: Estimate) -> bool:
    (low_a, high_a), (low_b, high_b) = verdict.ends(a), verdict.ends(b)
    return low_a <= high_b and low_b <= high_a


def changes(printed: Values, ours: Values, metric: Metric) -> str:
    """Pair by pair: which orders of the study turn round, and which are not resolved."""
    turned, tied, open_, same = [], [], [], 0
    for a, b in combinations(printed, 2):
        pair = f"{a} and {b}"
        if None in (printed[a].value, printed[b].value) or not all(
            verdict.ends(ours[m]) for m in (a, b)
        ):
            open_.append(pair)
        elif _tied(ours[a], ours[b]):
            tied.append(pair)
        elif (printed[a].value > printed[b].value) != (ours[a].value > ours[b].value):
            turned.append(pair)
        else:
            same += 1
    texts = [
        f"{', '.join(pairs)} {what}"
        for pairs, what in (
            (turned, "change places"),
            (tied, "tie: no difference resolved"),
            (open_, "cannot be compared"),
        )
        if pairs
    ]
    if len(open_) == len(list(combinations(printed, 2))):
        return "no pair can be compared"
    if same and not texts:
        return "the order holds"
    total = same + len(turned) + len(tied) + len(open_)
    return "; ".join(texts + ([f"{same} of {total} pairs hold"] if same else []))


def table(rankings: Sequence[Ranking]) -> Table:
    """The rankings as a table."""
    titles = (
        "metric",
        "the paper prints",
        "its protocol, measured",
        "measured right",
        "device-bound",
        "what changes",
    )
    rows = tuple(
        tuple(
            tuple(map(Text, text.split("; ")))
            for text in (r.printed, r.protocol, f"{r.ours}; by {r.ours_as}", r.bound, r.change)
        )
        for r in rankings
    )
    rows = tuple((r.metric, *cells) for r, cells in zip(rankings, rows, strict=True))
    notes = ("best first; models that share a place, marked =, have intervals that overlap",)
    columns = tuple(Column(title, numeric=False, sortable=False) for title in titles)
    title = "What changes if you measure it right"
    return Table("rankings", title, columns, rows, notes, prose=True)
