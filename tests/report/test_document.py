"""The report over a synthetic tree: its text, and the page in a real browser."""

from __future__ import annotations

import csv
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import urldefrag

import pytest
from bs4 import BeautifulSoup

from lib.records.jobs import find
from lib.records.record import Record, environment_record, warning
from lib.records.store import load_tree
from lib.report import comparison, document
from lib.report.abstract import findings
from lib.show.notebook_html import clean, demoted, mathml, read_notebook, render_fragment
from lib.show.wording import compared, once
from lib.stats import Estimate
from lib.studies.paper_tables import paper_tables
from lib.studies.study import load_published
from tests.browser import Page, records_of, unpacked
from tests.samples import records as sample

WIDTHS = (320, 390, 768, 1024, 1280, 1440)
HOSTILE = '"><script>document.title="owned"</script>'


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's models with hostile notebooks, beside a model with a hostile name."""
    root = sample.write_paper(tmp_path_factory.mktemp("paper"), hostile=True)
    env_id = sample.environment_record(sample.GPU).env_id
    rows = sample.latency(HOSTILE, env_id, (2048,))
    sample.write_job(root, "evil-model/random-hf-eager/latency", rows, sample.GPU, model=HOSTILE)
    document.write(root)
    return root


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = sample.write_demo(tmp_path_factory.mktemp("demo"))
    document.write(root)
    return root


@pytest.fixture(scope="module")
def soup(paper: Path) -> BeautifulSoup:
    return BeautifulSoup((paper / "report.html").read_text(encoding="utf-8"), "html.parser")


def text_of(soup: BeautifulSoup, selector: str) -> str:
    return re.sub(r"\s+", " ", soup.select_one(selector).get_text(" "))


# --- the text of the page ------------------------------------------------------------------------


def test_rebuilt_from_the_same_inputs_it_has_the_same_bytes(paper, tmp_path):
    first = {p.relative_to(paper): p.read_bytes() for p in built(paper)}
    document.write(paper)
    assert {p.relative_to(paper): p.read_bytes() for p in built(paper)} == first
    elsewhere = document.write(paper, tmp_path / "rebuilt").read_text(encoding="utf-8")
    again = document.write(paper, tmp_path / "other").read_text(encoding="utf-8")
    assert elsewhere.replace("rebuilt", "other") == again


def built(root: Path) -> list[Path]:
    return [*root.rglob("*.html"), *root.rglob("*.csv")]


def test_a_rebuild_elsewhere_leaves_the_source_alone(tmp_path):
    source = sample.write_demo(tmp_path / "source")
    before = sorted(source.rglob("*"))
    out = tmp_path / "out"
    assert document.write(source, out) == out / "report.html"
    assert sorted(source.rglob("*")) == before


def test_counts_and_every_failure_are_shown(soup):
    counts = text_of(soup, ".counts")
    assert "15 ok" in counts and "1 failed" in counts and "1 missing" in counts
    assert "17 planned jobs" in counts
    failures = [
        text_of(BeautifulSoup(str(x), "html.parser"), "div") for x in soup.select(".failure")
    ]
    assert len(failures) == 2
    assert "CUDA out of memory" in failures[0] and "in cell [4]" in failures[0]
    assert "MODELS=yi-34b NOTEBOOKS=ablations" in failures[0]
    assert "missing" in failures[1] and "NOTEBOOKS=ape" in failures[1]
    assert "found Half" in text_of(soup, "#arm-errors")
    assert "batch 1" in text_of(soup, "#arm-errors")  # two batches that failed are two arms


def test_a_good_manifest_without_its_notebook_is_no_success(tmp_path):
    root = sample.write_demo(tmp_path)
    (root / "demo-moe/random-hf-eager/latency/notebook.ipynb").unlink()
    page = BeautifulSoup(document.write(root).read_text(), "html.parser")
    assert "1 failed" in text_of(page, ".counts")
    assert "notebook missing" in text_of(page, ".failure")


@pytest.mark.parametrize("name", ["records.jsonl", "notebook.ipynb", "run.json"])
def test_a_damaged_file_is_a_failure_of_its_job_alone(tmp_path, name):
    root = sample.write_demo(tmp_path)
    (root / "demo-moe/random-hf-eager/latency" / name).write_text("{half of")
    page = BeautifulSoup(document.write(root).read_text(), "html.parser")
    assert "5 ok" in text_of(page, ".counts")
    assert "damaged" in text_of(page, ".failure")


def test_empty_or_absent_results_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make report"):
        document.write(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        document.write(tmp_path / "nowhere")


def test_tables_show_what_the_csvs_hold(paper, soup):
    """Every cell's data-value equals the CSV's number, and the download is that CSV."""
    for number in range(1, 13):
        path = paper / "tables" / f"table-{number:02d}.csv"
        with path.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        table = soup.select_one(f"#table-{number}")
        values = [td["data-value"] for td in table.select("td.measured")]
        assert values == [line["measured"] for line in lines], number
        assert all(line["measured"] or line["note"] for line in lines), number
        assert unpacked(soup.find("a", download=f"{path.name}.gz")) == path.read_bytes()


def test_each_number_carries_interval_n_method_and_setup(soup):
    cell = soup.select_one("#table-1 td.measured")
    assert cell.select_one(".v").text == "110.00"
    assert cell.select_one(".ci").text == "[105.6, 114.4]"
    assert (cell["data-n"], cell["data-low"]) == ("11", "105.6")
    assert "order statistics" in cell["title"] and "hf-eager" in cell["title"]


def test_each_number_of_the_papers_tables_names_its_records(paper, soup):
    """TTFT comes from the row of one new token, a change or a difference from two rows."""
    listed = {name: " ".join(line.values()) for name, line in records_of(soup).items()}
    rows = [r for r in load_tree(paper) if r.kind != "environment"]
    assert len(listed) == len(rows)
    for number in range(1, 13):
        for cell in soup.select(f"#table-{number} td.measured[data-n]"):
            ids = cell["data-records"].split()
            assert ids and all(name in listed for name in ids), number

    def behind(selector: str) -> list[str]:
        return [listed[name] for name in soup.select_one(selector)["data-records"].split()]

    (ttft,) = behind("#table-1 td.measured")
    assert "latency gpt-oss-20b context 2048, new tokens 1," in ttft
    assert "ttft_s: 0.1045, 0.1067, 0.1089" in ttft and "latency" in ttft.split()[-1]
    both = sorted(behind("#table-4 td.measured"), key=lambda text: "context 2048" in text)
    assert "context 128, new tokens 64" in both[0] and "context 2048, new tokens 64" in both[1]
    (peak,) = behind("#grid-memory td[data-n]")
    assert "memory" in peak and "peak_bytes" in peak


def test_each_number_of_a_grid_names_its_records(soup):
    """A published number comes from no record, nor does the 1 of the arm that others are over, nor
    what the measuring cost, which manifests tell."""
    of_no_record = ("published", "the base arm", "clock")
    listed = records_of(soup)
    without = {}
    for grid in soup.select("figure.table[id^=grid-]"):
        for cell in grid.select("td[data-n]"):
            ids = cell.get("data-records", "").split()
            assert all(name in listed for name in ids)
            at = len(cell.find_previous_siblings())
            head = grid.select_one(f'th[data-col="{at}"]')
            how = cell if cell.has_attr("title") else head
            if not ids and how["data-method"] not in of_no_record:
                without.setdefault(grid["id"], set()).add(head.text)
    assert without == {}


def test_a_record_names_its_folder(paper, soup):
    folders = [line["folder"] for line in records_of(soup).values()]
    assert folders and all((paper / folder / "records.jsonl").exists() for folder in folders)


def test_mailed_alone_no_link_is_dead(soup):
    links = {a["href"] for a in soup.find_all("a", href=True)}
    assert not [x for x in links if not x.startswith(("#", "data:", "https://", "http://"))]


def test_missing_numbers_lead_to_their_reason(soup):
    cell = soup.select_one("#table-11 td.measured.missing")
    target = cell.select_one("a")["href"][1:]
    assert "found Half" in soup.find(id=target).text


def test_captions_say_hardware_and_random_weights(soup):
    for number in (1, 5, 6, 8):
        caption = soup.find(id=f"table-{number}-caption").text
        assert "NVIDIA H100 80GB HBM3; the paper used NVIDIA H100 NVL" in caption
        assert "Random weights: valid for memory and dense latency" in caption


def test_jobs_on_other_gpus_of_the_host_are_told_where_numbers_stand(tmp_path):
    """Under the findings, and with what the answer rests on."""
    gpu = sample.GPU | {"neighbours": 1}
    rows = sample.latency("one", sample.environment_record(gpu).env_id, (512,))
    sample.write_job(tmp_path, "one/random-hf-eager/latency", rows, gpu, model="one")
    page = BeautifulSoup(document.write(tmp_path).read_text("utf-8"), "html.parser")
    text = re.sub(r"\s+", " ", page.get_text(" "))
    assert "Other jobs ran on other GPUs of the host meanwhile" in text
    assert "beside jobs on other GPUs of the host" in text


def test_the_papers_tables_name_no_gpus_that_shared_a_model():
    """Rows of a sharded model are in none of them."""
    pair, one = (environment_record({"gpu": gpu}) for gpu in ("2 x NVIDIA H200", "NVIDIA H200"))
    sharded, alone = (
        Record("batch", sample.key("Qwen3-32B", devices=n), {}, {}, env_id=env.env_id)
        for n, env in ((2, pair), (None, one))
    )
    caption = document._paper_caption([pair, one, sharded, alone], load_published(), [])
    assert caption[0].startswith("Measured on NVIDIA H200; the paper used ")
    assert "2 x NVIDIA H200" in document._paper_caption([pair, sharded], load_published(), [])[0]


def test_a_step_faster_than_a_copy_is_explained(tmp_path):
    """100 steps a second of 35 GB are 3.5 TB/s; a copy moves 3 TB/s of the card's 4.8."""
    gpu = sample.GPU | {"gpu": "NVIDIA H200", "copy_bytes_per_s": 3.0e12}
    rows = [
        replace(r, values={**r.values, "decode_bytes": 35e9})
        for r in sample.latency("one", sample.environment_record(gpu).env_id, (512,))
    ]
    sample.write_job(tmp_path, "one/random-hf-eager/latency", rows, gpu, model="one")
    page = BeautifulSoup(document.write(tmp_path).read_text("utf-8"), "html.parser")
    told = "(117%, 73% by the datasheet; a copy, which writes too, is slower than a read)"
    assert told in text_of(page, ".abstract")


def test_first_tables_are_open_and_the_rest_folded(soup):
    folded = {t["id"] for t in soup.select("details.more figure.table")}
    assert {f"table-{n}" for n in (2, 3, 4, 7, 9, 10, 11, 12)} <= folded
    assert not {f"table-{n}" for n in (1, 5, 6, 8)} & folded


def test_abstract_is_computed(soup):
    text = text_of(soup, ".abstract")
    assert "GPT-OSS-20B 86.49 tok/s [83.16, 90.09]" in text  # 64 / 0.74
    assert "2.000 times that of Qwen3-32B [1.921, 2.082], higher" in text
    assert "33.3 % less than Qwen3-32B" in text
    assert "Qwen3-32B 20,000 J" in text
    assert "Random weights: valid for memory and dense latency" in text


def test_a_long_reason_is_said_once_in_a_sentence():
    why = "times withheld: its logits differ from those of generate() by 22%"
    text = f"A ({why}); B 2 (n = 6). A: not compared with B ({why}); C (n = 6), not with D ({why})."
    assert once(text) == f"A ({why}); B 2 (n = 6). A: not compared with B; C (n = 6), not with D."


def test_sentences_can_say_no():
    same = Estimate(1.0, 0.9, 1.1, 10, "ratio")
    few = Estimate(1.5, n=2, reason="n = 2: an interval needs n >= 6")
    none = Estimate(None, reason="the rows differ in gpu")
    assert "no difference resolved from B" in compared("A", {"B": same})
    assert "without an interval (n = 2" in compared("A", {"B": few})
    assert "not compared with B (the rows differ in gpu)" in compared("A", {"B": none})
    assert "lower" in compared("A", {"B": Estimate(0.5, 0.4, 0.6, 10)})


def test_the_bound_has_a_section_and_the_machine_comes_first(tmp_path):
    env_id = sample.environment_record(sample.GPU).env_id
    rows = [
        replace(r, values={**r.values, "decode_bytes": 3.35e9})
        for r in sample.latency("one", env_id, (512, 2048))
    ]
    sample.write_job(tmp_path, "one/random-hf-eager/latency", rows, sample.GPU, model="one")
    machine = Record("ceilings", {}, {}, {"read_bytes_per_s": 3.015e12}, env_id=env_id)
    sample.write_job(tmp_path, "_all/machine", [machine], sample.GPU, model="_all")
    sample.write_job(tmp_path, "_all/summary", [], sample.GPU, model="_all")
    page = BeautifulSoup(document.write(tmp_path).read_text(), "html.parser")
    groups = [heading["id"] for heading in page.select("section:has(> #notebooks) h3")]
    assert groups == ["machine", "summary", "model-one"]
    table = text_of(page, "#grid-bound")
    assert "900.0" in table and "1.00" not in table  # 3,015 GB/s over 3.35 GB
    assert "measured read stream 3,015 GB/s" in table
    assert (
        "one, bound: 900.0 at 512 to 900.0 at 2048."
        in page.select_one(".picture svg")["aria-label"]
    )
    assert page.find("a", href="#bound") and page.find("a", download="bound.csv.gz")
    with (tmp_path / "tables/bound.csv").open(encoding="utf-8") as file:
        line = next(csv.DictReader(file))
    assert float(line["useful MBU, datasheet"]) == pytest.approx(0.1)  # 100 of 1,000 steps/s
    text = text_of(page, ".abstract")
    assert "one decodes 100.0 [97.62, 102.5] of 900.0 tok/s (11%, 10% by the datasheet)" in text
    assert "best read stream allows" in text


def test_without_bytes_of_a_step_there_is_no_such_section(soup):
    assert soup.find(id="bound") is None and soup.find("a", href="#bound") is None


def test_abstract_refuses_to_compare_gpus(tmp_path):
    env = sample.CPU | {"gpu": "NVIDIA A100"}
    for model, where in (("one", sample.GPU), ("two", env)):
        rows = sample.latency(model, sample.environment_record(where).env_id, (512,))
        sample.write_job(tmp_path, f"{model}/random-hf-eager/latency", rows, where, model=model)
    sentences = findings(load_tree(tmp_path), load_published(), [])
    assert "not compared with" in sentences[0].text and "A100" in sentences[0].text
    assert "not measured" in sentences[3].text.lower()


def test_abstract_says_where_a_ratio_is_one_between_machines(tmp_path):
    text = " The ratio is one between machines:"
    for name, boards in (("apart", ("GPU-1", "GPU-2")), ("same", ("GPU-1", "GPU-1"))):
        for model, uuid in zip(("one", "two"), boards, strict=True):
            where = sample.GPU | {"gpu_uuid": uuid}
            rows = sample.latency(model, sample.environment_record(where).env_id, (512,))
            path = f"{model}/random-hf-eager/latency"
            sample.write_job(tmp_path / name, path, rows, where, model=model)
        sentences = findings(load_tree(tmp_path / name), load_published(), [])
        for sentence in sentences[:2]:  # throughput and TTFT
            assert (text in sentence.text) is (name == "apart")


def test_abstract_names_models_whose_rows_warn(tmp_path):
    for model in ("one", "two"):
        rows = sample.latency(model, sample.environment_record(sample.GPU).env_id, (512,))
        noisy = warning("spread", "repetitions spread over 22% of their median")
        rows = [replace(r, warnings=(noisy,)) if model == "two" else r for r in rows]
        path = f"{model}/random-hf-eager/latency"
        sample.write_job(tmp_path, path, rows, sample.GPU, model=model)
    throughput = findings(load_tree(tmp_path), load_published(), [])[0].text
    assert "Rows warn, and decide nothing:" in throughput and "(spread)" in throughput


def test_the_memory_ledger_has_its_section_figures_and_tables(paper, soup):
    """The sample's rows are older than the ledger: what they lack leads to its reason."""
    assert soup.select_one('nav a[href="#memory-ledger"]')
    section = soup.select_one("h2#memory-ledger").parent
    pictures = section.select("svg.figure")
    assert [p["aria-label"].split(";")[0] for p in pictures] == [
        "Memory beside the weights, the paper's protocol",
        "Memory beside the weights, generate()",
    ]
    assert not section.select("svg [style], svg script")  # which the page's policy would refuse
    ids = [f["id"] for f in section.select("figure.table")]
    assert ids == ["grid-memory-ledger", "grid-kv-contribution", "grid-memory-per-token"]
    assert "recorded before the ledger was kept" in text_of(soup, "#grid-memory-ledger")
    assert "8 of 8" in text_of(soup, "#grid-memory-per-token")
    assert (paper / "tables" / "kv-contribution.csv").read_text().count("\n") == 1 + 3 * 3


def test_the_ladder_is_a_figure_and_a_table(soup):
    section = soup.find(id="ladder").find_parent("section")
    picture = section.find("svg")
    assert "the paper, as printed: 1.318." in picture["aria-label"]
    assert len(section.select("#ladder-rungs tbody tr")) == 10
    assert "2.000" in text_of(soup, "#ladder-rungs")  # 64 / 0.74 over 64 / 1.48


def test_rankings_name_what_changes(soup):
    assert len(soup.select("#rankings tbody tr")) == 6
    assert "1. GPT-OSS-20B 86.49" in text_of(soup, "#rankings")
    assert "Qwen3-32B and Yi-34B change places" in text_of(soup, "#rankings")


def test_the_ledger_has_a_row_and_a_verdict_for_every_claim(paper, soup):
    claims = load_published()["claims"]
    rows = soup.select("#ledger tbody tr")
    assert [row["id"] for row in rows] == [f"claim-{name}" for name in claims]
    assert all(row.select(".verdict")[-1]["title"] for row in rows)
    one = text_of(soup, "#claim-throughput-vs-qwen")
    assert "[92.08, 108.2], n = 11, Qwen3-32B" in one and "direction only" in one
    assert "differs in card, host, software, weights" in one
    caption = text_of(soup, "#ledger-caption")
    assert "49 claims" in caption and "within 10% of the printed one" in caption
    with (paper / "claims.csv").open(encoding="utf-8") as file:
        assert {line["claim"] for line in csv.DictReader(file)} == claims.keys()
    for name in ("claims.csv", "table-13.csv", "ladder.csv", "rankings.csv"):
        assert soup.find("a", download=f"{name}.gz") is not None
    assert "Of 49 claims" in text_of(soup, ".abstract")


def test_table_13_has_sources_and_differences(soup):
    text = text_of(soup, "#table-13")
    assert "not reproduced: the publisher states Apache-2.0" in text and "2026-" in text
    assert all(a["href"].startswith("https://") for a in soup.select("#table-13 tbody a"))


def test_a_cell_of_a_table_carries_its_verdict(soup):
    mark = soup.select_one("#table-1 td.ratio .verdict")
    assert mark.text == "✗" and mark["title"].startswith("not reproduced: [105.6, 114.4]")
    assert "9 not reproduced; 3 not testable; n = 11." in text_of(soup, "#table-1 > .note")


def test_without_the_papers_models_there_is_no_ledger(demo):
    page = BeautifulSoup((demo / "report.html").read_text(), "html.parser")
    assert page.find(id="ledger") is None and page.find(id="ladder") is None
    assert not (demo / "claims.csv").exists()


def test_demo_has_a_banner_generic_tables_and_reasons(demo):
    soup = BeautifulSoup((demo / "report.html").read_text(), "html.parser")
    banner = soup.select_one(".banner").text  # is true of the reader's own models as well
    assert banner.startswith("Measured on a CPU.") and "scaled-down" not in banner
    assert soup.find(id="table-1") is None and soup.find(id="grid-latency") is not None
    assert "no NVML energy counter" in text_of(soup, "#grid-energy")
    assert "Not measured: no NVML energy counter" in text_of(soup, ".abstract")


def test_gpu_runs_have_no_banner(soup):
    assert soup.select_one(".banner") is None


def test_provenance(soup):
    where = text_of(soup, "section:has(#where)")
    for text in (
        "NVIDIA H100 80GB HBM3",
        "driver 580.1",
        "torch 2.11.0",
        "Test CPU",
        "hf-eager",
        "random (seed 0)",
        "0123456789ab",
        "2026-11-24",
    ):
        assert text in where


def test_methods_have_formulas(soup):
    rows = soup.select("#definitions tbody tr")
    assert len(soup.select("#definitions math")) == len(rows) >= 15


def test_nothing_is_loaded_from_anywhere(soup):
    assert not soup.select("script[src], link[href^=http], iframe, object, embed, base")
    assert not soup.select("form[action], [formaction]")
    assert all(i["src"].startswith("data:image/") for i in soup.find_all("img"))
    assert "url(" not in soup.style.text and "@import" not in soup.style.text


def test_two_setups_of_a_model_have_two_sections(tmp_path):
    env_id = sample.environment_record(sample.GPU).env_id
    for setup in ("random-hf-eager", "checkpoint-graph"):
        rows = sample.latency("m", env_id, (512,))
        sample.write_job(tmp_path, f"m/{setup}/latency", rows, sample.GPU, model="m")
    jobs = find(tmp_path)
    assert [(j.id, j.title) for j in jobs] == [  # the study's stack first
        ("m--random-hf-eager--latency", "Latency"),
        ("m--checkpoint-graph--latency", "Latency (graph)"),
    ]


def test_page_and_report_link_each_other(paper, soup):
    page = paper / "gpt-oss-20b/random-hf-eager/latency/notebook.html"
    section = soup.find("details", id="gpt-oss-20b--latency")
    assert not section.has_attr("open")  # behind the answers
    assert section.select_one(".meta code").text == page.parent.relative_to(paper).as_posix()
    back = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select_one(".meta a")
    path, fragment = urldefrag(back["href"])
    assert (page.parent / path).resolve() == (paper / "report.html").resolve()
    assert soup.find(id=fragment) is not None


def test_a_notebook_is_rendered_once(tmp_path, monkeypatch):
    root = sample.write_demo(tmp_path)
    before = document.write(root).read_bytes()
    pages = {p: p.read_bytes() for p in root.rglob("notebook.html")}
    rendered = []

    def render(notebook, prefix, **options):
        rendered.append(prefix)
        return render_fragment(notebook, prefix, **options)

    monkeypatch.setattr(document, "render_fragment", render)
    assert document.write(root).read_bytes() == before and rendered == []
    assert {p: p.read_bytes() for p in root.rglob("notebook.html")} == pages
    path = root / "demo-moe/random-hf-eager/latency/notebook.ipynb"
    path.write_text(path.read_text().replace("Question", "Query"))
    assert document.write(root).read_bytes() != before
    assert rendered == ["demo-moe--latency"]


def test_one_page_alone(tmp_path):
    root = sample.write_demo(tmp_path)
    page = document.write_notebook_page(root / "demo-moe/random-hf-eager/latency")
    assert page == root / "demo-moe/random-hf-eager/latency/notebook.html"
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert soup.h1.text == "Latency · demo-moe" and soup.h2.text == "Result"
    with pytest.raises(FileNotFoundError, match="run.json"):
        document.write_notebook_page(root / "demo-moe/random-hf-eager/nowhere")


# --- fragments -----------------------------------------------------------------------------------


def fragment(prefix: str = "m--latency", **arguments) -> BeautifulSoup:
    html = render_fragment(sample.notebook("T", **arguments), prefix)
    return BeautifulSoup(demoted(html, 3), "html.parser")


def test_fragment_folds_code_demotes_headings_and_prefixes_ids():
    html = fragment()
    assert html.find("h4").text == "T" and html.find("h5").text == "Result"
    assert not html.find(["h1", "h2", "h3"])
    code = html.select("details.code")
    assert len(code) == 2 and code[0].summary.text == "Code"
    assert all(tag["id"].startswith("m--latency--") for tag in html.find_all(id=True))
    assert "In [" not in html.text and "Kernel is running" not in html.text


def test_a_page_with_a_title_of_its_own_leaves_out_the_notebooks():
    html = BeautifulSoup(render_fragment(sample.notebook("T"), "x", title=False), "html.parser")
    assert [h.text for h in html.find_all(re.compile("^h[1-6]$"))] == ["Result"]


def test_fragment_math_is_mathml_and_money_is_money():
    html = fragment()
    assert [m["display"] for m in html.find_all("math")] == ["inline", "block"]
    assert "costs $5." in html.text
    assert mathml(r"\notacommand{<script>}").count("<script") == 0


def test_fragment_tables_and_figures():
    html = fragment()
    region = html.select_one("div.scroll")
    assert region["tabindex"] == "0" and region["aria-label"] == "m--latency, table 1"
    assert {th["scope"] for th in html.select("th")} == {"col", "row"}
    assert not [th for th in html.find_all("th") if not th.text.strip()]
    assert html.img["alt"] == "Diagonal band: time grows with context"


def test_a_figure_without_description_does_not_keep_the_placeholder():
    nb = sample.notebook("T")
    nb.cells[-1].outputs[2].metadata = {}
    html = BeautifulSoup(render_fragment(nb, "x"), "html.parser")
    assert "Result" in html.img["alt"] and "No description" not in html.img["alt"]


def test_hostile_output_is_inert_and_cannot_leave_its_place():
    html = fragment(hostile=True)
    assert not html.find(["script", "iframe", "style"])
    assert not [t for t in html.find_all(True) if any(a.startswith("on") for a in t.attrs)]
    assert not [a for a in html.find_all("a") if a.get("href", "").startswith("javascript")]
    assert clean("<a href='data:text/html,x'>a</a>").count("data:") == 0
    assert clean("<img src='https://example.org/x.png'>").count("example") == 0


def test_a_notebook_read_from_disk_renders(paper):
    path = paper / "gpt-oss-20b/random-hf-eager/latency/notebook.ipynb"
    assert "latency of gpt-oss-20b" in render_fragment(read_notebook(path), "p")


def test_links_inside_a_notebook_follow_their_prefix():
    nb = sample.notebook("T")
    nb.cells[0].source += "\n\n[there](#Result) [nowhere](#None)"
    html = BeautifulSoup(render_fragment(nb, "x"), "html.parser")
    assert [a["href"] for a in html.find_all("a")] == ["#x--Result"]


# --- the page in a browser -----------------------------------------------------------------------


def paths(paper: Path, demo: Path) -> list[Path]:
    """A page of each kind: two reports, a notebook, and a set compared with itself."""
    compared = paper.with_name(f"{paper.name}-compared") / "report.html"
    if not compared.exists():
        comparison.write(paper, paper, compared.parent)
    return [
        paper / "report.html",
        demo / "report.html",
        compared,
        paper / "gpt-oss-20b/random-hf-eager/latency/notebook.html",
    ]


@pytest.mark.browser
def test_opens_offline_without_requests_or_errors(browser, paper, demo):
    for path in paths(paper, demo):
        with Page(browser, path) as opened:
            outside = [u for u in opened.requests if not u.startswith(("file:", "data:"))]
            assert outside == [] and opened.errors == []
            assert len([u for u in opened.requests if u.startswith("file:")]) == 1
            assert opened.page.title() != "owned"
            assert opened.page.evaluate("document.querySelectorAll('img').length") == (
                opened.page.evaluate("[...document.images].filter(i => i.naturalWidth).length")
            )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, paper, demo, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for path in paths(paper, demo):
        # axe is put in by the test, past the page's policy.
        with Page(browser, path, color_scheme=scheme, bypass_csp=True) as opened:
            opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            violations = axe.run(opened.page).response["violations"]
            assert [(v["id"], v["nodes"][0]["html"][:200]) for v in violations] == []


@pytest.mark.browser
def test_ids_are_unique_and_links_resolve(browser, paper, demo):
    script = """() => {
      const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
      const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
      const dead = [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute('href'))
        .filter(h => !document.getElementById(decodeURIComponent(h.slice(1))));
      return {twice, dead, toc: document.querySelectorAll('.toc a').length};
    }"""
    for path in paths(paper, demo):
        with Page(browser, path) as opened:
            ids = opened.page.evaluate(script)
            assert ids["twice"] == [] and ids["dead"] == [] and ids["toc"] > 0


@pytest.mark.browser
def test_deep_links_reach_their_section_even_when_folded(browser, paper):
    with Page(browser, paper / "report.html", "#gpt-oss-20b--memory") as opened:
        assert opened.page.locator("#gpt-oss-20b--memory").bounding_box()["y"] < 200
    with Page(browser, paper / "report.html", "#table-9") as opened:
        assert opened.page.locator("#table-9 table").is_visible()
    with Page(browser, paper / "report.html", "#100%") as opened:  # no link of ours
        assert opened.errors == []


@pytest.mark.browser
def test_no_width_scrolls_sideways(browser, paper, demo):
    for path in paths(paper, demo):
        with Page(browser, path) as opened:
            opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            for width in WIDTHS:
                opened.page.set_viewport_size({"width": width, "height": 900})
                wide = opened.page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, (path.name, width)


@pytest.mark.browser
def test_tables_sort_by_keyboard(browser, paper):
    """The paper's TTFT (Yi 368.34, Qwen 369.46, GPT 459.72 ms): up with Enter, down with Space."""
    with Page(browser, paper / "report.html") as opened:
        button = opened.page.locator("#table-1 thead tr:last-child button").first
        header = opened.page.locator("#table-1 thead tr:last-child th").first
        models = opened.page.locator("#table-1 tbody th")
        button.focus()
        opened.page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == "ascending"
        assert models.all_inner_texts() == ["Yi-34B", "Qwen3-32B", "GPT-OSS-20B"]
        opened.page.keyboard.press("Space")
        assert header.get_attribute("aria-sort") == "descending"
        assert models.all_inner_texts() == ["GPT-OSS-20B", "Qwen3-32B", "Yi-34B"]
        assert opened.page.evaluate("document.activeElement.className") == "sort"


@pytest.mark.browser
def test_a_number_opens_by_mouse_and_leads_to_its_record(browser, paper):
    with Page(browser, paper / "report.html", viewport={"width": 1280, "height": 900}) as opened:
        panel, numbers = opened.page.locator(".about"), opened.page.locator("#table-1 .open")
        assert not panel.is_visible()
        numbers.first.click()
        content = re.sub(r"\s+", " ", panel.inner_text())
        for text in (
            "GPT-OSS-20B: TTFT (ms), measured",
            "95 % interval 105.6 to 114.4",
            "n 11",
            "method median, order statistics",
            "random weights, hf-eager",
        ):
            assert text in content
        panel.locator("a").click()
        assert not panel.is_visible() and "#record-" in opened.page.url
        row = opened.page.locator("#records tr.here")
        assert row.is_visible() and row.inner_text().split()[1] == "latency"
        assert opened.page.url.endswith(row.get_attribute("id"))
        again = opened.page.url
        numbers.first.click()
        opened.page.locator("h1").click()  # a click elsewhere closes it
        assert not panel.is_visible() and opened.errors == []
    with Page(browser, paper / "report.html", again[again.index("#") :]) as opened:
        assert opened.page.locator("#records tr.here").is_visible()


@pytest.mark.browser
def test_records_are_shown_a_few_at_a_time_and_all_can_be_found(browser, paper, soup):
    lines = records_of(soup)
    with Page(browser, paper / "report.html") as opened:
        records, rows = opened.page.locator("#records"), opened.page.locator("#records tbody tr")
        assert rows.count() == 0
        records.locator("summary").click()
        rows.nth(19).wait_for()
        assert rows.count() == 20
        status = records.get_by_role("status")
        assert status.inner_text() == f"20 of {len(lines)} records"
        records.get_by_role("searchbox").fill("memory-paper yi-34b 2048")
        wanted = {
            name
            for name, line in lines.items()
            if all(word in " ".join(line.values()).lower() for word in ("memory-paper", "yi-34b"))
            and "2048" in " ".join(line.values())
        }
        assert {row.get_attribute("id")[7:] for row in rows.all()} == wanted
        records.get_by_role("searchbox").fill("")
        records.get_by_role("button", name="Show all").click()
        assert rows.count() == len(lines)
        cells = [cell.inner_text() for cell in rows.last.locator("th, td").all()]
        assert cells == [" ".join(text.split()) for text in list(lines.values())[-1].values()]


@pytest.mark.browser
def test_what_a_column_shares_is_said_of_each_of_its_numbers(browser, paper, soup):
    """In the file the header says it once; opened, each number does, by its tooltip and its panel,
    also when the rows stand in another order."""
    shared = soup.select("#grid-latency td[data-n]:not([title])")
    assert shared and soup.select("#grid-latency th[title][data-method]")
    with Page(browser, paper / "report.html", "#grid-latency") as opened:
        cells = "[...document.querySelectorAll('td[data-n]')]"
        assert opened.page.evaluate(f"{cells}.filter(c => !c.title).length") == 0
        assert opened.page.evaluate(
            f"{cells}.filter(c => c.dataset.n && !c.dataset.method).length"
        ) == len([x for x in soup.select("td[data-n][title]") if "data-method" not in x.attrs])
        grid = opened.page.locator("#grid-latency")
        head = grid.locator("th[title][data-method]").first
        at, method = int(head.get_attribute("data-col")), head.get_attribute("data-method")
        head.locator("button.sort").click()
        grid.locator("tbody tr").last.locator("th, td").nth(at).locator(".open").click()
        assert f"method {method}" in " ".join(opened.page.locator(".about").inner_text().split())
        assert opened.errors == []


@pytest.mark.browser
def test_numbers_open_by_keyboard_with_one_stop_a_table(browser, paper):
    with Page(browser, paper / "report.html") as opened:
        table, panel = opened.page.locator("#table-1"), opened.page.locator(".about")
        assert table.locator('.open[tabindex="0"]').count() == 1
        table.locator(".open").first.focus()
        for key, text in (("ArrowRight", "0.239"), ("ArrowDown", "0.595"), ("ArrowLeft", "220.00")):
            opened.page.keyboard.press(key)
            assert opened.page.evaluate("document.activeElement.textContent") == text
        opened.page.keyboard.press("Enter")
        assert "Qwen3-32B: TTFT (ms), measured" in panel.inner_text()
        opened.page.keyboard.press("Tab")
        assert opened.page.evaluate("document.activeElement.closest('.about') !== null")
        opened.page.keyboard.press("Escape")
        assert not panel.is_visible()
        assert opened.page.evaluate("document.activeElement.textContent") == "220.00"
        assert table.locator('.open[tabindex="0"]').inner_text() == "220.00"


@pytest.mark.browser
def test_a_number_opens_by_touch_inside_a_narrow_screen(browser, paper):
    size = {"width": 360, "height": 740}
    with Page(browser, paper / "report.html", viewport=size, has_touch=True) as opened:
        opened.page.locator("#table-1 .open").first.tap()
        box = opened.page.locator(".about").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert box["y"] >= 0 and box["y"] + box["height"] <= 740.5
        opened.page.locator(".about button").tap()
        assert not opened.page.locator(".about").is_visible()


@pytest.mark.browser
def test_an_open_number_stays_inside_the_page(browser, paper):
    with Page(browser, paper / "report.html") as opened:
        for width in WIDTHS:
            opened.page.set_viewport_size({"width": width, "height": 900})
            opened.page.locator("#table-1 .open").filter(visible=True).last.click()
            box = opened.page.locator(".about").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            opened.page.keyboard.press("Escape")


@pytest.mark.browser
def test_a_planted_name_is_text_in_an_open_number(browser, paper):
    with Page(browser, paper / "report.html", "#grid-latency") as opened:
        row = opened.page.locator("#grid-latency tbody tr", has_text="owned").first
        row.locator(".open").first.click()
        assert "<script>" in opened.page.locator(".about").inner_text()
        assert opened.page.title() == document.TITLE and opened.errors == []


@pytest.mark.browser
def test_long_tables_filter_and_still_sort(browser, paper):
    with Page(browser, paper / "report.html", "#grid-latency") as opened:
        figure = opened.page.locator("#grid-latency")
        rows, field = figure.locator("tbody tr:visible"), figure.get_by_role("searchbox")
        before = rows.count()
        assert field.get_attribute("aria-label") == "Filter rows: Latency and throughput."
        field.fill("yi-34b 2048")
        assert rows.count() == 1 and "2,048" in rows.first.inner_text()
        field.fill("yi-34b")
        assert rows.count() == 4
        assert figure.get_by_role("status").inner_text() == f"4 of {before} rows"
        figure.get_by_role("button", name="TTFT").click()
        assert rows.count() == 4
        field.fill("no such row")
        assert rows.count() == 0
        field.fill("")
        assert rows.count() == before and figure.get_by_role("status").inner_text() == ""
        assert opened.page.locator("#table-1 input").count() == 0  # three rows need none


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_beside_an_open_number(browser, paper, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with Page(browser, paper / "report.html", color_scheme=scheme, bypass_csp=True) as opened:
        opened.page.locator("#table-1 .open").first.click()
        violations = axe.run(opened.page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in violations] == []


@pytest.mark.browser
def test_missing_values_sort_last_both_ways(browser, paper):
    with Page(browser, paper / "report.html", "#table-11") as opened:
        button = opened.page.locator("#table-11 thead tr:last-child button").nth(1)
        rows = opened.page.locator("#table-11 tbody tr")
        for _ in range(2):
            button.click()
            assert rows.last.locator("th").inner_text().startswith("FP16")


@pytest.mark.browser
def test_skip_link_and_theme(browser, paper):
    with Page(browser, paper / "report.html", color_scheme="light") as opened:
        opened.page.keyboard.press("Tab")
        assert opened.page.evaluate("document.activeElement.className") == "skip"
        opened.page.keyboard.press("Enter")
        assert opened.page.evaluate("document.activeElement.id") == "content"
        background = "getComputedStyle(document.body).backgroundColor"
        light = opened.page.evaluate(background)
        for _ in range(2):
            opened.page.locator(".theme").click()
        assert opened.page.locator(".theme").inner_text() == "Theme: dark"
        assert opened.page.evaluate(background) != light


@pytest.mark.browser
def test_planted_scripts_do_not_run_even_without_the_allow_list(browser, paper, tmp_path):
    """The policy alone holds: payloads put past the allow-list into the finished page are inert."""
    page = (paper / "report.html").read_text(encoding="utf-8")
    path = tmp_path / "planted.html"
    path.write_text(page.replace("<footer>", sample.XSS + "<footer>", 1), encoding="utf-8")
    with Page(browser, path) as opened:
        opened.page.wait_for_timeout(100)
        assert opened.page.title() == document.TITLE
        assert any("Content Security Policy" in error for error in opened.errors)


@pytest.mark.browser
def test_readable_without_javascript(browser, paper):
    with Page(browser, paper / "report.html", java_script_enabled=False) as opened:
        for selector in (".toc a >> nth=3", ".abstract", "#table-1 table", "#failures"):
            assert opened.page.locator(selector).is_visible()
        assert not opened.page.locator(".theme").is_visible()
        assert opened.page.locator("button, input").filter(visible=True).count() == 0
        opened.page.locator("details.raw summary").click()  # the records are there all the same
        with opened.page.expect_download() as download:
            opened.page.locator("#records a[download]").click()
        assert download.value.suggested_filename == "records.csv.gz"
        text = gzip.decompress(Path(download.value.path()).read_bytes())
        assert text.startswith(b"record,kind,model,arm,")


@pytest.mark.browser
def test_csv_downloads_under_the_policy(browser, paper):
    with Page(browser, paper / "report.html") as opened:
        link = opened.page.locator('a[download="table-01.csv.gz"]')
        with opened.page.expect_download() as download:
            link.click()
        assert download.value.suggested_filename == "table-01.csv"
        text = Path(download.value.path()).read_bytes()
        assert text == (paper / "tables/table-01.csv").read_bytes() and opened.errors == []


@pytest.mark.browser
def test_prints(browser, paper):
    with Page(browser, paper / "report.html") as opened:
        assert len(opened.page.pdf(format="A4")) > 50_000
        opened.page.emulate_media(media="print")
        for selector in (".toc", ".filter >> nth=0", "details.raw"):
            assert not opened.page.locator(selector).is_visible()
        assert opened.page.locator("#table-1 .v >> nth=0").is_visible()


BROKEN = r"""() => {
    const broken = [], place = document.createRange();
    const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
        if (!text.parentElement.closest('td, th')) { continue; }
        for (const word of text.data.matchAll(/[\w.,]{2,12}/g)) {
            place.setStart(text, word.index);
            place.setEnd(text, word.index + word[0].length);
            const lines = [...place.getClientRects()].filter(box => box.width);
            if (new Set(lines.map(box => Math.round(box.top))).size > 1) { broken.push(word[0]); }
        }
    }
    return broken;
}"""


@pytest.mark.browser
def test_on_paper_no_word_is_broken_and_nothing_is_wider_than_the_sheet(browser, paper):
    sheet = {"width": 718, "height": 1020}  # A4 less its margins, at 96 pixels an inch
    with Page(browser, paper / "report.html", viewport=sheet) as opened:
        opened.page.emulate_media(media="print")
        opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert opened.page.evaluate(BROKEN) == []
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= sheet["width"]


def test_plan_json_tells_what_is_missing(tmp_path):
    root = sample.write_demo(tmp_path)
    (root / "plan.json").write_text(json.dumps({"jobs": ["new/random-hf-eager/latency"]}))
    jobs = {job.path: job.status for job in find(root)}
    assert jobs["new/random-hf-eager/latency"] == "missing"
    assert len(jobs) == 7


def test_paper_tables_need_only_rows(paper):
    assert len(paper_tables(load_tree(paper), load_published())) == 12
