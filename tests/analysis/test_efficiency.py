"""Ablations change one thing each and report failures; APE is four divisions with intervals."""

import pytest

from lib.analysis.efficiency import table
from lib.analysis.estimators import active_realised
from lib.analysis.experts import experts_table
from lib.analysis.metrics import METRICS, shown_in
from lib.measure import ablations
from lib.records import store
from lib.records.record import Record
from tests.samples.records import key

BASE = {"context": 512, "decoding": "greedy"}


def run(tmp_path, arms, measure, **changes):
    arguments = {
        "base": BASE,
        "failed_key": lambda **kw: {"model": "m", **kw},
        "env_id": "e",
        "records_path": tmp_path / "r.jsonl",
    }
    return ablations.run("ablation-x", arms, measure=measure, **{**arguments, **changes})


def test_each_arm_changes_one_thing(tmp_path):
    seen = []

    def measure(kind, env_id, **arguments):
        seen.append(arguments)
        return Record(kind, arguments, env_id=env_id)

    run(tmp_path, ablations.one_change("context", [512, 1024]), measure)
    assert seen == [BASE, {**BASE, "context": 1024}]


def test_a_failed_arm_is_a_row_with_its_error_and_the_rest_goes_on(tmp_path):
    def measure(kind, env_id, context, decoding):
        if context == 1024:
            raise RuntimeError("out of memory\nmore lines")
        return Record(kind, {"context": context}, env_id=env_id)

    rows = run(tmp_path, ablations.one_change("context", [512, 1024, 2048]), measure)
    assert [r.error for r in rows] == [None, "RuntimeError: out of memory", None]
    assert rows[1].key["context"] == 1024 and rows[1].env_id == "e"
    assert store.load(tmp_path / "r.jsonl") == rows


def test_an_arm_that_sets_an_unknown_field_is_an_error_before_any_work(tmp_path):
    with pytest.raises(KeyError, match="ctx"):
        run(tmp_path, ablations.one_change("ctx", [1]), lambda **kw: pytest.fail("measured"))


def measured(tokens, call_s, ttft_s, call_j, active, peak_bytes):
    """The rows of one model at one context: calls of `tokens`, their joules, a card and a peak."""
    whole, one = key("m", new_tokens=tokens), key("m", new_tokens=1)
    joules = {"energy_j": [call_j] * 6} if call_j else {}
    missing = {} if call_j else {"energy_j": "no counter"}
    values = {"peak_bytes": peak_bytes}
    return [
        Record("card", {"model": "m"}, values={"active_params": active}),
        Record("latency", one, {"ttft_s": [ttft_s] * 6}),
        Record("latency", whole, {"e2e_s": [call_s] * 6}),
        Record("energy", whole, joules, missing=missing),
        *([Record("memory-paper", whole, values=values)] if peak_bytes else []),
    ]


def ape(*arguments):
    return [metric.of(measured(*arguments)) for metric in shown_in("ape")]


def test_ape_divides_by_active_billions_and_peak_gb():
    """30 tok/s, 0.5 s, 0.1 tokens per joule, 2 x 10^9 parameters and 40 GB."""
    result = ape(60, 2.0, 0.5, 600.0, 2 * 10**9, 40 * 10**9)
    assert [x.value for x in result] == pytest.approx([15, 1, 0.05, 0.75])
    assert (result[0].low, result[0].high, result[0].n) == (15, 15, 6)


def test_ape_of_the_papers_own_inputs_gives_its_table_8():
    arguments = (64, 64 / 31.27, 0.45972, 64 / 0.102, 3_610_000_000, 43_461 * 10**6)
    assert [x.value for x in ape(*arguments)] == pytest.approx(
        [8.664, 0.602, 0.0283, 0.719], abs=0.003
    )


def test_ape_keeps_the_reason_of_what_is_missing():
    *_, energy, memory = ape(10, 1.0, 1.0, None, 10**9, None)
    assert energy.reason == "not measured: no counter"
    assert memory.value is None and memory.reason == "not measured"
    without = [r for r in measured(10, 1.0, 1.0, 1.0, 10**9, 1) if r.kind != "card"]
    assert "no model card" in METRICS["ape_tpot"].of(without).reason


# --- on nominal and on realised parameters

B = 10**9


def rows(experts="all_experts", traced=8 * B, model="oss", context=64, **changes):
    """Calls of 10 tokens in one second; 2 B parameters by architecture, `traced` in use."""
    where = {"experts": experts, "context": context, "new_tokens": 10} | changes
    records = [
        Record("card", {"model": model}, values={"active_params": 2 * B}),
        Record("latency", key(model, **where), {"e2e_s": [1.0] * 6}),
    ]
    if traced:
        trace = key(model, experts=experts, context=8, new_tokens=None, batch=1)
        records.append(Record("trace", trace, values={"active_params_realised": traced}))
    return records


def test_the_quotients_stand_on_nominal_and_below_on_realised_parameters():
    nominal, used = table(rows()).frame().to_dict("records")
    assert (nominal["parameters"], used["parameters"]) == ("nominal", "realised")
    assert (nominal["active (10^9)"], used["active (10^9)"]) == (2, 8)
    assert nominal["APE-TPOT (tok/s per 10^9)"] == 5 == 4 * used["APE-TPOT (tok/s per 10^9)"]


def test_without_a_trace_of_the_same_experts_there_is_no_realised_row():
    (line,) = table(rows(traced=None)).frame().to_dict("records")
    assert line["parameters"] == "nominal"
    other = [*rows(traced=None), *rows("loop", traced=3 * B)[2:]]
    assert list(table(other).frame()["parameters"]) == ["nominal"]
    arm, trace = rows()[1:]
    assert active_realised([trace, arm]).value == 8
    batched = Record("trace", trace.key | {"batch": 4}, {}, trace.values)
    assert active_realised([batched, arm]).reason == "not traced"


def test_each_implementation_meets_its_own_trace():
    both = [*rows("all_experts", 8 * B), *rows("loop", 2 * B)[1:]]
    active = {
        (x["experts"], x["parameters"]): x["active (10^9)"]
        for x in table(both).frame().to_dict("records")
    }
    assert active == {
        ("all_experts", "nominal"): 2,
        ("all_experts", "realised"): 8,
        ("loop", "nominal"): 2,
        ("loop", "realised"): 2,
    }


def test_what_has_only_a_peak_is_no_row():
    timed = rows("loop", 2 * B)
    peaks = [
        Record(
            "memory-paper",
            key("oss", experts=e, context=64, new_tokens=10),
            {},
            {"peak_bytes": 4 * B},
        )
        for e in ("loop", "all_experts")
    ]
    grid = table([*timed, *peaks])
    assert len(grid.rows) == 2 and "experts" not in [c.title for c in grid.columns]
    assert grid.frame()["TPOT/GB (tok/s per GB)"].tolist() == [2.5, 2.5]


def test_experts_arms_per_parameter_in_use():
    arms = [
        Record(
            "ablation-experts",
            key("oss", experts=e, context=64, new_tokens=10),
            {"e2e_s": [1.0] * 6},
        )
        for e in ("all_experts", "loop")
    ]
    failed = Record(
        "ablation-experts",
        key("oss", experts="batched_mm", context=64, new_tokens=10),
        error="OutOfMemoryError: x",
    )
    lines = experts_table([*rows("all_experts", 8 * B), *arms, failed]).frame().to_dict("records")
    batched, loop, every = lines
    assert every["APE-TPOT, nominal (tok/s per 10^9)"] == 5
    assert every["APE-TPOT, realised (tok/s per 10^9)"] == 1.25
    assert "not traced" in loop["missing"] and loop["APE-TPOT, nominal (tok/s per 10^9)"] == 5
    assert "failed: OutOfMemoryError" in batched["missing"]
    assert not experts_table([]).rows
