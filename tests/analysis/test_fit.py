"""Will it fit: a card made by hand, published sizes, and what cannot be computed."""

import argparse
import json
from dataclasses import replace
from functools import partial

import pytest
from transformers import OpenAIGPTConfig

from lib.__main__ import main
from lib.analysis import fit, predictions
from lib.files import ROOT, ParamsError
from lib.measure.memory import forecast
from lib.models import formats, load
from lib.models.card import ModelCard, ModelError
from lib.records.store import load_tree
from lib.run import options

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


@pytest.fixture(scope="module")
def gpt_oss():
    return fit.answer(partial(load.card, "gpt-oss-20b"), gpu_gb=80)["weights"]


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


def test_gpt_oss_20b_fits_80_gb_and_not_24(gpt_oss):
    assert gpt_oss["bfloat16"]["left_bytes"] > 0 and gpt_oss["bfloat16"]["users_32768"] > 0
    assert gpt_oss["float32"]["left_bytes"] < 0
    small = fit.answer(partial(load.card, "gpt-oss-20b"), gpu_gb=24, forms=("bfloat16", "mxfp4"))[
        "weights"
    ]
    assert small["bfloat16"]["left_bytes"] < 0 < small["mxfp4"]["left_bytes"]
    assert small["bfloat16"]["users_2048"] == small["bfloat16"]["largest_context"] == 0


def test_mxfp4_of_gpt_oss_is_the_published_size(gpt_oss):
    size = gpt_oss["mxfp4"]["weight_bytes"]
    assert size == 13_761_264_768  # total_size in the repository's index of tensors
    assert 11.27 < size / 2**30 < 12.88  # as GGUF with a smaller table; as loaded by a server
    experts = 24 * 32 * 3 * 2880 * 2880
    assert size == 2 * (20_914_757_184 - experts) + experts * 17 // 32
    larger = fit.answer(partial(load.card, "gpt-oss-120b"), gpu_gb=80, forms=("mxfp4",))["weights"][
        "mxfp4"
    ]
    assert larger["weight_bytes"] == 65_248_815_744 and larger["left_bytes"] > 0


def test_qwen3_32b_on_80_gb_by_hand():
    row = fit.answer(partial(load.card, "Qwen3-32B"), gpu_gb=80, forms=("bfloat16",))["weights"][
        "bfloat16"
    ]
    per_token = 64 * 2 * 8 * 128 * 2  # layers, keys and values, heads, elements, bytes
    left = 80 * GB - 65_524_246_528 - (600_000_000 + 500_000_000 + 3_276_212_326)
    assert (row["token_bytes"], row["left_bytes"]) == (per_token, left) == (262_144, 10_099_541_146)
    assert row["users_2048"] == left // (2048 * per_token) == 18
    assert (row["users_8192"], row["users_32768"]) == (4, 1)
    assert row["largest_context"] == left // per_token == 38_526


def test_float32_doubles_weights_and_cache(gpt_oss):
    for key in ("weight_bytes", "token_bytes"):
        assert gpt_oss["float32"][key] == 2 * gpt_oss["bfloat16"][key]


def test_an_unknown_cache_is_named_and_the_weights_are_told(tmp_path, capsys):
    """A folder with a configuration and no weights is enough."""
    OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=16).save_pretrained(tmp_path)
    assert main(["fit", "--model", str(tmp_path), "--gpu-gb", "8"]) == 0
    text = capsys.readouterr().out
    assert "cache is unknown, because it keeps nothing" in " ".join(text.split())
    row = fit.answer(partial(load.card, str(tmp_path)), gpu_gb=8)["weights"]["bfloat16"]
    assert row["weight_bytes"] > 0 and "users_2048" not in row and row["missing"]["users"]


def test_the_table(capsys):
    command = ["--model", "gpt-oss-20b", "--gpu-gb", "80", "--bandwidth-gb-s", "3350"]
    assert main(["fit", *command, "--dtype", "bfloat16,mxfp4", "--context", "2048"]) == 0
    lines = {line[:36].strip(): line[36:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["weights (GB)"] == ["41.83", "13.76"]
    assert lines["cache of one token (kB)"] == ["49.15", "49.15"]
    assert lines["beyond the window (kB)"] == ["24.58", "24.58"]
    assert lines["largest context at batch 1 (tokens)"] == ["131,072", "131,072"]
    assert lines["users at 2,048 tokens each"] == ["19", "35"]
    assert lines["prefilled in turn"] == ["654", "1,205"]
    assert lines["decode limit at 2,048 (tok/s)"] == ["460.8", "890.6"]
    assert "users at 8,192 tokens each" not in lines


def test_json_is_the_answer(capsys):
    assert main(["fit", "--model", "tiny-yi", "--gpu-gb", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fit.answer(
        partial(load.card, "tiny-yi"), gpu_gb=8, workspace_of=forecast.workspace_of("tiny-yi")
    )


def test_what_the_released_set_measured_stands_among_the_notes(capsys, monkeypatch):
    monkeypatch.setattr(predictions, "released_lines", lambda name: [f"measured: {name}"])
    assert main(["fit", "--model", "tiny-yi", "--gpu-gb", "8"]) == 0
    assert "- measured: tiny-yi" in capsys.readouterr().out


def test_errors_name_value_and_remedy(capsys, monkeypatch):
    with pytest.raises(ParamsError, match="unknown dtype 'bfloat'; did you mean 'bfloat16'"):
        fit.answer(partial(load.card, "tiny-yi"), gpu_gb=8, forms=("bfloat",))
    for wrong in ({"gpu_gb": -8}, {"gpu_gb": 8, "contexts": (0,)}, {"gpu_gb": float("nan")}):
        with pytest.raises(ParamsError, match=r"(-8|0|nan): give GPU_GB, .* above 0"):
            fit.answer(partial(load.card, "tiny-yi"), **wrong)
    assert main(["fit", "--model", "gpt-oss-2b", "--gpu-gb", "8"]) == 2
    assert "did you mean gpt-oss-20b" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["fit", "--model", "nobody/nothing", "--gpu-gb", "8"]) == 2
    assert "HF_HUB_OFFLINE is set, and nobody/nothing" in capsys.readouterr().err
    assert main(["fit", "--model", "tiny-yi"]) == 2
    assert "MODEL and GPU_GB are needed" in capsys.readouterr().err


def test_a_form_that_is_not_timed_says_what_its_bytes_would_allow():
    card = load.card("gpt-oss-20b")
    text = str(formats.not_run(card, "mxfp4", 2048))
    held = formats.held_as(card, formats.FORMS["mxfp4"]).decode_bytes(2048)
    assert "package kernels" in text and f"{held / 1e9:.3g} GB" in text
    assert f"{card.decode_bytes(2048) / held:.2f} times the bfloat16 bound" in text
    with pytest.raises(ModelError, match="no routed experts"):
        formats.not_run(load.card("tiny-yi"), "mxfp4", 64)


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


def test_the_forecast_agrees_with_what_ran_and_what_ran_out_of_memory():
    """On the H100 of the released set, Qwen3-32B: 32 of 512 + 48 tokens ran, 64 did not fit."""
    released = ROOT / "outputs" / "released"
    arms = [r for r in load_tree(released / "h100-sxm") if r.kind == "batch"]
    arms = [r for r in arms if r.key["model"] == "Qwen3-32B" and r.key["stack"] == "graph-compiled"]
    ran = max(r.key["batch"] for r in arms if not r.error)
    failed = min(r.key["batch"] for r in arms if r.error)
    row = fit.answer(
        partial(load.card, "Qwen3-32B"),
        gpu_gb=85.017493504,
        forms=("bfloat16",),
        contexts=(560,),
        workspace_of=forecast.workspace_of("Qwen3-32B"),
    )["weights"]["bfloat16"]
    assert (ran, failed) == (32, 64) and ran <= row["users_560"] < failed
    assert row["users_in_turn_560"] > failed  # which is what was promised before
    (line,) = [x for x in predictions.released_lines("Qwen3-32B") if "on graph-compiled, b" in x]
    assert "512 tokens" in line and "32 with 48 new ones ran, 64 failed (OutOfMemoryError" in line


def test_what_a_prefill_holds_grows_with_its_tokens_and_is_a_reason_where_it_does_not_run():
    workspace = forecast.workspace_of("tiny-yi")
    few, many = (workspace("bfloat16", n) for n in (100, 400))
    assert 0 < few < many <= 4.5 * few
    assert isinstance(forecast.workspace_of("nobody-here")("bfloat16", 10), str)


def led(card=CARD, *, gpu_gb, forms=("bfloat16",), contexts=(2000,)):
    return fit.lead(fit.answer(lambda dtype: card, gpu_gb=gpu_gb, forms=forms, contexts=contexts))


def test_the_answer_is_yes_with_the_room_and_the_smallest_card():
    """2 GB of weights, 1.2 in reserve, 2,000 tokens of 500 bytes and 100 of the same: 1.05 MB."""
    assert led(gpu_gb=4) == (
        "Yes: toy fits 4 GB in bfloat16, with room for 761 users of 2,000 tokens. It needs 3.2 GB "
        "for one user of 2,000 tokens; the smallest card: NVIDIA L4 or NVIDIA A10 (24 GB)."
    )


def test_the_answer_is_no_with_what_is_lacking():
    text = led(gpu_gb=3)
    assert text.startswith("No: toy does not fit 3 GB; 0.2 GB are lacking. It needs at least 3.2")
    huge = replace(CARD, weight_bytes=1000 * GB)
    assert "no single card here has that, the largest 180 GB" in led(huge, gpu_gb=80)


def test_the_usual_form_answers_where_it_fits_and_another_one_where_only_that_does():
    """4.156 bits of 850 million weights save 1.26 of 2 GB; the reserve stays that of 5 %."""
    assert "Yes: toy fits 4 GB in bfloat16" in led(gpu_gb=4, forms=("4-bit", "bfloat16"))
    text = led(gpu_gb=2, forms=("bfloat16", "4-bit"))
    assert text.startswith("Yes: toy fits 2 GB in 4-bit")
    assert "; in bfloat16 it would need 3.2 GB." in text
    assert "in 4-bit, the smallest form asked for," in led(gpu_gb=1, forms=("bfloat16", "4-bit"))


def test_yes_and_no_change_where_the_need_does():
    need = fit.answer(lambda dtype: CARD, gpu_gb=4, forms=("bfloat16",), contexts=(2000,))
    bytes_needed = need["answer"]["need_bytes"]
    assert bytes_needed == CARD.weight_bytes + RESERVE + CARD.kv_bytes(2000, cache="static")
    for gpu_bytes, fits in ((bytes_needed, True), (bytes_needed - 1, False)):
        plan_of = fit.answer(lambda dtype: CARD, gpu_gb=gpu_bytes / 1e9, forms=("bfloat16",),
                             contexts=(2000,))  # fmt: skip
        assert plan_of["answer"]["fits"] is fits
        assert (plan_of["weights"]["bfloat16"]["users_2000"] >= 1) is fits


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("4-bit", "4-bit"), ("4bit", "4-bit"), ("4 bit", "4-bit"), ("INT4", "4-bit"),
        ("Q4_K_M", "4-bit"), ("8bit", "8-bit"), ("BF16", "bfloat16"), ("fp16", "float16"),
        ("16-bit", "bfloat16"), ("MXFP4", "mxfp4"), ("FP8", "fp8"), ("float32", "float32"),
    ],
)  # fmt: skip
def test_number_formats_as_people_write_them(text, form):
    assert formats.listed(text) == [form]
    assert formats.listed(f"{text}, bf16") == [form, "bfloat16"]


@pytest.mark.parametrize(
    ("text", "gb"),
    [("24", 24), ("24GB", 24), ("24 gb", 24), ("24G", 24), ("1GiB", 1.074), ("79.6 GiB", 85.47)],
)
def test_memory_as_people_write_it(text, gb):
    assert options.GB(text) == pytest.approx(gb, abs=0.01)


@pytest.mark.parametrize("text", ["GB", "-1GB", "24 TB", "1e9GB", "24GBs", ""])
def test_memory_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of GB"):
        options.GB(text)


def test_a_popular_model_needs_no_hub_and_says_so(capsys, monkeypatch):
    """Neither a request nor a cache: asking the hub's configuration would raise here."""
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    command = ["fit", "--model", "qwen3-0.6b", "--gpu-gb", "24GB", "--dtype", "4bit,bf16"]
    assert main([*command, "--context", "2048"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Yes: Qwen/Qwen3-0.6B fits 24 GB in bfloat16")
    assert "shapes ship with the workbook, the hub was not asked: mlc-ai/mlc-llm" in out


def test_a_folder_with_a_configuration_alone_is_enough(tmp_path, capsys):
    config = load.config_of(load.find("tiny-yi"))
    (tmp_path / "mine").mkdir()
    config.save_pretrained(tmp_path / "mine")
    assert main(["fit", "--model", str(tmp_path / "mine"), "--gpu-gb", "24GB"]) == 0
    assert capsys.readouterr().out.startswith("Yes: mine fits 24 GB in bfloat16")
    assert main(["fit", "--model", "no-such-model", "--gpu-gb", "24GB"]) == 2
    assert "a folder with a config.json alone will do" in capsys.readouterr().err


def test_the_answer_agrees_with_what_was_measured():
    """Qwen3-32B in bfloat16 ran on the released set's H100, whose memory is 85.0 GB, and no card of
    its weights' 65.5 GB could hold it."""
    answer = fit.answer(partial(load.card, "Qwen3-32B"), gpu_gb=85.0, forms=("bfloat16",),
                        workspace_of=forecast.workspace_of("Qwen3-32B"))  # fmt: skip
    assert answer["answer"]["fits"] and answer["answer"]["need_bytes"] > 65.5e9
    small = fit.answer(partial(load.card, "Qwen3-32B"), gpu_gb=65.5, forms=("bfloat16",))
    assert not small["answer"]["fits"]
