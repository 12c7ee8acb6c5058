"""A load curve: one cell after another on one server, each a record, with joules where a board is.

Each cell is a run of the client: a warm-up under the cell's own load that is not drained, the
steady window, and a tail of arrivals behind it. The board is sampled around the whole run, and its
energy is that of the window.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import stats
from lib.hardware import validity
from lib.measure.energy import windows
from lib.measure.serving import kinds, metrics, plan, server, timing
from lib.measure.serving import window as steady
from lib.measure.serving.arrivals import LEAST_ARRIVALS, LawCheck, Lengths, Load, check_law
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.server import EndpointError
from lib.records import record, store
from lib.records.record import KEY_FIELDS, Record, warning

KIND, MIX = "serving", "serving-mix"
LEAST_MIXES = 12  # a fit of energy takes eight, and four are held out
MOST_GAPS = 4000  # of a record, evenly over time; the trace has all
BUSY_CLIENT = 0.7  # of one processor, above which the client itself may be late
LATE_CLIENT_S = 0.005
STALL_S, STALL_TTFTS = 0.5, 3.0  # a silence of all streams longer than both is told
SATURATED = 1.10  # twice the users must give this much more throughput
PROBES = 3
# Prompt and output tokens of the mixes that a fit of energy needs, from prompts to outputs only.
SHAPES = ((2048, 16), (1024, 128), (256, 256), (64, 512))
Fact = steady.Fact


@dataclass
class Session:
    """What the cells of one server share. `values` and `key` go into every record.

    By lengths, `shortest_s` is the least latency on the idle server, `under_load_s` the users of
    the last closed loop and the least latency in it. `gone` says why the server does not answer
    any more; cells are then rows with that error.
    """

    endpoint: Endpoint
    records_path: Path
    device: Any
    seed: int
    env_id: str | None
    key: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    least_energy_s: float = steady.LEAST_ENERGY_S
    shortest_s: dict[str, float] = field(default_factory=dict)
    under_load_s: dict[str, tuple[int, float]] = field(default_factory=dict)
    gone: str = ""

    @property
    def folder(self) -> Path:
        """Where the traces lie: beside the records."""
        return self.records_path.parent


def begin(session: Session, idle_s: float) -> None:
    """Ask once, and watch the board idle. Raises EndpointError where the server is not right."""
    server.check(session.endpoint, timeout_s=session.timeout_s, seed=session.seed)
    device = session.device
    if reason := session.missing.get("energy_j") or device.missing.get("energy"):
        session.missing |= {"energy_j": reason, "idle_w": reason}
        return
    with device.power_trace() as trace:
        span = windows.idle(device, idle_s)
    lists = [row["pids"] for row in trace if row.get("pids")]
    device.own_processes = [len(lists[0]) if lists else 1]  # the server's, and this one
    lenient = ("temperature_drift", "clock_drift")
    own = device.own_processes
    idle = validity.judge(trace, span.start_s, span.stop_s, lenient=lenient, own=own)
    if idle.mean_w is None:
        session.missing["idle_w"] = idle.reason
    else:
        session.values["idle_w"] = idle.mean_w


def sweep(session: Session, cells: Iterable[Cell], kind: str = KIND) -> list[Record]:
    """Every cell, its record written as soon as it is measured.

    A cell that fails is a row with its error; where the server does not answer after it, so are all
    that follow, with the server's reason.
    """
    return [one(session, cell, kind) for cell in cells]


def curve(
    session: Session, cell: Cell, *, most_users: int, rate_shares: Sequence[float]
) -> list[Record]:
    """From one user to saturation, the users doubled each time, then Poisson arrivals below it.

    `cell` gives lengths and times. Saturated is where twice the users give less than SATURATED
    times the output throughput. The rates are `rate_shares` of the most requests a second that were
    seen.
    """
    rows: list[Record] = []
    users = 1
    while users <= most_users and not (rows and (rows[-1].error or saturated(rows))):
        rows.append(one(session, replace(cell, load=Load("closed", users))))
        users *= 2
    most_per_s = max((finished_per_s(row) for row in rows if not row.error), default=0)
    rates = [float(f"{share * most_per_s:.3g}") for share in rate_shares if most_per_s]
    return rows + sweep(session, [replace(cell, load=Load("poisson", rate)) for rate in rates])


def mixes(loads: Sequence[Load], cell: Cell, seed: int) -> list[Cell]:
    """Each load with each of SHAPES, in seeded order; `cell` gives the times.

    Three loads make twelve: eight for a fit of energy, four held out. Loads that leave the server
    idle for a part of the time tell what idling costs.
    """
    cells = [
        replace(cell, load=load, prompt=Lengths(prompt), output=Lengths(output))
        for load in loads
        for prompt, output in SHAPES
    ]
    if len(cells) < LEAST_MIXES:
        raise ValueError(
            f"a fit of energy needs {LEAST_MIXES} mixes, four of them held out, got {len(cells)}; "
            f"give at least {-(-LEAST_MIXES // len(SHAPES))} loads"
        )
    random.Random(seed).shuffle(cells)
    return cells


def saturated(rows: Sequence[Record]) -> bool:
    """Whether the last row of a curve of doubled users gives hardly more than the one before."""
    if len(rows) < 2:
        return False
    before, after = (_output_per_s(row) for row in rows[-2:])
    return after < SATURATED * before or not after


def _output_per_s(row: Record) -> float:
    seconds = row.samples["output_tokens_by_s"]
    return sum(seconds) / len(seconds) if seconds else 0.0


def finished_per_s(row: Record) -> float:
    """Answers a second: those that were as asked and ended in the window."""
    start_s, stop_s = (row.values[f"window_{edge}_s"] for edge in ("start", "stop"))
    ends = zip(row.samples["end_s"], row.samples["failure"], strict=True)
    count = sum(start_s <= end_s < stop_s and not failure for end_s, failure in ends)
    return count / (stop_s - start_s) if stop_s > start_s else 0.0


def one(session: Session, cell: Cell, kind: str = KIND) -> Record:
    """Measure a cell and append its record; an error becomes a row with the error."""
    try:
        if session.gone:
            raise EndpointError("unreachable", session.gone)
        row = measure(session, cell, kind)
    except (EndpointError, RuntimeError, OSError, ValueError) as error:
        values = {**session.values, "law": cell.load.law, "load": cell.load.value}
        text, env_id = record.first_line(error), session.env_id
        row = Record(kind, _key(session, cell), values=values, error=text, env_id=env_id)
        session.gone = session.gone or _gone(session)
    return store.append(session.records_path, row)


def _gone(session: Session) -> str:
    """Why the server does not answer any more, or ""."""
    try:
        server.check(session.endpoint, timeout_s=session.timeout_s)
    except EndpointError as error:
        return f"the server did not answer after the cell before: {error}"
    return ""


def measure(session: Session, cell: Cell, kind: str = KIND) -> Record:
    """Run a cell and read it. Raises EndpointError where none of its requests was answered."""
    endpoint = session.endpoint
    page = kinds.kind(endpoint.kind).metrics
    data = plan.build(
        endpoint,
        cell,
        seed=session.seed,
        shortest_s=_shortest_s(session, cell) if cell.load.users else None,
        timeout_s=session.timeout_s,
    )
    before, reason = metrics.read(endpoint.url, page)
    with tempfile.TemporaryDirectory() as folder, session.device.power_trace() as trace:
        rows = plan.run(data, Path(folder))
    after, later_reason = metrics.read(endpoint.url, page)
    requests = plan.requests_of(rows)
    least_s = server.idle_request_s(requests)  # raises with the first failure if none was answered
    if cell.load.users:
        session.under_load_s[_lengths(cell)] = (cell.load.users, least_s)
    counters = None
    if before is not None and after is not None:
        counters, reason = metrics.difference(before, after)
    run = Run(rows, requests, trace, counters, reason or later_reason)
    return _record(session, cell, run, kind, _sha(data))


@dataclass(frozen=True)
class Run:
    """What one run gave: the client's rows, the board's readings, the server's counters or why
    there are none."""

    rows: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    trace: list[dict[str, Any]]
    counters: dict[str, float] | None
    reason: str

    @property
    def zero_s(self) -> float:
        """The run's zero on the clock that processes share."""
        return self.rows[0]["zero_s"]

    @property
    def footer(self) -> dict[str, Any]:
        """The client's last row, or what is known of a client that died."""
        last = self.rows[-1]
        dead = {"wall_s": None, "cpu_s": None, "stopped": "the client ended before its footer"}
        return last if last["row"] == "footer" else dead


def _sha(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _lengths(cell: Cell) -> str:
    return f"{cell.prompt.label} {cell.output.label}"


def _shortest_s(session: Session, cell: Cell) -> float:
    """The least that a request of the cell can take: half of the least of a few on the idle server,
    or of all among fewer users; half of that again where lengths are drawn.

    The last thing before a closed loop is a burst of as many requests as it has users: a size of
    batch that the server meets for the first time may be compiled first.
    """
    prompt, output, name = cell.prompt.median, cell.output.median, _lengths(cell)
    common = {"prompt_tokens": max(prompt, 16), "timeout_s": session.timeout_s}
    if name not in session.shortest_s:
        seed = f"{session.seed} probe {name}"
        rows = server.ask(session.endpoint, PROBES, seed=seed, output_tokens=output, **common)
        session.shortest_s[name] = server.idle_request_s(rows)
    seed, few = f"{session.seed} burst {cell.label}", min(output, 8)
    server.ask(
        session.endpoint, cell.load.users, seed=seed, output_tokens=few, at_once=True, **common
    )
    users, least_s = session.under_load_s.get(name, (0, 0.0))
    least_s = max(session.shortest_s[name], least_s if users <= cell.load.users else 0.0)
    return least_s / (4 if cell.prompt.sigma or cell.output.sigma else 2)


def _key(session: Session, cell: Cell) -> dict[str, Any]:
    load = cell.load.label
    if cell.prompt.sigma or cell.output.sigma:
        load = cell.label
    return dict.fromkeys(KEY_FIELDS) | {
        "model": session.endpoint.model,
        **session.key,
        "stack": "server",
        "experts": "the server's",
        "server": session.endpoint.kind,
        "load": load,
        "batch": cell.load.users,
        "context": cell.prompt.median,
        "new_tokens": cell.output.median,
        "decoding": "greedy",
    }


def _record(session: Session, cell: Cell, run: Run, kind: str, sha: str) -> Record:
    facts = [timing.fact(row) for row in run.requests]
    stop_s = cell.warmup_s + cell.window_s
    at = steady.cut_to_seconds(steady.steady(facts, cell.load, cell.warmup_s, stop_s))
    gaps = [
        round(gap, 6)
        for row in run.requests
        if timing.is_ok(row) and at.holds(row["scheduled_s"])
        for gap in timing.gaps_s(row)
    ]
    energy, missing, verdict = _energy(session, run, at)
    missing = {**session.missing, **missing}
    if run.counters is None:
        missing["metrics"] = run.reason
    law = _law(cell, facts)
    cpu_s, wall_s = run.footer["cpu_s"], run.footer["wall_s"]
    in_flight = steady.in_flight(facts)
    values = {
        **session.values,
        "law": cell.load.law,
        "load": cell.load.value,
        "seed": session.seed,
        "api": session.endpoint.api,
        "token_id_prompts": session.endpoint.uses_ids,
        "plan_sha": sha,
        "warmup_s": cell.warmup_s,
        "window_start_s": at.start_s,
        "window_stop_s": at.stop_s,
        "window_rule": at.rule,
        "window_reason": at.reason,
        "in_flight": steady.mean_in_flight(in_flight, at.start_s, at.stop_s)
        if at.seconds
        else None,
        "itl_count": len(gaps),
        "silence_s": timing.silence_s(run.requests, at),
        "arrivals_p": law.p if law else None,
        "client_cpu_share": cpu_s / wall_s if cpu_s is not None else None,
        "metrics": run.counters,
        **_save(session, run, f"{'' if kind == KIND else 'mix-'}{cell.label}"),
        **energy,
    }
    samples = {name: [fact[name] for fact in facts] for name in steady.FACTS}
    samples |= timing.tokens_by_second(run.requests, at) | {"itl_s": _thinned(gaps)}
    gates = [] if verdict is None else verdict.failing("warn")
    return Record(
        kind,
        _key(session, cell),
        samples=samples,
        values={name: value for name, value in values.items() if value is not None},
        missing=missing,
        warnings=(
            *_warnings(cell, run, facts, at, values, law),
            *(warning(gate.code, gate.text) for gate in gates),
        ),
        env_id=session.env_id,
    )


def _law(cell: Cell, facts: Sequence[Fact]) -> LawCheck | None:
    """The test of the law by which requests were really sent; None for users and for a handful."""
    times_s = [fact["sent_s"] for fact in facts if fact["sent_s"] is not None]
    if cell.load.users is not None or len(times_s) < LEAST_ARRIVALS:
        return None
    return check_law(times_s, cell.load)


def _thinned(gaps: Sequence[float]) -> list[float]:
    step = -(-len(gaps) // MOST_GAPS) or 1
    return list(gaps[::step])


def _energy(
    session: Session, run: Run, at: steady.Window
) -> tuple[dict[str, Any], dict[str, str], validity.Window | None]:
    """Energy values of the window, what is missing and why, and the judged window."""
    if "energy_j" in session.missing:
        return {}, {}, None
    if at.whole_seconds < session.least_energy_s:
        text = f"the window has {at.seconds:g} s; the counter needs {session.least_energy_s:g}"
        return {}, {"energy_j": text}, None
    edges = run.zero_s + at.start_s, run.zero_s + at.stop_s
    idle_w, own = session.values.get("idle_w"), session.device.own_processes
    window = validity.judge(run.trace, *edges, idle_w=idle_w, own=own)
    values = {"gates": validity.as_dicts(window.gates), "joules": window.joules}
    if window.energy_j is None:
        return values, {"energy_j": window.reason}, window
    mean = {"energy_j": window.energy_j, "mean_w": window.mean_w, "estimator": window.estimator}
    return {**values, **mean}, {}, window


def _save(session: Session, run: Run, label: str) -> dict[str, str]:
    """Write the client's rows and the board's readings, both on the clock of the run; their names.

    The kind of server is in the name: a second run with another one replaces nothing.
    """
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{session.endpoint.kind} {label}".lower()).strip("-")
    names = {"requests_trace": f"requests-{slug}.jsonl.gz"}
    session.folder.mkdir(parents=True, exist_ok=True)
    store.write_trace(session.folder / names["requests_trace"], run.rows)
    if run.trace:
        names["power_trace"] = f"power-{slug}.jsonl.gz"
        power = ({**row, "t_s": round(row["t_s"] - run.zero_s, 6)} for row in run.trace)
        store.write_trace(session.folder / names["power_trace"], power)
    return names


def _warnings(
    cell: Cell,
    run: Run,
    facts: Sequence[Fact],
    at: steady.Window,
    values: dict[str, Any],
    law: LawCheck | None,
) -> list[dict[str, str]]:
    """What a reader should beware of; each says what to do."""
    warnings: list[dict[str, str]] = []
    requests = steady.scheduled_in(facts, at)
    if at.reason:
        text = f"no steady window: {at.reason}; percentiles depend on how long the run was"
        warnings.append(warning("unsteady", text))
    if len(requests) < stats.MIN_N_MEDIAN:
        text = f"{len(requests)} requests were scheduled in the window; lengthen it, or load more"
        warnings.append(warning("few_requests", text))
    own = [fact for fact in facts if fact["failure"] != "cancelled"]
    for told, where in ((requests, ""), (own, " of the whole run")):
        if failures := [fact["failure"] for fact in told if fact["failure"]]:
            classes = ", ".join(f"{failures.count(name)} {name}" for name in sorted(set(failures)))
            text = f"{len(failures)} of {len(told)} requests{where} failed ({classes})"
            warnings.append(warning("failures", f"{text}; they are no samples"))
            break  # those outside the window are told where none are inside: they ended it
    share = values["client_cpu_share"]
    if share is not None and share > BUSY_CLIENT:
        text = f"the client used {share:.0%} of a processor; lower the load or use a faster host"
        warnings.append(warning("client_busy", text))
    delays = [delay for fact in requests if (delay := steady.delay_s(fact)) is not None]
    if delays and (late := statistics.median(delays)) > LATE_CLIENT_S:
        text = f"the client sent its requests {late * 1e3:.1f} ms late (median); free its host"
        warnings.append(warning("client_late", text))
    waits = [fact["first_s"] - fact["scheduled_s"] for fact in requests if fact["first_s"]]
    silence = values["silence_s"]
    if waits and silence > max(STALL_S, STALL_TTFTS * statistics.median(waits)):
        text = f"no user got anything for {silence:.2f} s: the server compiled, or stopped to read"
        text += " prompts that came together; a longer warm-up tells which"
        warnings.append(warning("stalled", text))
    hits = sum(fact["cached_tokens"] or 0 for fact in requests)
    prompts = sum(fact["prompt_tokens"] or 0 for fact in requests)
    if hits > 0.01 * prompts:
        text = f"{hits / prompts:.0%} of the prompt tokens came from a prefix cache"
        warnings.append(warning("cached", f"{text}; turn it off, or send new prompts"))
    if any(fact["first_tokens"] is None and fact["output_tokens"] for fact in requests):
        text = "chunks of unknown size: tokens are spread evenly over them, and TPOT is missing"
        warnings.append(warning("chunks_unknown", text))
    if run.footer["stopped"]:
        warnings.append(warning("stopped", f"the run was cut short: {run.footer['stopped']}"))
    if run.counters is not None:
        for text in metrics.compare(run.counters, run.requests):
            warnings.append(warning("metrics_differ", text))
    if law is not None and not law.ok:
        text = f"the requests were not sent as {cell.load.label}: {', '.join(law.failing)} rejected"
        warnings.append(warning("arrivals", f"{text}; free the client's host"))
    if cell.load.users and run.requests:
        last_s = max(fact["scheduled_s"] for fact in facts)
        if last_s < cell.warmup_s + cell.window_s - 2 * max(map(steady.latency_s, facts)):
            warnings.append(
                warning("ran_out", "the plan ran out of requests before its time was up")
            )
    return warnings
