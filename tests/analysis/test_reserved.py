"""The cache that an engine reserved: how many users it holds, by a toy and by what was measured.

The toy keeps 500 bytes of a token, and 500 more of the last 100 tokens (see test_fit).
"""

from dataclasses import replace

import pytest

from lib.analysis import bounds, choice, fit, reserved
from lib.analysis.capacity import predicted
from lib.analysis.reserved import Reserved
from lib.analysis.rows import SETUP, load
from lib.files import ROOT
from lib.records.record import Record, environment_record, select
from tests.analysis.batch.test_points import line
from tests.analysis.test_choice import cell, option
from tests.analysis.test_fit import CARD, GB

ENGINE = {"stack": "vllm", "engine": "aaaaaaaa"}
GPU = environment_record({"gpu": "G", "gpu_total_bytes": 80 * GB, "gpu_uuid": "GPU-1"})
CACHE = Reserved(568_000_000, 80 * GB, 0.9, 16)
SETS = {name: load(ROOT / "outputs/released" / name) for name in ("h100-sxm", "h200-sxm")}


def started(cache_bytes, engine="aaaaaaaa", **values):
    """The row of a start of the engine of `line`."""
    like = next(r for r in line({1: 100.0}, **ENGINE) if r.kind == "batch")
    values = {
        reserved.CACHE: cache_bytes, reserved.SHARE: 0.9, reserved.BLOCK: 16, **values
    }  # fmt: skip
    where = like.key | {"engine": engine, "context": None, "new_tokens": None, "batch": 1}
    return Record("engine", where, {}, values, env_id=GPU.env_id)


def read(*starts, **changes):
    """The options of one timed engine and some starts."""
    timed = line({1: 100.0}, **ENGINE | changes)[1:]
    card = Record("card", {"model": "m", "dtype": "bfloat16"}, values=CARD.as_dict())
    return choice.options([GPU, card, *(replace(r, env_id=GPU.env_id) for r in timed), *starts])


def test_users_lie_in_whole_blocks_and_a_window_takes_one_more():
    """1,000 tokens are 63 blocks of 16; the last 100 may begin and end within a block: 8 of them.
    (63 + 8) x 16 x 500 bytes are 568,000 for each of 1,000 users."""
    assert CACHE.paged(CARD).kv_layers[-1][1] == 128
    assert fit.room(CARD, 80 * GB, 1000, reserved=CACHE) == 1000
    assert fit.room(CARD, 80 * GB, 1008, reserved=CACHE) == 1000
    assert fit.room(CARD, 80 * GB, 1009, reserved=CACHE) < 1000


def test_of_another_memory_the_engine_takes_its_share():
    """A GB more is 0.9 GB more of cache; below 79.37 GB nothing is left of it."""
    more = fit.room(CARD, 81 * GB, 1000, reserved=CACHE)
    assert more == (568_000_000 + 900_000_000) // 568_000
    assert fit.room(CARD, 79.3 * GB, 1000, reserved=CACHE) == 0
    assert fit.short_bytes(CARD, 79 * GB, reserved=CACHE) == pytest.approx(332_000_000)
    two = replace(CACHE, of_bytes=160 * GB)
    assert fit.room(CARD, 81 * GB, 1000, 2, two) == (568_000_000 + 1_800_000_000) // 568_000


@pytest.mark.parametrize("context", [1, 99, 112, 113, 128, 129, 2000, 9_999, 10_000])
def test_the_line_of_the_page_is_the_room_of_an_engine(context):
    told = fit.line(CARD, 1, CACHE)
    tokens = -(-context // told["block"]) * told["block"]
    ends = told["user_bytes"]
    (a, low), (b, high) = next(
        (x, y) for x, y in zip(ends, ends[1:], strict=False) if x[0] <= tokens <= y[0]
    )
    user = low + (high - low) * (tokens - a) / (b - a)
    left = told["share"] * (90 * GB - told["of_bytes"]) - told["fixed_bytes"]
    assert left // user == fit.room(CARD, 90 * GB, context, reserved=CACHE)


def test_an_option_has_the_largest_cache_that_its_own_engine_told():
    """Another engine's cache, and a row without the size of a block, are not its own."""
    starts = (
        started(5 * GB),
        started(4 * GB),
        started(9 * GB, engine="bbbbbbbb"),
        started(8 * GB, **{reserved.BLOCK: None}),
    )
    (found,) = read(*starts)
    assert found.reserved == Reserved(5 * GB, 80 * GB, 0.9, 16)
    assert found.room(found.gpu_bytes, 1000) == 5 * GB // 568_000
    (bare,) = read()
    assert bare.reserved is None
    assert bare.room(bare.gpu_bytes, 1000) == fit.room(CARD, 80 * GB, 1000)


def test_a_card_is_as_large_as_it_is_asked_for():
    """The planner is asked for 85.0 GB of a card of 85.02: room is that of the first screen."""
    board = environment_record({"gpu": "G", "gpu_total_bytes": 85_017_493_504})
    (found,) = choice.options(
        [board, *(replace(r, env_id=board.env_id) for r in line({1: 9.0})[1:])]
    )
    assert found.gpu_bytes == 85 * GB


def test_batches_that_are_no_more_than_leads_are_of_their_engine():
    """Of two engines the stack tells which, also where one has nothing but unchecked batches."""
    other = [replace(r, key=r.key | {"engine": "bbbbbbbb"}) for r in line({8: 700.0}, **ENGINE)]
    stacks = {o.of("stack") for o in choice.options([*line({1: 100.0}, **ENGINE), *other[1:]])}
    assert stacks == {"vllm aaaaaa", "vllm bbbbbb"}


def test_what_is_predicted_has_the_cache_of_the_same_engine():
    """Of its own card where that was measured, else of another one."""
    setup = ("random", "bfloat16", "vllm", "none", "NVIDIA H200")
    mine = option(cell(512, 2, 30.0), model="Qwen3-32B", setup=setup, reserved=CACHE)
    larger = replace(CACHE, of_bytes=150 * GB)
    other = replace(mine, setup=(*setup[:-1], "Other"), reserved=larger)
    found = {
        (o.gpu, o.of("stack")): o.reserved
        for o in predicted.options([mine, other])
        if (o.model, o.of("dtype")) == ("Qwen3-32B", "bfloat16")
    }
    assert found["NVIDIA H200", "vllm"] == CACHE
    assert found["NVIDIA H100 NVL", "vllm"] == larger
    assert found["NVIDIA H200", "graph"] is None


# --- by what was measured ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_one_user_takes_the_blocks_that_its_engine_told(name):
    """Blocks in use in a call of one user, of all but the one that vLLM keeps empty."""
    rows, seen = SETS[name], 0
    cards = select(rows, "card")
    blocks = {r.key["engine"]: r.values[reserved.BLOCK] for r in rows.of_kinds("engine")}
    for row in rows.of_kinds(("latency", "batch")):
        used = row.values.get("cache_used_bytes")
        if used and row.key["batch"] == 1:
            cache = replace(CACHE, block=blocks[row.key["engine"]])
            card = bounds.card_in(cards, row.key["model"], row.key["dtype"])
            tokens = cache.whole(row.key["context"] + row.key["new_tokens"])
            expected = cache.paged(card).kv_bytes(tokens, cache="static")
            assert used == pytest.approx(expected, rel=1e-3)
            seen += 1
    assert seen >= 8


@pytest.mark.parametrize("name", SETS)
def test_no_batch_that_was_measured_exceeds_its_room(name):
    options = choice.options(SETS[name])
    for one in options:
        for at in one.measured:
            assert at.users <= one.room(one.gpu_bytes, at.context), (one.label, at)
    engines = [o for o in options if o.stack == "vllm"]
    assert engines and all(o.reserved for o in engines)
    for one in engines:
        assert one.room(one.gpu_bytes, 2048) < fit.room(one.card, one.gpu_bytes, 2048, one.devices)


def test_an_h100s_engine_says_nearly_what_an_h200s_reserved():
    """What the engine takes for itself is the same on both: within 0.5 % of what is left of the
    share that it was given there."""
    place = (SETUP.index("dtype"), SETUP.index("stack"))
    small, large = (
        {
            (o.model, *(o.setup[at] for at in place)): o
            for o in choice.options(SETS[name])
            if o.reserved and o.devices == 1
        }
        for name in SETS
    )
    both = small.keys() & large.keys()
    assert len(both) >= 2
    for one in both:
        there = large[one]
        here, share = small[one].reserved, there.reserved.share
        alike = replace(
            here, share=share, cache_bytes=here.cache_bytes + (share - here.share) * here.of_bytes
        )
        guess = alike.on(there.gpu_bytes)
        assert guess == pytest.approx(there.reserved.cache_bytes, rel=0.005)
