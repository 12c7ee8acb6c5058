"""What the paper's columns mean, computed from rows: which rows are the paper's, and one rule each.

A rule takes the rows of one model in one configuration, a context and a number of new tokens, and
returns an estimate; without the rows it says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lib import stats
from lib.ape import ape
from lib.records.record import Record, environments, require_comparable, select
from lib.stats import Estimate

PUBLISHED = Path(__file__).parents[1] / "params" / "published" / "arxiv-2508.16700.yaml"
MIB = 2**20
BASE_KINDS = ("latency", "memory-paper", "energy", "card")


@dataclass(frozen=True)
class Series:
    """The rows of one model in one configuration; without rows, `reason` says why."""

    rows: tuple[Record, ...] = ()
    reason: str = ""

    def one(self, kind: str, **key: Any) -> Record | None:
        """The last row of a kind with these key fields."""
        return next(reversed(select(self.rows, kind, **key)), None)

    def label(self, kind: str | None = None) -> str:
        """What the numbers were measured with: weights, experts, stack, dtype."""
        row = next((r for r in self.rows if kind in (None, r.kind) and r.key.get("stack")), None)
        if row is None:
            return ""
        experts = row.key.get("experts") or "none"
        parts = [f"{row.key.get('weights')} weights", row.key["stack"], str(row.key.get("dtype"))]
        return ", ".join(parts + ([f"experts {experts}"] if experts != "none" else []))


@dataclass(frozen=True)
class Study:
    """The published values, and for each of the paper's models the rows to compare with them."""

    published: dict[str, Any]
    base: dict[str, Series]
    ablation: dict[str, Series]
    environments: dict[str, dict[str, Any]]


def load_published(path: str | Path = PUBLISHED) -> dict[str, Any]:
    """The paper's tables as printed, with units as written and as meant."""
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def paper_name(model: str | None, published: dict[str, Any]) -> str | None:
    """The paper's title of a model, or None where the paper does not have it."""
    for title, names in published["models"].items():
        if str(model).lower() in {name.lower() for name in names}:
            return title
    return None


def study(records: Sequence[Record], published: dict[str, Any]) -> Study:
    """Choose, for each of the paper's models, the configuration that is the paper's."""
    envs = environments(records)

    def rows_of(title: str) -> list[Record]:
        return [r for r in records if paper_name(r.key.get("model"), published) == title]

    base = {t: configuration(rows_of(t), envs, published, BASE_KINDS) for t in published["models"]}
    rows = rows_of(published["ablation_model"])
    free = {"precision": ("dtype",), "experts": ("experts",), "stack": ("stack",)}
    ablation = {
        name: configuration(rows, envs, published, (f"ablation-{name}",), free.get(name, ()))
        for name in ("decoding", "context", "precision", "stack")
    }
    return Study(published, base, ablation, envs)


def configuration(
    rows: Sequence[Record],
    envs: dict[str, dict[str, Any]],
    published: dict[str, Any],
    kinds: Sequence[str],
    free: Sequence[str] = (),
) -> Series:
    """Rows of the given kinds that share GPU, weights, dtype, stack and experts.

    Stack and dtype must be the paper's. Among several sets the one with the most arms is taken,
    then checkpoint weights before random ones; `free` names what the arms are meant to change.
    """
    fields = [f for f in ("weights", "dtype", "stack", "experts") if f not in free]
    wanted = {f: published[f] for f in ("dtype", "stack") if f not in free}
    groups: dict[tuple, list[Record]] = {}
    cards = [r for r in rows if r.kind == "card"]
    for row in rows:
        key = row.key
        if row.kind not in kinds or row.kind == "card" or key.get("batch", 1) not in (1, None):
            continue
        if any(key.get(name) != value for name, value in wanted.items()):
            continue
        if row.kind in BASE_KINDS and key.get("decoding") not in ("greedy", None):
            continue
        gpu = envs.get(row.env_id or "", {}).get("gpu")
        groups.setdefault((str(gpu), *(str(key.get(f)) for f in fields)), []).append(row)
    if not groups:
        names = " or ".join(kind for kind in kinds if kind != "card")
        what = " in ".join(str(wanted[f]) for f in ("stack", "dtype") if f in wanted)
        return Series((), f"not measured: no {names} row" + (f" with {what}" if what else ""))

    def rank(item: tuple[tuple, list[Record]]) -> tuple:
        arms = sum(r.error is None for r in item[1])
        return (arms, item[1][0].key.get("weights") == "checkpoint", item[0])

    return Series(tuple(cards + max(groups.items(), key=rank)[1]))


def samples(
    series: Series, kind: str, name: str, context: int, new_tokens: int
) -> tuple[list[float], str]:
    """Raw repetitions of one arm, or an empty list and the reason."""
    row = series.one(kind, context=context, new_tokens=new_tokens)
    if row is None:
        what = f"no {kind} row at {context} context and {new_tokens} new tokens"
        return [], series.reason or f"not measured: {what}"
    if row.error:
        return [], f"failed: {row.error}"
    reason = row.missing.get(name) or row.missing.get(name.removesuffix("_j")) or f"no {name}"
    values = [x for x in row.samples.get(name) or [] if x is not None]
    return values, "" if values else f"not measured: {reason}"


def estimate(found: tuple[list[float], str], q: float = 50, factor: float = 1.0) -> Estimate:
    """The q-th percentile of what `samples` found, in another unit, or its reason."""
    values, reason = found
    return stats.scaled(stats.percentile(values, q), factor) if values else stats.missing(reason)


def ttft_ms(series: Series, context: int, new_tokens: int) -> Estimate:
    """Median time of generate() with one new token, prefill included (ms)."""
    return estimate(samples(series, "latency", "ttft_s", context, 1), factor=1e3)


def p50_ms(series: Series, context: int, new_tokens: int) -> Estimate:
    """Median wall time of the whole call (ms)."""
    return estimate(samples(series, "latency", "e2e_s", context, new_tokens), factor=1e3)


def p95_ms(series: Series, context: int, new_tokens: int) -> Estimate:
    """95th percentile of the wall time (ms), or the largest of n where n is too small."""
    return estimate(samples(series, "latency", "e2e_s", context, new_tokens), 95, 1e3)


def output_tok_per_s(
    series: Series, context: int, new_tokens: int, kind: str = "latency"
) -> Estimate:
    """Generated tokens / median wall time of the call, prefill included: the paper's TPOT."""
    found = samples(series, kind, "e2e_s", context, new_tokens)
    return stats.inverse(estimate(found), new_tokens)


def peak_mib(series: Series, context: int, new_tokens: int) -> Estimate:
    """Allocator peak in the paper's protocol, in MiB (2^20 bytes): one reading, no interval."""
    row = series.one("memory-paper", context=context, new_tokens=new_tokens)
    if row is None:
        return stats.missing(series.reason or f"not measured: no memory-paper row at {context}")
    value = row.value("peak_bytes")
    if row.error or value is None:
        reason = row.missing.get("peak_bytes", "no peak")
        return stats.missing(f"failed: {row.error}" if row.error else f"not measured: {reason}")
    return stats.exact(value / MIB)


def joules_per_1k(
    series: Series, context: int, new_tokens: int, name: str = "energy_j"
) -> Estimate:
    """Median gross joules of a call / generated tokens x 1000, by the energy counter."""
    return estimate(samples(series, "energy", name, context, new_tokens), factor=1e3 / new_tokens)


def tokens_per_j(series: Series, context: int, new_tokens: int) -> Estimate:
    """Generated tokens per gross joule: what the paper calls tokens/W."""
    return stats.inverse(joules_per_1k(series, context, new_tokens), 1e3)


def active_billion(series: Series, context: int = 0, new_tokens: int = 0) -> Estimate:
    """Nominal active parameters by architecture (10^9), counted on the model card."""
    card = series.one("card")
    if card is None or card.value("active_params") is None:
        return stats.missing("not measured: no model card among the rows")
    return Estimate(card.value("active_params") / 1e9, n=1, method="counted")


def _efficiency(series: Series, context: int, new_tokens: int, name: str) -> Estimate:
    """One quotient of `lib.ape` on nominal active parameters."""
    active = active_billion(series)
    if active.value is None:
        return active
    arm = (series, context, new_tokens)
    quotients = ape(
        active_params=round(active.value * 1e9),
        output_tok_per_s=output_tok_per_s(*arm),
        ttft_s=stats.scaled(ttft_ms(*arm), 1e-3),
        tok_per_j=tokens_per_j(*arm),
        peak_bytes=None,
    )
    return getattr(quotients, name)


def ape_tpot(series: Series, context: int, new_tokens: int) -> Estimate:
    """Output throughput per active 10^9 parameters (tok/s/B)."""
    return _efficiency(series, context, new_tokens, "tok_per_s_per_b")


def ape_ttft(series: Series, context: int, new_tokens: int) -> Estimate:
    """1 / TTFT per active 10^9 parameters (1/s/B)."""
    return _efficiency(series, context, new_tokens, "inverse_ttft_per_s_per_b")


def ape_energy(series: Series, context: int, new_tokens: int) -> Estimate:
    """Tokens per joule and active 10^9 parameters (tokens/J/B)."""
    return _efficiency(series, context, new_tokens, "tok_per_j_per_b")


def tok_per_s_per_1000_mib(series: Series, context: int, new_tokens: int) -> Estimate:
    """Output throughput / (peak MiB / 1000): the paper's TPOT/GB by its own arithmetic."""
    peak = peak_mib(series, context, new_tokens)
    if peak.value is None:
        return peak
    return stats.scaled(output_tok_per_s(series, context, new_tokens), 1e3 / peak.value)


def pair_ratio(
    pair: tuple[Series, Series],
    envs: dict[str, dict[str, Any]],
    kind: str,
    name: str,
    arm: tuple[int, int],
    differ: Sequence[str] = (),
) -> Estimate:
    """Ratio of medians of a sample of two models, refused where the rows are not comparable.

    `differ` names what may differ because it is the point, such as the stack of one model.
    """
    rows = [s.one(kind, context=arm[0], new_tokens=arm[1]) for s in pair]
    found = [samples(s, kind, name, *arm) for s in pair]
    for values, reason in found:
        if not values:
            return stats.missing(reason)
    try:
        require_comparable(rows, envs, differ=differ)
    except ValueError as error:
        return stats.missing(str(error))
    return stats.ratio(found[0][0], found[1][0])


def percent_change(estimate: Estimate) -> Estimate:
    """A ratio as a change in percent: 100 (r - 1)."""
    ends = {
        k: None if (v := getattr(estimate, k)) is None else 100 * (v - 1)
        for k in ("value", "low", "high")
    }
    return replace(estimate, **ends)


def throughput_change_pct(before: tuple[list, str], after: tuple[list, str]) -> Estimate:
    """Change of output throughput in percent from one arm to another (bootstrap interval).

    Throughput is tokens / time, so its ratio is the inverse ratio of the times.
    """
    for values, reason in (before, after):
        if not values:
            return stats.missing(reason)
    return percent_change(stats.ratio(before[0], after[0]))
