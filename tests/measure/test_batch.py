"""A sweep over batches on a fake board: b sequences take 100 b ms, and 10 + b ms each step."""

from types import SimpleNamespace

import pytest
import torch

from lib import measure, stats
from lib.analysis import estimators
from lib.hardware.device import CpuDevice
from lib.measure import energy
from lib.measure.energy import windows
from lib.models import load
from lib.records import record, store
from lib.stacks import logits_check
from lib.stacks.registry import STACKS
from lib.stacks.stack import Decoded
from tests.fakes.board import Board, BoardDevice, BoardModel
from tests.fakes.device import FakeCache, FakeDevice, opened

SWEEP = {
    "stacks": ["hf-eager"], "batches": [4, 1, 2], "context": 16, "new_tokens": [11, 31],
    "repeats": 3, "energy_windows": 2, "window_s": 4.0, "idle_s": 5.0, "trace_stacks": [],
    "seed": 0, "env_id": "e",
}  # fmt: skip


class BatchModel(BoardModel):
    """Prefills at 500 W, decodes at 200 W and 50 W for each sequence; `most` sequences fit."""

    experts = "none"

    def __init__(self, device, most=64, free=10**9):
        super().__init__(device)
        self.most, self.sizes = most, []
        self.card = SimpleNamespace(
            name="fake",
            dtype="bfloat16",
            weight_bytes=20,
            margin_bytes=0,
            kv_layers=(),
            kv_bytes=lambda tokens, batch=1: 1000 * tokens * batch,
            context_limit=4096,
            experts=0,
            active_params=7,
            decode_bytes=lambda context, batch=1: 10**6 + 1000 * batch * context,
        )

    def open_stack(self, net, *, decoding="greedy", capacity=None):
        def generate(ids, new_tokens, on_token=None):
            batch = len(ids)
            if batch > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
            self.sizes.append((batch, new_tokens, len({*map(tuple, ids.tolist())})))
            self.work(0.1 * batch, 500.0)
            self.work((new_tokens - 1) * (0.010 + 0.001 * batch), 200.0 + 50.0 * batch)
            return Decoded(torch.zeros(batch, new_tokens), FakeCache())

        return generate

    def work(self, seconds, watts):
        if isinstance(self.device, BoardDevice):
            self.device.work(seconds, watts)
        else:
            self.device.now_s += seconds


def sweep(monkeypatch, folder, *, board=True, most=64, **changes):
    model = BatchModel(BoardDevice(Board()) if board else FakeDevice(), most)
    for stack in ("hf-eager", "graph"):
        monkeypatch.setitem(STACKS, stack, opened(stack, model.open_stack))
    path = folder / "records.jsonl"
    rows = measure.batch.sweep(model, **(SWEEP | changes), records_path=path)
    assert store.load(path) == rows
    return model, rows


def kinds(rows):
    return [(row.kind, row.key["stack"], row.key["batch"], row.error) for row in rows]


def test_batches_ascend_and_have_a_first_token_two_lengths_and_windows_of_both(
    monkeypatch, tmp_path
):
    model, rows = sweep(monkeypatch, tmp_path)
    assert [row.key["batch"] for row in record.select(rows, "batch")] == [1] * 3 + [2] * 3 + [4] * 3
    assert [row.key["new_tokens"] for row in rows[:3]] == [1, 11, 31]
    assert rows[0].samples["ttft_s"] == pytest.approx([0.1] * 3)
    for batch in (1, 2, 4):
        assert len(record.select(rows, "batch-energy", batch=batch)) == 2
        (trace,) = {*record.select(rows, "batch-energy", batch=batch)[0].values["traces"]}
        assert trace == f"trace-hf-eager-{batch}.jsonl.gz" and (tmp_path / trace).exists()
    assert all(different == batch for batch, _, different in model.sizes)  # prompts of its own


def test_the_slope_of_two_lengths_is_the_step_whatever_the_prefill(monkeypatch, tmp_path):
    _, rows = sweep(monkeypatch, tmp_path)
    for batch, step_s in ((1, 0.011), (2, 0.012), (4, 0.014)):
        arms = record.select(rows, "batch", batch=batch)
        assert arms[1].samples["e2e_s"] == pytest.approx([0.1 * batch + 10 * step_s] * 3)
        assert estimators.decode_tok_per_s(arms).value == pytest.approx(1 / step_s)


def test_the_energy_of_a_batch_is_that_of_the_whole_call(monkeypatch, tmp_path):
    """Four sequences, 31 tokens: 0.4 s at 500 W and 30 steps of 14 ms at 400 W, 200 + 168 J."""
    _, rows = sweep(monkeypatch, tmp_path)
    short, long = (record.select(rows, "batch-energy", batch=4, new_tokens=g)[0] for g in (11, 31))
    assert long.samples["energy_j"] == pytest.approx([368, 368], rel=0.02)
    assert short.samples["energy_j"] == pytest.approx([256, 256], rel=0.02)
    assert long.values["idle_w"] == pytest.approx(110, rel=1e-3) and long.missing == {}
    points = [(r.key["new_tokens"], j) for r in (short, long) for j in r.samples["energy_j"]]
    assert stats.line(*zip(*points, strict=True))[1].value == pytest.approx(5.6, rel=0.05)


def test_the_windows_of_a_batch_follow_each_other_between_one_lead_in_and_one_lead_out(
    monkeypatch, tmp_path
):
    """Each window ends where the next one starts: short, long, long, short, or the reverse."""
    _, rows = sweep(monkeypatch, tmp_path, batches=[2])
    cells = record.select(rows, "batch-energy", batch=2)
    edges = sorted(
        edge
        for row in cells
        for edge in zip(row.samples["start_s"], row.samples["stop_s"], strict=True)
    )
    assert len(edges) == 4
    for (_, stop_s), (start_s, _) in zip(edges, edges[1:], strict=False):
        assert start_s == pytest.approx(stop_s, abs=1e-3)
    first = min(cells, key=lambda row: min(row.samples["start_s"]))
    assert max(first.samples["stop_s"]) == edges[-1][1]  # mirrored: a drift falls on both alike
    assert edges[0][0] >= windows.LEAD_S


def test_without_a_counter_energy_is_missing_with_the_reason(monkeypatch, tmp_path):
    _, rows = sweep(monkeypatch, tmp_path, board=False, batches=[1], window_s=0.0)
    for row in record.select(rows, "batch-energy"):
        assert "energy_j" not in row.samples and row.error is None
        assert row.missing["energy_j"] == "no counter on the fake"


def test_a_stack_that_runs_out_of_memory_is_one_row_and_the_next_stack_follows(
    monkeypatch, tmp_path
):
    passed = []
    monkeypatch.setattr(
        logits_check,
        "row",
        lambda model, **place: (
            passed.append(place["batch"])
            or (record.Record("gate", model.key(stack=place["stack"], batch=place["batch"])))
        ),
    )
    _, rows = sweep(
        monkeypatch,
        tmp_path,
        most=2,
        batches=[1, 2, 4, 8],
        energy_windows=0,
        stacks=["hf-eager", "graph"],
    )
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert kinds(rows) == [
        *[("batch", "hf-eager", b, None) for b in (1, 1, 1, 2, 2, 2)],
        ("batch", "hf-eager", 4, error),
        *[(kind, "graph", b, None) for b in (1, 2) for kind in ("gate", *["batch"] * 3)],
        ("gate", "graph", 4, None),
        ("batch", "graph", 4, error),
    ]
    assert passed == [1, 2, 4] and rows[-1].key["cache"] == "static"


def test_what_cannot_fit_is_not_tried(monkeypatch, tmp_path):
    """A cache of 1,000 bytes a token: 16 + 31 tokens of two sequences need 94,000."""
    monkeypatch.setattr(BoardDevice, "free_bytes", lambda device: 93_999)
    model, rows = sweep(monkeypatch, tmp_path, energy_windows=0)
    assert [(row.key["batch"], bool(row.error)) for row in rows] == [*[(1, 0)] * 3, (2, 1)]
    assert rows[-1].error.startswith("ModelError: fake in bfloat16 needs")
    assert {batch for batch, *_ in model.sizes} == {1}


def test_a_failed_gate_is_about_one_batch_only(monkeypatch, tmp_path):
    def judge(model, batch, **place):
        if batch == 2:
            raise logits_check.GateError("it computes something else")
        return record.Record("gate", model.key(stack="graph", batch=batch))

    monkeypatch.setattr(logits_check, "row", judge)
    _, rows = sweep(monkeypatch, tmp_path, stacks=["graph"], energy_windows=0)
    failed = [row for row in rows if row.error]
    assert kinds(failed) == [("batch", "graph", 2, "GateError: it computes something else")]
    assert {row.key["batch"] for row in rows} == {1, 2, 4}


def test_an_error_replaces_no_row_that_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(energy.sweep, "measure_together", lambda *arguments: 1 / 0)
    _, rows = sweep(monkeypatch, tmp_path)
    assert [(row.kind, row.key["new_tokens"]) for row in rows] == [
        ("batch", 1),
        ("batch", 11),
        ("batch", 31),
        ("batch-energy", 11),
    ]
    assert len(store.merge(rows)) == 4 and rows[-1].error.startswith("ZeroDivisionError")


def test_an_error_at_the_second_length_leaves_the_first(monkeypatch, tmp_path):
    arm = measure.latency.arm
    monkeypatch.setattr(
        measure.latency,
        "arm",
        lambda model, new_tokens, **arguments: (
            1 / 0 if new_tokens == 31 else arm(model, new_tokens=new_tokens, **arguments)
        ),
    )
    _, rows = sweep(monkeypatch, tmp_path)
    assert [(row.key["new_tokens"], bool(row.error)) for row in store.merge(rows)] == [
        (1, False),
        (11, False),
        (31, True),
    ]


def test_the_experts_of_each_batch_are_traced_for_the_stacks_that_are_asked_for(
    monkeypatch, tmp_path
):
    _, rows = sweep(monkeypatch, tmp_path, energy_windows=0, trace_stacks=["hf-eager"])
    traces = record.select(rows, "trace")  # of a dense model, so computed
    assert [row.key["batch"] for row in traces] == [1, 2, 4]
    assert [row.values["decode_bytes"] for row in traces] == [1_016_000, 1_032_000, 1_064_000]


def test_memory_is_given_back_after_the_times_and_after_each_batch(monkeypatch, tmp_path):
    cleared = []
    monkeypatch.setattr(BoardDevice, "empty_cache", lambda device: cleared.append(device.now_s))
    sweep(monkeypatch, tmp_path, batches=[1, 2])
    assert len({*cleared}) == len(cleared) == 4


def test_a_real_model_on_two_stacks(tmp_path, monkeypatch):
    monkeypatch.setattr(CpuDevice, "empty_cache", lambda device: None)  # slow among all these tests
    model = load.load("tiny-gpt-oss", dtype="float32", device=CpuDevice())
    changes = {
        "stacks": ["hf-eager", "graph-compiled"],
        "batches": [1, 3],
        "new_tokens": [2, 4],
        "repeats": 1,
        "energy_windows": 1,
        "window_s": 0.0,
        "trace_stacks": ["graph-compiled"],
    }
    path = tmp_path / "records.jsonl"
    rows = measure.batch.sweep(model, **(SWEEP | changes), records_path=path)
    assert not [row.error for row in rows if row.error]
    assert [row.key["batch"] for row in rows if row.kind == "gate"] == [1, 3]
    one, three = record.select(rows, "trace", stack="graph-compiled")
    assert one.values["experts_touched_decode"] == 2 < three.values["experts_touched_decode"]
    assert three.values["experts_touched_decode"] == three.values["experts_chosen_decode"]
