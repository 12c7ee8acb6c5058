"""Kinds of servers as data: how each is started, asked for a length, and read.

A new kind is one entry here and one test. Every kind speaks the OpenAI completions and chat
protocol; they differ in what else they take. Sources: vLLM 0.25's and transformers 5.17's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

APIS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Kind:
    """What tells one server from another.

    `forced(n)` are the fields by which exactly n tokens come out, empty where the server cannot be
    forced; `command(python, model, port)` starts it on a folder, `model_options(device, dtype)` say
    where and in what; `python` names the environment variable that holds its interpreter, `venv`
    the folder of its own environment; `batching_options` turn continuous batching on, None where it
    is always; `own_page` is a page that no other kind has.
    """

    token_ids: bool = False
    fields: dict[str, Any] | None = None
    forced: Callable[[int], dict[str, Any]] = lambda tokens: {}
    metrics: str | None = None
    health: str | None = None
    command: Callable[[str, str, int], list[str]] | None = None
    model_options: Callable[[str, str], tuple[str, ...]] = lambda device, dtype: ()
    python: str | None = None
    venv: str | None = None
    needs: tuple[str, ...] = ()
    environment: dict[str, str] | None = None
    batching_options: tuple[str, ...] | None = None
    version_of: str | None = None
    own_page: str | None = None


def _vllm_command(python: str, model: str, port: int) -> list[str]:
    module = "vllm.entrypoints.openai.api_server"
    command = [python, "-m", module, "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--disable-uvicorn-access-log"]  # a line a request, written beside the work


def _transformers_command(python: str, model: str, port: int) -> list[str]:
    # The console script's function, by which the package need not be on PATH.
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    return [python, "-c", code, "serve", model, "--host", "127.0.0.1", "--port", str(port)]


def _generation_config(tokens: int) -> dict[str, Any]:
    """transformers serve answers 422 to ignore_eos and min_tokens, and takes this instead."""
    config = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return {"generation_config": json.dumps(config)}


# Left to itself, its cache takes nearly all the memory of a CPU host; 16,384 tokens are bounded.
CONTINUOUS_BATCHING = (
    "--continuous-batching",
    *("--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "2048"),
)
USAGE = {"stream_options": {"include_usage": True}}
KINDS: dict[str, Kind] = {
    "openai": Kind(fields=USAGE),
    "vllm": Kind(
        token_ids=True,
        # Counts come with every chunk, also where it has no text (--skip-tokenizer-init).
        fields={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        forced=lambda tokens: {"ignore_eos": True, "min_tokens": tokens},
        metrics="/metrics",
        health="/health",
        command=_vllm_command,
        python="VLLM_PYTHON",
        venv=".venv-vllm",
        needs=("vllm",),
        version_of="vllm",
    ),
    # It sends usage at the end without being asked, and none with the chunks before.
    "transformers": Kind(
        forced=_generation_config,
        health="/health",
        command=_transformers_command,
        model_options=lambda device, dtype: ("--device", device, "--dtype", dtype),
        python="SERVE_PYTHON",
        needs=("transformers", "fastapi", "uvicorn", "openai"),
        environment={"HF_HUB_OFFLINE": "1"},
        batching_options=CONTINUOUS_BATCHING,
        version_of="transformers",
        own_page="/load_model",
    ),
}


def kind(name: str) -> Kind:
    """The entry of a kind; raises with the known names."""
    if name not in KINDS:
        raise ValueError(f"unknown kind of server {name!r}; known: {', '.join(sorted(KINDS))}")
    return KINDS[name]


def body(
    name: str, api: str, model: str, prompt: str | Sequence[int], output_tokens: int
) -> dict[str, Any]:
    """The JSON body of one streamed, greedy request for exactly `output_tokens` tokens.

    `prompt` is text, or token ids where the kind takes them (raises where it does not).
    """
    entry = kind(name)
    if api not in APIS:
        raise ValueError(f"unknown api {api!r}; known: {', '.join(APIS)}")
    is_text = isinstance(prompt, str)
    if not is_text and (not entry.token_ids or api == "chat"):
        raise ValueError(f"{name} takes no token ids as a prompt of {api}; give text")
    content = {"prompt": prompt if is_text else list(prompt)}
    if api == "chat":
        content = {"messages": [{"role": "user", "content": prompt}]}
    common = {"model": model, "stream": True, "temperature": 0, "max_tokens": output_tokens}
    return {**common, **content, **(entry.fields or {}), **entry.forced(output_tokens)}
