"""Ways to hold a model's weights, and what each makes of its card: bytes, not quality."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lib.models.card import ModelCard, ModelError


@dataclass(frozen=True)
class Form:
    """A way to hold weights: a dtype, and the count of the card that takes `bits` each instead."""

    dtype: str
    assumes: str = "every parameter in it, and the cache"
    quantised: str = ""
    bits: float = 16


_LINEAR = "linear layers and routed experts at {} bits a weight ({} for 128 weights)"
FORMS = {
    "float32": Form("float32"),
    "bfloat16": Form("bfloat16", "every parameter in it, and the cache; float16 takes the same"),
    "float16": Form("float16"),
    "8-bit": Form("bfloat16", _LINEAR.format("8.125", "a 16-bit scale"),
                  "matrix_params", 8 + 16 / 128),
    "fp8": Form("bfloat16", "linear layers and routed experts at 8 bits a weight, one scale a "
                "matrix, as vLLM quantises them while loading", "matrix_params", 8),
    "mxfp4": Form("bfloat16", "matrices of routed experts at 4.25 bits a weight (an 8-bit scale "
                  "for 32 weights), as gpt-oss is published", "expert_matrix_params", 4 + 8 / 32),
    "4-bit": Form("bfloat16", _LINEAR.format("4.156", "a 16-bit scale and a 4-bit zero"),
                  "matrix_params", 4 + (16 + 4) / 128),
}  # fmt: skip
# What people call them, less case, spaces, hyphens and underscores.
ALIASES = {
    "float32": ("fp32", "f32", "32bit", "float"),
    "bfloat16": ("bf16", "16bit"),
    "float16": ("fp16", "f16", "half"),
    "8-bit": ("8bits", "int8", "q8", "q80", "w8a16", "w8a8"),
    "fp8": ("f8", "float8", "e4m3", "fp8e4m3"),
    "4-bit": ("4bits", "int4", "uint4", "q4", "q40", "q4km", "nf4", "fp4", "awq", "gptq", "w4a16"),
}
KEPT = (
    "8-bit, mxfp4 and 4-bit leave embeddings, output matrix, routers, norms, biases and the "
    "cache in bfloat16"
)
USUAL = tuple(name for name in FORMS if name not in ("float16", "fp8"))


def named(text: str) -> str:
    """The form that people mean by a text such as "4bit" or "BF16"; the text where none is."""
    plain = _plain(text)
    for name in FORMS:
        if plain in (_plain(name), *ALIASES.get(name, ())):
            return name
    return text


def listed(text: str) -> list[str]:
    """The forms of a list such as "bf16, 4 bit"."""
    joined = re.sub(r"(\d)\s+bits?\b", r"\1bit", text, flags=re.IGNORECASE)
    return [named(part) for part in re.split(r"[,\s]+", joined) if part]


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "").replace(" ", "")


def held_as(card: ModelCard, form: Form) -> ModelCard:
    """The same model with its weights in this form; `card` is counted in the form's dtype."""
    if not form.quantised:
        return card
    count, in_experts = getattr(card, form.quantised), card.expert_matrix_params or 0
    if not count:
        what = "routed experts" if form.quantised == "expert_matrix_params" else "linear layers"
        raise ModelError(f"{card.name} has no {what} that could be held so")

    def saved_bytes(weights: int) -> int:
        return round(weights * (16 - form.bits) / 8)

    unread = card.unread_matrix_params if form.quantised == "matrix_params" else 0
    return replace(
        card,
        weight_bytes=card.weight_bytes - saved_bytes(count),
        routed_bytes=card.routed_bytes - saved_bytes(in_experts),
        unread_bytes=card.unread_bytes - saved_bytes(unread),
    )


def not_run(card: ModelCard, form: str, context: int) -> ModelError:
    """Why an arm in this form has no time, and what its bytes would allow.

    `card` is counted in the form's dtype.
    """
    now = card.decode_bytes(context)
    then = held_as(card, FORMS[form]).decode_bytes(context)
    return ModelError(
        f"{form} is not timed here: its kernels come from the hub at run time (package kernels), "
        f"and random weights have no such form; a step at {context} tokens would read "
        f"{then / 1e9:.3g} GB instead of {now / 1e9:.3g} GB, so that memory would allow "
        f"{now / then:.2f} times the {card.dtype} bound"
    )
