"""The same model on several decode stacks: gate first, then times, then how busy the device was.

Rows are those of `latency`, so that every table and figure of latency reads them; the stack is
in their key. A stack that fails is one row with its error and has no times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.measure import latency
from lib.measure.session import track
from lib.records import record, store
from lib.records.record import Record
from lib.stacks import logits_check
from lib.stacks.registry import STACKS


def sweep(
    model: Any,
    *,
    stacks: Sequence[str],
    contexts: Sequence[int],
    new_tokens: Sequence[int],
    repeats: int,
    slope_repeats: int,
    busy_tokens: int,
    harness_pairs: int,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """Every stack at every context, each row written at once.

    A context has a `gate` row, one latency arm for one token (TTFT) and each of `new_tokens` (the
    first of these gets `repeats` calls, the others `slope_repeats`) and, on a GPU, a `busy` row.
    The last stack has a `harness` row at the last context, whose prefill is least at the mercy of
    the host.
    """
    rows: list[Record] = []
    places = [(stack, context) for stack in stacks for context in contexts]
    for stack, context in track(places, f"stacks of {model.name}"):
        common = {"stack": stack, "context": context, "seed": seed, "env_id": env_id}
        try:
            for row in _place(model, common, new_tokens, repeats, slope_repeats, busy_tokens):
                rows.append(store.append(records_path, row))
            if harness_pairs and (stack, context) == (stacks[-1], contexts[-1]):
                row = latency.harness_row(
                    model, new_tokens=new_tokens[0], pairs=harness_pairs, **common
                )
                rows.append(store.append(records_path, row))
        except Exception as error:  # a stack that cannot be made, or that computes something else
            key = model.key(
                stack=stack,
                context=context,
                new_tokens=new_tokens[0],
                cache=STACKS[stack].cache,
                decoding="greedy",
            )
            failed = Record("latency", key, error=record.first_line(error), env_id=env_id)
            rows.append(store.append(records_path, failed))
        model.device.empty_cache()
    return rows


def _place(
    model: Any,
    common: dict[str, Any],
    new_tokens: Sequence[int],
    repeats: int,
    slope_repeats: int,
    busy_tokens: int,
) -> Any:
    if common["stack"] != logits_check.REFERENCE:
        yield logits_check.row(model, **common)
    for tokens in dict.fromkeys((1, *new_tokens)):
        count = repeats if tokens == new_tokens[0] else slope_repeats
        yield latency.arm(model, new_tokens=tokens, repeats=count, **common)
    if busy_tokens:
        yield latency.busy_row(model, tokens=busy_tokens, **common)
