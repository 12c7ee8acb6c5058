"""Which rows belong together: those of one model in one setup, what such a group is called, and how
tables and lines are built group by group.

Every table, figure and sentence that is about one model at a time goes through here, so that rows
of two stacks, number formats, sources of weights, experts implementations or GPUs never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from lib import stats
from lib.analysis.rows import SETUP, Rows
from lib.records.kinds import DTYPES, model_order
from lib.records.record import Record, record_id, select
from lib.show.figure import color, style
from lib.show.table import Column, Table
from lib.stacks.registry import STACKS
from lib.stats import Estimate

CONTEXT = "context (tokens)"  # of an axis
ARM = ("context", "new_tokens", "batch", "decoding")  # what tells the arms of one setup apart
# Where they are listed; a value that is not here comes after them, by name.
ORDER = {
    "dtype": DTYPES, "stack": tuple(STACKS),
    "experts": ("none", "grouped_mm", "batched_mm", "loop", "all_experts"),
}  # fmt: skip
WORDS = {
    "weights": "{} weights",
    "experts": "experts {}",
    "batch": "batch {}",
    "context": "{} tokens",
    "new_tokens": "{} new",
}
RANDOM_NOTE = (
    "random weights: valid for memory and dense latency; router-dependent for "
    "mixture-of-experts prefill"
)


class Name(NamedTuple):
    """What a group is called in a figure or sentence, and its place among setups (a line style)."""

    label: str
    place: int


@dataclass(frozen=True)
class Group:
    """Rows of one model in one setup; `setup` holds the values of SETUP.

    `label` is the model, and in brackets what tells this group from the others beside it.
    """

    model: str
    setup: tuple[str, ...]
    label: str
    place: int
    rows: tuple[Record, ...]

    def of(self, name: str) -> str:
        """A value of the setup."""
        return self.setup[SETUP.index(name)]

    def but(self, *names: str) -> tuple[str, ...]:
        """The setup less some of its fields."""
        return tuple(v for n, v in zip(SETUP, self.setup, strict=True) if n not in names)


def by_setup(
    rows: Iterable[Record],
    kinds: str | Sequence[str],
    *,
    without: Sequence[str] = (),
    failed: bool = False,
) -> list[Group]:
    """Rows of these kinds apart by model and setup, the models in the order of params/models.yaml.

    `without` names fields of SETUP that do not set rows apart (what an ablation changes). Rows that
    failed are left out unless `failed`.
    """
    rows = Rows.of(rows)
    blank = [SETUP.index(name) for name in without if name in SETUP]
    groups: dict[tuple[str, ...], list[Record]] = {}
    for row in rows.of_kinds(kinds):
        if failed or not row.error:
            setup = list(rows.setup(row))
            for place in blank:
                setup[place] = ""
            groups.setdefault((str(row.key.get("model")), *setup), []).append(row)
    keys = sorted(groups, key=lambda key: (model_order(key[0]), setup_order(key[1:])))
    names = named(keys)
    return [Group(key[0], key[1:], *names[key], tuple(groups[key])) for key in keys]


def named(keys: Sequence[tuple], more: Sequence[str] = ()) -> dict[tuple, Name]:
    """What each group is called; a key is the model, the values of SETUP, and those of `more`.

    Beside the model a label holds the fields in which the groups of this model differ, and those in
    which any groups differ that must not be compared: where one line is of another stack, every
    line says its stack. Experts are a model's own affair. Groups of the same place have the same
    setup, as far as it is said.
    """
    fields = dict(enumerate((*SETUP, *more), start=1))
    shared = [at for at, name in fields.items() if name != "experts"]
    everywhere = {at for at in shared if len({key[at] for key in keys}) > 1}
    texts = {}
    for key in keys:
        mine = [other for other in keys if other[0] == key[0]]
        differing = {at for at in fields if len({other[at] for other in mine}) > 1} | everywhere
        stack = STACKS.get(str(key[1 + SETUP.index("stack")]).partition(" ")[0])
        if stack and stack.apart:
            differing.discard(1 + SETUP.index("experts"))  # an engine's own, said by its stack
        words = (WORDS.get(fields[at], "{}").format(key[at]) for at in sorted(differing))
        texts[key] = ", ".join(words)
    listed = sorted(keys, key=lambda key: setup_order(key[1:]))
    places = list(dict.fromkeys(texts[key] for key in listed if texts[key]))
    return {
        key: Name(f"{key[0]} ({text})", places.index(text)) if text else Name(str(key[0]), 0)
        for key, text in texts.items()
    }


def setup_order(setup: Sequence[Any]) -> tuple[tuple[int, str], ...]:
    """Sorts setups: the study's stack and number format first, then the others."""
    names = (*SETUP, *[""] * (len(setup) - len(SETUP)))
    return tuple(_place(name, value) for name, value in zip(names, setup, strict=True))


def _place(name: str, value: Any) -> tuple[int, str]:
    listed = ORDER.get(name, ())
    number = value if isinstance(value, int) else len(listed)
    return (listed.index(value) if value in listed else number, str(value))


def with_sample(group: Group, name: str, **key: Any) -> list[Record]:
    """Rows of a group that have this sample and these key fields, by context."""
    rows = [r for r in select(group.rows, **key) if r.samples.get(name)]
    return sorted(rows, key=lambda r: r.key["context"])


def whole_calls(group: Group) -> list[Record]:
    """The timed calls of the shortest length in a group, by context."""
    lengths = [r.key["new_tokens"] for r in group.rows if r.samples.get("e2e_s")]
    return with_sample(group, "e2e_s", new_tokens=min(lengths, default=0))


def sampled(rows: Sequence[Record], name: str, q: float = 50, factor: float = 1) -> Estimate:
    """The percentile of a sample of the last row that has it, of its other visits too, or why there
    is none."""
    reason = "not measured"
    for row in reversed(rows):
        if values_of(row, name):
            every = {one.visit: one for one in (*row.others, row) if values_of(one, name)}.values()
            estimate = stats.of_visits([values_of(one, name) for one in every], q)
            return replace(stats.scaled(estimate, factor), records=tuple(map(record_id, every)))
        if row.error:
            reason = f"failed: {row.error}"
        elif name in row.missing:
            reason = f"not measured: {row.missing[name]}"
    return stats.missing(reason)


def values_of(row: Record, name: str) -> list[float]:
    """A sample of a row, without the repetitions that have none."""
    return [x for x in row.samples.get(name) or () if x is not None]


def failures(rows: Sequence[Record], kinds: str | Sequence[str]) -> list[str]:
    """What failed, by model, setup and context; once where several rows share the reason."""
    lines = []
    for group in by_setup(rows, kinds, failed=True):
        for row in (r for r in group.rows if r.error):
            lines.append(f"{group.label} at {row.key.get('context')} tokens: {row.error}.")
    return list(dict.fromkeys(lines))


def arm_text(key: dict[str, Any]) -> str:
    """The fields of a key that say which arm it is."""
    fields = ("weights", "dtype", "stack", "devices", "server", "experts", *ARM, "load")
    return ", ".join(
        f"{f.replace('_', ' ')} {key[f]}" for f in fields if key.get(f) not in (None, "none")
    )


def build(
    name: str,
    title: str,
    rows: Sequence[Record],
    kinds: Sequence[str],
    fields: Sequence[str],
    columns: Sequence[Any],
    cells: Callable[[list[Record]], Sequence[Any]] | None = None,
    having: str = "",
) -> Table:
    """A row for each group of rows of these kinds; with `having`, only where that kind is in it.

    `columns` are metrics and pairs of a Column with a function of the group, or Columns whose
    `cells` are computed together. Numbers that do not say which rows they come from get the ids of
    their group. An optional metric that no group has is left out.
    """
    rows = Rows.of(rows)
    groups = grouped(rows, kinds, fields)
    if having:
        groups = {at: g for at, g in groups.items() if any(r.kind == having for r in g)}
    if cells is None:
        pairs = [c if isinstance(c, tuple) else (c.column, c.of) for c in columns]
        values = {at: [of(group) for _, of in pairs] for at, group in groups.items()}
        places = [
            place
            for place, column in enumerate(columns)
            if not getattr(column, "optional", False)
            or any(line[place].value is not None for line in values.values())
        ]
        columns = [pairs[place][0] for place in places]
        lines = {at: [line[place] for place in places] for at, line in values.items()}
    else:
        lines = {at: cells(group) for at, group in groups.items()}
    differ, notes = setups([r for g in groups.values() for r in g], rows)
    at = [SETUP.index(d) for d in differ]
    leading = [
        Column("model", numeric=False),
        *(Column(d, numeric=False) for d in differ),
        *(Column(f.replace("_", " "), numeric=False) for f in fields),
    ]
    built = tuple(
        (where[0], *(where[1][i] for i in at), *where[2:], *_behind(columns, lines[where], group))
        for where, group in groups.items()
    )
    return Table(name, title, (*leading, *columns), built, tuple(notes))


def _behind(columns: Sequence[Column], cells: Sequence[Any], group: Sequence[Record]) -> list[Any]:
    if not cells:  # a group without a row
        return []
    ids = tuple(dict.fromkeys(record_id(row) for row in group))

    def with_ids(column: Column, cell: Any) -> Any:
        is_number = isinstance(cell, Estimate) and cell.value is not None
        return replace(cell, records=cell.records or ids) if is_number and column.measured else cell

    return [with_ids(*pair) for pair in zip(columns, cells, strict=True)]


def grouped(rows: Sequence[Record], kinds: Sequence[str], fields: Sequence[str]) -> dict:
    """Rows grouped by model, setup and the given key fields, in a readable order."""
    rows = Rows.of(rows)
    groups: dict[tuple, list[Record]] = {}
    for row in rows.of_kinds(kinds):
        at = (_field(row, name) for name in fields)
        groups.setdefault((str(row.key.get("model")), rows.setup(row), *at), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: _order(item[0])))


def _field(row: Record, name: str) -> Any:
    if name == "protocol":
        return "paper" if row.kind == "memory-paper" else "generate()"
    return row.key.get(name)


def _order(where: tuple) -> tuple:
    model, setup, *fields = where
    numbers = tuple(f if isinstance(f, int | float) else 0 for f in fields)
    return (model_order(model), setup_order(setup), numbers, tuple(map(str, fields)))


def setups(members: Sequence[Record], rows: Rows) -> tuple[list[str], list[str]]:
    """The setup fields that differ between rows, and a note about those that do not."""
    seen = dict(zip(SETUP, map(set, zip(*map(rows.setup, members), strict=True)), strict=False))
    seen = seen or {name: set() for name in SETUP}
    differ = [name for name in SETUP if len(seen[name]) > 1]
    same = [f"{name} {next(iter(values))}" for name, values in seen.items() if len(values) == 1]
    notes = ["all rows: " + ", ".join(same)] if same else []
    if "random" in seen["weights"]:
        notes.append(RANDOM_NOTE)
    return differ, notes


def points_and_line(
    ax: Axes,
    group: Group,
    rows: Sequence[Record],
    samples: Sequence[Sequence[float]],
    what: str = "",
    **drawn: Any,
) -> None:
    """Every repetition as a faint point, the medians as a line, over the rows' contexts.

    The line is called what the group is called, and `what` it shows of it.
    """
    contexts, shade = [r.key["context"] for r in rows], color(group.model)
    for context, values in zip(contexts, samples, strict=True):
        ax.plot([context] * len(values), values, "o", ms=3.5, alpha=0.3, color=shade)
    medians = [stats.median(values).value for values in samples]
    if medians:
        ax.plot(
            contexts,
            medians,
            ls=style(group.place),
            color=shade,
            label=f"{group.label}{what}",
            **({"marker": "."} | drawn),
        )
