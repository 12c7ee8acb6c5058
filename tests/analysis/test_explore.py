"""Looking by hand: what exists is offered, what does not is an error that lists it."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib.analysis import explore
from lib.files import ParamsError
from tests.samples import records as sample

ENV = sample.environment_record(sample.GPU)
ROWS = [
    ENV,
    *(sample.card(m, ENV.env_id) for m in ("qwen3-32b", "two")),
    *sample.latency("qwen3-32b", ENV.env_id, (512, 2048)),
    *sample.captured("qwen3-32b", ENV.env_id),
    *sample.latency("two", ENV.env_id, (512,)),
]


def test_a_stack_has_the_card_of_its_model():
    mine = explore.pick(ROWS, "qwen3-32b", "graph")
    assert {r.key.get("model") for r in mine} == {None, "qwen3-32b"}
    assert [r.key.get("model") for r in mine if r.kind == "card"] == ["qwen3-32b"]
    assert {r.key["stack"] for r in mine if r.kind == "latency"} == {"graph"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("three", "hf-eager", 512), "unknown model 'three'.*Known: qwen3-32b, two"),
        (("two", "graph", 512), "unknown stack of two 'graph'.*Known: hf-eager"),
        (
            ("qwen3-32b", "hf-eager", 300),
            "no calls of qwen3-32b on hf-eager at context 300; there are 512, 2048",
        ),
    ],
)
def test_what_is_not_there_is_named_beside_what_is(choice, message):
    with pytest.raises(ParamsError, match=message):
        explore.pick(ROWS, *choice)
    with pytest.raises(ParamsError, match="unknown metric 'speed'.*Known: throughput, ttft"):
        explore.draw("speed", ROWS)


def test_the_panel_offers_what_exists(monkeypatch):
    drawn = []
    monkeypatch.setattr(explore, "draw", lambda metric, rows: drawn.append((metric, len(rows))))
    box = explore.panel(ROWS)
    model, stack, metric = box.children[0].children
    assert model.options == ("qwen3-32b", "two") and stack.options == ("hf-eager", "graph")
    assert "memory" not in metric.options  # no row of it: nothing to draw
    stack.value = "graph"
    model.value = "two"  # which was not timed on graph
    assert stack.options == ("hf-eager",) and stack.value == "hf-eager"
    metric.value = "ttft"
    assert drawn[-1] == ("ttft", len(explore.pick(ROWS, "two", "hf-eager")))


def test_a_stack_whose_times_are_withheld_is_not_offered():
    late = replace(ROWS[-1], key=ROWS[-1].key | {"stack": "graph"}, error="times withheld: why")
    assert explore.stacks_of([*ROWS, late], "two") == ["hf-eager"]


def test_the_caption_names_no_stack_that_is_not_drawn(monkeypatch):
    row = replace(ROWS[-1], kind="trace", key=ROWS[-1].key | {"stack": "graph"})
    shown = []
    monkeypatch.setattr(explore.figure, "show", lambda ax, rows: shown.extend(rows))
    explore.draw("ttft", [*explore.pick([*ROWS, row], "two", "hf-eager")])
    assert "graph" not in explore.figure.caption(shown)


@pytest.mark.parametrize("installed", [True, False])
def test_every_number_can_be_searched_and_measured_ones_come_first(
    tmp_path, monkeypatch, installed
):
    shown = []
    tables = SimpleNamespace(
        init_notebook_mode=lambda **options: shown.append(options["connected"]),
        show=lambda numbers, **options: shown.append(numbers),
    )
    monkeypatch.setitem(sys.modules, "itables", tables if installed else None)
    sample.write_job(tmp_path, "one/random-hf-eager/latency", ROWS[1:], sample.GPU, model="one")
    text = explore.browse(tmp_path)
    if not installed:
        assert re.match(r"\d+ numbers; install itables", text) and shown == []
        return
    connected, numbers = shown
    missing = list(numbers["value"] == "")
    assert text is None and connected is False
    assert len(numbers) > 5 and any(missing) and missing == sorted(missing)
