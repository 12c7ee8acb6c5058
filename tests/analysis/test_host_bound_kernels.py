"""Kernels of a decode step: the longest first, what is left in one line, shares that add up."""

import pytest

from lib.analysis import host_bound
from lib.records.record import Record
from tests.samples.records import key

US = 1e-6


def busy(times, context=128, stack="hf-eager", missing=None):
    values = {"decode_kernel_times": times} if times else {}
    return Record("busy", key("m", context=context, stack=stack), {}, values, missing or {})


def lines(*rows):
    return [
        [cell if isinstance(cell, int | str) else pytest.approx(cell.value) for cell in row]
        for row in host_bound.kernel_table(rows).rows
    ]


def test_launches_times_and_shares():
    """Two products of 30 us and four sums of 10 us: 60 and 40 of 100 us."""
    row = busy([["product", 2.0, 60 * US], ["sum", 4.0, 40 * US]])
    assert lines(row) == [["m", 128, "product", 2, 30, 60, 0.6], ["m", 128, "sum", 4, 10, 40, 0.4]]


def test_what_is_not_shown_is_one_line_and_shares_add_up():
    times = [[f"kernel {n}", 1.0, (20 - n) * US] for n in range(host_bound.KERNELS_SHOWN + 3)]
    table = host_bound.kernel_table([busy(times)])
    assert len(table.rows) == host_bound.KERNELS_SHOWN + 1
    assert table.rows[-1][2] == "3 others" and table.rows[-1][3].value == 3
    assert table.rows[-1][5].value == pytest.approx(10 + 9 + 8)
    assert sum(row[-1].value for row in table.rows) == pytest.approx(1)


def test_the_longest_context_of_each_setup_is_shown():
    rows = [
        busy([["a", 1.0, US]]),
        busy([["b", 1.0, US]], context=512),
        busy([["c", 1.0, US]], stack="graph"),
        busy(None, context=2048),
    ]
    assert [(row[1], row[2]) for row in host_bound.kernel_table(rows).rows] == [
        (512, "b"),
        (128, "c"),
    ]


def test_without_a_profile_the_reason_is_shown():
    reason = "the device is a CPU: host and device are one"
    blind = busy(None, missing={"decode_kernel_times": reason})
    assert host_bound.kernel_tables([blind]) == []
    assert host_bound.kernel_table([blind]).notes == (reason,)
    assert host_bound.kernel_table([]).notes == ("no profiled call",)
    older = busy(None)
    assert "before" in host_bound.kernel_table([older]).notes[0]
