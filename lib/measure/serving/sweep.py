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
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import stats
from lib.hardware import validity
from lib.measure.energy import windows
from lib.measure.serving import attribution, kinds, metrics, plan, reading, server, timing
from lib.measure.serving import window as steady
from lib.measure.serving.arrivals import LEAST_ARRIVALS, LawCheck, Lengths, Load, check_law
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.server import EndpointError
from lib.records import record, store
from lib.records.record import Record, warning

MOST_GAPS = 4000  # of a record, evenly over time; the trace has all
BUSY_CLIENT = 0.7  # of one processor, above which the client itself may be late
LATE_CLIENT_S = 0.005
SATURATED = 1.10  # twice the users must give this much more throughput
PROBES = 3
# Prompt and output tokens of the mixes that a fit of energy needs, from prompts to outputs only.
SHAPES = ((2048, 16), (1024, 128), (256, 256), (64, 512))


@dataclass
class Session:
    """What the cells of one server share. `values` and `key` go into every record."""

    endpoint: Endpoint
    records_path: Path
    device: Any
    seed: int
    env_id: str | None
    key: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    gpus: Sequence[str] = ()
    timeout_s: float = 60.0
    least_energy_s: float = steady.LEAST_ENERGY_S
    shortest_s: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the traces lie: beside the records."""
        return self.records_path.parent


def sweep(session: Session, cells: Iterable[Cell], *, idle_s: float = 10.0) -> list[Record]:
    """Every cell, its record written as soon as it is measured; between two spans of idling.

    Raises EndpointError where the server does not answer before the first cell. A cell that fails
    is a row with its error; where the server does not answer after it, so are all that follow, with
    the server's reason.
    """
    server.check(session.endpoint, timeout_s=session.timeout_s)
    rows: list[Record] = []
    _idle(session, idle_s)
    gone = ""
    for cell in cells:
        if gone:
            rows.append(store.append(session.records_path, _failed(session, cell, gone)))
            continue
        rows.append(one(session, cell))
        if rows[-1].error:
            gone = _gone(session)
    return rows


def curve(
    session: Session,
    prompt: Lengths,
    output: Lengths,
    *,
    most_users: int = 256,
    rate_shares: Sequence[float] = (0.5, 0.8),
    warmup_s: float = 5.0,
    window_s: float = 22.0,
    idle_s: float = 10.0,
) -> list[Record]:
    """From one user to saturation, the users doubled each time, then Poisson arrivals below it.

    Saturated is where twice the users give less than SATURATED times the output throughput, or
    where requests fail. The rates are `rate_shares` of the most requests a second that were seen.
    """
    server.check(session.endpoint, timeout_s=session.timeout_s)
    _idle(session, idle_s)
    cell = Cell(Load("closed", 1), prompt, output, warmup_s, window_s)
    rows = [one(session, cell)]
    while rows[-1].error is None and cell.load.value * 2 <= most_users:
        cell = replace(cell, load=Load("closed", cell.load.value * 2))
        rows.append(one(session, cell))
        if saturated(rows):
            break
    rates = [
        reading.requests_finished(row) / reading.window(row).seconds
        for row in reading.measured(rows)
    ]
    for share in rate_shares if rates and max(rates) > 0 else ():
        rate = float(f"{share * max(rates):.3g}")
        rows.append(one(session, replace(cell, load=Load("poisson", rate))))
    return rows


def mixes(
    loads: Sequence[Load], *, seed: int, warmup_s: float = 5.0, window_s: float = 22.0
) -> list[Cell]:
    """Each load with each of SHAPES, in seeded order: the mixes of `attribution.fit`.

    Three loads make twelve: eight for the fit, four held out. Loads that leave the server idle for
    a part of the time tell what idling costs.
    """
    cells = [
        Cell(load, Lengths(prompt), Lengths(output), warmup_s, window_s)
        for load in loads
        for prompt, output in SHAPES
    ]
    attribution.held_out(len(cells), seed)  # raises where they are too few for a fit
    random.Random(seed).shuffle(cells)
    return cells


def saturated(rows: Sequence[Record]) -> bool:
    """Whether the last row of a curve of doubled users gives hardly more than the one before."""
    if rows[-1].error or len(rows) < 2:
        return bool(rows[-1].error)
    before, after = (reading.tokens_per_s(row).value for row in rows[-2:])
    return not before or not after or after < SATURATED * before


def one(session: Session, cell: Cell) -> Record:
    """Measure a cell and append its record; an error becomes a row with the error."""
    try:
        row = measure(session, cell)
    except (EndpointError, RuntimeError, OSError, ValueError) as error:
        row = _failed(session, cell, record.first_line(error))
    return store.append(session.records_path, row)


def measure(session: Session, cell: Cell) -> Record:
    """Run a cell and read it. Raises EndpointError where none of its requests was answered."""
    endpoint, device = session.endpoint, session.device
    page = kinds.kind(endpoint.kind).metrics
    data = plan.build(
        endpoint,
        cell,
        seed=session.seed,
        shortest_s=_shortest_s(session, cell) if cell.load.users else None,
        timeout_s=session.timeout_s,
    )
    before, metrics_reason = metrics.read(endpoint.url, page)
    folder = Path(tempfile.mkdtemp())
    try:
        with device.power_trace(uuids=session.gpus) as trace:
            rows = plan.run(data, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    after, _ = metrics.read(endpoint.url, page)
    requests = plan.requests_of(rows)
    if not any(timing.is_ok(row) for row in requests):
        server.idle_request_s(requests)  # raises with the first failure
    counted, fell = metrics.difference(before, after) if before and after else (None, "")
    outcome = _Outcome(rows, requests, trace, counted, fell or metrics_reason)
    return _record(session, cell, outcome, _sha(data))


@dataclass(frozen=True)
class _Outcome:
    """What one run gave."""

    rows: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    trace: list[dict[str, Any]]
    counted: dict[str, float] | None
    metrics_reason: str

    @property
    def zero_s(self) -> float:
        """The run's zero on the clock that processes share."""
        return self.rows[0]["zero_s"]

    @property
    def footer(self) -> dict[str, Any]:
        """The client's last row, or what is known of a client that died."""
        last = self.rows[-1]
        died = {"wall_s": None, "cpu_s": None, "stopped": "the client ended before its footer"}
        return last if last["row"] == "footer" else died


def _sha(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shortest_s(session: Session, cell: Cell) -> float:
    """Least latency of a few requests of the cell's lengths on the idle server; of half of that
    where lengths are drawn.

    The last thing before a closed loop is a burst of as many requests as it has users: a size of
    batch that the server meets for the first time may be compiled first.
    """
    prompt, output = cell.prompt.median, cell.output.median
    name = f"{prompt} {output}"
    lengths = {"prompt_tokens": max(prompt, 16), "output_tokens": output}
    if name not in session.shortest_s:
        rows = server.ask(
            session.endpoint,
            PROBES,
            seed=f"{session.seed} probe {name}",
            timeout_s=session.timeout_s,
            **lengths,
        )
        session.shortest_s[name] = server.idle_request_s(rows)
    server.ask(
        session.endpoint,
        cell.load.users,
        seed=f"{session.seed} burst {cell.label}",
        timeout_s=session.timeout_s,
        at_once=True,
        **{**lengths, "output_tokens": min(output, 8)},
    )
    drawn = cell.prompt.sigma or cell.output.sigma
    return session.shortest_s[name] / (2 if drawn else 1)


def _idle(session: Session, idle_s: float) -> None:
    """Mean board power with the server up and nothing asked, kept in the session's values."""
    device = session.device
    if "energy" in device.missing:
        session.missing["idle_w"] = device.missing["energy"]
        return
    with device.power_trace(uuids=session.gpus) as trace:
        span = windows.idle(device, idle_s)
    lenient = ("temperature_drift", "clock_drift")
    judged = validity.judge(trace, span.start_s, span.stop_s, lenient=lenient)
    if judged.mean_w is None:
        session.missing["idle_w"] = judged.reason
    else:
        session.values["idle_w"] = judged.mean_w


def _gone(session: Session) -> str:
    """Why the server does not answer any more, or ""."""
    try:
        server.check(session.endpoint, timeout_s=session.timeout_s)
    except EndpointError as error:
        return f"the server did not answer after the cell before: {error}"
    return ""


def _key(session: Session, cell: Cell) -> dict[str, Any]:
    load = cell.load
    return {
        "model": session.endpoint.model,
        **session.key,
        "stack": "server",
        "batch": load.users if load.users else load.label,
        "context": cell.prompt.label if cell.prompt.sigma else cell.prompt.median,
        "new_tokens": cell.output.label if cell.output.sigma else cell.output.median,
        "decoding": "greedy",
    }


def _failed(session: Session, cell: Cell, error: str) -> Record:
    values = {**session.values, "law": cell.load.law, "load": cell.load.value}
    return Record(
        reading.KIND, _key(session, cell), values=values, error=error, env_id=session.env_id
    )


def _record(session: Session, cell: Cell, outcome: _Outcome, sha: str) -> Record:
    facts = [timing.fact(row) for row in outcome.requests]
    stop_s = cell.warmup_s + cell.window_s
    at = steady.cut_to_seconds(steady.steady(facts, cell.load, cell.warmup_s, stop_s))
    by_second = steady.tokens_by_second(outcome.requests, at)
    gaps = _gaps(outcome.requests, at)
    slug = re.sub(r"[^a-z0-9.]+", "-", cell.label.lower()).strip("-")
    energy, missing, judged = _energy(session, outcome, at)
    missing |= {name: text for name, text in session.missing.items() if text}
    if outcome.counted is None:
        missing["metrics"] = (
            outcome.metrics_reason or "the page of counters could not be read again"
        )
    _save(session, outcome, slug)
    law = _law(cell, facts)
    cpu_s, wall_s = outcome.footer["cpu_s"], outcome.footer["wall_s"]
    values = {
        **session.values,
        "law": cell.load.law,
        "load": cell.load.value,
        "api": session.endpoint.api,
        "token_id_prompts": session.endpoint.uses_ids,
        "plan_sha": sha,
        "warmup_s": cell.warmup_s,
        "window_start_s": at.start_s,
        "window_stop_s": at.stop_s,
        "window_rule": at.rule,
        "window_reason": at.reason,
        "in_flight": steady.mean_in_flight(steady.in_flight(facts), at.start_s, at.stop_s)
        if at.seconds
        else None,
        "itl_count": len(gaps),
        "arrivals_p": law.p if law else None,
        "client_cpu_share": cpu_s / wall_s if cpu_s is not None else None,
        "requests_trace": f"requests-{slug}.jsonl.gz",
        **({"power_trace": f"power-{slug}.jsonl.gz"} if outcome.trace else {}),
        **({"metrics": outcome.counted} if outcome.counted is not None else {}),
        **energy,
    }
    return Record(
        reading.KIND,
        _key(session, cell),
        samples={**reading.columns(facts), **by_second, "itl_s": _thinned(gaps)},
        values={name: value for name, value in values.items() if value is not None},
        missing=missing,
        warnings=(*_warnings(cell, outcome, facts, at, values, law), *_gate_warnings(judged)),
        env_id=session.env_id,
    )


def _law(cell: Cell, facts: Sequence[dict[str, Any]]) -> LawCheck | None:
    """The test of the law by which requests were really sent; None for users and for a handful."""
    sent_s = [fact["sent_s"] for fact in facts if fact["sent_s"] is not None]
    if cell.load.users is not None or len(sent_s) < LEAST_ARRIVALS:
        return None
    return check_law(sent_s, cell.load)


def _gaps(requests: Sequence[dict[str, Any]], at: steady.Window) -> list[float]:
    """The gaps that were seen, of the window's requests that were answered, in their order."""
    return [
        round(gap, 6)
        for row in requests
        if timing.is_ok(row) and at.holds(row["scheduled_s"])
        for gap in timing.gaps_s(row)
    ]


def _thinned(gaps: Sequence[float]) -> list[float]:
    step = -(-len(gaps) // MOST_GAPS) or 1
    return list(gaps[::step])


def _energy(
    session: Session, outcome: _Outcome, at: steady.Window
) -> tuple[dict[str, Any], dict[str, str], validity.Window | None]:
    """Energy values of the window, what is missing and why, and the judged window."""
    if reason := session.device.missing.get("energy"):
        return {}, {"energy_j": reason}, None
    if at.whole_seconds < session.least_energy_s:
        text = f"the window has {at.seconds:g} s; the counter needs {session.least_energy_s:g}"
        return {}, {"energy_j": text}, None
    edges = outcome.zero_s + at.start_s, outcome.zero_s + at.stop_s
    judged = validity.judge(outcome.trace, *edges, idle_w=session.values.get("idle_w"))
    values = {"gates": validity.as_dicts(judged.gates), "joules": judged.joules}
    if judged.energy_j is None:
        return values, {"energy_j": judged.reason}, judged
    mean = {"energy_j": judged.energy_j, "mean_w": judged.mean_w, "estimator": judged.estimator}
    return {**values, **mean}, {}, judged


def _save(session: Session, outcome: _Outcome, slug: str) -> None:
    """The client's rows and the board's readings, both on the clock of the run."""
    session.folder.mkdir(parents=True, exist_ok=True)
    store.write_trace(session.folder / f"requests-{slug}.jsonl.gz", outcome.rows)
    if outcome.trace:
        power = ({**row, "t_s": round(row["t_s"] - outcome.zero_s, 6)} for row in outcome.trace)
        store.write_trace(session.folder / f"power-{slug}.jsonl.gz", power)


def _warnings(
    cell: Cell,
    outcome: _Outcome,
    facts: Sequence[dict[str, Any]],
    at: steady.Window,
    values: dict[str, Any],
    law: LawCheck | None,
) -> list[dict[str, str]]:
    """What a reader should beware of; each says what to do."""
    warnings: list[dict[str, str]] = []
    inside = steady.scheduled_in(facts, at)
    if at.reason:
        text = f"no steady window: {at.reason}; percentiles depend on how long the run was"
        warnings.append(warning("unsteady", text))
    if len(inside) < stats.MIN_N_MEDIAN:
        text = f"{len(inside)} requests were scheduled in the window; lengthen it, or load more"
        warnings.append(warning("few_requests", text))
    if failed := [fact["failure"] for fact in inside if fact["failure"]]:
        classes = ", ".join(f"{failed.count(name)} {name}" for name in sorted(set(failed)))
        text = f"{len(failed)} of {len(inside)} requests failed ({classes}); they are no samples"
        warnings.append(warning("failures", text))
    share = values["client_cpu_share"]
    if share is not None and share > BUSY_CLIENT:
        text = f"the client used {share:.0%} of a processor; lower the load or use a faster host"
        warnings.append(warning("client_busy", text))
    delays = [delay for fact in inside if (delay := steady.delay_s(fact)) is not None]
    if delays and (late := statistics.median(delays)) > LATE_CLIENT_S:
        text = f"the client sent its requests {late * 1e3:.1f} ms late (median); free its host"
        warnings.append(warning("client_late", text))
    cached = sum(fact["cached_tokens"] or 0 for fact in inside)
    prompts = sum(fact["prompt_tokens"] or 0 for fact in inside)
    if cached > 0.01 * prompts:
        text = f"{cached / prompts:.0%} of the prompt tokens came from a prefix cache"
        warnings.append(warning("cached", f"{text}; turn it off, or send new prompts"))
    if any(fact["first_tokens"] is None and fact["output_tokens"] for fact in inside):
        text = "chunks of unknown size: tokens are spread evenly over them, and TPOT is missing"
        warnings.append(warning("chunks_unknown", text))
    if outcome.footer["stopped"]:
        warnings.append(warning("stopped", f"the run was cut short: {outcome.footer['stopped']}"))
    if outcome.counted is not None:
        for text in metrics.compare(outcome.counted, outcome.requests):
            warnings.append(warning("metrics_differ", text))
    if law is not None and not law.ok:
        text = f"the requests were not sent as {cell.load.label}: {', '.join(law.failing)} rejected"
        warnings.append(warning("arrivals", f"{text}; free the client's host"))
    if cell.load.users and outcome.requests:
        last_s = max(fact["scheduled_s"] for fact in facts)
        if last_s < cell.warmup_s + cell.window_s - 2 * max(map(steady.latency_s, facts)):
            warnings.append(
                warning("ran_out", "the plan ran out of requests before its time was up")
            )
    return warnings


def _gate_warnings(judged: validity.Window | None) -> list[dict[str, str]]:
    return [] if judged is None else [warning(g.code, g.text) for g in judged.failing("warn")]
