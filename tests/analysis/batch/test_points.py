"""Reading rows of growing batches, by numbers that a reader can check.

A made line: at batch b all sequences together decode RATES[b] tokens a second, the prefill takes a
second, and the board draws 400 W while it decodes and 500 J for the prefill of each sequence.
"""

from types import SimpleNamespace

import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt

from lib.analysis.batch import figures, points, tables
from lib.records.record import Record, environment_record, select
from lib.show import figure
from tests.samples.records import key

ENV = environment_record({"gpu": "G", "copy_bytes_per_s": 1e11})
RATES = {1: 100.0, 2: 190.0, 4: 350.0, 8: 500.0, 16: 560.0}
GB = 10**9


def line(rates, stack="hf-eager", model="m", watts=400.0, windows=2, **changes):
    """Rows of one stack; each value has repetitions that differ by some thousandths."""
    rows = []
    for batch, rate in rates.items():
        where = {"stack": stack, "batch": batch, "context": 512, **changes}
        for tokens in (16, 48):
            seconds = tokens * batch / rate
            joules = watts * (tokens - 1) * batch / rate + 500 * batch
            times = [1 + seconds * factor for factor in (0.999, 1.0, 1.001)]
            rows.append(
                Record(
                    "batch",
                    key(model, new_tokens=tokens, **where),
                    {"e2e_s": times},
                    {"decode_bytes": GB * (1 + 0.1 * batch), "decode_experts": "x"},
                    env_id=ENV.env_id,
                )
            )
            rows.append(
                Record(
                    "batch-energy",
                    key(model, new_tokens=tokens, **where),
                    {"energy_j": [joules * f for f in (0.9999, 1.0001)[:windows]]},
                    {},
                    {} if windows else {"energy_j": "no NVML"},
                    env_id=ENV.env_id,
                )
            )
        values = {
            "decode_bytes": GB,
            "decode_bytes_realised": 2 * GB,
            "decode_experts": "x",
            "experts_chosen_decode": 2.0 * batch,
            "experts_touched_decode": 8.0,
        }
        rows.append(Record("trace", key(model, new_tokens=None, **where), {}, values))
    return [ENV, *rows]


def failed(batch, stack="hf-eager", model="m"):
    where = key(model, new_tokens=16, batch=batch, stack=stack, context=512)
    return Record("batch", where, error="OutOfMemoryError: CUDA", env_id=ENV.env_id)


def of(rows, batch):
    (point,) = [p for p in points.points(rows) if p.batch == batch]
    return point


# --- before measuring


def test_what_a_batch_is_expected_to_read_and_to_allow():
    """Two of four experts, three of two tokens; 3 GB of other weights; 1 GB of cache for each."""
    card = SimpleNamespace(
        experts=4,
        experts_touched=lambda batch: 4 * (1 - 0.5**batch),
        decode_bytes=lambda context, batch: GB * (3 + 2 * (1 - 0.5**batch) + batch * context / 100),
    )
    table = tables.expected(card, 100, [1, 2], 1e11).frame()
    assert list(table["experts of a layer"]) == [2, 3]
    assert list(table["a step reads (GB)"]) == [5, 6.5]
    assert list(table["bound of all (tok/s)"]) == pytest.approx([20, 200 / 6.5])  # 2 x 100 / 6.5
    card.experts = 0
    assert "experts of a layer" not in tables.expected(card, 100, [1], 1e11).frame()


# --- one point


def test_throughput_of_all_and_of_each_is_the_slope():
    point = of(line(RATES), 4)
    assert point.total.value == pytest.approx(350, rel=1e-2)
    assert point.per_user.value == pytest.approx(87.5, rel=1e-2)
    assert point.total.low < 350 < point.total.high


def test_energy_of_a_token_is_the_slope_and_of_a_call_has_the_prefill():
    """400 W / 350 tok/s; a call of 4 x 48 tokens has 2,000 J of prefill and 47 steps of 4."""
    point = of(line(RATES), 4)
    assert point.token_j.value == pytest.approx(400 / 350, rel=5e-3)
    assert point.token_j.low < 400 / 350 < point.token_j.high
    assert point.tokens_per_j.value == pytest.approx(350 / 400, rel=5e-3)
    expected = (2000 + 47 * 4 * 400 / 350) / 192
    assert point.call_token_j.value == pytest.approx(expected, rel=1e-3)
    assert point.call_token_j.low < expected < point.call_token_j.high


def test_one_window_of_each_length_gives_no_interval():
    point = of(line(RATES, windows=1), 4)
    assert point.token_j.value == pytest.approx(400 / 350, rel=5e-3)
    assert (point.token_j.low, point.call_token_j.low) == (None, None)


def test_energy_that_noise_hides_is_not_resolved():
    """The longer calls took less."""
    point = of(line(RATES, watts=-400.0), 4)
    assert point.token_j.value is None and "noise hides" in point.token_j.reason
    assert point.call_token_j.value is not None
    assert points.front([point]) == []


def test_experts_and_bandwidth_are_those_of_the_trace():
    """350 tok/s are 87.5 steps a second of 1.4 GB, and of one GB more as traced; 100 GB/s."""
    point = of(line(RATES), 4)
    assert (point.experts("chosen").value, point.experts("touched").value) == (8.0, 8.0)
    assert point.mbu(realised=False).value == pytest.approx(87.5 * 1.4 / 100, rel=1e-2)
    assert point.mbu(realised=True).value == pytest.approx(87.5 * 2.4 / 100, rel=1e-2)


# --- the knee


def test_the_knee_is_where_doubling_pays_less():
    """190/100 and 350/190 are more than 1.5, 500/350 = 1.43 is less."""
    knee = points.knee(points.points(line(RATES)))
    assert knee.batch == 4
    assert knee.gain.value == pytest.approx(500 / 350, rel=2e-2)


def test_a_later_doubling_does_not_move_the_knee():
    assert points.knee(points.points(line(RATES | {32: 1200.0}))).batch == 4


def test_a_doubling_that_noise_hides_is_no_knee_where_a_further_one_pays():
    """260/190 = 1.37, give or take a third; then 700/260 = 2.7 pays, and 800/700 surely not."""
    noisy = line({4: 260.0})
    for row in select(noisy, "batch"):
        row.samples["e2e_s"] = [f * t for t in row.samples["e2e_s"] for f in (0.7, 1, 1.3)]
    rows = [*line({1: 100.0, 2: 190.0}), *noisy]
    ends = points.knee(points.points(rows))
    assert ends.batch == 2 and not ends.gain.resolved_from(points.GAIN)
    assert points.knee(points.points([*rows, *line({8: 700.0, 16: 800.0})])).batch == 8


def test_no_doubling_paid():
    assert points.knee(points.points(line({1: 100.0, 2: 140.0, 4: 280.0}))).batch == 1


def test_a_knee_that_is_not_reached_says_what_was_seen_last():
    rows = line({1: 100.0, 2: 190.0, 4: 350.0})
    knee = points.knee(points.points(rows))
    assert knee.batch is None
    assert knee.reason.startswith("not reached: doubling to 4 still raised it 1.8")
    assert points.knee(points.points([*rows, failed(8)])).reason.endswith("; batch 8 failed")


def test_batches_that_are_no_doublings_have_no_knee():
    knee = points.knee(points.points(line({1: 100.0, 3: 120.0})))
    assert knee.reason == "not reached: no batch and its double were measured"


# --- the front


def test_the_front_by_hand():
    """Of a model: (100, .25), (95, .475), (87.5, .875), (62.5, 1.25), (35, 1.4) tokens a second for
    a user and a joule on one stack. On the other (120, .24), (60, .24): the first is the fastest of
    all, the second is beaten by three. Another model is no rival."""
    rows = [
        *line(RATES),
        *line({1: 120.0, 2: 120.0}, "graph", watts=500.0),
        *line({1: 1.0}, model="other"),
    ]
    front = [(p.model, p.setup[2], p.batch) for p in points.front(points.points(rows))]
    assert sorted(front) == [
        *(("m", "graph", b) for b in (1,)),
        *(("m", "hf-eager", b) for b in (1, 2, 4, 8, 16)),
        ("other", "hf-eager", 1),
    ]


def test_a_slower_and_thirstier_stack_is_dominated_throughout():
    slow = line({b: r / 2 for b, r in RATES.items()}, "graph", watts=400.0)
    front = points.front(points.points([*line(RATES), *slow]))
    assert {p.setup[2] for p in front} == {"hf-eager"} and len(front) == 5


# --- table and sentences


def test_the_table_has_a_row_for_each_batch_and_marks_the_knee():
    lines = tables.table(line(RATES)).frame().to_dict("records")
    assert [(row["batch"], row["remark"]) for row in lines] == [
        (1, ""),
        (2, ""),
        (4, "knee"),
        (8, ""),
        (16, ""),
    ]
    row = lines[2]
    assert row["throughput of all (tok/s)"] == pytest.approx(350, rel=1e-2)
    assert row["TPOT (ms)"] == pytest.approx(1000 / 87.5, rel=1e-2)
    assert row["J/1K tokens, decode (J)"] == pytest.approx(400e3 / 350, rel=5e-3)
    assert (row["experts chosen"], row["experts read"]) == (8, 8)
    assert row["J/1K tokens, decode (J)_low"] < 400e3 / 350 < row["J/1K tokens, decode (J)_high"]
    notes = " ".join(tables.table(line(RATES)).notes)
    assert points.RULE in notes and "'G' is not in params/gpus.yaml" in notes
    part = Record("gate", {"model": "large"}, values={"first_layers": 8})
    told = "large: the logits of its first 8 layers alone were compared"
    assert told not in notes and told in tables.table([*line(RATES), part]).notes


def test_a_failed_batch_is_a_row_with_its_error():
    table = tables.table([*line({1: 100.0, 2: 190.0}), failed(4)])
    last = table.frame().to_dict("records")[-1]
    assert (last["batch"], last["remark"]) == (4, "OutOfMemoryError: CUDA")
    assert last["missing"].startswith("throughput of all: failed; of each user: failed;")


def test_without_a_counter_the_table_says_so_once():
    table = tables.table(line(RATES, windows=0))
    assert "J/1K tokens, decode" not in [c.title for c in table.columns]
    assert any(note.endswith("whole call: not measured: no NVML") for note in table.notes)


def test_no_rows_no_table():
    assert tables.tables([ENV]) == [] and figures.section([ENV]) == ""
    assert tables.conclusion([ENV]).startswith("- Knee: ")


def test_the_sentences():
    rows = [*line(RATES), failed(32), *line({1: 150.0, 2: 290.0}, "graph")]
    text = tables.conclusion(rows)
    assert "m (hf-eager) at 512 tokens of context: at batch 1 100.0 tok/s [" in text
    assert "; the most, at batch 16, 560.0 tok/s [" in text and "n = 6 in all and 35.00 for" in text
    assert "m (hf-eager), knee: batch 4: doubling it raised the throughput 1.4" in text
    assert "m (graph), knee: not reached: doubling to 2 still raised it 1.93" in text
    assert "m (hf-eager), batch 32: OutOfMemoryError: CUDA." in text
    assert "m (hf-eager), a decoded token: at batch 1 4.000 J [" in text
    assert "m (hf-eager): at batch 1 a step reads 8.000 experts of a layer, useful MBU 110%" in text
    assert "for one model: m (hf-eager), batch 4, 8, 16; m (graph), batch 1, 2." in text
    assert points.RULE[1:] in text and "None" not in text and "nan" not in text


def test_a_gain_near_the_rule_is_said_to_be_unresolved():
    rows = line({1: 100.0, 2: 149.9})
    assert "which is not resolved from 1.5 ([1.4" in tables.conclusion(rows)


# --- figures


def test_the_knee_is_ringed_and_the_axis_has_the_batches():
    ax = figures.throughput(line(RATES))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    (ring,) = [x for x in ax.get_lines() if x.get_label() == "m, knee"]
    assert ring.get_xdata()[0] == 4 and ring.get_ydata()[0] == pytest.approx(350, rel=1e-2)
    assert "m, knee: 35" in figure.describe(ax)
    plt.close(ax.figure)


def test_dominated_points_are_faint_and_numbered_by_batch():
    slow = line({b: r / 2 for b, r in RATES.items()}, "graph", watts=400.0)
    ax = figures.pareto([*line(RATES), *slow])
    numbers = [x for x in ax.get_lines() if str(x.get_marker()).startswith("$")]
    assert [x.get_marker() for x in numbers] == [f"${b}$" for b in RATES] * 2
    assert [x.get_alpha() for x in numbers] == [1] * 5 + [0.3] * 5
    assert "m (graph): " in figure.describe(ax)
    plt.close(ax.figure)


def test_without_energy_the_pareto_figure_says_so():
    ax = figures.pareto(line(RATES, windows=0))
    assert [text.get_text() for text in ax.texts] == ["not measured"]
    plt.close(ax.figure)


def test_the_section_holds_both_figures_and_the_table():
    page = BeautifulSoup(str(figures.section(line(RATES))), "html.parser")
    assert page.h2["id"] == "batch"
    assert len(page.find_all("svg", class_="figure")) == 2 and page.find(id="grid-batch")
    assert "knee" in page.find(id="grid-batch").get_text()
