"""A visit: the arms that wait for the host, measured twice in one stretch of time on one machine.

Times of `generate()` differ from machine to machine, and on one machine from hour to hour, by more
than the repetitions within an hour tell. So the same short protocol is repeated on many visits, an
estimate is taken over their medians, and a ratio of two models is paired within each. Within a
visit the models come in the order A B C C B A, each built anew: what drifts steadily then cancels
between a model's two blocks, `forward` and `back`. Within a block the arms take turns, one call
each a round. The captured step (`graph`) is the control, which does not wait for the host.

The protocol is frozen: rows of different visits are compared, so a change of what is called, how
often or in which order needs another name.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from lib import files
from lib.hardware import board as hardware_board
from lib.hardware import validity
from lib.hardware.device import open_device
from lib.hardware.host import host_score_per_s
from lib.measure import latency
from lib.models import card as models_card
from lib.models import experts as implementations
from lib.models import load, origin
from lib.models.card import computed
from lib.models.prompts import prompt_ids
from lib.records import record, store
from lib.records.record import Record
from lib.stacks import logits_check, registry
from lib.stacks.registry import STACKS

MODELS = ("gpt-oss-20b", "Qwen3-32B", "Yi-34B")
CONTEXTS = (2048,)
NEW_TOKENS = 64
SHORTER = 4  # the control is timed at this fraction of the new tokens too, so that it has a slope
CONTROL = "graph"
ROUNDS = 3  # timed calls of each arm in a block, after one of the same length that is not timed
BUDGET_S = 240.0  # what a visit may take on a usual host
STOP_S = 420.0  # no round begins later than this: a slow host then gives fewer rows, not none
FORWARD, BACK = "forward", "back"
ROWS, SUMMARY = "records.jsonl", "visit.json"


class OutOfTime(RuntimeError):
    """The visit has lasted so long that no further round may begin."""


class Arm(NamedTuple):
    """What one call does; `experts` None is the implementation that the library chooses."""

    stack: str
    experts: str | None
    context: int
    new_tokens: int


class Place(NamedTuple):
    """One block of a visit: a model, the direction, and its position from 1 on."""

    model: str
    direction: str
    position: int


@dataclass
class Calls:
    """The calls of one arm in one block: times, when each began, the board before and after it."""

    arm: Arm
    generate: Any = None
    ids: Any = None
    error: str | None = None
    warmup: list[latency.Timed] = field(default_factory=list)
    timed: list[latency.Timed] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    board: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)


def order(names: Sequence[str]) -> list[Place]:
    """The blocks of a visit: the models forward, then back."""
    there = [(name, FORWARD) for name in names]
    back = [(name, BACK) for name in reversed(names)]
    return [Place(*place, position) for position, place in enumerate(there + back, start=1)]


def arms_of(card: Any, contexts: Sequence[int], new_tokens: int) -> list[Arm]:
    """The arms of a model in the order of a round.

    TTFT and a headline call on `generate()`, for a mixture of experts also with every expert
    computed; then the control at two lengths, the shorter first.
    """
    if new_tokens < 2 * SHORTER:
        raise ValueError(f"new_tokens {new_tokens} gives no slope; use at least {2 * SHORTER}")
    choices = (None, implementations.ALL_EXPERTS) if card.experts else (None,)
    arms = []
    for context in contexts:
        arms += [
            Arm(logits_check.REFERENCE, e, context, n) for e in choices for n in (1, new_tokens)
        ]
        arms += [Arm(CONTROL, None, context, n) for n in (new_tokens // SHORTER, new_tokens)]
    return arms


def identity(environment: dict[str, Any], start: str) -> dict[str, Any]:
    """What makes a visit: GPU, host (its processor; no name) and start in UTC; `id` joins them."""
    gpu = environment.get("gpu_uuid") or environment.get("device") or "no GPU"
    host = f"{environment.get('cpu')} x {environment.get('cpu_count')}"
    return {
        "id": f"{gpu}, {host}, {start}",
        "gpu_uuid": environment.get("gpu_uuid"),
        "host": host,
        "start": start,
    }


def new_folder(out: Path, identity: dict[str, Any]) -> Path:
    """`out`/<UTC date>-<first 8 digits of the GPU>, numbered where a visit has that name."""
    gpu = (identity["gpu_uuid"] or "cpu").removeprefix("GPU-")[:8]
    name, number = f"{identity['start'][:10]}-{gpu}", 1
    while (folder := out / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def ready(out: Path, names: Sequence[str], device: str) -> Any:
    """The device of a visit that may begin; `names` are models that the visit does not name itself.

    Raises ParamsError where a model is not to be had, the device is not there, or `out` cannot be
    written.
    """
    try:
        for name in names:
            origin.find(name)
        opened = open_device(device)
    except (ValueError, RuntimeError) as error:
        raise files.ParamsError(str(error)) from None
    files.require_room(out)
    return opened


def outcome(folder: Path) -> tuple[bool, list[str]]:
    """Whether a visit came to its last round, and then the error of each block that has one."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if summary["status"] != "ok":
        return False, []
    failed = [block for block in summary["blocks"] if block.get("error")]
    return True, [f"{x['model']} {x['direction']}: {x['error']}" for x in failed]


def visit(
    out: str | Path,
    *,
    names: Sequence[str] = MODELS,
    contexts: Sequence[int] = CONTEXTS,
    new_tokens: int = NEW_TOKENS,
    dtype: str = "bfloat16",
    device: Any = "cuda",
    seed: int = 0,
    code: Mapping[str, Any] | None = None,
    clean: Callable[[str], str] = str,
) -> Path:
    """Measure one visit with random weights; returns its folder below `out`.

    The folder gets records.jsonl, a block's rows as soon as it ends, and visit.json, written after
    each block: identity, status (running, ok, timeout, interrupted or failed), the machine,
    the code, each block's phases (s since the start), and medians by arm and direction. A visit
    is one stretch of time, so none is taken up again: another call is another visit. `code` says
    which code measures (its hash and commit); `clean` takes names of this machine out of a text.
    """
    device = open_device(device) if isinstance(device, str) else device
    zero_s, start = device.clock_s(), _utc()
    environment = device.environment()
    who = identity(environment, start)
    folder = new_folder(Path(out), who)
    env = record.environment_record({**environment, "visit": who["id"]})
    store.append(folder / ROWS, env)
    read_board, no_board = board_of(device)
    run = Run(
        device=device,
        visit=who["id"],
        env_id=env.env_id,
        folder=folder,
        zero_s=zero_s,
        contexts=contexts,
        new_tokens=new_tokens,
        dtype=dtype,
        seed=seed,
        read_board=read_board,
        no_board=no_board,
        clean=clean,
    )
    summary = {**_summary(who, environment, run), **(code or {})}
    run.say(f"visit {who['id']}")
    files.write_json(folder / SUMMARY, summary)
    places = order(names)
    try:
        for place in places:
            run.require_time()
            title = f"{place.position}/{len(places)} {place.model} {place.direction}"
            summary["blocks"].append(block_of(run, place, title))
            summary["medians"] = medians(store.load(folder / ROWS))
            files.write_json(folder / SUMMARY, summary)
        summary["status"] = "ok"
    except OutOfTime as error:
        summary |= {"status": "timeout", "error": str(error)}
    except KeyboardInterrupt:
        summary |= {"status": "interrupted", "error": "interrupted from outside"}
        raise
    except Exception as error:
        summary |= {"status": "failed", "error": run.shared(error)}
        raise
    finally:
        rows = store.load(folder / ROWS)
        summary |= {"end": _utc(), "seconds": run.elapsed_s(), "medians": medians(rows)}
        summary["within_budget"] = summary["status"] == "ok" and summary["seconds"] <= BUDGET_S
        files.write_json(folder / SUMMARY, summary)
        run.say(f"{summary['status']}: {len(rows)} rows")
    return folder


@dataclass
class Run:
    """What all blocks of a visit share."""

    device: Any
    visit: str
    env_id: str | None
    folder: Path
    zero_s: float
    contexts: Sequence[int]
    new_tokens: int
    dtype: str
    seed: int
    read_board: Callable[[], dict[str, Any]]
    no_board: str | None
    clean: Callable[[str], str]
    refused: dict[tuple[str, int], str] = field(default_factory=dict)  # by model and context

    def elapsed_s(self) -> float:
        """Seconds since the visit began."""
        return self.device.clock_s() - self.zero_s

    def require_time(self) -> None:
        """Raise where the visit has lasted longer than it may."""
        if (elapsed_s := self.elapsed_s()) > STOP_S:
            raise OutOfTime(f"{elapsed_s:.0f} s have passed, no round begins after {STOP_S:.0f} s")

    def say(self, text: str) -> None:
        """A line on stderr, with the time."""
        sys.stderr.write(f"{self.elapsed_s():7.1f} s  {text}\n")
        sys.stderr.flush()

    def shared(self, error: BaseException) -> str:
        """The first line of an error, without folders of this machine."""
        return self.clean(record.first_line(error))

    def write(self, row: Record, place: Place, **values: Any) -> Record:
        """Write a row of this visit: its values say which visit, direction and position."""
        told = {"visit": self.visit, "direction": place.direction, "position": place.position}
        row = replace(row, values={**row.values, **told, **values}, env_id=self.env_id)
        return store.append(self.folder / ROWS, row)


def block_of(run: Run, place: Place, title: str) -> dict[str, Any]:
    """Build the model, gate the control, let the arms take turns; returns the block's phases.

    A model that cannot be built is one row with its error. A block that is cut off writes the
    calls that it has.
    """
    run.device.empty_cache()
    host = {"host_score_per_s": host_score_per_s()}
    if launch_s := run.device.card()["launch_s"]:  # a CPU launches nothing
        host["launch_s"] = launch_s
    block = {**place._asdict(), **host, "start_s": run.elapsed_s()}
    try:
        model = load.load(
            place.model, weights="random", dtype=run.dtype, device=run.device, seed=run.seed
        )
    except Exception as error:
        key = {"model": place.model, "weights": "random", "dtype": run.dtype}
        failed = run.write(Record("latency", key, error=run.shared(error)), place, **host)
        run.say(f"{title}: {failed.error}")
        return block | {"end_s": run.elapsed_s(), "error": failed.error}
    block["loaded_s"] = run.elapsed_s()
    if place.direction == FORWARD:
        card = Record("card", model.key(), values={**model.source, **model.card.as_dict()})
        run.write(card, place, load_s=model.load_s)
        gated(run, model, place)
        run.device.empty_cache()  # both directions start from the weights alone
    block["gated_s"] = run.elapsed_s()
    turns = opened(run, model)
    try:
        for number in range(1 + ROUNDS):
            run.require_time()
            for calls in turns:
                take_turn(run, model, calls, warmup=number == 0)
            block.setdefault("warmed_s", run.elapsed_s())
            run.say(f"{title}: {_times(turns) if number else 'warmed up'}")
    finally:
        more = {**host, "load_s": model.load_s}
        for calls in turns:
            run.write(row_of(run, model, calls), place, **more)
    return block | {"end_s": run.elapsed_s()}


def gated(run: Run, model: Any, place: Place) -> None:
    """Write the control's `gate` row at each context; where it fails, the control is not timed."""
    common = {"stack": CONTROL, "seed": run.seed, "env_id": run.env_id}
    for context in run.contexts:
        try:
            run.write(logits_check.row(model, context=context, **common), place)
        except Exception as error:
            run.refused[model.name, context] = run.shared(error)


def opened(run: Run, model: Any) -> list[Calls]:
    """The arms of a model, ready to be called; those of one stack and context share it."""
    turns, stacks = [], {}
    for arm in arms_of(model.card, run.contexts, run.new_tokens):
        calls, place = Calls(arm), (arm.stack, arm.context)
        turns.append(calls)
        if arm.stack == CONTROL:
            calls.error = run.refused.get((model.name, arm.context))
        try:
            models_card.require_context(model.card, arm.context, arm.new_tokens)
            if place not in stacks:
                capacity = arm.context + run.new_tokens
                stacks[place] = registry.open_stack(arm.stack, model.net, capacity=capacity)
            calls.generate = stacks[place]
            calls.ids = prompt_ids(model, arm.context, seed=run.seed)
        except Exception as error:
            calls.error = calls.error or run.shared(error)
    return turns


def take_turn(run: Run, model: Any, calls: Calls, *, warmup: bool) -> None:
    """One call of an arm; an arm that failed says why and takes no further turn."""
    if calls.error is not None:
        return
    try:
        with implementations.using(model.net, calls.arm.experts):
            before, start_s = run.read_board(), run.elapsed_s()
            timed = latency.timed(calls.generate, calls.ids, calls.arm.new_tokens, run.device)
            after = run.read_board()
    except Exception as error:
        calls.error = run.shared(error)
        return
    if warmup:
        calls.warmup.append(timed)
    elif timed.prepare_s:
        calls.error = f"the stack {calls.arm.stack!r} captured or compiled inside a timed call"
    else:
        calls.timed.append(timed)
        calls.start_s.append(start_s)
        calls.board.append((before, after))


def row_of(run: Run, model: Any, calls: Calls) -> Record:
    """An ordinary latency row of one arm.

    samples: `ttft_s` for one new token, `e2e_s` otherwise; `decode_s` of the control, its
    new_tokens - 1 steps by the device's clock; `warmup_s`, the call before. values: `call_start_s`,
    seconds since the visit began; `board`, for each reading one pair (before, after) a call.
    """
    arm, timed = calls.arm, calls.timed
    with implementations.using(model.net, arm.experts):
        decode_experts = registry.experts_in_decode(model.net, arm.stack)
        key = model.key(
            stack=arm.stack,
            context=arm.context,
            new_tokens=arm.new_tokens,
            decoding="greedy",
            cache=STACKS[arm.stack].cache,
        )
    if calls.error is not None:
        return Record("latency", key, error=calls.error)
    name = "ttft_s" if arm.new_tokens == 1 else "e2e_s"
    seconds = [call.seconds for call in timed]
    samples = {name: seconds, "warmup_s": [call.seconds for call in calls.warmup]}
    if timed and all(call.decode_s is not None for call in timed):
        samples["decode_s"] = [call.decode_s for call in timed]
    middle = arm.context + arm.new_tokens // 2
    sizes, missing = computed(decode_bytes=lambda: model.card.decode_bytes(middle, 1))
    warnings = latency.warnings_of(seconds) if timed else []
    if calls.board:
        states = calls.board[0][0], calls.board[-1][1]
        warnings += latency.slowed(validity.held_back(*states, sum(seconds)))
    if len(timed) < ROUNDS:
        warnings.append(
            record.warning(
                "cut_off",
                f"the visit ended after {len(timed)} of {ROUNDS} timed calls of this arm: leave it "
                "out of estimates over visits",
            )
        )
    values = {
        **model.source,
        "decode_experts": decode_experts,
        "prepare_s": sum(call.prepare_s for call in calls.warmup),
        "call_start_s": calls.start_s,
        **sizes,
    }
    if run.no_board:
        missing["board"] = run.no_board
    else:
        values["board"] = columns(calls.board)
    return Record("latency", key, samples, values, missing, warnings=tuple(warnings))


def columns(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, list[list[Any]]]:
    """Readings by name: for each call what was read before and after it, None where it was not."""
    names = sorted({name for pair in pairs for reading in pair for name in reading})
    return {name: [[reading.get(name) for reading in pair] for pair in pairs] for name in names}


def board_of(device: Any) -> tuple[Callable[[], dict[str, Any]], str | None]:
    """A function that reads temperatures, clocks and how the board is held back, or the reason
    why it reads nothing."""
    if reason := device.missing.get("energy"):
        return dict, reason
    from lib.hardware import power_sampler  # needs NVML

    _, handle = hardware_board.open_board(device.uuid)
    return lambda: power_sampler.state(handle), None


def medians(rows: Iterable[Record]) -> list[dict[str, Any]]:
    """The medians (s) of each arm forward and back; None where a direction has no timed call."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row.kind != "latency" or not row.samples:
            continue
        name = "ttft_s" if "ttft_s" in row.samples else "e2e_s"
        arm = {n: row.key[n] for n in ("model", "stack", "experts", "context", "new_tokens")}
        empty = {**arm, "sample": name, FORWARD: None, BACK: None}
        entry = found.setdefault(tuple(arm.values()), empty)
        if row.samples[name]:
            entry[row.values["direction"]] = statistics.median(row.samples[name])
    return list(found.values())


def _summary(who: dict[str, Any], environment: dict[str, Any], run: Run) -> dict[str, Any]:
    packages = environment.get("packages") or {}
    return {
        **who,
        "end": None,
        "status": "running",
        "error": None,
        "gpu": environment.get("gpu"),
        "driver": environment.get("driver"),
        **{name: packages.get(name) for name in ("torch", "transformers")},
        **{name: environment.get(name) for name in ("host_score_per_s", "launch_s")},
        "protocol": {
            "contexts": list(run.contexts),
            "new_tokens": run.new_tokens,
            "rounds": ROUNDS,
            "dtype": run.dtype,
            "seed": run.seed,
            "budget_s": BUDGET_S,
            "stop_s": STOP_S,
        },
        "blocks": [],
        "medians": [],
    }


def _times(turns: Sequence[Calls]) -> str:
    """The last call of each arm."""
    said = []
    for calls in turns:
        arm = calls.arm
        name = " ".join(filter(None, (arm.stack, arm.experts, f"{arm.context}/{arm.new_tokens}")))
        said.append(f"{name} {f'{calls.timed[-1].seconds:.3f} s' if calls.timed else 'failed'}")
    return ", ".join(said)


def _utc() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
