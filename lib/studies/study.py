"""A published study as data: what it prints, what it claims, and facts of its released files.

Values are kept as the text that was printed, since its digits say how exact it is.
"""

from __future__ import annotations

import csv
import importlib
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from lib.files import ROOT, check, read_yaml, resolve
from lib.models.entries import Entry, checked_models
from lib.studies.schema import Claim, Fact, Source, StudyFile

PUBLISHED = ROOT / "params" / "published" / "arxiv-2508.16700.yaml"
BYTES = {"MB": 10**6, "MiB": 2**20, "GB": 10**9}
SEVERITIES = ("error", "caution", "note")


class Absent(LookupError):
    """The study does not hold this value; a rule that needs it cannot be checked."""


@dataclass(frozen=True)
class Finding:
    """What an audit's rule finds: what stands where, what follows instead, the claims it touches.

    error: a number or statement that the study's own data contradict. caution: the number stands,
    but means less than, or something other than, what the text says. note: for information.
    unchecked: the study lacks what the rule needs. `sources` are addresses of what was taken from
    elsewhere. The audit adds the rule's `id`, `topic` and text.
    """

    severity: str
    where: str
    printed: str
    follows: str
    claims: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    id: str = ""
    topic: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Published:
    """The study's data (params/published/*.yaml), and what params/models.yaml says today."""

    data: StudyFile
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Titles of the models, as the study calls them."""
        return list(self.data["models"])

    @property
    def reference(self) -> str:
        """The model that the study is about."""
        return self.data["ablation_model"]

    @property
    def others(self) -> list[str]:
        """The models that it is compared with."""
        return [name for name in self.models if name != self.reference]

    @property
    def rules(self) -> ModuleType | None:
        """What the data cannot say: the module of rules that the study's file names."""
        name = self.data.get("rules")
        return importlib.import_module(f"lib.studies.{name}.rules") if name else None

    @property
    def contexts(self) -> list[int]:
        """Prompt lengths that the study measures, in order."""
        return sorted(self.data["contexts_measured"])

    def _of(self, part: str, name: Any) -> Any:
        try:
            return self.data[part][name]
        except KeyError:
            raise Absent(f"{part} holds no {name}") from None

    def printed(self, table: int, row: str | int, column: str) -> str:
        """A cell of a table as printed."""
        spec = self._of("tables", table)
        try:
            text = spec["rows"][str(row)][list(spec["columns"]).index(column)]
        except (KeyError, ValueError):
            raise Absent(f"table {table} has no {column} of {row}") from None
        if text is None:
            raise Absent(f"table {table} is empty at {column} of {row}")
        return text

    def value(self, table: int, row: str | int, column: str) -> float:
        """A cell of a table as a number, in the unit as written."""
        return float(self.printed(table, row, column))

    def unit(self, table: int, column: str) -> str:
        """The unit by which a column's numbers were computed."""
        spec = self._of("tables", table)["columns"][column]
        return spec.get("meant", spec["unit"])

    def claim(self, name: str) -> Claim:
        """A claim of the text."""
        return self._of("claims", name)

    def claimed(self, name: str) -> str:
        """The number of a claim as printed."""
        return str(self.claim(name)["value"])

    def about(self, stem: str) -> dict[str, str]:
        """Names of the claims `stem`-..., each by the model it is about."""
        names = {
            c["model"]: name
            for name, c in self.data.get("claims", {}).items()
            if name.startswith(f"{stem}-") and "model" in c
        }
        if not names:
            raise Absent(f"claims hold no {stem} of a model")
        return names

    def fact(self, *name: Any) -> Any:
        """A fact of the released files; the parts of its name, joined by a slash."""
        return self._of("released", "/".join(map(str, name)))["value"]

    def counted(self, model: str, what: str) -> int:
        """What the model card counts for an architecture."""
        return self._of("counted", model)[what]

    def source(self, name: str) -> Source:
        """Something the audit takes from elsewhere: text, url and date."""
        return self._of("sources", name)

    def entry(self, model: str) -> tuple[str, Entry]:
        """Name and entry of a model in params/models.yaml."""
        names = {name.lower() for name in self.data["models"][model]}
        for name, entry in self.entries.items():
            if name.lower() in names or str(entry.get("hub")).lower() in names:
                return name, entry
        raise Absent(f"params/models.yaml has no entry of {model}")


def load(path: str | Path = PUBLISHED) -> Published:
    """The study in a YAML file; a relative path counts from the repository's root."""
    return Published(load_published(resolve(path)), checked_models())


def step(text: str) -> float:
    """One unit of the last printed digit."""
    return float(Decimal(1).scaleb(Decimal(text).as_tuple().exponent))


def agrees(text: str, exact: float) -> bool:
    """Whether the printed text is the number to within one unit of its last digit.

    One unit, not half of one: truncated digits and rounded inputs are no finding.
    """
    return abs(float(text) - exact) <= step(text) * (1 + 1e-9)


def rounded(exact: float, like: str) -> str:
    """The number with as many decimals as the printed text has."""
    return f"{exact:.{max(-Decimal(like).as_tuple().exponent, 0)}f}"


def plain(text: str) -> str:
    """Letters and digits only, in lower case: "Apache 2.0" and "apache-2.0" are one licence."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def percent(after: float, before: float) -> float:
    """A change in percent of `before`."""
    return 100 * (after / before - 1)


def each(values: dict[str, Any], form: str = "", unit: str = "") -> str:
    """Values with what they belong to: "1.5 W (one), 2.5 W (other)"."""
    unit = f" {unit}" if unit else ""
    return ", ".join(f"{value:{form}}{unit} ({name})" for name, value in values.items())


def differences(data: StudyFile, folder: str | Path) -> list[str]:
    """Where the facts under `released` differ from the CSV files below a folder."""
    folder, tables, lines = Path(folder), {}, []
    for name, fact in data["released"].items():
        file = fact["file"]
        if file not in tables:
            tables[file] = _rows(folder, file)
        if tables[file] is None:
            lines.append(f"{name}: no {file} below {folder}")
            continue
        try:
            here, there = _value_here(fact), _value_there(fact, tables[file])
        except (LookupError, ValueError) as error:
            lines.append(f"{name}: {error.args[0]}")
            continue
        if here != there:
            lines.append(f"{name}: {here} here, {there} in {file}, column {fact['column']}")
    return lines


def _rows(folder: Path, file: str) -> list[dict[str, str]] | None:
    path = next(iter(sorted(folder.rglob(file))), None)
    if path is None:
        return None
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _value_here(fact: Fact) -> Any:
    return f"{fact['value']} of {fact['of']}" if "same_as" in fact else fact["value"]


def _value_there(fact: Fact, rows: list[dict[str, str]]) -> Any:
    column, where = fact["column"], fact.get("where", {})
    for name in (column, fact.get("same_as", column), *where):
        if rows and name not in rows[0]:
            raise LookupError(f"{fact['file']} has no column {name}")
    matches = [row for row in rows if all(row[k] == str(v) for k, v in where.items())]
    if "same_as" in fact:
        return f"{sum(r[column] == r[fact['same_as']] for r in matches)} of {len(matches)}"
    if len(matches) != 1:
        raise LookupError(f"{len(matches)} rows of {fact['file']} where {where}, needs one")
    text = matches[0][column]
    return text if isinstance(fact["value"], str) else float(text)


def load_published(path: str | Path = PUBLISHED) -> StudyFile:
    """The paper's tables as printed, with units as written and as meant."""
    data = read_yaml(path)
    check(data, StudyFile, Path(path).name)
    return data


def paper_name(model: str | None, published: StudyFile) -> str | None:
    """The paper's title of a model, or None where the paper does not have it."""
    for title, names in published["models"].items():
        if str(model).lower() in {name.lower() for name in names}:
            return title
    return None
