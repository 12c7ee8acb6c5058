"""One GPU beside two of them: arithmetic that a reader can do."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from bs4 import BeautifulSoup

from lib.analysis import boards, bounds, choice, cost, engines, gates, machine
from lib.analysis.rows import Rows
from lib.analysis.setups import by_setup
from lib.records import record, store
from lib.records.record import Record, environment_record, identity, require_comparable
from lib.show.wording import short
from tests.samples.records import key, spread

GPU = "NVIDIA H100 80GB HBM3"
BOARDS = [{"uuid": f"GPU-{n}", "gpu": GPU, "gpu_total_bytes": 85 * 10**9} for n in (1, 2)]
ONE = environment_record({"gpu": GPU, "gpu_uuid": "GPU-1", "device": "cuda"})
FAR = environment_record({"gpu": GPU, "gpu_uuid": "GPU-9", "device": "cuda"})
TWO = environment_record(
    {"gpu": f"2 x {GPU}", "gpu_uuid": "GPU-1", "devices": 2, "boards": BOARDS, "device": "cuda"}
)
MODEL = "gpt-oss-120b"
ENGINE = {"stack": "vllm", "experts": "Triton", "dtype": "mxfp4", "context": 512, "batch": 8}


def row(kind, samples=None, values=None, env=ONE, **changes) -> Record:
    devices = 2 if env is TWO else None
    where = ENGINE | {"engine": f"e{devices}", "devices": devices} | changes
    return Record(kind, key(MODEL, **where), samples or {}, values or {}, env_id=env.env_id)


def calls(first_s, step_s, env=ONE, kind="batch", **changes) -> list[Record]:
    """Calls of 1, 64 and 128 tokens in each sequence."""
    return [
        row(
            kind,
            {"ttft_s" if n == 1 else "e2e_s": spread(first_s + step_s * (n - 1), 11)},
            env=env, new_tokens=n, **changes,
        )
        for n in (1, 64, 128)
    ]  # fmt: skip


def joules(each, env=ONE) -> Record:
    """Three windows; with several boards the sum and each."""
    blocks = [[share * watts for watts in each] for share in (0.99, 1.0, 1.01)]
    samples = {"energy_j": [sum(block) for block in blocks]}
    samples |= {"board_energy_j": blocks} if len(each) > 1 else {}
    return row("batch-energy", samples, env=env, new_tokens=64)


def started(sizes, env=ONE) -> Record:
    values = {"used_bytes": sum(sizes) * 10**9}
    values |= {"board_used_bytes": [size * 10**9 for size in sizes]} if len(sizes) > 1 else {}
    return row("engine", values=values, env=env, context=None, batch=1, new_tokens=None)


def both() -> list[Record]:
    """Two GPUs halve the first token, give 1.6 times the steps, and take 1.25 times the energy."""
    one = [*calls(0.2, 0.008), joules([1024.0]), started([70])]
    two = [*calls(0.1, 0.005, env=TWO), joules([680.0, 600.0], env=TWO), started([40, 41], env=TWO)]
    return [ONE, TWO, *one, *two]


def passed(env) -> Record:
    """A check of the logits at the batch of `both`."""
    return row("gate", {"relative_error": [0.01]}, {"pinned_sets": 8}, env=env, new_tokens=4)


def found(rows) -> dict[str, boards.Pair]:
    return {one.what: one for one in boards.pairs(rows)}


def test_two_gpus_stand_beside_one():
    pairs = found(both())
    assert all((p.users, p.context) == (8, 512) for p in pairs.values() if p.users)
    first = pairs[boards.TTFT]
    assert (first.one.value, first.several.value) == pytest.approx((200, 100))
    assert first.ratio.value == pytest.approx(0.5) and first.ratio.resolved_from(1.0)
    decode = pairs[boards.DECODE]
    assert decode.one.value == pytest.approx(1000) and decode.several.value == pytest.approx(1600)
    assert decode.ratio.value == pytest.approx(1.6) and None not in (
        decode.ratio.low, decode.ratio.high
    )  # fmt: skip
    whole = pairs[boards.OUTPUT]
    assert whole.one.value == pytest.approx(8 * 64 / (0.2 + 63 * 0.008))
    assert whole.ratio.value == pytest.approx((0.2 + 63 * 0.008) / (0.1 + 63 * 0.005))


def test_joules_and_bytes_are_the_sum_and_each_board():
    """1,024 J for 512 tokens are 2,000 for a thousand; 680 + 600 are 2,500."""
    pairs = found(both())
    energy = pairs[boards.JOULES]
    assert (energy.one.value, energy.several.value) == pytest.approx((2000, 2500))
    assert energy.ratio.value == pytest.approx(1.25) and energy.ratio.low > 1
    assert energy.each == pytest.approx((680 / 0.512, 600 / 0.512))
    memory = pairs["memory in use (GB)"]
    assert (memory.one.value, memory.several.value, memory.each) == (70, 81, (40, 41))
    assert memory.ratio.value == pytest.approx(81 / 70)


def test_the_table_is_in_the_place_of_the_engines_rows():
    rows = both()
    (grid,) = [grid for grid in engines.tables(rows) if grid.name == "boards"]
    titles = [column.title for column in grid.columns]
    line = next(line for line in grid.rows if line[1] == boards.JOULES)
    assert line[titles.index("each")] == ", ".join(map(short, (680 / 0.512, 600 / 0.512)))
    assert line[titles.index("remark")] == boards.LEAD  # no gate passed at this batch
    assert "What a second card buys" in str(engines.section(rows))


def test_the_answer_is_speed_and_what_a_token_then_costs():
    """A step of 8 ms becomes one of 5 ms: 1.6 times, and two of one price are 2 / 1.6 of it."""
    (text,) = boards.sentences([*both(), *(passed(env) for env in (ONE, TWO))])
    start = "gpt-oss-120b in mxfp4 decodes on 2 GPUs for 8 users of 512 tokens 1.600 times ["
    assert text.startswith(start) and "] as fast as on one (higher): " in text
    end = "a token costs 1.250 times as much, and a call takes 1.250 times the energy."
    assert text.endswith(f"at 2 times the price {end}")
    rows = [*both(), *(passed(env) for env in (ONE, TWO))]
    page = BeautifulSoup(str(engines.section(rows)), "html.parser")
    assert text in re.sub(r"\s+", " ", page.text)


def test_a_side_beside_other_jobs_is_told():
    lone = [*both(), *(passed(env) for env in (ONE, TWO))]
    env = replace(ONE, values=ONE.values | {"neighbours": 1})
    assert {p.remark for p in boards.pairs([env if r is ONE else r for r in lone])} == {
        "the side on one GPU ran beside a job on another GPU of the host",
        "",  # of memory
    }


def test_hosts_of_different_speed_are_told():
    """What waits for the host is slower beside the slower thread, whatever the number of GPUs."""

    def remarks(one, several):
        scores = {id(ONE): one, id(TWO): several}
        rows = [
            replace(r, values=r.values | {"host_score_per_s": scores[id(r)]})
            if id(r) in scores
            else r
            for r in [*both(), *(passed(env) for env in (ONE, TWO))]
        ]
        return {p.remark for p in boards.pairs(rows)}

    told = "a thread of the host did 32.2 and 16.0 million loops a second"
    assert remarks(32.19, 16.01) == {told, ""}  # none at what memory holds
    assert remarks(20.0, 21.0) == {""}


def test_rows_that_warn_do_not_say_which_is_faster():
    """The calls of one token are no points of the line of a batch in an engine."""
    drift = record.warning("drift", "the last third differs from the first by +56%")

    def warned(new_tokens):
        return [
            replace(r, warnings=(drift,))
            if r.kind == "batch" and r.env_id == ONE.env_id and r.key["new_tokens"] == new_tokens
            else r
            for r in [*both(), *(passed(env) for env in (ONE, TWO))]
        ]

    assert {what for what, p in found(warned(1)).items() if p.warned} == {boards.TTFT}
    rows = warned(64)
    assert {w for w, p in found(rows).items() if p.warned} == {boards.OUTPUT, boards.DECODE}
    (text,) = boards.sentences(rows)
    assert "] as fast as on one (a row warns of drift): " in text
    grid = boards.table(rows)
    titles = [column.title for column in grid.columns]
    remarks = {line[titles.index("quantity")]: line[titles.index("remark")] for line in grid.rows}
    assert remarks[boards.DECODE] == "a row warns of drift" and not remarks[boards.TTFT]


def test_a_board_at_its_power_limit_is_no_objection():
    cap = record.warning("power_cap", "3 of 3 blocks: the board ran at its power limit")
    rows = [replace(r, warnings=(cap,)) if r.kind == "batch-energy" else r for r in both()]
    assert not found(rows)[boards.JOULES].warned


def test_a_batch_that_was_checked_on_both_sides_is_no_lead():
    rows = both()
    gated = [passed(env) for env in (ONE, TWO)]
    assert {p.remark for p in boards.pairs([*rows, *gated])} == {""}
    assert boards.LEAD in {p.remark for p in boards.pairs([*rows, gated[0]])}


def test_one_gpu_is_that_of_the_same_host_where_it_was_measured():
    """Another host's slower board does not make two cards look better."""
    far = calls(0.4, 0.016, env=FAR)
    assert found([*both(), FAR, *far])[boards.TTFT].one.value == pytest.approx(200)
    alone = [r for r in both() if r.env_id != ONE.env_id]
    assert found([*alone, FAR, *far])[boards.TTFT].one.value == pytest.approx(400)


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"weights": "checkpoint"}, {"context": 1024}, {"batch": 4}]
)
def test_unlike_is_not_set_beside(changes):
    rows = [ONE, TWO, *calls(0.2, 0.008, **changes), *calls(0.1, 0.005, env=TWO)]
    assert boards.pairs(rows) == []


def test_a_side_that_failed_or_lacks_a_number_says_why():
    failed = row("batch", env=TWO, new_tokens=64)
    failed = Record(failed.kind, failed.key, error="EngineError: no room", env_id=TWO.env_id)
    assert boards.pairs([ONE, TWO, *calls(0.2, 0.008), failed]) == []
    none = row("batch-energy", env=TWO, new_tokens=64)
    none = Record(none.kind, none.key, missing={"energy_j": "no counter"}, env_id=TWO.env_id)
    rows = [r for r in both() if (r.kind, r.env_id) != ("batch-energy", TWO.env_id)]
    energy = found([*rows, none])[boards.JOULES]
    assert energy.several.value is None and "no counter" in energy.ratio.reason


def test_rows_of_several_gpus_are_never_those_of_one():
    rows = Rows(both())
    groups = by_setup(rows, "batch")
    assert {g.of("gpu") for g in groups} == {GPU, f"2 x {GPU}"} and len(groups) == 2
    one, two = calls(0.2, 0.008)[0], calls(0.2, 0.008, env=TWO)[0]
    assert identity(one, ONE.values) != identity(two, TWO.values)
    with pytest.raises(ValueError, match="devices"):
        require_comparable([one, two], {ONE.env_id: ONE.values, TWO.env_id: TWO.values})
    options = choice.options(both())
    assert {(o.gpu, o.devices) for o in options} == {(GPU, 1), (GPU, 2)}
    offers = choice.offers(options, choice.Ask(85, 512, gpu=GPU))
    whys = {o.option.devices: o.why for o in offers}
    assert whys[2] == "needs 2 GPUs (1 asked)" and "GPUs" not in whys[1]


def test_two_boards_by_hand():
    """8 users of two boards: a step of 5 ms is 200 tok/s each and 1,600 together; 1,280 J for a
    call of 64 tokens of each are 2,500 J for 1,000 tokens, and an hour costs twice."""
    options = choice.options([*both(), *(passed(env) for env in (ONE, TWO))])
    ask = choice.Ask(85, 512, users=8, gpu_hour_usd=3.6, gpu=GPU, devices=2)
    two, one = choice.offers(options, ask)
    assert (two.option.engine, one.option.engine) == ("vllm, mxfp4, 2 GPUs", "vllm, mxfp4")
    assert (two.total, one.total) == (pytest.approx(1600), pytest.approx(1000))
    assert two.usd_per_million == pytest.approx(2 * 3.6 / 3600 / 1600 * 1e6)
    assert one.usd_per_million == pytest.approx(3.6 / 3600 / 1000 * 1e6)
    assert {o.of("stack") for o in options} == {"vllm"}  # one engine on each card
    whole = next(p for p in boards.pairs(both()) if p.what == boards.JOULES)
    assert whole.several.value == pytest.approx(1280 / (8 * 64) * 1000)
    assert whole.each == (pytest.approx(680 / 0.512), pytest.approx(600 / 0.512))


def test_several_boards_are_bounded_by_all_of_them():
    """Two read streams of 3 TB/s: 6 TB/s, and what both datasheets state."""
    ceilings = Record("ceilings", key(MODEL), values={"read_bytes_per_s": 3e12}, env_id=ONE.env_id)
    limits = machine.limits([ONE, TWO, ceilings])
    assert limits[ONE.env_id].read_bytes_per_s == 3e12
    assert limits[TWO.env_id].read_bytes_per_s == 6e12
    sheets = [limits[env.env_id].sheet for env in (ONE, TWO)]
    assert sheets[1].memory_bytes_per_s == 2 * sheets[0].memory_bytes_per_s > 6e12


def test_a_step_that_two_boards_can_do_contradicts_nothing():
    """20 GB a step in 5 ms are 4 TB/s: too much for one board, and not for two."""
    fast = {"batch": 1, "experts": "none"}
    for env, impossible in ((ONE, 1), (TWO, 0)):
        rows = [
            Record(r.kind, r.key, r.samples, {"decode_bytes": 20 * 10**9}, env_id=r.env_id)
            for r in calls(0.2, 0.005, env=env, kind="latency", **fast)
        ]
        assert len(bounds.violations([env, *rows])) == impossible
        warned = [r for r in Rows([env, *rows]) if r.warnings]
        assert bool(warned) == bool(impossible)


def test_a_check_on_one_gpu_is_none_of_two():
    """An engine whose only check failed to show enough has no times, whatever another's did."""
    bad = row("gate", {"relative_error": [0.5]}, {"pinned_experts": 4}, env=TWO)
    rows = Rows([*both(), bad])
    withheld = [r for r in rows if gates.is_withheld(r)]
    assert withheld and {r.key["devices"] for r in withheld} == {2}


def test_two_gpus_cost_two_hours():
    table = cost.table(both(), cost.Prices(gpu_hour_usd=3.6))
    by_gpu = {}
    for line in table.rows:
        by_gpu.setdefault([c for c in line if isinstance(c, str) and GPU in c][0], []).append(line)
    at = [c.title for c in table.columns].index("GPU time, 10^6 output tokens")
    one, two = (by_gpu[name][0][at].value for name in (GPU, f"2 x {GPU}"))
    assert two / one == pytest.approx(2 * (0.1 + 63 * 0.005) / (0.2 + 63 * 0.008))


def test_rows_of_several_boards_are_read_back_whole(tmp_path):
    for one in both():
        store.append(tmp_path / "records.jsonl", one)
    assert len(store.load(tmp_path / "records.jsonl")) == len(both())


def test_in_short_it_is_speed_and_price():
    """1.6 times as fast at twice the price: a token costs 1.25 times as much."""
    checked = [*both(), *(passed(env) for env in (ONE, TWO))]
    short_text = "gpt-oss-120b (mxfp4) on 2: 1.60 times the speed, 1.25 times the price of a token."
    assert boards.in_short(checked) == short_text
    assert boards.in_short(both()) == ""  # its logits were not checked


def test_what_shares_a_model_stands_beside_as_many_gpus_with_a_model_each():
    """One GPU: 4 users at steps of 6 ms are 667 tok/s, and two such GPUs 1,333 for 8 users. Two
    that share the model: 8 users at steps of 5 ms are 1,600, which is 1.2 times as much."""
    few = [*calls(0.1, 0.006, batch=4), *calls(0.1, 0.004, env=TWO, batch=4)]
    pairs = [p for p in boards.pairs([*both(), *few]) if p.what == boards.REPLICAS]
    (pair,) = pairs
    assert (pair.users, pair.devices) == (8, 2)
    assert pair.one.value == pytest.approx(2 * 4 / 0.006)
    assert pair.ratio.value == pytest.approx(1600 / (2 * 4 / 0.006)) and pair.remark
    checked = [passed(env) for env in (ONE, TWO)]
    checked += [replace(r, key=r.key | {"batch": 4}) for r in checked]
    (text,) = boards.sentences([*both(), *few, *checked])
    assert "; for 8 users together 1.200 times [" in text
    assert "as fast as 2 GPUs with a model on each (" in text
    assert "(1.20 times that of a model on each)" in boards.in_short([*both(), *few, *checked])


def test_a_side_at_its_power_limit_is_told():
    rows = [
        replace(r, warnings=({"code": "power_cap", "text": "held back"},)) if r is not TWO
        and r.env_id == TWO.env_id and r.kind == "batch-energy" else r
        for r in both()
    ]  # fmt: skip
    assert "the power limit held back the side on several" in found(rows)[boards.JOULES].remark
    assert "power limit" not in found(rows)[boards.TTFT].remark
