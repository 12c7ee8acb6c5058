"""The capacity model: amounts by pencil, fits on made rows, and what the released rows resolve."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lib.analysis.capacity import model as capacity
from lib.analysis.capacity import registry as files
from lib.analysis.capacity.fit import (
    LEVEL,
    Cell,
    Guess,
    Miss,
    NotResolved,
    fit,
    inflation,
    leave_out,
    left_out,
    widened,
)
from lib.files import ROOT, read_yaml
from lib.models.card import ModelCard
from lib.records import record, store
from lib.records.record import Record

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
REGISTERED = sorted((ROOT / "outputs" / "predictions").glob("*-capacity.json"))
QUESTION = ROOT / "params" / "predictions" / "2026-11-27-capacity.yaml"
# What was registered, by file: a change of the file and its sidecar together is seen here.
HASHES: dict[str, str] = {
    "2026-11-27-capacity.json": "88bf9a406d6d04b863ba1882d7815e788fcdf06adf3ce2a2355e7ad24f8a9a78",
}

DENSE = ModelCard(
    name="dense", model_type="llama", dtype="bfloat16", total_params=1_100_000_000,
    active_params=1_000_000_000, lookup_params=100_000_000, routed_params=0,
    weight_bytes=2_200_000_000, routed_bytes=0, lookup_bytes=200_000_000, layers=10,
    hidden_size=1000, attention_heads=20, kv_heads=5, head_dim=50, experts=0, experts_per_token=0,
    context_limit=10_000, vocab_size=100_000, kv_layers=((500, None),) * 10, kv_element_bytes=2,
)  # fmt: skip
# 16 experts in each of 10 layers, 100 MB each over all layers; 2 of them for a token.
SPARSE = replace(
    DENSE, name="sparse", model_type="mixture", routed_params=800_000_000,
    total_params=1_900_000_000, active_params=1_100_000_000, weight_bytes=3_800_000_000,
    routed_bytes=1_600_000_000, experts=16, experts_per_token=2,
)  # fmt: skip


# --- amounts


def test_bytes_of_a_captured_step():
    """2.0 GB of weights; a cache of 100 tokens x 10 layers x 500 elements x 2 bytes is 1 MB.

    The captured step copies it for each of 4 heads of a group: 1 read, 4 writes, 4 reads.
    """
    moved = capacity.moved_bytes(DENSE, "graph", 100, 1)
    assert moved == {"matrix_stream": 2e9, "graph_cache_stream": 9e6}
    assert capacity.moved_bytes(DENSE, "graph-compiled", 100, 1) == {
        "row_stream": 2e9,
        "compiled_cache_stream": 1e6,
    }
    at_two = capacity.moved_bytes(DENSE, "graph-compiled", 100, 2)
    assert at_two == {"matrix_stream": 2e9, "compiled_cache_stream": 2e6}


def test_experts_are_fused_up_to_half_of_them():
    """Of 16 experts 4 sequences choose 8 (fused, each read); 5 choose 10, read by groups."""
    four = capacity.moved_bytes(SPARSE, "graph-compiled", 100, 4)
    assert four["row_stream"] == 8 * 1e8
    five = capacity.moved_bytes(SPARSE, "graph-compiled", 100, 5, touched=7.0)
    assert five["expert_stream"] == 7 * 1e8 and "row_stream" not in five
    grouped = capacity.moved_bytes(SPARSE, "graph", 100, 1)
    assert grouped["expert_stream"] == 2 * 1e8


def test_amounts_are_seconds_kernels_and_tokens():
    x = capacity.step_amounts(SPARSE, "graph", 100, 3, kernels=500, bytes_per_s=1e12, touched=5.0)
    assert x["matrix_stream"] == 2e-3 and x["expert_stream"] == 5e-4
    assert x["graph_kernel"] == 500 and x["expert_layer"] == 10 and x["token_layer"] == 20
    alone = capacity.step_amounts(DENSE, "graph-compiled", 100, 8, kernels=50, bytes_per_s=1e12)
    assert "token_layer" not in alone and alone["compiled_kernel"] == 50


def test_operations_of_a_prefill():
    """2 x (10^9 - 10^8) for each of 3 tokens, 2 x 10^8 for the output of the last; attention
    4 x 20 x 50 for 6 pairs in each of 10 layers."""
    linear = 2 * (9e8 * 3 + 1e8)
    assert capacity.operations(DENSE, 3, 1, attention=False) == linear
    assert capacity.operations(DENSE, 3, 2, attention=True) == 2 * (linear + 4000 * 6 * 10)
    assert capacity.score_bytes(DENSE, 8, 2) == 2 * 2 * 20 * 64 * 10


# --- the fit


TRUE = {"kernel": 2e-6, "stream": 1.25, "cache": 3.0}
SHAPES = [(128, 1), (1024, 1), (4096, 1), (512, 2), (512, 8), (512, 32)]


def made_cells(rng, models: int, *, model_sd=0.03, visit_sd=0.01, row_sd=0.005) -> list[Cell]:
    """Rows of models of 1 to 32 GB by a law that is known, with the three kinds of difference."""
    cells = []
    for number in range(models):
        size_s = rng.uniform(0.3e-3, 10e-3)
        kernels, off = rng.uniform(300, 4000), rng.normal(0, model_sd)
        visits = {v: rng.normal(0, visit_sd) for v in (f"{number}a", f"{number}b")}
        for index, (context, batch) in enumerate(SHAPES):
            x = {"kernel": kernels, "stream": size_s, "cache": size_s * context * batch / 2e5}
            visit = list(visits)[index % 2]
            noise = off + visits[visit] + rng.normal(0, row_sd)
            value = sum(TRUE[n] * amount for n, amount in x.items()) * math.exp(noise)
            cells.append(Cell("made", f"model {number}", "s", context, batch, value, x, visit))
    return cells


def test_known_coefficients_lie_in_their_intervals():
    fitted = fit("made", made_cells(np.random.default_rng(3), 6))
    assert fitted.names == ("cache", "kernel", "stream")
    for name, true in TRUE.items():
        value, low, high = fitted.coefficient(name)
        assert low <= true <= high, name
        assert value == pytest.approx(true, rel=0.15), name


def test_without_noise_the_law_is_found_exactly():
    cells = made_cells(np.random.default_rng(1), 4, model_sd=0, visit_sd=0, row_sd=0)
    fitted = fit("made", cells)
    for name, true in TRUE.items():
        assert fitted.coefficient(name)[0] == pytest.approx(true, rel=1e-6)


def test_intervals_of_a_model_that_was_not_seen_cover_it():
    """In 80 made studies of five models a sixth is predicted; its cells are correlated, so that
    the share covered is counted over models as well."""
    rng, covered, per_model = np.random.default_rng(20261127), [], []
    for _ in range(80):
        cells = made_cells(rng, 6)
        misses = leave_out("made", cells, "sixth", lambda c: c.model == "model 5")
        covered += [m.covered for m in misses]
        per_model.append(np.mean([m.covered for m in misses]))
    assert len(covered) == 80 * len(SHAPES)
    assert 0.85 <= np.mean(covered) <= 0.99
    assert np.mean(per_model) >= 0.85


def test_a_row_beside_a_measured_one_is_predicted_more_narrowly():
    cells = made_cells(np.random.default_rng(5), 5, visit_sd=0.003)
    fitted = fit("made", cells)
    near = replace(cells[1], context=1100, visit="new")
    strange = replace(near, model="never seen")
    assert fitted.guess(near).log_sd < 0.6 * fitted.guess(strange).log_sd


def test_what_no_row_holds_is_not_resolved():
    cells = made_cells(np.random.default_rng(2), 3)
    fitted = fit("made", cells)
    with pytest.raises(NotResolved, match="no row resolves experts"):
        fitted.guess(replace(cells[0], x=cells[0].x | {"experts": 1.0}))
    with pytest.raises(NotResolved, match="2 rows cannot resolve 3"):
        fit("made", cells[:2])
    with pytest.raises(NotResolved, match="no row is left"):
        fit("made", [])


def test_a_coefficient_that_rows_do_not_need_is_left_out():
    cells = [
        replace(c, x=c.x | {"idle": 1e-9})
        for c in made_cells(np.random.default_rng(4), 4, model_sd=0, visit_sd=0, row_sd=0)
    ]
    assert "idle" not in fit("made", cells).names


def test_each_part_is_left_out_in_turn():
    cells = made_cells(np.random.default_rng(6), 3)
    found = left_out("made", cells)
    assert {m.left_out for m in found} == {
        "model model 0", "model model 1", "model model 2", "each visit in turn", "batch above 8",
        "context above 1,024",
    }  # fmt: skip
    assert sum(m.left_out == "batch above 8" for m in found) == 3
    assert sum(m.left_out == "each visit in turn" for m in found) == len(cells)


def test_intervals_grow_where_left_out_rows_lie_outside():
    """Rows four deviations off, of a t distribution with variance 2 at 4 degrees: 4 / sqrt 2."""
    cell = Cell("made", "m", "s", 1, 1, math.exp(0.4), {}, "v")
    misses = [Miss("made", "model m", cell, Guess(0.0, 0.1, 4, {}))]
    assert misses[0].covered is False
    assert inflation(misses) == pytest.approx(4 / math.sqrt(2))
    assert widened(misses, 3.0)[0].covered is True
    assert inflation([replace(misses[0], cell=replace(cell, value=1.0))]) == 1.0


def test_draws_are_the_quantiles_of_the_interval():
    guess = Guess(math.log(2.0), 0.1, 5, {})
    value, low, high = guess.interval()
    draws = guess.draws(4001, [1])
    assert value == 2.0
    assert np.percentile(draws, [5, 50, 95]) == pytest.approx([low, 2.0, high], rel=1e-3)
    assert (guess.draws(4001, [1]) == draws).all()
    assert (guess.draws(4001, [2]) != draws).any()


# --- rows


def made_rows(share: float, kernel_s: float) -> list[Record]:
    """Captured steps of three dense models: weights at a share of 3.35 TB/s, kernels beside it."""
    env = record.environment_record({"gpu": H100, "gpu_total_bytes": 85_000_000_000})
    rows = [env]
    for number, scale in enumerate((1, 4, 10)):
        layers = 20 * (number + 1)
        card = replace(
            DENSE, name=f"m{scale}", layers=layers, kv_layers=((500, None),) * layers,
            weight_bytes=scale * 2_000_000_000 + 200_000_000,
        )  # fmt: skip
        key = {"model": card.name, "weights": "random", "dtype": "bfloat16", "experts": "none",
               "stack": "graph", "batch": 1, "context": 1000, "decoding": "greedy",
               "attention": "sdpa", "cache": "static"}  # fmt: skip
        rows.append(Record("card", key, values=card.as_dict(), env_id=env.env_id))
        rows.append(
            Record("busy", key | {"new_tokens": 9}, values={"decode_kernels": 12.0 * layers},
                   env_id=env.env_id)
        )  # fmt: skip
        for context in (500, 1000, 4000):
            cache = (context + 32) * layers * 500 * 2 * (1 + 2 * 4)
            steps_s = 63 * ((scale * 2e9 + 2 * cache) / (share * 3.35e12) + kernel_s * 12 * layers)
            first_s = capacity.operations(card, context, 1, attention=True) / (0.5 * 9.894e14)
            rows.append(
                Record("latency", key | {"context": context, "new_tokens": 64},
                       samples={"e2e_s": [steps_s + first_s], "decode_s": [steps_s]},
                       env_id=env.env_id)
            )  # fmt: skip
    return rows


def test_rows_become_a_law_and_a_prediction():
    """At a share of 0.8 and 2 us a kernel; the cache at half of that share counts twice."""
    found = capacity.learn(made_rows(0.8, 2e-6), H100)
    law = found.law("step")
    assert len(law.cells) == 9
    assert law.coefficient("matrix_stream")[0] == pytest.approx(1.25, rel=1e-3)
    assert law.coefficient("graph_cache_stream")[0] == pytest.approx(2.5, rel=1e-2)
    assert law.coefficient("graph_kernel")[0] == pytest.approx(2e-6, rel=1e-3)
    # 4 GB, 30 layers: 4e9 / 2.68e12 + 360 x 2e-6 + cache of 2,000 + 32 tokens
    card = replace(DENSE, layers=30, kv_layers=((500, None),) * 30, weight_bytes=4_200_000_000)
    step_s = 4e9 / 2.68e12 + 360 * 2e-6 + 2032 * 30 * 1000 * 9 * 2 / 2.68e12
    told = capacity.predict(found, card, H100, "graph", 2000)
    assert told["decode_tok_per_s"].value == pytest.approx(1 / step_s, rel=0.01)
    assert told["decode_tok_per_s"].low < 1 / step_s < told["decode_tok_per_s"].high
    assert told["decode_tok_per_s"].bound == "bandwidth"
    assert found.law("prefill").coefficient("dense_operations")[0] == pytest.approx(2, rel=1e-3)
    assert told["ttft_s"].reason == "host: no row is left"  # a first token needs its launches
    assert "no profiled step of a model of type mixture" in (
        capacity.predict(found, SPARSE, H100, "graph", 2000)["decode_tok_per_s"].reason
    )


def test_rows_of_another_card_or_failed_rows_do_not_count():
    rows = made_rows(0.8, 2e-6)
    with pytest.raises(NotResolved, match="no rows of NVIDIA H200"):
        capacity.learn(rows, H200)
    with pytest.raises(NotResolved, match="abacus"):
        capacity.learn(rows, "abacus")
    failed = [replace(r, error="OutOfMemoryError") if r.kind == "latency" else r for r in rows]
    assert "step" not in capacity.learn(failed, H100).fits


# --- the released rows


@pytest.fixture(scope="module")
def question():
    return read_yaml(QUESTION)


@pytest.fixture(scope="module")
def learned(question):
    return files.learned(question)


@pytest.fixture(scope="module")
def cards(question):
    return {name: files.card_of(data) for name, data in question["cards"].items()}


def test_every_law_is_resolved_by_more_rows_than_coefficients(learned):
    assert not learned.reasons
    for law, names in capacity.LAWS.items():
        fitted = learned.law(law)
        assert set(fitted.names) == set(names), law
        assert len(fitted.cells) >= 2 * len(names), law


def test_the_captured_steps_are_explained_within_five_percent(learned):
    law = learned.law("step")
    assert len(law.cells) == 50 and len(law.names) == 9
    assert math.sqrt(float((law.residual**2).mean())) < 0.05
    shares = {n: 1 / law.coefficient(n)[0] for n in law.names if n.endswith("stream")}
    assert all(0 < share < 1 for share in shares.values()), shares  # of the datasheet's bandwidth


def test_left_out_models_and_ranges_are_covered(learned):
    """Of the laws of device time and energy; a stack by itself is not predicted, and says why."""
    laws = ("step", "prefill", "step energy", "vllm step")
    misses = [m for m in learned.misses if m.law in laws]
    seen = [m for m in misses if m.guess is not None]
    assert len(seen) > 150
    assert np.mean([m.covered for m in seen]) >= 0.85
    by = {label: [m for m in learned.misses if m.law == "step" and m.left_out == label] for label in
          ("model Qwen3-32B", "model Yi-34B", "batch above 8", "context above 1,024")}  # fmt: skip
    for label, group in by.items():
        assert np.median([abs(m.error) for m in group]) < 0.10, label
    alone = [m for m in misses if m.law == "step" and m.left_out == "stack graph"]
    assert len(alone) == 25 and all("graph_kernel" in m.reason for m in alone)


def test_measured_calls_that_the_fit_did_not_see_are_predicted(learned, cards):
    """J per 1,000 tokens of whole calls of 64 tokens at 2,048, measured on graph-compiled."""
    for job, name in (("gpt-oss-20b", "gpt-oss-20b"), ("Qwen3-32B", "Qwen3-32B"),
                      ("Yi-34B", "Yi-34B")):  # fmt: skip
        path = ROOT / capacity.RELEASED / job / "random-graph-compiled" / "energy"
        (row,) = [r for r in store.load(path / "records.jsonl") if r.kind == "energy"]
        measured = 1e3 / 64 * np.median(row.samples["energy_j"])
        card = cards[f"{name} bfloat16"]
        told = capacity.predict(learned, card, H100, "graph-compiled", 2048)["call_j_per_1k"]
        assert told.low < measured < told.high, name
        assert told.value == pytest.approx(measured, rel=0.05), name


def test_a_faster_memory_helps_no_more_than_its_ratio(learned, cards):
    """4.8 against 3.35 TB/s: at most 1.433 times, less where kernels take the time."""
    gains = {}
    for model in ("gpt-oss-20b", "Qwen3-32B"):
        card = cards[f"{model} bfloat16"]
        rates = [
            capacity.predict(learned, card, gpu, "graph", 2048)["decode_tok_per_s"]
            for gpu in (H100, H200)
        ]
        gains[model] = rates[1].value / rates[0].value
        assert rates[1].half_width > 2 * rates[0].half_width  # another card is less certain
    assert 1.05 < gains["gpt-oss-20b"] < 1.2 < gains["Qwen3-32B"] < 4.8 / 3.35
    host = [
        capacity.predict(learned, cards["gpt-oss-20b bfloat16"], gpu, "hf-eager", 2048)
        for gpu in (H100, H200)
    ]
    assert host[1]["decode_tok_per_s"].bound == "host"
    ratio = host[1]["decode_tok_per_s"].value / host[0]["decode_tok_per_s"].value
    assert ratio == pytest.approx(1, abs=0.02)


def test_a_step_near_the_power_limit_is_slower_and_not_by_more_than_its_joules(
    learned, cards, monkeypatch
):
    """Between the time without a limit and joules / limit; without a limit nothing is slowed."""
    where = (cards["Qwen3-32B bfloat16"], H200, "graph-compiled", 2048)
    told = capacity.predict(learned, *where)
    sheets = capacity.datasheet
    monkeypatch.setattr(capacity, "datasheet", lambda gpu: replace(sheets(gpu), tdp_w=None))
    free = capacity.predict(learned, *where)
    rate, free_rate = (x["decode_tok_per_s"].value for x in (told, free))
    power_w = free_rate * free["decode_j_per_1k"].value / 1e3
    assert power_w > 700
    assert free_rate * 700 / power_w < rate < free_rate
    assert "near the power limit of 700 W" in " ".join(told["decode_tok_per_s"].notes)
    assert not free["decode_tok_per_s"].notes
    assert rate * told["decode_j_per_1k"].value / 1e3 < 1.01 * 700


def test_what_cannot_be_predicted_says_why(learned, cards):
    def reason(card: str, gpu: str, stack: str, context: int, batch: int = 1, **more) -> str:
        told = capacity.predict(learned, cards[card], gpu, stack, context, batch, **more)
        assert told["decode_tok_per_s"].value is None
        return told["decode_tok_per_s"].reason

    assert "abacus" in reason("Qwen3-32B bfloat16", "abacus", "graph", 128)
    assert "no law for stack steam" in reason("Qwen3-32B bfloat16", H100, "steam", 128)
    assert "ends at 4,096" in reason("Yi-34B bfloat16", H100, "graph", 4096)
    assert "does not hold" in reason("gpt-oss-120b bfloat16", H100, "graph", 128)
    assert "does not hold" in reason("Qwen3-32B bfloat16", H100, "graph-compiled", 512, 128)
    packed = reason("gpt-oss-120b mxfp4", H100, "graph", 128, form="mxfp4")
    assert packed == "no row of weights in mxfp4 on graph"


def test_memory_agrees_with_what_held_and_what_did_not(learned, cards):
    """Measured: Qwen3-32B holds 32 sequences of 512 tokens on the compiled stack, and not 64, which
    are short of a few MB: so near to full the estimate does not decide."""
    card = cards["Qwen3-32B bfloat16"]
    assert capacity.memory(learned, card, H100, "graph-compiled", 512, 32, 48).holds == "yes"
    assert capacity.memory(learned, card, H100, "graph-compiled", 512, 64, 48).holds == "near"
    assert capacity.memory(learned, card, H100, "graph-compiled", 512, 80, 48).holds == "no"
    sparse = cards["gpt-oss-20b bfloat16"]
    assert capacity.memory(learned, sparse, H100, "graph", 512, 64, 48).holds == "yes"


def test_a_cell_whose_prefill_does_not_hold_tells_the_step_alone(learned, cards):
    told = capacity.predict(learned, cards["gpt-oss-20b bfloat16"], H100, "graph", 32768)
    decode = told["decode_tok_per_s"]
    assert decode.value is None and "does not hold" in decode.reason
    value, low, high = decode.step_alone
    assert low < value < high
    assert told["ttft_s"].step_alone is None


def test_predictions_do_not_depend_on_chance(learned, cards):
    where = (cards["Llama-3.1-8B bfloat16"], H100, "graph-compiled", 2048)
    assert capacity.predict(learned, *where) == capacity.predict(learned, *where)


# --- what was registered


def test_the_question_asks_for_what_the_target_is_about(question):
    cells = files.cells_of(question)
    assert question["target"]["level"] == LEVEL
    assert {c["gpu"] for c in cells} == {H100, H200}
    asked = {(c["model"], c["context"]) for c in cells if c["gpu"] == H100 and c["batch"] == 1}
    assert {("Llama-3.1-8B", n) for n in (8192, 16384, 32768, 65536)} <= asked
    assert {("gpt-oss-20b", n) for n in (8192, 16384, 32768, 65536)} <= asked
    keys = [tuple(c[n] for n in ("gpu", "model", "form", "stack", "context", "batch"))
            for c in cells]  # fmt: skip
    assert len(keys) == len(set(keys))


def test_cards_of_the_question_are_counted(cards):
    models = pytest.importorskip("lib.models.load")
    from lib.models.formats import FORMS, held_as

    for name, card in cards.items():
        model, _, form = name.partition(" ")
        if model == "Qwen3-8B":  # known beforehand, and no entry of the workbook
            assert card.total_params == 8_190_735_360
            continue
        counted = held_as(models.card(model, "bfloat16"), FORMS[form])
        order = sorted(counted.kv_layers, key=str)
        assert replace(card, kv_layers=None) == replace(counted, kv_layers=None), name
        assert sorted(card.kv_layers, key=str) == order, name


def test_something_is_registered():
    assert REGISTERED
    assert {path.name for path in REGISTERED} == set(HASHES)


@pytest.mark.parametrize("path", REGISTERED, ids=lambda p: p.name)
def test_a_registered_file_is_what_was_registered(path):
    data = files.sealed(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == HASHES[path.name]
    assert not data["git"]["changed_files"]
    assert data["rows"] and all(len(row["sha256"]) == 64 for row in data["rows"])
    for cell in data["cells"]:
        if "value" in cell:
            assert cell["low"] <= cell["value"] <= cell["high"]
        else:
            assert cell["missing"]
    assert data["summary"] == files.summary(data["cells"])
    target = data["target"]["median_half_width_at_most"]
    assert data["summary"]["all"]["median_half_width"] <= target


def test_a_changed_file_or_page_is_noticed(tmp_path):
    for suffix in (".json", ".md", ".sha256"):
        shutil.copy(REGISTERED[0].with_suffix(suffix), tmp_path)
    copy = tmp_path / REGISTERED[0].name
    files.sealed(copy)
    page = copy.with_suffix(".md")
    page.write_text(page.read_text(encoding="utf-8").replace("the study", "a study", 1), "utf-8")
    with pytest.raises(files.Registered, match="md is not what was registered"):
        files.sealed(copy)
    data = json.loads(copy.read_text(encoding="utf-8"))
    data["cells"][0]["low"] = 0
    copy.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(files.Registered, match="json is not what was registered"):
        files.sealed(copy)


def test_nothing_is_registered_twice_or_without_a_question():
    assert (ROOT / "outputs/predictions/2026-11-27-capacity.json").exists()
    with pytest.raises(files.Registered, match="is not written again"):
        files.register("2026-11-27")
    with pytest.raises(files.Registered, match="no question"):
        files.register("2001-01-01")
    with pytest.raises(files.Registered, match="YYYY-MM-DD"):
        files.register("tomorrow")


def test_the_registered_numbers_follow_from_the_rows():
    """As long as rows and code are those of the registration; later ones do not change the file."""
    data = files.sealed(ROOT / "outputs/predictions/2026-11-27-capacity.json")
    for kind in ("rows", "code"):
        for entry in data[kind]:
            file = ROOT / entry["file"]
            if not file.exists() or (
                hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]
            ):
                pytest.skip(f"{entry['file']} is no longer that of the registration")
    again = files.build(QUESTION, data["date"])
    assert len(again["cells"]) == len(data["cells"])
    for new, old in zip(again["cells"], data["cells"], strict=True):
        assert new.get("missing") == old.get("missing")
        if "value" in old:
            assert new["value"] == pytest.approx(old["value"], rel=2e-3)
            assert new["low"] == pytest.approx(old["low"], rel=1e-2)
