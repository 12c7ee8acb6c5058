"""Memory foretold from shapes: storages counted by hand, and the live set of all experts."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig

from lib.hardware.live_tensors import Live
from lib.measure.memory import forecast
from lib.models import dry_run, experts
from lib.models.origin import config_of, find

MIB = 2**20


# --- counting storages


def test_a_storage_lives_from_its_operation_to_its_last_tensor():
    with Live() as live:
        a = torch.zeros(100)
        view = a[10:].view(9, 10)
        assert live.bytes == 400  # a view is the same storage
        del a
        assert live.bytes == 400
        b = view + 1
        assert (live.bytes, live.peak_bytes) == (400 + 360, 760)
        del view
        b.add_(1)  # in place: nothing new
        assert (live.bytes, live.peak_bytes) == (360, 760)
        assert live.step() == (360, 760) and live.step() == (360, 360)


def test_what_lived_before_counts_as_nothing():
    weight = torch.ones(50)
    with Live() as live:
        part = weight[3:]
        double = part * 2
        assert live.bytes == double.nbytes
    assert part.numel() == 47


def test_storages_are_rounded_up_to_blocks():
    with Live(block=512) as live:
        tensors = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    assert live.bytes == 512 + 512 + 1024 and len(tensors) == 3


def test_the_meta_device_counts_what_would_not_fit():
    with Live() as live:
        huge = torch.empty(10**6, 10**6, device="meta")
        _ = (huge + 1) * 2  # the sum lives until the product is made
    assert live.peak_bytes == 3 * 4 * 10**12


# --- one forward pass


def llama(**changes):
    return AutoConfig.for_model(
        "llama",
        **{
            "hidden_size": 64,
            "intermediate_size": 4096,
            "num_hidden_layers": 3,
            "vocab_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **changes,
        },
    )


def twin_of(config):
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return dry_run.twin_of(net)


def test_a_wide_feed_forward_peaks_in_the_last_layer():
    """SiLU of the gate, up and their product; the cache of all layers; the rotary tables; and four
    hidden states: the embeddings, the layer's input, the sum with attention, and its norm."""
    tokens = 1000
    inner, hidden, cache = 2 * 4096 * tokens, 2 * 64 * tokens, 3 * 2 * 2 * 2 * 16 * tokens
    tables = 2 * 2 * 16 * tokens
    peak = forecast.prefill_bytes(twin_of(llama()), tokens, all_logits=False)
    assert peak == pytest.approx(3 * inner + 4 * hidden + cache + tables, rel=0.001)


def test_logits_of_all_positions_or_of_the_last():
    """A vocabulary so large that the logits are the peak; the last hidden state is alive."""
    config, tokens = llama(vocab_size=100_000, intermediate_size=64), 1000
    twin = twin_of(config)
    cache, hidden = 3 * 2 * 2 * 2 * 16 * tokens, 2 * 64 * tokens
    every = forecast.prefill_bytes(twin, tokens, all_logits=True)
    assert every == pytest.approx(2 * 100_000 * tokens + cache + hidden, rel=0.001)
    assert forecast.logits_bytes(twin, tokens) == 2 * 100_000 * tokens
    assert forecast.prefill_bytes(twin, tokens, all_logits=False) < every / 100


def test_a_decode_step_holds_the_cache_and_one_layer_twice():
    """The longer keys and values of a layer are made while the shorter ones still live."""
    tokens = 10_000
    layer = 2 * 2 * 2 * 16 * tokens
    peak = forecast.decode_bytes(twin_of(llama()), tokens)
    assert peak == pytest.approx(3 * layer + layer / 2, rel=0.05)


def test_a_sliding_layer_holds_its_window_after_the_first_step():
    config = AutoConfig.for_model(
        "mistral",
        sliding_window=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    twin = twin_of(config)
    long, short = (forecast.decode_bytes(twin, tokens) for tokens in (4000, 400))
    assert long == pytest.approx(short, rel=0.1)  # not ten times as much
    assert forecast.prefill_bytes(twin, 4000, all_logits=False) > 5 * long


# --- every expert on every token, as the library had it when the paper was written


def inside_the_experts(config, tokens):
    """Peak of one layer's experts, on the meta device, beyond what lives at its start."""
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        experts.use(net, "all_experts")
        module = next(m for m in net.modules() if hasattr(m, "_apply_gate"))
        states = torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16)
        index = torch.zeros(tokens, config.num_experts_per_tok, dtype=torch.long)
        weights = torch.zeros(tokens, config.num_experts_per_tok, dtype=torch.bfloat16)
    with torch.no_grad(), Live() as live:
        module(states, index, weights)
    return live.peak_bytes


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_the_live_set_of_all_experts_is_the_librarys_of_that_time(tokens):
    """Eight times (experts, tokens, width): the repeated states, gate and up together (two), each
    clamped, their gated half, up plus one, and the product of the last two.

    That is what transformers 4.55 held at the same line. With inner and outer width alike.
    """
    config = GptOssConfig(num_hidden_layers=1, num_local_experts=32, vocab_size=64)
    assert config.hidden_size == config.intermediate_size == 2880
    unit = 2 * 32 * tokens * 2880
    assert inside_the_experts(config, tokens) == 8 * unit


@pytest.mark.parametrize(
    ("context", "published_mib"), [(512, 789.05078125), (1024, 1643.6015625), (2048, 3554.203125)]
)
def test_the_papers_peaks_follow_from_the_shapes_of_all_experts(context, published_mib):
    """What the paper's file calls KV cache at these contexts, within 0.5 %."""
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config_of(find("gpt-oss-20b")), dtype=torch.bfloat16)
    peak = forecast.prefill_bytes(
        dry_run.twin_of(net), context, all_logits=True, implementation="all_experts"
    )
    assert peak / MIB == pytest.approx(published_mib, rel=0.005)
