"""Serving rows whose numbers can be checked with a pencil.

Each of n users waits 0.1 s for the first of five tokens and 0.02 n s for each further one; the
window has 20 s, the board draws 100 + 50 n W, and 100 W when idle.
"""

from __future__ import annotations

from typing import Any

from lib.measure.serving.arrivals import Load
from lib.measure.serving.window import FACTS
from lib.records.record import KEY_FIELDS, Record

WINDOW_S, TOKENS, PROMPT = 20, 5, 10
IDLE_W = 100.0


def fact(start_s: float, end_s: float, first_s: float | None = None, **changes: Any) -> dict:
    """A request of five tokens, the first alone, the last when it ends."""
    first_s = start_s + 0.1 if first_s is None else first_s
    values = {"scheduled_s": start_s, "sent_s": start_s, "first_s": first_s, "visible_s": first_s}
    values |= {"last_s": end_s, "end_s": end_s, "first_tokens": 1, "prompt_tokens": PROMPT}
    values |= {"cached_tokens": 0, "output_tokens": TOKENS, "asked_tokens": TOKENS}
    return values | {"chunks": TOKENS, "failure": ""} | changes


def row(
    facts: list[dict],
    load: Load | None = None,
    window: tuple[float, float] = (10.0, 20.0),
    kind: str = "serving",
    key: dict[str, Any] | None = None,
    samples: dict[str, list] | None = None,
    **values: Any,
) -> Record:
    """A row of these requests; tokens by second, energy and the like are given where needed."""
    load = load or Load("closed", 1)
    fields = {"model": "m", "weights": "random", "dtype": "bfloat16", "stack": "server"}
    fields |= {"server": "vllm", "load": load.label, "batch": load.users, "decoding": "greedy"}
    fields |= {"context": PROMPT, "new_tokens": TOKENS}
    values = {"law": load.law, "load": load.value, "window_start_s": window[0]} | values
    values = {"window_stop_s": window[1], "window_rule": "typed", "window_reason": ""} | values
    return Record(
        kind,
        dict.fromkeys(KEY_FIELDS) | fields | (key or {}),
        {name: [fact[name] for fact in facts] for name in FACTS} | (samples or {}),
        values,
        env_id=values.pop("env_id", None),
    )


def users(count: int, **changes: Any) -> Record:
    """A row of the closed loop that the module's docstring describes."""
    step_s = 0.02 * count
    length_s = 0.1 + step_s * (TOKENS - 1)
    facts = [
        fact(10.0 + length_s * n, 10.0 + length_s * (n + 1))
        for _ in range(count)
        for n in range(int(WINDOW_S / length_s + 1e-9))
    ]
    watts, per_s = IDLE_W + 50 * count, count / length_s
    samples = {
        "output_tokens_by_s": [TOKENS * per_s] * WINDOW_S,
        "prompt_tokens_by_s": [PROMPT * per_s] * WINDOW_S,
        "itl_s": [step_s] * 8,
    }
    values = {"energy_j": watts * WINDOW_S, "idle_w": IDLE_W, "itl_count": 8, "in_flight": count}
    values |= {"limit_ttft_s": 0.5, "limit_tpot_s": 0.1, "server_version": "0.25.1"}
    window = (10.0, 10.0 + WINDOW_S)
    return row(facts, Load("closed", count), window, samples=samples, **(values | changes))
