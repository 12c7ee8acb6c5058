"""Every metric of the catalogue by hand, from one set of rows whose arithmetic fits in a head.

A call of one token takes 0.25 s and one of five 1 s, so that a further token takes 0.1875 s. Such a
call uses 50 J on a board that draws 30 W when idle. Of 400 requests to a server the k-th waits k ms
for its first token and 2k ms in all.
"""

from dataclasses import replace

import pytest

from lib import stats
from lib.analysis import estimators, metrics
from lib.analysis.metrics import METRICS
from lib.analysis.series import Series
from lib.records.record import Record, record_id, warning
from tests.samples import serving

GIB = 2**30
SIX = (0.9, 1.0, 1.0, 1.0, 1.0, 1.1)


def row(kind, samples=None, values=None, error=None, visit="", others=(), **key):
    fields = {"model": "m", "weights": "random", "dtype": "bfloat16", "context": 8} | key
    missing = {}
    return Record(kind, fields, samples or {}, values or {}, missing, error, visit=visit,
                  others=tuple(others))  # fmt: skip


def times(centre):
    return [centre * x for x in SIX]


def requests():
    """400 requests, a hundredth of a second apart, in a window of 5 s."""
    facts = []
    for k in range(1, 401):
        start_s, wait_s = 10 + k / 100, k / 1000
        facts.append(
            serving.fact(
                start_s,
                start_s + 2 * wait_s,
                start_s + wait_s,
                visible_s=start_s + 1.5 * wait_s,
                sent_s=start_s + wait_s / 10,
            )
        )
    samples = {"output_tokens_by_s": [40] * 5, "prompt_tokens_by_s": [70] * 5}
    samples |= {"itl_s": [0.01, 0.02, 0.03]}
    values = {"energy_j": 1000.0, "idle_w": 60.0, "itl_count": 3, "limit_ttft_s": 0.1005}
    return serving.row(facts, window=(10.0, 15.0), samples=samples, **values)


ONE = row("latency", {"ttft_s": [0.25] * 6}, new_tokens=1)
FIVE = row("latency", {"e2e_s": times(1.0), "decode_s": [0.6] * 6}, new_tokens=5)
ENERGY = row(
    "energy",
    {
        "energy_j": times(50.0),
        "average_energy_j": times(40.0),
        "paper_energy_j": times(30.0),
        "net_energy_j": times(20.0),
        "e2e_s": [1.0] * 6,
    },
    {"idle_w": 30.0, "window_energy_j": 330.0, "window_s": 6.0},
    new_tokens=5,
)
BYTES = {
    "peak_bytes": 6 * GIB,
    "baseline_bytes": 4 * GIB,
    "kv_tensor_bytes": 3e9,
    "kv_card_bytes": 2e9,
    "logits_bytes": 5e8,
    "workspace_bytes": 7e8,
    "reserved_bytes": 9e9,
}
MEMORY = row("memory-paper", values=BYTES, new_tokens=5)
CARD = row("card", values={"active_params": 4e9})
TRACE = row(
    "trace",
    values={
        "active_params_realised": 3e9,
        "experts_chosen_decode": 12,
        "experts_touched_decode": 14,
    },
    batch=1,
)
BUSY = row("busy", values={"decode_busy_s": 0.15, "prefill_busy_s": 0.1, "decode_kernels": 300})
CEILINGS = row(
    "ceilings",
    values={
        "read_bytes_per_s": 3e12,
        "copy_bytes_per_s": 2e12,
        "matvec_bytes_per_s": 1e12,
        "matmul_flop_per_s": 5e14,
        "matmul_float32_flop_per_s": 4e13,
        "launch_s": 3e-6,
        "host_score_per_s": 7.0,
    },
)
ITL = row("itl", {"token_s": [[1.0, 1.1, 1.4]], "e2e_s": [1.5]}, new_tokens=3)
ROWS = [ONE, FIVE, ENERGY, MEMORY, CARD, TRACE, BUSY, CEILINGS, ITL, requests()]

BY_HAND = {
    "ttft": 250,
    "p50": 1000,
    "p95": 1100,  # the largest of six
    "output": 5 / 1.0,
    "decode": 4 / (1.0 - 0.25),
    "decode_marked": 4 / 0.6,
    "itl": 200,  # gaps of 0.1 and 0.3 s
    "tpot": 187.5,
    "paper_tpot": 3 / 1.5,
    "guidellm_tpot": 500,  # 1.5 s / 3
    "vllm_tpot": 250,  # 0.5 s / 2
    "vllm_itl": 200,
    "llama_bench_tg": 2 / 0.5,
    "call_j": 50,
    "j_per_1k": 10_000,  # 50 J for 5
    "j_per_1k_net": 4_000,
    "tok_per_j": 5 / 50,
    "j_per_1k_average": 8_000,
    "j_per_1k_paper": 6_000,
    "power": 55,  # 330 J in 6 s
    "idle": 30,
    "peak": 6.442450944,
    "peak_mib": 6 * 1024,
    "above": 2.147483648,
    "baseline": 4.294967296,
    "kv": 3,
    "kv_card": 2,
    "logits": 0.5,
    "workspace": 0.7,
    "reserved": 9,
    "active": 4,
    "active_realised": 3,
    "ape_tpot": 5 / 4,
    "ape_ttft": 4 / 4,
    "ape_energy": 0.1 / 4,
    "tok_per_s_per_gb": 5 / 6.442450944,
    "tok_per_s_per_1000_mib": 5 / 6.144,
    "chosen": 12,
    "touched": 14,
    "decode_share": 0.15 / 0.1875,
    "prefill_share": 0.1 / 0.25,
    "prefill_busy": 100,
    "decode_busy": 150,
    "decode_kernels": 300,
    "served_output": 40,
    "served_prompt": 70,
    "served_requests": 400 / 5,
    "goodput": 100 / 5,  # those that waited up to 100 ms
    "good_share": 25,
    "served_j_per_1k": 1000 / 200 * 1000,
    "served_j_per_request": 1000 / 400,
    "served_idle_share": 30,  # 60 W x 5 s of 1,000 J
    "served_power": 200,
    "served_ttft": 200.5,
    "served_ttft_p95": 1 + 0.95 * 399,
    "served_ttft_p99": 1 + 0.99 * 399,
    "served_visible": 1.5 * 200.5,
    "served_itl": 20,
    "served_tpot": 200.5 / 4,
    "served_tpot_p95": (1 + 0.95 * 399) / 4,
    "served_latency": 2 * 200.5,
    "served_latency_p95": 2 * (1 + 0.95 * 399),
    "served_delay": 20.05,
    "read_rate": 3000,
    "copy_rate": 2000,
    "matvec_rate": 1000,
    "matmul_rate": 500,
    "matmul_float32_rate": 40,
    "launch": 3,
    "host_score": 7,
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_by_hand(name):
    metric = METRICS[name]
    rows = [r for r in ROWS if r.kind in metric.kinds]
    assert metric.of(rows).value == pytest.approx(BY_HAND[name], rel=1e-12)


def test_more_is_better_of_rates_and_less_of_times_joules_and_bytes():
    better = {name for name, metric in METRICS.items() if metric.higher_is_better}
    assert better == {
        "output", "decode", "decode_marked", "paper_tpot", "llama_bench_tg", "tok_per_j",
        "ape_tpot", "ape_ttft", "ape_energy", "tok_per_s_per_gb", "tok_per_s_per_1000_mib",
        "served_output", "served_prompt", "served_requests", "goodput", "good_share",
        "read_rate", "copy_rate", "matvec_rate", "matmul_rate", "matmul_float32_rate",
        "host_score",
    }  # fmt: skip
    neither = {name for name, metric in METRICS.items() if metric.higher_is_better is None}
    assert neither == {
        "active", "active_realised", "chosen", "touched", "decode_share", "prefill_share",
    }  # fmt: skip
    assert [m.name for m in metrics.BETWEEN_MODELS] == ["output", "ttft", "j_per_1k"]
    assert [name for name, metric in METRICS.items() if metric.optional] == ["decode_marked"]


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ({}, 1),
        ({"new_tokens": 5}, 5),
        ({"batch": 3}, 3),
        ({"new_tokens": 5, "batch": 3}, 15),
    ],
)
def test_tokens_of_a_call_are_those_of_all_its_sequences(key, count):
    assert estimators.tokens(row("latency", **key)) == count
    assert estimators.per_1k(row("latency", **key)) == pytest.approx(1000 / count)


@pytest.mark.parametrize(
    ("rows", "kinds", "length"),
    [
        ([], (), 1),
        ([("latency", 1), ("latency", None)], (), 1),  # no call of several
        ([("latency", 1), ("latency", 2)], (), 2),
        ([("latency", 8), ("latency", 4)], (), 4),  # the shortest
        ([("energy", 4), ("latency", 8)], (), 8),  # of the first kind
        ([("batch", 4)], (), 1),
        ([("batch", 4)], ("batch",), 4),
    ],
)
def test_the_headline_is_the_shortest_of_several_tokens(rows, kinds, length):
    assert estimators.headline([row(kind, new_tokens=n) for kind, n in rows], kinds) == length


def test_calls_are_of_one_kind_and_length_or_those_that_failed():
    failed = row("latency", error="OOM", new_tokens=9)
    assert estimators.calls([ONE, FIVE, ENERGY], ("latency", "energy")) == [FIVE]
    assert estimators.calls([ONE, FIVE], ("latency",), 1) == [ONE]
    assert estimators.calls([ONE, ENERGY], ("batch", "energy")) == [ENERGY]
    assert estimators.calls([ONE, failed], ("latency",), 7) == [failed]
    unsaid = row("latency", {"ttft_s": [1.0]})
    assert estimators.calls([unsaid], ("latency",), 1) == [unsaid]


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("ttft", [], "not measured"),
        ("peak", [], "not measured"),
        ("peak", [row("memory", error="OOM")], "failed: OOM"),
        ("peak", [row("memory")], "not measured: no reading"),
        ("above", [row("memory", values={"peak_bytes": 1})], "not measured: no reading"),
        ("active", [row("card")], "not measured: no model card among the rows"),
        ("active_realised", [ONE], "not traced"),
        ("active_realised", [TRACE], "not traced"),
        ("decode_marked", [ONE], "not measured: only captured steps are marked on the device"),
        ("paper_tpot", [], "not measured: no time of the call"),
        ("paper_tpot", [replace(ITL, error="OOM")], "failed: OOM"),
        ("paper_tpot", [row("itl", {"token_s": [[1.0]], "e2e_s": []})],
         "not measured: no time of the call"),
        ("power", [row("energy", values={"window_energy_j": 1.0})], "not measured"),
        ("power", [row("energy", values={"window_energy_j": 1.0, "window_s": 0})], "not measured"),
        ("decode_busy", [ONE], "not measured: no profiled call"),
        ("decode_busy", [row("busy")], "not measured: no reading"),
        ("decode_busy", [row("busy", values={"decode_busy_s": 0.0})],
         "not measured: not resolved"),
        ("decode_share", [BUSY], "not measured: a slope needs 3 calls of each of two lengths"),
        ("decode_share", [ONE, FIVE], "not measured: no profiled call"),
        ("served_power", [], "not measured"),
        ("served_power", [row("serving", error="refused")], "failed: refused"),
        ("j_per_1k_net", [row("energy")], "not measured: no idle power"),
    ],
)  # fmt: skip
def test_what_is_missing_has_its_reason(name, rows, reason):
    estimate = METRICS[name].of(rows)
    assert estimate.value is None and estimate.reason == reason


def test_a_busy_time_below_one_is_a_reading():
    assert METRICS["decode_kernels"].of([row("busy", values={"decode_kernels": 0.5})]).value == 0.5


def test_of_several_rows_the_last_counts():
    """Nine seconds for two sequences, and visits of its own: none of it is told."""
    other = row("latency", {"e2e_s": times(9.0)}, visit="a", new_tokens=5, batch=2)
    early = replace(other, others=(replace(other, visit="b"),))
    output = METRICS["output"].of([early, FIVE])
    assert output.value == 5 and output.records == (record_id(FIVE),)
    assert "visit" not in output.method
    visited = in_visits("latency", "e2e_s", [1.0, 2.0], new_tokens=5)
    both = METRICS["p50"].of([other, visited])
    assert both.value == pytest.approx(1500)
    assert both.records == (record_id(visited), record_id(visited.others[0]))
    late = replace(MEMORY, values=BYTES | {"peak_bytes": 7e9})
    assert METRICS["peak"].of([MEMORY, late]).value == 7
    assert METRICS["active"].of([CARD, replace(CARD, values={"active_params": 5e9})]).value == 5
    assert METRICS["j_per_1k_net"].of(
        [ENERGY, replace(ENERGY, samples=ENERGY.samples | {"net_energy_j": times(10.0)})]
    ).value == pytest.approx(2000)
    assert (
        METRICS["power"]
        .of([ENERGY, replace(ENERGY, values={"window_energy_j": 6.0, "window_s": 2.0})])
        .value
        == 3
    )


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"energy_j": "no counter"}, "no counter"),  # what it is measured with
        ({"energy_j": "no counter", "idle_w": "the board was busy"}, "the board was busy"),
        ({"idle_w": "the board was busy"}, "the board was busy"),
        ({}, "no reading"),
    ],
)
def test_a_reading_without_a_reason_has_that_of_what_it_is_like(missing, reason):
    bare = replace(row("energy"), missing=missing)
    assert METRICS["idle"].of([bare]).reason == f"not measured: {reason}"


def test_each_repetition_is_in_the_unit_of_the_metric():
    two = replace(FIVE, samples={"e2e_s": [0.5, None, 2.0]})
    assert METRICS["p50"].of.raw(two) == [0.5, 2.0]
    assert METRICS["p50"].of.each(two) == [500, 2000]
    assert METRICS["output"].of.each(two) == [10, 2.5]  # five tokens
    assert METRICS["itl"].of.raw(
        replace(ITL, samples={"token_s": [[1, 2, 4, 6], [1, 2], [1]]})
    ) == [
        2,
        1,
    ]


def test_power_counts_the_calls_of_its_window():
    assert METRICS["power"].of([ENERGY]).n == 6
    bare = row("energy", values={"window_energy_j": 330.0, "window_s": 6.0})
    assert (METRICS["power"].of([bare]).value, METRICS["power"].of([bare]).n) == (55, 1)


@pytest.mark.parametrize(
    ("changes", "billions"),
    [
        ({}, 3),
        ({"model": "other"}, None),
        ({"dtype": "float32"}, None),
        ({"batch": 2}, None),
        ({"context": 99}, 3),  # at another context it serves as well
        ({"experts": "loop"}, None),
    ],
)
def test_a_trace_serves_the_arm_that_it_explains(changes, billions):
    trace = replace(TRACE, key=TRACE.key | changes)
    assert METRICS["active_realised"].of([ONE, trace]).value == billions


def test_a_trace_is_of_the_experts_that_decode():
    arm = replace(ONE, values={"decode_experts": "loop"}, key=ONE.key | {"experts": "grouped_mm"})
    same = replace(TRACE, values=TRACE.values | {"decode_experts": "loop"})
    other = replace(TRACE, values=TRACE.values | {"decode_experts": "batched_mm"})
    assert METRICS["active_realised"].of([arm, same]).value == 3
    assert METRICS["active_realised"].of([arm, other]).value is None


def test_what_contradicts_is_the_reason():
    """Ten tokens in 2 s and twenty in 7 s: 2 tok/s of decode, of whole calls 5."""
    ten, twenty = (
        row("latency", {"e2e_s": [s] * 6}, new_tokens=n) for n, s in ((10, 2.0), (20, 7.0))
    )
    reason = METRICS["decode"].of([ten, twenty]).reason
    assert reason.startswith("contradiction: decode throughput 2.000 tok/s [2.000, 2.000] lies")
    warned = replace(FIVE, warnings=(warning("contradiction", "decode throughput: planted"),))
    assert METRICS["decode"].of([ONE, warned]).reason == "contradiction: planted"
    idle = replace(ENERGY, values={"idle_w": 100.0})  # 100 J in its time, and it uses 50
    assert METRICS["j_per_1k_net"].of([idle]).reason.startswith("contradiction: a call uses")


def test_a_note_is_a_reason_only_where_it_is_meant_as_one():
    noted = row("memory", values={"note": "it lies"})
    for note, reason in ((True, "it lies"), (False, "not measured: no reading")):
        assert estimators.Reading("peak_bytes", ("memory",), note=note)([noted]).reason == reason
    plain = estimators.Reading("peak_bytes", ("memory",), note=True)([row("memory")])
    assert plain.reason == "not measured: no reading"


def test_p95_of_a_hundred_calls():
    hundred = replace(FIVE, samples={"e2e_s": [n / 1000 for n in range(1, 101)]})
    assert METRICS["p95"].of([hundred]).value == pytest.approx(1 + 0.95 * 99)


# --- visits


def in_visits(kind, name, medians, **key):
    """One arm that was measured in several visits."""
    first, *others = (
        row(kind, {name: times(m)}, visit=f"day {n}", **key) for n, m in enumerate(medians)
    )
    return replace(first, others=tuple(others))


def test_over_visits_the_median_of_their_medians_with_their_range():
    arm = in_visits("latency", "ttft_s", [0.2, 0.3, 0.7], new_tokens=1)
    ttft = METRICS["ttft"].of([arm])
    assert (ttft.value, ttft.low, ttft.high) == pytest.approx((300, 200, 700))
    assert ttft.n == 3 and len(ttft.records) == 3
    two = METRICS["ttft"].of([in_visits("latency", "ttft_s", [0.2, 0.4], new_tokens=1)])
    assert (two.value, two.n) == (pytest.approx(300), 2)
    one = METRICS["ttft"].of([in_visits("latency", "ttft_s", [0.2], new_tokens=1)])
    assert one.n == 6 and one.method.endswith("within one visit")


def test_a_high_percentile_is_of_the_visits_that_the_median_is_of():
    """That of the last visit alone, 1.1 s, would lie below the median of visits, 1.5 s."""
    arm = in_visits("latency", "e2e_s", [1.0, 2.0], new_tokens=5)
    for one in (arm, replace(arm.others[0], others=(replace(arm, others=()),))):
        p95, p50 = (METRICS[name].of([one]) for name in ("p95", "p50"))
        assert p50.value == pytest.approx(1500) and len(p95.records) == 2
        assert p95.value == pytest.approx((1100 + 2200) / 2)
        assert p95.method == "max of 6, over 2 visits" and p95.low is None
    many = [replace(one, samples={"e2e_s": times(one.samples["e2e_s"][0]) * 10})
            for one in (arm, *arm.others)]  # fmt: skip
    p95 = METRICS["p95"].of([replace(many[0], others=tuple(many[1:]))])
    assert (p95.visits, p95.level) == (2, None) and p95.low < p95.value < p95.high


def test_shares_and_times_of_an_arm_are_of_the_same_visits():
    """TTFT of 0.2 and 0.4 s is 0.3 s; the device works 0.15 s of it, half."""
    first = in_visits("latency", "ttft_s", [0.4, 0.2], new_tokens=1)
    busy = row("busy", values={"prefill_busy_s": 0.15})
    assert METRICS["ttft"].of([first]).value == pytest.approx(300)
    assert METRICS["prefill_share"].of([first, busy]).value == pytest.approx(0.5)


def test_gaps_device_clock_and_net_energy_are_of_the_visits_too():
    """Two visits each: gaps of 0.1 and of 0.3 s, however many calls; steps of 0.15 and 0.45 s; 20
    and 30 J more than the idle board."""

    def visited(first, second):
        return replace(first, visit="2", others=(replace(second, visit="1"),))

    calls = [row("itl", {"token_s": [[0.0, gap, 2 * gap]] * n}, new_tokens=3)
             for gap, n in ((0.1, 5), (0.3, 1))]  # fmt: skip
    itl = METRICS["itl"].of([visited(*calls)])
    assert (itl.value, itl.low, itl.high) == tuple(map(pytest.approx, (200, 100, 300)))
    assert (itl.n, itl.visits, itl.level) == (2, 2, None)
    fives = [replace(FIVE, samples={"decode_s": [t] * 6}) for t in (0.6, 1.8)]
    marked = METRICS["decode_marked"].of([visited(*fives)])
    assert marked.value == pytest.approx(1 / 0.3) and marked.visits == 2
    joules = [replace(ENERGY, samples=ENERGY.samples | {"net_energy_j": [x] * 6})
              for x in (20.0, 30.0)]  # fmt: skip
    net = METRICS["j_per_1k_net"].of([visited(*joules)])
    assert net.value == pytest.approx(25e3 / 5) and net.visits == 2


def test_decode_throughput_is_the_median_of_the_slopes_of_visits():
    """Steps of 0.1, 0.2 and 0.5 s: 10, 5 and 2 tok/s."""
    ones = in_visits("latency", "ttft_s", [1.0, 1.0, 1.0], new_tokens=1)
    fives = in_visits("latency", "e2e_s", [1.4, 1.8, 3.0], new_tokens=5)
    decode = METRICS["decode"].of([ones, fives])
    assert (decode.value, decode.n) == (pytest.approx(5), 3)
    assert (decode.low, decode.high) == (pytest.approx(2), pytest.approx(10))
    ones = in_visits("latency", "ttft_s", [1.0, 1.0], new_tokens=1)
    two = METRICS["decode"].of([ones, in_visits("latency", "e2e_s", [1.4, 1.8], new_tokens=5)])
    assert (two.value, two.n, two.level) == (pytest.approx(7.5), 2, None)
    # Where only one of two visits has a slope, the line is of all calls.
    lone = METRICS["decode"].of([ones, in_visits("latency", "e2e_s", [1.4], new_tokens=5)])
    assert (lone.value, lone.n) == (pytest.approx(10), 12)


# --- ratios and series


def test_a_ratio_is_by_samples_where_there_are_any_and_turned_where_less_is_more():
    slow = replace(FIVE, samples={"e2e_s": times(2.0)})
    assert METRICS["p50"].ratio([slow], [FIVE]).value == pytest.approx(2)
    assert METRICS["output"].ratio([slow], [FIVE]).value == pytest.approx(0.5)
    more = replace(MEMORY, values=BYTES | {"peak_bytes": 9 * GIB})
    assert METRICS["peak"].ratio([more], [MEMORY]).value == pytest.approx(1.5)
    assert METRICS["p50"].ratio([], [FIVE]).value is None
    assert METRICS["p50"].ratio([FIVE, slow], [slow, FIVE]).value == pytest.approx(2)  # the last


@pytest.mark.parametrize(
    ("name", "context", "new_tokens", "kind", "value"),
    [
        ("ttft", 8, 5, "", 250),
        ("p50", 8, 5, "", 1000),
        ("p50", 8, 5, "energy", 1000),
        ("p50", 8, None, "", 1000),
        ("p50", 8, 4, "", None),
        ("p50", 9, 5, "", None),
        ("decode", 8, 5, "", 4 / 0.75),  # the call of one token is a point of the line too
        ("decode", 8, None, "", 4 / 0.75),
        ("decode", 8, 3, "", None),
        ("peak", 8, 5, "", 6.442450944),
        ("active", 99, None, "", 4),  # a card is of no context
        ("ape_tpot", 8, 5, "", 1.25),
    ],
)
def test_a_metric_of_a_series_at_a_context_and_length(name, context, new_tokens, kind, value):
    series = Series(tuple(ROWS[:5]))
    estimate = metrics.at(name, series, context, new_tokens, kind)
    assert estimate.value == (None if value is None else pytest.approx(value))


def test_what_a_series_lacks_is_named():
    reason = metrics.at("p50", Series(()), 9, 5).reason
    assert reason == "not measured: no latency row at 9 context and 5 new tokens"
    assert metrics.at("p50", Series(()), 9).reason == "not measured: no latency row at 9 context"
    assert metrics.at("p50", Series((), "refused"), 9).reason == "refused"


def test_the_longest_shape_has_the_most_context_and_there_the_fewest_tokens():
    assert metrics.longest({(8, 1), (64, 5), (64, 3)}) == (64, 3)


def test_groups_shapes_and_arms_of_a_metric():
    rows = [ONE, FIVE, row("latency", context=8, new_tokens=7), replace(FIVE, kind="energy")]
    (group,) = METRICS["p50"].groups(rows)
    assert group.rows == (FIVE,) and METRICS["p50"].shapes(group) == {(8, 5)}
    (group,) = METRICS["decode"].groups(rows)
    assert METRICS["decode"].shapes(group) == {(8, 0)}
    assert METRICS["decode"].arm(group, (8, 0)) == [ONE, FIVE]
    assert METRICS["decode"].arm(group, (8, 5)) == [FIVE]
    assert METRICS["decode"].arm(group, (9, 0)) == []


def test_a_title_carries_its_unit_and_begins_a_sentence():
    assert METRICS["p50"].header == "p50 (ms)" and METRICS["chosen"].header == (
        "experts chosen in a step"
    )
    assert METRICS["output"].lead == "Output throughput" and METRICS["ttft"].lead == "TTFT"


def test_a_ratio_as_a_change_in_percent():
    change = metrics.percent_change(stats.Estimate(1.25, 0.9, 1.5, 7))
    assert (change.value, change.low, change.high) == pytest.approx((25, -10, 50))
    assert metrics.percent_change(stats.Estimate(0.75)).low is None


def test_a_card_and_a_reading_name_their_rows():
    assert METRICS["active"].of([CARD]).records == (record_id(CARD),)
    assert METRICS["peak"].of([MEMORY]).n == METRICS["active"].of([CARD]).n == 1
    assert METRICS["active_realised"].of([ONE, TRACE]).n == 1


def test_a_unit_of_zero_is_no_divisor():
    per = estimators.Per(lambda rows: stats.exact(6.0), lambda rows: stats.exact(float(rows)))
    assert (per(2).value, per(0).value) == (3.0, None)
    assert per(0).reason
