"""Triton kernels for one token a sequence, where the compiler's own leave bandwidth unused.

`attended` reads the keys and values of a group once, in parts that run side by side; `products`
reads the chosen experts' weights alone and leaves the sum over parts to the compiler, which fuses
it with what follows. Imported where Triton is; the same sums in plain PyTorch are in `fused`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SLOTS = 64  # keys a program reads at once
SPREAD = 256  # programs of `attended`: about two a multiprocessor
ROWS, COLUMNS, WARPS = 64, 64, 2  # of a tile of weights whose columns are summed
PROGRAMS = 1800  # programs of `products` that an H100 holds at once, with even work for all


@triton.jit
def _attend(
    query,
    key,
    value,
    mask,
    sums,
    peaks,
    totals,
    length,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
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


@triton.jit
def _join(
    sums,
    peaks,
    totals,
    sinks,
    out,
    parts,
    SINKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    head, heads = tl.program_id(0), tl.num_programs(0)
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    one, there = part * heads + head, part < parts
    peak = tl.load(peaks + one, mask=there, other=float("-inf"))
    total = tl.load(totals + one, mask=there, other=0.0)
    summed = tl.load(sums + one[:, None] * WIDTH + column[None, :], mask=there[:, None], other=0.0)
    top = tl.max(peak, 0)
    if SINKS > 0:
        sink = tl.load(sinks + head % SINKS).to(tl.float32)
        top = tl.maximum(top, sink)
    share = tl.exp(peak - top)
    whole = tl.sum(total * share, 0)
    if SINKS > 0:
        whole += tl.exp(sink - top)
    joined = tl.sum(summed * share[:, None], 0) / whole
    tl.store(out + head * WIDTH + column, joined.to(out.dtype.element_ty))


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one token: query (batch, groups, heads, width), key and value (batch, groups,
    length, width), additive mask (batch, 1, 1, length), sinks (groups * heads) or None, contiguous,
    a width that is a power of two. `window` is the length where it is short. Like the query."""
    (batch, groups, heads, width), length = query.shape, key.shape[2]
    parts = max(1, SPREAD // (batch * groups))
    parts = min(parts, triton.cdiv(window, SLOTS)) if window else parts
    sums = query.new_empty((parts, *query.shape), dtype=torch.float32)
    peaks, totals = sums.new_empty(sums.shape[:-1]), sums.new_empty(sums.shape[:-1])
    _attend[(batch * groups, parts)](
        query,
        key,
        value,
        mask,
        sums,
        peaks,
        totals,
        length,
        SCALE=scale,
        GROUPS=groups,
        HEADS=heads,
        WIDTH=width,
        ROWS=max(16, 1 << (heads - 1).bit_length()),
        SLOTS=SLOTS,
    )
    out = torch.empty_like(query)
    _join[(batch * groups * heads,)](
        sums,
        peaks,
        totals,
        peaks if sinks is None else sinks,
        out,
        parts,
        WIDTH=width,
        SINKS=0 if sinks is None else groups * heads,
        PARTS=1 << (parts - 1).bit_length(),
    )
    return out


@triton.jit
def _products(
    inputs,
    weight,
    index,
    out,
    columns,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    SHARED: tl.constexpr,
    EXPERT: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, part, chosen = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    matrix = weight + tl.load(index + chosen).to(tl.int64) * EXPERT
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * SPAN, part * SPAN + SPAN, ROWS):
        row = start + tl.arange(0, ROWS)
        place = row[:, None] * ROW + column[None, :] * COLUMN
        if SIZE % SPAN == 0:
            tile = tl.load(matrix + place, mask=inside, other=0.0)
            given = tl.load(inputs + chosen // SHARED * SIZE + row)
        else:
            tile = tl.load(matrix + place, mask=(row < SIZE)[:, None] & inside, other=0.0)
            given = tl.load(inputs + chosen // SHARED * SIZE + row, mask=row < SIZE, other=0.0)
        total += tile.to(tl.float32) * given.to(tl.float32)[:, None]
    first = (chosen * tl.num_programs(1) + part) * columns
    tl.store(out + first + column, tl.sum(total, 0), mask=column < columns)


def products(
    inputs: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """Rows through chosen matrices: inputs (n / shared, in), index (n,), weight (experts, in, out)
    if transposed, else (experts, out, in); `shared` matrices take the same row. Returns float32
    (n, parts, out), to be summed over the parts."""
    size, columns = weight.shape[1:] if transposed else weight.shape[:0:-1]
    rows, wide = (ROWS, COLUMNS) if transposed else (8 * COLUMNS, ROWS // 8)
    blocks, chosen, tiles = triton.cdiv(columns, wide), index.numel(), triton.cdiv(size, rows)
    wanted = min(triton.cdiv(PROGRAMS, blocks * chosen), tiles)
    parts = min([n for n in range(wanted, tiles + 1) if tiles % n == 0])  # all of one length
    out = inputs.new_empty((chosen, parts, columns), dtype=torch.float32)
    _products[(blocks, parts, chosen)](
        inputs,
        weight,
        index,
        out,
        columns,
        SIZE=size,
        SPAN=tiles // parts * rows,
        SHARED=chosen // inputs.shape[0],
        EXPERT=size * columns,
        ROW=columns if transposed else 1,
        COLUMN=1 if transposed else size,
        ROWS=rows,
        COLUMNS=wide,
        num_warps=WARPS,
    )
    return out
