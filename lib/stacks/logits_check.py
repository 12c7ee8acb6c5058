"""Correctness gate: a decode stack must compute the logits that `generate()` computes.

Tokens are no test, since logits that are nearly tied decide them; logits along one fixed
continuation are. A stack that fails has no throughput, because it does other work.

A mixture of experts needs two looks. Where rounding turns a router's choice between experts that
are nearly tied, logits move by 10 to 50 % of their norm, in the reference against itself as well:
a tolerance that lets this pass lets much pass. So the choice is pinned first, the same experts for
every token, and what is left is rounding, as in a dense model. Then the routers choose freely,
which tells whether they choose by the right numbers, and each token its own. On an H100 with
gpt-oss-20b, right stacks differ by 2 % when pinned, and a lost prompt, a position or a window that
is off, or swapped weights of experts by 25 to 140 %; one sequence's experts given to all move
pinned logits by 5 % only, free ones by 30 % instead of 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lib.models import experts
from lib.models.prompts import prompt_ids
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.stacks import registry
from lib.stacks.registry import STACKS

REFERENCE = STUDY_STACK
STEPS = 8
AGAIN_STEPS = 16  # of the look that checks an alarm
UNIT = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # relative error of one rounding
ROUNDINGS_PER_LAYER = 16
LEAST = 1e-4
NOISE = 3.0  # how many times as far from the reference as the reference from itself
MOST = 2**-0.5  # never more: logits that have nothing in common differ by the root of two


class GateError(RuntimeError):
    """A stack whose logits differ from the reference by more than the tolerance."""


def relative_errors(logits: Any, reference: Any) -> Any:
    """Norm of the difference over the norm of the reference: logits (batch, steps, vocabulary) to
    (batch, steps)."""
    logits, reference = logits.float(), reference.float()
    return (logits - reference).norm(dim=-1) / reference.norm(dim=-1)


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
    how: str = ""

    @property
    def mean(self) -> float:
        return fmean(self.errors)

    @property
    def passed(self) -> bool:
        """Not a number fails too."""
        return self.mean <= self.allowed

    @property
    def values(self) -> dict[str, float]:
        return {
            "mean_error": self.mean,
            "max_error": max(self.errors),
            "floor_error": self.floor,
            "allowed_error": self.allowed,
            "same_choice": self.same_choice,
        }

    @property
    def text(self) -> str:
        return (
            f"{self.mean:.2%} of their norm (mean of {len(self.errors)} steps{self.how}) where "
            f"rounding explains {self.allowed:.2%}"
        )


def row(
    model: Any,
    *,
    stack: str,
    context: int,
    seed: int,
    env_id: str | None,
    batch: int = 1,
    steps: int = STEPS,
) -> Record:
    """Compare a stack with `generate()` along the reference's own greedy continuation.

    Returns a `gate` record: samples `relative_error` a step; values `mean_error`, `max_error`,
    `floor_error` (the mean of the reference against itself in a batch of another size, which only
    changes the order of sums), `allowed_error` (the tolerance, or a multiple of the floor, and at
    most MOST), `same_choice`, the share of steps with the same most likely token, and
    `pinned_experts`, the number that every router was made to choose (0: as it likes). Where they
    were pinned, samples `free_error` and the values named `free_...` are of routers that choose
    freely. Where a first look raised an alarm, all are of a second one, longer and of another
    prompt, and samples `alarm_error` are of the first. Raises a GateError where both are beyond
    what is allowed.
    """
    place = {"stack": stack, "context": context, "batch": batch, "seed": seed, "steps": steps}
    pins = model.card.experts_per_token if experts.biases(model.net) else 0
    with experts.pinned(model.net, pins, seed=seed):  # nothing where no router has a bias
        judged, alarms = _judged(model, **place, turns=bool(model.card.experts) and not pins)
    values = {**judged.values, "pinned_experts": pins}
    samples = {"relative_error": judged.errors}
    if pins:
        free, more = _judged(model, **place, turns=True)
        values |= {f"free_{name}": value for name, value in free.values.items()}
        samples["free_error"], alarms = free.errors, alarms + more
    if alarms:
        samples["alarm_error"] = [error for alarm, _ in alarms for error in alarm.errors]
    warnings = tuple(
        {
            "code": "gate_repeated",
            "text": f"logits differed by {alarm.text}; on another prompt by {again.text}",
        }
        for alarm, again in alarms
    )
    key = model.key(
        stack=stack,
        context=context,
        new_tokens=steps,
        batch=batch,
        cache=STACKS[stack].cache,
        decoding="greedy",
    )
    return Record(
        "gate",
        key,
        samples=samples,
        values={**model.source, **values},
        warnings=warnings,
        env_id=env_id,
    )


def _judged(
    model: Any, *, seed: int, steps: int, **place: Any
) -> tuple[Look, list[tuple[Look, Look]]]:
    """A look that passed, and the alarm before it with the look that did not confirm it."""
    first = look(model, seed=seed, steps=steps, **place)
    if first.passed:
        return first, []
    again = look(model, seed=seed + 1, steps=max(steps, AGAIN_STEPS), **place)
    if again.passed:
        return again, [(first, again)]
    raise GateError(
        f"stack {place['stack']!r} at {place['context']} tokens of context: its logits differ from "
        f"those of {REFERENCE} by {first.text}, and on another prompt by {again.text}: it computes "
        f"something else than {model.dtype} rounds, and its times are not shown"
    )


def look(
    model: Any, *, stack: str, context: int, seed: int, batch: int, steps: int, turns: bool = False
) -> Look:
    """The errors of a stack along one continuation of one prompt.

    The largest of a batch counts; where routers may turn (`turns`) the mean, since of many
    sequences one nearly always does.
    """
    ids = prompt_ids(model, context, seed=seed, batch=batch, distinct=batch > 1)
    reference = registry.open_stack(REFERENCE, model.net)
    continuation = reference(ids, steps).tokens
    expected = reference.forced_logits(ids, continuation)
    again = _in_another_batch(reference, ids, continuation)
    tested = registry.open_stack(stack, model.net, capacity=context + steps + 1)
    logits = tested.forced_logits(ids, continuation)
    errors, itself = (
        (each.mean(0) if turns else each.amax(0)).tolist()
        for each in (relative_errors(x, expected) for x in (logits, again))
    )
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    floor = fmean(itself)
    allowed = max(tolerance(model.dtype, model.card.layers), NOISE * floor)
    how = ", the routers choosing freely" if turns else ""
    return Look(errors, floor, min(MOST, allowed), same, how)


def _in_another_batch(stack: Any, ids: Any, continuation: Any) -> Any:
    """The logits of a prompt as one of two, or of a batch in two halves, which needs no memory."""
    import torch

    if len(ids) == 1:
        return stack.forced_logits(ids.repeat(2, 1), continuation.repeat(2, 1))[:1]
    halves = zip(ids.tensor_split(2), continuation.tensor_split(2), strict=True)
    return torch.cat([stack.forced_logits(*half) for half in halves])
