"""Tables, figures and conclusions about energy, from rows of a fake board and of a real H100."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from lib.analysis.energy import conclusions, figures, quantities, tables
from lib.analysis.metrics import METRICS
from lib.files import ROOT
from lib.measure.energy import instrument, sweep
from lib.records import store
from lib.records.record import Record, environment_record
from lib.show import figure
from lib.stacks.registry import STACKS
from tests.fakes.board import Board, BoardDevice, BoardModel
from tests.fakes.device import opened
from tests.samples.records import key

ENV = environment_record({"gpu": "Fake GPU"})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Rows and their folder: a model of 100 J of prefill and 15 J a token, with 2 % of jitter."""
    folder = tmp_path_factory.mktemp("energy")
    rng = np.random.default_rng(0)
    device = BoardDevice(Board(idle_w=110.0, noise_w=2.0, phase_s=0.02))
    model = BoardModel(device, jitter=lambda: 1 + 0.02 * rng.standard_normal())
    path = folder / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STACKS, "hf-eager", opened("hf-eager", model.open_stack))
        rows = [
            ENV,
            *instrument.characterise(
                model,
                seconds=4.0,
                env_id=ENV.env_id,
                records_path=path,
                load=lambda seconds: device.work(seconds, 600.0),
            ),
        ]
        rows += sweep.sweep(
            model,
            contexts=[128, 512],
            new_tokens=21,
            block_contexts=[512],
            repeats=6,
            other_repeats=1,
            slope_tokens=[1, 41],
            slope_repeats=2,
            window_s=8.0,
            idle_s=5.0,
            sampler_pairs=6,
            seed=0,
            env_id=ENV.env_id,
            records_path=path,
        )
    return rows, folder


def weights_row(value, samples):
    return Record("energy-weights", key("m", weights=f"random-{value}"), {"energy_j": samples})


# --- tables


def test_the_energy_table_has_gross_net_and_the_other_estimators(study):
    table = tables.table(study[0]).frame()
    row = table[table["context"] == 512].iloc[0]
    per_1k = 1e3 * (100 + 15 * 20) / 21
    assert row["J/1K tokens (J)"] == pytest.approx(per_1k, rel=0.01)
    assert row["J/1K, net of idle (J)"] == pytest.approx(per_1k - 110 * 1.2 / 21 * 1e3, rel=0.02)
    assert row["J/1K, average power (J)"] == pytest.approx(per_1k, rel=0.02)
    assert row["tokens per joule (1/J)"] * row["J/1K tokens (J)"] == pytest.approx(1e3, rel=1e-3)
    assert row["mean power (W)"] == pytest.approx(400 / 1.2, rel=0.01)
    assert row["J/1K tokens (J)_low"] < per_1k * 1.01 and row["J/1K tokens (J)_n"] == 6
    assert not any("watt" in column.lower() for column in table.columns)


def test_prefill_and_token_are_apart(study):
    line = tables.parts(study[0]).frame().iloc[0]
    assert line["new tokens"] == "1, 21, 41"
    assert line["prefill and first token (J)"] == pytest.approx(100, rel=0.01)
    assert line["each further token (J)"] == pytest.approx(15, rel=0.01)
    for name, joules in (("prefill and first token", 100), ("each further token", 15)):
        assert line[f"{name} (J)_low"] < 1.01 * joules and line[f"{name} (J)_high"] > 0.99 * joules


def test_uncertainty_keeps_statistical_and_systematic_apart(study):
    table = tables.uncertainty(study[0]).frame().set_index("context")
    many, one = table.loc[512], table.loc[128]
    assert many["blocks"] == 6 and one["blocks"] == 1
    assert 0 < many["spread of blocks, CV (%)"] < 1 and 0 < many["statistical ± (%)"] < 1
    assert np.isnan(one["statistical ± (%)"])  # one block tells no spread
    assert many["sensor gain, assumed ± (%)"] == 5
    assert abs(many["halves against whole (%)"]) < 0.3
    assert many["weight values ± (%)"] is None


def test_every_gate_is_listed_at_its_worst(study):
    table = tables.gates(study[0]).frame().set_index("gate")
    assert {
        "agreement",
        "sampler_gap",
        "throttled",
        "clock_drift",
        "foreign_process",
        "sampler_disturbs",
    } <= {*table.index}
    assert set(table["worst"]) <= {"ok", "warn", "unknown"}
    assert table.loc["agreement", "worst"] == "ok" and "%" in table.loc["agreement", "worst value"]


def test_the_instrument_table_has_a_row_for_each_readout(study):
    table = tables.instrument(study[0]).frame().set_index("readout")
    assert [*table.index] == ["energy counter", "instant power", "average power"]
    assert table["refresh (ms)"].tolist() == pytest.approx([100] * 3, rel=0.01)
    assert table.loc["average power", "mean of (s)"] == 1.0
    spread = "spread over phases (%)"
    assert table.loc["energy counter", spread] < 10 < table.loc["instant power", spread]


@pytest.mark.parametrize(
    "table",
    [
        tables.instrument,
        tables.gates,
        tables.parts,
        tables.uncertainty,
        tables.weights,
        tables.peer,
    ],
)
def test_a_table_without_rows_gives_a_reason(table):
    assert not table([ENV]).rows and table([ENV]).notes[0]


def test_weight_values_are_paired_by_block_and_bound_the_systematic_term():
    rows = [weights_row("normal", [100.0, 102.0, 104.0]), weights_row("zero", [95.0, 96.9, 98.8])]
    table = tables.weights(rows).frame().set_index("weights")
    assert table.loc["normal", "energy / normal"] == 1
    assert table.loc["zero", "energy / normal"] == pytest.approx(0.95)
    assert quantities.weight_spread(rows) == pytest.approx(0.05)
    assert quantities.weight_spread(rows[:1]) is None
    assert quantities.uncertainty(Record("energy"), 0.05).weights == 0.05
    sentence = "Energy of m with zero weights: 0.95 times that of normal ones [0.95, 0.95], lower."
    assert sentence in conclusions.checks(rows)


def test_a_peer_is_compared_window_by_window():
    samples = {
        "ours_long_j": [100.0, 100.0],
        "zeus_long_j": [101.0, 100.5],
        "long_s": [10, 10.4],
        "ours_short_j": [10.0],
        "zeus_short_j": [9.0],
        "short_s": [1.6],
    }
    row = Record("energy-peer", key("m"), samples)
    table = tables.peer([row]).frame().set_index("windows")
    assert table.loc["long", "worst difference (%)"] == pytest.approx(1)
    assert table.loc["short", "median difference (%)"] == pytest.approx(-10)
    text = conclusions.checks([row])
    assert "Zeus on 1 windows of 1.600 s: median -10.00%, at most -10.00%" in text


# --- conclusions


def test_the_conclusion_has_parts_and_uncertainty(study):
    text = conclusions.conclusion(study[0])
    assert "fake at 512 tokens: 19," in text and "n = 6 (GPU board, gross), of which 33%" in text
    assert "512 tokens: prefill and first token 99." in text.replace("token 100.", "token 99.")
    assert "each further token 15.0" in text.replace("token 14.9", "token 15.0")
    assert "95 % over blocks ±" in text and "assumed and not measured, ±5%" in text
    assert "gCO2e" not in text


def test_carbon_only_where_an_intensity_is_given_and_with_all_three_factors():
    """3.6 MJ are one kWh: 1 kWh x 1.5 x 400 g/kWh = 600 g."""
    footprint = quantities.carbon(3.6e6, 1.5, 400.0)
    assert (footprint.kwh, footprint.grams) == (1.0, 600.0)
    assert quantities.carbon(3.6e6, 1.5, None) is None
    row = Record("energy", key("m", new_tokens=10), {"energy_j": [36.0] * 6})
    text = conclusions.conclusion([row], 1.5, 400.0)
    # 3.6 J a token: one million tokens are 3.6 MJ
    assert "m, one million tokens: 1 kWh x PUE 1.5 x 400 g/kWh = 600 gCO2e." in text
    assert "gCO2e" not in conclusions.conclusion([row], 1.5)


def test_net_energy_may_be_negative_and_is_not_cut_off():
    row = Record("energy", key("m"), {"energy_j": [90.0], "net_energy_j": [-10.0]})
    assert METRICS["j_per_1k_net"].of([row]).value == -10 / 64 * 1e3
    (cells,) = tables.table([row]).rows
    assert any(getattr(cell, "value", None) == pytest.approx(-10 / 64 * 1e3) for cell in cells)
    unknown = Record("energy", key("m"), {"energy_j": [90.0]}, missing={"net_energy_j": "no idle"})
    assert METRICS["j_per_1k_net"].of([unknown]).reason == "not measured: no idle"


def test_effects_of_weight_values_need_no_idle_power():
    """Gross joules against gross joules; as measured, idling is not part of that check."""
    none = dict.fromkeys(("idle_w", "net_energy_j"), "idling was not measured")
    arms = {"normal": [100.0, 102.0, 98.0], "zero": [80.0, 81.6, 78.4]}
    rows = [
        Record(
            "energy-weights",
            key("m", weights=f"random-{value}"),
            {"energy_j": joules},
            missing=none,
        )
        for value, joules in arms.items()
    ]
    lost = Record("energy-weights", key("m", weights="random-tiny"), missing={"energy_j": "stall"})
    effects = quantities.weight_effects([*rows, lost])
    assert {value: ratio.value for value, ratio in effects.items()} == {
        "normal": 1.0,
        "zero": pytest.approx(0.8),
    }
    assert quantities.weight_spread(rows) == pytest.approx(0.2)


def test_blocks_of_one_length_draw_no_line_and_the_reason_is_told():
    good = Record("energy", key("m", new_tokens=64), {"energy_j": [90.0] * 3})
    bad = Record("energy-slope", key("m", new_tokens=128), missing={"energy_j": "sampler_gap: 2 s"})
    for estimate in quantities.split([good, bad]):
        assert estimate.reason == "not measured: blocks of one length only; sampler_gap: 2 s"


def test_blocks_that_are_not_believed_are_said():
    values = {
        "blocks": 4,
        "invalid_blocks": ["counter_reset: the counter went backwards"],
        "window_energy_j": 100.0,
        "window_s": 1.0,
    }
    row = Record("energy", key("m"), {"energy_j": [90.0] * 3}, values)
    assert "m: 1 of 4 blocks are not believed, counter_reset: " in conclusions.conclusion([row])


# --- figures


def test_figures_say_what_they_show(study):
    rows, folder = study
    trace = figures.recorded(rows, folder)
    drawn = [
        figures.instrument(rows, folder),
        figures.estimator_error(trace),
        figures.parts(rows),
        figures.blocks(rows),
    ]
    alts = [figure.describe(ax) for ax in drawn]
    assert all(name in alts[0] for name in ("counter:", "instant:", "average:"))
    assert all(f"{title}, worst phase" in alts[1] for title, _ in quantities.ERRORS.values())
    assert "context 512" in alts[2] and "context 128" in alts[3]
    plt.close("all")


def test_without_a_trace_figures_say_not_measured(tmp_path):
    rows = [ENV, Record("energy", key("m"), missing={"energy_j": "no counter"})]
    trace = figures.recorded(rows, tmp_path)
    drawn = [
        figures.instrument(rows, tmp_path),
        figures.estimator_error(trace),
        figures.parts(rows),
        figures.blocks(rows),
    ]
    assert all("not measured" in figure.describe(ax) for ax in drawn)
    assert {ax.figure.get_figheight() for ax in drawn} == {figure.EMPTY_IN}  # no large empty frames
    plt.close("all")


def test_errors_shrink_with_the_window_except_that_of_the_papers_estimator():
    """A real trace, with a prefill every few seconds."""
    trace = store.read_trace(ROOT / "tests" / "data" / "h100-gpt-oss-20b-2048.jsonl.gz")
    errors = quantities.estimator_errors(trace, (0.4, 3.2), starts=20)
    worst = {name: {s: max(map(abs, e)) for s, e in by.items()} for name, by in errors.items()}
    assert worst["two_j"][3.2] < 0.06 < worst["two_j"][0.4]  # one tick of 32, and of 4
    assert worst["instant_j"][3.2] < worst["instant_j"][0.4]
    assert worst["paper_j"][3.2] > 0.05  # still
