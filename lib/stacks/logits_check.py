"""Correctness gate: a decode stack must compute what `generate()` computes.

Tokens are no test, since logits that are nearly tied decide them; logits along one fixed
continuation are. A stack that fails has no throughput, because it does other work.

A gate that allows much is none. Three things make small tolerances possible.

Experts are pinned. Where rounding turns a router's choice between experts that are nearly tied,
logits move by 10 to 50 % of their norm, in the reference against itself as well. So each sequence
of the batch is given experts of its own, the same for all of its tokens: what is left is rounding,
as in a dense model, and one sequence's experts given to another are wrong ones.

A captured stack is looked at layer by layer as well (`layer_check`). Along a whole net rounding
grows with depth, to 4 to 10 % of the logits' norm at 28 to 64 layers in bfloat16, and random
weights of small width let little else move them. Given the reference's own inputs, a right layer
is off by at most 1 % at any depth; where experts, rotations or tokens of the prompt are wrong, the
worst layer is by 29 % and more.

No tolerance is above MOST_ERROR, that of a dense net above MOST_ERROR_DENSE, whatever the
reference's floor says. Only logits of routers that choose freely may differ more: they show that
experts nobody is pinned to are right too, and no row stands on them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from lib.models import experts
from lib.models.prompts import prompt_ids
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.stacks import fused, layer_check, registry
from lib.stacks.registry import STACKS
from lib.stacks.stack import MOST_ERROR, MOST_ERROR_DENSE

REFERENCE = STUDY_STACK
STEPS = 8
AGAIN_STEPS = 16  # of the look that checks an alarm
UNIT = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}  # relative error of one rounding
ROUNDINGS_PER_LAYER = 16
LEAST = 1e-4
NOISE = 3.0  # how many times as far from the reference as the reference from itself
FREE_MOST = 2**-0.5  # logits that have nothing in common differ by the root of two
ROUNDINGS_OF_A_LAYER = 64  # in one layer on its own, whose input is as large as all before it added
FREELY = ", the routers choosing freely"


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
            f"its logits differ by {self.mean:.2%} of their norm (mean of {len(self.errors)} "
            f"steps{self.how}) where rounding explains {self.allowed:.2%}"
        )


@dataclass(frozen=True)
class LayerLook:
    """Errors of a stack a layer; `worst` where the largest counts, else their mean."""

    errors: list[float]
    allowed: float
    how: str
    sharpened: float
    worst: bool

    @property
    def passed(self) -> bool:
        """Not a number fails too."""
        judged = self.errors if self.worst else [self.mean]
        return all(error <= self.allowed for error in judged)

    @property
    def mean(self) -> float:
        return fmean(self.errors)

    @property
    def values(self) -> dict[str, float]:
        return {
            "mean_error": self.mean,
            "max_error": max(self.errors),
            "allowed_error": self.allowed,
            "sharpened": self.sharpened,
        }

    @property
    def text(self) -> str:
        error, what = (max(self.errors), "largest") if self.worst else (self.mean, "mean")
        return (
            f"what its layers add differs by {error:.2%} of its norm ({what} of "
            f"{len(self.errors)} layers{self.how}) where rounding explains {self.allowed:.2%}"
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
    most MOST_ERROR, or MOST_ERROR_DENSE), `same_choice`, the share of steps with the same most
    likely token, `pinned_experts`, the number that every router was made to choose for each
    sequence (0: there is no router), and `pinned_sets`, for how many sequences. Of a captured
    stack, samples `layer_error` (the worst sequence's mean over the steps, by layer) and values
    named `layer_...`, with `layer_sharpened` by how much the scores of attention were scaled. Where
    routers were pinned, samples `free_error` and values named `free_...` are of routers that choose
    freely: of the layers of a captured stack, of the logits of others. Where a first look raised an
    alarm, its values are of a second one, longer and of another prompt, and samples `alarm_error`
    are of the first. Raises a GateError where both are beyond what is allowed.
    """
    place = {"stack": stack, "context": context, "batch": batch, "seed": seed, "steps": steps}
    mixture = bool(model.card.experts)
    pins = model.card.experts_per_token if mixture and experts.routers(model.net) else 0
    judged, alarms = _judged(model, look, **place, pins=pins)
    values = {**judged.values, "pinned_experts": pins, "pinned_sets": batch if pins else 0}
    samples = {"relative_error": judged.errors}
    further = []
    if STACKS[stack].captured:
        further.append(("layer", look_at_layers, {"pins": pins}))
    if pins:
        free = look_at_layers if STACKS[stack].captured else look
        further.append(("free", free, {"turns": True}))
    for name, how, options in further:
        seen, more = _judged(model, how, **place, **options)
        values |= {f"{name}_{key}": value for key, value in seen.values.items()}
        samples[f"{name}_error"], alarms = seen.errors, alarms + more
    if alarms:
        samples["alarm_error"] = [error for alarm, _ in alarms for error in alarm.errors]
    warnings = tuple(
        {"code": "gate_repeated", "text": f"{alarm.text}; on another prompt {again.text}"}
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
    model: Any, how: Callable[..., Look], *, seed: int, steps: int, **place: Any
) -> tuple[Look, list[tuple[Look, Look]]]:
    """A look that passed, and the alarm before it with the look that did not confirm it."""
    first = how(model, seed=seed, steps=steps, **place)
    if first.passed:
        return first, []
    again = how(model, seed=seed + 1, steps=max(steps, AGAIN_STEPS), **place)
    if again.passed:
        return again, [(first, again)]
    unpinned = bool(model.card.experts) and not place.get("pins") and not place.get("turns")
    why = "; its routers cannot be pinned, so that turned experts may be a part" if unpinned else ""
    raise GateError(
        f"stack {place['stack']!r} at {place['context']} tokens of context: {first.text}, and on "
        f"another prompt {again.text}: it computes something else than {REFERENCE} in "
        f"{model.dtype}, and its times are not shown{why}"
    )


def look(
    model: Any,
    *,
    stack: str,
    context: int,
    seed: int,
    batch: int,
    steps: int,
    turns: bool = False,
    pins: int = 0,
) -> Look:
    """The errors of a stack's logits along one continuation of one prompt.

    The largest of a batch counts; where routers may turn (`turns`) the mean, since of many
    sequences one nearly always does.
    """
    ids = prompt_ids(model, context, seed=seed, batch=batch, distinct=batch > 1)
    reference = registry.open_stack(REFERENCE, model.net)
    pinned = partial(experts.pinned, model.net, pins, seed=seed)
    with pinned(sequences=range(batch)):
        continuation = reference(ids, steps).tokens
        expected = reference.forced_logits(ids, continuation)
        tested = registry.open_stack(stack, model.net, capacity=context + steps + 1)
        logits = tested.forced_logits(ids, continuation)
    again = _in_another_batch(reference, ids, continuation, pinned)
    errors, itself = (
        (each.mean(0) if turns else each.amax(0)).tolist()
        for each in (relative_errors(x, expected) for x in (logits, again))
    )
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    floor = fmean(itself)
    allowed = max(tolerance(model.dtype, model.card.layers), NOISE * floor)
    most = FREE_MOST if turns else MOST_ERROR if model.card.experts else MOST_ERROR_DENSE
    return Look(errors, floor, min(most, allowed), same, FREELY * turns)


def look_at_layers(
    model: Any,
    *,
    stack: str,
    context: int,
    seed: int,
    batch: int,
    steps: int,
    turns: bool = False,
    pins: int = 0,
) -> Look:
    """The errors of each layer of a captured stack, given what the reference gives it.

    Of the logits it says nothing. The largest of a batch counts, and the worst layer; where routers
    may turn (`turns`) the mean over all.
    """
    ids = prompt_ids(model, context, seed=seed, batch=batch, distinct=batch > 1)
    reference, every = registry.open_stack(REFERENCE, model.net), fused.decoder_layers(model.net)
    with experts.pinned(model.net, pins, seed=seed, sequences=range(batch)):
        continuation = reference(ids, steps).tokens
        layers = layer_check.once_a_token(every, reference, ids, continuation)
        if not layers:
            raise GateError(
                f"stack {stack!r}: no layer of {model.name} runs once a token, so that none can be "
                f"looked at on its own; use {REFERENCE}"
            )
        with (
            nullcontext(1.0)
            if turns
            else layer_check.sharpened(model.net, reference, ids, continuation)
        ) as factor:
            expected = layer_check.seen(reference, layers, ids, continuation)
            tested = registry.open_stack(stack, model.net, capacity=context + steps + 1)
            found = layer_check.given(tested, layers, ids, continuation, expected.inputs)
    errors = layer_check.errors(found, expected).mean(-1)
    by_layer = (errors.mean(-1) if turns else errors.amax(-1)).tolist()
    allowed = min(MOST_ERROR, max(LEAST, UNIT[model.dtype] * ROUNDINGS_OF_A_LAYER**0.5))
    return LayerLook(by_layer, allowed, FREELY * turns, factor, worst=not turns)


def _in_another_batch(stack: Any, ids: Any, continuation: Any, pinned: Any) -> Any:
    """The logits of a prompt as one of two, or of a batch in two halves, which needs no memory."""
    import torch

    if len(ids) == 1:
        with pinned(sequences=(0, 0)):
            return stack.forced_logits(ids.repeat(2, 1), continuation.repeat(2, 1))[:1]
    halves = []
    for numbers in torch.arange(len(ids)).tensor_split(2):
        with pinned(sequences=numbers.tolist()):
            halves.append(stack.forced_logits(ids[numbers], continuation[numbers]))
    return torch.cat(halves)
