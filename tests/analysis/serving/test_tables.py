"""Load curves as tables, figures and sentences, on rows that a pencil can check."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lib.analysis.frame import frame
from lib.analysis.metrics import METRICS, shown_in
from lib.analysis.serving import attribution, clients, figures, tables
from lib.measure.serving import sweep
from lib.measure.serving.arrivals import Load
from lib.records import store
from lib.records.record import Record, environment_record, warning
from lib.show import figure
from tests.samples.records import GPU
from tests.samples.serving import fact, row, users

ENV = environment_record(GPU)


def cells(grid, load: str) -> dict:
    """A line of a table by its headers."""
    titles = [column.title for column in grid.columns]
    return next(
        d for line in grid.rows if (d := dict(zip(titles, line, strict=True)))["load"] == load
    )


def curve(*counts: int) -> list[Record]:
    return [users(count) for count in counts]


def poisson(rate: float, **changes) -> Record:
    facts = [fact(10.0 + n / rate, 10.5 + n / rate) for n in range(int(10 * rate))]
    samples = {"output_tokens_by_s": [5 * rate] * 10, "prompt_tokens_by_s": [10 * rate] * 10}
    return row(facts, Load("poisson", rate), samples=samples, **changes)


def test_a_load_is_a_line_with_its_throughput_and_joules():
    """Two users at 0.26 s a request of five tokens; 200 W, half of them idle power."""
    grid = tables.table([ENV, *curve(1, 2)])
    line = cells(grid, "closed 2")
    assert line["output of all"].value == pytest.approx(10 / 0.26)
    assert line["prompts of all"].value == pytest.approx(20 / 0.26)
    assert line["J/1K output tokens"].value == pytest.approx(200 * 0.26 * 100)
    assert line["of it idle"].value == 50 and line["mean power"].value == 200
    assert line["within the limits"].value == 100
    mine = users(1, continuous_batching=False, api="completions", token_id_prompts=True)
    words = "vllm: 0.25.1, no continuous batching, asked by completions with token ids"
    assert words in tables.table([mine]).notes
    assert any(
        "limits: TTFT at most 500.0 ms, TPOT at most 100.0 ms" in note for note in grid.notes
    )


def test_loads_are_in_the_order_of_their_users_and_rates_come_after_them():
    rows = [poisson(20.0), *curve(16, 2, 1), poisson(3.0)]
    loads = [line[4] for line in tables.table(rows).rows]
    assert loads == ["closed 1", "closed 2", "closed 16", "poisson 3/s", "poisson 20/s"]


def test_failures_stand_beside_every_percentile():
    facts = [fact(10 + n / 10, 11 + n / 10) for n in range(60)]
    broken = [{**f, "failure": "timeout", "first_s": None} for f in facts[:30]]
    line = cells(tables.latencies([row([*broken, *facts[30:]])]), "closed 1")
    assert (line["requests"], line["failed"]) == (60, 30)
    assert line["TTFT, p95 or max of n"].method == "max of 30"
    assert line["TTFT"].n == 30


def test_a_load_that_failed_says_why_in_its_line_and_in_a_sentence():
    dead = replace(users(4), samples={}, error="EndpointError: gone")
    grid = tables.latencies([*curve(1, 2), dead])
    line = cells(grid, "closed 4")
    assert line["requests"] is None and line["TTFT"].reason == "failed: EndpointError: gone"
    assert "closed 4: EndpointError: gone." in tables.conclusion([*curve(1, 2), dead])


def test_without_a_board_there_is_a_reason_and_no_column():
    mine = row([fact(11.0, 12.0)], samples={"output_tokens_by_s": [1.0] * 10})
    mine.missing.update(energy_j="the device is a CPU", idle_w="the device is a CPU")
    grid = tables.table([mine])
    assert "J/1K output tokens" not in [column.title for column in grid.columns]
    assert any("J per request" in note and "the device is a CPU" in note for note in grid.notes)
    assert "energy not measured (the device is a CPU)" in tables.conclusion([mine])


def test_the_conclusion_tells_saturation_limits_and_joules():
    """Of n users each request takes 0.1 + 0.08 n s: 5 n of five tokens in that time."""
    text = tables.conclusion([ENV, *curve(1, 2, 4, 8, 16)])
    assert "at 1 user 27.78 tok/s" in text and "at 16 users 57.97" in text
    # 8 users give 40 / 0.74 = 54.05 tokens a second, twice as many 80 / 1.38 = 57.97.
    assert "saturated at 8 users: twice as many give 1.072 times the throughput" in text
    # A further token takes 0.02 n s, and 0.1 are allowed.
    assert "in 95% of the requests up to 4 users" in text
    assert "at 1 user 5,400 J, n = 1, 67% of it idle power" in text
    assert "not saturated at 2 users" in tables.conclusion(curve(1, 2))


def test_a_load_with_a_doubt_decides_nothing():
    doubtful = replace(users(16), warnings=(warning("unsteady", "no steady window"),))
    text = tables.conclusion([*curve(1, 2), doubtful])
    assert "16 users" not in text and "1 load(s) with warnings decide nothing" in text
    assert "no load of users decides anything, since each of 1 has" in tables.conclusion([doubtful])
    assert {"unsteady", "client_busy", "client_late", "arrivals"} <= tables.DOUBTS


def test_two_servers_of_one_model_are_two_lines():
    other = [users(n, key={"server": "transformers"}) for n in (1, 2)]
    lines = tables.lines([*curve(1, 2), *other])
    assert [line.name.label for line in lines] == ["m (transformers)", "m (vllm)"]


def mix(n: int, seconds: int, prompts: float, outputs: float, **changes) -> Record:
    """A board of 100 W that takes 0.02 J for a prompt token and 0.25 J for an output token."""
    samples = {"prompt_tokens_by_s": [prompts / seconds] * seconds}
    samples["output_tokens_by_s"] = [outputs / seconds] * seconds
    joules = 100 * seconds + 0.02 * prompts + 0.25 * outputs
    values = {"energy_j": joules * (1 + changes.pop("off", 0.0)), "seed": 1} | changes
    facts = [fact(10.0, 10.0 + seconds / (1 + n % 3))]
    window = (10.0, 10.0 + seconds)
    return row(facts, Load("closed", n + 1), window, "serving-mix", samples=samples, **values)


SHAPES = [
    (20, 40_000, 1_000), (20, 2_000, 8_000), (30, 100_000, 4_000), (25, 10_000, 10_000),
    (20, 80_000, 12_000), (40, 5_000, 2_000), (20, 150_000, 500), (30, 30_000, 30_000),
    (22, 60_000, 6_000), (35, 1_000, 20_000), (20, 20_000, 3_000), (28, 120_000, 15_000),
]  # fmt: skip


def test_what_tokens_cost_is_fitted_over_mixes_and_checked_by_those_held_out():
    rows = [mix(n, *shape) for n, shape in enumerate(SHAPES)]
    (line,) = tables.costs(rows).rows
    titles = [column.title for column in tables.costs(rows).columns]
    told = dict(zip(titles, line, strict=True))
    assert told["idle (W)"].value == pytest.approx(100)
    assert told["prompt (J/1K)"].value == pytest.approx(20)
    assert told["output (J/1K)"].value == pytest.approx(250)
    assert told["remark"] == "within the limits"
    assert "1,000 output tokens 250.0 J" in tables.conclusion(rows)


def test_a_fit_that_predicts_badly_is_not_believed():
    rows = [mix(n, *shape, off=0.5 * (n % 2)) for n, shape in enumerate(SHAPES)]
    assert "not believed" in tables.conclusion(rows) and "not believed" in str(tables.costs(rows))


def test_mixes_that_cannot_be_fitted_say_why():
    rows = [mix(n, *shape) for n, shape in enumerate(SHAPES)]
    assert attribution.of_rows([*rows[:11], replace(rows[11], error="x")]).startswith("1 of 12 mix")
    assert "needs 12, got 11" in attribution.of_rows(rows[:11])
    rows[3].missing["energy_j"] = "the device is a CPU"
    assert attribution.of_rows(rows) == "the device is a CPU"
    assert "energy is not attributed (the device is a CPU)" in tables.conclusion(rows)


def test_figures_show_every_curve_and_say_it_in_words():
    rows = [ENV, *curve(1, 2, 4), poisson(3.0, energy_j=100.0, idle_w=5.0)]
    text = figure.describe(figures.throughput(rows))
    assert "m: 27.78 at 1 to 47.62 at 4." in text
    assert "m, Poisson arrivals" in figure.describe(figures.latency(rows))
    assert "m, of it idle power: 3,600 at 1" in figure.describe(figures.energy(rows))
    assert "not measured" in figure.describe(figures.energy([]))


def test_every_number_under_load_is_in_the_frame_with_its_server(tmp_path):
    job = tmp_path / "m" / "random-server" / "serving"
    job.mkdir(parents=True)
    (job / "run.json").write_text(json.dumps({"status": "ok", "end": "2026-01-01"}))
    for mine in (ENV, users(2), poisson(3.0)):
        store.append(job / "records.jsonl", mine)
    numbers = frame(tmp_path)
    names = [metric.name for table in ("serving", "serving-latency") for metric in shown_in(table)]
    assert set(names) <= set(numbers.metric) and len(names) == len(set(names))
    line = numbers[(numbers.metric == "served_j_per_1k") & (numbers.load == "closed 2")].iloc[0]
    assert line.value == pytest.approx(5200) and (line.server, line.batch) == ("vllm", 2)
    assert METRICS["served_ttft"].of([]).reason == "not measured"


def test_the_section_holds_tables_figures_and_the_clients():
    assert figures.section([ENV]) == ""
    page = figures.section([ENV, *curve(1, 2)])
    assert 'id="serving"' in page and page.count('class="picture"') == 3
    assert "n = " not in page.split("<details")[0]  # requests around the window are not of it
    unmetered = [replace(r, values=r.values | {"energy_j": None}) for r in curve(1, 2)]
    page = figures.section([ENV, *unmetered])
    assert page.count('class="picture"') == 2 and "Energy under load" not in page
    for title in ("Servers under load", "Latency under load", "Clients, and whether they tell"):
        assert title in page


CLIENTS = {
    "date": "2026-11-27",
    "machine": {"cpu": "a CPU", "processors": 2},
    "python": "3.11.7",
    "arrivals": "poisson 20/s",
    "lengths": {"prompt_tokens": 32, "output_tokens": 24},
    "limits": {"ttft_s": 0.001, "itl": 0.01},
    "scenarios": {"a": {}, "b": {}},
    "clients": [
        {
            "title": "ours", "version": None,
            "scenarios": {"a": {"checks": [{"name": "ttft_s", "ok": True, "text": ""}]}},
        },
        {
            "title": "Other", "version": "1.2",
            "scenarios": {
                "a": {"checks": [{"name": "itl_s", "ok": False, "text": "median error -9 %"},
                                 {"name": "ttft_s", "ok": None, "text": "not told"}]},
                "b": {"checks": [], "error": "it broke"},
            },
        },
    ],
}  # fmt: skip


def test_the_truth_table_says_who_is_off_where_with_versions_and_date():
    grid = clients.table(CLIENTS)
    ours, other = ([str(getattr(cell, "text", cell)) for cell in line] for line in grid.rows)
    at = {column.title: n for n, column in enumerate(grid.columns)}
    assert (ours[at["client"]], ours[at["TTFT"]], ours[at["is off in"]]) == (
        "ours",
        "yes",
        "nothing",
    )
    assert (other[at["client"]], other[at["mean ITL"]], other[at["TTFT"]]) == (
        "Other 1.2",
        "no",
        "–",
    )
    assert other[at["is off in"]] == "b: it broke; a"
    assert grid.rows[1][-1].small == "mean ITL, a: median error -9 %"
    assert "2026-11-27" in grid.notes[0] and "1 ms" in grid.notes[1]


def test_the_released_truth_table_can_be_shown():
    data = clients.load(clients.PLACES[1])
    names = {check["name"] for c in data["clients"] for s in c["scenarios"].values()
             for check in s["checks"]}  # fmt: skip
    assert names <= {*clients.CHECKS, "delay_s"}
    ours = clients.table(data).rows[0]
    assert "this workbook's client" in ours[0] and "no" not in ours
    assert clients.load("outputs/no-such-file.json") is None


def test_both_wings_mean_the_same_by_kinds_and_saturation():
    assert (tables.KIND, tables.MIX) == (sweep.KIND, sweep.MIX)
    assert tables.SATURATED == sweep.SATURATED
