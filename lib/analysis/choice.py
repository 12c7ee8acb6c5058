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
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib import stats
from lib.analysis import bounds, fit
from lib.analysis.batch import points
from lib.analysis.energy import quantities
from lib.analysis.metrics import METRICS
from lib.analysis.rows import SETUP
from lib.analysis.setups import grouped, named, sampled
from lib.files import ParamsError
from lib.models.card import ModelCard
from lib.records.record import Record, select
from lib.show.wording import short
from lib.stats import Estimate

TIMED = ("latency", "batch")  # kinds of calls, those that are timed most often first
JOULES = (*quantities.LENGTHS, "batch-energy")
FORMULA = "decoding only; price: USD an hour / 3600 / (tok/s of all users) x 10^6"
PREDICTED = (
    "Predicted: not measured; 90 % intervals of laws fitted to rows of one H100, random weights. "
    "Those of the H200 and the H100 were registered before measuring; other cards are the same "
    "laws, and the less a card is like an H100, the less its interval promises. hf-eager waits for "
    "a host that nobody knows."
)
MEETS, MAY, FAILS, UNKNOWN = "meets", "may meet", "fails", "not measured"
VERDICTS = (MEETS, MAY, FAILS, UNKNOWN)  # in the order of the answer
WORSE = (MEETS, MAY, UNKNOWN, FAILS)  # of the verdicts on several limits the last one holds
TIMES_MS = {  # of a cell, by what has a limit
    "TTFT": lambda cell: stats.scaled(cell.ttft_s, 1e3),
    "a token takes": lambda cell: stats.inverse(cell.per_user, 1e3),
}


@dataclass(frozen=True)
class Cell:
    """What each of so many `users` at once got at a context (tokens), or the error.

    `per_user` is decode throughput (tok/s), `token_j` joules of the board for a decoded token.
    """

    context: int
    users: int
    ttft_s: Estimate
    per_user: Estimate
    token_j: Estimate
    error: str = ""

    @property
    def total(self) -> Estimate:
        """Decode throughput of all users (tok/s)."""
        return stats.scaled(self.per_user, self.users)


@dataclass(frozen=True)
class Option:
    """One model in one setup (the values of SETUP), with its card where a row holds one.

    The cells of one that is `predicted` were not measured: their intervals are predictions.
    """

    model: str
    setup: tuple[str, ...]
    label: str
    card: ModelCard | None
    gpu_bytes: int | None
    cells: tuple[Cell, ...]
    predicted: bool = False

    def of(self, name: str) -> str:
        """A value of the setup."""
        return self.setup[SETUP.index(name)]

    @property
    def engine(self) -> str:
        """Stack and number format, and the experts where every one is computed."""
        every = ("every expert",) if self.of("experts") == "all_experts" else ()
        return ", ".join((self.of("stack"), self.of("dtype"), *every))

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
        return fit.room(self.card, gpu_bytes, context)


def options(rows: Sequence[Record]) -> list[Option]:
    """Every model and setup of one GPU with calls of several tokens, in the order of the tables;
    leads and an engine's stand-in weights are none."""
    rows = points.results(rows).where(lambda row: not row.key.get("devices"))
    groups: dict[tuple, list[Cell]] = {}
    members: dict[tuple, Record] = {}
    for (model, setup, context, users), group in grouped(
        rows, (*TIMED, *JOULES), ("context", "batch")
    ).items():
        timed = _timed(group)
        if timed and context:
            groups.setdefault((model, *setup), []).append(cell_of(context, users or 1, group))
            members[model, *setup] = timed[0]
    names, cards = named(list(groups)), select(rows, "card")
    return [
        Option(
            model=where[0],
            setup=where[1:],
            label=names[where].label,
            card=_card(cards, where[0], where[1 + SETUP.index("dtype")]),
            gpu_bytes=rows.environment(members[where]).get("gpu_total_bytes"),
            cells=tuple(cells),
        )
        for where, cells in groups.items()
        if any(c.per_user.value is not None or c.error for c in cells)
    ]


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


def _card(cards: Sequence[Record], model: str, dtype: str) -> ModelCard | None:
    """The card of a model in a number format, where a record holds all of it."""
    for row in reversed(cards):
        if row.key.get("model") == model and row.key.get("dtype") in (None, dtype):
            return ModelCard.from_dict(row.values) if "kv_layers" in row.values else None
    mine = [row for row in cards if row.key.get("model") == model]
    return bounds.card_of(mine[-1], dtype) if mine else None


@dataclass(frozen=True)
class Ask:
    """What a user needs: memory of the card (GB, 10^9 bytes), tokens of context for each of so many
    users at once, the longest wait for the first token and between tokens (ms), USD an hour.

    `gpu` is the card by its name; without one the answer stands on what was measured, on whatever.
    """

    gpu_gb: float
    context: int
    users: int = 1
    ttft_ms: float | None = None
    itl_ms: float | None = None
    gpu_hour_usd: float | None = None
    gpu: str = ""

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

    @property
    def total(self) -> float | None:
        """Tokens a second of the users that were asked for."""
        return self.users * self.cell.per_user.value if self.cell else None

    @property
    def usd_per_million(self) -> float | None:
        """USD of GPU time for 10^6 decoded tokens at so many users."""
        if self.total is None or self.gpu_hour_usd is None:
            return None
        return self.gpu_hour_usd / 3600 / self.total * 1e6


def offers(choices: Sequence[Option], ask: Ask) -> list[Offer]:
    """What each option answers: those that meet the ask first, by speed of all users. Where a
    measured one has an answer, there is no prediction of the same beside it."""
    asked = [o for o in choices if (o.of("gpu") == ask.gpu if ask.gpu else not o.predicted)]
    answered = {
        (o.model, o.engine) for o in asked if not o.predicted and o.at(ask.context, ask.users)
    }
    answers = [
        _offer(option, ask)
        for option in asked
        if not (option.predicted and (option.model, option.engine) in answered)
    ]
    return sorted(answers, key=lambda a: (VERDICTS.index(a.verdict), -(a.total or 0)))


def _offer(option: Option, ask: Ask) -> Offer:
    room = option.room(ask.gpu_gb * 1e9, ask.context)
    cell = option.at(ask.context, ask.users)

    def offer(verdict: str, why: str = "") -> Offer:
        return Offer(option, verdict, why, room, cell, ask.users, ask.gpu_hour_usd)

    limit = option.card.context_limit if option.card else None
    if limit and ask.context > limit:
        return offer(FAILS, f"{ask.context:,} tokens > {limit:,} of the model")
    if room is not None and room < ask.users:
        short_gb = fit.short_bytes(option.card, ask.gpu_gb * 1e9) / 1e9
        why = f"weights are {short_gb:.1f} GB too large" if short_gb > 0 else ""
        return offer(FAILS, why or f"room for {room:,} users ({ask.users:,} asked)")
    limits = {"TTFT": ask.ttft_ms, "a token takes": ask.itl_ms}
    answers = [_limit(option, ask, cell, what, ms) for what, ms in limits.items() if ms is not None]
    answers = answers or [(MEETS, "") if cell else (UNKNOWN, _nearest(option, ask))]
    return offer(*max(answers, key=lambda answer: WORSE.index(answer[0])))


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
            where = "" if one is cell else f" at {_place(one)}"
            return FAILS, f"{what} {short(TIMES_MS[what](one).value)} ms > {limit:g}{where}"
    if cell is None:
        return UNKNOWN, _nearest(option, ask)
    if cell not in told:
        word = "predicted" if option.predicted else "measured"
        return UNKNOWN, f"{what} at {_users(cell.users)} is not {word}"
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
            return f"failed at {_place(cell)}: {cell.error}"
    if not option.measured:
        return "no decode throughput"
    most = max(option.measured, key=lambda c: (c.users, c.context))
    longest = max(option.measured, key=lambda c: (c.context, c.users))
    ends = dict.fromkeys(map(_place, (most, longest)))
    return f"{'predicted' if option.predicted else 'measured'} up to {' and '.join(ends)}"


def _users(count: int) -> str:
    return f"{count:,} user{'s' if count > 1 else ''}"


def _place(cell: Cell) -> str:
    return f"{_users(cell.users)} of {cell.context:,} tokens"


def basis(offer: Offer) -> str:
    """The cell that an offer stands on, with the interval of a prediction; empty without one."""
    if (cell := offer.cell) is None:
        return ""
    place = _place(cell)
    if not offer.option.predicted:
        return f"measured at {place}"
    ends = f"{short(cell.per_user.low)} to {short(cell.per_user.high)}"
    return f"predicted at {place}: {ends} tok/s each at {cell.per_user.level:.0%}"


def lead(answers: Sequence[Offer], ask: Ask) -> str:
    """The answer in a sentence or two: the first option, or that none is known and what to do."""
    what = f"{_users(ask.users)} of {ask.context:,} tokens"
    if not answers:
        return f"Nothing is known of {what} on {ask.gpu or 'this card'}."
    verdicts = [answer.verdict for answer in answers]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    first, of = answers[0], f"{len(answers)} option{'s' if len(answers) > 1 else ''}"
    if first.verdict in (MEETS, MAY):
        how = "serves most" if first.verdict == MEETS else "may serve"
        others = f"{counts[MEETS]} of {of} meet{'s' if counts[MEETS] == 1 else ''} the limits"
        return (
            f"{first.option.model} on {first.option.engine} {how} for {what}: "
            f"{short(first.total)} tok/s{' together' if ask.users > 1 else ''}"
            f"{', predicted' if first.option.predicted else ''}. {others}."
        )
    cells = [cell for answer in answers for cell in answer.option.measured]
    shorter = [c.context for c in cells if c.users >= ask.users and c.context < ask.context]
    fewer = [c.users for c in cells if c.context >= ask.context and c.users < ask.users]
    nearest = [f"{_users(ask.users)} of {max(shorter):,} tokens"] if shorter else []
    nearest += [f"{_users(max(fewer))} of {ask.context:,} tokens"] if fewer else []
    remedy = f"{' or '.join(nearest) or 'other numbers'}, or wider limits"
    if counts[UNKNOWN] and not ask.gpu:
        remedy += "; or name a card (GPU), and what was not measured is predicted"
    return (
        f"None of {of} is known to serve {what}: {counts[FAILS]} fail, {counts[UNKNOWN]} lack a "
        f"{'prediction' if ask.gpu else 'measurement'}. Ask for {remedy}."
    )


def text(answers: Sequence[Offer], ask: Ask) -> str:
    """The answer to an ask for a terminal: its sentence, an option a line, what it holds for."""
    if not answers:
        return lead(answers, ask)
    width = max(map(len, VERDICTS)) + 2
    lines = [
        textwrap.fill(
            f"{answer.verdict:{width}}{_told(answer)}", 100, subsequent_indent=" " * width
        )
        for answer in answers
    ]
    gpus = sorted({answer.option.of("gpu") for answer in answers})
    notes = [f"Speeds are of {' and '.join(gpus)}; {FORMULA}."]
    if any(answer.option.predicted for answer in answers):
        notes.append(textwrap.fill(PREDICTED, 100))
    return "\n".join([textwrap.fill(lead(answers, ask), 100), "", *lines, "", *notes])


def _told(answer: Offer) -> str:
    cell, price = answer.cell, answer.usd_per_million
    facts = [answer.why]
    if answer.verdict != FAILS and answer.room is not None:
        facts.append(f"room for {_users(answer.room)}")
    if cell:
        first = cell.ttft_s.value
        facts += [
            f"TTFT {short(first * 1e3)} ms" if first else "",
            f"{short(cell.per_user.value)} tok/s each, {short(answer.total)} together",
            "" if price is None else f"{price:.2f} USD for a million tokens",
            basis(answer),
        ]
    return f"{answer.option.model} on {answer.option.engine}: {'; '.join(filter(None, facts))}"


def data(choices: Sequence[Option]) -> list[dict[str, Any]]:
    """The options for the planner of a page: what `offers` reads of them, as JSON data."""
    return [
        {
            "model": option.model,
            "engine": option.engine,
            "gpu": option.of("gpu"),
            "gb": option.gpu_bytes and round(option.gpu_bytes / 1e9, 1),
            "predicted": option.predicted,
            "fit": fit.line(option.card) if option.card and option.card.kv_layers else None,
            "limit": option.card.context_limit if option.card else None,
            "cells": [
                {
                    "context": cell.context,
                    "users": cell.users,
                    **_ends("ttft_ms", stats.scaled(cell.ttft_s, 1e3), option.predicted),
                    **_ends("each", cell.per_user, option.predicted),
                    "error": cell.error,
                }
                for cell in option.cells
            ],
        }
        for option in choices
    ]


def _ends(name: str, estimate: Estimate, predicted: bool) -> dict[str, Any]:
    """The value, and of a prediction the ends of its interval."""
    if not predicted or estimate.value is None:
        return {name: estimate.value}
    return {name: estimate.value, f"{name}_ends": [estimate.low, estimate.high]}
