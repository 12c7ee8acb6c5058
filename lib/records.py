"""Rows and their files: one JSON object per arm and line, raw samples kept.

A record says what was measured (`key`), the raw repetitions (`samples`, SI units, the unit in the
name), single readings (`values`), why something is absent (`missing`), how the arm failed
(`error`) and what a reader should beware of (`warnings`). Statistics are derived when read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
KEY_FIELDS = (
    "model", "weights", "dtype", "stack", "experts", "attention", "cache",
    "batch", "context", "new_tokens", "decoding",
)  # fmt: skip
# Rows that differ in one of these answer different questions; a ratio would mix causes.
COMPARABLE = ("gpu", "dtype", "stack", "weights")


@dataclass(frozen=True)
class Record:
    """One arm of one measurement. `env_id` names the `environment` record of the same file."""

    kind: str
    key: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    warnings: tuple[dict[str, str], ...] = ()
    env_id: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if unknown := self.key.keys() - set(KEY_FIELDS):
            raise ValueError(f"unknown key fields {sorted(unknown)}; known: {list(KEY_FIELDS)}")

    def value(self, name: str) -> Any:
        """A single reading, or None where it is missing (the reason is in `missing`)."""
        return self.values.get(name)


def warning(code: str, text: str) -> dict[str, str]:
    """A warning as a value: a stable code, and a sentence that says what to do."""
    return {"code": code, "text": text}


def first_line(error: BaseException) -> str:
    """The error's class and the first line of its message: what a failed arm's row says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def environment_record(environment: dict[str, Any]) -> Record:
    """The environment as a record; its id is the hash of its content."""
    text = json.dumps(environment, sort_keys=True, allow_nan=False)
    env_id = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Record(kind="environment", values=environment, env_id=env_id)


def append(path: str | Path, record: Record) -> Record:
    """Write one line at once, so that a later failure cannot lose it; returns the record."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(record), sort_keys=True, allow_nan=False, ensure_ascii=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return record


def write_trace(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Raw readings as compressed JSON lines; the same rows give the same bytes."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """What `write_trace` wrote."""
    return [json.loads(line) for line in gzip.decompress(Path(path).read_bytes()).splitlines()]


def load(path: str | Path) -> list[Record]:
    """All records of one file. A line that is not a record of this schema is an error."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            data = json.loads(line)
            if data.get("schema") != SCHEMA:
                raise ValueError(f"schema {data.get('schema')}, this version reads {SCHEMA}")
            rows.append(Record(**{**data, "warnings": tuple(data["warnings"])}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a record: {error}") from None
    return rows


def environments(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Environment values by id."""
    return {r.env_id: r.values for r in records if r.kind == "environment" and r.env_id}


def manifests(root: str | Path) -> list[Path]:
    """Every run.json below `root`, less those in hidden folders: what a job keeps for itself."""
    root = Path(root)
    found = sorted(root.rglob("run.json"))
    return [p for p in found if not any(x[0] == "." for x in p.relative_to(root).parts)]


def load_tree(root: str | Path) -> list[Record]:
    """Records of every job below `root`, merged by identity: the job that ended later wins.

    Jobs that did not end well give what they measured before they ended; a finished job of the
    same key replaces it.
    """
    jobs = []
    for manifest in manifests(root):
        path = manifest.with_name("records.jsonl")
        if path.exists():
            run = json.loads(manifest.read_text(encoding="utf-8"))
            jobs.append((run.get("status") == "ok", run.get("end") or "", path))
    rows = [row for _, _, path in sorted(jobs, key=lambda job: job[:2]) for row in load(path)]
    return merge(rows)


def merge(records: Sequence[Record]) -> list[Record]:
    """The last record of each identity, in the order in which identities first appear."""
    gpus = {env_id: env.get("gpu") for env_id, env in environments(records).items()}
    merged: dict[tuple, Record] = {}
    for row in records:
        merged[identity(row, gpu=gpus.get(row.env_id))] = row
    return list(merged.values())


def identity(record: Record, gpu: str | None = None) -> tuple:
    """What makes two rows the same arm: kind, key and GPU. An environment is its own id."""
    if record.kind == "environment":
        return ("environment", record.env_id)
    return (record.kind, *(str(record.key.get(name)) for name in KEY_FIELDS), gpu)


def record_id(record: Record) -> str:
    """A short name of a row: the same for the same arm measured in the same run."""
    text = json.dumps([record.kind, record.key, record.env_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def select(records: Iterable[Record], kind: str | None = None, **key: Any) -> list[Record]:
    """Rows of a kind whose key fields have the given values."""
    return [
        r
        for r in records
        if (kind is None or r.kind == kind) and all(r.key.get(k) == v for k, v in key.items())
    ]


def machines_differ(records: Iterable[Record], environments: dict[str, dict[str, Any]]) -> bool:
    """Whether rows come from several machines, as far as the numbers of their GPUs are known.

    What waits for the host is then compared across hosts, which no other field tells apart.
    """
    numbers = (environments.get(r.env_id or "", {}).get("gpu_uuid") for r in records)
    return len({number for number in numbers if number}) > 1


def require_comparable(
    records: Sequence[Record],
    environments: dict[str, dict[str, Any]],
    *,
    differ: Sequence[str] = (),
) -> None:
    """Raise unless the rows agree in GPU, dtype, stack and weights.

    `differ` names the fields whose difference is the point of the comparison.
    """
    seen: dict[str, set] = {name: set() for name in COMPARABLE if name not in differ}
    for row in records:
        for name, values in seen.items():
            env = environments.get(row.env_id or "", {})
            values.add(env.get("gpu") if name == "gpu" else row.key.get(name))
    mixed = {name: sorted(map(str, values)) for name, values in seen.items() if len(values) > 1}
    if mixed:
        named = ", ".join(f"{name} ({', '.join(values)})" for name, values in mixed.items())
        raise ValueError(f"rows differ in {named}: select one, a ratio would mix causes")
