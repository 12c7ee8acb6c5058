"""A made-up study in which everything holds, with numbers that can be checked by hand.

Three models, contexts of 100, 200 and 400 tokens, 10 generated tokens. A token takes the model's
own time (10, 20, 40 ms) x (1 + context / 1000) and prefill takes none, so a call of 10 tokens of
the first model takes 110, 120 and 140 ms. Power is 100, 150 and 200 W, so 1,000 tokens of the
first take 100 W x 11 ms x 1000 = 1,100 J. Weights are 40, 80 and 100 GB, the cache 300, 200 and
100 kB a token; beside both, a prompt token takes 1 MB at the peak.
"""

from __future__ import annotations

from typing import Any

CONTEXTS, TOKENS, HEAD = (100, 200, 400), 10, 400
TOTAL = {"Ours": 20e9, "Wide": 40e9, "Long": 50e9}
ACTIVE = {"Ours": 4e9, "Wide": 40e9, "Long": 50e9}
KV = {"Ours": 300_000, "Wide": 200_000, "Long": 100_000}
OTHERS = ("Wide", "Long")
MIB, IDLE_W = 2**20, 50


def step_ms(model: str, context: int) -> float:
    """Time of one token."""
    return {"Ours": 10, "Wide": 20, "Long": 40}[model] * (1 + context / 1000)


def rate(model: str, context: int) -> float:
    return 1e3 / step_ms(model, context)


def cache(model: str, tokens: int) -> int:
    return KV[model] * tokens


def peak(model: str, context: int) -> float:
    return 2 * TOTAL[model] + cache(model, context + TOKENS) + 1e6 * context


def watts(model: str, context: int, wide_w: float, first_idle: bool) -> float:
    own = {"Ours": 100, "Wide": wide_w, "Long": 200}[model]
    return (9 * own + IDLE_W) / 10 if first_idle and context == CONTEXTS[0] else own


def study(wide_w: float = 150, first_idle: bool = False) -> dict[str, Any]:
    """The study; `wide_w` is the power of Wide, `first_idle` puts an idle reading into row one."""

    def power(model: str, context: int) -> float:
        return watts(model, context, wide_w, first_idle)

    def joules(model: str, context: int) -> float:  # per 1,000 tokens: W x ms
        return power(model, context) * step_ms(model, context)

    def table(columns: dict[str, str], rows: dict[Any, list[str | None]], **more: Any) -> dict:
        specs = {name: {"unit": unit} for name, unit in columns.items()}
        return {"columns": specs, "rows": {str(k): v for k, v in rows.items()}, **more}

    models, mb = list(TOTAL), {m: f"{peak(m, HEAD) / 1e6:.0f}" for m in TOTAL}
    gap = {m: int(mb[m]) - int(mb["Ours"]) for m in models}
    less = {m: f"{100 * (1 - int(mb['Ours']) / int(mb[m])):.2f}" for m in models}
    drop = {m: 100 * (rate(m, HEAD) / rate(m, CONTEXTS[0]) - 1) for m in models}
    per_rate = {m: rate(m, HEAD) / ACTIVE[m] * 1e9 for m in models}
    per_joule = {m: 1e3 / joules(m, HEAD) / ACTIVE[m] * 1e9 for m in models}
    greedy = f"{rate('Ours', CONTEXTS[0]):.2f}"
    tables = {
        1: table(
            {"TTFT (ms)": "ms", "p50 (ms)": "ms", "p95 (ms)": "ms", "TPOT (tok/s)": "tok/s"},
            {
                m: [
                    f"{step_ms(m, HEAD):.2f}",
                    *2 * [f"{TOKENS * step_ms(m, HEAD):.2f}"],
                    f"{rate(m, HEAD):.2f}",
                ]
                for m in models
            },
        ),
        2: table(
            dict.fromkeys(models, "tok/s"),
            {c: [f"{rate(m, c):.2f}" for m in models] for c in CONTEXTS},
        ),
        3: table(
            dict.fromkeys(models, "ms"),
            {c: [f"{step_ms(m, c):.2f}" for m in models] for c in CONTEXTS},
        ),
        4: table(
            {"ΔTPOT (%)": "%", "TPOT@100": "tok/s", "TPOT@400": "tok/s"},
            {m: [f"{drop[m]:.1f}", *(f"{rate(m, c):.2f}" for c in (100, 400))] for m in models},
        ),
        5: table(
            {"Peak VRAM (MB)": "MB", "Δ vs GPT-OSS (MB)": "MB", "% less vs Qwen/Yi": "%"},
            {m: [mb[m], str(gap[m]), less[m]] for m in models},
        ),
        6: table(
            {"TPOT (tok/s)": "tok/s", "Tokens/W": "tokens/J", "J/1K (J)": "J"},
            {
                m: [
                    f"{rate(m, HEAD):.2f}",
                    f"{1e3 / joules(m, HEAD):.4f}",
                    f"{joules(m, HEAD):.1f}",
                ]
                for m in models
            },
        ),
        7: table(
            {str(c): "J" for c in CONTEXTS},
            {m: [f"{joules(m, c):.1f}" for c in CONTEXTS] for m in models},
        ),
        8: table(
            {"Active (B)": "B", "APE-TPOT": "", "APE-1/TTFT": "", "APE-Energy": "", "TPOT/GB": ""},
            {
                m: [
                    f"{ACTIVE[m] / 1e9:.2f}",
                    f"{per_rate[m]:.3f}",
                    f"{per_rate[m]:.3f}",
                    f"{per_joule[m]:.5f}",
                    f"{rate(m, HEAD) / int(mb[m]) * 1e3:.3f}",
                ]
                for m in models
            },
        ),
        9: table(
            {"p50 tok/s": "tok/s", "p50 time (s)": "s", "Δ vs Greedy (%)": "%"},
            {"Greedy": [greedy, "0.110", "0.0"], "Top-p": ["89.55", "0.112", "-1.5"]},
            context=100,
        ),
        10: table({"p50 tok/s": "tok/s"}, {c: [f"{rate('Ours', c):.2f}"] for c in (200, 400, 800)}),
        11: table({"p50 tok/s": "tok/s"}, {"BF16": [greedy], "FP16": [None]}, context=100),
        12: table({"p50 tok/s": "tok/s"}, {"Transformers": [greedy]}, context=100),
    }

    def claim(value: Any, text: str = "as stated", **more: Any) -> dict[str, Any]:
        return {"where": "text", "text": text, "value": value, "unit": "", **more}

    def of(form: str, table: int = 0, column: str = "", **more: Any) -> dict[str, Any]:
        return {"form": form, "table": table, "column": column, **more}

    total, share = {"form": "value", "counted": "total_params"}, {"counted": "active_params"}
    time, per_1k, most = (1, "TPOT (tok/s)"), (6, "J/1K (J)"), (5, "Peak VRAM (MB)")
    claims = {
        "total-params": claim("20", model="Ours", cells=total),
        "active-params": claim("4.0", model="Ours", cells={"form": "value"} | share),
        "active-share": claim("20", model="Ours", cells=total | share | {"of": "total_params"}),
        "wide-params": claim("40", model="Wide", cells=total),
        "long-params": claim("50", model="Long", cells=total),
        "throughput-higher": claim(None, direction="higher", cells=of("order", *time)),
        "ttft-higher": claim(None, direction="lower", cells=of("order", 1, "TTFT (ms)")),
        "energy-lower": claim(None, direction="lower", cells=of("order", *per_1k)),
        "tokens-per-joule-higher": claim(None, direction="higher"),
        "peak-lower": claim(None, direction="lower", cells=of("order", *most)),
        "slows-with-context": claim(None, "all models slow"),
        "energy-rises": claim(None, "J/1K rises, most at the end"),
        "decode-degrades": claim(None, "decode degrades"),
        "decimal-units": claim("1e6"),
        "ape-higher": claim(None),
        "decoding-spread": claim("2"),
        "kv-larger": claim(None, "a larger cache"),
        "hardware": claim("1", "one Test GPU"),
        "ttft-trials": claim("5"),
        "decode-runs": claim("5", "p50 over 5 runs"),
        "sampling-cost": claim(["1", "2"], "sampling costs 1 to 2%"),
        "ape-throughput": claim(f"{per_rate['Ours']:.1f}"),
        "ape-throughput-dense": claim([f"{per_rate[m]:.2f}" for m in ("Long", "Wide")]),
        "ape-throughput-ratio": claim([f"{per_rate['Ours'] / per_rate[m]:.0f}" for m in OTHERS]),
        "ape-energy": claim(
            f"{per_joule['Ours']:.3f}", model="Ours", cells=of("value", 8, "APE-Energy")
        ),
        "ape-energy-dense": claim([f"{per_joule[m]:.4f}" for m in ("Long", "Wide")]),
        "ape-energy-ratio": claim([f"{per_joule['Ours'] / per_joule[m]:.0f}" for m in OTHERS]),
    }
    for m in models:
        claims[f"baseline-{m}"] = claim(f"{2 * TOTAL[m] / 1e9:.1f}", model=m)
        claims[f"drop-{m}"] = claim(f"{-drop[m]:.1f}", model=m)
    for m in OTHERS:
        energy = joules(m, HEAD) / joules("Ours", HEAD)
        times = rate("Ours", HEAD) / rate(m, HEAD)
        claims[f"throughput-vs-{m}"] = claim(f"{100 * (times - 1):.0f}", model=m)
        saving, gain = of("saving", *per_1k), of("gain", *per_1k, inverse=True)
        claims[f"energy-vs-{m}"] = claim(f"{100 * (1 - 1 / energy):.1f}", model=m, cells=saving)
        claims[f"tokens-per-joule-vs-{m}"] = claim(
            f"{100 * (energy - 1):.0f}", model=m, cells=gain
        ) | {"unit": "%"}
        claims[f"peak-saving-{m}"] = claim(less[m], model=m)
        claims[f"peak-vs-{m}"] = claim(f"{float(less[m]):.1f}", model=m)
        claims[f"peak-gap-{m}"] = claim(f"{gap[m] / 1e3:.1f}", model=m)

    facts: dict[str, Any] = {"gpu": "Test GPU", "gpu_total_mib": 95000.0}
    for m in models:
        for c in CONTEXTS:
            facts |= {f"p50_ms/{m}/{c}/{g}": g * step_ms(m, c) for g in (10, 20, 40)}
            facts |= {f"tpot/{m}/{c}/{g}": rate(m, c) for g in (10, 20, 40)}  # of an odd number
            facts[f"ttft_median_ms/{m}/{c}"] = facts[f"ttft_once_ms/{m}/{c}"] = step_ms(m, c)
            facts[f"energy_tok_per_s/{m}/{c}"] = rate(m, c)
            facts[f"power_w/{m}/{c}"] = power(m, c)
            facts[f"peak_mib/{m}/{c}"] = peak(m, c) / MIB
            facts[f"baseline_mib/{m}/{c}"] = 2 * TOTAL[m] / MIB
        facts[f"kv_reported_mib/{m}/{HEAD}"] = cache(m, HEAD + TOKENS) / MIB
        facts[f"held_mib/{m}/{HEAD}"] = cache(m, HEAD + TOKENS) / MIB
        facts[f"idle_w/{m}/100"], facts[f"ttft_j/{m}/100"], facts[f"runs/{m}/100"] = IDLE_W, 1.0, 5
        facts |= {
            f"ape/{m}/{name}": float(x)
            for name, x in zip(
                list(tables[8]["columns"])[1:], tables[8]["rows"][m][1:], strict=True
            )
        }
        facts[f"licence/{m}"], facts[f"licence_class/{m}"] = "Apache 2.0", "Permissive"
    released = {name: {"value": value} for name, value in facts.items()}
    released["p95_equals_p99"] = {"value": 3, "of": 36}
    return {
        "source": "made up",
        "rules": "arxiv_2508_16700",
        "title": "A study",
        "url": "https://example.org",
        "gpu": "Test GPU",
        "stack": "hf-eager",
        "dtype": "bfloat16",
        "context": HEAD,
        "new_tokens": TOKENS,
        "contexts_measured": [*CONTEXTS],
        "ablation_model": "Ours",
        "models": {m: [m.lower()] for m in models},
        "tables": tables,
        "claims": claims,
        "released": released,
        "counted": {
            m: {
                "total_params": TOTAL[m],
                "active_params": ACTIVE[m],
                "lookup_params": 0,
                "weight_bytes": 2 * TOTAL[m],
                "kv_bytes_per_token": KV[m],
                "vocab_size": 100_000,
            }
            for m in models
        },
        "governance": {
            "number": 13,
            "rows": {m: ["Apache 2.0", "Permissive", "Yes", "Yes", ""] for m in models},
        },
        "sources": {
            "one-ttft": {"text": "once", "url": "https://example.org/1", "dated": "2025"},
            "latency-runs": {
                "text": "ten",
                "url": "https://example.org/5",
                "dated": "",
                "runs": 10,
            },
            "three-prompts": {"text": "own prompts", "url": "https://example.org/6", "dated": ""},
            "edge-power": {"text": "ends", "url": "https://example.org/2", "dated": "2025"},
            "bandwidth": {
                "text": "fast",
                "url": "https://example.org/3",
                "dated": "2025",
                "bytes_per_s": 3.9e12,
            },
        },
    }


def entries() -> dict[str, Any]:
    """What params/models.yaml says about the models of the study."""
    stated = {
        "licence": "Apache-2.0",
        "class": "permissive",
        "source": ["https://example.org"],
        "date": "2026-01-01",
    }
    return {m.lower(): {"hub": None, "governance": dict(stated)} for m in TOTAL}
