"""An upgrade verdict: is B slower than A, faster, neither, or could it not have been seen? And why.

The rule. A block is one value, the median of its calls. In each round A B B A the mean log of B
less that of A has lost what drifts steadily; `stats.abba` gives B / A with an interval from how
blocks of one side differ. The level is 95 % for all timed arms together: with m of them each
interval holds at 1 - 0.05 / m. Slower or faster: the interval excludes 1. No difference: it holds 1
and lies within the effect that is sought. Else the run could not have seen that effect.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib import stats
from lib.files import ParamsError, short
from lib.records import store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, select
from lib.show import wording
from lib.show.table import Column, Number, Table
from lib.show.wording import listed, sentence
from lib.show.wording import short as digits
from lib.stats import Estimate

SIDES = ("A", "B")
ALL = "all"  # of a fact that holds for every stack
SLOWER, FASTER, SAME, UNSEEN = "slower", "faster", "no difference", "could not have been seen"
COUNTED, PROFILED = "one call counted in each block", "one reading in each block"
STEP, WORK = "time of a decode step", "device work of a decode step"
READING_LEVEL = 0.99  # of the readings that may explain a difference there are several
STEADY = 0.01  # readings of one side that differ by less are told as one


@dataclass(frozen=True)
class Block:
    """One process of one side: its place in the order from 1 on, and its rows."""

    letter: str
    number: int
    rows: Sequence[Record]


@dataclass(frozen=True)
class Run:
    """A run's blocks, of whole rounds, and what versus.json says of it."""

    blocks: tuple[Block, ...]
    manifest: dict[str, Any]

    @property
    def rounds(self) -> list[tuple[Block, ...]]:
        """Four blocks each."""
        return [self.blocks[at : at + 4] for at in range(0, len(self.blocks), 4)]


@dataclass(frozen=True)
class Verdict:
    """One timed arm: medians over blocks (s), what the blocks say, and the verdict on it."""

    stack: str
    context: int
    new_tokens: int
    sought: float
    a: Estimate
    b: Estimate
    blocks: stats.Blocks | None = None
    reason: str = ""

    @property
    def title(self) -> str:
        """Which calls were timed."""
        what = "first token" if self.new_tokens == 1 else f"whole call of {self.new_tokens} tokens"
        control = "" if self.stack == STUDY_STACK else " (the control)"
        return f"{what} on {self.stack}{control}"

    @property
    def word(self) -> str:
        """Slower, faster, no difference, could not have been seen; not measured without times."""
        if self.blocks is None:
            return "not measured"
        ratio = self.blocks.ratio
        if ratio.resolved_from():
            return SLOWER if ratio.value > 1 else FASTER
        within = 1 / (1 + self.sought) < ratio.low and ratio.high < 1 + self.sought
        return SAME if within else UNSEEN

    @property
    def text(self) -> str:
        """The verdict as a sentence, with the smallest effect that could have been seen."""
        if self.blocks is None:
            return sentence(f"{self.title}: not measured ({self.reason})")
        change = stats.change(self.blocks.ratio)
        least = 100 * self.blocks.least()
        least = f"{least:,.0f} %" if least >= 10 else f"{least:.2g} %"
        seen = f"the smallest effect that could have been seen is {least}"
        sought = f"{100 * self.sought:.3g} %"
        blind = self.blocks.least() > self.sought
        unseen = "could not have been seen" if blind else "is neither shown nor ruled out"
        text = {
            SLOWER: f"B is slower, {change}; {seen}",
            FASTER: f"B is faster, {change}; {seen}",
            SAME: f"no difference of {sought} or more ({change}); {seen}",
            UNSEEN: f"a difference of {sought} {unseen} ({change}); {seen}",
        }
        return sentence(f"{self.title}: {text[self.word]}")


def load(folder: Path) -> Run:
    """The whole rounds of a run's folder; raises ParamsError where there is none."""
    try:
        manifest = json.loads((folder / "versus.json").read_text(encoding="utf-8"))
        rounds = int(manifest["rounds"])
        [float(manifest["sought"]), *({**manifest[side]["versions"]} for side in SIDES)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParamsError(
            f"{short(folder)} holds no run of versus ({error}); choose a folder that it wrote"
        ) from None
    blocks = []
    for number in range(1, 4 * rounds + 1):
        letter = "ABBA"[(number - 1) % 4]
        path = folder / f"{number:02}-{letter}" / "records.jsonl"
        if not path.exists():
            break
        blocks.append(Block(letter, number, store.load(path)))
    whole = len(blocks) // 4 * 4
    if not whole:
        raise ParamsError(f"{short(folder)} holds {len(blocks)} blocks, and a round has four")
    return Run(tuple(blocks[:whole]), manifest)


def times_s(row: Record) -> list[float]:
    """The timed calls of an arm."""
    return row.samples.get("ttft_s") or row.samples.get("e2e_s") or []


def verdicts(run: Run) -> list[Verdict]:
    """One for each timed arm, in the order in which they were timed."""
    arms = {_arm(row): row for block in run.blocks for row in select(block.rows, "latency")}
    rows = {arm: [_row(block, arm) for block in run.blocks] for arm in arms}
    failed = {arm: _failure(run.blocks, of_arm) for arm, of_arm in rows.items()}
    tested = sum(not why for why in failed.values())
    return [_verdict(run, arm, rows[arm], failed[arm], tested) for arm in arms]


def _arm(row: Record) -> tuple[str, int, int]:
    return row.key["stack"], row.key["context"], row.key["new_tokens"]


def _row(block: Block, arm: tuple[str, int, int]) -> Record | None:
    return next((r for r in select(block.rows, "latency") if _arm(r) == arm), None)


def _failure(blocks: Sequence[Block], rows: Sequence[Record | None]) -> str:
    """Why an arm has no verdict; empty where every block has timed it."""
    reasons = {
        f"failed in {block.letter}: {row.error}"
        if row and row.error
        else f"no row in block {block.number}"
        for block, row in zip(blocks, rows, strict=True)
        if row is None or row.error or not times_s(row)
    }
    return listed(sorted(reasons))


def _verdict(
    run: Run, arm: tuple[str, int, int], rows: Sequence[Record], failed: str, tested: int
) -> Verdict:
    sought = run.manifest["sought"]
    if failed:
        none = stats.missing(failed)
        return Verdict(*arm, sought, none, none, reason=failed)
    medians = [statistics.median(times_s(row)) for row in rows]
    sides = [
        stats.median([m for m, b in zip(medians, run.blocks, strict=True) if b.letter == letter])
        for letter in SIDES
    ]
    within = statistics.fmean(stats.median_error(times_s(row)) ** 2 for row in rows) ** 0.5
    rounds = [medians[at : at + 4] for at in range(0, len(medians), 4)]
    level = 1 - (1 - stats.CONFIDENCE) / tested
    return Verdict(*arm, sought, *sides, stats.abba(rounds, within, level))


# --- why -----------------------------------------------------------------------------------------


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
        + ("" if fact.ratio is None else f", {digits(fact.ratio)} times")
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
        return digits(statistics.fmean(values))
    return f"{digits(low)} to {digits(high)}"


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


# --- tables --------------------------------------------------------------------------------------


def verdict_table(run: Run) -> Table:
    """A line for each timed arm."""
    sought = 100 * run.manifest["sought"]
    columns = (
        Column("calls", numeric=False),
        Column("A", "ms"),
        Column("B", "ms"),
        Column("B / A"),
        Column("verdict", numeric=False),
        Column("smallest effect seen", "%"),
        Column(f"chance to see {sought:.3g} %", "%"),
        Column("noise of a block", "%"),
    )
    rows = []
    for v in verdicts(run):
        if v.blocks is None:
            none = stats.missing(v.reason)
            rows.append((v.title, none, none, none, v.word, none, none, none))
            continue
        sides = [stats.scaled(x, 1e3) for x in (v.a, v.b)]
        least = stats.exact(100 * v.blocks.least(), "at a power of 80 %")
        chance = stats.exact(100 * v.blocks.power(v.sought), "at this noise")
        noise = stats.exact(100 * v.blocks.noise, "of the log of a block's median")
        rest = (Number(least, 1), Number(chance, 0), Number(noise, 2))
        rows.append((v.title, *sides, v.blocks.ratio, v.word, *rest))
    return Table("verdicts", "Verdicts", columns, tuple(rows), (rule(run),))


def rule(run: Run) -> str:
    """How a verdict is reached, and what it may be wrong in."""
    tested = sum(v.blocks is not None for v in verdicts(run))
    level = 1 - (1 - stats.CONFIDENCE) / max(tested, 1)
    calls = max((len(times_s(r)) for b in run.blocks for r in select(b.rows, "latency")), default=0)
    rounds = len(run.rounds)
    return (
        f"{rounds} round{'s' if rounds > 1 else ''} of four blocks in the order A B B A, each a "
        f"process of its own, of {calls} calls of each arm; a block is one value, its median. "
        f"The noise is what blocks of one side differ by ({3 * rounds - 1} degrees of freedom), at "
        f"least what the calls of a block say. An interval holds at {100 * level:.3g} %, so that "
        "of two equal environments at most one run in twenty calls any arm slower or faster. No "
        f"difference: the interval holds 1 and lies within {100 * run.manifest['sought']:.3g} %. "
        "The smallest effect is the one that four runs in five of this noise would resolve"
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


def version_table(run: Run) -> Table:
    """Packages whose versions differ between the two environments."""
    a, b = (run.manifest[letter]["versions"] for letter in SIDES)
    names = sorted(n for n in {*a, *b} if a.get(n) != b.get(n))
    columns = tuple(Column(n, numeric=False) for n in ("package", "A", "B"))
    rows = tuple((name, a.get(name, "–"), b.get(name, "–")) for name in names)
    notes = () if rows else ("every package has the same version in A and B",)
    return Table("versions", "Versions that differ", columns, rows, notes)


def headline(run: Run) -> str:
    """The verdicts on `generate()` in one sentence, and which versions differ."""
    words: dict[str, list[str]] = {}
    for v in verdicts(run):
        words.setdefault(v.word, []).append(v.title)
    a, b = (run.manifest[letter]["versions"] for letter in SIDES)
    main = [n for n in ("transformers", "torch", "vllm") if a.get(n) != b.get(n)]
    names = ", ".join(f"{n} {b.get(n, '–')} against {a.get(n, '–')}" for n in main)
    return sentence(
        f"B against A{names and f' ({names})'}: "
        + listed([f"{word} in the {' and the '.join(titles)}" for word, titles in words.items()])
    )
