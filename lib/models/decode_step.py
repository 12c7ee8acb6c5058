"""What a net keeps between decode steps, and which parameters a step reads.

Seen in a dry run of `generate()` (`dry_run`), never typed in: keys and values of every token or of
a window, latents, indexes of sparse attention, and states of a fixed size (state-space layers,
linear attention, short convolutions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lib.models.card import Block

if TYPE_CHECKING:
    import torch

    from lib.models.dry_run import Kept, Pass

SEQUENCES = 17  # of a dry run: few lengths of an architecture are a multiple of it
FEW, MANY = 2, 31  # tokens of its prompt; many where few do not tell how the cache grows
KEEPS_NOTHING = "it keeps nothing: every step reads the whole sequence once more"
_LIBRARY = "transformers.cache_utils"
_BY_TOKEN = ("keys", "values", "indexer_keys")  # what these layers keep of every token


@dataclass(frozen=True)
class Layout:
    """Growth of the cache of one sequence, and what a step reads.

    `layers` holds for each layer that grows the elements of a token and the window (None: all
    tokens are kept), `blocks` what is kept for so many tokens at a time, `state_bytes` what does
    not grow. `read` are the names of the parameters that a step reads, `looked_up` of those of
    which it takes rows; None where no step could be run. `heads` are those that the keys of every
    layer have, None where they differ or there are none. Where the cache is not understood,
    `layers` is None and `reason` says why.
    """

    layers: tuple[tuple[int, int | None], ...] | None = None
    blocks: tuple[Block, ...] = ()
    state_bytes: int = 0
    element_bytes: int = 1
    heads: int | None = None
    read: frozenset[str] | None = None
    looked_up: frozenset[str] | None = None
    reason: str = ""


def layout(net: torch.nn.Module) -> Layout:
    """The layout of a net that lies on the meta device."""
    from lib.models import dry_run

    def run(tokens: int) -> Pass:
        seen = dry_run.run(net, tokens, SEQUENCES)
        kept.update({tokens: seen.after_prompt, tokens + 1: seen.after_step})
        return seen

    kept: dict[int, tuple[Kept, ...]] = {}
    try:
        passes = [run(FEW)]
        last = passes[0].after_step
        own = [k for k in last if type(k.owner).__module__ != _LIBRARY or _is_index(k)]
        if own or not _proportional(kept):
            blocks = math.lcm(*(_rate(k.owner) or 1 for k in own))
            # The step after this prompt fills a block of every kind, and not the first one.
            passes.append(run(max(2, -(-(MANY + 1) // blocks)) * blocks - 1))
    except Exception as error:  # whatever the library's code raises
        lines = str(error).strip().splitlines() or [""]
        return Layout(reason=f"no step of it runs ({type(error).__name__}: {lines[0].strip()})")
    names = {id(p): name for name, p in net.named_parameters()}
    read = frozenset(names[i] for seen in passes for i in seen.read if i in names)
    looked_up = frozenset(names[i] for seen in passes for i in seen.looked_up if i in names)
    keys = {k.shape[1] for k in last if k.path.endswith(".keys") and len(k.shape) == 4}
    layout = Layout(
        read=read, looked_up=looked_up - read, heads=keys.pop() if len(keys) == 1 else None
    )
    if not any(kept.values()):
        return replace(layout, reason=KEEPS_NOTHING)
    try:
        return _grown(layout, kept)
    except NotUnderstoodError as error:
        return replace(layout, reason=str(error))


class NotUnderstoodError(ValueError):
    """A tensor whose size follows the tokens in no way that is known here."""


def _grown(layout: Layout, kept: dict[int, tuple[Kept, ...]]) -> Layout:
    """The layout from tensors that were kept after so many tokens."""
    layers: dict[tuple[int, int | None], int] = {}
    blocks: dict[int, Block] = {}
    state_bytes, sizes = 0, set()
    for tensor, size_bytes in _by_tensor(kept):
        grown, window, fixed, block = _growth(tensor, size_bytes)
        state_bytes += fixed
        if grown and hasattr(tensor.owner, "layers"):  # of the cache, beside what attention keeps
            grown, block = 0, Block(1, full_bytes=grown)
        if block:
            blocks[block.tokens] = block + blocks.get(block.tokens, Block(block.tokens))
        if grown:
            place = (id(tensor.owner), window)
            layers[place] = layers.get(place, 0) + grown
            sizes.add(tensor.element_bytes)
    element_bytes = sizes.pop() if len(sizes) == 1 else 1
    return replace(
        layout,
        layers=tuple((grown // element_bytes, window) for (_, window), grown in layers.items()),
        blocks=tuple(blocks[tokens] for tokens in sorted(blocks)),
        state_bytes=state_bytes,
        element_bytes=element_bytes,
    )


def _proportional(kept: dict[int, tuple[Kept, ...]]) -> bool:
    """Whether few tokens tell enough: what grows is so much for each of them."""
    try:
        _grown(Layout(), kept)
    except NotUnderstoodError:
        return False
    return True


def _by_tensor(kept: dict[int, tuple[Kept, ...]]) -> Iterator[tuple[Kept, dict[int, int]]]:
    """Each tensor that belongs to the sequences, and its bytes a sequence after so many tokens."""
    import torch

    tensors = {k.path: k for part in kept.values() for k in part}
    for path, tensor in tensors.items():
        if not any(length % SEQUENCES == 0 for length in tensor.shape if length):
            if isinstance(tensor.owner, torch.nn.Module) or math.prod(tensor.shape) == 1:
                continue  # a table that a module made, or a counter
            raise NotUnderstoodError(f"{_title(tensor)} does not belong to one sequence each")
        yield (
            tensor,
            {
                tokens: sum(math.prod(k.shape) for k in part if k.path == path)
                * tensor.element_bytes
                // SEQUENCES
                for tokens, part in kept.items()
            },
        )


def _growth(tensor: Kept, size_bytes: dict[int, int]) -> tuple[int, int | None, int, Block | None]:
    """How a tensor follows the tokens: bytes of each and its window, bytes that do not grow, or a
    block. Each way that is tried has to give every size that was seen."""
    few, next_one, *more = sorted(size_bytes)
    most = max(size_bytes)

    def follows(size: Any) -> bool:
        return all(size(tokens) == seen for tokens, seen in size_bytes.items())

    window, rate = getattr(tensor.owner, "sliding_window", None), _rate(tensor.owner)
    if window and (more or tensor.path.rpartition(".")[2] in _BY_TOKEN):
        token = size_bytes[few] // max(min(few, window - 1), 1)
        if follows(lambda n: token * min(n, window - 1)):
            return token, window, 0, None
    if follows(lambda n: size_bytes[most]):
        return 0, None, size_bytes[most], None
    token = size_bytes[next_one] - size_bytes[few]
    before = size_bytes[few] - token * few  # tokens that a model puts before the prompt
    if before >= 0 and (more or not before) and follows(lambda n: before + token * n):
        return token, None, before, None
    if rate:
        left, full = size_bytes[few] // few, size_bytes[most] // (most // rate)
        for block in (
            Block(rate, left_bytes=left),
            Block(rate, full_bytes=full),
            Block(rate, once_bytes=size_bytes[most]),
        ):
            if follows(block.bytes_after):
                return 0, None, 0, block
    raise NotUnderstoodError(
        f"how {_title(tensor)} grows with the tokens is not recognised ("
        + ", ".join(f"{b} bytes after {n}" for n, b in size_bytes.items())
        + ")"
    )


def _is_index(tensor: Kept) -> bool:
    """Whether sparse attention chooses by it, which may gather several tokens first."""
    return "index" in tensor.path.rpartition(".")[2]


def _rate(owner: Any) -> int:
    """Tokens that a layer keeps as one entry."""
    return getattr(owner, "compress_rate", 0) or 0


def _title(tensor: Kept) -> str:
    return f"{tensor.path} of {type(tensor.owner).__name__}"
