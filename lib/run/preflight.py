"""What can be known before any work: does the model exist, fit its positions and the memory?

Runs in a process of its own, because asking a GPU for its free memory opens a context that would
otherwise stay there, and be measured, for as long as the runner lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lib.files import BATCH_VARIABLE, ROOT
from lib.run import processes
from lib.run.plan import Task
from lib.stacks.registry import STACKS


class PreflightError(ValueError):
    """The jobs cannot run; the message says why and what to do."""


def arms(jobs: Iterable[Task]) -> list[dict[str, Any]]:
    """The largest base arm of each model: context and new tokens, and how it is loaded.

    Other arms of an ablation may go beyond; they fail as rows of their own.
    """
    largest: dict[tuple, dict[str, Any]] = {}
    for job in jobs:
        values = job.parameters
        contexts = values.get("context") or values.get("contexts")
        # A reading notebook loads nothing, nor does one for a server that runs.
        if job.model is None or job.reads or not contexts or values.get("server"):
            continue
        arm = {
            "model": job.model,
            "weights": job.weights,
            "stack": job.stack,
            "dtype": values.get("dtype", "bfloat16"),
            "device": values.get("device", "auto"),
            "devices": job.devices,
            "context": _largest(contexts),
            "new_tokens": _largest(values.get("new_tokens", 0)),
        }
        key = tuple(arm[n] for n in ("model", "weights", "dtype", "stack", "devices"))
        if key not in largest or _tokens(arm) > _tokens(largest[key]):
            largest[key] = arm
    return list(largest.values())


def _largest(values: int | list[int]) -> int:
    return max(values) if isinstance(values, list) else values


def _tokens(arm: dict[str, Any]) -> int:
    return arm["context"] + arm["new_tokens"]


def check(arms: Iterable[dict[str, Any]], models: Any = None, device: Any = None) -> list[str]:
    """One message for each arm that cannot run; fetches checkpoints, so that no job waits for it.

    `models` and `device` stand in for `models.load.load` and the opened device in tests.
    """
    if models is None:
        from lib.models import load as models
    problems = []
    for arm in arms:
        try:
            stack = STACKS.get(arm.get("stack") or "")
            engine = stack is not None and stack.apart
            card = _engine_card(arm) if engine else models.card(arm["model"], dtype=arm["dtype"])
            models.require_decoder(card)
            models.require_context(card, arm["context"], arm["new_tokens"])
            where = device or _device(arm["device"])
            if arm["weights"] != "random" and (size := _stored_bytes(arm["model"])) is not None:
                card = replace(card, weight_bytes=size)
            if (devices := arm.get("devices", 1)) > 1:  # what each of them holds
                card = replace(card, weight_bytes=-(-card.weight_bytes // devices))
            models.require_fits(card, where, _tokens(arm))
            if arm["weights"] != "random":
                _fetch(arm["model"], arm["weights"])
        except (ValueError, OSError, RuntimeError) as error:
            text = str(error)
            problems.append(text if arm["model"] in text else f"{arm['model']}: {text}")
    return problems


def sizes(arms: Iterable[dict[str, Any]], models: Any = None) -> list[dict[str, Any]]:
    """What `eta` needs of each arm's model: bytes, parameters, layers; nothing of one whose card
    cannot be counted."""
    if models is None:
        from lib.models import load as models
    known = []
    for arm in arms:
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            card = models.card(arm["model"], dtype=arm["dtype"])
            size = {
                "weight_bytes": card.weight_bytes,
                "step_bytes": card.weight_bytes * card.active_share,
                "active_params": card.active_params,
                "layers": card.layers,
                "mixture": bool(card.experts),
            }
            known.append({"model": arm["model"], "dtype": arm["dtype"], "size": size})
    return known


def _engine_card(arm: dict[str, Any]) -> Any:
    """The card of a model as an engine holds it; raises where there is no engine for it."""
    from lib.models import origin
    from lib.stacks import vllm_settings

    vllm_settings.require_installed()
    where = origin.find(arm["model"])
    vllm_settings.require_runs(where, arm["weights"], arm["dtype"], arm.get("devices", 1))
    return vllm_settings.held_card(where, arm["dtype"])


def _device(name: str) -> Any:
    from lib.hardware.device import open_device

    return open_device(name)


def _stored_bytes(model: str) -> int | None:
    """Bytes of a checkpoint that stays quantised in memory, fetched if need be; None for others."""
    from lib.models import origin as origins

    origin = origins.find(model)
    return origins.bytes_as_stored(origin) if origin.folder or origin.hub else None


def _fetch(model: str, weights: str) -> None:
    from lib.models import origin as origins

    origin = origins.find(model)
    origins.require_checkpoint(origin, weights)
    origins.files(origin)


def check_apart(arms: list[dict[str, Any]], env: dict[str, str]) -> list[dict[str, Any]]:
    """`check` and `sizes` in another process; raises PreflightError with all that is wrong."""
    if not arms:
        return []
    mark = uuid.uuid4().hex
    with processes.guard(mark), processes.adopt_orphans():
        children = {*processes.descendants(os.getpid())}
        try:
            process = subprocess.run(
                [sys.executable, "-m", "lib.run.preflight"],
                input=json.dumps(arms),
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=env | {BATCH_VARIABLE: mark},
                start_new_session=True,  # Ctrl-C is for the runner, which ends this
                check=False,
            )
        finally:
            processes.reap({*processes.descendants(os.getpid())} - children)
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        why = f"exit code {process.returncode}"
        if process.returncode == -signal.SIGKILL:
            why = "SIGKILL; where memory runs out the system does that"
        raise PreflightError(f"the check of the models was ended by {why}; its lines are above")
    told = json.loads(lines[-1])
    if problems := told["problems"]:
        raise PreflightError("\n".join(problems))
    return told["sizes"]


def main() -> None:
    """Arms from standard input; problems and sizes as the last line of the output."""
    arms = json.load(sys.stdin)
    problems = check(arms)
    told = {"problems": problems, "sizes": [] if problems else sizes(arms)}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
