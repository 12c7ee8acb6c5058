"""A second study by data: its file is whole, its numbers agree with arithmetic, and the audit, the
ledger and the tables follow it without a line of code that names it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.__main__ import main
from lib.files import read_yaml, resolve
from lib.hardware import datasheets
from lib.records.record import Record, environment_record
from lib.report import document
from lib.studies import audit, claims, forms, verdict
from lib.studies import study as studies_study
from lib.studies.paper_tables import paper_tables
from lib.studies.verdict import DIRECTION, UNTESTABLE
from tests.samples import records as sample

FILE = "params/published/arxiv-2605.30571.yaml"
ENV = environment_record(sample.GPU | {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-01"})
QWEN = "Qwen2.5-7B"


@pytest.fixture(scope="module")
def study():
    read_yaml(resolve(FILE))  # refuses repeated keys, and values that YAML misreads
    return studies_study.load(FILE)


def rows(step_ms: float = 16.0, graph_ms: float = 12.5, busy_s: float = 0.008) -> list[Record]:
    """Calls of two lengths on both stacks: a prefill of 50 ms, then so much for each token."""
    card = {"weight_bytes": 15231233024, "kv_bytes_per_token": 57344, "experts": 0,
            "active_params": 7070619136, "total_params": 7615616512}  # fmt: skip
    key = sample.key(QWEN, experts="none", context=2048)
    timed = [
        Record(
            "latency",
            key | {"stack": stack, "new_tokens": tokens},
            {"e2e_s": [(50 + tokens * ms) / 1e3] * 8},
            {"decode_bytes": 14.26e9},
            env_id=ENV.env_id,
        )
        for stack, ms in (("hf-eager", step_ms), ("graph", graph_ms))
        for tokens in (32, 96)
    ]
    busy = Record("busy", key | {"new_tokens": 9}, {}, {"decode_busy_s": busy_s}, env_id=ENV.env_id)
    return [ENV, Record("card", sample.key(QWEN), {}, card, env_id=ENV.env_id), *timed, busy]


def ledger(study, rows: list[Record]) -> dict[str, claims.Entry]:
    return {entry.name: entry for entry in claims.ledger(rows, study)}


def test_every_claim_has_a_test_of_known_names_or_a_reason(study):
    assert len(study.data["claims"]) == 14
    for name, claim in study.data["claims"].items():
        card = study.data["gpus"].get(claim.get("gpu"), {})
        assert "test" in claim or "reason" in claim or "reason" in card, name
        if "test" in claim:
            assert forms.metric_of(claim["test"]["metric"])
            assert claim["test"]["tolerance"] in verdict.TOLERANCES


def test_only_claims_about_the_h100_are_testable(study):
    entries = ledger(study, rows())
    testable = {"floor-share-h100", "launch-side-h100", "graphs-gain-h100"}
    assert {n for n, x in entries.items() if x.verdict.word != UNTESTABLE} == testable
    assert str(entries["l4-nf4"].verdict) == "not testable: no L4 can be measured here"
    assert "files were not at hand" in entries["valid-cells"].verdict.why


def test_one_session_decides_the_direction_of_a_gain_over_ten(study):
    """16 / 12.5 = 1.28 is within 10 % of 1.259; on ten days it would be reproduced."""
    entry = ledger(study, rows())["graphs-gain-h100"]
    assert entry.measured.protocol[QWEN].value == pytest.approx(1.28)
    assert entry.verdict.word == DIRECTION
    assert entry.verdict.why.startswith("1 session decides the direction only")
    turned = ledger(study, rows(graph_ms=20.0))["graphs-gain-h100"]
    assert turned.verdict.word == verdict.NOT
    data = study.data | {"claims": {"x": study.claim("graphs-gain-h100") | {"sessions": 1}}}
    assert ledger(replace(study, data=data), rows())["x"].verdict.word == verdict.REPRODUCED


def test_the_share_of_the_floor_and_of_the_device(study):
    """4.582 ms of 16 are 28.6 %, within 5 points of 27; 8 ms of work in 16 are a half."""
    entries = ledger(study, rows())
    share = entries["floor-share-h100"]
    assert share.measured.protocol[QWEN].value == pytest.approx(28.6, abs=0.05)
    assert share.measured.corrected[QWEN].value == pytest.approx(26.6, abs=0.05)  # 14.26 GB
    assert share.verdict.word == verdict.REPRODUCED
    busy = entries["launch-side-h100"]
    assert busy.measured.protocol[QWEN].value == pytest.approx(0.5)
    assert busy.verdict.word == verdict.REPRODUCED


def test_its_tables_beside_ours_and_other_cards_with_their_reason(study):
    tables = paper_tables(rows(), study.data)
    assert [t.number for t in tables] == [1, 8]
    cells = {(c.table, c.row, c.column): c for t in tables for c in t.cells}
    own = cells[1, "2048", "H100 SXM5"]
    assert own.measured.value == pytest.approx(0.286, abs=5e-4) and own.unit == "1"
    assert cells[1, "2048", "L4"].measured.reason == "no L4 can be measured here"
    assert cells[8, "H100 SXM5", "p50 unprofiled (ms)"].measured.value == pytest.approx(16)
    assert "no metric of this workbook" in cells[8, "H100 SXM5", "cpu/cuda"].measured.reason
    assert "no latency row at 4096" in cells[1, "4096", "H100 SXM5"].measured.reason


def test_the_audit_runs_its_arithmetic_and_says_what_had_no_data(study, capsys):
    findings = {f.id: f for f in audit.findings(study)}
    assert findings.keys() == {
        "floor-over-step", "one-model-reads-the-same-bytes", "l4-step-twice",
        "step-is-the-median", "interval-of-sessions",
    }  # fmt: skip
    assert "0.309 (H100 SXM5); the printed share is that of 16.97 ms" in (
        findings["floor-over-step"].follows
    )
    assert findings["step-is-the-median"].severity == "unchecked"
    assert main(["audit", "--study", FILE]) == 0
    assert "Rules checked: 8, of which 3 hold" in capsys.readouterr().out


def test_the_report_follows_the_study(study, tmp_path):
    """Without pieces of its own it has no ladder, and no table of licences."""
    jobs = tmp_path / "jobs"
    where = f"{QWEN}/random-hf-eager/latency"
    sample.write_job(jobs, where, rows()[1:], sample.GPU, model=QWEN, status="interrupted")
    text = document.write(jobs, tmp_path / "out", study=study).read_text(encoding="utf-8")
    assert 'id="table-8"' in text and "Tables 1 and 8 of" in text
    assert 'id="claim-graphs-gain-h100"' in text and 'id="ladder"' not in text
    assert f"Interrupted, so that cells may be missing: {QWEN} (latency)." in text
    assert len((tmp_path / "out" / "claims.csv").read_text(encoding="utf-8").splitlines()) == 15
    assert not (tmp_path / "out" / "tables" / "table-13.csv").exists()


def test_cards_are_those_of_the_datasheets_and_models_have_entries(study):
    for card in study.data["gpus"].values():
        assert datasheets.datasheet(card["name"]).memory_bytes_per_s, card
    assert study.entry("Qwen2.5-7B")[0] == "Qwen2.5-7B"
    assert study.entry("Llama-3.1-8B")[0] == "Llama-3.1-8B"
    with pytest.raises(studies_study.Absent, match="no entry of Mistral-7B"):
        study.entry("Mistral-7B")  # its version is not known


def test_the_interval_of_the_graph_gain_holds_its_value(study):
    claim = study.claim("graphs-gain-h100")
    assert float(claim["low"]) < float(claim["value"]) < float(claim["high"])
    assert claim["sessions"] == 10


def test_the_floor_of_the_headline_cell_by_hand(study):
    """15.231 GB of weights and 2,048 x 57,344 bytes of cache over 3.35 TB/s are 4.58 ms.

    Table 1's 0.270 is then a step of 16.97 ms; table 8's 14.83 ms would be 0.309.
    """
    held = study.data["counted"]["Qwen2.5-7B"]
    floor_ms = 1e3 * (held["weight_bytes"] + 2048 * held["kv_bytes_per_token"]) / 3.35e12
    assert floor_ms == pytest.approx(4.58, abs=0.005)
    share = study.value(1, "2048", "H100 SXM5")
    assert floor_ms / share == pytest.approx(16.97, abs=0.01)
    step_ms = study.value(8, "H100 SXM5", "p50 unprofiled (ms)")
    assert floor_ms / step_ms == pytest.approx(0.309, abs=0.0005)
    # On the L4 table and abstract agree: 15.35 GB over 0.3 TB/s is 51.2 ms, 0.81 of 62.96 ms.
    l4_ms = floor_ms * 3.35e12 / 3.0e11
    assert l4_ms / study.value(8, "L4", "p50 unprofiled (ms)") == pytest.approx(0.81, abs=0.005)


@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Llama-3.1-8B"])
def test_counts_are_those_of_the_model_card(study, model):
    models = pytest.importorskip("lib.models.load")
    card = models.card(model, "bfloat16")
    held = study.data["counted"][model]
    for name in ("total_params", "active_params", "lookup_params", "weight_bytes", "vocab_size"):
        assert held[name] == getattr(card, name), name
    assert held["kv_bytes_per_token"] == card.kv_bytes(1, cache="static")
