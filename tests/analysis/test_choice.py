"""Which option serves so many users: a toy model on a card whose numbers a reader can check.

The toy's weights and reserve take 3.2 GB, a user of 2,000 tokens 1,050,000 bytes (see test_fit).
"""

import re
from dataclasses import replace

import pytest

from lib import stats
from lib.__main__ import RELEASED, main
from lib.analysis import choice, fit, planner, rows
from lib.analysis.capacity import score
from lib.analysis.choice import FAILS, MAY, MEETS, UNKNOWN, Ask, Cell, Option
from lib.analysis.routers import LEAD
from lib.analysis.rows import NO_GPU
from lib.files import ROOT, ParamsError
from lib.records.record import Record
from tests.analysis.batch.test_points import failed, line
from tests.analysis.test_fit import CARD, GB, RESERVE
from tests.samples import records as sample

SETUP = ("random", "bfloat16", "graph", "none", "G")
ROOM = (CARD.weight_bytes + RESERVE + 30 * 1_050_000) / GB  # for 30 users of 2,000 tokens


def number(value):
    return stats.missing("not measured") if value is None else stats.exact(value)


def cell(context, users, each, ttft_s=None, error=""):
    return Cell(context, users, number(ttft_s), number(each), number(None), error)


def option(*cells, model="toy", card=CARD, setup=SETUP, **more):
    return Option(model, setup, model, card, 80 * GB, cells, **more)


def guess(context, users, each, ttft_s=None):
    """A predicted cell: intervals from 20 % below to 25 % above."""

    def around(value):
        if value is None:
            return stats.missing("not predicted")
        return stats.Estimate(value, 0.8 * value, 1.25 * value, 1, "predicted", level=0.9)

    return Cell(context, users, around(ttft_s), around(each), number(None))


OTHER = (*SETUP[:-1], "Other")
GUESS = option(
    guess(2000, 1, 200.0, 0.05), guess(2000, 8, 100.0), model="toy", setup=OTHER, predicted=True
)


TOY = option(cell(2000, 1, 100.0, 0.1), cell(2000, 8, 50.0, 0.4), cell(512, 32, 20.0))


def one(ask, choices=(TOY,)):
    (offer,) = choice.offers(choices, ask)
    return offer


def test_it_stands_on_the_smallest_cell_that_is_as_hard_as_what_is_asked():
    offer = one(Ask(gpu_gb=ROOM, context=1500, users=5, gpu_hour_usd=3.6))
    assert (offer.verdict, offer.cell.users, offer.cell.context) == (MEETS, 8, 2000)
    assert offer.total == 5 * 50.0
    assert offer.usd_per_million == pytest.approx(4.0)  # 3.6 / 3600 / 250 x 10^6


def test_memory_says_how_many_have_room():
    assert one(Ask(gpu_gb=ROOM, context=2000, users=1)).room == 30
    offer = one(Ask(gpu_gb=ROOM, context=2000, users=31))
    assert (offer.verdict, offer.why) == (FAILS, "room for 30 users (31 asked)")
    offer = one(Ask(gpu_gb=2.0, context=2000, users=1))
    assert (offer.verdict, offer.why) == (FAILS, "weights are 1.2 GB too large")


@pytest.mark.parametrize("context", [1, 99, 100, 101, 2000, 10_000])
def test_the_line_of_the_page_is_the_room_of_a_card(context):
    ends = fit.line(CARD)["user_bytes"]
    (a, low), (b, high) = next(
        (x, y) for x, y in zip(ends, ends[1:], strict=False) if x[0] <= context <= y[0]
    )
    assert low + (high - low) * (context - a) / (b - a) == CARD.kv_bytes(context, cache="static")


@pytest.mark.parametrize(
    ("asked", "verdict", "why"),
    [
        ({"context": 10_001}, FAILS, "10,001 tokens > 10,000 of the model"),
        ({"users": 8, "ttft_ms": 399}, FAILS, "TTFT 400.0 ms > 399"),
        ({"users": 8, "ttft_ms": 400}, MEETS, ""),
        ({"users": 8, "itl_ms": 19.9}, FAILS, "a token takes 20.00 ms > 19.9"),
        ({"users": 8, "itl_ms": 20}, MEETS, ""),
        (
            {"users": 9},
            UNKNOWN,
            "measured up to 32 users of 512 tokens and 8 users of 2,000 tokens",
        ),
        ({"users": 9, "context": 512, "ttft_ms": 9}, UNKNOWN, "TTFT at 32 users is not measured"),
        # What a harder place says is no failure of an easier one, and the other way round it is.
        ({"users": 2, "ttft_ms": 150}, UNKNOWN, "TTFT 400.0 ms > 150 at more than was asked"),
        ({"users": 2, "ttft_ms": 99}, FAILS, "TTFT 100.0 ms > 99 at 1 user of 2,000 tokens"),
        ({"users": 9, "ttft_ms": 99}, FAILS, "TTFT 400.0 ms > 99 at 8 users of 2,000 tokens"),
        (
            {"users": 2, "ttft_ms": 150, "itl_ms": 9},
            FAILS,
            "a token takes 10.00 ms > 9 at 1 user of 2,000 tokens",
        ),
    ],
)
def test_the_limit_that_fails_is_named(asked, verdict, why):
    offer = one(Ask(**({"gpu_gb": 80, "context": 2000, "users": 1} | asked)))
    assert (offer.verdict, offer.why) == (verdict, why)


def test_a_failed_batch_is_cited():
    choices = [option(cell(512, 1, 9.0), cell(512, 64, None, error="OutOfMemoryError"))]
    offer = one(Ask(gpu_gb=80, context=512, users=64), choices)
    why = "failed at 64 users of 512 tokens: OutOfMemoryError"
    assert (offer.verdict, offer.why) == (UNKNOWN, why)


def test_without_a_card_room_is_unknown_and_decides_nothing():
    offer = one(Ask(gpu_gb=0.1, context=2000), [option(cell(2000, 1, 9.0), card=None)])
    assert (offer.room, offer.verdict) == (None, MEETS)


def test_what_meets_comes_first_and_faster_before_slower():
    slow, fast = (option(cell(2000, 1, rate, 0.2), model=str(rate)) for rate in (1.0, 2.0))
    late = option(cell(2000, 1, 9.0, 0.9), model="late")
    ask = Ask(gpu_gb=80, context=2000, ttft_ms=500)
    names = [o.option.model for o in choice.offers([late, slow, fast], ask)]
    assert names == ["2.0", "1.0", "late"]
    text = planner.text(choice.offers([late, slow, fast], ask), ask)
    assert text.index("2.0 on") < text.index("1.0 on") < text.index("late on")
    assert "TTFT 900.0 ms > 500" in text


def test_a_prediction_counts_by_its_low_end():
    """90 [72, 112.5] for each is more than 80 measured, but not surely; than 70 it is."""
    ask = Ask(gpu_gb=80, context=2000, gpu="G")
    likely = option(guess(2000, 1, 90.0, 0.05), model="likely", predicted=True)
    for rate, first in ((80.0, "sure"), (70.0, "likely")):
        sure = option(cell(2000, 1, rate, 0.1), model="sure")
        assert choice.offers([likely, sure], ask)[0].option.model == first


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "2.0 on graph, bfloat16 serves most for 1 user of 2,000 tokens: 2.000 tok/s"),
        ({}, "tok/s. 2 of 2 options meet the limits."),
        ({"itl_ms": 600}, "1 of 2 options meets the limits."),
        ({"users": 2}, "None of 2 options is known to serve 2 users of 2,000 tokens: 0 fail, 2 "),
        ({"users": 2}, "or name a card (GPU), and what was not measured is predicted."),
        ({"users": 2}, "Ask for 1 user of 2,000 tokens; or name a card"),
        ({"context": 3000}, "Ask for 1 user of 2,000 tokens; or name a card"),
        ({"itl_ms": 9}, "2 fail, 0 lack a measurement. Ask for other numbers, or wider limits: "),
        ({"itl_ms": 9}, "or wider limits: 2.0 on graph, bfloat16 has a token takes 500.0 ms."),
        ({"gpu": "None such"}, "Nothing is known of 1 user of 2,000 tokens on None such."),
    ],
)
def test_the_answer_starts_with_a_sentence_that_answers(asked, told):
    slow, fast = (option(cell(2000, 1, rate, 0.2), model=str(rate)) for rate in (1.0, 2.0))
    ask = Ask(**({"gpu_gb": 80, "context": 2000} | asked))
    text = planner.text(choice.offers([slow, fast], ask), ask)
    assert told in " ".join(text.split())


def test_a_prediction_is_no_second_answer_beside_a_measured_one():
    guess = replace(GUESS, model=TOY.model, setup=TOY.setup)
    ask = Ask(gpu_gb=80, context=2000, gpu="G")
    assert [o.option for o in choice.offers([TOY, guess], ask)] == [TOY]
    beyond = choice.offers([replace(TOY, cells=()), guess], ask)  # nothing was measured there
    assert [o.option.predicted for o in beyond] == [True]
    assert "tok/s, predicted." in " ".join(planner.text(beyond, ask).split())


@pytest.mark.parametrize(
    ("asked", "predicted", "verdict", "why"),
    [
        ({"context": 2000, "users": 4}, False, MEETS, ""),
        # Nothing so hard was measured: the prediction answers, and says where measuring ended.
        ({"context": 3000}, True, MEETS, "measured up to 32 users of 512 tokens and 8 users of"),
        ({"context": 3000, "ttft_ms": 200}, True, MAY, "TTFT 160.0 to 250.0 ms, 200 asked; meas"),
        ({"context": 3000, "ttft_ms": 150}, True, FAILS, "TTFT 200.0 ms > 150; measured up to 32"),
        # Known to fail, by a place that is no harder: no prediction says otherwise.
        ({"context": 3000, "ttft_ms": 99}, False, FAILS, "TTFT 100.0 ms > 99 at 1 user of 2,000"),
        ({"context": 3000, "gpu_gb": 2.0}, False, FAILS, "weights are 1.2 GB too large"),
        # Neither knows.
        ({"context": 5000}, False, UNKNOWN, "measured up to 32 users of 512 tokens and 8 users"),
    ],
)
def test_what_was_measured_and_is_predicted_too_is_one_line(asked, predicted, verdict, why):
    """Whatever is asked of a card, one model on one engine has one line."""
    same = option(guess(3000, 1, 200.0, 0.2), setup=TOY.setup, predicted=True)
    ask = Ask(**{"gpu_gb": 80, "gpu": "G"} | asked)
    for choices in ([TOY, same], [same, TOY]):
        offer = one(ask, choices)
        assert (offer.option.predicted, offer.verdict) == (predicted, verdict)
        assert offer.why.startswith(why) and bool(offer.why) is bool(why)


def test_what_failed_is_not_predicted_to_serve():
    """The prediction knows nothing of the failure; of a withheld time it may speak."""
    broke = option(cell(512, 1, 9.0), cell(2000, 1, None, error="OutOfMemoryError"))
    same = option(guess(2000, 1, 200.0, 0.05), setup=TOY.setup, predicted=True)
    offer = one(Ask(80, 2000, gpu="G"), [broke, same])
    assert (offer.option.predicted, offer.verdict) == (False, UNKNOWN)
    assert offer.why == "failed at 1 user of 2,000 tokens: OutOfMemoryError"
    lead = option(cell(512, 1, 9.0), cell(2000, 1, None, error=LEAD))
    offer = one(Ask(80, 2000, gpu="G"), [lead, same])
    assert (offer.option.predicted, offer.verdict) == (True, MEETS)
    assert offer.why == f"1 user of 2,000 tokens: {LEAD}"


def test_what_to_ask_for_instead_is_sought_in_every_option_of_the_card():
    """Nobody answers 9 users of 3,000 tokens: the prediction has no line, and a place to offer."""
    same = option(guess(3000, 4, 200.0, 0.05), setup=TOY.setup, predicted=True)
    ask, choices = Ask(80, 3000, users=9, gpu="G"), [TOY, same]
    told = planner.lead(choice.offers(choices, ask), ask, choices)
    assert told.endswith("Ask for 9 users of 512 tokens or 4 users of 3,000 tokens.")
    assert told in " ".join(planner.text(choice.offers(choices, ask), ask, choices).split())


def test_one_user_is_no_users():
    choices = [option(cell(512, 1, None, error="OutOfMemoryError"))]
    assert one(Ask(gpu_gb=80, context=512), choices).why.startswith("failed at 1 user of")


@pytest.mark.parametrize("name", ["gpu_gb", "context", "users", "ttft_ms", "gpu_hour_usd"])
@pytest.mark.parametrize("bad", [0, -1, float("inf"), float("nan")])
def test_an_impossible_ask_is_refused_by_name(name, bad):
    with pytest.raises(ParamsError, match=f"{name.upper()} is .*above 0"):
        Ask(**({"gpu_gb": 80, "context": 2000} | {name: bad}))


@pytest.mark.parametrize(
    ("asked", "verdict", "why"),
    [
        ({}, MEETS, ""),
        ({"ttft_ms": 63}, MEETS, ""),  # 40 to 62.5 ms
        ({"ttft_ms": 50}, MAY, "TTFT 40.00 to 62.50 ms, 50 asked"),
        ({"ttft_ms": 39}, FAILS, "TTFT 50.00 ms > 39"),
        ({"itl_ms": 6.25}, MEETS, ""),  # 4 to 6.25 ms
        ({"itl_ms": 5}, MAY, "a token takes 4.000 to 6.250 ms, 5 asked"),
        ({"itl_ms": 3.9}, FAILS, "a token takes 5.000 ms > 3.9"),
        ({"ttft_ms": 50, "itl_ms": 3.9}, FAILS, "a token takes 5.000 ms > 3.9"),
        ({"users": 8, "ttft_ms": 50}, UNKNOWN, "TTFT at 8 users is not predicted"),
        ({"users": 4, "itl_ms": 7}, UNKNOWN, "a token takes 10.00 ms > 7 at more than was asked"),
        ({"users": 9, "itl_ms": 7}, FAILS, "a token takes 10.00 ms > 7 at 8 users of 2,000 tokens"),
        ({"users": 9}, UNKNOWN, "predicted up to 8 users of 2,000 tokens"),
    ],
)
def test_a_predicted_interval_decides_only_where_all_of_it_does(asked, verdict, why):
    offer = one(Ask(**({"gpu_gb": 80, "context": 2000, "gpu": "Other"} | asked)), [GUESS])
    assert (offer.verdict, offer.why) == (verdict, why)


def test_predictions_answer_only_an_ask_that_names_their_card():
    ask = Ask(gpu_gb=80, context=2000)
    assert [o.option for o in choice.offers([TOY, GUESS], ask)] == [TOY]
    assert [o.option for o in choice.offers([TOY, GUESS], replace(ask, gpu="Other"))] == [GUESS]
    assert [o.option for o in choice.offers([TOY, GUESS], replace(ask, gpu="G"))] == [TOY]
    other = replace(ask, gpu="Other")
    text = planner.text(choice.offers([TOY, GUESS], other), other)
    assert "predicted at 1 user of 2,000 tokens: 160.0 to 250.0" in " ".join(text.split())
    assert "Predicted: not measured" in text
    assert "redicted" not in planner.text(choice.offers([TOY, GUESS], ask), ask)


def test_options_are_read_from_rows():
    rows = [*line({1: 100.0, 2: 190.0}), failed(4)]
    (read,) = choice.options(rows)
    assert [(c.context, c.users) for c in read.cells] == [(512, 1), (512, 2), (512, 4)]
    assert [round(c.total.value) for c in read.measured] == [100, 190]
    assert read.measured[1].token_j.value == pytest.approx(400 / 190, rel=1e-3)
    assert read.cells[2].error == "OutOfMemoryError: CUDA"
    assert read.engine == "hf-eager, bfloat16"


def test_what_was_measured_and_does_not_count_has_a_line_with_its_reason():
    """A batch of an engine whose logits were not checked, and times that a check withholds."""
    engine = {"stack": "vllm", "engine": "abc"}
    rows = line({1: 100.0, 8: 700.0}, **engine)
    checked = Record("gate", rows[1].key | {"new_tokens": 4}, samples={"relative_error": [0.01]})
    (read,) = choice.options([*rows, checked])
    assert [(c.users, c.error) for c in read.cells] == [(1, ""), (8, LEAD)]
    offer = one(Ask(80, 512, users=8), [read])
    assert (offer.verdict, offer.why) == (UNKNOWN, f"8 users of 512 tokens: {LEAD}")
    wrong = replace(checked, samples={"relative_error": [0.5]})
    (read,) = choice.options([*line({1: 100.0}, "graph"), replace(wrong, key=wrong.key | {
        "stack": "graph", "engine": None})])  # fmt: skip
    why = one(Ask(80, 512), [read]).why
    assert why.startswith("1 user of 512 tokens: times withheld: ") and "failed" not in why


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"ttft_ms": 99}, "late on graph, bfloat16 has TTFT 100.0 ms."),
        ({"ttft_ms": 99, "itl_ms": 9.9}, "toy on graph, bfloat16 has TTFT 110.0 ms and a token"),
        ({"ttft_ms": 99, "users": 31}, "wider limits: late on graph, bfloat16 has TTFT 100.0 ms."),
        ({"ttft_ms": 99, "context": 10_001}, "Ask for 1 user of 2,000 tokens with wider limits;"),
    ],
)
def test_where_no_limit_is_met_the_nearest_is_named(asked, told):
    """100 ms and 50 ms a token miss 99 and 9.9 by more than 110 ms and 10 ms do. What has no room
    is no help."""
    late = option(cell(2000, 1, 20.0, 0.1), cell(2000, 31, 20.0, 0.1), model="late", card=None)
    mine = option(cell(2000, 1, 100.0, 0.11), cell(2000, 31, 100.0, 0.099))
    if asked.get("context"):
        late = replace(late, cells=())
    ask = Ask(**({"gpu_gb": ROOM, "context": 2000} | asked))
    assert told in planner.lead(choice.offers([late, mine], ask), ask)


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ({"gpu_gb": 2.0}, "more memory (GPU_GB)."),  # weights and reserve alone take 3.2 GB
        ({"gpu_gb": 2.0, "gpu": "G"}, "other numbers."),  # a card is as large as it is
        ({"context": 3000}, "1 user of 2,000 tokens; or"),
        ({"context": 3000, "users": 9}, "9 users of 512 tokens; or"),
        ({"context": 3000, "users": 33}, "32 users of 512 tokens; or"),
        ({"users": 9}, "9 users of 512 tokens or 8 users of 2,000 tokens; or"),
        ({"users": 9, "itl_ms": 19.9}, "1 user of 2,000 tokens, or wider limits"),
        ({"users": 31, "gpu_gb": ROOM}, "31 users of 512 tokens or 8 users of 2,000 tokens."),
    ],
)
def test_what_to_ask_for_instead_is_then_served(asked, remedy):
    """The toy's times are 100 and 400 ms, then 10 and 20 ms a token."""
    ask = Ask(**({"gpu_gb": 80, "context": 2000} | asked))
    told = planner.lead(choice.offers([TOY], ask), ask)
    assert f"Ask for {remedy}" in told
    for users, context in re.findall(r"(\d+) users? of ([\d,]+) tokens", told.partition("Ask")[2]):
        nearer = replace(ask, users=int(users), context=int(context.replace(",", "")))
        assert one(nearer).verdict == MEETS


def test_options_of_several_gpus_name_how_many_they_need():
    pair = replace(TOY, setup=(*SETUP[:-1], "2 x G"), devices=2)
    ask = Ask(gpu_gb=80, context=2000)
    told = planner.lead(choice.offers([pair], ask), ask)
    assert told.endswith("1 fail, 0 lack a measurement. Ask for 2 GPUs (DEVICES).")
    enough = replace(ask, devices=2)
    assert [o.verdict for o in choice.offers([pair], enough)] == [MEETS]


def test_a_cpu_is_called_one():
    cpu = option(cell(2000, 1, 9.0), setup=(*SETUP[:-1], NO_GPU))
    ask = Ask(gpu_gb=80, context=2000)
    assert "Speeds are of a CPU; " in planner.text(choice.offers([cpu], ask), ask)


def test_calls_of_one_user_have_their_ttft_and_card():
    env_id = sample.environment_record(sample.GPU).env_id
    rows = [sample.card("gpt-oss-20b", env_id), *sample.latency("gpt-oss-20b", env_id, (2048,))]
    (read,) = choice.options(rows)
    (only,) = read.cells
    assert only.ttft_s.value == pytest.approx(0.11)
    assert only.per_user.value == pytest.approx(100)


def test_every_expert_computed_is_another_option():
    every = replace(TOY, setup=("random", "bfloat16", "hf-eager", "all_experts", "G"))
    assert every.engine == "hf-eager, bfloat16, every expert"


def test_the_command_prints_the_answer(tmp_path, capsys):
    root = sample.write_paper(tmp_path / "set")
    arguments = ["plan", str(root), "--gpu-gb", "80", "--context", "2048", "--ttft-ms", "150"]
    assert main([*arguments, "--gpu-hour-usd", "3.6"]) == 0
    text = capsys.readouterr().out
    assert "meets" in text and "TTFT 110.0 ms" in text and "10.00 USD" in text
    assert "ms > 150" in text
    assert main(["plan", str(root)]) == 2
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--users", "0"])
    assert refused.value.code == 2
    assert main(["plan", str(tmp_path / "none"), "--gpu-gb", "80"]) == 2


def test_a_named_card_is_answered_from_every_released_set(tmp_path, capsys, monkeypatch):
    """Without a card, from the set of the H100 alone: rows of two cards are no one answer."""
    folders = [sample.write_paper(tmp_path / name) for name in ("a", "b")]
    read = []
    monkeypatch.setattr(score, "released", lambda: folders)
    monkeypatch.setattr(rows, "load", lambda folder: read.append(folder) or [])
    assert main(["plan", "--gpu", "H200"]) == 0 and read == folders
    assert main(["plan", "--gpu-gb", "80"]) == 0 and read[2:] == [ROOT / RELEASED]
    assert main(["plan", str(folders[1]), "--gpu", "H200"]) == 0 and read[3:] == folders[1:]
    capsys.readouterr()


def test_without_the_released_sets_a_folder_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "RELEASED", tmp_path / "none")
    monkeypatch.setattr("lib.__main__.RELEASED", str(tmp_path / "none"))
    for arguments in (["--gpu", "H200"], ["--gpu-gb", "80"]):
        assert main(["plan", *arguments]) == 2
        assert "FROM takes a folder of run.json files" in capsys.readouterr().err


def test_a_card_that_was_measured_has_the_memory_of_its_board(tmp_path, capsys, monkeypatch):
    """As the page has it, and not what the datasheet rounds it to: here 30 users have room."""
    name = sample.GPU["gpu"]
    setup = (*SETUP[:-1], name)
    board = replace(option(cell(2000, 1, 9.0), setup=setup), gpu_bytes=round(ROOM * GB))
    monkeypatch.setattr(choice, "options", lambda rows: [board])
    root = sample.write_paper(tmp_path / "set")
    assert main(["plan", str(root), "--gpu", name, "--context", "2000"]) == 0
    assert "room for 30 users" in capsys.readouterr().out
