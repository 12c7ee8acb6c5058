"""How much an engine's batches hang on the router: throughput against distinct experts of a step.

Stand-in weights collapse it, weights drawn by name spread it, a balanced router is computed; a
trained one lies somewhere on that line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes

from lib import stats
from lib.analysis import bounds
from lib.analysis.rows import SETUP, Rows
from lib.analysis.setups import Group
from lib.records.kinds import STAND_IN
from lib.records.record import Record, select
from lib.show.figure import axes, color, labelled, style
from lib.show.table import Table, of_lines
from lib.show.wording import number, short
from lib.stacks.registry import STACKS
from lib.stats import Estimate

ENGINES = tuple(name for name, stack in STACKS.items() if stack.apart)
WEIGHTS = SETUP.index("weights")
LEAD = "a lead: logits not checked at this batch"
COUNTED = {"n": 1, "method": "counted", "reason": "counted, no interval"}


def is_engine(stack: str) -> bool:
    """Whether the stack of a setup is an engine's; it may say which one."""
    return stack.split()[0] in ENGINES


def is_drawn(weights: str) -> bool:
    """Whether weights are of the model, and no engine's stand-ins."""
    return weights != STAND_IN


def of_drawn(group: Group) -> bool:
    """Whether rows of one setup are an engine's, with weights of the model."""
    return is_engine(group.of("stack")) and is_drawn(group.of("weights"))


@dataclass(frozen=True)
class Routed:
    """A batch of a mixture of experts: distinct experts of a layer in a step, and throughput.

    `how` is collapsed, drawn, or balanced; of a balanced router the throughput is computed.
    """

    model: str
    dtype: str
    context: int
    batch: int
    how: str
    experts: Estimate
    total: Estimate


def routed(rows: Sequence[Record]) -> list[Routed]:
    """Each batch of an engine whose steps' experts were told, and what a balanced router makes.

    Balanced: the expected number of experts of a router that chooses evenly, and what their bytes
    and the best read stream allow, which no step can beat.
    """
    rows = Rows.of(rows)
    arms = [a for a in bounds.arms(rows, "batch") if is_engine(a.setup[SETUP.index("stack")])]
    cards = select(rows, "card")
    dtype = SETUP.index("dtype")
    found = []
    for arm in arms:
        told = bounds.experts_told(rows, arm.model, arm.setup[WEIGHTS], arm.setup[dtype], arm.batch)
        if told is None or arm.batch == 1 or " x " in arm.setup[SETUP.index("gpu")]:
            continue  # over several GPUs the router is the same, and other things are not
        how = "collapsed" if not is_drawn(arm.setup[WEIGHTS]) else "drawn"
        total = stats.scaled(arm.steps_per_s, arm.batch)
        found.append(Routed(arm.model, arm.dtype, arm.context, arm.batch, how, told, total))
        card = bounds.card_in(cards, arm.model, arm.dtype)
        if how == "drawn" and card and card.experts and arm.limits.read_bytes_per_s:
            size = card.decode_bytes(arm.context, arm.batch)
            most = Estimate(arm.batch * arm.limits.read_bytes_per_s / size, **COUNTED)
            even = Estimate(card.experts_touched(arm.batch), **COUNTED)
            found.append(
                Routed(arm.model, arm.dtype, arm.context, arm.batch, "balanced", even, most)
            )
    return found


def routed_table(rows: Sequence[Record]) -> Table:
    """Batch throughput against distinct experts of a step."""
    lines = [
        {
            "model": one.model,
            "dtype": one.dtype,
            "context": one.context,
            "users": one.batch,
            "router": one.how,
            "distinct experts of a layer": one.experts,
            "throughput of all (tok/s)": one.total,
        }
        for one in sorted(routed(rows), key=lambda o: (o.model, o.context, o.batch, o.how))
    ]
    grid = of_lines("routed", "How much hangs on the router", lines)
    notes = (
        "collapsed: the engine's own stand-in weights, where nearly all tokens choose the same "
        "experts: a finding about them, and no throughput of the model",
        "drawn: weights drawn by name; traced by an engine that runs step by step",
        "balanced: experts to expect of an even router, and the throughput that their bytes allow; "
        "computed, not measured. A trained router lies somewhere between",
        f"batches of the engine are {LEAD.replace('this batch', 'their batch')}",
    )
    return replace(grid, notes=notes) if lines else grid


def routed_figure(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """The same as a figure: a line a batch, from collapsed over drawn to balanced."""
    ax = axes(ax, figsize=(9.5, 4.5))
    signs = {"collapsed": "v", "drawn": "o", "balanced": "_"}
    for how, sign in signs.items():
        ax.plot([], [], sign, color="0.3", label=how)
    lines: dict[tuple, list[Routed]] = {}
    for one in routed(rows):
        lines.setdefault((one.model, one.dtype, one.context, one.batch), []).append(one)
    for place, (where, line) in enumerate(sorted(lines.items())):
        dots = sorted(
            (o for o in line if None not in (o.experts.value, o.total.value)),
            key=lambda o: o.experts.value,
        )
        at = [o.experts.value for o in dots], [o.total.value for o in dots]
        label = f"{where[0]} ({where[1]}, {where[2]} tokens), {where[3]} users"
        ax.plot(*at, ls=style(place), lw=1, color=color(where[0]), label=label)
        for o in dots:
            ax.plot([o.experts.value], [o.total.value], signs[o.how], color=color(where[0]))
    labelled(
        ax,
        "Throughput against the experts of a step",
        "distinct experts of a layer in a step",
        "tokens per second of all users",
    )
    return ax


def sentences(rows: Sequence[Record]) -> list[str]:
    """What stand-in weights make of a batch's throughput."""
    texts, every = [], routed(rows)
    for one in (o for o in every if o.how == "collapsed" and o.total.value):
        place = (one.model, one.dtype, one.context, one.batch)
        drawn = next(
            (
                o
                for o in every
                if o.how == "drawn" and (o.model, o.dtype, o.context, o.batch) == place
            ),
            None,
        )
        if drawn and drawn.total.value:
            times = short(one.total.value / drawn.total.value)
            texts.append(
                f"{one.batch} users of {one.model}: {number(one.total, 'tok/s')} with the engine's "
                f"stand-in weights ({short(one.experts.value)} experts a step), "
                f"{number(drawn.total, 'tok/s')} with drawn ones "
                f"({short(drawn.experts.value)}): {times} times, so that stand-in weights say "
                f"nothing about batches of a mixture ({LEAD})."
            )
    return texts
