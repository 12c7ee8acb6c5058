"""The peak of a call foretold: the same forward passes on torch's meta device, where nothing is
allocated, counting the tensors that live at once.

What it cannot know: memory that a kernel takes and gives back inside itself, and what an allocator
adds by keeping blocks whole. Both are small beside a model of real size, and large beside a toy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lib.hardware.live_tensors import Live
from lib.models import count, dry_run, experts, load
from lib.models.card import ModelError
from lib.models.origin import Origin, config_of, find
from lib.records import record

BLOCK_BYTES = 512  # what the CUDA allocator rounds up to
MOST_NUMBERS = 2**28  # of a mask that is real, where code looks at whole numbers
_CHOSEN_SIZES = (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)


class _Numbers(dry_run.Shapes):
    """Whole numbers are real, for code that looks at them; a size that would follow from floating
    point (how many tokens an expert gets) stays unknown."""

    def __init__(self) -> None:
        super().__init__()
        self._chosen = WeakIdKeyDictionary()  # whole numbers that stand in for others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = list(dry_run.tensors_in((*args, *(kwargs or {}).values())))
        chosen = any(t.is_meta or t in self._chosen for t in taken)
        if chosen and func in _CHOSEN_SIZES and args[0].dtype != torch.bool:
            raise ModelError("its memory follows from what floating point chooses, as a router")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if chosen:
            made = out if isinstance(out, list | tuple) else [out]
            self._chosen.update((t, None) for t in dry_run.tensors_in(made) if not t.is_meta)
        return out


class _Kernels(TorchFunctionMode):
    """Attention as a fused kernel runs it: no matrix of scores, the result laid out by token.

    Torch makes the scores where keys are of fewer heads than queries and a call does not say so
    (Falcon), and on a CPU where values are not as wide as keys (MLA). Grouped products take any
    dtype on a device, and bfloat16 alone on meta.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._grouped_mm:
            rows, matrices = args[:2]
            return rows.new_empty(len(rows), matrices.shape[-1])
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        spread = query.shape[1] != key.shape[1] and not (kwargs or {}).get("enable_gqa")
        if spread or (self._on_cpu and query.shape[-1] != value.shape[-1]):
            return func(*args, **(kwargs or {}))  # on meta too it makes the scores
        batch, heads, tokens, _ = query.shape
        mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype)  # lives until the kernel is done
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        return out.transpose(1, 2)


def workspace_of(name: str | Origin) -> Callable[[str, int], int | str]:
    """What a prefill of one sequence of a model holds at its peak beside the cache.

    The function takes a dtype and tokens, and returns bytes, or why they are not known.
    """

    @functools.cache
    def twin_of(dtype: str) -> tuple[Any, Any]:
        config = config_of(find(name) if isinstance(name, str) else name)
        return count.on_meta(copy.deepcopy(config), dtype), load.card(name, dtype)

    @functools.cache
    def workspace(dtype: str, tokens: int) -> int | str:
        try:
            twin, card = twin_of(dtype)
            peak = prefill_bytes(twin, tokens, all_logits=False)
            return max(peak - card.kv_bytes(tokens, cache="dynamic"), 0)
        except Exception as error:  # a model's code may ask for values, which meta tensors lack
            return record.first_line(error)

    return workspace


def prefill_bytes(
    twin: Any,
    context: int,
    *,
    all_logits: bool,
    implementation: str | None = None,
    on_cpu: bool = False,
) -> int:
    """Peak of one forward over `context` tokens, with the logits of all positions or the last.

    `twin` comes from `dry_run.twin_of`; `implementation` names that of its experts; `on_cpu`
    foretells it for a CPU and not for a GPU.
    """
    options = {} if all_logits else {"logits_to_keep": 1}
    _use(twin, implementation)
    # The prompt is made before the count, as it is there before a call.
    return _peak(context, on_cpu, lambda live, ids, _: twin(ids, use_cache=True, **options))


def decode_bytes(
    twin: Any, cached_tokens: int, implementation: str | None = None, *, on_cpu: bool = False
) -> int:
    """Peak of one step of one token that leaves `cached_tokens` in the cache, the cache included.

    It is the second of two steps: the first still finds the prompt behind sliding layers.
    """
    _use(twin, implementation)

    def passes(live: Live, ids: torch.Tensor, token: Callable[[], torch.Tensor]) -> None:
        cache = cache_of(twin(ids, use_cache=True, logits_to_keep=1))
        twin(token(), **cache, use_cache=True)
        live.step()
        twin(token(), **cache, use_cache=True)

    return _peak(max(cached_tokens - 2, 1), on_cpu, passes)


def _peak(tokens: int, on_cpu: bool, passes: Callable[..., Any]) -> int:
    """The most that lives in `passes`, which gets the count, a prompt and the next token.

    Where code looks at whole numbers they are real, if their masks are not too large for that.
    """
    for device, numbers in (("meta", contextlib.nullcontext()), ("cpu", _Numbers())):
        token = functools.partial(torch.zeros, (1, 1), dtype=torch.long, device=device)
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        try:
            with torch.no_grad(), _Kernels(on_cpu), numbers, Live(BLOCK_BYTES) as live:
                passes(live, ids, token)
        except RuntimeError:
            if device == "cpu" or tokens**2 > MOST_NUMBERS:
                raise
        else:
            break
    return live.peak_bytes


def cache_of(output: Any) -> dict[str, Any]:
    """The cache of a step, by the name under which the next one takes it: nets of states (Mamba)
    have a name of their own."""
    for name in ("cache_params", "past_key_values"):
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    raise ModelError("it hands on no cache, under no name that the next step takes")


def logits_bytes(twin: Any, tokens: int) -> int:
    """Bytes of the logits of so many positions, in the model's dtype."""
    head = twin.get_output_embeddings().weight
    return tokens * head.shape[0] * head.element_size()


def _use(twin: Any, implementation: str | None) -> None:
    if implementation not in (None, "none"):
        experts.use(twin, implementation)
