"""What nobody measured, as options of the planner: the registered predictions, and what the same
laws say of other cards of the datasheet list. Every number has its interval, and is marked."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from lib import stats
from lib.analysis import fit
from lib.analysis.capacity import registry
from lib.analysis.choice import NOT_PREDICTED, Cell, Option
from lib.analysis.reserved import Reserved
from lib.files import ParamsError, unknown
from lib.hardware.datasheets import datasheets
from lib.models.card import ModelCard
from lib.stats import Estimate

NONE = stats.missing(NOT_PREDICTED)
FAR = "beyond the rows that the laws were fitted to"
NEAR = "may not fit the memory"
BEYOND = "the law of its kernels does not reach this card"
Place = tuple[str, str, str, str]  # GPU, model, number format, stack
CAPTURED = ("graph", "graph-compiled")


def options(measured: Sequence[Option] = ()) -> list[Option]:
    """Every predicted option less the cells that were measured; none where no model is one of
    theirs. Without `measured` all of them."""
    if (file := registry.newest()) is None:
        return []
    cards, every = registry.model_cards(file), _cells()
    arms = dict.fromkeys(place[1:] for place in every)
    if measured and not {option.model for option in measured} & {model for model, *_ in arms}:
        return []
    measured = [option for option in measured if option.devices == 1]
    caches = [(_place(o), o.reserved) for o in measured if o.reserved]
    places = {(*_place(o), cell.context, cell.users) for o in measured for cell in o.measured}
    return [
        option
        for gpu, sheet in datasheets().items()
        for arm in arms
        if (option := _option(gpu, arm, cards, sheet.memory_bytes, every, places, caches))
    ]


def _cache(place: Place, caches: Sequence[tuple[Place, Reserved]]) -> Reserved | None:
    """The cache that the same engine reserved for the same model: on this card, or on the largest
    other one."""
    alike = [(own[0] == place[0], cache) for own, cache in caches if own[1:] == place[1:]]
    largest = max(
        alike, key=lambda one: (one[0], one[1].of_bytes, one[1].cache_bytes), default=None
    )
    return largest and largest[1]


def _option(
    gpu: str,
    arm: tuple[str, str, str],
    cards: Mapping[str, ModelCard],
    memory: int | None,
    every: Mapping[Place, Sequence[Cell]],
    measured: Collection[tuple],
    caches: Sequence[tuple[Place, Reserved]],
) -> Option | None:
    """One model on one card; without cells only where its weights do not fit, an answer too."""
    (model, form, stack), place = arm, (gpu, *arm)
    cells = every.get(place, ())
    left = tuple(c for c in cells if (*place, c.context, c.users) not in measured)
    card = cards[f"{model} {form}"]
    cache = _cache(place, caches)
    fits = memory is None or fit.short_bytes(card, memory, reserved=cache) < 0
    if not left and (cells or fits):
        return None
    setup = ("random", form, stack, "grouped_mm" if card.experts else "none", gpu)
    return Option(model, setup, model, card, memory, left, predicted=True, reserved=cache)


def card_named(text: str, others: Iterable[str] = ()) -> str:
    """The card of the datasheet list, or one of `others`, that a text names by its words: `H200`,
    `RTX 4090`. Where it may be several, the one that is among the `others`.

    Raises ParamsError for an unknown one, and for words of several names.
    """
    if several := re.match(r"(\d+) ?x ?(.+)", text):
        count, card = several.groups()
        raise ParamsError(
            f'GPU {text!r}: name one card, and how many: GPU="{card}" DEVICES={count}'
        )
    others = list(others)
    names = list(dict.fromkeys((*datasheets(), *others)))
    folded = {name.casefold(): name for name in names}
    for wanted in (text.casefold(), f"nvidia {text.casefold()}"):
        if wanted in folded:
            return folded[wanted]
    within = [name for name in names if all(w in name.casefold() for w in text.casefold().split())]
    within = [name for name in within if name in others] or within
    if len(within) > 1 and text.strip():
        raise ParamsError(
            f'GPU {text!r} may be {" or ".join(within)}; give one of these: GPU="{within[0]}"'
        )
    if within and text.strip():
        return within[0]
    raise unknown("GPU", text, names)


def _place(option: Option) -> Place:
    return (option.gpu, option.model, option.of("dtype"), option.stack)


@functools.cache
def _cells() -> dict[Place, tuple[Cell, ...]]:
    """The predicted cells of each place: as registered, and those of other cards."""
    cells: dict[Place, dict[tuple[int, int], Cell]] = {}
    for place, cell in (*_registered(), *_of_other_cards()):
        cells.setdefault(place, {})[cell.context, cell.users] = cell
    for (*arm, stack), mine in cells.items():
        if stack in CAPTURED:
            eager = cells.get((*arm, "hf-eager"), {})
            for at in [at for at in mine.keys() & eager if _surely_less(mine[at], eager[at])]:
                mine[at] = _unsaid(*at, BEYOND)
    return {place: tuple(several.values()) for place, several in cells.items()}


def _surely_less(captured: Cell, eager: Cell) -> bool:
    """A captured step is that of generate() without the host. Where the laws say that it is slower,
    by intervals apart, that of its kernels does not reach as far as this card."""
    high, low = captured.per_user.high, eager.per_user.low
    return high is not None and low is not None and high < low


def _registered() -> Iterator[tuple[Place, Cell]]:
    data = registry.sealed(registry.newest())
    shapes: dict[tuple, dict[str, Estimate]] = {}
    notes: dict[tuple, str] = {}
    for line in data["cells"]:
        names = ("gpu", "model", "form", "stack", "context", "batch")
        where = tuple(line[name] for name in names)
        shape = shapes.setdefault(where, {})
        if line["metric"] == "decode_tok_per_s":
            beyond = any("beyond" in note for note in line.get("notes", ()))
            told = (FAR if beyond else "", NEAR if line["holds"] == "near" else "")
            notes[where] = ", ".join(filter(None, told))
        ends = [line.get(name) for name in ("value", "low", "high")]
        shape[line["metric"]] = _estimate(ends, data["level"], line.get("missing", ""))
    for (*place, context, users), told in shapes.items():
        decode = told["decode_tok_per_s"]
        if decode.value is None:
            yield tuple(place), _unsaid(context, users, decode.reason)
            continue
        joules = stats.scaled(told["decode_j_per_1k"], 1e-3)
        each = stats.scaled(decode, 1 / users)
        note = notes[*place, context, users]
        yield tuple(place), Cell(context, users, told["ttft_s"], each, joules, note=note)


def _unsaid(context: int, users: int, reason: str) -> Cell:
    """A cell without a value, which says why."""
    why = f"{NOT_PREDICTED}: {reason.removeprefix(f'{NOT_PREDICTED}: ')}"
    return Cell(context, users, NONE, stats.missing(why), NONE, why)


def _of_other_cards() -> Iterator[tuple[Place, Cell]]:
    data = registry.other_cards(registry.newest())
    for *place, context, users, decode, first in data["cells"]:
        each = stats.scaled(_estimate(decode, data["level"]), 1 / users)
        yield tuple(place), Cell(context, users, _estimate(first, data["level"]), each, NONE)


def _estimate(ends: Sequence[float | None] | None, level: float, reason: str = "") -> Estimate:
    if ends is None or ends[0] is None:
        return stats.missing(f"not predicted: {reason}") if reason else NONE
    return Estimate(*ends, 1, "predicted", level=level)
