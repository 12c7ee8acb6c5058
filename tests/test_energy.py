"""Energy: constant and stepped power through a counter that ticks, resets and stalls."""

import pytest
from fakes import FakeDevice, FakeModel

from lib import decode, energy, records


def counter(power_w, *, seconds=4.0, period_s=0.02, tick_s=0.1, phase_s=0.03):
    """A trace of a counter that shows the energy so far at its last tick."""
    trace, total, last_tick, shown, t = [], 0.0, phase_s - tick_s, 0.0, 0.0
    while t <= seconds:
        while last_tick + tick_s <= t + 1e-12:
            last_tick += tick_s
            total += sum(power_w(last_tick - tick_s + k * 1e-3) * 1e-3 for k in range(100))
            shown = total
        trace.append({"t_s": t, "energy_j": shown, "power_w": power_w(t)})
        t += period_s
    return trace


@pytest.mark.parametrize("phase_s", [0.0, 0.03, 0.07, 0.099])
def test_constant_power_is_exact_in_any_phase(phase_s):
    joules, reason = energy.counter_between(counter(lambda t: 300.0, phase_s=phase_s), 1.0, 3.0)
    assert reason == ""
    # 2 s of 300 W; a tick is seen up to one period late, the same at both edges on average
    assert joules == pytest.approx(600, rel=0.01)


def test_a_step_in_the_middle_of_the_window():
    joules, _ = energy.counter_between(counter(lambda t: 100.0 if t < 2 else 400.0), 1.0, 3.0)
    assert joules == pytest.approx(100 + 400, rel=0.03)


def test_interpolation_is_what_makes_short_windows_exact():
    trace = counter(lambda t: 300.0)
    raw = [row["energy_j"] for row in trace if 1.05 <= row["t_s"] <= 1.30]
    assert abs(raw[-1] - raw[0] - 75) > 10  # two plain readings miss by up to a tick (30 J)
    joules, _ = energy.counter_between(trace, 1.05, 1.30)
    assert joules == pytest.approx(75, rel=0.05)


def test_a_reset_counter_gives_none_never_a_negative_number():
    trace = counter(lambda t: 300.0)
    for row in trace:
        if row["t_s"] > 2:
            row["energy_j"] -= 600.0
    joules, reason = energy.counter_between(trace, 1.0, 3.0)
    assert joules is None and "reset" in reason


def test_a_stalled_counter_gives_none():
    trace = [{**row, "energy_j": 5.0} for row in counter(lambda t: 300.0)]
    joules, reason = energy.counter_between(trace, 1.0, 3.0)
    assert joules is None and "did not tick" in reason


def test_power_readings_are_integrated_with_edges():
    trace = [{"t_s": float(t), "power_w": 100.0 * t} for t in range(6)]
    joules, _ = energy.power_between(trace, 1.5, 3.5)
    assert joules == pytest.approx((150 + 350) / 2 * 2)


def test_readings_that_failed_are_skipped():
    trace = counter(lambda t: 300.0)
    trace.insert(50, {"t_s": trace[50]["t_s"] - 0.001, "error": "Unknown Error"})
    assert energy.counter_between(trace, 1.0, 3.0)[0] == pytest.approx(600, rel=0.01)


def test_a_cell_reports_joules_per_call(monkeypatch, tmp_path):
    model = FakeModel(FakeDevice(watts=250.0), prefill_s=1.0, token_s=0.1)
    monkeypatch.setitem(decode.STACKS, "hf-eager", model.open_stack)
    idle = energy.idle_power(model.device, 5.0)
    assert idle["idle_w"] == pytest.approx(250, rel=0.01)
    row = energy.arm(model, stack="hf-eager", context=8, new_tokens=10, repeats=3, idle=idle,
                     seed=0, env_id="e", trace_path=tmp_path / "trace.jsonl.gz")  # fmt: skip
    assert row.samples["e2e_s"] == pytest.approx([2.0] * 3)
    assert row.samples["energy_j"] == pytest.approx([500] * 3, rel=0.02)  # 250 W for 2 s
    assert row.samples["paper_energy_j"] == pytest.approx([500] * 3)
    assert row.values["window_energy_j"] == pytest.approx(1500, rel=0.01)
    assert row.warnings == () and row.missing == {}
    assert model.calls.count(10) == 3  # lead-in and lead-out calls are short ones
    again = [
        energy.counter_between(records.read_trace(tmp_path / row.values["trace"]), start, stop)[0]
        for start, stop in zip(row.samples["start_s"], row.samples["stop_s"], strict=True)
    ]
    assert again == pytest.approx(row.samples["energy_j"])  # the kept trace gives the same joules


def test_without_a_counter_energy_is_missing_with_the_reason(monkeypatch):
    model = FakeModel(FakeDevice())
    monkeypatch.setitem(decode.STACKS, "hf-eager", model.open_stack)
    assert energy.idle_power(model.device, 5.0) == {}
    row = energy.arm(model, stack="hf-eager", context=8, new_tokens=10, repeats=3, idle={},
                     seed=0, env_id="e")  # fmt: skip
    assert "energy_j" not in row.samples and row.missing["energy_j"] == "no counter on the fake"
    assert len(row.samples["e2e_s"]) == 3


def test_disagreement_with_integrated_power_is_a_warning():
    (warning,) = energy.agreement_warnings({"energy_j": [100.0], "average_energy_j": [110.0]})
    assert warning["code"] == "energy-agreement" and "+10.0%" in warning["text"]
    assert energy.agreement_warnings({"energy_j": [100.0], "average_energy_j": [101.0]}) == []
