"""The memory ledger: its sum by hand, when it closes, and what older rows lack."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from lib.analysis.memory import figures, ledger, tables
from lib.records.record import Record, environment_record
from lib.show import figure
from lib.studies import kv_contribution
from tests.samples.records import CPU, GPU, card, key, memory

ENV = environment_record(GPU)
MIB = 2**20
# 40,000 weights and 100 after first use; at the peak 3,000 above: of the cache 500 and 40 behind
# windows, 1,900 of the experts, 60 that the allocator added, the rest activations. 700 reserved
# beyond the peak, 450 of context; NVML says 44,260.
VALUES = {
    "weight_bytes": 40_000, "baseline_bytes": 40_100, "peak_bytes": 43_100,
    "requested_baseline_bytes": 40_000, "requested_peak_bytes": 42_940, "reserved_bytes": 43_800,
    "context_bytes": 450, "used_bytes": 44_260, "used_source": "NVML, this process",
    "peak_in": "prefill experts", "kv_peak_bytes": 500, "kv_peak_behind_bytes": 40,
    "expert_workspace_bytes": 1_900, "decode_expert_workspace_bytes": 7, "logits_bytes": 800,
    "kv_tensor_bytes": 520, "kv_card_bytes": 520, "workspace_bytes": 1_680,
    "predicted_bytes": 2_940,
}  # fmt: skip


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def row(
    kind="memory-paper", model="gpt-oss-20b", context=2048, missing=None, error=None, **changes
):
    """A row of VALUES, sizes in bytes; a value of None takes it away."""
    fields = {name: changes.pop(name) for name in [*changes] if name in ("experts", "dtype")}
    values = {n: v for n, v in (VALUES | changes).items() if v is not None}
    return Record(
        kind,
        key(model, context=context, **fields),
        {},
        values,
        missing or {},
        error,
        env_id=ENV.env_id,
    )


def test_the_parts_add_up_to_context_and_reserved():
    book = ledger.ledger(row())
    assert book.parts == {
        "weights": 40_000,
        "first_use": 100,
        "kv": 500,
        "kv_behind": 40,
        "logits": 0,
        "experts": 1_900,
        "activations": 3_000 - 500 - 40 - 1_900 - 60,
        "padding": 60,
        "slack": 700,
        "context": 450,
    }
    assert book.sum_bytes == 43_800 + 450  # whatever the split, what is reserved and the context
    assert (book.residual_bytes, book.closed, book.open_reason) == (10, True, "")


@pytest.mark.parametrize(
    ("used", "closed"), [(44_250, True), (44_696, True), (44_698, False), (43_700, False)]
)
def test_it_closes_to_one_percent_of_what_nvml_says(used, closed):
    """44,250 / 0.99 = 44,696.97, and 44,250 / 1.01 = 43,811.9."""
    assert ledger.ledger(row(used_bytes=used)).closed is closed


@pytest.mark.parametrize(
    ("where", "logits", "experts"),
    [
        ("prefill", 0, 0),
        ("prefill experts", 0, 1_900),
        ("prefill logits", 800, 0),
        ("decode", 800, 0),
        ("decode experts", 800, 7),
    ],
)
def test_logits_and_experts_count_where_they_are_alive(where, logits, experts):
    book = ledger.ledger(row(peak_in=where))
    assert (book.parts["logits"], book.parts["experts"]) == (logits, experts)
    assert book.parts["activations"] == 3_000 - 500 - 40 - 60 - logits - experts
    assert book.sum_bytes == 44_250


def test_a_figure_that_nvml_does_not_give_leaves_it_open_with_the_reason():
    reason = "2 processes share this GPU, and none is told apart"
    book = ledger.ledger(row(used_bytes=None, context_bytes=None, missing={"used_bytes": reason}))
    assert (book.sum_bytes, book.residual_bytes, book.closed) == (None, None, None)
    assert book.open_reason == reason
    assert book.parts["slack"] == 700  # what is known is kept


def test_rows_of_before_have_the_parts_that_they_tell_and_a_reason_for_the_rest():
    rows = [card("gpt-oss-20b", ENV.env_id), *memory("gpt-oss-20b", ENV.env_id, [2048])]
    old, book = ledger.of_rows(rows)[0]
    assert book.parts["weights"] == 40_000 * MIB  # from the card
    assert book.parts["first_use"] == old.values["baseline_bytes"] - 40_000 * MIB
    assert (book.parts["kv"], book.parts["logits"]) == (400 * MIB, 500 * MIB)
    assert book.parts["activations"] == 100 * MIB and book.parts["slack"] == 200 * MIB
    for name in ("experts", "kv_behind", "padding"):
        assert book.parts[name] is None
        assert book.reasons[name] == "not told apart from the activations"
    assert (book.parts["context"], book.closed) == (None, None)
    assert book.open_reason == ledger.OLD
    assert ledger.sentences(rows) == []


def test_a_dense_model_of_before_has_no_experts():
    rows = memory("yi-34b", ENV.env_id, [2048])
    (_, book), _ = ledger.of_rows(rows)
    assert book.parts["experts"] == 0
    assert book.parts["weights"] is None and book.open_reason == "no model card among the rows"


def test_a_cpu_says_what_it_does_not_report():
    cpu = environment_record(CPU)
    missing = {
        "reserved_bytes": "not reported",
        "used_bytes": "no NVML figure: the device is a CPU",
    }
    values = {n: v for n, v in VALUES.items() if n[:4] not in ("rese", "used", "cont", "requ")}
    book = ledger.ledger(Record("memory", key("m"), {}, values, missing, env_id=cpu.env_id))
    assert book.open_reason == "reserved memory: not reported"
    assert book.parts["activations"] == 3_000 - 500 - 40 - 1_900  # with what the allocator added
    assert book.reasons["context"] == "no NVML figure: the device is a CPU"


def test_a_cache_that_is_unknown_leaves_the_ledger_open():
    missing = {"kv_tensor_bytes": "layer 0 of the cache is a state"}
    book = ledger.ledger(
        row(peak_in=None, kv_tensor_bytes=None, workspace_bytes=None, missing=missing)
    )
    assert book.parts["activations"] is None
    assert book.open_reason == "layer 0 of the cache is a state"


def test_a_failed_arm_has_no_ledger_and_its_table_says_why():
    failed = Record("memory", key("m"), error="OutOfMemoryError", env_id=ENV.env_id)
    assert ledger.of_rows([failed]) == []
    (line,) = tables.parts([failed]).rows
    assert line[3].reason == "not measured: failed: OutOfMemoryError"


# --- tables


def table_row(table, **where):
    lines = table.frame()
    for name, value in where.items():
        lines = lines[lines[name] == value]
    assert len(lines) == 1
    return lines.iloc[0].to_dict()


def test_the_table_shows_parts_sum_figure_and_residual():
    line = table_row(tables.parts([row()]))
    assert line["KV cache (MB)"] == 0.0005 and line["weights (MB)"] == 0.04
    assert line["sum (MB)"] == 0.04425 and line["in use by NVML (MB)"] == 0.04426
    assert line["residual (MB)"] == pytest.approx(10 / 1e6)
    assert line["residual (%)"] == pytest.approx(100 * 10 / 44_260)
    assert (line["closed"], line["source"]) == ("yes", "NVML, this process")
    assert (line["peak in"], line["protocol"]) == ("prefill experts", "paper")


def test_predicted_beside_measured_and_asked_for():
    line = table_row(tables.predicted([row()]))
    assert line["measured / predicted"] == pytest.approx(3_000 / 2_940)
    assert line["asked for / predicted"] == pytest.approx(2_940 / 2_940)
    line = table_row(
        tables.predicted([row(predicted_bytes=None, missing={"predicted_bytes": "no shapes"})])
    )
    assert line["predicted (MB)"] is None
    assert "measured / predicted: not measured: no shapes" in line["missing"]


def sweep(window=None):
    """100 bytes a token, by the tensors and by the card, up to a window; both protocols."""
    rows = []
    for context in (100, 200, 400):
        for kind, less in (("memory-paper", 0), ("memory", 1)):
            tokens = min(context + 64 - less, window or 10**9)
            changes = {
                "kv_tensor_bytes": 100 * tokens,
                "kv_card_bytes": 100 * tokens,
                "peak_bytes": 40_100 + 7 * context,
            }
            rows.append(row(kind, context=context, **changes))
    return rows


def test_the_cache_grows_by_what_the_card_says_and_the_peak_by_more():
    line = table_row(tables.per_token(sweep()))
    assert line["KV held (B/token)"] == line["KV by the card (B/token)"] == 100
    assert (line["KV held (B/token)_low"], line["KV held (B/token)_high"]) == (100, 100)
    assert line["held = card to the byte"] == "6 of 6"
    assert line["peak, generate() (B/token)"] == 7
    assert line["KV held (B/token)_n"] == 6  # cached lengths


def test_a_window_bends_the_growth_and_one_byte_more_is_seen():
    rows = sweep(window=164)
    assert table_row(tables.per_token(rows))["KV held (B/token)"] < 50
    rows[0].values["kv_tensor_bytes"] += 1
    assert table_row(tables.per_token(rows))["held = card to the byte"] == "5 of 6"


def test_the_contribution_of_the_paper_is_taken_apart():
    published = {
        "models": {"GPT-OSS-20B": ["gpt-oss-20b"]},
        "released": {"kv_reported_mib/GPT-OSS-20B/2048": {"value": 2_000 / MIB}},
    }
    rows = [
        ENV,
        row(),
        row("memory"),
        row(context=128),
        row(model="other"),
        row(experts="all_experts", peak_bytes=42_100, expert_workspace_bytes=900),
    ]
    table = kv_contribution.contribution(rows, published)
    assert any(GPU["gpu"] in note for note in table.notes)
    assert len(table.rows) == 2  # the paper's protocol, its model, a context that it reports
    line = table_row(table, experts="grouped_mm")
    assert line["measured / published"] == pytest.approx(3_000 / 2_000)
    parts = [line[f"{n} (MiB)"] for n in ("KV cache", "logits", "experts", "rest")]
    assert parts == pytest.approx([500 / MIB, 0, 1_900 / MIB, 600 / MIB])
    assert sum(parts) == pytest.approx(line["peak above baseline (MiB)"])
    assert table_row(table, experts="all_experts")["measured / published"] == pytest.approx(1)


def test_the_papers_own_numbers_are_found():
    table = kv_contribution.contribution([row(context=c) for c in (128, 512, 1024, 2048)])
    lines = table.frame()
    published = pytest.approx([789.1, 1644, 3554], abs=0.5)
    assert list(lines["published (MiB)"]) == published
    assert any("from 512 on" in note for note in table.notes)


# --- sentences and the figure


def test_sentences_count_what_closes_and_what_shapes_predicted():
    rows = [row(), row(context=512, used_bytes=50_000), row("memory", predicted_bytes=3_000)]
    assert ledger.sentences(rows) == [
        "The memory ledger closes to 1% of what NVML says on 2 of 3 arms; the largest residual is "
        "0.00575 MB of 5e-05 GB (NVML, this process).",
        "Peaks above the baseline are 1.000 to 1.020 times what the shapes alone predict (3 arms).",
    ]
    assert ledger.sentences(rows)[0] in ledger.conclusion(rows)


def test_sentences_say_why_nothing_closes():
    rows = [row(used_bytes=None, predicted_bytes=None, missing={"used_bytes": "no NVML"})]
    assert ledger.sentences(rows) == ["The memory ledger is not closed: no NVML."]


def test_the_figure_stacks_everything_beside_the_weights():
    rows = [row(), row(context=512, used_bytes=None, missing={"used_bytes": "no NVML"})]
    ax = figures.memory_ledger(rows)
    drawn = {bars.get_label(): [bar.get_width() * 1e9 for bar in bars] for bars in ax.containers}
    assert drawn["experts"] == pytest.approx([1_900, 1_900])
    assert "weights" not in drawn and "logits" not in drawn  # none was alive at the peak
    ends = [bar.get_x() + bar.get_width() for bar in ax.containers[-1]]
    assert [end * 1e9 for end in ends] == pytest.approx([44_250 - 40_000] * 2)
    description = figure.describe(ax)
    assert "not closed: no NVML" in description and "+0.0 MB to NVML (+0.02%)" in description
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[1] == "gpt-oss-20b, 2048 (weights 4e-05 GB)"


def test_the_figure_without_rows_says_so():
    ax = figures.memory_ledger([])
    assert "not measured" in figure.describe(ax)


def test_a_figure_becomes_html_that_loads_nothing():
    text = figure.html(figures.memory_ledger([row()]), [row()])
    assert "<svg" in text and not {"src=", "http-equiv", "@import", "url(http"} & {*text.split()}
    assert not plt.get_fignums()
