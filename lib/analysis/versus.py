"""An upgrade verdict: is B slower than A, faster, neither, or could it not have been seen?

The rule. A block is one value, the median of its calls. In each round A B B A the mean log of B
less that of A has lost what drifts steadily; `stats.abba` gives B / A with an interval from how
blocks of one side differ. The level is 95 % for all timed arms together: with m of them each
interval holds at 1 - 0.05 / m. Slower or faster: the interval excludes 1. No difference: it holds 1
and lies within the effect that is sought. Else the run could not have seen that effect.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from lib import stats
from lib.files import ParamsError, check, parse_json, short
from lib.records import store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, select
from lib.show.table import Column, Number, Table
from lib.show.wording import listed, sentence
from lib.stats import Estimate

SIDES = ("A", "B")
SLOWER, FASTER, SAME, UNSEEN = "slower", "faster", "no difference", "could not have been seen"


class Side(TypedDict):
    """What versus.json says of A or B."""

    text: str
    versions: dict[str, str]


class Manifest(TypedDict):
    """versus.json."""

    start: str
    rounds: int
    sought: float
    device: str
    options: dict[str, Any]
    A: Side
    B: Side


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
        manifest = parse_json((folder / "versus.json").read_text(encoding="utf-8"))
        check(manifest, Manifest, "versus.json")
        if not (0 < manifest["sought"] < 100 and 0 < manifest["rounds"] < 10_000):
            raise ValueError(f"{manifest['rounds']} rounds for {manifest['sought']}")
    except (OSError, ValueError, TypeError) as error:
        raise ParamsError(
            f"{short(folder)} holds no run of versus ({error}); choose a folder that it wrote"
        ) from None
    store.refuse_links(folder)
    rounds = manifest["rounds"]
    blocks = []
    for number in range(1, 4 * rounds + 1):
        letter = "ABBA"[(number - 1) % 4]
        path = folder / f"{number:02}-{letter}" / "records.jsonl"
        if not path.exists():
            break
        rows = store.load(path)
        if odd := [row for row in select(rows, "latency") if None in _arm(row)]:
            raise ParamsError(f"{short(path)}: a row does not say what it timed: {odd[0].key}")
        blocks.append(Block(letter, number, rows))
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
    return row.key.get("stack"), row.key.get("context"), row.key.get("new_tokens")


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
