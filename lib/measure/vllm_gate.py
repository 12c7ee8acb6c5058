"""What our own net computes on an engine's weights, by a process of its own that ends after it.

A look at one sequence gives logits along our greedy continuation, with routers pinned and free; a
look at what an engine sampled in a batch gives how far its log-probabilities are from ours. The
first look is taken in as many rounds as it takes until every expert had its turn under pins.

FP8 rounds each layer by some per cent, and a deep net makes of that logits which have nothing in
common any more. So of a dense net in FP8 some layers are looked at at once, a block a round, until
every layer had its turn: the norms before all others are set to zero, which takes them out of the
sum that goes from layer to layer.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lib.files import ROOT
from lib.models import draws, experts, load, origin
from lib.records import record
from lib.stacks import registry
from lib.stacks.engine_process import EngineError
from lib.stacks.logits_check import REFERENCE
from lib.stacks.vllm_settings import with_layers

PART = 8  # sequences of a batch that are computed together
LAYERS_AT_ONCE = 8  # in FP8: off by 0.2 to 0.5 of the logits' norm, where a wrong layer is by 1.2
_SILENCED = ("input_layernorm", "post_attention_layernorm")


def computed(known: Mapping[str, Any], looks: Sequence[Mapping], kind: str) -> dict[str, Any]:
    """`looks` as our net sees them, `barred` values of its parameters by name for each round, and
    `pins`, how many experts they leave, or `block`, how many layers; `known` holds name, weights,
    form and seed, and how many of the first `layers` there are (0: all), `kind` is cuda or cpu.
    Without looks only the rounds are made, in this process.
    """
    if not looks and known["weights"] == "random":
        return {**rounds_of(without_weights(known), known), "looks": []}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked", Path(folder) / "answer"
        torch.save({"known": dict(known), "looks": list(looks), "kind": kind}, asked)
        command = [sys.executable, "-m", "lib.measure.vllm_gate", str(asked), str(answer)]
        told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if told.returncode:
            why = told.stderr.strip().rpartition("\n")[2] or f"exit code {told.returncode}"
            raise EngineError(f"our own net could not be computed beside vLLM's: {why}")
        return torch.load(answer, weights_only=True)


def net_of(known: Mapping[str, Any], kind: str) -> Any:
    """Our net with the weights that the engine has, in bfloat16; MXFP4's values are exact in it."""
    if known["weights"] != "random":
        from lib.hardware.device import open_device

        return load.load(
            known["name"], weights="checkpoint", dtype="bfloat16", device=open_device(kind)
        ).net
    net, laws = draws.build(_config_of(known), "bfloat16", kind)
    draws.fill_net(net, laws, known["seed"])
    if known["form"] == "mxfp4":
        draws.round_to_mxfp4(net)
    return net.eval().requires_grad_(False)


def _config_of(known: Mapping[str, Any]) -> Any:
    return with_layers(origin.config_of(origin.find(known["name"])), known.get("layers", 0))


def without_weights(known: Mapping[str, Any]) -> Any:
    """Our net of drawn weights with the biases of its routers; all else is on the meta device."""
    net, laws = draws.build(_config_of(known), "bfloat16", "meta")
    plan, biases = draws.plan_of(net, laws), {id(bias) for bias in experts.biases(net)}
    for draw in plan:
        if id(net.get_parameter(draw.name)) in biases:
            path, _, name = draw.name.rpartition(".")
            bias = torch.nn.Parameter(draws.tensor(draw, known["seed"]), requires_grad=False)
            setattr(net.get_submodule(path), name, bias)
    return net


def barred(net: Any, chosen: int, *, seed: int, turn: int = 0) -> dict[str, list[float]]:
    """Biases with which every router of a net chooses the same `chosen` experts, by name.

    The choice that `models.experts.pinned` gives the net itself for the sequence `turn`, for
    `VllmEngine.pinned`.
    """
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    barred = {}
    for layer, bias in enumerate(experts.biases(net)):
        kept = experts.pins(len(bias), chosen, seed=seed, layer=layer, sequence=turn)
        row = [value if n in kept else experts.BARRED for n, value in enumerate(bias.tolist())]
        barred[names[id(bias)]] = row
    return barred


def silenced(net: Any, turn: int) -> dict[str, list[float]] | None:
    """Norms at zero, by name, that leave the layers of one block; None where a layer's norms are
    others than the two that most architectures have."""
    layers, names = net.get_decoder().layers, {}
    block = range(turn * LAYERS_AT_ONCE, (turn + 1) * LAYERS_AT_ONCE)
    paths = {id(module): path for path, module in net.named_modules()}
    for number, layer in enumerate(layers):
        norms = [n for n, child in layer.named_children() if "Norm" in type(child).__name__]
        if sorted(norms) != sorted(_SILENCED):
            return None
        if number not in block:
            names |= {f"{paths[id(layer)]}.{norm}.weight": [0.0] for norm in norms}
    return names


@contextlib.contextmanager
def overwritten(net: Any, values: Mapping[str, Sequence[float]]) -> Iterator[None]:
    """Other values for some of a net's parameters inside the block; one number fills all of one."""
    parameters = {name: net.get_parameter(name) for name in values}
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(values[name], dtype=parameter.dtype))
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


def sampled_errors(sampled: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Errors (batch, steps) of a batch that the engine decoded by itself, from `sampled`.

    `logits` (batch, steps, vocabulary) are our net's, before each of the engine's tokens. The root
    of the mean square by which log-probabilities of the sampled ids differ, over the spread of the
    net's logits: the share of their norm that `look` tells, from some ids instead of all.
    """
    logits = logits.float()
    ours = torch.log_softmax(logits, -1)[..., sampled["ids"]].cpu()
    differ = torch.tensor(sampled["logprobs"]) - ours
    return differ.pow(2).mean(-1).sqrt() / logits.std(-1).cpu()


def along(net: Any, ids: torch.Tensor, steps: int) -> dict[str, Any]:
    """Logits (1, steps, vocabulary) along our greedy continuation, alone and as one of two."""
    stack = registry.open_stack(REFERENCE, net)
    continuation = stack(ids, steps).tokens
    again = stack.forced_logits(ids.repeat(2, 1), continuation.repeat(2, 1))[:1]
    return {
        "continuation": continuation.tolist(),
        "expected": stack.forced_logits(ids, continuation).float().cpu(),
        "again": again.float().cpu(),
    }


def beside(net: Any, ids: torch.Tensor, sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Errors a step of a batch, the mean over its sequences, and our net's against itself."""
    stack = registry.open_stack(REFERENCE, net)
    tokens = torch.tensor(sampled["tokens"], device=ids.device)
    errors, floors, same = [], [], []
    for at in range(0, len(ids), PART):
        part = slice(at, at + PART)
        given = torch.cat([ids[part, -1:], tokens[part, :-1]], 1)  # logits before each token
        logits = stack.forced_logits(ids[part, :-1], given)
        alone = stack.forced_logits(ids[at : at + 1, :-1], given[:1])
        mine = {"ids": sampled["ids"], "logprobs": sampled["logprobs"][part]}
        itself = torch.log_softmax(alone.float(), -1)[..., sampled["ids"]].tolist()
        errors.append(sampled_errors(mine, logits))
        floors.append(sampled_errors({"ids": sampled["ids"], "logprobs": itself}, logits[:1]))
        same.append((logits.argmax(-1) == tokens[part]).float())
    return {
        "errors": torch.cat(errors).mean(0).tolist(),
        "floor": torch.cat(floors).mean().item(),
        "same_choice": torch.cat(same).mean().item(),
    }


def rounds(net: Any, pins: int) -> int:
    """Rounds of pins until every expert had its turn; 0 of a dense net."""
    return -(-len(experts.biases(net)[0]) // pins) if pins else 0


def blocks(net: Any, form: str) -> list[dict[str, list[float]]]:
    """What silences all layers but those of a block, for each block; none where all layers are
    looked at together."""
    if form != "fp8" or silenced(net, 0) is None:
        return []
    return [silenced(net, n) for n in range(-(-len(net.get_decoder().layers) // LAYERS_AT_ONCE))]


def answered(
    net: Any,
    looks: Sequence[Mapping],
    *,
    pins: int,
    seed: int,
    silent: Sequence[Mapping[str, Sequence[float]]] = (),
) -> list[dict[str, Any]]:
    """Each look; of one that does not fit the memory, the error. `silent` are those of
    `blocks`; where there are any, all layers together are not looked at."""

    def pinned(turn: int = 0) -> Any:
        if silent:
            return overwritten(net, silent[turn])
        if not pins:
            return contextlib.nullcontext()
        return experts.pinned(net, pins, seed=seed, sequences=[turn])

    turns = len(silent) or rounds(net, pins)

    def answer(place: int, look: Mapping) -> dict[str, Any]:
        ids = torch.tensor(look["ids"], device=net.device)
        if "sampled" in look:
            with pinned():
                return beside(net, ids, look["sampled"])
        fixed = []
        for turn in range(min(1, turns) if place else turns):
            with pinned(turn):
                fixed.append(along(net, ids, look["steps"]))
        return {"pinned": fixed, "free": None if silent else along(net, ids, look["steps"])}

    answers = []
    for place, look in enumerate(looks):
        try:
            answers.append({"ids": look["ids"], **answer(place, look)})
        except torch.OutOfMemoryError as error:
            answers.append({"ids": look["ids"], "error": record.first_line(error)})
    return answers


def rounds_of(net: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """What `computed` returns but for the looks, which are taken in these rounds."""
    config = net.config.get_text_config(decoder=True)
    pins, seed = config.num_experts_per_tok if experts.biases(net) else 0, known["seed"]
    silent = [] if pins else blocks(net, known["form"])
    return {
        "pins": pins,
        "block": LAYERS_AT_ONCE if silent else 0,
        "barred": silent
        or [barred(net, pins, seed=seed, turn=n) for n in range(rounds(net, pins))],
    }


def answer_to(known: Mapping[str, Any], looks: Sequence[Mapping], kind: str) -> dict[str, Any]:
    """What `computed` returns, in this process."""
    with torch.inference_mode():
        net = net_of(known, kind)
        told = rounds_of(net, known)
        silent = told["barred"] if told["block"] else ()
        seen = answered(net, looks, pins=told["pins"], seed=known["seed"], silent=silent)
        return {**told, "looks": seen}


def main(asked: str, answer: str) -> None:
    """Read what is asked from one file, and write the answer to another."""
    torch.save(answer_to(**torch.load(asked, weights_only=True)), answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
