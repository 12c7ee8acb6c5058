"""Host or device: shares of the time that a reader can divide, and what they say."""

import pytest

from lib.analysis import host_bound, latency
from lib.records.record import Record, environment_record
from lib.stats import Estimate
from tests.samples.records import key

ENV = environment_record({"gpu": "G"})
CPU = "the device is a CPU: host and device are one"


def arm(
    model="m",
    step_s=0.010,
    ttft_s=0.100,
    busy_s=0.004,
    prefill_s=0.095,
    context=128,
    n=6,
    **changes,
):
    """Calls of 1, 10 and 20 tokens, and a profiled pair with 300 kernels a step."""
    where = {"context": context} | changes
    timed = [
        Record(
            "latency",
            key(model, new_tokens=g, **where),
            {"ttft_s" if g == 1 else "e2e_s": [ttft_s + (g - 1) * step_s] * n},
            env_id=ENV.env_id,
        )
        for g in (1, 10, 20)
    ]
    values = {"decode_busy_s": busy_s, "prefill_busy_s": prefill_s, "decode_kernels": 300.0}
    missing = {} if busy_s is not None else dict.fromkeys(values, CPU)
    return [
        *timed,
        Record(
            "busy",
            key(model, new_tokens=9, **where),
            {},
            {k: v for k, v in values.items() if v is not None},
            missing,
            env_id=ENV.env_id,
        ),
    ]


@pytest.mark.parametrize(
    "share, verdict",
    [
        (Estimate(0.95, 0.92, 0.97), "device-bound"),
        (Estimate(0.9), "device-bound"),
        (Estimate(0.4, 0.3, 0.5), "host-bound"),
        (Estimate(0.7), "host-bound"),
        (Estimate(0.8, 0.75, 0.85), "mixed"),
        (Estimate(0.8, 0.6, 0.85), "mixed, not resolved"),
        (Estimate(0.92, 0.85, 0.99), "device-bound, not resolved"),
        (Estimate(None), ""),
    ],
)
def test_the_verdict_follows_from_the_share_and_its_interval(share, verdict):
    assert host_bound.verdict(share) == verdict


def test_shares_are_device_time_over_time_without_a_profiler():
    assert host_bound.decode_share(arm()).value == pytest.approx(0.4)  # 4 ms of 10 ms
    assert host_bound.prefill_share(arm()).value == pytest.approx(0.95)  # 95 ms of 100 ms
    assert host_bound.prefill_share(arm()).n == 6


def test_the_table_holds_both_times_and_both_verdicts():
    (line,) = host_bound.table([ENV, *arm()]).frame().to_dict("records")
    assert line["device time of a step (ms)"] == pytest.approx(4)
    assert line["TPOT (ms)"] == pytest.approx(10)
    assert (line["kernels of a step"], line["share of TPOT"]) == (300, pytest.approx(0.4))
    assert (line["decode"], line["prefill"]) == ("host-bound", "device-bound")
    assert line["TTFT (ms)"] == pytest.approx(100)


def test_an_arm_meets_only_its_own_times():
    """Another context, stack or experts implementation has a row of its own, or none."""
    rows = [
        ENV,
        *arm(),
        *arm(context=512, busy_s=0.0095),
        *arm(stack="graph", step_s=0.0042),
        *[r for r in arm(context=1024) if r.kind == "latency"],
    ]
    frame = host_bound.table(rows).frame()
    assert list(zip(frame["stack"], frame["context"], frame["decode"], strict=True)) == [
        ("hf-eager", 128, "host-bound"),
        ("hf-eager", 512, "device-bound"),
        ("graph", 128, "device-bound"),
    ]


def test_without_a_slope_or_a_profiler_there_is_no_share():
    no_slope = [r for r in arm() if r.key["new_tokens"] not in (1, 20)]
    assert "two lengths" in host_bound.decode_share(no_slope).reason
    blind = arm(busy_s=None, prefill_s=None)
    assert CPU in host_bound.decode_share(blind).reason
    assert host_bound.tables(blind) == [] and host_bound.sentences(blind) == []
    assert host_bound.table(blind).notes == (CPU,)
    assert host_bound.table([]).notes == ("no profiled call",)
    noisy = host_bound.decode_share(arm(busy_s=-0.001))
    assert noisy.value is None and "not resolved" in noisy.reason


def test_a_sentence_for_the_longest_context():
    (sentence,) = host_bound.sentences([*arm(), *arm(context=512, busy_s=0.0095)])
    assert sentence == (
        "m on hf-eager, at 512 tokens: the device works 9.500 ms of a decode step, 0.95 of its "
        "time [0.95, 0.95]: device-bound (from 0.9 on device-bound, to 0.7 host-bound); prefill: "
        "device-bound."
    )


def test_comparing_two_models_that_wait_for_the_host_compares_the_host():
    waiting = [*arm("a"), *arm("b", step_s=0.02)]
    (sentence,) = host_bound.comparison(waiting)
    assert sentence.startswith("Decoding of a and of b on hf-eager at 128 tokens is host-bound:")
    assert "compares what the host does for a step, not the models" in sentence
    assert host_bound.comparison([*arm("a"), *arm("b", busy_s=0.0095)]) == []
    assert host_bound.comparison([*arm("a"), *arm("b", stack="graph")]) == []


def test_the_conclusion_on_latency_says_who_waits():
    text = latency.conclusion([ENV, *arm("a"), *arm("b")])
    assert "- a on hf-eager, at 128 tokens: the device works 4.000 ms of a decode step" in text
    assert "- Decoding of a and of b on hf-eager" in text
