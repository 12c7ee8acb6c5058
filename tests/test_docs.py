"""The pages under docs/: their Python runs, their links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(page):
    links = [x for x in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in x]
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


def run(block: str, names: dict) -> object:
    """Run a block; the value of its last line where that is an expression."""
    tree = ast.parse(block)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "docs/data.md", "exec"), names)
    if last is None or "set_ylabel" in ast.unparse(last):
        return None
    return eval(compile(ast.Expression(last.value), "docs/data.md", "eval"), names)
