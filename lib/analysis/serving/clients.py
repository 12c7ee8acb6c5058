"""The truth table of clients: what each load generator says, beside what a server wrote.

`make clients` writes it; without one of this checkout the released one is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib import files
from lib.show.table import Column, Table, Text, or_why

PLACES = ("outputs/clients/truth-table.json", "outputs/released/clients/truth-table.json")
WORDS = {True: "yes", False: "no", None: "–"}
# Checks of the table, as its columns call them.
CHECKS = {
    "requests": "all requests",
    "failures": "failures",
    "ttft_s": "TTFT",
    "visible_s": "first visible text",
    "itl_s": "mean ITL",
    "output_tokens": "output tokens",
    "cached_tokens": "cached tokens",
    "no_token": "empty answers",
    "arrivals": "arrivals",
    "schedule": "schedule",
}


def load(path: str | Path | None = None) -> dict[str, Any] | None:
    """The table as it was written, by default the newest that is here; None where there is none."""
    paths = [files.resolve(place) for place in ([path] if path else PLACES)]
    here = next((place for place in paths if place.exists()), None)
    return json.loads(here.read_text(encoding="utf-8")) if here else None


def table(data: Mapping[str, Any] | None = None) -> Table:
    """A line for each client: what it passes in every scenario, and where it is off.

    "yes" passes wherever it was judged, "no" is off somewhere, a dash was not told or not judged.
    """
    data = data or load()
    columns = [Column(title, numeric=False) for title in ("client", *CHECKS.values(), "is off in")]
    if data is None:
        empty = Table("clients", "Clients", tuple(columns), ())
        return or_why(empty, "no client was scored; run make clients")
    rows = tuple(_line(client) for client in data["clients"])
    limits, machine = data["limits"], data["machine"]
    notes = (
        f"scored {data['date']} on {machine['processors']} processors ({machine['cpu']}), Python "
        f"{data['python']}, against a server that stamps what it writes; arrivals "
        f"{data['arrivals']}, {data['lengths']['prompt_tokens']} prompt and "
        f"{data['lengths']['output_tokens']} output tokens, {len(data['scenarios'])} scenarios",
        f"off: a median error of TTFT above {1e3 * limits['ttft_s']:g} ms, of the mean ITL above "
        f"{limits['itl']:.0%}, any wrong count, arrivals that are not of the asked law (p < 0.001)",
    )
    return Table("clients", "Clients, and whether they tell the truth", tuple(columns), rows, notes)


def _line(client: Mapping[str, Any]) -> tuple[Any, ...]:
    checks = [
        (title, check)
        for title, scenario in client["scenarios"].items()
        for check in scenario["checks"]
    ]
    passes = (_all(check["ok"] for _, check in checks if check["name"] == name) for name in CHECKS)
    name = " ".join(filter(None, (client["title"], client["version"])))
    return (name, *(WORDS[ok] for ok in passes), Text(*_faults(client, checks)))


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    values = [ok for ok in verdicts if ok is not None]
    return all(values) if values else None


def _faults(client: Mapping[str, Any], checks: Iterable[tuple[str, Mapping]]) -> tuple[str, str]:
    """Where a client is off, and what the first fault of each check is."""
    errors = [
        f"{title}: {scenario['error']}"
        for title, scenario in client["scenarios"].items()
        if scenario.get("error")
    ]
    faults = [(title, check) for title, check in checks if check["ok"] is False]
    by_name: dict[str, list[str]] = {}
    for title, check in faults:
        by_name.setdefault(CHECKS[check["name"]], []).append(f"{title}: {check['text']}")
    full = [
        f"{name}, {texts[0]}" + (f" (and {len(texts) - 1} more)" if len(texts) > 1 else "")
        for name, texts in by_name.items()
    ]
    places = dict.fromkeys(title for title, _ in faults)
    return "; ".join([*errors, *places]) or "nothing", "; ".join(full)
