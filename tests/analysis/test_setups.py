"""Rows of several stacks in one folder, and rows that failed: nothing mixes, nothing breaks.

What a figure, table or sentence says of a stack must be what it says where only that stack was
measured, under a label that names the stack.
"""

from __future__ import annotations

import ast
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from lib import files
from lib.analysis import (
    ablations,
    across_models,
    bounds,
    efficiency,
    energy,
    experts,
    host_bound,
    latency,
    memory,
    predictions,
    setups,
    stacks,
)
from lib.records.record import Record, environment_record
from lib.report import document, provenance, sections
from lib.report.abstract import findings
from lib.show import figure
from lib.studies import claims, evidence, kv_contribution, study
from lib.studies.arxiv_2508_16700 import ladder, rankings, rules
from lib.studies.paper_tables import paper_tables
from lib.studies.study import load_published
from tests.samples import stacks as sample
from tests.samples.records import GPU, key, spread
from tests.samples.stacks import ENV, ERROR, MODELS, STACKS

FIGURES = {
    "throughput": latency.throughput,
    "ttft": latency.ttft,
    "token times": latency.token_times,
    "energy": energy.figures.figure,
    "efficiency": efficiency.figure,
    "bound": bounds.figure,
    "energy of prefill and tokens": energy.figures.parts,
    "blocks": energy.figures.blocks,
    "memory, paper": lambda rows: memory.figures.memory_parts(rows, "memory-paper"),
    "memory, generate": lambda rows: memory.figures.memory_parts(rows, "memory"),
    "ledger, paper": memory.figures.memory_ledger,
    "ledger, generate": lambda rows: memory.figures.memory_ledger(rows, kind="memory"),
    "ablation": lambda rows: ablations.figure([r for r in rows if r.kind == "ablation-decoding"],
                                            "decoding"),
}  # fmt: skip
TABLES = {
    "latency": latency.table,
    "memory": memory.tables.table,
    "energy": energy.tables.table,
    "decoding": lambda rows: ablations.table(rows, "decoding"),
    "experts": lambda rows: ablations.table(rows, "experts"),
    "ape": efficiency.table,
    "ape of experts": experts.experts_table,
    "crosswalk": latency.definitions_table,
    "hostbound": host_bound.table,
    "step kernels": host_bound.kernel_table,
    "ledger": memory.tables.parts,
    "predicted peaks": memory.tables.predicted,
    "contribution": kv_contribution.contribution,
    "predictions": predictions.table,
    "bound": bounds.utilisation,
    "prefill and tokens": energy.tables.parts,
    "uncertainty": energy.tables.uncertainty,
    "weights": energy.tables.weights,
    "peer": energy.tables.peer,
    "passes": energy.quantities.table,
    "instrument": energy.tables.instrument,
}  # fmt: skip
SENTENCES = {
    "latency": latency.conclusion,
    "aa": latency.aa,
    "memory": memory.ledger.conclusion,
    "energy": energy.conclusions.conclusion,
    "energy checks": energy.conclusions.checks,
    "energy again": energy.conclusions.again,
    "ablations": ablations.conclusion,
    "efficiency": lambda rows: efficiency.conclusion(rows, 2048),
    "stacks": stacks.conclusion,
    "models": across_models.models,
}
OTHERS = {
    "findings": lambda rows: findings(rows, load_published(), paper_tables(rows, load_published())),
    "findings without the paper": lambda rows: findings(rows, load_published(), []),
    "ladder": lambda rows: ladder.rungs(rows, study.load()),
    "rankings": lambda rows: rankings.rankings(rows, study.load()),
    "verdicts": lambda rows: claims.table(claims.ledger(rows, study.load())),
    "replication": lambda rows: figure.describe(rules.ladder_figure(rows)),
    "gates": stacks.gates,
    "energy gates": energy.tables.gates,
    "trace": experts.table,
    "generic tables": sections.generic_tables,
    "host or device": host_bound.table,
    "provenance": provenance.arm_errors,
    "caption": figure.caption,
}
CAUTIONS = ("- Warning", "- Random weights", "- Not measured")
ACROSS = ("- stack ", "- Decoding of ")  # lines about several groups of one stack, or all stacks


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def mixed() -> list[Record]:
    return sample.rows()


def alone(rows, stack):
    """What there would be if only this stack had been measured."""
    free = ("environment", "card", "trace")
    return [r for r in rows if r.kind in free or r.key["stack"] == stack]


def renamed(text, stack):
    """What is called after a model alone, called after the model and the stack."""
    for model in MODELS:
        text = re.sub(rf"{model}(?! on\b)", f"{model} ({stack})", text)
    return text


def drawn(ax):
    """Labelled lines and bars: label -> points, or values where the other axis lists arms."""
    series = {
        line.get_label(): (line.get_xydata() if ax.get_ylabel() else line.get_xdata())
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }
    series = {label: np.asarray(points).tolist() for label, points in series.items()}
    for place, tick in enumerate(ax.get_yticklabels() if ax.containers else ()):
        series[tick.get_text()] = [box[place].get_width() for box in ax.containers]
    return series


def labels(ax):
    lines = [line.get_label() for line in ax.get_lines()]
    ticks = [tick.get_text() for tick in ax.get_yticklabels()] if ax.containers else []
    return [name for name in (*lines, *ticks) if not name.startswith("_")]


# --- labels


def test_a_label_has_what_tells_a_group_from_the_others():
    rows = [ENV, Record("latency", key("a"), env_id=ENV.env_id)]

    def named(*more):
        return [g.label for g in setups.by_setup([*rows, *more], "latency")]

    assert named() == ["a"]
    assert named(Record("latency", key("a", stack="graph"), env_id=ENV.env_id)) == [
        "a (hf-eager)",
        "a (graph)",
    ]
    both = Record("latency", key("a", stack="graph", dtype="float32"), env_id=ENV.env_id)
    assert named(both) == ["a (bfloat16, hf-eager)", "a (float32, graph)"]
    # Another model's stack is said too, since a reader would compare the two; its experts are not.
    assert named(Record("latency", key("moe", stack="graph"), env_id=ENV.env_id)) == [
        "a (hf-eager)",
        "moe (graph)",
    ]
    assert named(
        *(
            Record("latency", key("moe", experts=e), env_id=ENV.env_id)
            for e in ("all_experts", "grouped_mm")
        )
    ) == ["a", "moe (experts grouped_mm)", "moe (experts all_experts)"]
    cpu = environment_record({"gpu": None})
    assert named(cpu, Record("latency", key("a"), env_id=cpu.env_id)) == [
        f"a ({GPU['gpu']})",
        "a (none (CPU))",
    ]
    checkpoint = Record("latency", key("b", weights="checkpoint"), env_id=ENV.env_id)
    assert named(checkpoint) == ["a (random weights)", "b (checkpoint weights)"]


def test_failed_rows_make_no_group_and_no_label():
    rows = [Record("latency", key("a")), Record("latency", key("a", stack="graph"), error="x")]
    assert [g.label for g in setups.by_setup(rows, "latency")] == ["a"]
    every = setups.by_setup(rows, "latency", failed=True)
    assert [g.label for g in every] == ["a (hf-eager)", "a (graph)"]


def test_one_stack_has_one_line_style_in_all_models():
    rows = [
        Record("latency", key(m, stack=s))
        for m, s in (
            ("a", "graph-compiled"),
            ("a", "hf-eager"),
            ("b", "graph"),
            ("b", "graph-compiled"),
        )
    ]
    places = {g.label: g.place for g in setups.by_setup(rows, "latency")}
    assert places == {
        "a (hf-eager)": 0,
        "a (graph-compiled)": 2,
        "b (graph)": 1,
        "b (graph-compiled)": 2,
    }


# --- figures


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_a_figure_shows_of_a_stack_what_was_measured_on_it(draw, mixed):
    ax = draw(mixed)
    series, names = drawn(ax), labels(ax)
    assert len(names) == len(set(names)) and series
    expected = {}
    for stack in STACKS:
        one = drawn(draw(alone(mixed, stack)))
        expected |= {renamed(label, stack): points for label, points in one.items()}
    assert series == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_a_folder_of_one_model_on_two_stacks(draw, model):
    """`make report STACK=graph` into the folder of the study."""
    ax = draw(sample.rows([model]))
    names = [label for label in labels(ax) if label != "not measured"]
    assert len(names) == len(set(names)) > 0
    for stack in STACKS:
        assert sum(f"({stack})" in label for label in names) == len(names) / 2


def test_stacks_of_a_model_keep_its_colour_and_differ_in_style(mixed):
    lines = {line.get_label(): line for line in latency.ttft(mixed).get_lines()}
    for model in MODELS:
        eager, graph = (lines[f"{model} ({stack})"] for stack in STACKS)
        assert eager.get_color() == graph.get_color() == figure.color(model)
        assert (eager.get_linestyle(), graph.get_linestyle()) == ("-", "--")


def test_values_of_both_stacks_by_hand(mixed):
    series = drawn(latency.throughput(mixed))
    # 64 tokens in 0.1 + 64 x 0.01 s; a quarter of that time on the captured step.
    assert series["gpt-oss-20b (hf-eager), output"][1] == [2048, pytest.approx(64 / 0.74)]
    assert series["gpt-oss-20b (graph), output"][1] == [2048, pytest.approx(4 * 64 / 0.74)]
    assert series["qwen3-32b (graph), decode only"][1] == [2048, pytest.approx(100)]
    peaks = drawn(memory.figures.memory_parts(mixed, "memory"))
    assert peaks["gpt-oss-20b (graph), 2048"] == pytest.approx([419.43, 524.288, 104.8576])


# --- tables


def plain(table):
    return table.frame()


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES.keys())
def test_a_table_has_of_a_stack_what_was_measured_on_it(make, mixed):
    whole = plain(make(mixed))
    for stack in STACKS:
        one = plain(make(alone(mixed, stack)))
        if "of" in one:
            one["of"] = [renamed(label, stack) for label in one["of"]]
            mine = whole[whole["of"].isin(one["of"])]
        else:
            mine = whole[whole["stack"] == stack].drop(columns="stack") if len(whole) else whole
        assert len(one) == len(mine)
        shared = [column for column in one.columns if column in whole.columns]
        pd.testing.assert_frame_equal(
            one[shared], mine.reset_index(drop=True)[shared], check_dtype=False
        )


NEEDLESS = {
    "ape of experts",
    "decoding",
    "predictions",
    "bound",
    "contribution",
    "prefill and tokens",
    "uncertainty",
    "weights",
    "peer",
    "instrument",
    "hostbound",
    "predicted peaks",
    "step kernels",
}


@pytest.mark.parametrize("name", sorted(TABLES.keys() - NEEDLESS))
def test_a_failed_row_is_a_dash_with_its_reason(name, mixed):
    table = plain(TABLES[name](mixed))
    last = table[table["context"] == 4096] if "context" in table else table[table["p50 (s)"].isna()]
    assert set(last["stack"]) == set(STACKS)
    for _, line in last.iterrows():
        assert ERROR in line["missing"]


def test_ape_is_of_one_stack(mixed):
    table = efficiency.table(mixed).frame().set_index(["model", "stack", "context", "parameters"])
    eager, graph = (table.loc["gpt-oss-20b", stack, 2048, "nominal"] for stack in STACKS)
    rate = 64 / 0.74 / 4  # for each of 4 billion
    assert eager["APE-TPOT (tok/s per 10^9)"] == pytest.approx(rate, rel=1e-3)
    assert graph["APE-TPOT (tok/s per 10^9)"] == pytest.approx(4 * rate, rel=1e-3)
    assert graph["APE-1/TTFT (1/s per 10^9)"] == pytest.approx(40 / 4)  # 0.1 s / 4
    assert graph["APE-energy (tok/J per 10^9)"] == pytest.approx(64 / 160 / 4)
    peak = (43_000 + 100) * 2**20 / 1e9
    assert graph["TPOT/GB (tok/s per GB)"] == pytest.approx(4 * 64 / 0.74 / peak, rel=1e-3)
    traced = table.loc["gpt-oss-20b", "hf-eager", 2048, "realised"]
    assert traced["active (10^9)"] == 16
    # The captured step decodes with other experts than were traced: no realised quotient of it.
    assert ("gpt-oss-20b", "graph", 2048, "realised") not in table.index
    assert ("qwen3-32b", "graph", 2048, "realised") in table.index


def test_only_a_cache_that_grows_has_memory_per_token(mixed):
    table = memory.tables.per_token(mixed).frame()
    assert table["model"].tolist() == [*MODELS] and "stack" not in table


# --- sentences


@pytest.mark.parametrize("say", SENTENCES.values(), ids=SENTENCES.keys())
def test_a_sentence_says_of_a_stack_what_was_measured_on_it(say, mixed):
    lines = say(mixed).split("\n")
    assert len(lines) == len(set(lines))
    if say in (across_models.models, stacks.conclusion):
        return  # they compare stacks, see below
    for stack in STACKS:
        own = say(alone(mixed, stack)).split("\n")
        own = [renamed(line, stack) for line in own if not line.startswith((*CAUTIONS, *ACROSS))]
        assert own and {*own} <= {*lines}
    one = say(sample.rows(MODELS[:1]))
    assert all(f"({stack})" in one or f" on {stack}" in one for stack in STACKS)


def test_models_are_compared_within_a_stack_and_then_stacks_within_a_model(mixed):
    lines = [
        line for line in across_models.models(mixed).split("\n") if not line.startswith(CAUTIONS)
    ]
    throughput = [line for line in lines if "output throughput of" in line]
    eager, graph = throughput
    assert eager.startswith(
        "- At 2048 tokens, output throughput of gpt-oss-20b (hf-eager): "
        "2.000 times that of qwen3-32b (hf-eager) ["
    )
    assert eager.endswith("], higher.")
    assert graph.startswith(
        "- At 2048 tokens, output throughput of gpt-oss-20b (graph): 4.000 "
        "times that of qwen3-32b (graph) ["
    )
    assert graph.endswith("], higher; on hf-eager 2.000 times: the order holds.")
    (change,) = [
        line for line in lines if line.startswith("- gpt-oss-20b (graph): output throughput")
    ]
    assert "output throughput at 2048 tokens 4.000 times that of hf-eager [" in change
    assert "; TTFT at 2048 tokens 0.25 times that of hf-eager [" in change
    assert "; J/1K tokens at 2048 tokens 0.25 times that of hf-eager [" in change
    assert f"- qwen3-32b (graph) at 4096 tokens: {ERROR}." in lines
    for line in lines:
        pairs = re.findall(r"\((hf-eager|graph)\)", line)
        assert len({*pairs}) <= 1, line


def call(model, seconds, **changes):
    return Record("latency", key(model, **changes), {"e2e_s": spread(seconds)}, env_id=ENV.env_id)


def test_a_stack_may_turn_the_order_round():
    rows = [
        ENV,
        call("a", 1.0),
        call("b", 2.0),
        call("a", 1.0, stack="graph"),
        call("b", 0.5, stack="graph"),
    ]
    lines = across_models.models(rows).split("\n")
    assert lines[1].endswith("], lower; on hf-eager 2.000 times: the order turns round.")
    rows[-1] = call("b", 1.0, stack="graph")
    assert across_models.models(rows).split("\n")[1].endswith(
        "no difference resolved from b (graph) (1.000 times [0.97, 1.031]); on hf-eager 2.000 "
        "times: resolved on one of the two stacks only."
    ) or "resolved on one" in across_models.models(rows)


def test_a_model_that_no_other_shares_a_setup_with_is_left_out_with_the_reason():
    rows = [ENV, call("a", 1.0), call("b", 2.0), call("c", 3.0, dtype="float32")]
    lines = across_models.models(rows).split("\n")
    assert lines[0].startswith("- At 2048 tokens, output throughput of a (bfloat16): 2.000 times")
    assert lines[1].startswith(
        "- Output throughput of c (float32): not compared; rows differ in dtype (bfloat16, float32)"
    )


def test_the_conclusion_on_stacks_names_each_and_its_factor(mixed):
    text = stacks.conclusion(mixed)
    assert "- gpt-oss-20b (hf-eager): decode at 2,048 tokens of context 100.0 tok/s" in text
    (graph,) = [x for x in text.split("\n") if x.startswith("- gpt-oss-20b (graph): decode at")]
    assert "400.0 tok/s" in graph and "4.000 times hf-eager" in graph
    assert f"- gpt-oss-20b (graph) at 4096 tokens: {ERROR}." in text


def test_weight_values_bound_the_uncertainty_of_their_own_stack(mixed):
    spreads = {
        g.label: energy.quantities.spread_beside(mixed, g) for g in setups.by_setup(mixed, "energy")
    }
    assert spreads["gpt-oss-20b (hf-eager)"] == pytest.approx(0.1)
    assert spreads["gpt-oss-20b (graph)"] == pytest.approx(0.3)


# --- the abstract


@pytest.mark.parametrize("paper", [True, False], ids=["the paper's models", "any models"])
def test_the_abstract_is_about_the_studys_stack_and_says_what_others_change(mixed, paper):
    published = load_published()
    sentences = findings(mixed, published, paper_tables(mixed, published) if paper else [])
    texts = {finding.lead: finding.text for finding in sentences}
    ours, other = ("GPT-OSS-20B", "Qwen3-32B") if paper else MODELS
    first = texts["Output throughput at 2,048 tokens of context and 64 new tokens"]
    assert f"{ours} 86.49 tok/s" in first and "2.000 times" in first
    graph = texts["Output throughput at 2,048 tokens of context and 64 new tokens, on graph"]
    assert f"{ours} 345.9 tok/s" in graph and f"{ours}: 4.000 times that of {other} [" in graph
    assert (
        f"Against hf-eager: {ours} 4.000 times [" in graph and f"; {other} 2.000 times [" in graph
    )
    per_1k = texts["Gross energy per 1,000 generated tokens, on graph"]
    assert f"{ours} 2,500 J" in per_1k and f"Against hf-eager: {ours} 0.25 times [" in per_1k


def test_the_abstract_names_on_another_stack_only_models_whose_energy_was_measured_there(mixed):
    rows = [
        r
        for r in mixed
        if not (r.kind == "energy" and r.key["model"] == MODELS[0] and r.key["stack"] == "graph")
    ]
    texts = {finding.lead: finding.text for finding in findings(rows, load_published(), [])}
    per_1k = texts["Gross energy per 1,000 generated tokens, on graph"]
    assert per_1k.startswith(MODELS[1]) and MODELS[0] not in per_1k
    assert f"Against hf-eager: {MODELS[1]} " in per_1k


def test_the_abstract_speaks_of_the_studys_stack_where_another_has_more_rows():
    rows = [ENV, *sample.one("qwen3-32b", "hf-eager", (2048,)), *sample.one("qwen3-32b", "graph")]
    abstract = findings(rows, load_published(), [])
    assert abstract[0].text.startswith("qwen3-32b 43.24 tok/s")  # 64 / 1.48, not twice that


def test_the_abstract_of_another_stack_alone_names_it():
    rows = sample.rows(stacks=["graph"])
    published = load_published()
    abstract = findings(rows, published, [])
    assert abstract[0].lead.endswith("64 new tokens, on graph")
    of_paper = findings(rows, published, paper_tables(rows, published))
    assert of_paper[0].text.startswith("Not measured on hf-eager")
    assert of_paper[1].lead.endswith(", on graph") and "345.9 tok/s" in of_paper[1].text


def test_the_abstract_of_a_stack_that_failed_gives_the_reason():
    rows = [ENV, *sample.one("qwen3-32b", "hf-eager"), *sample.failed("qwen3-32b", "graph")]
    texts = {f.lead: f.text for f in findings(rows, load_published(), [])}
    assert texts["On graph"] == f"Nothing was timed: qwen3-32b ({ERROR})."


# --- nothing breaks

EVERY = {
    **FIGURES,
    **{f"table {n}": f for n, f in TABLES.items()},
    **{f"said {n}": f for n, f in SENTENCES.items()},
    **OTHERS,
}


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_failed_break_nothing(name):
    """Nothing but failures; a stack that failed beside one that did not."""
    reader, good = EVERY[name], sample.rows(MODELS[:1], ["hf-eager"], fails=False)
    fails = [r for model in MODELS for stack in STACKS for r in sample.failed(model, stack)]
    reader([])
    reader([ENV, *fails])
    beside = reader([*good, *sample.failed(MODELS[0], "graph")])
    if name in FIGURES and name != "ablation":
        names = [label for label in labels(beside) if label != "not measured"]
        assert names and not any("graph" in label for label in names)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_reads_both_stacks(name, mixed):
    assert OTHERS[name](mixed) is not None


def test_a_stack_that_failed_everywhere_does_not_stand_for_the_device():
    rows = sample.rows(fails=False)
    rows += [r for m in MODELS for r in sample.failed(m, "graph-compiled")]
    assert evidence.gather(rows, study.load()).bound_stack == "graph"


# --- the report and the notebooks that read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sample.write(tmp_path_factory.mktemp("stacks"))


def test_the_report_of_both_stacks(folder, tmp_path):
    page = BeautifulSoup(document.write(folder, tmp_path).read_text("utf-8"), "html.parser")
    abstract = page.select_one(".abstract").get_text(" ")
    assert "on graph" in abstract and "Against hf-eager" in abstract
    alts = [drawn["aria-label"] for drawn in page.select("figure.picture svg")]
    bound = next(alt for alt in alts if alt.startswith("Decode throughput under its bound"))
    assert bound.count("(hf-eager)") == bound.count("(graph)") == 4
    assert ERROR in page.select_one("#arm-errors").get_text()
    assert ERROR in page.select_one("#grid-latency").get_text()


def executed(name, **parameters):
    """What each code cell of a notebook ends with; the last is the conclusion's text."""
    cells = nbformat.read(files.ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    space, results = {}, []
    for cell in (c for c in cells if c.cell_type == "code"):
        body = ast.parse(cell.source).body
        ends = isinstance(body[-1], ast.Expr)
        exec(compile(ast.Module(body[: len(body) - ends], []), name, "exec"), space)
        if ends:
            results.append(eval(compile(ast.Expression(body[-1].value), name, "eval"), space))
        if "parameters" in cell.metadata.get("tags", ()):
            assert parameters.keys() <= space.keys()
            space |= parameters
    return results


def test_the_summary_of_both_stacks(folder):
    text = executed("summary", results_dir=str(folder))[-1].data
    assert "output throughput of gpt-oss-20b (graph): 4.000 times that of qwen3-32b" in text
    assert (
        "gpt-oss-20b (graph): output throughput at 2048 tokens 4.000 times that of hf-eager" in text
    )


@pytest.mark.parametrize("stack, rate", [("hf-eager", "21.62"), ("graph", "86.49")])
def test_ape_of_each_stack(folder, stack, rate):
    """64 tokens in 0.74 s, or in a quarter of that, for each of 4 billion parameters."""
    parameters = {
        "model": "gpt-oss-20b",
        "stack": stack,
        "context": 2048,
        "results_dir": str(folder),
    }
    results = executed("ape", **parameters)
    assert f"billion active parameters: {rate} tok/s" in results[-1].data
    assert "hf-eager" not in results[-1].data.replace(stack, "")


def test_ape_of_a_stack_that_was_not_measured_stops(folder):
    parameters = {"model": "gpt-oss-20b", "stack": "hf-static", "results_dir": str(folder)}
    with pytest.raises(AssertionError, match="no rows of gpt-oss-20b with random weights on hf-st"):
        executed("ape", **parameters)
