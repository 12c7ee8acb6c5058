"""The loop over jobs: plan, lease a GPU, check, run what is not finished, say how it went."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files
from lib.files import short
from lib.records import store
from lib.run import eta, groups, kernel, lease, plan, preflight, warm
from lib.run.console import Tally, beforehand, say
from lib.run.job import Stop, recover, run_job
from lib.run.plan import Task
from lib.run.profiles import Profile

OFFLINE_PROFILES = ("demo",)


def run(
    profile: Profile,
    out_dir: Path,
    *,
    only: Sequence[str] | None = None,
    back: Path | None = None,
    ran: Collection[str] = (),
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
    `only` names jobs, by their folders below `out_dir`; other processes may run others there. With
    `back` they are then repeated in that folder, the last one first, on the same GPU: A B B A,
    which a GPU that is shared is refused for. `ran` names jobs that others have just run.
    Returns the exit code: 0, 1 if a job did not end well or an arm of one failed, or 128 + the
    signal that ended it.
    """
    places = [place for place in (out_dir, back) if place is not None]
    for place in places:
        store.refuse_released(place)
        store.refuse_links(place)
    every, stop = {place: plan.plan(profile, place) for place in places}, Stop()
    starts: dict[Path, str] = {}
    jobs = every[out_dir]
    if only is not None:
        jobs = [named(jobs, name) for name in dict.fromkeys(only)]
    if back is not None:
        jobs += [named(every[back], job.name) for job in groups.way_back(jobs)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.installed())
        for own in [out_dir] if only is None else [job.folder for job in jobs]:
            folder = hashlib.sha256(str(own.resolve()).encode()).hexdigest()[:12]
            stack.enter_context(lease.lock(f"out-{folder}", what=short(own), wait=wait))
        for job in jobs:
            if told := recover(job.folder, job.out):
                say(f"note: {told}")
        mine = [job for job in jobs if job.name not in ran]
        gpus = _lease_gpus(profile, mine, stack, wait)
        shared = _say_shared(gpus, back)

        def name_of(job: Task) -> str:
            return lease.together(gpus[: job.devices])

        def env_of(job: Task) -> dict[str, str]:
            offline = profile.name in OFFLINE_PROFILES or job.weights == "random"
            seen = gpus[: job.devices] if job.model else gpus  # the machine is all of them
            env = kernel.kernel_env(offline=offline, gpu_uuids=[gpu.uuid for gpu in seen])
            start = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            own = {files.START_VARIABLE: starts.setdefault(job.out, start)}
            return own | env | ({files.SHARED_VARIABLE: shared} if shared else {})

        todo = [x for x in mine if force or not _finished(x, name_of(x), models_path)]
        if todo:
            for place in places:
                files.require_room(place)
        workers = stack.enter_context(warm.Warm([job.source for job in todo]))
        if todo:  # it imports while the models are checked and fetched
            workers.ready(env_of(todo[0]))
        offline = profile.name in OFFLINE_PROFILES
        env = kernel.kernel_env(offline=offline, gpu_uuids=[gpu.uuid for gpu in gpus])
        sizes = eta.told(check(preflight.arms(todo), env))
        for place in places:
            _record_plan(every[place], place, profile.name, {})

        tally, stale = Tally(jobs), {place: {} for place in places}
        tally.forecast = eta.Forecast(out_dir, sizes)
        if profile.name == "gpu" and todo and (costs := beforehand(jobs)):
            say(costs)
        tally.skips = {job.name for job in jobs} - {job.name for job in todo}
        for job in jobs:
            if job.name in ran:
                if manifest := store.read(job.folder):
                    tally.ran(job, manifest)
                    _guarded(tally, "notebook page", write_page, job.folder)
                continue
            name = name_of(job)
            sha = plan.job_sha(job, name, models_path)
            reasons = None if force else _kept(job, sha, name)
            stale[job.out][job.name] = "; ".join(reasons or ())
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
        for place in places:
            _record_plan(every[place], place, profile.name, stale[place])
        page = None
        if not stop.signum or tally.measured:
            page = _guarded(tally, "report", write_report, out_dir)
        for job in jobs:
            if not job.reads and (path := job.folder / "records.jsonl").exists():
                tally.count(job, store.load(path))
        told = _guarded(tally, "closing table", results, out_dir)
        tally.summary(page, interrupted=bool(stop.signum), results=told or "")
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


def _lease_gpus(
    profile: Profile, jobs: list[Task], stack: contextlib.ExitStack, wait: bool
) -> list[lease.Gpu]:
    """The GPUs that this run holds, as many as its largest job asks for; none where it measures on
    the CPU."""
    devices = {job.parameters.get("device", "cpu") for job in jobs}
    count = max((job.devices for job in jobs), default=1)
    gpus = [] if devices <= {"cpu"} else lease.visible(lease.gpus())
    if not gpus and "cuda" in devices:
        raise preflight.PreflightError(
            f"profile {profile.name!r} measures on an NVIDIA GPU, and the driver shows none here; "
            "run `make report` for the demo profile on the CPU, or check that nvidia-smi lists "
            "the GPU and that CUDA_VISIBLE_DEVICES does not hide it"
        )
    if not gpus and count == 1:
        return []
    return stack.enter_context(lease.lease(lease.alike(gpus, count), count, wait=wait))


def _say_shared(gpus: Sequence[lease.Gpu], back: Path | None) -> str:
    """Why others may use one of the GPUs; raises where what they measure is to be compared."""
    reasons = ((gpu, reason) for gpu in gpus if (reason := lease.shared_by(gpu)))
    gpu, reason = next(reasons, (None, ""))
    if reason and back is not None:
        raise lease.shared_error(gpu, reason)
    if reason:
        say(f"warning: {gpu.name} is shared, which disturbs the numbers: {reason}")
    return reason


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
