"""One tidy table of all numbers: a hand-made folder, and the released set against its README."""

import json

import pandas as pd
import pytest

from lib.analysis.frame import COLUMNS, export, frame
from lib.analysis.metrics import METRICS
from lib.files import ROOT
from lib.records import store
from lib.records.record import Record, environment_record
from tests.samples.records import GPU, key

ENV = environment_record(GPU)
B = 10**9


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """150 ms to the first token, then 50 ms each: 0.6 s for 10 tokens, 1.1 s for 20; 3 J a call."""
    folder = tmp_path_factory.mktemp("set")
    job = folder / "m" / "random-hf-eager" / "latency"
    job.mkdir(parents=True)
    (job / "run.json").write_text(json.dumps({"status": "ok", "end": "2026-01-01"}))
    rows = [
        ENV,
        Record("card", {"model": "m"}, values={"active_params": 2 * B}, env_id=ENV.env_id),
        Record("latency", key("m", new_tokens=1), {"ttft_s": [0.15] * 6}, env_id=ENV.env_id),
        Record("latency", key("m", new_tokens=10), {"e2e_s": [0.6] * 6}, env_id=ENV.env_id),
        Record("latency", key("m", new_tokens=20), {"e2e_s": [1.1] * 6}, env_id=ENV.env_id),
        Record("energy", key("m", new_tokens=10), {"energy_j": [3.0] * 6}, env_id=ENV.env_id),
        Record(
            "energy", key("m", new_tokens=10, context=64), missing={"energy_j": "no counter"},
            env_id=ENV.env_id,
        ),
        Record("latency", key("m", new_tokens=10, context=64), error="OutOfMemoryError: x"),
    ]  # fmt: skip
    for row in rows:
        store.append(job / "records.jsonl", row)
    return frame(folder)


def one(numbers, metric, **where):
    mine = numbers[numbers.metric == metric]
    for name, value in where.items():
        mine = mine[mine[name] == value]
    assert len(mine) == 1, mine
    return mine.iloc[0]


def test_a_line_says_what_was_measured_and_where_it_lies(numbers):
    line = one(numbers, "ttft", context=2048)
    assert list(numbers.columns) == list(COLUMNS)
    assert (line.value, line.low, line.high, line.level, line.n) == (150, 150, 150, 0.95, 6)
    setup = tuple(line[["model", "weights", "dtype", "stack", "experts", "gpu"]])
    assert setup == ("m", "random", "bfloat16", "hf-eager", "none", GPU["gpu"])
    assert (line.batch, line.new_tokens, line.environment) == (1, 1, ENV.env_id)
    assert line.run == "m/random-hf-eager/latency" and line.unit == METRICS["ttft"].unit


@pytest.mark.parametrize(
    ("metric", "where", "value"),
    [
        ("p50", {"new_tokens": 20}, 1100),
        ("output", {"new_tokens": 10, "kind": "latency", "context": 2048}, 10 / 0.6),
        ("decode", {"context": 2048}, 20),  # 10 tokens in 0.5 s
        ("tpot", {"context": 2048}, 50),
        ("j_per_1k", {"context": 2048}, 300),
        ("tok_per_j", {"context": 2048}, 10 / 3),
        ("active", {}, 2),
        ("ape_tpot", {"context": 2048}, 10 / 0.6 / 2),
        ("ape_energy", {"context": 2048}, 10 / 3 / 2),
    ],
)
def test_every_metric_by_hand(numbers, metric, where, value):
    assert one(numbers, metric, **where).value == pytest.approx(value)


def test_what_is_missing_has_its_reason(numbers):
    assert one(numbers, "j_per_1k", context=64).reason == "not measured: no counter"
    assert one(numbers, "p50", context=64).reason == "failed: OutOfMemoryError: x"
    absent = numbers[numbers.value.isna()]
    assert len(absent) and absent.reason.astype(bool).all()


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results below"):
        frame(tmp_path)


@pytest.fixture(scope="module")
def released():
    return frame(ROOT / "outputs" / "released" / "h100-sxm")


@pytest.mark.parametrize(
    ("metric", "model", "where", "text"),
    [
        ("ttft", "gpt-oss-20b", {"experts": "grouped_mm"}, "214.8 [211.6, 217.4]"),
        ("output", "qwen3-32b", {"new_tokens": 64}, "13.4 [8.6, 16.1]"),
        ("output", "yi-34b", {"new_tokens": 64}, "15.5 [12.6, 23.9]"),
        ("decode", "gpt-oss-20b", {"stack": "graph"}, "107.0 [106.9, 107.9]"),
        ("decode", "gpt-oss-20b", {"stack": "graph-compiled"}, "293.4 [290.4, 295.7]"),
        ("decode", "qwen3-32b", {"stack": "graph-compiled"}, "43.4 [43.3, 45.0]"),
        ("j_per_1k", "gpt-oss-20b", {"kind": "energy", "new_tokens": 64}, "8115.0 [7838, 8214]"),
    ],
)
def test_the_headlines_of_the_readme_are_in_the_released_set(released, metric, model, where, text):
    """Values and intervals as README.md prints them, at 2,048 tokens of context."""
    kind = "energy" if metric == "j_per_1k" else "latency"
    where = {"stack": "hf-eager", "kind": kind, "decoding": "greedy", "context": 2048} | where
    mine = released[(released.metric == metric) & (released.model.str.lower().str.endswith(model))]
    for name, value in where.items():
        mine = mine[mine[name] == value]
    texts = [f"{r.value:.1f} [{r.low:.1f}, {r.high:.1f}]" for r in mine.itertuples()]
    whole = [f"{r.value:.0f}.0 [{r.low:.0f}, {r.high:.0f}]" for r in mine.itertuples()]
    assert text in texts + whole


def test_the_export_reads_back_as_the_frame(numbers, tmp_path):
    folder = tmp_path / "set" / "m" / "random-hf-eager" / "latency"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "ok", "end": "2026-01-01"}))
    store.append(folder / "records.jsonl", ENV)
    row = Record("latency", key("m", new_tokens=1), {"ttft_s": [0.1] * 6}, env_id=ENV.env_id)
    store.append(folder / "records.jsonl", row)
    csv, parquet, columns, metrics = export(tmp_path / "set", tmp_path / "out")
    expected = frame(tmp_path / "set")
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), expected)
    assert pd.read_csv(csv)["value"].tolist() == pytest.approx(
        expected["value"].tolist(), nan_ok=True
    )
    assert pd.read_csv(columns)["column"].tolist() == list(COLUMNS)
    assert set(expected["metric"]) <= set(pd.read_csv(metrics)["metric"])
