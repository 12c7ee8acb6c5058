"""The Triton kernels against plain PyTorch, run by Triton's interpreter where Triton is there.

The interpreter is chosen when a kernel is defined, so that each test has a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from lib.files import ROOT

needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="Triton comes with a torch for GPUs"
)

ATTENDED = """
import torch
from lib.files import ROOT
from lib.stacks import triton_kernels
torch.manual_seed(0)
batch, groups, heads, width, length, seen, window = {shape}
query = torch.randn(batch, groups, heads, width)
key, value = torch.randn(2, batch, groups, length, width)
sinks = torch.randn(groups * heads)
mask = torch.zeros(batch, 1, 1, length)
mask[..., seen:] = torch.finfo(mask.dtype).min
scores = (query @ key.transpose(2, 3) * 0.3)[..., :seen]
found = triton_kernels.attended(query, key, value, mask, sinks=None, scale=0.3, window=window)
wanted = scores.softmax(-1) @ value[:, :, :seen]
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
found = triton_kernels.attended(query, key, value, mask, sinks=sinks, scale=0.3, window=window)
scores = torch.cat([scores, sinks.view(groups, heads, 1).expand(batch, -1, -1, -1)], -1)
wanted = scores.softmax(-1)[..., :-1] @ value[:, :, :seen]
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
"""

PRODUCTS = """
import torch
from lib.stacks import triton_kernels
torch.manual_seed(0)
size, columns, shared, transposed = {shape}
index = torch.tensor([3, 1, 5, 0])
weight = torch.randn(6, size, columns)
inputs = torch.randn(4 // shared, size)
given = weight if transposed else weight.transpose(1, 2).contiguous()
found = triton_kernels.products(inputs, given, index, transposed=transposed).sum(1)
wanted = torch.einsum("ki,kio->ko", inputs.repeat_interleave(shared, 0), weight[index])
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
"""


def interpreted(code: str, shape: tuple) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", code.replace("{shape}", repr(shape))],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


@needs_triton
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 8, 64, 130, 70, None),
        (1, 8, 7, 128, 200, 200, None),
        (3, 2, 4, 32, 70, 1, None),
        (1, 1, 20, 16, 5, 3, None),
        (1, 2, 8, 64, 128, 128, 128),
    ],
    ids=["eight heads a group", "seven", "batch", "parts without a key", "window"],
)
def test_attention_in_parts_is_attention(shape):
    """(batch, groups, heads a group, width, length, slots that are seen, window)"""
    interpreted(ATTENDED, shape)


@needs_triton
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "shape", [(480, 100, 4), (100, 70, 1), (512, 130, 2)], ids=["one row", "a row each", "pairs"]
)
def test_products_of_chosen_matrices(shape, transposed):
    """(in, out, matrices that share a row)"""
    interpreted(PRODUCTS, (*shape, transposed))


def test_without_triton_there_are_no_kernels():
    code = (
        "import importlib.util as util, sys; found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'triton' else found(name, *more)\n"
        "import lib.stacks.fused; assert 'lib.stacks.triton_kernels' not in sys.modules"
    )
    interpreted(code, ())
