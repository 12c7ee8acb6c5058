"""Rows and their files: one JSON object per arm and line, raw samples kept.

A record says what was measured (`key`), the raw repetitions (`samples`, SI units, the unit in the
name), single readings (`values`), why something is absent (`missing`), how the arm failed
(`error`) and what a reader should beware of (`warnings`). Statistics are derived when read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

from lib.records import kinds

SCHEMA = 1
KEY_FIELDS = (
    "model", "weights", "dtype", "stack", "experts", "attention", "cache",
    "batch", "context", "new_tokens", "decoding", "engine", "server", "load", "devices",
)  # fmt: skip
COUNTS = ("batch", "devices", "context", "new_tokens")  # the other fields of a key are words
FIELDS: dict[str, tuple[type, ...]] = {  # of a row; those of a key and an environment are below
    "kind": (str,),
    "key": (dict,),
    "samples": (dict,),
    "values": (dict,),
    "missing": (dict,),
    "error": (str, NoneType),
    "warnings": (tuple,),
    "env_id": (str, NoneType),
}
ENVIRONMENT = {name: (str, NoneType) for name in ("gpu", "gpu_uuid", "cpu", "visit", "date")} | {
    "devices": (int, NoneType),
    "packages": (dict, NoneType),
    "boards": (list, NoneType),
}
SIZES = (  # whole numbers that a card of a whole model has
    *("total_params", "active_params", "lookup_params", "routed_params", "weight_bytes"),
    *("routed_bytes", "lookup_bytes", "layers", "experts", "experts_per_token", "vocab_size"),
    "kv_element_bytes",
)
HEADS = ("hidden_size", "attention_heads", "kv_heads", "head_dim", "context_limit")
CARD = {
    **dict.fromkeys(("name", "model_type", "dtype"), (str,)),
    **dict.fromkeys(SIZES, (int,)),
    **dict.fromkeys(HEADS, (int, NoneType)),
    "kv_layers": (list, NoneType),
}
WHOLE = tuple(CARD)  # what a card with a cache has; the rest came later
CARD |= {"empty_experts": (int,), "kv_reason": (str,), "kv_blocks": (list,)}
CARD["attention_layers"] = (list, NoneType)
PAIRS = ([int, int], [int, NoneType])  # of a layer: elements of a token, and its window in tokens
ARM = ("model", "weights", "dtype", "stack", "experts", "batch", "context", "new_tokens")
NO_ARM = ("environment", "card")
NOT_CALLS = (*NO_ARM, "ceilings", "trace", "instrument", "engine")
CALLS = {*kinds.KINDS} - {*NOT_CALLS}  # rows of these kinds say all of ARM
NESTED = re.compile(r"token_s|board_.*")  # of each call a list
UNITS = re.compile(
    r".*_(s|bytes|j|w|params|params_realised|hz|tokens)"
)  # what is called so is a number
# Or these numbers: of each board (board_used_bytes, idle_board_w), of each call, of each part.
SEVERAL: dict[str, type] = {"call_start_s": list, "parameter_bytes": dict}
BOARD = "board_"
# Rows that differ in one of these answer different questions; a ratio would mix causes.
COMPARABLE = ("gpu", "dtype", "stack", "weights", "devices")


@dataclass(frozen=True)
class Record:
    """One arm of one measurement. `env_id` names the `environment` record of the same file.

    The key's `devices` are the GPUs that a model was sharded over, None where it was on one.
    A visit is one stretch of time on one machine. `visit` is this row's and `others` are the rows
    of the same arm in other visits; neither is in the file, `store.merge` finds them.
    """

    kind: str
    key: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    warnings: tuple[dict[str, str], ...] = ()
    env_id: str | None = None
    schema: int = SCHEMA
    visit: str = field(default="", compare=False)
    others: tuple[Record, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if odd := self.key.keys() - set(KEY_FIELDS):
            raise ValueError(f"unknown key fields {sorted(odd)}; known: {list(KEY_FIELDS)}")

    def value(self, name: str) -> Any:
        """A single reading, or None where it is missing (the reason is in `missing`)."""
        return self.values.get(name)


def fault_of(row: Record) -> str:
    """The first thing in a row that no measurement writes so; empty where all is sound."""
    fields = {name: getattr(row, name) for name in FIELDS}
    for name, value in fields.items():
        if not isinstance(value, FIELDS[name]):
            return f"{name} is {value!r:.80}"
    of_key = {name: (int, NoneType) if name in COUNTS else (str, NoneType) for name in row.key}
    typed = [(row.key, of_key), (row.missing, dict.fromkeys(row.missing, (str,)))]
    typed += [(row.values, {"environment": ENVIRONMENT, "card": CARD}.get(row.kind, {}))]
    numbers = {
        name: (list if BOARD in name else SEVERAL.get(name, float), int, float, NoneType)
        for name in row.values
        if UNITS.fullmatch(name)
    }
    typed += [(row.samples, dict.fromkeys(row.samples, (list,))), (row.values, numbers)]
    typed += [
        ({"code": None, "text": None} | w, {"code": (str,), "text": (str,)}) for w in row.warnings
    ]
    for values, types in typed:
        for name in values.keys() & types.keys():
            value = values[name]
            if not isinstance(value, types[name]) or isinstance(value, bool):
                return f"{name} is {value!r:.80}"
    for name in COUNTS:
        if (count := row.key.get(name)) is not None and count < 1:
            return f"{name} is {count}, and a count is 1 or more"
    if row.kind == "card" and "kv_layers" in row.values:
        if absent := [name for name in WHOLE if name not in row.values]:
            return f"the card lacks {absent[0]}"
        if odd := [n for n in ("total_params", "weight_bytes") if row.values[n] < 1]:
            return f"{odd[0]} is {row.values[odd[0]]}, and a model has some"
        for name in ("kv_layers", "attention_layers"):
            for layer in row.values.get(name) or ():
                if not (isinstance(layer, list) and [*map(type, layer)] in PAIRS):
                    return f"{name} holds {layer!r:.80}"
    columns = row.kind.startswith("serving")  # of facts of requests, which may be missing
    for name, values in row.samples.items():
        nested = values if NESTED.fullmatch(name) else [values]
        if UNITS.fullmatch(name) and not columns and not all(map(_are_numbers, nested)):
            return f"{name} holds what is no number: {values!r:.80}"
    return ""


def told(row: Record) -> Record:
    """The row; failed, with every field of ARM, where its key does not say how long calls were."""
    absent = [name for name in ARM[-2:] if row.kind in CALLS and row.key.get(name) is None]
    if not absent:
        return row
    row = replace(row, key=dict.fromkeys(ARM) | row.key)
    error = f"no {' and no '.join(absent)} in its key"
    return replace(row, samples={}, error=error) if row.samples else row


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and {*map(type, values)} <= {int, float}


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


def environments(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Environment values by id."""
    return {r.env_id: r.values for r in records if r.kind == "environment" and r.env_id}


def board(environment: Mapping[str, Any]) -> tuple[str | None, int]:
    """The kind of GPU of an environment, and over how many of them a model was sharded.

    The environment's `gpu` names all of them ("2 x NVIDIA H100"), so that their rows are never
    taken for those of one.
    """
    count = environment.get("devices") or 1
    return (environment["boards"][0]["gpu"] if count > 1 else environment.get("gpu")), count


def identity(record: Record, environment: dict[str, Any] | None = None) -> tuple:
    """What makes two rows the same arm: kind, key and GPU. An environment is its own id."""
    if record.kind == "environment":
        return ("environment", record.env_id)
    gpu = (environment or {}).get("gpu")
    return (record.kind, *(str(record.key.get(name)) for name in KEY_FIELDS), gpu)


def of_visits(rows: Sequence[Record]) -> Record:
    """The last of an arm's rows, one for each visit, with the others."""
    return replace(rows[-1], others=tuple(rows[:-1]))


def visit_of(environment: dict[str, Any]) -> str:
    """The stretch of time on one machine in which an environment was: as it says itself, else GPU,
    host and day."""
    if environment.get("visit"):
        return environment["visit"]
    gpu = environment.get("gpu_uuid") or environment.get("gpu") or environment.get("device")
    host = f"{environment.get('cpu')} x {environment.get('cpu_count')}"
    return f"{gpu}, {host}, {environment.get('date')}"


def shared_gpu(records: Iterable[Record], environments: dict[str, dict[str, Any]]) -> str:
    """Why the GPU of some rows, or of their other visits, was not theirs alone; empty where nothing
    says so."""
    for row in (one for record in records for one in (record, *record.others)):
        environment = environments.get(row.env_id or "", {})
        if reason := environment.get("gpu_shared"):
            return f"measured on a GPU that is shared ({reason})"
        if str(environment.get("gpu_uuid")).startswith("MIG-"):
            return f"measured on a MIG slice ({environment.get('gpu')})"
    return ""


def visits(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Rows by visit, those of other visits that they carry among them."""
    by_visit: dict[str, list[Record]] = {}
    for row in records:
        for one in (row, *row.others):
            by_visit.setdefault(one.visit, []).append(one)
    return by_visit


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


def cards_of(records: Iterable[Record], model: Any, dtype: Any) -> list[Record]:
    """Cards of a model that were recorded in a number format, or in none that is told; the last one
    is the newest. One of another format tells other bytes."""
    cards = select(records, "card", model=model)
    return [card for card in cards if card.key.get("dtype") in (None, dtype)]


def machines_differ(records: Iterable[Record], environments: dict[str, dict[str, Any]]) -> bool:
    """Whether rows come from several machines, as far as the numbers of their GPUs are known, and
    no visit has all of them, within which they are compared.

    What waits for the host is then compared across hosts, which no other field tells apart.
    """
    records = list(records)
    if records and set.intersection(*(set(visits([r])) for r in records)) - {""}:
        return False
    numbers = (environments.get(r.env_id or "", {}).get("gpu_uuid") for r in records)
    return len({number for number in numbers if number}) > 1


def require_comparable(
    records: Sequence[Record],
    environments: dict[str, dict[str, Any]],
    *,
    differ: Sequence[str] = (),
) -> None:
    """Raise unless the rows agree in GPU, dtype, stack and weights.

    `differ` names the fields whose difference is the point of the comparison. Rows of a GPU that
    was shared are compared with nothing.
    """
    if len(records) > 1 and (reason := shared_gpu(records, environments)):
        raise ValueError(f"{reason}: a ratio would hold what others did there")
    fields: dict[str, set] = {name: set() for name in COMPARABLE if name not in differ}
    for row in records:
        for name, values in fields.items():
            env = environments.get(row.env_id or "", {})
            values.add(env.get("gpu") if name == "gpu" else row.key.get(name))
    mixed = {name: sorted(map(str, values)) for name, values in fields.items() if len(values) > 1}
    if mixed:
        names = ", ".join(f"{name} ({', '.join(values)})" for name, values in mixed.items())
        raise ValueError(f"rows differ in {names}: select one, a ratio would mix causes")
