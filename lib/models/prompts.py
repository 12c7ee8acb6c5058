"""Prompts of an exact length in tokens, counted after the chat template.

The fixed part of a template (system text, turn marks, generation prompt) is kept whole, and the
body is written to the length that is left. Nothing is padded: padding is masked out of the work
that is being measured, and cutting a finished prompt would remove the generation prompt.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

WRAPPER = ("### Instruction:\n", "\n\n### Response:\n")
# Templates that print today's date would give other ids every day.
_DATE = datetime.datetime(2025, 8, 5)
_MARK = "BODYOFTHEPROMPT"
# Words first: one more word is one more token for most tokenizers.
_FILLERS = (
    " again", " then", " here", " now", " too", " so", " it", " a", " I", ".", "!", ",", ";",
    " 7", "a", "e", "o", "s", "x", "1",
)  # fmt: skip
_STEPS_BACK = 24
_SPANNED = 1000  # words that no token spans
_VOCABULARY = (
    "Give the vocabulary that belongs to the model, or a checkpoint without its tokenizer's files, "
    "to measure with drawn ids"
)
_OTHER = (
    "pass a tokenizer with another template, or remove it (chat_template.jinja, or chat_template "
    "in tokenizer_config.json) for a plain wrapper"
)
TEXT_WORDS = 400  # of the text that is counted in tokens
SYSTEM = "You are a helpful assistant."  # where a template demands such a turn

_SUBJECTS = (
    "the engineer", "a quiet neighbour", "our teacher", "the old printer", "every visitor",
    "one careful reader", "the harbour master", "a young chemist", "the night train",
    "their accountant", "the gardener", "a travelling musician", "the weather station",
    "my colleague", "the city council", "an honest witness", "the second pilot", "a lost tourist",
    "the librarian", "this machine", "the river", "a small company", "the translator", "nobody",
)  # fmt: skip
_VERBS = (
    "repairs", "describes", "remembers", "measures", "paints", "questions", "carries", "follows",
    "replaces", "counts", "sells", "avoids", "discovers", "explains", "records", "borrows",
    "protects", "compares", "ignores", "prepares", "watches", "improves", "divides", "delivers",
)  # fmt: skip
_ADJECTIVES = (
    "broken", "narrow", "expensive", "familiar", "frozen", "modern", "distant", "yellow",
    "careless", "complete", "silent", "early", "heavy", "curious", "wooden", "public", "hidden",
    "foreign", "gentle", "rapid", "bitter", "empty", "second", "local",
)  # fmt: skip
_OBJECTS = (
    "bridge", "letter", "theory", "engine", "market", "window", "contract", "forest", "island",
    "recipe", "signal", "museum", "treaty", "bottle", "camera", "garden", "ladder", "planet",
    "school", "ticket", "vaccine", "violin", "budget", "shadow",
)  # fmt: skip
_ENDINGS = (
    "before sunrise", "in northern Europe", "without any help", "for 37 days", "near the station",
    "after the storm", "at half the price", "since 1984", "in plain language", "on the last page",
    "with great patience", "between two meetings", "for no clear reason", "under a grey sky",
    "at 12 degrees", "despite the noise", "once a year", "from memory", "as planned",
    "in the other direction", "while it rains", "by hand", "twice a week", "for a friend",
)  # fmt: skip


class PromptError(ValueError):
    """A prompt of this length cannot be made; the message names the value and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of one sequence. `kind` says how they were made: template, wrapper or ids."""

    ids: tuple[int, ...]
    kind: str
    text: str = ""


def exact_prompt(
    model_or_tokenizer: Any,
    tokens: int,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    special_ids: Iterable[int] = (),
) -> Prompt:
    """A prompt of exactly `tokens` tokens, the same for the same seed.

    With a chat template: the rendered conversation of one user turn, generation prompt included
    (and a system turn, where the template demands one).
    With a tokenizer and no template: a plain instruction wrapper. With no tokenizer (a model of
    random weights, or None): ids drawn from the vocabulary, special ones left out.
    """
    if tokens < 1:
        raise PromptError(f"a prompt of {tokens} tokens cannot be made; ask for 1 or more")
    tokenizer, rows = model_or_tokenizer, vocab_size
    if hasattr(model_or_tokenizer, "net"):
        tokenizer, rows = model_or_tokenizer.tokenizer, _rows(model_or_tokenizer)
        vocab_size = min(vocab_size or model_or_tokenizer.vocab_size, rows)
        special_ids = (*special_ids, *model_or_tokenizer.special_ids)
    if tokenizer is None:
        return _drawn_ids(tokens, seed, vocab_size, special_ids)

    render, before, after = _parts(tokenizer)

    def encode(body: str) -> list[int]:
        return _ids(tokenizer, before + body + after, special=render is None)

    kind = "template" if render else "wrapper"
    body = _body(encode, tokens, seed, kind)
    try:
        text = render(body) if render else before + body + after
    except Exception as error:  # of Jinja, or of Python inside the template
        raise PromptError(
            f"the chat template refuses a text that it is given ({_first_line(error)}); {_OTHER}"
        ) from error
    if text != before + body + after:
        raise PromptError(
            "the chat template changes the text of the user's turn, so that the fixed part cannot "
            "be told from the body; pass a tokenizer whose template keeps the text"
        )
    ids = tuple(encode(body))
    assert len(ids) == tokens, f"{len(ids)} tokens instead of {tokens}"
    _require_rows(tokenizer, ids, rows)
    unknown = ids.count(getattr(tokenizer, "unk_token_id", None))
    if 2 * unknown > tokens:  # the same token again and again, which a router sends one way
        raise PromptError(
            f"{unknown} of {tokens} tokens of English text are {tokenizer.unk_token!r} to this "
            f"tokenizer: its vocabulary holds no English. {_VOCABULARY}"
        )
    return Prompt(ids, kind, text)


def text_tokens(tokenizer: Any, words: int = TEXT_WORDS) -> int:
    """Tokens of a fixed text of so many words, as the model is given it in a user's turn."""
    render, before, after = _parts(tokenizer)
    text = before + " ".join(_words(0, words)) + after
    return len(_ids(tokenizer, text, special=render is None))


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # whatever the tokenizer's own code raises
        raise PromptError(
            f"the tokenizer fails on English text ({_first_line(error)}). {_VOCABULARY}"
        ) from error


def _parts(tokenizer: Any) -> tuple[Callable[[str], str] | None, str, str]:
    """What renders a conversation, None without a chat template, and what is put around a text."""
    if not getattr(tokenizer, "chat_template", None):
        return None, *WRAPPER
    render = _renderer(tokenizer)
    return render, *_around(render)


def _rows(model: Any) -> int:
    """Rows of the embedding, the shortest where a token is looked up in several tables (Gemma 3n
    and 4 have one more for their layers): ids at or beyond them cannot be looked up."""
    named = (m for n, m in model.net.named_modules() if _is_table(n.rpartition(".")[2]))
    own = getattr(model.net, "get_input_embeddings", lambda: None)
    tables = (own(), *named)
    rows = (getattr(table, "num_embeddings", None) for table in tables)
    return min((n for n in rows if n), default=0) or model.card.vocab_size


def _is_table(name: str) -> bool:
    return name.startswith("embed_tokens")


def _require_rows(tokenizer: Any, ids: tuple[int, ...], rows: int | None) -> None:
    beyond = sorted({i for i in ids if rows is not None and i >= rows})
    if beyond:
        tokens = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in beyond[:3])
        raise PromptError(
            f"the prompt has ids that the embedding of {rows} rows does not hold: {tokens}; the "
            "tokenizer has tokens that the checkpoint was not resized for. Give the tokenizer that "
            "belongs to it, or a checkpoint whose embedding was resized"
        )


def _drawn_ids(
    tokens: int, seed: int, vocab_size: int | None, special_ids: Iterable[int]
) -> Prompt:
    if vocab_size is None:
        raise PromptError("without a tokenizer, ids are drawn; give vocab_size")
    plain = sorted(set(range(vocab_size)) - set(special_ids))
    if not plain:
        raise PromptError(f"all {vocab_size} ids of the vocabulary are special; none can be drawn")
    return Prompt(tuple(random.Random(seed).choices(plain, k=tokens)), "ids")


def _renderer(tokenizer: Any) -> Callable[[str], str]:
    """What renders a conversation with one user turn, in the first way that the template takes.

    Some templates demand a system turn, a list of parts as content, or a word on thinking.
    """
    reasons: list[str] = []
    for system in (None, SYSTEM):
        for parts in (False, True):
            for options in ({}, {"enable_thinking": False}, {"thinking": False}):
                render = partial(_render, tokenizer, system=system, parts=parts, options=options)
                try:
                    text = render(_MARK)
                except Exception as error:  # of Jinja, or of Python inside the template
                    reasons.append(
                        f"refuses one user turn, with and without a system turn before "
                        f"it ({_first_line(error)})"
                    )
                    continue
                if text.count(_MARK) == 1:
                    return render
                reasons.append("does not show the user's text exactly once")
    raise PromptError(f"the chat template {reasons[0]}; {_OTHER}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _render(
    tokenizer: Any,
    body: str,
    *,
    system: str | None = None,
    parts: bool = False,
    options: Mapping[str, Any] | None = None,
) -> str:
    turns = [("system", system), ("user", body)] if system else [("user", body)]
    return tokenizer.apply_chat_template(
        [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in turns
        ],
        add_generation_prompt=True,
        tokenize=False,
        strftime_now=_DATE.strftime,
        date_string=_DATE.strftime("%d %b %Y"),
        **(options or {}),
    )


def _fixed_part(tokenizer: Any) -> tuple[str, str]:
    """What the template puts before and after the text of the user's turn."""
    return _around(_renderer(tokenizer))


def _around(render: Callable[[str], str]) -> tuple[str, str]:
    before, _, after = render(_MARK).partition(_MARK)
    return before, after


def _body(encode: Callable[[str], list[int]], tokens: int, seed: int, kind: str) -> str:
    """Text with which the whole prompt has exactly `tokens` tokens.

    Tokens at an edge may merge, so lengths do not simply add: as many words as fit are found by
    bisection, the rest is filled with short pieces, and where no filling is exact the search
    steps back by a word.
    """
    fixed = len(encode(""))
    if tokens < fixed:
        raise PromptError(
            f"the {kind} alone takes {fixed} tokens, more than the {tokens} asked for; ask for at "
            f"least {fixed + 1}"
        )
    if tokens == fixed:
        return ""
    words = _words(seed, tokens - fixed + 1)
    # A token may span words; of those that are too many, bisection keeps what fits.
    while (length := len(encode(" ".join(words)))) <= tokens:
        words = _words(seed, 2 * len(words))
        if len(words) > _SPANNED and len(encode(" ".join(words))) == length:
            raise PromptError(
                f"this tokenizer makes {length} tokens of {len(words)} words and of half as many: "
                f"its vocabulary holds no English. {_VOCABULARY}"
            )
    fits, too_many = 0, len(words) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(encode(" ".join(words[:middle]))) <= tokens:
            fits = middle
        else:
            too_many = middle
    for kept in range(fits, max(fits - _STEPS_BACK, -1), -1):
        if (body := _filled(encode, " ".join(words[:kept]), tokens)) is not None:
            return body
    raise PromptError(
        f"no text gives exactly {tokens} tokens with this tokenizer and {kind}; ask for "
        f"{tokens + 1}, or use another seed"
    )


def _filled(encode: Callable[[str], list[int]], body: str, tokens: int) -> str | None:
    """`body` with short pieces added until the length is exact, or None."""
    length = len(encode(body))
    while length < tokens:
        for filler in _FILLERS:
            # A template may strip the turn, so that a body must not begin with a space.
            longer = body + filler if body else filler.strip()
            if length < (longer_length := len(encode(longer))) <= tokens:
                body, length = longer, longer_length
                break
        else:
            return None
    return body if length == tokens else None


def _words(seed: int, count: int) -> list[str]:
    """Words of varied English sentences; every word has one token or more."""
    words: list[str] = []
    sentences = _sentences(random.Random(seed))
    while len(words) < count:
        words += next(sentences).split()
    return words[:count]


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        parts = [rng.choice(x) for x in (_SUBJECTS, _VERBS, _ADJECTIVES, _OBJECTS, _ENDINGS)]
        subject, verb, adjective, thing, ending = parts
        article = rng.choice(("the", "its", "another", "that"))
        yield f"{subject.capitalize()} {verb} {article} {adjective} {thing} {ending}."


def prompt_ids(
    model: Any, context: int, *, seed: int, batch: int = 1, distinct: bool = False
) -> Any:
    """Token ids (batch, context) on the model's device, exactly `context` long after templating.

    All rows hold the same prompt, or with `distinct` one of its own each (seeds from `seed` on).
    """
    import torch

    seeds = range(seed, seed + batch) if distinct else [seed] * batch
    prompts = [exact_prompt(model, context, seed=s).ids for s in seeds]
    ids = torch.tensor(prompts, device=model.device.torch_device)
    if ids.shape != (batch, context):
        raise RuntimeError(f"the prompt has shape {tuple(ids.shape)}, not {(batch, context)}")
    return ids
