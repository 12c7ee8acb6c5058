"""Several GPUs of this host at once: a process for each, which holds its GPU and no other.

One after another is the default, since jobs on neighbouring GPUs share processor, memory and
cooling. What is measured so says how many neighbours it had.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lib import files
from lib.files import BATCH_VARIABLE, NEIGHBOURS_VARIABLE, ROOT, ParamsError
from lib.records import store
from lib.run import groups, lease, plan, processes, profiles
from lib.run.console import GOES_ON, say
from lib.run.groups import Group
from lib.run.job import Stop


def measure(
    profile: profiles.Profile, out_dir: Path, count: int, options: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Run what a profile measures on `count` GPUs; returns the names of those jobs, and what kept
    some of them from being run. A signal that ends it raises SystemExit."""
    jobs = groups.groups(plan.plan(profile, out_dir))
    if all(job.parameters.get("device", "cpu") == "cpu" for group in jobs for job in group.jobs):
        raise ParamsError(
            f"JOBS={count} is one job a GPU, and profile {profile.name!r} measures on the CPU, "
            "where jobs share every core; leave JOBS out"
        )
    refuse_sharded(jobs)
    store.refuse_released(out_dir)
    files.require_room(out_dir)
    signum, broken = run(jobs, choose(count), options)
    if signum:
        raise SystemExit(128 + signum)
    return [job.name for group in jobs for job in group.jobs], broken


def refuse_sharded(every: Sequence[Group]) -> None:
    """Raise where a model wants several GPUs at once: those have no neighbour to spare."""
    for job in (job for group in every for job in group.jobs):
        if job.devices > 1:
            raise ParamsError(
                f"JOBS is one GPU a job, and {job.name} is sharded over {job.devices}; leave JOBS "
                "out, or choose other jobs with MODELS and NOTEBOOKS"
            )


def choose(count: int) -> list[lease.Gpu]:
    """The first `count` GPUs that are visible, whole and held by no other run."""
    gpus = lease.visible(lease.gpus())
    if split := [gpu for gpu in gpus if gpu.uuid.startswith("MIG-")]:
        raise ParamsError(
            f"JOBS={count}: {split[0].name} ({split[0].uuid}) is a slice of a board that others "
            "would share; JOBS takes whole GPUs, run its jobs one after another"
        )
    free = []
    for gpu in gpus:
        with contextlib.suppress(lease.BusyError), lease.lease([gpu]):
            free.append(gpu)
    if len(free) < count:
        raise ParamsError(
            f"JOBS={count} needs {count} GPUs, one for each; of {len(gpus)} that are visible "
            f"{len(free)} are free. Use JOBS={max(len(free), 1)}"
        )
    return free[:count]


@dataclass
class Workers(Stop):
    """The processes in progress; a signal to this one goes on to them."""

    running: set[subprocess.Popen] = field(default_factory=set)

    def __call__(self, signum: int, frame: object = None) -> None:
        self.signum = self.signum or signum
        for process in [*self.running]:
            process.send_signal(signum)


def run(
    every: Sequence[Group], gpus: Sequence[lease.Gpu], options: Sequence[str]
) -> tuple[int, list[str]]:
    """Run the groups, each as `python -m lib job NAME... OPTIONS` on the next GPU that is free.

    Returns the signal that ended it, or 0, and what is wrong with processes that did not do their
    work; how each job of the others went is in its run.json.
    """
    waiting: queue.SimpleQueue[Group] = queue.SimpleQueue()
    for group in every:
        waiting.put(group)
    mark, workers = uuid.uuid4().hex, Workers()
    broken: list[str] = []
    env = os.environ | {
        BATCH_VARIABLE: mark,
        NEIGHBOURS_VARIABLE: str(len(gpus) - 1),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }

    def work(place: int, gpu: lease.Gpu) -> None:
        while not workers.signum:
            try:
                group = waiting.get_nowait()
            except queue.Empty:
                return
            names = [job.name for job in group.jobs]
            process = subprocess.Popen(
                [sys.executable, "-m", "lib", "job", *options, *names],
                cwd=ROOT,
                env=env | {"CUDA_VISIBLE_DEVICES": gpu.uuid},
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is passed on, once
            )
            workers.running.add(process)
            if workers.signum:  # which came while it started
                process.send_signal(workers.signum)
            with process:
                for line in process.stderr:
                    if line.strip():
                        say(f"GPU {place}: {line.rstrip()}")
            workers.running.discard(process)
            if process.returncode not in (0, 1) and not workers.signum:
                broken.append(
                    f"the process for {', '.join(names)} on {gpu.name} ({gpu.uuid}) ended with "
                    f"status {process.returncode}; its lines are above"
                )

    with processes.guard(mark), workers.installed(), ThreadPoolExecutor(len(gpus)) as pool:
        for future in [pool.submit(work, *pair) for pair in enumerate(gpus)]:
            while not future.done():  # a wait that a signal can interrupt
                with contextlib.suppress(TimeoutError):
                    future.result(timeout=0.5)
            future.result()
    if workers.signum:
        say(GOES_ON)
    return workers.signum, broken
