"""Write the lock files: one public version of every package, with the sha256 of its files.

    make lock                          # resolve anew
    make lock WITH='torch==2.13.0'     # the same, holding some versions

uv resolves the ranges of pyproject.toml, with the extras test and serve, for every system and every
Python from the oldest supported on, as a package index answers; nothing of it is installed. The
result is two files, because torch is another build on other indexes: requirements-torch.lock has
torch and the CUDA libraries that it brings, requirements.lock all else. requirements-vllm.lock is
resolved apart, since vLLM asks for exactly one torch. Standard library only, beside uv.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
UV = "uv==0.13.9"  # resolves for every system at once and writes the hashes; pip does neither
VLLM = "vllm==0.25.1"
VLLM_PYTHON = "3.12"
# torch requires exactly the CUDA libraries and the triton of its own build.
BROUGHT_BY_TORCH = re.compile(r"(torch|nvidia|cuda|triton)\b")
PIN = re.compile(r"^([\w.-]+)==([^\s;]+)")

ALL = """\
# Every package of the workbook but torch at one public version, tests included, with the sha256 of
# its files: pip takes no other. Made by:
#   {command}
# for Python {python} and newer, Linux, macOS and Windows. tools/bootstrap.py installs it.
"""
TORCH = """\
# torch and the CUDA libraries that it brings on Linux, as PyPI has them, with the sha256 of their
# files. Made with requirements.lock, by the same command. Where pip is given another index that has
# a build of its own (such as the small CPU build, PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu), tools/bootstrap.py takes that one instead, at this version
# and without a hash, and says so.
"""
FOR_VLLM = """\
# vLLM and everything it needs, at one public version each and with the sha256 of its files, for an
# environment of its own (make vllm): it asks for exactly one torch, which requirements-torch.lock
# does not have. transformers is held at the version of requirements.lock, so that both sides read a
# configuration alike. Linux on x86-64 with an NVIDIA GPU and Python {python} alone, by make lock.
"""


def canonical(name: str) -> str:
    """Package name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(text: str) -> list[str]:
    """The requirements of a lock, each with the lines of its hashes."""
    found: list[str] = []
    for line in text.splitlines():
        if line[:1].isalnum():
            found.append(line)
        elif line.strip() and not line.startswith("#"):
            found[-1] += "\n" + line
    return found


def pins(text: str) -> dict[str, str]:
    """Name -> version of the requirements of a lock."""
    matches = [PIN.match(entry) for entry in entries(text)]
    return {match[1]: match[2] for match in matches if match}


def apart(text: str, direct: Iterable[str]) -> tuple[str, str]:
    """A resolved lock as (all but torch and what it brings, those).

    `direct` names but torch stay in the first, whatever they are called (nvidia-ml-py is one).
    """
    keep = {canonical(name) for name in direct} - {"torch"}
    both: tuple[list[str], list[str]] = ([], [])
    for entry in entries(text):
        name = PIN.match(entry)[1]
        both[name not in keep and bool(BROUGHT_BY_TORCH.match(name))].append(entry)
    rest, torch = ("\n".join(part) + "\n" for part in both)
    return rest, torch


def resolve(uv: str, requirements: Sequence[str], *options: str) -> str:
    """What uv writes for some requirements: a pin of each package, then its hashes."""
    command = [uv, "pip", "compile", "-", "--quiet", "--generate-hashes", "--no-annotate"]
    command += ["--no-header", "--system-certs", *options]
    answer = subprocess.run(
        command, input="\n".join(requirements), text=True, check=True, stdout=subprocess.PIPE
    )
    return answer.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--with", dest="held", nargs="*", default=[], metavar="NAME==VERSION")
    held = parser.parse_args().held
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["serve"]
    oldest = "{}.{}".format(*OLDEST)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([f"{folder}/bin/python", "-m", "pip", "install", "-q", UV], check=True)
        uv = f"{folder}/bin/uv"
        every = resolve(
            uv,
            wanted + held,
            "--universal",
            "--python-version",
            oldest,
            "--fork-strategy",
            "fewest",
        )  # one version of each package, which every Python takes
        rest, torch = apart(every, (re.split(r"[<>=]", item)[0] for item in wanted))
        same = f"transformers=={pins(rest)['transformers']}"
        engine = resolve(
            uv, [VLLM, same], "--python-version", VLLM_PYTHON,
            "--python-platform", "x86_64-manylinux_2_28",
        )  # fmt: skip
    command = "make lock" + (f" WITH='{' '.join(held)}'" if held else "")
    head = ALL.format(command=command, python=oldest)
    (ROOT / "requirements.lock").write_text(head + rest)
    (ROOT / "requirements-torch.lock").write_text(TORCH + torch)
    (ROOT / "requirements-vllm.lock").write_text(FOR_VLLM.format(python=VLLM_PYTHON) + engine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
