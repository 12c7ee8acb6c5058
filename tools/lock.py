"""Write requirements.lock: one public version of every package that pyproject.toml leads to.

    make lock                          # resolve anew
    make lock WITH='torch==2.13.0'     # the same, holding some versions

pip resolves the ranges of pyproject.toml, with the extras test and serve, in a new and empty
environment and as if for the very first release of the oldest supported Python (Debian 12 has
3.11.2, and some packages ask for 3.11.5), so that every pin suits it and newer ones. Nothing is
installed.
Standard library only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
# torch requires exactly the CUDA libraries and the triton of its own build.
BROUGHT_BY_TORCH = re.compile(r"(nvidia|cuda|triton)\b")
HEADER = """\
# Every package of the workbook at one public version, tests included. Made by:
#   {command}
# with pip for Python {python}.0, the oldest supported, so that every pin suits it and newer ones.
#
# One lock for machines with and without a GPU. No version carries a local part such as +cpu, so
# torch comes as the build that the index in use offers: CUDA from PyPI on Linux, CPU on macOS. For
# the small CPU build on Linux set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
# CUDA libraries and triton are not pinned here: torch requires exactly those it was built with.
# The few that only other systems or Pythons need (colorama, appnope, aiohttp) are left to pip.
"""


def canonical(name: str) -> str:
    """Package name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(resolved: Iterable[tuple[str, str]], direct: Iterable[str]) -> list[str]:
    """Lock lines of resolved (name, version) pairs, without what torch brings by itself.

    `direct` names are kept whatever they are called (nvidia-ml-py is one).
    """
    keep = {canonical(name) for name in direct}
    lines = []
    for name, version in resolved:
        name = canonical(name)
        if name in keep or not BROUGHT_BY_TORCH.match(name):
            lines.append(f"{name}=={version.partition('+')[0]}")
    return sorted(lines, key=lambda line: line.partition("==")[0])


def resolve(requirements: list[str]) -> list[tuple[str, str]]:
    """(name, version) of everything pip would install for some requirements."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        report = Path(folder, "report.json")
        command = [f"{folder}/venv/bin/python", "-m", "pip", "install", "--quiet", "--dry-run"]
        # Naming a Python makes pip ask for wheels alone and for a target folder.
        command += ["--python-version", "{}.{}.0".format(*OLDEST), "--only-binary", ":all:"]
        command += ["--target", f"{folder}/none", "--report", str(report), *requirements]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    return [(item["metadata"]["name"], item["metadata"]["version"]) for item in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--with", dest="held", nargs="*", default=[], metavar="NAME==VERSION")
    held = parser.parse_args().held
    if sys.version_info[:2] != OLDEST:
        print(
            "make lock must run on Python {}.{}, the oldest supported, so that every pin supports "
            "it; this is {}.{}. Name one with PYTHON=path.".format(*OLDEST, *sys.version_info[:2]),
            file=sys.stderr,
        )
        return 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["serve"]
    lines = pins(resolve(wanted + held), (re.split(r"[<>=]", item)[0] for item in wanted))
    command = "make lock" + (f" WITH='{' '.join(held)}'" if held else "")
    head = HEADER.format(command=command, python="{}.{}".format(*OLDEST))
    (ROOT / "requirements.lock").write_text(head + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
