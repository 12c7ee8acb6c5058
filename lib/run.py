"""One job: lease a GPU, run a notebook by papermill, write run.json. And the loop over jobs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files, kernels, lease, manifest, portable, preflight, staging
from lib.files import ParamsError, short
from lib.manifest import Task
from lib.params import Profile
from lib.records import slices, store
from lib.signatures import check_parameters, notebook_parameters
from lib.tally import Tally, say

OFFLINE_PROFILES = ("demo",)


@dataclass
class Stop:
    """What SIGINT and SIGTERM do: end the kernel of the job in progress, then the loop."""

    watch: kernels.Watch | None = None
    signum: int = 0
    asked: int = 0

    def __call__(self, signum: int, frame: object = None) -> None:
        self.signum, self.asked = self.signum or signum, self.asked + 1
        if self.watch is None or self.asked > 2:
            raise SystemExit(128 + signum)
        self.watch.stop(signal.Signals(signum).name)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stop]:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        old = {name: signal.signal(getattr(signal, name), self) for name in names}
        try:
            yield self
        finally:
            for name, handler in old.items():
                signal.signal(getattr(signal, name), handler)


def run_job(
    job: Task,
    *,
    sha: str,
    gpu: str = "cpu",
    env: dict[str, str],
    timeout_s: float | None = None,
    stop: Stop | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Execute one notebook and record how it ended; returns the manifest.

    Notebook and records appear in the job's folder only when the run ends. Rows of earlier runs
    that were not measured again are kept, unless `force`. A run that does not end well leaves a
    finished one of before in `.previous/`; an interrupted one leaves it as is.
    """
    signature = notebook_parameters(job.source)
    values = check_parameters(job.parameters, signature, where=f"notebook {job.notebook!r}")
    stop, old, start = stop or Stop(), store.read(job.folder), _now()
    staged = staging.begin(job.folder)
    known = portable.names(job.out)
    stop.watch = kernels.Watch()
    try:
        outcome = kernels.execute(
            job.source,
            staged / "notebook.ipynb",
            values,
            env=env,
            watch=stop.watch,
            timeout_s=timeout_s,
            progress=sys.stderr.isatty(),
        )
        portable.files(staged.rglob("*"), known)
        told = {
            "status": outcome.status,
            "error": portable.values(outcome.error, known),
            "parameters": portable.values(values, known),
            "job_sha": sha,
            "notebook_sha": manifest.notebook_sha(job.source),
            "lib_sha": manifest.lib_sha(),
            "git": manifest.git_state(),
            "env": manifest.environment(gpu),
            "attempt": (old or {}).get("attempt", 0) + 1,
            "start": start,
            "end": _now(),
        }
        added = slices.Added() if force else slices.add_earlier(staged, job.folder, told)
        told["earlier"] = list(added.earlier)
        told["artefacts"] = store.artefacts(staged)
        _settle(job.folder, old, told, added)
    finally:
        stop.watch = None
    return told


def _settle(
    folder: Path, old: dict[str, Any] | None, told: dict[str, Any], added: slices.Added
) -> None:
    """Put files and manifest in place, in the order that a crash in between cannot make a lie."""
    was_ok, is_ok = old is not None and old["status"] == "ok", told["status"] == "ok"
    if was_ok and told["status"] == "interrupted":
        staging.discard(folder)
        return
    if added.aside:
        say(f"note: rows of before stay apart, in {short(folder / store.PREVIOUS)}: {added.aside}")
    if not is_ok:
        files.write_json(folder / "run.json", told)
    keep_old = was_ok and (not is_ok or bool(added.aside))
    staging.promote(folder, old, keep_old=keep_old, spent=is_ok and added.spent)
    files.write_json(folder / "run.json", told)


def run(
    profile: Profile,
    out_dir: Path,
    *,
    force: bool = False,
    timeout_s: float | None = None,
    wait: bool = False,
    check: Callable[[list, dict], None] = preflight.check_apart,
    write_page: Callable[[Path], object] | None = None,
    write_report: Callable[[Path], object] | None = None,
    models_path: Path = files.ROOT / "params" / "models.yaml",
) -> int:
    """Run every job of a profile that is not finished yet, then write the report.

    Returns the exit code: 0, 1 if a job did not end well, or 128 + the signal that ended it.
    """
    store.refuse_released(out_dir)
    jobs, stop = manifest.plan(profile, out_dir), Stop()
    with contextlib.ExitStack() as held:
        held.enter_context(stop.installed())
        folder = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:12]
        held.enter_context(lease.lock(f"out-{folder}", what=short(out_dir), wait=wait))
        gpu = _lease_gpu(profile, jobs, held, wait)
        name = gpu.name if gpu else "cpu"

        def env_of(job: Task) -> dict[str, str]:
            offline = profile.name in OFFLINE_PROFILES or job.weights == "random"
            return kernels.kernel_env(offline=offline, gpu_uuid=gpu.uuid if gpu else None)

        todo = [x for x in jobs if force or not _finished(x, name, models_path)]
        offline = profile.name in OFFLINE_PROFILES
        env = kernels.kernel_env(offline=offline, gpu_uuid=gpu.uuid if gpu else None)
        check(preflight.arms(todo), env)
        manifest.record_plan(jobs, out_dir)

        tally = Tally(jobs)
        for job in jobs:
            sha = manifest.job_sha(job, name, models_path)
            if not force and _keep(job, store.read(job.folder), sha, tally):
                tally.skip(job)
                continue
            tally.start(job)
            told = run_job(
                job,
                sha=sha,
                gpu=name,
                env=env_of(job),
                timeout_s=timeout_s,
                stop=stop,
                force=force,
            )
            tally.end(job, told)
            if stop.signum:
                break
            _guarded(tally, "notebook page", write_page, job.folder)
        if not stop.signum:
            _guarded(tally, "report", write_report, out_dir)
        tally.summary(out_dir, interrupted=bool(stop.signum))
    if stop.signum:
        return 128 + stop.signum
    return 0 if tally.all_good else 1


def _finished(job: Task, gpu: str, models_path: Path) -> bool:
    sha = manifest.job_sha(job, gpu, models_path)
    return store.is_finished(job.folder, store.read(job.folder), sha)


def _keep(job: Task, old: dict[str, Any] | None, sha: str, tally: Tally) -> bool:
    """Skip this job? A reading notebook is repeated when code changed; a measuring one warns."""
    if not store.is_finished(job.folder, old, sha):
        return False
    code = (manifest.notebook_sha(job.source), manifest.lib_sha())
    runs = (old, *old.get("earlier", ()))
    same = {(told["notebook_sha"], told["lib_sha"]) for told in runs} == {code}
    if not same and job.reads:
        return False
    if not same:
        tally.stale.append(job.title)
    return True


def _lease_gpu(
    profile: Profile, jobs: list[Task], held: contextlib.ExitStack, wait: bool
) -> lease.Gpu | None:
    """The GPU that this run holds; None where it measures on the CPU."""
    devices = {job.parameters.get("device", "cpu") for job in jobs}
    if devices <= {"cpu"}:
        return None
    seen = lease.visible(lease.gpus())
    if not seen and "cuda" in devices:
        raise preflight.PreflightError(
            f"profile {profile.name!r} measures on an NVIDIA GPU, and the driver shows none here; "
            "run `make report` for the demo profile on the CPU, or check that nvidia-smi lists "
            "the GPU and that CUDA_VISIBLE_DEVICES does not hide it"
        )
    if not seen:
        return None
    gpu = held.enter_context(lease.lease(seen, wait=wait))
    if gpu.processes:
        say(f"warning: {gpu.processes} other process(es) use {gpu.name}; they disturb the numbers")
    return gpu


def _guarded(tally: Tally, what: str, write: Callable[[Path], object] | None, path: Path) -> None:
    """Write a page or the report; a failure is shown and costs no measurement."""
    if write is None:
        return
    try:
        write(path)
    except Exception as error:  # whatever it is, the measurements are safe and must be listed
        first = (str(error).splitlines() or [""])[0]
        tally.fail(f"{what} of {short(path)}: {type(error).__name__}: {first}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def rebuild(source: Path, out_dir: Path, write_report: Callable[..., Path]) -> Path:
    """A report from existing records; measures nothing and leaves the source as it is."""
    store.refuse_released(out_dir)
    if not source.is_dir():
        raise ParamsError(f"no folder {short(source)}; FROM takes a folder of run.json files")
    if next(source.rglob("run.json"), None) is None:
        raise ParamsError(f"no run.json below {short(source)}; choose a folder that a run wrote")
    return write_report(source, out_dir)


def jupyter_path(folders: list[str], known: str) -> str:
    """JUPYTER_PATH with the data of packages that PYTHONPATH brings (nbconvert's templates)."""
    shared = [Path(folder) / "share" / "jupyter" for folder in folders if folder]
    found = [known, *(str(path) for path in shared if path.is_dir())]
    return os.pathsep.join(dict.fromkeys(filter(None, found)))
