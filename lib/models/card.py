"""The model card: what an architecture holds, caches and must read in each decode step.

The counts come from `models.count`. The card itself is plain data and needs no torch, so a reader
on a laptop can rebuild it from a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MARGIN_SHARE, MARGIN_BYTES = 0.05, 500_000_000


class ModelError(ValueError):
    """A model, or a use of it, that cannot work; the message names the value and the remedy."""


@dataclass(frozen=True)
class Block:
    """What a cache keeps of `tokens` tokens at a time (bytes of one sequence).

    Every full block leaves `full_bytes`, a token of the block that is not full `left_bytes`, and
    once a block is full there are `once_bytes` of the last one.
    """

    tokens: int
    full_bytes: int = 0
    left_bytes: int = 0
    once_bytes: int = 0

    def bytes_after(self, tokens: int) -> int:
        """Bytes that are kept after `tokens` tokens."""
        full, left = divmod(tokens, self.tokens)
        once = self.once_bytes if full else 0
        return full * self.full_bytes + left * self.left_bytes + once

    def __add__(self, other: Block) -> Block:
        return Block(
            self.tokens,
            self.full_bytes + other.full_bytes,
            self.left_bytes + other.left_bytes,
            self.once_bytes + other.once_bytes,
        )


@dataclass(frozen=True)
class ModelCard:
    """Counts of one architecture in one dtype (parameters as numbers, sizes in bytes).

    `lookup_params` are tables of which a token reads one row (the input embedding, unless it is
    also the output matrix); `routed_params` belong to experts that a router chooses among;
    `unread_params` are read by no decode step of text (vision towers, an attention to an encoder
    that is not there). What is left is read for every token. `kv_layers` holds, for each layer
    whose cache grows, the cached elements per token and the sliding window (None: full attention),
    `kv_blocks` what is kept of several tokens as one, `state_bytes` what one sequence keeps
    whatever its length (states of recurrent layers); where the cache of an architecture is not
    understood `kv_layers` is None, and `kv_reason` names the part. `matrix_params` are the weights
    that quantisers take, `expert_matrix_params` those of them in routed experts; None where a card
    was recorded before they were counted. `empty_experts` are choices of a router that compute
    nothing and have no weights. `attention_layers` holds, for each layer that attends, heads x
    (width of keys + of values) and the window, where `head_dim` and `kv_layers` do not tell.
    """

    name: str
    model_type: str
    dtype: str
    total_params: int
    active_params: int
    lookup_params: int
    routed_params: int
    weight_bytes: int
    routed_bytes: int
    lookup_bytes: int
    layers: int
    hidden_size: int | None
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    experts: int
    experts_per_token: int
    context_limit: int | None
    vocab_size: int
    kv_layers: tuple[tuple[int, int | None], ...] | None
    kv_element_bytes: int
    kv_reason: str = ""
    matrix_params: int | None = None
    expert_matrix_params: int | None = None
    unread_params: int = 0
    unread_bytes: int = 0
    unread_matrix_params: int = 0
    empty_experts: int = 0
    state_bytes: int = 0
    kv_blocks: tuple[Block, ...] = ()
    attention_layers: tuple[tuple[int, int | None], ...] | None = None

    @property
    def active_share(self) -> float:
        """Active over total parameters (1 where everything is read for every token)."""
        return self.active_params / self.total_params

    @property
    def margin_bytes(self) -> int:
        """What is kept free for workspace: 5 % of the weights and 0.5 GB, an estimate."""
        return round(MARGIN_SHARE * self.weight_bytes) + MARGIN_BYTES

    @property
    def window(self) -> int | None:
        """The sliding window (tokens) where any layer has one."""
        windows = {window for _, window in self.kv_layers or () if window is not None}
        return max(windows, default=None)

    @property
    def token_bytes(self) -> int:
        """Bytes that the first token of a sequence adds to its cache, every window being open."""
        return self.kv_bytes(1, cache="static") - self.state_bytes

    def kv_bytes(self, tokens: int, batch: int = 1, cache: str = "dynamic") -> int:
        """Bytes that the cache holds after `tokens` tokens in each of `batch` sequences.

        Grouped heads count once. A dynamic sliding layer keeps the last window - 1 tokens (the
        next token completes the window). A static cache is allocated in advance: `tokens` is
        then its capacity, and a sliding layer holds at most the window. These are the bytes of
        the tensors; a dynamic sliding layer's tensor is a view, and the memory behind it is the
        whole prompt until the first decode step and the full window after it. States of recurrent
        layers do not grow; they are there from the first token on.
        """
        if self.kv_layers is None:
            raise ModelError(
                f"{self.name}: the size of the cache is unknown, because {self.kv_reason}; "
                "the rest of the card holds"
            )
        if cache not in ("dynamic", "static"):
            raise ModelError(f"unknown cache {cache!r}; use 'dynamic' or 'static'")
        if tokens < 0 or batch < 1:
            raise ModelError(f"tokens={tokens}, batch={batch}: use tokens >= 0 and batch >= 1")
        short = 1 if cache == "dynamic" else 0
        elements = sum(
            per_token * (tokens if window is None else min(tokens, window - short))
            for per_token, window in self.kv_layers
        )
        fixed = self.state_bytes if tokens or cache == "static" else 0
        blocks = sum(block.bytes_after(tokens) for block in self.kv_blocks)
        return batch * (elements * self.kv_element_bytes + fixed + blocks)

    def experts_touched(self, batch: int = 1) -> float:
        """Expected number of distinct experts that a layer reads for one step of `batch` tokens.

        Each token chooses k of E uniformly and independently: E (1 - (1 - k/E)^batch). That is k
        at batch 1. A trained router is less even and touches fewer. Where a router can also choose
        what computes nothing, E of the share counts that, and k E / (E + empty) are left.
        """
        if not self.experts:
            return 0.0
        choices = self.experts + self.empty_experts
        missed = (1 - self.experts_per_token / choices) ** batch
        return self.experts * (1 - missed)

    @property
    def block_tokens(self) -> int:
        """Tokens after which every block of the cache is full at the same time; 1 without any."""
        return math.lcm(*(block.tokens for block in self.kv_blocks))

    def params_used(self, touched: float) -> int:
        """Parameters in a token's arithmetic where `touched` experts of every layer enter it.

        With the experts that the router chooses, these are `active_params`; with all experts,
        everything but the lookup tables and what no step reads.
        """
        unused = self.lookup_params + self.routed_params + self.unread_params
        always = self.total_params - unused
        return always + (round(self.routed_params * touched / self.experts) if self.experts else 0)

    def decode_bytes(self, context: int, batch: int = 1, touched: float | None = None) -> int:
        """Bytes that one decode step must read at least: the weights it uses, and the cache.

        Weights that every token uses are read once for the whole batch, plus `touched` distinct
        experts in each layer (where not given, the number to expect: `experts_touched`), plus
        what is cached of `context` tokens in every sequence. Left out: weights that no step reads,
        one row of the lookup table per sequence, activations, and what is written. No measured
        step can be faster than these bytes over the bandwidth.
        """
        weights = self.weight_bytes - self.lookup_bytes - self.routed_bytes - self.unread_bytes
        if self.experts:
            read = self.experts_touched(batch) if touched is None else touched
            weights += round(self.routed_bytes * read / self.experts)
        return weights + self.kv_bytes(context, batch)

    def as_dict(self) -> dict[str, Any]:
        """The card as JSON data; `ModelCard.from_dict` reads it back."""
        data = asdict(self)
        data["kv_blocks"] = list(data["kv_blocks"])
        if self.kv_layers is not None:
            data["kv_layers"] = [list(layer) for layer in self.kv_layers]
            data["kv_bytes_per_token"] = self.token_bytes
        if self.attention_layers is not None:
            data["attention_layers"] = [list(layer) for layer in self.attention_layers]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelCard:
        """A card from `as_dict`'s data; what else a record's values hold is ignored."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name in ("kv_layers", "attention_layers"):
            if values.get(name) is not None:
                values[name] = tuple(tuple(layer) for layer in values[name])
        if "kv_blocks" in values:
            values["kv_blocks"] = tuple(Block(**block) for block in values["kv_blocks"])
        return cls(**values)

    def _repr_markdown_(self) -> str:
        """A table for notebooks; GB is 10^9 bytes."""
        rows = {
            "parameters": f"{self.total_params / 1e9:.3f} B"
            if self.total_params >= 1e8
            else f"{self.total_params / 1e6:.3f} M",
            "active for one token": f"{self.active_params / 1e9:.2f} B ({self.active_share:.1%})"
            if self.total_params >= 1e8
            else f"{self.active_params / 1e6:.3f} M ({self.active_share:.1%})",
            f"weights in {self.dtype}": _size(self.weight_bytes),
            "layers": f"{self.layers}" + self._layer_note(),
            "experts": f"{self.experts_per_token} of {self.experts} per token"
            if self.experts
            else "none (dense)",
            "heads": f"{self.attention_heads} query, {self.kv_heads or '-'} key-value"
            if self.attention_heads
            else "none",
            "cache per token": _size(self.token_bytes)
            if self.kv_layers is not None
            else f"unknown: {self.kv_reason}",
            **({"state per sequence": _size(self.state_bytes)} if self.state_bytes else {}),
            "context limit": f"{self.context_limit:,} tokens" if self.context_limit else "unknown",
            "vocabulary": f"{self.vocab_size:,} tokens",
        }
        lines = [f"| {self.name} | {self.model_type} |", "|:--|:--|"]
        return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])

    def _layer_note(self) -> str:
        sliding = sum(window is not None for _, window in self.kv_layers or ())
        return f" ({sliding} with a sliding window of {self.window} tokens)" if sliding else ""


def computed(**sizes: Callable[[], int]) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes by name, and for those that this card cannot compute the reason instead.

    A record of a model whose cache is not understood keeps everything else.
    """
    values, missing = {}, {}
    for name, size in sizes.items():
        try:
            values[name] = size()
        except ModelError as error:
            missing[name] = str(error)
    return values, missing


def require_context(card: ModelCard, context: int, new_tokens: int) -> None:
    """Raise unless `context` prompt tokens and `new_tokens` more fit the model's positions."""
    if context < 1 or new_tokens < 0:
        raise ModelError(
            f"context {context} with {new_tokens} new tokens: use a context of 1 or more and no "
            "negative number of new tokens"
        )
    limit = card.context_limit
    if limit is not None and context + new_tokens > limit:
        raise ModelError(
            f"context {context} + {new_tokens} new tokens exceeds the {limit} positions of "
            f"{card.name}; use a context of at most {max(limit - new_tokens, 0)}"
        )


def _size(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes} B"


def bound_tok_per_s(decode_bytes: float, bytes_per_s: float) -> float:
    """Decode steps a second if nothing but reading these bytes took time (tok/s at batch 1)."""
    return bytes_per_s / decode_bytes


def prefill_flop(card: ModelCard, tokens: int, batch: int = 1) -> int | None:
    """Operations that a prefill of `tokens` tokens in each of `batch` sequences must do.

    Two (a product and a sum) for each active parameter and token; but the output matrix, of
    vocabulary x hidden size, is needed for the last token only. And for the attention of each
    layer 2 x heads x (width of keys + of values) for each pair of a token and one that it sees:
    itself and those before it, tokens x (tokens + 1) / 2 pairs, fewer where a window limits it.
    Lookups, norms and softmax are left out. None where the card lacks a number.
    """
    layers = card.attention_layers
    if layers is None and None not in (card.attention_heads, card.head_dim, card.kv_layers):
        width = 2 * card.attention_heads * card.head_dim
        layers = tuple((width, window) for _, window in card.kv_layers)
    if card.hidden_size is None or layers is None:
        return None
    output = card.vocab_size * card.hidden_size
    linear = 2 * ((card.active_params - output) * tokens + output)
    attention = sum(2 * width * _pairs(tokens, window) for width, window in layers)
    return batch * (linear + attention)


def _pairs(tokens: int, window: int | None) -> int:
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full
