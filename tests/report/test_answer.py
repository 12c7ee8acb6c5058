"""The first screen: its sentence, its card, its planner, as text and in a browser."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from urllib.parse import urlencode

import pytest
from bs4 import BeautifulSoup

from lib.analysis import choice, fit, planner
from lib.analysis.reserved import Reserved
from lib.analysis.routers import LEAD
from lib.records.record import Record, environment_record
from lib.report import answer, document
from tests.analysis.batch.test_points import line
from tests.analysis.test_choice import GUESS, TOY, cell, guess, option
from tests.analysis.test_fit import CARD
from tests.browser import Page
from tests.samples import records as sample

ROOT = Path(__file__).resolve().parents[2]
WORDS = 250
SLOW = option(cell(2000, 1, 10.0, 0.9), cell(4000, 2, 5.0, 1.5), model="slow")
BARE = option(cell(2000, 1, 7.0), cell(2000, 16, None, error="OutOfMemoryError"), card=None)


def rows(model, stack, rates, watts):
    gpu = environment_record({"gpu": "G", "gpu_total_bytes": 80 * 10**9, "gpu_uuid": "GPU-1"})
    mine = [r for r in line(rates, stack, model, watts) if r.kind in ("batch", "batch-energy")]
    card = Record("card", {"model": model, "dtype": "bfloat16"}, values=CARD.as_dict())
    return [gpu, card, *(replace(r, env_id=gpu.env_id) for r in mine)]


FAST = rows("fast", "graph", {1: 100.0, 8: 400.0}, 400.0)
LATE = rows("late", "graph", {1: 50.0, 8: 100.0}, 400.0)
PLAIN = rows("fast", "hf-eager", {1: 20.0}, 400.0) + rows("late", "hf-eager", {1: 16.0}, 400.0)


@pytest.fixture(scope="module")
def told():
    return answer.answer([*FAST, *LATE, *PLAIN])


def column(table, title):
    at = [c.title for c in table.columns].index(title)
    return [row[at] for row in table.rows]


def test_the_first_sentence_names_the_model_and_the_distance_to_the_next(told):
    # 400 of all against 100; 400 W / 400 tok/s against 400 W / 100 tok/s
    assert told.lead == (
        "fast serves most on one G: 400.0 tokens a second for 8 users, 4 times "
        "what late reaches, with 25% of its energy for a token."
    )


def test_a_model_alone_with_several_users_is_not_said_to_serve_most():
    """Of two models the second was timed for one user: nothing compares them at eight."""
    alone = [r for r in LATE if r.kind != "batch" or r.key["batch"] == 1]
    lead = answer.answer([*FAST, *alone]).lead
    assert lead == (
        "fast serves on one G: 400.0 tokens a second for 8 users; "
        "no other model was timed for several users."
    )


def test_a_model_whose_times_are_withheld_is_named_beside_the_winner():
    """What was not checked well enough may be faster: it is not left out in silence."""
    wrong = [
        Record("gate", row.key | {"new_tokens": 4}, samples={"relative_error": [0.5]})
        for row in FAST
        if row.kind == "batch" and row.key["batch"] == 8
    ]
    found = answer.answer([*FAST, *wrong, *LATE, *PLAIN])
    assert found.lead.startswith("late serves most on one G: 100.0 tokens a second for 8 users")
    assert "; fast may serve more, but some of its times are withheld" in found.lead
    whole = dict(zip(column(found.card, "model"), column(found.card, "all users"), strict=True))
    (reason,) = [cell.estimate.reason for model, cell in whole.items() if model.text == "fast"]
    assert reason.startswith("times withheld")


def test_a_winner_that_has_other_times_withheld_is_not_named_again():
    other = rows("fast", "graph-compiled", {1: 100.0, 8: 300.0}, 400.0)
    wrong = [
        Record("gate", row.key | {"new_tokens": 4}, samples={"relative_error": [0.5]})
        for row in other
        if row.kind == "batch"
    ]
    found = answer.answer([*FAST, *other, *wrong, *LATE, *PLAIN])
    assert found.lead.startswith("fast serves most") and "withheld" not in found.lead


def test_one_user_is_told_of_the_fastest_stack():
    """The stack of many users need not be the one for a single user."""
    alone = rows("fast", "graph-compiled", {1: 300.0}, 400.0)
    found = answer.answer([*FAST, *alone, *LATE, *PLAIN])
    assert "400.0 tokens a second for 8 users" in found.lead
    assert (
        "fast decodes 6 times as fast as late (graph-compiled against graph); on hf-eager"
        in found.sentences[0]
    )


def test_one_user_and_many(told):
    one, many = told.sentences
    assert "fast decodes 2 times as fast as late (graph); on hf-eager" in one
    assert one.endswith("1.2 times.")  # 20 / 16
    assert many == (  # 400 / 100; 50 / 100; 400 W / 400 tok/s over 400 W / 100 tok/s
        "8 users of fast get 4 times the tokens of one, each at 50% of its speed, a token for "
        "25.0% of its energy."
    )


def test_the_best_of_each_column_is_marked(told):
    assert [cell.text for cell in column(told.card, "model")] == ["fast", "late"]
    for title in ("one user", "all users", "energy", "price"):
        assert [bool(cell.verdict) for cell in column(told.card, title)] == [True, False]
    price = column(told.card, "price")[0].estimate.value
    assert price == pytest.approx(2.5 / 3600 / 400 * 1e6, rel=1e-3)
    assert "2.5 USD an hour (GPU_HOUR_USD)" in told.card.below[0]
    assert all(x.estimate.value is None for x in column(told.card, "first token"))


def test_no_value_is_the_best_where_a_model_was_not_measured():
    """The one that was timed for eight users alone could be faster for one."""
    third = rows("third", "graph", {8: 800.0}, 400.0)
    card = answer.answer([*FAST, *LATE, *third]).card
    assert [bool(cell.verdict) for cell in column(card, "all users")] == [True, False, False]
    alone = column(card, "one user")
    assert [cell.estimate.value is None for cell in alone] == [True, False, False]
    assert not any(cell.verdict for cell in alone)


def test_one_user_is_no_whole_gpu_beside_models_that_shared_it():
    alone = rows("alone", "graph", {1: 900.0}, 400.0)
    card = answer.answer([*FAST, *alone]).card
    for title in ("all users", "for", "energy", "price"):
        _, missing = column(card, title)
        assert missing.estimate.reason == "one user only"
    card = answer.answer(alone).card
    assert column(card, "all users")[0].estimate.value == pytest.approx(900, rel=1e-3)


def test_the_readme_says_what_the_released_rows_say():
    assert subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"]).returncode == 0


def test_what_it_rests_on(told):
    assert told.basis.startswith("random weights, 1 board, 24 rows (0 failed)")


def test_jobs_beside_it_are_told_with_what_it_rests_on(told):
    beside = [
        replace(r, values=r.values | {"neighbours": 1}) if r.kind == "environment" else r
        for r in FAST
    ]
    assert answer.basis(beside).endswith(", beside jobs on other GPUs of the host")
    assert "beside" not in told.basis


def test_every_board_that_shares_a_model_is_counted():
    pair = [{"uuid": "a"}, {"uuid": "b"}]
    envs = [
        environment_record({"gpu": "2 x G", "gpu_uuid": "a", "boards": pair}),
        environment_record({"gpu": "G", "gpu_uuid": "c"}),
    ]
    arms = [r for r in FAST if r.kind != "environment"]
    assert answer.basis([*envs, *arms]).startswith("random weights, 3 boards, ")


def test_a_cpu_is_called_one():
    assert answer.answer(PLAIN).lead.startswith("fast serves most on one G: ")
    bare = [r for r in PLAIN if r.kind != "environment"]
    assert answer.answer(bare).card.title == "Models on one CPU"
    assert answer.answer(PLAIN).card.title == "Models on one GPU"
    assert answer.answer(bare).lead.startswith("fast serves most on this CPU: ")


def sharded(model, rates):
    """The same calls on two of the cards, 160 GB together."""
    values = {"gpu": "2 x G", "gpu_total_bytes": 160 * 10**9, "devices": 2}
    env = environment_record(values | {"boards": [{"gpu": "G", "uuid": f"GPU-{n}"} for n in "12"]})
    mine = rows(model, "graph", rates, 800.0)[1:]
    return [env, *(replace(r, key=r.key | {"devices": 2}, env_id=env.env_id) for r in mine)]


def test_two_cards_in_one_set_are_told_apart():
    """The answer is of the card that ran more; a ratio of two cards would say nothing of models."""
    env = environment_record({"gpu": "H", "gpu_total_bytes": 90 * 10**9, "gpu_uuid": "GPU-2"})
    other = [replace(r, env_id=env.env_id) for r in rows("other", "graph", {1: 999.0}, 400.0)[1:]]
    found = answer.answer([*FAST, *LATE, *PLAIN, env, *other])
    assert "other" not in found.lead and found.lead.startswith("fast serves most on one G: ")
    assert found.card.below[-1] == "Of G alone: the planner has H too."
    assert found.gpu_gb == 80 and "other" not in found.figure
    assert found.basis == answer.answer([*FAST, *LATE, *PLAIN]).basis
    choices = choice.options([*FAST, env, *other])
    text = planner.text(choice.offers(choices, choice.Ask(80, 512)), choice.Ask(80, 512))
    assert "other on graph, bfloat16, H:" in text and "fast on graph, bfloat16, G:" in text
    of_h = planner.text(choice.offers(choices, choice.Ask(80, 512, gpu="H")), choice.Ask(80, 512))
    assert "other on" in of_h and "fast" not in of_h


def test_two_gpus_cost_twice_and_hold_the_sum():
    """800 W of two boards at 400 tokens a second are 2,000 J for 1,000; two cost 5 USD an hour."""
    found = answer.answer(sharded("fast", {1: 100.0, 8: 400.0}))
    assert found.lead.startswith("fast serves most on 2 x G: 400.0 tokens a second for 8 users")
    assert found.card.title == "Models on 2 GPUs"
    (price,), (joules,) = (column(found.card, title) for title in ("price", "energy"))
    assert price.estimate.value == pytest.approx(5 / 3600 / 400 * 1e6, rel=1e-3)
    assert joules.estimate.value == pytest.approx(2000, rel=1e-2)
    # 2 x 80 GB, less 2 GB of weights with 5 %, and 1.1 GB for each of the boards
    left = 160e9 - 2.1e9 - 2 * 1.1e9
    (room,) = column(found.card, "room")
    assert room.estimate.value == left // CARD.kv_bytes(found.context, cache="static")
    both = answer.answer([*FAST, *sharded("fast", {1: 900.0})])
    assert both.lead.startswith("fast serves most on one G: 400.0")
    assert both.card.below[-1] == "Of G alone: the planner has 2 x G too."


def test_room_of_an_engine_is_what_its_reserved_cache_holds(told):
    """1,008 MB for users of 512 tokens: (32 blocks + 8 of the window) x 16 x 500 bytes each."""
    cache = Reserved(1_008_000_000, 80 * 10**9, 0.9, 16)
    mine = option(cell(512, 8, 100.0), reserved=cache)
    (room,) = column(answer.card(answer.candidates([mine], 512), 512), "room")
    assert room.estimate.value == 3150
    assert room.estimate.method == "computed: the cache that the engine reserved"
    ours = column(told.card, "room")[0].estimate
    assert ours.value == fit.room(CARD, 80 * 10**9, told.context)
    assert ours.method == "computed: the cache left by the architecture"


def test_without_decoding_there_is_no_answer():
    assert answer.answer([r for r in FAST if r.kind != "batch"]) is None


@pytest.mark.parametrize(("held", "told"), [(2_000_000_000, "2.0 GB"), (427_000, "0.427 MB")])
def test_the_size_of_a_model_is_never_nought(held, told):
    small = replace(TOY, card=replace(CARD, weight_bytes=held))
    (name, *_), *_ = answer.card(answer.candidates([small], 2000), 2000).rows
    assert name.small.endswith(told)


def test_a_context_that_all_models_share_is_taken():
    assert answer.shared_context([TOY, SLOW]) == 2000
    assert answer.shared_context([TOY, option(cell(4000, 1, 9.0), model="x")]) == 4000


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("answer")
    for model, mine in (("fast", [*FAST, *PLAIN[: len(PLAIN) // 2]]), ("late", LATE)):
        where = f"{model}/random-graph/batch"
        sample.write_job(root, where, mine[1:], sample.GPU, model=model)
    return document.write(root)


@pytest.mark.browser
def test_the_first_screen_has_few_words(browser, tmp_path):
    root = sample.write_paper(tmp_path / "paper")
    with Page(browser, document.write(root), viewport={"width": 1280, "height": 900}) as opened:
        words = opened.page.locator("section.answer").inner_text().split()
        assert 40 < len(words) <= WORDS
        below = opened.page.locator("#plan").bounding_box()["y"]
        assert below < 1100


GRID = (
    list(
        product(
            (0.5, 3.25, 80), (1, 512, 2000, 12_000), (1, 8, 16, 33), ("", 450), ("", 30), (2.5,)
        )
    )
    + list(
        product(
            (3.25, 80), (512, 2000), (1, 8, 9), ("", 39, 50), ("", 5, 9), (2.5,), ("Other", "G")
        )
    )
    + list(product((1.5, 2.2, 80), (2000,), (1, 33), ("", 9), ("",), (2.5,), ("", "G"), (1, 2)))
    + list(product((79, 79.9, 80, 80.04), (100, 113, 1999), (1, 56, 57), ("",), ("",), (2.5,)))
)


@pytest.mark.browser
def test_the_planner_answers_as_the_command_does(browser, tmp_path):
    """Every ask of a grid, typed into the page, against `choice.offers` of the same options."""
    more = (*GUESS.cells, guess(2000, 9, 90.0), guess(2000, 40, 9.0))  # beyond what was measured
    twice = replace(GUESS, model=TOY.model, setup=TOY.setup, cells=more)
    lead = replace(cell(2000, 4, None), error=LEAD)
    pair = replace(TOY, model="pair", setup=(*TOY.setup[:-1], "2 x G"), devices=2)
    apart = option(cell(2000, 1, 3.0), lead, model="apart", apart=True)
    flagged = replace(GUESS, model="far", cells=(replace(GUESS.cells[0], note="beyond"),))
    cache = Reserved(60_000_000, 80 * 10**9, 0.9, 16)  # for 56 users of 2,000 tokens
    engine = option(cell(2000, 32, 9.0), model="engine", reserved=cache)
    options = [TOY, SLOW, BARE, GUESS, twice, pair, apart, flagged, engine]
    root = sample.write_demo(tmp_path)
    path = document.write(root)
    soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    soup.find(id="options").string = str(answer.asked(options))
    path.write_text(str(soup), encoding="utf-8")
    with Page(browser, path) as opened:
        for ask in GRID:
            names = ("gb", "context", "users", "ttft", "itl", "usd", "gpu", "devices")
            for name, value in zip(names, (*ask, *("", 1)[len(ask) - 6 :]), strict=True):
                opened.page.evaluate(
                    "([n, v]) => { document.querySelector('.planner').elements[n].value = v; }",
                    [name, str(value)],
                )
            opened.page.locator(".planner input >> nth=0").dispatch_event(
                "input", {"bubbles": True}
            )
            shown = opened.page.evaluate(
                "[...document.querySelectorAll('table.plan tbody tr')].map(r => "
                "[...r.cells].map(c => [c.firstChild.textContent, c.querySelector('.ci') ? "
                "c.querySelector('.ci').textContent : '']))"
            )
            assert [line_of(row) for row in shown] == expected(options, ask), ask
            assert opened.page.locator(".planned").inner_text() == sentence(options, ask), ask
        assert opened.errors == []


def line_of(cells):
    texts = [text for text, _ in cells]
    return (*texts[:3], cells[2][1], texts[3], *texts[6:])


def sentence(options, ask):
    asked = ask_of(ask)
    return planner.lead(choice.offers(options, asked), asked, options)


def ask_of(ask):
    names = ("gpu_gb", "context", "users", "ttft_ms", "itl_ms", "gpu_hour_usd", "gpu", "devices")
    return choice.Ask(**{n: x for n, x in zip(names, ask, strict=False) if x != ""})


def expected(options, ask):
    offers = choice.offers(options, ask_of(ask))
    return [
        (
            offer.option.model,
            offer.option.on,
            offer.verdict,
            "; ".join(filter(None, (offer.why, planner.basis(offer)))),
            "–" if offer.room is None else f"{offer.room:,}",
            "–" if offer.total is None else choice.short(offer.total),
            "–" if offer.usd_per_million is None else f"{offer.usd_per_million:,.2f}",
        )
        for offer in offers
    ]


@pytest.mark.browser
def test_a_card_that_was_not_measured_can_be_chosen(browser, tmp_path):
    """Of a registered model: the H200's memory is put in, and what is said is marked."""
    mine = rows("Qwen3-32B", "graph", {1: 26.0}, 400.0)
    where = "Qwen3-32B/random-graph/batch"
    sample.write_job(tmp_path, where, mine[1:], sample.GPU, model="Qwen3-32B")
    with Page(browser, document.write(tmp_path), viewport={"width": 1280, "height": 900}) as opened:
        page = opened.page
        page.locator(".planner [name=context]").fill("512")
        assert "measured at" in page.locator("table.plan tbody").inner_text()
        page.locator(".planner [name=gpu]").select_option("NVIDIA H200")
        assert page.locator(".planner [name=gb]").input_value() == "141"
        page.locator(".planner [name=context]").fill("2048")
        lines = page.locator("table.plan tbody tr").all_inner_texts()
        large = [line for line in lines if "GB too large" in line]  # gpt-oss-120b in bfloat16
        assert len(large) == 4 and any("predicted at" in line for line in lines)
        assert all("predicted at" in line for line in lines if line not in large)
        told = page.locator(".absent").inner_text()
        assert told.startswith("Not predicted for NVIDIA H200: ")
        assert "Llama-3.1-8B in bfloat16" in told and "any model in fp8 (no law)" in told
        assert "gpu=NVIDIA%20H200" in page.evaluate("location.hash")
        page.locator(".planner [name=gpu]").select_option("")
        assert page.locator(".planner [name=gb]").input_value() == "80"  # as before
        assert not page.locator(".absent").is_visible()
        assert opened.errors == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("gb", "", "memory needs a number"),
        ("context", "2.5", "context needs a whole number"),
        ("users", "0", "users needs a whole number"),
        ("itl", "-1", "each further needs a number"),
        ("ttft", "0", "first token needs a number above 0"),  # and is not taken for none
        ("usd", "0", "price needs a number above 0"),
    ],
)
def test_a_field_that_is_no_number_leaves_no_old_answer(browser, report, name, value, told):
    with Page(browser, report) as opened:
        field = opened.page.locator(f".planner [name={name}]")
        before = field.input_value()
        field.fill(value)
        assert not opened.page.locator("table.plan").is_visible()
        assert told in opened.page.locator(".planned").inner_text()
        field.fill(before)
        assert opened.page.locator("table.plan").is_visible()


@pytest.mark.browser
def test_no_column_of_the_planner_is_cut_off_on_a_desk(browser, report):
    every = replace(TOY, setup=("random", "bfloat16", "graph-compiled", "all_experts", "G"))
    soup = BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")
    soup.find(id="options").string = str(answer.asked([replace(every, model="gpt-oss-20b")]))
    path = report.with_name("wide.html")
    path.write_text(str(soup), encoding="utf-8")
    with Page(browser, path, viewport={"width": 1280, "height": 900}) as opened:
        wide, room = opened.page.evaluate(
            "(r => [r.scrollWidth, r.clientWidth])(document.querySelector('.planned + .scroll'))"
        )
        assert wide <= room


@pytest.mark.browser
def test_the_address_keeps_the_ask(browser, report):
    ask = urlencode({"gb": 24, "context": 512, "users": 8, "ttft": "", "itl": 15, "usd": 3.6})
    with Page(browser, report, f"#plan?{ask}") as opened:
        first = opened.page.locator("table.plan tbody tr >> nth=0").inner_text()
        assert "fast" in first and "not measured" not in first
        assert opened.page.locator(".planner [name=itl]").input_value() == "15"
        opened.page.locator(".planner [name=users]").fill("9")
        assert "users=9" in opened.page.evaluate("location.hash")
        assert opened.errors == []
