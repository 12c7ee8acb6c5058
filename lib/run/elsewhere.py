"""Files that run a plan elsewhere: SLURM's sbatch, Kubernetes, SkyPilot, Snakemake on SLURM.

One file for each group of jobs, for GPUs that are its own. Nothing is tried again unasked: a
failure stays where it is seen, and the same file, submitted again, goes on with what is not
finished. Results come into `parts/`, which `make merge` adds up.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lib.files import ROOT, ParamsError, require_room, short, write_text
from lib.records import store
from lib.records.jobs import slug
from lib.run.groups import Group, way_back
from lib.run.plan import Task

OWN = r"workbook-[\w-]*-[0-9a-f]{6}\.(sbatch|yaml)"  # the names of files that are written here
PARTS, LOGS, DONE = "parts", "logs", "done"
CPUS, MEMORY_GB = 8, 64  # of the host for one GPU
MARGIN_MIN = 10  # for start and end, beside the limits of the notebooks
IMAGE_ROOT, VOLUME = "/workbook", "/results"  # in a container: the repository, and what is kept
CLAIM = "workbook-results"
SHARED_NODES = {  # labels of nodes whose GPUs are split or given out several times
    "nvidia.com/gpu.sharing-strategy": ("time-slicing", "mps"),
    "cloud.google.com/gke-gpu-sharing-strategy": ("time-sharing", "mps"),
    "nvidia.com/gpu.slices.gi": (),  # there only where `nvidia.com/gpu` counts MIG slices
}


@dataclass(frozen=True)
class Stretch:
    """A group to run elsewhere: its name there, the options and names of `job`, minutes at most."""

    name: str
    arguments: tuple[str, ...]
    compares: bool
    minutes: int
    gpus: int  # that it needs at once; none where it measures on the CPU

    def command(self, base: str) -> list[str]:
        """The arguments of Python; `base` is where the folder of the files lies there."""
        sides = ("out", "back") if self.compares else ("out",)
        places = (f"--{side}={base}/{PARTS}/{self.name}/{side}" for side in sides)
        return ["-m", "lib", "job", *places, *self.arguments]


def stretches(
    groups: Sequence[Group], out: Path, options: Sequence[str], timeout_s: float
) -> list[Stretch]:
    """What each file runs, named so that one list of all folders' jobs has each name once."""
    return [
        Stretch(
            _name(f"{out.resolve()}\n{group.name}", group.name),
            (*options, *(job.name for job in group.jobs)),
            group.compares,
            math.ceil(_count(group) * timeout_s / 60) + MARGIN_MIN,
            max(_gpus(job) for job in group.jobs),
        )
        for group in groups
    ]


def _name(whole: str, title: str) -> str:
    """As every scheduler takes it: letters, digits, dashes, a letter first, 63 at most."""
    words = slug(title).replace(".", "-")[:45].strip("-")
    return f"workbook-{words}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def _gpus(job: Task) -> int:
    return 0 if job.parameters.get("device", "cpu") == "cpu" else job.devices


def _count(group: Group) -> int:
    return len(group.jobs) + (len(way_back(group.jobs)) if group.compares else 0)


def sbatch(one: Stretch, out: Path, gpu: str, image: str) -> str:
    """A file for sbatch, and as the body of one of Snakemake's rules for bash.

    `singleton`: the same file submitted twice runs once at a time.
    """
    names = {
        "job-name": one.name,
        "dependency": "singleton",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": CPUS * max(one.gpus, 1),
        "mem": f"{MEMORY_GB * max(one.gpus, 1)}G",
        "time": one.minutes,
        "output": f"{LOGS}/%x-%j.txt",
    }
    names |= {"gres": gres(one, gpu)} if one.gpus else {}
    lines = [f"#SBATCH --{name}={value}" for name, value in names.items()]
    root = shlex.quote(str(ROOT))
    command = shlex.join([sys.executable, *one.command(str(out))])
    return "\n".join(
        ["#!/bin/bash", *lines, "#SBATCH --no-requeue", f"cd {root} || exit"]
        + [f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}", f"exec {command}", ""]
    )


def gres(one: Stretch, gpu: str) -> str:
    """Whole GPUs, of a type where one is named."""
    return f"gpu:{gpu}:{one.gpus}" if gpu else f"gpu:{one.gpus}"


def k8s(one: Stretch, out: Path, gpu: str, image: str) -> str:
    """A Job of Kubernetes: one pod, on a node whose GPUs are whole, started once."""
    if not image:
        raise ParamsError(
            f"FORMAT=k8s needs IMAGE=<an image with this repository in {IMAGE_ROOT} and Python's "
            "packages>; docs/clusters.md has a Dockerfile"
        )
    share = max(one.gpus, 1)
    size = {"cpu": str(CPUS * share), "memory": f"{MEMORY_GB * share}Gi"}
    size |= {"nvidia.com/gpu": str(one.gpus)} if one.gpus else {}
    matches: list[dict[str, Any]] = [
        {"key": label, "operator": "NotIn", "values": [*values]}
        if values
        else {"key": label, "operator": "DoesNotExist"}
        for label, values in SHARED_NODES.items()
    ]
    if gpu:
        matches.append({"key": "nvidia.com/gpu.product", "operator": "In", "values": [gpu]})
    container = {
        "name": "workbook",
        "image": image,
        "workingDir": IMAGE_ROOT,
        "command": [
            word.replace("$", "$$")  # Kubernetes puts variables in place of $(NAME)
            for word in ("python3", *one.command(f"{VOLUME}/{out.name}"))
        ],
        "env": [
            {"name": "PYTHONPATH", "value": IMAGE_ROOT},
            {"name": "HF_HOME", "value": f"{VOLUME}/hf"},
        ],
        "resources": {"limits": size, "requests": dict(size)},
        "volumeMounts": [{"name": "results", "mountPath": VOLUME}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [{"name": "results", "persistentVolumeClaim": {"claimName": CLAIM}}],
    }
    if one.gpus:
        pod |= {
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": matches}]
                    }
                }
            },
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ],
        }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": one.name, "labels": {"app": "workbook"}},
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 0,
            "activeDeadlineSeconds": 60 * one.minutes,
            "template": {"metadata": {"labels": {"app": "workbook"}}, "spec": pod},
        },
    }
    return yaml.safe_dump(job, sort_keys=False)


def skypilot(one: Stretch, out: Path, gpu: str, image: str) -> str:
    """A task of SkyPilot: one machine that is not taken back; `sky launch` starts nothing anew."""
    if one.gpus and not gpu:
        raise ParamsError("FORMAT=skypilot needs GPU=<accelerator>, such as H100 (`sky show-gpus`)")
    find = '"$(python3 tools/bootstrap.py report)"'
    where = f"outputs/jobs/{out.name}"
    share = max(one.gpus, 1)
    resources = {"cpus": f"{CPUS * share}+", "memory": f"{MEMORY_GB * share}+", "use_spot": False}
    resources |= {"accelerators": f"{gpu}:{one.gpus}"} if one.gpus else {}
    task = {
        "name": one.name,
        "workdir": str(ROOT),
        "num_nodes": 1,
        "resources": resources,
        "setup": f"echo {find}",
        "run": f'PYTHONPATH="$PWD" exec {find} {shlex.join(one.command(where))}',
    }
    return yaml.safe_dump(task, sort_keys=False, width=1000)


FORMATS: dict[str, tuple[str, Callable[..., str], str]] = {  # ending, content, how to submit one
    "sbatch": ("sbatch", sbatch, 'sbatch "$@" "$file"'),
    "k8s": (  # one that has failed goes first, or Kubernetes would leave it as it is
        "yaml",
        k8s,
        'name=$(basename "$file" .yaml); kubectl wait --for=condition=Failed --timeout=0s '
        '"job/$name" "$@" >/dev/null 2>&1 && kubectl delete job "$name" "$@"; '
        'kubectl apply "$@" -f "$file"',
    ),
    "skypilot": (
        "yaml",
        skypilot,
        'name=$(basename "$file" .yaml); sky launch -y -d -c "$name" "$@" "$file"',
    ),
}


def write(
    form: str, every: Sequence[Stretch], out: Path, *, gpu: str = "", image: str = ""
) -> list[Path]:
    """The files of a format in `out`, and submit.sh; those of an earlier plan go.

    A file that says the same is left as it is, so that what has run of it still counts.
    """
    store.refuse_released(out)
    if gpu and not re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", gpu, re.ASCII):
        raise ParamsError(
            f"GPU={gpu!r:.100} is no kind of GPU; name it as the scheduler does: H100"
        )
    if image and not re.fullmatch(r"[\w.:@/-]+", image, re.ASCII):
        raise ParamsError(f"IMAGE={image!r:.100} is no name of an image, such as registry/name:1")
    ending, content, submit = FORMATS[form]
    require_room(out)
    texts = {f"{one.name}.{ending}": content(one, out, gpu, image) for one in every}
    texts["submit.sh"] = (
        "#!/bin/sh\n# Submits every file of this folder; options go on to each.\n"
        f'cd "$(dirname "$0")" || exit\nfor file in *.{ending}; do {submit} || exit; done\n'
    )
    for name in (PARTS, LOGS, DONE):
        (out / name).mkdir(parents=True, exist_ok=True)
    for old in out.glob("workbook-*"):
        if old.name not in texts and re.fullmatch(OWN, old.name) and not old.is_dir():
            old.unlink()
    for name, text in texts.items():
        if not (out / name).exists() or (out / name).read_text(encoding="utf-8") != text:
            write_text(out / name, text)
    return [out / name for name in texts]


def parts(source: Path) -> list[Path]:
    """The results of a folder that `write` has filled, each a set; a set stays as it is."""
    if not (source / PARTS).is_dir() or not (source / "submit.sh").is_file():
        return [source]
    home = source / PARTS
    runs = [path.relative_to(home).parts for path in store.manifests(home)]
    if not runs:
        raise ParamsError(f"no results in {short(home)} yet; submit the files beside it")
    return [home.joinpath(*name) for name in sorted({name[:2] for name in runs})]


SNAKEFILE = """\
# Submits the files of this folder and waits for them; what has ended well is not run again.
import json

# Of each file: minutes, processors, megabytes, GPUs.
SHARES = json.loads('''{shares}''')


rule all:
    input:
        expand("{done}/{{name}}", name=SHARES),


rule measure:
    input:
        "{{name}}.sbatch",
    output:
        touch("{done}/{{name}}"),
    retries: 0
    threads: lambda wildcards: SHARES[wildcards.name][1]
    resources:
        runtime=lambda wildcards: SHARES[wildcards.name][0],
        mem_mb=lambda wildcards: SHARES[wildcards.name][2],
        gres=lambda wildcards: SHARES[wildcards.name][3],
    shell:
        "bash {{input}}"
"""


def snakemake(every: Sequence[Stretch], out: Path, gpu: str, more: Sequence[str]) -> int:
    """Run the files of `sbatch` by Snakemake on SLURM; returns its exit status."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("snakemake", path=folders)
    version = _output([program, "--version"]) if program else ""
    if not re.match(r"9\.", version):
        has = f"Snakemake {version or 'unknown'}" if program else "no Snakemake"
        raise ParamsError(
            f"ENGINE=slurm needs Snakemake 9 with its SLURM plugin, and here is {has}: "
            "pip install '.[slurm]'"
        )
    shares = {
        one.name: (
            one.minutes,
            CPUS * max(one.gpus, 1),
            1000 * MEMORY_GB * max(one.gpus, 1),
            gres(one, gpu) if one.gpus else "",
        )
        for one in every
    }
    text = SNAKEFILE.format(shares=json.dumps(shares), done=DONE)
    write_text(out / "Snakefile", text)
    command = [program, "--executor=slurm", "--slurm-no-requeue", "--jobs=unlimited"]
    command += ["--keep-going", "--retries=0", "--rerun-incomplete", f"--directory={out}"]
    return subprocess.run([*command, f"--snakefile={out / 'Snakefile'}", *more]).returncode


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
