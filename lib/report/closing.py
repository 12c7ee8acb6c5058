"""What a run found, in a few lines for the console: each model on each stack, a line each."""

from __future__ import annotations

from pathlib import Path

from lib.analysis import choice
from lib.analysis.choice import Cell, Option
from lib.analysis.rows import load
from lib.show.wording import short
from lib.stats import Estimate

HEAD = ("model", "stack", "context", "first token", "one user", "most users", "energy")
UNITS = ("", "", "tokens", "ms", "tok/s", "tok/s", "J / 1,000 tokens")
LINES = 12


def text(out_dir: Path) -> str:
    """The table; empty where no call was timed. The report has intervals, methods and reasons."""
    try:
        rows = load(out_dir)
    except FileNotFoundError:  # a run that ended before its first row
        return ""
    options = [option for option in choice.options(rows) if option.measured]
    if not options:
        return ""
    rows = [HEAD, UNITS, *(_line(option) for option in options[:LINES])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if len(options) > LINES:
        lines.append(f"and {len(options) - LINES} more in the report")
    return "\n".join(lines)


def _line(option: Option) -> tuple[str, ...]:
    alone = max((c for c in option.measured if c.users == 1), key=_context, default=None)
    shared = [c for c in option.measured if c.users > 1]
    most = max(shared, key=lambda c: c.total.value, default=None)
    joules = [c.token_j for c in (most, alone) if c and c.token_j.value is not None]
    return (
        option.model,
        option.engine,
        f"{alone.context:,}" if alone else "-",
        _text(alone.ttft_s, 1e3) if alone else "-",
        _text(alone.per_user) if alone else "-",
        f"{_text(most.total)} for {most.users}" if most else "-",
        _text(joules[0], 1e3) if joules else "-",
    )


def _context(cell: Cell) -> int:
    return cell.context


def _text(value: Estimate, scale: float = 1.0) -> str:
    return "-" if value.value is None else short(value.value * scale)
