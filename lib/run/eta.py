"""How long a job will take: the calls that its parameters ask for, at the speed of this machine.

A step of decoding takes what its bytes need of the memory, and on `generate()` no less than the
host needs to launch its layers. The constants are of runs on H100s and on small CPUs; how long the
jobs of this run really took corrects what is left (`Forecast`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.files import ParamsError
from lib.records import store
from lib.records.jobs import BEFORE_MODELS
from lib.records.kinds import STUDY_STACK
from lib.records.record import select
from lib.records.store import ACROSS
from lib.run.plan import Task
from lib.stacks.registry import STACKS

HOST_SCORE = 30.0  # million iterations a second of the host that the seconds below are of
LAYER_S = 0.00085  # that host launches one layer of a step; of a mixture of experts LAYER_S * MANY
MANY = 1.5
LOAD_BYTES_PER_S = 3e9  # from files that the system holds in memory
SHARE = {"hf-static": 0.6, "graph": 0.6, "graph-compiled": 0.8}  # of the bandwidth that a step uses
START_S = {True: 5.0, False: 2.0}  # of a measuring notebook on a GPU, or not: kernel, environment
FIGURES_S = {"latency": 5.0, "memory": 6.0, "energy": 6.0, "stacks": 4.0, "batch": 3.0}
READING_S = {"ape": 2.0, "summary": 8.0, "audit": 3.0, "machine": 8.0}
COMPILE_S = {"graph-compiled": 25.0, "hf-static": 80.0}  # the first time in a process
PASSES = 7  # of a check of logits: each a prefill and the steps
FORETOLD_S = 0.03  # a layer of a call that is run on shapes
PROFILED_S = 3.0  # a row of the profiler
LEAD_S, SETTLE_S, WARM_UP_S, SAMPLER_S, WAVES_S = 2.0, 4.7, 12.0, 0.8, 15.0
UNCERTAIN_S = 45.0  # of a forecast, believed beside what jobs have told; at most a job's seconds


@dataclass(frozen=True)
class Speed:
    """What the notebook `machine` measured: bytes and operations a second, the host's score."""

    gpu: bool
    read_bytes_per_s: float
    flop_per_s: float
    host_score_per_s: float

    @property
    def slower(self) -> float:
        """How many times as long as on the host that the seconds here are of; a score tells a part
        of it."""
        return (HOST_SCORE / self.host_score_per_s) ** 0.5


@dataclass(frozen=True)
class Size:
    """What a model's card says of a decode step at batch 1, and of the whole."""

    weight_bytes: float
    step_bytes: float
    active_params: float
    layers: int
    mixture: bool


def told(models: Sequence[Mapping[str, Any]] | None) -> dict[tuple[str, str], Size]:
    """Sizes by model and dtype, from what `preflight.sizes` returned."""
    return {(m["model"], m["dtype"]): Size(**m["size"]) for m in models or ()}


def speed(out_dir: Path) -> Speed | None:
    """Of the machine whose notebook has ended there; None before."""
    try:
        rows = store.load(out_dir / ACROSS / "machine" / "records.jsonl")
        ceilings = select(rows, "ceilings")[-1].values
    except (OSError, ParamsError, ValueError, IndexError):
        return None
    return Speed(
        "launch_s" in ceilings,
        ceilings["read_bytes_per_s"],
        ceilings["matmul_flop_per_s"],
        ceilings["host_score_per_s"],
    )


@dataclass(frozen=True)
class Calls:
    """Seconds of calls of one model on one machine."""

    here: Speed
    size: Size

    def step_s(self, stack: str = STUDY_STACK, batch: int = 1) -> float:
        """One step of decoding."""
        share = SHARE.get(stack, 0.6 if self.here.gpu else 0.4)
        memory_s = self.size.step_bytes / (self.here.read_bytes_per_s * share)
        if self.here.gpu and STACKS[stack].captured:
            return memory_s * (1 + batch / 32)
        return max(self._launch_s(), memory_s) * (1 + batch / (64 if self.here.gpu else 4))

    def _launch_s(self) -> float:
        layer_s = LAYER_S * self.here.slower * (MANY if self.size.mixture else 1)
        return self.size.layers * layer_s

    def call_s(self, context: int, tokens: int, stack: str = STUDY_STACK, batch: int = 1) -> float:
        """A prefill and the steps after it."""
        work_s = 2 * self.size.active_params * context * batch / (0.5 * self.here.flop_per_s)
        return max(work_s, self._launch_s()) + (tokens - 1) * self.step_s(stack, batch)

    def arm_s(self, context: int, tokens: int, repeats: int, stack: str, batch: int = 1) -> float:
        """A short call, one of full length, and those that are timed."""
        full_s = self.call_s(context, tokens, stack, batch)
        return self.call_s(context, min(tokens, 8), stack, batch) + (repeats + 1) * full_s

    def gate_s(self, stack: str, context: int, steps: int = 8, batch: int = 1) -> float:
        """The check of a stack's logits."""
        if stack == STUDY_STACK or STACKS[stack].apart:
            return 0.0
        return PASSES * self.call_s(context, steps + 1, batch=batch)

    def window_s(self, context: int, tokens: int, seconds: float, stack: str) -> float:
        """Calls that fill a window, and those before and after it."""
        call_s = self.call_s(context, tokens, stack)
        if not self.here.gpu:
            return max(seconds, call_s)
        lead_s = LEAD_S if stack == STUDY_STACK else max(LEAD_S, call_s)
        return 2 * lead_s + seconds + call_s / 2


def _latency(c: Calls, p: Mapping[str, Any]) -> float:
    stack, contexts, head = p["stack"], p["contexts"], p["new_tokens"][0]
    counts = {1: p["ttft_repeats"], **dict.fromkeys(p["new_tokens"], p["slope_repeats"])}
    counts[head] = p["repeats"]
    arms = [(n, g, k) for n in contexts for g, k in counts.items()]
    also = p["also_experts"] if c.size.mixture else ()
    arms += [(max(contexts), g, counts[g]) for _ in also for g in (1, head)]
    arms += [(min(contexts), 1, p["aa_repeats"])] if p["aa_repeats"] else []
    total_s = sum(c.arm_s(n, g, k, stack) for n, g, k in arms)
    total_s += sum(c.arm_s(n, head, p["itl_repeats"], stack) + c.gate_s(stack, n) for n in contexts)
    busy = len(contexts) * PROFILED_S if p["busy_tokens"] and c.here.gpu else 0.0
    return total_s + busy + (2.0 * len(p["trace_batches"]) if c.size.mixture else 0.0)


def _memory(c: Calls, p: Mapping[str, Any]) -> float:
    ways = 2 * (1 + (len(p["also_experts"]) if c.size.mixture else 0))
    foretold_s = c.size.layers * FORETOLD_S * c.here.slower
    each = [
        c.arm_s(n, p["new_tokens"], 0, p["stack"]) + 2 * c.call_s(n, 3) + foretold_s
        for n in p["contexts"]
    ]
    return ways * sum(each)


def _energy(c: Calls, p: Mapping[str, Any]) -> float:
    stack, many = p["stack"], p["block_contexts"]
    windows = [
        (n, p["new_tokens"], p["repeats"] if n in many else p["other_repeats"])
        for n in p["contexts"]
    ]
    windows += [(n, g, p["slope_repeats"]) for n in many for g in p["slope_tokens"]]
    total_s = sum(k * c.window_s(n, g, p["window_s"], stack) for n, g, k in windows)
    total_s += len(p["contexts"]) * 1.5 * c.call_s(p["contexts"][-1], p["new_tokens"], stack)
    if not c.here.gpu:
        return total_s
    pairs_s = p["sampler_pairs"] * 2 * (LEAD_S + SAMPLER_S)
    waves_s = WAVES_S + p["instrument_s"] if p["instrument_s"] else 0.0
    rounds_s = max(k for *_, k in windows) * SAMPLER_S
    return total_s + pairs_s + waves_s + rounds_s + 2 * (SETTLE_S + p["idle_s"]) + WARM_UP_S


def _stacks(c: Calls, p: Mapping[str, Any]) -> float:
    total_s, head = 0.0, p["new_tokens"][0]
    for stack in p["stacks_to_compare"]:
        total_s += COMPILE_S.get(stack, 0.0)
        for n in p["contexts"]:
            lengths = (1, *p["new_tokens"])
            counts = {g: p["repeats"] if g == head else p["slope_repeats"] for g in lengths}
            total_s += c.gate_s(stack, n) + sum(c.arm_s(n, g, k, stack) for g, k in counts.items())
            total_s += PROFILED_S if p["busy_tokens"] and c.here.gpu else 0.0
    last = p["stacks_to_compare"][-1]
    return total_s + 2 * (1 + p["harness_pairs"]) * c.call_s(p["contexts"][-1], head, last)


def _batch(c: Calls, p: Mapping[str, Any]) -> float:
    n, total_s = p["context"], SETTLE_S + p["idle_s"] if c.here.gpu else 0.0
    for stack in p["stacks_to_compare"]:
        total_s += COMPILE_S.get(stack, 0.0)
        for batch in p["batch_sizes"]:
            total_s += c.gate_s(stack, n, 4, batch)
            lengths = (1, *p["new_tokens"])
            total_s += sum(c.arm_s(n, g, p["repeats"], stack, batch) for g in lengths)
            if p["energy_windows"]:
                window_s = max(p["window_s"], c.call_s(n, max(p["new_tokens"]), stack, batch))
                lead_s = 2 * LEAD_S + SAMPLER_S if c.here.gpu else 0.0
                total_s += lead_s + len(p["new_tokens"]) * p["energy_windows"] * window_s
    return total_s


def _ablations(c: Calls, p: Mapping[str, Any]) -> float:
    own, stack = p["context"], p["stack"]
    arms = [(own, stack)] * len(p["decodings"]) + [(n, stack) for n in p["contexts"]]
    arms += [(own, name) for name in p["stacks"]]
    fresh = [*p["dtypes"], *(p["experts"] if c.size.mixture else ())]
    arms += [(own, stack)] * len(fresh)
    total_s = sum(c.arm_s(n, p["new_tokens"], p["repeats"], name) for n, name in arms)
    total_s += sum(c.gate_s(name, own) + COMPILE_S.get(name, 0.0) for name in p["stacks"])
    return total_s + len(fresh) * _load_s(c.size, p["weights"])


COUNTS: dict[str, Callable[[Calls, Mapping[str, Any]], float]] = {
    "latency": _latency,
    "memory": _memory,
    "energy": _energy,
    "stacks": _stacks,
    "batch": _batch,
    "ablations": _ablations,
}


def _load_s(size: Size, weights: str) -> float:
    return 1.0 if weights == "random" else 1.0 + size.weight_bytes / LOAD_BYTES_PER_S


def seconds(task: Task, here: Speed, size: Size | None) -> float | None:
    """What a job takes; None where nothing tells (a server, an engine, a model without a card)."""
    if task.notebook in READING_S:
        return READING_S[task.notebook] * here.slower
    engine = task.stack in STACKS and STACKS[task.stack].apart
    if task.notebook not in COUNTS or size is None or engine:
        return None
    fixed_s = START_S[here.gpu] + (2.0 + FIGURES_S.get(task.notebook, 3.0)) * here.slower
    return (
        fixed_s
        + _load_s(size, task.weights)
        + COUNTS[task.notebook](Calls(here, size), task.parameters)
    )


@dataclass
class Forecast:
    """Seconds of the jobs to come. `sizes` are of models by name and dtype, as `preflight` tells.

    It begins when the machine is known. What ended jobs took beside their forecasts is believed
    the more the more seconds they took; for a notebook that has ended before, its own beside that
    of all.
    """

    out_dir: Path
    sizes: Mapping[tuple[str, str], Size]
    here: Speed | None = None
    done: list[tuple[str, float, float]] = field(default_factory=list)  # seconds spent, foreseen

    def of(self, task: Task) -> float | None:
        """One job, as foreseen; None where that is unknown."""
        self.here = self.here or speed(self.out_dir)
        size = self.sizes.get((task.model or "", str(task.parameters.get("dtype"))))
        return None if self.here is None else seconds(task, self.here, size)

    def ended(self, task: Task, spent_s: float) -> None:
        """A job took so long."""
        if task.notebook not in BEFORE_MODELS and (foreseen_s := self.of(task)):
            self.done.append((task.notebook, spent_s, foreseen_s))

    def left_s(self, tasks: Sequence[Task], running_s: float = 0.0) -> float | None:
        """All jobs to come, the first of which has been running for so long; None where one is
        unknown."""
        if None in (foreseen := [self.of(task) for task in tasks]):
            return None
        every_s = [s * self._pace(task) for task, s in zip(tasks, foreseen, strict=True)]
        if every_s and running_s > every_s[0]:  # what follows is at least as slow
            late = replace(self, done=[*self.done])
            late.ended(tasks[0], running_s)
            return late.left_s(tasks[1:])
        return sum(every_s) - running_s

    def _pace(self, task: Task) -> float:
        """How many times as long as foreseen a job takes, as ended ones tell."""
        own = [entry for entry in self.done if entry[0] == task.notebook]
        return _told(own, _told(self.done, 1.0))


def _told(done: Sequence[tuple[str, float, float]], before: float) -> float:
    """Seconds spent on jobs beside those foreseen, with `before` believed for a job's seconds."""
    spent_s, foreseen_s = (sum(entry[i] for entry in done) for i in (1, 2))
    if not done:
        return before
    believed_s = min(UNCERTAIN_S, foreseen_s / len(done))
    return (spent_s + before * believed_s) / (foreseen_s + believed_s)
