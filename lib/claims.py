"""Conclusions computed from rows: they can say "no difference resolved" or "not measured".

Every function returns Markdown, a list with one sentence a finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lib import ape, energystats, hostbound, ledger, params, stats
from lib.records import Record, environments, require_comparable, select
from lib.stats import Estimate
from lib.tables import decode_tok_per_s, short


def number(est: Estimate, unit: str) -> str:
    """A value with its interval and n, or that it was not measured and why."""
    if est.value is None:
        return f"not measured ({est.reason})"
    ends = f" [{short(est.low)}, {short(est.high)}]" if est.low is not None else ""
    return f"{short(est.value)} {unit}{ends}, n = {est.n}"


def ratio_sentence(name: str, reference: str, what: str, ratio: Estimate) -> str:
    """Higher, lower, or no difference resolved, chosen by the interval."""
    if ratio.value is None:
        return f"{what} of {name} against {reference}: not compared ({ratio.reason})."
    text = f"{what} of {name} is {short(ratio.value)} times that of {reference}"
    if ratio.resolved_from(1.0) is None:
        return f"{text}; without an interval ({ratio.reason}) nothing is concluded."
    ends = f"[{short(ratio.low)}, {short(ratio.high)}]"
    if not ratio.resolved_from(1.0):
        return f"{what} of {name} against {reference}: no difference resolved ({ends})."
    return f"{text} {ends}: {'higher' if ratio.value > 1 else 'lower'}."


def latency(rows: Sequence[Record]) -> str:
    """TTFT, throughput and its change with context, for each model; who waits; the A/A check."""
    lines = []
    for model, mine in by_model(rows, "latency").items():
        contexts = sorted({r.key["context"] for r in mine})
        tokens = min((r.key["new_tokens"] for r in mine if r.key["new_tokens"] > 1), default=None)
        if tokens is None:
            lines.append(f"{model}: only first tokens were timed, so no throughput is stated.")
            continue
        ends = (contexts[0], contexts[-1])
        first, last = (select(mine, context=c, new_tokens=tokens) for c in ends)
        for row in last:
            ttft = next(iter(select(mine, context=contexts[-1], new_tokens=1)), None)
            at = select(mine, context=contexts[-1])
            first_token = stats.median(ttft.samples["ttft_s"]) if ttft else stats.missing("no arm")
            output = stats.inverse(stats.median(row.samples["e2e_s"]), tokens)
            lines.append(
                f"{model} at {contexts[-1]} tokens of context and {tokens} new tokens: TTFT "
                f"{number(stats.scaled(first_token, 1e3), 'ms')}; output throughput "
                f"{number(output, 'tok/s')}; decode alone {number(decode_tok_per_s(at), 'tok/s')}."
            )
        if len(contexts) > 1 and first and last:
            ratio = stats.ratio(first[0].samples["e2e_s"], last[0].samples["e2e_s"])
            lines.append(ratio_sentence(f"{model} at {contexts[-1]}", f"{contexts[0]} tokens",
                                        "Output throughput", ratio))  # fmt: skip
    return bullets([*lines, *hostbound.sentences(rows), *_aa_checks(rows), *cautions(rows)])


def aa(rows: Sequence[Record]) -> str:
    """The A/A checks alone."""
    return bullets(_aa_checks(rows) or ["No arm was measured against itself."])


def _aa_checks(rows: Sequence[Record]) -> list[str]:
    return [_aa(row) for row in select(rows, "aa") if not row.error]


def _aa(row: Record) -> str:
    """Whether two halves of one arm look alike, as they must: in random order, and as measured."""
    times_s, where = row.samples["ttft_s"], f"{row.key['model']} at {row.key['context']} tokens"
    share = stats.aa_coverage(times_s)
    if share.value is None:
        return f"A/A check of {where}: not made ({share.reason})."
    held = "as it should be" if share.value >= stats.AA_LEAST else (
        "too few, so that intervals of ratios are too narrow for this noise")  # fmt: skip
    drift = stats.aa_in_order(times_s)
    ends = f"[{short(drift.low)}, {short(drift.high)}]"
    order = f"no difference resolved ({ends})" if not drift.resolved_from(1.0) else (
        f"{short(drift.value)} times as long {ends}, so that the arm changed while it was measured "
        "and small ratios between arms prove nothing")  # fmt: skip
    return (f"A/A check, TTFT of {where} against itself, n = {len(times_s)}: the interval of the "
            f"ratio contains 1 in {share.value:.0%} of {share.n} random halvings, {held}; second "
            f"half against first: {order}.")  # fmt: skip


def memory(rows: Sequence[Record]) -> str:
    """Peak above baseline and its largest part, at the longest context of each protocol."""
    lines = []
    names = {"kv": "KV cache", "logits": "held logits", "experts": "workspace of the experts",
             "activations": "workspace"}  # fmt: skip
    for kind, title in (("memory-paper", "the paper's protocol"), ("memory", "generate()")):
        for model, mine in by_experts(rows, kind).items():
            v = max(mine, key=lambda r: r.key["context"])
            above, parts = ledger.above_bytes(v), ledger.ledger(v).parts
            line = (f"{model} under {title} at {v.key['context']} tokens: peak "
                    f"{v.values['peak_bytes'] / 1e9:.3f} GB, {above / 1e6:,.1f} MB above the "
                    "baseline")  # fmt: skip
            if parts["kv"] is None:
                lines.append(f"{line}; its parts are not told apart.")
                continue
            part = max(names, key=lambda name: parts[name] or 0)
            lines.append(
                f"{line}; the largest part is the {names[part]} with {parts[part] / above:.0%}, "
                f"the KV cache is {parts['kv'] / above:.0%}."
            )
    return bullets([*lines, *ledger.sentences(rows), *cautions(rows)])


def by_experts(rows: Sequence[Record], kind: str) -> dict[str, list[Record]]:
    """Like `by_model`, but apart for each experts implementation where a model has several."""
    groups: dict[str, list[Record]] = {}
    for model, mine in by_model(rows, kind).items():
        several = len({r.key.get("experts") for r in mine}) > 1
        for row in mine:
            name = f"{model}, experts {row.key['experts']}," if several else model
            groups.setdefault(name, []).append(row)
    return groups


def energy(rows: Sequence[Record], pue: float = 1.0, g_per_kwh: float | None = None) -> str:
    """Joules per 1,000 tokens by the counter, what of it is idle, prefill and token, uncertainty,
    and how far the paper's estimator is from it; grams of CO2e where an intensity is given."""
    lines = []
    for model, mine in by_model(rows, "energy").items():
        row = max(mine, key=lambda r: r.key["context"])
        if "energy_j" not in row.samples:
            reason = row.missing.get("energy_j", "no reading")
            lines.append(f"{model}: energy not measured ({reason}).")
            continue
        scale = 1e3 / row.key["new_tokens"]
        per_1k = stats.scaled(stats.median(row.samples["energy_j"]), scale)
        paper = row.samples.get("paper_energy_j")
        idle = row.value("idle_w")
        share = idle * row.values["window_s"] / row.values["window_energy_j"] if idle else None
        lines.append(
            f"{model} at {row.key['context']} tokens: "
            f"{number(per_1k, 'J per 1,000 generated tokens')} (GPU board, gross)"
            + (f", of which {share:.0%} is what the idle board draws in that time" if share else "")
            + (f"; the paper's before/after estimator gives "
               f"{sum(paper) / sum(row.samples['energy_j']) - 1:+.1%}." if paper else ".")
        )  # fmt: skip
        lines += energy_details(model, row, [r for r in rows if r.key.get("model") == model])
        if told := energystats.carbon(1e3 * per_1k.value, pue, g_per_kwh):
            lines.append(f"{model}, one million tokens: {told.kwh:.3g} kWh x PUE {pue:g} x "
                         f"{g_per_kwh:g} g/kWh = {told.grams:.3g} gCO2e.")  # fmt: skip
    # What the instrument does not show stands in its own table.
    return bullets([*lines, *cautions(r for r in rows if r.kind != "instrument")])


def energy_details(model: str, row: Record, mine: Sequence[Record]) -> list[str]:
    """Prefill and token, and uncertainty, of a row that was measured in blocks."""
    lines, context = [], row.key["context"]
    arms = [r for r in mine if r.key.get("context") == context]
    if any(r.kind == "energy-slope" for r in arms):
        prefill, token = energystats.split(arms)
        said = f"prefill and first token {number(prefill, 'J')}; each further token "
        lines.append(f"{model} at {context} tokens: {said}{number(token, 'J')}.")
    if row.value("blocks"):
        found = energystats.uncertainty(row, energystats.weight_spread(mine))
        parts = {"95 % over blocks": found.statistical, "readouts": found.readouts,
                 "weight values": found.weights}  # fmt: skip
        said = [f"{name} ±{value:.1%}" for name, value in parts.items() if value is not None]
        gain = f"gain of the sensor, assumed and not measured, ±{found.gain:.0%}"
        lines.append(f"{model}, uncertainty: {', '.join([*said, gain])} (the gain cancels in "
                     "ratios on one card).")  # fmt: skip
        if bad := row.value("invalid_blocks"):
            lines.append(f"{model}: {len(bad)} of {row.values['blocks']} blocks are not believed, "
                         f"{bad[0]}.")  # fmt: skip
    return lines


def energy_checks(rows: Sequence[Record]) -> str:
    """What values of weights change, and how far a peer is on the same windows."""
    lines = []
    for value, ratio in energystats.weight_effects(rows).items():
        if value != "normal":
            lines.append(ratio_sentence(f"{value} weights", "normal ones", "Energy", ratio))
    if real := energystats.real_effect(rows):
        lines.append(ratio_sentence(f"real weights of {real[0]}", "random ones", "Energy", real[1]))
    for row in select(rows, "energy-peer"):
        for name, off in energystats.peer_differences(row).items():
            if off:
                seconds = stats.median(row.samples[f"{name}_s"]).value
                lines.append(f"Zeus on {len(off)} windows of {short(seconds)} s: median "
                             f"{stats.median(off).value:+.2%}, at most {max(off, key=abs):+.2%} "
                             "from this workbook.")  # fmt: skip
    return bullets([*lines, *cautions(rows)])


ABLATIONS = {"decoding": "decoding", "context": "context", "stack": "stack",
             "experts": "experts", "precision": "dtype"}  # fmt: skip


def ablations(rows: Sequence[Record]) -> str:
    """Each arm against the first of its ablation that worked: throughput ratio, or its error."""
    lines = []
    for name, field in ABLATIONS.items():
        arms = select(rows, f"ablation-{name}")
        worked = [r for r in arms if not r.error]
        for row in arms:
            title = f"{field} {row.key.get(field)}"
            if row.error:
                lines.append(f"{title} failed: {row.error}.")
            elif row is not worked[0]:
                ratio = stats.ratio(worked[0].samples["e2e_s"], row.samples["e2e_s"])
                reference = str(worked[0].key.get(field))
                lines.append(ratio_sentence(title, reference, "Output throughput", ratio))
        if len(worked) < 2:
            lines.append(f"{name}: {len(worked)} arm(s) ran, so nothing is compared.")
    return bullets([*lines, *cautions(rows)])


def efficiency(rows: Sequence[Record], context: int) -> str:
    """The four APE quotients of each model at one context."""
    active = {r.key["model"]: r.values["active_params"] for r in rows if r.kind == "card"}
    lines = []
    for model, count in active.items():
        arms = [r for r in select(rows, model=model, context=context) if r.kind in ape.KINDS]
        if not arms:
            known = sorted({r.key["context"] for r in rows if r.key.get("context")})
            lines.append(f"{model}: nothing measured at {context} tokens; measured: {known}.")
            continue
        quotients = ape.of_rows(arms, count)
        lines.append(
            f"{model} at {context} tokens, per billion of its {count / 1e9:.3g} billion active "
            f"parameters: {number(quotients.tok_per_s_per_b, 'tok/s')}; "
            f"{number(quotients.inverse_ttft_per_s_per_b, 'first tokens per second')}; "
            f"{number(quotients.tok_per_j_per_b, 'tokens per joule')}. Per GB of peak memory: "
            f"{number(quotients.tok_per_s_per_gb, 'tok/s')}."
        )
    return bullets([*lines, *cautions(rows)])


def models(rows: Sequence[Record]) -> str:
    """Every model against the first in throughput, TTFT and energy, at the longest common context.

    Models may differ in their weights' source only where all are labelled; GPU, dtype and stack
    must agree, otherwise the sentence says why nothing is compared.
    """
    lines = []
    for kind, sample, what, invert in (
        ("latency", "e2e_s", "Output throughput", True), ("latency", "ttft_s", "TTFT", False),
        ("energy", "energy_j", "Energy per token", False)):  # fmt: skip
        groups = by_model([r for r in rows if r.samples.get(sample)], kind)
        if len(groups) < 2:
            lines.append(f"{what}: fewer than two models measured, so none are compared.")
            continue
        shapes = [{(r.key["context"], -r.key["new_tokens"]) for r in g} for g in groups.values()]
        common = set.intersection(*shapes)
        if not common:
            lines.append(f"{what}: the models share no context and length.")
            continue
        context, tokens = max(common)  # the longest context, and there the fewest new tokens
        arms = [select(g, context=context, new_tokens=-tokens)[-1] for g in groups.values()]
        try:
            require_comparable(arms, environments(rows))
        except ValueError as error:
            lines.append(f"{what}: not compared; {error}.")
            continue
        for other in arms[1:]:
            a, b = arms[0].samples[sample], other.samples[sample]
            ratio = stats.ratio(b, a) if invert else stats.ratio(a, b)
            what_there = f"At {context} tokens, {_lower_first(what)}"
            name, reference = arms[0].key["model"], other.key["model"]
            lines.append(ratio_sentence(name, reference, what_there, ratio))
    return bullets([*lines, *cautions(rows)])


def cautions(rows: Iterable[Record]) -> list[str]:
    """Active warnings with counts, random weights, and what is missing with its reason."""
    rows = list(rows)
    lines = []
    texts = {w["code"]: w["text"] for r in rows for w in r.warnings}
    for code, count in Counter(w["code"] for r in rows for w in r.warnings).items():
        lines.append(f"Warning on {count} arm(s), {code}: for example, {texts[code]}.")
    if any(r.key.get("weights") == "random" for r in rows):
        lines.append("Random weights: valid for memory and dense latency; prefill of a mixture of "
                     "experts depends on its router.")  # fmt: skip
    missing = Counter(f"{name}: {why}" for r in rows for name, why in r.missing.items())
    lines += [f"Not measured on {count} arm(s), {text}." for text, count in missing.items()]
    return lines


def by_model(rows: Iterable[Record], kind: str) -> dict[str, list[Record]]:
    """Rows of a kind that did not fail, by model, in the order of params/models.yaml."""
    groups: dict[str, list[Record]] = {}
    for row in rows:
        if row.kind == kind and not row.error:
            groups.setdefault(row.key["model"], []).append(row)
    return dict(sorted(groups.items(), key=lambda group: params.model_order(group[0])))


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _lower_first(text: str) -> str:
    return text if text.isupper() else text[0].lower() + text[1:]
