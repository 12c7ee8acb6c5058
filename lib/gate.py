"""Correctness gate: a decode stack must compute the logits that `generate()` computes.

Tokens are no test, since logits that are nearly tied decide them; logits along one fixed
continuation are. A stack that fails has no throughput, because it does other work.
"""

from __future__ import annotations

from typing import Any

from lib import decode
from lib.records import Record
from lib.session import prompt_ids

REFERENCE = "hf-eager"
STEPS = 16
# Of the logits' norm, the median over steps. Another order of sums moves a float32 logit by a few
# 1e-7; a 16-bit one by about one rounding (2^-8 = 4e-3 in bfloat16) a layer, growing with depth.
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05}


class GateError(RuntimeError):
    """A stack whose logits differ from the reference by more than the tolerance."""


def relative_errors(found: Any, reference: Any) -> list[float]:
    """Norm of the difference over the norm of the reference, for each step.

    Both are logits (batch, steps, vocabulary); the largest error over the batch counts.
    """
    found, reference = found.float(), reference.float()
    errors = (found - reference).norm(dim=-1) / reference.norm(dim=-1)
    return errors.amax(0).tolist()


def row(
    model: Any, *, stack: str, context: int, seed: int, env_id: str | None, batch: int = 1,
    steps: int = STEPS,
) -> Record:  # fmt: skip
    """Compare a stack with `generate()` along the reference's own greedy continuation.

    Returns a `gate` record: samples `relative_error` a step; values `tolerance`, `median_error`,
    `max_error`, `same_choice` (share of steps with the same most likely token). Raises a GateError
    where the median is beyond the tolerance.
    """
    ids = prompt_ids(model, context, seed=seed, batch=batch)
    reference = decode.open_stack(REFERENCE, model.net)
    continuation = reference(ids, steps).tokens
    expected = reference.forced_logits(ids, continuation)
    tested = decode.open_stack(stack, model.net, capacity=context + steps + 1)
    found = tested.forced_logits(ids, continuation)
    errors = relative_errors(found, expected)
    median = sorted(errors)[len(errors) // 2]
    tolerance = TOLERANCE[model.dtype]
    if not median <= tolerance:  # not a number fails too
        raise GateError(
            f"stack {stack!r} at {context} tokens of context: its logits differ from those of "
            f"{REFERENCE} by {median:.2%} of their norm (median of {steps} steps), more than the "
            f"{tolerance:.2%} allowed in {model.dtype}: it computes something else, and its times "
            "are not shown"
        )
    key = model.key(stack=stack, context=context, new_tokens=steps, batch=batch,
                    cache=decode.cache_kind(stack), decoding="greedy")  # fmt: skip
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return Record("gate", key, samples={"relative_error": errors}, env_id=env_id, values={
        "tolerance": tolerance, "median_error": median, "max_error": max(errors),
        "same_choice": same})  # fmt: skip
