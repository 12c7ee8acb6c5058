"""Two Triton kernels for one token a sequence, where the compiler's own leave bandwidth unused.

`attended` reads the keys and values of a group once, in parts that run side by side; `products`
reads the chosen experts' weights alone. Both leave the last sum over parts to the compiler, which
fuses it with what follows. Imported on a GPU only; the same sums in plain PyTorch are in `fused`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SLOTS = 64  # keys a program reads at once
SPREAD = 256  # programs of `attended`: about two a multiprocessor
ROWS, COLUMNS, WARPS = 16, 64, 2  # of a tile of weights whose columns are summed
PROGRAMS = 1800  # programs of `products` that an H100 holds at once, with even work for all


@triton.jit
def _attend(query, key, value, mask, sums, peaks, totals, length, SCALE: tl.constexpr,
            GROUPS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
            SLOTS: tl.constexpr):  # fmt: skip
    group, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    head, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inner = (group * HEADS + head)[:, None] * WIDTH + column[None, :]
    asked = tl.load(query + inner, mask=head[:, None] < HEADS, other=0.0)
    span = tl.cdiv(length, parts)
    end = tl.minimum(part * span + span, length)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(part * span, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        held = slot < end
        place = (group.to(tl.int64) * length + slot)[:, None] * WIDTH + column[None, :]
        keys = tl.load(key + place, mask=held[:, None], other=0.0)
        values = tl.load(value + place, mask=held[:, None], other=0.0)
        unseen = tl.load(mask + group // GROUPS * length + slot, mask=held, other=float("-inf"))
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * SCALE
        scores += unseen.to(tl.float32)[None, :]
        higher = tl.maximum(peak, tl.max(scores, 1))
        kept, weights = tl.exp(peak - higher), tl.exp(scores - higher[:, None])
        total = total * kept + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        summed = summed * kept[:, None] + weighted
        peak = higher
    first = part * tl.num_programs(0) * HEADS
    tl.store(peaks + first + group * HEADS + head, peak, mask=head < HEADS)
    tl.store(totals + first + group * HEADS + head, total, mask=head < HEADS)
    tl.store(sums + first * WIDTH + inner, summed, mask=head[:, None] < HEADS)


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor,
             scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention in parts of the length: query (batch, groups, heads, width), key and value (batch,
    groups, length, width), mask (batch, 1, 1, length), all contiguous, a width that is a power of
    two. Returns, float32 and with the parts first, the weighted sums of values (parts, batch,
    groups, heads, width), the largest scores and the sums of weights (parts, batch, groups, heads).
    """
    (batch, groups, heads, width), length = query.shape, key.shape[2]
    parts = max(1, SPREAD // (batch * groups))
    sums = query.new_empty((parts, *query.shape), dtype=torch.float32)
    peaks, totals = sums.new_empty(sums.shape[:-1]), sums.new_empty(sums.shape[:-1])
    _attend[(batch * groups, parts)](
        query, key, value, mask, sums, peaks, totals, length, SCALE=scale, GROUPS=groups,
        HEADS=heads, WIDTH=width, ROWS=max(16, 1 << (heads - 1).bit_length()), SLOTS=SLOTS,
    )  # fmt: skip
    return sums, peaks, totals


@triton.jit
def _products(inputs, weight, index, out, size, columns, span, INPUT: tl.constexpr,
              EXPERT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    block, part, chosen = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    start_of = weight + tl.load(index + chosen).to(tl.int64) * EXPERT
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * span, part * span + span, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = tl.load(start_of + row[:, None] * ROW + column[None, :] * COLUMN,
                       mask=(row < size)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        given = tl.load(inputs + chosen // INPUT * size + row, mask=row < size, other=0.0)
        total += tile.to(tl.float32) * given.to(tl.float32)[:, None]
    place = (chosen * tl.num_programs(1) + part) * columns + column
    tl.store(out + place, tl.sum(total, 0), mask=inside)


def products(inputs: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, *,
             transposed: bool) -> torch.Tensor:  # fmt: skip
    """Rows through chosen matrices: inputs (n / each, in), index (n,), weight (experts, in, out) if
    transposed, else (experts, out, in); `each` matrices share a row. Returns float32 (n, parts,
    out), to be summed over the parts."""
    size, columns = weight.shape[1:] if transposed else weight.shape[:0:-1]
    rows, wide = (ROWS, COLUMNS) if transposed else (8 * COLUMNS, ROWS // 8)
    blocks, chosen = triton.cdiv(columns, wide), index.numel()
    parts = max(1, min(triton.cdiv(PROGRAMS, blocks * chosen), size // rows))
    span = triton.cdiv(triton.cdiv(size, parts), rows) * rows
    out = inputs.new_empty((chosen, parts, columns), dtype=torch.float32)
    _products[(blocks, parts, chosen)](
        inputs, weight, index, out, size, columns, span, INPUT=chosen // inputs.shape[0],
        EXPERT=size * columns, ROW=columns if transposed else 1, COLUMN=1 if transposed else size,
        ROWS=rows, COLUMNS=wide, num_warps=WARPS,
    )  # fmt: skip
    return out
