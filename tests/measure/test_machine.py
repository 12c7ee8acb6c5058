"""Ceilings with a fake clock: what a repetition moves, over the time that it is said to take."""

import pytest
import torch

from lib.measure import machine
from lib.records import record, store
from lib.records.record import KEY_FIELDS
from tests.fakes.device import FakeDevice

BUFFER = 2**15  # bytes: two rows of bfloat16, one of float32
TINY = machine.Sizes(
    buffer_bytes=BUFFER,
    buffers=2,
    sweeps=3,
    narrow=64,
    matrices=((8, 4), (4, 8)),
    layers=2,
    passes=5,
    product=4,
    products={"bfloat16": 3, "float32": 1},
    repeats=2,
)


class Launching(FakeDevice):
    """A device that queues; each reading of its launch time is another one."""

    def __init__(self):
        super().__init__(tick_s=0.5)
        self.launches = iter([3e-6, 2e-6, 4e-6, 5e-6, 6e-6])

    def launch_s(self):
        return next(self.launches)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(machine, "SIZES", {"cpu": TINY})


def test_each_rate_is_what_a_repetition_moves_over_its_time(tiny, tmp_path):
    env, row = machine.measure(FakeDevice(tick_s=0.5), seed=0, records_path=tmp_path / "r.jsonl")
    bytes_per_s = 2 * 3 * BUFFER / 0.5  # two buffers, three sweeps, half a second
    assert row.values["read_bytes_per_s"] == bytes_per_s
    assert row.values["copy_bytes_per_s"] == 2 * bytes_per_s  # read and written
    # Four matrices of 32 numbers of two bytes, five times.
    assert row.values["matvec_bytes_per_s"] == 4 * 32 * 2 * 5 / 0.5
    # 2 x 4^3 operations, three times in bfloat16 and once in float32.
    assert row.values["matmul_flop_per_s"] == 2 * 64 * 3 / 0.5
    assert row.values["matmul_float32_flop_per_s"] == 2 * 64 / 0.5
    reads = [name for name in row.samples if name.startswith("read_bytes_per_s, ")]
    assert len(reads) == 9 and all(row.samples[name] == [bytes_per_s] * 2 for name in reads)
    assert f"read_bytes_per_s, {row.values['read_shape']}" in reads
    assert len(row.samples["host_score_per_s"]) == 5
    assert row.values["host_score_per_s"] == max(row.samples["host_score_per_s"])
    assert row.missing == {"launch_s": "nothing is queued on a CPU"}
    assert store.load(tmp_path / "r.jsonl") == [env, row]


def test_it_belongs_to_no_model_but_to_the_card_of_its_environment(tiny, tmp_path):
    env, row = machine.measure(FakeDevice(tick_s=1), seed=0, records_path=tmp_path / "r.jsonl")
    assert row.key == dict.fromkeys(KEY_FIELDS)
    assert (env.kind, row.kind, row.env_id) == ("environment", "ceilings", env.env_id)
    assert record.identity(row, {"gpu": "A"}) != record.identity(row, {"gpu": "B"})
    assert store.merge([env, row, row]) == [env, row]


def test_the_best_launch_is_the_shortest(tiny, tmp_path):
    _, row = machine.measure(Launching(), seed=0, records_path=tmp_path / "r.jsonl")
    assert row.values["launch_s"] == 2e-6 and len(row.samples["launch_s"]) == 5
    assert row.missing == {}


@pytest.mark.parametrize("end", [0, -1])
def test_every_shape_reads_the_whole_buffer(end):
    """A number at either end shows in the result of each."""
    for shape, call in machine._reads(TINY, lambda *s: torch.ones(s, dtype=torch.bfloat16)):
        buffer = torch.zeros(BUFFER // 2, dtype=torch.bfloat16)
        assert not call(buffer).any(), shape
        buffer[end] = 5
        assert call(buffer).any(), shape


def test_the_shapes_are_those_of_a_gibibyte_on_a_gpu():
    sizes = machine.SIZES["cuda"]
    assert sizes.buffer_bytes >= 2**30 and sizes.buffers * sizes.sweeps >= 20
    layer_bytes = sum(2 * out * columns for out, columns in sizes.matrices)
    assert layer_bytes * sizes.layers > 10 * 128 * 2**20  # ten times any cache of today's cards


def test_a_chain_calls_each_item_in_every_pass():
    seen = []
    machine._chain(seen.append, "ab", 2)()
    assert seen == ["a", "b", "a", "b"]
