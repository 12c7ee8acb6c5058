"""How often does an interval cover what it is an interval of?

    python tools/coverage.py [--draws 4000]

simulates the intervals of the call counts in params/: decode throughput as a slope over lengths,
the median of repetitions, and the ratio of two medians. Noise is normal or, as a host's is, all to
one side; it is alike at every length, or grows with the time of a call. Beside it stands the level
that the workbook prints.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import files, stats
from lib.stats import Estimate

PREFILL_S, STEP_S, NOISE = 0.2, 0.03, 0.05  # of a call; noise is a share of the time
NOISES = ("normal", "one-sided")
Draw = Callable[[np.random.Generator], Estimate]


class Case(NamedTuple):
    """An interval: what it is of, its counts in words, and the slope's calls by length."""

    of: str
    counts: str
    calls: dict[int, int]


def cases() -> list[Case]:
    """The slopes of every profile, each set of lengths and counts once."""
    seen: dict[tuple, Case] = {}
    for path in sorted((files.ROOT / "params").glob("*.yaml")):
        profile = files.read_yaml(path)
        for name in ("latency", "stacks", "batch"):
            notebook = (profile.get("notebooks") or {}).get(name)
            if notebook is None:
                continue
            given = profile["defaults"] | notebook
            lengths, repeats = given["new_tokens"], given["repeats"]
            calls = dict.fromkeys(lengths, given.get("slope_repeats", repeats))
            calls[lengths[0]] = repeats
            if name == "latency":
                calls[1] = given["ttft_repeats"]
            counts = " + ".join(f"{n} of {g}" for g, n in sorted(calls.items()))
            case = Case(f"{path.stem} {name}", counts, calls)
            seen.setdefault(tuple(sorted(calls.items())), case)
    return list(seen.values())


def noise(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    """n numbers whose median is zero."""
    if kind == "normal":
        return rng.normal(size=n)
    return rng.exponential(size=n) - math.log(2)


def slope(calls: dict[int, int], rng: np.random.Generator, kind: str, grows: bool) -> Estimate:
    """The slope of one simulated set of calls, whose true value is STEP_S."""
    x, y = [], []
    for tokens, n in calls.items():
        time_s = PREFILL_S + (tokens - 1) * STEP_S
        x += [tokens] * n
        y += list(time_s + NOISE * (time_s if grows else 1) * noise(rng, kind, n))
    return stats.slope(x, y)


def median(n: int, rng: np.random.Generator, kind: str) -> Estimate:
    """The median of one simulated sample, whose true value is 1."""
    return stats.median(list(1 + NOISE * noise(rng, kind, n)))


def ratio(n: int, rng: np.random.Generator, kind: str) -> Estimate:
    """The ratio of two simulated samples of the same kind, whose true value is 1."""
    a, b = (list(1 + NOISE * noise(rng, kind, n)) for _ in range(2))
    return stats.ratio(a, b)


def coverage(estimate: Draw, truth: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """The share of intervals that contain the truth, and the level that they claim."""
    rng, hits, level = np.random.default_rng(seed), 0, stats.CONFIDENCE
    for _ in range(draws):
        x = estimate(rng)
        hits += x.low <= truth <= x.high
        level = x.level
    return hits / draws, level


def lines(draws: int) -> list[tuple[str, str, float, list[float]]]:
    """What, counts, the level that is claimed, and the simulated shares."""
    table = []
    for of, counts, calls in cases():
        ways = [(kind, grows) for grows in (False, True) for kind in NOISES]
        results = [
            coverage(lambda rng, a=calls, w=way: slope(a, rng, *w), STEP_S, draws) for way in ways
        ]
        table.append((of, counts, results[0][1], [share for share, _ in results]))
    for name, one in (("median", median), ("ratio", ratio)):
        for n in (6, 10):
            fewer = draws // 10 if one is ratio else draws  # each draw is a bootstrap
            results = [
                coverage(lambda rng, f=one, m=n, k=kind: f(m, rng, k), 1.0, fewer)
                for kind in NOISES
            ]
            table.append((name, str(n), results[0][1], [share for share, _ in results]))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000)
    draws = parser.parse_args(arguments).draws
    print("claimed, and simulated: noise alike, normal and one-sided; growing with time, the same")
    for of, counts, level, shares in lines(draws):
        text = "  ".join(f"{share:8.1%}" for share in shares)
        print(f"{of:24s}  {counts:28s}  {level:6.1%}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
