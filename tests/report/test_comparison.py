"""Two hand-made result sets: what is compared, what is refused and why, and the page."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from lib import stats
from lib.__main__ import main
from lib.analysis import result_sets, waits
from lib.analysis.result_sets import Pair, Side
from lib.analysis.waits import Cause
from lib.files import ROOT
from lib.records.record import Record, environment_record
from lib.report import comparison
from tests.samples import records as sample

A = environment_record(sample.GPU | {"host_score_per_s": 10.0, "power_limit_w": 700.0})
B = environment_record(
    sample.GPU
    | {"gpu": "NVIDIA B", "host_score_per_s": 15.0, "driver": "590", "power_limit_w": 700.0}
)


def row(env: Record, samples=None, values=None, kind: str = "latency", **more) -> Record:
    own = {name: more.pop(name) for name in ("error", "missing") if name in more}
    return Record(
        kind,
        sample.key("m", **more),
        samples or {},
        sample.source("m") | (values or {}),
        env_id=env.env_id,
        **own,
    )


def sides(ours: list[Record], theirs: list[Record]) -> tuple[Side, Side]:
    return Side("ours", (A, *ours)), Side("theirs", (B, *theirs))


def only_pair(ours: Record, theirs: Record) -> result_sets.Pair:
    pairs, refused = result_sets.compare(*sides([ours], [theirs]))
    assert len(pairs) == 1 and refused == []
    return pairs[0]


def reason(ours: list[Record], theirs: list[Record]) -> str:
    pairs, refused = result_sets.compare(*sides(ours, theirs))
    assert pairs == []
    return next(r.reason for r in refused if r.where != "B")


def test_a_ratio_is_b_over_a_with_its_interval():
    """Medians 2 s and 1 s, samples within 5 %: the ratio is 0.5 and lies far from 1."""
    pair = only_pair(row(A, {"e2e_s": sample.spread(2.0)}), row(B, {"e2e_s": sample.spread(1.0)}))
    named = (pair.metric.title, pair.metric.unit, pair.a.value, pair.b.value)
    assert named == ("p50", "ms", 2000, 1000)
    assert pair.ratio.value == 0.5 and 0.45 < pair.ratio.low < 0.5 < pair.ratio.high < 0.55
    assert pair.verdict == "B lower"


def test_an_arm_of_a_shared_gpu_is_refused_on_either_side():
    values = {"gpu_shared": "it is virtual"}
    shared = environment_record(sample.GPU | values)
    arms = [row(env, {"e2e_s": sample.spread(2.0)}) for env in (A, shared)]
    sides = [Side(name, (A, shared, arm)) for name, arm in zip("ab", arms, strict=True)]
    for pair, letter in ((sides, "B"), (sides[::-1], "A")):
        pairs, (refused,) = result_sets.compare(*pair)
        assert pairs == []
        assert refused.reason == f"measured on a GPU that is shared (it is virtual) in {letter}"


def test_an_interval_that_contains_one_resolves_nothing():
    near = row(B, {"e2e_s": sample.spread(2.002)})
    assert (
        only_pair(row(A, {"e2e_s": sample.spread(2.0)}), near).verdict == "no difference resolved"
    )
    few = only_pair(row(A, {"e2e_s": [2.0] * 3}), row(B, {"e2e_s": [1.0] * 3}))
    assert few.ratio.value == 0.5 and few.verdict == "n = 3: an interval needs n >= 6"


def test_single_readings_have_a_ratio_and_no_interval():
    ours, theirs = (
        row(e, values={"peak_bytes": n}, kind="memory")
        for e, n in ((A, 2_000_000_000), (B, 1_000_000_000))
    )
    pair = only_pair(ours, theirs)
    assert (pair.a.value, pair.b.value, pair.ratio.value) == (2.0, 1.0, 0.5)
    assert pair.ratio.low is None and "no interval" in pair.verdict
    assert only_pair(ours, replace(ours, env_id=B.env_id)).verdict == "equal readings"


def test_the_console_says_where_only_the_machines_can_be_compared():
    pair = only_pair(row(A, {"e2e_s": sample.spread(2.0)}), row(B, {"e2e_s": sample.spread(1.0)}))
    assert "machines alone" not in comparison.text([pair])
    machine = replace(pair, key={**pair.key, "model": None})
    assert "no number of a model is in both" in comparison.text([machine])
    assert comparison.text([]) == ""


def test_of_stamped_calls_the_call_is_the_repetition():
    """Gaps of 2 s and of 1 s in each of six calls: six repetitions, not thirty gaps."""
    calls = [[[i * gap for i in range(6)] for _ in range(6)] for gap in (2.0, 1.0)]
    ours, theirs = (row(e, {"token_s": c}, kind="itl") for e, c in zip((A, B), calls, strict=True))
    pair = only_pair(ours, theirs)
    assert (pair.a.value, pair.ratio.value, pair.ratio.n) == (2000, 0.5, 6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "float16"), ("weights", "checkpoint"), ("stack", "graph"), ("experts", "loop")],
)
def test_another_setup_is_refused_with_both_names(field, value):
    ours, theirs = row(A, {"e2e_s": [1.0]}), row(B, {"e2e_s": [1.0]}, **{field: value})
    text = reason([ours], [theirs])
    mine = ours.key[field]
    assert text == f"B has it with {field} {value} instead of {mine}: a ratio would mix causes"
    _, refused = result_sets.compare(*sides([ours], [theirs]))
    assert {(r.where, r.key[field]) for r in refused} == {("A", mine), ("B", value)}


def test_what_the_other_set_lacks_is_said():
    ours = row(A, {"e2e_s": [1.0]})
    assert reason([ours], [row(B, {"e2e_s": [1.0]}, context=128)]) == "B has no such arm"
    assert reason([ours], []) == "B has no rows of m"
    assert reason([ours], [row(B, {"e2e_s": [1.0]}, kind="energy")]) == "B has no latency rows of m"
    arm = row(A, {"e2e_s": [1.0]}, kind="ablation-precision", dtype="float16")
    base = row(B, {"e2e_s": [1.0]}, kind="ablation-precision")
    assert reason([arm], [base]) == "B has no such arm"  # here dtype is the arm, not the setup


def test_failures_missing_samples_and_other_weights_are_refused():
    good = {"e2e_s": [1.0]}
    assert reason([row(A, error="OutOfMemoryError: 3 GB")], [row(B, good)]) == (
        "failed in A: OutOfMemoryError: 3 GB"
    )
    none = row(B, missing={"energy_j": "no counter"}, kind="energy")
    assert reason([row(A, {"energy_j": [1.0]}, kind="energy")], [none]) == (
        "energy of a call is missing in B: no counter"
    )
    other = row(B, good, {"model_source": "hub m", "model_revision": "abc"})
    assert (
        reason([row(A, good)], [other]) == "weights from random (seed 0) in A and hub m, abc in B"
    )


def test_a_set_of_two_gpus_is_refused():
    twice = [row(A, {"e2e_s": [1.0]}), row(B, {"e2e_s": [1.0]})]
    a, b = Side("ours", (A, B, *twice)), Side("theirs", (B, twice[1]))
    pairs, (refused,) = result_sets.compare(a, b)
    assert pairs == []
    assert refused.reason == (
        "A has it on several GPUs (NVIDIA B, NVIDIA H100 80GB HBM3): choose one"
    )


def test_environments_tell_what_differs_and_warn():
    a, b = sides([], [])
    table = comparison.environment_table(a, b)
    assert {name: (x, y) for name, x, y in table.rows} == {
        "gpu": ("NVIDIA H100 80GB HBM3", "NVIDIA B"),
        "driver": ("580.1", "590"),
        "host score per s": ("10.00", "15.00"),
    }
    assert "power limit w 700.0" in table.notes[0] and "torch 2.11.0" in table.notes[0]
    text = " ".join(comparison.cautions(a, b))
    assert "Hardware and software differ: a ratio alone does not tell which" in text
    assert "B's host is 1.50 times as fast" in text
    same = " ".join(comparison.cautions(a, Side("again", a.rows)))
    assert "differ" not in same and "times as fast" not in same and "run to run" in same


def test_jobs_beside_one_set_alone_are_told():
    a, _ = sides([], [])
    beside = environment_record(sample.GPU | {"neighbours": 1})
    b = Side("b", (beside,))
    lead = "B was measured while other GPUs of its host had jobs of their own"
    assert lead in " ".join(comparison.cautions(a, b))
    assert "jobs of their own" not in " ".join(comparison.cautions(b, b))


def test_what_ratios_are_put_down_to_is_a_line_for_each_cause():
    """Arms of one stack: 1.2 and 1.4 by bandwidth, whose own ratio is 1.5; 1.1 by the host."""
    decode = next(m for m in comparison.COMPARED if m.name == "decode")
    ratios, own = (1.2, 1.4, 1.1), stats.exact(1.5)
    pairs = [
        Pair(decode, "latency", {"model": "m", "stack": "graph", "context": n}, one, one, one)
        for n, one in enumerate(map(stats.exact, ratios))
    ]
    none = Cause("host", stats.missing("not told"))
    table = comparison.by_cause(pairs, [Cause("bandwidth", own), Cause("bandwidth", own), none])
    assert table.rows == (
        ("decode throughput", "m", "graph", "bandwidth", 2, pytest.approx(1.3), 1.5, 1.2, 1.4),
        ("decode throughput", "m", "graph", "host", 1, 1.1, none.expected, 1.1, 1.1),
    )
    other = Cause(waits.NOT_OF_CARD, own)
    assert comparison.by_cause(pairs, [other] * 3).rows == ()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A is the study on one GPU; B, on another, takes twice the time and lacks one model."""
    root = tmp_path_factory.mktemp("compare")
    a, b = sample.write_paper(root / "x"), root / "y"
    for model in ("gpt-oss-20b", "qwen3-32b"):
        rows = [sample.card(model, B.env_id)]
        for r in sample.latency(model, B.env_id, (128, 512, 1024, 2048)):
            slow = {
                name: [2 * t for t in times]
                for name, times in r.samples.items()
                if name != "token_s"
            }
            rows.append(replace(r, samples=r.samples | slow))
        sample.write_job(b, f"{model}/random-hf-eager/latency", rows, B.values, model=model)
    comparison.write(a, b, root / "out")
    return root / "out"


def test_the_page_and_its_tables(report):
    soup = BeautifulSoup((report / "report.html").read_text(), "html.parser")
    text = re.sub(r"\s+", " ", soup.get_text(" "))
    assert "4 arms compared: B higher in 4; B / A 2.000" in text  # TTFT
    half = "B higher in 4, not judged in 4 (rows warn); B / A 2.000"  # calls of 128 tokens warn
    assert f"8 arms compared: {half}" in text
    assert "B has no rows of yi-34b" in text and "Not compared" in text
    with (report / "ratios.csv").open() as file:
        lines = list(csv.DictReader(file))
    cells = [td["data-value"] for td in soup.select("#ratio-ttft tbody td[data-n]")]
    ttft = [x for x in lines if x["quantity"] == "TTFT"]
    assert cells == [v for x in ttft for v in (x["a"], x["b"], x["ratio"])]
    with (report / "refused.csv").open() as file:
        assert {x["model"] for x in csv.DictReader(file)} >= {"yi-34b"}
    assert not soup.select("script[src], link[href^=http], img")
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert all(soup.find(id=a["href"][1:]) for a in soup.select('a[href^="#"]'))


def test_the_same_sets_give_the_same_bytes(report, tmp_path):
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    comparison.write(report.parent / "x", report.parent / "y", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_the_command(report, tmp_path, capsys):
    x, y, out = str(report.parent / "x"), str(report.parent / "y"), str(tmp_path / "out")
    assert main(["compare", x, y, "--out", out]) == 0
    told = capsys.readouterr().out
    with Path(out, "ratios.csv").open() as file:
        ratios = list(csv.DictReader(file))
    assert len(told.splitlines()) == 1 + min(len(ratios), 40) + (len(ratios) > 40)
    assert "2.000 [1." in told and "TTFT" in told
    assert told.splitlines()[1].endswith(("B higher", "B lower"))
    sample.write_demo(tmp_path / "demo")
    assert main(["compare", x, str(tmp_path / "demo"), "--out", out]) == 1
    assert "nothing is comparable" in capsys.readouterr().err
    assert "No arm of A has a partner" in Path(out, "report.html").read_text()
    for arguments, message in (
        ([x, str(tmp_path / "none")], "no results in"),
        ([x, y, "--out", str(ROOT / "outputs/released/z")], "is released"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_metric_of_all_lengths_is_compared_once_for_the_arm():
    """From 10 to 20 tokens 1 s more in A and 0.5 s more in B: twice the decode throughput."""
    ours, theirs = (
        [row(e, {"e2e_s": [1.0 + (n - 10) * step] * 6}, new_tokens=n) for n in (10, 20)]
        for e, step in ((A, 0.1), (B, 0.05))
    )
    pairs, _ = result_sets.compare(*sides(ours, theirs))
    (pair,) = [p for p in pairs if p.metric.name == "decode"]
    assert (pair.a.value, pair.b.value, pair.ratio.value) == pytest.approx((10, 20, 2))
    assert pair.key["new_tokens"] is None
    shared = environment_record(sample.GPU | {"gpu_uuid": "MIG-1"})
    theirs = [replace(row, env_id=shared.env_id) for row in theirs]
    pairs, refused = result_sets.compare(Side("a", (A, *ours)), Side("b", (shared, *theirs)))
    assert pairs == [] and {r.reason[:22] for r in refused} == {"measured on a MIG slic"}


def test_a_ratio_of_rows_that_warn_decides_nothing():
    """2 s against 1 s, and a row whose repetitions spread; a capped board is no fault."""
    ours, theirs = row(A, {"e2e_s": sample.spread(2.0)}), row(B, {"e2e_s": sample.spread(1.0)})
    spread, capped = ({"code": code, "text": ""} for code in ("spread", "power_cap"))
    pair = only_pair(ours, replace(theirs, warnings=(spread, capped)))
    assert pair.ratio.value == 0.5 and pair.verdict == "not judged: a row warns of spread"
    (_, text), *_ = comparison.findings([pair], [])
    assert "1 arm compared: not judged in 1 (rows warn); B / A 0.5" in text
    assert only_pair(ours, replace(theirs, warnings=(capped,))).verdict == "B lower"
    visit = replace(theirs, warnings=(spread,))
    assert "spread" in only_pair(replace(ours, others=(visit,)), theirs).verdict


def test_arms_of_all_lengths_stand_by_model_and_size():
    """Contexts 128, 1,024 and 4,096 as numbers, not as text; models as params/models.yaml has."""
    names = [(m, n) for m in ("Qwen3-32B", "gpt-oss-20b") for n in (1024, 4096, 128)]
    both = [
        [
            replace(one, key=one.key | {"model": model})
            for model, context in names
            for new, times in ((1, 1.0), (16, 2.0), (64, 4.0))
            for one in [row(env, {"e2e_s": [times] * 6}, context=context, new_tokens=new)]
        ]
        for env in (A, B)
    ]
    pairs, _ = result_sets.compare(*sides(*both))
    slopes = [(p.key["model"], p.key["context"]) for p in pairs if p.metric.name == "decode"]
    sizes = (128, 1024, 4096)
    assert slopes == [(m, n) for m in ("gpt-oss-20b", "Qwen3-32B") for n in sizes]


def test_an_engine_of_other_settings_is_refused_by_their_names():
    """One setup and two engines; an arm of another stack is farther and not the reason."""
    values = {"engine_id": "1", "engine_gpu_memory_utilization": 0.94}
    ours = row(A, {"e2e_s": [1.0]}, values, stack="vllm", engine="1")
    theirs = row(B, {"e2e_s": [1.0]}, values | {"engine_id": "2"}, stack="vllm", engine="2")
    farther = row(B, {"e2e_s": [1.0]}, stack="graph")
    low = replace(theirs, values=theirs.values | {"engine_gpu_memory_utilization": 0.9})
    told = (
        "B has it with engine gpu memory utilization 0.9 instead of 0.94: a ratio would mix causes"
    )
    assert reason([ours], [farther, low]) == told
    assert (
        reason([ours], [theirs]) == "B has it with engine 2 instead of 1: a ratio would mix causes"
    )
