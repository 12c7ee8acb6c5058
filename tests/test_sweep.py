"""A sample of the sweep over architectures, one or two of each kind, and that it finds faults."""

import dataclasses
import json
import time

import pytest

from lib import counting, models
from lib.card import ModelError
from tools import sweep, tiny

# model type -> what each stack says of it
SAMPLE = {
    "llama": {"hf-static": "exact", "graph": "exact", "graph-compiled": "exact"},
    "gpt2": {"graph": "exact", "graph-compiled": "exact"},
    "falcon": {"graph-compiled": "exact"},
    "mixtral": {"graph-compiled": "exact"},
    "deepseek_v3": {"graph-compiled": "exact"},  # latents
    "gemma4_text": {"graph": "exact", "graph-compiled": "refused"},  # heads that differ by layer
    "gemma3": {"graph-compiled": "exact"},  # a vision tower
    "bart": {"graph": "exact"},  # an attention to an encoder that is not there
    "mamba": {"hf-eager": "exact", "graph": "refused"},
    "qwen3_next": {"hf-eager": "exact", "graph": "refused"},  # linear attention, experts
    "zamba2": {"hf-eager": "exact"},  # states and keys in one layer
    "lfm2": {"hf-eager": "exact"},  # short convolutions
    "deepseek_v32": {"hf-eager": "exact"},  # an index of sparse attention
    "longcat_flash": {"hf-eager": "exact"},  # experts that compute nothing
    "smollm3": {"graph-compiled": "exact"},  # layers without rotation
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_is_right_in_every_column(model_type):
    expected = SAMPLE[model_type]
    found = sweep.verdicts(model_type, list(expected))
    said = {column: verdict for column, (verdict, _) in found.items()}
    assert said.pop("static cache", "exact") == "exact"  # not every type has one
    assert said == dict.fromkeys(("parameters", "active", "cache", "limit"), "exact") | expected


def test_every_type_of_the_library_has_a_configuration():
    """Nothing is built: that takes minutes, and is what `make sweep` does."""
    assert set(tiny.NEEDS) <= set(tiny.types())
    assert len(tiny.types()) > 150
    for name in ("llama", "gemma3", "deepseek_v3"):
        fields = tiny.fields(name)
        assert fields["model_type"] == name
        assert (fields.get("text_config") or fields)["hidden_size"] == 32


def test_verdicts():
    def ours():
        raise_ours()

    def theirs():
        return {}["missing"]

    def raise_ours():
        models.require_context(models.card(tiny.fields("llama")), 0, 1)

    assert sweep.judged(lambda: (3, 3)) == ("exact", "")
    assert sweep.judged(lambda: (3, 4)) == ("wrong", "3 instead of 4")
    assert sweep.judged(ours)[0] == "refused" and "ModelError: context 0" in sweep.judged(ours)[1]
    assert sweep.judged(theirs) == ("crash", "KeyError: 'missing'")
    with pytest.raises(ModelError):
        raise_ours()


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"total_params": 1}, {"parameters"}),
        ({"active_params": 1}, {"active"}),
        ({"kv_layers": ((33, None),) * 4}, {"cache", "static cache"}),
        ({"state_bytes": 1}, {"cache", "static cache"}),
        ({"context_limit": 129}, set()),  # rotations go on
    ],
)
def test_a_card_that_is_wrong_is_found(monkeypatch, change, columns):
    count = counting.count

    def off(*args, **options):
        return dataclasses.replace(count(*args, **options), **change)

    monkeypatch.setattr(counting, "count", off)
    found = sweep.verdicts("llama", [])
    assert {column for column, (verdict, _) in found.items() if verdict == "wrong"} == columns


def test_a_table_of_positions_that_ends_before_the_stated_limit_is_found(monkeypatch):
    monkeypatch.setattr(counting, "_usable", lambda net, limit: limit + 1)
    assert sweep.verdicts("gpt2", [])["limit"] == ("wrong", "129 tokens fail instead of None")


def test_a_type_that_hangs_or_ends_its_process_is_a_crash(monkeypatch):
    monkeypatch.setattr(sweep, "SECONDS", 0.2)
    monkeypatch.setattr(sweep, "verdicts", lambda *_: time.sleep(60))
    assert sweep.guarded("llama")["cache"] == ("crash", "not done in 0.2 s")
    monkeypatch.setattr(sweep, "SECONDS", 30)
    monkeypatch.setattr(sweep, "verdicts", lambda *_: sweep.os._exit(9))
    assert sweep.guarded("llama")["cache"] == ("crash", "the process ended with 9")


ROWS = {
    "a": {"parameters": ("exact", ""), "cache": ("wrong", "3 instead of 4")},
    "b": {"parameters": ("exact", ""), "cache": ("refused", "ModelError: b: not understood")},
    "c": {"parameters": ("crash", "KeyError: 'x'")},
}


def test_the_page_counts_and_names_what_is_not_exact():
    told = {"rows": ROWS, "versions": {"transformers": "5.0", "torch": "2.0+cpu"}, "label": "now"}
    kept = {t: {c: sweep.verdict_of(e) for c, e in row.items()} for t, row in ROWS.items()}
    before = json.loads(json.dumps(told | {"rows": kept, "label": "commit 1"}))
    text = sweep.page(told, before)
    assert "transformers 5.0, torch 2.0: 3 causal model types." in text
    assert "| parameters | 2 (2) | 0 (0) | 0 (0) | 1 (1) |" in text
    assert "| cache | 0 (0) | 1 (1) | 1 (1) | 0 (0) |" in text
    assert "In brackets: commit 1, with transformers 5.0" in text
    assert "## Cache: what is not exact" in text and "- refused: b. ...: not understood" in text
    assert "(2)" not in sweep.page(told, None)


def test_the_page_that_is_kept_is_the_sweeps():
    """Counts of docs/models.json, which `make sweep` writes beside the page."""
    root = sweep.ROOT / "docs"
    told = json.loads((root / "models.json").read_text())
    assert len(told["rows"]) > 150
    page = (root / "models.md").read_text()
    for line in sweep.table(told["rows"]):
        column, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if column in (*sweep.CARD, *sweep.STACKS):
            (found,) = [row for row in page.splitlines() if row.startswith(f"| {column} |")]
            counts = [cell.split()[0] for cell in found.strip("|").split("|")[1:]]
            assert counts == cells
