"""One call of four tokens at 1.0, 1.1, 1.2 and 1.4 s that ends at 1.4 s, under every name."""

import pytest

from lib.analysis import latency
from lib.analysis.metrics import shown_in
from lib.records import record
from lib.records.record import Record

STAMPS, END_S = [1.0, 1.1, 1.2, 1.4], 1.4


def of(name):
    (metric,) = [m for m in shown_in("crosswalk") if m.title.startswith(name)]
    return metric.of([Record("itl", {}, {"token_s": [STAMPS], "e2e_s": [END_S]})]).value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("paper TPOT", 4 / 1.4),
        ("GuideLLM TPOT", 350),  # 1.4 s / 4
        ("vLLM TPOT", 400 / 3),  # (1.4 - 1.0) s / 3
        ("vLLM ITL", 100),  # the median of 0.1, 0.1 and 0.2 s
        ("nearest to llama-bench", 7.5),  # 3 / 0.4 s
    ],
)
def test_each_definition_by_hand(name, value):
    assert of(name) == pytest.approx(value)


def test_the_table_takes_the_median_over_calls_and_skips_what_has_no_gaps():
    env = record.environment_record({"gpu": "A"})
    key = {"model": "m", "context": 8, "new_tokens": 4}
    slow = [2 * t for t in STAMPS]
    samples = {"token_s": [STAMPS, slow, STAMPS], "e2e_s": [END_S, 2 * END_S, END_S]}
    row = Record("itl", key, samples, env_id=env.env_id)
    single = Record(
        "itl", {**key, "context": 16}, {"token_s": [[1.0]], "e2e_s": [1.0]}, env_id=env.env_id
    )
    table = latency.definitions_table([env, row, single]).frame()
    assert list(table["context"]) == [8]
    assert table["GuideLLM TPOT (ms)"].tolist() == [350]
    assert len(latency.formulas().rows) == len(shown_in("crosswalk"))


def test_without_stamped_calls_the_table_is_empty():
    assert not latency.definitions_table([record.environment_record({"gpu": "A"})]).rows
