"""The bounds of decode and prefill, by numbers that a reader can check."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib.analysis import bounds
from lib.models.card import ModelCard, bound_tok_per_s, prefill_flop
from lib.records.record import KEY_FIELDS, Record, environment_record
from lib.show.figure import color
from tests.samples.records import key

ENV = environment_record({"gpu": "G", "copy_bytes_per_s": 1e11})
H100 = environment_record({"gpu": "NVIDIA H100 80GB HBM3", "copy_bytes_per_s": 3e12})
GB = 10**9  # a step of one GB at 100 GB/s takes 10 ms: at most 100 tok/s
# 1,100 active parameters, 100 of them the output matrix; one layer sees all, one the last two.
CARD = ModelCard(
    name="m",
    model_type="toy",
    dtype="bfloat16",
    total_params=1200,
    active_params=1100,
    lookup_params=100,
    routed_params=0,
    weight_bytes=2400,
    routed_bytes=0,
    lookup_bytes=200,
    layers=2,
    hidden_size=10,
    attention_heads=2,
    kv_heads=1,
    head_dim=3,
    experts=0,
    experts_per_token=0,
    context_limit=100,
    vocab_size=10,
    kv_layers=((6, None), (6, 2)),
    kv_element_bytes=2,
)


def rows(step_s, decode_bytes=GB, model="m", context=128, env=ENV, kind="latency", **changes):
    """Calls of 10 and 20 tokens that take one second and `step_s` for each token."""
    values = {"decode_bytes": decode_bytes, "decode_experts": changes.pop("decode_experts", None)}
    return [
        Record(
            kind,
            key(model, context=context, new_tokens=g, **changes),
            {"e2e_s": [1 + g * step_s] * 3},
            values,
            env_id=env.env_id,
        )
        for g in (10, 20)
    ]


def ceilings(bytes_per_s=2e11, flop=1e12, env=ENV):
    values = {"read_bytes_per_s": bytes_per_s, "matmul_flop_per_s": flop}
    return Record("ceilings", dict.fromkeys(KEY_FIELDS), {}, values, env_id=env.env_id)


def trace(useful, realised, context=512, experts="grouped_mm", **changes):
    where = key("moe", context=context, new_tokens=None, experts=experts, **changes)
    values = {"decode_bytes": useful, "decode_bytes_realised": realised}
    return Record("trace", where, {}, values, env_id=ENV.env_id)


def card_row(env=ENV):
    return Record(
        "card", {"model": "m", "dtype": "bfloat16"}, {}, CARD.as_dict(), env_id=env.env_id
    )


def lines(table):
    return table.frame().to_dict("records")


# --- the bound


def test_the_bound_is_bandwidth_over_bytes():
    assert bound_tok_per_s(2 * GB, 1e11) == 50


def test_what_is_expected_before_measuring():
    card = SimpleNamespace(decode_bytes=lambda context: GB + context * 10**6)
    table = bounds.expected(card, [0, 1000], 1e11).frame()
    assert list(table["context (tokens)"]) == [0, 1000]
    assert list(table["a step reads (GB)"]) == [1, 2]
    assert list(table["decode bound (tok/s)"]) == [100, 50]


def test_without_ceilings_the_copy_stands_in_and_the_table_says_so():
    table = bounds.utilisation([ENV, *rows(0.02)])
    (line,) = lines(table)
    assert line["decode throughput (tok/s)"] == pytest.approx(50)  # prefill is not in the slope
    assert (line["a step reads (GB)"], line["bound (tok/s)"]) == (1, 100)
    assert line["useful MBU, measured"] == pytest.approx(0.5)
    assert any(
        "copy (no ceilings were measured with these records) 100.0 GB/s" in note
        for note in table.notes
    )
    assert "useful MBU, datasheet: 'G' is not in params/gpus.yaml" in " ".join(table.notes)
    assert "useful MBU, datasheet" not in line


def test_the_read_stream_of_the_same_card_is_the_measured_bandwidth():
    other = environment_record({"gpu": "another", "copy_bytes_per_s": 1e10})
    table = bounds.utilisation([ENV, other, ceilings(), ceilings(9e12, env=other), *rows(0.02)])
    (line,) = lines(table)
    assert line["bound (tok/s)"] == 200
    assert line["useful MBU, measured"] == pytest.approx(0.25)
    assert any("measured read stream 200.0 GB/s" in note for note in table.notes)


def test_against_the_datasheet_of_a_known_card():
    (line,) = lines(bounds.utilisation([H100, *rows(0.02, decode_bytes=33.5e9, env=H100)]))
    assert line["useful MBU, datasheet"] == pytest.approx(0.5)  # 50/s x 33.5 GB of 3,350 GB/s


def test_the_interval_is_that_of_the_throughput():
    calls = rows(0.02)
    noisy = [
        Record(
            r.kind,
            r.key,
            {"e2e_s": [t * f for f in (0.98, 1, 1.01, 1.02) for t in r.samples["e2e_s"]]},
            r.values,
            env_id=r.env_id,
        )
        for r in calls
    ]
    (arm,) = bounds.arms([ENV, *noisy])
    share = arm.mbu(realised=False, datasheet=False)
    assert share.low == pytest.approx(arm.steps_per_s.low / 100)
    assert share.low < share.value < share.high
    assert (share.n, share.method) == (24, arm.steps_per_s.method)


def test_one_length_and_first_tokens_give_a_rate():
    first = Record(
        "latency", key("m", context=128, new_tokens=1), {"ttft_s": [1.0] * 6}, env_id=ENV.env_id
    )
    (arm,) = bounds.arms([ENV, first, rows(0.02)[1]])  # 20 tokens in 1.4 s
    assert arm.steps_per_s.value == pytest.approx(19 / 0.4)
    assert arm.steps_per_s.n == 9 and arm.steps_per_s.method == "Theil-Sen slope"


def test_a_batch_reads_once_and_gives_several_tokens():
    """Ten steps a second of 2 GB at 100 GB/s: a fifth; four sequences: 40 tok/s of 200."""
    batch = rows(0.1, decode_bytes=2 * GB, kind="batch", batch=4)
    (line,) = lines(bounds.utilisation([ENV, *batch], "batch"))
    assert line["batch"] == 4
    assert line["decode throughput (tok/s)"] == pytest.approx(40)
    assert line["bound (tok/s)"] == 200
    assert line["useful MBU, measured"] == pytest.approx(0.2)


def test_a_sweep_over_batches_is_not_pooled_with_single_calls():
    both = [ENV, *rows(0.02), *rows(0.05, kind="batch")]
    assert [arm.steps_per_s.value for arm in bounds.arms(both)] == [pytest.approx(50)]
    assert [arm.steps_per_s.value for arm in bounds.arms(both, "batch")] == [pytest.approx(20)]
    fast = [ENV, *rows(0.02), *rows(1 / 200, kind="batch", batch=2)]  # 200 GB/s from 100
    assert len(bounds.violations(fast)) == 1


def test_a_batch_must_read_the_experts_that_its_router_was_traced_to_choose():
    """400 bytes of 4 experts: 100 each. Three were chosen, not the 3.5 of 4 that an even router
    would choose for three tokens of half of the experts, and all four were read."""
    card = replace(CARD, experts=4, experts_per_token=2, routed_bytes=400, kv_layers=())
    assert card.experts_touched(3) == 3.5 and card.decode_bytes(15, 3) == 1800 + 350
    moe = Record(
        "card", {"model": "moe", "dtype": "bfloat16"}, {}, card.as_dict(), env_id=ENV.env_id
    )
    values = {"decode_bytes": 2100, "decode_bytes_realised": 2200, "experts_chosen_decode": 3.0}
    traced = Record("trace", key("moe", context=128, new_tokens=None, batch=3), {}, values)
    mine = rows(0.1, 2150, model="moe", kind="batch", batch=3, decode_experts="grouped_mm")
    (arm,) = bounds.arms([ENV, moe, traced, *mine], "batch")
    assert (arm.step_bytes, arm.realised_bytes) == (2100, 2200)
    (arm,) = bounds.arms([ENV, moe, *mine], "batch")
    assert (arm.step_bytes, arm.realised_bytes) == (2150, None)


def engine_trace(**changes):
    fields = {"model": "moe", "weights": "random", "dtype": "bfloat16", "batch": 3}
    fields |= {"context": 128, "new_tokens": 17} | changes
    return Record("engine-trace", fields, {"distinct_experts": [2.5, 3.5]}, {})


@pytest.mark.parametrize(
    ("told", "batch", "size"),
    [
        # Of an even router 3.5 of 4 for three tokens, 2 for one; told are 3 in the mean.
        ([], 3, 1800 + 350),
        ([engine_trace()], 3, 1800 + 300),
        ([engine_trace(batch=1)], 1, 1800 + 200),
        ([engine_trace(batch=2)], 3, 1800 + 350),
        ([engine_trace(weights="checkpoint")], 3, 1800 + 350),
        ([engine_trace(dtype="float32")], 3, 1800 + 350),
        ([engine_trace(model="m")], 3, 1800 + 350),
    ],
)
def test_an_engine_tells_how_many_experts_its_batches_chose(told, batch, size):
    card = replace(CARD, experts=4, experts_per_token=2, routed_bytes=400, kv_layers=())
    moe = Record("card", {"model": "moe", "dtype": "bfloat16"}, {}, card.as_dict())
    mine = rows(
        0.1, None, model="moe", kind="batch", batch=batch, stack="vllm", engine="0123456789"
    )
    (arm,) = bounds.arms([ENV, moe, *told, *mine], "batch")
    assert arm.step_bytes == size
    if told and size == 2100:
        assert arm.traced == {"experts_chosen_decode": 3}
    else:
        assert arm.traced == {}


@pytest.mark.parametrize(
    ("new_tokens", "batch", "tokens"),
    [((10, 20), 1, 138), ((10, 21), None, 138), ((10, 20), 2, 138)],
)
def test_a_size_that_no_row_has_is_the_cards_in_the_middle_of_the_longest_call(
    new_tokens, batch, tokens
):
    """128 tokens of context and half of twenty: 138."""
    calls = [
        Record("latency", key("m", context=128, new_tokens=g, batch=batch), {"e2e_s": [1 + g] * 3},
               env_id=ENV.env_id)
        for g in new_tokens
    ]  # fmt: skip
    other = Record("card", {"model": "n"}, {}, replace(CARD, weight_bytes=9999).as_dict())
    (arm,) = bounds.arms([ENV, card_row(), other, *calls])
    assert arm.step_bytes == CARD.decode_bytes(tokens, batch or 1)
    assert arm.batch == (batch or 1)
    (arm,) = bounds.arms([ENV, card_row(), *rows(0.02, 777)])
    assert arm.step_bytes == 777  # what the row says comes first


def test_experts_of_one_sequence_are_those_of_its_row():
    """A trace of what a batch of one chose changes nothing; of two it does."""
    card = replace(CARD, experts=4, experts_per_token=2, routed_bytes=400, kv_layers=())
    moe = Record("card", {"model": "moe", "dtype": "bfloat16"}, {}, card.as_dict())
    values = {"decode_bytes": 2000, "decode_bytes_realised": 2300, "experts_chosen_decode": 3.0}
    for batch, size in ((1, 1999), (2, 1800 + 300)):
        traced = Record("trace", key("moe", new_tokens=None, batch=batch), {}, values)
        mine = rows(0.1, 1999, model="moe", batch=batch, decode_experts="grouped_mm")
        (arm,) = bounds.arms([ENV, moe, traced, *mine])
        assert (arm.step_bytes, arm.realised_bytes) == (size, size + 300)


def test_the_nearest_traced_context_is_taken_on_either_side():
    mine = rows(0.1, GB, model="moe", context=400, decode_experts="loop", experts="loop")
    near, far = trace(GB, 3 * GB, 512, experts="loop"), trace(GB, 2 * GB, 64, experts="loop")
    (arm,) = bounds.arms([ENV, far, near, *mine])
    assert arm.realised_bytes == 3 * GB


def test_a_share_of_just_one_is_possible():
    """Four steps a second of 837.5 GB are the 3,350 GB/s of the datasheet."""
    just = [H100, *rows(0.25, 837.5 * GB, env=H100)]
    assert bounds.violations(just) == []
    (arm,) = bounds.arms(just)
    assert arm.mbu(realised=False, datasheet=True).value == 1 and arm.remark == ""
    beyond = bounds.utilisation([H100, *rows(0.2, 837.5 * GB, env=H100)])
    assert not {c.title: c.numeric for c in beyond.columns}["remark"]


def test_without_a_bandwidth_an_arm_has_no_bound():
    bare = environment_record({"gpu": "G"})
    (arm,) = bounds.arms([bare, *rows(0.02, env=bare)])
    assert (arm.bound_per_s, arm.remark) == (None, "")
    assert arm.mbu(realised=False, datasheet=False).reason == "no bandwidth measured"
    (line,) = lines(bounds.utilisation([bare, *rows(0.02, env=bare)]))
    assert "bound (tok/s)" not in line


def test_models_and_contexts_are_kept_apart():
    """Pooled, the two models would give a slope that neither has."""
    long = rows(0.05, model="b", context=512)
    table = bounds.utilisation([ENV, *rows(0.02, model="a"), *rows(0.04, model="b"), *long])
    rates = [(line["model"], line["decode throughput (tok/s)"]) for line in lines(table)]
    assert rates == [("a", pytest.approx(50)), ("b", pytest.approx(25)), ("b", pytest.approx(20))]


def test_stacks_are_kept_apart():
    fast = rows(0.0125, stack="graph")
    table = bounds.utilisation([ENV, *rows(0.02), *fast])
    assert {line["stack"]: line["useful MBU, measured"] for line in lines(table)} == {
        "graph": pytest.approx(0.8),
        "hf-eager": pytest.approx(0.5),
    }


# --- what was really read


def test_realised_bytes_are_those_of_the_experts_that_decode():
    """Traced 2 GB more than needed at another context: this arm of 1.5 GB reads 3.5 GB."""
    mine = rows(0.1, int(1.5 * GB), model="moe", decode_experts="loop", experts="grouped_mm")
    other, used = trace(GB, 9 * GB), trace(GB, 3 * GB, experts="loop")
    (arm,) = bounds.arms([ENV, other, used, *mine])
    assert arm.mbu(realised=False, datasheet=False).value == pytest.approx(0.15)
    assert arm.mbu(realised=True, datasheet=False).value == pytest.approx(0.35)
    # The nearest context is preferred.
    near = trace(GB, 4 * GB, context=128, experts="loop")
    (arm,) = bounds.arms([ENV, used, near, *mine])
    assert arm.realised_bytes == 4.5 * GB


def test_without_a_trace_of_these_experts_realised_is_missing_with_the_reason():
    mine = rows(0.1, model="moe", decode_experts="batched_mm", experts="grouped_mm")
    table = bounds.utilisation([ENV, trace(GB, 9 * GB), *mine])
    assert "no trace of this model with experts batched_mm" in " ".join(table.notes)
    assert "realised MBU, measured" not in lines(table)[0]


def profiled(*kernels, **changes):
    where = key("moe", new_tokens=8, experts="grouped_mm", **changes)
    return Record("busy", where, values={"decode_kernel_times": [list(k) for k in kernels]})


MOE = Record(
    "card",
    {"model": "moe"},
    values={"experts": 8, "experts_per_token": 2, "routed_bytes": 4 * GB, "layers": 3},
)
GATHER = "at::native::vectorized_gather_kernel"


@pytest.mark.parametrize(
    "batch, kernels, extra",
    [
        (1, [(GATHER, 6.0, 1e-3)], 2 * GB),  # 2 of 8 experts are 1 GB: written, and read again
        (4, [(GATHER, 6.0, 1e-3)], 8 * GB),  # each token has copies of its own
        (None, [(GATHER, 6.0, 1e-3)], 2 * GB),  # one sequence where no batch is told
        (1, [(GATHER, 6.0, 2.5e-4)], 2 * GB),  # 2 GB at 8 TB/s
        (1, [("x::indexSelectLargeIndex", 3.0, 5e-4), (GATHER, 3.0, 5e-4)], 2 * GB),
        (1, [(GATHER, 5.0, 1e-3)], None),  # not two a layer
        (1, [(GATHER, 96.0, 1e-5)], None),  # too short: no memory moves 200 TB/s
        (1, [("at::native::sbtopk::gatherTopK", 24.0, 1e-3)], None),  # the router's
        (1, [], None),
    ],
)
def test_copies_of_experts_are_moved_where_a_profile_shows_them(batch, kernels, extra):
    """3 GB with the experts used, which are not the bytes that a step moves."""
    used = trace(2 * GB, 3 * GB, experts="batched_mm", batch=batch)
    less = replace(MOE, key={"model": "moe", "dtype": "mxfp4"}, values={"routed_bytes": GB})
    beyond, reason = bounds.moved_beyond(used, [MOE, less, profiled(*kernels)])
    assert beyond == (None if extra is None else GB + extra)
    assert ("no profile of this stack" in reason) == (extra is None)
    loop = trace(2 * GB, 3 * GB, experts="loop", batch=batch)
    assert bounds.moved_beyond(loop, [MOE, profiled(*kernels)]) == (GB, "")
    assert "no model card" in bounds.moved_beyond(used, [profiled(*kernels)])[1]
    other = profiled(*kernels, stack="graph")
    assert bounds.moved_beyond(used, [MOE, other])[0] is None


@pytest.mark.parametrize(
    ("batch", "seconds", "shown"),
    [(None, 2.5e-4, True), (4, 7.5e-4, False), (4, 8.5e-4, True), (1, 2.0e-4, True)],
)
def test_a_profile_of_several_tokens_must_have_taken_the_time_of_their_copies(
    batch, seconds, shown
):
    """At most 10 TB/s: 2 GB for each of the profiled tokens."""
    used = trace(2 * GB, 3 * GB, experts="batched_mm")
    busy = profiled((GATHER, 6.0, seconds), batch=batch)
    beyond = bounds.moved_beyond(used, [MOE, busy])[0]
    assert beyond == (3 * GB if shown else None)


FULL = replace(CARD, matrix_params=1000)


@pytest.mark.parametrize(
    ("row_dtype", "dtype", "bytes_a_weight"),
    [
        ("bfloat16", "bfloat16", 2),
        (None, "bfloat16", 2),  # a card that tells no dtype
        ("bfloat16", "8-bit", None),  # 8.125 bits of each weight in a matrix
        ("float32", "8-bit", 0),  # is held from bfloat16 only
        ("bfloat16", "float32", 0),
        ("bfloat16", "float16", 0),
        ("bfloat16", "unheard of", 0),
    ],
)
def test_a_card_is_held_in_another_form_where_that_is_known(row_dtype, dtype, bytes_a_weight):
    row = Record("card", {"model": "m", "dtype": row_dtype}, {}, FULL.as_dict())
    card = bounds.card_of(row, dtype)
    if bytes_a_weight == 0:
        assert card is None
    else:
        matrices = 2000 if bytes_a_weight else 1000 * 8.125 / 8
        assert card.weight_bytes == pytest.approx(2400 - 2000 + matrices, abs=1)
    assert bounds.card_of(replace(row, values={"total_params": 1}), dtype) is None


def test_an_engines_card_is_the_last_of_its_model_in_its_form():
    early, late = (
        Record("card", {"model": "m", "dtype": "bfloat16"}, {}, card.as_dict())
        for card in (replace(FULL, weight_bytes=9999), FULL)
    )
    other = Record("card", {"model": "n", "dtype": "bfloat16"}, {}, FULL.as_dict())
    mine = rows(0.1, None, dtype="8-bit", stack="vllm", engine="0123456789")
    (arm,) = bounds.arms([ENV, early, late, other, *mine])
    held = bounds.card_of(late, "8-bit")
    assert arm.step_bytes == held.decode_bytes(138) < CARD.decode_bytes(138)
    plain = rows(0.1, None, dtype="8-bit")  # what is no engine has no card of another form
    assert bounds.arms([ENV, early, late, *plain]) == []


def test_a_step_of_the_released_set_moves_more_than_twice_what_its_experts_hold():
    """GPT-OSS-20B on generate(): 96 gathers of 4 of 32 experts, 16.8 GB and not 7.27."""
    from lib.analysis.rows import load
    from lib.files import ROOT

    released = load(ROOT / "outputs" / "released" / "h100-sxm")
    arms = [a for a in bounds.arms(released) if a.model == "gpt-oss-20b" and a.context == 2048]
    moved = {a.setup[2:4]: a.realised_bytes / GB for a in arms}
    assert moved["hf-eager", "grouped_mm"] == pytest.approx(16.83, abs=0.01)
    assert moved["graph-compiled", "grouped_mm"] == pytest.approx(7.27, abs=0.01)
    batches = [a for a in bounds.arms(released, "batch") if a.model == "gpt-oss-20b"]
    shares = [a.mbu(realised=True, datasheet=True).value for a in batches]
    assert len(shares) > 5 and max(s for s in shares if s is not None) < 1


# --- prefill


def test_the_operations_of_a_prefill_by_hand():
    # Of 4 tokens: 1,000 parameters for each and the output matrix once, two operations each.
    linear = 2 * (1000 * 4 + 100)
    # Pairs: 1 + 2 + 3 + 4 in the full layer, 1 + 2 + 2 + 2 in the other; 4 x 2 heads x 3.
    assert prefill_flop(CARD, 4) == linear + 4 * 2 * 3 * (10 + 7)
    assert prefill_flop(CARD, 4, batch=3) == 3 * prefill_flop(CARD, 4)


def test_mfu_is_operations_over_time_and_rate():
    operations = prefill_flop(CARD, 4)
    first = Record(
        "latency", key("m", context=4, new_tokens=1), {"ttft_s": [0.5] * 6}, env_id=H100.env_id
    )
    calls = [card_row(H100), first, *rows(0.02, context=4, env=H100)]
    (arm,) = bounds.arms([H100, ceilings(flop=4 * operations, env=H100), *calls])
    assert arm.mfu(datasheet=False).value == pytest.approx(0.5)  # half a second where 0.25 will do
    assert arm.mfu(datasheet=True).value == pytest.approx(operations / 0.5 / 989.4e12)
    (bare,) = bounds.arms([H100, *calls])
    assert "no matrix product measured" in bare.mfu(datasheet=False).reason
    (unknown,) = bounds.arms([H100, first, *rows(0.02, context=4, env=H100)])
    assert "no full model card" in unknown.mfu(datasheet=True).reason


def test_the_datasheets_rate_is_not_that_of_float32():
    first = Record(
        "latency",
        key("m", context=4, new_tokens=1, dtype="float32"),
        {"ttft_s": [0.5] * 6},
        env_id=H100.env_id,
    )
    card = Record("card", {"model": "m", "dtype": "float32"}, {}, CARD.as_dict())
    (arm,) = bounds.arms([H100, card, first, *rows(0.02, context=4, env=H100, dtype="float32")])
    assert "bfloat16, this is float32" in arm.mfu(datasheet=True).reason


def test_every_share_stands_in_its_own_column():
    """50 steps a second of 10 GB, 12 GB as traced, of 3,350 GB/s and of measured 2,000 GB/s."""
    operations = prefill_flop(CARD, 128)
    card = Record("card", {"model": "moe", "dtype": "bfloat16"}, {}, CARD.as_dict())
    first = Record(
        "latency",
        key("moe", context=128, new_tokens=1, experts="loop"),
        {"ttft_s": [0.5] * 6},
        env_id=H100.env_id,
    )
    calls = rows(0.02, 10 * GB, model="moe", env=H100, experts="loop")
    measured = ceilings(2e12, flop=4 * operations, env=H100)
    used = trace(GB, 3 * GB, experts="loop")
    table = bounds.utilisation([H100, measured, card, used, first, *calls])
    (line,) = lines(table)
    steps = line["decode throughput (tok/s)"]
    assert line["a step reads (GB)"] == 10 and line["bound (tok/s)"] == 200
    shares = {
        c.title: line[c.title] for c in bounds.COLUMNS if "MBU" in c.title or "MFU" in c.title
    }
    assert shares == {
        "useful MBU, datasheet": pytest.approx(steps * 10 / 3350),
        "useful MBU, measured": pytest.approx(steps * 10 / 2000),
        "realised MBU, datasheet": pytest.approx(steps * 12 / 3350),
        "realised MBU, measured": pytest.approx(steps * 12 / 2000),
        "prefill MFU, datasheet": pytest.approx(operations / 0.5 / 989.4e12),
        "prefill MFU, measured": pytest.approx(0.5),
    }
    (cells,) = table.rows
    (step,) = [cell for cell in cells if getattr(cell, "value", None) == 10]
    assert (step.n, step.method) == (1, "counted")


def test_a_step_is_told_in_units_of_a_billion_bytes():
    (line,) = lines(bounds.utilisation([ENV, *rows(0.02, 10**18)]))
    assert line["a step reads (GB)"] == 10**9


def test_a_trace_without_both_sizes_tells_nothing():
    mine = rows(0.1, GB, model="moe", context=128, decode_experts="loop")
    whole = trace(GB, 3 * GB, experts="loop")
    for half in ((GB, None), (None, 9 * GB)):
        (arm,) = bounds.arms([ENV, whole, trace(*half, context=128, experts="loop"), *mine])
        assert arm.realised_bytes == 3 * GB


def test_the_figure_has_the_tokens_of_all_sequences_under_their_bound():
    """Four sequences: 10 steps a second are 40 tokens, of 50 steps that 100 GB/s allow 200."""
    noisy = [
        replace(
            r, samples={"e2e_s": [t * f for f in (0.98, 1, 1, 1.02) for t in r.samples["e2e_s"]]}
        )
        for r in rows(0.1, 2 * GB, batch=4)
    ]
    (arm,) = bounds.arms([ENV, *noisy])
    plotted = bounds.figure([ENV, *noisy]).lines
    assert {line.get_color() for line in plotted} == {color("m")}
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in plotted]
    ends = (4 * arm.steps_per_s.low, 4 * arm.steps_per_s.high)
    assert [x for x, _ in drawn] == [[128, 128], [128], [128]]
    assert drawn[0][1] == pytest.approx(ends)
    assert (drawn[1][1], drawn[2][1]) == ([pytest.approx(4 * arm.steps_per_s.value)], [200])


# --- what cannot be


@pytest.mark.parametrize(("batch", "where"), [(1, "at 128: "), (2, "at 128, batch 2: ")])
def test_a_violation_names_its_batch_where_there_are_several(batch, where):
    (sentence,) = bounds.violations([ENV, *rows(0.005, kind="batch", batch=batch)])
    assert where + "200.0 steps/s beat the bound" in sentence


def test_an_arm_that_beats_its_bound_is_named():
    sentences = bounds.violations([ENV, *rows(0.02), *rows(0.005, context=512)])
    assert sentences == ["m at 512: 200.0 steps/s beat the bound of 100.0 steps/s (measured copy)"]
    table = bounds.utilisation([ENV, *rows(0.02), *rows(0.005, context=512)])
    assert [line["remark"] for line in lines(table)] == ["", "impossible: faster than memory"]


@pytest.mark.parametrize("step_s, violated", [(0.0100, 0), (0.0095, 0), (0.0089, 1)])
def test_a_measured_stream_is_not_the_best_so_ten_percent_are_allowed(step_s, violated):
    assert len(bounds.violations([ENV, *rows(step_s)])) == violated


@pytest.mark.parametrize("step_s, violated", [(0.0101, 0), (0.0099, 1)])
def test_the_datasheet_allows_nothing_above_it(step_s, violated):
    fast = rows(step_s, decode_bytes=33.5e9, env=H100)  # 10 ms at 3,350 GB/s
    assert len(bounds.violations([H100, *fast])) == violated


@pytest.mark.parametrize("size, violated", [(4 * 52428800 - 1, 0), (4 * 52428800, 1)])
def test_several_caches_full_must_come_from_memory(size, violated):
    fast = [H100, *rows(1e-6, decode_bytes=size, env=H100)]
    assert len(bounds.violations(fast)) == violated
    (line,) = lines(bounds.utilisation(fast))
    assert line["remark"] == (
        "impossible: faster than memory"
        if violated
        else "faster than memory: a cache may hold a step's bytes"
    )


@pytest.mark.parametrize("size, violated", [(2**28 - 1, 0), (2**28, 1)])
def test_where_the_cache_is_not_known_a_round_size_is_taken(size, violated):
    fast = [ENV, *rows(1e-5, decode_bytes=size)]
    assert len(bounds.violations(fast)) == violated
    assert len(bounds.utilisation(fast).rows) == 1  # shown all the same


def test_a_trace_that_claims_more_than_memory_can_give_is_a_bug_too():
    mine = rows(0.02, 33.5e9, model="moe", env=H100, experts="loop")  # half of the datasheet
    claim = trace(33.5e9, 67.1e9, experts="loop")
    assert len(bounds.violations([H100, claim, *mine])) == 1


def test_without_a_bandwidth_a_size_or_a_slope_there_is_no_bound():
    bare = environment_record({"gpu": "G"})
    assert bounds.violations([bare, *rows(1e-5, env=bare)]) == []
    assert bounds.violations([ENV, *rows(1e-5, decode_bytes=None)]) == []
    assert bounds.violations([ENV, *rows(1e-5)[:1]]) == []  # one length gives no slope
    failed = [Record("latency", key("m"), error="OutOfMemoryError: x", env_id=ENV.env_id)]
    assert bounds.violations([ENV, *failed]) == []
    empty = bounds.utilisation([])
    assert (empty.rows, empty.notes) == ((), ())
