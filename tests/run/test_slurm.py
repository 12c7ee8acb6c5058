"""The printed files on a real SLURM: cancelled, drained, submitted again; then merged and equal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lib.records import record, store
from tests.run import miniature, slurm
from tests.run.miniature import rows
from tests.run.slurm import until


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    slurm.require()
    with slurm.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def lib(workbook: Path, *arguments: str) -> str:
    done = miniature.run(workbook, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cancelled_drained_and_submitted_again_it_ends_as_undisturbed(cluster, tmp_path):
    workbook = miniature.make(tmp_path / "a workbook")
    out = workbook / "outputs" / "jobs"
    printed = lib(workbook, "jobs", "--profile", "tiny", "--out", str(out)).splitlines()
    assert [Path(line).suffix for line in printed] == [".sbatch", ".sbatch", ".sh"]
    hold = {name: workbook / "hold" / name for name in ("latency", "memory")}
    for path in hold.values():
        path.touch()

    def submit() -> dict[str, str]:
        cluster("sh", str(out / "submit.sh"))
        return {name: number for name, (number, *_) in cluster.queue().items()}

    def measuring(notebook: str) -> bool:
        pattern = f"parts/*/out/*/*/{notebook}/{store.PARTIAL}/records.jsonl"
        return any(len(p.read_text().splitlines()) == 2 for p in out.glob(pattern))

    # Each takes a GPU of its own, and so a node; the same name runs once at a time.
    first = submit()
    assert set(first) == {"latency", "a"}  # compared, and the memory of one model
    until(lambda: measuring("latency") and measuring("memory"), "two jobs that measure")
    nodes = {name: node for name, (_, _, node) in cluster.queue().items()}
    assert sorted(nodes.values()) == [*slurm.NODES]
    facts = cluster.job(first["latency"])
    assert (facts["Requeue"], facts["Restarts"]) == ("0", "0")
    assert "gpu:1" in facts.get("TresPerNode", "")
    submit()
    waiting = cluster("squeue", "-h", "-t", "PENDING", "-o", "%i").split()
    until(lambda: {cluster.job(n)["Reason"] for n in waiting} == {"Dependency"}, "reasons to wait")
    assert len(waiting) == 2
    cluster("scancel", *waiting)

    # A job is cancelled: its run says so, and keeps what it has measured.
    cluster("scancel", first["latency"])
    until(lambda: cluster.job(first["latency"])["JobState"] == "CANCELLED", "a cancelled job")
    until(lambda: "latency" not in cluster.queue(), "its end")
    (ended,) = out.glob("parts/*/out/*/*/latency/run.json")
    assert json.loads(ended.read_text())["status"] == "interrupted"

    # Both nodes are drained: what runs ends well, and nothing new begins.
    for node in slurm.NODES:
        cluster("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    second = submit()
    hold["memory"].unlink()
    until(lambda: cluster.job(first["a"])["JobState"] == "COMPLETED", "the end of memory")
    until(lambda: {cluster.node(node) for node in slurm.NODES} == {"IDLE+DRAIN"}, "drained nodes")
    assert {state for _, state, _ in cluster.queue().values()} == {"PENDING"}

    # One is resumed: what waited begins there, and what had finished is not measured again.
    cluster("scontrol", "update", f"NodeName={nodes['a']}", "State=RESUME")
    until(lambda: measuring("latency"), "the job that was cancelled")
    hold["latency"].unlink()
    until(lambda: not cluster.queue(), "the end of all")
    cluster("scontrol", "update", f"NodeName={nodes['latency']}", "State=RESUME")
    until(lambda: cluster.node(nodes["latency"]) == "IDLE", "a node that is resumed")
    for name in ("latency", "a"):
        assert cluster.job(second[name])["JobState"] == "COMPLETED"
        assert cluster.job(second[name])["NodeList"] == nodes["a"]
    attempts = {
        path.parent.relative_to(out / "parts").as_posix().split("/", 1)[1]: json.loads(
            path.read_text()
        )["attempt"]
        for path in out.glob("parts/**/run.json")
    }
    assert attempts == {
        "out/a--one/random-hf-eager/latency": 2,
        "out/b--three/random-hf-eager/latency": 1,
        "back/b--three/random-hf-eager/latency": 1,
        "back/a--one/random-hf-eager/latency": 1,
        "out/a--one/random-hf-eager/memory": 1,
    }

    # Merged, it is what a run without any of this gives, and every visit of an arm is the same.
    merged, undisturbed = workbook / "outputs" / "merged", workbook / "outputs" / "here"
    lib(workbook, "merge", str(out), "--out", str(merged))
    assert (merged / "report.html").exists()
    names = lib(workbook, "job", "--profile", "tiny").split()
    lib(workbook, "job", "--profile", "tiny", "--out", str(undisturbed), *names)
    here = rows(undisturbed)
    assert len(here) == 6 and set(rows(merged)) == set(here)
    visits = {
        r.key["model"]: 1 + len(r.others)
        for r in record.select(store.load_tree(merged), "latency", context=2)
    }
    assert visits == {"a/one": 2, "b/three": 2}
    assert sorted(store.read_plan(merged)["jobs"]) == sorted(names)


def test_a_missing_slurm_skips_here_and_fails_where_one_is_required(monkeypatch):
    monkeypatch.setattr(slurm, "PROGRAMS", ("sh", "a-program-that-nobody-has"))
    with pytest.raises(pytest.skip.Exception, match="no a-program-that-nobody-has on PATH"):
        slurm.require(os.environ | {"WORKBOOK_REQUIRE_SLURM": "0"})
    with pytest.raises(pytest.fail.Exception, match="SLURM is required here: no a-program"):
        slurm.require(os.environ | {"WORKBOOK_REQUIRE_SLURM": "1"})
