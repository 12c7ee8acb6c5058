"""vLLM's engine as a process of its own: reads requests from standard input, answers by a pipe.

Run as a script by the interpreter that holds vLLM, which need not be that of the workbook; imports
nothing of lib. Arguments: the number of the pipe to answer to, and of one that closes when the
parent ends. One JSON object a line in both directions; what vLLM prints goes to its log. The first
process is a guard that does nothing but wait: when the parent ends, closes the pipe, or the engine
ends, it kills every process of the group, so that no core of vLLM is left with the GPU's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

POLL_S = 0.5
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
SLACK = 1.5  # of a sequence's share of the cache: less room than this means that it waits for room


# --- the guard ---------------------------------------------------------------------------------


def guard(engine: int, lifeline: int, parent: int, answers: int) -> None:
    """Wait until the parent or the engine ends, then end every process of the group."""
    while True:
        closed = select.select([lifeline], [], [], POLL_S)[0]
        ended, status = os.waitpid(engine, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                os.write(answers, json.dumps({"ended": code}).encode() + b"\n")
        if closed or ended or os.getppid() != parent:
            for pid in below(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)


def below(root: int) -> list[int]:
    """Processes below one, those that left its group too (Linux; elsewhere none are found)."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found, level = [], [root]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        found += level
    return found


def end_with_parent() -> None:
    """Have the system kill this process when the one above it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Children whose own parent has ended become this process's (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


# --- requests and answers ----------------------------------------------------------------------


def serve(answer: Callable[[dict[str, Any]], None], engine: Any) -> None:
    """Answer requests until one is `stop` or the input ends.

    A request is `{"op": name, ...}`; its answer repeats the op and holds the result, or `error`.
    """
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "stop":
            break
        try:
            result = getattr(engine, op)(**request, answer=answer)
        except Exception as error:  # the parent decides what an error means; the log has the rest
            import traceback

            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        answer({"op": op, **result})


def answering(pipe: int) -> Callable[[dict[str, Any]], None]:
    """A function that writes one line to the pipe, which no program started here inherits."""
    os.set_inheritable(pipe, False)

    def answer(message: dict[str, Any]) -> None:
        data = json.dumps(message, allow_nan=False).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    return answer


# --- the engine --------------------------------------------------------------------------------


class Recorder:
    """What the scheduler told while a call ran; stands where vLLM's own loggers would.

    `queued` counts steps at which a sequence waited though it was not for its turn in the prefill:
    all places were taken, or the cache had no room for one more.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.reset()

    def reset(self) -> None:
        self.steps = self.running = self.waiting = self.queued = self.preempted = 0
        self.cache_share = 0.0
        self.prefix_queries = self.prefix_hits = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **others: Any) -> None:
        """Called by vLLM after each step that gave tokens."""
        stats, running = scheduler_stats, scheduler_stats.num_running_reqs
        waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
        share = stats.kv_cache_usage
        self.steps += 1
        self.running, self.waiting = max(self.running, running), max(self.waiting, waiting)
        self.cache_share = max(self.cache_share, share)
        full = running >= self.max_num_seqs or 1 - share < SLACK * share / max(running, 1)
        self.queued += bool(waiting and running and full)
        self.preempted += iteration_stats.num_preempted_reqs if iteration_stats else 0
        if stats.prefix_cache_stats:
            self.prefix_queries += stats.prefix_cache_stats.queries
            self.prefix_hits += stats.prefix_cache_stats.hits

    def log(self) -> None:
        """Nothing is logged."""

    log_engine_initialized = log

    def record_sleep_state(self, *args: Any) -> None:
        """The engine never sleeps here."""

    def values(self) -> dict[str, Any]:
        names = ("steps", "running", "waiting", "queued", "preempted", "cache_share")
        return {name: getattr(self, name) for name in names} | {
            "prefix_queries": self.prefix_queries,
            "prefix_hits": self.prefix_hits,
        }


class Engine:
    """The requests that the parent can make, each a method; `answer` sends what comes before."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.prompts_by_id: dict[int, list[list[int]]] = {}
        self.count = 0

    def start(self, arguments: dict[str, Any], answer: Any) -> dict[str, Any]:
        """Load a model: `arguments` are those of vLLM's EngineArgs."""
        stamps = [("start", time.perf_counter())]
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        stamps.append(("imported", time.perf_counter()))
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS
        )
        stamps.append(("ready", time.perf_counter()))
        self.recorder = Recorder(self.engine.vllm_config.scheduler_config.max_num_seqs)
        self.engine.logger_manager = self.recorder
        self._rpc("watch_compilation")
        return {"stamps": stamps, **self.in_use()}

    def in_use(self, answer: Any = None) -> dict[str, Any]:
        """Versions, settings as vLLM resolved them, and what its worker really holds."""
        config = self.engine.vllm_config
        return {
            "versions": versions(),
            "settings": settings(config),
            "worker": described(self._each("describe")),
            "pids": below(os.getppid()),
        }

    def memory(self, answer: Any = None) -> dict[str, Any]:
        """Bytes by the workers' own count: the sums, and those of each GPU in `boards`."""
        boards = self._each("held_bytes")
        return {**summed(boards), "boards": boards}

    def counters(self, answer: Any = None) -> dict[str, Any]:
        """How much was compiled or captured so far."""
        return {"compiled": summed(self._each("compiled"))}

    def prompts(self, number: int, ids: list[list[int]], answer: Any) -> dict[str, Any]:
        """Keep prompts under a number, so that a timed call need not send them."""
        self.prompts_by_id[number] = ids
        return {}

    def generate(
        self, number: int, new_tokens: int, stream: bool = False, answer: Any = None
    ) -> dict[str, Any]:
        """Exactly `new_tokens` greedy tokens for each prompt kept under a number.

        With `stream` a line `{"token": n}` is sent when every sequence has its n-th token.
        """
        prompts = self.prompts_by_id[number]
        send = (lambda n: answer({"token": n})) if stream else None
        self.recorder.reset()
        start_s = time.perf_counter()
        tokens, extra = self._run(prompts, new_tokens, send)
        stop_s = time.perf_counter()
        return {
            "tokens": tokens,
            "start_s": start_s,
            "stop_s": stop_s,
            "scheduler": self.recorder.values(),
            **extra,
        }

    def forced(
        self, number: int, continuation: list[int], path: str, answer: Any
    ) -> dict[str, Any]:
        """Logits (steps, sequences, vocabulary) after each token of a continuation, to a file.

        The decode path itself: the sampler is handed logits in which the given token leads. All
        prompts kept under the number must be the same, since rows are not told apart.
        """
        prompts = self.prompts_by_id[number]
        if any(prompt != prompts[0] for prompt in prompts):
            raise ValueError("a continuation can be forced on one prompt, alone or repeated")
        self._rpc("force", len(prompts), continuation)
        try:
            tokens, _ = self._run(prompts, len(continuation) + 1, None)
        finally:
            shape = self._rpc("forced_logits", path)
        if any(row[:-1] != continuation for row in tokens):
            raise RuntimeError("the continuation could not be forced on this version of vLLM")
        return {"shape": shape}

    def logprobs(self, number: int, continuation: list[int], answer: Any) -> dict[str, Any]:
        """Log-probability of each token of a continuation after the first prompt, as a prefill."""
        from vllm import SamplingParams

        prompt = self.prompts_by_id[number][0] + continuation
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, **_greedy())
        (output,) = self._outputs([prompt], params)
        last = output.prompt_logprobs[-len(continuation) :]
        found = [entry[token].logprob for entry, token in zip(last, continuation, strict=True)]
        return {"logprobs": found}

    def sampled(self, number: int, new_tokens: int, ids: list[int], answer: Any) -> dict[str, Any]:
        """Greedy tokens of a whole batch, and at each step the log-probabilities of these ids.

        The decode path as it is timed; logprobs (sequences, steps, ids).
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=new_tokens, logprob_token_ids=ids, **_greedy())
        outputs = [o.outputs[0] for o in self._outputs(self.prompts_by_id[number], params)]
        found = [[[step[i].logprob for i in ids] for step in o.logprobs] for o in outputs]
        return {"tokens": [list(o.token_ids) for o in outputs], "logprobs": found}

    def overwrite(self, values: dict[str, list[float]], answer: Any) -> dict[str, Any]:
        """Other values for small parameters, by vLLM's name; returns what they were."""
        return {"before": self._rpc("overwrite", values)}

    def _run(
        self, prompts: list[list[int]], new_tokens: int, send: Callable[[int], None] | None
    ) -> tuple[list[list[int]], dict[str, Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if send else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(max_tokens=new_tokens, output_kind=kind, **_greedy())
        outputs = self._outputs(prompts, params, send)
        if send:
            return outputs, {}
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        routed = [getattr(o.outputs[0], "routed_experts", None) for o in outputs]
        if any(choice is None for choice in routed):
            return tokens, {}
        return tokens, {"routed": [choice.tolist() for choice in routed]}

    def _outputs(
        self, prompts: list[list[int]], params: Any, send: Callable[[int], None] | None = None
    ) -> list[Any]:
        """What vLLM says of each prompt, in their order; with `send` the tokens of each."""
        order = []
        with self._held() if len(prompts) > 1 else contextlib.nullcontext():
            for ids in prompts:
                self.count += 1
                order.append(str(self.count))
                prompt = {"type": "token", "prompt_token_ids": ids}
                self.engine.add_request(order[-1], prompt, params)
        streamed = Streamed(order, send) if send else None
        done = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if streamed:
                    streamed.add(output.request_id, output.outputs[0].token_ids)
                if output.finished:
                    done[output.request_id] = output
            if streamed:
                streamed.tell()
        return [streamed.tokens[name] if streamed else done[name] for name in order]

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """No step inside the block, so that a batch begins when all of it is there. Otherwise its
        prompts are prefilled in other groups at each call, and kernels compiled for each."""
        core = self.engine.engine_core
        core.call_utility("pause_scheduler", "keep", False)
        try:
            yield
        finally:
            core.call_utility("resume_scheduler")

    def _rpc(self, method: str, *arguments: Any) -> Any:
        """The answer of the first worker; all of them are asked."""
        return self._each(method, *arguments)[0]

    def _each(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers, one for each GPU, in the order of their ranks."""
        return self.engine.collective_rpc(method, args=arguments)


class Streamed:
    """Collects tokens as they come, and tells once for each place that all sequences reached."""

    def __init__(self, order: list[str], send: Callable[[int], None]) -> None:
        self.tokens: dict[str, list[int]] = {name: [] for name in order}
        self.told, self.send = 0, send

    def add(self, name: str, tokens: Any) -> None:
        self.tokens[name].extend(tokens)

    def tell(self) -> None:
        """Send the places that every sequence has reached since last told."""
        reached = min(len(tokens) for tokens in self.tokens.values())
        for place in range(self.told + 1, reached + 1):
            self.send(place)
        self.told = max(self.told, reached)


def summed(parts: list[Any]) -> Any:
    """Numbers of several workers added up, name by name; None where one of them has none."""
    if isinstance(parts[0], dict):
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: summed([part[name] for part in parts if name in part]) for name in names}
    return None if None in parts else sum(parts)


def described(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """What all workers hold as the one model that it is: bytes are added up, the rest is that of
    the first; `draws` are the digests of what each has drawn."""
    held = summed([worker["parameter_bytes"] for worker in workers])
    digests = [worker["loaded"].get("digest") for worker in workers]
    return {**workers[0], "parameter_bytes": held, "draws": digests}


def _greedy() -> dict[str, Any]:
    """Greedy, and no token ends a sequence."""
    return {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


def versions() -> dict[str, str | None]:
    """Versions of what computes; None where a package is not installed."""
    from importlib import metadata

    import vllm

    found: dict[str, str | None] = {"python": sys.version.split()[0], "vllm": vllm.__version__}
    for name in ("torch", "transformers", "triton", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def settings(config: Any) -> dict[str, Any]:
    """What changes speed, as vLLM resolved it."""
    scheduler, cache, model = config.scheduler_config, config.cache_config, config.model_config
    compilation, parallel = config.compilation_config, config.parallel_config
    sharded = {}
    if parallel.tensor_parallel_size > 1:
        sharded["custom_all_reduce"] = not parallel.disable_custom_all_reduce
        symmetric = os.environ.get("VLLM_ALLREDUCE_USE_SYMM_MEM", "1")
        sharded["symmetric_memory_all_reduce"] = symmetric != "0"
    return {
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "chunked_prefill": plain(getattr(scheduler, "enable_chunked_prefill", None)),
        "async_scheduling": plain(getattr(scheduler, "async_scheduling", None)),
        "prefix_caching": cache.enable_prefix_caching,
        "block_size": cache.block_size,
        "cache_dtype": str(cache.cache_dtype),
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "max_model_len": model.max_model_len,
        "dtype": plain(model.dtype),
        "quantization": plain(model.quantization),
        "enforce_eager": model.enforce_eager,
        "load_format": str(config.load_config.load_format),
        "compilation_mode": plain(compilation.mode),
        "cudagraph_mode": plain(compilation.cudagraph_mode),
        "cudagraph_sizes": list(compilation.cudagraph_capture_sizes or ()),
        "tensor_parallel": parallel.tensor_parallel_size,
        **sharded,
        "model_runner": "v2" if getattr(config, "use_v2_model_runner", False) else "v1",
        "batch_arrival": "at once",  # Engine._held
    }


def plain(value: Any) -> Any:
    """What JSON can hold: an enumeration by its name, a dtype by torch's name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else str(value).removeprefix("torch.")


def main(answers: int, lifeline: int) -> None:
    """Leave a guard behind and serve, from the folder in which this file lies."""
    os.chdir(Path(__file__).resolve().parent)
    parent = os.getppid()
    adopt_orphans()
    engine = os.fork()
    if engine:
        os.close(0)
        guard(engine, lifeline, parent, answers)
    end_with_parent()
    os.close(lifeline)
    serve(answering(answers), Engine())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
