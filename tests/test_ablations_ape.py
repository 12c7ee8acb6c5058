"""Ablations change one thing each and report failures; APE is four divisions with intervals."""

import pytest

from lib import ablations, records
from lib.ape import ape
from lib.records import Record
from lib.stats import Estimate, median, missing

BASE = {"context": 512, "decoding": "greedy"}


def run(tmp_path, arms, measure, **changes):
    arguments = {"base": BASE, "failed_key": lambda **kw: {"model": "m", **kw}, "env_id": "e",
                 "records_path": tmp_path / "r.jsonl"}  # fmt: skip
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
    assert records.load(tmp_path / "r.jsonl") == rows


def test_an_arm_that_sets_an_unknown_field_is_an_error_before_any_work(tmp_path):
    with pytest.raises(KeyError, match="ctx"):
        run(tmp_path, ablations.one_change("ctx", [1]), lambda **kw: pytest.fail("measured"))


def test_ape_divides_by_active_billions_and_peak_gb():
    tpot = Estimate(30.0, 28.0, 32.0, 10)
    result = ape(active_params=2_000_000_000, output_tok_per_s=tpot, ttft_s=median([0.5] * 6),
                 tok_per_j=Estimate(0.1, 0.09, 0.11, 6), peak_bytes=40 * 10**9)  # fmt: skip
    assert result.tok_per_s_per_b.value == 15 and result.tok_per_s_per_b.high == 16
    assert result.inverse_ttft_per_s_per_b.value == 1  # 1 / 0.5 s / 2 B
    assert result.tok_per_j_per_b.low == pytest.approx(0.045)
    assert result.tok_per_s_per_gb.value == 0.75


def test_ape_of_the_papers_own_inputs_gives_its_table_8():
    result = ape(active_params=3_610_000_000, output_tok_per_s=Estimate(31.27),
                 ttft_s=Estimate(0.45972), tok_per_j=Estimate(0.102),
                 peak_bytes=43_461 * 10**6)  # fmt: skip
    assert result.tok_per_s_per_b.value == pytest.approx(8.664, abs=0.003)
    assert result.inverse_ttft_per_s_per_b.value == pytest.approx(0.602, abs=0.001)
    assert result.tok_per_j_per_b.value == pytest.approx(0.0283, abs=0.0001)
    assert result.tok_per_s_per_gb.value == pytest.approx(0.719, abs=0.001)


def test_ape_keeps_the_reason_of_what_is_missing():
    result = ape(active_params=10**9, output_tok_per_s=Estimate(1.0), ttft_s=Estimate(1.0),
                 tok_per_j=missing("no counter"), peak_bytes=None)  # fmt: skip
    assert result.tok_per_j_per_b.reason == "no counter"
    assert result.tok_per_s_per_gb.value is None and result.tok_per_s_per_gb.reason
    with pytest.raises(ValueError, match="positive"):
        ape(active_params=0, output_tok_per_s=Estimate(1.0), ttft_s=Estimate(1.0),
            tok_per_j=Estimate(1.0), peak_bytes=None)  # fmt: skip
