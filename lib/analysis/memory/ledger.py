"""The memory ledger: what the parts of a call add up to, beside what NVML says the process uses.

Weights, cache, logits, experts, activations and the allocator's losses come from torch; the CUDA
context is what NVML saw beside the allocator before the call. The sum is then checked against what
NVML says after it: the residual is what neither of them explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.analysis.setups import by_setup
from lib.records.record import Record, cards_of
from lib.show import wording
from lib.show.wording import short

CLOSED_SHARE = 0.01
KINDS = ("memory-paper", "memory")
PARTS = {
    "weights": "weights", "first_use": "first use", "kv": "KV cache",
    "kv_behind": "behind windows", "logits": "logits", "experts": "experts",
    "activations": "activations", "padding": "padding", "slack": "slack", "context": "CUDA context",
}  # fmt: skip
# Where such a part was not told apart, the activations hold it.
WITHIN = ("kv_behind", "experts", "padding")
OLD = "recorded before the ledger was kept"


@dataclass(frozen=True)
class Ledger:
    """Bytes by part (None where unknown), what is in use by `source`, and why something is None."""

    parts: dict[str, int | None]
    used_bytes: int | None
    source: str
    reasons: dict[str, str]

    @property
    def unknown(self) -> list[str]:
        """Parts without which there is no sum, and the figure that it is compared with."""
        names = [n for n, size in self.parts.items() if size is None and n not in WITHIN]
        return [*names, *(["used_bytes"] if self.used_bytes is None else [])]

    @property
    def sum_bytes(self) -> int | None:
        """All parts together, or None where one is unknown."""
        if set(self.unknown) - {"used_bytes"}:
            return None
        return sum(size or 0 for size in self.parts.values())

    @property
    def residual_bytes(self) -> int | None:
        """In use and in no part: kernels loaded late, memory that libraries take by themselves."""
        return difference(self.used_bytes, self.sum_bytes)

    @property
    def closed(self) -> bool | None:
        """Whether the residual is small beside what is in use."""
        if self.residual_bytes is None:
            return None
        return abs(self.residual_bytes) <= CLOSED_SHARE * self.used_bytes

    @property
    def open_reason(self) -> str:
        """Why it cannot be closed; empty where it can."""
        return next((self.reasons[n] for n in self.unknown), "")


def ledger(row: Record, card: Mapping[str, Any] | None = None) -> Ledger:
    """The ledger of a memory row; `card` are the values of the model's card, for older rows.

    Parts are those alive at the peak where the row tells where that was. Where it does not, cache
    and logits are those held after the call, and experts count as activations.
    """
    v = row.values
    weights = v.get("weight_bytes", (card or {}).get("weight_bytes"))
    above = above_bytes(row)
    requested = difference(v.get("requested_peak_bytes"), v.get("requested_baseline_bytes"))
    there = {**_at_the_peak(row), "padding": difference(above, requested)}
    parts = {
        "weights": weights,
        "first_use": difference(v.get("baseline_bytes"), weights),
        "kv": there["kv"],
        "kv_behind": there["kv_behind"],
        "logits": there["logits"],
        "experts": there["experts"],
        "activations": None,
        "padding": there["padding"],
        "slack": difference(v.get("reserved_bytes"), v.get("peak_bytes")),
        "context": v.get("context_bytes"),
    }
    if None not in (above, there["kv"]):
        parts["activations"] = above - sum(size or 0 for size in there.values())
    return Ledger(parts, v.get("used_bytes"), v.get("used_source", ""), _reasons(row, parts))


def above_bytes(row: Record) -> int | None:
    """The peak less the baseline."""
    return difference(row.value("peak_bytes"), row.value("baseline_bytes"))


def difference(larger: int | None, smaller: int | None) -> int | None:
    """None where one side is None."""
    return None if larger is None or smaller is None else larger - smaller


def _at_the_peak(row: Record) -> dict[str, int | None]:
    v, where = row.values, row.value("peak_in")
    if where is None:
        dense = row.key.get("experts") == "none"
        return {
            "kv": v.get("kv_tensor_bytes"),
            "kv_behind": None,
            "logits": v.get("logits_bytes", 0),
            "experts": 0 if dense else None,
        }
    workspace = {
        "prefill experts": "expert_workspace_bytes",
        "decode experts": "decode_expert_workspace_bytes",
    }
    # The logits of the prompt are made at the end of the prefill, and live on while decoding.
    alive = where.startswith("decode") or where == "prefill logits"
    return {
        "kv": v["kv_peak_bytes"],
        "kv_behind": v["kv_peak_behind_bytes"],
        "logits": v["logits_bytes"] if alive else 0,
        "experts": v[workspace[where]] if where in workspace else 0,
    }


def _reasons(row: Record, parts: Mapping[str, int | None]) -> dict[str, str]:
    if row.error:
        return dict.fromkeys([*parts, "used_bytes"], f"failed: {row.error}")
    missing, unread = row.missing, row.missing.get("used_bytes", OLD)
    cache = missing.get("kv_tensor_bytes", "no cache was read")
    return {
        **dict.fromkeys(WITHIN, "not told apart from the activations"),
        "weights": "no model card among the rows",
        "first_use": "no weights or no baseline",
        "kv": cache,
        "logits": "no logits were read",
        "activations": cache,
        "slack": f"reserved memory: {missing.get('reserved_bytes', OLD)}",
        "context": unread,
        "used_bytes": unread,
    }


def of_rows(rows: Sequence[Record]) -> list[tuple[Record, Ledger]]:
    """Every memory row that did not fail with its ledger, by model, setup and context."""
    ordered = [
        r
        for group in by_setup(rows, KINDS)
        for r in sorted(group.rows, key=lambda r: r.key.get("context") or 0)
    ]
    return [(row, ledger(row, card_of(rows, row))) for row in ordered]


def card_of(rows: Sequence[Record], row: Record) -> Mapping[str, Any] | None:
    """Values of the card of a row's model in its dtype, or None."""
    mine = cards_of(rows, row.key.get("model"), row.key.get("dtype"))
    return mine[-1].values if mine else None


def conclusion(rows: Sequence[Record]) -> str:
    """Peak above baseline and its largest part, at the longest context of each protocol."""
    lines = []
    names = {
        "kv": "KV cache",
        "logits": "held logits",
        "experts": "workspace of the experts",
        "activations": "workspace",
    }
    for kind, title in (("memory-paper", "the paper's protocol"), ("memory", "generate()")):
        for group in by_setup(rows, kind):
            v = max(group.rows, key=lambda r: r.key["context"])
            above, parts = above_bytes(v), ledger(v).parts
            line = f"{group.label} under {title} at {v.key['context']} tokens: peak "
            if above is None:
                reason = v.missing.get("peak_bytes", "no reading")
                lines.append(f"{line}not measured ({reason}).")
                continue
            line += (
                f"{v.values['peak_bytes'] / 1e9:.3f} GB, {above / 1e6:,.1f} MB above the baseline"
            )
            if parts["kv"] is None:
                lines.append(f"{line}; its parts are not told apart.")
                continue
            part = max(names, key=lambda name: parts[name] or 0)
            lines.append(
                f"{line}; the largest part is the {names[part]} with {parts[part] / above:.0%}, "
                f"the KV cache is {parts['kv'] / above:.0%}."
            )
    return wording.bullets([*lines, *sentences(rows), *wording.cautions(rows)])


def sentences(rows: Sequence[Record]) -> list[str]:
    """Whether the ledgers close, and how far the predicted peaks are from the measured ones."""
    pairs = of_rows([r for r in rows if r.kind == "card" or "weight_bytes" in r.values])
    if not pairs:
        return []
    lines = []
    checked = [book for _, book in pairs if book.closed is not None]
    if checked:
        closed = sum(book.closed for book in checked)
        worst = max(checked, key=lambda book: abs(book.residual_bytes))
        lines.append(
            f"The memory ledger closes to {CLOSED_SHARE:.0%} of what NVML says on "
            f"{closed} of {len(checked)} arms; the largest residual is "
            f"{short(worst.residual_bytes / 1e6)} MB of {short(worst.used_bytes / 1e9)} "
            f"GB ({worst.source})."
        )
    else:
        lines.append(f"The memory ledger is not closed: {pairs[0][1].open_reason}.")
    ratios = [
        above_bytes(r) / r.values["predicted_bytes"] for r, _ in pairs if r.value("predicted_bytes")
    ]
    if ratios:
        lines.append(
            f"Peaks above the baseline are {min(ratios):.3f} to {max(ratios):.3f} times "
            f"what the shapes alone predict ({len(ratios)} arms)."
        )
    return lines
