"""A server is measured by one call and by one job; a bad one ends in a reason, and rows stay."""

from __future__ import annotations

import asyncio
import contextlib
import http.client as http_client
import json
import re
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lib import files
from lib.__main__ import main
from lib.hardware.device import CpuDevice
from lib.measure.serving import client, nullserver, plan, server, study, target
from lib.measure.serving.script import Behaviour
from lib.measure.serving.server import EndpointError
from lib.measure.serving.target import Target
from lib.records import jobs, store
from lib.run import loop, profiles
from lib.run import plan as plans

TIMEOUT_S = 1.0


class Device(CpuDevice):
    """A CPU that is not measured before each study."""

    def environment(self) -> dict:
        return {"device": "cpu", "gpu": None}


def run(url: str, folder: Path, model: str = "null", most_users: int = 2, **choice) -> list:
    """A study of loads of 0.5 s."""
    shape = study.cell(16, 6, sigma=choice.pop("sigma", 0.0), warmup_s=0.2, window_s=1.2)
    return study.study(
        Target(model, url=url, **choice),
        shape,
        device=Device(),
        most_users=most_users,
        rate_shares=[0.5],
        mix_loads={},
        idle_s=0.0,
        limits={"ttft_s": 1.0},
        timeout_s=TIMEOUT_S,
        seed=0,
        records_path=folder / "records.jsonl",
    )


@pytest.fixture
def here(monkeypatch):
    """The client in this process, which saves the start of another one for each run."""

    def run_here(data, folder):
        rows: list[dict] = []
        asyncio.run(client.run_plan(json.loads(json.dumps(data)), rows.append))
        return rows

    monkeypatch.setattr(plan, "run", run_here)
    monkeypatch.setattr(plan, "TAIL_S", 0.2)


@contextlib.contextmanager
def raw(answer: bytes | None):
    """A listener that reads a request and answers these bytes; None never takes a connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer)

    if answer is not None:
        threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def http(status: str, kind: str, body: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


SCRIPTED = {
    "slow to the first token": (Behaviour(ttft_s=30.0), "timeout", "not finished within 1 s"),
    "slow between tokens": (Behaviour(gap_s=5.0), "timeout", "stopped after 1 chunks"),
    "closes": (Behaviour(close_after=2), "closed", "closed the connection after 2 chunks"),
    "resets": (Behaviour(reset_after=0), "closed", "before any chunk; the server ended|look at"),
    "no HTTP": (Behaviour(malformed="http"), "malformed", "does this address speak the OpenAI"),
    "no JSON": (Behaviour(malformed="json"), "malformed", "an event that is no JSON"),
    "does not stream": (Behaviour(stream=False), "not_streaming", "turn streaming on"),
    "another model": (Behaviour(model="other"), "wrong_model", "name the model that the server"),
    "ignores lengths": (Behaviour(output_tokens=3), "wrong_length", "asked for 4 output_tokens"),
    "answers nothing": (Behaviour(output_tokens=0), "wrong_length", "usage says 0"),
    "sends no usage": (Behaviour(usage="none"), "no_usage", "stream_options.include_usage"),
    "refuses": (Behaviour(status=429), "status", "HTTP 429: the script answers 429"),
}
RAW = {
    "listens and takes nobody": (None, "timeout", "not finished within 1 s"),
    "a web page": (
        http("200 OK", "text/html", "<p>hi</p>"),
        "not_streaming",
        "answer is text/html",
    ),
    "needs a key": (http("401 No", "application/json", '{"error": "no key"}'), "status", "no key"),
    "elsewhere": (http("307 No", "text/plain", "there"), "status", "HTTP 307: there"),
    "says nothing": (b"", "closed", "closed the connection before any chunk"),
}


def refused(url: str, folder: Path, failure_class: str, words: str, model: str = "null") -> None:
    """The study ends at once, with the class and the words, and leaves the environment's row."""
    begin_s = time.monotonic()
    with pytest.raises(EndpointError, match=words) as caught:
        run(url, folder, model)
    assert caught.value.failure_class == failure_class
    assert time.monotonic() - begin_s < TIMEOUT_S + 6.0 and url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [row.kind for row in store.load(folder / "records.jsonl")] == ["environment"]


@pytest.mark.parametrize("name", sorted(SCRIPTED))
def test_a_server_that_misbehaves_is_refused_with_its_reason(name, tmp_path, here):
    behaviour, failure_class, words = SCRIPTED[name]
    with nullserver.start(tmp_path / "server", [behaviour]) as (url, _):
        refused(url, tmp_path, failure_class, words)


@pytest.mark.parametrize("name", sorted(RAW))
def test_what_is_no_server_of_models_is_refused_with_its_reason(name, tmp_path, here):
    answer, failure_class, words = RAW[name]
    with raw(answer) as url:
        refused(url, tmp_path, failure_class, words)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid:8000"])
def test_an_address_without_a_server_is_told(url, tmp_path, here):
    refused(url, tmp_path, "unreachable", "is the server started, and are host and port right")


def test_a_model_that_is_not_served_is_told(tmp_path, here):
    with nullserver.start(tmp_path / "server", [Behaviour()]) as (url, _):
        refused(url, tmp_path, "status", "the model 'x' does not exist", model="x")


def test_rows_of_before_stay_where_a_server_turns_bad(tmp_path, here):
    """The first load of one user is whole; from then on every answer is reset."""
    good = [Behaviour(ttft_s=0.02, gap_s=0.005)] * 30
    with nullserver.start(tmp_path / "server", [*good, *[Behaviour(reset_after=1)] * 9999]) as s:
        rows = run(s[0], tmp_path)
    assert store.load(tmp_path / "records.jsonl") == rows
    loads = [row for row in rows if row.kind == "serving"]
    assert loads[0].error is None and [w["code"] for w in loads[0].warnings]
    assert "closed the connection after 1 chunks" in loads[1].error
    assert "did not answer after the cell before" in loads[2].error and len(loads) == 3


def test_a_server_that_runs_is_measured_as_it_names_itself(tmp_path, here):
    with nullserver.start(tmp_path / "server", [Behaviour(ttft_s=0.02)]) as (url, _):
        rows = run(f"{url}/v1/", tmp_path, model="")
        assert server.kind_of(url) == "openai" and server.models(url)[0]["id"] == "null"
    loads = [row for row in rows if row.kind == "serving"]
    assert [row.key["load"] for row in loads][:2] == ["closed 1", "closed 2"]
    assert all(row.error is None for row in loads) and len(loads) == 3
    key = loads[0].key
    assert (key["stack"], key["server"], key["model"]) == ("server", "openai", "null")
    assert (key["weights"], key["dtype"]) == ("unknown", "unknown")
    assert loads[0].values["limit_ttft_s"] == 1.0 and loads[2].key["batch"] is None
    assert loads[0].missing["energy_j"] == CpuDevice.missing["energy"]


def test_lognormal_lengths_are_part_of_the_load(tmp_path, here):
    with nullserver.start(tmp_path / "server", [Behaviour(ttft_s=0.01, gap_s=0.001)]) as (url, _):
        row = run(url, tmp_path, most_users=1, sigma=0.5)[1]
    assert row.key["load"] == "closed 1, lognormal(16, 0.5) in, lognormal(6, 0.5) out"
    assert (row.key["context"], row.key["new_tokens"]) == (16, 6)
    lengths = set(row.samples["output_tokens"])
    assert len(lengths) > 2 and max(lengths) <= 24 and row.error is None


def test_addresses_are_taken_as_users_give_them():
    same = ("localhost:8000", "http://localhost:8000", "http://localhost:8000/v1/")
    assert {server.base(url) for url in same} == {"http://localhost:8000"}
    assert server.base("https://a.b/llm/v1") == "https://a.b/llm"


@pytest.mark.parametrize(
    "url", ["", "http://", "h:port", "h:99999", "ftp://h", "http://[::1", "/tmp"]
)
def test_what_is_no_address_is_told_before_anything_is_asked(url, tmp_path, here):
    with pytest.raises(EndpointError, match="is no address: .*; give one such as") as caught:
        run(url or " ", tmp_path, model="m")
    assert caught.value.failure_class == "unreachable"


LOCAL = ("localhost:8000", "LOCALHOST", "127.0.0.2:80", "[::1]:8000", "http://0.0.0.0:8000")


@pytest.mark.parametrize("url", [*LOCAL, socket.gethostname()])
def test_addresses_of_this_machine_have_its_joules(url):
    assert server.is_local(url)


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000/v1", "elsewhere:80", "[fe80::1]:80"])
def test_other_addresses_have_none_of_them(url):
    assert not server.is_local(url)


@pytest.mark.parametrize(
    ("piece", "count", "words"),
    [(b"x", 9999, "no end of the page"), (b"x" * 2**20, 99, "no end of"), (b"x", 1, "Incomplete")],
)
def test_a_page_without_an_end_is_given_up(piece, count, words, monkeypatch):
    """A byte at a time, more than is wanted, or less than was promised: no reader waits for it."""
    monkeypatch.setattr(server, "MOST_PAGE", 2**21)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n")
            for _ in range(count):
                connection.sendall(piece)
                time.sleep(0.02)

    threading.Thread(target=serve, daemon=True).start()
    begin_s = time.monotonic()
    with pytest.raises((OSError, http_client.HTTPException), match=words):
        server.get(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics", timeout_s=0.3)
    assert time.monotonic() - begin_s < 3.0
    listener.close()


def test_joules_of_another_machine_are_not_those_of_the_board_here(monkeypatch):
    monkeypatch.setattr(server, "kind_of", lambda url: "vllm")
    opened = target.running(Target("org/m", url="http://10.0.0.7:8000"))
    assert "another machine" in opened.missing["energy_j"] and opened.endpoint.uses_ids
    assert target.running(Target("org/m", url="127.0.0.1:8000")).missing == {}
    folder = target.running(Target("/models/mine", url="localhost:1")).key["model"]
    assert folder == "mine"


def test_kinds_of_running_servers_are_told_by_what_they_say(monkeypatch):
    pages = {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}}

    def get(url, timeout_s):
        return json.dumps(pages.get(url.removeprefix("http://x"), {}))

    monkeypatch.setattr(server, "get", get)
    assert server.kind_of("http://x") == "vllm"
    pages.clear()
    assert server.kind_of("http://x") == "openai"
    pages["/v1/models"] = ["no object"]
    assert server.kind_of("http://x") == "openai"
    pages["/v1/models"] = {"data": ["no object"]}
    assert server.kind_of("http://x") == "openai"
    pages["/openapi.json"] = {"paths": {"/load_model": {}}}
    assert server.kind_of("http://x") == "transformers"


# vLLM's command line as far as it is used, strictly, before the null server.
FAKE_VLLM = """
import argparse, asyncio, json, os, pathlib, socket, sys

parser = argparse.ArgumentParser()
for name in ("model", "host", "served-model-name", "generation-config", "dtype", "load-format"):
    parser.add_argument(f"--{{name}}", required=True)
for name in ("port", "seed", "max-model-len", "max-num-seqs"):
    parser.add_argument(f"--{{name}}", type=int, required=True)
parser.add_argument("--gpu-memory-utilization", type=float)
for name in ("model-loader-extra-config", "compilation-config"):
    parser.add_argument(f"--{{name}}", type=json.loads)
for name in ("skip-tokenizer-init", "enable-prefix-caching", "enforce-eager"):
    parser.add_argument(f"--{{name}}", action=argparse.BooleanOptionalAction)
parser.add_argument("--disable-uvicorn-access-log", action="store_true", required=True)
args = parser.parse_args()
seen = vars(args) | {{"config": json.loads(pathlib.Path(args.model, "config.json").read_text())}}
seen["plan"] = pathlib.Path(args.model_loader_extra_config["plan"]).exists()
seen["ours"] = [name for name in sys.path if pathlib.Path(name, "vllm_weights.py").exists()]
pathlib.Path({seen!r}).write_text(json.dumps(seen))

sys.path.insert(0, {root!r})
from lib.measure.serving import nullserver, script

listener = socket.create_server((args.host, args.port))
listener.setblocking(False)
behaviours = [script.Behaviour(ttft_s=0.02, gap_s=0.005)]
server = nullserver.Server(behaviours, lambda row: None, args.served_model_name)
asyncio.run(nullserver.serve(server, listener))
"""


def test_vllms_server_is_started_for_a_model_of_ours_and_ended(tmp_path, here, monkeypatch):
    """Another package of that name reads the same command line, strictly, and answers."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    seen = tmp_path / "seen.json"
    text = FAKE_VLLM.format(seen=str(seen), root=str(files.ROOT))
    (package / "api_server.py").write_text(text)
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("VLLM_PYTHONPATH", str(tmp_path / "site"))
    options = ("--enforce-eager",)
    rows = run("", tmp_path, "tiny-gpt-oss", form="mxfp4", kind="vllm", options=options)
    loads = [row for row in rows if row.kind == "serving"]
    assert [row.error for row in loads] == [None] * 3
    key = loads[0].key
    assert (key["model"], key["weights"], key["dtype"]) == ("tiny-gpt-oss", "random", "mxfp4")
    assert key["server"] == "vllm" and loads[0].values["token_id_prompts"]
    assert set(loads[0].samples["prompt_tokens"]) == {16}
    assert loads[0].values["metrics"]["null:generation_tokens_total{model=null}"] > 0
    assert not any("/tmp" in text for text in loads[0].values["server_options"])
    args = json.loads(seen.read_text())
    assert args["config"]["quantization_config"]["quant_method"] == "mxfp4"
    assert args["load_format"] == "drawn" and args["plan"] and args["ours"]
    assert (args["max_num_seqs"], args["max_model_len"]) == (2, 23)
    assert args["enforce_eager"] and args["skip_tokenizer_init"]
    assert args["enable_prefix_caching"] is False
    assert args["compilation_config"] == {"cudagraph_capture_sizes": [1, 2]}
    with pytest.raises(OSError):
        server.get(f"http://127.0.0.1:{args['port']}/health", timeout_s=1.0)


def test_without_vllm_the_reason_says_what_to_set(tmp_path, here, monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.delenv("VLLM_PYTHONPATH", raising=False)
    with pytest.raises(EndpointError, match="has no vllm; install them, or set VLLM_PYTHON"):
        run("", tmp_path, "tiny-gpt-oss", kind="vllm")


# --- as a job ------------------------------------------------------------------------------------


def profile(folder: Path, url: str, **values) -> profiles.Profile:
    """The demo's section for servers with short windows, for what is served at an address."""
    (folder / "params").mkdir(exist_ok=True)
    data = files.read_yaml(files.ROOT / "params" / "demo.yaml")
    serving = data["notebooks"]["serving"]
    serving |= {"most_users": 2, "warmup_s": 0.2, "window_s": 1.2, "timeout_s": 5.0, **values}
    serving["limits"] = {"ttft_s": 1.0}
    names = ("weights", "dtype", "device", "seed", "context", "new_tokens")
    defaults = {name: data["defaults"][name] for name in names}
    text = json.dumps({"defaults": defaults, "notebooks": {"serving": serving}, "models": []})
    (folder / "params" / "tiny.yaml").write_text(text)
    slices = {"server": url, "models": "null"}
    return profiles.profile("tiny", slices, params_dir=folder / "params")


def run_job(folder: Path, url: str, **values) -> tuple[int, dict, jobs.Job]:
    """Exit code, run.json and job of the notebook."""
    code = loop.run(profile(folder, url, **values), folder / "out")
    (job,) = jobs.find(folder / "out")
    return code, job.run, job


def test_a_job_ends_with_the_reason_of_a_bad_server(tmp_path):
    code, manifest, job = run_job(tmp_path, "http://127.0.0.1:1")
    assert code == 1 and manifest["status"] == "failed"
    assert manifest["error"]["name"] == "EndpointError"
    assert "is the server started, and are host and port right?" in manifest["error"]["value"]
    assert job.path == "null/unknown-server/serving" and len(job.records) == 1
    assert "SERVER=http://127.0.0.1:1" in job.rerun and "WEIGHTS" not in job.rerun


def test_a_job_keeps_the_rows_of_a_server_that_dies(tmp_path):
    """The server is ended as soon as the first load is written."""
    with nullserver.start(tmp_path / "server", [Behaviour(ttft_s=0.02)]) as (url, stamps):
        children = psutil.Process().children()
        process = next(p for p in children if any("nullserver" in part for part in p.cmdline()))
        records = tmp_path / "out" / "null" / "unknown-server" / "serving" / ".partial"

        def end() -> None:
            path = records / "records.jsonl"
            while not path.exists() or path.read_text().count("\n") < 2:
                time.sleep(0.02)
            process.kill()

        watcher = threading.Thread(target=end, daemon=True)
        watcher.start()
        code, manifest, job = run_job(tmp_path, url, most_users=4)
        profile_now = profile(tmp_path, url, most_users=4)
        (task,) = plans.plan(profile_now, tmp_path / "out")
        other = profile(tmp_path, "http://127.0.0.1:9", most_users=4)
        (elsewhere,) = plans.plan(other, tmp_path / "out")
    assert code == 1 and manifest["status"] == "ok"  # an arm failed, and the notebook went on
    loads = [row for row in job.records if row.kind == "serving"]
    assert loads[0].error is None and loads[-1].error
    assert "is the server started" in loads[-1].error
    # The same server is not measured again, another one is.
    models = Path("none")
    assert plans.job_sha(task, "cpu", models) == manifest["job_sha"]
    assert plans.job_sha(elsewhere, "cpu", models) != manifest["job_sha"]


def test_a_server_that_cannot_be_asked_for_its_model_is_bad_input(capsys):
    assert main(["report", "--notebooks", "serving", "--server", "127.0.0.1:1"]) == 2
    text = capsys.readouterr().err
    assert re.search(r"error: SERVER=127.0.0.1:1: http://127.0.0.1:1/v1/models: .*refused", text)
    assert len(text.strip().splitlines()) == 1
