"""The first line of `make fit`: yes or no, what is needed, and what people write for it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import pytest

from lib.__main__ import main
from lib.analysis import fit
from lib.measure.memory import forecast
from lib.models import formats, load
from lib.run import options
from tests.analysis.test_fit import CARD, GB, RESERVE


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
    assert options.gigabytes(text) == pytest.approx(gb, abs=0.01)


@pytest.mark.parametrize("text", ["GB", "-1GB", "24 TB", "1e9GB", "24GBs", ""])
def test_memory_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of GB"):
        options.gigabytes(text)


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
