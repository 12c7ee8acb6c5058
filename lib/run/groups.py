"""Jobs that belong together: what is to be compared is measured in one stretch, there and back.

Two models on two machines, or on one at two hours, differ by more than the models do. So the jobs
of one notebook whose times or joules are compared are one group, for one GPU: A B, then B A as a
visit of its own. Where the plan has a second pass, as for energy, that is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lib.records.jobs import COMPARED, SECOND_PASS
from lib.run.plan import Task


@dataclass(frozen=True)
class Group:
    """Jobs that run one after another on one GPU; `compares`: they are of several setups.

    The name is that of their notebook, or of the only job.
    """

    name: str
    jobs: tuple[Task, ...]
    compares: bool


def groups(jobs: Iterable[Task]) -> list[Group]:
    """The measuring jobs of a plan by what must stay together, in the plan's order."""
    members: dict[str, list[Task]] = {}
    for job in jobs:
        if not job.reads:
            kind = SECOND_PASS.get(job.notebook, job.notebook)
            members.setdefault(kind if kind in COMPARED else job.name, []).append(job)
    return [
        Group(name, tuple(own), len({job.folder.parent for job in own}) > 1)
        for name, own in members.items()
    ]


def way_back(jobs: Sequence[Task]) -> list[Task]:
    """The jobs to repeat, the last one first: those that have no second pass among them."""
    again = {(SECOND_PASS.get(job.notebook), job.folder.parent) for job in jobs}
    return [
        job
        for job in reversed(jobs)
        if job.notebook not in SECOND_PASS and (job.notebook, job.folder.parent) not in again
    ]
