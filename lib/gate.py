"""Correctness gate: a decode stack must compute the logits that `generate()` computes.

Tokens are no test, since logits that are nearly tied decide them; logits along one fixed
continuation are. A stack that fails has no throughput, because it does other work.

The logits of a mixture of experts differ by 2 % of their norm where rounding leaves every choice of
the router, and by 10 to 50 % where it turns one that is nearly tied. The mean over steps counts
these; a median falls on one side or the other. Few steps can still raise an alarm by chance, so
that one counts only if a longer look at another prompt finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lib import decode
from lib.records import Record
from lib.session import prompt_ids

REFERENCE = "hf-eager"
STEPS = 8
AGAIN_STEPS = 16  # of the look that checks an alarm
UNIT = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # relative error of one rounding
ROUNDINGS_PER_LAYER = 16
LEAST = 1e-4
VALUES = ("mean_error", "max_error", "floor_error", "allowed_error", "same_choice")
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


@dataclass(frozen=True)
class Look:
    """Errors of a stack a step, and the mean error of the reference against itself."""

    errors: list[float]
    floor: float
    allowed: float
    same_choice: float

    @property
    def mean(self) -> float:
        return fmean(self.errors)

    @property
    def passed(self) -> bool:
        """Not a number fails too."""
        return self.mean <= self.allowed

    @property
    def text(self) -> str:
        return (f"{self.mean:.2%} of their norm (mean of {len(self.errors)} steps) where "
                f"rounding explains {self.allowed:.2%}")  # fmt: skip


def row(
    model: Any, *, stack: str, context: int, seed: int, env_id: str | None, batch: int = 1,
    steps: int = STEPS,
) -> Record:  # fmt: skip
    """Compare a stack with `generate()` along the reference's own greedy continuation.

    Returns a `gate` record: samples `relative_error` a step; values `mean_error`, `max_error`,
    `floor_error` (the mean of the reference against itself in a batch of another size, which only
    changes the order of sums), `allowed_error` (the tolerance, or a multiple of the floor) and
    `same_choice`, the share of steps with the same most likely token. Where the first look raised
    an alarm, all are of the second, and samples `alarm_error` are of the first. Raises a GateError
    where both are beyond what is allowed.
    """
    arguments = {"stack": stack, "context": context, "batch": batch}
    found, samples, warnings = look(model, seed=seed, steps=steps, **arguments), {}, ()
    if not found.passed:
        alarm = found
        found = look(model, seed=seed + 1, steps=max(steps, AGAIN_STEPS), **arguments)
        if not found.passed:
            raise GateError(
                f"stack {stack!r} at {context} tokens of context: its logits differ from those of "
                f"{REFERENCE} by {alarm.text}, and on another prompt by {found.text}: it computes "
                f"something else than {model.dtype} rounds, and its times are not shown"
            )
        samples = {"alarm_error": alarm.errors}
        text = f"logits differed by {alarm.text}; on another prompt by {found.text}"
        warnings = ({"code": "gate_repeated", "text": text},)
    key = model.key(stack=stack, context=context, new_tokens=steps, batch=batch,
                    cache=decode.cache_kind(stack), decoding="greedy")  # fmt: skip
    values = (found.mean, max(found.errors), found.floor, found.allowed, found.same_choice)
    return Record("gate", key, samples={"relative_error": found.errors, **samples}, env_id=env_id,
                  values={**model.source, **dict(zip(VALUES, values, strict=True))},
                  warnings=warnings)  # fmt: skip


def look(model: Any, *, stack: str, context: int, seed: int, batch: int, steps: int) -> Look:
    """The errors of a stack along one continuation of one prompt."""
    ids = prompt_ids(model, context, seed=seed, batch=batch, distinct=batch > 1)
    reference = decode.open_stack(REFERENCE, model.net)
    continuation = reference(ids, steps).tokens
    expected = reference.forced_logits(ids, continuation)
    again = _in_another_batch(reference, ids, continuation)
    tested = decode.open_stack(stack, model.net, capacity=context + steps + 1)
    found = tested.forced_logits(ids, continuation)
    floor = fmean(relative_errors(again, expected))
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return Look(relative_errors(found, expected), floor,
                max(tolerance(model.dtype, model.card.layers), NOISE * floor), same)  # fmt: skip


def _in_another_batch(stack: Any, ids: Any, continuation: Any) -> Any:
    """The logits of a prompt as one of two, or of a batch in two halves, which needs no memory."""
    import torch

    if len(ids) == 1:
        return stack.forced_logits(ids.repeat(2, 1), continuation.repeat(2, 1))[:1]
    halves = zip(ids.tensor_split(2), continuation.tensor_split(2), strict=True)
    return torch.cat([stack.forced_logits(*half) for half in halves])
