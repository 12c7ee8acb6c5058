"""Quantised checkpoints: which methods load here, what they need, and how they are held.

A method that the library does not know would be skipped with a line in its log, and one whose
package is missing would fail in a notebook. Both are refused here, beforehand. Where the library
can expand a form without kernels of a hub, the weights are expanded when they are loaded; the
others stay as stored, and their own packages compute with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lib.models.card import ModelError

if TYPE_CHECKING:
    import torch

EXPANDED = "expanded when loaded"


@dataclass(frozen=True)
class Method:
    """Packages by the name that Python imports, with what pip installs; whether it is expanded
    when it is loaded; whether it needs a GPU."""

    packages: tuple[tuple[str, str], ...] = ()
    expanded: bool = False
    needs_gpu: bool = False


METHODS = {
    "mxfp4": Method(expanded=True),
    "fp8": Method(expanded=True),
    "mxfp8": Method(expanded=True),
    "gptq": Method((("optimum", "optimum"), ("gptqmodel", "gptqmodel"))),
    "awq": Method((("gptqmodel", "gptqmodel"),)),
    "auto-round": Method((("auto_round", "auto-round"),)),
    "bitsandbytes": Method((("bitsandbytes", "bitsandbytes"),)),
    "compressed-tensors": Method((("compressed_tensors", "compressed-tensors"),), expanded=True),
    "torchao": Method((("torchao", "torchao"),)),
    "quanto": Method((("optimum", "optimum-quanto"),)),
    "quark": Method((("quark", "amd-quark"),)),
    "hqq": Method((("hqq", "hqq"),)),
    "aqlm": Method((("aqlm", "aqlm[gpu,cpu]"),)),
    "vptq": Method((("vptq", "vptq"),), needs_gpu=True),
    "spqr": Method((("spqr_quant", "spqr_quant[gpu]"),), needs_gpu=True),
    "higgs": Method(
        (("flute", "flute-kernel"), ("fast_hadamard_transform", "fast_hadamard_transform")),
        needs_gpu=True,
    ),
    "fp_quant": Method((("fp_quant", "fp_quant"),), needs_gpu=True),
    "fbgemm_fp8": Method((("fbgemm_gpu", "fbgemm-gpu"),), needs_gpu=True),
    "bitnet": Method(),
    "sinq": Method((("sinq", "sinq"),)),
    "fouroversix": Method((("fouroversix", "fouroversix"),), needs_gpu=True),
}  # fmt: skip
# Their kernels come from a hub at run time, and code from a hub is never executed.
FROM_A_HUB = ("eetq", "metal", "nvfp4")


FIELDS = ("quantization_config", "compression_config")  # of a configuration


def forget(config: Any) -> None:
    """Take what a configuration says of quantisation out of it; its parts keep theirs."""
    for name in FIELDS:
        if hasattr(config, name):
            delattr(config, name)


def asked_for(config: Any) -> dict[str, Any] | None:
    """The quantisation that a configuration names, wherever it stands in it; None without one."""
    from transformers import PreTrainedConfig

    for name in FIELDS:
        form = getattr(config, name, None)
        if form is not None:
            return dict(form if isinstance(form, Mapping) else form.to_dict())
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and (form := asked_for(part)):
            return form
    return None


def method_of(asked: Mapping[str, Any] | None) -> str | None:
    """The name of the method, as `METHODS` has it."""
    if asked is None:
        return None
    if asked.get("load_in_4bit") or asked.get("load_in_8bit"):
        return "bitsandbytes"
    method = asked.get("quant_method")
    name = getattr(method, "value", method)
    return "not named" if name is None else str(name)


def require_loadable(name: str, asked: Mapping[str, Any] | None) -> None:
    """Raise unless this machine can load a checkpoint in this form; the message names the package
    to install."""
    method = method_of(asked)
    if method is None:
        return
    if method in FROM_A_HUB:
        raise ModelError(
            f"{name} is quantised by {method!r}, whose kernels come from a hub at run time; code "
            "from a hub is never executed here. Choose another form of this model"
        )
    if method not in METHODS or method not in _known_to_the_library():
        raise ModelError(
            f"{name} is quantised by quant_method {method!r}, which the installed transformers "
            "does not know: it would read the numbers without their scales. Choose another form "
            f"of this model (known: {', '.join(sorted(METHODS))}), or update transformers"
        )
    missing = [pip for module, pip in METHODS[method].packages if not _installed(module, pip)]
    if missing:
        raise ModelError(
            f"{name} is quantised by {method}, which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)} into this environment, or choose another form"
        )


def require_device(name: str, asked: Mapping[str, Any] | None, device_type: str) -> None:
    """Raise where the method computes on a GPU only and this is none."""
    method = method_of(asked)
    if method in METHODS and METHODS[method].needs_gpu and device_type != "cuda":
        raise ModelError(
            f"{name} is quantised by {method}, which computes on a GPU only, not on "
            f"{device_type}; choose another form, or another machine"
        )


def is_expanded(asked: Mapping[str, Any] | None) -> bool:
    """Whether the weights will lie in memory in the dtype that is asked for."""
    method = method_of(asked)
    return method is None or METHODS[method].expanded


def options(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `from_pretrained` has to be told beyond the file."""
    import transformers

    method = method_of(asked)
    if method == "mxfp4":
        return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    if method in ("fp8", "mxfp8"):
        return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    if method == "compressed-tensors":  # else its package expands them in the first step
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def values(asked: Mapping[str, Any] | None, net: torch.nn.Module) -> dict[str, str]:
    """What a row says of the form: as stored, and the modules that compute with it now."""
    method = method_of(asked)
    if method is None:
        return {}
    if METHODS[method].expanded:
        return {"stored_form": method, "held_form": EXPANDED}
    kinds = Counter(type(m).__name__ for m in net.modules() if is_quantised(m))
    if not kinds:
        return {"stored_form": method, "held_form": EXPANDED}
    return {
        "stored_form": method,
        "held_form": "as stored",
        "matrix_kernels": ", ".join(f"{name} ({n})" for name, n in kinds.most_common()),
        "matrix_packages": ", ".join(_versions(METHODS[method].packages)),
    }


def is_quantised(module: torch.nn.Module) -> bool:
    """Whether a module holds a matrix in whole numbers or in eight bits of floating point."""
    import torch

    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    whole = (torch.int8, torch.uint8, torch.int16, torch.int32)
    return any(
        t.dim() > 1 and (t.dtype in whole or (t.dtype.is_floating_point and t.element_size() == 1))
        for t in own
    )


def stored_bytes(net: torch.nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Bytes that each parameter of the architecture takes in a net that holds it quantised.

    `names` are those of the architecture without quantisation. What a quantised module keeps in
    place of a matrix (packed numbers, scales, zeros) counts as the matrix.
    """
    own = {name: p.nbytes for name, p in net.named_parameters()}
    if not any(is_quantised(m) for m in net.modules()):
        return {name: own.get(name, 0) for name in names}
    state = {k: t for k, t in net.state_dict().items() if hasattr(t, "nbytes")}
    sizes = {name: state[name].nbytes if name in state else 0 for name in names}
    for key, tensor in state.items():
        if key in sizes:
            continue
        owner = key
        while owner and owner not in sizes and f"{owner}.weight" not in sizes:
            owner = owner.rpartition(".")[0]
        place = owner if owner in sizes else f"{owner}.weight"
        if place in sizes:
            sizes[place] += tensor.nbytes
    return sizes


def _known_to_the_library() -> set[str]:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as methods

    return {name.removesuffix("_4bit").removesuffix("_8bit") for name in methods}


def _installed(module: str, pip: str) -> bool:
    if find_spec(module) is None:
        return False
    try:  # a folder of the same name is no package
        metadata.version(pip.partition("[")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def _versions(packages: Iterable[tuple[str, str]]) -> list[str]:
    names = [pip.partition("[")[0] for _, pip in packages]
    return [f"{name} {metadata.version(name)}" for name in names]
