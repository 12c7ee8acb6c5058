"""Weights drawn by name: the same wherever, whole or in parts, as the library would spread them."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lib.hardware.device import open_device
from lib.models import draws, load
from lib.models.draws import Draw, Law
from lib.models.origin import config_of, find

NORMAL = Law("normal", 0.0, 0.02)
MATRIX = Draw("model.layers.3.self_attn.q_proj.weight", (50, 33), "float32", NORMAL)


def tiny(name="tiny-gpt-oss"):
    return config_of(find(name))


def split_mix(key: int, place: int) -> int:
    """SplitMix64 as its authors wrote it, one number at a time."""
    z = (key + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_each_value_is_the_quantile_that_its_sixteen_bits_name():
    values = draws.tensor(MATRIX, seed=7).flatten()
    key = draws.key_of(7, MATRIX.name)
    for place in (0, 1, 2, 3, 4, 777, 1649):
        sixteen = split_mix(key, place // 4) >> 16 * (place % 4) & 0xFFFF
        expected = 0.02 * NormalDist().inv_cdf((sixteen + 0.5) / 65536)
        assert values[place].item() == pytest.approx(expected, rel=1e-6)


def test_the_generator_is_the_published_one():
    """The first numbers of SplitMix64 from seed 1234567."""
    found = [split_mix(1234567, place) for place in range(2)]
    assert found == [6457827717110365317, 3203168211198807973]


def test_name_and_seed_decide_and_nothing_else_does():
    whole = draws.tensor(MATRIX, seed=0)
    torch.manual_seed(1)
    assert torch.equal(draws.tensor(MATRIX, seed=0), whole)
    other = Draw(MATRIX.name.replace("3", "4"), MATRIX.shape, MATRIX.dtype, MATRIX.law)
    assert not torch.equal(draws.tensor(other, seed=0), whole)
    assert not torch.equal(draws.tensor(MATRIX, seed=1), whole)


def test_another_dtype_is_the_same_draw_rounded():
    rounded = Draw(MATRIX.name, MATRIX.shape, "bfloat16", MATRIX.law)
    assert torch.equal(draws.tensor(rounded, 0), draws.tensor(MATRIX, 0).bfloat16())


@pytest.mark.parametrize("rows", [range(0, 50), range(1, 2), range(17, 43)])
def test_a_part_drawn_alone_is_the_part_of_the_whole(rows):
    """33 values a row: a part begins in the middle of a word of four."""
    whole = draws.tensor(MATRIX, 0)
    assert torch.equal(draws.tensor(MATRIX, 0, rows=rows), whole[rows.start : rows.stop])


def test_chunks_join_without_a_seam(monkeypatch):
    whole = draws.tensor(MATRIX, 0)
    monkeypatch.setattr(draws, "CHUNK_WORDS", 7)
    assert torch.equal(draws.tensor(MATRIX, 0), whole)


def test_a_tensor_that_is_not_contiguous_is_filled_in_its_own_order():
    target = torch.zeros(33, 50).T
    draws.fill(target, MATRIX.name, NORMAL, 0)
    assert torch.equal(target, draws.tensor(MATRIX, 0))


def test_the_law_is_kept():
    """A million values: mean within 5 sigma of zero, spread within 1 %, tails of a normal."""
    values = draws.tensor(Draw("x", (1000, 1000), "float32", NORMAL), 0)
    assert abs(values.mean()) < 5 * 0.02 / 1000
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert (values / 0.02).pow(4).mean() == pytest.approx(3.0, rel=0.03)
    low = draws.tensor(Draw("x", (1000, 1000), "float32", Law("uniform", -1.0, 3.0)), 0)
    assert low.min() >= -1 and low.max() <= 3 and low.mean() == pytest.approx(1.0, abs=0.01)


def test_two_tensors_do_not_resemble_each_other_nor_their_own_neighbours():
    first, second = (
        draws.tensor(Draw(name, (200_000,), "float32", Law("normal", 0.0, 1.0)), 0)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    )
    limit = 5 / 200_000**0.5
    assert abs((first * second).mean()) < limit
    for lag in (1, 2, 3, 4, 8):
        assert abs((first[lag:] * first[:-lag]).mean()) < limit


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(draws.DrawError, match="'orthogonal' cannot be drawn"):
        draws.tensor(Draw("x", (2, 2), "float32", Law("orthogonal", 0.0)), 0)
    with pytest.raises(draws.DrawError, match="not contiguous"):
        draws.tensor(MATRIX, 0, rows=range(0, 10, 2))


@pytest.mark.parametrize("name", ["tiny-gpt-oss", "tiny-qwen3", "tiny-yi"])
def test_the_meta_device_tells_the_laws_that_a_real_net_has(name):
    real, laws = draws.build(tiny(name), "float32", "cpu")
    assert draws.build(tiny(name), "float32", "meta")[1] == laws
    assert set(laws) == {name for name, _ in real.named_parameters()}
    assert {law.kind for law in laws.values()} == {"normal", "constant"}


def test_norms_stay_at_one_and_nothing_else_stays_at_zero():
    """As the workbook's random weights have been: 0.02 for what the library leaves at zero."""
    net, laws = draws.build(tiny(), "float32", "cpu")
    kept = draws.fill_net(net, laws, 0)
    assert all("norm" in name for name in kept)
    for name, parameter in net.named_parameters():
        if name in kept:
            assert (parameter == 1).all()
        else:
            assert laws[name] == NORMAL and parameter.std() < 0.04 and parameter.any()
    assert laws["model.layers.0.mlp.router.bias"] == NORMAL


def test_a_norm_that_stores_its_scale_minus_one_stays_at_zero():
    config = AutoConfig.for_model(
        "gemma", num_hidden_layers=1, hidden_size=32, intermediate_size=16, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    net, laws = draws.build(config, "float32", "cpu")
    assert "model.norm.weight" in draws.fill_net(net, laws, 0)
    assert not net.model.norm.weight.any() and net.model.layers[0].mlp.up_proj.weight.any()


def test_a_net_and_a_plan_give_the_same_weights():
    net, laws = draws.build(tiny(), "bfloat16", "cpu")
    draws.fill_net(net, laws, 3)
    wanted, seed = draws.restore(draws.save(draws.plan_of(net, laws), 3))
    drawn = {draw.name: draws.tensor(draw, seed) for draw in wanted}
    for name, parameter in net.named_parameters():
        assert torch.equal(drawn[name], parameter), name


def test_a_plan_refuses_what_it_cannot_promise():
    config = AutoConfig.for_model("mamba", num_hidden_layers=1, hidden_size=16, vocab_size=32)
    with pytest.raises(draws.DrawError, match="A_log"):
        draws.plan_of(*draws.build(config, "float32", "meta"))
    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=1, hidden_size=32, num_experts=4, vocab_size=64
    )
    with pytest.raises(draws.DrawError, match="does not store .*experts"):
        draws.plan_of(*draws.build(config, "float32", "meta"))
    text = draws.save([MATRIX], 0).replace(draws.GENERATOR, "another")
    with pytest.raises(draws.DrawError, match="'another'"):
        draws.restore(text)


def test_the_digest_names_the_weights():
    other = Draw(MATRIX.name, (33, 50), MATRIX.dtype, MATRIX.law)
    names = {draws.digest([MATRIX], 0), draws.digest([MATRIX], 1), draws.digest([other], 0)}
    assert len(names) == 3 and draws.digest([MATRIX], 0) in names


def test_the_routers_of_a_drawn_mixture_do_not_collapse():
    """48 tokens of each layer choose nearly all of 8 experts between them, in many pairs."""
    net, laws = draws.build(tiny(), "float32", "cpu")
    draws.fill_net(net, laws, 0)
    choices = []
    for layer in net.model.layers:
        layer.mlp.router.register_forward_hook(lambda m, i, out: choices.append(out[2]))
    with torch.no_grad():
        net(torch.arange(48)[None])
    assert len(choices) == 4
    for chosen in choices:
        assert len(chosen.unique()) >= 6
        assert len({tuple(sorted(row)) for row in chosen.tolist()}) > 5


def test_mxfp4_rounds_to_the_nearest_and_ties_to_even():
    """A block whose largest value is 6: the scale is one, the grid 0, .5, 1, 1.5, 2, 3, 4, 6."""
    row = torch.zeros(1, 32)
    row[0, :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 2.4, -2.5, 3.5, -5.1])
    blocks, scales = draws.to_mxfp4(row)
    assert scales.tolist() == [[127]] and blocks.shape == (1, 1, 16)
    back = draws.from_mxfp4(blocks, scales, torch.float32)[0, :8].tolist()
    assert back == [6.0, 0.0, 1.0, 1.0, 2.0, -2.0, 4.0, -6.0]


def test_mxfp4_scales_a_block_by_a_power_of_two():
    row = torch.zeros(2, 32)
    row[0, 0], row[1, 0] = 0.019, 48.0  # in the binades of 2**-6 and 2**5: 4 to 6 of 2**-8, 2**3
    blocks, scales = draws.to_mxfp4(row)
    assert scales.flatten().tolist() == [127 - 8, 127 + 3]
    back = draws.from_mxfp4(blocks, scales, torch.float32)
    assert back[:, 0].tolist() == [4 * 2**-8, 48.0]
    with pytest.raises(draws.DrawError, match="not 33"):
        draws.to_mxfp4(torch.zeros(1, 33))


def test_experts_in_mxfp4_are_what_the_library_reads():
    weight = draws.tensor(Draw("e", (3, 64, 96), "bfloat16", NORMAL), 0)
    stored = dict(draws.in_mxfp4("layer.experts.gate_up_proj", weight))
    blocks = stored["layer.experts.gate_up_proj_blocks"]
    scales = stored["layer.experts.gate_up_proj_scales"]
    assert blocks.shape == (3, 96, 2, 16) and scales.shape == (3, 96, 2)
    read = convert_moe_packed_tensors(blocks, scales)
    net = torch.nn.Module()
    net.mlp = torch.nn.Module()
    net.mlp.experts = torch.nn.Module()
    net.mlp.experts.gate_up_proj = torch.nn.Parameter(weight.clone())
    assert draws.round_to_mxfp4(net) == ["mlp.experts.gate_up_proj"]
    assert torch.equal(net.mlp.experts.gate_up_proj, read)
    error = (read.float() - weight.float()).norm() / weight.float().norm()
    assert 0.05 < error < 0.15


def test_weights_of_today_have_the_same_law():
    """What `models.load` draws now, tensor for tensor, spreads as the drawn ones do."""
    model = load.load("tiny-gpt-oss", dtype="float32", device=open_device("cpu"))
    net, laws = draws.build(tiny(), "float32", "cpu")
    draws.fill_net(net, laws, 0)
    for (name, old), (_, new) in zip(
        model.net.named_parameters(), net.named_parameters(), strict=True
    ):
        if old.numel() > 4000:
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.1), name
