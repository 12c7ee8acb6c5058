"""A SLURM of two nodes on this host, each with one GPU in name only."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

NODES = ("one", "two")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdPidFile={home}/slurmd-%n.pid
SlurmdSpoolDir={home}/spool-%n
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=all Nodes=one,two Default=YES State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=32 RealMemory=200000 "
    "Gres=gpu:1"
)


def require(environ: Mapping[str, str] = os.environ) -> None:
    """Skip without SLURM's programs, and say so; under WORKBOOK_REQUIRE_SLURM=1 fail."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=_path(environ))]
    if not lacking:
        return
    reason = f"no {', '.join(lacking)} on PATH (Debian: slurmctld, slurmd, slurm-client)"
    if environ.get("WORKBOOK_REQUIRE_SLURM") == "1":
        pytest.fail(f"SLURM is required here: {reason}", pytrace=False)
    pytest.skip(reason)


def _path(environ: Mapping[str, str]) -> str:
    return os.pathsep.join([environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _env(home: Path) -> dict[str, str]:
    return os.environ | {"PATH": _path(os.environ), "SLURM_CONF": str(home / "slurm.conf")}


def until(condition: Callable[[], object], what: str, limit_s: float = 120) -> object:
    """What the condition is once it is true; fails where it stays false."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.1)
    return value


class Cluster:
    """The commands of the SLURM whose files lie in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = _env(home)

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def queue(self) -> dict[str, tuple[str, str, str]]:
        """Id, state and node of the jobs that are not over, by the title in their name."""
        lines = self("squeue", "-h", "-o", "%j %i %T %N").splitlines()
        cells = (line.split(" ") for line in lines)
        return {name.split("-")[1]: (number, state, node) for name, number, state, node in cells}

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job."""
        words = self("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def node(self, name: str) -> str:
        words = self("scontrol", "-o", "show", "node", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)["State"]


@contextlib.contextmanager
def running(home: Path) -> Iterator[Cluster]:
    """The controller and both nodes, until the block ends."""
    host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
    nodes = [
        NODE.format(name=name, host=host, port=port)
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    text = CONF.format(
        home=home, host=host, port=ports[0], user=getpass.getuser(), nodes="\n".join(nodes)
    )
    (home / "slurm.conf").write_text(text)
    version = subprocess.run(["slurmctld", "-V"], env=_env(home), capture_output=True, text=True)
    # No node here is limited by cgroups; the older version has a word for it that does nothing.
    newer = tuple(map(int, re.findall(r"\d+", version.stdout)[:2])) >= (23, 11)
    plugin = "disabled" if newer else "cgroup/v1"
    (home / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
    gpus = []
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (home / name).mkdir()
    for node in NODES:
        (home / f"gpu-{node}").touch()
        gpus.append(f"NodeName={node} Name=gpu File={home}/gpu-{node}\n")
    (home / "gres.conf").write_text("".join(gpus))
    cluster = Cluster(home)
    commands = [["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    with (home / "out").open("w") as out, contextlib.ExitStack() as stack:
        for command in commands:
            process = subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        with contextlib.suppress(AssertionError):  # told by the next line, with the logs
            until(lambda: _idle(cluster), "idle nodes", 30)
        logs = "\n".join(path.read_text() for path in [home / "out", *home.glob("*.log")])
        assert _idle(cluster), logs
        try:
            yield cluster
        finally:
            cluster("scancel", "--user", getpass.getuser())
            until(lambda: not cluster.queue(), "an empty queue")


def _idle(cluster: Cluster) -> bool:
    with contextlib.suppress(AssertionError):  # the controller does not answer yet
        return all(cluster.node(name) == "IDLE" for name in NODES)
    return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
