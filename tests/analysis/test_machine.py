"""Ceilings beside the datasheet: ratios, what is missing, and what cannot be."""

import pytest

from lib.analysis import machine
from lib.files import ParamsError
from lib.hardware.datasheets import VALUES, datasheet, datasheets
from lib.records.record import KEY_FIELDS, Record, environment_record
from lib.show import figure
from tests.samples.records import GPU

H100 = environment_record(GPU)
CPU = environment_record({"gpu": None, "cpu": "Some CPU", "copy_bytes_per_s": 1e10})
SAMPLES = {
    "copy_bytes_per_s, 64 bytes": [2.0e12, 2.68e12],
    "read_bytes_per_s, sum": [2.5e12, 3.015e12],
    "read_bytes_per_s, rows": [2.0e12, 2.1e12],
    "matmul_flop_per_s, 8 x 8 x 8": [4.947e14, 4.0e14],
    "launch_s": [6e-6, 5e-6],
}
VALUES_OF = {
    "copy_bytes_per_s": 2.68e12,
    "read_bytes_per_s": 3.015e12,
    "read_shape": "sum",
    "matmul_flop_per_s": 4.947e14,
    "launch_s": 5e-6,
}


def row(env=H100, values=VALUES_OF, missing=None):
    return Record(
        "ceilings",
        dict.fromkeys(KEY_FIELDS),
        SAMPLES,
        dict(values),
        missing or {},
        env_id=env.env_id,
    )


def by_ceiling(table):
    return {line["ceiling"]: line for line in table.frame().to_dict("records")}


def test_each_ceiling_stands_beside_the_datasheet_with_the_ratio():
    table = machine.table([H100, row()])
    lines = by_ceiling(table)
    stream = lines["read, best shape"]
    columns = ("best measured", "worst of them", "datasheet")
    assert [stream[column] for column in columns] == pytest.approx([3015, 2500, 3350])
    assert stream["measured / datasheet"] == pytest.approx(0.9)  # 3,015 of 3,350 GB/s
    assert lines["matrix product, bfloat16"]["measured / datasheet"] == pytest.approx(0.5)
    launch = lines["launch of one kernel"]
    assert (launch["best measured"], launch["worst of them"]) == pytest.approx(
        (5, 6)
    )  # microseconds
    assert "no reading" in lines["single thread of the host"]["missing"]
    assert "the best reading shape is sum; datasheet: NVIDIA H100 product page" in table.notes[0]


def test_without_a_datasheet_its_columns_are_left_out_with_the_reason():
    table = machine.table([CPU, row(CPU)])
    assert "datasheet" not in [c.title for c in table.columns]
    assert not [
        name for name in table.frame().columns if name.startswith(("datasheet", "measured /"))
    ]
    assert "no datasheet is kept for processors" in " ".join(table.notes)


def test_a_ceiling_above_the_datasheet_is_named():
    assert machine.violations([H100, row()]) == []
    (sentence,) = machine.violations([H100, row(values={**VALUES_OF, "read_bytes_per_s": 3.4e12})])
    assert sentence == "read_bytes_per_s 3.4e+12 is above the datasheet's 3.35e+12"
    assert machine.violations([CPU, row(CPU)]) == []


def test_limits_are_the_cards_own_and_otherwise_the_copy():
    old = environment_record({**GPU, "driver": "another", "copy_bytes_per_s": 2e12})
    limits = machine.limits([H100, old, CPU, row()])
    for env in (H100, old):  # two environments of one card
        one = limits[env.env_id]
        assert (one.read_bytes_per_s, one.read_from) == (3.015e12, "best read stream")
        assert (one.matmul("bfloat16"), one.matmul("float32")) == (4.947e14, None)
        assert one.cache_bytes == 50 * 2**20  # the datasheet's, as these rows have none
    cpu = limits[CPU.env_id]
    assert (cpu.read_bytes_per_s, cpu.read_from, cpu.cache_bytes) == (1e10, "copy", None)


def test_the_conclusion_is_computed():
    text = machine.conclusion([H100, row()])
    assert "memory is read at 3,015 GB/s at best, 90% of the datasheet's value (sum)." in text
    assert "runs at 494.7 TFLOP/s, 50% of the datasheet's value." in text
    assert "1,000 tiny kernels takes 5.000 ms" in text
    bare = machine.conclusion(
        [CPU, row(CPU, {**VALUES_OF, "launch_s": None}, {"launch_s": "nothing is queued on a CPU"})]
    )
    assert "No datasheet beside it" in bare and "tiny kernels" not in bare


def test_the_figure_shows_every_shape_and_the_datasheet():
    text = figure.describe(machine.figure([H100, row()]))
    assert text == (
        "Bandwidth by shape; arms against GB/s (10^9 bytes a second). copy: 64 bytes: 2,680. "
        "read: sum: 3,015. read: rows: 2,100. datasheet: 3,350."
    )
    assert figure.describe(machine.figure([])).endswith("not measured")


# --- datasheets


def test_the_papers_card_and_ours_are_listed():
    nvl = datasheet("NVIDIA H100 NVL")
    assert nvl.memory_bytes == 94 * 10**9 and nvl.memory_bytes_per_s > 3.9e12
    assert datasheet("NVIDIA H100 80GB HBM3").tdp_w == 700


@pytest.mark.parametrize("gpu", datasheets())
def test_a_listed_card_is_plausible_and_has_its_source(gpu):
    sheet = datasheets()[gpu]
    assert sheet.source and sheet.date and gpu.startswith("NVIDIA ")
    rate = sheet.bf16_flop_per_s / sheet.memory_bytes_per_s
    assert 50 < rate < 500  # operations a byte: more would be a rate with sparsity
    assert 0.005 < sheet.memory_bytes / sheet.memory_bytes_per_s < 0.1  # seconds to read it all
    assert sheet.cache_bytes is None or 2**22 < sheet.cache_bytes < 2**28


def test_an_unknown_card_and_a_part_of_one_have_no_values():
    for gpu in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Radeon"):
        sheet = datasheet(gpu)
        assert all(getattr(sheet, name) is None for name in VALUES)
        assert set(sheet.missing.values()) == {f"{gpu!r} is not in params/gpus.yaml"}
    assert "processors" in datasheet(None).missing["tdp_w"]


GOOD = """
X:
  memory_bytes_per_s: 1.0e+12
  bf16_flop_per_s: 1.0e+14
  memory_bytes: 1000
  cache_bytes: null
  tdp_w: 100
  source: [a document]
  date: "2026-01-01"
  missing: {cache_bytes: not printed}
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("tdp_w: 100", "tdp_v: 100", "did you mean 'tdp_w'"),
        ("  tdp_w: 100\n", "", "lacks tdp_w"),
        ("tdp_w: 100", "tdp_w: null", "a null needs its reason"),
        ("cache_bytes: null", "cache_bytes: 5", "a number must have none"),
        ("memory_bytes: 1000", "memory_bytes: about", "needs a whole number or null"),
        ("1.0e+14", "1e14", "ambiguous"),
        ("[a document]", "[]", "name a source"),
    ],
)
def test_the_file_is_read_strictly(tmp_path, old, new, message):
    path = tmp_path / "gpus.yaml"
    path.write_text(GOOD)
    assert datasheet("X", path).missing == {"cache_bytes": "not printed"}
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ParamsError, match=message):
        datasheets(path)
