"""Which model, on what: every measured way to serve one, and whether it gives what is asked for.

An `Option` is one model on one stack in one number format; its `Cell`s say what so many users at
once got at a context. `offers` sets them against an `Ask`, names the limit that fails first, and
says so where nothing was measured. Speeds are those of the GPU that was measured: the asked memory
decides what fits and how many users have room. An ask that names a card is answered with what was
measured on it and, marked, with what is predicted: a limit inside an interval is one that it may
meet.

    make plan GPU_GB=80 CONTEXT=2048 USERS=20 TTFT_MS=500 GPU_HOUR_USD=2.5
    make plan GPU=H200 CONTEXT=2048
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis import bounds, fit, gates, reserved
from lib.analysis.batch import points
from lib.analysis.energy import quantities
from lib.analysis.metrics import METRICS
from lib.analysis.reserved import Reserved
from lib.analysis.routers import LEAD
from lib.analysis.rows import SETUP
from lib.analysis.setups import grouped, named, sampled
from lib.files import ParamsError
from lib.models.card import ModelCard
from lib.records.record import Record, board, select
from lib.show.wording import short
from lib.stats import Estimate

TIMED = ("latency", "batch")  # kinds of calls, those that are timed most often first
JOULES = (*quantities.LENGTHS, "batch-energy")
MEETS, MAY, FAILS, UNKNOWN = "meets", "may meet", "fails", "not measured"
NOT_PREDICTED = "not predicted"
FAILED = "failed at "  # how a fault starts where something did
NOT_FAILED = (gates.WITHHELD, LEAD, NOT_PREDICTED)  # how errors start where nothing failed
VERDICTS = (MEETS, MAY, FAILS, UNKNOWN)  # in the order of the answer
WORSE = (MEETS, MAY, UNKNOWN, FAILS)  # of the verdicts on several limits the last one holds
TIMES_MS = {  # of a cell, by what has a limit
    "TTFT": lambda cell: stats.scaled(cell.ttft_s, 1e3),
    "a token takes": lambda cell: stats.inverse(cell.per_user, 1e3),
}


@dataclass(frozen=True)
class Cell:
    """What each of so many `users` at once got at a context (tokens), or the error; of a prediction
    a `note`.

    `per_user` is decode throughput (tok/s), `token_j` joules of the boards for a decoded token.
    """

    context: int
    users: int
    ttft_s: Estimate
    per_user: Estimate
    token_j: Estimate
    error: str = ""
    note: str = ""

    @property
    def total(self) -> Estimate:
        """Decode throughput of all users (tok/s)."""
        return stats.scaled(self.per_user, self.users)

    @property
    def fault(self) -> str:
        """Where and why there is no speed; empty where there is one."""
        if not self.error:
            return ""
        how = "" if self.error.startswith(NOT_FAILED) else FAILED
        return f"{how}{place(self)}: {self.error}"


@dataclass(frozen=True)
class Option:
    """One model in one setup (the values of SETUP), with its card where a row holds one.

    The cells of one that is `predicted` were not measured: their intervals are predictions. Of one
    that is sharded over `devices`, `gpu_bytes` are those of each, to 0.1 GB as they are asked for.
    """

    model: str
    setup: tuple[str, ...]
    label: str
    card: ModelCard | None
    gpu_bytes: int | None
    cells: tuple[Cell, ...]
    predicted: bool = False
    devices: int = 1
    apart: bool = False  # whether other cards were measured beside its own
    reserved: Reserved | None = None  # the cache of an engine that told it

    def of(self, name: str) -> str:
        """A value of the setup."""
        return self.setup[SETUP.index(name)]

    @property
    def gpu(self) -> str:
        """The kind of card, without how many."""
        return self.of("gpu").removeprefix(f"{self.devices} x ")

    @property
    def stack(self) -> str:
        """The stack, without which of several engines it was."""
        return self.of("stack").partition(" ")[0]

    @property
    def engine(self) -> str:
        """Stack and number format, the experts where every one is computed, and several GPUs."""
        every = ("every expert",) if self.of("experts") == "all_experts" else ()
        several = (f"{self.devices} GPUs",) if self.devices > 1 else ()
        return ", ".join((self.stack, self.of("dtype"), *every, *several))

    @property
    def on(self) -> str:
        """The engine, which one of several it was, and the card where others stand beside it."""
        which = self.of("stack").partition(" ")[2]
        return ", ".join(filter(None, (self.engine, which, self.gpu if self.apart else "")))

    @property
    def what(self) -> tuple[str, str]:
        """Model and engine: what is one line of an answer, measured or predicted."""
        return self.model, self.engine

    @property
    def measured(self) -> list[Cell]:
        """The cells that have a speed."""
        return [cell for cell in self.cells if cell.per_user.value is not None]

    def at(self, context: int, users: int) -> Cell | None:
        """The smallest measured cell that is at least as hard: no fewer users, no fewer tokens."""
        harder = [c for c in self.measured if c.context >= context and c.users >= users]
        return min(harder, key=lambda c: (c.users, c.context), default=None)

    def room(self, gpu_bytes: float, context: int) -> int | None:
        """How many users of so many tokens each have room; None where no card tells."""
        if self.card is None or not self.card.kv_layers:
            return None
        return fit.room(self.card, round(gpu_bytes), context, self.devices, self.reserved)

    def short_bytes(self, gpu_bytes: float) -> float:
        """Bytes that it lacks on a card before any user; negative where it fits."""
        return fit.short_bytes(self.card, gpu_bytes, self.devices, self.reserved)


def options(rows: Sequence[Record]) -> list[Option]:
    """Every model and setup with calls of several tokens, in the order of the tables; an engine's
    stand-in weights are none, and a lead has no speed."""
    rows, leads = points.results(rows)
    groups: dict[tuple, dict[tuple[int, int], Cell]] = {}
    members: dict[tuple, Record] = {}
    for some, of in ((rows, cell_of), (leads, _lead_of)):
        for (model, setup, context, users), group in grouped(
            some, (*TIMED, *JOULES), ("context", "batch")
        ).items():
            timed = _timed(group)
            if timed and context:
                cells = groups.setdefault((model, *setup), {})
                cells.setdefault((context, users or 1), of(context, users or 1, group))
                members[model, *setup] = timed[0]
    names, cards = named(list(groups)), select(rows, "card")
    starts: dict[tuple, list[Record]] = {}
    for row in rows.of_kinds("engine"):
        where = (row.key.get("model"), *rows.setup(row))
        if where in members and row.key.get("engine") == members[where].key.get("engine"):
            starts.setdefault(where, []).append(row)
    read = [
        _option(
            where, names[where].label, mine.values(), rows.environment(members[where]), cards,
            starts.get(where, ()),
        )
        for where, mine in groups.items()
        if any(c.per_user.value is not None or c.error for c in mine.values())
    ]  # fmt: skip
    apart = len({option.gpu for option in read}) > 1
    return [replace(option, apart=apart) for option in read]


def _option(
    where: tuple,
    label: str,
    cells: Iterable[Cell],
    environment: dict[str, Any],
    cards: Sequence[Record],
    starts: Sequence[Record],
) -> Option:
    (model, *setup), (_, devices) = where, board(environment)
    card = bounds.card_in(cards, model, setup[SETUP.index("dtype")])
    of_all = environment.get("gpu_total_bytes")
    each = of_all and (round(of_all // devices, -8) or of_all // devices)
    cache = reserved.told(starts, each and each * devices)
    return Option(
        model, tuple(setup), label, card, each, tuple(cells), devices=devices, reserved=cache
    )


def _lead_of(context: int, users: int, rows: Sequence[Record]) -> Cell:
    none = stats.missing(LEAD)
    return Cell(context, users, none, none, none, LEAD)


def _timed(rows: Sequence[Record]) -> list[Record]:
    """The calls of the first of the kinds of timed calls that is there."""
    return next((mine for kind in TIMED if (mine := [r for r in rows if r.kind == kind])), [])


def cell_of(context: int, users: int, rows: Sequence[Record]) -> Cell:
    """The cell of the rows of one model in one setup, at a context (tokens) and so many users."""
    timed = _timed(rows)
    per_user = METRICS["decode"].of(timed)
    if per_user.value is None:
        marked = METRICS["decode_marked"].of(timed)
        per_user = marked if marked.value is not None else per_user
    error = next((r.error for r in timed if r.error), "") if per_user.value is None else ""
    _, token_j = quantities.split(rows, JOULES)
    if token_j.value is not None and token_j.value <= 0:
        token_j = stats.missing("not resolved: noise hides the energy of decoding")
    first = [r for r in timed if r.samples.get("ttft_s")]
    return Cell(
        context=context,
        users=users,
        ttft_s=sampled(first or timed, "ttft_s"),
        per_user=per_user,
        token_j=stats.scaled(token_j, 1 / users),
        error=error,
    )


@dataclass(frozen=True)
class Ask:
    """What a user needs: memory of the card (GB, 10^9 bytes), tokens of context for each of so many
    users at once, the longest wait for the first token and between tokens (ms), USD an hour of a
    GPU, and how many of them there are.

    `gpu` is the card by its name; without one the answer stands on what was measured, on whatever.
    """

    gpu_gb: float
    context: int
    users: int = 1
    ttft_ms: float | None = None
    itl_ms: float | None = None
    gpu_hour_usd: float | None = None
    gpu: str = ""
    devices: int = 1

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if name != "gpu" and number is not None and not 0 < number < math.inf:
                raise ParamsError(f"{name.upper()} is {number:g}; give a number above 0")


@dataclass(frozen=True)
class Offer:
    """What one option answers to an ask: a word of VERDICTS, and why where it is not MEETS.

    `cell` is the measured one that the answer stands on, `room` how many users fit.
    """

    option: Option
    verdict: str
    why: str
    room: int | None
    cell: Cell | None
    users: int
    gpu_hour_usd: float | None
    held_back: bool = False  # by its size, whatever the limits

    @property
    def total(self) -> float | None:
        """Tokens a second of the users that were asked for."""
        return self.users * self.cell.per_user.value if self.cell else None

    @property
    def sure(self) -> float:
        """What of `total` can be counted on: of a prediction the low end; 0 without a cell."""
        if self.cell is None:
            return 0.0
        each = self.cell.per_user
        return self.users * (each.low if self.option.predicted and each.low else each.value)

    @property
    def usd_per_million(self) -> float | None:
        """USD of GPU time for 10^6 decoded tokens at so many users."""
        if self.total is None or self.gpu_hour_usd is None:
            return None
        return self.option.devices * self.gpu_hour_usd / 3600 / self.total * 1e6


def offers(choices: Sequence[Option], ask: Ask) -> list[Offer]:
    """What each option answers: those that meet the ask first, by the speed of all users that can
    be counted on."""
    answers = _once([_offer(option, ask) for option in of_card(choices, ask.gpu)])
    return sorted(answers, key=lambda a: (VERDICTS.index(a.verdict), -a.sure))


def of_card(choices: Sequence[Option], gpu: str) -> list[Option]:
    """The options of a card; without a name the measured ones of every card."""
    return [o for o in choices if (o.gpu == gpu if gpu else not o.predicted)]


def _once(answers: Sequence[Offer]) -> list[Offer]:
    """One line of what was measured and is predicted too: the measured one where it answers, is
    known to fail or did fail, or where the prediction does not answer either; else the predicted
    one, with what the measured one lacks."""
    measured: dict[tuple[str, str], list[Offer]] = {}
    for answer in answers:
        if not answer.option.predicted:
            measured.setdefault(answer.option.what, []).append(answer)
    instead: dict[tuple[str, str], Offer] = {}
    for answer in answers:
        mine = measured.get(answer.option.what, [])
        if answer.option.predicted and all(map(_silent, mine)) and not (mine and _silent(answer)):
            whys = dict.fromkeys(one.why for one in (answer, *mine) if one.why)
            instead[answer.option.what] = replace(answer, why="; ".join(whys))
    return [
        instead[answer.option.what] if answer.option.predicted else answer
        for answer in answers
        if answer.option.predicted == (answer.option.what in instead)
    ]


def _silent(answer: Offer) -> bool:
    """Whether an offer says nothing of what was asked: no answer, and no failure at a place that
    is no harder."""
    told = answer.cell is not None or answer.why.startswith(FAILED)
    return answer.verdict == UNKNOWN and not told


def _offer(option: Option, ask: Ask) -> Offer:
    room = option.room(ask.gpu_gb * 1e9, ask.context)
    cell = option.at(ask.context, ask.users)

    def offer(verdict: str, why: str = "", held_back: bool = False) -> Offer:
        return Offer(option, verdict, why, room, cell, ask.users, ask.gpu_hour_usd, held_back)

    if option.devices > ask.devices:
        return offer(FAILS, f"needs {option.devices} GPUs ({ask.devices} asked)", True)
    limit = option.card.context_limit if option.card else None
    if limit and ask.context > limit:
        return offer(FAILS, f"{ask.context:,} tokens > {limit:,} of the model", True)
    if room is not None and room < ask.users:
        short_gb = option.short_bytes(ask.gpu_gb * 1e9) / 1e9
        why = f"weights are {short_gb:.1f} GB too large" if short_gb > 0 else ""
        return offer(FAILS, why or f"room for {people(room)} ({ask.users:,} asked)", True)
    answers = [
        _limit(option, ask, cell, what, ms) for what, ms in limits(ask).items() if ms is not None
    ]
    answers = answers or [(MEETS, "") if cell else (UNKNOWN, _nearest(option, ask))]
    return offer(*max(answers, key=lambda answer: WORSE.index(answer[0])))


def limits(ask: Ask) -> dict[str, float | None]:
    """The limits of an ask (ms) by what they are on, see TIMES_MS; None where there is none."""
    return {"TTFT": ask.ttft_ms, "a token takes": ask.itl_ms}


def _limit(option: Option, ask: Ask, cell: Cell | None, what: str, limit: float) -> tuple[str, str]:
    """The verdict on a limit (ms), and why. It fails where that is sure: at a place that is no
    harder than the one asked for; a harder `cell` that fails says nothing."""

    def ends(one: Cell) -> tuple[float, float]:
        time = TIMES_MS[what](one)
        return (time.low, time.high) if option.predicted else (time.value, time.value)

    told = [c for c in option.measured if TIMES_MS[what](c).value is not None]
    easier = [c for c in told if c.context <= ask.context and c.users <= ask.users]
    for one in sorted(easier, key=lambda c: (c.users, c.context), reverse=True):
        if ends(one)[0] > limit:
            where = "" if one is cell else f" at {place(one)}"
            return FAILS, f"{what} {short(TIMES_MS[what](one).value)} ms > {limit:g}{where}"
    if cell is None:
        return UNKNOWN, _nearest(option, ask)
    if cell not in told:
        word = "predicted" if option.predicted else "measured"
        return UNKNOWN, f"{what} at {people(cell.users)} is not {word}"
    low, high = ends(cell)
    if low > limit:
        time = short(TIMES_MS[what](cell).value)
        return UNKNOWN, f"{what} {time} ms > {limit:g} at more than was asked"
    if high > limit:
        return MAY, f"{what} {short(low)} to {short(high)} ms, {limit:g} asked"
    return MEETS, ""


def _nearest(option: Option, ask: Ask) -> str:
    """What was measured instead, or failed."""
    for cell in option.cells:
        if cell.error and cell.users <= ask.users and cell.context <= ask.context:
            return cell.fault
    if not option.measured:
        return "no decode throughput"
    most = max(option.measured, key=lambda c: (c.users, c.context))
    longest = max(option.measured, key=lambda c: (c.context, c.users))
    ends = dict.fromkeys(map(place, (most, longest)))
    return f"{'predicted' if option.predicted else 'measured'} up to {' and '.join(ends)}"


def people(count: int) -> str:
    """So many users, in words."""
    return f"{count:,} user{'' if count == 1 else 's'}"


def place(cell: Cell) -> str:
    """Users and context of a cell, in words."""
    return f"{people(cell.users)} of {cell.context:,} tokens"
