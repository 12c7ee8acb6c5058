"""One notebook by papermill: a kernel that cannot outlive its runner, and how the run ended.

papermill's own engine marks every cell "completed" after its kernel died, timed out or was
interrupted, and writes over the file that it wrote before. The engine here tells what happened.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import IO, Any

import nbformat
import papermill
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill import engines
from papermill.clientwrap import PapermillNotebookClient
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger

from lib.files import BATCH_VARIABLE, ROOT, write_text
from lib.run import processes, warm

ENGINE = "workbook"
NOISE = (
    "without encryption",
    "TransportEncryption",
    "frozen modules",
    "PYDEVD_DISABLE",
    "Debugger",
    "Extension modules:",
    *(f"/{name}/" for name in ("ipykernel", "IPython", "asyncio", "tornado", "traitlets")),
    "<frozen runpy>",
    "ipykernel_launcher.py",
    "/threading.py",
)
DEATHS = {
    "SIGSEGV": "was ended by a segmentation fault: native code used memory that is not its own",
    "SIGABRT": "was aborted: native code found something wrong and gave up",
    "SIGBUS": "was ended by a bus error: a mapped file has shrunk, or memory could not be given",
    "SIGFPE": "was ended by an arithmetic fault of native code",
    "SIGILL": "was ended by an instruction that this processor lacks",
    "SIGTERM": "was asked to end by another process",
}
CAUSE = re.compile(
    r"CUDA error|[Aa]ssert(ion)?\b.*(fail|trigger)|what\(\):|NCCL|cuBLAS|cuDNN|Xid|"
    r"^\w*Error: |terminate called|free\(\)|corrupted|out of memory|bad_alloc"
)
LOOK_S = 1.0  # how often a reply is looked for without being woken
GRACE_S = 8.0  # schedulers and Docker kill ten seconds after their first signal or later


@dataclass
class Watch:
    """The kernel of the job in progress: can be stopped from a signal handler or a timer."""

    reason: str = ""  # why it was stopped: timeout or interrupted
    pid: int | None = None
    process: subprocess.Popen | None = None
    oom_kills: int = 0  # of this system when the kernel started
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
    worker: warm.Worker | None = None,
) -> Outcome:
    """Run a notebook by papermill into `output`, in the repository's root.

    `timeout_s` limits the whole notebook. Its kernel is a fork of the `worker`, where there is one.
    Every process that the notebook started is gone when this returns.
    """
    engines.papermill_engines.register(ENGINE, Engine)
    account, mark = Account(source, output, watch, timeout_s), uuid.uuid4().hex
    guard = processes.guard(mark)
    if worker:  # which has a guard of its own, and whose forks carry its mark
        mark, guard = worker.mark, contextlib.nullcontext()
    timer = threading.Timer(timeout_s or 0, watch.stop, ["timeout"])
    timer.daemon = True
    with tempfile.TemporaryFile() as log, guard, processes.adopt_orphans():
        children = {*processes.descendants(os.getpid())}
        if timeout_s:
            timer.start()
        try:
            papermill.execute_notebook(
                str(source).replace("{", "{{").replace("}", "}}"),  # it takes a format string
                None,  # the account writes
                parameters=parameters,
                engine_name=ENGINE,
                kernel_name="python3",
                language="python",
                cwd=str(ROOT),
                progress_bar=progress,
                account=account,
                kernel=_owned_kernel(env | {BATCH_VARIABLE: mark}, log, watch, worker),
            )
        except PapermillExecutionError as error:
            if account.outcome.status == "ok":  # a cell that went on shows an error
                account.outcome = Outcome("failed", _raised(error, error.exec_count))
        except Exception as error:  # classes of papermill, nbclient and jupyter_client
            account.fail(error)
        finally:
            timer.cancel()
            watch.kill()
            watch.pid = None
            processes.reap({*processes.descendants(os.getpid())} - children)
        outcome = account.outcome
        if outcome.error and "log" in outcome.error:
            lines = _lines(log)
            outcome.error["log"] = lines[-20:]
            if cause := _cause(lines):
                outcome.error["value"] += f"; its last words: {cause}"
    if account.nb is not None:
        with contextlib.suppress(OSError):
            account.save()  # with the marks that papermill puts before a failed cell
    return outcome


class Account(engines.NotebookExecutionManager):
    """papermill's account of a run, with what ended it; its file is never half of one."""

    nb = None  # until papermill has read the notebook and filled in the parameters

    def __init__(self, source: Path, output: Path, watch: Watch, timeout_s: float | None) -> None:
        self.source, self.output = source, output.absolute()
        self.watch, self.timeout_s = watch, timeout_s
        self.outcome = Outcome("ok")

    def begin(self, nb: nbformat.NotebookNode, progress_bar: bool) -> None:
        """The run begins: no cell has."""
        super().__init__(nb, self.output, progress_bar=progress_bar)
        # Notebooks are shared: they name no folder of this machine.
        nb.metadata.papermill.update(input_path=self.source.name, output_path=self.output.name)
        self.notebook_start()

    def save(self, **_: Any) -> None:
        """Write the notebook as it is now."""
        write_text(self.output, nbformat.writes(self.nb) + "\n")
        self.last_save_time = self.now()

    def fail(self, error: Exception) -> None:
        """The run ends by this error, in the cell that began last. The first error counts."""
        if self.outcome.status != "ok":
            return
        every = self.nb.cells if self.nb is not None else []
        cells = [cell for cell in every if cell.metadata.papermill["start_time"]]
        number = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in cells)
        self.outcome = _outcome(error, number or None, self.watch, self.timeout_s)
        if cells:
            self.cell_exception(cells[-1])
        elif every:
            self.nb.metadata.papermill["exception"] = True
        if cells and cells[-1].cell_type == "code" and self.outcome.status != "failed":
            name, value = self.outcome.error["name"], self.outcome.error["value"]
            output = {"ename": name, "evalue": value, "traceback": [f"{name}: {value}"]}
            cells[-1].outputs.append(nbformat.v4.new_output("error", **output))

    def notebook_complete(self, **_: Any) -> None:
        """The run has ended; a cell that has not begun stays pending, as papermill has it not."""
        self.end_time = self.now()
        duration_s = (self.end_time - self.start_time).total_seconds()
        self.nb.metadata.papermill.update(end_time=self.end_time.isoformat(), duration=duration_s)
        self.cleanup_pbar()
        self.save()


def look_again(channel: AsyncZMQSocketChannel) -> None:
    """Let a channel that waits without a limit look for a message each second.

    Widgets send on the socket that a reply is awaited on, and a send can take the only wake-up that
    the reply has given: the cell is done, and its reader sleeps for ever.
    """
    wait = channel.get_msg

    async def get_msg(timeout: float | None = None) -> dict[str, Any]:
        while timeout is None:
            with contextlib.suppress(Empty):
                return await wait(timeout=LOOK_S)
        return await wait(timeout=timeout)

    channel.get_msg = get_msg


class Client(PapermillNotebookClient):
    """Tells the account of all that ends a cell, of which papermill knows exceptions alone."""

    def start_new_kernel_client(self) -> AsyncKernelClient:
        client = super().start_new_kernel_client()
        look_again(client.shell_channel)
        return client

    def execute_cell(
        self, cell: nbformat.NotebookNode, cell_index: int, **options: Any
    ) -> nbformat.NotebookNode:
        try:
            return super().execute_cell(cell, cell_index, **options)
        except Exception as error:
            self.nb_man.fail(error)
            raise


class Engine(engines.Engine):
    """papermill's engine with the account and the kernel that it is handed."""

    @classmethod
    def execute_notebook(
        cls,
        nb: nbformat.NotebookNode,
        kernel_name: str,
        *,
        account: Account,
        kernel: type[AsyncKernelManager],
        progress_bar: bool,
        **_: Any,
    ) -> nbformat.NotebookNode:
        client = functools.partial(
            Client, account, kernel_name=kernel_name, kernel_manager_class=kernel, log=logger
        )
        account.begin(nb, progress_bar)
        try:
            try:
                client().execute()
            except RuntimeError as error:
                # Ports are chosen before the kernel takes them; another process may be faster.
                if account.watch.reason or "before replying to kernel_info" not in str(error):
                    raise
                client().execute()
        except Exception as error:
            account.fail(error)
            raise
        finally:
            account.notebook_complete()
        return nb


def _outcome(error: Exception, cell: int | None, watch: Watch, timeout_s: float | None) -> Outcome:
    """The status of a run that ended by this error; `log` is filled in when the kernel is gone."""
    if watch.reason == "timeout":
        value = f"not finished after {timeout_s:g} s (limit for the whole notebook)"
        return Outcome("timeout", {"name": "Timeout", "value": value, "cell": cell})
    if watch.reason:
        entry = {"name": "Interrupted", "value": watch.reason, "cell": cell}
        return Outcome("interrupted", entry)
    if isinstance(error, CellExecutionError):
        return Outcome("failed", _raised(error, cell))
    status, name, value = "failed", type(error).__name__, str(error)
    if isinstance(error, DeadKernelError) or "died" in value.lower():
        status, name, value = "dead-kernel", "DeadKernel", f"the kernel {_death(watch)}"
    return Outcome(status, {"name": name, "value": value, "cell": cell, "log": []})


def _death(watch: Watch) -> str:
    """How the kernel's process ended, by its exit status."""
    code = watch.process.poll() if watch.process is not None else None
    if code is None:
        return "does not answer, and its process lives: something holds it"
    if code >= 0:
        how = "as os._exit or exit() in a library does"
        return f"ended by itself with status {code}, {how}"
    if code == -signal.SIGKILL:
        if _oom_kills() > watch.oom_kills:
            return "was killed by the system, for memory ran out: take a smaller model or context"
        return "was killed from outside (SIGKILL), and not for want of memory as far as is known"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"was ended by signal {-code}"
    return f"{DEATHS.get(name, 'was ended')} ({name})"


def _oom_kills() -> int:
    """How often this system has killed a process because memory ran out; 0 where unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _cause(log: list[str]) -> str:
    """The line of a dead kernel's log that says why, if one does."""
    lines = [line.strip() for line in log if CAUSE.search(line)]
    return lines[0][:300] if lines else ""


def _raised(error: CellExecutionError | PapermillExecutionError, cell: int | None) -> dict:
    return {"name": error.ename, "value": error.evalue, "cell": cell}


def _owned_kernel(
    env: dict[str, str], log: IO[bytes], watch: Watch, worker: warm.Worker | None
) -> type[AsyncKernelManager]:
    """A kernel manager for this interpreter, whatever kernel specifications are installed."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python")

    class OwnedKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def _async_start_kernel(self, **options: Any) -> None:
            with watch.lock:
                if watch.reason:
                    raise RuntimeError("stopped before the kernel started")
            watch.oom_kills = _oom_kills()
            options |= {"env": env, "stdout": log, "stderr": log}
            await super()._async_start_kernel(**options)
            with watch.lock:
                watch.pid, watch.process = self.provisioner.pid, self.provisioner.process
                if watch.reason:  # it came while the kernel was starting
                    watch.kill()

        async def _async_launch_kernel(self, command: list[str], **options: Any) -> None:
            environ = {**options["env"], "JPY_PARENT_PID": str(os.getpid())}
            child = worker and worker.fork(command[3:], environ, log.fileno())
            if not child:
                await super()._async_launch_kernel(command, **options)
                return
            ours = self.provisioner
            ours.process, ours.pid, ours.pgid, ours.cwd = child, child.pid, child.pid, ROOT
            self._reconcile_connection_info(ours.connection_info)

        start_kernel = _async_start_kernel
        _launch_kernel = _async_launch_kernel

    return OwnedKernel


def kernel_env(*, offline: bool, gpu_uuids: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a kernel: this one, `lib` importable, no hub where it is not needed.

    The kernel sees the GPUs (or the MIG slice) that are held and no other, whatever was visible
    before.
    """
    env = dict(os.environ)
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    env.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("PYTHONFAULTHANDLER", "1")
    env.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    env.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm without ipywidgets
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which NVML counts
    if offline:
        env.setdefault("HF_HUB_OFFLINE", "1")
    if gpu_uuids:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpu_uuids)
    return env


def _lines(log: IO[bytes]) -> list[str]:
    """What the kernel's process wrote, without its usual start-up remarks and its own frames."""
    log.seek(0)
    text = log.read().decode(errors="replace").splitlines()
    return [x for x in text if x.strip() and not any(noise in x for noise in NOISE)]
