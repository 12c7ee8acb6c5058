"""Weights drawn by name for vLLM, in the names of the hub's checkpoint.

vLLM loads this module by an entry point of the group `vllm.general_plugins`, in every process of
its own, so that workers see it too; it registers the load format `drawn`. The loader yields one
tensor after another, and the model's own `load_weights` fuses and shards them as it would those of
a checkpoint: each of several GPUs draws every tensor whole and keeps its part. Imports nothing of
lib: it lies beside `draws.py` in a folder on the path of vLLM's interpreter.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOAD_FORMAT = "drawn"
GROUP = "vllm.general_plugins"
_PR_SET_PDEATHSIG = 1
REPORT: dict[str, Any] = {}  # what was loaded in this process


def register() -> None:
    """The entry point: registers the load format, and has this process end with the one above it.

    vLLM's own core and workers outlive a parent that is killed, and hold the GPU's memory.
    """
    end_with_parent()
    from vllm.model_executor.model_loader import register_model_loader

    register_model_loader(LOAD_FORMAT)(loader_class())


def end_with_parent() -> None:
    """Have the system kill this process when the one above it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def loader_class() -> type:
    """The loader. Made when asked, since its base class is vLLM's."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class DrawnLoader(DefaultModelLoader):
        """Yields tensors drawn by name; `plan` in the extra config is the path of a plan."""

        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config
            self.local_expert_ids = None
            self.enable_weights_track = None  # vLLM's own check that nothing was left out
            self.options = dict(load_config.model_loader_extra_config)

        def download_model(self, model_config: Any) -> None:
            """Nothing is downloaded."""

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            self.counter_before_loading_weights = time.perf_counter()
            yield from drawn(device=_device(), **self.options)

        def load_weights(self, model: Any, model_config: Any) -> None:
            super().load_weights(model, model_config)
            REPORT["seconds"] = time.perf_counter() - self.counter_before_loading_weights

    return DrawnLoader


def drawn(plan: str, form: str = "", device: Any = "cpu") -> Iterator[tuple[str, Any]]:
    """Names and tensors of a saved plan; `form` "mxfp4" stores experts as gpt-oss is published.

    REPORT fills with what was yielded.
    """
    draws = sibling("draws")
    wanted, seed = draws.restore(Path(plan).read_text(encoding="utf-8"))
    REPORT.clear()
    REPORT.update(generator=draws.GENERATOR, seed=seed, digest=draws.digest(wanted, seed))
    REPORT.update(form=form, tensors=0, values=0, quantised=0)
    for draw in wanted:
        values = math.prod(draw.shape)
        REPORT["values"] += values
        if form == "mxfp4" and draws.is_mxfp4_name(draw.name):
            # Expert by expert: a whole tensor of a large mixture takes gigabytes in bfloat16.
            rows = (range(n, n + 1) for n in range(draw.shape[0]))
            experts = (draws.tensor(draw, seed, device, row)[0] for row in rows)
            pairs = draws.in_mxfp4(draw.name, experts)
            REPORT["quantised"] += values
        else:
            pairs = iter([(draw.name, draws.tensor(draw, seed, device))])
        for name, stored in pairs:
            REPORT["tensors"] += 1
            yield name, stored


def sibling(name: str) -> Any:
    """The module of this name beside this file, or in the package of models that it came from."""
    known = f"beside_vllm_{name}"
    if known not in sys.modules:
        beside = Path(__file__).with_name(f"{name}.py")
        path = beside if beside.exists() else beside.parents[1] / "models" / beside.name
        spec = importlib.util.spec_from_file_location(known, path)
        sys.modules[known] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[known]


def _device() -> str:
    from vllm.platforms import current_platform

    return current_platform.device_type
