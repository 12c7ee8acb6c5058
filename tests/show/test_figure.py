"""Figures: what is drawn, what the alternative text says of it, and that gaps are named."""

import base64
import re
import sys
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb

from lib.analysis import ablations, efficiency, energy, latency, memory
from lib.files import ROOT
from lib.models import entries
from lib.records.record import Record, environment_record
from lib.show import figure
from tests.samples import records as sample
from tests.samples.records import GPU, key, spread

ENV = environment_record(GPU)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def calls(model="m", contexts=(100, 200), lengths=(10, 20)):
    """Calls of 0.01 s for a token of context and 0.1 s for a new one, three times each."""
    return [
        Record(
            "latency",
            key(model, context=c, new_tokens=g),
            {"e2e_s": [0.01 * c + 0.1 * g] * 3},
            env_id=ENV.env_id,
        )
        for c in contexts
        for g in lengths
    ]


def series(ax):
    """The labelled lines: label -> points."""
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [tuple(xy) for xy in line.get_xydata().tolist()] for line in lines}


def near(*points):
    return [pytest.approx(point) for point in points]


def faint(ax):
    """The unlabelled points: the repetitions."""
    lines = [line for line in ax.get_lines() if line.get_label().startswith("_")]
    return np.concatenate([line.get_xydata() for line in lines]) if lines else np.zeros((0, 2))


# --- colours


def test_a_model_has_one_colour_in_every_figure_and_every_run():
    names = list(entries.models())
    assert len({figure.color(name) for name in names}) == len(names) <= len(figure.PALETTE)
    # A hash that changes from one Python process to the next would not always give these places.
    unlisted = [figure.PALETTE.index(figure.color(name)) for name in ("a/b", "x/y", "org/small")]
    assert unlisted == [7, 5, 4]
    rows = sample.latency("qwen3-32b", ENV.env_id, (128, 512))
    drawn = {line.get_color() for line in latency.ttft(rows).get_lines()}
    assert drawn == {figure.color("qwen3-32b")}


# --- one figure per kind


def test_throughput_shows_output_that_falls_and_decode_that_does_not():
    ax = latency.throughput(calls())
    lines = series(ax)
    assert lines["m, output"] == near((100, 5.0), (200, 10 / 3))  # 10 / 2 s, 10 / 3 s
    assert lines["m, decode only"] == near((100, 10.0), (200, 10.0))
    assert len(faint(ax)) == 6
    assert figure.describe(ax) == (
        "Throughput against context; throughput (tok/s) against context (tokens). "
        "m, output: 5.000 at 100 to 3.333 at 200. m, decode only: 10.00 at 100 to 10.00 at 200."
    )


def test_decode_alone_is_left_out_where_one_context_has_no_slope():
    assert list(series(latency.throughput(calls(lengths=(10,))))) == ["m, output"]


def test_one_context_is_described_by_its_value():
    ax = latency.throughput(calls(contexts=(100,)))
    assert "m, output: 5.000 at 100. m, decode only: 10.00 at 100." in figure.describe(ax)


def test_ttft_is_in_milliseconds_and_sorted_by_context():
    rows = [
        Record("latency", key("m", context=c, new_tokens=1), {"ttft_s": [c / 1e3] * 2})
        for c in (200, 100)
    ]
    ax = latency.ttft(rows)
    assert series(ax) == {"m": [(100, 100.0), (200, 200.0)]}
    assert ax.get_ylabel() == "TTFT (ms)" and ax.get_xlabel() == "context (tokens)"


def test_token_times_are_the_gaps_of_the_first_call():
    stamps = [[1.0, 1.1, 1.3], [9.0, 9.9, 9.99]]
    ax = latency.token_times([Record("itl", key("m", context=64), {"token_s": stamps})])
    assert series(ax)["context 64"] == near((2, 100.0), (3, 200.0))


def test_memory_parts_lie_end_to_end():
    values = {"kv_tensor_bytes": 10**6, "logits_bytes": 2 * 10**6, "workspace_bytes": 3 * 10**6}
    ax = memory.figures.memory_parts([Record("memory", key("m", context=64), {}, values)], "memory")
    bars = [(bar.get_x(), bar.get_width()) for box in ax.containers for bar in box]
    assert bars == [(0, 1), (1, 2), (3, 3)]  # MB
    assert [t.get_text() for t in ax.get_yticklabels()] == ["m, 64"]
    assert figure.describe(ax) == (
        "Peak above baseline, generate(); arms against MB (10^6 bytes). KV cache: 1.000. logits "
        "held: 2.000. workspace: 3.000."
    )


def test_energy_shows_the_counter_and_the_papers_estimator():
    ax = energy.figures.figure(sample.energy("gpt-oss-20b", ENV.env_id, (128, 512)))
    lines = series(ax)
    assert lines["gpt-oss-20b, counter"] == near((128, 10_000), (512, 10_000))
    assert lines["gpt-oss-20b, paper's"] == near((128, 9_000), (512, 9_000))
    face = {line.get_label(): line.get_markerfacecolor() for line in ax.get_lines()}
    assert face["gpt-oss-20b, paper's"] == "white" != face["gpt-oss-20b, counter"]


def test_an_ablation_keeps_its_order_and_names_the_arm_that_failed():
    rows = [
        Record("ablation-precision", key("m", dtype="bfloat16"), {"e2e_s": spread(2.0)}),
        Record("ablation-precision", key("m", dtype="float16"), error="RuntimeError: boom"),
        Record("ablation-precision", key("m", dtype="float32"), {"e2e_s": spread(4.0)}),
    ]
    ax = ablations.figure(rows, "dtype")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["bfloat16", "float16", "float32"]
    assert series(ax) == {"bfloat16": [(32.0, 0)], "float32": [(16.0, 2)]}  # 64 tokens
    (failed,) = ax.texts
    assert (failed.get_text(), failed.get_position()[1]) == ("failed: RuntimeError: boom", 1)
    assert figure.describe(ax) == (
        "Ablation: dtype; arms against output throughput (tokens per second). bfloat16: 32.00. "
        "float32: 16.00. failed: RuntimeError: boom"
    )


def test_efficiency_is_throughput_per_billion_active_parameters():
    rows = [sample.card("gpt-oss-20b", ENV.env_id), *calls("gpt-oss-20b")]
    assert series(efficiency.figure(rows)) == {
        "gpt-oss-20b": near((100, 5 / 4), (200, 10 / 3 / 4))  # 4 billion are active
    }


NOTHING = {
    "throughput": lambda: latency.throughput([]),
    "ttft": lambda: latency.ttft([]),
    "token times": lambda: latency.token_times([]),
    "memory": lambda: memory.figures.memory_parts([], "memory"),
    "energy on a CPU": lambda: energy.figures.figure(
        sample.energy("m", ENV.env_id, (128,), gpu=False)
    ),
    "ablation": lambda: ablations.figure([], "dtype"),
    "efficiency": lambda: efficiency.figure([sample.card("m", ENV.env_id)]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", NOTHING.values(), ids=NOTHING.keys())
def test_a_figure_without_data_says_so(draw):
    ax = draw()
    assert [text.get_text() for text in ax.texts] == ["not measured"]
    assert figure.describe(ax).endswith("not measured")


def test_every_figure_has_a_title_and_units():
    rows = [
        sample.card("gpt-oss-20b", ENV.env_id),
        *sample.latency("gpt-oss-20b", ENV.env_id, (128, 512)),
    ]
    rows += sample.memory("gpt-oss-20b", ENV.env_id, (128, 512))
    rows += sample.energy("gpt-oss-20b", ENV.env_id, (128, 512))
    figures = [
        latency.throughput(rows),
        latency.ttft(rows),
        latency.token_times(rows),
        energy.figures.figure(rows),
        efficiency.figure(rows),
        memory.figures.memory_parts(rows, "memory"),
    ]
    for ax in figures:
        assert ax.get_title() and ax.get_xlabel() and "not measured" not in figure.describe(ax)
        assert ax.get_legend() is not None


def test_a_figure_can_be_drawn_into_given_axes():
    mine = plt.subplots()[1]
    assert latency.ttft(sample.latency("m", ENV.env_id, (128,)), ax=mine) is mine


# --- caption and display


def test_the_caption_names_hardware_setup_and_repetitions():
    rows = [ENV, sample.card("m", ENV.env_id), *calls()]
    setup = "NVIDIA H100 80GB HBM3; random weights, bfloat16, hf-eager"
    assert figure.caption(rows) == f"{setup}; n = 3"
    assert figure.caption(rows, ["itl"]) == "not measured"
    more = Record(
        "latency",
        key("m", dtype="float32"),
        {"e2e_s": [1.0] * 7, "warmup_s": [9.0]},
        env_id=ENV.env_id,
    )
    assert (
        figure.caption([*rows, more]) == f"{setup}; random weights, float32, hf-eager; n = 3 to 7"
    )
    dated = environment_record({"gpu": "G", "date": "2026-11-24"})
    assert figure.caption([dated, Record("memory", key("m"), env_id=dated.env_id)]).endswith(
        "hf-eager; 2026-11-24"
    )
    cpu = environment_record({"gpu": None, "cpu": "Some CPU"})
    assert figure.caption([cpu, Record("memory", key("m"), env_id=cpu.env_id)]) == (
        "Some CPU; random weights, bfloat16, hf-eager"
    )
    of_the_machine = Record("ceilings", {}, {"launch_s": [1.0] * 3}, env_id=cpu.env_id)
    assert figure.caption([cpu, of_the_machine]) == "Some CPU; n = 3"
    assert figure.caption([]) == ""
    # A figure of one kind of rows says nothing about others.
    other = Record("energy", key("m") | {"stack": "graph"}, samples={"energy_j": [1.0] * 9})
    assert "graph" in figure.caption([*rows, other])
    assert figure.caption([*rows, other], [rows[-1].kind]) == f"{setup}; n = 3"


def test_show_gives_the_picture_its_alternative_text_and_a_caption(monkeypatch):
    displays = []
    display = sys.modules.get("IPython.display") or __import__("IPython.display").display
    monkeypatch.setattr(display, "display", lambda *a, **k: displays.append((a, k)))
    ax = latency.ttft(
        [
            Record(
                "latency",
                key("m", context=c, new_tokens=1),
                {"ttft_s": [c / 1e3]},
                env_id=ENV.env_id,
            )
            for c in (100, 200)
        ]
    )
    figure.show(ax, [ENV, *calls()])
    (picture, options), (text, _) = displays
    assert picture == (ax.figure,)
    assert options["metadata"]["image/png"]["alt"] == (
        "Time to first token against context; TTFT (ms) against context (tokens). "
        "m: 100.0 at 100 to 200.0 at 200."
    )
    assert text[0].data == (
        "*Time to first token against context. NVIDIA H100 80GB HBM3; random weights, bfloat16, "
        "hf-eager; n = 3.*"
    )
    assert not plt.fignum_exists(ax.figure.number)  # drawn once, not again at the end of the cell


# --- in a page


def test_an_svg_follows_the_theme_and_repeats_itself():
    first, again = (str(figure.svg(latency.ttft(TWO), "what it shows")) for _ in range(2))
    assert first == again and "#000000" not in first
    assert "style=" not in first and "<style" not in first  # the page's policy allows neither
    root = ElementTree.fromstring(first)
    assert (root.get("role"), root.get("aria-label")) == ("img", "what it shows")
    assert root.get("fill") == "currentColor"
    ids = {tag.get("id") for tag in root.iter()} - {None}
    assert ids == set(figure.REFERENCE.findall(first))
    other = ElementTree.fromstring(figure.svg(latency.ttft(TWO), "something else"))
    assert not ids & {tag.get("id") for tag in other.iter()}  # two figures in one page


def relative_luminance(rgb):
    """Of WCAG 2.2, of three numbers from 0 to 1."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("ink", "paper"), [("#1c2127", "#ffffff"), ("#e4e7ea", "#15181b")])
def test_names_in_the_colours_of_models_are_readable_in_both_themes(ink, paper):
    css = (ROOT / "lib/show/templates/page.css").read_text(encoding="utf-8")
    assert ink in css and paper in css
    share = figure.LEFT["text"] / 100
    for shade in figure.PALETTE:
        mixed = [share * a + (1 - share) * b for a, b in zip(shade, to_rgb(ink), strict=True)]
        light = sorted((relative_luminance(mixed), relative_luminance(to_rgb(paper))))
        assert (light[1] + 0.05) / (light[0] + 0.05) >= 4.5, shade


def test_no_colour_in_an_svg_is_of_one_theme_only():
    ax = latency.ttft(TWO)
    figure.label_ends(ax)
    ax.plot([1, 2], [1, 2], color=figure.PALETTE[0], **figure.HOLLOW)
    ax.text(0.5, 0.5, "why", color="0.35", bbox={"fc": "white"})
    text = str(figure.svg(ax, "x"))
    colours = re.findall(r'(?:fill|stroke)="([^"]+)"', text)
    assert not [c for c in colours if c.startswith("#")]
    names = re.findall(r"<text[^>]*color-mix\([^>]*>([^<]*)", text)
    assert {name.strip() for name in names} == {"gpt-oss-20b", "qwen3-32b"}


def test_where_nothing_was_measured_there_are_no_empty_axes():
    ax = latency.ttft([])
    title = ax.get_title()
    assert figure.html(ax, []) == f'<p class="note">{title}: not measured.</p>'
    assert not plt.fignum_exists(ax.figure.number)


def test_a_leader_starts_beside_its_name():
    ax = latency.ttft(TWO)
    figure.label_ends(ax)
    assert {text.arrow_patch is not None and text._arrow_relpos for text in ax.texts} == {(0, 0.5)}


def test_hostile_names_stay_text():
    rows = sample.latency("<script>alert(1)</script>", ENV.env_id, (128, 512))
    assert "<script" not in str(figure.html(latency.ttft(rows), rows))


TWO = [
    *sample.latency("qwen3-32b", ENV.env_id, (128, 512)),
    *sample.latency("gpt-oss-20b", ENV.env_id, (128, 512)),
]


def test_lines_have_their_names_at_their_ends_in_their_colours():
    ax = latency.ttft(TWO)
    figure.label_ends(ax)
    assert ax.get_legend() is None
    names = {text.get_text(): text.get_color() for text in ax.texts}
    assert names == {m: figure.color(m) for m in ("gpt-oss-20b", "qwen3-32b")}
    low, high = sorted(ax.texts, key=lambda text: text.get_position()[1])
    assert (low.get_text(), high.get_text()) == ("gpt-oss-20b", "qwen3-32b")  # as the lines lie


def test_names_of_lines_that_end_together_do_not_touch_and_stay_within():
    ax = figure.axes()
    for number in range(8):
        ax.plot([0, 1], [0, 1 - number / 1e6], label=f"line {number}")
    figure.labelled(ax, "t", "x", "y")
    figure.label_ends(ax)
    heights = sorted(text.get_position()[1] for text in ax.texts)
    gaps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
    assert len(heights) == 8 and min(gaps) > 0.04 and heights[-1] <= 1


def test_neighbours_of_one_colour_name_their_model_once():
    ax = figure.axes()
    for place, (name, colour) in enumerate(
        [("b, graph", "C1"), ("a, bound", "C0"), ("a, vllm", "C0"), ("c", "C0"), ("b, vllm", "C1")]
    ):
        ax.plot([0, 1], [0, place], color=colour, label=name)
    figure.labelled(ax, "t", "x", "y")
    figure.label_ends(ax)
    names = [text.get_text() for text in sorted(ax.texts, key=lambda x: x.get_position()[1])]
    assert [name.strip() for name in names] == ["b, graph", "bound", "a, vllm", "c", "b, vllm"]


def test_what_is_left_of_a_name_keeps_its_brackets():
    ax = figure.axes()
    for place, name in enumerate(("a (f32, vllm)", "a (f32, graph), 8 users")):
        ax.plot([0, 1], [0, place], color="C0", label=name)
    figure.labelled(ax, "t", "x", "y")
    figure.label_ends(ax)
    assert {text.get_text().strip() for text in ax.texts} == {"(vllm)", "a (f32, graph), 8 users"}


def test_a_figure_carries_its_points_as_csv():
    ax = figure.axes()
    ax.plot([128, 512], [1.5, 2], label="a, graph")
    ax.plot([128], [9.0], label="_one sample")
    figure.labelled(ax, "Speed of all", "context (tokens)", "tok/s")
    page = BeautifulSoup(figure.html(ax, []), "html.parser")
    link = page.select_one("figure#figure-speed-of-all a[download]")
    assert link["download"] == "figure-speed-of-all.csv"
    assert base64.b64decode(link["href"].partition(",")[2]).decode() == (
        'series,context (tokens),tok/s\n"a, graph",128,1.5\n"a, graph",512,2\n'
    )
    ax = figure.axes()
    ax.barh([0, 1], [3, 4], label="cache")
    ax.set_yticks([0, 1], ["m at 128", "m at 512"])
    figure.labelled(ax, "Ledger", "GB", "")
    assert figure.points(ax) == [
        {"series": "cache", "bar": "m at 128", "GB": 3.0},
        {"series": "cache", "bar": "m at 512", "GB": 4.0},
    ]


def test_a_bound_has_one_name_for_each_colour():
    ax = figure.axes()
    for stack in ("a", "b"):
        ax.plot([0, 1], [5, 5], ":", color="C0", label=f"m ({stack}), bound")
    figure.labelled(ax, "t", "x", "y")
    figure.label_ends(ax)
    assert [text.get_text() for text in ax.texts] == ["m, bound"]


def test_ticks_that_would_touch_lose_their_label():
    assert figure.apart([128, 512, 1024, 2048, 3968, 4096]) == [
        "128", "512", "1024", "2048", "", "4096",
    ]  # fmt: skip
    assert figure.apart([128]) == ["128"] and figure.apart([]) == []
