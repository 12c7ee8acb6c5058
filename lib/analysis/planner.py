"""What the planner says: a sentence that answers, a line for each option, what of other cards has
no line, and the same as data for the page's script, which follows these rules."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lib import stats
from lib.analysis import fit
from lib.analysis.capacity import scored
from lib.analysis.choice import (
    FAILS,
    MAY,
    MEETS,
    TIMES_MS,
    UNKNOWN,
    VERDICTS,
    Ask,
    Offer,
    Option,
    limits,
    of_card,
    offers,
    people,
    place,
)
from lib.analysis.rows import NO_GPU
from lib.show.wording import short
from lib.stats import Estimate

FORMULA = "decoding only; price: USD an hour / 3600 / (tok/s of all users) x 10^6"
PREDICTED = (
    "Predicted: not measured; 90 % intervals of laws fitted to rows of H100s, random weights. "
    "Those of the H200 and the H100 were registered before measuring; other cards are the same "
    "laws, and the less a card is like an H100, the less its interval promises. hf-eager waits for "
    "a host that nobody knows."
)
ABSENT = {  # why there is no prediction of what is, or is not, predicted on another card
    True: "no cell was predicted for this card",
    False: "no law",
}


def basis(offer: Offer) -> str:
    """The cell that an offer stands on, with the interval of a prediction; empty without one."""
    if (cell := offer.cell) is None:
        return ""
    where = place(cell)
    if not offer.option.predicted:
        return f"measured at {where}"
    ends = f"{short(cell.per_user.low)} to {short(cell.per_user.high)}"
    told = f"predicted at {where}: {ends} tok/s each at {cell.per_user.level:.0%}"
    return ", ".join(filter(None, (told, cell.note)))


def lead(answers: Sequence[Offer], ask: Ask, choices: Sequence[Option] = ()) -> str:
    """The answer in a sentence or two: the first option, or that none is known and what to do, of
    all `choices` where they are given."""
    what = f"{people(ask.users)} of {ask.context:,} tokens"
    if not answers:
        return f"Nothing is known of {what} on {ask.gpu or 'this card'}."
    verdicts = [answer.verdict for answer in answers]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    first, of = answers[0], f"{len(answers)} option{'s' if len(answers) > 1 else ''}"
    if first.verdict in (MEETS, MAY):
        how = "serves most" if first.verdict == MEETS else "may serve"
        others = f"{counts[MEETS]} of {of} meet{'s' if counts[MEETS] == 1 else ''} the limits"
        return (
            f"{first.option.model} on {first.option.on} {how} for {what}: "
            f"{short(first.total)} tok/s{' together' if ask.users > 1 else ''}"
            f"{', predicted' if first.option.predicted else ''}. {others}."
        )
    known = of_card(choices, ask.gpu) or [answer.option for answer in answers]
    nearest, more = _nearest(known, ask), _wider(answers, ask)
    remedy = ", or ".join(filter(None, (" or ".join(nearest) or "other numbers", more)))
    timeless = replace(ask, ttft_ms=None, itl_ms=None)
    if not nearest and more and (looser := _nearest(known, timeless)):
        remedy = f"{' or '.join(looser)} with {more}"
    if counts[UNKNOWN] and not ask.gpu:
        remedy += "; or name a card (GPU), and what was not measured is predicted"
    return (
        f"None of {of} is known to serve {what}: {counts[FAILS]} fail, {counts[UNKNOWN]} lack a "
        f"{'prediction' if ask.gpu else 'measurement'}. Ask for {remedy}."
    )


def _nearest(known: Sequence[Option], ask: Ask) -> list[str]:
    """What to ask for instead, in words: shorter contexts, fewer users, more GPUs or memory, each
    only where an option then meets the rest of the ask, or may. None where one meets all of it."""

    def serves(**other: float) -> bool:
        return any(o.verdict in (MEETS, MAY) for o in offers(known, replace(ask, **other)))

    if serves():
        return []
    cells = [cell for option in known for cell in option.measured]
    contexts = sorted({c.context for c in cells if c.context < ask.context}, reverse=True)
    users = sorted({c.users for c in cells if c.users < ask.users}, reverse=True)
    places = [next(((ask.users, n) for n in contexts if serves(context=n)), None)]
    places += [next(((n, ask.context) for n in users if serves(users=n)), None)]
    if not any(places):
        both = ((n, m) for n in users for m in contexts if serves(users=n, context=m))
        places = [next(both, None)]
    near = [f"{people(one[0])} of {one[1]:,} tokens" for one in places if one]
    devices = sorted({o.devices for o in known if o.devices > ask.devices})
    near += [f"{n} GPUs (DEVICES)" for n in devices if serves(devices=n)][:1]
    if not ask.gpu and serves(gpu_gb=1e6):
        near.append("more memory (GPU_GB)")
    return near


def _wider(answers: Sequence[Offer], ask: Ask) -> str:
    """Limits that one option would meet: the one whose times are beyond those asked by least; empty
    where no limit was asked for."""
    asked = {what: ms for what, ms in limits(ask).items() if ms is not None}
    if not asked:
        return ""
    near: list[tuple[float, str]] = []
    for answer in answers:
        if answer.cell and not answer.held_back:
            times = {what: TIMES_MS[what](answer.cell).value for what in asked}
            if None not in times.values():
                beyond = max(times[what] / ms for what, ms in asked.items())
                told = " and ".join(f"{what} {short(ms)} ms" for what, ms in times.items())
                near.append((beyond, f"{answer.option.model} on {answer.option.on} has {told}"))
    nearest = min(near, default=None, key=lambda one: one[0])
    return f"wider limits: {nearest[1]}" if nearest else "wider limits"


def left_out(choices: Sequence[Option], gpu: str) -> str:
    """What is known of other cards and has no line in the answer for this one, and why, in a
    sentence; empty where nothing is left out."""
    here = {(o.model, o.engine) for o in choices if o.gpu == gpu}
    forms = {(o.model, o.of("dtype")) for o in choices if o.gpu == gpu}
    absent: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for option in choices if gpu else ():
        if option.cells and (option.model, option.engine) not in here:
            whole = (option.model, option.of("dtype")) not in forms
            engine = option.engine.replace(",", "")
            name = f"in {option.of('dtype')}" if whole else f"on {engine}"
            elsewhere = any(
                o.predicted and (o.model, o.engine) == (option.model, option.engine)
                for o in choices
            )
            absent[elsewhere].setdefault(f"{option.model} {name}")
    if gpu and any(o.predicted for o in choices) and "fp8" not in {form for _, form in forms}:
        absent[False]["any model in fp8"] = None
    parts = [f"{', '.join(absent[e])} ({why})" for e, why in ABSENT.items() if absent[e]]
    return f"Not predicted for {gpu}: {'; '.join(parts)}." if parts else ""


def text(answers: Sequence[Offer], ask: Ask, choices: Sequence[Option] = ()) -> str:
    """The answer to an ask for a terminal: its sentence, an option a line, what it holds for, and
    what of the `choices` has no line."""
    absent = _folded(left_out(choices, ask.gpu))
    if not answers:
        return "\n".join(filter(None, (lead(answers, ask, choices), absent)))
    width = max(map(len, VERDICTS)) + 2
    lines = [_folded(f"{answer.verdict:{width}}{_told(answer)}", " " * width) for answer in answers]
    gpus = sorted({answer.option.of("gpu").replace(NO_GPU, "a CPU") for answer in answers})
    notes = [absent] if absent else []
    notes.append(_folded(f"Speeds are of {' and '.join(gpus)}; {FORMULA}."))
    if any(answer.option.predicted for answer in answers):
        notes.append(_folded(f"{PREDICTED} Since then: {scored.sentence(scored.read()['cells'])}"))
    return "\n".join([_folded(lead(answers, ask, choices)), "", *lines, "", *notes])


def _folded(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_on_hyphens=False)


def _told(answer: Offer) -> str:
    cell, price = answer.cell, answer.usd_per_million
    facts = [answer.why]
    if answer.verdict != FAILS and answer.room is not None:
        facts.append(f"room for {people(answer.room)}")
    if cell:
        first = cell.ttft_s.value
        facts += [
            f"TTFT {short(first * 1e3)} ms" if first else "",
            f"{short(cell.per_user.value)} tok/s each, {short(answer.total)} together",
            "" if price is None else f"{price:.2f} USD for a million tokens",
            basis(answer),
        ]
    return f"{answer.option.model} on {answer.option.on}: {'; '.join(filter(None, facts))}"


def data(choices: Sequence[Option]) -> list[dict[str, Any]]:
    """The options for the planner of a page: what `offers` reads of them, as JSON data."""
    return [
        {
            "model": option.model,
            "engine": option.engine,
            "on": option.on,
            "apart": option.apart,
            "devices": option.devices,
            "gpu": option.gpu,
            "gb": option.gpu_bytes and round(option.gpu_bytes / 1e9, 1),
            "predicted": option.predicted,
            "fit": fit.line(option.card, option.devices, option.reserved)
            if option.card and option.card.kv_layers
            else None,
            "limit": option.card.context_limit if option.card else None,
            "cells": [
                {
                    "context": cell.context,
                    "users": cell.users,
                    **_ends("ttft_ms", stats.scaled(cell.ttft_s, 1e3), option.predicted),
                    **_ends("each", cell.per_user, option.predicted),
                    "fault": cell.fault,
                    "note": cell.note,
                }
                for cell in option.cells
            ],
        }
        for option in choices
    ]


def _ends(name: str, estimate: Estimate, predicted: bool) -> dict[str, Any]:
    """The value, and of a prediction the ends of its interval."""
    if not predicted or estimate.value is None:
        return {name: estimate.value}
    return {name: estimate.value, f"{name}_ends": [estimate.low, estimate.high]}
