"""One block of an upgrade verdict: the arms of one model, in a process of one environment.

`python -m lib.measure.versus '{"name": ...}'` is that process, with the arguments of `main`; the
rows go to a file of their own. The captured step (`graph`) is the control, which does not wait for
what the library does on the host.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lib.hardware.device import open_device
from lib.measure import latency
from lib.measure.memory.bytes_alive import cache_bytes
from lib.measure.session import begin_records
from lib.models import load
from lib.models.prompts import text_tokens
from lib.records import record, store
from lib.records.record import Record
from lib.stacks import logits_check, registry
from lib.stacks.registry import STACKS

CONTROL = "graph"
BUSY_TOKENS = 8  # decode steps under the profiler


def arms(new_tokens: int) -> list[tuple[str, int]]:
    """Stack and new tokens of each arm: first token, whole call, and the control's whole call."""
    reference = logits_check.REFERENCE
    return [(reference, 1), (reference, new_tokens), (CONTROL, new_tokens)]


def block(
    model: Any,
    *,
    context: int,
    new_tokens: int,
    calls: int,
    seed: int,
    explain: bool,
    records_path: str | Path,
) -> list[Record]:
    """Time `calls` calls of each arm, each row written at once; an arm that fails says why.

    With `explain` the block then looks, after all times are taken, at what a call made (`made`) and
    at how the device worked (`busy`).
    """
    rows = begin_records(model, records_path)
    common = {"context": context, "seed": seed, "env_id": rows[0].env_id}
    work: list[tuple[str, str, int, Callable[..., Record]]] = [
        ("latency", stack, tokens, partial(latency.gated_arm, new_tokens=tokens, repeats=calls))
        for stack, tokens in arms(new_tokens)
    ]
    for stack in (logits_check.REFERENCE, CONTROL) if explain else ():
        work.append(("made", stack, new_tokens, partial(made_row, new_tokens=new_tokens)))
        work.append(("busy", stack, BUSY_TOKENS + 1, partial(latency.busy_row, tokens=BUSY_TOKENS)))
    for kind, stack, tokens, measure in work:
        try:
            row = measure(model, stack=stack, **common)
        except Exception as error:  # a stack that cannot be made, or that computes something else
            key = model.key(
                stack=stack,
                context=context,
                new_tokens=tokens,
                cache=STACKS[stack].cache,
                decoding="greedy",
            )
            row = Record(kind, key, error=record.first_line(error), env_id=common["env_id"])
        rows.append(store.append(records_path, row))
        model.device.empty_cache()
    return rows


def made_row(
    model: Any, *, stack: str, context: int, new_tokens: int, seed: int, env_id: str | None
) -> Record:
    """What one call made. values: `made_tokens` of a sequence and `made_sha` of their ids;
    `kv_tensor_bytes` of its cache; `text_tokens`, of a fixed text as a prompt of this model."""
    subject = registry.subject(model, stack, capacity=context + new_tokens)
    out = subject.generate(subject.prompt(context, seed=seed), new_tokens)
    ids, missing = out.tokens[0].tolist(), {}
    values = {"made_tokens": len(ids), "made_sha": hashlib.sha256(str(ids).encode()).hexdigest()}
    try:
        values["kv_tensor_bytes"] = cache_bytes(out.cache)
    except ValueError as error:
        missing["kv_tensor_bytes"] = str(error)
    if model.tokenizer is None:
        missing["text_tokens"] = "random weights have no tokenizer: give a folder or a hub id"
    else:
        values["text_tokens"] = text_tokens(model.tokenizer)
    key = subject.key(context=context, new_tokens=new_tokens)
    return Record("made", key, values=values, missing=missing, env_id=env_id)


def main(argv: Sequence[str]) -> int:
    """Load the model and measure the block that one JSON object describes."""
    given = json.loads(argv[0])
    device = open_device(given.pop("device"))
    source = {name: given.pop(name) for name in ("name", "weights", "dtype")}
    model = load.load(source.pop("name"), **source, device=device, seed=given["seed"])
    block(model, **given)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
