"""Arrivals and lengths are drawn before the run, and a law that is not the asked one is found."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from lib.measure.serving.arrivals import Lengths, Load, check_law, offsets_s, ramp_s


def uniform(rate: float, count: int, seed: int = 0) -> list[float]:
    """Gaps spread evenly between zero and twice their mean: a rate, and no Poisson process."""
    rng = random.Random(seed)
    gaps = [rng.uniform(0, 2 / rate) for _ in range(count)]
    return np.cumsum(gaps).tolist()


def test_poisson_arrivals_have_exponential_gaps_of_the_asked_mean():
    times = offsets_s(Load("poisson", 20), 100.0, "a")
    gaps = np.diff([0.0, *times])
    assert abs(len(times) - 2000) < 4 * 2000**0.5  # a Poisson count: four of its deviations
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)  # an exponential law has 1
    assert times == offsets_s(Load("poisson", 20), 100.0, "a")
    assert times != offsets_s(Load("poisson", 20), 100.0, "b")
    assert max(times) <= 100.0


def test_a_fixed_rate_has_equal_gaps():
    assert offsets_s(Load("fixed", 4), 1.0, "a") == [0.25, 0.5, 0.75, 1.0]


def test_users_of_a_closed_loop_start_one_after_another():
    assert ramp_s(4, 2.0) == [0.0, 0.5, 1.0, 1.5]
    with pytest.raises(ValueError, match="follow from the answers"):
        offsets_s(Load("closed", 4), 1.0, "a")


@pytest.mark.parametrize("seed", range(20))
def test_the_asked_law_is_not_rejected(seed):
    load = Load("poisson", 20)
    assert check_law(offsets_s(load, 20.0, f"seed {seed}"), load).ok


@pytest.mark.parametrize("seed", range(10))
def test_uniform_gaps_are_no_poisson_arrivals(seed):
    result = check_law(uniform(20, 100, seed), Load("poisson", 20))
    assert "spread" in result.failing


def test_another_rate_is_found():
    times = offsets_s(Load("poisson", 24.3), 20.0, "a")
    assert "rate" in check_law(times, Load("poisson", 20)).failing


def test_workers_that_repeat_each_others_gaps_are_found():
    """Eight workers with one seed draw the same gaps: each gap comes eight times in a row."""
    rng = np.random.default_rng(1)
    gaps = np.repeat(rng.exponential(0.05, 50), 8)
    result = check_law(np.cumsum(gaps).tolist(), Load("poisson", 20))
    assert "counts" in result.failing


@pytest.mark.parametrize("seed", range(10))
def test_a_client_that_slows_down_is_found(seed):
    """From 30 to 10 requests a second: the rate asked for in the mean, and no one law."""
    gaps = np.random.default_rng(seed).exponential(1 / np.linspace(30, 10, 400))
    assert "trend" in check_law(np.cumsum(gaps).tolist(), Load("poisson", 20)).failing


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_a_closed_loop_that_poses_as_open_is_found(spread):
    """Six users, each back as soon as its answer of 0.29 s is there: some 20 requests a second."""
    rng = np.random.default_rng(0)
    spans = 0.29 * (1 + spread * rng.standard_normal((6, 80)))
    times = np.sort((rng.uniform(0, 0.3, (6, 1)) + spans.cumsum(axis=1)).ravel())
    assert "counts" in check_law(times.tolist(), Load("poisson", 20)).failing


def test_a_fixed_rate_is_told_from_a_drifting_one():
    load = Load("fixed", 10)
    even = [n / 10 for n in range(50)]
    assert check_law(even, load).ok and check_law(even, load).rate_per_s == pytest.approx(10)
    assert check_law([t * 1.01 for t in even], load).failing == ("gaps",)


def test_a_law_is_not_tested_on_a_handful():
    with pytest.raises(ValueError, match="needs 30 arrivals, got 5"):
        check_law([1, 2, 3, 4, 5], Load("poisson", 1))


def test_lengths_are_fixed_or_lognormal_within_their_bounds():
    assert Lengths(512).draw(3, "a") == [512, 512, 512] and Lengths(512).label == "512"
    law = Lengths(512, sigma=0.5, low=100, high=2000)
    drawn = law.draw(2000, "a")
    assert drawn == law.draw(2000, "a") != law.draw(2000, "b")
    assert min(drawn) >= 100 and max(drawn) <= 2000
    assert statistics.median(drawn) == pytest.approx(512, rel=0.05)
    # One deviation of the logs above the median lies at 512 e^0.5, and 84 % below it.
    below = sum(length <= 512 * np.exp(0.5) for length in drawn) / 2000
    assert below == pytest.approx(0.84, abs=0.03)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Load("normal", 3), "unknown arrival law 'normal'"),
        (lambda: Load("poisson", 0), "must be positive"),
        (lambda: Load("closed", 1.5), "whole numbers"),
        (lambda: Lengths(0), "1 <= low <= median"),
        (lambda: Lengths(5, sigma=-1), "must not be negative"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
