"""One measurement at a time: which GPUs there are (NVML, without torch), and locks on them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.files import ParamsError
from lib.hardware import memory_in_use

try:
    import fcntl
except ImportError:  # not on Windows: there, runs are not kept apart
    fcntl = None


_NUMBER = re.compile("-?[0-9]+")


class BusyError(RuntimeError):
    """Another run holds what this one needs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML lists it, in PCI bus order, or one of its MIG slices."""

    uuid: str
    name: str
    slices: tuple[Gpu, ...] = ()  # where MIG is on


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
            cards.append(replace(_gpu(pynvml, handle), slices=tuple(_slices(pynvml, handle))))
    except pynvml.NVMLError as error:
        raise BusyError(
            f"the NVIDIA driver answers with an error ({error}); see what nvidia-smi and the "
            "system's log say of it, and reset or restart the GPU"
        ) from None
    return cards


def _gpu(nvml: Any, handle: Any) -> Gpu:
    return Gpu(nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle))


def _slices(nvml: Any, handle: Any) -> Iterator[Gpu]:
    """The MIG slices of a GPU; none where it is not split, or the driver does not know MIG."""
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except (nvml.NVMLError, AttributeError):
        return
    for index in range(count):
        with contextlib.suppress(nvml.NVMLError):  # fewer slices than there may be at most
            yield _gpu(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))


def visible(all_gpus: list[Gpu], env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs and MIG slices that CUDA_VISIBLE_DEVICES allows, in its order; all where it is not
    set. A GPU that is split stands for its slices. Raises ParamsError for a name that leads to
    nothing, where CUDA would stop without a word and leave no GPU."""
    if "CUDA_VISIBLE_DEVICES" not in env:
        return _open(all_gpus)
    cards: list[Gpu] = []
    for item in env["CUDA_VISIBLE_DEVICES"].split(","):
        text = item.strip()
        if _NUMBER.fullmatch(text):
            match = _by_number(all_gpus, int(text), env)
        else:
            match = _by_uuid(all_gpus, text)
        if not match and not cards and text not in ("", "-1", "none", "NoDevFiles"):
            raise ParamsError(_nothing(text, all_gpus))
        if not match:
            break  # CUDA, too, stops at the first entry that names no GPU
        if match[0] in cards:
            raise ParamsError(
                f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} names {match[0].uuid} twice, "
                "and CUDA then shows no GPU at all; name each once"
            )
        cards += match
    return _open(cards)


def _open(gpus: list[Gpu]) -> list[Gpu]:
    return [one for gpu in gpus for one in gpu.slices or (gpu,)]


def _by_number(all_gpus: list[Gpu], number: int, env: Mapping[str, str]) -> list[Gpu]:
    """The GPU that CUDA counts so: as the driver does, unless the fastest come first."""
    if number < 0 or number >= len(all_gpus):
        return []
    if env.get("CUDA_DEVICE_ORDER") == "FASTEST_FIRST" and len({g.name for g in all_gpus}) > 1:
        raise ParamsError(
            f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} with CUDA_DEVICE_ORDER="
            "FASTEST_FIRST names a GPU by its speed, and which one that is only CUDA knows; name "
            f"it by its UUID ({', '.join(g.uuid for g in all_gpus)}), or set CUDA_DEVICE_ORDER="
            "PCI_BUS_ID, the order of nvidia-smi"
        )
    return [all_gpus[number]]


def _by_uuid(all_gpus: list[Gpu], text: str) -> list[Gpu]:
    """The GPU or slice with this UUID, or the only one whose UUID begins so."""
    if not text:
        return []
    every = [one for gpu in all_gpus for one in (gpu, *gpu.slices)]
    match = [one for one in every if one.uuid == text] or [
        one for one in every if one.uuid.startswith(text)
    ]
    if len(match) > 1:
        raise ParamsError(
            f"CUDA_VISIBLE_DEVICES={text} fits {', '.join(one.uuid for one in match)}; give one "
            "UUID in full"
        )
    if not match and text.startswith("MIG-GPU-"):  # how drivers before R470 named a slice
        parent = text.removeprefix("MIG-").partition("/")[0]
        match = [gpu for gpu in all_gpus if gpu.uuid == parent and gpu.slices]
    return match


def _nothing(text: str, all_gpus: list[Gpu]) -> str:
    listed = ", ".join(one.uuid for gpu in all_gpus for one in (gpu, *gpu.slices)) or "none"
    what = "a MIG slice" if text.startswith("MIG") else "a GPU"
    return (
        f"CUDA_VISIBLE_DEVICES={text} names {what} that the driver does not list (it lists: "
        f"{listed}); `nvidia-smi -L` shows GPUs and MIG slices with their UUIDs"
    )


MPS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
VIRTUAL = (2, 3)  # NVML's modes of a virtual GPU, and of a board that is given out as several
IDLE_BYTES = 10**8  # a driver alone holds less, a process with CUDA more


def shared_by(gpu: Gpu, env: Mapping[str, str] = os.environ) -> str:
    """Why others may use a GPU that this run holds, as the driver tells now; empty where nothing
    says so. A neighbour in another container shows by the memory that is in use."""
    if gpu.uuid.startswith("MIG-"):
        return "it is a MIG slice, and others may use the rest of its board"
    if names := [name for name in MPS if env.get(name)]:
        return f"{names[0]} is set, so that MPS divides it"
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    except Exception:  # as in `gpus`
        return ""
    with contextlib.suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetVirtualizationMode(handle) in VIRTUAL:
            return "it is virtual (vGPU), and its board divides its time"
    if count := memory_in_use.process_count(nvml, handle):
        return f"{count} other process(es) use it"
    used = memory_in_use.gpu_used_bytes(nvml, handle)[0] or 0
    with contextlib.suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetDisplayActive(handle):  # a screen's memory is no neighbour
            return ""
    if used > IDLE_BYTES:
        return f"{used / 1e9:.1f} GB of its memory are in use, as where its time is sliced"
    return ""


def shared_error(gpu: Gpu, reason: str) -> BusyError:
    """What to say where a GPU that is shared would measure what is to be compared."""
    return BusyError(
        f"GPU {gpu.name} ({gpu.uuid}) is shared: {reason}. What is to be compared needs a whole "
        "GPU to itself: ask the scheduler for one, or name another in CUDA_VISIBLE_DEVICES"
    )


@contextlib.contextmanager
def lock(name: str, *, what: str, wait: bool = False, folder: Path | None = None) -> Iterator[None]:
    """Hold the lock `name` of this machine; the system frees it when the process ends, however.

    Without `wait`, a lock that is taken raises BusyError with `what` and the holder's process id.
    """
    if fcntl is None:
        yield
        return
    descriptor = _open_lock(folder or shared(), f"workbook-{name}.lock")
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


def _open_lock(folder: Path, name: str) -> int:
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


def alike(gpus: list[Gpu], count: int) -> list[Gpu]:
    """The GPUs that a model can be sharded over `count` of: those of the first kind that is there
    so often. Raises ParamsError where there are too few."""
    names = [gpu.name for gpu in gpus]
    kind = next((name for name in names if names.count(name) >= count), None)
    if count > 1 and kind is None:
        raise ParamsError(
            f"devices: {count} needs so many GPUs of one kind, and {len(gpus)} can be seen here "
            f"({', '.join(names) or 'none'}); use DEVICES=1, a host that has them, or name more in "
            "CUDA_VISIBLE_DEVICES"
        )
    return [gpu for gpu in gpus if count == 1 or gpu.name == kind]


@contextlib.contextmanager
def lease(
    candidates: list[Gpu], count: int = 1, *, wait: bool = False, folder: Path | None = None
) -> Iterator[list[Gpu]]:
    """The first `count` GPUs of the list that no other run holds, held until the block ends.

    Where so many are not free, `wait` waits for the last ones of the list: it lets go of all, and
    takes these in the order of their numbers, so that two that wait never hold what the other
    lacks.
    """
    one_by_one = count > 1 or len(candidates) == 1
    with contextlib.ExitStack() as stack:
        held: list[Gpu] = []
        busy: BusyError | None = None
        for gpu in candidates:
            what = _called(gpu) if one_by_one else "every visible GPU"
            try:
                stack.enter_context(lock(gpu.uuid, what=what, folder=folder))
            except BusyError as error:
                busy = error
                continue
            held.append(gpu)
            if len(held) == count:
                break
        if len(held) < count:
            if not wait:
                raise busy
            stack.close()
            held = candidates[-count:]
            for gpu in sorted(held, key=lambda gpu: gpu.uuid):
                stack.enter_context(lock(gpu.uuid, what=_called(gpu), wait=True, folder=folder))
        yield held


def _called(gpu: Gpu) -> str:
    return f"GPU {gpu.name} ({gpu.uuid})"


def together(gpus: list[Gpu]) -> str:
    """What some GPUs of one kind are called, as in the environment of what runs on them."""
    return f"{len(gpus)} x {gpus[0].name}" if len(gpus) > 1 else gpus[0].name if gpus else "cpu"
