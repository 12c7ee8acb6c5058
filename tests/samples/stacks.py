"""Two models on two stacks in one folder, every kind of row, and beside each one that failed.

Times and energy on `graph` are 1/4 of those of `sample_records` for GPT-OSS-20B and 1/2 for
Qwen3-32B, so that the ratio of their throughputs, 2 on `hf-eager`, is 4 there. Peaks are 100 MiB
higher. A failed row has no samples and no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.models.card import ModelCard
from lib.records.record import Record, environment_record
from tests.samples import records as sample
from tests.samples.records import GPU, MIB, key, spread

MODELS = ("gpt-oss-20b", "qwen3-32b")
STACKS = ("hf-eager", "graph")
FASTER = {("gpt-oss-20b", "graph"): 4, ("qwen3-32b", "graph"): 2}
CONTEXTS = (512, 2048)
ERROR = "OutOfMemoryError: CUDA out of memory"
ENV = environment_record({**GPU, "copy_bytes_per_s": 3e12})
FAILED = (
    "latency",
    "itl",
    "aa",
    "busy",
    "gate",
    "trace",
    "memory",
    "memory-paper",
    "energy",
    "energy-slope",
    "energy-again",
    "energy-weights",
    "energy-peer",
    "instrument",
    "ablation-stack",
    "ablation-experts",
)


def card(model: str) -> Record:
    """A full card, so that the cache and the bound are known."""
    active = sample.ACTIVE[model]
    made = ModelCard(
        name=model,
        model_type="toy",
        dtype="bfloat16",
        total_params=active + 10**9,
        active_params=active,
        lookup_params=10**9,
        routed_params=0,
        weight_bytes=2 * active,
        routed_bytes=0,
        lookup_bytes=2 * 10**9,
        layers=2,
        hidden_size=64,
        attention_heads=2,
        kv_heads=1,
        head_dim=32,
        experts=32 if "oss" in model else 0,
        experts_per_token=0,
        context_limit=8192,
        vocab_size=1000,
        kv_layers=((64, None), (64, 128)),
        kv_element_bytes=2,
    )
    return Record(
        "card",
        key(model, context=None, new_tokens=None),
        {},
        made.as_dict() | sample.source(model),
        env_id=ENV.env_id,
    )


def failed(model: str, stack: str) -> list[Record]:
    """One row of every kind that failed, at a context where nothing else was measured."""
    where = key(model, stack=stack, context=4096)
    rows = [Record(kind, where, error=ERROR, env_id=ENV.env_id) for kind in FAILED]
    arm = key(model, stack=stack, context=4096, decoding="top-k 50")
    return [*rows, Record("ablation-decoding", arm, error=ERROR, env_id=ENV.env_id)]


def one(model: str, stack: str, contexts: Sequence[int] = CONTEXTS) -> list[Record]:
    """What was measured of a model on a stack, less the failed rows."""
    env_id, faster = ENV.env_id, FASTER.get((model, stack), 1)
    step_s = 0.01 * sample.FACTORS[model] / faster
    bytes_ = {"decode_bytes": sample.ACTIVE[model] // 2, "decode_experts": experts(model, stack)}

    def row(kind: str, samples: dict, values: dict[str, Any] | None = None, **at: Any) -> Record:
        at = {"stack": stack, "cache": "static" if stack == "graph" else "dynamic"} | at
        return Record(kind, key(model, **at), samples, values or {}, env_id=env_id)

    rows = []
    for made in (
        *sample.latency(model, env_id, contexts),
        *sample.memory(model, env_id, contexts),
        *sample.energy(model, env_id, contexts),
    ):
        samples = {n: _divided(s, faster) for n, s in made.samples.items()}
        values = dict(made.values)
        if made.kind == "itl":
            samples["e2e_s"] = [call[-1] for call in samples["token_s"]]
        elif made.kind == "latency":
            values |= bytes_
        elif made.kind.startswith("memory"):
            values["peak_bytes"] += 100 * MIB * (stack == "graph")
        elif made.kind == "energy":
            values |= {"places": [0, 1], "blocks": 11, "window_energy_j": 4000.0 / faster}
        rows.append(
            replace(
                made,
                key=row("", {}, context=made.key["context"], new_tokens=made.key["new_tokens"]).key,
                samples=samples,
                values=values,
            )
        )
    joules = 640.0 * sample.FACTORS[model] / faster
    for context in contexts:
        rows += [
            row("energy-slope", {"energy_j": spread(joules / 2)}, context=context, new_tokens=1),
            row(
                "busy",
                {},
                {
                    "decode_busy_s": step_s / 2,
                    "decode_kernels": 100.0,
                    "decode_kernel_times": [
                        ["gemv", 90.0, step_s / 3],
                        ["softmax", 10.0, step_s / 6],
                    ],
                    "prefill_busy_s": step_s,
                },
                context=context,
                new_tokens=5,
            ),
        ]
    rows.append(row("energy-again", {"energy_j": spread(joules * (1.01 if faster == 1 else 1.02))}))
    rows.append(row("aa", {"ttft_s": spread(0.1 / faster, 13)}, new_tokens=1))
    if stack != "hf-eager":
        rows.append(
            row(
                "gate",
                {"relative_error": [0.01]},
                {
                    "mean_error": 0.01,
                    "max_error": 0.02,
                    "floor_error": 0.005,
                    "allowed_error": 0.03,
                    "same_choice": 1.0,
                },
            )
        )
    share = 0.9 if stack == "hf-eager" else 0.7
    rows += [
        row("energy-weights", {"energy_j": spread(joules * f)}, weights=f"random-{value}")
        for value, f in (("normal", 1.0), ("zero", share))
    ]
    rows.append(
        row("energy-peer", {"ours_long_j": [10.0], "zeus_long_j": [10.0 + faster], "long_s": [8.0]})
    )
    rows.append(row("instrument", {}, {"readings": 9, "counter_refresh_s": 0.1 * faster}))
    names = ("all_experts", "grouped_mm") if "oss" in model else ()
    rows += [
        row("ablation-experts", {"e2e_s": spread(t)}, experts=name)
        for name, t in zip(names, (3 / faster, 1 / faster), strict=False)
    ]
    rows += [
        row("ablation-decoding", {"e2e_s": spread(t / faster)}, decoding=name)
        for name, t in (("greedy", 1.0), ("top-p 0.9", 1.25))
    ]
    return rows


def experts(model: str, stack: str) -> str | None:
    """What decodes: `generate()` replaces grouped_mm, a captured step does not."""
    names = {"hf-eager": "batched_mm", "graph": "grouped_mm"}
    return names[stack] if "oss" in model else None


def _divided(values: list, by: float) -> list:
    return [_divided(v, by) if isinstance(v, list) else v / by for v in values]


def trace(model: str) -> Record:
    """On the study's stack: a step uses four times the nominal parameters of GPT-OSS."""
    made = sample.trace(model, ENV.env_id)
    size = sample.ACTIVE[model] // 2
    return replace(
        made,
        values={
            **made.values,
            "decode_experts": experts(model, "hf-eager"),
            "decode_bytes": size,
            "decode_bytes_realised": size,
        },
    )


def rows(
    models: Sequence[str] = MODELS, stacks: Sequence[str] = STACKS, *, fails: bool = True
) -> list[Record]:
    """The environment, and of every model its card, its trace and its rows on each stack."""
    made = [ENV]
    for model in models:
        made += [card(model), trace(model)]
        for stack in stacks:
            made += [*one(model, stack), *(failed(model, stack) if fails else ())]
    return made


def write(root: Path, models: Sequence[str] = MODELS) -> Path:
    """The same as jobs: one for each model and stack."""
    for model in models:
        for stack in STACKS:
            made = [card(model), *one(model, stack), *failed(model, stack)]
            made += [trace(model)] if stack == "hf-eager" else []
            path = f"{model}/random-{stack}/latency"
            sample.write_job(root, path, made, ENV.values, model=model)
    return root
