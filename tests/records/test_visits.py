"""Visits: rows of each are kept, and an estimate over visits is one of their medians."""

import json

import pytest

from lib.analysis import estimators, metrics, rows, series
from lib.files import ROOT
from lib.records import slices, store
from lib.records.record import Record, environment_record, select, visit_of, warning
from tests.samples.records import key
from tools import history_visits

FIRST, SECOND, THIRD = "2026-11-24T10:00:00Z", "2026-11-25T10:00:00Z", "2026-11-26T10:00:00Z"
CODE = "GPU-1"


def env(start, uuid=CODE, **more):
    values = {"gpu": "G", "gpu_uuid": uuid, "cpu": "C", "cpu_count": 4, "date": start[:10]}
    values["visit"] = visit_of(values | {"date": start})
    return environment_record(values | more)


def calls(where, seconds, model="m", tokens=64, **more):
    name = "ttft_s" if tokens == 1 else "e2e_s"
    return Record("latency", key(model, new_tokens=tokens), {name: [seconds] * 6},
                  env_id=where.env_id, **more)  # fmt: skip


def merged(*records):
    return select(store.merge(records), "latency")


def job(folder, records, end):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "ok", "end": end, "job_sha": end}))
    for row in records:
        store.append(folder / "records.jsonl", row)


def test_a_visit_is_a_machine_and_a_start_or_else_a_day():
    machine = {"gpu_uuid": "GPU-1", "cpu": "C", "cpu_count": 4, "date": "2026-11-24"}
    assert visit_of(machine) == "GPU-1, C x 4, 2026-11-24"
    assert visit_of(machine | {"visit": "told"}) == "told"
    others = [{"gpu_uuid": "GPU-2"}, {"cpu": "D"}, {"date": "2026-11-25"}, {"cpu_count": 8}]
    assert len({visit_of(machine | other) for other in others} | {visit_of(machine)}) == 5


def test_rows_of_every_visit_are_kept_and_a_repetition_within_one_replaces():
    one, two = env(FIRST), env(SECOND)
    (row,) = merged(one, two, calls(one, 1.0), calls(one, 2.0), calls(two, 9.0))
    assert (row.samples["e2e_s"][0], row.visit) == (9.0, two.values["visit"])
    assert [other.samples["e2e_s"][0] for other in row.others] == [2.0]  # not the fast one


def test_order_does_not_choose_which_visits_count():
    one, two = env(FIRST), env(SECOND)
    rates = {
        metrics.OUTPUT(merged(one, two, *order)).value
        for order in ([calls(one, 1.0), calls(two, 2.0)], [calls(two, 2.0), calls(one, 1.0)])
    }
    assert rates == {64 / 1.5}


def test_what_failed_in_one_visit_gives_way_to_what_did_not_in_another():
    one, two = env(FIRST), env(SECOND)
    failed = Record("latency", key("m"), error="OutOfMemoryError: x", env_id=two.env_id)
    for order in ([calls(one, 1.0), failed], [failed, calls(one, 1.0)]):
        (row,) = merged(one, two, *order)
        assert row.error is None and row.others == ()


@pytest.mark.parametrize(
    "seconds, text",
    [
        ([2.0], "median, order statistics, within one visit"),
        ([2.0, 4.0], "median of 2 visits, their range"),
        ([2.0, 3.0, 4.0, 5.0, 6.0], "median of 5 visits, their range"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "median of 6 visits, order statistics"),
    ],
)
def test_an_estimate_over_visits_is_of_their_medians(seconds, text):
    envs = [env(f"2026-11-{10 + i}T10:00:00Z") for i in range(len(seconds))]
    rows_ = merged(*envs, *(calls(e, s) for e, s in zip(envs, seconds, strict=True)))
    estimate = metrics.METRICS["p50"].of(rows_)
    assert text in estimate.method
    if len(seconds) > 1:
        assert (estimate.low, estimate.high) == (1e3 * min(seconds), 1e3 * max(seconds))
        assert (estimate.level is None) == (len(seconds) < 6)
        assert len(estimate.records) == len(seconds)


def test_a_slope_is_of_one_visit_and_decode_throughput_the_median_over_them():
    """Steps of 0.1 s in one visit and of 0.2 s in the other; lengths never mix across visits."""
    one, two, alone = env(FIRST), env(SECOND), env(THIRD)
    rows_ = merged(one, two, alone, calls(one, 1.0, tokens=1), calls(one, 2.0, tokens=11),
                   calls(two, 1.0, tokens=1), calls(two, 3.0, tokens=11),
                   calls(alone, 50.0, tokens=11))  # fmt: skip
    rate = estimators.decode_tok_per_s(rows_)
    assert (rate.value, rate.low, rate.high) == tuple(map(pytest.approx, (7.5, 5.0, 10.0)))
    assert rate.n == 2 and rate.level is None


def test_ratios_are_paired_within_a_visit():
    """One host is twice as slow as the other, for both models alike."""
    one, two, alone = env(FIRST), env(SECOND), env(THIRD)
    rows_ = merged(one, two, alone, calls(one, 1.0, "a"), calls(two, 2.0, "a"),
                   calls(one, 3.0, "b"), calls(two, 6.0, "b"), calls(alone, 99.0, "b"))  # fmt: skip
    a, b = (select(rows_, model=name) for name in "ab")
    ratio = metrics.METRICS["output"].ratio(a, b)
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (3, 3, 3, 2)
    assert series.visit_ratio(a[0], b[0], "e2e_s").value == pytest.approx(1 / 3)
    one_common = merged(
        one, alone, calls(one, 1.0, "a"), calls(one, 3.0, "b"), calls(alone, 99.0, "b")
    )
    ratio = series.visit_ratio(*one_common[::-1], "e2e_s")
    assert ratio.value == 3 and "bootstrap" in ratio.method


def test_a_ratio_of_slopes_is_paired_within_a_visit():
    """Steps of 0.1 and 0.4 s of a, of 0.2 and 0.8 s of b: twice in each visit, 0.5 to 8 across."""
    one, two, alone = env(FIRST), env(SECOND), env(THIRD)
    steps = [(one, "a", 0.1), (two, "a", 0.4), (one, "b", 0.2), (two, "b", 0.8), (alone, "b", 9.0)]
    arms = [calls(where, 1.0 + (tokens - 1) * step, model, tokens)
            for where, model, step in steps for tokens in (1, 11)]  # fmt: skip
    a, b = (select(merged(one, two, alone, *arms), model=name) for name in "ab")
    ratio = metrics.METRICS["decode"].ratio(a, b)
    assert (ratio.value, ratio.low, ratio.high) == tuple(map(pytest.approx, (2, 2, 2)))
    assert (ratio.level, ratio.visits, len(ratio.records)) == (None, 2, 8)
    inverse = metrics.METRICS["tpot"].ratio(a, b)
    assert inverse.value == pytest.approx(0.5) and inverse.visits == 2
    fewer = [r for r in arms if r.env_id != two.env_id]
    a, b = (select(merged(one, alone, *fewer), model=name) for name in "ab")
    ratio = metrics.METRICS["decode"].ratio(a, b)  # one visit in common
    assert ratio.value == pytest.approx(2) and ratio.level is not None and not ratio.visits


def test_rows_without_a_common_visit_are_compared_by_all_their_visits():
    """Medians of 2 and of 8 s: the last visits alone would say 1."""
    starts = [env(f"2026-11-{20 + i}T10:00:00Z") for i in range(4)]
    rows_ = merged(*starts, calls(starts[0], 1.0, "a"), calls(starts[1], 3.0, "a"),
                   calls(starts[2], 13.0, "b"), calls(starts[3], 3.0, "b"))  # fmt: skip
    a, b = (select(rows_, model=name) for name in "ab")
    ratio = series.visit_ratio(b[0], a[0], "e2e_s")
    cells = [metrics.METRICS["p50"].of(side).value for side in (b, a)]
    assert ratio.value == pytest.approx(cells[0] / cells[1]) == pytest.approx(4)
    assert (ratio.low, ratio.high) == (pytest.approx(1), pytest.approx(13))
    assert (ratio.level, ratio.visits) == (None, 0)  # ends of two ranges are no range of ratios
    assert len(ratio.records) == 4


def test_files_keep_the_rows_of_every_visit_when_sets_are_merged(tmp_path):
    one, two = env(FIRST), env(SECOND)
    job(tmp_path / "a" / "m" / "latency", [one, calls(one, 1.0)], "2026-01-01T10:00:00Z")
    job(tmp_path / "b" / "m" / "latency", [two, calls(two, 2.0)], "2026-01-02T10:00:00Z")
    job(tmp_path / "c" / "m" / "latency", [two, calls(two, 3.0)], "2026-01-03T10:00:00Z")
    slices.merge([tmp_path / n for n in "abc"], tmp_path / "all")
    lines = (tmp_path / "all" / "m" / "latency" / "records.jsonl").read_text().splitlines()
    kept = [r["samples"]["e2e_s"][0] for r in map(json.loads, lines) if r["kind"] == "latency"]
    assert kept == [1.0, 3.0]
    assert not any({"others"} & json.loads(line).keys() for line in lines)
    (row,) = select(list(rows.load(tmp_path / "all")), "latency")
    assert len(row.others) == 1


def test_visits_beside_a_set_are_further_visits_of_its_arms(tmp_path):
    """The way there and the way back are one sample; cut off calls and other arms are none."""
    base, there = env(FIRST), env(SECOND)
    job(
        tmp_path / "set" / "m" / "latency",
        [base, calls(base, 1.0), calls(base, 0.1, tokens=1)],
        "2026-01-01T10:00:00Z",
    )
    cut = calls(there, 0.2, tokens=1, warnings=(warning("cut_off", "x"),))
    odd = [cut, calls(there, 5.0, "other"), calls(there, 5.0, tokens=16)]
    odd.append(Record("latency", key("m"), error="x", env_id=there.env_id))
    for row in (there, calls(there, 2.0), calls(there, 4.0), *odd):
        store.append(tmp_path / "visits" / "one" / "records.jsonl", row)
    for reading in (rows.load, store.load_tree):
        mine = select(list(reading(tmp_path / "set")), "latency")
        assert [r.key["new_tokens"] for r in mine] == [64, 1]
        assert mine[0].samples["e2e_s"] == [1.0] * 6 and mine[1].others == ()
        (other,) = mine[0].others
        assert sorted(other.samples["e2e_s"]) == [2.0] * 6 + [4.0] * 6
    envs = select(list(rows.load(tmp_path / "set")), "environment")
    assert [e.env_id for e in envs] == [base.env_id, there.env_id]


def test_the_recorded_visits_are_read_with_the_released_set():
    released = rows.load(ROOT / "outputs" / "released" / "h100-sxm")
    for model in ("gpt-oss-20b", "Qwen3-32B", "Yi-34B"):
        for tokens in (1, 64):
            where = {"context": 2048, "new_tokens": tokens, "stack": "hf-eager"}
            mine = select(list(released), "latency", model=model, **where)
            assert mine and all(len(r.others) >= 1 for r in mine)


def test_lines_that_only_the_history_holds_are_taken_out_unedited(monkeypatch):
    """Two states of a file: one arm was measured again, one lost, one by no counter, one failed."""
    old, new, nameless = env(FIRST), env(SECOND), environment_record({"gpu": "G"})
    watts = Record("energy", key("m"), {"energy_j": [1.0]}, env_id=old.env_id)
    failed = Record("latency", key("m"), {"e2e_s": [1.0]}, error="x", env_id=old.env_id)
    before = [old, calls(old, 1.0), calls(old, 2.0, "other"), watts, failed]
    before += [nameless, calls(nameless, 7.0)]
    now = [old, calls(old, 2.0, "other"), new, calls(new, 3.0)]
    states = (("c1", before), ("c2", now))
    texts = [(name, "\n".join(map(store.line, mine))) for name, mine in states]
    monkeypatch.setattr(history_visits, "states", lambda folder: iter(texts))
    present = {history_visits.place(json.loads(store.line(row))) for row in now}
    expected = [store.line(old), store.line(calls(old, 1.0))]
    assert history_visits.lost("set", present) == {"c1": expected}
    present |= {history_visits.place(json.loads(text)) for text in expected}
    assert history_visits.lost("set", present) == {}  # a second run writes nothing
