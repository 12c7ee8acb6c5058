"""Random weights drawn by name: the same name has the same values wherever it is drawn.

Every tensor has a stream of its own, keyed by the seed and the tensor's name in the hub's
checkpoint. Value `i` of it is a function of the key and `i` alone: SplitMix64 as a counter gives 64
bits for four values, and 16 bits choose one of 65,536 quantiles of the law. All of this is
arithmetic of whole numbers and a table made on the host, so that CPU and GPU, one kind of GPU and
another, and every version of torch agree bit by bit, which torch's own generators do not. A part
can be drawn without the rest, so that it makes no difference how an engine fuses or shards.

This file imports nothing of lib: an engine in another interpreter loads it by its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import torch

GENERATOR = "splitmix64-q16"  # names the rule above in a record; another rule has another name
FILL_STD = 0.02  # of what a library leaves at zero: a router at zero sends all tokens to the same
CHUNK_WORDS = 2**22  # 16 M values at a time, whose scratch stays near the GPU's cache
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BLOCK = 32  # values that share a scale in MXFP4
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without its sign


class DrawError(ValueError):
    """Weights that cannot be drawn by name; the message says which and what to do."""


@dataclass(frozen=True)
class Law:
    """How the values of a tensor are spread: normal (mean a, standard deviation b), uniform (from a
    to b), constant (a)."""

    kind: str
    a: float
    b: float = 0.0


@dataclass(frozen=True)
class Draw:
    """One tensor to draw: its name in the checkpoint, shape, dtype by torch's name, and law."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    law: Law


def key_of(seed: int, name: str) -> int:
    """The 64-bit key of a tensor's stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def tensor(draw: Draw, seed: int, device: Any = "cpu", rows: range | None = None) -> torch.Tensor:
    """The tensor of a draw, or only some `rows` of its first axis, equal to those of the whole."""
    shape = draw.shape if rows is None else (len(rows), *draw.shape[1:])
    if rows is not None and rows.step != 1:
        raise DrawError(f"rows {rows} are not contiguous; draw a range of step 1")
    out = torch.empty(shape, dtype=getattr(torch, draw.dtype), device=device)
    first = rows.start * math.prod(draw.shape[1:]) if rows else 0
    return fill(out, draw.name, draw.law, seed, first=first)


def fill(target: torch.Tensor, name: str, law: Law, seed: int, *, first: int = 0) -> torch.Tensor:
    """Write values `first` and on of this name's stream into a tensor, in place; returns it."""
    with torch.no_grad():
        if law.kind == "constant":
            return target.fill_(law.a)
        if not target.is_contiguous():
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            return target.copy_(fill(whole, name, law, seed, first=first))
        table = _table(law, target.dtype, str(target.device))
        flat, key = target.view(-1), key_of(seed, name)
        step = 4 * CHUNK_WORDS
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            _draw_into(part, key, first + start, table)
    return target


def _draw_into(part: torch.Tensor, key: int, first: int, table: torch.Tensor) -> None:
    """Values `first` and on of a stream: four of each 64-bit word, low bits first."""
    begin, end = first // 4, -(-(first + part.numel()) // 4)
    words = torch.arange(begin + 1, end + 1, dtype=torch.int64, device=part.device)
    scratch = torch.empty_like(words)
    words.mul_(_signed(_GAMMA)).add_(_signed(key))
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        torch.bitwise_right_shift(words, shift, out=scratch)
        scratch.bitwise_and_((1 << (64 - shift)) - 1)  # the shift of a signed number drags its sign
        words.bitwise_xor_(scratch)
        if factor is not None:
            words.mul_(_signed(factor))
    skipped = first - 4 * begin
    index = words.view(torch.int16)[skipped : skipped + part.numel()].to(torch.int32)
    part.copy_(torch.index_select(table, 0, index.bitwise_and_(0xFFFF)))


def _signed(number: int) -> int:
    """The same 64 bits as torch's signed whole number."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


@cache
def _quantiles(kind: str) -> tuple[float, ...]:
    """The middles of 65,536 equal shares of the standard law."""
    shares = [(index + 0.5) / 2**16 for index in range(2**16)]
    if kind == "uniform":
        return tuple(shares)
    half = [NormalDist().inv_cdf(share) for share in shares[: 2**15]]
    return (*half, *(-value for value in reversed(half)))


@cache
def _table(law: Law, dtype: torch.dtype, device: str) -> torch.Tensor:
    if law.kind not in ("normal", "uniform"):
        raise DrawError(f"law {law.kind!r} cannot be drawn; use normal, uniform or constant")
    scale = law.b if law.kind == "normal" else law.b - law.a
    values = torch.tensor(_quantiles(law.kind), dtype=torch.float64) * scale + law.a
    return values.to(dtype).to(device)


# --- what a library's model would draw ---------------------------------------------------------


def build(
    config: Any, dtype: str, device: Any, **options: Any
) -> tuple[torch.nn.Module, dict[str, Law | None]]:
    """A model of this configuration, not yet filled, and the law of each of its parameters.

    `options` are those of `from_config`. On the meta device it costs no memory. What the library
    makes in its own way (None among the laws) is made, by torch's generator.
    """
    from transformers import AutoModelForCausalLM

    with torch.device(device), torch.no_grad(), watched() as seen:
        net = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **options)
        if torch.device(device).type == "meta":
            net.initialize_weights()  # the library leaves it out there
    return net, laws_of(net, seen)


@contextlib.contextmanager
def watched() -> Iterator[dict[int, tuple[torch.Tensor, Law | None]]]:
    """What transformers' initialisation does to each tensor inside the block; the last word counts.

    Keyed by the tensor's id; None is a law that cannot be drawn by name. Laws that can are not
    carried out, since `fill_net` will.
    """
    from transformers import initialization

    functions, copy = initialization.TORCH_INIT_FUNCTIONS, initialization.copy_
    seen: dict[int, tuple[torch.Tensor, Law | None]] = {}

    def noting(name: str, original: Any) -> Any:
        def init(tensor: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            law = _law_of(name, *args, **named)
            seen[id(tensor)] = (tensor, law)  # held, so that no other tensor gets its id
            drawn = law is not None and law.kind != "constant"
            return tensor if drawn else original(tensor, *args, **named)

        return init

    before = dict(functions)
    functions.update({name: noting(name, original) for name, original in before.items()})
    initialization.copy_ = noting("copy_", copy)
    try:
        yield seen
    finally:
        functions.update(before)
        initialization.copy_ = copy


def _law_of(name: str, first: Any = None, second: Any = None, **named: Any) -> Law | None:
    """The law of a call of one of torch's initialisers."""
    if name == "normal_":
        mean, std = named.get("mean", first), named.get("std", second)
        return Law("normal", 0.0 if mean is None else mean, 1.0 if std is None else std)
    if name == "uniform_":
        low, high = named.get("a", first), named.get("b", second)
        return Law("uniform", 0.0 if low is None else low, 1.0 if high is None else high)
    if name == "constant_":
        return Law("constant", float(named.get("val", first)))
    return {"zeros_": Law("constant", 0.0), "ones_": Law("constant", 1.0)}.get(name)


def laws_of(
    net: torch.nn.Module, seen: Mapping[int, tuple[torch.Tensor, Law | None]]
) -> dict[str, Law | None]:
    """The law of each parameter by its name; None for what the library made in its own way.

    What is left at zero is drawn with FILL_STD, scales of norms excepted (some store their scale
    minus one): a router at zero sends every token to the same experts, and a bias at zero hides
    an addition.
    """
    laws: dict[str, Law | None] = {}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            law = seen.get(id(parameter), (None, None))[1]
            scale = name == "weight" and "Norm" in type(module).__name__
            if parameter.is_meta:
                zero = law == Law("constant", 0.0)
            else:
                constant = law is None or law.kind == "constant"
                zero = constant and not parameter.any()
                if not zero and law == Law("constant", 0.0):
                    law = None  # written to after it was set to zero
            if zero and not scale:
                law = Law("normal", 0.0, FILL_STD)
            laws[f"{path}.{name}" if path else name] = law
    return {name: laws[name] for name, _ in net.named_parameters()}  # tied ones once


def fill_net(net: torch.nn.Module, laws: Mapping[str, Law | None], seed: int) -> list[str]:
    """Draw a net's parameters by name, in place; returns the names that stay as they were made.

    Those are the ones without a law that can be drawn, and constants (scales of norms).
    """
    kept = []
    for name, parameter in net.named_parameters():
        law = laws[name]
        if law is None or law.kind == "constant":
            kept.append(name)
            continue
        fill(parameter.data, name, law, seed)
    return kept


def plan_of(net: torch.nn.Module, laws: Mapping[str, Law | None]) -> list[Draw]:
    """Every parameter of a net as a draw, for an engine that makes them without the library.

    Raises for parameters whose law is not known, and where the hub's checkpoint stores them under
    other names or shapes than the library does.
    """
    unknown = [name for name, law in laws.items() if law is None]
    if unknown:
        raise DrawError(
            f"{len(unknown)} parameters are made in a way of the library's own "
            f"({', '.join(unknown[:3])}): no other engine can be given the same; use weights "
            "from a checkpoint"
        )
    stored = _stored_shapes(net)
    draws = []
    for name, parameter in net.named_parameters():
        if stored.get(name) != tuple(parameter.shape):
            raise DrawError(
                f"the hub's checkpoint does not store {name} {tuple(parameter.shape)} under this "
                "name and shape; use weights from a checkpoint"
            )
        dtype = str(parameter.dtype).removeprefix("torch.")
        draws.append(Draw(name, tuple(parameter.shape), dtype, laws[name]))
    return draws


def _stored_shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the checkpoint that the library would write of this net."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: parameter.to("meta") for name, parameter in net.named_parameters()}
    return {name: tuple(t.shape) for name, t in revert_weight_conversion(net, state).items()}


def digest(draws: Sequence[Draw], seed: int) -> str:
    """A short name of a set of weights: the rule, the seed and every draw."""
    text = json.dumps([GENERATOR, seed, [asdict(draw) for draw in draws]])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save(draws: Sequence[Draw], seed: int) -> str:
    """A plan as text, for another process."""
    return json.dumps({"generator": GENERATOR, "seed": seed, "draws": [asdict(d) for d in draws]})


def restore(text: str) -> tuple[list[Draw], int]:
    """What `save` wrote; raises where another rule drew it."""
    data = json.loads(text)
    if data["generator"] != GENERATOR:
        raise DrawError(
            f"a plan of generator {data['generator']!r}, this version has {GENERATOR!r}"
        )
    draws = [Draw(d["name"], tuple(d["shape"]), d["dtype"], Law(**d["law"])) for d in data["draws"]]
    return draws, data["seed"]


# --- MXFP4: four bits a value, one scale for 32 of them ----------------------------------------


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (..., n / 32, 16) and scales (..., n / 32), both uint8, of weights (..., n).

    As the OCP specification of microscaling formats has it: the scale is a power of two that brings
    the largest of 32 values into the last binade of E2M1, values round to the nearest (ties to
    even) and saturate. Two values a byte, the first in its low half; scales are biased by 127.
    """
    if weight.shape[-1] % _BLOCK:
        raise DrawError(f"MXFP4 takes rows of {_BLOCK} values or multiples, not {weight.shape[-1]}")
    values = weight.float().unflatten(-1, (-1, _BLOCK))
    exponent = torch.frexp(values.abs().amax(-1))[1] - 3  # floor(log2) - 2: 6 is 1.5 * 2**2
    exponent = exponent.clamp(-127, 127)
    scaled = torch.ldexp(values, -exponent.unsqueeze(-1))
    size, codes = scaled.abs(), torch.zeros_like(scaled, dtype=torch.uint8)
    for code, (below, above) in enumerate(zip(_FP4, _FP4[1:], strict=False)):
        middle = (below + above) / 2
        codes += (size > middle) if code % 2 == 0 else (size >= middle)  # a tie goes to even codes
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def from_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The weights (..., n) that `to_mxfp4` stored."""
    table = torch.tensor((*_FP4, *(-v for v in _FP4)), device=blocks.device)
    codes = torch.stack((blocks & 0x0F, blocks >> 4), -1).flatten(-2)
    values = torch.ldexp(table[codes.int()], scales.int().unsqueeze(-1) - 127)
    return values.flatten(-2).to(dtype)


def is_mxfp4_name(name: str) -> bool:
    """Whether gpt-oss's published form stores this tensor in MXFP4: the matrices of its experts."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def in_mxfp4(name: str, experts: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The two tensors that stand for experts, each (in, out), in gpt-oss's checkpoint.

    Each expert's matrix is stored transposed, so that a block runs along what is summed over.
    """
    pairs = [to_mxfp4(expert.T) for expert in experts]
    yield f"{name}_blocks", torch.stack([blocks for blocks, _ in pairs])
    yield f"{name}_scales", torch.stack([scales for _, scales in pairs])


def round_to_mxfp4(net: torch.nn.Module) -> list[str]:
    """Give a net's experts the values that MXFP4 can hold, in place; returns their names.

    The net then computes with the weights of the quantised model, in its own dtype.
    """
    changed = []
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if is_mxfp4_name(name):
                for expert in parameter:
                    expert.copy_(from_mxfp4(*to_mxfp4(expert.T), expert.dtype).T)
                changed.append(name)
    return changed
