"""One measurement at a time: which GPUs there are (NVML, without torch), and locks on them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there, runs are not kept apart
    fcntl = None


class BusyError(RuntimeError):
    """Another run holds what this one needs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML lists it, in PCI bus order."""

    uuid: str
    name: str
    processes: int = 0  # compute processes on it when it was listed


def gpus() -> list[Gpu]:
    """All NVIDIA GPUs of this machine; an empty list where NVML is absent or sees none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: each has a class of its own
        return []
    cards = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            try:
                processes = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
            except pynvml.NVMLError:
                processes = 0
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            cards.append(Gpu(uuid, name, processes))
    except pynvml.NVMLError as error:
        raise BusyError(
            f"the NVIDIA driver answers with an error ({error}); see what nvidia-smi and the "
            "system's log say of it, and reset or restart the GPU"
        ) from None
    return cards


def visible(all_gpus: list[Gpu], env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES allows, in its order; all where it is not set."""
    if "CUDA_VISIBLE_DEVICES" not in env:
        return all_gpus
    cards = []
    for item in env["CUDA_VISIBLE_DEVICES"].split(","):
        text = item.strip()
        if text.isdigit():
            match = all_gpus[int(text) : int(text) + 1]
        else:
            match = [gpu for gpu in all_gpus if text and gpu.uuid.startswith(text)]
        if not match:
            break  # CUDA, too, stops at the first entry that names no GPU
        cards += match
    return cards


@contextlib.contextmanager
def lock(name: str, *, what: str, wait: bool = False, folder: Path | None = None) -> Iterator[None]:
    """Hold the lock `name` of this machine; the system frees it when the process ends, however.

    Without `wait`, a lock that is taken raises BusyError with `what` and the holder's process id.
    """
    if fcntl is None:
        yield
        return
    descriptor = _open(folder or shared(), f"workbook-{name}.lock")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise BusyError(
                f"{what} is in use by another run (process {holder}); two at once would disturb "
                "each other's numbers. Wait for it, or use --wait (make report WAIT=1)"
            ) from None
        with contextlib.suppress(OSError):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def shared() -> Path:
    """The folder of locks: one for this machine, whoever the user and whatever TMPDIR says."""
    return next((p for p in map(Path, ("/run/lock", "/tmp")) if _is_shared(p)), Path("/tmp"))


def _is_shared(folder: Path) -> bool:
    """Everyone may write there, and nobody may replace another one's file (sticky)."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_ISVTX) and bool(mode & stat.S_IWOTH)


def _open(folder: Path, name: str) -> int:
    """A descriptor of a lock file, which is never a link, and is left as it is if not ours."""
    path, flags = folder / name, os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            # Not O_CREAT on a file that is there: of another user's, Linux refuses it in /tmp.
            descriptor = os.open(path, os.O_RDWR | flags)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
                os.fchmod(made, 0o666)  # whatever the umask: others must be able to lock it
                return made
            descriptor = os.open(path, os.O_RDWR | flags)
        except PermissionError:  # another user's file: reading is enough to lock it
            descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise BusyError(
            f"the lock {path} cannot be opened ({error.strerror}); it must be a plain file that "
            "all users may read: remove it when no run is in progress"
        ) from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        os.close(descriptor)
        raise BusyError(f"the lock {path} is no plain file of one name; remove it")
    return descriptor


@contextlib.contextmanager
def lease(
    candidates: list[Gpu], *, wait: bool = False, folder: Path | None = None
) -> Iterator[Gpu]:
    """The first GPU of the list that no other run holds, held until the block ends."""
    with contextlib.ExitStack() as stack:
        for gpu in candidates:
            last = gpu is candidates[-1]
            what = f"GPU {gpu.name} ({gpu.uuid})" if len(candidates) == 1 else "every visible GPU"
            try:
                stack.enter_context(lock(gpu.uuid, what=what, wait=wait and last, folder=folder))
            except BusyError:
                if last:
                    raise
                continue
            yield gpu
            return
