"""Bytes of tensors that operations bring to life, counted by watching the operations themselves.

What an allocator reports on a GPU, this tells where there is no such report: on a CPU while a call
runs, and on torch's meta device, where a call of any size costs no memory at all.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts storages from the operation that makes them until the last tensor on them is gone.

    `bytes` are alive now, `peak_bytes` were at most. Tensors that operations take but did not make
    (weights, the prompt) count as nothing. `block` rounds each storage up, as allocators do.
    Memory that an operation takes and gives back inside itself is not seen.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._block = block
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._meet(tensor, counts=True)
        return out

    def step(self) -> tuple[int, int]:
        """Bytes now, and the most since the last step."""
        most, self.peak_bytes = self.peak_bytes, self.bytes
        return self.bytes, most

    def _meet(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self._storages:
            return
        size = -(-storage.nbytes() // self._block) * self._block if counts else 0

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._storages[name]

        self._storages[name] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
