"""What was measured where, how it ended, and what to beware of: the report's account of itself."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lib.analysis import gates
from lib.analysis.setups import arm_text
from lib.records.jobs import Job, readable
from lib.records.record import NO_ARM, Record, environments, select
from lib.show.table import Column, Table, of_lines
from lib.show.wording import short
from lib.stats import Estimate, missing

TIMED = ("ttft_s", "e2e_s")
COLUMNS = (
    Column("model", numeric=False), Column("setup", numeric=False),
    Column("notebook", numeric=False), Column("whole job", "s"), Column("start-up", "s"),
    Column("imports", "s"), Column("model build", "s"), Column("captures and compilations", "s"),
    Column("warm-up", "s"), Column("timed calls", "s"), Column("everything else", "s"),
)  # fmt: skip
NOTES = (
    "start-up: the job less its cells, which is the kernel's start and the writing of files; "
    "imports: the first cell; model build: from files or a seed to a model on the device; "
    "everything else: untimed measurements, models that arms load for themselves, figures",
)


def is_demo(rows: Sequence[Record]) -> bool:
    """Whether everything was measured on a CPU."""
    envs = environments(rows).values()
    return bool(envs) and not any(env.get("gpu") for env in envs)


def counts(jobs: Sequence[Job], rows: Sequence[Record]) -> dict[str, int]:
    """How many jobs are planned and how they ended; how many arms were measured."""
    status = Counter(job.status for job in jobs)
    arms = [r for r in rows if r.kind not in NO_ARM]
    return {
        "ok": status["ok"],
        "missing": status["missing"],
        "planned": len(jobs),
        "failed": len(jobs) - status["ok"] - status["missing"],
        "arms": len(arms),
        "arm_errors": sum(bool(r.error) and not gates.is_withheld(r) for r in arms),
        "withheld": sum(map(gates.is_withheld, arms)),
    }


def provenance(jobs: Sequence[Job]) -> Table:
    """Which models ran where: a line for each GPU, driver, set of versions, host and commit.

    A fact that holds for all lines is a note instead of a column; of a single place each fact is a
    line.
    """
    places = _places(jobs)
    names = list(dict.fromkeys(name for facts in places for name in facts))
    shared = {n: places[0][n] for n in names if len({facts.get(n) for facts in places}) == 1}
    title = "What was measured where"
    if len(places) < 2:
        return of_lines("where", title, [{"fact": n, "value": v} for n, v in shared.items()])
    lines = [{n: facts.get(n, "") for n in names if n not in shared} for facts in places]
    everywhere = "everywhere: " + "; ".join(f"{name} {value}" for name, value in shared.items())
    return replace(of_lines("where", title, lines), notes=(everywhere,) if shared else ())


def _places(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """The facts of each GPU, driver, set of versions, host and commit."""
    groups: dict[tuple, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for job in jobs:
        for env_id, env in environments(job.records).items():
            run = job.run_of(env_id)
            packages = env.get("packages") or {}
            where = {
                "GPU": env.get("gpu") or "CPU, no GPU",
                "driver": env.get("driver"),
                "CUDA": env.get("cuda"),
                "torch": env.get("torch") or packages.get("torch"),
                "transformers": env.get("transformers") or packages.get("transformers"),
                "host CPU": env.get("cpu"),
                "commit": _commit(run),
            }
            facts = groups[tuple((k, str(v)) for k, v in where.items() if v)]
            rows = [r for r in job.records if r.key.get("model") and r.env_id == env_id]
            base = [r for r in rows if not r.kind.startswith("ablation")]
            for title, name in (
                ("models", "model"),
                ("weights", "weights"),
                ("stack", "stack"),
                ("dtype", "dtype"),
                ("experts", "experts"),
            ):
                values = {str(r.key.get(name)) for r in base if r.key.get(name) and not r.error}
                facts[title] |= values - {"none"}
            for r in rows:
                source, revision = r.value("model_source"), r.value("model_revision")
                if source:
                    facts["source"].add(f"{source}, {revision}" if revision else str(source))
            if run.get("end"):
                facts["dates"].add(readable(run["end"])[:10])
            for name, text in _machine(env, run).items():
                facts[name].add(text)
    return [_place(dict(where), facts) for where, facts in sorted(groups.items())]


def _machine(env: dict[str, Any], run: dict[str, Any]) -> dict[str, str]:
    """Limits and speeds of the machine, and the lock, as far as they were recorded."""
    clocks = [(name, env.get(f"{name.lower()}_clock_max_hz")) for name in ("SM", "memory")]
    texts = {
        "power limit": f"{env['power_limit_w']:g} W" if env.get("power_limit_w") else "",
        "clocks": ", ".join(f"{n} up to {hz / 1e6:,.0f} MHz" for n, hz in clocks if hz),
        "host speed": f"{env['host_score_per_s']:.1f} M loops/s"
        if env.get("host_score_per_s")
        else "",
        "launch": f"{env['launch_s'] * 1e6:.1f} µs a kernel" if env.get("launch_s") else "",
        "neighbours": f"{env['neighbours']} other GPU(s) of the host had jobs of their own"
        if env.get("neighbours")
        else "",
        "Python": (run.get("env") or {}).get("python") or "",
        "lock": ((run.get("env") or {}).get("lock_sha") or "")[:12],
    }
    return {name: text for name, text in texts.items() if text}


def _range(values: set[str]) -> str:
    """Few values as they are, many as the first and the last."""
    texts = sorted(values, key=lambda text: (len(text), text))
    return ", ".join(texts) if len(texts) <= 2 else f"{texts[0]} to {texts[-1]}"


def _several(values: set[str], most: int = 12) -> str:
    """Values by name; of very many the first and how many more."""
    texts = sorted(values)
    more = [f"{len(texts) - most} more"] if len(texts) > most else []
    return ", ".join([*texts[:most], *more])


def _place(where: dict[str, str], values: dict[str, set]) -> dict[str, str]:
    texts = {name: _several(several) for name, several in values.items() if several}
    software = ", ".join(
        f"{n} {where[n]}" for n in ("driver", "CUDA", "torch", "transformers") if n in where
    )
    facts = {"GPU": where["GPU"]}
    facts |= {n: texts.get(n) for n in ("models", "weights", "source", "stack", "dtype", "experts")}
    facts |= {n: texts.get(n) for n in ("power limit", "clocks")}
    facts |= {"software": software, "host CPU": where.get("host CPU")}
    facts |= {n: _range(values[n]) for n in ("host speed", "launch") if values.get(n)}
    facts |= {
        "neighbours": texts.get("neighbours"),
        "Python": texts.get("Python"),
        "dates": texts.get("dates"),
        "commit": where.get("commit"),
        "lock": texts.get("lock"),
    }
    return {name: text for name, text in facts.items() if text}


def _commit(run: dict[str, Any]) -> str | None:
    git = run.get("git") or {}
    if not isinstance(git, dict) or not git.get("commit"):
        return None
    return str(git["commit"])[:12] + (" with changes" if git.get("dirty") else "")


def arm_errors(rows: Sequence[Record]) -> Table:
    """Arms that failed, with their error; those of a model and kind whose errors differ in numbers
    only are a line, which tells the first."""
    arms: dict[tuple, list[Record]] = {}
    for row in (r for r in rows if r.error):
        alike = re.sub(r"[\d.,]+", "", row.error)
        arms.setdefault((row.key.get("model"), row.kind, alike), []).append(row)
    names = ("model", "kind", "arm, or the first of them", "error")
    columns = (*(Column(name, numeric=False) for name in names), Column("arms"))
    lines = tuple(
        (model, kind, arm_text(several[0].key), several[0].error, len(several))
        for (model, kind, _), several in arms.items()
    )
    return Table("arm-errors", "Arms that failed", columns, lines)


def warnings_table(rows: Sequence[Record]) -> Table:
    """Warnings that rows carry, by model and code: how many rows, and what the first one says."""
    texts: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for warning in row.warnings:
            where = (str(row.key.get("model") or "–"), warning["code"])
            texts.setdefault(where, []).append(warning["text"])
    names = ("model", "warning", "for example")
    columns = (*(Column(name, numeric=False) for name in names), Column("rows"))
    lines = tuple((*where, several[0], len(several)) for where, several in sorted(texts.items()))
    return Table("warnings", "Warnings", columns, lines)


def table(jobs: Sequence[Job]) -> Table:
    """One line for each finished job of a measuring notebook; seconds."""
    ok = [j for j in jobs if j.status == "ok" and j.run.get("start") and j.run.get("end")]
    ok = [job for job in ok if not job.by_script]
    measured = [job for job in ok if select(job.records, "environment")]
    rows = tuple((job.model, job.setup, job.title, *_seconds(parts(job))) for job in measured)
    return Table("costs", "What the measuring cost", COLUMNS, rows, _notes(measured))


def parts(job: Job) -> dict[str, float]:
    """Seconds of a job by what they went into; `other` is what is left."""
    cells = cell_seconds(job)
    prepare = sum(row.values.get("prepare_s") or 0.0 for row in job.own)
    seconds = {
        "job": span_s(job.run),
        "startup": span_s(job.run) - sum(cells),
        "imports": cells[0] if cells else 0.0,
        "build": sum(row.values.get("load_s") or 0.0 for row in select(job.own, "card")),
        "prepare": prepare,
        "warmup": max(0.0, summed(job.own, ("warmup_s",)) - prepare),
        "timed": summed(job.own, TIMED),
    }
    spent_s = sum(s for name, s in seconds.items() if name != "job")
    return seconds | {"other": seconds["job"] - spent_s}


def span_s(run: dict[str, Any]) -> float:
    """Seconds between the start and the end of a job, by its manifest."""
    ends = [datetime.fromisoformat(run[name]) for name in ("start", "end")]
    start, end = (time if time.tzinfo else time.replace(tzinfo=UTC) for time in ends)
    return (end - start).total_seconds()


def cell_seconds(job: Job) -> list[float]:
    """Seconds of each code cell, as papermill wrote them into the executed notebook."""
    if job.notebook_path is None:
        return []
    cells = json.loads(job.notebook_path.read_text(encoding="utf-8"))["cells"]
    times = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
    return [t["duration"] for t in times if t.get("duration") is not None]


def summed(rows: Sequence[Record], names: Sequence[str]) -> float:
    """Sum of all repetitions under these names."""
    return sum(sum(row.samples.get(name, ())) for row in rows for name in names)


def _seconds(seconds: dict[str, float]) -> list[Estimate]:
    if _is_set_back(seconds):
        return [missing("the clock was set back while it ran")] * len(seconds)
    one = {"n": 1, "method": "clock", "reason": "one job, no interval"}
    return [Estimate(value, **one) for value in seconds.values()]


def _is_set_back(seconds: dict[str, float]) -> bool:
    return min(seconds["job"], seconds["startup"]) < 0


def _notes(jobs: Sequence[Job]) -> tuple[str, ...]:
    seconds = [part for part in map(parts, jobs) if not _is_set_back(part)]
    whole_s = sum(part["job"] for part in seconds)
    if not whole_s:
        return ()
    setup_s = sum(part["startup"] + part["imports"] + part["build"] for part in seconds)
    return (
        *NOTES,
        f"all jobs: {short(whole_s / 60)} min, of which starting, importing and building "
        f"models {setup_s / whole_s:.0%}",
    )
