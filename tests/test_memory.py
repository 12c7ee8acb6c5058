"""Memory: the arithmetic of peak, baseline, cache, logits and rest on a fake allocator."""

from types import SimpleNamespace

import pytest
import torch
from fakes import FakeCache, FakeDevice, FakeModel

from lib import decode, memory, records
from lib.device import CpuDevice


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel(FakeDevice())
    monkeypatch.setitem(decode.STACKS, "hf-eager", fake.open_stack)
    return fake


class FakeNet:
    """Forward passes over a vocabulary of 5: logits of all positions, float32."""

    def __init__(self, device):
        self.device, self.seen = device, []

    def __call__(self, ids, past_key_values=None, use_cache=True):
        self.seen.append(ids.shape[1])
        logits = torch.zeros(1, ids.shape[1], 5)
        self.device.allocate(20 * ids.shape[1])
        return SimpleNamespace(logits=logits, past_key_values=past_key_values or FakeCache())


def test_the_paper_protocol_prefills_once_and_holds_all_logits():
    net = FakeNet(FakeDevice())
    alive = memory.paper_call(net, torch.zeros(1, 7, dtype=torch.long), 3)
    assert net.seen == [7, 1, 1, 1]
    assert memory.tensor_bytes(alive["logits"]) == 7 * 5 * 4
    assert memory.cache_bytes(alive["cache"]) == 400


def test_the_parts_of_the_peak_add_up(model):
    def call(ids, tokens):
        model.device.allocate(1000)  # peak 2000 above the baseline of 1000, then half is freed
        model.device.allocate(1000)
        model.device.allocated -= 1000
        return {"cache": FakeCache(), "logits": torch.zeros(30)}

    row = memory.arm(model, kind="memory-paper", call=call, stack="hf-eager", context=8,
                     new_tokens=4, seed=0, env_id="e")  # fmt: skip
    v = row.values
    assert (v["baseline_bytes"], v["peak_bytes"], v["held_bytes"]) == (1000, 3000, 2000)
    assert (v["kv_tensor_bytes"], v["logits_bytes"]) == (400, 120)
    assert v["workspace_bytes"] == 3000 - 1000 - 400 - 120
    assert row.warnings == ()


def test_generate_caches_one_token_less_than_the_paper():
    assert memory.cached_tokens("memory-paper", 2048, 64) == 2112
    assert memory.cached_tokens("memory", 2048, 64) == 2111


def test_a_cache_unlike_the_card_is_a_warning():
    assert memory.kv_warnings({"kv_tensor_bytes": 400, "kv_card_bytes": 400}) == []
    (warning,) = memory.kv_warnings({"kv_tensor_bytes": 400, "kv_card_bytes": 500})
    assert warning["code"] == "kv-card"


def test_what_the_allocator_does_not_report_is_missing_with_a_reason(model):
    row = memory.arm(model, kind="memory", call=lambda ids, g: {"cache": FakeCache()},
                     stack="hf-eager", context=8, new_tokens=4, seed=0, env_id="e")  # fmt: skip
    assert "reserved_bytes" not in row.values
    assert row.missing == {"reserved_bytes": "the fake allocator does not report it"}


def test_on_a_cpu_every_byte_that_torch_allocates_is_seen():
    with CpuDevice().watch_memory(resident_bytes=1000) as usage:
        kept = torch.zeros(250)  # 1,000 bytes
        torch.zeros(500)  # 2,000 bytes, dropped at once
    assert usage["baseline_bytes"] == 1000
    assert usage["held_bytes"] == 1000 + kept.nbytes == 2000
    assert usage["peak_bytes"] == 4000


def test_the_sweep_runs_both_protocols_at_every_context(model, tmp_path):
    model.net = FakeNet(model.device)
    path = tmp_path / "records.jsonl"
    rows = memory.sweep(model, contexts=[8, 16], new_tokens=4, seed=0, records_path=path)
    assert [(r.kind, r.key["context"]) for r in rows[2:]] == [
        ("memory-paper", 8), ("memory", 8), ("memory-paper", 16), ("memory", 16)]  # fmt: skip
    assert records.load(path) == rows
