"""Rules of the audit about energy and ablations.

A rule takes a study and returns what it found, or None where the study holds. Its docstring is
the rule as the reader sees it.
"""

from __future__ import annotations

import math

from lib import stats
from lib.published import JOULES, P50, RATE, TTFT, Published, Verdict, agrees, each, percent


def tokens_per_joule_unit(p: Published) -> Verdict | None:
    """1000 / (J per 1,000 tokens) is tokens per joule; tokens per watt would also need a time."""
    column = "Tokens/W"
    if p.data["tables"][6]["columns"][column]["unit"] != "tokens/W":
        return None
    exact = {m: 1e3 / p.value(6, m, JOULES) for m in p.models}
    printed = ", ".join(f"{p.printed(6, m, column)} tokens/W ({m})" for m in p.models)
    follows = f"1000 / J/1K = {each(exact, '.4f')}: tokens per joule"
    return Verdict("error", "tables 6 and 8", printed, follows, ("ape-energy", "ape-energy-dense"))


def tokens_per_joule_gain(p: Published) -> Verdict | None:
    """The gain in tokens per joule is the inverse ratio of J/1K, which is printed with five
    digits; table 6 prints tokens per joule with three."""
    claims, own = p.about("tokens-per-joule-vs"), p.value(6, p.reference, JOULES)
    gain = {m: percent(p.value(6, m, JOULES), own) for m in claims}
    off = {m: c for m, c in claims.items() if not agrees(p.claimed(c), gain[m])}
    if not off:
        return None
    printed = ", ".join(f"+{p.claimed(c)} % against {m}" for m, c in off.items())
    follows = ", ".join(
        f"{p.printed(6, m, JOULES)} / {p.printed(6, p.reference, JOULES)} = {gain[m]:+.1f} % ({m})"
        for m in off
    )
    return Verdict(
        "error",
        "section 4.2, findings at 2K",
        printed,
        f"{follows}; printed is the ratio of rounded values",
        tuple(off.values()),
    )


def energy_is_time(p: Published) -> Verdict | None:
    """J/1K = 1000 W / (tok/s). Split the ratio of J/1K into the ratio of throughputs and that of
    powers; the share of each is its logarithm over that of the whole."""
    ref, context = p.reference, p.data["context"]
    watts = {m: p.fact("power_w", m, context) for m in p.models}
    rows = [(m, c) for m in p.models for c in p.contexts]
    kept = sum(
        abs(
            1e3 * p.fact("power_w", m, c) / p.fact("energy_tok_per_s", m, c) / p.value(7, m, str(c))
            - 1
        )
        < 1e-3
        for m, c in rows
    )
    share = {
        m: math.log(p.value(6, ref, RATE) / p.value(6, m, RATE))
        / math.log(p.value(6, m, JOULES) / p.value(6, ref, JOULES))
        for m in p.others
    }
    mostly = [m for m in p.others if share[m] > 0.75]
    if not mostly:
        return None
    printed = ", ".join(
        f"{p.claimed(c)} % less energy than {m}"
        for m, c in p.about("energy-vs").items()
        if m in mostly
    )
    follows = f"J/1K = W / throughput in {kept} of {len(rows)} rows; " + "; ".join(
        f"power is {watts[ref]:.1f} against {watts[m]:.1f} W "
        f"({percent(watts[ref], watts[m]):+.1f} %), so {100 * share[m]:.0f} % of the gain over {m} "
        "is the throughput ratio again"
        for m in mostly
    )
    claims = tuple(c for m, c in p.about("energy-vs").items() if m in mostly)
    return Verdict("caution", "section 4.2, table 6", printed, follows, claims)


def energy_trend(p: Published) -> Verdict | None:
    """Table 7 row by row: the steps from one context to the next, which the text says all rise,
    the last one most."""
    p.claim("energy-rises")
    said, follows = [], []
    for m in p.models:
        row = [p.value(7, m, str(c)) for c in p.contexts]
        steps = [b - a for a, b in zip(row, row[1:], strict=False)]
        if min(steps) < 0 or max(steps) > steps[-1]:
            said.append(f"{m}: " + ", ".join(p.printed(7, m, str(c)) for c in p.contexts))
            follows.append(
                f"{m}: steps " + ", ".join(f"{s:+,.1f}" for s in steps) + " J; the "
                f"largest ends at {p.contexts[steps.index(max(steps)) + 1]}"
                + (", and one falls" if min(steps) < 0 else "")
            )
    if not said:
        return None
    printed = f"{p.claim('energy-rises')['text']}; {'; '.join(said)}"
    return Verdict("error", "section 4.2, table 7", printed, "; ".join(follows), ("energy-rises",))


def prefill_share(p: Published) -> Verdict | None:
    """Prefill takes at most TTFT, so it is at most TTFT / p50 of the call (same row of table 1)."""
    claim = p.claim("prefill-dominates")
    share = {m: 100 * p.value(1, m, TTFT) / p.value(1, m, P50) for m in p.models}
    if max(share.values()) > 50:
        return None
    return Verdict(
        "error",
        "section 4.2, context trends",
        claim["text"],
        f"at most {each(share, '.0f', '%')} of the call",
        ("prefill-dominates",),
    )


def first_row_is_partly_idle(p: Published) -> Verdict | None:
    """A row's power is the mean of two readings a run. If one of the first row's readings was idle
    power, the mean W of n readings becomes (n W - idle) / (n - 1); then it should be near the next
    row's. This shows that one idle reading would explain the row, not that it happened."""
    first, second = p.contexts[:2]
    n = {m: 2 * p.fact("runs", m, first) for m in p.models}
    mean = {m: p.fact("power_w", m, first) for m in p.models}
    idle = {m: p.fact("idle_w", m, first) for m in p.models}
    rest = {m: (n[m] * mean[m] - idle[m]) / (n[m] - 1) for m in p.models}
    following = {m: p.fact("power_w", m, second) for m in p.models}
    explained = all(
        abs(rest[m] / following[m] - 1) < 0.03 < 1 - mean[m] / following[m] for m in p.models
    )
    if not explained:
        return None
    token = {
        m: p.fact("ttft_j", m, first) / p.fact("ttft_once_ms", m, first) * 1e3 for m in p.models
    }
    rows = [1e3 * p.fact("power_w", m, c) for m in p.models for c in p.contexts]
    tens = sum(abs(w - round(w)) < 1e-6 for w in rows)
    low = {m: -percent(mean[m], rest[m]) for m in p.models}
    printed = f"J/1K at {first}: " + each({m: p.printed(7, m, str(first)) for m in p.models})
    follows = f"{each(mean, '.1f', 'W')}; without one idle reading {each(rest, '.1f', 'W')}, near "
    follows += f"the next row's {each(following, '.1f', 'W')}; J/1K would then be too low by "
    follows += f"{each(low, '.1f', '%')}. Idle power was {each(idle, '.0f', 'W')}, and the row "
    follows += f"books its first token at {each(token, '.0f', 'W')}. {tens} of {len(rows)} means "
    follows += "have at most three decimals, as ten readings of two decimals have"
    return Verdict("caution", "table 7", printed, follows, (), (p.source("edge-power")["url"],))


def greedy_baselines_differ(p: Published) -> Verdict | None:
    """The greedy baseline of each ablation is one arm (bf16, 64 tokens); its spread is
    (largest - smallest) / median. An effect below it is not resolved."""
    cells = {9: "Greedy", 11: "BF16", 12: "Transformers"}
    contexts = {str(p.data["tables"][t].get("context")) for t in cells}
    if len(contexts) > 1:  # other arms, which may differ
        return None
    rates = {f"table {t}": p.value(t, row, "p50 tok/s") for t, row in cells.items()}
    column = "Δ vs Greedy (%)"
    effects = [
        abs(p.value(9, row, column)) for row in p.data["tables"][9]["rows"] if row != "Greedy"
    ]
    spread = 100 * stats.spread(list(rates.values()))
    if spread <= max(effects):
        return None
    follows = f"the greedy run gives {each(rates, '.2f', 'tok/s')}, a spread of {spread:.1f} %; "
    follows += f"the effects are {min(effects):.1f} to {max(effects):.1f} %"
    if contexts == {"None"}:
        follows += "; no context is stated for these tables"
    return Verdict(
        "caution",
        "tables 9, 11 and 12",
        p.claim("sampling-cost")["text"],
        follows,
        ("sampling-cost", "decoding-spread"),
    )


def same_arm_twice(p: Published) -> Verdict | None:
    """Table 10 repeats arms of table 2 (same model, context and tokens, greedy). Their difference
    is what a campaign adds; the sampling effect should exceed it."""
    rows = [int(c) for c in p.data["tables"][10]["rows"] if int(c) in p.contexts]
    pairs = {c: (p.value(10, c, "p50 tok/s"), p.value(2, c, p.reference)) for c in rows}
    off = {f"at {c}": percent(*pair) for c, pair in pairs.items()}
    low, high = (float(x) for x in p.claim("sampling-cost")["value"])
    if max(map(abs, off.values()), default=0) <= high:
        return None
    printed = ", ".join(f"{a:.2f} and {b:.2f} tok/s at {c}" for c, (a, b) in pairs.items())
    follows = f"{each(off, '+.1f', '%')}: more than the {low:g} to {high:g} % of sampling"
    return Verdict("caution", "tables 2 and 10", printed, follows, ("sampling-cost",))


ENERGY = (
    tokens_per_joule_unit,
    tokens_per_joule_gain,
    energy_is_time,
    energy_trend,
    prefill_share,
    first_row_is_partly_idle,
)
ABLATIONS = (greedy_baselines_differ, same_arm_twice)
