"""The loop over jobs: plan, lease a GPU, check, run what is not finished, say how it went."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files
from lib.files import short
from lib.records import store
from lib.run import eta, kernel, lease, plan, preflight, warm
from lib.run.console import Tally, beforehand, say
from lib.run.job import Stop, recover, run_job
from lib.run.plan import Task
from lib.run.profiles import Profile

OFFLINE_PROFILES = ("demo",)


def run(
    profile: Profile,
    out_dir: Path,
    *,
    only: str | None = None,
    force: bool = False,
    timeout_s: float | None = None,
    wait: bool = False,
    check: Callable[[list, dict], object] = preflight.check_apart,
    write_page: Callable[[Path], object] | None = None,
    write_report: Callable[[Path], object] | None = None,
    after_job: Callable[[Path], object] | None = None,
    results: Callable[[Path], str] | None = None,
    models_path: Path = files.ROOT / "params" / "models.yaml",
) -> int:
    """Run every job of a profile that is not finished yet, then write the report.

    `after_job` is called with `out_dir` when a job has ended and more are to come: it may write a
    report of what is there. `results` tells in a few lines what was found. An interrupted run
    leaves its report too.
    `only` names one job, by its folder below `out_dir`; other processes may run others there.
    Returns the exit code: 0, 1 if a job did not end well or an arm of one failed, or 128 + the
    signal that ended it.
    """
    store.refuse_released(out_dir)
    store.refuse_links(out_dir)
    every, stop = plan.plan(profile, out_dir), Stop()
    start = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    jobs = every if only is None else [named(every, only)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.installed())
        own = out_dir if only is None else jobs[0].folder
        folder = hashlib.sha256(str(own.resolve()).encode()).hexdigest()[:12]
        stack.enter_context(lease.lock(f"out-{folder}", what=short(own), wait=wait))
        for job in jobs:
            recover(job.folder)
        gpu = _lease_gpu(profile, jobs, stack, wait)
        name = gpu.name if gpu else "cpu"

        def env_of(job: Task) -> dict[str, str]:
            offline = profile.name in OFFLINE_PROFILES or job.weights == "random"
            env = kernel.kernel_env(offline=offline, gpu_uuid=gpu.uuid if gpu else None)
            return {files.START_VARIABLE: start} | env

        todo = [x for x in jobs if force or not _finished(x, name, models_path)]
        if todo:
            files.require_room(out_dir)
        workers = stack.enter_context(warm.Warm([job.source for job in todo]))
        if todo:  # it imports while the models are checked and fetched
            workers.ready(env_of(todo[0]))
        offline = profile.name in OFFLINE_PROFILES
        env = kernel.kernel_env(offline=offline, gpu_uuid=gpu.uuid if gpu else None)
        sizes = eta.told(check(preflight.arms(todo), env))
        _record_plan(every, out_dir, profile.name, {})

        tally, stale = Tally(jobs, forecast=eta.Forecast(out_dir, sizes)), {}
        if profile.name == "gpu" and todo and (costs := beforehand(jobs)):
            say(costs)
        tally.skips = {job.name for job in jobs} - {job.name for job in todo}
        for job in jobs:
            sha = plan.job_sha(job, name, models_path)
            reasons = None if force else _kept(job, sha, name)
            stale[job.name] = "; ".join(reasons or ())
            if reasons is not None:
                tally.skip(job, reasons)
                continue
            tally.start(job, "" if force else store.fault(job.folder))
            with tally.beating(job):
                manifest = run_job(
                    job,
                    sha=sha,
                    gpu=name,
                    env=env_of(job),
                    timeout_s=timeout_s,
                    stop=stop,
                    force=force,
                    worker=workers.ready(env_of(job)),
                )
            tally.end(job, manifest)
            if stop.signum:
                break
            _guarded(tally, "notebook page", write_page, job.folder)
            if job is not jobs[-1]:
                _guarded(tally, "first report", after_job, out_dir)
        _record_plan(every, out_dir, profile.name, stale)
        if not stop.signum or tally.measured:
            _guarded(tally, "report", write_report, out_dir)
        for job in jobs:
            if not job.reads and (path := job.folder / "records.jsonl").exists():
                tally.count(job, store.load(path))
        told = _guarded(tally, "closing table", results, out_dir)
        tally.summary(out_dir, interrupted=bool(stop.signum), results=told or "")
    if stop.signum:
        return 128 + stop.signum
    return 0 if tally.all_good else 1


def named(jobs: list[Task], name: str) -> Task:
    """The job of that name, its folder below the results; an error names those that there are."""
    by_name = {job.name: job for job in jobs}
    if name not in by_name:
        raise files.unknown("job", name, by_name)
    return by_name[name]


def _finished(job: Task, gpu: str, models_path: Path) -> bool:
    sha = plan.job_sha(job, gpu, models_path)
    return store.is_finished(job.folder, store.read(job.folder), sha)


def _kept(job: Task, sha: str, gpu: str) -> list[str] | None:
    """Why a finished job is stale, if anything; None where it is to be run.

    A reading notebook that is stale is repeated; a measuring one is kept, with a warning.
    """
    old = store.read(job.folder)
    if not store.is_finished(job.folder, old, sha):
        return None
    reasons = plan.stale(job, old, plan.environment(gpu, job))
    return None if reasons and job.reads else reasons


def _record_plan(jobs: list[Task], out_dir: Path, profile: str, stale: dict[str, str]) -> None:
    """Note jobs in plan.json, also where other processes do the same."""
    name = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:12]
    with lease.lock(f"plan-{name}", what=short(out_dir / "plan.json"), wait=True):
        plan.record_plan(jobs, out_dir, profile, stale)


def _lease_gpu(
    profile: Profile, jobs: list[Task], stack: contextlib.ExitStack, wait: bool
) -> lease.Gpu | None:
    """The GPU that this run holds; None where it measures on the CPU."""
    devices = {job.parameters.get("device", "cpu") for job in jobs}
    if devices <= {"cpu"}:
        return None
    gpus = lease.visible(lease.gpus())
    if not gpus and "cuda" in devices:
        raise preflight.PreflightError(
            f"profile {profile.name!r} measures on an NVIDIA GPU, and the driver shows none here; "
            "run `make report` for the demo profile on the CPU, or check that nvidia-smi lists "
            "the GPU and that CUDA_VISIBLE_DEVICES does not hide it"
        )
    if not gpus:
        return None
    gpu = stack.enter_context(lease.lease(gpus, wait=wait))
    if gpu.processes:
        say(f"warning: {gpu.processes} other process(es) use {gpu.name}; they disturb the numbers")
    return gpu


def _guarded(tally: Tally, what: str, write: Callable[[Path], Any] | None, path: Path) -> Any:
    """Write a page or the report; a failure is shown and costs no measurement."""
    if write is None:
        return None
    try:
        return write(path)
    except Exception as error:  # whatever it is, the measurements are safe and must be listed
        first = (str(error).splitlines() or [""])[0]
        fault = files.disk_fault(error) if isinstance(error, OSError) and error.filename else ""
        tally.fail(f"{what} of {short(path)}: {fault or f'{type(error).__name__}: {first}'}")
