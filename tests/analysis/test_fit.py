"""Will it fit: a card made by hand, and every number of its table."""

from dataclasses import replace

import pytest

from lib.analysis import fit
from lib.files import ParamsError
from lib.models import formats
from lib.models.card import Block, ModelCard, ModelError

GB = 10**9
# 1 billion parameters: a table of 0.1, experts of 0.8 (2 of 8 used), and 0.1 always used, half of
# it matrices. Two layers cache 500 bytes per token; the second keeps the last 100 tokens.
CARD = ModelCard(
    name="toy",
    model_type="toy",
    dtype="bfloat16",
    total_params=GB,
    active_params=3 * GB // 10,
    lookup_params=GB // 10,
    routed_params=8 * GB // 10,
    weight_bytes=2 * GB,
    routed_bytes=16 * GB // 10,
    lookup_bytes=2 * GB // 10,
    layers=2,
    hidden_size=None,
    attention_heads=None,
    kv_heads=None,
    head_dim=None,
    experts=8,
    experts_per_token=2,
    context_limit=10_000,
    vocab_size=1000,
    kv_layers=((250, None), (250, 100)),
    kv_element_bytes=2,
    matrix_params=850_000_000,
    expert_matrix_params=800_000_000,
)
# CUDA context, half a GB, and 5 % of 2 GB.
RESERVE = 600_000_000 + 500_000_000 + 100_000_000


def plan(left, card=CARD, **options):
    """The plan of a GPU that has `left` bytes for the cache."""
    return fit.plan(card, gpu_bytes=card.weight_bytes + RESERVE + left, **options)


def test_memory_adds_up():
    row = plan(7)
    assert (row["weight_bytes"], row["reserve_bytes"], row["left_bytes"]) == (2 * GB, RESERVE, 7)


def test_cache_per_token_and_beyond_the_window():
    row = plan(0)
    assert (row["token_bytes"], row["token_beyond_window_bytes"]) == (1000, 500)


def test_largest_context_is_exact():
    # 100 tokens take 1,000 bytes each, 1,900 more take 500 each.
    assert plan(100_000 + 950_000)["largest_context"] == 2000
    assert plan(100_000 + 950_000 - 1)["largest_context"] == 1999
    assert plan(1_050_000)["limited_by"] == "memory"
    assert plan(999)["largest_context"] == plan(-GB)["largest_context"] == 0


def test_the_models_own_limit_is_respected_and_named():
    row = plan(GB, contexts=(10_000, 10_001))
    assert (row["largest_context"], row["limited_by"]) == (10_000, "model")
    assert row["users_10000"] == GB // (10_000 * 500 + 100 * 500)
    assert row["users_10001"] is None
    assert "10,001 tokens are beyond the model's own limit of 10,000" in row["missing"].values()


def test_users_are_whole_sequences():
    row = plan(1_100_000, contexts=(50, 1000))
    assert row["users_50"] == 22  # 50 tokens of 1,000 bytes
    assert row["users_1000"] == 2  # 1,000 tokens of 500 bytes, 100 of 500
    assert plan(1_099_999, contexts=(1000,))["users_1000"] == 1


def test_decode_limit_is_bandwidth_over_bytes():
    # 0.2 GB always, a quarter of 1.6 GB of experts; 1,000 and 99 cached tokens of 500 bytes.
    step_bytes = 200_000_000 + 400_000_000 + 1000 * 500 + 99 * 500
    row = plan(GB, contexts=(1000,), bytes_per_s=2000 * step_bytes)
    assert row["decode_tok_per_s_1000"] == 2000
    assert row["missing"] == {}


def test_no_decode_limit_has_a_reason():
    assert "give BANDWIDTH_GB_S" in plan(GB)["missing"]["decode_tok_per_s_2048"]
    short = plan(-GB // 2, bytes_per_s=1e12)
    assert short["users_2048"] == 0 and short["decode_tok_per_s_2048"] is None
    assert "does not fit: 0.50 GB short" in short["missing"]["decode_tok_per_s_2048"]
    tight = plan(50_000, bytes_per_s=1e12)
    assert tight["largest_context"] == 50
    assert "2,048 tokens does not fit" in tight["missing"]["decode_tok_per_s_2048"]


def test_more_memory_never_holds_less():
    rows = [plan(left, contexts=(50, 1000)) for left in range(-10_000, 6_000_000, 10_000)]
    for key in ("largest_context", "users_50", "users_1000"):
        values = [row[key] for row in rows]
        assert values == sorted(values) and values[0] == 0 < values[-1]


@pytest.mark.parametrize(
    ("form", "total", "experts"),
    [
        ("bfloat16", 2_000_000_000, 1_600_000_000),
        ("mxfp4", 200_000_000 * 2 + 425_000_000, 425_000_000),  # 0.8 billion x 4.25 bits
        ("8-bit", 150_000_000 * 2 + 863_281_250, 812_500_000),  # 0.85 and 0.8 billion x 8.125
        ("4-bit", 150_000_000 * 2 + 441_601_562, 415_625_000),  # x 4.15625
    ],
)
def test_weights_by_hand(form, total, experts):
    card = formats.held_as(CARD, formats.FORMS[form])
    assert (card.weight_bytes, card.routed_bytes) == (total, experts)
    assert (card.lookup_bytes, card.kv_bytes(1)) == (CARD.lookup_bytes, CARD.kv_bytes(1))


def test_experts_only_leaves_a_dense_model_unanswered():
    with pytest.raises(ModelError, match="toy has no routed experts"):
        formats.held_as(replace(CARD, expert_matrix_params=0), formats.FORMS["mxfp4"])


BARE = replace(CARD, context_limit=None, kv_layers=())
BLOCKS = replace(BARE, kv_blocks=(Block(4, full_bytes=100, left_bytes=100),))


@pytest.mark.parametrize(
    ("card", "free", "tokens"),
    [
        (CARD, 99_999, 99),  # 1,000 bytes each
        (CARD, 100_000, 100),
        (CARD, 100_499, 100),  # the 101st takes 500
        (CARD, 10**9, 10_000),  # the model's own limit
        (BLOCKS, 299, 0),  # before a block of four is full, three tokens of 100 are held
        (BLOCKS, 300, 3),
        (BLOCKS, 399, 3),
        (BLOCKS, 400, 7),  # a full block, and three tokens
        (BARE, 0, 2**30),  # nothing grows
    ],
)
def test_the_largest_context_by_hand(card, free, tokens):
    assert fit.largest_context(card, free) == tokens


def test_a_cache_that_does_not_grow_limits_nothing():
    row = plan(0, BARE, contexts=())
    assert (row["largest_context"], row["limited_by"]) == (None, "nothing")
    assert row["missing"] == {
        "largest_context": "no cache grows without end, and the model states no limit"
    }
    assert plan(7, replace(BARE, context_limit=5), contexts=())["largest_context"] == 5


def test_what_a_token_takes_where_blocks_are_kept():
    """Four tokens in a block of 100 bytes are 25 a token; the first on its own takes 100."""
    row = plan(1000, replace(BLOCKS, state_bytes=7), contexts=())
    assert (row["token_bytes"], row["token_beyond_window_bytes"], row["state_bytes"]) == (
        100,
        25,
        7,
    )


@pytest.mark.parametrize(
    ("left", "users"), [(-1, 0), (0, 0), (549_999, 0), (550_000, 1), (1_099_999, 1), (1_100_000, 2)]
)
def test_room_is_for_whole_users(left, users):
    """1,000 tokens take 1,000 x 250 x 2 bytes, and 100 x 250 x 2 in the window."""
    gpu_bytes = CARD.weight_bytes + RESERVE + left
    assert fit.room(CARD, gpu_bytes, 1000) == users
    assert fit.short_bytes(CARD, gpu_bytes) == -left
    assert plan(left, contexts=(1000,))["users_1000"] == users


def test_the_line_that_room_reads_bends_at_the_window_and_ends_at_the_limit():
    line = fit.line(CARD)
    assert line["fixed_bytes"] == 2 * GB + RESERVE
    assert line["user_bytes"] == [[0, 0], [100, 100_000], [10_000, 100_000 + 9_900 * 500]]
    assert [n for n, _ in fit.line(BARE)["user_bytes"]] == [0, 2**30]


@pytest.mark.parametrize(
    ("left", "contexts", "options", "why"),
    [
        (0, (1000,), {"bytes_per_s": 1.0}, "does not fit: 0.00 GB short, before any cache"),
        (1, (1000,), {"bytes_per_s": 1.0}, "a sequence of 1,000 tokens does not fit"),
        (549_999, (1000,), {"bytes_per_s": 1.0}, "a sequence of 1,000 tokens does not fit"),
        (550_000, (1000,), {}, "no decode limit without a bandwidth: give BANDWIDTH_GB_S"),
        (550_000, (1000,), {"bytes_per_s": 1.0}, None),
        (GB, (10_000,), {"bytes_per_s": 1.0}, None),
        (GB, (10_001,), {"bytes_per_s": 1.0},
         "10,001 tokens are beyond the model's own limit of 10,000"),
    ],
)  # fmt: skip
def test_the_reason_of_no_decode_limit(left, contexts, options, why):
    row = plan(left, contexts=contexts, **options)
    assert row["missing"].get(f"decode_tok_per_s_{contexts[0]}") == why
    assert (row[f"decode_tok_per_s_{contexts[0]}"] is None) == bool(why)


def test_a_workspace_is_asked_for_up_to_the_models_limit():
    row = plan(GB, contexts=(10_000,), workspace=lambda tokens: tokens)
    assert row["workspace_bytes_10000"] == 10_000
    own = 10_000 * 500 + 100 * 500
    assert (row["users_in_turn_10000"], row["users_10000"]) == (GB // own, GB // (own + 10_000))
    # One user fits, and none with the workspace of its prefill.
    tight = plan(550_000, contexts=(1000,), workspace=lambda tokens: 1)
    assert (tight["users_in_turn_1000"], tight["users_1000"]) == (1, 0)


def toy(**options):
    """The toy on a GPU of 4 GB at 1,000 GB/s: 0.8 GB are left beside bfloat16 weights."""
    given = {"gpu_gb": 4, "forms": ("bfloat16", "4-bit"), "bandwidth_gb_s": 1000}
    given |= {"contexts": (1000, 20_000)}
    return fit.answer(lambda dtype: options.get("card", CARD), **(given | options.get("more", {})))


def cells(text):
    return {line[:36].strip(): line[36:].split() for line in text.splitlines() if line[36:]}


def test_an_answer_in_bytes_by_hand():
    result = toy()
    assert (result["gpu_bytes"], result["bandwidth_bytes_per_s"]) == (4 * GB, 1000 * GB)
    assert result["weights"]["bfloat16"]["left_bytes"] == 4 * GB - 2 * GB - RESERVE
    assert toy(more={"bandwidth_gb_s": None})["bandwidth_bytes_per_s"] is None
    for wrong in (
        {"gpu_gb": float("inf")},
        {"gpu_gb": 0},
        {"bandwidth_gb_s": 0},
        {"contexts": (0,)},
    ):
        with pytest.raises(ParamsError, match="give GPU_GB, BANDWIDTH_GB_S and CONTEXT above 0"):
            toy(more=wrong)
    assert toy(more={"gpu_gb": 0.5, "bandwidth_gb_s": 0.5, "contexts": (1,)})["gpu_bytes"] == GB / 2


def test_the_table_of_a_toy_by_hand():
    text = fit.text(toy(more={"workspace_of": lambda dtype, tokens: 1000 * tokens}))
    four_bit = 741_601_562  # bytes, see above; of its reserve 5 % are 0.037 GB
    left = 4 * GB - four_bit - 600_000_000 - 500_000_000 - 37_080_078
    table = cells(text)
    assert table["weights (GB)"] == ["2.00", "0.74"]
    assert table["reserve (GB)"] == ["1.20", "1.14"]
    assert table["left for the cache (GB)"] == ["0.80", f"{left / 1e9:.2f}"] == ["0.80", "2.12"]
    assert table["cache of one token (kB)"] == ["1.00", "1.00"]
    assert table["beyond the window (kB)"] == ["0.50", "0.50"]
    assert table["largest context at batch 1 (tokens)"] == ["10,000", "10,000"]
    assert table["prefill of one of 1,000 (GB)"] == ["0.001", "0.001"]
    # 0.8 GB of 550,000 and 1,000,000 bytes; in turn of 550,000.
    assert table["users at 1,000 tokens each"][0] == "516"
    assert table["prefilled in turn"][0] == f"{800_000_000 // 550_000:,}" == "1,454"
    assert table["users at 20,000 tokens each"] == ["-", "-"]
    # 0.6 GB of weights and 549,500 bytes of cache a step.
    assert table["decode limit at 1,000 (tok/s)"][0] == f"{1e12 / 600_549_500:,.1f}" == "1,665.1"
    assert table["decode limit at 20,000 (tok/s)"] == ["-", "-"]


def test_the_table_divides_by_what_its_units_say():
    """10^18 bytes are 10^9 GB to the last digit."""
    result, big = toy(more={"workspace_of": lambda dtype, tokens: tokens}), 10**18
    sizes = ("weight_bytes", "reserve_bytes", "left_bytes", "workspace_bytes_1000")
    small = ("token_bytes", "token_beyond_window_bytes", "state_bytes")
    result["weights"]["bfloat16"] |= dict.fromkeys((*sizes, *small), big)
    result["card"] |= {"total_params": big, "active_params": 2 * big, "state_bytes": 1}
    text = fit.text(result | {"bandwidth_bytes_per_s": big})
    table, billion = cells(text), "1,000,000,000"
    titles = ("weights (GB)", "reserve (GB)", "left for the cache (GB)")
    assert [table[title][0] for title in titles] == [f"{billion}.00"] * 3
    assert table["prefill of one of 1,000 (GB)"][0] == f"{billion}.000"
    assert table["state of a sequence (MB)"][0] == f"{billion},000.00"
    for title in ("cache of one token (kB)", "beyond the window (kB)"):
        assert table[title][0] == f"{billion},000,000.00"
    assert "1000000000.000 B parameters, 2000000000.000 B active" in text
    assert f"GPU of 4 GB, {billion} GB/s" in text
    why = plan(-big, bytes_per_s=1.0, contexts=(1,))["missing"]["decode_tok_per_s_1"]
    assert why == "does not fit: 1000000000.00 GB short, before any cache"


def test_the_columns_stand_under_their_forms_and_notes_are_folded():
    lines = fit.text(toy()).partition("\n\n")[2].splitlines()  # after the answer
    assert lines[3] == " " * 36 + "   bfloat16      4-bit"
    assert lines[4] == f"{'weights (GB)':36}" + "       2.00       0.74"
    assert max(map(len, lines[4:])) <= 96


def test_the_card_is_that_of_the_last_form():
    forms = ("bfloat16", "float16", "float32")
    result = fit.answer(lambda dtype: replace(CARD, dtype=dtype), gpu_gb=4, forms=forms)
    assert result["card"]["dtype"] == "float32" and list(result["weights"]) == list(forms)
    assert result["contexts"] == [2048, 8192, 32768]
    assert {f"users_{n}" for n in (2048, 8192, 32768)} < plan(GB).keys()


@pytest.mark.parametrize(
    ("title", "card"),
    [
        ("beyond the window (kB)", replace(CARD, kv_layers=((250, None),))),
        ("state of a sequence (MB)", CARD),
    ],
)
def test_a_line_of_the_table_that_no_form_has_is_left_out(title, card):
    assert title not in cells(fit.text(toy(card=card)))


def test_blocks_and_states_have_their_lines():
    table = cells(fit.text(toy(card=replace(BLOCKS, state_bytes=3_000_000))))
    assert table["state of a sequence (MB)"] == ["3.00", "3.00"]
    assert table["beyond the window (kB)"] == ["0.03", "0.03"]  # 25 bytes


def test_the_head_and_the_notes_of_the_table():
    text = " ".join(fit.text(toy()).partition("\n\n")[2].split())
    assert text.startswith(
        "toy (toy): 1.000 B parameters, 0.300 B active; the model's own context limit: "
        "10,000 tokens GPU of 4 GB, 1,000 GB/s"
    )
    assert "window: 1 of 2 layers keep the last 100 tokens only" in text
    assert "reserve: 0.6 GB for the CUDA context, 0.5 GB and 5% of the weights" in text
    assert "bfloat16, 4-bit: 20,000 tokens are beyond the model's own limit" in text
    assert formats.KEPT.split()[0] in text
    plain = toy(card=replace(CARD, context_limit=None), more={"bandwidth_gb_s": None})
    text = " ".join(fit.text(plain).split())
    assert "context limit: not stated GPU of 4 GB bfloat16" in text
    assert "decode limit at" not in text


def test_contexts_are_a_list_of_whole_numbers():
    assert fit.tokens("2048, 8192") == (2048, 8192)


def test_users_are_prefilled_together_and_their_workspace_counts():
    """1,000 tokens keep 300,000 bytes: 250 a token, and 250 for the last 100 or so."""
    one = CARD.kv_bytes(1000, cache="static")
    row = plan(10 * one, contexts=(1000,), workspace=lambda tokens: tokens * one // 1000)
    assert (row["users_1000"], row["users_in_turn_1000"]) == (5, 10)
    assert row["workspace_bytes_1000"] == one
    assert plan(10 * one, contexts=(1000,))["users_1000"] == 10  # nothing is known of it
    unknown = plan(10 * one, contexts=(1000,), workspace=lambda tokens: "RuntimeError: x")
    assert unknown["users_1000"] == 10
    assert "workspace is not known: Runtime" in unknown["missing"]["workspace_bytes_1000"]
    for left, tokens in ((-1, 1000), (one - 1, 1000), (10 * one, 20_000)):  # none asks for it
        plan(left, contexts=(tokens,), workspace=lambda tokens: pytest.fail("asked"))
