"""The first screen of a report: one sentence that answers, a card of the models, what it means for
one user and for many, and what it rests on. Then the planner, which answers for other needs.

Everything is computed from rows; what was not measured is a dash with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from lib import stats
from lib.analysis import choice, gates, planner
from lib.analysis.batch import users
from lib.analysis.capacity import predicted
from lib.analysis.choice import Cell, Option
from lib.analysis.rows import NO_GPU, Rows
from lib.records.kinds import STAND_IN, STUDY_STACK, model_order
from lib.records.record import NO_ARM, Record, environments
from lib.show import figure, wording
from lib.show.page import packed
from lib.show.table import Column, Number, Table, Text, Verdict
from lib.show.wording import short
from lib.stats import Estimate

MOST, FIRST = 12, 4  # models of the card; where there are more, those of figure and sentences
EXAMPLE_GB = 80  # of the planner, where the memory of the device is not known
EXAMPLE_USD = 2.5  # an hour of the GPU, where no price is given; said wherever it is used
NONE = stats.missing("not measured")
BESIDE = "beside jobs on other GPUs of the host"
BEST = Verdict("the best of these", "", "★", "holds")
MORE, LESS, NEITHER = 1, -1, 0  # which is better
COLUMNS = {
    Column("model", numeric=False): NEITHER,
    Column("room", "users"): MORE,
    Column("first token", "ms"): LESS,
    Column("one user", "tok/s"): MORE,
    Column("all users", "tok/s"): MORE,
    Column("for", "users"): NEITHER,
    Column("energy", "J per 1,000 tokens"): LESS,
    Column("price", "USD per million"): LESS,
}


@dataclass(frozen=True)
class Candidate:
    """A model on the stack that serves most of it: `one` user at the context of the card, and the
    cell with the highest throughput of all users."""

    option: Option
    one: Cell | None
    most: Cell

    @property
    def rank(self) -> float:
        """Throughput of all users (tok/s)."""
        return self.most.total.value

    @property
    def alone(self) -> bool:
        """Whether it was measured for one user only."""
        return self.most.users == 1

    @property
    def name(self) -> str:
        """The model."""
        return self.option.model


@dataclass(frozen=True)
class Answer:
    """The first screen. Its card is of a dozen models at most, and `every` of all; of more than a
    dozen, the figure is of the `leading` ones alone."""

    lead: str
    card: Table
    every: Table
    leading: tuple[str, ...]
    sentences: tuple[str, ...]
    basis: str
    figure: Markup
    planner: str
    predicts: bool
    context: int
    gpu_gb: float
    usd: float

    def markdown(self) -> str:
        """The sentence, the card and what it rests on, for a README."""
        return "\n\n".join(
            (f"**{self.lead}**", self.card.markdown(), *self.card.below, f"Rests on {self.basis}.")
        )


def answer(
    rows: Sequence[Record], *, context: int | None = None, gpu_hour_usd: float | None = None
) -> Answer | None:
    """The first screen of some rows, at a context (tokens) or the longest that all models share.

    None where no decoding was timed.
    """
    rows = Rows.of(rows)
    every_option = choice.options(rows)
    options = of_one_card(every_option)
    others = dict.fromkeys(o.of("gpu") for o in every_option if o not in options)
    if others:
        gpu, every_row = options[0].of("gpu"), rows
        rows = rows.where(lambda r: r.kind == "card" or every_row.setup(r)[-1] == gpu)
    waiting = gates.waiting(rows)
    if context is None:
        context = shared_context(options)
    best = candidates(options, context)
    if not best:
        return None
    every, leading = card(best, context, gpu_hour_usd, waiting), tuple(c.name for c in best)
    offered = [*every_option, *predicted.options(every_option)]
    if others:
        note = f"Of {options[0].of('gpu')} alone: the planner has {' and '.join(others)} too."
        every = replace(every, below=(*every.below, note))
    shown, drawn = every, rows
    if len(best) > MOST:
        leading = leading[:FIRST]
        note = (
            f"The {MOST} that serve most of {len(best)}; all stand under “Models”. The figure is "
            f"of the first {FIRST}."
        )
        shown = card(best[:MOST], context, gpu_hour_usd, waiting)
        shown = replace(shown, below=(*every.below, note))
        drawn = rows.where(lambda r: r.key.get("model") in (None, *leading))
    return Answer(
        lead=lead(best, waiting),
        card=shown,
        every=every,
        leading=leading,
        sentences=tuple(filter(None, (for_one(best, options, context), for_many(best[0])))),
        basis=basis(rows),
        figure=picture(drawn),
        planner=asked(offered),
        predicts=any(option.predicted for option in offered),
        context=context,
        gpu_gb=round(max(o.gpu_bytes or 0 for o in options) / 1e9, 1) or EXAMPLE_GB,
        usd=EXAMPLE_USD if gpu_hour_usd is None else gpu_hour_usd,
    )


def of_one_card(options: Sequence[Option]) -> list[Option]:
    """The options of the card that ran most models, then most cells, alone before several of it: a
    ratio of two cards would mix causes."""
    cards: dict[str, list[Option]] = {}
    for option in options:
        cards.setdefault(option.of("gpu"), []).append(option)

    def weight(mine: Sequence[Option]) -> tuple[bool, int, int]:
        ran = [option for option in mine if option.measured]
        alone = bool(ran) and mine[0].devices == 1
        return alone, len({o.model for o in ran}), sum(len(o.measured) for o in ran)

    return max(cards.values(), key=weight, default=[])


def shared_context(options: Sequence[Option]) -> int:
    """The longest context at which every model decoded for one user; without any the longest."""
    contexts: dict[str, set[int]] = {}
    for option in options:
        alone = {cell.context for cell in option.measured if cell.users == 1}
        contexts[option.model] = contexts.get(option.model, set()) | alone
    measured = [alone for alone in contexts.values() if alone]
    shared = set.intersection(*measured) if measured else set()
    return max(shared or set().union(*measured), default=0)


def candidates(options: Sequence[Option], context: int) -> list[Candidate]:
    """Of each model the stack with the highest throughput of all users, by that throughput; those
    that were measured for one user only come last."""
    every = [
        Candidate(option, _one(option, context), max(option.measured, key=lambda c: c.total.value))
        for option in options
        if option.measured
    ]
    by_model: dict[str, Candidate] = {}
    for candidate in sorted(every, key=lambda c: -c.rank):
        by_model.setdefault(candidate.name, candidate)
    return sorted(by_model.values(), key=lambda c: (c.alone, -c.rank, model_order(c.name)))


def _one(option: Option, context: int) -> Cell | None:
    """One user at a context."""
    return next((c for c in option.measured if (c.context, c.users) == (context, 1)), None)


def card(
    best: Sequence[Candidate],
    context: int,
    gpu_hour_usd: float | None = None,
    waiting: Sequence[str] = (),
) -> Table:
    """A model a line; the best value of each column has a mark where several have one. `waiting`
    are models whose times of several users are withheld."""
    price = EXAMPLE_USD if gpu_hour_usd is None else gpu_hour_usd
    shared = not all(candidate.alone for candidate in best)
    lines = zip(*(_cells(c, context, price, shared, c.name in waiting) for c in best), strict=True)
    pairs = zip(COLUMNS.values(), lines, strict=True)
    columns = [_marked(cells, better) for better, cells in pairs]
    example = " (GPU_HOUR_USD)" if gpu_hour_usd is None else ""
    notes = (
        f"Room and one user at {context:,} tokens. "
        f"Decoding only, at {price:g} USD an hour{example}.",
    )
    rows = tuple(zip(*columns, strict=True))
    gpu, devices = best[0].option.of("gpu"), best[0].option.devices
    where = f"{devices} GPUs" if devices > 1 else f"one {'CPU' if gpu == NO_GPU else 'GPU'}"
    return Table("answer", f"Models on {where}", tuple(COLUMNS), rows, below=notes)


def _cells(candidate: Candidate, context: int, price: float, shared: bool, waiting: bool) -> tuple:
    """The cells of a model. Where others were `shared` by users and it was not, it has none of all
    users."""
    option, one, most = candidate.option, candidate.one, candidate.most
    room = option.room(option.gpu_bytes, context) if option.gpu_bytes else None
    whole = (
        most.total,
        stats.scaled(most.token_j, 1e3),
        stats.inverse(most.total, option.devices * price / 3600 * 1e6),
    )
    served = Text(f"{most.users:,}", f"of {most.context:,} tokens")
    if shared and candidate.alone:
        reason = f"{gates.WITHHELD} until its logits are checked"
        missing = Number(stats.missing(reason if waiting else "one user only"))
        whole, served = (missing,) * 3, missing
    size = ""
    if option.card and (held := option.card.weight_bytes):
        size = f", {held / 1e9:.1f} GB" if held >= 1e9 else f", {wording.size(held)}"
    return (
        Text(option.model, f"{option.engine}{size}"),
        Number(_room(option, room), decimals=0),
        stats.scaled(one.ttft_s, 1e3) if one else NONE,
        one.per_user if one else NONE,
        whole[0],
        served,
        *whole[1:],
    )


def _room(option: Option, users: int | None) -> Estimate:
    if users is None:
        return stats.missing("no model card, or the device's memory is not known")
    how = "that the engine reserved" if option.reserved else "left by the architecture"
    return stats.exact(users, f"computed: the cache {how}")


def _marked(cells: Sequence, better: int) -> list:
    """The cells of a column, with a mark at the best of several numbers, which open to tell their
    intervals; none is the best where a model was not measured."""
    if not better:
        return list(cells)
    numbers = [
        replace(cell if isinstance(cell, Number) else Number(cell), show_interval=False)
        for cell in cells
    ]
    values = [x.estimate.value for x in numbers if x.estimate.value is not None]
    untold = any(str(x.estimate.reason).startswith(NONE.reason) for x in numbers)
    if untold or len(set(values)) < 2:
        return numbers
    best = max(values, key=lambda value: better * value)
    return [replace(x, verdict=BEST if x.estimate.value == best else None) for x in numbers]


def lead(best: Sequence[Candidate], waiting: Sequence[str] = ()) -> str:
    """One sentence: which model serves most on this GPU, and how far the next one is; and which
    others are `waiting`, their times of several users withheld."""
    first, *others = best
    others = [other for other in others if other.alone == first.alone]
    most = first.most
    single = len(best) > 1 and not (others or first.alone or waiting)
    text = (
        f"{first.name} serves{'' if single else ' most'} on {_device(first.option)}: "
        f"{short(first.rank)} tokens a second "
        f"for {most.users:,} user{'s' if most.users > 1 else ''}"
    )
    if others:
        text += f", {first.rank / others[0].rank:.2g} times what {others[0].name} reaches"
        joules = [c.most.token_j.value for c in (first, others[0])]
        if None not in joules:
            text += f", with {joules[0] / joules[1]:.0%} of its energy for a token"
    if single:
        text += "; no other model was timed for several users"
    if behind := [name for name in waiting if name != first.name]:
        text += f"; {_named(behind)} may serve more, but some of its times are withheld"
    return f"{text}."


def _named(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence; of many the first and how many more."""
    if len(names) > most:
        names = [", ".join(names[:most]), f"{len(names) - most} more"]
    return " and ".join(names)


def _device(option: Option) -> str:
    gpu = option.of("gpu")
    return "this CPU" if gpu == NO_GPU else gpu if option.devices > 1 else f"one {gpu}"


def for_one(best: Sequence[Candidate], options: Sequence[Option], context: int) -> str:
    """What one user gets of the two first models, each on its fastest stack, and on the library's
    own generate()."""
    fastest: dict[str, tuple[float, Option]] = {}
    for option in options:
        if cell := _one(option, context):
            before = fastest.get(option.model, (0.0, option))
            fastest[option.model] = max(before, (cell.per_user.value, option), key=lambda x: x[0])
    pair = [(c.name, *fastest[c.name]) for c in best if c.name in fastest][:2]
    if len(pair) < 2:
        return ""
    (first, speed, option), (other, slower, its) = sorted(pair, key=lambda x: -x[1])
    stacks = dict.fromkeys((option.of("stack"), its.of("stack")))
    text = (
        f"For one user {first} decodes {speed / slower:.2g} times as fast as {other} "
        f"({' against '.join(stacks)})"
    )
    plain = [_on_reference(options, name, context) for name in (first, other)]
    if None not in plain and option.of("stack") != STUDY_STACK:
        text += f"; on {STUDY_STACK}, at the host's pace, {plain[0] / plain[1]:.2g} times"
    return f"{text}."


def _on_reference(options: Sequence[Option], model: str, context: int) -> float | None:
    """Tokens a second of one user on the library's generate(), as it runs the experts."""
    plain = (o for o in options if (o.model, o.of("stack")) == (model, STUDY_STACK))
    alone = (cell for option in plain if (cell := _one(option, context)))
    return next((cell.per_user.value for cell in alone), None)


def for_many(first: Candidate) -> str:
    """What sharing does to each user and to the energy."""
    line = [c for c in first.option.measured if c.context == first.most.context]
    alone = next((c for c in line if c.users == 1), None)
    if alone is None or first.most is alone:
        return ""
    most = first.most
    text = (
        f"{most.users:,} users of {first.name} get {most.total.value / alone.total.value:.2g} "
        f"times the tokens of one, each at {most.per_user.value / alone.per_user.value:.0%} of "
        "its speed"
    )
    joules = [cell.token_j.value for cell in (alone, most)]
    if None not in joules:
        text += f", a token for {joules[1] / joules[0]:.1%} of its energy"
    return f"{text}."


def basis(rows: Sequence[Record]) -> str:
    """What the answer rests on: weights, boards, rows, and how many failed."""
    arms = [r for r in rows if r.kind not in NO_ARM]
    timed = (str(r.key.get("weights")) for r in arms if r.kind in choice.TIMED)
    weights = sorted({*timed} - {STAND_IN})
    withheld = sum(map(gates.is_withheld, arms))
    envs = environments(rows).values()
    shared = (one.get("uuid") for env in envs for one in env.get("boards") or ())
    boards = {*(env.get("gpu_uuid") for env in envs), *shared} - {None, ""}
    dates = sorted({str(env["date"]) for env in envs if env.get("date")})
    parts = [
        f"{' and '.join(weights)} weights",
        f"{len(boards)} board{'s' if len(boards) > 1 else ''}" if boards else "no GPU",
        f"{len(arms):,} rows ({sum(bool(r.error) for r in arms) - withheld:,} failed"
        + (f", {withheld:,} withheld)" if withheld else ")"),
        " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
        BESIDE if any(env.get("neighbours") for env in envs) else "",
    ]
    return ", ".join(filter(None, parts))


def picture(rows: Sequence[Record]) -> Markup:
    """Throughput of the GPU against that of each user; empty where no batch was timed."""
    if not any(r.kind == "batch" and r.samples.get("e2e_s") for r in rows):
        return Markup("")
    return figure.html(users.figure(rows), rows, note="Numbers are users, faint ones unchecked")


def asked(options: Sequence[Option]) -> str:
    """The options as data that the page's script unpacks, since with the predicted ones there are
    hundreds; and what has no line where a card is chosen."""
    cards = dict.fromkeys(option.gpu for option in options)
    absent = {gpu: planner.left_out(options, gpu) for gpu in cards}
    data = {"options": planner.data(options), "absent": absent}
    return packed(json.dumps(data, separators=(",", ":")).encode())
