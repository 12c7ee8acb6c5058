"""The decode stack on tiny models: exact counts, true greedy, a cache that holds."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from lib.hardware.device import open_device
from lib.models import entries, experts, load
from lib.records.kinds import EXPERTS
from lib.stacks import decoding as lib_decoding
from lib.stacks import fused, registry

TINY = [name for name, entry in entries.models().items() if entry["tiny"]]
CONTEXT = 24
SAMPLED = (
    "top-p 0.9",
    "top-k 50",
    "temperature 0.7 top-p 0.9",
    "temperature 0.7 top-k 50",
    "temperature 1.0 top-p 0.95",
    "temperature 0.3 top-p 0.8",
    "temperature 1.5",
    "top-k 7 top-p 0.9",
)
DECODINGS = ("greedy", *SAMPLED, "min-p 0.1", "repetition-penalty 1.3", "greedy no-repeat-ngram 2")


@pytest.fixture(scope="module", params=TINY)
def model(request):
    """float32, and logits ten times as far apart, so that rounding decides no argmax."""
    loaded = load.load(request.param, dtype="float32", device=open_device("cpu"), seed=1)
    loaded.net.get_output_embeddings().weight.mul_(10)
    return loaded


@pytest.fixture
def ids(model):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, model.vocab_size, (1, CONTEXT), generator=generator)


def logits(net, ids):
    """Of the position after `ids`, from one forward pass without any cache."""
    with torch.inference_mode():
        return net(ids, use_cache=False).logits[:, -1].float()


def test_the_tiny_models_are_here():
    assert {"tiny-gpt-oss", "tiny-qwen3", "tiny-yi"} <= {*TINY}


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
def test_exactly_the_tokens_that_were_asked_for(model, ids, new_tokens):
    out = registry.open_stack("hf-eager", model.net)(ids, new_tokens)
    assert out.tokens.shape == (1, new_tokens)
    # The last token is returned, not read: it is not in the cache.
    assert out.cache.get_seq_length() == CONTEXT + new_tokens - 1


def test_greedy_is_the_argmax_of_forward_passes(model, ids):
    row = ids
    for _ in range(8):
        row = torch.cat([row, logits(model.net, row).argmax(-1, keepdim=True)], 1)
    out = registry.open_stack("hf-eager", model.net)(ids, 8)
    assert out.tokens.tolist() == row[:, CONTEXT:].tolist()
    assert len({*out.tokens[0].tolist()}) > 1  # not one token over and over


def test_the_cache_is_the_one_that_a_forward_pass_gives(model, ids):
    out = registry.open_stack("hf-eager", model.net)(ids, 4)
    row = torch.cat([ids, out.tokens], 1)
    with torch.inference_mode():
        step = model.net(row[:, -1:], past_key_values=out.cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(step, logits(model.net, row), atol=1e-3, rtol=1e-3)


def test_a_batch_decodes_each_row_as_if_alone(model, ids):
    both = torch.cat([ids, ids.flip(1)])
    generate = registry.open_stack("hf-eager", model.net)
    out = generate(both, 5).tokens
    assert out.shape == (2, 5)
    assert out[0].tolist() == generate(ids, 5).tokens[0].tolist()


@pytest.mark.parametrize("decoding", DECODINGS)
def test_no_token_ends_a_call_although_every_token_is_an_end(model, ids, decoding, monkeypatch):
    """Whatever the checkpoint brings: here it also samples, stops at once, and pads."""
    every = list(range(model.vocab_size))
    monkeypatch.setattr(model.net.config, "eos_token_id", every)
    monkeypatch.setattr(
        model.net,
        "generation_config",
        GenerationConfig(
            eos_token_id=every,
            pad_token_id=0,
            do_sample=True,
            max_length=CONTEXT + 2,
            repetition_penalty=9.0,
        ),
    )
    out = registry.open_stack("hf-eager", model.net, decoding=decoding)(ids, 6)
    assert out.tokens.shape == (1, 6)
    assert out.cache.get_seq_length() == CONTEXT + 5


def test_greedy_is_greedy_whatever_the_checkpoint_prefers(model, ids, monkeypatch):
    expected = registry.open_stack("hf-eager", model.net)(ids, 6).tokens.tolist()
    monkeypatch.setattr(
        model.net,
        "generation_config",
        GenerationConfig(
            do_sample=True,
            temperature=5.0,
            repetition_penalty=9.0,
            no_repeat_ngram_size=1,
            suppress_tokens=[expected[0][0]],
        ),
    )
    assert registry.open_stack("hf-eager", model.net)(ids, 6).tokens.tolist() == expected


def allowed(scores, decoding):
    """The tokens that a decoding may draw, by its definition."""
    words = decoding.split()
    named = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    order = scores.argsort(descending=True)
    if "top-k" in named or "temperature" in named:  # the library's own top-k where none is named
        order = order[: int(named.get("top-k", 50))]
    if "top-p" in named:
        before = (scores[order] / named.get("temperature", 1)).softmax(-1).cumsum(-1).roll(1)
        before[0] = 0
        order = order[before < named["top-p"]]
    return {*order.tolist()}


@pytest.mark.parametrize("decoding", SAMPLED)
def test_sampling_draws_what_its_name_allows(model, ids, decoding):
    generate = registry.open_stack("hf-eager", model.net, decoding=decoding)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate(ids, 8).tokens)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    row = torch.cat([ids, drawn[0]], 1)
    sizes = []
    for place in range(CONTEXT, CONTEXT + 8):
        may = allowed(logits(model.net, row[:, :place])[0], decoding)
        assert row[0, place].item() in may
        sizes.append(len(may))
    assert max(sizes) < model.vocab_size / 2  # the test could fail


def test_a_low_temperature_is_nearer_to_greedy(model, ids):
    """Mean log-probability of what is drawn, by the model's own distribution."""

    def surprise(decoding):
        torch.manual_seed(0)
        generate = registry.open_stack("hf-eager", model.net, decoding=decoding)
        first = torch.cat([generate(ids, 1).tokens for _ in range(40)])
        return -logits(model.net, ids).log_softmax(-1)[0, first[:, 0]].mean().item()

    assert surprise("greedy") < surprise("temperature 0.3 top-p 0.8") < surprise("top-p 0.9")


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_on_token_is_called_once_for_each_token(model, ids, new_tokens):
    called = []
    generate = registry.open_stack("hf-eager", model.net)
    out = generate(ids, new_tokens, on_token=lambda: called.append(len(called)))
    assert called == list(range(new_tokens))
    assert out.tokens.tolist() == generate(ids, new_tokens).tokens.tolist()  # changes nothing


def test_which_experts_the_decode_steps_use(model):
    found = registry.experts_in_decode(model.net, "hf-eager")
    assert (found is None) == (model.card.experts == 0)
    assert found in (None, "grouped_mm", "batched_mm", "loop")


def test_a_decoding_is_settings_with_values():
    off = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    cases = {
        "greedy": {"do_sample": False},
        "top-p 0.5": {"do_sample": True, **off, "top_p": 0.5},
        "temperature 0.7 min-p 0.1": {
            **off, "do_sample": True, "temperature": 0.7, "min_p": 0.1, "top_k": 50,
        },
        "temperature 0.7 top-k 3": {**off, "do_sample": True, "temperature": 0.7, "top_k": 3},
        "repetition-penalty 1.1": {"do_sample": False, "repetition_penalty": 1.1},
        "beams 4": {"do_sample": False, "num_beams": 4},
    }  # fmt: skip
    assert {name: lib_decoding.options(name) for name in cases} == cases
    fields = GenerationConfig()
    assert all(hasattr(fields, setting.name) for setting in lib_decoding.SETTINGS.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write 'greedy', or settings"),
        ("top-q 0.5", "unknown decoding 'top-q 0.5': 'top-q' may be 'top-p'"),
        ("top-p", "write 'greedy', or settings"),
        ("top-p 1.5", "top-p 1.5 is not a number above 0 and at most 1"),
        ("top-p 0", "above 0"),
        ("top-k 2.5", "top-k 2.5 is not a whole number"),
        ("temperature hot", "temperature hot is not a number"),
        ("temperature nan", "temperature nan is not"),
        ("beams 1", "of at least 2"),
        ("greedy top-p 0.9", "greedy does not sample"),
    ],
)
def test_an_unknown_decoding_names_what_is_wrong_in_it(text, says):
    with pytest.raises(ValueError, match=says):
        lib_decoding.options(text)


def test_experts_are_those_that_the_library_knows():
    assert {*experts.names()} - {fused.EXPERTS} == {*EXPERTS}  # ours are there once imported
