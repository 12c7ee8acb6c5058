"""Why a verdict may be what it is: sentences computed from the rows and from the audit."""

from __future__ import annotations

from collections.abc import Mapping

from lib.records.record import select
from lib.studies import audit, verdict
from lib.studies.evidence import Evidence, Measured, calls_s, decode_share, machines
from lib.studies.study import Published, each
from lib.studies.verdict import Verdict

HALF = 0.5  # below this share of its bound, something other than the memory sets the pace


def touched(study: Published) -> dict[str, list[str]]:
    """For each claim, what the audit of the study's own data says: "rule (severity)"."""
    rules: dict[str, list[str]] = {}
    for finding in audit.findings(study):
        for claim in finding.claims:
            rules.setdefault(claim, []).append(f"{finding.id} ({finding.severity})")
    return rules


def conditions(e: Evidence, measured: Measured, models: list[str]) -> dict[str, str]:
    """How card, host, software and weights differ from the study's, by what differs.

    Empty where nothing was run, or where what was counted depends on none of them.
    """
    both = (*measured.protocol.values(), *measured.today.values())
    if all(x.value is None for x in both) or measured.quantity in ("count", "whole"):
        return {}
    rows = [r for m in models for r in e.base[m].rows if r.kind != "card" and not r.error]
    envs = [e.envs.get(r.env_id or "", {}) for r in rows]
    differences = {}
    cards = _listed({str(env.get("gpu") or "a CPU") for env in envs})
    if cards != e.published.data["gpu"]:
        differences["card"] = f"{cards} (paper: {e.published.data['gpu']})"
    if measured.quantity != "memory":
        hosts = _listed({str(env["cpu"]) for env in envs if env.get("cpu")})
        differences["host"] = f"{hosts or 'not recorded'} (paper: not stated)"
    versions = {str((env.get("packages") or {}).get("transformers")) for env in envs} - {"None"}
    if versions:
        theirs = e.published.data.get("protocol", {}).get("software", "not stated")
        differences["software"] = f"transformers {_listed(versions)} (paper: {theirs})"
    weights = _listed({str(r.key.get("weights")) for r in rows})
    if weights != "checkpoint":
        note = ", valid for memory" if measured.quantity == "memory" else ""
        note = ", which route unlike trained ones" if not measured.decodes else note
        differences["weights"] = f"{weights}{note} (paper: checkpoint)"
    return differences


def sentences(
    e: Evidence,
    measured: Measured,
    models: list[str],
    verdicts: Mapping[str, Verdict],
    audited: list[str],
) -> list[str]:
    """What is known to move the measured value away from the printed one.

    `verdicts` are the verdicts by column (verdict, today, corrected, bound).
    """
    lines = []
    own = [x.method for x in measured.protocol.values() if x.value is not None]
    methods = own + [x.method for x in measured.today.values() if x.value is not None]
    if methods and all(method == verdict.FILES for method in methods):
        lines.append("read in the paper's released files; nothing was run")
    elif methods and measured.quantity in ("count", "whole"):
        lines.append("counted; card, host and weights do not matter")
    if methods and measured.quantity in ("time", "effect") and measured.decodes:
        lines += _host(e, models)
        if not measured.alone:
            ran = e.like_paper if own else e.base
            lines += filter(None, [machines(e, [(ran, m) for m in models], kind=measured.kind)])
    if any(x.value is not None for x in measured.today.values()):
        dated = e.published.source("all-experts")["dated"]
        lines.append(
            f"the paper's software computed every expert ({dated}); with {_experts(e)}, as the "
            f"library of today runs them: {verdicts['today'].word}"
        )
    main = verdicts["verdict"].word
    for column, what in (
        ("corrected", "by the corrected definition"),
        ("bound", f"on {e.bound_stack}, which the device bounds"),
    ):
        word = verdicts[column].word
        if word not in (main, verdict.UNTESTABLE):
            lines.append(f"{what}: {word}")
    if audited:
        lines.append(f"the paper's own data: {', '.join(audited)}")
    return lines


def _host(e: Evidence, models: list[str]) -> list[str]:
    shares = {m: s for m in models if (s := decode_share(e, e.base, m)) is not None}
    if not shares or max(shares.values()) >= HALF:
        return []
    busy = {m: s for m in models if (s := busy_share(e, m)) is not None}
    text = f"host-bound: decoding at {each(shares, '.0%')} of what its bytes allow a copy"
    return [text + (f", and the GPU works {each(busy, '.0%')} of a step" if busy else "")]


def busy_share(e: Evidence, model: str) -> float | None:
    """Time for which a profiled decode step kept the GPU busy, over the measured step."""
    row = next(
        (
            r
            for r in reversed(select(e.base[model].rows, "busy", context=e.arm[0]))
            if r.value("decode_busy_s")
        ),
        None,
    )
    medians = calls_s(e, e.base, model)
    if row is None or medians is None:
        return None
    return row.value("decode_busy_s") / ((medians[1] - medians[0]) / (e.arm[1] - 1))


def _experts(e: Evidence) -> str:
    rows = (r for r in e.base[e.reference].rows if r.key.get("experts") and r.kind != "card")
    return next((r.key["experts"] for r in rows), "the chosen experts")


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names))
