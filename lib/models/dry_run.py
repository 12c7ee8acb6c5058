"""A pass through a net on shapes alone: what a decode step reads, and what it keeps.

Nothing is allocated and nothing computed. Tensors of floating point are shapes on torch's meta
device. Whole numbers and truth values (ids, positions, masks, a router's choice) are real and lie
on the CPU, so that code which looks at them runs: those that a real pass would compute from
floating point are stood in for by valid ones (the first experts, no overflow). The cache is the
one that `generate()` of the library makes, filled by the net's own code, whatever it keeps.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lib.models import quantised

aten = torch.ops.aten
# What a forward pass hands on to the next one, by the names that the library has for it.
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
SMALL = 2**16  # elements
PLAIN = 5  # an id that is special in no configuration
_LOOKS_UP = (aten.embedding.default, aten.index.Tensor, aten.index_select.default)
_RANKS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default)


class Shapes(TorchDispatchMode):
    """Within it floating point has a shape only; `read` and `looked_up` hold ids of parameters.

    A parameter of which rows are taken is looked up; one that any other operation gets is read.
    """

    def __init__(self, small: int = SMALL) -> None:
        super().__init__()
        self.small = small  # elements up to which floating point made from nothing is real
        self.read: set[int] = set()
        self.looked_up: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in((*args, *kwargs.values())))
        if func is aten.embedding.default:
            _require_rows(*args[:2])
        used = self.looked_up if func in _LOOKS_UP else self.read
        used.update(id(x) for x in tensors if isinstance(x, torch.nn.Parameter))
        if not any(x.is_meta for x in tensors):
            return _from_numbers(func, args, kwargs, self.small)
        mutable = func._schema.is_mutable
        if mutable and not tensors[0].is_meta:
            return tensors[0]  # a real number cannot take over what is only a shape
        args = _on_meta(_places_of_masks(func, args))
        kwargs = {name: _on_meta(value) for name, value in kwargs.items()}
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        out = func(*args, **kwargs)
        if mutable:
            return out
        axis = _argument(func, "dim", args, kwargs) if func in _RANKS else None
        if isinstance(out, torch.Tensor):
            return _stand_in(out, axis)
        if isinstance(out, list | tuple):
            return type(out)(_stand_in(x, axis) if torch.is_tensor(x) else x for x in out)
        return out


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Tensors among arguments, in lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, list | tuple):
        return type(value)(_on_meta(part) for part in value)
    return value


def _require_rows(table: torch.Tensor, index: torch.Tensor) -> None:
    if not index.is_meta and index.numel() and int(index.max()) >= len(table):
        raise IndexError(f"row {int(index.max())} of a table of {len(table)} rows")


def _from_numbers(func: Any, args: Any, kwargs: dict[str, Any], small: int) -> Any:
    """An operation that gets no shape; what it would make on meta is real where that is small."""
    if func is aten.histc.default:  # counts whole numbers on a GPU only
        args = (args[0].float(), *args[1:])
    out = func(*args, **kwargs)
    if not isinstance(out, torch.Tensor) or not out.is_meta:
        return out
    if out.dtype.is_floating_point and out.numel() > small:
        return out
    return func(*args, **kwargs | {"device": torch.device("cpu")})


def _places_of_masks(func: Any, args: Any) -> Any:
    """The places of a real mask that picks from a shape: how many there are is then known."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return args
    places: list[Any] = []
    for index in args[1]:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return (args[0], places, *args[2:])


def _argument(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            given = args[place] if place < len(args) else argument.default_value
            return kwargs.get(name, given)
    return None


def _stand_in(out: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Whole numbers that a real pass would compute from floating point: the first places."""
    if out.dtype.is_floating_point or out.dtype.is_complex:
        return out
    places = torch.zeros(out.shape, dtype=out.dtype, device="cpu")
    if axis is not None and out.dim():
        places.transpose(axis, -1).add_(torch.arange(out.shape[axis]))
    return places


class _Literals(TorchFunctionMode):
    """Whole numbers written in a net's code are real, although its tensors are made on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.tensor and out.is_meta and not out.dtype.is_floating_point:
            return func(*args, **(kwargs or {}) | {"device": "cpu"})
        return out


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Without the library's remarks: on kernels that are not installed, on options not used, and
    that ids and net lie on two devices."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # What code draws here at random changes nothing that is drawn later.
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Inside the block a net is built of shapes: parameters on meta, whole numbers real."""
    with silently(), torch.device("meta"), _Literals(), Shapes(small=0):
        yield


def twin_of(net: torch.nn.Module) -> torch.nn.Module:
    """A net of the same class and dtype whose parameters have a shape and no memory."""
    config = copy.deepcopy(net.config)
    quantised.forget(config)
    with building():
        twin = type(net)._from_config(config, dtype=net.dtype)
    return twin.eval().requires_grad_(False)


@dataclass(frozen=True)
class Kept:
    """A tensor that lives on between forward passes: where, its shape and bytes of an element."""

    path: str
    owner: Any
    shape: tuple[int, ...]
    element_bytes: int


@dataclass(frozen=True)
class Pass:
    """What a dry run saw: tensors kept after the prompt and after a step, and ids of the
    parameters that the step read, or only looked rows up in."""

    after_prompt: tuple[Kept, ...]
    after_step: tuple[Kept, ...]
    read: frozenset[int]
    looked_up: frozenset[int]


def run(net: torch.nn.Module, tokens: int, batch: int = 1) -> Pass:
    """`generate()` of a prompt of `tokens` tokens in each of `batch` sequences, and one step more.

    `net` lies on the meta device. Raises what its code raises.
    """
    from transformers import GenerationConfig

    net.generation_config = GenerationConfig()
    before, passes = {id(value) for *_, value in tensors_of_modules(net)}, []
    seen = Shapes()

    def begin(*_: Any) -> None:
        seen.read.clear()
        seen.looked_up.clear()

    def end(module: Any, args: Any, given: Any, out: Any) -> None:
        state = {n: out.get(n, given.get(n)) for n in CACHES if n in out or n in given}
        passes.append(tuple(_kept(net, state, before)))

    hooks = [
        net.register_forward_pre_hook(begin),
        net.register_forward_hook(end, with_kwargs=True),
    ]
    config = GenerationConfig(do_sample=False, max_new_tokens=2, pad_token_id=0)
    rows = getattr(net.get_input_embeddings(), "num_embeddings", None) or PLAIN + 1
    ids = torch.full((batch, tokens), min(PLAIN, rows - 1))
    try:
        with silently(), seen:
            net.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, value in tensors_of_modules(net):
            if id(value) not in before:
                setattr(module, name, None)
    after_prompt, after_step = passes
    looked_up = frozenset(seen.looked_up - seen.read)
    return Pass(after_prompt, after_step, frozenset(seen.read), looked_up)


def reaches(net: torch.nn.Module, tokens: int) -> bool:
    """Whether a pass over so many tokens stays within the rows of every table, positions too."""
    try:
        with silently(), torch.no_grad(), Shapes():
            net(torch.full((1, tokens), PLAIN), use_cache=False)
    except Exception as error:  # for any other reason, which tells nothing of tables
        return not (isinstance(error, IndexError) or "out of bounds" in str(error))
    return True


def forget_numbers(net: torch.nn.Module) -> None:
    """Put every tensor of a net built here on meta, so that code which looks at a value fails."""
    for module in net.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    for module, name, value in tensors_of_modules(net):
        setattr(module, name, value.to("meta"))


def tensors_of_modules(net: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Tensors that modules hold as plain attributes."""
    return [
        (module, name, value)
        for module in net.modules()
        for name, value in vars(module).items()
        if torch.is_tensor(value)
    ]


def _kept(net: torch.nn.Module, state: dict[str, Any], before: set[int]) -> Iterator[Kept]:
    """Tensors in what is handed on, and those that modules hold now and did not before."""
    seen: set[int] = set()
    for name, value in state.items():
        yield from _tensors(value, name, None, seen)
    paths = {id(module): path for path, module in net.named_modules()}
    for module, name, value in tensors_of_modules(net):
        if id(value) not in before:
            yield from _tensors(value, f"{paths[id(module)]}.{name}", module, seen)


def _tensors(value: Any, path: str, owner: Any, seen: set[int]) -> Iterator[Kept]:
    if id(value) in seen or isinstance(value, type | torch.nn.Module):
        return
    seen.add(id(value))
    if torch.is_tensor(value):
        if value.dim():  # a lone number is a counter
            yield Kept(path, owner, tuple(value.shape), value.element_size())
        return
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif hasattr(value, "__dict__") and not hasattr(value, "model_type"):
        items, owner = vars(value).items(), value
    else:
        return
    for name, part in items:
        yield from _tensors(part, f"{path}.{name}", owner, seen)
