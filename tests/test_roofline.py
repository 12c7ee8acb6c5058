"""The bound of a decode step, by numbers that a reader can check."""

from types import SimpleNamespace

import pytest
from sample_records import key

from lib import roofline
from lib.records import Record, environment_record

ENV = environment_record({"gpu": "G", "copy_bytes_per_s": 1e11})
GB = 10**9  # a step of one GB at 100 GB/s takes 10 ms: at most 100 tok/s


def rows(step_s, decode_bytes=GB, model="m", context=128, env=ENV, **changes):
    """Calls of 10 and 20 tokens that take one second and `step_s` for each token."""
    return [
        Record("latency", key(model, context=context, new_tokens=g, **changes),
               {"e2e_s": [1 + g * step_s] * 3}, {"decode_bytes": decode_bytes}, env_id=env.env_id)
        for g in (10, 20)
    ]  # fmt: skip


def test_the_bound_is_bandwidth_over_bytes():
    assert roofline.bound_tok_per_s(2 * GB, 1e11) == 50


def test_what_is_expected_before_measuring():
    card = SimpleNamespace(decode_bytes=lambda context: GB + context * 10**6)
    table = roofline.expected(card, [0, 1000], 1e11)
    assert list(table.index) == [0, 1000]
    assert list(table["a step reads (GB)"]) == [1, 2]
    assert list(table["decode bound (tok/s)"]) == [100, 50]


def test_utilisation_is_the_measured_share_of_the_bound():
    (line,) = roofline.utilisation([ENV, *rows(0.02)]).to_dict("records")
    assert line["decode throughput (tok/s)"] == pytest.approx(50)  # prefill is not in the slope
    assert line["bound (tok/s)"] == 100
    assert line["share of the bound"] == pytest.approx(0.5)


def test_an_arm_that_beats_its_bound_is_named():
    found = roofline.violations([ENV, *rows(0.02), *rows(0.005, context=512)])
    assert found == ["m at 512: 200.0 tok/s beats the bound 100.0 tok/s"]


@pytest.mark.parametrize("step_s, violated", [(0.0100, 0), (0.0095, 0), (0.0089, 1)])
def test_a_copy_is_not_the_best_stream_so_ten_percent_are_allowed(step_s, violated):
    assert len(roofline.violations([ENV, *rows(step_s)])) == violated


@pytest.mark.parametrize("size, violated", [(2**28 - 1, 0), (2**28, 1)])
def test_a_step_that_fits_a_cache_may_be_faster_than_memory(size, violated):
    fast = [ENV, *rows(1e-5, decode_bytes=size)]
    assert len(roofline.violations(fast)) == violated
    assert len(roofline.utilisation(fast)) == 1  # shown all the same


def test_without_a_bandwidth_a_size_or_a_slope_there_is_no_bound():
    bare = environment_record({"gpu": "G"})
    assert roofline.violations([bare, *rows(1e-5, env=bare)]) == []
    assert roofline.violations([ENV, *rows(1e-5, decode_bytes=None)]) == []
    assert roofline.violations([ENV, *rows(1e-5)[:1]]) == []  # one length gives no slope
    failed = [Record("latency", key("m"), error="OutOfMemoryError: x", env_id=ENV.env_id)]
    assert roofline.violations([ENV, *failed]) == []
    assert roofline.utilisation([]).empty


def test_models_and_contexts_are_kept_apart():
    """Pooled, the two models would give a slope that neither has."""
    long = rows(0.05, model="b", context=512)
    table = roofline.utilisation([ENV, *rows(0.02, model="a"), *rows(0.04, model="b"), *long])
    assert list(table["model"]) == ["a", "b", "b"]
    assert list(table["decode throughput (tok/s)"]) == pytest.approx([50, 25, 20])
