"""What a GPU would do, before anybody measures it: a small physical model fitted to measured rows.

A decode step takes bytes moved / bandwidth + kernels x gap + work for each token; a prefill its
operations, the scores of its attention and the experts it reads; energy is idle power x time and
joules for each of these amounts. `generate()` (hf-eager) takes the longer of what its device and
its host need. Sizes come from the model card, rates of a card from its datasheet.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from lib import stats
from lib.analysis.capacity.fit import (
    LEVEL,
    Cell,
    Fit,
    Guess,
    Miss,
    NotResolved,
    fit,
    inflation,
    left_out,
    widened,
)
from lib.hardware.datasheets import Datasheet, datasheet
from lib.models.card import ModelCard
from lib.records import record
from lib.records.record import Record, select

RELEASED = "outputs/released/h100-sxm"
CAPTURED = ("graph", "graph-compiled")
EAGER = "hf-eager"
STACKS = (EAGER, *CAPTURED)
NEW_TOKENS = 64  # of the whole call that energy is predicted for
PREFILL_TOKENS = 1000  # prompts of fewer tokens, all sequences together, may wait for the host
STEADY = 0.1  # a first token whose calls spread by more waits for the host, now and then
DRAWS = 4001
GB = 1e9

# The coefficients of each law: unit, and what one of them is.
LAWS: dict[str, dict[str, tuple[str, str]]] = {
    "step": {
        "graph_kernel": ("s", "time of a kernel of the captured step beside what it streams"),
        "compiled_kernel": ("s", "the same of the compiled step"),
        "row_stream": ("1", "1 / share of the datasheet bandwidth: products of one row, fused"),
        "matrix_stream": ("1", "1 / share: weights read by the library's matrix products"),
        "expert_stream": ("1", "1 / share: experts read by grouped products"),
        "expert_layer": ("s", "what grouped products take for a layer beside what they stream"),
        "graph_cache_stream": ("1", "1 / share: keys and values, copied for each head of a group"),
        "compiled_cache_stream": ("1", "1 / share: keys and values, read once"),
        "token_layer": ("s", "work for a further token in a layer that is not fused"),
    },
    "eager device step": {
        "eager_kernel": ("s", "time of a kernel of generate() beside what it streams"),
        "eager_stream": ("1", "1 / share: weights read by the library's matrix products"),
        "copied_experts": ("1", "1 / share: experts copied for each token, then read"),
        "eager_cache_stream": ("1", "1 / share: keys and values, extended by copying"),
    },
    "host": {
        "launch": ("s", "host time for a kernel of a step of generate(), and of a dense prefill"),
        "expert_launch": ("s", "host time of a prefill with experts, for a kernel of a step"),
    },
    "prefill": {
        "dense_operations": ("1", "1 / share of the datasheet's operations: dense models"),
        "expert_operations": ("1", "1 / share: models with routed experts"),
        "scores": ("1", "1 / share of bandwidth: matrices of scores where attention writes them"),
        "expert_reads": ("1", "1 / share of bandwidth: experts that any token chose"),
    },
    "step energy": {
        "matrix_bytes": ("J", "a byte that the library's matrix products could stream meanwhile"),
        "other_bytes": ("J", "the same of products of one row, of experts and of the cache"),
    },
    "eager step energy": {"eager_bytes": ("J", "a byte of weights, copies of experts included")},
    "prefill energy": {
        "dense_power": ("W", "power while a dense model does operations"),
        "expert_power": ("W", "power while chosen experts do operations, and are read"),
        "score_power": ("W", "power while scores are written and read"),
    },
    "vllm step": {
        "vllm_layer": ("s", "what a layer takes beside what it streams"),
        "vllm_stream": ("1", "1 / share of the datasheet bandwidth: weights and cache"),
        "vllm_mxfp4": ("1", "1 / share: experts of 4.25 bits a weight"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """Kernels of a decode step for each layer, by model type and stack, and where they are from."""

    by: Mapping[tuple[str, str], float]

    def of(self, card: ModelCard, stack: str) -> float:
        """Kernels of a whole step."""
        per_layer = self.by.get((card.model_type, stack))
        if per_layer is None:
            raise NotResolved(f"no profiled step of a model of type {card.model_type} on {stack}")
        return per_layer * card.layers


@dataclass(frozen=True)
class Assumed:
    """What no row of one card can say: standard deviations of logarithms, and shares.

    On another card: how well its bandwidth and operations are used, what a kernel takes, its idle
    power and its joules for an amount. `attention_log_sd` is of the operations of fused attention,
    which the rows (up to 4,096 tokens) do not tell from those of matrix products.
    """

    bandwidth_log_sd: float = 0.05
    operations_log_sd: float = 0.05
    kernel_log_sd: float = 0.05
    idle_log_sd: float = 0.15
    joules_log_sd: float = 0.08
    attention_log_sd: float = 0.35


@dataclass(frozen=True)
class Prediction:
    """One number with its interval at LEVEL, or None and why. `bound` says what it waits for.

    `step_alone` is the decode throughput (value, low, high) of a cell whose prefill does not hold,
    if its cache were filled in pieces.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    bound: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    step_alone: tuple[float, float, float] | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval over the value."""
        return None if self.value is None else (self.high - self.low) / 2 / self.value


@dataclass(frozen=True)
class Capacity:
    """The fitted laws and what was learned beside them from the rows of one card."""

    gpu: str
    fits: Mapping[str, Fit]
    reasons: Mapping[str, str]
    kernels: Kernels
    traced: Mapping[tuple[str, int], float]
    eager_attention: frozenset[str]
    idle_w: float | None
    flop_j: float
    gpu_bytes: Mapping[str, int]
    misses: tuple[Miss, ...] = ()
    assumed: Assumed = field(default_factory=Assumed)

    def law(self, name: str) -> Fit:
        """A fitted law, or NotResolved with the reason."""
        if name not in self.fits:
            raise NotResolved(f"{name}: {self.reasons.get(name, 'no row')}")
        return self.fits[name]


# --- amounts: what a cell of a model takes, in the units of the laws


def always_bytes(card: ModelCard) -> int:
    """Weights that every step reads: all but lookup tables and routed experts."""
    return card.weight_bytes - card.lookup_bytes - card.routed_bytes


def expert_bytes(card: ModelCard, experts: float) -> float:
    """Bytes of so many experts in every layer."""
    return card.routed_bytes * experts / card.experts if card.experts else 0.0


def group_size(card: ModelCard) -> float:
    """Query heads that share a key-value head."""
    if not card.attention_heads or not card.kv_heads:
        raise NotResolved(f"the heads of {card.name} are not known")
    return card.attention_heads / card.kv_heads


def fused_experts(card: ModelCard, batch: int) -> bool:
    """Whether the compiled step reads each chosen expert by itself: half of them or fewer."""
    return bool(card.experts) and batch * card.experts_per_token <= card.experts // 2


def moved_bytes(
    card: ModelCard, stack: str, tokens: float, batch: int, touched: float | None = None
) -> dict[str, float]:
    """Bytes that a captured decode step moves, by the coefficient of the law that moves them.

    `tokens` are those in the cache; `touched` distinct experts in a layer (None: to be expected).
    """
    compiled = stack == "graph-compiled"
    touched = card.experts_touched(batch) if touched is None else touched
    cache = card.kv_bytes(round(tokens), batch)
    found = {"row_stream": 0.0, "matrix_stream": 0.0, "expert_stream": 0.0}
    found["row_stream" if compiled and batch == 1 else "matrix_stream"] += always_bytes(card)
    if card.experts and compiled and fused_experts(card, batch):
        found["row_stream"] += expert_bytes(card, batch * card.experts_per_token)
    elif card.experts:
        found["expert_stream"] += expert_bytes(card, touched)
    if compiled:
        found["compiled_cache_stream"] = cache
    else:  # each key and value is read, and written and read again for every head of its group
        found["graph_cache_stream"] = cache * (1 + 2 * group_size(card))
    return {name: size for name, size in found.items() if size}


def step_amounts(
    card: ModelCard,
    stack: str,
    tokens: float,
    batch: int,
    *,
    kernels: float,
    bytes_per_s: float,
    touched: float | None = None,
) -> dict[str, float]:
    """Amounts of the law "step" for a captured decode step."""
    x = {
        name: size / bytes_per_s
        for name, size in moved_bytes(card, stack, tokens, batch, touched).items()
    }
    x["compiled_kernel" if stack == "graph-compiled" else "graph_kernel"] = kernels
    grouped = "expert_stream" in x
    if grouped:
        x["expert_layer"] = float(card.layers)
    if batch > 1 and (stack == "graph" or grouped):
        x["token_layer"] = float((batch - 1) * card.layers)
    return x


def eager_amounts(
    card: ModelCard, tokens: float, batch: int, *, kernels: float, bytes_per_s: float
) -> dict[str, float]:
    """Amounts of the law "eager device step"."""
    copied = expert_bytes(card, batch * card.experts_per_token) if card.experts else 0.0
    x = {
        "eager_kernel": kernels,
        "eager_stream": always_bytes(card) / bytes_per_s,
        "copied_experts": copied / bytes_per_s,
        "eager_cache_stream": card.kv_bytes(round(tokens), batch) / bytes_per_s,
    }
    return {name: amount for name, amount in x.items() if amount}


def vllm_amounts(
    card: ModelCard, form: str, tokens: float, batch: int, *, bytes_per_s: float
) -> dict[str, float]:
    """Amounts of the law "vllm step": layers, and bytes that any implementation must read."""
    routed = expert_bytes(card, card.experts_touched(batch))
    others = always_bytes(card) + card.kv_bytes(round(tokens), batch)
    packed = form == "mxfp4"
    x = {
        "vllm_layer": float(card.layers),
        "vllm_stream": (others + (0.0 if packed else routed)) / bytes_per_s,
        "vllm_mxfp4": (routed if packed else 0.0) / bytes_per_s,
    }
    return {name: amount for name, amount in x.items() if amount}


def operations(card: ModelCard, context: int, batch: int, *, attention: bool) -> float:
    """Operations of a prefill's matrix products, with those of fused attention where asked.

    Two for each active parameter and token, the output matrix for the last token only; attention
    4 x heads x head dimension for each pair of a token and one it sees.
    """
    if None in (card.hidden_size, card.attention_heads, card.head_dim, card.kv_layers):
        raise NotResolved(f"the card of {card.name} lacks what operations are counted from")
    output = card.vocab_size * card.hidden_size
    linear = 2 * ((card.active_params - output) * context + output)
    pairs = sum(_pairs(context, window) for _, window in card.kv_layers)
    return batch * (linear + attention * 4 * card.attention_heads * card.head_dim * pairs)


def _pairs(tokens: int, window: int | None) -> float:
    full = min(tokens, window or tokens)
    return full * (full + 1) / 2 + (tokens - full) * full


def score_bytes(card: ModelCard, context: int, batch: int) -> float:
    """Bytes of the scores of all layers where attention writes them out, 2 bytes each."""
    return 2.0 * batch * card.attention_heads * context**2 * card.layers


def prefill_amounts(
    card: ModelCard,
    context: int,
    batch: int,
    *,
    eager_attention: bool,
    bytes_per_s: float,
    flop_per_s: float,
) -> dict[str, float]:
    """Amounts of the law "prefill"."""
    done = operations(card, context, batch, attention=not eager_attention)
    x = {"expert_operations" if card.experts else "dense_operations": done / flop_per_s}
    if eager_attention:
        x["scores"] = score_bytes(card, context, batch) / bytes_per_s
    if card.experts:
        x["expert_reads"] = expert_bytes(card, card.experts_touched(context * batch)) / bytes_per_s
    return x


OTHER = ("row_stream", "expert_stream", "graph_cache_stream", "compiled_cache_stream")


def step_joules(x: Mapping[str, float], law: Fit, bytes_per_s: float) -> dict[str, float]:
    """Amounts of the law "step energy" from those of the law "step" of the same step.

    Streamed bytes count by the time that they take: a stream at half the bandwidth counts double.
    """
    beta = dict(zip(law.names, law.beta.tolist(), strict=True))
    if absent := sorted(n for n, amount in x.items() if amount and n not in beta):
        raise NotResolved(f"no row resolves {', '.join(absent)}")
    time_s = {name: amount * beta[name] for name, amount in x.items() if amount}
    found = {
        "matrix_bytes": time_s.get("matrix_stream", 0.0) * bytes_per_s,
        "other_bytes": sum(time_s.get(name, 0.0) for name in OTHER) * bytes_per_s,
    }
    return {name: amount for name, amount in found.items() if amount}


def prefill_joules(x: Mapping[str, float], law: Fit) -> dict[str, float]:
    """Amounts of the law "prefill energy": the seconds of each part of a prefill."""
    beta = dict(zip(law.names, law.beta.tolist(), strict=True))
    if absent := sorted(n for n, amount in x.items() if amount and n not in beta):
        raise NotResolved(f"no row resolves {', '.join(absent)}")
    time_s = {name: amount * beta[name] for name, amount in x.items() if amount}
    found = {
        "dense_power": time_s.get("dense_operations", 0.0),
        "expert_power": time_s.get("expert_operations", 0.0) + time_s.get("expert_reads", 0.0),
        "score_power": time_s.get("scores", 0.0),
    }
    return {name: amount for name, amount in found.items() if amount}


def operations_joules(card: ModelCard, batch: int, joules_per_flop: float) -> float:
    """Joules of a decode step's operations: two for each active parameter and sequence."""
    return 2.0 * card.active_params * batch * joules_per_flop


# --- rows into cells


@dataclass(frozen=True)
class _Rows:
    """The rows of one card, with what is looked up in them."""

    rows: tuple[Record, ...]
    sheet: Datasheet
    cards: Mapping[str, ModelCard]
    kernels: Kernels
    traced: Mapping[tuple[str, int], float]
    eager_attention: frozenset[str]

    @property
    def bandwidth(self) -> float:
        """The datasheet's, in bytes a second."""
        return self.sheet.memory_bytes_per_s

    def step(self, card: ModelCard, stack: str, tokens: float, batch: int) -> dict[str, float]:
        """Amounts of a captured step, with the experts that were traced."""
        return step_amounts(
            card, stack, tokens, batch, kernels=self.kernels.of(card, stack),
            bytes_per_s=self.bandwidth, touched=self.traced.get((card.name, batch)),
        )  # fmt: skip

    def prefill(self, card: ModelCard, context: int, batch: int) -> dict[str, float]:
        """Amounts of a prefill."""
        return prefill_amounts(
            card, context, batch, eager_attention=card.model_type in self.eager_attention,
            bytes_per_s=self.bandwidth, flop_per_s=self.sheet.bf16_flop_per_s,
        )  # fmt: skip


def learn(
    rows: Sequence[Record],
    gpu: str,
    *,
    earlier: Sequence[Mapping[str, Any]] = (),
    leads: Sequence[Mapping[str, Any]] = (),
    cards: Mapping[str, ModelCard] | None = None,
    assumed: Assumed | None = None,
) -> Capacity:
    """Fit every law to the rows of one card.

    Rows of other cards, failed rows and rows of another dtype than bfloat16 are left out; a law
    without enough rows has its reason. `earlier` are visits of generate() whose rows later ones
    replaced (model, context, new_tokens, output_tok_per_s, visit): without them its host would look
    faster and steadier than it was. `leads` are single readings of vLLM that no record holds
    (model, form, context, batch, decode_tok_per_s); their cards are those in `cards`, by model and
    form.
    """
    envs = record.environments(rows)
    sheet = datasheet(gpu)
    if sheet.memory_bytes_per_s is None:
        raise NotResolved(f"{gpu}: {sheet.missing['memory_bytes_per_s']}")
    own = tuple(
        r
        for r in rows
        if not r.error
        and r.key.get("dtype") in (None, "bfloat16")
        and envs.get(r.env_id or "", {}).get("gpu") == gpu
    )
    if not own:
        raise NotResolved(f"no rows of {gpu}")
    counted = {
        r.key["model"]: ModelCard.from_dict(r.values)
        for r in select(own, "card")
        if "kv_layers" in r.values
    }
    eager = frozenset(
        counted[r.key["model"]].model_type
        for r in own
        if r.kind == "latency" and r.key.get("attention") == "eager" and r.key["model"] in counted
    )
    held = _Rows(own, sheet, counted, _kernels(own, counted), _traced(own), eager)
    cells = [
        *_step_cells(held),
        *_eager_device_cells(held),
        *_eager_host_cells(held, earlier),
        *_prefill_cells(held),
        *_lead_cells(leads, cards or {}, sheet),
    ]
    idle = [r.values["idle_w"] for r in own if r.value("idle_w")]
    sizes = {
        env["gpu"]: env["gpu_total_bytes"] for env in envs.values() if env.get("gpu_total_bytes")
    }
    fits, reasons, misses = {}, {}, []
    for law in LAWS:
        if law == "step energy":  # its amounts are weighed by what the times say
            cells += _energy_cells(held, fits)
        try:
            whole = fit(law, cells)
            out = left_out(law, cells, whole.spread)
            factor = inflation(out)
            fits[law] = replace(whole, inflate=factor)
            misses += widened(out, factor)
        except NotResolved as why:
            reasons[law] = str(why)
    return Capacity(
        gpu, fits, reasons, held.kernels, held.traced, eager,
        statistics.median(idle) if idle else None, _flop_j(own, counted, eager), sizes,
        tuple(misses), assumed or Assumed(),
    )  # fmt: skip


def _kernels(rows: Sequence[Record], cards: Mapping[str, ModelCard]) -> Kernels:
    found: dict[tuple[str, str], list[float]] = {}
    for row in select(rows, "busy"):
        card, count = cards.get(row.key["model"]), row.value("decode_kernels")
        if card and count:
            found.setdefault((card.model_type, row.key["stack"]), []).append(count / card.layers)
    return Kernels({key: statistics.median(values) for key, values in found.items()})


def _traced(rows: Sequence[Record]) -> dict[tuple[str, int], float]:
    """Distinct experts of a layer that a step of so many sequences chose: mean over traces."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in select(rows, "trace"):
        chosen = row.value("experts_chosen_decode")
        if chosen:
            found.setdefault((row.key["model"], row.key["batch"]), []).append(chosen)
    return {key: statistics.fmean(values) for key, values in found.items()}


def _by_arm(rows: Iterable[Record], *more: str) -> dict[tuple, list[Record]]:
    """Rows of one model, stack, context, batch and visit together."""
    groups: dict[tuple, list[Record]] = {}
    for row in rows:
        key = row.key
        where = (key["model"], key["stack"], key["context"], key["batch"], row.env_id)
        groups.setdefault((*where, *(key.get(name) for name in more)), []).append(row)
    return groups


def _usable(row: Record) -> bool:
    """Greedy rows whose experts are the library's own choice."""
    return row.key.get("decoding") in ("greedy", None) and row.key.get("experts") in (
        "none",
        "grouped_mm",
        None,
    )


def _step_cells(held: _Rows) -> list[Cell]:
    """Captured decode steps: by the device's clock where it was marked, else the slope."""
    rows = [
        r
        for r in held.rows
        if r.kind in ("latency", "batch")
        and r.key["stack"] in CAPTURED
        and _usable(r)
        and r.key["model"] in held.cards
    ]
    cells = []
    for (model, stack, context, batch, visit), group in _by_arm(rows).items():
        step_s = _marked_s(group) or _slope_s(group)
        card = held.cards[model]
        if step_s is None:
            continue
        tokens = context + max(r.key["new_tokens"] for r in group) / 2
        try:
            x = held.step(card, stack, tokens, batch)
        except NotResolved:
            continue
        cells.append(Cell("step", model, stack, context, batch, step_s, x, str(visit)))
    return cells


def _marked_s(rows: Sequence[Record]) -> float | None:
    steps = [t / (r.key["new_tokens"] - 1) for r in rows for t in r.samples.get("decode_s") or ()]
    return statistics.median(steps) if steps else None


def _slope_s(rows: Sequence[Record]) -> float | None:
    pairs = [(r.key["new_tokens"], t) for r in rows for t in r.samples.get("e2e_s") or ()]
    found = stats.slope([g for g, _ in pairs], [t for _, t in pairs]) if pairs else None
    return found.value if found and found.value and found.value > 0 else None


def _eager_device_cells(held: _Rows) -> list[Cell]:
    """Device time of steps of generate(): profiled, or timed where copied experts fill the step."""
    cells = []

    def add(row: Record, step_s: float, tokens: float) -> None:
        card, key = held.cards[row.key["model"]], row.key
        try:
            x = eager_amounts(
                card, tokens, key["batch"], kernels=held.kernels.of(card, EAGER),
                bytes_per_s=held.sheet.memory_bytes_per_s,
            )  # fmt: skip
        except NotResolved:
            return
        cells.append(
            Cell("eager device step", key["model"], EAGER, key["context"], key["batch"], step_s, x,
                 str(row.env_id))
        )  # fmt: skip

    for row in select(held.rows, "busy", stack=EAGER):
        if row.value("decode_busy_s") and row.key["model"] in held.cards and _usable(row):
            add(row, row.values["decode_busy_s"], row.key["context"])
    batches = [r for r in select(held.rows, "batch", stack=EAGER) if r.key["model"] in held.cards]
    for group in _by_arm(batches).values():
        card, key = held.cards[group[0].key["model"]], group[0].key
        step_s = _slope_s(group)
        if step_s and card.experts and key["batch"] * card.experts_per_token > card.experts:
            add(group[0], step_s, key["context"] + max(r.key["new_tokens"] for r in group) / 2)
    return cells


def _lead_cells(
    leads: Sequence[Mapping[str, Any]], cards: Mapping[str, ModelCard], sheet: Datasheet
) -> list[Cell]:
    cells = []
    for number, lead in enumerate(leads):
        form, context, batch = lead["form"], lead["context"], lead["batch"]
        card = cards[f"{lead['model']} {form}"]
        x = vllm_amounts(card, form, context, batch, bytes_per_s=sheet.memory_bytes_per_s)
        step_s = batch / lead["decode_tok_per_s"]
        model = f"{lead['model']} {form}"
        cells.append(Cell("vllm step", model, "vllm", context, batch, step_s, x, f"lead {number}"))
    return cells


HOST_KINDS = (
    "latency", "energy", "energy-again", "energy-slope", "energy-weights", "ablation-context",
    "batch",
)  # fmt: skip


def _eager_host_cells(held: _Rows, earlier: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Steps of generate() that wait for the host: whole calls less their first token."""
    first: dict[tuple, list[float]] = {}
    for row in select(held.rows, None, stack=EAGER, new_tokens=1):
        if row.kind in ("latency", "energy-slope") and _usable(row):
            times = row.samples.get("ttft_s") or row.samples.get("e2e_s") or []
            first.setdefault((row.key["model"], row.key["context"]), []).extend(times)
    cells = []
    rows = [
        r
        for r in held.rows
        if r.kind in HOST_KINDS
        and r.key["stack"] == EAGER
        and (r.key["new_tokens"] or 0) >= 16
        and _usable(r)
        and r.key["model"] in held.cards
        and r.samples.get("e2e_s")
    ]
    for (model, stack, context, batch, visit), group in _by_arm(rows).items():
        card = held.cards[model]
        if card.experts and batch * card.experts_per_token > card.experts:
            continue
        if batch > 1:
            step_s = _slope_s([r for r in group if r.kind == "batch"])
        else:
            ttft = first.get((model, context))
            known = statistics.median(ttft) if ttft else None
            steps = [
                (t - known) / (r.key["new_tokens"] - 1)
                for r in group
                for t in r.samples["e2e_s"]
                if known is not None
            ]
            step_s = statistics.median(steps) if steps else _slope_s(group)
        if step_s and step_s > 0:
            x = {"launch": held.kernels.of(card, EAGER)}
            cells.append(Cell("host", model, stack, context, batch, step_s, x, str(visit)))
    for visit in earlier:
        model, context, tokens = visit["model"], visit["context"], visit["new_tokens"]
        ttft = first.get((model, context))
        if ttft is None or model not in held.cards:
            raise NotResolved(f"no first token of {model} at {context} tokens for an earlier visit")
        step_s = (tokens / visit["output_tok_per_s"] - statistics.median(ttft)) / (tokens - 1)
        x = {"launch": held.kernels.of(held.cards[model], EAGER)}
        cells.append(Cell("host", model, EAGER, context, 1, step_s, x, visit["visit"]))
    return cells


def _prefill_cells(held: _Rows) -> list[Cell]:
    """First tokens: TTFT of generate(), and what a captured call takes beside its steps."""
    times: dict[tuple, list[float]] = {}
    for row in held.rows:
        key = row.key
        if row.kind not in ("latency", "batch") or not _usable(row):
            continue
        if key["model"] not in held.cards:
            continue
        where = (key["model"], key["stack"], key["context"], key["batch"], row.env_id)
        if key["stack"] == EAGER and row.samples.get("ttft_s"):
            times.setdefault(where, []).extend(row.samples["ttft_s"])
        elif row.samples.get("decode_s"):
            pairs = zip(row.samples["e2e_s"], row.samples["decode_s"], strict=True)
            times.setdefault(where, []).extend(whole - steps for whole, steps in pairs)
    cells = []
    for (model, _, context, batch, visit), values in times.items():
        card, value = held.cards[model], statistics.median(values)
        if context * batch >= PREFILL_TOKENS:
            if (stats.spread(values) or 0.0) > STEADY:
                continue
            law, x = "prefill", held.prefill(card, context, batch)
        elif context < PREFILL_TOKENS / 4:
            law, x = "host", _prefill_launches(card, held.kernels)
        else:  # neither surely waits for the host nor surely for the device
            continue
        # The first token of every stack is generate()'s: one group for each model.
        cells.append(Cell(law, model, "prefill", context, batch, value, x, str(visit)))
    return cells


def _prefill_launches(card: ModelCard, kernels: Kernels) -> dict[str, float]:
    return {"expert_launch" if card.experts else "launch": kernels.of(card, EAGER)}


def _flop_j(rows: Sequence[Record], cards: Mapping[str, ModelCard], eager: frozenset[str]) -> float:
    """Joules above idle of an operation, the median over dense first tokens; 0 without any."""
    found = []
    for row in rows:
        card = cards.get(row.key.get("model"))
        if row.kind != "energy-slope" or row.key["new_tokens"] != 1 or card is None:
            continue
        if card.experts or card.model_type in eager or not row.samples.get("energy_j"):
            continue
        time_s = statistics.median(row.samples["e2e_s"])
        above_j = statistics.median(row.samples["energy_j"]) - row.values["idle_w"] * time_s
        done = operations(card, row.key["context"], row.key["batch"], attention=True)
        found.append(above_j / done)
    return statistics.median(found) if found else 0.0


def _energy_cells(held: _Rows, fits: Mapping[str, Fit]) -> list[Cell]:
    """Joules of a decode step and of a first token, from lines over lengths.

    Of a step, idle power and the operations are known; what is left is for the law.
    """
    kinds = ("batch-energy", "energy", "energy-slope")
    rows = [
        r
        for r in held.rows
        if r.kind in kinds
        and _usable(r)
        and r.samples.get("energy_j")
        and r.samples.get("e2e_s")
        and r.value("idle_w")
        and r.key["model"] in held.cards
    ]
    flop_j = _flop_j(held.rows, held.cards, held.eager_attention)
    cells = []
    for (model, stack, context, batch, visit), group in _by_arm(rows).items():
        lengths = {r.key["new_tokens"] for r in group}
        if len(lengths) < 2:
            continue
        card, idle_w = held.cards[model], group[0].values["idle_w"]
        first_j, step_j = stats.line(*_points(group, "energy_j"))
        first_s, step_s = stats.line(*_points(group, "e2e_s"))
        if min(x.value for x in (first_j, step_j, first_s, step_s)) <= 0:
            continue
        tokens = context + max(lengths) / 2
        where = {"context": context, "batch": batch, "visit": str(visit)}
        known = idle_w * step_s.value + operations_joules(card, batch, flop_j)
        try:
            if stack in CAPTURED:
                x = step_joules(held.step(card, stack, tokens, batch), fits["step"], held.bandwidth)
                cells.append(
                    Cell("step energy", model, stack, value=step_j.value, x=x, known=known, **where)
                )
            elif stack == EAGER:
                x = {"eager_bytes": eager_bytes(card, tokens, batch)}
                cells.append(
                    Cell("eager step energy", model, stack, value=step_j.value, x=x, known=known,
                         **where)
                )  # fmt: skip
            lone = stack == EAGER and batch > 1  # whose first tokens the host's noise hides
            if context * batch >= PREFILL_TOKENS and not lone:
                x = prefill_joules(held.prefill(card, context, batch), fits["prefill"])
                scale = first_s.value / sum(x.values())
                x = {name: amount * scale for name, amount in x.items()}
                cells.append(
                    Cell("prefill energy", model, "prefill", value=first_j.value, x=x, **where)
                )
        except (NotResolved, KeyError):  # a law of times that the rows do not resolve
            continue
    return cells


def eager_bytes(card: ModelCard, tokens: float, batch: int) -> float:
    """Bytes that a step of generate() moves: copied experts are read, written and read again."""
    copied = expert_bytes(card, batch * card.experts_per_token) if card.experts else 0.0
    return always_bytes(card) + 3 * copied + card.kv_bytes(round(tokens), batch)


def _points(rows: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    pairs = [(r.key["new_tokens"] - 1, value) for r in rows for value in r.samples[name]]
    return [float(x) for x, _ in pairs], [y for _, y in pairs]


# --- predictions

METRICS = {
    "decode_tok_per_s": "tok/s",
    "ttft_s": "s",
    "decode_j_per_1k": "J",
    "call_j_per_1k": "J",
}
CUDA_CONTEXT_BYTES = 700_000_000  # rounded up from the memory rows
ACTIVATIONS = 17  # hidden states of a whole prompt that a prefill holds at once, by memory rows
SCORES_HELD = 3.05  # matrices of scores (2 bytes) that eager attention holds at once, by them too
NEAR = 0.05  # of the card's memory: what is so near to full may go either way


@dataclass(frozen=True)
class Memory:
    """Bytes that a call needs, against those of the card; `holds` is yes, no or near."""

    needed_bytes: float
    gpu_bytes: float

    @property
    def holds(self) -> str:
        """Whether the card holds it; within NEAR of full it may go either way."""
        share = self.needed_bytes / self.gpu_bytes
        return "yes" if share < 1 - NEAR else "near" if share <= 1 + NEAR else "no"

    def __str__(self) -> str:
        return f"{self.needed_bytes / GB:.1f} GB of {self.gpu_bytes / GB:.1f} GB"


def memory(
    capacity: Capacity, card: ModelCard, gpu: str, stack: str, context: int, batch: int,
    new_tokens: int = NEW_TOKENS,
) -> Memory:  # fmt: skip
    """What a whole call holds at its fullest: weights, cache, and the prefill's tensors.

    Captured stacks hold the prefill's cache beside their own. An estimate from the card: the
    measured peaks of the rows' models lie within a few percent of it. vLLM prefills in pieces.
    """
    have = capacity.gpu_bytes.get(gpu) or datasheet(gpu).memory_bytes
    if have is None:
        raise NotResolved(f"the memory of {gpu} is not known")
    cache = card.kv_bytes(context + new_tokens, batch, cache="static")
    states = ACTIVATIONS * context * batch * (card.hidden_size or 0) * 2
    scores = 0.0
    if stack == "vllm":
        states = 2e9
    elif card.model_type in capacity.eager_attention:
        scores = SCORES_HELD * 2 * batch * card.attention_heads * context**2
    copied = 0.0
    if stack == EAGER and card.experts:  # of one layer at a time
        copied = expert_bytes(card, batch * card.experts_per_token) / card.layers
    held = 2 * cache if stack in CAPTURED else cache + copied
    fullest = max(states + scores + cache, held)
    return Memory(card.weight_bytes + CUDA_CONTEXT_BYTES + fullest, float(have))


def predict(
    capacity: Capacity,
    card: ModelCard,
    gpu: str,
    stack: str,
    context: int,
    batch: int = 1,
    *,
    form: str = "bfloat16",
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Prediction]:
    """Decode throughput of all sequences (tok/s), TTFT (s), and J per 1,000 tokens of decoding and
    of whole calls of `new_tokens` tokens, each with the interval at LEVEL, or why not.

    `card` is counted in `form`. Every number is the median of draws of its parts.
    """
    case = _Case(capacity, card, gpu, stack, context, batch, form, new_tokens)
    parts = {
        "decode_tok_per_s": case.rate,
        "ttft_s": case.first_s,
        "decode_j_per_1k": case.decode_j,
        "call_j_per_1k": case.call_j,
    }
    found = {}
    for metric, part in parts.items():
        try:
            case.check(metric)
            draws = part()
        except NotResolved as why:
            alone = case.alone() if metric == "decode_tok_per_s" else None
            found[metric] = Prediction(
                metric, None, unit=METRICS[metric], reason=str(why), step_alone=alone
            )
            continue
        value, low, high = _ends(draws)
        found[metric] = Prediction(
            metric, value, low, high, METRICS[metric],
            case.bound[metric.partition("_")[0]], notes=tuple(case.notes),
        )  # fmt: skip
    return found


def _ends(draws: np.ndarray) -> tuple[float, float, float]:
    low, value, high = np.percentile(draws, [100 * (1 - LEVEL) / 2, 50, 100 * (1 + LEVEL) / 2])
    return float(value), float(low), float(high)


class _Case:
    """One cell that is predicted: its parts as draws, each made once."""

    def __init__(
        self, capacity: Capacity, card: ModelCard, gpu: str, stack: str, context: int, batch: int,
        form: str, new_tokens: int,
    ) -> None:  # fmt: skip
        self.capacity, self.card, self.stack = capacity, card, stack
        self.context, self.batch, self.form, self.new_tokens = context, batch, form, new_tokens
        self.sheet, self.other = datasheet(gpu), gpu != capacity.gpu
        self.own = datasheet(capacity.gpu)
        self.gpu = gpu
        self.model = f"{card.name} {form}" if stack == "vllm" else card.name
        self.bound = {"decode": "", "ttft": "", "call": ""}
        self.notes: list[str] = []
        self._made: dict[str, np.ndarray] = {}

    def check(self, metric: str) -> None:
        """Raise NotResolved where the cell cannot be, or no row is like it."""
        if self.sheet.memory_bytes_per_s is None:
            raise NotResolved(f"{self.gpu}: {self.sheet.missing['memory_bytes_per_s']}")
        if self.stack not in (*STACKS, "vllm"):
            raise NotResolved(f"no law for stack {self.stack}; known: {', '.join(STACKS)}, vllm")
        limit = self.card.context_limit
        if limit and self.context + self.new_tokens > limit:
            raise NotResolved(f"{self.card.name} ends at {limit:,} positions")
        if self.stack != "vllm" and self.form != "bfloat16":
            raise NotResolved(f"no row of weights in {self.form} on {self.stack}")
        if self.stack == "vllm" and metric != "decode_tok_per_s":
            raise NotResolved(
                "vLLM has one whole-call reading for each of three arms: not resolved"
            )
        if self.memory.holds == "no":
            raise NotResolved(f"does not hold: {self.memory}")

    def alone(self) -> tuple[float, float, float] | None:
        """Decode throughput if the prefill's tensors, and nothing else, are too many."""
        cache = self.card.kv_bytes(self.context + self.new_tokens, self.batch, cache="static")
        try:
            whole = self.memory
            own = Memory(self.card.weight_bytes + CUDA_CONTEXT_BYTES + cache, whole.gpu_bytes)
            if whole.holds != "no" or own.holds != "yes":
                return None
            return _ends(self.rate())
        except NotResolved:
            return None

    @property
    def memory(self) -> Memory:
        """What a whole call needs."""
        return memory(
            self.capacity, self.card, self.gpu, self.stack, self.context, self.batch,
            self.new_tokens,
        )  # fmt: skip

    def draws(self, name: str, guess: Guess) -> np.ndarray:
        """Draws of a guess; which of them meet those of other parts depends on the cell alone."""
        text = f"{name}|{self.model}|{self.gpu}|{self.stack}|{self.context}|{self.batch}"
        return guess.draws(DRAWS, list(hashlib.sha256(text.encode()).digest()[:8]))

    def factor(self, name: str, log_sd: float) -> np.ndarray:
        """Draws around 1 of what another card may change."""
        return self.draws(name, Guess(0.0, log_sd, 1e6, {}))

    def between(self, name: str) -> np.ndarray:
        """Draws between 0 and 1, all alike likely."""
        levels = scipy_stats.norm.cdf(np.log(self.factor(name, 1.0)))
        return np.clip(levels, 0.0, 1.0)

    def once(self, name: str, make: Any) -> np.ndarray:
        """A part that is made at its first use."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def cell(self, law: str, group: str, x: dict[str, float]) -> Cell:
        """This cell as a law sees it."""
        return Cell(law, self.model, group, self.context, self.batch, 1.0, x, "a new visit")

    def carried(self, guess: Guess, streams: Iterable[str], rest_log_sd: float) -> np.ndarray:
        """Draws of a time of another card: how well it streams, and what the rest takes there."""
        if not self.other:
            return np.ones(DRAWS)
        streamed = sum(guess.shares.get(name, 0.0) for name in streams)
        assumed = self.capacity.assumed
        log_sd = math.hypot(assumed.bandwidth_log_sd * streamed, rest_log_sd * (1 - streamed))
        return self.factor("card", log_sd)

    # seconds

    def step_s(self) -> np.ndarray:
        """Seconds of a decode step."""
        return self.once("step", self._step_s)

    def _step_s(self) -> np.ndarray:
        if self.stack == EAGER:
            return self._eager_s()
        free_s = self._free_s()
        if self.other and self.stack in CAPTURED and self.sheet.tdp_w:
            return self._slowed(free_s)
        return free_s

    def _slowed(self, free_s: np.ndarray) -> np.ndarray:
        """A step on another card whose joules would exceed its power limit.

        The board then lowers its clocks and with them the joules, so that the step takes something
        between the time without a limit and joules / limit; no row says where between.
        """
        try:
            joules = self.idle_w() * free_s + self.above_j()
        except NotResolved:  # without a law of energy nothing is known about the limit
            return free_s
        over = np.maximum(joules / (self.sheet.tdp_w * free_s) - 1, 0.0)
        if np.mean(over > 0) > 0.25:
            self.notes.append(f"a step near the power limit of {self.sheet.tdp_w:g} W")
        return free_s * (1 + self.between("slowed") * over)

    def _free_s(self) -> np.ndarray:
        tokens, assumed = self.context + self.new_tokens / 2, self.capacity.assumed
        if self.stack == "vllm":
            law, group = self.capacity.law("vllm step"), "vllm"
            x = vllm_amounts(
                self.card, self.form, tokens, self.batch, bytes_per_s=self.sheet.memory_bytes_per_s
            )
            streams = ("vllm_stream", "vllm_mxfp4")
        else:
            law, group, x = self.capacity.law("step"), self.stack, self.amounts(tokens)
            streams = tuple(name for name in law.names if name.endswith("stream"))
        guess = law.guess(self.cell(law.law, group, x))
        time_s = self.draws("step", guess) * self.carried(guess, streams, assumed.kernel_log_sd)
        streamed = sum(guess.shares.get(name, 0.0) for name in streams)
        self.bound["decode"] = "bandwidth" if streamed >= 0.5 else "kernels"
        roof_s = self._roof_s()
        if np.median(roof_s) > np.median(time_s):
            self.bound["decode"] = "operations"
        self._beyond(law)
        return np.maximum(time_s, roof_s)

    def _roof_s(self) -> np.ndarray:
        """Seconds that a step's operations take at the rate of a prefill."""
        name = "expert_operations" if self.card.experts else "dense_operations"
        if self.card.experts or "prefill" not in self.capacity.fits:
            return np.zeros(DRAWS)  # a prefill's experts work otherwise than a decode step's
        value, _, high = self.capacity.law("prefill").coefficient(name)
        done = 2.0 * self.card.active_params * self.batch / self.sheet.bf16_flop_per_s
        guess = Guess(math.log(done * value), 1.0, 1e6, {})
        return self.draws("roof", replace(guess, log_sd=math.log(high / value) / guess.quantile))

    def _beyond(self, law: Fit) -> None:
        own = [c for c in law.cells if c.stack in (self.stack, "prefill")]
        for name, value in (("context", self.context), ("batch", self.batch)):
            most = max((getattr(c, name) for c in own), default=value)
            if value > most:
                self.notes.append(f"{law.law}: {name} beyond the rows' {most:,}")

    def amounts(self, tokens: float) -> dict[str, float]:
        """Amounts of a captured step on the card that is asked for."""
        return step_amounts(
            self.card, self.stack, tokens, self.batch,
            kernels=self.capacity.kernels.of(self.card, self.stack),
            bytes_per_s=self.sheet.memory_bytes_per_s,
            touched=self.capacity.traced.get((self.card.name, self.batch)),
        )  # fmt: skip

    def _eager_s(self) -> np.ndarray:
        tokens, assumed = self.context + self.new_tokens / 2, self.capacity.assumed
        kernels = self.capacity.kernels.of(self.card, EAGER)
        law = self.capacity.law("eager device step")
        x = eager_amounts(
            self.card, tokens, self.batch, kernels=kernels,
            bytes_per_s=self.sheet.memory_bytes_per_s,
        )  # fmt: skip
        guess = law.guess(self.cell(law.law, EAGER, x))
        streams = ("eager_stream", "copied_experts", "eager_cache_stream")
        device_s = self.draws("device", guess)
        device_s = device_s * self.carried(guess, streams, assumed.kernel_log_sd)
        host = self.capacity.law("host")
        host_s = self.draws("host", host.guess(self.cell(host.law, EAGER, {"launch": kernels})))
        waits = np.median(host_s) > np.median(device_s)
        self.bound["decode"] = "host" if waits else "device"
        self._beyond(law)
        return np.maximum(device_s, host_s)

    def first_s(self) -> np.ndarray:
        """Seconds of the first token: the prefill that all stacks of the library share."""
        return self.once("first", self._first_s)

    def _first_s(self) -> np.ndarray:
        law, assumed = self.capacity.law("prefill"), self.capacity.assumed
        x = self.prefill_amounts()
        guess = law.guess(self.cell(law.law, "prefill", x))
        if not self.card.experts and self.context > max(c.context for c in law.cells):
            done = operations(self.card, self.context, self.batch, attention=True)
            linear = operations(self.card, self.context, self.batch, attention=False)
            guess = guess.wider(assumed.attention_log_sd * (1 - linear / done))
        device_s = self.draws("prefill", guess)
        device_s = device_s * self.carried(
            guess, ("scores", "expert_reads"), assumed.operations_log_sd
        )
        host = self.capacity.law("host")
        launches = _prefill_launches(self.card, self.capacity.kernels)
        host_s = self.draws("first host", host.guess(self.cell(host.law, "prefill", launches)))
        waits = np.median(host_s) > np.median(device_s)
        self.bound["ttft"] = "host" if waits else "operations"
        self._beyond(law)
        return np.maximum(device_s, host_s)

    def prefill_amounts(self) -> dict[str, float]:
        """Amounts of a prefill on the card that is asked for."""
        return prefill_amounts(
            self.card, self.context, self.batch,
            eager_attention=self.card.model_type in self.capacity.eager_attention,
            bytes_per_s=self.sheet.memory_bytes_per_s, flop_per_s=self.sheet.bf16_flop_per_s,
        )  # fmt: skip

    # tokens and joules

    def rate(self) -> np.ndarray:
        """Tokens a second of all sequences."""
        return self.batch / self.step_s()

    def idle_w(self) -> np.ndarray:
        """Power of the board while it waits with a context (W)."""
        if self.capacity.idle_w is None:
            raise NotResolved("no idle power among the rows")
        log_sd = self.capacity.assumed.idle_log_sd if self.other else 0.02
        return self.capacity.idle_w * self.factor("idle", log_sd)

    def step_j(self) -> np.ndarray:
        """Joules of a decode step, at most what the board's power limit allows in its time."""
        return self.once("step J", self._step_j)

    def _step_j(self) -> np.ndarray:
        return self.limited(self.idle_w() * self.step_s() + self.above_j(), self.step_s())

    def above_j(self) -> np.ndarray:
        """Joules of a step beyond idle power: what it moves, and its operations."""
        return self.once("above J", self._above_j)

    def _above_j(self) -> np.ndarray:
        tokens = self.context + self.new_tokens / 2
        if self.stack == EAGER:
            law, group = self.capacity.law("eager step energy"), EAGER
            x = {"eager_bytes": eager_bytes(self.card, tokens, self.batch)}
        else:
            law, group = self.capacity.law("step energy"), self.stack
            x = step_joules(
                self.amounts(tokens), self.capacity.law("step"), self.sheet.memory_bytes_per_s
            )
        moved_j = self.draws("joules", law.guess(self.cell(law.law, group, x))) * self.joules()
        return moved_j + operations_joules(self.card, self.batch, self.capacity.flop_j)

    def joules(self) -> np.ndarray:
        """What another card may change in joules for an amount, as draws around 1."""
        return self.factor("joules of a card", self.capacity.assumed.joules_log_sd * self.other)

    def limited(self, joules: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Joules no more than the board's power limit allows in their time."""
        if self.sheet.tdp_w is None:
            return joules
        return np.minimum(joules, self.sheet.tdp_w * seconds)

    def first_j(self) -> np.ndarray:
        """Joules of the first token: power by what the prefill does, times its time."""
        return self.once("first J", self._first_j)

    def _first_j(self) -> np.ndarray:
        law, seconds = self.capacity.law("prefill energy"), self.first_s()
        x = prefill_joules(self.prefill_amounts(), self.capacity.law("prefill"))
        busy_s = sum(x.values())
        power_w = self.draws("power", law.guess(self.cell(law.law, "prefill", x))) / busy_s
        if self.sheet.tdp_w and self.own.tdp_w:
            power_w = power_w * self.sheet.tdp_w / self.own.tdp_w
        waits = self.bound["ttft"] == "host"
        wait_s = np.maximum(seconds - busy_s, 0.0) if waits else np.zeros(DRAWS)
        found = power_w * self.joules() * (seconds - wait_s) + self.idle_w() * wait_s
        return self.limited(found, seconds)

    def decode_j(self) -> np.ndarray:
        """Joules per 1,000 decoded tokens."""
        return 1e3 * self.step_j() / self.batch

    def call_j(self) -> np.ndarray:
        """Joules per 1,000 tokens of whole calls, prefill included."""
        whole = self.first_j() + (self.new_tokens - 1) * self.step_j()
        self.bound["call"] = self.bound["decode"]
        return 1e3 * whole / (self.batch * self.new_tokens)
