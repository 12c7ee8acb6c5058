"""Fitting a law to few rows: positive coefficients, relative errors, what the law does not know.

A law says y = x . beta, with beta >= 0. A row differs from it by a factor exp(d + v + e): d is what
the law misses about a model on a stack, alike where context and batch are near; v is shared by the
rows of one visit; e is its own. The three sizes are estimated from the rows (restricted maximum
likelihood), the coefficients by generalised least squares on logarithms. A prediction is the law
times what its neighbours among the rows differ by; its interval holds all four uncertainties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats

LEVEL = 0.90
DOUBLINGS = 3.0  # over so many doublings of context or batch, what a law misses changes by 1 / e
# What is missed about a model is estimated from few of them; less than this is not believed.
LEAST = {"model": 0.02, "visit": 0.003, "row": 0.003}
MOST = 1.0
LEAST_PART = 0.003  # a coefficient that makes less of every row is not resolved from zero
ROUNDS, SETTLED = 6, 1e-4  # of the fit; settled where no row moves by more


class NotResolved(LookupError):
    """The rows cannot say this; the message is the reason."""


@dataclass(frozen=True)
class Cell:
    """One measured number, and what the law is to explain it by.

    `value` is in s or J; `x` are the amounts by the names of the law's coefficients (bytes over
    bandwidth in s, kernels, ...). `known` is a part of the value that needs no coefficient.
    """

    law: str
    model: str
    stack: str
    context: int
    batch: int
    value: float
    x: dict[str, float]
    visit: str
    known: float = 0.0

    @property
    def group(self) -> tuple[str, str]:
        """What the law may miss in common: a model on a stack."""
        return (self.model, self.stack)


@dataclass(frozen=True)
class Spread:
    """Standard deviations of logarithms: of a model on a stack, of a visit, of a row."""

    model: float
    visit: float
    row: float


START = Spread(0.05, 0.02, 0.02)


@dataclass(frozen=True)
class Guess:
    """A prediction in logarithms: its median, its standard deviation, and its degrees of freedom.

    `shares` says which part of the law's value each coefficient makes.
    """

    log_median: float
    log_sd: float
    freedom: float
    shares: dict[str, float]

    @property
    def quantile(self) -> float:
        """How many standard deviations the interval reaches to either side."""
        return float(scipy_stats.t.ppf((1 + LEVEL) / 2, self.freedom))

    def interval(self) -> tuple[float, float, float]:
        """Median and the ends of the interval at LEVEL."""
        half = self.quantile * self.log_sd
        return tuple(math.exp(self.log_median + sign * half) for sign in (0, -1, 1))

    def wider(self, log_sd: float) -> Guess:
        """The same with an independent uncertainty more."""
        return replace(self, log_sd=math.hypot(self.log_sd, log_sd))

    def draws(self, count: int, seed: Sequence[int]) -> np.ndarray:
        """Evenly drawn quantiles of the prediction, in an order that the seed chooses.

        Shape (count,). The quantiles are fixed; only their pairing with other draws is random.
        """
        levels = (np.arange(count) + 0.5) / count
        values = self.log_median + self.log_sd * scipy_stats.t.ppf(levels, self.freedom)
        return np.exp(np.random.default_rng(list(seed)).permutation(values))


@dataclass(frozen=True)
class Fit:
    """A law fitted to rows. `beta` are its coefficients, `covariance` theirs, both by `names`.

    `inflate` is a factor on every standard deviation, from rows that were left out.
    """

    law: str
    names: tuple[str, ...]
    beta: np.ndarray
    covariance: np.ndarray
    spread: Spread
    cells: tuple[Cell, ...]
    inverse: np.ndarray
    jacobian: np.ndarray
    residual: np.ndarray
    freedom: float
    inflate: float = 1.0

    def coefficient(self, name: str) -> tuple[float, float, float]:
        """Value and interval of a coefficient (low end not below 0)."""
        if name not in self.names:
            raise NotResolved(f"no row resolves {name}")
        at = self.names.index(name)
        half = float(scipy_stats.t.ppf((1 + LEVEL) / 2, self.freedom))
        half *= self.inflate * math.sqrt(self.covariance[at, at])
        value = float(self.beta[at])
        return value, max(value - half, 0.0), value + half

    def guess(self, cell: Cell) -> Guess:
        """What the law and the rows near it say about a cell (its `value` is not looked at)."""
        if absent := sorted(n for n, amount in cell.x.items() if amount and n not in self.names):
            raise NotResolved(f"no row resolves {', '.join(absent)}")
        row = np.array([cell.x.get(name, 0.0) for name in self.names])
        value = float(row @ self.beta)
        if value <= 0:
            raise NotResolved(f"nothing of {', '.join(self.names)} enters this cell")
        near = self.spread.model**2 * _alike([cell], self.cells)[0]
        slope = row / value
        weights = self.inverse @ near
        beyond = slope - self.jacobian.T @ weights
        variance = (
            float(beyond @ self.covariance @ beyond)
            + self.spread.model**2
            - float(near @ weights)
            + self.spread.visit**2
            + self.spread.row**2
        )
        return Guess(
            math.log(value) + float(weights @ self.residual),
            self.inflate * math.sqrt(max(variance, 0.0)),
            self.freedom,
            dict(zip(self.names, (row * self.beta / value).tolist(), strict=True)),
        )


def fit(law: str, cells: Sequence[Cell], *, inflate: float = 1.0, start: Spread = START) -> Fit:
    """Fit a law to its rows.

    A coefficient that no row needs, or that the rows push to zero, is left out: it is not resolved,
    and a cell that needs it cannot be predicted. Raises NotResolved where no coefficient is left.
    """
    cells = tuple(c for c in cells if c.law == law and c.value > c.known)
    names = tuple(sorted({n for c in cells for n, amount in c.x.items() if amount}))
    while True:
        if not cells or not names or len(cells) <= len(names):
            few = f"{len(cells)} rows cannot resolve {len(names)} coefficients"
            raise NotResolved(few if cells else "no row is left")
        x = np.array([[c.x.get(name, 0.0) for name in names] for c in cells])
        y = np.array([c.value - c.known for c in cells])
        first = optimize.lsq_linear(x / y[:, None], np.ones(len(y)), bounds=(0, np.inf)).x
        part = np.max(x * first / y[:, None], axis=0)
        kept = tuple(n for n, share in zip(names, part, strict=True) if share > LEAST_PART)
        if kept == names and np.linalg.matrix_rank(x / y[:, None], tol=1e-6) == len(names):
            break
        names = kept if kept != names else names[:-1]
    beta, spread = first, start
    kernels = _kernels(cells)
    for _ in range(ROUNDS):
        value = x @ beta
        jacobian, residual = x / value[:, None], np.log(y) - np.log(value)
        spread = _spread(kernels, jacobian, residual, spread)
        inverse = np.linalg.inv(_covariance(kernels, spread))
        covariance = np.linalg.inv(jacobian.T @ inverse @ jacobian)
        step = covariance @ jacobian.T @ inverse @ residual
        beta = np.maximum(beta + step, beta * 0.2)
        if np.max(np.abs(x * step / value[:, None])) < SETTLED:
            break
    value = x @ beta
    groups = len({c.group for c in cells})
    return Fit(
        law, names, beta, covariance, spread, cells, inverse, x / value[:, None],
        np.log(y) - np.log(value), max(groups - 1, 2), inflate,
    )  # fmt: skip


def _places(cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log2 of context and batch, shape (cells, 2); groups and visits as text, shape (cells,)."""
    shapes = np.log2([[c.context, c.batch] for c in cells])
    groups = np.array(["\n".join(c.group) for c in cells])
    return shapes, groups, np.array([c.visit for c in cells])


def _alike(cells: Sequence[Cell], others: Sequence[Cell]) -> np.ndarray:
    """How much of what the law misses two cells share, shape (cells, others).

    1 at the same shape, less at others, 0 between groups.
    """
    (shapes, groups, _), (near, same, _) = _places(cells), _places(others)
    apart = np.abs(shapes[:, None] - near[None]).sum(-1)
    return np.exp(-apart / DOUBLINGS) * (groups[:, None] == same[None])


def _kernels(cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of rows: how alike they are, and whether they are of one visit."""
    visits = _places(cells)[2]
    return _alike(cells, cells), (visits[:, None] == visits[None]).astype(float)


def _covariance(kernels: tuple[np.ndarray, np.ndarray], spread: Spread) -> np.ndarray:
    alike, visit = kernels
    own = spread.row**2 * np.eye(len(alike))
    return spread.model**2 * alike + spread.visit**2 * visit + own


def _spread(
    kernels: tuple[np.ndarray, np.ndarray],
    jacobian: np.ndarray,
    residual: np.ndarray,
    start: Spread,
) -> Spread:
    """The three sizes that make the residuals most likely, the coefficients integrated out."""

    def loss(logs: np.ndarray) -> float:
        root = np.linalg.cholesky(_covariance(kernels, Spread(*np.exp(logs))))
        white, left = np.linalg.solve(root, jacobian), np.linalg.solve(root, residual)
        inner = np.linalg.cholesky(white.T @ white)
        left = left - white @ np.linalg.solve(white.T @ white, white.T @ left)
        log_dets = np.log(root.diagonal()).sum() + np.log(inner.diagonal()).sum()
        return float(log_dets + 0.5 * left @ left)

    first = [math.log(v) for v in (start.model, start.visit, start.row)]
    bounds = [(math.log(least), math.log(MOST)) for least in LEAST.values()]
    found = optimize.minimize(
        loss, first, method="Nelder-Mead", bounds=bounds, options={"xatol": 0.02, "fatol": 1e-3}
    )
    return Spread(*(float(v) for v in np.exp(found.x)))


@dataclass(frozen=True)
class Miss:
    """A row that the fit did not see. `reason` says why it was not predicted."""

    law: str
    left_out: str
    cell: Cell
    guess: Guess | None
    reason: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over observed, less one."""
        if self.guess is None:
            return None
        return math.exp(self.guess.log_median) / (self.cell.value - self.cell.known) - 1

    @property
    def deviations(self) -> float | None:
        """How many standard deviations the row lies from its prediction."""
        if self.guess is None:
            return None
        observed = math.log(self.cell.value - self.cell.known)
        return (observed - self.guess.log_median) / self.guess.log_sd

    @property
    def covered(self) -> bool | None:
        """Whether the interval holds the row."""
        return None if self.guess is None else abs(self.deviations) <= self.guess.quantile


def leave_out(
    law: str,
    cells: Sequence[Cell],
    label: str,
    out: Callable[[Cell], bool],
    start: Spread = START,
) -> list[Miss]:
    """Fit without the rows for which `out` holds, and predict them."""
    seen = [c for c in cells if c.law == law and not out(c)]
    missed = [c for c in cells if c.law == law and out(c)]
    try:
        fitted = fit(law, seen, start=start)
    except NotResolved as why:
        return [Miss(law, label, c, None, str(why)) for c in missed]
    found = []
    for cell in missed:
        try:
            found.append(Miss(law, label, cell, fitted.guess(cell)))
        except NotResolved as why:
            found.append(Miss(law, label, cell, None, str(why)))
    return found


def left_out(law: str, cells: Sequence[Cell], start: Spread = START) -> list[Miss]:
    """Every row predicted without its model, its stack, its visit, and the range of its shape.

    Ranges: batches above 8 from those up to 8, contexts above 1,024 from those up to 1,024.
    """
    own = [c for c in cells if c.law == law]
    cuts: list[tuple[str, Callable[[Cell], bool]]] = []
    for model in dict.fromkeys(c.model for c in own):
        cuts.append((f"model {model}", lambda c, m=model: c.model == m))
    stacks = dict.fromkeys(c.stack for c in own)
    for stack in stacks if len(stacks) > 1 else ():
        cuts.append((f"stack {stack}", lambda c, s=stack: c.stack == s))
    for visit in dict.fromkeys(c.visit for c in own):
        cuts.append(("each visit in turn", lambda c, v=visit: c.visit == v))
    if any(c.batch > 8 for c in own) and any(c.batch <= 8 for c in own):
        cuts.append(("batch above 8", lambda c: c.batch > 8))
    if any(c.context > 1024 for c in own) and any(c.context <= 1024 for c in own):
        cuts.append(("context above 1,024", lambda c: c.context > 1024))
    return [m for label, out in cuts for m in leave_out(law, own, label, out, start)]


def widened(misses: Sequence[Miss], factor: float) -> list[Miss]:
    """The same with every standard deviation times a factor."""
    return [
        m if m.guess is None else replace(m, guess=replace(m.guess, log_sd=factor * m.guess.log_sd))
        for m in misses
    ]


def inflation(misses: Sequence[Miss]) -> float:
    """By how much intervals have to grow so that the rows left out lie in them as they should.

    The root of the mean square of standard deviations, a mean over what was left out and the models
    in it, since rows of one model are not independent; over that of the t distribution; at least 1.
    """
    groups: dict[tuple, list[float]] = {}
    for miss in misses:
        if miss.guess is not None:
            freedom = miss.guess.freedom
            expected = freedom / (freedom - 2) if freedom > 2 else 3.0
            square = miss.deviations**2 / expected
            groups.setdefault((miss.left_out, miss.cell.model), []).append(square)
    if not groups:
        return 1.0
    return max(1.0, math.sqrt(float(np.mean([np.mean(v) for v in groups.values()]))))
