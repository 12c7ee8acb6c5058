"""What rows of several decode stacks say: the gate, what preparing took, how flat decoding is."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lib import stats
from lib.claims import bullets, by_model, cautions, number
from lib.grid import Column, Table, build, frame, short
from lib.records import Record, select
from lib.stats import Estimate
from lib.tables import decode_tok_per_s

REFERENCE = "hf-eager"
SLACK = 0.05  # what decoding may lose beyond what its bytes explain before it is worth a remark
HARNESS = 0.005  # what the harness may add to a call
GATE = {"median_error": "median error", "floor_error": "reference against itself",
        "allowed_error": "allowed", "same_choice": "same choice"}  # fmt: skip


def gates(rows: Sequence[Record]) -> Table:
    """The correctness gate of every stack and context; shares of the logits' norm."""

    def cells(group: list[Record]) -> Sequence[Estimate]:
        row = group[-1]
        return [Estimate(row.values[name], n=1, method="one continuation", reason="no interval")
                for name in GATE]  # fmt: skip

    columns = [Column(title, "share") for title in GATE.values()]
    return build("gate", "Logits against generate()", rows, ("gate",), ("context", "batch"),
                 columns, cells)  # fmt: skip


def gate_table(rows: Sequence[Record]) -> pd.DataFrame:
    """`gates` as a DataFrame."""
    return frame(gates(rows))


def conclusion(rows: Sequence[Record]) -> str:
    """Decode throughput of each stack, its ratio to `generate()`, its cost and its flatness."""
    lines = []
    for model, mine in by_model(rows, "latency").items():
        stacks = list(dict.fromkeys(r.key["stack"] for r in mine))
        context = max(r.key["context"] for r in mine)
        base = decode_tok_per_s(select(mine, stack=REFERENCE, context=context))
        for stack in stacks:
            arms = select(mine, stack=stack)
            lines.append(f"{model} on {stack}: {_rate(arms, context, base, stack)}"
                         f"{_spread(arms)}{_prepared(arms)}.")  # fmt: skip
            lines.append(f"{model} on {stack}: {flatness(arms)}")
    lines += [harness(row) for row in select(rows, "harness") if row.samples]
    failed = [r for r in rows if r.kind == "latency" and r.error]
    lines += [f"{r.key['model']} on {r.key['stack']} at {r.key['context']} tokens: {r.error}."
              for r in failed]  # fmt: skip
    return bullets([*filter(None, lines), *cautions(rows)])


def _rate(arms: Sequence[Record], context: int, base: Estimate, stack: str) -> str:
    rate = decode_tok_per_s(select(arms, context=context))
    text = f"decode at {context:,} tokens of context {number(rate, 'tok/s')}"
    if stack == REFERENCE or rate.value is None or base.value is None:
        return text
    return f"{text}, {short(rate.value / base.value)} times {REFERENCE}"


def _spread(arms: Sequence[Record]) -> str:
    found = [stats.spread(r.samples["e2e_s"]) for r in arms if len(r.samples.get("e2e_s", ())) > 1]
    return f"; calls of one length spread by at most {max(found):.1%}" if found else ""


def _prepared(arms: Sequence[Record]) -> str:
    seconds = [r.values.get("prepare_s") or 0.0 for r in arms]
    if not any(seconds):
        return ""
    return f"; the first capture took {short(max(seconds))} s, later ones {short(min(seconds))} s"


def harness(row: Record) -> str:
    """What timing through the workbook adds to a bare loop around the same call."""
    ratio = stats.paired_ratio(row.samples["e2e_s"], row.samples["bare_s"])
    if ratio.value is None:
        return f"The harness was not compared with a bare loop ({ratio.reason})."
    ends = f" [{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}]" if ratio.low is not None else ""
    verdict = "within" if abs(ratio.value - 1) <= HARNESS else "more than"
    return (f"{row.key['model']} on {row.key['stack']}: a call takes {ratio.value - 1:+.2%}{ends} "
            f"against a bare loop in the same process, {verdict} {HARNESS:.1%}.")  # fmt: skip


def flatness(arms: Sequence[Record]) -> str:
    """How much decoding slows down with the context, beside what the bytes of a step explain."""
    contexts = sorted({r.key["context"] for r in arms})
    if len(contexts) < 2:
        return ""
    rates, sizes = [], []
    for context in (contexts[0], contexts[-1]):
        here = select(arms, context=context)
        rates.append(decode_tok_per_s(here).value)
        sizes.append(next((r.value("decode_bytes") for r in here if r.value("decode_bytes")), None))
    if None in (*rates, *sizes):
        return ""
    lost, explained = 1 - rates[1] / rates[0], 1 - sizes[0] / sizes[1]
    verdict = ("the bytes explain it" if lost <= explained + SLACK
               else "more than the bytes explain")  # fmt: skip
    return (f"from {contexts[0]:,} to {contexts[-1]:,} tokens of context decoding loses "
            f"{lost:.1%}, and what a step reads would cost {explained:.1%}: {verdict}.")
