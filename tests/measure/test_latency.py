"""Latency: exact times on a fake clock, token counts forced and asserted."""

from types import SimpleNamespace

import pytest
import torch

from lib.hardware.device import open_device, time_call
from lib.measure import latency
from lib.models import load
from lib.records import record, store
from lib.stacks import registry
from lib.stacks.generate import GenerateStack
from lib.stacks.registry import STACKS
from tests.fakes.board import SLOW, Board, BoardDevice, BoardModel
from tests.fakes.device import FakeDevice, FakeModel, opened


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel(FakeDevice(), prefill_s=1.0, token_s=0.1)
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", fake.open_stack))
    return fake


def sweep(model, path, **changes):
    arguments = {
        "contexts": [16, 32],
        "new_tokens": [10, 20],
        "repeats": 6,
        "slope_repeats": 2,
        "ttft_repeats": 5,
        "itl_repeats": 1,
        "seed": 0,
    }
    return latency.sweep(model, records_path=path, **{**arguments, **changes})


def test_a_time_is_bracketed_by_two_synchronisations():
    device = FakeDevice(tick_s=0.5)
    assert time_call(lambda: "result", device) == (0.5, "result")
    assert device.syncs == 2


def test_one_call_takes_prefill_plus_tokens(model):
    row = latency.arm(
        model, stack="hf-eager", context=16, new_tokens=10, repeats=3, seed=0, env_id="e"
    )
    assert row.samples["e2e_s"] == pytest.approx([2.0, 2.0, 2.0])  # 1.0 + 10 * 0.1
    assert row.samples["warmup_s"] == pytest.approx([1.8, 2.0])  # of 8 tokens, and of 10
    assert row.key["context"] == 16 and row.key["new_tokens"] == 10


def test_no_timed_call_is_the_first_of_its_length(monkeypatch):
    """As on an H100: the first call of a length took up to twice as long as the next, since each
    step of it asked the driver for memory that later calls find in the pool."""
    fake = FakeModel(FakeDevice(), prefill_s=1.0, token_s=0.1, cold_s=0.05)
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", fake.open_stack))
    for tokens, cold in ((10, [1.8 + 8 * 0.05, 2.0 + 2 * 0.05]), (30, [1.8, 4.0 + 20 * 0.05])):
        row = latency.arm(
            fake, stack="hf-eager", context=16, new_tokens=tokens, repeats=2, seed=0, env_id="e"
        )
        assert row.samples["e2e_s"] == pytest.approx([1 + tokens * 0.1] * 2)
        assert row.samples["warmup_s"] == pytest.approx(cold)


def test_ttft_is_a_call_of_one_token(model):
    row = latency.arm(
        model, stack="hf-eager", context=16, new_tokens=1, repeats=5, seed=0, env_id="e"
    )
    assert row.samples["ttft_s"] == pytest.approx([1.1] * 5)
    assert "e2e_s" not in row.samples


def test_the_sweep_measures_every_arm_and_writes_it_at_once(model, tmp_path):
    path = tmp_path / "records.jsonl"
    rows = sweep(model, path)
    assert store.load(path) == rows
    assert [r.kind for r in rows[:2]] == ["environment", "card"]
    counts = {
        (r.key["context"], r.key["new_tokens"]): len(r.samples.get("ttft_s") or r.samples["e2e_s"])
        for r in record.select(rows, "latency")
    }
    assert counts == {(c, g): n for c in (16, 32) for g, n in ((1, 5), (10, 6), (20, 2))}
    assert len(record.select(rows, "itl")) == 2


def test_a_mixture_of_experts_is_timed_with_further_implementations(tmp_path):
    """Its TTFT and headline length at the longest context, and the library's choice afterwards."""
    mixture = load.load("tiny-gpt-oss", dtype="float32", device=open_device("cpu"))
    before = mixture.experts
    small = {"new_tokens": [2, 4], "also_experts": ["all_experts"]}
    rows = sweep(mixture, tmp_path / "r.jsonl", **small)
    more = {
        (r.kind, r.key["context"], r.key["new_tokens"]): len(next(iter(r.samples.values())))
        for r in rows
        if r.key.get("experts") == "all_experts"
    }
    own = {
        (r.kind, r.key["context"], r.key["new_tokens"]): len(next(iter(r.samples.values())))
        for r in rows
        if r.kind == "latency" and r.key["experts"] == before
    }
    longest = max(context for _, context, _ in own)
    assert len(more) == 2 and {context for _, context, _ in more} == {longest}
    assert more.items() <= own.items() and mixture.experts == before
    dense = load.load("tiny-qwen3", dtype="float32", device=open_device("cpu"))
    rows = sweep(dense, tmp_path / "d.jsonl", **small)
    assert {r.key["experts"] for r in rows if r.kind == "latency"} == {"none"}


def test_an_interrupted_sweep_keeps_what_it_measured(model, tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    measured = latency.arm

    def stop_at_third(*args, **kwargs):
        if len(store.load(path)) == 4:
            raise KeyboardInterrupt
        return measured(*args, **kwargs)

    monkeypatch.setattr(latency, "arm", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, path)
    assert len(store.load(path)) == 4  # environment, card and two arms


def test_token_stamps_count_from_the_start_of_their_call(model):
    row = latency.stamped(
        model, stack="hf-eager", context=16, new_tokens=3, repeats=2, seed=0, env_id="e"
    )
    assert row.samples["token_s"] == [pytest.approx([1.1, 1.2, 1.3])] * 2
    assert row.samples["e2e_s"] == pytest.approx([1.3, 1.3])


def busy_row(model, tokens=8):
    return latency.busy_row(model, stack="hf-eager", context=16, tokens=tokens, seed=0, env_id="e")


def test_device_time_of_a_step_is_the_difference_of_two_calls(model):
    """1.1 s for one token and 1.9 s for nine; the fake device works half of the time."""
    row = busy_row(model)
    assert row.values["prefill_busy_s"] == pytest.approx(0.55)
    assert row.values["decode_busy_s"] == pytest.approx((0.95 - 0.55) / 8)
    assert row.values["decode_kernels"] == pytest.approx((190 - 110) / 8)
    assert row.values["decode_kernel_times"] == [
        ["gemv", pytest.approx((142 - 82) / 8), pytest.approx(0.75 * 0.4 / 8)],
        ["softmax", pytest.approx((48 - 28) / 8), pytest.approx(0.25 * 0.4 / 8)],
    ]
    assert (row.kind, row.key["context"], row.key["new_tokens"]) == ("busy", 16, 9)
    assert model.calls == [9, 9, 1, 9]  # two warm up, two are profiled
    assert row.missing == {}


def test_without_a_profiler_device_time_is_missing_with_the_reason(model):
    model.device.missing["busy"] = "no profiler on the fake"
    row = busy_row(model)
    names = ("prefill_busy_s", "decode_busy_s", "decode_kernels", "decode_kernel_times")
    assert row.missing == dict.fromkeys(names, "no profiler on the fake")
    assert not {*names} & row.values.keys() and model.calls == []


def test_a_profiler_that_sees_nothing_is_a_reason_too(model, monkeypatch):
    def blind(call):
        model.device.missing["busy"] = "saw no kernel"

    monkeypatch.setattr(model.device, "busy", blind, raising=False)
    assert busy_row(model).missing["decode_busy_s"] == "saw no kernel"


def test_the_shortest_context_is_measured_against_itself_and_the_profiler_comes_last(
    model, tmp_path
):
    rows = sweep(model, tmp_path / "r.jsonl", contexts=[32, 16], aa_repeats=7, busy_tokens=4)
    (aa,) = record.select(rows, "aa")
    assert (aa.key["context"], aa.key["new_tokens"]) == (16, 1)
    assert aa.samples["ttft_s"] == pytest.approx([1.1] * 7)
    assert [r.kind for r in rows[-3:]] == ["aa", "busy", "busy"]
    assert {r.key["new_tokens"] for r in rows[-2:]} == {5}


def test_the_order_of_arms_is_seeded(model, tmp_path):
    def order(seed, name):
        rows = sweep(model, tmp_path / name, seed=seed, itl_repeats=0)
        return [(r.key["context"], r.key["new_tokens"]) for r in rows[2:]]

    assert order(1, "a") == order(1, "b") != order(2, "c")


def test_a_noisy_host_is_a_warning_with_advice():
    (spread,) = latency.warnings_of([1.0, 1.0, 1.2])
    assert spread["code"] == "spread" and "20%" in spread["text"]
    assert latency.warnings_of([1.0, 1.01, 1.0]) == []


def test_a_drift_between_first_and_last_third_is_a_warning():
    codes = [w["code"] for w in latency.warnings_of([1.00, 1.00, 1.03, 1.03, 1.06, 1.06])]
    assert codes == ["drift"]


def test_a_stack_that_stops_early_is_refused(model, monkeypatch):
    class Net(torch.nn.Module):
        generation_config = None

        def generate(self, ids, **kwargs):
            return SimpleNamespace(sequences=torch.cat([ids, ids[:, :2]], 1), past_key_values=None)

    with pytest.raises(RuntimeError, match="asked for 3 new tokens, got 2"):
        GenerateStack(Net(), decoding="greedy")(torch.zeros(1, 4, dtype=torch.long), 3)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="unknown stack 'sglang'"):
        registry.open_stack("sglang", None)
    with pytest.raises(ValueError, match="unknown decoding 'beam'"):
        registry.open_stack("hf-eager", None, decoding="beam")


class Remote:
    """A subject without net, card, device or tensors: 0.2 s to a first token, 0.05 s for each."""

    name, card, values = "remote", None, {"model_source": "somewhere else"}

    def __init__(self):
        self.now_s, self.waits = 0.0, 0

    def key(self, **changes):
        return {"model": self.name, "stack": "elsewhere", "decoding": "greedy", **changes}

    def prompt(self, context, *, seed, batch=1):
        return [[seed + place] * context for place in range(batch)]

    def generate(self, ids, new_tokens, on_token=None):
        self.now_s += 0.2 + 0.05 * (new_tokens - 1)
        return SimpleNamespace(tokens=[[7] * new_tokens for _ in ids], prepare_s=0.0, decode_s=None)

    def synchronize(self):
        self.waits += 1

    def clock_s(self):
        return self.now_s


def test_what_has_no_net_is_measured_by_the_same_definitions():
    subject = Remote()
    row = latency.measured(subject, context=32, new_tokens=5, repeats=3, seed=0, env_id="e")
    assert row.samples["e2e_s"] == pytest.approx([0.4] * 3)  # 0.2 + 4 x 0.05
    assert row.samples["warmup_s"] == pytest.approx([0.4] * 2)
    assert subject.waits == 2 * 5  # idle at both edges of every call
    first = latency.measured(subject, context=32, new_tokens=1, repeats=6, seed=0, env_id="e")
    assert first.samples["ttft_s"] == pytest.approx([0.2] * 6)
    assert row.key["stack"] == "elsewhere" and row.values["model_source"] == "somewhere else"
    assert row.missing["decode_bytes"] == "the architecture is not known"


HELD_BACK = {
    "heat": ({"hw_thermal_s": lambda t: 1 + t / 10}, {"throttled"}),
    "a power brake": ({"power_brake_s": lambda t: 1 + t / 1000}, {"throttled"}),
    "the power limit": ({"power_cap_s": lambda t: 1 + t / 2}, {"power_cap"}),
    "nothing": ({}, set()),
}


@pytest.mark.parametrize("cause", HELD_BACK)
def test_a_row_says_for_how_long_the_board_was_held_back(monkeypatch, cause):
    """As energy rows do: counters before and after the timed calls, none asked within them."""
    slow, codes = HELD_BACK[cause]
    device = BoardDevice(Board(slow={**SLOW, **slow}))
    fake = BoardModel(device)
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", fake.open_stack))
    row = latency.arm(
        fake, stack="hf-eager", context=16, new_tokens=10, repeats=4, seed=0, env_id="e"
    )
    assert {warning["code"] for warning in row.warnings} == codes
    expected = {"heat": 0.1, "a power brake": 0.001, "nothing": 0.0}.get(cause, 0.0)
    assert row.values["held_back"]["throttled"] == pytest.approx(expected)
    assert row.values["held_back"]["power_cap"] == pytest.approx(0.5 * ("limit" in cause))


@pytest.mark.parametrize(("reasons", "code"), [(0x40, "throttled"), (0x04, "power_cap"), (1, "")])
def test_without_counters_the_drivers_reasons_say_it(monkeypatch, reasons, code):
    fake = BoardModel(BoardDevice(Board(slow={"throttle_reasons": reasons})))
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", fake.open_stack))
    row = latency.arm(
        fake, stack="hf-eager", context=16, new_tokens=10, repeats=4, seed=0, env_id="e"
    )
    assert [w["code"] for w in row.warnings] == ([code] if code else [])


def test_a_board_that_tells_nothing_is_missing_with_the_reason(model):
    row = latency.arm(
        model, stack="hf-eager", context=16, new_tokens=10, repeats=2, seed=0, env_id="e"
    )
    assert row.values["held_back"] == {} and row.warnings == ()
    assert row.missing["throttled"] == row.missing["power_cap"]
    assert row.missing["throttled"] == "violation counters were not read"
