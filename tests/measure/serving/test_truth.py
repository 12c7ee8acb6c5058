"""Our client against the null server's stamps, and clients with planted faults: all are found."""

from __future__ import annotations

import pytest

from lib.measure.serving import nullserver, plan, timing, truth, window
from lib.measure.serving.arrivals import Lengths, Load, offsets_s
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.script import Behaviour

timed = pytest.mark.usefixtures("a_processor_is_free")

# The limit of the truth table is 1 ms; a machine that runs tests beside this may be busy.
TTFT_LIMIT_S = 0.005
RATE = Load("poisson", 20)
OUTPUT = 24
BEHAVIOURS = [
    Behaviour(),
    Behaviour(bundle=4, cached_tokens=16),
    Behaviour(reasoning_tokens=8),
    Behaviour(tool_tokens=3, join=3),
    Behaviour(output_tokens=0),
    Behaviour(reset_after=5),
]


def run(folder, behaviours, cell, accept_delay_s=0.0, **changes):
    """Rows of our client, the server's stamps, and the planned instants on the server's clock."""
    server = nullserver.start(folder / "server", behaviours, accept_delay_s=accept_delay_s)
    with server as (url, stamps):
        endpoint = Endpoint(url, "null", "vllm", api="chat")
        data = {**plan.build(endpoint, cell, seed=1, timeout_s=10.0), **changes}
        rows = plan.run(data, folder)
    zero_s = rows[0]["zero_s"]
    planned = {str(request["id"]): zero_s + request["at_s"] for request in data["requests"]}
    return rows, nullserver.read_stamps(stamps), planned


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Six behaviours in turns, 20 requests a second for four seconds."""
    cell = Cell(RATE, Lengths(32), Lengths(OUTPUT), warmup_s=0.0, window_s=3.0)
    for _ in range(2):  # again where the machine was too busy for its clock the first time
        rows, stamps, planned = run(tmp_path_factory.mktemp("mixed"), BEHAVIOURS, cell)
        if "ttft_s" not in truth.failing(score(truth.claims_of(rows), stamps, planned)):
            break
    return rows, stamps, planned


@pytest.fixture(scope="module")
def stalled(tmp_path_factory):
    """A client with two connections only, so that it sends most of its requests late, and a server
    that is slow to take new ones."""
    cell = Cell(Load("poisson", 40), Lengths(32), Lengths(8), warmup_s=0.1, window_s=0.1)
    folder = tmp_path_factory.mktemp("stalled")
    return run(folder, [Behaviour(close_connection=True)], cell, 0.01, connections=2)


def score(claims, stamps, planned, load=RATE):
    return truth.score(claims, stamps, load=load, scheduled_s=planned, ttft_limit_s=TTFT_LIMIT_S)


@timed
def test_our_client_tells_the_truth(mixed):
    rows, stamps, planned = mixed
    checks = score(truth.claims_of(rows), stamps, planned)
    assert truth.failing(checks) == [], [c for c in checks if c.ok is False]
    assert [c.name for c in checks if c.ok is None] == ["delay_s"]  # all else was judged


@timed
def test_every_failure_is_a_row_with_its_class(mixed):
    rows, _, planned = mixed
    requests = plan.requests_of(rows)
    assert len(requests) == len(planned)
    zero_s = rows[0]["zero_s"]  # a request is scheduled at its instant, and not when it was begun
    apart = [zero_s + row["scheduled_s"] - planned[str(row["id"])] for row in requests]
    assert max(map(abs, apart)) < 2e-6
    classes = {row["failure"]["class"] for row in requests if row["failure"]}
    assert classes == {"closed", "wrong_length"}
    reset = next(r for r in requests if r["failure"] and r["failure"]["class"] == "closed")
    assert "closed the connection after" in reset["failure"]["text"]
    assert window.ttft_s(timing.fact(reset)) is not None  # what came before the reset is kept
    assert len(reset["read_s"]) == len(reset["read_bytes"]) >= 5


@timed
def test_latency_counts_from_the_schedule_where_the_client_is_late(stalled):
    rows, stamps, planned = stalled
    claims = truth.claims_of(rows)
    checks = score(claims, stamps, planned, load=None)
    assert truth.failing(checks) == [], [c for c in checks if c.ok is False]
    delays = [window.delay_s(timing.fact(row)) for row in plan.requests_of(rows)]
    assert max(delays) > 0.3  # each answer takes 0.12 s, and only two come at a time


def changed(name, value):
    """A client that tells something else for one figure of each request."""

    def claim(row):
        return {**truth.claim_of(row), name: value(row)}

    return lambda rows: [claim(row) for row in plan.requests_of(rows)]


def itl_by_chunk(row):
    result = [b - a for a, b in zip(row["event_s"], row["event_s"][1:], strict=False)]
    return sum(result) / len(result) if result else None


def visible(row):
    return window.visible_s(timing.fact(row))


def since_sent(row):
    return row["event_s"][0] - row["sent_s"] if row["event_s"] else None


def first_event(row):
    return row["read_s"][0] - row["scheduled_s"] if row["read_s"] else None


def without_failures(rows):
    return [truth.claim_of(row) for row in plan.requests_of(rows) if not row["failure"]]


FAULTS = {
    "ITL by chunk": ("mixed", changed("itl_s", itl_by_chunk), "itl_s"),
    "latency from the actual send": ("stalled", changed("ttft_s", since_sent), "ttft_s"),
    "TTFT of the visible token": (
        "mixed",
        changed("ttft_s", visible),
        "ttft_s",
    ),
    "TTFT of the role": ("mixed", changed("ttft_s", first_event), "ttft_s"),
    "a TTFT of zero where no token came": (
        "mixed",
        changed("ttft_s", lambda row: window.ttft_s(timing.fact(row)) or 0.0),
        "no_token",
    ),
    "dropped failures": ("mixed", without_failures, "failures"),
    "tokens counted by chunks": (
        "mixed",
        changed("output_tokens", lambda row: len(row["event_s"])),
        "output_tokens",
    ),
    "cached tokens not told": ("mixed", changed("cached_tokens", lambda row: 0), "cached_tokens"),
}


@timed
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_is_found(fault, request):
    scenario, claims, check = FAULTS[fault]
    rows, stamps, planned = request.getfixturevalue(scenario)
    load = RATE if scenario == "mixed" else None
    assert check in truth.failing(score(claims(rows), stamps, planned, load))


@timed
def test_uniform_arrivals_are_found(tmp_path, monkeypatch):
    """A client whose gaps have the right mean and the wrong law."""

    def uniform(load, duration_s, seed):
        times = offsets_s(Load("fixed", load.value), duration_s, seed)
        return [t + 0.008 * ((n * 7919) % 100 / 50 - 1) for n, t in enumerate(times)]

    monkeypatch.setattr(plan, "offsets_s", uniform)
    load = Load("poisson", 50)
    cell = Cell(load, Lengths(8), Lengths(2), warmup_s=0.5, window_s=0.5)
    rows, stamps, planned = run(tmp_path, [Behaviour()], cell)
    assert "arrivals" in truth.failing(score(truth.claims_of(rows), stamps, planned, load))


@timed
def test_a_client_that_ignores_its_plan_is_found(mixed):
    rows, stamps, planned = mixed
    early = {name: at_s + 0.1 for name, at_s in planned.items()}
    assert "schedule" in truth.failing(score(truth.claims_of(rows), stamps, early))


def test_claims_are_paired_by_id_or_by_prompt():
    real = [{"id": "a", "prompt_key": "p"}, {"id": None, "prompt_key": "q"}]
    claims = [{"id": "a"}, {"prompt_key": "q"}, {"id": "c"}, {"failed": True}]
    assert truth.pair(claims, real) == [(claims[0], real[0]), (claims[1], real[1])]
    result = truth.score([{"failed": False}], [])
    assert [c.text for c in result if c.name == "ttft_s"] == [
        "claims and requests cannot be paired"
    ]


def test_the_truth_is_what_the_server_wrote():
    row = {
        "request_id": "3",
        "behaviour": 0,
        "received_s": 1.0,
        "writes": [[1.5, 2, "reasoning"], [1.5, 1, "text"], [1.7, 4, "text"]],
        "outcome": "ok",
        "cached_tokens": 5,
    }
    result = truth.truth(row)
    assert (result["first_s"], result["visible_s"], result["output_tokens"]) == (1.5, 1.5, 7)
    assert result["itl_s"] == pytest.approx(0.2 / 4)  # four tokens came after the first write
