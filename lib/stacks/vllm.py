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
import math
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.models import draws
from lib.models.prompts import exact_prompt
from lib.records.record import KEY_FIELDS, Record
from lib.stacks import vllm_engine, vllm_weights

STACK = "vllm"
DUMMY = "dummy"  # vLLM's own stand-in weights: they collapse the routing of a mixture
WEIGHTS = ("random", "checkpoint", DUMMY)
FORMS = ("bfloat16", "mxfp4", "fp8")
START_LIMIT_S, CALL_LIMIT_S, STOP_LIMIT_S = 900.0, 600.0, 20.0
LOG_LINES = 15
KEPT_PROMPTS = 8
MOST_WARMUP_CALLS = 12
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SAMPLED_IDS = 128  # as many as vLLM gives log-probabilities of in one request
_OURS = (vllm_engine, vllm_weights, draws)  # what the engine is given, in one folder
# What vLLM tells of its start in its log alone: seconds, and the bytes of the model.
_LOGGED = {
    "model_gib": r"Model loading took ([\d.]+) GiB",
    "load_s": r"Model loading took .*? and ([\d.]+) seconds",
    "compile_s": r"torch\.compile (?:took|takes) ([\d.]+) s in total",
    "capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "init_s": r"init engine \(.*?\) took ([\d.]+) (?:s\b|seconds)",
}
# A process that was started for this interpreter must not lend its paths to another one.
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "VLLM_PYTHON")


class EngineError(RuntimeError):
    """An engine that cannot start, died, hangs, or did something else than it was asked."""


@dataclass(frozen=True)
class Settings:
    """What an engine is started with; None is vLLM's own choice, which the rows then name.

    `form` is what the weights are asked to be held in: bfloat16, mxfp4 (a mixture's experts, as
    gpt-oss is published) or fp8 (vLLM's online quantisation). `weights` is random (drawn by name),
    dummy, or checkpoint, of the folder named so. `max_model_len` counts prompt and new tokens of
    the longest sequence.
    """

    max_model_len: int
    max_num_seqs: int
    form: str = "bfloat16"
    weights: str = "random"
    checkpoint: str | None = None
    seed: int = 0
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    graph_sizes: tuple[int, ...] | None = GRAPH_SIZES
    enforce_eager: bool = False
    routed_experts: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise EngineError(f"unknown form {self.form!r} of weights; use one of {list(FORMS)}")
        if self.weights not in WEIGHTS:
            raise EngineError(f"unknown weights {self.weights!r}; use one of {list(WEIGHTS)}")
        if (self.weights == "checkpoint") != bool(self.checkpoint):
            raise EngineError("weights of a checkpoint need its folder, and no others do")


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


# --- starting and ending -----------------------------------------------------------------------


def interpreter(root: str | Path = ".") -> str:
    """The Python that holds vLLM: VLLM_PYTHON, or `.venv-vllm` below `root`."""
    if named := os.environ.get("VLLM_PYTHON"):
        return named
    own = Path(root) / ".venv-vllm" / "bin" / "python"
    if own.exists():
        return str(own)
    raise EngineError(
        "no interpreter with vLLM: run `make vllm`, or name one with VLLM_PYTHON=path "
        "(VLLM_PYTHONPATH=folder adds a folder of unpacked packages)"
    )


def lay_out(folder: Path) -> Path:
    """The folder that goes on the path of vLLM's interpreter: our files and an entry point.

    vLLM finds plugins by the metadata of installed packages, which may lie in any folder of the
    path; nothing is installed.
    """
    for module in _OURS:
        shutil.copy(module.__file__, folder)
    info = folder / "drawn_weights-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drawn-weights\nVersion: 0\n")
    entry = f"[{vllm_weights.GROUP}]\ndrawn_weights = vllm_weights:register\n"
    (info / "entry_points.txt").write_text(entry)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of vLLM's interpreter: no telemetry, no hub, our folder on its path."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    path = [str(folder), *filter(None, [kept.pop("VLLM_PYTHONPATH", None)])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_COLOR": "0",
    }


class Process:
    """A process that answers requests: one JSON object a line in, by a pipe of its own out.

    It and all that it starts end with this object, with `close`, and with this process.
    """

    def __init__(self, command: Sequence[str], log: str | Path, env: Mapping[str, str]) -> None:
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        answers, theirs = os.pipe()
        lifeline, self.lifeline = os.pipe()
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                [*command, str(theirs), str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=(theirs, lifeline),
                start_new_session=True,
            )
        os.close(theirs)
        os.close(lifeline)
        self.answers, self.rest = answers, b""
        self._end = weakref.finalize(self, _end, self.popen, (answers, self.lifeline))

    def ask(
        self,
        op: str,
        limit_s: float,
        on_token: Callable[[], None] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """The answer to a request; raises, and ends the process, where there is none in time."""
        if not self._end.alive:
            raise EngineError(f"the engine was ended before {op!r}: start another one")
        line = json.dumps({"op": op, **arguments}).encode() + b"\n"
        try:
            self.popen.stdin.write(line)
            self.popen.stdin.flush()
        except OSError:
            pass  # it has died; what it last said is read below
        deadline = time.monotonic() + limit_s
        while True:
            answer = self._line(op, deadline, limit_s)
            if "token" in answer:
                if on_token:
                    on_token()
                continue
            if "ended" in answer:
                self._fail(f"the engine ended during {op!r} ({_how(answer['ended'])})")
            if answer.get("op") != op:
                self._fail(f"the engine answered {str(answer)[:200]} when asked {op!r}")
            if "error" in answer:
                self._fail(f"the engine refused {op!r}: {answer['error']}")
            return answer

    def _line(self, op: str, deadline: float, limit_s: float) -> dict[str, Any]:
        while b"\n" not in self.rest:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._fail(f"no answer to {op!r} within {limit_s:g} s")
            if select.select([self.answers], [], [], min(left_s, 1.0))[0]:
                data = os.read(self.answers, 2**20)
                if not data:
                    self._fail(f"the engine closed its pipe during {op!r}")
                self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail(f"the engine answered {op!r} with {line[:200]!r}, which is no JSON object")
        return answer

    def _fail(self, what: str) -> None:
        self.close(kindly=False)
        raise EngineError(f"{what}; the end of {self.log.name}:\n{tail(self.log)}")

    def close(self, *, kindly: bool = True) -> None:
        """End the process and its whole group; `kindly` lets it finish by itself first."""
        if self._end.alive and kindly:
            with contextlib.suppress(OSError):
                self.popen.stdin.write(b'{"op": "stop"}\n')
                self.popen.stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_LIMIT_S)
        self._end()


def _end(popen: subprocess.Popen, pipes: Iterable[int]) -> None:
    """Close our ends, on which the guard kills its group, and see to it that it does."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            os.close(pipe)
    with contextlib.suppress(OSError):
        popen.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(STOP_LIMIT_S)
    with contextlib.suppress(OSError):  # no such group is left: as it should be
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(STOP_LIMIT_S)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def tail(path: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, after the last errors above them: a core that dies takes others with
    it, and the cause is what was said first."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    raised = [re.search(r"\w*(?:Error|Exception): .*", line) for line in text[:-lines]]
    causes = dict.fromkeys(found.group() for found in raised if found)
    return "\n".join([*list(causes)[-3:], *text[-lines:]]) or "(empty)"


# --- the stack ---------------------------------------------------------------------------------


class VllmEngine:
    """A running engine: a `Subject`, and a decode stack for one model.

    Raises EngineError where it cannot start within `START_LIMIT_S`, or holds the weights in another
    form than asked: a fallback to bfloat16 is not measured under the name of MXFP4.
    """

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
        start_limit_s: float = START_LIMIT_S,
        command: Sequence[str] | None = None,
    ) -> None:
        """`config` is transformers' configuration of the model; logs and plans go to `folder`.

        `device` is the board whose memory is read around the start. `command` replaces the
        engine's program, for tests.
        """
        self.name, self.card, self.settings, self.device = name, card, settings, device
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = tempfile.TemporaryDirectory(prefix="vllm-")
        place = lay_out(Path(self.path.name))
        net, laws = draws.build(config, "bfloat16", "meta")
        self.plan = draws.plan_of(net, laws)
        model = config_of(config, type(net).__name__, settings)
        arguments = arguments_of(model, self.plan, settings, self.folder)
        script = [python or interpreter(), str(place / "vllm_engine.py")]
        before = _used_bytes(device)
        start_s = time.monotonic()
        self.process = Process(command or script, self.folder / "vllm.log", environment(place))
        self.started = self.process.ask("start", start_limit_s, arguments=arguments)
        self.start_s = time.monotonic() - start_s
        after = _used_bytes(device)
        self.used_bytes = None if None in (before, after) else after - before
        self.vocab_size = config.get_text_config(decoder=True).vocab_size
        self.source = {**(source or {}), "loaded_dtype": settings.form}
        if settings.weights == "random":
            self.source["draws"] = draws.digest(self.plan, settings.seed)
            self.source["draws_generator"] = draws.GENERATOR
        self._prompts: dict[int, tuple[int, Any]] = {}
        self._count, self._compiled = 0, None
        try:
            self.form = form_in_use(self.started["worker"], self.plan)
            require(self.started, settings, self.form)
            self._something_compiled()
            self._memory = self.process.ask("memory", CALL_LIMIT_S)
        except Exception:
            self.close()
            raise

    # a Subject

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
        }
        if unknown := changes.keys() - base.keys():
            raise EngineError(f"unknown key fields {sorted(unknown)}; known: {list(KEY_FIELDS)}")
        return base | changes

    def prompt(self, context: int, *, seed: int, batch: int = 1) -> list[list[int]]:
        """The prompts of a net without a tokenizer: one of its own for each sequence of a batch."""
        return [
            list(
                exact_prompt(None, context, seed=s, vocab_size=self.vocab_size, special_ids=()).ids
            )
            for s in range(seed, seed + batch)
        ]

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
            self._something_compiled,
            answer.get("routed"),
        )

    __call__ = generate

    def forced_logits(self, ids: Any, continuation: Any) -> Any:
        """Logits (1, steps, vocabulary) after each token of a continuation, by the decode path."""
        import torch

        path = Path(self.path.name) / "logits.bin"
        tokens = _lists(continuation)[0]
        answer = self.process.ask(
            "forced", CALL_LIMIT_S, number=self._number_of(ids), continuation=tokens, path=str(path)
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
            number=self._number_of(ids),
            new_tokens=new_tokens,
            ids=wanted,
        )
        return {"tokens": answer["tokens"], "logprobs": answer["logprobs"], "ids": wanted}

    @contextlib.contextmanager
    def pinned(self, barred: Mapping[str, Sequence[float]]) -> Iterator[None]:
        """Other values for small parameters inside the block, by vLLM's name (routers' biases)."""
        before = self.process.ask("overwrite", CALL_LIMIT_S, values=dict(barred))["before"]
        try:
            yield
        finally:
            self.process.ask("overwrite", CALL_LIMIT_S, values=before)

    # what is in use

    @property
    def engine_id(self) -> str:
        """A short name of everything that changes speed: rows of different ones are not one arm."""
        text = json.dumps([self._speed(), self.key()], sort_keys=True)
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
        has in use more than before the start.
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
            "used_bytes": self.used_bytes,
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

    def _something_compiled(self) -> bool:
        """Whether anything was compiled or captured since this was last asked."""
        now = self.process.ask("counters", CALL_LIMIT_S)["compiled"]
        before, self._compiled = self._compiled, now
        return before is not None and now != before


def _lists(ids: Any) -> list[list[int]]:
    return ids.tolist() if hasattr(ids, "tolist") else [list(row) for row in ids]


def _used_bytes(device: Any) -> int | None:
    return device.gpu_used_bytes() if device is not None else None


def arguments_of(
    config: Mapping[str, Any], tensors: Sequence[draws.Draw], settings: Settings, folder: Path
) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs; writes the model's folder and the plan of its weights."""
    model = Path(settings.checkpoint or folder / f"model-{settings.form}")
    if not settings.checkpoint:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(config))
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": "bfloat16",
        "seed": 0,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enable_prefix_caching": False,
        "enforce_eager": settings.enforce_eager,
        "worker_extension_cls": "vllm_engine.Inspect",
    }
    if settings.weights == "checkpoint":
        arguments["load_format"] = "safetensors"
    elif settings.weights == DUMMY:
        arguments["load_format"] = DUMMY
    else:
        path = folder / "draws.json"
        path.write_text(draws.save(tensors, settings.seed))
        form = settings.form if settings.form == "mxfp4" else ""
        arguments["load_format"] = vllm_weights.LOAD_FORMAT
        arguments["model_loader_extra_config"] = {"plan": str(path), "form": form}
    if settings.form == "fp8":
        arguments["quantization"] = "fp8"
    if settings.max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if settings.graph_sizes and not settings.enforce_eager:
        sizes = list(settings.graph_sizes)
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if settings.routed_experts:
        arguments["enable_return_routed_experts"] = True
    return arguments | dict(settings.more)


def config_of(config: Any, architecture: str, settings: Settings) -> dict[str, Any]:
    """The model's configuration as its folder states it to vLLM, with the form that is asked."""
    data = config.to_dict()
    data["architectures"] = [architecture]
    data["dtype"] = "bfloat16"
    data.pop("quantization_config", None)
    if settings.form == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
        data["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [*kept, "model.embed_tokens", "lm_head"],
        }
    return data


def logged(log: Path) -> dict[str, float | None]:
    """Seconds of loading, compiling, capturing and all of vLLM's set-up, and `model_bytes` that the
    loading took, as its log tells them."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = {name: re.findall(pattern, text) for name, pattern in _LOGGED.items()}
    last = {name: float(values[-1]) if values else None for name, values in found.items()}
    gib = last.pop("model_gib")
    return last | {"model_bytes": None if gib is None else round(gib * 2**30)}


# --- what an engine must be --------------------------------------------------------------------


def form_in_use(worker: Mapping[str, Any], tensors: Sequence[draws.Draw]) -> str:
    """What the weights are held in, as the worker shows it: never by what was asked.

    A mixture is named by its experts, which hold nearly all of it; a dense model by what lies
    between embeddings and output matrix. Where no layer is quantised, the dtype of most bytes;
    elsewhere bits a value, counted in the worker's memory (padding and biases included).
    """
    experts = [draw for draw in tensors if ".experts." in draw.name]
    methods = worker["experts"] if experts else worker["linear"]
    parts = worker["parameter_bytes"]
    if all(name.startswith("Unquantized") for name in methods):
        sizes = Counter()
        for part in parts.values():
            sizes.update(part)
        return sizes.most_common(1)[0][0]
    named = experts or [d for d in tensors if not re.search("embed|lm_head", d.name)]
    values = sum(math.prod(draw.shape) for draw in named)
    held = parts.get("experts" if experts else "rest", {})
    bits = 8 * sum(held.values()) / values
    if bits < 4:
        return f"an unknown form ({bits:.1f} bits a value found)"
    if bits < 6:
        return "mxfp4"
    return "fp8" if bits < 10 else max(held, key=held.get)


def require(started: Mapping[str, Any], settings: Settings, form: str) -> None:
    """Raise where the engine is not what rows would say it is."""
    if form != settings.form:
        raise EngineError(
            f"the weights were asked in {settings.form}, but the engine holds them in {form}: "
            "this version of vLLM or this GPU has no kernels for it; ask for that form"
        )
    if started["settings"]["prefix_caching"]:
        raise EngineError("the engine caches prefixes, so that repeated prompts cost nothing")
    if settings.weights == "random" and not started["worker"]["loaded"].get("tensors"):
        raise EngineError(
            "the engine did not draw its weights by name: its plugin was not found; set "
            "VLLM_PLUGINS so that drawn_weights is among them, or unset it"
        )


def require_whole(answer: Mapping[str, Any], batch: int, new_tokens: int) -> None:
    """Raise unless every sequence has exactly the tokens asked for."""
    lengths = [len(row) for row in answer["tokens"]]
    if lengths != [new_tokens] * batch:
        raise EngineError(
            f"asked for {new_tokens} new tokens in each of {batch} sequences, got {lengths}"
        )


def require_together(scheduler: Mapping[str, Any], batch: int) -> None:
    """Raise where sequences were not all held at once, or a prefix was taken from a cache."""
    if scheduler["preempted"] or scheduler["queued"]:
        raise EngineError(
            f"{batch} sequences were not held at once: {scheduler['preempted']} preempted, "
            f"{scheduler['queued']} steps with one waiting for room (at most "
            f"{scheduler['running']} ran, the cache was {scheduler['cache_share']:.0%} full); "
            "lower the batch or the context, or raise max_num_seqs"
        )
    if scheduler["prefix_hits"]:
        raise EngineError(f"{scheduler['prefix_hits']} prompt tokens came from a prefix cache")


def settings_of(data: Mapping[str, Any]) -> Settings:
    """Settings from plain data (a profile); unknown names are an error."""
    if unknown := data.keys() - asdict(Settings(1, 1)).keys():
        raise EngineError(f"unknown settings of vLLM {sorted(unknown)}")
    return Settings(**data)
