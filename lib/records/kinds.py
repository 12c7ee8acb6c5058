"""Every kind of row, and the values that a key can take, in the order in which they are shown."""

from __future__ import annotations

import functools
from pathlib import Path

from lib import files
from lib.files import read_yaml

WEIGHTS = ("random", "checkpoint", "gguf")
UNKNOWN = "unknown"  # weights and dtype of a server that somebody else has started
DTYPES = ("bfloat16", "float16", "float32")
ENGINE_FORMS = ("bfloat16", "mxfp4", "fp8")  # that a stack which is an engine holds weights in
# Implementations of a mixture of experts, ours included.
EXPERTS = ("loop", "grouped_mm", "batched_mm", "all_experts", "deepgemm", "sonicmoe")
STAND_IN = "random-dummy"  # an engine's own weights: all tokens choose the same experts
STUDY_STACK = "hf-eager"  # statements are about this stack first, then what others change
ABLATIONS = ("decoding", "context", "precision", "experts", "stack")
PROTOCOLS = {"memory-paper": "paper", "memory": "generate()"}

# What a row of each kind holds. Samples are seconds (_s) and joules (_j), one a call or window.
KINDS = {
    "environment": "the machine: GPU, driver, CPU, versions; other rows name it by env_id",
    "card": "the model: parameters, bytes, cache by the architecture; where it came from",
    "ceilings": "the machine's limits: bandwidth of copies, reads and products, peak, launches",
    "gate": "relative error of a stack's logits against those of generate()",
    "latency": "calls of one length: ttft_s of one token, e2e_s of more, decode_s by the device",
    "itl": "calls whose tokens are stamped one by one: token_s",
    "aa": "one arm against itself: ttft_s",
    "busy": "a profiled step: how long the device works, and on which kernels",
    "made": "what one call made: how many tokens, and the bytes of its cache",
    "harness": "calls through the harness and in a bare loop",
    "trace": "which experts decoding used, and the parameters and bytes that makes",
    "memory-paper": "bytes of a call by the paper's protocol, which holds the prompt's logits",
    "memory": "bytes of a call of generate()",
    "energy": "joules of whole calls, in blocks of windows",
    "energy-slope": "the same of other lengths: joules of a token and of the prefill",
    "energy-again": "a second pass, the last model first",
    "energy-sampler": "calls with and without the process that reads the power",
    "energy-weights": "the same cell with other values in the weights",
    "energy-real": "a model with its real weights beside random ones",
    "energy-peer": "the same windows by another tool",
    "instrument": "how the board's readouts follow a known load",
    "batch": "calls of several sequences at once",
    "batch-energy": "their joules",
    "serving": "one load of one server: columns of facts of its requests, tokens by second",
    "serving-mix": "the same, for a fit of energy: many shapes, from prompts to answers only",
    "engine": "how an engine was started, and what it really uses",
    "engine-trace": "distinct experts that each step of an engine chose",
    **{f"ablation-{name}": f"calls that differ in the {name} alone" for name in ABLATIONS},
}


def listed_models() -> tuple[str, ...]:
    """Names in params/models.yaml, in its order; the file is read again only when it changed."""
    file = files.resolve("params/models.yaml")
    return _names(file, file.stat().st_mtime_ns) if file.exists() else ()


@functools.lru_cache(maxsize=4)
def _names(file: Path, changed_ns: int) -> tuple[str, ...]:
    return tuple(read_yaml(file))


def model_order(name: str) -> tuple[int, str]:
    """Sorts models as params/models.yaml lists them, unlisted ones after them by name."""
    names = listed_models()
    return (names.index(name) if name in names else len(names), name)
