"""What the data of arXiv:2605.30571 cannot say: the rules of its audit."""

from __future__ import annotations

from lib.hardware.datasheets import datasheet
from lib.studies.study import Finding, Published, agrees, each

STEP, USED = "p50 unprofiled (ms)", "bw_util unprofiled (%)"
ROUNDING = 0.02  # a share of two digits, and a bandwidth that is rounded too


def _bandwidth(p: Published, card: str) -> float:
    """Datasheet bandwidth of a card of the study (bytes/s)."""
    return datasheet(p.data["gpus"][card]["name"]).memory_bytes_per_s


def _floor_ms(p: Published, card: str) -> float:
    """All weights and the cache of the headline cell over the datasheet's bandwidth."""
    model, context = p.reference, p.data["context"]
    size = p.counted(model, "weight_bytes") + context * p.counted(model, "kv_bytes_per_token")
    return 1e3 * size / _bandwidth(p, card)


def floor_over_step(p: Published) -> Finding | None:
    """R_floor is (weight bytes + cache bytes) / datasheet bandwidth over the step time, so that
    table 1's share follows from the step of table 8 at the same context."""
    context, off = p.data["context"], {}
    for card in p.data["tables"][8]["rows"]:
        share = _floor_ms(p, card) / p.value(8, card, STEP)
        if abs(share / p.value(1, context, card) - 1) > ROUNDING:
            off[card] = share
    if not off:
        return None
    printed = ", ".join(
        f"{p.printed(1, context, c)} beside a step of {p.printed(8, c, STEP)} ms ({c})" for c in off
    )
    steps = {c: _floor_ms(p, c) / p.value(1, context, c) for c in off}
    follows = f"{each(off, '.3f')}; the printed share is that of {each(steps, '.2f', 'ms')}"
    follows += "; both tables were read second-hand"
    return Finding("caution", "tables 1 and 8", printed, follows, ("floor-share-h100",))


def one_model_reads_the_same_bytes(p: Published) -> Finding | None:
    """Bandwidth used x step time is the bytes of a step: the same of one model on every card."""
    cards = list(p.data["tables"][8]["rows"])
    gb = {
        c: p.value(8, c, USED) / 100 * _bandwidth(p, c) * p.value(8, c, STEP) / 1e12 for c in cards
    }
    if max(gb.values()) / min(gb.values()) - 1 <= ROUNDING:
        return None
    printed = ", ".join(
        f"{p.printed(8, c, USED)} % of a {p.printed(8, c, STEP)} ms step ({c})" for c in cards
    )
    follows = f"{each(gb, '.2f', 'GB')} a step: the shares are of different bytes"
    follows += "; the table was read second-hand"
    return Finding("caution", "table 8", printed, follows, ("floor-share-h100", "floor-share-l4"))


def shares_of_the_abstract(p: Published) -> Finding | None:
    """The shares of the abstract are those of table 1 at the headline context."""
    off = {}
    for name in ("floor-share-h100", "floor-share-l4"):
        share = 100 * p.value(1, p.data["context"], p.claim(name)["gpu"])
        if not agrees(p.claimed(name), share):
            off[name] = share
    if not off:
        return None
    printed = "; ".join(p.claim(name)["text"] for name in off)
    return Finding("error", "abstract; table 1", printed, each(off, ".1f", "%"), tuple(off))


def share_falls_with_bandwidth(p: Published) -> Finding | None:
    """At each context of table 1, a card of more bandwidth reaches a smaller share."""
    claim, off = "share-falls-with-bandwidth", {}
    cards = sorted(p.data["tables"][1]["columns"], key=lambda card: _bandwidth(p, card))
    columns = list(p.data["tables"][1]["columns"])
    for context, cells in p.data["tables"][1]["rows"].items():
        row = dict(zip(columns, cells, strict=True))
        shares = [row[card] for card in cards if row[card] is not None]
        if any(float(b) >= float(a) for a, b in zip(shares, shares[1:], strict=False)):
            off[f"at {context}"] = " to ".join(shares)
    if not off:
        return None
    return Finding("error", "table 1", p.claim(claim)["text"], each(off), (claim,))


def quantised_gain(p: Published) -> Finding | None:
    """The step in bfloat16 over that of each quantised path, against the 4 times less traffic."""
    steps = {n: float(p.claimed(n)) for n in ("l4-nf4", "l4-awq-marlin", "l4-gptq-exllama")}
    gains = {name: float(p.claimed("l4-bf16")) / ms for name, ms in steps.items()}
    claim = "quantised-short-of-4x"
    if max(gains.values()) < float(p.claimed(claim)):
        return None
    return Finding("error", "abstract", p.claim(claim)["text"], each(gains, ".2f"), (claim,))


def l4_step_twice(p: Published) -> Finding | None:
    """The bfloat16 step on the L4 stands in the abstract and in table 8; they are one cell."""
    printed = {"abstract": p.claimed("l4-bf16"), "table 8": p.printed(8, "L4", STEP)}
    share = 100 * (float(printed["table 8"]) / float(printed["abstract"]) - 1)
    if agrees(printed["abstract"], float(printed["table 8"])):
        return None
    follows = f"{share:+.1f} %: two runs, whose difference is what a session adds; the gain of "
    follows += f"graphs there is {p.claimed('graphs-gain-l4')}"
    claims = ("l4-bf16", "graphs-gain-l4")
    return Finding("note", "abstract; table 8", each(printed, unit="ms"), follows, claims)


def step_is_the_median(p: Published) -> Finding | None:
    """A cell is the median of 30 measured steps after 5, so that the printed step is the median of
    the released ones."""
    card = next(iter(p.data["tables"][8]["rows"]))
    exact = p.fact("step_ms", p.reference, card, p.data["context"])
    text = p.printed(8, card, STEP)
    if agrees(text, exact):
        return None
    return Finding("error", "table 8", f"{text} ms ({card})", f"{exact:.2f} ms in the file")


def interval_of_sessions(p: Published) -> Finding | None:
    """The gain of graphs and its interval follow from the gains of the released sessions."""
    claim = p.claim("graphs-gain-h100")
    gain = p.fact("graph_gain_median", p.reference, p.data["context"])
    if float(claim["low"]) <= gain <= float(claim["high"]):
        return None
    return Finding("error", "abstract", claim["text"], f"{gain:.3f}", ("graphs-gain-h100",))


AUDIT = {
    "arithmetic": (
        floor_over_step,
        one_model_reads_the_same_bytes,
        shares_of_the_abstract,
        share_falls_with_bandwidth,
        quantised_gain,
        l4_step_twice,
    ),
    "released files": (step_is_the_median, interval_of_sessions),
}
