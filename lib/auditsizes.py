"""Rules of the audit about memory, efficiency per parameter or byte, and governance.

A rule takes a study and returns what it found, or None where the study holds. Its docstring is
the rule as the reader sees it.
"""

from __future__ import annotations

from lib.published import BYTES, Published, Verdict, agrees, each, plain

PEAK, GAP, LESS = "Peak VRAM (MB)", "Δ vs GPT-OSS (MB)", "% less vs Qwen/Yi"
MIB = BYTES["MiB"]


def mib_as_mb(p: Published) -> Verdict | None:
    """A peak holds at least the weights: parameters x 2 bytes in bfloat16. A printed peak below
    that is not in the unit that is printed."""
    low = [m for m in p.models if p.value(5, m, PEAK) * BYTES["MB"] < p.counted(m, "weight_bytes")]
    if not low:
        return None
    said = "; ".join(
        f"{m} would peak at {p.value(5, m, PEAK) / 1e3:.2f} GB, below its weights "
        f"({p.counted(m, 'total_params') / 1e9:.2f} x 10^9 parameters, "
        f"{p.counted(m, 'weight_bytes') / 1e9:.2f} GB); read as MiB it is "
        f"{p.value(5, m, PEAK) * MIB / 1e9:.2f} GB"
        for m in low
    )
    printed = "peaks in MB, decimal by section 3.1: " + ", ".join(
        f"{p.value(5, m, PEAK):,.0f} ({m})" for m in p.models
    )
    return Verdict("error", "table 5; section 3.1", printed, said, ("decimal-units",))


def baseline_units(p: Published) -> Verdict | None:
    """Compare each stated baseline with the released allocation before the prompt, once in GB
    (MiB x 2^20 / 10^9), once as MiB / 1000. Sizes set side by side must be in one unit."""
    claims = p.about("baseline")
    exact = {m: p.fact("baseline_mib", m, p.data["context"]) for m in claims}
    wrong = [m for m, c in claims.items() if not agrees(p.claimed(c), exact[m] * MIB / 1e9)]
    wrong = [m for m in wrong if agrees(p.claimed(claims[m]), exact[m] / 1e3)]
    if not wrong:
        return None
    printed = ", ".join(f"{p.claimed(c)} GB ({m})" for m, c in claims.items())
    follows = ", ".join(f"{exact[m] * MIB / 1e9:.2f} GB ({m})" for m in claims)
    follows += "; printed as MiB / 1000: " + ", ".join(f"{exact[m] / 1e3:.2f} ({m})" for m in wrong)
    return Verdict("error", "section 4.2, findings", printed, follows, tuple(claims.values()))


def gaps_in_gb(p: Published) -> Verdict | None:
    """A gap of table 5 times its unit (2^20 bytes), over 10^9, is the gap in decimal GB."""
    claims = p.about("peak-gap")
    exact = {m: p.value(5, m, GAP) * BYTES[p.unit(5, GAP)] / 1e9 for m in claims}
    if all(agrees(p.claimed(c), exact[m]) for m, c in claims.items()):
        return None
    printed = ", ".join(f"{p.claimed(c)} GB less than {m}" for m, c in claims.items())
    follows = ", ".join(
        f"{p.value(5, m, GAP):,.0f} {p.unit(5, GAP)} = {exact[m]:.1f} GB ({m})" for m in claims
    )
    return Verdict("error", "section 4.2, findings", printed, follows, tuple(claims.values()))


def peak_row(p: Published) -> Verdict | None:
    """A printed peak is the released one, to within one unit of its last digit."""
    unit, context = p.unit(5, PEAK), p.data["context"]
    exact = {m: p.fact("peak_mib", m, context) * MIB / BYTES[unit] for m in p.models}
    off = [m for m in p.models if not agrees(p.printed(5, m, PEAK), exact[m])]
    if not off:
        return None
    less = {m: 100 * (1 - exact[p.reference] / exact[m]) for m in p.others}
    printed = ", ".join(f"{p.value(5, m, PEAK):,.0f} ({m})" for m in off)
    follows = ", ".join(
        f"{exact[m]:,.2f} {unit} in the released file of {m}, "
        f"{exact[m] - p.value(5, m, PEAK):+,.2f}"
        for m in off
    )
    follows += f"; the savings become {each(less, '.2f', '%')}, printed "
    follows += each({m: p.printed(5, m, LESS) for m in p.others}, unit="%")
    return Verdict("error", "table 5", printed, follows)


def saving_is_size(p: Published) -> Verdict | None:
    """Compare the saving in weights with the saving in total and in active parameters (each
    1 - ours / theirs), and with the saving at the peak."""
    p.claim("saving-from-moe")
    ref = p.reference

    def less(model: str, what: str) -> float:
        return 100 * (1 - p.counted(ref, what) / p.counted(model, what))

    found = [m for m in p.others if abs(less(m, "weight_bytes") - less(m, "total_params")) < 0.5]
    if not found:
        return None
    above = {m: p.fact("peak_mib", m, p.data["context"]) for m in p.models}
    above = {m: v - p.fact("baseline_mib", m, p.data["context"]) for m, v in above.items()}
    follows = "; ".join(
        f"against {m} the weights save {less(m, 'weight_bytes'):.1f} %, as total parameters do "
        f"({less(m, 'total_params'):.1f} %; active ones would save "
        f"{less(m, 'active_params'):.1f} %), and the peak {p.value(5, m, LESS):.1f} %"
        for m in found
    )
    follows += "; all experts are resident, and above the baseline the peak needs " + ", ".join(
        f"{v:,.0f} MiB ({m})" for m, v in above.items()
    )
    claims = ("saving-from-moe", *p.about("peak-saving").values())
    return Verdict(
        "caution", "section 4.2, findings", p.claim("saving-from-moe")["text"], follows, claims
    )


def kv_contribution(p: Published) -> Verdict | None:
    """The cache is tokens x bytes per token (layers x 2 x key-value heads x head width x 2 B); the
    released files also hold what stayed allocated after the call. The study's contribution is the
    peak less what was allocated before, so it counts workspace and logits as cache."""
    p.claim("kv-larger")
    context, tokens = p.data["context"], p.data["context"] + p.data["new_tokens"]
    said = {m: p.fact("kv_reported_mib", m, context) for m in p.models}
    held = {m: p.fact("held_mib", m, context) for m in p.models}
    cache = {m: tokens * p.counted(m, "kv_bytes_per_token") / MIB for m in p.models}
    if said[p.reference] <= 1.5 * cache[p.reference]:
        return None
    printed = (
        p.claim("kv-larger")["text"]
        + "; the released files: "
        + ", ".join(f"{v:,.0f} MiB ({m})" for m, v in said.items())
    )
    follows = f"{tokens:,} tokens: " + ", ".join(
        f"{p.counted(m, 'kv_bytes_per_token'):,} B a token = {cache[m]:,.1f} MiB, held "
        f"{held[m]:,.1f}, reported {said[m] / held[m]:.1f} times that ({m})"
        for m in p.models
    )
    if cache[p.reference] < min(cache[m] for m in p.others):
        follows += f"; the cache of {p.reference} is the smallest"
    return Verdict("error", "sections 3.4 and 4.2", printed, follows, ("kv-larger",))


def held_logits(p: Published) -> Verdict | None:
    """From the second longest to the longest context, the growth of (peak - baseline) per prompt
    token, less the cache of a token, against one row of logits (vocabulary x 2 B). Equal within
    2 % fits a peak that holds the logits of every prompt position."""
    first, last = p.contexts[-2:]

    def above(model: str, context: int) -> float:
        both = p.fact("peak_mib", model, context), p.fact("baseline_mib", model, context)
        return (both[0] - both[1]) * MIB

    rest = {
        m: (above(m, last) - above(m, first)) / (last - first) - p.counted(m, "kv_bytes_per_token")
        for m in p.models
    }
    row = {m: 2 * p.counted(m, "vocab_size") for m in p.models}
    found = [m for m in p.models if abs(rest[m] / row[m] - 1) < 0.02]
    if not found:
        return None
    follows = "; ".join(
        f"{m}: beside the cache the peak grows by {rest[m]:,.0f} B a prompt token, a row of logits "
        f"is {row[m]:,} B" + ("" if m in found else " (something else is larger there)")
        for m in [*found, *(m for m in p.models if m not in found)]
    )
    printed = "peak less pre-decode allocation is an estimate of the KV contribution"
    return Verdict("caution", "section 3.4", printed, follows, ("kv-larger",))


def realised_parameters(p: Published) -> Verdict | None:
    """Throughput over the parameters that the implementation used for a token: where it computes
    every expert, all parameters but the input embedding."""
    source, ref = p.source("all-experts"), p.reference
    claim = [float(x) for x in p.claim("ape-throughput-ratio")["value"]]
    used = (p.counted(ref, "total_params") - p.counted(ref, "lookup_params")) / 1e9
    rate = p.value(8, ref, "APE-TPOT") * p.value(8, ref, "Active (B)")
    ratio = {m: rate / used / p.value(8, m, "APE-TPOT") for m in p.others}
    if claim[0] <= 1.2 * max(ratio.values()):
        return None
    printed = f"{claim[0]:g} to {claim[1]:g} times, on {p.printed(8, ref, 'Active (B)')} x 10^9"
    follows = f"on {used:.2f} x 10^9: {rate / used:.2f} tok/s per 10^9, " + ", ".join(
        f"{r:.1f} times {m}" for m, r in ratio.items()
    )
    follows += f"; {source['text']} ({source['dated']})"
    claims = ("ape-higher", "ape-throughput", "ape-throughput-ratio", "ape-energy-ratio")
    return Verdict("caution", "section 4.3, table 8", printed, follows, claims, (source["url"],))


def throughput_per_gb(p: Published) -> Verdict | None:
    """TPOT / peak in decimal GB, as section 3.6 defines it; the peak of table 5 x 2^20 / 10^9."""
    scale = BYTES[p.unit(5, PEAK)] / 1e9
    exact = {m: p.value(1, m, "TPOT (tok/s)") / (p.value(5, m, PEAK) * scale) for m in p.models}
    if all(agrees(p.printed(8, m, "TPOT/GB"), exact[m]) for m in p.models):
        return None
    printed = ", ".join(f"{p.printed(8, m, 'TPOT/GB')} ({m})" for m in p.models)
    follows = ", ".join(f"{exact[m]:.3f} ({m})" for m in p.models)
    return Verdict("error", "table 8", printed, f"{follows}; printed is tok/s per 1,000 MiB")


def licences(p: Published) -> Verdict | None:
    """The licence of table 13 against the one that the publisher's model card states."""
    stated = {m: p.entry(m)[1].get("governance") or {} for m in p.models}
    printed = {m: p.data["governance"]["rows"][m][0] for m in p.models}
    off = [m for m in p.models if stated[m] and plain(stated[m]["licence"]) != plain(printed[m])]
    if not off:
        return None
    said = ", ".join(f"{printed[m]}, {p.data['governance']['rows'][m][1]} ({m})" for m in off)
    follows = "; ".join(
        f"{stated[m]['licence']}, {stated[m]['class']} ({m}, looked up {stated[m]['date']})"
        for m in off
    )
    sources = tuple(x for m in off for x in stated[m]["source"])
    return Verdict("error", "table 13", said, follows, (), sources)


def governance_source(p: Published) -> Verdict | None:
    """Table 13 against the overview among the released files, which it should summarise."""
    rows = p.data["governance"]["rows"]
    off = [
        m
        for m in p.models
        if (p.fact("licence", m), p.fact("licence_class", m)) != tuple(rows[m][:2])
    ]
    if not off:
        return None
    printed = ", ".join(f"{m}: {rows[m][0]}, {rows[m][1]}" for m in off)
    follows = "the released overview says " + ", ".join(
        f"{p.fact('licence', m)}, {p.fact('licence_class', m)} ({m})" for m in off
    )
    return Verdict("caution", "table 13", printed, follows)


MEMORY = (
    mib_as_mb,
    baseline_units,
    gaps_in_gb,
    peak_row,
    kv_contribution,
    held_logits,
    saving_is_size,
)
EFFICIENCY = (throughput_per_gb, realised_parameters)
GOVERNANCE = (licences, governance_source)
