"""Records: written at once, read back equal, merged by identity, refused when not comparable."""

import json

import pytest

from lib.files import ROOT
from lib.records import record, store
from lib.records.kinds import KINDS
from lib.records.record import Record

ENV_A = record.environment_record({"gpu": "A"})
ENV_B = record.environment_record({"gpu": "B"})


def row(env=ENV_A, **key):
    return Record(kind="latency", key={"model": "m", **key}, env_id=env.env_id)


def test_a_record_survives_the_file(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    written = Record(
        kind="latency",
        key={"model": "m"},
        samples={"e2e_s": [1.5, 2.5]},
        values={"note": "é"},
        missing={"energy_j": "no counter"},
        warnings=(record.warning("spread", "noisy"),),
    )
    store.append(path, written)
    assert store.load(path) == [written]


def test_not_a_number_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.append(path, Record(kind="latency", samples={"e2e_s": [float("nan")]}))
    assert not path.exists()


@pytest.mark.parametrize("line", ["{", '{"schema": 99}', "[]"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    store.append(path, row())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2"):
        store.load(path)


def test_an_unknown_key_field_is_refused():
    with pytest.raises(ValueError, match="ctx"):
        Record(kind="latency", key={"ctx": 1})


def test_the_later_of_the_same_arm_wins_and_another_gpu_is_another_arm():
    old, new = (
        row(context=1),
        Record(
            "latency", {"model": "m", "context": 1}, samples={"e2e_s": [1]}, env_id=ENV_A.env_id
        ),
    )
    other = row(env=ENV_B, context=1)
    merged = store.merge([ENV_A, ENV_B, old, other, new])
    assert merged == [ENV_A, ENV_B, new, other]


def test_a_finished_job_replaces_a_failed_one_whatever_the_order_of_folders(tmp_path):
    jobs = (("a", "ok", "2026-01-01", 1), ("b", "failed", "2026-01-02", 2))
    for folder, status, end, seconds in jobs:
        path = tmp_path / folder / "records.jsonl"
        store.append(path, ENV_A)
        store.append(
            path, Record("latency", {"model": "m"}, {"e2e_s": [seconds]}, env_id=ENV_A.env_id)
        )
        path.with_name("run.json").write_text(json.dumps({"status": status, "end": end}))
    (latency,) = record.select(store.load_tree(tmp_path), "latency")
    assert latency.samples == {"e2e_s": [1]}


def test_rows_of_two_gpus_or_dtypes_are_not_compared():
    envs = record.environments([ENV_A, ENV_B])
    record.require_comparable([row(dtype="bfloat16"), row(dtype="bfloat16")], envs)
    with pytest.raises(ValueError, match=r"gpu \(A, B\): select one"):
        record.require_comparable([row(), row(env=ENV_B)], envs)
    mixed = [row(dtype="bfloat16"), row(dtype="float16")]
    with pytest.raises(ValueError, match="dtype"):
        record.require_comparable(mixed, envs)
    record.require_comparable(mixed, envs, differ=("dtype",))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"gpu_shared": "2 other process(es) use it"}, r"is shared \(2 other process"),
        ({"gpu_uuid": "MIG-1"}, r"a MIG slice \(A\)"),  # rows of before
    ],
)
def test_rows_of_a_shared_gpu_are_compared_with_nothing(values, reason):
    shared = record.environment_record({"gpu": "A", "gpu_uuid": "GPU-1"} | values)
    envs = record.environments([ENV_A, shared])
    record.require_comparable([row(env=shared)], envs)  # one row is no comparison
    for pair in ([row(env=shared), row()], [row(env=shared), row(env=shared)]):
        with pytest.raises(ValueError, match=reason):
            record.require_comparable(pair, envs)


def test_every_kind_that_was_released_is_listed():
    """Whoever reads a row can look up what it holds."""
    paths = sorted((ROOT / "outputs" / "released").rglob("records.jsonl"))
    kinds = {json.loads(line)["kind"] for path in paths for line in path.open(encoding="utf-8")}
    assert len(paths) > 20 and kinds <= KINDS.keys()


def test_a_row_that_does_not_say_how_long_its_calls_were_has_failed():
    odd = record.told(Record("latency", {"model": "m"}, {"e2e_s": [1.0]}))
    assert odd.error == "no context and no new_tokens in its key" and odd.samples == {}
    assert odd.key["weights"] is None  # so that readers may ask
    whole = Record("latency", {"context": 8, "new_tokens": 4}, {"e2e_s": [1.0]})
    assert record.told(whole) is whole
    assert record.told(ENV_A) is ENV_A
