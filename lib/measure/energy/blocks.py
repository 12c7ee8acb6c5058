"""Cells of an energy sweep, the order in which their blocks are measured, and the row of each.

A cell is a context and a number of new tokens; a block is one window of back-to-back calls.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib.hardware.validity import Gate, Window
from lib.measure.energy.windows import Span
from lib.records import record

LEVELS = ("ok", "unknown", "warn", "invalid")


@dataclass(frozen=True)
class Cell:
    """What one row is of. `kind` is energy, energy-slope for lengths that only serve a line,
    energy-again of a second pass, or batch-energy; `weights` names what the weights were filled
    with, where that is the point."""

    context: int
    new_tokens: int
    blocks: int
    kind: str = "energy"
    weights: str = ""


@dataclass(frozen=True)
class Block:
    """One window of a cell: when it ran on its trace, its place in its round, what it gave.

    `paper_call_j` is the paper's estimate, the mean over the window's calls; `additivity` how far
    the two halves of the window are from the whole.
    """

    span: Span
    window: Window
    trace: str
    place: int
    paper_call_j: float | None
    additivity: float | None

    def per_call_j(self, name: str) -> float | None:
        """Joules of a call by one estimator."""
        joules = self.window.joules.get(name)
        return None if joules is None else joules / len(self.span.calls_s)


def cells_of(
    contexts: Sequence[int],
    new_tokens: int,
    block_contexts: Sequence[int],
    blocks: int,
    other_blocks: int,
    slope_tokens: Sequence[int],
    slope_blocks: int,
    kind: str = "energy",
) -> list[Cell]:
    """The cells of a sweep, the headline length, of that kind, of each context first."""
    if unknown := [c for c in block_contexts if c not in contexts]:
        raise ValueError(f"block_contexts {unknown} are not among the contexts {list(contexts)}")
    cells = [
        Cell(c, new_tokens, blocks if c in block_contexts else other_blocks, kind) for c in contexts
    ]
    cells += [
        Cell(c, g, slope_blocks, "energy-slope")
        for c in block_contexts
        for g in slope_tokens
        if g != new_tokens
    ]
    return [cell for cell in cells if cell.blocks > 0]


def plan(cells: Sequence[Cell], seed: int) -> list[list[Cell]]:
    """The order of the cells in each round: shuffled, then the same reversed, and again.

    A cell with fewer blocks than there are rounds has them spread over the whole session.
    """
    rng, count = random.Random(seed), max((cell.blocks for cell in cells), default=0)
    rounds: list[list[Cell]] = []
    order: list[Cell] = []
    for number in range(count):
        order = order[::-1] if number % 2 else rng.sample(list(cells), len(cells))
        rounds.append([cell for cell in order if _due(cell.blocks, number, count)])
    return rounds


def _due(blocks: int, number: int, count: int) -> bool:
    return (number + 1) * blocks // count > number * blocks // count


def samples_of(blocks: Sequence[Block], idle_w: float | None) -> dict[str, list[float]]:
    """Seconds of every call, and joules of a call for each block that can be believed.

    `energy_j` is by the estimator that is published, `average_energy_j` and `instant_energy_j` by
    the power readings, `paper_energy_j` by the paper's estimator, `net_energy_j` is energy less
    what the idle board draws in that time. `start_s` and `stop_s` are the edges on the traces. Of
    several boards all of these are sums, and `board_energy_j` holds the joules of each.
    """
    samples = {"e2e_s": [stop - start for b in blocks for start, stop in b.span.calls_s]}
    good = believed(blocks)
    if not good:
        return samples
    calls = [len(b.span.calls_s) for b in good]
    columns: dict[str, list[Any]] = {
        "energy_j": [b.window.energy_j / n for b, n in zip(good, calls, strict=True)],
        "average_energy_j": [b.per_call_j("average_j") for b in good],
        "instant_energy_j": [b.per_call_j("instant_j") for b in good],
        "paper_energy_j": [b.paper_call_j for b in good],
        "additivity": [b.additivity for b in good],
    }
    if idle_w is not None:
        columns["net_energy_j"] = [
            (b.window.energy_j - idle_w * b.window.seconds) / n
            for b, n in zip(good, calls, strict=True)
        ]
    if all(b.window.parts for b in good):
        columns["board_energy_j"] = [
            [joules / n for joules in b.window.boards_j] for b, n in zip(good, calls, strict=True)
        ]
    columns["start_s"] = [b.span.start_s for b in good]
    columns["stop_s"] = [b.span.stop_s for b in good]
    return samples | {name: list(c) for name, c in columns.items() if None not in c}


def values_of(blocks: Sequence[Block]) -> dict[str, Any]:
    """Sums over the blocks that can be believed, and what each gate found at its worst."""
    good = believed(blocks)
    values: dict[str, Any] = {
        "blocks": len(blocks),
        "invalid_blocks": [b.window.reason for b in blocks if b.window.energy_j is None],
        "gates": {
            g.code: {"level": g.level, "value": g.value, "text": g.text}
            for g in worst([g for b in blocks for g in b.window.gates])
        },
    }
    if good:
        values |= {
            "window_energy_j": sum(b.window.energy_j for b in good),
            "window_s": sum(b.window.seconds for b in good),
            "estimator": Counter(b.window.estimator for b in good).most_common(1)[0][0],
            "calls": [len(b.span.calls_s) for b in good],
            "traces": [f"{b.trace}.jsonl.gz" for b in good],
            "places": [b.place for b in good],
        }
    return values


def believed(blocks: Sequence[Block]) -> list[Block]:
    """Blocks that have an energy."""
    return [block for block in blocks if block.window.energy_j is not None]


def worst(gates: Sequence[Gate]) -> list[Gate]:
    """For each code the gate of the worst level, among these the one of the largest value."""
    ordered = sorted(gates, key=lambda g: (LEVELS.index(g.level), abs(g.value or 0.0)))
    return list({gate.code: gate for gate in ordered}.values())


def warnings_of(blocks: Sequence[Block]) -> tuple[dict[str, str], ...]:
    """One warning for each gate that warned or failed, with the number of blocks: a block counts
    once, whatever number of boards it is of."""
    of_blocks = [[g for g in b.window.gates if g.level in ("warn", "invalid")] for b in blocks]
    raised = [gate for gates in of_blocks for gate in gates]
    counts = Counter(code for gates in of_blocks for code in {gate.code for gate in gates})
    return tuple(
        record.warning(g.code, f"{counts[g.code]} of {len(blocks)} blocks: {g.text}")
        for g in worst(raised)
    )


def missing_of(blocks: Sequence[Block], device_reason: str | None) -> dict[str, str]:
    """Why there is no energy: the device's reason, or that of the blocks."""
    if believed(blocks):
        return {}
    reason = device_reason or blocks[0].window.reason
    return dict.fromkeys(("energy_j", "paper_energy_j"), reason)
