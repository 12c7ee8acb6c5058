"""Figures of memory: what a peak consists of, and the ledger beside what NVML says."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from lib.analysis.memory import ledger
from lib.analysis.setups import by_setup
from lib.records.record import Record
from lib.show.figure import PALETTE, axes, labelled
from lib.show.wording import short

PARTS = {
    "kv_tensor_bytes": "KV cache",
    "logits_bytes": "logits held",
    "workspace_bytes": "workspace",
}
PROTOCOLS = {"memory-paper": "the paper's protocol", "memory": "generate()"}


def memory_parts(rows: Sequence[Record], kind: str, ax: Axes | None = None) -> Axes:
    """What the peak above the baseline consists of, at each context (MB, 10^6 bytes)."""
    arms = [(name, r) for name, r in _arms(rows, kind) if r.value("workspace_bytes") is not None]
    ax = axes(ax, figsize=(7.2, 1.4 + 0.32 * len(arms)))
    left = [0.0] * len(arms)
    for number, (field, label) in enumerate(PARTS.items() if arms else ()):
        sizes = [max(r.values[field], 0) / 1e6 for _, r in arms]
        ax.barh(range(len(arms)), sizes, left=left, color=PALETTE[number], label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    ax.set_yticks(range(len(arms)), [name for name, _ in arms])
    ax.invert_yaxis()
    return labelled(ax, f"Peak above baseline, {PROTOCOLS[kind]}", "MB (10^6 bytes)", "")


def memory_ledger(
    rows: Sequence[Record], ax: Axes | None = None, kind: str = "memory-paper"
) -> Axes:
    """Everything beside the weights, part by part, and how far the sum is from what NVML says.

    The weights (named with their size at each bar) would hide the rest. GB are 10^9 bytes.
    """
    ledgers = [
        (name, ledger.ledger(row, ledger.card_of(rows, row))) for name, row in _arms(rows, kind)
    ]
    ax = axes(ax, figsize=(9.6, 1.6 + 0.3 * len(ledgers)))
    left = [0.0] * len(ledgers)
    parts = {n: title for n, title in ledger.PARTS.items() if n != "weights"}
    for number, (name, label) in enumerate(parts.items() if ledgers else ()):
        sizes = [max(book.parts[name] or 0, 0) / 1e9 for _, book in ledgers]
        if any(sizes):
            ax.barh(range(len(ledgers)), sizes, left=left, color=PALETTE[number], label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, (_, book) in enumerate(ledgers):
        ax.text(left[place], place, _closing(book), va="center", fontsize=8)
    ax.set_yticks(range(len(ledgers)), [f"{name} ({_weights(book)})" for name, book in ledgers])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.5 * max([*left, 1e-9]))
    reasons = dict.fromkeys(book.open_reason for _, book in ledgers if book.closed is None)
    below = "".join(f"\nnot closed: {reason}" for reason in reasons)
    return labelled(
        ax, f"Memory beside the weights, {PROTOCOLS[kind]}", f"GB (10^9 bytes){below}", ""
    )


def _arms(rows: Sequence[Record], kind: str) -> list[tuple[str, Record]]:
    """The rows of a kind that did not fail, each with what its bar is called."""
    return [
        (f"{group.label}, {row.key['context']}", row)
        for group in by_setup(rows, kind)
        for row in sorted(group.rows, key=lambda r: r.key["context"])
    ]


def _closing(book: ledger.Ledger) -> str:
    """What the sum of the parts lacks of what NVML says."""
    left = book.residual_bytes
    if left is None:
        return " not closed"
    return f" {left / 1e6:+.1f} MB to NVML ({left / book.used_bytes:+.2%})"


def _weights(book: ledger.Ledger) -> str:
    size = book.parts["weights"]
    return "weights ?" if size is None else f"weights {short(size / 1e9)} GB"
