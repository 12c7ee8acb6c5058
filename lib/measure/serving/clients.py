"""A truth table of load generators: each is run against the null server and scored by its stamps.

`make clients` makes an environment for each client, since they do not fit ours, runs every scenario
one after another over loopback, and writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lib.hardware.host import cpu_name, today
from lib.measure.serving import kinds, nullserver, plan, truth, words
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.plan import Cell, Endpoint
from lib.measure.serving.script import Behaviour

MODEL = "null-model"  # a bare "null" is read as JSON's null by GuideLLM
RATE = Load("poisson", 20)
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 24
VOCABULARY = 1000
RUN_LIMIT_S = 240.0
PLAIN_REQUESTS, OTHER_REQUESTS = 400, 100
Row = dict[str, Any]
Claims = tuple[list[Row], dict[str, float] | None]


@dataclass(frozen=True)
class Scenario:
    """What the null server does, for how many requests, and on which api."""

    behaviours: tuple[Behaviour, ...]
    requests: int = OTHER_REQUESTS
    api: str = "completions"


SCENARIOS: dict[str, Scenario] = {
    "one token a chunk": Scenario((Behaviour(),), PLAIN_REQUESTS),
    "four tokens a chunk": Scenario((Behaviour(bundle=4),)),
    "three chunks a write": Scenario((Behaviour(join=3),)),
    "reasoning first": Scenario((Behaviour(reasoning_tokens=8),), api="chat"),
    "empty answers": Scenario((Behaviour(), Behaviour(output_tokens=0))),
    "resets": Scenario((*[Behaviour()] * 3, Behaviour(reset_after=5))),
    "cached tokens": Scenario((Behaviour(cached_tokens=16),)),
}


@dataclass(frozen=True)
class Client:
    """A load generator. `run(python, url, scenario, folder, log)` gives its claims, and the planned
    instants by request id where it has a plan, else None; `title` says how it was set up; `package`
    and `version` are what its environment gets, None for ours."""

    title: str
    run: Callable[[Path, str, Scenario, Path, Any], Claims]
    package: str | None = None
    version: str | None = None


def _call(command: Sequence[str], folder: Path, log: Any, environment: dict[str, str]) -> None:
    """Run a client's command; raises RuntimeError with its status where it fails."""
    env = {**os.environ, **environment}
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
    ) as process:
        try:
            status = process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise RuntimeError(f"it did not end within {RUN_LIMIT_S:g} s") from None
    if status:
        raise RuntimeError(f"it ended with status {status}")


def ours(python: Path, url: str, scenario: Scenario, folder: Path, log: Any) -> Claims:
    """This package's client, asking as it asks vLLM's server."""
    endpoint = Endpoint(url, MODEL, "vllm", api=scenario.api, vocab_size=VOCABULARY)
    seconds = 2 * scenario.requests / RATE.value
    cell = Cell(RATE, Lengths(PROMPT_TOKENS), Lengths(OUTPUT_TOKENS), 0.0, seconds)
    data = plan.build(endpoint, cell, seed=1)
    data["requests"] = data["requests"][: scenario.requests]
    rows = plan.run(data, folder)
    instants_s = {str(r["id"]): rows[0]["zero_s"] + r["at_s"] for r in data["requests"]}
    return truth.claims_of(rows), instants_s


def tokenizer_folder(folder: Path) -> Path:
    """A tokenizer of VOCABULARY words with the little that other clients want beside it."""
    words.write(folder, VOCABULARY)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def words_of(number: int) -> str:
    """A prompt of PROMPT_TOKENS words, another one for each number."""
    return " ".join(f"w{(31 * number + 7 * k) % (VOCABULARY - 1)}" for k in range(PROMPT_TOKENS))


def aiperf(python: Path, url: str, scenario: Scenario, folder: Path, log: Any) -> Claims:
    """AIPerf on bodies of our own, with the server's token counts."""
    common = {"model": MODEL, "max_tokens": OUTPUT_TOKENS, "stream": True}
    common |= {"min_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    common["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    sessions = []
    for number in range(scenario.requests):
        text = words_of(number)
        content = {"prompt": text}
        if scenario.api == "chat":
            content = {"messages": [{"role": "user", "content": text}]}
        sessions.append({"session_id": f"s{number}", "payloads": [{**common, **content}]})
    inputs = folder / "inputs.json"
    inputs.write_text(json.dumps({"data": sessions}))
    tokenizer, out = tokenizer_folder(folder / "tokenizer"), folder / "out"
    options = {
        "--model": MODEL,
        "--url": url,
        "--endpoint-type": scenario.api,
        "--custom-dataset-type": "inputs-json",
        "--input-file": str(inputs),
        "--tokenizer": str(tokenizer),
        "--arrival-pattern": "poisson",
        "--request-rate": f"{RATE.value:g}",
        "--request-count": str(scenario.requests),
        "--random-seed": "1",
        "--artifact-dir": str(out),
        "--ui": "none",
    }
    flags = ["--streaming", "--use-server-token-count"]
    flat = [part for pair in options.items() for part in pair]
    _call([str(python.with_name("aiperf")), "profile", *flags, *flat], folder, log, {})
    return aiperf_claims((out / "profile_export.jsonl").read_text(encoding="utf-8")), None


def aiperf_claims(text: str) -> list[Row]:
    """Claims from AIPerf's records (one JSON line a request, times in ms)."""
    claims = []
    for line in text.splitlines():
        row = json.loads(line)
        metrics = {name: value["value"] for name, value in (row.get("metrics") or {}).items()}
        claims.append(
            {
                "id": row["metadata"]["x_request_id"],
                "ttft_s": _seconds(metrics.get("time_to_first_token")),
                "visible_s": _seconds(metrics.get("time_to_first_output_token")),
                "itl_s": _seconds(metrics.get("inter_token_latency")),
                "output_tokens": metrics.get("output_sequence_length"),
                "cached_tokens": metrics.get("usage_prompt_cache_read_tokens"),
                "delay_s": _delay_s(row["metadata"]),
                "failed": bool(row.get("error")),
            }
        )
    return claims


def _delay_s(metadata: Row) -> float | None:
    """From the instant at which AIPerf's timer let a request go until it was sent."""
    ends = metadata.get("credit_issued_ns"), metadata.get("request_start_ns")
    return None if None in ends else (ends[1] - ends[0]) / 1e9


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def guidellm(
    python: Path, url: str, scenario: Scenario, folder: Path, log: Any, *, workers: str = ""
) -> Claims:
    """GuideLLM on prompts of our own; with one of its `workers` all arrivals come from one stream
    of numbers."""
    data, out = folder / "data.jsonl", folder / "out.json"
    rows = [
        {"prompt": words_of(number), "output_tokens_count": OUTPUT_TOKENS}
        for number in range(scenario.requests)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = kinds.APIS[scenario.api]
    options = {
        "--backend": f"kind=openai_http,target={url},model={MODEL},request_format={path}",
        "--profile": f"kind=poisson,rate={RATE.value:g}",
        "--constraint": f"kind=max_requests,count={scenario.requests}",
        "--tokenizer": f"kind=hf_auto,model={tokenizer_folder(folder / 'tokenizer')}",
        "--data": f"kind=json_file,path={data}",
        "--output": f"kind=json,path={out}",
    }
    flat = [part for pair in options.items() for part in pair]
    command = [str(python.with_name("guidellm")), "run", *flat, "--disable-console-interactive"]
    quiet = {"HF_HUB_OFFLINE": "1", "GUIDELLM__LOGGING__LOG_FILE": str(folder / "guidellm.log")}
    few = {"GUIDELLM__MAX_WORKER_PROCESSES": workers} if workers else {}
    _call(command, folder, log, quiet | few)
    return guidellm_claims(json.loads(out.read_text(encoding="utf-8"))), None


def guidellm_claims(report: Row) -> list[Row]:
    """Claims from GuideLLM's report (times in ms).

    Its requests have no id that the server sees; failed ones have no prompt either, and only count.
    """
    claims = []
    groups = report["benchmarks"][0]["requests"]
    for group in ("successful", "errored", "incomplete"):
        for row in groups.get(group) or []:
            body = (json.loads(row.get("request_args") or "{}") or {}).get("body")
            times = row["info"]["timings"]
            claims.append(
                {
                    "prompt_key": nullserver.prompt_key(body) if body else None,
                    "delay_s": _late_s(times.get("targeted_start"), times.get("request_start")),
                    "ttft_s": _seconds(row.get("time_to_first_token_ms")),
                    "visible_s": _seconds(row.get("time_to_first_output_token_ms")),
                    "itl_s": _seconds(row.get("inter_token_latency_ms")),
                    "output_tokens": row.get("output_tokens"),
                    "cached_tokens": row["input_metrics"].get("cached_tokens"),
                    "failed": group != "successful",
                }
            )
    return claims


def _late_s(targeted_s: float | None, start_s: float | None) -> float | None:
    """From GuideLLM's target to its start; None where the target is no instant (it may be -1)."""
    if not targeted_s or not start_s or targeted_s < start_s - 3600:
        return None
    return start_s - targeted_s


CLIENTS: dict[str, Client] = {
    "ours": Client("this workbook's client", ours),
    "aiperf": Client("AIPerf", aiperf, "aiperf", "0.13.0"),
    "guidellm": Client("GuideLLM", guidellm, "guidellm", "0.8.1"),
    "guidellm-1": Client(
        "GuideLLM, one worker process", partial(guidellm, workers="1"), "guidellm", "0.8.1"
    ),
}


def environment(client: Client, folder: Path) -> Path:
    """The Python of a client's own environment, made and filled where it is not there."""
    if client.package is None:
        return Path(sys.executable)
    home = folder / client.package
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    if not python.with_name(client.package).exists():
        requirement = f"{client.package}=={client.version}"
        subprocess.run([python, "-m", "pip", "install", "-q", requirement], check=True)
    return python


def installed(client: Client, python: Path) -> str | None:
    """Version of a client as it is installed, or None for ours."""
    if client.package is None:
        return None
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    process = subprocess.run(
        [python, "-c", code, client.package], capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


def measure(client: Client, python: Path, scenario: Scenario, folder: Path) -> Row:
    """A client in a scenario: its checks, or the error with which it ended."""
    load = RATE if scenario.requests >= PLAIN_REQUESTS else None
    folder.mkdir(parents=True)
    begin_s = time.monotonic()
    with (
        nullserver.start(folder / "server", list(scenario.behaviours), model=MODEL) as server,
        (folder / "client.log").open("w") as log,
    ):
        url, stamps = server
        try:
            claims, instants_s = client.run(python, url, scenario, folder, log)
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}", "checks": []}
    rows = nullserver.read_stamps(stamps)
    checks = truth.score(claims, rows, load=load, scheduled_s=instants_s)
    figures = {"seconds": round(time.monotonic() - begin_s, 1)}
    figures["load_average"] = round(os.getloadavg()[0], 2)
    return {"checks": [asdict(check) for check in checks], **figures}


def table(names: Sequence[str], venvs: Path, folder: Path) -> Row:
    """The truth table: every client in every scenario, with versions, date and machine.

    The clients of a scenario run one after another, so that what the machine does besides is about
    the same for them.
    """
    pythons = {name: environment(CLIENTS[name], venvs) for name in names}
    outcomes: dict[str, Row] = {name: {} for name in names}
    for title, scenario in SCENARIOS.items():
        for name in names:
            place = folder / name / title.replace(" ", "-")
            outcomes[name][title] = measure(CLIENTS[name], pythons[name], scenario, place)
    rows = [
        {
            "client": name,
            "title": CLIENTS[name].title,
            "version": installed(CLIENTS[name], pythons[name]),
            "scenarios": outcomes[name],
        }
        for name in names
    ]
    return {
        "date": today(),
        "machine": {"cpu": cpu_name(), "processors": os.cpu_count()},
        "python": platform.python_version(),
        "arrivals": RATE.label,
        "lengths": {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS},
        "limits": {"ttft_s": truth.TTFT_LIMIT_S, "itl": truth.ITL_LIMIT},
        "scenarios": {
            title: {
                "requests": s.requests,
                "api": s.api,
                "behaviours": [_changes(b) for b in s.behaviours],
            }
            for title, s in SCENARIOS.items()
        },
        "clients": rows,
    }


def _changes(behaviour: Behaviour) -> Row:
    """What a behaviour does otherwise than the plain one."""
    plain = asdict(Behaviour())
    return {name: value for name, value in asdict(behaviour).items() if value != plain[name]}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.serving.clients", description=__doc__
    )
    parser.add_argument("--venvs", type=Path, default=plan.ROOT / ".venv-clients")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--keep", type=Path, help="keep what the clients wrote in this folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        data = table(args.only, args.venvs.resolve(), (args.keep or Path(temporary)).resolve())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    args.out.write_text(text + "\n", encoding="utf-8")
    for line in lines(data):
        sys.stderr.write(line + "\n")
    return 0


def lines(data: Row) -> list[str]:
    """The table as lines: each check that a client does not pass, or that it does not tell."""
    sentences = []
    for row in data["clients"]:
        name = " ".join(filter(None, (row["title"], row["version"])))
        for title, scenario in row["scenarios"].items():
            if scenario.get("error"):
                sentences.append(f"{name}, {title}: {scenario['error']}")
            for check in scenario["checks"]:
                if check["ok"] is False:
                    sentences.append(f"{name}, {title}: {check['name']} is off: {check['text']}")
    return sentences or ["every client passes every check"]


if __name__ == "__main__":
    sys.exit(main())
