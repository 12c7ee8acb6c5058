"""Which experts' weights an implementation really uses: found with NaN, not taken on trust.

An expert is *touched* by a call if its weights enter the arithmetic of the output: with all of
them set to NaN, the output has a NaN (zero times NaN is NaN, so that computing an expert and
weighting it with zero counts). Every layer's experts are called alone, on the inputs that one real
prefill and one real decode step gave them; the weights are put back bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lib.measure.session import track
from lib.models import count, experts
from lib.models.card import ModelError, computed, require_context
from lib.models.prompts import prompt_ids
from lib.records import record, store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.stacks import registry
from lib.stacks.registry import STACKS
from lib.stacks.stack import Generate

PROBES = 64  # experts that are tried one by one in a layer, where not all are left alone
TOLERANCE = 0.01  # realised active parameters this near the nominal ones need no warning
NO_ROUTER = "no router"
NO_CHOICE = "the experts are not told what the router chose: every token goes to all of them"


@dataclass(frozen=True)
class Call:
    """One call of the experts of one layer, with the inputs that the net gave it."""

    module: torch.nn.Module
    inputs: tuple[Any, ...]
    named_inputs: dict[str, Any]

    @property
    def experts(self) -> int:
        """Number of experts of this layer."""
        return next(self.module.parameters()).shape[0]

    @property
    def choice(self) -> torch.Tensor | None:
        """The router's choice (tokens, k); None where the experts are not told."""
        tensors = [x for x in (*self.inputs, *self.named_inputs.values()) if torch.is_tensor(x)]
        choices = [x for x in tensors if x.dtype in (torch.int32, torch.int64) and x.ndim > 1]
        return choices[0].reshape(-1, choices[0].shape[-1]) if choices else None

    def chosen(self, token: int | None = None) -> list[int]:
        """Distinct experts that the router chose, for one token or for all of them."""
        if self.choice is None:
            return []
        choice = self.choice if token is None else self.choice[token]
        return [e for e in choice.unique().tolist() if e < self.experts]

    def has_nan(self, token: int | None = None) -> bool:
        """Whether the output (of one token, or of all) has a NaN now."""
        out = self.module(*self.inputs, **self.named_inputs)
        out = out[0] if isinstance(out, tuple) else out
        out = out.reshape(-1, out.shape[-1])
        return bool((out if token is None else out[token]).isnan().any())


@contextlib.contextmanager
def poisoned(module: torch.nn.Module, numbers: Sequence[int]) -> Iterator[None]:
    """All weights of these experts are NaN inside the block, and what they were after it.

    Needs memory for a copy of these experts of one layer.
    """
    weights = list(module.parameters())
    index = torch.tensor(list(numbers), device=weights[0].device)
    copies = [weight[index] for weight in weights]  # indexing with a tensor copies
    try:
        for weight in weights:
            weight[index] = float("nan")
        yield
    finally:
        for weight, before in zip(weights, copies, strict=True):
            weight[index] = before


def touched(call: Call, *, token: int | None = None, seed: int = 0) -> float:
    """Experts whose weights enter the output of this call, or that of one token of it.

    The chosen ones, and of the others none if the output stays finite with all of them poisoned.
    Otherwise they are poisoned one by one: all where there are at most PROBES, else a sample, from
    which the number is scaled up.
    """

    def reaches(numbers: Sequence[int]) -> bool:
        with poisoned(call.module, numbers):
            return call.has_nan(token)

    chosen = call.chosen(token)
    others = [e for e in range(call.experts) if e not in chosen]
    if call.has_nan() or not reaches(chosen or others):
        raise ModelError(
            f"{type(call.module).__name__} cannot be probed: its output has a NaN without any, or "
            "none where the weights in use are NaN"
        )
    if not others or not reaches(others):
        return len(chosen)
    tried = others if len(others) <= PROBES else random.Random(seed).sample(others, PROBES)
    return len(chosen) + len(others) * sum(reaches([e]) for e in tried) / len(tried)


def captured(
    net: torch.nn.Module, generate: Generate, ids: torch.Tensor
) -> tuple[list[Call], list[Call]]:
    """The call of every layer's experts in the prefill of `ids`, and in the decode step after it.

    The inputs are copies: (batch x context) and batch tokens of hidden states for each layer.
    """
    seen: dict[str, list[Call]] = {path: [] for path in count.expert_modules(net)}

    def note(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple, named_inputs: dict) -> None:
            named = {name: _copy(x) for name, x in named_inputs.items()}
            seen[path].append(Call(module, tuple(map(_copy, inputs)), named))

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in count.expert_modules(net).items():
            hook = module.register_forward_pre_hook(note(path), with_kwargs=True)
            hooks.callback(hook.remove)
        generate(ids, 2)
    for path, calls in seen.items():
        sizes = {weight.shape[:1] for weight in calls[0].module.parameters()} if calls else ()
        if len(calls) != 2 or len(sizes) != 1:
            raise ModelError(
                f"{path} was called {len(calls)} times by one prefill and one decode step; only "
                "experts that are one module, with one axis of its weights for the experts and "
                "called once with all tokens, can be probed"
            )
    return [calls[0] for calls in seen.values()], [calls[1] for calls in seen.values()]


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def entropy_bits(choice: torch.Tensor) -> float:
    """Entropy of the empirical distribution of choices (tokens, k) over the experts, in bits.

    log2 of the number of experts where all are chosen equally often. A small sample looks less
    even than its router is.
    """
    counts = choice.flatten().bincount().double()
    shares = (counts / counts.sum())[counts > 0]
    return max(0.0, float(-(shares * shares.log2()).sum()))


def rows(
    model: Any,
    *,
    context: int,
    batches: Sequence[int],
    experts: Sequence[str] = (),
    stack: str = STUDY_STACK,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """One row for each experts implementation (none given: the one in use) and batch size.

    Written at once; an implementation that fails is a row with its error. In those of a dense
    model the realised active parameters are the nominal ones. An engine's experts are traced by
    another way, where batches are measured (`measure.vllm.traced`).
    """
    if STACKS[getattr(model, "stack", None) or stack].apart:
        return []
    records = []
    common = {"context": context, "stack": stack, "seed": seed, "env_id": env_id}
    names = (experts if model.card.experts else ()) or [model.experts]
    for name, batch in track([*product(names, batches)], f"experts of {model.name}"):
        records.append(store.append(records_path, row(model, name, batch=batch, **common)))
        model.device.empty_cache()
    return records


def row(
    model: Any, name: str, *, context: int, batch: int, stack: str, env_id: str | None, seed: int
) -> Record:
    """The row of one experts implementation, or its error."""
    if not model.card.experts:
        return _dense(model, context=context, batch=batch, stack=stack, env_id=env_id)
    try:
        with experts.using(model.net, name):
            return arm(model, context=context, batch=batch, stack=stack, seed=seed, env_id=env_id)
    except Exception as error:  # out of memory, or experts that cannot be probed
        key = _key(model, context, batch, stack) | {"experts": name}
        return Record("trace", key, error=record.first_line(error), env_id=env_id)


def arm(
    model: Any, *, context: int, batch: int, seed: int, env_id: str | None, stack: str = STUDY_STACK
) -> Record:
    """What the experts implementation in use touches in a prefill of `batch` different prompts of
    `context` tokens, and what that of the stack's decode steps touches in the one after it.

    values: active_params_nominal, active_params_realised (of one decode token: for the first of
    the batch, whoever else's experts it shares the step with); means over layers of distinct
    experts: experts_chosen_decode, experts_touched_decode, experts_touched_prefill;
    routing_entropy_bits of the prefill; decode_bytes (what this step had to read: the experts
    chosen) and decode_bytes_realised (the experts touched).
    """
    require_context(model.card, context, 2)
    ids = prompt_ids(model, context, seed=seed, batch=batch, distinct=True)
    prefill, step = captured(model.net, _uncaptured(model.net, stack, ids), ids)
    with torch.inference_mode():
        in_prefill = statistics.fmean(touched(call, seed=seed) for call in prefill)
        with registry.as_in_decode(model.net, stack):
            in_step = statistics.fmean(touched(call, seed=seed) for call in step)
            by_token = in_step if batch == 1 else _by_first_token(step, seed)
    values, missing = _routing(prefill, step)
    if by_token is not None:
        values["active_params_realised"] = model.card.params_used(by_token)
    else:
        missing["active_params_realised"] = NO_CHOICE
    chosen = values.get("experts_chosen_decode")
    sizes, unknown = computed(
        decode_bytes=lambda: model.card.decode_bytes(context, batch, chosen),
        decode_bytes_realised=lambda: model.card.decode_bytes(context, batch, in_step),
    )
    values |= sizes | {
        "active_params_nominal": model.card.active_params,
        "experts_touched_decode": in_step,
        "experts_touched_prefill": in_prefill,
        "decode_experts": registry.experts_in_decode(model.net, stack),
    }
    return Record(
        kind="trace",
        key=_key(model, context, batch, stack),
        values={**model.source, **values},
        missing=missing | unknown,
        warnings=tuple(warnings_of(values)),
        env_id=env_id,
    )


def _by_first_token(step: Sequence[Call], seed: int) -> float | None:
    if any(call.choice is None for call in step):
        return None
    return statistics.fmean(touched(call, token=0, seed=seed) for call in step)


def _routing(
    prefill: Sequence[Call], step: Sequence[Call]
) -> tuple[dict[str, float], dict[str, str]]:
    if any(call.choice is None for call in (*prefill, *step)):
        return {}, dict.fromkeys(("experts_chosen_decode", "routing_entropy_bits"), NO_CHOICE)
    return {
        "experts_chosen_decode": statistics.fmean(len(call.chosen()) for call in step),
        "routing_entropy_bits": statistics.fmean(entropy_bits(call.choice) for call in prefill),
    }, {}


def _key(model: Any, context: int, batch: int, stack: str) -> dict[str, Any]:
    cache = STACKS[stack].cache
    return model.key(context=context, batch=batch, stack=stack, cache=cache)


def _uncaptured(net: torch.nn.Module, stack: str, ids: torch.Tensor) -> Generate:
    """The calls of a stack where hooks see them: no step is captured, and where the stack does not
    exchange the experts after the prefill, neither is it done here."""
    reference = registry.open_stack(STUDY_STACK, net)
    if not STACKS[stack].captured:
        return reference
    first = reference(ids, 1).tokens
    return lambda ids, new_tokens: reference.forced_logits(ids, first)


def _dense(model: Any, *, context: int, batch: int, stack: str, env_id: str | None) -> Record:
    active = model.card.active_params
    sizes, missing = computed(decode_bytes=lambda: model.card.decode_bytes(context, batch))
    if not missing:
        sizes["decode_bytes_realised"] = sizes["decode_bytes"]
    values = {"active_params_nominal": active, "active_params_realised": active, "note": NO_ROUTER}
    key = _key(model, context, batch, stack)
    return Record(
        "trace", key, values={**model.source, **values, **sizes}, missing=missing, env_id=env_id
    )


def warnings_of(values: dict[str, Any]) -> list[dict[str, str]]:
    """Active parameters by architecture that are not those which the implementation uses."""
    nominal, realised = values["active_params_nominal"], values.get("active_params_realised")
    if realised is None or math.isclose(realised, nominal, rel_tol=TOLERANCE):
        return []
    return [
        record.warning(
            "active-params",
            f"a decode token uses {realised:,} parameters, not the {nominal:,} of the "
            f"architecture, with the experts as {values['decode_experts']}: choose an "
            "implementation that leaves other experts alone (grouped_mm, batched_mm, loop), or "
            "divide by the realised number",
        )
    ]
