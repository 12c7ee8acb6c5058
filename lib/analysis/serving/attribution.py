"""Energy attributed to prompt tokens, output tokens and idle time, by a fit over many mixes.

A mix is one window: its joules and what was done in it. The model is linear: joules = sum of cost
x amount, each cost at least zero. Some mixes are held out before the fit and predicted by it, and
their errors decide whether the costs are worth anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats

from lib.analysis.serving import reading
from lib.records.record import Record
from lib.stats import CONFIDENCE, Estimate, missing

# amount of a mix: name of its cost. `busy_seconds` are those with a request in flight: with it, the
# cost of a step that all users share is told apart from that of their tokens.
COSTS = {
    "seconds": "idle_w",
    "prompt_tokens": "prompt_token_j",
    "output_tokens": "output_token_j",
    "busy_seconds": "busy_w",
}
AMOUNTS = ("seconds", "prompt_tokens", "output_tokens")
BUSY = (*AMOUNTS, "busy_seconds")
LEAST_FITTED, HELD_OUT = 8, 4
MEDIAN_LIMIT, WORST_LIMIT = 0.05, 0.10
# Condition of the scaled design above which the mixes do not tell the costs apart.
CONDITION_LIMIT = 60.0
Mix = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """Costs by name (J a token, W), and how far the held-out mixes are from what they predict.

    `errors` are predicted / measured - 1, by the mix's place in the list that was given.
    """

    costs: dict[str, Estimate]
    errors: dict[int, float]
    fitted: tuple[int, ...]
    condition: float

    @property
    def median_error(self) -> float:
        """Median size of the held-out errors."""
        return statistics.median(abs(error) for error in self.errors.values())

    @property
    def worst_error(self) -> float:
        """Largest size of the held-out errors."""
        return max(abs(error) for error in self.errors.values())

    @property
    def ok(self) -> bool:
        """Whether the held-out mixes are predicted within the limits."""
        return self.median_error <= MEDIAN_LIMIT and self.worst_error <= WORST_LIMIT


def of_rows(rows: Sequence[Record]) -> Fit | str:
    """The fit over rows of mixes in the order in which they were measured, or why there is none.

    Busy time is a cost of its own where the mixes tell it from all time, which their amounts say
    and not their energy.
    """
    mixes = [reading.mix(row) for row in rows if not row.error]
    if len(mixes) < len(rows):
        return f"{len(rows) - len(mixes)} of {len(rows)} mixes failed; measure them again"
    if reason := next((row.missing["energy_j"] for row in rows if "energy_j" in row.missing), ""):
        return reason
    seed, reason = rows[0].values["seed"], ""
    for amounts in (BUSY, AMOUNTS):
        try:
            return fit(mixes, seed=seed, amounts=amounts)
        except ValueError as error:
            reason = str(error)
    return reason


def held_out(count: int, seed: int) -> tuple[int, ...]:
    """Places of the mixes that are held out, drawn before anything is measured."""
    if count < LEAST_FITTED + HELD_OUT:
        raise ValueError(
            f"a fit over {LEAST_FITTED} mixes with {HELD_OUT} held out needs "
            f"{LEAST_FITTED + HELD_OUT}, got {count}"
        )
    rng = np.random.default_rng(seed)
    return tuple(sorted(int(n) for n in rng.choice(count, HELD_OUT, replace=False)))


def design(mixes: Sequence[Mix], places: Sequence[int], amounts: Sequence[str]) -> np.ndarray:
    """Amounts over joules, one row a mix: least squares of it are of relative errors."""
    rows = [[mixes[n][name] for name in amounts] for n in places]
    joules = np.array([mixes[n]["energy_j"] for n in places], dtype=float)
    return np.array(rows, dtype=float) / joules[:, None]


def fit(mixes: Sequence[Mix], *, seed: int, amounts: Sequence[str] = AMOUNTS) -> Fit:
    """Fit the costs to all mixes but those held out by `seed`, and predict these.

    Each mix needs `energy_j` and the amounts. Raises ValueError where a mix has no energy, or where
    the mixes are too alike to tell one cost from another.
    """
    if unknown := set(amounts) - COSTS.keys():
        raise ValueError(f"unknown amounts {sorted(unknown)}; known: {', '.join(COSTS)}")
    lacking = [n for n, mix in enumerate(mixes) if not mix.get("energy_j")]
    if lacking:
        raise ValueError(f"mixes {lacking} have no energy; measure them again or leave them out")
    out = held_out(len(mixes), seed)
    places = tuple(n for n in range(len(mixes)) if n not in out)
    matrix = design(mixes, places, amounts)
    scale = np.linalg.norm(matrix, axis=0)
    if not scale.all():
        names = [name for name, size in zip(amounts, scale, strict=True) if not size]
        raise ValueError(f"no mix has any {', '.join(names)}; add mixes that have")
    condition = float(np.linalg.cond(matrix / scale))
    if condition > CONDITION_LIMIT:
        raise ValueError(
            f"the mixes are too alike to tell {', '.join(amounts)} apart (condition "
            f"{condition:.0f} > {CONDITION_LIMIT:g}); vary the lengths and the load more"
        )
    solution, _ = optimize.nnls(matrix / scale, np.ones(len(places)))
    cost = solution / scale
    errors = {
        n: float(sum(c * mixes[n][name] for c, name in zip(cost, amounts, strict=True)))
        / mixes[n]["energy_j"]
        - 1
        for n in out
    }
    return Fit(_estimates(matrix, cost, amounts), errors, places, condition)


def _estimates(matrix: np.ndarray, cost: np.ndarray, amounts: Sequence[str]) -> dict[str, Estimate]:
    """Costs with t intervals; a cost at its bound of zero has none."""
    n, free = len(matrix), len(matrix) - len(amounts)
    variance = float(np.sum((1 - matrix @ cost) ** 2)) / free
    spread = np.sqrt(variance * np.linalg.inv(matrix.T @ matrix).diagonal())
    half = scipy_stats.t.ppf((1 + CONFIDENCE) / 2, free) * spread
    estimates = {}
    for value, width, amount in zip(cost, half, amounts, strict=True):
        name = COSTS[amount]
        low = max(0.0, float(value - width))
        estimates[name] = Estimate(
            float(value), low, float(value + width), n, "least squares of relative errors, >= 0"
        )
        if value == 0:
            estimates[name] = missing("the fit gives zero: these mixes do not show this cost")
    return estimates
