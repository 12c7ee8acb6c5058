"""What a second card buys: a model sharded over several GPUs beside the same on one of them.

Both sides are of one engine, number format and kind of GPU. Joules and bytes of several boards are
their sum, with each of them beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lib import stats
from lib.analysis.ablations import WARNS
from lib.analysis.batch import points
from lib.analysis.estimators import decode_tok_per_s, per_1k, tokens
from lib.analysis.metrics import METRICS
from lib.analysis.routers import LEAD
from lib.analysis.rows import Rows, objections
from lib.analysis.series import visit_ratio
from lib.analysis.setups import sampled
from lib.analysis.waits import HOST_LIMIT
from lib.records.kinds import model_order
from lib.records.record import Record, board, record_id
from lib.show.table import Table, of_lines
from lib.show.wording import interval, short, verdict
from lib.stats import Estimate

TIMED, METERED = ("latency", "batch"), ("energy", "batch-energy")
TTFT, OUTPUT, DECODE, JOULES = (
    "TTFT (ms)", "output throughput (tok/s)", "decode throughput (tok/s)", "J/1K tokens",
)  # fmt: skip
CACHE = "cache reserved (GB)"
REPLICAS = "decode throughput, a model on each (tok/s)"
SIZES = {
    "weights_bytes": "weights (GB)",
    "cache_reserved_bytes": CACHE,
    "used_bytes": "memory in use (GB)",
}
SIDES = ("the side on one GPU", "the side on several")
UNEVEN = "{} ran beside a job on another GPU of the host"
NOTES = (
    "the same engine, weights, number format and kind of GPU; whole calls of the fewest tokens, "
    "decode throughput by slope, both of all users",
    "joules and bytes of several GPUs are the sum, and each of them stands beside it: energy by "
    "the boards' own counters, memory in use by NVML, less what was in use before",
    "the two sides are of different runs, so that a ratio has what changed between them in it",
)


@dataclass(frozen=True)
class Pair:
    """One quantity of a model at a place, on one GPU and on `devices` of them; `ratio` is that of
    several over one, `each` what each of several has. `users` is 0 for what no call has. `warned`
    are the codes of what the rows of the ratio warn, so that it does not say which is faster."""

    model: str
    dtype: str
    what: str
    context: int
    users: int
    devices: int
    one: Estimate
    several: Estimate
    ratio: Estimate
    each: tuple[float, ...] = ()
    warned: str = ""
    remark: str = ""

    @property
    def verdict(self) -> str:
        """Which way the ratio goes, or why its rows do not say so."""
        return f"{WARNS}{self.warned}" if self.warned else verdict(self.ratio)


def pairs(rows: Sequence[Record]) -> list[Pair]:
    """Every quantity that was measured on one GPU and on several, by model."""
    rows = Rows.of(rows)
    sides: dict[tuple, dict[int, list[Record]]] = {}
    for row in rows.of_kinds((*TIMED, *METERED, "engine")):
        if row.key.get("engine"):
            setup = (row.key[name] for name in ("model", "weights", "dtype", "stack"))
            kind, _ = board(rows.environment(row))
            by_count = sides.setdefault((*setup, str(kind)), {})
            by_count.setdefault(row.key.get("devices") or 1, []).append(row)
    both = [
        (setup, count, by_count[1], several)
        for setup, by_count in sides.items()
        for count, several in sorted(by_count.items())
        if count > 1 and 1 in by_count
    ]
    both.sort(key=lambda side: (model_order(side[0][0]), side[0], side[1]))
    found = [[*_of_sides(rows, *side)] for side in both]
    return [pair for mine in found for pair in (*mine, *_replicas(mine))]


def _replicas(mine: Sequence[Pair]) -> Iterator[Pair]:
    """What shares a model beside the same GPUs with a model on each, for as many users together."""
    decoded = {(one.context, one.users): one for one in mine if one.what == DECODE}
    for (context, users), shared in decoded.items():
        alone = decoded.get((context, users / shared.devices))
        if alone is not None:
            each = stats.scaled(alone.one, shared.devices)
            remarks = "; ".join(dict.fromkeys(filter(None, (shared.remark, alone.remark))))
            warned = ", ".join(dict.fromkeys(filter(None, (shared.warned, alone.warned))))
            ratio = stats.quotient(shared.several, each)
            told = {"one": each, "ratio": ratio, "remark": remarks, "warned": warned}
            yield replace(shared, what=REPLICAS, **told)


def _of_sides(
    rows: Rows, setup: tuple, count: int, alone: Sequence[Record], several: Sequence[Record]
) -> Iterator[Pair]:
    """Of each place the quantities, those of calls of one sequence from the first kind that has
    them."""
    passed, shown = points.checked(rows), set()
    for kind in (*TIMED, *METERED, "engine"):
        mine = [r for r in several if r.kind == kind]
        places = {(r.key["context"] or 0, r.key["batch"] or 0) for r in mine if not r.error}
        for place in sorted(places):
            sides = [
                _same_host(rows, mine, [r for r in side if r.kind == kind and _at(r) == place])
                for side in (alone, several)
            ]
            if not all(sides):
                continue
            checked = all(points.is_gated(r, passed) for side in sides for r in side)
            remarks = [] if kind == "engine" or checked else [LEAD]
            remarks += [] if kind == "engine" else [*_hosts(rows, sides), *_capped(sides)]
            for what, *values in _quantities(kind, *sides):
                if (what, place) not in shown:
                    shown.add((what, place))
                    users = 0 if kind == "engine" else place[1]
                    where = (setup[0], setup[2], what, place[0], users, count)
                    yield Pair(*where, *values, remark="; ".join(remarks))


def _hosts(rows: Rows, sides: Sequence[Sequence[Record]]) -> list[str]:
    """What of their hosts makes two sides unlike: jobs on other GPUs, and the speed of a thread."""
    envs = [[rows.environment(r) for r in side] for side in sides]
    beside = [any(env.get("neighbours") for env in side) for side in envs]
    told = [UNEVEN.format(SIDES[beside[1]])] if beside[0] != beside[1] else []
    scores = [[v for env in side if (v := env.get("host_score_per_s"))] for side in envs]
    if all(scores):
        one, several = map(max, scores)
        if abs(several / one - 1) > HOST_LIMIT:
            told.append(
                f"a thread of the host did {one:.1f} and {several:.1f} million loops a second"
            )
    return told


def _capped(sides: Sequence[Sequence[Record]]) -> list[str]:
    """Which sides the power limit of the board held back."""
    held = [any(w["code"] == "power_cap" for r in side for w in r.warnings) for side in sides]
    names = [name for name, is_held in zip(SIDES, held, strict=True) if is_held]
    return [f"the power limit held back {' and '.join(names)}"] if names else []


def _at(row: Record) -> tuple[int, int]:
    return (row.key["context"] or 0, row.key["batch"] or 0)


def _same_host(rows: Rows, several: Sequence[Record], side: Sequence[Record]) -> list[Record]:
    """Those rows of a side that were measured on a board of the sharded ones, where there are."""
    numbers = {one["uuid"] for row in several for one in rows.environment(row).get("boards") or ()}
    near = [r for r in side if rows.environment(r).get("gpu_uuid") in numbers]
    return near or list(side)


def _quantities(
    kind: str, one: Sequence[Record], several: Sequence[Record]
) -> Iterator[tuple[str, Estimate, Estimate, Estimate, tuple[float, ...], str]]:
    """Name, value on one GPU, on several, their ratio, what each of several has, and of what the
    rows of the ratio warn."""
    if kind == "engine":
        for name, title in SIZES.items():
            a, b = (_bytes(side[-1], name) for side in (one, several))
            each = several[-1].value(f"board_{name}") or ()
            yield title, a, b, stats.quotient(b, a), tuple(size / 1e9 for size in each), ""
        return
    lengths = sorted({r.key["new_tokens"] for r in one} & {r.key["new_tokens"] for r in several})
    whole = next((n for n in lengths if n > 1), None)
    if kind in TIMED:
        if 1 in lengths:
            a, b = (_of_length(side, 1) for side in (one, several))
            values = [sampled([row], "ttft_s", factor=1e3) for row in (a, b)]
            yield TTFT, *values, visit_ratio(b, a, "ttft_s"), (), _warned((a, b))
        if whole:
            a, b = (_of_length(side, whole) for side in (one, several))
            values = [stats.inverse(sampled([row], "e2e_s"), tokens(row)) for row in (a, b)]
            yield OUTPUT, *values, visit_ratio(a, b, "e2e_s"), (), _warned((a, b))
        rates = [
            stats.scaled(decode_tok_per_s(side), side[0].key["batch"] or 1)
            for side in (one, several)
        ]
        ratio = METRICS["decode"].ratio(several, one)
        used = [r for r in (*one, *several) if record_id(r) in ratio.records]
        yield DECODE, *rates, ratio, (), _warned(used)
    elif whole:
        a, b = (_of_length(side, whole) for side in (one, several))
        values = [_joules(row) for row in (a, b)]
        blocks = zip(*b.samples.get("board_energy_j") or (), strict=True)
        each = tuple(statistics.fmean(board_j) * per_1k(b) for board_j in blocks)
        yield JOULES, *values, stats.quotient(*values[::-1]), each, _warned((a, b))


def _warned(rows: Sequence[Record]) -> str:
    return objections(one for row in rows for one in (row, *row.others))


def _of_length(side: Sequence[Record], new_tokens: int) -> Record:
    return [r for r in side if r.key["new_tokens"] == new_tokens][-1]


def _joules(row: Record) -> Estimate:
    """Joules for 1,000 tokens: the mean over blocks."""
    if not row.samples.get("energy_j"):
        return sampled([row], "energy_j")
    return stats.scaled(stats.mean(row.samples["energy_j"]), per_1k(row))


def _bytes(row: Record, name: str) -> Estimate:
    if row.value(name) is None:
        return stats.missing(f"not measured: {row.missing.get(name, 'no reading')}")
    return stats.exact(row.value(name) / 1e9)


def table(rows: Sequence[Record]) -> Table:
    """One GPU and several side by side, with the ratio and its interval."""
    lines = [
        {
            "model": one.model,
            "quantity": one.what,
            "users": one.users or "",
            "context": one.context or "",
            "of several / of one": one.ratio,
            "one GPU": one.one,
            "all of them": one.several,
            "GPUs": one.devices,
            "dtype": one.dtype,
            "each": ", ".join(map(short, one.each)),
            "remark": "; ".join(filter(None, (one.remark, one.warned and one.verdict))),
        }
        for one in pairs(rows)
    ]
    grid = of_lines("boards", "What a second card buys", lines)
    return replace(grid, notes=NOTES) if lines else grid


def sentences(rows: Sequence[Record]) -> list[str]:
    """Of each model what several GPUs buy, and what a token then costs: for the fewest users and
    for the most."""
    return [_bought(*setup, found) for setup, found in _by_model(pairs(rows)) if DECODE in found]


def _by_model(every: Iterable[Pair]) -> list[tuple[tuple[str, str, int], dict[str, list[Pair]]]]:
    """Model, dtype and number of GPUs, with the pairs that have a ratio by their quantity."""
    by_model: dict[tuple[str, str, int], dict[str, list[Pair]]] = {}
    for one in every:
        if one.ratio.value is not None:
            found = by_model.setdefault((one.model, one.dtype, one.devices), {})
            found.setdefault(one.what, []).append(one)
    return [*by_model.items()]


def _times(ratio: Estimate) -> str:
    return f"{short(ratio.value)} times {interval(ratio)}".rstrip()


def _bought(model: str, dtype: str, count: int, found: dict[str, list[Pair]]) -> str:
    every = sorted(found[DECODE], key=lambda one: (one.users, one.context))
    places = {(one.users, one.context): one for one in (every[0], every[-1])}
    joules = {(one.users, one.context): one.ratio.value for one in found.get(JOULES, ())}
    texts = []
    for (users, context), one in places.items():
        who = "one user" if users == 1 else f"{users} users"
        energy = joules.get((users, context))
        more = f", and a call takes {short(energy)} times the energy" if energy else ""
        texts.append(
            f"for {who} of {context:,} tokens {_times(one.ratio)} as fast as on one "
            f"({one.verdict}): at {count} times the price a token costs "
            f"{short(count / one.ratio.value)} times as much{more}"
        )
    caches = (short(one.ratio.value) for one in found.get(CACHE, ()))
    texts += [f"the cache holds {ratio} times as much" for ratio in caches]
    for one in found.get(REPLICAS, ())[-1:]:
        texts.append(
            f"for {one.users} users together {_times(one.ratio)} as fast as {count} GPUs with a "
            f"model on each ({one.verdict})"
        )
    remarks = dict.fromkeys(one.remark for one in places.values() if one.remark)
    told = "".join(f" ({remark})" for remark in remarks)
    return f"{model} in {dtype} decodes on {count} GPUs {'; '.join(texts)}{told}."


def in_short(rows: Sequence[Record]) -> str:
    """Of each model how fast several GPUs decode beside one, over all numbers of users, what a
    token then costs, and what as many GPUs with a model on each do; empty without such rows."""
    checked = (one for one in pairs(rows) if not one.remark.startswith(LEAD))
    texts = []
    for (model, dtype, count), found in _by_model(checked):
        if ratios := [one.ratio.value for one in found.get(DECODE, ())]:
            shared = [one.ratio.value for one in found.get(REPLICAS, ())]
            prices = [count / ratio for ratio in ratios]
            more = f" ({_between(shared)} times that of a model on each)" if shared else ""
            texts.append(
                f"{model} ({dtype}) on {count}: {_between(ratios)} times the speed{more}, "
                f"{_between(prices)} times the price of a token"
            )
    return f"{'; '.join(texts)}." if texts else ""


def _between(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values)))
    return " to ".join(ends)
