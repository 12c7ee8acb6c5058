"""The bounds of a call: bytes that a decode step must read, and operations of a prefill.

MBU (memory bandwidth utilisation) is bytes of a step x steps per second / bandwidth; useful with
the bytes that any implementation must read, realised with those that this one moves.
MFU (model FLOPs utilisation) of a prefill is its operations / TTFT / flop rate. Each against the
datasheet, and against the best that was measured on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from lib import stats
from lib.analysis.estimators import decode_tok_per_s
from lib.analysis.machine import Limits, bandwidth_notes, limits
from lib.analysis.physics import TOLERANCE, comes_from_memory, line
from lib.analysis.rows import Rows
from lib.analysis.setups import build, grouped, named, sampled
from lib.hardware.datasheets import datasheet
from lib.models.card import ModelCard, bound_tok_per_s, computed, prefill_flop
from lib.models.formats import FORMS, held_as
from lib.records.record import Record, cards_of, select
from lib.show.figure import axes, color, labelled, logarithmic, style
from lib.show.table import Column, Table, of_lines, without_empty
from lib.stats import Estimate

KINDS = ("latency", "batch")  # calls of one sequence, and those of a sweep over batches
COPYING = "batched_mm"  # copies the weights of the experts that it chose
GATHERS = ("gather_kernel", "indexSelect", "index_elementwise")  # kernels that copy rows
MOST_PER_S = 1e13  # bytes; more than any card's memory moves, so that a shorter time is no copy
HALF = ("bfloat16", "float16")  # the datasheet's rate of matrix products holds for both
IMPOSSIBLE = "impossible: faster than memory"
UNKNOWN = Limits("unknown device", datasheet(None))
COLUMNS = (
    Column("a step reads", "GB"), Column("decode throughput", "tok/s"), Column("bound", "tok/s"),
    Column("useful MBU, datasheet"), Column("useful MBU, measured"),
    Column("realised MBU, datasheet"), Column("realised MBU, measured"),
    Column("prefill MFU, datasheet"), Column("prefill MFU, measured"),
    Column("remark", numeric=False),
)  # fmt: skip
FORMULAS = (
    "bound: measured bandwidth / bytes that a step must read; MBU: bytes of a step x steps "
    "per second / bandwidth; MFU: operations of the prefill / TTFT / rate of a matrix "
    "product"
)


def expected(card: Any, contexts: Sequence[int], bytes_per_s: float) -> Table:
    """Before measuring: what a step reads at each context, and the decode throughput it allows.

    Where the card cannot compute it, the reason.
    """
    lines = []
    for context in contexts:
        step = counted(partial(card.decode_bytes, context))
        bound = stats.inverse(step, bytes_per_s)
        cells = {"a step reads (GB)": stats.scaled(step, 1e-9), "decode bound (tok/s)": bound}
        lines.append({"context (tokens)": context, **cells})
    return of_lines("bound-expected", "The bound before measuring", lines)


def counted(size: Callable[[], int]) -> Estimate:
    """Bytes that a model card computes, or why it cannot."""
    values, missing = computed(size=size)
    return stats.exact(values["size"], "counted") if values else stats.missing(missing["size"])


@dataclass(frozen=True)
class Arm:
    """One model in one setup, at one context and batch: how fast it is, and what bounds it.

    `setup` holds the values of `setups.SETUP`. `step_bytes` are those that any implementation must
    read, `realised_bytes` those that this one moves; `traced` is all that was traced.
    `steps_per_s` is missing where something contradicts it, `claimed_per_s` is what the calls say.
    """

    model: str
    setup: tuple[str, ...]
    context: int
    batch: int
    steps_per_s: Estimate
    claimed_per_s: Estimate
    ttft_s: Estimate
    step_bytes: float | None
    realised_bytes: float | None
    realised_reason: str
    prefill_flop: int | None
    dtype: str
    limits: Limits
    traced: dict[str, Any] = field(default_factory=dict)
    devices: int | None = None  # of a model that is sharded

    @property
    def bound_per_s(self) -> float | None:
        """Steps a second that the best measured stream allows."""
        if not (self.step_bytes and self.limits.read_bytes_per_s):
            return None
        return bound_tok_per_s(self.step_bytes, self.limits.read_bytes_per_s)

    @property
    def from_memory(self) -> bool:
        """Whether a step reads so much that no cache can serve it."""
        return comes_from_memory(self.step_bytes, self.limits.cache_bytes)

    def mbu(self, *, realised: bool, datasheet: bool) -> Estimate:
        """Bytes of a step x steps a second / bandwidth."""
        size = self.realised_bytes if realised else self.step_bytes
        sheet = self.limits.sheet
        rate = sheet.memory_bytes_per_s if datasheet else self.limits.read_bytes_per_s
        if not size:
            why = self.realised_reason if realised else "the bytes of a step are not known"
            return stats.missing(why)
        if not rate:
            reason = sheet.missing["memory_bytes_per_s"] if datasheet else "no bandwidth measured"
            return stats.missing(reason)
        return stats.scaled(self.steps_per_s, size / rate)

    def _claimed_share(self, size: float | None, rate: float | None) -> float | None:
        steps = self.claimed_per_s.value
        return steps * size / rate if steps and size and rate else None

    def mfu(self, *, datasheet: bool) -> Estimate:
        """Operations of the prefill / TTFT / rate of a matrix product in the same dtype."""
        sheet = self.limits.sheet
        if not self.prefill_flop:
            return stats.missing("the operations of a prefill are not known: no full model card")
        if datasheet and self.dtype not in HALF:
            return stats.missing(f"the datasheet's rate is of bfloat16, this is {self.dtype}")
        rate = sheet.bf16_flop_per_s if datasheet else self.limits.matmul(self.dtype)
        if not rate:
            measured = f"no matrix product measured in {self.dtype}"
            return stats.missing(sheet.missing["bf16_flop_per_s"] if datasheet else measured)
        return stats.inverse(self.ttft_s, self.prefill_flop / rate)

    @property
    def remark(self) -> str:
        """What a share above one means: impossible, or a cache."""
        sheet, near = self.limits.sheet.memory_bytes_per_s, self.limits.read_bytes_per_s
        useful = self._claimed_share(self.step_bytes, sheet or (near and TOLERANCE * near))
        traced = self._claimed_share(self.realised_bytes, sheet)
        if not any(share and share > 1 for share in (useful, traced)):
            return ""
        if self.from_memory:
            return IMPOSSIBLE
        return "faster than memory: a cache may hold a step's bytes"


def arms(rows: Sequence[Record], kind: str = "latency") -> list[Arm]:
    """Every arm whose decode steps have known bytes, in the order of the tables."""
    return [arm for arm, _ in _arms(rows, kind)]


def _arms(rows: Sequence[Record], kind: str) -> list[tuple[Arm, list[Record]]]:
    return Rows.of(rows).once(_every_arm, kind)


def _every_arm(rows: Rows, kind: str) -> list[tuple[Arm, list[Record]]]:
    lookups = _Lookups(rows)
    groups = grouped(rows.where(lambda r: not r.error), (kind,), ("context", "batch"))
    pairs = [(lookups.arm(setup, group), group) for (_, setup, *_), group in groups.items()]
    return [(arm, group) for arm, group in pairs if arm.step_bytes]


class _Lookups:
    """What is looked up for every arm: cards, traces and limits."""

    def __init__(self, rows: Sequence[Record]) -> None:
        self.rows = rows
        self.cards = select(rows, "card")
        self.traces = select(rows, "trace")
        self.told = select(rows, "engine-trace")
        self.limits = limits(rows)

    def arm(self, setup: tuple[str, ...], group: Sequence[Record]) -> Arm:
        row = max(group, key=lambda r: r.key.get("new_tokens") or 0)
        key, card = row.key, self._card(row)
        context, batch = key["context"], key.get("batch") or 1
        size, trace = row.value("decode_bytes"), self._traced(row)
        traced = trace.values if trace else {}
        chosen = traced.get("experts_chosen_decode") if batch > 1 else None
        if key.get("engine") and batch > 1:
            place = (key["model"], str(key["weights"]), str(key["dtype"]), batch)
            if told := experts_told(self.told, *place):
                chosen = told.value
        if (size is None or chosen) and card is not None and card.kv_layers is not None:
            size = card.decode_bytes(context + (key.get("new_tokens") or 0) // 2, batch, chosen)
        realised, reason = self._realised(row, size, trace)
        return Arm(
            model=key["model"],
            setup=setup,
            context=context,
            batch=batch,
            steps_per_s=decode_tok_per_s(group),
            claimed_per_s=stats.inverse(line(group)[0]),
            ttft_s=sampled(group, "ttft_s"),
            step_bytes=size,
            realised_bytes=realised,
            realised_reason=reason,
            dtype=str(key.get("dtype")),
            prefill_flop=prefill_flop(card, context, batch) if card else None,
            limits=self.limits.get(row.env_id or "", UNKNOWN),
            traced=traced or ({"experts_chosen_decode": chosen} if chosen else {}),
            devices=key.get("devices"),
        )

    def _card(self, row: Record) -> ModelCard | None:
        """The model card of the row's model in its dtype, where the record holds all of it."""
        model, dtype = row.key.get("model"), row.key.get("dtype")
        if row.key.get("engine"):
            return card_in(self.cards, model, str(dtype))
        whole = [c for c in cards_of(self.cards, model, dtype) if "kv_layers" in c.values]
        return ModelCard.from_dict(whole[-1].values) if whole else None

    def _traced(self, row: Record) -> Record | None:
        """The trace of the experts that the row's decode steps really use, if there is one.

        How many experts a step uses does not depend on the context, so a trace at another context
        serves, its own preferred.
        """
        same = {name: row.key.get(name) for name in ("model", "weights", "dtype", "batch")}
        traces = [
            t
            for t in select(self.traces, **same)
            if _decode_experts(t) == _decode_experts(row)
            and t.value("decode_bytes_realised")
            and t.value("decode_bytes")
        ]

        def distance(trace: Record) -> int:
            return abs((trace.key.get("context") or 0) - row.key["context"])

        return min(traces, key=distance, default=None)

    def _realised(
        self, row: Record, size: float | None, trace: Record | None
    ) -> tuple[float | None, str]:
        """Bytes that a step moves, or why they are not known."""
        if trace is None or size is None:
            experts = _decode_experts(row)
            which = "" if experts == "none" else f" with experts {experts}"
            return None, f"no trace of this model{which}"
        beyond, reason = moved_beyond(trace, self.rows)
        return (None if beyond is None else size + beyond), reason


def moved_beyond(trace: Record, rows: Sequence[Record]) -> tuple[float | None, str]:
    """Bytes that a traced step moves beyond those of its architecture, or why that is not known.

    Experts that were not chosen and used all the same; and copies. `batched_mm` gathers the weights
    that it chose for each token into a tensor of their own, which is written and read again: seen
    in a profile of the same model and stack by gathers, two a layer at least, that take no less
    time than such copies would.
    """
    beyond = trace.values["decode_bytes_realised"] - trace.values["decode_bytes"]
    if _decode_experts(trace) != COPYING:
        return beyond, ""
    same = {name: trace.key.get(name) for name in ("model", "weights", "dtype", "stack")}
    card = next(reversed(cards_of(rows, same["model"], same["dtype"])), None)
    if card is None or not card.value("experts") or not card.value("routed_bytes"):
        return None, f"{COPYING} copies experts, and no model card tells their size"
    chosen = card.value("routed_bytes") * card.value("experts_per_token") / card.value("experts")
    for row in select(rows, "busy", **same):
        kernels = row.value("decode_kernel_times") or ()
        gathers = [k for k in kernels if any(name in k[0] for name in GATHERS)]
        launches, seconds = (sum(k[at] for k in gathers) for at in (1, 2))
        tokens = row.key.get("batch") or 1
        if launches >= 2 * card.value("layers") and 2 * tokens * chosen <= seconds * MOST_PER_S:
            return beyond + 2 * (trace.key.get("batch") or 1) * chosen, ""
    return None, f"{COPYING} copies experts, and no profile of this stack shows how"


def _decode_experts(row: Record) -> str:
    """The experts implementation of decode steps; the library may prefill with another."""
    return str(row.value("decode_experts") or row.key.get("experts") or "none")


def experts_told(
    rows: Sequence[Record], model: str, weights: str, dtype: str, batch: int
) -> Estimate | None:
    """Distinct experts of a layer in a step, as an engine told its choices: the mean over steps."""
    traces = select(rows, "engine-trace", model=model, weights=weights, dtype=dtype, batch=batch)
    told = [r.samples["distinct_experts"] for r in traces if r.samples.get("distinct_experts")]
    return stats.mean(told[-1]) if told else None


def card_in(cards: Sequence[Record], model: str, dtype: str) -> ModelCard | None:
    """A model's card with its weights in this form: the last one that was recorded so, or what
    another one gives; None where none does."""
    mine = [*select(cards, "card", model=model), *cards_of(cards, model, dtype)]
    return next(filter(None, (card_of(card, dtype) for card in reversed(mine))), None)


def card_of(row: Record, dtype: str) -> ModelCard | None:
    """The model card of a row, with its weights in this form; None where it holds not all of it."""
    if "kv_layers" not in row.values:
        return None
    card, form = ModelCard.from_dict(row.values), FORMS.get(dtype)
    if row.key.get("dtype") in (None, dtype):
        return card
    stored = form and form.quantised and form.dtype == row.key["dtype"]
    return held_as(card, form) if stored else None


def utilisation(rows: Sequence[Record], kind: str = "latency") -> Table:
    """Per model, setup, context and batch: throughput, its bound, MBU of decode, MFU of prefill.

    Columns without any value are left out, and a note gives their reason.
    """
    pairs = _arms(rows, kind)
    by_group = {id(group[0]): arm for arm, group in pairs}
    bounded = [r for _, group in pairs for r in group]
    envs = [r for r in rows if r.kind == "environment"]
    grid = build(
        "bound",
        "Decode and prefill against their bounds",
        [*envs, *bounded],
        (kind,),
        ("context", "batch"),
        COLUMNS,
        lambda group: _cells(by_group[id(group[0])]),
    )
    notes = (*grid.notes, *bandwidth_notes(arm.limits for arm in by_group.values()), FORMULAS)
    return without_empty(replace(grid, notes=notes if grid.rows else ()))


def _cells(arm: Arm) -> Sequence[Any]:
    bound = arm.bound_per_s
    return (
        _counted(arm.step_bytes / 1e9),
        stats.scaled(arm.steps_per_s, arm.batch),
        stats.missing("no bandwidth measured") if bound is None else _counted(arm.batch * bound),
        *(
            arm.mbu(realised=realised, datasheet=datasheet)
            for realised in (False, True)
            for datasheet in (True, False)
        ),
        *(arm.mfu(datasheet=datasheet) for datasheet in (True, False)),
        arm.remark,
    )


def _counted(value: float) -> Estimate:
    return Estimate(value, n=1, method="counted", reason="counted, no interval")


def violations(rows: Sequence[Record]) -> list[str]:
    """Arms that beat the memory although a step reads far more than a cache holds: a bug."""
    every = [arm for kind in KINDS for arm in arms(rows, kind)]
    names = named([(arm.model, *arm.setup) for arm in every])
    sentences = []
    for arm in every:
        if arm.remark == IMPOSSIBLE:
            sheet = arm.limits.sheet.memory_bytes_per_s
            rate, where = (
                (sheet, "datasheet")
                if sheet
                else (arm.limits.read_bytes_per_s, f"measured {arm.limits.read_from}")
            )
            size = max(arm.step_bytes, arm.realised_bytes or 0)
            together = f", batch {arm.batch}" if arm.batch > 1 else ""
            sentences.append(
                f"{names[arm.model, *arm.setup].label} at {arm.context}{together}: "
                f"{arm.claimed_per_s.value:.1f} steps/s beat the bound of "
                f"{bound_tok_per_s(size, rate):.1f} steps/s ({where})"
            )
    return sentences


def figure(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Decode throughput with its interval at each context, under the bound of its bytes."""
    ax = axes(ax)
    groups: dict[tuple, list[Arm]] = {}
    for arm in arms(rows):
        groups.setdefault((arm.model, *arm.setup, arm.batch), []).append(arm)
    names = named(list(groups), ("batch",))
    for where, members in groups.items():
        label, shade = names[where].label, color(where[0])
        dots = [a for a in members if a.steps_per_s.value is not None]
        for a in dots:
            ends = (a.steps_per_s.low, a.steps_per_s.high)
            if None not in ends:  # noise may leave an end open
                ax.plot(
                    [a.context] * 2, [a.batch * end for end in ends], lw=4, alpha=0.3, color=shade
                )
        if dots:
            ax.plot(
                [a.context for a in dots],
                [a.batch * a.steps_per_s.value for a in dots],
                ls=style(names[where].place),
                marker=".",
                color=shade,
                label=label,
            )
        limited = [a for a in members if a.bound_per_s]
        if limited:
            ax.plot(
                [a.context for a in limited],
                [a.batch * a.bound_per_s for a in limited],
                ":",
                color=shade,
                label=f"{label}, bound",
            )
    labelled(ax, "Decode throughput under its bound", "context (tokens)", "tokens per second")
    if groups:  # a share of the bound is the same distance everywhere
        logarithmic(ax)
    return ax
