"""All that is measured of one server: a curve from one user to saturation, rates below it, and the
mixes of a fit of energy. What notebooks/serving.ipynb calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.measure.serving import sweep, target
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.plan import Cell
from lib.measure.serving.target import Target
from lib.records import record, store
from lib.records.record import Record


def cell(context: int, new_tokens: int, *, sigma: float, warmup_s: float, window_s: float) -> Cell:
    """The cell of one user: its lengths are fixed, or lognormal with this `sigma` of their logs and
    at most four times the median."""
    prompt, output = (
        Lengths(median, sigma, 1, 4 * median if sigma else None) for median in (context, new_tokens)
    )
    return Cell(Load("closed", 1), prompt, output, warmup_s, window_s)


def study(
    server: Target,
    shape: Cell,
    *,
    device: Any,
    most_users: int,
    rate_shares: Sequence[float],
    mix_loads: Mapping[str, Sequence[float]],
    idle_s: float,
    limits: Mapping[str, float],
    timeout_s: float,
    seed: int,
    records_path: str | Path,
) -> list[Record]:
    """Measure a server, each row written at once; a server that is started here ends here as well.

    The curve doubles its users from one to `most_users` at most (0 for none), at the lengths and
    times of `shape`; `rate_shares` are Poisson rates as shares of the most requests a second.
    `mix_loads` are the loads of a fit of energy by law: {"closed": [2, 16], "poisson": [0.5]}.
    `limits` (ttft_s, tpot_s, latency_s) are what goodput is counted by. Raises EndpointError where
    there is no server, or it does not answer as it is asked.
    """
    path = Path(records_path)
    rows = [store.append(path, record.environment_record(device.environment()))]
    loads = [Load(law, value) for law, values in mix_loads.items() for value in values]
    cells = sweep.mixes(loads, shape, seed) if loads else []
    longest = max(
        (c.prompt.high or c.prompt.median) + (c.output.high or c.output.median)
        for c in (shape, *cells)
    )
    users = max([most_users, 1, *(load.users or 0 for load in loads)])
    log = path.parent / "server.log"
    with target.opened(
        server, device, seed=seed, longest=longest + 1, users=users, log=log
    ) as place:
        session = sweep.Session(
            place.endpoint,
            path,
            device,
            seed,
            rows[0].env_id,
            place.key,
            {**place.values, **{f"limit_{name}": value for name, value in limits.items()}},
            place.missing,
            timeout_s,
        )
        sweep.begin(session, idle_s)
        rows += sweep.curve(session, shape, most_users=most_users, rate_shares=rate_shares)
        rows += sweep.sweep(session, cells, sweep.MIX)
    return rows
