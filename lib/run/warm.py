"""A process that has imported what notebooks need; the kernel of each is a fork of it.

Importing torch, transformers and pandas takes as long as many a notebook measures; a fork has them
at once. It is a process of its own all the same: it opens the GPU itself, loads its own model, dies
alone and gives all of its memory back, so that a notebook begins where one in a new interpreter
does. The process that is forked never opens a GPU, and says so before each fork. Linux only, where
a fork becomes the runner's own child; elsewhere, and where anything is wrong, a kernel is started
as ever.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import pkgutil
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.files import (
    BATCH_VARIABLE,
    NEIGHBOURS_VARIABLE,
    ROOT,
    SHARED_VARIABLE,
    START_VARIABLE,
)
from lib.run import plan, processes

LATE = ("CUDA_VISIBLE_DEVICES", START_VARIABLE, SHARED_VARIABLE, NEIGHBOURS_VARIABLE)
PATIENCE_S = 120.0  # for imports from a slow disk
KERNEL = ("ipykernel.kernelapp", "ipykernel.ipkernel", "matplotlib_inline.backend_inline")
# matplotlib is there before the kernel is, which would else be told of it as it is imported.
FIGURES = "--InteractiveShellApp.matplotlib=inline"
# What is imported inside functions, so that the reading side does without.
LOADING = (
    "lib.models.dry_run",
    "lib.stacks.generate",
    "lib.stacks.graph",
    "transformers.AutoModelForCausalLM",
    "transformers.AutoTokenizer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
)


class Child:
    """A forked kernel as jupyter_client knows a process; its parent is this process."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int:
        """The exit status, when it has ended."""
        return self._waited(0)

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # collected by another hand, as Popen has it
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class Worker:
    """The process that is forked: its environment, and the code that it has imported."""

    def __init__(self, names: Sequence[str], env: Mapping[str, str], mark: str) -> None:
        self.mark, self.env, self.lib_sha = mark, early(env), plan.lib_sha()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(PATIENCE_S)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lib.run.warm", str(theirs.fileno()), json.dumps(names)],
                cwd=ROOT,
                env={**env, BATCH_VARIABLE: mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the runner, which ends this
            )

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], log: int) -> Child | None:
        """A kernel with these arguments whose output goes to the file `log`; None where the worker
        cannot: it has died, does not answer, or holds a GPU. Orphans must be adopted meanwhile."""
        order = {"arguments": [*arguments], "env": {**env}}
        try:
            socket.send_fds(self.channel, [json.dumps(order).encode()], [log])
            answer = json.loads(self.channel.recv(64) or "null")
        except (OSError, ValueError):
            return None
        return Child(answer) if answer else None

    def close(self) -> None:
        """End the process; kernels that were forked go on."""
        self.channel.close()
        self.process.kill()
        self.process.wait()


class Warm(contextlib.AbstractContextManager):
    """The worker of a run, made anew where its environment, the code of `lib` or its life ends.

    `sources` are the notebooks to come; with fewer than two of them nothing is worth it.
    """

    def __init__(self, sources: Sequence[Path]) -> None:
        self.names = imports(sources) if len(sources) > 1 and sys.platform == "linux" else []
        self.worker: Worker | None = None
        self._stack = contextlib.ExitStack()

    def __exit__(self, *_: object) -> None:
        self._end()

    def ready(self, env: Mapping[str, str]) -> Worker | None:
        """A worker of this environment; it may still import."""
        if not self.names:
            return None
        now, today = self.worker, (early(env), plan.lib_sha())
        if now and (now.env, now.lib_sha) == today and now.process.poll() is None:
            return now
        self._end()
        mark = uuid.uuid4().hex
        self._stack.enter_context(processes.guard(mark))
        self.worker = Worker(self.names, env, mark)
        self._stack.callback(self.worker.close)
        return self.worker

    def _end(self) -> None:
        self.worker = None
        self._stack.close()


def early(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without what is read after the imports only, by the fork for itself."""
    return {name: value for name, value in env.items() if name not in LATE}


def imports(sources: Sequence[Path]) -> list[str]:
    """Dotted names of what notebooks import, and what they name of it: lib.files.resolve."""
    imported: set[str] = set()
    named: set[str] = set()
    for path in sources:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in (c for c in cells if c["cell_type"] == "code"):
            with contextlib.suppress(SyntaxError):  # a cell of another language
                for node in ast.walk(ast.parse("".join(cell["source"]))):
                    if isinstance(node, ast.Import):
                        imported |= {alias.name for alias in node.names}
                    elif isinstance(node, ast.ImportFrom):
                        imported |= {f"{node.module}.{alias.name}" for alias in node.names}
                    elif isinstance(node, ast.Attribute):
                        named.add(f"lib.{ast.unparse(node)}")
    return sorted(imported | {n for n in named if ".".join(n.split(".")[:2]) in imported})


def holds_gpu() -> bool:
    """Whether this process has opened an NVIDIA device, which no fork of it could use again."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor is gone by now
            if str(entry.readlink()).startswith("/dev/nvidia"):
                return True
    return False


def load(names: Sequence[str]) -> None:
    """Import what has these names; what cannot be is the notebook's to tell."""
    for name in (*KERNEL, *names):
        with contextlib.suppress(Exception):
            pkgutil.resolve_name(name)
    for name in LOADING if "transformers" in sys.modules else ():
        with contextlib.suppress(Exception):
            pkgutil.resolve_name(name)


def serve(channel: socket.socket) -> list[str] | None:
    """Fork at each order until the other end closes; in a fork, the arguments of its kernel."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 2**20, 1)
        if not message:
            return None
        if holds_gpu():
            channel.send(b"null")
            os.close(descriptors[0])
            continue
        here, there = os.pipe()
        if not (between := os.fork()):
            between = os.getpid()
            if pid := os.fork():
                os.write(there, str(pid).encode())
                os._exit(0)  # so that the runner, which adopts orphans, is the kernel's parent
            while os.getppid() == between:
                time.sleep(0.001)
            return become(json.loads(message), descriptors[0], (channel.detach(), here, there))
        os.waitpid(between, 0)
        channel.send(os.read(here, 64))
        for descriptor in (here, there, *descriptors):
            os.close(descriptor)


def become(order: dict, log: int, others: Sequence[int]) -> list[str]:
    """Turn this fork into the process that a kernel begins in; returns the kernel's arguments."""
    os.setsid()
    for number in (1, 2):
        os.dup2(log, number)
    for descriptor in (log, *others):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["env"])
    return order["arguments"]


def main(descriptor: str, names: str) -> None:
    """Import, then fork; in a fork, be a kernel."""
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    if sys.path and Path(sys.path[0] or ".") == Path.cwd():
        del sys.path[0]  # as ipykernel_launcher does
    load(json.loads(names))
    gc.freeze()  # so that a fork's collector leaves alone what all of them share
    arguments = serve(socket.socket(fileno=int(descriptor)))
    if arguments is not None:
        from ipykernel import kernelapp

        kernelapp.launch_new_instance(argv=[*arguments, FIGURES])


if __name__ == "__main__":
    main(*sys.argv[1:])
