"""Slices add up: by hand-made runs of one job, by the runner, and for whole result folders."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from lib import files
from lib.__main__ import main
from lib.files import ParamsError
from lib.records import jobs, record, slices, store
from lib.records.record import Record
from lib.report import document, provenance
from lib.run import kernel, profiles, scrub
from lib.run import loop as lib_run


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02d}+00:00"


JOB = "m/random-hf-eager/energy"
NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'


def environment(gpu: str | None = "A", host: float = 1.0) -> Record:
    return record.environment_record({"gpu": gpu, "host_score_per_s": host})


def row(env: Record, context: int, seconds: float, dtype: str = "bfloat16", **more) -> Record:
    key = {"model": "m", "dtype": dtype, "context": context}
    values = {"model_source": "hub m", "model_revision": "r1"} | more
    return Record("energy", key, {"e2e_s": [seconds]}, values, env_id=env.env_id)


def card(env: Record, dtype: str = "bfloat16") -> Record:
    return Record("card", {"model": "m", "dtype": dtype}, values={"n": 1}, env_id=env.env_id)


def job(folder: Path, rows: list[Record], traces: dict[str, str] | None = None, **fields) -> Path:
    """An ended run in `folder`."""
    for line in rows:
        store.append(folder / "records.jsonl", line)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (traces or {}).items():
        (folder / name).write_text(text)
    (folder / "notebook.ipynb").write_text(NOTEBOOK)
    defaults = {
        "status": "ok",
        "env": {"gpu": "A"},
        "job_sha": folder.as_posix(),
        "start": at(1),
        "end": at(2),
        "attempt": 1,
        "parameters": {},
        "git": None,
        "lib_sha": "l",
        "notebook_sha": "n",
    }
    manifest = defaults | fields | {"artefacts": store.artefacts(folder)}
    files.write_json(folder / "run.json", manifest)
    return folder


def seconds(folder: Path) -> dict[tuple, float]:
    """Time of each arm by context and dtype."""
    rows = record.select(store.load(folder / "records.jsonl"), "energy")
    return {(r.key["context"], r.key["dtype"]): r.samples["e2e_s"][0] for r in rows}


def added(tmp_path: Path, old: list[Record], new: list[Record], **options) -> slices.Added:
    """A run in tmp_path/new that replaces the one in tmp_path/old."""
    job(tmp_path / "old", old, **options)
    job(tmp_path / "new", new, end=at(4), start=at(3))
    return slices.add_earlier(tmp_path / "new", tmp_path / "old", store.read(tmp_path / "new"))


def test_what_is_not_measured_again_stays_with_its_environment(tmp_path):
    a, b = environment(host=1), environment(host=2)
    old = [a, card(a), row(a, 128, 1.0), row(a, 512, 2.0)]
    new = [b, card(b), row(b, 512, 3.0), row(b, 1024, 4.0)]
    result = added(tmp_path, old, new)
    rows = store.load(tmp_path / "new" / "records.jsonl")
    assert rows == [a, row(a, 128, 1.0), *new]
    (entry,) = result.earlier
    assert {"start", "end", "git", "parameters", "lib_sha", "job_sha", "attempt"} <= entry.keys()
    assert (entry["job_sha"], entry["env_ids"]) == ((tmp_path / "old").as_posix(), [a.env_id])
    assert entry["complete"] is False  # its 512 was measured again
    assert (result.aside, result.spent) == ("", True)


def test_two_dtypes_stand_side_by_side_each_with_its_card_and_trace(tmp_path):
    a, b = environment(host=1), environment(host=2)
    name = "trace-128.jsonl.gz"
    job(tmp_path / "old", [a, card(a), row(a, 128, 1.0, trace=name)], {name: "bf16"})
    new = [b, card(b, "float16"), row(b, 128, 2.0, "float16", trace=name)]
    job(tmp_path / "new", new, {name: "fp16"})
    result = slices.add_earlier(tmp_path / "new", tmp_path / "old", store.read(tmp_path / "new"))
    assert seconds(tmp_path / "new") == {(128, "bfloat16"): 1.0, (128, "float16"): 2.0}
    assert result.earlier[0]["complete"] is True
    rows = store.load(tmp_path / "new" / "records.jsonl")
    assert [r.key["dtype"] for r in record.select(rows, "card")] == ["bfloat16", "float16"]
    named = {r.key["dtype"]: r.value("trace") for r in record.select(rows, "energy")}
    assert named["float16"] == name and named["bfloat16"] != name
    texts = {dtype: (tmp_path / "new" / file).read_text() for dtype, file in named.items()}
    assert texts == {"bfloat16": "bf16", "float16": "fp16"}


def test_nothing_stays_where_everything_was_measured_again(tmp_path):
    a, b = environment(host=1), environment(host=2)
    result = added(tmp_path, [a, card(a), row(a, 128, 1.0)], [b, card(b), row(b, 128, 2.0)])
    assert result.earlier == () and seconds(tmp_path / "new") == {(128, "bfloat16"): 2.0}
    assert a not in store.load(tmp_path / "new" / "records.jsonl")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"env": {"gpu": "B"}}, "GPU B and A"),
        ({"revision": "r0"}, "m from hub m, r0 and hub m, r1"),
    ],
)
def test_another_gpu_or_revision_stays_apart(tmp_path, change, why):
    a, b = environment(host=1), environment(host=2)
    old = row(a, 128, 1.0, model_revision=change.pop("revision", "r1"))
    result = added(tmp_path, [a, old], [b, row(b, 512, 2.0)], **change)
    assert (result.earlier, result.aside) == ((), why)
    assert seconds(tmp_path / "new") == {(512, "bfloat16"): 2.0}


@pytest.mark.parametrize(("status", "stays"), [("interrupted", True), ("failed", False)])
def test_an_interrupted_run_adds_up_and_a_failed_one_does_not(tmp_path, status, stays):
    a, b = environment(host=1), environment(host=2)
    result = added(tmp_path, [a, row(a, 128, 1.0)], [b, row(b, 512, 2.0)], status=status)
    assert ((128, "bfloat16") in seconds(tmp_path / "new")) is stays
    assert [e["complete"] for e in result.earlier] == ([False] if stays else [])


def test_a_damaged_file_of_before_costs_no_new_row(tmp_path):
    a = environment()
    job(tmp_path / "old", [a, row(a, 128, 1.0)])
    (tmp_path / "old" / "records.jsonl").write_text("{")
    job(tmp_path / "new", [a, row(a, 512, 2.0)])
    result = slices.add_earlier(tmp_path / "new", tmp_path / "old", store.read(tmp_path / "new"))
    assert "line 1: not a record" in result.aside
    assert seconds(tmp_path / "new") == {(512, "bfloat16"): 2.0}


# --- the runner


CELLS = """\
from lib.records import record, store
gpu = record.environment_record({"gpu": None, "host_score_per_s": float(take)})
store.append(records_path, gpu)
for context in contexts:
    store.append(records_path, record.Record(
        "energy", {"model": model, "context": context, "dtype": dtype},
        {"e2e_s": [float(take)]}, env_id=gpu.env_id))
assert not fail
"""


class Bench:
    """One measuring notebook whose rows say by their time which run has made them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.take = folder, folder / "out", 0
        head = 'model = ""\nrecords_path = ""\ncontexts = [1]\ndtype = ""\ntake = 1\nfail = False'
        nb = nbformat.v4.new_notebook()
        nb.cells = [nbformat.v4.new_code_cell(source) for source in (head, CELLS)]
        nb.cells[0].metadata.tags = ["parameters"]
        (folder / "notebooks").mkdir()
        (folder / "params").mkdir()
        nbformat.write(nb, folder / "notebooks" / "energy.ipynb")

    def run(self, *contexts: int, dtype: str = "bfloat16", fail: bool = False, **options) -> int:
        content = {
            "defaults": {"contexts": [*contexts], "dtype": dtype, "take": 1, "fail": fail},
            "notebooks": {"energy": {}},
            "models": ["m/m"],
        }
        (self.folder / "params" / "tiny.yaml").write_text(json.dumps(content))
        profile = profiles.profile(
            "tiny", params_dir=self.folder / "params", notebooks_dir=self.folder / "notebooks"
        )
        return lib_run.run(
            profile,
            self.out,
            models_path=self.folder / "none",
            check=lambda arms, env: None,
            **options,
        )

    @property
    def job(self) -> Path:
        return self.out / "m--m" / "random-hf-eager" / "energy"

    def arms(self) -> list[tuple]:
        return sorted(seconds(self.job))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A counter stands for what differs between two runs: the speed of the host."""
    bench, execute = Bench(tmp_path), kernel.execute

    def counting(source, output, values, **options):
        bench.take += 1
        return execute(source, output, values | {"take": bench.take}, **options)

    monkeypatch.setattr(kernel, "execute", counting)
    return bench


def test_the_runner_adds_slices_and_skips_what_it_has(bench):
    assert bench.run(128, 2048) == 0
    assert bench.run(512) == 0
    manifest = store.read(bench.job)
    assert bench.arms() == [(c, "bfloat16") for c in (128, 512, 2048)]
    assert [e["parameters"]["contexts"] for e in manifest["earlier"]] == [[128, 2048]]
    assert [files.file_sha(bench.job / a["path"]) for a in manifest["artefacts"]] == [
        a["sha256"] for a in manifest["artefacts"]
    ]
    for contexts in ((512,), (128, 2048)):
        assert bench.run(*contexts) == 0
    assert bench.take == 2  # both are finished, the earlier one too
    assert bench.run(2048, 4096) == 0
    assert seconds(bench.job)[2048, "bfloat16"] == 3
    assert bench.run(128, 2048) == 0 and bench.take == 4  # one of its arms was replaced
    assert bench.run(128, 2048, dtype="float16") == 0
    assert len(bench.arms()) == 6


def test_force_measures_again_and_drops_the_rest(bench):
    assert bench.run(128, 2048) == 0
    assert bench.run(512, force=True) == 0
    assert bench.arms() == [(512, "bfloat16")]
    assert store.read(bench.job)["earlier"] == []
    assert not (bench.job / store.PREVIOUS).exists()


def test_two_failures_in_a_row_lose_nothing(bench):
    assert bench.run(128, 2048) == 0
    for _ in range(2):
        assert bench.run(512, fail=True) == 1
        assert sorted(seconds(bench.job / store.PREVIOUS)) == [
            (128, "bfloat16"),
            (2048, "bfloat16"),
        ]
    rows = store.load_tree(bench.out)  # .previous is the runner's own, not a result
    assert [r.key["context"] for r in record.select(rows, "energy")] == [512]
    assert bench.run(512) == 0
    assert bench.arms() == [(c, "bfloat16") for c in (128, 512, 2048)]
    assert not (bench.job / store.PREVIOUS).exists()


def test_a_folder_outside_the_repository_is_not_named(bench):
    assert bench.run(128) == 0
    manifest = store.read(bench.job)
    where = "<out>/m--m/random-hf-eager/energy/.partial/records.jsonl"
    assert manifest["parameters"]["records_path"] == where
    written = [path.read_text() for path in bench.job.rglob("*") if path.is_file()]
    assert len(written) == 3 and not [text for text in written if str(bench.out) in text]
    assert where in (bench.job / "notebook.ipynb").read_text()


def test_folders_of_this_machine_get_names(tmp_path):
    home, root = Path("/srv/ann"), Path("/srv/ann/book")
    folders = scrub.names(Path("/data/run"), home=home, root=root)

    def shared(text: str) -> str:
        return scrub.text(text, folders)

    assert shared("/data/run/m/x.jsonl, /data/runner") == "<out>/m/x.jsonl, /data/runner"
    assert shared('File "/srv/ann/book/lib/a.py", line 1') == 'File "lib/a.py", line 1'
    assert shared("file:///srv/ann/.cache/x") == "file://~/.cache/x"
    assert shared("https://example.org/srv/ann") == "https://example.org/srv/ann"
    coloured = "File \x1b[32m/srv/ann/book/lib/x.py:3\x1b[39m, \x1b[1;34m/srv/ann/y\x1b[0m"
    assert shared(coloured) == "File \x1b[32mlib/x.py:3\x1b[39m, \x1b[1;34m~/y\x1b[0m"
    assert scrub.values({"a": ["/srv/ann", 1, None]}, folders) == {"a": ["~", 1, None]}
    inside = scrub.names(root / "outputs", home=home, root=root)
    assert scrub.text(f"{root}/outputs/x", inside) == "outputs/x"


# --- whole folders


def test_folders_are_merged_job_by_job(tmp_path):
    a, b, c = (environment(host=h) for h in (1, 2, 3))
    name = "trace-128.jsonl.gz"
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0, trace=name), row(a, 512, 2.0)], {name: "t"})
    job(tmp_path / "b" / JOB, [b, row(b, 512, 3.0)], end=at(9))
    job(tmp_path / "b" / "n/random-hf-eager/energy", [c, row(c, 64, 5.0)])
    files.write_json(tmp_path / "a" / "plan.json", {"jobs": [JOB, "x/y/ape"]})
    out = tmp_path / "c"
    assert slices.merge([tmp_path / "a", tmp_path / "b"], out) == []
    assert seconds(out / JOB) == {(128, "bfloat16"): 1.0, (512, "bfloat16"): 3.0}
    assert (out / JOB / name).read_text() == "t"
    assert seconds(out / "n/random-hf-eager/energy") == {(64, "bfloat16"): 5.0}
    manifest = store.read(out / JOB)
    assert [e["env_ids"] for e in manifest["earlier"]] == [[a.env_id]] and manifest["end"] == at(9)
    assert {x["path"] for x in manifest["artefacts"]} == {"notebook.ipynb", "records.jsonl", name}
    plan = json.loads((out / "plan.json").read_text())["jobs"]
    assert plan == [JOB, "n/random-hf-eager/energy", "x/y/ape"]
    again = tmp_path / "d"
    slices.merge([out, tmp_path / "a"], again)  # what it holds already changes nothing
    assert store.read(again / JOB)["earlier"] == manifest["earlier"]


def test_a_row_measured_later_counts_though_its_run_was_interrupted(tmp_path):
    """128 and 512 from a whole run; later 512 and 1024 before an interruption."""
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "a" / JOB, [a, card(a), row(a, 128, 1.0), row(a, 512, 2.0)])
    later = [b, card(b), row(b, 512, 3.0), row(b, 1024, 4.0)]
    job(tmp_path / "b" / JOB, later, status="interrupted", start=at(3), end=at(4))
    slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    folder = tmp_path / "out" / JOB
    assert seconds(folder) == {
        (c, "bfloat16"): float(s) for c, s in ((128, 1), (512, 3), (1024, 4))
    }
    assert len(store.load(folder / "records.jsonl")) == 6  # two environments, a card, three arms
    manifest = store.read(folder)
    assert manifest["status"] == "ok"
    assert [entry["env_ids"] for entry in manifest["earlier"]] == [[b.env_id]]


def test_a_notebook_that_read_other_rows_is_left_out(tmp_path):
    a, b = environment(host=1), environment(host=2)
    for name, env, context in (("a", a, 128), ("b", b, 512)):
        job(tmp_path / name / JOB, [env, row(env, context, 1.0)])
        reads = {"results_dir": "x"}
        job(tmp_path / name / "m/random-hf-eager/ape", [], parameters=reads)
        job(tmp_path / name / "_all/summary", [], parameters=reads)
        job(tmp_path / name / f"{name}/random-hf-eager/ape", [], parameters=reads)
    stale = slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert sorted(stale) == ["_all/summary", "m/random-hf-eager/ape"]
    assert not (tmp_path / "c" / "_all/summary").exists()
    assert (tmp_path / "c" / "a/random-hf-eager/ape/run.json").exists()


def test_what_must_not_be_mixed_is_named_and_nothing_is_written(tmp_path):
    a, b = environment(), environment("B")
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0)])
    job(tmp_path / "b" / JOB, [b, row(b, 512, 1.0)], env={"gpu": "B"})
    with pytest.raises(ParamsError, match=f"{JOB}: GPU A and B"):
        slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ParamsError, match="not empty"):
        slices.merge([tmp_path / "a"], tmp_path / "b")
    with pytest.raises(ParamsError, match="is released"):
        slices.merge([tmp_path / "a"], files.ROOT / "outputs" / "released" / "x")
    with pytest.raises(ParamsError, match="no run.json below"):
        slices.merge([tmp_path / "nowhere"], tmp_path / "c")


def test_the_command_writes_a_report(tmp_path, capsys):
    a = environment()
    for name, context in (("a", 128), ("b", 512)):
        folder = job(tmp_path / name / JOB, [a, row(a, context, 1.0)])
        nbformat.write(nbformat.v4.new_notebook(), folder / "notebook.ipynb")
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]
    assert main(["merge", *arguments]) == 0
    assert (tmp_path / "c" / "report.html").exists()
    assert main(["merge", *arguments]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_report_tells_which_run_measured_in_which_environment(tmp_path):
    a, b = environment(host=1), environment(host=2)
    folder = job(
        tmp_path / "r" / JOB,
        [a, row(a, 128, 1.0)],
        git={"commit": "1" * 40},
        start="2026-01-01T09:00:00",
        end="2026-01-01T10:00:00",
    )
    new = job(
        tmp_path / "new",
        [b, row(b, 512, 2.0)],
        git={"commit": "2" * 40},
        start="2026-02-02T09:00:00",
        end="2026-02-02T10:00:00",
    )
    manifest = store.read(new)
    manifest["earlier"] = list(slices.add_earlier(new, folder, manifest).earlier)
    for name in ("records.jsonl", "notebook.ipynb"):
        (new / name).replace(folder / name)
    nbformat.write(nbformat.v4.new_notebook(), folder / "notebook.ipynb")
    (folder / "run.json").unlink()
    manifest["artefacts"] = store.artefacts(folder)
    files.write_json(folder / "run.json", manifest)
    places = provenance.provenance(jobs.find(tmp_path / "r"))
    facts = {line["commit"]: line["dates"] for line in places.lines()}
    assert facts == {"1" * 12: "2026-01-01", "2" * 12: "2026-02-02"}
    text = document.write(tmp_path / "r").read_text()
    assert "Rows of earlier runs (2026-01-01 10:00)" in text


# --- rows that a script wrote ------------------------------------------------------------------


def loose_rows(folder: Path, env: Record, engine: str = "e1", **more) -> Path:
    """Rows of an engine without a run.json: one says which engine, one is older than that field."""
    key = {"model": "m", "weights": "random", "stack": "vllm", "dtype": "mxfp4", "new_tokens": 4}
    key |= more
    values = {"engine_id": engine}
    store.append(folder / "records.jsonl", env)
    for row in (
        Record("latency", key | {"context": 8}, {"e2e_s": [1.5]}, values, env_id=env.env_id),
        Record("energy", key | {"context": 8}, {"energy_j": [7.0]}, env_id=env.env_id),
    ):
        store.append(folder / "records.jsonl", row)
    (folder / "trace-1.jsonl.gz").write_bytes(b"a trace")
    return folder


def test_rows_of_a_script_are_taken_in_as_they_are(tmp_path):
    env = environment()
    job(tmp_path / "set" / JOB, [env, row(env, 8, 1.0)])
    loose_rows(tmp_path / "engine" / "m-mxfp4", env)
    slices.merge([tmp_path / "set", tmp_path / "engine"], tmp_path / "both")
    found = {j.path: j for j in jobs.find(tmp_path / "both")}
    assert set(found) == {JOB, "m/random-vllm/mxfp4"}
    taken = found["m/random-vllm/mxfp4"]
    assert taken.status == "ok" and taken.by_script and taken.title == "Rows of a script, mxfp4"
    _, latency, energy = taken.records
    assert latency.samples == {"e2e_s": [1.5]} and energy.samples == {"energy_j": [7.0]}
    assert latency.key["engine"] == energy.key["engine"] == "e1"  # completed, in both
    assert "engine_id" not in energy.values  # a value is never added
    assert (taken.folder / "trace-1.jsonl.gz").read_bytes() == b"a trace"
    # Again, with what was merged: the same rows, once.
    slices.merge([tmp_path / "both", tmp_path / "engine"], tmp_path / "again")
    assert len(store.load_tree(tmp_path / "again")) == len(store.load_tree(tmp_path / "both"))


def test_a_report_shows_rows_of_a_script_and_says_so(tmp_path):
    env = environment()
    loose_rows(tmp_path / "engine" / "m-mxfp4", env)
    slices.merge([tmp_path / "engine"], tmp_path / "out")
    page = document.write(tmp_path / "out").read_text()
    assert "Measured without a notebook" in page and "notebook missing" not in page


@pytest.mark.parametrize("change", [{"engine": "e2"}, {"model": "other"}])
def test_loose_rows_that_are_of_two_things_are_refused(tmp_path, change):
    folder = tmp_path / "engine" / "m"
    loose_rows(folder, environment())
    loose_rows(folder, environment(host=2.0), **change)
    with pytest.raises(ParamsError, match="engines .*a folder each|2 setups, not one"):
        slices.merge([tmp_path / "engine"], tmp_path / "out")


# --- clocks that are wrong

FUTURE = "2999-01-01T00:00:00+00:00"


def test_a_run_from_the_future_loses_and_is_named(tmp_path, capsys):
    """A machine whose clock is ahead has measured 128 first; 128 and 512 came from others later."""
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0), row(a, 64, 5.0)], start=FUTURE, end=FUTURE)
    job(tmp_path / "b" / JOB, [b, row(b, 128, 2.0)])
    for sources, out in (("ab", "c"), ("ba", "d")):
        main(["merge", *(str(tmp_path / name) for name in sources), "--out", str(tmp_path / out)])
        assert seconds(tmp_path / out / JOB) == {(64, "bfloat16"): 5.0, (128, "bfloat16"): 2.0}
        assert store.read(tmp_path / out / JOB)["end"] == at(2)
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "2999" in x]
        assert f"a/{JOB}: ended at {FUTURE}, which is to come" in line


def test_of_runs_from_the_future_the_later_one_counts(tmp_path):
    """The clock of the machine that merges may be the one that is wrong."""
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0)], end=FUTURE)
    job(tmp_path / "b" / JOB, [b, row(b, 128, 2.0)], end=FUTURE.replace("2999", "2998"))
    slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert seconds(tmp_path / "c" / JOB) == {(128, "bfloat16"): 1.0}


def test_times_of_other_zones_are_compared_as_times(tmp_path):
    """02:00 in a zone two hours ahead is before 01:00 of UTC."""
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0)], end="2026-01-01T02:00:00+02:00")
    job(tmp_path / "b" / JOB, [b, row(b, 128, 2.0)], end="2026-01-01T01:00:00+00:00")
    slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert seconds(tmp_path / "c" / JOB) == {(128, "bfloat16"): 2.0}


@pytest.mark.parametrize("end", [FUTURE, at(9)])
def test_in_one_folder_the_run_that_has_just_ended_counts_whatever_the_clocks_say(tmp_path, end):
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "old", [a, row(a, 128, 1.0), row(a, 64, 5.0)], end=end)
    job(tmp_path / "new", [b, row(b, 128, 2.0)], start=at(3), end=at(4), attempt=2)
    result = slices.add_earlier(tmp_path / "new", tmp_path / "old", store.read(tmp_path / "new"))
    assert seconds(tmp_path / "new") == {(64, "bfloat16"): 5.0, (128, "bfloat16"): 2.0}
    assert [entry["complete"] for entry in result.earlier] == [False]


def test_a_run_that_has_added_another_came_after_it_whatever_the_clocks_say(tmp_path, capsys):
    """A copy of a folder, and the folder after the clock was set back and it was run again."""
    a, b = environment(host=1), environment(host=2)
    old = job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0), row(a, 64, 5.0)], start=at(8), end=at(9))
    new = job(tmp_path / "b" / JOB, [b, row(b, 128, 2.0)], start=at(3), end=at(4), attempt=2)
    manifest = store.read(new)
    manifest["earlier"] = list(slices.add_earlier(new, old, manifest).earlier)
    files.write_json(new / "run.json", manifest | {"artefacts": store.artefacts(new)})
    for sources, out in (("ab", "c"), ("ba", "d")):
        main(["merge", *(str(tmp_path / name) for name in sources), "--out", str(tmp_path / out)])
        assert seconds(tmp_path / out / JOB) == {(64, "bfloat16"): 5.0, (128, "bfloat16"): 2.0}
        assert store.read(tmp_path / out / JOB)["attempt"] == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "attempt" in x]
        assert f"b/{JOB}: attempt 2 ended at {at(4)}, before attempt 1 at {at(9)}" in line


def test_a_finished_run_that_counts_though_another_ended_later_is_not_spoken_of(tmp_path):
    """Attempts of two folders say nothing about each other."""
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0)], attempt=2)
    job(tmp_path / "b" / JOB, [b, row(b, 512, 2.0)], status="interrupted", end=at(9))
    slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert [entry["end"] for entry in store.read(tmp_path / "c" / JOB)["earlier"]] == [at(9)]
    assert slices.doubts([tmp_path / "c"]) == []


def test_clocks_that_agree_are_not_spoken_of(tmp_path):
    a, b = environment(host=1), environment(host=2)
    job(tmp_path / "a" / JOB, [a, row(a, 128, 1.0)])
    job(tmp_path / "b" / JOB, [b, row(b, 128, 2.0)], start=at(3), end=at(4))
    slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    slices.merge([tmp_path / "c", tmp_path / "a"], tmp_path / "d")
    assert slices.doubts([tmp_path / name for name in "abcd"]) == []
    assert seconds(tmp_path / "d" / JOB) == {(128, "bfloat16"): 2.0}
