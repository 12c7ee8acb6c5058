"""Nobody is let in: what others have written stays text, and reaches nothing outside its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lib import files
from lib.files import ParamsError
from lib.records import jobs, record, slices, store
from lib.report import bundle, document
from lib.run import job as run_job
from lib.run import lease, loop, profiles
from tests.analysis.test_fit import CARD
from tests.records.test_slices import JOB, NOTEBOOK, at, environment, job, row

OUTSIDE = [
    "../x",
    "../../../../precious.txt",
    "/precious.txt",
    "a/../../x",
    "..",
    "",
    "a\\..\\x",
    7,
]


@pytest.fixture
def received(tmp_path) -> Path:
    """A folder of results from somebody else, beside a file that is not its business."""
    (tmp_path / "precious.txt").write_text("mine")
    env = environment()
    job(tmp_path / "r" / JOB, [env, row(env, 128, 1.0)])
    (tmp_path / "r" / JOB / "notebook.ipynb").write_text(NOTEBOOK)
    rewrite(tmp_path / "r" / JOB)
    return tmp_path / "r"


def rewrite(folder: Path, **more) -> None:
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    files.write_json(folder / "run.json", manifest | {"artefacts": store.artefacts(folder)} | more)


def everything_outside(received: Path) -> dict[str, bytes]:
    """All files beside the folder, and those of the folder above."""
    return {
        p.as_posix(): p.read_bytes()
        for p in received.parent.rglob("*")
        if p.is_file() and not p.is_relative_to(received) and "out" not in p.parts
    }


def every_reader(received: Path) -> None:
    """What takes a folder from others: each must do its work or refuse, and touch nothing else."""
    out = received.parent / "out"
    for read in (
        lambda: document.write(received, out / "report"),
        lambda: document.write(received),
        lambda: bundle.write(received, out / "x.zip", []),
        lambda: slices.merge([received], out / "merged"),
        lambda: run_again(received),
    ):
        try:
            read()
        except ParamsError as error:
            assert "\n" not in str(error)


def run_again(received: Path) -> None:
    """A run with that folder as OUT, when its notebook has ended."""
    store.refuse_links(received)
    folder = received / JOB
    old = store.read(folder)
    staged = run_job.begin(folder)
    (staged / "notebook.ipynb").write_text(NOTEBOOK)
    manifest = {"status": "ok", "start": at(5), "end": at(6), "job_sha": "n", "artefacts": []}
    run_job._settle(folder, old, manifest, force=False)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_artefacts_name_does_not_lead_out(received, name):
    rewrite(received / JOB, artefacts=[{"path": name, "sha256": "0"}])
    before = everything_outside(received)
    (found,) = jobs.find(received)
    assert found.status == "damaged" and "artefacts" in found.error
    every_reader(received)
    assert everything_outside(received) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_plans_name_does_not_lead_out(received, name):
    plan = {"jobs": [name]}
    (received / "plan.json").write_text(json.dumps(plan))
    before = everything_outside(received)
    with pytest.raises(ParamsError, match=r"plan\.json is damaged"):
        jobs.find(received)
    every_reader(received)
    assert everything_outside(received) == before


@pytest.mark.parametrize(
    "command",
    [
        {"PROFILE": "demo", "X; touch bad; Y": "1"},
        {"PROFILE": "demo", "PYTHON": "./bad"},
        {"PROFILE": "demo\ntouch bad"},
        {"PROFILE": 7},
        {"MODELS": "m"},
        [],
    ],
    ids=str,
)
def test_a_plan_s_command_is_one_that_people_may_copy(received, command):
    plan = {"jobs": [JOB], "commands": {JOB: command}}
    (received / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ParamsError, match=r"plan\.json is damaged .*; delete it"):
        jobs.find(received)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_traces_name_does_not_lead_out(received, name, tmp_path):
    env = environment(host=2.0)
    other = job(tmp_path / "other" / JOB, [env, row(env, 512, 1.0, trace=name)], end=at(1))
    before = everything_outside(received)
    slices.merge([received, other.parents[2]], tmp_path / "out" / "merged")
    assert everything_outside(received) == before
    merged = {p.name for p in (tmp_path / "out" / "merged" / JOB).iterdir()}
    assert merged == {"run.json", "records.jsonl", "notebook.ipynb"}


LINKS = {
    "a file": (f"{JOB}/trace.gz", "precious.txt"),
    "the page that is written": (f"{JOB}/notebook.html", "precious.txt"),
    "a file on its way": (f"{JOB}/notebook.html.tmp", "precious.txt"),
    "the report": ("report.html", "precious.txt"),
    "a folder of tables": ("tables", "elsewhere"),
    "a job": ("n/random-hf-eager/energy", "elsewhere"),
    "what a run puts away": (f"{JOB}/.previous", "elsewhere"),
    "what a run writes": (f"{JOB}/.partial", "elsewhere"),
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_does_not_lead_out(received, case):
    name, target = LINKS[case]
    (received.parent / "elsewhere").mkdir()
    (received.parent / "elsewhere" / "run.json").write_text("{}")
    (received / name).parent.mkdir(parents=True, exist_ok=True)
    (received / name).symlink_to(received.parent / target)
    before = everything_outside(received)
    with pytest.raises(ParamsError, match="is a link that leads out of it; remove"):
        jobs.find(received)
    with pytest.raises(ParamsError, match="is a link that leads out of it; remove"):
        loop.run(profiles.profile("demo"), received)
    every_reader(received)
    assert everything_outside(received) == before


def test_a_text_on_its_way_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.txt.tmp").symlink_to(tmp_path / "precious")
    files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "text"


# --- odd files: what no run has written is damage or one line, never a traceback or a wait

ENV, ROW = 0, 1


def card(**odd) -> dict:
    """A row of a model's card with an odd value."""
    return {"kind": "card", "values": CARD.as_dict() | odd}


ODD_ROWS = {  # in records.jsonl: a line changed, or its text
    "a number as kind": (ROW, {"kind": 7}),
    "a list as kind": (ROW, {"kind": []}),
    "a list as key": (ROW, {"key": [1]}),
    "a list as model": (ROW, {"key": {"model": ["m"]}}),
    "half a token": (ROW, {"key": {"model": "m", "context": 1.5}}),
    "yes as a count": (ROW, {"key": {"model": "m", "batch": True}}),
    "no users": (ROW, {"key": {"model": "m", "batch": 0}}),
    "a negative context": (ROW, {"key": {"model": "m", "context": -1}}),
    "a text as samples": (ROW, {"samples": "x"}),
    "a text as times": (ROW, {"samples": {"e2e_s": "x"}}),
    "a text as a time": (ROW, {"samples": {"e2e_s": ["x"]}}),
    "yes as a time": (ROW, {"samples": {"e2e_s": [True]}}),
    "no time": (ROW, {"samples": {"e2e_s": [None]}}),
    "a list as a time": (ROW, {"samples": {"e2e_s": [[1.0]]}}),
    "a time in place of a list": (ROW, {"samples": {"token_s": [1.0]}}),
    "a list as values": (ROW, {"values": []}),
    "a text as bytes": (ROW, {"values": {"peak_bytes": "x"}}),
    "a list as bytes": (ROW, {"values": {"peak_bytes": [1]}}),
    "a text as the host's speed": (ENV, {"values": {"host_score_per_s": ["x"]}}),
    "a list as heads": (ROW, card(kv_heads=[[1]])),
    "a list as vocabulary": (ROW, card(vocab_size=[None])),
    "nothing as layers": (ROW, card(layers=None)),
    "a text as a layer of the cache": (ROW, card(kv_layers=["x"])),
    "a layer of three": (ROW, card(kv_layers=[[1, 2, 3]])),
    "a model without parameters": (ROW, card(total_params=0)),
    "a card without its bytes": (ROW, {"kind": "card", "values": {"kv_layers": []}}),
    "a list as parameters": (ROW, {"values": {"active_params_realised": [1.0]}}),
    "a number as a reason": (ROW, {"missing": {"e2e_s": 7}}),
    "nothing as missing": (ROW, {"missing": None}),
    "a number as error": (ROW, {"error": 7}),
    "a text as warnings": (ROW, {"warnings": "ab"}),
    "a warning without a text": (ROW, {"warnings": [{"code": "x"}]}),
    "a list as env_id": (ROW, {"env_id": []}),
    "a number as GPU": (ENV, {"values": {"gpu": 7}}),
    "a text as packages": (ENV, {"values": {"packages": "x"}}),
    "NaN": (ROW, '{"samples": {"e2e_s": [NaN]}}'),
    "infinity": (ROW, '{"samples": {"e2e_s": [-Infinity]}}'),
    "a number beyond all": (ROW, '{"samples": {"e2e_s": [1e999]}}'),
    "a whole number beyond 64 bits": (ROW, '{"values": {"n": 1' + "0" * 30 + "}}"),
    "thousands of digits": (ROW, '{"values": {"n": 1' + "0" * 5000 + "}}"),
    "half a pair of letters": (ROW, '{"error": "\\ud800"}'),
    "nested without end": (ROW, '{"values": {"n": ' + "[" * 100_000 + "}}"),
    "half a line": (ROW, None),
}


def change_line(folder: Path, number: int, change: dict | str | None) -> None:
    """A line with other fields; a text stands for fields that json would not write."""
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines()
    if change is None:
        lines[number] = lines[number][:40]
    elif isinstance(change, dict):
        lines[number] = json.dumps(json.loads(lines[number]) | change)
    else:
        name = change.split('"')[1]
        data = {k: v for k, v in json.loads(lines[number]).items() if k != name}
        lines[number] = f"{json.dumps(data)[:-1]}, {change[1:]}"
    path.write_text("\n".join(lines) + "\n")
    rewrite(folder)


@pytest.mark.parametrize("case", ODD_ROWS)
def test_an_odd_row_is_damage(received, case):
    change_line(received / JOB, *ODD_ROWS[case])
    (found,) = jobs.find(received)
    assert found.status == "damaged" and not found.records
    assert "records.jsonl, line" in found.error and len(found.error) < 400


EARLIER = {"start": at(1), "end": at(2), "job_sha": "x", "env_ids": [], "complete": True}
ODD_RUNS = [
    {"parameters": {"model": ["m"]}},
    {"parameters": {"devices": "2"}},
    {"parameters": {"results_dir": 7}},
    {"env": {"gpu": ["A"]}},
    {"env": {"packages": "torch"}},
    {"env": {"lock_sha": 7}},
    {"error": {"name": "E", "value": "v", "log": 7}},
    {"git": {"commit": 7}},
    {"attempt": "x"},
    {"end": 7},
    {"earlier": [EARLIER | {"env_ids": [[]]}]},
    {"earlier": [EARLIER | {"env": 7}]},
]


@pytest.mark.parametrize("fields", ODD_RUNS, ids=str)
def test_an_odd_manifest_is_damage(received, fields):
    rewrite(received / JOB, **fields)
    (found,) = jobs.find(received)
    assert found.status == "damaged" and "run.json is damaged" in found.error


def test_an_artefact_of_too_long_a_name_is_damage(received):
    rewrite(received / JOB, artefacts=[{"path": "x" * 3000, "sha256": "0"}])
    (found,) = jobs.find(received)
    assert found.status == "damaged" and "cannot be read: File name too long" in found.error


NOTEBOOKS = [
    "[]",
    "7",
    "{}",
    '{"cells": 7, "metadata": {}, "nbformat": 4}',
    '{"cells": [7], "metadata": {}, "nbformat": 4}',
    '{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4}',
    '{"cells": [], "metadata": {}, "nbformat": 99}',
    '{"worksheets": [], "metadata": {}, "nbformat": 3}',
    '{"cells": [], "metadata": 7, "nbformat": 4}',
    '{"cells": [], "metadata": {"language_info": 7}, "nbformat": 4}',
    '{"cells": [], "metadata": {"language_info": {"pygments_lexer": [{}]}}, "nbformat": 4}',
    '{"cells": [{"cell_type": "code", "source": "", "metadata": {}, "outputs": 7}], '
    '"metadata": {}, "nbformat": 4}',
]


@pytest.mark.parametrize("text", NOTEBOOKS)
def test_what_is_no_notebook_is_damage(received, text):
    (received / JOB / "notebook.ipynb").write_text(text)
    rewrite(received / JOB)
    (found,) = jobs.find(received)
    assert found.status == "damaged" and "notebook.ipynb is no notebook" in found.error


def test_a_report_says_what_is_odd_and_is_written_all_the_same(received):
    change_line(received / JOB, ROW, {"kind": []})
    assert "kind is []" in document.write(received, received.parent / "out").read_text()


def test_half_a_pair_of_letters_in_a_notebook_is_shown_as_a_question(received):
    cell = {"cell_type": "markdown", "source": "a \\ud800 b", "metadata": {}, "id": "a"}
    text = json.dumps(json.loads(NOTEBOOK) | {"cells": [cell]}).replace("\\\\ud", "\\ud")
    (received / JOB / "notebook.ipynb").write_text(text)
    rewrite(received / JOB)
    page = document.write(received, received.parent / "out")
    assert "a ? b" in (page.parent / JOB / "notebook.html").read_text()


ODD_FILES = {
    "a pipe for run.json": lambda job: swapped(job / "run.json", os.mkfifo),
    "a pipe for the records": lambda job: swapped(job / "records.jsonl", os.mkfifo),
    "a pipe among the results": lambda job: os.mkfifo(job / "trace.jsonl.gz"),
    "a pipe for the plan": lambda job: os.mkfifo(job.parents[2] / "plan.json"),
    "a link in a circle": lambda job: (job / "a").symlink_to(job / "a"),
    "a name of two lines": lambda job: (job / "a\nb").write_text("x"),
    "a name that is no text": lambda job: Path(os.fsdecode(os.fsencode(job) + b"/\xff")).touch(),
    "a name that turns the line": lambda job: (job / "a\u202eb").write_text("x"),
}


def swapped(path: Path, make) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("case", ODD_FILES)
def test_what_is_no_file_is_refused_by_every_reader(received, case):
    ODD_FILES[case](received / JOB)
    with pytest.raises(ParamsError, match="remove it|rename it|leads out of it"):
        jobs.find(received)
    every_reader(received)


@pytest.mark.parametrize("name", ["run.json", "records.jsonl", "notebook.ipynb"])
def test_a_folder_in_place_of_a_file_is_damage(received, name):
    swapped(received / JOB / name, os.mkdir)
    (found,) = jobs.find(received)
    assert found.status == "damaged"
    assert document.write(received, received.parent / "out").exists()


# --- rows of a script, in folders of others


LOOSE = {
    "weights": "../../../x",
    "stack": "a/../../../../x",
    "weights ": ".",
}


@pytest.mark.parametrize(("field", "value"), LOOSE.items())
def test_a_script_s_row_does_not_name_a_folder_outside(tmp_path, field, value):
    key = {"model": "m", "weights": "random", "stack": "s"} | {field.strip(): value}
    env = environment()
    for line in (env, record.Record("latency", key, {"e2e_s": [1.0]}, env_id=env.env_id)):
        store.append(tmp_path / "r" / "m-x" / "records.jsonl", line)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(ParamsError, match="cannot name a folder"):
        slices.merge([tmp_path / "r"], tmp_path / "out")
    assert {*tmp_path.rglob("*")} == before


def test_a_link_beside_a_script_s_rows_is_not_followed(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    env = environment()
    row_ = record.Record("latency", {"model": "m", "weights": "r", "stack": "s"}, env_id=env.env_id)
    for line in (env, row_):
        store.append(tmp_path / "r" / "m-x" / "records.jsonl", line)
    (tmp_path / "r" / "m-x" / "trace.gz").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(ParamsError, match="leads out of it"):
        slices.merge([tmp_path / "r"], tmp_path / "out")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\ud800"])
def test_a_text_with_another_end_of_a_line_is_read_again(tmp_path, end):
    """What a model wrote, or a name of a file in an error, must not cost the row or the next."""
    path = tmp_path / "records.jsonl"
    for number in (1, 2):
        store.append(path, record.Record("gate", values={"n": number}, error=f"a{end}b"))
    assert [row.values["n"] for row in store.load(path)] == [1, 2]
    shown = end.encode("utf-8", "replace").decode()
    assert {row.error for row in store.load(path)} == {f"a{shown}b"}


def test_a_page_of_others_is_not_taken_over_into_a_bundle(received):
    """It says that it was rendered from this very notebook, and holds what was not."""
    page = document.write(received).parent / JOB / "notebook.html"
    page.write_text(page.read_text().replace("<main", "<b>planted</b><main"))
    bundle.stage(received, received.parent / "out")
    assert "planted" not in (received.parent / "out" / JOB / "notebook.html").read_text()
    rewrite(received / JOB)  # now it is listed, and would be copied beside the notebook
    (found,) = jobs.find(received)
    assert "artefacts lists notebook.html" in found.error


# --- locks


def test_a_lock_is_one_per_machine_whatever_the_session_says(monkeypatch, tmp_path):
    before = lease.shared()
    for name in ("XDG_RUNTIME_DIR", "TMPDIR", "TEMP", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    assert lease.shared() == before and before.stat().st_mode & 0o1002 == 0o1002


def test_a_lock_can_be_taken_by_every_user(tmp_path):
    old = os.umask(0o077)
    try:
        with lease.lock("a", what="it", folder=tmp_path):
            mode = (tmp_path / "workbook-a.lock").stat().st_mode
    finally:
        os.umask(old)
    assert mode & 0o777 == 0o666


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder"])
def test_a_lock_cannot_be_redirected(tmp_path, kind):
    precious, path = tmp_path / "precious", tmp_path / "workbook-a.lock"
    precious.write_text("mine")
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "new")
    elif kind == "second name":
        path.hardlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with (
        pytest.raises(lease.BusyError, match=r"the lock .*workbook-a\.lock .*remove it"),
        lease.lock("a", what="it", folder=tmp_path),
    ):
        pass
    assert precious.read_text() == "mine" and not (tmp_path / "new").exists()


# --- YAML


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "alias"),
        ("a: &a [*a]", "alias"),
        ("a: " + "[" * 5000 + "]" * 5000, "too deeply"),
        ("a: !!python/object/apply:os.system [x]", "no valid YAML"),
        ("? [a, b]\n: 1", "a key is a word"),
        ("a: \x00", "no valid YAML"),
    ],
)
def test_yaml_that_would_hang_or_run_is_one_line(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ParamsError, match=says) as error:
        files.read_yaml(tmp_path / "x.yaml")
    assert "x.yaml" in str(error.value) and "\n" not in str(error.value)


def test_yaml_may_repeat_a_word_by_an_alias(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a text\nb: *a")
    assert files.read_yaml(tmp_path / "x.yaml") == {"a": "text", "b": "text"}


# --- what this user may not read, told and never passed over


def denied(path: Path, monkeypatch) -> None:
    """As for a user who may read all but this file or folder; tests may run as one who can."""

    def refusing(function):
        def call(self, *arguments, **options):
            if not isinstance(self, int) and os.fspath(self) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return function(self, *arguments, **options)

        return call

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(Path, "open", refusing(Path.open))


@pytest.mark.parametrize("name", ["n", "n/random-hf-eager", "n/random-hf-eager/latency"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(received, name, monkeypatch):
    """Its jobs would be missing from the report, from what is merged and from a bundle."""
    env = environment()
    job(received / "n/random-hf-eager/latency", [env, row(env, 128, 1.0)])
    denied(received / name, monkeypatch)
    for read in (jobs.find, store.load_tree, lambda root: slices.merge([root], root.parent / "m")):
        with pytest.raises(ParamsError, match=f"{name} cannot be read: Permission denied; change"):
            read(received)


@pytest.mark.parametrize("name", ["lost+found", ".hidden", f"{JOB}/.previous"])
def test_a_folder_that_is_no_result_may_be_unreadable(received, name, monkeypatch):
    (received / name).mkdir()
    denied(received / name, monkeypatch)
    assert [found.path for found in jobs.find(received)] == [JOB]


@pytest.mark.parametrize("name", ["run.json", "records.jsonl", "notebook.ipynb"])
def test_a_file_that_cannot_be_read_is_damage(received, name, monkeypatch):
    denied(received / JOB / name, monkeypatch)
    (found,) = jobs.find(received)
    assert found.status == "damaged" and "Permission denied" in found.error
    assert not store.is_finished(received / JOB, store.read(received / JOB), "n")
    assert document.write(received, received.parent / "out").exists()


def test_a_page_that_cannot_be_read_is_written_anew(received, monkeypatch):
    page = document.write(received).parent / JOB / "notebook.html"
    before = page.read_bytes()
    with monkeypatch.context() as patch:
        denied(page, patch)
        document.write(received)
    assert page.read_bytes() == before
