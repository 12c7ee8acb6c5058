"""Why B is slower or faster than A: tokens, bytes of the cache, kernels, and who waits for whom.

What is read in the four blocks of a run's first round, after all times were taken. Nothing of it
changes a verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lib import stats
from lib.analysis.versus import FASTER, SAME, SIDES, SLOWER, Run, times_s, verdicts
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, select
from lib.show import wording
from lib.show.table import Column, Number, Table
from lib.show.wording import listed, sentence, short

ALL = "all"  # of a fact that holds for every stack
COUNTED, PROFILED = "one call counted in each block", "one reading in each block"
STEP, WORK = "time of a decode step", "device work of a decode step"
READING_LEVEL = 0.99  # of the readings that may explain a difference there are several
STEADY = 0.01  # readings of one side that differ by less are told as one


@dataclass(frozen=True)
class Fact:
    """One thing that may explain a difference: a reading of each side, and B / A.

    `counted` facts are whole numbers, which differ or do not. Others are read in the four blocks of
    one round, and told apart as times are, at READING_LEVEL each.
    """

    title: str
    unit: str
    stack: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    counted: bool
    reason: str = ""

    @property
    def differs(self) -> bool:
        """Whether the sides are told apart."""
        if not self.a or not self.b:
            return False
        if self.counted:
            return {*self.a} != {*self.b}
        if (len(self.a), len(self.b)) != (2, 2) or min(*self.a, *self.b) <= 0:
            return False
        (a1, a2), (b1, b2) = self.a, self.b
        return bool(stats.abba([(a1, b1, b2, a2)], level=READING_LEVEL).ratio.resolved_from())

    @property
    def ratio(self) -> float | None:
        """B / A of the means; None where one is missing or A is zero."""
        if not self.a or not self.b or not statistics.fmean(self.a):
            return None
        return statistics.fmean(self.b) / statistics.fmean(self.a)

    def cells(self) -> tuple[Number, ...]:
        """A, B and B / A, of a fact that both sides have."""
        method = COUNTED if self.counted else PROFILED
        decimals = 0 if self.counted and not self.unit else None
        means = [statistics.fmean(side) for side in (self.a, self.b)]
        ratio = stats.missing("A is zero") if self.ratio is None else stats.exact(self.ratio)
        return (*(Number(stats.exact(x, method), decimals) for x in means), Number(ratio))


def _host_share(rows: Sequence[Record], stack: str) -> float | None:
    """Of a decode step the share in which the device waits, from one block's times and profile."""
    busy = _value(rows, "busy", stack, "decode_busy_s")
    step_s = _step_s(rows, stack)
    return None if busy is None or not step_s else 1 - busy / step_s


def _step_s(rows: Sequence[Record], stack: str) -> float | None:
    """Seconds of a decode step: by the device where it marks them, else a whole call less the first
    token's, over the steps."""
    mine = [r for r in select(rows, "latency", stack=stack) if times_s(r)]
    whole = next((r for r in mine if r.key["new_tokens"] > 1), None)
    first = next((r for r in mine if r.key["new_tokens"] == 1), None)
    if whole is None:
        return None
    steps = whole.key["new_tokens"] - 1
    if whole.samples.get("decode_s"):
        return statistics.median(whole.samples["decode_s"]) / steps
    if first is None:
        return None
    return (statistics.median(times_s(whole)) - statistics.median(times_s(first))) / steps


def _value(rows: Sequence[Record], kind: str, stack: str | None, name: str) -> float | None:
    at = {} if stack is None else {"stack": stack}
    return next((r.values[name] for r in select(rows, kind, **at) if name in r.values), None)


def _reason(rows: Sequence[Record], kind: str, stack: str | None, name: str) -> str:
    at = {} if stack is None else {"stack": stack}
    for row in select(rows, kind, **at):
        if row.error or name in row.missing:
            return row.error or row.missing[name]
    return "not measured"


def _fact(
    run: Run,
    title: str,
    unit: str,
    kind: str,
    stack: str | None,
    name: str,
    *,
    factor: float = 1,
    counted: bool = False,
    read: Callable[[Sequence[Record]], float | None] | None = None,
) -> Fact:
    read = read or (lambda rows: _value(rows, kind, stack, name))
    looked = [block for block in run.blocks if select(block.rows, "made")]
    sides = []
    for letter in SIDES:
        values = [read(block.rows) for block in looked if block.letter == letter]
        sides.append(tuple(factor * value for value in values if value is not None))
    rows = [row for block in looked for row in block.rows]
    reason = "" if all(sides) else _reason(rows, kind, stack, name)
    return Fact(title, unit, stack or ALL, *sides, counted, reason)


def facts(run: Run) -> list[Fact]:
    """What may explain a difference: tokens, cache bytes, kernels, and who waits for whom."""
    count = {"counted": True}
    stacks = dict.fromkeys(
        row.key["stack"] for block in run.blocks for row in select(block.rows, "made")
    )
    every = [
        _fact(run, "parameters", "", "card", None, "total_params", **count),
        _fact(run, "tokens of the same text", "", "made", None, "text_tokens", **count),
    ]
    for stack in stacks:
        every += [
            _fact(run, "tokens made by a call", "", "made", stack, "made_tokens", **count),
            _fact(
                run, "bytes of the cache", "MB", "made", stack, "kv_tensor_bytes", factor=1e-6,
                **count,
            ),
            _fact(run, "kernels of a decode step", "", "busy", stack, "decode_kernels"),
            _fact(
                run, STEP, "ms", "latency", stack, "e2e_s", factor=1e3,
                read=lambda rows, stack=stack: _step_s(rows, stack),
            ),
            _fact(run, WORK, "ms", "busy", stack, "decode_busy_s", factor=1e3),
            _fact(
                run, "device work of the first token", "ms", "busy", stack, "prefill_busy_s",
                factor=1e3,
            ),
            _fact(
                run, "host's share of a decode step", "", "busy", stack, "decode_busy_s",
                read=lambda rows, stack=stack: _host_share(rows, stack),
            ),
        ]  # fmt: skip
    return every


def same_ids(run: Run) -> bool | None:
    """Whether every call that was looked at made the same tokens on `generate()`; None unknown."""
    shas = {
        _value(block.rows, "made", STUDY_STACK, "made_sha")
        for block in run.blocks
        if select(block.rows, "made")
    }
    return None if None in shas or not shas else len(shas) == 1


def why(run: Run) -> list[str]:
    """Sentences on what differs beside the times, what does not, and what was not read."""
    every = facts(run)
    lines = [
        f"{fact.title}{_on(fact)}: {_readings(fact.a)} in A, {_readings(fact.b)} in B"
        + ("" if fact.ratio is None else f", {short(fact.ratio)} times")
        for fact in every
        if fact.differs
    ]
    texts = (_per_token(run, every), _split(run, every), _control(run), _ids(run))
    lines += [text for text in texts if text]
    if equal := [f for f in every if f.a and f.b and not f.differs]:
        lines.append(f"not told apart: {_titles(equal)}")
    unread: dict[str, list[Fact]] = {}
    for fact in every:
        if not fact.a or not fact.b:
            unread.setdefault(fact.reason, []).append(fact)
    lines += [f"not read: {_titles(several)} ({reason})" for reason, several in unread.items()]
    return [sentence(line) for line in lines]


def cautions(run: Run) -> list[str]:
    """What a reader of the times should beware of: warnings of the calls, and random weights."""
    rows = [row for block in run.blocks for row in select(block.rows, "latency")]
    return wording.cautions([replace(row, missing={}) for row in rows])


def _titles(several: Sequence[Fact]) -> str:
    """The titles of facts, each once with its stacks."""
    stacks: dict[str, list[str]] = {}
    for fact in several:
        stacks.setdefault(fact.title, []).extend([fact.stack] * (fact.stack != ALL))
    return ", ".join(
        f"{title} ({', '.join(names)})" if names else title for title, names in stacks.items()
    )


def _on(fact: Fact) -> str:
    return "" if fact.stack == ALL else f" ({fact.stack})"


def _readings(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    if high - low <= STEADY * abs(high):
        return short(statistics.fmean(values))
    return f"{short(low)} to {short(high)}"


def _per_token(run: Run, every: Sequence[Fact]) -> str:
    """Where the numbers of tokens differ: what a call costs for each token."""
    parts = []
    for verdict in verdicts(run):
        made = next(
            (f for f in every if f.stack == verdict.stack and f.title.startswith("tokens made")),
            None,
        )
        if verdict.new_tokens > 1 and verdict.blocks and made and made.differs and made.ratio:
            change = verdict.blocks.ratio.value / made.ratio - 1
            parts.append(f"a token of a {verdict.title} takes {100 * change:+.1f} %")
    return "the calls make other numbers of tokens: " + listed(parts) if parts else ""


def _split(run: Run, every: Sequence[Fact]) -> str:
    """How much of what a decode step of generate() takes more, or less, is the device's work."""
    whole = next((v for v in verdicts(run) if v.stack == STUDY_STACK and v.new_tokens > 1), None)
    means = {
        fact.title: [statistics.fmean(side) for side in (fact.a, fact.b)]
        for fact in every
        if fact.stack == STUDY_STACK and fact.a and fact.b
    }
    if whole is None or whole.word not in (SLOWER, FASTER) or not {STEP, WORK} <= {*means}:
        return ""
    more, busy = (means[title][1] - means[title][0] for title in (STEP, WORK))
    return (
        f"of {more:+.3g} ms a decode step of generate(), {busy:+.3g} ms are the device's work and "
        f"{more - busy:+.3g} ms waiting for the host"
    )


def _control(run: Run) -> str:
    """What the control says of the arms that wait for the host."""
    words = {(v.stack == STUDY_STACK, v.new_tokens > 1): v for v in verdicts(run)}
    plain, control = words.get((True, True)), words.get((False, True))
    if plain is None or control is None or plain.word not in (SLOWER, FASTER):
        return ""
    if control.word == plain.word:
        return (
            f"the control is {control.word} too: the cause is not in what generate() does on the "
            "host alone"
        )
    if control.word == SAME:
        return (
            "the control shows no difference: the cause is in what generate() does around the "
            "step, on the host, or in kernels that the control does not use"
        )
    return ""


def _ids(run: Run) -> str:
    equal = same_ids(run)
    if equal is None:
        return ""
    if equal:
        return "the tokens that generate() made are the same in every block"
    return (
        "the tokens that generate() made differ between blocks: logits that nearly tie are enough "
        "for that, and so are other weights drawn from the same seed"
    )


def why_table(run: Run) -> Table:
    """A line for each fact that may explain a difference."""
    columns = (
        Column("what", numeric=False),
        Column("stack", numeric=False),
        Column("A"),
        Column("B"),
        Column("B / A"),
        Column("told apart", numeric=False),
    )
    rows = tuple(
        (
            f"{fact.title} ({fact.unit})" if fact.unit else fact.title,
            fact.stack,
            *fact.cells(),
            "yes" if fact.differs else "no",
        )
        for fact in facts(run)
        if fact.a and fact.b
    )
    note = (
        "read after all times were taken, in the four blocks of the first round; the mean of a "
        "side's two blocks. Counts differ or do not; times and readings of a profiler are told "
        f"apart by the interval over these blocks, at {100 * READING_LEVEL:g} % each"
    )
    return Table("why", "What else differs", columns, rows, (note,))
