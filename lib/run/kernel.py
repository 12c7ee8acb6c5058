"""Kernels that cannot outlive their runner, and an account of how a notebook really ended.

papermill marks every cell "completed" after its kernel died, timed out or was interrupted, so
that the status here comes from what happened, and the written notebook is corrected to match.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from lib.files import BATCH_VARIABLE, ROOT
from lib.run import processes

NOISE = (
    "without encryption",
    "TransportEncryption",
    "frozen modules",
    "PYDEVD_DISABLE",
    "Debugger",
)


GRACE_S = 8.0  # schedulers and Docker kill ten seconds after their first signal or later


@dataclass
class Watch:
    """The kernel of the job in progress: can be stopped from a signal handler or a timer."""

    reason: str = ""  # why it was stopped: timeout or interrupted
    pid: int | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def stop(self, reason: str) -> None:
        """Interrupt the cell, so that it may write what it has measured; after `GRACE_S`, or when
        asked again, kill the kernel and all of its process group. The first reason counts."""
        with self.lock:
            again, self.reason = bool(self.reason), self.reason or reason
            if again or self.pid is None:
                self.kill()
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGINT)
            killer = threading.Timer(GRACE_S, self.kill)
            killer.daemon = True
            killer.start()

    def kill(self) -> None:
        if self.pid is not None:
            processes.kill_group(self.pid)


@dataclass(frozen=True)
class Outcome:
    """How an execution ended: ok, failed, timeout, dead-kernel or interrupted, and the error."""

    status: str
    error: dict[str, Any] | None = None


def execute(
    source: Path,
    output: Path,
    parameters: dict[str, Any],
    *,
    env: dict[str, str],
    watch: Watch,
    timeout_s: float | None = None,
    progress: bool = False,
) -> Outcome:
    """Run a notebook by papermill into `output`, in the repository's root.

    `timeout_s` limits the whole notebook. Every process that the notebook started is gone when
    this returns.
    """
    children = set(processes.descendants(os.getpid()))
    timer = threading.Timer(timeout_s or 0, watch.stop, ["timeout"])
    timer.daemon = True
    if timeout_s:
        timer.start()
    with tempfile.TemporaryFile() as log, processes.adopt_orphans():
        try:
            error = _papermill(source, output, parameters, _owned_kernel(env, log, watch), progress)
            if _never_started(error) and not watch.reason:
                # Ports are chosen before the kernel takes them; another process may be faster.
                error = _papermill(
                    source, output, parameters, _owned_kernel(env, log, watch), progress
                )
        finally:
            timer.cancel()
            watch.kill()
            watch.pid = None
            processes.reap(set(processes.descendants(os.getpid())) - children)
        outcome = _outcome(output, error, watch, timeout_s, _tail(log))
    _shorten_paths(output, source)
    return outcome


def _papermill(
    source: Path,
    output: Path,
    parameters: dict[str, Any],
    kernel: type[AsyncKernelManager],
    progress: bool,
) -> Exception | None:
    import papermill

    try:
        papermill.execute_notebook(
            # papermill takes a path for a format string
            str(source).replace("{", "{{").replace("}", "}}"),
            str(output).replace("{", "{{").replace("}", "}}"),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(ROOT),
            progress_bar=progress,
            kernel_manager_class=kernel,
        )
    except Exception as error:  # classes of papermill, nbclient and jupyter_client
        return error
    return None


def _never_started(error: Exception | None) -> bool:
    return isinstance(error, RuntimeError) and "before replying to kernel_info" in str(error)


def _outcome(
    output: Path, error: BaseException | None, watch: Watch, timeout_s: float | None, log: list[str]
) -> Outcome:
    """Decide the status, and write it into the notebook's own metadata."""
    from papermill.exceptions import PapermillExecutionError

    try:
        nb = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ended before the first write
        nb = None
    last, number = _last_started(nb)
    if error is None:
        if not (stopped := _error_output(nb)):
            return Outcome("ok")
        # papermill takes sys.exit(0) for success, though the cells after it never ran.
        status, found = "failed", {**stopped, "cell": number}
    elif watch.reason == "timeout":
        status = "timeout"
        value = f"not finished after {timeout_s:g} s (limit for the whole notebook)"
        found = {"name": "Timeout", "value": value, "cell": number}
    elif watch.reason:
        status = "interrupted"
        found = {"name": "Interrupted", "value": watch.reason, "cell": number}
    elif isinstance(error, PapermillExecutionError):
        status = "failed"
        found = {"name": error.ename, "value": error.evalue, "cell": error.exec_count}
    elif "died" in str(error).lower() or type(error).__name__ == "DeadKernelError":
        status = "dead-kernel"
        value = "the kernel died; where memory ran out the system kills it without a message"
        found = {"name": "DeadKernel", "value": value, "cell": number, "log": log}
    else:
        status = "failed"
        found = {"name": type(error).__name__, "value": str(error), "cell": number, "log": log}
    if nb is not None and status != "failed":
        _mend(nb, last, found)
        _write(output, nb)
    return Outcome(status, found)


def _shorten_paths(output: Path, source: Path) -> None:
    """Notebooks are shared: keep this machine's folders out of papermill's metadata."""
    with contextlib.suppress(OSError, ValueError):
        nb = json.loads(output.read_text(encoding="utf-8"))
        paths = {"input_path": source.name, "output_path": output.name}
        nb["metadata"].get("papermill", {}).update(paths)
        _write(output, nb)


def _write(path: Path, nb: dict) -> None:
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _last_started(nb: dict | None) -> tuple[int, int | None]:
    """Index of the last cell that began, and its number as in `In [n]`."""
    started = -1
    for index, cell in enumerate(nb["cells"] if nb else ()):
        if cell["metadata"].get("papermill", {}).get("start_time"):
            started = index
    cells = nb["cells"][: started + 1] if nb else []
    number = sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in cells)
    return started, number or None


def _error_output(nb: dict | None) -> dict[str, str] | None:
    for cell in nb["cells"] if nb else ():
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                return {"name": output["ename"], "value": output["evalue"]}
    return None


def _mend(nb: dict, last: int, error: dict[str, Any]) -> None:
    """Correct what papermill wrote: the last cell that began failed, those after it never ran."""
    nb["metadata"].setdefault("papermill", {})["exception"] = True
    for index, cell in enumerate(nb["cells"]):
        state = cell["metadata"].get("papermill", {})
        if index > last:
            state["status"] = "pending"
        elif index == last:
            state.update(status="failed", exception=True)
            if cell["cell_type"] == "code":
                text = f"{error['name']}: {error['value']}"
                cell["outputs"].append(
                    {
                        "output_type": "error",
                        "ename": error["name"],
                        "evalue": error["value"],
                        "traceback": [text],
                    }
                )


def _owned_kernel(env: dict[str, str], log: IO[bytes], watch: Watch) -> type[AsyncKernelManager]:
    """A kernel manager for this interpreter, whatever kernel specifications are installed."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python")

    class OwnedKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def _async_start_kernel(self, **options: Any) -> None:
            options |= processes.die_with_parent()
            with watch.lock:
                if watch.reason:
                    raise RuntimeError("stopped before the kernel started")
            options |= {"env": env, "stdout": log, "stderr": log}
            await super()._async_start_kernel(**options)
            with watch.lock:
                watch.pid = self.provisioner.pid
                if watch.reason:  # it came while the kernel was starting
                    watch.kill()

        start_kernel = _async_start_kernel

    return OwnedKernel


def kernel_env(*, offline: bool, gpu_uuid: str | None = None) -> dict[str, str]:
    """The environment of a kernel: this one, `lib` importable, no hub where it is not needed."""
    env = dict(os.environ)
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    env[BATCH_VARIABLE] = "1"
    env.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    env.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm without ipywidgets
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which NVML counts
    if offline:
        env.setdefault("HF_HUB_OFFLINE", "1")
    if gpu_uuid:
        env.setdefault("CUDA_VISIBLE_DEVICES", gpu_uuid)
    return env


def _tail(log: IO[bytes], lines: int = 20) -> list[str]:
    """The last lines that the kernel's process wrote, without its usual start-up remarks."""
    log.seek(0)
    text = log.read().decode(errors="replace").splitlines()
    return [x for x in text if x.strip() and not any(noise in x for noise in NOISE)][-lines:]
