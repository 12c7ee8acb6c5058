"""Scoring registered predictions, by rows whose numbers a reader can check.

The rows are those of test_points: at batch b all sequences decode RATES[b] tokens a second, and the
board draws 400 W meanwhile, so that 1,000 tokens take 400 / RATES[b] kJ.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt

from lib.__main__ import main
from lib.analysis.capacity import registry, score, scored
from lib.files import ROOT, ParamsError
from lib.records.record import Record, environment_record
from lib.report import document
from tests.analysis.batch.test_points import failed, line
from tests.samples import records as sample

AT = datetime(2026, 11, 27, 16, tzinfo=UTC)  # when the made predictions were registered
LATER = environment_record({"gpu": "G", "date": "2026-11-28"})
PLACE = {"gpu": "G", "model": "m", "form": "bfloat16", "stack": "graph", "context": 512}
TARGET = {
    "coverage_at_least": 0.85,
    "median_half_width_at_most": 0.15,
    "median_decode_error_at_most": 0.1,
}


def rows(rates, env=LATER, **changes):
    made = line(rates, **({"stack": "graph"} | changes))
    return [env, *(replace(r, env_id=env.env_id) for r in made[1:])]


def cell(batch, metric=score.DECODE, value=None, low=None, high=None, **changes):
    one = {"set": "s", **PLACE, "batch": batch, "metric": metric, "unit": "x", "holds": "yes"}
    if value is None:
        return one | {"missing": "no row resolves it"} | changes
    width = (high - low) / 2 / value
    numbers = {"value": value, "low": low, "high": high, "half_width": width}
    return one | numbers | {"bound": "bandwidth", "notes": []} | changes


def lines(cells, records, **more):
    registered = {"cells": cells}
    return score.score(registered, score.measured(records), **({"at": AT, "learned": "L"} | more))


HIT, MISS = cell(1, value=110.0, low=90.0, high=130.0), cell(2, value=240.0, low=200.0, high=250.0)
MEASURED = {1: 100.0, 2: 200.0 / 1.25}  # the second is 160 of all


def test_the_error_and_whether_the_interval_covers():
    hit, miss = lines([HIT, MISS], rows(MEASURED))
    assert (hit["measured"], hit["error"], hit["covered"]) == (100.0, 0.1, True)  # 110 / 100 - 1
    assert (miss["measured"], miss["error"], miss["covered"]) == (160.0, 0.5, False)  # 240 / 160
    told = score.figures([hit, miss])
    assert (told["cells"], told["covered"], told["coverage"]) == (2, 1, 0.5)
    assert told["median_error"] == told["median_decode_error"] == 0.3  # of 10 % and 50 %
    assert told["median_half_width"] == pytest.approx((20 / 110 + 25 / 240) / 2, abs=1e-3)


@pytest.mark.parametrize(("measured", "covered"), [(90.0, True), (89.9, False), (130.1, False)])
def test_the_ends_of_an_interval_belong_to_it(measured, covered):
    (one,) = lines([HIT], rows({1: measured}))
    assert one["covered"] is covered


def test_joules_are_those_of_the_tables():
    """400 W at 100 tokens a second: 4,000 J for 1,000. The made calls are of 16 and 48 tokens; one
    of 64 would take 63 steps of 4 J and 500 J for its prefill."""
    step = cell(1, score.DECODE_J, value=5000.0, low=4000.0, high=6000.0)
    call = cell(1, score.CALL_J, value=5000.0, low=4000.0, high=6000.0)
    first, whole = lines([step, call], rows({1: 100.0}))
    assert first["measured"] == 4000.0 and first["error"] == 0.25
    assert whole["measured"] == 11_750.0  # 752 J for 64 tokens
    assert whole["measured_low"] is None and "at 64 tokens" in whole["method"]
    key = sample.key("m", stack="graph", context=512, batch=2, new_tokens=64)
    sixty_four = Record("batch-energy", key, {"energy_j": [640.0] * 3}, env_id=LATER.env_id)
    (one,) = lines([call | {"batch": 2}], [LATER, sixty_four])
    assert one["measured"] == 5000.0  # 640 J for 128 tokens
    key |= {"new_tokens": 16}
    (one,) = lines([call | {"batch": 2}], [LATER, replace(sixty_four, key=key)])
    assert one["missing"] == "not measured: blocks of one length only"


def test_what_was_not_measured_has_no_value_and_its_reason():
    absent, first, unsaid = (
        cell(4, value=1.0, low=0.5, high=2.0),
        cell(1, score.TTFT, value=1.0, low=0.5, high=2.0),
        cell(1),
    )
    told = lines([absent, first, unsaid], rows(MEASURED))
    assert [x["measured"] for x in told] == [None, None, 100.0]
    assert told[0]["missing"] == "not measured"
    assert "is that of hf-eager, and is scored there" in told[1]["missing"]
    assert told[2]["missing"] == "not predicted: no row resolves it"
    assert not any(map(score.counts, told))
    nothing = score.figures(told)
    assert nothing["cells"] == 0 and nothing["coverage"] is None


def test_a_lead_is_no_measurement_and_says_so():
    """A batch of an engine without a check of its logits at that size."""
    engine = {"stack": "vllm", "engine": "abc"}
    mine = rows(MEASURED, **engine)
    checked = Record("gate", mine[1].key | {"new_tokens": 4}, samples={"relative_error": [0.01]})
    one, two = lines([HIT | {"stack": "vllm"}, MISS | {"stack": "vllm"}], [*mine, checked])
    assert one["measured"] == 100.0 and two["measured"] is None
    assert two["missing"] == "a lead: logits not checked at this batch"
    assert two["held"] is True  # it ran


@pytest.mark.parametrize("name", score.PLACE)
def test_a_cell_meets_only_rows_of_its_own_place(name):
    other = {"context": 513, "batch": 3}.get(name, "another")
    (one,) = lines([HIT | {name: other}], rows(MEASURED))
    assert one["measured"] is None


@pytest.mark.parametrize(("experts", "measured"), [("grouped_mm", 100.0), ("all_experts", None)])
def test_only_the_library_s_own_experts_were_predicted(experts, measured):
    (one,) = lines([HIT], rows(MEASURED, experts=experts))
    assert one["measured"] == measured


def test_two_setups_of_one_place_are_not_one_number():
    real = [r for r in rows(MEASURED, weights="checkpoint") if r.kind != "environment"]
    (one,) = lines([HIT], [*rows(MEASURED), *real])
    assert one["missing"] == "measured in 2 setups, whose rows do not go together"


# --- what was measured first


@pytest.mark.parametrize(
    ("env", "starts", "outside"),
    [
        ({"date": "2026-11-28"}, "", ""),
        ({"date": "2026-11-27"}, "", "2026-11-27 00:00"),  # at an hour that nobody knows
        ({"date": "2026-11-27"}, "2026-11-27T16:00:01+00:00", ""),
        ({"date": "2026-11-27"}, "2026-11-27T15:59:59+00:00", "2026-11-27 15:59"),
        ({"date": "2026-11-27", "visit": "G, host, 2026-11-27T17:00:00Z"}, "", ""),
        ({"date": "2026-11-27", "visit": "G, host, 2026-11-27T15:00:00Z"}, "", "2026-11-27 15:00"),
        ({"date": "2026-11-27", "visit": "G, host, 2026-11-27T17:00:00Z"}, "2026-11-27", ""),
        ({}, "", "its rows tell no time"),
    ],
)
def test_a_cell_that_was_measured_first_is_named_and_not_counted(env, starts, outside):
    record = environment_record({"gpu": "G"} | env)
    arms = score.measured(rows(MEASURED, record), {record.env_id: starts})
    (one,) = score.score({"cells": [HIT]}, arms, at=AT)
    assert one["error"] == 0.1  # said all the same
    assert score.counts(one) is (not outside)
    assert outside in one.get("outside", "")


def test_one_visit_before_is_enough():
    before = environment_record({"gpu": "G", "date": "2026-11-26"})
    mine, earlier = rows(MEASURED), rows(MEASURED, before)
    both = [
        replace(row, others=(old,)) if row.kind == "batch" else row
        for row, old in zip(mine, earlier, strict=True)
    ]
    (one,) = lines([HIT], [*both, before])
    assert "measured first" in one["outside"]


def test_a_listed_cell_is_left_out_where_all_its_fields_agree():
    first = [{"model": "m", "batch": 2, "reason": "a paper"}]
    hit, miss = lines([HIT, MISS], rows(MEASURED), first=first)
    assert "outside" not in hit
    assert miss["outside"] == "measured first: a paper"


def test_a_listed_cell_with_an_unknown_field_is_refused(tmp_path, monkeypatch):
    asked = score.question()
    (tmp_path / "outputs/predictions").mkdir(parents=True)
    (tmp_path / "params/predictions").mkdir(parents=True)
    (tmp_path / "outputs/predictions" / asked.file.name).touch()
    (tmp_path / f"params/predictions/{asked.file.stem}-scored.yaml").write_text(
        'registered: "2026-11-27T15:00:00+00:00"\ncommit: abc\n'
        "measured_first: [{modle: m, reason: a paper}]\n"
    )
    with pytest.raises(ParamsError, match="'modle'"):
        score.question(tmp_path)


# --- together


def test_a_cell_of_two_sets_is_their_median_with_their_range():
    sets = [score.measured(rows({1: rate})) for rate in (90.0, 120.0)]
    (one,) = score.score({"cells": [HIT]}, score.together(sets), at=AT)
    assert (one["measured"], one["measured_low"], one["measured_high"]) == (105.0, 90.0, 120.0)
    assert (one["n"], one["level"], one["covered"]) == (2, None, True)


def test_a_check_in_one_set_says_nothing_about_times_of_another():
    """Logits that were wrong on one card withhold its times, and not those of the other."""
    wrong = [
        Record("gate", r.key | {"new_tokens": 4}, samples={"relative_error": [0.5]})
        for r in rows({1: 100.0}) if r.kind == "batch"
    ]  # fmt: skip
    other = environment_record({"gpu": "H", "date": "2026-11-28"})
    sets = [score.measured([*rows({1: 100.0}), *wrong]), score.measured(rows({1: 50.0}, other))]
    cells = [HIT, HIT | {"gpu": "H"}]
    one, two = score.score({"cells": cells}, score.together(sets), at=AT)
    assert one["measured"] is None and "times withheld" in one["missing"]
    assert two["measured"] == 50.0


def test_hf_eager_stands_apart_and_the_target_is_the_registered_one():
    eager = [
        cell(b, value=v, low=v / 2, high=v * 2, stack="hf-eager") for b, v in ((1, 9), (2, 18))
    ]
    told = lines(
        [HIT, MISS, *eager], [*rows(MEASURED), *rows({1: 10.0, 2: 20.0}, stack="hf-eager")[1:]]
    )
    registered = {"summary": {"all": {"median_half_width": 0.139}}, "target": TARGET}
    said = score.summary(told, registered)
    assert [said[name]["cells"] for name in ("all", "without hf-eager", "hf-eager")] == [4, 2, 2]
    verdicts = {(x["of"], x["what"]): x["met"] for x in said["target"]}
    assert verdicts["registered", "median half-width"] is True
    assert verdicts["all", "coverage"] is False  # 3 of 4
    assert verdicts["hf-eager", "coverage"] is True
    assert verdicts["hf-eager", "median half-width"] is False  # 0.75
    assert verdicts["hf-eager", "median decode error"] is True  # 10 %
    assert said["mean_coverage_of_models_and_contexts"] == 0.75  # one model, one context


def test_where_it_was_wrong_comes_with_the_largest_error_first():
    far = MISS | {"notes": ["batch beyond the rows' 1"]}
    first, second = score.not_known(lines([HIT, far], rows(MEASURED)))
    assert (first["beyond"], first["median_signed_error"], first["covered"]) == (True, 0.5, 0)
    assert (second["beyond"], second["median_error"]) == (False, 0.1)


def test_a_first_token_of_several_stacks_is_one_prediction():
    """Decoding holds and misses once; the first token of a captured stack misses a second time."""
    token = dict.fromkeys(("measured", "predicted"), 1.0) | {"half_width": 0.1, "error": 0.2}
    told = [
        {"metric": metric, "stack": stack, "batch": 1, "covered": held, **token}
        for metric, stack, held in (
            (score.DECODE, "graph", True), (score.DECODE, "graph", False),
            (score.TTFT, "hf-eager", False), (score.TTFT, "graph", False),
        )
    ]  # fmt: skip
    assert score.figures(told)["cells"] == 4
    assert "counted once, on hf-eager, 1 of 3 cells are covered (33%)" in scored._once(told)
    assert scored._once([]) == ""


def test_cells_of_several_cards_are_counted_card_by_card():
    """One of two on the first card, one of one on the second: 67 % is that of neither."""
    hit, miss = lines([HIT, MISS], rows(MEASURED))
    assert "By card" not in scored.sentence([hit, miss])
    told = scored.sentence([hit, miss, hit | {"gpu": "H"}])
    assert told.startswith("2 of 3 measured cells lie in their interval (67%)")
    assert told.endswith(" By card: 1 of 2 on G (50%), 1 of 1 on H (100%).")


def test_what_a_card_gained_is_told_beside_what_it_was_said_to_gain():
    """Decode 110 and 240 were said, 100 and 160 came; the card learned from has 80 and 100."""
    learned = environment_record({"gpu": "L", "date": "2026-11-26"})
    both = [*rows(MEASURED), *rows({1: 80.0, 2: 100.0}, env=learned)]
    told = lines([HIT, MISS], both)
    assert [line["learned"] for line in told] == [80.0, 100.0]
    (group,) = score.gains(told)
    assert (group["gpu"], group["bound"], group["cells"]) == ("G", "bandwidth", 2)
    assert group["predicted"] == pytest.approx((110 / 80 + 240 / 100) / 2, abs=0.005)
    assert group["measured"] == pytest.approx((100 / 80 + 160 / 100) / 2, abs=0.005)
    (line,) = scored.gain_table(score.gains(told)).lines()
    assert line["quantity"] == "decode (tok/s)" and line["stack"] == "graph"
    assert score.gains(lines([HIT, MISS], rows(MEASURED))) == []
    later = environment_record({"gpu": "L", "date": "2026-11-28"})
    own = lines([HIT | {"gpu": "L"}], rows({1: 80.0}, env=later))
    assert own[0]["measured"] == 80.0 and score.gains(own) == []  # over itself a card gains nothing


def test_what_was_said_to_hold_and_did_not():
    full = replace(failed(4, "graph"), env_id=LATER.env_id)
    told = lines([HIT, cell(4, value=1.0, low=0.5, high=2.0)], [*rows(MEASURED), full])
    assert told[1]["missing"] == "failed: OutOfMemoryError: CUDA"
    registered = {"summary": {"all": {"median_half_width": 0.1}}, "target": TARGET}
    assert score.summary(told, registered)["memory"] == [
        {"said": "yes", "held": True, "cells": 1},
        {"said": "yes", "held": False, "cells": 1},
    ]


# --- for reading


def test_the_table_and_the_figure_hold_every_measured_cell():
    before = [{"batch": 2, "reason": "a paper"}]
    told = lines([HIT, MISS, cell(4, value=1.0, low=0.5, high=2.0)], rows(MEASURED), first=before)
    table = scored.error_table(told)
    assert [row[4] for row in table.rows] == [1, 2]
    assert [row[-1].word for row in table.rows] == ["covered", "not counted"]
    assert table.rows[0][-2].estimate.value == pytest.approx(10)
    ax = scored.errors(told)
    dots = [x for x in ax.get_lines() if x.get_marker() == "o"]
    assert [float(x.get_xdata()[0]) for x in dots] == pytest.approx([100 / 110])
    plt.close(ax.figure)


def test_the_file_repeats_no_prediction_of_what_was_not_measured():
    told = lines([HIT, cell(4, value=1.0, low=0.5, high=2.0)], rows({1: 100.0}))
    one, two = json.loads(scored.text({"schema": 1, "cells": told}))["cells"]
    assert one["predicted"] == 110.0 and one["measured"] == 100.0
    assert two.keys() == {*score.PLACE, "metric", "measured", "missing"}
    assert (two["batch"], two["missing"]) == (4, "not measured")


def test_a_report_of_rows_that_were_predicted_shows_them(tmp_path):
    """Two batches of a registered H200 cell, one in its interval and one at twice its high end."""
    place = {"gpu": "NVIDIA H200", "model": "Qwen3-32B", "stack": "graph", "metric": score.DECODE}
    data = registry.sealed(score.question().file)
    two, four = (
        next(c for c in data["cells"] if c.items() >= {**place, "context": 512, "batch": b}.items())
        for b in (2, 4)
    )
    env = environment_record(sample.GPU | {"gpu": "NVIDIA H200", "date": "2026-12-01"})
    mine = rows({2: two["value"], 4: 2 * four["high"]}, env, model="Qwen3-32B")
    where = "Qwen3-32B/random-graph/batch"
    sample.write_job(tmp_path / "h200", where, mine[1:], env.values, model="Qwen3-32B")
    path = tmp_path / "h200" / where / "run.json"
    path.write_text(path.read_text(encoding="utf-8").replace("2026-11-24T", "2026-12-01T"))
    page = BeautifulSoup(document.write(tmp_path / "h200").read_text("utf-8"), "html.parser")
    part = page.find(id="predicted").parent
    assert "of 6 measured cells lie in their interval" in " ".join(part.text.split())
    table = [x.text for x in part.select("#grid-predicted-errors tbody tr")]
    covered, missed = (x for x in table if "decode (tok/s)" in x)
    assert "covered" in covered and "missed" in missed
    assert part.find("svg")


def test_a_report_without_predicted_cells_has_no_such_section(tmp_path):
    page = document.write(sample.write_demo(tmp_path)).read_text(encoding="utf-8")
    assert 'id="predicted"' not in page


# --- what is in Git


def test_the_page_in_git_says_what_the_released_rows_say(tmp_path):
    """`make score` writes it again; the registered file stays as it was."""
    path = scored.write(score.released(), tmp_path)
    for name in (path, path.with_suffix(".md")):
        kept = scored.path().with_name(name.name)
        assert kept.read_text(encoding="utf-8") == name.read_text(encoding="utf-8")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["registered"]["sha256"] == score.files.file_sha(score.question().file)
    assert len(data["cells"]) == len(registry.sealed(score.question().file)["cells"])


def test_before_anything_is_scored_the_file_has_no_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(scored, "path", lambda: tmp_path / "none.json")
    assert scored.sentence(scored.read()["cells"]) == "No cell that counts has been measured yet."


def test_the_registration_was_when_its_commit_was_made():
    asked = score.question()
    command = ["git", "-C", ROOT, "show", "-s", "--format=%cI", asked.commit]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no history here")
    assert datetime.fromisoformat(done.stdout.strip()) == asked.at
    names = ["git", "-C", ROOT, "show", "--format=", "--name-only", "--diff-filter=A", asked.commit]
    added = subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()
    assert asked.file.relative_to(ROOT).as_posix() in added


def test_the_command_scores_other_folders_elsewhere(tmp_path, capsys):
    sample.write_demo(tmp_path / "demo")
    assert main(["score", str(tmp_path / "demo"), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*-scored.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["summary"]["all"]["cells"] == 0
    assert "No cell that counts" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert main(["score", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
