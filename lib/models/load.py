"""Loading a model: real weights from the hub, a folder or a GGUF file, or random weights.

One call, three sources. Random weights give a model of real size without a download; they are
valid for memory and for dense latency, and say nothing about what a model answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models import checkpoint_files, config_fields, count, net_values, quantised
from lib.models import experts as implementations
from lib.models.card import ModelCard, ModelError, require_context
from lib.models.count import require_decoder
from lib.models.fetch import NOT_OURS, quiet, require_all_loaded
from lib.models.origin import (
    Origin,
    config_of,
    files,
    find,
    made_of,
    plain,
    read_config,
    require_checkpoint,
    set_usual_outputs,
)
from lib.records.kinds import STUDY_STACK
from lib.records.record import KEY_FIELDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


__all__ = [
    "Model", "ModelCard", "ModelError", "card", "load", "require_context", "require_decoder",
    "require_fits",
]  # fmt: skip

WEIGHTS = ("random", "checkpoint", "gguf")
_FILL_STD = 0.02
_EH_PROJ = re.compile(r"(.*\blayers\.(\d+)\.)eh_proj\.")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "tekken.json",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip


@dataclass
class Model:
    """A loaded model and what a record must say about it.

    `weights` is random, checkpoint or gguf; `dtype` is read from the parameters; `source` holds
    model_source, model_revision and loaded_dtype; `load_s` is the time from files (or nothing) to
    a model on the device, downloads and conversion excluded; `warnings` are doubts about the
    checkpoint, for the record of its card.
    """

    name: str
    net: torch.nn.Module
    tokenizer: Any
    card: ModelCard
    weights: str
    dtype: str
    source: dict[str, str]
    device: Any
    load_s: float
    vocab_size: int
    special_ids: tuple[int, ...] = field(default=())
    warnings: tuple[dict[str, str], ...] = ()

    @property
    def experts(self) -> str:
        """The experts implementation in use now: loop, grouped_mm, ... or none (dense)."""
        if not self.card.experts:
            return "none"
        return implementations.in_use(self.net)

    @property
    def attention(self) -> str:
        """The attention implementation in use now, by the library's name."""
        return self.net.config.get_text_config(decoder=True)._attn_implementation

    def key(self, **changes: Any) -> dict[str, Any]:
        """All key fields of a record; what differs from the base arm is given as `changes`."""
        base = dict.fromkeys(KEY_FIELDS) | {
            "model": self.name,
            "weights": self.weights,
            "dtype": self.dtype,
            "stack": STUDY_STACK,
            "experts": self.experts,
            "attention": self.attention,
            "cache": "dynamic",
            "batch": 1,
            "decoding": "greedy",
        }
        if unknown := changes.keys() - base.keys():
            raise ModelError(f"unknown key fields {sorted(unknown)}; known: {list(KEY_FIELDS)}")
        return base | changes


def card(
    config_or_name: PreTrainedConfig | dict | str | Origin, dtype: str = "bfloat16"
) -> ModelCard:
    """The model card of a configuration (the library's, or a dict with model_type), of a name or
    of what one leads to."""
    if isinstance(config_or_name, str):
        config_or_name = find(config_or_name)
    if isinstance(config_or_name, Origin):
        origin = config_or_name
        return count.count(config_of(origin), name=origin.name, dtype=dtype)
    if isinstance(config_or_name, dict):
        config_or_name = made_of(config_or_name)
    return count.count(config_or_name, dtype=dtype)


def require_fits(
    card: ModelCard, device: Any, tokens: int, batch: int = 1, *, loaded: bool = False
) -> None:
    """Raise unless weights, cache and a margin for workspace fit the device's free memory.

    The margin (`ModelCard.margin_bytes`) is an estimate, so a run near the limit may still run
    out. With `loaded`, the weights are on the device already and are not counted. A cache of
    unknown size counts as nothing.
    """
    free = device.free_bytes()
    weights = 0 if loaded else card.weight_bytes
    cache = card.kv_bytes(tokens, batch) if card.kv_layers is not None else 0
    margin = card.margin_bytes
    if free is not None and weights + cache + margin > free:
        raise ModelError(
            f"{card.name} in {card.dtype} needs {(weights + cache + margin) / 1e9:.1f} GB "
            f"(weights {weights / 1e9:.1f}, cache of {batch} x {tokens} tokens {cache / 1e9:.1f}, "
            f"margin {margin / 1e9:.1f}), and {device.torch_device} has {free / 1e9:.1f} GB free; "
            "choose a smaller model, a shorter context, or a larger device"
        )


def load(
    name: str,
    *,
    weights: str = "random",
    dtype: str = "bfloat16",
    device: Any | str,
    seed: int = 0,
    experts: str | None = None,
) -> Model:
    """Load a model onto a device, or explain in a `ModelError` why that cannot be.

    `name` is an entry of params/models.yaml, a hub id, a folder or a .gguf file; `device` is an
    opened `hardware.device.Device`. `experts` is
    loop, grouped_mm, batched_mm or another implementation that is registered; None is the
    library's choice. Whatever is asked for, the returned model says what is in use.
    """
    if weights not in WEIGHTS:
        raise ModelError(f"unknown weights {weights!r}; use 'random' or 'checkpoint'")
    origin = find(name)
    if weights != "random":
        require_checkpoint(origin, weights)
    config = config_of(origin)
    planned = count.count(config, name=origin.name, dtype=dtype)
    require_decoder(planned)
    options = _experts_option(planned, experts)
    tokenizer, asked = None, None
    if weights == "random":
        require_fits(planned, device, tokens=0)
        source = {
            "model_source": f"random weights, seed {seed}",
            "model_revision": f"config sha256 {_digest(config)}",
        }
        start_s = device.clock_s()
        net = _random_net(config, dtype, device.torch_device, seed, options)
    else:
        folder, source = files(origin)
        weights = "gguf" if origin.gguf or origin.wheel else "checkpoint"
        asked = _require_stored(folder, origin.name, planned, device)
        start_s = device.clock_s()
        net = _checkpoint_net(
            folder, dtype, device.torch_device, options | quantised.options(asked)
        )
        tokenizer = tokenizer_of(folder)
    device.synchronize()
    load_s = device.clock_s() - start_s

    plain_files = quantised.is_expanded(asked) and asked and not checkpoint_files.scaled(folder)
    form = quantised.values(None if plain_files else asked, net)
    net_values.require_numbers(origin.name, net)
    doubts = net_values.require_trained(origin.name, net) if weights != "random" else ()
    loaded = _loaded_dtype(net, as_stored="matrix_kernels" in form)
    if loaded != dtype:
        raise ModelError(
            f"{origin.name} came in {loaded}, not in the requested {dtype}; ask for {loaded}, or "
            "give a checkpoint that is not quantised"
        )
    actual = _card_of(net, origin.name, dtype, exact="matrix_kernels" not in form)
    model = Model(
        name=origin.name,
        net=net.eval().requires_grad_(False),
        tokenizer=tokenizer,
        card=actual,
        weights=weights,
        dtype=loaded,
        source=source | {"loaded_dtype": loaded} | form,
        device=device,
        load_s=load_s,
        vocab_size=min(len(tokenizer), actual.vocab_size) if tokenizer else actual.vocab_size,
        special_ids=_special_ids(net.config, tokenizer),
        warnings=doubts,
    )
    if experts is not None and model.experts != experts:
        raise ModelError(
            f"{origin.name} runs its experts as {model.experts!r} whatever is asked for, not as "
            f"{experts!r}; leave experts unset"
        )
    return model


def _experts_option(card: ModelCard, experts: str | None) -> dict[str, str]:
    if experts is None or (experts == "none" and not card.experts):
        return {}
    if not card.experts:
        raise ModelError(f"{card.name} is dense, so experts={experts!r} has no meaning; use None")
    if experts not in implementations.names():
        names = ", ".join(implementations.names())
        raise ModelError(f"unknown experts {experts!r}; use one of {names}")
    return {"experts_implementation": implementations.library_name(experts)}


def _random_net(
    config: PreTrainedConfig, dtype: str, where: str, seed: int, options: dict[str, str]
) -> torch.nn.Module:
    """The library's initialisation, drawn on the device; parameters left at zero are filled.

    A router at zero sends every token to the same experts, and zero biases hide an addition.
    """
    import torch
    from transformers import AutoModelForCausalLM

    index = torch.empty(0, device=where).device.index  # of the current GPU; None on a CPU
    gpus = [] if index is None else [index]
    with torch.random.fork_rng(devices=gpus), torch.device(where), torch.no_grad():
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=False, **options
        )
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # Some norms store their scale minus one: zero means a scale of one there.
                scale = name == "weight" and "Norm" in type(module).__name__
                if not scale and not parameter.any():
                    parameter.normal_(std=_FILL_STD)
    return net


def _require_stored(
    folder: Path, name: str, planned: ModelCard, device: Any
) -> dict[str, Any] | None:
    """The quantisation of a checkpoint; raises unless it is whole, known here and has room."""
    asked = quantised.asked_for(read_config(folder))
    quantised.require_loadable(name, asked)
    quantised.require_device(name, asked, device.torch_device.partition(":")[0])
    checkpoint_files.require_scales(folder, quantised.method_of(asked))
    if not quantised.is_expanded(asked):
        planned = replace(planned, weight_bytes=sum(checkpoint_files.dtypes(folder).values()))
    require_fits(planned, device, tokens=0)
    return asked


def _checkpoint_net(
    folder: Path, dtype: str, where: str, options: dict[str, Any]
) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    troubled: list[str] = []
    try:
        with quiet() as troubled:
            net, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map={"": where},
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told with their names, and refused below
                **options,
            )
    except (ModelError, torch.OutOfMemoryError, *NOT_OURS):
        raise
    except Exception as error:  # whatever the library and a method's package raise
        names = f" ({checkpoint_files.named(troubled)})" if troubled else ""
        raise ModelError(
            f"{checkpoint_files.title(folder)} cannot be loaded: {count.reason_of(error)}{names}; "
            "give a complete checkpoint in a form that the installed transformers reads"
        ) from error
    set_usual_outputs(net.config)
    held = checkpoint_files.tensors(folder)
    behind = _drafting(held, net.config)
    unexpected = [n for n in report.get("unexpected_keys") or () if not n.startswith(behind)]
    require_all_loaded(
        checkpoint_files.title(folder),
        {**report, "unexpected_keys": unexpected},
        [t.name for t in held if checkpoint_files.is_made_anew(t)],
    )
    return net


def _drafting(held: list[checkpoint_files.Tensor], config: PreTrainedConfig) -> tuple[str, ...]:
    """Layers behind the last one that draft more tokens at once, as beginnings of names: each joins
    an embedding and a hidden state (`eh_proj`). Decoding token by token does not read them; the
    library leaves them aside, but by the layer's number in the models that it knows."""
    last = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) or 0
    heads = [n for t in held if (n := _EH_PROJ.match(t.name)) and int(n[2]) >= last]
    return tuple(head[1] for head in heads)


def _card_of(net: torch.nn.Module, name: str, dtype: str, *, exact: bool) -> ModelCard:
    """The card of the net that was loaded: with a head of its own where it has one, and with the
    bytes that are really stored. `exact`: no parameter beside those of the architecture, as the
    scales of a quantised one would be."""
    config = plain(net.config)
    output, table = net.get_output_embeddings(), net.get_input_embeddings()
    if output is not None and table is not None:
        tied = output.weight is table.weight
        for part in (config, *config_fields.parts(config)):
            if getattr(part, "tie_word_embeddings", None) not in (None, tied):
                part.tie_word_embeddings = tied
    card = count.count(config, name=name, dtype=dtype, held=net)
    held = sum(p.numel() for p in net.parameters())
    if exact and held != card.total_params:
        raise ModelError(
            f"{name} holds {held} parameters where its config.json describes {card.total_params}; "
            "give the checkpoint its own config.json"
        )
    return card


def tokenizer_of(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None where the folder has none."""
    from transformers import AutoTokenizer

    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return None
    reason = ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if set(tokenizer.get_vocab()) <= {str(t) for t in tokenizer.added_tokens_decoder.values()}:
            reason = "it has no vocabulary, only special tokens"
    except Exception as error:  # of a library, or that its code is not run
        reason = count.reason_of(error)
        if "custom code" in reason:
            reason = (
                "it needs code of its own (auto_map), and code from a hub or a folder is never "
                "executed here"
            )
    if reason:
        raise ModelError(
            f"the tokenizer of {checkpoint_files.title(folder)} cannot be read: {reason}; fetch "
            f"all of its files, or remove them ({', '.join(present)}) to measure with drawn ids"
        )
    return tokenizer


def _loaded_dtype(net: torch.nn.Module, *, as_stored: bool = False) -> str:
    """The dtype of most parameter bytes; some models keep a few small parameters in float32.

    Where matrices are held as stored, it is the dtype of what is not quantised.
    """
    sizes: Counter[str] = Counter()
    for parameter in net.parameters():
        if as_stored and not (parameter.dtype.is_floating_point and parameter.element_size() > 1):
            continue
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    return sizes.most_common(1)[0][0]


def _special_ids(config: PreTrainedConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids that a prompt of plain content must not contain."""
    if tokenizer is not None:
        added = tokenizer.added_tokens_decoder.items()
        return tuple(sorted({*tokenizer.all_special_ids, *(i for i, t in added if t.special)}))
    text = config.get_text_config(decoder=True)
    named = [v for part in (text, config) for n, v in vars(part).items() if _names_a_token(n)]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    return tuple(sorted(i for i in ids if isinstance(i, int) and i >= 0))


def _names_a_token(field_name: str) -> bool:
    """Beginning, end and padding; and what stands for an image or a sound, which is not there."""
    return field_name.endswith(("_token_id", "_token_index"))


def _digest(config: PreTrainedConfig) -> str:
    text = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
