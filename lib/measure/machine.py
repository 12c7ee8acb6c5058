"""Ceilings: the best that this device does with its memory, its arithmetic and its host.

Each repetition queues a chain of calls between two synchronisations, so that launching a kernel
hides behind the kernel before it. The calls of a chain walk over buffers that together are many
times the last-level cache, so that no call finds its operands there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.hardware.device import time_call
from lib.hardware.host import host_score_per_s
from lib.measure import session
from lib.records import store
from lib.records.record import KEY_FIELDS, Record

ROW = 8192  # elements of a row that a reduction takes at once
HOST_REPEATS = 5


# The value's name, the shape, bytes or operations of one repetition, and the call.
Work = tuple[str, str, float, Callable[[], None]]


@dataclass(frozen=True)
class Sizes:
    """What a device is given to do: bytes of a buffer, elements along a side, and counts."""

    buffer_bytes: int
    buffers: int
    sweeps: int  # passes over all buffers in one repetition of a copy or a read
    narrow: int  # the short side of the tall and of the wide matrix
    matrices: tuple[tuple[int, int], ...]  # (out, in) of the chain of matrix-vector products
    layers: int  # how many of each matrix there are
    passes: int  # of the chain over all of them in one repetition
    product: int  # side of the square matrices that are multiplied
    products: dict[str, int]  # how often in one repetition, by dtype
    repeats: int


# The matrices of the chain are those of a layer of Qwen3-32B: queries, keys, output, up, down.
_LAYER = ((8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600))
_QUARTER = tuple((out // 4, columns // 4) for out, columns in _LAYER)
SIZES = {
    "cuda": Sizes(2**30, 4, 5, 4096, _LAYER, 4, 4, 8192, {"bfloat16": 10, "float32": 1}, 6),
    "cpu": Sizes(2**27, 2, 1, 4096, _QUARTER, 6, 1, 1024, {"bfloat16": 1, "float32": 1}, 3),
}


def measure(device: Any, *, seed: int, records_path: str | Path) -> list[Record]:
    """Write the environment and one row of kind `ceilings`, and return both.

    The row belongs to no model: its key is all None, and the GPU is that of its environment.
    values: `copy_bytes_per_s` (read plus written), `read_bytes_per_s` (the best of all reading
    shapes, named by `read_shape`), `matvec_bytes_per_s` (weights read by a chain of bfloat16
    matrix-vector products), `matmul_flop_per_s` (bfloat16), `matmul_float32_flop_per_s`,
    `launch_s` (queue and finish one tiny kernel), `host_score_per_s` (million iterations of a
    fixed Python loop a second). Each is the best of its repetitions; samples hold every
    repetition, under the value's name and the shape.
    """
    env = store.append(records_path, session.environment(device))
    sizes = SIZES.get(device.kind, SIZES["cpu"])
    samples: dict[str, list[float]] = {}
    values: dict[str, Any] = {}
    for name, shape, amount, call in _work(device, sizes, seed):
        rates = _rates(call, amount, device, sizes.repeats)
        samples[f"{name}, {shape}"] = rates
        if max(rates) > values.get(name, 0):
            values[name] = max(rates)
            if name == "read_bytes_per_s":
                values["read_shape"] = shape
    device.empty_cache()
    samples["host_score_per_s"] = [host_score_per_s(rounds=1) for _ in range(HOST_REPEATS)]
    values["host_score_per_s"] = max(samples["host_score_per_s"])
    missing = {}
    if hasattr(device, "launch_s"):
        samples["launch_s"] = [device.launch_s() for _ in range(HOST_REPEATS)]
        values["launch_s"] = min(samples["launch_s"])
    else:
        missing["launch_s"] = "nothing is queued on a CPU"
    key = dict.fromkeys(KEY_FIELDS)
    row = Record("ceilings", key, samples, values, missing, env_id=env.env_id)
    return [env, store.append(records_path, row)]


def _rates(call: Callable[[], Any], amount: float, device: Any, repeats: int) -> list[float]:
    """`amount` over the seconds of each repetition; one call before is not counted."""
    call()
    return [amount / time_call(call, device)[0] for _ in range(repeats)]


def _work(device: Any, sizes: Sizes, seed: int) -> Iterator[Work]:
    """All that is timed, one kind after the other, so that each frees its memory."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(2**16, generator=generator).to(device.torch_device, torch.bfloat16)

    def filled(*shape: int) -> Any:
        """A bfloat16 tensor of repeated random numbers: zeros would need less power."""
        count = math.prod(shape)
        return block.repeat(-(-count // len(block)))[:count].view(shape)

    yield from _streams(sizes, filled)
    yield from _matrix_vectors(sizes, filled)
    yield from _products(sizes, filled)


def _streams(sizes: Sizes, filled: Callable[..., Any]) -> Iterator[Work]:
    buffers = [filled(sizes.buffer_bytes // 2) for _ in range(sizes.buffers)]
    amount = float(sizes.sweeps * sizes.buffers * sizes.buffer_bytes)
    pairs = list(zip(buffers, buffers[1:] + buffers[:1], strict=True))
    copy = _chain(lambda pair: pair[1].copy_(pair[0]), pairs, sizes.sweeps)
    yield "copy_bytes_per_s", f"{sizes.buffer_bytes} bytes", 2 * amount, copy
    for shape, call in _reads(sizes, filled):
        yield "read_bytes_per_s", shape, amount, _chain(call, buffers, sizes.sweeps)


def _matrix_vectors(sizes: Sizes, filled: Callable[..., Any]) -> Iterator[Work]:
    from torch.nn.functional import linear

    weights = [filled(*shape) for shape in sizes.matrices * sizes.layers]
    vectors = {columns: filled(1, columns) for _, columns in sizes.matrices}
    amount = float(sizes.passes * sum(w.numel() * w.element_size() for w in weights))
    shape = f"{len(weights)} matrices of {len(sizes.matrices)} shapes, bfloat16"
    products = _chain(lambda w: linear(vectors[w.shape[1]], w), weights, sizes.passes)
    yield "matvec_bytes_per_s", shape, amount, products


def _products(sizes: Sizes, filled: Callable[..., Any]) -> Iterator[Work]:
    import torch

    side = sizes.product
    for dtype, calls in sizes.products.items():
        square = filled(side, side).to(getattr(torch, dtype))
        pairs = [(square, torch.empty_like(square))]
        name = "matmul_flop_per_s" if dtype == "bfloat16" else f"matmul_{dtype}_flop_per_s"
        product = _chain(lambda pair: torch.mm(pair[0], pair[0], out=pair[1]), pairs, calls)
        yield name, f"{side} x {side} x {side}", 2.0 * calls * side**3, product


def _reads(sizes: Sizes, filled: Callable[..., Any]) -> list[tuple[str, Callable[[Any], Any]]]:
    """Shapes of a pure read of one buffer of bfloat16: reductions, and products with a vector."""
    import torch

    elements = sizes.buffer_bytes // 2
    square = 2 ** (int(math.log2(elements)) // 2)
    calls: list[tuple[str, Callable[[Any], Any]]] = [
        ("sum, bfloat16", lambda x: x.sum()),
        ("sum, float32", lambda x: x.view(torch.float32).sum()),
        ("sum of rows, bfloat16", lambda x: x.view(-1, ROW).sum(1)),
        ("sum of rows, float32", lambda x: x.view(torch.float32).view(-1, ROW).sum(1)),
        ("maximum of rows, bfloat16", lambda x: x.view(-1, ROW).amax(1)),
        ("maximum of rows, float32", lambda x: x.view(torch.float32).view(-1, ROW).amax(1)),
    ]
    for rows in (elements // sizes.narrow, sizes.narrow, square):
        columns = elements // rows
        calls.append(
            (
                f"{rows} x {columns} matrix and a vector, bfloat16",
                _matrix_vector(rows, columns, filled(columns)),
            )
        )
    return calls


def _matrix_vector(rows: int, columns: int, vector: Any) -> Callable[[Any], Any]:
    return lambda x: x.view(rows, columns).mv(vector)


def _chain(call: Callable[[Any], Any], items: Sequence[Any], passes: int) -> Callable[[], None]:
    """The call on every item, `passes` times over, one right after the other."""

    def run() -> None:
        for _ in range(passes):
            for item in items:
                call(item)

    return run
