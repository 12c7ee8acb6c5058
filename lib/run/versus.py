"""Two environments on one machine: blocks of calls in the order A B B A, a process each.

An environment is an interpreter, and folders of packages that come before its own. What a block
measures is `measure.versus`; what the blocks say is `analysis.versus`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files
from lib.files import ROOT, START_VARIABLE, ParamsError, short
from lib.records import store
from lib.run import lease
from lib.run.console import say

ORDER = "ABBA"
MANIFEST, ROWS, LOG = "versus.json", "records.jsonl", "log.txt"
PROBE_LIMIT_S = 300.0
SYNTAX = (
    "name an interpreter (python3), the folder of an environment (.venv), or a folder of packages "
    f"to put before this interpreter's own; join both with {os.pathsep!r}: "
    f"python3{os.pathsep}folder"
)
ALIKE = (
    "A and B have the same version of every package; a folder of packages holds them itself, as "
    "pip install --target makes it"
)
PROBE = """
import json, platform, sys
from importlib import metadata
import torch, transformers
import lib.measure.versus
packages = {}
for one in metadata.distributions():
    packages.setdefault(str(one.metadata["Name"]).lower().replace("_", "-"), one.version)
json.dump({"python": platform.python_version(), **dict(sorted(packages.items()))}, sys.stdout)
"""


class BlockError(RuntimeError):
    """A block that did not end well; the message names its log."""


@dataclass(frozen=True)
class Environment:
    """Where one side is measured; `text` is as it was given."""

    letter: str
    text: str
    python: str
    folders: tuple[str, ...] = ()

    def variables(self, **more: str) -> dict[str, str]:
        """The environment of its processes: its folders first, then `lib`."""
        paths = (*self.folders, str(ROOT), os.environ.get("PYTHONPATH", ""))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def environment(letter: str, text: str) -> Environment:
    """What A= or B= names. Raises ParamsError for what is neither interpreter nor folder."""
    first, *rest = text.split(os.pathsep)
    named = f"{letter}={text:.200}"
    if not text:
        raise ParamsError(f"{letter} is needed: {SYNTAX}")
    path = ROOT / files.expanded(first)  # not resolved: a link may lead out of an environment
    if (path / "bin" / "python").is_file():
        python = str(path / "bin" / "python")
    elif path.is_dir():
        python, rest = sys.executable, [first, *rest]
    else:
        python = str(path) if path.is_file() else shutil.which(first) or ""
        if not os.access(python, os.X_OK):
            raise ParamsError(f"{named}: {first:.100} is no interpreter and no folder; {SYNTAX}")
    folders = [ROOT / files.expanded(folder) for folder in rest]
    for folder, given in zip(folders, rest, strict=True):
        if not folder.is_dir():
            raise ParamsError(f"{named}: there is no folder {given!r:.100}; {SYNTAX}")
        if not any(folder.iterdir()):
            raise ParamsError(f"{named}: the folder {given!r:.100} is empty; put packages there")
    return Environment(letter, text, python, tuple(map(str, folders)))


def versions(env: Environment) -> dict[str, str]:
    """Python and every package there by its version; raises where `lib` cannot measure there."""
    command = [env.python, "-c", PROBE]
    try:
        answer = subprocess.run(
            command,
            cwd=ROOT,
            env=env.variables(),
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT_S,
            check=False,
        )
        if answer.returncode == 0:
            return json.loads(answer.stdout.splitlines()[-1])
        why = _cause(answer.stderr) or f"exit code {answer.returncode}"
    except (OSError, ValueError, IndexError) as error:
        why = f"it is no Python that answers ({error})"
    except subprocess.TimeoutExpired:
        why = f"it did not answer within {PROBE_LIMIT_S:.0f} s"
    raise ParamsError(
        f"{env.letter}={env.text:.200}: nothing can be measured there: {why:.400}; install what "
        "pyproject.toml lists there, or choose another environment"
    )


def run(
    a: Environment,
    b: Environment,
    *,
    out: Path,
    rounds: int,
    timeout_s: float,
    device: str,
    sought: float,
    options: dict[str, Any],
    after_round: Callable[[Path], object],
) -> None:
    """Measure `rounds` times four blocks into `out`, a new folder.

    `options` go to each block as they are. `after_round` is called with `out` after four blocks, so
    that what is cut off later has a verdict on what is whole. Raises BlockError where a block ends
    badly or lasts longer than `timeout_s`.
    """
    store.refuse_released(out)
    if out.is_dir() and any(out.iterdir()):
        raise ParamsError(
            f"OUT={short(out)} is not empty, and a run is one stretch of time; choose a new folder"
        )
    options = {**options, "name": _everywhere(options["name"])}
    sides = {env.letter: env for env in (a, b)}
    environments = {n: {"text": env.text, "versions": versions(env)} for n, env in sides.items()}
    if a.text != b.text and len({str(one["versions"]) for one in environments.values()}) == 1:
        say(ALIKE)
    files.require_room(out)
    start = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    manifest = {
        "start": start,
        "rounds": rounds,
        "sought": sought,
        "device": device,
        "options": options,
        **environments,
    }
    files.write_json(out / MANIFEST, manifest)
    more = {START_VARIABLE: start}
    with contextlib.ExitStack() as stack:
        if gpu := _gpu(device, stack):
            more |= {"CUDA_VISIBLE_DEVICES": gpu.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        for number in range(1, 4 * rounds + 1):
            env = sides[ORDER[(number - 1) % 4]]
            folder = out / f"{number:02}-{env.letter}"
            given = {**options, "device": device, "explain": number <= 4}
            title = f"block {number}/{4 * rounds} {env.letter}"
            say(f"{title}: {measure(env, folder, given, more, timeout_s, title):.0f} s")
            if number % 4 == 0:
                after_round(out)


def _everywhere(model: str) -> str:
    """The name of a model, or its path from the root; raises a ModelError where there is none."""
    from lib.models.origin import find

    origin = find(model)
    return str(origin.folder or origin.gguf or model)


def _gpu(device: str, stack: contextlib.ExitStack) -> lease.Gpu | None:
    """The GPU that all blocks use, held until the stack closes; None on a CPU."""
    gpus = [] if device == "cpu" else lease.visible(lease.gpus())
    if not gpus:
        return None
    (gpu,) = stack.enter_context(lease.lease(gpus))
    if reason := lease.shared_by(gpu):
        raise lease.shared_error(gpu, reason)
    return gpu


def measure(
    env: Environment,
    folder: Path,
    given: dict[str, Any],
    more: dict[str, str],
    timeout_s: float,
    title: str,
) -> float:
    """Run one block in its own process, which ends with it; returns its seconds.

    Raises BlockError, which names the block by its `title`, where it fails or lasts too long.
    """
    folder.mkdir()
    given = {**given, "records_path": str(folder / ROWS)}
    command = [env.python, "-m", "lib.measure.versus", json.dumps(given)]
    start_s = time.monotonic()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env.variables(**more),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BlockError(
                f"{title} lasted longer than {timeout_s:g} s; see {short(folder / LOG)}, or give "
                "it more (--timeout)"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
        why = _cause(text) or f"exit code {code}"
        raise BlockError(f"{title} failed: {why:.500}; see {short(folder / LOG)}")
    return time.monotonic() - start_s


def _cause(text: str) -> str:
    """The last line of an output that names an error, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [""])[-1]
