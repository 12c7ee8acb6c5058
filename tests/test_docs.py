"""The pages under docs/: their Python runs, their links lead somewhere."""

import ast
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(page):
    prose = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    links = [x for x in LINK.findall(prose) if "://" not in x]
    assert [x for x in links if not (page.parent / x).exists()] == []


def test_the_recipes_run(monkeypatch):
    """All of docs/data.md in one go, as a reader would paste it."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    values = [run(block, names) for block in blocks]
    table, number, axes, ratio, median = values
    assert list(table["metric"].unique()) == ["output"] and len(table)
    assert number == pytest.approx(15.695, abs=1e-3)  # what the report prints as 15.70
    assert axes is None and len(names["ax"].get_lines()) > 3
    assert ratio.low < ratio.value < ratio.high < 1
    assert median.n == 6


def test_the_memory_paragraph_is_what_its_table_holds():
    """docs/paper.md against kv-contribution.csv of the released set, at 2,048 tokens."""
    path = ROOT / "outputs/released/h100-sxm/tables/kv-contribution.csv"
    with path.open(encoding="utf-8") as file:
        rows = {
            (r["model"], r["experts"]): r for r in csv.DictReader(file) if r["context"] == "2048"
        }
    names = ("peak above baseline (MiB)", "KV cache (MiB)", "logits (MiB)", "experts (MiB)")
    above, cache, logits, experts = (
        {key: float(row[name]) for key, row in rows.items()} for name in names
    )
    qwen, yi, ours = ("Qwen3-32B", "none"), ("Yi-34B", "none"), ("gpt-oss-20b", "all_experts")
    sentences = (
        f"{cache[qwen] / above[qwen]:.0%} of Qwen3-32B's {above[qwen]:,.0f} MiB are cache and "
        f"{logits[qwen] / above[qwen]:.0%} are the prompt's logits",
        f"in the prefill: {cache[yi] / above[yi]:.0%} of {above[yi]:,.0f} MiB are cache",
        f"{above[ours]:,.0f} MiB, with every expert computed, {experts[ours]:,.0f} are the "
        f"experts' workspace and {cache[ours]:.0f} are cache",
    )
    assert rows[yi]["peak in"] == "prefill" and logits[yi] == 0
    text = " ".join((ROOT / "docs/paper.md").read_text(encoding="utf-8").split())
    for sentence in sentences:
        assert sentence.replace("%", " %") in text


def run(block: str, names: dict) -> object:
    """Run a block; the value of its last line where that is an expression."""
    tree = ast.parse(block)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "docs/data.md", "exec"), names)
    if last is None or "set_ylabel" in ast.unparse(last):
        return None
    return eval(compile(ast.Expression(last.value), "docs/data.md", "eval"), names)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
