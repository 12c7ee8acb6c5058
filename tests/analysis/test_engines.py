"""An engine's rows beside those of our own stacks: arithmetic that a reader can do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.analysis import bounds, engines, routers
from lib.analysis.batch import points, users
from lib.analysis.rows import Rows
from lib.analysis.setups import by_setup
from lib.models.formats import FORMS, held_as
from lib.models.load import card
from lib.records.record import Record, environment_record, warning
from tests.samples.records import key, spread

ENV = environment_record({"gpu": "NVIDIA H100 80GB HBM3", "device": "cuda"})
E = ENV.env_id
MODEL = "gpt-oss-20b"
VLLM = {"stack": "vllm", "engine": "a1b2c3", "experts": "Triton", "attention": "FLASH_ATTN"}


def calls(median_s: float, kind: str = "latency", n: int = 11, **changes) -> Record:
    """Calls of one length around a median."""
    name = "ttft_s" if changes.get("new_tokens") == 1 else "e2e_s"
    return Record(kind, key(MODEL, **changes), {name: spread(median_s, n)}, env_id=E)


def both(theirs_s: float, ours_s: float, **changes) -> list[Record]:
    ours = {"stack": "graph-compiled"} | changes
    return [calls(theirs_s, **VLLM | changes), calls(ours_s, **ours)]


def test_the_best_of_ours_stands_beside_the_engine():
    """64 tokens in 1.0 s and in 0.8 s: 64 and 80 tok/s, a ratio of 0.8."""
    rows = [ENV, *both(1.0, 0.8), calls(2.0, stack="graph"), calls(4.0)]
    (one,) = [b for b in engines.beside(rows) if b.what == "output throughput"]
    assert (one.stack, one.engine, one.batch, one.context) == ("graph-compiled", "vllm", 1, 2048)
    assert one.theirs.value == pytest.approx(64) and one.ours.value == pytest.approx(80)
    assert one.ratio.value == pytest.approx(0.8) and one.faster == engines.OURS
    text = engines.conclusion(rows)
    assert text.startswith("- Ours is faster, or needs less energy. gpt-oss-20b, output")
    assert "vLLM 64.00 against 80.00 tok/s of graph-compiled (0.8" in text


@pytest.mark.parametrize(
    ("theirs_s", "ours_s", "n", "faster"),
    [(0.5, 1.0, 11, engines.THEIRS), (1.0, 1.0, 11, engines.EVEN), (0.5, 1.0, 3, "")],
)
def test_who_is_faster_is_said_by_the_interval(theirs_s, ours_s, n, faster):
    rows = [ENV, calls(theirs_s, n=n, new_tokens=1, **VLLM), calls(ours_s, n=n, new_tokens=1)]
    (one,) = engines.beside(rows)
    assert one.what == "TTFT" and one.faster == faster
    lead = {engines.THEIRS: "- vLLM is", engines.EVEN: "- Not told", "": "- Not judged"}[faster]
    assert engines.conclusion(rows).startswith(lead)


def test_rows_that_warn_do_not_say_who_is_faster():
    noisy = (warning("spread", "repetitions spread over 22% of their median"),)
    theirs, ours = both(0.5, 1.0)
    earlier = replace(ours, others=(replace(ours, warnings=noisy, visit="1"),), visit="2")
    for rows in ([replace(theirs, warnings=noisy), ours], [theirs, earlier]):
        (one,) = [b for b in engines.beside([ENV, *rows]) if b.what == "output throughput"]
        assert one.faster == "" and one.ratio.low > 1
        assert engines.table([ENV, *rows]).rows[0][-2] == "a row warns of spread"
        assert engines.conclusion([ENV, *rows]).startswith("- Not judged")
    several = [*batch(0.1, 0.01, 8, **VLLM), *batch(0.1, 0.02, 8, stack="graph")]
    (one,) = engines.beside([ENV, *several])
    assert one.faster == engines.THEIRS
    (one,) = engines.beside([ENV, *(replace(r, warnings=noisy) for r in several)])
    assert one.faster == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "mxfp4"},
        {"weights": "checkpoint"},
        {"weights": "random-dummy"},
        {"context": 512},
        {"new_tokens": 65},
    ],
)
def test_unlike_is_not_set_beside(changes):
    rows = [ENV, calls(1.0, **VLLM | changes), calls(0.8, stack="graph-compiled")]
    assert engines.beside(rows) == []


def test_generate_stands_for_no_whole_call_of_ours():
    """A place that no captured step was measured at is no place where the engine is faster."""
    assert engines.beside([ENV, calls(1.0, **VLLM), calls(9.0, stack="hf-eager")]) == []


def batch(first_s: float, step_s: float, size: int, **changes) -> list[Record]:
    """Two lengths of a batch, 8 and 24 tokens, by a line."""
    return [
        calls(first_s + n * step_s, "batch", batch=size, context=512, new_tokens=n, **changes)
        for n in (8, 24)
    ]


def gate(size: int, **changes) -> Record:
    place = {"batch": size, "context": 512, "new_tokens": 4} | changes
    return Record("gate", key(MODEL, **place), {"relative_error": [0.01]}, env_id=E)


def test_a_batch_without_a_gate_is_a_lead():
    """8 users at 0.01 s a step are 800 tok/s; ours do 400."""
    ours = batch(0.1, 0.02, 8, stack="graph-compiled")
    rows = [ENV, *batch(0.1, 0.01, 8, **VLLM), *ours]
    (one,) = engines.beside(rows)
    assert one.lead and one.batch == 8
    assert (one.theirs.value, one.ours.value) == (pytest.approx(800), pytest.approx(400))
    assert engines.LEAD in engines.conclusion(rows)
    assert [p.gated for p in points.points(rows)] == [True, False]
    assert not engines.beside([*rows, gate(8, **VLLM)])[0].lead
    other_engine = gate(8, **VLLM | {"engine": "ffffff"})
    assert engines.beside([*rows, other_engine])[0].lead
    failed = Record("gate", gate(8, **VLLM).key, error="GateError: other logits", env_id=E)
    assert engines.beside([*rows, failed])[0].lead


def test_a_lead_is_on_no_front():
    joules = [
        Record(
            "batch-energy",
            key(MODEL, batch=8, context=512, new_tokens=n, **VLLM),
            {"energy_j": [n * 1.0] * 3},
            env_id=E,
        )
        for n in (8, 24)
    ]
    rows = [ENV, *batch(0.1, 0.01, 8, **VLLM), *joules]
    assert points.front(points.points(rows)) == []
    assert len(points.front(points.points([*rows, gate(8, **VLLM)]))) == 1


def trace(size: int, experts: float, **changes) -> Record:
    place = {"batch": size, "context": 512, "new_tokens": 17} | VLLM | {"engine": "t"} | changes
    return Record("engine-trace", key(MODEL, **place), {"distinct_experts": [experts]}, env_id=E)


def test_throughput_hangs_on_the_router():
    """Stand-in weights read 4 experts, drawn ones 20; an even router 21.0 of 32 for 8 users. A card
    of another number format that was recorded later is none of these rows'."""
    dummy = {"weights": "random-dummy"}
    full = Record("card", key(MODEL), values=card(MODEL).as_dict(), env_id=E)
    less = held_as(card(MODEL), FORMS["mxfp4"]).as_dict()
    other = Record("card", key(MODEL, dtype="mxfp4"), values=less, env_id=E)
    speed = Record("ceilings", key(MODEL), values={"read_bytes_per_s": 3e12}, env_id=E)
    rows = [ENV, full, other, speed, trace(8, 20.0), trace(8, 4.0, **dummy)]
    rows += [*batch(0.1, 0.01, 8, **VLLM), *batch(0.1, 0.004, 8, **VLLM | dummy)]
    by_how = {one.how: one for one in routers.routed(rows)}
    assert by_how["drawn"].total.value == pytest.approx(800)
    assert by_how["collapsed"].total.value == pytest.approx(2000)
    assert by_how["collapsed"].experts.value == 4 and by_how["drawn"].experts.value == 20
    even = 32 * (1 - (28 / 32) ** 8)
    assert by_how["balanced"].experts.value == pytest.approx(even)
    size = card(MODEL).decode_bytes(512, 8)
    assert by_how["balanced"].total.value == pytest.approx(8 * 3e12 / size)
    assert "2.500 times, so that stand-in weights say nothing" in engines.conclusion(
        [*rows, *both(1.0, 0.8)]
    )
    arms = {arm.setup[0]: arm for arm in bounds.arms(rows, "batch")}
    assert arms["random"].step_bytes == card(MODEL).decode_bytes(512 + 12, 8, 20.0)
    assert arms["random-dummy"].step_bytes == card(MODEL).decode_bytes(512 + 12, 8, 4.0)


@pytest.mark.parametrize(
    ("dtypes", "forms"), [(("bfloat16",), [""]), (("bfloat16", "mxfp4"), [" bfloat16", " mxfp4"])]
)
def test_each_number_format_has_a_bound_of_its_own(dtypes, forms):
    """What the bytes of bfloat16 allow is no bound of MXFP4."""
    full = Record("card", key(MODEL), values=card(MODEL).as_dict(), env_id=E)
    speed = Record("ceilings", key(MODEL), values={"read_bytes_per_s": 3e12}, env_id=E)
    rows = [ENV, full, speed, *(trace(size, 20.0) for size in (4, 8))]
    for dtype in dtypes:
        rows += [r for size in (4, 8) for r in batch(0.1, 0.01, size, **VLLM, dtype=dtype)]
    names = [line.get_label() for line in users.figure(rows).lines]
    bounds = [f"{MODEL}{form}, bound" for form in forms]
    assert [name for name in names if name.endswith("bound")] == bounds


def test_the_first_token_is_told_by_device_host_and_bound():
    """TTFT 200 ms, of which the device works 150: 50 are the host's."""
    busy = Record("busy", key(MODEL, new_tokens=9), values={"prefill_busy_s": 0.15}, env_id=E)
    rows = [ENV, calls(0.2, new_tokens=1), busy, calls(0.05, new_tokens=1, **VLLM)]
    grid = engines.prefill(rows)
    titles = [column.title for column in grid.columns]
    lines = {
        line[titles.index("stack")]: dict(zip(titles, line, strict=True)) for line in grid.rows
    }
    ours = lines["hf-eager"]
    assert ours["device time of the first token"].value == pytest.approx(150)
    assert ours["TTFT less the device's time"].value == pytest.approx(50)
    text = engines.conclusion([*rows, calls(0.2, new_tokens=1, n=3)])
    assert "sooner by 50.00 of 200.0 ms at 2,048 tokens; the rest is the device's" in text
    assert "no profiled call" in lines["vllm"]["device time of the first token"].reason


def test_engines_that_differ_are_two_setups():
    """Their rows answer different questions: nothing is pooled over them."""
    slow = VLLM | {"engine": "ddeeff"}
    rows = Rows([ENV, calls(1.0, **VLLM), calls(2.0, **slow)])
    assert {rows.setup(r)[2] for r in rows if r.key} == {"vllm a1b2c3", "vllm ddeeff"}
    untimed = Record("engine-trace", key(MODEL, **slow), {"distinct_experts": [4.0]}, env_id=E)
    rows = Rows([ENV, calls(1.0, **VLLM), untimed])
    assert {rows.setup(r)[2] for r in rows if r.key} == {"vllm"}


def test_a_set_without_an_engine_has_no_such_section():
    rows = [ENV, calls(1.0), calls(0.2, new_tokens=1)]
    assert engines.tables(rows) == [] and engines.section(rows) == ""
    assert engines.conclusion(rows) == ""


def test_the_names_of_its_kernels_do_not_crowd_a_legend():
    rows = [ENV, calls(1.0, **VLLM), calls(1.0, **VLLM | {"dtype": "mxfp4", "experts": "Marlin"})]
    labels = {g.label for g in by_setup(rows, "latency")}
    assert not any("experts" in label for label in labels) and len(labels) == 2
