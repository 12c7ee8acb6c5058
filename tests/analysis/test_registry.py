"""What was registered is what it was, and asks for what the target is about."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace

import pytest

from lib.analysis.capacity import registry
from lib.files import ROOT, file_sha, read_yaml
from lib.hardware.datasheets import datasheets

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
REGISTERED = sorted((ROOT / registry.FOLDER).glob("*-capacity.json"))
# What was registered, by file: a change of the file and its sidecar together is seen here.
HASHES = {
    "2026-11-27-capacity.json": "88bf9a406d6d04b863ba1882d7815e788fcdf06adf3ce2a2355e7ad24f8a9a78",
}


def test_something_is_registered():
    assert {path.name for path in REGISTERED} == set(HASHES)


@pytest.mark.parametrize("path", REGISTERED, ids=lambda p: p.name)
def test_a_registered_file_is_what_was_registered(path):
    data = registry.sealed(path)
    assert file_sha(path) == HASHES[path.name]
    assert not data["git"]["changed_files"]
    assert file_sha(ROOT / data["question"]["file"]) == data["question"]["sha256"]
    widths = [cell["half_width"] for cell in data["cells"] if "value" in cell]
    for cell in data["cells"]:
        if "value" in cell:
            assert cell["low"] <= cell["value"] <= cell["high"]
        else:
            assert cell["missing"]
    registered = data["summary"]["all"]["median_half_width"]
    assert registered == pytest.approx(statistics.median(widths), abs=1e-3)
    assert registered <= data["target"]["median_half_width_at_most"]


def test_it_asks_for_what_the_target_is_about():
    data = registry.sealed(registry.newest())
    assert {cell["gpu"] for cell in data["cells"]} == {H100, H200}
    asked = {
        (c["model"], c["context"]) for c in data["cells"] if c["gpu"] == H100 and c["batch"] == 1
    }
    for model in ("Llama-3.1-8B", "gpt-oss-20b"):
        assert {(model, n) for n in (8192, 16384, 32768, 65536)} <= asked
    names = ("gpu", "model", "form", "stack", "context", "batch", "metric")
    places = [tuple(cell[name] for name in names) for cell in data["cells"]]
    assert len(places) == len(set(places))


def test_other_cards_are_listed_ones_that_were_not_registered():
    cells = registry.other_cards(registry.newest())["cells"]
    assert {gpu for gpu, *_ in cells} == set(datasheets()) - {H100, H200}
    assert all(low < value < high for *_, (value, low, high), _ in cells)


def test_cards_of_the_question_are_counted():
    models = pytest.importorskip("lib.models.load")
    from lib.models.formats import FORMS, held_as

    for name, card in registry.model_cards(registry.newest()).items():
        model, _, form = name.partition(" ")
        if model == "Qwen3-8B":  # known beforehand, and no entry of the workbook
            assert card.total_params == 8_190_735_360
            continue
        counted = held_as(models.card(model, "bfloat16"), FORMS[form])
        order = sorted(counted.kv_layers, key=str)
        assert replace(card, kv_layers=None) == replace(counted, kv_layers=None), name
        assert sorted(card.kv_layers, key=str) == order, name


def test_a_changed_file_or_page_is_noticed(tmp_path):
    for suffix in (".json", ".md", ".sha256"):
        shutil.copy(REGISTERED[0].with_suffix(suffix), tmp_path)
    copy = tmp_path / REGISTERED[0].name
    registry.sealed(copy)
    page = copy.with_suffix(".md")
    page.write_text(page.read_text(encoding="utf-8").replace("the study", "a study", 1), "utf-8")
    with pytest.raises(registry.Registered, match="md is not what was registered"):
        registry.sealed(copy)
    data = json.loads(copy.read_text(encoding="utf-8"))
    data["cells"][0]["low"] = 0
    copy.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(registry.Registered, match="json is not what was registered"):
        registry.sealed(copy)


def test_the_files_that_go_with_it_are_those_of_its_question():
    path = registry.newest()
    question = read_yaml(ROOT / registry.QUESTIONS / f"{path.stem}.yaml")
    assert question["target"] == registry.sealed(path)["target"]
    assert registry.other_cards(path)["registered"] == path.name
