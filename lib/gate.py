"""Correctness gate: a decode stack must compute the logits that `generate()` computes.

Tokens are no test, since logits that are nearly tied decide them; logits along one fixed
continuation are. A stack that fails has no throughput, because it does other work.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from lib import decode
from lib.records import Record
from lib.session import prompt_ids

REFERENCE = "hf-eager"
STEPS = 8
UNIT = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # relative error of one rounding
ROUNDINGS_PER_LAYER = 16
LEAST = 1e-4
VALUES = ("median_error", "max_error", "floor_error", "allowed_error", "same_choice")
NOISE = 3.0  # how many times as far from the reference as the reference from itself


class GateError(RuntimeError):
    """A stack whose logits differ from the reference by more than the tolerance."""


def relative_errors(found: Any, reference: Any) -> list[float]:
    """Norm of the difference over the norm of the reference, for each step.

    Both are logits (batch, steps, vocabulary); the largest error over the batch counts.
    """
    found, reference = found.float(), reference.float()
    errors = (found - reference).norm(dim=-1) / reference.norm(dim=-1)
    return errors.amax(0).tolist()


def tolerance(dtype: str, layers: int) -> float:
    """How far rounding alone moves logits: a random walk of 16 roundings a layer."""
    return max(LEAST, UNIT[dtype] * (ROUNDINGS_PER_LAYER * layers) ** 0.5)


def row(
    model: Any, *, stack: str, context: int, seed: int, env_id: str | None, batch: int = 1,
    steps: int = STEPS,
) -> Record:  # fmt: skip
    """Compare a stack with `generate()` along the reference's own greedy continuation.

    Returns a `gate` record: samples `relative_error` a step; values `median_error`, `max_error`,
    `floor_error` (the reference against itself in a batch of another size, which only changes the
    order of sums), `allowed_error` (the tolerance, or a multiple of the floor: a router that is
    nearly tied turns rounding into another expert) and `same_choice`, the share of steps with the
    same most likely token. Raises a GateError where the median is beyond what is allowed.
    """
    ids = prompt_ids(model, context, seed=seed, batch=batch, distinct=batch > 1)
    reference = decode.open_stack(REFERENCE, model.net)
    continuation = reference(ids, steps).tokens
    expected = reference.forced_logits(ids, continuation)
    again = _in_another_batch(reference, ids, continuation)
    tested = decode.open_stack(stack, model.net, capacity=context + steps + 1)
    found = tested.forced_logits(ids, continuation)
    errors, floor = relative_errors(found, expected), median(relative_errors(again, expected))
    allowed = max(tolerance(model.dtype, model.card.layers), NOISE * floor)
    if not median(errors) <= allowed:  # not a number fails too
        raise GateError(
            f"stack {stack!r} at {context} tokens of context: its logits differ from those of "
            f"{REFERENCE} by {median(errors):.2%} of their norm (median of {steps} steps), more "
            f"than the {allowed:.2%} that rounding in {model.dtype} explains: it computes "
            "something else, and its times are not shown"
        )
    key = model.key(stack=stack, context=context, new_tokens=steps, batch=batch,
                    cache=decode.cache_kind(stack), decoding="greedy")  # fmt: skip
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    values = (median(errors), max(errors), floor, allowed, same)
    return Record("gate", key, samples={"relative_error": errors}, env_id=env_id,
                  values={**model.source, **dict(zip(VALUES, values, strict=True))})  # fmt: skip


def _in_another_batch(stack: Any, ids: Any, continuation: Any) -> Any:
    """The logits of a prompt as one of two, or of a batch in two halves, which needs no memory."""
    import torch

    if len(ids) == 1:
        return stack.forced_logits(ids.repeat(2, 1), continuation.repeat(2, 1))[:1]
    halves = zip(ids.tensor_split(2), continuation.tensor_split(2), strict=True)
    return torch.cat([stack.forced_logits(*half) for half in halves])
