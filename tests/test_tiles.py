"""The Triton kernels against plain PyTorch, run by Triton's interpreter where Triton is there.

The interpreter is chosen when a kernel is defined, so that each test has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with a torch for GPUs")

ATTENDED = """
import torch
from lib import tiles
torch.manual_seed(0)
batch, groups, heads, width, length, seen = {shape}
query = torch.randn(batch, groups, heads, width)
key, value = torch.randn(2, batch, groups, length, width)
mask = torch.zeros(batch, 1, 1, length)
mask[..., seen:] = torch.finfo(mask.dtype).min
sums, peaks, totals = tiles.attended(query, key, value, mask, 0.3)
share = torch.exp(peaks - peaks.amax(0))
found = (sums * share[..., None]).sum(0) / (totals * share).sum(0)[..., None]
wanted = (query @ key.transpose(2, 3) * 0.3)[..., :seen].softmax(-1) @ value[:, :, :seen]
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
"""

PRODUCTS = """
import torch
from lib import tiles
torch.manual_seed(0)
size, columns, shared, transposed = {shape}
index = torch.tensor([3, 1, 5, 0])
weight = torch.randn(6, size, columns)
inputs = torch.randn(4 // shared, size)
given = weight if transposed else weight.transpose(1, 2).contiguous()
found = tiles.products(inputs, given, index, transposed=transposed).sum(1)
wanted = torch.einsum("ki,kio->ko", inputs.repeat_interleave(shared, 0), weight[index])
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
"""


def interpreted(code: str, shape: tuple) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", code.replace("{shape}", repr(shape))],
        cwd=Path(__file__).parent.parent, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 8, 64, 130, 70), (1, 8, 7, 128, 200, 200), (3, 2, 4, 32, 70, 1), (1, 1, 20, 16, 5, 3)],
    ids=["eight heads a group", "seven", "batch", "parts without a key"],
)
def test_attention_in_parts_is_attention(shape):
    """(batch, groups, heads a group, width, length, slots that are seen)"""
    interpreted(ATTENDED, shape)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "shape", [(2880, 200, 4), (100, 70, 1), (1024, 300, 2)], ids=["one row", "a row each", "pairs"]
)
def test_products_of_chosen_matrices(shape, transposed):
    """(in, out, matrices that share a row)"""
    interpreted(PRODUCTS, (*shape, transposed))
