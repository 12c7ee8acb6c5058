"""What verdicts rest on, by hand: two models of a made-up study on an H100 and on another card.

Ours takes 0.25 s for one token and 1.25 s for five, so 0.25 s a step; Wide takes twice as long. A
step of Ours reads 1 GB, which the H100 (3,350 GB/s) could do 3,350 times a second.
"""

from dataclasses import replace

import pytest

from lib import stats
from lib.analysis.series import Series
from lib.records.record import Record, environment_record
from lib.stacks.registry import STACKS
from lib.stats import Estimate
from lib.studies import evidence, verdict
from lib.studies.study import Published
from tests.samples.records import key

GB = 10**9
H100 = environment_record(
    {
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpu_uuid": "one",
        "date": "2026-01-01",
        "copy_bytes_per_s": 4e9,
        "host_score_per_s": 7.25,
    }
)
AGAIN = environment_record({**H100.values, "date": "2026-01-02", "gpu_uuid": "two"})
OTHER = environment_record({"gpu": "G"})
SIX = (0.98, 0.99, 1.0, 1.0, 1.01, 1.02)
CAPTURED = [name for name, stack in STACKS.items() if stack.captured]
STUDY = {
    "models": {"Ours": ["ours"], "Wide": ["wide"]},
    "ablation_model": "Ours",
    "stack": "hf-eager",
    "dtype": "bfloat16",
    "context": 8,
    "new_tokens": 5,
}


def calls(model, seconds, tokens, env=H100, kind="latency", size=GB, **changes):
    name = "ttft_s" if tokens == 1 else "e2e_s"
    changes = {"context": 8, "experts": "none"} | changes
    samples = {name: [seconds * f for f in SIX]}
    where = key(model, new_tokens=tokens, **changes)
    return Record(kind, where, samples, {"decode_bytes": size}, env_id=env.env_id)


def both(model, factor=1.0, **changes):
    return [calls(model, 0.25 * factor, 1, **changes), calls(model, 1.25 * factor, 5, **changes)]


def card(model="ours", **values):
    counts = {"total_params": 20 * GB, "active_params": 4 * GB, "experts": 8}
    counts |= {"weight_bytes": 40 * GB, "kv_bytes_per_token": 1000}
    return Record("card", {"model": model}, values=counts | values)


def trace(context=8, env=H100, **changes):
    changes = {"experts": "none", "batch": 1} | changes
    where = key("ours", context=context, new_tokens=None, **changes)
    return Record("trace", where, values={"active_params_realised": 3 * GB}, env_id=env.env_id)


def gathered(*rows, sources=None, envs=(H100, AGAIN, OTHER)):
    study = STUDY | ({"sources": sources} if sources else {})
    return evidence.gather([*envs, *rows], Published(study))


def of(*rows, envs=(H100, AGAIN, OTHER), **others):
    """Evidence of series that are given, without their sorting."""
    found = gathered(envs=envs)
    base = {"Ours": Series(tuple(rows)), "Wide": Series(tuple(others.get("wide", ())))}
    return replace(found, base=base, stacks={})


# --- sorting


def test_rows_go_to_the_stack_they_were_measured_on():
    ours, fast = both("ours"), both("ours", 0.5, stack=CAPTURED[0])
    wide = both("wide", 2.0)
    e = gathered(card(), *ours, *fast, *wide)
    assert e.base["Ours"].rows == (card(), *ours) and e.base["Wide"].rows == tuple(wide)
    assert e.like_paper is e.base and e.ablation_like_paper is e.ablation
    assert e.bound_stack == CAPTURED[0] and e.bound["Ours"].rows == (card(), *fast)
    assert e.bound["Wide"].reason == f"not measured: no row on stack {CAPTURED[0]}"
    assert (e.arm, e.reference, e.others, e.doubts) == ((8, 5), "Ours", ["Wide"], {})


def test_a_card_of_another_number_format_is_of_no_series():
    less = card(weight_bytes=10 * GB)
    late = replace(less, key=less.key | {"dtype": "mxfp4"})
    e = gathered(card(), late, *both("ours"), *both("ours", 0.5, stack=CAPTURED[0]))
    assert e.base["Ours"].one("card") == card() == e.bound["Ours"].one("card")


def test_the_bound_is_the_stack_with_the_most_models_that_ran():
    one, two = CAPTURED[0], CAPTURED[-1]
    fast = [*both("ours", stack=one), *both("ours", stack=two), *both("wide", stack=two)]
    assert gathered(*fast).bound_stack == two
    failed = [replace(row, error="OOM") for row in both("wide", stack=one)]
    assert (
        gathered(*fast[:2], *both("wide", stack=one), *both("ours", stack=two)).bound_stack == one
    )
    some = gathered(*both("ours", stack=one), *failed, *both("ours", stack=two))
    assert some.bound_stack == evidence.DEVICE_BOUND[0]  # one each: the fastest
    none = gathered(*both("ours"))
    assert none.bound_stack == "" and "no row on a stack that the device bounds" in (
        none.bound["Ours"].reason
    )


@pytest.mark.parametrize(
    ("row", "belongs"),
    [
        (trace(), True),
        (trace(context=99), True),
        (trace(batch=None), True),
        (trace(batch=2), False),
        (trace(env=OTHER), False),  # another card
        (trace(env=AGAIN), True),  # the same card on another day
        (trace(experts="loop"), False),
        (trace(stack="graph"), False),
        (calls("ours", 1.0, 7, kind="batch"), False),
    ],
)
def test_more_rows_share_the_card_and_the_setup(row, belongs):
    e = gathered(*both("ours"), row)
    assert (row in e.base["Ours"].rows) is belongs


def test_every_expert_computed_is_like_the_paper_and_the_card_comes_last():
    today, all_of_them = both("ours", experts="loop"), both("ours", 2.0, experts="all_experts")
    e = gathered(card(), *today, *all_of_them, sources={"all-experts": {}})
    assert e.base["Ours"].rows == (card(), *today)
    assert e.like_paper["Ours"].rows == (*all_of_them, card())
    assert e.like_paper["Wide"] == e.base["Wide"]
    for rows, sources in (([*today], {}), (both("ours"), {"all-experts": {}})):
        same = gathered(card(), *rows, sources=sources)
        assert same.like_paper is same.base


def test_an_ablation_may_stand_in_for_the_calls_of_its_experts():
    arm = calls("ours", 2.5, 5, kind="ablation-experts", experts="all_experts")
    e = gathered(*both("ours", experts="loop"), arm, sources={"all-experts": {}})
    assert [r.kind for r in e.like_paper["Ours"].rows] == ["latency"]


@pytest.mark.parametrize(
    ("changes", "stands"),
    [
        ({}, True),
        ({"engine": None}, False),
        ({"new_tokens": 6}, False),
        ({"context": 9}, False),
        ({"batch": 2}, False),
        ({"kind": "batch"}, False),
    ],
)
def test_an_engine_stands_among_the_stacks_at_their_arm(changes, stands):
    arm = calls("ours", 1.25, 5, kind="ablation-stack")
    fields = {"tokens": changes.pop("new_tokens", 5), "stack": "vllm", "engine": "0123456789"}
    told = calls("ours", 0.5, **{**fields, **changes})
    e = gathered(arm, told)
    assert (told in e.ablation["stack"].rows) is stands
    assert e.ablation["stack"].rows.count(told) == stands
    assert told not in gathered(told).ablation["stack"].rows  # without an arm there is none


# --- one model


def test_the_floor_is_weights_and_cache_over_the_bandwidth_a_step_at_a_time():
    """(40 GB + 8 x 1,000 bytes) x 4 steps a second of 3,350 GB/s."""
    e = of(card(), *both("ours"))
    share = evidence.memory_floor_share(e, e.base, "Ours", 8)
    assert share.value == pytest.approx((40 * GB + 8000) * 4 / 3.35e12, rel=1e-9)
    long = of(card(kv_bytes_per_token=5 * GB), *both("ours"))
    assert evidence.memory_floor_share(long, long.base, "Ours", 8).value == pytest.approx(
        80 * GB * 4 / 3.35e12
    )
    for bare in (of(*both("ours")), of(card(kv_bytes_per_token=None), *both("ours"))):
        why = evidence.memory_floor_share(bare, bare.base, "Ours", 8).reason
        assert why == "not measured: no model card among the rows"


def test_useful_bytes_are_those_of_a_step():
    e = of(card(), *both("ours"))
    assert evidence.useful_mbu(e, e.base, "Ours", 8).value == pytest.approx(4 * GB / 3.35e12)
    why = "not measured: no latency row at 9 tokens"
    assert evidence.useful_mbu(e, e.base, "Ours", 9).reason == why
    bare = of(*both("ours", size=None))
    assert "no latency row at 8 tokens" in evidence.useful_mbu(bare, bare.base, "Ours", 8).reason
    unknown = of(card(), *both("ours", env=OTHER))
    assert "'G' is not in params/gpus.yaml" in (
        evidence.useful_mbu(unknown, unknown.base, "Ours", 8).reason
    )


def test_sessions_are_days_of_a_device():
    e = of(*both("ours"), *both("ours", env=AGAIN), wide=both("wide"))
    assert [
        evidence.sessions(e, names) for names in ([], ["Wide"], ["Ours"], ["Ours", "Wide"])
    ] == [
        0,
        1,
        2,
        2,
    ]
    fast = replace(e, stacks={"graph": {"Wide": Series(tuple(both("wide", env=AGAIN)))}})
    assert evidence.sessions(fast, ["Wide"]) == 2
    assert evidence.sessions(of(card()), ["Ours"]) == 0  # a card is of no day


def test_active_parameters_by_architecture_or_as_traced():
    e = of(card(), *both("ours"), trace())
    assert evidence.active(e, "Ours").value == 4
    assert evidence.active(e, "Ours", realised=True) == stats.exact(3.0, verdict.COUNTED)
    dense = of(card(experts=0), *both("ours"), trace())
    assert evidence.active(dense, "Ours", realised=True).value == 4  # it reads all of them
    assert evidence.active(of(trace()), "Ours", realised=True).value is None
    bare = of(card(), *both("ours"))
    why = "not measured: no trace of a decode step"
    assert evidence.active(bare, "Ours", realised=True).reason == why
    failed = replace(trace(), values={}, error="OOM")
    assert evidence.active(of(card(), failed), "Ours", realised=True).reason == "not measured: OOM"
    untold = replace(trace(), values={}, missing={"active_params_realised": "dense"})
    why = evidence.active(of(card(), untold), "Ours", realised=True).reason
    assert why == "not measured: dense"
    assert evidence.total(e, "Ours").value == 20


def test_the_trace_at_the_headline_comes_first_and_any_other_serves():
    far, near = trace(context=99), trace()
    assert evidence.traced(of(), Series((near, far))) == near
    assert evidence.traced(of(), Series((far,))) == far
    assert evidence.traced(of(), Series()) is None


def test_the_share_of_the_copys_bandwidth_by_hand():
    """Four further tokens in 1 s, of 4 a second that copies of 4 GB/s allow 1 GB."""
    e = of(*both("ours"))
    assert evidence.calls_s(e, e.base, "Ours") == pytest.approx((0.25, 1.25))
    assert evidence.decode_share(e, e.base, "Ours") == pytest.approx(1)
    double = of(*both("ours", size=2 * GB))
    assert evidence.decode_share(double, double.base, "Ours") == pytest.approx(2)
    quick = of(calls("ours", 0.25, 1), calls("ours", 0.75, 5))  # four in half a second
    assert evidence.decode_share(quick, quick.base, "Ours") == pytest.approx(2)
    assert evidence.calls_s(e, e.base, "Wide") is None
    assert evidence.calls_s(of(both("ours")[1]), of(both("ours")[1]).base, "Ours") is None


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (both("ours", size=2**28), True),
        (both("ours", size=2**28 - 1), False),  # a cache may hold it
        (both("ours", size=None), False),
        (both("ours", env=OTHER), False),  # no copy was measured
        (both("ours")[:1], False),
        (both("ours")[1:], False),
        ([], False),
    ],
)
def test_a_share_of_a_copy_needs_a_size_a_copy_and_two_lengths(rows, told):
    e = of(*rows)
    assert (evidence.decode_share(e, e.base, "Ours") is not None) is told


def test_hosts_are_named_where_the_machines_differ():
    e = of(*both("ours"), wide=both("wide", env=AGAIN))
    pairs = [(e.base, "Ours"), (e.base, "Wide")]
    said = "the models were measured on different machines"
    hosts = ", whose hosts do 7.2 (Ours), 7.2 (Wide) million loops a second"
    assert evidence.machines(e, pairs) == said + hosts
    assert evidence.machines(e, pairs[:1]) == ""
    assert evidence.machines(e, pairs, (8, 1)) == said + hosts
    assert evidence.machines(e, pairs, (9, 1)) == ""
    assert evidence.machines(e, pairs, kind="energy") == ""
    # Where an earlier visit has both, the ratio is paired in it, on one machine.
    shared = {
        name: [replace(r, visit=name, others=(replace(r, visit="both"),)) for r in rows]
        for name, rows in (("ours", both("ours")), ("wide", both("wide", env=AGAIN)))
    }
    e = of(*shared["ours"], wide=shared["wide"])
    assert evidence.machines(e, [(e.base, "Ours"), (e.base, "Wide")]) == ""


def test_rows_that_must_not_be_compared_say_why():
    e, ours = of(), both("ours")
    assert evidence.refused(e, [ours[0], None, ours[1]]) is None
    other = calls("wide", 1.0, 5, stack="graph")
    assert evidence.refused(e, [ours[0], other]).reason.startswith("not compared: rows differ in")
    assert evidence.refused(e, [ours[0], other], ("stack",)) is None


# --- two values


def test_a_quotient_of_exact_values_is_exact_and_keeps_the_rows_of_both():
    a = replace(stats.exact(6.0), records=("a",))
    b = replace(stats.exact(4.0, verdict.COUNTED), records=("b",))
    ratio = evidence.quotient(a, b)
    assert (ratio.value, ratio.method, ratio.records) == (1.5, verdict.QUOTIENT, ("a", "b"))
    sampled = Estimate(8.0, 6.0, 10.0, 7, "median", records=("c",))
    ratio = evidence.quotient(sampled, b)
    assert (ratio.value, ratio.low, ratio.records) == (2.0, None, ("c", "b"))
    gone = evidence.quotient(a, replace(stats.missing("gone"), records=("d",)))
    assert (gone.value, gone.reason, gone.records) == (None, "gone", ("a", "d"))


def test_a_difference_of_readings():
    a = replace(stats.exact(6.0), records=("a",))
    b = replace(stats.exact(4.0), records=("b",))
    less = evidence.difference(a, b)
    assert (less.value, less.method, less.records) == (2.0, verdict.DIFFERENCE, ("a", "b"))
    for pair in ((a, stats.missing("gone")), (stats.missing("gone"), a)):
        assert evidence.difference(*pair).reason == "gone"


def test_how_much_lower_turns_the_interval_round():
    change = evidence.lower_pct(Estimate(0.75, 0.5, 1.25, 7))
    assert (change.value, change.low, change.high) == (25, -25, 50)
    assert evidence.lower_pct(Estimate(0.75)).low is None
