"""Do two reports hold the same numbers, whatever they look like?

    python tools/same_numbers.py COMMIT [--set outputs/released/h100-sxm] [--python PATH]

builds the report of a result set with the code of COMMIT and with that of this folder, and compares
every (table, row, column): value, low, high, n, the reason where it is missing, and the verdict.
Prints what is only in one of them and what differs; exits with 1 if anything does. A difference
that is wanted is named in the message of the commit that makes it.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import sys
from pathlib import Path

from bs4 import BeautifulSoup, Tag

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.same_report import compare

GZIP = b"\x1f\x8b"  # how a compressed file begins
FIELDS = ("value", "low", "high", "n")
Cells = dict[tuple[str, ...], tuple[str, ...]]


def numbers(report: Path) -> Cells:
    """Every cell of a report's own tables, those of executed notebooks apart.

    A cell is known by table, what its row says in words, and its column; it holds what FIELDS name,
    and the reason or the words where it has no number.
    """
    page = BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")
    cells = _records(page)
    for summary in page.select("details.clip > summary"):  # the start of a name that follows whole
        summary.extract()
    for notebook in page.select("details.job"):
        notebook.extract()
    for figure in page.select("figure.table:has(thead)"):  # one without lines has a caption alone
        reasons = {item["id"]: _text(item) for item in figure.select("ul.footnotes li[id]")}
        titles = _titles(figure)
        seen: dict[tuple[str, ...], int] = {}
        for line in figure.select("tbody tr"):
            row = [cell for cell in line.find_all(("th", "td"), recursive=False)]
            words = tuple(_text(cell) for cell in row if "num" not in cell.get("class", ()))
            seen[words] = seen.get(words, 0) + 1
            for title, cell in zip(titles, row, strict=True):
                place = (figure["id"], *words, str(seen[words]), title)
                cells[place] = _content(cell, reasons)
    return cells


def _records(page: BeautifulSoup) -> Cells:
    """The lines of the embedded records.csv."""
    link = page.find("a", download=("records.csv", "records.csv.gz"))
    data = base64.b64decode(link["href"].partition(",")[2]) if link else b""
    text = (gzip.decompress(data) if data.startswith(GZIP) else data).decode()
    cells: Cells = {}
    for line in csv.DictReader(io.StringIO(text)):
        row = {title: " ".join(value.split()) for title, value in line.items()}
        for title, value in row.items():
            cells["records", *row.values(), "1", title] = ("", "", "", "", value)
    return cells


def _titles(figure: Tag) -> list[str]:
    """One title a column; below a group of columns, the group's and the column's own."""
    top, *below = figure.select("thead tr")
    own = iter([_text(head) for line in below for head in line.find_all("th")])
    titles = []
    for head in top.find_all(("th", "td")):
        width = int(head.get("colspan", 1))
        grouped = bool(below) and not head.get("rowspan")
        titles += [f"{_text(head)}, {next(own)}" if grouped else _text(head) for _ in range(width)]
    return titles


def _content(cell: Tag, reasons: dict[str, str]) -> tuple[str, ...]:
    values = tuple(str(cell.get(f"data-{field}", "")) for field in FIELDS)
    shown = _text(cell)
    if " ".join(values[0].split()) in {"None", shown, shown.replace(",", "")}:  # words, no number
        values = ("", *values[1:])
    links = [a["href"].removeprefix("#") for a in cell.select("a.mark")]
    why = "; ".join(reasons.get(link, link).partition(" ")[2] for link in links)
    return (*values, why) if any(values) or why else ("", "", "", "", _text(cell))


def _text(tag: Tag) -> str:
    return " ".join(tag.get_text(" ", strip=True).split())


def verdicts(folder: Path) -> Cells:
    """Every line of claims.csv, field by field."""
    path = folder / "claims.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        ("claims.csv", *list(row.values())[:2], name): (value,)
        for row in rows
        for name, value in row.items()
    }


def main() -> int:
    return compare(
        __doc__.splitlines()[0],
        "numbers",
        lambda folder: numbers(folder / "report.html") | verdicts(folder),
        name=" | ".join,
    )


if __name__ == "__main__":
    sys.exit(main())
