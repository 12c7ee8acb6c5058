"""How many positions a model is made for, by its configuration and its tables of positions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lib.models import config_fields as fields

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_LIMIT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_seq_length",
    "model_max_length",
    "n_ctx",
)
_LONGEST_TABLE = 8192  # positions that a table is tried for: masks of that length squared are real
_SET_ASIDE = 8  # rows of a table of positions that may be for something else


def of(config: PreTrainedConfig, net: torch.nn.Module) -> int | None:
    """Positions that the model is made for; None where its configuration states no limit.

    Rotary positions that are stretched by a factor reach further than the number that is stated:
    as far as the factor times what the model was trained for. The library asks to leave the stated
    number as it was then; where `original_max_position_embeddings` is given, it may say either.
    """
    values = (fields.value(config, name) for name in _LIMIT_NAMES)
    stated = next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
    if stated is None or stated < 1:
        return None
    return _usable(net, max([stated, *(_stretched(rope, stated) for rope in _ropes(config))]))


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary positions of the model, one for each kind of layer where they differ.

    Where only some kinds are stretched (by no stated original length) the number stated holds.
    """
    given = fields.value(config, "rope_parameters") or fields.value(config, "rope_scaling") or {}
    if not isinstance(given, dict):
        return []
    nested = [rope for rope in given.values() if isinstance(rope, dict)]
    if not nested:
        return [given]
    return [rope for rope in nested if rope.get("original_max_position_embeddings")] or (
        nested
        if len({json.dumps(rope, sort_keys=True, default=str) for rope in nested}) == 1
        else []
    )


def _stretched(rope: dict[str, Any], stated: int) -> int:
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind not in ("yarn", "linear", "dynamic") or not factor:
        return stated  # others state the whole length
    return round(factor * (rope.get("original_max_position_embeddings") or stated))


def _usable(net: torch.nn.Module, limit: int) -> int:
    """The limit less what a learned table of positions sets aside at its beginning.

    RoBERTa and its kin number positions from behind the padding index, so that the table has fewer
    of them than rows. Tried on shapes alone, where a table ends near the limit.
    """
    import torch

    from lib.models import dry_run

    tables = (m for m in net.modules() if isinstance(m, torch.nn.Embedding))
    if limit <= _LONGEST_TABLE and any(abs(m.num_embeddings - limit) <= _SET_ASIDE for m in tables):
        for usable in range(limit, max(limit - _SET_ASIDE, 1), -1):
            if dry_run.reaches(net, usable):
                return usable
    return limit
