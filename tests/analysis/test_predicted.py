"""What the planner predicts is what the files hold, cell by cell."""

from __future__ import annotations

import pytest

from lib import stats
from lib.__main__ import main
from lib.analysis import choice, planner
from lib.analysis.capacity import predicted, registry, score, scored
from lib.files import ROOT, ParamsError
from lib.hardware.datasheets import datasheets
from tests.analysis.test_choice import cell, option

FILE = score.question().file
CELLS = registry.sealed(FILE)["cells"]


def test_without_registered_files_nothing_is_predicted_and_scoring_says_why(monkeypatch, tmp_path):
    """Whoever deletes outputs/ has reports and plans all the same."""
    monkeypatch.setattr(registry, "newest", lambda root=tmp_path: None)
    assert predicted.options() == [] and scored.section([], [], tmp_path) == ""
    with pytest.raises(ParamsError, match="holds no registered predictions.*git checkout"):
        score.question()


def numbers(estimate, factor=1.0):
    ends = (estimate.value, estimate.low, estimate.high)
    return None if None in ends else tuple(factor * x for x in ends)


def planned():
    return {
        (o.of("gpu"), o.model, o.of("dtype"), o.of("stack"), c.context, c.users): c
        for o in predicted.options()
        for c in o.measured
    }


def test_every_registered_cell_is_the_planner_s_and_no_other():
    wanted: dict[tuple, dict[str, tuple]] = {}
    for line in CELLS:
        if "value" in line:
            place = tuple(line[name] for name in score.PLACE)
            ends = tuple(line[name] for name in ("value", "low", "high"))
            wanted.setdefault(place, {})[line["metric"]] = ends
    wanted = {place: told for place, told in wanted.items() if score.DECODE in told}
    registered = {line["gpu"] for line in CELLS}
    mine = {place: c for place, c in planned().items() if place[0] in registered}
    assert mine.keys() == wanted.keys() and len(mine) == 204
    for place, told in wanted.items():
        users = place[-1]
        assert numbers(mine[place].per_user, users) == pytest.approx(told[score.DECODE])
        assert numbers(mine[place].ttft_s) == told.get(score.TTFT)
        joules = numbers(mine[place].token_j, 1e3)
        assert joules == (pytest.approx(told[score.DECODE_J]) if score.DECODE_J in told else None)
        assert mine[place].per_user.level == 0.9


def test_other_cards_are_those_of_the_list_with_the_numbers_of_their_file():
    lines = registry.other_cards(FILE)["cells"]
    registered = {line["gpu"] for line in CELLS}
    mine = {place: c for place, c in planned().items() if place[0] not in registered}
    at = {tuple(line[:6]): line[6] for line in lines}
    eager = {place: at.get((*place[:3], "hf-eager", *place[4:])) for place in at}
    impossible = {
        place for place, ends in at.items()
        if place[3] in ("graph", "graph-compiled") and eager[place] and ends[2] < eager[place][1]
    }  # fmt: skip
    assert ("NVIDIA L4", "Llama-3.1-8B", "bfloat16", "graph", 2048, 1) in impossible
    assert len(impossible) == 7 and mine.keys() == at.keys() - impossible
    for *place, decode, first in lines:
        if tuple(place) in impossible:
            continue
        told = mine[tuple(place)]
        assert numbers(told.per_user, place[-1]) == pytest.approx(tuple(decode))
        assert numbers(told.ttft_s) == (None if first is None else tuple(first))
    assert {place[0] for place in planned()} == set(datasheets())


def test_what_was_registered_without_a_number_says_why():
    """A place that the card does not hold, a law that is missing: each has its reason."""
    unsaid = {
        (o.of("gpu"), o.model, o.of("dtype"), o.of("stack"), c.context, c.users): c.error
        for o in predicted.options()
        for c in o.cells
        if c.error
    }
    for line in CELLS:
        if line["metric"] == score.DECODE and "value" not in line:
            place = tuple(line[name] for name in score.PLACE)
            assert unsaid.pop(place) == f"not predicted: {line['missing']}"
    assert set(unsaid.values()) == {f"not predicted: {predicted.BEYOND}"} and len(unsaid) == 7


def test_what_the_registration_flagged_is_said(capsys):
    """256 users at once: no row had so many, and its peak is near what the card holds."""
    ask = ["plan", "--gpu", "H100", "--context", "512", "--users", "256"]
    assert main(ask) == 0
    told = " ".join(capsys.readouterr().out.split())
    flags = f"tok/s each at 90%, {predicted.FAR}, {predicted.NEAR}"
    assert told.count(flags) == 2  # gpt-oss-20b on the two captured stacks
    within = {c.note for c in planned().values() if (c.context, c.users) == (512, 8)}
    assert within == {""}


def test_what_has_no_line_for_a_card_is_named():
    """Llama-3.1-8B was registered for the H100 alone, and so was MXFP4; no row of fp8 was there."""
    text = planner.left_out(predicted.options(), "NVIDIA H200")
    assert text == (
        "Not predicted for NVIDIA H200: Llama-3.1-8B in bfloat16, gpt-oss-20b in mxfp4, "
        "gpt-oss-120b in mxfp4 (no cell was predicted for this card); any model in fp8 (no law)."
    )
    setup = ("random", "fp8", "vllm", "none", "G")
    mine = [option(cell(512, 2, 30.0), model="Qwen3-32B", setup=setup)]
    told = planner.left_out([*mine, *predicted.options(mine)], "NVIDIA L4")
    assert told == "Not predicted for NVIDIA L4: Qwen3-32B in fp8, any model in fp8 (no law)."
    assert planner.left_out([*mine, *predicted.options(mine)], "") == ""
    assert planner.left_out(mine, "G") == ""


def test_the_command_names_what_it_leaves_out(capsys):
    assert main(["plan", "--gpu", "H200", "--context", "512"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Not predicted for NVIDIA H200: " in told
    for name in ("Llama-3.1-8B in bfloat16", "gpt-oss-120b on graph mxfp4", "gpt-oss-20b in mxfp4"):
        assert name in told
    assert "gpt-oss-20b on hf-static bfloat16" in told  # measured on the H100 alone


def test_what_was_measured_is_not_predicted_beside_it():
    setup = ("random", "bfloat16", "graph", "none", "NVIDIA H200")
    measured = option(cell(512, 2, 30.0), model="Qwen3-32B", setup=setup)
    (left,) = (
        o for o in predicted.options([measured])
        if o.setup == setup and o.model == "Qwen3-32B"
    )  # fmt: skip
    assert (512, 2) not in {(c.context, c.users) for c in left.cells}
    assert (512, 4) in {(c.context, c.users) for c in left.cells}


def test_one_of_several_engines_stands_in_place_of_a_prediction():
    """An engine for long contexts and one for short ones: each is vLLM, told apart by its name."""
    setup = ("random", "bfloat16", "vllm abc123", "none", "NVIDIA H200")
    mine = option(cell(2048, 1, 30.0), model="Qwen3-32B", setup=setup)
    assert (mine.engine, mine.on) == ("vllm, bfloat16", "vllm, bfloat16, abc123")
    choices = [mine, *predicted.options([mine])]
    offers = choice.offers(choices, choice.Ask(141, 2048, gpu="NVIDIA H200"))
    of_vllm = [o for o in offers if (o.option.model, o.option.stack) == ("Qwen3-32B", "vllm")]
    assert [o.option.predicted for o in of_vllm] == [False]


def test_rows_of_other_models_get_no_predictions():
    assert predicted.options([option(cell(512, 2, 30.0), model="toy")]) == []


def test_a_model_that_does_not_fit_a_card_says_so():
    ask = choice.Ask(24, 2048, gpu="NVIDIA L4")
    offers = choice.offers(predicted.options(), ask)
    whys = {o.why for o in offers if (o.option.model, o.verdict) == ("Qwen3-32B", choice.FAILS)}
    # 65.52 GB, 5 % and 1.1 GB of reserve, less 24
    assert whys == {"weights are 45.9 GB too large"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H200", "NVIDIA H200"),
        ("nvidia l4", "NVIDIA L4"),
        ("Mine", "mine"),
        ("NVIDIA H200", None),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("b200", "NVIDIA B200"),
        ("rtx 4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_a_card_is_named_with_or_without_its_maker(text, name):
    assert predicted.card_named(text, ["mine"]) == (name or text)


def test_an_unknown_card_is_refused_by_name():
    with pytest.raises(ParamsError, match="unknown GPU 'H300'.*NVIDIA H200"):
        predicted.card_named("H300")
    with pytest.raises(ParamsError, match="'h100' may be NVIDIA H100 80GB HBM3 or .*give one"):
        predicted.card_named("h100")


@pytest.mark.parametrize("text", ["2 x NVIDIA H100 80GB HBM3", "2x NVIDIA H100 80GB HBM3"])
def test_several_of_a_card_are_asked_for_by_their_number(text):
    told = 'name one card, and how many: GPU="NVIDIA H100 80GB HBM3" DEVICES=2'
    with pytest.raises(ParamsError, match=told):
        predicted.card_named(text)


def test_of_several_cards_the_measured_one_is_meant():
    measured = "NVIDIA H100 80GB HBM3"
    assert predicted.card_named("H100", [measured]) == measured
    with pytest.raises(ParamsError, match="SXM4-80GB or NVIDIA A100 80GB PCIe; give one of these"):
        predicted.card_named("A100 80GB", [measured])


def test_the_command_predicts_a_card_with_its_memory(capsys):
    source = str(ROOT / "outputs/released/h100-sxm")
    assert main(["plan", source, "--gpu", "H200", "--context", "512", "--users", "8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    line = next(
        x for x in CELLS
        if x.items() >= {"gpu": "NVIDIA H200", "model": "gpt-oss-20b", "stack": "graph",
                         "context": 512, "batch": 8, "metric": score.DECODE}.items()
    )  # fmt: skip
    assert scored.sentence(scored.read()["cells"]) in text  # how such predictions did
    ends = " to ".join(choice.short(line[end] / 8) for end in ("low", "high"))
    assert f"predicted at 8 users of 512 tokens: {ends} tok/s each at 90%" in text
    assert "Speeds are of NVIDIA H200" in text and "not measured; 90 % intervals" in text


def test_a_predicted_number_is_never_exact():
    for option_ in predicted.options():
        for one in option_.measured:
            assert one.per_user.low < one.per_user.value < one.per_user.high
            assert one.per_user.method == "predicted" != stats.exact(1.0).method
