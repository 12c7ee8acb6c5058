"""The bound that a decode step cannot beat: the bytes it must read over the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from lib import stats, tables
from lib.card import computed
from lib.records import Record, environments, select

# A copy's bandwidth bounds a step only where the step's bytes do not fit the last-level cache.
CACHE_BYTES = 2**28
TOLERANCE = 1.10  # a copy is not the best stream: a pure read may be some percent faster


def bound_tok_per_s(decode_bytes: int, bytes_per_s: float) -> float:
    """Decode throughput at batch 1 if nothing but these bytes took time (tok/s)."""
    return bytes_per_s / decode_bytes


def rounded(value: float) -> float:
    """Four significant digits, as the tables show."""
    return float(f"{value:.4g}")


def expected(card: Any, contexts: Sequence[int], bytes_per_s: float) -> pd.DataFrame:
    """Before measuring: what a step reads at each context, and the decode throughput it allows.

    A dash, and a column with the reason, where the card cannot compute it.
    """
    found, missing = computed(**{str(c): partial(card.decode_bytes, c) for c in contexts})
    sizes = [found.get(str(context)) for context in contexts]
    return pd.DataFrame({
        "context (tokens)": contexts,
        "a step reads (GB)": ["-" if s is None else rounded(s / 1e9) for s in sizes],
        "decode bound (tok/s)": ["-" if s is None else rounded(bound_tok_per_s(s, bytes_per_s))
                                 for s in sizes],
        **({"missing": list(missing.values())} if missing else {}),
    }).set_index("context (tokens)")  # fmt: skip


def utilisation(rows: Sequence[Record]) -> pd.DataFrame:
    """Measured decode throughput against the bound, per model and context (useful MBU)."""
    lines = []
    for model, context, measured, bound in _measured_and_bound(rows):
        lines.append({
            "model": model, "context (tokens)": context,
            "decode throughput (tok/s)": rounded(measured.value),
            "bound (tok/s)": rounded(bound),
            "share of the bound": rounded(measured.value / bound),
        })  # fmt: skip
    return pd.DataFrame(lines)


def violations(rows: Sequence[Record]) -> list[str]:
    """Arms that beat their bound although a step reads far more than a cache holds: a bug."""
    return [
        f"{model} at {context}: {measured.value:.1f} tok/s beats the bound {bound:.1f} tok/s"
        for model, context, measured, bound in _measured_and_bound(rows, CACHE_BYTES)
        if measured.value > TOLERANCE * bound
    ]


def _measured_and_bound(rows: Sequence[Record], at_least_bytes: int = 0):
    envs = environments(rows)
    arms = [r for r in select(rows, "latency") if not r.error]
    for model, context in sorted({(r.key["model"], r.key["context"]) for r in arms}):
        mine = select(arms, model=model, context=context)
        measured: stats.Estimate = tables.decode_tok_per_s(mine)
        env, size = envs.get(mine[0].env_id or "", {}), mine[0].value("decode_bytes")
        if measured.value and size and size >= at_least_bytes and env.get("copy_bytes_per_s"):
            bound = bound_tok_per_s(size, env["copy_bytes_per_s"])
            yield model, context, measured, bound
