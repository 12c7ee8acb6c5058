"""Energy of whole calls on the GPU board, in blocks, with idle power beside it.

The boundary is the board: no CPU, no DRAM, no fans of the host. A cell (context, new tokens) is
measured in several blocks; a block is one window of back-to-back calls. Contexts take turns in
seeded order, reversed in every second round, so that a slow drift falls on all of them alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import stats
from lib.hardware import joules, validity
from lib.hardware.device import time_call
from lib.hardware.validity import Gate
from lib.measure import vllm
from lib.measure.energy import blocks, windows
from lib.measure.energy.blocks import Block, Cell
from lib.measure.energy.windows import Span
from lib.measure.session import track
from lib.records import store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.stacks import registry
from lib.stacks.registry import STACKS

WARMUP_LIMIT_S = 30.0


@dataclass
class Session:
    """What all windows of one model and batch share. `blocks` fills as they are measured.

    Each context has a stack of its own: the buffers of a captured one are read as a whole.
    """

    model: Any
    stack: str
    folder: Path
    seed: int
    env_id: str | None
    gpus: Sequence[str] = ()
    batch: int = 1
    ids: dict[int, Any] = field(default_factory=dict)
    generate: dict[int, Any] = field(default_factory=dict)
    lead_tokens: dict[int, int] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    blocks: dict[Cell, list[Block]] = field(default_factory=dict)

    def call(self, context: int, new_tokens: int) -> windows.Call:
        """A call that checks its number of tokens."""
        return windows.counted(self.generate[context], self.ids[context], new_tokens)

    def lead(self, context: int, new_tokens: int) -> windows.Call:
        """The work before and after a window of such calls: a shorter call where any length is
        the same program, the call itself where a length is captured or compiled for itself."""
        return self.call(context, self.lead_tokens.get(context, new_tokens))


def sweep(
    model: Any,
    *,
    stack: str = STUDY_STACK,
    contexts: Sequence[int],
    new_tokens: int,
    block_contexts: Sequence[int],
    repeats: int,
    other_repeats: int = 0,
    slope_tokens: Sequence[int] = (),
    slope_repeats: int = 0,
    window_s: float,
    idle_s: float,
    sampler_pairs: int = 0,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
    kind: str = "energy",
) -> list[Record]:
    """Every cell in its blocks, between two spans of idling; rows are written at the end, also
    when the measurement is interrupted, so that no window is lost.

    `block_contexts` get `repeats` blocks and the lengths of the slope; the others get
    `other_repeats` blocks. `kind` tells the rows of a second pass from those of the first.
    """
    cells = blocks.cells_of(
        contexts,
        new_tokens,
        block_contexts,
        repeats,
        other_repeats,
        slope_tokens,
        slope_repeats,
        kind,
    )
    rows: list[Record] = []
    session = open_session(
        model,
        stack,
        Path(records_path),
        seed,
        env_id,
        (cell.context for cell in cells),
        new_tokens,
        longest=max(new_tokens, *slope_tokens, 0),
    )
    try:
        session.values |= idle_power(session, idle_s, "before")
        first = cells[0]
        session.values |= windows.warm_up(
            session.lead(first.context, new_tokens), model.device, WARMUP_LIMIT_S
        )
        rows += sampler_check(session, first, sampler_pairs, records_path)
        rounds = blocks.plan(cells, seed)
        for number, order in enumerate(track(rounds, f"energy of {model.name}"), start=1):
            measure_round(session, order, f"trace-{number}", window_s)
        session.values |= idle_power(session, idle_s, "after")
    finally:
        session.values |= idle_both(session.values)
        rows += [store.append(records_path, row_of(session, cell)) for cell in session.blocks]
        if STACKS[stack].apart and not model.ended:
            rows.append(store.append(records_path, model.start_row(env_id)))
    return rows


def open_session(
    model: Any,
    stack: str,
    records_path: Path,
    seed: int,
    env_id: str | None,
    contexts: Iterable[int],
    new_tokens: int,
    *,
    longest: int = 0,
    batch: int = 1,
) -> Session:
    """Prompts, and for `generate()` how many tokens make a call that is long enough to lead in.

    Calls to come have `new_tokens` tokens, or up to `longest`, in each of `batch` sequences. One of
    that length is made here: the first waits for the allocator, a capture or the compiler.
    """
    session = Session(
        model, stack, records_path.parent, seed, env_id, model.device.gpus_of(model.net), batch
    )
    for context in dict.fromkeys(contexts):
        subject = registry.subject(model, stack, capacity=context + max(new_tokens, longest))
        session.ids[context] = subject.prompt(context, seed=seed, batch=batch)
        session.generate[context] = subject.generate
        if stack == STUDY_STACK:
            session.lead_tokens[context] = windows.tokens_for(
                session.generate[context], session.ids[context], model.device, new_tokens
            )
        if STACKS[stack].apart:
            for length in {new_tokens, max(new_tokens, longest)}:
                vllm.warm_up(model, session.ids[context], length)
        elif "energy" not in model.device.missing:
            time_call(session.call(context, max(new_tokens, longest)), model.device)
    return session


def idle_power(session: Session, idle_s: float, when: str) -> dict[str, Any]:
    """Mean power of all boards (W) with the model loaded and nothing running, and of each of
    several; empty without readings."""
    device = session.model.device
    if "energy" in device.missing:
        return {}
    with device.power_trace(uuids=session.gpus) as trace:
        span = windows.idle(device, idle_s)
    save(session, f"trace-idle-{when}", trace)
    window = validity.judge(
        trace,
        span.start_s,
        span.stop_s,
        lenient=("temperature_drift", "clock_drift"),
        own=device.own_processes,
    )
    boards_w = [joules / window.seconds for joules in window.boards_j]
    each = {f"idle_{when}_board_w": boards_w} if boards_w else {}
    return {f"idle_{when}_w": window.mean_w, "idle_reason": window.reason, **each}


def idle_both(values: dict[str, Any]) -> dict[str, Any]:
    """The mean of idling before and after, and half of their difference as its uncertainty."""
    both = [values.get(f"idle_{when}_w") for when in ("before", "after")]
    readings = [watts for watts in both if watts is not None]
    if not readings:
        return {}
    spread = {"idle_error_w": abs(readings[1] - readings[0]) / 2} if len(readings) == 2 else {}
    return {"idle_w": sum(readings) / len(readings), **spread}


def sampler_check(
    session: Session, cell: Cell, pairs: int, records_path: str | Path
) -> list[Record]:
    """The same call with and without the sampler, in turns; a gate for all windows follows.

    samples: `with_s` and `without_s`, neighbours of one pair; `again_with_s` and `again_without_s`
    of fresh pairs that check an alarm.
    """
    device = session.model.device
    if not pairs or "energy" in device.missing:
        session.gates.append(
            validity.sampler_disturbs(stats.missing("no pairs of calls were asked"))
        )
        return []
    tokens = session.lead_tokens.get(cell.context, cell.new_tokens)
    call = session.call(cell.context, tokens)
    times = timed_pairs(session, call, pairs)
    gate = validity.sampler_disturbs(stats.paired_ratio(*times.values()))
    if gate.level == "invalid":
        fresh = timed_pairs(session, call, pairs)
        gate = validity.repeated(
            gate, validity.sampler_disturbs(stats.paired_ratio(*fresh.values()))
        )
        times |= {f"again_{name}": values for name, values in fresh.items()}
    session.gates.append(gate)
    row = Record(
        "energy-sampler",
        session.model.key(stack=session.stack, context=cell.context, new_tokens=tokens),
        times,
        dict(session.model.source),
        env_id=session.env_id,
    )
    return [store.append(records_path, row)]


def timed_pairs(session: Session, call: windows.Call, pairs: int) -> dict[str, list[float]]:
    """Seconds of calls `with_s` and `without_s` the sampler, which of a pair is first in turns."""
    times: dict[str, list[float]] = {"with_s": [], "without_s": []}
    for number in range(pairs):
        names = ("with_s", "without_s") if number % 2 else ("without_s", "with_s")
        for name in names:
            times[name].append(one_call(session, call, sampled=name == "with_s"))
    return times


def one_call(session: Session, call: windows.Call, *, sampled: bool) -> float:
    """Seconds of one call with the sampler running, or without it."""
    device = session.model.device
    if not sampled:
        return time_call(call, device)[0]
    with device.power_trace(uuids=session.gpus):
        return time_call(call, device)[0]


def measure_round(
    session: Session,
    order: Sequence[Cell],
    name: str,
    window_s: float,
    prepare: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """One window of each cell under one trace; what they gave is added to the session.

    `prepare` is called before the lead-in of each.
    """
    rng = random.Random(f"{session.seed} {name}")

    def spans() -> list[windows.Span]:
        taken = []
        for cell in order:
            prepare(cell)
            call, lead = _call_and_lead(session, cell)
            taken.append(windows.busy(call, lead, session.model.device, window_s, rng))
        return taken

    _measure(session, order, name, spans)


def measure_together(session: Session, order: Sequence[Cell], name: str, window_s: float) -> None:
    """The same for cells of about the same power: one lead-in and one lead-out for all."""
    rng = random.Random(f"{session.seed} {name}")
    calls = [_call_and_lead(session, cell) for cell in order]
    _measure(
        session,
        order,
        name,
        lambda: windows.in_turn(calls, session.model.device, window_s, rng),
    )


def _measure(
    session: Session, order: Sequence[Cell], name: str, spans: Callable[[], list[windows.Span]]
) -> None:
    """The spans of windows, one for each cell, under one trace, and what they gave."""

    def traced() -> tuple[list[windows.Span], list[dict[str, Any]]]:
        with session.model.device.power_trace(uuids=session.gpus) as trace:
            taken = spans()
        return taken, trace

    _keep(session, order, *vllm.while_warm(session.model, traced), name)


def _call_and_lead(session: Session, cell: Cell) -> tuple[windows.Call, windows.Call]:
    shape = (cell.context, cell.new_tokens)
    return session.call(*shape), session.lead(*shape)


def _keep(
    session: Session, order: Sequence[Cell], spans: Sequence[Span], trace: joules.Trace, name: str
) -> None:
    """Save the trace and add to each cell the block that its window is."""
    zero_s = save(session, name, trace)
    for place, (cell, span) in enumerate(zip(order, spans, strict=True)):
        block = judged(session, trace, span, name, place, zero_s)
        session.blocks.setdefault(cell, []).append(block)


def judged(
    session: Session, trace: joules.Trace, span: Span, name: str, place: int, zero_s: float
) -> Block:
    """What the trace says about one window."""
    trace = joules.cut(trace, span.start_s, span.stop_s, 2.0)
    idle_w = session.values.get("idle_before_w")
    window = validity.judge(
        trace,
        span.start_s,
        span.stop_s,
        idle_w=idle_w,
        session=session.gates,
        calls_s=span.calls_s,
        own=session.model.device.own_processes,
    )
    paper = [joules.over_boards(joules.paper_j, trace, *edges)[0] for edges in span.calls_s]
    mean = None if None in paper else sum(paper) / len(paper)
    halves, _ = joules.additivity(trace, span.start_s, span.stop_s)
    return Block(span.less(zero_s), window, name, place, mean, halves)


def row_of(session: Session, cell: Cell) -> Record:
    """The row of one cell; what its samples are stands in `measure.energy.blocks.samples_of`."""
    model, idle_w, of_cell = session.model, session.values.get("idle_w"), session.blocks[cell]
    missing = blocks.missing_of(of_cell, model.device.missing.get("energy"))
    if idle_w is None:
        reason = session.values.get("idle_reason") or model.device.missing.get("energy")
        missing |= dict.fromkeys(("idle_w", "net_energy_j"), reason or "idling was not measured")
    shared = {name: value for name, value in session.values.items() if value not in (None, "")}
    return Record(
        kind=cell.kind,
        key=model.key(
            stack=session.stack,
            context=cell.context,
            new_tokens=cell.new_tokens,
            batch=session.batch,
            **({"weights": f"random-{cell.weights}"} if cell.weights else {}),
        ),
        samples=blocks.samples_of(of_cell, idle_w),
        values={**model.source, **shared, **blocks.values_of(of_cell)},
        missing=missing,
        warnings=blocks.warnings_of(of_cell),
        env_id=session.env_id,
    )


def save(session: Session, name: str, trace: joules.Trace) -> float:
    """Write a trace beside the records, its time counted from its first reading; returns that."""
    if not trace:
        return 0.0
    zero_s = trace[0]["t_s"]
    rows = ({**row, "t_s": round(row["t_s"] - zero_s, 6)} for row in trace)
    store.write_trace(session.folder / f"{name}.jsonl.gz", rows)
    return zero_s
