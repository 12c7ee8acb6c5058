"""Causes of ratios between an H100 and an H200, by arms whose floors a reader can divide.

A step reads 33.5 GB: 10 ms at the 3.35 TB/s of an H100, 6.98 ms at the 4.8 TB/s of an H200. The
model has 100 million active parameters, so that its operations never matter for a step.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.analysis import result_sets, waits
from lib.analysis.metrics import METRICS
from lib.analysis.result_sets import Side
from lib.records.record import Record, environment_record
from lib.report import comparison
from tests.samples import records as sample

GPUS = {"A": "NVIDIA H100 80GB HBM3", "B": "NVIDIA H200"}
SCORES = {"A": 10.0, "B": 12.0}
RATIO = 4.8 / 3.35


def side(letter, *, step_ms, busy_ms=None, first_ms=100.0, first_busy_ms=None, stack="hf-eager"):
    """Calls of 2 and 66 tokens, 64 steps apart, and what a profiler saw of a step and a prefill."""
    env = environment_record(sample.GPU | {"gpu": GPUS[letter], "host_score_per_s": SCORES[letter]})
    key = sample.key("m", stack=stack, context=512)
    card = Record("card", {"model": "m"}, values={"active_params": 10**8}, env_id=env.env_id)
    rows = [env, card]
    for tokens in (1, 2, 66):
        name = "ttft_s" if tokens == 1 else "e2e_s"
        seconds = (first_ms + step_ms * (tokens - 1)) / 1e3
        values = sample.source("m") | {"decode_bytes": 33_500_000_000}
        samples = {name: [seconds] * 6}
        rows.append(
            Record("latency", key | {"new_tokens": tokens}, samples, values, env_id=env.env_id)
        )
    if busy_ms:
        values = {"decode_busy_s": busy_ms / 1e3}
        values |= {"prefill_busy_s": first_busy_ms / 1e3} if first_busy_ms else {}
        rows.append(Record("busy", key | {"new_tokens": 9}, {}, values, env_id=env.env_id))
    return Side(letter, tuple(rows))


def why(a, b, metric="decode", new_tokens=66):
    key = next(r.key for r in a.rows if r.kind == "latency") | {"new_tokens": new_tokens}
    return waits.cause(METRICS[metric], key, waits.Waits(a.rows), waits.Waits(b.rows))


def test_a_step_near_its_bytes_waits_for_bandwidth():
    a, b = side("A", step_ms=12.5), side("B", step_ms=8.7)  # 80 % are of bytes
    told = why(a, b)
    assert told.text == "bandwidth" and told.expected.value == pytest.approx(RATIO)
    assert why(a, b, "itl").expected.value == pytest.approx(1 / RATIO)


def test_a_profiled_step_with_an_idle_device_waits_for_the_host():
    a, b = (side(x, step_ms=20.0, busy_ms=13.0) for x in "AB")  # 65 %
    told = why(a, b)
    assert told.text == "host" and told.expected.value == pytest.approx(12 / 10)
    assert why(a, b, "p50").expected.value == pytest.approx(10 / 12)


@pytest.mark.parametrize(
    ("step_ms", "busy_ms", "stack", "text"),
    [
        (31.0, 30.0, "hf-eager", "kernels"),  # the device works, 10 ms are of bytes
        (31.0, None, "hf-eager", waits.UNTOLD),
        (20.0, None, "hf-eager", waits.UNTOLD),  # half are of bytes, and the host may take longer
        (20.0, None, "graph", "bandwidth"),
        (31.0, None, "graph", "kernels"),  # captured: the device sets its pace
        (20.0, 16.0, "hf-eager", "host and device"),  # 80 %
        (20.0, 19.0, "hf-eager", "bandwidth"),
        (31.0, 26.0, "graph", "kernels"),  # 84 %: the pauses lie between captured kernels
        (20.0, 16.0, "graph", "bandwidth"),
        (20.0, 13.0, "graph", "host"),  # 65 %
    ],
)
def test_what_is_not_bytes_and_not_the_host_is_said(step_ms, busy_ms, stack, text):
    both = [side("A", step_ms=step_ms, busy_ms=busy_ms, stack=stack)] * 2
    told = why(*both)
    assert told.text == text
    assert (told.expected.value is None) is (text not in ("bandwidth", "host"))


def test_a_cause_that_changes_has_no_ratio():
    told = why(side("A", step_ms=11.0, busy_ms=10.5), side("B", step_ms=11.0, busy_ms=7.0))
    assert told.text == "bandwidth in A, host in B"
    assert told.expected.value is None and told.expected.reason


def test_a_call_waits_for_what_its_longer_part_does():
    """65 steps of 20 ms wait for the host; a first token of 2 s for the device's kernels."""
    slow = {"first_ms": 2000.0, "first_busy_ms": 1990.0}
    both = [side(x, step_ms=20.0, busy_ms=10.0, **slow) for x in "AB"]
    assert why(*both, "p50", new_tokens=66).text == "kernels"  # 1.3 s of steps
    assert why(*both, "p50", new_tokens=201).text == "host"  # 4 s
    assert why(*both, "call_j", new_tokens=201).text == "host"


def test_joules_have_a_cause_and_no_ratio_of_a_rate():
    """A step that reads the same bytes faster takes less time, at more watts."""
    told = why(side("A", step_ms=12.5), side("B", step_ms=8.7), "call_j")
    assert told.text == "bandwidth" and told.expected.value is None
    assert "power" in told.expected.reason


def of_boards(count, letter="A"):
    """Steps on so many boards of which each reads its share: 80 % of the time on either card."""
    one = side(letter, step_ms={"A": 12.5, "B": 8.7}[letter] / count, stack="vllm")
    gpu = GPUS[letter] if count == 1 else f"{count} x {GPUS[letter]}"
    env = environment_record(
        sample.GPU | {"gpu": gpu, "devices": count, "boards": [{"gpu": GPUS[letter]}] * count}
    )
    own = {"devices": count} if count > 1 else {}
    rows = [
        replace(r, key=r.key | own | {"engine": f"e{count}"}, env_id=env.env_id)
        for r in one.rows
        if r.kind != "environment"
    ]
    return [env, *rows]


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_each_number_of_boards_is_compared_with_as_many(order, devices):
    """Whichever stands first in a set, one board has the bandwidth of one and two that of two."""
    a = Side("A", tuple(of_boards(devices or 1, "A")))
    b = Side("B", tuple(r for n in order for r in of_boards(n, "B")))
    key = next(r.key for r in a.rows if r.kind == "latency" and r.key.get("devices") == devices)
    told = waits.cause(
        METRICS["p50"], key | {"new_tokens": 66}, waits.Waits(a.rows), waits.Waits(b.rows)
    )
    assert told.text == "bandwidth" and told.expected.value == pytest.approx(1 / RATIO)


def test_the_time_of_the_device_alone_never_waits_for_the_host():
    both = [side(x, step_ms=40.0, busy_ms=12.0) for x in "AB"]
    assert why(*both).text == "host"
    assert why(*both, "decode_busy").text == "bandwidth"  # 10 and 7 of 12 ms


@pytest.mark.parametrize(
    ("metric", "text"),
    [("read_rate", "bandwidth"), ("matmul_rate", "compute"), ("launch", "host"),
     ("peak", waits.NOT_OF_CARD), ("decode_kernels", waits.NOT_OF_CARD)],
)  # fmt: skip
def test_some_numbers_have_one_cause_whatever_the_arm(metric, text):
    told = why(side("A", step_ms=20.0), side("B", step_ms=20.0), metric)
    assert told.text == text
    values = {"bandwidth": RATIO, "compute": 989.5 / 989.4, "host": 10 / 12}
    assert told.expected.value == (pytest.approx(values[text]) if text in values else None)


def test_hosts_whose_speed_moves_explain_no_ratio():
    """The host of B was at 12 for one arm and at 16 for another: a third faster."""
    a, b = (side(x, step_ms=20.0, busy_ms=13.0) for x in "AB")
    values = sample.GPU | {"gpu": GPUS["B"], "host_score_per_s": 16.0}
    env, one = environment_record(values), next(r for r in b.rows if r.kind == "latency")
    other = replace(one, key=one.key | {"context": 1024}, env_id=env.env_id)
    told = why(a, Side("B", (*b.rows, env, other)))
    assert told.text == "host" and told.expected.value is None
    reason = "the speed of the hosts of B moved between rows: it explains no ratio"
    assert told.expected.reason == reason


def test_an_unknown_card_has_no_ratio_and_a_reason():
    a, b = side("A", step_ms=20.0), side("B", step_ms=20.0)
    bare = Side("B", tuple(r for r in b.rows if r.kind != "environment"))
    told = waits.cause(
        METRICS["read_rate"], {"model": None}, waits.Waits(a.rows), waits.Waits(bare.rows)
    )
    assert told.expected.reason == "the bandwidth of B is not known"


def test_the_comparison_says_the_cause_beside_each_ratio():
    a, b = side("A", step_ms=12.5), side("B", step_ms=8.7)
    pairs, refused = result_sets.compare(a, b)
    whys = comparison.causes(pairs, a, b)
    (table,) = [t for t in comparison.tables(pairs, whys) if t.title == "decode throughput"]
    assert [c.title for c in table.columns][-2:] == ["cause", "B / A of the cause"]
    (row,) = table.rows
    assert row[-2] == "bandwidth" and row[-1].value == pytest.approx(RATIO)
    line = next(x for x in comparison.by_cause(pairs, whys).lines() if x["quantity"] == table.title)
    assert (line["cause"], line["arms"]) == ("bandwidth", 1)
    assert line["B / A"] == pytest.approx(12.5 / 8.7)
    assert line["of the cause"] == pytest.approx(4.8 / 3.35)
