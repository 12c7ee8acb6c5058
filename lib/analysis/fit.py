"""Will it fit? Weights, cache, users and decode limit of a model on a GPU, from its card alone.

    make fit MODEL=gpt-oss-20b GPU_GB=80 [DTYPE=] [BANDWIDTH_GB_S=] [CONTEXT=] [ARGS=--json]

MODEL is an entry of params/models.yaml, a hub id or a folder with a config.json. Neither weights
nor a GPU are needed. GB are 10^9 bytes.
"""

from __future__ import annotations

import functools
import math
import textwrap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from lib.analysis.reserved import Reserved
from lib.files import ParamsError, split, unknown
from lib.hardware.datasheets import datasheets
from lib.models.card import MARGIN_BYTES, MARGIN_SHARE, ModelCard, ModelError, bound_tok_per_s
from lib.models.formats import FORMS, KEPT, USUAL, held_as, named

# What a process takes before it holds a tensor: CUDA context, libraries and kernels. nvidia-smi
# shows about 0.4 to 0.6 GB with PyTorch on recent cards; a round number, not measured here.
CUDA_CONTEXT_BYTES = 600_000_000
CONTEXTS = (2048, 8192, 32768)
PREFERRED = ("bfloat16", "float16")  # what weights are published in
_ENDLESS = 2**30  # tokens; where the search stops if the model states no limit


def largest_context(card: ModelCard, free_bytes: int) -> int:
    """Tokens that one sequence can hold in `free_bytes`; at most the model's own limit."""
    tokens, block = range(1, (card.context_limit or _ENDLESS) + 1), card.block_tokens

    def most_bytes(n: int) -> int:  # just before a block is full it takes more than after
        return card.kv_bytes(n + (-n - 1) % block, cache="static")

    return bisect_right(tokens, free_bytes, key=most_bytes)


def short_bytes(
    card: ModelCard, gpu_bytes: float, devices: int = 1, reserved: Reserved | None = None
) -> float:
    """Bytes that the weights and the reserve lack on a GPU, or on so many `devices` of its size
    that share them; negative where they fit. Each has its own context and workspace. Of an engine
    that told its cache they are less what it leaves for that."""
    if reserved:
        return -reserved.on(devices * gpu_bytes)
    more = (devices - 1) * (CUDA_CONTEXT_BYTES + MARGIN_BYTES)
    return card.weight_bytes + CUDA_CONTEXT_BYTES + card.margin_bytes + more - devices * gpu_bytes


def room(
    card: ModelCard,
    gpu_bytes: float,
    context: int,
    devices: int = 1,
    reserved: Reserved | None = None,
) -> int:
    """Users of `context` tokens each whose caches fit at the same time; of an engine in the cache
    that it `reserved`."""
    left = max(-short_bytes(card, gpu_bytes, devices, reserved), 0)
    if reserved:
        card, context = reserved.paged(card), reserved.whole(context)
    return int(left // card.kv_bytes(context, cache="static"))


def line(card: ModelCard, devices: int = 1, reserved: Reserved | None = None) -> dict[str, Any]:
    """What `room` reads of a card: the cache is `share` x (memory - `of_bytes`) - `fixed_bytes`,
    and a user takes `user_bytes`, given at the tokens between which they grow evenly, of whole
    blocks."""
    limit = card.context_limit or _ENDLESS
    if reserved:
        card, limit = reserved.paged(card), reserved.whole(limit)
    windows = {window for _, window in card.kv_layers or () if window is not None}
    ends = sorted({0, *windows, limit})
    return {
        "share": reserved.share if reserved else 1,
        "of_bytes": reserved.of_bytes if reserved else 0,
        "fixed_bytes": -reserved.cache_bytes if reserved else round(short_bytes(card, 0, devices)),
        "block": reserved.block if reserved else 1,
        "user_bytes": [[n, card.kv_bytes(n, cache="static")] for n in ends],
    }


def plan(
    card: ModelCard,
    *,
    gpu_bytes: int,
    contexts: Sequence[int] = CONTEXTS,
    bytes_per_s: float | None = None,
    workspace: Callable[[int], int | str] | None = None,
) -> dict[str, Any]:
    """What a GPU of `gpu_bytes` can hold of this model; what is None has its reason in `missing`.

    `users` are sequences of so many tokens each (prompt and answer) that fit at the same time; a
    sliding layer counts up to its window, and all are prefilled together: `workspace` tells what
    one of so many tokens needs for it beside its cache (bytes, or why that is not known).
    `need_bytes` is what one user of the fewest tokens needs; where its cache does not fit without
    what the prefill takes.
    `decode_tok_per_s` is what no step at batch 1 can beat.
    """
    reserve = CUDA_CONTEXT_BYTES + card.margin_bytes
    left = gpu_bytes - card.weight_bytes - reserve
    missing: dict[str, str] = {}
    row: dict[str, Any] = {
        "weight_bytes": card.weight_bytes,
        "reserve_bytes": reserve,
        "left_bytes": left,
        "missing": missing,
    }
    row["need_bytes"] = card.weight_bytes + reserve
    if card.kv_layers is None:
        why = f"the size of the cache is unknown, because {card.kv_reason}"
        missing |= dict.fromkeys(("cache", "largest_context", "users", "decode_tok_per_s"), why)
        return row
    window, limit = card.window or 0, card.context_limit or _ENDLESS
    block = card.block_tokens
    held, more = (card.kv_bytes(n * block, cache="static") for n in (window, window + 1))
    row |= {
        "token_bytes": card.token_bytes,
        "token_beyond_window_bytes": (more - held) // block,
        "state_bytes": card.state_bytes,
    }
    least = min((*contexts, limit))
    row["need_bytes"] += card.kv_bytes(least, cache="static")
    row["largest_context"] = largest_context(card, left)
    row["limited_by"] = "model" if row["largest_context"] == limit else "memory"
    if row["largest_context"] == _ENDLESS:
        row["largest_context"], row["limited_by"] = None, "nothing"
        missing["largest_context"] = "no cache grows without end, and the model states no limit"
    for context in contexts:
        users, bound = f"users_{context}", f"decode_tok_per_s_{context}"
        own = card.kv_bytes(context, cache="static")
        row[users], row[bound] = max(left, 0) // own, None
        extra = workspace(context) if workspace and row[users] and context <= limit else 0
        if isinstance(extra, str):
            missing[f"workspace_bytes_{context}"] = f"the prefill's workspace is not known: {extra}"
        elif extra:
            in_turn, row[users] = row[users], left // (own + extra)
            row |= {f"workspace_bytes_{context}": extra, f"users_in_turn_{context}": in_turn}
            row["need_bytes"] += extra if context == least else 0
        if context > limit:
            row[users] = None
            missing[users] = f"{context:,} tokens are beyond the model's own limit of {limit:,}"
            missing[bound] = missing[users]
        elif left <= 0:
            missing[bound] = f"does not fit: {-left / 1e9:.2f} GB short, before any cache"
        elif left < own:
            missing[bound] = f"a sequence of {context:,} tokens does not fit"
        elif bytes_per_s is None:
            missing[bound] = "no decode limit without a bandwidth: give BANDWIDTH_GB_S"
        else:
            row[bound] = bound_tok_per_s(card.decode_bytes(context), bytes_per_s)
    return row


def answer(
    card_of: Callable[[str], ModelCard],
    *,
    gpu_gb: float,
    forms: Sequence[str] = USUAL,
    bandwidth_gb_s: float | None = None,
    contexts: Sequence[int] = CONTEXTS,
    workspace_of: Callable[[str, int], int | str] | None = None,
) -> dict[str, Any]:
    """`plan` for each form of the weights, and what it is computed from, as JSON data.

    `card_of` gives the model's card in a number format, as `models.load.card` does for a name;
    `workspace_of` the workspace of a prefill in it, of one sequence of so many tokens.
    """
    forms = [named(name) for name in forms]
    for name in forms:
        if name not in FORMS:
            raise unknown("dtype", name, FORMS)
    for number in (gpu_gb, 1 if bandwidth_gb_s is None else bandwidth_gb_s, *contexts):
        if not 0 < number < math.inf:
            raise ParamsError(f"{number:g}: give GPU_GB, BANDWIDTH_GB_S and CONTEXT above 0")
    cards = {d: card_of(d) for d in dict.fromkeys(FORMS[name].dtype for name in forms)}
    gpu_bytes, rows = round(gpu_gb * 1e9), {}
    rate = None if bandwidth_gb_s is None else bandwidth_gb_s * 1e9
    for name in forms:
        try:
            card = held_as(cards[FORMS[name].dtype], FORMS[name])
            own = workspace_of and functools.partial(workspace_of, FORMS[name].dtype)
            row = plan(
                card, gpu_bytes=gpu_bytes, contexts=contexts, bytes_per_s=rate, workspace=own
            )
        except ModelError as error:
            row = {"missing": {"weight_bytes": str(error)}}
        rows[name] = row | {"assumes": FORMS[name].assumes}
    return {
        "card": cards[FORMS[forms[-1]].dtype].as_dict(),
        "gpu_bytes": gpu_bytes,
        "bandwidth_bytes_per_s": rate,
        "contexts": list(contexts),
        "weights": rows,
        "answer": verdict(rows, gpu_bytes),
    }


def verdict(rows: dict[str, dict[str, Any]], gpu_bytes: float) -> dict[str, Any]:
    """Whether it fits: in the usual form where that fits, or the first that does; else in the form
    that needs least. `cards` are the smallest of params/gpus.yaml that hold it."""
    needs = {name: row["need_bytes"] for name, row in rows.items() if "need_bytes" in row}
    if not needs:
        return {"fits": None}
    fitting = [name for name, need in needs.items() if need <= gpu_bytes]
    order = sorted(fitting, key=lambda name: name not in PREFERRED)
    form = order[0] if order else min(needs, key=lambda name: needs[name])
    sizes = {name: x.memory_bytes for name, x in datasheets().items() if x.memory_bytes}
    holding = [size for size in sizes.values() if size >= needs[form]]
    least = min(holding, default=None)
    return {
        "fits": bool(fitting),
        "form": form,
        "need_bytes": needs[form],
        "card_bytes": least,
        "cards": [name for name, size in sizes.items() if size == least],
        "largest_card_bytes": max(sizes.values()),
    }


def lead(result: dict[str, Any]) -> str:
    """Yes or no in a sentence or two, with what it needs and the smallest card that has that."""
    answer, rows, context = result["answer"], result["weights"], min(result["contexts"])
    name, gpu_gb = result["card"]["name"] or result["card"]["model_type"], result["gpu_bytes"] / 1e9
    if answer["fits"] is None:
        return f"Nothing can be said of {name}: its size is not known."
    form, need_gb = answer["form"], answer["need_bytes"] / 1e9
    one = f"one user of {context:,} tokens"
    if answer["fits"]:
        users = rows[form].get(f"users_{context}")
        room = f", with room for {users:,} users of {context:,} tokens" if users else ""
        first = f"Yes: {name} fits {gpu_gb:g} GB in {form}{room}."
        usual = rows.get(PREFERRED[0], {}).get("need_bytes")
        if form not in PREFERRED and usual:
            first = f"{first[:-1]}; in {PREFERRED[0]} it would need {usual / 1e9:.1f} GB."
        needs = f"It needs {need_gb:.1f} GB for {one}"
    else:
        short_gb = need_gb - gpu_gb
        first = f"No: {name} does not fit {gpu_gb:g} GB; {short_gb:.1f} GB are lacking."
        least = f" in {form}, the smallest form asked for," if len(rows) > 1 else f" in {form}"
        needs = f"It needs at least {need_gb:.1f} GB{least} for {one}"
    if answer["cards"]:
        cards = " or ".join(answer["cards"][:2])
        return f"{first} {needs}; the smallest card: {cards} ({answer['card_bytes'] / 1e9:g} GB)."
    largest_gb = answer["largest_card_bytes"] / 1e9
    return f"{first} {needs}; no single card here has that, the largest {largest_gb:g} GB."


def text(result: dict[str, Any]) -> str:
    """`answer` for reading: a column for each form, then reasons and assumptions."""
    card, rows = ModelCard.from_dict(result["card"]), result["weights"]
    contexts, rate = result["contexts"], result["bandwidth_bytes_per_s"]
    limit = f"{card.context_limit:,} tokens" if card.context_limit else "not stated"
    known = [n for n in contexts if any(f"workspace_bytes_{n}" in row for row in rows.values())]
    beyond = ("  beyond the window (kB)", "token_beyond_window_bytes", 1e3, 2)
    lines = [
        ("weights (GB)", "weight_bytes", 1e9, 2),
        ("reserve (GB)", "reserve_bytes", 1e9, 2),
        ("left for the cache (GB)", "left_bytes", 1e9, 2),
        ("cache of one token (kB)", "token_bytes", 1e3, 2),
        *([beyond] if card.window or card.kv_blocks else []),
        *([("state of a sequence (MB)", "state_bytes", 1e6, 2)] if card.state_bytes else []),
        ("largest context at batch 1 (tokens)", "largest_context", 1, 0),
        *((f"prefill of one of {n:,} (GB)", f"workspace_bytes_{n}", 1e9, 3) for n in known),
        *(
            line
            for n in contexts
            for line in (
                (f"users at {n:,} tokens each", f"users_{n}", 1, 0),
                *([("  prefilled in turn", f"users_in_turn_{n}", 1, 0)] if n in known else []),
            )
        ),
        *(
            (f"decode limit at {n:,} (tok/s)", f"decode_tok_per_s_{n}", 1, 1)
            for n in contexts
            if rate
        ),
    ]
    table = [" " * 36 + "".join(f"{name:>11}" for name in rows)]
    for title, key, scale, digits in lines:
        cells = (row.get(key) for row in rows.values())
        texts = ("-" if x is None else format(x / scale, f",.{digits}f") for x in cells)
        table.append(f"{title:36}" + "".join(f"{cell:>11}" for cell in texts))
    reasons: dict[str, dict[str, None]] = {}
    for name, row in rows.items():
        for reason in row["missing"].values():
            reasons.setdefault(reason, {})[name] = None
    notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if card.window:
        sliding = sum(window is not None for _, window in card.kv_layers or ())
        notes.append(
            f"window: {sliding} of {card.layers} layers keep the last {card.window:,} tokens only"
        )
    notes += [f"{name}: {row['assumes']}" for name, row in rows.items()]
    notes += [KEPT] if any(FORMS[name].quantised for name in rows) else []
    notes += [
        f"reserve: {CUDA_CONTEXT_BYTES / 1e9:g} GB for the CUDA context, {MARGIN_BYTES / 1e9:g} GB "
        f"and {MARGIN_SHARE:.0%} of the weights for workspace; users are prefilled together and "
        "whole, as generate() does; in turn is one after the other, in pieces, as servers do",
        "GPU_GB is the card's memory in 10^9 bytes: an H100 sold as 80 GB has 85.0",
    ]
    speed = f", {rate / 1e9:,.0f} GB/s" if rate else ""
    head = (
        f"{card.name} ({card.model_type}): {card.total_params / 1e9:.3f} B parameters, "
        f"{card.active_params / 1e9:.3f} B active; the model's own context limit: {limit}"
    )
    notes += [result["shapes"]] if "shapes" in result else []
    notes += result.get("measured", ())
    folded = [textwrap.fill(f"- {n}", 96, subsequent_indent="  ") for n in notes]
    gpu = f"GPU of {result['gpu_bytes'] / 1e9:g} GB{speed}"
    first = textwrap.fill(lead(result), 96)
    return "\n".join([first, "", head, gpu, "", *table, "", *folded])


def tokens(text: str) -> tuple[int, ...]:
    """Contexts of a list such as "2048,8192"."""
    return tuple(int(item) for item in split(text))
