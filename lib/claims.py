"""Conclusions computed from rows: they can say "no difference resolved" or "not measured".

Every function returns Markdown, a list with one sentence a finding.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib import ape, energypasses, energystats, hostbound, ledger, stats
from lib.groups import Group, by_setup, setup_of
from lib.records.kinds import model_order
from lib.records.record import Record, environments, select
from lib.show import wording
from lib.show.wording import _named, short
from lib.tables import decode_tok_per_s


def latency(rows: Sequence[Record]) -> str:
    """TTFT, throughput and its change with context, for each model; who waits; the A/A check."""
    lines = []
    for group in by_setup(rows, "latency"):
        name, whole = group.label, [r for r in group.rows if r.samples.get("e2e_s")]
        tokens = min((r.key["new_tokens"] for r in whole), default=None)
        if tokens is None:
            lines.append(f"{name}: only first tokens were timed, so no throughput is stated.")
            continue
        headline = {r.key["context"]: r for r in select(whole, new_tokens=tokens)}
        first, last = min(headline), max(headline)
        output = stats.inverse(stats.median(headline[last].samples["e2e_s"]), tokens)
        at = select(group.rows, context=last)
        ones = [r.samples["ttft_s"] for r in select(at, new_tokens=1) if r.samples.get("ttft_s")]
        first_token = stats.median(ones[0]) if ones else stats.missing("no arm")
        decode = wording.number(decode_tok_per_s(at), "tok/s")
        lines.append(
            f"{name} at {last} tokens of context and {tokens} new tokens: TTFT "
            f"{wording.number(stats.scaled(first_token, 1e3), 'ms')}; output throughput "
            f"{wording.number(output, 'tok/s')}; decode alone {decode}."
        )
        if first != last:
            ratio = stats.ratio(*(headline[c].samples["e2e_s"] for c in (first, last)))
            lines.append(
                wording.ratio_sentence(
                    f"{name} at {last}", f"{first} tokens", "Output throughput", ratio
                )
            )
    return wording.bullets(
        [*lines, *hostbound.sentences(rows), *_aa_checks(rows), *wording.cautions(rows)]
    )


def aa(rows: Sequence[Record]) -> str:
    """The A/A checks alone."""
    return wording.bullets(_aa_checks(rows) or ["No arm was measured against itself."])


def _aa_checks(rows: Sequence[Record]) -> list[str]:
    return [_aa(group, row) for group in by_setup(rows, "aa") for row in group.rows]


def _aa(group: Group, row: Record) -> str:
    """Whether two halves of one arm look alike, as they must: in random order, and as measured."""
    times_s, where = row.samples["ttft_s"], f"{group.label} at {row.key['context']} tokens"
    share = stats.aa_coverage(times_s)
    if share.value is None:
        return f"A/A check of {where}: not made ({share.reason})."
    held = (
        "as it should be"
        if share.value >= stats.AA_LEAST
        else ("too few, so that intervals of ratios are too narrow for this noise")
    )
    drift = stats.aa_in_order(times_s)
    ends = f"[{short(drift.low)}, {short(drift.high)}]"
    order = (
        f"no difference resolved ({ends})"
        if not drift.resolved_from(1.0)
        else (
            f"{short(drift.value)} times as long {ends}, so that the arm changed while it was "
            "measured and small ratios between arms prove nothing"
        )
    )
    return (
        f"A/A check, TTFT of {where} against itself, n = {len(times_s)}: the interval of the "
        f"ratio contains 1 in {share.value:.0%} of {share.n} random halvings, {held}; second "
        f"half against first: {order}."
    )


def memory(rows: Sequence[Record]) -> str:
    """Peak above baseline and its largest part, at the longest context of each protocol."""
    lines = []
    names = {
        "kv": "KV cache",
        "logits": "held logits",
        "experts": "workspace of the experts",
        "activations": "workspace",
    }
    for kind, title in (("memory-paper", "the paper's protocol"), ("memory", "generate()")):
        for group in by_setup(rows, kind):
            v = max(group.rows, key=lambda r: r.key["context"])
            above, parts = ledger.above_bytes(v), ledger.ledger(v).parts
            line = f"{group.label} under {title} at {v.key['context']} tokens: peak "
            if above is None:
                reason = v.missing.get("peak_bytes", "no reading")
                lines.append(f"{line}not measured ({reason}).")
                continue
            line += (
                f"{v.values['peak_bytes'] / 1e9:.3f} GB, {above / 1e6:,.1f} MB above the baseline"
            )
            if parts["kv"] is None:
                lines.append(f"{line}; its parts are not told apart.")
                continue
            part = max(names, key=lambda name: parts[name] or 0)
            lines.append(
                f"{line}; the largest part is the {names[part]} with {parts[part] / above:.0%}, "
                f"the KV cache is {parts['kv'] / above:.0%}."
            )
    return wording.bullets([*lines, *ledger.sentences(rows), *wording.cautions(rows)])


def energy(rows: Sequence[Record], pue: float = 1.0, g_per_kwh: float | None = None) -> str:
    """Joules per 1,000 tokens by the counter, what of it is idle, prefill and token, uncertainty,
    and how far the paper's estimator is from it; grams of CO2e where an intensity is given."""
    lines = []
    for group in by_setup(rows, "energy"):
        model, row = group.label, max(group.rows, key=lambda r: r.key["context"])
        if not row.samples.get("energy_j"):
            reason = row.missing.get("energy_j", "no reading")
            lines.append(f"{model}: energy not measured ({reason}).")
            continue
        scale = 1e3 / row.key["new_tokens"]
        per_1k = stats.scaled(stats.median(row.samples["energy_j"]), scale)
        against = stats.ratio(row.samples.get("paper_energy_j") or (), row.samples["energy_j"])
        idle = row.value("idle_w")
        share = idle * row.values["window_s"] / row.values["window_energy_j"] if idle else None
        lines.append(
            f"{model} at {row.key['context']} tokens: "
            f"{wording.number(per_1k, 'J per 1,000 generated tokens')} (GPU board, gross)"
            + (f", of which {share:.0%} is what the idle board draws in that time" if share else "")
            + (
                f"; the paper's before/after estimator gives {stats.change(against)}."
                if against.value is not None
                else "."
            )
        )
        lines += energy_details(group, row, rows)
        if told := energystats.carbon(1e3 * per_1k.value, pue, g_per_kwh):
            lines.append(
                f"{model}, one million tokens: {told.kwh:.3g} kWh x PUE {pue:g} x "
                f"{g_per_kwh:g} g/kWh = {told.grams:.3g} gCO2e."
            )
    # What the instrument does not show stands in its own table.
    return wording.bullets([*lines, *wording.cautions(r for r in rows if r.kind != "instrument")])


def energy_details(group: Group, row: Record, rows: Sequence[Record]) -> list[str]:
    """Prefill and token, uncertainty, and the blocks of a row that are not believed."""
    lines, model, context = [], group.label, row.key["context"]
    lengths = next(
        (
            g.rows
            for g in by_setup(rows, energystats.LENGTHS)
            if (g.model, g.setup) == (group.model, group.setup)
        ),
        (),
    )
    arms = select(lengths, context=context)
    if any(r.kind == "energy-slope" for r in arms):
        prefill, token = energystats.split(arms)
        said = f"prefill and first token {wording.number(prefill, 'J')}; each further token "
        lines.append(f"{model} at {context} tokens: {said}{wording.number(token, 'J')}.")
    found = energystats.uncertainty(row, energystats.spread_beside(rows, group))
    parts = {
        "95 % over blocks": found.statistical,
        "readouts": found.readouts,
        "weight values": found.weights,
    }
    said = [f"{name} ±{value:.1%}" for name, value in parts.items() if value is not None]
    gain = f"gain of the sensor, assumed and not measured, ±{found.gain:.0%}"
    lines.append(
        f"{model}, uncertainty: {', '.join([*said, gain])} (the gain cancels in "
        "ratios on one card)."
    )
    if bad := row.value("invalid_blocks"):
        lines.append(
            f"{model}: {len(bad)} of {row.values['blocks']} blocks are not believed, {bad[0]}."
        )
    return lines


def energy_again(rows: Sequence[Record]) -> str:
    """What the second pass found of each cell, and over the first where that is among the rows."""
    lines = []
    for group in by_setup(rows, energypasses.PASSES):
        for row in select(group.rows, energypasses.AGAIN):
            cell = {name: row.key[name] for name in ("context", "new_tokens")}
            _, second, over = energypasses.compared(select(group.rows, **cell))
            spread = energystats.variation(row)
            lines.append(
                f"{group.label} at {row.key['context']} tokens, second pass: "
                f"{wording.number(second, 'J per 1,000 generated tokens')}"
                + (f", blocks spread by {spread:.2%}" if spread is not None else "")
                + (
                    f"; over the first pass {wording.number(over, '×')}"
                    if over.value is not None
                    else ""
                )
                + "."
            )
    return wording.bullets([*lines, *wording.cautions(rows)])


def energy_checks(rows: Sequence[Record]) -> str:
    """What values of weights change, and how far a peer is on the same windows."""
    lines = []
    for group in by_setup(rows, energystats.WEIGHTS, without=("weights",)):
        name = group.label
        for value, ratio in energystats.weight_effects(group.rows).items():
            if value != "normal":
                lines.append(
                    wording.ratio_sentence(
                        f"{name} with {value} weights", "normal ones", "Energy", ratio
                    )
                )
        if (real := energystats.real_effect(group.rows)) is not None:
            lines.append(
                wording.ratio_sentence(f"{name} with real weights", "random ones", "Energy", real)
            )
    peers = by_setup(rows, "energy-peer")
    for label, row in ((peer.label, row) for peer in peers for row in peer.rows):
        of = f" of {label}" if len(peers) > 1 else ""
        for name, off in energystats.peer_differences(row).items():
            if off:
                seconds = stats.median(row.samples[f"{name}_s"]).value
                lines.append(
                    f"Zeus on {len(off)} windows{of} of {short(seconds)} s: median "
                    f"{stats.median(off).value:+.2%}, at most {max(off, key=abs):+.2%} "
                    "from this workbook."
                )
    return wording.bullets([*lines, *wording.cautions(rows)])


ABLATIONS = {
    "decoding": "decoding",
    "context": "context",
    "stack": "stack",
    "experts": "experts",
    "precision": "dtype",
}


def ablations(rows: Sequence[Record]) -> str:
    """Each arm against the first of its ablation that worked: throughput ratio, or its error."""
    lines = []
    for name, field in ABLATIONS.items():
        groups = by_setup(rows, f"ablation-{name}", without=(field,), failed=True)
        for group in groups:
            of = f" of {group.label}" if len(groups) > 1 else ""
            worked = [r for r in group.rows if not r.error]
            for row in group.rows:
                title = f"{field} {row.key.get(field)}{of}"
                if row.error:
                    lines.append(f"{title} failed: {row.error}.")
                elif row is not worked[0]:
                    ratio = stats.ratio(worked[0].samples["e2e_s"], row.samples["e2e_s"])
                    reference = str(worked[0].key.get(field))
                    lines.append(
                        wording.ratio_sentence(title, reference, "Output throughput", ratio)
                    )
            if len(worked) < 2:
                lines.append(f"{name}{of}: {len(worked)} arm(s) ran, so nothing is compared.")
        if not groups:
            lines.append(f"{name}: 0 arm(s) ran, so nothing is compared.")
    return wording.bullets([*lines, *wording.cautions(rows)])


def efficiency(rows: Sequence[Record], context: int) -> str:
    """The four APE quotients of each model, on each of its stacks, at one context."""
    active, lines = ape.nominal(rows), []
    at = [r for r in rows if r.kind == "environment" or r.key.get("context") == context]
    timed = {(g.model, g.setup) for g in by_setup(at, ape.TIMED)}
    envs = environments(rows)
    groups = by_setup(
        [r for r in at if r.kind not in ape.KINDS or (r.key["model"], setup_of(r, envs)) in timed],
        ape.KINDS,
    )
    for group in (g for g in groups if g.model in active):
        count = active[group.model]
        quotients = ape.of_rows(group.rows, count)
        lines.append(
            f"{group.label} at {context} tokens, per billion of its {count / 1e9:.3g} billion "
            f"active parameters: {wording.number(quotients.tok_per_s_per_b, 'tok/s')}; "
            f"{_named(quotients.inverse_ttft_per_s_per_b, 'first tokens per second')}; "
            f"{_named(quotients.tok_per_j_per_b, 'tokens per joule')}. Per GB of peak memory: "
            f"{wording.number(quotients.tok_per_s_per_gb, 'tok/s')}."
        )
    for model in sorted(active.keys() - {g.model for g in groups}, key=model_order):
        known = sorted(
            {
                r.key["context"]
                for r in rows
                if r.key.get("context") and r.key.get("model") == model and not r.error
            }
        )
        lines.append(f"{model}: nothing measured at {context} tokens; measured: {known}.")
    return wording.bullets([*lines, *wording.cautions(rows)])


def failures(rows: Sequence[Record], kinds: str | Sequence[str]) -> list[str]:
    """What failed, by model, setup and context; once where several rows share the reason."""
    lines = []
    for group in by_setup(rows, kinds, failed=True):
        for row in (r for r in group.rows if r.error):
            lines.append(f"{group.label} at {row.key.get('context')} tokens: {row.error}.")
    return list(dict.fromkeys(lines))
