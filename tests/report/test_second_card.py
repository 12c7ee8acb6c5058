"""A second card from end to end: merged, scored, reported, compared and planned for.

The H200 here is a rehearsal: released rows of an H100 under another card's name, on other boards
and another day, with every time three quarters as long. So each of its rates is 4/3 of the H100's,
and its joules are the same.
"""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
from bs4 import BeautifulSoup

from lib.__main__ import main
from lib.analysis import choice
from lib.analysis.capacity import score
from lib.analysis.rows import load
from lib.files import ROOT
from tests.samples.records import MIB

SOURCE = ROOT / "outputs" / "released" / "h100-sxm"
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
BATCH, STACKS = (f"Qwen3-32B/random-hf-eager/{name}" for name in ("batch", "stacks"))
TIMES = 0.75


def second_card(job, out, board, day="2026-11-28", batches=None):
    """A job of the released set as if it had been measured on an H200; of `batches` alone."""
    shutil.copytree(SOURCE / job, out / job)
    path = out / job / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["kind"] == "environment":
            row["values"] |= {"gpu": H200, "gpu_uuid": board, "date": day}
            row["values"] |= {"gpu_total_bytes": 143_771 * MIB, "visit": f"{board}, host, {day}"}
        for name, values in row["samples"].items():
            if name.endswith("_s") and name != "token_s":
                row["samples"][name] = [TIMES * x for x in values]
    rows = [r for r in rows if not batches or r["key"].get("batch") in (None, *batches)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = json.loads((out / job / "run.json").read_text(encoding="utf-8"))
    run |= {
        "artefacts": [],
        "earlier": [],
        "start": f"{day}T10:00:00+00:00",
        "end": f"{day}T10:09:00+00:00",
    }
    run["env"]["gpu"] = H200
    (out / job / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same two jobs of the H100, and of the H200 merged from two folders."""
    root = tmp_path_factory.mktemp("cards")
    for job in (BATCH, STACKS):
        shutil.copytree(SOURCE / job, root / "h100" / job)
    parts = [second_card(BATCH, root / "one", "GPU-1"), second_card(STACKS, root / "two", "GPU-2")]
    assert main(["merge", *map(str, parts), "--out", str(root / "h200")]) == 0
    return root


def cells(folder):
    """Decode throughput of all users by stack, context and users."""
    return {
        (option.stack, cell.context, cell.users): cell
        for option in choice.options(load(folder))
        for cell in option.measured
    }


def test_a_merged_set_holds_the_rows_of_its_own_card(folders, capsys):
    ours, theirs = cells(folders / "h100"), cells(folders / "h200")
    assert ours.keys() == theirs.keys() and len(theirs) > 20
    for place, cell in theirs.items():
        assert cell.per_user.value == pytest.approx(ours[place].per_user.value / TIMES), place
    out = folders / "both"
    assert main(["merge", str(folders / "h100"), str(folders / "h200"), "--out", str(out)]) == 2
    assert f"GPU {H100} and {H200}" in capsys.readouterr().err and not out.exists()


def test_it_is_scored_against_what_was_registered_for_its_card(folders):
    main(["score", str(folders / "h200"), "--out", str(folders / "scored")])
    (path,) = (folders / "scored").glob("*.json")
    data, ours = json.loads(path.read_text(encoding="utf-8")), cells(folders / "h100")
    mine = [
        line for line in data["cells"]
        if line["metric"] == score.DECODE and line["measured"] is not None
    ]  # fmt: skip
    assert {(line["gpu"], line["model"]) for line in mine} == {(H200, "Qwen3-32B")}
    for line in mine:
        place = (line["stack"], line["context"], line["batch"])
        rate = ours[place].total.value / TIMES
        assert line["measured"] == pytest.approx(rate, rel=1e-4)
        assert line["error"] == pytest.approx(line["predicted"] / rate - 1, abs=2e-3)
        assert line["covered"] is (line["low"] <= line["measured"] <= line["high"])
    counted = [line for line in data["cells"] if score.counts(line)]
    one = data["summary"]["all"]
    assert one["cells"] == len(counted) == len([x for x in data["cells"] if "error" in x])
    assert one["covered"] == sum(line["covered"] for line in counted)
    contexts = {x["context"]: x["cells"] for x in data["summary"]["by gpu and model and context"]}
    assert sum(contexts.values()) == len(counted) and {128, 512, 2048} <= contexts.keys()
    assert data["summary"]["measured_first"] == 0


def test_what_was_measured_before_the_registration_is_left_out_and_said(folders, tmp_path):
    early = second_card(BATCH, tmp_path / "early", "GPU-1", day="2026-11-27", batches=(2,))
    main(["score", str(early), "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-scored.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["summary"]["all"]["cells"] == 0 < data["summary"]["measured_first"]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "No cell that counts" in page and "not counted" in page


def test_its_report_answers_for_its_card_and_shows_the_errors(folders):
    page = BeautifulSoup((folders / "h200/report.html").read_text("utf-8"), "html.parser")
    assert f"serves most on one {H200}: " in page.select_one("section.answer .lead").text
    part = page.find(id="predicted").parent
    assert part.find("svg") and "measured cells lie in their interval" in part.text
    assert len(part.select("#grid-predicted-errors tbody tr")) > 40


def test_each_ratio_of_the_cards_has_its_cause(folders):
    out = folders / "compared"
    assert main(["compare", *(str(folders / x) for x in ("h100", "h200")), "--out", str(out)]) == 0
    with (out / "ratios.csv").open(encoding="utf-8", newline="") as file:
        lines = [x for x in csv.DictReader(file) if x["quantity"] == "decode throughput"]
    assert len(lines) > 20
    for line in lines:
        assert float(line["ratio"]) == pytest.approx(1 / TIMES, rel=1e-6)
        stated = line["ratio of the cause"]
        if line["cause"] == "bandwidth":
            assert float(stated) == pytest.approx(4.8 / 3.35)
    captured = {x["cause"] for x in lines if x["stack"] == "graph-compiled" and x["batch"] == "1"}
    assert captured == {"bandwidth"}


def test_the_planner_takes_what_was_measured_before_what_was_predicted(folders, capsys):
    ask = ["--gpu", "H200", "--context", "512", "--users", "8", "--gpu-hour-usd", "3.6"]
    main(["plan", str(folders / "h200"), *ask])
    told = " ".join(capsys.readouterr().out.split())
    each = cells(folders / "h200")["graph-compiled", 512, 8].per_user.value
    line = f"{choice.short(each)} tok/s each, {choice.short(8 * each)} together; "
    assert f"{line}{3.6 / 3600 / (8 * each) * 1e6:.2f} USD for a million tokens; measured" in told
    assert told.count("Qwen3-32B on graph-compiled, bfloat16") == 1
    assert "Yi-34B on graph, bfloat16: room" in told and "predicted at 8 users" in told
    main(["plan", str(folders / "h200"), *ask[:5], "64"])  # no such batch was measured there
    told = " ".join(capsys.readouterr().out.split())
    (line,) = re.findall(r"Qwen3-32B on graph, bfloat16: (.*?) at 90%", told)
    assert line.startswith("measured up to 32 users of 512 tokens and ") and "; room for " in line
    assert "predicted at 64 users of 512 tokens" in line
    (line,) = re.findall(r"Qwen3-32B on graph-compiled, bfloat16: (.*?);", told)
    assert line.startswith("failed at 64 users of 512 tokens: OutOfMemoryError")  # and no "meets"
