"""Tables: numbers a reader can check by hand, and the printed values against the paper's CSVs."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import nbformat.v4 as v4
import pytest
from bs4 import BeautifulSoup

from lib import stats
from lib.analysis import ablations, energy, estimators, experts, latency, memory
from lib.files import ROOT
from lib.records.record import Record, environment_record, record_id
from lib.records.store import load_tree
from lib.report import sections
from lib.report.abstract import findings
from lib.show import wording
from lib.show.notebook_html import render_fragment
from lib.show.table import Column, Number, Table, Text, Verdict, flat, or_why, words
from lib.show.wording import short
from lib.stats import Estimate
from lib.studies import paper_tables
from lib.studies.study import load_published, paper_name
from tests.samples import records as sample

PAPER_CSVS = ROOT.parent / "shared" / "paper" / "csv"


@pytest.fixture(scope="module")
def published() -> dict:
    return load_published()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return load_tree(sample.write_paper(tmp_path_factory.mktemp("paper")))


@pytest.fixture(scope="module")
def cells(rows: list[Record], published: dict) -> dict:
    tables_of_paper = paper_tables.paper_tables(sample.as_the_paper(rows), published)
    return {(c.table, c.row, c.column): c for t in tables_of_paper for c in t.cells}


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        (1, "GPT-OSS-20B", "TTFT (ms)", 110),  # 2048 / 20480 + 0.01 s
        (1, "GPT-OSS-20B", "p50 (ms)", 740),  # 100 ms + 64 x 10 ms
        (1, "GPT-OSS-20B", "p95 (ms)", 777),  # largest of 11: 740 x 1.05
        (1, "GPT-OSS-20B", "TPOT (tok/s)", 64 / 0.74),
        (2, "128", "Yi-34B", 64 / (4 * (128 / 20480 + 0.64))),
        (3, "512", "Qwen3-32B", 70),
        (4, "GPT-OSS-20B", "ΔTPOT (%)", 100 * ((128 / 20480 + 0.64) / 0.74 - 1)),
        (5, "Qwen3-32B", "Peak VRAM (MB)", 64500),
        (5, "Qwen3-32B", "Δ vs GPT-OSS (MB)", 21500),
        (5, "Qwen3-32B", "% less vs Qwen/Yi", 100 / 3),
        (5, "Yi-34B", "% less vs Qwen/Yi", 50),
        (6, "GPT-OSS-20B", "J/1K (J)", 10000),  # 640 J / 64 x 1000
        (6, "GPT-OSS-20B", "Tokens/W", 0.1),
        (7, "Yi-34B", "512", 40000),
        (8, "GPT-OSS-20B", "Active (B)", 4),
        (8, "GPT-OSS-20B", "APE-TPOT", 16 / 0.74),  # 64 / 0.74 / 4
        (8, "GPT-OSS-20B", "APE-1/TTFT", 1 / 0.11 / 4),
        (8, "GPT-OSS-20B", "APE-Energy", 0.025),
        (8, "GPT-OSS-20B", "TPOT/GB", 64 / 0.74 / 43),
        (9, "Greedy", "p50 time (s)", 0.665),  # 512 / 20480 + 0.64
        (9, "Greedy", "Δ vs Greedy (%)", 0),
        (9, "Top-p (0.9)", "Δ vs Greedy (%)", -20),  # 1.25 times the time
        (10, "512", "Δ vs 512 (%)", 0),
        (10, "2048", "Δ vs 512 (%)", 100 * (0.665 / 0.74 - 1)),
        (11, "FP32", "p50 tok/s", 64 / 1.33),
        (12, "Transformers", "p50 time (s)", 0.665),
    ],
)
def test_measured_by_the_papers_definition(cells, table, row, column, value):
    assert cells[table, row, column].measured.value == pytest.approx(value)


def test_ratio_is_measured_over_printed_and_keeps_the_interval(cells):
    cell = cells[1, "GPT-OSS-20B", "TTFT (ms)"]
    assert cell.printed == "459.72"
    assert cell.ratio.value == pytest.approx(110 / 459.72)
    assert (cell.measured.low, cell.measured.high) == pytest.approx((105.6, 114.4))
    assert cell.ratio.low == pytest.approx(105.6 / 459.72)
    assert cell.n == 11


def test_a_change_has_no_ratio_and_says_why(cells):
    assert cells[4, "GPT-OSS-20B", "ΔTPOT (%)"].ratio.value is None
    assert "no ratio" in cells[4, "GPT-OSS-20B", "ΔTPOT (%)"].ratio.reason


@pytest.mark.parametrize(
    ("table", "row", "column", "word", "why"),
    [
        (1, "GPT-OSS-20B", "TTFT (ms)", "not reproduced", "outside the tolerance"),  # 110, 459.72
        (1, "GPT-OSS-20B", "p95 (ms)", "not testable", "p95 needs n >= 59"),
        (4, "GPT-OSS-20B", "ΔTPOT (%)", "direction only", "the tolerance"),  # -12.7, -21.4 %
        (5, "Qwen3-32B", "Peak VRAM (MB)", "reproduced", ""),  # 64,500, 63,650: 1.3 % more
        (5, "Qwen3-32B", "% less vs Qwen/Yi", "direction only", "33.33 is outside"),  # 31.71
        (5, "GPT-OSS-20B", "Δ vs GPT-OSS (MB)", "", "the reference"),
        (6, "GPT-OSS-20B", "Tokens/W", "reproduced", ""),  # 0.1, 0.102
        (8, "Qwen3-32B", "Active (B)", "reproduced", ""),
        (8, "GPT-OSS-20B", "Active (B)", "not reproduced", "outside"),  # 4, 3.61
        (9, "Top-p (0.9)", "Δ vs Greedy (%)", "direction only", "the tolerance"),  # -20, -1.9
        (9, "Top-k (50)", "Δ vs Greedy (%)", "not testable", "reaches beyond"),  # 0, -1.2
        (9, "Greedy", "Δ vs Greedy (%)", "", "the reference"),
        (11, "FP32", "p50 tok/s", "", "the paper has no value"),
        (12, "vLLM", "p50 tok/s", "", "the paper has no value"),
    ],
)
def test_the_verdict_on_a_cell(cells, table, row, column, word, why):
    verdict = cells[table, row, column].verdict
    assert verdict.word == word and why in verdict.why


def test_eleven_samples_have_no_p95(cells):
    assert cells[1, "GPT-OSS-20B", "p95 (ms)"].measured.method == "max of 11"


def test_failed_arm_shows_its_error_and_vllm_its_reason(cells):
    fp16 = cells[11, "FP16", "p50 tok/s"].measured
    assert fp16.value is None and "found Half" in fp16.reason
    assert "no row of vLLM" in cells[12, "vLLM", "p50 tok/s"].measured.reason


def test_energy_names_the_papers_estimator(cells):
    # 0.9 x 640 J / 64 x 1000
    assert "estimator 9000 J" in cells[6, "GPT-OSS-20B", "J/1K (J)"].note


def test_without_energy_rows_the_cells_say_so(rows, published):
    rows = [r for r in sample.as_the_paper(rows) if r.kind != "energy"]
    without_energy = paper_tables.paper_tables(rows, published)
    cell = next(c for t in without_energy if t.number == 7 for c in t.cells)
    assert cell.measured.value is None and "not measured: no energy row" in cell.measured.reason
    assert cell.ratio.value is None


def test_another_stack_never_fills_a_cell_of_the_paper(rows, published):
    other = [
        Record(
            r.kind,
            r.key | {"stack": "graph"} if r.key.get("stack") else r.key,
            r.samples,
            r.values,
            r.missing,
            r.error,
            r.warnings,
            r.env_id,
        )
        for r in rows
    ]
    tables_of_paper = paper_tables.paper_tables(other, published)
    cell = next(c for t in tables_of_paper if t.number == 1 for c in t.cells)
    assert cell.measured.value is None and "hf-eager" in cell.measured.reason
    stacks = next(t for t in tables_of_paper if t.number == 12)
    assert "graph" in [label for label, _, _ in stacks.rows]


def test_models_on_different_gpus_are_not_subtracted(rows, published):
    other = environment_record(sample.GPU | {"gpu": "NVIDIA A100"})
    moved = [
        Record(
            r.kind,
            r.key,
            r.samples,
            r.values,
            r.missing,
            r.error,
            r.warnings,
            other.env_id if r.key.get("model") == "yi-34b" else r.env_id,
        )
        for r in sample.as_the_paper(rows)
    ]
    tables_of_paper = paper_tables.paper_tables([*moved, other], published)
    table_5 = {(c.row, c.column): c for t in tables_of_paper if t.number == 5 for c in t.cells}
    assert table_5["Yi-34B", "Peak VRAM (MB)"].measured.value == 86000
    delta = table_5["Yi-34B", "Δ vs GPT-OSS (MB)"].measured
    assert delta.value is None and "A100" in delta.reason
    assert table_5["Qwen3-32B", "Δ vs GPT-OSS (MB)"].measured.value == pytest.approx(21500)


def test_names_of_the_papers_models(published):
    assert paper_name("openai/gpt-oss-20b", published) == "GPT-OSS-20B"
    assert paper_name("Qwen/Qwen3-32B", published) == "Qwen3-32B"
    assert paper_name("demo-moe", published) is None


def test_csvs_hold_the_cells(rows, published, tmp_path):
    tables = paper_tables.paper_tables(sample.as_the_paper(rows), published)
    paths = paper_tables.write_csvs(tables, tmp_path)
    assert [p.name for p in paths] == [f"table-{n:02d}.csv" for n in range(1, 13)]
    with paths[0].open(encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    expected = {
        "row": "GPT-OSS-20B",
        "column": "TTFT (ms)",
        "unit": "ms",
        "paper": "459.72",
        "measured": "110",
        "measured_low": "105.6",
        "measured_high": "114.4",
        "measured_n": "11",
    }
    assert {k: first[k] for k in expected} == expected
    assert float(first["ratio"]) == pytest.approx(110 / 459.72)
    assert first["verdict"] == "not reproduced" and "outside the tolerance" in first["why"]
    assert "random weights" in first["note"]


def test_no_paper_tables_without_the_papers_models(tmp_path, published):
    demo = load_tree(sample.write_demo(tmp_path / "demo"))
    assert paper_tables.paper_tables(demo, published) == []
    assert paper_tables.write_csvs([], tmp_path / "out") == []


def test_latency_table_in_figures(rows):
    data = latency.table(rows).frame()
    row = data[(data["model"] == "gpt-oss-20b") & (data["context"] == 2048)].iloc[0]
    assert row["TTFT (ms)"] == pytest.approx(110)
    assert (row["TTFT (ms)_low"], row["TTFT (ms)_high"]) == pytest.approx((105.6, 114.4))
    assert row["TTFT (ms)_n"] == 11
    assert row["p50 (ms)"] == pytest.approx(740)
    assert row["decode throughput (tok/s)"] == pytest.approx(100, rel=0.02)  # 10 ms a token
    assert row["ITL (ms)"] == pytest.approx(10)


SIX = Estimate(6473.4, 6332.0, 6516.5, 6, "median", records=("r1",))
WHY = stats.missing("not measured: " + "a long reason " * 20)
SCRIPT = '"><script>x</script>'


def small(*cells, **fields) -> Table:
    """A table of one row whose first cell is a name."""
    columns = tuple(Column(f"c{i}", "s" if i else "", numeric=i > 0) for i in range(len(cells) + 1))
    return Table("t", "T", columns, (("m", *cells),), **fields)


def soup_of(table: Table) -> BeautifulSoup:
    return BeautifulSoup(table.html(), "html.parser")


def test_an_estimate_fills_four_plain_columns_of_a_frame():
    data = small(SIX, stats.exact(9.0), 7).frame()
    names = ["c1 (s)", "c1 (s)_low", "c1 (s)_high", "c1 (s)_n"]
    assert list(data.columns)[1:5] == names
    assert data[names].to_numpy().tolist() == [[6473.4, 6332.0, 6516.5, 6]]
    assert data[names].dtypes.map(lambda kind: kind.kind).tolist() == ["f", "f", "f", "i"]
    assert data["c2 (s)_n"].tolist() == [1] and data["c2 (s)_low"].isna().all()
    assert data["c3 (s)"].tolist() == [7] and "missing" not in data


def test_a_csv_has_value_low_high_and_n_in_columns_and_reasons_at_the_end(tmp_path):
    path = small(SIX, WHY).write_csv(tmp_path)
    assert path == tmp_path / "tables" / "t.csv"
    with path.open(encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert [line[f"c1 (s){end}"] for end in ("", "_low", "_high", "_n")] == [
        "6473.4",
        "6332",
        "6516.5",
        "6",
    ]
    assert line["c2 (s)"] == line["c2 (s)_n"] == "" and line["missing"] == f"c2: {WHY.reason}"


def test_a_cell_shows_value_and_interval_and_leads_to_its_reason():
    soup = soup_of(small(SIX, WHY, stats.missing("other"), WHY))
    first, second, third, fourth = soup.select("tbody td")
    assert first.select_one(".v").text == "6,473"  # whole units stay: 16,392 is not 16,390
    assert first.select_one(".ci").text == "[6,332, 6,516]"
    assert (first["data-value"], first["data-n"], first["data-records"]) == ("6473.4", "6", "r1")
    assert first["title"] == "n = 6; median"  # the interval is in the cell
    (hidden,) = soup_of(small(Number(SIX, show_interval=False))).select("tbody td")
    assert hidden["title"] == "n = 6; median; 95 % interval [6,332, 6,516]"
    assert [cell.a.text for cell in (second, third, fourth)] == ["a", "b", "a"]
    reason = soup.find(id=second.a["href"][1:]).text
    assert reason == f"a {WHY.reason}" and len(soup.select(".footnotes li")) == 2


@pytest.mark.parametrize("page", [True, False])
def test_what_most_numbers_of_a_column_share_its_header_says_once(page):
    """Of three numbers the one that was measured in another way says so itself; a number that says
    nothing of how it was measured must not be read as one of the others."""
    one, other = stats.exact(1.0), replace(SIX, method="mean")
    columns = (Column("m", numeric=False), Column("t", "s"), Column("u", "s"), Column("v", "s"))
    rows = (("a", SIX, one, SIX), ("b", SIX, one, Text("7", sort="7")), ("c", other, one, SIX))
    page = BeautifulSoup(Table("t", "T", columns, rows).html(page=page), "html.parser")
    assert [th.get("title") for th in page.select("thead th")] == [
        None,
        "n = 6; median",
        f"n = 1; {one.method}; {one.reason}",
        None,
    ]
    titles = [[td.get("title") for td in tr.select("td")] for tr in page.select("tbody tr")]
    assert titles == [
        [None, None, "n = 6; median"],
        [None, None, None],
        ["n = 6; mean", None, "n = 6; median"],
    ]


def test_cells_of_every_type_and_their_words():
    verdict = Verdict("not reproduced", "too far", "✗", "fails", 2)
    number = Number(SIX, 1, "s", "of m", "a setup", verdict)
    cells = (1234, 0.00123, None, Text("x", "small", "u", ("why",)), verdict, (number, Text("y")))
    table = small(*cells)
    count, real, none, link, word, lines = soup_of(table).select("tbody td")
    assert (count.text, real.text, none.text) == ("1,234", "0.00123", "–")
    assert link.a["href"] == "u" and link.select_one(".ci").text == "small"
    assert word.b.text == "not reproduced" and word["data-value"] == "2"
    assert word.select_one(".verdict.fails")["title"] == "not reproduced: too far"
    assert [div.get_text() for div in lines.select("div")] == [
        "✗ 6,473.4 s [6,332, 6,516], n = 6, of m",
        "y",
    ]
    assert words(cells[-1]) == "6,473.4 s [6,332, 6,516], n = 6 (of m); y"
    assert "| 1234 | 0.00123 |  | x (small) (why) (u) | not reproduced: too far |" in repr(table)
    assert table.frame()["c6 (s)"].tolist() == [words(cells[-1])]


def test_several_numbers_in_a_cell_stand_under_those_of_other_rows():
    two = (stats.exact(1.0), Number(stats.exact(2.0), label="another way"))
    columns = (Column("model", numeric=False), Column("time", "s"), Column("why", numeric=False))
    rows = (("a", two, ("one", "two")), ("b", stats.exact(3.0), "no"))
    soup = BeautifulSoup(Table("t", "T", columns, rows).html(), "html.parser")
    cells = [td["class"][0] for tr in soup.select("tbody tr") for td in tr.select("td")]
    assert cells == ["num", "text", "num", "text"]


def test_a_table_is_shown_whole_with_its_reasons():
    table = small(*[SIX, WHY] * 15)
    for text in (table._repr_html_(), repr(table)):
        assert WHY.reason.strip() in text
        assert "..." not in text and "NaN" not in text and "None" not in text


def test_hostile_text_is_text_everywhere():
    table = Table(
        SCRIPT,
        SCRIPT,
        (Column(SCRIPT), Column("b", SCRIPT, group=Column(SCRIPT)), Column(SCRIPT, numeric=False)),
        (
            (SCRIPT, Estimate(1.0, method=SCRIPT, reason=SCRIPT), Text(SCRIPT, SCRIPT, SCRIPT)),
            (SCRIPT, stats.missing(SCRIPT), Verdict(SCRIPT, SCRIPT, SCRIPT, SCRIPT)),
            (SCRIPT, Number(SIX, setup=SCRIPT, label=SCRIPT), (SCRIPT, Text(SCRIPT))),
        ),
        (SCRIPT,),
        (SCRIPT,),
        (SCRIPT, "b", "c"),
    )
    for html in (table.html(), table._repr_html_()):
        soup = BeautifulSoup(html, "html.parser")
        assert not soup.find("script") and "<script" not in html
        assert soup.figure["id"] == f"grid-{SCRIPT}" and len(soup.select("tbody tr")) == 3


def test_columns_of_a_group_share_a_header():
    group = Column("TTFT", "ms")
    columns = (Column("m"), Column("paper", group=group), Column("ours", group=group))
    table = Table("t", "T", columns, (("a", Text("1", sort="1"), SIX),))
    (top, below) = soup_of(table).select("thead tr")
    assert [(th.text, th.get("colspan"), th.get("rowspan")) for th in top.select("th")] == [
        ("m", None, "2"),
        ("TTFT ms", "2", None),
    ]
    assert [th["data-col"] for th in below.select("th")] == ["1", "2"]
    assert table.frame().columns[1] == "TTFT (ms), paper"


def test_a_word_too_long_to_read_opens_on_demand():
    name = "_ZN7cutlass13device_kernel" + "I" * 60
    grid = Table("k", "Kernels", (Column("of"), Column("kernel")), (("m", name), ("m", "gather")))
    page = BeautifulSoup(grid.html(), "html.parser")
    (clipped,) = page.select("details.clip")
    assert clipped.summary.text == name[:64] + "…"
    clipped.summary.extract()
    assert clipped.text == name
    assert name in grid.markdown() and grid.lines()[0]["kernel"] == name


def test_a_table_without_rows_says_why():
    table = or_why(replace(small(SIX), rows=()), "no call was profiled")
    assert "No call was profiled." in table._repr_html_() and "<table" not in table._repr_html_()
    assert repr(table) == "T.\n\nNo call was profiled." and table.frame().empty


def test_in_a_notebook_a_tooltip_says_what_a_number_rests_on():
    """The page's own tables open it; a notebook is read by programs that have no such script."""
    output = v4.new_output("display_data", {"text/html": small(SIX, WHY)._repr_html_()})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("t", outputs=[output])])
    soup = BeautifulSoup(render_fragment(notebook, "x"), "html.parser")
    (region,) = soup.select(".scroll")
    cell, missing = region.select("tbody td")
    assert cell.text == "6,473 [6,332, 6,516]" and cell["class"] == ["num"]
    assert cell["title"] == "n = 6; median"
    assert set(cell.attrs) == {"class", "title"}
    assert BeautifulSoup(small(SIX).html(), "html.parser").td["data-records"] == "r1"
    assert WHY.reason.strip() in soup.find(id=missing.a["href"][1:]).text


def test_memory_table_is_decimal_gb_and_names_the_protocol(rows):
    data = memory.tables.table(rows).frame()
    row = data[
        (data["model"] == "qwen3-32b") & (data["context"] == 2048) & (data["protocol"] == "paper")
    ].iloc[0]
    assert row["peak (GB)"] == pytest.approx(64500 * 2**20 / 1e9, rel=1e-3)
    assert row["above baseline (GB)"] == pytest.approx(1000 * 2**20 / 1e9, rel=1e-3)


def test_energy_table_has_the_mean_power_of_the_window(rows):
    data = energy.tables.table(rows).frame()
    row = data[(data["model"] == "yi-34b") & (data["context"] == 128)].iloc[0]
    assert row["mean power (W)"] == pytest.approx(400)  # 4000 J in 10 s
    assert row["J/1K tokens (J)"] == pytest.approx(40000)
    assert row["J/1K, before/after estimator (J)"] == pytest.approx(36000)


def test_energy_table_on_a_cpu_gives_the_reason(tmp_path):
    data = energy.tables.table(load_tree(sample.write_demo(tmp_path))).frame()
    assert data["J/1K tokens (J)"].isna().all()
    assert data["missing"].str.contains("no NVML energy counter").all()


def test_ablation_verdicts(rows):
    data = ablations.table(rows, "decoding").frame().set_index("decoding")
    assert data.loc["greedy", "verdict"] == "base arm"
    assert data.loc["temperature 0.7 top-p 0.9", "verdict"] == "slower"
    assert data.loc["temperature 0.7 top-p 0.9", "throughput / base arm"] == pytest.approx(0.8)
    assert data.loc["temperature 0.7 top-k 50", "verdict"] == "no difference resolved"
    precision = ablations.table(rows, "precision").frame().set_index("dtype")
    assert "found Half" in precision.loc["float16", "verdict"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (1234.5, "1,234"),
        (123.45, "123.5"),
        (1.23456, "1.235"),
        (0.00123, "0.00123"),
        (-20.5, "-20.50"),
        (99.999, "100.0"),
        (999.99, "1,000"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_reading_side_needs_no_torch():
    code = "import sys, lib.report.document, lib.analysis.latency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- the printed values against the paper's released CSVs ----------------------------------------


def released(name: str) -> list[dict[str, str]]:
    if not PAPER_CSVS.is_dir():
        pytest.skip(f"the paper's released CSVs are not at {PAPER_CSVS.name}/ beside the checkout")
    with (PAPER_CSVS / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def printed(published: dict, table: int) -> dict[tuple[str, str], str | None]:
    spec = published["tables"][table]
    return {
        (row, column): value
        for row, values in spec["rows"].items()
        for column, value in zip(spec["columns"], values, strict=True)
    }


def agrees(text: str, exact: str | float) -> bool:
    """Whether the printed text is the exact number to within one unit of its last digit."""
    unit = Decimal(1).scaleb(Decimal(text).as_tuple().exponent)
    return abs(Decimal(text) - Decimal(str(exact))) <= unit


def test_agreement_means_one_unit_of_the_last_digit():
    assert agrees("193.17", "193.178") and not agrees("193.17", "193.19")
    assert agrees("43461", "43461.9") and not agrees("43461", "43479.9")


def test_tables_1_to_3_and_7_hold_values_of_the_released_runs(published):
    """Each printed value is that of the latency runs or of the energy runs, which differ."""
    latency_runs = released("unified_latency_comparison.csv")
    energy_runs = released("unified_energy_comparison_fixed.csv")
    names = {"GPT-OSS-20B": "gpt-oss-20b", "Qwen3-32B": "qwen3-32b", "Yi-34B": "yi-34b"}
    fast = {
        (r["model_short"], r["context_length"]): r for r in latency_runs if r["gen_tokens"] == "64"
    }
    warm = {(r["model_short"], r["context_length"]): r for r in energy_runs}
    for (context, model), text in printed(published, 3).items():
        at = (names[model], context)
        assert agrees(text, fast[at]["TTFT_ms"]) or agrees(text, warm[at]["ttft_ms"]), at
    for (context, model), text in printed(published, 2).items():
        at = (names[model], context)
        assert agrees(text, fast[at]["TPOT_tokps"]) or agrees(text, warm[at]["TPOT_tokps"]), at
    for (model, column), text in printed(published, 1).items():
        field = {"p50 (ms)": "p50_ms", "p95 (ms)": "p95_ms"}.get(column)
        if field:
            assert agrees(text, fast[names[model], "2048"][field]), (model, column)
    off = []
    for (model, context), text in printed(published, 7).items():
        at = (names[model], context)
        if not agrees(text, warm[at]["energy_per_1k_joules"]):
            off.append((at, text, round(float(warm[at]["energy_per_1k_joules"]), 1)))
    assert off == [(("qwen3-32b", "512"), "12295.2", 12294.7)]  # a misprint of half a joule


def test_table_5_is_mib_and_its_first_row_differs_from_the_csv(published):
    rows = {
        r["model_short"]: r
        for r in released("unified_memory_comparison_fixed.csv")
        if r["context_length"] == "2048"
    }
    peaks = {row: v for (row, c), v in printed(published, 5).items() if c == "Peak VRAM (MB)"}
    assert agrees(peaks["Qwen3-32B"], rows["qwen3-32b"]["peak_alloc_mb"])
    assert agrees(peaks["Yi-34B"], rows["yi-34b"]["peak_alloc_mb"])
    assert float(rows["gpt-oss-20b"]["peak_alloc_mb"]) - float(peaks["GPT-OSS-20B"]) == (
        pytest.approx(18.9, abs=0.1)
    )


def test_table_6_holds_the_energy_runs(published):
    rows = {
        r["model_short"]: r
        for r in released("unified_energy_comparison_fixed.csv")
        if r["context_length"] == "2048"
    }
    fields = {
        "TPOT (tok/s)": "TPOT_tokps",
        "Tokens/W": "tokens_per_watt",
        "J/1K (J)": "energy_per_1k_joules",
    }
    for (model, column), text in printed(published, 6).items():
        assert agrees(text, rows[model.lower()][fields[column]]), (model, column)


def test_table_8_divides_by_other_active_parameters_than_its_csv(published):
    """The CSV says 3.6 and uses the latency runs' TPOT; the table says 3.61."""
    rows = {r["model_id"]: r for r in released("ape_analysis.csv") if r["context_length"] == "2048"}
    table = printed(published, 8)
    assert rows["gpt-oss-20b"]["active_params_B"] == "3.6"
    assert table["GPT-OSS-20B", "Active (B)"] == "3.61"
    for model in ("Qwen3-32B", "Yi-34B"):
        exact = rows[model.lower()]
        assert agrees(table[model, "Active (B)"], exact["active_params_B"])
        assert agrees(table[model, "APE-Energy"], exact["tokens_per_watt_per_activeB"])
    for model, peak in (("GPT-OSS-20B", 43.461), ("Qwen3-32B", 63.650), ("Yi-34B", 66.459)):
        rate = float(printed(published, 1)[model, "TPOT (tok/s)"])
        assert agrees(table[model, "TPOT/GB"], rate / peak), model  # MiB / 1000, not 10^9 bytes


def test_ablation_tables_hold_the_released_medians(published):
    def medians(name: str, label: str) -> dict[str, dict[str, str]]:
        return {r[label]: r for r in released(f"ablation_{name}_openai_gpt-oss-20b.csv")}

    sources = {
        9: medians("decoding_parameters", "decoding_method"),
        10: medians("context_scaling", "target_context_length"),
        11: medians("quantization_effects", "precision"),
        12: medians("server_comparison", "framework"),
    }
    fields = {"p50 tok/s": "p50_tokps", "p50 time (s)": "p50_time_s"}
    for table, rows in sources.items():
        for (row, column), text in printed(published, table).items():
            if text is not None and column in fields:
                assert agrees(text, rows[row][fields[column]]), (table, row, column)


def test_every_table_says_where_and_matches_its_columns(published):
    for number, spec in published["tables"].items():
        assert f"table {number}" in spec["where"]
        for values in spec["rows"].values():
            assert len(values) == len(spec["columns"])
            assert all(v is None or isinstance(v, str) and float(v) is not None for v in values)


def test_missing_estimates_keep_their_reason_in_frames():
    data = small(stats.missing("why")).frame()
    assert data["missing"].tolist() == ["c1: why"]


def bounded(seconds, size=10**9):
    """A call of 11 tokens at 100 of context, 1 s to the first; 100 GB/s of copy bandwidth."""
    env = environment_record({"gpu": "G", "copy_bytes_per_s": 100e9})
    key = {
        "model": "m",
        "dtype": "bfloat16",
        "stack": "hf-eager",
        "weights": "random",
        "context": 100,
        "decoding": "greedy",
        "batch": 1,
    }
    return [
        env,
        Record("latency", {**key, "new_tokens": 1}, {"ttft_s": [1.0] * 6}, env_id=env.env_id),
        Record(
            "latency",
            {**key, "new_tokens": 11},
            {"e2e_s": [seconds] * 6},
            {"decode_bytes": size},
            env_id=env.env_id,
        ),
    ]


def bound_finding(rows):
    abstract = findings(rows, load_published(), [])
    return next((f.text for f in abstract if f.lead == "Against the bound"), None)


def test_a_slope_leads_to_every_row_that_it_joins():
    _, one, eleven = bounded(2.0)  # 10 tokens in 1 s
    twenty = replace(eleven, key=eleven.key | {"new_tokens": 20}, samples={"e2e_s": [2.9] * 6})
    rate = estimators.decode_tok_per_s([one, eleven, twenty])  # 9 more in 0.9 s
    assert rate.value == pytest.approx(10)
    assert rate.records == (record_id(one), record_id(eleven), record_id(twenty))


def test_an_energy_row_whose_first_call_was_slow_says_so():
    for first, names in ((1.3, ["m at 128"]), (1.1, [])):
        key = sample.key("m", context=128)
        rows = [
            Record("energy", key, {"e2e_s": [first, 1.0, 1.0, 0.9], "energy_j": [400.0]}),
            Record("energy", key | {"context": 512}, {"e2e_s": [9.0], "energy_j": [400.0]}),
        ]
        notes = [note for note in energy.tables.table(rows).notes if "first call" in note]
        assert [
            f"over 15% longer than the others in 1 of 1 rows ({name})" in note
            for note, name in zip(notes, names, strict=True)
        ] == [True] * len(names)


def test_decoding_far_below_its_bound_is_said_in_the_abstract():
    text = bound_finding(bounded(2.0))  # 10 tokens in 1 s; 1 GB a step allows 100 tok/s
    assert text.startswith(
        "m decodes 10.00 [10.00, 10.00] of 100.0 tok/s (10%): what reading a step's bytes"
    )
    assert "None reaches half of it" in text


def test_decoding_near_its_bound_is_not_blamed_on_the_host():
    text = bound_finding(bounded(1.125))  # 10 tokens in 0.125 s: 80 tok/s
    assert text.startswith("m decodes 80.00 [80.00, 80.00] of 100.0 tok/s (80%)")
    assert "None" not in text


def test_what_another_stack_reaches_of_the_bound_stands_with_its_throughput():
    rows = bounded(2.0)
    fast = [replace(r, key=r.key | {"stack": "graph"}) for r in bounded(1.125)[1:]]
    (finding,) = [f for f in findings([*rows, *fast], load_published(), []) if "on graph" in f.lead]
    assert finding.lead.startswith("Output throughput") and "Against hf-eager" in finding.text
    assert finding.text.endswith("m decodes 80.00 [80.00, 80.00] of 100.0 tok/s (80%).")


def test_a_step_that_a_cache_holds_has_no_bound():
    assert bound_finding(bounded(2.0, size=10**6)) is None


# --- what a step really reads


def traced(model="oss", nominal=4 * 10**9, **values):
    full = {
        "active_params_nominal": nominal,
        "active_params_realised": 5 * nominal,
        "experts_chosen_decode": 4.0,
        "experts_touched_decode": 32.0,
        "decode_experts": "x",
        "experts_touched_prefill": 32.0,
        "routing_entropy_bits": 4.5,
        "decode_bytes": 2 * nominal,
        "decode_bytes_realised": 10 * nominal,
    }
    return Record("trace", sample.key(model, new_tokens=None), {}, full | values)


def test_the_trace_table_shows_both_counts_of_parameters_and_bytes():
    (line,) = experts.table([traced()]).frame().to_dict("records")
    assert (line["active, nominal (10^9)"], line["active, realised (10^9)"]) == (4, 20)
    assert (line["a step must read (GB)"], line["with the experts used (GB)"]) == (8, 40)
    assert line["experts touched in a step"] == 32 and line["routing entropy (bits)"] == 4.5
    assert (line["batch"], line["decode runs"]) == (1, "x")
    assert sections.generic_tables([traced()])[0].name == "trace"


def test_small_models_are_shown_in_millions():
    (line,) = experts.table([traced(nominal=4 * 10**6)]).frame().to_dict("records")
    assert (line["active, nominal (10^6)"], line["with the experts used (MB)"]) == (4, 40)


def test_a_dense_model_has_no_router_and_a_failed_trace_its_error():
    key = sample.key("yi-34b", new_tokens=None)
    values = {"active_params_nominal": 10**9, "active_params_realised": 10**9, "note": "no router"}
    dense, failed = (
        experts.table(
            [
                Record("trace", key, {}, values),
                Record("trace", key | {"batch": 2}, error="Error: x"),
            ]
        )
        .frame()
        .to_dict("records")
    )
    assert dense["active, realised (10^9)"] == 1
    assert "experts touched in a step: no router" in dense["missing"]
    assert "active, nominal: failed: Error: x" in failed["missing"]


def test_a_length_of_fewer_than_three_calls_is_no_point_of_a_slope():
    """20 tokens in 2 s and 40 in 4; of 80 tokens two calls, which took as long again by chance."""

    def arm(tokens, calls, **changes):
        name = "ttft_s" if tokens == 1 else "e2e_s"
        return Record("latency", sample.key("m", new_tokens=tokens, **changes), {name: calls})

    base, lone = arm(20, [2.0] * 6), arm(80, [16.0, 16.0])
    rate = estimators.decode_tok_per_s([base, lone])
    assert rate.value is None and rate.reason == (
        "not measured: a slope needs 3 calls of each of two lengths; there are 6 of 20 tokens, "
        "2 of 80 tokens"
    )
    for other in (arm(40, [4.0] * 3), arm(1, [0.1] * 3)):  # a call of one token is a point too
        assert estimators.decode_tok_per_s([base, other, lone]).value == pytest.approx(10)
    captured = {"stack": "graph", "cache": "static"}
    pair = [arm(20, [2.0] * 6, **captured), arm(40, [4.0, 4.0], **captured)]
    assert estimators.decode_tok_per_s(pair).value == pytest.approx(10)
    assert estimators.decode_tok_per_s([pair[0], arm(40, [4.0], **captured)]).value is None


def test_the_level_of_an_interval_stands_beside_it_where_it_is_not_95_percent():
    rate = replace(stats.slope([1] * 6 + [2] * 2, [1.0] * 6 + [2.0, 3.0]), value=1.5)
    assert words(rate) == "1.500 [1.000, 2.000] at 92.9 %, n = 8"
    assert wording.number(rate, "s") == "1.500 s [1.000, 2.000] at 92.9 %, n = 8"
    view = small(rate).html()
    assert 'data-level="92.9 %"' in view and "[1.000, 2.000] at 92.9 %" in view
    assert flat({"x": rate})["x_level"] == pytest.approx(26 / 28)
    usual = replace(rate, level=stats.CONFIDENCE)
    assert "level" not in small(usual).html().split("<tbody>")[1]
    assert set(flat({"x": usual})) == {"x", "x_low", "x_high", "x_n"}


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-14, -0.004, 0.004])
def test_what_rounds_to_nothing_has_no_sign(value):
    assert Number(stats.exact(value), decimals=2).value == "0.00"


def test_a_largest_sample_says_so_beside_what_it_is_of():
    largest = stats.percentile([1.0, 2.0, 3.0], 95)
    table = Table("t", "T", (Column("m"), Column("p95")), (("a", Number(largest, label="today")),))
    assert "max of 3, n = 3, today" in " ".join(table.html().striptags().split())
