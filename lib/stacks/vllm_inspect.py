"""What vLLM's worker tells of its model: bytes, kernels, compilations, logits.

vLLM adds `Inspect` to its worker by name; the file lies beside `vllm_engine.py` on its path and
imports nothing of lib.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any


class Inspect:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), called by name."""

    def describe(self) -> dict[str, Any]:
        """Bytes by dtype, attention backends, kernels of linear layers and experts, weights."""
        model = self.model_runner.get_model()
        weights = sys.modules.get("vllm_weights")
        compilation = self.vllm_config.compilation_config
        return {
            "parameter_bytes": bytes_by_part(model),
            "attention": sorted(set(attention_backends(model))),
            "linear": dict(Counter(quant_methods(model, experts=False))),
            "experts": dict(Counter(quant_methods(model, experts=True))),
            "loaded": dict(weights.REPORT) if weights else {},
            "compile_s": compilation.compilation_time,
            "runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}",
            "num_blocks": self.vllm_config.cache_config.num_gpu_blocks,
        }

    def held_bytes(self) -> dict[str, Any]:
        """Bytes of weights and of the cache that is reserved, each storage once."""
        import torch

        parts = bytes_by_part(self.model_runner.get_model())
        caches = tensors_in(getattr(self.model_runner, "kv_caches", []))
        found: dict[str, Any] = {
            "weights_bytes": sum(sum(part.values()) for part in parts.values()),
            "cache_reserved_bytes": storage_bytes(caches),
            "allocated_bytes": None,
            "reserved_bytes": None,
        }
        if torch.accelerator.is_available():
            found["allocated_bytes"] = torch.accelerator.memory_allocated()
            found["reserved_bytes"] = torch.accelerator.memory_reserved()
        return found

    def watch_compilation(self) -> None:
        """Count kernels that are compiled from now on, beside vLLM's own counters."""
        self.late_kernels = 0
        with contextlib.suppress(ImportError):
            from vllm.utils import jit_monitor

            original = getattr(jit_monitor, "_handle_jit_event", None)

            def count(*arguments: Any, **named: Any) -> Any:
                self.late_kernels += 1
                return original(*arguments, **named)

            if original:
                jit_monitor._handle_jit_event = count

    def compiled(self) -> dict[str, int]:
        """Graphs compiled and captured, and kernels compiled after the start, so far."""
        from torch._dynamo.utils import counters
        from vllm.compilation.counter import compilation_counter

        names = ("num_graphs_seen", "num_backend_compilations", "num_cudagraph_captured")
        found = {name: getattr(compilation_counter, name, 0) for name in names}
        found["dynamo_graphs"] = counters["stats"]["unique_graphs"]
        return found | {"late_kernels": getattr(self, "late_kernels", 0)}

    def force(self, sequences: int, continuation: list[int]) -> None:
        """From the next step on, hand the sampler logits in which the next given token leads."""
        model = self.model_runner.get_model()
        self.kept_logits, original = [], model.compute_logits

        def compute_logits(*arguments: Any, **named: Any) -> Any:
            logits = original(*arguments, **named)
            if logits is None or len(logits) != sequences:
                return logits
            step = len(self.kept_logits)
            self.kept_logits.append(logits.float().cpu())
            if step < len(continuation):
                logits = logits.clone()
                logits[:, continuation[step]] = logits.max() + 1
            return logits

        model.compute_logits = compute_logits

    def forced_logits(self, path: str) -> list[int]:
        """Undo `force`; write the logits after each given token, and return their shape."""
        import torch

        model = self.model_runner.get_model()
        vars(model).pop("compute_logits", None)
        if len(self.kept_logits) < 2:
            return []
        logits = torch.stack(self.kept_logits[1:])
        self.kept_logits = []
        if not getattr(self, "rank", 0):  # every GPU has them all
            logits.numpy().tofile(path)
        return list(logits.shape)

    def overwrite(self, values: dict[str, list[float]]) -> dict[str, list[float]]:
        """Write parameters in place, so that captured steps follow; returns what they were. One
        number fills a parameter, and stands for one whose numbers are all the same."""
        import torch

        parameters = dict(self.model_runner.get_model().named_parameters())
        before = {}
        with torch.no_grad():
            for name, numbers in values.items():
                parameter = parameters[name]
                held = parameter.float().flatten()
                before[name] = held[:1].tolist() if (held == held[0]).all() else held.tolist()
                new = torch.tensor(numbers, dtype=parameter.dtype, device=parameter.device)
                parameter.copy_(new.expand(held.shape).view(parameter.shape))
        return before


def tensors_in(value: Any, depth: int = 6, seen: set[int] | None = None) -> Iterator[Any]:
    """Tensors in nested containers, and in plain objects that wrap them; not in modules."""
    seen = set() if seen is None else seen
    if depth < 0 or id(value) in seen or isinstance(value, type) or callable(value):
        return
    seen.add(id(value))
    if hasattr(value, "untyped_storage"):
        yield value
        return
    if isinstance(value, dict):
        inner: Any = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    else:
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
    for one in inner:
        yield from tensors_in(one, depth - 1, seen)


def storage_bytes(tensors: Any) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors}
    return sum(storages.values())


def bytes_by_part(model: Any) -> dict[str, dict[str, int]]:
    """Bytes by dtype of the experts' weights, of embeddings and output matrix, and of the rest, and
    of tables, such as angles of positions: buffers of modules that hold no weights.

    Parameters and buffers, and what a layer of experts holds elsewhere: some kernels take the
    weights out of the parameters into wrappers of their own. Each storage is counted once.
    """
    parts: dict[str, Counter[str]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        method = getattr(module, "quant_method", None)
        if is_of_experts(method):
            held += tensors_in([vars(module), vars(method)])
        part = "rest"
        if "experts" in path.split("."):
            part = "experts"
        elif any(word in path for word in ("embed", "lm_head")):
            part = "embeddings"
        elif method is None and not any(True for _ in module.parameters(recurse=False)):
            part = "tables"
        for tensor in held:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                counted = parts.setdefault(part, Counter())
                counted[str(tensor.dtype).removeprefix("torch.")] += storage.nbytes()
    return {part: dict(counted) for part, counted in parts.items()}


def is_of_experts(method: Any) -> bool:
    """Whether a way to hold weights, by vLLM's class, is one of a mixture's experts."""
    return "MoE" in type(method).__name__


def attention_backends(model: Any) -> Iterator[str]:
    """The backend of every attention layer, by vLLM's name."""
    for module in model.modules():
        backend = getattr(module, "attn_backend", None)
        if backend is not None and hasattr(backend, "get_name"):
            yield backend.get_name()


def quant_methods(model: Any, *, experts: bool) -> Iterator[str]:
    """How each linear layer, or each layer's experts, holds its weights, and by which kernels."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or is_of_experts(method) != experts:
            continue
        words = [type(method).__name__]
        for name, value in sorted(vars(method).items()):
            if name.endswith("_backend") and value is not None:
                words.append(str(getattr(value, "value", value)))
            elif name == "experts_cls" and value is not None:
                words.append(value.__name__)
            elif name == "fp8_linear" and value is not None:
                words.append(type(value).__name__)
        yield " ".join(words)
