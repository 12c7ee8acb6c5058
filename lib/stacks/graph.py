"""The decode step captured once as a CUDA graph: the host launches one graph a token.

The prefill takes the library's normal path, with the same kernels as `generate()`. Its keys and
values are then copied into buffers of fixed place and size, and the step that reads them is
captured. On a CPU the same step runs uncaptured, which is how the tests check it.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from lib.models import dry_run, experts
from lib.stacks import rehearsal
from lib.stacks.stack import Decoded, StackError

Around = Callable[[Any, Cache], contextlib.AbstractContextManager]
ROUND_TO = 64  # buffers are a little longer than asked for: kernels like aligned lengths
MASKED_BY_US = ("eager", "sdpa")  # attention implementations that take an additive mask


class HeldLayer(CacheLayerMixin):
    """Keys and values (batch, heads, size, width) of one layer, in place.

    Position p is kept in slot p mod size. A full layer is as long as the buffer, so that this is
    p; a sliding layer is as long as its window, and a new token replaces the one that leaves it.
    The order of slots does not matter to attention, since keys carry their position.
    """

    def __init__(
        self, like: Any, size: int, slot: torch.Tensor, position: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.is_sliding, self.slot, self.max_cache_len = bool(like.is_sliding), slot, size
        self.position = position
        shapes = [(*tensor.shape[:2], size, tensor.shape[3]) for tensor in (like.keys, like.values)]
        self.keys, self.values = (like.keys.new_zeros(shape) for shape in shapes)
        self.is_initialized = True

    def fill(self, source: Any, tokens: int) -> None:
        """Take over the last tokens of a prefill's layer."""
        count = min(source.keys.shape[2], self.keys.shape[2])
        slots = torch.arange(tokens - count, tokens, device=self.keys.device) % self.keys.shape[2]
        self.keys.index_copy_(2, slots, source.keys[:, :, -count:])
        self.values.index_copy_(2, slots, source.values[:, :, -count:])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token; returns the whole buffers."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The buffers exist already."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_seq_length(self) -> Any:
        """Tokens so far, as a number on the device: the library's static cache tells it so too."""
        if self.position is None:
            raise StackError("its step asks the cache for a length, which is on the device only")
        return self.position[0]


class Step:
    """One decode step over fixed buffers, and its captured form on a GPU."""

    def __init__(self, net: Any, prefilled: DynamicCache, capacity: int) -> None:
        first = prefilled.layers[0].keys
        self.net, self.capacity, self.batch = net, capacity, first.shape[0]
        self.token = torch.zeros(self.batch, 1, dtype=torch.long, device=first.device)
        self.position = torch.zeros(1, dtype=torch.long, device=first.device)
        self.chosen = torch.zeros(self.batch, capacity, dtype=torch.long, device=first.device)
        self.places = torch.arange(capacity, device=first.device)
        self.logits: torch.Tensor | None = None
        sizes = [
            min(capacity, getattr(layer, "sliding_window", None) or capacity)
            for layer in prefilled.layers
        ]
        self.slots = {size: torch.zeros_like(self.position) for size in sizes}
        self.masks = {
            size: torch.zeros(self.batch, 1, 1, size, dtype=first.dtype, device=first.device)
            for size in sizes
        }
        layers = [
            HeldLayer(layer, size, self.slots[size], self.position)
            for layer, size in zip(prefilled.layers, sizes, strict=True)
        ]
        self.cache = Cache(layers=layers)
        self.advance: Callable[[], Any] = self._run

    def start(self, prefilled: DynamicCache, tokens: int, first: torch.Tensor) -> None:
        """Take over a prefill of `tokens` tokens and the first token (batch, 1) that it chose."""
        for layer, source in zip(self.cache.layers, prefilled.layers, strict=True):
            layer.fill(source, tokens)
        self.token.copy_(first)
        self.position.fill_(tokens)
        self.chosen[:, tokens : tokens + 1] = first

    def record(self, around: Around) -> None:
        """Record the step as a CUDA graph; the buffers move on by that, so `start` again.

        `around` is entered while the step runs as Python: what it exchanges stays in the graph.
        """
        with around(self.net, self.cache), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the compiler's remarks on its choices
            replay = record(self._run, self.token.device.type)
        recorded = replay != self._run
        self.advance = replay if recorded else partial(_within, around, self)

    def _run(self) -> None:
        for size, slot in self.slots.items():
            torch.remainder(self.position, size, out=slot)
            unseen, mask = self.places[:size] > self.position, self.masks[size]
            mask.copy_(torch.where(unseen, torch.finfo(mask.dtype).min, 0.0))
        out = self.net(
            self.token,
            attention_mask=self._mask(),
            position_ids=self.position.expand(self.batch, 1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = out.logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        self.chosen.index_copy_(1, self.position, self.token)

    def _mask(self) -> Any:
        """One mask, or one for each kind of layer where a model mixes them."""
        kinds = {
            "sliding_attention" if layer.is_sliding else "full_attention": self.masks[
                layer.get_max_length()
            ]
            for layer in self.cache.layers
        }
        return kinds if len(kinds) > 1 else next(iter(kinds.values()))


def _within(around: Around, step: Step) -> None:
    with around(step.net, step.cache):
        step._run()


def _nothing() -> None:
    pass


def _as_it_is(net: Any, cache: Cache) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


class GraphStack:
    """Greedy decoding with a captured step; captures again when batch or length outgrow it.

    `capacity` is the longest sequence, prompt included, that later calls will need: with it no
    call but the first of a batch size captures. `around(net, cache)` is entered while the step is
    traced or run.
    """

    def __init__(
        self,
        net: Any,
        *,
        capacity: int | None = None,
        around: Around | None = None,
    ) -> None:
        self.net, self.capacity = net, capacity or 0
        self._around = around or _as_it_is
        self._step: Step | None = None
        self.before: Callable[[], None] = _nothing  # raises for a net that cannot be captured

    def rehearse(self) -> None:
        """Prefill and step on shapes alone; raises what keeps them from running."""
        ids = torch.full((2, rehearsal.CONTEXT), 5)
        with dry_run.Shapes():
            cache, _ = _prefill(self.net, ids)
        require_capturable(self.net, cache)
        dry_run.forget_numbers(self.net)
        seen = []
        for capacity in (rehearsal.CAPACITY, 2 * rehearsal.CAPACITY):
            step, numbers = Step(self.net, cache, capacity), rehearsal.Numbers()
            with numbers, self._around(self.net, step.cache):
                step._run()
            seen.append(numbers.seen)
        if seen[0] != seen[1]:
            raise StackError(
                "its step takes a place from the length of its keys, and that is the length of the "
                "buffers here, not the number of tokens; use hf-eager"
            )

    def __call__(
        self, ids: torch.Tensor, new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> Decoded:
        """New tokens (batch, new_tokens), the cache, and the seconds that capturing took."""
        tokens = ids.shape[1]
        with torch.inference_mode():
            prefilled, first, prepare_s = self._prefilled(ids, new_tokens)
            if on_token:
                first.cpu()
                on_token()
            if new_tokens == 1:
                return Decoded(first, prefilled, prepare_s)
            start = mark(ids.device.type)
            for _ in range(new_tokens - 1):
                self._step.advance()
                if on_token:
                    self._step.token.cpu()
                    on_token()
            decode_s = partial(between_s, start, mark(ids.device.type))
            chosen = self._step.chosen[:, tokens : tokens + new_tokens].clone()
        return Decoded(chosen, self._step.cache, prepare_s, decode_s)

    def forced_logits(
        self, ids: torch.Tensor, continuation: torch.Tensor, watch: Any = None
    ) -> torch.Tensor:
        """Logits (batch, steps, vocabulary) after each token of a given continuation.

        `watch.before(step)` and `watch.after(step)` are called around each step.
        """
        with torch.inference_mode():
            self._prefilled(ids, continuation.shape[1] + 1)
            steps = []
            for index in range(continuation.shape[1]):
                self._step.token.copy_(continuation[:, index : index + 1])
                if watch:
                    watch.before(index)
                self._step.advance()
                if watch:
                    watch.after(index)
                steps.append(self._step.logits.clone())
        return torch.stack(steps, 1)

    def _prefilled(
        self, ids: torch.Tensor, new_tokens: int
    ) -> tuple[DynamicCache, torch.Tensor, float]:
        if self._step is None and new_tokens > 1:
            self.before()
        cache, first = _prefill(self.net, ids)
        if new_tokens == 1:
            return cache, first, 0.0
        start_s = time.perf_counter()
        ready = self._fits(ids.shape[0], ids.shape[1] + new_tokens)
        if not ready:
            self._build(cache, ids.shape[1], new_tokens, first)
        self._step.start(cache, ids.shape[1], first)
        return cache, first, 0.0 if ready else time.perf_counter() - start_s

    def _fits(self, batch: int, length: int) -> bool:
        step = self._step
        return step is not None and step.batch == batch and length <= step.capacity

    def _build(self, cache: DynamicCache, tokens: int, new_tokens: int, first: Any) -> None:
        require_capturable(self.net, cache)
        needed = max(self.capacity, tokens + new_tokens + WARMUP_CALLS)
        self._step = None  # its buffers go before new ones come
        step = Step(self.net, cache, -(-needed // ROUND_TO) * ROUND_TO)
        step.start(cache, tokens, first)
        step.record(self._around)
        self._step = step  # one that could not be recorded would run as plain Python next time


def _prefill(net: Any, ids: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    """The cache of a prompt (batch, tokens) and the first token (batch, 1) that follows it."""
    cache = DynamicCache(config=net.config.get_text_config(decoder=True))
    options: dict[str, Any] = {"logits_to_keep": 1} if net._supports_logits_to_keep() else {}
    if "position_ids" in inspect.signature(net.forward).parameters:  # as `generate()` gives them
        options["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    out = net(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **options
    )
    return cache, out.logits[:, -1].argmax(-1, keepdim=True)


def require_capturable(net: Any, cache: DynamicCache) -> None:
    """Raise where the step chooses on the host or keeps something else than keys and values."""
    attention = net.config.get_text_config(decoder=True)._attn_implementation
    if attention not in MASKED_BY_US:
        raise StackError(
            f"attention {attention!r} cannot be captured here; use one of {', '.join(MASKED_BY_US)}"
        )
    kinds = {type(layer).__name__ for layer in cache.layers}
    if unknown := kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise StackError(
            f"a cache of {', '.join(sorted(unknown))} cannot be captured: the buffers "
            "hold keys and values only"
        )
    if any(getattr(layer, "keys", None) is None for layer in cache.layers) or not cache.layers:
        raise StackError(
            "it does not keep keys and values in every layer of the cache that it is given, and "
            "the buffers hold nothing else; use hf-eager"
        )
    if experts.chooses_on_host(net):
        raise StackError(
            "experts 'loop' look on the host which experts were chosen, which a CUDA graph cannot "
            "record; use grouped_mm, batched_mm or all_experts"
        )


WARMUP_CALLS = 2  # libraries choose kernels and allocate workspaces before the recording


def record(work: Callable[[], Any], device_type: str) -> Callable[[], Any]:
    """A function that repeats `work` on the same buffers; on a CPU `work` itself.

    `work` runs a few times first, so that its buffers have moved on when this returns. It may not
    wait for the GPU: recording such work raises.
    """
    if device_type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    torch.cuda.synchronize()
    return graph.replay


def mark(device_type: str) -> Any:
    """A point in the order of the device's work, for `between_s`."""
    if device_type != "cuda":
        return time.perf_counter()  # a CPU has done all work that was asked for
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_s(first: Any, last: Any) -> float:
    """Seconds from one mark to another by the device's own clock; ask after a synchronisation."""
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3
