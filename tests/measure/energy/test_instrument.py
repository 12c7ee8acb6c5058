"""What the characterisation says about boards whose readouts are known."""

import pytest

from lib.hardware import readouts
from lib.measure.energy import instrument
from lib.records import store
from tests.fakes.board import Board, BoardDevice, BoardModel
from tests.fakes.device import FakeDevice, FakeModel

LOAD_W = 600.0


def characterise(tmp_path, **board):
    device = BoardDevice(Board(noise_w=1.0, **board))
    (row,) = instrument.characterise(
        BoardModel(device),
        seconds=6.0,
        env_id="e",
        records_path=tmp_path / "records.jsonl",
        load=lambda seconds: device.work(seconds, LOAD_W),
    )
    assert store.load(tmp_path / "records.jsonl") == [row]
    return row


def test_refresh_lag_and_agreement_of_a_board_that_is_known(tmp_path):
    row = characterise(tmp_path, phase_s=0.04)
    assert (row.kind, row.key["model"], row.missing) == ("instrument", "fake", {})
    v = row.values
    for name in ("counter", "instant", "average"):
        assert v[f"{name}_refresh_s"] == pytest.approx(0.1, abs=1e-3)
    assert v["counter_step_s"] < 0.2 and v["instant_step_s"] < 0.2  # a tick or two
    assert v["average_step_s"] == pytest.approx(0.55, abs=0.06)  # half of a second, held a tick
    assert (v["average_window_s"], v["average_lag_s"]) == (1.0, pytest.approx(0.0, abs=0.011))
    assert abs(v["constant_average_off"]) < 1e-3 and abs(v["constant_instant_off"]) < 5e-3
    assert v["constant_w"] == pytest.approx(LOAD_W, rel=2e-3)
    assert v["call_errors"] == 0 and v["readings"] > 2000


def test_a_mean_of_half_a_second_and_another_refresh_are_found(tmp_path):
    v = characterise(tmp_path, average_s=0.5, tick_s=0.02).values
    assert v["counter_refresh_s"] == pytest.approx(0.02, abs=1e-3)
    assert v["average_window_s"] == 0.5


@pytest.mark.parametrize(("coverage", "sees_all"), [("full", True), ("partial", False)])
def test_the_square_wave_tells_whether_the_counter_sees_all_of_the_time(
    tmp_path, coverage, sees_all
):
    v = characterise(tmp_path, coverage=coverage, phase_s=0.01).values
    assert v["counter_sees_all"] is sees_all
    assert v["instant_phase_spread"] > 1  # 25 ms fall on the busy or on the idle half
    assert (v["counter_phase_spread"] < 0.1) is sees_all


def test_where_even_the_instant_reading_shows_no_phase_nothing_is_told(tmp_path):
    row = characterise(tmp_path, instant_s=0.1)
    assert "counter_sees_all" not in row.values and row.missing["counter_sees_all"]


def test_the_kept_trace_gives_the_same_again(tmp_path):
    row = characterise(tmp_path)
    trace = store.read_trace(tmp_path / row.values["trace"])
    edges = row.samples
    step = (edges["step_start_s"][0], edges["step_stop_s"][0])
    phases = list(zip(edges["wave_start_s"], edges["wave_stop_s"], strict=True))
    again = readouts.describe(trace, step, phases)
    assert again["counter_phase_spread"] == pytest.approx(row.values["counter_phase_spread"])
    assert again["constant_w"] == pytest.approx(row.values["constant_w"])


def test_it_takes_less_than_half_a_minute_and_waves_differ_in_phase_only():
    device = BoardDevice(Board())
    (start_s, stop_s), phases = instrument.run(device, lambda s: device.work(s, 600.0), 8.0)
    assert stop_s - start_s == pytest.approx(8) and device.now_s < 25
    offsets = [(start - phases[0][0]) % 0.1 for start, _ in phases]
    assert offsets == pytest.approx(instrument.PHASES_S, abs=1e-6)
    assert all(b - a == pytest.approx(1.6) for a, b in phases)


@pytest.mark.parametrize(
    ("seconds", "device", "reason"),
    [
        (8.0, FakeDevice(), "no counter on the fake"),
        (0.0, BoardDevice(Board()), "not asked for: instrument_s is 0"),
    ],
)
def test_without_readings_or_without_time_the_reason_is_recorded(tmp_path, seconds, device, reason):
    (row,) = instrument.characterise(
        FakeModel(device), seconds=seconds, env_id="e", records_path=tmp_path / "records.jsonl"
    )
    assert row.missing == {"counter_refresh_s": reason} and "readings" not in row.values


def test_the_load_is_matrix_products_for_as_long_as_asked():
    class Clock(FakeDevice):
        """Each synchronisation is one product of 1 ms."""

        def synchronize(self):
            super().synchronize()
            self.now_s += 0.001

    device = Clock()
    load = instrument.matrix_products(device, size=8)
    load(0.05)
    assert 49 <= device.syncs <= 51
    load(0.0)
    assert device.syncs <= 52  # one product at least


def test_a_readout_that_is_absent_is_missing(tmp_path):
    row = characterise(tmp_path, fault=lambda r: {k: v for k, v in r.items() if k != "instant_w"})
    absent = {
        "instant_refresh_s",
        "instant_step_s",
        "instant_phase_spread",
        "constant_instant_off",
        "counter_sees_all",
    }
    assert set(row.missing) == absent
    assert row.values["counter_refresh_s"] == pytest.approx(0.1, abs=1e-3)
