"""Energy of a model on a fake board: 500 W for 0.2 s of prefill, 300 W for 0.05 s of each token.

A call of g tokens takes 0.2 + 0.05 (g - 1) s and 100 + 15 (g - 1) J.
"""

import contextlib
import itertools
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from lib import stats
from lib.analysis.energy import conclusions, quantities
from lib.hardware import validity
from lib.measure import energy
from lib.measure.energy import blocks, windows
from lib.records import record, store
from lib.stacks.registry import STACKS
from tests.fakes.board import Board, BoardDevice, BoardModel
from tests.fakes.device import FakeDevice, FakeModel, opened

SWEEP = {
    "contexts": [128, 512], "new_tokens": 21, "block_contexts": [512], "repeats": 4,
    "other_repeats": 1, "slope_tokens": [1, 41], "slope_repeats": 2, "window_s": 8.0,
    "idle_s": 5.0, "sampler_pairs": 6, "seed": 0, "env_id": "e",
}  # fmt: skip
CALL_J = 100 + 15 * 20


def sweep(monkeypatch, folder, *, device=None, model=None, **changes):
    device = device or BoardDevice(Board(idle_w=110.0, phase_s=0.041))
    model = model or BoardModel(device)
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", model.open_stack))
    rows = energy.sweep.sweep(model, **(SWEEP | changes), records_path=folder / "records.jsonl")
    assert store.load(folder / "records.jsonl") == rows
    return rows


@pytest.fixture
def rows(monkeypatch, tmp_path):
    return sweep(monkeypatch, tmp_path)


def test_a_sweep_has_a_row_for_each_cell_and_one_for_the_sampler(rows):
    kinds = [(r.kind, r.key["context"], r.key["new_tokens"]) for r in rows]
    assert kinds[0] == ("energy-sampler", 128, 21)  # as long as the lead-in
    assert sorted(kinds[1:]) == [
        ("energy", 128, 21),
        ("energy", 512, 21),
        ("energy-slope", 512, 1),
        ("energy-slope", 512, 41),
    ]


class TwoBoards(BoardDevice):
    """A second board that always draws half of what the first one does."""

    @contextlib.contextmanager
    def power_trace(self, period_s=0.023, uuids=()):
        with super().power_trace(period_s) as trace:
            yield trace
        halves = ("energy_j", "instant_w", "power_w")
        other = [row | {name: row[name] / 2 for name in halves} | {"gpu": 1} for row in trace]
        trace[:] = sorted(trace + other, key=lambda row: row["t_s"])


def test_joules_of_several_boards_are_their_sum_with_each_beside(monkeypatch, tmp_path):
    """A call takes 400 J of the first board and 200 J of the second; both idle at 110 and 55 W."""
    rows = sweep(monkeypatch, tmp_path, device=TwoBoards(Board(idle_w=110.0, phase_s=0.041)))
    (row,) = [r for r in rows if r.kind == "energy" and r.key["context"] == 512]
    for total, (first, second) in zip(
        row.samples["energy_j"], row.samples["board_energy_j"], strict=True
    ):
        assert total == pytest.approx(first + second) == pytest.approx(1.5 * CALL_J, rel=0.01)
        assert first == pytest.approx(2 * second, rel=0.01)
    assert row.values["idle_w"] == pytest.approx(165, rel=0.01)
    assert row.values["idle_before_board_w"] == pytest.approx([110, 55], rel=0.01)


def test_a_block_of_two_boards_counts_once_in_a_warning():
    """Both boards of two blocks ran at their limits, and one board of a third."""

    def block(*boards):
        gates = [validity.Gate("power_cap", "warn", x, f"GPU {n}: held") for n, x in boards]
        window = validity.Window(1.0, {}, {}, (*gates, validity.Gate("clock_drift", "ok")))
        return blocks.Block(None, window, "", 0, None, None)

    both = block((0, 0.2), (1, 0.3))
    (warning,) = blocks.warnings_of([both, both, block((1, 0.1)), block()])
    assert warning == record.warning("power_cap", "3 of 4 blocks: GPU 1: held")


def test_a_row_of_one_board_names_no_others(rows):
    assert not any("board_energy_j" in r.samples for r in rows)
    assert not any("idle_before_board_w" in r.values for r in rows)


def test_a_second_pass_stands_beside_the_first_and_replaces_nothing(rows, monkeypatch, tmp_path):
    """A board that draws a tenth more: 1.1 of the first pass."""
    (tmp_path / "again").mkdir()
    warmer = BoardDevice(Board(idle_w=110.0, phase_s=0.02))
    model = BoardModel(warmer, (0.2, 550.0), (0.05, 330.0))
    again = sweep(
        monkeypatch,
        tmp_path / "again",
        device=warmer,
        model=model,
        kind="energy-again",
        contexts=[512],
        slope_tokens=(),
        sampler_pairs=0,
    )
    assert [(r.kind, r.key["context"]) for r in again] == [("energy-again", 512)]
    assert len(again[0].samples["energy_j"]) == 4
    (line,) = quantities.table([*rows, *again]).rows
    first, second, over, _ = line[-4:]
    assert first.value == pytest.approx(1e3 * CALL_J / 21, rel=3e-3)
    assert over.value == pytest.approx(1.1, rel=3e-3) and over.low < 1.1 < over.high
    assert quantities.table(rows).rows == ()
    alone = quantities.table(again).rows[0]
    assert alone[-2].value is None and "no first pass" in alone[-2].reason
    text = conclusions.again([*rows, *again])
    assert "512 tokens, second pass: " in text and "over the first pass 1.1" in text


@pytest.mark.parametrize(
    ("first", "second", "board"),
    [
        ("GPU-a", "GPU-a", "the same"),
        ("GPU-a", "GPU-b", "another"),
        (None, "GPU-b", "unknown"),
    ],
)
def test_the_two_passes_say_whether_their_board_is_the_same(rows, first, second, board):
    (row,) = record.select(rows, "energy", context=512)
    envs = [
        record.environment_record({"gpu": "H100", "gpu_uuid": uuid, "date": day})
        for uuid, day in ((first, "2026-11-24"), (second, "2026-11-25"))
    ]
    passes = [
        replace(row, kind=kind, env_id=env.env_id)
        for kind, env in zip(quantities.PASSES, envs, strict=True)
    ]
    (line,) = quantities.table([*envs, *passes]).rows
    assert line[-1] == board


def test_a_cell_reports_joules_of_a_call_for_each_block(rows, tmp_path):
    (row,) = record.select(rows, "energy", context=512)
    assert row.missing == {} and row.warnings == () and row.error is None
    assert row.values["blocks"] == 4 and row.values["invalid_blocks"] == []
    assert row.values["estimator"] == "counter_j"
    assert row.samples["energy_j"] == pytest.approx([CALL_J] * 4, rel=3e-3)
    assert row.samples["average_energy_j"] == pytest.approx([CALL_J] * 4, rel=0.02)
    assert row.samples["e2e_s"] == pytest.approx([1.2] * 28)  # seven calls fill 8 s
    assert row.values["window_energy_j"] == pytest.approx(28 * CALL_J, rel=3e-3)
    assert row.values["window_s"] == pytest.approx(28 * 1.2)
    assert max(map(abs, row.samples["additivity"])) < 3e-3
    assert all((tmp_path / name).exists() for name in row.values["traces"])


def test_net_energy_is_less_what_the_idle_board_draws(rows):
    """110 W x 1.2 s = 132 J of the 400 J of a call."""
    (row,) = record.select(rows, "energy", context=512)
    assert row.values["idle_w"] == pytest.approx(110, rel=1e-3)
    assert row.values["idle_error_w"] == pytest.approx(0, abs=0.1)
    assert row.samples["net_energy_j"] == pytest.approx([CALL_J - 132] * 4, rel=0.01)


def test_the_kept_traces_give_the_same_joules_again(rows, tmp_path):
    (row,) = record.select(rows, "energy", context=512)
    values, samples = row.values, row.samples
    for name, start_s, stop_s, calls, joules in zip(
        values["traces"],
        samples["start_s"],
        samples["stop_s"],
        values["calls"],
        samples["energy_j"],
        strict=True,
    ):
        window = validity.judge(store.read_trace(tmp_path / name), start_s, stop_s)
        assert window.energy_j / calls == pytest.approx(joules, rel=1e-6)


def test_prefill_and_further_tokens_are_told_apart_by_length(rows):
    """Prefill 100 J, each further token 15 J."""
    arms = [r for r in rows if r.key.get("context") == 512 and "energy_j" in r.samples]
    points = [(r.key["new_tokens"] - 1, j) for r in arms for j in r.samples["energy_j"]]
    prefill, token = stats.line(*zip(*points, strict=True))
    assert prefill.value == pytest.approx(100, rel=0.01)
    assert token.value == pytest.approx(15, rel=0.01)
    assert prefill.low < 100 < prefill.high or prefill.high - prefill.low < 1


def test_nothing_asks_nvml_inside_a_window(monkeypatch, tmp_path):
    device = BoardDevice(Board())
    asked = []
    monkeypatch.setattr(device, "power_w", lambda: asked.append(device.now_s))
    counter = device.energy_j
    monkeypatch.setattr(device, "energy_j", lambda: asked.append(device.now_s) or counter())
    rows = sweep(monkeypatch, tmp_path, device=device)
    first = min(row["t_s"] for row in store.read_trace(tmp_path / "trace-1.jsonl.gz"))
    assert first == 0.0  # seconds since the trace began
    assert asked and max(asked) < 70  # only while it warmed up, before the first round
    assert sum(r.values["window_s"] for r in rows[1:]) > 70


def test_a_call_that_stops_early_is_an_error(monkeypatch, tmp_path):
    device = BoardDevice(Board())
    model = BoardModel(device)
    model.early_stop = 1
    with pytest.raises(RuntimeError, match="asked for 5 new tokens, got 4"):
        sweep(monkeypatch, tmp_path, device=device, model=model)


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path):
    device = BoardDevice(Board())
    model = BoardModel(device)
    measured = energy.sweep.measure_round

    def stop_at_3(session, order, name, window_s):
        if name == "trace-3":
            raise KeyboardInterrupt
        measured(session, order, name, window_s)

    monkeypatch.setattr(energy.sweep, "measure_round", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, tmp_path, device=device, model=model)
    rows = store.load(tmp_path / "records.jsonl")
    (row,) = record.select(rows, "energy", context=512)
    assert row.samples["energy_j"] == pytest.approx([CALL_J] * 2, rel=3e-3)
    assert row.values["idle_w"] == pytest.approx(110, rel=1e-3)  # before; there was no after
    assert "idle_error_w" not in row.values


def test_without_readings_energy_is_missing_with_the_reason_and_time_is_there(
    monkeypatch, tmp_path
):
    model = FakeModel(FakeDevice(tick_s=1e-6))
    rows = sweep(monkeypatch, tmp_path, device=model.device, model=model, window_s=1.0)
    assert [r.kind for r in rows if r.kind == "energy-sampler"] == []
    for row in rows:
        assert set(row.missing) == {"energy_j", "paper_energy_j", "idle_w", "net_energy_j"}
        assert set(row.missing.values()) == {"no counter on the fake"}
        assert row.samples.keys() == {"e2e_s"} and len(row.samples["e2e_s"]) >= 1
    assert list(tmp_path.glob("trace*")) == []


def test_a_block_that_cannot_be_believed_is_left_out_with_its_reason(monkeypatch, tmp_path):
    """The counter is reset in the second of four rounds."""
    board = Board()
    device = BoardDevice(board)
    model = BoardModel(device)
    measured = energy.sweep.measure_round

    def reset_in_2(session, order, name, window_s):
        start_s = device.now_s
        middle = {"at": start_s + 4.0}
        board.fault = lambda row: (
            {**row, "energy_j": 1 + row["energy_j"] / 1000}
            if name == "trace-2" and row["t_s"] > middle["at"]
            else row
        )
        measured(session, order, name, window_s)

    monkeypatch.setattr(energy.sweep, "measure_round", reset_in_2)
    rows = sweep(monkeypatch, tmp_path, device=device, model=model)
    cells = [r for r in rows if r.values.get("invalid_blocks")]
    reasons = [reason for r in cells for reason in r.values["invalid_blocks"]]
    assert any(reason.startswith("counter_reset") for reason in reasons)
    for row in cells:
        good = row.values["blocks"] - len(row.values["invalid_blocks"])
        assert len(row.samples.get("energy_j", ())) == good
        if not good:
            assert row.missing["energy_j"].split(":")[0] in ("counter_reset", "agreement")


# --- the sampler's effect


@pytest.mark.parametrize(("cost", "level"), [(0.0, "ok"), (0.03, "invalid")])
def test_a_sampler_that_costs_throughput_invalidates_all(monkeypatch, tmp_path, cost, level):
    device = BoardDevice(Board(), sampler_cost=cost)
    rows = sweep(monkeypatch, tmp_path, device=device)
    (row,) = record.select(rows, "energy", context=512)
    assert row.values["gates"]["sampler_disturbs"]["level"] == level
    (check,) = record.select(rows, "energy-sampler")
    ratio = stats.paired_ratio(check.samples["with_s"], check.samples["without_s"])
    assert ratio.value == pytest.approx(1 + cost)
    assert ("again_with_s" in check.samples) == (level == "invalid")
    if level == "invalid":
        assert "energy_j" not in row.samples
        assert row.missing["energy_j"].startswith("sampler_disturbs")


@pytest.mark.parametrize(
    ("later", "level", "text"),
    [
        (
            1.00,
            "ok",
            "calls take +0.0% [+0.0%, +0.0%] of their time more with the sampler; "
            "not the same as -7.5% found before",
        ),
        (0.90, "invalid", "; the same as -7.5% found before"),
        (1.05, "unknown", "; not the same as -7.5% found before"),
    ],
)
def test_an_alarm_about_the_sampler_must_repeat_with_fresh_pairs(
    monkeypatch, tmp_path, later, level, text
):
    """Six pairs of a host that was slow whenever the sampler happened to rest; seen on an H100."""
    first = [0.882, 0.959, 0.963, 0.984, 0.859, 0.910]
    ratios = {True: iter([*first, *[later] * 6]), False: iter([1.0] * 12)}
    monkeypatch.setattr(energy.sweep, "one_call", lambda *_, sampled: next(ratios[sampled]))
    rows = sweep(monkeypatch, tmp_path)
    (row,) = record.select(rows, "energy", context=512)
    gate = row.values["gates"]["sampler_disturbs"]
    assert gate["level"] == level and text in gate["text"]
    assert ("energy_j" in row.samples) == (level != "invalid")
    (check,) = record.select(rows, "energy-sampler")
    assert check.samples["with_s"] == first
    assert check.samples["again_with_s"] == [later] * 6


def test_where_no_pairs_are_asked_the_gate_says_that_it_was_not_checked(monkeypatch, tmp_path):
    rows = sweep(monkeypatch, tmp_path, sampler_pairs=0)
    (row,) = record.select(rows, "energy", context=512)
    gate = row.values["gates"]["sampler_disturbs"]
    assert gate["level"] == "unknown" and "not checked" in gate["text"]
    assert row.samples["energy_j"]


# --- order


def test_rounds_hold_every_block_once_and_mirror_each_other():
    cells = blocks.cells_of([128, 512, 2048], 64, [512, 2048], 6, 1, [1, 128], 2)
    rounds = blocks.plan(cells, seed=0)
    assert len(rounds) == 6
    counts = {cell: sum(cell in order for order in rounds) for cell in cells}
    assert counts == {cell: cell.blocks for cell in cells}
    assert blocks.plan(cells, seed=0) == rounds != blocks.plan(cells, seed=1)
    pair = [[c for c in order if c.blocks == 6] for order in rounds]
    assert all(second == first[::-1] for first, second in zip(pair[::2], pair[1::2], strict=True))
    spread = [n for n, order in enumerate(rounds) for c in order if c.blocks == 2 and c == cells[3]]
    assert spread == [2, 5]  # not both at the start


def test_contexts_that_are_not_measured_cannot_have_blocks():
    with pytest.raises(ValueError, match=r"block_contexts \[4096\] are not among the contexts"):
        blocks.cells_of([128, 512], 64, [4096], 5, 1, [], 0)


def test_a_drift_biases_a_fixed_order_and_not_a_balanced_one():
    """Power rises by 1 % with each window; three contexts, six rounds."""
    cells = blocks.cells_of([1, 2, 3], 64, [1, 2, 3], 6, 0, [], 0)

    def bias(rounds):
        power = {cell: [] for cell in cells}
        for n, cell in enumerate(itertools.chain(*rounds)):
            power[cell].append(1 + 0.01 * n)
        means = [fmean(values) for values in power.values()]
        return max(means) / min(means) - 1

    fixed = [[c for _ in range(6) for c in [cell]] for cell in cells]  # one after another
    assert bias(fixed) > 0.02
    balanced = [bias(blocks.plan(cells, seed)) for seed in range(50)]
    assert max(balanced) < 0.003


# --- windows


def test_no_window_holds_the_first_call_of_a_length(monkeypatch, tmp_path):
    """On an H100 such a call waited for the allocator: 6.5 s and 1,507 J instead of 3.6 and 1,140,
    in the first block of six, or in the only one."""
    model = BoardModel(BoardDevice(Board(idle_w=110.0)))
    model.cold_s = 0.05
    rows = sweep(monkeypatch, tmp_path, device=model.device, model=model)
    calls = {(r.key["new_tokens"], round(t, 6)) for r in rows for t in r.samples.get("e2e_s", ())}
    assert calls == {(g, round(0.2 + 0.05 * (g - 1), 6)) for g in (1, 21, 41)}


def test_where_a_length_is_a_program_of_its_own_the_lead_in_has_that_length(monkeypatch, tmp_path):
    device = BoardDevice(Board())
    model = BoardModel(device)
    monkeypatch.setitem(STACKS, "graph", opened("graph", model.open_stack))
    short = {
        "contexts": [512],
        "slope_tokens": [41],
        "repeats": 1,
        "slope_repeats": 1,
        "sampler_pairs": 0,
    }
    path = tmp_path / "records.jsonl"
    (row, *_) = energy.sweep.sweep(model, stack="graph", **(SWEEP | short), records_path=path)
    assert set(model.calls) == {21, 41}
    assert row.key["stack"] == "graph" and row.samples["energy_j"]


def test_the_lead_in_is_a_call_as_long_as_the_readouts_look_back():
    device = BoardDevice(Board())
    model = BoardModel(device)
    generate = model.open_stack(None)
    ids = torch.zeros(1, 8)
    tokens = windows.tokens_for(generate, ids, device, 64)
    assert 0.2 + 0.05 * (tokens - 1) == pytest.approx(1.1 * windows.LEAD_S, abs=0.06)
    assert windows.tokens_for(generate, ids, device, 16) == 16


def test_a_window_is_filled_with_whole_calls_at_a_random_phase():
    device = BoardDevice(Board())
    starts = []
    for seed in range(20):
        before_s = device.now_s
        span = windows.busy(
            lambda: device.work(0.7, 300),
            lambda: device.work(0.5, 300),
            device,
            2.0,
            random.Random(seed),
        )
        assert len(span.calls_s) == 3 and span.seconds == pytest.approx(2.1)
        assert device.now_s - span.stop_s >= windows.LEAD_S
        starts.append(span.start_s - before_s - 2.0)  # four lead-in calls of 0.5 s
    assert min(starts) >= 0 and max(starts) <= 0.1 and len({round(s, 4) for s in starts}) > 15


def test_warming_up_ends_at_a_plateau_or_at_its_limit():
    device = BoardDevice(Board(idle_w=100.0))
    steady = windows.warm_up(lambda: device.work(0.5, 300), device, 60.0)
    assert steady["plateau"] and 10 <= steady["warmup_s"] < 13
    watts = itertools.count(300, 5)
    rising = windows.warm_up(lambda: device.work(0.5, next(watts)), device, 20.0)
    assert not rising["plateau"] and rising["warmup_s"] == pytest.approx(20, abs=1)
    nothing = FakeDevice(tick_s=1e-6)
    assert windows.warm_up(lambda: None, nothing, 60.0)["plateau"] is None
