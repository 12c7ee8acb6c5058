"""How a table looks in a notebook: numbers short, everything there, a dash for what is missing."""

from __future__ import annotations

from typing import Any

import pandas as pd


def short(value: float | None) -> str:
    """A number for reading: four significant digits, thousands separated."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    for limit, digits in ((100, 1), (10, 2), (1, 3)):
        if size >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.3g}"


def rounded(value: float, digits: int = 4) -> float:
    """A number for a table: significant digits, and whole units however many there are."""
    return float(f"{value:.{digits}g}" if abs(value) < 10**digits else round(value))


class Shown(pd.DataFrame):
    """A DataFrame that shows all of itself: no reason cut off, no column hidden, a dash for what is
    missing. It computes as any other."""

    @property
    def _constructor(self) -> type[Shown]:
        return Shown

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return pd.DataFrame(self).map(cell).to_html()

    def __repr__(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return pd.DataFrame(self).map(cell).to_string()


def cell(value: Any) -> str:
    """What a cell says; whole numbers stand as they are."""
    if value is None or value is pd.NA or value != value:
        return "-"
    return short(value) if isinstance(value, float) else str(value)
