"""Files that run a plan elsewhere: what a scheduler reads in them, and that nothing is retried."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lib.__main__ import main
from lib.files import ROOT, ParamsError
from lib.records import store
from lib.run import elsewhere, groups, plan, profiles, several

OPTIONS = ("--profile=paper", "--weights=random", "--timeout=3600")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # of a label in DNS, a letter first


def every(out: Path, profile: str = "paper", **slices: str) -> list[elsewhere.Stretch]:
    jobs = plan.plan(profiles.profile(profile, {"weights": "random"} | slices), out)
    return elsewhere.stretches(groups.groups(jobs), out, OPTIONS, 3600)


def named(stretches: list[elsewhere.Stretch], title: str) -> elsewhere.Stretch:
    (one,) = (one for one in stretches if one.name.startswith(f"workbook-{title}-"))
    return one


def options(text: str) -> dict[str, str]:
    """What sbatch reads: {option: value}."""
    pairs = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def job_of(text: str) -> dict:
    """The Job of Kubernetes, its pod and container, with the fields that its kind knows alone."""
    data = yaml.safe_load(text)
    assert (data["apiVersion"], data["kind"]) == ("batch/v1", "Job")
    assert set(data) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(data["spec"]) <= {
        "completions",
        "parallelism",
        "backoffLimit",
        "activeDeadlineSeconds",
        "template",
    }
    pod = data["spec"]["template"]["spec"]
    assert {*pod, *pod["containers"][0]} <= {
        *("restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"),
        *("affinity", "tolerations", "name", "image", "workingDir", "command", "env"),
        *("resources", "volumeMounts"),
    }
    resources = pod["containers"][0]["resources"]
    quantities = [*resources["limits"].values(), *resources["requests"].values()]
    texts = [*pod["containers"][0]["command"], *quantities]
    assert all(isinstance(text, str) for text in texts)  # as the schema of Kubernetes has them
    return data


@pytest.mark.parametrize("profile", ["paper", "demo"])
def test_every_measuring_job_of_a_plan_is_in_one_file(profile, tmp_path):
    stretches = every(tmp_path / "x", profile)
    names = [n for one in stretches for n in one.arguments if not n.startswith("--")]
    jobs = plan.plan(profiles.profile(profile, {"weights": "random"}), tmp_path / "x")
    assert sorted(names) == sorted(job.name for job in jobs if not job.reads)
    titles = [one.name for one in stretches]
    assert all(NAME.fullmatch(title) for title in titles)
    other = [one.name for one in every(tmp_path / "y", profile)]
    assert len({*titles, *other}) == 2 * len(titles)  # one list of a cluster's jobs


def test_models_of_alike_names_have_files_of_their_own(tmp_path):
    models = ["a/b", "a/B", f"a/{'long-' * 30}1", f"a/{'long-' * 30}2", "01-ai/x.y"]
    stretches = every(tmp_path, "gpu", models=",".join(models), notebooks="memory")
    titles = [one.name for one in stretches]
    assert len({*titles}) == len(models) and all(NAME.fullmatch(title) for title in titles)


def test_sbatch_asks_for_a_gpu_and_no_second_start(tmp_path):
    one = named(every(tmp_path), "stacks")
    text = elsewhere.sbatch(one, tmp_path, "", "")
    values = options(text)
    assert (values["gres"], values["nodes"], values["ntasks"]) == ("gpu:1", "1", "1")
    assert "no-requeue" in values and "requeue" not in values and "array" not in values
    assert values["dependency"] == "singleton" and values["job-name"] == one.name
    assert int(values["time"]) == 3 * 2 * 60 + elsewhere.MARGIN_MIN
    assert options(elsewhere.sbatch(one, tmp_path, "h100", ""))["gres"] == "gpu:h100:1"
    assert "gres" not in options(elsewhere.sbatch(every(tmp_path, "demo")[0], tmp_path, "", ""))
    # The runner takes the place of the shell, so that it gets the scheduler's signal.
    command = shlex.split(text.splitlines()[-1])
    assert command[:5] == ["exec", sys.executable, "-m", "lib", "job"]
    names = [word for word in command[5:] if not word.startswith("--")]
    assert names == [f"{m}/random-hf-eager/stacks" for m in ("gpt-oss-20b", "Qwen3-32B", "Yi-34B")]
    places = [word.partition("=") for word in command if re.match("--(out|back)=", word)]
    home = f"{tmp_path}/parts/{one.name}"
    assert [(p[0], p[2]) for p in places] == [("--out", f"{home}/out"), ("--back", f"{home}/back")]


def test_a_sharded_model_asks_for_all_its_gpus_at_once(tmp_path):
    """The same model on one and on two is compared: one file, for two."""
    slices = {"stack": "vllm", "models": "gpt-oss-20b", "notebooks": "latency", "devices": "1,2"}
    (one,) = every(tmp_path, **slices)
    assert (one.gpus, one.compares) == (2, True)
    setups = [word.split("/")[1] for word in one.arguments[-2:]]
    assert setups == ["random-vllm", "random-vllm-2gpus"]
    values = options(elsewhere.sbatch(one, tmp_path, "h100", ""))
    assert (values["gres"], values["cpus-per-task"], values["mem"]) == ("gpu:h100:2", "16", "128G")
    pod = job_of(elsewhere.k8s(one, tmp_path, "", "x"))["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    task = yaml.safe_load(elsewhere.skypilot(one, tmp_path, "H100", ""))
    assert task["resources"]["accelerators"] == "H100:2"
    jobs = plan.plan(profiles.profile("paper", {"weights": "random"} | slices), tmp_path)
    with pytest.raises(
        ParamsError, match="random-vllm-2gpus/latency is sharded over 2; leave JOBS"
    ):
        several.refuse_sharded(groups.groups(jobs))


def test_what_is_not_compared_has_no_way_back(tmp_path):
    for title in ("all-machine", "gpt-oss-20b-random-hf-eager-memory"):
        one = named(every(tmp_path), title)
        assert not any(word.startswith("--back") for word in one.command("x"))
        assert one.minutes == 60 + elsewhere.MARGIN_MIN


@pytest.mark.parametrize("folder", ["plain", "with space", "a'b", 'a"b', "a$(touch bad)b", "a;b"])
def test_a_file_is_a_script_whatever_the_folder_is_called(folder, tmp_path, monkeypatch):
    out = tmp_path / folder
    out.mkdir()
    path = out / "x.sbatch"
    one = named(every(out), "latency")
    monkeypatch.setattr(elsewhere, "ROOT", out)
    path.write_text(elsewhere.sbatch(one, out, "", "").replace("exec ", "printf '%s\\n' "))
    done = subprocess.run(["bash", path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"--out={out}/parts/{one.name}/out" in done.stdout.splitlines()
    assert {p.name for p in tmp_path.iterdir()} == {folder}


def test_kubernetes_starts_a_pod_once_on_a_whole_gpu(tmp_path):
    one = named(every(tmp_path), "latency")
    job = job_of(elsewhere.k8s(one, tmp_path, "", "registry/image:1"))
    assert job["metadata"]["name"] == one.name
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (0, 1, 1)
    assert spec["activeDeadlineSeconds"] == 60 * one.minutes
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > 20  # a kernel has 8 s to write what it has
    (container,) = pod["containers"]
    resources = container["resources"]
    assert (
        resources["limits"]["nvidia.com/gpu"] == "1"  # a quantity, which is a text in the schema
        and resources["limits"] == resources["requests"]
    )
    assert container["image"] == "registry/image:1"
    assert container["command"][:4] == ["python3", "-m", "lib", "job"]
    assert f"--back=/results/{tmp_path.name}/parts/{one.name}/back" in container["command"]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/results")
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    rules = {rule["key"]: rule for rule in term["matchExpressions"]}
    sharing = rules["nvidia.com/gpu.sharing-strategy"]
    assert sharing["operator"] == "NotIn" and {"time-slicing", "mps"} == {*sharing["values"]}
    assert rules["nvidia.com/gpu.slices.gi"]["operator"] == "DoesNotExist"
    product = yaml.safe_load(elsewhere.k8s(one, tmp_path, "NVIDIA-L4", "x"))
    assert "NVIDIA-L4" in str(product["spec"]["template"]["spec"]["affinity"])
    pod = job_of(elsewhere.k8s(every(tmp_path, "demo")[0], tmp_path, "", "x"))["spec"]["template"]
    assert "nvidia" not in str(pod)
    with pytest.raises(ParamsError, match="FORMAT=k8s needs IMAGE="):
        elsewhere.k8s(one, tmp_path, "", "")


def expanded(text: str) -> str:
    """What Kubernetes makes of a word of a command whose container has PYTHONPATH."""
    values = {"$$": "$", "$(PYTHONPATH)": "/workbook"}
    return re.sub(r"\$\$|\$\(PYTHONPATH\)", lambda match: values[match.group()], text)


@pytest.mark.parametrize("name", ["a b", "$(PYTHONPATH)", "$$(PYTHONPATH)", "a$b", "$$", "'\n\""])
def test_a_command_in_a_pod_is_what_it_says_whatever_the_folder_is_called(name, tmp_path):
    one = named(every(tmp_path), "latency")
    pod = job_of(elsewhere.k8s(one, tmp_path / name, "", "x"))["spec"]["template"]["spec"]
    words = [expanded(word) for word in pod["containers"][0]["command"]]
    assert f"--out=/results/{name}/parts/{one.name}/out" in words
    task = yaml.safe_load(elsewhere.skypilot(one, tmp_path / name, "H100", ""))
    words = shlex.split(task["run"].partition(" -m lib ")[2])
    assert f"--out=outputs/jobs/{name}/parts/{one.name}/out" in words


GPUS = ("H100:4", "a b", "L4\n", "x" * 64, "-a")
ODD = [*(("", gpu) for gpu in GPUS), ("a b", ""), ("x\n", "")]


@pytest.mark.parametrize(("image", "gpu"), ODD)
@pytest.mark.parametrize("form", elsewhere.FORMATS)
def test_what_no_scheduler_takes_is_refused_before_a_file_is_written(form, image, gpu, tmp_path):
    if image and form != "k8s":
        pytest.skip("it has no image")
    with pytest.raises(ParamsError, match="GPU=|IMAGE="):
        elsewhere.write(form, every(tmp_path), tmp_path, gpu=gpu or "H100", image=image or "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", ["", "Failed", "Complete"])
def test_a_job_that_failed_is_submitted_again(state, tmp_path):
    """Kubernetes leaves a Job of the same name as it is, so that it has to go first."""
    out, bin_ = tmp_path / "out", tmp_path / "bin"
    (path, _) = elsewhere.write("k8s", every(out)[:1], out, image="x")
    bin_.mkdir()
    script = f"""#!/bin/sh
printf '%s ' "$@" >> "{bin_}/asked"; echo >> "{bin_}/asked"
case "$*" in wait*condition={state or "never"}*) exit 0;; wait*) exit 1;; esac
"""
    (bin_ / "kubectl").write_text(script)
    (bin_ / "kubectl").chmod(0o755)
    environment = {"PATH": f"{bin_}:/usr/bin:/bin"}
    done = subprocess.run(["sh", str(out / "submit.sh"), "--namespace=n"], env=environment)
    asked = (bin_ / "asked").read_text().splitlines()
    deleted = [line for line in asked if line.startswith("delete")]
    assert done.returncode == 0 and asked[-1] == f"apply --namespace=n -f {path.name} "
    assert deleted == ([f"delete job {path.stem} --namespace=n "] if state == "Failed" else [])


def test_skypilot_takes_one_gpu_and_does_not_recover(tmp_path):
    one = named(every(tmp_path), "batch")
    task = yaml.safe_load(elsewhere.skypilot(one, tmp_path, "H100", ""))
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "setup", "run"}
    resources = task["resources"]
    assert (resources["accelerators"], task["num_nodes"]) == ("H100:1", 1)
    assert resources["use_spot"] is False  # and `sky launch` recovers nothing
    assert f"--out=outputs/jobs/{tmp_path.name}/parts/{one.name}/out" in task["run"]
    assert task["workdir"] == str(ROOT)
    with pytest.raises(ParamsError, match="FORMAT=skypilot needs GPU="):
        elsewhere.skypilot(one, tmp_path, "", "")


@pytest.mark.parametrize("form", elsewhere.FORMATS)
def test_the_submit_script_hands_over_every_file_with_the_options(form, tmp_path):
    out, bin_ = tmp_path / "an out", tmp_path / "bin"
    stretches = every(out)
    paths = elsewhere.write(form, stretches, out, gpu="H100", image="x")
    assert [path.name for path in paths if path.suffix != ".sh"] == [
        f"{one.name}.{elsewhere.FORMATS[form][0]}" for one in stretches
    ]
    bin_.mkdir()
    for name in ("sbatch", "kubectl", "sky"):
        (bin_ / name).write_text(
            '#!/bin/sh\n[ "$1" = wait ] && exit 1\n'
            'for word in "$@"; do printf "%s|" "$word"; done; echo\n'
        )
        (bin_ / name).chmod(0o755)
    done = subprocess.run(
        ["sh", str(out / "submit.sh"), "--account=a b"],
        env={"PATH": f"{bin_}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == len(stretches)
    assert sorted(line[-1] for line in lines) == sorted(p.name for p in paths if p.suffix != ".sh")
    assert all("--account=a b" in line for line in lines)
    assert (out / "logs").is_dir()  # where it is not, SLURM ends a job without a word


def test_files_of_an_earlier_plan_go_and_others_stay(tmp_path):
    (tmp_path / "mine.yaml").write_text("x: 1\n")
    stretches = every(tmp_path)
    elsewhere.write("sbatch", stretches, tmp_path)
    kept = tmp_path / f"{stretches[0].name}.sbatch"
    before = kept.stat().st_mtime_ns
    elsewhere.write("sbatch", stretches[:2], tmp_path)
    assert kept.stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "mine.yaml",
        "submit.sh",
        *(f"{one.name}.sbatch" for one in stretches[:2]),
    }


def test_the_released_set_is_no_place_for_files():
    with pytest.raises(ParamsError, match="is released"):
        elsewhere.write("sbatch", [], ROOT / "outputs" / "released" / "x")


def test_parts_are_the_sets_that_have_results(tmp_path):
    assert elsewhere.parts(tmp_path) == [tmp_path]  # an ordinary set
    elsewhere.write("sbatch", every(tmp_path), tmp_path)
    with pytest.raises(ParamsError, match="no results in .*parts yet"):
        elsewhere.parts(tmp_path)
    for name in ("one/out/out/back/latency", "one/back/m/s/latency", "two/out/m/s/memory"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "run.json").write_text("{}")
    (tmp_path / "parts" / "three" / "out" / store.PARTIAL).mkdir(parents=True)
    places = [path.relative_to(tmp_path / "parts").as_posix() for path in elsewhere.parts(tmp_path)]
    assert places == ["one/back", "one/out", "two/out"]


def test_the_command_line_prints_files_and_what_comes_next(tmp_path, capsys):
    command = ["jobs", "--profile", "paper", "--weights", "random", "--out", str(tmp_path)]
    assert main([*command, "--timeout", "60", "--force", "--gpu", "h100"]) == 0
    out, err = capsys.readouterr()
    printed = [Path(line) for line in out.splitlines()]
    assert len(printed) == len(every(tmp_path)) + 1 and all(path.is_file() for path in printed)
    text = next(path for path in printed if "-latency-" in path.name).read_text()
    assert "--gres=gpu:h100:1" in text
    assert "--profile=paper --weights=random --timeout=60.0 --force gpt-oss-20b/" in text
    assert f"sh {tmp_path}/submit.sh" in err and f"make merge FROM={tmp_path}" in err
    assert "PROFILE=paper WEIGHTS=random NOTEBOOKS=ape,summary,audit" in err


# --- Snakemake


@pytest.fixture
def snakemake(tmp_path, monkeypatch):
    """A stand-in that notes its arguments, of the version that the test asks for."""

    def install(version: str) -> Path:
        bin_ = tmp_path / "bin"
        bin_.mkdir()
        script = f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n'
        (bin_ / "snakemake").write_text(f'{script}printf "%s\\n" "$@" > "{bin_}/asked"; exit 7\n')
        (bin_ / "snakemake").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(bin_ / "python"))
        return bin_ / "asked"

    return install


def test_the_engine_gets_the_same_files_and_no_retries(snakemake, tmp_path):
    asked, out = snakemake("9.27.1"), tmp_path / "out"
    stretches = [replace(one, minutes=5) for one in every(out)[:2]]
    elsewhere.write("sbatch", stretches, out)
    assert elsewhere.snakemake(stretches, out, "", ["--dry-run"]) == 7
    words = asked.read_text().split("\n")
    assert {"--executor=slurm", "--slurm-no-requeue", "--retries=0", "--dry-run"} <= {*words}
    text = (out / "Snakefile").read_text()
    assert "retries: 0" in text
    assert all(f'"{one.name}": [5, 8, 64000, "gpu:1"]' in text for one in stretches)


@pytest.mark.parametrize(
    ("version", "has"), [("8.30.0", "Snakemake 8.30.0"), (None, "no Snakemake")]
)
def test_another_engine_is_refused_with_the_fix(version, has, snakemake, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if version:
        snakemake(version)
    else:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ParamsError, match=rf"here is {has}: pip install '.\[slurm\]'"):
        elsewhere.snakemake(every(tmp_path), tmp_path, "", [])
