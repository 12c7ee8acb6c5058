"""What is measured under load: a server that runs, or one that is started for a model of ours.

A kind of server that is started needs its model in its own way: transformers serves a folder, and
vLLM one too, or draws its weights by name as the workbook's nets are drawn.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.measure.serving import kinds, server, words
from lib.measure.serving.plan import Endpoint
from lib.models import draws, load
from lib.models import origin as origins
from lib.records.kinds import UNKNOWN
from lib.stacks import vllm_settings as vllm

# Ids that any vocabulary has, without the first, which are often special ones: for prompts of a
# server whose vocabulary is not known.
SOME_IDS, FIRST_IDS = 1000, 100


@dataclass(frozen=True)
class Target:
    """A model and how it is served.

    `url` names a server that runs; without one, a server of `kind` is started: "vllm", or
    "transformers", by default vllm on a GPU. `form` is what the weights are held in where it is not
    `dtype` (mxfp4, fp8); `options` are added to the server's command.
    """

    model: str
    weights: str = "random"
    dtype: str = "bfloat16"
    form: str = ""
    url: str = ""
    kind: str = ""
    api: str = "completions"
    options: tuple[str, ...] = ()
    continuous_batching: bool = False


@dataclass(frozen=True)
class Opened:
    """A target that answers: its endpoint, and what its rows say of it."""

    endpoint: Endpoint
    key: dict[str, Any]
    values: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def opened(
    target: Target, device: Any, *, seed: int, longest: int, users: int, log: Path
) -> Iterator[Opened]:
    """The target, until the block ends; a server that was started ends with it.

    `longest` are the tokens of the longest request, answer included, `users` the most at one time.
    Raises EndpointError where there is no server.
    """
    if target.url:
        yield running(target)
        return
    kind = target.kind or ("vllm" if device.kind == "cuda" else "transformers")
    key = {"weights": target.weights, "dtype": target.form or target.dtype}
    origin = origins.find(target.model)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "vllm":
            recipe = _drawn(target, origin, Path(folder), seed, longest, users)
        else:
            recipe = _folder(target, origin, Path(folder), device, kind, seed)
        options = (*recipe.options, *target.options)
        batching = target.continuous_batching or None
        with server.start(
            kind,
            str(recipe.model),
            options=options,
            log=log,
            continuous_batching=batching,
            environment=recipe.environment,
            served_as=recipe.name,
            api=target.api,
            **recipe.endpoint,
        ) as process:
            values = {**process.values, **recipe.values, "loaded_dtype": key["dtype"]}
            # What the folder holds is ours alone; a row says what was asked of the server.
            values["server_options"] = [text.replace(folder, "...") for text in options]
            yield Opened(process.endpoint, {"model": origin.name, **key}, values)


def running(target: Target) -> Opened:
    """A server that runs, as it names itself; what its weights are it does not say."""
    name = target.model or server.models(target.url)[0]["id"]
    kind = target.kind or server.kind_of(target.url)
    endpoint = Endpoint(
        server.base(target.url),
        name,
        kind,
        target.api,
        vocab_size=SOME_IDS,
        special_ids=tuple(range(FIRST_IDS)),
    )
    key = {"model": Path(name).name if name.startswith("/") else name}  # a folder is its own affair
    key |= {"weights": UNKNOWN, "dtype": UNKNOWN}
    values = {"server": kind, "model_source": "as served", "model_revision": None}
    missing = {}
    if not server.is_local(target.url):
        missing["energy_j"] = "the server runs on another machine, whose board is not read"
    return Opened(endpoint, key, values | {"loaded_dtype": UNKNOWN}, missing)


@dataclass(frozen=True)
class _Served:
    """What a server is started with: folder, options, environment, and fields of its Endpoint."""

    model: Path
    options: tuple[str, ...]
    endpoint: dict[str, Any]
    values: dict[str, Any]
    environment: Mapping[str, str] | None = None
    name: str | None = None  # by which it is asked for, where that is not the folder


def _folder(
    target: Target, origin: Any, folder: Path, device: Any, kind: str, seed: int
) -> _Served:
    """A folder with weights and a tokenizer, as most servers take it."""
    from transformers import AutoTokenizer

    if target.weights == "random":
        values = random_checkpoint(target.model, folder, target.dtype, seed)
    else:
        folder, values = origins.files(origin)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = kinds.kind(kind).model_options(device.torch_device, target.dtype)
    return _Served(folder, options, {"tokenizer": tokenizer}, values)


def random_checkpoint(model: str, folder: Path, dtype: str, seed: int) -> dict[str, Any]:
    """Write a model with random weights and a tokenizer of words; returns where it comes from."""
    from lib.hardware.device import CpuDevice

    net = load.load(model, weights="random", dtype=dtype, device=CpuDevice(), seed=seed)
    net.net.save_pretrained(folder)
    words.write(folder, net.vocab_size)
    return {name: net.source[name] for name in ("model_source", "model_revision")}


def _drawn(
    target: Target, origin: Any, folder: Path, seed: int, longest: int, users: int
) -> _Served:
    """vLLM's: weights that it draws by name itself, so that none lie on a disk; or a checkpoint."""
    config = origins.config_of(origin)
    checkpoint, values = None, {"model_source": f"drawn by name (seed {seed})"}
    values |= {"model_revision": None, "draws_generator": draws.GENERATOR}
    if target.weights != "random":
        checkpoint, values = origins.files(origin)
    settings = vllm.Settings(
        max_model_len=longest,
        max_num_seqs=users,
        form=target.form or target.dtype,
        weights="checkpoint" if checkpoint else "random",
        checkpoint=checkpoint and str(checkpoint),
        seed=seed,
        graph_sizes=tuple(2**n for n in range(users.bit_length())),
    )
    net, laws = draws.build(config, "bfloat16", "meta")
    tensors = draws.plan_of(net, laws)
    data = vllm.config_of(config, type(net).__name__, settings)
    arguments = vllm.arguments_of(data, tensors, settings, folder)
    model = arguments.pop("model")
    del arguments["worker_extension_cls"]  # of the engine that answers through a pipe
    if checkpoint:  # its tokenizer is there, and a deployed server shows text
        del arguments["skip_tokenizer_init"]
    place = folder / "beside"
    place.mkdir()
    environment = vllm.environment(vllm.lay_out(place))
    options = (*flags(arguments), "--served-model-name", origin.name)
    vocabulary = {"vocab_size": config.get_text_config(decoder=True).vocab_size}
    return _Served(Path(model), options, vocabulary, values, environment, origin.name)


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of vLLM's engine as its server's command line takes them."""
    options = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            options += [f"--{flag}", text]
    return options
