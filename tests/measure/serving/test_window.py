"""The steady window, tokens at their own time, goodput and percentiles, on facts typed by hand."""

from __future__ import annotations

import pytest

from lib.measure.serving import metrics
from lib.measure.serving.arrivals import Load
from lib.measure.serving.timing import tokens_by_second
from lib.measure.serving.window import (
    Window,
    busy_s,
    cut_to_seconds,
    in_flight,
    mean_in_flight,
    scheduled_in,
    steady,
    tpot_s,
)

USERS, RATE = Load("closed", 2), Load("poisson", 1)
WINDOW = Window(10.0, 20.0, "typed")


def fact(start: float, end: float, first: float | None = None, **changes) -> dict:
    """A request of five tokens, the first alone, the last when it ends."""
    result = {
        "scheduled_s": start,
        "sent_s": start,
        "first_s": start + 0.1 if first is None else first,
        "visible_s": None,
        "last_s": end,
        "end_s": end,
        "first_tokens": 1,
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "output_tokens": 5,
        "asked_tokens": 5,
        "chunks": 5,
        "failure": "",
    }
    return {**result, **changes}


def user(*ends: float) -> list[dict]:
    """One user of a closed loop: each request starts where the one before ended, the first at 0."""
    return [fact(a, b) for a, b in zip((0.0, *ends), ends, strict=False)]


def test_requests_in_flight_are_counted_from_the_scheduled_instant():
    steps = in_flight([fact(0.0, 2.0), fact(1.0, 3.0)])
    assert steps == [(0.0, 1), (1.0, 2), (2.0, 1), (3.0, 0)]
    assert mean_in_flight(steps, 0.0, 4.0) == (1 + 2 + 1 + 0) / 4
    assert busy_s(steps, 0.5, 4.0) == 2.5  # until the last one ended at 3


def test_a_closed_loop_has_its_window_where_all_users_are_busy():
    facts = user(4.0, 8.0, 12.0) + user(3.0, 6.0, 9.0, 13.0)
    result = steady(facts, USERS, warmup_s=2.0, stop_s=11.0)
    assert (result.start_s, result.stop_s, result.reason) == (2.0, 11.0, "")
    assert "90%" in result.rule


def test_the_warm_up_is_not_drained():
    """A request of the warm-up is still answered in the window: its tokens count there, its
    latency does not."""
    facts = user(4.0, 8.0, 12.0)
    result = steady(facts, Load("closed", 1), warmup_s=2.0, stop_s=11.0)
    assert result.start_s == 2.0 and in_flight(facts)[0] == (0.0, 1)
    assert [f["scheduled_s"] for f in scheduled_in(facts, result)] == [4.0, 8.0]


def test_the_longest_stretch_is_taken_and_a_load_that_did_not_hold_is_told():
    facts = user(6.0, 12.0) + [fact(0.0, 4.0), fact(5.0, 12.0)]
    result = steady(facts, USERS, warmup_s=0.0, stop_s=10.0)
    assert (result.start_s, result.stop_s) == (5.0, 10.0)
    assert "held for 50% of the time only" in result.reason
    many = steady(facts, Load("closed", 8), warmup_s=0.0, stop_s=10.0)
    assert many.seconds == 0 and "never in flight" in many.reason


def test_an_open_loop_is_steady_unless_its_queue_grows():
    keeps_up = [fact(t, t + 2.0) for t in range(40)]
    assert steady(keeps_up, RATE, 5.0, 35.0).reason == ""
    late = [fact(t, 3.0 * t + 3.0) for t in range(40)]  # three seconds each, one a second comes
    assert "the queue grows" in steady(late, RATE, 5.0, 35.0).reason
    assert "no request" in steady([fact(0.0, 1.0)], RATE, 5.0, 35.0).reason


def test_a_window_is_cut_to_whole_seconds():
    result = cut_to_seconds(Window(0.3, 4.1, "typed"))
    assert (result.start_s, result.stop_s) == (0.3, 3.3)
    assert Window(0.1, 20.1 - 1e-12, "typed").whole_seconds == 20


def client_row(*events: tuple[float, int], prompt: int = 100, cached: int = 40) -> dict:
    return {
        "event_s": [t for t, _ in events],
        "event_tokens": [n for _, n in events],
        "usage": {
            "output_tokens": sum(n for _, n in events),
            "prompt_tokens": prompt,
            "cached_tokens": cached,
        },
    }


def test_tokens_are_credited_by_their_own_time():
    """A request that starts before the window and ends after it leaves there what came there."""
    row = client_row((9.5, 3), (10.2, 1), (11.9, 4), (12.1, 2))
    result = tokens_by_second([row], Window(10.0, 12.0, "typed"))
    assert result["output_tokens_by_s"] == [1.0, 4.0]
    assert result["prompt_tokens_by_s"] == [0.0, 0.0]  # its prompt was read before
    later = client_row((11.5, 1))
    assert tokens_by_second([later], Window(10.0, 12.0, "t"))["prompt_tokens_by_s"] == [0.0, 60.0]


def test_tpot_leaves_out_the_tokens_that_came_first():
    assert tpot_s(fact(10.0, 11.0, first=10.2)) == pytest.approx(0.8 / 4)
    assert tpot_s(fact(10.0, 11.0, first=10.2, first_tokens=3)) == pytest.approx(0.8 / 2)


PAGE = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 7
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="0.3",model_name="a,b"} 1.0
vllm:e2e_request_latency_seconds_count{model_name="a,b"} 2.0
vllm:e2e_request_latency_seconds_sum{model_name="a,b"} 0.5
"""


def test_counters_are_read_and_gauges_and_buckets_are_not():
    result = metrics.parse(PAGE)
    assert result == {
        "vllm:prompt_tokens_total{engine=0,model_name=m}": 100.0,
        "vllm:generation_tokens_total{engine=0,model_name=m}": 7.0,
        "vllm:e2e_request_latency_seconds_count{model_name=a,b}": 2.0,
        "vllm:e2e_request_latency_seconds_sum{model_name=a,b}": 0.5,
    }
    assert metrics.totals(result) == {"prompt_tokens": 100.0, "output_tokens": 7.0}


def test_counters_are_differences_and_a_restart_is_told():
    before, after = {"a_total": 5.0, "b_total": 1.0}, {"a_total": 9.0, "b_total": 1.0, "c_total": 2}
    assert metrics.difference(before, after) == ({"a_total": 4.0, "c_total": 2.0}, "")
    assert metrics.difference(after, {"a_total": 1.0})[1].startswith("counter_reset: a_total fell")


def test_the_servers_counters_are_held_against_the_usage():
    rows = [{"failure": None, "usage": {"prompt_tokens": 60, "output_tokens": 7}}]
    counted = metrics.parse(PAGE)
    assert metrics.compare(counted, rows) == [
        "the server counted 100 prompt_tokens, the answers' usage says 60; look for another client"
    ]
    assert metrics.compare(counted, [*rows, {"failure": {"class": "closed"}}]) == []


def test_a_server_without_counters_gives_a_reason():
    assert metrics.read("http://127.0.0.1:1", None) == (
        None,
        "this kind of server has no page of counters",
    )
    result, reason = metrics.read("http://127.0.0.1:1", "/metrics", 1.0)
    assert result is None and "could not be read" in reason
