"""What a load says, on facts typed by hand: goodput, percentiles, throughput, joules."""

from __future__ import annotations

import pytest

from lib.analysis.serving import reading
from lib.analysis.serving.reading import Limits
from lib.measure.serving.arrivals import Load
from lib.records.record import Record
from tests.samples.serving import fact, row, users


def test_goodput_counts_failures_as_misses_and_leaves_out_what_the_client_cancelled():
    mine = row(
        [
            fact(11.0, 12.0),
            fact(12.0, 13.0, first_s=12.9),  # late first token
            fact(13.0, 18.0),  # slow tokens: 4.9 s for four
            fact(14.0, 15.0, failure="closed"),
            fact(15.0, 16.0, failure="cancelled"),
            fact(25.0, 26.0),  # another window
        ],
        limit_ttft_s=0.5,
        limit_tpot_s=0.5,
    )
    result = reading.goodput(mine)
    assert (result.good, result.of, result.failed) == (1, 4, 1)
    assert result.share == 0.25 and result.per_s == 0.1
    assert reading.goodput(mine, Limits()).good == 3
    assert reading.goodput(mine, Limits(latency_s=2.0)).good == 2


def test_gaps_that_nobody_can_tell_keep_no_limit():
    unknown = row([fact(11.0, 12.0, first_tokens=None)])
    assert reading.goodput(unknown, Limits(tpot_s=9.0)).good == 0
    one_token = row([fact(11.0, 12.0, output_tokens=1)])
    assert reading.goodput(one_token, Limits(tpot_s=1e-9)).good == 1
    nothing = row([], window=(10.0, 10.0))
    assert reading.goodput(nothing).share is None and reading.goodput(nothing).per_s is None


def test_a_percentile_keeps_the_sample_rule_and_has_no_failure_in_it():
    many = [fact(10.0 + n / 100, 19.0 + n / 1000) for n in range(59)]
    result = reading.percentile(row(many), "ttft_s", 95)
    assert result.method.startswith("p95") and result.value == pytest.approx(0.1)
    one_failed = row([*many[:58], fact(11.0, 12.0, first_s=11.9, failure="timeout")])
    result = reading.percentile(one_failed, "ttft_s", 95)
    assert result.method == "max of 58" and result.reason == "p95 needs n >= 59"
    assert result.value == pytest.approx(0.1) and reading.failed(one_failed) == 1
    assert reading.percentile(row(many), "ttft_s", 99).method == "max of 59"
    result = reading.percentile(row([fact(11.0, 12.0, failure="timeout")]), "ttft_s", 50)
    assert result.value is None and "none of 1 requests" in result.reason


def test_only_a_single_users_requests_are_repetitions():
    """Eight users wait together: 80 requests are ten waves, too few for so narrow an interval."""
    facts = [fact(10.0 + wave, 19.0 + wave / 10) for wave in range(10) for _ in range(8)]
    for load, has_one in ((Load("closed", 1), True), (Load("closed", 8), False),
                          (Load("poisson", 3.0), False)):  # fmt: skip
        for q in (50, 95):
            tail = reading.percentile(row(facts, load), "latency_s", q)
            assert tail.n == 80 and (tail.low is not None) is has_one
            assert ("correlated" in tail.reason) is not has_one


def test_figures_count_from_the_schedule_and_have_one_name_each():
    late = row([fact(11.0, 13.0, sent_s=11.5, visible_s=12.0)])
    seconds = {name: reading.percentile(late, name, 50).value for name in reading.FIGURES}
    assert seconds == {
        "ttft_s": pytest.approx(0.1),
        "visible_s": 1.0,
        "tpot_s": pytest.approx(1.9 / 4),
        "latency_s": 2.0,
        "delay_s": 0.5,
    }


def row_of(tokens: list[float]) -> Record:
    return Record("serving", samples={"output_tokens_by_s": tokens})


def test_throughput_has_an_interval_over_blocks_of_five_seconds():
    result = reading.tokens_per_s(row_of([100.0] * 5 + [110.0] * 5))
    assert (result.value, result.n) == (105.0, 2) and result.low < 105 < result.high
    assert reading.tokens_per_s(row_of([100.0, 50.0])).value == 75.0
    assert reading.tokens_per_s(row_of([])).reason == "the window has no whole second"


def test_joules_are_of_the_window_and_the_idle_share_stands_apart():
    """Two users at 0.26 s a request of five tokens: 38.5 tokens a second for 200 W."""
    mine = users(2)
    assert reading.joules_per_1k(mine).value == pytest.approx(200 / (10 / 0.26) * 1000)
    finished = reading.requests_finished(mine)
    assert finished == pytest.approx(20 * 2 / 0.26, abs=2)
    assert reading.joules_per_request(mine).value == pytest.approx(4000 / finished)
    assert reading.idle_share(mine).value == 0.5 and reading.mean_w(mine).value == 200
    mix = reading.mix(mine)
    assert (mix["energy_j"], mix["seconds"]) == (4000, 20)
    assert mix["prompt_tokens"] == pytest.approx(2 * mix["output_tokens"])


def test_without_a_counter_joules_have_its_reason():
    mine = row([fact(11.0, 12.0)])
    mine.missing.update(energy_j="the device is a CPU", idle_w="no board")
    for figure in (reading.joules_per_1k, reading.joules_per_request, reading.idle_share):
        assert figure(mine).reason == "the device is a CPU"
    assert reading.load(mine) == Load("closed", 1)


def test_gaps_have_no_interval_and_say_how_many_were_seen():
    result = reading.gaps(users(2))
    assert (result.value, result.n, result.low) == (0.04, 8, None)
    assert "each chunk carried several" in reading.gaps(row([fact(11.0, 12.0)])).reason
