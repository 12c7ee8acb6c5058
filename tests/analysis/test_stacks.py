"""What several stacks of one model say, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.analysis import latency, stacks
from lib.records.record import Record
from tests.samples.records import key

FAST = {"stack": "graph", "cache": "static"}


def arm(context, new_tokens, seconds, size=100, prepare=0.0, **changes):
    values = {"decode_bytes": size, "prepare_s": prepare}
    return Record(
        "latency",
        key("m", context=context, new_tokens=new_tokens, **changes),
        {"e2e_s": seconds},
        values,
    )


def test_flatness_is_set_against_the_bytes():
    """0.1 s and 0.125 s a token: 20 % lost; 80 and 100 bytes: 20 % explained."""
    arms = [
        arm(128, 10, [2.0] * 3, 80),
        arm(128, 20, [3.0] * 3, 80),
        arm(4096, 10, [3.0] * 3, 100),
        arm(4096, 20, [4.25] * 3, 100),
    ]
    text = stacks.flatness(arms)
    assert "loses 20.0%" in text and "would cost 20.0%: the bytes explain it" in text
    slower = [*arms[:3], arm(4096, 20, [4.5] * 3, 100)]  # 0.15 s: 33.3 %
    assert "loses 33.3%" in stacks.flatness(slower)
    assert "more than the bytes explain" in stacks.flatness(slower)
    assert stacks.flatness(arms[:2]) == ""


def test_a_stack_stands_beside_generate():
    rows = [
        arm(128, 10, [2.0] * 3),
        arm(128, 20, [4.0] * 3),
        arm(128, 10, [1.0, 1.01], prepare=3.0, **FAST),
        arm(128, 20, [1.5, 1.51], **FAST),
    ]
    text = stacks.conclusion(rows)
    assert "m (hf-eager): decode at 128 tokens of context 5.000 tok/s" in text
    assert "20.00 tok/s" in text and "4.000 times hf-eager" in text
    assert "spread by at most 1.0%" in text and "first capture took 3.000 s, later ones 0 s" in text


def test_decode_steps_timed_on_the_device_stand_beside_the_slope():
    """9 steps in 0.45 s and 19 in 0.95 s are 20 tokens a second, whatever the calls took."""
    rows = [arm(128, 10, [1.0, 1.3], **FAST), arm(128, 20, [1.5, 1.5], **FAST)]
    marked = [
        replace(rows[0], samples=rows[0].samples | {"decode_s": [0.45, 0.4545]}),
        replace(rows[1], samples=rows[1].samples | {"decode_s": [0.95, 0.95]}),
    ]
    text = stacks.conclusion(marked)
    assert "by slope, 20.00 tok/s" in text and "by the device's clock" in text
    assert "calls of one length spread by at most 26.1%; their decode steps" in text
    assert "their decode steps spread by at most 1.0%" in text
    assert "clock" not in stacks.conclusion(rows)
    line = latency.table(marked).frame().iloc[0]
    assert line["decode by device clock (tok/s)"] == pytest.approx(20)


def test_a_stack_that_failed_is_named_with_its_error():
    failed = Record("latency", key("m", context=64, new_tokens=8, **FAST), error="GateError: wrong")
    text = stacks.conclusion([arm(128, 10, [2.0]), failed])
    assert "m (graph) at 64 tokens: GateError: wrong." in text


def test_what_the_harness_costs():
    row = Record(
        "harness",
        key("m", context=64, new_tokens=8, **FAST),
        {"e2e_s": [1.001] * 6, "bare_s": [1.0] * 6},
    )
    assert "+0.10%" in stacks.harness(row) and "within 0.5%" in stacks.harness(row)
    dear = Record("harness", row.key, {"e2e_s": [1.02] * 6, "bare_s": [1.0] * 6})
    assert "more than 0.5%" in stacks.harness(dear)
    noisy = Record("harness", row.key, {"e2e_s": [1.0, 1.1] * 3, "bare_s": [1.1, 1.0] * 3})
    assert "not resolved from 0.5%" in stacks.harness(noisy)
    one = Record("harness", row.key, {"e2e_s": [1.001], "bare_s": [1.0]})
    assert stacks.harness(one) == (
        "m on graph: a call takes +0.10% against a bare loop in the same process; not judged, "
        "n = 1: an interval needs n >= 2."
    )


def test_a_check_of_the_first_layers_alone_is_told_at_the_table():
    def gate(model, **values):
        where = key(model, context=512, batch=8, new_tokens=4, stack="vllm")
        return Record("gate", where, {"relative_error": [0.03]}, values)

    whole, part = gate("m"), gate("large", first_layers=8)
    told = "large: the logits of its first 8 layers alone were compared"
    assert told in stacks.gates([whole, part]).notes
    assert not any("first" in note for note in stacks.gates([whole]).notes)
