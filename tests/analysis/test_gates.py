"""Times of a stack stand only where its check of logits shows enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.analysis import gates, rows
from lib.analysis.rows import Rows
from lib.files import ROOT
from lib.records.record import KEY_FIELDS, Record

PLACE = dict.fromkeys(KEY_FIELDS) | {
    "model": "m", "weights": "random", "dtype": "bfloat16", "stack": "graph-compiled",
    "experts": "grouped_mm", "attention": "eager", "context": 512, "batch": 8,
}  # fmt: skip
PINNED = {"pinned_experts": 4, "pinned_sets": 8, "allowed_error": 0.0765}


def gate(errors, **values):
    key = PLACE | {"new_tokens": len(errors)} | values.pop("key", {})
    return Record("gate", key, samples={"relative_error": errors}, values=values)


def timed(kind="batch", key=None, **values):
    samples = {"e2e_s": [1.0, 1.1], "energy_j": [200.0, 210.0]}
    return Record(kind, PLACE | {"new_tokens": 16} | (key or {}), samples, values)


def read(*records):
    """The last of the records, as the reading side sees it."""
    return Rows(records).records[-1]


STANDS = {
    "pinned, each sequence to its own": [gate([0.02, 0.03], **PINNED)],
    "dense, as far as 60 layers round": [gate([0.101, 0.103], key={"experts": "none"})],
    "not pinned, and found so little that no expert turned": [gate([0.02] * 4, allowed_error=1.5)],
    "an earlier check that shows enough": [gate([0.02], **PINNED), gate([0.5, 0.4])],
    "a later check that shows enough": [gate([0.5, 0.4]), gate([0.02], **PINNED)],
    "one set, and free routers that show it": [
        gate([0.02], **PINNED | {"pinned_sets": 1}, free_mean_error=0.01)
    ],
    "a check of another batch alone": [gate([0.5], key={"batch": 4})],
    "no check": [],
}
FALLS = {
    "found what unrelated logits differ by": [gate([0.67] * 4, allowed_error=1.05)],
    "allowed 1.5 and found 0.43": [gate([0.43] * 4, allowed_error=1.5)],
    "just above": [gate([0.101, 0.101], **PINNED)],
    "dense, further than rounding": [gate([0.13], key={"experts": "none"})],
    "not a number": [gate([float("nan")], **PINNED)],
    "no error": [gate([], **PINNED)],
    "all sequences pinned alike": [gate([0.02], **PINNED | {"pinned_sets": 1})],
    "pinned alike, from before sets were counted": [gate([0.02], pinned_experts=4)],
    "pinned alike, and free routers that hide it": [
        gate([0.02], **PINNED | {"pinned_sets": 1}, free_mean_error=0.3)
    ],
}


@pytest.mark.parametrize("case", STANDS)
def test_times_stand_where_a_check_shows_enough(case):
    own = {"experts": STANDS[case][0].key["experts"]} if STANDS[case] else {}
    row = timed(key=own)
    assert read(*STANDS[case], row) is row


@pytest.mark.parametrize("case", FALLS)
@pytest.mark.parametrize("kind", ["batch", "latency", "batch-energy", "energy", "busy"])
def test_times_are_withheld_with_a_reason_where_no_check_does(case, kind):
    own = {"experts": FALLS[case][0].key["experts"]}
    found = read(*FALLS[case], timed(kind, own, decode_busy_s=0.1, window_energy_j=5.0, blocks=2))
    assert found.samples == {} and found.values == {"blocks": 2}
    assert found.error.startswith("times withheld: ") and found.error.endswith("measure it again")


def test_other_rows_of_the_place_and_other_stacks_stay():
    wrong = gate([0.67] * 4, allowed_error=1.05)
    for row in (timed("trace"), timed("memory"), timed(key={"stack": "hf-eager"})):
        assert read(wrong, row) is row


@pytest.mark.parametrize(("mean", "stands"), [(0.02, True), (0.12, False)])
def test_a_row_with_a_check_of_its_own_is_judged_by_that(mean, stands):
    row = timed("ablation-stack", {"batch": 1}, gate_mean_error=mean, gate_allowed_error=0.93)
    assert (read(row).error is None) == stands


def test_a_row_that_failed_keeps_its_own_reason():
    failed = Record("batch", PLACE | {"new_tokens": 16}, error="OutOfMemoryError: 80 GB")
    assert read(gate([0.67]), failed) is failed


def test_in_the_released_set_the_mixtures_batches_wait_for_another_check():
    """Of GPT-OSS: compiled ones at every batch, captured ones from 8 on; no dense times."""
    found = rows.load(ROOT / "outputs/released/h100-sxm")
    withheld = [r for r in found if (r.error or "").startswith("times withheld")]
    batches = {
        (r.key["stack"], r.key["batch"]) for r in withheld if r.kind in ("batch", "batch-energy")
    }
    assert {r.key["model"] for r in withheld} <= {"gpt-oss-20b"}
    for stack, batch in batches:
        checks = [
            gates.doubt(r.key, r.values, r.samples["relative_error"])
            for r in found.of_kinds("gate")
            if (r.key["stack"], r.key["batch"], r.key["model"]) == (stack, batch, "gpt-oss-20b")
            and r.key["context"] == 512
        ]
        assert checks and all(checks)


def of_visits(earlier, later):
    """Two rows of one arm as the merge hands them over: the later one carries the other visit."""
    named = replace(earlier, visit="monday")
    return replace(later, visit="friday", others=(named,))


def test_each_visit_is_judged_by_its_own_check():
    good, bad = gate([0.02], **PINNED), gate([0.5, 0.4])
    for first, second, left in ((good, bad, "monday"), (bad, good, "friday")):
        row = read(of_visits(first, second), of_visits(timed(), timed()))
        assert row.error is None and (row.visit, row.others) == (left, ())
    row = read(of_visits(good, good), of_visits(timed(), timed()))
    assert row.error is None and [other.visit for other in row.others] == ["monday"]
    row = read(of_visits(bad, bad), of_visits(timed(), timed()))
    assert gates.is_withheld(row) and row.others == ()


def test_a_visit_without_a_check_is_judged_by_that_of_another():
    named = replace(gate([0.02], **PINNED), visit="friday")
    row = read(named, of_visits(timed(), timed()))
    assert row.error is None and len(row.others) == 1
    assert gates.is_withheld(
        read(replace(gate([0.5]), visit="friday"), of_visits(timed(), timed()))
    )


@pytest.mark.parametrize(
    ("found", "dtype", "experts", "values", "stands"),
    [
        (0.47, "fp8", "none", {"layers_at_once": 8}, True),  # what rounding leaves of a block
        (0.72, "fp8", "none", {"layers_at_once": 8}, False),
        (0.47, "fp8", "none", {}, False),  # all layers together: nobody can tell
        (0.47, "bfloat16", "none", {"layers_at_once": 8}, False),  # does not round so
        (0.47, "fp8", "TRITON", {"layers_at_once": 8}, False),  # turned experts
    ],
)
def test_a_block_of_layers_in_fp8_may_be_off_by_what_fp8_rounds(
    found, dtype, experts, values, stands
):
    key = PLACE | {"stack": "vllm", "dtype": dtype, "experts": experts}
    assert bool(gates.doubt(key, values, [found] * 8)) != stands


@pytest.mark.parametrize(("stack", "stands"), [("graph", False), ("vllm", True)])
def test_an_engine_may_be_pinned_to_one_set_of_experts(stack, stands):
    """Its routers are pinned for all sequences at once, and its experts are in wide use; of ours
    the experts of one sequence given to all would not show."""
    key = PLACE | {"stack": stack, "batch": 8, "experts": "TRITON"}
    assert bool(gates.doubt(key, {"pinned_experts": 4}, [0.03] * 4)) != stands
