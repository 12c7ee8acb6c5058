"""Time to first token, end-to-end latency and inter-token latency of whole calls.

The one place where a time is taken is `device.time_call`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lib import stats
from lib.hardware import validity
from lib.hardware.device import time_call
from lib.measure import vllm, vllm_logits
from lib.measure.session import begin_records, track
from lib.models import experts, formats
from lib.models.card import computed, require_context
from lib.models.load import card, load
from lib.models.prompts import prompt_ids
from lib.records import record, store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.stacks import logits_check, registry
from lib.stacks.registry import STACKS
from lib.stacks.stack import Subject

WARMUP_CALLS = 2
WARMUP_TOKENS = 8  # of a call that loads the kernels
SPREAD_LIMIT = 0.10
DRIFT_LIMIT = 0.05


def sweep(
    model: Any,
    *,
    stack: str = STUDY_STACK,
    contexts: Sequence[int],
    new_tokens: Sequence[int],
    repeats: int,
    slope_repeats: int,
    ttft_repeats: int,
    itl_repeats: int,
    aa_repeats: int = 0,
    busy_tokens: int = 0,
    also_experts: Sequence[str] = (),
    seed: int,
    records_path: str | Path,
) -> list[Record]:
    """Measure every (context, new tokens) arm, in seeded random order, each written at once.

    The first of `new_tokens` is the headline length and gets `repeats` calls; the others serve the
    slope over new tokens and get `slope_repeats`. One arm of one new token a context is the TTFT.
    ITL is stamped in separate calls at the headline length. `also_experts` names further
    implementations of a mixture of experts, whose TTFT and headline length are timed at the longest
    context; a dense model has none. `aa_repeats` calls of one token at the shortest context serve
    the A/A check; `busy_tokens` decode steps at each context are profiled, last, so that no timed
    call follows the profiler.
    """
    rows = begin_records(model, records_path)
    env_id = rows[0].env_id
    counts = {1: ttft_repeats, **dict.fromkeys(new_tokens, slope_repeats), new_tokens[0]: repeats}
    engine = STACKS[stack].apart
    for row in vllm_logits.gates(model, env_id) if engine else ():
        rows.append(store.append(records_path, row))
    for context in () if engine or stack == logits_check.REFERENCE else contexts:
        row = logits_check.row(model, stack=stack, context=context, seed=seed, env_id=env_id)
        rows.append(store.append(records_path, row))
    arms = list(product(contexts, counts))
    random.Random(seed).shuffle(arms)
    for context, tokens in track(arms, f"latency of {model.name}"):
        row = arm(
            model,
            stack=stack,
            context=context,
            new_tokens=tokens,
            repeats=counts[tokens],
            seed=seed,
            env_id=env_id,
        )
        rows.append(store.append(records_path, row))
    for context in track(contexts if itl_repeats else (), f"token times of {model.name}"):
        row = stamped(
            model,
            stack=stack,
            context=context,
            new_tokens=new_tokens[0],
            repeats=itl_repeats,
            seed=seed,
            env_id=env_id,
        )
        rows.append(store.append(records_path, row))
    more = also_experts if model.card.experts and not engine else ()
    for name, tokens in track(list(product(more, (1, new_tokens[0]))), f"experts of {model.name}"):
        with experts.using(model.net, name):
            row = arm(
                model,
                stack=stack,
                context=max(contexts),
                new_tokens=tokens,
                repeats=counts[tokens],
                seed=seed,
                env_id=env_id,
            )
        rows.append(store.append(records_path, row))
    if aa_repeats:
        row = arm(
            model,
            stack=stack,
            context=min(contexts),
            new_tokens=1,
            repeats=aa_repeats,
            seed=seed,
            env_id=env_id,
            kind="aa",
        )
        rows.append(store.append(records_path, row))
    for context in track(contexts if busy_tokens else (), f"device time of {model.name}"):
        row = busy_row(
            model, stack=stack, context=context, tokens=busy_tokens, seed=seed, env_id=env_id
        )
        rows.append(store.append(records_path, row))
    if engine:
        rows.append(store.append(records_path, model.start_row(env_id)))
    for row in vllm_logits.late_gates(model, contexts, seed, env_id) if engine else ():
        rows.append(store.append(records_path, row))
    return rows


def arm(
    model: Any,
    *,
    stack: str,
    context: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    env_id: str | None,
    decoding: str = "greedy",
    kind: str = "latency",
    batch: int = 1,
) -> Record:
    """`measured` on a stack of a loaded model, opened for this length."""
    require_context(model.card, context, new_tokens)
    subject = registry.subject(model, stack, decoding=decoding, capacity=context + new_tokens)
    arguments = {
        "context": context,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "seed": seed,
        "env_id": env_id,
        "kind": kind,
        "batch": batch,
    }
    if STACKS[stack].apart:
        return vllm.arm(subject, **arguments, warnings_of=warnings_of)
    return measured(subject, **arguments)


def measured(
    subject: Subject,
    *,
    context: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    env_id: str | None,
    kind: str = "latency",
    batch: int = 1,
) -> Record:
    """One arm: warm up its shape, then `repeats` timed calls of exactly `new_tokens` tokens each.

    samples: `ttft_s` for one new token, `e2e_s` otherwise; `decode_s` of a captured stack, its
    new_tokens - 1 steps by the device's clock; `warmup_s` for the two calls before: one of at most
    WARMUP_TOKENS tokens, the cold start of the shape, and one of full length. A cache that grows
    asks the driver for memory in the first call of a length, up to half of its time. values:
    `held_back`, by its code the share of the timed calls in which the board ran slower than asked;
    a warning where it did.
    """
    ids = subject.prompt(context, seed=seed, batch=batch)
    lengths = (min(new_tokens, WARMUP_TOKENS), new_tokens)
    warmup = [timed(subject.generate, ids, length, subject) for length in lengths]
    read_state = getattr(subject, "clocks_state", dict)  # asked outside the timed calls
    before = read_state()
    calls = [timed(subject.generate, ids, new_tokens, subject) for _ in range(repeats)]
    held_back = validity.held_back(before, read_state(), sum(call.seconds for call in calls))
    key = subject.key(context=context, new_tokens=new_tokens, batch=batch)
    if any(call.prepare_s for call in calls):
        raise RuntimeError(f"the stack {key['stack']!r} captured or compiled inside a timed call")
    warmup_s, samples_s = ([call.seconds for call in part] for part in (warmup, calls))
    samples = {"ttft_s" if new_tokens == 1 else "e2e_s": samples_s, "warmup_s": warmup_s}
    if all(call.decode_s is not None for call in calls):
        samples["decode_s"] = [call.decode_s for call in calls]
    sizes, missing = {}, {"decode_bytes": "the architecture is not known"}
    if subject.card is not None:
        sizes, missing = computed(
            decode_bytes=lambda: subject.card.decode_bytes(context + new_tokens // 2, batch)
        )
    return Record(
        kind=kind,
        key=key,
        samples=samples,
        values={
            **subject.values,
            "prepare_s": sum(call.prepare_s for call in warmup),
            "held_back": {gate.code: gate.value for gate in held_back if gate.value is not None},
            **sizes,
        },
        missing={**missing, **{g.code: g.text for g in held_back if g.level == "unknown"}},
        warnings=(*warnings_of(samples_s), *slowed(held_back)),
        env_id=env_id,
    )


class Timed(NamedTuple):
    """Wall seconds of one call, those of it that captures and compilations took, and those of its
    decode steps by the device's clock where the stack marks them."""

    seconds: float
    prepare_s: float
    decode_s: float | None


def timed(generate: Any, ids: Any, new_tokens: int, device: Any) -> Timed:
    """The times of one call; what it returned is let go, so that no cache is held."""
    seconds, out = time_call(lambda: generate(ids, new_tokens), device)
    return Timed(seconds, out.prepare_s, out.decode_s and out.decode_s())


def gated_arm(
    model: Any, *, stack: str, context: int, seed: int, env_id: str | None, **arguments: Any
) -> Record:
    """`arm` of a stack that has passed the correctness gate; the row says by how much."""
    values = {}
    if stack != logits_check.REFERENCE:
        passed = logits_check.row(model, stack=stack, context=context, seed=seed, env_id=env_id)
        values = {
            f"gate_{name}": value
            for name, value in passed.values.items()
            if name not in model.source
        }
    row = arm(model, stack=stack, context=context, seed=seed, env_id=env_id, **arguments)
    return replace(row, values={**row.values, **values})


def loaded_arm(
    name: str,
    *,
    weights: str,
    dtype: str,
    device: Any,
    seed: int,
    experts: str | None = None,
    **arguments: Any,
) -> Record:
    """`arm` on a model loaded for it alone: for arms that change the dtype or the experts."""
    device.empty_cache()
    if dtype == "mxfp4":
        raise formats.not_run(card(name), dtype, arguments["context"])
    model = load(name, weights=weights, dtype=dtype, device=device, seed=seed, experts=experts)
    return arm(model, seed=seed, **arguments)


def stamped(
    model: Any,
    *,
    stack: str,
    context: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    env_id: str | None,
) -> Record:
    """Calls whose tokens are stamped as they reach the host.

    samples: `token_s`, for each call the seconds from its start to each token; `e2e_s`, the whole
    calls. Compare `e2e_s` with the unstamped arm to see what stamping costs.
    """
    subject = registry.subject(model, stack, capacity=context + new_tokens)
    generate, ids = subject.generate, subject.prompt(context, seed=seed)
    generate(ids, min(new_tokens, WARMUP_TOKENS))  # the arms before have warmed the length
    token_s, e2e_s = [], []
    for _ in range(repeats):
        stamps: list[float] = []
        start_s = model.device.clock_s()
        seconds, _ = time_call(
            lambda stamps=stamps: generate(
                ids, new_tokens, on_token=lambda: stamps.append(model.device.clock_s())
            ),
            model.device,
        )
        if len(stamps) != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} stamps, got {len(stamps)}")
        token_s.append([stamp - start_s for stamp in stamps])
        e2e_s.append(seconds)
    return Record(
        kind="itl",
        key=subject.key(context=context, new_tokens=new_tokens),
        samples={"token_s": token_s, "e2e_s": e2e_s},
        values=dict(model.source),
        env_id=env_id,
    )


def busy_row(
    model: Any, *, stack: str, context: int, tokens: int, seed: int, env_id: str | None
) -> Record:
    """Seconds in which the device worked, from a profiler: of the prefill and of a decode step.

    values: `prefill_busy_s` of a call of one token; `decode_busy_s`, `decode_kernels` and
    `decode_kernel_times` (name, launches, seconds), the difference to a call of `tokens` more (the
    key's new_tokens), divided by them. Wall time of a profiled call means nothing; compare with
    the latency rows.
    """
    require_context(model.card, context, tokens + 1)
    subject = registry.subject(model, stack, capacity=context + tokens + 1)
    generate, ids = subject.generate, subject.prompt(context, seed=seed)
    values, reason = dict(model.source), model.device.missing.get("busy")
    if not reason:
        for _ in range(WARMUP_CALLS):
            generate(ids, tokens + 1)
        calls = [model.device.busy(lambda n=n: generate(ids, n)) for n in (1, tokens + 1)]
        reason = model.device.missing.get("busy")
    if not reason:
        one, more = calls
        values |= {
            "prefill_busy_s": one.busy_s,
            "decode_busy_s": (more.busy_s - one.busy_s) / tokens,
            "decode_kernels": (more.kernels - one.kernels) / tokens,
            "decode_kernel_times": _kernel_times(one, more, tokens),
        }
    names = ("prefill_busy_s", "decode_busy_s", "decode_kernels", "decode_kernel_times")
    return Record(
        kind="busy",
        key=subject.key(context=context, new_tokens=tokens + 1),
        values=values,
        missing=dict.fromkeys(names, reason) if reason else {},
        env_id=env_id,
    )


def _kernel_times(one: Any, more: Any, tokens: int) -> list[list[Any]]:
    """[name, launches a step, seconds a step] of what differs between two calls, longest first."""
    kernels = []
    for name, (times, seconds) in more.by_name.items():
        before, before_s = one.by_name.get(name, (0, 0.0))
        if times > before:
            kernels.append([name, (times - before) / tokens, (seconds - before_s) / tokens])
    return sorted(kernels, key=lambda kernel: -kernel[-1])


def harness_row(
    model: Any,
    *,
    stack: str,
    context: int,
    new_tokens: int,
    pairs: int,
    seed: int,
    env_id: str | None,
) -> Record:
    """The same call as an arm times it and in a bare loop, in turns: what the harness costs.

    samples: `e2e_s` through `timed`, `bare_s` with nothing around the call but the clock and one
    synchronisation; neighbours are pairs.
    """
    generate = registry.open_stack(stack, model.net, capacity=context + new_tokens)
    ids, device = prompt_ids(model, context, seed=seed), model.device
    samples: dict[str, list[float]] = {"e2e_s": [], "bare_s": []}
    for _ in range(WARMUP_CALLS):
        generate(ids, new_tokens)
    device.synchronize()
    for number in range(pairs):
        for name in sorted(samples, reverse=bool(number % 2)):
            start_s = device.clock_s()
            if name == "e2e_s":
                samples[name].append(timed(generate, ids, new_tokens, device).seconds)
            else:
                generate(ids, new_tokens)
                device.synchronize()
                samples[name].append(device.clock_s() - start_s)
    key = model.key(
        stack=stack,
        context=context,
        new_tokens=new_tokens,
        decoding="greedy",
        cache=STACKS[stack].cache,
    )
    return Record("harness", key, samples, dict(model.source), env_id=env_id)


def slowed(gates: Sequence[validity.Gate]) -> list[dict[str, str]]:
    """A warning for each reason for which the board was held back in the timed calls."""
    return [record.warning(g.code, g.text) for g in gates if g.level in ("warn", "invalid")]


def warnings_of(samples_s: Sequence[float]) -> list[dict[str, str]]:
    """What a reader of these repetitions should know, each with advice."""
    warnings = []
    spread = stats.spread(samples_s)
    if spread is not None and spread > SPREAD_LIMIT:
        warnings.append(
            record.warning(
                "spread",
                f"repetitions spread over {spread:.0%} of their median: the host is noisy; "
                f"close other programs, or raise the repeats (now {len(samples_s)})",
            )
        )
    third = len(samples_s) // 3
    if third >= 2:
        early, late = (statistics.median(s) for s in (samples_s[:third], samples_s[-third:]))
        if abs(late / early - 1) > DRIFT_LIMIT:
            warnings.append(
                record.warning(
                    "drift",
                    f"the last third of the repetitions differs from the first by "
                    f"{late / early - 1:+.0%}: raise the warm-up, or look at clocks and heat",
                )
            )
    return warnings
