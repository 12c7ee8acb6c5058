"""Energy attributed by a fit, on mixes whose true costs are known."""

from __future__ import annotations

import numpy as np
import pytest

from lib.analysis.serving.attribution import AMOUNTS, fit, held_out

IDLE_W, PROMPT_J, OUTPUT_J = 110.0, 0.02, 0.25
# Seconds, prompt tokens, output tokens: long and short prompts, answers and pauses.
SHAPES = [
    (20, 40_000, 1_000), (20, 2_000, 8_000), (30, 100_000, 4_000), (25, 10_000, 10_000),
    (20, 80_000, 12_000), (40, 5_000, 2_000), (20, 150_000, 500), (30, 30_000, 30_000),
    (22, 60_000, 6_000), (35, 1_000, 20_000), (20, 20_000, 3_000), (28, 120_000, 15_000),
]  # fmt: skip


def mixes(noise: float = 0.0, extra=lambda mix: 0.0, seed: int = 3) -> list[dict]:
    rng, result = np.random.default_rng(seed), []
    for seconds, prompt, output in SHAPES:
        mix = {"seconds": seconds, "prompt_tokens": prompt, "output_tokens": output}
        joules = IDLE_W * seconds + PROMPT_J * prompt + OUTPUT_J * output + extra(mix)
        result.append({**mix, "energy_j": joules * (1 + rng.normal(0, noise) if noise else 1)})
    return result


def test_true_costs_are_found_and_held_out_mixes_predicted():
    result = fit(mixes(), seed=1)
    assert result.costs["idle_w"].value == pytest.approx(IDLE_W, rel=1e-6)
    assert result.costs["prompt_token_j"].value == pytest.approx(PROMPT_J, rel=1e-6)
    assert result.costs["output_token_j"].value == pytest.approx(OUTPUT_J, rel=1e-6)
    assert result.ok and result.worst_error < 1e-6
    assert len(result.errors) == 4 and len(result.fitted) == 8
    assert not set(result.errors) & set(result.fitted)


def test_costs_under_noise_lie_in_their_intervals():
    """Two percent of noise: each true cost within its interval, the held-out mixes within 5 %."""
    result = fit(mixes(noise=0.02), seed=1)
    truth = {"idle_w": IDLE_W, "prompt_token_j": PROMPT_J, "output_token_j": OUTPUT_J}
    for name, value in truth.items():
        estimate = result.costs[name]
        assert estimate.low <= value <= estimate.high, name
        assert estimate.low < estimate.value < estimate.high
    assert result.ok and 0 < result.median_error <= 0.05


def test_a_right_model_keeps_the_limits_and_its_intervals_in_many_trials():
    """A hundred boards with 2 % of noise, and a hundred draws of what is held out."""
    truth = {"idle_w": IDLE_W, "prompt_token_j": PROMPT_J, "output_token_j": OUTPUT_J}
    fits = [fit(mixes(noise=0.02, seed=n), seed=n) for n in range(100)]
    assert sum(one.ok for one in fits) >= 95
    for name, value in truth.items():
        assert sum(f.costs[name].low <= value <= f.costs[name].high for f in fits) >= 88, name


@pytest.mark.parametrize(
    "extra",
    [
        lambda mix: 4e-5 * mix["output_tokens"] ** 2,  # long answers cost more a token
        lambda mix: 0.5 * mix["output_tokens"] if mix["prompt_tokens"] > 50_000 else 0,  # contexts
        lambda mix: 4e6 / mix["output_tokens"] ** 0.5 * mix["seconds"] / 500,  # small batches
    ],
)
def test_a_wrong_model_is_told_in_many_trials(extra):
    fits = [fit(mixes(noise=0.005, extra=extra, seed=n), seed=n) for n in range(100)]
    assert sum(one.ok for one in fits) <= 20


def test_a_cost_that_is_not_in_the_model_spoils_the_prediction():
    """Energy that goes with the square of the output, which no linear cost can follow."""
    result = fit(mixes(extra=lambda mix: 2e-5 * mix["output_tokens"] ** 2), seed=1)
    assert not result.ok


def test_a_step_that_users_share_is_a_cost_of_the_busy_time():
    """A busy board draws 200 W more, however many tokens it makes: only busy time explains it."""
    rows = mixes()
    for n, mix in enumerate(rows):
        mix["busy_seconds"] = mix["seconds"] * (0.2 + 0.1 * (n % 8))
        mix["energy_j"] += 200.0 * mix["busy_seconds"]
    assert fit(rows, seed=1).worst_error > 0.01
    result = fit(rows, seed=1, amounts=(*AMOUNTS, "busy_seconds"))
    assert result.costs["busy_w"].value == pytest.approx(200.0) and result.worst_error < 1e-6
    with pytest.raises(ValueError, match=r"unknown amounts \['watts'\]; known: seconds"):
        fit(rows, seed=1, amounts=("watts",))


def test_a_cost_is_never_negative_and_one_at_zero_is_missing_with_a_reason():
    """Prompts that seem to save energy: their cost ends at zero, which these mixes do not show."""
    rows = mixes()
    for mix in rows:
        mix["energy_j"] -= (PROMPT_J + 1e-4) * mix["prompt_tokens"]
    result = fit(rows, seed=1)
    assert result.costs["prompt_token_j"].value is None
    assert "do not show this cost" in result.costs["prompt_token_j"].reason
    assert result.costs["output_token_j"].value == pytest.approx(OUTPUT_J, rel=0.05)


def test_what_is_held_out_is_drawn_by_the_seed_before_anything_is_measured():
    assert held_out(12, 1) == held_out(12, 1)
    assert len({held_out(12, seed) for seed in range(10)}) > 5
    with pytest.raises(ValueError, match="needs 12, got 11"):
        held_out(11, 1)


def test_mixes_that_are_alike_are_refused():
    rows = [
        {
            "seconds": 20 + n / 100,
            "prompt_tokens": 1000 * (20 + n / 100),
            "output_tokens": 100 * (20 + n / 90),
            "energy_j": 5000.0,
        }
        for n in range(12)
    ]
    with pytest.raises(ValueError, match="too alike to tell seconds, prompt_tokens"):
        fit(rows, seed=1)


def test_mixes_without_energy_or_without_an_amount_are_named():
    rows = mixes()
    rows[3]["energy_j"] = None
    with pytest.raises(ValueError, match=r"mixes \[3\] have no energy"):
        fit(rows, seed=1)
    with pytest.raises(ValueError, match="no mix has any prompt_tokens"):
        fit([dict(mix, prompt_tokens=0) for mix in mixes()], seed=1)
