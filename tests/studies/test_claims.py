"""The claims ledger on rows whose numbers can be checked with a pencil (tests/samples)."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from functools import cache

import pytest

from lib.files import ParamsError
from lib.models.entries import models
from lib.records.record import Record, environment_record, warning
from lib.show import figure
from lib.show.table import words
from lib.studies import claims, evidence, governance, grids, paper_tables, verdict
from lib.studies.arxiv_2508_16700 import ladder, rankings, rules
from lib.studies.study import Published, load
from lib.studies.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE
from tests.samples import records as sample

ENV = environment_record(sample.GPU)
GPT, QWEN, YI = "GPT-OSS-20B", "Qwen3-32B", "Yi-34B"
CONTEXTS = (128, 512, 1024, 2048)


def base_rows() -> list[Record]:
    """Latency, memory, energy of the paper's models and the ablations of its own."""
    rows = [ENV]
    for model in sample.FACTORS:
        rows += [
            sample.card(model, ENV.env_id),
            *sample.latency(model, ENV.env_id, CONTEXTS),
            *sample.memory(model, ENV.env_id, CONTEXTS),
            *sample.energy(model, ENV.env_id, CONTEXTS),
        ]
    return rows + sample.ablations("gpt-oss-20b", ENV.env_id, (*CONTEXTS, 4096))


def all_rows() -> list[Record]:
    """With a captured step, traces, and every expert computed."""
    rows = base_rows() + sample.all_experts(ENV.env_id)
    for model in sample.FACTORS:
        rows += [*sample.captured(model, ENV.env_id), sample.trace(model, ENV.env_id)]
    return rows


@cache
def study() -> Published:
    return load()


def as_the_paper() -> list[Record]:
    """As the paper's software ran, with a captured step and traces."""
    rows = base_rows()
    for model in sample.FACTORS:
        rows += [*sample.captured(model, ENV.env_id), sample.trace(model, ENV.env_id)]
    return sample.as_the_paper(rows)


@cache
def ledger() -> dict[str, claims.Entry]:
    return {entry.name: entry for entry in claims.ledger(as_the_paper(), study())}


def of(rows: list[Record], name: str) -> claims.Entry:
    """One claim on other rows."""
    only = copy.deepcopy(study().data)
    only["claims"] = {name: only["claims"][name]}
    (entry,) = claims.ledger(rows, replace(study(), data=only))
    return entry


# --- a rule for each claim


def test_a_claim_has_a_test_in_its_entry_or_a_rule():
    entries = study().data["claims"]
    assert entries.keys() == EXPECTED.keys()
    assert rules.CLAIMS.keys() == {name for name, claim in entries.items() if "test" not in claim}
    assert all(rule.__doc__ for rule in rules.CLAIMS.values())


def test_a_claim_without_a_test_is_an_error():
    data = copy.deepcopy(study().data)
    data["claims"]["new"] = data["claims"]["hardware"]
    with pytest.raises(LookupError, match="'new' has no test in its entry"):
        claims.ledger(base_rows(), replace(study(), data=data))


def test_an_unknown_metric_is_named_with_the_nearest():
    data = copy.deepcopy(study().data)
    data["claims"]["ttft-higher"]["test"]["metric"] = "ttft_s"
    with pytest.raises(ParamsError, match="unknown metric 'ttft_s'; did you mean 'ttft_ms'"):
        claims.ledger(base_rows(), replace(study(), data=data))


RATE = 64 / 0.74  # tok/s of GPT-OSS at 2,048 tokens and 64 new ones
DROP = 100 * (1 - 0.64625 / 0.74)  # from 6.25 ms of prefill to 100 ms, beside 640 ms of decoding
# verdict, by protocol, by the corrected definition (None: it stands or was not measured)
EXPECTED = {
    "total-params": (REPRODUCED, {GPT: 21}, None),
    "active-params": (NOT, {GPT: 4}, {GPT: 16}),
    "active-share": (NOT, {GPT: 400 / 21}, {GPT: 1600 / 21}),
    "qwen-params": (NOT, {QWEN: 21}, {QWEN: 32}),  # 21 x 10^9 in the sample, 32 printed
    "yi-params": (NOT, {YI: 21}, {YI: 34}),
    "throughput-higher": (REPRODUCED, {QWEN: 2, YI: 4}, {QWEN: 2, YI: 4}),
    "ahead-at-2k": (REPRODUCED, {QWEN: 2, YI: 4}, {QWEN: 2, YI: 4}),
    "throughput-vs-qwen": (DIRECTION, {QWEN: 100}, {QWEN: 100}),
    "throughput-vs-yi": (DIRECTION, {YI: 300}, {YI: 300}),
    "ttft-higher": (NOT, {QWEN: 1 / 2, YI: 1 / 4}, None),
    "slows-with-context": (REPRODUCED, dict.fromkeys((GPT, QWEN, YI), 0.64625 / 0.74),
                           dict.fromkeys((GPT, QWEN, YI), 1)),
    "drop-gpt-oss": (DIRECTION, {GPT: DROP}, {GPT: 0}),
    "drop-qwen": (DIRECTION, {QWEN: DROP}, {QWEN: 0}),
    "drop-yi": (DIRECTION, {YI: DROP}, {YI: 0}),
    "prefill-dominates": (NOT, dict.fromkeys((GPT, QWEN, YI), 0.11 / 0.63),
                          dict.fromkeys((GPT, QWEN, YI), 0.11 / 0.64)),
    "ttft-trials": (NOT, {"": 1}, None),
    "decode-runs": (NOT, {"": 10}, None),
    "sampling-cost": (UNTESTABLE, {"Top-p (0.9)": 20, "Top-k (50)": 0,
                                   "High Temp": 100 * (1 - 1 / 1.02),
                                   "Low Temp": 100 * (1 - 1 / 1.02)}, None),
    "decoding-spread": (NOT, {"Top-p (0.9)": 20}, None),
    "decode-degrades": (UNTESTABLE, {"1024 after 512": 0.665 / 0.69, "2048 after 1024": 0.69 / 0.74,
                                     "4096 after 2048": 0.74 / 0.84}, {"2048 after 128": 1}),
    "drop-at-4k": (DIRECTION, {"": 100 * (1 - 0.665 / 0.84)}, None),
    "peak-lower": (REPRODUCED, {QWEN: 2 / 3, YI: 1 / 2}, {QWEN: 2 / 3, YI: 1 / 2}),
    "peak-vs-qwen": (DIRECTION, {QWEN: 100 / 3}, {QWEN: 100 / 3}),
    "peak-saving-qwen": (DIRECTION, {QWEN: 100 / 3}, {QWEN: 100 / 3}),
    "peak-saving-yi": (DIRECTION, {YI: 50}, {YI: 50}),
    "peak-gap-qwen": (NOT, {QWEN: 21.5}, {QWEN: 21500 * sample.MIB / 1e9}),
    "peak-gap-yi": (NOT, {YI: 43}, {YI: 43000 * sample.MIB / 1e9}),
    "baseline-gpt-oss": (NOT, {GPT: 42000 * sample.MIB / 1e9}, {GPT: 42000 * sample.MIB / 1e9}),
    "baseline-qwen": (REPRODUCED, {QWEN: 63.5}, {QWEN: 63500 * sample.MIB / 1e9}),
    "baseline-yi": (NOT, {YI: 85}, {YI: 85000 * sample.MIB / 1e9}),
    "saving-from-moe": (REPRODUCED, {QWEN: 42 / 63.5, YI: 42 / 85}, {QWEN: 42 / 63.5, YI: 42 / 85}),
    "kv-larger": (NOT, {QWEN: 1, YI: 1}, {QWEN: 1, YI: 1}),
    "decimal-units": (NOT, {QWEN: 64500 * sample.MIB / 63650, YI: 86000 * sample.MIB / 66459},
                      None),
    "hardware": (REPRODUCED, {"": 1}, None),
    "bf16-only": (NOT, {"": 1}, None),  # float16 failed, float32 ran
    "tokens-per-joule-higher": (REPRODUCED, {QWEN: 2, YI: 4}, {QWEN: 2, YI: 4}),
    "energy-lower": (REPRODUCED, {QWEN: 1 / 2, YI: 1 / 4}, {QWEN: 1 / 2, YI: 1 / 4}),
    "energy-vs-qwen": (DIRECTION, {QWEN: 50}, {QWEN: 50}),
    "energy-vs-yi": (DIRECTION, {YI: 75}, {YI: 75}),
    "tokens-per-joule-vs-qwen": (DIRECTION, {QWEN: 100}, {QWEN: 100}),
    "tokens-per-joule-vs-yi": (DIRECTION, {YI: 300}, {YI: 300}),
    "energy-rises": (UNTESTABLE, {f"{m}, {b} after {a}": 1 for m in (GPT, QWEN, YI)
                                  for a, b in ((128, 512), (512, 1024), (1024, 2048))},
                     {f"{m}, {b} after {a}": 1 for m in (GPT, QWEN, YI)
                      for a, b in ((128, 512), (512, 1024), (1024, 2048))}),
    "ape-higher": (REPRODUCED, {QWEN: 2 * 32 / 4, YI: 4 * 34 / 4}, {QWEN: 4, YI: 8.5}),
    "ape-throughput": (NOT, {GPT: RATE / 4}, {GPT: RATE / 16}),
    "ape-throughput-dense": (NOT, {QWEN: RATE / 2 / 32, YI: RATE / 4 / 34},
                             {QWEN: RATE / 2 / 32, YI: RATE / 4 / 34}),
    "ape-throughput-ratio": (DIRECTION, {QWEN: 16, YI: 34}, {QWEN: 4, YI: 8.5}),
    "ape-energy": (REPRODUCED, {GPT: 1 / 9 / 4}, {GPT: 1 / 9 / 16}),  # 9 J a token, 4 x 10^9
    "ape-energy-dense": (NOT, {QWEN: 1 / 18 / 32, YI: 1 / 36 / 34},
                         {QWEN: 1 / 18 / 32, YI: 1 / 36 / 34}),
    "ape-energy-ratio": (DIRECTION, {QWEN: 16, YI: 34}, {QWEN: 4, YI: 8.5}),
}  # fmt: skip


def values(estimates: dict) -> dict[str, float | None]:
    return {label: x.value for label, x in estimates.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_rule_of_a_claim(name):
    word, protocol, corrected = EXPECTED[name]
    entry = ledger()[name]
    assert values(entry.measured.protocol) == pytest.approx(protocol, abs=1e-9)
    if corrected is None:
        assert set(values(entry.measured.corrected).values()) == {None}
    else:
        assert values(entry.measured.corrected) == pytest.approx(corrected, abs=1e-9)
    assert entry.verdict.word == word
    assert entry.verdict.why or word == REPRODUCED
    every = [*entry.measured.protocol.values(), *entry.measured.bound.values()]
    assert all(x.reason for x in every if x.value is None)


def test_every_outcome_is_reached_and_counted():
    counts = claims.counts(list(ledger().values()))
    assert sum(counts.values()) == 49 and min(counts.values()) > 0
    assert claims.counts([]) == dict.fromkeys(counts, 0)


# --- the columns beside the protocol


def test_a_captured_step_gives_the_device_bound_column():
    entry = ledger()["throughput-higher"]  # 500, 125 and 31.25 tok/s
    assert values(entry.measured.bound) == pytest.approx({QWEN: 4, YI: 16})
    assert entry.verdicts["bound"].word == REPRODUCED
    # 500 tok/s on 16 x 10^9, against 125 on 32 and 31.25 on 34
    assert values(ledger()["ape-higher"].measured.bound) == pytest.approx({QWEN: 8, YI: 34})
    assert values(ledger()["peak-lower"].measured.bound) == {"": None}


def test_a_trace_of_a_batch_is_not_that_of_one_token():
    batch = sample.trace("gpt-oss-20b", ENV.env_id)
    batch = replace(batch, key=batch.key | {"batch": 4}, values={"active_params_realised": 20e9})
    corrected = of([*all_rows(), batch], "active-params").measured.corrected
    assert values(corrected) == {GPT: 16}
    failed = replace(batch, key=batch.key | {"batch": 1}, values={}, error="OutOfMemory: 4 GB")
    corrected = of([*base_rows(), failed], "active-params").measured.corrected
    assert corrected[GPT].reason == "not measured: OutOfMemory: 4 GB"


def test_the_compiled_stack_is_taken_where_more_models_have_it():
    rows = all_rows()
    compiled = [sample.captured(m, ENV.env_id, "graph-compiled") for m in ("gpt-oss-20b",)]
    some = evidence.gather(rows + compiled[0], study())
    assert some.bound_stack == "graph"
    rest = [
        r for m in ("qwen3-32b", "yi-34b") for r in sample.captured(m, ENV.env_id, "graph-compiled")
    ]
    assert evidence.gather(rows + compiled[0] + rest, study()).bound_stack == "graph-compiled"
    none = evidence.gather(base_rows(), study())
    assert none.bound_stack == "" and "no row on a stack" in none.bound[GPT].reason


def quiet(rows: list[Record]) -> list[Record]:
    """The rows without their warnings."""
    return [replace(r, warnings=()) for r in rows]


def test_the_verdict_is_on_the_implementation_of_the_papers_software():
    """43,000 + 1,000 MiB against 64,500 are 31.8 % less, the paper's 31.7; today's are 33.3 %."""
    entry = of(all_rows(), "peak-vs-qwen")
    assert values(entry.measured.protocol) == pytest.approx({QWEN: 100 * (1 - 44 / 64.5)})
    assert values(entry.measured.today) == pytest.approx({QWEN: 100 / 3})
    assert (entry.verdict.word, entry.verdicts["today"].word) == (REPRODUCED, DIRECTION)
    text = "computed every expert (2025-08-11); with grouped_mm, as the library of today runs them"
    assert f"{text}: direction only" in entry.cause
    line = claims.csv_rows(entry)[0]
    assert line["verdict_today"] == DIRECTION and line["today"].value == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    "name", ["energy-vs-qwen", "throughput-vs-qwen", "drop-gpt-oss", "sampling-cost", "bf16-only"]
)
def test_rows_of_other_experts_do_not_decide(name):
    """Without a row of every expert there is no verdict, and what today's rows say is shown."""
    entry = of(quiet(base_rows()), name)
    assert entry.verdict.word == UNTESTABLE
    assert "not measured with every expert computed" in entry.verdict.why
    assert all(x.value is not None for x in entry.measured.today.values())
    assert "with grouped_mm, as the library of today runs them: " in entry.cause


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (as_the_paper(), "peak-vs-qwen"),  # the rows are of every expert
        (all_rows(), "ape-energy-dense"),  # a dense model has no other experts
        (all_rows(), "baseline-qwen"),  # what is allocated before a call has none
        (all_rows(), "total-params"),
    ],
)
def test_where_experts_make_no_difference_there_is_one_column(rows, name):
    assert of(rows, name).measured.today == {}


def test_a_study_that_says_nothing_of_its_experts_is_tested_on_the_rows_as_they_are():
    data = copy.deepcopy(study().data)
    del data["sources"]["all-experts"]
    data["claims"] = {"peak-vs-qwen": data["claims"]["peak-vs-qwen"]}
    (entry,) = claims.ledger(all_rows(), replace(study(), data=data))
    assert values(entry.measured.protocol) == pytest.approx({QWEN: 100 / 3})


# --- rows that warn


def warned(rows: list[Record], code: str, **where) -> list[Record]:
    """The rows, one kind of them with a warning."""
    return [
        replace(r, warnings=(warning(code, "as said; and what to do"),))
        if all((r.kind if k == "kind" else r.key.get(k)) == v for k, v in where.items())
        else r
        for r in rows
    ]


@pytest.mark.parametrize("code", ["spread", "drift", "contradiction", "any-new-code"])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("throughput-vs-qwen", {"kind": "latency", "model": "qwen3-32b", "new_tokens": 64}),
        ("ttft-higher", {"kind": "latency", "model": "yi-34b", "new_tokens": 1}),
        ("energy-vs-qwen", {"kind": "energy", "model": "gpt-oss-20b"}),
        ("peak-vs-qwen", {"kind": "memory-paper", "model": "gpt-oss-20b"}),
        ("drop-yi", {"kind": "latency", "model": "yi-34b", "context": 128}),
        ("drop-at-4k", {"kind": "ablation-context", "context": 4096}),
        ("ape-throughput", {"kind": "latency", "model": "gpt-oss-20b", "new_tokens": 64}),
    ],
)
def test_a_row_that_warns_decides_nothing(name, where, code):
    rows = as_the_paper()
    clean, entry = of(rows, name), of(warned(rows, code, **where), name)
    assert clean.verdict.word != UNTESTABLE or name == "ttft-higher"
    assert entry.verdict.word in (UNTESTABLE, *([NOT] if name == "ttft-higher" else []))
    if entry.verdict.word == UNTESTABLE:
        assert f"the {where['kind']} row of " in entry.verdict.why
        assert f"warns of {code} (as said)" in entry.verdict.why
    shown = [values(x.measured.protocol) for x in (clean, entry)]
    assert shown[0] == shown[1]  # the number stays


def test_the_other_columns_and_the_rankings_are_not_decided_by_it_either():
    rows = warned(as_the_paper(), "drift", kind="latency", model="qwen3-32b", stack="graph")
    entry = of(rows, "throughput-vs-qwen")
    assert entry.verdict.word == DIRECTION and entry.verdicts["bound"].word == UNTESTABLE
    rows = warned(as_the_paper(), "drift", kind="memory", model="qwen3-32b")
    peak = rankings.rankings(rows, study())[3]
    assert "Qwen3-32B: the memory row of qwen3-32b" in peak.ours and "2 of" not in peak.ours


@pytest.mark.parametrize("code", sorted(verdict.HARMLESS))
def test_a_warning_that_says_nothing_against_the_number_is_passed_over(code):
    rows = warned(as_the_paper(), code, kind="energy")
    assert of(rows, "energy-vs-qwen").verdict.word == DIRECTION


def test_a_first_call_that_no_code_names_is_seen_by_its_spread():
    """One block of six at 1.5 times the others: (960 - 640) / 640 is 50 %."""
    rows = [
        replace(r, samples=r.samples | {"energy_j": [2 * 640.0 * 1.5] + [2 * 640.0] * 10})
        if r.kind == "energy" and r.key["model"] == "qwen3-32b"
        else r
        for r in as_the_paper()
    ]
    why = of(rows, "energy-vs-qwen").verdict.why
    assert "the energy row of qwen3-32b" in why and "spread over 50% of their median" in why


def test_the_cell_of_a_table_is_not_decided_by_it_either():
    rows = warned(as_the_paper(), "inverted", kind="latency", model="gpt-oss-20b", context=2048)
    tables = {t.number: t for t in paper_tables.paper_tables(rows, study().data)}
    cells = {(c.row, c.column): c for c in tables[1].cells}
    cell = cells[GPT, "TPOT (tok/s)"]
    assert cell.measured.value == pytest.approx(RATE) and cell.measured.low
    assert cell.verdict.word == UNTESTABLE and "inverted (as said)" in cell.verdict.why
    assert cells[QWEN, "TPOT (tok/s)"].verdict.word == NOT
    assert {c.verdict.word for c in tables[2].cells if c.column == GPT and c.row == "2048"} == {
        UNTESTABLE
    }


def test_a_table_shows_both_implementations_and_judges_the_papers():
    tables = {t.number: t for t in paper_tables.paper_tables(quiet(all_rows()), study().data)}
    own = next(c for c in tables[1].cells if (c.row, c.column) == (GPT, "TPOT (tok/s)"))
    assert own.measured.value == pytest.approx(RATE / 1.5)
    assert own.today.value == pytest.approx(RATE) and "experts grouped_mm" in own.note
    energy = next(c for c in tables[6].cells if (c.row, c.column) == (GPT, "J/1K (J)"))
    assert energy.measured.value is None and energy.today.value == pytest.approx(10000)
    assert "every expert computed" in energy.verdict.why
    dense = next(c for c in tables[1].cells if (c.row, c.column) == (QWEN, "TPOT (tok/s)"))
    assert dense.today is None
    counted = next(c for c in tables[8].cells if (c.row, c.column) == (GPT, "Active (B)"))
    assert counted.measured.value == 4 and counted.today is None
    saving = next(c for c in tables[5].cells if (c.row, c.column) == (QWEN, "% less vs Qwen/Yi"))
    assert saving.measured.value == pytest.approx(100 * (1 - 44 / 64.5))
    assert saving.today.value == pytest.approx(100 / 3)
    shown = grids.paper_grid(tables[6], []).rows[0]
    assert "10,000.0 [9,600, 10,400], n = 11 (experts as of today)" in words(shown[8])


# --- rules of this study


def test_the_number_of_runs_is_read_from_the_latency_files():
    entry = of(base_rows(), "decode-runs")
    assert str(entry.verdict) == "not reproduced: 10, not 5"
    data = copy.deepcopy(study().data)
    data["claims"] = {"decode-runs": data["claims"]["decode-runs"]}
    row = "Yi-34B/2048/64"
    exact = 64e3 / data["released"][f"p50_ms/{row}"]["value"]
    data["released"][f"tpot/{row}"]["value"] = exact  # as of an odd number
    (entry,) = claims.ledger(base_rows(), replace(study(), data=data))
    assert entry.verdict.word == UNTESTABLE and "35 of 36 released rows" in entry.verdict.why


@pytest.mark.parametrize(
    ("errors", "word", "why"),
    [
        (("expected scalar type BFloat16 but found Half",) * 2, REPRODUCED, ""),
        (("expected scalar type BFloat16 but found Half", ""), NOT, "1, not 2"),
        (("", "ModelError: it needs 88.3 GB, and cuda has 83.7 GB free"), NOT, "[0, 1.000], not 2"),
        (("wrong dtype", "OutOfMemoryError: CUDA out of memory"), UNTESTABLE, "[1.000, 2.000]"),
        (("", ""), NOT, "0, not 2"),
    ],
)
def test_a_format_that_did_not_fit_is_no_failure_of_its_type(errors, word, why):
    by_dtype = dict(zip(("float16", "float32"), errors, strict=True))
    rows = [
        replace(r, error=by_dtype[r.key["dtype"]] or None, samples={"e2e_s": [1.0] * 6})
        if r.kind == "ablation-precision" and r.key["dtype"] in by_dtype
        else r
        for r in as_the_paper()
    ]
    entry = of(rows, "bf16-only")
    assert entry.verdict.word == word and why in entry.verdict.why


def test_rows_of_other_settings_stand_in_table_9_and_decide_nothing():
    """Sampling at temperatures that the authors did not use has rows of its own."""
    other = {"temperature 0.3 top-p 0.8": "temperature 0.5"}
    rows = [
        replace(r, key=r.key | {"decoding": other.get(r.key.get("decoding"), r.key["decoding"])})
        if r.kind == "ablation-decoding"
        else r
        for r in as_the_paper()
    ]
    entry = of(rows, "sampling-cost")
    assert entry.measured.protocol["Low Temp"].value is None
    assert entry.verdict.word == UNTESTABLE
    table = next(t for t in paper_tables.paper_tables(rows, study().data) if t.number == 9)
    cells = {(c.row, c.column): c for c in table.cells}
    assert cells["Low Temp", "p50 time (s)"].measured.value is None
    own = cells["temperature 0.5", "p50 time (s)"]
    assert own.measured.value and own.printed is None and own.verdict.word == ""


def test_an_ablation_arm_stands_in_for_a_latency_row_of_every_expert():
    k = sample.key("gpt-oss-20b", experts="all_experts", context=512)
    arm = Record("ablation-experts", k, {"e2e_s": sample.spread(1.33)}, env_id=ENV.env_id)
    rungs = ladder.rungs([*base_rows(), arm], study())
    assert rungs[2].ratio.value == pytest.approx(1)  # 2 x 0.665 s of Qwen at 512 tokens
    assert rungs[2].name.endswith("at 512 tokens of context")


def test_other_cards_are_not_compared():
    other = environment_record({**sample.GPU, "gpu": "NVIDIA A100"})
    rows = [
        replace(r, env_id=other.env_id) if r.key.get("model") == "qwen3-32b" else r
        for r in as_the_paper()
    ]
    entry = of([other, *rows], "throughput-vs-qwen")
    assert entry.verdict.word == UNTESTABLE and "rows differ in gpu" in entry.verdict.why
    assert "rows differ in gpu" in of([other, *rows], "peak-vs-qwen").verdict.why


def test_too_few_repetitions_decide_nothing():
    rows = [replace(r, samples={n: s[:5] for n, s in r.samples.items()}) for r in as_the_paper()]
    entry = of(rows, "energy-vs-qwen")
    assert entry.verdict.word == UNTESTABLE and "n = 5: an interval needs n >= 6" in str(
        entry.verdict
    )
    assert entry.measured.protocol[QWEN].value is not None  # the value is shown all the same
    assert of(rows, "peak-lower").verdict.word == REPRODUCED  # one reading is enough


def test_a_missing_fact_is_said():
    data = copy.deepcopy(study().data)
    data["claims"] = {"hardware": data["claims"]["hardware"]}
    del data["released"]["gpu"]
    (entry,) = claims.ledger(base_rows(), replace(study(), data=data))
    assert str(entry.verdict) == "not testable: released holds no gpu"


# --- causes and conditions


def test_models_of_different_machines_are_said_to_be_so_with_their_hosts():
    """A host of half the speed makes what waits for it twice as slow: that is no model's doing."""
    speeds = {"gpt-oss-20b": ("u1", 30.04), "qwen3-32b": ("u2", 15.0), "yi-34b": ("u2", 15.0)}
    envs = {
        m: environment_record({**sample.GPU, "gpu_uuid": uuid, "host_score_per_s": speed})
        for m, (uuid, speed) in speeds.items()
    }
    rows = [
        replace(r, env_id=envs[r.key["model"]].env_id) if r.key.get("model") in envs else r
        for r in all_rows()
    ]
    rows = [*envs.values(), *rows]
    text = f"different machines, whose hosts do 30.0 ({GPT}), 15.0 ({QWEN}) million loops a second"
    assert text in of(rows, "throughput-vs-qwen").cause
    for silent in ("peak-vs-qwen", "ape-throughput", "slows-with-context"):  # each model alone
        assert "machines" not in of(rows, silent).cause
    assert text in of(rows, "energy-vs-qwen").cause
    energy_together = [
        replace(r, env_id=envs["yi-34b"].env_id) if r.kind == "energy" else r for r in rows
    ]
    assert "machines" not in of(energy_together, "energy-vs-qwen").cause
    rungs = ladder.rungs(rows, study())
    assert [text in rung.cause for rung in rungs].count(True) == 2
    assert not any("machines" in rung.cause for rung in ladder.rungs(all_rows(), study()))
    groups = evidence.gather(rows, study())
    assert evidence.machines(groups, [(groups.base, QWEN), (groups.base, YI)]) == ""


def test_what_differs_is_part_of_every_verdict_that_was_measured():
    entry = ledger()["throughput-vs-qwen"]
    assert list(entry.differs) == ["card", "host", "software", "weights"]
    assert entry.differs["card"] == "NVIDIA H100 80GB HBM3 (paper: NVIDIA H100 NVL)"
    assert entry.differs["weights"] == "random (paper: checkpoint)"
    assert list(ledger()["peak-lower"].differs) == ["card", "software", "weights"]
    assert "valid for memory" in ledger()["peak-lower"].differs["weights"]
    assert "route unlike" in ledger()["ttft-higher"].differs["weights"]
    assert ledger()["total-params"].differs == {}
    for entry in ledger().values():
        measured = any(x.value is not None for x in entry.measured.protocol.values())
        assert not measured or entry.differs or "counted" in entry.cause or "files" in entry.cause


def test_the_papers_card_and_checkpoint_do_not_differ():
    env = environment_record({**sample.GPU, "gpu": "NVIDIA H100 NVL"})
    rows = [
        replace(
            r,
            key=r.key | {"weights": "checkpoint"} if "weights" in r.key else r.key,
            env_id=env.env_id,
        )
        for r in base_rows()
        if r.kind != "environment"
    ]
    assert list(of([env, *rows], "peak-lower").differs) == ["software"]


def test_a_host_that_sets_the_pace_is_named():
    """63 tokens in 0.64 s are 98.4 tok/s; 1,000 GB/s over 2 GB would allow 500."""
    env = environment_record({**sample.GPU, "copy_bytes_per_s": 1e12})
    busy = Record(
        "busy", sample.key("gpt-oss-20b"), {}, {"decode_busy_s": 0.002}, env_id=env.env_id
    )
    rows = [
        replace(r, env_id=env.env_id, values=r.values | {"decode_bytes": 2e9})
        for r in base_rows()
        if r.kind != "environment"
    ]
    text = of([env, *rows, busy], "throughput-vs-qwen").cause
    assert (
        f"host-bound: decoding at 20% ({GPT}), 10% ({QWEN}) of what its bytes allow a copy" in text
    )
    assert f"the GPU works 20% ({GPT}) of a step" in text
    fast = [replace(r, values=r.values | {"decode_bytes": 9e9}) for r in rows]  # 111 tok/s allowed
    assert "host-bound" not in of([env, *fast], "throughput-vs-qwen").cause


def test_the_audit_and_the_other_columns_are_among_the_causes():
    assert "the paper's own data: mib-as-mb (error)" in ledger()["decimal-units"].cause
    assert "by the corrected definition: not reproduced" in ledger()["baseline-qwen"].cause


# --- as sentence, table and file


def test_the_sentence_of_the_abstract():
    (sentence,) = claims.finding(list(ledger().values()))
    counts = claims.counts(list(ledger().values()))
    assert f"Of 49 claims {counts[REPRODUCED]} are reproduced" in sentence.text
    assert "By the corrected definition" in sentence.text
    assert claims.finding([]) == []
    rows = warned(all_rows(), "drift", kind="latency", model="qwen3-32b", new_tokens=64)
    (sentence,) = claims.finding(claims.ledger(rows, study()))
    assert "because a row warns; " in sentence.text and "for want of a row with" in sentence.text


def test_the_csv_holds_every_claim_with_numbers_or_reasons(tmp_path):
    entries = list(ledger().values())
    (path,) = claims.write_csv(entries, tmp_path)
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    columns = ("protocol", "today", "corrected", "bound")
    assert list(lines[0]) == [
        *("claim", "where", "text", "of", "unit", "meant", "paper", "direction"),
        *(f"{c}{end}" for c in columns for end in ("", "_low", "_high", "_n")),
        *("corrected_as", "verdict", "why", "verdict_today", "verdict_corrected"),
        *("verdict_bound", "cause", "differs", "missing"),
    ]
    assert {line["claim"] for line in lines} == ledger().keys()
    qwen = next(x for x in lines if (x["claim"], x["of"]) == ("throughput-vs-qwen", QWEN))
    assert (qwen["paper"], qwen["unit"], qwen["protocol"]) == ("31.8", "%", "100")
    assert float(qwen["protocol_low"]) < 100 < float(qwen["protocol_high"])
    assert (qwen["protocol_n"], qwen["verdict"]) == ("11", DIRECTION)
    assert all(x["verdict"] for x in lines)
    assert all(x["protocol"] or "protocol: " in x["missing"] for x in lines)
    assert claims.write_csv([], tmp_path) == []


def test_a_table_for_a_notebook():
    table = claims.table(list(ledger().values()))
    assert len(table.rows) == 49 and table.notes[0].startswith("49 claims: ")
    (cell,) = [row[2] for row in table.rows if row[0].text.startswith("31.8% higher decode")]
    assert cell[0].estimate.value == pytest.approx(100) and cell[0].label == QWEN
    assert claims.table([]).notes == ("none of the paper's models is among the rows",)
    assert claims.ledger([sample.card("another", ENV.env_id)], study()) == []


# --- the ladder


def with_bytes(rows, more=0):
    """Each call with the bytes of a step by its model's architecture, those of the trace + more."""
    bytes_of = {m: sample.trace(m, ENV.env_id).values["decode_bytes"] for m in sample.FACTORS}
    return [
        replace(r, values=r.values | {"decode_bytes": bytes_of[r.key["model"]] + more})
        if r.kind == "latency"
        else r
        for r in rows
    ]


def test_the_rungs_of_the_ladder():
    rungs = ladder.rungs(with_bytes(all_rows()), study())
    ratios = [r.ratio.value for r in rungs]
    assert ratios[0] == pytest.approx(31.27 / 23.73)
    assert ratios[1] == pytest.approx(1.4829, abs=1e-4)  # 39.70 / 26.77 tok/s
    assert ratios[2:6] == pytest.approx([2 / 1.5, 2, 2, 4])
    assert ratios[6] is None
    assert rungs[6].ratio.reason == "not measured: no row on stack graph-compiled"
    assert ratios[7] is None and "no trace" in rungs[7].ratio.reason
    assert ratios[8:] == pytest.approx([2, 8])
    assert [r.origin for r in rungs] == ["paper"] * 2 + ["measured"] * 5 + ["bytes"] * 3
    assert rungs[3].ratio.n == 11 and rungs[3].ratio.low < 2 < rungs[3].ratio.high
    assert all(r.cause for r in rungs)
    (sentence,) = ladder.finding(rungs, study())
    assert (
        "captured step 4.000×" in sentence.text and "Not measured: 2 of 10 rungs" in sentence.text
    )


def test_bytes_with_every_expert_need_only_its_trace():
    """40 GB with every expert against 20 GB of Qwen: half as many steps a second."""
    own = sample.trace("gpt-oss-20b", ENV.env_id)
    own = replace(
        own,
        key=own.key | {"experts": "all_experts"},
        values=own.values | {"decode_bytes_realised": 40_000_000_000},
    )
    traces = [sample.trace(m, ENV.env_id) for m in sample.FACTORS]
    rungs = ladder.rungs([*with_bytes(base_rows()), *traces, own], study())
    assert [r.ratio.value for r in rungs[7:9]] == pytest.approx([0.5, 2])
    assert rungs[2].ratio.value is None  # a trace is no call
    assert "with every" not in of([*base_rows(), *traces, own], "throughput-vs-qwen").cause


def test_a_trace_at_another_context_serves_too():
    """0.5 GB of cache more than in the trace: 10.5 GB against 20.5 GB; 3 against 20.5 by shape."""
    traces = [sample.trace(m, ENV.env_id) for m in sample.FACTORS]
    short = [replace(t, key=t.key | {"context": 128}) for t in traces]
    rungs = ladder.rungs([*with_bytes(base_rows(), 500_000_000), *short], study())
    assert [r.ratio.value for r in rungs[8:]] == pytest.approx([20.5 / 10.5, 20.5 / 3])


def test_a_ladder_without_rows_keeps_the_papers_rungs_and_says_why():
    rungs = ladder.rungs([], study())
    assert [r.ratio.value is None for r in rungs] == [False] * 2 + [True] * 8
    assert all(r.ratio.reason.startswith("not measured") for r in rungs[2:])
    assert ladder.finding(rungs, study()) == []


def test_a_ladder_reads_what_its_caption_is_about_and_nothing_else():
    half = Record(
        "ablation-precision",
        sample.key("gpt-oss-20b") | {"dtype": "float16"},
        {"e2e_s": [1.0] * 6},
        env_id=ENV.env_id,
    )
    static = [
        replace(r, key=r.key | {"stack": "hf-static"})
        for r in sample.latency("gpt-oss-20b", ENV.env_id, (2048,))
    ]
    rows = [*all_rows(), *(sample.trace(m, ENV.env_id) for m in sample.FACTORS), half, *static]
    read = ladder.reads(rows, study())
    assert ladder.rungs(read, study()) == ladder.rungs(rows, study()) and half not in read
    for other in (", float16,", "hf-static"):
        assert other in figure.caption(rows) and other not in figure.caption(read)


def test_the_figure_shows_every_rung_or_its_reason():
    rungs = ladder.rungs(all_rows(), study())
    ax = ladder.ladder(rungs, "one against another")
    alt = figure.describe(ax)
    assert "the paper, as printed: 1.318." in alt and "captured step: 4.000." in alt
    assert "not measured: no row on stack graph-compiled" in alt
    assert [t.get_text() for t in ax.get_yticklabels()] == [r.name for r in rungs]
    figure.plt.close(ax.figure)


# --- rankings


def test_rankings_by_print_protocol_and_definition():
    by_metric = {r.metric: r for r in rankings.rankings(as_the_paper(), study())}
    rate = by_metric["throughput (tok/s)"]
    assert rate.printed == "1. GPT-OSS-20B 31.27; 2. Yi-34B 26.30; 3. Qwen3-32B 23.73"
    assert rate.ours == "1. GPT-OSS-20B 100.0; 2. Qwen3-32B 50.00; 3. Yi-34B 25.00"
    assert rate.bound.startswith("1. GPT-OSS-20B 500.0")
    assert rate.change == "Qwen3-32B and Yi-34B change places; 2 of 3 pairs hold"
    kv = by_metric["KV cache (MiB)"]  # 400 MiB each
    assert kv.ours == "1=. GPT-OSS-20B 400.0; 1=. Qwen3-32B 400.0; 1=. Yi-34B 400.0"
    assert "tie: no difference resolved" in kv.change
    assert by_metric["peak memory (MiB)"].change == "the order holds"
    assert len(by_metric) == len(rankings.METRICS)


def test_a_model_without_an_interval_has_no_place():
    rows = [
        replace(r, samples={n: s[:3] for n, s in r.samples.items()})
        if r.key.get("model") == "yi-34b" and r.kind == "energy"
        else r
        for r in as_the_paper()
    ]
    energy = rankings.rankings(rows, study())[2]
    assert energy.ours == (
        "1. GPT-OSS-20B 10,000; 2. Qwen3-32B 20,000; Yi-34B: n = 3: an interval needs n >= 6"
    )
    assert "; 3. Yi-34B 34,920" in energy.protocol  # by the value alone, as the paper ranks
    assert "cannot be compared" in energy.change
    none = rankings.rankings([], study())[0]
    assert none.change == "no pair can be compared" and none.ours.startswith("not measured")


# --- table 13


def test_governance_beside_the_publishers():
    rows = {(row[0], row[1]): row for row in governance.rows(study())}
    assert len(rows) == 15 and all(row[6] and row[5] for row in rows.values())
    qwen = rows[QWEN, "licence"]
    assert qwen[2:5] == (
        "Qwen License",
        "Apache-2.0",
        "not reproduced: the publisher states Apache-2.0",
    )
    assert rows[GPT, "licence"][4] == rows[GPT, "class"][4] == REPRODUCED
    assert rows[QWEN, "usage policy"][3:5] == ("none found", REPRODUCED)  # the paper says no
    assert rows[YI, "usage policy"][4] == "not reproduced: none found"
    assert rows[GPT, "documented safety features"][4].startswith(UNTESTABLE)
    assert any("not verified" in note for note in governance.table(study()).notes)


def test_what_was_not_looked_up_is_not_judged():
    entries = {
        name: {k: v for k, v in entry.items() if k != "governance"}
        for name, entry in models().items()
    }
    rows = governance.rows(replace(study(), entries=entries))
    assert {row[4] for row in rows} == {"not testable: not looked up"}


def test_the_hub_today_or_why_not():
    state = {
        "licence": "apache-2.0",
        "gated": False,
        "revision": "new",
        "last_modified": "2026-01-02",
    }

    def fetch(repo: str) -> dict:
        if "Yi" in repo:
            raise ConnectionError("no route to the hub\nmore")
        return state | ({"licence": "other"} if "Qwen" in repo else {})

    rows = {row[0]: row for row in governance.refreshed(study(), fetch).rows}
    assert rows["gpt-oss-20b"] == (
        "gpt-oss-20b",
        "Apache-2.0",
        "apache-2.0",
        "no",
        "2026-01-02",
        "yes",
        "none",
    )
    assert rows["Qwen3-32B"][-1] == "licence"
    why = "not refreshed: ConnectionError: no route to the hub"
    assert rows["Yi-34B"][2:] == (None, None, None, None, why)


def test_the_hubs_answer_is_read(monkeypatch):
    from datetime import UTC, datetime
    from types import SimpleNamespace

    info = SimpleNamespace(
        card_data=None,
        tags=["text", "license:apache-2.0"],
        gated=False,
        sha="abc",
        last_modified=datetime(2026, 1, 2, tzinfo=UTC),
    )
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, repo, timeout: info)
    assert governance.hub_metadata("a/b") == {
        "licence": "apache-2.0",
        "gated": False,
        "revision": "abc",
        "last_modified": "2026-01-02",
    }
