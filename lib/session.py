"""What every measurement starts with: the first rows of its file, and a prompt on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.prompts import exact_prompt
from lib.records import record, store
from lib.records.record import Record


def begin_records(model: Any, records_path: str | Path) -> list[Record]:
    """Write the environment and the model card as the first rows, so that reading needs neither.

    Returns both; the rows that follow carry the environment's id.
    """
    env = record.environment_record(model.device.environment())
    values = {**model.source, **model.card.as_dict(), "load_s": model.load_s}
    card = Record("card", model.key(), values=values, env_id=env.env_id)
    return [store.append(records_path, row) for row in (env, card)]


def prompt_ids(
    model: Any, context: int, *, seed: int, batch: int = 1, distinct: bool = False
) -> Any:
    """Token ids (batch, context) on the model's device, exactly `context` long after templating.

    All rows hold the same prompt, or with `distinct` one of its own each (seeds from `seed` on).
    """
    import torch

    seeds = range(seed, seed + batch) if distinct else [seed] * batch
    prompts = [
        exact_prompt(
            model.tokenizer,
            context,
            seed=s,
            vocab_size=model.vocab_size,
            special_ids=model.special_ids,
        ).ids
        for s in seeds
    ]
    ids = torch.tensor(prompts, device=model.device.torch_device)
    if ids.shape != (batch, context):
        raise RuntimeError(f"the prompt has shape {tuple(ids.shape)}, not {(batch, context)}")
    return ids
