"""vLLM as a decode stack: its engine in a process and an interpreter of its own.

The engine has its own torch, so that it cannot share the workbook's process. It is started in a
process group of its own, logs to a file, and answers through a pipe. It is called as any stack is,
`engine(ids, new_tokens, on_token=None)`, and a call is over when its tokens are back here: times,
batches and energy are taken around it by the workbook's own definitions. Weights are drawn by name
(`models.draws`), so that the workbook's nets have the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.models import draws
from lib.models.prompts import exact_prompt
from lib.records.record import KEY_FIELDS, Record
from lib.stacks.engine_process import EngineError, Process
from lib.stacks.vllm_checks import form_in_use, require, require_together, require_whole
from lib.stacks.vllm_settings import (
    DUMMY,
    Settings,
    arguments_of,
    config_of,
    environment,
    interpreter,
    lay_out,
    with_layers,
)

STACK = "vllm"
START_LIMIT_S, CALL_LIMIT_S = 900.0, 600.0
KEPT_PROMPTS = 8
MOST_WARMUP_CALLS = 24
SAMPLED_IDS = 128  # as many as vLLM gives log-probabilities of in one request
# What vLLM tells of its start in its log alone: seconds, and the bytes of the model.
_LOGGED = {
    "model_gib": r"Model loading took ([\d.]+) GiB",
    "load_s": r"Model loading took .*? and ([\d.]+) seconds",
    "compile_s": r"torch\.compile(?: and .*)? (?:took|takes) ([\d.]+) s in total",
    "capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "init_s": r"init engine \(.*?\) took ([\d.]+) (?:s\b|seconds)",
}


@dataclass
class Answered:
    """What a call gave, as `Decoded` has it: tokens (batch, new_tokens), no cache to hold.

    `engine_s` are the seconds by the engine's own clock, `scheduler` what its scheduler told of
    the call. `prepare_s`, asked after the call is timed, is the whole call where something was
    compiled or captured in it.
    """

    tokens: Any
    engine_s: float
    scheduler: dict[str, Any]
    compiled: Callable[[], bool]
    routed: list | None = None
    cache: None = None
    decode_s: None = None

    @property
    def prepare_s(self) -> float:
        return self.engine_s if self.compiled() else 0.0


class VllmEngine:
    """A running engine: a `Subject`, and a decode stack for one model.

    `known` says whose weights it has; `barred` are, a round each, the values of parameters with
    which all routers choose the same `pins` experts, or with which a `block` of layers is left; and
    `expected` is what our own net computed along a continuation, where `measure.vllm.opened` was
    asked for them. Where only the `first_layers` can be computed, an engine with the same layers is
    compared in its place; `unchecked` says why none can be.

    Raises EngineError where it cannot start within `START_LIMIT_S`, or holds the weights in another
    form than asked: a fallback to bfloat16 is not measured under the name of MXFP4.
    """

    stack = STACK
    net = None  # it is in another process

    def __init__(
        self,
        name: str,
        config: Any,
        card: Any,
        settings: Settings,
        *,
        folder: str | Path,
        python: str | None = None,
        device: Any = None,
        source: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        start_limit_s: float = START_LIMIT_S,
        command: Sequence[str] | None = None,
    ) -> None:
        """`config` is transformers' configuration of the model; its log goes to `folder`.

        `device` is the board whose memory is read around the start. Without a `tokenizer` prompts
        are drawn. `command` replaces the engine's program, for tests.
        """
        self.name, self.card, self.settings, self.device = name, card, settings, device
        self.tokenizer, self.config = tokenizer, config
        self._given = {"folder": folder, "python": python, "device": device, "source": source}
        self._given |= {"tokenizer": tokenizer, "start_limit_s": start_limit_s, "command": command}
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = tempfile.TemporaryDirectory(prefix="vllm-")
        place = lay_out(Path(self.path.name))
        net, laws = draws.build(config, "bfloat16", "meta")
        self.plan = draws.plan_of(net, laws)
        model = config_of(config, type(net).__name__, settings)
        arguments = arguments_of(model, self.plan, settings, place)
        arguments["model"] = model_path(arguments["model"], place)
        script = [python or interpreter(), str(place / "vllm_engine.py")]
        before = _board_state(device)
        start_s = time.monotonic()
        self.process = Process(command or script, self.folder / "vllm.log", environment(place))
        self.started = self.process.ask(
            "start",
            start_limit_s,
            needs=("worker", "settings", "versions", "stamps"),
            arguments=arguments,
        )
        self.start_s = time.monotonic() - start_s
        self.used_bytes = self._used_since(before)
        self.vocab_size = vocab_size(config)
        self.source = {**(source or {}), "loaded_dtype": settings.form}
        if settings.weights == "random":
            self.source["draws"] = draws.digest(self.plan, settings.seed)
            self.source["draws_generator"] = draws.GENERATOR
        self.barred: list[dict[str, list[float]]] = []
        self.expected: list[dict[str, Any]] = []
        self.known: dict[str, Any] = {}
        self.pins, self.block, self.first_layers, self.unchecked = 0, 0, 0, ""
        self._prompts: dict[int, tuple[int, Any]] = {}
        self._count, self._compiled = 0, None
        try:
            self.form = form_in_use(self.started["worker"], self.plan)
            require(self.started, settings, self.form)
            self.something_compiled()
            self._memory = self.process.ask("memory", CALL_LIMIT_S)
        except Exception:
            self.close()
            raise

    def _used_since(self, before: Mapping[str, Any]) -> list[int] | None:
        """Bytes of each GPU that the start has taken; says how many processes there are its own."""
        after = _board_state(self.device)
        if not after or None in (*before["used"], *after["used"]):
            return None
        counts = zip(after["processes"], before["processes"], strict=True)
        self.device.own_processes = [max(1, (late or 0) - (early or 0)) for late, early in counts]
        return [late - early for late, early in zip(after["used"], before["used"], strict=True)]

    def anew(self, layers: int = 0, **changes: Any) -> VllmEngine:
        """Another engine with other settings, or with the first layers alone, after this one has
        ended."""
        self.close()
        settings, config = replace(self.settings, **changes), with_layers(self.config, layers)
        card = replace(self.card, layers=layers) if layers else self.card
        return VllmEngine(self.name, config, card, settings, **self._given)

    # a Subject

    @property
    def ended(self) -> bool:
        """Whether the process was ended, by `close` or for what it did."""
        return self.process.ended

    @property
    def load_s(self) -> float:
        """Seconds from nothing to an engine that answers."""
        return self.start_s

    def require_batch(self, batch: int) -> None:
        """Raise where so many sequences are never held at once."""
        if batch > self.started["settings"]["max_num_seqs"]:
            raise EngineError(
                f"batch {batch} is more than the {self.started['settings']['max_num_seqs']} "
                "sequences that the engine was started for (max_num_seqs); lower the batch"
            )

    def key(self, **changes: Any) -> dict[str, Any]:
        """All key fields of a record; what differs from the base arm is given as `changes`."""
        worker = self.started["worker"]
        base = dict.fromkeys(KEY_FIELDS) | {
            "model": self.name,
            "weights": "random-dummy" if self.settings.weights == DUMMY else self.settings.weights,
            "dtype": self.form,
            "stack": STACK,
            "experts": ", ".join(worker["experts"]) or "none",
            "attention": ", ".join(worker["attention"]),
            "cache": "paged",
            "batch": 1,
            "decoding": "greedy",
            "engine": self.engine_id,
            "devices": self.settings.devices if self.settings.devices > 1 else None,
        }
        if unknown := changes.keys() - base.keys():
            raise EngineError(f"unknown key fields {sorted(unknown)}; known: {list(KEY_FIELDS)}")
        return base | changes

    def prompt(self, context: int, *, seed: int, batch: int = 1) -> list[list[int]]:
        """Token ids, one prompt for each sequence of a batch; drawn without a tokenizer."""
        seeds = range(seed, seed + batch)
        return [prompt_of(self.config, self.tokenizer, context, s) for s in seeds]

    def synchronize(self) -> None:
        """A call is over when its tokens are here: there is nothing to wait for."""

    def clock_s(self) -> float:
        """The device's clock, or the system's monotonic one."""
        return self.device.clock_s() if self.device else time.perf_counter()

    def generate(
        self, ids: Any, new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> Answered:
        """Exactly `new_tokens` greedy tokens for each row of ids (batch, context).

        Prompts are sent the first time these ids are given, so that a timed call does not send
        them. Raises EngineError where a sequence was queued for want of room, or preempted.
        """
        import torch

        number = self._number_of(ids)
        answer = self.process.ask(
            "generate",
            CALL_LIMIT_S,
            on_token,
            needs=("tokens", "scheduler", "start_s", "stop_s"),
            number=number,
            new_tokens=new_tokens,
            stream=on_token is not None,
        )
        batch = len(ids)
        require_whole(answer, batch, new_tokens)
        require_together(answer["scheduler"], batch)
        return Answered(
            torch.tensor(answer["tokens"]),
            answer["stop_s"] - answer["start_s"],
            answer["scheduler"],
            self.something_compiled,
            answer.get("routed"),
        )

    __call__ = generate

    def forced_logits(self, ids: Any, continuation: Any) -> Any:
        """Logits (1, steps, vocabulary) after each token of a continuation, by the decode path."""
        import torch

        path = Path(self.path.name) / "logits.bin"
        tokens = _lists(continuation)[0]
        answer = self.process.ask(
            "forced",
            CALL_LIMIT_S,
            needs=("shape",),
            number=self._number_of(ids),
            continuation=tokens,
            path=str(path),
        )
        steps, sequences, width = answer["shape"]
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
        logits = data.view(steps, sequences, width)[: len(tokens), :, : self.vocab_size]
        return logits.transpose(0, 1)

    def logprobs(self, ids: Any, continuation: Any) -> list[float]:
        """Log-probability of each token of a continuation of the first prompt, as a prefill."""
        return self.process.ask(
            "logprobs",
            CALL_LIMIT_S,
            needs=("logprobs",),
            number=self._number_of(ids),
            continuation=_lists(continuation)[0],
        )["logprobs"]

    def sampled(self, ids: Any, new_tokens: int) -> dict[str, Any]:
        """Greedy `tokens` (batch, steps) of a batch, and `logprobs` (batch, steps, SAMPLED_IDS).

        The log-probabilities are those of `ids`, spread evenly over the vocabulary.
        """
        step = max(1, self.vocab_size // SAMPLED_IDS)
        wanted = list(range(0, self.vocab_size, step))[:SAMPLED_IDS]
        answer = self.process.ask(
            "sampled",
            CALL_LIMIT_S,
            needs=("tokens", "logprobs"),
            number=self._number_of(ids),
            new_tokens=new_tokens,
            ids=wanted,
        )
        return {"tokens": answer["tokens"], "logprobs": answer["logprobs"], "ids": wanted}

    @contextlib.contextmanager
    def pinned(self, barred: Mapping[str, Sequence[float]]) -> Iterator[None]:
        """Other values for small parameters inside the block, by vLLM's name (routers' biases,
        norms); one number fills all of a parameter."""
        before = self.process.ask(
            "overwrite", CALL_LIMIT_S, needs=("before",), values=dict(barred)
        )["before"]
        try:
            yield
        finally:
            if not self.ended:  # whose own error is the one to tell
                self.process.ask("overwrite", CALL_LIMIT_S, values=before)

    # what is in use

    @property
    def engine_id(self) -> str:
        """A short name of everything that changes speed: rows of different ones are not one arm."""
        worker, weights = self.started["worker"], self.settings.weights
        text = json.dumps([self._speed(), worker["experts"], self.form, weights], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _speed(self) -> dict[str, Any]:
        worker = self.started["worker"]
        return {
            **{f"engine_{n}": v or "none" for n, v in self.started["versions"].items()},
            **{f"engine_{n}": v for n, v in self.started["settings"].items()},
            "engine_linear": ", ".join(worker["linear"]),
            "engine_experts": ", ".join(worker["experts"]) or None,
            "engine_attention": ", ".join(worker["attention"]),
        }

    @property
    def values(self) -> dict[str, Any]:
        """What every row of this engine says of it."""
        return {**self.source, **self._speed(), "engine_id": self.engine_id}

    def start_row(self, env_id: str | None) -> Record:
        """A row of kind `engine`: seconds of the start by its parts, and memory in four columns.

        Bytes: weights, cache reserved, cache used (by the fullest call so far), and what the board
        has in use more than before the start. Of several GPUs they are sums, and those of each
        stand in the `board_` values of the same names.
        """
        told = logged(self.folder / "vllm.log")
        stamps = dict(self.started["stamps"])
        memory = self._memory
        values = {
            "start_s": self.start_s,
            "import_s": stamps["imported"] - stamps["start"],
            "engine_start_s": stamps["ready"] - stamps["imported"],
            **told,
            **{n: memory[n] for n in ("weights_bytes", "cache_reserved_bytes") if n in memory},
            "cache_used_bytes": self.cache_bytes(self._share),
            "used_bytes": self.used_bytes and sum(self.used_bytes),
            **self._of_boards(memory),
            "drawn_s": self.started["worker"]["loaded"].get("seconds"),
            "parameter_bytes": self.started["worker"]["parameter_bytes"],
        }
        reasons = {
            "used_bytes": "the board's memory was not read around the start",
            "cache_used_bytes": "no call was made yet, or the cache's size is not known",
            "drawn_s": "the weights were not drawn by name",
            "load_s": "vLLM's log does not say",
            "compile_s": "vLLM's log does not say: nothing was compiled, or it came from its cache",
            "capture_s": "vLLM's log does not say: nothing was captured",
            "init_s": "vLLM's log does not say",
            "model_bytes": "vLLM's log does not say",
        }
        return Record(
            "engine",
            self.key(),
            values={**self.values, **{n: v for n, v in values.items() if v is not None}},
            missing={n: reason for n, reason in reasons.items() if values.get(n) is None},
            env_id=env_id,
        )

    def _of_boards(self, memory: Mapping[str, Any]) -> dict[str, list[int]]:
        """Bytes of each GPU, where there are several."""
        if self.settings.devices == 1:
            return {}
        names = ("weights_bytes", "cache_reserved_bytes")
        held = {f"board_{n}": [one[n] for one in memory["boards"]] for n in names}
        return {"board_used_bytes": self.used_bytes, **held}

    _share = 0.0  # of the cache, in the fullest call so far

    def cache_bytes(self, share: float) -> int | None:
        """Bytes of the reserved cache that a share of its blocks is."""
        reserved = self._memory.get("cache_reserved_bytes")
        return round(share * reserved) if reserved and share else None

    def close(self) -> None:
        """End the engine and everything that it started."""
        self.process.close()
        self.path.cleanup()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _number_of(self, ids: Any) -> int:
        """The number under which the engine keeps these prompts; sent where it does not yet."""
        known = self._prompts.get(id(ids))
        if known is None or known[1] is not ids:
            self._count += 1
            number = self._count % KEPT_PROMPTS
            self._prompts = {k: v for k, v in self._prompts.items() if v[0] != number}
            self._prompts[id(ids)] = known = (number, ids)  # held, so that its id stays its own
            self.process.ask("prompts", CALL_LIMIT_S, number=number, ids=_lists(ids))
        return known[0]

    def something_compiled(self) -> bool:
        """Whether anything was compiled or captured since this was last asked."""
        now = self.process.ask("counters", CALL_LIMIT_S, needs=("compiled",))["compiled"]
        before, self._compiled = self._compiled, now
        return before is not None and now != before


def model_path(model: str, place: Path) -> str:
    """The model's folder as the engine is told it, which works in `place`.

    vLLM keeps what it compiled under a key that holds this path: of a model stated in `place` it
    is the name alone, so that the next engine of the same kind need not compile.
    """
    path = Path(model).absolute()
    return path.name if path.parent == place.absolute() else str(path)


def vocab_size(config: Any) -> int:
    """Token ids of a model's vocabulary."""
    return config.get_text_config(decoder=True).vocab_size


def prompt_of(config: Any, tokenizer: Any, context: int, seed: int) -> list[int]:
    """Token ids of one prompt of exactly this length."""
    size = vocab_size(config)
    return list(exact_prompt(tokenizer, context, seed=seed, vocab_size=size, special_ids=()).ids)


def _lists(ids: Any) -> list[list[int]]:
    return ids.tolist() if hasattr(ids, "tolist") else [list(row) for row in ids]


def _board_state(device: Any) -> dict[str, Any]:
    """Bytes in use and processes of each GPU of a device; empty where nothing tells."""
    boards = getattr(device, "boards", ())
    return (
        {
            "used": [board.gpu_used_bytes() for board in boards],
            "processes": [board.process_count() for board in boards],
        }
        if boards
        else {}
    )


def logged(log: Path) -> dict[str, float | None]:
    """Seconds of loading, compiling, capturing and all of vLLM's set-up, and `model_bytes` that the
    loading took, as its log tells them."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = {name: re.findall(pattern, text) for name, pattern in _LOGGED.items()}
    last = {name: float(values[-1]) if values else None for name, values in found.items()}
    gib = last.pop("model_gib")
    return last | {"model_bytes": None if gib is None else round(gib * 2**30)}
