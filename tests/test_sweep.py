"""A sample of the sweep over architectures, one or two of each kind, and that it finds faults."""

import dataclasses
import time

import pytest

from lib.models import context_limit, count, load
from lib.models.card import ModelError
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
        load.require_context(load.card(tiny.fields("llama")), 0, 1)

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
    right = count.count

    def off(*args, **options):
        return dataclasses.replace(right(*args, **options), **change)

    monkeypatch.setattr(count, "count", off)
    found = sweep.verdicts("llama", [])
    assert {column for column, (verdict, _) in found.items() if verdict == "wrong"} == columns


def test_a_table_of_positions_that_ends_before_the_stated_limit_is_found(monkeypatch):
    monkeypatch.setattr(context_limit, "_usable", lambda net, limit: limit + 1)
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


def kept(**columns):
    now = {t: {c: verdict for c, (verdict, _) in row.items()} for t, row in ROWS.items()}
    return sweep.Kept(now=now, **columns)


def test_the_page_counts_and_names_what_is_not_exact():
    text = sweep.page(ROWS, kept(before=kept().now, label="commit 1"), "transformers 5.0")
    assert "with transformers 5.0: 3 causal model types." in text
    assert "| parameters | 2 (2) | 0 (0) | 0 (0) | 1 (1) |" in text
    assert "| cache | 0 (0) | 1 (1) | 1 (1) | 0 (0) |" in text
    assert "In brackets: commit 1." in text
    assert "## Cache: what is not exact" in text and "- refused: b. ...: not understood" in text
    assert "(2)" not in sweep.page(ROWS, kept(), "transformers 5.0")


def test_verdicts_are_kept_a_line_a_type_beside_those_of_an_earlier_sweep(tmp_path):
    path = tmp_path / "models.csv"
    assert sweep.read(path) == sweep.Kept()
    sweep.write(path, kept())
    assert path.read_text().splitlines()[1] == "a,exact,,wrong" + "," * 6
    assert sweep.read(path) == kept()
    later = sweep.replace(sweep.read(path).since("library 1"), now={"d": {"cache": "exact"}})
    sweep.write(path, later)
    assert sweep.read(path) == later
    assert path.read_text().splitlines()[0].endswith(",graph-compiled: library 1")


def test_the_page_that_is_kept_is_the_sweeps():
    """Counts and names of docs/models.md are those of docs/models.csv beside it."""
    written = sweep.read(sweep.ROOT / "docs" / "models.csv")
    page = (sweep.ROOT / "docs" / "models.md").read_text()
    assert len(written.now) > 150 and f"{len(written.now)} causal model types" in page
    assert "\n".join(sweep.table(written)) in page
    for column in (*sweep.CARD, *sweep.STACKS):
        _, _, rest = page.partition(f"## {column[0].upper()}{column[1:]}: what is not exact\n")
        lines = [x[2:] for x in rest.partition("\n## ")[0].splitlines() if x.startswith("- ")]
        named = [n for x in lines for n in x.partition(": ")[2].partition(". ")[0].split(", ")]
        odd = [t for t, row in written.now.items() if row.get(column, "exact") != "exact"]
        assert sorted(named) == sorted(odd)
