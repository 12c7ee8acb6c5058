"""Rules of the audit about arithmetic, order and bounds.

A rule takes a study and returns what it found, or None where the study holds. Its docstring is
the rule as the reader sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib.auditlatency import campaigns, decode_tok_per_s
from lib.published import JOULES, RATE, TTFT, Published, Verdict, agrees, each, percent, rounded

PEAK = "Peak VRAM (MB)"


def parameter_counts(p: Published) -> Verdict | None:
    """The stated parameters against those counted on the model card, in 10^9: total and active of
    the model under study, total of the others."""
    counted = {
        "total-params": p.counted(p.reference, "total_params"),
        "active-params": p.counted(p.reference, "active_params"),
    }
    for name, claim in p.data.get("claims", {}).items():
        if name.endswith("-params") and claim.get("model") in p.others:
            counted[name] = p.counted(claim["model"], "total_params")
    off = {name: n / 1e9 for name, n in counted.items() if not agrees(p.claimed(name), n / 1e9)}
    if not off:
        return None
    said = "; ".join(p.claim(name)["text"] for name in off)
    return Verdict("error", "section 3.1", said, each(off, ".3f", "x 10^9"), tuple(off))


def percentages(p: Published) -> Verdict | None:
    """Each headline percentage recomputed from the table cells that it compares."""
    ref, off = p.reference, []
    for stem, table, column, invert in (
        ("throughput-vs", 1, RATE, False),
        ("energy-vs", 6, JOULES, True),
        ("peak-saving", 5, "Peak VRAM (MB)", True),
        ("peak-vs", 5, "Peak VRAM (MB)", True),
    ):
        for m, claim in p.about(stem).items():
            change = percent(p.value(table, ref, column), p.value(table, m, column))
            off += _wrong(p, claim, -change if invert else change)
    ends = (f"TPOT@{p.contexts[-1]}", f"TPOT@{p.contexts[0]}")
    for m, claim in p.about("drop").items():
        off += _wrong(p, claim, -percent(*(p.value(4, m, column) for column in ends)))
    share = 100 * float(p.claimed("active-params")) / float(p.claimed("total-params"))
    off += _wrong(p, "active-share", share)
    if not off:
        return None
    said = "; ".join(p.claim(c)["text"] for c, _ in off)
    return Verdict(
        "error",
        "abstract; section 4",
        said,
        "; ".join(f"{x:.2f} %" for _, x in off),
        tuple(c for c, _ in off),
    )


def _wrong(p: Published, claim: str, exact: float) -> Sequence[tuple[str, float]]:
    return [] if agrees(p.claimed(claim), exact) else [(claim, exact)]


def quotients(p: Published) -> Verdict | None:
    """Table 8 recomputed from tables 1 and 6: throughput, 1 / TTFT and tokens per joule over the
    printed active parameters. Rounded inputs may move a quotient by half a percent."""
    off = {}
    for m in p.models:
        active = p.value(8, m, "Active (B)")
        exact = {
            "APE-TPOT": p.value(1, m, RATE),
            "APE-1/TTFT": 1e3 / p.value(1, m, TTFT),
            "APE-Energy": 1e3 / p.value(6, m, JOULES),
        }
        for column, value in exact.items():
            text, value = p.printed(8, m, column), value / active
            if not agrees(text, value) and abs(float(text) / value - 1) > 0.005:
                off[f"{column} of {m}"] = (text, value)
    if not off:
        return None
    return Verdict(
        "error",
        "table 8",
        each({at: t for at, (t, _) in off.items()}),
        each({at: x for at, (_, x) in off.items()}, ".4g"),
    )


def ranges(p: Published) -> Verdict | None:
    """The takeaways of section 4.3 against table 8: the quotients, and the ratios to the other
    models, to within one unit of the last digit printed."""
    off = {}
    for stem, column in (("ape-throughput", "APE-TPOT"), ("ape-energy", "APE-Energy")):
        own, others = p.value(8, p.reference, column), [p.value(8, m, column) for m in p.others]
        exact = {
            stem: [own],
            f"{stem}-dense": sorted(others),
            f"{stem}-ratio": sorted(own / x for x in others),
        }
        for name, values in exact.items():
            said = p.claim(name)["value"]
            said = said if isinstance(said, list) else [said]
            ends = [values[0], values[-1]][: len(said)]
            if not all(agrees(text, x) for text, x in zip(said, ends, strict=True)):
                off[name] = " to ".join(f"{x:.4g}" for x in ends)
    if not off:
        return None
    said = "; ".join(p.claim(name)["text"] for name in off)
    return Verdict("error", "section 4.3, takeaways", said, each(off), tuple(off))


def headline_order(p: Published) -> Verdict | None:
    """At the headline arm, against both other models: higher throughput and TTFT (table 1), lower
    J/1K (table 6), lower peak (table 5)."""
    off = {}
    for name, table, column in (
        ("throughput-higher", 1, RATE),
        ("ttft-higher", 1, TTFT),
        ("energy-lower", 6, JOULES),
        ("tokens-per-joule-higher", 6, "Tokens/W"),
        ("peak-lower", 5, PEAK),
    ):
        own, others = p.value(table, p.reference, column), {}
        higher = p.claim(name)["direction"] == "higher"
        for m in p.others:
            if (p.value(table, m, column) >= own) == higher:
                others[m] = p.printed(table, m, column)
        if others:
            off[name] = f"{own:g} against {each(others)}"
    if not off:
        return None
    said = "; ".join(p.claim(name)["text"] for name in off)
    return Verdict("error", "abstract; conclusion", said, "; ".join(off.values()), tuple(off))


def throughput_falls(p: Published) -> Verdict | None:
    """Table 2 column by column: the text says that every model slows as context grows."""
    said = p.claim("slows-with-context")["text"]
    rising = {}
    for m in p.models:
        row = [p.value(2, c, m) for c in p.contexts]
        if any(b >= a for a, b in zip(row, row[1:], strict=False)):
            rising[m] = ", ".join(p.printed(2, c, m) for c in p.contexts)
    if not rising:
        return None
    return Verdict("error", "section 4.1, table 2", said, each(rising), ("slows-with-context",))


def within_bandwidth(p: Published) -> Verdict | None:
    """A decode step reads at least the active weights, 2 bytes each, so decode throughput times
    these bytes cannot exceed the memory bandwidth of the card."""
    source, context = p.source("bandwidth"), p.data["context"]
    used = {
        m: decode_tok_per_s(p, m, context) * 2 * p.counted(m, "active_params") for m in p.models
    }
    beyond = {m: x / 1e12 for m, x in used.items() if x > source["bytes_per_s"]}
    if not beyond:
        return None
    said = each({m: p.printed(2, context, m) for m in beyond}, unit="tok/s")
    follows = f"{each(beyond, '.2f', 'TB/s')}, above {source['bytes_per_s'] / 1e12:.2f} TB/s"
    return Verdict("error", "table 2", said, follows, (), (source["url"],))


def last_digits(p: Published) -> Verdict | None:
    """Cells whose last digit is not the rounded value: table 3 against the released reading it
    holds, table 4 within one campaign, table 7 against 1000 W / (tok/s)."""
    exact = {}
    for c in p.contexts:
        for m in p.models:
            text = p.printed(3, c, m)
            readings = (p.fact("ttft_once_ms", m, c), p.fact("ttft_median_ms", m, c))
            value = min(readings, key=lambda x, t=text: abs(x - float(t)))
            exact[f"table 3, {m} at {c}"] = (text, value)
            joules = 1e3 * p.fact("power_w", m, c) / p.fact("energy_tok_per_s", m, c)
            exact[f"table 7, {m} at {c}"] = (p.printed(7, m, str(c)), joules)
    first, last = p.contexts[0], p.contexts[-1]
    for m in p.models:
        if "energy" in campaigns(p, m, first) & campaigns(p, m, last):
            change = percent(*(p.fact("energy_tok_per_s", m, c) for c in (last, first)))
            exact[f"table 4, {m}"] = (p.printed(4, m, "ΔTPOT (%)"), change)
    off = {at: (t, rounded(x, t)) for at, (t, x) in exact.items() if rounded(x, t) != t}
    if not off:
        return None
    printed = ", ".join(f"{t} ({at})" for at, (t, _) in off.items())
    follows = f"{', '.join(x for _, x in off.values())} by the released values"
    return Verdict("note", "tables 3, 4 and 7", printed, f"{follows}; {len(exact)} cells checked")


ARITHMETIC = (
    parameter_counts,
    percentages,
    quotients,
    ranges,
    headline_order,
    throughput_falls,
    within_bandwidth,
    last_digits,
)
