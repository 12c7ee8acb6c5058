"""What a study says about licences and policies, and what the publishers document.

The publishers' side is the `governance` block of params/models.yaml, looked up on a stated date.
Where the hub can be reached, `refreshed` compares that block with the hub's metadata of today.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.show import table as tables
from lib.show.table import Column, Table, Text
from lib.studies.study import Absent, Published, plain
from lib.studies.verdict import NOT, REPRODUCED, UNTESTABLE, Verdict

FIELDS = {
    "licence": "licence",
    "class": "class",
    "policy_link": "usage policy",
    "card_link": "model card",
    "safety_features": "documented safety features",
}
COLUMNS = ("model", "field", "paper", "publisher", "verdict", "source", "looked up")
TIMEOUT_S = 10
Fetch = Callable[[str], dict[str, Any]]


def number(study: Published) -> int:
    """Number of the table in the study."""
    return study.data["governance"]["number"]


def rows(study: Published) -> list[tuple[str, ...]]:
    """One line for each model and field, under COLUMNS."""
    spec = study.data["governance"]
    lines = []
    for model in study.models:
        printed = dict(zip(spec["columns"], spec["rows"][model], strict=True))
        stated = _stated(study, model)
        sources, date = " ".join(stated.get("source", ())), stated.get("date", "")
        for field, title in FIELDS.items():
            judged = str(verdict(field, printed[field], stated))
            text = _text(stated, field)
            lines.append((model, title, printed[field], text, judged, sources, date))
    return lines


def _stated(study: Published, model: str) -> dict[str, Any]:
    try:
        return study.entry(model)[1].get("governance") or {}
    except Absent:
        return {}


def _text(stated: dict[str, Any], field: str) -> str:
    if not stated:
        return "not looked up"
    value = stated.get(field)
    if isinstance(value, list):
        return "; ".join(value) or "none found"
    return str(value) if value else "none found"


def verdict(field: str, printed: str, stated: dict[str, Any]) -> Verdict:
    """Licence and class by their words, a link by whether there is one; free text is not judged."""
    if not stated:
        return Verdict(UNTESTABLE, "not looked up")
    if field == "safety_features":
        return Verdict(UNTESTABLE, "free text, to be read side by side")
    if field.endswith("_link"):
        same = (printed == "Yes") == bool(stated.get(field))
        return Verdict(REPRODUCED) if same else Verdict(NOT, _text(stated, field))
    same = plain(printed) == plain(str(stated.get(field)))
    return (
        Verdict(REPRODUCED) if same else Verdict(NOT, f"the publisher states {stated.get(field)}")
    )


def table(study: Published) -> Table:
    """The study's table beside what the publishers document."""
    columns = tuple(
        Column(name, numeric=False, css="links" if name == "source" else "") for name in COLUMNS
    )
    notes = [
        f"{model}: not verified: {stated['not_verified']}"
        for model in study.models
        if (stated := _stated(study, model)).get("not_verified")
    ]
    where = study.data["governance"]["where"].partition(", ")[0]
    title = (
        f"Table {number(study)}. Governance, as printed ({where}) and as the publishers document it"
    )
    lines = tuple(map(_cells, rows(study)))
    return Table(f"table-{number(study)}", title, columns, lines, tuple(notes), prose=True)


def _cells(row: tuple[str, ...]) -> tuple[Any, ...]:
    model, field, paper, publisher, ruling, sources, date = row
    stated = Text("link", url=publisher) if publisher.startswith("https://") else Text(publisher)
    links = tuple(Text(f"[{n}]", url=url) for n, url in enumerate(sources.split(), start=1))
    return (Text(model), Text(field), Text(paper), stated, Text(ruling), links, Text(date))


def write_csv(study: Published, out_dir: str | Path) -> Path:
    """Its CSV in tables/ below `out_dir`."""
    lines = (dict(zip(COLUMNS, row, strict=True)) for row in rows(study))
    return tables.write_csv(Path(out_dir) / "tables" / f"table-{number(study)}.csv", lines)


def hub_metadata(repo: str) -> dict[str, Any]:
    """Licence, gate, commit and last change of a repository, as the hub states them today."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, timeout=TIMEOUT_S)
    card = info.card_data.to_dict() if info.card_data else {}
    tags = [t.removeprefix("license:") for t in info.tags or () if t.startswith("license:")]
    return {
        "licence": card.get("license") or next(iter(tags), None),
        "gated": bool(info.gated),
        "revision": info.sha,
        "last_modified": info.last_modified.date().isoformat() if info.last_modified else None,
    }


def refreshed(study: Published, fetch: Fetch = hub_metadata) -> Table:
    """The hub's metadata of today against params/models.yaml, or why it cannot be had.

    A revision that differs from the pinned one is a newer commit, not an error.
    """
    titles = (
        "model",
        "licence here",
        "licence on the hub",
        "gated",
        "last change",
        "newer than the pinned commit",
        "difference",
    )
    lines = []
    for model in study.models:
        name, entry = study.entry(model)
        licence = (entry.get("governance") or {}).get("licence", entry.get("license"))
        try:
            hub = fetch(entry["hub"])
        except Exception as error:  # offline, gated, gone: each is the answer for this model
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            lines.append((name, licence, None, None, None, None, f"not refreshed: {reason}"))
            continue
        same = hub["licence"] and plain(hub["licence"]) == plain(str(licence))
        pinned = entry.get("revision")
        newer = "not pinned" if not pinned else "yes" if hub["revision"] != pinned else "no"
        lines.append(
            (
                name,
                licence,
                hub["licence"],
                "yes" if hub["gated"] else "no",
                hub["last_modified"],
                newer,
                "none" if same else "licence",
            )
        )
    columns = tuple(Column(title, numeric=False) for title in titles)
    return Table("hub", "The hub's metadata today", columns, tuple(lines))
