"""Cells become ordinary records with raw samples; joules of the same window; nothing hidden."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from dataclasses import replace

import pytest

from lib.analysis.serving import attribution, reading
from lib.analysis.serving.reading import Limits
from lib.measure.serving import client, kinds, nullserver, plan, server, sweep
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.script import Behaviour
from lib.measure.serving.server import EndpointError
from lib.measure.serving.stream import usage_of
from lib.records import record, store
from tests.fakes.board import Board

pytestmark = pytest.mark.usefixtures("a_processor_is_free")

WATTS, IDLE_W = 300.0, 110.0


class RealTimeBoard:
    """A board on the real clock that draws WATTS, and IDLE_W when told to wait, which it skips."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.skipped_s, self.idle = 0.0, False

    def clock_s(self) -> float:
        return time.perf_counter() + self.skipped_s

    def sleep_s(self, seconds: float) -> None:
        self.skipped_s, self.idle = self.skipped_s + seconds, True

    def synchronize(self) -> None:
        pass

    @contextlib.contextmanager
    def power_trace(self, uuids=()):
        trace, start_s, self.idle = [], time.perf_counter() - 2.0, False
        yield trace
        board = Board(idle_w=IDLE_W if self.idle else WATTS)
        stop_s = (self.clock_s() if self.idle else time.perf_counter()) + 2.0
        trace += board.trace(start_s, stop_s)


class SharedBoard(RealTimeBoard):
    """Held by this process and the server's from the beginning."""

    pids = (10, 20)

    @contextlib.contextmanager
    def power_trace(self, uuids=()):
        with super().power_trace(uuids) as trace:
            yield trace
        for row in trace:
            if "pids" in row:
                row["pids"] = list(self.pids)


class NoBoard(RealTimeBoard):
    def __init__(self) -> None:
        super().__init__()
        self.missing = {"energy": "no NVML energy counter: the device is a CPU"}


def run_here(data, folder):
    """The client in this process, which saves the start of another one for each run."""
    rows: list[dict] = []
    asyncio.run(client.run_plan(json.loads(json.dumps(data)), rows.append))
    return rows


@pytest.fixture(scope="module", autouse=True)
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "run", run_here)
        patch.setattr(plan, "TAIL_S", 0.3)
        yield patch


def session(url: str, folder, device, **changes) -> sweep.Session:
    endpoint = Endpoint(url, "null", "openai")
    key = {"weights": "random", "dtype": "bfloat16"}
    path = folder / "records.jsonl"
    return sweep.Session(endpoint, path, device, 7, "env", key, timeout_s=5.0, **changes)


def cell(load: Load, window_s: float = 2.2) -> Cell:
    return Cell(load, Lengths(16), Lengths(8), warmup_s=0.4, window_s=window_s)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, in_process):
    """Two users on a server with a page of counters; a request takes 120 ms."""
    folder, openai = tmp_path_factory.mktemp("measured"), kinds.KINDS["openai"]
    in_process.setitem(kinds.KINDS, "counting", replace(openai, metrics="/metrics"))
    with nullserver.start(folder / "server", [Behaviour()]) as (url, _):
        result = session(url, folder / "out", RealTimeBoard(), least_energy_s=1.0)
        result.endpoint = replace(result.endpoint, kind="counting")
        sweep.begin(result, 2.0)
        rows = sweep.sweep(result, [cell(Load("closed", 2))])
    return rows, folder / "out"


def test_a_cell_is_a_record_whose_values_are_derived_when_read(measured):
    rows, folder = measured
    assert store.load(folder / "records.jsonl") == rows
    closed = rows[0]
    assert [row.kind for row in rows] == ["serving"]
    assert (closed.key["stack"], closed.key["batch"]) == ("server", 2)
    assert (closed.key["context"], closed.key["new_tokens"]) == (16, 8)
    # Each user gets 8 tokens in 0.05 + 7 x 0.01 s: two users make some 133 tokens a second.
    rate = reading.tokens_per_s(closed).value
    assert 0.4 * 133 < rate <= 140
    assert reading.window(closed).seconds == 2.0
    first = reading.percentile(closed, "ttft_s", 50)
    assert 0.05 <= first.value < 0.15 and reading.failed(closed) == 0 and first.n >= 12
    assert reading.percentile(closed, "tpot_s", 50).value == pytest.approx(0.01, rel=0.2)
    assert reading.percentile(closed, "ttft_s", 99).method.startswith("max of")
    good = reading.goodput(closed, Limits(ttft_s=2.0, tpot_s=0.5))
    assert good.good == good.of and good.per_s == good.of / 2.0
    gaps = closed.samples["itl_s"]
    assert statistics.median(gaps) == pytest.approx(0.01, rel=0.2)
    # Eight tokens have seven gaps, less those between tokens that came in one read.
    assert 0.9 * 7 * first.n <= len(gaps) == closed.values["itl_count"] <= 7 * first.n
    assert closed.values["in_flight"] == pytest.approx(2.0, abs=0.05)


def test_joules_are_of_the_same_window_and_the_idle_share_stands_apart(measured):
    rows, folder = measured
    closed = rows[0]
    # 300 W over two whole seconds, of which an idle board would draw 110 W.
    assert closed.values["energy_j"] == pytest.approx(600.0, rel=0.01)
    assert closed.values["idle_w"] == pytest.approx(IDLE_W, rel=0.01)
    assert reading.idle_share(closed).value == pytest.approx(110 / 300, rel=0.02)
    tokens = sum(closed.samples["output_tokens_by_s"])
    assert reading.joules_per_1k(closed).value == pytest.approx(600e3 / tokens, rel=0.01)
    finished = reading.requests_finished(closed)
    assert reading.joules_per_request(closed).value == pytest.approx(600 / finished, rel=0.01)
    mix = reading.mix(closed)
    assert mix["seconds"] == 2.0  # sixteen tokens in for eight out
    assert mix["prompt_tokens"] == pytest.approx(2 * mix["output_tokens"], rel=0.2)
    assert (folder / closed.values["power_trace"]).exists()


def test_the_trace_has_every_request_and_read(measured):
    rows, folder = measured
    trace = store.read_trace(folder / rows[0].values["requests_trace"])
    assert [trace[0]["row"], trace[-1]["row"]] == ["header", "footer"]
    requests = plan.requests_of(trace)
    assert len(requests) == len(rows[0].samples["scheduled_s"])
    assert all(len(r["read_s"]) == len(r["read_bytes"]) > 0 for r in requests)


def test_the_servers_counters_agree_with_the_usage(measured):
    rows, _ = measured
    for row in rows:
        counted = row.values["metrics"]["null:generation_tokens_total{model=null}"]
        assert counted == sum(row.samples["output_tokens"])
        assert not {"metrics_differ", "failures", "cached"} & {w["code"] for w in row.warnings}


def test_failures_caches_and_missing_joules_are_told(tmp_path):
    behaviours = [Behaviour(), Behaviour(cached_tokens=8), Behaviour(reset_after=2)]
    with nullserver.start(tmp_path / "server", behaviours) as (url, _):
        result = session(url, tmp_path / "out", RealTimeBoard())
        row = sweep.one(result, cell(Load("fixed", 20), window_s=1.2))
    texts = {w["code"]: w["text"] for w in row.warnings}
    assert (row.key["load"], row.key["batch"]) == ("fixed 20/s", None)
    assert "closed" in texts["failures"] and "prefix cache" in texts["cached"]
    short = "the window has 1 s; the counter needs 20"
    assert row.missing["energy_j"] == short == reading.joules_per_1k(row).reason
    assert row.missing["metrics"] == "this kind of server has no page of counters"
    good = reading.goodput(row, Limits())
    assert good.failed == pytest.approx(good.of / 3, abs=1)
    assert good.good == good.of - good.failed


def test_a_server_that_stops_for_all_users_is_told(tmp_path):
    """Every thirteenth answer begins 0.9 s late, where the others take 0.05 s."""
    behaviours = [*[Behaviour()] * 12, Behaviour(ttft_s=0.9)]
    with nullserver.start(tmp_path / "server", behaviours) as (url, _):
        result = session(url, tmp_path / "out", NoBoard())
        result.missing["energy_j"] = "no board"
        row = sweep.one(result, cell(Load("closed", 1)))
    assert row.values["silence_s"] == pytest.approx(0.9, abs=0.2)
    assert "no user got anything for" in {w["code"]: w["text"] for w in row.warnings}["stalled"]


def test_a_process_that_came_later_spoils_the_joules(tmp_path):
    with nullserver.start(tmp_path / "server", [Behaviour()]) as (url, _):
        result = session(url, tmp_path / "out", SharedBoard(), least_energy_s=1.0)
        sweep.begin(result, 2.0)
        good = sweep.one(result, cell(Load("closed", 1)))
        result.device.pids = (10, 20, 30)
        spoilt = sweep.one(result, cell(Load("closed", 1)))
    assert good.values["energy_j"] > 0 and "idle_w" in good.values
    assert spoilt.missing["energy_j"].startswith("foreign_process: 1 other process(es)")


def test_without_a_board_joules_are_missing_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.server, "check", lambda *a, **k: {})
    result = session("http://x", tmp_path, NoBoard())
    sweep.begin(result, 10.0)
    reason = NoBoard().missing["energy"]
    assert result.missing == {"energy_j": reason, "idle_w": reason}


def test_a_server_that_dies_leaves_rows_with_its_reason(tmp_path):
    """The first cell finds nobody, and those after it are not tried."""
    result = session(f"http://127.0.0.1:{server.free_port()}", tmp_path, NoBoard())
    rows = sweep.sweep(result, [cell(Load("fixed", rate), window_s=0.5) for rate in (20, 21)])
    assert store.load(result.records_path) == rows
    assert rows[0].error.startswith("EndpointError: All connection attempts failed; is the server")
    words = "EndpointError: the server did not answer after the cell before: http://"
    assert rows[1].error.startswith(words)


def test_a_sweep_of_a_bad_endpoint_does_not_begin(tmp_path):
    result = session("http://127.0.0.1:1", tmp_path, NoBoard())
    with pytest.raises(EndpointError, match="is the server started"):
        sweep.begin(result, 1.0)
    assert not result.records_path.exists()


def row_of(tokens: list[float], error: str | None = None) -> record.Record:
    samples = {"output_tokens_by_s": tokens}
    return record.Record("serving", samples=samples, error=error)


def test_a_curve_ends_where_twice_the_users_give_hardly_more():
    one, two, three = row_of([100.0] * 10), row_of([190.0] * 10), row_of([200.0] * 10)
    assert not sweep.saturated([one]) and not sweep.saturated([one, two])
    assert sweep.saturated([one, two, three])


def test_a_curve_doubles_its_users_and_then_sets_rates(tmp_path, monkeypatch):
    """A server that gives 100 tokens a second to each user, and 200 at most."""

    def measure(session, cell, kind):
        rate = min(100.0 * (cell.load.users or 1), 200.0)
        # 200 requests end in 100 s at most: half of two a second.
        ends = {"end_s": [1.0 + n / 10 for n in range(int(rate))], "failure": [""] * int(rate)}
        values = {"window_start_s": 0.0, "window_stop_s": 100.0}
        key = sweep._key(session, cell)
        return record.Record(kind, key, {"output_tokens_by_s": [rate] * 10, **ends}, values)

    monkeypatch.setattr(sweep, "measure", measure)
    result = session("http://x", tmp_path, NoBoard())
    rows = sweep.curve(result, cell(Load("closed", 1)), most_users=256, rate_shares=(0.5,))
    assert [row.key["load"] for row in rows] == ["closed 1", "closed 2", "closed 4", "poisson 1/s"]
    assert store.load(result.records_path) == rows
    few = sweep.curve(result, cell(Load("closed", 1)), most_users=2, rate_shares=())
    assert [row.key["batch"] for row in few] == [1, 2]
    assert sweep.curve(result, cell(Load("closed", 1)), most_users=0, rate_shares=(0.5,)) == []


def test_a_plan_is_as_long_as_a_loaded_server_needs(tmp_path, monkeypatch):
    """A request takes 0.1 s alone and 4 s among 32 users: of more users none takes less than 2.

    Half, since the few requests on the idle server may have been slow ones.
    """
    monkeypatch.setattr(sweep.server, "ask", lambda *a, **k: [])
    monkeypatch.setattr(sweep.server, "idle_request_s", lambda rows: 0.1)
    result, shape = session("http://x", tmp_path, NoBoard()), cell(Load("closed", 1))
    name = sweep._lengths(shape)
    assert sweep._shortest_s(result, shape) == 0.05
    result.under_load_s[name] = (32, 4.0)
    assert sweep._shortest_s(result, replace(shape, load=Load("closed", 64))) == 2.0
    assert sweep._shortest_s(result, replace(shape, load=Load("closed", 4))) == 0.05
    drawn = replace(shape, prompt=Lengths(16, 0.5))
    assert sweep._shortest_s(result, drawn) == 0.025


def test_the_mixes_of_a_fit_are_twelve_in_seeded_order():
    shape = cell(Load("closed", 1))
    loads = [Load("closed", 8), Load("closed", 2), Load("poisson", 0.5)]
    cells = sweep.mixes(loads, shape, 1)
    assert len(cells) == 12 and cells == sweep.mixes(loads, shape, 1)
    assert cells != sweep.mixes(loads, shape, 2)
    assert len({cell.label for cell in cells}) == 12
    assert {cell.window_s for cell in cells} == {shape.window_s}
    with pytest.raises(ValueError, match="needs 12 mixes, four .* got 8; give at least 3"):
        sweep.mixes(loads[:2], shape, 1)
    assert sweep.LEAST_MIXES == attribution.LEAST_FITTED + attribution.HELD_OUT


def test_requests_that_were_not_sent_by_the_law_are_told():
    """One request a second was asked for, and forty were sent in pairs."""
    pairs = [{"sent_s": 2.0 * (n // 2)} for n in range(40)]
    asked = cell(Load("poisson", 1))
    assert "gaps" in sweep._law(asked, pairs).failing
    assert sweep._law(cell(Load("closed", 2)), pairs) is None
    assert sweep._law(asked, pairs[:5]) is None


def codes(folder, load: Load, answers) -> dict[str, str]:
    """Warnings of a cell of 4.4 s, from (scheduled, end, class of failure) of its requests."""
    rows = [{"row": "header", "zero_s": 0.0}]
    for number, (scheduled_s, end_s, failure) in enumerate(answers):
        reads = [] if failure else [end_s]
        row = {"row": "request", "id": number, "user": None, "chunks": len(reads)}
        row |= {"scheduled_s": scheduled_s, "sent_s": scheduled_s, "end_s": end_s}
        row |= {"read_s": reads, "event_s": reads, "event_channels": "c" * len(reads)}
        row |= {"event_tokens": [8] * len(reads), "asked": {"output_tokens": 8}}
        row |= {"usage": usage_of({"completion_tokens": None if failure else 8})}
        rows.append(row | {"failure": {"class": failure, "text": ""} if failure else None})
    rows.append({"row": "footer", "wall_s": 5.0, "cpu_s": 0.1, "stopped": None})
    run = sweep.Run(rows, plan.requests_of(rows), [], None, "no page")
    result = session("http://x", folder, NoBoard())
    result.missing["energy_j"] = "no board"
    row = sweep._record(result, cell(load, window_s=4.0), run, sweep.KIND, "")
    return {w["code"]: w["text"] for w in row.warnings}


def test_a_stall_is_told_also_where_requests_come_by_a_law(tmp_path):
    """Ten a second, each answered after 50 ms; between 2.0 and 2.9 s nobody is."""
    times = [n / 10 for n in range(50)]
    whole = [(t, t + 0.05, "") for t in times]
    stalled = [(t, max(t, 2.9 if 2.0 <= t < 2.9 else 0.0) + 0.05, "") for t in times]
    assert "stalled" not in codes(tmp_path, Load("fixed", 10), whole)
    assert "got anything for 0.95 s" in codes(tmp_path, Load("fixed", 10), stalled)["stalled"]


def test_failures_that_ended_the_window_are_told(tmp_path):
    """One user is answered for a second; then the server is gone, and no window is left."""
    answers = [(n / 10, n / 10 + 0.1, "") for n in range(10)]
    answers += [(1.0 + n / 10, 1.0 + n / 10, "unreachable") for n in range(35)]
    told = codes(tmp_path, Load("closed", 1), answers)["failures"]
    assert told.startswith("35 of 45 requests of the whole run failed (35 unreachable)")


def test_gaps_are_thinned_evenly():
    assert len(sweep._thinned(range(sweep.MOST_GAPS * 3))) == sweep.MOST_GAPS
    assert sweep._thinned([1.0, 2.0]) == [1.0, 2.0] and sweep._thinned([]) == []
