"""How long a run will take: forecasts beside runs of an H100, and what ended jobs teach."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import datetime
from types import SimpleNamespace

import pytest

from lib.files import ROOT, read_yaml
from lib.models.card import ModelCard
from lib.records import store
from lib.records.record import select
from lib.run import console, eta
from lib.stats import sen_interval

RELEASED = ROOT / "outputs" / "released" / "h100-sxm"
IMPORTS_S = 11.0  # what a kernel took to import torch and the like, before kernels were forks
EIGHT = eta.Size(16.4e9, 15.2e9, 7.6e9, 36, False)  # Qwen3-8B in bfloat16
H100 = eta.Speed(True, 2.95e12, 6.5e14, 30.0)


def task(notebook, stack="hf-eager", weights="random", model="m", **parameters):
    values = {"weights": weights, "stack": stack, "dtype": "bfloat16", **parameters}
    return SimpleNamespace(
        notebook=notebook,
        stack=stack,
        weights=weights,
        model=model,
        parameters=values,
        name=f"{notebook} of {model}",
        title=f"{model} {notebook}",
    )


def measured():
    """(forecast, seconds) of each released job of a model that was run in one piece."""
    machine = eta.speed(RELEASED)
    for path in sorted(RELEASED.rglob("run.json")):
        run, folder = json.loads(path.read_text()), path.parent
        start, end = (datetime.fromisoformat(run[name]) for name in ("start", "end"))
        spent_s = (end - start).total_seconds() - IMPORTS_S
        if folder.name in eta.COUNTS and spent_s > 20:
            rows = store.load(folder / "records.jsonl")
            card = ModelCard.from_dict(select(rows, "card")[-1].values)
            host = select(rows, "environment")[-1].values["host_score_per_s"]
            here = dataclasses.replace(machine, host_score_per_s=host)
            size = eta.Size(
                card.weight_bytes,
                card.decode_bytes(512),
                card.active_params,
                card.layers,
                bool(card.experts),
            )
            stack = run["parameters"].get("stack", "hf-eager")
            own = {"weights": "random", **run["parameters"]}
            yield (
                folder,
                eta.seconds(task(folder.name, **own | {"stack": stack}), here, size),
                spent_s,
            )


def test_forecasts_of_an_h100_hold_within_30_percent_in_all():
    pairs = list(measured())
    assert len(pairs) > 12
    foreseen_s, spent_s = (sum(pair[i] for pair in pairs) for i in (1, 2))
    assert 0.7 < foreseen_s / spent_s < 1.3
    wrong = {str(f): (a, b) for f, a, b in pairs if not 0.5 < a / b < 2}
    assert wrong == {}


def of_profile(name, here=H100, size=EIGHT, **more):
    data = read_yaml(ROOT / "params" / f"{name}.yaml")
    jobs = []
    for notebook, section in data["notebooks"].items():
        values = {**data["defaults"], **(section or {}), **more.get(notebook, {})}
        if notebook != "serving":
            jobs.append(task(notebook, **values))
    return {job.notebook: eta.seconds(job, here, size) for job in jobs}


def test_eight_billion_parameters_on_an_h100_are_planned_for_about_five_minutes():
    planned = of_profile("gpu")
    assert sum(planned.values()) < 330
    assert planned["machine"] + planned["latency"] + planned["stacks"] < 120  # the first report
    both = of_profile(
        "gpu",
        **{n: {"stacks_to_compare": ["graph", "graph-compiled"]} for n in ("stacks", "batch")},
    )
    assert 30 < sum(both.values()) - sum(planned.values()) < 150


def test_the_calls_of_the_gpu_profile_give_their_intervals():
    """6 calls give a median 1 - 2 / 2^6; Sen's interval of a slope is exact by counting."""
    books = read_yaml(ROOT / "params" / "gpu.yaml")["notebooks"]
    for name in ("latency", "stacks", "ablations"):
        assert 1 - 2 / 2 ** books[name]["repeats"] >= 0.95
    latency, stacks, batch = (books[name] for name in ("latency", "stacks", "batch"))
    assert sen_interval((latency["ttft_repeats"], latency["repeats"]))[1] >= 0.95
    assert sen_interval((stacks["repeats"], stacks["slope_repeats"]))[1] >= 0.95
    assert sen_interval((batch["repeats"],) * 2)[1] >= 0.95
    assert latency["aa_repeats"] >= 12


def test_a_call_is_its_prefill_and_its_steps():
    """100 MB at 1 GB/s and a share of 0.6 is a sixth of a second a step on a GPU's graph."""
    here = eta.Speed(True, 1e9, 1e12, 30.0)
    calls = eta.Calls(here, eta.Size(1e8, 1e8, 0.5e8, 0, False))
    assert calls.step_s("graph", batch=32) == pytest.approx(2 / 6)
    assert calls.call_s(1000, 1) == pytest.approx(2 * 0.5e8 * 1000 / 0.5e12)
    assert calls.call_s(1000, 7, "graph") == pytest.approx(0.2 + (1 + 1 / 32), abs=1e-6)
    slow = eta.Calls(eta.Speed(True, 1e9, 1e12, 30.0), eta.Size(1, 1, 1, 1000, False))
    assert slow.step_s() == pytest.approx(0.85, rel=0.02)  # the host launches a thousand layers


def test_jobs_that_took_longer_make_what_is_left_longer(monkeypatch, tmp_path):
    """Foreseen 100 s and took 245: (245 + 45) / (100 + 45) = 2 times."""
    monkeypatch.setattr(eta, "seconds", lambda job, here, size: 100.0)
    forecast = eta.Forecast(tmp_path, {}, here=H100)
    jobs = [task(n) for n in ("latency", "memory", "energy")]
    assert forecast.left_s(jobs) == 300
    forecast.ended(jobs[0], 245.0)
    assert forecast.left_s(jobs[1:]) == pytest.approx(400)
    forecast.ended(jobs[1], 100.0)  # in all 345 of 200: (345 + 45) / (200 + 45)
    all_ = 390 / 245
    assert forecast.left_s([task("energy")]) == pytest.approx(100 * all_)
    # A notebook's own time counts for it, beside 45 s at the pace of all.
    assert forecast.left_s([task("memory")]) == pytest.approx(100 * (100 + 45 * all_) / 145)
    assert forecast.left_s([task("latency")]) == pytest.approx(100 * (245 + 45 * all_) / 145)


@pytest.mark.parametrize("pace", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("job_s", [5.0, 40.0, 600.0])
def test_a_machine_that_turned_busy_is_known_within_30_percent_after_three_jobs(
    job_s, pace, monkeypatch, tmp_path
):
    """However long its jobs are: those of a laptop take seconds, those of a study minutes."""
    monkeypatch.setattr(eta, "seconds", lambda job, here, size: job_s)
    forecast = eta.Forecast(tmp_path, {}, here=H100)
    for name in ("latency", "memory", "energy"):
        forecast.ended(task(name), pace * job_s)
    for name in ("memory", "stacks"):  # which has ended before, and not
        assert 0.7 < forecast.left_s([task(name)] * 4) / (4 * pace * job_s) < 1.3


def test_a_job_that_takes_longer_than_foreseen_lengthens_what_follows(monkeypatch, tmp_path):
    """Two of 100 s: after 40 s 160 are left. After 245 s the first has told what one that ends then
    does: 2 times as long for the other."""
    monkeypatch.setattr(eta, "seconds", lambda job, here, size: 100.0)
    forecast = eta.Forecast(tmp_path, {}, here=H100)
    jobs = [task("latency"), task("memory")]
    assert forecast.left_s(jobs, running_s=40.0) == pytest.approx(160)
    assert forecast.left_s(jobs, running_s=100.0) == pytest.approx(100)
    assert forecast.left_s(jobs, running_s=245.0) == pytest.approx(200)
    assert forecast.left_s(jobs[:1], running_s=245.0) == 0
    assert forecast.left_s(jobs) == 200  # nothing has ended


def test_nothing_is_foretold_before_the_machine_is_known_or_of_what_is_not(tmp_path):
    assert eta.Forecast(tmp_path, {}).left_s([task("latency")]) is None
    assert eta.seconds(task("serving"), H100, EIGHT) is None
    assert eta.seconds(task("latency", stack="vllm"), H100, EIGHT) is None
    assert eta.seconds(task("latency"), H100, None) is None


def test_the_console_tells_what_is_left_and_skips_what_was_done(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(eta, "seconds", lambda job, here, size: 100.0)
    jobs = [task(n) for n in ("machine", "latency", "memory")]
    tally = console.Tally(jobs, forecast=eta.Forecast(tmp_path, {}, here=H100))
    tally.skips = {jobs[1].name}
    tally.start(jobs[0], "")
    assert "about 3 min left in all" in capsys.readouterr().err
    with tally.beating(jobs[0], every_s=0.02):
        time.sleep(0.2)
    err = capsys.readouterr().err
    assert "running for 0 s, about 3 min left" in err
    before = err.count("running for")
    assert 2 < before < 12


def test_the_console_lengthens_what_is_left_while_a_job_runs(monkeypatch, capsys, tmp_path):
    """Of 100 s, and 245 have gone by a clock of our own."""
    monkeypatch.setattr(eta, "seconds", lambda job, here, size: 100.0)
    clock = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    jobs = [task(n) for n in ("latency", "memory")]
    tally = console.Tally(jobs, forecast=eta.Forecast(tmp_path, {}, here=H100))
    tally.start(jobs[0], "")
    clock[0] = 245.0
    with tally.beating(jobs[0], every_s=0.02):
        time.sleep(0.1)
    assert "running for 4 min, about 3 min left in all" in capsys.readouterr().err
    tally.end(jobs[0], {"status": "ok", "error": None})
    tally.start(jobs[1], "")
    assert "about 3 min left in all" in capsys.readouterr().err
