"""The cache that an engine reserved, as the row of its start says.

An engine takes a share of the card's memory for itself, and what its weights, kernels and captures
leave of it is the cache. On a card of another size the rest is taken to stay as it was: what is
said of that size is predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lib.models.card import ModelCard
from lib.records.record import Record

CACHE, SHARE, BLOCK = "cache_reserved_bytes", "engine_gpu_memory_utilization", "engine_block_size"


@dataclass(frozen=True)
class Reserved:
    """Bytes of cache that an engine reserved on boards of `of_bytes` together, of which it takes a
    `share`. It hands the cache out in blocks of `block` tokens."""

    cache_bytes: int
    of_bytes: int
    share: float
    block: int

    def on(self, all_bytes: float) -> float:
        """Bytes of cache on boards of so many bytes together; negative where they are too few."""
        return self.cache_bytes + self.share * (all_bytes - self.of_bytes)

    def whole(self, tokens: int) -> int:
        """Tokens of the blocks that hold so many."""
        return -(-tokens // self.block) * self.block

    def paged(self, card: ModelCard) -> ModelCard:
        """The card with windows as they lie in blocks: one that slides begins and ends within a
        block, so that it takes one more."""
        layers = tuple(
            (each, window and self.whole(window - 1) + self.block)
            for each, window in card.kv_layers or ()
        )
        return replace(card, kv_layers=layers)


def told(rows: Iterable[Record], of_bytes: int | None) -> Reserved | None:
    """What the starts of an engine say on boards of `of_bytes` together; of several the largest
    cache, because that is what its batches may have had. None where a row does not tell."""
    full = [row.values for row in rows if all(row.values.get(n) for n in (CACHE, SHARE, BLOCK))]
    if not full or not of_bytes:
        return None
    most = max(full, key=lambda values: values[CACHE])
    return Reserved(most[CACHE], of_bytes, most[SHARE], most[BLOCK])
