"""Cells become ordinary records with raw samples; joules of the same window; nothing hidden."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from dataclasses import replace

import pytest

from lib.measure.serving import client, kinds, nullserver, plan, reading, server, sweep
from lib.measure.serving import window as windows
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.nullserver import Behaviour
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.server import EndpointError
from lib.measure.serving.window import Limits
from lib.records import record, store
from tests.fakes.board import Board

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
        rows = sweep.sweep(result, [cell(Load("closed", 2))], idle_s=2.0)
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
    first = reading.tail(closed, "ttft_s", 50)
    assert 0.05 <= first.estimate.value < 0.15 and first.failed == 0 and first.of >= 12
    assert reading.tail(closed, "tpot_s", 50).estimate.value == pytest.approx(0.01, rel=0.2)
    assert reading.tail(closed, "ttft_s", 99).estimate.method.startswith("max of")
    good = reading.goodput(closed, Limits(ttft_s=2.0, tpot_s=0.5))
    assert good.good == good.of and good.per_s == good.of / 2.0
    gaps = closed.samples["itl_s"]
    assert statistics.median(gaps) == pytest.approx(0.01, rel=0.2)
    # Eight tokens have seven gaps, less those between tokens that came in one read.
    assert 0.9 * 7 * first.of <= len(gaps) == closed.values["itl_count"] <= 7 * first.of
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
    assert row.key["batch"] == "fixed 20/s"
    assert "closed" in texts["failures"] and "prefix cache" in texts["cached"]
    short = "the window has 1 s; the counter needs 20"
    assert row.missing["energy_j"] == short == reading.joules_per_1k(row).reason
    assert row.missing["metrics"] == "this kind of server has no page of counters"
    tail = reading.tail(row, "ttft_s", 50)
    assert tail.failed == pytest.approx(tail.of / 3, abs=1)
    assert reading.goodput(row, Limits()).good == tail.of - tail.failed


def test_without_a_board_joules_are_missing_with_its_reason(tmp_path):
    result = session("http://x", tmp_path, NoBoard())
    sweep._idle(result, 10.0)
    reason = NoBoard().missing["energy"]
    assert result.missing == {"idle_w": reason} and "idle_w" not in result.values
    assert sweep._energy(result, None, windows.Window(0, 30, "typed"))[1] == {"energy_j": reason}


def test_a_server_that_dies_leaves_rows_with_its_reason(tmp_path, monkeypatch):
    """The check finds the server; the first cell finds nobody, and the second is not tried."""
    result = session(f"http://127.0.0.1:{server.free_port()}", tmp_path, NoBoard())
    monkeypatch.setattr(sweep.server, "check", _checked_once(server.check))
    rows = sweep.sweep(result, [cell(Load("fixed", rate), window_s=0.5) for rate in (20, 21)])
    assert store.load(result.records_path) == rows
    assert rows[0].error.startswith("EndpointError: All connection attempts failed; is the server")
    assert rows[1].error.startswith("the server did not answer after the cell before: http://")


def _checked_once(check):
    """A check that passes the first time: the server died after it."""
    asked = []

    def checked(endpoint, **options):
        asked.append(endpoint)
        return {} if len(asked) == 1 else check(endpoint, **options)

    return checked


def test_a_sweep_of_a_bad_endpoint_does_not_begin(tmp_path):
    result = session("http://127.0.0.1:1", tmp_path, NoBoard())
    with pytest.raises(EndpointError, match="is the server started"):
        sweep.sweep(result, [cell(Load("fixed", 20))])
    assert not result.records_path.exists()


def row_of(tokens: list[float], error: str | None = None) -> record.Record:
    samples = {"output_tokens_by_s": tokens}
    return record.Record("serving", samples=samples, error=error)


def test_a_curve_ends_where_twice_the_users_give_hardly_more():
    one, two, three = row_of([100.0] * 10), row_of([190.0] * 10), row_of([200.0] * 10)
    assert not sweep.saturated([one]) and not sweep.saturated([one, two])
    assert sweep.saturated([one, two, three])
    assert sweep.saturated([one, row_of([], error="RuntimeError: gone")])


def test_a_curve_doubles_its_users_and_then_sets_rates(tmp_path, monkeypatch):
    """A server that gives 100 tokens a second to each user, and 200 at most."""
    loads = []

    def one(session, cell):
        loads.append(cell.load.label)
        rate = min(100.0 * (cell.load.users or 1), 200.0)
        facts = [
            {**dict.fromkeys(reading.FACTS), "end_s": 1.0 + n / 10, "failure": ""}
            for n in range(int(rate))
        ]
        values = {"window_start_s": 0.0, "window_stop_s": 100.0, "window_rule": "typed"}
        samples = {"output_tokens_by_s": [rate] * 10, **reading.columns(facts)}
        values |= {"window_reason": "", "law": cell.load.law, "load": cell.load.value}
        return record.Record("serving", samples=samples, values=values)

    monkeypatch.setattr(sweep, "one", one)
    monkeypatch.setattr(sweep.server, "check", lambda *a, **k: {})
    result = session("http://x", tmp_path, NoBoard())
    rows = sweep.curve(result, Lengths(16), Lengths(8), rate_shares=(0.5,))
    # 200 requests end in 100 s at most: half of two a second.
    assert loads == ["closed 1", "closed 2", "closed 4", "poisson 1/s"] and len(rows) == 4


def test_the_mixes_of_a_fit_are_twelve_in_seeded_order():
    loads = [Load("closed", 8), Load("closed", 2), Load("poisson", 0.5)]
    cells = sweep.mixes(loads, seed=1)
    assert len(cells) == 12 and cells == sweep.mixes(loads, seed=1) != sweep.mixes(loads, seed=2)
    assert len({cell.label for cell in cells}) == 12
    with pytest.raises(ValueError, match="needs 12, got 8"):
        sweep.mixes(loads[:2], seed=1)


def test_requests_that_were_not_sent_by_the_law_are_told():
    """One request a second was asked for, and forty were sent in pairs."""
    pairs = [{"sent_s": 2.0 * (n // 2)} for n in range(40)]
    asked = cell(Load("poisson", 1))
    assert "gaps" in sweep._law(asked, pairs).failing
    assert sweep._law(cell(Load("closed", 2)), pairs) is None
    assert sweep._law(asked, pairs[:5]) is None


def test_throughput_has_an_interval_over_blocks_of_five_seconds():
    result = reading.tokens_per_s(row_of([100.0] * 5 + [110.0] * 5))
    assert (result.value, result.n) == (105.0, 2) and result.low < 105 < result.high
    assert reading.tokens_per_s(row_of([100.0, 50.0])).value == 75.0
    assert reading.tokens_per_s(row_of([])).reason == "the window has no whole second"


def test_gaps_are_thinned_evenly():
    assert len(sweep._thinned(range(sweep.MOST_GAPS * 3))) == sweep.MOST_GAPS
    assert sweep._thinned([1.0, 2.0]) == [1.0, 2.0] and sweep._thinned([]) == []


def test_figures_have_one_name_each():
    assert set(windows.FIGURES) == {"ttft_s", "visible_s", "tpot_s", "latency_s", "delay_s"}
