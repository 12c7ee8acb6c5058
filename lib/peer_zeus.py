"""Zeus (PyPI `zeus`, github ml-energy/zeus) beside this workbook, on the same windows.

ZeusMonitor subtracts two readings of the board's counter, one at each edge of a window. Here both
measure the same calls at the same time: long windows, and short ones as they were usual. Kind
`energy-peer`; where Zeus is not installed, the reason.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from lib import energy, windows
from lib.hardware import validity
from lib.hardware.host import version
from lib.records import store
from lib.records.record import Record

SHORT_S = 1.6  # as long as the runs that the paper took readings around


def compare(
    model: Any,
    *,
    stack: str,
    context: int,
    new_tokens: int,
    peer_windows: int,
    window_s: float,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """One row: joules of each long and each short window by Zeus and by this workbook.

    samples `zeus_long_j` and `ours_long_j` belong together, as do `long_s` and the short ones. A
    window that this workbook does not believe is left out of both.
    """
    if not peer_windows:
        return []
    key = model.key(stack=stack, context=context, new_tokens=new_tokens)
    reason = model.device.missing.get("energy") or ""
    monitor, why = (None, reason) if reason else open_monitor(model.device)
    if monitor is None:
        row = Record(
            "energy-peer",
            key,
            values=dict(model.source),
            missing={"zeus_long_j": why},
            env_id=env_id,
        )
        return [store.append(records_path, row)]
    session = energy.open_session(
        model, stack, Path(records_path), seed, env_id, [context], new_tokens
    )
    lead = session.lead(context, new_tokens)
    lengths = {
        "long": (session.call(context, new_tokens), window_s),
        "short": (lead, min(SHORT_S, window_s)),
    }
    samples: dict[str, list[float]] = {}
    for name, (call, seconds) in lengths.items():
        for joules, zeus_j, long_s in both(session, monitor, lead, call, seconds, peer_windows):
            for sample, value in (("ours", joules), ("zeus", zeus_j)):
                samples.setdefault(f"{sample}_{name}_j", []).append(value)
            samples.setdefault(f"{name}_s", []).append(long_s)
    row = Record(
        "energy-peer", key, samples, {**model.source, "zeus": version("zeus")}, env_id=env_id
    )
    return [store.append(records_path, row)]


def open_monitor(device: Any) -> tuple[Any, str]:
    """A ZeusMonitor of this GPU, or None and why there is none.

    Zeus reads GPU numbers, and numbers only, from CUDA_VISIBLE_DEVICES, when it is first used; for
    that moment the variable is this board's number. CUDA has long read its own.
    """
    try:
        make = importlib.import_module("zeus.monitor").ZeusMonitor  # an extra of pyproject.toml
    except ImportError as error:
        return None, f"zeus is not installed: {error}"
    index = device.board_state().get("nvml_index")
    if index is None:
        return None, "zeus cannot measure here: the number of the GPU is not known"
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
    try:
        return make(gpu_indices=[0], cpu_indices=[]), ""
    except Exception as error:
        return None, f"zeus cannot measure here: {error}"
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def both(
    session: energy.Session,
    monitor: Any,
    lead: windows.Call,
    call: windows.Call,
    seconds: float,
    count: int,
) -> list[tuple[float, float, float]]:
    """(ours, Zeus's, seconds) of windows one after another with the board kept busy between."""
    device, spans, theirs = session.model.device, [], []
    with device.power_trace(uuids=session.gpus) as trace:
        for number in range(count):
            windows.keep_busy(lead, windows.LEAD_S, device)
            monitor.begin_window(f"{number}", sync_execution=False)  # `keep_busy` has waited
            spans.append(windows.fill(call, device, seconds))
            told = monitor.end_window(f"{number}", sync_execution=False)
            theirs.append(told.total_energy)
        windows.keep_busy(lead, windows.LEAD_S, device)
    ours = [
        validity.judge(
            trace, span.start_s, span.stop_s, own_pid=os.getpid(), calls_s=span.calls_s
        ).energy_j
        for span in spans
    ]
    return [
        (joules, zeus_j, span.seconds)
        for joules, zeus_j, span in zip(ours, theirs, spans, strict=True)
        if joules is not None
    ]
