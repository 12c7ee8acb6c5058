"""Will it fit: published models and their sizes, and what cannot be computed."""

import json
from functools import partial

import pytest
from transformers import OpenAIGPTConfig

from lib.__main__ import main
from lib.analysis import fit, predictions
from lib.files import ROOT, ParamsError
from lib.measure.memory import forecast
from lib.models import formats, load
from lib.models.card import ModelError
from lib.records.store import load_tree

GB = 10**9


@pytest.fixture(scope="module")
def gpt_oss():
    return fit.answer(partial(load.card, "gpt-oss-20b"), gpu_gb=80)["weights"]


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
