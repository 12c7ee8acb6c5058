"""The line of an arm's calls over new tokens, and what its rows cannot say together.

Decoding is never slower than the whole call, a call of one token never longer than one of many, no
step faster than its bytes allow, by either clock, and no call or window of a server uses less
energy than the idle board in its time. A pair of intervals that lie apart the wrong way round is a
`Contradiction`. What was derived from it, such as a slope, is then missing, with the pair as its
reason; what was timed directly stays, and its row gets a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lib import stats
from lib.hardware.datasheets import datasheet
from lib.records.record import KEY_FIELDS, Record, board, warning
from lib.show import wording
from lib.show.table import Column, Table
from lib.stacks.registry import STACKS
from lib.stats import Estimate

CODE = "contradiction"  # of the warning
LEAST_CALLS = 3  # of one length, for a line
# A step's bytes come from memory, whatever happened before, if they are several caches full.
SEVERAL = 4
CACHE_BYTES = 2**28  # so many bytes count as several caches where the cache is not known
TOLERANCE = 1.10  # a measured ceiling is a best of some
TIMED, SERVED = ("latency", "batch"), "serving"
ENERGY = ("energy", "energy-slope", "energy-again", "batch-energy", SERVED)
# What is derived.
DECODE, MARKED, NET = "decode throughput", "decode by device clock", "net energy"
NO_PAIR = "no two numbers of one arm contradict each other"


class Contradiction(NamedTuple):
    """A pair that cannot be, the rows that it is of, and what of them is therefore missing."""

    kind: str
    rows: tuple[Record, ...]
    missing: str
    text: str


def calls_s(row: Record) -> list[float]:
    """Seconds of each timed call of a row, of one token or of more."""
    return row.samples.get("e2e_s") or row.samples.get("ttft_s") or []


def line(rows: Iterable[Record]) -> tuple[Estimate, list[Record]]:
    """Seconds for each further token of timed calls, and the rows that are points of the line.

    A length counts from LEAST_CALLS calls on: fewer do not tell a slow stretch of the host from
    slow steps. Captured steps do not wait for the host, and two calls will do. Calls of one token
    are points; not so of several sequences in an engine (see `_in_pieces`) with two longer lengths.
    """
    timed = [r for r in rows if calls_s(r)]
    used = [r for r in timed if len(calls_s(r)) >= (2 if _captured(r) else LEAST_CALLS)]
    longer = [r for r in used if r.key["new_tokens"] > 1 or not _in_pieces(r)]
    used = longer if len({r.key["new_tokens"] for r in longer}) > 1 else used
    pairs = [(r.key["new_tokens"], t) for r in used for t in calls_s(r)]
    if len({g for g, _ in pairs}) < 2:
        counts = (f"{len(calls_s(r))} of {r.key['new_tokens']} tokens" for r in timed)
        why = f"; there are {', '.join(counts)}" if timed else ""
        need = f"a slope needs {LEAST_CALLS} calls of each of two lengths"
        return stats.missing(f"not measured: {need}{why}"), used
    slope = stats.slope([g for g, _ in pairs], [t for _, t in pairs])
    if slope.value <= 0:
        why = "not resolved: noise hides how time grows with the number of tokens"
        return stats.missing(why), used
    return slope, used


def _captured(row: Record) -> bool:
    stack = STACKS.get(row.key.get("stack"))
    return stack is not None and stack.captured


def _in_pieces(row: Record) -> bool:
    """Whether sequences end their prefill in different steps, as an engine schedules a batch.

    The first to end it decode beside the prefill of the others, and leave fewer to the last steps.
    A call of one token has neither, so that its time is no point of the line of the longer ones.
    """
    stack = STACKS.get(row.key.get("stack"))
    return stack is not None and stack.apart and row.key["batch"] > 1


def comes_from_memory(size: float | None, cache_bytes: int | None) -> bool:
    """Whether a step reads so much that no cache can serve it."""
    return bool(size) and size >= (SEVERAL * cache_bytes if cache_bytes else CACHE_BYTES)


def of_calls(rows: Sequence[Record], bytes_per_s: float | None = None) -> list[Contradiction]:
    """What timed calls of one arm, of one token and of more, cannot say together.

    `bytes_per_s` is what the memory delivers at most; None where that is no bound for these.
    """
    step_s, used = line(rows)
    pairs = []
    for one in (r for r in rows if r.samples.get("ttft_s")):
        for many in (r for r in rows if r.samples.get("e2e_s")):
            first, whole = _ends(one.samples["ttft_s"]), _ends(many.samples["e2e_s"])
            if first[0] > whole[1]:
                text = (
                    f"calls of one token take {_span(first)} s, longer than the {_span(whole)} s "
                    f"of {many.key['new_tokens']} tokens"
                )
                pairs.append(Contradiction("first token", (one, many), DECODE, text))
    pairs += [pair for row in rows for pair in _of_one(row, bytes_per_s)]
    rate = stats.inverse(step_s) if step_s.value is not None else step_s
    if rate.low is None or rate.high is None:
        return pairs
    for row in (r for r in used if r.samples.get("e2e_s")):
        low, high = (row.key["new_tokens"] / t for t in reversed(_ends(row.samples["e2e_s"])))
        if rate.high < low:
            text = (
                f"decode throughput {wording.text(rate, 'tok/s')} lies below the output throughput "
                f"{_span((low, high))} tok/s of whole calls of {row.key['new_tokens']} tokens"
            )
            kind = "decode and whole call"
            pairs.append(Contradiction(kind, tuple(used), DECODE, text))
            break
    size = max((r.value("decode_bytes") or 0 for r in used), default=0)
    if bytes_per_s and size and rate.low > bytes_per_s / size:
        text = (
            f"decode throughput {wording.text(rate, 'steps/s')} lies above the "
            f"{wording.short(bytes_per_s / size)} steps/s at which memory delivers its bytes"
        )
        pairs.append(Contradiction("bytes of a step", tuple(used), DECODE, text))
    return pairs


def _of_one(row: Record, bytes_per_s: float | None) -> list[Contradiction]:
    """What the calls of one row and their steps by the device's clock cannot be: shorter than the
    bytes of the steps allow, and steps longer than their calls."""
    steps, size = (row.key.get("new_tokens") or 1) - 1, row.value("decode_bytes") or 0
    ends = {n: _ends(row.samples[n]) for n in ("e2e_s", "decode_s") if row.samples.get(n)}
    pairs = []
    if len(ends) == 2 and ends["decode_s"][0] > ends["e2e_s"][1]:
        text = (
            f"{steps} steps take {_span(ends['decode_s'])} s by the device's clock, longer than "
            f"the {_span(ends['e2e_s'])} s of their calls"
        )
        pairs.append(Contradiction("device clock", (row,), MARKED, text))
    least_s = steps * size / bytes_per_s if bytes_per_s else 0.0
    for name, missing in (("e2e_s", DECODE), ("decode_s", MARKED)):
        if name in ends and ends[name][1] < least_s:
            text = (
                f"{steps} steps take {_span(ends[name])} s, less than the "
                f"{wording.short(least_s)} s in which memory delivers their bytes"
            )
            pairs.append(Contradiction("bytes of a call", (row,), missing, text))
    return pairs


def of_energy(row: Record) -> list[Contradiction]:
    """Whether calls of an energy row, or a window of a server, use less than the idle board would
    in their time."""
    energy_j, seconds = (row.samples.get(name) or [] for name in ("energy_j", "e2e_s"))
    if row.kind == SERVED and not row.error:
        energy_j = [row.value("energy_j")]
        seconds = [row.values["window_stop_s"] - row.values["window_start_s"]]
    energy_j, idle_w = [x for x in energy_j if x is not None], row.value("idle_w")
    if not energy_j or not seconds or not idle_w:
        return []
    used, idle = _ends(energy_j), [idle_w * t for t in _ends(seconds)]
    if used[1] >= idle[0]:
        return []
    what = "window" if row.kind == SERVED else "call"
    text = (
        f"a {what} uses {_span(used)} J, less than the {_span(idle)} J that the idle board draws "
        "in its time"
    )
    return [Contradiction("idle board", (row,), NET, text)]


def _ends(samples: Sequence[float]) -> tuple[float, float]:
    """The interval of the median; of few samples their range."""
    middle = stats.median(samples)
    return (min(samples), max(samples)) if middle.low is None else (middle.low, middle.high)


def _span(ends: Sequence[float]) -> str:
    return f"[{wording.short(ends[0])}, {wording.short(ends[1])}]"


def contradictions(
    rows: Iterable[Record], environments: Mapping[str, Mapping[str, Any]]
) -> list[Contradiction]:
    """Every pair among the rows, those of other visits among them; those of one arm were measured
    in one environment and visit."""
    rows = [one for r in rows for one in (r, *r.others) if not one.error]
    best = {  # the best read stream by card; a copy is no bound
        environments.get(r.env_id, {}).get("gpu"): r.value("read_bytes_per_s")
        for r in rows
        if r.kind == "ceilings"
    }
    arms: dict[tuple, list[Record]] = {}
    for row in (r for r in rows if r.kind in TIMED):
        fields = (str(row.key.get(name)) for name in KEY_FIELDS if name != "new_tokens")
        arms.setdefault((row.env_id, row.kind, row.visit, *fields), []).append(row)
    pairs = []
    for (env_id, *_), arm in arms.items():
        environment = environments.get(env_id, {})
        gpu, count = board(environment)
        sheet, stream = datasheet(gpu).times(count), best.get(gpu) and count * best[gpu]
        rate = sheet.memory_bytes_per_s or (stream and TOLERANCE * stream)
        size = max((r.value("decode_bytes") or 0 for r in arm), default=0)
        cache = count * (environment.get("cache_bytes") or 0) or sheet.cache_bytes
        # Of several sequences of a mixture they are those to expect of an even router, no least.
        least = (arm[0].key.get("batch") or 1) == 1 or arm[0].key.get("experts") in (None, "none")
        bound = rate if least and comes_from_memory(size, cache) else None
        pairs += of_calls(arm, bound)
    return pairs + [pair for r in rows if r.kind in ENERGY for pair in of_energy(r)]


def warned(
    rows: Sequence[Record], environments: Mapping[str, Mapping[str, Any]]
) -> tuple[Record, ...]:
    """The rows, those of a contradiction with a warning that names the pair."""
    texts: dict[int, dict[str, None]] = {}
    for pair in contradictions(rows, environments):
        for row in pair.rows:
            texts.setdefault(id(row), {})[f"{pair.missing}: {pair.text}"] = None
    if not texts:
        return tuple(rows)

    def told(row: Record) -> Record:
        return _with_warnings(row, texts.get(id(row), ()))

    visited = (replace(r, others=tuple(map(told, r.others))) if r.others else r for r in rows)
    return tuple(
        _with_warnings(v, texts.get(id(r), ())) for v, r in zip(visited, rows, strict=True)
    )


def _with_warnings(row: Record, texts: Iterable[str]) -> Record:
    """The row itself where it has them all."""
    new = [w for text in texts if (w := warning(CODE, text)) not in row.warnings]
    return replace(row, warnings=(*row.warnings, *new)) if new else row


def contradicted(rows: Iterable[Record], what: str) -> str:
    """Why `what` is derived from none of these rows, by the warnings that they carry; or empty."""
    lead = f"{what}: "
    texts = (w["text"] for r in rows for w in r.warnings if w["code"] == CODE)
    return next((text.removeprefix(lead) for text in texts if text.startswith(lead)), "")


def table(rows: Sequence[Record], environments: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every pair: which arm, what is missing for it, and the two numbers."""
    columns = [
        Column(title, numeric=False)
        for title in ("model", "arm", "pair", "missing", "what contradicts")
    ]
    lines = []
    for pair in contradictions(rows, environments):
        key = pair.rows[0].key
        names = ("stack", "experts", "context", "batch")
        arm = ", ".join(f"{n} {key[n]}" for n in names if key.get(n) not in (None, "none"))
        lines.append((str(key.get("model")), arm, pair.kind, pair.missing, pair.text))
    note = sentence(len(lines))
    return Table("contradictions", "Numbers that contradict", tuple(columns), tuple(lines), (note,))


def sentence(count: int) -> str:
    """How many pairs there are, and what became of them."""
    if not count:
        return NO_PAIR
    return (
        f"{count} pair(s) of numbers of one arm contradict each other: what was derived is "
        "missing, what was timed directly stays with a warning"
    )
